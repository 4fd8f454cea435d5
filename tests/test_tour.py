"""docs/tour.md is true: its snippets run, its pictures are there, and what it links to and quotes exists."""
import ast
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TOUR = (DOCS / "tour.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", TOUR, flags=re.DOTALL | re.MULTILINE)


def test_every_snippet_runs_in_one_session(capsys):
    session = {}
    for match in re.finditer(r"^```python\n(.*?)^```$", TOUR, re.DOTALL | re.MULTILINE):
        line = TOUR[:match.start(1)].count("\n")  # so that a traceback names the line of the page
        exec(compile("\n" * line + match[1], "docs/tour.md", "exec"), session)
    written = capsys.readouterr().out
    assert written.count("after '") == 4 and "the cat sat on " in written


@pytest.mark.parametrize("name, file", sorted(set(re.findall(r"\[`(\w+)`\]\(\.\./([\w/.]+)\)", PROSE))))
def test_a_function_that_the_tour_names_is_in_that_file(name, file):
    tree = ast.parse((DOCS.parent / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", PROSE))))
def test_what_the_tour_links_to_is_there(target):
    assert (DOCS / target).exists()


@pytest.mark.parametrize("file, quote", [
    ("nanogpt_fast/classic.py", 'scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))'),
    ("nanogpt_fast/classic.py", 'scores = scores.masked_fill(mask == 0, float("-inf"))'),
    ("nanogpt_fast/classic.py", 'return F.softmax(scores, dim=-1)'),
    ("nanogpt_fast/classic.py", 'y = self.attn_drop(weights) @ v'),
    ("nanogpt_fast/reference.py", '(q @ k.transpose(-2, -1)) * scale'),
    ("nanogpt_fast/reference.py", 'masked_fill(hidden, float("-inf"))'),
    ("kernels/attention_forward.py", 's = tl.dot(q, tl.trans(k)'),
])
def test_a_line_that_the_tour_quotes_is_there(file, quote):
    assert quote in TOUR and quote in (DOCS.parent / file).read_text(encoding="utf-8")


def test_the_kernel_has_the_names_of_the_snippet():
    source = (DOCS.parent / "kernels/attention_forward.py").read_text(encoding="utf-8")
    loop = source[source.index("def _walk_keys"):source.index("def forward_kernel")]
    for name in ("m_ij", "p", "alpha", "l_i", "acc", "m_i"):
        assert re.search(rf"^\s+{name} = ", loop, re.MULTILINE), f"{name} in the kernel"
        assert re.search(rf"^\s+{name} = ", TOUR, re.MULTILINE), f"{name} in the tour"
