"""The ops in plain PyTorch: the oracle against which every kernel is checked, and the path that runs without kernels.

Each function makes exactly the PyTorch calls that nanoGPT makes, in the same order, so that on a CPU the whole model equals
nanoGPT bit for bit. With float64 inputs the same functions are the tests' oracle.

B batch, T sequence, C = n_embd width, H = n_head heads, D = C / H head size, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")


def layer_norm(x, weight, bias, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension. x (..., C); weight (C,); bias (C,) or None."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x, branch, weight, bias, *, eps=1e-5, dropout_p=0.0):
    """x <- x + dropout(branch); returns (x, layer_norm(x)). branch (..., C) or None (then x is returned unchanged)."""
    if branch is not None:
        x = x + (F.dropout(branch, dropout_p) if dropout_p > 0 else branch)
    return x, layer_norm(x, weight, bias, eps)


def causal_attention(q, k, v, *, dropout_p=0.0, scale=None):
    """softmax(q k^T * scale, causal) v. q (B, H, Tq, D); k, v (B, H, Tk, D), Tq <= Tk -> (B, H, Tq, D).

    With Tq < Tk the queries are the last Tq positions: query i sees keys 0 .. Tk - Tq + i.
    """
    Tq, Tk = q.size(-2), k.size(-2)
    if Tq == Tk:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale)
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)


def causal_attention_manual(q, k, v, *, dropout_p=0.0, scale=None, dropout=None):
    """The same, with the (Tq, Tk) attention weights materialised, as nanoGPT does when `attn.flash` is False. dropout: a module that is
    called in place of dropout with probability dropout_p."""
    Tq, Tk = q.size(-2), k.size(-2)
    scale = 1.0 / math.sqrt(k.size(-1)) if scale is None else scale
    att = (q @ k.transpose(-2, -1)) * scale                                             # (B, H, Tq, Tk)
    hidden = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq).logical_not()
    att = F.softmax(att.masked_fill(hidden, float("-inf")), dim=-1)
    if dropout is not None:
        att = dropout(att)
    elif dropout_p > 0:
        att = F.dropout(att, dropout_p)
    return att @ v                                                                      # (B, H, Tq, D)


def split_heads(qkv, n_head):
    """The packed projection (B, T, 3C), rows q, k, v, as three strided views (B, H, T, D)."""
    B, T, C3 = qkv.shape
    C = C3 // 3
    return tuple(part.view(B, T, n_head, C // n_head).transpose(1, 2) for part in qkv.split(C, dim=2))


def causal_attention_qkvpacked(qkv, n_head, *, dropout_p=0.0, scale=None, attend=causal_attention):
    """Causal attention on the packed projection qkv (B, T, 3C) -> (B, T, C)."""
    B, T, C3 = qkv.shape
    q, k, v = split_heads(qkv, n_head)
    y = attend(q, k, v, dropout_p=dropout_p, scale=scale)
    return y.transpose(1, 2).contiguous().view(B, T, C3 // 3)                           # heads side by side


def activation(x, name="gelu"):
    """"gelu" x * Phi(x) by erf; "gelu_tanh" its tanh approximation (OpenAI's GPT-2 weights); "relu"."""
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, *, activation_name="gelu", dropout_p=0.0):
    """dropout(act(x w_fc^T + b_fc) w_proj^T + b_proj). x (..., C); w_fc (4C, C); w_proj (C, 4C); biases or None."""
    h = activation(F.linear(x, w_fc, b_fc), activation_name)
    y = F.linear(h, w_proj, b_proj)
    return F.dropout(y, dropout_p) if dropout_p > 0 else y


def linear_cross_entropy(x, weight, targets, *, ignore_index=-1, reduction="mean"):
    """(loss, logits) of logits = x weight^T. x (..., C); weight (V, C); targets (...) int64; logits (..., V)."""
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=ignore_index, reduction=reduction)
    return loss, logits
