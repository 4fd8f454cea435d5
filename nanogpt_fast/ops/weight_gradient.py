"""dW = dy^T x of a Linear on a CPU: the extension's AMX tiles for bf16 where the CPU has them (csrc/gemm.h), else PyTorch's matmul."""
import torch

from . import sample

AMX = hasattr(sample._C, "gemm_works") and sample._C.gemm_works()
LARGEST_SUM = 1024  # rows of one sum that is rounded to bf16 at its end; csrc/gemm_amx.cpp


def weight_gradient(dy, x):
    """dy (K, M)^T x (K, N) -> (M, N) in their dtype, summed in fp32 and rounded once."""
    if not (AMX and dy.dtype == x.dtype == torch.bfloat16 and 0 < dy.size(0) <= LARGEST_SUM and dy.stride(1) == x.stride(1) == 1):
        return dy.t() @ x
    dw = torch.empty(dy.size(1), x.size(1), dtype=dy.dtype)
    sample._C.weight_gradient_cpu(dy.data_ptr(), x.data_ptr(), dy.stride(0), x.stride(0), dy.size(0), *dw.shape, dw.data_ptr(), True,
                                  torch.get_num_threads())
    return dw
