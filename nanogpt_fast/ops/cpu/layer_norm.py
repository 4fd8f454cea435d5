"""The residual add and LayerNorm on a CPU in one pass (csrc/rows/layer_norm.h). Plain functions of tensors: no autograd, no dropout.

PyTorch runs a cast, an add, a LayerNorm and a cast, each over all rows in fp32, and as many in the backward. Here each row is read
once; the sum and the normalized row, in the next matmul's dtype, are written together, and so are both gradients in the backward.
"""
import torch

from .. import extension
from ..extension import address

_TYPES = (torch.float32, torch.bfloat16)
_BF16 = torch.bfloat16

# Checked once, at import: torch.compile cannot trace calls of the extension.
MISSING = extension.lacks("layer_norm_forward_cpu")


def why_not(x, weight, bias, branch=None, out_dtype=None):
    """None if these functions can and should normalize x (+ branch) to out_dtype (None: the next matmul's dtype), else the reason."""
    if MISSING is not None:
        return MISSING
    if torch.compiler.is_compiling():
        return "torch.compile fuses the add, the norm and the casts itself"
    given = (("x", x), ("weight", weight), ("bias", bias), ("branch", branch))
    for name, tensor in given:
        if tensor is None:
            continue
        if not extension.plain(tensor):
            return f"{name} is a {type(tensor).__name__}, which cannot be passed by address"
        if not tensor.is_cpu:
            return f"the extension computes on a CPU, {name} is on {tensor.device.type}"
    if out_dtype is None:
        out_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    branch_dtype = x.dtype if branch is None else branch.dtype
    if not (x.dtype in _TYPES and out_dtype in _TYPES and branch_dtype in _TYPES):
        return f"x is {x.dtype}, branch {branch_dtype}, the result {out_dtype}; the extension takes float32 and bfloat16"
    if _BF16 not in (x.dtype, branch_dtype, out_dtype):
        return "in float32 it is nanoGPT's bit for bit"
    if x.dtype == _BF16 != branch_dtype:
        return f"x is {x.dtype}, branch {branch_dtype}: their sum does not have x's dtype"
    for name, tensor in given[1:3]:
        if tensor is not None and tensor.dtype not in (torch.float32, x.dtype):
            return f"x is {x.dtype}, {name} {tensor.dtype}"          # the reference raises PyTorch's own error
    if x.size(-1) == 0:
        return "rows have no elements"
    return None


def forward(x, branch, weight, bias, eps, y_dtype, isa=""):
    """(s, y, statistics) for x (..., C), branch likewise or None, weight (C,), bias (C,) or None: s = x + branch in x's dtype, or x;
    y = LayerNorm(s) in y_dtype; statistics (2, rows) fp32, mean and 1 / standard deviation. isa: the instruction set, as for
    `_C.sample_cpu`; "" is the best."""
    x, branch, weight, bias = _blocks(x, branch, _fp32(weight), _fp32(bias))
    C = x.size(-1)
    rows = x.numel() // C
    s, y = x if branch is None else torch.empty_like(x), torch.empty_like(x, dtype=y_dtype)
    statistics = torch.empty(2, rows, dtype=torch.float32, device=x.device)     # torch's defaults may have been changed
    mean = statistics.data_ptr()
    extension._C.layer_norm_forward_cpu(_bf16(x, branch, y), rows, C, x.data_ptr(), address(branch), weight.data_ptr(), address(bias), eps,
                                     s.data_ptr(), y.data_ptr(), mean, mean + 4 * rows, torch.get_num_threads(), isa)
    return s, y, statistics


def backward(dy, ds, s, weight, statistics, branch_dtype, isa=""):
    """(dx, dbranch, dweight, dbias). dy (..., C); ds: the gradient that arrives through s, in s's dtype, or None. dx has s's dtype.
    dbranch has branch_dtype; it is None if that is s's dtype (dbranch equals dx) or None. dweight and dbias (C,) fp32."""
    dy, ds, s, weight = _blocks(dy, ds, s, _fp32(weight))
    C = s.size(-1)
    rows = s.numel() // C
    dx = torch.empty_like(s)
    dbranch = None if branch_dtype in (None, s.dtype) else torch.empty_like(s, dtype=branch_dtype)
    dweight, dbias = (torch.empty(C, dtype=torch.float32, device=s.device) for _ in range(2))
    mean = statistics.data_ptr()
    extension._C.layer_norm_backward_cpu(_bf16(s, dbranch, dy), rows, C, dy.data_ptr(), address(ds), s.data_ptr(), weight.data_ptr(), mean,
                                      mean + 4 * rows, dx.data_ptr(), address(dbranch), dweight.data_ptr(), dbias.data_ptr(),
                                      torch.get_num_threads(), isa)
    return dx, dbranch, dweight, dbias


def _blocks(*tensors):
    return (tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous() for tensor in tensors)


def _fp32(vector):
    return vector if vector is None or vector.dtype == torch.float32 else vector.float()


def _bf16(*tensors):
    return [tensor is not None and tensor.dtype == _BF16 for tensor in tensors]
