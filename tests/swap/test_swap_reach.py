"""What is recognised of relatives of nanoGPT that differ in what does not matter: no dropouts, a GELU of another name, other names of a block.

The classes are written after the attribute names and the calls of these repositories: karpathy/build-nanogpt, minGPT, ng-video-lecture, and
nanoGPT before PyTorch had a fast tanh GELU.
"""
import copy
import math
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from forks import fork

import nanogpt_fast
from nanogpt_fast.swap import parts

C, H, T = 32, 2, 24


@pytest.fixture
def on_ops(monkeypatch):
    monkeypatch.setattr(parts, "_why_reference", lambda *args: None)


def heads(module, x):
    return (t.view(*x.shape[:2], module.n_head, -1).transpose(1, 2) for t in module.c_attn(x).split(module.n_embd, dim=2))


class BuildAttention(nn.Module):
    """build-nanogpt: no dropout anywhere."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_proj.NANOGPT_SCALE_INIT = 1
        self.n_head, self.n_embd = H, C

    def forward(self, x):
        y = F.scaled_dot_product_attention(*heads(self, x), is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(x.shape))


class BuildMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(C, 4 * C), nn.GELU(approximate="tanh"), nn.Linear(4 * C, C)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class BuildBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(C), BuildAttention(), nn.LayerNorm(C), BuildMlp()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class MinAttention(nn.Module):
    """minGPT: dropout modules, the softmax written out, a mask buffer."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.2)
        self.register_buffer("bias", torch.tril(torch.ones(T, T)).view(1, 1, T, T))
        self.n_head, self.n_embd = H, C

    def forward(self, x):
        q, k, v = heads(self, x)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :x.size(1), :x.size(1)] == 0, float("-inf"))
        y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(x.shape)))


class NewGELU(nn.Module):
    def forward(self, x):
        return new_gelu(x)


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class MinBlock(nn.Module):
    """minGPT's MLP is a ModuleDict that a lambda calls."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(C), MinAttention(), nn.LayerNorm(C)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(C, 4 * C), c_proj=nn.Linear(4 * C, C), act=NewGELU(), dropout=nn.Dropout(0.2)))
        m = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class Mlp(nn.Module):
    """An activation of its own: a function, or a module under another name."""

    def __init__(self, function=new_gelu, dropout=0.1, **children):
        super().__init__()
        self.c_fc, self.c_proj, self.dropout = nn.Linear(C, 4 * C), nn.Linear(4 * C, C), nn.Dropout(dropout)
        for name, child in children.items():
            setattr(self, name, child)
        self.function = function

    def forward(self, x):
        act = next((child for name, child in self._modules.items() if name not in ("c_fc", "c_proj", "dropout")), self.function)
        return self.dropout(self.c_proj(act(self.c_fc(x))))


class Head(nn.Module):
    """ng-video-lecture: a module a head."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(C, C // H, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(T, T)))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        k, q = self.key(x), self.query(x)
        w = q @ k.transpose(-2, -1) * k.shape[-1]**-0.5
        w = w.masked_fill(self.tril[:x.size(1), :x.size(1)] == 0, float("-inf"))
        return self.dropout(F.softmax(w, dim=-1)) @ self.value(x)


class MultiHeadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.proj, self.dropout = nn.ModuleList([Head() for _ in range(H)]), nn.Linear(C, C), nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([h(x) for h in self.heads], dim=-1)))


class FeedFoward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C), nn.Dropout(0.1))

    def forward(self, x):
        return self.net(x)


class LectureBlock(nn.Module):
    def __init__(self, ffwd=FeedFoward):
        super().__init__()
        self.sa, self.ffwd, self.ln1, self.ln2 = MultiHeadAttention(), ffwd(), nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


def bare_feed_forward():
    return nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))


class TensorGELU(nn.Module):
    """LLMs-from-scratch: constants made into tensors, under PyTorch's own name."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(torch.sqrt(torch.tensor(2.0 / torch.pi)) * (x + 0.044715 * torch.pow(x, 3))))


TensorGELU.__name__ = "GELU"


class Erf(nn.Module):
    def forward(self, x):
        return F.gelu(x)


class SwiGLUish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def sequential(act, *dropout):
    return nn.Sequential(nn.Linear(C, 4 * C), act, nn.Linear(4 * C, C), *dropout)


@pytest.mark.parametrize("make, parts_swapped, reasons", [
    (BuildBlock, ["attention", "block", "layer_norm", "layer_norm", "mlp"], {}),
    (MinBlock, ["attention", "layer_norm", "layer_norm"], {"0": "its mlp is a ModuleDict that was not swapped"}),
    (LectureBlock, ["block", "layer_norm", "layer_norm", "mlp"], {"0.sa.heads.0": "it lacks proj", "0.sa.heads.1": "it lacks proj"}),
    (lambda: LectureBlock(bare_feed_forward), ["block", "layer_norm", "layer_norm", "mlp"], {"0.sa.heads.0": "", "0.sa.heads.1": ""}),
    (lambda: Mlp(), ["mlp"], {}), (lambda: Mlp(act=NewGELU()), ["mlp"], {}), (lambda: Mlp(nonlinearity=nn.ReLU()), ["mlp"], {}),
    (lambda: Mlp(function=F.relu), ["mlp"], {}), (lambda: Mlp(function=F.gelu), ["mlp"], {}),
    (lambda: Mlp(activation=nn.GELU()), ["mlp"], {}),
    (lambda: sequential(TensorGELU()), ["mlp"], {}), (lambda: sequential(Erf(), nn.Dropout(0.2)), ["mlp"], {}),
    (lambda: sequential(SwiGLUish()), [], {"0": "it computes something else"}),
    (lambda: Mlp(function=F.silu), [], {"0": "it computes something else"})],
    ids=["build-nanogpt", "minGPT", "lecture", "lecture, no dropout", "new_gelu", "NewGELU", "ReLU", "F.relu", "F.gelu", "activation", "LLMs-from-scratch", "Sequential",
         "Sequential, SiLU", "F.silu"])
def test_a_relative_is_swapped_and_computes_what_it_did(make, parts_swapped, reasons, on_ops):
    torch.manual_seed(0)
    model = nn.ModuleList([make()])
    twin, x = copy.deepcopy(model), torch.randn(2, 9, C)
    if make is MinBlock:
        twin = model        # its lambda holds the first one's MLP
    with torch.no_grad():
        expected = [_step(twin[0], x, mode) for mode in (False, True)]
        report = nanogpt_fast.accelerate(model)
        assert sorted(row.part for row in report.swapped) == parts_swapped, report
        assert report.left == [] or {row.path: row.reason for row in report.left}.keys() == reasons.keys()
        for row in report.left:
            assert reasons[row.path] in row.reason
        for mode, y in zip((False, True), expected):
            torch.testing.assert_close(_step(model[0], x, mode), y, rtol=1e-4, atol=1e-5)
    if parts_swapped:
        assert any(where == "kernels" for _, where in report.calls), report


def _step(module, x, training):
    torch.manual_seed(3)
    return module.train(training)(x)


def test_without_dropouts_nothing_is_added_to_a_module_and_copies_work(on_ops):
    model = nn.ModuleList([BuildBlock()])
    keys, text = list(model.state_dict()), repr(model)
    report = nanogpt_fast.accelerate(model)
    assert list(model.state_dict()) == keys and repr(model) == text and "resid_dropout" not in dict(model.named_modules())
    x = torch.randn(1, 5, C)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin[0](x), model[0](x))
    assert report.unfused == [] and nanogpt_fast.restore(model) == 5


def test_a_dropout_that_the_code_would_take_is_missed():
    class Asks(BuildMlp):
        def forward(self, x):
            x = super().forward(x)
            return self.dropout(x) if hasattr(self, "dropout") else x
    report = nanogpt_fast.accelerate(nn.ModuleList([Asks(), BuildMlp()]))
    assert {row.path: row.reason for row in report.left} == {"0": "its code asks for dropout, which it lacks"}


def test_an_activation_that_is_changed_later_is_honoured(on_ops):
    model = nn.ModuleList([BuildBlock()])
    twin, x = copy.deepcopy(model), torch.randn(1, 5, C)
    report = nanogpt_fast.accelerate(model)
    for change in (lambda m: setattr(m[0].mlp, "gelu", nn.ReLU()), lambda m: setattr(m[0].mlp, "gelu", nn.GELU()),
                   lambda m: m[0].mlp.gelu.register_forward_hook(lambda m, args, out: 2 * out)):
        for m in (model, twin):
            change(m)
        torch.testing.assert_close(model[0](x), twin[0](x))
    assert report.unfused


def test_an_activation_in_a_sequential_that_is_changed_later_is_honoured(on_ops):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 1.0

        def forward(self, x):
            return self.scale * F.gelu(x)

    model = nn.ModuleList([sequential(Scaled())])
    twin, x = copy.deepcopy(model), torch.randn(1, 5, C)
    report = nanogpt_fast.accelerate(model)
    assert len(report.swapped) == 1
    for change in (lambda m: setattr(m[0][1], "scale", 3.0), lambda m: m[0].__setitem__(1, SwiGLUish())):
        for m in (model, twin):
            change(m)
        torch.testing.assert_close(model[0](x), twin[0](x))
    assert not any(where == "kernels" for _, where in report.calls)


def test_what_holds_layernorms_alone_is_refused_and_left_as_it_was():
    model = nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C))
    with pytest.raises(TypeError, match="holds no part of a GPT"):
        nanogpt_fast.accelerate(model)
    assert type(model[1]) is nn.LayerNorm and "_swap_state" not in vars(model[1])


def test_the_report_counts_calls_on_kernels(monkeypatch):
    model = fork(dropout=0.0)
    report = nanogpt_fast.accelerate(model)
    assert "2 x attention (CausalSelfAttention), not called yet" in str(report)
    model(torch.zeros(1, 3, dtype=torch.long))
    assert "2 x attention (CausalSelfAttention), 0 of 2 calls on kernels" in str(report)
    monkeypatch.setattr(parts, "_why_reference", lambda *args: None)
    model.transformer.h[0].attn(torch.randn(1, 3, C))
    assert "2 x attention (CausalSelfAttention), 1 of 3 calls on kernels" in str(report)
