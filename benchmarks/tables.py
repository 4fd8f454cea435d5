"""Result files and Markdown: what report.py, report_gpu.py and report_plots.py share."""
import json
import statistics
from pathlib import Path

from benchmarks import RESULTS
from nanogpt_fast import tables

MISSING = "not measured yet"
# What GPT-2 124M's training step on a GPU is made of, (op, shape); each forward, and forward and backward.
GPU_KERNELS = (("attention", dict(B=32, T=1024, H=12, D=64)), ("add + LayerNorm", dict(rows=32768, C=768)),
               ("GELU-MLP", dict(rows=32768, C=768)), ("linear cross-entropy", dict(rows=32768, C=768, V=50304)))


def read(*paths):
    """All records of JSON-lines files, oldest first."""
    records = []
    for path in paths or sorted(RESULTS.glob("*.jsonl")):
        records += [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return sorted(records, key=lambda record: record["environment"]["time"])


def last(records, benchmark, device=None, **fields):
    """The newest record of this kind, or None. fields: must be equal; `options` may be reached into by name."""
    def fits(record):
        if record["benchmark"] != benchmark or device not in (None, device_of(record)):
            return False
        return all(record.get(key, record.get("options", {}).get(key)) == value for key, value in fields.items())
    return next(filter(fits, reversed(records)), None)


def device_of(record):
    return record.get("device") or ("cuda" if "gpu" in record["environment"] else "cpu")


def table(head, rows):
    """A table of a document."""
    return tables.table(head, rows, "markdown", "l")


def where(record, rows=()):
    """The machine and the versions, as a line of small print. rows: the records of a table whose rows come from several runs."""
    e = record["environment"]
    commits = list(dict.fromkeys(row["environment"]["commit"] for row in rows or [record]))
    machine = f"{e['cpu']}, {e['threads']} threads"
    if device_of(record) == "cuda":
        machine = f"{e['gpu']}, driver {e['driver']}, CUDA {e['cuda']}"
    triton = f", Triton {e['triton']}" if "triton" in e else ""
    load = f", load {e['load']:.1f} on {e['cores']} cores" if "load" in e and device_of(record) == "cpu" else ""
    return f"<sub>{machine}; torch {e['torch']}{triton}; {'commits' if commits[1:] else 'commit'} {', '.join(commits)}, {e['time'][:10]}{load}</sub>"


def spread(samples):
    """Half the width of the middle half of the samples, as a share of the median."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / middle


def small(record, words=lambda record: "", rows=()):
    """The small print under a table. record: the one that it describes; rows: as for `where`."""
    if record is None:
        return ""
    text = words(record)
    return "\n\n" + where(record, rows).replace("<sub>", f"<sub>{text}. " if text else "<sub>")
