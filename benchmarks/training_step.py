"""What being a drop-in costs on a CPU: a training step of ours against the same step in plain upstream style, fp32, eager.

    python -m benchmarks.training_step [--upstream DIR] [--json FILE]

Both models live in one process and take turns; the ratio is the median of five repeats of 15 pairs. Peak memory is measured
in a fresh process for each. The plain model is tests/plain.py, or the model.py of a nanoGPT checkout (--upstream DIR).
"""
import argparse
import contextlib
import io
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import RESULTS
from nanogpt_fast.bench import measure

SHAPES = {
    "CPU recipe, B=12, T=64": (dict(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128), 12),
    "GPT-2 124M, B=4, T=256": (dict(block_size=256, vocab_size=50304, n_layer=12, n_head=12, n_embd=768), 4),
}
REPEATS, PAIRS = 5, 15


def step_of(module, shape):
    """A function that takes one training step: forward, backward, clip, unfused AdamW, as nanoGPT does on a CPU."""
    config, B = SHAPES[shape]
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**config))
    groups = model.configure_optimizers  # fused AdamW is a choice of ours: take the same unfused one for both
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = torch.optim.AdamW([{**g, "fused": None} for g in groups(0.1, 1e-4, (0.9, 0.95), "cpu").param_groups],
                                      lr=1e-4, betas=(0.9, 0.95))
    x = torch.randint(config["vocab_size"], (B, config["block_size"]))

    def step():
        model(x, x)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def modules():
    import nanogpt_fast
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import plain
    return {"nanogpt_fast": nanogpt_fast, "plain": plain.upstream()}


def peak_memory(name, shape):
    """Peak resident memory in MiB of a fresh process that takes three steps."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--peak-of", name, "--shape", shape]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent).stdout.split()[-1])


def import_seconds():
    """Seconds that importing the GPT takes on top of `import torch`, median of five fresh processes."""
    code = "import time, torch; t = time.perf_counter(); from nanogpt_fast import GPT; print(time.perf_counter() - t)"
    return statistics.median(float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
                             for _ in range(5))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--upstream", help="a nanoGPT checkout to compare with, instead of tests/plain.py")
    parser.add_argument("--json", default=RESULTS / "cpu.jsonl", help="append the results to this file")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.upstream:
        os.environ["NANOGPT_DIR"] = args.upstream
    if args.peak_of:
        step = step_of(modules()[args.peak_of], args.shape)
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return

    seconds = import_seconds()
    print(f"import nanogpt_fast beyond torch: {seconds:.3f} s")
    measure.append(args.json, "import", seconds=seconds)
    for shape in SHAPES:
        steps = {name: step_of(module, shape) for name, module in modules().items()}
        ratios, samples = [], []
        for repeat in range(REPEATS):
            samples.append(measure.interleaved(steps, PAIRS, seed=repeat))
            median = measure.medians(samples[-1])
            ratios.append(median["nanogpt_fast"] / median["plain"])
        memory = {name: peak_memory(name, shape) for name in steps}
        ratio, memory_ratio = statistics.median(ratios), memory["nanogpt_fast"] / memory["plain"]
        print(f"{shape}: {1e3 * median['nanogpt_fast']:.1f} ms against {1e3 * median['plain']:.1f} ms, ratio {ratio:.3f} "
              f"({', '.join(f'{r:.3f}' for r in ratios)}); peak memory {memory_ratio:.3f} times")
        measure.append(args.json, "training step, eager fp32 reference", shape=shape, ratio=ratio, ratios=ratios, samples=samples,
                       peak_memory_mib=memory, memory_ratio=memory_ratio, against="nanoGPT checkout" if args.upstream else "tests/plain.py")


if __name__ == "__main__":
    main()
