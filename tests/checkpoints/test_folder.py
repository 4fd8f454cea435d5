"""A run's folder: which checkpoint a resume takes and what it says, one owner at a time, and what killed runs leave."""
import dataclasses
import os
import socket
import subprocess
import sys
import textwrap
import time

import kills
import disks
import pytest
import tiny
import torch

from nanogpt_fast import files
from nanogpt_fast.checkpoints import folder as run_folder
from nanogpt_fast.checkpoints.nanogpt import CheckpointError
from nanogpt_fast.training import progress
from nanogpt_fast.training.trainer import train


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "draw", kills.quick_draw)
    tiny.data(tmp_path)
    return tmp_path


def killed(o, monkeypatch, step=2):
    """Train until `step`, then end without a word to the disk."""
    original = progress.Progress.step

    def last_step(self, iter_num, *args):
        if iter_num == step:
            raise kills.Killed
        original(self, iter_num, *args)

    with monkeypatch.context() as patch, pytest.raises(kills.Killed):
        patch.setattr(progress.Progress, "step", last_step)
        train(o)


def resumed(o, **changes):
    return train(dataclasses.replace(o, init_from="resume", **changes))


def theirs(path):
    """Make a checkpoint of ours one that nanoGPT could have written."""
    saved = torch.load(path, weights_only=True)
    torch.save({key: saved[key] for key in ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")}, path)


# ---------------------------------------------------------------------------------------------------- what is resumed

def test_both_files_name_the_run_and_the_step_and_a_resume_says_them(folder, capsys):
    o = tiny.options(folder, max_iters=10)
    train(o)
    saved = [torch.load(folder / "out" / name, weights_only=True) for name in ("ckpt.pt", "last.pt")]
    run = saved[0]["run"]
    assert run and [(s["run"], s["iter_num"]) for s in saved] == [(run, 10)] * 2
    capsys.readouterr()
    resumed(o, max_iters=12)
    out = capsys.readouterr().out
    assert f"resuming from {folder}/out/last.pt: run {run}, step 10" in out and "WARNING" not in out
    assert torch.load(folder / "out" / "last.pt", weights_only=True)["run"] == run
    train(dataclasses.replace(o, out_dir=str(folder / "other")))
    assert torch.load(folder / "other" / "last.pt", weights_only=True)["run"] != run


def test_a_run_without_last_pt_goes_on_from_ckpt_pt_and_says_that_this_is_not_exact(folder, capsys):
    o = tiny.options(folder, max_iters=10)
    train(o)
    os.remove(folder / "out" / "last.pt")
    resumed(o, max_iters=12)
    assert "WARNING: not an exact continuation" in capsys.readouterr().out


def test_a_new_run_killed_before_its_first_checkpoint_is_not_taken_for_the_one_that_was_there(folder, monkeypatch, capsys):
    old = tiny.options(folder, max_iters=10, seed=7)
    train(old)
    run = torch.load(folder / "out" / "last.pt", weights_only=True)["run"]
    new = tiny.options(folder)
    killed(new, monkeypatch)
    assert f"last.pt is of run {run}, step 10: this new run replaces it" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=f"is of run {run}, step 10, but a later run.*without --init_from=resume.*delete .*run.json"):
        resumed(new)
    os.remove(folder / "out" / "run.json")
    assert resumed(old, max_iters=11).iter_num == 11


def test_a_new_run_in_nanogpts_folder_killed_early_is_not_taken_for_nanogpts(folder, monkeypatch):
    o = tiny.options(folder, max_iters=10)
    train(o)
    for name in ("last.pt", "run.json"):
        os.remove(folder / "out" / name)
    theirs(folder / "out" / "ckpt.pt")
    assert resumed(o, max_iters=11, eval_only=True).iter_num == 10
    killed(o, monkeypatch)
    with pytest.raises(CheckpointError, match="of a run without a name, step 10, but a later run"):
        resumed(o)


@pytest.mark.parametrize("record", ['{"run": "later"}', '{"run": "later", "began": "noon"}', '{"run": "later", "began": 1e300}',
                                    '{"run": ["later"], "began": 1}', "[" * 100_000, "7", ""], ids=lambda record: record[:40])
def test_a_damaged_record_of_the_run_ends_no_resume(record, folder):
    o = tiny.options(folder, max_iters=2, eval_interval=2)
    train(o)
    (folder / "out" / "run.json").write_text(record)
    assert resumed(o, max_iters=3).iter_num == 3


def test_a_kill_between_the_two_renames_costs_nothing(folder, monkeypatch, capsys):
    o = tiny.options(folder)
    replace = os.replace

    def until_last_pt(source, target):
        replace(source, target)
        if target.endswith("last.pt"):
            raise kills.Killed

    with monkeypatch.context() as patch, pytest.raises(kills.Killed):
        patch.setattr(os, "replace", until_last_pt)
        train(o)
    assert not (folder / "out" / "ckpt.pt").exists()
    resumed(o, max_iters=10)      # which has been done
    assert "ckpt.pt is older than" in capsys.readouterr().out
    ckpt, last = (torch.load(folder / "out" / name, weights_only=True) for name in ("ckpt.pt", "last.pt"))
    assert list(last) == [*ckpt, "resume"] and (ckpt["iter_num"], ckpt["run"]) == (10, last["run"])
    assert all(torch.equal(tensor, last["model"][name]) for name, tensor in ckpt["model"].items())


def test_a_damaged_ckpt_pt_does_not_keep_a_whole_last_pt_from_being_resumed(folder, capsys):
    o = tiny.options(folder, max_iters=10)
    train(o)
    theirs(folder / "out" / "ckpt.pt")
    content = bytearray((folder / "out" / "ckpt.pt").read_bytes())
    for damage in (content[:1000], content[:len(content) // 2] + b"?" + content[len(content) // 2 + 1:]):
        (folder / "out" / "ckpt.pt").write_bytes(damage)
        os.utime(folder / "out" / "ckpt.pt", (time.time() + 9,) * 2)
        assert resumed(o, max_iters=10).iter_num == 10
        out = capsys.readouterr().out
        assert "damaged" in out and "last.pt is taken" in out and "resuming from " + str(folder / "out" / "last.pt") in out


def test_no_checkpoint_is_touched_before_every_rank_has_given_its_state(folder, monkeypatch):
    from nanogpt_fast import devices
    o = tiny.options(folder, max_iters=10)
    train(o)
    before = {name: (folder / "out" / name).read_bytes() for name in ("ckpt.pt", "last.pt")}

    def another_rank_is_dead(self, value):
        if value is not None:
            raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(devices.Ranks, "gather", another_rank_is_dead)
    with pytest.raises(RuntimeError, match="closed by peer"):
        resumed(o, max_iters=20)
    assert {name: (folder / "out" / name).read_bytes() for name in before} == before


# ---------------------------------------------------------------------------------------------------- one owner

def test_a_second_run_in_a_folder_is_refused_and_told_who_has_it(folder, capsys):
    o = tiny.options(folder, max_iters=2)
    with run_folder.owned(folder / "out"):
        for init_from in ("scratch", "resume"):
            with pytest.raises(RuntimeError, match=rf"out is in use: process {os.getpid()} on {socket.gethostname()} has trained there "
                                                   r"since 20\d\d-.*Wait for its end, stop it, or use another --out_dir"):
                train(dataclasses.replace(o, init_from=init_from))
        assert os.listdir(folder / "out") == ["run.json"]
    assert train(o).iter_num == 2


def test_the_lock_ends_with_its_process_even_if_a_child_of_it_lives_on(tmp_path):
    code = textwrap.dedent("""
        import os, signal, sys, time
        from nanogpt_fast.checkpoints import folder
        with folder.owned(sys.argv[1]):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(writing, b".")
                time.sleep(60)
            os.read(reading, 1)         # the child runs
            print(child, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    try:
        process.wait()
        with run_folder.owned(tmp_path):
            pass
    finally:
        os.kill(child, 9)
        process.stdout.close()


def test_a_resume_creates_no_folder(folder):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        resumed(tiny.options(folder))
    assert not (folder / "out").exists()


def test_a_file_system_without_locks_is_said_and_trained_on(folder, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    assert train(tiny.options(folder, max_iters=2)).iter_num == 2
    assert capsys.readouterr().out.count("has no locks") == 1


# ---------------------------------------------------------------------------------------------------- litter

def test_a_start_removes_what_dead_processes_left_and_nothing_else(folder):
    out = folder / "out"
    out.mkdir()
    for name in ("loss.png.0123abcd.tmp", "last.pt.89abcdef.tmp", "my.tmp", "my.0123abcd.tmp", "notes.txt"):
        (out / name).write_bytes(b"half")
    with files.replacing(out / "being-written") as f:       # by a living process
        train(tiny.options(folder, max_iters=2))
        f.write(b"whole")
    assert (out / "being-written").read_bytes() == b"whole"
    left = sorted(name for name in os.listdir(out) if name not in ("ckpt.pt", "last.pt", "loss.png", "metrics.jsonl", "run.json"))
    assert left == ["being-written", "my.0123abcd.tmp", "my.tmp", "notes.txt"]


def test_files_that_are_one_state_change_together_or_not_at_all(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    for path in (a, b):
        path.write_bytes(b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        disks.full_at_fsync(patch, 2)
        with files.replacing_together(a, b, without=[b]) as (f, g):
            f.write(b"new"), g.write(b"new")
    assert (a.read_bytes(), b.read_bytes(), sorted(os.listdir(tmp_path))) == (b"old", b"old", ["a", "b"])
    with files.replacing_together(a, b, without=[b]) as (f, g):
        f.write(b"new"), g.write(b"new")
    assert a.read_bytes() == b.read_bytes() == b"new"
