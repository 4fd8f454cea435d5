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
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import backend, reference
from .common import autocast_dtype, no_second_derivative, resolved

OPS = ("attention", "layer_norm", "mlp", "cross_entropy")
_kernels = {}           # {(op, name): Kernel}
_registered = 0         # how many times `register` was called


class Kernel(NamedTuple):
    """What was registered."""
    op: str
    name: str
    forward: Callable
    backward: Callable | None
    why_not: Callable | None

    def __call__(self, shape, *tensors, **options):
        """The result for these arguments, of this shape."""
        if self.backward is None:
            return self.checked(self.forward(*tensors, **options), shape)
        return _Function.apply(self, shape, options, *tensors)

    def checked(self, result, shape):
        """`result`. Raises TypeError or ValueError where it is no tensor of this shape, before something far from here fails."""
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"{self.op}={self.name}: forward returned {_described(result)}; expected a tensor {tuple(shape)}"
                            + (": what goes with a backward returns two things" if self.backward is None and isinstance(result, tuple) else ""))
        if result.shape != shape:
            raise ValueError(f"{self.op}={self.name}: forward returned a tensor {tuple(result.shape)}; expected {tuple(shape)}")
        return result


def _described(result):
    return "None" if result is None else f"a {type(result).__name__}"


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
    global _registered
    _registered += 1
    kernel = _kernels[op, name] = Kernel(op, name, forward, backward, why_not)
    backend.own[op][name] = lambda *args: _why_not(kernel, args)


def unregister(op: str, name: str) -> None:
    """Forget a kernel. Raises ValueError where there is none of this name."""
    if (op, name) not in _kernels:
        raise ValueError(f"{op!r} has no registered kernel {name!r}; it has {', '.join(n for o, n in _kernels if o == op) or 'none'}")
    del _kernels[op, name], backend.own[op][name]


def load(path):
    """Run a Python file that registers kernels, unless it is the script that runs anyway. Raises ValueError where there is none, or it
    registers nothing; RuntimeError where it fails."""
    path, before = Path(path), _registered
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected a Python file that calls nanogpt_fast.ops.register")
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is not None and os.path.exists(script) and path.samefile(script):
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ValueError(f"{path} is not a Python file by its name; expected one that ends in .py")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:
        raise RuntimeError(f"{path} fails: {type(error).__name__}: {error}") from error
    if _registered == before:
        raise ValueError(f"{path} registers no kernel; expected it to call nanogpt_fast.ops.register")


def load_named():
    """Load the files that NANOGPT_FAST_KERNELS names, separated by the system's path separator."""
    for path in filter(None, os.environ.get("NANOGPT_FAST_KERNELS", "").split(os.pathsep)):
        try:
            load(path)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"NANOGPT_FAST_KERNELS: {error}") from error


backend.before_first_choice.append(load_named)


def kernel(op, name):
    """The Kernel of this name, or None if `name` is one of our own implementations."""
    return _kernels.get((op, name)) if _kernels else None


class _Function(torch.autograd.Function):

    @staticmethod
    def forward(ctx, kernel, shape, options, *tensors):
        returned = kernel.forward(*tensors, **options)
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], (tuple, list)):
            raise TypeError(f"{kernel.op}={kernel.name}: forward returned {_described(returned)}; with a backward of its own, expected "
                            "(result, saved): a tensor and a tuple of tensors")
        result, saved = returned
        ctx.save_for_backward(*saved)
        ctx.kernel, ctx.options, ctx.shapes = kernel, options, [None if tensor is None else tensor.shape for tensor in tensors]
        return kernel.checked(result, shape)

    @staticmethod
    def backward(ctx, gradient):
        no_second_derivative(f"{ctx.kernel.op}={ctx.kernel.name}")
        gradient, = resolved(gradient)
        gradients = ctx.kernel.backward(ctx.saved_tensors, gradient.contiguous(), **ctx.options)
        kernel, shapes = ctx.kernel, ctx.shapes
        if not isinstance(gradients, (tuple, list)) or len(gradients) != len(shapes):
            number = f" of {len(gradients)}" if isinstance(gradients, (tuple, list)) else ""
            raise TypeError(f"{kernel.op}={kernel.name}: backward returned {_described(gradients)}{number}; expected {len(shapes)} gradients, one for "
                            "each tensor of forward, None for those that have none")
        for i, (gradient, shape) in enumerate(zip(gradients, shapes)):
            if gradient is not None and gradient.shape != shape:
                raise ValueError(f"{kernel.op}={kernel.name}: gradient {i} of backward has shape {tuple(gradient.shape)}; expected "
                                 f"{'None: there is no such tensor' if shape is None else tuple(shape)}")
        return None, None, None, *gradients


# ---------------------------------------------------------------------------------------------------- the ops' arguments


def _why_not(kernel, args):
    asked = _ASKED[kernel.op](*args)
    if isinstance(asked, str):
        return asked
    return None if kernel.why_not is None else kernel.why_not(*asked[0], **asked[1])


def _attention(x, *rest):
    """From the arguments of attention's two lists of candidates."""
    if isinstance(rest[0], torch.Tensor):
        (q, k, v), (dtype, scale, dropout_p) = (x, *rest[:2]), rest[2:]
    else:
        dtype, D, scale, dropout_p = rest
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
    return kernel(q.shape, *(part.to(dtype) for part in (q, k, v)), scale=_scale(scale, q))


def mlp(kernel, x, w_fc, b_fc, w_proj, b_proj, activation, dropout_p):
    """`ops.gelu_mlp` by a registered kernel."""
    y = kernel(x.shape, *_cast(x, w_fc, b_fc, w_proj, b_proj), activation=activation)
    return F.dropout(y, dropout_p) if dropout_p > 0 else y


def layer_norm(kernel, x, weight, bias, eps, out_dtype):
    """`ops.layer_norm` by a registered kernel."""
    return kernel(x.shape, x, weight, bias, eps=eps).to(out_dtype)


def add_layer_norm(kernel, x, branch, weight, bias, eps, dropout_p, out_dtype):
    """(s, y), as ops/norm.py's."""
    if branch is not None:
        x = x + (F.dropout(branch, dropout_p) if dropout_p > 0 else branch)
    return x, layer_norm(kernel, x, weight, bias, eps, out_dtype)


def cross_entropy(kernel, x, weight, targets, ignore_index, reduction, dtype):
    """`ops.linear_cross_entropy` by a registered kernel: the loss alone, in `dtype`."""
    x, weight = _cast(x.reshape(-1, x.size(-1)), weight)
    loss = kernel((), x, weight, targets.reshape(-1).contiguous(), ignore_index=ignore_index).to(dtype)
    return loss if reduction == "mean" else loss * (targets != ignore_index).sum()
