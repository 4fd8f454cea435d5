"""Tokenizers: text to integers and back, behind one interface.

    tokenizer.encode(text) -> list of int        tokenizer.vocab_size        tokenizer.save(path), load(path)
    tokenizer.decode(ids)  -> str                ids: any iterable of int, or a 1-D tensor or array

    CharTokenizer   one id per character; its file is nanoGPT's meta.pkl, which nanoGPT can read and write
    WordTokenizer   one id per word, punctuation mark or whitespace character, the most frequent first, up to a limit
    BPETokenizer    byte pairs learnt from a text of one's own, through the tokenizers library (pip install "nanogpt-fast[bpe]")
    GPT2Tokenizer   GPT-2's byte-pair encoding through tiktoken (pip install "nanogpt-fast[gpt2]")

`load(path)` recognises from the file's content which tokenizer it holds. `to_state()` and `from_state(state)` convert a tokenizer to
a dict of strings and lists and back, for a checkpoint that torch.load(weights_only=True) accepts. `byte_lengths()` says how many bytes of
UTF-8 each id stands for: 0 for the end of a text, None for an unknown word. `end_of_text` is the id of "<|endoftext|>", or None.

What cannot be encoded, decoded or read raises TokenizerError, a ValueError that names the character, the id or the file.
"""
import collections
import io
import json
import operator
import pickle
import re

from nanogpt_fast.files import refuse_special, replacing
from nanogpt_fast.text.pickles import PlainUnpickler

UNKNOWN = "<unk>"
END_OF_TEXT = "<|endoftext|>"   # the token between documents, in the kinds that have one


class TokenizerError(ValueError):
    """A text, an id or a file that a tokenizer does not accept; the message names it."""


def from_state(state):
    """The tokenizer that `to_state` described: {"kind": "char", "chars": [...]}, {"kind": "word" or "bpe", ...} or {"kind": "gpt2"}."""
    kind = state.get("kind") if isinstance(state, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise TokenizerError(f"a tokenizer's state is a dict whose 'kind' is one of {', '.join(KINDS)}; this is {_short(state)}")
    try:
        return KINDS[kind](**{key: value for key, value in state.items() if key != "kind"})
    except TypeError as error:  # an extra or missing field, or one whose type cannot be a vocabulary
        raise TokenizerError(f"this state does not describe a {kind!r} tokenizer: {error}") from None


def load(path):
    """Read a tokenizer from a file that `save` or nanoGPT's prepare.py wrote. Raises FileNotFoundError, TokenizerError."""
    _, tokenizer, why_not = load_vocabulary(path)
    if tokenizer is None:
        raise TokenizerError(why_not)
    return tokenizer


def load_vocabulary(path):
    """(vocabulary size, tokenizer, None), or (vocabulary size, None, why there is no tokenizer): all that training needs is the size,
    and it is all that nanoGPT's train.py reads of a meta.pkl. Raises FileNotFoundError, TokenizerError."""
    refuse_special(path)
    with open(path, "rb") as f:
        content = f.read()
    try:
        if content.lstrip().startswith(b"{"):
            state = _read_json(content)
            try:
                tokenizer = from_state(state)
            except RuntimeError as error:   # a package is missing
                if state["kind"] != "bpe":  # GPT-2's size is known without its file
                    raise
                return len(state["vocab"]), None, str(error)
            return tokenizer.vocab_size, tokenizer, None
        size, chars, why_not = _read_meta(content)
        if why_not is None:
            try:
                return size, CharTokenizer(chars), None
            except TokenizerError as error:
                why_not = str(error)
        return size, None, f"{path}: {why_not}"
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


CHUNK = 1 << 20  # characters: a Python list of their pieces and ids takes up to 100 bytes for each


def chunks(text, anywhere=False, size=None):
    """Yield a text, a str or its parts in order, in parts of about `size` characters (default: CHUNK) that each of the tokenizers encodes
    as it encodes the whole.

    A part ends before a space or line break that follows a word or a mark, or before an end of text that is a part of its own: no piece of
    words and no token of byte pairs crosses these.
    anywhere: at any character, which is enough for characters.
    """
    size = size or CHUNK
    held, count = [], 0     # the beginning of the next part, and its length
    for part in parts_of(text):
        if anywhere:
            yield from (part[start:start + size] for start in range(0, len(part), size))
            continue
        start = 0
        if part == END_OF_TEXT and count >= size:
            yield "".join(held)
            held, count = [], 0
        while boundary := _BOUNDARY.search(part, start + max(size - count, 0)):
            yield "".join([*held, part[start:boundary.start()]])
            held, count, start = [], 0, boundary.start()
        held.append(part[start:])
        count += len(part) - start
    if count:
        yield "".join(held)


def parts_of(text):
    """The parts of a text: of a str itself, else of an iterable of str, which is read again at every call."""
    return [text] if isinstance(text, str) else text


_BOUNDARY = re.compile(r"(?<=\S)[ \n]")


class Tokenizer:
    """What the tokenizers share: a vocabulary with ids 0 .. vocab_size - 1, and a file format."""

    end_of_text = None

    def save(self, path):
        """Write the tokenizer to `path` (under a temporary name first, then renamed)."""
        with replacing(path) as f:
            self.write(f)

    def write(self, file):
        """Write the tokenizer to an open binary file."""
        # surrogatepass: a lone surrogate is a character to Python and must survive the round trip
        file.write(json.dumps(self.to_state(), ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass"))

    @classmethod
    def load(cls, path):
        """Like the module's `load`, but raises TokenizerError if the file holds a tokenizer of another kind."""
        tokenizer = load(path)
        if not isinstance(tokenizer, cls):
            raise TokenizerError(f"{path} holds a {type(tokenizer).__name__}, not a {cls.__name__}")
        return tokenizer

    def _checked(self, ids):
        ids = [int(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        for i in ids:  # negative ids, too: Python's lists would count them from the end
            if not 0 <= i < self.vocab_size:
                raise TokenizerError(f"token id {i} is outside this vocabulary of {self.vocab_size}, 0 to {self.vocab_size - 1}")
        return ids

    def __eq__(self, other):
        return type(self) is type(other) and self.to_state() == other.to_state()

    def __repr__(self):
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class CharTokenizer(Tokenizer):
    """One id per character; `chars` lists the characters by id. There is no unknown token: other characters raise TokenizerError.

    A few of `chars` may be marks, such as "<pad>": they are decoded, and no text is encoded as one.
    """

    MARK = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")

    def __init__(self, chars):
        chars = list(chars)
        if not all(isinstance(c, str) and (len(c) == 1 or self.MARK.fullmatch(c)) for c in chars) or len(set(chars)) < len(chars) \
                or not any(len(c) == 1 for c in chars):
            raise TokenizerError("a character vocabulary is a list of distinct characters, at least one, and of marks such as <pad>; "
                                 f"this is {_short(chars)}")
        self.itos = dict(enumerate(chars))
        self.stoi = {c: i for i, c in self.itos.items()}

    @classmethod
    def from_text(cls, text):
        """The vocabulary of a text, a str or its parts in order: its distinct characters in code point order, as nanoGPT's prepare.py numbers them."""
        chars = set().union(*map(set, parts_of(text)))
        if not chars:
            raise TokenizerError("the text is empty: there is no vocabulary to build from it")
        return cls(sorted(chars))

    @property
    def vocab_size(self):
        return len(self.itos)

    def encode(self, text):
        try:
            return [self.stoi[c] for c in text]
        except KeyError as missing:
            c = missing.args[0]
            raise TokenizerError(f"character {c!r} (U+{ord(c):04X}) at position {text.index(c)} is not in this vocabulary of "
                                 f"{self.vocab_size}: {_short(''.join(self.stoi))}") from None

    def decode(self, ids):
        return "".join([self.itos[i] for i in self._checked(ids)])

    def byte_lengths(self):
        return [_bytes(c) for c in self.stoi]

    def to_state(self):
        return {"kind": "char", "chars": list(self.stoi)}

    def write(self, file):
        """Write nanoGPT's meta.pkl: a pickled {"vocab_size", "itos", "stoi"}."""
        pickle.dump({"vocab_size": self.vocab_size, "itos": self.itos, "stoi": self.stoi}, file)


class WordTokenizer(Tokenizer):
    """One id per word, punctuation mark or whitespace character, so that joining the pieces restores the text exactly.

    words:   the pieces by id
    unknown: what `encode` does with a piece that is not in `words`. "mark" gives the id of "<unk>", which must be words[0]; "error"
             raises a TokenizerError that names the piece.
    """

    # Every character belongs to exactly one of three kinds, so nothing is lost: words (with inner apostrophes, as in "don't"),
    # whitespace, and the rest. "<unk>" in a text is split into "<", "unk", ">", so no text contains the mark by accident.
    PIECES = re.compile(r"\w+(?:'\w+)*|\s|[^\w\s]")
    RULES = ("mark", "error")

    def __init__(self, words, unknown="mark"):
        words = list(words)
        if unknown not in self.RULES:
            raise TokenizerError(f"unknown={unknown!r}; the rules for unknown words are {', '.join(self.RULES)}")
        if not words or not all(isinstance(w, str) and w for w in words) or len(set(words)) < len(words):
            raise TokenizerError(f"a word vocabulary is a list of distinct non-empty words, at least one; this is {_short(words)}")
        if unknown == "mark" and words[0] != UNKNOWN:
            raise TokenizerError(f"with unknown='mark' the first word must be {UNKNOWN!r}; here it is {words[0]!r}")
        self.words, self.unknown = words, unknown
        self.ids = {w: i for i, w in enumerate(words)}

    @classmethod
    def from_text(cls, text, max_vocab_size=None, unknown="mark"):
        """The vocabulary of a text, a str or its parts in order: its pieces, the most frequent first (ties in code point order), `max_vocab_size` at most.

        With the rule "mark", "<unk>" takes one of the places.
        """
        first = [UNKNOWN] if unknown == "mark" else []
        if max_vocab_size is not None and max_vocab_size <= len(first):
            raise TokenizerError(f"max_vocab_size={max_vocab_size} leaves no place for a word; use at least {len(first) + 1}")
        counts = collections.Counter()
        for part in chunks(text):
            counts.update(cls.PIECES.findall(part))
        if not counts:
            raise TokenizerError("the text is empty: there is no vocabulary to build from it")
        by_frequency = sorted(counts, key=lambda piece: (-counts[piece], piece))
        return cls((first + by_frequency)[:max_vocab_size], unknown)

    @property
    def vocab_size(self):
        return len(self.words)

    def encode(self, text):
        pieces = self.PIECES.findall(text)
        if self.unknown == "mark":
            return [self.ids.get(piece, 0) for piece in pieces]
        try:
            return [self.ids[piece] for piece in pieces]
        except KeyError as missing:
            raise TokenizerError(f"word {missing.args[0]!r} is not in this vocabulary of {self.vocab_size}; "
                                 f"unknown='mark' would encode it as {UNKNOWN!r}") from None

    def decode(self, ids):
        return "".join([self.words[i] for i in self._checked(ids)])

    def byte_lengths(self):
        return [_bytes(word) if i or self.unknown == "error" else None for i, word in enumerate(self.words)]

    def to_state(self):
        return {"kind": "word", "words": list(self.words), "unknown": self.unknown}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's 50,257 byte-pair tokens. "<|endoftext|>" in a text is the token of that name, as in nanoGPT's sample.py.

    tiktoken downloads the vocabulary once and caches it. Raises RuntimeError if the package or the vocabulary is not available.
    UTF-8 cannot encode a lone surrogate, which is decoded as U+FFFD. Any other text survives the round trip.
    """

    def __init__(self):
        try:
            import tiktoken
        except ImportError as error:
            raise RuntimeError(f"GPT-2's tokenizer needs a package ({error}): pip install tiktoken, "
                               "or use a char or word tokenizer") from error
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken passes on any error of requests, the disk or its own hash check
            raise RuntimeError("GPT-2's vocabulary is fetched over the network on first use, and that failed: "
                               f"{type(error).__name__}: {_short(error)}. Connect once, or point TIKTOKEN_CACHE_DIR to a "
                               "cache that has it, or use a char or word tokenizer.") from error

    @property
    def vocab_size(self):
        return self.bpe.n_vocab

    @property
    def end_of_text(self):
        return self.bpe.eot_token

    def encode(self, text):
        return self.bpe.encode(text, allowed_special={END_OF_TEXT})

    def decode(self, ids):
        return self.bpe.decode(self._checked(ids))

    def byte_lengths(self):
        return [0 if i == self.end_of_text else len(self.bpe.decode_single_token_bytes(i)) for i in range(self.vocab_size)]

    def to_state(self):
        return {"kind": "gpt2"}


# GPT-2's name for each byte: its character where that is printable, else one from U+0100 on.
BYTES = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
BYTES.update({byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in BYTES)})


class BPETokenizer(Tokenizer):
    """Byte pairs learnt from a text: GPT-2's method (its split into words, its bytes) with a vocabulary of one's own. Any text survives
    the round trip, but for lone surrogates, as in GPT2Tokenizer; "<|endoftext|>" in a text is the token of that name, id 0.

    vocab:  the tokens by id, each a str with one of BYTES' characters per byte; all 256 bytes are among them
    merges: what to join, the first learnt first: "a b" joins the tokens a and b
    Raises RuntimeError if the tokenizers package is not available, TokenizerError.
    """

    end_of_text = 0

    def __init__(self, vocab, merges):
        vocab, merges = list(vocab), list(merges)
        if not all(isinstance(token, str) for token in vocab + merges) or len(set(vocab)) < len(vocab) or vocab[:1] != [END_OF_TEXT] \
                or not set(BYTES.values()) <= set(vocab):
            raise TokenizerError(f"a vocabulary of byte pairs is a list of distinct tokens: {END_OF_TEXT}, the 256 bytes, and merged ones; "
                                 f"this is {_short(vocab)}")
        self.vocab, self.merges = vocab, merges
        library = _bpe_library()
        try:
            self.bpe = library.Tokenizer.from_str(json.dumps(byte_pairs(vocab, merges, self.end_of_text)))
        except Exception as error:  # the library passes on any error of its parser
            raise TokenizerError(f"these merges do not fit the vocabulary: {_short(error)}") from None

    @classmethod
    def from_text(cls, text, vocab_size=8192):
        """Learn a vocabulary of `vocab_size` tokens from a text, a str or its parts in order, which is read once and not held.

        It is smaller where no pair is left that the text has twice. Raises TokenizerError, RuntimeError.
        """
        if vocab_size < 1 + len(BYTES):
            raise TokenizerError(f"vocab_size={vocab_size} leaves no place for the 256 bytes and {END_OF_TEXT}; use at least "
                                 f"{1 + len(BYTES)}")
        library = _bpe_library()
        learner = library.Tokenizer(library.models.BPE())
        learner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=[END_OF_TEXT],
                                              initial_alphabet=sorted(BYTES.values()))
        # The library collects 256 parts before it counts them; the learnt tokens hold no end of text, which is between documents.
        learner.train_from_iterator((_valid(part).replace(END_OF_TEXT, "\n") for part in chunks(text, size=CHUNK >> 6)), trainer)
        model = json.loads(learner.to_str())["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]    # which, depends on the version
        return cls(sorted(model["vocab"], key=model["vocab"].get), merges)

    @property
    def vocab_size(self):
        return len(self.vocab)

    def encode(self, text):
        parts = list(chunks(_valid(text), size=CHUNK >> 6))     # encoded by a thread each
        return [i for encoded in self.bpe.encode_batch_fast(parts) for i in encoded.ids]

    def decode(self, ids):
        return self.bpe.decode(self._checked(ids), skip_special_tokens=False)

    def byte_lengths(self):
        return [0 if i == self.end_of_text else len(token) for i, token in enumerate(self.vocab)]

    def to_state(self):
        return {"kind": "bpe", "vocab": list(self.vocab), "merges": list(self.merges)}


def byte_pairs(vocab, merges, end_of_text):
    """The tokenizers library's tokenizer.json, as a dict, of byte pairs with GPT-2's split. vocab, merges: as in BPETokenizer."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": end_of_text, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
               "special": True}
    return {"version": "1.0", "added_tokens": [special], "normalizer": None, "pre_tokenizer": level, "post_processor": None,
            "decoder": level, "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocab)}, "merges": merges}}


def _bpe_library():
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(f"a tokenizer of byte pairs needs a package ({error}): pip install tokenizers, "
                           "or use a char or word tokenizer") from error
    return tokenizers


def _valid(text):
    """The text with pairs of surrogates as the character that they mean, and lone ones as U+FFFD: what UTF-8 can encode."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _bytes(text):
    return len(text.encode("utf-8", "surrogatepass"))


KINDS = {"char": CharTokenizer, "word": WordTokenizer, "bpe": BPETokenizer, "gpt2": GPT2Tokenizer}


def _read_meta(content):
    """(vocabulary size, characters by id, None), or (size, None, why there are none), from nanoGPT's meta.pkl {vocab_size, stoi, itos}."""
    unpickler = PlainUnpickler(io.BytesIO(content))
    try:
        meta = unpickler.load()
    except Exception as error:  # a damaged pickle can raise nearly anything: UnpicklingError, EOFError, KeyError, MemoryError ...
        raise TokenizerError("neither a tokenizer's JSON nor a readable meta.pkl "
                             f"({type(error).__name__}: {_short(error)})") from None
    foreign = f"refused: it imports {unpickler.foreign[0]}, but a vocabulary consists of strings and integers only" if unpickler.foreign else None
    meta = meta if isinstance(meta, dict) else {}
    chars, why_not = _characters(meta.get("stoi"), meta.get("itos"))
    try:
        size = operator.index(meta["vocab_size"]) if "vocab_size" in meta else len(chars)
    except TypeError:
        raise TokenizerError(foreign or "a meta.pkl holds a dict with vocab_size, an integer, and with stoi and itos; this one does not") \
            from None
    if chars is not None and size < len(chars):
        why_not = f"its parts contradict each other: vocab_size is {size}, but stoi and itos number {len(chars)} characters"
    return size, chars, foreign or why_not


def _characters(stoi, itos):
    """(the entries of a vocabulary by id, None), or (None, why not). One of the two dicts may be missing; itos may be a list."""
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))
    if not isinstance(stoi, dict) and not isinstance(itos, dict):
        return None, "it has neither stoi nor itos, which say what the ids mean"
    try:
        chars = [itos[i] for i in range(len(itos))] if isinstance(itos, dict) else sorted(stoi, key=stoi.get)
        if len(chars) > 0 and (not isinstance(stoi, dict) or stoi == {c: i for i, c in enumerate(chars)}):
            return chars, None
    except (KeyError, TypeError):  # an id is missing, or an entry is not a character
        pass
    return None, (f"its parts contradict each other: {len(itos or {})} in itos, {len(stoi or {})} in stoi; they should number the same "
                  "characters from 0 without gaps")


def _read_json(content):
    try:
        return json.loads(content.decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise TokenizerError(f"damaged JSON: {error}") from None


def _short(value, limit=120):
    text = value if isinstance(value, str) else str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= limit else text[:limit] + " ..."
