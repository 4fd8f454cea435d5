"""`train --profile` and `bench train --profile`: the trace and the table of N steps, and a run that is otherwise the same."""
import gzip
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

from nanogpt_fast import bench
from nanogpt_fast.training import profiling, trainer as training
from nanogpt_fast.training.trainer import train


def ops_of(path):
    """{name: number of times} of the ranges and ops in a trace."""
    with gzip.open(path, "rt") as f:
        events = json.load(f)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") in ("cpu_op", "user_annotation"))


def test_a_profiled_run_takes_the_steps_of_one_that_is_not_and_leaves_the_ops_of_n_steps(tmp_path, capsys):
    tiny.data(tmp_path)
    train(tiny.options(tmp_path, out="plain", eval_interval=15))
    capsys.readouterr()
    train(tiny.options(tmp_path, out="profiled", eval_interval=15, profile=3))
    shown = capsys.readouterr().out
    assert tiny.losses(tmp_path / "profiled") == tiny.losses(tmp_path / "plain")
    assert tiny.evaluations(tmp_path / "profiled") == tiny.evaluations(tmp_path / "plain")
    found = ops_of(tmp_path / "profiled/trace.json.gz")
    assert [found[f"ProfilerStep#{i}"] for i in range(9, 14)] == [0, 1, 1, 1, 0]
    assert found["forward and backward"] == found["update"] == 3
    assert found["aten::embedding"] == 3 * 2 and found["aten::native_layer_norm"] == 3 * 5     # wte and wpe; two blocks and ln_f
    assert "steps 10 to 12; the trace is" in shown and "host, by op" in shown and not list(tmp_path.glob("profiled/*.tmp"))


def test_the_table_has_the_longest_ops_of_a_step_and_the_sum_of_the_others():
    rows = [[f"op {i}", 2.0, 1000.0 - i] for i in range(profiling.ROWS)] + [["late", 1.0, 30.0], ["latest", 4.0, 20.0]]
    lines = profiling.report([["kernel", 3.0, 600.0], ["rest", 1.0, 200.0]], rows, 7).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["kernel", "0.600", "75.0", "%", "3.0", "200.0"], ["rest", "0.200", "25.0", "%", "1.0", "200.0"],
        ["all", "0.800", "100.0", "%", "4.0", "200.0"]]
    assert lines[0].startswith("GPU, by kernel, mean of 7 steps ") and lines[4].startswith("host, by op: self time, mean of 7 steps ")
    assert lines[5].split()[:3] == ["op", "0", "1.000"] and lines[-2].split() == ["2", "others", "0.050", "0.3", "%", "5.0", "10.0"]
    assert len(lines) == 4 + 1 + profiling.ROWS + 2


@pytest.mark.parametrize("steps, start, eval_interval, first", [
    (3, 0, 2000, 10), (3, 7, 2000, 17), (3, 0, 12, 12), (2, 0, 12, 10), (10, 0, 10, 10), (3, 0, 11, 11), (1, 0, 1, 10)])
def test_the_profiled_steps_come_after_the_warm_up_and_have_no_evaluation_among_them(steps, start, eval_interval, first):
    assert profiling.first_step(steps, start, 10_000, eval_interval) == first


@pytest.mark.parametrize("changed, words", [
    (dict(profile=11), "profile is 11, but every 10 steps .eval_interval. there is an evaluation.*; expected at most 10"),
    (dict(profile=9, max_iters=12), "profile is 9, but the run ends at step 12 .max_iters.; expected max_iters of at least 19"),
    (dict(profile=1, eval_only=True), "profile is 1, but with eval_only no step is taken; expected 0")])
def test_a_profile_that_cannot_be_is_refused_before_there_is_a_folder(changed, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        tiny.options(tmp_path, **changed)
    with pytest.raises(ValueError, match="profile is -1; expected int, at least 0"):
        train(tiny.options(tmp_path, profile=-1))
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_does_not_profile_again_and_says_if_too_few_steps_are_left(tmp_path, capsys):
    tiny.data(tmp_path)
    train(tiny.options(tmp_path, profile=2))
    Path(tmp_path, "out/trace.json.gz").unlink()
    again = dict(max_iters=22, init_from="resume")
    with pytest.raises(ValueError, match="profile is 2, but the run ends at step 22 .max_iters.; expected max_iters of at least 32"):
        train(tiny.options(tmp_path, profile=2, **again))
    train(tiny.options(tmp_path, **again))
    assert not Path(tmp_path, "out/trace.json.gz").exists() and len(tiny.losses(tmp_path / "out")) == 22


@pytest.mark.parametrize("step", [2, 11])
def test_a_run_that_is_stopped_before_or_while_it_is_profiled_says_that_there_is_no_trace(step, tmp_path, capsys, monkeypatch):
    tiny.data(tmp_path)
    real = training.learning_rate

    def learning_rate(it, o):
        if it == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(it, o)

    monkeypatch.setattr(training, "learning_rate", learning_rate)
    assert train(tiny.options(tmp_path, profile=5)).stopped == signal.SIGTERM
    assert "profile: the run ended before 5 steps were profiled" in capsys.readouterr().out
    assert not (tmp_path / "out/trace.json.gz").exists() and not torch.autograd._profiler_enabled()


def test_a_trace_that_cannot_be_written_is_said_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    tiny.data(tmp_path)

    def full(found, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiling, "write_trace", full)
    assert train(tiny.options(tmp_path, profile=1)).iter_num == 20
    said = capsys.readouterr().out
    assert "WARNING: profile: the trace was not written" in said and "the run ended" not in said


def test_a_trace_that_the_profiler_silently_did_not_write_is_an_error_that_names_its_folder(tmp_path):
    class Full:
        def export_chrome_trace(self, path):
            pass

    with pytest.raises(OSError, match="PyTorch could not write it to .*; TMPDIR names another folder"):
        profiling.write_trace(Full(), tmp_path / "trace.json.gz")
    assert not list(tmp_path.iterdir())


def test_the_benchmark_of_training_profiles_each_variant(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    bench.main(["train", "--model=tiny", "--device=cpu", "--apart=False", "--only=one import,our trainer", "--rounds=1", "--profile=2",
                f"--traces={tmp_path}", f"--json={results}", "--backend=reference"])
    rows = json.loads(results.read_text())["variants"]
    for name, row in rows.items():
        assert dict((op, calls) for op, calls, _ in row["host"])["aten::embedding"] == 2 and row["kernels"] == []
        assert ops_of(tmp_path / f"{name.replace(' ', '-')}-tiny-0.json.gz")["aten::embedding"] == 2 * 2
    assert capsys.readouterr().out.count("host, by op") == 2
    with pytest.raises(ValueError, match="traces is 'x', but no step is profiled"):
        bench.main(["train", "--traces=x"])
