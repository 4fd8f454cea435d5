"""nanogpt_fast.ops as a library: its names, their documentation and types, and README's example."""
import inspect
import re
import typing
from pathlib import Path

import pytest
import torch

import nanogpt_fast
from nanogpt_fast import ops

README = Path(__file__).parents[2] / "README.md"
FUNCTIONS = [getattr(ops, name) for name in ops.__all__]


def test_the_package_shows_what_it_has():
    assert {"GPT", "GPTConfig", "accelerate", "restore", "explain", "use", "ops"} <= set(dir(nanogpt_fast)) and nanogpt_fast.ops is ops
    assert all(name in nanogpt_fast.__doc__ for name in ("accelerate", "explain", "use", "ops"))
    assert (Path(nanogpt_fast.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_op_is_documented_and_typed(function):
    assert function.__name__ in ops.__doc__ and len(inspect.getdoc(function)) > 30
    signature, hints = inspect.signature(function), typing.get_type_hints(function)
    assert set(hints) == {*signature.parameters, "return"}
    assert "backend" not in signature.parameters or hints["backend"] == str | dict | None


@pytest.mark.parametrize("backend", ("reference", "auto", "auto,layer_norm=reference", None))
def test_a_backend_may_be_a_text(backend):
    x, w, target = torch.randn(2, 6, 8), torch.randn(32, 8), torch.randint(32, (2, 6))
    q, logits = torch.randn(2, 2, 6, 4), torch.randn(2, 32)
    calls = (lambda **b: ops.causal_attention_qkvpacked(torch.cat([x] * 3, 2), 2, **b), lambda **b: ops.causal_attention(q, q, q, **b),
             lambda **b: ops.decode_attention(q[:, :, :1], q, q, torch.tensor([3, 6]), **b), lambda **b: ops.layer_norm(x, torch.ones(8), None, **b),
             lambda **b: ops.add_layer_norm(x, x, torch.ones(8), None, **b)[1], lambda **b: ops.gelu_mlp(x, w, None, w.t(), None, **b),
             lambda **b: ops.linear_cross_entropy(x, w, target, **b)[0], lambda **b: ops.sample(logits, seed=1, **b))
    for call in calls:
        torch.testing.assert_close(call(backend=backend), call(backend=None if backend is None else nanogpt_fast.backend.parse(backend)))


def test_a_wrong_text_is_named():
    with pytest.raises(ValueError, match="'turbo' is not one of auto, fused, reference"):
        ops.layer_norm(torch.randn(2, 8), torch.ones(8), None, backend="turbo")
    with pytest.raises(RuntimeError, match="backend='fused', but no kernel can run layer_norm: triton: .*need a CUDA tensor"):
        ops.layer_norm(torch.randn(2, 8), torch.ones(8), None, backend="fused")


def test_readmes_example_runs():
    example, = re.findall(r"^```python\n(import torch\nfrom nanogpt_fast import ops\n.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    session = {}
    exec(compile(example, str(README), "exec"), session)
    assert session["x"].grad is not None and session["token"].shape == (2,)


def test_a_dict_may_name_some_of_the_ops():
    x, weight = torch.randn(2, 16), torch.ones(16)
    for choice in ({"layer_norm": "reference"}, {"attention": "reference"}):
        assert torch.allclose(ops.layer_norm(x, weight, None, backend=choice), torch.nn.functional.layer_norm(x, (16,)), atol=1e-5)
    with pytest.raises(ValueError, match="no op is called 'layernorm'"):
        ops.layer_norm(x, weight, None, backend={"layernorm": "reference"})
