"""--preset=laptop: a character model of 0.8M parameters that learns in about two minutes on two CPU cores. nanoGPT's recipe for a CPU,
with the baby GPT's learning rate."""
dataset = "embedded"
n_layer, n_head, n_embd, block_size, dropout = 4, 4, 128, 64, 0.0
batch_size, gradient_accumulation_steps = 12, 1
max_iters = lr_decay_iters = 2000
learning_rate, min_lr, warmup_iters, beta2 = 1e-3, 1e-4, 100, 0.99
eval_interval, eval_iters, log_interval = 250, 20, 10
always_save_checkpoint = False
