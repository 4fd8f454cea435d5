"""The file of what was measured: kept for a card and its versions, and never in the way."""
import json
import warnings

import cards
import pytest
import torch

from nanogpt_fast import GPT, GPTConfig, backend, explain
from nanogpt_fast.kernels import fastest
from nanogpt_fast.kernels.fastest import Row
from nanogpt_fast.ops import norm
from nanogpt_fast.training import banner
from nanogpt_fast.training.options import TrainOptions
from nanogpt_fast.training.trainer import train
from nanogpt_fast.tuning import saved

ROW = Row("layer_norm", "reference", card="a card", arch=(0, 0), dtype="half", size=(64, 64), tokens=(3, 5), basis="measured", note="measured here: PyTorch 1 us, cpp 2 us")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file that this process reads, once more at the next choice."""
    monkeypatch.setenv("NANOGPT_FAST_TUNED", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(backend, "_tuned", False)
    monkeypatch.setattr(backend, "_noticed", set())
    cards.on_card(monkeypatch, 0)
    monkeypatch.setattr(fastest, "cpu_name", lambda: "a card")
    (tmp_path / "tuned.json").write_text('{"format": 1, "machines": []}')
    return tmp_path / "tuned.json"


def taken(rows=4, width=64):
    x, vector = torch.randn(rows, width, dtype=torch.bfloat16), torch.ones(width)
    return norm.implementation(x, vector, None)


def test_auto_takes_what_was_measured_at_its_shapes_alone(file):
    default = taken()
    saved.save(file, "a card", False, [ROW], [{"name": "layer_norm", "rows": [fastest.to_json(ROW)]}])
    backend._tuned = False
    assert taken() == "reference" and {taken(100), taken(width=32)} == {default}
    with backend.recording() as record:
        taken()
    assert record == [("layer_norm", "auto", "reference", [ROW.note])]


def test_explain_says_what_was_measured_at_the_steps_shape(file):
    """Its own forward has fewer tokens."""
    row = ROW._replace(size=(32, 32), tokens=(48, 80), dtype="float32")
    saved.save(file, "a card", False, [row], [])
    backend._tuned = False
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=32))
    said = lambda **shape: [(row.implementation, row.reason) for row in explain(model, return_logits=False, **shape) if row.op == "layer_norm"]
    assert said(batch_size=4) == said(batch_size=8, tokens=8) == [("reference", ROW.note)]
    assert said(batch_size=1)[0][1] != ROW.note and said(batch_size=8)[0][1] != ROW.note


def test_the_trainers_first_lines_are_about_its_own_step(tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def explained(model, **how):
        assert (how["batch_size"], how["tokens"]) == (4, 16)
        raise Seen
    monkeypatch.setattr(banner, "explain", explained)
    with pytest.raises(Seen):
        train(TrainOptions(dataset="embedded", out_dir=str(tmp_path), block_size=16, batch_size=4, n_layer=1, n_head=2, n_embd=32, max_iters=1, device="cpu"))


def test_plain_pytorch_that_was_measured_to_be_the_fastest_is_no_fallback(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)       # where a kernel could have run
    saved.save(file, "a card", False, [ROW], [])
    backend._tuned = False
    x, vector = torch.randn(4, 64, dtype=torch.bfloat16), torch.ones(64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm.layer_norm(x, vector, None)
    with pytest.warns(RuntimeWarning, match="layer_norm runs on plain PyTorch"):
        norm.layer_norm(x.double()[:1], vector.double(), None)          # of fewer rows


def test_off_leaves_it_out(file, monkeypatch):
    default = taken()
    saved.save(file, "a card", False, [ROW], [])
    monkeypatch.setenv("NANOGPT_FAST_TUNED", "off")
    backend._tuned = False
    assert taken() == default and saved.path() is None


def test_the_cache_folder_is_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv("NANOGPT_FAST_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert saved.path() == tmp_path / "nanogpt_fast" / "tuned.json" and saved.load() == []       # no file, nothing to say


def test_a_user_without_a_home_has_no_file(monkeypatch):
    """As in a container that runs under a number of its own. The first op of every program asks."""
    for name in ("NANOGPT_FAST_TUNED", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(saved.Path, "home", home)
    assert saved.path() is None and saved.load() == [] and saved.about(False) is None


def test_rows_of_other_versions_are_ignored_and_it_is_said_once(file):
    saved.save(file, "a card", False, [ROW], [])
    content = json.loads(file.read_text())
    content["machines"][0]["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(content))
    backend._tuned = False
    with pytest.warns(RuntimeWarning, match=r"measured on a card is ignored, .* \(torch 1.0, now .*\); `nanogpt-fast tune` measures again"):
        assert taken() != "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken()
    saved.save(file, "a card", False, [ROW], [])        # the other versions' stay for whoever has them
    assert [machine["versions"]["torch"] for machine in saved.read(file)] == [torch.__version__, "1.0"] and saved.load() == []


def test_where_nothing_was_measured_a_cpu_looks_nothing_up(monkeypatch):
    """For an op of few microseconds the look-up counts."""
    asked = []
    monkeypatch.setattr(fastest, "find", lambda *args, **more: asked.append(args))
    with backend.recording():
        for rows in ((), [ROW._replace(arch=(90, 90))], [ROW._replace(card="another card")], [ROW._replace(card="")]):
            monkeypatch.setattr(fastest, "_table", fastest.Table([*rows, *fastest.SHIPPED]))
            assert not asked
            GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=32))(*torch.zeros(2, 1, 8, dtype=torch.long))
    assert {what for what, *_ in asked} >= {"layer_norm", "attention training", "mlp", "cross_entropy logits"}


def test_a_look_up_remembers_the_table_that_it_looked_into(monkeypatch):
    """Another thread may put another table into force meanwhile, as explain does."""
    one, other = (fastest.Table([ROW._replace(use=use, card="")]) for use in ("cpp", "reference"))
    monkeypatch.setattr(fastest, "_table", one)

    def place(device):
        fastest.enforce(other)
        return 0, ""
    monkeypatch.setattr(fastest, "place", place)
    look = lambda: fastest.find("layer_norm", fastest.CPU, "half", size=64, tokens=4).use
    assert look() == "cpp"
    fastest.enforce(one)
    assert look() == "cpp"


def test_another_cards_rows_are_not_this_ones(file):
    saved.save(file, "another card", False, [ROW._replace(card="another card")], [])
    assert saved.load() == [] and taken() != "reference"


@pytest.mark.parametrize("text, reason", (
    ("{", "is not JSON"), ("[]", "is not a file of `nanogpt-fast tune`"), ('{"format": 1, "machines": [1]}', "a machine is 1; expected an object"),
    ('{"format": 1, "machines": [{"card": "a card", "versions": {}, "rows": [{"what": "mlp", "tile": [1]}]}]}', "the tile of 'mlp' is .1.; expected 5 numbers"),
    ('{"format": 1, "machines": [{"card": "a card", "versions": {}, "rows": [{"what": "mlp", "size": [1, "x"]}]}]}', "size of 'mlp' is .*; expected the two ends"),
    ('{"format": 1, "machines": [{"card": "a card", "versions": {}, "rows": [{"what": "mlp", "turbo": 1}]}]}', "the row of 'mlp' has 'turbo'"),
    ("[" * 100_000, "is not JSON")))
def test_a_damaged_file_stops_nothing(file, text, reason):
    file.write_text(text)
    with pytest.warns(RuntimeWarning, match=reason):
        assert taken() != "reference"
    with pytest.raises(ValueError, match=reason):       # to write over it would lose what it has
        saved.save(file, "a card", False, [ROW], [])
    assert file.read_text() == text


def test_a_file_that_is_named_and_missing_is_said(file):
    file.unlink()
    with pytest.warns(RuntimeWarning, match="there is no such file; `nanogpt-fast tune` writes it"):
        taken()


def test_a_second_run_replaces_its_contests_and_keeps_the_others(file):
    other = ROW._replace(what="linear", use="cpp")
    save = lambda rows, *names: saved.save(file, "a card", False, rows, [{"name": name, "rows": [fastest.to_json(row) for row in rows]} for name in names])
    save([ROW], "layer_norm 4")
    save([other], "linear 4")
    assert saved.read(file)[0]["rows"] == [other, ROW]
    save([], "layer_norm 4")            # measured again: nothing is faster now
    machine, = saved.read(file)
    assert machine["rows"] == [other] and [contest["name"] for contest in machine["contests"]] == ["linear 4", "layer_norm 4"]


def test_every_row_survives_the_file():
    for row in (*fastest.SHIPPED, ROW):
        assert fastest.from_json(json.loads(json.dumps(fastest.to_json(row)))) == row
