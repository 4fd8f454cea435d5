"""accelerate beside the real libraries: transformers, peft, safetensors, torch.compile, DDP, checkpointing, copies, functional_call.

Here on plain PyTorch, so a step is bit for bit what it was; tests/kernels/test_swap_kernels.py runs the kernels. `on_ops`
makes the swapped modules take their own formulas all the same, so that what a library does to a module meets our code.
"""
import contextlib
import copy
import functools
import inspect
import os
import pickle
import socket

import pytest
import torch
import torch.nn as nn
from forks import fork

import nanogpt_fast
from nanogpt_fast import GPT, GPTConfig
from nanogpt_fast.swap import gpt2 as gpt2_parts, parts


@pytest.fixture
def on_ops(monkeypatch):
    """Swapped modules call the ops although no kernel can run: the ops' reference implementations."""
    monkeypatch.setattr(parts, "_kernel_why_not", lambda *args: None)


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
    monkeypatch.setattr(parts, "_kernel_why_not", lambda *args: None)
    assert_same(step(model.train()), before, exact=False)
    assert torch.equal(model.eval().generate(tokens(), max_new_tokens=8, do_sample=False), text)
    assert nanogpt_fast.restore(model) == 11
    assert_same(step(model.train()), before)


def cached(model, x):
    """The cache after x, and the keyword under which the model takes it: its name changed in 5.24."""
    name = next(name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters)
    return {name: getattr(model(x, use_cache=True), name)}


def test_gpt2_model_masks_caches_and_counts(on_ops):
    model = gpt2(lm=False).eval()
    x, mask = tokens(), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        calls = (lambda: model(x)), (lambda: model(x, attention_mask=mask)), (lambda: model(x, **cached(model, x[:, :3])))
        before = [call().last_hidden_state for call in calls]
        report = nanogpt_fast.accelerate(model)
        assert_same([call().last_hidden_state for call in calls], before, exact=False)
    attention = {where: n for (part, where), n in report.calls.items() if part == "attention"}
    assert attention["own path: an attention mask"] >= 2 and attention["kernels"] == 4


@pytest.mark.parametrize("changes,reason", [
    (dict(activation_function="silu"), "its activation is a SiLU"), (dict(attn_implementation="eager"), "attn_implementation='eager'"),
    (dict(add_cross_attention=True), "it also has crossattention, ln_cross_attn"),
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


def flat(result):
    """(form, tensors) of nested tuples, dicts and caches, so that results are compared whole."""
    if torch.is_tensor(result):
        return "tensor", [result]
    if isinstance(result, (tuple, list)):
        parts = [flat(item) for item in result]
        return (type(result).__name__, *(form for form, _ in parts)), [t for _, ts in parts for t in ts]
    if hasattr(result, "items"):
        form, ts = flat(tuple(result.values()))
        return (type(result).__name__, tuple(result.keys()), form), ts
    if hasattr(result, "update") and hasattr(result, "get_seq_length"):
        first = result.layers[0].keys if hasattr(result, "layers") else result.key_cache[0]                 # (B, H, T, D)
        form, ts = flat(tuple(result.update(*[first[..., :1, :]] * 2, layer) for layer in range(2)))        # what is in it, too
        return (type(result).__name__, form), ts
    assert result is None or isinstance(result, (int, float, str)), type(result)
    return type(result).__name__, []


def padding():
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    return mask


CALLS = {
    "plain": lambda m: m(tokens()), "no cache": lambda m: m(tokens(), use_cache=False),
    "a cache": lambda m: m(tokens(), **cached(m, tokens()[:, :3])), "one token": lambda m: m(tokens()[:, :1]),
    "a tuple": lambda m: m(tokens(), return_dict=False), "padding": lambda m: m(tokens(), attention_mask=padding()),
    "hidden states": lambda m: m(tokens(), output_hidden_states=True, use_cache=False),
    "attentions": lambda m: m(tokens(), output_attentions=True, use_cache=False),
    "attentions and cache": lambda m: m(tokens(), output_attentions=True, use_cache=True),
    "embeddings": lambda m: m(inputs_embeds=torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))),
    "positions": lambda m: m(tokens(), position_ids=torch.arange(11).flip(0)[None]),
    "greedy": lambda m: m.generate(tokens(), max_new_tokens=6, do_sample=False),
    "padded greedy": lambda m: m.generate(tokens(), attention_mask=padding(), max_new_tokens=6, do_sample=False),
    "beams": lambda m: m.generate(tokens(), max_new_tokens=6, num_beams=3, do_sample=False),
    "without cache": lambda m: m.generate(tokens(), max_new_tokens=6, do_sample=False, use_cache=False),
    "sampled": lambda m: (torch.manual_seed(4), m.generate(tokens(), max_new_tokens=6, do_sample=True, top_k=5))[1],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("ops", [False, True], ids=["own path", "ops"])
def test_a_call_returns_what_it_returned_in_form_and_value(call, ops, monkeypatch):
    model = gpt2().eval()
    with torch.no_grad():
        expected = flat(CALLS[call](model))
        assert nanogpt_fast.accelerate(model).left == []
        if ops:
            monkeypatch.setattr(parts, "_kernel_why_not", lambda *args: None)
        found = flat(CALLS[call](model))
    assert found[0] == expected[0]
    assert_same(found[1], expected[1], exact=not ops)


@pytest.mark.parametrize("ops", [False, True], ids=["own path", "ops"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("options", [None, dict(use_reentrant=False), dict(use_reentrant=True)],
                         ids=["whole", "checkpointed", "checkpointed, reentrant"])
def test_a_training_step_in_bf16_and_under_checkpointing_is_the_same(options, autocast, ops, monkeypatch):
    model = gpt2(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0).train()
    if options is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return step(model)
    expected = run()
    assert nanogpt_fast.accelerate(model, backend="reference").left == []
    if ops:
        monkeypatch.setattr(parts, "_kernel_why_not", lambda *args: None)
    found = run()
    assert len(found) == len(expected) == 2 + sum(1 for _ in model.parameters())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=(5e-2 if autocast else 1e-4) * float(b.abs().max()) if ops else 0)


@pytest.mark.parametrize("part", ["attention", "block"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_part_called_alone_takes_its_cache_under_each_of_its_names_and_by_position(part, use_cache, on_ops):
    """transformers renames older names by decorators, for some releases."""
    transformers = pytest.importorskip("transformers")
    model = gpt2().eval()
    block = model.transformer.h[0]
    module = block.attn if part == "attention" else block
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    legacy = "layer_past" in gpt2_parts.parameters(type(module).forward)
    def call(name):
        cache = None if legacy else transformers.DynamicCache()
        result = module(x, cache, use_cache=use_cache) if name is None else module(x, use_cache=use_cache, **{name: cache})
        return flat((result, () if cache is None or cache.get_seq_length(0) == 0 else cache))
    def known(name):
        """A name that the release does not know is refused, or passed on, and then the cache stays empty."""
        try:
            return len(call(name)[1]) > 1 or legacy
        except TypeError:
            return False
    with torch.no_grad():
        names = [name for name in (None, *gpt2_parts.CACHES) if known(name)]
        expected = [call(name) for name in names]
        assert len(names) >= 2
        report = nanogpt_fast.accelerate(model)
        for name, (form, values) in zip(names, expected):
            found = call(name)
            assert found[0] == form, name
            assert_same(found[1], values, exact=False)
    assert report.calls[part, "kernels"] == len(names)


def test_arguments_that_the_attention_function_reads_take_the_own_path(on_ops):
    model = gpt2(attn_pdrop=0.0).eval()
    attn, x = model.transformer.h[0].attn, torch.randn(1, 5, 32)
    def call():
        try:
            with torch.no_grad():
                return flat(attn(x, is_causal=False))[1][0]
        except TypeError as error:  # up to 4.57 the attention passes is_causal itself
            return str(error)
    expected = call()
    report = nanogpt_fast.accelerate(model)
    found = call()
    assert torch.equal(found, expected) if torch.is_tensor(expected) else found == expected
    assert not report.calls.get(("attention", "kernels"))


def test_every_argument_that_transformers_own_attention_function_reads_is_known():
    sdpa = pytest.importorskip("transformers.integrations.sdpa_attention")
    names = set(inspect.signature(sdpa.sdpa_attention_forward).parameters)
    assert names - {"module", "query", "key", "value", "attention_mask", "kwargs"} <= set(gpt2_parts.READ_BY_SDPA)


def test_a_subclass_that_returns_something_else_or_takes_no_cache_is_named():
    model = gpt2(n_layer=3).eval()
    listed, attn, block = model.transformer.h[0], model.transformer.h[1].attn, model.transformer.h[2]
    class Listed(type(listed)):
        @functools.wraps(type(listed).forward)
        def forward(self, *args, **kwargs):
            return [super().forward(*args, **kwargs)]
    def bare(own):
        return type("Bare", (own,), {"forward": lambda self, hidden_states, **kwargs: own.forward(self, hidden_states, **kwargs)})
    listed.__class__, attn.__class__, block.__class__ = Listed, bare(type(attn)), bare(type(block))
    left = {row.path: row.reason for row in nanogpt_fast.accelerate(model).left}
    assert left.keys() == {"transformer.h.0", "transformer.h.1.attn", "transformer.h.2"}
    assert "it returns a list" in left["transformer.h.0"]
    assert left["transformer.h.1.attn"].startswith("its forward takes no cache")
    assert left["transformer.h.2"].startswith("its forward takes no cache")


def test_torch_compile_traces_gpt2_whole(on_ops):
    model = gpt2(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    body = model.transformer.h[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = flat(body(x))
    nanogpt_fast.accelerate(model)
    torch._dynamo.reset()
    found = flat(torch.compile(body, backend="eager", fullgraph=True)(x))
    assert found[0] == expected[0]
    assert_same(found[1], expected[1], exact=False)


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
        monkeypatch.setattr(parts, "_kernel_why_not", lambda *args: None)
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
    parts._kernel_why_not = lambda *args: None
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
    del ddp, loss       # freed after its group, DDP may wait for gloo's thread for ever (PyTorch 2.13)
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
