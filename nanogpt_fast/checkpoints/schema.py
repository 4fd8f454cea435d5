"""What a checkpoint may hold: the one place where the values of a file are checked before anything computes with them.

    check(found, path)          the weights and what describes them: before a model is built
    check_run(found, path)      optimizer and resume state: before a run goes on
    moments(state, optimizer)   AdamW's state, or Muon's and AdamW's, as these parameters need it
    check_weights(...)          names, shapes, dtypes and values of any state dict, a folder's or a classic GPT's too

The sizes are compared with the weights by arithmetic, and each weight lies in the file whole (`flaw`). So whatever a config says, a model
is never larger than the file. Unknown keys at the top of a checkpoint are left alone. Errors are CheckpointErrors that name the file.
"""
import dataclasses
import math
import random
import re

import numpy as np
import torch
import torch.nn as nn

from ..config import ACTIVATIONS, GPTConfig
from .state import CheckpointError, plain_names

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
LARGEST = 2 ** 53       # of whole numbers: a float holds them exactly up to here, AdamW's count of steps too


# ------------------------------------------------------------------------------------------------------------ values

def shown(value):
    """A value for an error message: one short line, whatever it is."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, str):
        return repr(value[:60]) + ("..." if len(value) > 60 else "")
    if value is None or isinstance(value, (bool, float)) or isinstance(value, int) and abs(value) < 10 ** 30:
        return repr(value)
    return "a number of more than 30 digits" if isinstance(value, int) else f"a {type(value).__name__}"


def number(value):
    """An int or a float as it is, a tensor with one real number as Python's, or None for anything else."""
    if isinstance(value, torch.Tensor) and flaw(value, (*FLOATS, torch.int64, torch.int32), finite=False) is None and value.numel() == 1:
        return value.item()
    return value if type(value) in (int, float) else None


def whole(value, least=0, most=LARGEST):
    """Whether it is a whole number, of type int, in these limits."""
    return type(value) is int and least <= value <= most


def at_least_0(value):
    return type(value) in (int, float) and 0 <= value <= 1e300


def flaw(tensor, dtypes=FLOATS, finite=True):
    """Why a tensor of a file cannot be computed with, or None. finite: nan and infinity are flaws, too."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return f"is {shown(tensor)}, not a tensor"
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return "is sparse or without data; expected a plain tensor"
    if tensor.dtype not in dtypes:
        return f"is {str(tensor.dtype).removeprefix('torch.')}; expected " + " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return "has fewer numbers in the file than its shape says"      # stride 0: a few bytes stand for any size
    if finite and tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor.detach())                      # nan if any is
        if not (math.isfinite(low) and math.isfinite(high)):
            return "holds nan or infinity"
    return None


def _refuse(path, what, problems):
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: {what}: {'; '.join(problems[:3])}{more}")


# ------------------------------------------------------------------------------------------------------------ weights

def shapes(config, bias=True):
    """{name: shape} of the weights of a GPT of this config, in state_dict's order. bias: of Linears and LayerNorms."""
    C, V = config.n_embd, config.vocab_size
    found = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (config.block_size, C)}
    block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    modules = {f"transformer.h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block.items()}
    for name, shape in {**modules, "transformer.ln_f": (C,)}.items():
        found |= {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}
    return {**found, "lm_head.weight": (V, C)}


def check_weights(found, expected, source, required_by="model_args require"):
    """Raise CheckpointError unless the state dict has these names and shapes, and every tensor is one of finite floats.

    expected: {name: shape}. required_by: who says so, for the message.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{shown(name).strip(chr(39))} does not belong there" for name in found if name not in expected]
    for name, shape in expected.items():
        if name in found:
            tensor, why = found[name], flaw(found[name], finite=False)
            if why is None and tuple(tensor.shape) != tuple(shape):
                why = f"has shape {tuple(tensor.shape)}, but {required_by} {tuple(shape)}"
            why = why or flaw(tensor)
            problems += [f"{name} {why}"] * (why is not None)
    _refuse(source, "the weights do not fit the model", problems)


def check_layers(found, n_layer, source):
    """Raise CheckpointError if there are more layers than weights: then nobody need count to n_layer."""
    if n_layer > len(found):
        raise CheckpointError(f"{source}: the weights do not fit the model: n_layer is {shown(n_layer)}, and there are {len(found)} "
                              "weights")


# ------------------------------------------------------------------------------------------------------------ a checkpoint

def check(found, path):
    """A copy of a nanoGPT checkpoint, its weights under plain names and its numbers as Python's, after checking all that a model needs.

    The keys: model, model_args, iter_num, best_val_loss; config, tokenizer, run may be absent. The dict of a build-nanogpt
    checkpoint is translated first.
    """
    if isinstance(found, dict) and all(type(key) is str for key in found):
        found = _from_build_nanogpt(found, path)
    missing = [key for key in ("model", "model_args", "iter_num", "best_val_loss") if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found["model"], dict) or not isinstance(found["model_args"], dict):
        lacks = ", ".join(missing) or "a state dict"
        raise CheckpointError(f"{path} is a torch file, but not a nanoGPT checkpoint: it lacks {lacks}")
    if not all(type(name) is str for part in ("model", "model_args") for name in found[part]):
        raise CheckpointError(f"{path}: names of weights and of model_args are strings; one is not")
    found = dict(found)
    for name in ("iter_num", "best_val_loss"):
        if number(found[name]) is not None:
            found[name] = number(found[name])
    found["model_args"] = {name: value if type(value) is bool else number(value) if number(value) is not None else value
                           for name, value in found["model_args"].items()}
    problems = [f"{name} is {shown(found[name])}; expected {expected}" for name, good, expected in (
        ("iter_num", whole(found["iter_num"]), "a whole number of steps"),
        ("best_val_loss", type(found["best_val_loss"]) in (int, float) and found["best_val_loss"] >= 0, "a loss, not negative"),
        ("config", _is_config(found.get("config")), "a dict of options, in which dataset is a name and seed a number"),
        ("tokenizer", _is_tokenizer(found.get("tokenizer")), "a dict of strings and lists of strings"),
        ("run", found.get("run") is None or type(found["run"]) is str and len(found["run"]) <= 200, "a name")) if not good]
    _refuse(path, "it is damaged, or not a nanoGPT checkpoint", problems)
    found["best_val_loss"] = float(found["best_val_loss"])
    if "shards" in found and not _names_shards(found):
        raise CheckpointError(f"{path}: its 'shards' is damaged: expected a folder's name, the names of its weights and of its files")
    found["model"] = plain_names(found["model"], path)
    check_layers(found["shards"]["names"] if "shards" in found else found["model"], _config(found["model_args"], path).n_layer, path)
    if "shards" not in found:
        check_weights(found["model"], expected(found), path)
    return found


def expected(found):
    """{name: shape} of the weights that a checkpoint must have, by its model_args. found: as `check` returned it."""
    config = GPTConfig(**found["model_args"])
    names = found["shards"]["names"] if "shards" in found else found["model"]
    return shapes(config, config.bias) | ({"lm_head.bias": (config.vocab_size,)} if "lm_head.bias" in names else {})


def _names_shards(found):
    """Whether "shards" is what `sharded.write` makes, with names that lie in one folder beside the file."""
    shards, plain = found["shards"], re.compile(r"[\w.-]{1,200}", re.ASCII)
    texts = lambda value: type(value) is list and all(type(name) is str for name in value)
    return (not found["model"] and isinstance(shards, dict) and type(shards.get("folder")) is str
            and re.fullmatch(r"shards-\d{8,}-[0-9a-f]{6}", shards["folder"], re.ASCII) is not None and texts(shards.get("names"))
            and texts(shards.get("order")) and set(shards["order"]) <= set(shards["names"]) and isinstance(shards.get("files"), dict)
            and all(type(name) is str and plain.fullmatch(name) and type(written) in (list, tuple) and len(written) == 2 and all(map(whole, written))
                    for name, written in shards["files"].items()))


def _config(args, path):
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    unknown, missing = sorted(set(args) - known), sorted(set(SIZES) - set(args))
    if unknown or missing:
        raise CheckpointError(f"{path}: model_args " + " and ".join(
            [f"has {', '.join(map(shown, unknown))}, which GPTConfig does not know"] * bool(unknown)
            + [f"lacks {', '.join(missing)}"] * bool(missing)))
    config = GPTConfig(**args)
    problems = [f"{name} is {shown(getattr(config, name))}; expected a whole number of at least {least}"
                for name in SIZES for least in [0 if name == "n_layer" else 1] if not whole(getattr(config, name), least)]
    if not problems and config.n_embd % config.n_head:
        problems = [f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}"]
    if not at_least_0(config.dropout) or config.dropout > 1:
        problems += [f"dropout is {shown(config.dropout)}; expected a probability"]
    if type(config.bias) is not bool:
        problems += [f"bias is {shown(config.bias)}; expected True or False"]
    if type(config.activation) is not str or config.activation not in ACTIVATIONS:
        problems += [f"activation is {shown(config.activation)}; expected {' or '.join(map(repr, ACTIVATIONS))}"]
    _refuse(path, "its model_args do not describe a GPT", problems)
    return config


def _is_config(config):
    if not isinstance(config, dict):
        return config is None
    dataset, seed = config.get("dataset", ""), config.get("seed")       # the others are not read
    return type(dataset) is str and len(dataset) < 256 and "\0" not in dataset and (seed is None or whole(seed, -LARGEST))


def _is_tokenizer(state):
    """What it must be to be compared and read at all; tokenizers.from_state knows the rest."""
    return state is None or isinstance(state, dict) and all(
        type(key) is str and (type(value) is str or type(value) is list and all(type(piece) is str for piece in value))
        for key, value in state.items())


def _from_build_nanogpt(found, path):
    """The checkpoint of build-nanogpt's train_gpt2.py, {model, config, step, val_loss}, under nanoGPT's names; others as they are."""
    parts = found.get("model"), found.get("config")
    if "model_args" in found or "step" not in found or not all(isinstance(part, dict) for part in parts) \
            or not set(SIZES) <= set(parts[1]):
        return found
    print(f"{path} is a checkpoint of build-nanogpt: GELU is its tanh form")
    biased = any(type(name) is str and name.endswith("ln_f.bias") for name in found["model"])
    args = {**found["config"], "bias": biased, "dropout": 0.0, "activation": "gelu_tanh"}
    rest = {name: value for name, value in found.items() if name not in ("config", "step", "val_loss")}
    return {**rest, "model_args": args, "iter_num": found["step"], "best_val_loss": found.get("val_loss", math.inf), "config": {},
            "layout": "build-nanogpt"}


# ------------------------------------------------------------------------------------------------------------ optimizer

OPTIONS = {     # of an AdamW group: whether the trainer can go on with a value
    "lr": at_least_0, "eps": at_least_0, "weight_decay": at_least_0,
    "betas": lambda both: type(both) in (tuple, list) and len(both) == 2 and all(type(beta) is float and 0 <= beta < 1 for beta in both),
    "amsgrad": lambda on: on is False, "maximize": lambda on: on is False, "decoupled_weight_decay": lambda on: on is True}
MOMENTS, MOMENTUM = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)    # of a parameter: AdamW's, Muon's


def _kept(group):
    """The names of what the optimizer of this group keeps of a parameter."""
    return MOMENTUM if "momentum" in group else MOMENTS


def _optimizer(groups):
    """What --optimizer was, by the groups of its state."""
    return "muon" if any("momentum" in group for group in groups) else "adamw"


def check_optimizer(state, path):
    """Raise CheckpointError unless this is the state dict of an AdamW, or of Muon and AdamW (training/muon.py), its tensors' shapes aside
    (`moments`)."""
    groups, tensors = (state.get("param_groups"), state.get("state")) if isinstance(state, dict) else (None, None)
    if type(groups) is not list or not groups or not isinstance(tensors, dict) or not all(
            isinstance(group, dict) and type(group.get("params")) is list and all(whole(i) for i in group["params"]) for group in groups):
        raise CheckpointError(f"{path}: its optimizer state is not one of AdamW: expected a dict of 'state' and 'param_groups'")
    problems = [f"{name} is {shown(group[name])}" for group in groups for name, accepted in OPTIONS.items()
                if name in group and not accepted(number(group[name]) if name == "lr" else group[name])]
    numbers = [i for group in groups for i in group["params"]]
    known = {i: _kept(group) for group in groups for i in group["params"]}
    if len(known) < len(numbers):
        problems += ["a parameter is in it twice"]
    if any(type(i) is not int or i not in known for i in tensors):
        problems += ["it has moments of a parameter that no group has"]
    wrong = {known[i] for i, one in tensors.items() if i in known and not (isinstance(one, dict) and set(one) in (set(), set(known[i])))}
    problems += [f"expected {', '.join(kept)} of every parameter of {'Muon' if kept == MOMENTUM else 'AdamW'}" for kept in sorted(wrong)]
    _refuse(path, "its optimizer state is not one that this trainer can go on from", problems)


def moments(state, optimizer, path):
    """The state dict for `optimizer.load_state_dict`, after checking that it belongs to its parameters. Raises CheckpointError.

    From the file come the moments, and AdamW's weight decay, betas and eps. How AdamW computes (fused, capturable, ...) is this
    optimizer's, and so are all options of Muon. Each moment is a contiguous tensor of its own, as the fused kernels require.
    """
    check_optimizer(state, path)
    groups = optimizer.param_groups
    was, wanted = _optimizer(state["param_groups"]), _optimizer(groups)
    if was != wanted:
        raise CheckpointError(f"{path} has the optimizer state of --optimizer={was}, which --optimizer={wanted} cannot go on from. Resume "
                              f"with --optimizer={was}")
    theirs, ours = ([(_kept(group), len(group["params"])) for group in both] for both in (state["param_groups"], groups))
    if theirs != ours:
        _refuse(path, "its optimizer state does not fit the model", [
            f"groups of {', '.join(str(len(group['params'])) for group in state['param_groups'])} tensors, and the model's have "
            f"{', '.join(str(len(group['params'])) for group in groups)}"])
    options = [{**{key: value for key, value in ours.items() if key != "params"}, "params": theirs["params"],
                **{key: theirs[key] for key in ("weight_decay", "betas", "eps") if key in theirs and _kept(ours) == MOMENTS}}
               for ours, theirs in zip(groups, state["param_groups"])]
    found, problems, taken = {}, [], set()
    for p, i in zip((p for group in groups for p in group["params"]), (i for group in options for i in group["params"])):
        saved = state["state"].get(i)
        if not saved:
            continue
        found[i] = {}
        for name in saved:
            if name == "step":
                step = number(saved["step"])
                if step is None or not 0 <= step <= LARGEST or step != int(step):
                    problems.append(f"step of tensor {i} is {shown(saved['step'])}; expected a count of steps")
                else:
                    found[i]["step"] = torch.tensor(float(step), dtype=torch.float32)
                continue
            tensor, why = saved[name], flaw(saved[name], finite=False)
            if why is None and tensor.shape != p.shape:
                why = f"has shape {tuple(tensor.shape)}, and its parameter {tuple(p.shape)}"
            why = why or flaw(tensor)
            if why is None and name == "exp_avg_sq" and tensor.numel() and tensor.min() < 0:
                why = "holds a negative square"
            if why is not None:
                problems.append(f"{name} of tensor {i} {why}")
                continue
            storage = tensor.untyped_storage()
            own = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in taken
            taken.add(storage.data_ptr())
            found[i][name] = tensor.detach() if own else tensor.detach().clone(memory_format=torch.contiguous_format)
    count = sum(len(group["params"]) for group in groups)
    if not problems and 0 < len(found) < count:
        problems = [f"moments of {len(found)} of {count} tensors"]
    crops = " (a block_size smaller than the checkpoint's crops the model but not the optimizer state)"
    _refuse(path, "its optimizer state does not fit the model" + crops * any(" has shape " in problem for problem in problems), problems)
    return {"state": found, "param_groups": options}


# ------------------------------------------------------------------------------------------------------------ a run

def check_run(found, path):
    """Raise CheckpointError unless a run can go on from what `check` returned: its optimizer and its resume state, where there are any."""
    if "optimizer" in found:
        check_optimizer(found["optimizer"], path)
    if "resume" not in found:
        return
    resume = found["resume"]
    ranks = resume.get("ranks") if isinstance(resume, dict) else None
    if type(ranks) is not list or not ranks or not all(isinstance(rank, dict) for rank in ranks):
        raise CheckpointError(f"{path}: its 'resume' is damaged: it has no list of ranks")
    if lacking := {"evaluated_at", "scaler"} - set(resume):
        raise CheckpointError(f"{path}: its 'resume' is damaged: it lacks {' and '.join(sorted(lacking))}")
    problems = [f"{name} is {shown(resume.get(name))}" for name, good in (
        ("evaluated_at", resume["evaluated_at"] is None or whole(resume["evaluated_at"], most=found["iter_num"])),
        ("ckpt", type(resume.get("ckpt", False)) is bool), ("val", whole(resume.get("val", 0))), ("scaler", _is_scaler(resume["scaler"]))) if not good]
    for i, rank in enumerate(ranks):
        problems += [f"{name} of rank {i} is not what a run saves" for name, good in (
            ("random", _are_random_states), ("batches", _is_position)) if not good(rank.get(name))]
    _refuse(path, "its 'resume' is damaged", problems)


def _is_scaler(state):
    """GradScaler's state: empty, or all five."""
    return isinstance(state, dict) and (not state or (
        all(at_least_0(state.get(name)) and state[name] > 0 for name in ("scale", "growth_factor", "backoff_factor"))
        and state["backoff_factor"] < 1 < state["growth_factor"]
        and whole(state.get("growth_interval"), 1, 2 ** 31 - 1) and whole(state.get("_growth_tracker"), 0, 2 ** 31 - 1)))


def _is_position(state):
    """Where a run was in its data: text/batches.py."""
    if not isinstance(state, dict) or not whole(state.get("size")) or not {"drawn", "generator"} <= set(state) \
            or not whole(state.get("checksum", 0)):
        return False
    drawn, generator = state["drawn"], state["generator"]
    return (drawn is None or flaw(drawn, (torch.int64,)) is None and drawn.dim() == 1 and drawn.numel() > 0 and drawn.min() >= 0
            ) and (generator is None or _is_generator(generator))


def _is_generator(state):
    """Whether torch's generator on a CPU takes this state."""
    if not _is_bytes(state):
        return False
    try:
        torch.Generator().set_state(state)
    except RuntimeError:
        return False
    return True


def _is_bytes(tensor):
    return flaw(tensor, (torch.uint8,)) is None and tensor.dim() == 1 and tensor.is_contiguous()


def _are_random_states(states):
    """Whether `state.set_random_states` can restore them: tried on generators that nobody uses, as far as their own checks go."""
    if not isinstance(states, dict) or not all(type(name) is str for name in states):
        return False
    numpys, python = states.get("numpy"), states.get("python")
    try:
        name, keys, position, has_gauss, gauss = numpys
        version, words, pair = python
        known = (type(name) is str and name == "MT19937" and flaw(keys, (torch.int64,)) is None and keys.shape == (624,)
                 and 0 <= keys.min() and keys.max() < 2 ** 32
                 and whole(position, 0, 624) and whole(has_gauss, 0, 1) and type(gauss) is float
                 and whole(version, 3, 3) and type(words) is tuple and all(type(word) is int for word in words)
                 and (pair is None or type(pair) is float))
        if known:
            random.Random().setstate((version, words, pair))
            np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    except (TypeError, ValueError, OverflowError):
        return False
    devices = [state for name, state in states.items() if name not in ("torch", "python", "numpy")]
    return known and _is_generator(states.get("torch")) and all(map(_is_bytes, devices))
