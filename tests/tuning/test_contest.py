"""The rule by which an entry replaces what is in force: clearly faster, or nothing changes."""
import random
import re

import pytest
import torch

from nanogpt_fast.kernels.fastest import Row
from nanogpt_fast.tuning import contest as rules
from nanogpt_fast.tuning.contest import UNTUNED, Contest


def noisy(median, noise, seed, n=15):
    """n times around `median`, within this share of it."""
    draw = random.Random(seed)
    return [median * (1 + noise * draw.uniform(-1, 1)) for _ in range(n)]


def contest(samples, **more):
    """A contest with these samples, and the fastest's and UNTUNED's once more."""
    entries = {label: (Row("mlp forward", label),) for label in samples if label != UNTUNED}
    return Contest("a", "a", None, None, None, entries, torch.bfloat16, samples=samples, **{"again": samples, **more})


def test_the_clearly_fastest_wins():
    samples = {UNTUNED: noisy(100e-6, 0.05, 0), "hopper": noisy(60e-6, 0.05, 1), "epilogue": noisy(80e-6, 0.05, 2), "slow": noisy(300e-6, 0.05, 3)}
    found = contest(samples, calls=12)
    assert found.winner == "hopper" and found.runner_up[0] == "epilogue"
    assert found.gain == pytest.approx(12 * 40e-6, rel=0.1)
    row, = found.rows()
    assert row.use == "hopper" and row.basis == "measured" and row.note.startswith("measured here: hopper ") and ", epilogue " in row.note
    assert contest(samples, never=frozenset(("hopper",))).winner == "epilogue"


def test_a_tie_keeps_what_runs():
    samples = {UNTUNED: noisy(100e-6, 0.02, 0), "other": noisy(99.5e-6, 0.02, 1)}
    assert contest(samples).winner == UNTUNED and contest(samples).rows() == [] and contest(samples).gain == 0
    kept, = contest(samples, now="cpp", kept=(Row("mlp", "cpp"),)).rows()
    assert kept.use == "cpp" and kept.note.startswith("measured here: cpp 1") and ", other " in kept.note
    exact = {UNTUNED: [100e-6] * 15, "other": [99.5e-6] * 15}        # no noise, and no gain worth a row
    assert contest(exact).winner == UNTUNED
    assert contest({UNTUNED: [100e-6] * 15, "other": [98e-6] * 15}).winner == "other"


def test_noise_does_not_flip_a_choice():
    """Twelve entries that are all as fast as what runs: none may win by luck."""
    lucky = 0
    for seed in range(300):
        samples, again = ({label: noisy(100e-6, 0.3, 1000 * seed + start + i) for i, label in enumerate([UNTUNED, *map(str, range(12))])}
                          for start in (0, 500))
        found = contest(samples, again=again)
        lucky += found.fastest != UNTUNED
        assert found.winner == UNTUNED
    assert 0 < lucky < 10       # so it is the second time that decides


def test_what_wins_once_must_win_again():
    samples = {UNTUNED: [100e-6] * 15, "other": [50e-6] * 15}
    assert contest(samples).winner == "other"
    assert contest(samples, again={UNTUNED: [100e-6] * 15, "other": [100e-6] * 15}).winner == UNTUNED
    assert contest(samples, again={}).winner == UNTUNED         # the time was up


def test_few_samples_decide_nothing():
    assert contest({UNTUNED: [100e-6] * 15, "other": [50e-6] * (rules.FEWEST - 1)}).winner == UNTUNED
    assert contest({UNTUNED: [], "other": []}).winner == UNTUNED and contest({}).winner == UNTUNED


def test_the_hopeless_are_not_timed_further():
    assert rules.hopeless({UNTUNED: [5.0] * 3, "a": [1.0] * 3, "b": [1.4] * 3, "c": [1.6, 1.0, 1.7], "d": []}) == {"c"}


@pytest.mark.parametrize("result, reason", (
    (lambda t: t["x"] + 1e-3, None), (lambda t: t["x"] * 1.1, "wrong: result 0 is 0.1 off"), (lambda t: t["x"] * float("nan"), "wrong: result 0 is nan off"),
    (lambda t: t["x"][:1], r"wrong: result 0 has shape \(1, 8\), expected \(4, 8\)")))
def test_a_wrong_result_is_named(result, reason):
    found = Contest("a", "a", None, lambda t: (result(t),), None, {}, torch.bfloat16)
    x = torch.randn(4, 8)
    why = rules.check(found, UNTUNED, {"x": x}, (x,))
    if reason is None:
        assert why is None
    else:
        assert re.match(reason, why), why
