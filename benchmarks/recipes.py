"""Whole training runs with a known final loss: the demo, and nanoGPT's CPU recipe on tinyshakespeare (validation loss 1.88 +- 0.05).

    python -m benchmarks.recipes demo                 # also draws docs/demo.png
    python -m benchmarks.recipes shakespeare TEXT     # TEXT: tinyshakespeare, checked by its sha256
    python -m benchmarks.recipes shakespeare TEXT --reference     # on nanoGPT's own calls in float32, to compare the time with

Each runs as the command that a user would type, in a separate process; the record holds that command.
"""
import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import RESULTS
from nanogpt_fast.bench import measure
from nanogpt_fast.text.corpora import SHAKESPEARE_SHA256

DEMO_PICTURE = Path(__file__).parent.parent / "docs" / "demo.png"
RECIPE = ("train --dataset=shakespeare_char --out_dir=out --gradient_accumulation_steps=1 --device=cpu --compile=False "
          "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 "
          "--learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 --warmup_iters=100 --eval_interval=250 --eval_iters=200 --log_interval=10 "
          "--bias=False")


# What nanoGPT computes: its PyTorch calls, its only dtype on a CPU, malloc as it is. AdamW is fused here, which nanoGPT's is not.
REFERENCE = "--backend=reference --dtype=float32 --malloc=off"


def run(name, command, json_file, text=None):
    """Run `nanogpt-fast <command>` in an empty folder and record its final validation loss and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        if text:
            target = Path(folder, "data", "shakespeare_char", "input.txt")
            target.parent.mkdir(parents=True)
            shutil.copy(text, target)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nanogpt_fast", *shlex.split(command)], cwd=folder, check=True)
        seconds = time.perf_counter() - start
        out = Path(folder, "out" if text else "out-demo")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        end = [row for row in rows if "val_loss" in row][-1]
        if name == "demo":
            shutil.copy(out / "loss.png", DEMO_PICTURE)
    measure.append(json_file, "recipe", name=name, command=f"nanogpt-fast {command}", steps=end["iter"], val_loss=end["val_loss"],
                   train_loss=end["train_loss"], seconds=seconds)
    print(f"{name}: validation loss {end['val_loss']:.4f} after {end['iter']} steps, {seconds:.0f} s in all")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", choices=("demo", "shakespeare"))
    parser.add_argument("text", nargs="?", help="tinyshakespeare's file")
    parser.add_argument("--reference", action="store_true", help="on nanoGPT's own calls, in float32")
    parser.add_argument("--json", default=RESULTS / "cpu.jsonl", help="append the result to this file")
    args = parser.parse_args()
    if args.recipe == "demo":
        run("demo", "demo", args.json)
        return
    if not args.text or not Path(args.text).is_file() or hashlib.sha256(Path(args.text).read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        parser.error("give tinyshakespeare's file (1,115,394 bytes); this is not it")
    name, command = "nanoGPT's CPU recipe on tinyshakespeare", RECIPE
    if args.reference:
        name, command = f"{name}, its own calls in float32", f"{RECIPE} {REFERENCE}"
    run(name, command, args.json, args.text)


if __name__ == "__main__":
    main()
