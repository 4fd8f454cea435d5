"""One contest: entries that do the same work, their times, and the rule by which one of them replaces what is in force."""
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..kernels import fastest

UNTUNED = "as it is"        # the entry without rows: what `auto` takes untuned
FEWEST = 5                  # samples of an entry that may win
LEAST_GAIN = 0.01           # a smaller one is not worth a row
HOPELESS = 1.5              # times the best median after the first rounds: not timed further

# Relative L2 distance from plain PyTorch in the same dtype that counts as right: both round, half precision to 8 or 11 bits. The error rule
# of `nanogpt-fast verify` is sharper, but needs float64 results.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}


@dataclass
class Contest:
    """What competes: `entries` {label: Rows that make `run` take it}; the Rows of the winner are what is kept.

    make() draws the inputs, a dict; run(inputs) does the work once and returns its results, a tuple of tensors; expected(inputs)
    returns plain PyTorch's. An entry has its own copy of the dict, where `run` may keep what it needs only once, such as a graph.
    """
    name: str                       # in the file: with the shape
    title: str                      # on the screen
    make: Callable
    run: Callable
    expected: Callable
    entries: dict
    dtype: torch.dtype              # in which it computes
    current: Callable = lambda: ""  # the label of what UNTUNED is at the moment
    now: str = ""                   # that, when the contest began
    kept: tuple = ()                # the Rows of the entry that says so, for `explain`
    calls: int = 1                  # of this work in a training step
    never: frozenset = frozenset()  # labels shown beside the others that cannot win here
    unlike: frozenset = frozenset() # labels that draw other random numbers than `expected`
    samples: dict = field(default_factory=dict)     # {label: [seconds]}
    again: dict = field(default_factory=dict)       # the same of UNTUNED and the fastest alone, timed again
    failed: dict = field(default_factory=dict)      # {label: why it was not timed}

    def __post_init__(self):
        self.entries = {UNTUNED: (), **self.entries}

    def begin(self):
        """Find out what UNTUNED is, with what was decided so far: an entry that says the same is left out."""
        self.now = self.current()
        self.kept = self.entries.pop(self.now, ()) if self.now not in self.never else ()

    @property
    def choice(self):
        """Whether there is something to choose: an entry that is not what runs already."""
        return bool(self.entries.keys() - {UNTUNED, self.current()})

    @property
    def decided(self):
        """Whether there was time enough: for UNTUNED, and for the fastest to win again."""
        return len((self.samples if self.fastest == UNTUNED else self.again).get(UNTUNED, ())) >= FEWEST

    @property
    def medians(self):
        return {label: statistics.median(values) for label, values in self.samples.items() if values}

    @property
    def winner(self):
        """The label of what should run from now on: what won, and won again. One of many may win by luck once."""
        first = self.fastest
        return first if first == UNTUNED or first in self.again and winner(self.again, self.never) == first else UNTUNED

    @property
    def fastest(self):
        """The label of what won the first time."""
        return winner(self.samples, self.never) if self.samples.get(UNTUNED) else UNTUNED

    @property
    def runner_up(self):
        """(label, seconds) of the fastest entry beside the winner, or None."""
        others = {label: seconds for label, seconds in self.medians.items() if label != self.winner}
        return min(others.items(), key=lambda item: item[1], default=None)

    @property
    def gain(self):
        """Seconds a step that the winner saves."""
        return self.calls * (self.medians[UNTUNED] - self.medians[self.winner]) if self.medians else 0.0

    def named(self, label):
        """The label for people: what UNTUNED is."""
        return self.now or label if label == UNTUNED else label

    def rows(self):
        """The winner's Rows, with what was measured."""
        if not self.medians:
            return []
        second = "" if self.runner_up is None else f", {self.named(self.runner_up[0])} {microseconds(self.runner_up[1])}"
        note = f"measured here: {self.named(self.winner)} {microseconds(self.medians[self.winner])}{second}"
        return [row._replace(basis="measured", note=note) for row in (self.kept if self.winner == UNTUNED else self.entries[self.winner])]

    def record(self):
        """For the file."""
        return {"name": self.name, "winner": self.winner, "now": self.now, "samples": rounded(self.samples), "again": rounded(self.again),
                "failed": self.failed, "rows": [fastest.to_json(row) for row in self.rows()]}


def winner(samples, never=frozenset()):
    """The label of the fastest entry if it clearly beats UNTUNED, else UNTUNED. samples: {label: [seconds]}.

    Clearly: three quarters of its samples are below three quarters of UNTUNED's, so that noise does not flip a choice and a tie changes
    nothing, and its median is at least LEAST_GAIN lower.
    """
    low = quartile(samples[UNTUNED], 1)
    medians = {label: statistics.median(values) for label, values in samples.items()
               if label not in never and len(values) >= FEWEST and quartile(values, 3) < low}
    best = min(medians, key=medians.get, default=UNTUNED)
    return best if best != UNTUNED and medians[best] < (1 - LEAST_GAIN) * statistics.median(samples[UNTUNED]) else UNTUNED


def rounded(samples):
    return {label: [round(value, 9) for value in values] for label, values in samples.items()}


def quartile(values, number):
    return statistics.quantiles(values, n=4)[number - 1] if len(values) > 1 else values[0]


def hopeless(samples):
    """Labels whose times so far leave no hope; never UNTUNED."""
    medians = {label: statistics.median(values) for label, values in samples.items() if values}
    best = min(medians.values(), default=0.0)
    return {label for label, seconds in medians.items() if label != UNTUNED and seconds > HOPELESS * best}


def check(contest, label, inputs, expected):
    """None if an entry's results are right, else what is wrong with them. expected: plain PyTorch's results on the same inputs."""
    with fastest.trial(contest.entries[label]):
        results = contest.run(dict(inputs))
    for i, (result, right) in enumerate(zip(results, expected, strict=True)):
        if result.shape != right.shape:
            return f"wrong: result {i} has shape {tuple(result.shape)}, expected {tuple(right.shape)}"
        if (contest.current() if label == UNTUNED else label) in contest.unlike:
            if not result.isfinite().all():
                return f"wrong: result {i} is not finite"
            continue
        error = ((result.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30)).item()
        if not error < TOLERANCE[contest.dtype]:
            return f"wrong: result {i} is {error:.2g} off, relatively; allowed {TOLERANCE[contest.dtype]:g}"
    return None


def microseconds(seconds):
    micros = 1e6 * seconds
    return f"{micros:,.0f} us" if micros >= 100 else f"{micros:.1f} us"
