"""`nanogpt-fast verify` from the outside: what it refuses, what it says where nothing can run."""
import csv
import json

import pytest
import torch

from nanogpt_fast import backend
from nanogpt_fast.checks import verify
from nanogpt_fast.generation import decode
from nanogpt_fast.ops.cpu import cross_entropy as cross_entropy_cpu, linear as linear_cpu


@pytest.mark.skipif(torch.cuda.is_available() or backend.triton_import_error() is not None, reason="for Triton without a GPU")
def test_without_a_gpu_the_kernels_are_interpreted_in_a_second_process(tmp_path, capfd):
    path = tmp_path / "rows.json"
    assert verify.main(["--quick", "--only=cross_entropy", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["interpreted"] and report["failed"] == 0
    results = {(row["implementation"], row["dtype"], row["result"]) for row in report["rows"]}
    assert {("triton", dtype, "pass") for dtype in ("fp32", "bf16", "fp16")} == {row for row in results if row[0] == "triton"}
    if cross_entropy_cpu.MISSING is None:  # the extension's runs as it is; what it does not take says why
        assert {("cpp", "fp32", "pass"), ("cpp", "bf16", "pass"), ("cpp", "fp16", "-")} <= results
    assert "Triton kernels in the interpreter" in capfd.readouterr().out


def test_what_cannot_run_here_says_why_and_is_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(backend, "triton_import_error", lambda: "Triton cannot be imported (a test says so)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend, "_interpreted", False)
    monkeypatch.setattr(linear_cpu, "AMX", False)       # on whose tiles the extension has the MLP's products
    assert verify.main(["--quick", "--only=mlp,gpt"]) == 0
    printed = capsys.readouterr().out
    assert "not run here: triton: Triton kernels need a CUDA tensor" in printed and "0 checks" in printed
    assert verify.main(["--quick", "--only=mlp", "--format=csv"]) == 0
    out, err = capsys.readouterr()
    assert {row["op"] for row in csv.DictReader(out.splitlines())} == {"mlp"} and "0 checks" in err


@pytest.mark.skipif(decode.MISSING is not None, reason="the extension is not built: no C++ compiler")
@pytest.mark.parametrize("factor,result", [(1.0, "pass"), (1.05, "FAIL")])
def test_a_decoding_step_is_checked(factor, result, monkeypatch):
    step = decode.step
    monkeypatch.setattr(decode, "step", lambda *args, **more: factor * step(*args, **more))
    rows = [row for row in verify.check(torch.device("cpu"), True, ("decode",)) if row.implementation == "cpp"]
    assert [(row.dtype, row.result) for row in rows] == [("fp32", result), ("bf16", result), ("fp16", "-")]


@pytest.mark.parametrize("op", verify.CHECKED)
def test_every_op_that_can_be_named_has_rows(op, monkeypatch):
    monkeypatch.setattr(backend, "_interpreted", False)
    assert next(verify.check(torch.device("cpu"), True, (op,))).op == op


def test_an_op_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="there is no 'attentoin'; expected some of attention, layer_norm"):
        verify.main(["--only=attentoin"])
