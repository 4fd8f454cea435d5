"""`python -m benchmarks.count`: what a training step launches and moves on an H100, so that no change adds to it unnoticed."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="the count needs a PyTorch built for CPUs")
ROOT = Path(__file__).parents[2]

# The step of 64 sequences of GPT-2 124M, and of the baby GPT: (launches, GB without the matmuls' own, TFLOP). If a change of yours moves
# them, `python -m benchmarks.count --operations` shows where; write the new figures here and into the commit's message.
COUNTS = {
    "--who trainer": (315, 68.69, 52.92),
    "--who import": (405, 77.85, 52.92),
    "--who trainer --model baby": (158, 3.93, 1.11),
    "--who trainer --batch_size 12 --accumulation 2": (638, 29.39, 19.84),
    "--who trainer --compiled": (332, 68.93, 52.92),
    "--who import --compiled": (402, 77.11, 52.92),
    "--who nanogpt --compiled": (442, 107.4, 52.92),
}
QUICK = "--who trainer"


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "benchmarks.count", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=600)


@pytest.mark.parametrize("arguments", [pytest.param(a, marks=() if a == QUICK else pytest.mark.slow) for a in COUNTS])
def test_a_step_moves_no_more_than_it_did(arguments, tmp_path):
    done = command(*arguments.split(), "--json", str(tmp_path / "count.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "count.json").read_text())
    launches, gigabytes, teraflops = COUNTS[arguments]
    assert found["launches"] == pytest.approx(launches, rel=0.01)
    assert found["bytes"] / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert found["flops"] / 1e12 == pytest.approx(teraflops, rel=0.01)
    if arguments == QUICK:      # the profile of docs/gpu.md stands beside it
        assert "107.06" in done.stdout and "Measured: a profile" in done.stdout


@pytest.mark.parametrize("arguments, environment, words", [
    (["--batch_size", "0"], {}, "expected at least 1"),
    (["--accumulation", "2", "--who", "import"], {}, "--accumulation is 2; expected at least 1, and 1 with --who=import"),
    ([], {"CXX": "no-such-compiler"}, "needs a C++ compiler, and there is no no-such-compiler; set CXX"),
])
def test_what_is_missing_is_said_in_one_line(arguments, environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = command(*arguments)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr
