"""AdamW's step in one pass over memory, on a GPU: clipping, the step, and the weights' half-precision copies (kernels/adamw.py).

The state is the optimizer's own: state_dict, checkpoints and a later optimizer.step() see no difference. On a CPU ops/cpu/adamw.py does the
same; `why_not` is for both.
"""
import torch
from torch.optim import optimizer as optimizers

from .. import backend
from . import extension
from .common import why_no_kernel

ALIGNMENT = 16      # bytes: kernels load four fp32 at once


def why_not(optimizer, device_type, kernel=False):
    """None if a step in one pass does what optimizer.step() would do with the current gradients, else the reason.

    kernel: by the Triton kernel, which can be captured: `capturable` may be set and a learning rate be a tensor (training/captured.py).
    """
    return _of_the_optimizer(optimizer, kernel) or _of_its_tensors(optimizer, device_type, kernel)


def why_not_clipped(model, optimizer):
    """None if the gradients of the model, whose norm is clipped, are those that the optimizer's step reads, else the reason: a step in one pass
    multiplies only what it reads, and PyTorch's clipping all that the model has."""
    clipped = {p for p in model.parameters() if p.grad is not None}
    stepped = {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    if clipped == stepped:
        return None
    return (f"{len(clipped - stepped)} of the model's gradients are not in the optimizer, "
            f"and {len(stepped - clipped)} of the optimizer's not in the model")


def _of_the_optimizer(optimizer, kernel):
    if type(optimizer) is not torch.optim.AdamW:
        return f"the optimizer is {type(optimizer).__name__}, not AdamW"
    if "step" in vars(optimizer):
        return "AdamW.step was replaced on the instance, as PyTorch's learning rate schedulers do"
    if (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
            or optimizers._global_optimizer_pre_hooks or optimizers._global_optimizer_post_hooks):
        return "AdamW.step has a hook"
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return "a GradScaler relies on AdamW.step to unscale the gradients"
    for group in optimizer.param_groups:
        for option in ("amsgrad", "maximize", "differentiable", *(() if kernel else ("capturable",))):
            if group[option]:
                return f"AdamW has {option}={group[option]}"
        if not group.get("decoupled_weight_decay", True):       # an option since PyTorch 2.7
            return "AdamW has decoupled_weight_decay=False"
        numbers = group["eps"], group["weight_decay"], *group["betas"], *(() if kernel else (group["lr"],))
        if any(isinstance(number, torch.Tensor) for number in numbers):
            return "an option of AdamW is a tensor"
    return None


def _of_its_tensors(optimizer, device_type, kernel):
    device = None
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            device = device or p.device
            for name, tensor in (("weight", p), ("gradient", p.grad), *optimizer.state.get(p, {}).items()):
                if not extension.plain_fp32(tensor, device_type):
                    return f"a {name} is not a contiguous float32 tensor on a {'CPU' if device_type == 'cpu' else 'GPU'}"
                if tensor.shape != p.shape and name != "step":
                    return f"a {name} does not have its weight's shape"
                if tensor.device != device:
                    return f"a {name} is on {tensor.device}, and another tensor on {device}"
                if kernel and name != "step" and tensor.data_ptr() % ALIGNMENT:
                    return f"the address of a {name} is no multiple of {ALIGNMENT} bytes"
    return None


class OnePass:
    """Takes the steps of an AdamW with the kernel: `why_not` first, then `step`.

    model: whose backend decides; on the reference path PyTorch takes the step. copies: {weight: its half-precision copy}, contiguous, which
    a step refreshes.
    """

    def __init__(self, model, optimizer, copies=None):
        self.optimizer, self.copies = optimizer, copies or {}
        self._never, self._table, self._places = why_no_kernel(model), None, None

    def why_not(self):
        """None if `step` does now what optimizer.step() would do, else the reason."""
        reason = self._never or _of_the_optimizer(self.optimizer, kernel=True)
        places = self._where() if reason is None else None
        if reason is None and (places is None or places != self._places):
            reason = _of_its_tensors(self.optimizer, "cpu" if backend.interpreted() else "cuda", kernel=True)
            if any(copy.shape != weight.shape for weight, copy in self.copies.items()):
                reason = reason or "a weight has another shape than its copy"
            self._places = places if reason is None else None
        return reason

    def _where(self):
        """What tells the tensors of this step from the last one's, whose check takes a millisecond for GPT-2's; None if it cannot be told."""
        places = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if (grad := p.grad) is None:
                    continue
                known = grad, *self.optimizer.state.get(p, {}).values()
                if any(type(tensor) is not torch.Tensor for tensor in known) or grad.layout is not torch.strided:
                    return None
                places += [p.data_ptr(), *(tensor.data_ptr() for tensor in known), grad.dtype, grad.is_contiguous(), grad.is_neg()]
        return places

    @torch.no_grad()
    def prepare(self):
        """Note where the tensors of the next step are. `step` does so itself; while it is captured, nothing may have moved since."""
        tensors, groups, options = [], [], []
        for i, group in enumerate(self.optimizer.param_groups):
            options.append((*group["betas"], group["eps"], group["weight_decay"]))
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.optimizer.state[p]
                if not state:       # as PyTorch's AdamW starts
                    state.update(step=torch.zeros((), dtype=torch.float32, device=p.device), exp_avg=torch.zeros_like(p),
                                 exp_avg_sq=torch.zeros_like(p))
                tensors.append((p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], self.copies.get(p)))
                groups.append(i)
        if tensors:
            if self._table is None:
                from ..kernels.adamw import Table       # Triton takes 0.2 s to import
                self._table = Table()
            self._table.write(tensors, groups, options)
        return tensors

    @torch.no_grad()
    def step(self, factor=None):
        """optimizer.step() with the gradients times `factor`, fp32 () on their GPU; the stored gradients do not change."""
        if tensors := self.prepare():
            self._table.step([group["lr"] for group in self.optimizer.param_groups], factor)
            # As PyTorch's own writes do: a backward that saved one of these raises.
            torch.autograd.graph.increment_version([each[i] for each in tensors for i in (0, 2, 3, 4, 5) if each[i] is not None])
