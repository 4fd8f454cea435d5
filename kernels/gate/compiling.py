"""A case through Triton's stages for one or more architectures, without a GPU; and all cases, in parallel."""
import concurrent.futures
import contextlib
import dataclasses
import gc
import io
import multiprocessing
import os
import re
import resource
import tempfile

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptx_version_from_options
from triton.compiler import ASTSource, make_backend

from .families import all_cases
from .measure import ARCHITECTURES, measured

# The stages that an architecture takes over from another because Triton makes the same of a launch for both, except for the
# architecture's name in it; tests compare. {architecture: ((another, the last such stage, only if `portable`), ...)}: the first
# entry that applies counts, and the order is the order of compiling. Triton's stages are ttir, ttgir, llir, ptx, cubin; ttir does
# not depend on the architecture. 80 and 86 part within llir: Triton's passes lower the module alike (LOWERED), then LLVM
# optimises it, without its vectoriser for 80. sm_90 comes first because only its PTX shows whether it needed an instruction that
# the older ones lack.
LOWERED = "ttgir, and llir's passes"
SHARED = {
    90: (),
    80: ((90, LOWERED, True), (90, "ttir", False)),
    86: ((90, "ptx", True), (80, LOWERED, False)),
    89: ((86, "ptx", False),),
    100: ((90, "ttir", False),),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What Triton makes of a case for one architecture."""
    arch: int
    texts: dict         # {"ttir": ..., "ptx": ...}
    module: object      # Triton's, after llir's passes; None where llir was taken from another architecture
    metadata: dict
    log: str            # ptxas's messages
    seconds: dict       # {stage: seconds of a core}


def compile_case(case, arch):
    """Compile one case for sm_<arch> and read the result: a Row."""
    return measured(case, _compile(case, arch))


def portable(ptx):
    """True where sm_90's PTX is also sm_86's: our kernels use none of sm_90's own instructions but its matmuls and stmatrix.

    A kernel with another such instruction (TMA, say) can't slip through: ptxas refuses it for sm_86.
    """
    return "mma" not in ptx and "stmatrix" not in ptx


def _compile_for(cases):
    """{architecture: Compiled} of {architecture: Case}; stages that several architectures share run once."""
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

    other: Compiled of the same launch for another architecture; the stages up to `last` are taken from it.
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
    start = cpu_seconds()
    if other is None:
        module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    else:
        taken = list(stages)[:list(stages).index("ttgir" if last is LOWERED else last) + 1]
        texts = {name: text for name, text in other.texts.items() if name in taken}
        seconds = {name: other.seconds[name] for name in taken}
        if last == "ptx":
            version = get_ptx_version_from_options(options, arch)       # of the ptxas that Triton uses for this architecture
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
                lowered = module                        # the stage lowers it in place
            with _without_passes(module) if name == "llir" and other and last is LOWERED else contextlib.nullcontext():
                module = stage(module, metadata)
            if name in ("ttir", "ptx"):
                texts[name] = str(module)               # before the next stage changes the module in place
            end = cpu_seconds()
            seconds[name], start = end - start, end
    if other and last is LOWERED:
        seconds["llir"] = other.seconds["llir"]         # this run skipped the passes
    return Compiled(arch, texts, lowered, metadata, log.getvalue(), seconds)


@contextlib.contextmanager
def _without_passes(module):
    """Skip Triton's passes for this module, which has been through them already; the rest of the stage runs.

    Other modules, which another thread may be compiling, still get their passes. Raises RuntimeError where a version of Triton
    differs from 3.6 to 3.9, which run all passes of a stage in place and leave only LLVM's operations.
    """
    remedy = f"Triton {triton.__version__} lowers differently from 3.6 to 3.9: let no entry of SHARED end at LOWERED"
    operations = set()
    module.walk(lambda operation: operations.add(operation.get_name()))
    foreign = [name for name in sorted(operations) if name.split(".")[0] not in ("builtin", "llvm", "nvvm")]
    if foreign:
        raise RuntimeError(f"a lowered module has operations that are not LLVM's: {', '.join(foreign)}. {remedy}")
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
        raise RuntimeError(f"the passes did not come through ir.pass_manager.run. {remedy}")


def _parsed(text, context):
    """The module that a TTIR text describes."""
    with tempfile.NamedTemporaryFile("w", suffix=".mlir") as file:
        file.write(text)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    module.context = context                            # Triton's stages look it up there
    return module


def cpu_seconds():
    """CPU time of this process and its children (ptxas is one); unlike wall-clock time, it is the same on a busy machine."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


# ------------------------------------------------------------------------------------------------------------ all of them


def _start_worker():
    gc.set_threshold(100_000)   # a collection walks every object of PyTorch's import; at the default of 700 that takes 4 % of the time


def _compile_by_name(task):
    """Rows of one case for one or more architectures. Runs in a worker: kernels can't be pickled, so it looks the case up."""
    name, archs = task
    cases = {arch: all_cases(arch, every=True)[name] for arch in archs}
    return [measured(cases[arch], compiled) for arch, compiled in _compile_for(cases).items()]


def _same_launch(a, b):
    """True where two cases, of two architectures, describe the same launch."""
    return all(getattr(a, field) == getattr(b, field) for field in (
        "kernel", "signature", "constexprs", "num_warps", "num_stages", "divisible", "options"))


def compile_all(archs=tuple(ARCHITECTURES), only="", workers=None, counted=False, every=False):
    """Rows of every case whose name contains `only`, in the order of the cases.

    counted: only launches at GPT-2 124M shapes. every: variants too, on every architecture. workers: processes that compile,
    by default one per core. Everything is compiled afresh; Triton's cache is not used.
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
