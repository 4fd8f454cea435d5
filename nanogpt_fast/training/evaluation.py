"""Evaluating a model during training: its loss on both splits, and a text sample. Neither changes the run."""
import contextlib
import math

import torch

from ..devices import Ranks


@torch.no_grad()
def estimate_loss(network, batches, o, context, ranks, stop, tell=lambda done, count: None):
    """{"train", "val"}: the mean loss over eval_iters batches of each split, or None if a signal interrupts it.

    tell: called after each batch with the number of those done and of all.

    The batches are the same at every evaluation, so that only the model changes in between. The ranks divide them among themselves.
    """
    network.eval()
    losses = {}
    count = math.ceil(o.eval_iters / ranks.size)
    for n, split in enumerate(("train", "val")):
        total = 0.0
        seed = o.seed + 1_000_003 * (1 + ranks.rank)  # far from every rank's training seed
        with contextlib.closing(batches(split, torch.Generator().manual_seed(seed))) as source:
            for i in range(count):
                if stop.signal is not None and ranks.size == 1:  # with more ranks, all must take part in `mean`
                    network.train()
                    return None
                x, y = source.next()
                source.prefetch()
                with context:
                    total = total + network(x, y, return_logits=False)[1].float()
                tell(n * count + i + 1, 2 * count)
        losses[split] = ranks.mean(total / count).item()
    network.train()
    return losses


def sample_text(model, tokenizer, o, device, context, ranks=Ranks()):
    """The model's continuation of a line break, as text; None if there is no tokenizer or no sample is wanted.

    With --shard every rank calls this, and the first one's tokenizer counts; else only the first calls it. The seed is always the same, and
    the generator is private, so that sampling does not change the run.
    """
    prompt = None if tokenizer is None or o.sample_tokens == 0 else _prompt(tokenizer)
    if o.shard:
        prompt = ranks.gather(prompt)[0]
    if prompt is None:
        return None
    generator = torch.Generator(device).manual_seed(o.seed)
    model.eval()
    try:
        with context:
            ids = model.generate(torch.tensor([prompt], device=device), o.sample_tokens, temperature=0.8, top_k=200, generator=generator,
                                 use_cache=not o.shard)
    finally:
        model.train()
    if not ranks.is_master:
        return None
    drawn = ids[0, len(prompt):].tolist()
    return tokenizer.decode([i for i in drawn if i < tokenizer.vocab_size])  # ids that only pad the vocabulary have no text


def _prompt(tokenizer):
    try:
        return tokenizer.encode("\n")
    except ValueError:  # a vocabulary without line breaks
        return [0]
