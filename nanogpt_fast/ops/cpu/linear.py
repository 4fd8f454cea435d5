"""The three GEMMs of a Linear, x W^T, dy W and dy^T x, on a CPU's AMX tiles (csrc/amx/gemm.h).

bf16: PyTorch's matmul runs x W^T and dy W on one thread if the result has few columns, and rounds dW to bf16, which is then cast back
to fp32 for the optimizer. The extension spreads all three over all threads, and writes dW's fp32 sums without rounding.
fp32: each number is split into three bf16 ones, which is as accurate as fp32 multiply-adds, and faster (csrc/amx/gemm_fp32.cpp).
"""
import torch

from .. import extension

AMX = extension.has_amx()
LARGEST_SUM = 1024  # most rows that a weight gradient rounded to bf16 may sum over; csrc/amx/gemm.cpp
FEWEST_ROWS = 256   # the tiles need W repacked, which pays off only if x has many rows
SHORTEST_FP32 = 128  # smallest M, N or K at which splitting pays off: 0.8 times as fast as PyTorch at 65, 1.2 times at 128


def why_not(weight, copy):
    """None if the tiles can and should run the GEMMs of a Linear whose weight is kept as `copy` (ops/linear.py), else the reason."""
    if weight.device.type != "cpu":
        return ""       # there everybody expects a vendor library's GEMMs
    if not AMX:
        return "this CPU has no AMX" if extension._C is not None else f"the extension is missing ({extension.missing()})"
    if torch.compiler.is_compiling():
        return "torch.compile generates the matmuls itself"
    if copy is None:
        return "the caller keeps no copy of the weight (the trainer does)"
    if weight.dtype != torch.float32 or copy.dtype not in (torch.float32, torch.bfloat16):
        return f"the weight is {weight.dtype}, computed in {copy.dtype}; the tiles take float32 weights, in bfloat16 or float32"
    if copy.dtype == torch.float32 and min(weight.shape) < SHORTEST_FP32:
        return f"in float32 the tiles are faster only from {SHORTEST_FP32} inputs and outputs on"
    return None


def matmul(x, w, *, by_input=False, bias=None, out=None):
    """x (M, K) w^T + bias -> (M, N), contiguous, written to `out` if given. w (N, K), or (K, N) if by_input; bias (N,) fp32 or None."""
    N = w.size(1 if by_input else 0)
    y = x.new_empty((x.size(0), N)) if out is None else out
    b = w if by_input else w.t()
    if x.size(0) >= FEWEST_ROWS and _product(x, b, bias, y):
        return y
    if (AMX and x.dtype == w.dtype == torch.bfloat16 and x.size(0) >= FEWEST_ROWS and x.stride(1) == w.stride(1) == 1
            and x.size(1) == w.size(0 if by_input else 1)       # otherwise PyTorch raises its own error
            and (bias is None or bias.dtype == torch.float32 and bias.is_contiguous())):
        extension._C.linear_cpu(x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), by_input, 0 if bias is None else bias.data_ptr(),
                             *x.shape, N, y.data_ptr(), torch.get_num_threads())
        return y
    return torch.mm(x, b, out=y) if bias is None else torch.addmm(bias.to(x.dtype), x, b, out=y)     # rounded once


def _product(a, b, bias, c):
    """Compute c (M, N), contiguous, = a (M, K) b (K, N) + bias on the tiles, all fp32; returns False if they do not support it."""
    (M, K), N = a.shape, b.size(1)
    if not (AMX and a.dtype == b.dtype == torch.float32 and K == b.size(0) and min(M, K, N) >= SHORTEST_FP32
            and 1 in a.stride() and 1 in b.stride() and (bias is None or bias.dtype == torch.float32 and bias.is_contiguous())):
        return False
    extension._C.product_fp32(a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), 0 if bias is None else bias.data_ptr(), M, K, N,
                           c.data_ptr(), torch.get_num_threads())
    return True


def weight_gradient(dy, x, dtype=None):
    """dy (K, M)^T x (K, N) -> (M, N), summed in fp32 and rounded once, to `dtype` or, if None, the inputs' dtype. (Without
    the tiles, PyTorch computes it in the inputs' dtype and a cast follows.)"""
    dtype = dtype or dy.dtype
    if dtype == dy.dtype == torch.float32:
        dw = dy.new_empty((dy.size(1), x.size(1)))
        return dw if _product(dy.t(), x, None, dw) else torch.mm(dy.t(), x, out=dw)
    fits = dy.size(0) == x.size(0) and (dtype == torch.float32 or dy.size(0) <= LARGEST_SUM) and dy.stride(1) == x.stride(1) == 1
    if not (AMX and fits and dy.dtype == x.dtype == torch.bfloat16 and dtype in (torch.float32, torch.bfloat16)):
        return (dy.t() @ x).to(dtype)
    dw = dy.new_empty((dy.size(1), x.size(1)), dtype=dtype)
    extension._C.weight_gradient_cpu(dy.data_ptr(), x.data_ptr(), dy.stride(0), x.stride(0), dy.size(0), *dw.shape, dw.data_ptr(),
                                  dtype == torch.bfloat16, torch.get_num_threads())
    return dw
