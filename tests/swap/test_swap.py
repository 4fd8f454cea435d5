"""accelerate and restore: what is recognised, what is refused, and that nothing but the class of a module changes.

The fork is tests/checkout/model.py (or the one of the checkout that NANOGPT_DIR names). On a CPU no kernel runs, so every comparison is bit for bit;
tests/kernels/test_swap_kernels.py does the same on kernels.
"""
import contextlib
import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from forks import SMALL, fork

import nanogpt_fast
from nanogpt_fast import backend, classic
from nanogpt_fast.ops.cpu import attention as attention_cpu
from nanogpt_fast.swap import parts


def classic_gpt(**changes):
    torch.manual_seed(0)
    return classic.ClassicGPT(classic.ClassicConfig(**{**SMALL, **changes}))


def batch(seed=5, T=17):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(65, (3, T), generator=g), torch.randint(65, (3, T), generator=g)


def result(model, seed=7):
    """[logits, loss, gradients ...] of a step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits, loss = model(*batch())
    loss.backward()
    return [logits, loss, *(p.grad for p in model.parameters())]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert torch.equal(x, y)


def swapped(report):
    return sorted(row.part for row in report.swapped)


@pytest.mark.parametrize("make", [fork, classic_gpt], ids=["nanogpt", "classic"])
def test_every_part_is_swapped_and_on_a_cpu_the_step_is_bit_for_bit_the_same(make):
    model = make()
    before = result(model)
    report = nanogpt_fast.accelerate(model)
    root = ["model"] if make is fork else []
    assert swapped(report) == sorted(["attention", "mlp", "block"] * 2 + ["layer_norm"] * 5 + root) and report.left == []
    assert_same(result(model), before)
    assert {where for _, where in report.calls} == {"own path: Triton kernels need a CUDA tensor, this one is on cpu"}


@pytest.mark.parametrize("make", [fork, classic_gpt], ids=["nanogpt", "classic"])
def test_the_formulas_that_replace_a_forward_are_bit_for_bit_its_own_on_plain_pytorch(make, monkeypatch):
    """The own path hides what ours computes; here ours is taken on the reference ops."""
    model = make()
    before = result(model)
    nanogpt_fast.accelerate(model)
    monkeypatch.setattr(parts, "_kernel_why_not", lambda *args: None)
    after = result(model)
    if make is fork:
        assert_same(after, before)
    else:  # the written-out softmax against PyTorch's fused one
        for a, b in zip(after, before):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_restore_undoes_it_exactly():
    model = fork()
    snapshot = lambda: [(name, type(m), dict(m.__dict__), {k: id(v) for k, v in {**m._parameters, **m._modules}.items()})
                        for name, m in model.named_modules()]
    state, rng = snapshot(), torch.get_rng_state()
    nanogpt_fast.accelerate(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [t for _, t, *_ in snapshot()] != [t for _, t, *_ in state]
    assert nanogpt_fast.restore(model) == 12 and nanogpt_fast.restore(model) == 0
    assert snapshot() == state


def test_the_report_is_a_context_manager_that_restores_even_after_an_error():
    model = fork()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), nanogpt_fast.accelerate(model) as report:
        assert len(report.swapped) == 12 and [type(m) for m in model.modules()] != classes
        1 / 0
    assert [type(m) for m in model.modules()] == classes


def test_parameters_names_modes_ties_and_class_names_stay():
    model = fork().eval()
    model.transformer.h[0].train()
    before = {name: id(p) for name, p in model.named_parameters()}
    modes, keys, text = [m.training for m in model.modules()], list(model.state_dict()), repr(model)
    cls = type(model)
    nanogpt_fast.accelerate(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [m.training for m in model.modules()] == modes and list(model.state_dict()) == keys and repr(model) == text
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model, cls) and type(model).generate is cls.generate and type(model).configure_optimizers is cls.configure_optimizers


def train(model, optimizer, steps, on_step=lambda i: None):
    losses = []
    for i in range(steps):
        on_step(i)
        torch.manual_seed(i)
        loss = model(*batch(seed=i % 3))[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def test_a_half_trained_model_goes_on_on_the_same_curve():
    adamw = lambda model: model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    plain_model, model = fork(), fork()
    expected = train(plain_model, adamw(plain_model), 12)
    switch = {4: lambda: nanogpt_fast.accelerate(model), 8: lambda: nanogpt_fast.restore(model)}
    assert train(model, adamw(model), 12, lambda i: switch.get(i, int)()) == expected
    assert expected[-1] < expected[0]


def test_a_second_call_starts_anew_and_a_choice_of_backend_is_taken():
    model = fork()
    nanogpt_fast.accelerate(model)
    assert len(nanogpt_fast.accelerate(model, backend="reference").swapped) == 12
    model(*batch())
    assert nanogpt_fast.accelerate(model).calls == {}
    if not (torch.cuda.is_available() or backend.interpreted()):
        nanogpt_fast.accelerate(model, backend="fused")
        with pytest.raises(RuntimeError, match="backend='fused', but no kernel can run"):
            model(*batch())
    with pytest.raises(ValueError, match="'quick' is not one of"):
        nanogpt_fast.accelerate(model, backend="quick")


# Forks that compute something else

def left(model):
    report = nanogpt_fast.accelerate(model)
    return {row.path: row.reason for row in report.left}


def window(module):
    class CausalSelfAttention(module.CausalSelfAttention):
        def forward(self, x):
            q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).split(self.n_embd, dim=2))
            T = x.size(1)
            mask = torch.ones(T, T, dtype=torch.bool).tril().triu(-24)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
            return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))
    module.CausalSelfAttention = CausalSelfAttention


def dropout_elsewhere(module):
    class MLP(module.MLP):
        def forward(self, x):
            return self.c_proj(self.dropout(self.gelu(self.c_fc(x))))
    module.MLP = MLP


def parallel(module):
    class Block(module.Block):
        def forward(self, x):
            return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))
    module.Block = Block


def softcap(module):
    class GPT(module.GPT):
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            return 15 * torch.tanh(logits / 15), loss
    module.GPT = GPT


def other_eps(module):
    class LayerNorm(module.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-3)
    module.LayerNorm = LayerNorm


def zero_init(module):
    """A difference that the weights hide: every branch ends in a matrix of zeros."""
    window(module)
    class Zeroed(module.GPT):
        def __init__(self, config):
            super().__init__(config)
            for block in self.transformer.h:
                nn.init.zeros_(block.attn.c_proj.weight)
    module.GPT = Zeroed


@pytest.mark.parametrize("change,expected", [
    (window, {"transformer.h.0.attn"}), (dropout_elsewhere, {"transformer.h.0.mlp"}), (parallel, {"transformer.h.0"}), (softcap, {""}),
    (other_eps, {"transformer.h.0.ln_1"}), (zero_init, {"transformer.h.0.attn"})], ids=lambda v: getattr(v, "__name__", ""))
def test_a_fork_that_computes_something_else_keeps_its_own_forward(change, expected):
    model = fork(change=change)
    before = result(model)
    reasons = left(model)
    for path in expected:
        assert "it computes something else" in reasons[path], reasons
    assert_same(result(model), before)


def test_other_modules_other_parameters_and_odd_activations_are_named():
    model = fork()
    model.transformer.h[0].mlp.gelu = nn.SiLU()
    model.transformer.h[0].attn.q_norm = nn.LayerNorm(16)
    model.transformer.h[1].attn.temperature = nn.Parameter(torch.ones(()))
    model.transformer.h[1].mlp.forward = lambda x: x
    reasons = left(model)
    assert reasons["transformer.h.0.mlp"] == "its activation is a SiLU"
    assert reasons["transformer.h.0.attn"] == "it also has q_norm"
    assert reasons["transformer.h.1.attn"] == "it also has temperature"
    assert reasons["transformer.h.1.mlp"] == "its forward was replaced on the instance"
    assert "attn is a CausalSelfAttention that was not swapped" in reasons["transformer.h.0"]


def test_a_post_norm_classic_gpt_keeps_its_blocks():
    report = nanogpt_fast.accelerate(classic_gpt(norm="post"))
    assert {row.reason for row in report.left} == {"post-norm"} and swapped(report).count("attention") == 2


def test_a_hook_that_comes_later_is_honoured_and_reported():
    model = fork()
    report = nanogpt_fast.accelerate(model)
    assert report.unfused == []
    handle = model.transformer.h[1].ln_2.register_forward_hook(lambda module, args, out: 0 * out)
    assert [path for path, _ in report.unfused] == ["transformer.h.1"] and "has a hook" in str(report)
    assert model(*batch())[1].isfinite()
    handle.remove()
    assert report.unfused == []


def test_what_holds_no_gpt_is_a_clear_error():
    with pytest.raises(TypeError, match="Sequential holds no part of a GPT that is known here"):
        nanogpt_fast.accelerate(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="takes a torch.nn.Module; this is a dict"):
        nanogpt_fast.accelerate({})


def test_our_own_gpt_has_nothing_to_swap():
    with contextlib.redirect_stdout(io.StringIO()):
        model = nanogpt_fast.GPT(nanogpt_fast.GPTConfig(**SMALL))
    report = nanogpt_fast.accelerate(model)
    assert report.rows == [] and str(report) == "swapped  nothing: its classes are nanogpt_fast's already"


# Copies

def test_copies_and_pickles_stay_accelerated_and_restore_alone():
    model = fork()
    nanogpt_fast.accelerate(model, backend="reference")
    expected = result(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), load(model)):
        assert type(twin) is type(model) and twin.transformer.h[0].backend["mlp"] == "reference"
        assert twin.lm_head.weight is twin.transformer.wte.weight is not model.lm_head.weight
        assert_same(result(twin), expected)
        assert nanogpt_fast.restore(twin) == 12
        assert isinstance(model.transformer.h[0], parts.NanoBlock)


def load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_restore_names_a_class_that_was_built_on_ours():
    model = fork()
    nanogpt_fast.accelerate(model)
    nn.utils.parametrize.register_parametrization(model.transformer.h[0].ln_1, "weight", nn.Identity())
    assert model(*batch())[1].isfinite()
    with pytest.raises(RuntimeError, match="h.0.ln_1 became a ParametrizedLayerNorm after it was accelerated"):
        nanogpt_fast.restore(model)
    nn.utils.parametrize.remove_parametrizations(model.transformer.h[0].ln_1, "weight")
    assert nanogpt_fast.restore(model) == 12


# What the report counts, in bf16 on a CPU: attention there has the extension's gradient, for the packed projection without dropout

def gpt2(dropout=0.0):
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=65, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=dropout,
        bos_token_id=0, eos_token_id=0))


@pytest.mark.skipif(attention_cpu.MISSING is not None, reason=str(attention_cpu.MISSING))
@pytest.mark.parametrize("make, dropout, training, kernels", [
    (fork, 0.0, True, 2), (fork, 0.1, True, 0), (fork, 0.1, False, 2), (classic_gpt, 0.0, True, 0), (classic_gpt, 0.1, True, 0),
    (gpt2, 0.0, True, 2), (gpt2, 0.1, True, 0)])
def test_a_call_counts_as_a_kernel_s_where_a_kernel_runs(make, dropout, training, kernels, monkeypatch):
    ran, forward = [], attention_cpu.forward
    monkeypatch.setattr(attention_cpu, "forward", lambda *args: ran.append(1) or forward(*args))
    model = make(dropout=dropout).train(training)
    report = nanogpt_fast.accelerate(model, backend="auto,layer_norm=reference")  # fused blocks call no attention module
    with torch.autocast("cpu", torch.bfloat16):
        model(batch()[0])
    assert report.calls.get(("attention", "kernels"), 0) == len(ran) == kernels
    assert sum(n for (part, _), n in report.calls.items() if part == "attention") == 2
