"""What competes on a GPU, run by the kernels themselves: each entry launches the form and the tile that it names, and is right."""
import pytest
import torch
from nanogpt_fast.kernels import attention_backward, attention_forward, cross_entropy, fastest, layer_norm, mlp

from nanogpt_fast import backend
from nanogpt_fast.ops import mlp as op
from nanogpt_fast.tuning import contest as rules, contests

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPE = dict(B=1, T=48, C=64, H=2, V=65, layers=2, bias=True, dropout=0.0, device=DEVICE, cuda=True, dtype=torch.bfloat16)
# In the interpreter "auto" takes no kernel, and there is neither cuDNN nor an sm_90 kernel.
ELSEWHERE = ("PyTorch", "cudnn", "hopper")


@pytest.fixture
def listed(monkeypatch):
    """(shape -> contests) with our kernels taken everywhere, and what they launched: [(kernel, options)]."""
    fused = backend.parse("fused")
    monkeypatch.setattr(contests, "AUTO", fused)
    if not ON_GPU:
        monkeypatch.setattr(contests.Shape, "number", fastest.INTERPRETER)
    launched = []

    def spy(module, name):
        kernel = getattr(module, name)

        class Spy:
            def __getitem__(self, grid):
                def launch(*args, **options):
                    launched.append((name, options))
                    return kernel[grid](*args, **options)
                return launch
        monkeypatch.setattr(module, name, Spy())
    for module, *names in ((attention_forward, "forward_kernel"), (attention_backward, "backward_head_kernel", "backward_dq_kernel", "backward_dkdv_kernel"),
                           (layer_norm, "_forward_kernel", "_backward_kernel"), (mlp, "_linear_act_kernel", "_linear_dact_kernel", "_act_kernel", "_dact_kernel"),
                           (cross_entropy, "_loss_kernel")):
        for name in names:
            spy(module, name)
    return lambda **more: contests.contests(contests.Shape(**SHAPE | more)), launched


@pytest.mark.parametrize("title, kernel, sizes", (
    ("attention forward", "forward_kernel", ("BLOCK_M", "BLOCK_N")), ("attention dk, dv", "backward_dkdv_kernel", ("BLOCK_M", "BLOCK_N")),
    ("attention dq", "backward_dq_kernel", ("BLOCK_M", "BLOCK_N")), ("add + LayerNorm forward", "_forward_kernel", ("ROWS",)),
    ("add + LayerNorm backward", "_backward_kernel", ("ROWS",)), ("loss, tile", "_loss_kernel", ("BLOCK_V",))))
def test_each_tile_is_launched_and_right(listed, title, kernel, sizes):
    make, launched = listed
    found = next(contest for contest in make() if contest.title == title)
    inputs = found.make()
    expected = found.expected(dict(inputs))
    entries = {label: rows for label, rows in found.entries.items() if label not in ELSEWHERE}
    for label in list(entries)[::1 if ON_GPU else 3]:       # in the interpreter every third
        launched.clear()
        assert rules.check(found, label, inputs, expected) is None, label
        options = [options for name, options in launched if name == kernel]
        tile = next((row.tile for row in entries[label] if row.tile is not None), None)
        if tile is not None:
            wanted = [size for size in tile[:3] if size]
            assert options and all([o[size] for size in sizes] == wanted[:len(sizes)] and o["num_warps"] == tile.num_warps for o in options), label


def test_each_form_is_launched_and_right(listed, monkeypatch):
    make, launched = listed
    if not ON_GPU:      # the op takes the pointwise form on a CPU
        monkeypatch.setattr(op, "_faster_forms", lambda x, w_fc, b_fc, activation: op.listed_forms(
            fastest.INTERPRETER, fastest.column(x.dtype), x.size(-1), x.numel() // x.size(-1), b_fc is not None, ("hopper",)))
    kernels = {"pointwise": {"_act_kernel"}, "epilogue": {"_linear_act_kernel"}, "split": {"backward_dq_kernel", "backward_dkdv_kernel"},
               "head": {"backward_head_kernel"}}
    seen = set()
    for found in make():
        if found.title not in ("MLP forward", "MLP backward", "attention backward"):
            continue
        inputs = found.make()
        expected = found.expected(dict(inputs))
        done = set()
        for label in found.entries:
            form = label.split()[0]
            if form not in kernels or form in done and not ON_GPU:
                continue
            done.add(form)
            launched.clear()
            assert rules.check(found, label, inputs, expected) is None, label
            names = {name for name, _ in launched}
            backward = {"_act_kernel": "_dact_kernel", "_linear_act_kernel": "_linear_dact_kernel"}
            wanted = {backward.get(name, name) for name in kernels[form]} if found.title == "MLP backward" else kernels[form]
            assert wanted <= names, (found.title, label, names)
            seen.add((found.title, form))
    assert len(seen) == 6


def test_a_wrong_tile_is_found(listed, monkeypatch):
    """A kernel that is right in one tile and wrong in another: the wrong entry is reported."""
    make, _ = listed
    found = next(contest for contest in make() if contest.title == "add + LayerNorm forward")
    inputs = found.make()
    expected = found.expected(dict(inputs))
    launch = layer_norm.launch_forward

    def wrong(*args):
        s, y, statistics = launch(*args)
        return s, y * (1.1 if layer_norm.tile_for("forward", 64, fastest.INTERPRETER if not ON_GPU else 0, 48).BLOCK_M == 8 else 1), statistics
    monkeypatch.setattr(layer_norm, "launch_forward", wrong)
    reasons = {label: rules.check(found, label, inputs, expected) for label in found.entries if "PyTorch" not in label}
    assert [label for label, reason in reasons.items() if reason is not None] == [label for label in reasons if label.startswith("8,")]
