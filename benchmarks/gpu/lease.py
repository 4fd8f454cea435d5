"""Stages against a clock: each is a separate process, killed at its time limit, and keeps what it wrote until then.

A stage that hangs, crashes or is killed costs only its own seconds. Its output goes to log.txt line by line, under its name, and its exit
to stages.jsonl at once. Timed stages run alone, the others side by side.
"""
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

GRACE = 4.0     # seconds between SIGTERM and SIGKILL


@dataclass
class Stage:
    """name; command: words; seconds: its time limit; after: stages that must have ended before, in any way; needs: stages that must have
    passed; alone: nothing else runs, and the machine is quiet when it begins; environment: variables added to ours."""
    name: str
    command: list
    seconds: float
    after: tuple = ()
    needs: tuple = ()
    alone: bool = False
    environment: dict = field(default_factory=dict)


class Lease:
    """`run(stages)` within `seconds` (None: no limit); all files are below `folder`."""

    def __init__(self, folder, seconds=None, reserve=6.0):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.end = None if seconds is None else self.began + seconds - reserve
        self.log = open(self.folder / "log.txt", "a", encoding="utf-8")
        self.writing = threading.Lock()
        self.ended = {}         # name: how
        self.stopped = None        # the signal that stops the whole run

    def elapsed(self):
        return time.monotonic() - self.began

    def left(self):
        return float("inf") if self.end is None else self.end - time.monotonic()

    def say(self, name, line):
        """One line of log.txt, also printed: `name| line`."""
        text = f"{self.elapsed():6.1f} {name}| {line}"
        with self.writing:
            print(text[:300], flush=True)
            print(text, file=self.log, flush=True)

    def run(self, stages):
        """Run all that time allows. Returns {name: "passed", or how it ended}."""
        before = {number: signal.signal(number, lambda number, frame: setattr(self, "stopped", number))
                  for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._run(list(stages), {})
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, waiting, running):
        while waiting or running:
            for name in [name for name, one in running.items() if one.poll()]:
                self._note(running.pop(name))
            if self.stopped:
                self._end(running.values())
                waiting = [self._skip(stage, "not run: interrupted") for stage in waiting] and []
                continue
            waiting = [stage for stage in waiting if not self._skipped(stage)]
            for stage in list(waiting):
                if any(name not in self.ended for name in (*stage.after, *stage.needs)):
                    continue
                if running and (stage.alone or any(one.stage.alone for one in running.values())):
                    continue
                waiting.remove(stage)
                running[stage.name] = Running(self, stage, min(stage.seconds, self.left()))
            time.sleep(0.05)
        return self.ended

    def _skipped(self, stage):
        failed = [name for name in stage.needs if self.ended.get(name, "passed") != "passed"]
        if failed:
            return self._skip(stage, f"not run: {failed[0]} {self.ended[failed[0]]}")
        if self.left() < 5:
            return self._skip(stage, "not run: no time left")
        return False

    def _skip(self, stage, why):
        self.ended[stage.name] = why
        self._record(stage.name, why, None, 0.0)
        return True

    def _note(self, one):
        self.ended[one.stage.name] = one.result()
        self._record(one.stage.name, one.result(), one.began, time.monotonic() - self.began - one.began)

    def _record(self, name, how, began, seconds):
        self.say("lease", f"{name}: {how}, {seconds:.1f} s")
        with open(self.folder / "stages.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(dict(stage=name, how=how, began=began, seconds=round(seconds, 2))) + "\n")

    def _end(self, running):
        for one in running:
            one.limit = 0.0


class Running:
    """A stage that has begun."""

    def __init__(self, lease, stage, limit):
        self.lease, self.stage, self.limit = lease, stage, limit
        self.began, self.stopped, self.killed = lease.elapsed(), None, False
        lease.say("lease", f"{stage.name} begins, at most {limit:.0f} s: {' '.join(map(str, stage.command))}")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1",
                       "NANOGPT_FAST_SECONDS": f"{limit:.0f}", **stage.environment}
        try:
            self.process = subprocess.Popen([str(word) for word in stage.command], stdout=subprocess.PIPE,
                                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                                            start_new_session=True, text=True, errors="replace", bufsize=1)
        except OSError as error:
            self.process, self.error = None, error
            return
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lease.say(self.stage.name, line.rstrip("\n"))

    def poll(self):
        """True when it has ended. Terminates it at its time limit, and kills it after the grace period."""
        if self.process is None:
            return True
        if self.process.poll() is not None:
            self._signal(signal.SIGKILL)        # processes that it left running
            self.reader.join(1.0)
            return True
        seconds = self.lease.elapsed() - self.began
        if self.stopped is None and seconds > self.limit:
            self.stopped = seconds
            self._signal(signal.SIGTERM)
        elif self.stopped is not None and seconds > self.stopped + GRACE and not self.killed:
            self.killed = True
            self._signal(signal.SIGKILL)
        return False

    def _signal(self, number):
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def result(self):
        if self.process is None:
            return f"FAILED: {self.error}"
        status = self.process.returncode
        if self.stopped is not None:
            return f"stopped after {self.stopped:.0f} s; what it wrote counts"
        if status == 0:
            return "passed"
        return f"FAILED: exit status {status}" if status > 0 else f"FAILED: killed by signal {-status}"
