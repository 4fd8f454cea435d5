"""torch.func's transforms: the ops step aside for plain PyTorch and say so, since no kernel has rules for them."""
import functools

import pytest
import torch
from gpts import small
from torch.func import functional_call, grad, jvp, vmap

from nanogpt_fast import backend


@pytest.fixture
def model():
    backend._noticed.clear()
    model = small(n_embd=128, block_size=64)
    for block in model.transformer.h:
        block.attn.flash = False                       # PyTorch's fused attention has no forward-mode derivative
    return model


@pytest.fixture
def batch():
    idx = torch.randint(65, (4, 33), generator=torch.Generator().manual_seed(2))
    return idx[:, :-1], idx[:, 1:]


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss(model, P, x, y):
    with torch.autocast("cpu", torch.bfloat16):        # in which the extension's ops would run
        return functional_call(model, P, (x, y))[1]


def gradients(model, x, y):
    """Of the same formulas, by loss.backward()."""
    model.zero_grad()
    with backend.use("reference"):
        loss(model, dict(model.named_parameters()), x, y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("flash", [True, False])
def test_grad_gives_the_gradients_of_backward_and_the_step_aside_is_said_once(flash, model, batch):
    for block in model.transformer.h:
        block.attn.flash = flash
    with pytest.warns(RuntimeWarning, match=r"inside torch.func's transforms \(grad, vmap, jvp, ...\) the ops run on plain PyTorch") as said:
        found = grad(functools.partial(loss, model))(weights(model), *batch)
    assert sum("inside torch.func" in str(warning.message) for warning in said) == 1
    for name, expected in gradients(model, *batch).items():
        torch.testing.assert_close(found[name], expected)


def test_vmap_of_grad_gives_the_gradients_of_each_row(model, batch):
    def one(P, x, y):
        return loss(model, P, x[None], y[None])
    found = vmap(grad(one), in_dims=(None, 0, 0))(weights(model), *batch)
    for row, (x, y) in enumerate(zip(*batch)):
        for name, expected in gradients(model, x[None], y[None]).items():
            error = (found[name][row] - expected).norm() / expected.norm()
            assert error < 5e-3, name                  # 1e-7 measured; a number that bf16 rounds the other way makes it 1e-3


def test_jvp_is_the_product_of_gradient_and_direction(model, batch):
    directions = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for name, p in model.named_parameters()}
    _, found = jvp(lambda P: loss(model, P, *batch), (weights(model),), (directions,))
    expected = sum((g * directions[name]).sum() for name, g in gradients(model, *batch).items())
    assert abs(found - expected) < 2e-2 * abs(expected)    # 5e-3 measured, one rounding to bf16


def test_fused_inside_a_transform_is_an_error_that_says_why(model, batch):
    with backend.use("fused"), pytest.raises(RuntimeError, match="no kernel can run .*: the kernels have no rules for its transforms"):
        grad(functools.partial(loss, model))(weights(model), *batch)


def test_after_a_transform_the_kernels_run_again(model, batch):
    def chosen():
        with backend.recording() as choices:
            loss(model, dict(model.named_parameters()), *batch)
        return [(op, name) for op, _, name, _ in choices]
    before = chosen()
    grad(functools.partial(loss, model))(weights(model), *batch)
    assert chosen() == before
