"""Run every entry once, in processes of their own: it is compiled, and its result is compared with plain PyTorch's, before it is timed.

So compilation uses all cores, and an entry that crashes, hangs or runs out of memory costs its process, which is replaced, and not the command.
Triton's and cuDNN's compiled code reaches the timing process by their caches on disk.
"""
import multiprocessing
import time
from multiprocessing.connection import wait

import torch

from .. import backend
from . import contest as rules, contests

PATIENCE = 60.0         # seconds for one entry; compiling a kernel takes up to 20
STARTING = 120.0        # seconds for a process to import PyTorch and make the first inputs
NO_MEMORY = "the device has not enough memory for it"


def try_all(shape, listed, workers, until, progress=lambda contest, label, why: None, patience=PATIENCE):
    """{(contest's name, label): None, or why it is not timed} for every entry of the contests `listed`, in their order.

    until: a time.monotonic() after which no entry is begun; those not reached are left out. progress is called for each that is done.
    """
    waiting = [(contest, label) for contest in listed for label in contest.entries]
    found, crew = {}, []
    try:
        while waiting or any(worker.job for worker in crew):
            while waiting and len(crew) < min(workers, len(waiting) + sum(worker.job is not None for worker in crew)):
                crew.append(Worker(shape))
            for worker in crew:
                if worker.job is None and waiting and time.monotonic() < until:
                    worker.take(waiting.pop(0), patience)
            busy = [worker for worker in crew if worker.job]
            if not busy:
                break
            if len(crew) > 1:
                for worker in busy:
                    worker.alone = False
            wait([worker.pipe for worker in busy] + [worker.process.sentinel for worker in busy], timeout=0.2)
            for worker in busy:
                if (answer := worker.answer()) is None:
                    continue
                contest, label = job = worker.job
                worker.job = None
                again = answer[0] == NO_MEMORY and not worker.alone     # with fewer processes on the device there is more for each
                if again:
                    waiting.insert(0, job)
                    workers = max(1, len(crew) - 1)
                    if worker.alive and len(crew) > 1:
                        worker.kill()
                if not worker.alive:
                    crew.remove(worker)
                if again:
                    continue
                found[contest.name, label] = answer[0]
                progress(contest, label, answer[0])
    finally:
        for worker in crew:
            worker.kill()
    return found


class Worker:
    """A process that tries one entry at a time."""

    def __init__(self, shape):
        context = multiprocessing.get_context("spawn")      # a forked child would share this process's CUDA context
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, shape), daemon=True)
        self.process.start()
        other.close()
        self.job, self.deadline, self.fresh, self.alive = None, 0.0, True, True

    def take(self, job, patience):
        self.job, self.patience = job, patience + STARTING * self.fresh
        self.deadline, self.fresh = time.monotonic() + self.patience, False
        self.alone = True       # try_all says if another process was there meanwhile
        try:
            self.pipe.send((job[0].name, job[1]))
        except OSError:         # its process ended: `answer` says so
            pass

    def answer(self):
        """None while the entry is running, else (None or why it is not timed,)."""
        try:
            if self.pipe.poll():
                reason, usable = self.pipe.recv()
                if not usable:
                    self.kill()
                return reason,
            if self.process.is_alive() and time.monotonic() < self.deadline:
                return None
            hangs = self.process.is_alive()
        except (EOFError, OSError):
            hangs = False
        self.kill()
        return f"no answer for {self.patience:.0f} s" if hangs else f"its process ended with status {self.process.exitcode}",

    def kill(self):
        self.alive = False
        self.process.kill()
        self.process.join()
        self.pipe.close()


def work(pipe, shape):
    """The child: answers each (contest's name, label) with (None or the reason, whether the process can go on)."""
    backend.load_local()
    by_name, name, inputs, expected = None, None, None, None
    while True:
        try:
            wanted, label = pipe.recv()
        except EOFError:
            return
        try:
            if by_name is None:
                if shape.cuda:
                    torch.cuda.set_device(shape.number)
                by_name = {contest.name: contest for contest in contests.contests(shape)}
            if name != wanted:
                name, inputs, expected = None, None, None
                if shape.cuda:
                    torch.cuda.empty_cache()        # the other processes need it
                inputs = by_name[wanted].make()
                expected = by_name[wanted].expected(dict(inputs))
                name = wanted
            reason = rules.check(by_name[name], label, inputs, expected)
            if shape.cuda:
                torch.cuda.synchronize()
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
            if isinstance(error, torch.OutOfMemoryError):
                name, inputs, expected, reason = None, None, None, NO_MEMORY
        pipe.send((reason, not shape.cuda or _works()))


def _works():
    """Whether this process can still use its GPU: after an illegal access every later call fails, too."""
    try:
        torch.cuda.synchronize()
        return True
    except Exception:
        return False
