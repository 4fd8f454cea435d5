"""Weights and their AdamW, to take its steps in several ways. Both halves of the suite import this."""
import copy

import torch

SIZES = ((1,), (15,), (17,), (40, 33), (1000003,))   # less than a vector, more, several pieces and a bit


def numbers(seed):
    """A generator: other numbers for each seed, and for each seed of torch's own generator (pytest's --seeds)."""
    return torch.Generator().manual_seed((torch.initial_seed() + seed) % 2**63)


class Side:
    """Weights that decay, weights that don't, and their AdamW."""

    def __init__(self, sizes=SIZES, dtype=torch.float32, device="cpu", half=torch.bfloat16, **options):
        generator = numbers(0)
        self.weights = [torch.nn.Parameter((0.5 * torch.randn(size, generator=generator)).to(device, dtype)) for size in sizes]
        groups = [dict(params=self.weights[1::2], weight_decay=0.3), dict(params=self.weights[::2], weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, **{**dict(lr=1e-2, betas=(0.9, 0.95), fused=True), **options})
        self.copies = {p: p.detach().to(half) for p in self.weights}

    def draw(self, seed, scale=1e-2):
        generator = numbers(1 + seed)
        for p in self.weights:
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p)
        return [p.grad for p in self.weights]

    def multiply(self, factor):
        for p in self.weights:
            p.grad.mul_(factor)

    def tensors(self):
        """{name: tensor}: weights, moments and counts."""
        states = [self.optimizer.state[p] for p in self.weights]
        return {f"{name} {i}": tensor.detach() for i, (p, state) in enumerate(zip(self.weights, states))
                for name, tensor in dict(weight=p, **state).items()}


def same(a, b):
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_states(make):
    """Our steps go on from a state that was saved, and PyTorch goes on from ours. make(): a Side with `steps`, which takes ours."""
    straight, first, second, theirs = (make() for _ in range(4))
    straight.steps(range(4))
    saved = first.steps(range(2)).optimizer.state_dict()
    for side in (second, theirs):
        side.optimizer.load_state_dict(copy.deepcopy(saved))
        for p, q in zip(side.weights, first.weights):
            p.data.copy_(q.data)
    assert same(second.steps((2, 3)), straight)
    for seed in (2, 3):
        theirs.draw(seed)
        theirs.optimizer.step()
    for (name, a), b in zip(theirs.tensors().items(), straight.tensors().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
