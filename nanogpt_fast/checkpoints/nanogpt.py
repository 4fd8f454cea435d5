"""nanoGPT's checkpoints: written completely or not at all, and read without executing anything in them.

ckpt.pt has nanoGPT's format: a dict of model, optimizer, model_args, iter_num, best_val_loss and config that nanoGPT's train.py and
sample.py load, and `torch.load(weights_only=True)` too; it also has the tokenizer, if known, and the name of the run. last.pt is the
same dict plus "resume", everything else that an exact continuation needs (folder.py writes the two); a run with --shard keeps the weights
and moments of its last.pt in a folder of shards (sharded.py). Both directions work: nanoGPT's own ckpt.pt can be read here.

What cannot be read, written or used raises CheckpointError, whose message says which file, what is wrong and what to do.
"""
import contextlib
import dataclasses
from pathlib import Path

import torch

from ..config import GPTConfig
from ..files import replacing_together
from ..model import GPT, same_matrix
from ..text import tokenizers
from . import archive, schema, sharded
from .state import CheckpointError, untie_head

UPSTREAM_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")  # nanoGPT's GPTConfig


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


def read(path, weights=True):
    """The dict in a checkpoint file, on the CPU, its weights under plain names, checked for a model and for sampling (`schema.check`).

    If its weights are in shards, they are read too; weights=False leaves them there, for a run that loads them itself. A run that goes on
    from it needs `schema.check_run` too. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint")
    if not path.is_file():
        if not path.parent.is_dir():
            raise CheckpointError(f"there is no checkpoint {path}: there is no folder {path.parent}")
        beside = sorted(p.name for p in path.parent.glob("*.pt"))
        raise CheckpointError(f"there is no checkpoint {path}; the folder has {', '.join(beside) or 'no *.pt file'}")
    found = schema.check(archive.load(path), path)
    if "shards" in found:
        found["path"] = path
        sharded.check(found, schema.expected(found))
        found = schema.check(sharded.assemble(found), path) if weights else found
    return found


def glance(path):
    """The dict in a checkpoint file with the tensors left on the disk until they are used; None for a file that cannot be read."""
    try:
        found = archive.load(path, mmap=True)
    except (CheckpointError, OSError):      # `read` says what it is
        return None
    return found if isinstance(found, dict) else None


# ------------------------------------------------------------------------------------------------------------ contents

def contents(model, optimizer, *, iter_num, best_val_loss, config, tokenizer=None, run=None, shards=None):
    """The dict of a checkpoint: nanoGPT's six entries, the tokenizer if there is one, and the name of the run that it is of.

    shards: what `sharded.write` returned; the weights and moments are then there, and not in the dict.
    """
    more = {} if tokenizer is None else {"tokenizer": tokenizer.to_state()}
    more |= {} if run is None else {"run": run}
    if shards is None:
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    else:
        state = dict(model={}, optimizer=shards[0], shards=shards[1])
    return dict(**state, model_args=model_args(model.config), iter_num=iter_num, best_val_loss=best_val_loss, config=config, **more)


def model_args(config):
    """The config as nanoGPT's GPTConfig takes it: its seven fields, and others only if they differ from their default."""
    defaults = GPTConfig()
    return {name: value for name, value in dataclasses.asdict(config).items()
            if name in UPSTREAM_ARGS or value != getattr(defaults, name)}


def build_model(checkpoint, path, *, dropout=None, backend=None):
    """The GPT of a checkpoint that `read` returned, on the CPU. dropout: overrides the checkpoint's.

    Where `read` left the weights in shards, the GPT has new ones, in the shapes of those.
    """
    args = dict(checkpoint["model_args"])
    if dropout is not None:
        args["dropout"] = dropout
    model = GPT(GPTConfig(**args), backend=backend)
    if "shards" in checkpoint:
        return untie_head(model) if "lm_head.bias" in checkpoint["shards"]["names"] else model
    state = dict(checkpoint["model"])
    head, wte = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    if "lm_head.bias" in state or not (head is None or wte is None or same_matrix(head, wte)):
        untie_head(model)
        if "lm_head.bias" not in state:  # a fork of nanoGPT without tying
            print(f"{path}: the vocabulary head has a matrix of its own, as in the file; nanoGPT would load it over the token embedding")
            state["lm_head.bias"] = model.lm_head.bias.detach()
    model.load_state_dict(state)
    return model


def load_optimizer(optimizer, state, path):
    """Load an optimizer state, nanoGPT's or ours, after checking that it belongs to these parameters (`schema.moments`)."""
    found = schema.moments(state, optimizer, path)
    numbers = (i for group in found["param_groups"] for i in group["params"])
    parameters = dict(zip(numbers, (p for group in optimizer.param_groups for p in group["params"])))
    optimizer.load_state_dict({**found, "state": sharded.distributed(found["state"], parameters)})


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
    """(model, tokenizer or None, meta) from a checkpoint file, or from a folder's ckpt.pt (else its last.pt; see `last_is_meant`).

    The model is in eval mode on `device`. meta is the rest of the checkpoint without the optimizer: iter_num, best_val_loss,
    config, model_args, and "path"; without a tokenizer, "no_tokenizer" says why. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ("last.pt" if last_is_meant(path) else "ckpt.pt")
    checkpoint = read(path)
    tokenizer, why_not = tokenizer_of(checkpoint, path)
    model = build_model(checkpoint, path, backend=backend).eval().to(device)
    meta = {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer", "resume", "tokenizer")}
    return model, tokenizer, {**meta, "path": path, **({"no_tokenizer": why_not} if why_not else {})}


def last_is_meant(folder):
    """Whether a folder's last.pt has the weights to sample from: there is no ckpt.pt, or a run with --shard, which writes ckpt.pt at its
    end only, has saved since."""
    last, ckpt = folder / "last.pt", folder / "ckpt.pt"
    if not last.is_file() or not ckpt.is_file():
        return last.is_file()
    return last.stat().st_mtime > ckpt.stat().st_mtime and any(folder.glob("shards-*")) and "shards" in (glance(last) or {})
