"""Is a module exactly ours? The fused paths check this before they bypass a module's call, and report the reason if they cannot."""
import torch
import torch.nn as nn
from torch.nn.modules import module as _nn_module


def touched(module, cls):
    """None if calling `module` is exactly cls.forward on plain parameters, else what was changed, as text.

    Detected are: another class (a replacement, a subclass, nn.utils.parametrize), a hook of any kind, a `forward` set on the
    instance, a parameter that is a tensor subclass (DTensor, a quantized weight).
    """
    own = type(module)
    if own is not cls:
        # nanogpt_fast.swap creates classes that stand for ours; `itself` tells such a class from a subclass of it (vars(class) would,
        # too, but torch.compile cannot trace it).
        if getattr(own, "itself", None) is not own or getattr(own, "stands_for", None) is not cls:
            return f"{own.__name__} replaces {cls.__name__}"
        if (reason := module.changed()) is not None:
            return reason
    if (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            or _nn_module._has_any_global_hook()):
        return f"{cls.__name__} has a hook"
    if "forward" in module.__dict__:
        return f"{cls.__name__}.forward was replaced on the instance"
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in (nn.Parameter, torch.Tensor):
            return f"{cls.__name__}.{name} is a {type(parameter).__name__}"
    return None
