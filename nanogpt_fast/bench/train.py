"""`nanogpt-fast bench train`: a training step of each variant, in turns.

On a CPU each variant has a process of its own, which waits while others run: our trainer changes malloc's settings for its
process, and the peak memory of a process can be told from no other.
"""
import contextlib
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from .. import captured, cpu, devices, measure
from ..config import GPTConfig
from ..explanation import explain
from ..half_weights import HalfWeights
from ..model import GPT
from ..options import option
from .common import BenchOptions, build, quiet, record, shape_of, wanted


@dataclass
class BenchTrainOptions(BenchOptions):
    """Times a training step: forward under autocast, backward, clip, AdamW. Ours appears twice: as the drop-in, with one import
    changed and the logits returned, and as our trainer calls it, without them. Each eager and compiled."""
    batch_size: int | None = option(None, "sequences a step; None: the model's own (32 for gpt2 on a GPU)", minimum=1)
    steps: int | None = option(None, "steps a sample; None: 10 on a GPU, 1 on a CPU", minimum=1)
    apart: bool = option(True, "on a CPU each variant in a process of its own, ours with our malloc settings")


@dataclass
class Variant:
    nanogpt: bool = False        # nanoGPT's model and optimizer, or ours
    logits: bool = True          # False: as our trainer calls it
    compiled: bool = False
    bf16: bool = False           # on a CPU, where float32 is the default
    fused: bool = False          # nanoGPT with AdamW's fused step, which on a CPU it does not ask for


TRAIN_VARIANTS = {  # built in this order: where time is short, the ones that count are had
    "nanoGPT compiled": Variant(nanogpt=True, compiled=True),
    "one import": Variant(),
    "our trainer": Variant(logits=False),
    "our trainer compiled": Variant(logits=False, compiled=True),
    "one import compiled": Variant(compiled=True),
    "nanoGPT": Variant(nanogpt=True),
}
TRAIN_VARIANTS_CPU = {  # what nanoGPT's user could switch on beside ours
    "nanoGPT bf16 fused": Variant(nanogpt=True, bf16=True, fused=True),
    "nanoGPT bf16 fused compiled": Variant(nanogpt=True, bf16=True, fused=True, compiled=True),
    "one import bf16": Variant(bf16=True),
    "our trainer bf16": Variant(logits=False, bf16=True),
    "our trainer bf16 compiled": Variant(logits=False, bf16=True, compiled=True),
}


class Trainer:
    """One variant: a model, its optimizer, and `step(x, y)`, x and y (B, T), which returns the loss.

    Our trainer's way is training.py's: no logits, half-precision copies of the weights, the step captured in CUDA graphs
    where it can be. The others do what nanoGPT's train.py does.
    """

    def __init__(self, o, variant, config, B, device, dtype, seed=0):
        dtype = torch.bfloat16 if variant.bf16 else dtype
        self.model = build(o, variant.nanogpt, config, device, seed)
        self.optimizer = _optimizer(o, variant, self.model, device)
        self.network = torch.compile(self.model) if variant.compiled else self.model
        self.parameters = list(self.model.parameters())
        self.dtype, self.context = dtype, devices.autocast(device, dtype)
        self.more, self.weights, self.graphs, self.not_captured = {}, None, None, "not our trainer"
        if not variant.logits:
            self.more = dict(return_logits=False)
            self.weights = HalfWeights(self.model, dtype, own_gradients=not variant.compiled)
            # Until the process ends: this model is nobody else's.
            self.sparse = cpu.embedding_gradient_by_row(self.model, wanted=device.type == "cpu" and not variant.compiled)
            self.sparse.__enter__()  # it would be undone if nobody kept it
            self.not_captured = captured.why_not(self.model, self.optimizer, device)
        if self.not_captured is None:
            self.graphs = captured.CapturedStep(self.forward_backward, self.update, self.optimizer,
                                                (B, config["block_size"]), device)

    def step(self, x, y):
        if self.graphs is not None:
            self.graphs.micro_step(x, y, first=True)
            self.graphs.update()
            return self.graphs.loss
        loss = self.forward_backward(x, y)
        self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def forward_backward(self, x, y):
        with self.weights.in_use() if self.weights else contextlib.nullcontext():
            with self.context:
                loss = self.network(x, y, **self.more)[1]
            loss.backward()
        return loss.detach()

    def update(self):
        if self.weights and self.parameters[0].device.type == "cpu":
            cpu.update(self.optimizer, self.weights, 1.0)
            return
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if self.weights:
            self.weights.refresh()


def _optimizer(o, variant, model, device):
    """nanoGPT fuses AdamW on CUDA alone; ours on a CPU too, which is a difference that a user gets."""
    with quiet():
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    if variant.nanogpt and device.type == "cpu" and (variant.fused or not o.upstream):
        groups = [{**group, "fused": variant.fused or None} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
    return optimizer


def run(o, device, dtype):
    """The command `bench train`: builds every variant, takes its first step, then lets them take turns."""
    config, B = shape_of(o.model, device)
    B, T = o.batch_size or B, config["block_size"]
    steps = o.steps or (10 if device.type == "cuda" else 1)
    all_variants = TRAIN_VARIANTS | (TRAIN_VARIANTS_CPU if device.type == "cpu" and dtype == torch.float32 else {})
    until = time.monotonic() + 60 * o.minutes
    random = torch.Generator().manual_seed(0)
    data = [torch.randint(config["vocab_size"], (2, B, T), generator=random).to(device) for _ in range(4)]

    print(f"{o.model}: {B} x {T} tokens a step, {str(dtype).removeprefix('torch.')}, on {devices.describe(device)}")
    apart, workers = o.apart and device.type == "cpu" and hasattr(os, "setsid"), []
    runs, found, told_to_end = {}, {}, False
    for name in wanted(o, all_variants):
        if told_to_end or runs and time.monotonic() > until - 20 * o.minutes:
            found[name] = dict(error="not measured: out of time")
            continue
        try:
            runner = (Worker if apart else Runner)(o, name, all_variants[name], config, B, device, dtype, data, steps)
            found[name] = runner.first()
        except Exception as error:  # out of memory, a graph that cannot be captured: others can still be timed
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            print(f"{name:<28} {type(error).__name__}: {error}", flush=True)
            found[name] = dict(error="out of memory" if out_of_memory else f"{type(error).__name__}: {error}"[:300])
            continue
        except measure.ToldToEnd:  # in the middle of a compilation, say: what was built before can still be timed
            found[name], told_to_end = dict(error="not measured: out of time"), True
            continue
        print(f"{name:<28} first step {found[name]['first_step_s']:6.1f} s", flush=True)
        runs[name] = runner.several
        workers += [runner] if apart else []

    samples = measure.interleaved(runs, o.rounds, warmup=1, until=time.monotonic() + 5 if told_to_end else until)
    with quiet():
        counter = GPT(GPTConfig(**config))  # counts the FLOPs of either side
    for name, values in samples.items():
        if not values:
            found[name] = dict(error="not measured: out of time")
            continue
        seconds = statistics.median(values) / steps
        found[name] |= dict(samples=[value / steps for value in values], tokens_per_s=B * T / seconds,
                            mfu=counter.estimate_hardware_mfu(B, seconds, device))
    for worker in workers:
        found[worker.name]["peak_memory"] = worker.close()
    record(o, "train", device, shape=dict(config, batch_size=B), dtype=str(dtype).removeprefix("torch."), variants=found)
    print(table(found))


class Runner:
    """A variant in this process."""

    def __init__(self, o, name, variant, config, B, device, dtype, data, steps):
        self.name, self.batches, self.steps, self.dtype, self.device = name, itertools.cycle(data), steps, dtype, device
        self.before = _reset_peak(device)
        self.trainer = Trainer(o, variant, config, B, device, dtype)

    def first(self):
        """Take the first steps; returns what is known then."""
        trainer, start = self.trainer, time.perf_counter()
        trainer.step(*next(self.batches)).item()
        first = time.perf_counter() - start
        for _ in range(captured.WARM_UP_STEPS + 1 if trainer.graphs else 1):  # up to the step that is recorded
            trainer.step(*next(self.batches))
        ops = {}
        if isinstance(trainer.model, GPT):
            rows = explain(trainer.model, dtype=trainer.dtype, return_logits=not trainer.more)
            ops = {row.op: row.implementation for row in rows}
        return dict(first_step_s=first, peak_memory=_peak(self.device, self.before), ops=ops, not_captured=trainer.not_captured)

    def several(self):
        for _ in range(self.steps):
            self.trainer.step(*next(self.batches))


class Worker:
    """A variant in a process of its own, which does nothing unless it is asked: the same `first` and `several`."""

    def __init__(self, o, name, *rest):
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads that do not run there
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, torch.get_num_threads(), o, name, *rest), daemon=True)
        self.process.start()
        other.close()

    def ask(self, what):
        try:
            self.pipe.send(what)
            answer = self.pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            self.process.join()
            raise RuntimeError(f"its process ended with status {self.process.exitcode}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def first(self):
        return self.ask("first")

    def several(self):
        self.ask("several")

    def close(self):
        """End the process; returns the most memory that it ever held, in bytes."""
        peak = self.ask("close")
        self.process.join()
        return peak


def _work(pipe, threads, o, name, variant, *rest):
    """The process of a Worker."""
    import resource  # here: Windows has neither, and `apart` is off there
    os.setsid()  # what is sent to the parent's group, as `timeout` sends SIGTERM, is for the parent to heed
    torch.set_num_threads(threads)
    runner = None
    with cpu.keep_freed_memory(not variant.logits):
        while True:
            try:
                what = pipe.recv()
            except EOFError:  # the parent has ended
                return
            if what == "close":
                kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                pipe.send(kib if sys.platform == "darwin" else 1024 * kib)
                return
            try:
                runner = runner or Runner(o, name, variant, *rest)
                pipe.send(getattr(runner, what)())
            except Exception as error:
                pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def table(found):
    """The result as text."""
    shipped, strongest = found.get("nanoGPT", {}), strongest_of(found)
    lines = [f"{'':<28} {'tokens/s':>10} {'times nanoGPT':>14} {'its strongest':>14} {'MFU':>7} {'peak memory':>12} "
             f"{'first step':>11}"]
    for name, row in found.items():
        if "tokens_per_s" not in row:
            lines.append(f"{name:<28} {row.get('error', 'not measured')}")
            continue
        ratios = [f"{row['tokens_per_s'] / rival['tokens_per_s']:.2f}" if "tokens_per_s" in rival else ""
                  for rival in (shipped, strongest)]
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
        memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f} GiB"
        lines.append(f"{name:<28} {row['tokens_per_s']:>10,.0f} {ratios[0]:>14} {ratios[1]:>14} {mfu:>7} {memory:>12} "
                     f"{row['first_step_s']:>9.1f} s")
    return "\n".join(lines) + "\n(times nanoGPT: as it is shipped; its strongest: the fastest of its rows)"


def strongest_of(found):
    """The fastest row of nanoGPT, whatever was switched on; {} where none was run."""
    return max((row for name, row in found.items() if name.startswith("nanoGPT") and "tokens_per_s" in row),
               key=lambda row: row["tokens_per_s"], default={})


def rival_of(found):
    """The row that the others are compared with: nanoGPT compiled, or as it is where that was not run; or None."""
    return next((found[name] for name in ("nanoGPT compiled", "nanoGPT") if "tokens_per_s" in found.get(name, ())), None)


def _reset_peak(device):
    """Bytes in use now; the peak counts from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device, before):
    """Bytes that a variant has needed since it was begun, at its peak, as if it were alone. None on a CPU."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
