"""The dropout masks of kernels/dropout.py: Philox by its known answers, and masks that depend on nothing but seed and element."""
import math

import harness
import pytest
import torch
import triton
import triton.language as tl
from nanogpt_fast.kernels import dropout

SEED = 0x0123_4567_89AB_CDEF


@triton.jit
def _philox_kernel(out_ptr, seed, c0, c1, c2, c3, ROUNDS: tl.constexpr):
    zero = tl.zeros((4, ), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + c0, zero + c1, zero + c2, zero + c3, ROUNDS)
    lanes = tl.arange(0, 4)
    w = tl.where(lanes == 0, w0, tl.where(lanes == 1, w1, tl.where(lanes == 2, w2, w3)))
    tl.store(out_ptr + lanes, w.to(tl.int64))


@triton.jit
def _rows_kernel(out_ptr, seed_ptr, rows_ptr, C, p, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * BLOCK_C
    keep = dropout.keep_rows(tl.load(seed_ptr), tl.load(rows_ptr + i), p, BLOCK_C, start)
    columns = start + tl.arange(0, BLOCK_C)
    tl.store(out_ptr + i[:, None] * C + columns[None, :], keep, mask=(columns < C)[None, :])


@triton.jit
def _scores_kernel(out_ptr, seed_ptr, M, N, p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    m0, n0, matrix = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    keep = dropout.keep_scores(tl.load(seed_ptr), matrix, m0, n0, p, BLOCK_M, BLOCK_N, TRANSPOSED)
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        offsets, inside = matrix * M * N + m[None, :] * N + n[:, None], (m < M)[None, :] & (n < N)[:, None]
    else:
        offsets, inside = matrix * M * N + m[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + offsets, keep, mask=inside)


def rows_by_kernel(rows, C, p, seed=SEED, block_rows=2, block_c=16):
    out = torch.zeros(len(rows), C, dtype=torch.bool, device=harness.DEVICE)
    grid = (len(rows) // block_rows, triton.cdiv(C, block_c))
    harness.fresh(_rows_kernel)[grid](out, torch.tensor([seed], device=out.device), rows.to(out.device), C, p, ROWS=block_rows,
                                      BLOCK_C=block_c)
    return out.cpu()


def scores_by_kernel(matrices, M, N, p, seed=SEED, block_m=16, block_n=32, transposed=False):
    out = torch.zeros(matrices, M, N, dtype=torch.bool, device=harness.DEVICE)
    grid = (triton.cdiv(M, block_m), triton.cdiv(N, block_n), matrices)
    harness.fresh(_scores_kernel)[grid](out, torch.tensor([seed], device=out.device), M, N, p, BLOCK_M=block_m, BLOCK_N=block_n,
                                        TRANSPOSED=transposed)
    return out.cpu()


ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # (rounds, key, counter, words): the published test vectors of Philox-4x32
    (10, 0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, -1, (ONES, ONES, ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (7, 0, (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
]


@pytest.mark.parametrize("rounds, key, counter, words", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_in_pytorch(rounds, key, counter, words):
    assert tuple(int(w) for w in dropout.philox(key, *counter, rounds=rounds)) == words


@pytest.mark.parametrize("rounds, key, counter, words", KNOWN_ANSWERS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_philox_gives_the_known_answers_in_a_kernel(device, rounds, key, counter, words):
    out = torch.zeros(4, dtype=torch.int64, device=device)
    counter = [c - 2**32 if c >= 2**31 else c for c in counter]  # the same bits as int32
    _philox_kernel[(1, )](out, torch.tensor(key).item(), *counter, ROUNDS=rounds)
    assert tuple(w % 2**32 for w in out.tolist()) == words


@pytest.mark.parametrize("C", [1, 7, 16, 50])
def test_the_kernel_draws_the_row_mask_that_pytorch_reads_back(C):
    rows = torch.tensor([0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**40 + 7])
    assert torch.equal(rows_by_kernel(rows, C, 0.3), dropout.row_mask(SEED, rows, C, 0.3))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M, N", [(1, 1), (17, 65), (64, 40)])
def test_the_kernel_draws_the_score_mask_that_pytorch_reads_back(M, N, transposed):
    assert torch.equal(scores_by_kernel(3, M, N, 0.3, transposed=transposed), dropout.score_mask(SEED, 3, M, N, 0.3))


def test_the_row_mask_does_not_depend_on_tiles():
    rows = torch.arange(8)
    first = rows_by_kernel(rows, 70, 0.5, block_rows=1, block_c=128)
    for block_rows, block_c in ((1, 16), (2, 4), (4, 64), (8, 8)):
        assert torch.equal(rows_by_kernel(rows, 70, 0.5, block_rows=block_rows, block_c=block_c), first)


def test_the_score_mask_does_not_depend_on_tiles():
    first = scores_by_kernel(2, 70, 90, 0.5, block_m=128, block_n=128)
    for block_m, block_n, transposed in ((16, 16, False), (16, 64, True), (64, 32, False), (32, 16, True)):
        assert torch.equal(scores_by_kernel(2, 70, 90, 0.5, block_m=block_m, block_n=block_n, transposed=transposed), first)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("draw", [lambda seed, p: dropout.row_mask(seed, 200, 1000, p), lambda seed, p: dropout.score_mask(seed, 5, 200, 200, p)],
                         ids=["rows", "scores"])
def test_the_kept_fraction_is_within_six_sigma(draw, p):
    keep = draw(int(torch.randint(2**63 - 1, ())), p)           # another seed in each run: beyond 6 chance comes once in 5e8, beyond 4 in 16,000
    if p == 1.0:    # 256 of 2^32 words reach the largest threshold, and `keep_scale` is 0: 0.012 of 200,000 are expected, 5 once in 5e11
        assert keep.sum() < 5
        return
    sigma = math.sqrt(p * (1 - p) / keep.numel())
    assert abs(float(keep.double().mean()) - (1 - p)) <= 6 * sigma + 1e-9


@pytest.mark.parametrize("draw", [lambda seed: dropout.row_mask(seed, 128, 256, 0.5), lambda seed: dropout.score_mask(seed, 2, 128, 128, 0.5)],
                         ids=["rows", "scores"])
def test_decisions_are_independent_of_their_neighbours_and_of_other_seeds(draw):
    a, b = draw(1).double() * 2 - 1, draw(2).double() * 2 - 1
    four_sigma = 4 / math.sqrt(a.numel() / 2)
    assert abs(float((a * b).mean())) < four_sigma
    for axis in range(a.dim()):
        for distance in (1, 2, 4, 8, 16):
            if a.size(axis) > distance:
                n = a.size(axis) - distance
                assert abs(float((a.narrow(axis, 0, n) * a.narrow(axis, distance, n)).mean())) < four_sigma, (axis, distance)


def test_the_seed_is_used_in_all_its_64_bits():
    masks = [dropout.row_mask(seed, 8, 64, 0.5) for seed in (0, 1, 1 << 31, 1 << 32, 1 << 62, -1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert torch.equal(rows_by_kernel(torch.arange(8), 64, 0.5, seed=1 << 62), masks[4])


def test_p_of_one_drops_everything_and_scales_by_nothing():
    assert not rows_by_kernel(torch.arange(4), 64, 1.0).any()


@pytest.mark.parametrize("fault, replacement", [
    (r"tl\.join\(w0, w2\), tl\.join\(w1, w3\)", "tl.join(w0, w1), tl.join(w2, w3)"),
    (r"rows >> 32", "rows >> 31"),
    (r"words\.reshape\(rows\.shape\[0\], BLOCK_C\) >=", "words.reshape(rows.shape[0], BLOCK_C) <="),
    (r"start // 4 \+", ""),
])
def test_faults_in_the_row_mask_are_seen(fault, replacement):
    rows = torch.tensor([0, 1, 2**31, 2**32 + 5])
    expected = dropout.row_mask(SEED, rows, 40, 0.3)

    def check():
        assert torch.equal(rows_by_kernel(rows, 40, 0.3), expected)

    harness.assert_fault_is_seen(dropout, fault, replacement, check)


@pytest.mark.parametrize("fault, replacement", [
    (r"tl\.join\(w0, w1\), tl\.join\(w2, w3\)", "tl.join(w0, w2), tl.join(w1, w3)"),
    (r"permute\(2, 4, 3, 0, 5, 1\)", "permute(2, 5, 3, 0, 4, 1)"),
    (r"zero \+ matrix", "zero + 0 * matrix"),
])
def test_faults_in_the_score_mask_are_seen(fault, replacement):
    expected = dropout.score_mask(SEED, 2, 40, 40, 0.3)

    def check():
        assert torch.equal(scores_by_kernel(2, 40, 40, 0.3), expected)
        assert torch.equal(scores_by_kernel(2, 40, 40, 0.3, transposed=True), expected)

    harness.assert_fault_is_seen(dropout, fault, replacement, check)
