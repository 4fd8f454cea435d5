"""Time every op against its peers, for publication: the cases of cases.py, every sample written to a file.

    python -m benchmarks.run [--device cuda|cpu] [--only attention,MLP] [--implementations ours,eager] [--minutes N]

The implementations of a case take turns. On a GPU: events, cold caches, inputs that rotate (measure.interleaved_on_gpu); on a
CPU its clock. The rates that the machine reaches in copies and matmuls are measured first, in the same run: a row's share is of those.
Each case is appended to the file as soon as it is timed, and none begins after the minutes are over.
"""
import argparse
import time

import torch

from benchmarks import RESULTS
from benchmarks.cases import cases
from nanogpt_fast.bench import measure


def main(argv=None):
    args = arguments(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = args.json or RESULTS / f"{device.type}.jsonl"
    until = time.monotonic() + 60 * args.minutes
    limits = measure.limits(device) if not args.quick else {"copy": 1e10, "matmul": 1e11}
    print(f"{device}: copies at {limits['copy'] / 1e9:,.0f} GB/s, bf16 matmuls at {limits['matmul'] / 1e12:,.1f} TFLOP/s",
          flush=True)
    words = [word for word in args.only.split(",") if word]
    names = [name for name in args.implementations.split(",") if name] or None
    left = [case for case in cases(device.type, args.quick) if not words or any(word in case.name for word in words)]
    for done, case in enumerate(left):
        if time.monotonic() > until:
            print(f"out of time: {len(left) - done} of {len(left)} cases were not started")
            break
        if names and not names & case.implementations.keys():
            continue
        time_case(case, device, names, args, limits, until, path)


def time_case(case, device, names, args, limits, until, path):
    """Time one case, print it, append it to the file."""
    skipped = [name for name in args.without.split(",") if name]
    names = [name for name in case.implementations if (not names or name in names) and name not in skipped]
    runs, absent = case.runs(device, names)
    timed = measure.interleaved_on_gpu if device.type == "cuda" else measure.interleaved
    samples = timed(runs, args.rounds, until=until)
    median = measure.medians(samples)
    print(case.name)
    for name, seconds in sorted(median.items(), key=lambda item: item[1]):
        print(f"  {name:<24} {1e6 * seconds:>10.1f} us  {share(case, seconds, limits)}")
    for name, why in absent.items():
        print(f"  {name:<24} not here: {why}")
    print(end="", flush=True)
    measure.append(path, "kernel", device=device.type, op=case.op, shape=case.shape, sweep=case.sweep, direction=case.direction,
                   dtype=str(case.dtype).removeprefix("torch."), bytes=case.bytes, flops=case.flops, bound=case.bound,
                   limits=limits, samples=samples, absent=absent)


def share(case, seconds, limits):
    """A time as a rate, and as a share of the limit that bounds this case."""
    done, unit, scale = (case.bytes, "GB/s", 1e9) if case.bound == "copy" else (case.flops, "TFLOP/s", 1e12)
    return f"{done / seconds / scale:>9,.1f} {unit:<7} {100 * done / seconds / limits[case.bound]:>4.0f} % of {case.bound}"


def arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--only", default="", help="cases whose name contains one of these words")
    parser.add_argument("--implementations", default="", help="these alone")
    parser.add_argument("--without", default="", help="not these; 'compile max-autotune' needs minutes to compile")
    parser.add_argument("--rounds", type=int, default=50, help="samples of each implementation")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no case after so long")
    parser.add_argument("--json", help="default: benchmarks/results/DEVICE.jsonl")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the machinery, measures nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
