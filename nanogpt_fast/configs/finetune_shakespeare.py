"""The values of nanoGPT's config/finetune_shakespeare.py."""
import time

out_dir, dataset, init_from = "out-shakespeare", "shakespeare", "gpt2-xl"
wandb_log, wandb_project, wandb_run_name = False, "shakespeare", f"ft-{time.time()}"
batch_size, gradient_accumulation_steps = 1, 32
max_iters, learning_rate, decay_lr = 20, 3e-5, False
eval_interval, eval_iters = 5, 40
always_save_checkpoint = False
