"""The GPT: nanoGPT's classes, names, initialisation and numbers, on the ops of `nanogpt_fast.ops`.

Read it beside nanoGPT's model.py. The difference: attention, LayerNorm, the MLP and the loss each call an op, which runs a fused
kernel if one can run and otherwise exactly nanoGPT's PyTorch calls (`backend.py` decides which, and reports why).

A kernel also fuses the residual add, its dropout and the LayerNorm that follows them. A block then passes on the residual stream
and the branch still to be added to it (`Block.fused`) instead of their sum. This path bypasses the calls of a few submodules, so each
block takes it only if `why_not_fused` finds them untouched: with a hook, a subclass, a replaced or parametrized submodule, or a forward that
was set on a class, the block runs the ordinary two lines of `Block.forward`.

B batch, T sequence, C = n_embd, H = n_head, D = C / H head size, V = vocab_size.
"""
import functools
import inspect
import math

import torch
import torch.nn as nn

from . import apart, backend as _backend, devices, reference
from .config import ACTIVATIONS, GPTConfig, whole
from .ops import attention, cross_entropy, linear, mlp, norm
from .ops.common import dropout_seeds
from .touched import FORWARDS, altered, known, replaced, touched


@known
class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, eps 1e-5."""

    backend = None  # the model's parsed choice; None: no preference

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input):
        return norm.layer_norm(input, self.weight, self.bias, backend=self.backend)


@known
class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with one packed projection: c_attn's rows are q, k, v."""

    backend = None
    copies = None   # ((c_attn.weight, c_proj.weight), (copy, copy)) while the trainer keeps copies (training/half_weights.py)

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise ValueError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}; every head has n_embd / n_head channels")
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout  # of the attention weights; may be changed later
        self.flash = True              # False: materialise the (T, T) weights, as in nanoGPT's slow path

    def branch(self, x, seed=None):
        """The attention without its residual dropout: x (B, T, C) -> (B, T, C). seed: of the weights' dropout, for the kernels."""
        copies = _copies_of(self, self.c_attn, self.c_proj)
        qkv = self.c_attn(x) if copies is None else _linear(x, self.c_attn, copies[0], self.backend)        # (B, T, 3C)
        if self.flash:
            p = self.dropout if self.training else 0.0
            y = attention.causal_attention_qkvpacked(qkv, self.n_head, dropout_p=p, seed=seed, backend=self.backend)
        else:
            y = reference.causal_attention_qkvpacked(qkv, self.n_head,
                                                     attend=functools.partial(reference.causal_attention_manual, dropout=self.attn_dropout))
        return self.c_proj(y) if copies is None else _linear(y, self.c_proj, copies[1], self.backend)       # (B, T, C)

    def forward(self, x):
        return self.resid_dropout(self.branch(x))


@known
class MLP(nn.Module):
    """Linear to 4C, GELU, Linear back to C, dropout."""

    backend = None
    # True: the fused op recomputes GELU in its backward, and a block keeps 28C bytes per token instead of 36C: for GPT-2 124M and
    # 64 x 1024 tokens, 4.8 GB less of 24, at the cost of writing 4.8 GB more (the time is not measured yet).
    recompute = False
    copies = None   # ((c_fc.weight, c_proj.weight), (copy, copy)) while the trainer keeps copies (training/half_weights.py)

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if getattr(config, "activation", "gelu") == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def branch(self, x):
        """The MLP without its dropout: x (B, T, C) -> (B, T, C)."""
        reason = touched(self.c_fc, nn.Linear) or touched(self.c_proj, nn.Linear) or touched(self.gelu, nn.GELU)
        if reason is not None:
            _backend.notice_unfused(f"an MLP calls its own modules instead of the fused op: {reason}")
            return self.c_proj(self.gelu(self.c_fc(x)))
        return mlp.gelu_mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias,
                            activation="gelu_tanh" if self.gelu.approximate == "tanh" else "gelu",
                            recompute=self.recompute, backend=self.backend,
                            copies=_copies_of(self, self.c_fc, self.c_proj))

    def forward(self, x):
        return self.dropout(self.branch(x))


@known
class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x

    def fused(self, x, branch, p, seeds=(None, None, None)):
        """The same block with each residual add fused into the LayerNorm that follows it.

        x (B, T, C) is the residual stream; branch (B, T, C) or None must still be added to it, after dropout with probability p.
        seeds: of the three dropouts in here, in order; None: drawn where needed. Returns (x, branch, p) for the next block.
        """
        x, h = norm.add_layer_norm(x, branch, self.ln_1.weight, self.ln_1.bias, dropout_p=p, seed=seeds[0],
                                   backend=self.ln_1.backend)
        x, h = norm.add_layer_norm(x, self.attn.branch(h, seeds[1]), self.ln_2.weight, self.ln_2.bias,
                                   dropout_p=drop_rate(self.attn.resid_dropout), seed=seeds[2], backend=self.ln_2.backend)
        return x, self.mlp.branch(h), drop_rate(self.mlp.dropout)

    def drops(self):
        """Whether one of the three dropouts of `fused` drops now, as far as the block can tell: seeds for nothing do no harm."""
        return bool(drop_rate(self.attn.resid_dropout) or drop_rate(self.mlp.dropout) or self.attn.training and getattr(self.attn, "dropout", 0.0))

    def why_not_fused(self):
        """None if `fused` computes what calling this block would, else the reason why not."""
        return (touched(self, Block) or touched(self.ln_1, LayerNorm) or touched(self.ln_2, LayerNorm)
                or touched(self.attn, CausalSelfAttention) or touched(self.attn.resid_dropout, nn.Dropout)
                or touched(self.mlp, MLP) or touched(self.mlp.dropout, nn.Dropout))


def _copies_of(module, *linears):
    """The trainer's copies of the weights of these Linears of `module`; None if there are none, or if a Linear was touched since."""
    if module.copies is None:
        return None
    weights, copies = module.copies
    same = all(touched(linear, nn.Linear) is None and linear.weight is weight for linear, weight in zip(linears, weights))
    return copies if same else None


def _linear(x, module, copy, choices):
    return linear.linear(x, module.weight, module.bias, copy=copy, backend=choices)


def drop_rate(dropout):
    """The probability with which an nn.Dropout drops now, after any later change of .p or of the train/eval mode."""
    return dropout.p if dropout.training else 0.0


@known
class GPT(nn.Module):
    """nanoGPT's GPT. backend: "auto" (default), "fused", "reference", or e.g. "auto,attention=reference"; see backend.py."""

    copies = None   # ((lm_head.weight,), (copy,)) while the trainer keeps copies (training/half_weights.py)
    _lookup = None   # called instead of wte and wpe while the trainer keeps wte's gradient as rows (training/embedding.py)

    def __init__(self, config, backend=None):
        super().__init__()
        check_config(config)
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # weight tying: one Parameter under two names (https://arxiv.org/abs/1608.05859)

        # These draws are in nanoGPT's order: the same seed gives the same weights, and the same random state afterwards.
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 n_layer branches are added to the residual stream: keep its variance (GPT-2)
                torch.nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

        self.set_backend(backend)
        print("number of parameters: %.2fM" % (self.get_num_params() / 1e6,))

    def set_backend(self, spec):
        """Choose implementations for this model: see `backend.parse`. None: use the environment variable, else auto."""
        choices = _backend.parse(spec)
        for module in self.modules():
            if isinstance(module, (GPT, LayerNorm, CausalSelfAttention, MLP)):
                module.backend = choices

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        head, wte = (state_dict.get(prefix + name) for name in ("lm_head.weight", "transformer.wte.weight"))
        tied = getattr(self.lm_head, "weight", None) is getattr(self.transformer.wte, "weight", self)    # both may have been replaced
        if tied and not (head is None or wte is None or same_matrix(head, wte)):
            error_msgs.append("lm_head.weight and transformer.wte.weight differ, and this GPT has one matrix for both: one would be lost. "
                              "nanogpt_fast.checkpoints.nanogpt.load_model loads such a checkpoint with a head of its own.")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def forward(self, idx, targets=None, return_logits=True):
        """idx (B, T) int64 token ids; targets (B, T) int64, -1 where a position has none.

        Returns (logits, loss): with targets, (B, T, V) and the mean cross-entropy, 0-d; without, (B, 1, V) for the last position
        and None. return_logits=False: with targets, logits are None, and a fused loss then never materialises them.
        Raises ValueError if T > block_size, IndexError (on a CPU) for a token id or target outside the vocabulary.
        """
        return self._logits_and_loss(self._hidden(idx), targets, return_logits)

    def _hidden(self, idx):
        """The rows that the vocabulary head reads: idx (B, T) -> (B, T, C)."""
        b, t = idx.size()
        if t > self.config.block_size:
            raise ValueError(f"Cannot forward sequence of length {t}, block size is only {self.config.block_size}")
        return self._final_norm(self._blocks(self._embed(idx)))

    def _logits_and_loss(self, x, targets=None, return_logits=True):
        """What `forward` returns, of `_hidden`'s rows x (B, T, C)."""
        if targets is None:  # only the last position predicts anything new; the list keeps the T dimension
            return self.lm_head(x[:, [-1], :]), None
        reason = self._why_not_fused_loss()
        if reason is not None:
            _backend.notice_unfused(f"the vocabulary head's own module is called instead of the fused loss: {reason}")
            logits = self.lm_head(x)                                                # (B, T, V)
            loss = nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
            return logits if return_logits else None, loss
        copies = _copies_of(self, self.lm_head)
        loss, logits = cross_entropy.linear_cross_entropy(x, self.lm_head.weight, targets, ignore_index=-1,
                                                          return_logits=return_logits, backend=self.backend,
                                                          copy=None if copies is None else copies[0])
        return logits, loss

    __call__ = apart.call

    def _why_not_fused_loss(self):
        return touched(self.lm_head, nn.Linear) or (None if self.lm_head.bias is None else "lm_head has a bias")

    def _why_not_apart(self, idx, targets):
        """None if this call of the model is `_logits_and_loss` of `_hidden`, and a kernel computes the loss (apart.py); else the reason."""
        reason = touched(self, GPT) or self._why_not_fused_loss()
        if reason is not None:
            return reason
        if self._compiled_call_impl is not None:
            return "the model compiles itself (`Module.compile`)"
        weight = self.lm_head.weight
        name = cross_entropy.implementation(weight, weight, targets, backend=self.backend)
        return "PyTorch computes the loss" if name == "reference" else None

    def _computes_gpt(self):
        """Whether this model's forward is GPT's as it stands above: a subclass may keep it."""
        return type(self).forward is FORWARDS.get(GPT)

    def _embed(self, idx, start=0):
        """Token plus position embeddings with dropout: idx (B, T) at positions start .. start + T - 1 -> (B, T, C)."""
        try:
            if self._lookup is not None:
                return self.transformer.drop(self._lookup(idx, start))
            tok_emb = self.transformer.wte(idx)                                                     # (B, T, C)
        except IndexError:
            self.check_ids(idx)
            raise
        pos = torch.arange(start, start + idx.size(1), dtype=torch.long, device=idx.device)
        return self.transformer.drop(tok_emb + self.transformer.wpe(pos))

    def check_ids(self, idx):
        """Raise IndexError if a token id lies outside the vocabulary. Waits for the device. A model that embeds in a way of its own (a
        `forward` of its own, a replaced or hooked wte) says itself which ids it takes."""
        wte = self.transformer.wte
        if not self._computes_gpt() or touched(wte, nn.Embedding) is not None:
            return
        lowest, highest = torch.stack(idx.aminmax()).tolist()
        if lowest < 0 or highest >= len(wte.weight):
            raise IndexError(f"token ids must lie in 0..{len(wte.weight) - 1} (vocab_size {len(wte.weight)}); "
                             f"these run from {lowest} to {highest}")

    def _blocks(self, x):
        """All blocks: (B, T, C) -> (residual, branch still to be added or None, its dropout probability)."""
        branch, p, seeds = None, 0.0, None
        for i, block in enumerate(self.transformer.h):
            name = self._fused_by(block, x)
            if name is None:
                x, branch, p = block(add_branch(x, branch, p)), None, 0.0
                continue
            if name == "triton" and seeds is None and block.drops():
                seeds = dropout_seeds(x, 3 * len(self.transformer.h))
            x, branch, p = block.fused(x, branch, p, (None,) * 3 if seeds is None else seeds[3 * i:3 * i + 3])
        return x, branch, p

    def _fused_by(self, block, x):
        """The implementation of LayerNorm into which a block's residual adds are fused; None if none can, or if something is touched."""
        if _backend.choice("layer_norm", self.backend) == "reference":
            return None
        reason = block.why_not_fused() if isinstance(block, Block) else f"{type(block).__name__} replaces Block"
        if reason is not None:
            _backend.notice_unfused(f"a block runs unfused: {reason}")
            return None
        name = norm.implementation(x, block.ln_1.weight, block.ln_1.bias, backend=block.ln_1.backend)
        return None if name == "reference" else name

    def _final_norm(self, residual):
        x, branch, p = residual
        ln_f = self.transformer.ln_f
        if branch is None or touched(ln_f, LayerNorm) is not None:
            return ln_f(add_branch(x, branch, p))
        return norm.add_layer_norm(x, branch, ln_f.weight, ln_f.bias, dropout_p=p, last=True, backend=ln_f.backend)[1]

    def get_num_params(self, non_embedding=True):
        """Number of parameters. non_embedding excludes the position embedding; the token embedding counts, since it is the head's weight."""
        n_params = sum(p.numel() for p in self.parameters())
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    def crop_block_size(self, block_size):
        """Shorten the context to the first `block_size` positions, in place."""
        block_size = whole("block_size", block_size, 1)
        if block_size > self.config.block_size:
            raise ValueError(f"crop_block_size({block_size}): the context can only shrink, to between 1 and {self.config.block_size}")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])

    @classmethod
    def from_pretrained(cls, model_type, override_args=None, *, activation=None, backend=None):
        """GPT-2's weights: `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, or a folder written by transformers' save_pretrained.

        override_args: only {"dropout": p}. activation: "gelu" (erf) or "gelu_tanh"; None means nanoGPT's erf for the four names
        (OpenAI trained them with tanh, which is slightly more accurate), and the config.json's choice for a folder.
        """
        from .checkpoints.huggingface import load_gpt2
        config, state_dict = load_gpt2(model_type, override_args or {}, activation)
        model = cls(config, backend=backend)
        model.load_state_dict(state_dict)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which transformers' GPT2LMHeadModel and `GPT.from_pretrained` read. Exact."""
        from .checkpoints.huggingface import write_folder
        write_folder(self, folder)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW in two groups: tensors of two or more dimensions decay, biases and LayerNorm weights do not."""
        trained = [p for p in self.parameters() if p.requires_grad]
        decay = [p for p in trained if p.dim() >= 2]
        nodecay = [p for p in trained if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": nodecay, "weight_decay": 0.0}]
        print(f"num decayed parameter tensors: {len(decay)}, with {sum(p.numel() for p in decay):,} parameters")
        print(f"num non-decayed parameter tensors: {len(nodecay)}, with {sum(p.numel() for p in nodecay):,} parameters")
        # The fused step is one loop over all tensors instead of several kernels for each; GPT-2 124M has 148 tensors.
        fused = "fused" in inspect.signature(torch.optim.AdamW).parameters and device_type in ("cuda", "cpu")
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, **(dict(fused=True) if fused else {}))
        print(f"using fused AdamW: {fused}")
        return optimizer

    def flops_per_token(self, block_size=None):
        """Multiply-adds of one token's forward and backward, times two (PaLM, appendix B): 6 N + 12 L H D T."""
        cfg = self.config
        T = cfg.block_size if block_size is None else block_size
        return 6 * self.get_num_params() + 12 * cfg.n_layer * cfg.n_head * (cfg.n_embd // cfg.n_head) * T

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Model FLOPs utilisation relative to an A100's bf16 peak (312 TFLOP/s), as nanoGPT reports it, on any machine.

        fwdbwd_per_iter: sequences per iteration; dt: seconds per iteration.
        """
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter * (1.0 / dt) / 312e12

    def estimate_hardware_mfu(self, fwdbwd_per_iter, dt, device=None):
        """The same relative to the peak of the actual GPU, or None if that is unknown."""
        device = next(self.parameters()).device if device is None else torch.device(device)
        peak = devices.peak_flops(device)
        return None if peak is None else self.estimate_mfu(fwdbwd_per_iter, dt) * 312e12 / peak

    def why_not_cached(self):
        """None if generation with a key-value cache computes what calling this model would, else the reason why not."""
        if not self._computes_gpt() or altered(self) is not None:
            return touched(self, GPT)
        t = self.transformer
        reason = replaced("scaled_dot_product_attention", "layer_norm") or touched(t.wte, nn.Embedding) or touched(t.wpe, nn.Embedding) \
            or touched(t.drop, nn.Dropout) or touched(t.ln_f, LayerNorm) or touched(self.lm_head, nn.Linear)
        rows, width = t.wte.weight.shape
        if reason is None and (self.lm_head.weight.shape != (rows, width) or width != self.config.n_embd):
            reason = (f"the head is {tuple(self.lm_head.weight.shape)} and the token embedding {(rows, width)}, "
                      f"which should both be (vocab_size, n_embd {self.config.n_embd})")
        if reason is None and len(t.wpe.weight) < self.config.block_size:
            reason = f"there are {len(t.wpe.weight)} positions for a block_size of {self.config.block_size}"
        if reason is None and (t.wte.max_norm is not None or t.wpe.max_norm is not None):
            reason = "an embedding has a max_norm"
        for block in t.h:
            reason = reason or (block.why_not_fused() if isinstance(block, Block) else f"a block is a {type(block).__name__}")
            if reason is not None:
                return reason
            linears = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
            reason = next(filter(None, (touched(linear, nn.Linear) for linear in linears)), None) or touched(block.mlp.gelu, nn.GELU) \
                or (None if block.attn.flash else "attn.flash is False") \
                or (None if block.attn.n_head == self.config.n_head else
                    f"attn.n_head is {block.attn.n_head}, and config.n_head {self.config.n_head}")
        dropouts = [m.p for m in self.modules() if isinstance(m, nn.Dropout) and m.training] \
            + [block.attn.dropout for block in t.h if block.attn.training]
        return reason or ("the model is in train mode with dropout" if any(dropouts) else None)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **more):
        """Complete idx (B, T) int64 by max_new_tokens tokens -> (B, T + max_new_tokens).

        temperature divides the logits (0: greedy); top_k keeps the k most likely tokens and all that tie with the k-th.
        The model's train/eval mode does not change: call .eval() first. `generation.generate` documents the keywords beyond nanoGPT's
        (top_p, min_p, stop, seed, rng, generator, num_samples, stream, use_cache) and lists of prompts of different lengths.
        """
        from .generation import generate
        return generate(self, idx, max_new_tokens, temperature=temperature, top_k=top_k, **more)


def same_matrix(a, b):
    """Whether two tensors hold the same bits (NaN equals NaN), or have different shapes, which is reported elsewhere."""
    if a.shape != b.shape or a.data_ptr() == b.data_ptr() and a.device == b.device:
        return True
    return a.dtype == b.dtype and torch.equal(*(t.detach().cpu().contiguous().view(torch.uint8) for t in (a, b)))


def add_branch(x, branch, p):
    return x if branch is None else x + nn.functional.dropout(branch, p, training=p > 0)


def check_config(config):
    """Raise ValueError, naming the field, if one is invalid. NumPy's integers become Python's, which every checkpoint reader takes."""
    for name in ("block_size", "vocab_size", "n_head", "n_embd", "n_layer"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            setattr(config, name, whole(name, value, 0 if name == "n_layer" else 1))
    if not 0.0 <= config.dropout <= 1.0:
        raise ValueError(f"dropout is {config.dropout!r}; it is a probability, between 0 and 1")
    if getattr(config, "activation", "gelu") not in ACTIVATIONS:
        raise ValueError(f"activation is {config.activation!r}; expected 'gelu' (erf) or 'gelu_tanh'")
