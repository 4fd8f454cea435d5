"""Checkpoint files: nanoGPT's format in both directions, whole or not there, and everything damaged or strange refused."""
import copy
import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import plain
import disks
import pytest
import tiny
import torch

from nanogpt_fast import GPT, GPTConfig, classic, files, options
from nanogpt_fast.checkpoints import convert, nanogpt as checkpoint
from nanogpt_fast.checkpoints.nanogpt import CheckpointError, load_model, read, save
from nanogpt_fast.text import prepare
from nanogpt_fast.training import trainer as training
from nanogpt_fast.training.trainer import train

ARGS = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=40, dropout=0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The out_dir of a tiny trained run; nothing may change it."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.data(folder)
    o = tiny.options(folder, max_iters=10, dropout=0.1)
    train(o)
    return folder / "out"


def untrained(**changed):
    """A minimal checkpoint dict, as nanoGPT writes it."""
    args = {**ARGS, **changed}
    model = GPT(GPTConfig(**args))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=args, iter_num=7,
                best_val_loss=torch.tensor(1.5), config=dict(dataset="x"))


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- nanoGPT's format

def test_ckpt_pt_has_nanogpts_keys_and_plain_contents(trained):
    saved = torch.load(trained / "ckpt.pt", weights_only=True)
    assert list(saved) == ["model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "tokenizer", "run"]
    assert set(saved["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert saved["config"]["dataset"] == "sums" and saved["iter_num"] == 10 and isinstance(saved["best_val_loss"], float)


def test_a_field_that_nanogpt_lacks_is_written_only_where_it_says_something():
    assert set(checkpoint.model_args(GPTConfig())) == set(ARGS)
    assert checkpoint.model_args(GPTConfig(activation="gelu_tanh"))["activation"] == "gelu_tanh"


def test_nanogpts_code_loads_our_weights_and_our_optimizer_and_steps_on_alike(trained):
    saved = torch.load(trained / "ckpt.pt", weights_only=True)
    theirs_module = plain.upstream()
    theirs = theirs_module.GPT(theirs_module.GPTConfig(**saved["model_args"]))
    theirs.load_state_dict(saved["model"])
    ours, _, _ = load_model(trained / "ckpt.pt", backend="reference")
    idx = torch.arange(32).view(2, 16) % 20
    after = []
    for model in (theirs, ours):
        model.eval()
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # it keeps the tensors it is given
        model(idx, idx)[1].backward()
        optimizer.step()
        after.append(model(idx, idx)[1].item())
    assert after[0] == after[1]


def test_nanogpts_checkpoint_is_read_whatever_its_prefixes_buffers_and_scalars(tmp_path):
    state = untrained()
    expected = state["model"]["transformer.h.1.mlp.c_fc.weight"]
    state["model"] = {f"_orig_mod.module.{name}": tensor for name, tensor in state["model"].items()}
    state["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    state["model"]["module.transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    for best in (torch.tensor(1.5), np.float64(1.5), np.float32(1.5), 1.5):
        torch.save({**state, "best_val_loss": best}, tmp_path / "ckpt.pt")
        model, tokenizer, meta = load_model(tmp_path)
        assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, expected)
        assert model.lm_head.weight is model.transformer.wte.weight and not model.training
        assert meta["best_val_loss"] == 1.5 and meta["iter_num"] == 7
        assert tokenizer is None and "meta.pkl" in meta["no_tokenizer"]


def test_the_tokenizer_travels_with_the_checkpoint(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nowhere near the data
    model, tokenizer, meta = load_model(trained)
    assert tokenizer.decode(tokenizer.encode("12 plus 3")) == "12 plus 3" and tokenizer.vocab_size == model.config.vocab_size
    assert meta["path"] == trained / "ckpt.pt"


def test_nanogpts_meta_pkl_is_found_where_its_sample_py_looks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = untrained(vocab_size=tiny_vocab(tmp_path))
    save({**state, "config": {"dataset": "sums"}}, tmp_path / "ckpt.pt")
    assert load_model(tmp_path)[1].encode("1")


def tiny_vocab(folder):
    tiny.data(folder)
    return prepare.load_tokenizer(folder / "data" / "sums").vocab_size


def test_a_folder_without_ckpt_pt_gives_its_last_pt(trained, tmp_path):
    (tmp_path / "last.pt").write_bytes((trained / "last.pt").read_bytes())
    assert load_model(tmp_path)[2]["path"] == tmp_path / "last.pt"


# ---------------------------------------------------------------------------------------------------- what is refused

def test_a_missing_file_names_what_is_there(trained, tmp_path):
    assert "ckpt.pt, last.pt" in refused(trained / "best.pt")
    refused(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(share, trained, tmp_path):
    content = (trained / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(content[:int(len(content) * share)])
    refused(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_a_flipped_bit_is_refused(share, trained, tmp_path):
    content = bytearray((trained / "ckpt.pt").read_bytes())
    content[int(len(content) * share)] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(content)
    assert "damaged" in refused(tmp_path / "ckpt.pt")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "ckpt.pt").write_text("no checkpoint at all")
    refused(tmp_path / "ckpt.pt")
    torch.save([1, 2, 3], tmp_path / "ckpt.pt")
    assert "not a nanoGPT checkpoint" in refused(tmp_path / "ckpt.pt")
    torch.save(untrained()["model"], tmp_path / "ckpt.pt")
    assert "model_args" in refused(tmp_path / "ckpt.pt")


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))],
                         ids=["torch", "pickle"])
def test_a_pickle_that_carries_code_is_refused_and_the_code_not_run(write, tmp_path):
    write({**untrained(), "config": Code(tmp_path / "ran")}, tmp_path / "ckpt.pt")
    assert "code" in refused(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change, complaint", [
    (lambda c: c["model"].pop("transformer.ln_f.weight"), "transformer.ln_f.weight is missing"),
    (lambda c: c["model"].update(extra=torch.zeros(1)), "extra does not belong there"),
    (lambda c: c["model"].update({"transformer.wpe.weight": torch.zeros(3, 32)}), r"\(3, 32\), .* require \(16, 32\)"),
    (lambda c: c["model_args"].update(n_head=5), "n_head"),
    (lambda c: c["model_args"].update(rotary=True), "rotary"),
    (lambda c: c["model_args"].pop("n_embd"), "n_embd"),
    (lambda c: c["model_args"].update(n_embd="wide"), "n_embd"),
    (lambda c: c.update(tokenizer={"kind": "char", "chars": ["a"]}, model_args={**ARGS, "vocab_size": 4000}),
     r"require \(4000, 32\)"),
    (lambda c: c.update(tokenizer={"kind": "char", "chars": [chr(i) for i in range(41)]}), "don't match"),
    (lambda c: c.update(tokenizer={"kind": "runes"}), "runes")])
def test_contents_that_do_not_fit_are_named(change, complaint, tmp_path):
    state = untrained()
    change(state)
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=complaint):
        load_model(tmp_path)


def with_a_head_of_its_own():
    """A checkpoint of a fork of nanoGPT without weight tying, and the logits of its weights, computed in plain PyTorch."""
    saved = untrained()
    wte, head = saved["model"]["transformer.wte.weight"], torch.randn(40, 32, generator=torch.Generator().manual_seed(4))
    body = plain.GPT(GPTConfig(**ARGS)).eval()
    body.load_state_dict(saved["model"])
    found = []
    body.transformer.ln_f.register_forward_hook(lambda module, args, out: found.append(out))
    idx = torch.arange(12)[None]
    body(idx)
    saved["model"] = {**saved["model"], "transformer.wte.weight": wte.clone(), "lm_head.weight": head}
    return saved, idx, found[0] @ head.T


def test_a_head_that_differs_from_the_embedding_is_loaded_as_it_is_and_said(tmp_path, capsys):
    saved, idx, expected = with_a_head_of_its_own()
    torch.save(saved, tmp_path / "ckpt.pt")
    model = load_model(tmp_path / "ckpt.pt")[0]
    assert "the vocabulary head has a matrix of its own" in capsys.readouterr().out
    for name, tensor in saved["model"].items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx)[0], expected.detach())
    assert torch.equal(model.generate(idx, 1, temperature=0)[0, -1], expected[0, -1].argmax())


def test_weights_that_differ_are_not_loaded_into_the_one_matrix_of_a_gpt():
    saved, *_ = with_a_head_of_its_own()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="lm_head.weight and transformer.wte.weight differ, and this GPT has one matrix for both"):
            GPT(GPTConfig(**ARGS)).load_state_dict(saved["model"], strict=strict)
    twice = untrained()["model"]
    twice = {name: torch.full_like(tensor, torch.nan) for name, tensor in twice.items()}
    GPT(GPTConfig(**ARGS)).load_state_dict(twice)               # NaN in both is no difference


@pytest.mark.parametrize("to", ["classic", "huggingface"])
def test_convert_keeps_an_untied_head_or_refuses_it(to, tmp_path):
    saved, idx, expected = with_a_head_of_its_own()
    torch.save(saved, tmp_path / "ckpt.pt")
    if to == "huggingface":
        with pytest.raises(convert.ConversionError, match="head is a matrix of its own"):
            convert.convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "folder")
        return
    convert.convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "classic.pt")
    found = classic.load_checkpoint(tmp_path / "classic.pt", device="cpu")[0](idx, idx)[0]
    torch.testing.assert_close(found, expected)


def test_an_optimizer_state_of_another_model_is_refused():
    model = GPT(GPTConfig(**ARGS))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    other = GPT(GPTConfig(**{**ARGS, "n_embd": 64}))
    others = other.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    idx = torch.zeros(1, 4, dtype=torch.long)
    other(idx, idx)[1].backward()
    others.step()
    with pytest.raises(CheckpointError, match="optimizer"):
        checkpoint.load_optimizer(optimizer, others.state_dict(), "ckpt.pt")


# ---------------------------------------------------------------------------------------------------- whole or not there

def test_kill_9_in_the_middle_of_a_write_leaves_the_former_checkpoint_whole(tmp_path):
    save({**untrained(), "iter_num": 1}, tmp_path / "ckpt.pt")
    half_way = textwrap.dedent("""
        import sys, time, torch
        from nanogpt_fast.checkpoints import nanogpt as checkpoint
        def half(value, file):                       # torch.save, stopped in the middle
            file.write(b"PK" + bytes(100_000))
            file.flush()
            print("half", flush=True)
            time.sleep(60)
        torch.save = half
        checkpoint.save({}, sys.argv[1])
        """)
    process = subprocess.Popen([sys.executable, "-c", half_way, str(tmp_path / "ckpt.pt")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"half\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    leftovers = [p for p in tmp_path.iterdir() if p.name != "ckpt.pt"]
    assert leftovers and leftovers[0].stat().st_size > 100_000  # it was killed with half a file on the disk
    assert read(tmp_path / "ckpt.pt")["iter_num"] == 1
    files.remove_litter(tmp_path / "ckpt.pt")
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def full_disk(monkeypatch, room):
    """From now on every file that `replacing` writes to fails like a full disk after `room` bytes."""
    class Full(disks.File):
        def __init__(self, file):
            super().__init__(file)
            self.left = room

        def write(self, content):
            self.left -= len(content)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

    monkeypatch.setattr(files, "open", lambda *args: Full(open(*args)), raising=False)


@pytest.mark.parametrize("room", [0, 50_000])
def test_a_full_disk_while_saving_leaves_the_former_checkpoint_and_no_rubbish(room, tmp_path, monkeypatch):
    save(untrained(), tmp_path / "ckpt.pt")
    before = (tmp_path / "ckpt.pt").read_bytes()
    full_disk(monkeypatch, room)
    with pytest.raises(CheckpointError, match="No space left on device.*previous one is intact"):
        save(untrained(), tmp_path / "ckpt.pt")
    assert os.listdir(tmp_path) == ["ckpt.pt"] and (tmp_path / "ckpt.pt").read_bytes() == before


def test_a_run_on_a_full_disk_stops_with_one_line_and_can_go_on_later(tmp_path, capsys):
    """On a real file system that is really full, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        tiny.data(tmp_path)
        o = tiny.options(tmp_path, out="disk/out", max_iters=10)
        train(o)
        before = {name: (disk / "out" / name).read_bytes() for name in ("ckpt.pt", "last.pt")}
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free - 100_000))  # room for the metrics and the picture, not for a checkpoint
        longer = tiny.words(o) + ["--init_from=resume", "--max_iters=20"]
        done = subprocess.run([sys.executable, "-m", "nanogpt_fast", "train", *longer], capture_output=True, text=True)
        assert done.returncode == 2 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
        assert {name: (disk / "out" / name).read_bytes() for name in before} == before
        assert not [name for name in os.listdir(disk / "out") if name.endswith(".tmp")]
        (disk / "filler").unlink()
        assert train(options.parse(training.TrainOptions, longer, "train")).iter_num == 20
    finally:
        subprocess.run(["umount", str(disk)], check=True)
