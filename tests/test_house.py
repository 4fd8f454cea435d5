"""The house: which rooms the package has, that imports go down only, and that a file is one idea."""
import ast
from pathlib import Path

import pytest

from nanogpt_fast import cli

ROOT = Path(cli.__file__).parents[1]
ROOMS = {"bench", "checkpoints", "checks", "commands", "generation", "ops", "swap", "text", "training", "tuning"}
AT_THE_TOP = {"__init__", "__main__", "cli", "config", "backend", "reference", "model", "touched", "classic", "options", "devices", "files",
              "tables", "threads", "apart"}
LONGEST = 500


def modules():
    """{dotted name: path} of the package and its kernels."""
    paths = [*(ROOT / "nanogpt_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    found = {}
    for path in paths:
        if "nanogpt_fast/kernels" in path.as_posix():   # a link to kernels, where one is
            continue
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        parts = ["nanogpt_fast", *parts] if parts[0] == "kernels" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name, path, known):
    """The modules of `known` that this one imports, at its top or in a function; not what stands there for type checkers alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found, waiting = set(), [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & set(known)) - {name}


def circle(graph):
    """A list of names each of which imports the next, the first one again at the end; or None."""
    done = set()

    def walk(name, path):
        if name in path:
            return [*path[path.index(name):], name]
        if name in done:
            return None
        for following in sorted(graph[name]):
            if found := walk(following, [*path, name]):
                return found
        done.add(name)
        return None
    return next((found for name in sorted(graph) if (found := walk(name, []))), None)


def test_imports_go_down_only():
    known = modules()
    graph = {name: imported(name, path, known) for name, path in known.items()}
    assert len(graph) > 60 and graph["nanogpt_fast.model"] >= {"nanogpt_fast.touched", "nanogpt_fast.ops.attention", "nanogpt_fast.generation"}
    assert circle(graph) is None
    assert circle({**graph, "nanogpt_fast.files": {"nanogpt_fast.training.trainer"}}) is not None      # the test can see one


def test_every_room_is_named_in_the_plan():
    top = ROOT / "nanogpt_fast"
    assert {path.stem for path in top.glob("*.py")} == AT_THE_TOP
    assert {path.parent.name for path in top.glob("*/__init__.py")} - {"kernels"} == ROOMS


@pytest.mark.parametrize("folder", ["nanogpt_fast", "kernels", "csrc", "benchmarks", "tests"])
def test_no_file_is_longer_than_one_idea(folder):
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*")
             if path.suffix in (".py", ".cpp", ".cu", ".h") and "nanogpt_fast/kernels" not in path.as_posix()}
    assert lines and {path: n for path, n in lines.items() if n > LONGEST} == {}


def test_import_paths_that_the_docs_have_shown_keep_working():
    from nanogpt_fast import GPT, GPTConfig, accelerate, classic, explain, generation, reference, restore, use  # noqa: F401
    from nanogpt_fast.kernels import gate  # noqa: F401
    from nanogpt_fast.text import corpora  # noqa: F401
    from nanogpt_fast.text.tokenizers import CharTokenizer  # noqa: F401
