"""The training step (training/step.py) where no kernel ends it: PyTorch's own calls, and the mean loss of the micro-batches."""
import copy

import pytest
import torch
from gpts import small

from nanogpt_fast.training.step import TrainingStep


@pytest.mark.parametrize("grad_clip", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_without_a_kernel_the_step_is_pytorchs_bit_for_bit(accumulation, grad_clip):
    ours = small(backend="reference")
    theirs = copy.deepcopy(ours)
    optimizers = [model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu") for model in (ours, theirs)]
    step = TrainingStep(ours, optimizers[0], dtype=torch.float32, batch_shape=(2, 8), not_captured="a CPU", accumulation=accumulation,
                        grad_clip=grad_clip)
    step._on_cpu = False       # as on a GPU
    assert step.one_pass.why_not() == "asked for the reference"
    batches = torch.randint(65, (3, accumulation, 2, 8), generator=torch.Generator().manual_seed(0))
    for batch in batches:
        micro_batches, expected = iter(batch), 0.0
        loss = step(lambda: (x := next(micro_batches), x))
        for x in batch:
            share = theirs(x, x)[1] / accumulation
            share.backward()
            expected += share.detach()
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip)
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert torch.equal(loss, expected)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
