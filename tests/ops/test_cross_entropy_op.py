"""linear_cross_entropy where no kernel runs: nanoGPT's own calls, clear errors, and the reason for the fallback."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from nanogpt_fast import backend
from nanogpt_fast.ops.cross_entropy import CANDIDATES, implementation, linear_cross_entropy

REFERENCE = backend.parse("reference")


def draw(V=65):
    x, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
    targets = torch.randint(0, V, (2, 5))
    targets[0, 0] = -1
    return x, weight, targets


def nanogpt(x, weight, targets):
    """The last lines of nanoGPT's forward."""
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1), logits


@pytest.mark.parametrize("autocast", (False, True), ids=("fp32", "bf16 autocast"))
def test_the_reference_is_nanogpts_bit_for_bit(autocast):
    x, weight, targets = draw()
    results = []
    for function in (lambda: linear_cross_entropy(x, weight, targets, backend=REFERENCE), lambda: nanogpt(x, weight, targets)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, logits = function()
        results.append((loss, logits, *torch.autograd.grad(loss, (x, weight))))
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_without_logits_the_reference_returns_none_for_them():
    x, weight, targets = draw()
    loss, logits = linear_cross_entropy(x, weight, targets, return_logits=False, backend=REFERENCE)
    assert logits is None and torch.equal(loss, nanogpt(x, weight, targets)[0])


def test_targets_of_any_layout_and_the_sum_are_taken():
    x, weight, targets = draw()
    strided = targets.t().contiguous().t()
    loss, logits = linear_cross_entropy(x, weight, strided, reduction="sum", backend=REFERENCE)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"))


@pytest.mark.parametrize("backend_choice", ("reference", "auto"))
def test_wrong_arguments_are_named(backend_choice):
    x, weight, targets = draw()
    choice = backend.parse(backend_choice)
    for error, message, args, kwargs in (
        (ValueError, "reduction is 'none': expected 'mean' or 'sum'", (x, weight, targets), dict(reduction="none")),
        (TypeError, "targets are torch.int32: expected int64", (x, weight, targets.int()), {}),
        (ValueError, r"x \(2, 5, 15\) and weight \(65, 16\)", (x[..., 1:], weight, targets), {}),
        (ValueError, r"targets \(2, 4\): expected one for each row", (x, weight, targets[:, 1:]), {}),
    ):
        with pytest.raises(error, match=message):
            linear_cross_entropy(*args, backend=choice, **kwargs)


def test_a_target_outside_of_the_vocabulary_raises_on_a_cpu():
    x, weight, targets = draw()
    targets[1, 1] = 65
    with pytest.raises(IndexError):
        linear_cross_entropy(x, weight, targets, backend=REFERENCE)


@pytest.mark.skipif(torch.cuda.is_available() or backend.interpreted(), reason="a kernel can run here")
def test_without_a_gpu_auto_takes_the_reference_and_fused_says_why_it_cannot():
    x, weight, targets = draw()
    assert implementation(x, weight, targets, backend=backend.parse("auto")) == "reference"
    with pytest.raises(RuntimeError, match="cross_entropy: triton: Triton kernels need a CUDA tensor, this one is on cpu"):
        linear_cross_entropy(x, weight, targets, backend=backend.parse("fused"))


def test_importing_the_op_does_not_import_triton():
    code = "import sys, nanogpt_fast.ops.cross_entropy; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert [name for name, _ in CANDIDATES] == ["triton", "cpp"]
