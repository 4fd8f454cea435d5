"""What the trainer does only on a CPU: keep freed memory, and end a step in one pass over memory.

Nothing here changes the process unless a function is called; importing the file has no effect.
"""
import contextlib
import ctypes

import torch

from ..ops import adamw
from ..ops.cpu import adamw as adamw_cpu

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # mallopt's parameters, from malloc.h


@contextlib.contextmanager
def keep_freed_memory(wanted=True):
    """Inside, glibc's malloc keeps freed memory, in the whole process. Yields None, or the reason why it cannot.

    A training step allocates and frees tensors of tens of megabytes. glibc returns such blocks to the system at once and maps new
    ones, page by page: 500,000 page faults per step of GPT-2 124M at 1,024 tokens, 0.8 s of 3.3 on one core; inside this context,
    none. Mapping is switched off entirely, since blocks over 32 MB are mapped whatever the threshold (32 MB is its maximum).

    On exit free memory goes back to the system, as will memory freed later. glibc's thresholds cannot be read back, and it no longer
    adapts them once one was set. They are left at the values that they reach in a process that frees large blocks: blocks over 32 MB
    are mapped, and up to twice that stays free at the end of the heap.
    """
    libc, reason = _glibc() if wanted else (None, "malloc=off")
    if reason is None and not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)):
        reason = "glibc's mallopt refuses"
    try:
        yield reason
    finally:
        if reason is None:
            libc.mallopt(_M_MMAP_MAX, 65536)            # glibc's default
            libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
            libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
            libc.malloc_trim(0)


def _glibc():
    """(glibc, None), or (None, why not): another C library's mallopt has other parameters or does not exist."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version
    except (AttributeError, OSError, TypeError):
        return None, "malloc is not glibc's"
    return libc, None


def update(optimizer, weights, max_norm):
    """The end of a step: clip the gradients to max_norm (0: no clipping), update the weights, refresh their half-precision copies.

    weights: HalfWeights. In one pass over memory where it can be, which leaves the gradients unclipped.
    """
    parameters = list(weights.model.parameters())
    if why_not_in_one_pass(optimizer, weights, max_norm) is not None:
        if max_norm != 0.0:
            clip_grad_norm(parameters, max_norm, exact=not any(weights.own))
        optimizer.step()
        weights.refresh()
        return
    factor = 1.0
    if max_norm != 0.0:
        norm = adamw_cpu.norm([p.grad for p in parameters if p.grad is not None])
        factor = min((max_norm / (norm + 1e-6)).item(), 1.0)    # in this order, min returns nan for a nan norm
    adamw_cpu.step(optimizer, dict(zip(weights.weights, weights.copies, strict=bool(weights.copies))), factor)
    weights.refresh(left_out=True)


def why_not_in_one_pass(optimizer, weights, max_norm):
    """None if adamw_cpu ends the step, else the reason. It does where the extension computes some of the gradients, so that they do not match
    PyTorch's bit for bit anyway."""
    if not any(weights.own):
        return "the gradients are PyTorch's, and so is the update, bit for bit"
    return (adamw.why_not_clipped(weights.model, optimizer) if max_norm != 0.0 else None) or adamw_cpu.why_not(optimizer)


def clip_grad_norm(parameters, max_norm, exact=True):
    """torch.nn.utils.clip_grad_norm_, but it skips the multiplication by 1 if the norm is small enough. Returns the norm.

    On a GPU this check would stall the host; on a CPU it saves reading and writing every gradient. exact: match PyTorch's norm bit for
    bit; else the extension computes it, at memory speed and as close to fp64.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if exact else adamw_cpu.norm(gradients)
    if not max_norm / (norm + 1e-6) >= 1:  # clip_grad_norm_'s factor; it also multiplies by nan
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
