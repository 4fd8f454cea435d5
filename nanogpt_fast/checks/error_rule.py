"""The error rule: when a kernel's result is right. The tests and `nanogpt-fast verify` use it.

An absolute tolerance that admits bf16's rounding also admits a wrong eps. So the error is measured against fp64 on the same
inputs, and bounded by the error that plain PyTorch makes in the same precision.

Magnitude: the root mean square error and the largest error are each at most factor * max(plain's, rounding), with factor 2 for
results and 3 for gradients. `rounding` is what rounding the exact answer once may cost (half a unit in the last place), so a
plain path that happens to be exact (a copy, one element, x of equal values) does not forbid the kernel's rounding.

Two errors of equal quality differ by chance, and a test with fresh random inputs must not fail by chance, not once in 10^6. How much
chance explains depends on how many errors are compared:

    root mean square   The logarithm of the ratio of two, each of n independent errors, has a standard deviation of 1/sqrt(n)
                       (Fisher's z). Where 5.2 standard deviations (one-sided, 1e-7) exceed the factor, they are the bound: below
                       n = 58. n is the effective number of observations, 2 (mean / standard error)^2 of the squares, with the
                       standard error taken over rows and columns, since a few large errors, or one rstd per row, are few
                       observations. It is the lower of two: that of the plain path's errors, and that of the exact values, to
                       which roundings are proportional. The factor is also widened by 1 + 16/n + 2/rows, n being all elements.
    largest error      The largest of n errors is a single one, and often belongs to one of the few largest elements, whose rounding
                       is largest; the plain path may have been lucky there. So the largest may also reach T, the value at which
                       the tails beyond T of n normal errors sum to 1e-8. Their standard deviation is the plain path's root mean
                       square, and larger in proportion for elements above the average.
    a mean             of N numbers is a sum that is rounded up to N times, each time at its current size. Summed in order that makes
                       sqrt(N/9) half units of the mean, and one rounding sqrt(1/3): so sqrt(1 + N/3) times the cost of one.
    few sums           Where chance alone exceeds the factor, the plain path's few errors do not tell how large an error may be, and
                       rounding the exact value tells too little if the terms cancel. So the caller passes what adding the terms
                       one after the other costs (`in_order`), and the factor counts from the largest of the three. In any tensor of
                       sums the largest error may reach the T of normal errors of these sizes: a path that adds in order rounds every
                       later partial sum at the size of one large early term, and the plain path, adding in blocks, does not.

Bias: the mean error, and the mean error along the oracle's sign (only that one shows a result scaled by 1 - d), lie within 6
standard errors of 0, or of what rounding the exact answer once explains, or of the plain path's own. The 6 are those of a normal
distribution; where the standard error itself comes from few rows or columns (8 rows: 7 degrees of freedom), the equivalent of
Student's distribution.

Rounding once explains a mean error where values lie closer together than bf16's steps (a softmax of nearly equal logits) and
are all rounded the same way, and where GELU' tends to 1 from above: dy * GELU' is rounded down to dy, in every element.
Already-rounded values show less of this bias; any mean error between 0 and it passes.

On a GPU the plain path has a mean error of its own. Tensor cores truncate as they sum, so each matmul is a little nearer to 0
(the fp16 logits that one cuBLAS call computes for both: by 1.3e-6), and a rounded intermediate shifts its products (bf16 rounds
softmax - 1 = -0.99998 to -1, so the gradients of x and weight are too large). So the same two means of the plain path's errors on
the same numbers are allowed, up to 2 times in results and 3 times in gradients, as for the magnitude. Only the part above 2
of their own standard errors counts: chance excuses nothing. A bias in the other direction, or one that the plain path lacks, is
still the kernel's. None of this applies on a CPU, whose sums round to nearest, nor together with `stored` below: PyTorch's own
rounding would hide a division by N + 1 instead of N = 300.

An intermediate that an algorithm stores in half precision is rounded once, too, which shifts its products. The caller passes
what that explains as `stored`. Linear cross-entropy stores softmax - 1 in bf16, where -0.99998 becomes -1, so all gradients are a
little too large. PyTorch stores (softmax - 1) / N, which is too large or too small by up to 4 times as much, depending on N.

The sums over the intermediate may be off, too: tensor cores truncate them, on an H100 by 5e-5 of the gradient of x, over 50,304
columns, and by nothing measurable in the gradient of weight. So `stored` may be several results, from exact sums and from
tensor cores. Any mean error between 0 and the farthest of them passes, on either side of 0. That allows more than one
explanation would; a mean error beyond all of them is still found.

fp32's own unit (1.2e-7) is always allowed. Errors are correlated within a row (one rstd, one softmax denominator) and within a
column (h in half precision plus a bias with more digits: the same digits of the bias are rounded off in every row), so the
standard error counts rows and columns as observations, too. Few rows are few observations: a row of dq is a sum over keys, whose
roundings shift all of it. So the bias of a matrix of 2 to 7 rows must also exceed what Student's distribution allows the mean of so few
row means, and that of one row is not looked at. Where the caller passes `stored`, the shifts are explained, and neither applies.

Where the oracle rounds to inf or nan in the result's dtype, the result must equal it; elsewhere it must be finite.
"""
import math
from dataclasses import dataclass, field

import torch

ERROR_FACTOR = {"forward": 2.0, "gradient": 3.0}  # times the plain low-precision path's own error
STANDARD_ERRORS = 6.0  # of the signed mean error: chance exceeds it once in 5e8
LUCK = 5.2             # standard deviations of the logarithm of two errors' ratio: chance exceeds it once in 10^7
TAILS = 1e-8           # probability that chance puts one of n errors above the bound on the largest
FEWEST_OBSERVATIONS = 8.0   # with fewer, the plain error has no reliable size, and the ratio to it no meaningful bound
BY_CHANCE = 2.0  # standard errors of the plain path's mean error that count as chance and excuse no bias
FEWEST_FOR_BIAS = 64  # distinct values; below that a mean has no reliable standard error
FEWEST_MEANS = 8    # of rows or columns; the scatter of fewer is too uncertain to be one part of a sum


@dataclass
class Measurement:
    """What `measure` found. Relative errors are L2: root mean square of the error over that of the oracle."""
    largest: float = 0.0            # largest absolute error
    relative: float = 0.0
    plain_relative: float = 0.0     # plain PyTorch's
    bound: float = 0.0              # on `relative`
    bias: float = 0.0               # the larger of the two mean errors, less what rounding and plain explain; in standard errors
    used: dict = field(default_factory=dict)    # {part of the rule: error / bound; above 1 the part is broken}
    problem: str | None = None      # None, or which part of the rule is broken, and by how much


def measure(out, oracle, plain, direction, *, check_bias=True, factor=None, dtype=None, averaged=1, observations=None,
            cancelled=None, summed=None, stored=None, tensor_cores=None):
    """Check `out` against the rule. Returns a Measurement.

    out, plain: the kernel's result and the plain path's on the same inputs, any dtype. oracle: fp64. direction: "forward" or
    "gradient". factor: replaces ERROR_FACTOR[direction].
    dtype, averaged: for a mean over `averaged` numbers that were rounded to `dtype`, such as a loss, which is fp32 but computed
    from bf16 logits. The plain path's single error may be near zero by chance; `rounding` is then that of the numbers, averaged.
    observations: how many independent errors there are, if fewer than elements (one attention score enters every element of a
    row). cancelled: of out's shape, the root mean square error that the formula itself makes in fp32 in each element where two
    equal terms cancel: the oracle is 0 there, and the plain path may hit it by chance (dq and dk of a query that sees one key).
    summed: for sums, of out's shape: `in_order` of their terms. Used for the largest error, and for the root mean square where the results
    are so few that chance exceeds the factor.
    stored: of out's shape, fp64, one tensor or a tuple: the exact result but for an intermediate that the algorithm stores in half
    precision, rounded once, summed as out may be. These explain a mean error, and the plain path then explains none.
    tensor_cores: whether they computed the sums, so that the plain path's mean error counts; None: if out is on a GPU.
    """
    if not out.shape == oracle.shape == plain.shape:
        return Measurement(problem=f"shapes out {tuple(out.shape)}, oracle {tuple(oracle.shape)}, plain {tuple(plain.shape)}")
    if oracle.dtype != torch.float64:
        return Measurement(problem=f"the oracle is {oracle.dtype}, expected float64")
    if out.numel() == 0:
        return Measurement()
    factor = ERROR_FACTOR[direction] if factor is None else factor
    shared = (out.is_cuda if tensor_cores is None else tensor_cores) and stored is None
    where = out.device if out.is_cuda else "cpu"  # a CPU takes seconds to sort 38 million numbers; MPS has no float64
    expected = oracle.detach().to(out.dtype).to(where).double()  # the correctly rounded answer, including inf and nan
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
    slack = factor * (1 + 16 / n + 2 / rows)  # one rstd or denominator affects a whole row, and rows are few observations
    luck = math.exp(LUCK / math.sqrt(min(_observations(plain_error), _observations(exact)) - 2))
    found, bounds = Measurement(), {}
    norms = {"largest": lambda t: float(t.abs().max()), "rms": lambda t: float(t.square().mean().sqrt())}
    inherited = [t.to(where).double() for t in (cancelled, summed if luck > factor else None) if t is not None]

    def rounding(size):
        once, each = (0.5 * unit.eps * size(exact) + unit.tiny * unit.eps for unit in units)
        return max(once * math.sqrt(1 + averaged / 3 if averaged > 1 else 1), each / math.sqrt(averaged))

    def unavoidable(size):
        return max(size(plain_error), rounding(size), *map(size, inherited))
    unlucky = luck * max(norms["rms"](plain_error), rounding(norms["rms"]))     # another draw of the plain path's rms error stays below
    deviation = max(norms["rms"](plain_error), rounding(norms["rms"]) / math.sqrt(3), unlucky / factor if luck > factor else 0.0)
    by_chance = dict(rms=unlucky, largest=_largest_by_chance(deviation, exact))
    if summed is not None:
        by_chance["largest"] = max(by_chance["largest"], _largest_of(summed.to(where).double()))
    for name, size in norms.items():
        bounds[name] = max(slack * unavoidable(size), by_chance[name])
        found.used[name] = size(error) / max(bounds[name], 1e-300)
        if size(error) > bounds[name] and found.problem is None:
            found.problem = (
                f"{name} error {size(error):.3g} against fp64 is over {bounds[name]:.3g}, {bounds[name] / unavoidable(size):.3g} times the "
                f"larger of the plain path's error ({size(plain_error):.3g}) and rounding ({rounding(size):.3g}); {direction}, "
                f"{n} elements, worst at {first_index(error.abs() == error.abs().max())}")
    unit = norms["rms"](exact) or 1.0  # for an oracle of zeros, errors are absolute
    found.largest = norms["largest"](error)
    found.relative, found.plain_relative, found.bound = (
        absolute / unit for absolute in (norms["rms"](error), norms["rms"](plain_error), bounds["rms"]))
    if check_bias and n >= FEWEST_FOR_BIAS:
        stored = () if stored is None else stored if isinstance(stored, tuple) else (stored,)
        of_stored = [torch.where(finite, each.to(where).double() - oracle, 0.0) for each in stored]
        found.bias, found.used["bias"], biased = _bias(error, exact, torch.where(finite, expected - oracle, 0.0), of_stored, plain_error,
                                   ERROR_FACTOR[direction] * shared)
        found.problem = found.problem or biased
    return found


def _bias(error, exact, rounding, stored, plain, factor):
    """(the worse bias in standard errors, error / bound, None or a sentence about it). rounding: the error of the exact answer rounded
    once; stored: the errors of an intermediate rounded once; plain: the plain path's; `factor` times its mean is allowed."""
    distinct = exact[exact != 0].float().unique().numel()  # repeated values repeat one error, so they are one observation
    if distinct < FEWEST_FOR_BIAS:
        return 0.0, 0.0, None
    allowed = torch.finfo(torch.float32).eps * float(exact.square().mean().sqrt())
    rows = error.numel() // error.size(-1)
    if error.dim() > 1 and rows == 1 and not stored:
        return 0.0, 0.0, None
    worst, used, problem = 0.0, 0.0, None
    for name, signs in (("mean error", 1.0), ("mean error along the sign of the exact value", exact.sign())):
        mean, shared, *explaining = (float((t * signs).mean()) for t in (error, plain, rounding, *stored))
        shared = factor * math.copysign(max(0.0, abs(shared) - BY_CHANCE * _standard_error(plain * signs, distinct)[0]), shared)
        standard, freedom = _standard_error(error * signs, distinct)
        explained = min(max(mean, min(0.0, shared, *explaining)), max(0.0, shared, *explaining))
        beyond = mean - explained
        bound = _student(STANDARD_ERRORS, freedom) * standard + allowed
        if error.dim() > 1 and rows < FEWEST_MEANS and not stored:
            means = (error * signs).reshape(rows, -1).mean(1)
            bound = max(bound, _student(STANDARD_ERRORS, rows - 1) * float(means.var() / rows)**0.5 + allowed)
        used = max(used, abs(beyond) / max(bound, 1e-300))
        worst = max(worst, beyond / max(standard, 1e-300), key=abs)
        if abs(beyond) > bound and problem is None:
            problem = (f"biased. {name} {mean:.3g}, of which rounding once and the plain path explain {explained:.3g}; the rest is "
                       f"{abs(beyond) / max(standard, 1e-300):.1f} standard errors from 0 (bound {bound:.3g}, {distinct} "
                       "distinct values)")
    return worst, used, problem


def _standard_error(signed, distinct):
    """(standard error of the mean of errors (..., C), of which `distinct` differ; its degrees of freedom).

    Let an error be the sum of three independent parts, of its row, of its column and of its own, with variances r, c and e. The
    mean over R rows and C columns has the variance r/R + c/C + e/RC. The variance of the row means, divided by R, is r/R + e/RC;
    that of the column means, divided by C, is c/C + e/RC; that of all elements, divided by RC, is (r + c + e)/RC, or nearly
    e/RC. So the estimate is the last, plus the excess of each of the others over it. Fewer than 8 means give no useful variance. The
    degrees of freedom of a sum of variances are those of Welch and Satterthwaite.
    """
    grid = signed.reshape(-1, signed.size(-1))
    elements = float(grid.var()) / grid.numel()
    parts = [(float(grid.var()) / distinct, distinct - 1)]
    parts += [(max(0.0, float(means.var()) / means.numel() - elements), means.numel() - 1)
              for means in (grid.mean(1), grid.mean(0)) if means.numel() >= FEWEST_MEANS]
    variance = sum(part for part, _ in parts)
    return math.sqrt(variance), variance**2 / max(sum(part**2 / freedom for part, freedom in parts), 1e-300)


def _student(z, freedom):
    """t of Student's distribution that has the tail of z of the normal one, after D. L. Wallace, Bounds on normal approximations to
    Student's and the chi-square distributions, 1959: z = (8f + 1) / (8f + 3) sqrt(f log(1 + t^2 / f))."""
    freedom = max(freedom, 1.0)
    return math.sqrt(freedom * math.expm1((z * (8 * freedom + 3) / (8 * freedom + 1))**2 / freedom))


def _observations(errors):
    """The number n of independent normal errors whose mean square would be as certain as this one: its variance is 2/n of its square.
    At least FEWEST_OBSERVATIONS."""
    if errors.numel() <= FEWEST_OBSERVATIONS:
        return FEWEST_OBSERVATIONS
    squares = errors.square()
    standard, _ = _standard_error(squares, squares.numel())
    if standard == 0.0:     # all errors are equal, or 0: there is no scatter
        return math.inf
    ratio = float(squares.mean()) / standard
    return max(2 * ratio * ratio, FEWEST_OBSERVATIONS)


def _largest_by_chance(rms, exact):
    """`_largest_of` errors whose standard deviation is `rms`, and larger in proportion for elements above their own root mean square."""
    sizes = exact.abs() / max(float(exact.square().mean().sqrt()), 1e-300)
    return rms * _largest_of(sizes.clamp(min=1.0))


def _largest_of(deviations):
    """T for which the tails beyond T of normal errors of these standard deviations, one per element, sum to TAILS. Elements go into 64 bins
    by size; each counts as its bin's largest."""
    top = float(deviations.max())
    if top == 0.0:
        return 0.0
    counts = torch.histc((deviations / top).float(), 64, 0.0, 1 + 1e-6).double().cpu()
    sizes = torch.linspace(0.0, 1.0, 65, dtype=torch.float64)[1:]
    below, above = 0.0, 40.0
    for _ in range(50):
        middle = (below + above) / 2
        beyond = float((counts * torch.special.erfc(middle / 2**0.5 / sizes)).sum())
        below, above = (middle, above) if beyond > TAILS else (below, middle)
    return top * above


def in_order(count, squares, total):
    """The root mean square error of adding `count` fp32 numbers one after the other: `measure`'s `summed`, fp64 of squares' shape.

    squares: the sum of their squares. total: the exact sum. Each partial sum is rounded once, at its own size. The k-th, of terms
    in random order, has a mean square of about squares * k / count + (total * k / count)^2; the sum over k, times eps^2 / 12.
    """
    return torch.finfo(torch.float32).eps / 12**0.5 * (count / 2 * squares.double() + count / 3 * total.double().square()).sqrt()


def first_index(mask):
    """The index of the first True, as a tuple."""
    return tuple(mask.nonzero()[0].tolist())
