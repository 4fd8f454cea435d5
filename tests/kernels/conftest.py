"""What every kernel test gets: the interpreter made right for bf16, the device, and a seed that differs in each run.

A failure prints its seed; NANOGPT_FAST_SEED=<seed> draws the same inputs again.
"""
import os
import random
import zlib

import pytest

# Triton 3.9 warns that fused multiply-adds will no longer be the default. Results are compared here, so say which.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import harness  # noqa: E402  (after the environment is set: Triton reads it when it is imported)
import torch  # noqa: E402


def pytest_configure(config):
    os.environ.setdefault("NANOGPT_FAST_SEED", str(random.SystemRandom().randrange(2**31)))  # workers of xdist inherit it
    if (problem := harness.interpreter_problem()) is not None:
        pytest.exit(problem, returncode=1)
    harness.install_interpreter_patches()


def pytest_report_header(config):
    return f"NANOGPT_FAST_SEED={os.environ['NANOGPT_FAST_SEED']} draws this run's random inputs again"


@pytest.fixture
def device():
    """The device on which kernels execute: the GPU, or the CPU under the interpreter."""
    return harness.DEVICE


@pytest.fixture(autouse=True)
def fresh_random_inputs(request):
    """Seed torch from the run's seed and the test's name, so that tests may run in any order or alone."""
    torch.manual_seed(int(os.environ["NANOGPT_FAST_SEED"]) + zlib.crc32(request.node.nodeid.encode()))
