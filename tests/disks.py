"""Disks that fail, for tests of what is left on them: a stand-in for an open file, and an fsync that finds the disk full."""
import errno
import os


class File:
    """Stands for an open file and passes everything on; a subclass replaces what it wants."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __iter__(self):
        return iter(self.file)


def full_at_fsync(monkeypatch, number):
    """From now on the fsync of this number, counted from 1, fails because the disk is full."""
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", full)
