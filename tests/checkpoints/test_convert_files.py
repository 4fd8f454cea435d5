"""Checkpoints between nanoGPT's ckpt.pt, the classic layout and transformers' folders: every direction exact, and what is refused."""
import itertools
import json
import os
import shutil

import kills
import pytest
import torch

from nanogpt_fast import GPT, GPTConfig, classic, cli
from nanogpt_fast.checkpoints import convert, huggingface, nanogpt as checkpoint
from nanogpt_fast.checkpoints.convert import ConversionError, convert_checkpoint
from nanogpt_fast.checkpoints.nanogpt import CheckpointError

pytest.importorskip("safetensors")
SMALL = dict(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=16)
IDX = torch.arange(2 * 16).view(2, 16) % 31


def gpt(**changes):
    """Every parameter away from its initial value: zeros and ones would hide a swapped bias or norm."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{format: path} of one model in the three forms."""
    folder = tmp_path_factory.mktemp("sources")
    model = gpt(activation="gelu_tanh")
    convert.save_gpt(folder / "ckpt.pt", model)
    classic.save_checkpoint(folder / "classic.pt", convert.to_classic(model))
    model.save_pretrained(folder / "hf")
    return dict(nanogpt=folder / "ckpt.pt", classic=folder / "classic.pt", huggingface=folder / "hf")


@pytest.mark.parametrize("source", convert.FORMATS)
@pytest.mark.parametrize("to", convert.FORMATS)
def test_every_direction_is_exact(sources, source, to, tmp_path):
    target = tmp_path / "target"
    if source == to:
        with pytest.raises(ConversionError, match=f"is already in the {source} format"):
            convert_checkpoint(sources[source], target, to)
        return
    convert_checkpoint(sources[source], target, to)
    model, _, found = convert._load(target)
    assert found == to
    assert_same_weights(convert.to_gpt(model) if found == "classic" else model, gpt(activation="gelu_tanh"))
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_the_targets_name_says_the_form(sources, tmp_path):
    for source, name, expected in (("nanogpt", "a.pt", "classic"), ("nanogpt", "hf", "huggingface"), ("huggingface", "b/ckpt.pt", "nanogpt"),
                                   ("classic", "c.pt", "nanogpt"), ("classic", "hf2", "huggingface")):
        convert_checkpoint(sources[source], tmp_path / name)
        assert convert._load(tmp_path / name)[2] == expected


@pytest.mark.parametrize("vocab_size", [50257, 50304])
@pytest.mark.parametrize("bias", [True, False])
def test_transformers_loads_what_save_pretrained_wrote(vocab_size, bias, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = gpt(vocab_size=vocab_size, bias=bias, n_embd=8, n_layer=1)
    model.save_pretrained(tmp_path)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDX).logits, model(IDX, IDX)[0], rtol=1e-4, atol=1e-5)
    assert theirs.config.eos_token_id == 50256 and theirs.config.n_positions == 16
    again = GPT.from_pretrained(str(tmp_path)).eval()
    assert torch.equal(again(IDX, IDX)[0], model(IDX, IDX)[0])
    if bias:
        assert_same_weights(again, model)


def test_the_folder_says_dropout_activation_and_dtype(tmp_path):
    gpt(dropout=0.3, activation="gelu").to(torch.bfloat16).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["activation_function"] == "gelu" and settings["torch_dtype"] == "bfloat16"
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config.dropout == 0.3 and again.config.activation == "gelu"
    assert GPT.from_pretrained(str(tmp_path), {"dropout": 0.0}).config.dropout == 0.0


@pytest.mark.parametrize("how", ["one file", "shards", "without a head"])
def test_what_transformers_wrote_is_read_exactly(how, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    source = transformers.GPT2LMHeadModel(config).eval()
    written = source.transformer if how == "without a head" else source
    written.save_pretrained(tmp_path, **({"max_shard_size": "10KB"} if how == "shards" else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (how == "shards")
    model = GPT.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDX, IDX)[0], source(IDX).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, source.transformer.h[1].mlp.c_fc.weight.t())


def test_prefixes_and_old_mask_buffers_are_read(tmp_path):
    model = gpt()
    state = {f"_orig_mod.module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["_orig_mod.module.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    torch.save(dict(model=state, model_args=checkpoint.model_args(model.config), iter_num=5, best_val_loss=torch.tensor(2.0), config={}),
               tmp_path / "ckpt.pt")
    convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "hf")
    assert_same_weights(GPT.from_pretrained(str(tmp_path / "hf")), model)


# Refused

def settings(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change


def tensors(edit):
    def change(folder):
        from safetensors.torch import load_file, save_file
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors")
    return change


def cut(folder):
    os.truncate(folder / "model.safetensors", 1000)


def outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


def index(content):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return change


@pytest.mark.parametrize("change,message", [
    (cut, "is not a safetensors file, or is damaged"),
    (lambda folder: (folder / "model.safetensors").unlink(), "there is no .*model.safetensors"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n"), "is not a safetensors file"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds a list"),
    (outside, "names files outside of its folder"),
    (tensors(lambda s: s.pop("transformer.h.1.ln_2.bias")), "transformer.h.1.ln_2.bias is missing"),
    (tensors(lambda s: s.update(extra=torch.ones(2))), "transformer.extra does not belong there"),
    (tensors(lambda s: s.update({"transformer.ln_f.weight": torch.ones(5)})), r"has shape \(5,\), but the config requires \(16,\)"),
    (tensors(lambda s: s.update({"lm_head.weight": torch.ones(31, 16)})), "two different matrices"),
    (settings(model_type="llama"), "has model_type='llama'"), (settings(layer_norm_epsilon=1e-6), "has layer_norm_epsilon=1e-06"),
    (settings(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"), (settings(n_inner=48), "has n_inner=48"),
    (settings(n_layer="two"), "has no valid n_layer"), (settings(activation_function="silu"), "uses the activation 'silu'"),
    (settings(n_layer=2 ** 50), "n_layer is 1125899906842624, and there are 29 weights"),
    (settings(n_head=3), "each head needs an equal part"), (settings(resid_pdrop="much"), "has resid_pdrop='much'; expected a probability"),
    (settings(resid_pdrop=7), "has resid_pdrop=7"),
    (settings(activation_function=["gelu"]), "uses the activation a list"), (settings(vocab_size=True), "has no valid vocab_size"),
    (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    (index([]), "index.json holds a list"), (index({"weight_map": []}), "has no weight_map"),
    (index({"weight_map": {"a": 1}}), "has no weight_map"),
    (tensors(lambda s: s.update({"transformer.ln_f.weight": torch.ones(16).int()})), "transformer.ln_f.weight is int32"),
    (tensors(lambda s: s.update({"transformer.ln_f.weight": torch.ones(16) * torch.nan})), "transformer.ln_f.weight holds nan"),
    (tensors(lambda s: s.update({"module.transformer.ln_f.weight": torch.ones(16)})), "two weights of the name transformer.ln_f.weight")])
def test_a_folder_that_is_not_what_it_says_is_refused(sources, change, message, tmp_path):
    shutil.copytree(sources["huggingface"], tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=message):
        GPT.from_pretrained(str(tmp_path / "hf"))
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "hf", tmp_path / "ckpt.pt")
    assert not (tmp_path / "ckpt.pt").exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", [lambda bomb: bomb, lambda bomb: {"model": {}, "model_args": {}, "x": bomb}, lambda bomb: {"classic": bomb}])
def test_a_pickle_with_code_in_it_is_refused_and_the_code_not_run(content, tmp_path):
    torch.save(content(Bomb(tmp_path / "ran")), tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="could run code when loaded"):
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("source", ["nanogpt", "classic"])
@pytest.mark.parametrize("how", ["truncated", "a flipped bit"])
def test_a_damaged_file_is_refused(sources, source, how, tmp_path):
    content = bytearray(sources[source].read_bytes())
    if how == "truncated":
        del content[len(content) // 2:]
    else:
        weight = next(iter(convert._load(sources[source])[0].parameters())).detach().numpy().tobytes()
        content[content.find(weight) + 100] ^= 1
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        convert_checkpoint(tmp_path / "bad.pt", tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]


def test_a_conversion_that_went_wrong_is_noticed_before_the_target_gets_its_name(sources, tmp_path, monkeypatch, capsys):
    def wrong(model):
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight.mul_(1.01)
        return model
    gpt_contents, write_folder = convert.gpt_contents, huggingface.write_folder
    monkeypatch.setattr(convert, "gpt_contents", lambda model, _: gpt_contents(wrong(convert.to_gpt(convert.to_classic(model)))))
    monkeypatch.setattr(huggingface, "write_folder", lambda model, folder, check, *more: write_folder(
        wrong(convert.to_gpt(convert.to_classic(model))), folder, check, *more))
    for source, target in ((sources["classic"], tmp_path / "ckpt.pt"), (sources["nanogpt"], tmp_path / "hf")):
        assert cli.main(["convert", str(source), str(target)]) == 2
        out, err = capsys.readouterr()
        assert "logits differ by" in err and "holds the GPT" not in out
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_kill_before_any_call_leaves_the_former_folder_the_new_one_or_one_that_is_refused(sources, tmp_path):
    """Both have the same shapes: only config.json tells how many heads there are."""
    former, new = gpt(n_head=4), gpt(activation="gelu_tanh")
    with torch.no_grad():
        new.transformer.h[0].mlp.c_fc.weight.mul_(2)
    expected = {"former": former(IDX, IDX)[0], "new": new(IDX, IDX)[0]}
    found = []
    for last in itertools.count():
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        former.save_pretrained(tmp_path / "hf")
        (tmp_path / "hf" / "notes.txt").write_text("mine")
        try:
            with kills.killed_before(last):
                huggingface.write_folder(new, tmp_path / "hf")
            break
        except kills.Killed:
            pass
        try:
            logits = GPT.from_pretrained(str(tmp_path / "hf")).eval()(IDX, IDX)[0]
            found.append(next(name for name in expected if torch.equal(logits, expected[name])))
        except CheckpointError as error:
            assert "cannot read" in str(error) and "config.json" in str(error) and "write it again" in str(error)
            found.append("refused")
        convert_checkpoint(sources["nanogpt"], tmp_path / "hf")
        assert sorted(os.listdir(tmp_path / "hf")) == ["config.json", "model.safetensors", "notes.txt"]
    assert set(found) == {"former", "refused", "new"} and found == sorted(found, key=["former", "refused", "new"].index)


def test_the_command_says_what_it_did_and_what_cannot_be(sources, tmp_path, capsys):
    assert cli.main(["convert", str(sources["nanogpt"]), str(tmp_path / "hf")]) == 0
    assert f"{tmp_path}/hf holds the GPT that computes what" in capsys.readouterr().out
    assert cli.main(["convert", str(sources["nanogpt"])]) == 2 and "two arguments are needed" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["convert", str(sources["nanogpt"]), str(tmp_path / "file")]) == 2 and "is a file" in capsys.readouterr().err


def test_a_head_of_its_own_has_no_equal_in_transformers(tmp_path):
    model = convert.untie_head(gpt())
    with pytest.raises(ValueError, match="a matrix of its own"):
        model.save_pretrained(tmp_path)
    convert.save_gpt(tmp_path / "ckpt.pt", model)
    with pytest.raises(ConversionError, match="a matrix of its own"):
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "hf")
