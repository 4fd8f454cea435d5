"""What comes from a file is checked before anything computes with it: altered.py, and single alterations by name."""
import contextlib
import dataclasses
import decimal
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import altered
import kills
import numpy as np
import pytest
import tiny
import torch

from nanogpt_fast import GPT, GPTConfig, classic
from nanogpt_fast.checkpoints import convert, nanogpt as checkpoints, state
from nanogpt_fast.checkpoints.nanogpt import CheckpointError, load_model, read
from nanogpt_fast.training import progress
from nanogpt_fast.training.trainer import train

ARGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=False, vocab_size=30, dropout=0.0)


@pytest.fixture
def draws_nothing(monkeypatch):
    monkeypatch.setattr(progress, "draw", kills.quick_draw)


@contextlib.contextmanager
def one_thread():
    """The tensors here are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def test_60_altered_runs_give_a_clear_error_or_a_right_run(tmp_path, draws_nothing):
    with one_thread():
        bases = altered.Bases(tmp_path)
        wrong = [f"{number}: {what}: {fault}" for number in range(60) for what, fault in [bases.wrong(number)] if fault]
    assert not wrong, "\n".join(wrong)


def test_60_altered_sources_of_convert_give_a_clear_error_or_a_right_model(tmp_path):
    pytest.importorskip("safetensors")
    with one_thread():
        sources = altered.Sources(tmp_path)     # 711, 714 and 720 gave a traceback or no file name once
        wrong = [f"{number}: {what}: {fault}" for number in range(700, 760) for what, fault in [sources.wrong(number)] if fault]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="altered forks")
@pytest.mark.parametrize("what", ["runs", "sources"])
def test_2000_altered_files_crash_hang_or_trace_back_none(what, tmp_path):
    done = subprocess.run([sys.executable, altered.__file__, str(tmp_path), what, "2000", "60"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(altered.__file__).parents[1]), *sys.path])})
    assert done.returncode == 0 and "2000 alterations, 0 wrong" in done.stdout, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------- the archive

def saved(path, **changed):
    """A minimal checkpoint of nanoGPT, some entries changed, at the path."""
    model = GPT(GPTConfig(**ARGS))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    contents = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=ARGS, iter_num=7, best_val_loss=1.5, config={})
    torch.save({**contents, **changed}, path)
    return path


@pytest.mark.parametrize("number", [np.float64(2.5), np.float32(2.5), np.int64(2)])
def test_numpys_numbers_are_read_as_pythons(number, tmp_path):
    found = read(saved(tmp_path / "ckpt.pt", best_val_loss=number, note=[number]))
    assert found["best_val_loss"] == found["note"][0] == number and type(found["note"][0]) in (int, float)


SCALAR = np.float64(0).__reduce__()[0]


@pytest.mark.parametrize("call", [(np.dtype, "f8,O"), (SCALAR, np.dtype("f8,O"), b"\1" * 16), (SCALAR, np.dtype("O"), b"\1" * 8),
                                  (SCALAR, np.dtype("f8"), b"\1" * 7), (SCALAR, np.dtype("f8"), 3), (SCALAR, 3, b"\1" * 8),
                                  (SCALAR, np.dtype("U2"), b"\1" * 8)], ids=lambda call: " ".join(map(str, call[1:])))
def test_no_other_numpy_object_is_made(call, tmp_path):
    with pytest.raises(CheckpointError, match="a NumPy scalar other than|best_val_loss is a _Dtype"):
        read(saved(tmp_path / "ckpt.pt", best_val_loss=altered.Reduced(*call)))


def rewritten(path, compression=zipfile.ZIP_STORED, data=None):
    with zipfile.ZipFile(path) as z:
        members = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, content in members.items():
            z.writestr(name, data if data is not None and name.endswith("data.pkl") else content)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    rewritten(saved(tmp_path / "ckpt.pt"), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed, which torch.save never does"):
        read(tmp_path / "ckpt.pt")


def test_tuples_so_deep_that_their_hash_would_crash_are_refused(tmp_path):
    rewritten(saved(tmp_path / "ckpt.pt"), data=b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.")
    with pytest.raises(CheckpointError, match="tuples lie in it more than 50 deep"):
        read(tmp_path / "ckpt.pt")


# ---------------------------------------------------------------------------------------------------- the model

@pytest.mark.parametrize("name, value, message", [
    ("n_layer", 2 ** 70, "n_layer is 1180591620717411303424; expected"), ("n_layer", 2 ** 40, "n_layer is 1099511627776, and there are"),
    ("n_layer", 2.0, "n_layer is 2.0; expected a whole number"), ("n_embd", True, "n_embd is True"), ("bias", 1, "bias is 1; expected"),
    ("n_head", 0, "n_head is 0"), ("n_head", altered.laughs(), "n_head is a list"), ("n_head", "2" * 10 ** 6, "n_head is '2222"),
    ("dropout", torch.nan, "dropout is nan"), ("activation", ["gelu"], "activation is a list"),
    ("vocab_size", 2 ** 50, "require .1125899906842624, 16.")])
def test_sizes_are_compared_with_the_weights_before_a_model_is_built(name, value, message, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "GPT", None)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(saved(tmp_path / "ckpt.pt", model_args={**ARGS, name: value}))
    assert str(tmp_path / "ckpt.pt") in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("change, message", [
    (lambda t: t.to(torch.int64), "is int64; expected float32 or"), (lambda t: t * torch.nan, "holds nan or infinity"),
    (lambda t: torch.ones(1).expand(t.shape), "has fewer numbers in the file than its shape says"),
    (lambda t: t.tolist(), "is a list, not a tensor"),
    (lambda t: t.to_sparse(), "is sparse or without data"), (lambda t: t.to("meta"), "is sparse or without data")])
def test_a_weight_that_cannot_be_computed_with_is_named(change, message, tmp_path):
    model = GPT(GPTConfig(**ARGS)).state_dict()
    name = "transformer.h.1.mlp.c_fc.weight"
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        load_model(saved(tmp_path / "ckpt.pt", model={**model, name: change(model[name])}))


def test_two_weights_of_one_plain_name_are_refused(tmp_path):
    model = GPT(GPTConfig(**ARGS)).state_dict()
    with pytest.raises(CheckpointError, match="two weights of the name transformer.ln_f.weight"):
        load_model(saved(tmp_path / "ckpt.pt", model={**model, "_orig_mod.transformer.ln_f.weight": torch.zeros(16)}))


@pytest.mark.parametrize("config", [dict(n_layer=2 ** 60), dict(vocab_size=2 ** 60), dict(n_embd=[]), dict(activation=altered.laughs())])
def test_a_classic_checkpoint_is_compared_before_its_model_is_built(config, tmp_path):
    torch.manual_seed(0)
    contents = classic.contents(classic.ClassicGPT(classic.ClassicConfig(vocab_size=30, block_size=8, n_layer=2, n_head=2, n_embd=16)))
    torch.save({**contents, "config": {**contents["config"], **config}}, tmp_path / "classic.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of a classic model"):
        classic.load_checkpoint(tmp_path / "classic.pt", device="cpu")


# ---------------------------------------------------------------------------------------------------- the optimizer

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, its optimizer after a step)"""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**ARGS))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    idx = torch.arange(16).view(2, 8)
    model(idx, idx)[1].backward()
    optimizer.step()
    return model, optimizer


def moment(change, name="exp_avg_sq"):
    def altered_state(state):
        one = state["state"][2]
        return {**state, "state": {**state["state"], 2: {**one, name: change(one[name])}}}
    return altered_state


def group(**changed):
    return lambda state: {**state, "param_groups": [{**state["param_groups"][0], **changed}, *state["param_groups"][1:]]}


@pytest.mark.parametrize("change, message", [
    (moment(lambda t: t[:-1]), r"exp_avg_sq of tensor 2 has shape \(47, 16\), and its parameter \(48, 16\)"),
    (moment(lambda t: -t - 1), "exp_avg_sq of tensor 2 holds a negative square"), (moment(lambda t: t.bool()), "is bool; expected float32"),
    (moment(lambda t: t + torch.inf, "exp_avg"), "exp_avg of tensor 2 holds nan or infinity"),
    (moment(lambda t: torch.empty(0), "step"), "step of tensor 2 is a tensor of shape"),
    (moment(lambda t: t - 9, "step"), "step of tensor 2 is a tensor"),
    (group(amsgrad=True), "amsgrad is True"), (group(betas=(0.9, 1.0)), "betas is a tuple"), (group(betas=0.9), "betas is 0.9"),
    (group(eps=-1.0), "eps is -1.0"), (group(params=[0, 0]), "a parameter is in it twice"), (group(params="01"), "expected a dict of"),
    (lambda state: {**state, "state": {i: one for i, one in state["state"].items() if i}}, "moments of 14 of 15 tensors"),
    (lambda state: {**state, "state": {**state["state"], 77: {}}}, "a parameter that no group has"),
    (lambda state: [state], "expected a dict of")])
def test_an_optimizer_state_that_adamw_cannot_go_on_from_is_refused(trained, change, message):
    model, optimizer = trained
    with pytest.raises(CheckpointError, match=f"ckpt.pt: its optimizer state .*{message}"):
        checkpoints.load_optimizer(optimizer, change(optimizer.state_dict()), "ckpt.pt")


@pytest.mark.parametrize("change", [lambda t: torch.stack((t, t), -1)[..., 0], lambda t: t.t().contiguous().t(), lambda t: t.double(),
                                    torch.nn.Parameter])
def test_moments_laid_out_otherwise_in_the_file_take_the_same_steps(trained, change):
    state, idx, after = trained[1].state_dict(), torch.arange(16).view(2, 8), []
    for altered_state in (state, moment(change)(moment(change, "exp_avg")(state))):
        model = GPT(GPTConfig(**ARGS))
        model.load_state_dict(trained[0].state_dict())
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        own = {i: {name: t.clone() for name, t in one.items()} for i, one in altered_state["state"].items()} if altered_state is state \
            else altered_state["state"]
        checkpoints.load_optimizer(optimizer, {**altered_state, "state": own}, "ckpt.pt")
        model(idx, idx)[1].backward()
        optimizer.step()
        after.append(altered.weights(model))
    assert altered.equal(*after)


def test_two_moments_of_one_memory_are_taken_apart(trained):
    model, optimizer = GPT(GPTConfig(**ARGS)), None
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    state = trained[1].state_dict()
    shared = state["state"][2]["exp_avg_sq"].clone()
    state = moment(lambda t: shared, "exp_avg")(moment(lambda t: shared)(state))
    checkpoints.load_optimizer(optimizer, state, "ckpt.pt")
    found = optimizer.state[optimizer.param_groups[0]["params"][2]]
    assert torch.equal(found["exp_avg"], found["exp_avg_sq"]) and found["exp_avg"].data_ptr() != found["exp_avg_sq"].data_ptr()


def test_how_adamw_computes_is_this_machines_whatever_the_file_says(trained):
    model = GPT(GPTConfig(**ARGS))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    checkpoints.load_optimizer(optimizer, group(fused=None, capturable=True, eps=1e-6)(trained[1].state_dict()), "ckpt.pt")
    first = optimizer.param_groups[0]
    assert (first["fused"], first["capturable"], first["eps"]) == (True, False, 1e-6)


# ---------------------------------------------------------------------------------------------------- a run

def test_a_resume_state_that_is_damaged_is_refused_before_anything_is_restored(tmp_path, draws_nothing):
    tiny.data(tmp_path)
    o = tiny.options(tmp_path, max_iters=2, eval_interval=2, n_layer=1)
    train(o)
    whole = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    rank = whole["resume"]["ranks"][0]
    name, keys, position, *rest = rank["random"]["numpy"]
    numpys = {**rank["random"], "numpy": (name, keys, 10 ** 6, *rest)}
    for changed, message in [(dict(ranks=[]), "no list of ranks"), (dict(evaluated_at="2"), "evaluated_at is '2'"),
                             (dict(ranks=[{**rank, "random": numpys}]), "random of rank 0"),
                             (dict(ranks=[{**rank, "batches": {**rank["batches"], "drawn": torch.tensor([-5, 0, 0, 0])}}]), "batches of"),
                             (dict(scaler={"scale": "big"}), "scaler is a dict")]:
        torch.save({**whole, "resume": {**whole["resume"], **changed}}, tmp_path / "out" / "last.pt")
        before = torch.get_rng_state()
        with pytest.raises(CheckpointError, match=f"last.pt: its 'resume' is damaged: .*{message}"):
            train(dataclasses.replace(o, init_from="resume"))
        torch.set_rng_state(before)


def test_a_random_state_that_a_gpu_refuses_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    states = {**state.random_states(), "cuda": torch.zeros(3, dtype=torch.uint8)}
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: torch)     # the CPU's generator, which takes no 3 bytes either
    with pytest.raises(CheckpointError, match="random state is not one of cuda"):
        state.set_random_states(states)


# ---------------------------------------------------------------------------------------------------- other scripts' files

def test_a_checkpoint_of_build_nanogpt_is_read_like_nanogpts(tmp_path, monkeypatch, capsys):
    main = sys.modules["__main__"]
    theirs = dataclasses.make_dataclass("GPTConfig", [(name, int) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")])
    theirs.__module__ = "__main__"
    monkeypatch.setattr(main, "GPTConfig", theirs, raising=False)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{**ARGS, "bias": True, "activation": "gelu_tanh"})).eval()
    config = theirs(**{name: ARGS[name] for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")})
    torch.save({"model": gpt.state_dict(), "config": config, "step": 250, "val_loss": 3.5, "log_dir": pathlib.Path("log", "one")},
               tmp_path / "m.pt")
    model, _, meta = load_model(tmp_path / "m.pt")
    assert "is a checkpoint of build-nanogpt: GELU is its tanh form" in capsys.readouterr().out
    assert meta["iter_num"] == 250 and meta["best_val_loss"] == 3.5 and meta["log_dir"] == "log/one"
    idx = torch.arange(8)[None]
    assert torch.equal(model(idx, idx)[0], gpt(idx, idx)[0])
    convert.convert_checkpoint(tmp_path / "m.pt", tmp_path / "ckpt.pt")
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["model_args"] == dataclasses.asdict(gpt.config)
    assert torch.equal(load_model(tmp_path / "ckpt.pt")[0](idx, idx)[0], gpt(idx, idx)[0])


def test_an_object_of_another_program_is_refused_with_what_to_save_instead(tmp_path):
    with pytest.raises(CheckpointError, match=r"\(decimal.Decimal\) that could run code .*a dataclass as dataclasses.asdict"):
        read(saved(tmp_path / "ckpt.pt", config={"learning_rate": decimal.Decimal("0.1")}))


def test_a_pickle_alone_is_not_opened(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps({"model": {}}, 2))
    with pytest.raises(CheckpointError, match="a checkpoint is a zip archive"):
        read(tmp_path / "ckpt.pt")
