"""The cross-entropy kernels: losses and dlogits row by row, then the launchers that put matmuls around them.

Row by row the oracle sees the same half-precision logits as the kernel, so nothing but the kernel's own arithmetic is in the
error. The plain path is PyTorch in fp32 on those logits, rounded to their dtype where the kernel's result is.

The plain path sums each row in ORDERS orders, and the unluckiest counts. A row's error is that of its sum, in all of its columns; of
nine rows, often one alone has a probability near 1, and its sum is the whole error. PyTorch's one order then has next to none by luck
as often as the kernel's has much: at V=257 in fp32 13 of 2,000 seeds broke the bound. With 4 orders 2 did; with 64 the largest of
4,000 errors was 0.52 of the bound, and each tenth of the rest was 0.14 further up, so that one in 10^6 stays below it.
"""
import harness
import pytest
import torch
import torch.nn.functional as F
from harness import assert_close_to_oracle, assert_fault_is_seen, assert_grid_order_is_free, guarded_outputs, with_nan_margins
from hypothesis import given, settings, strategies as st
from nanogpt_fast.kernels import cross_entropy as ce

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One tile with a tail; a power of two and one; several tiles; no tail at all; GPT-2's own vocabulary (rows that start unaligned
# unless padded), and the padded one. Few rows: the interpreter takes 10 ms for each of the last.
VOCABULARIES = ((65, 9), (257, 9), (1000, 9), (2048, 5), (50257, 2), (50304, 3))
IGNORED = -1
ORDERS = 64


def draw(rows, V, dtype, *, scale=3.0, ignored=True):
    """Logits (rows, V) as the launchers allocate them, between nans, and targets with every third row ignored."""
    logits = ce.empty_logits(rows, V, torch.empty(0, dtype=dtype, device=harness.DEVICE))
    logits.copy_(torch.randn(rows, V, device=harness.DEVICE) * scale)
    targets = torch.randint(0, V, (rows,), device=harness.DEVICE)
    if ignored:
        targets[1::3] = IGNORED
    return with_nan_margins(logits), with_nan_margins(targets)


def losses_and_dlogits(logits, targets, ignore_index=IGNORED):
    """What the rows ought to give, in the precision of `logits`: losses (rows,), softmax - onehot (rows, V)."""
    logits = logits.clone().requires_grad_()
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    losses.sum().backward()
    return losses.detach(), logits.grad


def unlucky(logits, targets, ignore_index, oracles):
    """The plain path's losses and dlogits, each by the one of ORDERS orders of a row's columns whose largest error is largest."""
    worst, counts = [(-1.0, None), (-1.0, None)], targets != ignore_index
    for _ in range(ORDERS):
        order = torch.randperm(logits.size(1), device=logits.device)
        back = order.argsort()
        moved = torch.where(counts, back[targets.where(counts, 0)], IGNORED)
        losses, dlogits = losses_and_dlogits(logits.float()[:, order], moved)
        for i, plain in enumerate((losses, dlogits[:, back])):
            largest = float((plain - oracles[i]).abs().nan_to_num().max())
            if largest > worst[i][0]:
                worst[i] = largest, plain
    return [plain for _, plain in worst]


def assert_surroundings_untouched(view):
    """What `with_nan_margins` laid around this tensor and between its rows is still there."""
    flat = view.as_strided((view.untyped_storage().nbytes() // view.itemsize,), (1,), 0)
    outside = torch.ones_like(flat, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert harness.is_poison(flat)[outside].all(), "a kernel stored beside its rows"


def check_rows(logits, targets, ignore_index=IGNORED):
    """Both kernels on these rows, against fp64."""
    dtype = logits.dtype
    loss_oracle, dlogits_oracle = losses_and_dlogits(logits.double(), targets, ignore_index)
    loss_plain, dlogits_plain = unlucky(logits, targets, ignore_index, (loss_oracle, dlogits_oracle))

    before = logits.clone()
    with guarded_outputs():
        losses, maxima, log_sums = ce.row_losses(logits, targets, ignore_index, gradient=False)
        assert_close_to_oracle(losses, loss_oracle, loss_plain, "forward", what="losses")
        assert harness.same_bits(logits, before), "the logits did not stay as they were"
        dlogits = torch.empty_like(logits)
        ce.row_gradients(logits, targets, maxima, log_sums, ignore_index, dlogits)
        assert_close_to_oracle(dlogits, dlogits_oracle, dlogits_plain.to(dtype), "gradient", what="dlogits made later")

        in_place = with_nan_margins(logits)
        losses, *_ = ce.row_losses(in_place, targets, ignore_index, gradient=True)
        assert_surroundings_untouched(in_place)
        assert_close_to_oracle(losses, loss_oracle, loss_plain, "forward", what="losses beside a gradient")
        assert_close_to_oracle(in_place, dlogits_oracle, dlogits_plain.to(dtype), "gradient", what="dlogits in place")


@pytest.mark.parametrize("V, rows", VOCABULARIES, ids=[str(V) for V, _ in VOCABULARIES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_dlogits_are_as_near_to_fp64_as_pytorch(V, rows, dtype):
    check_rows(*draw(rows, V, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("V, rows", VOCABULARIES, ids=[str(V) for V, _ in VOCABULARIES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (0.0, 0.01, 100.0))
def test_losses_and_dlogits_hold_over_many_rows_and_scales(V, rows, dtype, scale):
    check_rows(*draw(rows * 20, V, dtype, scale=scale))


@settings(max_examples=harness.examples(15, 15), deadline=None)
@given(V=st.integers(1, 3000), rows=st.integers(1, 4), dtype=st.sampled_from(DTYPES), scale=st.sampled_from((0.01, 1.0, 30.0)),
       ignore_index=st.sampled_from((-100, -1, 0)))
def test_any_number_of_columns_is_right(V, rows, dtype, scale, ignore_index):
    logits, targets = draw(rows, V, dtype, scale=scale, ignored=False)
    targets[:1] = ignore_index
    check_rows(logits, targets, ignore_index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_is_right(dtype):
    check_rows(*draw(1, 1000, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_plus_and_minus_ten_thousand_are_right(dtype):
    check_rows(*draw(4, 257, dtype, scale=1e4 / 3))
    logits, targets = draw(4, 257, dtype)
    check_rows(logits.add_(1e4), targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_equal_logits_give_log_v(dtype):
    logits, targets = draw(4, 1000, dtype, scale=0.0)
    check_rows(logits, targets)
    losses, *_ = ce.row_losses(logits, targets, IGNORED, gradient=False)
    torch.testing.assert_close(losses[0].item(), 6.907755, rtol=1e-6, atol=0)


def test_fp16_near_overflow_and_infinities_give_what_pytorch_gives():
    logits, targets = draw(5, 257, torch.float16, ignored=False)
    logits[0, :128] = 65504.0           # the largest fp16: finite
    logits[1] = float("-inf")           # nothing is possible: nan
    logits[2, :256] = float("-inf")     # only the last column is, in another tile than most
    logits[3, 3] = float("inf")         # nan
    targets[2] = 256
    expected, expected_dlogits = losses_and_dlogits(logits.float(), targets)
    losses, *_ = ce.row_losses(logits, targets, IGNORED, gradient=True)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    torch.testing.assert_close(logits[[0, 2, 4]].float(), expected_dlogits[[0, 2, 4]], atol=1e-3, rtol=1e-3)
    assert logits[[1, 3]].isnan().any(1).all()


@pytest.mark.parametrize("target", (-2, 257, 2**40))
def test_a_target_outside_of_the_vocabulary_makes_its_loss_and_its_row_nan_and_no_other(target):
    logits, targets = draw(3, 257, torch.bfloat16, ignored=False)
    targets[1] = target
    losses, maxima, log_sums = ce.row_losses(logits, targets, IGNORED, gradient=False)
    assert losses.isnan().tolist() == [False, True, False]
    out = torch.empty_like(logits)
    ce.row_gradients(logits, targets, maxima, log_sums, IGNORED, out)
    assert out.isnan().all(1).tolist() == out.isnan().any(1).tolist() == [False, True, False]
    ce.row_losses(logits, targets, IGNORED, gradient=True)
    assert logits.isnan().all(1).tolist() == logits.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_through_the_logits_is_added_to_the_scaled_one(dtype):
    logits, targets = draw(6, 1000, dtype)
    arriving = with_nan_margins(torch.randn(6, 1000, device=harness.DEVICE).to(dtype))
    scale = torch.tensor(0.37, device=harness.DEVICE)
    oracle = losses_and_dlogits(logits.double(), targets)[1] * scale.double() + arriving.double()
    plain = (losses_and_dlogits(logits.float(), targets)[1] * scale + arriving.float()).to(dtype)
    _, maxima, log_sums = ce.row_losses(logits, targets, IGNORED, gradient=False)
    with guarded_outputs():
        out = torch.empty_like(logits)
        ce.row_gradients(logits, targets, maxima, log_sums, IGNORED, out, arriving, scale)
    # No bias to be told: what arrives is exact in this dtype, and a probability below half its last place rounds away, always
    # downwards.
    assert_close_to_oracle(out, oracle, plain, "gradient", check_bias=False)


def test_programs_may_run_in_any_order():
    logits, targets = draw(7, 300, torch.bfloat16)

    def run():
        in_place, dlogits = logits.clone(), torch.empty_like(logits)
        losses, maxima, log_sums = ce.row_losses(logits, targets, IGNORED, gradient=False)
        ce.row_gradients(logits, targets, maxima, log_sums, IGNORED, dlogits)
        return losses, dlogits, ce.row_losses(in_place, targets, IGNORED, gradient=True)[0], in_place

    assert_grid_order_is_free(run)


def test_rows_that_lie_beyond_two_to_the_31_elements_are_found():
    """The last row of 64 x 1024 tokens begins at element 3.3e9. Two rows that far apart: memory that is never touched costs
    nothing.
    """
    V, far = 65, 65535 * 50304
    rows = torch.empty(far + 2 * V, dtype=torch.bfloat16, device=harness.DEVICE).as_strided((2, V), (far, 1))
    logits, targets = draw(2, V, torch.bfloat16, ignored=False)
    rows.copy_(logits)
    expected, expected_dlogits = losses_and_dlogits(logits.float(), targets)
    losses, maxima, log_sums = ce.row_losses(rows, targets, IGNORED, gradient=False)
    torch.testing.assert_close(losses, expected)
    near = torch.empty_like(logits)
    ce.row_gradients(rows, targets, maxima, log_sums, IGNORED, near)
    torch.testing.assert_close(near.float(), expected_dlogits, atol=4e-3, rtol=4e-3)
    ce.row_gradients(rows, targets, maxima, log_sums, IGNORED, rows, rows, torch.ones((), device=harness.DEVICE))
    torch.testing.assert_close(rows.float(), expected_dlogits + logits.float(), atol=4e-3, rtol=8e-3)
    rows.copy_(logits)
    ce.row_losses(rows, targets, IGNORED, gradient=True)
    torch.testing.assert_close(rows.float(), expected_dlogits, atol=4e-3, rtol=4e-3)


# ------------------------------------------------------------------------------------------------------------ planted faults

FAULTS = {
    "no maximum subtracted": (r"new_maximum = tl.maximum\(maximum, tl.max\(tile, axis=0\)\)", "new_maximum = maximum * 0.0", 1),
    "sums not rescaled": (r"total \* rescale \+", "total +", 1),
    "log forgotten": (r"tl\.log\(total\)", "total", 1),
    "one-hot in the next column": (r"cols == hot", "cols == hot + 1", 1),
    "no one-hot": (r"p - 1\.0, p\)", "p, p)", 1),
    "ignored rows counted in the loss": (r"tl\.where\(counts, loss, 0\.0\)", "tl.where(counts, loss, maximum)", 1),
    "ignored rows counted in the gradient": (r"float\(\"nan\"\)\), 0\.0\)", 'float("nan")), 1.0)', 2),
    "tail not masked": (r"mask=tail < V, other=float\(\"-inf\"\)\)", 'mask=tail < V, other=0.0)', 1),
    "tail masked one short": (r"mask=cols < V\)\n", "mask=cols < V - 1)\n", 1),
    "tail stored one too far": (r"element_ty\), mask=tail < V\)", "element_ty), mask=tail < V + 1)", 1),
    "last full tile forgotten": (r"for i in range\(full\):  # backwards", "for i in range(1, full):  # backwards", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault):
    logits, targets = draw(4, 5000, torch.bfloat16)  # two full tiles and a tail
    logits[0] += 200  # exp(200) overflows
    logits[3] += torch.linspace(0, 8, 5000, device=harness.DEVICE)  # the maximum grows from tile to tile
    pattern, replacement, count = FAULTS[fault]
    assert_fault_is_seen(ce, pattern, replacement, lambda: check_rows(logits, targets), count)


# ----------------------------------------------------------------------------------------------------------- with the matmuls


def draw_head(N, C, V, dtype):
    x, weight = torch.randn(N, C, device=harness.DEVICE), torch.randn(V, C, device=harness.DEVICE) / C**0.5
    targets = torch.randint(0, V, (N,), device=harness.DEVICE)
    targets[::5] = IGNORED
    return x.to(dtype), weight.to(dtype), targets


def head(x, weight, targets):
    """(losses, dx, dW) of the sum of the losses, in PyTorch and in the precision of the inputs; the loss in fp32 or better."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = F.linear(x, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
    losses.sum().backward()
    return losses.detach(), x.grad, weight.grad


@pytest.mark.parametrize("N, C, V", ((20, 48, 257), (9, 40, 65), (1, 16, 1000)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep_logits", (False, True), ids=("fused", "from logits"))
def test_gradients_through_several_chunks_are_as_near_to_fp64_as_pytorch(N, C, V, dtype, keep_logits, monkeypatch):
    monkeypatch.setattr(ce, "chunk_rows", lambda *_: 8)  # 20 rows: two full chunks and one of four rows
    x, weight, targets = (with_nan_margins(t) for t in draw_head(N, C, V, dtype))
    with guarded_outputs():
        if keep_logits:
            losses, logits, maxima, log_sums = ce.forward(x, weight, targets, IGNORED)
            one = torch.ones((), device=harness.DEVICE)
            dx, dw = ce.backward(logits, maxima, log_sums, x, weight, targets, one, None, IGNORED, True, True)
        else:
            losses, dx, dw = ce.forward_backward(x, weight, targets, IGNORED, True, True)
    oracle, plain = head(x.double(), weight.double(), targets), head(x, weight, targets)
    # Every row's loss carries the rounding of its two logits that count, in the plain path as here: no bias can be told from
    # it.
    assert_close_to_oracle(losses, oracle[0], plain[0], "forward", what="losses", check_bias=dtype == torch.float32)
    assert dx.dtype == (dtype if keep_logits else torch.float32) and dw.dtype == torch.float32
    assert_close_to_oracle(dx.to(dtype), oracle[1], plain[1], "gradient", what="dx")
    assert_close_to_oracle(dw.to(dtype), oracle[2], plain[2], "gradient", what="dW")


def test_dw_is_summed_in_fp32_over_the_chunks(monkeypatch):
    """64 chunks, each of which adds little: a sum kept in bf16 would be rounded 64 times."""
    monkeypatch.setattr(ce, "chunk_rows", lambda *_: 1)
    x, weight, targets = draw_head(64, 8, 65, torch.bfloat16)
    _, _, dw = ce.forward_backward(x.abs(), weight, torch.zeros_like(targets), IGNORED, False, True)
    oracle = head(x.abs().double(), weight.double(), torch.zeros_like(targets))[2]
    # what is left is the rounding of each dlogit to bf16, 2^-9 of it, and it averages out over the rows
    assert (dw.double() - oracle).norm() / oracle.norm() < 2**-9


@pytest.mark.parametrize("V", (65, 8192, 50304))
def test_chunks_have_4096_rows_and_half_a_gigabyte_and_are_at_most_four(V):
    for N in (1, 4095, 4096, 4097, 8191, 8192, 8193, 12289, 32768, 65535, 65536, 100_000, 1_000_000):
        rows = ce.chunk_rows(N, V, 2, -1)
        chunks = -(-N // rows)
        last = N - (chunks - 1) * rows
        assert chunks <= 4 and (chunks == 1 or rows >= 4096 and last > rows - 4), (N, rows)
        assert chunks == 1 or N * 2 * V > (chunks - 1) * 2**29, "half a gigabyte is cut"
        assert chunks == 4 or rows < 8192 or rows * 2 * V <= 2**29, "a chunk holds more than it must"


@pytest.mark.parametrize("keep_logits", (False, True), ids=("fused", "from logits"))
def test_no_rows_give_no_losses_and_zero_gradients(keep_logits):
    x, weight, targets = draw_head(0, 16, 65, torch.bfloat16)
    if keep_logits:
        losses, logits, maxima, log_sums = ce.forward(x, weight, targets, IGNORED)
        one = torch.ones((), device=harness.DEVICE)
        dx, dw = ce.backward(logits, maxima, log_sums, x, weight, targets, one, None, IGNORED, True, True)
    else:
        losses, dx, dw = ce.forward_backward(x, weight, targets, IGNORED, True, True)
    assert losses.shape == (0,) and dx.shape == (0, 16) and not dw.any() and dw.shape == (65, 16)


def test_wrong_arguments_are_named():
    x, weight, targets = draw_head(4, 16, 65, torch.float32)
    with pytest.raises(ValueError, match=r"\(4, 16\) and weight \(65, 8\)"):
        ce.forward(x, weight[:, :8], targets, IGNORED)
    with pytest.raises(TypeError, match="both bfloat16"):
        ce.forward(x, weight.half(), targets, IGNORED)
    with pytest.raises(TypeError, match="both bfloat16"):
        ce.forward(x.double(), weight.double(), targets, IGNORED)
    with pytest.raises(TypeError, match="int64"):
        ce.forward_backward(x, weight, targets.int(), IGNORED, True, True)
    with pytest.raises(ValueError, match="one a row"):
        ce.forward_backward(x, weight, targets[:2], IGNORED, True, True)
    with pytest.raises(ValueError, match="one device"):
        ce.forward_backward(x, weight, targets.to("meta"), IGNORED, True, True)


@pytest.mark.skipif(not harness.INTERPRETED, reason="a GPU answers with nan instead: raising would stop the host")
def test_on_a_cpu_a_target_outside_of_the_vocabulary_raises():
    x, weight, targets = draw_head(4, 16, 65, torch.float32)
    targets[2] = 65
    for function, more in ((ce.forward, ()), (ce.forward_backward, (True, True))):
        with pytest.raises(IndexError, match="Target 65 is out of bounds: expected 0 to 64"):
            function(x, weight, targets, IGNORED, *more)
