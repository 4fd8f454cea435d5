"""The command `nanogpt-fast tune`."""
import functools
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import backend, devices, options, tables
from ..bench import common, measure, train
from ..kernels import fastest
from ..options import option
from ..training import cpu
from . import contest as rules, saved, screen, timing, trying
from .contests import Shape, contests

LATE = "not reached in time"
TRYING, STEPS = 0.4, 0.2        # shares of the minutes: compiling and checking at most, the comparison of whole steps


@dataclass
class TuneOptions:
    """Measures which implementation, form and tile of each op is the fastest on this machine, for the shapes of one model, and keeps what it
    found: `auto` takes it from then on. Each is compiled and compared with plain PyTorch first; they take turns while they are timed.

    Kernels of your own take part if NANOGPT_FAST_KERNELS names the file that registers them."""
    model: str = option("", f"{', '.join(common.MODELS)}; empty: gpt2 on a GPU, cpu on a CPU", choices=("", *common.MODELS))
    n_layer: int | None = option(None, "None: the model's own, as for what follows", minimum=1)
    n_head: int | None = option(None, "heads of attention", minimum=1)
    n_embd: int | None = option(None, "channels", minimum=1)
    block_size: int | None = option(None, "tokens of a sequence", minimum=1)
    vocab_size: int | None = option(None, "size of the vocabulary", minimum=1)
    dropout: float | None = option(None, "rate of dropout", minimum=0.0, below=1.0)
    bias: bool | None = option(None, "biases in linears and LayerNorms")
    batch_size: int | None = option(None, "sequences of a micro-batch", minimum=1)
    generate: int = option(0, "tune generation, of so many rows at a time, instead of training", minimum=0)
    device: str = option("auto", "auto (CUDA, else CPU), cpu, cuda, cuda:1")
    dtype: str = option("auto", "of the forward pass, as the trainer's", choices=("auto", "float32", "bfloat16", "float16"))
    minutes: float = option(2.0, "how long it may take, about", above=0)
    workers: int = option(0, "processes that compile; 0: one for each core, at most 8; 1 on a CPU", minimum=0)
    steps: bool = option(True, "at the end compare whole training steps, untuned and tuned")
    format: str = tables.format_option()
    out: str = option("", "the file; empty: what NANOGPT_FAST_TUNED names, or tuned.json in the cache folder")


def main(argv):
    o = options.parse(TuneOptions, argv, "nanogpt-fast tune")
    read, file = saved.path(), o.out or saved.path() or saved.default()
    saved.check(file)
    os.environ["NANOGPT_FAST_TUNED"] = "off"        # here and in the processes that try entries, what was measured before decides nothing
    backend.load_local()
    before = fastest.install()
    device = devices.choose_device(o.device)
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"the device is {device}; tune measures on cuda and cpu, since only these have kernels of ours: --device=cpu")
    config, dtype, shape = shape_of(o, device)
    if shape.cuda:
        torch.cuda.set_device(shape.number)     # whose clock is read
    aside = tables.aside(o.format)
    print(f"{device_name(shape)}; at most about {o.minutes:g} minutes\n{describe(shape)}", file=aside, flush=True)
    listed = [contest for contest in contests(shape) if contest.choice]
    start, seconds = time.monotonic(), 60 * o.minutes
    if not shape.cuda and hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > measure.cores() / 4:
        print(f"Other programs keep this machine busy (load {load:.1f} on {measure.cores()} cores): times are rough, and less will be decided",
              file=aside, flush=True)
    decided, steps = [], {}
    if not listed:
        print("Nothing to choose: each op has one implementation that can run here (`nanogpt-fast doctor` says why)", file=aside)
        return 0
    measured_steps = o.steps and not shape.rows
    end = start + seconds * (1 - STEPS * measured_steps)
    try:
        with screen.Screen(listed, o.format) as shown, cpu.keep_freed_memory(not shape.cuda):
            workers = o.workers or (min(8, os.cpu_count() or 1) if shape.cuda else 1)
            tried = trying.try_all(shape, listed, workers, start + max(TRYING * seconds, 30), shown.tried_one)
            decide(listed, tried, shape, end, decided, shown)
            tuned = fastest.in_force()
            if measured_steps and any(contest.winner != rules.UNTUNED for contest in decided):
                steps = timing.steps_in_turns(functools.partial(step_of, config, shape, device), {"untuned": fastest.Table(fastest.SHIPPED), "tuned": tuned},
                                              10, shape.cuda, start + seconds)
    finally:
        fastest.enforce(before)
        if decided:
            arch, card = fastest.place(shape.number)
            rows = [row for contest in decided for row in contest.rows()]
            saved.save(file, card, shape.cuda, rows, [contest.record() for contest in decided])
    print(flush=True, file=aside)
    if shown.live is None or o.format != "text":
        print(shown.text(o.format), flush=True)
    print(summary(listed, decided, steps, file, read == Path(file)), file=aside)
    return 0


def shape_of(o, device):
    """(config as a dict, dtype, Shape) of the options."""
    named = o.model or ("gpt2" if device.type == "cuda" else "cpu")
    given = {name: getattr(o, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")}
    config, batch_size = common.shape_of(named, device, **{name: value for name, value in given.items() if value is not None})
    if config["n_embd"] % config["n_head"]:
        raise ValueError(f"n_embd is {config['n_embd']} and n_head {config['n_head']}: expected a multiple; give both")
    dtype = devices.choose_dtype(o.dtype, device, config["n_embd"])
    shape = Shape(B=o.batch_size or batch_size, T=config["block_size"], C=config["n_embd"], H=config["n_head"], V=config["vocab_size"],
                  layers=config["n_layer"], bias=config.get("bias", True), dropout=0.0 if o.generate else config.get("dropout", 0.0), dtype=dtype,
                  device=str(device), cuda=device.type == "cuda", rows=o.generate)
    return config, dtype, shape


def decide(listed, tried, shape, until, decided, shown):
    """Time the contests one after the other, each with the winners so far in force; fills `decided` with those that the time suffices for."""
    for number, contest in enumerate(listed):
        left = until - time.monotonic()
        if left < 0:
            break
        contest.begin()
        contest.failed = {label: why for label in contest.entries if (why := tried.get((contest.name, label), LATE)) is not None}
        right = [label for label in contest.entries if label not in contest.failed]
        if (why := contest.failed.get(rules.UNTUNED)) is not None:
            if why != LATE:
                print(f"{contest.title}: what runs untuned cannot be timed here: {why}" + "; run `nanogpt-fast verify`" * why.startswith("wrong"),
                      file=shown.aside, flush=True)
        elif len(right) > 1:
            timing.time_contest(contest, right, shape.cuda, time.monotonic() + left / (len(listed) - number))
            if contest.decided:     # else what is known of it from before stays
                decided.append(contest)
                fastest.enforce(fastest.Table([*contest.rows(), *fastest.in_force().rows]))
        shown.decided(contest)


def step_of(config, shape, device):
    """A function that takes one training step of our trainer, and waits for it."""
    trainer = train.Trainer(train.BenchTrainOptions(), train.TRAIN_VARIANTS["our trainer"], config, shape.B, device, shape.dtype)
    random = torch.Generator().manual_seed(0)
    x, y = torch.randint(shape.V, (2, shape.B, shape.T), generator=random).to(device)
    return lambda: trainer.step(x, y)


def summary(listed, decided, steps, file, is_read):
    """What was found, as text. is_read: whether processes with this environment read the file."""
    lines = []
    failed = [f"  {contest.title}: {label}: {why}" for contest in decided for label, why in contest.failed.items()]
    lines += ["Not timed:", *failed] if failed else []
    late = [contest.title for contest in listed if contest not in decided and contest.failed.get(rules.UNTUNED, LATE) == LATE]
    lines += [f"Not decided, the time was too short (--minutes): {', '.join(late)}"] if late else []
    changed = sum(contest.winner != rules.UNTUNED for contest in decided)
    if not decided:
        lines.append("Nothing was decided, and nothing is written")
    elif changed:
        when = "from now on (NANOGPT_FAST_TUNED=off: without)" if is_read else f"where NANOGPT_FAST_TUNED={file} is set"
        lines.append(f"{changed} of {len(decided)} choices were changed, in {file}; `auto` takes them {when}")
    else:
        lines.append(f"Nothing was clearly faster than what runs already; the samples are in {file}")
    if all(steps.values()) and steps:
        untuned, tuned = (statistics.median(steps[name]) for name in ("untuned", "tuned"))
        expected = sum(contest.gain for contest in decided)
        lines.append(f"A training step: {1e3 * untuned:.2f} ms untuned, {1e3 * tuned:.2f} ms tuned, {untuned / tuned:.2f} times as fast, in turns "
                     f"(expected from the above: {1e3 * expected:.2f} ms less)")
    return "\n".join(lines)


def device_name(shape):
    return fastest.place(shape.number)[1] + ("" if shape.cuda else f", {torch.get_num_threads()} threads")


def describe(shape):
    model = f"{shape.layers} layers, {shape.H} heads, {shape.C} channels, {shape.V} tokens, {str(shape.dtype).removeprefix('torch.')}"
    return f"{model}; " + (f"generating {shape.rows} rows at a time" if shape.rows else f"training on {shape.B} x {shape.T} tokens")
