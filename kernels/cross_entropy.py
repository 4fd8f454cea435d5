"""Linear cross-entropy: the loss of a vocabulary head and its gradients, without a matrix of probabilities.

    logits    = x W^T                                            x (N, C), W (V, C), logits (N, V)
    loss_i    = log sum_j exp(logits_ij) - logits_i,target(i)    0 where target(i) is ignore_index
    dlogits   = softmax(logits) - onehot(target)                 0 in the rows that are ignored
    dx        = scale * dlogits W                                scale = (gradient of the loss) / (rows that are not ignored)
    dW        = scale * dlogits^T x

Plain PyTorch under autocast writes the logits in half precision, a copy in fp32, the fp32 log-softmax, its fp32 gradient and the
half-precision gradient: 16 bytes and more for each of N * V elements, 53 GB at 64 x 1024 tokens and V = 50,304. Here the logits
stay in half precision, and a row is read from memory once for its maximum and its sum, and again, out of the cache, for its
gradient. cuBLAS does the three matmuls: fusing into them would save no memory traffic.

There are two paths with the same arithmetic:

    forward_backward    without materialising all logits. For each chunk: logits into one buffer, loss and dlogits in place, and
                        at once dx = dlogits W and dW += dlogits^T x, since computing the logits again later would cost another
                        matmul. Between forward and backward only dx and dW are kept, both in fp32: 201 and 155 MB at 64 x 1024
                        tokens, C = 768, V = 50,304.
    forward, backward   for a caller that wants the logits. They are written once and never changed; the forward keeps each row's
                        maximum and log-sum, and the backward computes dlogits from these in a chunk buffer. Computing dlogits in
                        the forward would save one read of the logits (6.6 GB, 1.5 ms on an H200), but a gradient of the logits
                        could then not be added without two more matmuls (15 ms). A compiled graph always passes such a gradient,
                        zeros if the logits are unused.

dlogits are stored unscaled: in training 1/N of a probability is 1e-10, and the smallest fp16 is 6e-8. The scale is applied in fp32
to the finished sums; only where the gradient of the logits has to be added is it applied to dlogits. Until then the sums stay in
fp32, so they are rounded once. A bf16 sum has one of 128 mantissas; multiplied by a constant and rounded again, it would get a
mean error: 3e-4 of dx at N = 7,021 and 2e-3 at 513.

Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", sections 2 and 3; the chunks are from Hsu et al.
2024, "Liger Kernel", section 3.2, but larger, see `chunk_rows`.
"""
import torch
import triton
import triton.language as tl

from . import fastest
from .host import DTYPES

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e38)  # instead of -inf, since -inf - -inf is nan and fp16 logits can overflow to -inf


@triton.jit
def _online(tile, maximum, total):
    """Update the running maximum, a scalar, and the sums of exp(logit - maximum), [BLOCK_V], with a tile [BLOCK_V]."""
    new_maximum = tl.maximum(maximum, tl.max(tile, axis=0))
    rescale = tl.exp2((maximum - new_maximum) * LOG2_E)
    return new_maximum, total * rescale + tl.exp2((tile - new_maximum) * LOG2_E)


@triton.jit
def _gradient(tile, cols, maximum, factor, hot):
    """softmax - onehot of a tile [BLOCK_V]. factor: 1 / sum; hot: the target's column, -1 for none."""
    p = tl.exp2((tile - maximum) * LOG2_E) * factor
    return tl.where(cols == hot, p - 1.0, p)


@triton.jit
def _loss_kernel(logits_ptr,            # (rows, V), rows apart by stride; with GRADIENT overwritten by dlogits
                 targets_ptr,           # (rows,) int64
                 losses_ptr,            # (rows,) fp32
                 maxima_ptr,            # (rows,) fp32, or None with GRADIENT
                 log_sums_ptr,          # (rows,) fp32, or None with GRADIENT: log sum_j exp(logits_ij - maximum_i)
                 V, stride, ignore_index,
                 GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr):
    """One row of `F.cross_entropy(logits, targets, reduction="none")`, the loss of `reference.linear_cross_entropy`.

    With GRADIENT, also the gradient of its logits.
    """
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * stride exceeds 2^31
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    counts = target != ignore_index
    inside = (target >= 0) & (target < V)
    target_logit = tl.load(logits_ptr + target, mask=inside, other=0.0).to(tl.float32)
    block = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V  # tiles without a mask; the remaining columns are the tail

    maximum = LOWEST
    total = tl.zeros([BLOCK_V], tl.float32)  # summed at the end only: each tile then needs one reduction instead of two
    for i in range(full):
        tile = tl.load(logits_ptr + i * BLOCK_V + block, eviction_policy="evict_last").to(tl.float32)
        maximum, total = _online(tile, maximum, total)
    tail = full * BLOCK_V + block
    tail_tile = tl.load(logits_ptr + tail, mask=tail < V, other=float("-inf")).to(tl.float32)
    maximum, total = _online(tail_tile, maximum, total)
    total = tl.sum(total, axis=0)

    # A kernel can't raise for a target outside of the vocabulary, so its loss is nan. maximum - target_logit is computed first:
    # added to logits of 1e4, the log-sum would be rounded to 1e-3.
    log_sum = tl.log(total)
    loss = tl.where(inside, (maximum - target_logit) + log_sum, float("nan"))
    tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        factor = tl.where(counts, tl.where(inside, 1.0 / total, float("nan")), 0.0)
        hot = tl.where(counts, target, -1)
        tl.debug_barrier()  # every thread reads target_logit before any thread overwrites it
        tail_tile = _gradient(tail_tile, tail, maximum, factor, hot)
        tl.store(logits_ptr + tail, tail_tile.to(logits_ptr.dtype.element_ty), mask=tail < V)
        for i in range(full):  # backwards: the tiles read last are still in the L1 cache, which holds a row of 100 KB
            cols = (full - 1 - i) * BLOCK_V + block
            tile = tl.load(logits_ptr + cols).to(tl.float32)
            dlogits = _gradient(tile, cols, maximum, factor, hot)
            tl.store(logits_ptr + cols, dlogits.to(logits_ptr.dtype.element_ty))
    else:
        tl.store(maxima_ptr + row, maximum)
        tl.store(log_sums_ptr + row, log_sum)


@triton.jit
def _dlogits_kernel(logits_ptr,         # (rows, V), rows apart by stride
                    targets_ptr,        # (rows,) int64
                    maxima_ptr,         # (rows,) fp32
                    log_sums_ptr,       # (rows,) fp32
                    grad_logits_ptr,    # (rows, V), rows apart by stride_grad: the gradient of the logits; or None
                    scale_ptr,          # fp32 scalar, applied where grad_logits is added; or None
                    dlogits_ptr,        # (rows, V), rows apart by stride_out
                    V, stride, stride_grad, stride_out, ignore_index,
                    ADD: tl.constexpr, BLOCK_V: tl.constexpr):
    """One row of the gradient of the logits of `reference.linear_cross_entropy`, from what `_loss_kernel` kept."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    dlogits_ptr += row * stride_out
    if ADD:
        grad_logits_ptr += row * stride_grad
        scale = tl.load(scale_ptr)
    target = tl.load(targets_ptr + row)
    counts = target != ignore_index
    inside = (target >= 0) & (target < V)
    maximum = tl.load(maxima_ptr + row)
    factor = tl.exp2(-tl.load(log_sums_ptr + row) * LOG2_E)
    factor = tl.where(counts, tl.where(inside, factor, float("nan")), 0.0)
    hot = tl.where(counts, target, -1)
    block = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V

    for i in range(full):  # tiles without a mask
        cols = i * BLOCK_V + block
        tile = tl.load(logits_ptr + cols).to(tl.float32)
        dlogits = _gradient(tile, cols, maximum, factor, hot)
        if ADD:
            dlogits = dlogits * scale + tl.load(grad_logits_ptr + cols).to(tl.float32)
        tl.store(dlogits_ptr + cols, dlogits.to(dlogits_ptr.dtype.element_ty))
    cols = full * BLOCK_V + block
    tile = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    dlogits = _gradient(tile, cols, maximum, factor, hot)
    if ADD:
        dlogits = dlogits * scale + tl.load(grad_logits_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    tl.store(dlogits_ptr + cols, dlogits.to(dlogits_ptr.dtype.element_ty), mask=cols < V)


# How the rows of "cross_entropy tile" in fastest.json were chosen, for every architecture: one program reads one row, and shared memory
# holds only the reductions. 16 columns a thread are two 16-byte loads in flight, 32 KB a multiprocessor with two blocks: its share of the
# bandwidth (36 GB/s) times the latency (0.8 us). With two blocks of 16 warps, and no more, their two rows of 100 KB fit the L1 cache,
# and all rows in flight fit the L2 cache (26 of 50 MB), so that the second read costs no memory traffic.


def tile(V, device):
    """The Tile of the loss kernels for V columns; BLOCK_N columns at a time."""
    return fastest.tile("cross_entropy tile", device, size=V)


def chunk_rows(N, V, itemsize, device):
    """Rows per chunk of N rows of V logits: where the table has no number, at most 4 chunks, none under 4,096 rows, and no more than
    chunks of half a gigabyte need.

    All chunks are equally long but the last, which may be a few rows shorter. With fewer rows the matmuls use the GPU poorly. More
    chunks take less memory, but each reads and writes dW in fp32 once more: 8 V C bytes, 309 MB at V = 50,304, C = 768. On an H100,
    loss and gradients of 64 x 1024 tokens took 28.9, 28.0, 27.0, 26.9 and 27.0 ms in 16, 8, 4, 2 and 1 chunks; with 4, a quarter of
    the logits exists at a time, 1.6 GB.
    """
    row = fastest.find("cross_entropy chunks", device, size=V, tokens=N)
    chunks = min(4, N // 4096, -(-N * V * itemsize // 2**29)) if row is None else int(row.use)
    return -(-N // max(1, chunks))


def empty_logits(rows, V, like):
    """(rows, V) whose rows start at multiples of 16 elements; contiguous where V is a multiple of 16.

    So loads are wide, and cuBLAS uses its fast kernels, for an odd V too (GPT-2's own is 50,257).
    """
    logits = torch.empty(rows, (V + 15) // 16 * 16, dtype=like.dtype, device=like.device)
    if logits.size(1) > V:  # oneDNN's bf16 matmul multiplies the padding by zero, so it must not hold nan
        logits[:, V:] = 0
    return logits[:, :V]


def check(x, weight, targets):
    """Raise TypeError or ValueError unless x (N, C), weight (V, C) share a dtype, targets (N,) are int64, all on one device."""
    if x.dim() != 2 or weight.dim() != 2 or x.size(1) != weight.size(1):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected (N, C) and (V, C)")
    if x.dtype != weight.dtype or x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype} and weight is {weight.dtype}: expected both float32, both float16 or both bfloat16")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}: expected int64")
    if targets.shape != x.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)}: expected ({x.size(0)},), one a row of x")
    if not targets.is_contiguous():
        raise ValueError(f"targets have stride {targets.stride(0)}; make them contiguous first")
    if not x.device == weight.device == targets.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}, targets on {targets.device}: expected one device")


def check_range(targets, V, ignore_index):
    """Raise IndexError for a target outside of the vocabulary, on a CPU. On a GPU the check would synchronise; the loss is nan."""
    if targets.device.type == "cpu":
        outside = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
        if outside.any():
            raise IndexError(f"Target {targets[outside][0].item()} is out of bounds: expected 0 to {V - 1}, or {ignore_index} "
                             "for a row to ignore")


def row_losses(logits, targets, ignore_index, *, gradient, out=None):
    """One launch: losses (rows,) fp32 of logits (rows, V), with the last stride 1, and targets (rows,). out: where the losses go, or None.

    gradient: True overwrites logits with dlogits, unscaled, and returns (losses, None, None). False keeps them and returns (losses,
    maxima, log_sums), each (rows,) fp32. maximum + log_sum is the log-sum-exp; they are kept separate because near 1e4 fp32 holds
    their sum to 1e-3 only. A target outside of the vocabulary makes its loss, and its row of dlogits, nan.
    """
    rows, V = logits.shape
    losses, maxima, log_sums = (torch.empty(rows, dtype=torch.float32, device=logits.device) if wanted else None
                                for wanted in (out is None, not gradient, not gradient))
    losses = losses if out is None else out
    if rows:
        shape = tile(V, logits.get_device())
        with torch.cuda.device_of(logits):
            _loss_kernel[(rows,)](logits, targets, losses, maxima, log_sums, V, logits.stride(0), ignore_index,
                                  GRADIENT=gradient, BLOCK_V=shape.BLOCK_N, num_warps=shape.num_warps)
    return losses, maxima, log_sums


def row_gradients(logits, targets, maxima, log_sums, ignore_index, out, grad_logits=None, scale=None):
    """One launch: out (rows, V) = dlogits, unscaled; with grad_logits (rows, V), scale * dlogits + grad_logits.

    All matrices with the last stride 1; scale a scalar fp32 tensor.
    """
    rows, V = logits.shape
    if rows:
        shape = tile(V, logits.get_device())
        with torch.cuda.device_of(logits):
            _dlogits_kernel[(rows,)](logits, targets, maxima, log_sums, grad_logits, scale, out,
                                     V, logits.stride(0), 0 if grad_logits is None else grad_logits.stride(0), out.stride(0),
                                     ignore_index, ADD=grad_logits is not None, BLOCK_V=shape.BLOCK_N, num_warps=shape.num_warps)


def product(a, b, out):
    """out (M, N) = a (M, K) b (K, N). out: the dtype of a and b, or fp32, which keeps the sums of half-precision products unrounded."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # as in `add_dw`
        out.zero_()
        for k in range(0, a.size(1), 1024):
            out.addmm_(a[:, k:k + 1024].float(), b[k:k + 1024].float())


def add_dw(dw, dlogits, x, first):
    """dw (V, C) fp32 += dlogits^T (V, rows) x (rows, C), summed in fp32; first=True overwrites dw."""
    if dw.is_cuda:
        if first:
            torch.mm(dlogits.t(), x, out_dtype=torch.float32, out=dw)
        else:
            torch.addmm(dw, dlogits.t(), x, out_dtype=torch.float32, out=dw)
        return
    x = x.float()  # CPU matmuls don't write fp32 from half precision; 1,024 columns at a time avoid an fp32 (rows, V)
    for v in range(0, dw.size(0), 1024):
        part = dw[v:v + 1024]
        torch.addmm(part, dlogits[:, v:v + 1024].t().float(), x, beta=0 if first else 1, out=part)


def scaled(gradient, scale, dtype):
    """gradient * scale, computed in fp32 and rounded once, to dtype. scale: a scalar fp32 tensor."""
    return torch.mul(gradient, scale.view(1), out=torch.empty_like(gradient, dtype=dtype))


def forward_backward(x, weight, targets, ignore_index, need_dx, need_dw):
    """The losses and the gradients of their sum; only one chunk of the logits exists at a time.

    x (N, C) and weight (V, C) of one dtype: float32, float16 or bfloat16; targets (N,) int64.
    Returns losses (N,) fp32; dx (N, C) fp32, or empty (0,) unless need_dx; dW (V, C) fp32, or empty (0,) unless need_dw. The caller
    keeps dx until its scale is known: fp32 takes 100 MB more than half precision at 64 x 1024 tokens, C = 768. Raises TypeError,
    ValueError; IndexError for a target outside of the vocabulary on a CPU.
    """
    check(x, weight, targets)
    check_range(targets, weight.size(0), ignore_index)
    (N, C), V = x.shape, weight.size(0)
    rows = chunk_rows(N, V, x.itemsize, x.get_device())
    buffer = empty_logits(min(rows, N), V, x)
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    dx = torch.empty(N if need_dx else 0, *(C,) * need_dx, dtype=torch.float32, device=x.device)
    dw = torch.empty(V if need_dw else 0, *(C,) * need_dw, dtype=torch.float32, device=x.device)
    if N == 0:
        dw.zero_()
    for n in range(0, N, max(rows, 1)):
        x_chunk, target_chunk = x[n:n + rows], targets[n:n + rows]
        logits = buffer[:x_chunk.size(0)]
        torch.mm(x_chunk, weight.t(), out=logits)
        row_losses(logits, target_chunk, ignore_index, gradient=need_dx or need_dw, out=losses[n:n + rows])
        if need_dx:
            product(logits, weight, dx[n:n + rows])  # logits now holds dlogits
        if need_dw:
            add_dw(dw, logits, x_chunk, first=n == 0)
    return losses, dx, dw


def forward(x, weight, targets, ignore_index):
    """Losses (N,) fp32; logits (N, V) in x's dtype, rows padded to 16; maxima and log-sums (N,) fp32 for `backward`."""
    check(x, weight, targets)
    check_range(targets, weight.size(0), ignore_index)
    logits = empty_logits(x.size(0), weight.size(0), x)
    torch.mm(x, weight.t(), out=logits)
    losses, maxima, log_sums = row_losses(logits, targets, ignore_index, gradient=False)
    return losses, logits, maxima, log_sums


def backward(logits, maxima, log_sums, x, weight, targets, scale, grad_logits, ignore_index, need_dx, need_dw):
    """The gradients of scale * sum(losses) + sum(grad_logits * logits).

    logits, maxima, log_sums: as `forward` returned them. scale: a scalar fp32 tensor. grad_logits (N, V) in the logits' dtype, any
    strides, or None. Returns dx (N, C) in x's dtype, or empty (0,); dW (V, C) fp32, or empty (0,).
    """
    check(x, weight, targets)
    (N, C), V = x.shape, weight.size(0)
    rows = chunk_rows(N, V, x.itemsize, x.get_device())
    dlogits = empty_logits(min(rows, N), V, x)
    sums = torch.empty(min(rows, N), C, dtype=torch.float32, device=x.device) if need_dx and grad_logits is None else None
    dx = torch.empty(N if need_dx else 0, *(C,) * need_dx, dtype=x.dtype, device=x.device)
    dw = torch.empty(V if need_dw else 0, *(C,) * need_dw, dtype=torch.float32, device=x.device)
    if N == 0:
        dw.zero_()
    for n in range(0, N, max(rows, 1)):
        part = slice(n, n + rows)
        out = dlogits[:min(rows, N - n)]
        grad_chunk = None if grad_logits is None else grad_logits[part]
        if grad_chunk is not None and grad_chunk.stride(1) != 1:
            grad_chunk = grad_chunk.contiguous()
        row_gradients(logits[part], targets[part], maxima[part], log_sums[part], ignore_index, out, grad_chunk, scale)
        if sums is not None:
            product(out, weight, sums[:out.size(0)])
            torch.mul(sums[:out.size(0)], scale, out=dx[part])
        elif need_dx:
            torch.mm(out, weight, out=dx[part])
        if need_dw:
            add_dw(dw, out, x[part], first=n == 0)
    if grad_logits is None:
        dw.mul_(scale)
    return dx, dw
