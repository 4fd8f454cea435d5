"""The tokenizers: round trips over all of Unicode, their files, what they refuse, and nanoGPT's meta.pkl both ways."""
import io
import os
import pickle
import sys
import types

import pytest
import torch
from hypothesis import example, given, strategies as st

from nanogpt_fast.text import tokenizers
from nanogpt_fast.text.tokenizers import CharTokenizer, GPT2Tokenizer, TokenizerError, WordTokenizer

# hypothesis leaves surrogates out of st.text() by default; they are characters of a Python string like any other, and the pair
# is two of them, which a careless JSON merges into one
texts = st.text(st.characters(exclude_categories=()), min_size=1)
surrogates = "a \ud83d\ude00 \ud83d"
SHAKESPEARE = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@given(texts)
@example(surrogates)
@pytest.mark.parametrize("make", [CharTokenizer.from_text, WordTokenizer.from_text,
                                  lambda text: WordTokenizer.from_text(text, unknown="error")], ids=["char", "word", "strict"])
def test_decoding_what_was_encoded_gives_the_text_back(make, text):
    tokenizer = make(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(st.text(st.sampled_from("ab'.!\n \t\x1c\u2028ä1")), st.integers(1, 9))
@example("don't stop ... now", 3)
def test_the_parts_of_a_text_are_encoded_as_the_whole(text, size):
    """GPT-2's pieces, too: this is the pattern by which tiktoken splits a text into what its merges work on."""
    tokenizers.CHUNK, before = size, tokenizers.CHUNK
    try:
        parts = list(tokenizers.chunks(text))
        assert "".join(parts) == text == "".join(tokenizers.chunks(text, anywhere=True))
        assert all(len(part) >= size for part in parts[:-1]) and all(len(part) <= size for part in tokenizers.chunks(text, anywhere=True))
        for pattern in (WordTokenizer.PIECES.findall, gpt2_pieces):
            assert [piece for part in parts for piece in pattern(part)] == pattern(text)
        if text:
            assert WordTokenizer.from_text(text) == WordTokenizer(["<unk>", *sorted(set(WordTokenizer.PIECES.findall(text)), key=lambda piece: (
                -WordTokenizer.PIECES.findall(text).count(piece), piece))])
    finally:
        tokenizers.CHUNK = before


def gpt2_pieces(text):
    regex = pytest.importorskip("regex")
    return regex.findall(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s", text)


@given(texts, st.sampled_from(["char", "word"]))
@example(surrogates, "word")
@example(surrogates, "char")
def test_a_saved_tokenizer_comes_back_equal_and_load_tells_its_kind(tmp_path_factory, text, kind):
    tokenizer = tokenizers.KINDS[kind].from_text(text)
    path = tmp_path_factory.mktemp("tokenizer") / "file"
    tokenizer.save(path)
    again = tokenizers.load(path)
    assert again == tokenizer and type(again) is tokenizers.KINDS[kind]
    assert again.decode(again.encode(text)) == text
    assert os.listdir(path.parent) == ["file"]  # the temporary name is gone


@given(texts, st.sampled_from(["char", "word"]))
@example(surrogates, "word")
@example(surrogates, "char")
def test_the_state_travels_in_a_checkpoint_that_loads_with_weights_only(text, kind):
    tokenizer = tokenizers.KINDS[kind].from_text(text)
    file = io.BytesIO()
    torch.save({"tokenizer": tokenizer.to_state()}, file)
    file.seek(0)
    assert tokenizers.from_state(torch.load(file, weights_only=True)["tokenizer"]) == tokenizer


@given(texts, texts)
def test_splitting_into_words_loses_no_character(one, other):
    text = one + other
    assert "".join(WordTokenizer.PIECES.findall(text)) == text


def test_ids_may_come_as_a_tensor_or_any_iterable():
    tokenizer = CharTokenizer(SHAKESPEARE)
    assert tokenizer.decode(torch.tensor([46, 47, 47])) == tokenizer.decode(iter([46, 47, 47])) == "hii"


def test_a_character_outside_the_vocabulary_names_itself():
    with pytest.raises(TokenizerError, match=r"character 'é' \(U\+00E9\) at position 3 is not in this vocabulary of 65"):
        CharTokenizer(SHAKESPEARE).encode("café")


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), WordTokenizer(["<unk>", "a", "b"])], ids=["char", "word"])
@pytest.mark.parametrize("bad", [3, -1])
def test_an_id_outside_the_vocabulary_names_itself(tokenizer, bad):
    with pytest.raises(TokenizerError, match=rf"token id {bad} is outside this vocabulary of 3"):
        tokenizer.decode([0, bad])


def test_words_are_numbered_by_frequency_then_by_code_point_after_the_mark():
    tokenizer = WordTokenizer.from_text("b a b don't, c")
    assert tokenizer.words == ["<unk>", " ", "b", ",", "a", "c", "don't"]


def test_the_size_limit_keeps_the_most_frequent_words_and_marks_the_rest():
    tokenizer = WordTokenizer.from_text("to be or not to be", max_vocab_size=4)
    assert tokenizer.vocab_size == 4 and tokenizer.words == ["<unk>", " ", "be", "to"]
    assert tokenizer.decode(tokenizer.encode("to be or not")) == "to be <unk> <unk>"


def test_under_the_rule_error_an_unknown_word_names_itself():
    tokenizer = WordTokenizer.from_text("to be", unknown="error")
    assert tokenizer.vocab_size == 3
    with pytest.raises(TokenizerError, match="word 'exist' is not in this vocabulary of 3"):
        tokenizer.encode("to exist")


@given(texts)
def test_no_text_contains_the_mark_by_accident(text):
    tokenizer = WordTokenizer.from_text(text + "<unk>")
    assert 0 not in tokenizer.encode(text + "<unk>")


@pytest.mark.parametrize("make", [
    lambda: CharTokenizer([]), lambda: CharTokenizer(["ab"]), lambda: CharTokenizer("aa"), lambda: CharTokenizer([1, 2]),
    lambda: CharTokenizer.from_text(""), lambda: WordTokenizer.from_text(""), lambda: WordTokenizer(["a"]),
    lambda: WordTokenizer(["<unk>", "a", "a"]), lambda: WordTokenizer(["<unk>", ""]),
    lambda: WordTokenizer(["a"], unknown="guess"),
    lambda: WordTokenizer.from_text("a b", max_vocab_size=1),
    lambda: WordTokenizer.from_text("a b", max_vocab_size=0, unknown="error"),
    lambda: tokenizers.from_state({"kind": "morse"}), lambda: tokenizers.from_state(["kind"]),
    lambda: tokenizers.from_state({"kind": "char"}), lambda: tokenizers.from_state({"kind": "word", "words": 3}),
    lambda: tokenizers.from_state({"kind": "char", "chars": "ab", "more": 1}),
    lambda: tokenizers.from_state({"kind": ["char"]}),
])
def test_what_is_no_vocabulary_is_refused(make):
    with pytest.raises(TokenizerError):
        make()


def test_a_meta_pkl_of_nanogpt_is_read_and_ours_is_read_by_nanogpt(tmp_path):
    stoi = {c: i for i, c in enumerate(SHAKESPEARE)}  # what upstream's prepare.py writes
    with open(tmp_path / "meta.pkl", "wb") as f:
        pickle.dump({"vocab_size": 65, "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}, f)
    tokenizer = tokenizers.load(tmp_path / "meta.pkl")
    assert tokenizer == CharTokenizer.from_text(SHAKESPEARE[::-1])
    tokenizer.save(tmp_path / "ours.pkl")
    with open(tmp_path / "ours.pkl", "rb") as f:  # what upstream's sample.py does
        meta = pickle.load(f)
    assert meta == {"vocab_size": 65, "itos": tokenizer.itos, "stoi": stoi}


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 1, "itos": {0: Exploit()}, "stoi": {}}, protocol))
    with pytest.raises(TokenizerError, match="meta.pkl: refused: it imports (posix|nt).system"):
        tokenizers.load("meta.pkl")
    assert os.listdir() == ["meta.pkl"]


META = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}


@pytest.mark.parametrize("content", [
    b"", b"\x80", b"nonsense", pickle.dumps(META)[:-5], pickle.dumps([1]), pickle.dumps({"stoi": {}}),
    pickle.dumps({**META, "vocab_size": 1}), pickle.dumps({**META, "stoi": {"a": 1, "b": 0}}),
    pickle.dumps({**META, "itos": {0: "a", 2: "b"}}), pickle.dumps({**META, "itos": {0: "a", 1: []}}),
    pickle.dumps({"vocab_size": 1, "itos": {0: "ab"}, "stoi": {"ab": 0}}),
    b'{"kind": "word"', b'{"kind": "word", "words": [[1]]}', b'{"words": []}',
])
def test_a_damaged_or_foreign_file_is_a_clear_error_that_names_the_file(tmp_path, content):
    (tmp_path / "tokenizer.x").write_bytes(content)
    with pytest.raises(TokenizerError, match="tokenizer.x: "):
        tokenizers.load(tmp_path / "tokenizer.x")


def test_loading_through_the_wrong_class_says_what_the_file_holds(tmp_path):
    CharTokenizer("ab").save(tmp_path / "meta.pkl")
    with pytest.raises(TokenizerError, match="holds a CharTokenizer, not a WordTokenizer"):
        WordTokenizer.load(tmp_path / "meta.pkl")


def test_a_write_that_fails_leaves_the_former_file_whole(tmp_path, monkeypatch):
    CharTokenizer("ab").save(tmp_path / "meta.pkl")

    def disk_full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError):
        CharTokenizer("abc").save(tmp_path / "meta.pkl")
    assert tokenizers.load(tmp_path / "meta.pkl") == CharTokenizer("ab")
    assert os.listdir(tmp_path) == ["meta.pkl"]


# GPT-2's vocabulary has to be fetched, so these take bytes and one special token in its place, through the real tiktoken.

@pytest.fixture
def bytes_for_gpt2(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    small = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": small}[name])


def test_gpt2_round_trips_and_keeps_its_special_token(bytes_for_gpt2, tmp_path):
    tokenizer = GPT2Tokenizer()
    text = "hi there, 🌍<|endoftext|>"
    ids = tokenizer.encode(text)
    assert ids[-1] == 256 and tokenizer.decode(ids) == text and tokenizer.vocab_size == 257
    tokenizer.save(tmp_path / "tokenizer.json")
    assert tokenizers.load(tmp_path / "tokenizer.json") == tokenizer
    with pytest.raises(TokenizerError, match="token id 50300"):  # from the padded end of a model's vocabulary
        tokenizer.decode([50300])


def test_without_tiktoken_gpt2_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(RuntimeError, match="pip install tiktoken"):
        GPT2Tokenizer()


def test_without_its_vocabulary_gpt2_says_so(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")
    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=offline))
    with pytest.raises(RuntimeError, match="fetched over the network on first use, and that failed: ConnectionError: no route"):
        GPT2Tokenizer()
