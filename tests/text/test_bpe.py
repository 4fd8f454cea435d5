"""Byte pairs learnt from one's own text: any text survives, in parts as in one piece, and the vocabulary is GPT-2's kind of one."""
import io
import json
import sys

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from nanogpt_fast.text import prepare, tokenizers
from nanogpt_fast.text.tokenizers import BYTES, END_OF_TEXT, BPETokenizer, CharTokenizer, TokenizerError, WordTokenizer

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer, größer 😀 12 times\n" * 20
TOKENIZER = BPETokenizer.from_text(TEXT, 310)


@given(st.text())
@example("")
@example(TEXT)
@example(f"one{END_OF_TEXT}two")
def test_decoding_what_was_encoded_gives_any_text_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text and all(0 <= i < TOKENIZER.vocab_size for i in ids)
    lengths = TOKENIZER.byte_lengths()
    assert sum(lengths[i] for i in ids) == len(text.replace(END_OF_TEXT, "").encode())


@given(st.text(st.sampled_from("ab'.!\n \t\x1c\u2028ä1to be")), st.integers(1, 9))
@settings(max_examples=40)
def test_the_parts_of_a_text_are_encoded_as_the_whole(text, size):
    assert [i for part in tokenizers.chunks(text, size=size) for i in TOKENIZER.encode(part)] == TOKENIZER.bpe.encode(text).ids


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_text_in_parts_of_any_size_teaches_the_same(size, monkeypatch):
    monkeypatch.setattr(tokenizers, "CHUNK", size)
    assert BPETokenizer.from_text([TEXT[i:i + size] for i in range(0, len(TEXT), size)], 310) == TOKENIZER


def test_the_vocabulary_is_the_end_of_a_text_the_bytes_and_what_was_learnt():
    assert TOKENIZER.vocab_size == 310 and TOKENIZER.vocab[0] == END_OF_TEXT and set(TOKENIZER.vocab[1:257]) == set(BYTES.values())
    assert TOKENIZER.encode(END_OF_TEXT) == [TOKENIZER.end_of_text] == [0]
    assert len(TOKENIZER.encode(TEXT)) < len(TEXT) // 2
    assert len(TOKENIZER.merges) == 310 - 257 and "Ġ t" in TOKENIZER.merges
    few = BPETokenizer.from_text("ab ab" + END_OF_TEXT + "cd", 300)     # "b a" crosses a space; what occurs once is not learnt
    assert few.vocab[257:] == ["ab"] and BPETokenizer.from_text(f"ab{END_OF_TEXT}ab{END_OF_TEXT}", 300) == few


def test_surrogates_are_read_as_gpt2s_tokenizer_reads_them():
    assert TOKENIZER.decode(TOKENIZER.encode("\ud83d\ude00 \ud83d")) == "😀 \ufffd"


def test_the_state_travels_in_a_file_and_in_a_checkpoint_that_loads_with_weights_only(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    assert tokenizers.load(tmp_path / "tokenizer.json") == TOKENIZER
    file = io.BytesIO()
    torch.save(TOKENIZER.to_state(), file)
    file.seek(0)
    assert tokenizers.from_state(torch.load(file, weights_only=True)) == TOKENIZER


@pytest.mark.parametrize("change", [
    dict(vocab=TOKENIZER.vocab[1:]), dict(vocab=[*TOKENIZER.vocab, "a"]), dict(vocab=TOKENIZER.vocab[:200]), dict(vocab=[1]), dict(vocab=None),
    dict(merges=["q z"]), dict(merges=[1]), dict(merges=["a"]), dict(more=1)])
def test_a_damaged_state_is_refused(change):
    with pytest.raises(TokenizerError):
        tokenizers.from_state({**TOKENIZER.to_state(), **change})


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(TokenizerError, match="vocab_size=256 leaves no place .* use at least 257"):
        BPETokenizer.from_text(TEXT, 256)


def test_without_its_package_it_says_what_to_install_and_training_still_knows_the_size(tmp_path, monkeypatch):
    prepare.write(TEXT, tmp_path, "bpe", vocab_limit=300, say=lambda _: None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeError, match="pip install tokenizers, or use a char or word tokenizer"):
        BPETokenizer.from_text(TEXT)
    size, tokenizer, why_not = prepare.load_vocabulary(tmp_path)
    assert size == 300 == len(json.loads((tmp_path / "tokenizer.json").read_text())["vocab"])
    assert tokenizer is None and "pip install tokenizers" in why_not


def test_every_kind_knows_how_many_bytes_an_id_stands_for():
    assert CharTokenizer("aß😀").byte_lengths() == [1, 2, 4]
    assert WordTokenizer(["<unk>", "größer", " "]).byte_lengths() == [None, 8, 1]
    assert WordTokenizer(["größer", " "], unknown="error").byte_lengths() == [8, 1]
