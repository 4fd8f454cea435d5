"""--preset=finetune: OpenAI's GPT-2 124M learns a text in GPT-2's tokens at a constant learning rate, as nanoGPT fine-tunes."""
dataset, init_from = "shakespeare", "gpt2"
batch_size, gradient_accumulation_steps = 1, 32
max_iters, learning_rate, decay_lr = 20, 3e-5, False
eval_interval, eval_iters = 5, 40
always_save_checkpoint = False
