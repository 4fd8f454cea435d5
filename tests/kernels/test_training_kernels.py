"""Training steps of the whole GPT on its kernels, as the trainer takes them: weights cast once, no logits, scaled fp16."""
import contextlib
import copy
import re

import pytest
import tiny
import torch
import torch.nn as nn
from made import Made
from test_model import autocast, batch, error, key_biases, model_of
from torch.utils.checkpoint import checkpoint

from nanogpt_fast import backend, devices
from nanogpt_fast.training import sharding
from nanogpt_fast.training.half_weights import HalfWeights
from nanogpt_fast.training.trainer import run


def take_step(model, weights, optimizer, x, y):
    with weights.in_use():
        with autocast(x.device, torch.bfloat16):
            loss = model(x, y, return_logits=False)[1]
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    weights.refresh()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_no_fp32_tensor_of_the_size_of_the_logits_is_made_in_a_whole_step(device, backend):
    # More rows than channels, so that the weight and its moments stay below B T V; a CPU makes dW 1024 columns at a time.
    B, T, V = 2, 48, 1100
    model = model_of(device, backend, vocab_size=V)
    weights, (x, y) = HalfWeights(model, torch.bfloat16), batch(device, B, T, V)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    with Made() as made:
        take_step(model, weights, optimizer, x, y)
    large = [function for dtype, size, function in made.tensors if dtype == torch.float32 and size >= B * T * V]
    assert (large == []) == (backend == "fused"), large


def test_the_mlps_and_the_heads_weights_get_gradients_that_were_never_rounded(device):
    """With the copies as without them: fp32 sums, and the same ones."""
    model, (x, y) = model_of(device, vocab_size=300), batch(device, B=1, T=20, V=300)
    gradients = {}
    for copies in (False, True):
        model.zero_grad(set_to_none=True)
        weights = HalfWeights(model, torch.bfloat16)
        with weights.in_use() if copies else contextlib.nullcontext(), autocast(device, torch.bfloat16):
            model(x, y, return_logits=False)[1].backward()
        assert not any("copies" in module.__dict__ for module in model.modules())
        gradients[copies] = {name: p.grad for name, p in model.named_parameters()}
    for name in ("transformer.wte.weight", *(f"transformer.h.{i}.mlp.{matrix}.weight" for i in range(2) for matrix in ("c_fc", "c_proj"))):
        gradient = gradients[True][name]
        assert gradient.dtype == torch.float32 and not torch.equal(gradient, gradient.bfloat16().float()), name
        assert torch.equal(gradient, gradients[False][name]), name


def test_a_linear_that_is_replaced_meanwhile_is_computed_with_its_own_weight(device):
    model, (x, y) = model_of(device), batch(device, B=1, T=20)
    weights = HalfWeights(model, torch.bfloat16)
    mlp = model.transformer.h[0].mlp
    mlp.c_proj = nn.Linear(mlp.c_proj.in_features, mlp.c_proj.out_features).to(device)
    with autocast(device, torch.bfloat16):
        expected = model(x, y, return_logits=False)[1]
        with weights.in_use():
            assert torch.equal(model(x, y, return_logits=False)[1], expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_copies_of_the_weights_give_the_gradients_of_autocast(device, accumulation):
    plain, (x, y) = model_of(device), batch(device, B=1, T=20)
    copied = copy.deepcopy(plain)
    oracle = copy.deepcopy(plain).double()
    oracle.set_backend("reference")
    weights = HalfWeights(copied, torch.bfloat16)
    for _ in range(accumulation):
        with autocast(device, torch.bfloat16):
            expected = plain(x, y, return_logits=False)[1]
        expected.backward()
        with weights.in_use(), autocast(device, torch.bfloat16):
            loss = copied(x, y, return_logits=False)[1]
            loss.backward()
        oracle(x, y)[1].backward()
        assert torch.equal(loss, expected)
    for (name, a), b, c in zip(plain.named_parameters(), copied.parameters(), oracle.parameters(), strict=True):
        # The MLP's and the head's gradients stay fp32 on their way to an fp32 weight; on their way to a copy they are rounded
        # to bf16 once (2^-9, a part of the error that bf16 has anyway), as every gradient of plain autocast is.
        of = lambda p: key_biases(name, p.grad.double())
        assert error(of(b), of(c)) <= 1.2 * error(of(a), of(c)) + 2 ** -9, name


def test_float16_with_a_gradscaler_trains_on_kernels_as_on_the_reference(device):
    losses, scales = {}, {}
    for backend in ("fused", "reference"):
        model, scaler = model_of(device, backend, n_layer=1), torch.amp.GradScaler(device.type)
        weights = HalfWeights(model, torch.float16)
        optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), device.type)
        torch.manual_seed(3)
        x, y = batch(device, B=1, T=20)
        losses[backend] = []
        for step in range(5):
            with weights.in_use():
                with autocast(device, torch.float16):
                    loss = model(x, y, return_logits=False)[1]
                scaler.scale(loss).backward()
            if step == 2:               # an overflow: the scaler skips this step and halves its scale
                next(model.parameters()).grad[0, 0] = float("inf")
                before = [p.detach().clone() for p in model.parameters()]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            weights.refresh()
            if step == 2:
                assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            optimizer.zero_grad(set_to_none=True)
            losses[backend].append(loss.item())
        scales[backend] = scaler.get_scale()
    assert scales["fused"] == scales["reference"] == 32768.0
    assert losses["fused"][4] < losses["fused"][0] - 0.1 and losses["fused"][2] == pytest.approx(losses["fused"][3], abs=0)
    for a, b in zip(*losses.values(), strict=True):
        assert a == pytest.approx(b, abs=5e-3)      # 2^-11 of a loss of 5.6, and AdamW's amplification of it


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_twenty_adamw_steps_with_all_that_a_trainer_may_do(dtype, device):
    """Accumulation, clipping, a GradScaler in fp16, frozen parameters and activation checkpointing, all at once."""
    losses, frozen = {}, ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.weight")
    x, y = batch(device, B=2, T=16)
    for backend in ("fused", "reference"):
        model, scaler = model_of(device, backend), torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        before = {name: model.get_parameter(name).clone() for name in frozen}
        for block in model.transformer.h:
            block.fused = (lambda f: lambda *args: checkpoint(f, *args, use_reentrant=False))(block.fused)
        weights = HalfWeights(model, dtype)
        optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), device.type)
        losses[backend] = []
        for _ in range(20):
            total = 0.0
            for micro_step in range(2):
                with weights.in_use():
                    with autocast(device, dtype):
                        loss = model(x[[micro_step]], y[[micro_step]], return_logits=False)[1] / 2
                    scaler.scale(loss).backward()
                total += loss.item()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            weights.refresh()
            optimizer.zero_grad(set_to_none=True)
            losses[backend].append(total)
        assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert losses["reference"][-1] < losses["reference"][0] - 1.0
    for a, b in zip(*losses.values(), strict=True):
        assert a == pytest.approx(b, abs=3e-2)      # as in test_model: AdamW amplifies rounding where gradients are nearly zero


@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-3), ("bfloat16", 3e-2)])  # those of test_model's AdamW steps
def test_three_steps_of_the_trainer_on_kernels_have_the_references_losses(dtype, bound, device, tmp_path, capsys):
    tiny.data(tmp_path)
    settings = dict(device=device.type, dtype=dtype, max_iters=3, n_layer=1, eval_interval=100, eval_iters=1, bias=True,
                    gradient_accumulation_steps=2, batch_size=2)
    for backend in ("fused", "reference"):
        assert run(tiny.words(tiny.options(tmp_path, backend, backend=backend, **settings))) == 0
        printed = capsys.readouterr().out
        assert len(re.findall(" triton( |$)", printed, re.M)) == (4 if backend == "fused" else 0)     # the four families, in the banner
        assert printed.count("runs in Triton's interpreter") == (4 if backend == "fused" and device.type == "cpu" else 0)
    losses = {backend: tiny.losses(tmp_path / backend) for backend in ("fused", "reference")}
    assert list(losses["fused"]) == [0, 1, 2]
    for a, b in zip(losses["fused"].values(), losses["reference"].values(), strict=True):
        assert a == pytest.approx(b, abs=bound)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_the_kernels_run_on_the_weights_that_fsdp2_gathers_and_the_gradients_are_the_same(device, dtype, bound):
    """bound: in float32 another order of sums; in bfloat16 FSDP2 casts the blocks' weights, so that their gradients are rounded, as
    autocast's are."""
    model, (x, y) = model_of(device), batch(device, B=1, T=20)
    divided, gradients = copy.deepcopy(model), []
    with devices.ranks(None, device, group_of_one=True) as (ranks, device):
        sharding.shard(divided, device, dtype, ranks)
        for each in (model, divided):
            with backend.recording() as record, autocast(device, dtype):
                loss = each(x, y, return_logits=False)[1]
            loss.backward()
            assert {name for _, _, name, _ in record} == {"triton"} or device.type == "cuda"
            gradients.append([getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in each.parameters()])
    for whole, of_divided in zip(*gradients, strict=True):
        assert error(of_divided, whole) < bound
