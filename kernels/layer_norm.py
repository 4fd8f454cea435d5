"""Residual add, dropout on the added branch and LayerNorm in one kernel; the backward of all three in another.

    s = x + dropout(branch)                                   the residual stream, in x's dtype
    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias    over the last dimension, biased variance

Backward, where dy and ds are the gradients of y and s, n is the normalised row, and g = dy * weight:

    dx      = ds + rstd * (g - mean(g) - n * mean(g * n))
    dbranch = dropout'(dx), in branch's dtype
    dweight = sum over rows of dy * n,   dbias = sum over rows of dy

Why one kernel: with a float32 stream and bfloat16 branch and y, as under autocast, the forward moves 12 bytes per element: it
reads x 4 and branch 2, and writes s 4 and y 2. As separate operators, PyTorch's add reads 4 + 2 and writes 4, its LayerNorm reads
4 and writes 4, and the cast for the next matmul reads 4 and writes 2: 24. Dropout adds a mask that is written and read again, and
another read and write of the branch. The backward moves 16 bytes (reads s 4, dy 2, ds 4; writes dx 4, dbranch 2). Separate
operators move 40: the cast 2 + 4; LayerNorm reads dy 4 and s 4 and writes 4 for dx, and reads 8 again for the weights' gradients;
the add of ds 8 + 4; the cast 4 + 2.

A row stays in registers between the passes, so the variance is computed from centred values: E[x^2] - E[x]^2 has no correct digit
at a mean of 1e4. A second pass subtracts the mean of the residuals, since fp32 holds a mean of 1e4 to 5e-4 only.

dweight and dbias: each program of the backward loops over many rows and keeps fp32 sums of its own, and a second kernel adds these
in a fixed order. There are no atomics, so the bits are the same in every run.

Sources: Ba, Kiros, Hinton, "Layer normalization", 2016. Chan, Golub, LeVeque, "Algorithms for computing the sample
variance", 1983 (the corrected two-pass form).

Shapes: N rows of C elements; x, branch, s, y and their gradients (N, C); weight, bias (C,); statistics (2, N) fp32: the means,
then the reciprocal standard deviations.
"""
import torch
import triton
import triton.language as tl

from . import fastest
from .dropout import checked_seed, keep_rows, keep_scale
from .host import DTYPES, elsewhere, multiprocessors, padded

MAX_C = 8192


# ---------------------------------------------------------------------------------------------------------------------------
# Kernels. Where a pointer is None, the kernel skips that part of the work.
# ---------------------------------------------------------------------------------------------------------------------------


@triton.jit
def row_mean(x, C, axis: tl.constexpr):
    """The mean over `axis` of C elements: their sum, divided with IEEE rounding.

    A GPU's `/` is off by up to 2 units in the last place. A row of one element would then not centre to 0, and rstd, 316 at eps
    1e-5, would magnify the difference.
    """
    return tl.div_rn(tl.sum(x, axis), tl.cast(C, tl.float32))


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(
        x_ptr, branch_ptr, weight_ptr, bias_ptr, seed_ptr,      # (N, C), (N, C) or None, (C,), (C,) or None, (1,) or None
        s_ptr, y_ptr, statistics_ptr,                           # (N, C) or None without a branch, (N, C), (2, N): mean and rstd
        n_rows, C, p, eps, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """ROWS rows of `reference.add_layer_norm`; with branch_ptr None, of `reference.layer_norm`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)                    # 64 bits: N * C may exceed 2^31
    columns = tl.arange(0, BLOCK_C)
    inside = (rows < n_rows)[:, None] & (columns < C)[None, :]                          # [ROWS, BLOCK_C]
    offsets = rows[:, None] * C + columns[None, :]

    s = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            branch = tl.where(keep_rows(tl.load(seed_ptr), rows, p, BLOCK_C), branch * keep_scale(p), 0.0)
        stored = (s + branch).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + offsets, stored, mask=inside)
        s = stored.to(tl.float32)                                                       # what the backward will read

    mean = row_mean(s, C, 1)                                                            # [ROWS]
    centred = tl.where(inside, s - mean[:, None], 0.0)
    correction = row_mean(centred, C, 1)
    centred = tl.where(inside, centred - correction[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(row_mean(centred * centred, C, 1) + eps)

    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    y = centred * rstd[:, None] * weight
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(statistics_ptr + rows, mean + correction, mask=rows < n_rows)
    tl.store(statistics_ptr + n_rows + rows, rstd, mask=rows < n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
        dy_ptr, ds_ptr, s_ptr,                                  # (N, C), (N, C) or None, (N, C)
        weight_ptr, statistics_ptr, seed_ptr,                   # (C,), (2, N), (1,) or None
        dx_ptr, dbranch_ptr, dweight_ptr, dbias_ptr,            # (N, C), (N, C) or None, (programs, C) fp32 or None, the same
        n_rows, C, p, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The gradients of `reference.add_layer_norm` or `layer_norm`; of weight and bias, this program's partial sums."""
    columns = tl.arange(0, BLOCK_C)
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)                                     # this program's share of the sums
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    per_column = tl.div_rn(1.0, tl.cast(C, tl.float32))     # for means; exact at C=1. `row_mean` in the loop would spill 24 bytes

    for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (columns < C)[None, :]                      # [ROWS, BLOCK_C]
        offsets = rows[:, None] * C + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + rows, mask=rows < n_rows, other=0.0)            # [ROWS]
        rstd = tl.load(statistics_ptr + n_rows + rows, mask=rows < n_rows, other=0.0)

        # Loaded again for each row, from the L1 cache: kept in registers, it would cause spills.
        weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
        n = tl.where(inside, (s - mean[:, None]) * rstd[:, None], 0.0)
        g = dy * weight
        dx = rstd[:, None] * (g - (tl.sum(g, 1) * per_column)[:, None] - n * (tl.sum(g * n, 1) * per_column)[:, None])
        if ds_ptr is not None:
            dx += tl.load(ds_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dbranch_ptr is not None:
            if seed_ptr is not None:
                dx = tl.where(keep_rows(tl.load(seed_ptr), rows, p, BLOCK_C), dx * keep_scale(p), 0.0)
            tl.store(dbranch_ptr + offsets, dx.to(dbranch_ptr.dtype.element_ty), mask=inside)
        dweight += dy * n
        dbias += dy

    partial = tl.program_id(0).to(tl.int64) * C + columns
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=columns < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=columns < C)


@triton.jit(do_not_specialize=["n_partials"])
def _sum_partials_kernel(
        dweight_partial_ptr, dbias_partial_ptr,                 # (partials, C) fp32 or None
        dweight_ptr, dbias_ptr,                                 # (C,) or None
        n_partials, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """dweight and dbias of `reference.layer_norm`: the sums of the backward's partial sums, in a fixed order."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for first in range(0, n_partials, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < n_partials)[:, None] & (columns < C)[None, :]
        offsets = rows[:, None] * C + columns[None, :]
        if dweight_partial_ptr is not None:
            dweight += tl.load(dweight_partial_ptr + offsets, mask=inside, other=0.0)
        if dbias_partial_ptr is not None:
            dbias += tl.load(dbias_partial_ptr + offsets, mask=inside, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + columns, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=columns < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + columns, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=columns < C)


@triton.jit(do_not_specialize=["n_rows"])
def _drop_kernel(ds_ptr, seed_ptr, dbranch_ptr, n_rows, C, p, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """dbranch of `reference.add_layer_norm` where y has no gradient: ds, with the forward's dropout mask applied."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows < n_rows)[:, None] & (columns < C)[None, :]
    offsets = rows[:, None] * C + columns[None, :]
    ds = tl.load(ds_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    ds = tl.where(keep_rows(tl.load(seed_ptr), rows, p, BLOCK_C), ds * keep_scale(p), 0.0)
    tl.store(dbranch_ptr + offsets, ds.to(dbranch_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------------


# How the rows of "layer_norm forward tile" and "layer_norm backward tile" in fastest.json were chosen: rows and warps of a program, by the
# power of two that holds a row, the same for sm_80 to sm_100, since these kernels are bound by memory bandwidth. From what the gate
# reports, not yet by timing.
# Forward: 32 elements a thread. A row of 1,024 then lies in one warp, whose sums are shuffles without a barrier, and 72 registers
# leave room for 28 such programs on a multiprocessor: 130 KB of loads in flight, where 5 TB/s at a latency of 0.7 us need 27 KB.
# Short rows share a tile, so that a warp has 1,024 elements to load.
# Backward: 16 elements a thread, since each holds the running sums of dweight and dbias beside its row. From 1,024 on, registers are
# capped at 128, so that all programs are resident at once. With Triton 3.6 and dropout, 8 bytes spill.

# Programs of the backward, per multiprocessor: each has a row in flight and keeps (C,) fp32 sums. Eight rows of 768 are 60 KB in
# flight, twice what the bandwidth needs; more programs would only write more partial sums (132 * 8 of them are 0.8 % of the
# traffic). From 4 warps on, the registers hold 16 warps, and the rows are longer.
PROGRAMS_PER_MULTIPROCESSOR = {1: 8, 2: 8, 4: 4, 8: 2, 16: 1}  # by warps
BACKWARD_REGISTERS = 128
SUM_ROWS, SUM_COLUMNS = 64, 16  # 16 fp32 of a row are two sectors of 32 bytes, and C=768 makes 48 programs
SUM_CONSTANTS = {"ROWS": SUM_ROWS, "BLOCK_C": SUM_COLUMNS, "num_warps": 4}


def tile_for(pass_, C, device, N):
    """The Tile of a pass ("forward", "backward") over N rows of C: BLOCK_M rows a program."""
    return fastest.tile(f"layer_norm {pass_} tile", device, size=C, tokens=N)


def constants(C, tile):
    """The constants that both passes take from their tile."""
    return {"ROWS": tile.BLOCK_M, "BLOCK_C": padded(C), "num_warps": tile.num_warps}


@fastest.cached
def _forward_program(C, device, N):
    """(rows of a program, the kernel's constants) for N rows of C on a GPU; device=-1 is the interpreter."""
    tile = tile_for("forward", C, device, N)
    return tile.BLOCK_M, constants(C, tile)


@fastest.cached
def _backward_program(C, device, N):
    """(rows of a tile, most programs, the kernel's constants), likewise."""
    tile = tile_for("backward", C, device, N)
    most = PROGRAMS_PER_MULTIPROCESSOR[tile.num_warps] * multiprocessors(device)
    return tile.BLOCK_M, most, constants(C, tile) | backward_options(tile)


def backward_options(tile):
    return {"maxnreg": BACKWARD_REGISTERS} if tile.num_warps > 1 else {}


# ---------------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------------


def forward(x, branch, weight, bias, *, eps=1e-5, p=0.0, seed=None, y_dtype=None):
    """(s, y, statistics) of s = x + dropout(branch, p), y = layer_norm(s). Without a branch s would be x, and None is returned.

    x (..., C); branch of x's shape or None; weight (C,); bias (C,) or None; each fp32, fp16 or bf16, contiguous. seed: int64 (1,),
    where p > 0. s has x's dtype, y has y_dtype (default x's); statistics (2, N) fp32: mean and rstd of the N rows.
    Raises ValueError, TypeError.
    """
    _check(x.shape[-1], x=x, branch=branch, weight=weight, bias=bias)
    seed = checked_seed(seed, p, x) if branch is not None else None
    return launch_forward(x, branch, weight, bias, seed, p, eps, y_dtype)


def launch_forward(x, branch, weight, bias, seed, p, eps, y_dtype):
    """`forward` for a caller that has checked its arguments: a second check takes a fifth of an op's host time."""
    if elsewhere(x):
        with torch.cuda.device_of(x):
            return launch_forward(x, branch, weight, bias, seed, p, eps, y_dtype)
    C = weight.numel()
    N = x.numel() // C
    s = None if branch is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=y_dtype)
    statistics = x.new_empty(2, N, dtype=torch.float32)
    if N > 0:
        rows, options = _forward_program(C, x.get_device(), N)
        _forward_kernel[(-(-N // rows), )](x, branch, weight, bias, seed, s, y, statistics, N, C, p, eps, **options)
    return s, y, statistics


def backward(dy, ds, s, weight, statistics, *, p=0.0, seed=None, branch_dtype=None, dweight_dtype=None, dbias_dtype=None):
    """(dx, dbranch, dweight, dbias). dy (..., C): y's gradient; ds the same or None: s's gradient; the rest as `forward` returned it.

    branch_dtype: the dtype of dbranch, None where there was no branch. dbranch is also None where it equals dx: the same dtype and
    no dropout. dweight_dtype, dbias_dtype: the dtype of that gradient, None where it is not wanted. Raises ValueError, TypeError.
    """
    _check(s.shape[-1], s=s, dy=dy, ds=ds, weight=weight)
    seed = checked_seed(seed, p, s) if branch_dtype is not None else None
    return launch_backward(dy, ds, s, weight, statistics, seed, p, branch_dtype, dweight_dtype, dbias_dtype)


def launch_backward(dy, ds, s, weight, statistics, seed, p, branch_dtype, dweight_dtype, dbias_dtype):
    """`backward` for a caller that has checked its arguments."""
    if elsewhere(s):
        with torch.cuda.device_of(s):
            return launch_backward(dy, ds, s, weight, statistics, seed, p, branch_dtype, dweight_dtype, dbias_dtype)
    C, device = weight.numel(), s.device
    N = s.numel() // C
    dx, dbranch = torch.empty_like(s), None
    if branch_dtype is not None and (seed is not None or branch_dtype != s.dtype):
        dbranch = torch.empty_like(s, dtype=branch_dtype)
    rows, most, options = _backward_program(C, s.get_device(), N)
    programs = min(most, -(-N // rows))
    dweight_partial = dbias_partial = dweight = dbias = None
    if dweight_dtype:
        dweight_partial = statistics.new_empty(programs, C)      # in half the time of torch.empty with a dtype and a device
        dweight = torch.empty(C, dtype=dweight_dtype, device=device)
    if dbias_dtype:
        dbias_partial = statistics.new_empty(programs, C)
        dbias = torch.empty(C, dtype=dbias_dtype, device=device)
    if N > 0:
        _backward_kernel[(programs, )](dy, ds, s, weight, statistics, seed, dx, dbranch, dweight_partial, dbias_partial, N, C, p,
                                       **options)
    if dweight_dtype or dbias_dtype:  # without rows too: the gradients are then 0
        _sum_partials_kernel[(-(-C // SUM_COLUMNS), )](dweight_partial, dbias_partial, dweight, dbias, programs, C, **SUM_CONSTANTS)
    return dx, dbranch, dweight, dbias


def drop(ds, *, p, seed, branch_dtype):
    """dbranch where y has no gradient: the gradient ds (..., C) of s, with the forward's dropout mask applied."""
    if elsewhere(ds):
        with torch.cuda.device_of(ds):
            return drop(ds, p=p, seed=seed, branch_dtype=branch_dtype)
    C = ds.shape[-1]
    _check(C, ds=ds)
    seed = checked_seed(seed, p, ds)
    N = ds.numel() // C
    dbranch = torch.empty_like(ds, dtype=branch_dtype)
    if N > 0:
        rows, options = _forward_program(C, ds.get_device(), N)
        _drop_kernel[(-(-N // rows), )](ds, seed, dbranch, N, C, p, **options)
    return dbranch


VECTORS = ("weight", "bias")


def _check(C, **tensors):
    """Raise unless all tensors are fp32, fp16 or bf16, contiguous, on one device, and have the first one's shape or (C,)."""
    first = next(iter(tensors.values()))
    if not 1 <= C <= MAX_C:
        raise ValueError(f"{next(iter(tensors))} has rows of {C} elements; expected 1 to {MAX_C}")
    shape, device = first.shape, first.device
    for name, tensor in tensors.items():
        if tensor is not None and not (tensor.dtype in DTYPES and tensor.device == device and tensor.is_contiguous()
                                       and tensor.shape == ((C, ) if name in VECTORS else shape)):
            _raise_what_is_wrong(name, tensor, (C, ) if name in VECTORS else tuple(shape), device)


def _raise_what_is_wrong(name, tensor, shape, device):
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}; expected float32, float16 or bfloat16")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, where the first argument is")
    if tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}; expected {shape}")
    raise ValueError(f"{name} has strides {tensor.stride()} at shape {tuple(tensor.shape)}; call .contiguous()")
