"""A Linear of half-precision training as an op: y = x W^T + b, computed with a copy of W that somebody keeps.

The trainer casts each weight once an optimizer step (training/half_weights.py), not at each use as autocast does. The numbers are autocast's,
and the weight gets the gradient. Where the products of the extension serve (ops/cpu/linear.py), that gradient is summed in fp32 and
never rounded to half precision on its way.
"""
import torch
import torch.nn.functional as F

from .. import backend as _backend
from .common import no_second_derivative
from .cpu import linear as _cpu


def linear(x, weight, bias, *, copy=None, backend=None):
    """x weight^T + bias: (..., N) in the copy's dtype, or as F.linear gives it without one.

    x (..., K), weight (N, K), bias (N,) or None, floating point. copy: weight cast to the dtype to compute in, or its detached self;
    it stays as it is until the backward. backend: a choice for each op as `backend.parse` gives it, or None.

    Raises RuntimeError in a second derivative, which only the reference has.
    """
    name = _backend.choose("linear", CANDIDATES, backend, (weight, copy))
    if name == "reference":
        return F.linear(x, weight if copy is None else cast(weight, copy), bias)
    return _Linear.apply(x, weight, copy, bias)     # by position: an autograd.Function takes no keywords


def implementation(weight, copy=None, *, backend=None):
    """The name of the implementation that `linear` takes for these arguments ("cpp", "reference")."""
    return _backend.choose("linear", CANDIDATES, backend, (weight, copy))


CANDIDATES = (("cpp", _cpu.why_not),)       # args: (weight, copy)


def cast(weight, copy):
    """`copy` as a function of `weight`: the cast that autocast would make, made already. Its gradient goes to the weight, in its dtype."""
    return _Cast.apply(weight, copy)


class _Cast(torch.autograd.Function):

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.dtype
        return copy.detach()    # the same memory and version counter, so that a refresh at the wrong moment is noticed

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


class _Linear(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, copy, bias):
        rows = x.reshape(-1, x.size(-1)).to(copy.dtype)
        ctx.save_for_backward(rows, copy)   # with copy's version: a refresh at the wrong moment is noticed
        ctx.x_shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return _cpu.matmul(rows, copy, bias=bias).view(*x.shape[:-1], copy.size(0))

    @staticmethod
    def backward(ctx, dy):
        no_second_derivative("linear")
        rows, copy = ctx.saved_tensors
        need_x, need_weight, _, need_bias = ctx.needs_input_grad
        dy = dy.reshape(-1, copy.size(0)).contiguous()
        dx = _cpu.matmul(dy, copy, by_input=True).view(ctx.x_shape).to(ctx.dtypes[0]) if need_x else None
        dw = _cpu.weight_gradient(dy, rows, ctx.dtypes[1]) if need_weight else None
        db = dy.sum(0, dtype=torch.float32).to(ctx.dtypes[2]) if need_bias else None
        return dx, dw, None, db
