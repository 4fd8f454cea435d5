"""--preset=baby: nanoGPT's baby GPT, 10.7M parameters, on any text. Minutes on a GPU, hours on a CPU."""
dataset = "embedded"
n_layer, n_head, n_embd, block_size, dropout = 6, 6, 384, 256, 0.2
batch_size, gradient_accumulation_steps = 64, 1
max_iters = lr_decay_iters = 5000
learning_rate, min_lr, warmup_iters, beta2 = 1e-3, 1e-4, 100, 0.99
eval_interval, eval_iters, log_interval = 250, 200, 10
always_save_checkpoint = False
