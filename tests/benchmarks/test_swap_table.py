"""The script behind docs/swap.md's table: what it calls equal, and what it executes of a repository."""
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks import swap_repositories, swap_table  # noqa: E402


def make():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def call(model):
    return model(swap_repositories.normal(4, 8)), None


def compared(accelerate, restore=lambda model: None):
    """What the script finds where accelerate and restore are these."""
    def accelerated(model, backend):
        accelerate(model, backend)
        return types.SimpleNamespace(swapped=[], left=[], calls={})
    package = types.SimpleNamespace(accelerate=accelerated, restore=restore)
    exact = swap_table.run(swap_table.made(make, torch.float64), call, torch.float64)
    plain = {precision: swap_table.run(swap_table.made(make), call, precision) for precision in (torch.float32, torch.bfloat16)}
    return swap_table.compared(package, make, call, exact, plain)


def test_what_changes_nothing_is_equal():
    row = compared(lambda model, backend: None)
    assert row["equal"] and row["why"] == []
    assert all(ours == theirs and 0 < ours < 0.05 for error in row["errors"].values() for ours, theirs in error.values())


class Scaled(nn.Tanh):
    def forward(self, x):
        return super().forward(x) * (1 + 1e-4)


class Wrapped(nn.Linear):
    def forward(self, x):
        return super().forward(x), 0


def swap(index, cls, backend="fused"):
    def accelerate(model, wanted):
        if wanted == backend:
            model[index].__class__ = cls
    return accelerate


@pytest.mark.parametrize("accelerate, why", [
    (swap(1, Scaled), "outputs in float32: off by"), (swap(2, Wrapped), "it returns tuple(tuple(float32(4, 3), int), None), not"),
    (swap(1, Scaled, "reference"), "backend='reference': other bits")], ids=["values", "structure", "switched off"])
def test_what_changes_something_is_not(accelerate, why):
    row = compared(accelerate, restore=lambda model: setattr(model[2], "__class__", nn.Linear))
    assert not row["equal"] and any(reason.startswith(why) for reason in row["why"]), row["why"]


def test_what_restore_leaves_is_not_equal():
    row = compared(swap(1, nn.Sigmoid, "reference"))
    assert "restored: other bits than plain's" in row["why"]


def test_of_a_script_its_definitions_are_executed(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("import math\nimport there_is_no_such_module\nwidth = 3\nran = []\nran.append(1)\nfor _ in range(3): print(undefined)\n"
                    "class Model:\n    size = math.sqrt(4) * width\ndef area(): return width ** 2\n")
    m = swap_repositories.definitions(path, width=5)
    assert m.Model.size == 6 and m.area() == 25 and not hasattr(m, "ran")


def test_one_repository_in_a_process_of_its_own_on_interpreted_kernels(tmp_path):
    pytest.importorskip("triton")
    row = swap_table.in_a_process("karpathy/nanoGPT", ROOT / "tests" / "checkout")
    assert row.get("equal"), row
    assert row["swapped"] == {"model": 1, "layer_norm": 5, "block": 2, "attention": 2, "mlp": 2} and row["kernels"] == {"model": 2}
    assert swap_table.in_a_process("NVIDIA/ngpt", tmp_path)["cannot"].startswith("ModuleNotFoundError")


def test_the_kept_table_has_twenty_repositories_and_each_is_equal():
    rows = swap_table.sections()["public repositories"].splitlines()
    rows = [row for row in rows if row.startswith("| ") and not row.startswith("| repository")]
    assert len(rows) >= 20 and all(row.endswith("| yes |") for row in rows)


def test_what_is_not_equal_stands_in_the_table(monkeypatch, tmp_path):
    results = {"environment": dict.fromkeys(("cpu", "torch", "triton", "transformers", "python", "commit", "time"), "x"),
               "rows": [{"repository": "a/b", "commit": "1 2", "model": "m", "swapped": {"mlp": 1}, "equal": False, "why": ["outputs"]},
                        {"repository": "c/d", "cannot": "no checkout"}]}
    monkeypatch.setattr(swap_table, "RESULT", tmp_path / "swap.json")
    swap_table.RESULT.write_text(swap_table.json.dumps(results))
    text = swap_table.sections()["public repositories"]
    assert "1 repositories, in 1 of them something is swapped, 0 are equal" in text and "**no**: outputs" in text
    assert "Not built here: c/d: no checkout." in text


def test_a_folder_without_a_checkout_leaves_the_results_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(swap_table, "RESULT", tmp_path / "swap.json")
    with pytest.raises(SystemExit) as ended:
        swap_table.main(["--checkouts", str(tmp_path / "nonexistent")])
    assert ended.value.code == 2 and "there is no checkout in it; expected a folder with some of karpathy/nanoGPT" in capsys.readouterr().err
    assert not swap_table.RESULT.exists()
