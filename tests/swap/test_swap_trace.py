"""A trial of accelerate leaves no trace in the model, and does not depend on what is around it; torch.compile traces what was swapped."""
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
from forks import fork, left

import nanogpt_fast
from nanogpt_fast.swap import Swapped, stage


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
    assert "mlpf is a closure over a Block" in left(nanogpt_fast.accelerate(model))["transformer.h.0"]


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
