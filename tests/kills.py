"""Kill a run between any two of its file-system calls, or at a random time; resume it; compare it with a run that was never killed.

    python tests/kills.py EMPTY_FOLDER renames        before and after the renames of one save
    python tests/kills.py EMPTY_FOLDER calls          before every call of a whole run
    python tests/kills.py EMPTY_FOLDER random 200     200 SIGKILLs at random times
    python tests/kills.py EMPTY_FOLDER random 200 sharded     the same with --shard

In two situations: a run that is resumed ("resumed"; "sharded" is the same with --shard, one rank), and a new run in the folder of an older
one ("replaced"). Every run is a fork of
this process, in which torch has one thread only. Prints a line for each kill after which something was lost (a step
that was saved, a row of metrics.jsonl, a whole checkpoint file), another run was continued, or the continuation was not exact; then
how many kills there were. The exit status is 1 if there was such a line.
"""
import builtins
import contextlib
import dataclasses
import itertools
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import disks
import tiny
import torch

from nanogpt_fast import files
from nanogpt_fast.checkpoints import nanogpt as checkpoints
from nanogpt_fast.checkpoints.nanogpt import CheckpointError
from nanogpt_fast.training import progress
from nanogpt_fast.training.trainer import train

KILLED = 9
WRITES = (1, 30)  # of the writes to an open file, a kill comes before these


class Killed(BaseException):
    """In place of kill -9 where no process of its own is needed: nothing catches it."""


@contextlib.contextmanager
def killed_before(last):
    """Inside, call number `last` of those that remove, rename or flush a file raises Killed, and so do all later ones."""
    real = {name: getattr(os, name) for name in ("replace", "unlink", "fsync")}
    calls = itertools.count()

    def call(name):
        def made(*args, **kwargs):
            if next(calls) >= last:
                raise Killed
            return real[name](*args, **kwargs)
        return made
    try:
        for name in real:
            setattr(os, name, call(name))
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def quick_draw(rows, path):
    """In place of matplotlib's picture, which takes longer than the run."""
    with files.replacing(path) as f:
        f.write(b"picture")


def forked(work, log, seconds=None):
    """Run work() in a fork, its output in the file `log`; killed after `seconds`. Returns (exit status, output)."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            work()
            status = 0
        except CheckpointError as error:
            print(error)
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, Path(log).read_text()


class Calls:
    """Notes in the file `log` every file-system call on something in `folder`, after it is done; exits before call number `last`."""

    def __init__(self, folder, log, last=None):
        self.folder, self.last, self.count = str(folder), last, 0
        self.log = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def begin(self):
        if self.count == self.last:
            os._exit(KILLED)
        self.count += 1

    def end(self, name, path):
        os.pwrite(self.log, f"{name} {os.path.basename(path)}\n".encode(), os.lseek(self.log, 0, os.SEEK_END))

    def counted(self, name, real, path_of):
        def call(*args, **kwargs):
            path = str(path_of(args))
            if not path.startswith(self.folder):
                return real(*args, **kwargs)
            self.begin()
            try:
                return real(*args, **kwargs)
            finally:
                self.end(name, path)
        return call

    def __enter__(self):
        def of_descriptor(args):
            with contextlib.suppress(OSError):
                return os.readlink(f"/proc/self/fd/{args[0]}")
            return ""
        real_write = os.pwrite
        for name in ("unlink", "remove", "chmod", "utime", "mkdir", "rmdir", "open", "truncate"):
            setattr(os, name, self.counted(name, getattr(os, name), lambda args: args[0]))
        for name in ("replace", "rename", "link"):
            setattr(os, name, self.counted(name, getattr(os, name), lambda args: args[1]))
        for name in ("fsync", "ftruncate", "write"):
            setattr(os, name, self.counted(name, getattr(os, name), of_descriptor))
        os.pwrite = real_write
        real_open = builtins.open

        def opened(path, mode="r", *args, **kwargs):
            if not str(path).startswith(self.folder) or mode in ("r", "rb"):
                return real_open(path, mode, *args, **kwargs)
            self.begin()
            file = real_open(path, mode, *args, **kwargs)
            self.end("open", str(path))
            return Written(file, self)
        builtins.open = opened


class Written(disks.File):
    """A file whose writes are calls, too."""

    def __init__(self, file, calls):
        super().__init__(file)
        self.calls, self.writes = calls, 0

    def write(self, content):
        self.writes += 1
        if self.writes not in WRITES:
            return self.file.write(content)
        self.calls.begin()
        result = self.file.write(content)
        self.calls.end("write", self.file.name)
        return result


def logged(folder):
    return [(row["iter"], row.get("loss"), row.get("train_loss"), row.get("val_loss")) for row in tiny.rows(folder)]


def state(path):
    """What must be equal in the checkpoint of a run that was killed and of one that was not."""
    saved = checkpoints.read(path)
    return saved["iter_num"], saved["best_val_loss"], [tensor.tolist() for tensor in saved["model"].values()]


class Situation:
    """What is killed, from what folder it starts, and what must come of it."""

    def __init__(self, root, name):
        self.root, self.name, self.out = root, name, root / "out"
        self.before = root / f"{name}-before"           # the folder that the killed run finds
        o = tiny.options(root, max_iters=20, eval_interval=5, dropout=0.2, shard=name == "sharded")
        straight = dataclasses.replace(o, out_dir=str(root / f"{name}-straight"))
        self.ok(lambda: train(straight))
        if name in ("resumed", "sharded"):
            # The plan of a run that goes on is fixed by its options; so stop at 10 what was planned for 20.
            self.ok(lambda: train(dataclasses.replace(o, out_dir=str(self.before), max_iters=10)))
            self.killed, self.saved_before = dataclasses.replace(o, init_from="resume"), 10
        else:
            self.ok(lambda: train(dataclasses.replace(o, out_dir=str(self.before), seed=7, max_iters=30)))
            self.killed, self.saved_before = o, None
        self.rows = {"new": logged(straight.out_dir), "old": logged(self.before)}
        self.files = {name: state(Path(straight.out_dir, name)) for name in ("ckpt.pt", "last.pt")}
        shutil.copytree(self.before, self.out)
        started = time.perf_counter()
        self.ok(lambda: self.run())
        self.seconds = time.perf_counter() - started
        self.calls = (root / "calls").read_text().splitlines()

    def ok(self, work):
        status, text = forked(work, self.root / "log")
        if status != 0:
            raise RuntimeError(text)

    def run(self, last=None):
        with contextlib.suppress(AttributeError):
            Calls(self.out, self.root / "calls", last).__enter__()
        train(self.killed)

    def renames_of_a_save(self):
        """The numbers of the calls that rename a checkpoint in the last save but one, after which the run goes on, and of the next ones."""
        renames = [i for i, call in enumerate(self.calls) if call in ("replace ckpt.pt", "replace last.pt")][-4:-2]
        return sorted({*renames, *(i + 1 for i in renames)})

    def kill(self, last=None, seconds=None):
        """Kill, resume, look: what is wrong, or None."""
        shutil.rmtree(self.out)
        shutil.copytree(self.before, self.out)
        (self.root / "calls").write_text("")
        status, text = forked(lambda: self.run(last), self.root / "log", seconds)
        if status not in (0, KILLED, -signal.SIGKILL):
            return f"failed before the kill: {text[-500:]}"
        done = [call for call in (self.root / "calls").read_text().splitlines() if call == "replace last.pt"]
        step = 5 * len(done) + (self.saved_before or 0) if done else self.saved_before

        resume = dataclasses.replace(self.killed, init_from="resume")
        status, text = forked(lambda: train(resume), self.root / "log")
        if status == 2 and step is None and "ended before its first checkpoint" in text:
            status, text = forked(lambda: train(dataclasses.replace(resume, init_from="scratch")), self.root / "log")
        elif status == 0:
            resumed = int(text.split("resuming from ")[1].split("step ")[1].split()[0])
            if "not an exact continuation" in text:
                return f"an inexact continuation from step {resumed}, said"
            if step is not None and resumed < step:
                return f"step {step} was saved, and the run went on from {resumed}"
        if status != 0:
            return f"cannot be resumed: {text[-500:]}"
        rows = logged(self.out)
        if step is None and self.name == "replaced" and rows == self.rows["old"]:
            return None     # killed before the new run changed anything: the folder is the old run's
        if rows != self.rows["new"]:
            return f"{len(set(rows) ^ set(self.rows['new']))} rows differ without a word"
        for name, expected in self.files.items():
            if state(self.out / name) != expected:
                return f"{name} is not what a run without a kill leaves"
        named = torch.load(self.out / "last.pt", weights_only=True).get("shards", {}).get("folder")
        litter = [path.name for path in self.out.iterdir() if path.name.endswith(".tmp") or path.is_dir() and path.name != named]
        return f"left behind: {', '.join(litter)}" if litter else None


def main(root, how, times=0, names="resumed,replaced"):
    """Run the kills; returns the number of those after which something was wrong."""
    progress.draw = quick_draw
    torch.set_num_threads(1)
    root = Path(root).resolve()
    tiny.data(root)
    with contextlib.redirect_stdout(None):  # what the first run in a process imports is imported once, not in every fork
        train(tiny.options(root, "warm", max_iters=1))
    draw = random.Random(int(os.environ.get("NANOGPT_FAST_SEED", "1337")))
    wrong = kills = 0
    names = names.split(",")
    if "sharded" in names:
        from torch.distributed import checkpoint, fsdp  # noqa: F401
    for name in names:
        shutil.rmtree(root / "out", ignore_errors=True)
        situation = Situation(root, name)
        if how == "random":
            chosen = [dict(seconds=draw.uniform(0, situation.seconds)) for _ in range(int(times) // len(names))]
        else:
            chosen = [dict(last=i) for i in (range(len(situation.calls)) if how == "calls" else situation.renames_of_a_save())]
        for where in chosen:
            problem = situation.kill(**where)
            kills += 1
            if problem is not None:
                wrong += 1
                at = f"before call {where['last']}, {(*situation.calls, 'the end')[where['last']]}" if "last" in where else f"{where}"
                print(f"{name}, killed {at}: {problem}", flush=True)
    print(f"{kills} kills, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
