"""GPTConfig: the seven numbers that define a GPT, with nanoGPT's names, order and defaults, plus one optional field; and what a whole number is."""
import operator
from dataclasses import dataclass


ACTIVATIONS = ("gelu", "gelu_tanh")     # that `activation` may be


@dataclass
class GPTConfig:
    block_size: int = 1024    # T: the longest context, in tokens
    vocab_size: int = 50304   # V: GPT-2's 50257 padded to a multiple of 64, for faster matmuls
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768         # C: width of the residual stream; the head size is n_embd / n_head
    dropout: float = 0.0
    bias: bool = True         # biases in Linears and LayerNorms, as in GPT-2; False is a bit better and faster
    activation: str = "gelu"  # "gelu" is the erf form (nanoGPT); "gelu_tanh" is what OpenAI's GPT-2 weights were trained with


def whole(name, value, minimum=None):
    """The value as an int: Python's, NumPy's or another with an `__index__`. Raises ValueError if it is none, or below the minimum."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or minimum is not None and number < minimum:
        raise ValueError(f"{name} is {value!r}; it must be a whole number" + ("" if minimum is None else f" of at least {minimum}"))
    return number
