"""The drop-in contract, C1 to C16, names, state and numbers: what a program written for nanoGPT's model.py may rely on.

One test a row, named by the row. Run side by side with a plain model (tests/plain.py), or with a real checkout's model.py where NANOGPT_DIR
names one.
"""
import copy
import dataclasses
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sides import batch, ours, theirs

from nanogpt_fast import GPT, CausalSelfAttention, GPTConfig, LayerNorm
from nanogpt_fast.text import prepare


# Names and state

def test_c1_a_model_py_of_one_line_defines_what_upstreams_defines():
    namespace = {}
    exec("from nanogpt_fast import *", namespace)
    assert {"LayerNorm", "CausalSelfAttention", "MLP", "Block", "GPTConfig", "GPT"} <= namespace.keys()
    assert namespace["GPT"] is GPT


def test_c1_a_training_script_runs_unedited_on_it_and_trains_alike(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    here, losses = Path(__file__).parents[1] / "checkout", []
    shutil.copy(here / "train.py", tmp_path)
    for text in ((here / "model.py").read_text(), "from nanogpt_fast import *\n"):
        (tmp_path / "model.py").write_text(text)
        monkeypatch.delitem(sys.modules, "model", raising=False)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        with pytest.raises(SystemExit):
            runpy.run_path("train.py", run_name="__main__")
        losses.append(re.findall(r"loss (\S+)", capfd.readouterr().out))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("NANOGPT_DIR"), reason="NANOGPT_DIR names no nanoGPT checkout")
def test_c1_upstreams_scripts_run_unedited(tmp_path):
    for name in ("train.py", "sample.py", "bench.py", "configurator.py"):
        shutil.copy(Path(os.environ["NANOGPT_DIR"], name), tmp_path)
    (tmp_path / "model.py").write_text("from nanogpt_fast import *\n")
    prepare.write("".join(f"{i} times {i} is {i * i}\n" for i in range(3000)), tmp_path / "data" / "sums", "char", say=lambda _: None)
    common = ["--device=cpu", "--compile=False"]
    for words in (["train.py", *common, "--dataset=sums", "--eval_iters=1", "--eval_interval=2", "--block_size=16", "--batch_size=2", "--n_layer=1",
                   "--n_head=2", "--n_embd=32", "--max_iters=2", "--gradient_accumulation_steps=1", "--dtype=float32"],
                  ["sample.py", *common, "--num_samples=1", "--max_new_tokens=9", "--start=t"],
                  *[["bench.py", "--compile=False", "--real_data=False", "--batch_size=1"]] * torch.cuda.is_available()):  # wants CUDA
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                              capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr


def test_c2_config_fields_order_and_defaults():
    fields = [(f.name, f.default) for f in dataclasses.fields(GPTConfig)]
    assert fields[:7] == [("block_size", 1024), ("vocab_size", 50304), ("n_layer", 12), ("n_head", 12), ("n_embd", 768),
                          ("dropout", 0.0), ("bias", True)]
    assert all(default is not dataclasses.MISSING for _, default in fields[7:])
    assert "backend" not in dict(fields)


def test_c3_state_dict_keys_order_shapes_and_no_buffers():
    model, plain = ours(), theirs()
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [(k, v.shape) for k, v in plain.state_dict().items()]
    assert list(model.buffers()) == []
    assert len(ours(n_layer=12).state_dict()) == 149 and len(ours(n_layer=12, bias=False).state_dict()) == 76


def test_c4_strict_loading_both_ways():
    model, plain = ours(seed=1), theirs(seed=2)
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(theirs(seed=3).state_dict(), strict=True)
    assert torch.equal(model.lm_head.weight, theirs(seed=3).lm_head.weight)


def test_c5_tying_survives():
    for change in (lambda m: m.to(torch.float64), lambda m: m.half(), copy.deepcopy, lambda m: torch.compile(m, backend="eager"),
                   lambda m: (m.load_state_dict(ours(seed=9).state_dict()), m)[1]):
        model = change(ours())
        assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("bias", [True, False])
def test_c6_same_seed_gives_the_same_weights_and_random_state(bias):
    plain = theirs(seed=1337, bias=bias, dropout=0.1)
    state = torch.get_rng_state()
    model = ours(seed=1337, bias=bias, dropout=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_c6_figures_of_the_initialisation():
    """Numbers, so that a change of both sides would show: seed 1337, the small model."""
    w = ours(seed=1337, n_embd=64).state_dict()
    assert abs(w["transformer.h.0.attn.c_attn.weight"].std().item() - 0.02) < 5e-4
    assert abs(w["transformer.h.1.mlp.c_proj.weight"].std().item() - 0.02 / 2) < 2.5e-4  # 0.02 / sqrt(2 * 2 layers)
    assert w["transformer.h.0.mlp.c_fc.bias"].abs().max() == 0


def test_c7_the_constructor_and_the_optimizer_print_their_lines(capsys):
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert capsys.readouterr().out == "number of parameters: 123.69M\n"
    model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "meta")
    assert capsys.readouterr().out.splitlines() == [
        "num decayed parameter tensors: 50, with 124,354,560 parameters",
        "num non-decayed parameter tensors: 98, with 121,344 parameters",
        "using fused AdamW: False"]


# Numbers

def test_c8_shapes_of_logits_and_loss():
    model, (x, y) = ours(), batch()
    logits, loss = model(x, y)
    assert logits.shape == (3, 17, 65) and loss.shape == () and loss.dtype == torch.float32
    logits, loss = model(x)
    assert logits.shape == (3, 1, 65) and loss is None
    assert model(x, y, return_logits=False)[0] is None and torch.equal(model(x, y, return_logits=False)[1], model(x, y)[1])


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"dropout": 0.2}], ids=str)
def test_c9_on_cpu_the_reference_equals_upstream_bit_for_bit(changes):
    model, plain, (x, y) = ours(backend="reference", **changes), theirs(**changes), batch()
    torch.manual_seed(7)
    logits, loss = model(x, y)
    loss.backward()
    torch.manual_seed(7)
    plain_logits, plain_loss = plain(x, y)
    plain_loss.backward()
    assert torch.equal(logits, plain_logits) and torch.equal(loss, plain_loss)
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_c10_dtypes_under_autocast():
    model, (x, y) = ours(), batch()
    seen = {}
    keep = lambda name: lambda module, args, out: seen.__setitem__(name, out.dtype)
    for name in ("transformer.wte", "transformer.h.0", "transformer.h.1.attn.c_attn", "transformer.h.0.attn", "transformer.h.0.mlp"):
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(x, y)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert seen == {"transformer.wte": torch.float32, "transformer.h.0": torch.float32, "transformer.h.1.attn.c_attn": torch.bfloat16,
                    "transformer.h.0.attn": torch.bfloat16, "transformer.h.0.mlp": torch.bfloat16}


def test_c11_gelu_is_the_erf_form_and_the_tanh_form_is_an_option():
    x = torch.linspace(-4, 4, 101)
    assert torch.equal(ours().transformer.h[0].mlp.gelu(x), F.gelu(x))
    assert torch.equal(ours(activation="gelu_tanh").transformer.h[0].mlp.gelu(x), F.gelu(x, approximate="tanh"))
    a, b = ours(), ours(activation="gelu_tanh")
    assert not torch.equal(a(batch()[0])[0], b(batch()[0])[0])
    with pytest.raises(ValueError, match="activation is 'swish'"):
        ours(activation="swish")


def test_c11_layer_norm_has_eps_1e_5():
    x = torch.tensor([[0.0, 1e-3]])
    assert torch.allclose(LayerNorm(2, bias=True)(x), (x - 5e-4) / torch.sqrt(torch.tensor(2.5e-7 + 1e-5)))


def test_c12_the_loss_is_a_mean_that_ignores_minus_one_only():
    model, (x, y) = ours(), batch()
    y[0, :5] = -1
    logits, loss = model(x, y)
    nll = -logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(loss, nll[y >= 0].mean())
    assert model(x, torch.full_like(y, -1))[1].isnan()
    for wrong in (65, -2, -100):
        with pytest.raises((IndexError, RuntimeError)):
            model(x, torch.full_like(y, wrong))


@pytest.mark.parametrize("D", [8, 12, 32, 64, 80, 96, 128])
def test_c13_head_sizes(D):
    model, plain, (x, y) = ours(n_embd=2 * D), theirs(n_embd=2 * D), batch()
    assert torch.equal(model(x, y)[1], plain(x, y)[1])


@pytest.mark.parametrize("B,T", [(1, 1), (1, 32), (2, 31), (0, 5)])
def test_c13_sequence_lengths_and_batches(B, T):
    model, plain, (x, y) = ours(), theirs(), batch(B, T)
    assert torch.equal(model(x, y)[0], plain(x, y)[0])


def test_c13_what_cannot_be_raises():
    with pytest.raises(ValueError, match="n_embd 32 is not divisible by n_head 3"):
        ours(n_head=3)
    with pytest.raises(ValueError, match="Cannot forward sequence of length 33, block size is only 32"):
        ours()(torch.zeros(1, 33, dtype=torch.long))
    for field, value in (("dropout", 1.5), ("dropout", -0.1), ("block_size", 0), ("vocab_size", 0), ("n_head", 0), ("n_layer", -1)):
        with pytest.raises(ValueError, match=f"{field} is {value}"):
            ours(**{field: value})
    with pytest.raises(IndexError, match=r"token ids must lie in 0..64 .* from 3 to 65"):
        ours()(torch.tensor([[3, 65]]))


def test_c14_logits_do_not_see_later_tokens():
    model, (x, y) = ours(), batch()
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 65
    assert torch.equal(model(x, y)[0][:, :9], model(changed, y)[0][:, :9])
    assert not torch.equal(model(x, y)[0][:, 9:], model(changed, y)[0][:, 9:])


def test_c15_dropout_at_four_places():
    x = batch()[0]
    for place in ("transformer.drop", "transformer.h.0.attn", "transformer.h.0.attn.resid_dropout", "transformer.h.0.mlp.dropout"):
        model = ours()
        module = model.get_submodule(place)
        if isinstance(module, CausalSelfAttention):
            module.dropout = 0.5                       # a later change is obeyed
        else:
            module.p = 0.5
        torch.manual_seed(1)
        a = model(x)[0]
        assert not torch.equal(a, model(x)[0]), place
        torch.manual_seed(1)
        assert torch.equal(a, model(x)[0]), f"{place}: seeded"
        model.eval()
        assert torch.equal(model(x)[0], model(x)[0]), f"{place}: none in eval"


def test_c16_returned_logits_stay_intact():
    model, (x, y) = ours(), batch()
    logits, loss = model(x, y)
    before = logits.detach().clone()
    (loss + logits.square().mean()).backward()
    assert torch.equal(logits, before)
    assert torch.allclose(loss, F.cross_entropy(logits.view(-1, 65), y.view(-1)))
