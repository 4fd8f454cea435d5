"""What a run shows and records never ends it: a picture, a logger, metrics.jsonl or a printed line that fails."""
import dataclasses
import errno
import os
import signal

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
