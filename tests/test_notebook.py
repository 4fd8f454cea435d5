"""docs/tour.ipynb runs from top to bottom, and holds what it printed when it was executed (`python docs/run_notebook.py`)."""
import importlib.util
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

DOCS = Path(__file__).parent.parent / "docs"
CELLS = [cell for cell in json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
STEPS = "max_iters=500"


def outputs(cells):
    """What the cells printed and showed, as one text; a picture as its type."""
    found = [output for cell in cells for output in cell["outputs"]]
    return "".join("".join(output.get("text") or output.get("data", {}).get("text/markdown") or output.get("data", {})) for output in found)


def test_every_cell_runs_in_one_session(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)     # also where the notebook's own chdir is undone
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.switch_backend("agg")
    source = ["".join(cell["source"]) for cell in CELLS]
    assert sum(STEPS in cell for cell in source) == 1
    session = {}
    for i, cell in enumerate(source):
        exec(compile(cell.replace(STEPS, "max_iters=20"), f"docs/tour.ipynb, cell {i}", "exec"), session)
    plt.close("all")
    written = capsys.readouterr().out
    assert "step 20: train loss" in written and "12 plus " in written and "11 modules restored" in written
    assert {row.op for row in session["nanogpt_fast"].explain(session["model"])} >= {"attention", "layer_norm", "mlp", "cross_entropy"}


def test_its_outputs_are_kept_and_small():
    kept = outputs(CELLS)
    assert (DOCS / "tour.ipynb").stat().st_size < 300_000
    for word in ("step 500: train loss", "image/png", "12 plus ", "| attention | ", "modules restored"):
        assert word in kept, word
    assert not any(output.get("name") == "stderr" or output["output_type"] == "error" for cell in CELLS for output in cell["outputs"])
    assert "/tmp" not in kept and "/home" not in kept


@pytest.mark.slow
def test_a_kernel_of_jupyter_runs_it_and_shows_what_it_keeps():
    pytest.importorskip("nbclient"), pytest.importorskip("ipykernel")
    spec = importlib.util.spec_from_file_location("run_notebook", DOCS / "run_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [cell for cell in module.executed().cells if cell.cell_type == "code"]
    assert "step 500: train loss" in outputs(found) and "| attention | " in outputs(found)
    assert [bool(cell["outputs"]) for cell in found] == [bool(cell["outputs"]) for cell in CELLS]
