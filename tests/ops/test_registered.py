"""Kernels of one's own: registered, chosen by name, by what was measured, and never otherwise; verified and timed like ours."""
import os
import subprocess
import sys
from pathlib import Path

import cards
import pytest
import torch
import torch.nn.functional as F

from nanogpt_fast import GPT, GPTConfig, backend, cli, explain, ops, reference
from nanogpt_fast.checks import verify
from nanogpt_fast.kernels import fastest
from nanogpt_fast.ops import attention, cross_entropy, linear, mlp, norm, registered

PLAIN = {       # each op's forward, differentiable by autograd
    "attention": lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale),
    "layer_norm": lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps),
    "mlp": lambda x, w_fc, b_fc, w_proj, b_proj, activation: reference.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, activation_name=activation),
    "cross_entropy": lambda x, weight, targets, ignore_index: F.cross_entropy(x @ weight.t(), targets, ignore_index=ignore_index)}


@pytest.fixture
def mine():
    """register(op, forward, ...) as "mine", and the calls of its forward; forgotten after the test."""
    calls, added = [], []

    def register(op, forward=None, **more):
        def counted(*tensors, **options):
            calls.append((op, options))
            return (forward or PLAIN[op])(*tensors, **options)
        ops.register(op, "mine", counted, **more)
        added.append(op)
        return calls
    yield register
    for op in set(added):
        ops.unregister(op, "mine")


def model_of(choice, **config):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32) | config), backend=choice)


@pytest.mark.parametrize("op", registered.OPS)
def test_a_model_trains_on_it_by_name(mine, op):
    calls = mine(op)
    x, y = torch.randint(65, (2, 2, 16))
    results = []
    for choice in ("reference", f"reference,{op}=mine"):
        model = model_of(choice)
        loss = model(x, y, return_logits=False)[1]
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    assert len(calls) == {"attention": 2, "layer_norm": 5, "mlp": 2, "cross_entropy": 1}[op]
    (loss, gradients), (mine_loss, mine_gradients) = results
    torch.testing.assert_close(mine_loss, loss)
    for a, b in zip(mine_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_backward_of_ones_own_is_called(mine):
    def forward(x, weight, bias, eps):
        normal = F.layer_norm(x, weight.shape, eps=eps)
        return normal * weight + (0 if bias is None else bias), (normal, weight)
    seen = []

    def backward(saved, gradient, eps):
        normal, weight = saved
        seen.append(gradient.shape)
        return torch.zeros_like(normal), (gradient * normal).sum(0), None
    mine("layer_norm", forward, backward=backward)
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = norm.layer_norm(x, weight, None, backend=backend.parse("layer_norm=mine"))
    y.sum().backward()
    assert seen == [(3, 8)] and (x.grad == 0).all() and torch.allclose(weight.grad, F.layer_norm(x, (8,)).sum(0), atol=1e-5)


def test_a_backward_of_ones_own_gets_a_gradient_whose_memory_holds_its_values(mine):
    """A kernel reads memory by address, and does not see that a view is negative lazily."""
    seen = []

    def backward(saved, gradient, eps):
        seen.append(gradient)
        return gradient, None, None
    mine("layer_norm", lambda x, weight, bias, eps: (x * 1, ()), backward=backward)
    x, expected = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    norm.layer_norm(x, torch.ones(8), None, backend=backend.parse("layer_norm=mine")).backward(torch._neg_view(-expected))
    assert not seen[0].is_neg() and torch.equal(seen[0], expected)


def test_auto_and_fused_never_take_it_unless_it_was_measured(mine, monkeypatch):
    calls = mine("layer_norm")
    x, weight = torch.randn(4, 32), torch.ones(32)
    norm.layer_norm(x, weight, None)
    with pytest.raises(RuntimeError):
        norm.layer_norm(x, weight, None, backend=backend.parse("fused"))
    assert not calls
    cards.on_card(monkeypatch, 0, [fastest.Row("layer_norm", "mine", size=(32, 32), basis="measured", note="measured here: mine 1 us")])
    norm.layer_norm(x, weight, None)
    assert len(calls) == 1
    assert "mine" in {row.implementation for row in explain(model_of(None), return_logits=False)}


def test_what_was_measured_and_is_not_registered_is_said(monkeypatch):
    monkeypatch.setattr(backend, "_noticed", set())
    cards.on_card(monkeypatch, 0, [fastest.Row("layer_norm", "theirs", basis="measured")])
    with pytest.warns(RuntimeWarning, match="for layer_norm, theirs was measured to be fastest here, but no kernel of this name is registered"):
        norm.layer_norm(torch.randn(4, 32), torch.ones(32), None)


def test_what_it_cannot_say_takes_another_or_is_refused(mine):
    for op in registered.OPS:
        mine(op)
    chosen = {op: backend.parse(f"{op}=mine") for op in registered.OPS}
    qkv, head, targets = torch.randn(1, 8, 96), torch.randn(65, 32), torch.randint(65, (8,))
    with pytest.raises(RuntimeError, match="'attention=mine', but that cannot run: mine: a registered kernel has no dropout"):
        attention.causal_attention_qkvpacked(qkv, 2, dropout_p=0.1, backend=chosen["attention"])
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(RuntimeError, match="there are 3 queries and 8 keys"):
        attention.causal_attention(q, k, k, backend=chosen["attention"])
    with pytest.raises(RuntimeError, match="returns no logits"):
        cross_entropy.linear_cross_entropy(torch.randn(8, 32), head, targets, backend=chosen["cross_entropy"])
    total = cross_entropy.linear_cross_entropy(torch.randn(8, 32), head, targets, reduction="sum", return_logits=False, backend=chosen["cross_entropy"])[0]
    assert total > 8
    x, w_fc, w_proj = torch.randn(64, 32), torch.randn(128, 32), torch.randn(32, 128)
    dropped = mlp.gelu_mlp(x, w_fc, None, w_proj, None, dropout_p=0.5, backend=chosen["mlp"])
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    mine("layer_norm", why_not=lambda x, weight, bias, eps: f"{x.shape[-1]} channels are too few")
    with pytest.raises(RuntimeError, match="mine: 32 channels are too few"):
        norm.layer_norm(x, torch.ones(32), None, backend=chosen["layer_norm"])


def test_separate_attention_and_autocast_reach_it(mine):
    calls = mine("attention", lambda q, k, v, scale: q * q.dtype.itemsize)
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention.causal_attention(q, k, v, scale=0.5, backend=backend.parse("attention=mine"))
    assert y.dtype == torch.bfloat16 and torch.equal(y, q.bfloat16() * 2) and calls == [("attention", {"scale": 0.5})]


@pytest.mark.parametrize("arguments, error, reason", (
    (("decode", "a", len), ValueError, "kernels can be registered for attention"), (("layer_norm", "triton", len), ValueError, "none of auto"),
    (("layer_norm", "a,b", len), ValueError, "without commas"), (("layer_norm", "a", None), TypeError, "forward is None; expected a function"),
    (("layer_norm", "a", len, 3), TypeError, "backward is 3")))
def test_what_cannot_be_registered_is_named(arguments, error, reason):
    with pytest.raises(error, match=reason):
        ops.register(*arguments)


def test_an_implementation_is_forced_by_its_name():
    for wrong in ("layer_norm=mine", "mine", "attention=cublas"):
        with pytest.raises(ValueError, match="is not one of auto, fused, reference"):
            backend.parse(wrong)
    with pytest.raises(RuntimeError, match="'attention=cudnn', but that cannot run: it is not for this device"):
        attention.causal_attention_qkvpacked(torch.randn(1, 8, 96), 2, backend=backend.parse("attention=cudnn"))


def test_a_file_of_kernels_is_loaded_at_the_first_choice(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("from nanogpt_fast.ops import register\nregister('layer_norm', 'from_a_file', lambda x, weight, bias, eps: x)\n")
    monkeypatch.setenv("NANOGPT_FAST_KERNELS", str(path))
    monkeypatch.setattr(backend, "_tuned", False)
    x = torch.randn(4, 32)
    try:
        norm.layer_norm(x, torch.ones(32), None)
        assert torch.equal(norm.layer_norm(x, torch.ones(32), None, backend=backend.parse("layer_norm=from_a_file")), x)
    finally:
        ops.unregister("layer_norm", "from_a_file")
    for text, reason in (("", "registers no kernel"), (None, "there is no file")):
        other = tmp_path / f"{reason[:3]}.py"
        if text is not None:
            other.write_text(text)
        with pytest.raises(ValueError, match=reason):
            registered.load(other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
def test_the_documents_example_says_why_it_cannot_run_on_a_cpu():
    registered.load(Path(__file__).parents[2] / "docs" / "my_layer_norm.py")
    try:
        with pytest.raises(RuntimeError, match="mine: Triton kernels need a CUDA tensor, this one is on cpu"):
            norm.layer_norm(torch.randn(4, 32), torch.ones(32), None, backend=backend.parse("layer_norm=mine"))
    finally:
        ops.unregister("layer_norm", "mine")


def test_a_files_own_errors_are_one_line_and_come_back_at_each_choice(tmp_path, monkeypatch):
    """Not a silent run without the kernels after the first call, and no traceback from a command."""
    monkeypatch.setattr(backend, "_tuned", False)
    for name, text, reason in (("syntax.py", "def x(:", "SyntaxError: invalid syntax"), ("other.py", "1 / 0", "ZeroDivisionError: division by zero")):
        path = tmp_path / name
        path.write_text(text)
        monkeypatch.setenv("NANOGPT_FAST_KERNELS", str(path))
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"NANOGPT_FAST_KERNELS: .*{name} fails: {reason}") as raised:
                norm.layer_norm(torch.randn(4, 32), torch.ones(32), None)
            assert cli.is_for_the_user(raised.value)
    (tmp_path / "kernels.txt").write_text("")
    with pytest.raises(ValueError, match="not a Python file by its name"):
        registered.load(tmp_path / "kernels.txt")


def test_a_file_that_ran_already_registers_again(tmp_path, monkeypatch):
    """As a script, say, that NANOGPT_FAST_KERNELS names too."""
    path = tmp_path / "mine.py"
    path.write_text("from nanogpt_fast.ops import register\nfrom nanogpt_fast.ops.norm import layer_norm\n"
                    "import torch\nregister('layer_norm', 'again', lambda x, weight, bias, eps: x)\nlayer_norm(torch.ones(2), torch.ones(2), None)\n")
    monkeypatch.setenv("NANOGPT_FAST_KERNELS", str(path))
    monkeypatch.setattr(backend, "_tuned", False)
    try:
        registered.load(path)           # its call of an op loads it once more
        registered.load(path)
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
        ops.unregister("layer_norm", "again")
        registered.load(path)           # it is the script, which has registered, or will
        assert registered.kernel("layer_norm", "again") is None
    finally:
        registered._kernels.pop(("layer_norm", "again"), None), backend.own["layer_norm"].pop("again", None)


def test_a_name_that_a_file_registers_can_be_asked_for_before_the_first_choice(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from nanogpt_fast import ops\nops.register('layer_norm', 'early', lambda x, weight, bias, eps: x * 0 + 7)\n")
    monkeypatch.setenv("NANOGPT_FAST_KERNELS", str(tmp_path / "mine.py"))
    monkeypatch.setattr(backend, "_tuned", False)
    x = torch.ones(2)
    try:
        assert norm.layer_norm(x, x, None, backend=backend.parse("layer_norm=early")).tolist() == [7, 7]
        with pytest.raises(ValueError, match="'typo' is not one of auto, .*, early"):
            backend.parse("layer_norm=typo")
        monkeypatch.setattr(backend, "_environment", backend.parse("layer_norm=typo", later=True))
        with pytest.raises(RuntimeError, match="'layer_norm=typo', but that cannot run: no kernel of this name is registered"):
            norm.layer_norm(x, x, None)
    finally:
        ops.unregister("layer_norm", "early")
    environment = os.environ | {"NANOGPT_FAST_BACKEND": "layer_norm=early"}         # which is read at import
    code = "import torch, nanogpt_fast.ops.norm as op; print(op.layer_norm(torch.ones(2), torch.ones(2), None).tolist())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[7.0, 7.0]\n", done.stderr


@pytest.mark.parametrize("forward, reason", (
    (lambda *_, **__: None, "forward returned None; expected a tensor"), (lambda x, *_, **__: x[:1], r"forward returned a tensor \(1, 4\); expected \(3, 4\)"),
    (lambda x, *_, **__: (x, ()), "forward returned a tuple; expected a tensor")))
def test_what_its_forward_may_not_return_is_named(mine, forward, reason):
    mine("layer_norm", forward)
    with pytest.raises((TypeError, ValueError), match="layer_norm=mine: " + reason):
        norm.layer_norm(torch.randn(3, 4), torch.ones(4), None, backend=backend.parse("layer_norm=mine"))


@pytest.mark.parametrize("gradients, reason", (
    (lambda g: None, "returned None; expected 3 gradients"), (lambda g: (g,), "returned a tuple of 1; expected 3 gradients"),
    (lambda g: (g[0], None, None), r"gradient 0 of backward has shape \(4,\); expected \(3, 4\)"),
    (lambda g: (g, None, g[0]), "gradient 2 of backward has shape .* expected None: there is no such tensor")))
def test_what_its_backward_may_not_return_is_named(mine, gradients, reason):
    mine("layer_norm", lambda x, weight, bias, eps: (x * weight, (x,)), backward=lambda saved, gradient, eps: gradients(gradient))
    y = norm.layer_norm(torch.randn(3, 4, requires_grad=True), torch.ones(4), None, backend=backend.parse("layer_norm=mine"))
    with pytest.raises((TypeError, ValueError), match="layer_norm=mine: .*" + reason):
        y.sum().backward()


def test_without_what_is_saved_a_forward_with_a_backward_is_named(mine):
    mine("layer_norm", PLAIN["layer_norm"], backward=lambda *_, **__: None)
    with pytest.raises(TypeError, match="forward returned a Tensor; with a backward of its own, expected"):
        norm.layer_norm(torch.randn(3, 4), torch.ones(4), None, backend=backend.parse("layer_norm=mine"))


def test_a_model_whose_kernel_is_gone_says_so(mine):
    mine("layer_norm")
    model, idx = model_of("layer_norm=mine"), torch.randint(65, (2, 16))
    model(idx)
    ops.unregister("layer_norm", "mine")
    try:
        with pytest.raises(RuntimeError, match="'layer_norm=mine', but that cannot run: no kernel of this name is registered in this process"):
            model(idx)
        assert {row.op: row.implementation for row in explain(model)}["layer_norm"] == "error"
        with pytest.raises(ValueError, match="'layer_norm' has no registered kernel 'mine'; it has none"):
            ops.unregister("layer_norm", "mine")
    finally:
        mine("layer_norm")


def test_a_name_is_auto_for_decode_attention(mine):
    calls = mine("attention")
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    y = attention.decode_attention(q[:, :, :1], k, v, torch.tensor([8]), backend=backend.parse("attention=mine"))
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q[:, :, :1], k, v))
    assert not calls


def test_a_linear_by_its_name_runs_or_says_why_not():
    x, weight = torch.randn(4, 32), torch.randn(8, 32)
    for name, reason in (("cublas", "it is not for this device or these arguments"), ("cpp", "cpp: ")):
        with pytest.raises(RuntimeError, match=f"'linear={name}', but that cannot run: {reason}"):
            linear.linear(x, weight, None, backend=backend.parse(f"linear={name}"))
    linear.linear(x, weight, None, backend=backend.parse("fused"))      # a library's call is as good as a kernel


@pytest.mark.parametrize("right", (True, False))
def test_verify_checks_it(mine, right):
    mine("layer_norm", lambda x, weight, bias, eps: PLAIN["layer_norm"](x, weight, bias, eps) * (1 if right else 1.02))
    rows = [row for row in verify.check(torch.device("cpu"), True, ("layer_norm",)) if row.implementation == "mine"]
    assert rows and {row.result for row in rows} == ({"pass"} if right else {"pass", "FAIL"} & {row.result for row in rows} | {"FAIL"})
