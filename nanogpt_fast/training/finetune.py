"""Fine-tune part of a model: freeze and unfreeze parameters by name.

    freeze(model)                                     everything
    unfreeze(model, "transformer.h.11", "*.ln_f.*")   the last block and the last norm learn again

A pattern is a parameter's name, the name of a module that contains it, or a shell pattern (fnmatch) for either. The names are
those of `model.named_parameters()`. This works on any nn.Module.

Freeze before building the optimizer (`configure_optimizers` leaves frozen parameters out); a parameter that is unfrozen later
must be added to it with `optimizer.add_param_group`. Frozen parameters need no gradient and no optimizer state, and layers below
the lowest trainable parameter need no backward pass.
"""
import difflib
from fnmatch import fnmatchcase


def freeze(module, *patterns):
    """Make the matching parameters (without patterns, all) constant; returns the names of those that were trainable.

    Their gradients are dropped, since an optimizer uses whatever is in `.grad`, whether or not the parameter requires a gradient.
    A parameter with two names (a tied head) is frozen under both, and both are returned. Raises ValueError for a pattern that
    matches nothing.
    """
    return _set(module, patterns, False)


def unfreeze(module, *patterns):
    """Make the matching parameters (without patterns, all) trainable; returns the names of those that were frozen. See `freeze`."""
    return _set(module, patterns, True)


def _set(module, patterns, learns):
    names = dict(module.named_parameters(remove_duplicate=False))
    chosen = set()
    for pattern in patterns or ("*",):
        matching = [p for name, p in names.items() if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not matching:
            near = difflib.get_close_matches(pattern, [*names, *(name for name, _ in module.named_modules())], n=3, cutoff=0)
            raise ValueError(f"{pattern!r} matches no parameter of this {type(module).__name__}; similar names: {', '.join(near)}")
        chosen.update(p for p in matching if p.requires_grad != learns)
    for p in chosen:
        p.requires_grad_(learns)
        if not learns:
            p.grad = None
    return [name for name, p in names.items() if p in chosen]
