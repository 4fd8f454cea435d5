"""Which half of the suite this process runs.

Triton decides when a kernel is decorated whether to interpret it, so without a GPU the suite needs two processes:

    pytest tests                                everything that does not execute a Triton kernel
    TRITON_INTERPRET=1 pytest tests/kernels     the tests that do, in Triton's interpreter

With a CUDA GPU both halves run in one process, on the GPU. `make test` runs both halves.
"""
import os

import pytest
import seeds
import torch

os.environ["NANOGPT_FAST_TUNED"] = "off"        # what was measured here decides no test

EXECUTES_KERNELS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if EXECUTES_KERNELS else ["kernels/*"]


def pytest_report_header(config):
    if torch.cuda.is_available():
        return f"kernels: on {torch.cuda.get_device_name()}"
    return "kernels: " + ("in Triton's interpreter" if EXECUTES_KERNELS else "not executed here (TRITON_INTERPRET=1 pytest tests/kernels does)")


def pytest_addoption(parser):
    parser.addoption("--seeds", type=int, default=0, metavar="N", help="run each test that uses error_rule.py with N seeds, and report "
                     "how many runs fail and how close the others come to their bounds")
    parser.addoption("--spread", action="store_true", help="spread the N seeds over the cases of a parametrised test: N calls in all")
    parser.addoption("--seconds", type=float, default=float("inf"), metavar="S", help="with --seeds: begin no call of a test after S seconds of it")
    parser.addoption("--all", action="store_true", help="also run the tests marked slow (`make test-all`)")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        skip = pytest.mark.skip(reason="slow: runs in `make test-all`")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def pytest_configure(config):
    if times := config.getoption("--seeds"):
        config.pluginmanager.register(seeds.Seeds(times, config.getoption("--spread"), config.getoption("--seconds")))
