"""Kernels of one's own: `register` adds an implementation to an op. Then `verify` checks it, `tune` and the benchmarks time it, and
`auto` takes it where `tune` measured it fastest; `backend="layer_norm=NAME"` takes it everywhere.

    op              forward(*tensors, **options) -> result                                                              options
    attention       q, k, v (B, H, T, D), causal -> (B, H, T, D)                                                        scale
    layer_norm      x (..., C), weight (C,), bias (C,) or None -> (..., C)                                              eps
    mlp             x (..., C), w_fc (F, C), b_fc (F,) or None, w_proj (C, F), b_proj (C,) or None -> (..., C)          activation
    cross_entropy   x (N, C), weight (V, C), targets (N,) int64 -> the mean loss, a scalar                              ignore_index

Matmuls' tensors come in the dtype of autocast. Dropout, residuals and casts stay with the op; a call that the signature cannot say
(dropout in attention, logits returned) takes another implementation. docs/hacking.md has an example.
"""
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import backend, reference
from .common import autocast_dtype, no_second_derivative

OPS = ("attention", "layer_norm", "mlp", "cross_entropy")
_kernels = {}           # {(op, name): Kernel}


class Kernel(NamedTuple):
    """What was registered."""
    op: str
    name: str
    forward: Callable
    backward: Callable | None
    why_not: Callable | None

    def __call__(self, *tensors, **options):
        if self.backward is None:
            return self.forward(*tensors, **options)
        return _Function.apply(self, options, *tensors)


def register(op: str, name: str, forward: Callable, backward: Callable | None = None, why_not: Callable | None = None) -> None:
    """Add a kernel `name` to `op`: see the table at the top of ops/registered.py. Registering a name again replaces it.

    forward: with a `backward`, it returns (result, saved), a tensor and a tuple of tensors; without one, the result, which autograd
    differentiates. backward(saved, gradient, **options): the gradients of all tensors, None for those that have none. why_not(*tensors,
    **options): None where the kernel can run, else the reason as text; None: everywhere. It gets tensors before they are cast, and the
    options of a GPT (eps 1e-5, GELU, ignore_index -1); forward raises for others that it does not take.

    Raises ValueError for an op or a name that cannot be taken, TypeError for what cannot be called.
    """
    if op not in OPS:
        raise ValueError(f"op is {op!r}; kernels can be registered for {', '.join(OPS)}")
    taken = (*backend.CHOICES, *backend.IMPLEMENTATIONS[op])
    if not isinstance(name, str) or not name or name in taken or set(name) & set(",= "):
        raise ValueError(f"name is {name!r}; expected a text without commas, blanks or =, and none of {', '.join(taken)}")
    for what, function in (("forward", forward), ("backward", backward), ("why_not", why_not)):
        if not callable(function) and (function is not None or what == "forward"):
            raise TypeError(f"{what} is {function!r}; expected a function")
    kernel = _kernels[op, name] = Kernel(op, name, forward, backward, why_not)
    backend.own[op][name] = lambda *args: _why_not(kernel, args)


def unregister(op: str, name: str) -> None:
    """Forget a kernel. Raises KeyError where none of this name was registered."""
    del _kernels[op, name], backend.own[op][name]


def load(path):
    """Run a Python file that registers kernels. Raises ValueError where there is none, or it registers nothing."""
    path, before = Path(path), len(_kernels)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected a Python file that calls nanogpt_fast.ops.register")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    if len(_kernels) == before:
        raise ValueError(f"{path} registers no kernel; expected it to call nanogpt_fast.ops.register")


def load_named():
    """Load the files that NANOGPT_FAST_KERNELS names, separated by the system's path separator."""
    for path in filter(None, os.environ.get("NANOGPT_FAST_KERNELS", "").split(os.pathsep)):
        load(path)


backend.before_first_choice.append(load_named)


def kernel(op, name):
    """The Kernel of this name, or None if `name` is one of our own implementations."""
    return _kernels.get((op, name))


class _Function(torch.autograd.Function):

    @staticmethod
    def forward(ctx, kernel, options, *tensors):
        result, saved = kernel.forward(*tensors, **options)
        ctx.save_for_backward(*saved)
        ctx.kernel, ctx.options = kernel, options
        return result

    @staticmethod
    def backward(ctx, gradient):
        no_second_derivative(f"{ctx.kernel.op}={ctx.kernel.name}")
        gradients = ctx.kernel.backward(ctx.saved_tensors, gradient.contiguous(), **ctx.options)
        return None, None, *gradients


# ---------------------------------------------------------------------------------------------------- the ops' arguments


def _why_not(kernel, args):
    asked = _ASKED[kernel.op](*args)
    if isinstance(asked, str):
        return asked
    return None if kernel.why_not is None else kernel.why_not(*asked[0], **asked[1])


def _attention(x, *rest):
    """From the arguments of attention's two lists of candidates."""
    if isinstance(rest[0], torch.Tensor):
        (q, k, v), (dtype, scale, _, dropout_p) = (x, *rest[:2]), rest[2:]
    else:
        dtype, D, scale, _, dropout_p = rest
        q, k, v = reference.split_heads(x, x.size(-1) // (3 * D))
    if dropout_p > 0:
        return "a registered kernel has no dropout"
    if q.shape != k.shape:
        return f"there are {q.size(2)} queries and {k.size(2)} keys; a registered kernel takes as many"
    return (q, k, v), dict(scale=_scale(scale, q))


def _layer_norm(x, weight, bias, branch=None, out_dtype=None):
    return (x, weight, bias), dict(eps=1e-5)


def _mlp(x, w_fc, b_fc, w_proj, b_proj, copies=None):
    return (x, w_fc, b_fc, w_proj, b_proj), dict(activation="gelu")


def _cross_entropy(x, weight, targets, return_logits=True):
    if return_logits:
        return "a registered kernel returns no logits"
    return (x.reshape(-1, x.size(-1)), weight, targets.reshape(-1)), dict(ignore_index=-1)


_ASKED = {"attention": _attention, "layer_norm": _layer_norm, "mlp": _mlp, "cross_entropy": _cross_entropy}


def _scale(scale, q):
    return 1.0 / math.sqrt(q.size(3)) if scale is None else scale


def _cast(*tensors):
    """In autocast's dtype, or in that of the first."""
    dtype = autocast_dtype(tensors[0])
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def attention(kernel, q, k, v, scale, dtype):
    """(B, H, T, D)."""
    return kernel(*(part.to(dtype) for part in (q, k, v)), scale=_scale(scale, q))


def mlp(kernel, x, w_fc, b_fc, w_proj, b_proj, activation, dropout_p):
    y = kernel(*_cast(x, w_fc, b_fc, w_proj, b_proj), activation=activation)
    return F.dropout(y, dropout_p) if dropout_p > 0 else y


def add_layer_norm(kernel, x, branch, weight, bias, eps, dropout_p, out_dtype):
    """(s, y), as ops/norm.py's."""
    if branch is not None:
        x = x + (F.dropout(branch, dropout_p) if dropout_p > 0 else branch)
    return x, kernel(x, weight, bias, eps=eps).to(out_dtype)


def cross_entropy(kernel, x, weight, targets, ignore_index, reduction, dtype):
    x, weight = _cast(x.reshape(-1, x.size(-1)), weight)
    loss = kernel(x, weight, targets.reshape(-1).contiguous(), ignore_index=ignore_index).to(dtype)
    return loss if reduction == "mean" else loss * (targets != ignore_index).sum()
