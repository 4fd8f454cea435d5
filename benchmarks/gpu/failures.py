"""A pytest plugin (`-p benchmarks.gpu.failures`): writes each failure's text to a file at once.

`-q` prints tracebacks at the end of the run, so an interrupted run has none. NANOGPT_FAST_FAILURES names the file. Once an error has
destroyed the GPU context, every later test of that process fails: the worker exits, and xdist starts another.
"""
import os
import time

import pytest

DEAD = ("an illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure",
        "illegal instruction")
_state = {"dead": False}


def pytest_runtest_logreport(report):
    if not report.failed:
        return
    text = report.longreprtext
    if not os.environ.get("PYTEST_XDIST_WORKER"):           # the controller, which receives every report
        with open(os.environ.get("NANOGPT_FAST_FAILURES", "failures.txt"), "a", encoding="utf-8") as f:
            f.write(f"==== {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{text[-6000:]}\n\n")
    if any(words in text for words in DEAD):
        _state["dead"] = True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if _state["dead"] and os.environ.get("PYTEST_XDIST_WORKER"):
        time.sleep(0.5)                                     # time for the report to arrive
        os._exit(3)
