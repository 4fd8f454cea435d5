"""The two sides of the drop-in contract, from one seed: our GPT, and a plain model (plain.py) or that of the checkout in NANOGPT_DIR."""
import contextlib
import io

import torch
from plain import upstream

from nanogpt_fast import GPT, GPTConfig

SMALL = dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32)


def ours(seed=0, backend=None, **changes):
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        return GPT(GPTConfig(**{**SMALL, **changes}), backend=backend)


def theirs(seed=0, **changes):
    torch.manual_seed(seed)
    module = upstream()
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(**{**SMALL, **changes}))


def batch(B=3, T=17, V=65, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, T), generator=g), torch.randint(V, (B, T), generator=g)
