"""How everything here is timed and recorded.

Variants of one thing take turns, in an order that changes from round to round, so that a slow minute of the machine falls on
all of them alike; what is compared is the ratio of their medians. Every sample is kept. A record is one line of JSON with the
machine, the versions and the commit beside the samples.
"""
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(variants, rounds, warmup=2, seed=0):
    """Time functions in turns. variants: {name: function}. Returns {name: [seconds, one a round]}.

    A CPU clock around each call, with the GPU synchronised on both sides where there is one.
    """
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warmup):
        for function in variants.values():
            function()
    order, shuffle = list(variants), random.Random(seed).shuffle
    samples = {name: [] for name in variants}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            sync()
            start = time.perf_counter()
            variants[name]()
            sync()
            samples[name].append(time.perf_counter() - start)
    return samples


def medians(samples):
    return {name: statistics.median(values) for name, values in samples.items()}


def environment():
    """The machine, the versions and the commit."""
    env = {"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "python": platform.python_version(),
           "torch": torch.__version__, "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
           "commit": commit()}
    try:
        import triton
        env["triton"] = triton.__version__
    except ImportError:
        pass
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        env |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
                "clocks": nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu"), "driver": nvidia_smi("driver_version")}
    return env


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return " ".join([name] + [label for flag, label in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flag in flags])


def commit():
    """The commit that was measured, with "+" behind it where the tree had changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run(git + ["rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(git + ["status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")


def nvidia_smi(query):
    try:
        return subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True,
                              check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def append(path, benchmark, **record):
    """Add one record to a JSON-lines file: what was measured, where, and every sample."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps({"benchmark": benchmark, **record, "environment": environment()}) + "\n")
