"""The compile gate: every kernel, in every row of its tile table, compiled without a GPU and checked against limits.

    python -m nanogpt_fast.kernels.gate [--arch 90] [--only NAME] [--all] [--format text|markdown|csv] [--json FILE]

Tests find a wrong kernel; a slow one goes unnoticed on a machine that can't run it. But the compiler decides much of what makes
a kernel slow, and the compiler needs no GPU: registers that spill, shared memory that leaves room for one block, a matmul that
misses the tensor cores' fast instruction, loads of 2 bytes where 16 are possible. This command compiles each kernel ahead of
time and prints the worst of each, or with --all every row:

    regs spill      registers and stack bytes (spills) of a thread, from the machine code
    shared  blocks  bytes of shared memory of a block; how many blocks fit a multiprocessor at once (limited by registers, shared
                    memory, warps and tensor memory); with two or more, one block's epilogue runs beside another's main loop
    wgmma mma tc5   tensor-core instructions: sm_90's asynchronous kind ("8!": ptxas made them wait for each other, its note
                    C7515), sm_80's, sm_100's
    load store      the widest global access of a thread in bytes ("tma": by the tensor memory accelerator)
    narrow          load instructions of less than 16 bytes
    MB GFLOP floor  what the launch must move and compute at GPT-2 124M shapes, B=64, T=1024, and the time in microseconds that
                    this takes an H200 at least
    cpu s           seconds of one core to compile

`tests/gate/test_gate.py` fails on everything that `measure.failures` reports.

All 983 rows take some 500 s of one core: three quarters in Triton's and LLVM's passes, a quarter in ptxas. Processes share the work.
To keep it that short, a stage's result is reused where another architecture's would be the same (`compiling.SHARED`), and
variants of a case are compiled for one architecture only (`Case.variant_of`). Line numbers, which profilers want, are left out:
they take a tenth of the time, and no instruction depends on them. Nothing is cached between runs.
"""
import argparse
import dataclasses
import difflib
import json
import pathlib
import sys
import time

import triton

from nanogpt_fast import tables
from nanogpt_fast.cli import until_nobody_reads

from .compiling import compile_all, cpu_seconds
from .families import EVERY_FORM, all_cases
from .measure import ARCHITECTURES, H200_BYTES_PER_SECOND, H200_FLOPS_PER_SECOND, WIDE, failures


HEAD = ("kernel", "tile", "sm", "warps", "regs", "spill", "shared", "blocks", "wgmma", "mma", "tc5", "load", "store", "narrow", "MB",
        "GFLOP", "floor us", "cpu s", "why it may spill")
ALIGN = "ll" + "r" * (len(HEAD) - 3) + "l"


def cells(row):
    """The columns of HEAD: all of one row."""
    wgmma = f"{row.wgmma}!" if row.serialised else row.wgmma
    load = "tma" if row.tma and row.widest_load < WIDE else row.widest_load
    counted = [("" if value is None else f"{value / unit:.1f}") for value, unit in ((row.bytes, 1e6), (row.flops, 1e9), (row.floor_us, 1))]
    return (row.name, row.tile_row, row.arch, row.warps, row.registers, row.spill_bytes, row.shared, row.resident_blocks, wgmma, row.mma,
            row.tcgen05, load, row.widest_store, row.narrow_loads, *counted, f"{row.compile_seconds:.1f}",
            row.spill_reason if row.spill_bytes else "")


SUMMARY = ("kernel", "variants", "sm", "most regs", "most spill", "most shared", "fewest blocks", "verdict")


def summary(rows):
    """A row for each kernel: the worst of its variants, and whether all of them keep the limits."""
    kernels = {}
    for row in rows:
        kernels.setdefault(row.name.split()[0], []).append(row)
    for kernel, of in kernels.items():
        broken, spilling = sum(bool(failures(row)) for row in of), sum(row.spill_bytes > 0 for row in of)
        verdict = f"{broken} of {len(of)} over a limit" if broken else "right" + f", {spilling} with a declared spill" * (spilling > 0)
        yield (kernel, len(of), " ".join(str(arch) for arch in sorted({row.arch for row in of})), max(row.registers for row in of),
               max(row.spill_bytes for row in of), max(row.shared for row in of), min(row.resident_blocks for row in of), verdict)


def compile_times(rows):
    """A line for each architecture: what a training step's kernels take to compile."""
    for arch in sorted({row.arch for row in rows if row.in_model}):
        model = [row.compile_seconds for row in rows if row.arch == arch and row.in_model]
        yield f"sm_{arch}: the {len(model)} kernels of a GPT-2 124M training step here take {sum(model):.1f} s of one core to compile"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m nanogpt_fast.kernels.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=list(ARCHITECTURES),
                        help="compute capability; default: all")
    parser.add_argument("--only", default="", metavar="NAME", help="only kernels whose name contains NAME")
    parser.add_argument("--every", action="store_true",
                        help=f"compile variants for every architecture, not for sm_{EVERY_FORM} alone")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--workers", type=int, help="processes that compile; default: one per core")
    parser.add_argument("--all", action="store_true", help="print every row; without it, one for each kernel: the worst of its variants")
    tables.add_format(parser)
    args = parser.parse_args(argv)
    aside = tables.aside(args.format)
    start = time.perf_counter()
    rows = compile_all(tuple(args.arch or ARCHITECTURES), args.only, workers=args.workers, every=args.every)
    if not rows:
        names = sorted({name for arch in args.arch or ARCHITECTURES for name in all_cases(arch, args.every)})
        parser.error(f"--only={args.only}: no kernel has that in its name; the nearest is {difflib.get_close_matches(args.only, names, 1, 0)[0]}")
    seconds = time.perf_counter() - start
    core_seconds = cpu_seconds()                        # includes the workers', which have ended
    print(f"Triton {triton.__version__}; floors: H200 at {H200_BYTES_PER_SECOND / 1e12} TB/s and "
          f"{H200_FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s", file=aside)
    print(tables.table(HEAD, map(cells, rows), args.format, ALIGN) if args.all else
          tables.table(SUMMARY, summary(rows), args.format, "lrlrrrrl"))
    print("\n".join(compile_times(rows)), file=aside)
    found = [line for row in rows for line in failures(row)]
    print(f"{len(rows)} compiled in {seconds:.0f} s, {core_seconds:.0f} s of a core", file=aside)
    print("\n".join(found) if found else "all within the limits", file=aside)
    if args.json:
        lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)       # one row per line
        pathlib.Path(args.json).write_text(f"[\n{lines}\n]\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(until_nobody_reads(main))
