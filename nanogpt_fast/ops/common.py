"""What every op asks: the dtype to compute in, a seed for its dropout, and whether a second derivative is wanted, which no kernel has."""
import contextlib

import torch
from torch.compiler import is_compiling

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def autocast_dtype(x):
    """The dtype that a matmul of x computes in: autocast's where it is on, else x's. Autocast leaves float64 alone."""
    kind = "cuda" if x.is_cuda else "cpu"                   # a third of the time of x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


def no_autocast(device_type):
    """A context for a backward, which may be called under autocast and must compute in its forward's dtypes."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else contextlib.nullcontext()


def dropout_seed(x, dropout_p):
    """One number a call as an int64 tensor (1,) on x's device, or None without dropout. It comes from that device's generator.

    A tensor, since a captured graph then draws anew at each replay, and a recomputed forward gets the same one.
    31 bits: Inductor writes the bound as an int32 constant.
    """
    return torch.randint(2**31 - 1, (1,), dtype=torch.int64, device=x.device) if dropout_p > 0 else None


def no_second_derivative(op):
    """RuntimeError in a backward of which another derivative is wanted (create_graph=True)."""
    if torch.is_grad_enabled() and not is_compiling():
        raise RuntimeError(f"{op} has no second derivative by its kernels (create_graph=True); backend='reference' has one")
