"""The drop-in contract, C17 to C26: generate, modules that were touched, the optimizer, from_pretrained, training loops, torch.compile.

One test a row, named by the row. generation/ has more on generate, swap/ on modules.
"""
import contextlib
import functools
import io
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from sides import batch, ours, theirs

import nanogpt_fast.model
from nanogpt_fast import GPT, MLP, Block, CausalSelfAttention, GPTConfig, LayerNorm, backend, ops, touched
from nanogpt_fast.kernels import fastest
from nanogpt_fast.ops import norm
from nanogpt_fast.ops.cpu import layer_norm as cpu_layer_norm


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


@pytest.mark.parametrize("cls", [GPT, Block, LayerNorm, CausalSelfAttention, MLP, nn.Linear, nn.GELU, nn.Dropout, nn.Embedding])
def test_c21_a_forward_set_on_a_class_is_called(cls, monkeypatch):
    model, calls, forward = ours().eval(), [], cls.forward
    assert model.why_not_cached() is None
    monkeypatch.setattr(cls, "forward", lambda self, *args: (calls.append(self), forward(self, *args))[1])
    assert model.why_not_cached() == f"{cls.__name__}.forward was replaced"
    model.generate(batch(2, 5)[0], 2)
    of_model = [module for module in model.modules() if type(module) is cls and module is not model.transformer.h[0].attn.attn_dropout
                and module is not model.transformer.h[1].attn.attn_dropout]            # nanoGPT calls it in its slow path alone
    assert set(calls) == set(of_model) and len(calls) == 2 * len(of_model)


@pytest.mark.parametrize("name", sorted(touched.FUNCTIONS.keys() - {"relu"}))      # nanoGPT calls all but this one
def test_c21_a_function_set_in_torch_nn_functional_is_called(name, monkeypatch):
    """As context parallelism, SageAttention and profilers do."""
    function, calls = getattr(F, name), []
    monkeypatch.setattr(F, name, lambda *args, **kwargs: (calls.append(1), function(*args, **kwargs))[1])
    counts = []
    for model in (theirs(block_size=256), ours(block_size=256)):
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)         # auto says what it steps aside from
            model(*batch(4, 256))[1].backward()
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
    if name not in ("cross_entropy", "dropout"):
        assert model.eval().why_not_cached() == f"torch.nn.functional.{name} was replaced"


@pytest.mark.skipif(cpu_layer_norm.MISSING is not None, reason="the extension is not built: no C++ compiler")
def test_c21_a_replaced_function_is_said_once_and_fused_runs_the_kernel(monkeypatch):
    backend._noticed.clear()
    monkeypatch.setattr(F, "layer_norm", functools.partial(F.layer_norm))
    x, weight = torch.randn(64, 128).bfloat16(), torch.ones(128)
    with pytest.warns(RuntimeWarning, match=r"layer_norm runs on plain PyTorch \(torch.nn.functional.layer_norm was replaced\)") as said:
        for _ in range(2):
            ops.layer_norm(x, weight, None)
    assert len(said) == 1
    assert norm.implementation(x, weight, None, backend="fused") == "cpp"


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "layer_norm"])
@pytest.mark.parametrize("by", ["lambda *args, **more: function(*args, **more)", "functools.partial(function)"])
def test_c21_a_function_replaced_before_the_import_is_seen_until_it_is_put_back(name, by):
    program = ("import functools, torch.nn as nn, torch.nn.functional as F\n"
               f"function, forward = F.{name}, nn.Linear.forward\n"
               f"F.{name} = {by}\n"
               "nn.Linear.forward = lambda self, x: forward(self, x)\n"
               "from nanogpt_fast import touched\n"
               "print(touched.replaced(*touched.FUNCTIONS), touched.altered(nn.Linear(2, 2)), touched.altered(nn.GELU()))\n"
               f"F.{name}, nn.Linear.forward = function, forward\n"
               "print(touched.replaced(*touched.FUNCTIONS), touched.altered(nn.Linear(2, 2)))")
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found == f"torch.nn.functional.{name} was replaced Linear.forward was replaced None\nNone None\n"


def test_c21_a_subclass_may_name_its_own_methods_as_it_likes():
    class Own(GPT):
        def embed(self, idx):
            return self.transformer.wte(idx)            # without positions, for a probe
        def lookup(self, word):
            return 0
    model, plain, x = ours().eval(), theirs().eval(), batch(2, 5)[0]
    model.__class__ = Own
    assert torch.equal(model(x, x)[1], plain(x, x)[1])
    assert torch.equal(model.generate(x, 3, temperature=0), ours().eval().generate(x, 3, temperature=0))


@pytest.mark.parametrize("base", [Block, LayerNorm, CausalSelfAttention, MLP])
def test_c21_a_class_bound_to_one_of_ours_names_is_used(base, monkeypatch):
    class Own(base):
        def forward(self, x):
            return 2 * super().forward(x)
    monkeypatch.setattr(nanogpt_fast.model, base.__name__, Own)
    model, x = ours().eval(), batch(2, 5)[0]
    assert model.why_not_cached() == "Own is no class of nanogpt_fast or PyTorch"
    assert model.transformer.h[0].why_not_fused() == "Own is no class of nanogpt_fast or PyTorch"
    tokens = model.generate(x, 3, temperature=0)
    assert torch.equal(tokens[:, -1], model(tokens[:, :-1])[0][:, -1].argmax(-1))


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
