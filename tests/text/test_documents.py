"""Texts of many documents: rows of .jsonl and .parquet files, several files, and what stands between two documents."""
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from nanogpt_fast.text import corpora, prepare, tokenizers
from nanogpt_fast.text.corpora import Text
from nanogpt_fast.text.tokenizers import END_OF_TEXT, BPETokenizer

ROWS = [{"text": "first\nof two lines", "n": 1}, {"text": "größer 😀\r\n", "n": 2}, {"text": None}, {"text": ""}, {"text": "last", "body": "other"}]
JOINED = "first\nof two lines\ngrößer 😀\nlast\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def jsonl(path, rows=ROWS):
    Path(path).write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")


def tokens(folder, split):
    return np.fromfile(Path(folder) / f"{split}.bin", dtype="<u2").tolist()


@pytest.mark.parametrize("read", [4, 1 << 20])
def test_each_row_of_a_jsonl_file_is_a_document(read, monkeypatch):
    monkeypatch.setattr(corpora, "READ", read)
    jsonl("a.jsonl")
    assert "".join(Text("a.jsonl")) == JOINED.removesuffix("\n")
    assert list(Text("a.jsonl", between=END_OF_TEXT)) == ["first\nof two lines", END_OF_TEXT, "größer 😀\n", END_OF_TEXT, "last"]
    assert "".join(Text("a.jsonl", corpora.RAW)) == Path("a.jsonl").read_text()


@pytest.mark.parametrize("content, field, message", [
    ('{"text": "a"}\n{"body": "b", "n": 1}\n', "text", "a.jsonl, line 2: no field 'text'; the fields are body, n. --field=NAME"),
    ('{"text": "a"}\n{"text": 1}\n', "text", "line 2: the field 'text' is a int, not a text"),
    ('["a"]\n', "text", "line 1: a list, where an object with the field 'text'"),
    ('{"text": "a"}\n\nplain text\n', "text", "line 3: not JSON .*--field=- reads the file as it is"),
    ('{"text": "a\\ud800"}\n', "text", "line 1: half of a surrogate pair at character 1 of 'text'"),
    ('{"text": " "}\n', "text", "a.jsonl is empty"),
])
def test_a_row_without_a_text_is_named_with_its_line(content, field, message):
    Path("a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        "".join(Text("a.jsonl", field))


@pytest.mark.parametrize("folder", [False, True])
def test_json_lines_under_another_name_are_refused_with_the_hint(folder):
    Path("texts").mkdir()
    jsonl("texts/a.txt", [{"body": "one"}, {"body": "two"}])
    Path("texts/a.txt").write_text(Path("texts/a.txt").read_text().replace("\n\n", "\n"))
    with pytest.raises(ValueError, match=r"a.txt looks like JSON lines, with the fields body: rename it to end in .jsonl.*--field=- reads it as"):
        corpora.read("texts" if folder else "texts/a.txt")
    assert "".join(Text("texts/a.txt", corpora.RAW)) == '{"body": "one"}\n{"body": "two"}\n'
    Path("texts/a.txt").write_text('{"one": "object"}\nand a text\n')
    assert corpora.read("texts/a.txt").endswith("a text\n")


def test_each_row_of_a_parquet_file_is_a_document():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"text": [row["text"] for row in ROWS], "n": [1, 2, 3, 4, 5]}), "a.parquet")
    Path("texts").mkdir()
    Path("a.parquet").rename("texts/a.parquet")
    assert "".join(Text("texts")) == JOINED
    with pytest.raises(ValueError, match="a.parquet: no field 'body'; the fields are text, n"):
        "".join(Text("texts/a.parquet", "body"))
    with pytest.raises(ValueError, match="the field 'n' is a int, not a text"):
        "".join(Text("texts/a.parquet", "n"))
    Path("texts/a.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(ValueError, match="a.parquet is not a parquet file, or is damaged"):
        "".join(Text("texts/a.parquet"))


def test_a_parquet_file_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("texts").mkdir()
    Path("texts/a.parquet").write_bytes(b"PAR1\0\0")
    with pytest.raises(RuntimeError, match="reading texts/a.parquet needs a package .*: pip install pyarrow"):
        "".join(Text("texts"))


@pytest.mark.parametrize("package", ["gzip", "bz2", "lzma"])
def test_a_compressed_file_says_how_to_unpack_it(package):
    Path("a.jsonl.x").write_bytes(importlib.import_module(package).compress(b'{"text": "a"}'))
    with pytest.raises(ValueError, match=r"a.jsonl.x is compressed: unpack it first, with (gunzip|bunzip2|unxz)"):
        corpora.read("a.jsonl.x")


def test_documents_without_blanks_are_encoded_a_few_at_a_time():
    parts = ["很长的文本", END_OF_TEXT] * 100
    found = list(tokenizers.chunks(parts, size=20))
    assert "".join(found) == "".join(parts) and max(map(len, found)) < 60
    tokenizer = BPETokenizer.from_text(parts, 300)
    assert [i for part in found for i in tokenizer.encode(part)] == tokenizer.encode("".join(parts))


def test_several_files_are_named_with_commas_or_a_pattern():
    Path("texts").mkdir()
    for name, content in {"b.txt": "second", "a.txt": "first\n", "c.md": "third"}.items():
        Path("texts", name).write_text(content)
    jsonl("d.jsonl", [{"text": "fourth"}])
    assert corpora.read("texts/b.txt, d.jsonl,texts/a.txt") == "second\nfourth\nfirst\n"
    assert corpora.read("texts/*.txt") == corpora.read("texts/a.txt,texts/b.txt") == "first\nsecond\n"
    assert corpora.read("**/*.md,d.jsonl") == "third\nfourth\n"
    assert list(Text("texts", between=END_OF_TEXT)) == ["first\n", END_OF_TEXT, "second", END_OF_TEXT, "third"]
    Path("a,b.txt").write_text("one file\n")
    assert corpora.read("a,b.txt") == "one file\n"
    for missing in ("texts/a.txt,nowhere.txt", "texts/*.rst", "texts/a.txt,", "x" * 5000):
        with pytest.raises(FileNotFoundError, match="is neither a file nor a folder"):
            Text(missing)


def test_several_files_are_a_data_set_of_their_own():
    for name in "abc":
        Path(f"{name}.txt").write_text(f"this is {name}\n" * 30)
    assert prepare.find("a.txt,b.txt", say=lambda _: None) == Path("data/a-and-1-more")
    written = Path("data/a-and-1-more/train.bin").stat().st_mtime_ns
    assert prepare.find("a.txt,b.txt") == Path("data/a-and-1-more") and Path("data/a-and-1-more/train.bin").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="holds a data set made from .*a.txt,.*b.txt: give this one another name"):
        prepare.find("a.txt,c.txt")


def test_byte_pairs_have_their_end_of_text_between_documents_and_never_divided():
    jsonl("a.jsonl", [{"text": "ab" * 20}] * 5)
    text = Text("a.jsonl", between=END_OF_TEXT)
    for val_fraction in np.linspace(0.1, 0.4, 40):
        tokenizer = prepare.write(text, "data/a", "bpe", val_fraction=val_fraction, say=lambda _: None)
        found = tokens("data/a", "train"), tokens("data/a", "val")
        assert sum(split.count(tokenizer.end_of_text) for split in found) == 4
        assert "".join(map(tokenizer.decode, found)) == "".join(text)


def test_the_command_reads_a_field_of_several_files_and_training_keeps_it(capsys):
    jsonl("a.jsonl", [{"body": f"row {i} of {i * i}\n"} for i in range(60)])
    jsonl("b.jsonl", [{"body": "another file"}])
    prepare.main(["*.jsonl", "--field=body", "--tokenizer=bpe", "--vocab_size=300", "--name=rows"])
    assert "a vocabulary of 300 (bpe)" in capsys.readouterr().out
    tokenizer = prepare.load_tokenizer("data/rows")
    assert tokens("data/rows", "val")[-15:].count(0) >= 1 and tokenizer.decode(tokens("data/rows", "val")).endswith("<|endoftext|>another file")
    folder = prepare.find("a.jsonl", tokenizer="bpe", vocab_size=270, field="body", say=lambda _: None)
    jsonl("a.jsonl", [{"body": f"row {i} of {i * i} is changed\n"} for i in range(60)])
    assert prepare.find("a.jsonl", say=lambda _: None) == folder
    assert tokenizers.load(folder / "tokenizer.json").vocab_size == 270


def test_a_data_set_is_prepared_again_where_another_tokenizer_is_asked_for():
    Path("my.txt").write_text("to be, or not to be\n" * 30)
    said = []
    folder = prepare.find("my.txt", say=said.append)
    assert prepare.find("my.txt", tokenizer="char", say=said.append) == folder and len(said) == 2
    prepare.find("my.txt", tokenizer="bpe", vocab_size=260, say=said.append)
    assert said[2] == "data/my was prepared with tokenizer char instead of bpe, vocab_size None instead of 260"
    assert prepare.load_tokenizer(folder).vocab_size == 260 and not (folder / "meta.pkl").exists()
    said.clear()
    assert prepare.find("my.txt", say=said.append) == folder and not said
    with pytest.raises(ValueError, match="data/my was prepared with tokenizer bpe instead of word, vocab_size 260 instead of None. Prepare"):
        prepare.find("my", tokenizer="word")
    with pytest.raises(ValueError, match="vocab_size needs --tokenizer=word or bpe; the tokenizer here is 'char'"):
        prepare.find("my.txt", tokenizer="char", vocab_size=300)
