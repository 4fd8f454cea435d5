"""TRITON_INTERPRET: we read it as Triton does, in any of its spellings, so that interpreted kernels never run without our patches."""
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
PROGRAM = ("import triton; from nanogpt_fast import backend; from nanogpt_fast.kernels import interpreter; "
           "print(triton.knobs.runtime.interpret, backend.interpreted(), interpreter.INTERPRETED)")


@pytest.mark.parametrize("spelling, interprets", [("true", True), ("YES", True), ("y", True), ("0", False)])
def test_every_spelling_means_to_us_what_it_means_to_triton(spelling, interprets):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], env={**os.environ, "TRITON_INTERPRET": spelling}, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == [str(interprets)] * 3
