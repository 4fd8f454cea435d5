"""The training step in parts that CUDA graphs replay: the same steps, bit for bit; what prevents it is said.

Without a GPU the parts are called where a GPU replays them. What records them is replaced by something that only keeps the
function, so that the order of warming up, recording and replaying is seen too. With a GPU the last section runs for real.
"""
import collections
import copy
import dataclasses
import functools
import gc
import weakref
from pathlib import Path

import gpts
import pytest
import tiny
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogpt_fast import backend
from nanogpt_fast.generation.session import Watch
from nanogpt_fast.training import captured
from nanogpt_fast.training.captured import CapturedStep
from nanogpt_fast.training.finetune import freeze, unfreeze
from nanogpt_fast.training.step import TrainingStep
from nanogpt_fast.training.trainer import TrainOptions, train


@pytest.fixture
def folder(tmp_path):
    tiny.data(tmp_path)
    return tmp_path


model_of = functools.partial(gpts.small, seed=1, block_size=16, vocab_size=61, backend="reference")


@pytest.fixture
def replayed(monkeypatch):
    """Let the trainer capture on a CPU; returns the recorders of its runs."""
    recorders = []
    init = CapturedStep.__init__
    def recording(self, *args):
        init(self, *args)
        self.recorder = gpts.Recorder()
        recorders.append(self.recorder)
    monkeypatch.setattr(CapturedStep, "__init__", recording)
    monkeypatch.setattr(captured, "why_not", lambda *args, **kwargs: None)
    return recorders


def weights_of(o, name="last.pt"):
    return torch.load(Path(o.out_dir, name), weights_only=True)


# ---------------------------------------------------------------------------------------------------- the same steps

SETTINGS = [dict(), dict(gradient_accumulation_steps=3, grad_clip=0.3), dict(dtype="bfloat16", gradient_accumulation_steps=2),
            dict(grad_clip=0.0, bias=True)]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s) or "plain")
def test_replayed_steps_are_ordinary_steps_bit_for_bit(settings, folder, replayed):
    settings = dict(max_iters=12, dropout=0.2, weight_decay=0.5, eval_interval=5, **settings)
    ordinary, graphed = tiny.options(folder, "a", cuda_graph="off", **settings), tiny.options(folder, "b", **settings)
    train(ordinary)
    assert replayed == []
    train(graphed)
    assert tiny.losses(graphed) == tiny.losses(ordinary) and len(tiny.losses(ordinary)) == 12
    assert tiny.evaluations(graphed) == tiny.evaluations(ordinary)
    for name in ("ckpt.pt", "last.pt"):  # every tensor and number of them: a checkpoint does not show how its steps were taken
        a, b = weights_of(ordinary, name), weights_of(graphed, name)
        assert flat(a["model"]) == flat(b["model"]) and flat(a["optimizer"]) == flat(b["optimizer"])
    assert {type(group["lr"]) for group in b["optimizer"]["param_groups"]} == {float}
    assert {group["capturable"] for group in b["optimizer"]["param_groups"]} == {False}


def flat(tree, path=()):
    """{path: value} of nested dicts and lists; tensors as lists, so that == compares every bit."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return {path: (tree.dtype, tree.tolist()) if isinstance(tree, torch.Tensor) else tree}
    return {key: value for name, part in items for key, value in flat(part, (*path, name)).items()}


def test_three_steps_run_then_each_part_is_recorded_once_and_replayed(folder, replayed):
    train(tiny.options(folder, max_iters=6, gradient_accumulation_steps=3))
    step = ["_first", "_more", "_more", "_update"]
    warm_up = ["run " + part for part in step] * 3
    fourth = ["record _first", "replay _first", "record _more", "replay _more", "replay _more",
              "record _update", "replay _update"]
    assert replayed[0].log == warm_up + fourth + ["replay " + part for part in step] * 2


def test_without_accumulation_nothing_is_added_to_gradients(folder, replayed):
    train(tiny.options(folder, max_iters=5))
    assert collections.Counter(replayed[0].log) == {"run _first": 3, "run _update": 3, "record _first": 1, "record _update": 1,
                                                    "replay _first": 2, "replay _update": 2}


def test_a_run_stopped_while_replaying_and_resumed_equals_one_that_never_stopped(folder, replayed):
    settings = dict(max_iters=12, dropout=0.2, gradient_accumulation_steps=2, eval_interval=4, sample_tokens=5)
    straight, broken = tiny.options(folder, "a", **settings), tiny.options(folder, "b", **settings)
    train(straight)
    train(dataclasses.replace(broken, max_iters=8, lr_decay_iters=20))
    torch.manual_seed(0)
    train(dataclasses.replace(broken, init_from="resume"))
    assert tiny.losses(broken) == tiny.losses(straight)
    assert flat(weights_of(broken)["model"]) == flat(weights_of(straight)["model"])
    # Nor does it matter whether the second half replays.
    other = tiny.options(folder, "c", **settings)
    train(dataclasses.replace(other, max_iters=8))
    train(dataclasses.replace(other, init_from="resume", cuda_graph="off"))
    assert tiny.losses(other) == tiny.losses(straight)


def test_a_learning_rate_set_between_steps_is_a_tensor_only_during_the_update():
    model = model_of()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    seen = []
    def update():
        seen.extend(group["lr"] for group in optimizer.param_groups)
        optimizer.step()
    def forward_backward(x, y):
        loss = model(x, y)[1]
        loss.backward()
        return loss.detach()
    step = CapturedStep(forward_backward, update, optimizer, (2, 16), torch.device("cpu"))
    before = model.lm_head.weight.detach().clone()
    moved = []
    for lr in (1e-3, 0.0, 1e-3):
        for group in optimizer.param_groups:
            group["lr"] = lr
        step.micro_step(torch.zeros(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long), first=True)
        step.update()
        moved.append(not torch.equal(before, model.lm_head.weight))
        before.copy_(model.lm_head.weight.detach())
        assert all(type(group["lr"]) is float for group in optimizer.param_groups)
    assert moved == [True, False, True]
    assert all(torch.is_tensor(lr) for lr in seen) and seen[0] is seen[2] is seen[4]  # one address: what a graph needs


def test_an_error_in_the_update_leaves_an_ordinary_optimizer():
    optimizer = model_of().configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    def fail():
        raise FloatingPointError
    step = CapturedStep(None, fail, optimizer, (2, 16), torch.device("cpu"))
    with pytest.raises(FloatingPointError):
        step.update()
    for group in optimizer.param_groups:
        assert (type(group["lr"]), group["lr"], group["capturable"]) == (float, 1e-3, False)


# ---------------------------------------------------------------------------------------------------- what prevents it

def hook(model):
    model.transformer.h[1].attn.register_forward_hook(lambda module, args, out: None)


def lora(model):
    class Lora(nn.Linear):
        pass
    model.transformer.h[0].attn.c_attn.__class__ = Lora


def patched(model):
    model.transformer.drop.forward = lambda x: x


@pytest.mark.parametrize("touch, reason", [
    (hook, r"transformer\.h\.1\.attn .*has a hook"), (lora, r"transformer\.h\.0\.attn\.c_attn .*Lora is not one"),
    (patched, r"transformer\.drop .*replaced on the instance")], ids=["hook", "lora", "patched"])
def test_a_touched_module_is_a_reason(touch, reason):
    model = model_of()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    assert captured.why_not(model, optimizer, torch.device("cuda")) is None
    touch(model)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(captured.why_not(model, optimizer, torch.device("cuda")))


def test_what_else_is_a_reason():
    model = model_of()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    cuda = torch.device("cuda")
    assert "need a CUDA device, this one is cpu" in captured.why_not(model, optimizer, torch.device("cpu"))
    assert "2 ranks" in captured.why_not(model, optimizer, cuda, ranks=2)
    assert "GradScaler" in captured.why_not(model, optimizer, cuda, scaled=True)
    assert "SGD has no `capturable`" in captured.why_not(model, torch.optim.SGD(model.parameters(), lr=0.1), cuda)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        assert "anomaly" in captured.why_not(model, optimizer, cuda)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)  # a global one: a profiler's
    try:
        assert "hook" in captured.why_not(model, optimizer, cuda)
    finally:
        handle.remove()


def add_group(model, optimizer):
    unfreeze(model, "transformer.wpe")
    optimizer.add_param_group({"params": [model.transformer.wpe.weight], "lr": 1e-3, "weight_decay": 0.0})


def reload(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


# What a program may change between steps.
STEPS = []      # the step in question is the last
CHANGES = {
    "nothing": lambda model, optimizer: None,
    "the learning rate": lambda model, optimizer: optimizer.param_groups[0].update(lr=1e-4),
    "a block frozen": lambda model, optimizer: freeze(model, "transformer.h.0"),
    "a parameter added": add_group,
    "weight decay": lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=5.0),
    "the moments loaded": reload,
    "a hook on a parameter": lambda model, optimizer: model.transformer.ln_f.weight.register_hook(lambda g: 0 * g),
    "a hook on a module": lambda model, optimizer: model.transformer.ln_f.register_forward_hook(lambda module, args, out: 2 * out),
    "dropout": lambda model, optimizer: setattr(model.transformer.drop, "p", 0.5),
    "evaluation mode": lambda model, optimizer: model.eval(),
    "gradient clipping": lambda model, optimizer: STEPS[-1].__setattr__("grad_clip", 1e-3),
    "accumulation": lambda model, optimizer: STEPS[-1].__setattr__("accumulation", 3),
    "a function of PyTorch": lambda model, optimizer: setattr(F, "gelu", functools.partial(F.gelu, approximate="tanh")),
}


# Those after which a step may wait for the GPU.
WITHOUT_GRAPHS = {"a hook on a module": "transformer.ln_f may wait for the GPU: LayerNorm has a hook",
                  "a function of PyTorch": "transformer.h.0.mlp.gelu may wait for the GPU: torch.nn.functional.gelu was replaced"}


@pytest.mark.parametrize("at", [5, 2], ids=["captured", "not yet"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_whose_model_or_optimizer_was_changed_is_captured_again(change, at, recwarn, monkeypatch):
    backend._noticed.clear()
    steps, batches = [], torch.randint(61, (10, 4, 16), generator=torch.Generator().manual_seed(0))
    for not_captured in ("for comparison", None):
        model = model_of(dropout=0.1)
        freeze(model, "transformer.wpe")
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
        monkeypatch.setattr(F, "gelu", F.gelu)
        step = TrainingStep(model, optimizer, dtype=torch.float32, batch_shape=(4, 16), not_captured=not_captured)
        if step.graphs is not None:
            recorder = step.graphs.recorder = gpts.Recorder()
        STEPS.append(step)
        for i, batch in enumerate(batches):
            if i == at:
                CHANGES[change](model, optimizer)
            torch.manual_seed(i)
            step(lambda: (batch, batch))
        steps.append(STEPS.pop())
        monkeypatch.undo()
    why_not = WITHOUT_GRAPHS.get(change)
    again = at == 5 and change not in ("nothing", "the learning rate")
    assert recorder.log.count("record _first") == 1 + (again and why_not is None) and (steps[1].graphs.recorder is None) == (again and why_not is not None)
    assert [str(w.message) for w in recwarn if "has changed since the training step" in str(w.message)] == again * [
        "nanogpt_fast: the model or the optimizer has changed since the training step was captured in CUDA graphs: "
        + ("it is captured again" if why_not is None else f"from here on it runs without graphs: {why_not}")]
    assert all(torch.equal(a, b) for a, b in zip(*(step.model.parameters() for step in steps), strict=True))


def test_auto_says_what_prevents_it_and_on_refuses(folder, capsys):
    train(tiny.options(folder, max_iters=1))
    assert "graphs  none: CUDA graphs need a CUDA device, this one is cpu" in capsys.readouterr().out
    train(tiny.options(folder, max_iters=1, cuda_graph="off"))
    assert "graphs  none: cuda_graph=off" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cuda_graph is 'on', but .* need a CUDA device"):
        train(tiny.options(folder, max_iters=1, cuda_graph="on"))
    with pytest.raises(ValueError, match="cuda_graph"):
        train(tiny.options(folder, cuda_graph="yes"))
    assert TrainOptions().cuda_graph == "auto"


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "layer_norm", "cross_entropy"])
def test_a_function_that_may_wait_for_the_gpu_is_not_captured(name, monkeypatch):
    model = model_of()
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    optimizer.param_groups[0].setdefault("capturable", False)
    assert captured.why_not(model, optimizer, torch.device("cuda")) is None
    monkeypatch.setattr(F, name, functools.partial(getattr(F, name)))
    assert captured.why_not(model, optimizer, torch.device("cuda")) == f"what computes it may wait for the GPU: torch.nn.functional.{name} was replaced"


def test_a_step_that_is_changed_again_and_again_is_no_longer_captured(recwarn):
    backend._noticed.clear()
    model = model_of()
    step = TrainingStep(model, model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu"), dtype=torch.float32, batch_shape=(4, 16), not_captured=None)
    recorder = step.graphs.recorder = gpts.Recorder()
    for i in range(40):
        step.grad_clip = 1.0 + i
        step(lambda: torch.zeros(2, 4, 16, dtype=torch.int64))
    assert step.graphs.recorder is None and recorder.log.count("record _first") == captured.MOST_CAPTURES
    assert any("runs without graphs: they have changed 4 times" in str(w.message) for w in recwarn)


def test_a_step_goes_with_its_graphs_as_soon_as_nobody_has_it():
    model = model_of()
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    step = TrainingStep(model, optimizer, dtype=torch.float32, batch_shape=(4, 16), not_captured=None)
    step(lambda: torch.zeros(2, 4, 16, dtype=torch.int64))
    gone = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("not_captured", ["for comparison", None])
def test_every_step_counts_as_a_write_to_the_weights(not_captured, dtype):
    """PyTorch's fused AdamW counts none."""
    model = model_of()
    step = TrainingStep(model, model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu"), dtype=dtype, batch_shape=(4, 16), not_captured=not_captured)
    for _ in range(6):
        watch = Watch(model)
        step(lambda: torch.zeros(2, 4, 16, dtype=torch.int64))
        assert not watch.unchanged() and step.weights._states() == step.weights._cast_from


def test_a_replay_counts_as_a_write_to_the_weights_and_their_copies():
    model = model_of()
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    step = TrainingStep(model, optimizer, dtype=torch.bfloat16, batch_shape=(4, 16), not_captured=None)
    step(lambda: torch.zeros(2, 4, 16, dtype=torch.int64))
    watch = Watch(model)
    assert watch.unchanged() and step.weights.copies
    step.graphs.micro_step, step.graphs.update = lambda *args, **more: None, lambda: None       # a graph's writes, which PyTorch does not see
    before = [copy._version for copy in step.weights.copies]
    step(lambda: torch.zeros(2, 4, 16, dtype=torch.int64))
    assert not watch.unchanged() and all(copy._version > version for copy, version in zip(step.weights.copies, before))
    after = [copy._version for copy in step.weights.copies]
    step.weights.follow()                               # the replay has cast them
    assert after == [copy._version for copy in step.weights.copies]


# ---------------------------------------------------------------------------------------------------- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")


def on_gpu(folder, out, **changed):
    return tiny.options(folder, out, **{**dict(device="cuda", backend="auto", max_iters=10, eval_interval=5), **changed})


@gpu
@pytest.mark.parametrize("settings", [
    dict(), dict(gradient_accumulation_steps=3), dict(dropout=0.2), dict(dtype="bfloat16"),
    dict(dtype="bfloat16", gradient_accumulation_steps=40, compile=True, dropout=0.1)], ids=str)
def test_on_a_gpu_replayed_steps_have_the_losses_of_ordinary_ones(settings, folder):
    ordinary, graphed = on_gpu(folder, "a", cuda_graph="off", **settings), on_gpu(folder, "b", cuda_graph="on", **settings)
    train(ordinary), train(graphed)
    # The same kernels on the same numbers, dropout's included; only the learning rate is rounded on its way to AdamW.
    bound = 2e-2 if settings.get("dtype") == "bfloat16" else 1e-4
    for a, b in zip(tiny.losses(ordinary).values(), tiny.losses(graphed).values(), strict=True):
        assert a == pytest.approx(b, abs=bound)
    a, b = weights_of(ordinary)["optimizer"], weights_of(graphed)["optimizer"]
    assert a["param_groups"] == b["param_groups"]
    assert {type(group["lr"]) for group in b["param_groups"]} == {float}


def stepping(model, optimizer, accumulation=1):
    """(CapturedStep, x, y) on the GPU for a model, without a trainer around it."""
    def forward_backward(x, y):
        loss = model(x, y, return_logits=False)[1] / accumulation
        loss.backward()
        return loss.detach()
    x, y = torch.randint(61, (2, 4, 16), device="cuda")
    return CapturedStep(forward_backward, optimizer.step, optimizer, (4, 16), torch.device("cuda")), x, y


@gpu
def test_on_a_gpu_dropout_differs_from_replay_to_replay():
    model = model_of(dropout=0.5).cuda()
    model.set_backend("auto")
    optimizer = model.configure_optimizers(0.0, 0.0, (0.9, 0.95), "cuda")  # a learning rate of 0: only the masks change
    step, x, y = stepping(model, optimizer)
    losses = []
    for _ in range(12):
        step.micro_step(x, y, first=True)
        step.update()
        losses.append(step.loss.item())
    assert len(set(losses)) == 12


@gpu
def test_on_a_gpu_recording_changes_neither_weights_nor_moments_nor_random_state():
    model = model_of(dropout=0.1).cuda()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda")
    step, x, y = stepping(model, optimizer)
    for _ in range(captured.WARM_UP_STEPS):
        step.micro_step(x, y, first=True)
        step.update()
    def state():
        torch.cuda.synchronize()
        return flat(copy.deepcopy([model.state_dict(), optimizer.state_dict(), torch.cuda.get_rng_state(), step.loss]))
    before = state()
    replays = []    # kept: the graphs share a pool of memory, which is gone with the last of them
    for part in (step._first, step._more, step._update):
        replays.append(step.recorder.record(part))
    assert state() == before


@gpu
def test_on_a_gpu_a_replay_never_waits_for_the_device():
    model = model_of().cuda()
    step, x, y = stepping(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda"))
    for i in range(captured.WARM_UP_STEPS + 3):
        torch.cuda.set_sync_debug_mode("error" if i > captured.WARM_UP_STEPS else "default")
        try:
            step.micro_step(x, y, first=True)
            step.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_on_a_gpu_evaluation_sampling_and_resuming_between_replays_change_nothing(folder):
    settings = dict(dropout=0.2, max_iters=16, cuda_graph="on", gradient_accumulation_steps=2)
    seldom = on_gpu(folder, "a", eval_interval=1000, **settings)
    often = on_gpu(folder, "b", eval_interval=2, sample_tokens=20, **settings)
    broken = on_gpu(folder, "c", eval_interval=4, **settings)
    train(seldom), train(often)
    train(dataclasses.replace(broken, max_iters=8))
    train(dataclasses.replace(broken, init_from="resume"))
    for other in (often, broken):
        for a, b in zip(tiny.losses(seldom).values(), tiny.losses(other).values(), strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@gpu
def test_on_a_gpu_what_cannot_be_captured_is_named():
    model = model_of().cuda()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda")
    step, x, y = stepping(model, optimizer)
    waits = CapturedStep(lambda x, y: torch.tensor(x.sum().item(), device="cuda"), optimizer.step, optimizer, (4, 16), x.device)
    waits.steps = captured.WARM_UP_STEPS
    with pytest.raises(RuntimeError, match="--cuda_graph=off"):
        waits.micro_step(x, y, first=True)
