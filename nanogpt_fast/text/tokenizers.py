"""Tokenizers: text to integers and back, behind one interface.

    tokenizer.encode(text) -> list of int        tokenizer.vocab_size        tokenizer.save(path), load(path)
    tokenizer.decode(ids)  -> str                ids: any iterable of int, or a 1-D tensor or array

    CharTokenizer   one id per character; its file is nanoGPT's meta.pkl, which nanoGPT can read and write
    WordTokenizer   one id per word, punctuation mark or whitespace character, the most frequent first, up to a limit
    GPT2Tokenizer   GPT-2's byte-pair encoding through tiktoken (pip install "nanogpt-fast[gpt2]")

`load(path)` recognises from the file's content which tokenizer it holds. `to_state()` and `from_state(state)` convert a tokenizer to
a dict of strings and lists and back, for a checkpoint that torch.load(weights_only=True) accepts.

What cannot be encoded, decoded or read raises TokenizerError, a ValueError that names the character, the id or the file.
"""
import collections
import io
import json
import operator
import pickle
import re

from nanogpt_fast.files import refuse_special, replacing

UNKNOWN = "<unk>"


class TokenizerError(ValueError):
    """A text, an id or a file that a tokenizer does not accept; the message names it."""


def from_state(state):
    """The tokenizer that `to_state` described: {"kind": "char", "chars": [...]}, {"kind": "word", ...} or {"kind": "gpt2"}."""
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
            tokenizer = from_state(_read_json(content))
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


def chunks(text, anywhere=False):
    """Yield a text, a str or its parts in order, in parts of about CHUNK characters that each of the tokenizers encodes as it encodes the
    whole.

    A part ends before a space or line break that follows a word or a mark: no piece of words and no token of byte pairs crosses this.
    anywhere: at any character, which is enough for characters.
    """
    held, count = [], 0     # the beginning of the next part, and its length
    for part in parts_of(text):
        if anywhere:
            yield from (part[start:start + CHUNK] for start in range(0, len(part), CHUNK))
            continue
        start = 0
        while boundary := _BOUNDARY.search(part, start + max(CHUNK - count, 0)):
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
    """What the three tokenizers share: a vocabulary with ids 0 .. vocab_size - 1, and a file format."""

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

    def encode(self, text):
        return self.bpe.encode(text, allowed_special={"<|endoftext|>"})

    def decode(self, ids):
        return self.bpe.decode(self._checked(ids))

    def to_state(self):
        return {"kind": "gpt2"}


KINDS = {"char": CharTokenizer, "word": WordTokenizer, "gpt2": GPT2Tokenizer}


class _Inert:
    """What a pickle gets in place of a class or function that is not listed below: takes anything, does nothing."""

    def __init__(self, *args, **keywords):
        pass

    __setstate__ = __setitem__ = append = extend = add = __init__


class _NumpyType:
    """numpy.dtype in a pickle: only its code, such as "i8", and its byte order are kept."""

    def __init__(self, code, *_):
        self.code, self.order = str(code), "<"

    def __setstate__(self, state):
        self.order = str(state[1])

    def read(self, raw):
        if self.code[0] in "iu":
            return int.from_bytes(raw, "big" if self.order == ">" else "little", signed=self.code[0] == "i")
        if self.code[0] == "U":
            return raw.decode("utf-32-be" if self.order == ">" else "utf-32-le").rstrip("\0")
        return _Inert()


def _plain_dict(*args):
    return dict(args[0]) if args and isinstance(args[0], dict) else {}


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles numbers (NumPy's, too), strings, lists and dicts. A pickle is a program that calls what it imports; here it gets only the
    functions below, and for all else _Inert. `foreign` lists what that was."""

    KNOWN = {("collections", "OrderedDict"): _plain_dict, ("collections", "defaultdict"): _plain_dict, ("collections", "Counter"): _plain_dict,
             ("numpy", "dtype"): _NumpyType, ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
             ("numpy.core.multiarray", "scalar"): lambda dtype, raw: dtype.read(raw),
             ("numpy._core.multiarray", "scalar"): lambda dtype, raw: dtype.read(raw)}

    def __init__(self, file):
        super().__init__(file)
        self.foreign = []

    def find_class(self, module, name):
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        self.foreign.append(f"{module}.{name}")
        return _Inert


def _read_meta(content):
    """(vocabulary size, characters by id, None), or (size, None, why there are none), from nanoGPT's meta.pkl {vocab_size, stoi, itos}."""
    unpickler = _PlainUnpickler(io.BytesIO(content))
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
