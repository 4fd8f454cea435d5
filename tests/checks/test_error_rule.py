"""error_rule.py: two paths of equal quality and different luck pass, and faults near the size of a rounding do not.

What else the rule promises is tested beside the kernels (kernels/test_harness.py).
"""
import functools
import math

import pytest
import torch

from nanogpt_fast.checks.error_rule import _largest_by_chance, _student, in_order, measure

UNIT = 2.0 ** -23   # of fp32
SHAPES = pytest.mark.parametrize("shape", [(33, 384), (9, 100), (2, 2048), (40, 32), (64,)], ids=str)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(shape):
    return torch.randn(shape, dtype=torch.float64)


def softmaxes(shape):
    return (2 * normal(shape)).softmax(-1)


def rounded(x, times=4):
    """x after so many roundings to fp32, each of up to half a unit of the element."""
    return (x + x.abs() * UNIT * sum(torch.rand_like(x) - 0.5 for _ in range(times))).float()


def with_statistics(x):
    """`rounded`, and a factor for each row that is off by up to a unit, as a rounded 1 / std is."""
    return (rounded(x).double() * (1 + UNIT * (2 * torch.rand(*x.shape[:-1], 1, dtype=torch.float64) - 1))).float()


@SHAPES
@pytest.mark.parametrize("draw", (normal, softmaxes))
@pytest.mark.parametrize("path", (rounded, with_statistics))
def test_two_paths_of_equal_quality_pass_whatever_their_luck(path, draw, shape):
    """Before the bound on the largest error counted the elements, one of some thousand such pairs failed."""
    for _ in range(200):
        x = draw(shape)
        found = measure(path(x), x, path(x), "forward")
        assert found.problem is None and max(found.used.values()) < 0.95, found


def test_a_mean_of_many_numbers_may_have_the_error_of_its_sum():
    for _ in range(500):
        losses = (9 + torch.randn(38)).float()
        ours, plain = (functools.reduce(torch.add, losses[torch.randperm(38)]) / 38 for _ in range(2))     # cumsum adds in fp64
        assert (problem := measure(ours, losses.double().mean(), plain, "forward", averaged=38).problem) is None, problem


def test_few_sums_may_have_the_error_of_adding_their_terms_in_order():
    """Where the largest partial sum is far above the total and the plain path is lucky, the rule without `summed` fails: bias
    gradients of 4 columns did, 1 of 4,000. A sum that lacks one term is found all the same.
    """
    terms = torch.randn(20000, 128, 1) * torch.randn(20000, 1, 4) * (torch.rand(20000, 128, 4) < 0.5)
    exact, ours, plain = terms.double().sum(1), functools.reduce(torch.add, terms.unbind(1)), terms.sum(1)
    unlucky = ((ours - exact).norm(dim=1) / torch.maximum((plain - exact).norm(dim=1), UNIT * exact.norm(dim=1))).topk(50).indices
    terms, exact, ours, plain = (t[unlucky] for t in (terms, exact, ours, plain))
    summed = in_order(128, terms.double().square().sum(1), exact)
    assert any(measure(*each, "gradient").problem for each in zip(ours, exact, plain))
    for i, (out, *others) in enumerate(zip(ours, exact, plain)):
        found = measure(out, *others, "gradient", summed=summed[i])
        assert found.problem is None and max(found.used.values()) < 0.3, found
        term = terms[i, terms[i].abs().sum(1).argmax()]
        assert measure(out - term, *others, "gradient", summed=summed[i]).problem is not None


@pytest.mark.parametrize("fault", (1 + 2 * UNIT, 1 - 2 * UNIT))
def test_two_units_in_every_element_are_a_bias(fault):
    x = normal((64, 768))
    assert measure((rounded(x).double() * fault).float(), x, rounded(x), "forward").used["bias"] > 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("up", (True, False))
def test_half_a_unit_in_every_element_is_a_bias(dtype, up):
    x = normal((33, 384))
    nearest = x.to(dtype)
    out = torch.nextafter(nearest, torch.full_like(nearest, math.inf if up else -math.inf))     # to the next number instead of the nearest
    out = torch.where((nearest.double() >= x) == up, nearest, out)
    assert measure(out, x, nearest, "forward").used["bias"] > 1


def test_noise_that_is_three_times_the_plain_paths_is_too_much():
    x = normal((33, 384))
    assert measure((x + 3 * (rounded(x) - x)).float(), x, rounded(x), "forward").used["rms"] > 1


@pytest.mark.parametrize("dtype, by", ((torch.float32, 40 * UNIT), (torch.bfloat16, 0.1)), ids=str)
def test_one_wrong_element_is_found(dtype, by):
    x = normal((33, 384))
    out, plain = (rounded(x).to(dtype) for _ in range(2))
    out[5, 7] += by
    assert measure(out, x, plain, "forward").used["largest"] > 1


def test_one_wrong_row_of_many_is_found():
    x = normal((40, 384))
    out = rounded(x)
    out[7] *= 1 + 30 * UNIT
    assert measure(out, x, rounded(x), "forward").problem is not None


@pytest.mark.parametrize("freedom, t", ((7, 38.8), (19, 10.6), (39, 7.76), (1e6, 6.0)))
def test_so_many_of_students_standard_errors_are_six_normal_ones(freedom, t):
    assert _student(6.0, freedom) == pytest.approx(t, rel=0.08)


def test_the_largest_of_many_normal_errors_stays_below_what_chance_is_allowed():
    few, many = (_largest_by_chance(1.0, torch.ones(n, dtype=torch.float64)) for n in (64, 65536))
    assert 6.3 < few < many < 7.9                       # sqrt(2 log(2 n / 1e-8)), less what the tail is below that
    assert _largest_by_chance(1.0, torch.tensor([1.0] * 9999 + [100.0], dtype=torch.float64)) > 100


@pytest.mark.parametrize("off", (0.0, 0.5, 1e-30))
def test_errors_that_are_all_alike_are_no_few_observations(off):
    """An exact plain path, or one with the same error everywhere, leaves nothing to luck: two units in each element are too much."""
    x = torch.full((16, 16), 1.0, dtype=torch.float64)
    plain = (x + off * UNIT).double()
    assert measure(x.float(), x, plain, "forward", dtype=torch.float32).problem is None
    assert measure((x + 3 * UNIT).float(), x, plain, "forward", dtype=torch.float32).used["rms"] > 1
