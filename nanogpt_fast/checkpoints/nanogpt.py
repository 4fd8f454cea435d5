"""nanoGPT's checkpoints: written completely or not at all, and read without executing anything in them.

ckpt.pt has nanoGPT's format: a dict of model, optimizer, model_args, iter_num, best_val_loss and config that nanoGPT's train.py and
sample.py load, and `torch.load(weights_only=True)` too; it also has the tokenizer, if known, and the name of the run. last.pt is the
same dict plus "resume", everything else that an exact continuation needs (folder.py writes the two). Both directions work: nanoGPT's
own ckpt.pt can be read here.

What cannot be read, written or used raises CheckpointError, whose message says which file, what is wrong and what to do.
"""
import contextlib
import dataclasses
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch

from ..config import GPTConfig
from ..files import replacing_together
from ..model import GPT, same_matrix
from ..text import tokenizers
from .state import CheckpointError, plain_names, untie_head

UPSTREAM_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")  # nanoGPT's GPTConfig
KEYS = ("model", "model_args", "iter_num", "best_val_loss")  # a nanoGPT checkpoint must have these

# nanoGPT's best_val_loss may be a NumPy scalar, whose pickle refers to these; they only construct numbers. NumPy 2 moved the first one.
_scalar = np.float64(0).__reduce__()[0]
NUMPY_SCALARS = [(_scalar, "numpy.core.multiarray.scalar"), (_scalar, "numpy._core.multiarray.scalar"), np.dtype,
                 np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType]


# ------------------------------------------------------------------------------------------------------------ files

def save(checkpoint, path):
    """Write the dict under a temporary name, then rename: whatever happens, `path` is the previous checkpoint or the new one."""
    with writing(path) as (f,):
        torch.save(checkpoint, f)


@contextlib.contextmanager
def writing(*paths):
    """`files.replacing_together`; what the disk or torch's writer raises becomes a CheckpointError."""
    try:
        with replacing_together(*paths) as files:
            yield files
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:
        names = " and ".join(map(str, paths))
        raise CheckpointError(f"cannot write {names}: {_system_reason(error)}. "
                              f"{'The previous one is intact.' if Path(paths[0]).exists() else 'There was none before.'}") from error


def _system_reason(error):
    """On a full disk torch's writer raises an assertion; the OSError behind it says what happened."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


def read(path):
    """The dict in a checkpoint file, on the CPU, its weights under plain names (`plain_names`). Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        raise CheckpointError(f"there is no checkpoint {path}; the folder has {', '.join(beside) or 'no *.pt file'}")
    refuse_damage(path)
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "nsupported" in line), None)  # torch's wording
        if reason is not None:
            raise CheckpointError(f"{path} holds Python objects that could run code when loaded, so it is refused ({reason}). "
                                  "A checkpoint holds tensors, numbers, strings, lists and dicts.") from None
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None
    except Exception as error:  # a damaged file fails in whichever part of torch's reader meets it first
        reason = (str(error).splitlines() or ["it is truncated"])[0][:200]
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__}: {reason})") from None
    missing = [key for key in KEYS if key not in checkpoint] if isinstance(checkpoint, dict) else KEYS
    if missing or not isinstance(checkpoint["model"], dict) or not isinstance(checkpoint["model_args"], dict):
        lacks = ", ".join(missing) or "a state dict"
        raise CheckpointError(f"{path} is a torch file, but not a nanoGPT checkpoint: it lacks {lacks}")
    checkpoint["model"] = plain_names(checkpoint["model"])
    checkpoint["best_val_loss"] = float(checkpoint["best_val_loss"])
    checkpoint["iter_num"] = int(checkpoint["iter_num"])
    return checkpoint


def refuse_damage(path):
    """Raise CheckpointError if a torch file fails its own checksums.

    torch.save writes a CRC for every tensor, but torch.load does not check it: a flipped bit would go unnoticed.
    """
    if not zipfile.is_zipfile(path):
        return  # truncated (torch.load reports it), or the format of torch before 1.6
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        damaged = f"its directory ({error})"
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong. Take another copy or an earlier one.")


# ------------------------------------------------------------------------------------------------------------ contents

def contents(model, optimizer, *, iter_num, best_val_loss, config, tokenizer=None, run=None):
    """The dict of a checkpoint: nanoGPT's six entries, the tokenizer if there is one, and the name of the run that it is of."""
    more = {} if tokenizer is None else {"tokenizer": tokenizer.to_state()}
    more |= {} if run is None else {"run": run}
    return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=model_args(model.config), iter_num=iter_num,
                best_val_loss=best_val_loss, config=config, **more)


def model_args(config):
    """The config as nanoGPT's GPTConfig takes it: its seven fields, and others only if they differ from their default."""
    defaults = GPTConfig()
    return {name: value for name, value in dataclasses.asdict(config).items()
            if name in UPSTREAM_ARGS or value != getattr(defaults, name)}


def build_model(checkpoint, path, *, dropout=None, backend=None):
    """The GPT of a checkpoint, on the CPU. dropout: overrides the checkpoint's. Raises CheckpointError."""
    args = dict(checkpoint["model_args"])
    if dropout is not None:
        args["dropout"] = dropout
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    unknown, missing = sorted(set(args) - known), sorted(set(UPSTREAM_ARGS) - {"dropout", "bias"} - set(args))
    if unknown or missing:
        raise CheckpointError(f"{path}: model_args " + " and ".join(
            [f"has {', '.join(unknown)}, which GPTConfig does not know"] * bool(unknown) + [f"lacks {', '.join(missing)}"] * bool(missing)))
    try:
        model = GPT(GPTConfig(**args), backend=backend)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its model_args do not describe a GPT: {error}") from None
    state = dict(checkpoint["model"])
    head, wte = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    if "lm_head.bias" in state or not (head is None or wte is None or same_matrix(head, wte)):
        untie_head(model)
        if "lm_head.bias" not in state:  # a fork of nanoGPT without tying
            print(f"{path}: the vocabulary head has a matrix of its own, as in the file; nanoGPT would load it over the token embedding")
            state["lm_head.bias"] = model.lm_head.bias.detach()
    _check_weights(state, model.state_dict(), path)
    model.load_state_dict(state)
    return model


def _check_weights(found, expected, path):
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} does not belong there" for name in found if name not in expected]
    problems += [f"{name} has shape {tuple(found[name].shape)}, but model_args require {tuple(tensor.shape)}"
                 for name, tensor in expected.items() if name in found and found[name].shape != tensor.shape]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: the weights do not fit the model: {'; '.join(problems[:3])}{more}")


def load_optimizer(optimizer, state, path):
    """Load an optimizer state, nanoGPT's or ours, after checking that it belongs to these parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        moments = [state["state"].get(i, {}) for group in state["param_groups"] for i in group["params"]]
        fits = len(moments) == len(parameters) and all(
            moment["exp_avg"].shape == p.shape for moment, p in zip(moments, parameters) if moment)
        if not fits:
            raise ValueError(f"moments of {len(moments)} tensors, the model has {len(parameters)}, or their shapes differ")
        optimizer.load_state_dict(state)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its optimizer state does not fit the model ({error}). "
                              "(A block_size smaller than the checkpoint's crops the model but not the optimizer state.)") from None


def tokenizer_of(checkpoint, path):
    """(the checkpoint's tokenizer, None), or (None, why there is none).

    Our checkpoints contain it. For nanoGPT's it is looked up as in nanoGPT's sample.py: data/<dataset>/meta.pkl, else GPT-2's
    tokenizer if the vocabulary has that size. Raises CheckpointError if the tokenizer does not match the model.
    """
    vocab_size, config = checkpoint["model_args"]["vocab_size"], checkpoint.get("config") or {}
    meta = Path("data") / str(config.get("dataset", "")) / "meta.pkl"
    stated = None  # the vocabulary's size, padding included, if the tokenizer's source says it
    try:
        if checkpoint.get("tokenizer") is not None:
            source, tokenizer = "its own tokenizer", tokenizers.from_state(checkpoint["tokenizer"])
            stated = vocab_size if vocab_size >= tokenizer.vocab_size else None
        elif meta.is_file():
            source, (stated, tokenizer, why_not) = str(meta), tokenizers.load_vocabulary(meta)
            if tokenizer is None:
                return None, why_not
        elif vocab_size in (50257, 50304):
            source, tokenizer = "GPT-2's tokenizer", tokenizers.GPT2Tokenizer()
        else:
            return None, f"{path} carries no tokenizer and there is no {meta}"
    except tokenizers.TokenizerError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except RuntimeError as error:  # tiktoken or its vocabulary is not available
        return None, str(error)
    # A vocabulary may be padded for faster matmuls, to a multiple of 128 at most; a larger gap means another vocabulary.
    if vocab_size != stated and not 0 <= vocab_size - tokenizer.vocab_size < 128:
        raise CheckpointError(f"{path} and {source} don't match: the model has {vocab_size} tokens, the tokenizer "
                              f"{tokenizer.vocab_size}. Was the data prepared again from another text?")
    return tokenizer, None


def load_model(path, device="cpu", *, backend=None):
    """(model, tokenizer or None, meta) from a checkpoint file, or from a folder's ckpt.pt (else its last.pt).

    The model is in eval mode on `device`. meta is the rest of the checkpoint without the optimizer: iter_num, best_val_loss,
    config, model_args, and "path"; without a tokenizer, "no_tokenizer" says why. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ("last.pt" if (path / "last.pt").is_file() and not (path / "ckpt.pt").is_file() else "ckpt.pt")
    checkpoint = read(path)
    tokenizer, why_not = tokenizer_of(checkpoint, path)
    model = build_model(checkpoint, path, backend=backend).eval().to(device)
    meta = {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer", "resume", "tokenizer")}
    return model, tokenizer, {**meta, "path": path, **({"no_tokenizer": why_not} if why_not else {})}
