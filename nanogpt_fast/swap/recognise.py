"""Find candidates: which part of a GPT a module could be, by the names of its attributes, and why it cannot be swapped.

Names only make a candidate; trial.py runs a copy of it.
"""
import inspect

import torch.nn as nn

from .. import model as nano
from . import gpt2, parts
from .swapped import TAKEN


def candidate(module):
    """(part, classes that could replace the module's, None or why none can) for a module with known attribute names; else None."""
    if isinstance(module, (nano.GPT, nano.Block, nano.CausalSelfAttention, nano.MLP, nano.LayerNorm)):
        return None                                                                 # calls the ops already
    if type(module).forward is nn.Module.forward:                                   # a ModuleDict of minGPT: nothing to call
        return None
    children = dict(module.named_children())
    from_transformers = any(base.__module__.startswith("transformers.models.gpt2") for base in type(module).__mro__)
    found = None
    if from_transformers and {"c_attn", "c_proj"} <= children.keys():
        found = "attention", gpt2.GPT2Attention, _gpt2_attention_why_not(module, children)
    elif from_transformers and {"c_fc", "act", "c_proj", "dropout"} <= children.keys():
        found = "mlp", gpt2.GPT2Mlp, (_members_why_not(module, children, {"c_fc", "act", "c_proj", "dropout"})
                                      or _activation_why_not(module.act))
    elif from_transformers and {"ln_1", "attn", "ln_2", "mlp"} <= children.keys():
        found = "block", gpt2.GPT2Block, (_cache_why_not(module) or _members_why_not(module, children, {"ln_1", "attn", "ln_2", "mlp"})
                                          or _norm_why_not(module.ln_2))
    elif from_transformers:
        return None
    elif {"c_attn", "c_proj"} <= children.keys():
        rate = [parts.NanoAttention] if "dropout" in module.__dict__ else []
        found = "attention", (*rate, parts.PackedAttention), _nano_attention_why_not(module, children)
    elif {"query", "key", "value"} <= children.keys():
        found = "attention", parts.SeparateAttention, _separate_attention_why_not(module, children)
    elif {"c_fc", "c_proj"} <= children.keys():
        found = "mlp", *_nano_mlp(module, children)
    elif {"ln_1", "attn", "ln_2", "mlp"} <= children.keys():
        found = "block", parts.NanoBlock, (_members_why_not(module, children, {"ln_1", "attn", "ln_2", "mlp"})
                                           or _nano_block_why_not(module))
    elif {"ln1", "sa", "ln2"} <= children.keys() and children.keys() & {"ff", "ffwd"}:
        ff, mixin = ("ff", parts.SeparateBlock) if "ff" in children else ("ffwd", parts.LectureBlock)
        found = "block", mixin, (_members_why_not(module, children, {"ln1", "sa", "ln2", ff}) or _norm_why_not(module.ln2)
                                 or (None if getattr(module, "pre_norm", True) else "post-norm"))
    elif (type(module) is nn.Sequential and len(module) in (3, 4) and type(module[0]) is type(module[2]) is nn.Linear
          and module[0].in_features == module[2].out_features):
        found = "mlp", *_sequential_mlp(module)
    elif isinstance(module, nn.LayerNorm) or type(module).__name__ == "LayerNorm":
        found = "layer_norm", *_norm(module)
    elif {"transformer", "lm_head"} <= children.keys():
        found = "model", parts.NanoGPT, _nano_gpt_why_not(module, children)
    if found is None:
        return None
    part, mixins, why_not = found
    mixins = mixins if isinstance(mixins, tuple) else (mixins,)
    return part, mixins, why_not or next(filter(None, (_instance_why_not(module, mixin) for mixin in mixins)), None)


def _instance_why_not(module, mixin):
    """Why this instance cannot be swapped, whichever part it is: something would have to be undone first."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if type(module).__dict__.get("parametrizations") is not None or "parametrizations" in module._modules:
        return "it is parametrized"
    for base in mixin.__mro__[:mixin.__mro__.index(nn.Module)] if issubclass(mixin, nn.Module) else mixin.__mro__[:-1]:
        ours = TAKEN.get(base) or {name for name in vars(base) if name[:2] != "__" or name == "__reduce_ex__"}
        if clash := sorted(name for name in ours - {"forward", "__reduce_ex__"} if hasattr(module, name)):
            return f"it has a {', a '.join(clash)} of its own"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
    return None


def _members_why_not(module, children, known, *, optional=(), parameters=(), buffers=()):
    """None if a module has the known children, parameters and buffers and no others; else which it lacks or also has."""
    others = [*children.keys() - known - set(optional),
              *(name for name, _ in module.named_parameters(recurse=False) if name not in parameters),
              *(name for name, _ in module.named_buffers(recurse=False) if name not in buffers)]
    missing = known - children.keys()
    if others or missing:
        return "; ".join([f"it also has {', '.join(sorted(others))}"] * bool(others)
                         + [f"it lacks {', '.join(sorted(missing))}"] * bool(missing))
    return None


def _nano_attention_why_not(module, children):
    why_not = _members_why_not(module, children, {"c_attn", "c_proj"}, optional=("attn_dropout", "resid_dropout"), buffers=("bias",))
    lacks = [name for name in ("n_head", "n_embd") if name not in module.__dict__]
    return why_not or (f"it has no {', '.join(lacks)}" if lacks else None)


def _separate_attention_why_not(module, children):
    why_not = _members_why_not(module, children, {"query", "key", "value", "proj"}, optional=("attn_drop", "resid_drop"),
                               buffers=("tril", "mask", "bias"))
    return why_not or (None if "n_head" in module.__dict__ else "it has no n_head")


def _cache_why_not(module):
    if gpt2.cache_name(type(module).forward) is None:
        return f"its forward takes no {' or '.join(gpt2.CACHES)}"
    return None


def _gpt2_attention_why_not(module, children):
    if why_not := _cache_why_not(module):
        return why_not
    if module.is_cross_attention or module.reorder_and_upcast_attn:
        return "cross-attention" if module.is_cross_attention else "reorder_and_upcast_attn"
    if module.config._attn_implementation == "eager":
        return "attn_implementation='eager' materialises its mask; load the model with 'sdpa'"
    return _members_why_not(module, children, {"c_attn", "c_proj", "attn_dropout", "resid_dropout"}, buffers=gpt2.MASK_BUFFERS)


def _nano_mlp(module, children):
    """(classes that could replace the module's, None or why none can): the one for an activation of a known class, else all."""
    act = [name for name in children if name not in ("c_fc", "c_proj", "dropout")]
    why_not = _members_why_not(module, children, {"c_fc", "c_proj"}, optional=("dropout", *act[:1]))
    every = (parts.NanoMlp, parts.NanoMlpTanh, parts.NanoMlpRelu)
    if why_not is None and act:
        child = children[act[0]]
        if list(child.parameters()) or list(child.children()):
            why_not = f"it also has {act[0]}"
        elif (name := parts.activation_name(child)) is not None:
            return tuple(mixin for mixin in every if mixin._activation == name), None
        elif type(child).__module__.startswith("torch."):
            why_not = f"its activation is a {type(child).__name__}"
    return every, why_not


def _sequential_mlp(module):
    """The same for nn.Sequential(Linear, activation, Linear), with or without a Dropout at the end."""
    act, every = module[1], (parts.SequentialMlpTanh, parts.SequentialMlpGelu, parts.SequentialMlpRelu)
    own = not type(act).__module__.startswith("torch.") and not list(act.parameters()) and not list(act.children())
    if parts.activation_name(act) is not None:
        every, own = parts.SequentialMlp, True
    why_not = None if len(module) == 3 or isinstance(module[3], nn.Dropout) else "its fourth module is not a Dropout"
    return every, why_not or (None if own else _activation_why_not(act))


def _activation_why_not(act):
    return None if parts.activation_name(act) is not None else f"its activation is a {type(act).__name__}"


def _nano_block_why_not(module):
    """A block's fused path needs swapped parts; `accelerate` swaps them before the block."""
    kinds = {"ln_1": nano.LayerNorm, "ln_2": nano.LayerNorm, "attn": nano.CausalSelfAttention, "mlp": nano.MLP}
    for name, cls in kinds.items():
        part = getattr(module, name)
        if not isinstance(part, cls):
            return f"its {name} is a {type(part).__name__} that was not swapped"
    return None


def _norm_why_not(ln):
    return None if isinstance(ln, parts.Norm) else f"its second LayerNorm is a {type(ln).__name__} that was not swapped"


def _norm(module):
    """(the class that could replace the module's, None or why it cannot) for a LayerNorm."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1:
        return parts.Norm, "it has no weight, or normalises over several dimensions"
    if dict(module.named_children()) or {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}:
        return parts.Norm, "it has other parameters or children than weight and bias"
    if not hasattr(module, "bias"):
        return parts.Norm, "it has no attribute bias, not even None"
    return (parts.NanoNorm if getattr(module, "eps", 1e-5) == 1e-5 else parts.Norm), None


def _nano_gpt_why_not(module, children):
    parts = dict(module.transformer.named_children())
    if not {"wte", "wpe", "drop", "h", "ln_f"} <= parts.keys():
        return f"its transformer lacks {', '.join(sorted({'wte', 'wpe', 'drop', 'h', 'ln_f'} - parts.keys()))}"
    why_not = _members_why_not(module, children, {"transformer", "lm_head"}) or _members_why_not(
        module.transformer, parts, {"wte", "wpe", "drop", "h", "ln_f"})
    if why_not is not None:
        return why_not
    names = list(inspect.signature(type(module).forward).parameters)[1:3]
    if names != ["idx", "targets"]:
        return f"its forward takes {', '.join(names)}, not idx and targets"
    if not hasattr(getattr(module, "config", None), "block_size"):
        return "it has no config.block_size"
    if not isinstance(module.transformer.ln_f, nano.LayerNorm):
        return f"its ln_f is a {type(module.transformer.ln_f).__name__} that was not swapped"
    return None
