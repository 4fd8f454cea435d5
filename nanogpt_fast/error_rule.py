"""When is a kernel's result right? One rule, for the tests and for `nanogpt-fast verify`.

An absolute tolerance that admits bf16's rounding also admits a wrong eps. So the error is taken against fp64 on the same
inputs, and bounded by the error that plain PyTorch makes in the same precision:

Magnitude: root mean square and largest error are each at most factor * max(plain's, rounding), factor 2 for results and 3 for
gradients. `rounding` is what rounding the exact answer once may cost (half a unit in the last place), so a plain path that
happens to be exact (a copy, one element, x of equal values) does not forbid the kernel's rounding. The factor is widened by 1 +
16/n: the ratio of two errors measured on n elements scatters, and without it one-element tensors would fail by chance.

Bias: the mean error, and the mean error in the direction of the oracle's sign (a result scaled by 1 - d has no mean error, but
this), lie within 6 standard errors of 0, or of what rounding the exact answer once explains, or of what the plain path has.

Rounding once explains a mean error where values are closer together than bf16's steps (a softmax of nearly equal logits), which
are all rounded the same way, and where GELU' tends to 1 from above: dy * GELU' is rounded down to dy, in every element.
Already-rounded values show less of this bias; any mean error between 0 and it passes.

The plain path has a mean error of its own on a GPU. Tensor cores truncate as they sum, so each matmul is a little nearer to 0
(the fp16 logits that one cuBLAS call computes for both: by 1.3e-6), and a number that is rounded on its way takes its products
with it (bf16 rounds softmax - 1 = -0.99998 to -1, and the gradients of x and weight are too large). So the same two means of
the plain path's errors on the same numbers are allowed, up to 2 times in results and 3 times in gradients, as for the
magnitude. They count as far as they are over 2 of their own standard errors: chance excuses nothing. A bias in the other
direction, or one that the plain path lacks, is still the kernel's. On a CPU, whose sums round to nearest, nothing of this counts,
nor beside `stored` below: PyTorch's own rounding would hide a division by N + 1 instead of N = 300.

An intermediate that an algorithm stores in half precision is rounded once, too, and its products are off by what that makes. Who
knows it says so (`stored`). Linear cross-entropy stores softmax - 1 in bf16, where -0.99998 is -1: all gradients are a little too
large. PyTorch stores (softmax - 1) / N: too large or too small, by up to 4 times as much, as N has it.

The sums over the intermediate may be off, too: tensor cores truncate them, on an H100 by 5e-5 of the gradient of x, over 50,304
columns, and by nothing to be seen in that of weight. So `stored` may be several results, by exact sums and by tensor cores'. Any
mean error between 0 and the farthest of them passes, on either side of 0. That is more than one explanation allows; what is beyond
all of them is still found.

fp32's own unit (1.2e-7) is always allowed. Errors within a row are correlated (one rstd, one softmax denominator), and within a
column (h in half precision plus a bias that has more digits: what is rounded off is the bias's, in every row), so the standard
error counts rows and columns as observations, too.

Where the oracle rounds to inf or nan in the result's dtype, the result must be the same; where it does not, it must be finite.
"""
import math
from dataclasses import dataclass

import torch

ERROR_FACTOR = {"forward": 2.0, "gradient": 3.0}  # times the plain low-precision path's own error
STANDARD_ERRORS = 6.0  # of the signed mean error: chance passes it once in 5e8
BY_CHANCE = 2.0  # standard errors of the plain path's mean error that are taken for chance, and excuse no bias
FEWEST_FOR_BIAS = 64  # distinct values; below that a mean has no reliable standard error


@dataclass
class Measurement:
    """What `measure` found. Relative errors are L2: root mean square of the error over that of the oracle."""
    largest: float = 0.0            # largest absolute error
    relative: float = 0.0
    plain_relative: float = 0.0     # plain PyTorch's
    bound: float = 0.0              # on `relative`
    bias: float = 0.0               # of the two mean errors, what neither rounding nor plain has, the larger; in standard errors
    problem: str | None = None      # None, or which part of the rule is broken, by how much


def measure(out, oracle, plain, direction, *, check_bias=True, factor=None, dtype=None, averaged=1, observations=None,
            cancelled=None, stored=None, tensor_cores=None):
    """Hold `out` to the rule. Returns a Measurement.

    out, plain: the kernel's result and the plain path's on the same inputs, any dtype. oracle: fp64. direction: "forward" or
    "gradient". factor: in place of ERROR_FACTOR[direction].
    dtype, averaged: for a mean over `averaged` numbers that were rounded to `dtype`, as the loss is: fp32, but made of bf16
    logits. The plain path's one error can then be near zero by luck; what rounding may cost is that of the numbers, averaged
    out.
    observations: how many independent errors there are, where they are fewer than elements (one score of attention is in
    every element of a row). cancelled: of out's shape, the root mean square error of each element that the formula itself makes
    in fp32 where two equal terms cancel, so that the oracle is 0 and the plain path may hit it by luck (dq and dk of a query
    that sees one key). stored: of out's shape, fp64, one or a tuple: the result of an intermediate that the algorithm stores in
    half precision, rounded once, summed as out may be. Their mean errors are explained, and the plain path's is not. tensor_cores:
    they made the sums, so that the plain path's mean error counts; None: where out is on a GPU.
    """
    if not out.shape == oracle.shape == plain.shape:
        return Measurement(problem=f"shapes out {tuple(out.shape)}, oracle {tuple(oracle.shape)}, plain {tuple(plain.shape)}")
    if oracle.dtype != torch.float64:
        return Measurement(problem=f"the oracle is {oracle.dtype}, expected float64")
    if out.numel() == 0:
        return Measurement()
    factor = ERROR_FACTOR[direction] if factor is None else factor
    shared = (out.is_cuda if tensor_cores is None else tensor_cores) and stored is None
    where = out.device if out.is_cuda else "cpu"  # to sort 38 million numbers takes a CPU seconds; MPS has no float64
    expected = oracle.detach().to(out.dtype).to(where).double()  # the correctly rounded answer; its inf and nan are right
    units = torch.finfo(out.dtype), torch.finfo(dtype or out.dtype)
    out, oracle, plain = (t.detach().to(where).double() for t in (out, oracle, plain))
    finite = expected.isfinite()
    wrong = out.isfinite() != finite
    if wrong.any():
        return Measurement(largest=math.inf, relative=math.inf, problem=(
            f"{int(wrong.sum())} of {out.numel()} elements are finite where fp64 is not, or the reverse; "
            f"first at {first_index(wrong)}: {out[first_index(wrong)]} against {oracle[first_index(wrong)]}"))
    same = finite | (out == expected) | (out.isnan() & oracle.isnan())
    if not same.all():
        return Measurement(largest=math.inf, relative=math.inf, problem=f"inf or nan of the wrong kind at {first_index(~same)}")
    if not finite.any():
        return Measurement()
    error = torch.where(finite, out - oracle, 0.0)
    plain_error = torch.where(finite & plain.isfinite(), plain - oracle, 0.0)
    exact = torch.where(finite, oracle, 0.0)

    n = min(int(finite.sum()) * averaged, observations or math.inf)
    rows = n if out.dim() < 2 else min(n, int(finite.sum()) * averaged / out.size(-1))
    slack = factor * (1 + 16 / n + 2 / rows)  # one rstd, one denominator is wrong for a whole row: rows are few observations
    found = Measurement()
    norms = {"largest": lambda t: float(t.abs().max()), "rms": lambda t: float(t.square().mean().sqrt())}
    for name, size in norms.items():
        once, each = (0.5 * unit.eps * size(exact) + unit.tiny * unit.eps for unit in units)
        rounding = max(once, each / math.sqrt(averaged))
        bound = slack * max(size(plain_error), rounding, 0.0 if cancelled is None else size(cancelled.to(where).double()))
        if size(error) > bound and found.problem is None:
            found.problem = (
                f"{name} error {size(error):.3g} against fp64 is over {slack:.3g} times the larger of the plain path's error "
                f"({size(plain_error):.3g}) and rounding ({rounding:.3g}); {direction}, {n} elements, worst at "
                f"{first_index(error.abs() == error.abs().max())}")
    unit = norms["rms"](exact) or 1.0  # an oracle of zeros: absolute errors
    found.largest = norms["largest"](error)
    found.relative, found.plain_relative, found.bound = (
        absolute / unit for absolute in (norms["rms"](error), norms["rms"](plain_error), bound))
    if check_bias and n >= FEWEST_FOR_BIAS:
        stored = () if stored is None else stored if isinstance(stored, tuple) else (stored,)
        of_stored = [torch.where(finite, each.to(where).double() - oracle, 0.0) for each in stored]
        found.bias, biased = _bias(error, exact, torch.where(finite, expected - oracle, 0.0), of_stored, plain_error,
                                   ERROR_FACTOR[direction] * shared)
        found.problem = found.problem or biased
    return found


def _bias(error, exact, rounding, stored, plain, factor):
    """(the worse bias in standard errors, None or the sentence that names it). rounding: the error of the exact answer, rounded
    once; stored: those of an intermediate rounded once; plain: the plain path's, of whose mean `factor` times are allowed."""
    distinct = exact[exact != 0].float().unique().numel()  # repeated values repeat one error: they are one observation
    if distinct < FEWEST_FOR_BIAS:
        return 0.0, None
    allowed = torch.finfo(torch.float32).eps * float(exact.square().mean().sqrt())
    worst, problem = 0.0, None
    for name, signs in (("mean error", 1.0), ("mean error along the sign of the exact value", exact.sign())):
        mean, shared, *explaining = (float((t * signs).mean()) for t in (error, plain, rounding, *stored))
        shared = factor * math.copysign(max(0.0, abs(shared) - BY_CHANCE * _standard_error(plain * signs, distinct)), shared)
        standard = _standard_error(error * signs, distinct)
        explained = min(max(mean, min(0.0, shared, *explaining)), max(0.0, shared, *explaining))
        beyond = mean - explained
        bound = STANDARD_ERRORS * (1 + 16 / distinct) * standard + allowed
        worst = max(worst, beyond / max(standard, 1e-300), key=abs)
        if abs(beyond) > bound and problem is None:
            problem = (f"biased. {name} {mean:.3g}, of which rounding once and the plain path explain {explained:.3g}; the rest is "
                       f"{abs(beyond) / max(standard, 1e-300):.1f} standard errors from 0 (bound {bound:.3g}, {distinct} "
                       "distinct values)")
    return worst, problem


def _standard_error(signed, distinct):
    """Of the mean of errors (..., C), of which `distinct` are different.

    Let an error have a part of its row, one of its column and one of its own, independent, of variances r, c and e. The mean
    over R rows and C columns has the variance r/R + c/C + e/RC. The variance of row means, over R, is r/R + e/RC; that of
    column means, over C, is c/C + e/RC; that of all elements, over RC, is (r + c + e)/RC, or nearly e/RC. Hence the last, and
    by how much either of the others is more. Fewer than 8 means have no variance to speak of.
    """
    grid = signed.reshape(-1, signed.size(-1))
    elements = float(grid.var()) / grid.numel()
    more = (max(0.0, float(means.var()) / means.numel() - elements)
            for means in (grid.mean(1), grid.mean(0)) if means.numel() >= 8)
    return math.sqrt(float(grid.var()) / distinct + sum(more))


def first_index(mask):
    """The index of the first True, as a tuple."""
    return tuple(mask.nonzero()[0].tolist())
