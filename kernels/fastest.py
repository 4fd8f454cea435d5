"""Which implementation, form and tile is the fastest, by card, dtype and shape: one table for all ops and kernels, and its look-up.

A table is a list of rows, and the first row that fits decides. The rows that ship are in fastest.json, each "measured" on a card or
"expected": from published figures, from counted traffic, or because the tile compiles without a spill. `nanogpt-fast tune` measures rows of
the same form, which come before them (`install`). fastest.json is this file's only input; Triton is not imported.
"""
import contextlib
import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch.compiler import is_compiling

ARCHITECTURES = (80, 86, 89, 90, 100)       # those that have rows of their own
INTERPRETER, CPU = -1, -2                   # as device numbers: Triton's interpreter takes an H100's rows; the CPU has its own
ANY = (0, 2**62)
MOST_REMEMBERED = 4096


class Tile(NamedTuple):
    """Rows, columns and inner size of a kernel's tile (0: it has none), warps of a program, stages of its software pipeline."""
    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 0

    def options(self):
        """The tile as constants of a Triton kernel and options of its launch; without the sizes that it does not have."""
        return {name: value for name, value in self._asdict().items() if value}

    def __str__(self):
        return "x".join(str(size) for size in self[:3] if size) + f", {self.num_warps} warps" + f", {self.num_stages} stages" * (self.num_stages > 0)


class Row(NamedTuple):
    """One line of a table. Ranges include both ends."""
    what: str                   # an op ("attention training"), a pass of it ("mlp backward"), or a kernel's tile ("attention dq tile")
    use: str = ""               # the implementation or form; "" where only a tile is chosen
    tile: Tile = None
    card: str = ""              # the name of the GPU or CPU; "" for every one of these architectures
    arch: tuple = ANY           # 10 * major + minor of the compute capability; 0 for a CPU
    dtype: str = ""             # a `column`; "" for all
    size: tuple = ANY           # of a row: head size, channels or vocabulary
    tokens: tuple = ANY         # rows of the matrix: sequences times length
    length: tuple = ANY         # of a sequence
    basis: str = "expected"     # or "measured"
    note: str = ""              # why, for the user

    def fits(self, size, tokens, length):
        return (self.size[0] <= size <= self.size[1] and self.tokens[0] <= tokens <= self.tokens[1]
                and self.length[0] <= length <= self.length[1])


def column(dtype, dropout=False):
    """The name of a dtype in a table. fp32 is apart because it does not use tensor cores, dropout because its random numbers take registers."""
    if dtype == torch.float32:
        return "float32"
    return "half dropout" if dropout else "half"


def device_number(tensor):
    """The number of a tensor's device in `find`."""
    return tensor.get_device() if tensor.is_cuda else CPU


def nothing_for(tensor):
    """Whether the table has no choice for the tensor's device, as for a CPU on which nothing was measured: takes a tenth of the time of `find`."""
    if tensor.is_cuda or is_compiling():
        return False
    table = _table
    try:
        return table.memo[CPU]
    except KeyError:
        arch, card = place(CPU)
        table.memo[CPU] = none = not any(row.use and row.arch[0] <= arch <= row.arch[1] and row.card in ("", card) for row in table.rows)
        return none


class Table:
    """Rows, and what was found in them so far (`find`)."""

    def __init__(self, rows):
        self.rows, self.memo = tuple(rows), {}


def find(what, device, dtype="", *, size=0, tokens=0, length=0, without=()):
    """The first Row of the table in force that fits, or None.

    device: the number of a CUDA device, INTERPRETER or CPU. dtype: a `column`. without: values of `use` that cannot run here.
    """
    if is_compiling():          # sizes may be symbols, which cannot be keys; comparing them makes guards
        for row in candidates(what, device, dtype):
            if row.use not in without and row.fits(size, tokens, length):
                return row
        return None
    key = what, device, dtype, size, tokens, length, without
    table = _table          # another thread may put another one into force meanwhile
    memo = table.memo
    try:
        return memo[key]
    except KeyError:
        if len(memo) > MOST_REMEMBERED:
            memo.clear()
        memo[key] = row = next((row for row in _rows(table, what, device, dtype) if row.use not in without and row.fits(size, tokens, length)), None)
        return row


def tile(what, device, dtype="", *, size=0, tokens=0, length=0):
    """The Tile of a kernel. Raises RuntimeError where the table has none: on a GPU older than its architectures."""
    row = find(what, device, dtype, size=size, tokens=tokens, length=length)
    if row is None:
        arch, card = place(device)
        raise RuntimeError(f"the kernels need compute capability {ARCHITECTURES[0] / 10} or more; {card} has {arch / 10}" if arch < ARCHITECTURES[0]
                           else f"there is no {what} for {dtype or 'this'}, size {size}")
    return row.tile


def candidates(what, device, dtype=""):
    """The rows of the table in force for this card and dtype, in order."""
    return _rows(_table, what, device, dtype)


def _rows(table, what, device, dtype):
    arch, card = place(device)
    return tuple(row for row in table.rows if row.what == what and row.arch[0] <= arch <= row.arch[1] and row.card in ("", card)
                 and row.dtype in ("", dtype))


candidates._dynamo_marked_constant = True       # evaluated once while tracing: see backend.py


def shipped(what, arch, dtype=""):
    """The rows of fastest.json for an architecture, in order: what the gate compiles."""
    return [row for row in SHIPPED if row.what == what and row.arch[0] <= arch <= row.arch[1] and row.dtype in ("", dtype)]


def shipped_tile(what, arch, dtype="", size=1):
    """The Tile of fastest.json for an architecture and a size."""
    return next(row.tile for row in shipped(what, arch, dtype) if row.fits(size, 0, 0))


@functools.cache
def place(device):
    """(architecture of the table, name of the card) of a device number."""
    if device == CPU:
        return 0, cpu_name()
    if device < 0:
        return 90, ""
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    # Architectures without rows: 8.7 has 8.6's instructions; 12.x is a consumer chip with 99 KB of shared memory, like 8.9.
    known = 89 if arch >= 120 else max((row for row in ARCHITECTURES if row <= arch), default=arch)
    return known, properties.name


@functools.cache
def cpu_name():
    """The processor's model, with the instruction sets that the extension has code for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform
        return platform.processor()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    known = (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("amx_bf16", "AMX"))
    return " ".join([name] + [label for flag, label in known if flag in flags])


def cached(function):
    """functools.cache for what is made from the table in force; another table starts with nothing. By position alone."""
    @functools.lru_cache(MOST_REMEMBERED)
    def made(table, *args):
        return function(*args)
    return functools.wraps(function)(lambda *args: made(_table, *args))


# ------------------------------------------------------------------------------------------------------------- tables


def install(rows=()):
    """Put these rows before those that ship, for this process. Returns the table that was in force."""
    return enforce(Table([*rows, *SHIPPED]))


def in_force():
    """The Table that decides now."""
    return _table


def enforce(table):
    """Put a Table into force; returns the one before."""
    global _table
    before, _table = _table, table
    return before


@contextlib.contextmanager
def trial(rows):
    """Inside, these rows come before all others, in every thread."""
    before = enforce(Table([*rows, *_table.rows]))
    try:
        yield
    finally:
        enforce(before)


@contextlib.contextmanager
def as_if(tokens, length):
    """Inside, every call decides as one of so many tokens, in sequences of this length, does; in every thread."""
    def anywhere(row):
        return row._replace(tokens=ANY, length=ANY)
    before = enforce(Table(anywhere(row) for row in _table.rows
                           if row.tokens[0] <= tokens <= row.tokens[1] and row.length[0] <= length <= row.length[1]))
    try:
        yield
    finally:
        enforce(before)


def to_json(row):
    """A row as a dict, without what it leaves open."""
    made = {}
    for name, value, default in zip(row._fields, row, (None, *Row._field_defaults.values())):
        if value != default or name == "basis":
            made[name] = [None if end == ANY[1] else end for end in value] if isinstance(default, tuple) else value
    return made


def from_json(row):
    """The Row of a dict. Raises ValueError, naming what is wrong."""
    if not isinstance(row, dict) or not isinstance(row.get("what"), str) or not row.get("what"):
        raise ValueError(f"a row is {row!r}; expected an object with 'what'")
    made = {}
    for name, value in row.items():
        kind = type(Row._field_defaults.get(name, ""))
        if name not in Row._fields:
            raise ValueError(f"the row of {row['what']!r} has {name!r}; expected some of {', '.join(Row._fields)}")
        numbers = isinstance(value, list) and all(end is None or type(end) is int and end >= 0 for end in value)
        if name == "tile":
            if not (numbers and len(value) == 5 and None not in value):
                raise ValueError(f"the tile of {row['what']!r} is {value!r}; expected 5 numbers: rows, columns, inner size, warps, stages")
            made[name] = Tile(*value)
        elif kind is tuple:
            if not (numbers and len(value) == 2 and value[0] is not None):
                raise ValueError(f"{name} of {row['what']!r} is {value!r}; expected the two ends of a range, the second one null if it is open")
            made[name] = value[0], ANY[1] if value[1] is None else value[1]
        elif not isinstance(value, str):
            raise ValueError(f"{name} of {row['what']!r} is {value!r}; expected a text")
        else:
            made[name] = value
    return Row(**made)


def dumps(rows, **about):
    """JSON with one line for each row."""
    head = "".join(f' {json.dumps(name)}: {json.dumps(value)},\n' for name, value in about.items())
    return "{\n" + head + ' "rows": [\n' + ",\n".join(f"  {json.dumps(to_json(row))}" for row in rows) + "\n ]\n}\n"


SHIPPED = tuple(map(from_json, json.loads(Path(__file__).with_name("fastest.json").read_text(encoding="utf-8"))["rows"]))
_table = Table(SHIPPED)
