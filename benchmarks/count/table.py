"""Counts as a table: by phase and kind of operation, with the milliseconds that a card should take, and those that one took."""
import json

from benchmarks import RESULTS
from benchmarks.report_gpu import kind_of
from nanogpt_fast import tables

# What a card reaches within a step: FLOP/s of matmuls and of attention, bytes/s of the rest; and by its data sheet, in bf16. H100: the
# measured step of 64 x 1024 tokens (docs/gpu.md), where matmuls run at the power limit. An H200 differs in its memory.
CARDS = {
    "H100": dict(reached=dict(matmul=682e12, attention=296e12, memory=2.7e12), peak=dict(matmul=989e12, attention=989e12, memory=3.35e12)),
    "H200": dict(reached=dict(matmul=682e12, attention=296e12, memory=3.87e12), peak=dict(matmul=989e12, attention=989e12, memory=4.8e12)),
}
KINDS = ("matmul", "attention", "memory")


def totals(operations):
    """{"launches", "bytes", "flops"}, and {kind: (launches, bytes, flops)} in the same dict. "bytes" leaves matmuls out, whose traffic
    hides behind their FLOPs."""
    by_kind = {kind: tuple(sum(getattr(each, what) for each in operations if each.kind == kind) for what in ("launches", "bytes", "flops"))
               for kind in KINDS}
    return dict(launches=sum(each.launches for each in operations), bytes=by_kind["attention"][1] + by_kind["memory"][1],
                flops=by_kind["matmul"][2] + by_kind["attention"][2], **by_kind)


def milliseconds(operations, rates):
    """{kind: ms} of operations at these rates."""
    work = {kind: sum(each.bytes if kind == "memory" else each.flops for each in operations if each.kind == kind) for kind in KINDS}
    return {kind: 1e3 * work[kind] / rates[kind] for kind in KINDS}


def report(title, operations, card, found):
    """The table by phase and kind. found: `measured`."""
    head = ["", "launches", "GB", "TFLOP", "at least, ms", "expected, ms", "measured, ms", "launches"]
    rows = []
    for phase in ("forward", "backward", "update"):
        for kind in KINDS:
            some = [each for each in operations if each.phase == phase and each.kind == kind]
            if some:
                rows.append([f"{phase}, {kind}", *_figures(some, card), "", ""])
    for name, kinds in [(f"all {kind}", (kind,)) for kind in KINDS] + [("all kernels", KINDS)]:
        profiled = ["", ""]
        if found is not None:
            profiled = [f"{sum(found[what][kind] for kind in kinds):.{digits}f}" for what, digits in (("ms", 2), ("launches", 0))]
        rows.append([name, *_figures([each for each in operations if each.kind in kinds], card), *profiled])
    total, profile = totals(operations), "Not measured yet" if found is None else f"Measured: a profile, commit {found['commit']}"
    return "\n".join([
        title, "", tables.table(head, rows), "",
        f"{total['launches']} launches, {total['bytes'] / 1e9:.1f} GB without the matmuls' own, {total['flops'] / 1e12:.1f} TFLOP.",
        "A library call counts as one launch; some are several kernels. At least: at the card's data sheet; expected: at the rates",
        f"that our step of 64 x 1024 tokens reached on an H100. {profile}."])


def _figures(operations, card):
    total = totals(operations)
    least, expected = (sum(milliseconds(operations, CARDS[card][which]).values()) for which in ("peak", "reached"))
    return [str(total["launches"]), f"{sum(total[kind][1] for kind in KINDS) / 1e9:.2f}",
            f"{total['flops'] / 1e12:.2f}" if total["flops"] else "", f"{least:.2f}", f"{expected:.2f}"]


def listing(operations):
    """A table of the operations, equal ones in one line."""
    groups = {}
    for each in operations:
        group = groups.setdefault((each.phase, each.name, each.shapes), [0, 0, 0])
        for i, what in enumerate(("launches", "bytes", "flops")):
            group[i] += getattr(each, what)
    return tables.table(("phase", "operation", "launches", "GB", "TFLOP", "the first shapes"), [
        (phase, name, launches, f"{count / 1e9:.3f}", f"{flops / 1e12:.3f}",
         " ".join(f"{'x'.join(map(str, shape))} {dtype}" for shape, dtype in shapes[:2]))
        for (phase, name, shapes), (launches, count, flops) in groups.items()], align="llrrrl")


def measured(card, model, batch_size, dropout, variant):
    """{"ms", "launches": {kind: ...}, "commit"} of the newest profile of this step on this card, or None."""
    path = RESULTS / f"{card.lower()}.jsonl"
    kinds = {"attention": "attention", "matmuls": "matmul", "MLP's products with GELU in them": "matmul"}
    for line in reversed(path.read_text().splitlines() if path.exists() else []):
        record = json.loads(line)
        if record["benchmark"] != "train" or record["options"]["model"] != model or record["shape"]["batch_size"] != batch_size:
            continue
        row = record["variants"].get(variant, {}) if dropout in (None, record["shape"].get("dropout", 0.0)) else {}
        if "kernels" in row:
            ms, launches = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
            for kernel, calls, us in row["kernels"]:
                kind = kinds.get(kind_of(kernel), "memory")
                ms[kind], launches[kind] = ms[kind] + us / 1e3, launches[kind] + calls
            return dict(ms=ms, launches=launches, commit=record["environment"]["commit"])
    return None
