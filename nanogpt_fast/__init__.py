"""nanogpt_fast: nanoGPT on fused kernels, with nanoGPT's own names.

    from nanogpt_fast import GPT, GPTConfig      # instead of: from model import GPT, GPTConfig
    nanogpt_fast.accelerate(model)               # the kernels in a live model; restore(model) takes them out
    nanogpt_fast.explain(model)                  # which implementation each op takes here, and why
    with nanogpt_fast.use("reference"): ...      # plain PyTorch inside
    nanogpt_fast.ops                             # the ops as functions
"""
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors; at run time see __getattr__
    from . import ops
    from .backend import use
    from .checks.explanation import explain
    from .config import GPTConfig
    from .model import GPT, MLP, Block, CausalSelfAttention, LayerNorm
    from .swap import accelerate, restore

__version__ = "0.1.0"
__all__ = ["LayerNorm", "CausalSelfAttention", "MLP", "Block", "GPTConfig", "GPT"]  # what nanoGPT's model.py defines

# The module that defines each public name. No module may itself have one of these names: importing it would hide the name.
_HOME = {**{name: "model" for name in __all__}, "GPTConfig": "config", "use": "backend", "explain": "checks.explanation",
         "accelerate": "swap", "restore": "swap"}


def __getattr__(name):
    """Import a public name on first use, so that `nanogpt-fast --help` need not wait for torch."""
    if name == "ops":
        return import_module(f"{__name__}.ops")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOME, "ops"})
