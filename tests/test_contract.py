"""The drop-in contract, one test a row, named by the row: what a program written for nanoGPT's model.py may rely on.

Run side by side with a plain model (tests/plain.py), or with a real checkout's model.py where NANOGPT_DIR names one.
Rows about generation, files and runs have more tests where that code is tested (test_generation, test_checkpoint, test_options,
test_batches, test_training); C31 takes minutes and a text, and is marked slow.
"""
import contextlib
import copy
import dataclasses
import io
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from plain import upstream

import nanogpt_fast
from nanogpt_fast import GPT, MLP, Block, CausalSelfAttention, GPTConfig, LayerNorm, options
from nanogpt_fast.checkpoints import convert, nanogpt as checkpoint
from nanogpt_fast.kernels import fastest
from nanogpt_fast.text import batches, prepare
from nanogpt_fast.training import trainer as training

SMALL = dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32)


def ours(seed=0, backend=None, **changes):
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        return GPT(GPTConfig(**{**SMALL, **changes}), backend=backend)


def theirs(seed=0, **changes):
    torch.manual_seed(seed)
    module = upstream()
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(**{**SMALL, **changes}))


def batch(B=3, T=17, V=65, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, T), generator=g), torch.randint(V, (B, T), generator=g)


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
    here, losses = Path(__file__).parent / "checkout", []
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
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
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


# Methods

def test_c17_generate_keeps_the_prompt_and_the_mode():
    model, x = ours(dropout=0.3), batch(2, 5)[0]
    out = model.generate(x, 40)
    assert out.shape == (2, 45) and out.dtype == torch.int64 and torch.equal(out[:, :5], x)
    assert model.training and not out.requires_grad
    assert torch.equal(model.generate(x, 0), x)


def test_c18_what_generate_refuses():
    model, x = ours().eval(), batch(2, 5)[0]
    for kwargs, message in (({"top_k": 1.5}, "top_k is 1.5"), ({"top_k": -3}, "top_k is -3"), ({"temperature": -1.0}, "temperature is -1.0")):
        with pytest.raises(ValueError, match=message):
            model.generate(x, 3, **kwargs)
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(x[:, :0], 3)


def test_c18_greedy_top_k_and_ties():
    model, x = ours().eval(), batch(2, 5)[0]
    greedy = model.generate(x, 6, temperature=0)
    for t in range(5, 11):
        assert torch.equal(greedy[:, t], model(greedy[:, :t])[0][:, -1].argmax(-1))
    assert torch.equal(model.generate(x, 6, top_k=1), greedy)
    torch.manual_seed(3)
    clamped = model.generate(x, 6, top_k=10_000)
    torch.manual_seed(3)
    assert torch.equal(clamped, model.generate(x, 6))
    with torch.no_grad():
        model.lm_head.weight.zero_()                   # every logit ties with the first: all are kept
    torch.manual_seed(0)
    assert model.generate(x, 25, top_k=1)[:, 5:].unique().numel() > 20


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.8, "top_k": 5}], ids=str)
def test_c19_same_seed_same_text_as_upstream(kwargs):
    model, plain, x = ours().eval(), theirs().eval(), batch(2, 5)[0]
    torch.manual_seed(11)
    a = model.generate(x, 50, **kwargs)                # 55 tokens cross block_size 32
    torch.manual_seed(11)
    assert torch.equal(a, plain.generate(x, 50, **kwargs))


@pytest.mark.parametrize("kwargs", [{"temperature": 0}, {"top_k": 5}], ids=str)
def test_c20_the_cache_changes_no_token_across_block_size(kwargs):
    model, x = ours(seed=2).eval(), batch(2, 5)[0]
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        runs.append(model.generate(x, 50, use_cache=use_cache, **kwargs))
    assert torch.equal(*runs)  # on these seeds; test_generation.py looks at ties


class Doubled(nn.Linear):
    """Stands for LoRA and its like: a Linear with another forward."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_c21_touched_modules_step_aside():
    block = ours().transformer.h[0]
    assert block.why_not_fused() is None
    handle = block.attn.register_forward_hook(lambda *args: None)
    assert "hook" in block.why_not_fused()
    handle.remove()
    assert block.why_not_fused() is None
    nn.utils.parametrize.register_parametrization(block.ln_1, "weight", nn.Identity())
    assert "LayerNorm" in block.why_not_fused()
    block.ln_1 = nn.Identity()
    assert "Identity" in block.why_not_fused()
    class Halved(CausalSelfAttention):
        def forward(self, x):
            return 0.5 * super().forward(x)
    block = ours().transformer.h[1]
    block.attn.__class__ = Halved
    assert "Halved" in block.why_not_fused()


def test_c21_a_replaced_linear_a_custom_mlp_and_a_hooked_head_are_honoured():
    x, y = batch()
    for path in ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj", "lm_head"):
        model, plain = ours(), theirs()
        for m in (model, plain):
            m.get_submodule(path).__class__ = Doubled
        assert torch.equal(model(x, y)[1], plain(x, y)[1]), path
    model = ours()
    model.lm_head.register_forward_hook(lambda module, args, out: out * 0)
    assert model(x, y)[0].abs().max() == 0


def test_c22_optimizer_groups_and_state_round_trip(capsys):
    model, plain, (x, y) = ours(), theirs(), batch()
    a = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    b = plain.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    assert [g["weight_decay"] for g in a.param_groups] == [0.1, 0.0]
    names = {p: n for n, p in model.named_parameters()}
    plain_names = {p: n for n, p in plain.named_parameters()}
    assert [[names[p] for p in g["params"]] for g in a.param_groups] == [[plain_names[p] for p in g["params"]] for g in b.param_groups]
    for m, o in ((model, a), (plain, b)):
        m(x, y)[1].backward()
        o.step()
    ours_state, theirs_state = a.state_dict(), b.state_dict()
    a.load_state_dict(theirs_state)
    b.load_state_dict(ours_state)
    model.transformer.wpe.weight.requires_grad_(False)
    assert all(p is not model.transformer.wpe.weight for g in model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
               for p in g["params"])


def test_c23_figures():
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        model = GPT(GPTConfig())
    assert round(model.estimate_mfu(12, 0.135), 6) == 0.249548
    assert model.get_num_params() == 123_689_472 and model.get_num_params(non_embedding=False) == 124_475_904
    assert model.estimate_hardware_mfu(12, 0.135, device="cpu") is None  # nobody knows this CPU's peak


def test_c23_crop_block_size():
    model, (x, y) = ours(), batch(2, 8)
    before = model(x, y)[0]
    model.crop_block_size(8)
    assert model.config.block_size == 8 and torch.equal(model(x, y)[0], before)
    with pytest.raises(ValueError, match="block size is only 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="can only shrink"):
        model.crop_block_size(9)


@pytest.fixture
def small_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    source = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4))
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.05 * torch.randn_like(p))  # biases are zero and norms one at first: a mix-up would not show
    source.eval().save_pretrained(tmp_path)
    return source, str(tmp_path)


def test_c24_from_pretrained_reads_transformers_weights(small_gpt2):
    source, folder = small_gpt2
    model = GPT.from_pretrained(folder).eval()
    assert model.config.activation == "gelu_tanh"  # what the folder's config says
    x = batch(2, 24, 61)[0]
    with torch.no_grad():
        assert torch.allclose(model(x, x)[0], source(x).logits, atol=2e-5)
        assert not torch.allclose(GPT.from_pretrained(folder, activation="gelu").eval()(x, x)[0], source(x).logits, atol=2e-5)


def test_c24_only_dropout_can_be_overridden(small_gpt2):
    assert GPT.from_pretrained(small_gpt2[1], {"dropout": 0.3}).transformer.h[0].attn.dropout == 0.3
    with pytest.raises(ValueError, match="only dropout"):
        GPT.from_pretrained(small_gpt2[1], {"n_layer": 1})
    with pytest.raises(ValueError, match="'gpt3'.*gpt2-medium"):
        GPT.from_pretrained("gpt3")


def test_c24_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'nanogpt-fast\[gpt2\]'"):
        GPT.from_pretrained("gpt2")


def test_c25_accumulation_clipping_and_frozen_parameters():
    model, plain, (x, y) = ours(), theirs(), batch(4)
    for m in (model, plain):
        m.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
        for half in (slice(0, 2), slice(2, 4)):
            (m(x[half], y[half])[1] / 2).backward()
        m.norm = nn.utils.clip_grad_norm_(m.parameters(), 0.1)
    assert torch.equal(model.norm, plain.norm)
    assert model.transformer.h[0].attn.c_attn.weight.grad is None
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    model.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


def test_c25_every_parameter_gets_a_gradient():
    model, (x, y) = ours(), batch(2, 32)
    model(x, y)[1].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_c26_compiles_without_a_break_and_without_recompiling():
    model, (x, y) = ours(dropout=0.1), batch()
    compiles = []
    def counting(graph, inputs):
        compiles.append(graph)
        return graph.forward
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    torch.manual_seed(4)
    losses = [compiled(x, y)[1].item() for _ in range(3)]
    torch.manual_seed(4)
    assert losses == [model(x, y)[1].item() for _ in range(3)]
    assert len(compiles) == 1
    assert compiled.generate(x, 2).shape == (3, 19) and compiled.estimate_mfu(1, 1.0) == model.estimate_mfu(1, 1.0)


def test_c26_compiles_for_all_lengths_at_once():
    """dynamic=True makes the rate of dropout a symbol, too. Another graph is compiled where a row of the table begins."""
    from torch._dynamo.testing import CompileCounter
    model, count = ours(n_layer=1), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    with fastest.trial([fastest.Row("layer_norm", "reference", tokens=(3 * 13, 1000))]):
        for T, graphs in ((10, 1), (12, 1), (13, 2), (14, 2)):
            x = torch.randint(0, model.config.vocab_size, (3, T))
            torch.testing.assert_close(compiled(x, x)[1], model(x, x)[1])
            assert count.frame_count == graphs


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


# The switch (DESIGN decision 1) and explain

def test_backend_can_be_chosen_by_model_context_and_op():
    x, y = batch()
    with pytest.raises(RuntimeError, match="backend='fused', but no kernel can run"):
        if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("kernels run here")
        ours(backend="fused")(x, y)
    model = ours(backend="fused")
    with nanogpt_fast.use("reference"):
        model(x, y)
    with pytest.raises(ValueError, match="'quick' is not one of auto, fused, reference"):
        ours(backend="quick")
    with pytest.raises(ValueError, match="no op is called 'atention'"):
        ours(backend="auto,atention=reference")


def test_explain_names_an_implementation_and_a_reason_for_every_op():
    model = ours()
    model.transformer.h[1].attn.register_forward_hook(lambda *args: None)
    state = torch.get_rng_state()
    rows = nanogpt_fast.explain(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {row.op for row in rows} == {"attention", "layer_norm", "mlp", "cross_entropy", "block 1"}
    assert "has a hook" in str(rows)
    assert all(row.implementation == "reference" and row.reason == "asked for" for row in nanogpt_fast.explain(ours(backend="reference")))


def test_attn_flash_false_takes_the_written_out_path():
    model, (x, y) = ours(), batch()
    before = model(x, y)[0]
    for block in model.transformer.h:
        block.attn.flash = False
    assert torch.allclose(model(x, y)[0], before, atol=1e-6) and not torch.equal(model(x, y)[0], before)
    model.transformer.h[0].attn.attn_dropout.p = 0.5
    assert not torch.equal(model(x, y)[0], model(x, y)[0])
