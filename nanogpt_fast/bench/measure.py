"""How `nanogpt-fast bench` and the scripts of benchmarks/ take their timings and record them.

Variants take turns, in an order that changes from round to round, so that a slow minute of the machine falls on all of them
alike; the ratios of their medians are what counts. Every sample is kept. A record is one line of JSON: the samples with the
machine, the versions and the commit.
"""
import contextlib
import datetime
import functools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import time
from pathlib import Path

import torch

from ..kernels.fastest import cpu_name


class Interrupted(BaseException):
    """SIGTERM arrived, which `timeout` sends. Not an Exception, which a compiler would catch as an error of its own."""


@contextlib.contextmanager
def sigterm_raises():
    """Inside, SIGTERM raises Interrupted, so that the measurements so far can still be written."""
    def handle(number, frame):
        raise Interrupted
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interleaved(variants, rounds, warmup=2, seed=0, until=None):
    """Time functions in turns. variants: {name: function}. Returns {name: [seconds, one per round]}.

    Uses the CPU's clock around each call, with the GPU, if any, synchronised on both sides. until: a time.monotonic() after which no
    further round starts (at least one round runs). On SIGTERM returns the samples so far.
    """
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    order, shuffle = list(variants), random.Random(seed).shuffle
    samples = {name: [] for name in variants}
    with contextlib.suppress(Interrupted):
        for _ in range(warmup):
            for function in variants.values():
                function()
        for done in range(rounds):
            if done and until is not None and time.monotonic() > until:
                break
            shuffle(order)
            for name in order:
                sync()
                start = time.perf_counter()
                variants[name]()
                sync()
                samples[name].append(time.perf_counter() - start)
    return samples


def interleaved_on_gpu(variants, rounds, warmup=3, seed=0, until=None):
    """`interleaved` by the GPU's own clock: events around each call, with cold caches.

    Before each call the L2 cache is overwritten, and the GPU is kept busy for as long as the host needs to queue the call, so
    that the timing includes neither a warm cache nor launch latency. The host's cost shows in end-to-end timings.
    """
    cycles = {}
    for name, function in variants.items():
        for _ in range(warmup):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        # 1.5 times what the host just needed, in cycles at 2 GHz, which is more than any of these GPUs runs at.
        cycles[name] = int(1.5 * 2e9 * (time.perf_counter() - start)) + 20_000
        torch.cuda.synchronize()
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    dirt = torch.empty(max(2 * l2, 1 << 20), dtype=torch.uint8, device="cuda")
    order, shuffle = list(variants), random.Random(seed).shuffle
    samples = {name: [] for name in variants}
    for done in range(rounds):
        if done and until is not None and time.monotonic() > until:
            break
        shuffle(order)
        events = []
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            dirt.zero_()
            torch.cuda._sleep(cycles[name])
            start.record()
            variants[name]()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            samples[name].append(start.elapsed_time(end) / 1e3)
    return samples


def limits(device, dtype=torch.bfloat16):
    """The rates that this machine reaches now, in bytes/s and FLOP/s.

    "copy": bytes read plus bytes written. "memory": the higher of that and of reading alone (a matrix times a vector, as in
    decoding): a CPU reads a cache line before it writes it, so a copy underestimates its bandwidth. "matmul": in `dtype`.
    """
    gpu = torch.device(device).type == "cuda"
    matrix = torch.ones(1 << (16 if gpu else 15), 4096, device=device)  # 1 GiB, 0.5 GiB: larger than any cache
    target, vector = torch.empty_like(matrix), torch.ones(4096, device=device)
    n = 8192 if gpu else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    size = matrix.numel() * matrix.itemsize
    median = medians((interleaved_on_gpu if gpu else interleaved)(
        {"copy": lambda: target.copy_(matrix), "read": lambda: matrix @ vector, "matmul": lambda: a @ b}, 10 if gpu else 5))
    return {"copy": 2 * size / median["copy"], "memory": max(2 * size / median["copy"], size / median["read"]),
            "matmul": 2 * n ** 3 / median["matmul"]}


def medians(samples):
    return {name: statistics.median(values) for name, values in samples.items()}


def environment():
    """The machine, the versions and the commit."""
    now = datetime.datetime.now(datetime.timezone.utc)
    env = {"time": now.isoformat(timespec="seconds"), "python": platform.python_version(),
           "torch": torch.__version__, "cpu": cpu_name(), "cores": cores(), "threads": torch.get_num_threads(),
           "commit": commit(), "load": os.getloadavg()[0]}
    try:
        import triton
        env["triton"] = triton.__version__
    except Exception:  # a broken Triton is no reason to lose the measurements
        pass
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        env |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
                "clocks": nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu"), "driver": nvidia_smi("driver_version")}
    return env


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def commit():
    """The measured commit: NANOGPT_FAST_COMMIT if set, for a copy of the tree without its git history; else the checkout's, followed
    by "+" if the tree has changes; else "unknown"."""
    given = os.environ.get("NANOGPT_FAST_COMMIT")
    root = Path(__file__).parents[2]
    if given or not (root / "setup.py").exists():  # if installed, the surrounding folder may be another project's checkout
        return given or "unknown"

    def git(*words):
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def nvidia_smi(query):
    try:
        return subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True,
                              check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def append(path, benchmark, **record):
    """Append one record to a JSON-lines file, with the environment."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"benchmark": benchmark, **record, "environment": environment()}) + "\n"
    target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:  # a single write, so that the records of two processes do not mix
        os.write(target, line.encode())
    finally:
        os.close(target)
