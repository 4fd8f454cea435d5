"""The compile gate: every kernel, in every row of its tile table, compiled without a GPU and held to limits.

    python -m nanogpt_fast.kernels.gate [--arch 90] [--only NAME] [--json FILE]

A wrong kernel shows in the tests; a slow one hides on a machine that can't run it. Much of what makes one slow is decided by
the compiler, though, and the compiler needs no GPU: registers that don't fit, shared memory that leaves room for one block, a
matmul that misses the tensor cores' fast instruction, loads of 2 bytes where 16 would go. This module compiles each kernel
ahead of time and prints

    regs spill      registers and stack bytes (spills) of a thread, from the machine code
    shared  blocks  bytes of shared memory of a block; how many blocks fit a multiprocessor at once (registers, shared memory,
                    warps, tensor memory); two or more let one block's epilogue run beside another's main loop
    wgmma mma tc5   tensor-core instructions: sm_90's asynchronous kind ("8!": ptxas made them wait for each other, its note
                    C7515), sm_80's, sm_100's
    load store      the widest global access of a thread in bytes ("tma": the copy engine does it)
    narrow          load instructions of less than 16 bytes
    MB GFLOP floor  what the launch must move and compute at GPT-2 124M shapes, B=64, T=1024, and so the time in microseconds
                    that no kernel can beat on an H200
    cpu s           seconds of one core to compile

What each kernel file has to say for that is in `gate_case.py`. `tests/test_gate.py` fails on what `failures` finds.

All 835 rows take under 4 minutes on two cores (466 s of one): three quarters in Triton's and LLVM's passes, a quarter in ptxas. So
what a stage has made is used again where another architecture's would make the same (`SHARED`), and other forms of a kernel
that a row already has are compiled for one architecture (`Case.variant_of`). Line numbers, for profilers, are left out: a tenth
of the time, and no instruction depends on them. Nothing is kept between runs.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import importlib
import io
import json
import math
import multiprocessing
import os
import pathlib
import pkgutil
import re
import resource
import sys
import tempfile
import time

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptx_version_from_options
from triton.compiler import ASTSource, make_backend


KB = 1024

# Bytes of shared memory: what one block may have, and what a multiprocessor has (a block also takes 1 KB for the system).
# Warps and blocks: what a multiprocessor holds. CUDA C++ programming guide, "Technical specifications per compute capability".
ARCHITECTURES = {
    80: dict(shared_block=163 * KB, shared_sm=164 * KB, warps=64, blocks=32),
    86: dict(shared_block=99 * KB, shared_sm=100 * KB, warps=48, blocks=16),
    89: dict(shared_block=99 * KB, shared_sm=100 * KB, warps=48, blocks=24),
    90: dict(shared_block=227 * KB, shared_sm=228 * KB, warps=64, blocks=32),
    100: dict(shared_block=227 * KB, shared_sm=228 * KB, warps=64, blocks=32),
}
# The stages that an architecture takes over from another, because Triton makes the same of a launch for both but for the name
# in it: {architecture: ((another, the last such stage, only of what is `portable`), ...)}, of which the first that applies; in
# the order of compiling. Tests compare. Triton's stages are ttir, ttgir, llir, ptx, cubin. The first knows of no architecture.
# 80 and 86 part within llir: Triton's passes lower the module alike (LOWERED), then LLVM optimises it, without its vectoriser
# for 80. sm_90 comes first because only its PTX tells whether it needed an instruction that the older ones lack.
LOWERED = "ttgir, and llir's passes"
SHARED = {
    90: (),
    80: ((90, LOWERED, True), (90, "ttir", False)),
    86: ((90, "ptx", True), (80, LOWERED, False)),
    89: ((86, "ptx", False),),
    100: ((90, "ttir", False),),
}
EVERY_FORM = 90                 # the architecture that variants are compiled for, too: the one whose floors are printed
REGISTERS_SM = 65536            # on all of them, in four partitions
REGISTER_UNIT = 256             # a warp's registers are handed out in units of 256
SYSTEM_SHARED = 1 * KB
TENSOR_MEMORY_COLUMNS = 512     # sm_100

H200_BYTES_PER_SECOND = 4.3e12  # a copy's, measured by others; 4.8e12 on paper
H200_FLOPS_PER_SECOND = 790e12  # bf16, dense, sustained; 989e12 on paper

WIDE = 16                       # bytes of the widest load that all architectures have (sm_100 also has 32)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one case compiled to."""
    arch: int
    name: str
    tile_row: str
    warps: int
    registers: int
    spill_bytes: int
    shared: int
    resident_blocks: int
    wgmma: int
    serialised: bool                # by ptxas: each wgmma waits for the one before
    mma: int
    tcgen05: int
    widest_load: int                # bytes; 0: no load
    widest_store: int
    tma: bool
    narrow_loads: int
    large_half_dots: int            # tl.dot with half-precision operands: 64 rows and more
    small_half_dots: int            # fewer rows
    bytes: int | None
    flops: int | None
    floor_us: float | None
    compile_seconds: float
    in_model: bool
    allowed_spill_bytes: int
    spill_reason: str
    allowed_narrow_loads: int
    narrow_reason: str
    serial_reason: str


# ------------------------------------------------------------------------------------------------------------- the cases


def kernel_modules():
    """The modules of this package that describe launches, by name."""
    package = sys.modules[__package__]
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in ("gate", "gate_case"):
            module = importlib.import_module(f"{__package__}.{module.name}")
            if hasattr(module, "gate_cases"):
                yield module


@functools.cache
def all_cases(arch, every=False):
    """{name: Case} for one architecture: all that the kernel files describe, but variants for EVERY_FORM alone unless `every`."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        raise RuntimeError("TRITON_INTERPRET is set, so Triton interprets kernels and can't compile them; unset it")
    cases = {}
    for module in kernel_modules():
        for case in module.gate_cases(arch):
            if case.name in cases:
                raise ValueError(f"two gate cases for sm_{arch} are called {case.name!r}")
            if every or arch == EVERY_FORM or not case.variant_of:
                cases[case.name] = case
    return cases


# ------------------------------------------------------------------------------------------------------- compile and read


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What Triton makes of a case for one architecture."""
    arch: int
    texts: dict         # {"ttir": ..., "ptx": ...}
    module: object      # Triton's, as llir's passes have left it; None where it was not made
    metadata: dict
    log: str            # what ptxas says
    seconds: dict       # {stage: seconds of a core}


def compile_case(case, arch):
    """Compile one case for sm_<arch> and read the result: a Row."""
    return _row(case, _compile(case, arch))


def portable(ptx):
    """True where sm_90's PTX is also sm_86's: all that our kernels have there alone is its matmul instructions and stmatrix.

    One with another instruction of sm_90's own (TMA, say) does not slip through: ptxas refuses it for sm_86.
    """
    return "mma" not in ptx and "stmatrix" not in ptx


def _compile_for(cases):
    """{architecture: Compiled} of {architecture: Case}; what the same launch has for several of them is made once."""
    made = {}
    for arch in (arch for arch in SHARED if arch in cases):
        for first, last, only_portable in SHARED[arch]:
            if first in made and _same_launch(cases[first], cases[arch]) and \
                    (portable(made[first].texts["ptx"]) or not only_portable):
                made[arch] = _compile(cases[arch], arch, made[first], last)
                break
        else:
            made[arch] = _compile(cases[arch], arch)
    return made


def _compile(case, arch, other=None, last=""):
    """Compile a case for sm_<arch> as `triton.compile` does, but without its cache and line numbers: Compiled.

    other: Compiled of the same launch for another architecture, of which the stages up to `last` are taken.
    """
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisible = [name for name, kind in case.signature.items() if kind.startswith("*") or name in case.divisible]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attrs)
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(num_warps=case.num_warps, num_stages=case.num_stages, **case.options))
    stages = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)

    texts, lowered, metadata, seconds, log = {}, None, dict(vars(options)), {}, io.StringIO()
    start = _cpu_seconds()
    if other is None:
        module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    else:
        taken = list(stages)[:list(stages).index("ttgir" if last is LOWERED else last) + 1]
        texts = {name: text for name, text in other.texts.items() if name in taken}
        seconds = {name: other.seconds[name] for name in taken}
        if last == "ptx":
            version = get_ptx_version_from_options(options, arch)       # of the ptxas that Triton takes for this architecture
            header = f".version {version // 10}.{version % 10}\n.target sm_{arch}\n"
            module = texts["ptx"] = re.sub(r"\.version .*\n\.target .*\n", header, other.texts["ptx"], count=1)
            metadata |= other.metadata
        else:
            module = other.module if last is LOWERED else _parsed(texts["ttir"], context)
        stages = {name: stage for name, stage in stages.items() if name not in taken}
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True       # to stdout
        triton.knobs.compilation.disable_line_info = True
        for name, stage in stages.items():
            if name == "llir":
                lowered = module                        # by this stage, in place
            with _without_passes(module) if name == "llir" and other and last is LOWERED else contextlib.nullcontext():
                module = stage(module, metadata)
            if name in ("ttir", "ptx"):
                texts[name] = str(module)               # now: the next stage changes the module in place
            end = _cpu_seconds()
            seconds[name], start = end - start, end
    if other and last is LOWERED:
        seconds["llir"] = other.seconds["llir"]         # its own lacks the passes
    return Compiled(arch, texts, lowered, metadata, log.getvalue(), seconds)


@contextlib.contextmanager
def _without_passes(module):
    """Triton's passes leave this module alone, which has gone through them; what follows them in a stage is done.

    Only this module: another that a thread compiles meanwhile is lowered as ever. Raises where a version of Triton works
    otherwise than 3.6 to 3.9 do, which run all passes of a stage in place and leave nothing but LLVM's operations.
    """
    remedy = f"Triton {triton.__version__} lowers otherwise than 3.6 to 3.9: let no stages in SHARED end at LOWERED"
    operations = set()
    module.walk(lambda operation: operations.add(operation.get_name()))
    foreign = [name for name in sorted(operations) if name.split(".")[0] not in ("builtin", "llvm", "nvvm")]
    if foreign:
        raise RuntimeError(f"a module that was lowered has operations that are not LLVM's: {', '.join(foreign)}. {remedy}")
    run, skipped = ir.pass_manager.run, []

    def run_on_others(passes, what, *args):
        if what is module:
            skipped.append(args)
        else:
            run(passes, what, *args)

    try:
        ir.pass_manager.run = run_on_others
        yield
    finally:
        ir.pass_manager.run = run
    if not skipped:
        raise RuntimeError(f"the passes did not come by ir.pass_manager.run. {remedy}")


def _parsed(text, context):
    """The module that a TTIR text describes."""
    with tempfile.NamedTemporaryFile("w", suffix=".mlir") as file:
        file.write(text)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    module.context = context                            # which Triton's stages look up there
    return module


def _row(case, compiled):
    arch, ptx, log = compiled.arch, compiled.texts["ptx"], compiled.log
    registers = int(re.search(r"Used (\d+) registers", log).group(1))
    # Triton has no arrays of its own on the stack: what lies there is spilled.
    spill_bytes = int(re.search(r"(\d+) bytes stack frame", log).group(1))
    # With warp specialisation the block has more warps than num_warps says; the PTX knows.
    warps = math.ceil(int(re.search(r"\.reqntid\s+(\d+)", ptx).group(1)) / 32)
    shared, tensor_memory = compiled.metadata["shared"], compiled.metadata.get("tmem_size") or 0
    loads, stores, tma_load, tma_store = global_accesses(ptx)
    large, small = half_dots(compiled.texts["ttir"])
    return Row(
        arch=arch, name=case.name, tile_row=case.tile_row, warps=warps, registers=registers, spill_bytes=spill_bytes,
        shared=shared,
        resident_blocks=resident_blocks(arch, registers, shared, warps, tensor_memory),
        wgmma=ptx.count("wgmma.mma_async"), serialised="C7515" in log,
        mma=len(re.findall(r"(?<![\w.])mma\.sync", ptx)),
        tcgen05=ptx.count("tcgen05.mma"),
        widest_load=max(loads, default=0), widest_store=max(stores, default=0), tma=tma_load or tma_store,
        narrow_loads=sum(size < WIDE for size in loads), large_half_dots=large, small_half_dots=small,
        bytes=case.bytes, flops=case.flops, floor_us=floor_us(case.bytes, case.flops),
        compile_seconds=round(sum(compiled.seconds.values()), 3), in_model=case.in_model,
        allowed_spill_bytes=case.allowed_spill_bytes, spill_reason=case.spill_reason,
        allowed_narrow_loads=case.allowed_narrow_loads, narrow_reason=case.narrow_reason, serial_reason=case.serial_reason)


def _cpu_seconds():
    """Of this process and its children (ptxas is one); unlike a clock on the wall, the same on a busy machine."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def resident_blocks(arch, registers, shared, warps, tensor_memory=0):
    """How many blocks a multiprocessor holds at once; 0 where not even one fits."""
    limits = ARCHITECTURES[arch]
    if shared > limits["shared_block"]:
        return 0
    # Each of the four partitions holds whole warps.
    per_warp = math.ceil(max(registers, 1) * 32 / REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_SM // 4 // per_warp * 4 // warps
    by_shared = limits["shared_sm"] // (math.ceil(shared / 128) * 128 + SYSTEM_SHARED)
    by_tensor_memory = TENSOR_MEMORY_COLUMNS // tensor_memory if tensor_memory else limits["blocks"]
    return min(by_registers, by_shared, limits["warps"] // warps, limits["blocks"], by_tensor_memory)


def global_accesses(ptx):
    """(sizes in bytes of the load instructions, of the stores, does TMA load, does TMA store)."""
    def sizes(op):
        order = r"(?:volatile\.|relaxed\.\w+\.|acquire\.\w+\.)?"
        found = re.findall(rf"{op}\.{order}global[\w.:]*?(?:\.v(\d+))?\.[bfus](\d+)\b", ptx)
        return [int(vector or 1) * int(bits) // 8 for vector, bits in found]
    copies = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(0x[0-9a-f]+|\d+)", ptx)]
    tma_load = re.search(r"cp\.async\.bulk[\w.:]*\.shared::c\w+\.global", ptx) is not None
    tma_store = re.search(r"cp\.async\.bulk[\w.:]*\.global\.shared::c\w+", ptx) is not None
    return sizes("ld") + copies, sizes("st"), tma_load, tma_store


def half_dots(ttir):
    """(how many half-precision `tl.dot` have 64 rows or more, how many have fewer or are batched: wgmma takes no batch)."""
    found = re.findall(r"tt\.dot\b[^\n]*?: tensor<(\d+x)?(\d+)x\d+x(?:bf16|f16)>", ttir)
    large = [int(rows) >= 64 and not batch for batch, rows in found]
    return sum(large), len(large) - sum(large)


def floor_us(bytes, flops):
    """The microseconds on an H200 that the launch can't beat, or None where it isn't counted."""
    if bytes is None and flops is None:
        return None
    return 1e6 * max((bytes or 0) / H200_BYTES_PER_SECOND, (flops or 0) / H200_FLOPS_PER_SECOND)


# ------------------------------------------------------------------------------------------------------------- the limits


def failures(row):
    """What is wrong with a row, as sentences; empty where nothing is."""
    found, limits = [], ARCHITECTURES[row.arch]
    if row.spill_bytes > row.allowed_spill_bytes:
        found.append(f"spills {row.spill_bytes} bytes a thread, {row.allowed_spill_bytes} are declared")
    if row.shared > limits["shared_block"]:
        found.append(f"takes {row.shared} bytes of shared memory, a block may have {limits['shared_block']}")
    elif row.resident_blocks == 0:
        found.append(f"doesn't fit a multiprocessor: {row.registers} registers in {row.warps} warps")
    if row.narrow_loads > row.allowed_narrow_loads:
        found.append(f"{row.narrow_loads} loads are narrower than {WIDE} bytes, {row.allowed_narrow_loads} are declared")
    if row.arch == 90 and row.large_half_dots and row.wgmma == 0:
        found.append("has a half-precision matmul of 64 rows or more and no wgmma")
    if row.arch == 90 and row.large_half_dots and not row.small_half_dots and row.mma > 0:
        found.append(f"{row.mma} mma.sync: not every half-precision matmul of 64 rows or more became wgmma")
    if row.serialised and not row.serial_reason:
        found.append("ptxas serialises its wgmma (note C7515), and no reason is declared")
    return [f"sm_{row.arch} {row.name} ({row.tile_row}): {what}" for what in found]


# ------------------------------------------------------------------------------------------------------------ all of them


def _start_worker():
    gc.set_threshold(100_000)   # a collection walks all that PyTorch's import has made; at 700 that is 4 % of the time


def _compile_by_name(task):
    """Rows of one case for one or more architectures, in a worker: kernels can't be pickled, so it looks the case up again."""
    name, archs = task
    cases = {arch: all_cases(arch, every=True)[name] for arch in archs}
    return [_row(cases[arch], compiled) for arch, compiled in _compile_for(cases).items()]


def _same_launch(a, b):
    """True where the tables of two architectures say the same for a case."""
    return all(getattr(a, field) == getattr(b, field) for field in (
        "kernel", "signature", "constexprs", "num_warps", "num_stages", "divisible", "options"))


def compile_all(archs=tuple(ARCHITECTURES), only="", workers=None, counted=False, every=False):
    """Rows of every case whose name contains `only`, in the order of the cases; counted: only launches at GPT-2 124M shapes; every:
    variants too, wherever.

    Compiled by processes (as many as there are cores unless `workers` says otherwise), anew, whatever Triton's cache holds.
    """
    wanted = [(arch, name) for arch in archs for name, case in all_cases(arch, every).items()
              if only in name and not (counted and case.bytes is None)]
    if not wanted:
        return []
    tasks = {}                                          # {name: its architectures}
    for arch in ARCHITECTURES:
        for name in (name for which, name in wanted if which == arch):
            tasks.setdefault(name, []).append(arch)
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    # spawn: a forked child would inherit PyTorch's and LLVM's locks, held by threads that don't exist in it
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker) as pool:
        rows = {(row.arch, row.name): row for group in pool.map(_compile_by_name, tasks.items()) for row in group}
    return [rows[task] for task in wanted]


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
        if row.serialised and row.serial_reason:
            lines.append(f"    serialised: {row.serial_reason}")
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
    parser.add_argument("--every", action="store_true", help=f"variants on every architecture, not on sm_{EVERY_FORM} alone")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--workers", type=int, help="processes that compile; default: one a core")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    rows = compile_all(tuple(args.arch or ARCHITECTURES), args.only, workers=args.workers, every=args.every)
    seconds = time.perf_counter() - start
    core_seconds = _cpu_seconds()                       # the workers have ended, so theirs are among them
    print(f"Triton {triton.__version__}; floors: H200 at {H200_BYTES_PER_SECOND / 1e12} TB/s and "
          f"{H200_FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s")
    print(table(rows))
    found = [line for row in rows for line in failures(row)]
    print(f"{len(rows)} compiled in {seconds:.0f} s, {core_seconds:.0f} s of a core")
    print("\n".join(found) if found else "all within the limits")
    if args.json:
        lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)       # a row a line
        pathlib.Path(args.json).write_text(f"[\n{lines}\n]\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
