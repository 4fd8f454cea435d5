"""Bias, activation and dropout of the GELU-MLP, forward and backward, inside its two matmuls or after them.

    h    = x w_fc^T + b_fc            (M, F)    M = B*T rows, F = 4C
    post = act(h)                     (M, F)
    y    = dropout(post w_proj^T + b_proj)      (M, C)

    dpre   = act'(h) * (dy' w_proj)   (M, F)    dy' = dy after the dropout's backward
    db_fc  = sum over rows of dpre,   db_proj = sum over rows of dy'

The activation between the two matmuls can be computed in two places:

  epilogue    in the matmul that computes its input, while the tile is still in registers (`linear_act`; `linear_dact` for the
              backward). The forward then writes h and post once, 16 C bytes a token in half precision; the pointwise form moves
              24 C, since it also reads h. Inference doesn't need h, and 8 C remain. The backward moves 16 C (reads h, writes
              dpre); the pointwise form moves 32 C, since it also writes d(post) and reads it back. At GPT-2 124M and 64 x 1024
              tokens the difference is 0.4 GB a layer forward and 0.8 GB backward: 94 and 187 us at an H200's bandwidth.
  pointwise   in a kernel of its own after cuBLAS's matmul (`act`, `dact`). More traffic, but cuBLAS's main loop.

The epilogue is faster only where it runs beside another block's main loop, which keeps the tensor cores busy: GELU takes about 33
instructions an element, and a K of 768 is only 12 steps of the main loop. So tiles are 128 x 128 with four warps (by timing eight in sm_90's backward), which puts two
blocks on a multiprocessor, and the epilogue works on quarters of a tile, which keeps it from spilling. (A 128 x 256 tile has a
better main loop, but one block a multiprocessor, and it spills.)

GELU isn't invertible, so h is kept for the backward. post is kept too, or the backward kernel computes it again from h
(`want_post`). The epilogue applies the activation to h before h is rounded. PyTorch rounds h first, and rounding act(h) of a
rounded h is biased: for h = 3 in bf16, gelu(h) = 2.996 rounds to 3 (for h of standard deviation 2 the mean error is 1.5e-4, 20
standard errors; from the unrounded h none was measurable).

Bias gradients are summed in fp32: per tile or group of rows in the kernel, then over these partial sums. There are no atomics, and
the groups of rows depend on the shape but not on the GPU, so the bits are always the same.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016); erf by Abramowitz and Stegun, "Handbook of Mathematical
Functions", 7.1.26; dropout: dropout.py.
"""
import torch
import triton
import triton.language as tl

from . import fastest
from .dot import add_dot
from .dropout import checked_seed, keep_rows, keep_scale
from .host import DTYPES

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")

LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
TANH_CUBIC = tl.constexpr(0.044715)


# ---------------------------------------------------------------------------------------------------- the activation, fp32
# As `reference.activation` computes it, in fp32. EXACT (fp32 operands) takes tl.erf; half precision an approximation.


@triton.jit
def _normal_cdf(x, EXACT: tl.constexpr):
    """(Phi(x), exp(-x^2 / 2)): the normal distribution function, and the exponential that its derivative needs too."""
    e = tl.exp2(x * x * (-0.5 * LOG2_E))
    if EXACT:
        return 0.5 + 0.5 * tl.erf(x * SQRT_HALF), e
    # erfc(u) = (a1 t + ... + a5 t^5) exp(-u^2), t = 1 / (1 + p u), u >= 0, to 1.5e-7: far below bf16's and fp16's rounding.
    # With u = |x| / sqrt(2) its exponential is e, so GELU and GELU' together need one exponential and one division.
    t = 1.0 / (1.0 + (0.3275911 * SQRT_HALF) * tl.abs(x))
    tail = 0.5 * t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * e
    return tl.where(x > 0, 1.0 - tail, tail), e


@triton.jit
def _tanh_gate(x):
    """(s, s (1 - s)) of s = sigmoid(2 z) = (1 + tanh z) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    z = SQRT_2_OVER_PI * x * (1.0 + TANH_CUBIC * x * x)
    e = tl.exp2(tl.abs(z) * (-2.0 * LOG2_E))    # at most 1, so nothing overflows, and 1 - s is computed without cancellation
    r = 1.0 / (1.0 + e)
    return tl.where(z > 0, r, e * r), e * r * r


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(x), x fp32."""
    if ACTIVATION == "gelu":
        cdf, _ = _normal_cdf(x, EXACT)
        return x * cdf
    elif ACTIVATION == "gelu_tanh":
        gate, _ = _tanh_gate(x)
        return x * gate
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)      # tl.maximum would lose NaN, which PyTorch keeps
    else:
        return x


@triton.jit
def _act_and_slope(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """(act(x), act'(x)), x fp32; the compiler removes what the caller doesn't use."""
    if ACTIVATION == "gelu":
        cdf, e = _normal_cdf(x, EXACT)
        return x * cdf, cdf + x * e * INV_SQRT_2PI
    elif ACTIVATION == "gelu_tanh":
        gate, slope = _tanh_gate(x)
        slope_z = SQRT_2_OVER_PI * (1.0 + 3.0 * TANH_CUBIC * x * x)
        return x * gate, gate + 2.0 * x * slope * slope_z
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)


# ------------------------------------------------------------------------------------------- matmuls with an epilogue


@triton.jit
def _load(ptr, row, column, rows, columns, stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The tile [BLOCK_R, BLOCK_C] at (row, column) of a (rows, columns) matrix; zeros outside."""
    r, c = row + tl.arange(0, BLOCK_R)[:, None], column + tl.arange(0, BLOCK_C)[None, :]
    return tl.load(ptr + r.to(tl.int64) * stride + c, mask=(r < rows) & (c < columns), other=0.0)


@triton.jit
def _matmul(a_ptr, b_ptr, m, n, M, N, K, stride_a, stride_b, B_IS_NK: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The fp32 tile [BLOCK_M, BLOCK_N] at (m, n) of a b, a (M, K), b (K, N); with B_IS_NK of a b^T, b (N, K)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = _load(a_ptr, m, k, M, K, stride_a, BLOCK_M, BLOCK_K)
        if B_IS_NK:
            b = _load(b_ptr, n, k, N, K, stride_b, BLOCK_N, BLOCK_K).T
        else:
            b = _load(b_ptr, k, n, K, N, stride_b, BLOCK_K, BLOCK_N)
        acc = add_dot(a, b, acc)
    return acc


@triton.jit
def _tile_origin(N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row, column, tile row) of this program. Neighbouring programs read the same rows of a, the larger matrix; b stays in L2."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    return tile_m * BLOCK_M, tl.program_id(0) % tiles_n * BLOCK_N, tile_m


@triton.jit
def _quarters(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Four tiles [BLOCK_M, BLOCK_N / 4], left to right, so that an epilogue holds a quarter of its operands at a time.

    Without this the epilogues spill, since the accumulator alone takes 128 of 255 registers. (With halves, the backward spills 56
    to 312 bytes.)
    """
    left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    first, second = left.reshape(BLOCK_M, 2, BLOCK_N // 4).permute(0, 2, 1).split()
    third, fourth = right.reshape(BLOCK_M, 2, BLOCK_N // 4).permute(0, 2, 1).split()
    return first, second, third, fourth


@triton.jit(do_not_specialize=["M"])     # the number of rows changes from batch to batch; one compilation serves all
def _linear_act_kernel(
        x_ptr, w_ptr, b_ptr, h_ptr, y_ptr,      # (M, K), (N, K), (N,) or None, (M, N) or None, (M, N)
        seed_ptr, dropout_p, M, N, K, stride_x,
        ACTIVATION: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of y = dropout(act(h)), h = x w^T + b: the first half of `reference.gelu_mlp`; its second half with act "none"."""
    m, n, _ = _tile_origin(N, BLOCK_M, BLOCK_N)
    acc = _matmul(x_ptr, w_ptr, m, n, M, N, K, stride_x, K, True, BLOCK_M, BLOCK_N, BLOCK_K)
    quarters = _quarters(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(4):
        _store_act(quarters[i], b_ptr, h_ptr, y_ptr, seed_ptr, dropout_p, m, n + i * (BLOCK_N // 4), M, N,
                   ACTIVATION, EXACT, DROPOUT, BLOCK_M, BLOCK_N // 4)


@triton.jit
def _store_act(h, b_ptr, h_ptr, y_ptr, seed_ptr, dropout_p, m, n, M, N,
               ACTIVATION: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add the bias to h [BLOCK_M, BLOCK_N], store h where h_ptr is given, and store dropout(act(h))."""
    row, column = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    if b_ptr is not None:
        h += tl.load(b_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if h_ptr is not None:
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)
    y = activated(h, ACTIVATION, EXACT)
    if DROPOUT:
        keep = keep_rows(tl.load(seed_ptr), row.to(tl.int64), dropout_p, BLOCK_N, n)
        y = tl.where(keep, y * keep_scale(dropout_p), 0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _linear_dact_kernel(
        dy_ptr, w_ptr, h_ptr, b_ptr,            # (M, K), (K, N), (M, N), (N,) or None: a bias that h lacks
        dh_ptr, post_ptr, partial_ptr,          # (M, N), (M, N) or None, (tiles in M, N) fp32 or None
        M, N, K, stride_dy,
        ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of dh = (dy w) * act'(h): the gradient of h in `reference.gelu_mlp`."""
    m, n, tile_m = _tile_origin(N, BLOCK_M, BLOCK_N)
    acc = _matmul(dy_ptr, w_ptr, m, n, M, N, K, stride_dy, N, False, BLOCK_M, BLOCK_N, BLOCK_K)
    quarters = _quarters(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(4):
        _store_dact(quarters[i], h_ptr, b_ptr, dh_ptr, post_ptr, partial_ptr, m, n + i * (BLOCK_N // 4), tile_m, M, N,
                    ACTIVATION, EXACT, BLOCK_M, BLOCK_N // 4)


@triton.jit
def _store_dact(dpost, h_ptr, b_ptr, dh_ptr, post_ptr, partial_ptr, m, n, tile_m, M, N,
                ACTIVATION: tl.constexpr, EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store dpost * act'(h) [BLOCK_M, BLOCK_N] and, where their pointers are given, act(h) and the sum over this tile's rows."""
    row, column = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if b_ptr is not None:
        h += tl.load(b_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    post, slope = _act_and_slope(h, ACTIVATION, EXACT)
    dh = dpost * slope                          # 0 in rows past M, where dpost is a sum of zeros
    tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
    if post_ptr is not None:
        tl.store(post_ptr + at, post.to(post_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        tl.store(partial_ptr + tile_m.to(tl.int64) * N + column, tl.sum(dh, axis=0), mask=column < N)


# ------------------------------------------------------------------------------------------------------ pointwise kernels


@triton.jit(do_not_specialize=["M"])
def _act_kernel(
        h_ptr, b_ptr, y_ptr,                    # (M, N), (N,) or None, (M, N)
        seed_ptr, dropout_p, M, N,
        ACTIVATION: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of y = dropout(act(h + b)): `reference.activation`, with bias and dropout."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    m, n = tl.program_id(0) // tiles_n * BLOCK_M, tl.program_id(0) % tiles_n * BLOCK_N
    h = _load(h_ptr, m, n, M, N, N, BLOCK_M, BLOCK_N).to(tl.float32)
    _store_act(h, b_ptr, None, y_ptr, seed_ptr, dropout_p, m, n, M, N, ACTIVATION, EXACT, DROPOUT, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "ROWS"])
def _dact_kernel(
        dy_ptr, h_ptr, b_ptr,                   # (M, N), (M, N) or None where act is none, (N,) or None
        dh_ptr, post_ptr, partial_ptr,          # (M, N) or None, (M, N) or None, (row groups, N) fp32 or None
        seed_ptr, dropout_p, M, N, ROWS,        # ROWS: a program's, a multiple of BLOCK_M
        ACTIVATION: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The backward of `_act_kernel` for a group of rows, BLOCK_N columns wide: the gradient of `reference.activation`."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    group, n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n * BLOCK_N
    column = n + tl.arange(0, BLOCK_N)
    if b_ptr is not None:
        b = tl.load(b_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m in range(group * ROWS, tl.minimum(group * ROWS + ROWS, M), BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        inside = (row < M)[:, None] & (column < N)[None, :]
        dh = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = keep_rows(tl.load(seed_ptr), row.to(tl.int64), dropout_p, BLOCK_N, n)
            dh = tl.where(keep, dh * keep_scale(dropout_p), 0.0)
        if h_ptr is not None:
            h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if b_ptr is not None:
                h += b[None, :]
            post, slope = _act_and_slope(h, ACTIVATION, EXACT)
            dh *= slope
            if post_ptr is not None:
                tl.store(post_ptr + at, post.to(post_ptr.dtype.element_ty), mask=inside)
        if dh_ptr is not None:
            tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        total += dh
    if partial_ptr is not None:
        tl.store(partial_ptr + group.to(tl.int64) * N + column, tl.sum(total, axis=0), mask=column < N)


# ------------------------------------------------------------------------------------------------------------- tile tables

# How the rows of "mlp forward tile" and "mlp backward tile" in fastest.json were chosen: with the gate, the largest tile with two resident
# blocks and no spill. sm_80: 48 KB; with BLOCK_K 64 the epilogue spills 8 bytes. sm_86, sm_89: 32 KB, so two blocks fit 100 KB; with 64
# KB they would not. sm_90: 96 KB, so two blocks fit 228 KB. fp32 is multiplied in IEEE precision, without tensor cores: operands pass
# through registers, so the tile is small. sm_90's were timed (H100, 65,536 rows, C = 768; us): backward 822 in 8 warps, 1,012 in 4,
# cuBLAS and `dact` 873; forward 846 to 1,124, cuBLAS and `act` 703.

# (BLOCK_M, BLOCK_N, warps): 16 elements a thread, two loads of 16 bytes in half precision. 256 divides GPT-2's widths except
# 1600, and a row of 256 is whole cache lines.
POINTWISE_TILE = (8, 256, 4)

# Where columns are summed, about 8 programs on each of 132 multiprocessors loop over the rows: enough to fill a GPU, and few enough
# to keep the partial sums small. It is a constant so that the sums have the same bits on every GPU.
SUM_PROGRAMS = 1056


def tile_for(pass_, x, M, N):
    """The Tile of a pass ("forward", "backward") for a product of M rows and N columns, its left operand x."""
    return fastest.tile(f"mlp {pass_} tile", x.get_device(), fastest.column(x.dtype), size=N, tokens=M)


def rows_per_program(M, tiles_n):
    """Rows of one program of `_dact_kernel`: a multiple of its tile's."""
    block_m = POINTWISE_TILE[0]
    rows = -(-M // max(1, SUM_PROGRAMS // tiles_n))
    return max(1, -(-rows // block_m)) * block_m


# --------------------------------------------------------------------------------------------------------------- launchers



def _check(name, tensor, shape, like, dtypes=None, row_stride_free=False):
    """Raise unless the tensor has this shape, like's device and dtype (or one of `dtypes`), and is contiguous.

    row_stride_free: only the columns must be contiguous.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if tensor.dtype not in (dtypes or (like.dtype,)):
        raise TypeError(f"{name} is {tensor.dtype}; expected {' or '.join(map(str, dtypes or (like.dtype,)))}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; expected {like.device}, where the first argument is")
    if not (tensor.is_contiguous() or row_stride_free and tensor.stride(-1) == 1):
        expected = "neighbouring columns" if row_stride_free else "a contiguous tensor"
        raise ValueError(f"{name} has strides {tensor.stride()}; expected {expected}")


def _check_act(x, activation, dropout_p, seed):
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"the input is {x.dtype}; expected {', '.join(map(str, DTYPES))}")
    checked_seed(seed, dropout_p, x)


def linear_act(x, w, b=None, *, activation="gelu", keep_h=True, dropout_p=0.0, seed=None, tile=None):
    """(dropout(act(h)), h) of h = x w^T + b in one kernel. x (M, K), any row stride; w (N, K); b (N,) of any float dtype.

    keep_h=False: h isn't written, and None is returned for it. activation: "none", "gelu" (erf), "gelu_tanh", "relu". seed: int64,
    one element, on x's device, where dropout_p > 0. tile: a Tile to use instead of the table's. Raises ValueError, TypeError.
    """
    M, K = x.shape
    N = w.shape[0]
    _check_act(x, activation, dropout_p, seed)
    _check("x", x, (M, K), x, row_stride_free=True)
    _check("w", w, (N, K), x)
    if b is not None:
        _check("b", b, (N,), x, DTYPES)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y) if keep_h else None
    tile = tile or tile_for("forward", x, M, N)
    if y.numel():
        with torch.cuda.device_of(x):
            _linear_act_kernel[(-(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N),)](
                x, w, b, h, y, seed if dropout_p > 0 else None, float(dropout_p), M, N, K, x.stride(0),
                ACTIVATION=activation, EXACT=x.dtype == torch.float32, DROPOUT=dropout_p > 0, **tile.options())
    return y, h


def linear_dact(dy, w, h, b=None, *, activation="gelu", want_post=False, want_db=True, tile=None):
    """(dh, post, db): dh = (dy w) * act'(h + b) (M, N) in dy's dtype, post = act(h + b), db = dh summed over rows, fp32 (N,).

    dy (M, K), any row stride; w (K, N); h (M, N); b (N,), or None where h includes its bias. What isn't wanted is None.
    Raises ValueError, TypeError.
    """
    M, K = dy.shape
    N = w.shape[1]
    _check_act(dy, activation, 0.0, None)
    _check("dy", dy, (M, K), dy, row_stride_free=True)
    _check("w", w, (K, N), dy)
    _check("h", h, (M, N), dy)
    if b is not None:
        _check("b", b, (N,), dy, DTYPES)
    tile = tile or tile_for("backward", dy, M, N)
    tiles_m = -(-M // tile.BLOCK_M)
    dh = torch.empty_like(h)
    post = torch.empty_like(h) if want_post else None
    partial = torch.empty(tiles_m, N, dtype=torch.float32, device=dy.device) if want_db else None
    if dh.numel():
        with torch.cuda.device_of(dy):
            _linear_dact_kernel[(tiles_m * -(-N // tile.BLOCK_N),)](
                dy, w, h, b, dh, post, partial, M, N, K, dy.stride(0),
                ACTIVATION=activation, EXACT=dy.dtype == torch.float32, **tile.options())
    return dh, post, partial.sum(0) if want_db else None


def act(h, b=None, *, activation="gelu", dropout_p=0.0, seed=None):
    """dropout(act(h + b)) (M, N) in h's dtype. h (M, N); b (N,) of any float dtype or None. Arguments as for linear_act."""
    M, N = h.shape
    _check_act(h, activation, dropout_p, seed)
    _check("h", h, (M, N), h)
    if b is not None:
        _check("b", b, (N,), h, DTYPES)
    y = torch.empty_like(h)
    block_m, block_n, warps = POINTWISE_TILE
    if y.numel():
        with torch.cuda.device_of(h):
            _act_kernel[(-(-M // block_m) * -(-N // block_n),)](
                h, b, y, seed if dropout_p > 0 else None, float(dropout_p), M, N, ACTIVATION=activation,
                EXACT=h.dtype == torch.float32, DROPOUT=dropout_p > 0, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps)
    return y


def dact(dy, h=None, b=None, *, activation="gelu", dropout_p=0.0, seed=None, want_dh=True, want_post=False, want_db=True,
         rows=None):
    """The backward of `act`: (dh, post, db) as linear_dact returns them, from dy (M, N) instead of a matmul's result.

    h (M, N), or None where activation is "none", which has no post. want_dh=False computes only the sum over rows. rows: a
    program's, for tests. Raises ValueError, TypeError.
    """
    M, N = dy.shape
    _check_act(dy, activation, dropout_p, seed)
    _check("dy", dy, (M, N), dy)
    if (h is None) != (activation == "none"):
        raise ValueError(f"activation is {activation!r} and h is {h if h is None else tuple(h.shape)}; "
                         "expected no h for 'none', and h for every other")
    if h is not None:
        _check("h", h, (M, N), dy)
    elif want_post:
        raise ValueError("want_post needs h; got None")
    if b is not None:
        _check("b", b, (N,), dy, DTYPES)
    block_m, block_n, warps = POINTWISE_TILE
    tiles_n = -(-N // block_n)
    rows = rows or rows_per_program(M, tiles_n)
    groups = -(-M // rows)
    dh = torch.empty_like(dy) if want_dh else None
    post = torch.empty_like(dy) if want_post else None
    partial = torch.empty(groups, N, dtype=torch.float32, device=dy.device) if want_db else None
    if dy.numel() and (want_dh or want_post or want_db):
        with torch.cuda.device_of(dy):
            _dact_kernel[(groups * tiles_n,)](
                dy, h, b if h is not None else None, dh, post, partial, seed if dropout_p > 0 else None, float(dropout_p), M, N,
                rows,
                ACTIVATION=activation, EXACT=dy.dtype == torch.float32, DROPOUT=dropout_p > 0,
                BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps)
    return dh, post, partial.sum(0) if want_db else None
