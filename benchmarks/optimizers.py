"""Steps to the same validation loss: AdamW, at its preset's learning rate and at a higher one, beside --optimizer=muon.

    python -m benchmarks.optimizers TEXT --run=laptop      # TEXT: tinyshakespeare; or --run=baby
    python -m benchmarks.optimizers --cost=baby            # what of a step's time is Muon's, on random tokens

Each run is the command that a user would type, in a process of its own; the sides take turns, seed by seed, so that a slow minute of the
machine falls on all. The loss to reach is the one that the better AdamW has at its end with the same seed, which also chooses the
batches of the evaluations. A step's time is that of the fastest steps between two evaluations: other load only ever adds time.
Below is also the table in docs/measured.md.
"""
import argparse
import json
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.tables import MISSING, last, table, where
from nanogpt_fast import devices
from nanogpt_fast.bench import measure
from nanogpt_fast.bench.common import MODELS, quiet, shape_of
from nanogpt_fast.model import GPT, GPTConfig
from nanogpt_fast.training import TrainOptions
from nanogpt_fast.training.muon import muon_and_adamw
from nanogpt_fast.training.step import TrainingStep

COMMON = "train --dataset=shakespeare_char --out_dir=out --sample_tokens=0 --log_interval=1 --device=cpu"
# name: (what it is, its command, a higher learning rate for AdamW). The baby is shortened: its 5,000 steps take hours on a CPU. In 1,000 steps
# the laptop's AdamW ended at 2.113 with the preset's 1e-3, 1.922 with 4e-3 and no lower with 8e-3 (seed 1337); the baby's 3e-3 is not tuned.
RUNS = {
    "laptop": ("--preset=laptop: 2,000 steps of 12 x 64 tokens, 0.8M parameters",
               f"{COMMON} --preset=laptop --eval_interval=100", "4e-3"),
    "baby": ("--preset=baby without dropout, in 200 steps: 64 x 256 tokens, 10.7M parameters",
             f"{COMMON} --preset=baby --dropout=0 --max_iters=200 --warmup_iters=20 --eval_interval=10 --eval_iters=5", "3e-3"),
}


# ----------------------------------------------------------------------------------------------------------------- measure

def train(command, text):
    """[[step, seconds of the steps before it, validation loss], ...] of a run in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "data", "shakespeare_char", "input.txt")
        target.parent.mkdir(parents=True)
        shutil.copy(text, target)
        subprocess.run([sys.executable, "-m", "nanogpt_fast", *shlex.split(command)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        evaluations, seconds = [], 0.0
        for row in map(json.loads, Path(folder, "out", "metrics.jsonl").read_text().splitlines()):
            if "val_loss" in row:
                evaluations.append([row["iter"], round(seconds, 3), row["val_loss"]])
            else:
                seconds += row["ms_per_step"] / 1e3
    return evaluations


def compare(run, text, seeds, json_file):
    """Train with every optimizer and seed; append the record."""
    _, command, rate = RUNS[run]
    sides = {"AdamW": command, f"AdamW, learning_rate={rate}": f"{command} --learning_rate={rate} --min_lr={float(rate) / 10:g}",
             "Muon": f"{command} --optimizer=muon"}
    curves, order = {name: [] for name in sides}, list(sides)
    for seed in seeds:
        random.Random(seed).shuffle(order)
        for name in order:
            curves[name].append(train(f"{sides[name]} --seed={seed}", text))
            step, seconds, loss = curves[name][-1][-1]
            print(f"{run}, seed {seed}, {name}: {loss:.4f} after {step} steps, {seconds:.0f} s", flush=True)
    measure.append(json_file, "optimizers", run=run, commands={name: f"nanogpt-fast {words}" for name, words in sides.items()},
                   seeds=seeds, curves=curves)


def cost(model, json_file, rounds=7):
    """Time whole steps on random tokens, and of each the part that is Muon's; append the record.

    In CPU time, which a busy machine changes less; so on one thread, whose time is the process's.
    """
    torch.set_num_threads(1)
    device = torch.device("cpu")
    config, B = shape_of(model, device)
    torch.manual_seed(0)
    with quiet():
        gpt = GPT(GPTConfig(**config))
        optimizer = muon_and_adamw(gpt, TrainOptions(), "cpu")
    x = torch.randint(config["vocab_size"], (B, config["block_size"]))
    step = TrainingStep(gpt, optimizer, dtype=devices.choose_dtype("auto", device, config["n_embd"]), batch_shape=tuple(x.shape),
                        not_captured="a CPU")
    whole, part, real = [], [], optimizer.muon.step

    def timed(function, samples):
        began = time.process_time()
        function()
        samples.append(time.process_time() - began)
    optimizer.muon.step = lambda: timed(real, part)
    for _ in range(rounds + 2):
        timed(lambda: step(lambda: (x, x)), whole)
    measure.append(json_file, "muon's part", model=model, batch_size=B, block_size=config["block_size"], step=whole[2:], muon=part[2:])
    print(f"{model}: {1e3 * statistics.median(whole[2:]):.1f} ms a step, {1e3 * statistics.median(part[2:]):.1f} ms of it Muon's")


# ------------------------------------------------------------------------------------------------------------------- table

def reached(curve, loss):
    """The step of the first evaluation at or below this loss, or None."""
    return next((step for step, _, found in curve if found <= loss), None)


def seconds_a_step(curves):
    """Of the fastest steps between two evaluations, in any of the runs."""
    return min((after[1] - before[1]) / (after[0] - before[0]) for curve in curves for before, after in zip(curve, curve[1:]))


def section(records):
    """The tables of docs/measured.md."""
    return "\n\n".join([*(_compared(records, run) for run in RUNS), _cost(records)])


def _compared(records, run):
    record = last(records, "optimizers", run=run)
    what = RUNS[run][0]
    if record is None:
        return f"{what}: {MISSING}"
    ends = {name: [curve[-1][2] for curve in curves] for name, curves in record["curves"].items()}
    rival = min((name for name in ends if name.startswith("AdamW")), key=lambda name: statistics.median(ends[name]))
    found = {name: [reached(curve, loss) for curve, loss in zip(curves, ends[rival])] for name, curves in record["curves"].items()}
    seconds = {name: seconds_a_step(curves) for name, curves in record["curves"].items()}
    rows = []
    for name, steps in found.items():
        share = None if None in steps else statistics.median(steps) / statistics.median(found[rival])
        times = seconds[name] / seconds[rival]
        rows.append([name, ", ".join(f"{end:.3f}" for end in ends[name]), ", ".join(f"{step:,}" if step else "never" for step in steps),
                     "" if share is None else f"{share:.2f}", f"{times:.2f}", "" if share is None else f"{share * times:.2f}"])
    head = ["", "validation loss at the end", "steps to the better AdamW's", "steps", "time of a step", "time to it"]
    commands = "\n\n".join(f"`{command}`" for name, command in record["commands"].items() if name == "Muon")
    small = where(record).replace("<sub>", f"<sub>seeds {', '.join(map(str, record['seeds']))}, in turns; the last three columns are ratios to the "
                                           "better AdamW's: of medians, and of the times of each one's fastest steps. ")
    return f"**{what}**\n\n" + table(head, rows) + f"\n\n{commands}\n\n{small}"


def _cost(records):
    rows, shown = [], []
    for model in ("cpu", "baby", "gpt2"):
        record = last(records, "muon's part", model=model)
        shown += [record] if record else []
        if record is None:
            rows.append([model, "", MISSING, "", ""])
            continue
        step, part = (statistics.median(record[key]) for key in ("step", "muon"))
        rows.append([model, f"{record['batch_size']} x {record['block_size']}", f"{1e3 * step:,.1f} ms", f"{1e3 * part:,.1f} ms",
                     f"{100 * part / step:.0f} %"])
    return table(["model", "tokens a step", "a step with Muon, CPU time on one thread", "of it Newton-Schulz and the update", ""], rows) + (
        "\n\n" + where(shown[-1], shown) if shown else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", nargs="?", help="tinyshakespeare's file")
    parser.add_argument("--run", choices=RUNS)
    parser.add_argument("--cost", choices=MODELS)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--json", default=RESULTS / "cpu.jsonl", help="append the result to this file")
    args = parser.parse_args()
    if args.cost:
        cost(args.cost, args.json)
    elif args.text and args.run:
        compare(args.run, args.text, [int(seed) for seed in args.seeds.split(",")], args.json)
    else:
        parser.error("give a text and --run, or --cost")


if __name__ == "__main__":
    main()
