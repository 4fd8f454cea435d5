"""`nanogpt-fast bench loss`: nanoGPT and ours trained on the same batches from the same weights, each against its own clock.

On a GPU the clock does not run in the first steps, which compile and capture: 17 seconds for nanoGPT on an H100, which would hide the
time of 400 steps. The time that these steps take is recorded and printed separately.
"""
import contextlib
import statistics
import time
from dataclasses import dataclass

import torch

from .. import devices, tables
from ..options import option
from ..training.trainer import learning_rate
from . import measure
from .common import MODELS, BenchOptions, record, shape_of
from .train import Trainer, Variant

UNTIMED = 5     # steps on a GPU after which everything is compiled and captured


@dataclass
class BenchLossOptions(BenchOptions):
    """Trains nanoGPT and ours on the same batches from the same weights, in turns, and records loss against time."""
    model: str = option("", "empty: baby on a GPU, cpu on a CPU", choices=("", *MODELS))
    data: str = option("embedded", "as for `nanogpt-fast train`")
    data_dir: str = option("data", "where data sets live")
    steps: int = option(500, "of training", minimum=1)
    eval_interval: int = option(50, "steps between measurements of the loss; the clock stops during one", minimum=1)
    eval_iters: int = option(20, "batches that one measurement averages", minimum=1)
    learning_rate: float = option(1e-3, "the peak, after warm-up", above=0)


def run(o, device, dtype):
    """The command `bench loss`: the sides train in turns of eval_interval steps, each against its own clock."""
    from ..text import prepare
    from ..text.batches import Batches
    from ..text.tokens import TokenCheck
    folder = prepare.find(o.data, o.data_dir)
    vocabulary = prepare.load_tokenizer(folder).vocab_size
    config, B = shape_of(o.model, device, dropout=0.0, vocab_size=vocabulary)  # without dropout the two losses can be compared
    compiled = device.type == "cuda"
    chosen = devices.choose_dtype("auto", device, config["n_embd"])
    bf16 = device.type == "cpu" and o.dtype == "auto" and chosen == torch.bfloat16
    both = {"nanoGPT": Variant(nanogpt=True, compiled=compiled),
            "ours": Variant(logits=False, bf16=bf16)}     # as `nanogpt-fast train` runs it
    schedule = LossSchedule(learning_rate=o.learning_rate, min_lr=o.learning_rate / 10, warmup_iters=o.steps // 20,
                            lr_decay_iters=o.steps)

    with contextlib.closing(TokenCheck(folder, vocabulary, config["block_size"])) as check:
        check.wait()        # before the clock runs

    def batches(split, seed):
        return Batches(folder, split, B, config["block_size"], device=device, generator=torch.Generator().manual_seed(seed))

    untimed = UNTIMED if device.type == "cuda" else 0
    sides = {name: Side(Trainer(o, variant, config, B, device, dtype), batches("train", 1), untimed) for name, variant in both.items()}
    aside, lines = tables.aside(o.format), tables.Lines(("step", "", "s", "validation loss"), o.format, "rlr", (6, 7, 8))
    print(f"{o.model} on {o.data}, {o.steps} steps of {B} x {config['block_size']} tokens, on {devices.describe(device)}", file=aside)
    print("\n".join(lines.head), flush=True)
    interrupted = None
    try:
        for step in range(0, o.steps + 1, o.eval_interval):
            for name, side in sides.items():
                with contextlib.closing(batches("val", 2)) as held_out:
                    row = side.evaluate(step, held_out, o.eval_iters)
                print(lines.row((row["step"], name, f"{row['seconds']:.1f}", f"{row['val_loss']:.4f}")), flush=True)
                side.advance(step, min(o.eval_interval, o.steps - step), schedule, device)
        if untimed:
            print("; ".join(f"{name}: {side.before:.1f} s more for the first {untimed} steps" for name, side in sides.items()), file=aside)
    except measure.Interrupted as error:      # the rows so far are recorded below
        interrupted = error
    finally:
        for side in sides.values():
            side.batches.close()
    if all(side.rows for side in sides.values()):
        record(o, "loss", device, shape=dict(config, batch_size=B), dtype=str(dtype).removeprefix("torch."), compiled=compiled,
               untimed=dict(steps=untimed, seconds={name: side.before for name, side in sides.items()}),
               curves={name: side.rows for name, side in sides.items()})
    if interrupted:
        raise interrupted


@dataclass
class LossSchedule:
    """The fields that training.learning_rate reads."""
    learning_rate: float
    min_lr: float
    warmup_iters: int
    lr_decay_iters: int
    decay_lr: bool = True


class Side:
    """One model in training: its time so far and its losses."""

    def __init__(self, trainer, batches, untimed=0):
        self.trainer, self.batches, self.seconds, self.rows = trainer, batches, 0.0, []
        self.untimed, self.before = untimed, 0.0                # steps before the clock starts, and the seconds they took

    def advance(self, start, count, schedule, device):
        """Train for `count` steps against the clock."""
        began = time.perf_counter()
        for step in range(start, start + count):
            if step == self.untimed and step > 0:
                _finish(device)
                self.before, began = self.before + time.perf_counter() - began, time.perf_counter()
            for group in self.trainer.optimizer.param_groups:
                group["lr"] = learning_rate(step, schedule)
            x, y = self.batches.next()
            self.trainer.step(x, y)
            self.batches.prefetch()
        _finish(device)
        if start + count <= self.untimed:
            self.before += time.perf_counter() - began
        else:
            self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def evaluate(self, step, batches, count):
        """Record the validation loss at this step; the clock does not run meanwhile."""
        model = self.trainer.model.eval()
        with self.trainer.context:
            values = [model(*batches.next())[1].item() for _ in range(count)]
        model.train()
        self.rows.append(dict(step=step, seconds=self.seconds, val_loss=statistics.mean(values)))
        return self.rows[-1]


def _finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
