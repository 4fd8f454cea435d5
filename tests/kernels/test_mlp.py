"""The MLP kernels alone, each against fp64: matmul with activation, its backward, and the two pointwise ones.

The plain path is PyTorch's own sequence in the kernel's dtype: linear with bias, activation, and their autograd.
"""
import contextlib

import harness
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import (assert_close_to_oracle, assert_fault_is_seen, assert_grid_order_is_free, guarded_outputs, pairwise,
                     same_bits, with_nan_margins)
from hypothesis import HealthCheck, given, settings, strategies as st
from nanogpt_fast.kernels import dropout, fastest, mlp

from nanogpt_fast.checks.error_rule import in_order
from nanogpt_fast.reference import activation as plain_activation

ROWS = (1, 2, 31, 64, 65, 127, 128, 129, 200)
WIDTHS = (1, 7, 32, 100)                        # on a GPU also the models' own
MODEL_WIDTHS = (384, 768, 1600)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
BIASES = (None, "same", torch.float32)          # fp32 is a master copy beside half-precision operands
SMALL_TILE = fastest.Tile(16, 64, 16, 4, 2)               # several tiles each way at little cost, with tails, in SMALL = (M, K, N)
SMALL = (17, 20, 70)


def act(x, name):
    return x if name == "none" else plain_activation(x, name)


def draw(*shape, dtype, scale=1.0):
    return with_nan_margins((torch.randn(*shape, device=harness.DEVICE) * scale).to(dtype))


def draw_bias(kind, n, dtype):
    return None if kind is None else draw(n, dtype=dtype if kind == "same" else kind)


def low(b, dtype):
    return None if b is None else b.to(dtype)


def check_linear_act(M, K, N, name, dtype, bias, tile=None):
    """Forward, in both forms. h has a standard deviation of 2, so that both tails of the activation are met."""
    x, w, b = draw(M, K, dtype=dtype), draw(N, K, dtype=dtype, scale=2 / K**0.5), draw_bias(bias, N, dtype)
    exact = F.linear(x.double(), w.double(), low(b, torch.float64))
    plain = F.linear(x, w, low(b, dtype))
    summed = in_order(K, F.linear(x.double().square(), w.double().square()), exact)     # act' is about 1 at most
    with guarded_outputs():
        y, h = mlp.linear_act(x, w, b, activation=name, tile=tile)
        alone, none = mlp.linear_act(x, w, b, activation=name, keep_h=False, tile=tile)
    assert_close_to_oracle(h, exact, plain, "forward", summed=summed, what="h")
    # PyTorch's sequence rounds h first, and act of a rounded h is biased. The epilogue doesn't, and is held to a path that doesn't.
    once = act(F.linear(x.float(), w.float(), low(low(b, dtype), torch.float32)), name).to(dtype)
    assert_close_to_oracle(y, act(exact, name), once, "forward", summed=summed, what="act(h)")
    assert none is None and same_bits(alone, y), "at inference the result differs from training's"

    h = with_nan_margins(F.linear(x, w))
    with guarded_outputs():
        y = mlp.act(h, b, activation=name)
    exact = h.double() if b is None else h.double() + b.double()
    plain = h if b is None else h + low(b, dtype)
    assert_close_to_oracle(y, act(exact, name), act(plain, name), "forward", what="act(h + b), pointwise")


def gradients(dpost, h, b, name):
    """(dh, db) in the precision of the arguments; db is summed in that of dh or in fp32, whichever is more."""
    h = (h if b is None else h + b).detach().requires_grad_()
    act(h, name).backward(dpost)
    return h.grad, h.grad.sum(0, dtype=torch.promote_types(h.dtype, torch.float32))


def check_dact(M, K, N, name, dtype, bias, tile=None):
    """Backward, in both forms."""
    dy, w = draw(M, K, dtype=dtype), draw(K, N, dtype=dtype, scale=K**-0.5)
    h, b = draw(M, N, dtype=dtype, scale=2.0), draw_bias(bias, N, dtype)
    dpost = with_nan_margins(dy @ w)
    runs = {"epilogue": (lambda **want: mlp.linear_dact(dy, w, h, b, activation=name, tile=tile, **want),
                         dy.double() @ w.double(), dy.double().square() @ w.double().square()),
            "pointwise": (lambda **want: mlp.dact(dpost, h, b, activation=name, **want), dpost.double(), None)}
    plain_dh, plain_db = gradients(dpost, h, low(b, dtype), name)
    for form, (run, dpost_exact, squares) in runs.items():
        with guarded_outputs():
            dh, post, db = run(want_post=True)
            lean, none, no_db = run(want_db=False)
        exact_dh, exact_db = gradients(dpost_exact, h.double(), low(b, torch.float64), name)
        summed = None if squares is None else in_order(K, squares, dpost_exact)
        assert_close_to_oracle(dh, exact_dh, plain_dh, "gradient", summed=summed, what=f"dh, {form}")
        summed = in_order(M, exact_dh.square().sum(0), exact_db)
        assert_close_to_oracle(db, exact_db, plain_db, "gradient", summed=summed, what=f"db, {form}")
        exact = h.double() if b is None else h.double() + b.double()
        plain_post = act(h if b is None else h + low(b, dtype), name)
        assert_close_to_oracle(post, act(exact, name), plain_post, "forward", what=f"post, {form}")
        assert none is None and no_db is None and same_bits(lean, dh), f"{form}: what is wanted beside dh changes dh"


PAIRS = pairwise(ROWS, WIDTHS, ACTIVATIONS, DTYPES, BIASES)


@pytest.mark.parametrize("M, C, name, dtype, bias", PAIRS, ids=str)
def test_forward_is_as_near_to_fp64_as_pytorch(M, C, name, dtype, bias):
    check_linear_act(M, C, 4 * C, name, dtype, bias)


@pytest.mark.parametrize("M, C, name, dtype, bias", PAIRS, ids=str)
def test_backward_is_as_near_to_fp64_as_pytorch(M, C, name, dtype, bias):
    check_dact(M, C, 4 * C, name, dtype, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", (check_linear_act, check_dact))
def test_tiles_in_every_direction_with_tails(check, dtype):
    check(*SMALL, "gelu", dtype, "same", tile=SMALL_TILE)


@pytest.mark.slow
@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", BIASES, ids=str)
def test_every_combination(M, C, name, dtype, bias):
    check_linear_act(M, C, 4 * C, name, dtype, bias)
    check_dact(M, C, 4 * C, name, dtype, bias)


@pytest.mark.slow
@pytest.mark.parametrize("C", MODEL_WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_widths_of_gpt2(C, dtype):
    M = 65 if harness.INTERPRETED else 4096
    check_linear_act(M, C, 4 * C, "gelu", dtype, torch.float32)
    check_dact(M, C, 4 * C, "gelu", dtype, torch.float32)


@settings(max_examples=harness.examples(100, 8), deadline=None, derandomize=False,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 150), st.integers(1, 70), st.integers(1, 150), st.sampled_from(ACTIVATIONS), st.sampled_from(DTYPES),
       st.sampled_from(BIASES), st.sampled_from((None, SMALL_TILE)))
def test_any_shape(M, K, N, name, dtype, bias, tile):
    check_linear_act(M, K, N, name, dtype, bias, tile)
    check_dact(M, K, N, name, dtype, bias, tile)


# ------------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype):
    x, w, b = draw(0, 8, dtype=dtype), draw(32, 8, dtype=dtype), draw(32, dtype=dtype)
    y, h = mlp.linear_act(x, w, b)
    assert y.shape == h.shape == mlp.act(h, b).shape == (0, 32)
    for dh, post, db in (mlp.linear_dact(x, w.t().contiguous(), h, want_post=True), mlp.dact(h, h, b, want_post=True)):
        assert dh.shape == post.shape == (0, 32) and same_bits(db, torch.zeros(32, device=harness.DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_values_and_zeros(name, dtype):
    """+-1e4 and fp16's largest: no inf or nan where PyTorch has none; rows of equal values; zero is where ReLU has its kink."""
    values = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 6.0, -6.0, 1e4, -1e4, 6e4, -6e4], device=harness.DEVICE)
    h = values[:, None].expand(-1, 40).to(dtype).contiguous()
    assert_close_to_oracle(mlp.act(h, activation=name), act(h.double(), name), act(h, name), "forward")
    dpost = torch.ones_like(h)
    dh, _, _ = mlp.dact(dpost, h, activation=name)
    exact, _ = gradients(dpost.double(), h.double(), None, name)
    plain, _ = gradients(dpost, h, None, name)
    assert_close_to_oracle(dh, exact, plain, "gradient")


def test_nan_stays_nan_as_in_pytorch():
    h = torch.full((1, 8), float("nan"), device=harness.DEVICE)
    for name in ACTIVATIONS:
        assert mlp.act(h, activation=name).isnan().all()


def test_rows_that_lie_apart_are_read_as_they_lie():
    wide = draw(37, 100, dtype=torch.bfloat16)
    x, w = wide[:, 20:60], draw(64, 40, dtype=torch.bfloat16)
    assert same_bits(mlp.linear_act(x, w)[0], mlp.linear_act(x.contiguous(), w)[0])
    h = draw(37, 64, dtype=torch.bfloat16)
    v = draw(40, 64, dtype=torch.bfloat16)
    assert same_bits(mlp.linear_dact(x, v, h)[0], mlp.linear_dact(x.contiguous(), v, h)[0])


def test_the_sum_over_rows_alone_is_the_bias_gradient_without_an_activation():
    dy = draw(300, 70, dtype=torch.bfloat16)
    with guarded_outputs():
        dh, post, db = mlp.dact(dy, activation="none", want_dh=False)
    assert dh is None and post is None
    assert_close_to_oracle(db, dy.double().sum(0), dy.float().sum(0), "gradient")


def test_abramowitz_and_stegun_is_no_worse_than_exact_erf_in_half_precision():
    h = torch.linspace(-9, 9, 20001, device=harness.DEVICE).to(torch.bfloat16)[None]
    error = (mlp.act(h).double() - F.gelu(h.double())).abs()
    assert error.max() <= (F.gelu(h).double() - F.gelu(h.double())).abs().max()


@pytest.mark.parametrize("call, error, message", [
    (lambda x, w: mlp.linear_act(x, w[:, :-1]), ValueError, r"w has shape \(16, 7\); expected \(16, 8\)"),
    (lambda x, w: mlp.linear_act(x, w.float()), TypeError, "w is torch.float32; expected torch.bfloat16"),
    (lambda x, w: mlp.linear_act(x, w, w[0]), ValueError, r"b has shape \(8,\); expected \(16,\)"),
    (lambda x, w: mlp.linear_act(x.t(), w[:, :4].contiguous()), ValueError, "x has strides .* expected neighbouring columns"),
    (lambda x, w: mlp.linear_act(x, w, activation="swish"), ValueError, "activation is 'swish'"),
    (lambda x, w: mlp.linear_act(x, w, dropout_p=0.5), ValueError, "seed must be"),
    (lambda x, w: mlp.act(x, dropout_p=1.5), ValueError, "the dropout probability is 1.5"),
    (lambda x, w: mlp.act(x.double()), TypeError, "the input is torch.float64"),
    (lambda x, w: mlp.act(x.t()), ValueError, "h has strides .* expected a contiguous tensor"),
    (lambda x, w: mlp.dact(x), ValueError, "expected no h for 'none'"),
    (lambda x, w: mlp.dact(x, activation="none", want_post=True), ValueError, "want_post needs h"),
    (lambda x, w: mlp.linear_dact(x, w.t().contiguous(), x), ValueError, r"h has shape \(4, 8\); expected \(4, 16\)"),
])
def test_launchers_name_the_argument_that_is_wrong(call, error, message):
    x, w = draw(4, 8, dtype=torch.bfloat16), draw(16, 8, dtype=torch.bfloat16)
    with pytest.raises(error, match=message):
        call(x, w)


# ----------------------------------------------------------------------------------------------------------------- dropout


def seed_tensor(value):
    return torch.tensor([value], dtype=torch.int64, device=harness.DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", (7, 64, 150))
def test_dropout_keeps_what_the_mask_says_in_every_kernel(dtype, N):
    M, K, p, seed = 37, 20, 0.3, seed_tensor(2**40 + 5)
    keep = dropout.row_mask(seed, M, N, p).to(harness.DEVICE)
    x, w, b = draw(M, K, dtype=dtype), draw(N, K, dtype=dtype, scale=K**-0.5), draw(N, dtype=torch.float32)
    h = F.linear(x, w)
    exact = torch.where(keep, F.linear(x.double(), w.double(), b.double()) / (1 - p), 0)
    plain = torch.where(keep, F.linear(x, w, b.to(dtype)) / (1 - p), 0)
    for what, run in {
            "epilogue": lambda: mlp.linear_act(x, w, b, activation="none", keep_h=False, dropout_p=p, seed=seed)[0],
            "epilogue, other tile": lambda: mlp.linear_act(x, w, b, activation="none", dropout_p=p, seed=seed,
                                                           tile=SMALL_TILE)[0],
            "pointwise": lambda: mlp.act(h, b, activation="none", dropout_p=p, seed=seed)}.items():
        with guarded_outputs():
            y = run()
        # A value may round to 0 by itself only in fp16 and bf16, and none here is that small.
        assert torch.equal(y != 0, keep), f"{what}: not the mask"
        assert_close_to_oracle(y, exact, plain, "forward", what=what)
    with guarded_outputs():
        dh, _, db = mlp.dact(h, activation="none", dropout_p=p, seed=seed)
    exact = torch.where(keep, h.double() / (1 - p), 0)
    assert_close_to_oracle(dh, exact, torch.where(keep, h / (1 - p), 0), "gradient", what="backward")
    assert_close_to_oracle(db, exact.sum(0), torch.where(keep, h / (1 - p), 0).float().sum(0), "gradient", what="db")


def test_dropout_before_an_activation_gradient_uses_the_forward_mask():
    p, seed, h, dy = 0.4, seed_tensor(11), draw(20, 50, dtype=torch.float32), draw(20, 50, dtype=torch.float32)
    keep = (mlp.act(h, activation="gelu", dropout_p=p, seed=seed) != 0)
    dh, _, _ = mlp.dact(dy, h, activation="gelu", dropout_p=p, seed=seed)
    exact, _ = gradients(torch.where(keep, dy.double() / (1 - p), 0), h.double(), None, "gelu")
    plain, _ = gradients(torch.where(keep, dy / (1 - p), 0), h, None, "gelu")
    assert_close_to_oracle(dh, exact, plain, "gradient")


def test_the_kept_fraction_and_different_seeds():
    ones, p = torch.ones(128, 512, device=harness.DEVICE), 0.2
    first, second = (mlp.act(ones, activation="none", dropout_p=p, seed=seed_tensor(s)) != 0 for s in (1, 2))
    n = ones.numel()
    for kept in (first, second):
        assert abs(int(kept.sum()) - n * (1 - p)) < 4 * (n * p * (1 - p))**0.5
    agree = int((first == second).sum())        # independent masks agree with probability (1 - p)^2 + p^2
    same = (1 - p)**2 + p**2
    assert abs(agree - n * same) < 4 * (n * same * (1 - same))**0.5


def test_all_dropped_is_zero():
    assert not mlp.act(torch.ones(3, 9, device=harness.DEVICE), activation="none", dropout_p=1.0, seed=seed_tensor(1)).any()


# ------------------------------------------------------------------------------------------------ programs and addresses


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_order_of_programs_changes_no_bit(dtype):
    M, K, N = SMALL
    x, w, b = draw(M, K, dtype=dtype), draw(N, K, dtype=dtype), draw(N, dtype=dtype)
    h, dy, v, seed = draw(M, N, dtype=dtype), draw(M, K, dtype=dtype), draw(K, N, dtype=dtype), seed_tensor(3)
    tall = draw(20, 300, dtype=dtype)
    assert_grid_order_is_free(lambda: mlp.linear_act(x, w, b, dropout_p=0.1, seed=seed, tile=SMALL_TILE))
    assert_grid_order_is_free(lambda: mlp.linear_dact(dy, v, h, want_post=True, tile=SMALL_TILE))
    assert_grid_order_is_free(lambda: mlp.act(tall, dropout_p=0.1, seed=seed))
    assert_grid_order_is_free(lambda: mlp.dact(tall, tall, dropout_p=0.1, seed=seed, want_post=True, rows=16))


@contextlib.contextmanager
def only_program(number):
    """Inside, a launch runs this one program; loads give zeros and stores nothing. Yields the addresses that were stored to."""
    from triton.runtime import interpreter
    builder, real = interpreter.InterpreterBuilder, {}
    stored = []

    def set_grid_idx(self, x, y, z):
        self.grid_dim = (number + 1, 1, 1)
        real["set_grid_idx"](self, number, 0, 0)

    def load(self, ptrs, mask, other, *rest):
        element = ptrs.get_element_ty()
        return interpreter.TensorHandle(np.zeros(ptrs.data.shape, interpreter._get_np_dtype(element)), element)

    def store(self, ptrs, value, mask, *rest):
        stored.append(ptrs.data[mask.data])

    for name, replacement in (("set_grid_idx", set_grid_idx), ("create_masked_load", load), ("create_masked_store", store)):
        real[name] = getattr(builder, name)
        setattr(builder, name, replacement)
    try:
        yield stored
    finally:
        for name, original in real.items():
            setattr(builder, name, original)


@pytest.mark.skipif(not harness.INTERPRETED, reason="looks at addresses in the interpreter; the GPU runs the same arithmetic")
def test_offsets_pass_two_to_the_31():
    """The last rows of (2^24, 3072): 5e10 elements, 1e11 bytes. The addresses are looked at; the memory isn't there."""
    M, N, K, base = 2**24, 3072, 64, torch.zeros(1, dtype=torch.bfloat16)
    bits = dict(ACTIVATION="gelu", EXACT=False)
    block_m, block_n, _ = mlp.POINTWISE_TILE
    rows = 2 * block_m
    out = torch.zeros(1, dtype=torch.bfloat16)
    expected_last = out.data_ptr() + 2 * (M * N - 1)
    tile = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64)
    launches = (
        (mlp._linear_act_kernel, (base, base, None, None, out, None, 0.0, M, N, K, K), dict(DROPOUT=False, **tile),
         M // 128 * (N // 128)),
        (mlp._linear_dact_kernel, (base, base, base, None, out, None, None, M, N, K, K), tile, M // 128 * (N // 128)),
        (mlp._act_kernel, (base, None, out, None, 0.0, M, N), dict(DROPOUT=False, BLOCK_M=block_m, BLOCK_N=block_n),
         M // block_m * (N // block_n)),
        (mlp._dact_kernel, (base, base, None, out, None, None, None, 0.0, M, N, rows),
         dict(DROPOUT=False, BLOCK_M=block_m, BLOCK_N=block_n), M // rows * (N // block_n)))
    for kernel, args, constants, programs in launches:
        with only_program(programs - 1) as stored:
            kernel[(1,)](*args, **bits, **constants)
        addresses = np.concatenate([a.ravel() for a in stored])
        assert addresses.max() == expected_last, kernel.__name__
        assert addresses.min() >= expected_last - 2 * 128 * N, kernel.__name__


# ---------------------------------------------------------------------------------------------------------- planted faults


def check_forward():
    check_linear_act(*SMALL, "gelu", torch.float32, "same", tile=SMALL_TILE)


def check_backward():
    check_dact(*SMALL, "gelu", torch.float32, "same", tile=SMALL_TILE)


def check_half():
    check_linear_act(*SMALL, "gelu", torch.bfloat16, "same", tile=SMALL_TILE)


def check_half_backward():
    check_dact(*SMALL, "gelu", torch.bfloat16, "same", tile=SMALL_TILE)


def check_rounding():
    check_linear_act(257, 100, 400, "gelu", torch.bfloat16, None)      # 10 standard errors: a bias is one from 6 on


def check_tanh():
    check_dact(*SMALL, "gelu_tanh", torch.bfloat16, None, tile=SMALL_TILE)


def check_dropout():
    test_dropout_keeps_what_the_mask_says_in_every_kernel(torch.bfloat16, 64)


def check_column_sums():
    """Each program walks three tiles of rows."""
    dy = torch.randn(50, 40, device=harness.DEVICE)
    _, _, db = mlp.dact(dy, activation="none", want_dh=False, rows=3 * mlp.POINTWISE_TILE[0])
    assert_close_to_oracle(db, dy.double().sum(0), dy.sum(0), "gradient")


# name: (pattern, replacement, check that must fail, how often the pattern occurs)
FAULTS = {
    "bias forgotten in the forward":
        (r"h \+= (tl\.load\(b_ptr.*)(\n    if h_ptr)", r"h += 0.0 * \1\2", check_half, 1),
    "bias forgotten in the epilogue's backward":
        (r"h \+= (tl\.load\(b_ptr.*)(\n    post)", r"h += 0.0 * \1\2", check_half_backward, 1),
    "bias forgotten in the pointwise backward":
        (r"h \+= b\[None, :\]", "h += 0.0 * b[None, :]", check_half_backward, 1),
    "GELU' without x phi(x)":
        (r"cdf \+ x \* e \* INV_SQRT_2PI", "cdf", check_half_backward, 1),
    "GELU' with the sign of x phi(x) wrong":
        (r"cdf \+ x \* e", "cdf - x * e", check_half_backward, 1),
    "GELU' of the tanh form with 2 for 3":
        (r"\(1\.0 \+ 3\.0 \* TANH_CUBIC", "(1.0 + 2.0 * TANH_CUBIC", check_tanh, 1),
    "tanh GELU where erf is asked for":
        (r"cdf, _ = _normal_cdf\(x, EXACT\)\n        return x \* cdf", "return x * _tanh_gate(x)[0]", check_forward, 1),
    "left tail of erf not mirrored":
        (r"tl\.where\(x > 0, 1\.0 - tail, tail\)", "1.0 - tail", check_half, 1),
    "a coefficient of erf mistyped":
        (r"1\.453152027", "1.543152027", check_half, 1),
    "the tail of K dropped":
        (r"range\(0, K, BLOCK_K\)", "range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)", check_forward, 1),
    "the tail tile of N dropped":
        (r"tiles_m \* -\(-N // tile\.BLOCK_N\)", "tiles_m * (N // tile.BLOCK_N)", check_backward, 1),
    "a store past the last row":
        (r"inside = \(row < M\)\[:, None\] & (.*\n    if b_ptr)", r"inside = (row < M + 1)[:, None] & \1", check_forward, 1),
    "a load past the last column":
        (r"& \(c < columns\)", "& (c < columns + 1)", check_forward, 1),
    "activation of the rounded h":
        (r"    y = activated\(h,", "    y = activated(h.to(y_ptr.dtype.element_ty).to(tl.float32),", check_rounding, 1),
    "only the last rows in the bias gradient":
        (r"total \+= dh", "total = dh", check_column_sums, 1),
    "partial sums of half a tile":
        (r"tl\.sum\(dh, axis=0\)", "tl.sum(dh * 0.5, axis=0)", check_backward, 1),
    "dropout without its scale":
        (r"y \* keep_scale\(dropout_p\)", "y", check_dropout, 1),
    "another mask in the backward":
        (r"(        keep = keep_rows\(tl\.load\(seed_ptr\)), (row.*\n            dh)", r"\1 + 1, \2", check_dropout, 1),
    "the mask restarted in each tile":
        (r"dropout_p, BLOCK_N, n\)\n        y", "dropout_p, BLOCK_N, 0)\n        y", check_dropout, 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault):
    pattern, replacement, check, count = FAULTS[fault]
    assert_fault_is_seen(mlp, pattern, replacement, check, count)
