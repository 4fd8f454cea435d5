"""Causal attention on a CPU in bfloat16: on AMX tiles, one head at a time, if the CPU has them (csrc/amx/attention.cpp). No autograd.

Without AMX, the forward is PyTorch's and the backward is batched matmuls around one pass of the extension. PyTorch's own backward
multiplies blocks of one head at a time; at B=4, H=12, T=256, D=64 it takes ten times as long as the five matmuls of a backward
batched over all heads. The pass between the matmuls is csrc/rows/attention.h:

    S = Q K^T, dP = dO V^T, both in fp32;   P, dS = one pass;   dV = P^T dO, dQ = dS K, dK = dS^T Q

Memory: tiles of ROWS queries by the keys that they see, for as many heads at a time as fit into a cache.
"""
import math

import torch

from .. import extension
from .linear import AMX

ROWS = 256          # queries per tile: the scores above the diagonal within a tile are wasted, so short tiles waste less
SCORES = 1 << 20    # scores per tile, over all its heads: 12 MB for S and dP in fp32, P and dS in bf16

# Checked once, at import: torch.compile cannot trace calls of the extension.
MISSING = extension.lacks("attention_gradient_cpu")


def why_not(qkv, dtype, D, scale, dropout_p=0.0):
    """None if these functions can compute attention on the packed qkv in this dtype and head size, else the reason."""
    if MISSING is not None:
        return MISSING
    if not extension.plain(qkv):
        return f"the input is a {type(qkv).__name__}, which cannot be passed by address"
    if qkv.device.type != "cpu":
        return f"the extension computes on a CPU, the input is on {qkv.device.type}"
    if dtype != torch.bfloat16:
        return f"the input is {dtype}; in float32 the gradients are nanoGPT's bit for bit, and other dtypes are not taken"
    if scale is not None and not 0 < scale < math.inf:
        return f"scale is {scale}; the extension takes positive numbers"
    if dropout_p > 0:
        return "the extension has no dropout"
    if qkv.size(1) == 0:
        return "there are no tokens"
    if not AMX and not (qkv.requires_grad and torch.is_grad_enabled()):
        return "without a gradient PyTorch's kernel is as fast"
    return None


def forward(qkv, n_head, scale):
    """(out (B, T, C) bfloat16, lse (B, H, T) fp32)."""
    B, T, C3 = qkv.shape
    if AMX:
        out, lse, qkv = qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32), qkv.contiguous()
        extension._C.attention_forward_amx(*_described(qkv, lse, n_head, scale), out.data_ptr(), torch.get_num_threads())
        return out, lse
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()        # this kernel assumes a contiguous last dimension without checking
    q, k, v = (x.transpose(1, 2) for x in _heads(qkv, n_head, 3))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return out.transpose(1, 2).reshape(B, T, C3 // 3), lse.contiguous()


def backward(do, qkv, lse, n_head, scale, isa=""):
    """The gradient of qkv (B, T, 3C). do (B, T, C); lse as `forward` returned it. isa: the instruction set; "" is the best, and one of
    `_C.sample_cpu`'s means to run without AMX."""
    B, T, C3 = qkv.shape
    H, D = n_head, C3 // (3 * n_head)
    if AMX and not isa:
        dqkv, do, qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format), do.contiguous(), qkv.contiguous()
        extension._C.attention_backward_amx(*_described(qkv, lse, n_head, scale), do.data_ptr(), dqkv.data_ptr(), torch.get_num_threads())
        return dqkv
    scale = 1 / math.sqrt(D) if scale is None else scale
    q, k, v, do = (_by_head(x) for x in (*_heads(qkv, H, 3), *_heads(do, H, 1)))     # (B H, T, D)
    lse = lse.view(B * H, T)
    q32, k32, v32, do32 = q.float(), k.float(), v.float(), do.float()
    dq = torch.empty_like(q)
    # If several query tiles contribute to a key, their contributions are summed in fp32.
    dk, dv = q.new_empty(2, B * H, T, D) if T <= ROWS else q.new_zeros(2, B * H, T, D, dtype=torch.float32)
    for start in range(0, T, ROWS):
        end = min(start + ROWS, T)                                   # queries start .. end - 1 see keys 0 .. end - 1
        step = max(1, SCORES // ((end - start) * end))
        for h in range(0, B * H, step):
            rows, seen = (slice(h, h + step), slice(start, end)), (slice(h, h + step), slice(0, end))
            with torch.autocast("cpu", enabled=False):              # in a backward called under autocast, the scores would be bf16
                scores = torch.bmm(q32[rows], k32[seen].transpose(1, 2))
                dp = torch.bmm(do32[rows], v32[seen].transpose(1, 2))
            p, ds = q.new_empty(2, *scores.shape)
            extension._C.attention_gradient_cpu(*scores.shape, start, scale, scores.data_ptr(), lse[rows].data_ptr(), T, dp.data_ptr(),
                                                p.data_ptr(), ds.data_ptr(), torch.get_num_threads(), isa)
            torch.bmm(ds, k[seen], out=dq[rows])
            if T <= ROWS:
                torch.bmm(ds.transpose(1, 2), q[rows], out=dk[seen])
                torch.bmm(p.transpose(1, 2), do[rows], out=dv[seen])
            else:
                dk[seen] += torch.bmm(ds.transpose(1, 2), q[rows])
                dv[seen] += torch.bmm(p.transpose(1, 2), do[rows])
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for target, gradient in zip(_heads(dqkv, H, 3), (dq, dk, dv)):
        target.copy_(gradient.view(B, H, T, D).transpose(1, 2))
    return dqkv


def _described(qkv, lse, n_head, scale):
    """The arguments that describe packed attention to the extension; qkv is contiguous."""
    B, T, C3 = qkv.shape
    D = C3 // (3 * n_head)
    return qkv.data_ptr(), B, T, n_head, D, 1 / math.sqrt(D) if scale is None else scale, lse.data_ptr()


def _heads(packed, n_head, parts):
    """(B, T, parts * C) as `parts` views (B, T, H, D)."""
    return packed.unflatten(2, (parts, n_head, -1)).unbind(2)


def _by_head(x):
    """(B, T, H, D) as a contiguous (B H, T, D)."""
    B, T, H, D = x.shape
    return x.transpose(1, 2).reshape(B * H, T, D).contiguous()
