"""The code-along notebook's last figure: the bigram after 20,000 steps of AdamW at 1e-3, batch 32, T = 8.

    python -m benchmarks.bigram TEXT          TEXT: tinyshakespeare's input.txt

Prints the loss as it falls and writes it to benchmarks/results/bigram.json. The notebook ends at about 2.5 on one batch,
whose noise is 0.1; here the loss is the mean over 20 batches of the training and of the validation text.
"""
import json
import sys
from pathlib import Path

import torch

from nanogpt_fast import classic
from nanogpt_fast.text.tokenizers import CharTokenizer

RESULT = Path(__file__).parent / "results" / "bigram.json"


def main(path):
    text = Path(path).read_text(encoding="utf-8")
    tokenizer = CharTokenizer.from_text(text)
    train, val = classic.split(torch.tensor(tokenizer.encode(text)))
    torch.manual_seed(1337)
    model = classic.Bigram(classic.ClassicConfig(vocab_size=tokenizer.vocab_size, block_size=8))
    history = classic.train(model, train, val, steps=20_000, batch_size=32, learning_rate=1e-3, eval_interval=2_000,
                            log=lambda step, record: record and print("step {step:6d}  train {train_loss:.4f}  val {val_loss:.4f}"
                                                                      .format(**record)))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"settings": "AdamW 1e-3, batch 32, T 8, seed 1337", "history": history}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
