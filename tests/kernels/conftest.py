"""What every kernel test gets: an interpreter patched for bf16, the device, and a seed that differs in each run.

The report's header prints the seed; NANOGPT_FAST_SEED=<seed> draws the same inputs again.
"""
import os
import random
import zlib

import pytest

# Triton 3.9 warns that fused multiply-adds will no longer be the default. These tests compare results, so they set it explicitly.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import harness  # noqa: E402  (after the environment is set, which Triton reads at import)
import torch  # noqa: E402


def pytest_configure(config):
    os.environ.setdefault("NANOGPT_FAST_SEED", str(random.SystemRandom().randrange(2**31)))  # workers of xdist inherit it
    if (problem := harness.interpreter_problem()) is not None:
        pytest.exit(problem, returncode=1)
    harness.install_interpreter_patches()


def pytest_collection_modifyitems(config, items):
    """NANOGPT_FAST_EXAMPLES=n, for when time is short, keeps at most n cases of each parametrised test, spread over its list: on a GPU
    nearly every case compiles a kernel or two."""
    if not (most := int(os.environ.get("NANOGPT_FAST_EXAMPLES", 0))):
        return
    cases = {}
    for item in items:
        if item.path.parent.name == "kernels" and "slow" not in item.keywords:
            cases.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    left_out = set()
    for listed in cases.values():
        kept = {listed[(2 * i + 1) * len(listed) // (2 * most)] for i in range(most)} if len(listed) > most else set(listed)
        left_out.update(set(listed) - kept)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


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
