"""The CUDA sampler's own file, csrc/sampler/cuda.cu, without a GPU: run on the CPU as fibers, and compiled.

tests/csrc/cuda_on_cpu.h runs each CUDA thread as a fiber and each barrier as a round, in three thread orders. Its tokens must equal
those of the CPU sampler, which is a different algorithm for the same definition.
"""
import ctypes
import itertools
import os
import re
import shutil
import subprocess

import pytest
import torch

from nanogpt_fast.ops import extension, sampler

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
KERNEL = os.path.join(ROOT, "csrc", "sampler", "cuda.cu")
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
COMPILER = shutil.which("c++") or shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None or extension._C is None, reason="needs a C++ compiler and the extension")


class Rows(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_void_p), ("value", ctypes.c_float)]


class IntegerRows(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_void_p), ("value", ctypes.c_int64)]


class Batch(ctypes.Structure):  # ngf::Batch of csrc/sampler/sampler.h
    _fields_ = [("logits", ctypes.c_void_p), ("type", ctypes.c_int), ("rows", ctypes.c_int64), ("vocab", ctypes.c_int64),
                ("row_stride", ctypes.c_int64), ("temperature", Rows), ("top_k", IntegerRows), ("top_p", Rows), ("min_p", Rows),
                ("seed", ctypes.c_void_p), ("offset", ctypes.c_void_p), ("token", ctypes.c_void_p)]


def compile_for_cpu(kernel, folder):
    library = os.path.join(folder, "kernel.so")
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE",
                    f'-DKERNEL="{kernel}"', "-I", os.path.join(ROOT, "csrc"), os.path.join(ROOT, "tests", "csrc", "cuda_on_cpu.cpp"),
                    "-o", library], check=True)
    return ctypes.CDLL(library)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compile_for_cpu(KERNEL, str(tmp_path_factory.mktemp("cuda_on_cpu")))


def on_fibers(library, order, logits, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0, offset=0):
    """Tokens of the kernel; None where its threads waited for each other for ever. Parameters are tensors, one per row, or numbers."""
    B = len(logits)
    seed, offset = torch.arange(B) + seed, torch.full((B,), offset)
    token = torch.full((B,), -1)

    def rows(value, kind):
        return kind(value.data_ptr(), 0) if isinstance(value, torch.Tensor) else kind(None, value)

    batch = Batch(logits.data_ptr(), (torch.float32, torch.bfloat16, torch.float16).index(logits.dtype), B, logits.size(1), logits.stride(0),
                  rows(temperature, Rows), rows(0 if top_k is None else top_k, IntegerRows), rows(1.0 if top_p is None else top_p, Rows),
                  rows(0.0 if min_p is None else min_p, Rows), seed.data_ptr(), offset.data_ptr(), token.data_ptr())
    stuck = library.sample_cuda_on_cpu(ctypes.byref(batch), ORDERS[order])
    return None if stuck else (token, offset)


def on_cpu(logits, seed=0, offset=0, **filters):
    rows = len(logits)
    offset, token = torch.full((rows,), offset), torch.empty(rows, dtype=torch.int64)
    sampler.sample_out(logits, out=token, seed=seed + torch.arange(rows), offset=offset, **filters)     # `sample` refuses rows without a token
    return token, offset


def cases(full):
    """(logits, filters). Together they take every path: window, search, no filter, greedy; and every alignment."""
    generator = torch.Generator().manual_seed(0)
    V_and_types = [(1, torch.float32), (7, torch.bfloat16), (65, torch.float32), (1025, torch.float16), (3001, torch.bfloat16)]
    if full:
        V_and_types += [(1023, torch.float32), (1024, torch.bfloat16), (5003, torch.float32), (50304, torch.bfloat16)]
    for V, dtype in V_and_types:
        storage = torch.randn(3 * (V + 3), generator=generator).mul(3).to(dtype)
        logits = storage.as_strided((2, V), (V + 3, 1), 1)                              # an odd start and an odd row stride
        for k, p, m in itertools.product((None, 5, 1000), (None, 0.3, 0.999), (None, 0.02)):
            yield logits, dict(top_k=k, top_p=p, min_p=m, temperature=0.8)
        yield logits, dict(temperature=0)
        yield logits, dict(top_p=0.0)
        yield torch.zeros_like(logits[:, :V].contiguous()), dict(top_k=3)               # all tie: wider than any window
        strange = logits.clone()
        strange[0, : V // 2] = float("nan")
        strange[1] = float("-inf")
        yield strange, dict(top_k=5)
        yield strange, dict(temperature=1e-38, top_p=0.9)


@pytest.mark.parametrize("order", ORDERS)
def test_the_kernel_on_fibers_draws_what_the_cpu_sampler_draws(kernel, order, request):
    for number, (logits, filters) in enumerate(cases(request.config.getoption("--all"))):
        expected, found = on_cpu(logits, seed=number, offset=2**33, **filters), on_fibers(kernel, order, logits, seed=number, offset=2**33, **filters)
        assert found is not None, (logits.shape, filters)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), (logits.shape, logits.dtype, filters, found, expected)


def test_parameters_per_row_are_read_by_the_kernel(kernel):
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(1)) * 3
    filters = dict(temperature=torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 1.0]), top_k=torch.tensor([5, 2000, 3, 1200, 2000, 1]),
                   top_p=torch.tensor([0.5, 1.0, 0.0, 0.9, 0.7, 1.0]), min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 1.0]))
    for order in ORDERS:
        assert torch.equal(on_fibers(kernel, order, logits, seed=3, **filters)[0], on_cpu(logits, seed=3, **filters)[0])


def barriers():
    """Line numbers (from 0) of the kernel's __syncthreads()."""
    with open(KERNEL) as file:
        return [number for number, line in enumerate(file) if re.match(r"\s*__syncthreads\(\);", line)]


def is_caught(without, folder):
    """Whether some order shows that the kernel lacks the barrier on line `without`."""
    with open(KERNEL) as file:
        lines = file.readlines()
    lines[without] = re.sub(r"__syncthreads\(\);", "", lines[without])
    mutant = os.path.join(folder, "mutant.cu")
    with open(mutant, "w") as file:
        file.writelines(lines)
    library = compile_for_cpu(mutant, folder)
    for number, (logits, filters) in enumerate(cases(False)):
        expected = on_cpu(logits, seed=number, **filters)[0]
        for order in ORDERS:
            found = on_fibers(library, order, logits, seed=number, **filters)
            if found is None or not torch.equal(found[0], expected):
                return True
    return False


def test_a_missing_barrier_is_caught(tmp_path):
    after_collecting = next(line for line in barriers() if "s.candidates;" in open(KERNEL).read().splitlines()[line + 1])
    assert is_caught(after_collecting, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("line", barriers())
def test_every_missing_barrier_is_caught(line, tmp_path):
    assert is_caught(line, str(tmp_path))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow), pytest.param("sm_100", marks=pytest.mark.slow)])
def test_the_kernel_fits_its_block_without_spilling(arch, tmp_path):
    report = subprocess.run(["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch={arch}", "-Xptxas", "-v",
                             "-I", os.path.join(ROOT, "csrc"), KERNEL, "-o", str(tmp_path / "kernel.cubin")],
                            capture_output=True, text=True, check=True).stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == 3 and max(registers) <= 64, report                         # 65,536 registers / 1,024 threads
    assert re.findall(r"(\d+) bytes spill", report) == ["0"] * 6, report                # stores and loads of three kernels
    assert max(int(n) for n in re.findall(r"(\d+) bytes smem", report)) <= 24 * 1024    # two blocks fit a multiprocessor many times
