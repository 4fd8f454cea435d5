"""What is recognised of relatives of nanoGPT that differ in what does not matter: no dropouts, a GELU of another name, other names of a block."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from forks import fork
from relatives import C, BuildBlock, BuildMlp, Erf, LectureBlock, MinBlock, Mlp, NewGELU, SwiGLUish, TensorGELU, bare_feed_forward, sequential

import nanogpt_fast
from nanogpt_fast.swap import parts


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
    assert {row.path: row.reason for row in report.left} == {"0": "its code uses dropout, which it lacks"}


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
    monkeypatch.setattr(parts, "_kernel_why_not", lambda *args: None)
    model.transformer.h[0].attn(torch.randn(1, 3, C))
    assert "2 x attention (CausalSelfAttention), 1 of 3 calls on kernels" in str(report)
