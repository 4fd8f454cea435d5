"""Generation from a model that was changed: a hook, another module, shapes or attributes, before it generates, between two calls, or while a
stream is read."""
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from gpts import prompts_of, sharpened

from nanogpt_fast import GPT, MLP, backend
from nanogpt_fast.generation import session as sessions


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(GPT):
    def forward(self, idx, targets=None, **more):
        logits, loss = super().forward(idx, targets, **more)
        return logits.roll(1, -1), loss


def touch(model, how):
    attn = model.transformer.h[0].attn
    if how == "hook":
        attn.register_forward_hook(lambda module, args, out: 3 * out)
    elif how == "lora":
        attn.c_attn.__class__ = Doubled
    elif how == "mlp":
        model.transformer.h[1].mlp = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
    elif how == "subclass":
        model.__class__ = Shifted
    elif how == "parametrize":
        nn.utils.parametrize.register_parametrization(attn.c_proj, "weight", nn.Softplus())
    elif how == "dropout":
        model.train().transformer.drop.p = 0.4
    elif how == "manual":
        attn.flash = False
    elif how == "heads":
        attn.n_head *= 2
    elif how == "head":
        model.lm_head = nn.Linear(32, 40)
    elif how == "max_norm":
        model.transformer.wpe.max_norm = 0.1
    return model


@pytest.mark.parametrize("how", ["hook", "lora", "mlp", "subclass", "parametrize", "dropout", "manual", "heads", "head", "max_norm"])
def test_a_touched_model_is_generated_from_without_the_cache_and_it_is_said(how):
    model, idx = touch(sharpened(), how), torch.stack(prompts_of(5))
    backend._noticed.clear()
    torch.manual_seed(2)
    with pytest.warns(RuntimeWarning, match="recomputes the whole context"):
        tokens = model.generate(idx, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(2)
        assert torch.equal(tokens, model.generate(idx, 30))  # said once
    torch.manual_seed(2)
    plain = idx
    with torch.no_grad():
        for _ in range(30):
            plain = torch.cat((plain, torch.multinomial(model(plain[:, -24:])[0][:, -1].softmax(-1), 1)), 1)
    assert torch.equal(tokens, plain)


@pytest.mark.parametrize("width", [16, 64, 256])
def test_an_mlp_of_another_width_is_decoded_right(width):
    model, idx = sharpened(), torch.stack(prompts_of(5))
    for block in model.transformer.h:
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(32, width), nn.Linear(width, 32)
    assert model.why_not_cached() is None
    assert torch.equal(model.generate(idx, 20, temperature=0), model.generate(idx, 20, temperature=0, use_cache=False))


def test_fewer_positions_than_block_size_are_an_index_error():
    model = sharpened()
    model.config.block_size = 64
    with pytest.raises(IndexError):
        model.generate(torch.stack(prompts_of(5)), 40)


def append_block(model):
    model.transformer.h.append(model.transformer.h[0])


def double_heads(model):
    model.config.n_head *= 2
    for block in model.transformer.h:
        block.attn.n_head *= 2


def other_activation(model):
    model.transformer.h[0].mlp.gelu = nn.GELU(approximate="tanh")


@pytest.mark.parametrize("change", [append_block, double_heads, other_activation])
def test_an_idle_session_of_another_structure_is_not_taken(change):
    model, idx = sharpened(), torch.stack(prompts_of(5))
    model.generate(idx, 3)
    before = list(sessions._idle[model])
    change(model)
    assert torch.equal(model.generate(idx, 20, temperature=0), model.generate(idx, 20, temperature=0, use_cache=False))
    assert not set(map(id, before)) & set(map(id, sessions._idle[model]))


@pytest.mark.parametrize("how", ["hook", "pre-hook", "instance", "class", "function", "train", "heads"])
def test_a_model_touched_while_a_stream_is_read_is_followed(how, monkeypatch):
    def change(model):
        mlp, forward = model.transformer.h[0].mlp, MLP.forward
        if how == "hook":
            mlp.register_forward_hook(lambda module, args, out: 3 * out)
        elif how == "pre-hook":
            mlp.register_forward_pre_hook(lambda module, args: (3 * args[0],))
        elif how == "instance":
            mlp.forward = lambda x: 3 * forward(mlp, x)
        elif how == "class":
            monkeypatch.setattr(MLP, "forward", lambda self, x: 3 * forward(self, x))
        elif how == "function":
            gelu = F.gelu
            monkeypatch.setattr(F, "gelu", lambda *args, **more: 3 * gelu(*args, **more))
        elif how == "train":
            model.transformer.drop.p = 0.9
            model.train()
        else:
            model.transformer.h[0].attn.n_head *= 2
    texts = []
    for use_cache in (True, False):
        model = sharpened()
        torch.manual_seed(1)
        tokens = []
        for i, token in enumerate(model.generate(torch.stack(prompts_of(5)), 12, stream=True, use_cache=use_cache)):
            tokens.append(token)
            if i == 4:
                change(model)
        monkeypatch.undo()
        texts.append(tokens)
    assert texts[0] == texts[1] and len(texts[0]) >= 12
