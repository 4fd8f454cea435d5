"""transformers' GPT-2 on the ops, for every release from 4.45 to the newest that was tried.

What a block and its attention take and return has changed with almost every release:

    releases      cache argument     the cache is     block called   block returns                  also
    4.45 - 4.51   layer_past         (k, v) or None   by keywords    (h, present, ...) with         head_mask; the attention
                                                                     use_cache, else (h, ...)       returns present, too
    4.52          past_key_value     a Cache          by keywords    (h,)                           cache_position, head_mask
    4.53 - 4.55   past_key_value     a Cache          by position    (h,)                           cache_position, head_mask
    4.56, 4.57    past_key_values    a Cache          by position    (h,)                           cache_position, head_mask
    5.0 - 5.2     past_key_values    a Cache          by position    (h,)                           cache_position
    5.3           past_key_values    a Cache          by position    h                              cache_position
    5.4 - 5.23    past_key_values    a Cache          by position    h                              attn.scaling
    5.24 -        cache              a Cache          by position    h                              attn.scaling

With gradient checkpointing, 4.45 to 4.52 call blocks by position, too. Decorators accept the older names of the cache argument for a
few releases. Up to 5.3 there are two mask buffers, bias and masked_bias, which only the "eager" attention reads, and "sdpa" scales by
1/sqrt(D) and ignores scale_attn_weights and scale_attn_by_inverse_layer_idx; from 5.4 on it uses attn.scaling.

So nothing here tests for a version. Arguments are bound by the module's own signature; the cache is found under any of its names;
arguments that PyTorch's attention ignores are passed on unread. The trial (trial.py) runs the module's own forward with and without a
cache and records the form of what it returns; `fast` returns the same form. A module that returns an unknown form is not swapped.

B batch, T sequence, C = n_embd, H = n_head, D = C / H head size.
"""
import inspect

import torch
import torch.nn as nn

from .. import model as nano, reference
from ..ops import attention, mlp, norm
from ..touched import altered, touched
from . import parts
from .swapped import Swapped

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")

MASK_BUFFERS = ("bias", "masked_bias")      # up to 5.3

# Of the extra keywords that a call of the model passes down, those that transformers' attention function for "sdpa" reads.
READ_BY_SDPA = ("is_causal", "scaling", "dropout", "position_bias", "softcap")


def parameters(forward):
    """The names of a forward's parameters without self, in order; decorators are looked through."""
    return tuple(name for name, parameter in inspect.signature(forward).parameters.items()
                 if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)[1:]


def cache_name(forward):
    """The name of the parameter that takes a forward's cache, or None."""
    return next((name for name in CACHES if name in parameters(forward)), None)


class FromTransformers(Swapped):
    """Binds arguments by the own forward's signature, and returns results in the form that the own forward returns."""

    def inputs(self, args, keywords):
        return (self.bound(args, keywords),)

    def why_not_bound(self, args, keywords):
        """Where the arguments do not fit, the own forward runs and raises its own error."""
        if len(args) > len(self._names) or not self._open and any(name not in self._names for name in keywords):
            return "arguments that its forward does not have"
        if "hidden_states" not in self.bound(args, keywords):
            return "no hidden_states"
        return None

    def _returned(self, h, present, use_cache):
        """h, or a tuple of h, present and None, in the form that the trial recorded."""
        form = self._swap_state.forms[self._own][use_cache]
        return h if form == "h" else tuple({"h": h, "present": present, "none": None}[name] for name in form)


def form(result):
    """The form of a result: "h" for a tensor; ("h", "present", "none") for a tuple of a tensor, a pair (k, v) and None."""
    if torch.is_tensor(result):
        return "h"
    if not isinstance(result, tuple) or not result or not torch.is_tensor(result[0]):
        raise TypeError(f"it returns a {type(result).__name__}, expected a tensor or a tuple that begins with one")
    names = ["h"]
    for item in result[1:]:
        if item is not None and not (isinstance(item, tuple) and len(item) == 2 and all(map(torch.is_tensor, item))):
            raise TypeError(f"it also returns a {type(item).__name__}, expected a pair of tensors or None")
        names.append("none" if item is None else "present")
    return tuple(names)


class GPT2Attention(FromTransformers):
    """c_attn is a Conv1D, and keys and values may go into a cache: (B, T, C) -> (B, T, C), with what the release returns beside it."""

    part = "attention"
    obeyed = ("scaling", "layer_idx")

    def why_not(self, call):
        if call.get("attention_mask") is not None:
            return "an attention mask"
        if call.get("head_mask") is not None:
            return "a head mask"
        if call.get("encoder_hidden_states") is not None or call.get("output_attentions"):
            return "cross-attention or output_attentions"
        for name in READ_BY_SDPA:
            if call.get(name) is not None:
                return f"the argument {name}"
        if self.config._attn_implementation != "sdpa":
            return f"attn_implementation={self.config._attn_implementation!r}"
        cache = _cache(call)
        if cache is not None:
            if isinstance(cache, tuple):
                return "past key values"
            if type(cache).__name__ != "DynamicCache":
                return f"a {type(cache).__name__}"
            if cache.get_seq_length(self.layer_idx) > 0:
                return "past key values"
        return parts.packed_why_not(call["hidden_states"], self.head_dim, self._scale(), self.backend,
                                    nano.drop_rate(self.attn_dropout))

    def _scale(self):
        return getattr(self, "scaling", None)                                       # None means 1/sqrt(D)

    def fast(self, call):
        qkv = self.c_attn(call["hidden_states"])                                    # (B, T, 3C)
        cache, present, use_cache = _cache(call), None, call.get("use_cache") is True
        if cache is not None or use_cache and "layer_past" in self._names:
            _, *present = reference.split_heads(qkv, self.num_heads)                # k and v (B, H, T, D)
        if cache is not None:                                                       # empty (see why_not): this is the prompt
            cache.update(*present, self.layer_idx)
        y = attention.causal_attention_qkvpacked(qkv, self.num_heads, dropout_p=nano.drop_rate(self.attn_dropout),
                                                 scale=self._scale(), backend=self.backend)
        return self._returned(self.resid_dropout(self.c_proj(y)), present and tuple(present), use_cache)


def _cache(call):
    """The cache that was passed, under any of its names; or None."""
    for name in CACHES:
        if call.get(name) is not None:
            return call[name]
    return None


class GPT2Mlp(parts.Mlp):
    """GPT2MLP. A Conv1D's weight is (in, out), the op takes (out, in): a transposed view, which the cast makes contiguous."""

    def watched_children(self):
        return ["act"]

    def why_not_fused(self):
        return _conv_touched(self.c_fc) or _conv_touched(self.c_proj) or altered(self.act) or touched(self.dropout, nn.Dropout)

    def weights(self):
        return self.c_fc.weight.t(), self.c_fc.bias, self.c_proj.weight.t(), self.c_proj.bias

    def fast(self, hidden_states):
        return mlp.gelu_mlp(hidden_states, *self.weights(), activation=parts.activation_name(self.act),
                            dropout_p=nano.drop_rate(self.dropout), backend=self.backend)


def _conv1d():
    from transformers.pytorch_utils import Conv1D
    return Conv1D


_conv1d._dynamo_marked_constant = True      # torch.compile keeps the result instead of tracing the import


def _conv_touched(module):
    """`touched` for transformers' class, whose forward PyTorch 2.11 cannot trace from there."""
    return altered(module) if type(module) is _conv1d() else f"{type(module).__name__} replaces Conv1D"


class GPT2Block(FromTransformers, parts.Block):
    """GPT2Block, without cross-attention."""

    def norms(self):
        return self.ln_1, self.ln_2

    def why_not_fused(self):
        return parts.norm_why_not_fused(self.ln_2)

    def why_not(self, call):
        if call.get("encoder_hidden_states") is not None or call.get("output_attentions"):
            return "cross-attention or output_attentions"
        return super().why_not(call["hidden_states"])

    def fast(self, call):
        hidden_states, use_cache = call["hidden_states"], bool(call.get("use_cache"))
        call = {name: value for name, value in call.items()     # the encoder's two are None or not read
                if name not in ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")}
        attended = self.attn(self.ln_1(hidden_states), **call)
        x, h = norm.add_layer_norm(hidden_states, attended[0], self.ln_2.weight, self.ln_2.bias, eps=self.ln_2.eps,
                                   backend=self.backend)
        return self._returned(x + self.mlp(h), attended[1], use_cache)
