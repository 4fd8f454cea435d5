"""The harness is checked first: each patch of the interpreter is needed and right, and each check sees the fault it is for."""
import subprocess
import sys
import types
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

interpreted_only = pytest.mark.skipif(not harness.INTERPRETED, reason="a GPU needs no patch")


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision="ieee"))


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr, OP: tl.constexpr):
    offs = tl.arange(0, N)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    if OP == "add":
        c = a + b
    elif OP == "multiply":
        c = a * b
    elif OP == "negate":
        c = -a
    elif OP == "fma":
        c = tl.fma(a, b, a)
    elif OP == "where":
        c = tl.where(a > b, a, b)
    elif OP == "clamp":
        c = tl.clamp(a, b, b + 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(c_ptr + offs, c)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs + SHIFT, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _running_maximum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    value = tl.load(x_ptr + tl.program_id(0))
    tl.store(y_ptr + tl.program_id(0), value + tl.load(y_ptr + tl.maximum(tl.program_id(0) - 1, 0)))


@triton.jit
def _last_writer_kernel(y_ptr):
    tl.store(y_ptr, ((tl.program_id(0) * 3 + tl.program_id(1)) * 2 + tl.program_id(2)).to(tl.float32))


def cast(x, dtype):
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    _cast_kernel[(1, )](x, y, N=x.numel())
    return y


def copy(x, shift=0, n=None):
    y = torch.empty_like(x)
    n = x.numel() if n is None else n
    _copy_kernel[(triton.cdiv(x.numel(), 16), )](x, y, n, SHIFT=shift, BLOCK=16)
    return y


# Where truncation and rounding differ: ties both ways, a carry into the exponent, infinities, subnormals, the largest.
EDGES = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1.99999, 0.0, -0.0, float("inf"), -float("inf"), 1e-40, 3.4028e38, -2.7182818,
                      65504.0, 1e-3, 0.1, 0.2, 0.3, 7.0])


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32])
def test_the_cast_to_bf16_rounds_to_nearest_even(device, source):
    x = torch.cat([EDGES, torch.randn(240) * 100]).to(device)
    x = x.nan_to_num(0, 1000, -1000).clamp(-1e6, 1e6).to(source) if source == torch.int32 else x.to(source)
    assert harness.same_bits(cast(x, torch.bfloat16), x.to(torch.bfloat16))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.int32])
def test_the_cast_from_bf16_is_exact(device, target):
    x = (torch.randn(256, device=device) * 100).to(torch.bfloat16)
    assert harness.same_bits(cast(x, target), x.to(target))


def test_nan_survives_the_cast_to_bf16(device):
    x = torch.full((16, ), float("nan"), device=device)
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000] * 4, dtype=torch.int32)  # rounding could carry to inf or 0
    x.view(torch.int32).copy_(payloads)
    assert cast(x, torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dot_multiplies_numbers(device, dtype):
    a, b = torch.randn(2, 16, 16, device=device).to(dtype)
    c = torch.zeros(16, 16, device=device)
    _dot_kernel[(1, )](a, b, c, N=16)
    torch.testing.assert_close(c, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


EXPECTED = {
    "add": lambda a, b: a + b, "multiply": lambda a, b: a * b, "negate": lambda a, b: -a, "where": torch.maximum,
    "fma": lambda a, b: (a.float() * b.float() + a.float()).to(a.dtype), "clamp": lambda a, b: torch.clamp(a, b, b + 1),
}


@pytest.mark.parametrize("op, expected", EXPECTED.items())
def test_arithmetic_on_bf16_is_on_numbers(device, op, expected):
    a, b = torch.randn(2, 64, device=device).to(torch.bfloat16)
    c = torch.zeros_like(a)
    _arithmetic_kernel[(1, )](a, b, c, N=64, OP=op)
    torch.testing.assert_close(c, expected(a, b), rtol=0, atol=0)


@interpreted_only
def test_a_sum_of_bf16_is_refused(device):
    with pytest.raises(Exception, match="Widen to fp32"):
        _sum_kernel[(1, )](torch.ones(16, dtype=torch.bfloat16), torch.zeros(1), N=16)


def not_in(*versions):
    return pytest.mark.skipif(triton.__version__.startswith(versions), reason="this version of Triton gets there another way")


@interpreted_only
@pytest.mark.parametrize("attribute, test", [
    ("create_dot", lambda d: test_a_dot_multiplies_numbers(d, torch.bfloat16)),
    ("cast_impl", lambda d: test_the_cast_to_bf16_rounds_to_nearest_even(d, torch.float32)),
    ("binary_op", lambda d: test_arithmetic_on_bf16_is_on_numbers(d, "multiply", EXPECTED["multiply"])),
    ("create_fma", lambda d: test_arithmetic_on_bf16_is_on_numbers(d, "fma", EXPECTED["fma"])),
    pytest.param("unary_op", lambda d: test_arithmetic_on_bf16_is_on_numbers(d, "negate", EXPECTED["negate"]),
                 marks=not_in("3.6.", "3.7.")),
    pytest.param("create_clampf", lambda d: test_arithmetic_on_bf16_is_on_numbers(d, "clamp", EXPECTED["clamp"]),
                 marks=not_in("3.6.", "3.7.", "3.8.")),
])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_without_its_patch_the_interpreter_is_wrong(device, monkeypatch, attribute, test):
    monkeypatch.setattr(harness.interpreter.InterpreterBuilder, attribute, harness.before_patches[attribute])
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        test(device)


# Memory ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32])
def test_a_kernel_that_writes_everything_passes(device, dtype):
    x = (torch.randn(40, device=device) * 100).to(dtype)
    with harness.guarded_outputs() as allocations:
        assert harness.same_bits(copy(x), x)
    assert len(allocations.made) == 1


def test_an_element_never_written_is_seen(device):
    with pytest.raises(AssertionError, match="never written"), harness.guarded_outputs():
        copy(torch.randn(40, device=device), n=39)


def test_scratch_memory_may_stay_empty_where_a_test_says_so(device):
    with harness.guarded_outputs(all_written=False):
        copy(torch.randn(40, device=device), n=39)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_store_out_of_bounds_is_seen(device, shift):
    with pytest.raises(AssertionError, match="outside an output"), harness.guarded_outputs(all_written=False):
        copy(torch.randn(48, device=device), shift=shift)


@pytest.mark.parametrize("allocate", [lambda x: torch.empty(4, 8, dtype=x.dtype), lambda x: torch.empty_like(x.T),
                                      lambda x: x.new_empty(4, 8), lambda x: torch.empty_strided((4, 8), (1, 4))])
def test_every_way_to_allocate_is_poisoned(allocate):
    with harness.guarded_outputs(all_written=False) as allocations:
        assert harness.is_poison(allocate(torch.zeros(4, 8))).all()
    assert len(allocations.made) == 1
    assert torch.empty is harness._real_empty


def test_margins_keep_values_and_strides():
    x = torch.randn(6, 8, 4)
    for view in (x, x.transpose(0, 2), x[:, 2:5], x[1].expand(3, 8, 4), x[:0]):
        copied = harness.with_nan_margins(view)
        assert harness.same_bits(copied, view) and copied.stride() == view.stride()
    inside = harness.with_nan_margins(x[:, 2:5])
    assert inside.as_strided((6, 8, 4), (32, 4, 1), inside.storage_offset())[:5, 3:].isnan().all()  # the gaps between rows


def test_a_load_out_of_bounds_reads_nan(device):
    x = harness.with_nan_margins(torch.randn(16, device=device))
    y = torch.zeros(16, device=device)
    _copy_kernel[(1, )](x.as_strided((16, ), (1, ), x.storage_offset() + 1), y, 16, SHIFT=0, BLOCK=16)
    assert y[15].isnan() and y[:15].isfinite().all()


# Grid order ------------------------------------------------------------------------------------------------------------------


def test_independent_programs_pass_in_any_order(device):
    x = torch.randn(100, device=device)
    harness.assert_grid_order_is_free(lambda: copy(x))


@interpreted_only
def test_a_kernel_that_reads_its_neighbours_result_is_seen():
    x = torch.randn(16)

    def run():
        y = torch.zeros(16)
        _running_maximum_kernel[(16, )](x, y, BLOCK=1)
        return y

    with pytest.raises(AssertionError, match="depends on the order"):
        harness.assert_grid_order_is_free(run)


@interpreted_only
@pytest.mark.parametrize("order", ["ascending", "reversed", "shuffled"])
def test_two_programs_that_store_to_one_address_are_seen(order):
    x, y = torch.ones(32), torch.zeros(64)
    with pytest.raises(AssertionError, match=r"^_last_writer_kernel: programs 0 and 1 store to"), harness.grid_order(order):
        _copy_kernel[(1, )](x, y, 32, SHIFT=0, BLOCK=32)
        _copy_kernel[(2, )](x, y, 32, SHIFT=0, BLOCK=16)  # two launches may store to one address, two programs may not
        _last_writer_kernel[(2, )](y)


@interpreted_only
def test_programs_run_in_the_order_asked_for():
    seen = []
    for order in ("ascending", "reversed"):
        y = torch.zeros(1)
        with pytest.raises(AssertionError, match="same address"), harness.grid_order(order):
            _last_writer_kernel[(2, 3, 2)](y)
        seen.append(y.item())
    assert seen == [11.0, 0.0]


# Addresses and parameters ----------------------------------------------------------------------------------------------------


@interpreted_only
def test_the_addresses_of_a_program_far_out_are_seen():
    x, y = torch.zeros(1), torch.zeros(1)
    with harness.addresses_of_one_program((1000, ), (1001, )) as seen:
        _copy_kernel[(1, )](x, y, 16 * 1000 + 4, SHIFT=3, BLOCK=16)
    (load, loaded), (store, stored) = seen
    assert (load, store) == ("load", "store")
    assert loaded.tolist() == [x.data_ptr() + 4 * (16000 + i) for i in range(4)]
    assert stored.tolist() == [y.data_ptr() + 4 * (16003 + i) for i in range(4)]
    assert harness.same_bits(copy(torch.ones(3)), torch.ones(3))  # and everything is as before


def test_pairwise_holds_every_pair_in_few_cases():
    dimensions = [range(5), range(4), range(3), range(2)]
    cases = harness.pairwise(*dimensions)
    for i in range(4):
        for j in range(i):
            assert {(case[i], case[j]) for case in cases} == {(a, b) for a in dimensions[i] for b in dimensions[j]}
    assert len(cases) <= 25  # of 120; no fewer than 20 can do


# Planted faults --------------------------------------------------------------------------------------------------------------

SOURCE = '''
import torch, triton
import triton.language as tl
@triton.jit
def _double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) * 2.0, mask=offs < n)
def double(x):
    y = torch.empty_like(x)
    _double_kernel[(1,)](x, y, x.numel(), BLOCK=64)
    return y
'''


@pytest.fixture
def doubling(tmp_path):
    path = Path(tmp_path, "doubling.py")
    path.write_text(SOURCE)
    module = types.ModuleType("doubling")
    module.__file__ = str(path)
    exec(compile(SOURCE, path, "exec"), vars(module))
    return module


def test_a_planted_fault_acts_inside_and_is_gone_outside(device, doubling):
    x = torch.randn(40, device=device)
    with harness.planted_fault(doubling, r"\* 2\.0", "* 3.0") as mutant:
        assert torch.equal(doubling.double(x), x * 3) and doubling.double is mutant.double
    assert torch.equal(doubling.double(x), x * 2)


def test_a_fault_that_changes_nothing_is_an_error(doubling):
    with pytest.raises(ValueError, match="applies 0 times"), harness.planted_fault(doubling, "no such line", ""):
        pass


def test_a_fault_that_no_check_sees_is_an_error(device, doubling):
    def check():
        assert doubling.double(torch.ones(4, device=device)).shape == (4, )

    with pytest.raises(AssertionError, match="no check saw"):
        harness.assert_fault_is_seen(doubling, r"\* 2\.0", "* 3.0", check)


def test_a_narrow_mask_is_seen_by_the_poison(device, doubling):
    def check():
        with harness.guarded_outputs():
            doubling.double(torch.ones(40, device=device))

    harness.assert_fault_is_seen(doubling, r"mask=offs < n\)\n", "mask=offs < n - 1)\n", check)


def test_same_bits_tells_zeros_and_nans_apart():
    assert harness.same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not harness.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not harness.same_bits(torch.tensor([0.0]), torch.tensor([0.0], dtype=torch.float64))


def test_the_poison_is_nan_in_every_float_type():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        with harness.guarded_outputs(all_written=False):
            assert torch.empty(3, dtype=dtype).isnan().all()
    assert np.isnan(harness.bf16_to_fp32(np.uint16(harness.POISON[torch.bfloat16][1])))


@interpreted_only
def test_a_program_that_is_no_test_computes_bf16_in_the_interpreter_too():
    code = """if True:
        import torch
        from nanogpt_fast import backend
        from nanogpt_fast.ops import attention
        torch.manual_seed(0)
        qkv = torch.randn(1, 9, 48).bfloat16()
        y, plain = (attention.causal_attention_qkvpacked(qkv, 2, backend=backend.parse(name)) for name in ("fused", "reference"))
        print(((y - plain).float().norm() / plain.float().norm()).item())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2**-7
