"""The end of a training step on a CPU as one pass over memory: clipping, AdamW, and the weights' bf16 copies (csrc/rows/adamw.h).

PyTorch multiplies the gradients, moves the weights and casts them: 8, 28 and 6 bytes a parameter, where 30 do. The formulas
are those of AdamW's fused step, and the state is the optimizer's own: state_dict, checkpoints, and an optimizer.step() that
follows, see no difference.
"""
import math

import torch
from torch.optim import optimizer as optimizers

from .. import extension
from ..extension import address

MISSING = extension.lacks("gradient_squares_cpu")


def why_not(optimizer):
    """None where `step` does what optimizer.step() would do with the gradients that are there now; else the reason."""
    if MISSING is not None:
        return MISSING
    if type(optimizer) is not torch.optim.AdamW:
        return f"the optimizer is {type(optimizer).__name__}, not AdamW"
    if "step" in vars(optimizer):
        return "AdamW.step was replaced on the instance, as PyTorch's learning rate schedulers do"
    if (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
            or optimizers._global_optimizer_pre_hooks or optimizers._global_optimizer_post_hooks):
        return "AdamW.step has a hook"
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return "a GradScaler left its scale to AdamW.step"
    for group in optimizer.param_groups:
        for option in ("amsgrad", "maximize", "capturable", "differentiable"):
            if group[option]:
                return f"AdamW was asked for {option}"
        if any(isinstance(group[option], torch.Tensor) for option in ("lr", "eps", "weight_decay")) or any(
                isinstance(beta, torch.Tensor) for beta in group["betas"]):
            return "an option of AdamW is a tensor"
        for p in group["params"]:
            if p.grad is None:
                continue
            state = optimizer.state.get(p, {})
            for name, tensor in (("weight", p), ("gradient", p.grad), *state.items()):
                if not _plain(tensor):
                    return f"a {name} is no contiguous float32 tensor on a CPU"
                if tensor.shape != p.shape and name != "step":
                    return f"a {name} has not its weight's shape"
    return None


def _plain(tensor):
    return (extension.plain(tensor) and tensor.dtype == torch.float32 and tensor.is_cpu
            and tensor.layout == torch.strided and tensor.is_contiguous())


def norm(gradients, isa=""):
    """The norm of all gradients together, () fp32: sums of 2^15 squares in fp32, and theirs in fp64.

    Of gradients that are not all fp32 on a CPU it is PyTorch's. isa: see `sample_cpu`; "" is the best.
    """
    gradients = [gradient.contiguous() for gradient in gradients]
    if MISSING is not None or not all(_plain(gradient) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    addresses, sizes = [gradient.data_ptr() for gradient in gradients], [gradient.numel() for gradient in gradients]
    squares = extension._C.gradient_squares_cpu(addresses, sizes, torch.get_num_threads(), isa)
    return torch.tensor(math.sqrt(squares), dtype=torch.float32, device="cpu")


@torch.no_grad()
def step(optimizer, copies=None, factor=1.0, isa=""):
    """optimizer.step() for gradients times `factor`, which stay as they are. Only where why_not(optimizer) is None.

    copies: {weight: its bf16 copy}, contiguous; those of weights that move are cast anew. isa: see `sample_cpu`; "" is the best.
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
    torch.autograd.graph.increment_version(written)     # as PyTorch's own writes do: a backward that saved one of these is told
