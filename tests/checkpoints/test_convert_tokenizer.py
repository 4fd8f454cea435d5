"""Folders for transformers carry their tokenizer: AutoTokenizer and AutoModelForCausalLM read them, offline, and give our ids and texts."""
import json
import os
import random

import pytest
import tiny
import torch
from gpts import small

from nanogpt_fast import cli
from nanogpt_fast.checkpoints import convert, huggingface_tokenizer
from nanogpt_fast.checkpoints.convert import ConversionError, convert_checkpoint
from nanogpt_fast.text.tokenizers import BYTES, END_OF_TEXT, BPETokenizer, CharTokenizer, GPT2Tokenizer, WordTokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

TEXT = ("To be, or not to be, that's the question:\n\n  Whether 'tis nobler in the mind to suffer 1st, größer 😀 a² \u0301_x\u2028 don''t 12\x1c"
        "times\r\n<unk> <pad>|\t\n ") * 20
PAIRS = BPETokenizer.from_text(TEXT, 320)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))


def gpt2(monkeypatch):
    """GPT-2's tokenizer as tiktoken has it, with a small vocabulary in place of the one that has to be fetched."""
    tiktoken = pytest.importorskip("tiktoken")
    byte = {name: value for value, name in BYTES.items()}
    ranks = {bytes(map(byte.get, token)): i for i, token in enumerate(PAIRS.vocab[1:])}
    pieces = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    found = tiktoken.Encoding("gpt2", pat_str=pieces, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": found}.get)
    return GPT2Tokenizer()


MAKE = {
    "char": lambda _: CharTokenizer(["<mask>", *sorted(set(TEXT))]), "bpe": lambda _: PAIRS, "gpt2": gpt2,
    "word": lambda _: WordTokenizer.from_text(TEXT, 20), "strict": lambda _: WordTokenizer.from_text(TEXT, unknown="error")}


@pytest.mark.parametrize("kind", MAKE)
def test_transformers_reads_a_converted_folder_with_our_ids_and_texts(kind, tmp_path, monkeypatch):
    tokenizer = MAKE[kind](monkeypatch)
    model = small(vocab_size=tokenizer.vocab_size + 3, block_size=16)      # padded
    convert.save_gpt(tmp_path / "ckpt.pt", model, tokenizer)
    convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = TEXT + END_OF_TEXT * (tokenizer.end_of_text is not None) + TEXT
    ids = theirs(text, return_tensors="pt", verbose=False).input_ids
    assert ids[0].tolist() == tokenizer.encode(text) and theirs.decode(ids[0]) == tokenizer.decode(ids[0])
    drawn = random.Random(1).choices(range(tokenizer.vocab_size), k=400)
    assert theirs.decode(drawn) == tokenizer.decode(drawn)
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.end_of_text and len(theirs) == tokenizer.vocab_size

    their_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert their_model.config.eos_token_id == tokenizer.end_of_text
    prompt = ids[:, :8]
    expected = model.eval()(prompt, prompt)[0]
    torch.testing.assert_close(their_model(prompt).logits, expected, atol=1e-5, rtol=1e-4)

    convert_checkpoint(tmp_path / "hf", tmp_path / "back.pt")
    assert convert._load(tmp_path / "back.pt")[1] == tokenizer


def test_a_character_that_is_not_in_the_vocabulary_is_an_error_there_too(tmp_path):
    convert.save_gpt(tmp_path / "ckpt.pt", small(vocab_size=3), CharTokenizer("abc"))
    convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("cab").input_ids == [2, 0, 1]
    with pytest.raises(Exception, match="Missing .UNK. token"):
        theirs("cabd")


def test_a_conversion_without_a_tokenizer_says_so_and_removes_only_what_a_conversion_wrote(tmp_path, capsys):
    convert.save_gpt(tmp_path / "with.pt", small(vocab_size=3), CharTokenizer("abc"))
    convert.save_gpt(tmp_path / "without.pt", small(vocab_size=3))
    convert_checkpoint(tmp_path / "with.pt", tmp_path / "hf")
    assert set(huggingface_tokenizer.NAMES) < set(os.listdir(tmp_path / "hf"))
    convert_checkpoint(tmp_path / "without.pt", tmp_path / "hf")
    assert "without a tokenizer: " in capsys.readouterr().out and sorted(os.listdir(tmp_path / "hf")) == ["config.json", "model.safetensors"]
    (tmp_path / "hf/tokenizer.json").write_text("mine")
    convert_checkpoint(tmp_path / "without.pt", tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize("kind", ["char", "word"])
def test_a_tokenizer_that_transformers_would_read_otherwise_is_not_written(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(huggingface_tokenizer.PIECES, kind, r"[\s\S]{2}")
    convert.save_gpt(tmp_path / "ckpt.pt", small(vocab_size=200), MAKE[kind](None))
    with pytest.raises(Exception, match="transformers' tokenizer would read|UNK"):
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "hf")
    assert not os.listdir(tmp_path / "hf")


def test_half_of_a_surrogate_pair_has_no_place_there(tmp_path):
    convert.save_gpt(tmp_path / "ckpt.pt", small(vocab_size=3), CharTokenizer("ab\ud83d"))
    with pytest.raises(ConversionError, match=r"half of a surrogate pair, '\\ud83d'"):
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "hf")


def test_training_from_a_converted_folder_refuses_data_of_another_vocabulary(tmp_path, capsys):
    convert.save_gpt(tmp_path / "ckpt.pt", small(vocab_size=4), CharTokenizer("\nabc"))
    convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "hf")
    for name, text in (("same", "abc\n" * 90), ("other", "xyz\n" * 90)):
        tiny.data(tmp_path, name, text)
        o = tiny.options(tmp_path, dataset=name, init_from=str(tmp_path / "hf"), max_iters=1)
        assert cli.main(["train", *tiny.words(o)]) == (0 if name == "same" else 2)
    assert "the data set 'other' has another vocabulary (CharTokenizer(vocab_size=4)) than" in capsys.readouterr().err


def test_sample_reads_a_converted_folder_with_its_tokenizer(tmp_path, capsys):
    convert.save_gpt(tmp_path / "ckpt.pt", small(vocab_size=3), CharTokenizer("abc"))
    assert cli.main(["convert", str(tmp_path / "ckpt.pt"), str(tmp_path / "hf")]) == 0
    words = ["--start=cab", "--num_samples=1", "--max_new_tokens=5", "--device=cpu", "--dtype=float32"]
    capsys.readouterr()
    assert cli.main(["sample", f"--init_from={tmp_path}/hf", *words]) == 0
    out = capsys.readouterr().out.splitlines()[0]
    assert out.startswith("cab") and len(out) == 8 and set(out) <= set("abc")
    assert json.loads((tmp_path / "hf" / huggingface_tokenizer.OURS).read_text())["kind"] == "char"
