"""causal_attention where no kernel runs: nanoGPT's own calls, clear errors and the reasons."""
import cards
import pytest
import torch

from nanogpt_fast import backend, reference
from nanogpt_fast.kernels import fastest
from nanogpt_fast.ops import attention as op
from nanogpt_fast.ops.attention import causal_attention, causal_attention_qkvpacked, decode_attention

REFERENCE = backend.parse("reference")


def nanogpt(qkv, n_head):
    """The middle of nanoGPT's CausalSelfAttention.forward."""
    B, T, C3 = qkv.size()
    C = C3 // 3
    q, k, v = qkv.split(C, dim=2)
    k = k.view(B, T, n_head, C // n_head).transpose(1, 2)
    q = q.view(B, T, n_head, C // n_head).transpose(1, 2)
    v = v.view(B, T, n_head, C // n_head).transpose(1, 2)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=True)
    return y.transpose(1, 2).contiguous().view(B, T, C)


@pytest.mark.parametrize("autocast", (False, True), ids=("fp32", "bf16 autocast"))
def test_the_reference_is_nanogpts_bit_for_bit(autocast):
    qkv = torch.randn(2, 7, 96, requires_grad=True)
    results = []
    for function in (lambda: causal_attention_qkvpacked(qkv, 4, backend=REFERENCE), lambda: nanogpt(qkv, 4)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function()
        results.append((y, *torch.autograd.grad(y.float().sum(), qkv)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_decoding_on_the_reference_is_the_last_row_of_attention():
    q, k, v = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 8)
    y = decode_attention(q, k, v, torch.tensor([12, 5]), backend=REFERENCE)
    torch.testing.assert_close(y[1:], reference.causal_attention(q[1:], k[1:, :, :5], v[1:, :, :5]))


@pytest.mark.parametrize("choice", ("reference", "auto"))
def test_wrong_arguments_are_named(choice):
    choice = backend.parse(choice)
    q = torch.randn(1, 2, 4, 8)
    for message, call in (
        (r"qkv has shape \(2, 7\)", lambda: causal_attention_qkvpacked(torch.zeros(2, 7), 1, backend=choice)),
        ("multiple of n_head=5", lambda: causal_attention_qkvpacked(torch.zeros(1, 2, 96), 5, backend=choice)),
        ("dropout_p is 1.5", lambda: causal_attention_qkvpacked(torch.zeros(1, 2, 96), 4, dropout_p=1.5, backend=choice)),
        ("Tq <= Tk", lambda: causal_attention(q, q[:, :, :2], q[:, :, :2], backend=choice)),
        (r"expected \(B, H, 1, D\)", lambda: decode_attention(q, q, q, torch.tensor([1]), backend=choice)),
        (r"lengths has shape \(2,\)", lambda: decode_attention(q[:, :, :1], q, q, torch.tensor([1, 2]), backend=choice)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(torch.cuda.is_available() or backend.interpreted(), reason="kernels can run here")
def test_fused_says_that_it_needs_cuda():
    with pytest.raises(RuntimeError, match="need a CUDA tensor, this one is on cpu"):
        causal_attention_qkvpacked(torch.zeros(1, 2, 96), 4, backend=backend.parse("fused"))


def row(D=64, dtype=torch.bfloat16, tokens=16384, dropout_p=0.0, gradient=True):
    """What `auto` takes for qkv of `tokens` tokens, by the table, on the card of `on_card`."""
    found = op.row_for(torch.zeros(tokens // 128, 128, 3, requires_grad=gradient), dtype, D, None, dropout_p)
    return "triton" if found is None else found.note if found.use == "reference" else found.use


def test_auto_leaves_the_training_of_small_heads_to_pytorch(monkeypatch):
    cards.on_card(monkeypatch, 90)
    assert "heads of 32" in row(D=32) and "heads of 32" in row(D=16)
    assert {row(D=32, tokens=8192), row(D=32, dropout_p=0.1), row(D=32, gradient=False)} == {"triton"}
    cards.on_card(monkeypatch, 80)
    assert row(D=32) == "triton"


@pytest.mark.parametrize("arch, D, dtype, left", (
    (90, 64, torch.bfloat16, None), (90, 32, torch.float16, None), (90, 128, torch.bfloat16, "cuDNN"), (90, 64, torch.float32, "float32"),
    (80, 64, torch.bfloat16, None), (89, 64, torch.bfloat16, None), (100, 64, torch.bfloat16, "Blackwell"), (86, 128, torch.float16, "FlashAttention"),
))
def test_auto_leaves_to_pytorch_what_the_table_says(arch, D, dtype, left, monkeypatch):
    cards.on_card(monkeypatch, arch)
    found = row(D, dtype, tokens=128)
    assert found in ("triton", "cudnn") if left is None else left in found and ("not measured yet" in found or "H100" in found)


def test_cudnns_forward_is_taken_where_it_was_measured_faster_and_nowhere_else(monkeypatch):
    class Packed:       # a projection on an H100
        is_cuda = requires_grad = True
        get_device = lambda self: 0

        def __init__(self, *shape, column=1):
            self.shape, self.column = shape or (2, 16, 192), column

        size, stride = lambda self, i: self.shape[i], lambda self, i: self.column
        numel = lambda self: self.shape[0] * self.shape[1] * self.shape[2]
    cards.on_card(monkeypatch, 90)
    monkeypatch.setattr(backend, "triton_why_not", lambda *tensors: None)
    monkeypatch.setattr(op, "_why_no_cudnn", lambda: None)

    def taken(dtype=torch.bfloat16, D=64, choice="auto", dropout_p=0.0, qkv=Packed()):
        chosen = backend.parse(choice)
        return backend.choose("attention", op.CANDIDATES, chosen, (qkv, dtype, D, None, dropout_p), op.row_for) == "cudnn"
    assert taken() and taken(torch.float16)
    assert not any((taken(torch.float32), taken(D=128), taken(D=32), taken(choice="fused"), taken(dropout_p=0.1)))
    assert not any(taken(qkv=qkv) for qkv in (Packed(2, 1, 192), Packed(0, 16, 192), Packed(column=2)))    # what cuDNN does not take
    with torch.no_grad():       # prompts of all lengths would be a plan for each
        assert taken(qkv=Packed(128, 128, 192)) and not any(taken(qkv=Packed(*shape)) for shape in ((2, 128, 192), (130, 127, 192)))
    assert not taken(qkv=torch.zeros(1, 2, 192, requires_grad=True))
    monkeypatch.setattr(op, "_why_no_cudnn", lambda: "cuDNN's attention is switched off")
    assert "switched off" in op._cudnn_why_not(Packed(), torch.bfloat16, 64, None, 0.0)
    assert not taken()
    monkeypatch.setattr(op, "_why_no_cudnn", lambda: None)
    assert taken()
    cards.on_card(monkeypatch, 80)
    assert not taken()


def test_cudnns_forward_of_separate_tensors_is_taken_for_as_many_queries_as_keys(monkeypatch):
    class Heads(torch.Tensor):      # on an H100
        is_cuda = True
        get_device = lambda self: 0
    cards.on_card(monkeypatch, 90)
    monkeypatch.setattr(backend, "triton_why_not", lambda *tensors: None)
    monkeypatch.setattr(op, "_why_no_cudnn", lambda: None)

    def chosen(Tq=128, Tk=128, D=64, choice="auto", dropout_p=0.0, dtype=torch.bfloat16, gradient=True, turned=False, B=2):
        q, k, v = (torch.zeros(B, 3, T, D, dtype=dtype).as_subclass(Heads).requires_grad_(gradient) for T in (Tq, Tk, Tk))
        k = k.transpose(2, 3).contiguous().transpose(2, 3) if turned else k
        return backend.choose("attention", op.SEPARATE_CANDIDATES, backend.parse(choice), (q, k, v, dtype, None, dropout_p), op.separate_row_for)
    assert {chosen(), chosen(dtype=torch.float16), chosen(100, 100), chosen(gradient=False, B=128)} == {"cudnn"}
    assert {chosen(Tq=64), chosen(dropout_p=0.1), chosen(choice="fused"), chosen(D=32), chosen(gradient=False), chosen(100, 100, gradient=False, B=200), chosen(turned=True),
            chosen(1, 1), chosen(D=32, gradient=False, B=128), chosen(D=32, dropout_p=0.1, B=128)} == {"triton"}
    assert chosen(dtype=torch.float32) == chosen(D=32, B=128) == chosen(D=16, B=128) == "reference"


def test_without_cudnns_attention_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert "enable_cudnn_sdp" in op._why_no_cudnn()
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert "no cuDNN" in op._why_no_cudnn()


def test_the_choice_on_a_gpu_can_be_traced(monkeypatch):
    """The table decides on CUDA alone: a construct that Dynamo refuses there would show on no CPU. Sizes may be symbols."""
    for arch, D, dynamic, left in ((80, 64, False, False), (90, 64, True, False), (90, 128, False, True), (100, 64, True, True)):
        torch._dynamo.reset()
        cards.on_card(monkeypatch, arch)

        def chosen(x):
            found = fastest.find("attention", 0, "half", size=D, tokens=x.size(0) * x.size(1), length=x.size(1))
            return x + 1 if found is not None and found.use == "reference" else x - 1
        compiled = torch.compile(chosen, fullgraph=True, backend="eager", dynamic=dynamic)
        assert {(compiled(torch.zeros(2, n)) == 1).all().item() for n in (3, 5, 7)} == {left}
