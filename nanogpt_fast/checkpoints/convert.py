"""Convert the classic GPT with separate query, key and value to nanoGPT's fused GPT, and back, with equal logits.

    gpt = to_gpt(classic_model)              also a state dict: to_gpt(state_dict, config=ClassicConfig(...))
    classic_model = to_classic(gpt)
    convert_checkpoint("classic.pt", "out/ckpt.pt")      or the other way round: the file's content tells its format
    convert_checkpoint("out/ckpt.pt", "my-gpt2")         a folder for transformers, and back (huggingface.py, huggingface_tokenizer.py)
    convert_checkpoint("out/last.pt", "out/ckpt.pt")     the shards of `train --shard` become nanoGPT's one file (sharded.py)

Attention is the same whether three matrices (C, C) multiply x or one (3C, C) that stacks them: the fused layout holds the same
numbers for fewer, larger matmuls. Everything else only changes its name:

    classic                              nanoGPT
    tok_emb.weight (V, C)                transformer.wte.weight
    pos_emb (1, T, C)                    transformer.wpe.weight (T, C)
    blocks.i.sa.{query,key,value}        transformer.h.i.attn.c_attn, rows q, k, v
    blocks.i.sa.proj                     transformer.h.i.attn.c_proj
    blocks.i.{ln1,ln2}                   transformer.h.i.{ln_1,ln_2}
    blocks.i.ff.{0,2}                    transformer.h.i.mlp.{c_fc,c_proj}
    ln_f, head                           transformer.ln_f, lm_head

nanoGPT's head shares the token embedding's matrix and has no bias. A classic head with its own matrix and a bias replaces it
(`untie_head`); such a GPT can be trained and sampled like any other, but nanoGPT's own model.py refuses its weights.
Features without a counterpart, post-norm or ReLU, raise ConversionError, which names them. If the source is a live model, the logits
of both models are compared at the end, and a difference raises, too: no conversion is silently wrong.
"""
import contextlib
import io
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn as nn

from .. import classic, options
from ..classic import ClassicConfig, ClassicGPT
from ..config import GPTConfig
from ..model import GPT
from ..options import option
from ..text import tokenizers
from . import archive, huggingface, huggingface_tokenizer, nanogpt
from .state import plain_names, untie_head

# A linear layer or LayerNorm each, by its two names in a block; only c_attn has no one-to-one counterpart.
IN_A_BLOCK = {"ln1": "ln_1", "sa.proj": "attn.c_proj", "ln2": "ln_2", "ff.0": "mlp.c_fc", "ff.2": "mlp.c_proj"}


class ConversionError(ValueError):
    """The other layout cannot represent this model; the message names what does not fit."""


def to_gpt(source, config=None, *, backend=None):
    """The nanoGPT-style GPT that computes what `source` computes.

    source: a ClassicGPT; any module with the same parameter names; or such a state dict. If it has no `.config`, a ClassicConfig
    must give what the tensors do not: n_head, norm, activation. Query, key and value may lack biases.
    The result has the source's dtype, device and train/eval mode; all its parameters require gradients. The random state does
    not change. Raises ConversionError.
    """
    state, config = _state_of(source), config or getattr(source, "config", None)
    if not isinstance(config, ClassicConfig):
        raise ConversionError("tensors alone do not tell how many heads there are or where the norms are: "
                              "pass config=ClassicConfig(n_head=..., norm=..., activation=..., ...)")
    _refuse(["post-norm blocks (norm='post'): GPT normalises before each branch"] * (config.norm == "post")
            + ["the ReLU feed-forward (activation='relu'): GPT has GELU"] * (config.activation == "relu"))
    state = fused_layout(state)
    args = {"activation": config.activation} if config.activation != "gelu" else {}
    gpt = _quietly(lambda: GPT(GPTConfig(block_size=config.block_size, vocab_size=config.vocab_size, n_layer=config.n_layer,
                                         n_head=config.n_head, n_embd=config.n_embd, dropout=config.dropout, bias=True, **args),
                               backend=backend))
    if "lm_head.bias" in state:
        untie_head(gpt)
    return _filled(gpt, state, source)


def to_classic(source):
    """The ClassicGPT that computes what `source`, a GPT (nanoGPT's own also), computes. Absent biases become zeros.

    Dtype, device, mode and errors as in `to_gpt`.
    """
    cfg = source.config
    state = separate_layout(_state_of(source))
    tied = source.lm_head.weight is source.transformer.wte.weight
    if tied:
        state.pop("head.bias", None)  # zeros from separate_layout: a tied head has no bias
    model = _quietly(lambda: ClassicGPT(ClassicConfig(vocab_size=cfg.vocab_size, block_size=cfg.block_size, n_layer=cfg.n_layer,
                                                      n_head=cfg.n_head, n_embd=cfg.n_embd, dropout=cfg.dropout, tied=tied,
                                                      activation=getattr(cfg, "activation", "gelu"))))
    for name, buffer in model.named_buffers():  # the causal masks: the fused layout has none
        state[name] = buffer
    return _filled(model, state, source)


FORMATS = ("nanogpt", "classic", "huggingface")     # to write; a last.pt whose weights are in shards is only read


def convert_checkpoint(source, target, to=None):
    """Convert a checkpoint between any two of: nanoGPT's ckpt.pt, a file of classic.save_checkpoint, a folder of transformers' GPT-2.

    to: "nanogpt", "classic" or "huggingface"; None: inferred from the target's name and the source, see `ConvertOptions`. The
    target is written under a temporary name, read back, its logits are compared with the source's, and only then it is renamed. The
    tokenizer is kept, and a folder's is compared with it through transformers, where that is installed; the optimizer's state is not kept:
    the result is for sampling and fine-tuning. From shards to nanoGPT's file both are kept, and a run can be resumed from it. Returns the
    converted model. Raises ConversionError, ValueError (a damaged file), FileNotFoundError, CheckpointError.
    """
    model, tokenizer, found = _load(source, say=print)
    if found == "shards" and to in (None, "nanogpt") and (to or Path(target).suffix in (".pt", ".pth")):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        nanogpt.save({key: value for key, value in nanogpt.read(source).items() if key not in ("resume", "path")}, target)
        _prove(model, _load(target)[0])
        return model
    to = to or ("huggingface" if Path(target).suffix not in (".pt", ".pth") else "classic" if found == "nanogpt" else "nanogpt")
    if to == found:
        raise ConversionError(f"{source} is already in the {found} format; --to={'|'.join(FORMATS)} selects another")
    gpt = to_gpt(model) if isinstance(model, ClassicGPT) else model
    if to == "huggingface":
        _write_folder(gpt, target, tokenizer)
        return gpt
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    converted = to_classic(gpt) if to == "classic" else gpt
    contents = classic.contents(converted, tokenizer) if to == "classic" else gpt_contents(converted, tokenizer)
    with nanogpt.writing(target) as (f,):
        torch.save(contents, f)
        f.flush()
        _prove(converted, _load(f.name)[0])
    return converted


def _load(source, say=lambda why: None):
    """(model in eval mode, tokenizer or None, its format) from a file or a folder, whichever it is. say: told why there is no tokenizer."""
    source = Path(source)
    if source.is_dir() and (source / "config.json").is_file():
        return _quietly(lambda: GPT.from_pretrained(str(source))).eval(), huggingface_tokenizer.read(source), "huggingface"
    if source.is_file():
        archive.refuse_damage(source)
    if source.is_file() and classic.is_checkpoint(source):
        model, tokenizer = classic.load_checkpoint(source, device="cpu")
        if not isinstance(model, ClassicGPT):
            raise ConversionError(f"{source} holds a {type(model).__name__}: only the ladder's last model is a GPT")
        return model, tokenizer, "classic"
    gpt, tokenizer, meta = _quietly(lambda: nanogpt.load_model(source))
    if tokenizer is None:
        say(f"without a tokenizer: {meta['no_tokenizer']}")
    if meta.get("layout") == "build-nanogpt":
        return gpt, tokenizer, "build-nanogpt"
    return gpt, tokenizer, "shards" if "shards" in (nanogpt.glance(meta["path"]) or {}) else "nanogpt"


def _write_folder(gpt, target, tokenizer):
    if Path(target).exists() and not Path(target).is_dir():
        raise FileExistsError(f"{target} is a file; transformers' models are folders")

    def check(folder):
        _prove(gpt, _load(folder)[0])
        if find_spec("transformers"):
            _prove(gpt, _TransformersGPT(folder))
            if tokenizer is not None:
                _prove_tokenizer(tokenizer, folder)
    # A tokenizer that an earlier conversion wrote would be read with this model.
    stale = huggingface_tokenizer.NAMES if tokenizer is None and Path(target, huggingface_tokenizer.OURS).exists() else ()
    try:
        huggingface.write_folder(gpt, target, check, tokenizer, stale)
    except ValueError as error:
        raise ConversionError(str(error)) from None


class _TransformersGPT(nn.Module):
    """The model that transformers reads from a folder, with a GPT's call signature."""

    def __init__(self, folder):
        super().__init__()
        from transformers import GPT2LMHeadModel
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            self.model = GPT2LMHeadModel.from_pretrained(folder)
        self.config = GPTConfig(block_size=self.model.config.n_positions, vocab_size=self.model.config.vocab_size)

    def forward(self, idx, targets=None):
        return self.model(idx).logits, None


def _prove_tokenizer(tokenizer, folder):
    """Raise ConversionError unless transformers reads a tokenizer with the same ids and texts: of the first 1,000 ids, each and together."""
    from transformers import AutoTokenizer
    theirs, first = AutoTokenizer.from_pretrained(folder), list(range(min(tokenizer.vocab_size, 1000)))
    texts = [tokenizer.decode([i]) for i in first]
    for text in ["".join(texts), *texts]:
        try:
            ids = tokenizer.encode(text)
        except tokenizers.TokenizerError:   # a mark such as <pad>, or words that are together an unknown one
            continue
        found = theirs(text, verbose=False)["input_ids"]
        if found != ids:
            raise ConversionError(f"transformers' tokenizer would read {text[:200]!r} as {found[:50]}, instead of {ids[:50]}")
    if theirs.decode(first) != tokenizer.decode(first):
        raise ConversionError("transformers' tokenizer would decode other texts")


@dataclass
class ConvertOptions:
    """Convert a checkpoint between nanoGPT's ckpt.pt, the classic GPT's (separate query, key and value), and a folder of
    transformers' GPT-2 (config.json and model.safetensors, and the tokenizer for AutoTokenizer). The source's format is detected from
    its content. The last.pt of a run with --shard becomes nanoGPT's ckpt.pt, with the optimizer.

    Without --to, a target that ends in .pt becomes nanoGPT's, or the classic GPT's if the source is nanoGPT's; any other
    name becomes a transformers folder. The result is read back and its logits are compared with the source's before it is moved to
    its final name. Examples: nanogpt-fast convert classic.pt out/ckpt.pt; nanogpt-fast convert out/ckpt.pt my-gpt2
    """

    source: str = option("", "the checkpoint to read: a file or a folder", positional=True)
    target: str = option("", "the checkpoint to write", positional=True)
    to: str = option("auto", "the format to write", choices=("auto", *FORMATS))

    def __post_init__(self):
        if not self.source or not self.target:
            raise ValueError("two arguments are needed: nanogpt-fast convert SOURCE TARGET")


def main(argv):
    """The command `nanogpt-fast convert`."""
    o = options.parse(ConvertOptions, argv, "nanogpt-fast convert")
    model = convert_checkpoint(o.source, o.target, None if o.to == "auto" else o.to)
    print(f"{o.target} holds the {type(model).__name__} that computes what {o.source} does: read back, and its logits compared")


def save_gpt(path, gpt, tokenizer=None, **known):
    """Write a GPT as nanoGPT's ckpt.pt, with a fresh optimizer: `nanogpt-fast sample` and `chat` read it. known: see `gpt_contents`."""
    nanogpt.save(gpt_contents(gpt, tokenizer, **known), path)


def gpt_contents(gpt, tokenizer=None, *, iter_num=0, best_val_loss=float("inf"), config=None):
    """What nanoGPT's ckpt.pt of this GPT holds, with a fresh optimizer."""
    optimizer = _quietly(lambda: gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"))
    return nanogpt.contents(gpt, optimizer, iter_num=iter_num, best_val_loss=best_val_loss, config=config or {}, tokenizer=tokenizer)


# ---------------------------------------------------------------------------------------------------------------------------
# The two layouts, as state dicts


def fused_layout(state):
    """Classic names to nanoGPT's; query, key and value are stacked. Raises ConversionError on missing and unknown names."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".sa.tril")}  # a mask, not a weight
    take = _Taker(state)
    fused = {"transformer.wte.weight": take("tok_emb.weight"), "transformer.wpe.weight": take("pos_emb").squeeze(0)}
    for i in range(_count(state, r"blocks\.(\d+)\.")):
        old, new = f"blocks.{i}.", f"transformer.h.{i}."
        weights = [take(f"{old}sa.{part}.weight") for part in ("query", "key", "value")]
        fused[new + "attn.c_attn.weight"] = torch.cat(weights)                                       # (3C, C)
        fused[new + "attn.c_attn.bias"] = torch.cat([take(f"{old}sa.{part}.bias", zeros=len(weight))
                                                     for part, weight in zip(("query", "key", "value"), weights)])
        for classic_name, name in IN_A_BLOCK.items():
            for kind in ("weight", "bias"):
                fused[f"{new}{name}.{kind}"] = take(f"{old}{classic_name}.{kind}")
    for kind in ("weight", "bias"):
        fused[f"transformer.ln_f.{kind}"] = take(f"ln_f.{kind}")
    fused["lm_head.weight"] = weight = take("head.weight")
    if "head.bias" in state or not torch.equal(weight, fused["transformer.wte.weight"]):
        fused["lm_head.bias"] = take("head.bias", zeros=len(weight))
    take.refuse_the_rest()
    return fused


def separate_layout(state):
    """nanoGPT's names to classic ones; c_attn is split into query, key and value. Missing biases become zeros."""
    take = _Taker(plain_names(state))
    separate = {"tok_emb.weight": take("transformer.wte.weight"), "pos_emb": take("transformer.wpe.weight").unsqueeze(0)}
    for i in range(_count(state, r"transformer\.h\.(\d+)\.")):
        old, new = f"transformer.h.{i}.", f"blocks.{i}."
        for kind, zeros in (("weight", None), ("bias", 3 * separate["pos_emb"].size(-1))):
            parts = take(f"{old}attn.c_attn.{kind}", zeros=zeros).chunk(3)
            for part, tensor in zip(("query", "key", "value"), parts):
                separate[f"{new}sa.{part}.{kind}"] = tensor.clone()
        for classic_name, name in IN_A_BLOCK.items():
            separate[f"{new}{classic_name}.weight"] = weight = take(f"{old}{name}.weight")
            separate[f"{new}{classic_name}.bias"] = take(f"{old}{name}.bias", zeros=len(weight))
    separate["ln_f.weight"] = weight = take("transformer.ln_f.weight")
    separate["ln_f.bias"] = take("transformer.ln_f.bias", zeros=len(weight))
    separate["head.weight"] = weight = take("lm_head.weight")
    separate["head.bias"] = take("lm_head.bias", zeros=len(weight))
    take.refuse_the_rest()
    return separate


class _Taker:
    """Takes tensors out of a state dict by name; raises if one is missing, and at the end if some were not taken."""

    def __init__(self, state):
        self.state = dict(state)
        self.like = next(iter(state.values()), None)

    def __call__(self, name, zeros=None):
        if name in self.state:
            return self.state.pop(name).detach()
        if zeros is None:
            raise ConversionError(f"there is no {name}")
        return self.like.new_zeros(zeros)

    def refuse_the_rest(self):
        _refuse([f"{name} {tuple(tensor.shape)} has no counterpart" for name, tensor in self.state.items()])


def _count(state, pattern):
    return 1 + max((int(match[1]) for match in (re.match(pattern, name) for name in state) if match), default=-1)


def _refuse(reasons):
    if reasons:
        raise ConversionError("this model cannot be converted: " + "; ".join(reasons))


# ---------------------------------------------------------------------------------------------------------------------------
# Loading the weights, and checking the result


def _state_of(source):
    return source.state_dict(keep_vars=True) if isinstance(source, nn.Module) else source


def _quietly(make):
    """Build without printing (GPT reports its size) and without advancing the random state."""
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        return make()


def _filled(model, state, source):
    like = next(iter(state.values()))
    model.to(device=like.device, dtype=like.dtype)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # torch lists every shape that differs from the config's
        raise ConversionError(f"the weights do not match the config: {error}") from None
    if isinstance(source, nn.Module):
        _prove(source, model)
        model.train(source.training)
    return model


# How much two summation orders may differ, relative to the largest logit: some hundred rounding errors.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@torch.no_grad()
def _prove(source, result):
    """Raise ConversionError unless both models give the same logits for one row of tokens."""
    cfg = result.config
    logits = []
    for model in (source, result):
        mode = model.training
        idx = (7 * torch.arange(min(cfg.block_size, 32), device=next(model.parameters()).device) % cfg.vocab_size)[None]
        logits.append(model.eval()(idx, idx)[0].double().flatten(0, -2))    # with targets, all positions' logits: (T, V)
        model.train(mode)
    expected, found = logits
    difference = ((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    if not difference <= TOLERANCE[next(result.parameters()).dtype]:
        raise ConversionError(f"the converted model's logits differ by {difference:.1e} of the largest: the source computes something "
                              "that its weights and config do not show (a replaced submodule, a hook, another norm or activation)")
