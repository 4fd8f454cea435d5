"""layer_norm and add_layer_norm without a kernel: the reference path and argument errors."""
import re

import pytest
import torch
import torch.nn.functional as F

from nanogpt_fast import backend
from nanogpt_fast.ops.common import dropout_seed
from nanogpt_fast.ops.norm import add_layer_norm, implementation, layer_norm

REFERENCE = backend.parse("reference")


def arguments(*shape, C=10):
    return torch.randn(*shape, C, requires_grad=True), torch.randn(*shape, C, requires_grad=True), torch.rand(C), torch.randn(C)


def test_the_reference_is_pytorchs_own_call_bit_for_bit():
    x, branch, weight, bias = arguments(2, 3)
    assert torch.equal(layer_norm(x, weight, bias, backend=REFERENCE), F.layer_norm(x, (10,), weight, bias, 1e-5))
    s, y = add_layer_norm(x, branch, weight, None, backend=REFERENCE)
    assert torch.equal(s, x + branch) and torch.equal(y, F.layer_norm(x + branch, (10,), weight, None, 1e-5))
    torch.manual_seed(0)
    s, _ = add_layer_norm(x, branch, weight, bias, dropout_p=0.5, backend=REFERENCE)
    torch.manual_seed(0)
    assert torch.equal(s, x + F.dropout(branch, 0.5))


def test_eps_and_out_dtype_are_obeyed():
    x, branch, weight, bias = arguments(2, 3)
    y = add_layer_norm(x, branch, weight, bias, eps=0.5, out_dtype=torch.bfloat16, backend=REFERENCE)[1]
    assert torch.equal(y, F.layer_norm(x + branch, (10,), weight, bias, 0.5).to(torch.bfloat16))


def test_without_a_branch_the_stream_is_x_itself():
    x, _, weight, bias = arguments(2, 3)
    assert add_layer_norm(x, None, weight, bias, backend=REFERENCE)[0] is x


@pytest.mark.skipif(torch.cuda.is_available() or backend.interpreted(), reason="a kernel can run here")
def test_without_a_gpu_auto_takes_the_reference_and_fused_says_why_it_cannot():
    x, branch, weight, bias = arguments(2)
    assert implementation(x, weight, bias) == "reference"
    with pytest.raises(RuntimeError, match="no kernel can run layer_norm: triton: .*(CUDA tensor|cannot be imported)"):
        add_layer_norm(x, branch, weight, bias, backend=backend.parse("fused"))


@pytest.mark.parametrize("change, message", [
    (dict(weight=torch.ones(9)), r"x \(2, 10\) and weight \(9,\): expected \(..., C\) and \(C,\)"),
    (dict(weight=torch.ones(1, 10)), r"weight \(1, 10\)"),
    (dict(x=torch.tensor(1.0)), r"x \(\) and weight"),
    (dict(bias=torch.ones(9)), r"bias \(9,\): expected \(10,\), like the weight, or None"),
    (dict(branch=torch.ones(3, 10)), r"branch \(3, 10\): expected \(2, 10\), like x, or None"),
    (dict(dropout_p=1.5), "dropout_p is 1.5: expected a probability"),
    (dict(dropout_p=-0.1), "dropout_p is -0.1"),
])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_a_wrong_argument_is_named(change, message, choice):
    given = dict(zip(("x", "branch", "weight", "bias"), arguments(2))) | change
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**given, backend=backend.parse(choice))


def test_a_compiled_program_may_break_its_graph_after_the_first_op_of_the_process(monkeypatch):
    """Dynamo then traces again, and fails if it does not find the same calls: the first choice loads what was measured here."""
    monkeypatch.setattr(backend, "_tuned", False)
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def program(x, weight):
        y = layer_norm(x, weight, None)
        torch._dynamo.graph_break()
        return layer_norm(y, weight, None)
    x, weight = torch.randn(2, 8), torch.rand(8)
    torch.testing.assert_close(program(x, weight), layer_norm(layer_norm(x, weight, None), weight, None))


@pytest.mark.parametrize("seed, about", [
    (7, "7"), (torch.tensor([7.0]), "torch.float32 (1,)"), (torch.tensor([7], dtype=torch.int32), "torch.int32 (1,)"),
    (torch.empty(0, dtype=torch.int64), "torch.int64 (0,)"),
    (torch.empty(1, dtype=torch.int64, device="meta"), "torch.int64 (1,) on meta")])
def test_a_seed_that_a_kernel_would_read_beyond_or_as_something_else_is_refused(seed, about):
    with pytest.raises(ValueError, match=f"seed is {re.escape(about)}.*; expected a tensor, int64 .1,. on cpu, or None"):
        dropout_seed(torch.zeros(2, 8), 0.5, seed)
    assert dropout_seed(torch.zeros(2, 8), 0.0, seed) is None
