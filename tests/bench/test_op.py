"""`nanogpt-fast bench op`: every op against its peers, and a function of one's own, which must be right first."""
import csv
import json

import pytest
import torch

from nanogpt_fast import backend, cli, ops
from nanogpt_fast.bench import cases, op

MINE = """
import torch.nn.functional as F

def good(x, weight, bias, eps):
    return F.layer_norm(x, weight.shape, weight, bias, eps)

def triton(x, weight, bias, eps):
    return good(x, weight, bias, eps)

def wrong(x, weight, bias, eps):
    return good(x, weight, bias, eps) * 1.01
"""


@pytest.fixture
def mine(tmp_path):
    """The file of functions; what it registers is forgotten."""
    path = tmp_path / "my.py"
    path.write_text(MINE)
    yield path
    for name in list(backend.own["layer_norm"]):
        ops.unregister("layer_norm", name)


def bench(*words):
    return cli.main(["bench", "op", "--device=cpu", "--quick", "--without=compile,compile max-autotune", *words])


@pytest.mark.parametrize("name", op.CASES)
def test_each_op_is_timed_beside_pytorch(name, capsys):
    assert bench(name) == 0
    out = capsys.readouterr().out
    assert op.CASES[name] in out and "ours" in out and "eager" in out and "1.00" in out
    assert "TFLOP/s at" not in out and "copies at" not in out         # a quick run measures no limits and makes none up


def test_a_function_of_ones_own_is_a_row_if_it_is_right(mine, tmp_path, capsys):
    files = [f"--{kind}={tmp_path}/found.{kind}" for kind in ("json", "csv", "png")]
    assert bench("layer_norm", f"--mine={mine}:good", *files) == 0
    out = capsys.readouterr().out
    assert "good: 18 results and gradients are as near to float64 as plain PyTorch's" in out
    record, = map(json.loads, (tmp_path / "found.json").read_text().splitlines())
    assert {"ours", "eager", "good"} <= record["samples"].keys() and record["limits"] is None
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert {row["implementation"] for row in rows} >= {"ours", "eager", "good"} and all(float(row["seconds"]) > 0 for row in rows)
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    assert bench("layer_norm", f"--mine={mine}:triton", "--implementations=eager") == 0        # one of our names
    assert "my_triton" in capsys.readouterr().out


def test_a_wrong_function_is_shown_and_not_timed(mine, capsys):
    assert bench("layer_norm", f"--mine={mine}:wrong") == 1
    out = capsys.readouterr().out
    assert "wrong is not right: of 18 results 15 differ from float64" in out and "eager" not in out


@pytest.mark.parametrize("words, reason", (
    (("--mine=my.py:f",), "say of which op"), (("sample", "--mine=my.py:f"), "op is sample; a function of yours can stand beside attention"),
    (("layer_norm", "--mine=my.py"), "expected FILE.py:FUNCTION"), (("layer_norm", "--mine=none.py:f"), "there is no file none.py"),
    (("layer_norm", "--mine={mine}:f"), "has no function f; it has good, triton, wrong"), (("--n_embd=64",), "a shape of your own is one op's"),
    (("attention", "--n_embd=65"), "n_embd is 65 and n_head 12"), (("norm",), "op"),
    (("--only=mine",), "--only=mine leaves none of"),
    (("layer_norm", "--implementations=our"), "--op=layer_norm --implementations=our leaves none of")))
def test_what_cannot_be_is_one_line(mine, capsys, words, reason):
    assert bench(*(word.format(mine=mine) for word in words)) == 2
    err = capsys.readouterr().err
    assert reason in err and "Traceback" not in err and err.count("\n") == 1


@pytest.mark.parametrize("name, given, shape", (
    ("attention", dict(batch_size=1, block_size=8, n_head=2, n_embd=16), dict(B=1, T=8, H=2, D=8)),
    ("layer_norm", dict(batch_size=2, block_size=8, n_embd=24), dict(rows=16, C=24)), ("mlp", dict(batch_size=1, block_size=8, n_embd=24), dict(rows=8, C=24)),
    ("cross_entropy", dict(batch_size=1, block_size=8, n_embd=24, vocab_size=50), dict(rows=8, C=24, V=50)), ("sample", dict(batch_size=2, vocab_size=50), dict(rows=2, V=50)),
    ("decode", dict(batch_size=2, block_size=8, n_embd=24), dict(B=2, T=8, H=12, D=2))))
def test_a_shape_of_ones_own(name, given, shape):
    listed = list(op.own_shape(name, torch.bfloat16, given))
    assert {case.op for case in listed} == {op.CASES[name]} and all(case.shape == shape and case.dtype == torch.bfloat16 for case in listed)
    assert {case.direction for case in listed} == ({"forward"} if name in ("sample", "decode") else {"forward", "both"})


def test_every_op_of_the_list_has_a_name():
    assert {case.op for device in ("cpu", "cuda") for case in cases.cases(device)} - {"attention of separate q, k, v"} == set(op.CASES.values())
