"""Corpora: the texts to learn from, as one string each, or of a path in parts.

    embedded          Python's language reference, which every Python installation includes: nothing is downloaded
    shakespeare       tinyshakespeare, downloaded once and verified by its sha256; GPT-2 tokens, as in nanoGPT
    shakespeare_char  the same text; characters, as in nanoGPT
    PATH              a text file in UTF-8 (or UTF-16 with a byte-order mark), or a folder: all its text files, in the order of their names

Line endings become "\\n", as in Python's text mode, and a byte-order mark is dropped. Errors name the file, and the position of
bytes that are not UTF-8.
"""
import codecs
import hashlib
import http.client
import io
import os
import urllib.request
from pathlib import Path

from nanogpt_fast.files import replacing

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TOKENIZER = {"embedded": "char", "shakespeare": "gpt2", "shakespeare_char": "char"}  # each corpus by name, with its default

PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))  # the alphabet of the embedded corpus: 96 characters
ASCII_FOR = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
                           "\u2013": "-", "\u2014": "--", "\u2026": "..."})


def embedded():
    """Python's language reference as text: printable ASCII and newlines.

    The reference itself differs from one Python version to the next (373,265 characters in 3.11, 397,019 in 3.12, 414,243 in
    3.13), so results measured on it belong to one version. All else is fixed: topics come in the order of their names, and the
    text is reduced to PRINTABLE, which is also the vocabulary, even if a version's text does not use all of it. Topics quote one
    another (a fifth of the text), so each paragraph is kept once: else the validation split would hold text that the model has
    seen.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError("this Python has no module pydoc_data, from which the embedded corpus is made (some distributions "
                           "remove it); use a text file of your own, or 'shakespeare_char'") from None
    seen, kept = set(), []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraph = "".join(c for c in paragraph.strip("\n").translate(ASCII_FOR) if c in PRINTABLE)
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
    return "\n\n".join(kept) + "\n"


def shakespeare(path):
    """tinyshakespeare, from the file `path`, downloaded first if it is missing. Raises ValueError, RuntimeError."""
    path = Path(path)
    if not path.exists():
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(f"{SHAKESPEARE_URL} could not be downloaded ({error}). Offline: put the file at {path} "
                               "yourself, or use the corpus 'embedded', which needs no network") from error
        _check_shakespeare(content, SHAKESPEARE_URL)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)
    content = path.read_bytes()
    _check_shakespeare(content, path)
    return decode(content, path)


def _check_shakespeare(content, where):
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise ValueError(f"{where} is not tinyshakespeare: its sha256 is {found}, expected {SHAKESPEARE_SHA256}. "
                         "Remove the file to download it again, or pass its path to use it as it is")


class Text:
    """The text of a file, or of all text files below a folder (hidden and binary ones are skipped), in parts: `"".join(Text(path))`.

    It is read at every iteration, one part after the other, so that a text may be larger than the memory. Iterating raises ValueError
    for what is no text, or has no character but blanks. Raises FileNotFoundError.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file() and not self.path.is_dir():
            raise FileNotFoundError(f"{path} is neither a file nor a folder")

    def __iter__(self):
        blank = True
        for part in _parts_of_file(self.path) if self.path.is_file() else self._parts_of_folder():
            blank = blank and not part.strip()
            yield part
        if blank:
            raise ValueError(f"{self.path} is empty: there is nothing to learn from")

    def _parts_of_folder(self):
        texts = 0
        for path in _files_below(self.path):
            with open(path, "rb") as file:
                beginning = file.read(8192)
            if b"\0" in beginning and _encoding(beginning) == "UTF-8":  # git's test for a binary
                continue
            texts, part = texts + 1, ""
            for part in _parts_of_file(path):
                yield part
            if part and not part.endswith("\n"):
                yield "\n"
        if not texts:
            raise ValueError(f"{self.path} holds no text file")


def read(path):
    """The whole `Text` of a path as one string. Raises what `Text` raises."""
    return "".join(Text(path))


def _files_below(folder):
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(parent, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # neither a named pipe, nor a link to a device or to nothing


# Byte-order marks, UTF-32's first: its little-endian one begins with UTF-16's.
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def _encoding(content):
    return next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "UTF-8")


def decode(content, where):
    """The text of these bytes: UTF-8, or UTF-16 or UTF-32 if they begin with its byte-order mark. Raises a ValueError that names `where`
    and the position of the first invalid byte."""
    return "".join(_parts(io.BytesIO(content), where))


READ = 1 << 20  # bytes at a time


def _parts_of_file(path):
    with open(path, "rb") as file:
        yield from _parts(file, path)


def _parts(file, where):
    """Yield what `decode` returns of an open file's bytes, in parts that are not empty."""
    content = file.read(READ)
    encoding = _encoding(content)
    halves = content[:8192:2], content[1:8192:2]
    for half, other, name in ((*halves, "utf-16be"), (*halves[::-1], "utf-16le")):
        if encoding == "UTF-8" and len(half) > 8 and half.count(0) > len(half) // 2 and other.count(0) < len(other) // 8:
            raise ValueError(f"{where} looks like UTF-16 without a byte-order mark: every second byte is 0. Convert it: "
                             f"iconv -f {name} -t utf-8")
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    position = lines = 0    # bytes and line breaks before `content`
    first = True
    while True:
        try:
            part = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            line = lines + content[:max(0, error.start + len(content) - len(error.object))].count(b"\n") + 1
            at = position + len(content) - len(error.object) + error.start      # `object` begins with what was left of earlier bytes
            where_in, advice = (f" (line {line})", "Convert it, for example: iconv -f latin1 -t utf-8") if encoding == "UTF-8" else (
                "", "It begins with that encoding's byte-order mark, but is damaged or something else")
            raise ValueError(f"{where} is not {encoding}: byte 0x{error.object[error.start]:02x} at position {at}{where_in}, "
                             f"{error.reason}. {advice}") from None
        if part and first:
            part, first = part.removeprefix("\ufeff"), False
        if part:
            yield part
        if not content:
            return
        position, lines = position + len(content), lines + content.count(b"\n")
        content = file.read(READ)
