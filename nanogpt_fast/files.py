"""Write a file so that a crash, a full disk or kill -9 leaves either the old content or the new, never half of each."""
import contextlib
import os
import secrets
import shutil


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as f: f.write(...)`: f is a binary file beside `path` that takes its name when the block ends well.

    The rename is atomic because both names are in one directory; the fsync before it puts the content on the disk before the
    name. If the block raises, the former file stays as it was and the temporary one is removed. A link is written through.
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
