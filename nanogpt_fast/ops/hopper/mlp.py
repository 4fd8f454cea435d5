"""The MLP's first matmul with the activation in its epilogue, forward and backward, on the CUDA kernel for Hopper.

The kernel is csrc/hopper/linear_act.cu. It computes what `linear_act` and `linear_dact` of kernels/mlp.py do, for half precision, GELU
and rows that are multiples of 16 bytes.
"""
import torch

from .. import extension
from ..extension import address
from . import DTYPES, card_why_not

ACTIVATIONS = ("gelu", "gelu_tanh")


def why_not(device, dtype, C, F, activation):
    """None if the kernel can compute an MLP of widths C and F on this device, else the reason."""
    if device.type != "cuda":
        return "the kernel is for GPUs of compute capability 9.0 (H100, H200)"
    if reason := card_why_not(device.index or 0):
        return reason
    if dtype not in DTYPES:
        return f"the kernel computes in bfloat16 or float16, not {dtype}"
    if activation not in ACTIVATIONS:
        return f"the kernel has {' and '.join(ACTIVATIONS)}, not {activation}"
    if C % 8 or F % 8 or C == 0:
        return f"the kernel takes widths that are multiples of 8, not {C} and {F}"
    return None


def linear_act(x, w, b=None, *, activation="gelu", keep_h=True):
    """(act(h), h) with h = x w^T + b, in one kernel. x (M, K), any row stride; w (N, K); b (N,) of any float dtype or None.

    keep_h=False: h isn't written, and None is returned for it.
    """
    x, w = _rows_of_16_bytes(x), _rows_of_16_bytes(w.contiguous())
    y = torch.empty(x.size(0), w.size(0), dtype=x.dtype, device=x.device)
    h = torch.empty_like(y) if keep_h else None
    if b is not None:
        b = b.float().contiguous()
        b = b.clone() if b.data_ptr() % 8 else b        # the kernel reads two floats at a time
    _launch(False, x, w, h, y, activation, bias=b)
    return y, h


def linear_dact(dy, w, h, *, activation="gelu", want_db=True):
    """(dh, db): dh = (dy w) * act'(h) (M, N) in dy's dtype, db = dh summed over rows, fp32 (N,), or None.

    dy (M, K), any row stride; w (K, N); h (M, N), bias included.
    """
    dy, w, h = _rows_of_16_bytes(dy), _rows_of_16_bytes(w.contiguous()), _rows_of_16_bytes(h.contiguous())
    dh = torch.empty_like(h)
    sums = torch.empty(4 * -(-h.size(0) // 128), h.size(1), dtype=torch.float32, device=h.device) if want_db else None
    _launch(True, dy, w, h, dh, activation, column_sums=sums)
    return dh, sums.sum(0) if want_db else None


def _launch(backward, a, b, h, out, activation, bias=None, column_sums=None):
    device = a.get_device()
    extension._C.linear_act_sm90(
        a.dtype == torch.bfloat16, activation == "gelu_tanh", backward, a.data_ptr(), a.stride(0), b.data_ptr(), address(h), out.data_ptr(),
        address(bias), address(column_sums), *out.shape, a.size(1), device, torch.cuda.current_stream(device).cuda_stream)


def _rows_of_16_bytes(x):
    """x; a copy if a TMA tensor map cannot describe it."""
    fits = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= x.size(1) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)
