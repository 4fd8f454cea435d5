"""Generation: complete prompts token by token, with a static KV cache.

The next token's logits are computed in one of two ways:

    cached     prefill sends the prompt through the model once and keeps every layer's keys and values; decode then sends one
               token per row. On CUDA a step of decode and draw is captured in one CUDA graph and replayed; the host reads a token
               only when the caller asks for it. The prefill of short prompts, padded to a few widths, is captured, too.
    uncached   nanoGPT's loop: the last block_size tokens go through the whole model for every new one. It runs where the cache
               would give wrong results (a hook, a subclass, a replaced submodule, dropout in train mode), with one warning.

Beyond block_size tokens, positions restart at 0 in the cropped window and every cached key is stale: from there on the window is
re-encoded at every step, as in nanoGPT.

The generation state of a model (`Session`) lives outside the model, so that pickling and copying a model never involve a CUDA
graph. It is validated against the model at every call and every step, so that it is never stale after an optimizer step, a load or a
move. One call at a time uses it: several threads may call `generate` on one model, and streams may be read in turns.

    run.py        a call of `generate`: prompts, rows, stops, streaming
    session.py    weights, cache and graphs, kept between calls
    decode.py     the fused kernels of one decoding step
"""
from .run import Run, check, draw, generate
from .session import Session, _idle, give_back, prefill_width, session_of

__all__ = ["Run", "Session", "_idle", "check", "draw", "generate", "give_back", "prefill_width", "session_of"]
