"""Prepare a data set: text in, nanoGPT's files out, and `nanogpt-fast prepare`.

    data/<name>/train.bin, val.bin   token ids, raw little-endian uint16, no header: the first 90 % of the text, and the rest
    data/<name>/meta.pkl             nanoGPT's character vocabulary; any other tokenizer goes to tokenizer.json instead
    data/<name>/source.json          what they were made from: a text that has changed is prepared again, so that nobody trains
                                     on stale data unknowingly

The trainer calls `find(dataset)`: it takes the name of a prepared folder or of a corpus, or the path of a text, and prepares
what is missing.
"""
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt_fast import options
from nanogpt_fast.files import locked, make_folder, refuse_special, remove_litter, replacing_together
from nanogpt_fast.options import option
from nanogpt_fast.text import corpora, tokenizers

FILES = ("train.bin", "val.bin")
VOCABULARIES = ("meta.pkl", "tokenizer.json")
MAX_VOCAB_SIZE = 65_535  # ids have to fit uint16
KINDS = ("", *tokenizers.KINDS)     # of tokenizers, as the command line has them
VOCAB_LIMIT = {"word": None, "bpe": 8192}   # the kinds that have a limit, with its default


@dataclass
class PrepareOptions:
    """Turn a text into the token files that `nanogpt-fast train` and nanoGPT read.

    source is `embedded` (Python's language reference: nothing is downloaded, and the text differs a little from one Python
    version to the next), `shakespeare` (GPT-2 tokens), `shakespeare_char` (characters), a text file, or a folder of text files; or
    several of these, a.txt,b.txt, or a pattern, 'texts/*.txt'.

    Each file is a document, and so is each row of a .jsonl or .parquet file. Between documents the byte-pair tokenizers, bpe and gpt2, have
    their token <|endoftext|>; the others have a line break.
    """

    source: str = option("embedded", "the corpus or path", positional=True)
    name: str = option("", "folder below data_dir to write to; empty: the name of the corpus, or of the file without its suffix")
    tokenizer: str = option("", "empty: characters (GPT-2's for `shakespeare`); bpe learns byte pairs from the text", choices=KINDS)
    vocab_size: int | None = option(None, "bpe: learn this many tokens (None: 8192); word: keep this many of the most frequent words",
                                    minimum=2)
    field: str = option("text", ".jsonl and .parquet: the field that holds the text; - reads a .jsonl file as it is")
    val_fraction: float = option(0.1, "fraction of the text, at its end, held out for validation", above=0, below=1)
    data_dir: str = option("data", "where data sets live")


def main(argv):
    """The command `nanogpt-fast prepare`."""
    given = options.parse(PrepareOptions, argv, "nanogpt-fast prepare")
    given.name = given.name.rstrip("/")     # a shell completes a folder's name so
    if given.name and (Path(given.name).name != given.name or given.name == ".."):
        raise ValueError(f"name is {given.name!r}; expected the name of a folder without a path: --data_dir says where it is made")
    folder = Path(given.data_dir, given.name or _name_of(given.source))
    how = {**_default(given.source), **_asked(given.tokenizer, given.vocab_size, given.field)}
    write(_read(given.source, folder, how), folder, source=given.source, val_fraction=given.val_fraction, **how)
    print(f"train on it: nanogpt-fast train --dataset={folder.name}"
          + ("" if given.data_dir == "data" else f" --data_dir={given.data_dir}"))


def find(dataset, data_dir="data", say=print, *, tokenizer="", vocab_size=None, field=""):
    """The folder (a Path) with the token files of `dataset`, prepared first if they are missing or made from another text.

    dataset: the name of a folder below `data_dir`, or the path of one, that holds train.bin and val.bin; the name of a corpus; a
    text, as in corpora.Text. tokenizer, vocab_size, field: as in PrepareOptions; empty: as it was prepared before, else the default. A
    text or a corpus that was prepared otherwise is prepared again. Raises FileNotFoundError that lists what exists, ValueError if
    preparing would overwrite a data set made from something else, and what `write` raises.
    """
    asked = _asked(tokenizer, vocab_size, field)
    how = {**_default(dataset), **asked}
    if dataset in corpora.TOKENIZER:
        folder = Path(data_dir, dataset)
        # A corpus never changes, and files that nanoGPT's prepare.py wrote under this name are as good.
        if _is_prepared(folder) and not _differences(asked, {**_default(dataset), **_source(folder)}):
            return folder
    else:
        if folder := prepared(dataset, data_dir):
            if differences := _differences(asked, {"field": "text", **_source(folder)}):
                raise ValueError(f"{folder} was prepared with {differences}. Prepare its text again with `nanogpt-fast prepare`, or leave "
                                 "these options out")
            return folder
        if not corpora.paths_of(dataset):
            corpora.refuse_missing(dataset)
            known = sorted(path.parent.name for path in Path(data_dir).glob("*/train.bin"))
            raise FileNotFoundError(
                f"no data set {dataset!r}: {Path(data_dir, dataset)} lacks {' or '.join(FILES)}, and there is no text of that "
                f"name. Prepared in {data_dir}: {', '.join(known) or 'nothing'}. Corpora: {', '.join(corpora.TOKENIZER)}. "
                "A text of your own: --dataset=FILE")
        folder = Path(data_dir, _name_of(dataset))
        if _is_prepared(folder):
            about = _source(folder)
            former = {key: about.get(key, value) for key, value in {**_default(dataset), "val_fraction": 0.1}.items()}
            differences = _differences(asked, former)
            if not differences and about.get("sha256") == _measured(_read(dataset, folder, former))[1]:
                return folder
            if about.get("source") != _absolute(dataset):
                raise ValueError(f"{folder} holds a data set made from {about.get('source') or 'something else'}: give this "
                                 f"one another name with `nanogpt-fast prepare {dataset} --name=NAME`, then train with "
                                 "--dataset=NAME")
            how = {**former, **asked}   # the text has changed, or what was asked for, and nothing else
            if differences:
                say(f"{folder} was prepared with {differences}")
    say(f"preparing {dataset} in {folder}")
    write(_read(dataset, folder, how), folder, source=dataset, say=say, **how)
    return folder


def prepared(dataset, data_dir="data", of_text=False):
    """The folder (a Path) with the token files of `dataset`, a name below `data_dir` or a path, or None. of_text: also of a text, by the
    name that `find` gives its folder. Nothing is prepared."""
    folders = [Path(data_dir, dataset), Path(dataset), *([Path(data_dir, _name_of(dataset))] if of_text else [])]
    return next((folder for folder in folders if _is_prepared(folder)), None)


def write(text, folder, kind="char", *, source="", vocab_limit=None, val_fraction=0.1, field="text", say=print):
    """Write the token files of `text` to `folder`; returns the tokenizer. kind: "char", "word", "bpe" or "gpt2".

    text: a str; or an iterable of its parts, such as corpora.Text, which is read four times and never held as a whole. A part that is
    "<|endoftext|>" is not divided between the splits. vocab_limit: of words, or of byte pairs, which are learnt from the training text.
    source, field: what the text was read from, for the record.

    Everything is written under temporary names first. Once it is all on the disk, the old train.bin is removed and the new one renamed
    last, so that an interruption leaves the former data set, the new one, or visibly none: never parts of both. Two processes take
    turns. Raises ValueError if the vocabulary does not fit 16 bits or a split would be empty.
    """
    folder, vocab_limit = Path(folder), vocab_limit or VOCAB_LIMIT.get(kind)
    if kind == "bpe" and vocab_limit > MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_limit:,}; the files hold 16-bit ids, {MAX_VOCAB_SIZE:,} at most")
    length, sha256 = _measured(text)
    cut = int(length * (1 - val_fraction))
    if not 0 < cut < length:
        raise ValueError(f"a text of {length} characters cannot be split into training and validation text: use a longer "
                         "one")
    tokenizer = _build_tokenizer(text, kind, source, vocab_limit, cut)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"this text has a vocabulary of {tokenizer.vocab_size:,}; the files hold 16-bit ids, "
                         f"{MAX_VOCAB_SIZE:,} at most. Use --tokenizer=bpe or gpt2, or --tokenizer=word --vocab_size=20000")
    splits = {"train.bin": (0, cut), "val.bin": (cut, math.inf)}

    make_folder(folder, "the data set's folder ")
    vocabulary, former = VOCABULARIES if kind == "char" else VOCABULARIES[::-1]
    names = ("val.bin", "source.json", vocabulary, "train.bin")
    counts = {}
    with locked(folder, say):
        remove_litter(folder / former)
        with replacing_together(*(folder / name for name in names), without=[folder / "train.bin", folder / former]) as opened:
            file = dict(zip(names, opened))
            for name, (start, end) in splits.items():
                chunks = tokenizers.chunks(_between(text, start, end), anywhere=kind == "char")
                counts[name] = sum(_write_ids(file[name], tokenizer, chunk) for chunk in chunks)
            about = dict(source=_absolute(source), sha256=sha256, kind=kind, vocab_limit=vocab_limit, val_fraction=val_fraction,
                         field=field)
            file["source.json"].write(json.dumps(about, indent=1).encode())
            tokenizer.write(file[vocabulary])
    if kind == "bpe" and tokenizer.vocab_size < vocab_limit:
        say(f"the training text has no further pair twice: {tokenizer.vocab_size:,} tokens are learnt, not {vocab_limit:,}")
    say(f"{length:,} characters, a vocabulary of {tokenizer.vocab_size:,} ({kind}): "
        f"{counts['train.bin']:,} tokens to train on, {counts['val.bin']:,} to validate on, in {folder}")
    return tokenizer


def load_tokenizer(folder):
    """The tokenizer of a data folder; GPT-2's if it holds none, by nanoGPT's convention. Raises TokenizerError."""
    for name in VOCABULARIES:
        if Path(folder, name).exists():
            return tokenizers.load(Path(folder, name))
    return tokenizers.GPT2Tokenizer()


def load_vocabulary(folder):
    """What `tokenizers.load_vocabulary` returns for a data folder; (None, tokenizer or None, why not) for GPT-2's vocabulary."""
    for name in VOCABULARIES:
        if Path(folder, name).exists():
            size, tokenizer, why_not = tokenizers.load_vocabulary(Path(folder, name))
            return None if isinstance(tokenizer, tokenizers.GPT2Tokenizer) else size, tokenizer, why_not
    try:
        return None, tokenizers.GPT2Tokenizer(), None
    except RuntimeError as error:
        return None, None, str(error)


def _is_prepared(folder):
    return all(os.path.exists(folder / name) for name in FILES)  # whoever opens them says what is wrong with them


def _name_of(source):
    """The folder's name for a source: a file's without its suffix, a folder's, the first file's of several and how many more there are."""
    paths = [] if source in corpora.TOKENIZER else corpora.paths_of(source)
    more = f"-and-{len(paths) - 1}-more" if len(paths) > 1 else ""
    return (paths[0].resolve().stem if paths else Path(source).name) + more


def _absolute(source):
    """The source as source.json has it."""
    if source in corpora.TOKENIZER:
        return source
    return ",".join(map(os.path.abspath, [source] if os.path.exists(source) else source.split(",")))


def _default(source):
    """How a source is prepared where nothing else is asked for, as keywords of `write`."""
    return dict(kind=corpora.TOKENIZER.get(source, "char"), vocab_limit=None, field="text")


def _asked(tokenizer, vocab_size, field):
    """What these options ask for, as keywords of `write`."""
    if vocab_size is not None and tokenizer not in VOCAB_LIMIT:
        raise ValueError(f"vocab_size needs --tokenizer=word or bpe; the tokenizer here is {tokenizer or 'the default'!r}")
    asked = dict(kind=tokenizer, vocab_limit=vocab_size or VOCAB_LIMIT.get(tokenizer)) if tokenizer else {}
    return asked | ({"field": field} if field else {})


def _differences(asked, about):
    """In words, what a data set that was prepared as `about` says has otherwise than asked for; "" for nothing."""
    words = dict(kind="tokenizer", vocab_limit="vocab_size", field="field")
    return ", ".join(f"{words[key]} {about.get(key, 'unknown')} instead of {value}" for key, value in asked.items()
                     if about.get(key) != value)


def _read(source, folder, how):
    """The text of a source, with what `how` asks for between its documents."""
    if source == "embedded":
        return corpora.embedded()
    if source in corpora.TOKENIZER:
        return corpora.shakespeare(folder / "input.txt")  # where nanoGPT's prepare.py keeps it, too
    if not corpora.paths_of(source):
        corpora.refuse_missing(source)
        nearest = options.nearest(source, corpora.TOKENIZER)
        raise FileNotFoundError(f"{source!r} is not a file, a folder or a corpus; the corpora are "
                                f"{', '.join(corpora.TOKENIZER)} (nearest: {nearest})")
    return corpora.Text(source, how["field"], tokenizers.END_OF_TEXT if how["kind"] in ("bpe", "gpt2") else "\n")


def _source(folder):
    try:
        refuse_special(folder / "source.json")
        return json.loads((folder / "source.json").read_text())
    except (OSError, ValueError):
        return {}


def _measured(text):
    """(number of characters, sha256 of the UTF-8 bytes) of a text."""
    length, sha256 = 0, hashlib.sha256()
    for part in tokenizers.parts_of(text):
        length += len(part)
        sha256.update(part.encode("utf-8"))
    return length, sha256.hexdigest()


def _between(text, start, end):
    """Yield the characters start ... end of a text, in parts; a part that is an end of text whole, if it begins there."""
    for part in tokenizers.parts_of(text):
        if part == tokenizers.END_OF_TEXT:
            if start <= 0 < end:
                yield part
        elif start < len(part) and end > 0:
            yield part[max(start, 0):min(end, len(part))]
        start, end = start - len(part), end - len(part)
        if end <= 0:
            return


def _build_tokenizer(text, kind, source, vocab_limit, cut):
    if kind == "gpt2":
        return tokenizers.GPT2Tokenizer()
    if kind == "bpe":
        return tokenizers.BPETokenizer.from_text(_between(text, 0, cut), vocab_limit)
    if kind == "word":
        return tokenizers.WordTokenizer.from_text(text, vocab_limit)
    return tokenizers.CharTokenizer(corpora.PRINTABLE) if source == "embedded" else tokenizers.CharTokenizer.from_text(text)


def _write_ids(file, tokenizer, text):
    ids = np.array(tokenizer.encode(text), dtype="<u2")
    file.write(ids.tobytes())
    return len(ids)
