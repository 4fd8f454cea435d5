"""Conversion between the classic layout and nanoGPT's: equal logits both ways, live and as a file, and refusals that name."""
import dataclasses

import pytest
import torch
import torch.nn as nn

from nanogpt_fast import GPT, GPTConfig, classic
from nanogpt_fast.checkpoints import nanogpt as checkpoint
from nanogpt_fast.checkpoints.convert import ConversionError, convert_checkpoint, save_gpt, to_classic, to_gpt, untie_head
from nanogpt_fast.classic import ClassicConfig, ClassicGPT
from nanogpt_fast.text.tokenizers import CharTokenizer

SMALL = dict(vocab_size=31, block_size=16, n_layer=3, n_head=2, n_embd=24)
IDX = torch.arange(2 * 16).view(2, 16) % 31


def stirred(model):
    """The model with every parameter away from its initial value: zeros and ones would hide a swapped bias or norm."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def classic_gpt(**changes):
    return stirred(ClassicGPT(ClassicConfig(**{**SMALL, **changes})))


def gpt(**changes):
    return stirred(GPT(GPTConfig(**{**SMALL, **changes})))


def assert_equal_logits(a, b, idx=IDX):
    torch.testing.assert_close(a(idx, idx)[0], b(idx, idx)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a(idx, idx)[1], b(idx, idx)[1])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_a_classic_gpt_and_its_fused_form_give_equal_logits_and_the_way_back_gives_its_weights(tied, activation):
    model = classic_gpt(tied=tied, activation=activation, init="xavier")
    fused = to_gpt(model)
    assert_equal_logits(model, fused)
    again = to_classic(fused)
    assert again.config == dataclasses.replace(model.config, init="normal")  # how weights began is not to be seen in them
    assert list(again.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_tied_classic_gpt_becomes_an_ordinary_gpt_whose_weights_nanogpt_takes():
    fused = to_gpt(classic_gpt(tied=True))
    assert fused.lm_head.weight is fused.transformer.wte.weight
    assert list(fused.state_dict()) == list(gpt().state_dict())


def test_an_untied_biased_head_is_kept_and_its_bias_counts():
    model = classic_gpt(tied=False)
    fused = to_gpt(model)
    assert fused.lm_head.weight is not fused.transformer.wte.weight
    assert torch.equal(fused.lm_head.bias, model.head.bias) and model.head.bias.abs().min() > 0
    logits, _ = fused(IDX)  # the inference path, last position only
    torch.testing.assert_close(logits[:, 0], model(IDX)[0][:, -1], rtol=1e-4, atol=1e-4)


def test_a_head_with_bias_that_shares_the_embedding_by_hand_converts_too():
    model = classic_gpt(tied=False)
    model.head.weight = model.tok_emb.weight
    assert_equal_logits(model, to_gpt(model))


def test_a_converted_untied_gpt_trains_head_and_embedding_apart():
    model = classic_gpt(tied=False)
    fused = to_gpt(model)
    for m in (model, fused):
        m.train()(IDX, IDX.roll(-1, 1))[1].backward()
    torch.testing.assert_close(fused.transformer.wte.weight.grad, model.tok_emb.weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fused.lm_head.bias.grad, model.head.bias.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gpt_and_its_classic_form_give_equal_logits(bias):
    model = gpt(bias=bias)
    separate = to_classic(model)
    assert_equal_logits(model, separate)
    assert separate.config.tied and separate.head.weight is separate.tok_emb.weight


def test_an_untied_gpt_becomes_an_untied_classic_gpt():
    model = untie_head(gpt())
    with torch.no_grad():
        model.lm_head.bias.normal_()
        model.lm_head.weight.normal_()
    separate = to_classic(model)
    assert not separate.config.tied
    assert_equal_logits(model, separate)


def test_query_key_value_without_bias_convert_as_in_the_notebook():
    model = classic_gpt()
    for block in model.blocks:
        for part in (block.sa.query, block.sa.key, block.sa.value):
            part.bias = None
    assert_equal_logits(model, to_gpt(model))


def test_a_foreign_state_dict_converts_with_a_config_and_not_without():
    model = classic_gpt()
    fused = to_gpt(dict(model.state_dict()), config=model.config)
    assert_equal_logits(model, fused.eval())
    with pytest.raises(ConversionError, match="how many heads"):
        to_gpt(dict(model.state_dict()))


def test_mode_dtype_dropout_and_random_state_are_kept():
    model = classic_gpt(dropout=0.3).double().train()
    before = torch.get_rng_state()
    fused = to_gpt(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert fused.training and model.training and fused.config.dropout == 0.3
    assert fused.lm_head.weight.dtype == torch.float64
    assert not to_gpt(model.eval()).training


def test_post_norm_and_relu_are_refused_by_name():
    with pytest.raises(ConversionError, match="post-norm blocks"):
        to_gpt(classic_gpt(norm="post"))
    with pytest.raises(ConversionError, match="ReLU feed-forward") as refusal:
        to_gpt(classic_gpt(activation="relu"))
    assert "post-norm" not in str(refusal.value)
    with pytest.raises(ConversionError, match="post-norm.*ReLU"):
        to_gpt(classic_gpt(norm="post", activation="relu"))


def test_a_relu_that_the_config_does_not_mention_is_found_by_the_logits():
    model = classic_gpt()
    model.blocks[1].ff[1] = nn.ReLU()
    with pytest.raises(ConversionError, match="logits differ"):
        to_gpt(model)
    fused = gpt()
    fused.transformer.h[0].register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ConversionError, match="logits differ"):
        to_classic(fused)


def test_missing_foreign_and_misshapen_weights_are_named():
    model = classic_gpt()
    model.blocks[0].sa.gate = nn.Linear(2, 3, bias=False)
    with pytest.raises(ConversionError, match=r"blocks\.0\.sa\.gate\.weight \(3, 2\)"):
        to_gpt(model)
    state = dict(classic_gpt().state_dict())
    with pytest.raises(ConversionError, match=r"there is no blocks\.2\.ln2\.weight"):
        to_gpt({k: v for k, v in state.items() if k != "blocks.2.ln2.weight"}, config=ClassicConfig(**SMALL))
    with pytest.raises(ConversionError, match="wpe.weight"):
        to_gpt(state, config=ClassicConfig(**{**SMALL, "block_size": 8}))
    with pytest.raises(ConversionError, match=r"h\.3\."):
        to_gpt(state, config=ClassicConfig(**{**SMALL, "n_layer": 4}))
    fused = gpt()
    fused.transformer.h[0].attn.c_attn.lora = nn.Parameter(torch.zeros(2))
    with pytest.raises(ConversionError, match="c_attn.lora"):
        to_classic(fused)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_converts_there_and_back_with_its_tokenizer(tmp_path, tied):
    tokenizer = CharTokenizer("\n abcdefghijklmnopqrstuvwxyz.,!'")
    model = classic_gpt(tied=tied, vocab_size=32)
    classic.save_checkpoint(tmp_path / "classic.pt", model, tokenizer)
    convert_checkpoint(tmp_path / "classic.pt", tmp_path / "ckpt.pt")
    fused, its_tokenizer, _ = checkpoint.load_model(tmp_path / "ckpt.pt")
    assert_equal_logits(model, fused)
    assert its_tokenizer == tokenizer
    convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "again.pt")
    again, its_tokenizer = classic.load_checkpoint(tmp_path / "again.pt")
    assert its_tokenizer == tokenizer
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_tied_checkpoint_is_one_that_nanogpt_loads_strictly(tmp_path):
    classic.save_checkpoint(tmp_path / "classic.pt", classic_gpt(tied=True))
    convert_checkpoint(tmp_path / "classic.pt", tmp_path / "ckpt.pt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert set(saved["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    gpt(**saved["model_args"]).load_state_dict(saved["model"])


def test_an_untied_checkpoint_stops_a_reader_that_would_tie_it(tmp_path):
    save_gpt(tmp_path / "ckpt.pt", to_gpt(classic_gpt(tied=False)))
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    with pytest.raises(RuntimeError, match="lm_head.bias"):
        gpt(**saved["model_args"]).load_state_dict(saved["model"])


def test_a_step_of_the_ladder_that_is_no_gpt_is_refused(tmp_path):
    classic.save_checkpoint(tmp_path / "bigram.pt", classic.Bigram(ClassicConfig(**SMALL)))
    with pytest.raises(ConversionError, match="holds a Bigram"):
        convert_checkpoint(tmp_path / "bigram.pt", tmp_path / "ckpt.pt")
    assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_converted_gpt_generates_what_the_classic_one_does(backend):
    model = classic_gpt(tied=False)
    fused = to_gpt(model, backend=backend)
    idx = IDX[:, :3]
    assert torch.equal(fused.generate(idx, 30, temperature=0), model.generate(idx, 30, temperature=0))
