"""causal_attention and causal_attention_qkvpacked on their kernels: autograd, autocast, layouts, checkpointing, compile, export."""
import harness
import pytest
import torch
import torch._dynamo.testing
from harness import assert_close_to_oracle, same_bits
from torch.utils.checkpoint import checkpoint

from nanogpt_fast import backend, reference
from nanogpt_fast.ops import attention as op
from nanogpt_fast.ops.attention import causal_attention, causal_attention_qkvpacked, decode_attention

FUSED = backend.parse("fused")
DEVICE = harness.DEVICE
H = 2


def draw(B=1, T=20, C=32, dtype=torch.float32):
    return torch.randn(B, T, 3 * C, device=DEVICE).to(dtype).requires_grad_()


def draw_qkv(B=1, Tq=20, Tk=None, D=16, dtype=torch.float32):
    return tuple(torch.randn(B, H, T, D, device=DEVICE).to(dtype).requires_grad_() for T in (Tq, Tk or Tq, Tk or Tq))


@pytest.mark.parametrize("autocast", (None, torch.bfloat16))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_output_and_gradient_are_as_near_to_fp64_as_the_reference(dtype, autocast):
    qkv = draw(dtype=dtype, T=50)
    with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
        y = causal_attention_qkvpacked(qkv, H, backend=FUSED)
        plain = reference.causal_attention_qkvpacked(qkv, H)
    exact_qkv = qkv.detach().double().requires_grad_()
    exact = reference.causal_attention_qkvpacked(exact_qkv, H)
    dy = torch.randn_like(y)
    assert y.dtype == plain.dtype == (autocast or dtype) and y.is_contiguous()
    assert_close_to_oracle(y, exact, plain, "forward")
    (dqkv,), (plain_dqkv,), (exact_dqkv,) = (torch.autograd.grad(o, i, dy.to(o.dtype)) for o, i in ((y, qkv), (plain, qkv), (exact, exact_qkv)))
    assert dqkv.dtype == qkv.dtype
    assert_close_to_oracle(dqkv, exact_dqkv, plain_dqkv, "gradient")


def by_cudnn(q, k, v, bias, want_lse, dropout_p, causal, debug, *, scale):
    """What PyTorch's cuDNN operator returns first: (B, H, T, D) over memory in the order of q's, and the natural logarithm of the
    sum of exponentials, (B, H, T, 1)."""
    assert bias is None and want_lse in (torch.is_grad_enabled(), True) and dropout_p == 0 and causal and not debug
    T, scale = q.size(2), q.size(3) ** -0.5 if scale is None else scale
    scores = (scale * q.float() @ k.float().transpose(2, 3)).masked_fill(torch.ones(T, T, device=q.device).triu(1).bool(), float("-inf"))
    return torch.empty_like(q).copy_(scores.softmax(3) @ v.float()), scores.logsumexp(3, keepdim=True), None, None


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("scale, time_first", ((None, False), (0.3, False), (None, True)))
def test_cudnns_forward_fits_the_kernels_backward(scale, time_first, compiled, monkeypatch):
    """Its logarithm and its layout, on a stand-in for cuDNN: a GPU takes the operator itself in `verify`."""
    monkeypatch.setattr(op, "CANDIDATES", (("cudnn", lambda *args: None),))
    monkeypatch.setattr(op, "_cudnn_attention", by_cudnn)
    call = lambda qkv: causal_attention_qkvpacked(qkv, H, scale=scale)
    qkv = draw(B=2, dtype=torch.bfloat16, T=70)
    if time_first:
        qkv = qkv.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(qkv)
    plain = reference.causal_attention_qkvpacked(qkv, H, scale=scale)
    exact_qkv = qkv.detach().double().requires_grad_()
    exact = reference.causal_attention_qkvpacked(exact_qkv, H, scale=scale)
    dy = torch.randn_like(y)
    assert_close_to_oracle(y, exact, plain, "forward")
    (dqkv,), (plain_dqkv,), (exact_dqkv,) = (torch.autograd.grad(o, i, dy.to(o.dtype)) for o, i in ((y, qkv), (plain, qkv), (exact, exact_qkv)))
    assert_close_to_oracle(dqkv, exact_dqkv, plain_dqkv, "gradient")


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_cudnns_forward_of_separate_tensors_fits_the_kernels_backward(compiled, monkeypatch):
    """Each tensor in another order of memory: cuDNN's output lies as q does."""
    monkeypatch.setattr(op, "SEPARATE_CANDIDATES", (("cudnn", lambda *args: None),))
    monkeypatch.setattr(op, "_cudnn_attention", by_cudnn)
    q, k, v = draw_qkv(Tq=37, Tk=37, dtype=torch.bfloat16)
    k = k.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    call = lambda *tensors: causal_attention(*tensors, scale=0.4)
    call = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    for q in (q, q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()):
        y, plain = call(q, k, v), reference.causal_attention(q, k, v, scale=0.4)
        exact_of = [x.detach().double().requires_grad_() for x in (q, k, v)]
        exact = reference.causal_attention(*exact_of, scale=0.4)
        dy = torch.randn_like(y)
        assert_close_to_oracle(y, exact, plain, "forward")
        with torch.no_grad():
            assert same_bits(call(q, k, v), y.detach())
        for ours, theirs, wanted in zip(*(torch.autograd.grad(o, i, dy.to(o.dtype))
                                          for o, i in ((y, (q, k, v)), (plain, (q, k, v)), (exact, exact_of))), strict=True):
            assert_close_to_oracle(ours, wanted, theirs, "gradient")


def test_separate_tensors_give_what_the_packed_projection_gives():
    qkv = draw()
    packed = causal_attention_qkvpacked(qkv, H, backend=FUSED)
    q, k, v = (x.detach().requires_grad_() for x in reference.split_heads(qkv, H))
    y = causal_attention(q, k, v, backend=FUSED)
    assert same_bits(y.transpose(1, 2).reshape(packed.shape), packed)
    dy = torch.randn_like(packed)
    (dqkv,) = torch.autograd.grad(packed, qkv, dy)
    separate = torch.autograd.grad(y, (q, k, v), dy.view(1, 20, H, 16).transpose(1, 2))
    for a, b in zip(separate, reference.split_heads(dqkv, H), strict=True):
        assert same_bits(a, b)


def test_fewer_queries_and_a_scale_are_what_the_reference_makes_of_them():
    q, k, v = draw_qkv(Tq=5, Tk=37)
    y, plain = causal_attention(q, k, v, scale=0.7, backend=FUSED), reference.causal_attention(q, k, v, scale=0.7)
    torch.testing.assert_close(y, plain)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(plain, (q, k, v), dy))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dimension strided": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[:1].expand(x.shape),
    "all one": lambda x: x.flatten()[:1].expand(x.shape),
    "offset into a larger one": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1))[..., 1:-1, 3:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_output_gradients_of_any_layout_are_right(layout):
    make = LAYOUTS[layout]
    qkv, dy = make(draw(B=2, T=9).detach()), make(torch.randn(2, 9, 32, device=DEVICE))
    results = []
    for x, g in ((qkv, dy), (qkv.contiguous(), dy.contiguous())):
        x.requires_grad_()
        y = causal_attention_qkvpacked(x, H, backend=FUSED)
        results.append((y, *torch.autograd.grad(y, x, g)))
    assert all(same_bits(a.contiguous(), b) for a, b in zip(*results, strict=True))


def test_keys_and_values_of_different_layouts_are_right():
    q, k, v = draw_qkv()
    v2 = v.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert v2.stride() != k.stride()
    a, b = causal_attention(q, k, v, backend=FUSED), causal_attention(q, k, v2, backend=FUSED)
    assert same_bits(a, b)
    assert same_bits(*(torch.autograd.grad(y.sum(), x)[0].contiguous() for y, x in ((a, v), (b, v2))))


def test_only_the_gradients_asked_for_come_back():
    q, k, v = draw_qkv()
    k.requires_grad_(False)
    causal_attention(q, k, v, backend=FUSED).sum().backward()
    assert q.grad is not None and k.grad is None and v.grad is not None


def test_the_backward_may_run_twice_and_gives_the_same_bits():
    qkv = draw()
    y = causal_attention_qkvpacked(qkv, H, dropout_p=0.3, backend=FUSED)
    dy = torch.randn_like(y)
    first, = torch.autograd.grad(y, qkv, dy, retain_graph=True)
    second, = torch.autograd.grad(y, qkv, dy)
    assert same_bits(first, second)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing_drops_the_same_weights_again(use_reentrant):
    qkv, dy = draw(), torch.randn(1, 20, 32, device=DEVICE)
    results = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        y = run(lambda x: causal_attention_qkvpacked(x, H, dropout_p=0.4, backend=FUSED), qkv)
        results.append((y, *torch.autograd.grad(y, qkv, dy)) if not use_reentrant else (y, _backward(y, qkv, dy)))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def _backward(y, x, dy):
    x.grad = None
    y.backward(dy)
    return x.grad.clone()


def test_dropout_draws_anew_each_call_and_not_at_zero():
    qkv = draw().detach()
    dropped = [causal_attention_qkvpacked(qkv, H, dropout_p=0.5, backend=FUSED) for _ in range(2)]
    assert not torch.equal(*dropped)
    assert torch.equal(*(causal_attention_qkvpacked(qkv, H, backend=FUSED) for _ in range(2)))


def test_a_second_derivative_raises():
    qkv = draw(T=4)
    y = causal_attention_qkvpacked(qkv, H, backend=FUSED)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), qkv, create_graph=True)


def test_decoding_is_the_last_row_of_attention():
    q, k, v = draw_qkv(B=2, Tq=1, Tk=40)
    lengths = torch.tensor([40, 13], device=DEVICE)
    with torch.no_grad():
        y = decode_attention(q, k, v, lengths, backend=FUSED)
        for row, n in enumerate((40, 13)):
            expected = reference.causal_attention(q[row:row + 1], k[row:row + 1, :, :n], v[row:row + 1, :, :n])
            torch.testing.assert_close(y[row:row + 1], expected)
        torch.testing.assert_close(y, decode_attention(q, k, v, lengths, backend=backend.parse("reference")))


# ---------------------------------------------------------------------------------------------------------------- what fused refuses


@pytest.mark.parametrize("reason, arguments", (
    ("float64", dict(qkv=torch.zeros(1, 4, 96, dtype=torch.float64))),
    ("head size is 300", dict(qkv=torch.zeros(1, 4, 900), n_head=1)),
    ("scale is -1", dict(qkv=torch.zeros(1, 4, 96), scale=-1.0)),
))
def test_fused_refuses_what_no_kernel_takes_and_says_why(reason, arguments):
    arguments = {"n_head": H} | arguments | {"qkv": arguments["qkv"].to(DEVICE)}
    with pytest.raises(RuntimeError, match=reason):
        causal_attention_qkvpacked(**arguments, backend=FUSED)
    assert causal_attention_qkvpacked(**arguments, backend=backend.parse("reference")).shape[:2] == (1, 4)


def test_auto_falls_back_and_says_so_once():
    backend._noticed.clear()
    qkv = torch.zeros(1, 4, 96, dtype=torch.float64, device=DEVICE)
    with pytest.warns(RuntimeWarning, match="attention runs on plain PyTorch.*float64") as caught:
        for _ in range(3):
            causal_attention_qkvpacked(qkv, H)
    assert len(caught) == 1


# ----------------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_opcheck_passes(dropout_p):
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    q, k, v = (x.detach() for x in draw_qkv(Tq=9, Tk=12))
    out, lse = torch.ops.nanogpt_fast.attention(q, k, v, seed, None, dropout_p)
    qkv = draw(T=9).detach()
    y, packed_lse = torch.ops.nanogpt_fast.attention_qkvpacked(qkv, seed, H, 0.2, dropout_p)
    for name, args in (("attention", (q, k, v, seed, None, dropout_p)), ("attention_qkvpacked", (qkv, seed, H, 0.2, dropout_p)),
                       ("attention_backward", (torch.randn_like(q), q, k, v, out, lse, seed, None, dropout_p)),
                       ("attention_qkvpacked_backward", (torch.randn_like(y), qkv, y, packed_lse, seed, H, 0.2, dropout_p)),
                       ("attention_decode", (q[:, :, :1], k, v, torch.tensor([7], device=DEVICE), None))):
        torch.library.opcheck(getattr(torch.ops.nanogpt_fast, name).default, args)


def test_the_raw_operators_check_what_anybody_may_pass():
    ops = torch.ops.nanogpt_fast
    qkv, seed = torch.randn(1, 5, 48, device=DEVICE), torch.tensor([7], device=DEVICE)
    out, lse = ops.attention_qkvpacked(qkv, None, 2, None, 0.0)
    for unused in (seed, torch.empty(0, dtype=torch.int64, device=DEVICE), torch.zeros(1, device=DEVICE)):      # nothing is dropped
        assert same_bits(ops.attention_qkvpacked(qkv, unused, 2, None, 0.0)[0], out)
        assert same_bits(ops.attention_qkvpacked_backward(out, qkv, out, lse, unused, 2, None, 0.0),
                         ops.attention_qkvpacked_backward(out, qkv, out, lse, None, 2, None, 0.0))
    q, k, v = (torch.randn(1, 2, 5, 8, device=DEVICE) for _ in range(3))
    y, y_lse = ops.attention(q, k, v, None, None, 0.0)
    for error, message, call in (
            (ValueError, "expected \\(B, T, 3C\\)", lambda: ops.attention_qkvpacked(qkv[0], None, 2, None, 0.0)),
            (ValueError, "multiple of n_head=0", lambda: ops.attention_qkvpacked(qkv, None, 0, None, 0.0)),
            (TypeError, "qkv is torch.float64", lambda: ops.attention_qkvpacked(qkv.double(), None, 2, None, 0.0)),
            (ValueError, "seed must be one int64 element", lambda: ops.attention_qkvpacked(qkv, None, 2, None, 0.5)),
            (ValueError, "scale is -1", lambda: ops.attention_qkvpacked(qkv, None, 2, -1.0, 0.0)),
            (ValueError, "the head size is 0", lambda: ops.attention_qkvpacked(qkv[..., :0], None, 2, None, 0.0)),
            (ValueError, "do is .* expected", lambda: ops.attention_qkvpacked_backward(out[:, 1:], qkv, out, lse, None, 2, None, 0.0)),
            (ValueError, "lse is .* expected", lambda: ops.attention_qkvpacked_backward(out, qkv, out, lse.half(), None, 2, None, 0.0)),
            (ValueError, "expected q \\(B, H, Tq, D\\)", lambda: ops.attention(q[0], k, v, None, None, 0.0)),
            (ValueError, "the head size is 0", lambda: ops.attention(q[..., :0], k[..., :0], v[..., :0], None, None, 0.0)),
            (ValueError, "do has shape", lambda: ops.attention_backward(y[0], q, k, v, y, y_lse, None, None, 0.0)),
            (ValueError, "expected q \\(B, H, Tq, D\\)", lambda: ops.attention_decode(q[0], k, v, seed, None))):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_compiled_whole_it_gives_eagers_result_without_recompiling(dropout_p):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(qkv, q, k, v):
        y = causal_attention_qkvpacked(qkv, H, dropout_p=dropout_p, backend=FUSED)
        z = causal_attention(q, k, v, dropout_p=dropout_p, backend=FUSED)
        return y, z

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    inputs = (draw(T=9), *draw_qkv(Tq=9))
    for _ in range(3):
        results = []
        for function in (step, compiled):
            torch.manual_seed(3)
            y, z = function(*inputs)
            results.append((y, z, *torch.autograd.grad((y.square().sum() + z.square().sum()), inputs)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
    if dropout_p:
        assert not torch.equal(compiled(*inputs)[0], compiled(*inputs)[0]), "a new call draws a new mask"
        assert counter.frame_count == 1


def test_it_can_be_exported():
    class Attention(torch.nn.Module):
        def forward(self, qkv):
            return causal_attention_qkvpacked(qkv, H, backend=FUSED)

    qkv = draw(T=9)
    exported = torch.export.export(Attention(), (qkv,))
    assert "nanogpt_fast.attention_qkvpacked" in str(exported.graph)
    torch.testing.assert_close(exported.module()(qkv), causal_attention_qkvpacked(qkv, H, backend=FUSED))


def test_a_captured_seed_is_saved_and_the_bytes_kept_are_those_documented():
    """6C of qkv, 2C of out and 4H of lse for a token in half precision."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        causal_attention_qkvpacked(draw(T=20, dtype=torch.bfloat16), H, dropout_p=0.1, backend=FUSED)
    assert sum(x.numel() * x.element_size() for x in saved) == 20 * (8 * 32 + 4 * H) + 8


def test_lengths_with_a_stride_of_their_own_are_read_as_they_are(device):
    q, k, v = (torch.randn(3, 2, t, 16, device=device) for t in (1, 20, 20))
    for lengths in (torch.tensor([5], device=device).expand(3), torch.tensor([5, 0, 9, 0, 20, 0], device=device)[::2]):
        y = decode_attention(q, k, v, lengths, backend=FUSED)
        expected = decode_attention(q, k, v, lengths, backend=backend.parse("reference"))
        assert torch.allclose(y, expected, atol=1e-5)
