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


not_before_3_8 = pytest.mark.skipif(triton.__version__.startswith(("3.6.", "3.7.")), reason="Triton 3.6 and 3.7 get there another way")


@interpreted_only
@pytest.mark.parametrize("attribute, test", [
    ("create_dot", lambda d: test_a_dot_multiplies_numbers(d, torch.bfloat16)),
    ("cast_impl", lambda d: test_the_cast_to_bf16_rounds_to_nearest_even(d, torch.float32)),
    ("binary_op", lambda d: test_arithmetic_on_bf16_is_on_numbers(d, "multiply", EXPECTED["multiply"])),
    ("create_fma", lambda d: test_arithmetic_on_bf16_is_on_numbers(d, "fma", EXPECTED["fma"])),
    pytest.param("unary_op", lambda d: test_arithmetic_on_bf16_is_on_numbers(d, "negate", EXPECTED["negate"]),
                 marks=not_before_3_8),
    pytest.param("create_clampf", lambda d: test_arithmetic_on_bf16_is_on_numbers(d, "clamp", EXPECTED["clamp"]),
                 marks=not_before_3_8),
])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_without_its_patch_the_interpreter_is_wrong(device, monkeypatch, attribute, test):
    monkeypatch.setattr(harness.interpreter.InterpreterBuilder, attribute, harness.before_patches[attribute])
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        test(device)


# The error rule --------------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rounded(oracle, dtype):
    return oracle.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, ), (3, 1), (8, 7), (64, 100), (300, 384)])
def test_the_correctly_rounded_answer_passes_whatever_the_plain_path_did(dtype, shape):
    oracle = torch.randn(shape, dtype=torch.float64)
    out = rounded(oracle, dtype)
    for plain in (out, oracle, rounded(oracle, torch.bfloat16)):  # plain path as good as the best, exact, and worse
        harness.assert_close_to_oracle(out, oracle, plain, "forward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [1 + 5e-4, 1 - 6.5e-4])  # eps 1e-3 for 1e-5 at variance 1; N-1 for N at C=768
def test_a_scale_that_is_slightly_wrong_is_a_bias(dtype, fault):
    oracle = torch.randn(64, 768, dtype=torch.float64)
    with pytest.raises(AssertionError, match="biased|error"):
        harness.assert_close_to_oracle(rounded(oracle * fault, dtype), oracle, rounded(oracle, dtype), "forward")


def test_truncation_instead_of_rounding_is_seen():
    oracle = torch.randn(64, 64, dtype=torch.float64)
    truncated = (oracle.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(truncated, oracle, rounded(oracle, torch.bfloat16), "forward")


def test_one_wrong_element_among_many_is_seen():
    oracle = torch.randn(64, 768, dtype=torch.float64)
    out = rounded(oracle, torch.bfloat16)
    out[63, 767] += 0.1
    with pytest.raises(AssertionError, match="largest error"):
        harness.assert_close_to_oracle(out, oracle, rounded(oracle, torch.bfloat16), "forward")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_should_be_finite_is_seen(value):
    oracle = torch.randn(4, 4, dtype=torch.float64)
    out = rounded(oracle, torch.float16)
    out[2, 1] = value
    with pytest.raises(AssertionError, match=r"finite.*\(2, 1\)"):
        harness.assert_close_to_oracle(out, oracle, oracle, "gradient")


def test_an_overflow_that_the_dtype_demands_passes():
    oracle = torch.tensor([1e6, 1.0, -1e6], dtype=torch.float64)
    harness.assert_close_to_oracle(rounded(oracle, torch.float16), oracle, rounded(oracle, torch.float16), "forward")


def test_zero_must_stay_zero_when_the_plain_path_is_exact():
    oracle = torch.zeros(8, dtype=torch.float64)
    harness.assert_close_to_oracle(torch.zeros(8), oracle, torch.zeros(8), "forward")
    with pytest.raises(AssertionError, match="largest error"):
        harness.assert_close_to_oracle(torch.full((8, ), 1e-6), oracle, torch.zeros(8), "forward")


def test_a_constant_tensor_is_one_observation_not_a_bias():
    oracle = torch.full((128, 64), 1 / 3, dtype=torch.float64)
    harness.assert_close_to_oracle(rounded(oracle, torch.bfloat16), oracle, rounded(oracle, torch.bfloat16), "forward")


@pytest.mark.parametrize("shape", [(128, 1), (1, 28)], ids=["of a row", "of a column"])
def test_an_error_shared_by_a_row_or_a_column_is_one_observation(shape):
    """As many independent errors as rows, or columns; their mean is far from 0 if each element counts as one."""
    oracle = torch.randn(128, 28, dtype=torch.float64)
    for _ in range(100):
        out, plain = (oracle + 1e-3 * torch.randn(shape) for _ in range(2))
        harness.assert_close_to_oracle(out, oracle, plain, "forward", factor=10.0)
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(oracle + 1e-3 * torch.randn(shape) + 3e-3, oracle, plain, "forward", factor=10.0)


def between_two_steps(n=4096):
    """(fp64 numbers a little above 1, their mean's distance from 1, rounded): bf16 has 1, nearest to all, and then 1 + 2^-7."""
    oracle = 1 + 2**-8 * 0.3 * torch.rand(n, dtype=torch.float64)
    return oracle, float(oracle.mean()) - 1, rounded(oracle, torch.bfloat16)


def test_the_bias_of_rounding_once_is_none_of_the_kernels():
    oracle, mean, plain = between_two_steps()
    harness.assert_close_to_oracle(plain, oracle, plain, "forward")
    scattered = torch.where(torch.rand(len(oracle)) < 0.5 * mean * 2**7, 1 + 2**-7, 1.0).to(torch.bfloat16)  # half as biased
    harness.assert_close_to_oracle(scattered, oracle, plain, "forward")


def test_a_bias_against_that_of_rounding_is_seen():
    oracle, mean, plain = between_two_steps()
    up = torch.where(torch.rand(len(oracle)) < 2 * mean * 2**7, 1 + 2**-7, 1.0).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(up, oracle, plain, "forward")


@pytest.mark.parametrize("direction, allowed", [("forward", 2), ("gradient", 3)])
def test_a_bias_that_the_plain_path_has_too_is_allowed_up_to_the_factor(direction, allowed):
    """As tensor cores make it: every sum is cut off, ours and cuBLAS's, and comes out nearer to 0 than it is."""
    oracle = torch.randn(64, 768, dtype=torch.float64)
    off = lambda times: rounded(oracle * (1 - times * 4e-5), torch.float16)     # 4e-5: 50 standard errors of the rounding
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(off(1), oracle, rounded(oracle, torch.float16), direction)
    for times in (0, 1, allowed - 0.2):
        harness.assert_close_to_oracle(off(times), oracle, off(1), direction, tensor_cores=True)
    with pytest.raises(AssertionError, match="biased"):     # a CPU's sums round to nearest: nothing to share
        harness.assert_close_to_oracle(off(1), oracle, off(1), direction, tensor_cores=False)
    for times in (-1, 2 * allowed):
        with pytest.raises(AssertionError, match="biased"):
            harness.assert_close_to_oracle(off(times), oracle, off(1), direction, tensor_cores=True)


def test_a_mean_error_that_the_plain_path_has_by_chance_excuses_nothing():
    for _ in range(20):
        oracle = torch.randn(64, 768, dtype=torch.float64)
        plain, error = (1e-3 * torch.randn(64, 768, dtype=torch.float64) for _ in range(2))
        by_chance = plain - plain.mean() + 2 * plain.std() / plain.numel() ** 0.5       # two standard errors, as in one of 20 runs
        with pytest.raises(AssertionError, match="biased"):
            harness.assert_close_to_oracle(oracle + error - error.mean() + 5e-5, oracle, oracle + by_chance, "gradient", tensor_cores=True)


def test_the_plain_paths_bias_excuses_none_in_another_direction():
    oracle = torch.randn(64, 768, dtype=torch.float64)
    plain, up = rounded(oracle * (1 - 4e-5), torch.float16), rounded(oracle + 4e-5, torch.float16)     # towards 0, and all greater
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(up, oracle, plain, "forward", tensor_cores=True)


def test_what_rounding_a_stored_intermediate_once_makes_is_explained_and_no_more():
    """Cross-entropy's gradient from softmax - 1 in bf16, beside PyTorch's from (softmax - 1) / N, whose bias has the other sign."""
    rows, V, C, N = 2048, 2003, 64, 1755        # 1/1755 lies where bf16 rounds (softmax - 1) / N towards 0
    x, weight = torch.randn(rows, C).bfloat16().double(), (torch.randn(V, C) / 8).bfloat16().double()
    targets = torch.randint(V, (rows,))
    dlogits = torch.softmax(x @ weight.t(), 1)
    dlogits[torch.arange(rows), targets] -= 1
    dlogits[N:] = 0
    exact = dlogits @ weight / N
    stored = rounded(dlogits, torch.bfloat16).double() @ weight / N
    plain = rounded(rounded(dlogits / N, torch.bfloat16).double() @ weight, torch.bfloat16)
    ours = rounded(stored, torch.bfloat16)
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(ours, exact, plain, "gradient")
    harness.assert_close_to_oracle(ours, exact, plain, "gradient", stored=stored)
    with pytest.raises(AssertionError, match="biased"):
        harness.assert_close_to_oracle(rounded(stored * (1 + 5e-4), torch.bfloat16), exact, plain, "gradient", stored=stored)


def test_of_several_explanations_each_explains_its_bias_and_all_together_no_more():
    oracle = torch.randn(64, 768, dtype=torch.float64)
    off = lambda by: rounded(oracle * (1 + by), torch.float16)      # by 4e-5: 50 standard errors of the rounding
    exact_sums, truncated, too_large = oracle, oracle * (1 - 4e-5), oracle * (1 + 4e-5)

    def check(by, *stored):
        harness.assert_close_to_oracle(off(by), oracle, off(0), "gradient", stored=stored)
    with pytest.raises(AssertionError, match="biased"):
        check(-4e-5, exact_sums)
    for by in (0, -2e-5, -4e-5):
        check(by, exact_sums, truncated), check(by, truncated, exact_sums)
    for by in (-4e-5, 4e-5):
        check(by, truncated, too_large)
    for by, *stored in ((4e-5, exact_sums, truncated), (-8e-5, exact_sums, truncated), (8e-5, truncated, too_large), (4e-5,)):
        with pytest.raises(AssertionError, match="biased"):
            check(by, *stored)


@pytest.mark.parametrize("tensor_cores", (False, True))
@pytest.mark.parametrize("N", (256, 300, 340, 700))
def test_a_gradient_divided_by_one_row_too_many_is_seen(N, tensor_cores):
    """PyTorch's bias is as large at N = 300; it excuses nothing where what is stored is said."""
    V, C = 1003, 64
    x, weight = torch.randn(N, C).bfloat16().double(), (torch.randn(V, C) / 8).bfloat16().double()
    dlogits = torch.softmax(x @ weight.t(), 1)
    dlogits[torch.arange(N), torch.randint(V, (N,))] -= 1
    exact, stored = dlogits @ weight / N, rounded(dlogits, torch.bfloat16).double() @ weight / N
    plain = rounded(rounded(dlogits / N, torch.bfloat16).double() @ weight, torch.bfloat16)
    options = dict(stored=stored, tensor_cores=tensor_cores)
    harness.assert_close_to_oracle(rounded(stored, torch.bfloat16), exact, plain, "gradient", **options)
    for wrong in (N + 1, N - 1):
        with pytest.raises(AssertionError, match="biased"):
            harness.assert_close_to_oracle(rounded(stored * N / wrong, torch.bfloat16), exact, plain, "gradient", **options)


def test_false_alarms_are_rare():
    for _ in range(200):  # two paths of equal quality and different luck
        oracle = torch.randn(int(torch.randint(1, 40, ())), int(torch.randint(1, 40, ())), dtype=torch.float64)
        out, plain = (rounded(oracle * (1 + 1e-3 * torch.randn_like(oracle)), torch.bfloat16) for _ in range(2))
        harness.assert_close_to_oracle(out, oracle, plain, "forward")


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
