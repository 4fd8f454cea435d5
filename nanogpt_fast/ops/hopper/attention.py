"""Attention's backward on the CUDA kernels for Hopper (csrc/hopper/attention_backward.cu): heads of 64 in half precision.

They compute what `launch_backward` and `launch_backward_qkvpacked` of kernels/attention_backward.py do, without dropout and for as
many queries as keys.
"""
import torch

from .. import extension
from . import DTYPES, card_why_not

HEAD = 64
SCALES = 1e-6, 1e6      # the range that the kernels were designed for; a model's scale is 1/8


def why_not(device, dtype, D, scale=None, dropout_p=0.0):
    """None if the kernels can compute the backward on this device, else the reason."""
    if device.type != "cuda":
        return "the kernels are for GPUs of compute capability 9.0 (H100, H200)"
    if reason := card_why_not(device.index or 0):
        return reason
    if not hasattr(extension._C, "attention_backward_heads_sm90"):
        return "the installed extension is too old to have these kernels: reinstall the package"
    if dtype not in DTYPES:
        return f"the kernels compute in bfloat16 or float16, not {dtype}"
    if D != HEAD:
        return f"the kernels take heads of {HEAD}, not {D}"
    if dropout_p > 0:
        return "the kernels have no dropout"
    if scale is not None and not SCALES[0] <= scale <= SCALES[1]:
        return f"the kernels take scales of {SCALES[0]:g} to {SCALES[1]:g}, not {scale:g}"
    return None


def backward(do, q, k, v, out, lse, scale):
    """(dq, dk, dv), each (B, T, H, 64) contiguous, in the inputs' dtype.

    do, q, k and v (B, H, T, 64), any strides; out (B, T, H, 64) and lse (B, H, T) fp32, log2 of the sum of exponentials, as the
    forward returned them, contiguous. scale: None means 1/8.
    """
    B, H, T, _ = q.shape
    gradients = tuple(torch.empty((B, T, H, HEAD), dtype=q.dtype, device=q.device) for _ in range(3))
    do, q, k, v = (_readable(x) for x in (do, q, k, v))
    inputs, outputs = [q, k, v, do, out.transpose(1, 2)], [x.transpose(1, 2) for x in gradients]
    of = lambda tensors: [(x.data_ptr(), *_strides(x)) for x in tensors]
    _launch(q, of(inputs), lse, of(outputs), B, H, T, scale)
    return gradients


def backward_qkvpacked(do, qkv, out, lse, n_head, scale):
    """The gradient of qkv, (B, T, 3C) in its dtype, contiguous.

    do (B, T, C), any strides; qkv (B, T, 3C), any strides; out (B, T, C) and lse (B, H, T) fp32, log2 of the sum of exponentials, as
    the forward returned them, contiguous. scale: None means 1/8.
    """
    B, T, C3 = qkv.shape
    do, qkv, out = (_readable(x) for x in (do, qkv, out))
    dqkv = torch.empty((B, T, C3), dtype=qkv.dtype, device=qkv.device)

    def thirds(x):
        strides = _strides(x)
        return [(x.data_ptr() + i * n_head * HEAD * x.itemsize, *strides) for i in range(3)]
    _launch(qkv, [*thirds(qkv), (do.data_ptr(), *_strides(do)), (out.data_ptr(), *_strides(out))], lse, thirds(dqkv), B, n_head, T, scale)
    return dqkv


def _launch(x, inputs, lse, gradients, B, H, T, scale):
    """inputs: address and strides (batch, head, token) of q, k, v, do and out; gradients: of dq, dk and dv. x gives dtype and device."""
    assert lse.is_contiguous()          # the kernel assumes it, and the forward returns it so
    terms = 2 * B * H * -(-T // 128) * 128
    scratch = torch.empty(terms + 2, dtype=torch.float32, device=x.device)
    device = x.get_device()
    extension._C.attention_backward_heads_sm90(
        x.dtype == torch.bfloat16, *inputs, lse.data_ptr(), *gradients, scratch.data_ptr(), scratch.data_ptr() + 4 * terms, B, H, T,
        HEAD**-0.5 if scale is None else scale, device, torch.cuda.current_stream(device).cuda_stream)


def _readable(x):
    """x (B, H, T, 64) or (B, T, C); a copy if a TMA tensor map cannot describe it."""
    *strides, one = x.stride()
    fits = one == 1 and x.data_ptr() % 16 == 0 and all(n == 1 or stride > 0 and stride % 8 == 0 for n, stride in zip(x.shape, strides))
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _strides(x):
    """Strides of batch, head and token. A dimension of size 1 gets an arbitrary stride that a tensor map accepts."""
    strides = [stride if n > 1 else HEAD for n, stride in zip(x.shape, x.stride()[:-1])]
    return tuple(strides) if len(strides) == 3 else (strides[0], HEAD, strides[1])
