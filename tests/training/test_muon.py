"""--optimizer=muon: which matrices it takes and how, its learning rate, and that runs with it resume, clip, scale and refuse as others do."""
import dataclasses

import pytest
import tiny
import torch

from nanogpt_fast import GPT, GPTConfig, devices
from nanogpt_fast.checkpoints import nanogpt as checkpoints
from nanogpt_fast.checkpoints.state import CheckpointError
from nanogpt_fast.training import captured
from nanogpt_fast.training.muon import Muon, muon_and_adamw
from nanogpt_fast.training.step import TrainingStep
from nanogpt_fast.training.trainer import TrainOptions, train

OPTIONS = TrainOptions(optimizer="muon", learning_rate=1e-3, muon_lr=0.02)


@pytest.fixture
def folder(tmp_path):
    tiny.data(tmp_path)
    return tmp_path


def trained(steps=1, dtype=torch.float32, **config):
    """(model, its optimizer) after so many steps."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16, bias=False), **config}))
    optimizer = muon_and_adamw(model, OPTIONS, "cpu")
    idx = torch.arange(16).view(2, 8)
    step = TrainingStep(model, optimizer, dtype=dtype, batch_shape=(2, 8), not_captured="a CPU")
    for _ in range(steps):
        step(lambda: (idx, idx))
    return model, step


def test_muon_takes_the_four_matrices_of_each_block_and_adamw_the_rest():
    model, step = trained(steps=0)
    names = {p: name for name, p in model.named_parameters()}
    of_adamw, of_muon = ([names.pop(p) for group in optimizer.param_groups for p in group["params"]]
                         for optimizer in (step.optimizer.adamw, step.optimizer.muon))
    assert sorted(of_muon) == sorted(f"transformer.h.{i}.{name}.weight" for i in (0, 1)
                                     for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight"} <= set(of_adamw) and not names


def test_a_packed_qkv_is_stepped_as_three_matrices():
    torch.manual_seed(0)
    packed, how = torch.nn.Parameter(torch.randn(48, 16)), dict(lr=0.02, weight_decay=0.1)
    parts = [torch.nn.Parameter(part.clone()) for part in packed.detach().chunk(3)]
    ours, theirs = Muon([dict(params=[packed], parts=3)], **how), torch.optim.Muon(parts, **how)
    for _ in range(3):
        packed.grad = torch.randn(48, 16) * torch.tensor([1.0, 5.0, 25.0]).repeat_interleave(16)[:, None]
        for part, grad in zip(parts, packed.grad.chunk(3)):
            part.grad = grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(packed.detach(), torch.cat([part.detach() for part in parts]))
    assert ours.state[packed]["momentum_buffer"].shape == (48, 16)


def test_its_learning_rate_warms_up_and_decays_with_adamws(folder, monkeypatch):
    rates, step = [], Muon.step
    monkeypatch.setattr(Muon, "step", lambda self: rates.append([g["lr"] for g in self.param_groups]) or step(self))
    train(tiny.options(folder, optimizer="muon", muon_lr=0.02, warmup_iters=1, lr_decay_iters=3, max_iters=4, learning_rate=1e-2, min_lr=1e-3))
    assert rates == [pytest.approx([rate, rate]) for rate in (0.01, 0.02, 0.011, 0.002)]


def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(folder):
    settings = dict(optimizer="muon", max_iters=16, eval_interval=8, dropout=0.2)
    straight, broken = tiny.options(folder, "straight", **settings), tiny.options(folder, "broken", **settings)
    expected = train(straight)
    train(dataclasses.replace(broken, max_iters=8))
    resumed = train(tiny.options(folder, "broken", init_from="resume", max_iters=16))     # --optimizer is the run's own
    assert tiny.losses(broken) == tiny.losses(straight)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])


@pytest.mark.parametrize("was, wanted", [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_than_the_checkpoints_is_refused(was, wanted, folder):
    o = tiny.options(folder, optimizer=was, max_iters=2)
    train(o)
    again = dataclasses.replace(o, init_from="resume", optimizer=wanted)
    again.given = frozenset({"optimizer"})      # as on the command line
    with pytest.raises(CheckpointError, match=f"--optimizer={was}, which --optimizer={wanted} cannot go on from. Resume with --optimizer={was}"):
        train(again)


@pytest.mark.parametrize("change, message", [
    (lambda state: state["state"][5].update(momentum_buffer=torch.zeros(3)), r"momentum_buffer of tensor \d+ has shape \(3,\)"),
    (lambda state: state["state"][5]["momentum_buffer"].fill_(torch.nan), "holds nan or infinity"),
    (lambda state: state["state"][5].clear(), "moments of 8 of 9 tensors"),
    (lambda state: state["state"].update({5: state["state"][0]}), "expected momentum_buffer of every parameter of Muon"),
    (lambda state: state.update(param_groups=[state["param_groups"][i] for i in (0, 3, 2, 1)]), "does not fit the model: groups of")])
def test_a_damaged_momentum_is_refused_before_it_is_used(change, message):
    _, step = trained(n_layer=1)
    state = step.optimizer.state_dict()     # tensor 5 is c_attn.weight
    change(state)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_optimizer(step.optimizer, state, "ckpt.pt")


def test_in_bfloat16_the_copies_follow_the_weights():
    _, step = trained(steps=2, dtype=torch.bfloat16)
    assert len(step.weights.copies) == 9
    for weight, copy in zip(step.weights.weights, step.weights.copies):
        assert torch.equal(weight.bfloat16(), copy)


def test_the_gradient_is_clipped_before_both():
    seen = []
    for max_norm in (0.0, 1e-3):
        model, step = trained(steps=0)
        step.grad_clip = max_norm
        idx = torch.arange(16).view(2, 8)
        step(lambda: (idx, idx))
        seen.append(torch.cat([step.optimizer.state[p].get("momentum_buffer", step.optimizer.state[p].get("exp_avg")).flatten()
                               for p in model.parameters()]).norm())
    assert seen[1] < 1e-3 < seen[0]


def test_float16s_scaler_skips_both_where_a_gradient_overflows(folder):
    o = tiny.options(folder, dtype="float16", optimizer="muon", max_iters=8)
    train(o)
    exact = tiny.options(folder, "exact", optimizer="muon", max_iters=8)
    train(exact)
    assert list(tiny.losses(o).values()) == pytest.approx(list(tiny.losses(exact).values()), abs=0.02)
    model, step = trained(steps=1, dtype=torch.float16)
    before = [p.detach().clone() for p in model.parameters()]
    step.scaler.update(new_scale=2.0 ** 100)
    idx = torch.arange(16).view(2, 8)
    step(lambda: (idx, idx))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_step_with_muon_is_not_captured():
    model, step = trained(steps=0)
    assert "MuonAndAdamW has no `capturable`" in captured.why_not(model, step.optimizer, torch.device("cuda"))


@pytest.mark.parametrize("given, words", [(dict(shard=True), "--shard with --optimizer=muon"),
                                          (dict(learning_rate=0.0), "learning_rate is 0 with optimizer='muon'")])
def test_what_muon_cannot_do_is_refused(given, words, folder):
    with pytest.raises(ValueError, match=words):
        train(tiny.options(folder, optimizer="muon", **given))


def test_a_cpu_that_is_slow_in_bfloat16_is_warned_of(monkeypatch, capsys):
    for fast, words in (("AMX", 0), (None, 1)):
        monkeypatch.setattr(devices, "fast_bfloat16", lambda fast=fast: fast)
        trained(steps=0)
        assert capsys.readouterr().out.count("this CPU has no fast bf16 matmul") == words


def test_muons_options_without_muon_are_said_to_have_no_effect(folder, capsys):
    train(tiny.options(folder, muon_lr=0.1, max_iters=1, eval_interval=1))
    assert "muon_lr has no effect: the optimizer is adamw" in capsys.readouterr().out
