"""Which public repositories' models `accelerate` swaps, and whether they still compute the same: the table in docs/swap.md.

    python -m benchmarks.swap_table --checkouts DIR                  run all, keep the results, print the table
    python -m benchmarks.swap_table --checkouts DIR --only minGPT    print one result, keep nothing
    python -m benchmarks.report --write                              put the kept results into docs/swap.md

DIR holds the checkouts, each in a folder named owner+name, or name alone. Nothing is downloaded, and nothing of a repository is kept but
its name, its commit, the names of its classes and what was measured. Each repository runs in a separate process. Of a script that trains
on import, only imports, constants, functions and classes are executed.

What runs. Each model is made small, with its own classes, random weights and without dropout, and called plain and accelerated with
backend="fused": our Triton kernels, on a CPU in Triton's interpreter. Outputs and the gradients of all parameters are compared with those of
the same model in float64: plain's error and ours, relative, in the 2-norm, the largest of all tensors; in float32 and under bf16 autocast.
"Equal" requires that

    what is returned        has the same structure, types and shapes,
    our error               is at most 2 times plain's (gradients: 3 times), and in float32 1e-6 more, which is eight times its rounding,
    nothing is left         switched off (backend="reference") and after `restore` the result has the same bits as plain, in train and in eval mode.
"""
import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import time
import types
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.swap_repositories import REPOSITORIES
from benchmarks.tables import table

ROOT = Path(__file__).parent.parent
RESULT = RESULTS / "swap.json"
FORWARD, GRADIENTS, ROUNDING = 2, 3, {"float32": 1e-6, "bfloat16": 0.0}
SECONDS = 600


# --------------------------------------------------------------------------------------------------------------- one of them

def examine(name, root):
    """A row: what was swapped, what was not and why, the errors, and whether it is equal."""
    import nanogpt_fast
    title, build = REPOSITORIES[name]
    row = {"repository": name, "commit": commit_of(root), "model": title}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            make, call = build(root)
            exact = run(made(make, torch.float64), call, torch.float64)
            plain = {precision: run(made(make), call, precision) for precision in (torch.float32, torch.bfloat16)}
    except Exception as error:
        return {**row, "cannot": f"{type(error).__name__}: {error}"[:300]}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            row |= compared(nanogpt_fast, make, call, exact, plain)
    except Exception as error:
        row |= {"equal": False, "why": [f"accelerated it raises {type(error).__name__}: {error}"[:300]]}
    return row


def compared(nanogpt_fast, make, call, exact, plain):
    why, errors, row = [], {}, {}
    model = made(make)
    try:
        report = nanogpt_fast.accelerate(model, backend="fused")
    except TypeError as error:
        report = None
        row |= {"swapped": {}, "kernels": {}, "own": {}, "left": {str(error).split(";")[0]: 1}}
    for precision, expected in plain.items():
        name = str(precision).removeprefix("torch.")
        found = run(model, call, precision)
        if found.structure != expected.structure:
            why.append(f"it returns {found.structure}, not {expected.structure}")
            continue
        errors[name] = {}
        for what, times in (("outputs", FORWARD), ("gradients", GRADIENTS)):
            ours, theirs = (largest(getattr(result, what), getattr(exact, what)) for result in (found, expected))
            errors[name][what] = ours, theirs
            if not ours <= times * theirs + ROUNDING[name]:
                why.append(f"{what} in {name}: off by {ours:.1e}, plain by {theirs:.1e}")
    if report is not None:
        calls = report.calls
        row |= {"swapped": count(row.part for row in report.swapped), "kernels": count(calls, lambda key: key[1] == "kernels"),
                "own": count({(f"{part}: {where.removeprefix('own path: ')}",): n for (part, where), n in calls.items() if where != "kernels"}),
                "left": count(f"{row.cls}: {row.reason}" for row in report.left)}
        nanogpt_fast.accelerate(model, backend="reference")
    for state in ("backend='reference'", "restored"):
        if state == "restored":
            nanogpt_fast.restore(model)
        for training in (True, False):
            same = [run(m, call, torch.float32, training) for m in (model, made(make))]
            if not all(torch.equal(a, b) for a, b in zip(same[0].outputs + same[0].gradients, same[1].outputs + same[1].gradients)):
                why.append(f"{state}: other bits than plain's")
    return {**row, "errors": errors, "equal": not why, "why": why}


def count(items, wanted=None):
    """{name: how many}; of {(name, ...): n}, those that are wanted."""
    counts = {}
    for item in items:
        if wanted is None or wanted(item):
            name, n = (item[0], items[item]) if isinstance(items, dict) else (item, 1)
            counts[name] = counts.get(name, 0) + n
    return counts


class Ran(types.SimpleNamespace):
    """structure: what a call returned, in words; outputs: its floating tensors; gradients: of all parameters that have one."""


def made(make, dtype=torch.float32):
    """The model with random weights, the same each time."""
    torch.manual_seed(0)
    model, generator = make().train(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def run(model, call, precision, training=True):
    """One forward and backward in float64, float32, or under bf16 autocast."""
    model.train(training)
    torch.manual_seed(4)
    torch.set_default_dtype(torch.float64 if precision == torch.float64 else torch.float32)
    for parameter in model.parameters():
        parameter.grad = None
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            result = call(model)
    finally:
        torch.set_default_dtype(torch.float32)
    found = [t for t in tensors(result) if t.is_floating_point()]
    losses = [t for t in found if t.dim() == 0 and t.requires_grad]
    generator = torch.Generator().manual_seed(5)
    losses = losses or [(t * torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t)).sum() for t in found if t.requires_grad]
    sum(losses).backward()
    return Ran(structure=structure(result), outputs=[t.detach() for t in found],
               gradients=[p.grad for p in model.parameters() if p.grad is not None])


def tensors(result):
    if torch.is_tensor(result):
        return [result]
    items = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return [t for item in items for t in tensors(item)]


def structure(result):
    if torch.is_tensor(result):
        return f"{str(result.dtype).removeprefix('torch.')}{tuple(result.shape)}"
    if isinstance(result, dict):
        return f"{type(result).__name__}({', '.join(f'{key}={structure(item)}' for key, item in result.items())})"
    if isinstance(result, (tuple, list)):
        return f"{type(result).__name__}({', '.join(map(structure, result))})"
    return repr(result) if result is None else type(result).__name__


def largest(found, exact):
    """The largest error of corresponding tensors, relative; a tensor that is nearly 0 compared with the others counts less."""
    if len(found) != len(exact):
        return float("inf")
    size = (sum(t.double().square().sum() for t in exact) / max(1, sum(t.numel() for t in exact))).sqrt()
    errors = [((f.double() - e.double()).norm() / (e.double().norm() + 0.1 * size * e.numel() ** 0.5)).item() for f, e in zip(found, exact)]
    return max((float("inf") if error != error else error for error in errors), default=0.0)


# ----------------------------------------------------------------------------------------------------------------- all of them

def commit_of(root):
    found = subprocess.run(["git", "-C", str(root), "log", "-1", "--format=%h %cs"], capture_output=True, text=True)
    return found.stdout.strip()


def checkout(folder, name):
    for path in (folder / name.replace("/", "+"), folder / name.split("/")[1]):
        if path.is_dir():
            return path
    return None


def in_a_process(name, root):
    """`examine` in a process whose Triton interprets."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1",
                   "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.swap_table", "--examine", name, str(root)], cwd=root,
                              env=environment, capture_output=True, text=True, timeout=SECONDS)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        why = (done.stderr.strip().splitlines() or [""])[-1] if not isinstance(error, subprocess.TimeoutExpired) else f"took over {SECONDS} s"
        return {"repository": name, "commit": commit_of(root), "model": REPOSITORIES[name][0], "cannot": why[:300]}


UNKNOWN = "holds no part of a GPT that is known here"       # what accelerate says then
PARTS = {"attention": "attention", "mlp": "MLP", "layer_norm": "LayerNorm", "block": "block", "model": "loop and loss"}


def sections(records=()):
    """The generated sections of docs/swap.md; `records`, the timed results, are not used."""
    results = json.loads(RESULT.read_text(encoding="utf-8"))
    rows, absent = [], []
    for row in results["rows"]:
        if "cannot" in row:
            absent.append(f"{row['repository']}: {row['cannot']}")
            continue
        swapped = ", ".join(f"{row['swapped'][part]} {name}" for part, name in PARTS.items() if row.get("swapped", {}).get(part)) or "nothing"
        on_kernels, own = (sum(row.get(where, {}).values()) for where in ("kernels", "own"))
        left = ["no part is known" if reason.endswith(UNKNOWN) else f"{n} {reason}" for reason, n in row.get("left", {}).items()]
        left += [f"own path, {reason}" for reason in row.get("own", {})]
        errors = ["<br>".join(f"{ours:.0e}/{theirs:.0e}" for ours, theirs in row.get("errors", {}).get(name, {}).values())
                  for name in ("float32", "bfloat16")]
        rows.append([f"{row['repository']} {row['commit'].split()[0]}", row["model"], swapped,
                     f"{on_kernels} of {on_kernels + own}" if on_kernels + own else "", "; ".join(left), *errors,
                     "yes" if row["equal"] else "**no**: " + "; ".join(row["why"])])
    equal, some = sum(row[-1] == "yes" for row in rows), sum(row[2] != "nothing" for row in rows)
    e = results["environment"]
    text = (f"{len(rows)} repositories, in {some} of them something is swapped, {equal} are equal.\n\n"
            + table(["repository, commit", "model", "swapped", "calls on kernels", "not swapped, and why", "float32", "bf16 autocast", "equal"], rows)
            + ("\n\nNot built here: " + "; ".join(absent) + "." if absent else "")
            + f"\n\n<sub>{e['cpu']}; torch {e['torch']}, Triton {e['triton']}, transformers {e['transformers']}, Python {e['python']}; "
              f"commit {e['commit']}, {e['time'][:10]}</sub>")
    return {"public repositories": text}


def environment():
    import transformers
    import triton
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")),
               platform.machine()) if os.path.exists("/proc/cpuinfo") else platform.machine()
    return {"cpu": cpu, "torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "commit": commit_of(ROOT).split()[0], "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap_table", description=__doc__.split("\n")[0])
    parser.add_argument("--checkouts", type=Path, metavar="DIR", help="a folder of checkouts")
    parser.add_argument("--only", metavar="NAME", help="repositories with this in their name; nothing is kept")
    parser.add_argument("--examine", nargs=2, metavar=("REPOSITORY", "CHECKOUT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.examine:
        print(json.dumps(examine(args.examine[0], Path(args.examine[1]))))
        return
    if args.checkouts:
        listed = [name for name in REPOSITORIES if not args.only or args.only in name]
        if not any(checkout(args.checkouts.absolute(), name) for name in listed):
            parser.error(f"--checkouts={args.checkouts}: there is no checkout in it; expected a folder with some of "
                         f"{', '.join(listed) or 'the repositories that this file lists, none of which has ' + args.only + ' in its name'}")
        rows = []
        for name in listed:
            root = checkout(args.checkouts.absolute(), name)
            rows.append(in_a_process(name, root) if root else {"repository": name, "cannot": "no checkout"})
            print(json.dumps(rows[-1]) if args.only else f"{name}: {rows[-1].get('cannot') or rows[-1].get('why') or 'equal'}", flush=True)
        if args.only:
            return
        RESULT.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(sections()["public repositories"])


if __name__ == "__main__":
    main()
