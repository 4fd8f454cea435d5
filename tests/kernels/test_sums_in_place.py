"""From the second micro-batch on, backwards add to the gradients in place (ops/linear.py): autograd's sums, and autograd's way where somebody
waits for a gradient."""
import copy

import gpts
import pytest
import torch
from harness import assert_close_to_oracle

from nanogpt_fast.ops import linear
from nanogpt_fast.training import embedding
from nanogpt_fast.training.half_weights import HalfWeights

BATCHES = 3


@pytest.fixture
def model(device):
    return gpts.small(backend="fused", n_layer=1).to(device)


def gradients(model, weights, device, by_row=True, before=lambda: None):
    """Of BATCHES micro-batches, as the trainer sums them."""
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(BATCHES):
        x, y = torch.randint(30, (2, 1, 20), generator=generator).to(device)
        with embedding.gradient_by_row(model, by_row), weights.in_use():
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(x, y, return_logits=False)[1]
            before()
            loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def summed(device):
    """The weights with copies whose gradients a kernel or cuBLAS computes; on a CPU attention's are PyTorch's."""
    mlp = {"transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight", "transformer.wte.weight"}
    return mlp | ({"transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"} if device.type == "cuda" else set())


@pytest.mark.parametrize("by_row", [True, False])
def test_sums_in_place_are_as_near_to_fp64_as_autograds(by_row, model, device, monkeypatch):
    names, taken, original = {id(p): name for name, p in model.named_parameters()}, [], linear.takes_a_sum
    found = []
    for in_place in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(linear, "takes_a_sum", lambda weight: original(weight) and (taken.append(names[id(weight)]) or True))
            found.append(gradients(model, HalfWeights(model, torch.bfloat16, in_place=in_place), device, by_row))
        if in_place:
            assert {name: taken.count(name) for name in taken} == {
                name: (BATCHES - 1) * (1 + (by_row and name == "transformer.wte.weight")) for name in summed(device)}
            taken.clear()
    assert set(taken) <= {"transformer.wte.weight"}     # by the embedding's rows
    oracle = copy.deepcopy(model).double()
    oracle.set_backend("reference")
    exact = gradients(oracle, HalfWeights(oracle, torch.float32), device, by_row=False)
    for name, gradient in found[0].items():
        assert_close_to_oracle(gradient, exact[name], found[1][name], "gradient", check_bias=False, what=name)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"])
def test_a_hook_on_a_weight_is_called_each_time(name, kind, model, device):
    weights = HalfWeights(model, torch.bfloat16, in_place=True)
    expected, called = gradients(model, weights, device)[name], []
    getattr(model.get_parameter(name), kind)(lambda tensor: called.append(tensor.shape))
    found = gradients(model, weights, device)[name]
    assert called == [found.shape] * BATCHES
    torch.testing.assert_close(found, expected)


def test_who_replaces_or_reads_gradients_in_between_finds_them(model, device):
    weights = HalfWeights(model, torch.bfloat16, in_place=True)
    expected, weight, seen = gradients(model, weights, device), model.transformer.h[0].mlp.c_fc.weight, []

    def before():
        if weight.grad is not None:
            seen.append(weight.grad.abs().sum().item())
            weight.grad = weight.grad.double().float().t().contiguous().t()      # another layout, to which nothing is added in place
    found = gradients(model, weights, device, before=before)
    assert len(seen) == BATCHES - 1 and 0 < seen[0] != seen[1]
    torch.testing.assert_close(found, expected)


def test_elsewhere_autograd_gets_its_gradients(model, device):
    x, y = torch.randint(30, (2, 1, 20), device=device)
    copied = HalfWeights(model, torch.bfloat16)
    model.transformer.h[0].mlp.c_fc.weight.grad = torch.zeros_like(model.transformer.h[0].mlp.c_fc.weight)
    with copied.in_use(), torch.autocast(device.type, torch.bfloat16):
        loss = model(x, y, return_logits=False)[1]
        assert all(gradient is not None for gradient in torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("change, takes", [
    (lambda p: None, True), (lambda p: setattr(p, "grad", None), False), (lambda p: p.grad.requires_grad_(), False),
    (lambda p: setattr(p, "grad", torch.zeros(4, 3).t()), False), (lambda p: setattr(p, "grad", torch.zeros(3, 4).to_sparse()), False),
    (lambda p: p.register_hook(lambda g: g), False), (lambda p: p.register_post_accumulate_grad_hook(lambda p: None), False)])
def test_what_takes_a_sum(change, takes):
    p = torch.nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.zeros(3, 4)
    change(p)
    assert linear.takes_a_sum(p) == takes


def test_a_gradient_of_another_dtype_takes_none():
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))
    p.grad = torch.zeros(3, 4, dtype=torch.bfloat16)
    assert not linear.takes_a_sum(p)
