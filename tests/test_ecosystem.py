"""accelerate beside the real libraries: transformers, peft, safetensors, torch.compile, DDP, checkpointing, copies, functional_call.

Here on plain PyTorch, so a step is bit for bit what it was; tests/kernels/test_swap_kernels.py runs the kernels. `on_ops`
makes the swapped modules take their own formulas all the same, so that what a library does to a module meets our code.
"""
import contextlib
import copy
import os
import pickle
import socket

import pytest
import torch
import torch.nn as nn

import nanogpt_fast
from forks import fork
from nanogpt_fast import GPT, GPTConfig
from nanogpt_fast.swap import parts


@pytest.fixture
def on_ops(monkeypatch):
    """Swapped modules call the ops although no kernel can run: the ops' reference implementations."""
    monkeypatch.setattr(parts, "_why_reference", lambda *args: None)


def gpt2(lm=True, **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**dict(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
                                               pad_token_id=0), **changes})
    return (transformers.GPT2LMHeadModel if lm else transformers.GPT2Model)(config)


def tokens(B=2, T=11):
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(1))


def step(model, **inputs):
    """[loss, logits, gradients ...]"""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    x = tokens()
    out = model(x, labels=x, **inputs)
    out.loss.backward()
    return [out.loss, out.logits, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(a, b, exact=True):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert torch.equal(x, y) if exact else torch.allclose(x, y, rtol=1e-4, atol=1e-6)


# transformers

@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh", "relu"])
def test_gpt2_logits_loss_gradients_and_greedy_text_are_the_same(activation, monkeypatch):
    model = gpt2(activation_function=activation)
    before, text = step(model), model.eval().generate(tokens(), max_new_tokens=8, do_sample=False)
    model.train()
    report = nanogpt_fast.accelerate(model)
    assert report.left == [] and len(report.swapped) == 2 * 5 + 1
    assert_same(step(model), before)
    assert torch.equal(model.eval().generate(tokens(), max_new_tokens=8, do_sample=False), text)
    monkeypatch.setattr(parts, "_why_reference", lambda *args: None)
    assert_same(step(model.train()), before, exact=False)
    assert torch.equal(model.eval().generate(tokens(), max_new_tokens=8, do_sample=False), text)
    assert nanogpt_fast.restore(model) == 11
    assert_same(step(model.train()), before)


def test_gpt2_model_masks_caches_and_counts(on_ops):
    model = gpt2(lm=False).eval()
    x, mask = tokens(), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        calls = (lambda: model(x)), (lambda: model(x, attention_mask=mask)), (lambda: model(x, past_key_values=model(x[:, :0 + 3]).past_key_values))
        before = [call().last_hidden_state for call in calls]
        report = nanogpt_fast.accelerate(model)
        assert_same([call().last_hidden_state for call in calls], before, exact=False)
    attention = {where: n for (part, where), n in report.calls.items() if part == "attention"}
    assert attention["own path: an attention mask"] >= 2 and attention["kernels"] == 4


@pytest.mark.parametrize("changes,reason", [
    (dict(activation_function="silu"), "its activation is a SiLU"), (dict(attn_implementation="eager"), "attn_implementation='eager'"),
    (dict(add_cross_attention=True), "it has crossattention, ln_cross_attn besides"),
    (dict(reorder_and_upcast_attn=True), "reorder_and_upcast_attn")], ids=str)
def test_what_gpt2_can_be_and_the_ops_are_not_is_named(changes, reason):
    model = gpt2(**changes)
    before = step(model)
    report = nanogpt_fast.accelerate(model)
    assert any(reason in row.reason for row in report.left), report
    assert_same(step(model), before)


def test_the_scale_by_layer_is_honoured(on_ops):
    model = gpt2(scale_attn_by_inverse_layer_idx=True)
    before = step(model)
    assert nanogpt_fast.accelerate(model).left == []
    assert_same(step(model), before, exact=False)


def test_hidden_states_and_save_pretrained_work(on_ops, tmp_path):
    import transformers
    model = gpt2().eval()
    nanogpt_fast.accelerate(model)
    out = model(tokens(), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens()).logits, out.logits, rtol=1e-4, atol=1e-5)
    theirs = GPT.from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(theirs(tokens(), tokens())[0], out.logits, rtol=1e-4, atol=1e-5)


# peft

def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], layers_to_transform=[0], layers_pattern="h", lora_dropout=0.0,
                             fan_in_fan_out=True, init_lora_weights=False)
    torch.manual_seed(5)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("order", ["accelerate, then LoRA", "LoRA, then accelerate"])
def test_lora_on_c_attn_trains_as_without_and_merges(order, on_ops):
    expected = lora(gpt2(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0))
    model = gpt2(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    if order.startswith("LoRA"):
        model = lora(model)
        report = nanogpt_fast.accelerate(model)
    else:
        report = nanogpt_fast.accelerate(model)
        model = lora(model)
    assert len(report.swapped) == 11 and report.left == []
    curves = []
    for m in (expected, model):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5)
        curve = []
        for _ in range(4):
            loss = m(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[1] == pytest.approx(curves[0], rel=1e-5) and curves[0][-1] < curves[0][0]
    merged, expected = model.merge_and_unload().eval(), expected.merge_and_unload().eval()
    torch.testing.assert_close(merged(tokens()).logits, expected(tokens()).logits, rtol=1e-4, atol=1e-5)
    assert nanogpt_fast.restore(merged) == 11


def test_lora_in_an_mlp_takes_only_that_mlp_off_the_fused_path(on_ops):
    peft = pytest.importorskip("peft")
    model = gpt2()
    report = nanogpt_fast.accelerate(model)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_fc"], layers_to_transform=[1], layers_pattern="h", fan_in_fan_out=True))
    assert [path for path, _ in report.unfused] == ["transformer.h.1.mlp"]
    model(tokens())
    assert report.calls["mlp", "kernels"] == 1 and sum(n for (part, _), n in report.calls.items() if part == "mlp") == 2


# safetensors

def test_weights_go_through_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, twin = fork(), fork(seed=1)
    nanogpt_fast.accelerate(model)
    safetensors.save_model(model, str(tmp_path / "m.safetensors"))
    safetensors.load_model(twin, str(tmp_path / "m.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# torch

def nano_step(model):
    model.zero_grad(set_to_none=True)
    x = tokens(T=16)
    torch.manual_seed(3)
    logits, loss = model(x, x)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("ops", [False, True], ids=["own path", "ops"])
def test_torch_compile_traces_an_accelerated_model_whole_and_once(ops, monkeypatch):
    model = fork(dropout=0.0)
    expected = nano_step(model)
    nanogpt_fast.accelerate(model)
    if ops:
        monkeypatch.setattr(parts, "_why_reference", lambda *args: None)
    graphs = []
    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for _ in range(3):
        assert_same(nano_step(compiled), expected)
    assert len(graphs) == 1


def test_a_model_accelerated_after_it_was_compiled_is_compiled_anew():
    model = fork(dropout=0.0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    expected = nano_step(compiled)
    report = nanogpt_fast.accelerate(compiled)
    assert len(report.swapped) == 12
    assert_same(nano_step(compiled), expected)
    nanogpt_fast.restore(compiled)
    assert_same(nano_step(compiled), expected)


def test_activation_checkpointing_of_blocks(on_ops):
    from torch.utils.checkpoint import checkpoint
    model = fork(dropout=0.2)
    nanogpt_fast.accelerate(model)
    expected = nano_step(model)
    for block in model.transformer.h:
        block.fused = (lambda call: lambda *args: checkpoint(call, *args, use_reentrant=False))(block.fused)
        block.forward = (lambda call: lambda *args: checkpoint(call, *args, use_reentrant=False))(block.forward)
    assert_same(nano_step(model), expected)


def test_gradient_checkpointing_of_transformers(on_ops):
    model = gpt2()
    nanogpt_fast.accelerate(model)
    model.config.use_cache = False
    expected = step(model)
    model.gradient_checkpointing_enable()
    assert_same(step(model), expected)


def test_functional_call_deepcopy_and_pickle(on_ops):
    for model in (fork(dropout=0.0).eval(), gpt2().eval()):
        nanogpt_fast.accelerate(model)
        x = tokens()
        first = lambda out: out.logits if hasattr(out, "logits") else out[0]
        expected = first(model(x))
        doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
        other = first(torch.func.functional_call(model, doubled, (x,)))
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(2)
        assert torch.equal(first(twin(x)), other) and not torch.equal(other, expected)
        assert torch.equal(first(model(x)), expected)
        assert torch.equal(first(pickle.loads(pickle.dumps(model))(x)), expected)


def _rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parts._why_reference = lambda *args: None
    curves = []
    for when in ("never", "before", "inside"):
        with contextlib.redirect_stdout(None):
            model = fork(dropout=0.0)
        if when == "before":
            nanogpt_fast.accelerate(model)
        ddp = nn.parallel.DistributedDataParallel(model)
        if when == "inside":
            assert len(nanogpt_fast.accelerate(ddp).swapped) == 12
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        curve = []
        for it in range(3):
            x = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(10 * it + rank))
            loss = ddp(x, x)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append((curve, model.transformer.h[0].attn.c_attn.weight.detach().clone()))
    torch.save(curves, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ddp_in_two_processes_takes_the_same_steps(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for curves in ranks:
        assert curves[0][0] == curves[1][0] == curves[2][0]
        assert torch.equal(curves[0][1], curves[1][1]) and torch.equal(curves[0][1], curves[2][1])
    assert torch.equal(ranks[0][0][1], ranks[1][0][1])  # the ranks saw different batches and have equal weights


def test_a_gpt_of_ours_is_saved_and_loaded_by_functional_libraries():
    """The same for the one-import door: our GPT is a plain module to all of these."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=2, n_embd=32)).eval()
    x = tokens()
    expected = model(x, x)[0]
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, x)[0], expected) and torch.equal(copy.deepcopy(model)(x, x)[0], expected)
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), (x, x))[0], expected)
