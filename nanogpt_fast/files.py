"""Write a file so that a crash, a full disk or kill -9 leaves either the old content or the new, never a mixture."""
import contextlib
import os
import secrets
import shutil


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as f: f.write(...)`: f is a binary file beside `path`, renamed to `path` when the block succeeds.

    The rename is atomic because both names are in one directory; the fsync before it ensures that the content reaches the disk
    first. If the block raises, the previous file is unchanged and the temporary one is removed. If `path` is a symbolic link, its
    target is replaced.
    """
    path = os.path.realpath(os.fspath(path))
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
