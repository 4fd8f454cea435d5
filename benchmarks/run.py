"""Time every op against its peers, for publication: `nanogpt-fast bench op` into the result files of this folder.

    python -m benchmarks.run [--device=cuda|cpu] [--only=attention,MLP] [--implementations=ours,eager] [--minutes=N]
"""
import sys

from benchmarks import RESULTS
from nanogpt_fast import devices, options
from nanogpt_fast.bench import op


def main(argv=None):
    o = options.parse(op.BenchOpOptions, sys.argv[1:] if argv is None else argv, "python -m benchmarks.run")
    device = devices.make_current(devices.choose_device(o.device))
    if not o.json and not o.quick:
        o.json = str(RESULTS / f"{device.type}.jsonl")
    return op.run(o, device, devices.choose_dtype("bfloat16" if device.type == "cuda" else "float32", device))


if __name__ == "__main__":
    sys.exit(main())
