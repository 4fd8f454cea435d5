"""The documents are true: what they link to is there, docs/hacking.md runs, and the tests that it names exist."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / folder / "README.md" for folder in ("kernels", "csrc", "benchmarks"))]
HACKING = ROOT / "docs" / "hacking.md"

# Runs the snippets of the file in argv[1] in one session; a traceback names the line of the page.
RUN = r"""
import re, sys
text, session = open(sys.argv[1], encoding="utf-8").read(), {}
for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
    exec(compile("\n" * text[:match.start(1)].count("\n") + match[1], sys.argv[1], "exec"), session)
"""


def prose(path):
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_links_to_is_there(path):
    links = re.findall(r"\]\(([^)#\s:]+)(?:#[^)\s]*)?\)", prose(path))
    assert [link for link in links if not (path.parent / link).exists()] == []
    folders = [path.parent / link for link in links if (path.parent / link).is_dir()]      # the site shows a folder as one of these
    assert [folder for folder in folders if not ((folder / "README.md").exists() or (folder / "__init__.py").exists())] == []


def test_every_snippet_of_hacking_runs_in_one_session():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("NANOGPT_FAST_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", RUN, str(HACKING)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RotaryAttention replaces CausalSelfAttention" in done.stdout and "the kernel takes float32" in done.stdout


def test_the_tests_that_hacking_tells_to_copy_exist():
    named = set(re.findall(r"`(test_\w+)`", HACKING.read_text(encoding="utf-8")))
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert len(named) >= 5 and named <= there


@pytest.mark.parametrize("name, file", sorted(set(re.findall(r"\[`(\w+)`\]\(\.\./([\w/.]+)\)", prose(HACKING)))))
def test_a_function_that_hacking_names_is_in_that_file(name, file):
    assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
