"""`nanogpt-fast demo`: train a character-level GPT on text that every Python includes, complete a prompt, suggest what to try next."""
import shlex
import time

import torch

from .. import devices, options
from ..text import prepare
from ..training.trainer import TrainOptions, train

PROMPT = "The value of "

# Sized to finish in about two minutes on two CPU cores, with the validation loss still falling at the end.
CPU = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, max_iters=2000, eval_interval=250, eval_iters=20,
           warmup_iters=100, learning_rate=1e-3)
# nanoGPT's baby GPT: minutes on any recent GPU.
GPU = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, max_iters=2000, eval_interval=250, eval_iters=50,
           warmup_iters=100, learning_rate=1e-3, dropout=0.2)


def main(argv):
    """`nanogpt-fast demo [--key=value ...]`: any key of `nanogpt-fast train` changes the demo."""
    wanted = options.parse(TrainOptions, argv, "nanogpt-fast demo")
    on_gpu = devices.choose_device(wanted.device).type == "cuda"
    settings = dict(dataset="embedded", out_dir="out-demo", gradient_accumulation_steps=1, min_lr=1e-4, beta2=0.99, sample_tokens=120,
                    always_save_checkpoint=False, log_interval=10, compile=False, **(GPU if on_gpu else CPU))
    words = [f"--{key}={value}" for key, value in settings.items()]
    o = options.parse(TrainOptions, words + argv, "nanogpt-fast demo")
    if "lr_decay_iters" not in " ".join(argv):
        o.lr_decay_iters = o.max_iters
    print("A character-level GPT learns Python's language reference. Ctrl-C stops it and keeps what it has learnt.\n")
    started = time.monotonic()
    result = train(o)
    if result.stopped is not None and result.iter_num == 0:
        return 128 + result.stopped

    tokenizer = prepare.load_tokenizer(prepare.find(o.dataset, o.data_dir))
    model = result.model.eval()
    prompt = torch.tensor([tokenizer.encode(PROMPT)], device=next(model.parameters()).device)
    torch.manual_seed(1337)
    print(f"\nThe prompt {PROMPT!r}, completed:\n")
    print(tokenizer.decode(model.generate(prompt, 300, temperature=0.7, top_k=40)[0].tolist()))

    out = shlex.quote(str(result.out_dir))
    here = [f"nanogpt-fast chat --out_dir={out}", f'nanogpt-fast sample --out_dir={out} --start="A class "',
            "nanogpt-fast train --data=my.txt --out_dir=out-mine"]
    width = max(map(len, here))
    print(f"""
{time.monotonic() - started:.0f} seconds, {result.iter_num} steps. Written to {result.out_dir}/:
  loss.png        the loss curve                 metrics.jsonl   all of its numbers
  ckpt.pt         the best weights, in nanoGPT's format
  last.pt         everything an exact resume needs

To try next:
  {here[0]:<{width}}  type a prompt, watch it continue
  {here[1]:<{width}}  one completion
  {here[2]:<{width}}  train on a text of your own (--help lists every key)
""")
    return 0 if result.stopped is None else 128 + result.stopped
