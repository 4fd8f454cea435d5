"""`nanogpt-fast bench op`: every op against its peers, or a function of one's own beside them.

    nanogpt-fast bench op layer_norm                               the cases of cases.py, most telling first
    nanogpt-fast bench op layer_norm --mine=my.py:layer_norm       and a function of yours, checked against float64 first
    nanogpt-fast bench op attention --n_embd=1024 --n_head=16 --block_size=2048 --batch_size=8      at a shape of yours

The implementations of a case take turns. On a GPU: events, cold caches, inputs that rotate (measure.interleaved_on_gpu); on a
CPU its clock. The rates that the machine reaches in copies and matmuls are measured first, in the same run: a row's share is of those.
Each case is printed and written as soon as it is timed, and none begins after the minutes are over.
"""
import importlib.util
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import backend, files, tables
from ..checks import verify
from ..ops import registered
from ..options import option
from . import cases, measure

CASES = {"attention": "attention", "layer_norm": "add + LayerNorm", "mlp": "GELU-MLP", "cross_entropy": "linear cross-entropy", "sample": "sampler",
         "decode": "decode attention"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD = ("median", "spread", "x PyTorch", "memory", "share of the limit")     # after the case's name


@dataclass
class BenchOpOptions:
    """Times each op against its peers: PyTorch eager and compiled, cuDNN, FlashAttention, and Liger, quack and flash-attn where they are
    installed. Prints the median, the spread (half the width of the middle half), how many times as fast as PyTorch eager, on a GPU the
    memory that a call takes, and the share of what the machine reaches in copies or matmuls, whichever bounds the op."""
    op: str = option("", f"one of {', '.join(CASES)}; empty: all", choices=("", *CASES), positional=True)
    mine: str = option("", "FILE.py:FUNCTION, a function of yours beside ours; nanogpt_fast/ops/registered.py says what it gets and returns")
    only: str = option("", "cases whose name contains one of these words, separated by commas")
    implementations: str = option("", "these alone, separated by commas; yours is always one")
    without: str = option("", "not these; 'compile max-autotune' needs minutes to compile")
    direction: str = option("", "forward, or both: forward and backward; empty: both after each other", choices=("", "forward", "both"))
    batch_size: int | None = option(None, "one case of a shape of yours instead of the list, with these five", minimum=1)
    block_size: int | None = option(None, "tokens of a sequence", minimum=1)
    n_head: int | None = option(None, "heads of attention", minimum=1)
    n_embd: int | None = option(None, "channels", minimum=1)
    vocab_size: int | None = option(None, "columns of the loss and of the sampler", minimum=1)
    dtype: str = option("auto", "of that case; auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", *DTYPES))
    device: str = option("auto", "auto (CUDA, else CPU), cpu, cuda, cuda:1")
    rounds: int = option(50, "samples of each implementation", minimum=1)
    minutes: float = option(60.0, "begin no case after so long", minimum=0.0)
    quick: bool = option(False, "tiny shapes and 5 rounds: tries the machinery, measures nothing")
    format: str = tables.format_option()
    json: str = option("", "append each case, with every sample, to this file")
    csv: str = option("", "write all rows to this file")
    png: str = option("", "draw the times to this file")


def run(o, device, dtype):
    """The command. Returns 1 if a function of one's own is wrong."""
    mine = None
    if o.mine:
        if not o.op:
            raise ValueError("mine names a function of yours: say of which op, as in `nanogpt-fast bench op layer_norm --mine=my.py:layer_norm`")
        if o.op not in registered.OPS:
            raise ValueError(f"op is {o.op}; a function of yours can stand beside {', '.join(registered.OPS)}")
        mine = register(o.op, o.mine)
        if (wrong := check(o.op, mine, device)) is None:
            return 1
        print(wrong, file=tables.aside(o.format), flush=True)
    until = time.monotonic() + 60 * o.minutes
    limits = None if o.quick else measure.limits(device)
    if limits:
        print(f"{device}: copies at {limits['copy'] / 1e9:,.0f} GB/s, bf16 matmuls at {limits['matmul'] / 1e12:,.1f} TFLOP/s",
              file=tables.aside(o.format), flush=True)
    rows, left = [], chosen(o, device, dtype)
    for done, case in enumerate(left):
        if time.monotonic() > until:
            print(f"out of time: {len(left) - done} of {len(left)} cases were not started", file=tables.aside(o.format))
            break
        rows += time_case(case, device, limits, o, mine, until)
    if o.csv:
        with files.replacing(o.csv) as f:
            f.write((tables.table(("case", "implementation", "seconds", "spread", "times PyTorch", "bytes of memory", "share"), rows, "csv") + "\n").encode())
    if o.png:
        draw(rows, o.png)
    return 0


def chosen(o, device, dtype):
    """The cases that the options name."""
    given = {name: getattr(o, name) for name in ("batch_size", "block_size", "n_head", "n_embd", "vocab_size")}
    if any(given.values()):
        if not o.op:
            raise ValueError("a shape of your own is one op's: name it, as in `nanogpt-fast bench op attention --block_size=2048`")
        listed = list(own_shape(o.op, DTYPES.get(o.dtype, dtype), {name: value for name, value in given.items() if value}))
    else:
        listed = cases.cases(device.type, o.quick)
    words = [word for word in o.only.split(",") if word]
    names = [name for name in o.implementations.split(",") if name]
    found = [case for case in listed if (not o.op or case.op == CASES[o.op]) and (not words or any(word in case.name for word in words))
             and (not o.direction or case.direction == o.direction) and (not names or names & case.implementations.keys())]
    if not found:
        given = " ".join(f"--{name}={getattr(o, name)}" for name in ("op", "only", "direction", "implementations") if getattr(o, name))
        raise ValueError(f"{given} leaves none of the {len(listed)} cases, whose names are like {listed[0].name!r} "
                         "and whose implementations are " + ", ".join(sorted({name for case in listed for name in case.implementations})))
    return found


def own_shape(op, dtype, given):
    """The cases of one op at a shape; what is not given is GPT-2 124M's."""
    size = dict(batch_size=8, block_size=1024, n_head=12, n_embd=768, vocab_size=50304) | given
    B, T, H, C, V = size.values()
    if C % H:
        raise ValueError(f"n_embd is {C} and n_head {H}: expected a multiple; give both")
    if op == "sample":
        yield cases.sample_case(B, V, dtype)
    elif op == "decode":
        yield cases.decode_case(B, T, H, C // H, dtype)
    else:
        for direction in (cases.BOTH, cases.FORWARD):
            yield {"attention": lambda: cases.attention_case(B, T, H, C // H, dtype, direction),
                   "layer_norm": lambda: cases.layer_norm_case(B * T, C, dtype, direction), "mlp": lambda: cases.mlp_case(B * T, C, dtype, direction),
                   "cross_entropy": lambda: cases.cross_entropy_case(B * T, C, V, dtype, direction)}[op]()


def register(op, named):
    """Register the function that FILE.py:FUNCTION names, and return its name."""
    path, colon, function = named.rpartition(":")
    if not colon or not path or not function:
        raise ValueError(f"mine is {named!r}; expected FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise ValueError(f"mine is {named!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        there = [name for name, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
        raise ValueError(f"mine is {named!r}: {path} has no function {function}; it has {', '.join(there) or 'none'}")
    name = f"my_{function}" if function in backend.IMPLEMENTATIONS[op] or function in backend.CHOICES else function
    registered.register(op, name, getattr(module, function))
    return name


def check(op, name, device):
    """A line on the comparison with float64; prints what is wrong and returns None if anything is."""
    found = [row for row in verify.check(device, True, (op,)) if row.implementation == name or row.result == "FAIL" and not row.implementation]
    wrong = [row for row in found if row.result == "FAIL"]
    if wrong:
        print(f"{name} is not right: of {len(found)} results {len(wrong)} differ from float64 by more than twice (gradients: three times) what plain "
              f"PyTorch's do\n\n" + tables.table(verify.HEAD, [row.cells() for row in wrong], align=verify.ALIGN))
        return None
    checked = [row for row in found if row.result == "pass"]
    return f"{name}: {len(checked)} results and gradients are as near to float64 as plain PyTorch's" if checked else f"{name} was not checked: {found[0].why}"


def time_case(case, device, limits, o, mine, until):
    """Time one case and print it; returns its rows for the CSV."""
    wanted, skipped = ([name for name in text.split(",") if name] for text in (o.implementations, o.without))
    names = [name for name in case.implementations if (not wanted or name in wanted or name == mine) and name not in skipped]
    runs, absent = case.runs(device, names)
    timed = measure.interleaved_on_gpu if device.type == "cuda" else measure.interleaved
    samples = timed(runs, 5 if o.quick else o.rounds, until=until)
    median = measure.medians(samples)
    rows = []
    for name, seconds in sorted(median.items(), key=lambda item: item[1]):
        memory = peak_memory(runs[name], device)
        rows.append((case.name, name, seconds, spread(samples[name]), median["eager"] / seconds if "eager" in median else None, memory,
                     None if limits is None else rate(case, seconds) / limits[case.bound]))
    print(tables.table((case.name, *HEAD), [shown(case, row) for row in rows], o.format))
    for name, why in absent.items():
        print(f"{name} is not here: {why}", file=tables.aside(o.format))
    print(flush=True)
    if o.json:
        measure.append(o.json, "kernel", device=device.type, op=case.op, shape=case.shape, sweep=case.sweep, direction=case.direction,
                       dtype=str(case.dtype).removeprefix("torch."), bytes=case.bytes, flops=case.flops, bound=case.bound,
                       limits=limits, samples=samples, absent=absent)
    return [tuple("" if cell is None else cell for cell in row) for row in rows]


def shown(case, row):
    """A row of the CSV as the table shows it."""
    _, name, seconds, width, times, memory, share = row
    unit, scale = ("GB/s", 1e9) if case.bound == "copy" else ("TFLOP/s", 1e12)
    of = f"{rate(case, seconds) / scale:,.1f} {unit}" + ("" if share is None else f", {100 * share:.0f} %")
    return (name, f"{1e6 * seconds:,.1f} us", f"{100 * width:.0f} %", "" if times is None else f"{times:.2f}",
            "" if memory is None else f"{memory / 2**20:,.1f} MB", of)


def rate(case, seconds):
    """Bytes or FLOPs a second, whichever bounds the case."""
    return (case.bytes if case.bound == "copy" else case.flops) / seconds


def spread(samples):
    """Half the width of the middle half of the samples, as a share of the median."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / middle


def peak_memory(function, device):
    """Bytes that a call allocates at most beside its inputs, or None where PyTorch does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()         # held, as a caller holds it
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def draw(rows, path):
    """Bars of the times, a panel for each case."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    titles = list(dict.fromkeys(row[0] for row in rows))
    figure, panels = plt.subplots(max(1, len(titles)), 1, figsize=(8, 1 + 2.2 * max(1, len(titles))), squeeze=False)
    for title, panel in zip(titles, panels[:, 0]):
        of = [row for row in rows if row[0] == title][::-1]
        panel.barh([row[1] for row in of], [1e6 * row[2] for row in of], color="tab:blue")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("us, less is better")
    figure.tight_layout()
    with files.replacing(path) as f:
        figure.savefig(f, format="png", dpi=120)
    plt.close(figure)
