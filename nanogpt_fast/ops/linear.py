"""A Linear for half-precision training as an op: y = x W^T + b, computed with a copy of W that the caller keeps.

The trainer casts each weight once per optimizer step (training/half_weights.py) instead of at every use, as autocast does. The results
are autocast's, and the gradient goes to the original weight. With "cublas" and "cpp" (the extension's GEMMs, ops/cpu/linear.py) that
gradient is summed in fp32 and never rounded to half precision, which also saves a launch and its traffic.

From the second micro-batch of a step on there is a gradient already. On a GPU cuBLAS then adds to it (beta = 1) and autograd gets None: 8 bytes
for each number instead of the 16 of writing a gradient of its own and adding the two. It does so only where the copy's `in_place` is set, since
torch.autograd.grad would get None. A hook on a weight's AccumulateGrad node cannot be detected: from the second micro-batch on it is called
with None.
"""
import torch
import torch.nn.functional as F

from .. import backend as _backend
from ..kernels import fastest
from . import extension
from .common import no_autocast, no_second_derivative, resolved
from .cpu import linear as _cpu


def linear(x, weight, bias, *, copy=None, backend=None):
    """x weight^T + bias -> (..., N), in the copy's dtype; without a copy, in F.linear's.

    x (..., K), weight (N, K), bias (N,) or None, floating point. copy: the weight cast to the compute dtype, or the weight detached;
    it must not change before the backward. backend: as in ops/__init__.py.

    Raises RuntimeError for a second derivative, which only the reference has.
    """
    x, weight, bias, copy = resolved(x, weight, bias, copy)
    name = _backend.choose("linear", CANDIDATES, backend, (weight, copy), row_for)
    if name == "reference":
        if copy is None:
            return F.linear(x, weight, bias)
        return F.linear(x.to(copy.dtype), cast(weight, copy), None if bias is None else bias.to(copy.dtype))     # as autocast does
    return _Linear.apply(x, weight, copy, bias)     # by position: an autograd.Function takes no keywords


def implementation(weight, copy=None, *, backend=None):
    """The name of the implementation that `linear` uses for these arguments ("cublas", "cpp", "reference")."""
    return _backend.choose("linear", CANDIDATES, backend, (weight, copy), row_for)


def _cublas_why_not(weight, copy):
    """None if cuBLAS's products can leave the gradient of an fp32 weight in fp32, else ""; nobody misses it."""
    half = copy is not None and copy.dtype in (torch.float16, torch.bfloat16)
    return None if half and weight.is_cuda and weight.dtype == torch.float32 and not torch.compiler.is_compiling() else ""


def row_for(weight, copy):
    """The Row of the table (kernels/fastest.py) for these arguments, or None."""
    if weight.is_cuda or fastest.nothing_for(weight):       # on a GPU both are cuBLAS's products
        return None
    return fastest.find("linear", fastest.CPU, fastest.column((weight if copy is None else copy).dtype), size=weight.size(-1))


CANDIDATES = (("cublas", _cublas_why_not), ("cpp", _cpu.why_not))       # args: (weight, copy)


def cast(weight, copy):
    """`copy`, as the result of a differentiable cast of `weight`: its gradient goes to the weight, in the weight's dtype."""
    return _Cast.apply(weight, copy)


class _Cast(torch.autograd.Function):

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.dtype
        return copy.detach()    # shares memory and version counter: autograd detects a refresh before the backward

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


class _Linear(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, copy, bias):
        rows = x.reshape(-1, x.size(-1)).to(copy.dtype)
        ctx.save_for_backward(rows, copy)   # records copy's version: autograd detects a refresh before the backward
        ctx.x_shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.weight = in_place(weight, copy)
        if rows.is_cuda:
            y = F.linear(rows, copy, None if bias is None else bias.to(copy.dtype))
        else:
            y = _cpu.matmul(rows, copy, bias=bias)
        return y.view(*x.shape[:-1], copy.size(0))

    @staticmethod
    def backward(ctx, dy):
        no_second_derivative("linear")
        rows, copy = ctx.saved_tensors
        need_x, need_weight, _, need_bias = ctx.needs_input_grad
        dy, = resolved(dy)
        dy = dy.reshape(-1, copy.size(0)).contiguous()
        dx = dw = db = None
        with no_autocast(dy.device.type):
            if need_x:
                dx = (dy @ copy if dy.is_cuda else _cpu.matmul(dy, copy, by_input=True)).view(ctx.x_shape).to(ctx.dtypes[0])
            if need_weight:
                dw = weight_gradient(dy, rows, ctx.weight) if dy.is_cuda else _cpu.weight_gradient(dy, rows, ctx.dtypes[1])
            if need_bias:
                db = dy.sum(0, dtype=torch.float32).to(ctx.dtypes[2])
        return dx, dw, None, db


def weight_gradient(dy, x, weight=None):
    """dy^T x -> (N, K) for dy (M, N) and x (M, K), summed and returned in fp32: they may be half precision while the parameter is fp32.

    weight: of `in_place`, or None. Where it takes a sum, adds to its gradient and returns None.
    """
    if weight is not None and takes_a_sum(weight):
        if dy.is_cuda and dy.dtype != torch.float32:
            torch.addmm(weight.grad, dy.t(), x, out_dtype=torch.float32, out=weight.grad)
        else:
            weight.grad.addmm_(dy.t().float(), x.float())
        return None
    if dy.dtype == torch.float32:
        return dy.t() @ x
    if dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return dy.t().float() @ x.float()       # no CPU matmul takes half-precision inputs and returns fp32


def in_place(weight, copy):
    """The weight if its gradient may be added to in place, by what its copy says; else None."""
    return weight if not torch.compiler.is_compiling() and getattr(copy, "in_place", False) else None


def takes_a_sum(weight):
    """Whether a backward may add to weight.grad itself: there is one, an ordinary fp32 tensor, and no hook waits for what comes."""
    return (extension.plain_fp32(weight.grad, weight.device.type) and not (weight.grad.requires_grad or weight._backward_hooks)
            and all(getattr(hook, "adds_rows", False) for hook in (weight._post_accumulate_grad_hooks or {}).values()))
