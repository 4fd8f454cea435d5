"""Whatever view of its memory an op is given, it computes with the view's values: the extension and the kernels read memory by address."""
import pytest
import torch

from nanogpt_fast.ops import attention, cross_entropy, linear, mlp, norm, sampler
from nanogpt_fast.ops.cpu import adamw

B, T, C, V = 2, 16, 128, 300
TARGETS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
BF16 = torch.bfloat16
# A view may take another matmul than a contiguous tensor does, which rounds elsewhere, in bf16 also what is then cast to fp32. A wrong sign
# or place is off by its whole value.
TOLERANCE = {torch.float32: 1e-4, BF16: 3e-2}


def negative(x):
    return torch._neg_view(-x)


def shifted(x):
    return torch.cat((torch.full((3,), 7, dtype=x.dtype), x.flatten()))[3:].view(x.shape)


def every_second(x):
    return torch.stack((x, x + 1), dim=-1)[..., 0]


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def repeated(x):
    return x[:1].expand(x.shape)


def loss(x, weight, **options):
    found = cross_entropy.linear_cross_entropy(x, weight, TARGETS, **options)
    return found[0] + (0 if found[1] is None else found[1].float().square().mean())


OPS = {  # name: (the op, whose first result is compared, shapes and dtypes of its arguments)
    "attention": (lambda qkv: attention.causal_attention_qkvpacked(qkv, 4), [((B, T, 3 * C), BF16)]),
    "attention in float32": (lambda qkv: attention.causal_attention_qkvpacked(qkv, 4), [((B, T, 3 * C), torch.float32)]),
    "layer_norm": (norm.layer_norm, [((B, T, C), BF16), ((C,), torch.float32), ((C,), torch.float32)]),
    "add_layer_norm": (lambda *a: norm.add_layer_norm(*a, out_dtype=BF16)[1],
                       [((B, T, C), torch.float32), ((B, T, C), BF16), ((C,), torch.float32), ((C,), torch.float32)]),
    "the sum of add_layer_norm": (lambda *a: norm.add_layer_norm(*a, out_dtype=BF16)[0],
                                  [((B, T, C), torch.float32), ((B, T, C), BF16), ((C,), torch.float32), ((C,), torch.float32)]),
    "mlp": (mlp.gelu_mlp, [((C, C), BF16), ((4 * C, C), BF16), ((4 * C,), BF16), ((C, 4 * C), BF16), ((C,), BF16)]),
    "linear": (lambda x, w, b, copy: linear.linear(x, w, b, copy=copy.detach()),
               [((2 * C, C), BF16), ((C, C), torch.float32), ((C,), torch.float32), ((C, C), BF16)]),
    "linear in float32": (lambda x, w, b: linear.linear(x, w, b, copy=w.detach()),
                          [((2 * C, C), torch.float32), ((C, C), torch.float32), ((C,), torch.float32)]),
    "loss": (lambda *a: loss(*a, return_logits=False), [((B, T, C), BF16), ((V, C), BF16)]),
    "loss and logits": (loss, [((B, T, C), BF16), ((V, C), BF16)]),
    "loss in float32": (lambda *a: loss(*a, return_logits=False), [((B, T, C), torch.float32), ((V, C), torch.float32)]),
}


def computed(function, tensors, wrap, gradient):
    """The result and the gradients of all tensors, for a result's gradient seen through `wrap`."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*tensors)
    y.backward(wrap(gradient(y)) if y.dim() else gradient(y))
    return y.detach(), *(tensor.grad for tensor in tensors)


@pytest.mark.parametrize("view", [negative, shifted, every_second, transposed, repeated])
@pytest.mark.parametrize("name", OPS)
def test_an_op_computes_with_the_values_of_a_view(name, view):
    function, arguments = OPS[name]
    generator = torch.Generator().manual_seed(1)
    seen = [view((torch.randn(shape, generator=generator) / shape[-1] ** 0.25).to(dtype)) for shape, dtype in arguments]
    plain = [tensor.resolve_neg().clone(memory_format=torch.contiguous_format) for tensor in seen]

    def gradient(y):
        return torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)

    def as_plain(x):
        return view(x).resolve_neg().clone(memory_format=torch.contiguous_format)
    tolerance = max(TOLERANCE[dtype] for _, dtype in arguments)
    for a, b in zip(computed(function, seen, view, gradient), computed(function, plain, as_plain, gradient)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * max(1, b.abs().max().item()))


@pytest.mark.parametrize("view", [negative, shifted, every_second, transposed, repeated])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_sampling_reads_the_values_of_a_view(dtype, view):
    generator = torch.Generator().manual_seed(1)
    logits, rows = view(torch.randn(8, V, generator=generator).to(dtype)), torch.rand(8, generator=generator) + 0.5
    plain = logits.resolve_neg().clone(memory_format=torch.contiguous_format)
    drawn = sampler.sample(logits, seed=5, temperature=view(rows), top_p=view(rows / 2))
    rows = view(rows).resolve_neg().contiguous(), view(rows / 2).resolve_neg().contiguous()
    assert torch.equal(drawn, sampler.sample(plain, seed=5, temperature=rows[0], top_p=rows[1]))


@pytest.mark.parametrize("name", ["logits", "out", "seed", "offset", "temperature", "top_k"])
def test_what_a_captured_draw_cannot_copy_is_refused(name):
    tensors = dict(logits=torch.randn(2, V), temperature=torch.ones(2), **{n: torch.zeros(2, dtype=torch.long) for n in (
        "out", "seed", "offset", "top_k")})
    tensors[name] = negative(tensors[name])
    with pytest.raises(ValueError, match=rf"{name} is a view that is negative lazily .*expected {name}.resolve_neg\(\)"):
        sampler.sample_out(**tensors)


def test_the_gradients_of_adamw_are_read_as_they_are():
    gradient = negative(torch.randn(30))
    weight = torch.nn.Parameter(torch.randn(30))
    weight.grad = gradient
    assert "not a contiguous float32 tensor" in adamw.why_not(torch.optim.AdamW([weight])) or adamw.MISSING
    torch.testing.assert_close(adamw.norm([gradient]), gradient.norm())
