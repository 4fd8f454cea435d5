"""The trainer's embeddings: one operation forward, and backward only the rows of the tokens that occur.

GPT shares the token embedding's matrix with the vocabulary head, whose gradient is dense. PyTorch makes a second dense one of the embedding's
rows, (V, C) and zero elsewhere, and adds the two. Here the rows are added in place to the head's, once that has arrived: on a CPU 1 ms
instead of 42 for GPT-2 124M, and 154 MB less; on a GPU by a kernel that adds in a fixed order (kernels/embedding.py). (A sparse gradient would be
as small, but autograd copies the dense one to add it.)
"""
import contextlib

import torch
import torch.nn as nn

from .. import backend
from ..model import GPT
from ..ops import extension, linear
from ..ops.common import resolved, why_no_kernel
from ..touched import touched


def why_not_by_row(model):
    """None if `gradient_by_row` can do it for this GPT, else the reason: a dense gradient must be certain to arrive, and no module be
    touched."""
    wte, wpe, head = model.transformer.wte, model.transformer.wpe, model.lm_head
    if backend.choice("cross_entropy", model.backend) == "reference":
        return "asked for the reference, which adds the rows of repeated tokens in another order"
    if wte.weight is not head.weight or head.bias is not None:
        return "the head is not the token embedding's matrix alone"
    for module, kind in ((model, GPT), (head, nn.Linear), (wte, nn.Embedding), (wpe, nn.Embedding)):
        if (reason := touched(module, kind)) is not None:
            return reason
    for module in (wte, wpe):
        if module.max_norm is not None or module.scale_grad_by_freq or module.padding_idx is not None or module.sparse:
            return "an embedding has an option that nanoGPT's do not have"
        weight = module.weight
        if not (weight.dtype == torch.float32 and weight.device == wte.weight.device and weight.is_contiguous() and not weight.is_neg()):
            return "an embedding's matrix is not contiguous float32 on one device"
    if wte.weight._backward_hooks or wte.weight._post_accumulate_grad_hooks:
        return "a hook waits for the token embedding's gradient"
    return why_no_kernel(model) if wte.weight.is_cuda else None


@contextlib.contextmanager
def gradient_by_row(model, wanted=True):
    """Inside, the model embeds in one operation, and its backward adds to the tied matrix's dense gradient only the rows it looked up.
    Yields whether it is so."""
    if not wanted or why_not_by_row(model) is not None:
        yield False
        return
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    kernels, pending = None, []
    if wte.is_cuda or why_no_kernel(model) is None:
        from ..kernels import embedding as kernels      # Triton takes 0.2 s to import

    def add(weight, index, rows):
        gradient = weight.grad
        if kernels is not None and extension.plain_fp32(gradient, gradient.device.type):
            kernels.add_rows(gradient, index, rows)
        elif gradient.is_cuda:      # index_add_ would add in an order that changes
            gradient.add_(torch.ops.aten.embedding_dense_backward(rows, index, len(weight), -1, False))
        else:
            gradient.index_add_(0, index, rows.to(gradient.dtype))

    def add_pending(weight):
        for each in pending:
            add(weight, *each)
        pending.clear()

    def arrived(index, rows):
        if linear.takes_a_sum(wte):     # the head adds to it in place, too, so that autograd may accumulate nothing more
            add(wte, index, rows)
        else:
            pending.append((index, rows))

    add_pending.adds_rows = True        # so the head may

    # The hook runs once autograd has accumulated everything for this weight, including None from the lookup.
    hook = wte.register_post_accumulate_grad_hook(add_pending) if wte.requires_grad else None
    model.__dict__["_lookup"] = lambda index, start: _Embed.apply(wte, wpe, index, start, arrived, kernels)
    try:
        yield True
    finally:
        del model.__dict__["_lookup"]
        if hook is not None:
            hook.remove()


class _Embed(torch.autograd.Function):
    """wte[index] + wpe[start : start + T]. `arrived(index, rows)` gets wte's gradient."""

    @staticmethod
    def forward(ctx, wte, wpe, index, start, arrived, kernels):
        index = index.contiguous()
        ctx.save_for_backward(index)
        ctx.start, ctx.positions, ctx.arrived = start, wpe.size(0), arrived
        if kernels is not None:
            return kernels.embed(index, wte, wpe, start)
        return nn.functional.embedding(index, wte).add_(wpe[start:start + index.size(-1)])

    @staticmethod
    def backward(ctx, dx):
        index, = ctx.saved_tensors
        dx, = resolved(dx)
        dx, dwpe = dx.contiguous(), None
        if ctx.needs_input_grad[0]:
            ctx.arrived(index.flatten(), dx.view(-1, dx.size(-1)))
        if ctx.needs_input_grad[1]:
            dwpe = dx.sum(0)
            if (left := ctx.positions - dx.size(1)) > 0:
                dwpe = nn.functional.pad(dwpe, (0, 0, ctx.start, left - ctx.start))
        return None, dwpe, None, None, None, None
