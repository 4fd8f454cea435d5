"""Write files so that a crash, a full disk or kill -9 leaves either the old content or the new, never a mixture; lock a file.

A temporary file is locked while its process writes it. So what a killed process left can be told from what another process is writing
now, and goes away when the same file is written next.
"""
import contextlib
import os
import re
import secrets
import shutil
import stat
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp")  # what the name of a temporary file adds to the file's


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as f: f.write(...)`: f is a binary file beside `path`, renamed to `path` when the block succeeds.

    The rename is atomic because both names are in one directory; the fsync before it ensures that the content reaches the disk
    first. If the block raises, the previous file is unchanged and the temporary one is removed. If `path` is a symbolic link, its
    target is replaced.
    """
    with replacing_together(path) as (f,):
        yield f


@contextlib.contextmanager
def replacing_together(*paths, without=()):
    """`with replacing_together(a, b) as (f, g): ...`: `replacing` for files that are one state.

    No file is renamed before the content of all is on the disk; so a full disk changes none of them. Then they are renamed in the
    order given. A kill between two renames leaves the first ones new and the others old. Where no reader may take such a mixture,
    name one file that every reader needs in `without`, and give it last: the files in `without` are deleted before the first rename.
    """
    paths, without = ([os.path.realpath(os.fspath(path)) for path in named] for named in (paths, without))
    remove_litter(*paths)
    with contextlib.ExitStack() as temporaries:
        files = [temporaries.enter_context(_temporary(path)) for path in paths]
        yield files
        for f, path in zip(files, paths):
            f.flush()
            os.fsync(f.fileno())
            if os.path.exists(path):
                shutil.copymode(path, f.name)
            if fcntl is None:
                f.close()  # Windows renames no open file
        for path in without:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for f, path in zip(files, paths):
            os.replace(f.name, path)
        for folder in {os.path.dirname(path) for path in paths}:
            sync(folder)


@contextlib.contextmanager
def _temporary(path):
    """A new binary file beside `path`, locked; removed if the block raises."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as f:
            lock(f)
            yield f
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def sync(folder):
    """Ask for the renames themselves to reach the disk, where the system can do that for a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_special(path, pipes=False):
    """Raise ValueError if `path` is a device, a socket or, unless `pipes`, a named pipe; to be called before such a path is opened.

    Opening a named pipe waits for its writer, perhaps for ever, and /dev/zero never ends. Raises FileNotFoundError too.
    """
    mode = os.stat(path).st_mode
    kind = ("a named pipe" if stat.S_ISFIFO(mode) and not pipes else "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else
            "a socket" if stat.S_ISSOCK(mode) else None)
    if kind is not None:
        raise ValueError(f"{path} is {kind}, not a file: reading it might never end. Copy what it holds to a file, and name that one")


def lock(file):
    """Lock an open file (flock) until it is closed or its process ends, however it ends.

    Returns True; False if another opening of the file has the lock; None if this system or file system has no such locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def locked(folder, say):
    """Inside, no other process is inside `locked` of this folder: waits for it, and tells `say`. Does nothing where there are no locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if lock(descriptor) is False:
            say(f"another process writes to {folder}: waiting for its end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_litter(*paths):
    """Delete the temporary files that killed processes left of these files. Those that a living process writes are locked and stay."""
    for path in map(Path, paths):
        for temporary in path.parent.glob("*.tmp"):
            if temporary.name.startswith(path.name) and TEMPORARY.fullmatch(temporary.name, len(path.name)):
                with contextlib.suppress(OSError), open(temporary, "r+b") as f:
                    if lock(f):
                        temporary.unlink()


def make_folder(path, what):
    """Make this folder and those that it lies in. Raises OSError if it cannot be made, whose text begins with `what` and the path."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{what}{path}: no folder can be made there ({error.strerror}); expected a folder, or a name for a new one where "
                          "this user may write") from None
