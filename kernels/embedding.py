"""Token and position embeddings in one kernel; the token embedding's gradient, added to one that is there already.

    x[b, t]         = wte[index[b, t]] + wpe[start + t]
    gradient[token] += sum of dx[b, t] over all (b, t) whose index is that token

Why: GPT-2 shares the token embedding's matrix with the vocabulary head, so two gradients arrive for it. The head's is dense. PyTorch fills a
second (V, C) tensor with zeros, sums the embedding's rows into it, and adds the two: at 64 x 1024 tokens of GPT-2 124M 0.8 GB, where
reading dx takes 0.2 and the rows of the tokens that occur at most 0.3 more. The forward moves 0.4 GB, in two operations 0.8.

Tokens repeat, so programs would meet at one row, and atomics would add in an order that changes from run to run. Here the positions are
sorted by token (stably, so in a fixed order), and the positions of a token lie side by side: a run. A program walks through one piece of
the sorted positions and sums run by run. A run inside the piece belongs to that program alone, which adds it to the gradient. Of a
longer one each piece leaves a partial sum, and `_add_long_runs_kernel` adds these up in order. So no text is slow: if the batch is one token over
and over, a program still walks through one piece.

Shapes: N = B T tokens of C channels; index (B, T); wte (V, C), wpe (block size, C); x and dx (B, T, C). Sums are fp32.
"""
import torch
import triton
import triton.language as tl

from .host import elsewhere, padded

PIECE = 32      # positions of a program
BLOCK = 256     # channels of a program of two warps: a thread loads 16 bytes of each row
CHUNK = 16      # partial sums that a program of `_add_long_runs_kernel` loads at once


# ---------------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["start"])
def _embed_kernel(x_ptr, index_ptr, wte_ptr, wpe_ptr, T, V, C, start, BLOCK: tl.constexpr):
    """x = wte[index] + wpe[start + t]; a program for each token. A token that is none makes its row nan."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    token = tl.load(index_ptr + row)
    position = start + row % T
    there = (token >= 0) & (token < V)
    word = tl.load(wte_ptr + token * C + columns, mask=inside & there, other=float("nan"))
    place = tl.load(wpe_ptr + position * C + columns, mask=inside, other=0.0)
    tl.store(x_ptr + row * C + columns, word + place, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _add_runs_kernel(gradient_ptr, tokens_ptr, places_ptr, dx_ptr, partials_ptr, N, V, C, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the runs of one piece. Add those inside it to the gradient; leave the sums of the others.

    tokens_ptr: (N,), sorted; places_ptr: (N,), where each lies in dx. partials_ptr: fp32 (pieces, 2, C): the sum of the run that began in
    a piece before, and of the one that begins here and goes on; written where there is one.
    """
    piece = tl.program_id(0)
    first = piece * PIECE
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    partial = partials_ptr + piece.to(tl.int64) * 2 * C + columns
    before = tl.load(tokens_ptr + first - 1, mask=first > 0, other=-2)
    token = tl.load(tokens_ptr + first)
    run = tl.zeros([BLOCK], tl.float32)
    for i in range(first, min(first + PIECE, N)):
        place = tl.load(places_ptr + i)
        following = tl.load(tokens_ptr + i + 1, mask=i + 1 < N, other=-2)
        run += tl.load(dx_ptr + place * C + columns, mask=inside, other=0.0).to(tl.float32)
        if token != following:
            if token == before:
                tl.store(partial, run, mask=inside)
            elif (token >= 0) & (token < V):
                at = gradient_ptr + token.to(tl.int64) * C + columns
                tl.store(at, tl.load(at, mask=inside, other=0.0) + run, mask=inside)
            run = tl.zeros([BLOCK], tl.float32)
        token = following
    last = tl.load(tokens_ptr + min(first + PIECE, N) - 1)
    if last == token:       # it goes on in the next piece
        tl.store(partial + (last != before).to(tl.int32) * C, run, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _add_long_runs_kernel(gradient_ptr, tokens_ptr, partials_ptr, N, V, C, PIECE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Add the sum of the run that begins in a piece and goes on in the next, if there is one, to the gradient."""
    piece = tl.program_id(0)
    first = piece * PIECE
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    token = tl.load(tokens_ptr + first + PIECE - 1)     # there is one piece more, so this one is full
    before = tl.load(tokens_ptr + first - 1, mask=first > 0, other=-2)
    following = tl.load(tokens_ptr + first + PIECE)
    if (token == following) & (token != before) & (token >= 0) & (token < V):
        total = tl.load(partials_ptr + (piece.to(tl.int64) * 2 + 1) * C + columns, mask=inside, other=0.0)
        later = piece + 1 + tl.arange(0, CHUNK)
        more = CHUNK
        while more == CHUNK:
            here = tl.load(tokens_ptr + later * PIECE, mask=later * PIECE < N, other=-2) == token
            partials = tl.load(partials_ptr + later.to(tl.int64)[:, None] * 2 * C + columns[None, :], mask=here[:, None] & inside[None, :], other=0.0)
            total += tl.sum(partials, 0)
            more = tl.sum(here.to(tl.int32), 0)
            later += CHUNK
        at = gradient_ptr + token.to(tl.int64) * C + columns
        tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


# ---------------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------------


def embed(index, wte, wpe, start=0):
    """wte[index] + wpe[start : start + T] -> (B, T, C), in the matrices' dtype.

    index: int64 (B, T); a token outside of 0..V - 1 makes its row nan, since a check would stall the host. wte (V, C) and wpe (at least
    start + T, C): contiguous and of one dtype.
    """
    if elsewhere(index):
        with torch.cuda.device_of(index):
            return embed(index, wte, wpe, start)
    x = wte.new_empty(*index.shape, wte.size(1))
    if x.numel() > 0:
        block = padded(x.size(-1))
        _embed_kernel[(index.numel(), )](x, index, wte, wpe, index.size(-1), wte.size(0), x.size(-1), start, BLOCK=block,
                                         num_warps=min(max(block // 256, 1), 8))
    return x


def add_rows(gradient, index, dx):
    """gradient[index[i]] += dx[i] for each i, in fp32 and in a fixed order.

    gradient: fp32 (V, C), contiguous. index: int64 (...), contiguous; what lies outside of 0..V - 1 is left out. dx: (..., C),
    floating point, contiguous.
    """
    if elsewhere(gradient):
        with torch.cuda.device_of(gradient):
            return add_rows(gradient, index, dx)
    N, (V, C) = index.numel(), gradient.shape
    if N * C == 0:
        return
    tokens, places = index.view(-1).clamp(-1, V).to(torch.int32).sort(stable=True)     # half of int64's digits to sort by
    pieces, blocks, warps = -(-N // PIECE), -(-C // BLOCK), BLOCK // 128
    partials = gradient.new_empty(pieces, 2, C)
    _add_runs_kernel[(pieces, blocks)](gradient, tokens, places, dx, partials, N, V, C, PIECE=PIECE, BLOCK=BLOCK, num_warps=warps)
    if pieces > 1:
        _add_long_runs_kernel[(pieces - 1, blocks)](gradient, tokens, partials, N, V, C, PIECE=PIECE, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=warps)
