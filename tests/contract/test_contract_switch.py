"""The drop-in contract's switch between implementations (DESIGN decision 1), and explain."""
import os

import pytest
import torch
from sides import batch, ours

import nanogpt_fast


# The switch (DESIGN decision 1) and explain

def test_backend_can_be_chosen_by_model_context_and_op():
    x, y = batch()
    with pytest.raises(RuntimeError, match="backend='fused', but no kernel can run"):
        if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("kernels run here")
        ours(backend="fused")(x, y)
    model = ours(backend="fused")
    with nanogpt_fast.use("reference"):
        model(x, y)
    with pytest.raises(ValueError, match="'quick' is not one of auto, fused, reference"):
        ours(backend="quick")
    with pytest.raises(ValueError, match="no op is called 'atention'"):
        ours(backend="auto,atention=reference")


def test_explain_names_an_implementation_and_a_reason_for_every_op():
    model = ours()
    model.transformer.h[1].attn.register_forward_hook(lambda *args: None)
    state = torch.get_rng_state()
    rows = nanogpt_fast.explain(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {row.op for row in rows} == {"attention", "layer_norm", "mlp", "cross_entropy", "block 1"}
    assert "has a hook" in str(rows)
    assert all(row.implementation == "reference" and row.reason == "asked for" for row in nanogpt_fast.explain(ours(backend="reference")))


def test_attn_flash_false_takes_the_written_out_path():
    model, (x, y) = ours(), batch()
    before = model(x, y)[0]
    for block in model.transformer.h:
        block.attn.flash = False
    assert torch.allclose(model(x, y)[0], before, atol=1e-6) and not torch.equal(model(x, y)[0], before)
    model.transformer.h[0].attn.attn_dropout.p = 0.5
    assert not torch.equal(model(x, y)[0], model(x, y)[0])
