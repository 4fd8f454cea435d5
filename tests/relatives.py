"""Relatives of nanoGPT, written after the attribute names and the calls of karpathy/build-nanogpt, minGPT, ng-video-lecture, and nanoGPT before
PyTorch had a fast tanh GELU."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

C, H, T = 32, 2, 24


def heads(module, x):
    return (t.view(*x.shape[:2], module.n_head, -1).transpose(1, 2) for t in module.c_attn(x).split(module.n_embd, dim=2))


class BuildAttention(nn.Module):
    """build-nanogpt: no dropout anywhere."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_proj.NANOGPT_SCALE_INIT = 1
        self.n_head, self.n_embd = H, C

    def forward(self, x):
        y = F.scaled_dot_product_attention(*heads(self, x), is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(x.shape))


class BuildMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(C, 4 * C), nn.GELU(approximate="tanh"), nn.Linear(4 * C, C)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class BuildBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(C), BuildAttention(), nn.LayerNorm(C), BuildMlp()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class MinAttention(nn.Module):
    """minGPT: dropout modules, the softmax written out, a mask buffer."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.2)
        self.register_buffer("bias", torch.tril(torch.ones(T, T)).view(1, 1, T, T))
        self.n_head, self.n_embd = H, C

    def forward(self, x):
        q, k, v = heads(self, x)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :x.size(1), :x.size(1)] == 0, float("-inf"))
        y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(x.shape)))


class NewGELU(nn.Module):
    def forward(self, x):
        return new_gelu(x)


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class MinBlock(nn.Module):
    """minGPT's MLP is a ModuleDict that a lambda calls."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(C), MinAttention(), nn.LayerNorm(C)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(C, 4 * C), c_proj=nn.Linear(4 * C, C), act=NewGELU(), dropout=nn.Dropout(0.2)))
        m = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class Mlp(nn.Module):
    """An activation of its own: a function, or a module under another name."""

    def __init__(self, function=new_gelu, dropout=0.1, **children):
        super().__init__()
        self.c_fc, self.c_proj, self.dropout = nn.Linear(C, 4 * C), nn.Linear(4 * C, C), nn.Dropout(dropout)
        for name, child in children.items():
            setattr(self, name, child)
        self.function = function

    def forward(self, x):
        act = next((child for name, child in self._modules.items() if name not in ("c_fc", "c_proj", "dropout")), self.function)
        return self.dropout(self.c_proj(act(self.c_fc(x))))


class Head(nn.Module):
    """ng-video-lecture: a module a head."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(C, C // H, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(T, T)))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        k, q = self.key(x), self.query(x)
        w = q @ k.transpose(-2, -1) * k.shape[-1]**-0.5
        w = w.masked_fill(self.tril[:x.size(1), :x.size(1)] == 0, float("-inf"))
        return self.dropout(F.softmax(w, dim=-1)) @ self.value(x)


class MultiHeadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.proj, self.dropout = nn.ModuleList([Head() for _ in range(H)]), nn.Linear(C, C), nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([h(x) for h in self.heads], dim=-1)))


class FeedFoward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C), nn.Dropout(0.1))

    def forward(self, x):
        return self.net(x)


class LectureBlock(nn.Module):
    def __init__(self, ffwd=FeedFoward):
        super().__init__()
        self.sa, self.ffwd, self.ln1, self.ln2 = MultiHeadAttention(), ffwd(), nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


def bare_feed_forward():
    return nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))


class TensorGELU(nn.Module):
    """LLMs-from-scratch: constants made into tensors, under PyTorch's own name."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(torch.sqrt(torch.tensor(2.0 / torch.pi)) * (x + 0.044715 * torch.pow(x, 3))))


TensorGELU.__name__ = "GELU"


class Erf(nn.Module):
    def forward(self, x):
        return F.gelu(x)


class SwiGLUish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def sequential(act, *dropout):
    return nn.Sequential(nn.Linear(C, 4 * C), act, nn.Linear(4 * C, C), *dropout)
