"""How close tests come to failing by chance: `pytest tests/ops/test_layer_norm_cpu.py --seeds 2000` calls each test 2,000 times.

Each call gets other random numbers, since torch.manual_seed runs right before it with another seed; a test that seeds for itself, or has
a generator of its own, repeats its numbers. The summary lists each test that calls `error_rule.measure`, with how often it failed and the
largest error / bound of each part of the rule. Other tests run once. With --spread the cases of a parametrised test share the seeds, and the
summary has a line for each test. With --seconds a slow test ends before all its seeds; the summary says after how many.
"""
import collections
import sys
import time

import pytest
import torch

from nanogpt_fast.checks import error_rule

FIRST = 10**6   # the first seed, far from those in tests


class Seeds:
    """The pytest plugin. times, seconds: how many calls of each test, and for how long; if `spread`, of all cases of a test together."""

    def __init__(self, times, spread, seconds):
        self.times, self.spread, self.seconds, self.measured, self.rows = times, spread, seconds, [], {}

    @pytest.hookimpl(trylast=True)      # when it is known which cases run
    def pytest_collection_modifyitems(self, items):
        """Replace `measure` in every module that imported it by one that also stores its results here."""
        def kept(*args, rule=error_rule.measure, **options):
            self.measured.append(rule(*args, **options))
            return self.measured[-1]
        for module in list(sys.modules.values()):
            if module is not error_rule and getattr(module, "measure", None) is error_rule.measure:
                module.measure = kept
        cases, before = collections.Counter(map(self._test, items)), collections.Counter()
        self.plan = {}                  # {case: (its first seed, how many, seconds)}
        for item in items:
            test = self._test(item)
            times = -(-self.times // cases[test])
            self.plan[item.nodeid] = FIRST + before[test] * times, times, self.seconds / cases[test]
            before[test] += 1

    def _test(self, item):
        return item.nodeid.partition("[")[0] if self.spread else item.nodeid

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        failed, largest, measurements, calls = [], {}, 0, 0
        first, times, seconds = self.plan[pyfuncitem.nodeid]
        end = time.perf_counter() + seconds
        for seed in range(first, first + times):
            if calls and time.perf_counter() > end:
                break
            calls += 1
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
            row = self.rows.setdefault(self._test(pyfuncitem), dict(failed=0, calls=0, measurements=0, largest={}))
            row["failed"], row["calls"] = row["failed"] + len(failed), row["calls"] + calls
            row["measurements"] += measurements
            for part, used in largest.items():
                row["largest"][part] = max(used, row["largest"].get(part, 0.0))
        if failed:
            pytest.fail(f"{len(failed)} of {calls} fail; {failed[0]}", pytrace=False)
        return True

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f"{self.times} seeds of each test: the largest error / bound of each part of the rule; above 1 it failed")
        for name, row in sorted(self.rows.items(), key=lambda item: -max(item[1]["largest"].values(), default=0.0)):
            parts = "  ".join(f"{part} {used:.2f}" for part, used in row["largest"].items())
            terminalreporter.line(f"{row['failed']:>5} of {row['calls']} failed  {parts}  {name}")
        total = {key: sum(row[key] for row in self.rows.values()) for key in ("measurements", "failed")}
        terminalreporter.line(f"{len(self.rows)} tests, {total['measurements']} measurements, {total['failed']} failed")
