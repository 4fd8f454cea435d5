"""Accelerated models on kernels: the kernels run, results lie on the own path's, and what they cannot do goes the own way, counted."""
import copy

import pytest
import torch
import torch.nn as nn
from forks import SMALL, fork, may_see_all, put
from relatives import BuildBlock, MinAttention

import nanogpt_fast
from nanogpt_fast import classic


def nano(**changes):
    return fork(dropout=0.0, **changes)


def classic_gpt():
    return classic.ClassicGPT(classic.ClassicConfig(**{**SMALL, "dropout": 0.0}))


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=65, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
                                     attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def stirred(model, device):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(device)


def step(model, x, y):
    """(logits, gradients by name): of nanoGPT's kind of model, or of transformers'."""
    model.zero_grad(set_to_none=True)
    if hasattr(model, "generation_config"):
        out = model(x, labels=y)
        logits, loss = out.logits, out.loss
    else:
        logits, loss = model(x, y)
    loss.backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_close(a, b):
    """Two fp32 paths: a few roundings of the largest value."""
    scale = b.abs().max().clamp(min=1e-6)
    assert (a - b).abs().max() <= 1e-4 * scale + 1e-7


@pytest.mark.parametrize("make,root", [(nano, 1), (classic_gpt, 0), (gpt2, 0)], ids=["nanogpt", "classic", "gpt2"])
def test_the_kernels_run_and_logits_and_gradients_are_the_own_paths(make, root, device):
    model = stirred(make(), device)
    x, y = torch.randint(65, (1, 9), device=device), torch.randint(65, (1, 9), device=device)
    logits, grads = step(model, x, y)
    report = nanogpt_fast.accelerate(model, backend="fused")
    assert report.left == []
    fused_logits, fused_grads = step(model, x, y)
    assert {where for _, where in report.calls} == {"kernels"}
    # A swapped nanoGPT walks its untouched blocks itself; the others are called, and call their parts.
    expected = {"model": 1} if root else {"attention": 2, "block": 2, "mlp": 2, "layer_norm": 3}
    assert {part: n for (part, _), n in report.calls.items()} == expected
    assert not torch.equal(fused_logits, logits)
    assert_close(fused_logits, logits)
    for name in grads:
        assert_close(fused_grads[name], grads[name])
    nanogpt_fast.restore(model)
    assert torch.equal(step(model, x, y)[0], logits)


def test_a_fork_with_a_forward_of_its_own_still_has_fused_blocks(device):
    def scaled(module):
        class GPT(module.GPT):
            def forward(self, idx, targets=None):
                logits, loss = super().forward(idx, targets)
                return logits / 2, loss
        module.GPT = GPT
    model = stirred(fork(change=scaled, dropout=0.0), device)
    x = torch.randint(65, (1, 9), device=device)
    expected = model(x, x)[0]
    report = nanogpt_fast.accelerate(model, backend="fused")
    assert_close(model(x, x)[0], expected)
    assert report.calls == {("block", "kernels"): 2, ("layer_norm", "kernels"): 1}


def test_a_forks_own_call_is_called(device):
    def own(module):
        module.GPT.__call__ = lambda self, *args: [*nn.Module.__call__(self, *args), "its own"]
    model = stirred(fork(change=own, dropout=0.0), device)
    x = torch.randint(65, (1, 9), device=device)
    report = nanogpt_fast.accelerate(model, backend="fused")
    assert report.left == [] and model(x, x)[2] == "its own" and report.calls == {("model", "kernels"): 1}


@pytest.mark.parametrize("name", ["_hidden", "_logits_and_loss"])
def test_a_fork_whose_name_for_something_else_our_forward_needs_is_named(name, device):
    model = stirred(fork(change=lambda module: setattr(module.GPT, name, None)), device)
    assert nanogpt_fast.accelerate(model, backend="fused").left[0].reason == f"it has a {name} of its own"


def test_what_a_user_changed_afterwards_is_honoured(device):
    model = stirred(nano(), device)
    twin = copy.deepcopy(model)
    report = nanogpt_fast.accelerate(model, backend="fused")
    for m in (model, twin):
        m.transformer.h[0].ln_2.register_forward_hook(lambda module, args, out: 3 * out)
        m.transformer.h[1].mlp.c_fc = nn.Sequential(m.transformer.h[1].mlp.c_fc, nn.Hardtanh())
    x = torch.randint(65, (1, 9), device=device)
    assert_close(model(x, x)[0], twin(x, x)[0])
    assert {path for path, _ in report.unfused} == {"transformer.h.0", "transformer.h.1.mlp"}


def test_dropout_is_drawn_by_the_kernels_and_only_in_training(device):
    model = stirred(fork(dropout=0.5), device)
    report = nanogpt_fast.accelerate(model, backend="fused")
    x = torch.randint(65, (1, 9), device=device)
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(model(x, x)[1].item())
    assert losses[0] == losses[2] != losses[1]
    model.eval()
    assert torch.equal(model(x, x)[0], model(x, x)[0]) and {where for _, where in report.calls} == {"kernels"}


def test_masks_and_past_keys_take_the_own_path_and_are_counted(device):
    model = stirred(gpt2(), device).eval()
    x = torch.randint(1, 65, (2, 7), device=device)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(x, attention_mask=mask).logits
        text = model.generate(x, max_new_tokens=3, min_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(x))
        report = nanogpt_fast.accelerate(model, backend="auto,attention=fused")
        assert torch.allclose(model(x, attention_mask=mask).logits, expected, atol=1e-5)
        assert report.calls["attention", "own path: an attention mask"] == 2
        assert torch.equal(model.generate(x, max_new_tokens=3, min_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(x)), text)
    assert report.calls["attention", "kernels"] == 2 and report.calls["attention", "own path: past key values"] == 4
    assert "own path: an attention mask" in str(report)


def test_blocks_without_dropouts_and_minGPT_s_attention_run_on_kernels(device):
    for make, parts, kernels in ((BuildBlock, 5, {"block": 1, "layer_norm": 1}), (MinAttention, 1, {"attention": 1})):
        model = nn.ModuleList([make()]).to(device).eval()
        twin, x = copy.deepcopy(model), torch.randn(2, 9, 32, device=device)
        report = nanogpt_fast.accelerate(model, backend="fused")
        assert report.left == [] and len(report.swapped) == parts
        found, expected = model[0](x), twin[0](x)
        assert_close(found, expected)
        assert {where for _, where in report.calls} == {"kernels"} and report.calls.get(("attention", "kernels"), 0) == kernels.get("attention", 0)


def test_an_attribute_that_is_set_later_takes_its_block_off_the_fused_path(device):
    model = stirred(fork(change=put("CausalSelfAttention", may_see_all, causal=True), dropout=0.0), device)
    twin, x = copy.deepcopy(model), torch.randint(65, (1, 9), device=device)
    report = nanogpt_fast.accelerate(model, backend="fused")
    assert_close(model(x, x)[0], twin(x, x)[0])
    assert report.calls == {("model", "kernels"): 1} and report.unfused == []
    for m in (model, twin):
        m.transformer.h[1].attn.causal = False
    assert_close(model(x, x)[0], twin(x, x)[0])
    assert report.unfused == [("transformer.h.1", "causal has changed since the swap")]
    assert report.calls["attention", "own path: causal has changed since the swap"] == 1


def hook(model, monkeypatch):
    model[0].attn_dropout.register_forward_hook(lambda module, args, out: 2 * out)


def another_dropout(model, monkeypatch):
    model[0].attn_dropout = nn.Identity()


@pytest.mark.parametrize("change, said", [(hook, "Dropout has a hook"), (another_dropout, "Identity replaces Dropout")])
def test_a_touched_dropout_of_the_attention_is_called(change, said, device, monkeypatch):
    model = nn.ModuleList([MinAttention()]).to(device).eval()
    twin, x = copy.deepcopy(model), torch.randn(2, 9, 32, device=device)
    report = nanogpt_fast.accelerate(model, backend="fused")
    for m in (model, twin):
        change(m, monkeypatch)
    assert_close(model[0](x), twin[0](x))
    assert list(report.calls) == [("attention", f"own path: {said}")]


class Doubled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


@pytest.mark.parametrize("parent, name", [("", "lm_head"), ("transformer", "wte"), ("transformer", "ln_f")])
def test_a_wrapped_module_is_called(parent, name, device):
    model = stirred(fork(dropout=0.0), device)
    twin, x = copy.deepcopy(model), torch.randint(65, (1, 9), device=device)
    nanogpt_fast.accelerate(model, backend="fused")
    for m in (model, twin):
        setattr(m.get_submodule(parent), name, Doubled(m.get_submodule(parent).get_submodule(name)))
    for found, expected in zip(model(x, x), twin(x, x), strict=True):
        assert_close(found, expected)


def test_a_forward_set_on_the_activations_class_after_the_swap_is_called(device, monkeypatch):
    model = stirred(fork(dropout=0.0), device)
    twin, x = copy.deepcopy(model), torch.randint(65, (1, 9), device=device)
    nanogpt_fast.accelerate(model, backend="fused")
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: x.relu())
    assert_close(model(x, x)[0], twin(x, x)[0])


def test_a_forward_set_on_the_forks_class_after_the_swap_is_called(device, monkeypatch):
    model = stirred(fork(dropout=0.0), device)
    twin, x, own = copy.deepcopy(model), torch.randint(65, (1, 9), device=device), type(model.transformer.h[0].mlp)
    report, forward = nanogpt_fast.accelerate(model, backend="fused"), own.forward
    monkeypatch.setattr(own, "forward", lambda self, x: 3 * forward(self, x))
    assert_close(model(x, x)[0], twin(x, x)[0])
    assert [reason for _, reason in report.unfused] == ["MLP.forward was replaced since the swap"] * len(model.transformer.h)
    assert_close(copy.deepcopy(model)(x, x)[0], twin(x, x)[0])                             # another forward than the one that was tried
    again = nanogpt_fast.accelerate(copy.deepcopy(twin), backend="fused")
    assert {row.reason == "" for row in again.rows if row.part == "mlp"} == {False}         # tried anew, with the new forward


@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_that_writes_its_weights_out_does_so(when, device):
    model = stirred(nano(), device)
    if when == "before":
        model.transformer.h[1].attn.flash = False
    report = nanogpt_fast.accelerate(model, backend="fused")
    model.transformer.h[1].attn.flash = False
    model(torch.randint(65, (1, 9), device=device))
    (path, reason), = report.unfused
    assert path == "transformer.h.1" and "flash" in reason
    assert {where for part, where in report.calls if part == "attention"} == {f"own path: {reason}"}
