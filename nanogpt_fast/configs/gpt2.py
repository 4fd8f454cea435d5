"""--preset=gpt2: GPT-2 124M from scratch with nanoGPT's batch of 491,520 tokens. Days on eight A100, years on a CPU."""
n_layer, n_head, n_embd, block_size, dropout = 12, 12, 768, 1024, 0.0
batch_size, gradient_accumulation_steps = 12, 5 * 8
max_iters = lr_decay_iters = 600_000
learning_rate, min_lr, warmup_iters, beta2, weight_decay = 6e-4, 6e-5, 2000, 0.95, 1e-1
eval_interval, eval_iters, log_interval = 1000, 200, 10
