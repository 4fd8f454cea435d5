"""Counts a training step on a GPU without one: kernel launches, bytes and FLOPs, and the milliseconds that they should take on an H100.

    python -m benchmarks.count                                      our trainer's step of GPT-2 124M, 64 x 1024 tokens
    python -m benchmarks.count --who import --compiled              one import changed, under torch.compile
    python -m benchmarks.count --who nanogpt --compiled --upstream DIR

PyTorch runs the step on fake tensors, which have shapes and no memory, and takes itself for one with an H100 (fake_cuda.py); trace.py
lists what it would launch, compiled.py what Inductor's code would. Needs a PyTorch built for CPUs, and a C++ compiler.
"""
import argparse
import json
import os
import sys

from . import fake_cuda
from .table import CARDS, listing, measured, report, totals

VARIANTS = {("trainer", False): "our trainer", ("trainer", True): "our trainer compiled", ("import", False): "one import",
            ("import", True): "one import compiled", ("nanogpt", False): "nanoGPT", ("nanogpt", True): "nanoGPT compiled"}


def options(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.count", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("gpt2", "gpt2-medium", "baby"), default="gpt2", help="(default: gpt2)")
    parser.add_argument("--batch_size", type=int, default=64, help="sequences per step (default: 64)")
    parser.add_argument("--dropout", type=float, help="default: the model's own")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step, of our trainer uncompiled (default: 1)")
    parser.add_argument("--who", choices=("trainer", "import", "nanogpt"), default="trainer",
                        help="our trainer; nanoGPT's loop with our GPT; nanoGPT (default: trainer)")
    parser.add_argument("--compiled", action="store_true", help="the model under torch.compile")
    parser.add_argument("--upstream", default=os.environ.get("NANOGPT_DIR", ""),
                        help="a nanoGPT checkout; without it nanoGPT is GPT(backend='reference') (default: NANOGPT_DIR)")
    parser.add_argument("--card", choices=CARDS, default="H100", help="whose rates turn counts into milliseconds (default: H100)")
    parser.add_argument("--operations", action="store_true", help="list every operation, equal ones in one line")
    parser.add_argument("--json", help="also write the counts to this file")
    o = parser.parse_args(arguments)
    if o.batch_size < 1 or o.dropout is not None and not 0 <= o.dropout <= 1:
        parser.error(f"--batch_size is {o.batch_size}, --dropout {o.dropout}; expected at least 1, and 0 to 1")
    if o.accumulation < 1 or o.accumulation > 1 and (o.who != "trainer" or o.compiled):
        parser.error(f"--accumulation is {o.accumulation}; expected at least 1, and 1 with --who={o.who}{' --compiled' * o.compiled}")
    return o


def main():
    o = options()
    try:
        fake_cuda.start()
    except RuntimeError as error:
        sys.exit(f"benchmarks.count: {error}")
    from . import step      # imports torch, which must come after the above
    operations = step.count(o.model, o.batch_size, o.dropout, o.who, o.compiled, o.upstream, o.accumulation)
    variant, times = VARIANTS[o.who, o.compiled], f"{o.accumulation} x " if o.accumulation > 1 else ""
    title = f"{variant}, {o.model}, {times}{o.batch_size} sequences a step, bfloat16"
    known = measured(o.card, o.model, o.batch_size, o.dropout, variant) if o.accumulation == 1 else None
    print(report(title, operations, o.card, known))
    if o.operations:
        print(listing(operations))
    if o.json:
        with open(o.json, "w") as file:
            json.dump(dict(title=title, **totals(operations)), file, indent=1)


if __name__ == "__main__":
    main()
