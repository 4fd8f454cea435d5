"""The parts of a GPT on the ops: one class per part and layout (nanoGPT's; separate q, k and v; transformers' are in gpt2.py).

Each has `why_not`, which says why a call has to take the module's own forward, and `fast`, the formula that replaces it. swapped.py
combines this class with the module's own and assigns the result to `__class__`.

B batch, T sequence, C = n_embd, H = n_head, D = C / H head size.
"""
import torch.nn as nn

from .. import apart, backend as _backend, model as nano, reference
from ..ops import attention, cross_entropy, mlp, norm
from ..ops.common import autocast_dtype
from ..touched import altered, touched
from .swapped import Swapped


def _kernel_why_not(op, candidates, choices, args, row_for):
    """None if a kernel runs `op` for these arguments, else why none does. Raises under "fused", as the op would."""
    if _backend.choose(op, candidates, choices, args, row_for) != "reference":
        return None
    if _backend.choice(op, choices) == "reference":
        return "backend='reference'"
    if (row := row_for(*args)) is not None and row.use == "reference":
        return row.note
    return next(filter(None, (why_not(*args) for _, why_not in candidates)), "no kernel was chosen")


# LayerNorm

class Norm(Swapped):
    """A LayerNorm over the last dimension, with nn.LayerNorm's attributes."""

    part = "layer_norm"
    obeyed = ("weight", "bias", "eps")

    def why_not(self, input):
        return _kernel_why_not("layer_norm", norm.CANDIDATES, self.backend, (input, self.weight, self.bias), norm.row_for)

    def fast(self, input):
        return norm.layer_norm(input, self.weight, self.bias, eps=getattr(self, "eps", 1e-5), backend=self.backend)


class NanoNorm(Norm, nano.LayerNorm):
    """nanoGPT's own, or an nn.LayerNorm with eps 1e-5, which computes the same: model.py's Block runs either in its fused path."""

    obeyed = ("weight", "bias")


# Attention

def packed_why_not(x, D, scale, choices, dropout_p):
    """`_kernel_why_not` before the projection runs: x (B, T, C) stands for the packed q, k and v computed from it."""
    return _kernel_why_not("attention", attention.CANDIDATES, choices,
                           (x, autocast_dtype(x), D, scale, dropout_p), attention.row_for)


class NanoAttention(Swapped, nano.CausalSelfAttention):
    """One packed projection c_attn; x (B, T, C) -> (B, T, C). `dropout` is the rate for the attention weights, as in nanoGPT."""

    part = "attention"
    obeyed = ("dropout",)
    dropouts = ("attn_dropout", "resid_dropout")

    def changed(self):
        return super().changed() or (None if self.__dict__.get("flash", True) else "attn.flash is False")

    def _attention_p(self):
        return self.dropout if self.training else 0.0

    def why_not(self, x):
        return packed_why_not(x, self.n_embd // self.n_head, None, self.backend, self._attention_p())

    def branch(self, x, seed=None):
        y = attention.causal_attention_qkvpacked(self.c_attn(x), self.n_head, dropout_p=self._attention_p(), seed=seed,
                                                 backend=self.backend)
        return self.c_proj(y)                                                       # (B, T, C)

    def fast(self, x):
        return self.resid_dropout(self.branch(x))


class PackedAttention(NanoAttention):
    """The same with the rate of the module attn_dropout, or 0 without one: minGPT, build-nanogpt."""

    obeyed = ()

    def changed(self):
        return super().changed() or touched(self.attn_dropout, nn.Dropout)

    def _attention_p(self):
        return nano.drop_rate(self.attn_dropout)


class SeparateAttention(Swapped):
    """Three linears, key, query and value, and a projection; x (B, T, C) -> (B, T, C)."""

    part = "attention"
    dropouts = ("attn_drop", "resid_drop")

    def changed(self):
        return super().changed() or touched(self.attn_drop, nn.Dropout)

    def why_not(self, x):
        heads = x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)                  # (B, H, T, D), for each of q, k and v
        return _kernel_why_not("attention", attention.SEPARATE_CANDIDATES, self.backend,
                               (heads, heads, heads, autocast_dtype(heads), None, nano.drop_rate(self.attn_drop)),
                               attention.separate_row_for)

    def fast(self, x):
        B, T, C = x.shape
        q, k, v = (part(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)                # (B, H, T, D)
                   for part in (self.query, self.key, self.value))
        y = attention.causal_attention(q, k, v, dropout_p=nano.drop_rate(self.attn_drop), backend=self.backend)
        return self.resid_drop(self.proj(y.transpose(1, 2).reshape(B, T, C)))


# MLP

class Mlp(Swapped):
    """Linear, activation, Linear, dropout. Each subclass knows where they are."""

    part = "mlp"

    def why_not(self, x):
        return self.why_not_fused() or _kernel_why_not("mlp", mlp.CANDIDATES, self.backend, (x, *self.weights()), mlp.row_for)


class NanoMlp(Mlp, nano.MLP):
    """c_fc, an activation, c_proj, dropout. The activation is a module of any name, or a function that the forward calls."""

    _activation = "gelu"        # one subclass per activation of the op; the trial finds out which one fits
    dropouts = ("dropout",)

    def _act(self):
        """(name, module) of the activation's module, or (None, None)."""
        return next(((name, child) for name, child in self._modules.items() if name not in ("c_fc", "c_proj", "dropout")), (None, None))

    def watched_children(self):
        return [name for name, _ in [self._act()] if name is not None]

    def _branch_why_not(self):
        _, act = self._act()
        return (touched(self.c_fc, nn.Linear) or touched(self.c_proj, nn.Linear)
                or (None if act is None else altered(act)))

    def why_not_fused(self):
        return self._branch_why_not() or touched(self.dropout, nn.Dropout)

    def weights(self):
        return self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias

    def branch(self, x):
        """The MLP without its dropout, which is what a fused block calls."""
        if self._branch_why_not() is not None:
            h, (_, act) = self.c_fc(x), self._act()
            return self.c_proj(reference.activation(h, self._activation) if act is None else act(h))
        return mlp.gelu_mlp(x, *self.weights(), activation=self._activation, recompute=self.recompute, backend=self.backend)

    def fast(self, x):
        return self.dropout(self.branch(x))


class NanoMlpTanh(NanoMlp):
    _activation = "gelu_tanh"


class NanoMlpRelu(NanoMlp):
    _activation = "relu"


class SequentialMlp(Mlp):
    """nn.Sequential(Linear, activation, Linear), with or without a Dropout at the end."""

    _activation = None          # the op's name for it; None: that of the class of self[1]

    def watched_children(self):
        return ["1"]

    def why_not_fused(self):
        return (touched(self[0], nn.Linear) or altered(self[1]) or touched(self[2], nn.Linear)
                or (touched(self[3], nn.Dropout) if len(self) > 3 else None))

    def weights(self):
        return self[0].weight, self[0].bias, self[2].weight, self[2].bias

    def fast(self, input):
        return mlp.gelu_mlp(input, *self.weights(), activation=self._activation or activation_name(self[1]),
                            dropout_p=nano.drop_rate(self[3]) if len(self) > 3 else 0.0, backend=self.backend)


class SequentialMlpGelu(SequentialMlp):
    """With an activation of a user's own class; as in NanoMlp, the trial finds out which of the op's it computes."""

    _activation = "gelu"


class SequentialMlpTanh(SequentialMlp):
    _activation = "gelu_tanh"


class SequentialMlpRelu(SequentialMlp):
    _activation = "relu"


def activation_name(module):
    """The op's name for the activation that a module of this class computes; None if the op does not have it."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module).__name__)


_ACTIVATIONS = {"ReLU": "relu",     # the others are transformers' classes; trial.py checks what they compute
                "GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh",
                "FastGELUActivation": "gelu_tanh"}


# Block: the residual add after the attention and the LayerNorm after that are one kernel

class Block(Swapped):

    part = "block"

    def why_not(self, x):
        ln = self.norms()[1]
        return self.why_not_fused() or _kernel_why_not("layer_norm", norm.CANDIDATES, ln.backend, (x, ln.weight, ln.bias), norm.row_for)


class NanoBlock(Block, nano.Block):
    """nanoGPT's block, called on its own. A swapped GPT calls `fused` instead, which also moves the second add into the next LayerNorm."""

    def norms(self):
        return self.ln_1, self.ln_2

    def fast(self, x):
        return nano.add_branch(*self.fused(x, None, 0.0))


class SeparateBlock(Block):
    """Pre-norm block with attributes ln1, sa, ln2, ff."""

    obeyed = ("pre_norm",)

    def norms(self):
        return self.ln1, self.ln2

    def why_not_fused(self):
        return norm_why_not_fused(self.ln2) or (None if getattr(self, "pre_norm", True) else "post-norm")

    def feed_forward(self):
        return self.ff

    def fast(self, x):
        x, h = norm.add_layer_norm(x, self.sa(self.ln1(x)), self.ln2.weight, self.ln2.bias, eps=self.ln2.eps,
                                   backend=self.backend)
        return x + self.feed_forward()(h)


class LectureBlock(SeparateBlock):
    """The same with ffwd in place of ff."""

    def feed_forward(self):
        return self.ffwd


def norm_why_not_fused(module):
    """None if a LayerNorm is a swapped one and calling it does nothing else; else what was done to it."""
    if not (isinstance(module, Norm) and type(module).itself is type(module)):
        return f"{type(module).__name__} replaces a swapped LayerNorm"
    return altered(module) or module.changed()


# The model: the loop over blocks that carries a residual and a branch, and the fused loss

class NanoGPT(Swapped, nano.GPT):
    """nanoGPT's GPT.forward(idx, targets=None)."""

    part = "model"
    tensors, rank = 2, 2
    obeyed = ("config.block_size",)
    __call__ = apart.call

    def _why_not_apart(self, idx, targets):
        reason = self.why_not_bound((idx, targets), {}) or self.why_not(idx, targets) or nano.GPT._why_not_apart(self, idx, targets)
        if reason is None:
            self._swap_state.calls[self.part, "kernels"] += 1      # by `forward`, which is not called
        return reason

    def why_not(self, idx, targets=None):
        scale = getattr(self.transformer.ln_f, "weight", None)                       # it stands for the residual stream, as does the head
        if scale is None:
            return f"the last LayerNorm is a {type(self.transformer.ln_f).__name__}"
        why_not = _kernel_why_not("layer_norm", norm.CANDIDATES, self.backend, (scale, scale, None), norm.row_for)
        if why_not is not None or targets is None or self._why_not_fused_loss() is not None:
            return why_not
        head = self.lm_head.weight
        return _kernel_why_not("cross_entropy", cross_entropy.CANDIDATES, self.backend, (head, head, targets), cross_entropy.row_for)

    def fast(self, idx, targets=None):
        return nano.GPT.forward(self, idx, targets)
