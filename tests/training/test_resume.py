"""Stopped and resumed is never stopped: bit for bit on a CPU, however the run ended."""
import dataclasses
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import tiny
import torch

from nanogpt_fast import GPT, options
from nanogpt_fast.checkpoints import folder as run_folder
from nanogpt_fast.checkpoints import state
from nanogpt_fast.checkpoints.nanogpt import CheckpointError
from nanogpt_fast.training import progress, resumed as resumed_settings
from nanogpt_fast.training.trainer import TrainOptions, run, train


@pytest.fixture
def folder(tmp_path):
    tiny.data(tmp_path)
    return tmp_path


def stop_after(step, monkeypatch, number=signal.SIGINT):
    """Send this process a signal when step `step` is reported."""
    original = progress.Progress.step

    def reporting(self, iter_num, *args):
        original(self, iter_num, *args)
        if iter_num == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(progress.Progress, "step", reporting)


def test_a_run_stopped_at_step_60_and_resumed_equals_one_that_never_stopped(folder, monkeypatch):
    settings = dict(max_iters=90, lr_decay_iters=90, eval_interval=25, dropout=0.2, gradient_accumulation_steps=2,
                    sample_tokens=3)
    straight, broken = tiny.options(folder, "straight", **settings), tiny.options(folder, "broken", **settings)
    expected = train(straight)

    with monkeypatch.context() as patch:
        stop_after(59, patch)
        stopped = train(broken)
    assert stopped.stopped == signal.SIGINT and stopped.iter_num == 60
    assert torch.load(folder / "broken" / "last.pt", weights_only=True)["iter_num"] == 60
    torch.manual_seed(0)  # whatever the process has drawn in between
    resumed = train(dataclasses.replace(broken, init_from="resume"))

    assert tiny.losses(broken) == tiny.losses(straight) and len(tiny.losses(broken)) == 90
    assert tiny.evaluations(broken) == tiny.evaluations(straight)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])
    assert resumed.best_val_loss == expected.best_val_loss


@pytest.mark.parametrize("step", [9, 19])  # the signal comes when an evaluation is due next
def test_a_stop_right_before_an_evaluation_does_not_lose_it(step, folder, monkeypatch):
    straight, broken = tiny.options(folder, "straight"), tiny.options(folder, "broken")
    train(straight)
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        train(broken)
    train(dataclasses.replace(broken, init_from="resume"))
    assert tiny.losses(broken) == tiny.losses(straight) and tiny.evaluations(broken) == tiny.evaluations(straight)


def test_a_killed_run_goes_on_from_its_last_evaluation_and_logs_no_step_twice(folder):
    straight, broken = tiny.options(folder, "straight"), tiny.options(folder, "broken")
    train(straight)
    train(dataclasses.replace(broken, max_iters=10))  # what is on disk after the evaluation at step 10 ...
    with open(folder / "broken" / "metrics.jsonl", "a") as f:  # ... and what a run that was killed at step 12 logged besides
        f.write('{"iter": 10, "loss": 0.0}\n{"iter": 11, "loss": 0.0}\n{"iter": 12, "lo')
    train(dataclasses.replace(broken, init_from="resume"))
    assert [row["iter"] for row in tiny.rows(broken)] == [row["iter"] for row in tiny.rows(straight)]
    assert tiny.losses(broken) == tiny.losses(straight)


def test_float16_resumes_with_the_scale_that_it_had_found(folder):
    settings = dict(dtype="float16", max_iters=20)
    straight, broken = tiny.options(folder, "straight", **settings), tiny.options(folder, "broken", **settings)
    train(straight)
    train(dataclasses.replace(broken, max_iters=10))
    train(dataclasses.replace(broken, init_from="resume"))
    assert tiny.losses(broken) == tiny.losses(straight)
    scalers = [torch.load(folder / name / "last.pt", weights_only=True)["resume"]["scaler"] for name in ("straight", "broken")]
    assert scalers[0] == scalers[1] and scalers[0]["_growth_tracker"] == 20  # steps since the scale was last changed


def test_nanogpts_ckpt_pt_is_resumed_with_its_optimizer(folder):
    o = tiny.options(folder, max_iters=10)
    train(o)
    os.remove(folder / "out" / "last.pt")  # nanoGPT knows no such file
    before = torch.load(folder / "out" / "ckpt.pt", weights_only=True)
    theirs = {key: before[key] for key in ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")}
    theirs["best_val_loss"] = torch.tensor(before["best_val_loss"])
    torch.save(theirs, folder / "out" / "ckpt.pt")
    # The sizes are the checkpoint's, whatever the options say, as nanoGPT has it.
    result = train(dataclasses.replace(o, init_from="resume", max_iters=15, block_size=1024, n_layer=7))
    assert result.iter_num == 15 and result.model.config.block_size == 16 and result.model.config.n_layer == 2
    after = torch.load(folder / "out" / "last.pt", weights_only=True)
    assert after["optimizer"]["state"][0]["step"] == 15
    assert list(tiny.losses(o)) == list(range(15))


def test_a_ckpt_pt_that_nanogpt_has_trained_further_is_preferred_to_an_older_last_pt(folder):
    o = tiny.options(folder, max_iters=4)
    train(o)
    saved = torch.load(folder / "out" / "ckpt.pt", weights_only=True)
    theirs = {key: saved[key] for key in ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")}
    torch.save(theirs, folder / "out" / "ckpt.pt")  # younger, but no further: last.pt, which can do it exactly
    os.utime(folder / "out" / "last.pt", (time.time() - 9, time.time() - 9))
    assert run_folder.latest(folder / "out").name == "last.pt"
    torch.save({**theirs, "iter_num": 9}, folder / "out" / "ckpt.pt")
    assert run_folder.latest(folder / "out").name == "ckpt.pt"
    assert train(dataclasses.replace(o, init_from="resume", max_iters=11)).iter_num == 11


def test_a_finished_run_resumed_does_nothing_more(folder):
    o = tiny.options(folder, max_iters=5)
    first = train(o)
    again = train(dataclasses.replace(o, init_from="resume"))
    assert again.iter_num == 5 and again.stopped is None and list(tiny.losses(o)) == list(range(5))
    assert torch.equal(first.model.lm_head.weight, again.model.lm_head.weight)


@pytest.mark.parametrize("more", [(), ("--max_iters=3",)])
def test_the_command_says_that_a_finished_run_takes_no_step_and_what_goes_on(more, folder, capsys):
    o = tiny.options(folder, max_iters=5)
    train(o)
    capsys.readouterr()
    assert run([f"--out_dir={o.out_dir}", "--init_from=resume", *more]) == 0
    out = capsys.readouterr().out
    assert f"No step was taken: {o.out_dir} is at step 5 already" in out and "--max_iters=N" in out and "Done" not in out


def test_another_batch_size_is_allowed_and_said_not_to_be_the_same_run(folder, capsys):
    o = tiny.options(folder, max_iters=5)
    train(o)
    assert train(dataclasses.replace(o, init_from="resume", batch_size=3, max_iters=7)).iter_num == 7
    assert "not an exact continuation" in capsys.readouterr().out


def resumed(o, *words, without=("weight_decay", "beta1", "beta2")):
    """Resume by command line without some of the run's words; returns what last.pt then holds."""
    kept = [word for word in tiny.words(dataclasses.replace(o, init_from="resume")) if word[2:].split("=")[0] not in without]
    train(options.parse(TrainOptions, [*kept, *words], "train"))
    return torch.load(Path(o.out_dir, "last.pt"), weights_only=True)


def test_what_is_given_to_a_resumed_run_is_obeyed_said_and_recorded(folder, capsys):
    o = tiny.options(folder, max_iters=2, weight_decay=0.5, beta2=0.9)
    train(o)
    capsys.readouterr()
    saved = resumed(o, "--max_iters=3")                        # nothing given: the checkpoint's, as in nanoGPT
    decayed, others = saved["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"]) == (0.5, 0.0, (0.9, 0.9))
    assert (saved["config"]["weight_decay"], saved["config"]["beta2"]) == (0.5, 0.9)
    printed = capsys.readouterr().out
    assert "weight_decay=0.5" in printed and "beta2=0.9" in printed and "beta1" not in printed

    saved = resumed(o, "--max_iters=4", "--weight_decay=0.1", "--beta1=0.8", "--beta2=0.95", "--seed=5")  # two of them are the defaults
    decayed, others = saved["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"], others["betas"]) == (0.1, 0.0, (0.8, 0.95), (0.8, 0.95))
    assert [saved["config"][name] for name in ("weight_decay", "beta1", "beta2")] == [0.1, 0.8, 0.95]
    printed = capsys.readouterr().out
    for words in ("weight_decay is 0.1 from here on; it was 0.5", "beta1 is 0.8 from here on; it was 0.9", "beta2 is 0.95 from here on; it was 0.9",
                  "seed 5 chooses the batches of evaluations; training continues with the checkpoint's random numbers, of seed 1337"):
        assert words in printed


def test_out_dir_alone_goes_on_exactly_where_the_run_stopped(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    settings = dict(dropout=0.1, gradient_accumulation_steps=2, weight_decay=0.3, beta2=0.9, seed=7, grad_clip=0.5)
    straight, broken = tiny.options(folder, "straight", **settings), tiny.options(folder, "a folder", **settings)
    train(straight)
    with monkeypatch.context() as patch:
        stop_after(12, patch)
        assert run(tiny.words(broken)) == 130
    command = capsys.readouterr().out.splitlines()[-1]
    assert command == f"    nanogpt-fast train --out_dir='{folder / 'a folder'}' --init_from=resume"
    assert run([f"--out_dir={folder / 'a folder'}", "--init_from=resume"]) == 0      # no data set, no sizes, no schedule
    assert tiny.losses(broken) == tiny.losses(straight) and tiny.evaluations(broken) == tiny.evaluations(straight)
    printed = capsys.readouterr().out
    for words in ("the run's own settings, from", "max_iters=20", "batch_size=4", "dataset=sums", "seed=7"):
        assert words in printed
    assert "WARNING" not in printed and "from here on" not in printed


def test_what_is_typed_or_in_a_config_file_wins_over_the_runs_settings_and_is_said(folder, capsys):
    o = tiny.options(folder, max_iters=2)
    train(o)
    (folder / "longer.py").write_text("max_iters = 4\nbatch_size = 4  # as in the run\n")
    capsys.readouterr()
    assert run([str(folder / "longer.py"), f"--out_dir={o.out_dir}", "--init_from=resume", "--min_lr=6e-5", "--eval_iters=1"]) == 0
    saved = torch.load(folder / "out" / "last.pt", weights_only=True)
    assert saved["iter_num"] == 4
    assert saved["config"] == {**dataclasses.asdict(o), "max_iters": 4, "min_lr": 6e-5, "eval_iters": 1, "init_from": "resume",
                               "activation": "gelu", "preset": ""}
    printed = capsys.readouterr().out
    for words in ("max_iters is 4 from here on; it was 2", "min_lr is 6e-05 from here on; it was 0.001",    # 6e-5 is the default
                  "eval_iters is 1 from here on; it was 2"):
        assert printed.count(words) == 1
    assert printed.count("from here on") == 3


def test_a_run_of_nanogpts_goes_on_with_its_settings_on_this_machines_means(folder, capsys):
    o = tiny.options(folder, max_iters=2)
    train(o)
    saved = torch.load(folder / "out" / "ckpt.pt", weights_only=True)
    os.remove(folder / "out" / "last.pt")
    theirs = {key: saved[key] for key in ("model", "optimizer", "model_args", "iter_num", "best_val_loss")}
    theirs["config"] = {**saved["config"], "device": "cuda", "dtype": "float16", "backend": "nccl", "max_iters": 4, "min_lr": "low"}
    torch.save(theirs, folder / "out" / "ckpt.pt")
    capsys.readouterr()
    result = train(TrainOptions(out_dir=o.out_dir, init_from="resume", device="cpu"))
    assert result.iter_num == 4 and list(tiny.losses(o)) == [0, 1, 2, 3]
    config = torch.load(folder / "out" / "last.pt", weights_only=True)["config"]
    assert (config["dtype"], config["backend"], config["batch_size"], config["min_lr"]) == ("auto", "auto", 4, TrainOptions.min_lr)
    assert "its config says that min_lr is 'low' (str); expected float. That is left out" in capsys.readouterr().out


def test_a_size_that_the_checkpoint_decides_is_said_and_the_record_is_what_ran(folder, capsys):
    o = tiny.options(folder, max_iters=2, activation="gelu_tanh")
    train(o)
    capsys.readouterr()
    saved = resumed(o, "--max_iters=3", "--n_layer=7", "--n_embd=64", "--block_size=1024", "--bias=True", "--activation=gelu")
    assert [saved["config"][name] for name in ("n_layer", "n_embd", "block_size", "bias", "activation")] == [2, 32, 16, False, "gelu_tanh"]
    printed = capsys.readouterr().out
    for words in ("n_layer is 2, as in the weights of", "7 has no effect", "activation is gelu_tanh, as in the weights of", "gelu has no effect",
                  "block_size is 16", "bias is False"):
        assert words in printed


def test_resuming_on_a_text_with_another_vocabulary_is_refused(folder):
    o = tiny.options(folder, max_iters=2)
    train(o)
    tiny.data(folder, "other", "the quick brown fox jumps over the lazy dog\n" * 50)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        train(dataclasses.replace(o, init_from="resume", dataset="other"))


def test_resuming_without_or_with_a_damaged_checkpoint_is_a_clear_error(folder):
    o = tiny.options(folder, init_from="resume")
    with pytest.raises(CheckpointError, match="there is no checkpoint .*ckpt.pt: there is no folder .*out"):
        train(o)
    (folder / "out").mkdir()
    (folder / "out" / "last.pt").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(CheckpointError, match="damaged"):
        train(o)


def test_an_optimizer_that_does_not_fit_is_refused(folder):
    o = tiny.options(folder, max_iters=2)
    train(o)
    with pytest.raises(CheckpointError, match="optimizer"):
        train(dataclasses.replace(o, init_from="resume", block_size=8))  # crops the model; the moments are of 16 positions


def test_random_states_come_back():
    import random

    import numpy
    states = state.random_states()
    drawn = torch.rand(3), numpy.random.rand(3), random.random(), numpy.random.randn()
    state.set_random_states(states)
    again = torch.rand(3), numpy.random.rand(3), random.random(), numpy.random.randn()
    assert torch.equal(drawn[0], again[0]) and (drawn[1] == again[1]).all() and drawn[2:] == again[2:]


def test_ctrl_c_saves_and_leaves_with_a_message(folder):
    o = tiny.options(folder, max_iters=100_000, lr_decay_iters=100_000, eval_interval=50_000)
    process = subprocess.Popen([sys.executable, "-m", "nanogpt_fast", "train", *tiny.words(o)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while "iter 20:" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and not errors
    saved = torch.load(folder / "out" / "last.pt", weights_only=True)
    assert saved["iter_num"] > 20
    assert f"Stopped at step {saved['iter_num']}" in printed and "--init_from=resume" in printed


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1"])
def test_other_signals_save_and_leave_too(name, folder, monkeypatch, capsys):
    number = getattr(signal, name)
    here = signal.signal(number, noted := lambda *_: pytest.fail(f"{name} was not taken"))  # not the default, which ends pytest
    try:
        stop_after(3, monkeypatch, number)
        assert run(tiny.words(tiny.options(folder))) == 128 + number
        assert signal.getsignal(number) is noted  # the handlers are put back
    finally:
        signal.signal(number, here)
    assert "Stopped at step 4" in capsys.readouterr().out
    assert torch.load(folder / "out" / "last.pt", weights_only=True)["iter_num"] == 4


@pytest.mark.slow
def test_a_terminal_that_is_closed_costs_no_step(folder):
    o = tiny.options(folder, max_iters=100_000, lr_decay_iters=100_000, eval_interval=50_000)
    process, terminal = pty.fork()
    if process == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "nanogpt_fast", "train", *tiny.words(o)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))     # a bar needs columns
    shown = b""
    while not re.search(rb"step [2-9]\d+/", shown):     # the bar is drawn at most ten times a second
        shown = shown[-99:] + os.read(terminal, 1000)
    os.close(terminal)
    os.waitpid(process, 0)
    saved = torch.load(folder / "out" / "last.pt", weights_only=True)
    assert saved["iter_num"] > 20 and "resume" in saved
    train(dataclasses.replace(o, init_from="resume", max_iters=saved["iter_num"] + 1))
    assert list(tiny.losses(o)) == list(range(saved["iter_num"] + 1))


def test_what_nohup_ignores_stays_ignored(folder, monkeypatch):
    here = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_after(3, monkeypatch, signal.SIGHUP)
        assert train(tiny.options(folder, max_iters=6)).iter_num == 6
    finally:
        signal.signal(signal.SIGHUP, here)


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(folder, monkeypatch):
    forward, calls = GPT.forward, []

    def counting(self, *args, **kwargs):
        calls.append(time.perf_counter())
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", counting)
    result = train(tiny.options(folder, eval_iters=500))
    assert result.stopped == signal.SIGINT and result.iter_num == 0 and len(calls) < 10
    assert (folder / "out" / "last.pt").exists()




def test_a_setting_that_no_run_wrote_is_left_out(folder, capsys):
    """Its text would have 2^60 characters."""
    o = tiny.options(folder, max_iters=1)
    train(o)
    path, nested = Path(o.out_dir, "last.pt"), []
    for _ in range(60):
        nested = [nested, nested]
    found = torch.load(path)
    found["config"]["log_interval"] = nested
    torch.save(found, path)
    assert resumed_settings.with_the_runs_settings(TrainOptions(out_dir=o.out_dir, init_from="resume")).log_interval == TrainOptions().log_interval
    assert "its config says that log_interval is a list. That is left out" in capsys.readouterr().out
