"""LayerNorm, and the residual add that comes before it in a Transformer, as one op each.

    add_layer_norm:  s = x + dropout(branch),  y = LayerNorm(s);  returns (s, y)

A nanoGPT block adds a branch to the residual stream and normalises the sum for the next branch; `Block.fused` calls this op for
both, and the stream passes through memory once. Formulas, memory traffic and kernels are in `kernels/layer_norm.py`; the bf16 CPU path
is in `cpu/layer_norm.py`.
"""
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import backend as _backend, reference
from ..kernels import fastest
from . import registered
from .common import KERNEL_DTYPES, Backend, autocast_dtype, dropout_seed, no_second_derivative, resolved
from .cpu import layer_norm as _cpu
from .registration import define, raw

_MAX_C = 8192  # one program holds a whole row in registers


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-5, backend: Backend = None) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, of x's shape and dtype.

    x (..., C), weight (C,), bias (C,) or None; fp32, fp16 or bf16 for a kernel. The variance is the biased one. Under CUDA
    autocast the result is fp32, as in PyTorch; under CPU autocast it keeps x's dtype.
    backend: as in ops/__init__.py.

    Raises ValueError (shapes), RuntimeError (backend "fused" and the kernel can't run; a second derivative, which only the
    reference has). Source: Ba, Kiros, Hinton, "Layer normalization", 2016.
    """
    _check(x, None, weight, bias)
    if not is_compiling() and (x.is_neg() or weight.is_neg() or bias is not None and bias.is_neg()):
        x, weight, bias = resolved(x, weight, bias)
    name = _backend.choose("layer_norm", CANDIDATES, backend, (x, weight, bias), row_for)
    if name == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    y_dtype = torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype  # as F.layer_norm
    if name != "triton" and (kernel := registered.kernel("layer_norm", name)) is not None:
        return registered.layer_norm(kernel, x, weight, bias, eps, y_dtype)
    return _LayerNorm.apply(x, weight, bias, (name, eps, y_dtype))


def add_layer_norm(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-5, dropout_p: float = 0.0,
                   out_dtype: torch.dtype | None = None, last: bool = False, seed: Tensor | None = None,
                   backend: Backend = None) -> tuple[Tensor | None, Tensor]:
    """(s, y) with s = x + dropout(branch) and y = layer_norm(s). branch None: s is x, or a view of it. last: nobody needs s, return None
    for it; torch.compile then does not fill the gradient of an unused s with zeros.

    x (..., C), the residual stream; branch of the same shape; weight (C,), bias (C,) or None. s has x's dtype. y has out_dtype;
    if None, the kernel writes the dtype in which the next matmul computes: autocast's, or x's without autocast (the reference
    leaves it fp32 under autocast, for the matmul to cast). Kept elements of branch are multiplied by 1 / (1 - dropout_p); the
    mask is drawn from torch's generator and is the same when activation checkpointing reruns the forward. seed: of the kernel's mask,
    int64 (1,) on x's device; None draws one.
    backend: as in ops/__init__.py.

    Raises ValueError (shapes, dropout_p), RuntimeError (as layer_norm).
    """
    _check(x, branch, weight, bias)
    x, branch, weight, bias = resolved(x, branch, weight, bias)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}: expected a probability, 0 to 1")
    name = _backend.choose("layer_norm", CANDIDATES, backend, (x, weight, bias, branch, out_dtype), row_for)
    if name == "reference":
        s, y = reference.add_layer_norm(x, branch, weight, bias, eps=eps, dropout_p=dropout_p)
        return None if last else s, y if out_dtype is None else y.to(out_dtype)
    if out_dtype is None:
        out_dtype = autocast_dtype(x)
    if name != "triton" and (kernel := registered.kernel("layer_norm", name)) is not None:
        s, y = registered.add_layer_norm(kernel, x, branch, weight, bias, eps, dropout_p, out_dtype)
        return None if last else s, y
    if branch is None:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x, _LayerNorm.apply(x, weight, bias, (name, eps, out_dtype))
        dropout_p = 0.0     # there is nothing to drop
    elif name == "cpp" and dropout_p > 0:   # draws nanoGPT's random numbers
        branch, dropout_p = F.dropout(branch, dropout_p), 0.0
    seed = dropout_seed(x, dropout_p, seed) if dropout_p > 0 else None
    return _AddLayerNorm.apply(x, branch, weight, bias, seed, (name, dropout_p, eps, out_dtype, last))


def implementation(x, weight, bias, *, backend=None):
    """The name of the implementation that the ops use for these arguments ("triton", "cpp", "reference")."""
    return _backend.choose("layer_norm", CANDIDATES, backend, (x, weight, bias), row_for)


def _check(x, branch, weight, bias):
    shape, row = x.shape, weight.shape  # read once each: an access takes 0.1 us
    if len(row) != 1 or not shape or shape[-1] != row[0]:
        raise ValueError(f"x {tuple(shape)} and weight {tuple(row)}: expected (..., C) and (C,)")
    if bias is not None and bias.shape != row:
        raise ValueError(f"bias {tuple(bias.shape)}: expected {tuple(row)}, like the weight, or None")
    if branch is not None and branch.shape != shape:
        raise ValueError(f"branch {tuple(branch.shape)}: expected {tuple(shape)}, like x, or None")


def _triton_why_not(x, weight, bias, branch=None, out_dtype=None):
    if (reason := _backend.triton_why_not(x, weight, bias, branch)) is not None:
        return reason
    device, dtype = x.get_device(), x.dtype  # get_device() takes half the time of x.device
    if not (dtype in KERNEL_DTYPES and weight.dtype in KERNEL_DTYPES and weight.get_device() == device
            and (bias is None or bias.dtype in KERNEL_DTYPES and bias.get_device() == device)
            and (branch is None or branch.dtype in KERNEL_DTYPES and branch.get_device() == device)):
        given = ", ".join(f"{name} is {t.dtype} on {t.device}" for name, t in (
            ("x", x), ("branch", branch), ("weight", weight), ("bias", bias)) if t is not None)
        return f"{given}; the kernel takes float32, float16 and bfloat16 on one device"
    if not 1 <= x.shape[-1] <= _MAX_C:
        return f"rows have {x.shape[-1]} elements; the kernel takes 1 to {_MAX_C}"
    if branch is not None and branch.dtype != dtype and torch.promote_types(dtype, branch.dtype) != dtype:
        return f"x is {dtype}, branch {branch.dtype}: their sum does not have x's dtype"
    return None


def row_for(x, weight, bias, branch=None, out_dtype=None):
    """The Row of the table (kernels/fastest.py) for these arguments, or None."""
    if fastest.nothing_for(x):
        return None
    C = x.shape[-1]
    return fastest.find("layer_norm", fastest.device_number(x), fastest.column(out_dtype or autocast_dtype(x)), size=C, tokens=x.numel() // max(1, C))


CANDIDATES = (("triton", _triton_why_not), ("cpp", _cpu.why_not))  # fastest first; `verify`, `tune` and swap/parts.py read it, too


@functools.cache
def _kernels():
    from ..kernels import layer_norm  # imported lazily: Triton takes 0.2 s to import, and not every user runs a kernel
    return layer_norm


def _forward(name, x, branch, weight, bias, seed, p, eps, y_dtype):
    """(s, y, statistics). A tensor that is not contiguous (a transposed or expanded view) is copied."""
    if name == "cpp":
        return _cpu.forward(x, branch, weight, bias, eps, y_dtype)
    launch = raw.layer_norm_forward if is_compiling() else _kernels().launch_forward
    return launch(x.contiguous(), None if branch is None else branch.contiguous(), weight.contiguous(),
                  None if bias is None else bias.contiguous(), seed, p, eps, y_dtype)


def _backward(name, dy, ds, s, weight, statistics, seed, p, branch_dtype, bias_dtype, need_dweight, need_dbias):
    """(dx, dbranch, dweight, dbias). dbranch is None if it equals dx."""
    if name == "cpp":
        dx, dbranch, dweight, dbias = _cpu.backward(dy, ds, s, weight, statistics, branch_dtype)
        return dx, dbranch, dweight.to(weight.dtype) if need_dweight else None, dbias.to(bias_dtype) if need_dbias else None
    arguments = (dy.contiguous(), None if ds is None else ds.contiguous(), s.contiguous(), weight.contiguous(), statistics,
                 seed, p, branch_dtype, weight.dtype if need_dweight else None, bias_dtype if need_dbias else None)
    if not is_compiling():
        return _kernels().launch_backward(*arguments)
    dx, dbranch, dweight, dbias = raw.layer_norm_backward(*arguments)
    dbranch = dbranch if seed is not None or branch_dtype not in (None, s.dtype) else None
    return dx, dbranch, dweight if need_dweight else None, dbias if need_dbias else None


class _LayerNorm(torch.autograd.Function):
    """y alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, options):
        name, eps, y_dtype = options
        _, y, statistics = _forward(name, x, None, weight, bias, None, 0.0, eps, y_dtype)
        ctx.save_for_backward(x, weight, statistics)
        ctx.options = name, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        no_second_derivative("layer_norm")
        if not is_compiling() and dy.is_neg():
            dy, = resolved(dy)
        x, weight, statistics = ctx.saved_tensors
        name, bias_dtype = ctx.options
        dx, _, dweight, dbias = _backward(name, dy, None, x, weight, statistics, None, 0.0, None, bias_dtype,
                                         *ctx.needs_input_grad[1:3])
        return dx, dweight, dbias, None


class _AddLayerNorm(torch.autograd.Function):
    """s and y; without a branch s is x. One backward kernel computes the gradient that arrives through y and adds the one through s."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, seed, options):
        name, p, eps, y_dtype, last = options
        s, y, statistics = _forward(name, x, branch, weight, bias, seed, p, eps, y_dtype)
        s = x if branch is None else s
        ctx.save_for_backward(s, weight, statistics, seed)
        # One tuple: four attributes take 0.1 us more.
        ctx.options = name, p, None if branch is None else branch.dtype, None if bias is None else bias.dtype
        if not is_compiling():  # compiled graphs get zeros for an unused output; eager asks for None and skips them
            ctx.set_materialize_grads(False)
        return None if last else s, y

    @staticmethod
    def backward(ctx, ds, dy):
        no_second_derivative("layer_norm")
        if ds is None and dy is None:
            return (None,) * 6
        ds, dy = resolved(ds, dy)
        s, weight, statistics, seed = ctx.saved_tensors
        name, p, branch_dtype, bias_dtype = ctx.options
        dweight = dbias = None
        if dy is not None:
            dx, dbranch, dweight, dbias = _backward(name, dy, ds, s, weight, statistics, seed, p, branch_dtype, bias_dtype,
                                                    *ctx.needs_input_grad[2:4])
            dbranch = None if branch_dtype is None else dx if dbranch is None else dbranch
        elif branch_dtype is None:  # only s was used
            dx, dbranch = ds, None
        elif seed is None:
            dx, dbranch = ds, ds.to(branch_dtype)
        else:
            dx, dbranch = ds, _kernels().drop(ds.contiguous(), p=p, seed=seed, branch_dtype=branch_dtype)
        return dx, dbranch, dweight, dbias, None, None


# -------------------------------------------------------------------------------------------------- what torch.compile sees
# An operator must return tensors, so a None of the launchers becomes an empty tensor here.

def _present(tensors, like):
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _raw_forward(x, branch, weight, bias, seed, p, eps, y_dtype):
    return _present(_kernels().forward(x, branch, weight, bias, eps=eps, p=p, seed=seed, y_dtype=y_dtype), x)


def _fake_forward(x, branch, weight, bias, seed, p, eps, y_dtype):
    s = torch.empty_like(x) if branch is not None else None
    statistics = x.new_empty((2, x.numel() // x.size(-1)), dtype=torch.float32)
    return _present((s, torch.empty_like(x, dtype=y_dtype), statistics), x)


def _raw_backward(dy, ds, s, weight, statistics, seed, p, branch_dtype, dweight_dtype, dbias_dtype):
    return _present(_kernels().backward(dy, ds, s, weight, statistics, p=p, seed=seed, branch_dtype=branch_dtype,
                                        dweight_dtype=dweight_dtype, dbias_dtype=dbias_dtype), s)


def _fake_backward(dy, ds, s, weight, statistics, seed, p, branch_dtype, dweight_dtype, dbias_dtype):
    own_dbranch = branch_dtype is not None and (p > 0 or branch_dtype != s.dtype)
    sums = (None if dtype is None else s.new_empty(s.size(-1), dtype=dtype) for dtype in (dweight_dtype, dbias_dtype))
    return _present((torch.empty_like(s), torch.empty_like(s, dtype=branch_dtype) if own_dbranch else None, *sums), s)


define("layer_norm_forward(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, Tensor? seed, float p, float eps, "
       "ScalarType y_dtype) -> (Tensor, Tensor, Tensor)", _raw_forward, _fake_forward)
define("layer_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor statistics, Tensor? seed, float p, "
       "ScalarType? branch_dtype, ScalarType? dweight_dtype, ScalarType? dbias_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
       _raw_backward, _fake_backward)
