"""The values of nanoGPT's config/eval_gpt2_medium.py."""
init_from, eval_only = "gpt2-medium", True
batch_size, eval_iters, wandb_log = 8, 500, False
