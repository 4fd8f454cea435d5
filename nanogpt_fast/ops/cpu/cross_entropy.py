"""Linear cross-entropy on a CPU: matmuls around csrc/rows/cross_entropy.h. Plain functions of tensors, without autograd.

    logits = x W^T                    one matmul per chunk of rows, in the dtype of x
    losses, dlogits                   one pass of the extension; dlogits overwrite the logits if nobody else needs them
    dx = dlogits W, dW = dlogits^T x  two matmuls per chunk, dW summed over chunks in fp32

No buffer of the logits' size is ever in fp32. dlogits are stored without the factor 1/N: multiplied into each of them, its rounding
error would bias all of them alike. Instead dx is scaled in a pass over its rows, and dW through the x that it is computed from.
"""
import torch

from .. import extension
from ..common import autocast_dtype
from .linear import AMX, matmul, weight_gradient

# Rows per chunk: 103 MB of bf16 logits at V=50,304. A matmul of 1,024 rows already reaches the machine's full rate; larger chunks
# would only need more memory.
CHUNK = 1024
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

# Checked once, at import: torch.compile cannot trace calls of the extension.
MISSING = extension.lacks("cross_entropy_cpu")


def why_not(x, weight, targets, return_logits=True):
    """None if these functions can and should compute the loss, else the reason."""
    if MISSING is not None:
        return MISSING
    for name, tensor in (("x", x), ("weight", weight), ("targets", targets)):
        if not extension.plain(tensor):
            return f"{name} is a {type(tensor).__name__}, which cannot be passed by address"
    if not x.device.type == weight.device.type == targets.device.type == "cpu":
        return f"the extension computes on a CPU, x is on {x.device.type}"
    dtype = autocast_dtype(x)
    if dtype not in _TYPES or weight.dtype not in _TYPES or x.dtype not in _TYPES:
        return f"x is {x.dtype}, weight {weight.dtype}, computed in {dtype}; the extension takes float32 and bfloat16"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled("cpu"):
        return f"x is {x.dtype}, weight {weight.dtype} and autocast is off"  # the reference raises PyTorch's own error
    if return_logits and dtype == torch.float32:
        return "with float32 logits returned, the loss is nanoGPT's bit for bit"
    return None


def forward_backward(x, weight, targets, ignore_index, mean, need_dx, need_dw, isa="", dw_dtype=None):
    """(loss, dx, dW): loss () fp32, the mean or sum over rows whose target is not ignore_index, and its gradients. Only one chunk of
    the logits exists at a time.

    x (N, C), weight (V, C), both float32 or bfloat16; targets (N,) int64, contiguous. dx (N, C) and dW (V, C) in x's dtype, dW
    in dw_dtype if given; empty (0,) if not needed. isa: the instruction set, as for `_C.sample_cpu`; "" is the best. Raises
    IndexError for a target outside of the vocabulary.
    """
    (N, C), V = x.shape, weight.size(0)
    count = extension._C.count_targets(targets.data_ptr(), N, V, ignore_index)
    scale = 1 / max(count, 1) if mean else 1.0
    losses, dx = x.new_empty(N, dtype=torch.float32), x.new_empty((N, C) if need_dx else 0)
    dw = _WeightGradient(V, x, scale, dw_dtype) if need_dw else None
    buffer = x.new_empty(min(N, CHUNK), V)
    for n in range(0, N, CHUNK):
        part = slice(n, min(n + CHUNK, N))
        logits = matmul(x[part], weight, out=buffer[:part.stop - n])
        _rows(logits, logits if need_dx or need_dw else None, targets[part], ignore_index, losses[part], isa)
        if need_dx:
            matmul(logits, weight, by_input=True, out=dx[part]).mul_(scale)  # `logits` holds dlogits by now
        if need_dw:
            dw.add(logits, part)
    return _reduced(losses, count, mean), dx, dw.sum() if need_dw else x.new_empty(0)


def forward(x, weight, targets, ignore_index, mean, isa=""):
    """(loss, logits): logits (N, V) in x's dtype. The rest as in `forward_backward`."""
    count = extension._C.count_targets(targets.data_ptr(), x.size(0), weight.size(0), ignore_index)
    logits, losses = matmul(x, weight), x.new_empty(x.size(0), dtype=torch.float32)
    _rows(logits, None, targets, ignore_index, losses, isa)
    return _reduced(losses, count, mean), logits


def backward(logits, x, weight, targets, grad_loss, grad_logits, ignore_index, mean, need_dx, need_dw, isa=""):
    """(dx, dW) of grad_loss * loss + sum(grad_logits * logits). logits: as `forward` returned them; not modified.

    grad_loss: fp32 scalar; grad_logits (N, V), any strides, or None.
    """
    (N, C), V = x.shape, weight.size(0)
    count = extension._C.count_targets(targets.data_ptr(), N, V, ignore_index)
    scale = grad_loss.item() / max(count, 1) if mean else grad_loss.item()
    dx = x.new_empty((N, C) if need_dx else 0)
    after = scale if grad_logits is None else 1.0
    dw = _WeightGradient(V, x, after) if need_dw else None
    buffer = x.new_empty(min(N, CHUNK), V)
    for n in range(0, N, CHUNK):
        part = slice(n, min(n + CHUNK, N))
        dlogits = buffer[:part.stop - n]
        _rows(logits[part], dlogits, targets[part], ignore_index, None, isa)
        if grad_logits is not None:
            torch.add(grad_logits[part], dlogits, alpha=scale, out=dlogits)
        if need_dx:
            matmul(dlogits, weight, by_input=True, out=dx[part]).mul_(after)
        if need_dw:
            dw.add(dlogits, part)
    return dx, dw.sum() if need_dw else x.new_empty(0)


def _rows(logits, dlogits, targets, ignore_index, losses, isa):
    gradient = (0, 0) if dlogits is None else (dlogits.data_ptr(), dlogits.stride(0))
    extension._C.cross_entropy_cpu(logits.data_ptr(), gradient[0], _TYPES[logits.dtype], *logits.shape, logits.stride(0), gradient[1],
                                targets.data_ptr(), ignore_index, 0 if losses is None else losses.data_ptr(),
                                torch.get_num_threads(), isa)


def _reduced(losses, count, mean):
    return losses.sum() / count if mean else losses.sum()  # no row counts: 0 / 0 = nan, as in PyTorch


class _WeightGradient:
    """dW (V, C) = scale * sum over chunks of dlogits^T x[chunk], rounded once, at the end, to `dtype` or x's dtype."""

    def __init__(self, V, x, scale, dtype=None):
        self.x, self.shape, self.dtype = x if scale == 1 else x * scale, (V, x.size(1)), dtype or x.dtype
        self.several, self.total = len(x) > CHUNK, None

    def add(self, dlogits, part):
        if self.total is None:
            self.total = weight_gradient(dlogits, self.x[part], torch.float32 if self.several else self.dtype)
        elif self.x.dtype == torch.float32 and not AMX:
            self.total.addmm_(dlogits.t(), self.x[part])
        else:
            self.total += weight_gradient(dlogits, self.x[part], torch.float32)

    def sum(self):
        return self.x.new_zeros(self.shape, dtype=self.dtype) if self.total is None else self.total.to(self.dtype)
