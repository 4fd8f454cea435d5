"""Token files, train.bin and val.bin: opening one, and checking that the vocabulary has every id in it.

nanoGPT meets a bad id when a batch happens to draw it, hours into a run or never. `TokenCheck` reads the files once, front to back, in a
thread. The first second of it is waited for, which suffices for 10 GB that are in memory already (2 bytes an id; NumPy's max is as fast);
so a mistake in data of a usual size ends a run before it starts. What a slow disk takes longer for, a run does not wait for: the thread
goes on beside the training, and the first step after it finds a bad id raises the error. Until then no step learns from one, because
`Batches` checks what it draws. Waiting for nothing, the check needs no record of files that were checked before, which could be wrong.
"""
import os
import stat
import threading
import zlib

import numpy as np

from nanogpt_fast.files import refuse_special

WHOLE = 1 << 26  # bytes of a file whose checksum is of all of it: 64 MB take 0.05 s
CHUNK = 1 << 20  # tokens: their maximum takes 0.2 ms, so that a run that ends waits for no more


def open_tokens(path, block_size=0):
    """The tokens of a .bin file, memory-mapped: (N,) uint16, little-endian. Raises FileNotFoundError, ValueError.

    Only the pages that are read come into memory. The mapping keeps its file alive, so preparing the data again does not disturb a
    running job.
    """
    try:
        refuse_special(path)
        found = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path}: prepare the data with `nanogpt-fast prepare`") from None
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path} is a folder, not a file of tokens: remove it, and prepare the data with `nanogpt-fast prepare`")
    size = found.st_size
    if size % 2:
        raise ValueError(f"{path} is {size:,} bytes long, which is not a whole number of 16-bit tokens: it is damaged, "
                         "prepare it again")
    if size // 2 <= block_size:
        raise ValueError(f"{path} holds {size // 2:,} tokens; with block_size {block_size} it must hold at least "
                         f"{block_size + 1:,}. Use a longer text or a smaller --block_size")
    return np.memmap(path, dtype="<u2", mode="r")


def checksum(tokens):
    """A checksum of the tokens of a file: of all of them up to 64 MB; of a larger one, of 1,024 pieces of 64 KB at equal distances."""
    pieces = [tokens]
    if tokens.nbytes > WHOLE:
        length = WHOLE // 1024 // tokens.itemsize
        pieces = (tokens[start:start + length] for start in np.linspace(0, len(tokens) - length, 1024).astype(np.int64))
    found = 0
    for piece in pieces:
        found = zlib.crc32(piece, found)
    return found


def bad_id(path, token, position, vocab_size):
    """The ValueError for an id outside of the vocabulary."""
    return ValueError(f"{path} holds token {token} at position {position}, outside the model's vocabulary of {vocab_size}: the data was "
                      "prepared with another tokenizer, or is damaged. Prepare it again with `nanogpt-fast prepare`, or train a model "
                      "with the vocabulary of its tokenizer")


class TokenCheck:
    """Checks in a thread that every id of a folder's two token files is below vocab_size. Where `active` is false it does nothing.

    Raises FileNotFoundError and ValueError at once for what `open_tokens` refuses, with block_size + 1 tokens the least.
    """

    def __init__(self, folder, vocab_size, block_size=0, *, active=True):
        files = {path: open_tokens(path, block_size) for path in (os.path.join(folder, f"{split}.bin") for split in ("train", "val"))}
        if not active or vocab_size > np.iinfo(np.uint16).max:
            files = {}
        self._error, self._ended = None, False
        self._thread = threading.Thread(target=self._run, args=(files, vocab_size), name="token-check", daemon=True)
        self._thread.start()

    def wait(self, seconds=None):
        """Wait for the end of the check, this long at most (None: however long). Raises ValueError for a bad id that it has found."""
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error

    def close(self):
        """End the thread."""
        self._ended = True
        self._thread.join()

    def _run(self, files, vocab_size):
        for path, tokens in files.items():
            for start in range(0, len(tokens), CHUNK):
                chunk = tokens[start:start + CHUNK]
                if chunk.max() >= vocab_size:
                    at = int(np.argmax(chunk >= vocab_size))
                    self._error = bad_id(path, chunk[at], start + at, vocab_size)
                    return
                if self._ended:
                    return
