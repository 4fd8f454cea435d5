"""accelerate(model): put the ops into a model that already exists, in place; restore(model) takes them out again.

    report = nanogpt_fast.accelerate(model)             nanoGPT's classes, a classic GPT, transformers' GPT-2
    print(report)                                       what was swapped, what was not and why, what kept to its own path
    with nanogpt_fast.accelerate(model): ...            undone at the end

How. A module that is recognised is given another class: a subclass of its own class, made here, whose `forward` calls the ops.
Nothing else of the module is touched: parameters, buffers, hooks, submodules and their names are the same objects, so
optimizers, DDP, tied weights and state_dict see no change, and `restore` gives the old class back. The other way would be a
`forward` set on the instance. That one is lost or breaks where a class does not: pickle stores a bound method as "the attribute
forward of this module" and finds itself; everything that asks whether a forward was replaced (torch.nn.utils.parametrize and
FSDP2, which swap classes as well; our own `touched`) would have to tell our replacement from a user's. A class is copied by
deepcopy, traced by torch.compile like any other, and keeps isinstance, super() and the fork's other methods. Its name stays,
too: transformers writes it into config.json. A dynamic class has no address for pickle, so `__reduce_ex__` says how to make it
again; the reader needs nanogpt_fast, a state_dict does not.

What keeps it from changing results:

    recognised, then tried      attribute names only make a candidate. Before it is swapped, its own forward and ours are run on
                                the same random weights and inputs, with PyTorch's ops in ours, in eval and in train mode;
                                a fork that computes something else (a window, a scale, another order) is left alone, and the
                                report says by how much it differs.
    no kernel, own forward      wherever a kernel cannot run or was not asked for, the module's own forward runs: on a CPU an
                                accelerated model is the model that it was, bit for bit.
    whatever is unusual         an attention mask, past keys, an argument that we do not know: the module's own forward, counted
                                in the report. (Not counted while torch.compile traces.)

B batch, T sequence, C = n_embd, H = n_head, D = C / H head size.
"""
import collections
import functools
import inspect
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import backend as _backend
from . import model as nano
from . import reference
from .ops import attention, cross_entropy, layer_norm, mlp

# ------------------------------------------------------------------------------------------------------------ public functions


class Row(NamedTuple):
    path: str      # the module's name in the model; "" is the model itself
    part: str      # "attention", "mlp", "layer_norm", "block", "model"
    cls: str       # its class
    swapped: bool
    reason: str    # why not; empty where it was


class Report:
    """What `accelerate` did, and since then where calls went. Printable; as a context manager it restores at the end."""

    def __init__(self, model, rows, state):
        self.model, self.rows, self._state = model, rows, state

    @property
    def swapped(self):
        return [row for row in self.rows if row.swapped]

    @property
    def left(self):
        """What was a candidate and was not swapped, each with its reason."""
        return [row for row in self.rows if not row.swapped]

    @property
    def calls(self):
        """{(part, where): number of calls}; where is "kernels" or "own path: <reason>". Shared by this call's modules."""
        return dict(self._state.calls)

    @property
    def unfused(self):
        """[(path, reason)] of swapped blocks whose residual adds stay out of the LayerNorms now: a hook, another MLP ..."""
        found = []
        for path, module in self.model.named_modules():
            if isinstance(module, _Block) and (reason := module.unfused_reason()) is not None:
                found.append((path, reason))
            elif isinstance(module, _Mlp) and (reason := module.unfused_reason()) is not None:
                found.append((path, reason))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        restore(self.model)

    def __str__(self):
        counts = collections.Counter((row.part, row.cls) for row in self.swapped)
        lines = [f"swapped      {n:>3} x {part} ({cls})" for (part, cls), n in counts.items()] or ["swapped      nothing"]
        lines += [f"not swapped  {row.path or 'the model'} ({row.cls}): {row.reason}" for row in self.left]
        lines += [f"steps aside  {path}: {reason}" for path, reason in self.unfused]
        lines += [f"calls        {n:>6} x {part}, {where}" for (part, where), n in sorted(self.calls.items())]
        return "\n".join(lines)


def accelerate(model, backend=None):
    """Put the fused ops into `model`, in place, and return a Report; a second call starts anew. Undone by `restore(model)`.

    model: nanoGPT's GPT or a fork that keeps its attribute names, a ClassicGPT, transformers' GPT2Model or a model on it; any
    module that holds one (DDP, torch.compile's, a PEFT model). backend: "auto", "fused", "reference", or op by op, as in
    `backend.parse`. Train/eval mode, random state and parameters stay as they are; a few small forward passes are made on the
    CPU.

    Raises TypeError where the model holds nothing of the kind. A part that is of the kind and cannot be swapped raises nothing:
    it keeps its own forward, and the report says why.
    """
    choices = _backend.parse(backend)
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module; this is a {type(model).__name__}")
    restore(model)
    state, rows, seen, tried = _State(choices), [], set(), {}
    context = _context_length(model)
    # Inner parts first: a block is recognised by what its attention and its MLP have become.
    for path, module in sorted(model.named_modules(), key=lambda entry: -entry[0].count(".") if entry[0] else 1):
        candidate = None if id(module) in seen else _candidate(module)
        seen.add(id(module))
        if candidate is None:
            continue
        part, mixin, why_not = candidate
        cls = type(module).__name__
        if why_not is None:
            why_not = _swap(module, mixin, state, tried, context)
        rows.append(Row(path, part, cls, why_not is None, why_not or ""))
    rows.sort(key=lambda row: [int(piece) if piece.isdigit() else -1 for piece in row.path.split(".")] if row.path else [])
    if not any(row.part in ("attention", "mlp", "block") for row in rows) and not any(
            isinstance(module, (nano.GPT, nano.Block)) for module in model.modules()):
        raise TypeError(f"{type(model).__name__} holds no part of a GPT that is known here; known are nanoGPT's classes "
                        "(and forks that keep their attribute names), nanogpt_fast.classic's, and transformers' GPT-2")
    return Report(model, rows, state)


def restore(model):
    """Undo `accelerate`: every module gets its own class back. Returns the number of modules that had been swapped.

    Raises RuntimeError where a class was built on ours since then (parametrize, FSDP2): that has to be undone first.
    """
    swapped = [(path, module) for path, module in model.named_modules() if isinstance(module, _Swapped)]
    for path, module in swapped:
        if "_own" not in vars(type(module)):
            raise RuntimeError(f"{path or 'the model'} became a {type(module).__name__} after it was accelerated "
                               "(parametrize? FSDP?); undo that first, then restore")
    for _, module in swapped:
        module.__class__ = type(module)._own
        del module.__dict__["_swap_state"]
    return len(swapped)


# ------------------------------------------------------------------------------------------------------------ swapped modules


class _State:
    """What the swapped modules of one `accelerate` share: the choice of implementations, and the count of their calls."""

    def __init__(self, choices):
        self.choices = choices
        self.calls = collections.Counter()


class _Swapped:
    """A module whose forward is `fast` where `why_own` finds nothing against it, else its own. A subclass serves one part."""

    part = None

    def forward(self, *args, **kwargs):
        reason = self.why_own(*args, **kwargs)
        if not torch.compiler.is_compiling():  # a counter in a compiled graph would be a guard, and recompile at every call
            self._swap_state.calls[self.part, "kernels" if reason is None else f"own path: {reason}"] += 1
        return self.fast(*args, **kwargs) if reason is None else self._own.forward(self, *args, **kwargs)

    @property
    def backend(self):
        return self._swap_state.choices

    @backend.setter
    def backend(self, choices):
        self._swap_state.choices = choices

    def __reduce_ex__(self, protocol):
        return _remake, (self._own, self._mixin), self.__getstate__()


def _remake(own, mixin):
    """An empty instance of the swapped class: what pickle and deepcopy fill."""
    cls = _class(own, mixin)
    return cls.__new__(cls)


@functools.cache
def _class(own, mixin):
    """The subclass of `own` that stands in for it: methods are mixin's where it has them, the name and the rest are own's."""
    namespace = {"_own": own, "_mixin": mixin, "__module__": own.__module__, "__qualname__": own.__qualname__,
                 "__doc__": own.__doc__}
    for base in mixin.__mro__:  # of model.py's classes we take what a forward needs; a fork's other methods stay the fork's
        if base in (nano.GPT, nano.Block, nano.CausalSelfAttention, nano.MLP, nano.LayerNorm):
            namespace["stands_for"] = base
            for name in vars(base).keys() - _TAKEN[base] - namespace.keys():
                if hasattr(own, name) and not hasattr(nn.Module, name) or name == "__init__":
                    namespace[name] = inspect.getattr_static(own, name)
    return type(own.__name__, (mixin, own), namespace)


# What a forward needs of each class of model.py. A fork that uses one of these names for something else is not swapped.
_TAKEN = {
    nano.GPT: {"forward", "embed", "_blocks", "_runs_fused", "_final_norm"},
    nano.Block: {"forward", "fused", "unfused_reason"},
    nano.CausalSelfAttention: {"forward", "branch", "backend"},
    nano.MLP: {"forward", "branch", "backend"},
    nano.LayerNorm: {"forward", "backend"},
}


def _why_reference(op, candidates, choices, args):
    """None where a kernel runs `op` for these arguments, else why none does. Raises under "fused", as the op would."""
    if _backend.choose(op, candidates, choices, args) != "reference":
        return None
    if _backend.choice(op, choices) == "reference":
        return "backend='reference'"
    return next((reason for reason in (why_not(*args) for _, why_not in candidates) if reason is not None),
                "no kernel was chosen")


# LayerNorm

class _Norm(_Swapped):
    """A LayerNorm over the last dimension: nn.LayerNorm's attributes."""

    part = "layer_norm"

    def why_own(self, input):
        return _why_reference("layer_norm", layer_norm.CANDIDATES, self.backend, (input, self.weight, self.bias))

    def fast(self, input):
        return layer_norm.layer_norm(input, self.weight, self.bias, eps=getattr(self, "eps", 1e-5), backend=self.backend)


class _NanoNorm(_Norm, nano.LayerNorm):
    """nanoGPT's own, or an nn.LayerNorm of eps 1e-5, which is the same: model.py's Block takes either into its fused path."""


# Attention

def _why_own_attention(x, D, scale, choices):
    """As `_why_reference`, asked before the projection: x (B, T, C) stands for the queries, keys and values made of it."""
    return _why_reference("attention", attention.CANDIDATES, choices, (x, attention._autocast_dtype(x), D, scale, choices))


class _NanoAttention(_Swapped, nano.CausalSelfAttention):
    """One packed projection c_attn; x (B, T, C) -> (B, T, C)."""

    part = "attention"

    def why_own(self, x, *more, **keywords):
        if more or keywords:
            return "arguments that nanoGPT's attention does not have"
        if not self.flash:
            return "attn.flash is False"
        return _why_own_attention(x, self.n_embd // self.n_head, None, self.backend)

    def fast(self, x):
        return nano.CausalSelfAttention.forward(self, x)


class _SeparateAttention(_Swapped):
    """Three linears, key, query and value, and a projection; x (B, T, C) -> (B, T, C)."""

    part = "attention"

    def why_own(self, x, *more, **keywords):
        if more or keywords:
            return "arguments that the classic attention does not have"
        return _why_own_attention(x, x.size(-1) // self.n_head, None, self.backend)

    def fast(self, x):
        B, T, C = x.shape
        q, k, v = (part(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)                # (B, H, T, D)
                   for part in (self.query, self.key, self.value))
        y = attention.causal_attention(q, k, v, dropout_p=nano._p(self.attn_drop), backend=self.backend)
        return self.resid_drop(self.proj(y.transpose(1, 2).reshape(B, T, C)))


class _GPT2Attention(_Swapped):
    """transformers' GPT2Attention: c_attn is a Conv1D, keys and values may go into a cache. Returns (out, None), as SDPA."""

    part = "attention"

    def why_own(self, hidden_states, past_key_values=None, attention_mask=None, encoder_hidden_states=None,
                encoder_attention_mask=None, output_attentions=False, **more):
        if attention_mask is not None:
            return "an attention mask"
        if encoder_hidden_states is not None or output_attentions:
            return "cross-attention or output_attentions"
        if self.config._attn_implementation != "sdpa":
            return f"attn_implementation={self.config._attn_implementation!r}"
        if past_key_values is not None:
            if type(past_key_values).__name__ != "DynamicCache":
                return f"a {type(past_key_values).__name__}"
            if past_key_values.get_seq_length(self.layer_idx) > 0:
                return "past key values"
        return _why_own_attention(hidden_states, self.head_dim, self.scaling, self.backend)

    def fast(self, hidden_states, past_key_values=None, attention_mask=None, **more):
        qkv = self.c_attn(hidden_states)                                            # (B, T, 3C)
        p = nano._p(self.attn_dropout)
        if past_key_values is not None:                                             # empty: this is the prompt
            _, k, v = reference.split_heads(qkv, self.num_heads)
            past_key_values.update(k, v, self.layer_idx)
        y = attention.causal_attention_qkvpacked(qkv, self.num_heads, dropout_p=p, scale=self.scaling, backend=self.backend)
        return self.resid_dropout(self.c_proj(y)), None


# MLP

class _Mlp(_Swapped):
    """Linear, activation, Linear, dropout. Each subclass says where they are."""

    part = "mlp"

    def why_own(self, x):
        return self.unfused_reason() or _why_reference("mlp", mlp.CANDIDATES, self.backend, (x, *self.weights()))


class _NanoMlp(_Mlp, nano.MLP):
    """c_fc, gelu, c_proj, dropout."""

    def unfused_reason(self):
        return (nano.touched(self.c_fc, nn.Linear) or nano.touched(self.c_proj, nn.Linear) or nano.touched(self.gelu, nn.GELU)
                or nano.touched(self.dropout, nn.Dropout))

    def weights(self):
        return self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias

    def fast(self, x):
        return nano.MLP.forward(self, x)


class _SequentialMlp(_Mlp):
    """nn.Sequential(Linear, activation, Linear, Dropout)."""

    def unfused_reason(self):
        return (nano.touched(self[0], nn.Linear) or nano.touched(self[1], type(self[1])) or nano.touched(self[2], nn.Linear)
                or nano.touched(self[3], nn.Dropout))

    def weights(self):
        return self[0].weight, self[0].bias, self[2].weight, self[2].bias

    def fast(self, input):
        return mlp.gelu_mlp(input, *self.weights(), activation=_activation(self[1]), dropout_p=nano._p(self[3]),
                            backend=self.backend)


class _GPT2Mlp(_Mlp):
    """transformers' GPT2MLP. A Conv1D's weight is (in, out), the op's (out, in): a view, made contiguous by the cast."""

    def unfused_reason(self):
        conv = _conv1d()
        return (nano.touched(self.c_fc, conv) or nano.touched(self.c_proj, conv) or nano.touched(self.act, type(self.act))
                or nano.touched(self.dropout, nn.Dropout))

    def weights(self):
        return self.c_fc.weight.t(), self.c_fc.bias, self.c_proj.weight.t(), self.c_proj.bias

    def fast(self, hidden_states):
        return mlp.gelu_mlp(hidden_states, *self.weights(), activation=_activation(self.act), dropout_p=nano._p(self.dropout),
                            backend=self.backend)


def _conv1d():
    from transformers.pytorch_utils import Conv1D
    return Conv1D


_conv1d._dynamo_marked_constant = True      # torch.compile keeps the answer instead of tracing the import


def _activation(module):
    """The name of a module's activation function by its class, or None where it is none of the op's."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module).__name__)


_ACTIVATIONS = {"ReLU": "relu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh",
                "FastGELUActivation": "gelu_tanh"}      # the last four are transformers'; `_tried` checks what they compute


# Block: the residual add behind the attention and the LayerNorm behind it are one kernel

class _Block(_Swapped):

    part = "block"

    def why_own(self, x, *args, **keywords):
        ln = self.norms()[1]
        return self.unfused_reason() or _why_reference("layer_norm", layer_norm.CANDIDATES, ln.backend, (x, ln.weight, ln.bias))


class _NanoBlock(_Block, nano.Block):
    """Called alone. A swapped GPT calls `fused` instead, where the second add goes into the next block's LayerNorm, too."""

    def norms(self):
        return self.ln_1, self.ln_2

    def why_own(self, x, *more, **keywords):
        return "arguments that nanoGPT's block does not have" if more or keywords else super().why_own(x)

    def fast(self, x):
        return nano._add(*self.fused(x, None, 0.0))


class _SeparateBlock(_Block):
    """Pre-norm block of ln1, sa, ln2, ff."""

    def norms(self):
        return self.ln1, self.ln2

    def unfused_reason(self):
        return _norm_touched(self.ln2) or (None if getattr(self, "pre_norm", True) else "post-norm")

    def fast(self, x):
        x, h = layer_norm.add_layer_norm(x, self.sa(self.ln1(x)), self.ln2.weight, self.ln2.bias, eps=self.ln2.eps,
                                         backend=self.backend)
        return x + self.ff(h)


class _GPT2Block(_Block):
    """transformers' GPT2Block, without cross-attention."""

    def norms(self):
        return self.ln_1, self.ln_2

    def unfused_reason(self):
        return _norm_touched(self.ln_2)

    def why_own(self, hidden_states, past_key_values=None, attention_mask=None, encoder_hidden_states=None, **more):
        return "cross-attention" if encoder_hidden_states is not None else super().why_own(hidden_states)

    def fast(self, hidden_states, past_key_values=None, attention_mask=None, encoder_hidden_states=None,
             encoder_attention_mask=None, use_cache=False, **more):
        branch, _ = self.attn(self.ln_1(hidden_states), past_key_values=past_key_values, attention_mask=attention_mask,
                              use_cache=use_cache, **more)
        x, h = layer_norm.add_layer_norm(hidden_states, branch, self.ln_2.weight, self.ln_2.bias, eps=self.ln_2.eps,
                                         backend=self.backend)
        return x + self.mlp(h)


def _norm_touched(module):
    """None where a LayerNorm is a swapped one and calling it does nothing else; else what somebody did to it."""
    if vars(type(module)).get("_mixin") not in (_Norm, _NanoNorm):
        return f"{type(module).__name__} stands where a swapped LayerNorm did"
    return nano.touched(module, type(module))


# The model: the loop over blocks that carries a residual and a branch, and the fused loss

class _NanoGPT(_Swapped, nano.GPT):
    """nanoGPT's GPT.forward(idx, targets=None)."""

    part = "model"

    def why_own(self, idx, targets=None, *more, **keywords):
        if more or keywords:
            return "arguments that nanoGPT's GPT does not have"
        head, norm = self.lm_head.weight, self.transformer.ln_f.weight              # they stand for the residual stream
        reason = _why_reference("layer_norm", layer_norm.CANDIDATES, self.backend, (norm, norm, None))
        if reason is None or targets is None:
            return reason
        return reason and _why_reference("cross_entropy", cross_entropy.CANDIDATES, self.backend, (head, head, targets))

    def fast(self, idx, targets=None):
        return nano.GPT.forward(self, idx, targets)


# ---------------------------------------------------------------------------------------------------------- what is recognised


def _candidate(module):
    """(part, the class that could stand in, None or why it cannot) for a module whose attributes say what it is; else None."""
    if isinstance(module, (nano.GPT, nano.Block, nano.CausalSelfAttention, nano.MLP, nano.LayerNorm)):
        return None                                                                 # calls the ops already
    children = dict(module.named_children())
    from_transformers = any(base.__module__.startswith("transformers.models.gpt2") for base in type(module).__mro__)
    found = None
    if from_transformers and {"c_attn", "c_proj"} <= children.keys():
        found = "attention", _GPT2Attention, _gpt2_attention_why_not(module, children)
    elif from_transformers and {"c_fc", "act", "c_proj", "dropout"} <= children.keys():
        found = "mlp", _GPT2Mlp, _extra(module, children, {"c_fc", "act", "c_proj", "dropout"}) or _odd(module.act)
    elif from_transformers and {"ln_1", "attn", "ln_2", "mlp"} <= children.keys():
        found = "block", _GPT2Block, _extra(module, children, {"ln_1", "attn", "ln_2", "mlp"}) or _norms_why_not(module.ln_2)
    elif from_transformers:
        return None
    elif {"c_attn", "c_proj"} <= children.keys():
        found = "attention", _NanoAttention, _nano_attention_why_not(module, children)
    elif {"query", "key", "value"} <= children.keys():
        found = "attention", _SeparateAttention, _separate_attention_why_not(module, children)
    elif {"c_fc", "c_proj"} <= children.keys():
        found = "mlp", _NanoMlp, _nano_mlp_why_not(module, children)
    elif {"ln_1", "attn", "ln_2", "mlp"} <= children.keys():
        found = "block", _NanoBlock, _extra(module, children, {"ln_1", "attn", "ln_2", "mlp"}) or _nano_block_why_not(module)
    elif {"ln1", "sa", "ln2", "ff"} <= children.keys():
        found = "block", _SeparateBlock, (_extra(module, children, {"ln1", "sa", "ln2", "ff"}) or _norms_why_not(module.ln2)
                                          or (None if getattr(module, "pre_norm", True) else "post-norm"))
    elif type(module) is nn.Sequential and len(module) == 4 and type(module[0]) is type(module[2]) is nn.Linear:
        found = "mlp", _SequentialMlp, _odd(module[1]) or (None if isinstance(module[3], nn.Dropout) else "it ends in no dropout")
    elif isinstance(module, nn.LayerNorm) or type(module).__name__ == "LayerNorm":
        found = "layer_norm", *_norm(module)
    elif {"transformer", "lm_head"} <= children.keys():
        found = "model", _NanoGPT, _nano_gpt_why_not(module, children)
    if found is None:
        return None
    part, mixin, why_not = found
    return part, mixin, why_not or _instance_why_not(module, mixin)


def _instance_why_not(module, mixin):
    """What would have to be undone first, whatever the module is."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if type(module).__dict__.get("parametrizations") is not None or "parametrizations" in module._modules:
        return "it is parametrized"
    for base in mixin.__mro__:
        clash = sorted(name for name in _TAKEN.get(base, set()) - {"forward"} if hasattr(module, name))
        if clash:
            return f"it has a {', a '.join(clash)} of its own"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
    return None


def _extra(module, children, known, *, parameters=(), buffers=()):
    """None where a module has no other children, parameters and buffers than the known ones."""
    others = [*children.keys() - known, *(name for name, _ in module.named_parameters(recurse=False) if name not in parameters),
              *(name for name, _ in module.named_buffers(recurse=False) if name not in buffers)]
    missing = known - children.keys()
    if others or missing:
        return "; ".join([f"it has {', '.join(sorted(others))} besides"] * bool(others)
                         + [f"it lacks {', '.join(sorted(missing))}"] * bool(missing))
    return None


def _nano_attention_why_not(module, children):
    reason = _extra(module, children, {"c_attn", "c_proj", "attn_dropout", "resid_dropout"}, buffers=("bias",))
    lacks = [name for name in ("n_head", "n_embd", "dropout", "flash") if name not in module.__dict__]
    return reason or (f"it has no {', '.join(lacks)}" if lacks else None)


def _separate_attention_why_not(module, children):
    reason = _extra(module, children, {"query", "key", "value", "proj", "attn_drop", "resid_drop"}, buffers=("tril",))
    return reason or (None if "n_head" in module.__dict__ else "it has no n_head")


def _gpt2_attention_why_not(module, children):
    if "past_key_values" not in inspect.signature(type(module).forward).parameters:
        return "this version of transformers passes keys and values in another way"
    if module.is_cross_attention or module.reorder_and_upcast_attn:
        return "cross-attention" if module.is_cross_attention else "reorder_and_upcast_attn"
    if module.config._attn_implementation == "eager":
        return "attn_implementation='eager' writes its mask out; load the model with 'sdpa'"
    return _extra(module, children, {"c_attn", "c_proj", "attn_dropout", "resid_dropout"})


def _nano_mlp_why_not(module, children):
    reason = _extra(module, children, {"c_fc", "gelu", "c_proj", "dropout"})
    if reason is None and not isinstance(module.gelu, nn.GELU):
        reason = f"its activation is a {type(module.gelu).__name__}"
    return reason


def _odd(act):
    return None if _activation(act) is not None else f"its activation is a {type(act).__name__}"


def _nano_block_why_not(module):
    """A block's fused path needs parts that were swapped; they come first."""
    kinds = {"ln_1": nano.LayerNorm, "ln_2": nano.LayerNorm, "attn": nano.CausalSelfAttention, "mlp": nano.MLP}
    for name, cls in kinds.items():
        part = getattr(module, name)
        if not isinstance(part, cls):
            return f"its {name} is a {type(part).__name__} that was not swapped"
    return None


def _norms_why_not(ln):
    return None if isinstance(ln, _Norm) else f"its second LayerNorm is a {type(ln).__name__} that was not swapped"


def _norm(module):
    """(the class that can stand in, None or why it cannot) for a LayerNorm."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1:
        return _Norm, "it has no weight, or normalises over several dimensions"
    if dict(module.named_children()) or {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}:
        return _Norm, "it has other parameters or children than weight and bias"
    if not hasattr(module, "bias"):
        return _Norm, "it has no bias, not even None"
    return (_NanoNorm if getattr(module, "eps", 1e-5) == 1e-5 else _Norm), None


def _nano_gpt_why_not(module, children):
    parts = dict(module.transformer.named_children())
    if not {"wte", "wpe", "drop", "h", "ln_f"} <= parts.keys():
        return f"its transformer lacks {', '.join(sorted({'wte', 'wpe', 'drop', 'h', 'ln_f'} - parts.keys()))}"
    reason = _extra(module, children, {"transformer", "lm_head"}) or _extra(
        module.transformer, parts, {"wte", "wpe", "drop", "h", "ln_f"})
    if reason is not None:
        return reason
    names = list(inspect.signature(type(module).forward).parameters)[1:3]
    if names != ["idx", "targets"] or not hasattr(getattr(module, "config", None), "block_size"):
        return f"its forward takes {', '.join(names)}, not idx and targets, or it has no config.block_size"
    if not isinstance(module.transformer.ln_f, nano.LayerNorm):
        return f"its ln_f is a {type(module.transformer.ln_f).__name__} that was not swapped"
    return None


# ------------------------------------------------------------------------------------------------------- recognised, then tried

# What ours may differ from the module's own, relative to the largest value: both are float64 except attention (float32, since its
# probe is long) and the whole model (its own weights and dtype). An erf GELU in the place of a tanh one shows as 1e-4.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
LONGEST_PROBE = 1024


def _swap(module, mixin, state, tried, context):
    """Swap one module, after trying it out. None, or why not; then the module is as it was."""
    own = type(module)
    cls = _class(own, mixin)
    # Modules of one class whose plain attributes and shapes are equal compute the same function of their weights: one is tried.
    # transformers' code is known: layer_idx there numbers the cache, and enters the scale, which is an attribute of its own.
    plain = {name: value for name, value in module.__dict__.items()
             if isinstance(value, (int, float, str, type(None)))
             and (name != "layer_idx" or mixin not in (_GPT2Attention, _GPT2Mlp, _GPT2Block))}
    inner = tuple((name, type(child), tuple(sorted((k, v) for k, v in vars(child).items() if isinstance(v, (int, float, str)))))
                  for name, child in module.named_modules() if child is not module and mixin is not _NanoGPT)
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    fixed = tuple((name, id(buffer)) for name, buffer in module.named_buffers())
    key = (own, mixin, tuple(sorted(plain.items(), key=str)), inner, shapes, fixed)
    module.__dict__["_swap_state"] = state
    try:
        module.__class__ = cls
        if key not in tried:
            tried[key] = _tried(module, context)
    except TypeError as error:                  # __slots__ and the like: the layouts differ
        tried[key] = f"its class cannot be exchanged ({error})"
    if tried[key] is not None:
        module.__class__ = own
        del module.__dict__["_swap_state"]
    return tried[key]


def _tried(module, context):
    """None where the module's own forward and ours agree on random inputs, in eval and train mode; else what is different."""
    modes = [(m, m.training) for m in module.modules()]
    calls = module._swap_state.calls.copy()
    try:
        with (torch.no_grad(), torch.random.fork_rng(_devices(module)), _backend.use("reference"),
              torch.autocast("cpu", enabled=False)):
            for training in (False, True):
                module.train(training)
                reason = _compare(module, *(_model_probe(module) if isinstance(module, _NanoGPT) else _probe(module, context)))
                if reason is not None:
                    return f"{reason} in {'train' if training else 'eval'} mode"
    except Exception as error:
        return f"trying it out raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        for m, training in modes:
            m.training = training
        module._swap_state.calls = calls
    return None


class _Call(nn.Module):
    """A function of a module, in a form that torch.func.functional_call takes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, method, *args):
        return method(self.module, *args)


def _probe(module, context):
    """(own, ours): two functions without arguments that run a part on the same random weights and inputs, on the CPU."""
    dtype = torch.float32 if isinstance(module, (_NanoAttention, _SeparateAttention, _GPT2Attention)) else torch.float64
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in module.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5     # outputs of order one: nothing hides in zeros
        tensors[f"module.{name}"] = scale * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    for name, buffer in module.named_buffers():
        tensors[f"module.{name}"] = buffer.detach().to("cpu", dtype if buffer.is_floating_point() else buffer.dtype)
    T = min(context, LONGEST_PROBE) if dtype == torch.float32 else min(context, 16)
    x = torch.randn(1, T, _width(module), generator=generator, dtype=dtype)
    run = lambda method: torch.func.functional_call(_Call(module), tensors, (method, x))
    return lambda: run(type(module)._own.forward), lambda: run(type(module).fast)


def _model_probe(module):
    """The same for the whole model, on its own weights where they are: random ones would be a second model in memory."""
    T = min(module.config.block_size, 16)
    device = module.lm_head.weight.device
    idx = (torch.arange(2 * T, device=device) * 7 % module.lm_head.weight.size(0)).view(2, T)
    targets = idx.roll(-1, 1)
    targets[0, 0] = -1
    run = lambda method: (*method(module, idx, targets), method(module, idx)[0])
    return lambda: run(type(module)._own.forward), lambda: run(type(module).fast)


def _compare(module, own, ours):
    results = []
    for call in (own, ours):
        torch.manual_seed(0)                    # the same dropout masks, where they are drawn in the same order
        result = call()
        results.append([t for t in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(t)])
    if [t.shape for t in results[0]] != [t.shape for t in results[1]]:
        return f"its results have shapes {[tuple(t.shape) for t in results[0]]}, ours {[tuple(t.shape) for t in results[1]]}"
    for expected, found in zip(*results):
        difference = ((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        if not difference <= TOLERANCE.get(expected.dtype, 1e-6):
            return f"it computes something else: {difference:.1e} of the largest value away from nanoGPT's"
    return None


def _width(module):
    """C, of what goes in."""
    for name in ("ln_1", "ln1"):
        if hasattr(module, name):
            return getattr(module, name).weight.numel()
    if isinstance(module, _Norm):
        return module.weight.numel()
    for name in ("n_embd", "embed_dim"):
        if name in module.__dict__:
            return getattr(module, name)
    if isinstance(module, _SeparateAttention):
        return module.query.in_features
    return module.weights()[0].size(1)


def _context_length(model):
    """The longest context of a model, in tokens, where its config says so."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name in ("block_size", "n_positions"):
            if isinstance(getattr(config, name, None), int):
                return getattr(config, name)
    return 64


def _devices(module):
    return sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
