"""Is our bf16 training step as close to float32 as bf16 autocast alone? Loss curves of one model in three arithmetics.

    python -m benchmarks.precision [--model cpu|gpt2] [--steps 100] [--seeds 2] [--data TEXT]

float32 and bf16 autocast are nanoGPT's own calls, ours is what `nanogpt-fast train` does; weights and batches are the same for the three.
It compares the distances from float32's curve, ours and bf16 autocast's: mean and largest over the steps, for each seed. Two seeds
show how much both vary by chance.
"""
import argparse
import statistics

import torch

from benchmarks import RESULTS
from nanogpt_fast import devices, options, tables
from nanogpt_fast.bench import common, loss, measure, train
from nanogpt_fast.text import prepare
from nanogpt_fast.text.batches import Batches
from nanogpt_fast.training.trainer import learning_rate

SIDES = {"float32": train.Variant(nanogpt=True), "bf16": train.Variant(nanogpt=True, bf16=True),
         "ours": train.Variant(logits=False, bf16=True)}


def curve(variant, o, config, B, steps, seed, folder, device):
    """The losses of `steps` steps, with warm-up and cosine decay as in `bench loss`."""
    trainer = train.Trainer(o, variant, config, B, device, torch.float32, seed=seed)
    schedule = loss.LossSchedule(learning_rate=6e-4, min_lr=6e-5, warmup_iters=steps // 10, lr_decay_iters=steps)
    batches, losses = Batches(folder, "train", B, config["block_size"], generator=torch.Generator().manual_seed(seed)), []
    for step in range(steps):
        for group in trainer.optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        losses.append(trainer.step(*batches.next()).item())
    batches.close()
    return losses


def distance(losses, exact):
    """(mean, largest) absolute difference of two curves."""
    differences = [abs(a - b) for a, b in zip(losses, exact, strict=True)]
    return statistics.mean(differences), max(differences)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="cpu", choices=tuple(common.MODELS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch_size", type=int, help="sequences a step; the model's own where it is not given")
    parser.add_argument("--block_size", type=int, help="their length, likewise")
    parser.add_argument("--data", default="embedded", help="as for `nanogpt-fast train`")
    parser.add_argument("--json", default=RESULTS / "cpu.jsonl", help="append the result to this file")
    args = parser.parse_args()
    device, folder = devices.choose_device("cpu"), prepare.find(args.data, "data")
    o = options.parse(train.BenchTrainOptions, [f"--model={args.model}", "--device=cpu"], "precision")
    config, B = common.shape_of(args.model, device, dropout=0.0)
    config["block_size"], B = args.block_size or config["block_size"], args.batch_size or B
    if args.model != "gpt2":  # GPT-2's own padded vocabulary holds any text's ids
        config["vocab_size"] = prepare.load_tokenizer(folder).vocab_size
    lines = tables.Lines(("seed", "", "first loss", "last loss", "from float32's, on average", "at most"), align="rlr", widths=(4, 4))
    print("\n".join(lines.head), flush=True)
    curves = {}
    for seed in range(args.seeds):
        curves[seed] = {side: curve(variant, o, config, B, args.steps, seed, folder, device) for side, variant in SIDES.items()}
        for side in ("bf16", "ours"):
            mean, largest = distance(curves[seed][side], curves[seed]["float32"])
            print(lines.row((seed, side, *(f"{curves[seed][side][i]:.4f}" for i in (0, -1)), f"{mean:.2e}", f"{largest:.2e}")), flush=True)
    measure.append(args.json, "precision", model=args.model, steps=args.steps, shape=dict(config, batch_size=B), curves=curves)


if __name__ == "__main__":
    main()
