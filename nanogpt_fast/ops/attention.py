"""Causal attention as an op: the kernels of kernels/attention_*.py with autograd, torch.compile and a choice of implementation.

    causal_attention_qkvpacked    from the packed projection (B, T, 3C) to (B, T, C), one gradient (B, T, 3C): the model's
    causal_attention              from q, k, v, each (B, H, T, D), also with fewer queries than keys
    decode_attention              one query a row over a key-value cache with a length a row; no gradient

What is kept for the backward, for a token in half precision: qkv (6C bytes), out (2C) and 4H of lse; with dropout one seed a
call.
"""
import functools
import math

import torch
from torch.compiler import is_compiling

from .. import backend as _backend
from .. import reference
from . import attention_cpu
from .registration import define, raw

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 256

# Where `auto` leaves a call that the kernels could take to PyTorch: {(architecture, largest head size from which on): reason},
# and for float32 on all. NOT MEASURED YET: these are expectations from figures that others published for kernels of this design
# (H100, forward, T=1024, TFLOP/s). At D=64 Triton has 291 and cuDNN 288; what the packed layout saves beside the matmuls (the
# output's transpose, the `cat` of three gradients, 0.1 ms a layer at 64 x 1024 tokens) decides for the kernels. At D=128 it is
# 273 and 410, and on Blackwell cuDNN's distance is larger than that. `backend="fused"` takes the kernels everywhere.
LEFT_TO_PYTORCH = {
    80: (64, "head sizes over 64 are expected to be slower than FlashAttention 2 here (not measured yet)"),
    86: (64, "head sizes over 64 are expected to be slower than FlashAttention 2 here (not measured yet)"),
    89: (64, "head sizes over 64 are expected to be slower than FlashAttention 2 here (not measured yet)"),
    90: (64, "head sizes over 64 are expected to be slower than cuDNN (not measured yet; published: 273 against 410 TFLOP/s)"),
    100: (0, "these kernels are expected to be slower than cuDNN on Blackwell (not measured yet)"),
}
FLOAT32_LEFT = "IEEE float32 runs without tensor cores and is expected to be slower than PyTorch's kernels (not measured yet)"


# ------------------------------------------------------------------------------------------------------------- public functions


def causal_attention_qkvpacked(qkv, n_head, *, dropout_p=0.0, scale=None, backend=None):
    """Causal attention on the packed projection: (B, T, 3C), q, k and v side by side in the last dimension -> (B, T, C).

    qkv: floating point, any strides; its heads are n_head neighbouring runs of D = C / n_head. The output has the autocast
    dtype where autocast is on (float64 excepted), else qkv's. scale: a positive number, 1/sqrt(D) by default. dropout_p: of the
    weights, 0 when not training; the mask's seed is drawn from the generator of qkv's device. backend: a choice for each op as
    `backend.parse` gives it, or None.

    Raises ValueError (shapes, dropout_p), RuntimeError (backend "fused" where no kernel can run; a second derivative, which
    only the reference has). Source: kernels/attention_forward.py and attention_backward.py.
    """
    shape = qkv.shape
    if len(shape) != 3 or shape[2] % (3 * n_head):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (B, T, 3C) with C a multiple of n_head={n_head}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 to 1")
    dtype = _autocast_dtype(qkv)
    name = _backend.choose("attention", CANDIDATES, backend, (qkv, dtype, shape[2] // (3 * n_head), scale, backend, dropout_p))
    if name == "reference":
        return reference.causal_attention_qkvpacked(qkv, n_head, dropout_p=dropout_p, scale=scale)
    if qkv.dtype != dtype:      # a `to` that changes nothing still costs a microsecond
        qkv = qkv.to(dtype)
    if name == "cpp":
        return attention_cpu.packed(qkv, n_head, scale)
    if qkv.requires_grad and torch.is_grad_enabled():
        return _PackedAttention.apply(qkv, n_head, scale, dropout_p)
    run = raw.attention_qkvpacked if is_compiling() else _packed_forward
    return run(qkv, _seed(qkv, dropout_p), n_head, scale, dropout_p)[0]


def causal_attention(q, k, v, *, dropout_p=0.0, scale=None, backend=None):
    """softmax(scale * q k^T, causal) v: q (B, H, Tq, D), k and v (B, H, Tk, D), Tq <= Tk -> (B, H, Tq, D).

    With Tq < Tk the queries are the last Tq positions: query i sees keys 0 .. Tk - Tq + i. Any strides; the kernels return a
    view of a (B, Tq, H, D) tensor, so that `y.transpose(1, 2).reshape(B, Tq, C)` copies nothing. dtype, scale, dropout_p,
    backend and what raises: as for `causal_attention_qkvpacked`.
    """
    _check_qkv(q, k, v, dropout_p)
    if _backend.choose("attention", SEPARATE_CANDIDATES, backend, (q, k, v, scale, backend)) == "reference":
        return reference.causal_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, scale, dropout_p)
    run = raw.attention if is_compiling() else _forward
    return run(q, k, v, _seed(q, dropout_p), scale, dropout_p)[0].transpose(1, 2)


def decode_attention(q, k, v, lengths, *, scale=None, backend=None):
    """One new query a row over a cache: q (B, H, 1, D), k and v (B, H, T, D), of which row b has lengths[b] -> (B, H, 1, D).

    lengths: (B,) int32 or int64 on q's device, 1 to T, not looked at by the host, so one captured CUDA graph serves all
    lengths. For generation: no gradient. scale, backend and what raises: as for `causal_attention_qkvpacked`.
    """
    if q.dim() != 4 or q.size(2) != 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (B, H, 1, D)")
    _check_qkv(q, k, v, 0.0)
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected ({q.size(0)},)")
    if _backend.choose("attention", _DECODE_CANDIDATES, backend, (q, k, v, scale, backend)) == "reference":
        visible = (torch.arange(k.size(2), device=k.device) < lengths[:, None])[:, None, None]          # (B, 1, 1, T)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    run = raw.attention_decode if is_compiling() else _decode
    with torch.no_grad():
        return run(_autocast(q), _autocast(k), _autocast(v), lengths, scale)


def _check_qkv(q, k, v, dropout_p):
    if (q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.size(3) != k.size(3)
            or q.size(2) > k.size(2)):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected (B, H, Tq, D), (B, H, Tk, D) "
                         "twice, Tq <= Tk")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 to 1")


# ------------------------------------------------------------------------------------------------ which implementation, and why


def _why_not(x, dtype, D, scale, backend, dropout_p=0.0, left_to_pytorch=True):
    """None where the kernels can take x (any of q, k, v, or qkv) in dtype, head size D, and are the choice, else the reason."""
    if (reason := _backend.triton_why_not(x)) is not None:
        return reason
    if dtype not in _DTYPES:
        return f"the input is {dtype}; the kernels take float32, float16 and bfloat16"
    if not 1 <= D <= LARGEST_HEAD:
        return f"the head size is {D}; the kernels take 1 to {LARGEST_HEAD}"
    if scale is not None and not 0 < scale < math.inf:
        return f"scale is {scale}; the kernels take positive numbers"
    if x.is_cuda and left_to_pytorch and _backend.choice("attention", backend) == "auto":
        return _why_left(_backend.compute_capability(x.device.index), D, dtype)
    return None


def _separate_why_not(q, k, v, scale, backend, left_to_pytorch=True):
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            return f"q is on {q.device}, {name} on {x.device}"
        if _autocast_dtype(x) != _autocast_dtype(q):
            return f"q is {q.dtype}, {name} {x.dtype}"               # the reference raises PyTorch's own error
    return _why_not(q, _autocast_dtype(q), q.size(3), scale, backend, left_to_pytorch=left_to_pytorch)


def _decode_why_not(q, k, v, scale, backend):
    # A matter of bytes, not of tensor cores: the reasons of LEFT_TO_PYTORCH do not apply, the other ones do.
    return _separate_why_not(q, k, v, scale, backend, left_to_pytorch=False)


def _why_left(arch, D, dtype):
    """Why `auto` leaves this to PyTorch, or None."""
    if dtype == torch.float32:
        return FLOAT32_LEFT
    known = 80
    for row in LEFT_TO_PYTORCH:                         # a loop that torch.compile can trace; rows ascend
        if row <= arch:
            known = row
    largest, reason = LEFT_TO_PYTORCH[known]
    return reason if D > largest else None


CANDIDATES = (("triton", _why_not), ("cpp", attention_cpu.why_not))  # args: (qkv, dtype, head size, scale, backend, dropout_p)
SEPARATE_CANDIDATES = (("triton", _separate_why_not),)               # args: (q, k, v, scale, backend)
_DECODE_CANDIDATES = (("triton", _decode_why_not),)


def _autocast_dtype(x):
    """The dtype that x is computed in."""
    dtype = x.dtype
    kind = "cuda" if x.is_cuda else "cpu"                   # a third of the time of x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and dtype != torch.float64 else dtype


def _autocast(x):
    dtype = _autocast_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)


# --------------------------------------------------------------------------------------------------------------------- autograd


def _seed(x, dropout_p):
    """One number a call, as a tensor: a captured graph draws anew at each replay, and a recomputed forward gets the same one.

    31 bits: Inductor writes the bound as an int32 constant.
    """
    return torch.randint(2**31 - 1, (1,), dtype=torch.int64, device=x.device) if dropout_p > 0 else None


class _PackedAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, qkv, n_head, scale, dropout_p):
        seed = _seed(qkv, dropout_p)
        run = raw.attention_qkvpacked if is_compiling() else _packed_forward
        out, lse = run(qkv, seed, n_head, scale, dropout_p)
        ctx.save_for_backward(qkv, out, lse, seed)
        ctx.options = n_head, scale, dropout_p
        return out

    @staticmethod
    def backward(ctx, do):
        _refuse_second_derivative()
        qkv, out, lse, seed = ctx.saved_tensors
        run = raw.attention_qkvpacked_backward if is_compiling() else _packed_backward
        return run(do, qkv, out, lse, seed, *ctx.options), None, None, None


class _Attention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q, k, v, scale, dropout_p):
        seed = _seed(q, dropout_p)
        run = raw.attention if is_compiling() else _forward
        out, lse = run(q, k, v, seed, scale, dropout_p)
        ctx.save_for_backward(q, k, v, out, lse, seed)
        ctx.options = scale, dropout_p
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, do):
        _refuse_second_derivative()
        q, k, v, out, lse, seed = ctx.saved_tensors
        run = raw.attention_backward if is_compiling() else _backward
        gradients = run(do, q, k, v, out, lse, seed, *ctx.options)
        return *(g.transpose(1, 2) if need else None for g, need in zip(gradients, ctx.needs_input_grad)), None, None


def _refuse_second_derivative():
    if torch.is_grad_enabled() and not is_compiling():
        raise RuntimeError("the attention kernels have no second derivative (create_graph=True); use backend='reference'")


# --------------------------------------------------------------------------------------------------------- tensors to launchers


@functools.cache
def _kernels():
    """The launchers. Imported at the first call: that imports Triton."""
    from ..kernels import attention_backward, attention_common, attention_decode, attention_forward
    return attention_forward, attention_backward, attention_decode, attention_common


def _readable(x):
    """x, or a contiguous copy where the kernels can't read it in place."""
    return x if _kernels()[3].rows_are_contiguous(x) else x.contiguous()


def _scale(scale, D):
    return 1.0 / math.sqrt(D) if scale is None else scale


def _packed_forward(qkv, seed, n_head, scale, dropout_p):
    return _kernels()[0].launch_forward_qkvpacked(_readable(qkv), seed, n_head, _scale(scale, qkv.size(2) // (3 * n_head)), dropout_p)


def _packed_backward(do, qkv, out, lse, seed, n_head, scale, dropout_p):
    return _kernels()[1].launch_backward_qkvpacked(_readable(do), _readable(qkv), out, lse, seed, n_head,
                                                   _scale(scale, qkv.size(2) // (3 * n_head)), dropout_p)


def _readable_qkv(q, k, v):
    q, k, v = _readable(q), _readable(k), _readable(v)
    return (q, k, v) if _kernels()[3].same_layout(k, v) else (q, k.contiguous(), v.contiguous())


def _forward(q, k, v, seed, scale, dropout_p):
    return _kernels()[0].launch_forward(*_readable_qkv(q, k, v), seed, _scale(scale, q.size(3)), dropout_p)


def _backward(do, q, k, v, out, lse, seed, scale, dropout_p):
    (B, H, Tq, D), Tk = q.shape, k.size(2)
    gradients = tuple(torch.empty((B, T, H, D), dtype=q.dtype, device=q.device) for T in (Tq, Tk, Tk))
    _kernels()[1].launch_backward(_readable(do), *_readable_qkv(q, k, v), out, lse, *gradients, seed, _scale(scale, D), dropout_p)
    return gradients


def _decode(q, k, v, lengths, scale):
    return _kernels()[2].attention_decode(_readable(q), *_readable_qkv(q, k, v)[1:], lengths.contiguous(),
                                          scale=_scale(scale, q.size(3)))


# ------------------------------------------------------------------------------------------------------ what torch.compile sees

def _fake_packed(qkv, seed, n_head, scale, dropout_p):
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32)


def _fake_forward(q, k, v, seed, scale, dropout_p):
    B, H, Tq, D = q.shape
    return q.new_empty(B, Tq, H, D), q.new_empty(B, H, Tq, dtype=torch.float32)


def _fake_backward(do, q, k, v, out, lse, seed, scale, dropout_p):
    return tuple(x.new_empty(x.transpose(1, 2).shape) for x in (q, k, v))


define("attention_qkvpacked(Tensor qkv, Tensor? seed, int n_head, float? scale, float dropout_p) -> (Tensor, Tensor)",
        lambda *args: _packed_forward(*args), _fake_packed)
define("attention_qkvpacked_backward(Tensor do, Tensor qkv, Tensor out, Tensor lse, Tensor? seed, int n_head, float? scale, "
        "float dropout_p) -> Tensor", lambda *args: _packed_backward(*args), lambda do, qkv, *args: qkv.new_empty(qkv.shape))
define("attention(Tensor q, Tensor k, Tensor v, Tensor? seed, float? scale, float dropout_p) -> (Tensor, Tensor)",
        lambda *args: _forward(*args), _fake_forward)
define("attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? seed, float? scale, "
        "float dropout_p) -> (Tensor, Tensor, Tensor)", lambda *args: _backward(*args), _fake_backward)
define("attention_decode(Tensor q, Tensor k, Tensor v, Tensor lengths, float? scale) -> Tensor",
        lambda *args: _decode(*args), lambda q, *args: q.new_empty(q.shape))
