"""nanogpt_fast: nanoGPT on fused kernels, behind nanoGPT's own names.

    from nanogpt_fast import GPT, GPTConfig      # instead of: from model import GPT, GPTConfig
"""
from .backend import use
from .config import GPTConfig
from .explain import explain
from .model import GPT, MLP, Block, CausalSelfAttention, LayerNorm

__version__ = "0.1.0"
__all__ = ["LayerNorm", "CausalSelfAttention", "MLP", "Block", "GPTConfig", "GPT"]  # what nanoGPT's model.py defines
