"""Open a torch file: nothing in it runs, what it takes in memory is at most its size, and a damaged one is refused.

torch.save writes a zip archive of uncompressed members with a checksum each. torch.load(weights_only=True) builds tensors, numbers,
strings, lists and dicts, and calls only functions of a list. Four things are added to that list here, each as a function of ours which
can only make plain Python values: NumPy's numbers (nanoGPT's best_val_loss may be one), paths, and the GPTConfig of a training script.

What the values are, and whether they fit each other, schema.py checks.
"""
import pickle
import pickletools
import re
import struct
import zipfile

import torch

from .state import CheckpointError

NUMBERS = {("f4", "<"): "<f", ("f8", "<"): "<d", ("i8", "<"): "<q"}   # (code, byte order) of NumPy's scalars -> struct's format


class _Dtype:
    """numpy.dtype in a pickle: its code, and then its byte order. NumPy itself crashes on some that can be written down ("f8,O")."""

    def __init__(self, code, *_):
        self.code, self.order = code, None

    def __setstate__(self, state):
        self.order = state[1]


def _scalar(dtype, content):
    """A NumPy scalar as Python's number."""
    known = type(dtype) is _Dtype and type(dtype.code) is str and type(dtype.order) is str and NUMBERS.get((dtype.code, dtype.order))
    if not known or type(content) is not bytes or len(content) != struct.calcsize(known):
        raise ValueError("it holds a NumPy scalar other than a float32, float64 or int64 of 4, 8 or 8 bytes")
    return struct.unpack(known, content)[0]


def _path(*parts):
    if not all(type(part) is str for part in parts):
        raise ValueError("it holds a path of something else than strings")
    return "/".join(parts)


class Fields(dict):
    """The fields of a GPTConfig that a training script pickled whole, as build-nanogpt's does."""

    def __setstate__(self, state):
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise ValueError("it holds a GPTConfig without fields")
        self.update(state)


PATHS = [f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "PurePosix", "Windows", "PureWindows")]
STAND_INS = [(_scalar, "numpy.core.multiarray.scalar"), (_scalar, "numpy._core.multiarray.scalar"),   # NumPy 1 and 2
             (_Dtype, "numpy.dtype"), *((_path, name) for name in PATHS),
             *((Fields, f"{module}.GPTConfig") for module in ("__main__", "model", "train_gpt2"))]


def load(path, mmap=False):
    """What torch.save wrote to `path`, on the CPU. mmap: tensors stay on the disk, and checksums are not checked.

    Raises CheckpointError; FileNotFoundError, PermissionError, IsADirectoryError.
    """
    refuse_damage(path, checksums=not mmap)
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if found := re.search(r"nsupported (?:global: )?GLOBAL (\S{1,100})", str(error)):     # torch's wording
            raise CheckpointError(f"{path} holds Python objects ({found[1]}) that could run code when loaded, so it is refused. A "
                                  "checkpoint holds tensors, numbers, strings, lists and dicts: save it again where it was made, a dataclass as "
                                  "dataclasses.asdict(it), a path as str(it)") from None
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None
    except Exception as error:  # a damaged file fails in whichever part of torch's reader meets it first
        reason = (str(error).splitlines() or ["it is truncated"])[0][:200]
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__}: {reason})") from None


DEEPEST = 50  # tuples in tuples; torch.save's own pickles have 3, and Python's hash of a tuple crashes at some ten thousand
EFFECTS = {op.name: (pickletools.markobject in op.stack_before, len(op.stack_before), len(op.stack_after)) for op in pickletools.opcodes}


def _deepest_tuple(content):
    """How deep the tuples of a pickle are in each other, from its instructions alone: a stack of depths in place of values."""
    stack, marks, memo, deepest = [], [], {}, 0
    for op, argument, _ in pickletools.genops(content):
        name = op.name
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            to_mark, before, after = EFFECTS[name]
            begin = marks.pop() if to_mark else len(stack) - before
            depth = 1 + max(stack[begin:], default=0) if name.startswith("TUPLE") else 0
            deepest = max(deepest, depth)
            del stack[begin:]
            if name not in ("APPENDS", "SETITEMS"):     # what they change lies below the mark
                stack += [depth] * after
    return deepest


def refuse_damage(path, checksums=True):
    """Raise CheckpointError unless the file is an archive as torch.save writes it, and, with checksums, each member has its own.

    torch.load checks no checksum: a flipped bit would go unnoticed. It also unpacks compressed members, of which torch.save writes none:
    a few kilobytes can then become all of the memory.
    """
    with open(path, "rb") as f:
        if not zipfile.is_zipfile(f):
            raise CheckpointError(f"{path} is not a checkpoint, or is damaged: a checkpoint is a zip archive, as torch.save writes it "
                                  "since torch 1.6. Another file is not opened, since a pickle can run code.")
        try:
            with zipfile.ZipFile(f) as archive:
                for member in archive.infolist():
                    if member.compress_type != zipfile.ZIP_STORED:
                        raise CheckpointError(f"{path} is not a checkpoint: {member.filename[:100]!r} in it is compressed, which "
                                              "torch.save never does. Load it with the program that wrote it, and save it with torch.save.")
                if checksums and (damaged := archive.testzip()) is not None:
                    raise CheckpointError(f"{path} is damaged: the checksum of {damaged[:100]} is wrong. Take another copy or an "
                                          "earlier one.")
                for member in archive.infolist():
                    if member.filename.endswith("data.pkl") and _deepest_tuple(archive.read(member)) > DEEPEST:
                        raise CheckpointError(f"{path} is not a checkpoint, or is damaged: tuples lie in it more than {DEEPEST} deep")
        except CheckpointError:
            raise
        except Exception as error:  # zipfile's, zlib's or pickletools'
            raise CheckpointError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__}: {str(error)[:200]})") from None
