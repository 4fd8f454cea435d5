"""Prepare a data set: text in, nanoGPT's files out, and `nanogpt-fast prepare`.

    data/<name>/train.bin, val.bin   token ids, raw little-endian uint16, no header: the first 90 % of the text, and the rest
    data/<name>/meta.pkl             nanoGPT's character vocabulary; a word or GPT-2 tokenizer goes to tokenizer.json instead
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
from nanogpt_fast.files import locked, refuse_special, remove_litter, replacing_together
from nanogpt_fast.options import option
from nanogpt_fast.text import corpora, tokenizers

FILES = ("train.bin", "val.bin")
VOCABULARIES = ("meta.pkl", "tokenizer.json")
MAX_VOCAB_SIZE = 65_535  # ids have to fit uint16


@dataclass
class PrepareOptions:
    """Turn a text into the token files that `nanogpt-fast train` and nanoGPT read.

    source is `embedded` (Python's language reference: nothing is downloaded, and the text differs a little from one Python
    version to the next), `shakespeare` (GPT-2 tokens), `shakespeare_char` (characters), a text file, or a folder of text files.
    """

    source: str = option("embedded", "the corpus or path", positional=True)
    name: str = option("", "folder below data_dir to write to; empty: the name of the corpus, or of the file without its suffix")
    tokenizer: str = option("", "empty: characters (GPT-2's for `shakespeare`)", choices=("", "char", "word", "gpt2"))
    vocab_size: int | None = option(None, "word tokenizer: keep this many of the most frequent words", minimum=2)
    val_fraction: float = option(0.1, "fraction of the text, at its end, held out for validation", above=0, below=1)
    data_dir: str = option("data", "where data sets live")


def main(argv):
    """The command `nanogpt-fast prepare`."""
    given = options.parse(PrepareOptions, argv, "nanogpt-fast prepare")
    folder = Path(given.data_dir, given.name or _name_of(given.source))
    text = _read(given.source, folder)
    write(text, folder, _tokenizer_kind(given), source=given.source, vocab_limit=given.vocab_size,
          val_fraction=given.val_fraction)
    print(f"train on it: nanogpt-fast train --dataset={folder.name}"
          + ("" if given.data_dir == "data" else f" --data_dir={given.data_dir}"))


def find(dataset, data_dir="data", say=print):
    """The folder (a Path) with the token files of `dataset`, prepared first if they are missing or made from another text.

    dataset: the name of a folder below `data_dir`, or the path of one, that holds train.bin and val.bin; the name of a corpus; a
    text file or a folder of text files. Raises FileNotFoundError that lists what exists, ValueError if preparing would overwrite
    a data set made from something else, and what `write` raises.
    """
    how = dict(kind=corpora.TOKENIZER.get(dataset, "char"))
    if dataset in corpora.TOKENIZER:
        folder = Path(data_dir, dataset)
        if _is_prepared(folder):  # a corpus never changes, and files that nanoGPT's prepare.py wrote under this name are as good
            return folder
        text = _read(dataset, folder)
    else:
        for folder in (Path(data_dir, dataset), Path(dataset)):
            if _is_prepared(folder):
                return folder
        if not Path(dataset).exists():
            known = sorted(path.parent.name for path in Path(data_dir).glob("*/train.bin"))
            raise FileNotFoundError(
                f"no data set {dataset!r}: {Path(data_dir, dataset)} lacks {' or '.join(FILES)}, and there is no text of that "
                f"name. Prepared in {data_dir}: {', '.join(known) or 'nothing'}. Corpora: {', '.join(corpora.TOKENIZER)}. "
                "A text of your own: --dataset=FILE")
        folder, text = Path(data_dir, _name_of(dataset)), corpora.Text(dataset)
        if _is_prepared(folder):
            about = _source(folder)
            if about.get("sha256") == _measured(text)[1]:
                return folder
            if about.get("source") != os.path.abspath(dataset):
                raise ValueError(f"{folder} holds a data set made from {about.get('source') or 'something else'}: give this "
                                 f"one another name with `nanogpt-fast prepare {dataset} --name=NAME`, then train with "
                                 "--dataset=NAME")
            how = {key: about[key] for key in ("kind", "vocab_limit", "val_fraction")}  # the text has changed, not the settings
    say(f"preparing {dataset} in {folder}")
    write(text, folder, source=dataset, say=say, **how)
    return folder


def write(text, folder, kind="char", *, source="", vocab_limit=None, val_fraction=0.1, say=print):
    """Write the token files of `text` to `folder`; returns the tokenizer. kind: "char", "word" or "gpt2".

    text: a str; or an iterable of its parts, such as corpora.Text, which is read four times and never held as a whole.

    Everything is written under temporary names first. Once it is all on the disk, the old train.bin is removed and the new one renamed
    last, so that an interruption leaves the former data set, the new one, or visibly none: never parts of both. Two processes take
    turns. Raises ValueError if the vocabulary does not fit 16 bits or a split would be empty.
    """
    folder = Path(folder)
    length, sha256 = _measured(text)
    tokenizer = _build_tokenizer(text, kind, source, vocab_limit)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"this text has a vocabulary of {tokenizer.vocab_size:,}; the files hold 16-bit ids, "
                         f"{MAX_VOCAB_SIZE:,} at most. Use --tokenizer=gpt2, or --tokenizer=word --vocab_size=20000")
    cut = int(length * (1 - val_fraction))
    splits = {"train.bin": (0, cut), "val.bin": (cut, math.inf)}
    if not 0 < cut < length:
        raise ValueError(f"a text of {length} characters cannot be split into training and validation text: use a longer "
                         "one")

    folder.mkdir(parents=True, exist_ok=True)
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
            about = dict(source=source if source in corpora.TOKENIZER else os.path.abspath(source), sha256=sha256, kind=kind,
                         vocab_limit=vocab_limit, val_fraction=val_fraction)
            file["source.json"].write(json.dumps(about, indent=1).encode())
            tokenizer.write(file[vocabulary])
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
    return all((folder / name).exists() for name in FILES)  # whoever opens them says what is wrong with them


def _name_of(source):
    return source if source in corpora.TOKENIZER else Path(source).resolve().stem


def _tokenizer_kind(given):
    if given.vocab_size is not None and given.tokenizer != "word":
        raise ValueError(f"vocab_size needs --tokenizer=word; the tokenizer here is {given.tokenizer or 'the default'!r}")
    return given.tokenizer or corpora.TOKENIZER.get(given.source, "char")


def _read(source, folder):
    if source == "embedded":
        return corpora.embedded()
    if source in corpora.TOKENIZER:
        return corpora.shakespeare(folder / "input.txt")  # where nanoGPT's prepare.py keeps it, too
    if not Path(source).exists():
        nearest = options.nearest(source, corpora.TOKENIZER)
        raise FileNotFoundError(f"{source!r} is not a file, a folder or a corpus; the corpora are "
                                f"{', '.join(corpora.TOKENIZER)} (nearest: {nearest})")
    return corpora.Text(source)


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
    """Yield the characters start ... end of a text, in parts."""
    for part in tokenizers.parts_of(text):
        if start < len(part) and end > 0:
            yield part[max(start, 0):min(end, len(part))]
        start, end = start - len(part), end - len(part)
        if end <= 0:
            return


def _build_tokenizer(text, kind, source, vocab_limit):
    if kind == "gpt2":
        return tokenizers.GPT2Tokenizer()
    if kind == "word":
        return tokenizers.WordTokenizer.from_text(text, vocab_limit)
    return tokenizers.CharTokenizer(corpora.PRINTABLE) if source == "embedded" else tokenizers.CharTokenizer.from_text(text)


def _write_ids(file, tokenizer, text):
    ids = np.array(tokenizer.encode(text), dtype="<u2")
    file.write(ids.tobytes())
    return len(ids)
