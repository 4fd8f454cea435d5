"""Shared by the attention kernels: loading and storing a tile, which tile a program takes, the checks of the launchers.

The notation of all attention files: q, k, v are (B, H, T, D) views with stride 1 in D and any strides before it, so the three
thirds of a packed (B, T, 3C) projection need no copy. Tq queries are the last Tq of Tk positions: query i sees keys
0 .. Tk - Tq + i. Scores are kept in base 2 (exp2 is one instruction, exp is two): s2 = scale * log2(e) * q k^T, and the
log-sum-exp kept for the backward is a log2 too.
"""
import functools
import math
import typing

import torch
import triton
import triton.language as tl

from .dropout import checked_seed
from .fastest import Tile
from .host import DTYPES, padded

LOG2_E = math.log2(math.e)      # launchers multiply it into the scale, in fp64; in the kernel it would cost one more rounding


# ------------------------------------------------------------------------------------------------------------- device functions


@triton.jit
def load_tile(ptr, first, stride, count, D: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows first .. first+ROWS of the matrix at ptr: [ROWS, HEAD]; zeros from column D on and, if BOUNDED, from row `count` on."""
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, HEAD)[None, :]
    # Only the start of a tile needs 64 bits: a tile spans at most 128 rows.
    ptrs = ptr + tl.cast(first, tl.int64) * stride + row * stride + col
    if BOUNDED and D < HEAD:
        return tl.load(ptrs, mask=(first + row < count) & (col < D), other=0.0)
    elif BOUNDED:
        return tl.load(ptrs, mask=first + row < count, other=0.0)
    elif D < HEAD:
        return tl.load(ptrs, mask=col < D, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(ptr, tile, first, stride, count, D: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Store the rows below `count` and columns below D of tile [ROWS, HEAD] as rows first .. of the matrix at ptr."""
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, HEAD)[None, :]
    ptrs = ptr + tl.cast(first, tl.int64) * stride + row * stride + col
    mask = first + row < count
    if D < HEAD:
        mask = mask & (col < D)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def head_offset(head, H, stride_b, stride_h):
    """Offset of head `head` of B*H, in elements; 64 bits because B*T*3C exceeds 2^31."""
    return (head // H).to(tl.int64) * stride_b + (head % H).to(tl.int64) * stride_h


@triton.jit
def keys_of_head(q_ptr, k_ptr, v_ptr, head, H, stride_kb, stride_kh, D: tl.constexpr):
    """(k_ptr, v_ptr) of the head whose queries are at q_ptr. k_ptr None: q is the packed projection, whose rows hold q, k and v.

    Called where the pointers are used: computed at the start of a kernel, k's would take a register through every loop.
    """
    if k_ptr is None:
        return q_ptr + H * D, q_ptr + 2 * H * D
    else:
        offset = head_offset(head, H, stride_kb, stride_kh)
        return k_ptr + offset, v_ptr + offset


@triton.jit
def scheduled_tile(n_tiles, n_heads, group):
    """(rank, head) of this program: rank 0 of every head of a group first, then rank 1, and so on; then the next group.

    Rank 0 is the longest tile, so the multiprocessors finish together. A group has as many heads as have room for their keys and
    values in the L2 cache, so a tile of rank 1 finds there what rank 0 fetched.
    """
    pid = tl.program_id(0)
    first_head = pid // (group * n_tiles) * group
    within = pid % (group * n_tiles)
    heads = tl.minimum(group, n_heads - first_head)
    return within // heads, first_head + within % heads


# ---------------------------------------------------------------------------------------------------------------- the host side


LARGEST_HEAD = 256
LARGEST_STRIDE = 2**23          # a tile spans up to 128 rows, and its offsets are 32-bit


@functools.cache
def machine(device):
    """(multiprocessors, bytes of L2) of a GPU; device=-1 (interpreter) returns H200 values."""
    if device < 0:
        return 132, 50 * 2**20
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


class Program(typing.NamedTuple):
    """The part of a launch that does not depend on the lengths, computed once per dtype, head size and GPU."""
    tile: Tile
    constants: dict         # the kernel's constexprs, warps and stages
    keys_in_l2: int         # keys that fill half of L2 together with their values: `scheduled_tile` groups keys_in_l2 // Tk heads


def program(tile, dtype, D, dropout, device):
    """The Program of a tile for a dtype, a head size and a GPU."""
    constants = dict(D=D, HEAD=padded(D), DROPOUT=dropout, **tile.options())
    return Program(tile, constants, machine(device)[1] // 2 // (2 * D * dtype.itemsize))


def rows_are_contiguous(x):
    """True where a kernel can read x (B, H, T, D) in place: unit stride in D, rows at most 2^23 elements apart."""
    return (x.stride(3) == 1 or x.size(3) == 1) and (x.stride(2) <= LARGEST_STRIDE or x.size(2) == 1)


def same_layout(k, v):
    """True where v has k's strides, so that the kernels can use the same offsets for both."""
    return all(a == b or n == 1 for a, b, n in zip(k.stride(), v.stride(), k.shape, strict=True))


def in_place(q, k, v):
    """(q, k, v, six strides of q and of k and v in B, H and T), with contiguous copies of what a kernel can't read in place."""
    of_k = k.stride()
    (qb, qh, qt, qd), (kb, kh, kt, kd) = q.stride(), of_k
    if qd == kd == 1 and qt <= LARGEST_STRIDE and kt <= LARGEST_STRIDE and v.stride() == of_k:
        return q, k, v, (qb, qh, qt, kb, kh, kt)
    q, k, v = (x if rows_are_contiguous(x) else x.contiguous() for x in (q, k, v))
    if not same_layout(k, v):
        k, v = k.contiguous(), v.contiguous()
    return q, k, v, q.stride()[:3] + k.stride()[:3]


def rows_in_place(x):
    """(x, its strides in B and T) of x (B, T, columns), or of a contiguous copy where a kernel can't read x in place."""
    batch, token, column = x.stride()
    if column == 1 and token <= LARGEST_STRIDE:
        return x, batch, token
    x = x.contiguous()
    return x, *x.stride()[:2]


def check_inputs(q, k, v, scale, dropout_p, seed):
    """Raise unless these are (B, H, Tq, D), (B, H, Tk, D) twice, in layouts that the kernels can read."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (B, H, T, D)")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, q {q.dtype}; expected float32, float16 or bfloat16, the same for q, k and v")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; expected one device")
        if not rows_are_contiguous(x):
            raise ValueError(f"{name} has strides {x.stride()}; expected 1 in the last dimension and at most {LARGEST_STRIDE} "
                             "before it; make it contiguous first")
    (B, H, Tq, D), Tk = q.shape, k.size(2)
    if k.shape != (B, H, Tk, D) or v.shape != k.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected the same B, H and D, "
                         "and k like v")
    if Tq > Tk:
        raise ValueError(f"{Tq} queries and {Tk} keys; expected at most as many queries as keys: they are the last "
                         "positions")
    if not same_layout(k, v):
        raise ValueError(f"k has strides {k.stride()}, v {v.stride()}; expected the same")
    _check_numbers(q, D, scale, dropout_p, seed)


def check_packed(qkv, n_head, scale, dropout_p, seed):
    """Raise unless qkv is (B, T, 3C) with n_head heads side by side in each third. scale may be None."""
    if qkv.dim() != 3 or n_head < 1 or qkv.size(2) % (3 * n_head):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (B, T, 3C) with C a multiple of n_head={n_head}")
    if qkv.dtype not in DTYPES:
        raise TypeError(f"qkv is {qkv.dtype}; expected float32, float16 or bfloat16")
    _check_numbers(qkv, qkv.size(2) // (3 * n_head), 1.0 if scale is None else scale, dropout_p, seed)


def _check_numbers(q, D, scale, dropout_p, seed):
    if not 1 <= D <= LARGEST_HEAD:
        raise ValueError(f"the head size is {D}; expected 1 to {LARGEST_HEAD}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; expected a positive number")
    checked_seed(seed, dropout_p, q)
