"""When is a kernel's result right? One rule, for the tests and for `nanogpt-fast verify`.

An absolute tolerance that admits bf16's rounding also admits a wrong eps. So the error is taken against fp64 on the same
inputs, and bounded by the error that plain PyTorch makes in the same precision:

Magnitude: root mean square and largest error are each at most factor * max(plain's, rounding), factor 2 for results and 3 for
gradients. `rounding` is what rounding the exact answer once may cost (half a unit in the last place), so a plain path that
happens to be exact (a copy, one element, x of equal values) does not forbid the kernel's rounding.

Two errors of equal quality differ by luck, and a test that draws its numbers anew must not fail by it, not once in 10^6. How far luck
goes depends on how many errors are compared:

    root mean square   The logarithm of the ratio of two, each of n independent errors, scatters with a standard deviation of 1/sqrt(n)
                       (Fisher's z). Where 5.2 of them (one side, 1e-7) are more than the factor, they are the bound: below n = 58.
                       n is what counts as such: 2 (mean / standard error)^2 of the squares, rows and columns considered, since a few
                       large ones, or one rstd for a row, are few observations; of the plain path's errors or of the exact values,
                       whose roundings are as unequal as they are, whichever is less. The factor is also widened by 1 + 16/n, for all
                       elements.
    largest error      That of n errors is one of them, and often one of the few elements that are largest, whose rounding is largest;
                       the plain path's one may have been lucky. So the largest may also be as large as chance makes the largest of n
                       errors whose root mean square is the plain path's, and proportional to the element where it is above the
                       average: T, where the tails of all n beyond T, taken as normal, sum to 1e-8.
    a mean             of N numbers is a sum that was rounded up to N times on its way, as large as it then was. In order that is
                       sqrt(N/9) half units of the mean, where one rounding has sqrt(1/3): so sqrt(1 + N/3) times what one may cost.

Bias: the mean error, and the mean error in the direction of the oracle's sign (a result scaled by 1 - d has no mean error, but
this), lie within 6 standard errors of 0 (of a normal distribution; as much of Student's, where the standard error itself comes from
few rows or columns, as 8 rows' from 7 degrees of freedom), or of what rounding the exact answer once explains, or of what the plain path has.

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
from dataclasses import dataclass, field

import torch

ERROR_FACTOR = {"forward": 2.0, "gradient": 3.0}  # times the plain low-precision path's own error
STANDARD_ERRORS = 6.0  # of the signed mean error: chance passes it once in 5e8
LUCK = 5.2             # standard deviations of the logarithm of two errors' ratio: chance passes it once in 10^7
TAILS = 1e-8           # how often chance makes one of n errors larger than what is allowed to the largest
FEWEST_OBSERVATIONS = 8.0   # a plain error of fewer has no reliable size, and the ratio to it no bound that means anything
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
    used: dict = field(default_factory=dict)    # {part of the rule: how much of its bound the result takes; over 1 it is broken}
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
    luck = math.exp(LUCK / math.sqrt(min(_observations(plain_error), _observations(exact)) - 2))
    found, bounds = Measurement(), {}
    norms = {"largest": lambda t: float(t.abs().max()), "rms": lambda t: float(t.square().mean().sqrt())}
    inherited = None if cancelled is None else cancelled.to(where).double()

    def rounding(size):
        once, each = (0.5 * unit.eps * size(exact) + unit.tiny * unit.eps for unit in units)
        return max(once * math.sqrt(1 + averaged / 3 if averaged > 1 else 1), each / math.sqrt(averaged))

    def unavoidable(size):
        return max(size(plain_error), rounding(size), 0.0 if inherited is None else size(inherited))
    unlucky = luck * max(norms["rms"](plain_error), rounding(norms["rms"]))     # the plain path's rms error, drawn again, is below
    deviation = max(norms["rms"](plain_error), rounding(norms["rms"]) / math.sqrt(3), unlucky / factor if luck > factor else 0.0)
    by_chance = dict(rms=unlucky, largest=_largest_by_chance(deviation, exact))
    for name, size in norms.items():
        bounds[name] = max(slack * unavoidable(size), by_chance[name])
        found.used[name] = size(error) / max(bounds[name], 1e-300)
        if size(error) > bounds[name] and found.problem is None:
            found.problem = (
                f"{name} error {size(error):.3g} against fp64 is over {bounds[name]:.3g}, {bounds[name] / unavoidable(size):.3g} times the "
                f"larger of the plain path's error ({size(plain_error):.3g}) and rounding ({rounding(size):.3g}); {direction}, "
                f"{n} elements, worst at {first_index(error.abs() == error.abs().max())}")
    unit = norms["rms"](exact) or 1.0  # an oracle of zeros: absolute errors
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
    """(the worse bias in standard errors, None or the sentence that names it). rounding: the error of the exact answer, rounded
    once; stored: those of an intermediate rounded once; plain: the plain path's, of whose mean `factor` times are allowed."""
    distinct = exact[exact != 0].float().unique().numel()  # repeated values repeat one error: they are one observation
    if distinct < FEWEST_FOR_BIAS:
        return 0.0, 0.0, None
    allowed = torch.finfo(torch.float32).eps * float(exact.square().mean().sqrt())
    worst, used, problem = 0.0, 0.0, None
    for name, signs in (("mean error", 1.0), ("mean error along the sign of the exact value", exact.sign())):
        mean, shared, *explaining = (float((t * signs).mean()) for t in (error, plain, rounding, *stored))
        shared = factor * math.copysign(max(0.0, abs(shared) - BY_CHANCE * _standard_error(plain * signs, distinct)[0]), shared)
        standard, freedom = _standard_error(error * signs, distinct)
        explained = min(max(mean, min(0.0, shared, *explaining)), max(0.0, shared, *explaining))
        beyond = mean - explained
        bound = _student(STANDARD_ERRORS, freedom) * standard + allowed
        used = max(used, abs(beyond) / max(bound, 1e-300))
        worst = max(worst, beyond / max(standard, 1e-300), key=abs)
        if abs(beyond) > bound and problem is None:
            problem = (f"biased. {name} {mean:.3g}, of which rounding once and the plain path explain {explained:.3g}; the rest is "
                       f"{abs(beyond) / max(standard, 1e-300):.1f} standard errors from 0 (bound {bound:.3g}, {distinct} "
                       "distinct values)")
    return worst, used, problem


def _standard_error(signed, distinct):
    """(that of the mean of errors (..., C), of which `distinct` are different; its degrees of freedom).

    Let an error have a part of its row, one of its column and one of its own, independent, of variances r, c and e. The mean
    over R rows and C columns has the variance r/R + c/C + e/RC. The variance of row means, over R, is r/R + e/RC; that of
    column means, over C, is c/C + e/RC; that of all elements, over RC, is (r + c + e)/RC, or nearly e/RC. Hence the last, and
    by how much either of the others is more. Fewer than 8 means have no variance to speak of. A sum of variances has the degrees
    of freedom that Welch and Satterthwaite give it.
    """
    grid = signed.reshape(-1, signed.size(-1))
    elements = float(grid.var()) / grid.numel()
    parts = [(float(grid.var()) / distinct, distinct - 1)]
    parts += [(max(0.0, float(means.var()) / means.numel() - elements), means.numel() - 1)
              for means in (grid.mean(1), grid.mean(0)) if means.numel() >= 8]
    variance = sum(part for part, _ in parts)
    return math.sqrt(variance), variance**2 / max(sum(part**2 / freedom for part, freedom in parts), 1e-300)


def _student(z, freedom):
    """As many standard errors of Student's distribution as z of the normal one, after D. L. Wallace, Bounds on normal approximations to
    Student's and the chi-square distributions, 1959: z = (8f + 1) / (8f + 3) sqrt(f log(1 + t^2 / f))."""
    freedom = max(freedom, 1.0)
    return math.sqrt(freedom * math.expm1((z * (8 * freedom + 3) / (8 * freedom + 1))**2 / freedom))


def _observations(errors):
    """How many independent normal errors would make the mean of the squares as sure as it is here: its variance is then 2/n of its
    square. At least FEWEST_OBSERVATIONS."""
    if errors.numel() <= FEWEST_OBSERVATIONS:
        return FEWEST_OBSERVATIONS
    squares = errors.square()
    standard, _ = _standard_error(squares, squares.numel())
    if standard == 0.0:     # all alike, or none: nothing scatters
        return math.inf
    ratio = float(squares.mean()) / standard
    return max(2 * ratio * ratio, FEWEST_OBSERVATIONS)


def _largest_by_chance(rms, exact):
    """T for which the tails beyond T of normal errors, one an element, sum to TAILS. Their standard deviation is `rms`, and in proportion
    more where the element is above its own root mean square. Elements are counted in 64 sizes, each taken for its largest."""
    sizes = exact.abs() / max(float(exact.square().mean().sqrt()), 1e-300)
    top = max(float(sizes.max()), 1.0)
    counts = torch.histc(sizes.clamp(min=1.0).float(), 64, 1.0, top * (1 + 1e-6) + 1e-6).double().cpu()
    deviations = torch.linspace(1.0, top, 65, dtype=torch.float64)[1:]
    below, above = 0.0, 40 * top
    for _ in range(50):
        middle = (below + above) / 2
        beyond = float((counts * torch.special.erfc(middle / 2**0.5 / deviations)).sum())
        below, above = (middle, above) if beyond > TAILS else (below, middle)
    return rms * above


def first_index(mask):
    """The index of the first True, as a tuple."""
    return tuple(mask.nonzero()[0].tolist())
