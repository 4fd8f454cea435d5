"""One token in each of 3 to 16 rows through a GPT: decode.py's five kernels a layer, on tensor cores.

    0  embed         once a step: x = the embedding of token and position
    1  norm_qkv      x -> LayerNorm -> w_attn h + b: the query, and key and value into the cache
    2  attend        the query over the cache -> y, a program a head
    3  linear_add    w_proj y + b, added to x
    4  norm_act      x -> LayerNorm -> act(w_fc h + b) -> h
    5  linear_add    w_proj h + b, added to x
       head          after the last layer: LayerNorm -> logits

decode.py reads its weights from L2 once per row. Here a program reads its tile of weights, OUT outputs x K inputs, once and
multiplies it with all rows: outputs are the M of an mma (16), rows the N (8 or 16). The rest is as in decode.py: few kernels;
weights load before the kernel ahead has ended (dependent_launch.py); no sum crosses programs, so the bits are the same in every
run, and a row's result does not depend on the rows beside it.

GPT-2 124M in bf16, us a step at position 640: 364 for 4 rows, 406 for 8, 533 for 16; the step made of ops takes 587, 592 and 730.
For 32 and 64 rows, tiles of 16 and 32 rows took 900 and 1,388 us at best, and the ops 879 and 1,178. (H100 80GB HBM3, torch 2.11,
Triton 3.6, benchmarks/gpu/decode_forms.py; kernels/README.md has each kernel's time beside its floor.)

Each warp multiplies its own slice of K, and the warps' sums are added at the end, always in the same order: 16 outputs and 8 rows
are a single mma in M and N, which warps could only repeat.

The norm needs the whole row before its first product, and every program needs the norm: three reductions over C in each. So the
kernel that finishes x stores, for its OUT columns of each row, their mean and the sum of their centred squares (Chan, Golub,
LeVeque 1983), and the norm combines C / OUT such pairs a row instead of reading the row first. Variances are still computed from
centred values.

`attend` does not split a head's keys: 5 rows of 12 heads are 60 programs with 64 KB in flight each.

Activations that a matrix multiplies (normalised rows, y, h) are rounded to the weights' dtype, as nn.Linear does under autocast;
sums, residual stream, query and logits are fp32. Weights are fp16 or bf16: tensor cores do not keep float32's precision.

Shapes as in decode.py: B rows; C = H * D; F; V; T positions.
"""
import torch
import triton
import triton.language as tl

from . import decode
from .attention_common import LOG2_E, load_tile
from .attention_decode import LOWEST, attend_slots, keys_of_tile
from .decode import vector
from .dependent_launch import launch_dependents, options as launch_options, wait_for_predecessor
from .host import multiprocessors, padded
from .mlp import activated

LARGEST_C = 2048                # the norm holds C / OUT pairs of statistics for each row


# ------------------------------------------------------------------------------------------------------------- device functions


@triton.jit
def weight_piece(w_ptr, first, N, K: tl.constexpr, i, OUT: tl.constexpr, SPLIT: tl.constexpr, SLICE: tl.constexpr):
    """Piece i, the columns from i*SPLIT*SLICE on, of the rows first .. first+OUT of (N, K): [SPLIT, OUT, SLICE]; zeros outside."""
    n = tl.arange(0, OUT)[None, :, None]
    k = i * SPLIT * SLICE + tl.arange(0, SPLIT)[:, None, None] * SLICE + tl.arange(0, SLICE)[None, None, :]
    return tl.load(w_ptr + first.to(tl.int64) * K + n * K + k, mask=(first + n < N) & (k < K), other=0.0)


@triton.jit
def weight_pieces(w_ptr, first, N, K: tl.constexpr, COUNT: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr,
                  SLICE: tl.constexpr):
    """The first COUNT pieces, all in flight at once."""
    pieces = ()
    for i in tl.static_range(COUNT):
        pieces += (weight_piece(w_ptr, first, N, K, i, OUT, SPLIT, SLICE),)
    return pieces


@triton.jit
def row_piece(x_ptr, row, B, K: tl.constexpr, i, BLOCK: tl.constexpr):
    """Piece i, the columns from i*BLOCK on, of the rows `row` [ROWS] of x (B, K): [ROWS, BLOCK]; zeros outside."""
    k = i * BLOCK + tl.arange(0, BLOCK)
    return tl.load(x_ptr + row[:, None] * K + k[None, :], mask=(row < B)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def normed_piece(x, mean, shift, rstd, ln_weight_ptr, ln_bias_ptr, i, C: tl.constexpr, BLOCK: tl.constexpr):
    """`reference.layer_norm` of a piece x [ROWS, BLOCK] of rows with these statistics [ROWS]; zeros outside."""
    weight, bias = vector(ln_weight_ptr, i * BLOCK, C, BLOCK), vector(ln_bias_ptr, i * BLOCK, C, BLOCK)
    return ((x - mean[:, None]) - shift[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def row_statistics(stats_ptr, row, B, eps, C: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """(mean, shift, rstd) [ROWS] of the rows `row`, from (2, C / GROUP, B): means and centred squares of GROUP columns each.

    shift is the mean of the residuals x - mean, since fp32 holds a mean of 1e4 to 5e-4 only. rstd = 1 / sqrt(variance + eps).
    """
    N_GROUPS: tl.constexpr = (C + GROUP - 1) // GROUP
    group = tl.arange(0, GROUPS)[:, None]
    at = stats_ptr + group * B + row[None, :]
    inside = (group < N_GROUPS) & (row < B)[None, :]
    means = tl.load(at, mask=inside, other=0.0)                                         # [GROUPS, ROWS]
    squares = tl.load(at + N_GROUPS * B, mask=inside, other=0.0)
    columns = tl.where(inside, tl.minimum(GROUP, C - group * GROUP), 0).to(tl.float32)
    mean = tl.sum(columns * means, 0) / C
    off = means - mean[None, :]
    shift = tl.sum(columns * off, 0) / C
    off -= shift[None, :]
    return mean, shift, 1.0 / tl.sqrt_rn(tl.sum(squares + columns * off * off, 0) / C + eps)


@triton.jit
def store_statistics(stats_ptr, x, first, tile, row, B, C: tl.constexpr, OUT: tl.constexpr):
    """Store the mean and centred squares of x [OUT, ROWS], columns first .. first+OUT of the rows, for `row_statistics`."""
    inside = (first + tl.arange(0, OUT) < C)[:, None]
    columns = tl.minimum(OUT, C - first).to(tl.float32)
    mean = tl.sum(tl.where(inside, x, 0.0), 0) / columns
    off = tl.where(inside, x - mean[None, :], 0.0)
    at = stats_ptr + tile * B + row
    tl.store(at, mean, mask=row < B)
    tl.store(at + ((C + OUT - 1) // OUT) * B, tl.sum(off * off, 0), mask=row < B)


@triton.jit
def add_product(w, h, acc):
    """acc [SPLIT, OUT, ROWS] + w h^T for each slice: w [SPLIT, OUT, SLICE], h [ROWS, SPLIT * SLICE]."""
    SPLIT: tl.constexpr = w.shape[0]
    h = tl.permute(tl.reshape(h.to(w.dtype), (h.shape[0], SPLIT, w.shape[2])), (1, 2, 0))
    return tl.dot(w, h, acc)


# ---------------------------------------------------------------------------------------------------------------------- kernels
# Grids are tiles of OUT outputs. Before `wait_for_predecessor` a kernel reads only parameters: the first EARLY pieces of its rows of
# weights. After it, AHEAD pieces of the rows of activations are in flight.


@triton.jit(do_not_specialize=["B", "T"])
def embed_kernel(
        token_ptr, position_ptr, wte_ptr, wpe_ptr,      # (B,) int64 twice, (V, C), (T, C)
        x_ptr, stats_ptr, length_ptr,                   # (B, C) fp32, (2, C / GROUP, B) fp32, (B,) int32: position + 1
        B, T, C: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, DEPENDENT: tl.constexpr):
    """x = the sum of the embeddings of token and position, F.embedding of both, and its statistics; a program per row.

    As the first kernel of a step it must not start early.
    """
    row = tl.program_id(0)
    launch_dependents(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    position = tl.minimum(tl.load(position_ptr + row), T - 1)           # a row past the window is processed elsewhere
    group, column = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    at = group[:, None] * GROUP + column[None, :]                                       # [GROUPS, GROUP]
    inside = at < C
    x = tl.load(wte_ptr + tl.load(token_ptr + row) * C + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(wpe_ptr + position * C + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * C + at, x, mask=inside)
    tl.store(length_ptr + row, position.to(tl.int32) + 1)
    columns = tl.maximum(tl.minimum(GROUP, C - group * GROUP), 1).to(tl.float32)
    mean = tl.sum(x, 1) / columns
    off = tl.where(inside, x - mean[:, None], 0.0)
    N_GROUPS: tl.constexpr = (C + GROUP - 1) // GROUP
    tl.store(stats_ptr + group * B + row, mean, mask=group < N_GROUPS)
    tl.store(stats_ptr + (N_GROUPS + group) * B + row, tl.sum(off * off, 1), mask=group < N_GROUPS)


@triton.jit(do_not_specialize=["B", "T"])
def norm_qkv_kernel(
        x_ptr, stats_ptr, ln_weight_ptr, ln_bias_ptr,   # (B, C) fp32, (2, C / GROUP, B) fp32, (C,), (C,) or None
        w_ptr, b_ptr,                                   # (3C, C), (3C,) or None
        q_ptr, k_ptr, v_ptr, length_ptr,                # (B, C) fp32, (B, H, T, D) twice, (B,) int32
        B, T, eps, C: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
        ROWS: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr, SLICE: tl.constexpr, EARLY: tl.constexpr,
        AHEAD: tl.constexpr, DEPENDENT: tl.constexpr):
    """q, k and v = F.linear(`reference.layer_norm`(x), w, b) of one position a row; k and v go into the cache."""
    first = tl.program_id(0) * OUT
    launch_dependents(DEPENDENT)
    ws = weight_pieces(w_ptr, first, 3 * C, C, EARLY, OUT, SPLIT, SLICE)
    b = vector(b_ptr, first, 3 * C, OUT)
    wait_for_predecessor(DEPENDENT)
    row = tl.arange(0, ROWS)
    out = norm_product(ws, w_ptr, first, 3 * C, x_ptr, stats_ptr, ln_weight_ptr, ln_bias_ptr, row, B, eps, C, GROUP, GROUPS,
                       ROWS, OUT, SPLIT, SLICE, EARLY, AHEAD) + b[:, None]              # [OUT, ROWS]

    n = (first + tl.arange(0, OUT))[:, None]
    there = (row < B)[None, :]
    tl.store(q_ptr + row[None, :] * C + n, out, mask=there & (n < C))
    position = tl.load(length_ptr + row, mask=row < B, other=1) - 1
    c = n % C
    slot = ((row[None, :] * (C // D) + c // D).to(tl.int64) * T + position[None, :]) * D + c % D
    tl.store(k_ptr + slot, out.to(k_ptr.dtype.element_ty), mask=there & (n >= C) & (n < 2 * C))
    tl.store(v_ptr + slot, out.to(v_ptr.dtype.element_ty), mask=there & (n >= 2 * C) & (n < 3 * C))


@triton.jit
def norm_product(ws, w_ptr, first, N, x_ptr, stats_ptr, ln_weight_ptr, ln_bias_ptr, row, B, eps, C: tl.constexpr,
                 GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr,
                 SLICE: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr):
    """w times the normalised rows: [OUT, ROWS] fp32. ws: the first EARLY pieces of w."""
    BLOCK: tl.constexpr = SPLIT * SLICE
    PIECES: tl.constexpr = (C + BLOCK - 1) // BLOCK
    xs = ()
    for i in tl.static_range(AHEAD):
        xs += (row_piece(x_ptr, row, B, C, i, BLOCK),)
    mean, shift, rstd = row_statistics(stats_ptr, row, B, eps, C, GROUP, GROUPS)
    acc = tl.zeros((SPLIT, OUT, ROWS), tl.float32)
    for i in tl.static_range(PIECES):
        if i + EARLY < PIECES:
            ws += (weight_piece(w_ptr, first, N, C, i + EARLY, OUT, SPLIT, SLICE),)
        if i + AHEAD < PIECES:
            xs += (row_piece(x_ptr, row, B, C, i + AHEAD, BLOCK),)
        acc = add_product(ws[i], normed_piece(xs[i], mean, shift, rstd, ln_weight_ptr, ln_bias_ptr, i, C, BLOCK), acc)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["B"])
def norm_act_kernel(
        x_ptr, stats_ptr, ln_weight_ptr, ln_bias_ptr,   # (B, C) fp32, (2, C / GROUP, B) fp32, (C,), (C,) or None
        w_ptr, b_ptr, h_ptr,                            # (F, C), (F,) or None, (B, F) in the weights' dtype
        B, eps, C: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
        ROWS: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr, SLICE: tl.constexpr, EARLY: tl.constexpr,
        AHEAD: tl.constexpr, DEPENDENT: tl.constexpr):
    """h = `reference.activation`(F.linear(`reference.layer_norm`(x), w, b)): the first half of the MLP."""
    first = tl.program_id(0) * OUT
    launch_dependents(DEPENDENT)
    ws = weight_pieces(w_ptr, first, F, C, EARLY, OUT, SPLIT, SLICE)
    b = vector(b_ptr, first, F, OUT)
    wait_for_predecessor(DEPENDENT)
    row = tl.arange(0, ROWS)
    out = norm_product(ws, w_ptr, first, F, x_ptr, stats_ptr, ln_weight_ptr, ln_bias_ptr, row, B, eps, C, GROUP, GROUPS,
                       ROWS, OUT, SPLIT, SLICE, EARLY, AHEAD) + b[:, None]              # [OUT, ROWS]
    n = first + tl.arange(0, OUT)
    tl.store(h_ptr + row[None, :] * F + n[:, None], activated(out, ACTIVATION, True).to(h_ptr.dtype.element_ty),
             mask=(row < B)[None, :] & (n < F)[:, None])


@triton.jit(do_not_specialize=["B"])
def linear_add_kernel(
        h_ptr, w_ptr, b_ptr, x_ptr, stats_ptr,          # (B, K), (C, K), (C,) or None, (B, C) fp32, (2, C / OUT, B) fp32
        B, C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr, SLICE: tl.constexpr,
        EARLY: tl.constexpr, AHEAD: tl.constexpr, DEPENDENT: tl.constexpr):
    """x += F.linear(h, w, b): a projection and the residual add; also the statistics of x's columns."""
    BLOCK: tl.constexpr = SPLIT * SLICE
    PIECES: tl.constexpr = (K + BLOCK - 1) // BLOCK
    tile = tl.program_id(0)
    first = tile * OUT
    launch_dependents(DEPENDENT)
    ws = weight_pieces(w_ptr, first, C, K, EARLY, OUT, SPLIT, SLICE)
    b = vector(b_ptr, first, C, OUT)
    wait_for_predecessor(DEPENDENT)
    row = tl.arange(0, ROWS)
    n = first + tl.arange(0, OUT)
    inside = (row < B)[None, :] & (n < C)[:, None]
    x_at = x_ptr + row[None, :] * C + n[:, None]
    x = tl.load(x_at, mask=inside, other=0.0)
    hs = ()
    for i in tl.static_range(AHEAD):
        hs += (row_piece(h_ptr, row, B, K, i, BLOCK),)
    acc = tl.zeros((SPLIT, OUT, ROWS), tl.float32)
    for i in tl.static_range(PIECES):
        if i + EARLY < PIECES:
            ws += (weight_piece(w_ptr, first, C, K, i + EARLY, OUT, SPLIT, SLICE),)
        if i + AHEAD < PIECES:
            hs += (row_piece(h_ptr, row, B, K, i + AHEAD, BLOCK),)
        acc = add_product(ws[i], hs[i], acc)
    x += tl.sum(acc, 0) + b[:, None]                                                    # [OUT, ROWS]
    tl.store(x_at, x, mask=inside)
    store_statistics(stats_ptr, x, first, tile, row, B, C, OUT)


@triton.jit(do_not_specialize=["T"])
def attend_kernel(
        q_ptr, k_ptr, v_ptr, position_ptr, y_ptr,       # (B, C) fp32, (B, H, T, D) twice, (B,) int64, (B, C)
        T, scale2, H: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """y = `reference.causal_attention` of one query over the cache; a program per head of a row.

    The first tile is loaded before the wait: all keys but the newest are from earlier steps, which ended before this one began.
    The newest key is the initial state of slot 0's softmax.
    """
    head = tl.program_id(0)
    launch_dependents(DEPENDENT)
    position = tl.minimum(tl.load(position_ptr + head // H), T - 1).to(tl.int32)
    col, slot = tl.arange(0, HEAD), tl.arange(0, BLOCK)
    k_ptr += head.to(tl.int64) * T * D
    v_ptr += head.to(tl.int64) * T * D
    k = load_tile(k_ptr, 0, D, position, D, BLOCK, HEAD, True)
    v = load_tile(v_ptr, 0, D, position, D, BLOCK, HEAD, True)
    wait_for_predecessor(DEPENDENT)
    q = tl.load(q_ptr + head * D + col, mask=col < D, other=0.0) * scale2
    # .cg bypasses the L1 cache: with an odd D they share 32 bytes with a key that was loaded before they were written
    k_new = tl.load(k_ptr + position * D + col, mask=col < D, other=0.0, cache_modifier=".cg").to(tl.float32)
    v_new = tl.load(v_ptr + position * D + col, mask=col < D, other=0.0, cache_modifier=".cg").to(tl.float32)
    m_i = tl.where(slot == 0, tl.sum(q * k_new, 0), LOWEST)                             # [BLOCK]
    l_i = tl.where(slot == 0, 1.0, 0.0)
    acc = tl.where((slot == 0)[:, None], v_new[None, :], 0.0)                           # [BLOCK, HEAD]
    y = attend_slots(q, k, v, m_i, l_i, acc, k_ptr, v_ptr, D, position, D, HEAD, BLOCK)                   # [HEAD]
    tl.store(y_ptr + head * D + col, y.to(y_ptr.dtype.element_ty), mask=col < D)


@triton.jit(do_not_specialize=["B", "V"])
def head_kernel(
        x_ptr, stats_ptr, ln_weight_ptr, ln_bias_ptr,   # (B, C) fp32, (2, C / GROUP, B) fp32, (C,), (C,) or None
        w_ptr, b_ptr, logits_ptr,                       # (V, C), (V,) or None, (B, V) fp32
        B, V, eps, C: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr,
        SPLIT: tl.constexpr, SLICE: tl.constexpr, DEPENDENT: tl.constexpr):
    """logits = F.linear(`reference.layer_norm`(x), w, b).

    A program normalises its rows once and loops over many tiles of the vocabulary, with the next one already loading. SPLIT * SLICE
    is at least C.
    """
    first, stride = tl.program_id(0) * OUT, tl.num_programs(0) * OUT
    launch_dependents(DEPENDENT)
    w = weight_piece(w_ptr, first, V, C, 0, OUT, SPLIT, SLICE)
    wait_for_predecessor(DEPENDENT)
    row = tl.arange(0, ROWS)
    x = row_piece(x_ptr, row, B, C, 0, SPLIT * SLICE)
    mean, shift, rstd = row_statistics(stats_ptr, row, B, eps, C, GROUP, GROUPS)
    h = normed_piece(x, mean, shift, rstd, ln_weight_ptr, ln_bias_ptr, 0, C, SPLIT * SLICE).to(w_ptr.dtype.element_ty)
    at = logits_ptr + row.to(tl.int64)[None, :] * V
    for tile in tl.range(first, V, stride):
        following = weight_piece(w_ptr, tile + stride, V, C, 0, OUT, SPLIT, SLICE)
        n = tile + tl.arange(0, OUT)
        out = tl.sum(add_product(w, h, tl.zeros((SPLIT, OUT, ROWS), tl.float32)), 0) + vector(b_ptr, tile, V, OUT)[:, None]
        tl.store(at + n[:, None], out, mask=(row < B)[None, :] & (n < V)[:, None])
        w = following


# ------------------------------------------------------------------------------------------------------------------------ tiles


LARGEST_B = 16                  # rows of a tile: 8, or 16 for more than 8
# Outputs of a program, for widths up to 1,024; 4 warps, more for a longer row of weights; slices of 64 columns of K. Only activations
# are reused, so nothing depends on the architecture. Chosen by what all programs together read from L2 or memory at C=768, in MB a
# launch, weights + activations:
#
#                   programs    8 rows        16 rows
#   norm_qkv             144   3.5 + 3.5     3.5 + 7.1
#   linear_add C          96   1.2 + 1.2     1.2 + 2.4
#   norm_act             192   4.7 + 4.7     4.7 + 9.4
#   linear_add F          96   4.7 + 4.7     4.7 + 9.4
#
# On an H100 a step of 8 rows takes 406 us with this table; 436 with half as many outputs in norm_qkv and norm_act and twice as many
# in the others; 556 and 579 with 8 warps and fewer keys in flight in `attend`. 16 rows take 533 us; 686 and 789 with 8 warps.
OUTPUTS = {"norm_qkv": 16, "linear_add": 8, "norm_act": 16, "head": 16}
WARPS, SLICE = 4, 64
THREAD_WEIGHTS = 128            # most weights of the OUT rows per thread; above that, more warps (up to 8)
EARLY_BYTES = 48 * 1024         # of weights that a program loads before the wait, into shared memory: sm_86 has 99 KB
AHEAD_REGISTERS = 512           # for activations in flight, summed over one thread of each warp: 64 KB a program
LARGEST_AHEAD = 96              # the same of one thread, at most
HEAD_PROGRAMS = 2               # programs of `head` per multiprocessor
FEW_HEADS = 132                 # up to this many programs, `attend` takes 8 warps each, above it 4


def tile_for(kernels, B, K, itemsize):
    """(constexprs, warps) for a matrix with rows of K and B rows of activations, of `itemsize` bytes an element."""
    ROWS, OUT, warps = 8 if B <= 8 else 16, OUTPUTS[kernels], WARPS
    width = padded(K)
    while OUT * width > THREAD_WEIGHTS * 32 * warps and warps < 8:
        warps *= 2
    columns = min(SLICE, width)
    SPLIT = warps = min(warps, width // columns)
    if kernels == "head":                                               # wide rows leave registers for only half the outputs
        return dict(ROWS=ROWS, OUT=OUT if width <= 1024 else OUT // 2, SPLIT=SPLIT, SLICE=width // SPLIT), warps
    pieces = -(-K // (SPLIT * columns))
    registers = ROWS * columns * itemsize // (32 * 4)                   # of a thread, for a piece of activations
    ahead = min(LARGEST_AHEAD, AHEAD_REGISTERS // warps) // registers
    early = EARLY_BYTES // (2 * OUT * SPLIT * columns)
    return dict(ROWS=ROWS, OUT=OUT, SPLIT=SPLIT, SLICE=columns, EARLY=min(pieces, max(1, early)),
                AHEAD=min(pieces, max(1, ahead))), warps


def attend_tile(HEAD, programs):
    """(BLOCK, warps) of `attend`."""
    warps = 8 if programs <= FEW_HEADS else 4
    return keys_of_tile(HEAD, warps, 2), warps


# -------------------------------------------------------------------------------------------------------------------- launchers


class RowsDecoder(decode.Decoder):
    """decode.Decoder with this file's kernels, for up to 16 rows: the same parameters and caches. Weights float16 or bfloat16."""

    def __init__(self, wte, wpe, ln_f, head, layers, *, eps=1e-5):
        B, C, self.dtype = layers[0].keys.size(0), wte.size(1), head[0].dtype
        if self.dtype == torch.float32:
            raise TypeError("the weights are torch.float32; expected float16 or bfloat16, for the tensor cores")
        if B > LARGEST_B or C > LARGEST_C:
            raise ValueError(f"{B} rows of width {C}; expected at most {LARGEST_B} of at most {LARGEST_C}")
        super().__init__(wte, wpe, ln_f, head, layers, eps=eps)

    def _allocate(self):
        new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=self.wte.device)
        self.GROUP = OUTPUTS["linear_add"]
        groups = -(-self.C // self.GROUP)
        self.groups = dict(GROUP=self.GROUP, GROUPS=triton.next_power_of_2(groups))
        self.x, self.q, self.stats = new(self.B, self.C), new(self.B, self.C), new(2, groups, self.B)
        self.y, self.h = new(self.B, self.C, dtype=self.dtype), new(self.B, self.F, dtype=self.dtype)
        self.length = new(self.B, dtype=torch.int32)

    def _step(self, token, position, logits):
        self.embed(token, position)
        for layer in self.layers:
            self.norm_qkv(layer)
            self.attend(layer, position)
            self.linear_add(self.y, layer.c_proj)
            self.norm_act(layer)
            self.linear_add(self.h, layer.mlp_proj)
        self.logits(logits)

    def embed(self, token, position):
        # The first kernel of a step must not start early: the work ahead of it may still be writing the weights.
        embed_kernel[(self.B,)](token, position, self.wte, self.wpe, self.x, self.stats, self.length, self.B, self.T, C=self.C,
                                **self.groups, num_warps=4, **launch_options(self.x, early=False))

    def norm_qkv(self, layer):
        constants, warps = tile_for("norm_qkv", self.B, self.C, 4)
        norm_qkv_kernel[(-(-3 * self.C // constants["OUT"]),)](
            self.x, self.stats, *layer.ln_1, *layer.c_attn, self.q, layer.keys, layer.values, self.length, self.B, self.T, self.eps,
            C=self.C, D=self.D, **self.groups, **constants, num_warps=warps, **launch_options(self.x))

    def attend(self, layer, position):
        BLOCK, warps = attend_tile(self.HEAD, self.B * self.H)
        attend_kernel[(self.B * self.H,)](
            self.q, layer.keys, layer.values, position, self.y, self.T, LOG2_E * self.D**-0.5, H=self.H, D=self.D,
            HEAD=self.HEAD, BLOCK=BLOCK, num_warps=warps, **launch_options(self.x))

    def linear_add(self, h, linear):
        constants, warps = tile_for("linear_add", self.B, h.size(1), 2)
        linear_add_kernel[(-(-self.C // constants["OUT"]),)](
            h, *linear, self.x, self.stats, self.B, C=self.C, K=h.size(1), **constants, num_warps=warps, **launch_options(self.x))

    def norm_act(self, layer):
        constants, warps = tile_for("norm_act", self.B, self.C, 4)
        norm_act_kernel[(-(-self.F // constants["OUT"]),)](
            self.x, self.stats, *layer.ln_2, *layer.c_fc, self.h, self.B, self.eps, C=self.C, F=self.F,
            ACTIVATION=layer.activation, **self.groups, **constants, num_warps=warps, **launch_options(self.x))

    def logits(self, out):
        constants, warps = tile_for("head", self.B, self.C, 4)
        programs = min(-(-self.V // constants["OUT"]), HEAD_PROGRAMS * multiprocessors(self.x.get_device()))
        head_kernel[(programs,)](
            self.x, self.stats, *self.ln_f, *self.head, out, self.B, self.V, self.eps, C=self.C, **self.groups, **constants,
            num_warps=warps, **launch_options(self.x))
