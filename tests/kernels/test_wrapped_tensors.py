"""A tensor that wraps others (DTensor, a quantized weight) has no memory for a kernel to read: the ops step aside and say so."""
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from nanogpt_fast import ops


def wrapped(*shape):
    tensor = torch.randn(*shape)
    return TwoTensor(tensor, tensor.clone())


def rows(*shape):
    return torch.randn(*shape)


CALLS = {
    "layer_norm": lambda a, b, **how: ops.layer_norm(a(2, 8, 32), b(32), b(32), **how),
    "add_layer_norm": lambda a, b, **how: ops.add_layer_norm(a(2, 8, 32), b(2, 8, 32), b(32), None, **how)[1],
    "causal_attention": lambda a, b, **how: ops.causal_attention(a(1, 2, 8, 16), b(1, 2, 8, 16), b(1, 2, 8, 16), **how),
    "causal_attention_qkvpacked": lambda a, b, **how: ops.causal_attention_qkvpacked(a(1, 8, 96), n_head=2, **how),
    "gelu_mlp": lambda a, b, **how: ops.gelu_mlp(a(8, 32), b(128, 32), b(128), b(32, 128), None, **how),
    "linear_cross_entropy": lambda a, b, **how: ops.linear_cross_entropy(a(8, 32), b(65, 32), torch.zeros(8, dtype=torch.int64), return_logits=False,
                                                                         **how)[0],
}


@pytest.mark.parametrize("op", CALLS)
def test_a_kernel_is_refused_with_the_reason(op):
    kinds = [(wrapped, wrapped), (wrapped, rows)] + [(rows, wrapped)] * (op != "causal_attention_qkvpacked")
    for first, others in kinds:
        with pytest.raises(RuntimeError, match="triton: a tensor is a TwoTensor, which wraps other tensors"):
            CALLS[op](first, others, backend="fused")


@pytest.mark.parametrize("op", CALLS)
def test_auto_takes_plain_pytorch(op):
    if op == "linear_cross_entropy":
        pytest.skip("plain PyTorch's loss does not take such an x with ordinary targets either")
    found = CALLS[op](wrapped, wrapped, backend="auto")
    assert type(found) is TwoTensor
    torch.testing.assert_close(found.a, found.b)


def test_the_sampler_says_what_it_expects():
    with pytest.raises(ValueError, match="logits is a TwoTensor, which wraps other tensors; expected a plain one"):
        ops.sample(wrapped(2, 65))
