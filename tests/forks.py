"""A nanoGPT fork to accelerate: tests/checkout/model.py, or the model.py of the checkout that NANOGPT_DIR names; each call a new module.

And what changes one thing of it (`put`).
"""
import contextlib
import copy
import importlib.util
import io
import itertools
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

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


def batch(T=17, B=2):
    g = torch.Generator().manual_seed(5)
    return torch.randint(65, (B, T), generator=g), torch.randint(65, (B, T), generator=g)


def run(model, *args):
    torch.manual_seed(7)
    return model(*args)


def left(report):
    return {row.path: row.reason for row in report.left}


def attend(self, x, causal=True):
    q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).split(self.n_embd, dim=2))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=causal)
    return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def put(name, forward, **attributes):
    """A change of a fork: the class `name` gets another forward, and its instances attributes."""
    def change(module):
        own = getattr(module, name)
        def __init__(self, *args, **kwargs):
            own.__init__(self, *args, **kwargs)
            for key, value in attributes.items():
                setattr(self, key, copy.deepcopy(value))
        setattr(module, name, type(name, (own,), {"__init__": __init__, "forward": forward, "__module__": module.__name__}))
    return change


def may_see_all(self, x):
    return attend(self, x, causal=self.causal)
