"""What the trainer does on a CPU that a GPU does not need: memory that stays, small gradients kept small, the end of a step in one pass.

Each function says what it found, so that the banner can. Nothing here is done to a process unless the trainer, or somebody
else, calls it.
"""
import contextlib
import ctypes

import torch
import torch.nn as nn

from .. import backend
from ..model import GPT
from ..ops.cpu import adamw as adamw_cpu
from ..touched import touched

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of mallopt, in malloc.h


@contextlib.contextmanager
def keep_freed_memory(wanted=True):
    """Inside, glibc's malloc keeps what is freed, for the whole process. Yields None, or why it can't be told to.

    A training step takes and frees tensors of tens of megabytes. glibc gives such blocks back to the system at once, and gets
    them anew, page by page: 500,000 page faults a step of GPT-2 124M at 1,024 tokens, 0.8 s of 3.3 on one core; none
    inside this.
    Blocks over 32 MB are always mapped (no threshold goes higher), hence no mapping at all.

    At the end what is free goes back to the system, and so will later what is freed. glibc cannot be asked for its thresholds,
    and no longer moves them by itself once one was set; they are left where it stops moving them in a process that frees large
    blocks: what is over 32 MB is mapped, and twice as much stays free at the end of the heap.
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
    """(the C library, None), or (None, why not) where it is another, whose mallopt means other things or does not exist."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version
    except (AttributeError, OSError, TypeError):
        return None, "malloc is not glibc's"
    return libc, None


def update(optimizer, weights, max_norm):
    """The end of a step: gradients clipped to max_norm (0: not at all), weights moved, their half-precision copies cast anew.

    weights: HalfWeights. Where they get gradients of our own, which are not PyTorch's to the bit, it is one pass over memory if
    adamw_cpu can; the gradients then stay as they are.
    """
    parameters, exact = list(weights.model.parameters()), not any(weights.own)
    if exact or adamw_cpu.why_not(optimizer) is not None:
        if max_norm != 0.0:
            clip_grad_norm(parameters, max_norm, exact)
        optimizer.step()
        weights.refresh()
        return
    factor = 1.0
    if max_norm != 0.0:
        norm = adamw_cpu.norm([p.grad for p in parameters if p.grad is not None])
        factor = min((max_norm / (norm + 1e-6)).item(), 1.0)    # in this order nan is the smaller one
    adamw_cpu.step(optimizer, dict(zip(weights.weights, weights.copies, strict=bool(weights.copies))), factor)


def clip_grad_norm(parameters, max_norm, exact=True):
    """torch.nn.utils.clip_grad_norm_, but gradients that are short enough are not multiplied by 1. Returns their norm.

    On a GPU asking would stop the host; on a CPU it saves reading and writing every gradient. exact: bit for bit; else the norm
    comes from the extension, at the memory's rate and as near to fp64.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if exact else adamw_cpu.norm(gradients)
    if not max_norm / (norm + 1e-6) >= 1:  # clip_grad_norm_'s factor; where it is nan that multiplies too
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@contextlib.contextmanager
def embedding_gradient_by_row(model, wanted=True):
    """Inside, the token embedding's gradient is the rows it looked up, and not a whole (V, C) of zeros with these rows in it.

    They are added in place to the dense gradient that the vocabulary head sends to the same weight, once that is there: 1 ms
    instead of 42 for GPT-2 124M, and 154 MB less. (A sparse gradient would be as small, but autograd copies the dense one to
    add it.) Only where a dense one is sure to come: the weight is tied, and nobody touched either side. Yields whether it is so.
    """
    wte, head = model.transformer.wte, model.lm_head
    # Where several tokens are the same, their rows are added in another order than nanoGPT's: not on the reference path.
    wanted = (wanted and wte.weight is head.weight and backend.choice("cross_entropy", model.backend) != "reference"
              and not (touched(model, GPT) or touched(wte, nn.Embedding) or touched(head, nn.Linear) or head.bias is not None)
              and wte.max_norm is None and not wte.scale_grad_by_freq and wte.padding_idx is None)
    if not wanted:
        yield False
        return
    pending = []

    def add(weight):
        for index, rows in pending:
            weight.grad.index_add_(0, index, rows)
        pending.clear()

    # It runs when autograd has everything that goes to the weight, the lookup's nothing among it.
    hook = wte.weight.register_post_accumulate_grad_hook(add) if wte.weight.requires_grad else None
    model.__dict__["lookup"] = lambda index: _Lookup.apply(wte.weight, index, pending)
    try:
        yield True
    finally:
        del model.__dict__["lookup"]
        if hook is not None:
            hook.remove()


class _Lookup(torch.autograd.Function):
    """weight[index]; the rows of its gradient go to `pending`, with their index, and not to the weight."""

    @staticmethod
    def forward(ctx, weight, index, pending):
        ctx.save_for_backward(index)
        ctx.pending = pending
        return nn.functional.embedding(index, weight)

    @staticmethod
    def backward(ctx, grad):
        index, = ctx.saved_tensors
        ctx.pending.append((index.flatten(), grad.reshape(-1, grad.size(-1))))
        return None, None, None
