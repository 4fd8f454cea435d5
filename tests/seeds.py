"""How close tests come to failing by chance: `pytest tests/ops/test_layer_norm_cpu.py --seeds 2000` calls each test 2,000 times.

Each call gets other random numbers, since torch.manual_seed runs right before it with another seed; a test that seeds for itself, or has
a generator of its own, repeats its numbers. The summary lists each test that calls `error_rule.measure`, with how often it failed and the
largest error / bound of each part of the rule. Other tests run once.
"""
import sys

import pytest
import torch

from nanogpt_fast.checks import error_rule

FIRST = 10**6   # the first seed, far from those in tests


class Seeds:
    """The pytest plugin. times: number of calls of each test."""

    def __init__(self, times):
        self.times, self.measured, self.rows = times, [], []

    def pytest_collection_modifyitems(self):
        """Replace `measure` in every module that imported it by one that also stores its results here."""
        def kept(*args, rule=error_rule.measure, **options):
            self.measured.append(rule(*args, **options))
            return self.measured[-1]
        for module in list(sys.modules.values()):
            if module is not error_rule and getattr(module, "measure", None) is error_rule.measure:
                module.measure = kept

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        failed, largest, measurements = [], {}, 0
        for seed in range(FIRST, FIRST + self.times):
            torch.manual_seed(seed)
            self.measured.clear()
            try:
                pyfuncitem.obj(**arguments)
            except AssertionError as error:
                failed.append(f"seed {seed}: {error}".splitlines()[0])
            measurements += len(self.measured)
            for part, used in (pair for one in self.measured for pair in one.used.items()):
                largest[part] = max(used, largest.get(part, 0.0))
            if not self.measured:
                break
        if measurements:
            self.rows.append((max(largest.values(), default=0.0), len(failed), measurements, pyfuncitem.nodeid, largest))
        if failed:
            pytest.fail(f"{len(failed)} of {self.times} fail; {failed[0]}", pytrace=False)
        return True

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f"{self.times} seeds: the largest error / bound of each part of the rule; above 1 it failed")
        for _, failed, _, name, largest in sorted(self.rows, reverse=True):
            parts = "  ".join(f"{part} {used:.2f}" for part, used in largest.items())
            terminalreporter.line(f"{failed:>5} failed  {parts}  {name}")
        terminalreporter.line(f"{len(self.rows)} tests, {sum(row[2] for row in self.rows)} measurements, {sum(row[1] for row in self.rows)} failed")
