"""Half-precision copies of the matmul weights, cast once an optimizer step instead of once a use.

Autocast casts every fp32 weight in every forward pass: 4 bytes read and 2 written a parameter, 0.75 GB a micro-batch of GPT-2
124M, and the same result 40 times over where 40 micro-batches make a step. Here each matrix that a matmul takes has one copy:

    with weights.in_use():       the Linears hold their copies, or an MLP has both beside its weights; what flows back to a copy goes
                                 on to its fp32 weight
        loss = model(x, y)[1]
        loss.backward()
    optimizer.step()             moves the fp32 weights
    weights.refresh()            the one cast

The numbers are autocast's: it casts the same weight to the same bits, and its gradient back to fp32. Where a kernel of ours makes
the gradient, it is not even rounded on the way (`own_gradients`): the MLP's and the head's on a GPU, all of them on a CPU with AMX
(ops/linear_cpu.py), where in float32, with nothing to cast, the products go to the extension all the same. The embedding, whose weight is the vocabulary head's too, keeps reading fp32 (C10);
biases and LayerNorms stay with autocast, they are small.
"""
import contextlib
import functools

import torch
import torch.nn as nn

from . import backend
from .model import GPT, MLP, Block, touched
from .ops import linear_cpu


class HalfWeights:
    """The copies of a GPT's matmul weights in `dtype`; none where dtype is float32, or where `leave` tells why not to make any.

    own_gradients: let our kernels and the extension make weight gradients in fp32 where they can; the model is not compiled.
    left: why matrices were left to autocast, one text for each block or head: whoever replaced or hooked a module may look at
    its weight, and would find the copy there (C21).
    """

    def __init__(self, model, dtype, leave=None, own_gradients=False):
        linears, self.left = ([], [leave]) if leave else _untouched_linears(model)
        can = (own_gradients and linear_cpu.AMX and dtype in (torch.bfloat16, torch.float32)
               and backend.choice("mlp", model.backend) != "reference")

        cast = dtype != torch.float32
        on_kernels = own_gradients and cast and bool(linears) and _kernels_run(linears[0].weight)
        mlps = {id(linear): block.mlp for block in model.transformer.h if isinstance(block, Block) and isinstance(block.mlp, MLP)
                for linear in (block.mlp.c_fc, block.mlp.c_proj)} if on_kernels and _chosen("mlp", model) else {}

        def own(linear):    # the head's gradient is its loss's (ops/cross_entropy_cpu.py), a short fp32 product PyTorch's
            return (can and linear is not model.lm_head and linear.weight.device.type == "cpu"
                    and (cast or min(linear.weight.shape) >= linear_cpu.SHORTEST_FP32))

        self.linears = [linear for linear in linears if linear.weight.dtype == torch.float32 and (cast or own(linear))]
        self.own = [own(linear) for linear in self.linears]
        self.model = model
        can_head = can or on_kernels and _chosen("cross_entropy", model)
        self.head = next((linear.weight for linear in self.linears if can_head and linear is model.lm_head), None)
        self.weights = [linear.weight for linear in self.linears]
        self.copies = [weight.detach().to(dtype) for weight in self.weights] if cast else []
        # MLPs whose op takes the copies beside the fp32 weights, and sends these their gradients: {MLP: ((c_fc, c_proj), (their copies))}
        self.mlps = {}
        for linear, copy in zip(self.linears, self.copies):     # no copies in float32
            if id(linear) in mlps:
                self.mlps.setdefault(mlps[id(linear)], []).append(copy)
        self.mlps = {mlp: ((mlp.c_fc.weight, mlp.c_proj.weight), tuple(copies))
                     for mlp, copies in self.mlps.items() if len(copies) == 2}
        inside = {id(linear) for mlp in self.mlps for linear in (mlp.c_fc, mlp.c_proj)}
        self.beside = [id(linear) in inside for linear in self.linears]

    @contextlib.contextmanager
    def in_use(self):
        """Inside, forward and backward passes take the copies; state_dict and optimizers are for outside."""
        copies = self.copies or [weight.detach() for weight in self.weights]
        for mlp, both in self.mlps.items():
            mlp.__dict__["copies"] = both
        for linear, weight, copy, own, beside in zip(self.linears, self.weights, copies, self.own, self.beside, strict=True):
            if beside:
                continue
            if own:
                linear.forward = functools.partial(linear_cpu.linear, weight=weight, copy=copy, bias=linear.bias)
            else:
                linear._parameters["weight"] = _Cast.apply(weight, copy)
        if self.head is not None:
            self.model.__dict__["head_copied_from"] = self.head  # past nn.Module, which would make it a parameter
        try:
            yield
        finally:
            self.model.__dict__.pop("head_copied_from", None)
            for mlp in self.mlps:
                mlp.__dict__.pop("copies", None)
            for linear, weight, own, beside in zip(self.linears, self.weights, self.own, self.beside, strict=True):
                if beside:
                    continue
                linear._parameters["weight"] = weight
                if own:
                    del linear.forward

    @torch.no_grad()
    def refresh(self):
        """Cast the weights as they are now. Between a forward pass and its backward this raises in the backward."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.weights)


def _kernels_run(weight):
    return backend.triton_why_not(weight) is None


def _chosen(op, model):
    """Whether kernels are what `op` of the model takes: not the reference, nor, under `auto`, Triton's interpreter."""
    choice = backend.choice(op, model.backend)
    return choice == "fused" or choice == "auto" and not backend.interpreted()


class _Cast(torch.autograd.Function):
    """The cast of a weight, made already: gives the copy, and hands its gradient to the weight."""

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.dtype
        return copy.detach()    # the same memory and version counter, so that a refresh at the wrong moment is noticed

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


def _untouched_linears(model):
    """([every Linear whose weight only our own code sees], [why not, for the others])."""
    reason = touched(model, GPT)
    if reason is not None:
        return [], [reason]
    linears, left = [], []
    for i, block in enumerate(model.transformer.h):
        reason = block.unfused_reason() if isinstance(block, Block) else f"{type(block).__name__} stands where Block did"
        inside = [] if reason else [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
        reason = reason or next(filter(None, (touched(linear, nn.Linear) for linear in inside)), None)
        if reason is None:
            linears += inside
        else:
            left.append(f"block {i}: {reason}")
    reason = touched(model.lm_head, nn.Linear)
    if reason is None:
        linears.append(model.lm_head)
    else:
        left.append(f"lm_head: {reason}")
    return linears, left
