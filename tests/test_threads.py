"""Our commands let OpenMP's threads sleep while they wait, before torch is loaded, and leave alone what a user has set."""
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanogpt_fast import threads

# A command that prints what a real one would find when it begins, and loads the OpenMP that it is told to.
PROBE = """
import ctypes, os, sys
from nanogpt_fast import cli, options, threads
def probe(argv):
    print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules, "|", threads.about())
    for path in argv:
        ctypes.CDLL(path)
options.probe = probe
cli.COMMANDS[sys.argv[1]] = ("options", "probe", "")
sys.exit(cli.main(sys.argv[1:]))
"""


def run(*argv, **environment):
    """(what the probe printed, what it wrote to stderr)."""
    kept = {name: value for name, value in os.environ.items() if name not in threads.VARIABLES}
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_threads_are_told_to_sleep_before_torch_is_loaded():
    printed, _ = run("train")
    assert printed.startswith("passive False | sleep while they wait (OMP_WAIT_POLICY=passive")


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "1000"), ("KMP_BLOCKTIME", "200")])
def test_what_the_user_has_set_stays(name, value):
    printed, _ = run("train", **{name: value})
    assert printed == f"{value if name == 'OMP_WAIT_POLICY' else None} False | wait as the environment says: {name}={value}"


def test_the_benchmarks_measure_with_openmps_default():
    printed, _ = run("bench")
    assert printed.startswith("None False | spin while they wait, OpenMP's default")


OPENMP = [str(path) for path in Path(find_spec("torch").origin).parent.glob("lib/libgomp*.so*")]


@pytest.mark.skipif(not OPENMP, reason="this PyTorch has another OpenMP than GNU's, which prints other words")
def test_pytorchs_openmp_reads_it():
    _, shown = run("train", OPENMP[0], OMP_DISPLAY_ENV="verbose")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown and "GOMP_SPINCOUNT = '0'" in shown
