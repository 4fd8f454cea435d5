"""A run that is killed and resumed equals one that was never killed: kills.py, between any two file-system calls and at random times."""
import os
import subprocess
import sys
from pathlib import Path

import kills
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")


def killed(tmp_path, *how):
    """The number of kills; fails if anything was wrong after one."""
    done = subprocess.run([sys.executable, kills.__file__, str(tmp_path), *how], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(kills.__file__).parents[1]), *sys.path])})
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split(" kills, 0 wrong")[0].split()[-1])


def test_a_kill_around_the_renames_of_a_save_loses_nothing_and_resumes_exactly(tmp_path):
    assert killed(tmp_path, "renames") == 6


@pytest.mark.slow
def test_a_kill_before_any_file_system_call_loses_nothing_and_resumes_exactly(tmp_path):
    assert killed(tmp_path, "calls") > 100


@pytest.mark.slow
def test_200_kills_at_random_times_lose_nothing_and_resume_exactly(tmp_path):
    assert killed(tmp_path, "random", "200") == 200


@pytest.mark.slow
@pytest.mark.parametrize("how, times", [("calls", 0), ("random", 100)])
def test_kills_of_a_run_with_shards_lose_nothing_and_resume_exactly(how, times, tmp_path):
    assert killed(tmp_path, how, str(times), "sharded") >= (times or 50)
