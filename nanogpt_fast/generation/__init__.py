"""Generation: complete prompts token by token, with a static KV cache.

Two ways lead to the next token's logits:

    cached     prefill sends the prompt through the model once and keeps every layer's keys and values; decode then sends one
               token a row. On CUDA a step of decode and draw is captured in one CUDA graph and replayed: the host looks at a
               token only when it is asked for one. So is the prefill of short prompts, padded to a few widths.
    uncached   nanoGPT's loop: the last block_size tokens go through the whole model for every new one. It is taken where the
               cache would not be right (a hook, a subclass, a replaced submodule, dropout in train mode), which is said once.

Past block_size positions restart at 0 in the cropped window, so every cached key is stale: from there on the window is encoded
anew at every step, as nanoGPT does.

The state of a model that is being generated from (`Session`) lives outside the model: pickling and copying a model never meet
a CUDA graph. It is checked against the model at every call: nothing in it outlives an optimizer step, a load or a move.

    run.py        a call of `generate`: prompts, rows, stops, streaming
    session.py    weights, cache and graphs, kept from call to call
"""
from .run import Run, check, draw, generate
from .session import Session, _sessions, prefill_width, session_of

__all__ = ["Run", "Session", "_sessions", "check", "draw", "generate", "prefill_width", "session_of"]
