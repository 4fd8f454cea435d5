"""`nanogpt-fast demo`: train a character-level GPT on text that every Python includes, complete a prompt, suggest what to try next."""
import shlex
import time

import torch

from .. import devices, options, tables
from ..text import prepare
from ..training import presets
from ..training.presets import TrainCommand
from ..training.trainer import train

PROMPT = "The value of "
HELP = """usage: nanogpt-fast demo [--key=value | --key value ...]

Train a character-level GPT on Python's language reference and complete a prompt: under 3 minutes on 2 CPU cores. It is

    nanogpt-fast train --preset=laptop {settings}

or, on a CUDA GPU, the same with --preset=baby. Every key of `nanogpt-fast train --help` changes it; --verbose shows the whole banner.
"""


def main(argv):
    """`nanogpt-fast demo [--key=value ...]`: any key of `nanogpt-fast train` changes the demo; --verbose shows the whole banner."""
    settings = ["--max_iters=2000", "--compile=False", "--out_dir=out-demo", "--sample_tokens=120", "--verbose=False"]
    if "-h" in argv or "--help" in argv:
        print(HELP.format(settings=" ".join(settings)))
        return 0
    wanted = options.parse(TrainCommand, argv, "nanogpt-fast demo")
    # The baby GPT takes minutes on any recent GPU; the laptop's model about two on two CPU cores, its validation loss still falling.
    preset = "baby" if devices.choose_device(wanted.device).type == "cuda" else "laptop"
    o = presets.parse([f"--preset={preset}", *(["--eval_iters=50"] if preset == "baby" else []), *settings, *argv], "nanogpt-fast demo")
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
    here = [(f"  nanogpt-fast chat --out_dir={out}", "type a prompt, watch it continue"),
            (f'  nanogpt-fast sample --out_dir={out} --start="A class "', "one completion"),
            ("  nanogpt-fast train --data=my.txt --out_dir=out-mine", "train on a text of your own (--help lists every key)")]
    if result.stopped is not None:
        print(f"\nStopped at step {result.iter_num}. To continue exactly there:\n    nanogpt-fast train --out_dir={out} --init_from=resume")
    print(f"""
{time.monotonic() - started:.0f} seconds, {result.iter_num} steps. Written to {result.out_dir}/:
  loss.png        the loss curve                 metrics.jsonl   all of its numbers
  ckpt.pt         the best weights, in nanoGPT's format
  last.pt         everything an exact resume needs

To try next:
{tables.table(None, here, align="l")}
""")
    return 0 if result.stopped is None else 128 + result.stopped
