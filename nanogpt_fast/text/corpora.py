"""Corpora: the texts to learn from, as one string each, or of a path in parts.

    embedded          Python's language reference, which every Python installation includes: nothing is downloaded
    shakespeare       tinyshakespeare, downloaded once and verified by its sha256; GPT-2 tokens, as in nanoGPT
    shakespeare_char  the same text; characters, as in nanoGPT
    PATH              a text file in UTF-8 (or UTF-16 with a byte-order mark), or a folder: all its text files, in the order of their names;
                      in .jsonl and .parquet files every row is a document, whose text is one field. Several paths: a.txt,b.txt or *.txt

Line endings become "\\n", as in Python's text mode, and a byte-order mark is dropped. Errors name the file, and the position of
bytes that are not UTF-8.
"""
import codecs
import glob
import hashlib
import http.client
import io
import json
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


RAW = "-"   # the field that stands for the whole file, as it is


class Text:
    """The text of files, in parts: `"".join(Text(source))`. What is between two documents is a part of its own.

    source:  the path of a file; of a folder, for all text files below it (hidden and binary ones are skipped); several of these with
             commas between them; or a pattern, such as texts/*.txt. A file is a document, and so is each row of a .jsonl (.ndjson) or
             .parquet file
    field:   which field of a row is its text; "-" reads a .jsonl file as it is
    between: what stands between two documents: "<|endoftext|>"; or "\\n", which is left out where a document ends with it

    It is read at every iteration, one part after the other, so that a text may be larger than the memory. Iterating raises ValueError
    for what is no text, or has no character but blanks, and RuntimeError where a package is missing. Raises FileNotFoundError.
    """

    def __init__(self, source, field="text", between="\n"):
        self.source, self.field, self.between = source, field, between
        self.paths = paths_of(source)
        if not self.paths:
            raise FileNotFoundError(f"{source} is neither a file nor a folder, and no pattern or list (a.txt,b.txt) of files that exist")

    def __iter__(self):
        end, begins = "", False     # the last character so far; whether a document begins
        several, blank = len(self.paths) > 1 or self.paths[0].is_dir(), True
        for part in self._parts():
            if not part:
                begins = True
                continue
            if begins and end and not (end == self.between == "\n"):
                yield self.between
            end, begins = part[-1], False
            blank = blank and not part.strip()
            yield part
        if blank:
            raise ValueError(f"{self.source} is empty: it holds no text")
        if several and self.between == "\n" != end:
            yield "\n"

    def _parts(self):
        """Yield the parts of all files, and "" after each document."""
        for path in self.paths:
            texts = 0
            for path, below in ((path, False),) if path.is_file() else ((file, True) for file in _files_below(path)):
                rows = ROWS.get(path.suffix.lower()) if self.field != RAW else None
                if below and not rows and _is_binary(path):
                    continue
                texts += 1
                if rows:
                    for row in rows(path, self.field):
                        yield from (row, "")
                else:
                    yield from _parts_of_text(path, self.field)
                    yield ""
            if not texts:
                raise ValueError(f"{path} holds no text file")


def paths_of(source):
    """The files and folders that a source names, as Paths, or [] if it names none. A path that exists is taken as it is; a pattern
    names files."""
    if os.path.isfile(source) or os.path.isdir(source):
        return [Path(source)]
    if "," in source:
        named = [paths_of(name.strip()) for name in source.split(",")]
        return [path for paths in named for path in paths] if all(named) else []
    return [Path(path) for path in sorted(glob.glob(source, recursive=True)) if os.path.isfile(path)] if glob.has_magic(source) else []


def refuse_missing(source):
    """Raise FileNotFoundError for the parts of a list, or a pattern, that name no file."""
    missing = [name for name in map(str.strip, source.split(",")) if not paths_of(name)]
    if "," in source or glob.has_magic(source):
        raise FileNotFoundError("; ".join(f"no file matches {name!r}" if glob.has_magic(name) else f"there is no file {name!r}" for name in missing))


def read(path):
    """The whole `Text` of a path as one string. Raises what `Text` raises."""
    return "".join(Text(path))


def _files_below(folder):
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(parent, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # neither a named pipe, nor a link to a device or to nothing


def _is_binary(path):
    """Git's test, for what is not UTF-16 or UTF-32."""
    with open(path, "rb") as file:
        beginning = file.read(8192)
    return b"\0" in beginning and _encoding(beginning) == "UTF-8"


# ------------------------------------------------------------------------------------------------------------ rows of a file

def _rows_of_jsonl(path, field):
    for number, line in enumerate(_lines(_parts_of_file(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}). A .jsonl file holds one JSON object in each line; "
                             f"--field={RAW} reads the file as it is") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a {type(row).__name__}, where an object with the field {field!r} is expected")
        yield _text_of(row.get(field), field, row, f"{path}, line {number}")


def _rows_of_parquet(path, field):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise RuntimeError(f"reading {path} needs a package ({error}): pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # of the package, or of the system
        raise ValueError(f"{path} is not a parquet file, or is damaged ({error})") from None
    with file:
        names = file.schema_arrow.names
        if field not in names:
            raise ValueError(_no_field(field, names, path))
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            yield from (_text_of(text, field, {field: text}, path) for text in batch.column(0).to_pylist())


ROWS = {".jsonl": _rows_of_jsonl, ".ndjson": _rows_of_jsonl, ".parquet": _rows_of_parquet}


def _text_of(text, field, row, where):
    """The text of a row's field: "" for null."""
    if field not in row:
        raise ValueError(_no_field(field, row, where))
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field {field!r} is a {type(text).__name__}, not a text. --field=NAME names another one")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half of a surrogate pair at character {error.start} of {field!r}, which is not a character") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _no_field(field, names, where):
    return f"{where}: no field {field!r}; the fields are {', '.join(map(str, names)) or 'none'}. --field=NAME names the one with the text"


def _lines(parts):
    held = []
    for part in parts:
        first, *rest = part.split("\n")
        held.append(first)
        for following in rest:
            yield "".join(held)
            held = [following]
    yield "".join(held)


def _parts_of_text(path, field):
    """The parts of a file that is one document. Raises ValueError if it looks like JSON lines: their names and marks would be learnt."""
    for i, part in enumerate(_parts_of_file(path)):
        if i == 0 and field != RAW and (fields := _json_lines(part)):
            raise ValueError(f"{path} looks like JSON lines, with the fields {', '.join(fields)}: rename it to end in .jsonl, and name "
                             f"the field with the text, --field=NAME. --field={RAW} reads it as it is")
        yield part


def _json_lines(beginning):
    """The first object, if the first two lines of a text are JSON objects."""
    if not beginning.lstrip().startswith("{"):
        return None
    try:
        first, second = (json.loads(line) for line in beginning.lstrip().split("\n", 2)[:2])
    except (ValueError, RecursionError):
        return None
    return first if isinstance(first, dict) and isinstance(second, dict) else None


# ------------------------------------------------------------------------------------------------------------ bytes to text

# Byte-order marks, UTF-32's first: its little-endian one begins with UTF-16's.
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def _encoding(content):
    return next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "UTF-8")


def decode(content, where):
    """The text of these bytes: UTF-8, or UTF-16 or UTF-32 if they begin with its byte-order mark. Raises a ValueError that names `where`
    and the position of the first invalid byte."""
    return "".join(_parts(io.BytesIO(content), where))


READ = 1 << 20  # bytes at a time
COMPRESSED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"PK\x03\x04": "unzip", b"\xfd7zXZ\0": "unxz", b"BZh91AY": "bunzip2"}


def _parts_of_file(path):
    with open(path, "rb") as file:
        yield from _parts(file, path)


def _parts(file, where):
    """Yield what `decode` returns of an open file's bytes, in parts that are not empty."""
    content = file.read(READ)
    for mark, command in COMPRESSED.items():
        if content.startswith(mark):
            raise ValueError(f"{where} is compressed: unpack it first, with {command}")
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
