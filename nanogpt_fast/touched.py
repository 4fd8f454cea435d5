"""Is a module exactly ours? What the fused paths ask before they bypass the call of a module, and what says why they step aside."""
import torch
import torch.nn as nn
from torch.nn.modules import module as _nn_module


def touched(module, cls):
    """None where calling `module` is exactly cls.forward on plain parameters; else what somebody did to it, as text.

    Seen are: another class (a replacement, a subclass, nn.utils.parametrize), a hook of any kind, a `forward` set on the
    instance, a parameter that is a tensor subclass (DTensor, a quantized weight).
    """
    own = type(module)
    if own is not cls:
        # swap makes classes that stand for ours. `itself` tells one from what was built on it; torch.compile can trace no vars(class).
        if getattr(own, "itself", None) is not own or getattr(own, "stands_for", None) is not cls:
            return f"{own.__name__} stands where {cls.__name__} did"
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
