"""The ops of a GPT, each by several implementations that compute the same, and each differentiable where the name says nothing else.

    causal_attention, causal_attention_qkvpacked, decode_attention      softmax(scale q k^T, causal) v
    layer_norm, add_layer_norm                                          LayerNorm, and the residual add before it
    gelu_mlp                                                            dropout(act(x w_fc^T + b_fc) w_proj^T + b_proj)
    linear_cross_entropy                                                the vocabulary head and its loss, without the logits
    sample, sample_out, sample_probs                                    the next token of each row of logits
    register, unregister                                                a kernel of your own, beside ours

`backend` is "auto" (the fastest that can run), "fused" (a kernel, or an error that says why none can), "reference" (plain PyTorch), or an
implementation's name per op ("attention=cudnn"); None leaves it to `nanogpt_fast.use` and NANOGPT_FAST_BACKEND.
"""
from .attention import causal_attention, causal_attention_qkvpacked, decode_attention
from .cross_entropy import linear_cross_entropy
from .mlp import gelu_mlp
from .norm import add_layer_norm, layer_norm
from .registered import register, unregister
from .sampler import sample, sample_out, sample_probs

__all__ = ["add_layer_norm", "causal_attention", "causal_attention_qkvpacked", "decode_attention", "gelu_mlp", "layer_norm", "linear_cross_entropy",
           "register", "sample", "sample_out", "sample_probs", "unregister"]
