"""How an op becomes visible to torch.compile: a raw operator `torch.ops.nanogpt_fast.<name>` with what it computes and a fake.

Defining and implementing it in a Library costs 2.4 us a call; `torch.library.custom_op` with `register_autograd` costs 16. Autograd
lives in the op's autograd.Function instead, which calls the raw operator only while compiling (`torch.compiler.is_compiling()`).
"""
import functools
import sys

import torch

_library = torch.library.Library("nanogpt_fast", "FRAGMENT")
raw = torch.ops.nanogpt_fast

# Inductor of PyTorch 2.11 formats the arguments of each operator that it meets for the first time, for a log message that is off, and
# an argument's text holds that of everything it was computed from, once for each use. With every GPT block it gets five times longer: 16 MB
# and 6 s at the loss behind 4 blocks, so that compiling GPT-2's 12 hangs in `operator_str`. PyTorch 2.13 formats only what it logs.
_INDUCTOR_FORMATS = torch.__version__ < (2, 13)


def define(schema, implementation, fake):
    """Register `schema` ("name(Tensor x, ...) -> Tensor") with its implementation and the fake that makes its empty results."""
    name = schema.split("(")[0]
    _library.define(schema)
    # An exported graph calls the operator with tensors that require grad; what is inside knows no autograd.
    _library.impl(name, torch.no_grad()(implementation), "CompositeExplicitAutograd")
    register_fake(name, fake)


def register_fake(name, fake):
    """Register what makes the empty results of operator `name`. It runs whenever the operator is traced."""
    torch.library.register_fake(f"nanogpt_fast::{name}", _known_to_inductor(name, fake) if _INDUCTOR_FORMATS else fake, lib=_library)


def _known_to_inductor(name, fake):
    """`fake`, which first registers the lowering that Inductor would register itself on meeting the operator: a call of it as it is.

    A fake is the place for it: Inductor traces a graph just before it lowers it, so importing us need not import Inductor (1 s).
    """
    @functools.wraps(fake)
    def traced(*args, **kwargs):
        lowering = sys.modules.get("torch._inductor.lowering")      # None: it isn't Inductor that traces
        operator = getattr(raw, name).default
        if lowering is not None and operator not in lowering.lowerings:
            constraint = lowering.tag_to_layout_constraint(lowering.get_layout_constraint_tag(operator))
            lowering.make_fallback(operator, layout_constraint=constraint)
        return fake(*args, **kwargs)
    return traced
