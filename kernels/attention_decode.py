"""Attention of one new query per row over a key-value cache, for generation: out = softmax(scale * q k^T) v.

One query reads its whole cache and multiplies each element once, so memory traffic decides the time: 2 * length * D elements a
head, and nothing else of that size. GPT-2 124M at batch 1 has 12 heads, and a GPU has a hundred multiprocessors or more, so the
keys are split: a program takes one head and one chunk of CHUNK keys, and stores its weighted values and the log2-sum-exp of its
scores; a second kernel combines the chunks of a head. (1, 12, 1024, 64) makes 192 programs. From WHOLE_HEADS heads on there are
enough programs without a split: one kernel, a program per head.

The cache has a fixed capacity, and a device tensor holds the length of each row, so one captured CUDA graph serves every length:
chunks beyond the length return at once. The split depends on D, the dtype and whether B * H reaches WHOLE_HEADS. So a row's
result can depend on the number of rows, but never on their contents.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; the combination of partial softmaxes is Milakov and
Gimelshein's 2018.
"""
import torch
import triton
import triton.language as tl

from .attention_common import LARGEST_HEAD, LARGEST_STRIDE, LOG2_E, head_offset, load_tile, same_layout
from .dependent_launch import launch_dependents, wait_for_predecessor
from .host import DTYPES, padded

# From this many heads (B * H) on, a program takes a whole head: two programs for each of an H100's 132 multiprocessors. It is a
# constant so that the bits do not depend on the GPU. On an H100, with a cold L2 cache, the two kernels took 88.6 us for 64 rows of
# 12 heads of 1,024 keys (201 MB, 2.3 TB/s); decode_rows.py's kernel, which has the same loop, took 45.7 us for 641 keys (126 MB,
# 2.8 TB/s), and 24.6 us for 32 rows.
WHOLE_HEADS = 2 * 132
THREAD_BYTES = 64               # of `whole_kernel`'s tile of keys, per thread; as many of values, and of both for the next tile
# Elements of a program's tile of keys, for every architecture: 64 keys at D=64. Two tiles (keys and values) of 4,096 elements in
# 128 threads are 64 elements a thread, all in flight at once (84 registers at most, no spill), and at T=1024 and batch 1 there is
# a program for each multiprocessor. Chosen by this count; other sizes were not timed.
CHUNK_ELEMENTS = 4096
COMBINED = 16                   # chunks that `combine_kernel` loads at once: all of T=1024 at D=64
WARPS = 4
LOWEST = tl.constexpr(-3.4e38)  # near the lowest number of fp32: the initial maximum of a slot that has no key yet


@triton.jit
def attend_slots(q, k, v, m_i, l_i, acc, k_ptr, v_ptr, stride, count, D: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Attention of q [HEAD], scaled to base 2, over the rows 0 .. count of the matrices at k_ptr and v_ptr: [HEAD] fp32.

    Each of the BLOCK slots of a tile keeps an online softmax of its own, and these are combined once, at the end, so no thread
    waits for another warp inside the loop. The caller passes their initial state, m_i (finite: -inf - -inf would be nan in a slot
    without a key) and l_i [BLOCK], acc [BLOCK, HEAD], and the first tile, k and v; the loop loads each next tile ahead of its use.
    Without any key the result is zeros.
    """
    slot = tl.arange(0, BLOCK)
    for first in tl.range(0, count, BLOCK):
        next_k = load_tile(k_ptr, first + BLOCK, stride, count, D, BLOCK, HEAD, True)
        next_v = load_tile(v_ptr, first + BLOCK, stride, count, D, BLOCK, HEAD, True)
        s = tl.where(first + slot < count, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
        m_ij = tl.maximum(m_i, s)
        alpha, p = tl.exp2(m_i - m_ij), tl.exp2(s - m_ij)
        acc = acc * alpha[:, None] + p[:, None] * v.to(tl.float32)
        l_i, m_i = l_i * alpha + p, m_ij
        k, v = next_k, next_v
    weight = tl.exp2(m_i - tl.max(m_i, 0))
    l_i = tl.sum(l_i * weight, 0)
    return tl.sum(acc * weight[:, None], 0) / tl.where(l_i == 0, 1.0, l_i)


@triton.jit(do_not_specialize=["H"])
def whole_kernel(q_ptr, k_ptr, v_ptr, length_ptr, out_ptr,
                 stride_qb, stride_qh, stride_kb, stride_kh, stride_kt, scale2, H,
                 D: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """One head: out (B*H, D), `reference.causal_attention` of one query over the first `length` keys of the cache."""
    head = tl.program_id(0)
    length = tl.load(length_ptr + head // H).to(tl.int32)
    col = tl.arange(0, HEAD)
    q = tl.load(q_ptr + head_offset(head, H, stride_qb, stride_qh) + col, mask=col < D, other=0.0).to(tl.float32) * scale2
    offset = head_offset(head, H, stride_kb, stride_kh)
    k_ptr += offset
    v_ptr += offset
    k = load_tile(k_ptr, 0, stride_kt, length, D, BLOCK, HEAD, True)
    v = load_tile(v_ptr, 0, stride_kt, length, D, BLOCK, HEAD, True)
    m_i = tl.full((BLOCK,), LOWEST, tl.float32)
    out = attend_slots(q, k, v, m_i, tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, HEAD), tl.float32),
                       k_ptr, v_ptr, stride_kt, length, D, HEAD, BLOCK)
    tl.store(out_ptr + head.to(tl.int64) * D + col, out.to(out_ptr.dtype.element_ty), mask=col < D)


@triton.jit(do_not_specialize=["H", "n_chunks"])
def decode_kernel(q_ptr, k_ptr, v_ptr, length_ptr, part_ptr, lse_ptr,
                  stride_qb, stride_qh, stride_kb, stride_kh, stride_kt, scale2, H, n_chunks,
                  D: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr):
    """One chunk of one head: part (B*H, n_chunks, D) fp32 and lse (B*H, n_chunks), log2.

    part is `reference.causal_attention` of one query over the chunk's keys alone, and lse the log-sum-exp of their scores.
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    launch_dependents(DEPENDENT)                                                        # both do nothing outside of decode.py
    wait_for_predecessor(DEPENDENT)
    length = tl.load(length_ptr + head // H).to(tl.int32)
    first = chunk * CHUNK
    slot = head.to(tl.int64) * n_chunks + chunk
    if first < length:
        col = tl.arange(0, HEAD)
        key = first + tl.arange(0, CHUNK)
        q = tl.load(q_ptr + head_offset(head, H, stride_qb, stride_qh) + col, mask=col < D, other=0.0).to(tl.float32)
        offset = head_offset(head, H, stride_kb, stride_kh)
        k = load_tile(k_ptr + offset, first, stride_kt, length, D, CHUNK, HEAD, True)
        v = load_tile(v_ptr + offset, first, stride_kt, length, D, CHUNK, HEAD, True)
        s = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale2                 # [CHUNK]
        s = tl.where(key < length, s, float("-inf"))
        m_i = tl.max(s, 0)
        p = tl.exp2(s - m_i)
        l_i = tl.sum(p, 0)
        out = tl.sum(p[:, None] * v.to(tl.float32), 0) / l_i                          # [HEAD]
        tl.store(part_ptr + slot * D + col, out, mask=col < D)
        tl.store(lse_ptr + slot, m_i + tl.log2(l_i))


@triton.jit(do_not_specialize=["H", "n_chunks"])
def combine_kernel(part_ptr, lse_ptr, length_ptr, out_ptr, H, n_chunks,
                   D: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, COMBINED: tl.constexpr):
    """out (B*H, D): the chunks' values weighted by 2^(lse - the largest lse), which is `reference.causal_attention` over all keys.

    A row of length 0 gives zeros.
    """
    head = tl.program_id(0)
    col = tl.arange(0, HEAD)
    used = tl.minimum(tl.cdiv(tl.load(length_ptr + head // H).to(tl.int32), CHUNK), n_chunks)
    acc = tl.zeros((HEAD,), tl.float32)
    l_i, m_i = 0.0, float("-inf")
    for first in tl.range(0, used, COMBINED):
        chunk = first + tl.arange(0, COMBINED)
        slot = head.to(tl.int64) * n_chunks + chunk
        lse = tl.load(lse_ptr + slot, mask=chunk < used, other=float("-inf"))           # [COMBINED]
        part = tl.load(part_ptr + slot[:, None] * D + col[None, :],                     # [COMBINED, HEAD]
                       mask=(chunk < used)[:, None] & (col < D)[None, :], other=0.0)
        m_ij = tl.maximum(m_i, tl.max(lse, 0))
        weight, alpha = tl.exp2(lse - m_ij), tl.exp2(m_i - m_ij)
        acc = acc * alpha + tl.sum(weight[:, None] * part, 0)
        l_i = l_i * alpha + tl.sum(weight, 0)
        m_i = m_ij
    out = acc / tl.where(l_i > 0, l_i, 1.0)
    tl.store(out_ptr + head.to(tl.int64) * D + col, out.to(out_ptr.dtype.element_ty), mask=col < D)


def keys_of_tile(HEAD, warps, itemsize):
    """BLOCK: the keys of a tile of `attend_slots`."""
    return THREAD_BYTES * 32 * warps // (HEAD * itemsize)


def attention_decode(q, k, v, lengths, *, scale):
    """q (B, H, 1, D) over the first lengths[b] of the keys and values k, v (B, H, T, D) -> (B, H, 1, D), contiguous.

    lengths (B,) int32 or int64, on q's device: 0 <= lengths[b] <= T, not checked, since that would synchronise; 0 gives zeros. k
    and v have the same strides, 1 in the last dimension. float32, float16 or bfloat16. Raises ValueError, TypeError.
    """
    B, H, Tq, D = q.shape
    T = k.size(2)
    if Tq != 1 or k.shape != (B, H, T, D) or v.shape != k.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected (B, H, 1, D), (B, H, T, D) "
                         "twice")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected float32, float16 or bfloat16, the same for all")
    if lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths is {tuple(lengths.shape)}, {lengths.dtype}; expected ({B},) int32 or int64")
    if not lengths.is_contiguous():
        raise ValueError(f"lengths has stride {lengths.stride(0)}; make it contiguous first")
    if any(x.device != q.device for x in (k, v, lengths)):
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}, lengths on {lengths.device}; expected one "
                         "device")
    if not 1 <= D <= LARGEST_HEAD:
        raise ValueError(f"the head size is {D}; expected 1 to {LARGEST_HEAD}")
    if any(x.stride(-1) != 1 and D > 1 for x in (q, k, v)) or not same_layout(k, v) or k.stride(2) > LARGEST_STRIDE:
        raise ValueError(f"strides of q {q.stride()}, k {k.stride()}, v {v.stride()}; expected 1 in the last dimension, the "
                         "same for k and v")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive number")
    HEAD = padded(D)
    out = torch.empty((B, H, 1, D), dtype=q.dtype, device=q.device)
    if B * H == 0 or T == 0:
        return out.zero_()
    strides, scale2 = (*q.stride()[:2], *k.stride()[:3]), scale * LOG2_E
    with torch.cuda.device_of(q):
        if B * H >= WHOLE_HEADS:
            whole_kernel[(B * H,)](q, k, v, lengths, out, *strides, scale2, H, D=D, HEAD=HEAD,
                                   BLOCK=keys_of_tile(HEAD, WARPS, q.element_size()), num_warps=WARPS)
            return out
        CHUNK = CHUNK_ELEMENTS // HEAD
        n_chunks = -(-T // CHUNK)
        part = torch.empty((B * H, n_chunks, D), dtype=torch.float32, device=q.device)
        lse = torch.empty((B * H, n_chunks), dtype=torch.float32, device=q.device)
        decode_kernel[(B * H, n_chunks)](
            q, k, v, lengths, part, lse, *strides, scale2, H, n_chunks,
            D=D, HEAD=HEAD, CHUNK=CHUNK, DEPENDENT=False, num_warps=WARPS)
        combine_kernel[(B * H,)](
            part, lse, lengths, out, H, n_chunks, D=D, HEAD=HEAD, CHUNK=CHUNK, COMBINED=COMBINED, num_warps=WARPS)
    return out
