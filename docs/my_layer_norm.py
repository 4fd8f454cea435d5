"""A LayerNorm of one's own in plain Triton, registered beside ours: what docs/hacking.md shows.

    NANOGPT_FAST_KERNELS=docs/my_layer_norm.py nanogpt-fast verify --only=layer_norm     check it against float64
    NANOGPT_FAST_KERNELS=docs/my_layer_norm.py nanogpt-fast tune                         let it compete
    python docs/my_layer_norm.py                                                         time it beside ours and PyTorch's
"""
import sys

import torch
import triton
import triton.language as tl

from nanogpt_fast import backend
from nanogpt_fast.ops import register


@triton.jit
def forward_kernel(x_ptr, w_ptr, b_ptr, y_ptr, stats_ptr, C, eps, BLOCK: tl.constexpr):
    """One program a row: y = (x - mean) * rstd * w + b, and the row's mean and rstd for the backward."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < C
    x = tl.load(x_ptr + row * C + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / C
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    y = centred * rstd * tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if b_ptr is not None:
        y += tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * C + column, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(stats_ptr + 2 * row, mean)
    tl.store(stats_ptr + 2 * row + 1, rstd)


def forward(x, weight, bias, eps):
    rows = x.contiguous().view(-1, x.shape[-1])
    y, stats = torch.empty_like(rows), torch.empty(len(rows), 2, device=x.device)
    C = rows.size(1)
    forward_kernel[(len(rows),)](rows, weight, bias, y, stats, C, eps, BLOCK=triton.next_power_of_2(C))
    return y.view(x.shape), (rows, weight, bias, stats)


def backward(saved, dy, eps):
    """In PyTorch, to keep the example short: dx of each row, and the sums over rows for weight and bias."""
    rows, weight, bias, stats = saved
    shape, dy = dy.shape, dy.reshape(rows.shape).float()
    normal = (rows.float() - stats[:, :1]) * stats[:, 1:]
    g = dy * weight.float()
    dx = (g - g.mean(1, keepdim=True) - normal * (g * normal).mean(1, keepdim=True)) * stats[:, 1:]
    return dx.to(rows.dtype).view(shape), (dy * normal).sum(0).to(weight.dtype), None if bias is None else dy.sum(0).to(bias.dtype)


def why_not(x, weight, bias, eps):
    if x.dtype != torch.float32:
        return f"x is {x.dtype}; mine takes float32, as the residual stream is"
    return backend.triton_why_not(x)        # on a CPU only Triton's interpreter runs it


register("layer_norm", "mine", forward, backward, why_not)

if __name__ == "__main__":
    from nanogpt_fast.bench import measure
    from nanogpt_fast.ops.norm import layer_norm
    gpu = torch.cuda.is_available()
    x = torch.randn(32768 if gpu else 64, 768, device="cuda" if gpu else "cpu")
    w, b = torch.ones(768, device=x.device), torch.zeros(768, device=x.device)
    if reason := why_not(x, w, b, 1e-5):
        sys.exit(f"nothing to time: {reason}")
    runs = {name: lambda choice=backend.parse(f"layer_norm={name}"): layer_norm(x, w, b, backend=choice) for name in ("mine", "triton", "reference")}
    for name, seconds in measure.medians((measure.interleaved_on_gpu if gpu else measure.interleaved)(runs, rounds=20)).items():
        print(f"{name:<10} {1e6 * seconds:10.1f} us")
