"""GPT-2 weights from transformers: names, sizes and the four transposed matrices."""
import os

from .config import GPTConfig

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),           # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),   # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),    # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),       # 1558M
}
# OpenAI's checkpoints hold these as Conv1D, (in, out); nn.Linear holds (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# transformers' activation_function -> ours
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def load_gpt2(model_type, override_args, activation):
    """(GPTConfig, state_dict in nanoGPT's layout) of one of the four names or of a local folder."""
    unknown = [key for key in override_args if key != "dropout"]
    if unknown:
        raise ValueError(f"override_args has {', '.join(unknown)}; only dropout can be overridden, the rest is the checkpoint's")
    local = os.path.isdir(model_type)
    if model_type not in SIZES and not local:
        raise ValueError(f"from_pretrained({model_type!r}): expected one of {', '.join(SIZES)}, or a folder written by save_pretrained")
    try:
        from transformers import GPT2LMHeadModel
    except ImportError as error:
        raise ImportError("GPT.from_pretrained reads GPT-2's weights with the transformers library; pip install 'nanogpt-fast[gpt2]'") from error

    print(f"loading weights from pretrained gpt: {model_type}")
    source = GPT2LMHeadModel.from_pretrained(model_type)
    theirs = source.config
    if activation is None:
        activation = "gelu" if not local else ACTIVATIONS.get(theirs.activation_function)
        if activation is None:
            raise ValueError(f"{model_type} uses the activation {theirs.activation_function!r}; "
                             f"GPT has {', '.join(ACTIVATIONS)}. Pass activation='gelu' or 'gelu_tanh' to take one of them all the same.")
    config = GPTConfig(block_size=theirs.n_positions, vocab_size=theirs.vocab_size, n_layer=theirs.n_layer, n_head=theirs.n_head,
                       n_embd=theirs.n_embd, bias=True, activation=activation, **override_args)
    return config, to_nanogpt(source.state_dict())


def to_nanogpt(state_dict):
    """transformers' GPT2LMHeadModel state in nanoGPT's layout: mask buffers dropped, Conv1D weights transposed."""
    kept = {key: value for key, value in state_dict.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}
    return {key: value.t().contiguous() if key.endswith(TRANSPOSED) else value for key, value in kept.items()}
