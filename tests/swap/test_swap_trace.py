"""accelerate leaves no trace: what a trial does to a model, what a forward does besides its formula, what is set after the swap.

Each fork here differs from tests/checkout/model.py in one thing. `on_ops` makes swapped modules take their formulas although no kernel
runs, so that what a formula drops shows as a number.
"""
import copy
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from forks import fork

import nanogpt_fast
from nanogpt_fast.swap import Swapped, parts, stage


@pytest.fixture
def on_ops(monkeypatch):
    monkeypatch.setattr(parts, "_why_reference", lambda *args: None)


def batch(T=17, B=2):
    g = torch.Generator().manual_seed(5)
    return torch.randint(65, (B, T), generator=g), torch.randint(65, (B, T), generator=g)


def run(model, *args):
    torch.manual_seed(7)
    return model(*args)


def left(report):
    return {row.path: row.reason for row in report.left}


def attend(self, x, causal=True):
    q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).split(self.n_embd, dim=2))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=causal)
    return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def put(name, forward, **attributes):
    """A change of a fork: the class `name` gets another forward, and its instances attributes."""
    def change(module):
        own = getattr(module, name)
        def __init__(self, *args, **kwargs):
            own.__init__(self, *args, **kwargs)
            for key, value in attributes.items():
                setattr(self, key, copy.deepcopy(value))
        setattr(module, name, type(name, (own,), {"__init__": __init__, "forward": forward, "__module__": module.__name__}))
    return change


# 1. A trial leaves no trace


def everything(model):
    """What is in a model, tensors by value, everything else by who it is or, where it is plain, by value."""
    def token(value):
        if isinstance(value, torch.Tensor):
            return id(value), value._version, value.detach().clone().numpy().tobytes()
        if isinstance(value, dict):
            return [(key, token(item)) for key, item in value.items()]
        return value if isinstance(value, stage.PLAIN) else id(value)
    return [(name, type(m), token(m.__dict__)) for name, m in model.named_modules()]


def recording(module, log):
    """A fork that notes each touch: of train(), hooks, attributes, its class, its globals, random numbers."""
    module.CALLS, module.NAMES = 0, []

    class CausalSelfAttention(module.CausalSelfAttention):
        calls = 0

        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("bias", torch.zeros(3))
            self.seen = {"T": []}

        def forward(self, x):
            self.bias.mul_(0.9).add_(x.mean())
            self.last, self.seen["T"] = x, [*self.seen["T"], x.size(1)]
            type(self).calls += 1
            module.CALLS += 1
            module.NAMES.append("attention")
            np.random.rand(), random.random(), torch.rand(3)
            print("a forward")
            return super().forward(x)

        def train(self, mode=True):
            log.append("train")
            return super().train(mode)

        def __setattr__(self, name, value):
            log.append(f"set {name}")
            super().__setattr__(name, value)

        def __deepcopy__(self, memo):
            log.append("deepcopy")
            return self
    module.CausalSelfAttention = CausalSelfAttention


def test_a_trial_leaves_no_trace_in_a_model_that_records_every_touch(capsys, monkeypatch):
    log, modules = [], []
    model = fork(change=lambda module: (modules.append(module), recording(module, log)), dropout=0.1)
    for m in model.modules():
        m.register_forward_hook(lambda m, args, out: log.append(f"hook of {type(m).__name__}"))
        m.register_forward_pre_hook(lambda m, args: log.append("pre-hook"))
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: log.append("global hook"))
    log.clear()
    before = everything(model), random.getstate(), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: log.append("seed of the GPUs"))
    numpys = np.random.get_state(legacy=False)["state"]["pos"]
    report = nanogpt_fast.accelerate(model)
    handle.remove()
    assert set(log) == {"set last"} and capsys.readouterr().out == ""        # what the forward itself called, on a copy
    reason = left(report)["transformer.h.0.attn"]
    assert reason.startswith("its forward does more than return"), reason
    nanogpt_fast.restore(model)
    assert set(log) == {"set last"}
    assert everything(model) == before[0] and random.getstate() == before[1] and torch.equal(torch.get_rng_state(), before[2])
    assert np.random.get_state(legacy=False)["state"]["pos"] == numpys
    module, = modules
    assert module.CALLS == 0 == module.CausalSelfAttention.calls and module.NAMES == []


def batch_norm(module):
    class Block(module.Block):
        def __init__(self, config):
            super().__init__(config)
            self.ln_1 = nn.Sequential(nn.LayerNorm(config.n_embd), Rows(nn.BatchNorm1d(config.n_embd)))
    module.Block = Block


class Rows(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def test_batch_norms_take_in_nothing_of_a_trial():
    model = fork(change=batch_norm)
    before = everything(model)
    nanogpt_fast.accelerate(model)
    nanogpt_fast.restore(model)
    assert everything(model) == before


def test_merged_lora_stays_merged():
    """peft merges and unmerges in merge(), loralib in train() and eval(): weights move there."""
    class Lora(nn.Linear):
        merged = True
        def train(self, mode=True):
            if mode == self.merged:
                self.weight.data += -0.4 if mode else 0.4
                self.merged = not mode
            return super().train(mode)
    def change(module):
        class CausalSelfAttention(module.CausalSelfAttention):
            def __init__(self, config):
                super().__init__(config)
                self.c_attn = Lora(config.n_embd, 3 * config.n_embd)
        module.CausalSelfAttention = CausalSelfAttention
    model = fork(change=change)
    before = everything(model)
    report = nanogpt_fast.accelerate(model)
    assert "transformer.h.0.attn" not in left(report)
    nanogpt_fast.restore(model)
    assert everything(model) == before


def test_a_module_that_lets_no_attribute_be_set_is_swapped_and_restored():
    def change(module):
        class MLP(module.MLP):
            def __setattr__(self, name, value):
                if "done" in self.__dict__:
                    raise AttributeError(f"{name} is not to be set")
                super().__setattr__(name, value)
        module.MLP = MLP
    model = fork(change=change)
    for block in model.transformer.h:
        block.mlp.done = True
    assert len(nanogpt_fast.accelerate(model).swapped) == 12 and nanogpt_fast.restore(model) == 12


@pytest.mark.parametrize("thing, reason", [(torch.Generator(), "is a Generator"), (open, None), ([1, {"a": (2,)}], None)],
                         ids=["generator", "function", "list"])
def test_what_cannot_be_copied_is_not_tried(thing, reason):
    model = fork()
    model.transformer.h[0].attn.thing = thing
    why = left(nanogpt_fast.accelerate(model)).get("transformer.h.0.attn")
    assert why is None if reason is None else reason in why


def test_a_function_over_a_module_is_not_tried():
    model = fork()
    block = model.transformer.h[0]
    block.mlpf = lambda x: block.mlp(x)
    assert "mlpf is a function over a Block" in left(nanogpt_fast.accelerate(model))["transformer.h.0"]


# 2. What a forward returns and does besides is part of equal


def pair(self, x):
    return attend(self, x), None


def pairs_first(self, x):
    x = x + self.attn(self.ln_1(x))[0]
    return x + self.mlp(self.ln_2(x))


def listed(self, idx, targets=None):
    return list(type(self).__mro__[1].forward(self, idx, targets))


def test_a_tuple_is_no_tensor(on_ops):
    def change(module):
        put("CausalSelfAttention", pair)(module)
        put("Block", pairs_first)(module)
    model = fork(change=change).eval()
    expected = run(model, *batch())[1]
    report = nanogpt_fast.accelerate(model)
    assert "it returns tuple of a float32 tensor" in left(report)["transformer.h.0.attn"]
    assert torch.equal(run(model, *batch())[1], expected)


def test_a_list_is_no_tuple():
    assert "it returns list of" in left(nanogpt_fast.accelerate(fork(change=put("GPT", listed))))[""]


def keeps_last(self, x):
    y = attend(self, x)
    self.last = y.detach()
    return y


def counts(self, x):
    self.count += 1
    return attend(self, x)


def in_place(self, x):
    x += self.attn(self.ln_1(x))
    return x + self.mlp(self.ln_2(x))


def keeps_hidden(self, idx, targets=None):
    own = type(self).__mro__[1]
    logits, loss = own.forward(self, idx, targets)
    self.last_hidden["logits"] = logits
    return logits, loss


@pytest.mark.parametrize("name, forward, attributes, path, effect", [
    ("CausalSelfAttention", keeps_last, {}, "transformer.h.0.attn", "sets self.last"),
    ("CausalSelfAttention", counts, {"count": 0}, "transformer.h.0.attn", "sets self.count"),
    ("Block", in_place, {}, "transformer.h.0", "sets its arguments[0]"),
    ("GPT", keeps_hidden, {"last_hidden": {}}, "", "sets self.last_hidden['logits']")], ids=["new", "counter", "input", "dict"])
def test_a_forward_that_writes_is_not_swapped(name, forward, attributes, path, effect, on_ops):
    model = fork(change=put(name, forward, **attributes))
    report = nanogpt_fast.accelerate(model)
    assert effect in left(report)[path], left(report)
    if name == "CausalSelfAttention" and not attributes:
        assert "last" not in vars(model.transformer.h[0].attn)


def draws_in_vain(self, x):
    y = attend(self, x)
    F.dropout(y, 0.5)
    return y


def drops_before_the_projection(self, x):
    return self.c_proj(self.dropout(self.gelu(self.c_fc(x))))


@pytest.mark.parametrize("name, forward, path", [("CausalSelfAttention", draws_in_vain, "transformer.h.0.attn"),
                                                 ("MLP", drops_before_the_projection, "transformer.h.0.mlp")])
def test_random_numbers_are_part_of_equal_at_a_rate_of_0_too(name, forward, path):
    assert "it computes something else" in left(nanogpt_fast.accelerate(fork(change=put(name, forward), dropout=0.0)))[path]


def test_a_layer_whose_mask_is_another_is_tried_for_itself():
    def masked(self, x):
        q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).split(self.n_embd, dim=2))
        scores = (q @ k.transpose(-2, -1)) / q.size(-1) ** 0.5
        weights = F.softmax(scores.masked_fill(self.bias[:x.size(1), :x.size(1)] == 0, float("-inf")), dim=-1)
        return self.resid_dropout(self.c_proj((self.attn_dropout(weights) @ v).transpose(1, 2).flatten(2)))
    model = fork(change=put("CausalSelfAttention", masked), n_layer=4)
    for i, block in enumerate(model.transformer.h):
        block.attn.register_buffer("bias", torch.ones(32, 32).tril() if i != 2 else torch.ones(32, 32).tril().triu(-5))
    assert left(nanogpt_fast.accelerate(model)).keys() == {"transformer.h.2", "transformer.h.2.attn"}


# 3. Set or stored after the swap


def may_see_all(self, x):
    return attend(self, x, causal=self.causal)


def may_cache(self, x):
    y = attend(self, x)
    if self.kv_cache is None:
        return y
    self.kv_cache.append(y)
    return sum(self.kv_cache)


def may_save(self, x):
    y = attend(self, x)
    if getattr(self, "save_att", False):
        self.att = y
    return y


def with_losses(self, idx, targets=None):
    pos = torch.arange(idx.size(1))
    x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
    for i, block in enumerate(self.transformer.h):
        if i == getattr(self.config, "early_exit", None):
            break
        x = block(x)
    x = self.transformer.ln_f(x)
    if targets is None:
        return self.lm_head(x[:, [-1], :]), None
    logits = self.lm_head(x)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1, reduction=self.reduction)
    if self.z_loss:
        loss = loss + self.z_loss * logits.logsumexp(-1).square().mean()
    return logits, loss


ROOT = ("GPT", with_losses, {"reduction": "mean", "z_loss": 0.0})


@pytest.mark.parametrize("change, set_it", [
    (("CausalSelfAttention", may_see_all, {"causal": True}), lambda m: setattr(m.transformer.h[0].attn, "causal", False)),
    (("CausalSelfAttention", may_cache, {"kv_cache": None}), lambda m: setattr(m.transformer.h[0].attn, "kv_cache", [torch.ones(1)])),
    (("CausalSelfAttention", may_save, {}), lambda m: setattr(m.transformer.h[0].attn, "save_att", True)),
    (ROOT, lambda m: setattr(m.config, "early_exit", 1)), (ROOT, lambda m: setattr(m, "z_loss", 0.1)),
    (ROOT, lambda m: setattr(m, "reduction", "sum"))], ids=["causal", "kv cache", "save_att", "early exit", "z-loss", "reduction"])
@torch.no_grad()
def test_what_is_set_later_is_obeyed_and_taken_back(change, set_it, on_ops):
    name, forward, attributes = change
    model = fork(change=put(name, forward, **attributes), dropout=0.0)
    plain = copy.deepcopy(model)
    report = nanogpt_fast.accelerate(model)
    assert report.left == [] and torch.allclose(run(model, *batch())[1], run(plain, *batch())[1])
    assert {where for _, where in report.calls} == {"kernels"}
    for m in (model, plain):
        set_it(m)
    found, expected = run(model, *batch())[1], run(plain, *batch())[1]
    assert torch.allclose(found, expected)
    part = {"GPT": "model", "CausalSelfAttention": "attention"}[name]
    assert any("when this was tried" in where for p, where in report.calls if p == part), report
    if "save_att" in vars(plain.transformer.h[0].attn):
        assert torch.allclose(model.transformer.h[0].attn.att, plain.transformer.h[0].attn.att)
        for m in (model, plain):
            del m.transformer.h[0].attn.save_att
            m.transformer.h[0].attn.__dict__.pop("att")
        assert model.transformer.h[0].attn.changed() is None
    for twin in (copy.deepcopy(model),):
        assert torch.equal(run(twin, *batch())[1], run(model, *batch())[1])


def test_what_nothing_reads_may_be_set(on_ops):
    model = fork(dropout=0.0)
    report = nanogpt_fast.accelerate(model)
    for m in model.modules():
        m.ds_id, m._hf_note = 3, "a library's"
    model.transformer.h[0].attn.dropout = 0.2
    model(*batch())
    assert {where for _, where in report.calls} == {"kernels"}


def test_the_eps_of_a_layer_norm_is_watched_where_it_is_fixed(on_ops):
    def change(module):
        class Block(module.Block):
            def __init__(self, config):
                super().__init__(config)
                self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        module.Block = Block
    model = fork(change=change, dropout=0.0)
    plain = copy.deepcopy(model)
    report = nanogpt_fast.accelerate(model)
    assert report.left == []
    for m in (model, plain):
        m.transformer.h[1].ln_2.eps = 0.5
    assert torch.allclose(run(model, *batch())[1], run(plain, *batch())[1])
    assert [path for path, _ in report.unfused] == ["transformer.h.1"]


def far_rule(self, x):
    y = attend(self, x)
    return y if x.size(1) <= 1024 else y * 0.5


def test_a_rule_for_far_positions_is_met():
    model = fork(change=put("CausalSelfAttention", far_rule), block_size=1040, n_layer=1, n_embd=8)
    assert "it computes something else" in left(nanogpt_fast.accelerate(model))["transformer.h.0.attn"]


def test_more_tokens_than_were_tried_take_the_own_path(on_ops):
    attn = fork().transformer.h[0].attn
    report = nanogpt_fast.accelerate(nn.ModuleList([attn]))
    attn(torch.randn(1, 1024, 32)), attn(torch.randn(1, 1025, 32))
    assert report.calls == {("attention", "kernels"): 1, ("attention", "own path: 1025 tokens, more than the 1024 that it was tried with"): 1}


# 4. Rules that a few random numbers miss


def clipped_qkv(self, x):
    q, k, v = (t.clamp(-8, 8).unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).split(self.n_embd, dim=2))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
    return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def clipped_activations(self, x):
    return self.dropout(self.c_proj(self.gelu(self.c_fc(x)).clamp(max=100)))


def one_id_masked(self, idx, targets=None):
    if targets is not None:
        targets = torch.where(targets == 50256, -1, targets)
    return type(self).__mro__[1].forward(self, idx, targets)


def looks_at_the_numbers(self, x):
    return attend(self, x, causal=bool(x.abs().max() < 1e6))


def caps_softly(self, x):
    return self.dropout(self.c_proj(1e4 * torch.tanh(self.gelu(self.c_fc(x)) * 1e-4)))


def rounds(self, x):
    return attend(self, x + (1e-6 * x).int())


def straight_through(self, x):
    y = type(self).__mro__[1].forward(self, x)
    return x + (y - x).detach() if x.requires_grad else y


def gradient_clip(self, x):
    return Clip.apply(type(self).__mro__[1].forward(self, x))


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1e-3, 1e-3)


def zeros_are_special(self, x):
    x = x + self.attn(self.ln_1(x))
    return x.masked_fill(x == 0, 1.0) + self.mlp(self.ln_2(x))


@pytest.mark.parametrize("name, forward, path, why", [
    ("Block", zeros_are_special, "transformer.h.0", "eq, masked_fill"),
    ("CausalSelfAttention", clipped_qkv, "transformer.h.0.attn", "clamp"), ("MLP", clipped_activations, "transformer.h.0.mlp", "clamp"),
    ("GPT", one_id_masked, "", "eq"), ("CausalSelfAttention", looks_at_the_numbers, "transformer.h.0.attn", "abs"),
    ("MLP", caps_softly, "transformer.h.0.mlp", "away from"), ("CausalSelfAttention", rounds, "transformer.h.0.attn", "to torch.int32"),
    ("MLP", straight_through, "transformer.h.0.mlp", "gradients"), ("MLP", gradient_clip, "transformer.h.0.mlp", "gradients")],
    ids=["zeros are special", "qkv clipped", "activations clipped", "one id masked", "branch on values", "a soft cap", "rounding", "straight through", "gradients clipped"])
def test_a_rule_that_the_trial_does_not_meet_is_seen_in_the_operations(name, forward, path, why):
    reason = left(nanogpt_fast.accelerate(fork(change=put(name, forward))))[path]
    assert reason.startswith("it computes something else") and why in reason


# 5. Calls that a formula does not know


def samples(self, idx, targets=None):
    if isinstance(targets, int):
        return "a sampling step"
    return type(self).__mro__[1].forward(self, idx, targets)


def test_targets_that_are_no_tensor_take_the_own_path(on_ops):
    model = fork(change=put("GPT", samples))
    report = nanogpt_fast.accelerate(model)
    assert report.left == []
    x, _ = batch()
    assert model(x, 0) == model(x, targets=0) == "a sampling step"
    assert report.calls == {("model", "own path: an input that is no tensor"): 2}


def with_mask(self, x, attn_mask=None, is_causal=True, *, note="none"):
    return attend(self, x, causal=is_causal) if attn_mask is None else x


def passes_defaults(self, x):
    x = x + self.attn(self.ln_1(x), attn_mask=None, is_causal=True)
    return x + self.mlp(self.ln_2(x))


def test_default_arguments_that_are_passed_on_are_none(on_ops):
    def change(module):
        put("CausalSelfAttention", with_mask)(module)
        put("Block", passes_defaults)(module)
    model = fork(change=change, dropout=0.0)
    plain = copy.deepcopy(model)
    report = nanogpt_fast.accelerate(model)
    attn, twin, x = model.transformer.h[0].attn, plain.transformer.h[0].attn, torch.randn(2, 5, 32)
    assert report.left == []
    for args, keywords in (((x,), {}), ((x, None, True), {}), ((x,), dict(attn_mask=None, is_causal=True, note="none")), ((x, x), {}),
                           ((x,), dict(is_causal=False)), ((x,), dict(note="other"))):
        assert torch.allclose(attn(*args, **keywords), twin(*args, **keywords), atol=1e-6)
    assert report.calls == {("attention", "kernels"): 3, ("attention", "own path: the argument attn_mask"): 1,
                            ("attention", "own path: the argument is_causal"): 1, ("attention", "own path: the argument note"): 1}


def test_torch_compile_traces_a_swapped_block_with_all_its_checks_whole(on_ops):
    model = fork(dropout=0.0)
    nanogpt_fast.accelerate(model)
    block, x = model.transformer.h[0], torch.randn(2, 5, 32)
    expected = block(x)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    block.mlp.gelu.approximate = "tanh"         # a compiled graph is guarded by it
    assert not torch.equal(compiled(x), expected) and torch.equal(compiled(x), block(x))


def test_generation_with_a_static_cache_compiles_whole(on_ops):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
                                     pad_token_id=0)
    model, x = transformers.GPT2LMHeadModel(config).eval(), torch.randint(1, 61, (2, 5))
    call = dict(max_new_tokens=4, do_sample=False, cache_implementation="static", attention_mask=torch.ones_like(x))
    expected = model.generate(x, **call)
    nanogpt_fast.accelerate(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(x, **call), expected)


def test_every_module_that_is_swapped_says_so():
    model = fork()
    nanogpt_fast.accelerate(model)
    assert all(m.changed() is None for m in model.modules() if isinstance(m, Swapped))


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
                         ids=["inference mode", "no_grad", "autocast", "a default device"])
def test_a_trial_does_not_depend_on_what_is_around_it(around):
    model = fork()
    with around():
        report = nanogpt_fast.accelerate(model)
    assert report.left == [] and len(report.swapped) == 12


def test_what_a_trial_cannot_look_at_is_left_alone():
    model = fork()
    model.transformer.h[0].attn.thing = torch.eye(3).to_sparse()
    assert "is not a dense tensor" in left(nanogpt_fast.accelerate(model))["transformer.h.0.attn"]
