"""Causal flash attention, backward: dq, dk and dv from out's gradient, the weights recomputed from lse.

    p  = exp2(scale * log2(e) * q k^T - lse)          the weights of the forward
    dv = p^T do                                       with dropout: p without the dropped weights, divided by 1 - dropout_p
    dp = do v^T                                       with dropout: likewise
    ds = p * (dp - delta),   delta = sum(do * out)    delta (B, H, Tq) fp32: softmax's backward, one number per row
    dq = scale * ds k,   dk = scale * ds^T q

Nothing of size (T, T) is stored. There are two forms, both without atomics, so the same inputs always give the same bits:

* head form, 5 matmuls per tile. One program owns a head; it loops over tiles of keys, and for each over the queries that see it.
  dk and dv of the tile stay in registers. dq gets a term from every tile of keys: the program sums these in fp32 scratch of its
  own (256 KB a head at T=1024, D=64, which stays in L2) and writes finished rows out when the diagonal passes them. For as many
  heads as multiprocessors, or more.
* split form, 7 matmuls. One kernel for dq (a program per tile of queries), one for dk and dv (a program per tile of keys); both
  compute s and dp. For few heads or long sequences.

Both compute delta where they load out's gradient anyway. A separate kernel for it would read out and its gradient once more
(201 MB a layer for GPT-2 124M at B=64, 47 us on an H200). All tiles of scores are transposed, [keys, queries]: p^T and ds^T are
then left operands of two matmuls straight from registers, and only dq's matmul needs ds through shared memory.

lse and delta are the initial accumulators of two products: s' = k q^T - lse / scale, dp' = v do^T - delta (`_store_terms`). A
thread loads the terms of its columns straight into its accumulators, and no subtraction follows. Loaded as vectors, Triton would
copy them through shared memory with q and do; the addresses take 48 registers a thread in Triton 3.6, and the kernel spills.

Layouts as in `attention_forward`. dq, dk, dv are (B, T, H, D) with one row stride, so they can be the three thirds of one packed
(B, T, 3C) gradient. Where k and v are None, q is the packed projection, and dq (dk in the split form's second half) is its whole
gradient.

Source: Dao et al. 2022, FlashAttention, algorithm 4; Dao 2023, FlashAttention-2, algorithm 2.
"""
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import fastest
from .attention_common import (LARGEST_STRIDE, LOG2_E, Program, check_inputs, head_offset, in_place, keys_of_head, load_tile,
                               machine, program, rows_are_contiguous, rows_in_place, scheduled_tile, store_tile)
from .dot import add_dot
from .dropout import keep_scale, keep_scores
from .host import elsewhere


@triton.jit
def _padded(T):
    """The length of a row of terms: a multiple of 128, the longest tile of queries, so that terms load without a mask."""
    return tl.cdiv(T, 128) * 128


@triton.jit
def _store_terms(out_ptr, do_ptr, lse_ptr, terms_ptr, stride_dot, start_m, scale2, dropout_p, H, Tq,
                 D: tl.constexpr, BLOCK_M: tl.constexpr, HEAD: tl.constexpr):
    """lse and delta [BLOCK_M] of the queries start_m .. start_m+BLOCK_M; also stores the two rows of terms for `_walk_queries`."""
    out = load_tile(out_ptr, start_m, H * D, Tq, D, BLOCK_M, HEAD, True)
    do = load_tile(do_ptr, start_m, stride_dot, Tq, D, BLOCK_M, HEAD, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < Tq, other=float("inf"))                   # makes p 0 past the last query
    tl.store(terms_ptr + offs_m, -lse if out.dtype.is_fp32() else -lse / scale2)
    tl.store(terms_ptr + _padded(Tq) + offs_m, delta * (dropout_p - 1.0))
    return lse, delta


@triton.jit
def _pad_terms(terms_ptr, first, Tq):
    """Store terms past the last query, from `first` on: the split form's second half may have longer tiles than its first."""
    offs_m = first + tl.arange(0, 128)
    tl.store(terms_ptr + offs_m, float("-inf"), mask=offs_m < _padded(Tq))
    tl.store(terms_ptr + _padded(Tq) + offs_m, 0.0, mask=offs_m < _padded(Tq))


@triton.jit
def _walk_queries(dk, dv, k, v, q_ptr, do_ptr, terms_ptr, dq_sum_ptr, stride_qt, stride_dot, lo, hi, start_n,
                  scale2, seed, dropout_p, head, Tq, Tk, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  HEAD: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, WITH_DQ: tl.constexpr):
    """Add the terms of the queries lo .. hi to dk, dv [BLOCK_N, HEAD] of the keys start_n ..; WITH_DQ, also to the queries' dq."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    for start_m in tl.range(lo, hi, BLOCK_M, disable_licm=True):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr, start_m, stride_qt, Tq, D, BLOCK_M, HEAD, True)
        do = load_tile(do_ptr, start_m, stride_dot, Tq, D, BLOCK_M, HEAD, True)
        shift = tl.load(terms_ptr + offs_m)[None, :]
        minus_delta = tl.load(terms_ptr + _padded(Tq) + offs_m)[None, :]                    # times 1 - dropout_p
        if k.dtype.is_fp32():
            # With lse / scale as the initial accumulator, each of the D additions would round at its magnitude.
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 + shift)    # [BLOCK_N, BLOCK_M]
        else:
            p = tl.exp2(tl.dot(k, tl.trans(q), tl.broadcast_to(shift, (BLOCK_N, BLOCK_M))) * scale2)
        if MASKED:
            p = tl.where(offs_m[None, :] + (Tk - Tq) >= offs_n[:, None], p, 0.0)
        dp = tl.dot(v, tl.trans(do), tl.broadcast_to(minus_delta, (BLOCK_N, BLOCK_M)), input_precision="ieee")
        if DROPOUT:
            keep = keep_scores(seed, head, start_m, start_n, dropout_p, BLOCK_M, BLOCK_N, TRANSPOSED=True)
            dv = add_dot(tl.where(keep, p, 0.0).to(do.dtype), do, dv)                           # scaled at the end
            dp = tl.where(keep, dp, minus_delta) * keep_scale(dropout_p)
        else:
            dv = add_dot(p.to(do.dtype), do, dv)
        ds = (p * dp).to(q.dtype)
        dk = add_dot(ds, q, dk)
        if WITH_DQ:
            # The first tile of keys starts the sum, so it loads zeros.
            dq = load_tile(dq_sum_ptr, start_m, D, Tq * (start_n > 0), D, BLOCK_M, HEAD, True)
            dq = add_dot(tl.trans(ds), k, dq)                                               # [BLOCK_M, HEAD]
            store_tile(dq_sum_ptr, dq, start_m, D, Tq, D, BLOCK_M, HEAD)
    return dk, dv


@triton.jit
def _tile_of_keys(q_ptr, k_ptr, v_ptr, do_ptr, terms_ptr, dk_ptr, dv_ptr, dq_sum_ptr,
                  stride_qt, stride_kt, stride_dot, stride_gt, start_n, scale, scale2, seed, dropout_p, head, Tq, Tk,
                  D: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
                  WITH_DQ: tl.constexpr):
    """dk and dv of the keys start_n .. start_n+BLOCK_N of a head; WITH_DQ, also their part of dq. All pointers are the head's."""
    k = load_tile(k_ptr, start_n, stride_kt, Tk, D, BLOCK_N, HEAD, True)
    v = load_tile(v_ptr, start_n, stride_kt, Tk, D, BLOCK_N, HEAD, True)
    dk = tl.zeros((BLOCK_N, HEAD), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD), tl.float32)
    # The tile of the first query that sees key start_n, and the first tile in which all queries see all of these keys.
    first = tl.maximum(start_n - (Tk - Tq), 0) // BLOCK_M * BLOCK_M
    full = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - (Tk - Tq), 0), BLOCK_M) * BLOCK_M
    if full > first:
        dk, dv = _walk_queries(dk, dv, k, v, q_ptr, do_ptr, terms_ptr, dq_sum_ptr, stride_qt, stride_dot,
                               first, tl.minimum(full, Tq), start_n, scale2, seed, dropout_p, head, Tq, Tk,
                               D, BLOCK_M, BLOCK_N, HEAD, True, DROPOUT, WITH_DQ)
    if Tq > full:
        dk, dv = _walk_queries(dk, dv, k, v, q_ptr, do_ptr, terms_ptr, dq_sum_ptr, stride_qt, stride_dot,
                               full, Tq, start_n, scale2, seed, dropout_p, head, Tq, Tk,
                               D, BLOCK_M, BLOCK_N, HEAD, False, DROPOUT, WITH_DQ)
    if DROPOUT:
        dv = dv * keep_scale(dropout_p)
    store_tile(dk_ptr, dk * scale, start_n, stride_gt, Tk, D, BLOCK_N, HEAD)
    store_tile(dv_ptr, dv, start_n, stride_gt, Tk, D, BLOCK_N, HEAD)


@triton.jit
def _gradients_of_keys(dk_ptr, dv_ptr, offset, H, D: tl.constexpr):
    """(dk_ptr, dv_ptr) of the head. dv_ptr None: dk_ptr is the packed gradient, whose rows hold dq, dk and dv."""
    if dv_ptr is None:
        return dk_ptr + offset + H * D, dk_ptr + offset + 2 * H * D
    else:
        return dk_ptr + offset, dv_ptr + offset


@triton.jit(do_not_specialize=["H", "Tq", "Tk"])
def backward_head_kernel(q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, terms_ptr, dq_ptr, dk_ptr, dv_ptr, dq_sum_ptr, seed_ptr,
                         stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
                         stride_dob, stride_doh, stride_dot, stride_gt, scale, scale2, dropout_p, H, Tq, Tk,
                         D: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         DROPOUT: tl.constexpr):
    """The head form, program i for head i: the gradients of `reference.causal_attention` or `causal_attention_qkvpacked`."""
    head = tl.program_id(0)
    batch, column = (head // H).to(tl.int64), head % H * D
    q_ptr += head_offset(head, H, stride_qb, stride_qh)
    do_ptr += head_offset(head, H, stride_dob, stride_doh)
    out_ptr += batch * Tq * (H * D) + column
    lse_ptr += head.to(tl.int64) * Tq
    terms_ptr += head.to(tl.int64) * (2 * _padded(Tq))
    dq_sum_ptr += head.to(tl.int64) * Tq * D
    seed = tl.load(seed_ptr) if DROPOUT else 0
    for start_m in tl.range(0, Tq, BLOCK_M):
        _store_terms(out_ptr, do_ptr, lse_ptr, terms_ptr, stride_dot, start_m, scale2, dropout_p, H, Tq, D, BLOCK_M, HEAD)
    _pad_terms(terms_ptr, tl.cdiv(Tq, BLOCK_M) * BLOCK_M, Tq)
    for start_n in tl.range(0, Tk, BLOCK_N, disable_licm=True):
        # Other threads of the block stored the terms and the sums of dq that this tile loads, and only a barrier makes a block's
        # stores visible to all its threads. Within one tile of keys, each row of dq is loaded and stored once.
        tl.debug_barrier()
        k, v = keys_of_head(q_ptr, k_ptr, v_ptr, head, H, stride_kb, stride_kh, D)
        dk, dv = _gradients_of_keys(dq_ptr if dk_ptr is None else dk_ptr, dv_ptr, batch * Tk * stride_gt + column, H, D)
        _tile_of_keys(q_ptr, k, v, do_ptr, terms_ptr, dk, dv, dq_sum_ptr,
                      stride_qt, stride_kt, stride_dot, stride_gt, start_n, scale, scale2, seed, dropout_p, head, Tq, Tk,
                      D, HEAD, BLOCK_M, BLOCK_N, DROPOUT, True)
        # dq is complete for the queries whose last key is in this tile.
        tl.debug_barrier()
        start_m = tl.maximum(start_n - (Tk - Tq), 0)
        end = tl.minimum(start_n + BLOCK_N - (Tk - Tq), Tq)
        dq_sum = load_tile(dq_sum_ptr, start_m, D, end, D, BLOCK_N, HEAD, True)
        store_tile(dq_ptr + batch * Tq * stride_gt + column, dq_sum * scale, start_m, stride_gt, end, D, BLOCK_N, HEAD)


@triton.jit(do_not_specialize=["H", "Tq", "Tk", "n_heads", "group"])
def backward_dkdv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, terms_ptr, dk_ptr, dv_ptr, seed_ptr,
                         stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
                         stride_dob, stride_doh, stride_dot, stride_gt, scale, scale2, dropout_p, H, Tq, Tk, n_heads, group,
                         D: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         DROPOUT: tl.constexpr):
    """The split form's second half: dk and dv of `reference.causal_attention`, a program per tile of keys.

    Rank 0, the first keys, is seen by the most queries.
    """
    rank, head = scheduled_tile(tl.cdiv(Tk, BLOCK_N), n_heads, group)
    batch, column = (head // H).to(tl.int64), head % H * D
    q_ptr += head_offset(head, H, stride_qb, stride_qh)
    k, v = keys_of_head(q_ptr, k_ptr, v_ptr, head, H, stride_kb, stride_kh, D)
    dk, dv = _gradients_of_keys(dk_ptr, dv_ptr, batch * Tk * stride_gt + column, H, D)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    _tile_of_keys(q_ptr, k, v, do_ptr + head_offset(head, H, stride_dob, stride_doh),
                  terms_ptr + head.to(tl.int64) * (2 * _padded(Tq)), dk, dv, dk_ptr,
                  stride_qt, stride_kt, stride_dot, stride_gt, rank * BLOCK_N, scale, scale2, seed, dropout_p, head, Tq, Tk,
                  D, HEAD, BLOCK_M, BLOCK_N, DROPOUT, False)


@triton.jit
def _walk_keys(dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, lo, hi, start_m, scale2, seed, dropout_p, head, Tq, Tk,
               D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
               MASKED: tl.constexpr, DROPOUT: tl.constexpr):
    """Add the terms of the keys lo .. hi to dq [BLOCK_M, HEAD] of the queries start_m .. ."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    for start_n in tl.range(lo, hi, BLOCK_N):
        k = load_tile(k_ptr, start_n, stride_kt, Tk, D, BLOCK_N, HEAD, MASKED)
        v = load_tile(v_ptr, start_n, stride_kt, Tk, D, BLOCK_N, HEAD, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")                                  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale2 - lse[:, None])
        if MASKED:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            p = tl.where(offs_m[:, None] + (Tk - Tq) >= offs_n[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")                                # [BLOCK_M, BLOCK_N]
        if DROPOUT:
            keep = keep_scores(seed, head, start_m, start_n, dropout_p, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale(dropout_p), 0.0)
        ds = p * (dp - delta[:, None])
        dq = add_dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["H", "Tq", "Tk", "n_heads", "group"])
def backward_dq_kernel(q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, terms_ptr, dq_ptr, seed_ptr,
                       stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
                       stride_dob, stride_doh, stride_dot, stride_gt, scale, scale2, dropout_p, H, Tq, Tk, n_heads, group,
                       D: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       DROPOUT: tl.constexpr):
    """The split form's first half: dq of `reference.causal_attention`, a program per tile of queries, the last ones first.

    It also stores the terms of its queries for the second half.
    """
    n_tiles = tl.cdiv(Tq, BLOCK_M)
    rank, head = scheduled_tile(n_tiles, n_heads, group)
    start_m = (n_tiles - 1 - rank) * BLOCK_M
    batch, column = (head // H).to(tl.int64), head % H * D
    do_ptr += head_offset(head, H, stride_dob, stride_doh)
    q_ptr += head_offset(head, H, stride_qb, stride_qh)
    k_ptr, v_ptr = keys_of_head(q_ptr, k_ptr, v_ptr, head, H, stride_kb, stride_kh, D)
    terms_ptr += head.to(tl.int64) * (2 * _padded(Tq))
    lse, delta = _store_terms(out_ptr + batch * Tq * (H * D) + column, do_ptr, lse_ptr + head.to(tl.int64) * Tq, terms_ptr,
                              stride_dot, start_m, scale2, dropout_p, H, Tq, D, BLOCK_M, HEAD)
    if rank == 0:
        _pad_terms(terms_ptr, start_m + BLOCK_M, Tq)
    q = load_tile(q_ptr, start_m, stride_qt, Tq, D, BLOCK_M, HEAD, True)
    do = load_tile(do_ptr, start_m, stride_dot, Tq, D, BLOCK_M, HEAD, True)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    dq = tl.zeros((BLOCK_M, HEAD), tl.float32)
    full = (start_m + (Tk - Tq)) // BLOCK_N * BLOCK_N                   # as in the forward
    stop = tl.minimum(start_m + BLOCK_M, Tq) + (Tk - Tq)
    if full > 0:
        dq = _walk_keys(dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, 0, full, start_m, scale2, seed, dropout_p, head, Tq, Tk,
                        D, BLOCK_M, BLOCK_N, HEAD, False, DROPOUT)
    if stop > full:
        dq = _walk_keys(dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, full, stop, start_m, scale2, seed, dropout_p, head, Tq, Tk,
                        D, BLOCK_M, BLOCK_N, HEAD, True, DROPOUT)
    store_tile(dq_ptr + batch * Tq * stride_gt + column, dq * scale, start_m, stride_gt, Tq, D, BLOCK_M, HEAD)


# How the rows of "attention head tile", "attention dq tile" and "attention dkdv tile" in fastest.json were chosen: as the forward's. sm_90's
# for heads of 64 in half precision were timed on an H100 (us, 64 x 1024 tokens of 12 heads; with 12 sequences the order is the same):
#   split    dq 64x32 in 4 warps and dkdv 32x64 in 4: small tiles put many programs on a multiprocessor, so that one's exponentials
#            run beside another's matmuls. dkdv: 32x64 1,129, 64x64 1,181, 64x128 in 8 warps 1,452; dq: 64x32 takes 56 less than 64x64.
#   head     1,837 at best (64x128): the one program of a multiprocessor waits for dq's sum at every tile. So it has no row.
#   cuDNN    1,314 with the `cat` of its three gradients; 1,104 where it writes the packed one (its own front end).
# The reasons for the others:
#   head     no row means that the form is not used. 128: dk and dv alone take 64 registers a thread in 8 warps, and it spills 480
#            bytes or more. 32 with dropout: 64x128 spills 24 bytes on sm_80 with Triton 3.6; 32x128 moves as much.
#   dkdv     128 keys where they fit: they halve the traffic of q and do.
#   dq       as the forward.
#   float32  `add_dot` holds a tile's products beside their sum, so tiles are smaller than in the forward.


class Programs(NamedTuple):
    """The part of a backward that does not depend on the lengths. head is None where that form has no tile."""
    head: Program
    dq: Program
    dkdv: Program
    fewest_heads: int       # for the head form: one per multiprocessor
    longest: int            # for the head form: as many queries as keep its working set in L2

    def form(self, heads, Tq):
        """"head" or "split": see the module's docstring."""
        return "head" if self.head and heads >= self.fewest_heads and Tq <= self.longest else "split"


def tiles_for(dtype, D, dropout, device, tokens, length):
    """(head, dq, dkdv) Tiles for `tokens` queries in sequences of `length`; head is None where the table has none."""
    column = fastest.column(dtype, dropout)
    row = fastest.find("attention head tile", device, column, size=D, tokens=tokens, length=length)
    return (None if row is None else row.tile, fastest.tile("attention dq tile", device, column, size=D, tokens=tokens, length=length),
            fastest.tile("attention dkdv tile", device, column, size=D, tokens=tokens, length=length))


@functools.cache
def programs(dtype, D, dropout, device, head, dq, dkdv):
    """The Programs of a dtype, a head size and a GPU with these Tiles; None where a form is not used."""
    made = (program(tile, dtype, D, dropout, device) if tile else None for tile in (head, dq, dkdv))
    multiprocessors, l2 = machine(device)
    # The resident programs' working set: q, do and dq's fp32 sum, of which a tile of keys visits half on average (the queries past
    # the diagonal).
    longest = 2 * l2 // (multiprocessors * D * (2 * dtype.itemsize + 4))
    return Programs(*made, multiprocessors, longest)


@fastest.cached
def _programs_for(dtype, D, dropout, device, tokens, length):
    return programs(dtype, D, dropout, device, *tiles_for(dtype, D, dropout, device, tokens, length))


def attention_backward(do, q, k, v, out, lse, dq, dk, dv, *, scale, dropout_p=0.0, seed=None, form=None, tiles=None):
    """Write the gradients of `attention_forward` into dq (B, Tq, H, D), dk and dv (B, Tk, H, D).

    do: out's gradient as (B, H, Tq, D), strides as for q; q, k, v, out, lse, scale, dropout_p, seed as in the forward. dq, dk,
    dv: q's dtype, heads side by side and one row stride for all three, as the thirds of a packed (B, T, 3C) have. form: "head",
    "split", or None to choose; tiles: {"head": Tile} or {"dq": Tile, "dkdv": Tile} instead of the tables'. Raises ValueError,
    TypeError.
    """
    check_inputs(q, k, v, scale, dropout_p, seed)
    check_gradients(do, q, k, out, lse, dq, dk, dv)
    (B, H, Tq, D), Tk = q.shape, k.size(2)
    _launch(do, q, k, v, out, lse, dq, dk, dv, seed if dropout_p > 0 else None, B, H, Tq, Tk, D,
            (*q.stride()[:3], *k.stride()[:3], *do.stride()[:3], dk.stride(1)), scale, dropout_p, form, tiles)


def check_gradients(do, q, k, out, lse, dq, dk, dv):
    """Raise unless do, out and lse fit q, and dq, dk and dv have the layout that the kernels write."""
    (B, H, Tq, D), Tk = q.shape, k.size(2)
    if do.shape != q.shape or do.dtype != q.dtype or not rows_are_contiguous(do):
        raise ValueError(f"do is {tuple(do.shape)}, {do.dtype}, strides {do.stride()}; expected {tuple(q.shape)}, {q.dtype}, "
                         f"stride 1 in the last dimension and at most {LARGEST_STRIDE} before it")
    if out.shape != (B, Tq, H, D) or not out.is_contiguous() or out.dtype != q.dtype:
        raise ValueError(f"out is {tuple(out.shape)}, {out.dtype}, strides {out.stride()}; expected {(B, Tq, H, D)}, "
                         f"{q.dtype}, contiguous")
    if lse.shape != (B, H, Tq) or not lse.is_contiguous() or lse.dtype != torch.float32:
        raise ValueError(f"lse is {tuple(lse.shape)}, {lse.dtype}, strides {lse.stride()}; expected {(B, H, Tq)}, float32, "
                         "contiguous")
    row = dk.stride(1)
    for name, grad, T in (("dq", dq, Tq), ("dk", dk, Tk), ("dv", dv, Tk)):
        expected = (T * row, row, D, 1)
        if grad.shape != (B, T, H, D) or grad.dtype != q.dtype or grad.device != q.device or \
                any(a != b and n > 1 for a, b, n in zip(grad.stride(), expected, grad.shape, strict=True)):
            raise ValueError(f"{name} is {tuple(grad.shape)}, {grad.dtype}, strides {grad.stride()}; expected {(B, T, H, D)}, "
                             f"{q.dtype}, strides {expected}")


def launch_backward(do, q, k, v, out, lse, seed, scale, dropout_p, form=None):
    """(dq, dk, dv) as (B, T, H, D), for a caller that has checked everything but the strides of do, q, k and v.

    seed: None without dropout. scale None: 1/sqrt(D). form: as for `attention_backward`.
    """
    q, k, v, strides = in_place(q, k, v)
    do = do if rows_are_contiguous(do) else do.contiguous()
    (B, H, Tq, D), Tk = q.shape, k.shape[2]
    dq, dk, dv = (q.new_empty(B, T, H, D) for T in (Tq, Tk, Tk))       # in half the time of torch.empty with a dtype and a device
    _launch(do, q, k, v, out, lse, dq, dk, dv, seed, B, H, Tq, Tk, D, (*strides, *do.stride()[:3], H * D), scale, dropout_p, form)
    return dq, dk, dv


def launch_backward_qkvpacked(do, qkv, out, lse, seed, n_head, scale, dropout_p, form=None, tiles=None):
    """dqkv (B, T, 3C) from do and out (B, T, C), for a caller as above."""
    qkv, batch, token = rows_in_place(qkv)
    do, do_batch, do_token = rows_in_place(do)
    B, T, C3 = qkv.shape
    D = C3 // (3 * n_head)
    dqkv = qkv.new_empty(B, T, C3)
    _launch(do, qkv, None, None, out, lse, dqkv, None, None, seed, B, n_head, T, T, D,
            (batch, D, token, batch, D, token, do_batch, D, do_token, C3), scale, dropout_p, form, tiles)
    return dqkv


def _launch(do, q, k, v, out, lse, dq, dk, dv, seed, B, H, Tq, Tk, D, strides, scale, dropout_p, form=None, tiles=None):
    """Write dq, dk and dv, or a packed dq alone."""
    if elsewhere(q):
        with torch.cuda.device_of(q):
            return _launch(do, q, k, v, out, lse, dq, dk, dv, seed, B, H, Tq, Tk, D, strides, scale, dropout_p, form, tiles)
    if B * H * Tq == 0:
        for grad in (dq, dk, dv):
            if grad is not None:
                grad.zero_()            # without queries, the gradients of the keys are zero
        return
    about = q.dtype, D, seed is not None, q.get_device()
    made = _programs_for(*about, B * Tq, Tq) if tiles is None else programs(*about, *map(tiles.get, ("head", "dq", "dkdv")))
    terms = lse.new_empty(B, H, 2, -(-Tq // 128) * 128)
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    numbers = *strides, scale, scale * LOG2_E, dropout_p, H, Tq, Tk
    form = form or made.form(B * H, Tq)
    if form == "head" and made.head is not None:
        dq_sum = lse.new_empty(B, H, Tq, D)
        backward_head_kernel[(B * H,)](q, k, v, out, do, lse, terms, dq, dk, dv, dq_sum, seed, *numbers, **made.head.constants)
        return
    if form != "split":
        raise ValueError(f"form is {form!r}; expected 'split', None, or 'head' where that has a tile (this head size is {D})")
    tile, constants, keys_in_l2 = made.dq
    heads = B * H, keys_in_l2 // Tk or 1
    backward_dq_kernel[(B * H * -(-Tq // tile.BLOCK_M),)](q, k, v, out, do, lse, terms, dq, seed, *numbers, *heads, **constants)
    tile, constants, _ = made.dkdv
    backward_dkdv_kernel[(B * H * -(-Tk // tile.BLOCK_N),)](
        q, k, v, do, terms, dq if dk is None else dk, dv, seed, *numbers, *heads, **constants)
