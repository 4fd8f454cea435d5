"""The trainer's embeddings (training/embedding.py) on a CPU: gradients are the dense ones, and PyTorch embeds where something is unusual."""
import gpts
import pytest
import torch
import torch.nn as nn

from nanogpt_fast.training import embedding


def gradients(model, by_row, *tokens, times=2):
    with embedding.gradient_by_row(model, by_row) as done:
        assert done == by_row
        for _ in range(times):                                       # accumulation
            model(*tokens, return_logits=False)[1].backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("T", (24, 16, 1))
def test_the_rows_are_added_to_the_heads_gradient_and_make_the_dense_one(T):
    model = gpts.small()
    x, y = torch.randint(7, (3, T)), torch.randint(61, (3, T))       # 7 words: each is met several times
    ours, theirs = (gradients(model, by_row, x, y) for by_row in (True, False))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)
    assert not ours["transformer.wpe.weight"][T:].any()
    wte = model.transformer.wte
    assert "forward" not in vars(wte) and not wte.weight._post_accumulate_grad_hooks and model._lookup is None


def test_it_embeds_to_the_same_bits_at_any_place():
    model, x = gpts.small().eval(), torch.randint(65, (2, 5))
    expected = model._embed(x, 3)
    with embedding.gradient_by_row(model):
        assert torch.equal(model._embed(x, 3), expected)
        with pytest.raises(IndexError, match="token ids must lie in 0..64"):
            model._embed(x + 65)


@pytest.mark.parametrize("frozen", ("wte", "wpe"))
def test_what_is_frozen_gets_no_gradient(frozen):
    model, tokens = gpts.small(), torch.randint(65, (2, 2, 9))
    model.transformer[frozen].requires_grad_(False)
    ours, theirs = (gradients(model, by_row, *tokens) for by_row in (True, False))
    for name, gradient in theirs.items():
        assert (gradient is None) == (ours[name] is None) == (name == f"transformer.{frozen}.weight")
        torch.testing.assert_close(ours[name], gradient, msg=name)
    model.requires_grad_(False)
    with embedding.gradient_by_row(model):
        model(*tokens)


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out.detach())


def replaced(model):
    model.transformer.wpe = nn.Embedding(24, 32, padding_idx=0)


def longer(model):
    model.transformer.wpe.register_forward_hook(lambda module, args, out: 2 * out)


def doubled(model):
    model.double()


@pytest.mark.parametrize("change, reason", [
    (untied, "not the token embedding's matrix alone"), (hooked, "hook"), (replaced, "an option that nanoGPT's do not have"), (longer, "hook"),
    (doubled, "not contiguous float32")], ids=lambda value: getattr(value, "__name__", ""))
def test_pytorch_embeds_where_something_is_unusual(change, reason):
    model = gpts.small()
    assert embedding.why_not_by_row(model) is None
    change(model)
    assert reason in embedding.why_not_by_row(model)
    with embedding.gradient_by_row(model) as by_row:
        assert not by_row and model._lookup is None


def test_pytorch_embeds_on_the_reference_path():
    assert "asked for the reference" in embedding.why_not_by_row(gpts.small(backend="reference"))


def test_a_gradient_of_another_dtype_or_layout_gets_the_rows_too():
    model, tokens = gpts.small(), torch.randint(7, (2, 3, 9))
    expected = gradients(model, False, *tokens)["transformer.wte.weight"]
    weight = model.transformer.wte.weight
    weight.grad = torch.zeros_like(weight.t().contiguous()).t()
    found = gradients(model, True, *tokens)["transformer.wte.weight"]
    assert not found.is_contiguous()
    torch.testing.assert_close(found, expected)
