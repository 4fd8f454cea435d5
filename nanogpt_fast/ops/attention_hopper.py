"""Attention's backward on the packed projection by the CUDA kernels for Hopper (csrc/attention_backward_sm90.cu): heads of 64 in half precision.

The same as `launch_backward_qkvpacked` of kernels/attention_backward.py without dropout.
"""
import torch

from . import mlp_hopper, sample

DTYPES = (torch.bfloat16, torch.float16)
HEAD = 64
SCALES = 1e-6, 1e6      # what was thought of: a model's is 1/8


def why_not(device, dtype, D, scale=None, dropout_p=0.0):
    """None where the kernels can compute the backward there, else the reason."""
    if device.type != "cuda":
        return "the kernels are for GPUs of compute capability 9.0 (H100, H200)"
    if reason := mlp_hopper.card_why_not(device.index or 0):
        return reason
    if not hasattr(sample._C, "attention_backward_sm90"):
        return "the extension was built before it had these kernels: install the package again"
    if dtype not in DTYPES:
        return f"the kernels compute in bfloat16 or float16, not {dtype}"
    if D != HEAD:
        return f"the kernels take heads of {HEAD}, not {D}"
    if dropout_p > 0:
        return "the kernels have no dropout"
    if scale is not None and not SCALES[0] <= scale <= SCALES[1]:
        return f"the kernels take scales of {SCALES[0]:g} to {SCALES[1]:g}, not {scale:g}"
    return None


def backward_qkvpacked(do, qkv, out, lse, n_head, scale):
    """The gradient of qkv, (B, T, 3C) in its dtype, contiguous.

    do (B, T, C), any strides; qkv (B, T, 3C), any strides; out (B, T, C) and lse (B, H, T) fp32, log2 of the sum of exponentials, as
    the forward gave them, contiguous. scale: None is 1/8.
    """
    do, qkv, out = _rows_of_16_bytes(do), _rows_of_16_bytes(qkv), _rows_of_16_bytes(out)
    assert out.is_contiguous() and lse.is_contiguous()      # the forward's; any other strides would be read as these
    B, T, _ = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    terms = 2 * B * n_head * -(-T // 128) * 128
    scratch = torch.empty(terms + 2, dtype=torch.float32, device=qkv.device)
    device = qkv.get_device()
    sample._C.attention_backward_sm90(
        qkv.dtype == torch.bfloat16, qkv.data_ptr(), *_strides(qkv), do.data_ptr(), *_strides(do), out.data_ptr(), lse.data_ptr(),
        dqkv.data_ptr(), scratch.data_ptr(), scratch.data_ptr() + 4 * terms, B, T, n_head, HEAD**-0.5 if scale is None else scale, device,
        torch.cuda.current_stream(device).cuda_stream)
    return dqkv


def _strides(x):
    """Of the batch and of the tokens; of one sequence, its length."""
    return (x.stride(0) if x.size(0) > 1 else x.stride(1) * x.size(1)), x.stride(1)


def _rows_of_16_bytes(x):
    """x (B, T, n), or a copy where a tensor map could not describe it."""
    batch, row, one = x.stride()
    fits = one == 1 and row % 8 == 0 and row >= x.size(2) and x.data_ptr() % 16 == 0 and (x.size(0) == 1 or batch % row == 0 and batch > 0)
    return x if fits else x.clone(memory_format=torch.contiguous_format)
