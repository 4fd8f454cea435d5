"""The classic models: names and shapes, each option, causality, sampling, learning, checkpoints, and one call to text."""
import dataclasses
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogpt_fast import classic, reference
from nanogpt_fast.classic import LADDER, AttentionOnly, Bigram, ClassicConfig, ClassicGPT
from nanogpt_fast.text.tokenizers import CharTokenizer, TokenizerError, WordTokenizer

SMALL = ClassicConfig(vocab_size=19, block_size=12, n_layer=2, n_head=2, n_embd=8)
IDX = (5 * torch.arange(24) % 19).view(2, 12)


def build(name="GPT", **changes):
    torch.manual_seed(3)
    return LADDER[name](dataclasses.replace(SMALL, **changes))


# ------------------------------------------------------------------------------------------------------------ the models

def test_the_classic_gpt_has_the_names_and_shapes_of_the_step_by_step_gpt():
    model = build()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    block = {"sa.tril": (12, 12), "ff.0.weight": (32, 8), "ff.0.bias": (32,), "ff.2.weight": (8, 32), "ff.2.bias": (8,)}
    block |= {f"sa.{part}.{kind}": shape for part in ("key", "query", "value", "proj")
              for kind, shape in (("weight", (8, 8)), ("bias", (8,)))}
    block |= {f"{ln}.{kind}": (8,) for ln in ("ln1", "ln2") for kind in ("weight", "bias")}
    assert shapes == {"tok_emb.weight": (19, 8), "pos_emb": (1, 12, 8), "ln_f.weight": (8,), "ln_f.bias": (8,),
                      "head.weight": (19, 8), "head.bias": (19,),
                      **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}}
    assert isinstance(model.pos_emb, nn.Parameter) and not model.pos_emb.any()
    assert isinstance(model.blocks[0].ff, nn.Sequential)
    assert "blocks.0.sa.tril" in dict(model.named_buffers())


@pytest.mark.parametrize("name", LADDER)
def test_every_step_gives_logits_of_all_positions_and_the_mean_cross_entropy(name):
    model = build(name)
    targets = IDX.roll(-1, 1)
    logits, none = model(IDX)
    assert logits.shape == (2, 12, 19) and none is None
    by_hand = -F.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(model(IDX, targets)[1], by_hand)


def test_attention_is_the_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 6).double()
    mask = torch.ones(5, 5).tril()
    ours = classic.attention_weights(q, k, mask) @ v
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)).tolist():
        e = [math.exp(q[b, h, t].dot(k[b, h, s]) / math.sqrt(6)) for s in range(t + 1)]
        torch.testing.assert_close(ours[b, h, t], sum(e[s] / sum(e) * v[b, h, s] for s in range(t + 1)))
    torch.testing.assert_close(ours, reference.causal_attention(q, k, v))


@pytest.mark.parametrize("name", LADDER)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_what_comes_later_changes_nothing_before_it(name, norm):
    model = build(name, norm=norm).eval()
    other = IDX.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 19
    a, b = model(IDX)[0], model(other)[0]
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.equal(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("name", LADDER)
def test_every_step_but_the_bigram_sees_the_past(name):
    model = build(name)
    torch.manual_seed(8)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    other = IDX.clone()
    other[:, 0] = (other[:, 0] + 1) % 19
    assert torch.equal(model(IDX)[0][:, -1], model(other)[0][:, -1]) == (name == "bigram")


def test_pre_norm_and_post_norm_are_their_formulas():
    x = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    pre, post = build(norm="pre").blocks[0], build(norm="post").blocks[0]
    y = x + pre.sa(pre.ln1(x))
    assert torch.equal(pre(x), y + pre.ff(pre.ln2(y)))
    y = post.ln1(x + post.sa(x))
    assert torch.equal(post(x), post.ln2(y + post.ff(y)))
    assert isinstance(build(norm="post").ln_f, nn.Identity)


@pytest.mark.parametrize("activation, function", [("relu", F.relu), ("gelu", F.gelu),
                                                  ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))])
def test_the_feed_forward_network_has_the_chosen_activation(activation, function):
    ff = build(activation=activation).blocks[0].ff
    x = torch.linspace(-3, 3, 8)[None]
    assert torch.equal(ff(x), ff[2](function(ff[0](x))))


def test_normal_initialisation_shrinks_the_projections_that_end_a_branch():
    model = build(n_embd=256, n_layer=8)
    for name, p in model.named_parameters():
        if name.endswith(("sa.proj.weight", "ff.2.weight")):
            assert abs(p.std() * math.sqrt(16) / 0.02 - 1) < 0.03, name
        elif p.dim() == 2:
            assert abs(p.std() / 0.02 - 1) < 0.03, name
        elif name.endswith("bias"):
            assert not p.any(), name


def test_xavier_initialisation_goes_by_fan_in_and_fan_out():
    model = build(n_embd=128, init="xavier")
    for name, shape in (("blocks.0.ff.0", (512, 128)), ("blocks.1.sa.query", (128, 128)), ("head", (19, 128))):
        weight = model.get_submodule(name).weight
        bound = math.sqrt(6 / sum(shape))
        assert weight.shape == shape and 0.95 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.05  # uniform on (-bound, bound)
    assert abs(model.tok_emb.weight.std() / 0.02 - 1) < 0.1


def test_a_tied_head_is_the_token_embedding_and_has_no_bias():
    model = build(tied=True)
    assert model.head.weight is model.tok_emb.weight and model.head.bias is None
    model(IDX, IDX)[1].backward()
    assert sum(p.numel() for p in build().parameters()) - sum(p.numel() for p in model.parameters()) == 19 * 8 + 19


def test_dropout_is_at_work_in_training_only():
    model = build(dropout=0.5)
    assert not torch.equal(model(IDX)[0], model(IDX)[0])
    model.eval()
    assert torch.equal(model(IDX)[0], model(IDX)[0])


@pytest.mark.parametrize("change, message", [
    (dict(activation="tanh"), "activation is 'tanh'; expected one of gelu, gelu_tanh, relu"), (dict(norm="none"), "norm is"),
    (dict(init="he"), "init is"), (dict(n_head=3), "n_embd 8 is not divisible by n_head 3"),
    (dict(dropout=1.5), "dropout is 1.5"),
    (dict(block_size=0), "block_size is 0"),
])
def test_a_config_that_cannot_be_names_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="Cannot forward sequence of length 13, block size is only 12"):
        build()(torch.zeros(1, 13, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------------ generation

def test_generation_keeps_the_prompt_goes_past_the_block_and_leaves_the_mode():
    model = build().train()
    out = model.generate(IDX, 20)
    assert out.shape == (2, 32) and torch.equal(out[:, :12], IDX) and model.training


def test_greedy_generation_takes_the_best_token_each_time():
    model = build().eval()
    out = model.generate(IDX[:, :2], 6, temperature=0)
    for t in range(2, 8):
        assert torch.equal(out[:, t], model(out[:, :t])[0][:, -1].argmax(-1))


def test_temperature_divides_the_logits_and_zero_takes_the_best():
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    torch.testing.assert_close(classic.next_token_probabilities(logits, 0.5), F.softmax(logits * 2, -1))
    assert classic.next_token_probabilities(logits, 0).tolist() == [[0, 0, 1]]


def test_top_k_keeps_the_k_best_and_their_ties():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert (classic.next_token_probabilities(logits, top_k=2) > 0).tolist() == [[False, True, True, True, False]]
    torch.testing.assert_close(classic.next_token_probabilities(logits, top_k=99), F.softmax(logits, -1))
    assert classic.next_token_probabilities(logits, 0.7, top_k=1).tolist() == [[0, 1, 0, 0, 0]]


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_k=0)])
def test_sampling_arguments_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="temperature >= 0 and top_k >= 1"):
        build().generate(IDX, 1, **bad)
    with pytest.raises(ValueError, match="prompt is empty"):
        build().generate(IDX[:, :0], 1)


# ------------------------------------------------------------------------------------------------------------ learning

def test_a_batch_is_windows_of_the_data_and_the_same_moved_by_one():
    data = torch.arange(100)
    x, y = classic.get_batch(data, 50, 8, torch.Generator().manual_seed(0))
    assert torch.equal(y, x + 1) and torch.equal(x - x[:, :1], torch.arange(8).expand(50, 8))
    x, y = classic.get_batch(torch.arange(9), 20, 8)  # one window alone fits
    assert x.unique(dim=0).tolist() == [list(range(8))] and y.max() == 8
    with pytest.raises(ValueError, match="8 tokens are too few for block_size 8"):
        classic.get_batch(torch.arange(8), 1, 8)


def test_evaluation_is_repeatable_without_dropout_and_leaves_the_random_state():
    model = build(dropout=0.5)
    data = torch.arange(200) % 19
    state = torch.get_rng_state()
    assert classic.evaluate(model, data, 4) == classic.evaluate(model, data, 4)
    assert torch.equal(state, torch.get_rng_state()) and model.training


@pytest.mark.parametrize("name", LADDER)
def test_every_step_of_the_ladder_learns(name):
    model = build(name, n_embd=16)
    data = torch.arange(300) % 19  # the last token decides the next one: even the bigram can learn it
    seen = []
    history = classic.train(model, data, data, steps=60, batch_size=8, learning_rate=2e-2, eval_interval=25,
                            log=lambda step, record: seen.append((step, record)))
    assert [record["step"] for record in history] == [0, 25, 50, 60]
    assert [step for step, _ in seen] == list(range(61)) and [r for _, r in seen if r] == history
    assert [record["tokens"] for record in history] == [step * 8 * 12 for step in (0, 25, 50, 60)]
    assert history[0]["seconds"] == 0 and history[-1]["seconds"] > history[1]["seconds"] > 0
    assert history[-1]["val_loss"] < 0.7 * history[0]["val_loss"]


def test_attention_learns_what_the_bigram_cannot():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(5, (2, 400), generator=generator)
    data = torch.stack([first, 5 + second, first], 1).flatten()  # a b a: the third repeats the first, two places back
    losses = {}
    for name in ("bigram", "one head"):
        losses[name] = classic.train(build(name, n_embd=32), data, data, steps=300, batch_size=16, learning_rate=1e-2,
                                     eval_interval=300)[-1]["val_loss"]
    assert losses["one head"] < losses["bigram"] - 0.3


def test_a_loss_that_is_not_finite_stops_the_training():
    model = build()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan at step 0; try a learning rate below 0.001"):
        classic.train(model, torch.arange(100) % 19, torch.arange(100) % 19, steps=1)


# ------------------------------------------------------------------------------------------------------------ keeping, asking

TEXT = "the cat sat on the mat.\n" * 40


@pytest.mark.parametrize("name", LADDER)
def test_a_checkpoint_comes_back_with_its_config_weights_and_tokenizer(tmp_path, name):
    tokenizer = CharTokenizer.from_text(TEXT)
    model = build(name, vocab_size=tokenizer.vocab_size)
    classic.save_checkpoint(tmp_path / "model.pt", model, tokenizer)
    again, its_tokenizer = classic.load_checkpoint(tmp_path / "model.pt")
    assert type(again) is type(model) and again.config == model.config and its_tokenizer == tokenizer and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    assert classic.is_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_file_that_is_no_checkpoint_of_ours_is_named(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content) if content is not None else torch.save({"model": {}}, path)
    assert not classic.is_checkpoint(path)
    with pytest.raises(ValueError, match="model.pt is not a checkpoint of a classic model"):
        classic.load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        classic.load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize("make", [CharTokenizer.from_text, WordTokenizer.from_text])
def test_train_demonstrate_and_complete_in_one_call(tmp_path, make):
    tokenizer = make(TEXT)
    data = torch.tensor(tokenizer.encode(TEXT))
    model = build("GPT", vocab_size=tokenizer.vocab_size, n_embd=32, init="xavier")
    classic.train(model, data, data, steps=120, batch_size=16, learning_rate=1e-2, eval_interval=120)
    classic.save_checkpoint(tmp_path / "model.pt", model, tokenizer)
    text = classic.complete(tmp_path / "model.pt", "the cat", 8, temperature=0, device="cpu")
    assert text.startswith("the cat sat on")
    assert classic.complete((model, tokenizer), "the cat", 8, temperature=0) == text and model.training


def test_a_prompt_outside_the_vocabulary_names_the_character():
    with pytest.raises(TokenizerError, match="character 'Q'"):
        classic.complete((build(), CharTokenizer.from_text(TEXT)), "Q")


def test_completing_without_a_tokenizer_says_so(tmp_path):
    classic.save_checkpoint(tmp_path / "model.pt", build())
    with pytest.raises(ValueError, match="contains no tokenizer"):
        classic.complete(tmp_path / "model.pt", "the")
