"""Where the time of training steps goes: a table by op and by GPU kernel, and a Chrome trace. `train --profile`, `bench train --profile`.

The ranges in a trace are `ProfilerStep#12` for a step, "forward and backward" and "update" inside it (step.py). On a CPU what is left of a
range beside its ops is Python and the C++ extension. The kernels of a replayed CUDA graph belong to no op, so kernels have a table of
their own.
"""
import contextlib
import gzip
import shutil
import tempfile
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from .. import tables
from ..files import replacing
from . import captured

# Steps of a run before the first that is profiled. A step that is captured takes three ordinary ones and the one that captures.
WARM_UP = captured.WARM_UP_STEPS + 7
ROWS = 15


def first_step(steps, start, total, eval_interval):
    """The first of `steps` steps to profile in a run of the steps start .. total - 1: after the warm-up, with no evaluation among them.

    Raises ValueError if there is none.
    """
    if steps > eval_interval:
        raise ValueError(f"profile is {steps}, but every {eval_interval} steps (eval_interval) there is an evaluation, which would be "
                         f"profiled too; expected at most {eval_interval}")
    first = start + WARM_UP
    if (first + steps - 1) // eval_interval > first // eval_interval:   # an evaluation comes before the step whose number it divides
        first += -first % eval_interval
    if first + steps > total:
        raise ValueError(f"profile is {steps}, but the run ends at step {total} (max_iters); expected max_iters of at least "
                         f"{first + steps}: the first {WARM_UP} steps warm up, and no evaluation may be among the profiled ones")
    return first


class RunProfile:
    """`with run_profile.step(iter_num): ...` around each step of a run: profiles `steps` of them from the step `first` on.

    path: of the trace. progress: the run's Progress, which shows the table, and whose tokens/s leave out the profiler's start and end.
    """

    def __init__(self, steps, first, device, path, progress):
        self.steps, self.first, self.device, self.path, self.progress = steps, first, device, Path(path), progress
        self.found = None       # the profiler, while it runs

    @contextlib.contextmanager
    def step(self, iter_num):
        if iter_num == self.first and self.steps:
            with self.progress.pause():
                self.found = profiler(self.device)
                self.found.start()
        if self.found is None:
            yield
            return
        with record_function(f"ProfilerStep#{iter_num}"):
            yield
        if iter_num == self.first + self.steps - 1:
            with self.progress.pause():
                found = self._stop()
                kernels, host = spent(found, self.steps, DeviceType.CUDA), spent(found, self.steps)
                self.progress.say(report(kernels, host, self.steps))
                try:
                    write_trace(found, self.path)
                    self.progress.say(f"profile: steps {self.first} to {iter_num}; the trace is {self.path} (chrome://tracing, ui.perfetto.dev)")
                except OSError as error:
                    self.progress.say(f"WARNING: profile: the trace was not written, and the run goes on without it ({error})")
                self.steps = 0      # none is left

    def close(self):
        if self.found is not None:
            self._stop()
        if self.steps:
            self.progress.say(f"profile: the run ended before {self.steps} steps were profiled; there is no table and no trace")

    def _stop(self):
        found, self.found = self.found, None
        wait(self.device)
        found.stop()
        return found


def profiler(device):
    """A torch.profiler.profile of the host and, if the device is a GPU, of its kernels. What the GPU was given before is done."""
    wait(device)
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"))


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spent(found, steps, on=DeviceType.CPU):
    """[[name, calls per step, microseconds per step], ...], the longest first: of the host's ops by their self time, or of a GPU's kernels."""
    names = {}
    for event in found.events():
        if event.device_type != on or on != DeviceType.CPU and event.is_user_annotation:  # a range's shadow on the GPU spans kernels
            continue
        total = names.setdefault(event.key, [0, 0.0])
        total[0] += 1
        total[1] += event.self_cpu_time_total if on == DeviceType.CPU else event.device_time_total
    return sorted(([name, calls / steps, micros / steps] for name, (calls, micros) in names.items()), key=lambda row: -row[2])


def report(kernels, host, steps):
    """The tables of a profile of so many steps, as text. kernels, host: what `spent` found on each side."""
    return "\n".join(table(rows, title, steps) for rows, title in ((kernels, "GPU, by kernel"), (host, "host, by op: self time")) if rows)


def table(rows, title, steps):
    """The rows of `spent` as text: the longest ROWS of them, and what the others take together."""
    total, rest = sum(micros for _, _, micros in rows), rows[ROWS:]
    shown = rows[:ROWS] + ([[f"{len(rest)} others", *(sum(row[i] for row in rest) for i in (1, 2))]] if rest else [])
    shown.append(["all", *(sum(row[i] for row in rows) for i in (1, 2))])
    head = [f"{title}, mean of {steps} steps", "ms", "share", "calls", "us a call"]
    return tables.table(head, [[name[:100], f"{micros / 1e3:.3f}", f"{100 * micros / max(total, 1e-9):.1f} %", f"{calls:,.1f}",
                                f"{micros / calls:,.1f}"] for name, calls, micros in shown])


def write_trace(found, path):
    """Write a finished profile as a Chrome trace, .json.gz."""
    with tempfile.TemporaryDirectory() as folder, replacing(path) as packed:
        plain = Path(folder, "trace.json")      # the profiler writes to a path only
        found.export_chrome_trace(str(plain))       # raises nothing, on a full disk neither
        if not plain.exists():
            raise OSError(f"PyTorch could not write it to {folder}; TMPDIR names another folder for it, on a disk with more room")
        with open(plain, "rb") as source, gzip.open(packed, "wb") as f:
            shutil.copyfileobj(source, f)
