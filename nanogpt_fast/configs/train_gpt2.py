"""The values of nanoGPT's config/train_gpt2.py."""
wandb_log, wandb_project, wandb_run_name = True, "owt", "gpt2-124M"
batch_size, block_size, gradient_accumulation_steps = 12, 1024, 5 * 8
max_iters = lr_decay_iters = 600_000
eval_interval, eval_iters, log_interval = 1000, 200, 10
weight_decay = 1e-1
