"""The cases of cases.py under pytest-benchmark, for browsing; published figures come from benchmarks.run.

    pytest benchmarks --benchmark-group-by=group                     everything; add -k attention for one op
    NANOGPT_FAST_QUICK=1 pytest benchmarks                           tiny shapes, to try it

A group is a case, its rows are the implementations. Times are of the host's clock, with the GPU synchronised in each call.
"""
import os

import pytest
import torch

from nanogpt_fast.bench.cases import cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases(DEVICE.type, quick=bool(os.environ.get("NANOGPT_FAST_QUICK")))


@pytest.mark.parametrize("case, name", [pytest.param(case, name, id=f"{case.name} {name}") for case in CASES
                                        for name in case.implementations])
def test_time(case, name, benchmark):
    runs, absent = case.runs(DEVICE, [name])
    if absent:
        pytest.skip(absent[name])
    run = runs[name]

    def call():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    benchmark.group = case.name
    benchmark.name = name  # the row's name; the group's is the case
    benchmark.pedantic(call, rounds=20, warmup_rounds=2)
