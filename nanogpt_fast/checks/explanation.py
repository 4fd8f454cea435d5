"""explain(model): which implementation each op of a model takes here, and why not a faster one."""
from typing import NamedTuple

import torch

from .. import backend, tables
from ..kernels import fastest
from ..model import GPT, Block

SMALL = 8       # tokens of the forward that asks the ops


class Row(NamedTuple):
    op: str
    implementation: str  # "triton", "cudnn", "cublas", "cpp", "reference", or "error" where backend='fused' would raise
    reason: str          # why no faster one runs, or what was measured; empty if there is nothing to say


class Explanation(list):
    """A list of rows; prints as a table, in a notebook as one of Markdown."""

    def __str__(self):
        return tables.table(None, self, align="l")

    def _repr_markdown_(self):
        return tables.table(("op", "runs as", "why"), self, "markdown", "l")


def explain(model, *, dtype=None, tokens=None, batch_size=1, return_logits=True):
    """Which implementation each op of `model` (a GPT, possibly compiled or wrapped in DDP) would take for a training step on its device.

    dtype: the autocast dtype, or None without autocast. batch_size sequences of `tokens` tokens (None: the model's block_size) are what the
    step trains on. return_logits=False: as our trainer calls the model. Runs one small forward on the reference path and launches no kernel;
    the random state and the train/eval mode do not change. Returns an Explanation, a list of Row(op, implementation, reason).
    """
    gpt = next((module for module in model.modules() if isinstance(module, GPT)), None)
    if gpt is None:
        raise TypeError(f"explain takes a model that is or contains a nanogpt_fast.GPT; this is a "
                        f"{type(model).__module__}.{type(model).__qualname__}. What accelerate(model) returns says it of other models")
    device = next(gpt.parameters()).device
    tokens = gpt.config.block_size if tokens is None else tokens
    idx = torch.zeros(1, min(tokens, SMALL), dtype=torch.long, device=device)
    devices = [device] if device.type == "cuda" else []
    autocast = torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype not in (None, torch.float32))
    backend.load_local()        # what was measured, before a table is made of it
    with torch.random.fork_rng(devices), backend.recording() as record, autocast, fastest.as_if(batch_size * tokens, tokens):
        gpt(idx, idx, **({} if return_logits else dict(return_logits=False)))  # a subclass may take only nanoGPT's two arguments

    rows = {}
    for op, wanted, name, reasons in record:
        by_name = wanted not in backend.CHOICES
        if name == "reference" and (by_name or wanted == "fused" and op not in backend.LIBRARY_OPS):
            name = "error"
        if not reasons and device.type == "cuda" and name not in ("reference", "error"):
            reasons = ["not measured on this card (`nanogpt-fast tune` does)"]
        if name == "triton" and backend.interpreted() and device.type == "cpu":
            reasons = ["runs in Triton's interpreter, which checks the kernel but is slow"]
        rows[op, name] = Row(op, name, "; ".join(reasons))
    explanation = Explanation(sorted(rows.values(), key=lambda row: backend.OPS.index(row.op)))
    for i, block in enumerate(gpt.transformer.h):
        why_not = block.why_not_fused() if isinstance(block, Block) else f"it is a {type(block).__name__}"
        if why_not is not None:
            explanation.append(Row(f"block {i}", "unfused", f"{why_not}; its own forward is called"))
    return explanation
