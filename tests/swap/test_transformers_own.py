"""transformers' own tests of GPT-2 pass on accelerated models as they pass on plain ones. Needs a checkout of transformers at the
installed release, which TRANSFORMERS_DIR names: the tests are not in the package."""
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

CHECKOUT, TESTS = os.environ.get("TRANSFORMERS_DIR"), "tests/models/gpt2/test_modeling_gpt2.py"


def outcomes(folder, *plugin):
    """({test: its outcome in JUnit's words}, (modules swapped, calls on our formulas, all calls), what was printed) of their file."""
    shutil.copy(Path(__file__).parents[1] / "accelerated_gpt2.py", folder)      # here, tests/kernels would be the package "kernels" for transformers
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:warnings", f"--junitxml={folder / 'results.xml'}",
               *plugin, TESTS]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=3600, env={
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path})
    found = {case.get("name"): next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
             for case in ElementTree.parse(folder / "results.xml").iter("testcase")}
    counts = re.search(r"accelerated_gpt2: (\d+) modules, (\d+) calls of (\d+)", done.stdout)
    return found, tuple(map(int, counts.groups())) if counts else (0, 0, 0), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not CHECKOUT, reason="TRANSFORMERS_DIR names no checkout of transformers")
def test_accelerated_models_pass_what_plain_ones_pass(tmp_path):
    plain, _, printed = outcomes(tmp_path)
    assert "passed" in plain.values(), printed[-3000:]
    accelerated, (swapped, fast, calls), printed = outcomes(tmp_path, "-p", "accelerated_gpt2")
    assert swapped > 0 and fast > 0, printed[-3000:]
    print(*(f"{name}: {dict(Counter(found.values()))}" for name, found in (("plain", plain), ("accelerated", accelerated))),
          f"{swapped} modules were swapped, {fast} of {calls} calls took our formulas", sep="; ")
    assert accelerated.keys() == plain.keys()
    assert {test: outcome for test, outcome in accelerated.items() if plain[test] != outcome} == {}, printed[-20000:]
