"""What counts as equal when accelerate tries a part: its results, its side effects, its random numbers, rules that the trial's inputs do not
meet, and what is set after the swap.

Each fork here differs from tests/checkout/model.py in one thing.
"""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from forks import attend, batch, fork, left, may_see_all, put, run

import nanogpt_fast


# 1. What a forward returns and does besides is part of equal


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


# 2. Set or stored after the swap


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
    assert any("since the swap" in where for p, where in report.calls if p == part), report
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
    assert report.calls == {("attention", "kernels"): 1, ("attention", "own path: 1025 tokens, more than the 1024 that were tried"): 1}


# 3. Rules that a few random numbers miss


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


# 4. Calls that a formula does not know


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
    assert report.calls == {("model", "own path: an input that is not a tensor"): 2}


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
