"""Linear cross-entropy: the vocabulary head and its loss in one op, without materialising the logits.

    logits = x W^T,   loss = mean or sum over rows of  -log softmax(logits)[target]

`return_logits=True` is the drop-in form (nanoGPT's forward returns its logits): they are written once, in half precision under
autocast, and never modified; the backward computes the loss's gradient from them and adds the gradient that arrives through them.
`return_logits=False` is for training: loss and gradients are computed together, a chunk of rows at a time, and the whole logits never
exist. Formulas, memory traffic and the kernels are in `kernels/cross_entropy.py`; the CPU path is in `cpu/cross_entropy.py`.
"""
import torch
from torch import Tensor

from .. import backend as _backend, reference
from ..kernels import fastest
from . import linear, registered
from .common import KERNEL_DTYPES, Backend, autocast_dtype, no_second_derivative, resolved
from .cpu import cross_entropy as _cpu
from .registration import define, raw


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -1, reduction: str = "mean",
                         return_logits: bool = True, backend: Backend = None, copy: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of logits = x weight^T against targets: (loss, logits), or (loss, None) with return_logits=False.

    x (..., C) and weight (V, C), floating point; targets int64 with one element per row of x. loss: a scalar, fp32 under
    autocast, else of x's dtype. logits (..., V) in the autocast dtype or x's; their row stride may exceed V, so that each row
    starts aligned. Rows whose target is `ignore_index` do not count; reduction "mean" divides by the number of the other rows
    (nan if there are none), "sum" does not divide. A target outside of the vocabulary raises IndexError on a CPU and makes the
    loss nan on a GPU, where a check would stall the host. The backward raises if the returned logits were modified in place.
    backend: as in ops/__init__.py. copy: weight in the compute dtype, if the caller keeps one
    (training/half_weights.py): it is used instead of casting, and the kernels do not round dW to that dtype.

    Raises ValueError (shapes, devices, reduction), TypeError (dtypes), RuntimeError (backend "fused" and the kernel can't
    run; a second derivative, which only the reference has).
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: expected 'mean' or 'sum'")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}: expected int64")
    if weight.dim() != 2 or x.dim() == 0 or x.size(-1) != weight.size(1):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected (..., C) and (V, C)")
    if targets.numel() * x.size(-1) != x.numel():
        raise ValueError(f"targets {tuple(targets.shape)}: expected one for each row of x {tuple(x.shape)}")
    x, weight, targets, copy = resolved(x, weight, targets, copy)
    name = implementation(x, weight, targets, return_logits=return_logits, backend=backend)
    copy = copy if copy is not None and copy.dtype == autocast_dtype(x) else None
    if name == "reference":
        weight = weight if copy is None else linear.cast(weight, copy)
        targets = targets if targets.is_contiguous() else targets.contiguous()
        loss, logits = reference.linear_cross_entropy(x, weight, targets, ignore_index=ignore_index, reduction=reduction)
        return loss, logits if return_logits else None
    if name != "triton" and (kernel := registered.kernel("cross_entropy", name)) is not None:
        return registered.cross_entropy(kernel, x, weight, targets, ignore_index, reduction, _loss_dtype(x)), None
    grad = torch.is_grad_enabled()
    need_dx, need_dw = grad and x.requires_grad, grad and weight.requires_grad
    if name == "triton":  # spelled out: Dynamo of torch 2.11 cannot index a tuple with a bool
        op = _LossAndLogits if return_logits else _Loss
    else:
        op = _CPULossAndLogits if return_logits else _CPULoss
    options = targets, autocast_dtype(x), ignore_index, reduction, need_dx, need_dw
    if return_logits:
        return op.apply(x, weight if copy is None else linear.cast(weight, copy), *options)
    return op.apply(x, weight, *options, copy), None


def implementation(x, weight, targets, *, return_logits=True, backend=None):
    """The name of the implementation that linear_cross_entropy uses for these arguments ("triton", "cpp", "reference")."""
    return _backend.choose("cross_entropy", CANDIDATES, backend, (x, weight, targets, return_logits), row_for)


def _triton_why_not(x, weight, targets, return_logits=True):
    if (reason := _backend.triton_why_not(x, weight, targets)) is not None:
        return reason
    if not x.device == weight.device == targets.device:
        return f"x is on {x.device}, weight on {weight.device}, targets on {targets.device}"
    if x.dtype not in KERNEL_DTYPES or weight.dtype not in KERNEL_DTYPES:
        return f"x is {x.dtype} and weight {weight.dtype}; the kernel takes float32, float16 and bfloat16"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype}, weight {weight.dtype} and autocast is off"  # the reference raises PyTorch's own error
    return None


def row_for(x, weight, targets, return_logits=True):
    """The Row of the table (kernels/fastest.py) for these arguments, or None."""
    if fastest.nothing_for(x):
        return None
    return fastest.find("cross_entropy logits" if return_logits else "cross_entropy", fastest.device_number(x),
                        fastest.column(autocast_dtype(x)), size=weight.size(0), tokens=targets.numel())


CANDIDATES = (("triton", _triton_why_not), ("cpp", _cpu.why_not))


def _kernels():
    from ..kernels import cross_entropy  # imported lazily: Triton takes 0.2 s to import, and not every user runs a kernel
    return cross_entropy


def _reduce(losses, targets, ignore_index, reduction, dtype):
    """(loss, count): the loss as a scalar of `dtype`, and the fp32 scalar to divide the gradient by."""
    loss = losses.sum()
    if reduction == "sum":
        return _to(loss, dtype), torch.ones_like(loss)
    count = (targets != ignore_index).sum().to(torch.float32)
    # If no row counts, the loss is 0 / 0 = nan, as in PyTorch, but the gradient must be 0, as in PyTorch, and not 0 / 0.
    return _to(loss / count, dtype), count.clamp(min=1)


def _to(loss, dtype):
    """The loss in `dtype`, without calling `to` if it already is. If a Function's result went through a no-op `to`, compiled code of
    torch 2.11 silently counts it as two results and sends the gradient to the other one, so that all gradients are zero."""
    return loss if loss.dtype == dtype else loss.to(dtype)


def _loss_dtype(x):
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


class _Loss(torch.autograd.Function):
    """The loss alone. The forward also computes the gradients of the sum of the losses; the backward scales them."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, ignore_index, reduction, need_dx, need_dw, copy=None):
        rows, targets = x.reshape(-1, x.size(-1)).to(dtype), targets.reshape(-1).contiguous()
        run = raw.linear_cross_entropy if torch.compiler.is_compiling() else _kernels().forward_backward
        losses, dx, dw = run(rows, weight.to(dtype) if copy is None else copy, targets, ignore_index, need_dx, need_dw)
        loss, count = _reduce(losses, targets, ignore_index, reduction, _loss_dtype(x))
        ctx.save_for_backward(dx, dw, count)
        ctx.x_shape, ctx.dtypes, ctx.weight = x.shape, (x.dtype, weight.dtype), linear.in_place(weight, copy)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        no_second_derivative("linear_cross_entropy")
        dx, dw, count = ctx.saved_tensors
        scale = grad_loss.to(torch.float32) / count
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx = _scaled(dx, scale, ctx.dtypes[0]).view(ctx.x_shape) if need_dx else None
        if need_dw and ctx.weight is not None and linear.takes_a_sum(ctx.weight):
            ctx.weight.grad.addcmul_(dw, scale)
            return dx, *(None,) * 8
        dw = _scaled(dw, scale, ctx.dtypes[1]) if need_dw else None
        return dx, dw, None, None, None, None, None, None, None


class _LossAndLogits(torch.autograd.Function):
    """Loss and logits. The backward computes the gradients from the logits, which exist anyway."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, ignore_index, reduction, need_dx, need_dw):
        rows, targets = x.reshape(-1, x.size(-1)).to(dtype), targets.reshape(-1).contiguous()
        run = raw.linear_cross_entropy_logits if torch.compiler.is_compiling() else _kernels().forward
        losses, logits, maxima, log_sums = run(rows, weight.to(dtype), targets, ignore_index)
        loss, count = _reduce(losses, targets, ignore_index, reduction, _loss_dtype(x))
        logits = logits.view(*x.shape[:-1], logits.size(-1))
        ctx.save_for_backward(x, weight, targets, logits, maxima, log_sums, count)
        ctx.dtype, ctx.ignore_index, ctx.needs = dtype, ignore_index, (need_dx, need_dw)
        if not torch.compiler.is_compiling():  # compiled graphs get zeros for unused logits; eager asks for None
            ctx.set_materialize_grads(False)
        return loss, logits

    @staticmethod
    def backward(ctx, grad_loss, grad_logits):
        no_second_derivative("linear_cross_entropy")
        grad_loss, grad_logits = resolved(grad_loss, grad_logits)
        x, weight, targets, logits, maxima, log_sums, count = ctx.saved_tensors
        scale = torch.zeros_like(count) if grad_loss is None else grad_loss.to(torch.float32) / count
        if grad_logits is not None:
            grad_logits = grad_logits.reshape(-1, logits.size(-1))
        run = raw.linear_cross_entropy_backward if torch.compiler.is_compiling() else _kernels().backward
        rows = x.reshape(-1, x.size(-1)).to(ctx.dtype)
        dx, dw = run(logits.view(-1, logits.size(-1)), maxima, log_sums, rows, weight.to(ctx.dtype), targets, scale,
                     grad_logits, ctx.ignore_index, *ctx.needs)
        need_dx, need_dw = ctx.needs
        dx = dx.view(x.shape).to(x.dtype) if need_dx else None
        dw = dw.to(weight.dtype) if need_dw else None
        return dx, dw, None, None, None, None, None, None


class _CPULoss(torch.autograd.Function):
    """The loss alone. The forward also computes its gradients; a backward that receives 1 returns them unscaled."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, ignore_index, reduction, need_dx, need_dw, copy=None):
        rows, targets = x.reshape(-1, x.size(-1)).to(dtype), targets.reshape(-1).contiguous()
        arguments = rows, weight.to(dtype) if copy is None else copy, targets, ignore_index, reduction == "mean", need_dx, need_dw
        if torch.compiler.is_compiling():
            loss, dx, dw = raw.linear_cross_entropy_cpu(*arguments)
        else:
            loss, dx, dw = _cpu.forward_backward(*arguments, dw_dtype=weight.dtype)
        ctx.save_for_backward(dx, dw)
        ctx.x_shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        return _to(loss, _loss_dtype(x))

    @staticmethod
    def backward(ctx, grad_loss):
        no_second_derivative("linear_cross_entropy")
        if torch.compiler.is_compiling():
            gradients, saved = [gradient.to(torch.float32) * grad_loss for gradient in ctx.saved_tensors], False
        else:
            scale = grad_loss.item()
            saved = scale == 1
            gradients = [gradient if saved else gradient * scale for gradient in ctx.saved_tensors]
        need_dx, need_dw = ctx.needs_input_grad[:2]
        # A saved gradient is copied: a leaf keeps the result as its .grad, and a second backward would find it modified.
        dx = gradients[0].view(ctx.x_shape).to(ctx.dtypes[0], copy=saved) if need_dx else None
        dw = gradients[1].to(ctx.dtypes[1]) if need_dw else None
        return dx, dw, None, None, None, None, None, None, None


class _CPULossAndLogits(torch.autograd.Function):
    """Loss and logits. The backward computes the gradients from the logits, which exist anyway."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, ignore_index, reduction, need_dx, need_dw):
        rows, targets = x.reshape(-1, x.size(-1)).to(dtype), targets.reshape(-1).contiguous()
        run = raw.linear_cross_entropy_logits_cpu if torch.compiler.is_compiling() else _cpu.forward
        loss, logits = run(rows, weight.to(dtype), targets, ignore_index, reduction == "mean")
        logits = logits.view(*x.shape[:-1], logits.size(-1))
        ctx.save_for_backward(x, weight, targets, logits)
        ctx.options, ctx.dtype, ctx.needs = (ignore_index, reduction == "mean"), dtype, (need_dx, need_dw)
        if not torch.compiler.is_compiling():  # compiled graphs get zeros for unused logits; eager asks for None
            ctx.set_materialize_grads(False)
        return _to(loss, _loss_dtype(x)), logits

    @staticmethod
    def backward(ctx, grad_loss, grad_logits):
        no_second_derivative("linear_cross_entropy")
        grad_loss, grad_logits = resolved(grad_loss, grad_logits)
        x, weight, targets, logits = ctx.saved_tensors
        grad_loss = torch.zeros(()) if grad_loss is None else grad_loss.to(torch.float32)
        grad_logits = None if grad_logits is None else grad_logits.reshape(-1, logits.size(-1))
        run = raw.linear_cross_entropy_backward_cpu if torch.compiler.is_compiling() else _cpu.backward
        dx, dw = run(logits.view(-1, logits.size(-1)), x.reshape(-1, x.size(-1)).to(ctx.dtype), weight.to(ctx.dtype), targets,
                     grad_loss, grad_logits, *ctx.options, *ctx.needs)
        need_dx, need_dw = ctx.needs
        dx = dx.view(x.shape).to(x.dtype) if need_dx else None
        dw = dw.to(weight.dtype) if need_dw else None
        return dx, dw, None, None, None, None, None, None


def _scaled(gradient, scale, dtype):
    """gradient * scale in fp32, rounded once."""
    if torch.compiler.is_compiling():
        return (gradient.to(torch.float32) * scale).to(dtype)  # Inductor fuses this into one kernel
    return _kernels().scaled(gradient, scale, dtype)


# -------------------------------------------------------------------------------------------------- what torch.compile sees

def _fake_gradients(x, weight, need_dx, need_dw, dx_dtype):
    dx = x.new_empty(x.shape if need_dx else (0,), dtype=dx_dtype)
    return dx, weight.new_empty(weight.shape if need_dw else (0,), dtype=torch.float32)


def _fake_loss(x, weight, targets, ignore_index, need_dx, need_dw):
    return x.new_empty(x.size(0), dtype=torch.float32), *_fake_gradients(x, weight, need_dx, need_dw, torch.float32)


def _fake_logits(x, weight, targets, ignore_index):
    losses, maxima, log_sums = (x.new_empty(x.size(0), dtype=torch.float32) for _ in range(3))
    return losses, _kernels().empty_logits(x.size(0), weight.size(0), x), maxima, log_sums


def _fake_backward(logits, maxima, log_sums, x, weight, targets, scale, grad_logits, ignore_index, need_dx, need_dw):
    return _fake_gradients(x, weight, need_dx, need_dw, x.dtype)


define("linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool need_dx, bool need_dw) "
       "-> (Tensor, Tensor, Tensor)", lambda *args: _kernels().forward_backward(*args), _fake_loss)
define("linear_cross_entropy_logits(Tensor x, Tensor weight, Tensor targets, int ignore_index) "
       "-> (Tensor, Tensor, Tensor, Tensor)", lambda *args: _kernels().forward(*args), _fake_logits)
define("linear_cross_entropy_backward(Tensor logits, Tensor maxima, Tensor log_sums, Tensor x, Tensor weight, Tensor targets, "
       "Tensor scale, Tensor? grad_logits, int ignore_index, bool need_dx, bool need_dw) -> (Tensor, Tensor)",
       lambda *args: _kernels().backward(*args), _fake_backward)


def _fake_gradients_cpu(x, weight, need_dx, need_dw):
    return x.new_empty(x.shape if need_dx else (0,)), x.new_empty(weight.shape if need_dw else (0,))


define("linear_cross_entropy_cpu(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool mean, bool need_dx, "
       "bool need_dw) -> (Tensor, Tensor, Tensor)", lambda *args: _cpu.forward_backward(*args),
       lambda x, weight, targets, ignore_index, mean, need_dx, need_dw:
       (x.new_empty((), dtype=torch.float32), *_fake_gradients_cpu(x, weight, need_dx, need_dw)))
define("linear_cross_entropy_logits_cpu(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool mean) "
       "-> (Tensor, Tensor)", lambda *args: _cpu.forward(*args),
       lambda x, weight, targets, ignore_index, mean:
       (x.new_empty((), dtype=torch.float32), x.new_empty(x.size(0), weight.size(0))))
define("linear_cross_entropy_backward_cpu(Tensor logits, Tensor x, Tensor weight, Tensor targets, Tensor grad_loss, "
       "Tensor? grad_logits, int ignore_index, bool mean, bool need_dx, bool need_dw) -> (Tensor, Tensor)",
       lambda *args: _cpu.backward(*args),
       lambda logits, x, weight, targets, grad_loss, grad_logits, ignore_index, mean, need_dx, need_dw:
       _fake_gradients_cpu(x, weight, need_dx, need_dw))
