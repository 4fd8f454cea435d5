"""The drop-in contract, C27 to C32: checkpoints, config and data files, the schedule, and what is learnt.

One test a row, named by the row. checkpoints/, text/ and training/ have more; C31 takes minutes and a text, and is marked slow.
"""
import contextlib
import io
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sides import batch, ours, theirs

from nanogpt_fast import GPTConfig, options
from nanogpt_fast.checkpoints import convert, nanogpt as checkpoint
from nanogpt_fast.text import batches, prepare
from nanogpt_fast.training import trainer as training


# Files

def test_c27_ckpt_pt_has_upstreams_keys_and_loads_with_weights_only(tmp_path):
    model = ours(seed=4)
    convert.save_gpt(tmp_path / "ckpt.pt", model, iter_num=7, best_val_loss=1.5, config={"batch_size": 12})
    found = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= found.keys()
    assert set(found["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    plain = theirs()
    plain.load_state_dict(found["model"], strict=True)
    assert torch.equal(plain(*batch())[1], model(*batch())[1])
    assert "activation" in checkpoint.model_args(GPTConfig(activation="gelu_tanh"))


def test_c28_config_files_then_overrides(tmp_path):
    (tmp_path / "config.py").write_text("batch_size = 4\nmax_iters = 30\nlr_decay_iters = max_iters\nlearning_rate = 1\n")
    parse = lambda *words: options.parse(training.TrainOptions, [str(tmp_path / "config.py"), *words], "train")
    o = parse("--batch_size=8", "--n_layer", "3")
    assert (o.batch_size, o.n_layer, o.lr_decay_iters, o.learning_rate) == (8, 3, 30, 1.0) and type(o.learning_rate) is float
    with pytest.raises(ValueError, match="unknown option --batchsize; the nearest is --batch_size"):
        parse("--batchsize=8")
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(io.StringIO()) as out:
        parse("--help")
    assert stop.value.code == 0 and "--learning_rate" in out.getvalue()


def test_c29_data_files_are_upstreams(tmp_path):
    text = "hello world. " * 40
    prepare.write(text, tmp_path, "char", say=lambda _: None)
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == len(set(text)) and all(meta["itos"][i] == c for c, i in meta["stoi"].items())
    ids = np.concatenate([np.fromfile(tmp_path / f"{split}.bin", dtype="<u2") for split in ("train", "val")])
    assert "".join(meta["itos"][int(i)] for i in ids) == text
    (tmp_path / "theirs").mkdir()
    np.arange(70, dtype=np.uint16).tofile(tmp_path / "theirs" / "train.bin")  # what prepare.py does
    x, y = batches.Batches(tmp_path / "theirs", "train", 2, 8).next()
    assert torch.equal(y, x + 1) and x.dtype == torch.int64 and x.shape == (2, 8)


def test_c30_schedule():
    o = training.TrainOptions(learning_rate=6e-4, min_lr=6e-5, warmup_iters=10, lr_decay_iters=110)
    rate = lambda it: training.learning_rate(it, o)
    assert rate(0) == 6e-4 / 11 and rate(9) == 6e-4 * 10 / 11 and rate(10) == 6e-4
    assert rate(60) == pytest.approx((6e-4 + 6e-5) / 2) and rate(111) == rate(9999) == 6e-5


# Learning

def shakespeare():
    for path in (os.environ.get("NANOGPT_FAST_SHAKESPEARE"), "data/shakespeare_char/input.txt"):
        if path and os.path.isfile(path):
            return Path(path).read_text(encoding="utf-8")
    pytest.skip("no tinyshakespeare: set NANOGPT_FAST_SHAKESPEARE, or run `nanogpt-fast prepare shakespeare`")


RECIPES = {  # upstream's two: (options, validation loss, how far from it)
    "cpu": (dict(device="cpu", compile=False, dtype="float32", eval_iters=20, block_size=64, batch_size=12, n_layer=4, n_head=4, n_embd=128,
                 max_iters=2000, lr_decay_iters=2000, dropout=0.0), 1.88, 0.05),
    "gpu": (dict(device="cuda", eval_iters=200, block_size=256, batch_size=64, n_layer=6, n_head=6, n_embd=384, max_iters=5000,
                 lr_decay_iters=5000, dropout=0.2), 1.4697, 0.02),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_c31_upstreams_recipes_reach_their_loss(recipe, tmp_path):
    if recipe == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    prepare.write(shakespeare(), tmp_path / "data" / "shakespeare_char", "char", say=lambda _: None)
    changed, expected, distance = RECIPES[recipe]
    training.train(training.TrainOptions(
        out_dir=str(tmp_path / "out"), dataset="shakespeare_char", data_dir=str(tmp_path / "data"), eval_interval=250, learning_rate=1e-3,
        min_lr=1e-4, warmup_iters=100, gradient_accumulation_steps=1, beta2=0.99, sample_tokens=0, **changed))
    losses = [float(loss) for loss in re.findall(r'"val_loss": ([\d.]+)', (tmp_path / "out" / "metrics.jsonl").read_text())]
    assert abs(min(losses) - expected) < distance


def test_c32_the_loss_curve_lies_on_upstreams_for_200_steps():
    curves = []
    for model in (ours(n_embd=16, n_head=2), theirs(n_embd=16, n_head=2)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator, curve = torch.Generator().manual_seed(1), []
        for _ in range(200):
            x = torch.randint(65, (2, 1), generator=generator) + torch.arange(9)
            x = x % 65                                     # count on from a random start: it can be learned
            loss = model(x[:, :-1].contiguous(), x[:, 1:].contiguous())[1]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == curves[1] and curves[0][-1] < curves[0][0] - 1
