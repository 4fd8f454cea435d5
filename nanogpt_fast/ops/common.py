"""Helpers that ops share: the compute dtype, whether a model wants kernels, the dropout seed, and the error for second derivatives, which no
kernel has."""
import contextlib

import torch
from torch.compiler import is_compiling

from .. import backend

Backend = str | dict | None       # see ops/__init__.py
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def autocast_dtype(x):
    """The dtype in which a matmul of x computes: autocast's if it is on, else x's. Autocast does not touch float64."""
    kind = "cuda" if x.is_cuda else "cpu"                   # takes a third of the time of x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


def no_autocast(device_type):
    """Context for a backward: it may be called under autocast but must compute in the forward's dtypes."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else contextlib.nullcontext()


def why_no_kernel(model):
    """Why no Triton kernel takes part of a step of this model whose op has no choice of its own, or None."""
    choices = {backend.choice(op, model.backend) for op in backend.OPS}
    if choices == {"reference"}:
        return "asked for the reference"
    reason = backend.triton_why_not(next(model.parameters()))
    if reason is None and backend.interpreted() and "fused" not in choices:
        reason = "Triton's interpreter is for checking kernels and is slow"
    return reason


def dropout_seed(x, dropout_p, given=None):
    """A random seed as an int64 tensor (1,) on x's device, drawn from that device's generator, or the one that was given; None
    without dropout.

    It is a tensor so that a captured graph draws a new seed at each replay and a recomputed forward reuses the same one.
    It has 31 bits because Inductor writes the bound as an int32 constant. Raises ValueError for a given one that a kernel cannot read.
    """
    if dropout_p == 0:
        return None
    if given is None:
        return torch.randint(2**31 - 1, (1,), dtype=torch.int64, device=x.device)
    if not isinstance(given, torch.Tensor) or given.dtype != torch.int64 or given.numel() != 1 or given.device != x.device:
        about = f"{given.dtype} {tuple(given.shape)} on {given.device}" if isinstance(given, torch.Tensor) else repr(given)
        raise ValueError(f"seed is {about}; expected a tensor, int64 (1,) on {x.device}, or None to draw one")
    return given


def dropout_seeds(x, count):
    """`count` seeds like `dropout_seed`'s, from one draw: for a caller that runs many ops with dropout and passes each its seed.

    Each lies on a 16-byte boundary, as a tensor of its own does: Triton compiles a kernel again for a less aligned one.
    """
    return torch.randint(2**31 - 1, (count, 2), dtype=torch.int64, device=x.device)[:, :1].unbind()


def resolved(*tensors):
    """The tensors, or None, as their memory has them: a view that is negative lazily (x.conj().imag of a complex x) is copied.

    Kernels read memory by address and do not see that bit. PyTorch resolves it before it calls an operator, so compiled graphs need
    nothing. Takes 0.1 us a tensor, and the call 0.2: hot ops ask `is_neg` themselves first.
    """
    if is_compiling():
        return tensors
    for tensor in tensors:
        if tensor is not None and tensor.is_neg():
            return [t if t is None else t.resolve_neg() for t in tensors]
    return tensors


def no_second_derivative(op):
    """Raise RuntimeError if this backward is itself being differentiated (create_graph=True)."""
    if torch.is_grad_enabled() and not is_compiling():
        raise RuntimeError(f"the kernels of {op} have no second derivative (create_graph=True); backend='reference' has one")
