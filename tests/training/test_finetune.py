"""Freezing by name: what is named stands still, all else learns, and what was changed is told."""
import json

import pytest
import tiny
import torch
import torch.nn as nn

from nanogpt_fast import GPT, GPTConfig, options
from nanogpt_fast.checkpoints.state import CheckpointError
from nanogpt_fast.classic import ClassicConfig, ClassicGPT
from nanogpt_fast.text import prepare
from nanogpt_fast.training.finetune import freeze, unfreeze
from nanogpt_fast.training.trainer import TrainOptions, train

SIZES = dict(vocab_size=17, block_size=8, n_layer=2, n_head=2, n_embd=8)


def gpt():
    torch.manual_seed(1)
    return GPT(GPTConfig(**SIZES))


def classic_gpt():
    torch.manual_seed(1)
    return ClassicGPT(ClassicConfig(**SIZES))


def train_20_steps(model, optimizer):
    idx = torch.arange(32).view(4, 8) % 17
    for _ in range(20):
        optimizer.zero_grad(set_to_none=True)
        model(idx, idx.roll(-1, 1))[1].backward()
        optimizer.step()


@pytest.mark.parametrize("make, patterns", [
    (gpt, ["transformer.h.0"]), (gpt, ["*.ln_*", "transformer.wpe.weight"]), (gpt, ["lm_head"]),
    (classic_gpt, ["blocks.[01].sa"]), (classic_gpt, ["pos_emb", "*.bias"]),
])
def test_a_frozen_weight_does_not_move_over_20_steps_and_every_other_does(make, patterns):
    model = make()
    frozen = freeze(model, *patterns)
    assert 0 < len(frozen) < len(list(model.named_parameters()))
    before = {name: p.clone() for name, p in model.named_parameters(remove_duplicate=False)}
    # all parameters, so that it is the freezing that protects them, and a decay that would move anything it may touch
    train_20_steps(model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5))
    for name, p in model.named_parameters(remove_duplicate=False):
        assert torch.equal(p, before[name]) == (name in frozen), name


def test_a_weight_frozen_in_the_middle_of_training_stops_at_once():
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    idx = torch.arange(8)[None]
    model(idx, idx)[1].backward()  # a gradient is waiting when the weight is frozen
    freeze(model, "transformer.h.1.mlp")
    before = model.transformer.h[1].mlp.c_fc.weight.clone()
    optimizer.step()
    train_20_steps(model, optimizer)
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, before)


def test_unfrozen_weights_learn_again():
    model = gpt()
    assert set(freeze(model)) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert unfreeze(model, "transformer.h.1.attn.c_attn") == [
        "transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_20_steps(model, model.configure_optimizers(0.1, 0.01, (0.9, 0.95), "cpu"))
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {
        "transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias"}


def test_what_was_changed_is_returned_and_nothing_else():
    model = gpt()
    assert freeze(model, "transformer.ln_f") == ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert freeze(model, "transformer.ln_f") == []
    assert freeze(model, "transformer.ln_f", "transformer.h.0.ln_1.weight") == ["transformer.h.0.ln_1.weight"]
    assert unfreeze(model, "transformer.h") == ["transformer.h.0.ln_1.weight"]


def test_a_tied_weight_is_named_twice():
    assert freeze(gpt(), "lm_head.weight") == ["transformer.wte.weight", "lm_head.weight"]


def test_a_module_name_does_not_match_another_that_begins_alike():
    model = nn.ModuleDict({"h1": nn.Linear(1, 1), "h10": nn.Linear(1, 1)})
    assert freeze(model, "h1") == ["h1.weight", "h1.bias"]


def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing():
    model = gpt()
    with pytest.raises(ValueError, match="'transformer.h.7' matches no parameter of this GPT; similar names: transformer.h.[01]"):
        freeze(model, "transformer.h.0", "transformer.h.7")
    assert all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------- fine-tuning from the command line

@pytest.fixture
def folder(tmp_path):
    """A data set of characters, and in "gpt2" a folder of weights with its vocabulary and OpenAI's activation."""
    pytest.importorskip("safetensors")
    tiny.data(tmp_path)
    V = prepare.load_tokenizer(tmp_path / "data" / "sums").vocab_size
    GPT(GPTConfig(**{**SIZES, "vocab_size": V, "block_size": 16}, activation="gelu_tanh")).save_pretrained(tmp_path / "gpt2")
    return tmp_path


def trained(folder, *words):
    o = tiny.options(folder, max_iters=1, init_from=str(folder / "gpt2"))
    kept = [word for word in tiny.words(o) if not word.startswith("--activation=")]
    train(options.parse(TrainOptions, [*kept, *words], "train"))
    return torch.load(folder / "out" / "last.pt", weights_only=True)


def test_the_activation_is_the_folders_unless_one_is_asked_for(folder):
    saved = trained(folder)
    assert saved["model_args"]["activation"] == "gelu_tanh" and saved["config"]["activation"] == "gelu_tanh"
    saved = trained(folder, "--activation=gelu")
    assert "activation" not in saved["model_args"] and saved["config"]["activation"] == "gelu"  # gelu is the config's default


def test_a_folder_with_an_activation_that_gpt_lacks_is_refused(folder):
    about = json.loads((folder / "gpt2" / "config.json").read_text())
    (folder / "gpt2" / "config.json").write_text(json.dumps({**about, "activation_function": "relu"}))
    with pytest.raises(CheckpointError, match="uses the activation 'relu'; GPT has .* Pass activation='gelu' or 'gelu_tanh'"):
        trained(folder)
    assert trained(folder, "--activation=gelu")["config"]["activation"] == "gelu"


@pytest.mark.parametrize("vocab_size, advice", [(50257, "--tokenizer=gpt2"), (17, "Use the data that the model was trained on")])
def test_weights_with_another_vocabulary_than_the_data_are_refused_before_the_first_step(vocab_size, advice, folder):
    GPT(GPTConfig(**{**SIZES, "vocab_size": vocab_size, "block_size": 16})).save_pretrained(folder / "gpt2")
    with pytest.raises(ValueError, match=rf"the data set 'sums' has a vocabulary of \d+ tokens and .*gpt2 one of {vocab_size}.* {advice}"):
        trained(folder)
    assert not list((folder / "out").glob("*.pt"))
