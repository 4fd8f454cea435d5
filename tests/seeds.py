"""How near do tests come to failing by chance? `pytest tests/ops/test_layer_norm_cpu.py --seeds 2000` (conftest.py) calls each test so often.

Each call has other random numbers: torch.manual_seed is called right before it, and what the test or a generator of its own seeds inside
stays as it is. A test that calls `error_rule.measure` is told in the summary, with how often it failed and the largest part of each bound
that a result took; one that does not is called once.
"""
import sys

import pytest
import torch

from nanogpt_fast.checks import error_rule

FIRST = 10**6   # far from the seeds in tests


class Seeds:
    """The plugin. times: how often."""

    def __init__(self, times):
        self.times, self.measured, self.rows = times, [], []

    def pytest_collection_modifyitems(self):
        """Let every module that imported `measure` keep here what it returns."""
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
        terminalreporter.section(f"{self.times} seeds: the part of its bounds that the largest error took; above 1 it failed")
        for _, failed, _, name, largest in sorted(self.rows, reverse=True):
            parts = "  ".join(f"{part} {used:.2f}" for part, used in largest.items())
            terminalreporter.line(f"{failed:>5} failed  {parts}  {name}")
        terminalreporter.line(f"{len(self.rows)} tests, {sum(row[2] for row in self.rows)} measurements, {sum(row[1] for row in self.rows)} failed")
