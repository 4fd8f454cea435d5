"""Small GPTs to test with, made without a word on standard output. Both halves of the suite import this."""
import contextlib
import io

import torch

from nanogpt_fast import GPT, GPTConfig


def small(seed=0, backend=None, **changes):
    """A GPT of 2 layers with 2 heads, 32 wide; `changes` are of its config."""
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        return GPT(GPTConfig(**{**dict(block_size=24, vocab_size=65, n_layer=2, n_head=2, n_embd=32), **changes}), backend=backend)


def sharpened(seed=0, **changes):
    """The same to generate with: at initialisation every next token is about equally likely, here some are far likelier."""
    model = small(seed, **changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    return model


ERROR = 1e-4  # of a logit between the cached and the uncached path, fp32, these weights: 2e-5 measured


def prompts_of(*lengths, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(65, (n,), generator=g) for n in lengths]


@torch.no_grad()
def scores(model, tokens):
    return model(tokens[None, -model.config.block_size:])[0][0, -1]


def same_tokens(model, a, b, prompt_length):
    """a, b: 1-D token tensors. Equal, or they part where the two chosen scores (greedy), computed without the cache, are tied within the
    measured error of the logits: one-row and many-row matmuls round differently."""
    if torch.equal(a, b):
        return True
    at = int((a != b).nonzero()[0])
    assert at >= prompt_length
    logits = scores(model, a[:at])
    return abs(logits[a[at]] - logits[b[at]]).item() < ERROR


class Recorder:
    """Stands where graphs.Recorder does: notes what it is asked for; what it recorded is called at every replay."""

    def __init__(self, device=None):
        self.log = []

    def run(self, part):
        self.log.append("run " + part.__name__)
        part()

    def record(self, part):
        self.log.append("record " + part.__name__)
        def replay():
            self.log.append("replay " + part.__name__)
            part()
        return replay
