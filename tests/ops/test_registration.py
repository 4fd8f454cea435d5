"""What Inductor makes of our operators. Nothing runs: fakes are traced, and their graph is lowered."""
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from nanogpt_fast.ops import cross_entropy, mlp, norm, sampler  # noqa: F401  (they register their operators)
from nanogpt_fast.ops.registration import raw

inductor = pytest.importorskip("torch._inductor.graph")


def many_blocks(x, weight, w_fc, w_proj, targets, ids):
    """As in a GPT: each block reads a stream and adds to it, and the loss comes behind all of them."""
    def norm(x, branch):
        s, h, _ = raw.layer_norm_forward(x, branch, weight, None, None, 0.0, 1e-5, torch.float32)
        return x if branch is None else s, h

    branch = None
    for _ in range(12):
        x, h = norm(x, branch)
        branch = raw.mlp_forward(h, w_fc, None, w_proj, None, None, "gelu", 0.0, "pointwise", False, False)[0]
    h = norm(x, branch)[1]
    loss = raw.linear_cross_entropy(h, w_fc, targets, -1, True, True)[0]
    offset, out = ids.clone(), ids.clone()
    raw.sample(h, None, 1.0, None, 0, None, 1.0, None, 0.0, ids, offset, out, False, "auto")
    return loss, out


def test_inductor_formats_no_arguments_of_an_operator_of_ours(monkeypatch):
    """PyTorch 2.11 does at an operator that it meets for the first time: text that doubles with each of these blocks."""
    from torch._inductor import exc, lowering
    from torch._inductor.virtualized import V
    formatted = []
    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(lambda target, *arguments: formatted.append(target)))
    for operator in list(lowering.lowerings):       # what an earlier test has lowered is known
        if "nanogpt_fast" in str(operator):
            monkeypatch.delitem(lowering.lowerings, operator)
    inputs = (torch.randn(8, 16), torch.randn(16), torch.randn(64, 16), torch.randn(16, 64), torch.zeros(8, dtype=torch.long),
              torch.zeros(8, dtype=torch.long))
    traced = make_fx(many_blocks, tracing_mode="fake")(*inputs)
    node = next(iter(traced.graph.nodes))
    with V.set_fake_mode(node.meta["val"].fake_mode):
        graph = inductor.GraphLowering(traced, inputs)
        with V.set_graph_handler(graph):
            graph.run(*inputs)
    assert {raw.linear_cross_entropy.default, raw.sample.default} <= lowering.lowerings.keys()
    assert not formatted
