"""`nanogpt-fast bench train`: times a training step of each variant.

Each variant has a process of its own, because our trainer changes malloc's settings for its process, and because peak memory is known
per process. On a CPU the processes take turns, each waiting while another runs. On a GPU they run one after the other, since two
captured steps of 64 x 1024 tokens do not fit side by side; the first variant runs again at the end, which shows how far the GPU's
clocks have drifted. The results so far are written after every variant.
"""
import contextlib
import itertools
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

from .. import devices, tables
from ..checks.explanation import explain
from ..config import GPTConfig
from ..model import GPT
from ..ops import mlp
from ..options import option
from ..training import captured, cpu, profiling
from ..training.step import TrainingStep
from . import measure
from .common import TimedOptions, build, quiet, record, shape_of, wanted


@dataclass
class BenchTrainOptions(TimedOptions):
    """Times a training step: forward under autocast, backward, clip, AdamW. Ours appears twice: as the drop-in, with one import
    changed and the logits returned, and as our trainer calls it, without them. Each eager and compiled."""
    batch_size: int | None = option(None, "sequences of a micro-batch; None: the model's own (32 for gpt2 on a GPU)", minimum=1)
    accumulation: int = option(1, "micro-batches per step, as nanoGPT's gradient_accumulation_steps", minimum=1)
    steps: int | None = option(None, "steps per sample; None: 10 on a GPU, 1 on a CPU", minimum=1)
    apart: bool = option(True, "each variant in its own process, ours on a CPU with our malloc settings")
    again: bool = option(True, "on a GPU: run the first variant once more at the end")
    profile: int = option(0, "after timing, profile this many steps of each variant and print where their time goes", minimum=0)
    traces: str = option("", "folder for the profiles' Chrome traces; empty: none")

    def __post_init__(self):
        super().__post_init__()
        if self.traces and not self.profile:
            raise ValueError(f"traces is {self.traces!r}, but no step is profiled; say how many: --profile=3")


@dataclass
class Variant:
    nanogpt: bool = False        # nanoGPT's model and optimizer, or ours
    logits: bool = True          # False: as our trainer calls it
    compiled: bool = False
    bf16: bool = False           # on a CPU, where float32 is the default
    fused: bool = False          # nanoGPT with AdamW's fused step, which nanoGPT does not request on a CPU
    backend: str = ""            # replaces --backend
    mlp_form: str = ""           # ours only: where the activation is computed, in the forward and in the backward
    recompute: bool = False      # ours only: compute GELU again in the backward


TRAIN_VARIANTS = {  # built in this order, the most important first in case time runs out
    "nanoGPT compiled": Variant(nanogpt=True, compiled=True),
    "one import": Variant(),
    "our trainer": Variant(logits=False),
    "our trainer compiled": Variant(logits=False, compiled=True),
    "one import compiled": Variant(compiled=True),
    "nanoGPT": Variant(nanogpt=True),
}
TRAIN_VARIANTS_GPU = {  # variations of our trainer, available only with --only
    "trainer with our attention": Variant(logits=False, backend="auto,attention=fused"),
    "trainer with the MLP's epilogue": Variant(logits=False, mlp_form="epilogue"),
    "trainer with the MLP pointwise": Variant(logits=False, mlp_form="pointwise"),
    "trainer with recompute": Variant(logits=False, recompute=True),
    "trainer with PyTorch's MLP": Variant(logits=False, backend="auto,mlp=reference"),
    "trainer with PyTorch's loss": Variant(logits=False, backend="auto,cross_entropy=reference"),
}
TRAIN_VARIANTS_CPU = {  # bf16: what nanoGPT's users could switch on themselves, and ours
    "nanoGPT bf16 fused": Variant(nanogpt=True, bf16=True, fused=True),
    "nanoGPT bf16 fused compiled": Variant(nanogpt=True, bf16=True, fused=True, compiled=True),
    "one import bf16": Variant(bf16=True),
    "our trainer bf16": Variant(logits=False, bf16=True),
    "our trainer bf16 compiled": Variant(logits=False, bf16=True, compiled=True),
}


class Trainer:
    """One variant: a model, its optimizer, and `step(x, y)`, x and y (B, T), which returns the loss. With accumulation every micro-batch is
    this one.

    For our trainer this is the step that `nanogpt-fast train` takes (training/step.py); the others do what nanoGPT's train.py does.
    """

    def __init__(self, o, variant, config, B, device, dtype, seed=0, accumulation=1):
        self.dtype = torch.bfloat16 if variant.bf16 else dtype
        if variant.mlp_form:
            mlp._faster_forms = lambda *_: (variant.mlp_form, variant.mlp_form)
        self.model = build(o, variant.nanogpt, config, device, seed)
        if variant.backend:
            self.model.set_backend(variant.backend)
        if not variant.nanogpt:
            for block in self.model.transformer.h:
                block.mlp.recompute = variant.recompute
        self.optimizer = _optimizer(o, variant, self.model, device)
        self.network = torch.compile(self.model) if variant.compiled else self.model
        self.context = devices.autocast(device, self.dtype)
        self.ours, self.not_captured, self.accumulation = None, "not our trainer", accumulation
        if not variant.logits:
            self.not_captured = captured.why_not(self.model, self.optimizer, device)
            self.ours = TrainingStep(self.model, self.optimizer, self.network, dtype=self.dtype, batch_shape=(B, config["block_size"]),
                                     not_captured=self.not_captured, compiled=variant.compiled, accumulation=accumulation)

    def step(self, x, y):
        if self.ours is not None:
            return self.ours(lambda: (x, y))
        for _ in range(self.accumulation):
            with self.context:
                loss = self.network(x, y)[1]
            (loss / self.accumulation if self.accumulation > 1 else loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _optimizer(o, variant, model, device):
    """nanoGPT fuses AdamW on CUDA only, ours on a CPU too; the benchmark keeps this difference, which users get as well."""
    with quiet():
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    if variant.nanogpt and device.type == "cpu" and (variant.fused or not o.upstream):
        groups = [{**group, "fused": variant.fused or None} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
    return optimizer


def run(o, device, dtype):
    """The command `bench train`."""
    config, B = shape_of(o.model, device)
    B, T = o.batch_size or B, config["block_size"]
    steps = o.steps or (10 if device.type == "cuda" else 1)
    on_cpu = device.type == "cpu"
    more = {} if not on_cpu else TRAIN_VARIANTS_CPU if dtype == torch.float32 else {}
    if not on_cpu and o.only:
        more = TRAIN_VARIANTS_GPU
    all_variants = TRAIN_VARIANTS | more
    until = time.monotonic() + 60 * o.minutes
    apart = o.apart and hasattr(os, "setsid")

    micro = f"{o.accumulation} times " if o.accumulation > 1 else ""
    print(f"{o.model}: {micro}{B} x {T} tokens a step, {str(dtype).removeprefix('torch.')}, on {devices.describe(device)}",
          file=tables.aside(o.format), flush=True)
    with quiet():
        counter = GPT(GPTConfig(**config))  # counts the FLOPs of both sides

    def timed(samples):
        seconds = statistics.median(samples) / steps
        sequences = o.accumulation * B
        return dict(samples=[value / steps for value in samples], tokens_per_s=sequences * T / seconds,
                    mfu=counter.estimate_hardware_mfu(sequences, seconds, device))

    def write(found):
        # A name of its own: benchmarks/report.py's tables are of steps without accumulation.
        record(o, "train" if o.accumulation == 1 else "train accumulated", device, shape=dict(config, batch_size=B),
               dtype=str(dtype).removeprefix("torch."), variants=found)

    def runner(name):
        return (Worker if apart else Runner)(o, name, all_variants[name], config, B, device, dtype, steps)

    names = wanted(o, all_variants)
    if not apart and any(all_variants[name].mlp_form for name in names):
        raise ValueError("the MLP's form is set for a whole process; time it with --apart=True")
    if apart and not on_cpu:
        found = one_after_the_other(o, names, runner, timed, until, write)
    else:
        found = in_turns(o, names, runner, timed, until, apart)
        write(found)
    print(table(found, o.format))


def one_after_the_other(o, names, runner, timed, until, write):
    """{name: results}; writes the results so far after every variant."""
    found, aside = {}, tables.aside(o.format)
    order = names + ([names[0]] if o.again and len(names) > 2 else [])
    ready = [runner(name) for name in order[:1]]    # each process imports PyTorch while the one before it is timed
    for i, name in enumerate(order):
        if found and time.monotonic() > until:
            found.setdefault(name, dict(error="not measured: out of time"))
            if ready:
                ready.pop().kill()
            continue
        worker, row = None, dict(clocks=[])
        try:
            worker = ready.pop(0) if ready else runner(name)
            ready += [runner(name) for name in order[i + 1:i + 2]]
            row |= worker.first()
            print(f"{name}: first step {row['first_step_s']:.1f} s", file=aside, flush=True)
            worker.several()            # a warm-up
            samples = []
            for _ in range(o.rounds):
                samples.append(worker.timed())
                row["clocks"].append(measure.nvidia_smi("clocks.sm,power.draw,temperature.gpu"))
            row |= timed(samples)
            print(f"{name}: {1e3 * statistics.median(row['samples']):.2f} ms a step, {row['tokens_per_s']:,.0f} tokens/s, "
                  f"peak {row['peak_memory'] / 2**30:.1f} GiB, {row['clocks'][-1]}", file=aside, flush=True)
            if o.profile and name not in found:
                write(found | {name: row})
                row |= worker.profiled()
                show_profile(o, name, row)
            worker.close()
        except Exception as error:      # such as out of memory, or a failed graph capture: the others can still be timed
            print(f"{name}: {error}", file=aside, flush=True)
            row["error"] = str(error)[:3000]
        except BaseException:           # measure.Interrupted, KeyboardInterrupt
            for one in ready:
                one.kill()
            raise
        finally:
            if worker is not None:
                worker.kill()
        if name in found:
            row = found[name] | dict(samples_again=row.get("samples"), clocks_again=row["clocks"], error_again=row.get("error"))
        found[name] = row
        write(found)
    if any("error" in row for row in found.values()):
        write(found)
    return found


def in_turns(o, names, runner, timed, until, apart):
    """{name: results}: builds every variant and takes its first step, then lets the variants take turns."""
    ones, found, interrupted, aside = {}, {}, False, tables.aside(o.format)
    for name in names:
        if interrupted or ones and time.monotonic() > until - 20 * o.minutes:
            found[name] = dict(error="not measured: ended by a signal" if interrupted else "not measured: out of time")
            continue
        try:
            one = runner(name)
            found[name] = one.first()
        except Exception as error:  # such as out of memory, or a failed graph capture: the others can still be timed
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            print(f"{name}: {type(error).__name__}: {error}", file=aside, flush=True)
            found[name] = dict(error="out of memory" if out_of_memory else f"{type(error).__name__}: {error}"[:300])
            continue
        except measure.Interrupted:  # in the middle of a compilation, say: the variants built so far can still be timed
            found[name], interrupted = dict(error="not measured: ended by a signal"), True
            continue
        print(f"{name}: first step {found[name]['first_step_s']:.1f} s", file=aside, flush=True)
        ones[name] = one

    samples = measure.interleaved({name: one.several for name, one in ones.items()}, o.rounds, warmup=1,
                                  until=time.monotonic() + 5 if interrupted else until)
    for name, values in samples.items():
        found[name] |= timed(values) if values else dict(error="not measured: out of time")
    for name, one in ones.items():
        if o.profile and samples.get(name):
            try:
                found[name] |= one.profiled()
                show_profile(o, name, found[name])
            except (Exception, measure.Interrupted) as error:   # a full disk, say: what was timed is still written
                print(f"{name}: not profiled: {type(error).__name__}: {error}", file=aside, flush=True)
        if apart:
            found[name]["peak_memory"] = one.close()
    return found


class Runner:
    """A variant in this process."""

    def __init__(self, o, name, variant, config, B, device, dtype, steps):
        random = torch.Generator().manual_seed(0)
        data = [torch.randint(config["vocab_size"], (2, B, config["block_size"]), generator=random).to(device) for _ in range(4)]
        self.o, self.name, self.batches, self.steps, self.dtype, self.device = o, name, itertools.cycle(data), steps, dtype, device
        self.before = _reset_peak(device)
        self.trainer = Trainer(o, variant, config, B, device, dtype, accumulation=o.accumulation)
        self.shape = dict(batch_size=B, tokens=config["block_size"])

    def first(self):
        """Take the first steps; returns their time, the peak memory, the ops' implementations and why the step is not captured."""
        trainer, start = self.trainer, time.perf_counter()
        trainer.step(*next(self.batches)).item()
        first = time.perf_counter() - start
        for _ in range(captured.WARM_UP_STEPS + 1 if trainer.not_captured is None else 1):  # until the CUDA graph is captured
            trainer.step(*next(self.batches))
        ops = {}
        if isinstance(trainer.model, GPT):
            with trainer.ours.weights.in_use() if trainer.ours else contextlib.nullcontext():
                rows = explain(trainer.model, dtype=trainer.dtype, return_logits=trainer.ours is None, **self.shape)
            ops = {row.op: row.implementation for row in rows}
        return dict(first_step_s=first, peak_memory=_peak(self.device, self.before), ops=ops, not_captured=trainer.not_captured)

    def several(self):
        for _ in range(self.steps):
            self.trainer.step(*next(self.batches))

    def timed(self):
        """Seconds that `several` takes by the CPU's clock, with the GPU synchronised on both sides."""
        return measure.interleaved({"": self.several}, 1, warmup=0)[""][0]

    def profiled(self):
        """{"kernels", "host"}: what `profiling.spent` finds in `o.profile` steps, of a GPU and of the host."""
        with profiling.profiler(self.device) as found:
            for i in range(self.o.profile):
                with torch.profiler.record_function(f"ProfilerStep#{i}"):
                    self.trainer.step(*next(self.batches))
            profiling.wait(self.device)
        if self.o.traces:
            os.makedirs(self.o.traces, exist_ok=True)
            name = "".join(c if c.isalnum() else "-" for c in self.name)
            profiling.write_trace(found, os.path.join(self.o.traces, f"{name}-{self.o.model}-{self.o.batch_size or 0}.json.gz"))
        return dict(kernels=profiling.spent(found, self.o.profile, DeviceType.CUDA), host=profiling.spent(found, self.o.profile))


class Worker:
    """A variant in a process of its own, idle between calls: the same `first`, `several`, `timed` and `profiled` as Runner."""

    def __init__(self, o, name, *rest):
        self.name, self.asked, self.limit = name, False, 60 * o.minutes + 300
        context = multiprocessing.get_context("spawn")  # a forked child would have this process's locks but not its threads
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, torch.get_num_threads(), o, name, *rest), daemon=True)
        self.process.start()
        other.close()

    def ask(self, what):
        try:
            self.pipe.send(what)
            self.asked = True
            if not self.pipe.poll(self.limit):
                raise RuntimeError(f"{self.name} has not answered for {self.limit:.0f} s")
            answer = self.pipe.recv()
            self.asked = False
        except (EOFError, BrokenPipeError) as error:
            self.process.join()
            self.asked = False
            raise RuntimeError(f"its process ended with status {self.process.exitcode}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def first(self):
        return self.ask("first")

    def several(self):
        self.ask("several")

    def timed(self):
        return self.ask("timed")

    def profiled(self):
        return self.ask("profiled")

    def kill(self):
        """Kill the process, whatever its state; if it is busy, it prints its stack first."""
        if self.asked:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)
        self.process.kill()
        self.process.join()

    def close(self):
        """End the process; returns its peak resident memory in bytes."""
        peak = self.ask("close")
        self.process.join()
        return peak


def _work(pipe, threads, o, name, variant, *rest):
    """The main function of a Worker's process. SIGUSR1 makes it print its stack."""
    import faulthandler
    faulthandler.register(signal.SIGUSR1)
    import resource  # not at the top: Windows has neither this nor SIGUSR1, and `apart` is off there
    os.setsid()  # signals to the parent's group, such as the SIGTERM of `timeout`, are for the parent to handle
    torch.set_num_threads(threads)
    devices.make_current(rest[-3])
    if torch.cuda.is_available():  # as in the parent, and in nanoGPT's train.py
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    runner = None
    with cpu.keep_freed_memory(not variant.logits):
        while True:
            try:
                what = pipe.recv()
            except EOFError:  # the parent has exited
                return
            if what == "close":
                kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                pipe.send(kib if sys.platform == "darwin" else 1024 * kib)
                return
            try:
                runner = runner or Runner(o, name, variant, *rest)
                pipe.send(getattr(runner, what)())
            except Exception as error:
                where = "" if isinstance(error, torch.OutOfMemoryError) else "\n" + traceback.format_exc()[-2500:]
                pipe.send(RuntimeError(f"{type(error).__name__}: {error}"[:500] + where * (rest[-3].type == "cuda")))


def table(found, format):
    """The results: times nanoGPT, relative to nanoGPT as shipped; times its strongest, relative to its fastest row."""
    shipped, strongest, rows = found.get("nanoGPT", {}), strongest_of(found), []
    for name, row in found.items():
        if "tokens_per_s" not in row:
            rows.append([name, row.get("error", "not measured"), "", "", "", "", ""])
            continue
        ratios = [f"{row['tokens_per_s'] / rival['tokens_per_s']:.2f}" if "tokens_per_s" in rival else ""
                  for rival in (shipped, strongest)]
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
        memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f} GiB"
        rows.append([name, f"{row['tokens_per_s']:,.0f}", *ratios, mfu, memory, f"{row['first_step_s']:.1f} s"])
    return tables.table(("", "tokens/s", "times nanoGPT", "times its strongest", "MFU", "peak memory", "first step"), rows, format)


def show_profile(o, name, row):
    print(f"{name}, profiled; {1e3 * statistics.median(row['samples']):.2f} ms a step without the profiler\n"
          + profiling.report(row["kernels"], row["host"], o.profile), file=tables.aside(o.format), flush=True)


def strongest_of(found):
    """The fastest row of nanoGPT, with any of its options; {} if none was run."""
    return max((row for name, row in found.items() if name.startswith("nanoGPT") and "tokens_per_s" in row),
               key=lambda row: row["tokens_per_s"], default={})


def rival_of(found):
    """The row that the others are compared with: nanoGPT compiled, else nanoGPT as shipped, else None."""
    return next((found[name] for name in ("nanoGPT compiled", "nanoGPT") if "tokens_per_s" in found.get(name, ())), None)


def _reset_peak(device):
    """Start measuring the peak from here; returns the bytes in use now."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device, before):
    """Peak bytes that a variant has allocated since `before`, as if it were alone. None on a CPU."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
