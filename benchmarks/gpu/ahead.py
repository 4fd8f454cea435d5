"""Compile on a machine without a GPU what the kit launches on compute capability 9.0, to save minutes on the GPU machine.

    python -m benchmarks.gpu.ahead FOLDER [--only training,generation,checks,tests]

FOLDER becomes a Triton cache: machine code, its description, and the launchers, which a C compiler builds. A cache key depends on the
kernel's source, the types of its arguments, which of them are 1 or multiples of 16, and Triton's version; none of these needs a GPU. So
the same code runs here as on the GPU machine, under a driver that says "sm_90" and a `JITFunction.run` that compiles and does not launch.
Tensors are PyTorch's fake ones, without memory, and claim to be on GPU 0. A kernel that is missed is compiled on the GPU machine, and costs
nothing else. Triton's version must be the same there, and Python's too, for the launchers.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).parents[2]
CARRIED = ROOT / ".triton-ahead"
OTHER_KEYS = "other-keys.json"      # in the folder: [entry of the cache, name of a group of files, {file: path}], see `under_every_key`


def triton_cache():
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def other_keys(folder):
    return json.loads((folder / OTHER_KEYS).read_text()) if (folder / OTHER_KEYS).exists() else []


def seed(source=CARRIED, cache=None):
    """Copy a folder that `main` filled into Triton's cache; returns the number of kernels. Groups name their files by absolute paths."""
    cache = triton_cache() if cache is None else cache

    def group(files):
        return json.dumps({"child_paths": {name: str(cache / Path(at).parent.name / name) for name, at in files.items()}}).encode()

    entries = {entry: {name: group(files)} for entry, name, files in other_keys(source)}
    for path in source.glob("*/*"):
        grouped = path.name.startswith("__grp__")
        content = group(json.loads(path.read_text())["child_paths"]) if grouped else path.read_bytes()
        entries.setdefault(path.parent.name, {})[path.name] = content
    for entry, files in entries.items():
        half = cache / f"{entry}.{os.getpid()}"
        half.mkdir(parents=True)
        for name, content in files.items():
            (half / name).write_bytes(content)
        try:
            half.rename(cache / entry)
        except OSError:         # compiled there already
            shutil.rmtree(half)
    return sum(name.endswith(".cubin") for files in entries.values() for name in files)


# --------------------------------------------------------------------------------------------------------- a GPU that is not there


class Driver:
    """What `JITFunction.run` asks of Triton's driver."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", 90, 32)


def compile_only(launchers=True):
    """From now on a launch only compiles. Returns the set of the hashes of the kernels seen so far."""
    import triton.compiler
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    driver.set_active(Driver())
    triton.compiler.compile = under_every_key(triton.compiler.compile)
    run, hashes, make_launcher = JITFunction.run, set(), launcher_class() if launchers else None

    def compiled(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in hashes:
            hashes.add(kernel.hash)
            if make_launcher:
                make_launcher(kernel.src, kernel.metadata)
        return kernel

    JITFunction.run = compiled
    return hashes


def under_every_key(compile):
    """Triton's `compile`, with the result stored under every key that the kernel may have there: one more group of files for each.

    Triton 3.6 adds the values of a helper's constants (module-level `tl.constexpr`) to the hash of its caller only if the helper was
    hashed before. So a process that launched something else first has another key for the same kernel: up to 48 keys for the MLP's.
    Triton 3.9 has one.
    """
    hashes = {}         # by the kernel's id: its own hash is what changes here

    def run(src, target=None, options=None, **more):
        from triton.compiler.compiler import get_cache_invalidating_env_vars, get_cache_key, get_cache_manager, make_backend
        kernel = compile(src, target=target, options=options, **more)
        backend, own = make_backend(target), src.fn.hash
        parsed = backend.parse_options(dict(options or {}))
        if id(src.fn) not in hashes:
            hashes[id(src.fn)] = hashes_in_any_order(src.fn)
        for src.fn.hash in hashes[id(src.fn)]:
            key = get_cache_key(src, backend, parsed, env_vars=get_cache_invalidating_env_vars())
            key = hashlib.sha256(key.encode()).hexdigest()
            manager, name = get_cache_manager(key), f"{src.name[:150]}.json"
            if key != kernel.hash and not manager.has_file(f"__grp__{name}"):
                manager.put_group(name, {path.name: str(path) for path in map(Path, kernel.metadata_group.values())})
        src.fn.hash = own
        return kernel
    return run


def hashes_in_any_order(kernel):
    """All hashes that a kernel may have, depending on which of its helpers were hashed before it."""
    from triton import language as tl
    from triton.runtime.jit import JITFunction

    def globals_of(function):
        return [function.__globals__[name] for name in function.fn.__code__.co_names if name in function.__globals__]

    def has_constants(function):
        return any(isinstance(value, tl.constexpr) or isinstance(value, JITFunction) and has_constants(value)
                   for value in globals_of(function))

    def helpers(function):      # those that a helper calls before it
        direct = [value for value in globals_of(function) if isinstance(value, JITFunction) and has_constants(value)]
        return list(dict.fromkeys(each for helper in direct for each in (*helpers(helper), helper)))

    called = helpers(kernel)
    before, hashes = [(function, function.hash, function.used_global_vals) for function in (kernel, *called)], {kernel.cache_key}
    for n in range(len(called) + 1):
        for first in itertools.combinations(called, n):
            for function in (kernel, *called):
                function.hash, function.used_global_vals = None, {}
            for function in first:
                function.cache_key      # a property that keeps what it finds
            hashes.add(kernel.cache_key)
    for function, own, values in before:
        function.hash, function.used_global_vals = own, values
    return hashes


def launcher_class():
    """Triton's launcher class, changed to build its module against a stub libcuda.so.1 and not to load it."""
    from triton.backends.nvidia import driver
    from triton.runtime import build
    folder, sources = Path(tempfile.mkdtemp()), Path(driver.__file__).parent
    names = set(re.findall(r"\bcu[A-Z]\w+", "".join((sources / name).read_text() for name in ("driver.c", "driver.py"))))
    (folder / "cuda.c").write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(names)))
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", folder / "cuda.c"], check=True)
    driver.library_dirs = lambda: [str(folder)]
    build._load_module_from_path = lambda name, path: mock.MagicMock()
    driver.CudaUtils()
    return driver.CudaLauncher


def pretend():
    """Let every tensor claim to be on GPU 0, an H100, when our code asks. PyTorch still sees CPU tensors and computes with them: its
    autograd would start a thread for a GPU, and fail without one."""
    import torch
    from nanogpt_fast.kernels import cross_entropy
    from torch._subclasses.fake_tensor import FakeTensor

    from nanogpt_fast import model
    from nanogpt_fast.generation import decode
    from nanogpt_fast.ops import attention, sampler
    from nanogpt_fast.ops.cpu import linear as linear_cpu
    from nanogpt_fast.training import half_weights
    FakeTensor.data_ptr = lambda self: self.storage_offset() * self.element_size()      # of an aligned storage
    torch.Tensor.is_cuda = property(lambda self: True)
    torch.Tensor.get_device = lambda self: 0
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *device: None
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.get_device_properties = lambda *device: SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20)
    enabled, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    torch.is_autocast_enabled = lambda *kind: enabled("cpu")
    torch.get_autocast_dtype = lambda *kind: autocast_dtype("cpu")

    def product(real):      # half operands with an fp32 result: a GPU's
        def run(*tensors, out_dtype=None, out=None, **more):
            if out_dtype is None:
                return real(*tensors, out=out, **more)
            return tensors[-1].new_empty(tensors[-2].size(0), tensors[-1].size(1), dtype=out_dtype) if out is None else out
        return run

    torch.mm, torch.addmm = product(torch.mm), product(torch.addmm)
    model.touched = half_weights.touched = lambda module, cls: None         # a fake parameter is a tensor subclass
    cross_entropy.check_range = lambda *targets: None                       # reads values, on a CPU alone
    linear_cpu.AMX = False
    attention._why_no_cudnn = lambda: "there is no GPU"
    decoder = decode.decoder
    decode.decoder = lambda session: decoder(session) if session.rows <= decode.max_rows_triton(session) else None     # as on a GPU
    sampler.prepare = lambda *args, **more: None


@contextlib.contextmanager
def hopper():
    """Inside the block the extension's kernels for Hopper exist and do nothing, so that the code around them launches the Triton kernels."""
    from nanogpt_fast.ops.hopper import attention as attention_hopper, mlp as mlp_hopper
    def attention(device, dtype, D, scale=None, dropout_p=0.0):
        return None if D == attention_hopper.HEAD and dropout_p == 0 and dtype in attention_hopper.DTYPES else "not for it"

    def mlp(device, dtype, C, F, activation):
        return None if dtype in mlp_hopper.DTYPES and activation in mlp_hopper.ACTIVATIONS else "not for it"

    def nothing(*args, **more):
        pass
    with mock.patch.multiple(attention_hopper, why_not=attention, _launch=nothing):
        with mock.patch.multiple(mlp_hopper, why_not=mlp, _launch=nothing):
            yield


# ------------------------------------------------------------------------------------------------------------- what the kit launches


def training():
    """A step as `bench train`, the checks and `verify` take it: with our trainer's copies of the weights, and with one import changed."""
    import torch

    from benchmarks.gpu.smoke import SMALL
    from nanogpt_fast import GPT, GPTConfig
    from nanogpt_fast.bench.common import GPT2
    from nanogpt_fast.training.half_weights import HalfWeights
    baby = dict(block_size=256, vocab_size=65, n_head=6, n_embd=384, dropout=0.2, bias=False)
    verified = dict(block_size=256, vocab_size=1000, n_head=4, n_embd=256)
    updates()
    embeddings(GPT2, baby, SMALL)
    half = (torch.bfloat16,)
    for shape, batches, dtypes in ((GPT2, (64, 12, 2), half), (baby, (64,), half), (SMALL, (40, 8), half),
                                   (verified, (8,), (torch.bfloat16, torch.float16, torch.float32))):
        model = GPT(GPTConfig(**{**shape, "n_layer": 2}), backend="fused")      # of two layers: the first and another
        for B, dtype, around, logits in itertools.product(batches, dtypes, (hopper, contextlib.nullcontext), (False, True)):
            tokens = torch.randint(shape["vocab_size"], (2, B, shape["block_size"]))
            autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
            for copies in (HalfWeights(model, dtype).in_use, contextlib.nullcontext):
                with around(), copies():
                    with autocast:
                        loss = model(*tokens, return_logits=logits)[1]
                    loss.backward()
            with around(), torch.no_grad(), autocast:
                model(*tokens, return_logits=logits)


def updates():
    """The end of a step: AdamW, with and without clipping."""
    import torch
    from nanogpt_fast.kernels.adamw import Table
    table, numbers = Table(), [torch.empty(100) for _ in range(4)]
    table.write([(*numbers, torch.empty(()), torch.empty(100, dtype=torch.bfloat16))], [0], [(0.9, 0.95, 1e-8, 0.1)])
    for factor in (torch.ones(()), None):
        table.step([1e-3], factor)


def embeddings(*shapes):
    """What the trainer runs in place of nn.Embedding, forward and backward."""
    import torch

    from nanogpt_fast.kernels import embedding
    for shape in shapes:
        V, T, C = shape["vocab_size"], shape["block_size"], shape["n_embd"]
        index = torch.zeros(2, T, dtype=torch.int64)
        embedding.embed(index, torch.empty(V, C), torch.empty(T, C))
        embedding.add_rows(torch.empty(V, C), index, torch.empty(2, T, C))


def generation():
    """A decoding step and the prompt's pass, for each number of rows; many rows take the ops."""
    import torch

    from benchmarks.gpu.smoke import SMALL
    from nanogpt_fast import GPT, GPTConfig, generation as generating
    from nanogpt_fast.bench.common import GPT2
    for shape in (GPT2, SMALL):
        model = GPT(GPTConfig(**{**shape, "n_layer": 2}), backend="fused").eval()
        for dtype in (torch.bfloat16, torch.float32) if shape is SMALL else (torch.bfloat16,):
            for rows in (1, 2, 3, 8, 16, 64):
                with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    session = generating.session_of(model, rows)
                    for T in (8, 128):
                        session.prefill(torch.zeros(1, T, dtype=torch.int64), torch.tensor([T]), rows)
                    session.decode(shape["block_size"])


def checks():
    """The kit's checks and `verify --quick`: our side of each, without the side that it is compared with."""
    import torch

    from benchmarks.gpu import smoke
    from nanogpt_fast.checks import verify

    def ours_alone(call, inputs, differentiate=0):
        leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16):
            results = call(leaves, "fused")
        result = results[differentiate] if isinstance(results, tuple) else results
        torch.autograd.grad(result, [t for t in leaves.values() if t.requires_grad], torch.empty_like(result))

    cpu, on_gpu = torch.device("cpu"), SimpleNamespace(type="cuda", index=0)        # `verify` has other shapes on a GPU
    randn, randint = torch.randn, torch.randint
    with contextlib.ExitStack() as stack:
        for owner, name, other in (
                (smoke, "three_ways", ours_alone), (torch, "equal", lambda a, b: True), (torch.Tensor, "__bool__", lambda tensor: True),
                (torch, "randn", lambda *shape, device=None: randn(*shape)),
                (torch, "randint", lambda *bounds, device=None, **more: randint(*bounds, **more))):
            stack.enter_context(mock.patch.object(owner, name, other))
        for around in (hopper, contextlib.nullcontext):
            with around():
                for name, check in {**smoke.CHECKS["small"], **smoke.CHECKS["ops"]}.items():
                    if not any(word in name for word in ("sampler", "steps", "import", "AdamW", "greedy", "early", "prefills")):       # `generation` has them
                        with attempted(name):
                            check(cpu)
                for case in verify.cases(on_gpu, True):
                    for dtype in (torch.float32, torch.float16, torch.bfloat16):
                        with attempted(case.shape):
                            inputs = case.make(lambda tensor: tensor.to(dtype))
                            verify.evaluate(case, inputs, verify.FUSED, cpu, dtype if dtype != torch.float32 else None)


def tests():
    """The kernels' tests, with memory but without results: comparisons pass, and a test that notices stops there."""
    import pytest
    import torch

    from benchmarks.gpu.__main__ import KERNEL_TESTS
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    import harness
    harness.DEVICE = torch.device("cpu")
    harness.assert_close_to_oracle = harness.assert_grid_order_is_free = lambda *args, **more: None
    harness.same_bits = lambda a, b: True
    harness.guarded_outputs = lambda **more: contextlib.nullcontext(harness.Allocations())
    torch.equal, torch.testing.assert_close = lambda a, b: True, lambda *args, **more: None
    torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda *device: "none"

    class Drawn:
        """Skips what hypothesis draws: it would draw something else there."""

        def pytest_collection_modifyitems(self, config, items):
            items[:] = [item for item in items if not hasattr(item.function, "hypothesis")]

    with mock.patch.dict(os.environ, NANOGPT_FAST_EXAMPLES="1"):
        paths = [str(ROOT / path) for path in KERNEL_TESTS if "kernels" in path]
        pytest.main(["-q", "-p", "no:cacheprovider", "--tb=no", *paths], plugins=[Drawn()])


PARTS = {"training": training, "generation": generation, "checks": checks, "tests": tests}


@contextlib.contextmanager
def attempted(name):
    """A failure inside the block becomes a line of output; what was compiled before it stays."""
    try:
        yield
    except Exception:
        print(f"{name}: {traceback.format_exc(limit=-3)}", flush=True)


def tidy(folder):
    """Keep only what a cache hit loads; returns (kernels, bytes). TRITON_STORE_BINARY_ONLY omits all but the source."""
    others = []
    for path in sorted(folder.glob("*/__grp__*")):
        files = json.loads(path.read_text())["child_paths"]         # later Tritons refuse a group of which a file is missing
        files = {name: at for name, at in files.items() if not name.endswith(".source")}
        path.write_text(json.dumps({"child_paths": files}))
        if len(os.listdir(path.parent)) == 1:       # thousands of folders, of one small file each
            others.append((path.parent.name, path.name, files))
            shutil.rmtree(path.parent)
    (folder / OTHER_KEYS).write_text(json.dumps(others))
    for path in folder.glob("*/*.source"):
        path.unlink()
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.suffix == ".cubin" for path in files), sum(path.stat().st_size for path in files)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ahead", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    args = parser.parse_args(argv)
    os.environ |= {"TRITON_CACHE_DIR": str(args.folder.resolve()), "TRITON_STORE_BINARY_ONLY": "1",
                   "TRITON_DEFAULT_FP_FUSION": "1"}     # as gpu.sh has it: a part of the key
    for entry, name, files in other_keys(args.folder):          # of an earlier call; `tidy` takes them together again
        (args.folder / entry).mkdir(exist_ok=True)
        (args.folder / entry / name).write_text(json.dumps({"child_paths": files}))
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    torch.set_num_threads(1)
    hashes = compile_only(launchers=shutil.which("gcc") is not None)
    pretend()
    for name in args.only.split(","):
        start, before = time.perf_counter(), len(hashes)
        with contextlib.nullcontext() if name == "tests" else FakeTensorMode(), attempted(name):
            PARTS[name]()
        print(f"{name}: {len(hashes) - before} kernels, {time.perf_counter() - start:.0f} s", flush=True)
    kernels, size = tidy(args.folder)
    print(f"{kernels} kernels, {size / 2**20:.1f} MiB in {args.folder}")


if __name__ == "__main__":
    main()
