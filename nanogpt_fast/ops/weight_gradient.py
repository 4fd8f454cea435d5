"""A Linear with a half-precision copy of its weight on a CPU, whose gradient dW = dy^T x is made in fp32 (csrc/gemm.h).

PyTorch's matmul rounds dW to bf16, and a cast brings it back to fp32 for the optimizer. On AMX tiles the extension writes the fp32
sums as they are, without the 6 bytes a weight of the cast, and faster than oneDNN, which reorders both operands of this product.
"""
import torch
import torch.nn.functional as F

from . import sample

AMX = hasattr(sample._C, "gemm_works") and sample._C.gemm_works()
LARGEST_SUM = 1024  # rows of one sum that is rounded to bf16 at its end; csrc/gemm_amx.cpp


def weight_gradient(dy, x, dtype=None):
    """dy (K, M)^T x (K, N) -> (M, N), summed in fp32 and rounded once: to `dtype`, or theirs where it is None."""
    dtype = dtype or dy.dtype
    fits = dy.size(0) > 0 and (dtype == torch.float32 or dy.size(0) <= LARGEST_SUM) and dy.stride(1) == x.stride(1) == 1
    if not (AMX and fits and dy.dtype == x.dtype == torch.bfloat16 and dtype in (torch.float32, torch.bfloat16)):
        return (dy.t() @ x).to(dtype)
    dw = dy.new_empty((dy.size(1), x.size(1)), dtype=dtype)
    sample._C.weight_gradient_cpu(dy.data_ptr(), x.data_ptr(), dy.stride(0), x.stride(0), dy.size(0), *dw.shape, dw.data_ptr(),
                                  dtype == torch.bfloat16, torch.get_num_threads())
    return dw


def linear(x, weight, copy, bias):
    """x (..., C) copy^T + bias -> (..., F) in copy's dtype. copy (F, C) is weight (F, C) cast; the gradient goes to weight."""
    return _Linear.apply(x, weight, copy, bias)  # by position: an autograd.Function takes no keywords


class _Linear(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, copy, bias):
        rows = x.reshape(-1, x.size(-1)).to(copy.dtype)
        ctx.save_for_backward(rows, copy)   # with copy's version: a refresh at the wrong moment is noticed
        ctx.x_shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        y = F.linear(rows, copy, None if bias is None else bias.to(copy.dtype))
        return y.view(*x.shape[:-1], copy.size(0))

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            raise RuntimeError("the trainer's linear layers have no second derivative (create_graph=True)")
        rows, copy = ctx.saved_tensors
        need_x, need_weight, _, need_bias = ctx.needs_input_grad
        dy = dy.reshape(-1, copy.size(0)).contiguous()
        dx = (dy @ copy).view(ctx.x_shape).to(ctx.dtypes[0]) if need_x else None
        dw = weight_gradient(dy, rows, ctx.dtypes[1]) if need_weight else None
        db = dy.sum(0, dtype=torch.float32).to(ctx.dtypes[2]) if need_bias else None
        return dx, dw, None, db
