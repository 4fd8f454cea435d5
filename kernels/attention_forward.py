"""Causal flash attention, forward:  out = softmax(scale * q k^T, causal) v,  lse = log2(sum(exp(scale * q k^T))).

Fusing saves memory traffic: the (T, T) weights of GPT-2 124M (B=64, H=12, T=1024) are 1.6 GB in bf16, and plain PyTorch stores
and loads them five times a layer. Here they stay in registers: a program takes BLOCK_M queries of one head, loops over the keys up
to the diagonal in tiles of BLOCK_N, and keeps a running maximum, a running sum and the weighted sum of the values, rescaled
whenever the maximum grows. Memory traffic is q, k, v and out once (403 MB), and 4 bytes of lse a row for the backward.

q (B, H, Tq, D), k and v (B, H, Tk, D) with any strides, or q alone: the packed projection (B, T, 3C), in which the kernel finds k
and v. out (B, Tq, H, D), which is (B, T, C) with the heads side by side, so no transpose follows; lse (B, H, Tq) fp32. Dropout is
applied to the weights in registers (`dropout.keep_scores`); the sum is taken before it.

Source: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022, FlashAttention, algorithm 1; Dao 2023, FlashAttention-2,
section 3.1 (loop over keys inside, one division at the end).
"""
import functools
import math

import torch
import triton
import triton.language as tl

from . import fastest
from .attention_common import (LOG2_E, check_inputs, head_offset, in_place, keys_of_head, load_tile, program, rows_in_place, scheduled_tile,
                               store_tile)
from .dot import add_dot
from .dropout import keep_scale, keep_scores
from .host import elsewhere


@triton.jit
def _walk_keys(acc, l_i, m_i, q, k_ptr, v_ptr, stride_kt, lo, hi, start_m, scale2, seed, dropout_p, head, Tq, Tk,
               D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
               MASKED: tl.constexpr, DROPOUT: tl.constexpr):
    """One pass of the online softmax over the keys lo .. hi.

    acc [BLOCK_M, HEAD] fp32: weighted sum of the values. l_i, m_i [BLOCK_M] fp32: sum of the weights, maximum of the scores.
    """
    offs_m = start_m + tl.arange(0, BLOCK_M)
    for start_n in tl.range(lo, hi, BLOCK_N):
        k = load_tile(k_ptr, start_n, stride_kt, Tk, D, BLOCK_N, HEAD, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")                                  # [BLOCK_M, BLOCK_N]
        if MASKED:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            s = tl.where(offs_m[:, None] + (Tk - Tq) >= offs_n[None, :], s, float("-inf"))
        m_ij = tl.maximum(m_i, tl.max(s, 1) * scale2)       # the scale is positive
        p = tl.exp2(s * scale2 - m_ij[:, None])             # scaled after the matmul, in fp32: one fma with the subtraction
        alpha = tl.exp2(m_i - m_ij)
        l_i = l_i * alpha + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(keep_scores(seed, head, start_m, start_n, dropout_p, BLOCK_M, BLOCK_N), p, 0.0)
        v = load_tile(v_ptr, start_n, stride_kt, Tk, D, BLOCK_N, HEAD, MASKED)
        acc = add_dot(p.to(v.dtype), v, acc * alpha[:, None])                               # [BLOCK_M, HEAD]
        m_i = m_ij
    return acc, l_i, m_i


# Generation changes the lengths from call to call: specialised on them, Triton would compile again for lengths of 1 and multiples
# of 16.
@triton.jit(do_not_specialize=["H", "Tq", "Tk", "n_heads", "group"])
def forward_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seed_ptr,
                   stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
                   scale2, dropout_p, H, Tq, Tk, n_heads, group,
                   D: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr):
    """One tile of queries of one head: `reference.causal_attention`; with k_ptr None, `reference.causal_attention_qkvpacked`."""
    n_tiles = tl.cdiv(Tq, BLOCK_M)
    rank, head = scheduled_tile(n_tiles, n_heads, group)
    start_m = (n_tiles - 1 - rank) * BLOCK_M                # the last queries see the most keys
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_ptr += head_offset(head, H, stride_qb, stride_qh)
    k_ptr, v_ptr = keys_of_head(q_ptr, k_ptr, v_ptr, head, H, stride_kb, stride_kh, D)
    q = load_tile(q_ptr, start_m, stride_qt, Tq, D, BLOCK_M, HEAD, True)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # Tiles of keys that all queries of this program see need no mask; the tiles on the diagonal and the last, partial one do.
    full = (start_m + (Tk - Tq)) // BLOCK_N * BLOCK_N
    stop = tl.minimum(start_m + BLOCK_M, Tq) + (Tk - Tq)
    if full > 0:
        acc, l_i, m_i = _walk_keys(acc, l_i, m_i, q, k_ptr, v_ptr, stride_kt, 0, full, start_m, scale2, seed, dropout_p,
                                   head, Tq, Tk, D, BLOCK_M, BLOCK_N, HEAD, False, DROPOUT)
    if stop > full:
        acc, l_i, m_i = _walk_keys(acc, l_i, m_i, q, k_ptr, v_ptr, stride_kt, full, stop, start_m, scale2, seed, dropout_p,
                                   head, Tq, Tk, D, BLOCK_M, BLOCK_N, HEAD, True, DROPOUT)

    tl.store(lse_ptr + head.to(tl.int64) * Tq + offs_m, m_i + tl.log2(l_i), mask=offs_m < Tq)
    if DROPOUT:
        acc = acc * keep_scale(dropout_p)
    out_ptr += (head // H).to(tl.int64) * Tq * (H * D) + head % H * D
    store_tile(out_ptr, acc / l_i[:, None], start_m, H * D, Tq, D, BLOCK_M, HEAD)


# How the rows of "attention forward tile" in fastest.json were chosen. One by timing: sm_90's for heads of 64 in half precision, the best
# of twelve tiles on an H100 at 12 and 64 x 1024 tokens (`python -m benchmarks.gpu.sweep`). For every other row, a list from large to
# small was tried, and the first tile taken that compiles for the architecture without a spill, fits its shared memory and, on sm_90,
# keeps wgmma asynchronous (ptxas reports where it serialises them: note C7515). 80, 86 and 89 have the same instructions (mma.sync,
# cp.async) and so share their rows, which must fit the 99 KB of 86 and 89. The reasons:
#   half     64 on sm_90: 128x64 takes 359 us in 8 warps, 369 in 4; cuDNN 297. 32: 4 warps take 187 registers, so two programs share
#            a multiprocessor, and one's exponentials run beside the other's matmuls. 128: 128x64 in 8 warps; 128x128 spills 72 bytes.
#   dropout  as half, except where Philox's words make that tile spill: 8 warps up to 64 on sm_100, 64x32 at 256 on sm_90.
#   float32  without tensor cores a thread keeps whole rows of both factors in registers, so tiles are small.


def attention_forward(q, k, v, *, scale, dropout_p=0.0, seed=None, tile=None):
    """(out, lse): out (B, Tq, H, D) contiguous in q's dtype; lse (B, H, Tq) fp32, log2 of the sum of the exponentials.

    q (B, H, Tq, D), k and v (B, H, Tk, D), Tq <= Tk: float32, float16 or bfloat16; any strides up to 2^23 with 1 in the last
    dimension, the same for k and v; D up to 256. scale > 0. seed: an int64 tensor of one element, where dropout_p > 0. tile: a
    Tile to use instead of the table's. Raises ValueError, TypeError.
    """
    check_inputs(q, k, v, scale, dropout_p, seed)
    return launch_forward(q, k, v, seed if dropout_p > 0 else None, scale, dropout_p, tile)


def launch_forward(q, k, v, seed, scale, dropout_p, tile=None):
    """`attention_forward` for a caller that has checked everything but the strides; copies what the kernel can't read in place.

    seed: None without dropout. scale None: 1/sqrt(D).
    """
    q, k, v, strides = in_place(q, k, v)
    B, H, Tq, D = q.shape
    out = q.new_empty(B, Tq, H, D)       # in half the time of torch.empty with a dtype and a device
    return out, _launch(q, k, v, out, seed, B, H, Tq, k.shape[2], D, strides, scale, dropout_p, tile)


def launch_forward_qkvpacked(qkv, seed, n_head, scale, dropout_p, tile=None):
    """(out (B, T, C), lse (B, H, T)) of the packed projection qkv (B, T, 3C), for a caller as above."""
    qkv, batch, token = rows_in_place(qkv)
    B, T, C3 = qkv.shape
    C = C3 // 3
    D = C // n_head
    out = qkv.new_empty(B, T, C)
    return out, _launch(qkv, None, None, out, seed, B, n_head, T, T, D, (batch, D, token, batch, D, token), scale, dropout_p, tile)


def tile_for(dtype, D, dropout, device, tokens, length):
    """The Tile for `tokens` queries in sequences of `length`. The rows were chosen as the comment above says."""
    return fastest.tile("attention forward tile", device, fastest.column(dtype, dropout), size=D, tokens=tokens, length=length)


_program = functools.cache(program)


@fastest.cached
def _program_for(dtype, D, dropout, device, tokens, length):
    return _program(tile_for(dtype, D, dropout, device, tokens, length), dtype, D, dropout, device)


def _launch(q, k, v, out, seed, B, H, Tq, Tk, D, strides, scale, dropout_p, tile):
    """Write out; return lse."""
    if elsewhere(q):
        with torch.cuda.device_of(q):
            return _launch(q, k, v, out, seed, B, H, Tq, Tk, D, strides, scale, dropout_p, tile)
    lse = q.new_empty(B, H, Tq, dtype=torch.float32)
    if B * H * Tq > 0:
        about = q.dtype, D, seed is not None, q.get_device()
        tile, constants, keys_in_l2 = _program_for(*about, B * Tq, Tq) if tile is None else _program(tile, *about)
        scale = 1.0 / math.sqrt(D) if scale is None else scale
        forward_kernel[(B * H * -(-Tq // tile.BLOCK_M),)](
            q, k, v, out, lse, seed, *strides, scale * LOG2_E, dropout_p, H, Tq, Tk, B * H, keys_in_l2 // Tk or 1, **constants)
    return lse
