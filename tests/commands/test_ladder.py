"""`nanogpt-fast ladder`, run small: its table, its files, and a checkpoint that the sampler reads."""
import json

import pytest
import torch

from nanogpt_fast import classic
from nanogpt_fast.checkpoints import nanogpt as checkpoint
from nanogpt_fast.commands import ladder
from nanogpt_fast.text import prepare

TEXT = "to be, or not to be, that is the question:\nwhether 'tis nobler in the mind to suffer\n" * 30
TINY = ["--steps=12", "--batch_size=4", "--block_size=8", "--n_embd=16", "--n_head=2", "--n_layer=2", "--sample_tokens=20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "play.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ladder.main(["--data=play.txt", "--out_dir=out", *TINY])
    return folder


@pytest.fixture(scope="module")
def report(run):
    return json.loads((run / "out/ladder.json").read_text())


def test_every_model_is_trained_on_as_many_tokens_of_the_same_text(report):
    assert [row["name"] for row in report["models"]] == list(classic.LADDER) == list(ladder.LEARNING_RATE)
    for row in report["models"]:
        assert row["step"] == 12 and row["tokens"] == 12 * 4 * 8 and len(row["sample"]) == 20
        assert row["val_loss"] < row["history"][0]["val_loss"]
    assert [row["parameters"] for row in report["models"]] == sorted(row["parameters"] for row in report["models"])


def test_the_same_seed_gives_the_same_losses_also_without_samples(run, report, monkeypatch, capsys):
    monkeypatch.chdir(run)
    ladder.main(["play.txt", "--out_dir=again", *TINY, "--sample_tokens=0"])
    assert "\n    " not in capsys.readouterr().out and "writes:" not in (run / "again/ladder.md").read_text()
    again = json.loads((run / "again/ladder.json").read_text())
    assert [row["val_loss"] for row in again["models"]] == [row["val_loss"] for row in report["models"]]


def test_the_table_shows_every_model_with_its_figures(run, report):
    text = (run / "out/ladder.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].replace(" ", "") == "|model|parameters|steps|tokens|time|trainingloss|validationloss|"
    assert len(lines) == 7 and lines[1] == "|--|--:|--:|--:|--:|--:|--:|"
    shown = ladder.table(report["models"], "text").splitlines()
    assert len({len(line) for line in shown}) == 1 and len(shown) == 6  # aligned, for a terminal
    gpt = report["models"][-1]
    assert [cell.strip() for cell in lines[-1].split("|")[1:-1]] == [
        "GPT", f"{gpt['parameters']:,}", "12", "384", f"{gpt['seconds']:.0f} s",
        f"{gpt['train_loss']:.3f}", f"{gpt['val_loss']:.3f}"]
    assert "**bigram** writes:\n\n    " in text


def test_the_plot_is_a_picture(run):
    assert (run / "out/ladder.png").read_bytes().startswith(b"\x89PNG")


def test_the_gpt_is_kept_as_a_checkpoint_that_can_be_asked_for_more(run, report, monkeypatch):
    monkeypatch.chdir(run)
    model, tokenizer, meta = checkpoint.load_model("out")
    assert tokenizer == prepare.load_tokenizer("data/play") and meta["iter_num"] == 12
    data = torch.tensor(tokenizer.encode(TEXT))
    _, val = classic.split(data)
    assert classic.evaluate(model, val, 4) == pytest.approx(report["models"][-1]["val_loss"], rel=1e-4)
    assert classic.complete((model, tokenizer), "to be", 10).startswith("to be")


def test_words_climb_too(run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    prepare.main(["play.txt", "--name=words", "--tokenizer=word", "--vocab_size=12"])
    ladder.main(["words", "--out_dir=out-words", *TINY])
    assert "vocabulary of 12" in capsys.readouterr().out


def test_a_vocabulary_too_large_for_the_bigram_is_refused(run, monkeypatch):
    monkeypatch.chdir(run)
    (run / "many.txt").write_text("".join(chr(0x4e00 + i) for i in range(9000)))
    with pytest.raises(ValueError, match="vocabulary of 9,000, and the bigram's table is its square"):
        ladder.main(["many.txt"])
