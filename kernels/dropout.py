"""Dropout masks that are never stored: Philox, a random number generator that is a pure function of (key, counter).

    kept(element) = philox(key = seed, counter = element) >= p * 2^32            with probability 1 - p

Forward and backward compute the mask of the same elements and so get the same mask. That saves writing and reading a byte per
element, and the mask depends on neither tile sizes nor the grid. The key is one int64 seed per forward pass, in a tensor, so that
a captured CUDA graph draws a new mask when the tensor changes. p is a run-time float, so no kernel is compiled per p.

A Philox call gives four 32-bit words, which decide four elements (`tl.rand` uses one word of the four: about 62 instructions per
decision). The four elements of a call are chosen to lie in the registers of one thread, so that no decision goes through shared
memory:

    keep_rows     tiles of whole rows (LayerNorm): four neighbouring columns, as a 16-byte load places them.
    keep_scores   tiles of a matrix product (attention scores): rows m, m + 8 and columns n, n + 8. In every `mma` and `wgmma`
                  accumulator a thread holds rows r, r + 8 and columns c, c + 8, and also in the transposed tile that the dK/dV
                  loop computes. Compiled for sm_80 and sm_90, it adds 11 instructions per score to the same loop without
                  dropout, and no shared memory; four neighbouring columns would cost a round trip through it.

Counters: a 32-bit column with a 64-bit row, or two 32-bit coordinates within a matrix with the matrix's number. They are never
multiplied into one index, so B * H * T * T may exceed 2^32.

Seven rounds are the fewest with which Philox-4x32 passes BigCrush; its authors' default of ten includes a margin.

The masks have no counterpart in reference.py, which draws from PyTorch's generator: `row_mask` and `score_mask` below compute
the same masks in plain PyTorch.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3 and table 2.
"""
import torch
import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
TWO_POW_32 = tl.constexpr(4294967296.0)
LARGEST_BELOW = tl.constexpr(4294967040.0)  # the largest fp32 below 2^32, so that p = 1 does not overflow the threshold


@triton.jit
def keep_rows(seed, rows, p, BLOCK_C: tl.constexpr, start=0):
    """`row_mask` of a tile, [ROWS, BLOCK_C] int1: True where row `rows[i]`, column `start + j` is kept.

    seed: int64 scalar. rows: int64 [ROWS]. p: float. start: a multiple of 4. BLOCK_C: a power of two from 4.
    """
    group = (start // 4 + tl.arange(0, BLOCK_C // 4)).to(tl.uint32)[None, :]                # counter 0: column // 4
    low, high = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None], (rows >> 32).to(tl.uint32)[:, None]  # 1, 2: the row
    w0, w1, w2, w3 = tl.philox(seed, group, low, high, high * 0, ROUNDS)                    # [ROWS, BLOCK_C / 4] each
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))                                       # [ROWS, BLOCK_C / 4, 2, 2]
    return words.reshape(rows.shape[0], BLOCK_C) >= _threshold(p)


@triton.jit
def keep_scores(seed, matrix, m0, n0, p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """`score_mask` of a tile, [BLOCK_M, BLOCK_N] int1 or, if TRANSPOSED, [BLOCK_N, BLOCK_M]: True where score (m0 + i, n0 + j) of
    `matrix` is kept.

    seed: int64 scalar. matrix: its number, batch * H + head. m0, n0: multiples of 16. p: float. Blocks: powers of two from 16.
    """
    row = (m0 // 2 + tl.arange(0, BLOCK_M // 2)).to(tl.uint32)[:, None]                     # m without its bit 3
    column = (n0 // 2 + tl.arange(0, BLOCK_N // 2)).to(tl.uint32)[None, :]                  # n without its bit 3
    zero = row * 0
    w0, w1, w2, w3 = tl.philox(seed, column, row, zero + matrix.to(tl.uint32), zero, ROUNDS)  # [BLOCK_M / 2, BLOCK_N / 2]
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))                                       # [.., .., n's bit 3, m's bit 3]
    words = words.reshape(BLOCK_M // 16, 8, BLOCK_N // 16, 8, 2, 2)
    if TRANSPOSED:
        words = words.permute(2, 4, 3, 0, 5, 1).reshape(BLOCK_N, BLOCK_M)
    else:
        words = words.permute(0, 5, 1, 2, 4, 3).reshape(BLOCK_M, BLOCK_N)
    return words >= _threshold(p)


@triton.jit
def keep_scale(p):
    """1 / (1 - p), the factor of a kept element; 0 for p = 1."""
    p = tl.cast(p, tl.float32)
    kept = tl.maximum(1.0 - p, 1e-9)
    scale = 1.0 / kept
    # A GPU's division may be off by 2 units in the last place, which would bias every element; one step of Newton's method makes
    # it correctly rounded. (So would `tl.div_rn`, in more registers than attention's loops have.)
    return tl.where(p < 1.0, tl.fma(scale, tl.fma(-kept, scale, 1.0), scale), 0.0)


@triton.jit
def _threshold(p):
    return tl.minimum(tl.cast(p, tl.float32) * TWO_POW_32, LARGEST_BELOW).to(tl.uint32)


def checked_seed(seed, p, like):
    """The seed where p > 0, else None. Raises ValueError unless p is a probability and the seed is one for it."""
    if not 0 <= p <= 1:
        raise ValueError(f"the dropout probability is {p}; expected 0 to 1")
    if p == 0:
        return None
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != like.device:
        raise ValueError(f"the dropout probability is {p}, so seed must be one int64 element on {like.device}; got {seed!r}")
    return seed


# ------------------------------------------------------------------- the same masks in PyTorch, for tests and curious readers


def row_mask(seed, rows, C, p):
    """The mask of `keep_rows` as a bool tensor (rows, C). seed: int or int64 tensor. rows: a count, or an int64 tensor (R,)."""
    rows = torch.arange(rows) if isinstance(rows, int) else rows
    column = torch.arange(C, device=rows.device)[None, :]
    row = rows[:, None]
    words = philox(int(seed), column // 4, row & 0xFFFFFFFF, row >> 32, 0)
    return _select(words, column % 4) >= _threshold_on_host(p)


def score_mask(seed, matrices, M, N, p, device=None):
    """The mask of `keep_scores` as a bool tensor (matrices, M, N): scores (m, n) of matrices 0, 1, ..."""
    matrix, m, n = torch.meshgrid(*(torch.arange(size, device=device) for size in (matrices, M, N)), indexing="ij")
    words = philox(int(seed), n // 16 * 8 + n % 8, m // 16 * 8 + m % 8, matrix, 0)
    return _select(words, m // 8 % 2 * 2 + n // 8 % 2) >= _threshold_on_host(p)


def philox(key, c0, c1, c2, c3, rounds=ROUNDS.value):
    """Philox-4x32: four int64 tensors that hold 32-bit words, from a 64-bit key and counters (ints or int64 tensors)."""
    mask = 0xFFFFFFFF
    k0, k1 = key & mask, key >> 32 & mask
    device = next((c.device for c in (c0, c1, c2, c3) if isinstance(c, torch.Tensor)), None)
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=device) for c in (c0, c1, c2, c3)))
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57        # 64-bit products; their bits are right although int64 wraps around
        c0, c1, c2, c3 = (b >> 32 & mask) ^ c1 ^ k0, b & mask, (a >> 32 & mask) ^ c3 ^ k1, a & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return c0, c1, c2, c3


def _select(words, lane):
    return torch.gather(torch.stack(words), 0, lane.broadcast_to(words[0].shape)[None])[0]


def _threshold_on_host(p):
    return int(min(torch.tensor(p, dtype=torch.float32).item() * TWO_POW_32.value, LARGEST_BELOW.value))
