"""A tokenizer in transformers' format: tokenizer.json and tokenizer_config.json, which AutoTokenizer reads with nothing else.

tokenizer.json is the tokenizers library's: how a text is split, how a piece becomes ids, how ids become text again. Each kind has its form:

    char       pieces of one character, looked up; one that is not in the vocabulary raises there, too
    word       WordTokenizer's pieces, looked up; unknown ones are <unk>, if that is the tokenizer's rule
    bpe, gpt2  GPT-2's split, and byte pairs

A third file, nanogpt_fast.json, is what `Tokenizer.save` writes, so that reading the folder here needs no second form of it. The same
text gives the same ids and the other way round, with one exception: characters that Unicode has had for less time than this Python's
tables. In a word tokenizer they are marks here, and may be letters there.
"""
import io
import json
from pathlib import Path

from ..text import tokenizers
from ..text.tokenizers import BYTES, END_OF_TEXT

OURS = "nanogpt_fast.json"
NAMES = ("tokenizer.json", "tokenizer_config.json", OURS)
LETTER = r"\p{L}\p{N}_"     # what \w of Python's re is, in the words of the library's regular expressions
PIECES = {"char": r"[\s\S]", "word": rf"[{LETTER}]+(?:'[{LETTER}]+)*|[^{LETTER}]"}


def contents(tokenizer, block_size):
    """{file name: bytes} of a tokenizer for a model of this context. Raises ValueError for a vocabulary that UTF-8 cannot encode."""
    end = None if tokenizer.end_of_text is None else END_OF_TEXT
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size, "clean_up_tokenization_spaces": False,
                "bos_token": end, "eos_token": end}
    ours = io.BytesIO()
    tokenizers.Tokenizer.write(tokenizer, ours)     # as JSON, also of characters
    try:
        library = json.dumps(_library_form(tokenizer), ensure_ascii=False, indent=1).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the vocabulary has half of a surrogate pair, {error.object[error.start]!r}, which no file of transformers can "
                         "hold") from None
    return dict(zip(NAMES, (library, json.dumps(settings, indent=2).encode() + b"\n", ours.getvalue())))


def read(folder):
    """The tokenizer of a folder that `contents` was written to, or None. Raises TokenizerError; RuntimeError if a package is missing."""
    path = Path(folder, OURS)
    return tokenizers.load(path) if path.is_file() else None


def _library_form(tokenizer):
    state = tokenizer.to_state()
    if state["kind"] == "bpe":
        return tokenizers.byte_pairs(state["vocab"], state["merges"], tokenizer.end_of_text)
    if state["kind"] == "gpt2":
        return tokenizers.byte_pairs(*_gpt2(tokenizer), tokenizer.end_of_text)
    vocab = state["chars"] if state["kind"] == "char" else state["words"]
    model = {"type": "WordLevel", "vocab": {piece: i for i, piece in enumerate(vocab)}}
    model["unk_token"] = tokenizers.UNKNOWN if state.get("unknown") == "mark" else ""   # "" is in no vocabulary, so an unknown piece raises
    split = {"type": "Split", "pattern": {"Regex": PIECES[state["kind"]]}, "behavior": "Isolated", "invert": False}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": split, "post_processor": None,
            "decoder": {"type": "Fuse"}, "model": model}


def _gpt2(tokenizer):
    """(vocabulary, merges) of tiktoken's encoding, which numbers the tokens in the order in which they were merged."""
    ranks = {token: i for i in range(tokenizer.vocab_size) if i != tokenizer.end_of_text
             for token in (tokenizer.bpe.decode_single_token_bytes(i),)}
    named = {token: "".join(map(BYTES.get, token)) for token in ranks}
    vocab = [named[token] for token in ranks]
    vocab.insert(tokenizer.end_of_text, END_OF_TEXT)
    pairs = (_halves(token, ranks) for token in ranks if len(token) > 1)
    return vocab, [f"{named[left]} {named[right]}" for left, right in pairs]


def _halves(token, ranks):
    """The two tokens that this one was merged of: what merging its bytes leaves before the last merge."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks) + 1))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts
