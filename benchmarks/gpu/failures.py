"""A pytest plugin (`-p benchmarks.gpu.failures`): every failure's text is in a file the moment it is had.

`-q` prints tracebacks when all is over; a run that is ended before has none. NANOGPT_FAST_FAILURES names the file. A GPU whose
context an error has destroyed fails every later test of its process: that worker leaves, and xdist starts another.
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
    if not os.environ.get("PYTEST_XDIST_WORKER"):           # the one that hears of all
        with open(os.environ.get("NANOGPT_FAST_FAILURES", "failures.txt"), "a", encoding="utf-8") as f:
            f.write(f"==== {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{text[-6000:]}\n\n")
    if any(words in text for words in DEAD):
        _state["dead"] = True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if _state["dead"] and os.environ.get("PYTEST_XDIST_WORKER"):
        time.sleep(0.5)                                     # the report is on its way
        os._exit(3)
