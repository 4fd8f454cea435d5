"""The end of a CPU training step in one pass over memory: clipping, AdamW, and the weights' bf16 copies (csrc/rows/adamw.h).

PyTorch scales the gradients, updates the weights and casts them in separate passes: 8, 28 and 6 bytes per parameter; one pass moves
30. The formulas are those of PyTorch's fused AdamW, and the state is the optimizer's own: state_dict, checkpoints and a later
optimizer.step() see no difference.
"""
import math

import torch

from .. import adamw, extension
from ..extension import address

MISSING = extension.lacks("gradient_squares_cpu")


def why_not(optimizer):
    """None if `step` does what optimizer.step() would do with the current gradients, else the reason."""
    return MISSING or adamw.why_not(optimizer, "cpu")


def norm(gradients, isa=""):
    """The norm of all gradients together, () fp32: blocks of 2^15 squares are summed in fp32, and the blocks' sums in fp64.

    PyTorch computes it unless all gradients are fp32 on a CPU. isa: the instruction set, as for `_C.sample_cpu`; "" is the best.
    """
    gradients = [gradient.contiguous() for gradient in gradients]
    if MISSING is not None or not all(extension.plain_fp32(gradient, "cpu") for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    addresses, sizes = [gradient.data_ptr() for gradient in gradients], [gradient.numel() for gradient in gradients]
    squares = extension._C.gradient_squares_cpu(addresses, sizes, torch.get_num_threads(), isa)
    return torch.tensor(math.sqrt(squares), dtype=torch.float32, device="cpu")


@torch.no_grad()
def step(optimizer, copies=None, factor=1.0, isa=""):
    """optimizer.step() with the gradients times `factor`; the stored gradients do not change. Requires why_not(optimizer) to be None.

    copies: {weight: its bf16 copy}, contiguous; the copies of updated weights are refreshed. isa: as in `norm`.
    """
    copies, groups, written = copies or {}, [], []
    for group in optimizer.param_groups:
        addresses = []
        for p in group["params"]:
            if p.grad is None:
                continue
            state = optimizer.state[p]
            if not state:
                state.update(step=p.new_zeros((), dtype=torch.float32), exp_avg=torch.zeros_like(p),
                             exp_avg_sq=torch.zeros_like(p))
            m, v, t, copy = state["exp_avg"], state["exp_avg_sq"], state["step"], copies.get(p)
            addresses.append((p.data_ptr(), p.grad.data_ptr(), m.data_ptr(), v.data_ptr(), t.data_ptr(),
                              address(copy), p.numel()))
            written += [tensor for tensor in (p, m, v, t, copy) if tensor is not None]
        groups.append(((group["lr"], *group["betas"], group["eps"], group["weight_decay"]), addresses))
    extension._C.adamw_cpu(groups, factor, torch.get_num_threads(), isa)
    torch.autograd.graph.increment_version(written)     # as PyTorch's own writes do: a backward that saved one of these raises
