"""The sampler against nanoGPT's own sequence (divide, topk, mask, softmax, multinomial), for one row and for batches.

    python -m benchmarks.sampler [--json FILE] [--rounds N]

On a CPU: "ops.sample" is what a user calls, its checks and the new tensor included; "in generation" is what generation calls for every
token, checked when generation begins (`ops.sample.prepare`); "C++ alone" is the extension's function without Python in front of it;
all on one thread. They take turns with nanoGPT's, so each finds the caches as other work leaves them. Then 64 rows on one thread and on
all. On a GPU: the sampler as generation uses it, captured in a CUDA
graph, at several batch sizes; nanoGPT's sequence cannot be captured, since `torch.multinomial` waits for the GPU.
"""
import argparse
import os
import sys

import torch
import torch.nn.functional as F

from nanogpt_fast import tables
from nanogpt_fast.bench import measure
from nanogpt_fast.ops import extension, sampler

V, TEMPERATURE = 50304, 0.8
CALLS = 20  # on a GPU, so many steps between two synchronisations, which cost more than a step


def nanogpt_sequence(logits, top_k):
    """What nanoGPT's `generate` does with the logits of one step."""
    logits = logits / TEMPERATURE
    if top_k is not None:
        v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
        logits[logits < v[:, [-1]]] = -float("Inf")
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


def logits_of(rows):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(rows)) * 2


def streams(logits):
    """out, seed and offset for `sample_out`."""
    return [torch.zeros(len(logits), dtype=torch.int64, device=logits.device) for _ in range(3)]


def step_in_generation(logits, **filters):
    out, seed, offset = streams(logits)
    return sampler.prepare(logits, out=out, seed=seed, offset=offset, temperature=TEMPERATURE, **filters)


def users_call(logits, **filters):
    _, seed, offset = streams(logits)
    return lambda: sampler.sample(logits, seed=seed, offset=offset, temperature=TEMPERATURE, **filters)


def on_threads(threads, step):
    """The step on so many threads. Setting their number takes microseconds: for steps of milliseconds only."""
    def run():
        torch.set_num_threads(threads)
        step()
    return run


def bare_step(logits, top_k):
    held = streams(logits)
    addresses = [tensor.data_ptr() for tensor in (held[1], held[2], held[0])]
    return lambda: held and extension._C.sample_cpu(logits.data_ptr(), "float32", 1, V, V, 0, TEMPERATURE, 0, top_k or 0, 0, 1.0, 0, 0.0, *addresses, 1, "")


def captured(logits, **filters):
    """CALLS steps in one CUDA graph, which takes the host's part of a launch out of the measurement."""
    out, seed, offset = streams(logits)

    def steps():
        for _ in range(CALLS):
            sampler.sample_out(logits, out=out, seed=seed, offset=offset, temperature=TEMPERATURE, **filters)
    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return graph.replay


def compare(title, variants, rounds, path, calls=1):
    """Print and record one row: the last of `variants` is the rival that the others are compared with."""
    samples = {name: [seconds / calls for seconds in values] for name, values in measure.interleaved(variants, rounds).items()}
    median = measure.medians(samples)
    rival = list(variants)[-1]
    rows = [(name, f"{median[name] * 1e6:.1f}", f"{min(samples[name]) * 1e6:.1f}", f"{median[rival] / median[name]:.1f}") for name in variants]
    print(tables.table((title, "median us", "fastest us", f"times as fast as {rival}"), rows) + "\n", flush=True)
    if path:
        measure.append(path, "sampler", row=title, rival=rival, median=median, samples=samples, extension=extension._C.build_info(),
                       load=os.getloadavg()[0])


def on_cpu(rounds, path):
    torch.set_num_threads(1)
    one = logits_of(1)
    for top_k in (200, 50, None):
        compare(f"1 row, top_k={top_k}", {"C++ alone": bare_step(one, top_k), "in generation": step_in_generation(one, top_k=top_k),
                                          "ops.sample": users_call(one, top_k=top_k), "nanoGPT": lambda: nanogpt_sequence(one, top_k)}, rounds, path)
    half = one.bfloat16()
    compare("1 row, bf16, top_k=200", {"in generation": step_in_generation(half, top_k=200), "ops.sample": users_call(half, top_k=200),
                                       "nanoGPT": lambda: nanogpt_sequence(half, 200)}, rounds, path)
    many, cores = logits_of(64), len(os.sched_getaffinity(0))
    for top_k in (200, None):
        compare(f"64 rows, top_k={top_k}", {f"{cores} threads": on_threads(cores, step_in_generation(many, top_k=top_k)),
                                           "1 thread": on_threads(1, step_in_generation(many, top_k=top_k))}, rounds // 2, path)


def on_cuda(rounds, path):
    for rows in (1, 8, 64, 256):
        logits = logits_of(rows).to("cuda", torch.bfloat16)
        for filters in (dict(top_k=200), dict(top_k=50), dict(top_p=0.9), dict()):
            def rival():
                for _ in range(CALLS):
                    nanogpt_sequence(logits, filters.get("top_k"))
            title = f"{rows} rows, bf16, " + (", ".join(f"{name}={value}" for name, value in filters.items()) or "no filter")
            compare(title, {"sampler": captured(logits, **filters), "nanoGPT without top-p" if "top_p" in filters else "nanoGPT": rival}, rounds, path, CALLS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", help="append one line a row to this file, with every sample and the machine")
    options = parser.parse_args()
    if extension._C is None:
        sys.exit(f"nothing to measure: {extension.missing()}")
    (on_cuda if torch.cuda.is_available() else on_cpu)(options.rounds, options.json)


if __name__ == "__main__":
    main()
