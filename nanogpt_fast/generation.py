"""Generation: complete a prompt token by token."""
import torch
import torch.nn.functional as F


def check(idx, max_new_tokens, temperature, top_k):
    """ValueError naming the argument that cannot be."""
    if idx.dim() != 2:
        raise ValueError(f"idx has shape {tuple(idx.shape)}; expected (B, T), one row a prompt")
    if idx.size(1) == 0:
        raise ValueError("the prompt is empty; give at least one token (nanoGPT's habit is a newline)")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive, or 0 for greedy")
    if top_k is not None and top_k <= 0:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for no limit")


def draw(logits, temperature, top_k):
    """One token a row from logits (B, V), with torch's generator, as nanoGPT draws it -> (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, float("-inf"))     # ties with the k-th stay
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


@torch.no_grad()
def generate(model, idx, max_new_tokens, *, temperature=1.0, top_k=None):
    """nanoGPT's loop: the last block_size tokens go through the whole model for every new one."""
    check(idx, max_new_tokens, temperature, top_k)
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.config.block_size:])
        idx = torch.cat((idx, draw(logits[:, -1, :], temperature, top_k)), dim=1)
    return idx
