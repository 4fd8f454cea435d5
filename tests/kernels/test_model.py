"""The whole GPT on its kernels: losses, gradients and weights lie on the reference path's, and a touched module steps aside."""
import contextlib
import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from made import Made

import nanogpt_fast
from nanogpt_fast import GPT, GPTConfig, backend
from nanogpt_fast.model import MLP, Block
from nanogpt_fast.ops import attention, norm

SMALL = dict(block_size=48, vocab_size=257, n_layer=2, n_head=2, n_embd=32)


def model_of(device, backend="fused", seed=0, **changes):
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        model = GPT(GPTConfig(**{**SMALL, **changes}), backend=backend)
    with torch.no_grad():
        for p in model.parameters():  # biases are zero and norms one at first: a mix-up would not show
            p.add_(0.02 * torch.randn_like(p))
    return model.to(device)


def batch(device, B=2, T=48, V=257):
    return torch.randint(V, (B, T), device=device), torch.randint(V, (B, T), device=device)


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def run(model, x, y, dtype, device, **kwargs):
    """(logits, loss, gradients by name), in fp64."""
    model.zero_grad(set_to_none=True)
    with autocast(device, dtype):
        logits, loss = model(x, y, **kwargs)
    loss.backward()
    return (None if logits is None else logits.detach().double(), loss.detach().double(),
            {name: p.grad.double() for name, p in model.named_parameters()})


def error(a, oracle):
    return ((a - oracle).norm() / oracle.norm()).item()


def key_biases(name, grad):
    """A gradient without the part that is zero in exact arithmetic: a bias added to all keys changes no attention weight."""
    if name.endswith("attn.c_attn.bias"):
        C = grad.numel() // 3
        return torch.cat((grad[:C], grad[2 * C:]))
    return grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_c9_logits_loss_and_every_gradient(device, dtype, bias):
    model, (x, y) = model_of(device, bias=bias), batch(device)
    y[0, :7] = -1
    oracle_model = copy.deepcopy(model).double()
    oracle_model.set_backend("reference")
    oracle = run(oracle_model, x, y, torch.float32, device)
    fused = run(model, x, y, dtype, device)
    with nanogpt_fast.use("reference"):
        plain = run(model, x, y, dtype, device)
    # C9. In fp32 both paths are a few roundings from the oracle, and which is nearer is chance: 2 times there.
    forward, backward = (1.2, 2.0) if dtype == torch.bfloat16 else (2.0, 3.0)
    assert error(fused[0], oracle[0]) <= forward * error(plain[0], oracle[0])
    loss_error, plain_loss_error = abs(fused[1] - oracle[1]), abs(plain[1] - oracle[1])
    assert loss_error <= forward * plain_loss_error + 2 ** -22 * oracle[1]   # one value: by chance the plain error can be zero
    for name, grad in oracle[2].items():
        of = lambda grads: key_biases(name, grads[name])
        assert error(of(fused[2]), key_biases(name, grad)) <= backward * error(of(plain[2]), key_biases(name, grad)), name


def train(model, batches, optimizer, dtype, device, **kwargs):
    losses = []
    for x, y in batches:
        with autocast(device, dtype):
            loss = model(x, y, **kwargs)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("dtype,bias", [pytest.param(torch.float32, True, marks=pytest.mark.slow), (torch.bfloat16, False)], ids=str)
def test_twenty_adamw_steps_have_the_references_losses(device, dtype, bias):
    fused, reference = model_of(device, bias=bias), model_of(device, "reference", bias=bias)
    batches = [batch(device, B=1)] * 20                # one batch, so that the loss falls far
    losses = [train(m, batches, m.configure_optimizers(0.1, 3e-3, (0.9, 0.95), device.type), dtype, device) for m in (fused, reference)]
    assert losses[1][-1] < losses[1][0] - 1.0
    # AdamW divides by the gradient's own size and so amplifies rounding where a gradient is nearly zero.
    assert (losses[0] - losses[1]).abs().max() < (1e-3 if dtype == torch.float32 else 3e-2)


@pytest.mark.slow
def test_twenty_sgd_steps_end_at_the_references_weights(device):
    fused, reference = model_of(device), model_of(device, "reference")
    batches = [batch(device, B=1) for _ in range(4)] * 5
    for m in (fused, reference):
        train(m, batches, torch.optim.SGD(m.parameters(), lr=0.1), torch.float32, device)
    start = model_of(device)
    for (name, a), b, c in zip(fused.named_parameters(), reference.parameters(), start.parameters(), strict=True):
        moved = key_biases(name, b - c).norm()
        assert key_biases(name, a - b).norm() < 1e-3 * moved, name


@pytest.mark.slow
def test_with_dropout_training_is_seeded_and_learns_as_the_reference_does(device):
    batches = [batch(device, B=1)] * 12
    def losses(backend, seed):
        model = model_of(device, backend, dropout=0.2)
        torch.manual_seed(seed)
        return train(model, batches, model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), device.type), torch.float32, device)
    fused = losses("fused", 1)
    assert torch.equal(fused, losses("fused", 1)) and not torch.equal(fused, losses("fused", 2))
    # Masks differ between the paths, so do losses: by no more than between seeds of the reference.
    others = torch.stack([losses("reference", seed) for seed in range(8)])
    spread = others.std(0).mean().item()
    assert abs((fused - others.mean(0)).mean().item()) < 4 * spread


def test_evaluation_draws_no_dropout(device):
    model, (x, y) = model_of(device, dropout=0.5).eval(), batch(device, B=1)
    with nanogpt_fast.use("reference"):
        expected = model(x, y)[1]
    assert torch.allclose(model(x, y)[1], expected, atol=1e-5)


def test_without_logits_the_loss_and_gradients_are_the_same(device):
    model, (x, y) = model_of(device), batch(device, B=1)
    with_logits, without = run(model, x, y, torch.float32, device), run(model, x, y, torch.float32, device, return_logits=False)
    assert without[0] is None and error(without[1], with_logits[1]) < 1e-6
    for name in with_logits[2]:
        assert error(key_biases(name, without[2][name]), key_biases(name, with_logits[2][name])) < 1e-5, name


def test_accumulation_clipping_and_frozen_parameters(device):
    grads = {}
    for choice in ("fused", "reference"):
        model = model_of(device, choice)
        for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.ln_1.bias", "transformer.h.0.mlp.c_fc.bias"):
            model.get_parameter(name).requires_grad_(False)
        torch.manual_seed(5)
        for _ in range(2):
            x, y = batch(device, B=1, T=20)
            (model(x, y)[1] / 2).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        grads[choice] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"norm": norm}
    assert grads["fused"].keys() == grads["reference"].keys() and len(grads["fused"]) == len(list(model.parameters())) - 3 + 1
    for name in grads["fused"]:
        a, b = (key_biases(name, grads[c][name]) for c in ("fused", "reference"))
        assert error(a.double(), b.double()) < 1e-4, name


def test_c14_logits_do_not_see_later_tokens(device):
    model, (x, y) = model_of(device), batch(device, B=1)
    changed = x.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 257
    a, b = model(x, y)[0], model(changed, y)[0]
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20:], b[:, 20:])


# Stepping aside, block by block

class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hook(model):
    model.transformer.h[0].attn.register_forward_hook(lambda module, args, out: 3 * out)


def pre_hook(model):
    model.transformer.h[0].ln_2.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def backward_hook(model):
    model.transformer.h[0].mlp.register_full_backward_hook(lambda module, gin, gout: (2 * gin[0],))


def subclass(model):
    class Halved(Block):
        def forward(self, x):
            return super().forward(x) / 2
    model.transformer.h[0].__class__ = Halved


def replaced_mlp(model):
    torch.manual_seed(3)
    model.transformer.h[0].mlp = nn.Sequential(nn.Linear(32, 32), nn.Tanh()).to(next(model.parameters()).device)


def replaced_norm(model):
    model.transformer.h[0].ln_1 = nn.LayerNorm(32).to(next(model.parameters()).device)


def instance_forward(model):
    attn = model.transformer.h[0].attn
    attn.forward = lambda x: attn.branch(x) * 2


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model.transformer.h[0].ln_1, "weight", nn.Softplus())


def final_norm_hook(model):
    model.transformer.ln_f.register_forward_hook(lambda module, args, out: 2 * out)


TOUCHES = [hook, pre_hook, backward_hook, subclass, replaced_mlp, replaced_norm, instance_forward, parametrized, final_norm_hook]


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda f: f.__name__)
def test_c21_a_touched_block_steps_aside_and_the_other_stays_fused(device, touch, monkeypatch):
    model, (x, y) = model_of(device), batch(device, B=1, T=9)
    touch(model)
    fused_blocks = []
    fused = Block.fused
    monkeypatch.setattr(Block, "fused", lambda self, *args: (fused_blocks.append(self), fused(self, *args))[1])
    with nanogpt_fast.use("reference"):
        expected = run(model, x, y, torch.float32, device)
    assert fused_blocks == []
    backend._noticed.clear()
    with pytest.warns(RuntimeWarning, match="unfused") if touch is not final_norm_hook else contextlib.nullcontext():
        logits, loss, grads = run(model, x, y, torch.float32, device)
    assert fused_blocks == list(model.transformer.h)[0 if touch is final_norm_hook else 1:]
    assert error(logits, expected[0]) < 1e-5 and error(loss, expected[1]) < 1e-6
    for name in grads:
        assert error(key_biases(name, grads[name]), key_biases(name, expected[2][name])) < 1e-4, name


def test_c21_a_forward_set_on_a_class_takes_every_block_off_the_fused_path(device, monkeypatch):
    model, (x, y) = model_of(device), batch(device, B=1, T=9)
    plain, forward = run(model, x, y, torch.float32, device)[1], MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: 3 * forward(self, x))
    with nanogpt_fast.use("reference"):
        expected = run(model, x, y, torch.float32, device)
    backend._noticed.clear()
    with pytest.warns(RuntimeWarning, match="unfused: MLP.forward was replaced"):
        logits, loss, grads = run(model, x, y, torch.float32, device)
    assert error(logits, expected[0]) < 1e-5 and error(loss, expected[1]) < 1e-6 < error(loss, plain)
    for name in grads:
        assert error(key_biases(name, grads[name]), key_biases(name, expected[2][name])) < 1e-4, name


@pytest.mark.parametrize("path", ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc", "lm_head"])
def test_c21_a_replaced_linear_is_called_within_the_fused_walk(device, path):
    model, (x, y) = model_of(device), batch(device, B=1, T=9)
    model.get_submodule(path).__class__ = Doubled      # LoRA and its like
    with nanogpt_fast.use("reference"):
        expected = run(model, x, y, torch.float32, device)
    logits, loss, grads = run(model, x, y, torch.float32, device)
    assert error(logits, expected[0]) < 1e-5
    for name in grads:
        assert error(key_biases(name, grads[name]), key_biases(name, expected[2][name])) < 1e-4, name


def test_c15_a_later_change_of_dropout_is_obeyed(device):
    model, (x, y) = model_of(device), batch(device, B=1, T=9)
    plain = model(x, y)[1]
    for module, attribute in ((model.transformer.h[0].attn, "dropout"), (model.transformer.h[0].attn.resid_dropout, "p"),
                              (model.transformer.h[1].mlp.dropout, "p"), (model.transformer.drop, "p")):
        setattr(module, attribute, 0.5)
        torch.manual_seed(0)
        dropped = model(x, y)[1]
        assert not torch.equal(dropped, plain), attribute
        torch.manual_seed(0)
        assert torch.equal(dropped, model(x, y)[1])
        setattr(module, attribute, 0.0)


# torch.compile, checkpointing, generation

def test_c26_compiles_whole_without_recompiling_for_a_new_dropout_seed(device):
    model, (x, y) = model_of(device, dropout=0.1), batch(device, B=1, T=9)
    graphs = []
    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        loss = compiled(x, y)[1]
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[2] != losses[1] and len(graphs) == 1
    torch.manual_seed(1)
    assert abs(model(x, y)[1].item() - losses[0]) < 1e-5


def test_all_dropouts_of_the_blocks_share_one_draw_of_seeds_and_each_has_its_own(device, monkeypatch):
    model, (x, y) = model_of(device, dropout=0.3, n_layer=3), batch(device, B=1, T=9)
    seeds = []
    for op in (attention, norm):
        apply = op._PackedAttention.apply if op is attention else op._AddLayerNorm.apply
        place = 1 if op is attention else 4     # of the seed among the arguments
        function = SimpleNamespace(apply=lambda *args, apply=apply, place=place: (seeds.append(args[place]), apply(*args))[1])
        monkeypatch.setattr(op, "_PackedAttention" if op is attention else "_AddLayerNorm", function)
    with Made() as made:
        model(x, y)[1].backward()
    draws = [operator for *_, operator in made.tensors if "randint" in str(operator)]
    seeds = [seed for seed in seeds if seed is not None]
    assert len(draws) == 2      # one is that of the last norm
    assert len(seeds) == 9 and len({seed.item() for seed in seeds}) == 9
    assert all(seed.data_ptr() % 16 == 0 and seed.shape == (1,) for seed in seeds)


def test_activation_checkpointing_draws_the_same_masks_again(device):
    from torch.utils.checkpoint import checkpoint
    model, (x, y) = model_of(device, dropout=0.3), batch(device, B=1, T=9)
    torch.manual_seed(0)
    expected = run(model, x, y, torch.float32, device)
    for block in model.transformer.h:
        block.fused = (lambda f: lambda *args: checkpoint(f, *args, use_reentrant=False))(block.fused)
    torch.manual_seed(0)
    again = run(model, x, y, torch.float32, device)
    assert torch.equal(again[1], expected[1])
    for name in expected[2]:
        assert torch.equal(again[2][name], expected[2][name]), name


def test_generation_on_kernels_equals_the_reference(device):
    model = model_of(device).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    idx = batch(device, B=1, T=6)[0]
    with nanogpt_fast.use("reference"):
        expected = model.generate(idx, 4, temperature=0)
    assert torch.equal(model.generate(idx, 4, temperature=0), expected)
