"""The linear cross-entropy on a CPU (ops/cpu/cross_entropy.py, csrc/rows/cross_entropy.h): the rules of the Triton one, in every instruction set."""
import pytest
import torch
import torch.nn.functional as F
from made import Made

from nanogpt_fast import backend, reference
from nanogpt_fast.checks.error_rule import in_order, measure
from nanogpt_fast.ops import extension
from nanogpt_fast.ops.cpu import cross_entropy as cpu
from nanogpt_fast.ops.cross_entropy import implementation, linear_cross_entropy

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=f"not here: {cpu.MISSING}")
ISAS = extension._C.build_info()["cpu_isas"].split() if cpu.MISSING is None else []
AUTO, FUSED = backend.parse("auto"), backend.parse("fused")
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
ROUTES = pytest.mark.parametrize("return_logits", (True, False), ids=("with logits", "without"))


@pytest.fixture(autouse=True)
def no_triton(monkeypatch):
    """Where the interpreter runs, "fused" would mean the Triton kernel."""
    monkeypatch.setattr(backend, "_interpreted", False)
    torch.manual_seed(0)


def draw(rows=14, C=24, V=130, dtype=torch.float32, weight_dtype=None):
    x = torch.randn(rows, C).to(dtype).requires_grad_()
    weight = (torch.randn(V, C) / C**0.5).to(weight_dtype or dtype).requires_grad_()
    targets = torch.randint(0, V, (rows,))
    targets[:2] = -1
    return x, weight, targets


def gradients(loss, x, weight, **kwargs):
    return torch.autograd.grad(loss, (x, weight), **kwargs)


def oracle_of(x, weight, targets, reduction="mean"):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    loss = reference.linear_cross_entropy(x, weight, targets, reduction=reduction)[0]
    return loss.detach(), *gradients(loss, x, weight)


def summed(x, weight, targets, dx, dw, reduction="mean"):
    """What adding the terms of dx and dW in order costs: `measure`'s option, for each of the two."""
    x, weight = x.detach().double(), weight.detach().double()
    logits = (x @ weight.t()).requires_grad_()
    d, = torch.autograd.grad(F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction), logits)
    return in_order(len(weight), d.square() @ weight.square(), dx), in_order(len(x), d.square().t() @ x.square(), dw)


def assert_close(out, exact, plain, direction, what, **options):
    problem = measure(out, exact, plain, direction, **options).problem
    assert problem is None, f"{what}: {problem}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("V", (1, 16, 33, 130, 5000))
@DTYPES
def test_rows_are_as_near_to_fp64_as_pytorchs_in_every_instruction_set(dtype, V, isa):
    x, weight, targets = draw(rows=40, V=V, dtype=dtype)
    exact = oracle_of(x, weight, targets)
    plain = reference.linear_cross_entropy(x, weight, targets)[0]
    loss, dx, dw = cpu.forward_backward(x.detach(), weight.detach(), targets, -1, True, True, True, isa)
    assert_close(loss.to(dtype), exact[0], plain, "forward", "loss", dtype=dtype, averaged=38)
    each = summed(x, weight, targets, *exact[1:])
    for name, out, oracle, low, sums in zip(("dx", "dW"), (dx, dw), exact[1:], gradients(plain, x, weight), each):
        assert_close(out, oracle, low, "gradient", name, summed=sums)


@ROUTES
@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("dtype, weight_dtype, autocast", (
    (torch.float32, torch.float32, False), (torch.bfloat16, torch.float32, True), (torch.float32, torch.float32, True),
    (torch.bfloat16, torch.bfloat16, True), (torch.bfloat16, torch.bfloat16, False)),
    ids=("fp32", "bf16 x, fp32 weight", "autocast", "bf16 copies", "bf16"))
def test_loss_and_gradients_are_as_near_to_fp64_as_the_reference(dtype, weight_dtype, autocast, reduction, return_logits):
    if return_logits and dtype == torch.float32 and not autocast:
        pytest.skip("the reference's: nanoGPT's bits")
    x, weight, targets = draw(dtype=dtype, weight_dtype=weight_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, logits = linear_cross_entropy(x, weight, targets, reduction=reduction, return_logits=return_logits, backend=FUSED)
        plain, plain_logits = reference.linear_cross_entropy(x, weight, targets, reduction=reduction)
    exact = oracle_of(x, weight, targets, reduction)
    assert loss.dtype == plain.dtype and loss.shape == ()
    computed = torch.float32 if weight_dtype == dtype == torch.float32 and not autocast else torch.bfloat16
    assert_close(loss, exact[0], plain, "forward", "loss", dtype=computed, averaged=12 if reduction == "mean" else 1)
    assert torch.equal(logits, plain_logits) if return_logits else logits is None
    each = summed(x, weight, targets, *exact[1:], reduction)
    for name, out, oracle, low, sums in zip(("dx", "dW"), gradients(loss, x, weight), exact[1:], gradients(plain, x, weight), each):
        assert out.dtype == low.dtype
        assert_close(out, oracle, low, "gradient", name, summed=sums)


@ROUTES
def test_chunks_add_to_what_one_chunk_gives(return_logits, monkeypatch):
    x, weight, targets = draw(rows=50, dtype=torch.bfloat16)
    whole = gradients(linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)[0], x, weight)
    monkeypatch.setattr(cpu, "CHUNK", 16)
    parts = gradients(linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)[0], x, weight)
    exact = oracle_of(x, weight, targets)[1:]
    for name, out, oracle, one in zip(("dx", "dW"), parts, exact, whole):
        assert_close(out, oracle, one, "gradient", name)


def test_the_returned_logits_stay_intact_and_what_arrives_through_them_is_added():
    x, weight, targets = draw(dtype=torch.bfloat16)
    loss, logits = linear_cross_entropy(x, weight, targets, backend=FUSED)
    before, arriving = logits.detach().clone(), torch.randn(130, 14).bfloat16().t()
    found = torch.autograd.grad((loss, logits), (x, weight), (torch.full_like(loss, 3.0), arriving))
    assert torch.equal(logits.detach(), before)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = torch.autograd.grad(reference.linear_cross_entropy(exact_x, exact_weight, targets), (exact_x, exact_weight),
                                (torch.tensor(3.0).double(), arriving.double()))
    plain = torch.autograd.grad(reference.linear_cross_entropy(x, weight, targets), (x, weight), (torch.full_like(loss, 3.0), arriving))
    for name, out, oracle, low in zip(("dx", "dW"), found, exact, plain):
        assert_close(out, oracle, low, "gradient", name)
    loss, logits = linear_cross_entropy(x, weight, targets, backend=FUSED)
    logits.detach().div_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(loss, x, weight)


@pytest.mark.parametrize("rows", (0, 1, 6))
@pytest.mark.parametrize("ignored", ("all", "none"))
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_few_rows_and_ignored_rows_give_what_the_reference_gives(rows, ignored, reduction):
    x, weight, targets = draw(rows=rows)
    targets = torch.full_like(targets, -1) if ignored == "all" else targets.clamp(min=0)
    loss, _ = linear_cross_entropy(x, weight, targets, reduction=reduction, return_logits=False, backend=FUSED)
    plain, _ = reference.linear_cross_entropy(x, weight, targets, reduction=reduction)
    torch.testing.assert_close(loss, plain, equal_nan=True)
    torch.testing.assert_close(gradients(loss, x, weight), gradients(plain, x, weight), equal_nan=True)


def test_ignore_index_may_be_a_word_and_targets_and_inputs_of_any_layout():
    x = torch.randn(7, 2, 30).transpose(0, 1)[..., 3:27].requires_grad_()
    weight = torch.randn(24, 130).t().requires_grad_()
    targets = torch.randint(0, 130, (7, 2)).t()
    targets[0, 3:5] = 3
    loss, _ = linear_cross_entropy(x, weight, targets, ignore_index=3, return_logits=False, backend=FUSED)
    plain = reference.linear_cross_entropy(x, weight, targets.contiguous(), ignore_index=3)[0]
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients(loss, x, weight), gradients(plain, x, weight))


@ROUTES
@pytest.mark.parametrize("target", (130, -2))
def test_a_target_outside_of_the_vocabulary_raises(target, return_logits):
    x, weight, targets = draw(dtype=torch.bfloat16)
    targets[5] = target
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
        linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)


@DTYPES
def test_logits_of_ten_thousand_infinities_and_nan(dtype):
    logits = torch.randn(6, 50).to(dtype)
    logits[0] += 10_000
    logits[1, 4] = float("inf")
    logits[2, 5] = float("nan")
    logits[3, 6:] = float("-inf")
    targets = torch.arange(6)
    losses, out = torch.empty(6), torch.empty_like(logits)
    cpu._rows(logits, out, targets, -1, losses, "")
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected.detach(), equal_nan=True, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(out.double(), gradient, equal_nan=True, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_rows_with_padding_between_them_are_left_alone_and_threads_change_no_bit():
    buffer = torch.full((9, 60000), 7.0)
    buffer[:, :50304] = torch.randn(9, 50304)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            copy, losses = buffer.clone(), torch.empty(9)
            cpu._rows(copy[:, :50304], copy[:, :50304], torch.arange(9), -1, losses, "")
            assert (copy[:, 50304:] == 7.0).all()
            results.append((copy, losses))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@ROUTES
def test_a_frozen_side_costs_and_changes_nothing_and_backward_may_run_twice(return_logits):
    x, weight, targets = draw(dtype=torch.bfloat16)
    call = lambda: linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)[0]
    loss = call()
    first, again = gradients(loss, x, weight, retain_graph=True), gradients(loss, x, weight)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for frozen, free, expected in ((x, weight, first[1]), (weight, x, first[0])):
        frozen.requires_grad_(False)
        with Made() as made:
            (out,) = torch.autograd.grad(call(), free)
        assert torch.equal(out, expected) and made.matmuls <= 2      # dW's may be the extension's, which no operator shows
        frozen.requires_grad_(True)
    with torch.no_grad(), Made() as made:
        assert torch.equal(call(), loss) and made.matmuls == 1
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference' has"):
        gradients(call(), x, weight, create_graph=True)


@ROUTES
def test_no_fp32_tensor_of_the_size_of_the_logits_is_ever_made(return_logits, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 16)
    x, weight, targets = draw(rows=64, C=8, V=1100, dtype=torch.bfloat16, weight_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), Made() as made:
        gradients(linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)[0], x, weight)
    largest = {dtype: made.largest(dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert largest == {torch.float32: 1100 * 8, torch.bfloat16: (64 if return_logits else 16) * 1100}


def test_the_gradient_of_an_fp32_weight_is_handed_to_it_without_a_copy():
    x, weight, targets = draw()
    loss, _ = linear_cross_entropy(x, weight, targets, return_logits=False, backend=FUSED)
    made = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == made


@pytest.mark.parametrize("return_logits", (True, False))
def test_compiled_it_is_one_graph_and_gives_the_same(return_logits):
    x, weight, targets = draw(dtype=torch.bfloat16)
    call = lambda x, w, t: linear_cross_entropy(x, w, t, return_logits=return_logits, backend=FUSED)[0] * 3
    torch._dynamo.reset()
    loss = torch.compile(call, backend="aot_eager", fullgraph=True)(x, weight, targets)
    eager = call(x, weight, targets)
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(gradients(loss, x, weight), gradients(eager, x, weight), rtol=2e-2, atol=1e-4)


def test_the_registered_operators_pass_opcheck():
    x, weight, targets = (t.detach() for t in draw())
    logits, scale = x @ weight.t(), torch.ones(())
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.nanogpt_fast.linear_cross_entropy_cpu, (x, weight, targets, -1, True, *needs))
        torch.library.opcheck(torch.ops.nanogpt_fast.linear_cross_entropy_backward_cpu,
                              (logits, x, weight, targets, scale, None, -1, True, *needs))
    torch.library.opcheck(torch.ops.nanogpt_fast.linear_cross_entropy_logits_cpu, (x, weight, targets, -1, True))


def test_auto_takes_it_where_no_bit_of_nanogpt_is_promised():
    x, weight, targets = draw()
    name = lambda *args, **kwargs: implementation(*args, targets, backend=AUTO, **kwargs)
    assert name(x, weight, return_logits=False) == "cpp"
    assert name(x, weight) == "reference"                            # the drop-in in fp32: C6
    assert name(x.bfloat16(), weight.bfloat16()) == "cpp"
    assert name(x.half(), weight.half(), return_logits=False) == name(x.double(), weight.double(), return_logits=False) == "reference"
    assert name(x.bfloat16(), weight, return_logits=False) == "reference"
    with torch.autocast("cpu", torch.bfloat16):
        assert name(x, weight) == name(x.bfloat16(), weight, return_logits=False) == "cpp"
    with pytest.raises(RuntimeError, match="cpp: with float32 logits returned"):
        implementation(x, weight, targets, backend=FUSED)


@ROUTES
@pytest.mark.parametrize("default", (torch.float64, torch.bfloat16), ids=str)
def test_the_default_dtype_of_the_program_changes_nothing(default, return_logits):
    x, weight, targets = draw(dtype=torch.bfloat16)
    expected = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)[0]
    torch.set_default_dtype(default)  # what the extension writes to through a pointer is fp32 whatever this says
    try:
        loss = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)[0]
        pairs = zip(gradients(loss, x, weight), gradients(expected, x, weight), strict=True)
        assert torch.equal(loss, expected) and all(torch.equal(a, b) for a, b in pairs)
    finally:
        torch.set_default_dtype(torch.float32)
