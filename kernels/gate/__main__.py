"""The compile gate: every kernel, in every row of its tile table, compiled without a GPU and checked against limits.

    python -m nanogpt_fast.kernels.gate [--arch 90] [--only NAME] [--json FILE]

Tests find a wrong kernel; a slow one goes unnoticed on a machine that can't run it. But the compiler decides much of what makes
a kernel slow, and the compiler needs no GPU: registers that spill, shared memory that leaves room for one block, a matmul that
misses the tensor cores' fast instruction, loads of 2 bytes where 16 are possible. This command compiles each kernel ahead of
time and prints

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

All 953 rows take 557 s of one core: three quarters in Triton's and LLVM's passes, a quarter in ptxas. Processes share the work.
To keep it that short, a stage's result is reused where another architecture's would be the same (`compiling.SHARED`), and
variants of a case are compiled for one architecture only (`Case.variant_of`). Line numbers, which profilers want, are left out:
they take a tenth of the time, and no instruction depends on them. Nothing is cached between runs.
"""
import argparse
import dataclasses
import json
import pathlib
import sys
import time

import triton

from .compiling import compile_all, cpu_seconds
from .families import EVERY_FORM
from .measure import ARCHITECTURES, H200_BYTES_PER_SECOND, H200_FLOPS_PER_SECOND, WIDE, failures


def table(rows):
    """The rows as text, one line each."""
    width = max([len(row.name) for row in rows] + [6])
    tile_width = max([len(row.tile_row) for row in rows] + [4])
    lines = [f"{'kernel':{width}} {'tile':{tile_width}} {'sm':>3} {'warps':>5} {'regs':>4} {'spill':>5} {'shared':>7} "
             f"{'blocks':>6} {'wgmma':>5} {'mma':>4} {'tc5':>3} {'load':>4} {'store':>5} {'narrow':>6} {'MB':>7} {'GFLOP':>7} "
             f"{'floor us':>8} {'cpu s':>5}"]
    for row in rows:
        wgmma = f"{row.wgmma}!" if row.serialised else row.wgmma
        load = "tma" if row.tma and row.widest_load < WIDE else row.widest_load
        mb = "" if row.bytes is None else f"{row.bytes / 1e6:.1f}"
        gflop = "" if row.flops is None else f"{row.flops / 1e9:.1f}"
        floor = "" if row.floor_us is None else f"{row.floor_us:.1f}"
        lines.append(f"{row.name:{width}} {row.tile_row:{tile_width}} {row.arch:>3} {row.warps:>5} {row.registers:>4} "
                     f"{row.spill_bytes:>5} {row.shared:>7} {row.resident_blocks:>6} {wgmma:>5} {row.mma:>4} "
                     f"{row.tcgen05:>3} {load:>4} {row.widest_store:>5} {row.narrow_loads:>6} {mb:>7} {gflop:>7} {floor:>8} "
                     f"{row.compile_seconds:>5.1f}")
        if row.spill_bytes and row.spill_reason:
            lines.append(f"    spill: {row.spill_reason}")
    for arch in sorted({row.arch for row in rows if row.in_model}):
        model = [row.compile_seconds for row in rows if row.arch == arch and row.in_model]
        lines.append(f"sm_{arch}: the {len(model)} kernels of a GPT-2 124M training step here take {sum(model):.1f} s of "
                     "one core to compile")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m nanogpt_fast.kernels.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=list(ARCHITECTURES),
                        help="compute capability; default: all")
    parser.add_argument("--only", default="", metavar="NAME", help="only kernels whose name contains NAME")
    parser.add_argument("--every", action="store_true",
                        help=f"compile variants for every architecture, not for sm_{EVERY_FORM} alone")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--workers", type=int, help="processes that compile; default: one per core")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    rows = compile_all(tuple(args.arch or ARCHITECTURES), args.only, workers=args.workers, every=args.every)
    seconds = time.perf_counter() - start
    core_seconds = cpu_seconds()                        # includes the workers', which have ended
    print(f"Triton {triton.__version__}; floors: H200 at {H200_BYTES_PER_SECOND / 1e12} TB/s and "
          f"{H200_FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s")
    print(table(rows))
    found = [line for row in rows for line in failures(row)]
    print(f"{len(rows)} compiled in {seconds:.0f} s, {core_seconds:.0f} s of a core")
    print("\n".join(found) if found else "all within the limits")
    if args.json:
        lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)       # one row per line
        pathlib.Path(args.json).write_text(f"[\n{lines}\n]\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
