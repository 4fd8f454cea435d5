"""A nanoGPT fork to accelerate: tests/checkout/model.py, or the model.py of the checkout that NANOGPT_DIR names; each call a new module."""
import contextlib
import importlib.util
import io
import itertools
import os
import sys
from pathlib import Path

import torch

CHECKOUT = Path(os.environ.get("NANOGPT_DIR") or Path(__file__).parent / "checkout")
SMALL = dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
_numbers = itertools.count()


def module():
    """A freshly executed model.py, so that a test may change its classes."""
    spec = importlib.util.spec_from_file_location(f"fork_{next(_numbers)}", CHECKOUT / "model.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # pickle looks classes up there
    spec.loader.exec_module(found)
    return found


def fork(seed=0, change=lambda module: None, **changes):
    """A small model of it; `change` may replace classes of its module before the model is built."""
    found = module()
    change(found)
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        return found.GPT(found.GPTConfig(**{**SMALL, **changes}))
