"""The training loop: nanoGPT's options, schedule and steps; evaluation, logging, and what stops a run."""
import collections
import dataclasses
import io
import math
import os
import pickle
import re
import signal
import sys

import numpy as np
import pytest
import tiny
import torch

from nanogpt_fast import GPT, GPTConfig, devices, options
from nanogpt_fast.checkpoints.nanogpt import load_model
from nanogpt_fast.commands.sampling import SampleOptions
from nanogpt_fast.text import prepare, tokens
from nanogpt_fast.text.batches import Batches
from nanogpt_fast.training import start, trainer as training
from nanogpt_fast.training.trainer import NonFiniteLoss, TrainOptions, learning_rate, split_backend, train


@pytest.fixture
def folder(tmp_path):
    tiny.data(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------- options and schedule

NANOGPT = dict(  # train.py of November 2025
    out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True,
    init_from="scratch", wandb_log=False, wandb_project="owt", wandb_run_name="gpt2", dataset="openwebtext",
    gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False,
    learning_rate=6e-4, max_iters=600000, weight_decay=1e-1,
    beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5)


def test_every_key_of_nanogpt_has_its_default():
    ours = dataclasses.asdict(TrainOptions())
    assert {key: ours.get(key, "missing") for key in NANOGPT} == NANOGPT
    assert {"backend", "device", "dtype", "compile"} <= set(ours)  # there nanoGPT's default is a machine's, ours is to look


def test_a_config_file_in_nanogpts_style_works(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("import time\nout_dir = 'out-x'\nwandb_run_name = 'ft-' + str(time.time())\nbatch_size = 12\n"
                      "gradient_accumulation_steps = 5 * 8\ninit_from = 'gpt2-xl' # the largest\nlearning_rate = 1\n"
                      "decay_lr = False\ndevice = 'cpu'\ncompile = False\n")
    o = options.parse(TrainOptions, [str(config), "--batch_size=3", "--dropout", "0.5", "--compile"], "train")
    assert (o.out_dir, o.batch_size, o.gradient_accumulation_steps, o.init_from) == ("out-x", 3, 40, "gpt2-xl")
    assert (o.learning_rate, o.decay_lr, o.dropout, o.compile) == (1.0, False, 0.5, True)


def test_a_config_file_may_compute_its_numbers_and_have_names_of_its_own(tmp_path, capsys):
    """Each line is one that nanoGPT trains with; its configurator takes a file's globals as they are."""
    config = tmp_path / "config.py"
    config.write_text("total_iters = 25\nnum_iters = 10\ndevice_type = 'cpu'\nmax_iters = 2e1\nlr_decay_iters = total_iters * 0.9\n"
                      "warmup_iters = max_iters / 8\neval_interval = max_iters / 2\nwandb_log = 0\n")
    o = options.parse(TrainOptions, [str(config)], "train")
    assert (o.max_iters, o.lr_decay_iters, o.warmup_iters, o.eval_interval, o.wandb_log) == (20, 22.5, 2.5, 10, False)
    assert capsys.readouterr().err == ""
    assert learning_rate(0, o) == o.learning_rate / 3.5 and learning_rate(23, o) == o.min_lr
    sampled = options.parse(SampleOptions, [str(config), "--top_k=3"], "sample")   # a training config given to sample
    assert sampled.top_k == 3 and capsys.readouterr().err == ""


@pytest.mark.parametrize("word, complaint", [
    ("--n_head=5", "n_embd"), ("--dropout=1.5", "dropout"), ("--block_size=0", "block_size"),
    ("--learning_rat=1", "learning_rate"), ("--batch_size=two", "batch_size"),
    ("--eval_interval=0", "eval_interval"), ("--compile=maybe", "compile"),
    ("--backend=fast", "nccl"), ("--backend=nccl,gloo", "nccl"), ("--dtype=float64", "dtype"), ("--device=tpu9", "device")])
def test_an_option_that_cannot_be_is_named(word, complaint, folder):
    with pytest.raises(ValueError, match=complaint):
        train(options.parse(TrainOptions, tiny.words(tiny.options(folder)) + [word], "train"))


@pytest.mark.parametrize("spec, expected", [
    ("auto", (None, None)), ("nccl", ("nccl", None)), ("gloo", ("gloo", None)), ("reference", (None, "reference")),
    ("gloo,reference", ("gloo", "reference")), ("gloo,fused,attention=reference", ("gloo", "fused,attention=reference"))])
def test_backend_names_the_ops_or_what_connects_the_ranks_or_both(spec, expected):
    assert split_backend(spec) == expected


def test_the_learning_rate_warms_up_and_decays_as_a_cosine():
    o = TrainOptions(learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, lr_decay_iters=1100)
    assert learning_rate(0, o) == 1e-3 * 1 / 101
    assert learning_rate(99, o) == 1e-3 * 100 / 101
    assert learning_rate(100, o) == 1e-3
    assert learning_rate(600, o) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(350, o) == pytest.approx(1e-4 + 9e-4 * (0.5 + math.sqrt(0.125)))  # cos(pi/4)
    assert learning_rate(1100, o) == learning_rate(5000, o) == 1e-4
    assert learning_rate(600, dataclasses.replace(o, decay_lr=False)) == 1e-3
    assert learning_rate(100, dataclasses.replace(o, lr_decay_iters=100)) == 1e-4  # no division by zero where the two meet


# ---------------------------------------------------------------------------------------------------- the loop

def test_a_step_is_nanogpts_step_bit_for_bit(folder):
    o = tiny.options(folder, max_iters=6, gradient_accumulation_steps=2, dropout=0.2, grad_clip=0.3, bias=True,
                     weight_decay=0.5)
    train(o)

    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=16, vocab_size=tiny_vocab(folder), n_layer=2, n_head=2, n_embd=32, dropout=0.2, bias=True),
                backend="reference")
    tokens = Batches(folder / "data" / "sums", "train", 4, 16).tokens.astype("int64")

    def get_batch():
        ix = torch.randint(len(tokens) - 16, (4,))
        return [torch.stack([torch.from_numpy(tokens[i + shift:i + shift + 16]) for i in ix.tolist()]) for shift in (0, 1)]

    optimizer = model.configure_optimizers(0.5, 1e-2, (0.9, 0.95), "cpu")
    expected = {}
    x, y = get_batch()
    for it in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(it, o)
        total = 0.0
        for _ in range(2):
            loss = model(x, y)[1] / 2
            x, y = get_batch()  # after the forward pass, before the backward: the order of the draws is nanoGPT's
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        expected[it] = total.item()
    assert tiny.losses(o) == expected


def tiny_vocab(folder):
    return prepare.load_tokenizer(folder / "data" / "sums").vocab_size


def test_a_run_learns_and_leaves_its_metrics_its_picture_and_its_checkpoints(folder, capsys):
    o = tiny.options(folder, max_iters=35, sample_tokens=20)
    result = train(o)
    assert sorted(p.name for p in result.out_dir.iterdir()) == ["ckpt.pt", "last.pt", "loss.png", "metrics.jsonl", "run.json"]
    assert (result.out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(tiny.losses(o)) == list(range(35))
    evaluations = tiny.evaluations(o)
    assert list(evaluations) == [0, 10, 20, 30, 35]  # at 0, at every interval, and of the final weights
    assert evaluations[0][1] == pytest.approx(math.log(tiny_vocab(folder)), abs=0.2)
    assert result.val_loss == evaluations[35][1] < evaluations[0][1] - 0.5
    assert result.best_val_loss == min(val for _, val in evaluations.values())
    printed = capsys.readouterr().out
    for word in ("device  cpu", "float32", "= 64 tokens", "attention", "iter 34: loss", "ETA", "tok/s",
                 "step 35: train loss", "    | "):
        assert word in printed
    first = next(row for row in tiny.rows(o) if "loss" in row)
    assert set(first) == {"iter", "loss", "lr", "ms_per_step", "tokens_per_s"} and "mfu" not in printed     # nobody knows this CPU's peak


def test_the_utilisation_is_that_of_this_machines_peak(folder, capsys, monkeypatch):
    monkeypatch.setattr(devices, "peak_flops", lambda device: 5e8)     # so slow that a row's seven places are precise
    o = tiny.options(folder, max_iters=2)
    model = train(o).model
    for row in (row for row in tiny.rows(o) if "loss" in row):
        assert row["mfu"] == pytest.approx(model.flops_per_token() * 64 / (row["ms_per_step"] / 1e3) / 5e8, rel=1e-3)
    printed = float(re.findall(r"mfu ([\d.]+)%, ", capsys.readouterr().out)[-1])
    assert printed == pytest.approx(row["mfu"] * 100, abs=0.00501)


def test_the_banner_is_short_for_who_wants_it_short(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for verbose in (False, True):
        train(tiny.options(folder, max_iters=0, verbose=verbose))
        banner = capsys.readouterr().out.split("device  ")[1].split("step 0:")[0]
        first = [line.split()[0] for line in banner.split("time    ")[0].splitlines()[1:]]
        assert first == ["threads", "model", "step", "writes"] if not verbose else {"memory", "graphs", "ops"} < set(first)


def test_the_demo_is_short_unless_it_is_told_and_its_settings_can_be_changed(folder, monkeypatch):
    from nanogpt_fast.commands import demo
    asked = []
    monkeypatch.setattr(demo, "train", lambda o: asked.append(o) or training.TrainResult(None, folder, 0, 1.0, None, None, signal.SIGINT))
    assert demo.main(["--device=cpu"]) == demo.main(["--device=cpu", "--verbose", "--max_iters=7", "--data=my.txt"]) == 130
    assert [(o.verbose, o.max_iters, o.lr_decay_iters, o.dataset, o.n_layer, o.n_embd, o.out_dir) for o in asked] == [
        (False, 2000, 2000, "embedded", 4, 128, "out-demo"), (True, 7, 7, "my.txt", 4, 128, "out-demo")]


def test_a_run_without_steps_says_that_it_writes_no_weights(folder, capsys):
    o = tiny.options(folder, max_iters=0)
    assert training.run(tiny.words(o)) == 0
    printed = capsys.readouterr().out
    assert "no step was taken and no weights are written" in printed and "Weights, metrics.jsonl" not in printed
    assert not list((folder / "out").glob("*.pt"))


def test_looking_at_a_run_does_not_change_it(folder):
    seldom = tiny.options(folder, "a", eval_interval=1000, max_iters=12, dropout=0.3)
    often = tiny.options(folder, "b", eval_interval=3, max_iters=12, dropout=0.3, eval_iters=5, sample_tokens=7)
    train(seldom), train(often)
    assert tiny.losses(seldom) == tiny.losses(often)


def test_the_same_batches_are_evaluated_each_time(folder):
    o = tiny.options(folder, learning_rate=0.0, min_lr=0.0, max_iters=20)
    train(o)
    assert len(set(tiny.evaluations(o).values())) == 1


def test_two_micro_batches_of_two_are_a_batch_of_four(folder):
    whole = tiny.options(folder, "a", max_iters=10)
    halves = tiny.options(folder, "b", max_iters=10, batch_size=2, gradient_accumulation_steps=2)
    train(whole), train(halves)
    for a, b in zip(tiny.losses(whole).values(), tiny.losses(halves).values(), strict=True):
        assert a == pytest.approx(b, abs=1e-4)  # fp32 sums in another order, ten AdamW steps: 2e-6 seen


def test_only_the_best_checkpoint_is_kept_unless_always_is_asked_for(folder):
    saved = {}
    for always in (True, False):
        # A learning rate that wrecks the model after ten good steps: the best is at 10.
        o = tiny.options(folder, f"{always}", decay_lr=False, learning_rate=3e-3, max_iters=10, always_save_checkpoint=always)
        train(o)
        train(dataclasses.replace(o, init_from="resume", learning_rate=3.0, max_iters=20))
        val = {it: val for it, (_, val) in tiny.evaluations(o).items()}
        assert val[20] > val[10]
        saved[always] = torch.load(folder / f"{always}" / "ckpt.pt", weights_only=True)
        assert saved[always]["best_val_loss"] == val[10]
    assert (saved[True]["iter_num"], saved[False]["iter_num"]) == (20, 10)


def test_eval_only_evaluates_once_and_writes_no_checkpoint(folder):
    o = tiny.options(folder, eval_only=True)
    result = train(o)
    assert result.val_loss > 0 and tiny.losses(o) == {} and not list(result.out_dir.glob("*.pt"))
    trained = tiny.options(folder, "trained")
    val = train(trained).val_loss
    again = train(dataclasses.replace(trained, init_from="resume", eval_only=True))
    assert again.val_loss == val and again.iter_num == 20


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_learns_and_float16_scales_its_gradients(dtype, folder):
    o = tiny.options(folder, dtype=dtype, max_iters=20)
    train(o)
    losses = tiny.losses(o)
    assert losses[19] < losses[0] - 0.3
    scaler = torch.load(folder / "out" / "last.pt", weights_only=True)["resume"]["scaler"]
    assert bool(scaler) == (dtype == "float16")


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_steps(folder):
    eager, compiled = tiny.options(folder, "a", max_iters=5), tiny.options(folder, "b", max_iters=5, compile=True)
    train(eager), train(compiled)
    for a, b in zip(tiny.losses(eager).values(), tiny.losses(compiled).values(), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert not any("_orig_mod" in name for name in torch.load(folder / "b" / "ckpt.pt", weights_only=True)["model"])


def test_gpt2_weights_are_fine_tuned_at_a_shorter_context(folder):
    transformers = pytest.importorskip("transformers")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=2)
                                 ).save_pretrained(folder / "small-gpt2")
    o = tiny.options(folder, init_from=str(folder / "small-gpt2"), max_iters=10)
    result = train(o)
    assert result.model.config.block_size == 16
    saved = torch.load(folder / "out" / "ckpt.pt", weights_only=True)
    assert saved["model_args"]["block_size"] == 16 and saved["model_args"]["n_embd"] == 32
    assert saved["model"]["transformer.wpe.weight"].shape == (16, 32)


# ---------------------------------------------------------------------------------------------------- what a person sees

class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_with_step_loss_validation_speed_and_time_left(folder, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    train(tiny.options(folder))
    last = screen.getvalue().split("\r")[-1] if "ETA" in screen.getvalue().split("\r")[-1] else [
        part for part in screen.getvalue().split("\r") if "ETA" in part][-1]
    for word in ("/20", "loss ", "val ", "tok/s", "ETA"):
        assert word in last


def test_a_text_sample_is_that_of_its_seed_and_touches_no_generator_of_the_process(folder, monkeypatch):
    tokenizer = prepare.load_tokenizer(folder / "data" / "sums")
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32))
    o, cpu = tiny.options(folder, sample_tokens=50), torch.device("cpu")
    torch.manual_seed(o.seed)
    ids = model.eval().generate(torch.tensor([tokenizer.encode("\n")]), 50, temperature=0.8, top_k=200)
    before = torch.get_rng_state()
    for name in ("manual_seed", "set_rng_state"):                # another thread may draw meanwhile
        monkeypatch.setattr(torch, name, lambda *args: pytest.fail("the global generator is set"))
    assert training.sample_text(model, tokenizer, o, cpu, devices.autocast(cpu, torch.float32)) == tokenizer.decode(ids[0, 1:].tolist())
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_leave_out_the_padding_of_the_vocabulary(folder):
    tokenizer = prepare.load_tokenizer(folder / "data" / "sums")
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.vocab_size + 100, n_layer=1, n_head=2, n_embd=32))
    o = tiny.options(folder, sample_tokens=50)
    text = training.sample_text(model, tokenizer, o, torch.device("cpu"), devices.autocast(torch.device("cpu"), torch.float32))
    assert 0 < len(text) < 50


def test_tensorboard_gets_what_the_metrics_get(folder):
    pytest.importorskip("tensorboard")
    o = tiny.options(folder, tensorboard=True, max_iters=3)
    train(o)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "out" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(list(tiny.losses(o).values()))
    assert [event.step for event in events.Scalars("val_loss")] == [0, 3]


def test_a_logger_that_is_not_installed_is_named_before_training(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="pip install wandb"):
        train(tiny.options(folder, wandb_log=True))


# ---------------------------------------------------------------------------------------------------- what stops a run

def test_a_loss_that_is_no_number_stops_the_run_and_says_where_and_what_to_try(folder):
    o = tiny.options(folder, max_iters=10)
    train(o)
    before = (folder / "out" / "last.pt").read_bytes()
    with pytest.raises(NonFiniteLoss) as caught:
        train(dataclasses.replace(o, init_from="resume", max_iters=30, decay_lr=False, learning_rate=1e30, grad_clip=0.0))
    step = max(tiny.losses(o)) + 1
    text = str(caught.value)
    assert all(part in text for part in (f"step {step}: the loss is nan", "seed 1337", "--learning_rate", "--grad_clip"))
    starts = [int(word) for word in text.split("tokens ")[1].split(". ")[0].split(", ")]
    assert len(starts) == 4  # the windows of the batch
    assert (folder / "out" / "last.pt").read_bytes() == before


def test_missing_data_is_named(folder):
    with pytest.raises(FileNotFoundError, match="no-such-data"):
        train(tiny.options(folder, dataset="no-such-data"))


def test_a_bad_id_that_the_check_finds_late_ends_the_run_at_the_next_step(folder, monkeypatch):
    class Slow(tokens.TokenCheck):
        waits = 0

        def wait(self, seconds=None):
            Slow.waits += 1
            if Slow.waits == 4:     # after the wait before the run, and those of steps 0 and 1
                raise tokens.bad_id("val.bin", 65, 7, 65)
    monkeypatch.setattr(training, "TokenCheck", Slow)
    with pytest.raises(ValueError, match="val.bin holds token 65 at position 7"):
        train(tiny.options(folder))
    assert sorted(tiny.losses(folder / "out")) == [0, 1] and not (folder / "out/last.pt").exists()


def test_a_split_shorter_than_a_block_is_a_clear_error(folder):
    tiny.data(folder, "short", "abcdefgh" * 20)
    with pytest.raises(ValueError, match="block_size 16"):
        train(tiny.options(folder, dataset="short"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that must be missing")
def test_a_device_that_is_not_there_is_named(folder):
    with pytest.raises(RuntimeError, match="device=cuda"):
        train(tiny.options(folder, device="cuda"))


def test_a_text_of_ones_own_is_prepared_and_trained_on(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "mine.txt").write_text(tiny.TEXT)
    o = tiny.options(folder, dataset=str(folder / "mine.txt"), max_iters=2)
    assert train(o).iter_num == 2 and (folder / "data" / "mine" / "train.bin").exists()


def metas(chars):
    """What meta.pkl files hold that nanoGPT trains with, by name: (the dict, the model's vocabulary, whether text samples are drawn)."""
    V, stoi, itos = len(chars), {c: i for i, c in enumerate(chars)}, dict(enumerate(chars))
    whole = dict(vocab_size=V, stoi=stoi, itos=itos)
    marked = [*chars, "<pad>"]
    return {
        "nanoGPT's own": (whole, V, True),
        "vocab_size alone": (dict(vocab_size=V), V, False),
        "words": (dict(vocab_size=V, stoi={f"word{i}": i for i in range(V)}, itos={i: f"word{i}" for i in range(V)}), V, False),
        "a mark": (dict(vocab_size=V + 1, stoi={c: i for i, c in enumerate(marked)}, itos=dict(enumerate(marked))), V + 1, True),
        "padded": ({**whole, "vocab_size": V + 200}, V + 200, True),
        "NumPy's integers": (dict(vocab_size=np.int64(V), stoi={c: np.int32(i) for c, i in stoi.items()}, itos=itos), V, True),
        "NumPy's strings": (dict(vocab_size=np.uint16(V), itos={i: np.str_(c) for i, c in itos.items()}), V, True),
        "itos as a list": ({**whole, "itos": list(chars)}, V, True),
        "ordered": (collections.OrderedDict(vocab_size=V, stoi=collections.OrderedDict(stoi), itos=collections.OrderedDict(itos)), V, True),
        "stoi alone": (dict(vocab_size=V, stoi=stoi), V, True),
        "a tokenizer's object": (dict(vocab_size=V, tokenizer=tiny.TEXT, kind=collections.UserDict(a=1)), V, False),
        "parts that disagree": ({**whole, "itos": {i: "x" for i in range(V)}}, V, False)}


@pytest.mark.parametrize("protocol", [2, pickle.DEFAULT_PROTOCOL])
@pytest.mark.parametrize("name", metas("ab"))
def test_every_meta_pkl_that_nanogpt_trains_with_gives_its_vocabulary(name, protocol, folder, capsys):
    place = folder / "data" / "sums"
    chars = list(prepare.load_tokenizer(place).stoi)
    meta, expected, sampled = metas(chars)[name]
    (place / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    vocab_size, tokenizer = start.load_vocabulary(place)
    assert vocab_size == expected and type(vocab_size) is int
    printed = capsys.readouterr().out
    assert (tokenizer is not None) == sampled and printed.count("no text samples: ") == (not sampled)
    if sampled:
        assert tokenizer.decode(tokenizer.encode(tiny.TEXT[:50])) == tiny.TEXT[:50]


@pytest.mark.parametrize("name", ["vocab_size alone", "padded", "a mark"])
def test_a_run_with_such_a_meta_pkl_trains_and_its_checkpoint_is_sampled_where_there_is_a_tokenizer(name, folder, capsys, monkeypatch):
    place = folder / "data" / "sums"
    meta, expected, sampled = metas(list(prepare.load_tokenizer(place).stoi))[name]
    (place / "meta.pkl").write_bytes(pickle.dumps(meta))
    o = tiny.options(folder, max_iters=2, eval_interval=1, eval_iters=1, sample_tokens=60)
    assert train(o).model.config.vocab_size == expected
    printed = capsys.readouterr().out
    assert printed.count("no text samples: ") == (not sampled) and ("    | " in printed) == sampled
    monkeypatch.chdir(folder)
    tokenizer, meta = load_model(o.out_dir)[1:]
    assert (tokenizer is not None) == sampled
    assert sampled or "neither stoi nor itos" in meta["no_tokenizer"]


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


@pytest.mark.parametrize("meta", [dict(vocab_size=Exploit()), dict(vocab_size=65, stoi=Exploit()), Exploit()], ids=["size", "stoi", "whole"])
def test_a_meta_pkl_that_would_run_code_runs_none(meta, folder, monkeypatch, capsys):
    place = folder / "data" / "sums"
    (place / "meta.pkl").write_bytes(pickle.dumps(meta))
    monkeypatch.chdir(folder)
    if isinstance(meta, dict) and "stoi" in meta:
        assert start.load_vocabulary(place) == (65, None)
        assert "refused: it imports posix.system" in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match="meta.pkl: refused: it imports posix.system"):
            start.load_vocabulary(place)
    assert not (folder / "exploited").exists()
