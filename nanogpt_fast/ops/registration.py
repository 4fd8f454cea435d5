"""Make ops visible to torch.compile: each gets a raw operator `torch.ops.nanogpt_fast.<name>`, its implementation and a fake.

An operator defined and implemented in a Library costs 2.4 us per call; `torch.library.custom_op` with `register_autograd` costs 16.
Autograd therefore lives in the op's autograd.Function, which calls the raw operator only while compiling
(`torch.compiler.is_compiling()`).
"""
import functools
import sys

import torch

_library = torch.library.Library("nanogpt_fast", "FRAGMENT")
raw = torch.ops.nanogpt_fast
implementations = {}        # {name: function}: what an operator launches, for tools that trace it

# When Inductor of PyTorch 2.11 meets an operator for the first time, it formats the arguments for a log message even if logging is off.
# An argument's text includes the text of everything it was computed from, once per use, so it grows fivefold with every GPT block: 16 MB
# and 6 s at the loss after 4 blocks; compiling GPT-2's 12 blocks hangs in `operator_str`. PyTorch 2.13 formats only what it logs.
_INDUCTOR_FORMATS = torch.__version__ < (2, 13)


def define(schema, implementation, fake):
    """Register `schema` ("name(Tensor x, ...) -> Tensor") with its implementation and the fake that allocates its empty outputs."""
    name = schema.split("(")[0]
    implementations[name] = implementation
    _library.define(schema)
    # An exported graph calls the operator with tensors that require grad; the implementation does not support autograd.
    _library.impl(name, torch.no_grad()(implementation), "CompositeExplicitAutograd")
    register_fake(name, fake)


def register_fake(name, fake):
    """Register the function that allocates the empty outputs of operator `name`. It runs whenever the operator is traced."""
    torch.library.register_fake(f"nanogpt_fast::{name}", _known_to_inductor(name, fake) if _INDUCTOR_FORMATS else fake, lib=_library)


def _known_to_inductor(name, fake):
    """Wrap `fake` so that it first registers the fallback lowering (a plain call) that Inductor would otherwise register itself.

    Doing this in the fake, which runs just before Inductor lowers a graph, spares importing Inductor (1 s) with this package.
    """
    @functools.wraps(fake)
    def traced(*args, **kwargs):
        lowering = sys.modules.get("torch._inductor.lowering")      # None: someone other than Inductor is tracing
        operator = getattr(raw, name).default
        if lowering is not None and operator not in lowering.lowerings:
            constraint = lowering.tag_to_layout_constraint(lowering.get_layout_constraint_tag(operator))
            lowering.make_fallback(operator, layout_constraint=constraint)
        return fake(*args, **kwargs)
    return traced
