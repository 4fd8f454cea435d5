"""linear_cross_entropy on its kernels: as an op under autograd, autocast, torch.compile, checkpointing and a GradScaler."""
import harness
import pytest
import torch
import torch._dynamo.testing
from harness import assert_close_to_oracle
from made import Made
from nanogpt_fast.kernels import cross_entropy as kernels
from torch.utils.checkpoint import checkpoint

from nanogpt_fast import backend, reference
from nanogpt_fast.ops.cross_entropy import implementation, linear_cross_entropy

FUSED = backend.parse("fused")
DEVICE = harness.DEVICE
ROUTES = pytest.mark.parametrize("return_logits", (True, False), ids=("with logits", "without"))


def draw(B=2, T=7, C=24, V=130, dtype=torch.float32, weight_dtype=None):
    x = torch.randn(B, T, C, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(V, C, device=DEVICE) / C**0.5).to(weight_dtype or dtype).requires_grad_()
    targets = torch.randint(0, V, (B, T), device=DEVICE)
    targets[:1, :2] = -1
    return x, weight, targets


def gradients(loss, x, weight, **kwargs):
    return torch.autograd.grad(loss, (x, weight), **kwargs)


def oracle_of(function, x, weight):
    """(value, dx, dweight) of function(x, weight) -> scalar, in fp64 on the same numbers."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    with torch.autocast(DEVICE.type, enabled=False):
        value = function(x, weight)
        return value.detach(), *gradients(value, x, weight)


@ROUTES
@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("dtype, weight_dtype, autocast", (
    (torch.float32, torch.float32, None),               # plain fp32
    (torch.bfloat16, torch.float32, torch.bfloat16),    # training: LayerNorm's output is half, the weight fp32
    (torch.float32, torch.float32, torch.bfloat16),     # the drop-in under autocast without a fused LayerNorm
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),   # the trainer's half-precision copy of the weight
    (torch.float16, torch.float16, None),               # model.half()
), ids=("fp32", "bf16 x, fp32 weight", "autocast", "bf16 copies", "half"))
def test_loss_and_gradients_are_as_near_to_fp64_as_the_reference(return_logits, reduction, dtype, weight_dtype, autocast):
    x, weight, targets = draw(dtype=dtype, weight_dtype=weight_dtype)
    with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
        loss, logits = linear_cross_entropy(x, weight, targets, reduction=reduction, return_logits=return_logits, backend=FUSED)
        plain_loss, plain_logits = reference.linear_cross_entropy(x, weight, targets, reduction=reduction)
    oracle = oracle_of(lambda x, w: reference.linear_cross_entropy(x, w, targets, reduction=reduction)[0], x, weight)
    assert loss.dtype == plain_loss.dtype and loss.shape == ()
    assert_close_to_oracle(loss, oracle[0], plain_loss, "forward", what="loss")
    if return_logits:
        assert logits.dtype == plain_logits.dtype and logits.shape == plain_logits.shape
        exact = x.detach().double() @ weight.detach().double().t()
        assert_close_to_oracle(logits, exact, plain_logits, "forward", what="logits")
    else:
        assert logits is None
    for name, out, exact, plain in zip(("dx", "dW"), gradients(loss, x, weight), oracle[1:], gradients(plain_loss, x, weight)):
        assert out.dtype == plain.dtype
        assert_close_to_oracle(out, exact, plain, "gradient", what=name)


@ROUTES
def test_dx_is_rounded_once(return_logits):
    """Of 1/513 times a number of bf16 rounding makes 1/512 times it: dx rounded before the scale, too, is 0.2 percent too large."""
    x, weight, targets = draw(B=27, T=19, C=16, V=65, dtype=torch.bfloat16)
    targets.clamp_(min=0)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
        plain_loss, _ = reference.linear_cross_entropy(x, weight, targets)
    rows, w = x.detach().double().flatten(0, 1), weight.detach().double()
    dlogits = torch.softmax(rows @ w.t(), 1)
    dlogits[torch.arange(513, device=DEVICE), targets.flatten()] -= 1
    exact, stored = (d.double() @ w / 513 for d in (dlogits, dlogits.to(torch.bfloat16)))
    dx, plain = (gradients(value, x, weight)[0].flatten(0, 1) for value in (loss, plain_loss))
    assert_close_to_oracle(dx, exact, plain, "gradient", stored=stored, what="dx")


def test_the_returned_logits_stay_intact():
    x, weight, targets = draw(dtype=torch.bfloat16)
    loss, logits = linear_cross_entropy(x, weight, targets, backend=FUSED)
    before = logits.detach().clone()
    gradients(loss, x, weight)
    assert harness.same_bits(logits.detach(), before)


LAYOUTS = {
    "dense": lambda: torch.randn(2, 7, 130, device=DEVICE),
    "expanded": lambda: torch.randn(1, 1, 1, device=DEVICE).expand(2, 7, 130),
    "transposed": lambda: torch.randn(130, 7, 2, device=DEVICE).permute(2, 1, 0),
    "a view into a larger one": lambda: torch.randn(2, 9, 140, device=DEVICE)[:, 1:8, 5:135],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beside_the_loss", (True, False), ids=("beside the loss", "alone"))
def test_a_gradient_that_arrives_through_the_logits_is_added(layout, beside_the_loss):
    x, weight, targets = draw()
    arriving = LAYOUTS[layout]()

    def run(function, x, weight, arriving, **kwargs):
        loss, logits = function(x, weight, targets, **kwargs)
        if beside_the_loss:
            return torch.autograd.grad((loss, logits), (x, weight), (torch.full_like(loss, 3.0), arriving))
        return torch.autograd.grad(logits, (x, weight), arriving)

    out = run(linear_cross_entropy, x, weight, arriving, backend=FUSED)
    plain = run(reference.linear_cross_entropy, x, weight, arriving)
    exact = run(reference.linear_cross_entropy, *(t.detach().double().requires_grad_() for t in (x, weight)), arriving.double())
    for name, a, b, c in zip(("dx", "dW"), out, exact, plain):
        assert_close_to_oracle(a, b, c, "gradient", what=name)


@ROUTES
def test_inputs_of_any_layout_are_right(return_logits):
    x = torch.randn(7, 2, 30, device=DEVICE).transpose(0, 1)[..., 3:27]
    weight = torch.randn(24, 130, device=DEVICE).t()
    targets = torch.randint(0, 130, (7, 2), device=DEVICE).t()
    x.requires_grad_(), weight.requires_grad_()
    loss, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
    plain = reference.linear_cross_entropy(x, weight, targets.contiguous())[0]
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients(loss, x, weight), gradients(plain, x, weight))


@ROUTES
def test_any_leading_shape_is_taken(return_logits):
    x, weight, targets = draw()
    loss, logits = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
    for shape in ((14,), (1, 14), (7, 1, 2)):
        same, other = linear_cross_entropy(x.view(*shape, -1), weight, targets.view(shape), return_logits=return_logits,
                                           backend=FUSED)
        assert torch.equal(same, loss)
        assert not return_logits or torch.equal(other, logits.view(*shape, -1))


# ------------------------------------------------------------------------------------------------------- which rows count


@ROUTES
@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("rows", (0, 1, 6))
@pytest.mark.parametrize("ignored", ("all", "none"))
def test_few_rows_and_ignored_rows_give_what_the_reference_gives(return_logits, reduction, rows, ignored):
    x, weight, targets = draw(B=1, T=rows)
    targets = torch.full_like(targets, -1) if ignored == "all" else targets.clamp(min=0)
    loss, _ = linear_cross_entropy(x, weight, targets, reduction=reduction, return_logits=return_logits, backend=FUSED)
    plain, _ = reference.linear_cross_entropy(x, weight, targets, reduction=reduction)
    torch.testing.assert_close(loss, plain, equal_nan=True)
    torch.testing.assert_close(gradients(loss, x, weight), gradients(plain, x, weight), equal_nan=True)


@ROUTES
def test_ignore_index_may_be_a_word_of_the_vocabulary(return_logits):
    x, weight, targets = draw()
    targets = targets.clamp(min=0)
    targets[1] = 3
    loss, _ = linear_cross_entropy(x, weight, targets, ignore_index=3, return_logits=return_logits, backend=FUSED)
    plain, _ = reference.linear_cross_entropy(x, weight, targets, ignore_index=3)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients(loss, x, weight), gradients(plain, x, weight))


@ROUTES
def test_a_target_outside_of_the_vocabulary_raises_on_a_cpu_and_gives_nan_on_a_gpu(return_logits):
    x, weight, targets = draw()
    targets[1, 1] = 130
    if DEVICE.type == "cpu":
        with pytest.raises(IndexError, match="Target 130 is out of bounds"):
            linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
    else:
        loss, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
        assert loss.isnan() and all(g.isnan().any() for g in gradients(loss, x, weight))


@ROUTES
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU: asks CUDA whether the host waits")
def test_the_host_never_waits_for_the_gpu(return_logits):
    x, weight, targets = draw(dtype=torch.bfloat16)
    targets[1, 1] = 10_000

    def step():
        gradients(linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)[0], x, weight)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------------------------------------- autograd


@ROUTES
def test_a_frozen_weight_or_frozen_hidden_states_cost_and_change_nothing(return_logits):
    x, weight, targets = draw()
    dx, dw = gradients(linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)[0], x, weight)
    for frozen, free, expected in ((x, weight, dw), (weight, x, dx)):
        frozen.requires_grad_(False)
        with Made() as made:
            loss, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
            (out,) = torch.autograd.grad(loss, free)
        assert torch.equal(out, expected)
        assert made.matmuls == 2  # the logits, and one gradient
        frozen.requires_grad_(True)


@ROUTES
def test_without_gradients_only_the_logits_are_computed(return_logits):
    x, weight, targets = draw()
    expected, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
    with torch.no_grad(), Made() as made:
        loss, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
    assert torch.equal(loss, expected) and not loss.requires_grad
    assert made.matmuls == 1


@ROUTES
def test_backward_may_run_twice(return_logits):
    x, weight, targets = draw(dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
    first, second = gradients(loss, x, weight, retain_graph=True), gradients(loss, x, weight)
    assert all(harness.same_bits(a, b) for a, b in zip(first, second))


@ROUTES
def test_checkpointing_gives_the_same_loss_and_gradients(return_logits):
    x, weight, targets = draw()

    def loss_of(x, weight):
        return linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)[0]

    loss, checkpointed = loss_of(x, weight), checkpoint(loss_of, x, weight, use_reentrant=False)
    assert torch.equal(loss, checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(gradients(loss, x, weight), gradients(checkpointed, x, weight)))


@ROUTES
def test_a_second_derivative_raises_instead_of_being_wrong(return_logits):
    x, weight, targets = draw()
    loss, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference' has"):
        gradients(loss, x, weight, create_graph=True)


def test_logits_that_were_changed_in_place_are_noticed_in_the_backward():
    x, weight, targets = draw()
    loss, logits = linear_cross_entropy(x, weight, targets, backend=FUSED)
    with torch.no_grad():
        logits /= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(loss, x, weight)


@ROUTES
def test_fp16_gradients_survive_a_mean_over_many_rows_under_a_grad_scaler(return_logits):
    """A probability of 1/V times 1/N is 8e-6 here and 3e-10 in training; fp16 rounds below 6e-5 and ends at 6e-8.

    Both are multiplied in fp32: the scale of 65,536 as it arrives, and none at all without a scaler.
    """
    x, weight, targets = draw(B=16, T=8, V=1000, C=16, dtype=torch.float16, weight_dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.float16):
        loss, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
        plain, _ = reference.linear_cross_entropy(x, weight, targets)
    oracle = oracle_of(lambda x, w: reference.linear_cross_entropy(x, w, targets)[0] * 65536.0, x, weight)
    ours, theirs = gradients(loss * 65536.0, x, weight), gradients(plain * 65536.0, x, weight)
    for name, out, exact, low in zip(("dx", "dW"), ours, oracle[1:], theirs):
        assert out.isfinite().all()
        assert_close_to_oracle(out, exact, low, "gradient", what=name)
    # and unscaled, where plain PyTorch loses the probabilities: ours reaches dW, which is fp32, without a loss
    with torch.autocast(DEVICE.type, torch.float16):
        loss, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
    (dw,) = torch.autograd.grad(loss, weight)
    assert ((dw.double() * 65536.0 - oracle[2]).norm() / oracle[2].norm()) < 2e-3


# ------------------------------------------------------------------------------------------------------- what is not made


@ROUTES
def test_no_fp32_tensor_of_the_size_of_the_logits_is_ever_made_and_no_logits_matmul_done_twice(return_logits, monkeypatch):
    x, weight, targets = draw(B=4, T=16, C=8, V=1100, dtype=torch.bfloat16, weight_dtype=torch.float32)
    monkeypatch.setattr(kernels, "chunk_rows", lambda *_: 16)
    with torch.autocast(DEVICE.type, torch.bfloat16), Made() as made:
        loss, _ = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
        gradients(loss, x, weight)
    largest = {dtype: made.largest(dtype) for dtype in (torch.float32, torch.bfloat16)}
    padded = 1104
    assert largest[torch.float32] < 64 * 1100 / 2, largest
    assert largest[torch.bfloat16] == (64 if return_logits else 16) * padded, largest
    if DEVICE.type == "cuda":  # a CPU's dW goes by columns
        assert made.matmuls == (1 + 2 * 4 if return_logits else 3 * 4)


def peak_bytes(run):
    """The most bytes of torch tensors that were alive at once during run(), beyond what was before."""
    activity = torch.profiler.ProfilerActivity.CPU if DEVICE.type == "cpu" else torch.profiler.ProfilerActivity.CUDA
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        run()
    alive = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def test_without_logits_the_memory_is_at_most_a_quarter_of_pytorchs(monkeypatch):
    """128 rows stand for 16,384 and more: four chunks. Under autocast, as in training, with the gradients held at the end."""
    monkeypatch.setattr(kernels, "chunk_rows", lambda N, *_: N // 4)
    x, weight, targets = draw(B=1, T=128, V=2000, C=16, dtype=torch.bfloat16, weight_dtype=torch.float32)

    def run(function, **kwargs):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss, logits = function(x, weight, targets, **kwargs)
        return gradients(loss, x, weight)

    ours = peak_bytes(lambda: run(linear_cross_entropy, return_logits=False, backend=FUSED))
    plain = peak_bytes(lambda: run(reference.linear_cross_entropy))
    print(f"peak bytes: {ours:,} here, {plain:,} in plain PyTorch, {128 * 2000 * 2:,} for the logits in bf16")
    assert ours <= plain / 4


# ---------------------------------------------------------------------------------------------------------------- compiled


def operator_arguments():
    x, weight, targets = draw(V=65)
    x, weight, targets = x.detach().flatten(0, 1), weight.detach(), targets.flatten()
    losses, logits, maxima, log_sums = kernels.forward(x, weight, targets, -1)
    scale = torch.ones((), device=DEVICE)
    saved = (logits, maxima, log_sums, x, weight, targets, scale)
    return {
        "linear_cross_entropy": [(x, weight, targets, -1, *needs) for needs in ((True, True), (True, False), (False, True))],
        "linear_cross_entropy_logits": [(x, weight, targets, -1)],
        "linear_cross_entropy_backward": [(*saved, None, -1, True, True), (*saved, logits, -1, True, False),
                                          (*saved, None, -1, False, True)],
    }


@pytest.mark.parametrize("name", ("linear_cross_entropy", "linear_cross_entropy_logits", "linear_cross_entropy_backward"))
def test_the_registered_operator_passes_opcheck(name):
    for args in operator_arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.nanogpt_fast, name), args)


@ROUTES
@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
@pytest.mark.parametrize("autocast", (False, True), ids=("fp32", "autocast"))
def test_compiled_it_is_one_graph_for_any_length_and_gives_the_same(return_logits, compiler, autocast):
    _, weight, _ = draw()

    def step(x, weight, targets):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss, logits = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)
        return loss, logits

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for T in (7, 9, 12, 5):
        x, _, targets = draw(T=T)
        outs = []
        for run in (compiled, step):
            loss, logits = run(x, weight, targets)
            outs.append((loss, *gradients(loss, x, weight), *(() if logits is None else (logits,))))
        tolerance = dict(rtol=2e-2, atol=2e-3) if autocast else {}
        torch.testing.assert_close(*outs, **tolerance)
    assert counter.frame_count <= 2  # the first length, then any


@ROUTES
def test_it_can_be_exported(return_logits):
    class Head(torch.nn.Module):

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(draw()[1].detach())

        def forward(self, x, targets):
            return linear_cross_entropy(x, self.weight, targets, return_logits=return_logits, backend=FUSED)

    x, _, targets = draw()
    head, T = Head(), torch.export.Dim("T", min=2, max=64)
    exported = torch.export.export(head, (x.detach(), targets), dynamic_shapes=({1: T}, {1: T})).module()
    x, _, targets = draw(T=11)
    torch.testing.assert_close(exported(x.detach(), targets)[0], head(x.detach(), targets)[0])


# ------------------------------------------------------------------------------------------------------- which one is taken


def test_auto_and_fused_take_the_kernel_only_where_it_is_right():
    x, weight, targets = draw()
    assert implementation(x, weight, targets, backend=FUSED) == "triton"
    automatic = implementation(x, weight, targets, backend=backend.parse("auto"))
    assert automatic == ("reference" if harness.INTERPRETED else "triton")
    for bad, why in (((x.double(), weight.double()), "float64"), ((x.half(), weight), "autocast is off")):
        with pytest.raises(RuntimeError, match=why):
            implementation(*bad, targets, backend=FUSED)


@pytest.mark.parametrize("return_logits", [True, False])
def test_targets_with_a_stride_of_their_own_are_read_as_they_are(device, return_logits):
    x, weight = torch.randn(4, 16, device=device), torch.randn(33, 16, device=device)
    every_other = torch.randint(33, (8,), device=device)[::2]
    for targets in (every_other, torch.tensor(5, device=device).expand(4)):
        loss = linear_cross_entropy(x, weight, targets, return_logits=return_logits, backend=FUSED)[0]
        assert torch.allclose(loss, torch.nn.functional.cross_entropy(x @ weight.t(), targets), atol=1e-4)
