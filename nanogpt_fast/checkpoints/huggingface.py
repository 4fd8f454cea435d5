"""Read and write GPT-2 in transformers' format: names, sizes, the four transposed matrices, folders of config.json and safetensors.

A folder is read without transformers, and nothing in it can be executed: safetensors holds only tensors. Whatever does not fit (a
missing or unknown name, another shape, a setting that GPT does not support) raises CheckpointError, where transformers would
initialise missing weights.
"""
import json
import os
import tempfile
from pathlib import Path

import torch

from ..config import GPTConfig
from ..files import replacing_together
from . import huggingface_tokenizer, schema
from .state import CheckpointError, plain_names

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),           # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),   # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),    # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),       # 1558M
}
# OpenAI's checkpoints hold these as Conv1D, (in, out); nn.Linear holds (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# transformers' activation_function -> ours
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def load_gpt2(model_type, override_args, activation):
    """(GPTConfig, state_dict in nanoGPT's layout) of one of the four names or of a local folder."""
    unknown = [key for key in override_args if key != "dropout"]
    if unknown:
        raise ValueError(f"override_args has {', '.join(unknown)}; only dropout can be overridden, everything else comes from the checkpoint")
    local = os.path.isdir(model_type)
    if model_type not in SIZES and not local:
        raise ValueError(f"from_pretrained({model_type!r}): expected one of {', '.join(SIZES)}, or a folder written by save_pretrained")
    if local and not os.path.isfile(os.path.join(model_type, "pytorch_model.bin")):
        print(f"loading weights from folder: {model_type}")
        return read_folder(model_type, activation, **override_args)
    try:
        from transformers import GPT2LMHeadModel
    except ImportError as error:
        raise ImportError("GPT.from_pretrained reads GPT-2's weights with the transformers library; pip install 'nanogpt-fast[gpt2]'") from error

    print(f"loading weights from pretrained gpt: {model_type}")
    source = GPT2LMHeadModel.from_pretrained(model_type)
    theirs = source.config
    if activation is None:
        activation = "gelu" if not local else ACTIVATIONS.get(theirs.activation_function)
        if activation is None:
            raise ValueError(f"{model_type} uses the activation {theirs.activation_function!r}; "
                             f"GPT has {', '.join(ACTIVATIONS)}. Pass activation='gelu' or 'gelu_tanh' to use one of them anyway.")
    config = GPTConfig(block_size=theirs.n_positions, vocab_size=theirs.vocab_size, n_layer=theirs.n_layer, n_head=theirs.n_head,
                       n_embd=theirs.n_embd, bias=True, activation=activation, **override_args)
    return config, to_nanogpt(source.state_dict())


def to_nanogpt(state_dict):
    """transformers' GPT2LMHeadModel state in nanoGPT's layout: mask buffers dropped, Conv1D weights transposed."""
    kept = {key: value for key, value in state_dict.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}
    return {key: value.t().contiguous() if key.endswith(TRANSPOSED) else value for key, value in kept.items()}


# ------------------------------------------------------------------------------------------------------------ folders

# The settings that GPT implements; a folder whose config.json has others is refused.
FIXED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
         "add_cross_attention": False}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_folder(folder, activation=None, dropout=None):
    """(GPTConfig, state_dict in nanoGPT's layout) from a folder with config.json and model.safetensors (or its shards).

    activation, dropout: override the folder's. Raises CheckpointError.
    """
    folder = Path(folder)
    theirs = _json(folder / "config.json")
    for name, value in FIXED.items():
        if theirs.get(name, value) != value:
            raise CheckpointError(f"{folder}/config.json has {name}={schema.shown(theirs[name])}; GPT supports only {value!r}")
    sizes = {ours: theirs.get(name) for ours, name in (("block_size", "n_positions"), ("vocab_size", "vocab_size"),
                                                       ("n_layer", "n_layer"), ("n_head", "n_head"), ("n_embd", "n_embd"))}
    for name, value in sizes.items():
        if not schema.whole(value, 1):
            raise CheckpointError(f"{folder}/config.json has no valid {name} ({schema.shown(value)}); expected a positive integer")
    if sizes["n_embd"] % sizes["n_head"]:
        raise CheckpointError(f"{folder}/config.json has n_embd={sizes['n_embd']} and n_head={sizes['n_head']}; "
                              "each head needs an equal part")
    if theirs.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise CheckpointError(f"{folder}/config.json has n_inner={schema.shown(theirs['n_inner'])}; GPT's MLP is 4 n_embd wide")
    theirs_activation = theirs.get("activation_function", "gelu_new")
    activation = activation or (ACTIVATIONS.get(theirs_activation) if isinstance(theirs_activation, str) else None)
    if activation is None:
        raise CheckpointError(f"{folder} uses the activation {schema.shown(theirs_activation)}; GPT has {', '.join(ACTIVATIONS)}. "
                              "Pass activation='gelu' or 'gelu_tanh' to use one of them anyway.")
    if dropout is None:
        dropout = theirs.get("resid_pdrop", 0.0)
        if not schema.at_least_0(dropout) or dropout > 1:
            raise CheckpointError(f"{folder}/config.json has resid_pdrop={schema.shown(dropout)}; expected a probability")
        dropout = float(dropout)
    config = GPTConfig(**sizes, dropout=dropout, bias=True, activation=activation)
    return config, _checked(_tensors(folder), config, folder)


def _json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}. A folder written by save_pretrained has this file; "
                              "if writing it was interrupted, write it again.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON, or is damaged ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object of settings")
    return content


def _tensors(folder):
    """{name: tensor} of all safetensors files of a folder."""
    load = _safetensors().load_file
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        found = _json(folder / INDEX).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(name, str) and name and "\0" not in name for name in found.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map from names of weights to names of files")
        names = sorted(set(found.values()))
        if any(os.path.basename(name) != name for name in names):
            raise CheckpointError(f"{folder / INDEX} names files outside of its folder")
    tensors = {}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"there is no {folder / name}; a model folder has config.json and {WEIGHTS}")
        try:
            tensors.update(load(folder / name))
        except Exception as error:  # safetensors' own error, or whatever another kind of file triggers first
            raise CheckpointError(f"{folder / name} is not a safetensors file, or is damaged ({error})") from None
    return tensors


def _checked(tensors, config, folder):
    """transformers' tensors in nanoGPT's layout, after checking every name and shape against the config."""
    tensors = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
               for name, tensor in plain_names(tensors, folder).items()}
    wte = tensors.get("transformer.wte.weight")
    head = tensors.setdefault("lm_head.weight", wte)  # a tied head is written once
    schema.check_layers(tensors, config.n_layer, folder)
    expected = shapes(config)
    schema.check_weights({name: tensor for name, tensor in tensors.items() if tensor is not None}, expected, folder, "the config requires")
    if not torch.equal(head, wte):
        raise CheckpointError(f"{folder}: the head and the embedding are two different matrices, but GPT shares one")
    return to_nanogpt({name: tensors[name] for name in expected})


def shapes(config):
    """{name: shape} of transformers' GPT2LMHeadModel for this config."""
    return {name: shape[::-1] if name.endswith(TRANSPOSED) else shape for name, shape in schema.shapes(config).items()}


def write_folder(model, folder, check=None, tokenizer=None, without=()):
    """Write a GPT as config.json and model.safetensors, which transformers' GPT2LMHeadModel.from_pretrained reads. Exact.

    Absent biases become zeros. tokenizer: written beside them, for AutoTokenizer; without one, a tokenizer in the folder stays, but for
    the files named in `without`. check: called with a folder that shows the files before they get their names; if it raises, nothing
    has changed. An interruption leaves the former model, the new one, or no config.json, without which nobody reads the folder: never
    the weights of one with the config of another. Raises ValueError for an untied head, which transformers' GPT-2 does not have.
    """
    if model.lm_head.weight is not model.transformer.wte.weight or model.lm_head.bias is not None:
        raise ValueError("this GPT's head is a matrix of its own, or has a bias; transformers' GPT-2 has the "
                         "embedding's matrix and no bias")
    cfg, state = model.config, plain_names(model.state_dict())
    tensors = {}
    for name, shape in shapes(cfg).items():
        if name == "lm_head.weight":  # tied: written once
            continue
        tensor = state[name] if name in state else state["transformer.wte.weight"].new_zeros(shape)
        tensors[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).detach().cpu().contiguous()
    dtype = str(state["transformer.wte.weight"].dtype).removeprefix("torch.")
    end_of_text = _end_of_text(cfg) if tokenizer is None else tokenizer.end_of_text
    activation = "gelu_new" if getattr(cfg, "activation", "gelu") == "gelu_tanh" else "gelu"
    settings = {"architectures": ["GPT2LMHeadModel"], **FIXED, "activation_function": activation, "vocab_size": cfg.vocab_size,
                "n_positions": cfg.block_size, "n_embd": cfg.n_embd, "n_layer": cfg.n_layer, "n_head": cfg.n_head,
                "n_inner": None,
                "resid_pdrop": cfg.dropout, "embd_pdrop": cfg.dropout, "attn_pdrop": cfg.dropout, "tie_word_embeddings": True,
                "torch_dtype": dtype, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    content = {WEIGHTS: _safetensors().save(tensors, metadata={"format": "pt"})}
    content |= {} if tokenizer is None else huggingface_tokenizer.contents(tokenizer, cfg.block_size)
    content["config.json"] = json.dumps(settings, indent=2).encode() + b"\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_together(*(folder / name for name in content), without=[folder / name for name in ("config.json", *without)]) as files:
        for file, name in zip(files, content):
            file.write(content[name])
            file.flush()
        if check is not None:
            with tempfile.TemporaryDirectory() as view:
                for file, name in zip(files, content):
                    os.symlink(file.name, Path(view, name))
                check(view)


def _end_of_text(config):
    """GPT-2's <|endoftext|> if the vocabulary is GPT-2's, padded or not."""
    return 50256 if config.vocab_size in (50257, 50304) else None


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("folders of transformers' models need the safetensors package; pip install 'nanogpt-fast[gpt2]'") from error
    return safetensors.torch
