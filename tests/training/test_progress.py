"""What a run shows and records never ends it: a picture, a logger, metrics.jsonl or a printed line that fails."""
import dataclasses
import errno
import json
import os
import signal
import sys
import tracemalloc
import types

import kills
import pytest
import tiny
import torch

from nanogpt_fast.training import progress
from nanogpt_fast.training.trainer import train


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny.data(tmp_path)
    monkeypatch.setattr(progress, "draw", kills.quick_draw)
    return tmp_path


def step_of(path):
    return torch.load(path, weights_only=True)["iter_num"] if path.exists() else None


def test_the_checkpoint_is_written_before_the_picture(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(progress, "draw", lambda rows, path: drawn.append([step_of(path.parent / name) for name in ("ckpt.pt", "last.pt")]))
    train(tiny.options(folder))
    assert drawn[:3] == [[None, None], [10, 10], [20, 20]]


@pytest.mark.parametrize("where", ["a notebook", "IPython in a pipe", "a pipe"])
def test_a_notebook_shows_a_bar_although_its_stderr_is_no_terminal(where, folder, monkeypatch, capsys):
    shell = types.SimpleNamespace(**{"a notebook": {"kernel": object()}}.get(where, {}))
    monkeypatch.setitem(sys.modules, "IPython", None if where == "a pipe" else types.SimpleNamespace(get_ipython=lambda: shell))
    train(tiny.options(folder, max_iters=3))
    out, err = capsys.readouterr()
    assert ("step 3/3 |" in err) == (where == "a notebook") == ("iter 0: loss" not in out) and "step 3: train loss" in out


def test_a_picture_that_fails_is_said_once_and_ends_nothing(folder, monkeypatch, capsys):
    def broken(rows, path):
        raise MemoryError("no room for a figure")
    monkeypatch.setattr(progress, "draw", broken)
    o = tiny.options(folder)
    assert train(o).iter_num == 20 and step_of(folder / "out" / "last.pt") == 20
    out = capsys.readouterr().out
    assert out.count("loss.png failed, and the run goes on without it (MemoryError: no room for a figure)") == 1


class Logger:
    """A tracker whose connection is down from its third row to its eighth, and at the end."""
    rows = []

    def __init__(self, options):
        self.calls = 0

    def log(self, row):
        self.calls += 1
        if 3 <= self.calls <= 8:
            raise ConnectionError("no route to host")
        self.rows.append(row["iter"])

    def close(self):
        raise ConnectionError("no route to host")


def test_a_logger_that_fails_is_said_once_and_is_used_again_when_it_can(folder, monkeypatch, capsys):
    monkeypatch.setattr(progress, "TensorBoard", Logger)
    assert train(tiny.options(folder, max_iters=9, tensorboard=True)).iter_num == 9
    assert capsys.readouterr().out.count("Logger failed") == 1
    assert Logger.rows == [0, 0, 7, 8, 9]       # the evaluation and the step 0; 1 to 6 are lost


class Full:
    """An open metrics.jsonl on a disk that has room for `room` bytes; os.write's rule: what fits is written."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, line):
        fits, self.room = line[:self.room], self.room - len(line[:self.room])
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(fits)

    def close(self):
        self.file.close()


def test_metrics_that_found_no_room_are_said_once_and_written_when_there_is(folder, monkeypatch, capsys):
    straight, full = tiny.options(folder, "straight"), tiny.options(folder, "full")
    train(straight)
    opened = []

    def opens(path, *args, **kwargs):
        file = open(path, *args, **kwargs)
        opened.append(path)
        return Full(file, 700) if len(opened) == 1 else file

    monkeypatch.setattr(progress, "open", opens, raising=False)
    assert train(full).iter_num == 20
    assert capsys.readouterr().out.count("metrics.jsonl failed") == 1 and len(opened) == 2
    assert tiny.losses(full) == tiny.losses(straight) and tiny.evaluations(full) == tiny.evaluations(straight)
    assert [row["iter"] for row in tiny.rows(full)] == [row["iter"] for row in tiny.rows(straight)]


@pytest.mark.parametrize("number", ["EPIPE", "EIO"])
def test_output_that_reaches_nobody_stops_the_run_and_saves_it(number, folder, monkeypatch):
    straight, broken = tiny.options(folder, "straight"), tiny.options(folder, "broken")
    train(straight)
    code = getattr(errno, number)

    def unheard(text, flush=False):
        if text.startswith("iter 13"):
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(progress, "print", unheard, raising=False)
        stopped = train(broken)
    assert stopped.stopped == signal.SIGHUP and stopped.iter_num == 14
    train(dataclasses.replace(broken, init_from="resume"))
    assert tiny.losses(broken) == tiny.losses(straight) and tiny.evaluations(broken) == tiny.evaluations(straight)


def test_a_log_file_on_a_full_disk_ends_nothing(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(progress, "print", full, raising=False)
    assert train(tiny.options(folder, max_iters=6)).iter_num == 6


class Heard:
    """Stands for the run's StopOnSignal."""
    signal = None


def reported(folder, monkeypatch, steps, start=0):
    """A Progress after so many steps, each with a row, and an evaluation every 10th; nothing is printed or drawn."""
    monkeypatch.setattr(progress, "print", lambda *_, **__: None, raising=False)
    (folder / "out").mkdir(exist_ok=True)
    made = progress.Progress(tiny.options(folder), start=start, total=steps, tokens=64, stop=Heard())
    run_on(made, start, steps)
    return made


def run_on(made, start, end):
    for i in range(start, end):
        if i % 10 == 0:
            made.evaluated(i, dict(train=3.0 + 1 / (i + 1), val=2.0 + abs(i - 70) / (i + 1)), 1e-3)
        made.step(i, 3.0 + 1 / (i + 1), 1e-3, lambda seconds: 0.1)


def test_memory_does_not_grow_with_the_steps(folder, monkeypatch):
    monkeypatch.setattr(progress, "SHOWN", 64)
    made = reported(folder, monkeypatch, 400)
    tracemalloc.start()
    try:
        run_on(made, 400, 800)
        before = tracemalloc.get_traced_memory()[0]
        run_on(made, 800, 3200)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    made.close()
    assert grown < 2400 * 10, f"{grown / 2400:.0f} bytes a step"      # a row that is kept takes 500
    assert len(tiny.losses(folder / "out")) == 3200 and len(tiny.evaluations(folder / "out")) == 320


@pytest.mark.parametrize("resumed", [False, True])
def test_the_picture_of_a_long_run_is_thinned_and_has_its_ends_and_its_best_evaluation(resumed, folder, monkeypatch):
    monkeypatch.setattr(progress, "SHOWN", 16)
    drawn = []
    monkeypatch.setattr(progress, "draw", lambda rows, path: drawn.append(rows))
    made = reported(folder, monkeypatch, 1001)
    if resumed:     # from the file
        made.close()
        made = reported(folder, monkeypatch, 1001, start=1001)
    made.tell(1000, dict(train=1.0, val=1.0), "", None)
    made.close()
    steps = [row["iter"] for row in drawn[-1] if "loss" in row]
    evaluations = [row["iter"] for row in drawn[-1] if "val_loss" in row]
    assert steps == [*range(0, 1000, 64), 1000] and evaluations == sorted({*range(0, 1000, 80), 70, 1000})


def test_what_a_full_disk_kept_out_for_long_is_dropped_from_its_beginning_and_said(folder, monkeypatch):
    monkeypatch.setattr(progress, "LACKING", 5)
    said = []
    made = reported(folder, monkeypatch, 3)
    made.file = Full(made.file, 10)
    monkeypatch.setattr(progress, "print", lambda text, flush: said.append(text), raising=False)
    for i in range(3, 20):
        made.step(i, 3.0, 1e-3, lambda seconds: 0.1)
    made.close()
    assert list(tiny.losses(folder / "out")) == [0, 1, 2, 15, 16, 17, 18, 19]
    assert len([line for line in said if "lacks 5 lines; the first of them are dropped" in line]) == 1


@pytest.mark.parametrize("line", [b"", b"{", b"3", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"iter": 3}', b'{"loss": 1.0}',
                                  b'{"iter": "3", "loss": 1.0}', b'{"iter": 3.5, "loss": 1.0}', b'{"iter": 3, "loss": "low"}',
                                  b'{"iter": 3, "loss": 1' + b"0" * 400 + b"}", b'{"iter": 3, "train_loss": 1.0, "val_loss": null}'],
                         ids=lambda line: line[:30].decode("latin1"))
def test_a_damaged_line_of_metrics_is_said_and_left_out(line, tmp_path, capsys):
    good = [{"iter": i, "loss": 2.0, "lr": 0.1} for i in range(5)]
    lines = [json.dumps(row).encode() for row in good]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]))
    assert list(progress._rows_before(tmp_path / "metrics.jsonl", 5, None)) == good
    assert "has 1 line that no run wrote whole" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert list(progress._rows_before(tmp_path / "metrics.jsonl", 5, None)) == good
    assert capsys.readouterr().out == ""


class Clock:
    """Stands for the module `time`; each look at it takes no time."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


def evaluated(folder, monkeypatch, seconds, **changed):
    """What a run prints during its first evaluation, whose batches take so many seconds each."""
    said, clock = [], Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "print", lambda text, flush: said.append(text), raising=False)
    o = tiny.options(folder, eval_iters=20, **changed)
    (folder / "out").mkdir(exist_ok=True)
    made = progress.Progress(o, start=0, total=o.max_iters, tokens=64, stop=Heard(), forecast=o.gradient_accumulation_steps)
    for done in range(1, 41):
        clock.now += seconds
        made.evaluating(done, 40)
    made.evaluating(1, 40)      # the next evaluation
    made.evaluating(40, 40)
    made.close()
    return said


def test_a_long_run_is_said_to_be_long_before_its_first_step_and_evaluations_say_where_they_are(folder, monkeypatch):
    said = evaluated(folder, monkeypatch, 3.0, max_iters=600_000, eval_interval=2000, gradient_accumulation_steps=40)
    # 600,000 steps of 3 x 40 x 3 seconds, and 301 evaluations of 40 x 3
    assert said[0] == "time    about 7 years on this CPU: 600,000 steps of 6 minutes; --preset=laptop takes minutes"
    assert said[1] == "evaluating: 5 of 40 batches, 01:45 left" and len(said) == 1 + 39 // 4


def test_a_short_run_says_its_time_once_and_nothing_else(folder, monkeypatch):
    said = evaluated(folder, monkeypatch, 0.01, max_iters=2000, eval_interval=250)
    assert said == ["time    about 64 seconds on this CPU: 2,000 steps of 30 ms"]


def test_what_dropout_adds_is_not_in_an_evaluations_time_and_is_said(folder, monkeypatch):
    said = evaluated(folder, monkeypatch, 0.01, max_iters=2000, eval_interval=250, dropout=0.2)
    assert said == ["time    at least 64 seconds on this CPU: 2,000 steps of 30 ms, which dropout=0.2 makes longer"]


def test_a_resumed_run_that_began_with_a_step_is_told_no_time_by_a_later_evaluation(folder, monkeypatch):
    said, clock = [], Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "print", lambda text, flush: said.append(text), raising=False)
    (folder / "out").mkdir(exist_ok=True)
    made = progress.Progress(tiny.options(folder, log_interval=100), start=5, total=20, tokens=64, stop=Heard(), forecast=1)
    clock.now += 1
    made.step(5, 3.0, 1e-3, lambda seconds: None)
    for done in (1, 2):
        clock.now += 1
        made.evaluating(done, 2)
    made.close()
    assert said == []


def test_a_bar_shows_how_far_an_evaluation_is(folder, monkeypatch):
    made, clock = reported(folder, monkeypatch, 0), Clock()
    monkeypatch.setattr(progress, "time", clock)

    class Bar:
        shown = []

        def refresh(self):
            self.shown.append(self.postfix)

        def close(self):
            pass
    made.bar = Bar()
    for done in range(1, 5):
        clock.now += 1.0
        made.evaluating(done, 40)
    made.close()
    assert Bar.shown == [f"evaluating: {done} of 40 batches, 00:{40 - done} left" for done in (2, 3, 4)]
