"""The training step (training/step.py): clipping inside AdamW, and the loss of accumulated micro-batches."""
import copy

import pytest
import torch
from gpts import small
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nanogpt_fast.training import step
from nanogpt_fast.training.step import TrainingStep, clip_and_step, clips_itself


def weights_and_adamw(scale, fused=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in (3, 1000, 70)]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, fused=fused)
    for p in weights:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(dtype)
    return weights, optimizer


@pytest.mark.parametrize("scale", [1e-3, 1.0, float("nan")])     # a norm below the limit, one above, and none
def test_adamw_divides_by_the_norm_as_clipping_does(scale):
    (ours, adamw), (theirs, other) = weights_and_adamw(scale), weights_and_adamw(scale)
    exact, oracle = weights_and_adamw(scale, dtype=torch.float64)
    for _ in range(2):
        clip_and_step(adamw, ours, 1.0)
        for weights, optimizer in ((theirs, other), (exact, oracle)):
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
    assert not hasattr(adamw, "grad_scale")
    for a, b, c in zip(ours, theirs, exact):
        squares = [optimizer.state[p]["exp_avg_sq"] for optimizer, p in ((adamw, a), (other, b), (oracle, c))]
        for found, plain, right in ((a, b, c), (a.grad, b.grad, c.grad), squares):
            if scale == 1e-3:
                assert torch.equal(found, plain)
            else:
                assert torch.allclose(found.double(), right, rtol=1e-5, atol=1e-9, equal_nan=True)


def test_the_attribute_goes_when_the_step_fails(monkeypatch):
    weights, optimizer = weights_and_adamw(1.0, fused=False)      # which refuses it
    with pytest.raises(AssertionError):
        clip_and_step(optimizer, weights, 1.0)
    assert not hasattr(optimizer, "grad_scale")


def test_only_a_fused_adamw_on_cuda_without_hooks_clips_itself(monkeypatch):
    _, optimizer = weights_and_adamw(1.0)
    assert not clips_itself(optimizer)      # on a CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert clips_itself(optimizer)
    hook = register_optimizer_step_pre_hook(lambda *_: None)
    assert not clips_itself(optimizer)
    hook.remove()
    assert not clips_itself(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    assert not clips_itself(weights_and_adamw(1.0, fused=False)[1])
    optimizer.step = optimizer.step
    assert not clips_itself(optimizer)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_step_clips_in_adamw_where_it_can_and_trains_the_same(accumulation, monkeypatch):
    torch.manual_seed(0)
    models = [small(), None]
    models[1] = copy.deepcopy(models[0])
    x = torch.randint(models[0].config.vocab_size, (accumulation, 2, 8))
    losses = []
    for model, inside in zip(models, (True, False)):
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
        monkeypatch.setattr(step, "clips_itself", lambda _, inside=inside: inside)
        train = TrainingStep(model, optimizer, dtype=torch.float32, batch_shape=(2, 8), not_captured="a CPU", accumulation=accumulation,
                             grad_clip=0.1)
        train._on_cpu = False       # as on a GPU
        batches = iter([(each, each) for each in x.repeat(3, 1, 1)])
        losses.append([train(lambda: next(batches)).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][0] == losses[1][0] and losses[0][2] < losses[0][0]
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)      # a thousandth of the learning rate; a step is up to all of it
