"""The end of a training step in one pass over memory: clipping's factor, AdamW, and the weights' half-precision copies.

    g = factor gradient
    m = beta1 m + (1 - beta1) g                 v = beta2 v + (1 - beta2) g^2
    w = (1 - lr decay) w  -  lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)             copy = w, rounded

Why one kernel: each pass is bound by memory. PyTorch's fused AdamW reads w, g, m, v and writes w, m, v, and the clipped g: 32 bytes for each
number; the cast of a matrix reads 4 and writes 2: 38. In one pass they are 30: g is scaled in registers and not written back, and w is rounded
while it is there.

The tensors of a model lie anywhere. So the kernel is given a table of their addresses and numbers, one row for each, and a list of pieces: a
program takes one piece of one tensor. `_adamw_numbers_kernel` goes first. It counts the steps, whose counts are tensors of the optimizer's state, and
computes what only depends on a tensor's count and its group: in fp64, because 1 - beta2^t is 0.001 at the first step of beta2 = 0.999, which
fp32 holds to 6e-5. The factors are then rounded to fp32, in which the step computes, with IEEE division and square root.

PyTorch's fused step computes the products with lr, beta1 and beta2 in fp64 and rounds each result to fp32; here they are products in fp32. So
the results differ by a unit in the last place; the error against fp64 is the same.

Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
"""
import math

import torch
import triton
import triton.language as tl

from .host import elsewhere

# A row of the table: addresses, the number of elements, and which group of the optimizer it belongs to.
WEIGHT, GRADIENT, EXP_AVG, EXP_AVG_SQ, STEP, COPY, SIZE, GROUP, WIDTH = (tl.constexpr(i) for i in range(9))
# A row of the groups: fp64.
BETA1, BETA2, LOG2_BETA1, LOG2_BETA2, EPS, DECAY, OPTIONS = (tl.constexpr(i) for i in range(7))
# A row of the numbers: fp32, what a tensor's step multiplies with.
SHRINK, RATE, ROOT, OLD_M, NEW_M, OLD_V, NEW_V, EPSILON, NUMBERS = (tl.constexpr(i) for i in range(9))

PIECE = 8192        # elements of a program. GPT-2 124M has 15,300 pieces; its largest tensor alone 4,716
BLOCK = 512         # of them at once: with 4 warps a thread loads 16 bytes of each tensor. 1,024 would let the copy's 16 bytes decide the layout,
                    # so that fp32 stores pass through shared memory: 148 registers instead of 45, and 3 programs a multiprocessor instead of 10
TENSORS = 128       # whose numbers a program computes
ALIGNMENT = tl.constexpr(16)      # of an address in bytes: loads of four fp32


# ---------------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_tensors"])
def _adamw_numbers_kernel(table_ptr, groups_ptr, rates_ptr, numbers_ptr, n_tensors, TENSORS: tl.constexpr):
    """Counts each tensor's step, and writes its row of numbers.

    table_ptr: int64 (n_tensors, WIDTH); groups_ptr: fp64 (groups, OPTIONS); rates_ptr: fp32 (groups,), the learning rates; numbers_ptr: fp32
    (n_tensors, NUMBERS).
    """
    tensors = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    inside = tensors < n_tensors
    row = table_ptr + tensors * WIDTH
    counts = tl.load(row + STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(counts, mask=inside, other=0.0) + 1.0
    tl.store(counts, t, mask=inside)

    which = tl.load(row + GROUP, mask=inside, other=0)
    group = groups_ptr + which * OPTIONS
    rate = tl.load(rates_ptr + which).to(tl.float64)
    beta1 = tl.load(group + BETA1)
    beta2 = tl.load(group + BETA2)
    t = t.to(tl.float64)
    correction1 = 1.0 - tl.exp2(t * tl.load(group + LOG2_BETA1))
    correction2 = 1.0 - tl.exp2(t * tl.load(group + LOG2_BETA2))

    out = numbers_ptr + tensors * NUMBERS
    tl.store(out + SHRINK, (rate * tl.load(group + DECAY)).to(tl.float32), mask=inside)
    tl.store(out + RATE, (rate / correction1).to(tl.float32), mask=inside)
    tl.store(out + ROOT, tl.sqrt(correction2).to(tl.float32), mask=inside)
    tl.store(out + OLD_M, beta1.to(tl.float32), mask=inside)
    tl.store(out + NEW_M, (1.0 - beta1).to(tl.float32), mask=inside)
    tl.store(out + OLD_V, beta2.to(tl.float32), mask=inside)
    tl.store(out + NEW_V, (1.0 - beta2).to(tl.float32), mask=inside)
    tl.store(out + EPSILON, tl.load(group + EPS).to(tl.float32), mask=inside)


@triton.jit
def _address(row, column, dtype: tl.constexpr):
    """The pointer in a column of a row of the table."""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(dtype)), ALIGNMENT)


@triton.jit
def _block(w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, has_copy, elements, inside, factor, shrink, rate, root, old_m, new_m, old_v, new_v, eps):
    """AdamW's step of some elements of one tensor. inside: a mask, or None for all."""
    w = tl.load(w_ptr + elements, mask=inside)
    g = tl.load(g_ptr + elements, mask=inside) * factor
    m = old_m * tl.load(m_ptr + elements, mask=inside) + new_m * g
    v = old_v * tl.load(v_ptr + elements, mask=inside) + new_v * g * g
    w -= shrink * w
    w -= tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(m_ptr + elements, m, mask=inside)
    tl.store(v_ptr + elements, v, mask=inside)
    tl.store(w_ptr + elements, w, mask=inside)
    if has_copy:
        tl.store(copy_ptr + elements, w.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _adamw_kernel(table_ptr, pieces_ptr, numbers_ptr, factor_ptr, COPY_DTYPE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """AdamW's step of one piece of one tensor.

    table_ptr, numbers_ptr: as above; pieces_ptr: int32 (programs, 2): which tensor, and which piece of it; factor_ptr: fp32, one number, or None.
    """
    piece = pieces_ptr + tl.program_id(0) * 2
    tensor = tl.load(piece)
    start = tl.load(piece + 1).to(tl.int64) * PIECE
    row = table_ptr + tensor * WIDTH
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
    numbers = numbers_ptr + tensor * NUMBERS
    shrink = tl.load(numbers + SHRINK)
    rate = tl.load(numbers + RATE)
    root = tl.load(numbers + ROOT)
    old_m = tl.load(numbers + OLD_M)
    new_m = tl.load(numbers + NEW_M)
    old_v = tl.load(numbers + OLD_V)
    new_v = tl.load(numbers + NEW_V)
    eps = tl.load(numbers + EPSILON)
    w_ptr = _address(row, WEIGHT, tl.float32)
    g_ptr = _address(row, GRADIENT, tl.float32)
    m_ptr = _address(row, EXP_AVG, tl.float32)
    v_ptr = _address(row, EXP_AVG_SQ, tl.float32)
    copy_ptr = _address(row, COPY, COPY_DTYPE)
    has_copy = tl.load(row + COPY) != 0
    size = tl.load(row + SIZE)

    if start + PIECE <= size:       # without a mask loads and stores are 16 bytes wide
        for first in range(0, PIECE, BLOCK):
            elements = start + first + tl.arange(0, BLOCK)
            _block(w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, has_copy, elements, None,
                   factor, shrink, rate, root, old_m, new_m, old_v, new_v, eps)
    else:
        for first in range(0, PIECE, BLOCK):
            elements = start + first + tl.arange(0, BLOCK)
            _block(w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, has_copy, elements, elements < size,
                   factor, shrink, rate, root, old_m, new_m, old_v, new_v, eps)


# ---------------------------------------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------------------------------------


class Table:
    """The tensors of AdamW's step, by address: `write` them, then `step`.

    What is on the GPU is written again only where it changed. A captured step (CUDA graphs) finds its tensors in the same places at every
    replay; write the table before the capture, since a copy from the host's memory would be captured with it.
    """

    def __init__(self):
        self._device = None

    def write(self, tensors, groups, options):
        """tensors: [(weight, gradient, exp_avg, exp_avg_sq, step, copy or None)] of one GPU: contiguous, fp32, their addresses multiples of
        16 bytes, but for `step` (), anywhere, and the copies, all bf16 or all fp16. groups: the group of each. options: of each group
        (beta1, beta2, eps, weight_decay).
        """
        rows = [(*(t.data_ptr() for t in each[:5]), 0 if each[5] is None else each[5].data_ptr(), each[0].numel(), group)
                for each, group in zip(tensors, groups, strict=True)]
        device = tensors[0][0].device
        if device != self._device:
            self._device, self._rows, self._sizes, self._options = device, None, None, None
        self._like, self._copy_dtype = tensors[0][0], next((each[5].dtype for each in tensors if each[5] is not None), torch.bfloat16)
        if rows != self._rows:
            self._table = _sent(rows, torch.int64, device)
            self._rows = rows
        sizes = [row[SIZE.value] for row in rows]
        if sizes != self._sizes:
            self._pieces = _sent([(i, piece) for i, size in enumerate(sizes) for piece in range(-(-size // PIECE))], torch.int32, device)
            self._numbers = torch.empty(len(rows), NUMBERS.value, dtype=torch.float32, device=device)
            self._sizes = sizes
        if options != self._options:
            self._groups = _sent([(beta1, beta2, _log2(beta1), _log2(beta2), eps, decay) for beta1, beta2, eps, decay in options],
                                 torch.float64, device)
            self._options = options

    def step(self, rates, factor=None):
        """Take the step of the tensors that were written. rates: the learning rate of each group, a number or a tensor (); all on the GPU,
        nobody waits for them. factor: what the gradients are multiplied with, fp32 () on the GPU, or None."""
        if elsewhere(self._like):
            with torch.cuda.device_of(self._like):
                return self.step(rates, factor)
        # In fp32 in any case: a captured step reads its learning rate from such a tensor, and is to give an ordinary one's bits.
        there = all(isinstance(rate, torch.Tensor) and rate.device == self._device for rate in rates)
        rates = torch.stack(rates).float() if there else _sent([float(rate) for rate in rates], torch.float32, self._device)
        _adamw_numbers_kernel[(-(-len(self._rows) // TENSORS), )](self._table, self._groups, rates, self._numbers, len(self._rows), TENSORS=TENSORS,
                                                            num_warps=TENSORS // 32)
        if (pieces := self._pieces.size(0)) > 0:
            _adamw_kernel[(pieces, )](self._table, self._pieces, self._numbers, factor, COPY_DTYPE=_TRITON[self._copy_dtype], PIECE=PIECE,
                                     BLOCK=BLOCK, num_warps=4)


_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _log2(beta):
    return math.log2(beta) if beta > 0 else -math.inf


def _sent(values, dtype, device):
    """A tensor of these values on the device, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a table of addresses is to be written while a CUDA graph is captured; write it before")
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True).to(device, non_blocking=True)
