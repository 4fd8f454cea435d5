"""The stages, most valuable first: correctness; the training step beside compiled nanoGPT; where its time goes; the sweep; the rest.

    python -m benchmarks.gpu DIR [all|first|second|rest] [MINUTES] [--upstream DIR] [--more DIR] [--only NAME,NAME]

DIR gets log.txt (the output of all stages, as it comes), results.jsonl (every result, at once), failures.txt (every failed test),
stages.jsonl, summary.txt, and more.tar.gz with the large files (traces, tables). NANOGPT_FAST_COMMIT names the commit if the tree
came without its history; NANOGPT_FAST_DRY_RUN=1 runs the same stages on a CPU, to test the machinery, and measures nothing.
"""
import argparse
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu import ahead
from benchmarks.gpu.lease import Lease, Stage
from nanogpt_fast import tables

PYTHON = sys.executable
# For the first run: what trains and generates, one case a test, at most 150 kernels to compile (tests/benchmarks/test_gpu_kit.py counts them).
CORE_TESTS = [f"tests/kernels/test_{name}.py" for name in (
    "training_kernels", "model", "adamw", "sums_in_place", "apart", "decode_kernels", "attention_autograd", "cross_entropy_autograd", "mlp_autograd")]
KERNEL_TESTS = CORE_TESTS + [f"tests/kernels/test_{name}.py" for name in (
    "embedding_kernels", "decode_rows_kernels", "layer_norm_autograd", "dropout", "cross_entropy", "layer_norm", "attention", "attention_decode", "mlp",
    "memory", "swap_kernels")] + ["tests/ops/test_attention_hopper.py", "tests/ops/test_mlp_hopper.py"]


def stages(part, folder, more, upstream, dry):
    """The Stages of a part. A dry run has the same names in the same order, and runs whatever a CPU can of each."""
    results = folder / "results.jsonl"
    device = ["--device=cpu"] if dry else []
    upstream = [f"--upstream={upstream}"] if upstream else []
    architecture = "90" if dry else subprocess.run(
        [PYTHON, "-c", 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))'], capture_output=True,
        text=True).stdout.strip()

    def module(name, *words):
        return [PYTHON, "-m", name, *words]

    def smoke(part):
        words = ["--device", "cpu"] if dry else []
        return module("benchmarks.gpu.smoke", part, "--json", results, *words)

    def train(B, only, *words):
        shape = ["--model=tiny", "--rounds=1", "--steps=1", "--apart=False"] if dry else ["--model=gpt2", f"--batch_size={B}"]
        words = [word for word in words if not dry or word.startswith("--json=")]
        return module("nanogpt_fast", "bench", "train", *shape, f"--only={only}", *words, *upstream, *device)

    def warm(B, only):
        return train(B, only, "--rounds=1", "--steps=1", "--again=False")

    def verify(*only):
        return module("nanogpt_fast", "verify", "--quick", f"--only={','.join(only)}",
                      f"--json={more / ('verify-' + only[0] + '.json')}")

    def tests(*paths, workers=8):
        if dry:     # in the interpreter (`environment`)
            paths, workers = ("tests/kernels/test_training_kernels.py",), 2
        return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.failures", "-n", str(workers), *paths]

    environment = {"NANOGPT_FAST_FAILURES": str(folder / "failures.txt"), "OMP_NUM_THREADS": "1"}
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "NANOGPT_FAST_EXAMPLES": "1"}
    few = {**environment, "NANOGPT_FAST_EXAMPLES": "1"}
    more_examples = environment if dry else {**environment, "NANOGPT_FAST_EXAMPLES": "8"}
    one = {"OMP_NUM_THREADS": "2"}
    interpreted = {**one, "TRITON_INTERPRET": "1"} if dry else one
    first = [
        Stage("machine", smoke("machine"), 60),
        Stage("build", module("nanogpt_fast", "doctor") if dry else ["env", "NANOGPT_FAST_CUDA=1",
              f"NANOGPT_FAST_CUDA_ARCHS={architecture}", PYTHON, "setup.py", "build_ext", "--inplace"], 90),
        Stage("warm 64", warm(64, "nanoGPT compiled"), 110, after=("machine",), environment=one),
        Stage("ops", smoke("small" if dry else "ops"), 90, after=("machine", "build"), environment=interpreted),
        Stage("verify attention", verify("attention", "layer_norm"), 90, after=("build", "machine"), environment=one),
        Stage("verify mlp", verify("mlp"), 90, after=("build", "machine"), environment=one),
        Stage("tests", tests(*CORE_TESTS), 90, after=("build", "machine"), environment=few),
        Stage("warm 12", warm(12, "nanoGPT compiled"), 110, after=("build", "machine"), environment=one),
        Stage("verify loss", verify("cross_entropy", "sample", "decode", "gpt"), 90, after=("warm 64", "build"), environment=one),
        Stage("model", smoke("model"), 90, after=("warm 64", "ops"), environment=one),
        Stage("train 64", train(64, "nanoGPT compiled,our trainer,one import", "--rounds=4", "--steps=8", "--profile=3",
                                "--again=False", f"--traces={more}", f"--json={results}"), 170, alone=True),
        Stage("train 12", train(12, "nanoGPT compiled,our trainer,one import", "--rounds=5", "--steps=20", "--profile=3",
                                "--again=False", f"--traces={more}", f"--json={results}"), 100, alone=True),
        Stage("captured", tests("tests/training/test_captured.py", "tests/ops/test_sample.py", workers=6), 60, alone=True,
              environment=more_examples),
    ]
    sweep = module("benchmarks.gpu.sweep", "--json", results, *(["--device", "cpu"] if dry else []))
    trained = "nanoGPT compiled,our trainer"
    by_name = {stage.name: stage for stage in first}
    second = [
        by_name["build"], replace(by_name["warm 64"], after=()), replace(by_name["warm 12"], after=()),
        Stage("sweep compiles", [*sweep, "--compile_only"], 100, environment=one),
        Stage("more tests", tests("tests/training/test_captured.py", *KERNEL_TESTS[::-1], workers=6), 75, after=("build",),
              environment=more_examples),
        Stage("sweep", [*sweep, "--workers", "0"], 60, alone=True),
        Stage("train 64 again", train(64, f"{trained},our trainer compiled,one import compiled", "--rounds=4", "--steps=8", "--again=False",
                                      "--profile=3", f"--json={results}"), 130, alone=True),
        Stage("train 12 again", train(12, trained, "--rounds=5", "--steps=20", "--again=False", f"--json={results}"),
              60, alone=True),
    ]
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"] if not dry else []
    baby = [*train(64, "nanoGPT compiled,our trainer", "--rounds=5", "--steps=50", "--again=False", f"--json={results}"),
            *([] if dry else ["--model=baby"])]
    kernels = module("benchmarks.run", "--without", "compile max-autotune", *(["--device", "cpu", "--quick"] if dry else []))
    variations = "our trainer,trainer with"
    rest = [
        by_name["build"],
        Stage("warm baby", [*warm(64, "nanoGPT compiled,our trainer"), *([] if dry else ["--model=baby"])], 70, after=("build",), environment=one),
        Stage("warm kernels", [*kernels, "--rounds", "1", "--minutes", "0.8", "--json", more / "warm-kernels.jsonl"], 65, after=("build",),
              environment=one),
        Stage("sanitizer", [*sanitizer, *smoke("small")], 70, after=("build",), environment=interpreted),
        Stage("tests again", tests(*KERNEL_TESTS[::-1], "tests/training/test_captured.py", workers=9), 100, after=("build",), environment=few),
        Stage("generate", module("nanogpt_fast", "bench", "generate", "--rounds=2", f"--json={results}", *upstream, *(
            ["--model=tiny", "--device=cpu", "--batch_sizes=1", "--prompt=4", "--tokens=8"] if dry else [])), 90, alone=True),
        Stage("baby", baby, 40, alone=True),
        Stage("kernels", [*kernels, "--rounds", "20", "--json", results], 75, alone=True),
        Stage("tune", module("nanogpt_fast", "tune", "--minutes=2", "--out", folder / "tuned.json", *(["--model=tiny", "--device=cpu"] if dry else [
            "--model=gpt2", "--batch_size=64"])), 150, alone=True),
        Stage("ncu", smoke("small") if dry else ["ncu", "--clock-control", "none", "--set", "full", "--launch-count", "12", "--kernel-name",
              "regex:backward_dq|backward_dkdv|forward_kernel|_loss_kernel|_act_kernel", *smoke("small")], 40, alone=True),
        Stage("variations", train(64, variations, "--rounds=3", "--steps=8", "--again=False", f"--json={results}"), 100, alone=True),
    ]
    every = {stage.name: stage for stage in [*first, *second, *rest]}
    return {"first": first, "second": second, "rest": rest, "all": list(every.values())}[part]


def keep_code(folder, most=400):
    """Copy what Triton compiled of our kernels, PTX and machine code, into the folder: the newest `most` files of its cache."""
    found = [path for path in ahead.triton_cache().glob("*/*") if path.suffix in (".ptx", ".cubin")]
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(found, key=lambda path: -path.stat().st_mtime)[:most]:
        (folder / f"{path.parent.name[:8]}-{path.name}").write_bytes(path.read_bytes())


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", nargs="?", default="all", choices=("all", "first", "second", "rest"))
    parser.add_argument("minutes", nargs="?", type=float, help="stop by then; default: no limit")
    parser.add_argument("--upstream", default="", help="a nanoGPT checkout to run beside ours")
    parser.add_argument("--more", type=Path, help="where large files go first; default: DIR/more")
    parser.add_argument("--only", default="", help="the stages of these names, separated by commas; of a word that is no name, all that contain it")
    args = parser.parse_args(argv)
    folder, more = args.folder.resolve(), (args.more or args.folder / "more").resolve()
    for path in (folder, more):
        path.mkdir(parents=True, exist_ok=True)
    lease = Lease(folder, None if args.minutes is None else 60 * args.minutes)
    dry = bool(os.environ.get("NANOGPT_FAST_DRY_RUN"))
    carried = 0 if dry else ahead.seed()
    listed = stages(args.part, folder, more, args.upstream, dry)
    words = [word for word in args.only.split(",") if word]
    all_names = {stage.name for stage in listed}
    listed = [stage for stage in listed
              if not words or any(word == stage.name if word in all_names else word in stage.name for word in words)]
    names = {stage.name for stage in listed}
    for stage in listed:
        stage.after, stage.needs = (tuple(name for name in wanted if name in names) for wanted in (stage.after, stage.needs))
        if args.minutes is None:
            stage.seconds *= 10
    ended = lease.run(listed)
    keep_code(more / "code")
    with tarfile.open(folder / "more.tar.gz", "w:gz", compresslevel=3) as archive:
        archive.add(more, arcname="more")
    lines = [f"{carried} kernels compiled ahead were carried", tables.table(("stage", "how it ended"), ended.items(), align="l")]
    results = folder / "results.jsonl"
    if results.exists():
        checks = [record for record in map(json.loads, results.read_text().splitlines()) if record["benchmark"] == "smoke"]
        rows = [(record["part"], record["check"], "FAILED" if record["failed"] else "right") for record in checks]
        lines += [tables.table(("part", "check", ""), rows, align="l")] if rows else []
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n== summary\n" + "\n".join(lines))
    return 0 if all(how == "passed" for how in ended.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
