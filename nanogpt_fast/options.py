"""Options: a dataclass declares them; config files and the command line set them, as in nanoGPT.

    @dataclass
    class TrainOptions:
        batch_size: int = option(12, "sequences per micro-batch", minimum=1)
        dtype: str = option("auto", "arithmetic of the forward pass", choices=("auto", "float32", "bfloat16"))

    parse(TrainOptions, ["config/train_gpt2.py", "--batch_size=32", "--dtype", "float32"], prog="nanogpt-fast train")

Three layers, each overriding the one before: the defaults; config files, which are Python and run with the options as their
globals (so `lr_decay_iters = max_iters` works); `--key=value` or `--key value`, in the order given. A dash in a key counts
as an underscore, a bare `--flag` sets a bool. Anything invalid raises ValueError with one line that says what was passed, what is
accepted and which key is nearest. Other names in a config file are its own; only one that is a letter away from an option gets a hint.

Numbers are taken as they are meant: a whole float (2e0, max_iters / 2) and NumPy's integers are integers, 0 and 1 are False and True.
An integer has 64 bits at most, and a text is one that can be a path: without NUL, and encodable.
"""
import dataclasses
import difflib
import math
import numbers
import operator
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from ast import literal_eval

from nanogpt_fast.files import refuse_special


def option(default, help, *, minimum=None, maximum=None, above=None, below=None, choices=None, alias=None, section=None,
           positional=False):
    """A dataclass field with its help text and its limits.

    minimum, maximum: inclusive limits; above, below: exclusive ones. choices: the accepted values. alias: a second name on
    the command line. section: a heading in the help text that starts at this field. positional: bare words of the command line
    set the positional fields in order; if a class has none, bare words are config files.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, minimum=minimum, maximum=maximum, above=above, below=below, choices=choices, alias=alias, section=section,
        positional=positional))


def parse(cls, argv, prog, shipped=None):
    """An instance of the dataclass `cls` from command-line words. -h or --help prints the help text and exits with 0.

    shipped: {a config file as it is typed: the path of the one that is run if no such file exists}. The instance's attribute `given` has
    the names that got a value, `configs` the config files that were run.

    Raises ValueError for unknown keys, wrong types and values out of range, whatever `cls.__post_init__` raises, and
    FileNotFoundError if a config file is missing.
    """
    values, given, configs = read(cls, argv, prog, shipped)
    options = cls(**values)
    check(options)
    options.given, options.configs = frozenset(given), tuple(configs)
    return options


def read(cls, argv, prog, shipped=None):
    """({name: value}, the set of the names that got one, the list of config files) of these words: `parse`, without its checks of values
    that config files set and of values that must fit each other."""
    if "-h" in argv or "--help" in argv:
        print(help_text(cls, prog))
        raise SystemExit(0)
    kinds = _kinds(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    aliases = {field.metadata["alias"]: name for name, field in fields.items() if field.metadata.get("alias")}
    positional = _positional(cls)  # bare words set these in order; without any, a bare word is a config file
    waiting = list(positional)
    values = {name: field.default for name, field in fields.items()}
    given, configs = set(), []

    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if waiting:
                given.add(waiting[0])
                values[waiting[0]] = _from_text(word, waiting[0], kinds[waiting[0]])
                waiting.pop(0)
            elif not positional:
                if word in (shipped or {}) and not os.path.exists(word):
                    print(f"{word}: there is none here; taken from {shipped[word]}")
                    word = str(shipped[word])
                given |= _run_config(word, values, kinds)
                configs.append(word)
            else:
                raise ValueError(f"{word!r} is one argument too many; usage: {prog} {' '.join(positional)} [--key=value ...]")
            continue
        key, equals, text = word[2:].partition("=")
        name = key.replace("-", "_")
        name = aliases.get(name, name)
        if name not in fields:
            raise ValueError(f"unknown option --{key}; the nearest is --{nearest(name, fields)} "
                             f"(`{prog} --help` lists them all)")
        if not equals:
            following = words[0] if words and not words[0].startswith("--") else None
            if bool in kinds[name] and (following is None or following.lower() not in ("true", "false", *_words(fields[name]))):
                text = "True"
            elif following is None:
                raise ValueError(f"--{key} needs a value: --{key}=... ({_accepts(fields[name], kinds[name])})")
            else:
                text = words.pop(0)
        given.add(name)
        values[name] = _from_text(text, name, kinds[name])
        _check_range(values[name], fields[name], kinds[name])
    return values, given, configs


def is_given(options, name):
    """Whether a value was given by a config file or on the command line; of an instance made in Python, whether it isn't the default."""
    default = next(field.default for field in dataclasses.fields(options) if field.name == name)
    return name in options.given if hasattr(options, "given") else getattr(options, name) != default


def check(options):
    """Raise ValueError unless every field of this dataclass instance is within its limits and has its type, or is a number of another
    type that can be it (see the top of this file) and becomes it."""
    kinds = _kinds(type(options))
    for field in dataclasses.fields(options):
        value = _accepted(getattr(options, field.name), field, kinds[field.name])
        if type(value) is not type(getattr(options, field.name)):
            setattr(options, field.name, value)


def accepted(cls, name, value):
    """The value as the field `name` of the dataclass `cls` takes it. Raises ValueError if the field does not accept it."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return _accepted(value, field, _kinds(cls)[name])


def help_text(cls, prog):
    """Every key of `cls` with its type, default and meaning; the docstring of `cls` comes first."""
    kinds = _kinds(cls)
    words = " ".join(_positional(cls)) or "[config.py ...]"
    width = min(shutil.get_terminal_size((110, 24)).columns, 128)
    lines = [f"usage: {prog} {words} [--key=value | --key value ...]", ""]
    for paragraph in textwrap.dedent(" " * 4 + (cls.__doc__ or "")).strip().split("\n\n"):
        lines += [textwrap.fill(" ".join(paragraph.split()), width), ""]
    for field in dataclasses.fields(cls):
        if field.metadata.get("section"):
            lines += ["" if lines[-1] else None, field.metadata["section"] + ":"]
        key = f"  --{field.name}={field.default!r}"
        alias = f" Also --{field.metadata['alias']}." if field.metadata.get("alias") else ""
        meaning = f"{field.metadata.get('help', '')} ({_accepts(field, kinds[field.name])}){alias}"
        if len(key) > 38:
            lines.append(key)
            key = ""
        lines.append(textwrap.fill(meaning, width, initial_indent=f"{key:<40}", subsequent_indent=" " * 40))
    return "\n".join(line for line in lines if line is not None)


def _kinds(cls):
    """{field name: accepted types}; `int | None` gives (int, NoneType)."""
    hints = typing.get_type_hints(cls)
    return {field.name: typing.get_args(hints[field.name]) or (hints[field.name],) for field in dataclasses.fields(cls)}


def _positional(cls):
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get("positional")]


def nearest(name, names):
    """The one of these names whose spelling is closest to `name`."""
    return difflib.get_close_matches(name, list(map(str, names)), n=1, cutoff=0.0)[0]


BARE_WORD = "write options as --key=value (a text to train on: --data=FILE), a bare word is read as a config file, in Python"


def _run_config(path, values, kinds):
    """Run a config file with the options as its globals, and update `values` with what it set; returns the names that it set."""
    _conform(path, "the config file", (str,))
    try:
        refuse_special(path, pipes=True)  # a shell's <(...) is one
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"no config file {path!r}; {BARE_WORD}") from None
    except IsADirectoryError:
        raise ValueError(f"{path!r} is a folder, not a config file; {BARE_WORD}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {path} is not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}. Convert it: "
                         "iconv -f LATIN1 -t UTF-8 FILE") from None
    scope = _Scope({**values, "__file__": path, "__name__": "__config__"})
    try:
        exec(compile(source, path, "exec"), scope)
    except Exception as error:
        where = error.lineno if isinstance(error, SyntaxError) else _line_in(error.__traceback__, path)
        hint = f". {BARE_WORD[0].upper()}{BARE_WORD[1:]}" if not path.endswith(".py") else ""
        raise ValueError(f"config file {path}, line {where}: {type(error).__name__}: {error}{hint}") from error
    given = {name for name, value in values.items() if name in scope.set or scope.get(name) is not value}
    for name, value in scope.items():
        if name in values:
            values[name] = _conform(value, name, kinds[name], f"{path}: ")
        elif not name.startswith("_") and isinstance(value, (int, float, str)):  # neither a module nor a function
            near = nearest(name, values)
            if _one_letter_apart(name, near):
                print(f"{path}: {name} is not an option and sets nothing; is {near} meant?", file=sys.stderr)
    return given


class _Scope(dict):
    """Globals that note what a program sets, also where it sets a name to the value that it had."""

    def __init__(self, names):
        super().__init__(names)
        self.set = set()

    def __setitem__(self, name, value):
        self.set.add(name)
        super().__setitem__(name, value)


def _one_letter_apart(a, b):
    """Whether one letter too many, too few or wrong, or two swapped, make the difference of two names."""
    i = len(os.path.commonprefix((a, b)))
    return a[i + 1:] == b[i + 1:] or a[i:] == b[i + 1:] or a[i + 1:] == b[i:] or (a[i:i + 2] == b[i:i + 2][::-1] and a[i + 2:] == b[i + 2:])


def _line_in(traceback, path):
    line = "?"
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == path:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _from_text(text, name, kinds):
    """Convert a command-line word to a field of these types."""
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if types.NoneType in kinds and text.lower() in ("none", ""):
        return None
    try:
        value = literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        value = text
    if str in kinds and not isinstance(value, str):
        value = text  # --start=123 is a prompt, not a number
    if float in kinds and re.fullmatch("[+-]?(nan|inf|infinity)", text.lower()):
        value = float(text)
    return _conform(value, name, kinds)


def _conform(value, name, kinds, where=""):
    """The value as one of these types. Raises ValueError."""
    if isinstance(value, numbers.Real) and type(value) not in (bool, int, float):  # NumPy's
        value = operator.index(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, float) and not math.isfinite(value) and float in kinds:
        raise ValueError(f"{where}{name} is {value}; expected a finite number")
    if type(value) is float and int in kinds and value.is_integer():
        value = int(value)
    if type(value) is int and not -2**63 <= value < 2**63:  # no size, seed or count is larger, and nothing below Python takes it
        raise ValueError(f"{where}{name} is {_short(value)}; expected {_names(kinds)}, of 64 bits at most")
    if type(value) is str and str in kinds:
        _check_text(value, where + name)
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if bool in kinds and type(value) is int and value in (0, 1):
        return bool(value)
    raise ValueError(f"{where}{name} is {_short(value)} ({type(value).__name__}); expected {_names(kinds)}")


def _accepted(value, field, kinds):
    """The value as one of these types and within the field's limits. Raises ValueError."""
    value = _conform(value, field.name, kinds)
    _check_range(value, field, kinds)
    return value


def _check_text(value, name):
    """Raise ValueError for a text that the operating system cannot take as a path. What a terminal passes on as bytes that are not UTF-8
    is such a path."""
    if "\0" in value:
        raise ValueError(f"{name} is {_short(value)}; expected a text without the NUL character")
    try:
        os.fsencode(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is {_short(value)}; expected a text that {error.encoding} can encode: half of a surrogate pair, "
                         f"{value[error.start]!r}, is none") from None


def _short(value):
    """How a value looks in an error, in a hundred characters at most."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python converts
        return f"an integer of {value.bit_length():,} bits"
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text):,} characters)"


def _names(kinds):
    return " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)


def _check_range(value, field, kinds):
    limits = field.metadata
    choices = limits.get("choices")
    if value is None:
        return
    outside = choices is not None and value not in choices
    for name, fails in (("minimum", lambda a, b: a < b), ("maximum", lambda a, b: a > b),
                        ("above", lambda a, b: a <= b), ("below", lambda a, b: a >= b)):
        outside = outside or (limits.get(name) is not None and fails(value, limits[name]))
    if outside:
        hint = f"; the nearest is {nearest(value, map(str, choices))!r}" if choices and isinstance(value, str) else ""
        raise ValueError(f"{field.name} is {_short(value)}; expected {_accepts(field, kinds)}{hint}")


def _words(field):
    """The choices of a field that are strings, such as "auto" beside True and False."""
    return [choice for choice in field.metadata.get("choices") or () if isinstance(choice, str)]


def _accepts(field, kinds):
    """The values that a field accepts, in words: "int, at least 1"."""
    limits = field.metadata
    if limits.get("choices"):
        return " | ".join(str(choice) or "''" for choice in limits["choices"])
    words = [_names(kinds)]
    for name, word in (("minimum", "at least"), ("above", "above"), ("maximum", "at most"), ("below", "below")):
        if limits.get(name) is not None:
            words.append(f"{word} {limits[name]}")
    return ", ".join(words)
