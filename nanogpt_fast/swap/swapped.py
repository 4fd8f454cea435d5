"""The class that a swapped module gets: a subclass of its own class whose forward runs our formula unless `why_not` gives a reason.

The formulas are in parts.py. Why a class, and not a `forward` set on the instance: see __init__.py.
"""
import collections
import copy
import functools
import hashlib
import inspect
import types

import torch
import torch.nn as nn

from .. import model as nano
from ..touched import known
from . import stage


class State:
    """What the swapped modules of one `accelerate` share."""

    def __init__(self, choices, context):
        self.choices = choices                                  # implementations, see backend.parse
        self.context = context                                  # the longest sequence that was tried
        self.calls = collections.Counter()                      # {(part, where): number of calls}
        self.forms = {}                                         # what transformers' forwards return: {own class: {use_cache: gpt2.form}}
        self.operations = collections.defaultdict(set)          # that ran in the trial: {own class: names}


class MISSING:
    """The value of a missing attribute. A class, because unpickling gives the same class, but not the same instance."""


class Swapped:
    """A module that runs `fast` if `why_not` returns None, else its own forward. Each subclass serves one part.

    `why_not` returns the reason why a call cannot run `fast`, the formula; both take what `inputs` returns.
    """

    part = None
    tensors = 1         # how many leading arguments the formula takes; all others must have their default values
    rank = 3            # dimensions of the first, (B, T, C)
    obeyed = ()         # attributes that may change: the formula reads them at each call, or `why_not` checks them

    def forward(self, *args, **kwargs):
        inputs, why_not = (), self.changed() or self.why_not_bound(args, kwargs)
        if why_not is None:
            inputs = self.inputs(args, kwargs)
            why_not = self.why_not(*inputs)
        if not torch.compiler.is_compiling():  # a compiled graph would guard on the counter, and recompile at every call
            self._swap_state.calls[self.part, "kernels" if why_not is None else f"own path: {why_not}"] += 1
        return self.fast(*inputs) if why_not is None else self._own.forward(self, *args, **kwargs)

    def bound(self, args, keywords):
        """{name: value} of the arguments, named as in the own forward's signature."""
        return {**dict(zip(self._names, args)), **keywords}

    def inputs(self, args, keywords):
        call = self.bound(args, keywords)
        return tuple(call[name] for name in self._names[:self.tensors] if name in call)

    def why_not_bound(self, args, keywords):
        """None if the formula takes these arguments, else which one it does not. Invalid ones go to the own forward, which raises."""
        if len(args) > len(self._names):
            return "more arguments than its forward has"
        call, names = self.bound(args, keywords), self._names[:self.tensors]
        for name, value in call.items():
            if name not in names and not (name in self._defaults and _equal(value, self._defaults[name])):
                return f"the argument {name}"
        x = call.get(names[0])
        if not torch.is_tensor(x) or not all(call.get(name) is None or torch.is_tensor(call[name]) for name in names[1:]):
            return "an input that is not a tensor"
        if x.dim() == self.rank and x.size(1) > self._swap_state.context:
            return f"{x.size(1)} tokens, more than the {self._swap_state.context} that were tried"
        return None

    def changed(self):
        """None, or what differs from the trial: the own forward, or an attribute that it may read and the formula does not."""
        if self._own.forward is not type(self)._own_forward:
            return f"{self._own.__name__}.forward was replaced since the swap"
        for owner, name, value in self._swap_tried:
            there = self if owner is None else getattr(self, owner, None)
            if not _equal(getattr(there, name, MISSING), value):
                return f"{name if owner is None else f'{owner}.{name}'} has changed since the swap"
        for owner, count, absent in self._swap_known:   # attributes added since; PyTorch 2.11 cannot trace their number, hence the names
            spaces = ((self.__dict__, self._modules, self._buffers, self._parameters) if owner is None
                      else (getattr(self, owner).__dict__,))
            if torch.compiler.is_compiling() or sum(map(len, spaces)) != count:
                for name in absent:
                    for names in spaces:
                        if name in names:
                            return f"{name} was added since the swap"
        return None

    def watched_children(self):
        """The names of children that the formula does not call because it computes what they do."""
        return []

    @property
    def backend(self):
        return self._swap_state.choices

    @backend.setter
    def backend(self, choices):
        self._swap_state.choices = choices

    def __reduce_ex__(self, protocol):
        return _remake, (self._own, self._mixin, self._lacking, _digest(type(self)._own_forward)), self.__getstate__()


def _equal(a, b):
    """Whether two attributes or arguments are equal: plain values by value, tensors and other objects by identity."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    plain = isinstance(a, stage.PLAIN) or isinstance(a, (tuple, list, dict)) and stage.is_plain(a) and stage.is_plain(b)
    return plain and a == b


# --------------------------------------------------------------------------------------------------- watched attributes


def mentioned(cls):
    """The attributes that the code of a class could read: all names in it, and all strings, which could be arguments of getattr."""
    names = set()
    for base in cls.__mro__[:cls.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            for function in (value, getattr(value, "__func__", None), getattr(value, "fget", None), getattr(value, "__wrapped__", None)):
                if isinstance(function, types.FunctionType):
                    _mentioned_in(function.__code__, names)
    return frozenset(names - _MACHINERY)


def _mentioned_in(code, names):
    names.update(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, types.CodeType):
            _mentioned_in(constant, names)


# nn.Module's own attributes, those that swap sets, and the one that training/half_weights.py sets.
_MACHINERY = frozenset((*vars(nn.Module()), *vars(nn.Module), "_swap_state", "_swap_tried", "_swap_known", "copies"))


def watch(module):
    """Record the attributes with which a swapped module was tried, and those of its config (transformers' excepted), for `changed`."""
    cls, own, d = type(module), type(module)._own, module.__dict__
    tried, counts = [], []
    for name in sorted(cls._mentioned - cls._obeyed):
        value = d.get(name, inspect.getattr_static(own, name, MISSING))
        if name in d or value is not MISSING and not callable(value) and not hasattr(value, "__get__"):
            tried.append((None, name, _kept(value)))
        if name in d and hasattr(value, "__dict__") and not callable(value) and not own.__module__.startswith("transformers."):
            tried += [(name, key, _kept(item)) for key, item in vars(value).items()
                      if key in cls._mentioned and f"{name}.{key}" not in cls._obeyed]
            counts.append((name, len(vars(value)), tuple(sorted(cls._mentioned - vars(value).keys()))))
    for child in module.watched_children():
        tried += [(child, "__class__", known(type(d["_modules"][child])))]
        tried += [(child, key, _kept(item)) for key, item in vars(d["_modules"][child]).items() if key not in _MACHINERY]
    members = {**module._modules, **module._buffers, **module._parameters}
    tried += [(None, name, None) for name, member in members.items() if member is None]
    d["_swap_tried"], d["_swap_known"] = tuple(tried), None
    counts.append((None, len(d) + len(members), tuple(sorted(cls._mentioned - d.keys() - members.keys()))))
    d["_swap_known"] = tuple(counts)


def _kept(value):
    """An attribute as it is now: a copy if it is a list or dict of plain values, which code could write to; else the object itself."""
    return copy.copy(value) if isinstance(value, (list, dict)) and stage.is_plain(value) else value


# ------------------------------------------------------------------------------------------------------------- the class


def unswap(module):
    """Give a module its own class back."""
    object.__setattr__(module, "__class__", type(module)._own)
    for name in [name for name in module.__dict__ if name.startswith("_swap_")]:
        del module.__dict__[name]


def _remake(own, mixin, lacking=(), digest=None):
    """An empty instance of the swapped class, for pickle and deepcopy to fill. digest: of the forward that was tried, if known."""
    cls = _swapped_class(own, own.forward, mixin, lacking, digest in (None, _digest(own.forward)))
    return cls.__new__(cls)


def _digest(forward):
    """What tells two forwards apart across processes: a hash of the code, "" without any. Another Python compiles other code."""
    code = getattr(inspect.unwrap(forward), "__code__", None) if forward is not None else None
    if code is None:
        return ""
    constants = [sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)
                 for constant in code.co_consts if not isinstance(constant, types.CodeType)]
    return hashlib.sha256(repr((code.co_code, constants, code.co_names, code.co_freevars)).encode()).hexdigest()


def swapped_class(own, mixin, lacking=()):
    """The subclass of `own` that replaces it: mixin's methods come first; the name and all else are own's.

    lacking: names of dropouts that mixin's formula calls and own does not have.
    """
    return _swapped_class(own, own.forward, mixin, lacking, True)


@functools.cache
def _swapped_class(own, forward, mixin, lacking, tried):
    """tried: whether this forward is the one that was, so that `changed` may find nothing."""
    namespace = {"_own": own, "_own_forward": forward if tried else None, "_mixin": mixin, "_lacking": lacking, "__module__": own.__module__,
                 "__qualname__": own.__qualname__, "__doc__": own.__doc__, **{name: nn.Dropout(0.0) for name in lacking}}
    for base in mixin.__mro__:  # take only what a forward needs from model.py's classes; a fork's other methods stay the fork's
        if base in TAKEN:
            namespace["stands_for"] = base
            for name in vars(base).keys() - TAKEN[base] - namespace.keys():
                if hasattr(own, name) and not hasattr(nn.Module, name) or name in ("__init__", "__call__"):
                    namespace[name] = inspect.getattr_static(own, name)
    if "__call__" in vars(mixin) and own.__call__ is nn.Module.__call__:
        namespace["__call__"] = mixin.__call__
    signature = list(inspect.signature(forward).parameters.values())      # here and not per call: torch.compile cannot trace inspect
    namespace["_names"] = tuple(p.name for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))[1:]
    namespace["_open"] = any(p.kind is p.VAR_KEYWORD for p in signature)
    # The trial passes None for arguments without a default, so None is the one value that they may have.
    namespace["_defaults"] = {p.name: None if p.default is p.empty else p.default for p in signature
                              if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    namespace["_required"] = tuple(p.name for p in signature if p.default is p.empty and p.kind in (
        p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))[1 + mixin.tensors:]
    namespace["_mentioned"] = mentioned(own)
    namespace["_obeyed"] = frozenset(mixin.obeyed)
    cls = type(own.__name__, (mixin, own), namespace)
    cls.itself = cls            # a class derived from this one inherits the attribute, and is not `itself`
    return cls


# What a forward needs from each class of model.py. A fork that uses one of these names for something else is not swapped.
TAKEN = {
    nano.GPT: {"forward", "_hidden", "_embed", "_lookup", "_blocks", "_fused_by", "_final_norm", "_logits_and_loss",
               "_why_not_fused_loss", "_why_not_apart"},
    nano.Block: {"forward", "fused", "drops", "why_not_fused"},
    nano.CausalSelfAttention: {"forward", "branch", "backend"},
    nano.MLP: {"forward", "branch", "backend"},
    nano.LayerNorm: {"forward", "backend"},
}
