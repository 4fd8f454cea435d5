"""Causal attention as an op: the kernels of kernels/attention_*.py with autograd, torch.compile and a choice of implementation.

    causal_attention_qkvpacked    packed projection (B, T, 3C) -> (B, T, C), one gradient (B, T, 3C); the model uses this one
    causal_attention              separate q, k, v, each (B, H, T, D); there may be fewer queries than keys
    decode_attention              one query per row over a key-value cache with a length per row; no gradient

Saved for the backward, per token in half precision: qkv (6C bytes), out (2C) and lse (4H); with dropout also one seed per call.
"""
import functools
import math
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import backend as _backend, reference
from ..kernels import fastest
from . import registered as _registered
from .common import KERNEL_DTYPES, Backend, autocast_dtype, dropout_seed, no_second_derivative, resolved
from .cpu import attention as _cpu
from .hopper import attention as _hopper
from .registration import define, raw

LARGEST_HEAD = 256
LOG2_E = math.log2(math.e)

# `auto` follows the rows "attention" (no gradient), "attention training" and "attention backward" of kernels/fastest.json, or those that
# `nanogpt-fast tune` measured. H100, 12 heads of 64, us at 64 x 1024 and 12 x 1024 tokens (python -m benchmarks.gpu.sweep):
#    forward     cuDNN 297 and 68, our Triton kernel 359 and 78
#    backward    cuDNN, with the `cat` of its three gradients, 1,314 and 279; our Triton kernels 1,129 and 225, our Hopper kernels less
# cuDNN takes 77 ms there to build a plan for each new shape. Training amortises that. Without a gradient, prompts may have any length,
# so cuDNN runs only for sequence lengths that are multiples of 64, and its row begins at 16,384 tokens.
CUDNN_LENGTHS = 64


# ------------------------------------------------------------------------------------------------------------- public functions


def causal_attention_qkvpacked(qkv: Tensor, n_head: int, *, dropout_p: float = 0.0, scale: float | None = None, seed: Tensor | None = None,
                               backend: Backend = None) -> Tensor:
    """Causal attention on the packed projection: (B, T, 3C), q, k and v side by side in the last dimension -> (B, T, C).

    qkv: floating point, any strides; each of q, k and v is n_head heads of D = C / n_head channels, side by side. The output has
    the autocast dtype if autocast is on (except for float64), else qkv's. scale: a positive number, 1/sqrt(D) by default.
    dropout_p: for the attention weights, 0 when not training. seed: of the kernels' mask, int64 (1,) on qkv's device; None draws one from
    the generator of that device. backend: as in ops/__init__.py.

    Raises ValueError (shapes, dropout_p), RuntimeError (backend "fused" and no kernel can run; a second derivative, which
    only the reference has). Source: kernels/attention_forward.py and attention_backward.py; for heads of 64 on an H100 or H200 the
    backward is csrc/hopper/attention_backward.cu, and `auto` runs cuDNN's forward where the table lists it.
    """
    shape = qkv.shape
    if len(shape) != 3 or n_head < 1 or shape[2] % (3 * n_head):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (B, T, 3C) with C a multiple of n_head={n_head}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 to 1")
    if not is_compiling() and qkv.is_neg():
        qkv, = resolved(qkv)
    dtype = autocast_dtype(qkv)
    name = _backend.choose("attention", CANDIDATES, backend, (qkv, dtype, shape[2] // (3 * n_head), scale, dropout_p), row_for)
    if name == "reference":
        return reference.causal_attention_qkvpacked(qkv, n_head, dropout_p=dropout_p, scale=scale)
    if name != "triton" and (kernel := _registered.kernel("attention", name)) is not None:
        y = _registered.attention(kernel, *reference.split_heads(qkv, n_head), scale, dtype)
        return y.transpose(1, 2).reshape(*shape[:2], -1)
    if qkv.dtype != dtype:      # a no-op `to` still costs a microsecond
        qkv = qkv.to(dtype)
    if name == "cpp":
        return _CPUAttention.apply(qkv, n_head, scale)
    if qkv.requires_grad and torch.is_grad_enabled():
        return _PackedAttention.apply(qkv, seed, (n_head, scale, dropout_p), name == "cudnn")
    if name == "cudnn":
        return raw.attention_qkvpacked_cudnn(qkv, n_head, scale)[0] if is_compiling() else _cudnn_packed(qkv, n_head, scale, False)[0]
    run = raw.attention_qkvpacked if is_compiling() else _kernels().forward.launch_forward_qkvpacked
    return run(qkv, dropout_seed(qkv, dropout_p, seed), n_head, scale, dropout_p)[0]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, scale: float | None = None, backend: Backend = None) -> Tensor:
    """softmax(scale * q k^T, causal) v: q (B, H, Tq, D), k and v (B, H, Tk, D), Tq <= Tk -> (B, H, Tq, D).

    With Tq < Tk the queries are the last Tq positions: query i sees keys 0 .. Tk - Tq + i. Any strides; the kernels return a
    view of a (B, Tq, H, D) tensor, so that `y.transpose(1, 2).reshape(B, Tq, C)` copies nothing. dtype, scale, dropout_p,
    backend and errors: as for `causal_attention_qkvpacked`.
    """
    _check_qkv(q, k, v, dropout_p)
    if not is_compiling() and (q.is_neg() or k.is_neg() or v.is_neg()):
        q, k, v = resolved(q, k, v)
    dtype = autocast_dtype(q)
    name = _backend.choose("attention", SEPARATE_CANDIDATES, backend, (q, k, v, dtype, scale, dropout_p), separate_row_for)
    if name == "reference":
        return reference.causal_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    if name != "triton" and (kernel := _registered.kernel("attention", name)) is not None:
        return _registered.attention(kernel, q, k, v, scale, dtype)
    if q.dtype != dtype or k.dtype != dtype or v.dtype != dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if _differentiable(q, k, v):
        return _Attention.apply(q, k, v, (scale, dropout_p, name == "cudnn"))
    if name == "cudnn":
        return (raw.attention_cudnn(q, k, v, scale) if is_compiling() else _cudnn(q, k, v, scale, False))[0].transpose(1, 2)
    run = raw.attention if is_compiling() else _kernels().forward.launch_forward
    return run(q, k, v, dropout_seed(q, dropout_p), scale, dropout_p)[0].transpose(1, 2)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float | None = None, backend: Backend = None) -> Tensor:
    """One new query per row over a cache: q (B, H, 1, D), k and v (B, H, T, D), with lengths[b] valid keys in row b -> (B, H, 1, D).

    lengths: (B,) int32 or int64 on q's device, 1 to T. The host never reads them, so one captured CUDA graph serves all lengths.
    For generation, hence no gradient. scale, backend and errors: as for `causal_attention_qkvpacked`; but only Triton has a kernel for it,
    so an implementation's name ("attention=cudnn") is about the other two functions, and here means "auto".
    """
    if q.dim() != 4 or q.size(2) != 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (B, H, 1, D)")
    _check_qkv(q, k, v, 0.0)
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected ({q.size(0)},)")
    q, k, v, lengths = resolved(q, k, v, lengths)
    dtype = autocast_dtype(q)
    args = q, k, v, dtype, scale
    if _backend.choose("attention", _DECODE_CANDIDATES, backend, args, by_name=False) == "reference":
        visible = (torch.arange(k.size(2), device=k.device) < lengths[:, None])[:, None, None]          # (B, 1, 1, T)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    run = raw.attention_decode if is_compiling() else _decode
    with torch.no_grad():
        return run(q.to(dtype), k.to(dtype), v.to(dtype), lengths, scale)


def _check_qkv(q, k, v, dropout_p):
    keys = k.shape
    try:
        (B, H, Tq, D), (b, h, Tk, d) = q.shape, keys
        right = v.shape == keys and B == b and H == h and Tq <= Tk and D == d
    except ValueError:      # not four dimensions
        right = False
    if not right:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected q (B, H, Tq, D), k and v "
                         "(B, H, Tk, D), Tq <= Tk")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 to 1")


# ------------------------------------------------------------------------------------------------ which implementation, and why


def _why_not(x, dtype, D, scale, dropout_p=0.0, others=()):
    """None if the kernels can run on x (qkv, or q with k and v as the others) in this dtype and head size, else the reason."""
    if (reason := _backend.triton_why_not(x, *others)) is not None:
        return reason
    if dtype not in KERNEL_DTYPES:
        return f"the input is {dtype}; the kernels take float32, float16 and bfloat16"
    if not 1 <= D <= LARGEST_HEAD:
        return f"the head size is {D}; the kernels take 1 to {LARGEST_HEAD}"
    if scale is not None and not 0 < scale < math.inf:
        return f"scale is {scale}; the kernels take positive numbers"
    return None


def _differentiable(q, k, v):
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _cudnn_why_not(qkv, dtype, D, scale, dropout_p):
    """None if cuDNN's forward can run, with our backward; else the reason, "" if nobody expects it."""
    if not qkv.is_cuda or qkv.numel() == 0 or qkv.stride(2) != 1:        # cuDNN's attention does not take these
        return ""
    reason = _cudnn_why_left(qkv.size(1), dtype, dropout_p, qkv.requires_grad and torch.is_grad_enabled())
    return _why_not(qkv, dtype, D, scale) if reason is None else reason


def _separate_cudnn_why_not(q, k, v, dtype, scale, dropout_p):
    if not q.is_cuda or q.numel() == 0 or q.size(2) != k.size(2) or not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return ""       # with fewer queries than keys, cuDNN aligns the causal mask to the first key
    reason = _cudnn_why_left(q.size(2), dtype, dropout_p, _differentiable(q, k, v))
    return _separate_why_not(q, k, v, dtype, scale) if reason is None else reason


def _cudnn_why_left(T, dtype, dropout_p, training):
    """As `_cudnn_why_not`."""
    if T < 2 or dropout_p > 0 or not training and T % CUDNN_LENGTHS or dtype == torch.float32 or dtype == torch.float64:
        return ""
    return _why_no_cudnn()


def _why_no_cudnn():
    """None if PyTorch has cuDNN's attention and it is not switched off, else the reason."""
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "cuDNN's attention is switched off (torch.backends.cuda.enable_cudnn_sdp)"
    if not torch.backends.cudnn.is_available() or torch.backends.cudnn.version() < 90100:
        return "this PyTorch has no cuDNN 9.1 or later"
    return None


_why_no_cudnn._dynamo_marked_constant = True            # evaluated once while tracing, as in backend.py


def _separate_why_not(q, k, v, dtype, scale, dropout_p=0.0):
    device, given = q.device, q.dtype
    if k.device != device or v.device != device:
        return f"q is on {device}, k on {k.device}, v on {v.device}"
    if (k.dtype != given or v.dtype != given) and not autocast_dtype(k) == autocast_dtype(v) == dtype:
        return f"q is {q.dtype}, k {k.dtype}, v {v.dtype}"           # the reference raises PyTorch's own error
    return _why_not(q, dtype, q.shape[3], scale, dropout_p, (k, v))


def row_for(x, dtype, D, scale, dropout_p, training=None):
    """The row of the table for x: qkv (B, T, 3C), or q (B, H, T, D)."""
    if fastest.nothing_for(x):
        return None
    training = x.requires_grad and torch.is_grad_enabled() if training is None else training
    return fastest.find("attention training" if training else "attention", fastest.device_number(x), fastest.column(dtype, dropout_p > 0),
                        size=D, tokens=x.size(0) * x.size(-2), length=x.size(-2))


def separate_row_for(q, k, v, dtype, scale, dropout_p):
    """`row_for` for separate tensors."""
    return row_for(q, dtype, q.shape[3], scale, dropout_p, _differentiable(q, k, v))


# The arguments of both: (qkv, dtype, head size, scale, dropout_p) and (q, k, v, dtype, scale, dropout_p). cuDNN's forward
# runs only where the table says so.
CANDIDATES = (("triton", _why_not), ("cpp", _cpu.why_not), ("cudnn", _cudnn_why_not))
SEPARATE_CANDIDATES = (("triton", _separate_why_not), ("cudnn", _separate_cudnn_why_not))
_DECODE_CANDIDATES = (("triton", _separate_why_not),)       # bound by memory, so the table's reasons do not apply


# --------------------------------------------------------------------------------------------------------------------- autograd


class _PackedAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, qkv, seed, options, by_cudnn):     # options is a tuple, since each argument of a Function costs 0.2 us
        seed = dropout_seed(qkv, options[2], seed) if options[2] > 0 else None
        if by_cudnn:
            out, lse = (raw.attention_qkvpacked_cudnn if is_compiling() else _cudnn_packed)(qkv, options[0], options[1])
        else:
            run = raw.attention_qkvpacked if is_compiling() else _kernels().forward.launch_forward_qkvpacked
            out, lse = run(qkv, seed, *options)
        ctx.save_for_backward(qkv, out, lse, seed)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, do):
        no_second_derivative("attention")
        if not is_compiling() and do.is_neg():
            do, = resolved(do)
        run = raw.attention_qkvpacked_backward if is_compiling() else _packed_backward
        return run(do, *ctx.saved_tensors, *ctx.options), None, None, None


def _packed_backward(do, qkv, out, lse, seed, n_head, scale, dropout_p):
    """The gradient of qkv, by the Hopper kernels or by Triton's in the form that the table lists."""
    D = qkv.size(2) // (3 * n_head)
    form = _backward_form(qkv, D, scale, dropout_p, *qkv.shape[:2])
    if form == "hopper":
        return _hopper.backward_qkvpacked(do, qkv, out, lse, n_head, scale)
    return _kernels().backward.launch_backward_qkvpacked(do, qkv, out, lse, seed, n_head, scale, dropout_p, form)


def _separate_backward(do, q, k, v, out, lse, seed, scale, dropout_p):
    """Likewise; the Hopper kernels need as many queries as keys."""
    B, _, T, D = q.shape
    form = _backward_form(q, D, scale, dropout_p, B, T, T == k.size(2))
    if form == "hopper":
        return _hopper.backward(do, q, k, v, out, lse, scale)
    return _kernels().backward.launch_backward(do, q, k, v, out, lse, seed, scale, dropout_p, form)


def _backward_form(x, D, scale, dropout_p, B, T, square=True):
    """"hopper", "head" or "split"; None leaves it to the Triton launcher."""
    about = x.get_device(), x.dtype, dropout_p > 0, D, B * T, T
    form = _listed_form(*about, ())
    if form == "hopper" and not (square and x.numel() and _hopper.why_not(x.device, x.dtype, D, scale, dropout_p) is None):
        form = _listed_form(*about, ("hopper",))
    return form


@fastest.cached
def _listed_form(device, dtype, dropout, D, tokens, length, without):
    row = fastest.find("attention backward", device, fastest.column(dtype, dropout), size=D, tokens=tokens, length=length, without=without)
    return None if row is None else row.use


_cudnn_attention = torch.ops.aten._scaled_dot_product_cudnn_attention


def _cudnn_packed(qkv, n_head, scale, want_lse=True):
    """`launch_forward_qkvpacked` on cuDNN: (out (B, T, C), lse (B, H, T) fp32, log2 of the sum of exponentials)."""
    out, lse = _cudnn(*reference.split_heads(qkv, n_head), scale, want_lse)
    return out.flatten(2), lse


def _cudnn(q, k, v, scale, want_lse=True):
    """`launch_forward` on cuDNN: (out (B, T, H, D), lse (B, H, T) or None)."""
    out, lse = _cudnn_attention(q, k, v, None, want_lse, 0.0, True, False, scale=scale)[:2]
    # cuDNN's `out` has q's memory layout; its lse is a natural logarithm.
    return out.transpose(1, 2).contiguous(), lse.reshape(q.shape[:3]) * LOG2_E if want_lse else None


class _Attention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q, k, v, options):
        scale, dropout_p, by_cudnn = options
        seed = dropout_seed(q, dropout_p) if dropout_p > 0 else None
        if by_cudnn:
            out, lse = (raw.attention_cudnn if is_compiling() else _cudnn)(q, k, v, scale)
        else:
            run = raw.attention if is_compiling() else _kernels().forward.launch_forward
            out, lse = run(q, k, v, seed, scale, dropout_p)
        ctx.save_for_backward(q, k, v, out, lse, seed)
        ctx.options = options
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, do):
        no_second_derivative("attention")
        if not is_compiling() and do.is_neg():
            do, = resolved(do)
        run = raw.attention_backward if is_compiling() else _separate_backward
        gradients = run(do, *ctx.saved_tensors, *ctx.options[:2])
        return *(g.transpose(1, 2) if need else None for g, need in zip(gradients, ctx.needs_input_grad)), None


class _CPUAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, qkv, n_head, scale):
        run = raw.attention_cpu if is_compiling() else _cpu.forward
        out, lse = run(qkv, n_head, scale)
        ctx.save_for_backward(qkv, lse)
        ctx.options = n_head, scale
        return out

    @staticmethod
    def backward(ctx, do):
        no_second_derivative("attention")
        if not is_compiling() and do.is_neg():
            do, = resolved(do)
        run = raw.attention_backward_cpu if is_compiling() else _cpu.backward
        return run(do, *ctx.saved_tensors, *ctx.options), None, None


@functools.cache
def _kernels():
    """The launchers, imported on first use because that imports Triton."""
    from ..kernels import attention_backward, attention_common, attention_decode, attention_forward
    return SimpleNamespace(forward=attention_forward, backward=attention_backward, decode=attention_decode, common=attention_common)


# ------------------------------------------------------------------------------------------------------ what torch.compile sees
# Anybody can call these operators directly, so they repeat the op's checks.


def _raw_packed(qkv, seed, n_head, scale, dropout_p):
    _kernels().common.check_packed(qkv, n_head, scale, dropout_p, seed)
    return _kernels().forward.launch_forward_qkvpacked(qkv, seed if dropout_p > 0 else None, n_head, scale, dropout_p)


def _fake_packed(qkv, seed, n_head, scale, dropout_p):
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32)


def _raw_packed_backward(do, qkv, out, lse, seed, n_head, scale, dropout_p):
    _kernels().common.check_packed(qkv, n_head, scale, dropout_p, seed)
    B, T, C3 = qkv.shape
    for name, x, shape, dtype in (("do", do, (B, T, C3 // 3), qkv.dtype), ("out", out, (B, T, C3 // 3), qkv.dtype),
                                  ("lse", lse, (B, n_head, T), torch.float32)):
        if x.shape != shape or x.dtype != dtype or x.device != qkv.device or (x is not do and not x.is_contiguous()):
            raise ValueError(f"{name} is {tuple(x.shape)}, {x.dtype}, strides {x.stride()}; expected {shape}, {dtype}, as the "
                             "forward returned it")
    return _packed_backward(do, qkv, out, lse, seed if dropout_p > 0 else None, n_head, scale, dropout_p)


def _raw(q, k, v, seed, scale, dropout_p):
    _check_qkv(q, k, v, dropout_p)
    q, k, v, _ = _kernels().common.in_place(q, k, v)
    return _kernels().forward.attention_forward(q, k, v, scale=_scale(scale, q), dropout_p=dropout_p, seed=seed)


def _fake(q, k, v, seed, scale, dropout_p):
    B, H, Tq, D = q.shape
    return q.new_empty(B, Tq, H, D), q.new_empty(B, H, Tq, dtype=torch.float32)


def _raw_backward(do, q, k, v, out, lse, seed, scale, dropout_p):
    _check_qkv(q, k, v, dropout_p)
    if do.shape != q.shape or do.dtype != q.dtype:
        raise ValueError(f"do has shape {tuple(do.shape)} and is {do.dtype}; expected {tuple(q.shape)} and {q.dtype}, like q")
    q, k, v, _ = _kernels().common.in_place(q, k, v)
    _kernels().common.check_inputs(q, k, v, _scale(scale, q), dropout_p, seed)
    B, H, Tq, D = q.shape
    for name, x, shape, dtype in (("out", out, (B, Tq, H, D), q.dtype), ("lse", lse, (B, H, Tq), torch.float32)):
        if x.shape != shape or x.dtype != dtype or x.device != q.device or not x.is_contiguous():
            raise ValueError(f"{name} is {tuple(x.shape)}, {x.dtype}, strides {x.stride()}; expected {shape}, {dtype}, as the "
                             "forward returned it")
    return _separate_backward(do, q, k, v, out, lse, seed if dropout_p > 0 else None, scale, dropout_p)


def _fake_backward(do, q, k, v, out, lse, seed, scale, dropout_p):
    return tuple(x.new_empty(x.transpose(1, 2).shape) for x in (q, k, v))


def _decode(q, k, v, lengths, scale):
    _check_qkv(q, k, v, 0.0)
    q, k, v, _ = _kernels().common.in_place(q, k, v)
    return _kernels().decode.attention_decode(q, k, v, lengths.contiguous(), scale=_scale(scale, q))


def _scale(scale, q):
    return 1.0 / math.sqrt(max(1, q.size(3))) if scale is None else scale       # a head size of 0 is rejected later


define("attention_qkvpacked(Tensor qkv, Tensor? seed, int n_head, float? scale, float dropout_p) -> (Tensor, Tensor)",
       _raw_packed, _fake_packed)
define("attention_qkvpacked_cudnn(Tensor qkv, int n_head, float? scale) -> (Tensor, Tensor)", _cudnn_packed,
       lambda qkv, n_head, scale: _fake_packed(qkv, None, n_head, scale, 0.0))
define("attention_qkvpacked_backward(Tensor do, Tensor qkv, Tensor out, Tensor lse, Tensor? seed, int n_head, float? scale, "
       "float dropout_p) -> Tensor", _raw_packed_backward, lambda do, qkv, *args: qkv.new_empty(qkv.shape))
define("attention(Tensor q, Tensor k, Tensor v, Tensor? seed, float? scale, float dropout_p) -> (Tensor, Tensor)", _raw, _fake)
define("attention_cudnn(Tensor q, Tensor k, Tensor v, float? scale) -> (Tensor, Tensor)", _cudnn,
       lambda q, k, v, scale: _fake(q, k, v, None, scale, 0.0))
define("attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? seed, float? scale, "
       "float dropout_p) -> (Tensor, Tensor, Tensor)", _raw_backward, _fake_backward)
define("attention_decode(Tensor q, Tensor k, Tensor v, Tensor lengths, float? scale) -> Tensor",
       _decode, lambda q, *args: q.new_empty(q.shape))
define("attention_cpu(Tensor qkv, int n_head, float? scale) -> (Tensor, Tensor)", lambda *args: _cpu.forward(*args),
       lambda qkv, n_head, scale: _fake_packed(qkv, None, n_head, scale, 0.0))
define("attention_backward_cpu(Tensor do, Tensor qkv, Tensor lse, int n_head, float? scale) -> Tensor",
       lambda *args: _cpu.backward(*args), lambda do, qkv, *args: qkv.new_empty(qkv.shape))
