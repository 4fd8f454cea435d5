"""Time the entries of a contest that were found right: in turns, the hopeless ones only a few times."""
import functools
import time

import torch

from ..bench import measure
from ..kernels import fastest
from . import contest as rules

FIRST, ROUNDS = 3, 30       # rounds of all entries; of those with hope left, if the time suffices


def time_contest(contest, labels, cuda, until):
    """Fill in contest.samples and contest.again for these labels, and contest.failed for those that end in an error. until: a time.monotonic()."""
    inputs, runs = contest.make(), {}
    for label in labels:
        run = functools.partial(_run, contest.run, dict(inputs), fastest.Table([*contest.entries[label], *fastest.in_force().rows]))
        try:
            run()
            if cuda:
                torch.cuda.synchronize()
            runs[label] = run
        except Exception as error:      # of memory, say, which the other entries hold
            contest.failed[label] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
    if rules.UNTUNED not in runs or len(runs) < 2:
        return
    timed = functools.partial(measure.interleaved_on_gpu if cuda else measure.interleaved, warmup=1)
    latest = until - (until - time.monotonic()) / 4
    contest.samples = timed(runs, FIRST, until=latest)
    left = runs.keys() - rules.hopeless(contest.samples)
    for label, values in timed({label: run for label, run in runs.items() if label in left}, ROUNDS - FIRST, seed=1, until=latest).items():
        contest.samples[label] += values
    if contest.fastest != rules.UNTUNED:
        contest.again = timed({label: runs[label] for label in (rules.UNTUNED, contest.fastest)}, ROUNDS, seed=2, until=until)


def _run(run, inputs, table):
    before = fastest.enforce(table)
    try:
        return run(inputs)
    finally:
        fastest.enforce(before)


def steps_in_turns(make, tables, rounds, cuda, until):
    """{name: [seconds]} of a training step under each of the tables {name: Table}, in turns. make() returns the step, a function.

    On a GPU a step is built anew for each turn, since it is captured under one table, and two may not fit side by side.
    """
    if not cuda:
        step = make()
        return measure.interleaved({name: functools.partial(_run, lambda _: step(), None, table) for name, table in tables.items()},
                                   rounds, warmup=2, until=until)
    samples = {name: [] for name in tables}
    for turn in range(2):
        for name, table in tables.items():
            if turn and time.monotonic() > until:
                return samples
            step = _run(lambda _: make(), None, table)
            samples[name] += measure.interleaved({name: functools.partial(_run, lambda _, step=step: step(), None, table)}, rounds, warmup=5)[name]
            step = None
            torch.cuda.empty_cache()
    return samples
