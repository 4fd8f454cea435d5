"""`nanogpt-fast eval`: every token once with the context that its window gives it, bytes counted exactly, HellaSwag by the harness's rule."""
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gpts import sharpened, small

from nanogpt_fast import cli
from nanogpt_fast.checkpoints import convert
from nanogpt_fast.commands import evaluate
from nanogpt_fast.text import prepare
from nanogpt_fast.text.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer, WordTokenizer

TEXT = "".join(f"{i} times {i} is {i * i},\nand größer.\n" for i in range(40))
TOKENIZER = CharTokenizer.from_text(TEXT)
T = 24                                  # the context of tests/gpts.py's models
WORDS = ["--device=cpu", "--json"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(tokenizer=TOKENIZER, path="out/ckpt.pt", config=None):
    model = sharpened(vocab_size=tokenizer.vocab_size)
    Path(path).parent.mkdir(exist_ok=True)
    convert.save_gpt(path, model, tokenizer, config=config)
    return model


def run(capsys, *words):
    assert cli.main(["eval", *words, *WORDS]) == 0
    return json.loads(capsys.readouterr().out)


def expected_loss(model, tokens, stride):
    """The mean in float64, one token after the other: each sees back to the beginning of the first window that holds it."""
    model, losses, end = model.double(), [], min(T, len(tokens) - 1)
    for i in range(1, len(tokens)):
        while i > end:
            end = min(end + stride, len(tokens) - 1)
        seen = torch.tensor(tokens[max(end - T, 0):i])[None]
        losses.append(-model(seen)[0][0, -1].log_softmax(0)[tokens[i]].item())
    model.float()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("n", [2, T, T + 1, T + 2, 100])
@pytest.mark.parametrize("stride", [1, 7, T])
@torch.no_grad()
def test_every_token_is_scored_once_in_the_first_window_that_holds_it(stride, n, batch_size):
    model, tokens = sharpened(), np.random.default_rng(n).integers(65, size=n).astype("<u2")
    found = evaluate.measure(model, tokens, stride=stride, batch_size=batch_size)
    expected = expected_loss(model, tokens.tolist(), stride)
    assert found["loss"] == pytest.approx(expected, rel=1e-5) and found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert (found["tokens"], found["scored"], found["stride"], found["block_size"]) == (n, n - 1, stride, T)
    assert found["bytes"] is found["bits_per_byte"] is None


def test_the_default_moves_the_window_by_half_and_more_context_changes_the_loss():
    model, tokens = sharpened(), np.random.default_rng(0).integers(65, size=200)
    default, half, full = (evaluate.measure(model, tokens, stride=stride)["loss"] for stride in (None, T // 2, T))
    assert default == half != full


@pytest.mark.parametrize("tokenizer, size", [
    (TOKENIZER, len(TEXT.encode()) - 1), (BPETokenizer.from_text(TEXT, 300), None), (WordTokenizer.from_text(TEXT), len(TEXT.encode()) - 1)])
def test_bytes_are_those_of_the_scored_tokens(tokenizer, size):
    ids = np.array(tokenizer.encode(TEXT + END_OF_TEXT * (tokenizer.end_of_text is not None)))
    found = evaluate.measure(small(vocab_size=tokenizer.vocab_size).eval(), ids, tokenizer)
    assert found["bytes"] == (size or len(TEXT.encode()) - tokenizer.byte_lengths()[ids[0]])
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["scored"] / math.log(2) / found["bytes"])


def test_where_a_word_is_unknown_so_is_the_number_of_bytes():
    tokenizer = WordTokenizer.from_text(TEXT, 20)
    assert evaluate.text_bytes(np.array(tokenizer.encode(TEXT)), tokenizer) is None
    assert evaluate.text_bytes(np.array([1, 2, 3, 50]), tokenizer) is None      # an id that pads the model's vocabulary


def test_a_text_a_data_set_and_its_token_file_give_the_same_figures(capsys):
    model = saved(config={"dataset": "sums", "data_dir": "elsewhere"})
    prepare.write(TEXT, "elsewhere/sums", say=lambda _: None)
    val = TEXT[int(len(TEXT) * 0.9):]
    Path("val.txt").write_text(val)
    Path("val.jsonl").write_text(json.dumps({"body": val}))
    expected = evaluate.measure(model, np.array(TOKENIZER.encode(val)), TOKENIZER)
    assert expected["bytes"] == len(val[1:].encode())
    for words, name in (([], "elsewhere/sums/val.bin"), (["sums", "--data_dir=elsewhere"], "elsewhere/sums/val.bin"),
                        (["elsewhere/sums"], "elsewhere/sums/val.bin"), (["elsewhere/sums/val.bin"], "elsewhere/sums/val.bin"),
                        (["val.txt"], "val.txt"), (["--data=val.jsonl", "--field=body"], "val.jsonl")):
        found = run(capsys, *words)
        assert {key: found[key] for key in expected} == expected and found["data"] == name and found["model"] == "out/ckpt.pt"
    assert run(capsys, "--split=train")["tokens"] == int(len(TEXT) * 0.9)
    assert run(capsys, "--stride=24", "--backend=reference")["stride"] == 24
    assert cli.main(["eval", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("out/ckpt.pt on elsewhere/sums/val.bin (cpu") and f"{expected['tokens'] - 1:,} scored: all but the first" in lines[2]
    assert lines[1].split() == ["figure", "value", "note"] and lines[4].split()[:2] == ["loss", f"{expected['loss']:.4f}"] and "moved by 12" in lines[7]
    assert cli.main(["eval", "--device=cpu", "--format=csv"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "figure,value,note" and out.splitlines()[3].startswith("loss,") and "\nout/ckpt.pt on " in err


def test_a_model_trained_on_a_text_finds_the_token_files_that_were_made_of_it(capsys):
    Path("my.txt").write_text(TEXT)
    folder = prepare.find("my.txt", say=lambda _: None)
    saved(config={"dataset": "my.txt", "data_dir": "data"})
    assert run(capsys)["data"] == str(folder / "val.bin")


@pytest.mark.parametrize("words, message", [
    ([], "out does not say what it was trained on: name a data set"), (["nowhere"], "nowhere is neither a file nor a folder"),
    (["my.txt", "--stride=25"], "stride is 25; expected at most the model's block_size, 24"),
    (["my.txt", "--hellaswag=my.txt"], "one run measures on one of them"), (["other"], "made with another vocabulary"),
    (["bad.bin"], "bad.bin holds token 999 at position 30, outside"), (["one.bin"], "one.bin holds 1 token(s)"),
    (["other.txt"], "character 'X'"), (["--hellaswag=my.txt"], "my.txt, line 1: not a question of HellaSwag"),
    (["--init_from=gpt3"], "init_from is 'gpt3'"), (["--out_dir=nowhere"], "no folder nowhere")])
def test_what_cannot_be_measured_is_one_clear_line(words, message, capsys):
    saved()
    Path("my.txt").write_text(TEXT)
    Path("other.txt").write_text("aXe")
    prepare.write("another alphabet\n" * 9, "data/other", say=lambda _: None)
    np.array([1] * 30 + [999] + [1] * 30, dtype="<u2").tofile("bad.bin")
    np.array([1], dtype="<u2").tofile("one.bin")
    assert cli.main(["eval", *words, "--device=cpu"]) == 2
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1] and not out


def test_a_model_without_a_tokenizer_is_measured_on_token_files_with_theirs(capsys):
    convert.save_gpt("ckpt.pt", sharpened(vocab_size=TOKENIZER.vocab_size))
    prepare.write(TEXT, "data/sums", say=lambda _: None)
    found = run(capsys, "sums", "--out_dir=ckpt.pt")
    assert found["bytes"] == len(TEXT[int(len(TEXT) * 0.9):].encode()) - 1 and found["bits_per_byte"] > 0
    Path("data/sums/meta.pkl").unlink()
    found = run(capsys, "sums", "--out_dir=ckpt.pt")
    assert found["bytes"] is found["bits_per_byte"] is None and found["loss"] > 0
    Path("my.txt").write_text(TEXT)
    for words in (["my.txt"], ["--hellaswag=my.txt"]):
        assert cli.main(["eval", *words, "--out_dir=ckpt.pt", "--device=cpu"]) == 2
        assert "there is no tokenizer to encode" in capsys.readouterr().err


def test_weights_whose_tokenizer_is_not_available_are_measured_on_token_files(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    model = small().eval()
    model.save_pretrained("hf")
    tokens = np.arange(60).astype("<u2")
    tokens.tofile("a.bin")
    assert run(capsys, "a.bin", "--init_from=hf")["loss"] == pytest.approx(evaluate.measure(model, tokens)["loss"], rel=1e-6)
    Path("a.txt").write_text(TEXT)
    assert cli.main(["eval", "a.txt", "--init_from=hf", "--device=cpu"]) == 2
    assert "no tokenizer to encode a.txt with: GPT-2's tokenizer needs a package" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_no_figure():
    model = small().eval()
    model.transformer.ln_f.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss is nan: the model's weights are not all finite"):
        evaluate.measure(model, np.arange(50))


# ---------------------------------------------------------------------------------------------------------- HellaSwag

def questions(n=20):
    """Rows as hellaswag_val.jsonl has them; every fifth is longer than the context of the model."""
    draw = random.Random(5)
    def words(k):
        return " ".join(draw.choice(["is", "times", "and", "größer", "1", "4"]) for _ in range(k))
    return [{"ind": i, "activity_label": "times", "ctx_a": words(2 + 9 * (i % 5 == 0)) + ".", "ctx_b": words(1), "ctx": "not read",
             "split": "val", "endings": [words(1 + draw.randrange(4)) + "." for _ in range(4)], "label": str(i % 4) if i % 2 else i % 4}
            for i in range(n)]


HELLASWAG = CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyzößABCDEFGHIJKLMNOPQRSTUVWXYZÖ 0123456789.:[]")


@torch.no_grad()
def expected_hits(model, rows, tokenizer):
    """(sum, per character): the right answers, by one row, one ending and one token at a time, in float64."""
    model, hits = model.double(), [0, 0]
    for row in rows:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        scores = []
        for ending in row["endings"]:
            ids = tokenizer.encode(context + " " + ending)
            first = max(len(tokenizer.encode(context)), len(ids) - T)
            offset = max(len(ids) - T - 1, 0)
            scores.append(sum(model(torch.tensor(ids[offset:i])[None])[0][0, -1].log_softmax(0)[ids[i]].item() for i in range(first, len(ids))))
        for k, found in enumerate((scores, [s / len(e) for s, e in zip(scores, row["endings"])])):
            hits[k] += max(range(4), key=found.__getitem__) == int(row["label"])
    return hits


def test_hellaswag_is_scored_by_the_harness_rule_on_twenty_questions(capsys):
    rows = questions()
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = saved(HELLASWAG)
    found = run(capsys, "--hellaswag=questions.jsonl")
    hits = expected_hits(model, rows, HELLASWAG)
    assert hits[0] != hits[1]       # else one could stand for the other
    assert (found["questions"], found["accuracy"], found["accuracy_per_character"]) == (20, hits[0] / 20, hits[1] / 20)
    assert found["standard_error"] == pytest.approx(math.sqrt(hits[0] / 20 * (1 - hits[0] / 20) / 19))
    assert cli.main(["eval", "--hellaswag=questions.jsonl", "--device=cpu"]) == 0
    assert f"accuracy, per character  {hits[1] / 20:.4f}  +- " in capsys.readouterr().out


def test_the_log_likelihoods_are_those_of_the_ending_alone():
    model = sharpened(vocab_size=HELLASWAG.vocab_size)
    found = evaluate.log_likelihoods(model, HELLASWAG, "a b: ", ["long ending", "x"])
    for text, score in zip(("long ending", "x"), found):
        ids = torch.tensor(HELLASWAG.encode("a b:  " + text))
        with torch.no_grad():
            scores = model(ids[None, :-1], ids[None, 1:])[0][0].double().log_softmax(1)
        assert score == pytest.approx(scores[torch.arange(len(ids) - 1), ids[1:]][3:].sum().item(), rel=1e-4)   # "  " and the text


def test_questions_lose_wikihows_marks_as_in_the_harness():
    row = {"activity_label": "Home [header]", "ctx_a": "How to  mend [title] Begin.", "ctx_b": "the MAN", "label": "1",
           "endings": [" [step] Sit.  Then", "stand [substeps] up"]}
    Path("q.jsonl").write_text("\n" + json.dumps(row) + "\n")
    # As lm-evaluation-harness's tasks/hellaswag/utils.py reads this row.
    assert evaluate.read_questions("q.jsonl") == [("Home : How to mend. Begin. The man", [" Sit. Then", "stand up"], 1)]


@pytest.mark.parametrize("change", [dict(endings=["one"]), dict(endings=["a", "[step]"]), dict(label=""), dict(label=4), dict(ctx_a=None, ctx_b=None),
                                    dict(endings=None)])
def test_a_line_that_is_no_question_is_named(change):
    Path("q.jsonl").write_text("\n".join(json.dumps(row) for row in (questions(1)[0], {**questions(1)[0], **change})))
    with pytest.raises(ValueError, match="q.jsonl, line 2: not a question of HellaSwag .* activity_label, ctx_a, ctx_b, endings and label"):
        evaluate.read_questions("q.jsonl")
