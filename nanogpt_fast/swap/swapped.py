"""A module under another class: a subclass of its own class, made here, whose forward is ours where nothing speaks against it.

Which formula that is, the classes of parts.py say. Why a class, and not a `forward` on the instance: see __init__.py.
"""
import collections
import functools
import inspect

import torch
import torch.nn as nn

from .. import model as nano


class State:
    """What the swapped modules of one `accelerate` share: the choice of implementations, the count of their calls, and the
    form of what transformers' own forwards return: {class: {use_cache: form}}, see gpt2.form."""

    def __init__(self, choices):
        self.choices = choices
        self.calls = collections.Counter()
        self.forms = {}


class Swapped:
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
    cls = swapped_class(own, mixin)
    return cls.__new__(cls)


@functools.cache
def swapped_class(own, mixin):
    """The subclass of `own` that stands in for it: methods are mixin's where it has them, the name and the rest are own's."""
    namespace = {"_own": own, "_mixin": mixin, "__module__": own.__module__, "__qualname__": own.__qualname__,
                 "__doc__": own.__doc__}
    for base in mixin.__mro__:  # of model.py's classes we take what a forward needs; a fork's other methods stay the fork's
        if base in (nano.GPT, nano.Block, nano.CausalSelfAttention, nano.MLP, nano.LayerNorm):
            namespace["stands_for"] = base
            for name in vars(base).keys() - TAKEN[base] - namespace.keys():
                if hasattr(own, name) and not hasattr(nn.Module, name) or name == "__init__":
                    namespace[name] = inspect.getattr_static(own, name)
    return type(own.__name__, (mixin, own), namespace)


# What a forward needs of each class of model.py. A fork that uses one of these names for something else is not swapped.
TAKEN = {
    nano.GPT: {"forward", "embed", "_blocks", "_runs_fused", "_final_norm"},
    nano.Block: {"forward", "fused", "unfused_reason"},
    nano.CausalSelfAttention: {"forward", "branch", "backend"},
    nano.MLP: {"forward", "branch", "backend"},
    nano.LayerNorm: {"forward", "backend"},
}
