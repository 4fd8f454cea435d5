"""Corpora and the files made from them (C29): read and written as nanoGPT does, with clear errors for texts that are none."""
import codecs
import hashlib
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import kills
import numpy as np
import disks
import pytest

from nanogpt_fast.text import corpora, prepare, tokenizers

TEXT = "To be, or not to be, that is the question.\n" * 30


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # data/ is relative, as nanoGPT's is
    return tmp_path


def tokens(folder, split):
    return np.fromfile(Path(folder) / f"{split}.bin", dtype="<u2")


def offline(*args, **kwargs):
    raise OSError("network is unreachable")


# ---------------------------------------------------------------------------------------------------------- corpora

def test_the_embedded_corpus_is_printable_ascii_with_every_paragraph_once():
    text = corpora.embedded()
    paragraphs = [p for p in text.rstrip("\n").split("\n\n") if p]
    assert 300_000 < len(text) < 600_000 and set(text) <= set(corpora.PRINTABLE)
    assert len(paragraphs) == len(set(paragraphs))
    assert text == corpora.embedded()


def test_the_embedded_vocabulary_is_the_same_on_every_python_version():
    assert prepare.write(corpora.embedded(), "data/embedded", source="embedded").vocab_size == 96


def test_a_python_without_pydoc_data_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="has no module pydoc_data"):
        corpora.embedded()


def shakespeare_file():
    here = Path(__file__).parents[2]
    found = os.environ.get("NANOGPT_FAST_SHAKESPEARE") or here / "data/shakespeare_char/input.txt"
    if not Path(found).is_file():
        pytest.skip("set NANOGPT_FAST_SHAKESPEARE to tinyshakespeare's input.txt")
    return Path(found)


def test_shakespeare_gives_the_figures_that_nanogpt_prints(monkeypatch, tmp_path):
    content = shakespeare_file().read_bytes()
    monkeypatch.setattr(corpora.urllib.request, "urlopen", lambda url, timeout: open(shakespeare_file(), "rb"))
    folder = prepare.find("shakespeare_char")
    assert (folder / "input.txt").read_bytes() == content
    assert (len(tokens(folder, "train")), len(tokens(folder, "val"))) == (1_003_854, 111_540)
    assert tokens(folder, "train")[:10].tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47]
    assert tokens(folder, "val")[:10].tolist() == [12, 0, 0, 19, 30, 17, 25, 21, 27, 10]
    meta = pickle.loads((folder / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == 65 and [meta["stoi"][c] for c in "hii there"] == [46, 47, 47, 1, 58, 46, 43, 56, 43]


def test_offline_shakespeare_says_what_to_do(monkeypatch):
    monkeypatch.setattr(corpora.urllib.request, "urlopen", offline)
    with pytest.raises(RuntimeError, match=r"network is unreachable.*put the file at data.shakespeare_char.input\.txt"):
        prepare.find("shakespeare_char")
    assert not Path("data/shakespeare_char/train.bin").exists()


def test_a_download_that_is_another_text_is_refused_and_not_kept(monkeypatch, tmp_path):
    (tmp_path / "proxy").write_bytes(b"<html>log in first</html>")
    monkeypatch.setattr(corpora.urllib.request, "urlopen", lambda url, timeout: open(tmp_path / "proxy", "rb"))
    with pytest.raises(ValueError, match="is not tinyshakespeare: its sha256 is"):
        corpora.shakespeare("input.txt")
    assert not Path("input.txt").exists()


def test_a_text_file_is_read_as_pythons_text_mode_does(tmp_path):
    (tmp_path / "windows.txt").write_bytes("\ufeffone\r\ntwo\rthrée\n".encode())
    assert corpora.read("windows.txt") == "one\ntwo\nthrée\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_text_with_a_byte_order_mark_is_read_from_a_file_and_from_a_folder(encoding, tmp_path):
    text = "a first line\nund ein zweites, größeres\n"
    mark = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-16-le": codecs.BOM_UTF16_LE}.get(encoding, b"")    # the others write their own
    (tmp_path / "a.txt").write_bytes(mark + text.encode(encoding))
    (tmp_path / "b.bin").write_bytes(b"\0\1\2")
    assert corpora.read(tmp_path / "a.txt") == text and corpora.read(tmp_path) == text


@pytest.mark.parametrize("content", [
    b"one\r\ntwo\rthr\xc3\xa9e \xf0\x9f\x98\x80\n\r\n\r", b"\xef\xbb\xbfmark\r", "größer\r\n".encode("utf-16"), "größer\r\n\r".encode("utf-32"), b"",
    b"good\nna\xefve and so on", b"line\n\nna\xc3", b"\xf0\x9f\x98 cut", "line".encode("utf-16") + b"x"])
def test_a_text_reads_the_same_in_parts_of_any_size(content, monkeypatch):
    def found():
        try:
            return corpora.decode(content, "a.txt")
        except ValueError as error:
            return str(error)
    whole = found()
    assert content or whole == ""
    for size in range(4, 12):
        monkeypatch.setattr(corpora, "READ", size)
        assert found() == whole


PEAK = """
import re, sys
from nanogpt_fast.text import corpora, prepare, tokenizers
tokenizers.CHUNK = corpora.READ = 1 << 16
prepare.write(corpora.Text(sys.argv[1]), "data/" + sys.argv[2], sys.argv[2], say=lambda _: None)
print(re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\\t", " "))[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")     # ru_maxrss is at least the parent's
@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_a_longer_text_takes_no_more_memory(kind, tmp_path):
    peaks = []
    for megabytes in (1, 5):
        (tmp_path / "my.txt").write_text("To be, or not to be, that is it.\r\n" * (megabytes << 20 >> 5), newline="")
        done = subprocess.run([sys.executable, "-c", PEAK, "my.txt", kind], capture_output=True, text=True, check=True,
                              env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 2, f"{peaks} MiB: a text of 4 MiB more was held"
    assert len(tokens(f"data/{kind}", "train")) + len(tokens(f"data/{kind}", "val")) > 1_000_000


def test_a_text_given_in_parts_makes_the_same_files(tmp_path):
    text = TEXT + "größer 😀 don't\n  two\n\n" * 20
    for kind in ("char", "word"):
        prepare.write(text, "data/whole", kind, source="my.txt", say=lambda _: None)
        for size in (1, 7, 1000):
            prepare.write([text[i:i + size] for i in range(0, len(text), size)], "data/parts", kind, source="my.txt", say=lambda _: None)
            for path in Path("data/whole").iterdir():
                assert path.read_bytes() == (Path("data/parts") / path.name).read_bytes()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused_with_the_command_that_converts_it(encoding, tmp_path):
    (tmp_path / "a.txt").write_bytes("a first line\nand another\n".encode(encoding))
    with pytest.raises(ValueError, match=f"a.txt looks like UTF-16 without a byte-order mark.*iconv -f {encoding.replace('16-', '16')} -t utf-8"):
        corpora.read(tmp_path / "a.txt")


def test_damaged_utf_16_is_named_with_its_position(tmp_path):
    (tmp_path / "a.txt").write_bytes("line".encode("utf-16") + b"x")
    with pytest.raises(ValueError, match="a.txt is not UTF-16: byte 0x78 at position 10, truncated data. It begins with"):
        corpora.read(tmp_path / "a.txt")


def test_bytes_that_are_not_utf8_are_named_with_their_position(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"good\nna\xefve")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8: byte 0xef at position 7 \(line 2\)"):
        corpora.read("latin.txt")


def test_a_folder_is_its_text_files_in_order_without_hidden_and_binary_ones(tmp_path):
    contents = {"b.txt": b"second", "a/x.md": b"third\n", "a.txt": b"first\n", ".git/c": b"hidden", "image.png": b"\x89P\0G"}
    for name, content in contents.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(content)
    assert corpora.read("texts") == "first\nsecond\nthird\n"


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_file_or_folder_is_an_error(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="empty.txt is empty"):
        corpora.read("empty.txt")
    with pytest.raises(ValueError, match="folder holds no text file"):
        corpora.read("folder")


# ---------------------------------------------------------------------------------------------------------- files

def test_the_files_are_nanogpts(tmp_path):
    prepare.write(TEXT, "data/play")
    chars = sorted(set(TEXT))
    cut = int(len(TEXT) * 0.9)
    assert "".join(chars[i] for i in tokens("data/play", "train")) == TEXT[:cut]
    assert "".join(chars[i] for i in tokens("data/play", "val")) == TEXT[cut:]
    assert pickle.loads(Path("data/play/meta.pkl").read_bytes()) == {
        "vocab_size": len(chars), "stoi": {c: i for i, c in enumerate(chars)}, "itos": dict(enumerate(chars))}


def test_files_that_nanogpts_prepare_wrote_are_read(tmp_path):
    folder = tmp_path / "data/theirs"
    folder.mkdir(parents=True)
    chars = sorted(set(TEXT))
    ids = np.array([chars.index(c) for c in TEXT], dtype=np.uint16)
    ids[:900].tofile(folder / "train.bin")
    ids[900:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": dict(enumerate(chars)),
                                                    "stoi": {c: i for i, c in enumerate(chars)}}))
    assert prepare.find("theirs") == Path("data/theirs")
    assert prepare.load_tokenizer("data/theirs").decode(tokens("data/theirs", "train")) == TEXT[:900]


def test_long_texts_are_encoded_in_pieces_without_a_seam(monkeypatch):
    monkeypatch.setattr(tokenizers, "CHUNK", 10)  # the last piece is a single character
    prepare.write(TEXT, "data/play")
    assert prepare.load_tokenizer("data/play").decode(tokens("data/play", "train")) == TEXT[:int(len(TEXT) * 0.9)]


def test_a_word_tokenizer_is_kept_and_replaces_a_former_vocabulary():
    prepare.write(TEXT, "data/play")
    prepare.write(TEXT, "data/play", "word", vocab_limit=8)
    tokenizer = prepare.load_tokenizer("data/play")
    assert isinstance(tokenizer, tokenizers.WordTokenizer) and tokenizer.vocab_size == 8
    assert not Path("data/play/meta.pkl").exists()
    prepare.write(TEXT, "data/play")
    assert not Path("data/play/tokenizer.json").exists()


def test_a_vocabulary_that_16_bits_cannot_number_is_refused(monkeypatch):
    monkeypatch.setattr(prepare, "MAX_VOCAB_SIZE", 10)
    with pytest.raises(ValueError, match="vocabulary of 17; the files hold 16-bit ids, 10 at most"):
        prepare.write(TEXT, "data/play")
    assert prepare.write(TEXT, "data/play", "word", vocab_limit=10).vocab_size == 10


def test_a_text_too_short_to_split_is_refused():
    with pytest.raises(ValueError, match="1 characters cannot be split"):
        prepare.write("x", "data/x")


def test_a_failure_on_the_way_leaves_the_former_data_whole(monkeypatch):
    prepare.write(TEXT, "data/play")
    before = {path.name: path.read_bytes() for path in Path("data/play").iterdir()}

    def full_disk(file, tokenizer, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_write_ids", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare.write(TEXT[::-1] + "new", "data/play")
    assert {path.name: path.read_bytes() for path in Path("data/play").iterdir()} == before


def test_a_kill_before_any_call_leaves_the_former_data_the_new_or_visibly_none(tmp_path):
    new = TEXT + "\u00df"
    found = []
    for last in itertools.count():
        shutil.rmtree("data", ignore_errors=True)
        prepare.write(TEXT, "data/play", "word")
        try:
            with kills.killed_before(last):
                prepare.write(new, "data/play")
            break
        except kills.Killed:
            pass
        try:
            tokenizer = prepare.load_tokenizer(prepare.find("play"))
            text = tokenizer.decode([*tokens("data/play", "train"), *tokens("data/play", "val")])
            found.append({TEXT: "former", new: "new"}[text])
        except FileNotFoundError as error:
            assert "no data set 'play'" in str(error)
            found.append("none")
        prepare.write(new, "data/play")
        assert not list(Path("data/play").glob("*.tmp"))
    assert set(found) == {"former", "none", "new"} and found == sorted(found, key=["former", "none", "new"].index)
    assert found.count("none") == 5     # from the removal of train.bin to its rename


def test_a_disk_that_is_full_at_the_last_moment_leaves_the_former_data_whole(monkeypatch):
    prepare.write(TEXT, "data/play")
    before = {path.name: path.read_bytes() for path in Path("data/play").iterdir()}
    disks.full_at_fsync(monkeypatch, 4)
    with pytest.raises(OSError, match="No space left"):
        prepare.write(TEXT[::-1] + "new", "data/play")
    assert {path.name: path.read_bytes() for path in Path("data/play").iterdir()} == before


def test_a_second_process_waits_for_the_first_and_says_so(tmp_path):
    code = ("import sys; from nanogpt_fast import files\n"
            "with files.locked(sys.argv[1], print): print('locked', flush=True); sys.stdin.readline()")
    Path("data/play").mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", code, "data/play"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert process.stdout.readline() == b"locked\n"
    said = []

    def say(text):
        said.append((text, Path("data/play/train.bin").exists()))
        if "waiting" in text:
            process.stdin.close()   # the other one ends

    prepare.write(TEXT, "data/play", say=say)
    assert process.wait() == 0
    process.stdout.close()
    assert said[0] == ("another process writes to data/play: waiting for its end", False) and said[-1][1]


# ---------------------------------------------------------------------------------------------------------- find

def test_a_text_is_prepared_when_it_is_named_and_again_only_when_it_changes(tmp_path):
    said = []
    (tmp_path / "my.txt").write_text(TEXT)
    assert prepare.find("my.txt", say=said.append) == Path("data/my")
    assert said[0] == "preparing my.txt in data/my"
    written = os.stat("data/my/train.bin").st_mtime_ns
    prepare.find("my.txt")
    assert os.stat("data/my/train.bin").st_mtime_ns == written
    (tmp_path / "my.txt").write_text(TEXT + TEXT.upper())
    os.utime(tmp_path / "my.txt", (0, 0))  # a copy may carry any date
    prepare.find("my.txt")
    assert len(tokens("data/my", "train")) == int(2 * len(TEXT) * 0.9)


def test_a_text_that_changed_keeps_the_tokenizer_it_was_prepared_with(tmp_path):
    (tmp_path / "my.txt").write_text(TEXT)
    prepare.main(["my.txt", "--tokenizer=word", "--vocab_size=9", "--val_fraction=0.5"])
    (tmp_path / "my.txt").write_text(TEXT * 2)
    tokenizer = prepare.load_tokenizer(prepare.find("my.txt"))
    assert isinstance(tokenizer, tokenizers.WordTokenizer) and tokenizer.vocab_size == 9
    assert len(tokens("data/my", "train")) == len(tokens("data/my", "val"))


def test_another_text_of_the_same_name_is_not_taken_for_it_and_overwrites_nothing(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my.txt").write_text(TEXT + folder)
    prepare.find("one/my.txt")
    with pytest.raises(ValueError, match=r"data/my holds a data set made from .*one/my.txt.*--name=NAME"):
        prepare.find("two/my.txt")


def test_a_prepared_folder_is_found_by_name_and_by_path(tmp_path):
    prepare.write(TEXT, "data/play")
    assert prepare.find("play") == Path("data/play")
    assert prepare.find("data/play") == Path("data/play")
    assert prepare.find(str(tmp_path / "data/play")) == tmp_path / "data/play"


def test_a_data_set_that_is_not_there_says_what_is():
    prepare.write(TEXT, "data/play")
    with pytest.raises(FileNotFoundError, match="no data set 'plya'.*Prepared in data: play. Corpora: embedded, shakespeare"):
        prepare.find("plya")


def test_the_command_prepares_and_says_how_to_train(tmp_path, capsys):
    (tmp_path / "my.txt").write_text(TEXT)
    prepare.main(["my.txt", "--name", "other"])
    out = capsys.readouterr().out
    assert "train on it: nanogpt-fast train --dataset=other" in out and "17 (char): 1,161 tokens to train on" in out
    assert hashlib.sha256(TEXT.encode()).hexdigest() in Path("data/other/source.json").read_text()


@pytest.mark.parametrize("argv, message", [
    (["nowhere.txt"], "'nowhere.txt' is not a file, a folder or a corpus"),
    (["shakespear"], "nearest: shakespeare"),
    (["embedded", "--vocab_size=10"], "vocab_size needs --tokenizer=word"),
    (["embedded", "--tokenizer=bpx"], "tokenizer is 'bpx'; expected"),
    (["embedded", "--tokenizer=bpe", "--vocab_size=256"], "vocab_size=256 leaves no place for the 256 bytes"),
    (["embedded", "--tokenizer=bpe", "--vocab_size=65536"], "vocab_size is 65,536; the files hold 16-bit ids, 65,535 at most"),
    (["embedded", "--val_fraction=1"], "val_fraction is 1.0"),
])
def test_bad_requests_are_one_clear_line(argv, message):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        prepare.main(argv)
    assert message in str(raised.value)


READERS = {  # what a user names, as a call; none of these modules imports torch
    "a folder of texts": ("texts/special", "from nanogpt_fast.text import corpora; print(corpora.read('texts').strip())", "a text"),
    "a data set": ("data/my/train.bin", "from nanogpt_fast.text import prepare; print(prepare.find('data/my').as_posix())", "data/my"),
    "its source": ("data/my/source.json", "from nanogpt_fast.text import prepare; print(prepare.find('my.txt').name)", "something else"),
    "its vocabulary": ("data/my/meta.pkl", "from nanogpt_fast.text import prepare; prepare.load_tokenizer('data/my')", "meta.pkl is a"),
    "a config file": ("my.py", "from nanogpt_fast import options\noptions.parse(options.option, ['my.py'], '')", "my.py is a device"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes")
@pytest.mark.parametrize("special", ["a named pipe", "a device"])
@pytest.mark.parametrize("reader", READERS)
def test_a_named_pipe_and_an_endless_device_are_not_read(reader, special, tmp_path):
    if (reader, special) == ("a config file", "a named pipe"):
        pytest.skip("a shell's <(...) is one, and works")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a text\n")
    (tmp_path / "my.txt").write_text(TEXT)
    prepare.write(TEXT, "data/my", source="my.txt", say=lambda _: None)
    path, code, said = READERS[reader]
    Path(path).unlink(missing_ok=True)
    os.mkfifo(path) if special == "a named pipe" else Path(path).symlink_to("/dev/zero")
    code = ("import dataclasses, resource, signal\nresource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\nsignal.alarm(10)\n"
            + code.replace("options.option", "dataclasses.make_dataclass('Options', ())"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    assert said in (done.stdout + done.stderr or str(done.returncode)).splitlines()[-1]
