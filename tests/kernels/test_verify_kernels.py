"""`nanogpt-fast verify` where kernels execute: it passes as they are, and sees one that is wrong or does not run."""
import json

import pytest
from harness import planted_fault
from nanogpt_fast.kernels import cross_entropy

from nanogpt_fast.checks import verify


def run(tmp_path, *words):
    """(exit status, rows) of one run."""
    status = verify.main([*words, f"--json={tmp_path / 'rows.json'}"])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    return status, [row for row in rows if row["implementation"] != "cpp"]  # tests/checks/test_verify.py looks at these


def test_the_ops_pass_as_they_are_forward_and_backward_in_each_dtype(tmp_path, capsys):
    status, rows = run(tmp_path, "--quick", "--only=cross_entropy,layer_norm")
    assert status == 0 and {row["result"] for row in rows} == {"pass"}
    assert {row["dtype"] for row in rows} == {"fp32", "bf16", "fp16"}
    assert {"loss", "logits", "d x", "d weight", "y", "d branch"} <= {row["direction"] for row in rows}
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("relative", "PyTorch", "bound", "bias", "0 failed"))


@pytest.mark.parametrize("pattern, replacement, seen_in", (
    (r"tl\.log\(total\)", "total", {"loss"}),                       # a term that is wrong
    (r"p - 1\.0, p\)", "p - 0.98, p)", {"d x", "d weight"}),        # a gradient that is off by 2 percent in one column a row
))
def test_a_corrupted_kernel_fails_and_the_exit_status_says_so(pattern, replacement, seen_in, tmp_path, capsys):
    with planted_fault(cross_entropy, pattern, replacement):
        status, rows = run(tmp_path, "--quick", "--only=cross_entropy")
    assert status == 1
    assert seen_in <= {row["direction"] for row in rows if row["result"] == "FAIL"}
    assert "FAIL" in capsys.readouterr().out


def test_a_kernel_that_does_not_launch_is_a_failure_and_the_rest_is_still_checked(tmp_path, monkeypatch):
    def launch(*args, **kwargs):
        raise RuntimeError("out of resources: shared memory")

    monkeypatch.setattr(cross_entropy, "row_losses", launch)
    status, rows = run(tmp_path, "--quick", "--only=cross_entropy,layer_norm")
    assert status == 1
    results = {(row["op"], row["result"]) for row in rows}
    assert results == {("cross_entropy", "FAIL"), ("layer_norm", "pass")}
    assert "out of resources: shared memory" in rows[-1]["why"]


@pytest.mark.slow
def test_the_whole_gpt_passes(tmp_path):
    status, rows = run(tmp_path, "--quick", "--only=gpt")
    assert status == 0 and len(rows) == 2 * 31
    checked = {row["direction"] for row in rows}
    assert {"logits", "loss", "losses of 20 steps", "d wte.weight", "d h.1.attn.c_attn.bias"} <= checked
