"""Is a module exactly ours? The fused paths check this before they bypass a module's call, and report the reason if they cannot."""
import types

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as _nn_module


def _pytorchs(function):
    """`function`, or None if a program has put it there: PyTorch's is a function, and knows the module that it was written in."""
    return function if isinstance(function, types.FunctionType) and function.__globals__["__name__"].startswith("torch.nn.") else None


# {class: its forward, as the class was defined; None where a program had set another one before we were imported}. A program may set one
# later, or bind the class's name in model.py to one of its own.
FORWARDS = {cls: _pytorchs(cls.forward) for cls in (nn.Linear, nn.Embedding, nn.Dropout, nn.GELU, nn.ModuleDict, nn.ModuleList)}
# {name: function of torch.nn.functional}, likewise. A program may set another one: attention of its own, or a profiler's.
FUNCTIONS = {name: getattr(torch._C._nn, name, None) or _pytorchs(getattr(F, name))
             for name in ("scaled_dot_product_attention", "layer_norm", "linear", "gelu", "relu", "embedding", "dropout", "cross_entropy")}
_CALLED = {nn.Linear: "linear", nn.Embedding: "embedding", nn.Dropout: "dropout", nn.GELU: "gelu"}    # by a module's forward


def known(cls):
    """Class decorator: `touched` may be asked about this class, and its forward is the one that the fused paths compute."""
    FORWARDS.setdefault(cls, cls.forward)
    return cls


def touched(module, cls):
    """None if calling `module` is exactly the known class's forward on plain parameters, else what was changed, as text.

    Detected are: another class (a replacement, a subclass, nn.utils.parametrize), and what `altered` detects.
    """
    own = type(module)
    if cls not in FORWARDS:
        return f"{cls.__name__} is no class of nanogpt_fast or PyTorch"
    if own is not cls:
        # nanogpt_fast.swap creates classes that stand for ours; `itself` tells such a class from a subclass of it (vars(class) would,
        # too, but torch.compile cannot trace it).
        if getattr(own, "itself", None) is not own or getattr(own, "stands_for", None) is not cls:
            return f"{own.__name__} replaces {cls.__name__}"
        if (reason := module.changed()) is not None:
            return reason
    return altered(module)


def replaced(*names):
    """None if these functions of torch.nn.functional are PyTorch's, else which one is not, as text."""
    for name in names:
        function = getattr(F, name)
        if function is not FUNCTIONS[name] and (FUNCTIONS[name] is not None or _pytorchs(function) is None):    # None: replaced at import
            return f"torch.nn.functional.{name} was replaced"
    return None


def program():
    """What a program may have replaced on classes and in torch.nn.functional, as it is now."""
    return [vars(cls).get("forward") for cls in FORWARDS], [getattr(F, name) for name in FUNCTIONS]


def altered(module):
    """None if calling `module` is its class's forward, as it was where the class is known, on plain parameters: no `forward` set on the class
    or on the instance, no hook of any kind, no parameter that is a tensor subclass (DTensor, a quantized weight). Else which, as text."""
    own = type(module)
    name = own.__name__
    if own in FORWARDS and own.forward is not FORWARDS[own] and (FORWARDS[own] is not None or _pytorchs(own.forward) is None):
        return f"{name}.forward was replaced"
    if own in _CALLED and (reason := replaced(_CALLED[own])) is not None:
        return reason
    if (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            or _nn_module._has_any_global_hook()):
        return f"{name} has a hook"
    if "forward" in module.__dict__:
        return f"{name}.forward was replaced on the instance"
    for key, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in (nn.Parameter, torch.Tensor):
            return f"{name}.{key} is a {type(parameter).__name__}"
    return None
