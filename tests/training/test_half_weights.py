"""Half-precision copies of the weights: cast once a step, with autocast's numbers, and invisible to everything but our own forward."""
import contextlib
import copy
import functools
import re

import gpts
import pytest
import tiny
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt_fast import GPT, GPTConfig
from nanogpt_fast.ops.cpu import linear as linear_cpu
from nanogpt_fast.training import cpu, half_weights, trainer as training
from nanogpt_fast.training.half_weights import HalfWeights
from nanogpt_fast.training.step import TrainingStep

model_of = functools.partial(gpts.small, seed=1, block_size=16, vocab_size=61, backend="reference")


def batch(B=4, T=16, V=61):
    return torch.randint(V, (B, T)), torch.randint(V, (B, T))


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Casts(TorchDispatchMode):
    """Counts how often each of some fp32 tensors is cast to half precision: {data_ptr: times}."""

    def __init__(self, tensors):
        super().__init__()
        self.times = {t.data_ptr(): 0 for t in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._foreach_copy_.default:
            pairs = zip(args[0], args[1])
        elif func is torch.ops.aten.copy_.default:
            pairs = [(args[0], args[1])]
        elif func is torch.ops.aten._to_copy.default:
            pairs = [(out, args[0])]
        else:
            pairs = []
        for target, source in pairs:
            if source.dtype == torch.float32 and target.dtype == torch.bfloat16 and source.data_ptr() in self.times:
                self.times[source.data_ptr()] += 1
        return out


def move(model, weights):
    for name, p in model.named_parameters():
        p.data = weights[name]


@pytest.mark.parametrize("change", [GPT.load_state_dict, move], ids=["loaded", "p.data = ..."])
@pytest.mark.parametrize("captured", [False, True])
def test_weights_changed_between_two_steps_are_the_ones_that_are_used(change, captured):
    model, other, x = model_of(), model_of(seed=2), batch()[0]
    step = TrainingStep(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"), dtype=torch.bfloat16, batch_shape=(4, 16),
                        not_captured=None if captured else "for comparison")
    if captured:
        step.graphs.recorder = gpts.Recorder()
    for i in range(6):
        change(model, {name: p.clone() for name, p in other.state_dict().items()})
        with autocast():
            expected = model(x, x)[1]
        assert step(lambda: (x, x)) == expected, i
        assert step(lambda: (x, x)) != expected


def test_two_modules_that_share_a_weight_share_its_copy():
    model = model_of()
    first, second = (block.mlp.c_fc for block in model.transformer.h)
    second.weight = first.weight
    weights = HalfWeights(model, torch.bfloat16)
    first.weight.grad = torch.ones_like(first.weight)
    cpu.update(torch.optim.SGD([first.weight], lr=0.5), weights, 0.0)
    with weights.in_use():
        assert all(torch.equal(block.mlp.copies[1][0], first.weight.bfloat16()) for block in model.transformer.h)
    assert model.transformer.h[0].mlp.c_fc.weight is first.weight and len({id(copied) for copied in weights.copies}) == 8


def test_a_model_made_double_since_is_named():
    model, x = model_of(), batch()[0]
    step = TrainingStep(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"), dtype=torch.bfloat16, batch_shape=(4, 16),
                        not_captured="a CPU")
    model.double()
    with pytest.raises(RuntimeError, match=r"the model became torch.float64 after the training step was made.*model.float\(\)"):
        step(lambda: (x, x))
    model.float()
    assert step(lambda: (x, x)).isfinite()


@pytest.mark.parametrize("once", [True, False], ids=["copies", "autocast"])
def test_each_weight_is_cast_once_a_step_however_many_micro_batches(once):
    model = model_of()
    weights = HalfWeights(model, torch.bfloat16)
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(weights.copies) == len(matrices) == 9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Casts(matrices) as casts:
        for _ in range(3):
            for _ in range(4):
                with weights.in_use() if once else contextlib.nullcontext(), autocast():
                    loss = model(*batch())[1]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if once:
                weights.refresh()
    assert set(casts.times.values()) == ({3} if once else {12})


def test_the_trainer_casts_once_a_step(tmp_path, monkeypatch):
    tiny.data(tmp_path)
    seen = []
    original = HalfWeights.refresh
    monkeypatch.setattr(HalfWeights, "refresh", lambda self: (seen.append(len(self.copies)), original(self))[1])
    training.train(tiny.options(tmp_path, dtype="bfloat16", max_iters=3, gradient_accumulation_steps=4))
    assert seen == [9, 9, 9]


def test_losses_and_gradients_are_autocasts_bit_for_bit():
    plain, copied = model_of(dropout=0.1), model_of(dropout=0.1)
    weights = HalfWeights(copied, torch.bfloat16)
    optimizers = [m.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu") for m in (plain, copied)]
    for step in range(20):
        torch.manual_seed(step)
        x, y = batch()
        losses = []
        for model, context in ((plain, contextlib.nullcontext()), (copied, weights.in_use())):
            torch.manual_seed(step)
            with context, autocast():
                loss = model(x, y)[1]
            loss.backward()
            losses.append(loss)
        assert torch.equal(*losses)
        for (name, a), b in zip(plain.named_parameters(), copied.parameters(), strict=True):
            assert a.grad.dtype == b.grad.dtype == torch.float32 and torch.equal(a.grad, b.grad), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        weights.refresh()


def test_a_run_in_bfloat16_is_the_run_of_plain_autocast(tmp_path, monkeypatch):
    tiny.data(tmp_path)
    settings = dict(dtype="bfloat16", max_iters=20, gradient_accumulation_steps=2, dropout=0.1)
    copies, plain = tiny.options(tmp_path, "a", **settings), tiny.options(tmp_path, "b", **settings)
    training.train(copies)
    monkeypatch.setattr(half_weights, "_untouched_linears", lambda model: ([], ["asked for"]))
    training.train(plain)
    assert tiny.losses(copies) == tiny.losses(plain) and len(tiny.losses(plain)) == 20


def test_the_embedding_stays_fp32_and_the_tied_weight_gets_both_gradients():
    model = model_of()
    with HalfWeights(model, torch.bfloat16).in_use(), autocast():
        assert model.copies[1][0].dtype == torch.bfloat16
        assert model.transformer.wte.weight.dtype == model._embed(batch()[0]).dtype == torch.float32
        model(torch.full((1, 4), 7), torch.full((1, 4), 9))[1].backward()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.grad[7].abs().max() > 0 and model.lm_head.weight.grad[9].abs().max() > 0


def test_in_float32_there_are_no_copies():
    assert HalfWeights(model_of(), torch.float32).copies == []


def test_parameters_are_back_after_an_error_and_a_frozen_one_stays_frozen():
    model = model_of()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="block size"), HalfWeights(model, torch.bfloat16).in_use():
        model(torch.zeros(1, 17, dtype=torch.long))
    assert all(p is before[name] for name, p in model.named_parameters())
    with HalfWeights(model, torch.bfloat16).in_use(), autocast():
        model(*batch())[1].backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad is None and model.transformer.h[0].mlp.c_proj.weight.grad is not None


def test_a_refresh_between_forward_and_backward_is_noticed():
    model = model_of()
    weights = HalfWeights(model, torch.bfloat16)
    with weights.in_use(), autocast():
        loss = model(*batch())[1]
    weights.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def hooked(model):
    model.transformer.h[0].attn.register_forward_hook(lambda module, args, out: None)


def another_linear(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * nn.functional.linear(x, self.weight.float(), self.bias)  # a cast of its own
    model.transformer.h[0].attn.c_attn.__class__ = Doubled


def another_mlp(model):
    model.transformer.h[0].mlp = nn.Sequential(nn.Linear(32, 32), nn.Tanh())


@pytest.mark.parametrize("touch", [hooked, another_linear, another_mlp], ids=lambda f: f.__name__)
def test_a_touched_block_keeps_autocasts_casts_and_it_is_said(touch):
    model = model_of()
    touch(model)
    weights = HalfWeights(model, torch.bfloat16)
    assert len(weights.copies) == 5 and [text.split(":")[0] for text in weights.why_not] == ["block 0"]
    plain, (x, y) = copy.deepcopy(model), batch()
    with autocast():
        expected = plain(x, y)[1]
    with weights.in_use(), autocast():
        loss = model(x, y)[1]
    assert torch.equal(loss, expected)


def test_a_touched_head_or_model_is_left_alone():
    model = model_of()
    model.lm_head.register_forward_pre_hook(lambda module, args: None)
    assert len(HalfWeights(model, torch.bfloat16).copies) == 8
    class Shifted(GPT):
        pass
    model.__class__ = Shifted
    weights = HalfWeights(model, torch.bfloat16)
    assert weights.copies == [] and "Shifted" in weights.why_not[0]


def test_a_compiled_model_takes_the_copies_without_compiling_again():
    model, (x, y) = model_of(), batch()
    graphs = []
    def counting(graph, inputs):
        graphs.append([t.dtype for t in inputs if isinstance(t, torch.Tensor) and t.dim() == 2])
        return graph.forward
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    weights = HalfWeights(model, torch.bfloat16)
    for _ in range(3):
        with weights.in_use(), autocast():
            loss = compiled(x, y)[1]
        loss.backward()
        weights.refresh()
    assert len(graphs) == 1 and graphs[0].count(torch.bfloat16) == 9
    with autocast():
        assert torch.equal(loss, model(x, y)[1])


def test_a_reason_to_leave_all_is_kept_and_said():
    weights = HalfWeights(model_of(), torch.bfloat16, "asked for")
    assert (weights.copies, weights.why_not) == ([], ["asked for"])


def test_activation_checkpointing_computes_again_with_the_copies():
    from torch.utils.checkpoint import checkpoint
    plain, checked = model_of(dropout=0.2), model_of(dropout=0.2)
    x, y = batch()
    for block in checked.transformer.h:
        block.attn.branch = (lambda branch: lambda x: checkpoint(branch, x, use_reentrant=False))(block.attn.branch)
    for model in (plain, checked):
        weights = HalfWeights(model, torch.bfloat16)
        assert len(weights.copies) == 9
        torch.manual_seed(2)
        with weights.in_use():
            with autocast():
                loss = model(x, y)[1]
            loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checked.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.skipif(not linear_cpu.AMX, reason="this CPU has no AMX")
def test_on_amx_weights_get_gradients_that_were_never_rounded():
    plain, own, (x, y) = model_of(), model_of(), batch()
    own.set_backend("auto")
    exact = copy.deepcopy(plain).double()
    exact(x, y)[1].backward()
    weights = HalfWeights(own, torch.bfloat16)
    with weights.in_use(), autocast():
        loss = own(x, y, return_logits=False)[1]
    loss.backward()
    with autocast():
        plain(x, y)[1].backward()
    for (name, ours), theirs, oracle in zip(own.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - oracle.grad).norm() <= 2 * (theirs.grad - oracle.grad).norm(), name
    in_blocks = own.transformer.h[0].mlp.c_fc.weight.grad
    assert not torch.equal(in_blocks, in_blocks.bfloat16().float())
    assert not any("forward" in module.__dict__ for module in own.modules())
    weights.refresh()
    with weights.in_use(), autocast():
        loss = own(x, y, return_logits=False)[1]
    weights.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(not linear_cpu.AMX, reason="this CPU has no AMX")
def test_in_float32_all_products_go_to_the_tiles_and_stay_as_exact(monkeypatch):
    plain = GPT(GPTConfig(block_size=64, vocab_size=160, n_layer=2, n_head=2, n_embd=128), backend="reference")
    x, y = torch.randint(160, (2, 4, 64))
    own, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    own.set_backend("auto")
    calls, product = [], linear_cpu._product
    monkeypatch.setattr(linear_cpu, "_product", lambda *args: (calls.append(product(*args)), calls[-1])[1])
    exact(x, y)[1].backward()
    plain(x, y)[1].backward()
    assert not calls
    weights = HalfWeights(own, torch.float32)
    assert weights.copies == [] and len(weights.own) == 8
    with weights.in_use():
        loss = own(x, y, return_logits=False)[1]
    loss.backward()
    assert calls == 3 * 9 * [True]  # y, dx and dW of eight Linears and the head
    for (name, ours), theirs, oracle in zip(own.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - oracle.grad).norm() <= 1.5 * (theirs.grad - oracle.grad).norm(), name
    before = own.lm_head.weight.clone()
    cpu.update(own.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu"), weights, 1.0)
    assert not torch.equal(own.lm_head.weight, before) and not any("forward" in vars(module) for module in own.modules())


@pytest.mark.skipif(not linear_cpu.AMX, reason="this CPU has no AMX")
@pytest.mark.parametrize("n_embd, said", [(64, False), (128, True)])
def test_in_float32_what_is_too_small_for_the_tiles_stays_pytorchs_and_the_banner_knows(n_embd, said, tmp_path, capsys):
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=n_embd))
    assert len(HalfWeights(model, torch.float32).own) == (4 if said else 0)
    tiny.data(tmp_path)     # of some thirty characters: their loss is too small, too
    training.train(tiny.options(tmp_path, n_layer=1, n_embd=n_embd, max_iters=1, backend="auto"))
    printed = capsys.readouterr().out
    assert bool(re.search("linear +cpp", printed)) == bool(re.search("mlp +cpp", printed)) == said


@pytest.mark.skipif(not linear_cpu.AMX, reason="this CPU has no AMX")
def test_nothing_is_left_on_the_model_also_where_a_step_fails():
    model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=2, n_embd=16))
    with pytest.raises(KeyError), HalfWeights(model, torch.bfloat16).in_use():
        assert vars(model)["copies"][0][0] is model.transformer.wte.weight
        raise KeyError
    assert not any("copies" in vars(module) for module in model.modules()) and model.lm_head.weight is model.transformer.wte.weight
    assert not any("forward" in vars(module) for module in model.modules())
