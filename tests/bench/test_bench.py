"""`nanogpt-fast bench` on the smallest model: what it records, that its rivals are what they are called, what it refuses."""
import json
import os
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import data

from nanogpt_fast import bench, cli, options
from nanogpt_fast.bench import common, generate, loss as bench_loss, measure, train

CPU = torch.device("cpu")


def run(tmp_path, *words):
    """The record that one run appends."""
    path = tmp_path / "results.jsonl"
    bench.main([*words, "--device=cpu", f"--json={path}"])
    return json.loads(path.read_text().splitlines()[-1])


def asked(*words):
    return options.parse(generate.BenchGenerateOptions, ["--model=tiny", "--device=cpu", *words], "test")


def config():
    return common.shape_of("tiny", CPU, dropout=0.0)[0]


# ---------------------------------------------------------------------------------------------------------------- training

def test_training_is_timed_variant_by_variant_with_every_sample(tmp_path, capsys):
    record = run(tmp_path, "train", "--apart=False", "--model=tiny", "--only=nanoGPT,one import,our trainer", "--rounds=4", "--steps=2")
    assert record["benchmark"] == "train" and record["against"] == "GPT(backend='reference')"
    assert list(record["variants"]) == ["one import", "our trainer", "nanoGPT"]
    for row in record["variants"].values():
        assert len(row["samples"]) == 4 and row["first_step_s"] > 0
        assert row["tokens_per_s"] == pytest.approx(4 * 32 / statistics.median(row["samples"]))
        assert row["mfu"] is None and row["ops"]["attention"] == "reference"  # a CPU has no peak that we know of
    assert {"torch", "commit", "cpu", "load"} <= record["environment"].keys()
    assert "times nanoGPT" in capsys.readouterr().out


def test_a_real_checkouts_model_runs_beside_ours(tmp_path):
    shutil.copy(Path(__file__).parents[1] / "plain.py", tmp_path / "model.py")
    record = run(tmp_path, "train", "--apart=False", "--model=tiny", "--only=nanoGPT,our trainer", "--rounds=1", f"--upstream={tmp_path}")
    assert record["against"] == "nanoGPT checkout" and record["variants"]["nanoGPT"]["ops"] == {}
    assert str(tmp_path) not in json.dumps(record["options"])


def test_without_a_checkout_nanogpts_side_trains_exactly_as_a_checkouts(tmp_path):
    shutil.copy(Path(__file__).parents[1] / "plain.py", tmp_path / "model.py")
    variant, x = train.Variant(nanogpt=True), torch.randint(65, (4, 32))
    losses = []
    for words in ((), (f"--upstream={tmp_path}",)):
        o = options.parse(train.BenchTrainOptions, ["--model=tiny", *words], "test")
        trainer = train.Trainer(o, variant, common.shape_of("tiny", CPU)[0], 4, CPU, torch.float32)
        losses.append([trainer.step(x, x).item() for _ in range(4)])
    assert losses[0] == losses[1]


def test_a_step_of_several_micro_batches_is_every_variants(tmp_path):
    losses = []
    for variant in (train.Variant(nanogpt=True), train.Variant(), train.Variant(logits=False)):
        o = options.parse(train.BenchTrainOptions, ["--model=tiny"], "test")
        trainer = train.Trainer(o, variant, common.shape_of("tiny", CPU)[0], 4, CPU, torch.float32, accumulation=3)
        x = torch.randint(65, (4, 32), generator=torch.Generator().manual_seed(1))
        losses.append([trainer.step(x, x).item() for _ in range(3)])
    assert losses[0] == losses[1] and losses[2] == pytest.approx(losses[0], rel=1e-6)
    record = run(tmp_path, "train", "--apart=False", "--model=tiny", "--only=one import,our trainer", "--rounds=1", "--accumulation=3")
    assert record["benchmark"] == "train accumulated" and record["options"]["accumulation"] == 3
    for row in record["variants"].values():
        assert row["tokens_per_s"] == pytest.approx(3 * record["shape"]["batch_size"] * record["shape"]["block_size"] / row["samples"][0])


def test_what_was_built_is_timed_when_the_process_is_interrupted(tmp_path, monkeypatch):
    step = train.Trainer.step

    def interrupted(self, x, y):
        if self.ours:  # our trainer's, the second that is built
            raise measure.Interrupted
        return step(self, x, y)

    monkeypatch.setattr(train.Trainer, "step", interrupted)
    record = run(tmp_path, "train", "--apart=False", "--model=tiny", "--only=one import,our trainer,nanoGPT", "--rounds=2")
    assert record["variants"]["one import"]["tokens_per_s"] > 0
    assert record["variants"]["our trainer"] == record["variants"]["nanoGPT"] == {"error": "not measured: ended by a signal"}


def test_a_variant_that_runs_out_of_memory_leaves_the_others_to_be_timed(tmp_path, monkeypatch):
    build = common.build

    def too_large(o, nanogpt, *rest):
        if nanogpt:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(o, nanogpt, *rest)

    monkeypatch.setattr(train, "build", too_large)
    record = run(tmp_path, "train", "--apart=False", "--model=tiny", "--only=nanoGPT,one import", "--rounds=1")
    assert record["variants"]["nanoGPT"] == {"error": "out of memory"}
    assert record["variants"]["one import"]["tokens_per_s"] > 0


# -------------------------------------------------------------------------------------------------------------- generation

def test_generation_is_timed_against_nanogpts_loop_and_a_plain_cache(tmp_path, capsys):
    record = run(tmp_path, "generate", "--model=tiny", "--batch_sizes=1,2", "--tokens=9", "--rounds=2", "--dtype=float32")
    assert record["benchmark"] == "generate" and record["batch_size"] == 2
    assert {"nanoGPT", "plain KV cache", "ours"} <= record["variants"].keys()
    row = record["variants"]["ours"]
    assert len(row["first_samples"]) == len(row["all_samples"]) == 2 and row["tokens_per_s"] > 0 and row["prefill_s"] > 0
    assert "times nanoGPT" in capsys.readouterr().out
    first = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])  # batch 1
    assert len(first["variants"]["ours"]["latency"]) == 8  # of 9 tokens, the first of which is the prefill's


def test_the_plain_cache_computes_what_the_model_does():
    plain = generate.PlainCache(asked(), config(), CPU, torch.float32)
    idx, cache = torch.randint(65, (2, 9)), plain.new_cache(2)
    with torch.no_grad():
        prefill, then = plain.forward(idx[:, :7], 0, cache), [plain.forward(idx[:, [i]], i, cache) for i in (7, 8)]
        for upto, logits in zip((7, 8, 9), (prefill, *then)):
            torch.testing.assert_close(logits, plain.model(idx[:, :upto])[0][:, -1], atol=1e-5, rtol=1e-5)


def test_our_nanogpt_loop_draws_what_a_checkouts_generate_draws(tmp_path):
    shutil.copy(Path(__file__).parents[1] / "plain.py", tmp_path / "model.py")
    idx, drawn = torch.randint(65, (2, 5)), []
    for kind, words in ((generate.NanoGPTLoop, ()), (generate.UpstreamLoop, (f"--upstream={tmp_path}",))):
        side = kind(asked(*words), config(), CPU, torch.float32)
        torch.manual_seed(7)
        drawn.append([token.tolist() for token in side.stream(idx, 6)])
    assert drawn[0] == drawn[1]


def test_the_memory_limit_counts_each_weight_once():
    shape, _ = common.shape_of("gpt2", torch.device("cuda"))
    weights = generate.bytes_a_step(shape, 1, 0, torch.bfloat16)
    assert weights == pytest.approx(2 * 124e6, rel=0.01)
    assert generate.bytes_a_step(shape, 8, 100, torch.bfloat16) - weights == 2 * 2 * 12 * 768 * 100 * 8


# ------------------------------------------------------------------------------------------------------- loss against time

def test_both_sides_fall_to_the_same_loss_on_the_same_text(tmp_path):
    where = data(tmp_path)
    record = run(tmp_path, "loss", "--model=tiny", f"--data={where['dataset']}", f"--data_dir={where['data_dir']}",
                 "--steps=30", "--eval_interval=15", "--eval_iters=2")
    nanogpt, ours = record["curves"]["nanoGPT"], record["curves"]["ours"]
    assert [row["step"] for row in ours] == [0, 15, 30]
    assert [row["val_loss"] for row in ours] == pytest.approx([row["val_loss"] for row in nanogpt], abs=1e-3)
    assert ours[-1]["val_loss"] < ours[0]["val_loss"] - 0.1
    assert 0 == ours[0]["seconds"] < ours[1]["seconds"] < ours[2]["seconds"]
    assert record["untimed"]["steps"] == 0


def test_the_clock_of_a_loss_curve_begins_behind_its_untimed_steps_and_what_was_measured_is_written(tmp_path, monkeypatch):
    class Side(bench_loss.Side):
        def __init__(self, trainer, batches, untimed=0):
            super().__init__(trainer, batches, untimed=5)
            step = trainer.step

            def slow(x, y):     # the first five take a second together
                time.sleep(0.2 if self.steps < 5 else 0)
                self.steps += 1
                return step(x, y)
            self.steps, trainer.step = 0, slow

        def evaluate(self, step, *args):
            if step == 9:
                raise measure.Interrupted
            return super().evaluate(step, *args)
    monkeypatch.setattr(bench_loss, "Side", Side)
    where = data(tmp_path)
    path = tmp_path / "ended.jsonl"
    bench.main(["loss", "--device=cpu", "--model=tiny", f"--data={where['dataset']}", f"--data_dir={where['data_dir']}", "--steps=12",
                "--eval_interval=3", "--eval_iters=1", f"--json={path}"])
    record = json.loads(path.read_text())
    for name, curve in record["curves"].items():
        assert [row["step"] for row in curve] == [0, 3, 6] and curve[1]["seconds"] == 0
        assert 0 < curve[2]["seconds"] < record["untimed"]["seconds"][name] and record["untimed"]["seconds"][name] > 1


# ---------------------------------------------------------------------------------------------------------- what it refuses

@pytest.mark.parametrize("words, text", [
    (["sing"], "no benchmark 'sing'; there are train, generate, loss"),
    (["train", "--only=fast", "--device=cpu"], "leaves none of: nanoGPT compiled; one import"),
    (["train", "--upstream=/nowhere"], "there is no model.py"),
    (["train", "--model=gpt5"], "gpt5"),
    (["generate", "--model=tiny", "--prompt=30", "--device=cpu"], "context of tiny is 32 tokens; expected at most 28"),
])
def test_what_cannot_be_is_named(words, text):
    with pytest.raises(ValueError, match=text):
        bench.main(words)


def test_without_a_word_it_says_what_there_is(capsys):
    assert bench.main([]) is None
    assert "bench generate" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- the timing

def test_variants_take_turns_and_none_runs_twice_before_all_have_run():
    order = []
    samples = measure.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=20, warmup=1)
    assert {name: len(values) for name, values in samples.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = [tuple(order[i:i + 3]) for i in range(3, len(order), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(set(rounds)) > 2


def test_when_time_is_up_no_further_round_begins_but_the_first_one_runs():
    assert len(measure.interleaved({"a": lambda: None}, rounds=9, until=0.0)["a"]) == 1


def test_the_draw_of_the_rivals_is_nanogpts():
    logits = torch.randn(3, 400)
    torch.manual_seed(3)
    found = generate.draw_as_nanogpt(logits)
    scaled = logits / 0.8
    scaled[scaled < scaled.topk(200).values[:, -1:]] = float("-inf")
    torch.manual_seed(3)
    assert torch.equal(found, torch.multinomial(F.softmax(scaled, dim=-1), 1))


def test_what_was_timed_is_kept_when_the_process_is_interrupted():
    def work(calls=iter(range(100))):
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with measure.sigterm_raises():
        assert len(measure.interleaved({"a": work}, rounds=99, warmup=0)["a"]) == 5
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_trainers_variations_are_asked_for_by_name():
    """A comma separates words of --only, so no name has one."""
    every = train.TRAIN_VARIANTS | train.TRAIN_VARIANTS_GPU | train.TRAIN_VARIANTS_CPU
    assert not any("," in name for name in every)
    o = options.parse(train.BenchTrainOptions, ["--only=our trainer,trainer with"], "test")
    assert common.wanted(o, train.TRAIN_VARIANTS | train.TRAIN_VARIANTS_GPU) == ["our trainer", *train.TRAIN_VARIANTS_GPU]


@pytest.mark.parametrize("name", ["only", "rounds", "minutes"])
def test_bench_loss_refuses_what_only_the_timing_benchmarks_obey(name, capsys):
    assert cli.main(["bench", "loss", f"--{name}=1"]) == 2
    assert f"unknown option --{name}" in capsys.readouterr().err
