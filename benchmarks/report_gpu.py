"""The tables of docs/gpu.md: where a step's time goes, what was predicted, the sweep of forms and tiles, the checks."""
import json
import statistics

from benchmarks import RESULTS
from benchmarks.tables import MISSING, device_of, small, table


def sections(records):
    """{name: markdown} of the generated sections of docs/gpu.md."""
    return {"predicted": predicted(records), "step": step_times(records), "sweep": swept(records), "mlp": mlp_forms(records),
            "mlp steps": mlp_steps(records), "attention forms": attention_forms(records), "checks": checked(records)}


# Which row of the sweep GPT-2 124M's step takes on an H100: {start of a group's name: row}.
SHIPPED = {"attention forward": "cuDNN", "attention backward": "hopper", "MLP forward": "hopper",
           "MLP backward": "hopper", "loss rows": "4 chunks", "add + LayerNorm": "ours"}
SWEPT_PEERS = ("cuDNN", "cuDNN packed", "flash", "PyTorch", "compile")


def swept(records):
    """Forms and tiles of the sweep: what the step takes, the fastest of ours, and PyTorch's."""
    newest, rows = {}, []
    for record in records:
        if record["benchmark"] == "sweep" and "dropout" not in record["group"]:
            newest[record["group"]] = record
    for name, record in newest.items():
        key = next((start for start in SHIPPED if name.startswith(start)), None)
        if key is None:
            continue
        median = {row: 1e6 * statistics.median(samples) for row, samples in record["samples"].items()}
        ours = {row: us for row, us in median.items() if row not in SWEPT_PEERS and row != "the product alone"
                and not row.startswith(("cuDNN", "TMA", "specialised"))}
        row = SHIPPED[key]
        fastest = min(ours, key=ours.get) if ours else None
        best = f"{ours[fastest]:,.0f} ({fastest})" if fastest else ""
        peers = [f"{median[peer]:,.0f}" if peer in median else "" for peer in ("cuDNN", "cuDNN packed", "flash")]
        plain = next((f"{median[peer]:,.0f}" for peer in ("PyTorch", "compile") if peer in median), "")
        taken = f"{median[row]:,.0f}" if row in median else "not timed together"
        rows.append([name, f"{taken} ({row})", best, *peers, plain])
    if not rows:
        return MISSING
    head = ["us", "the step takes", "our fastest", "cuDNN", "cuDNN, packed gradient", "flash", "PyTorch or torch.compile"]
    last_one = list(newest.values())[-1]
    return table(head, rows) + small(last_one, lambda r: "medians, cold caches, in turns; python -m benchmarks.gpu.sweep")


def predicted(records):
    """What was predicted before the first run, beside what was measured."""
    path = RESULTS / "predictions.json"
    if not path.exists():
        return MISSING
    said = json.loads(path.read_text(encoding="utf-8"))
    rows = [[what, f"{value:,g}", "" if (found := _measured(records, what)) is None else _figure(found), unit, why] for what, value, unit, why in said["rows"]]
    head = ["", "predicted", "measured", "", "predicted from"]
    text = table(head, rows) + f"\n\n<sub>{said['written']}; {said['card']}</sub>"
    for later in said.get("later", ()):
        rows = [[what, f"{value:,g}", "not measured yet" if (found := _measured(records, what, later.get("commits", ()))) is None
                 else _figure(found), unit, why] for what, value, unit, why in later["rows"]]
        text += "\n\n" + table(head, rows) + f"\n\n<sub>{later['written']}</sub>"
    return text


def _figure(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _measured(records, what, commits=None):
    """The measured figure for a prediction's name, or None. commits: only records of these."""
    records = [r for r in records if commits is None or r["environment"]["commit"] in commits]
    words, _, row = what.rpartition(", ")
    if what.startswith(("generate ", "prefill ")):
        B = int(what.split("B=")[1].split(",")[0])
        record = next((r for r in records if r["benchmark"] == "generate" and device_of(r) == "cuda" and r["batch_size"] == B), None)
        found = record and record["variants"][row]
        return found and (found["tokens_per_s"] if what.startswith("generate") else 1e3 * found["prefill_s"])
    if " forward + backward B=" in what:
        case = words.replace(" forward + backward", "")
        record = next((r for r in reversed(records) if r["benchmark"] == "kernel" and device_of(r) == "cuda" and r["direction"] == "both"
                       and case == f"{r['op']} " + " ".join(f"{key}={value}" for key, value in r["shape"].items())), None)
        return 1e6 * statistics.median(record["samples"][row]) if record and row in record["samples"] else None
    if what.startswith("MLP ") and words.endswith("by forms"):
        record = next((r for r in records if r["benchmark"] == "mlp forms" and f"rows={r['rows']} C={r['C']} " in words), None)
        return record["median_us"][what.split()[1]][row] if record else None
    if what.startswith("train "):
        model, B = what.split()[1], int(what.split()[2].split("x")[0])
        # the first record that has both: the prediction was for that code
        record = next((r for r in records if r["benchmark"] == "train" and device_of(r) == "cuda" and r["options"]["model"] == model
                       and r["shape"]["batch_size"] == B and "samples" in r["variants"].get("our trainer" if "over" in row else row, ())), None)
        ms = {name: 1e3 * statistics.median(found["samples"]) for name, found in (record["variants"] if record else {}).items()
              if "samples" in found}
        if row == "our trainer over nanoGPT compiled":
            return ms["nanoGPT compiled"] / ms["our trainer"] if {"our trainer", "nanoGPT compiled"} <= ms.keys() else None
        return ms.get(row)
    group = what if what.startswith("loss kernel") else words
    record = next((r for r in reversed(records) if r["benchmark"] == "sweep" and r["group"] == group), None)
    if record is None:
        return None
    us = {name: 1e6 * statistics.median(samples) for name, samples in record["samples"].items()}
    if row in us:
        return us[row]
    rival = ("cuDNN", "flash", "PyTorch", "the product alone", "pointwise", "compile", "hopper")    # and what came later
    ours = [value for name, value in us.items() if not name.startswith((*rival, "TMA", "specialised")) and (row != "epilogue" or "epilogue" in name)]
    return min(ours, default=None)


# What a kernel in a step's profile does, by a part of its name; the first match counts.
KINDS = (("attention", ("cudnn", "backward_head", "backward_dq", "backward_dkdv", "fort_native_sdpa", "cat_transpose", "unsafe_view_cat",
                        "::dq_kernel", "::dkdv_kernel")),
         ("matmuls", ("nvjet", "gemm", "cublasLt", "splitKreduce")), ("MLP's products with GELU in them", ("linear_dact", "linear_act")),
         ("loss", ("_loss_kernel", "_dlogits", "log_softmax", "nll_loss")), ("GELU", ("_act_kernel", "_dact_kernel", "gelu")),
         ("residual add and LayerNorm", ("native_layer_norm", "_backward_kernel", "_forward_kernel", "_sum_partials")),
         ("embeddings", ("_embed_kernel", "runs_kernel", "embedding", "RadixSort")),
         ("gradient norm, AdamW, half-precision copies", ("multi_tensor_apply", "_adamw_")))


def kind_of(kernel):
    if kernel == "forward_kernel":
        return "attention"
    return next((kind for kind, words in KINDS if any(word in kernel for word in words)), "everything else")


def step_times(records):
    """Where the time of a step of 64 x 1024 tokens goes, by what its kernels do."""
    record = next((r for r in reversed(records) if r["benchmark"] == "train" and device_of(r) == "cuda"
                   and r["shape"]["batch_size"] == 64 and r["options"]["model"] == "gpt2" and any("kernels" in v for v in r["variants"].values())), None)
    if record is None:
        return MISSING
    found = {name: row["kernels"] for name, row in record["variants"].items() if "kernels" in row}
    # Profiles without "host" were taken when a kernel with a lambda in its name, as some of PyTorch's copies have, was left out.
    lacking = "" if any("host" in row for row in record["variants"].values()) else "; without the kernels that have a # in their names"
    kinds = [kind for kind, _ in KINDS] + ["everything else"]
    spent = {name: {kind: sum(us for kernel, _, us in kernels if kind_of(kernel) == kind) / 1e3 for kind in kinds}
             for name, kernels in found.items()}
    rows = [[kind, *(f"{spent[name][kind]:.2f}" for name in found)] for kind in kinds]
    rows.append(["all kernels", *(f"{sum(spent[name].values()):.2f}" for name in found)])
    rows.append(["launches", *(f"{sum(calls for _, calls, _ in kernels):.0f}" for kernels in found.values())])
    rows.append(["a step, timed", *(f"{1e3 * statistics.median(record['variants'][name]['samples']):.2f}" for name in found)])
    return table(["ms", *found], rows) + small(record, lambda r: (
        f"{r['shape']['batch_size']} x {r['shape']['block_size']} tokens, {r['dtype']}; PyTorch's profiler over a few steps after the timed "
        "ones, when the card was cooler: the sums are a little below the timed step" + lacking))


def mlp_forms(records):
    """The MLP's matmul with its activation by form, at each size that was timed, in microseconds."""
    found = [record for record in records if record["benchmark"] == "mlp forms"]
    if not found:
        return MISSING
    columns = [("forward", "the product alone"), ("forward", "pointwise"), ("forward", "hopper"), ("backward", "pointwise"), ("backward", "epilogue"),
               ("backward", "hopper"), ("backward", "hopper, bias gradient")]
    rows = [[f"{r['rows']:,} x {r['C']:,}", *(f"{r['median_us'][way][name]:,.0f}" for way, name in columns)] for r in found]
    head = ["rows x C", *(f"{way}, {name}" if name != "the product alone" else "cuBLAS's product alone" for way, name in columns)]
    return table(head, rows) + small(found[-1], lambda r: f"us; {r['note']}")


def attention_forms(records):
    """Attention's backward by Triton's kernels and by those for Hopper, at each size that was timed, in microseconds."""
    found = [record for record in records if record["benchmark"] == "attention forms"]
    if not found:
        return MISSING
    rows = [[f"{r['B']} x {r['T']:,}, {r['H']} heads of {r['D']}", *(f"{r['median_us'][name]:,.0f}" for name in ("triton", "hopper")),
             f"{r['median_us']['triton'] / r['median_us']['hopper']:.2f}", *(f"{us:,.0f}" for us in r["kernels_us"].values())] for r in found]
    return table(["", "Triton", "Hopper", "times", *found[0]["kernels_us"]], rows) + small(found[-1], lambda r: f"us; {r['note']}")


def mlp_steps(records):
    """What each step brought while the MLP's kernel for Hopper was written."""
    found = [record for record in records if record["benchmark"] == "mlp steps"]
    rows = [[r["what"], f"{r['median_us']['forward']:,.0f}", f"{r['median_us']['backward']:,.0f}"] for r in found]
    if not rows:
        return MISSING
    return table(["us", "forward", "backward"], rows) + "\n\n<sub>each row of another call, on a card of the same kind; medians of 9 to 15 samples</sub>"


def checked(records):
    """The newest outcome of each check of `benchmarks.gpu.smoke`."""
    newest = {(r["part"], r["check"]): r for r in records if r["benchmark"] == "smoke"}
    if not newest:
        return MISSING
    def how(r):
        return "FAILED" if r["failed"] is not None else "not run" if str(r["found"]).startswith("not run") else "right"
    rows = [[part, check, how(r), r["environment"]["commit"]] for (part, check), r in newest.items()]
    return table(["", "", "", "commit"], rows)
