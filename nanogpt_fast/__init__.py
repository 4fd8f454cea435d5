"""nanogpt_fast: nanoGPT on fused kernels, behind nanoGPT's own names. `from nanogpt_fast import GPT, GPTConfig`."""
