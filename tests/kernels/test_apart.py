"""Under torch.compile the loss runs after the graph (nanogpt_fast/apart.py): one graph, no gradient for logits that nobody uses, and the
same numbers; what the model then is not called for, and graphs of the user's own, are whole."""
import contextlib
import copy
import gc
import weakref

import gpts
import pytest
import torch
import torch.distributed as dist
from forks import fork
from torch._dynamo.testing import CompileCounterWithBackend

import nanogpt_fast
from nanogpt_fast import apart
from nanogpt_fast.ops import cross_entropy

APART, INSIDE = "_LossAndLogitsBackward", "CompiledFunctionBackward"


@pytest.fixture
def model(device):
    torch._dynamo.reset()
    return gpts.small(backend="fused", n_layer=1).to(device)


@pytest.fixture
def x(device):
    return torch.randint(65, (1, 7), generator=torch.Generator().manual_seed(0)).to(device)


def compiled(model, **options):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, **options), counter


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("used, by_name", [(False, True), (True, False)], ids=["logits unused", "logits used"])
def test_a_training_call_is_one_graph_and_unused_logits_have_no_gradient(used, by_name, model, x, monkeypatch):
    plain, seen = copy.deepcopy(model), []
    original = cross_entropy._LossAndLogits.backward
    monkeypatch.setattr(cross_entropy._LossAndLogits, "backward", staticmethod(
        lambda ctx, loss, logits: seen.append(logits is not None) or original(ctx, loss, logits)))
    network, counter = compiled(model, fullgraph=True)
    for _ in range(2):
        for each in (model, plain):
            each.zero_grad()
        for call in (network, plain):
            logits, loss = call(x, targets=x) if by_name else call(x, x)
            (loss + logits.float().square().mean() if used else loss).backward()
        assert torch.equal(logits, network(x, x)[0])
        for (name, a), b in zip(gradients(model).items(), gradients(plain).values(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
    assert counter.frame_count == 1 and type(loss.grad_fn).__name__ == APART and seen == [used] * 4
    assert torch._dynamo.explain(model)(x, x).graph_break_count == 0


def test_evaluation_generation_and_calls_without_logits_are_whole(model, x):
    network, counter = compiled(model, fullgraph=True)
    loss = network(x, x, return_logits=False)[1]
    assert type(loss.grad_fn).__name__ == INSIDE and counter.frame_count == 1
    with torch.no_grad():
        assert torch.allclose(network(x, x)[1], loss) and counter.frame_count == 2
        assert torch.equal(network(x)[0], model(x)[0]) and network.generate(x, 2).shape == (1, 9)


def test_a_graph_that_holds_the_call_holds_the_loss(model, x):
    def step(x):
        return model(x, x)[1] * 2
    found, counter = compiled(step, fullgraph=True)
    assert found(x).item() == pytest.approx(2 * model(x, x)[1].item()) and counter.frame_count == 1
    itself = copy.deepcopy(model)
    itself.compile(backend=counter, fullgraph=True)
    assert torch.allclose(itself(x, x)[1], model(x, x)[1]) and counter.frame_count == 2


def a_hook(model):
    model.register_forward_hook(lambda module, args, out: (out[0] * 0, out[1]))


def a_forward_of_its_own(model):
    class Mine(type(model)):
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            return logits * 0, loss
    model.__class__ = Mine


def a_head_of_its_own(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out * 0)


def an_instances_forward(model):
    forward = model.forward
    model.forward = lambda idx, targets: (forward(idx, targets)[0] * 0, forward(idx, targets)[1])


@pytest.mark.parametrize("change", [a_hook, a_forward_of_its_own, a_head_of_its_own, an_instances_forward], ids=lambda f: f.__name__)
def test_what_was_changed_is_called_compiled_or_not(change, model, x):
    change(model)
    assert model._why_not_apart(x, x) is not None
    for call in (model, compiled(model)[0]):
        with contextlib.suppress(RuntimeWarning):
            logits, loss = call(x, x)
        assert not logits.any() and loss.requires_grad


def test_a_forward_set_on_the_class_is_called_compiled_or_not(model, x, monkeypatch):
    network, forward = compiled(model)[0], type(model).forward
    assert network(x, x)[0].any()
    monkeypatch.setattr(type(model), "forward", lambda self, *args: (forward(self, *args)[0] * 0, args))
    for call in (model, network):
        assert not call(x, x)[0].any()


@pytest.fixture
def accelerated(device):
    torch._dynamo.reset()
    model = fork(dropout=0.0, n_layer=1).to(device)
    return model, nanogpt_fast.accelerate(model, backend="fused")


@pytest.mark.parametrize("used", [False, True])
def test_an_accelerated_forks_loss_runs_after_the_graph_too(used, accelerated, x, monkeypatch):
    (model, report), seen = accelerated, []
    original = cross_entropy._LossAndLogits.backward
    monkeypatch.setattr(cross_entropy._LossAndLogits, "backward", staticmethod(
        lambda ctx, loss, logits: seen.append(logits is not None) or original(ctx, loss, logits)))
    network, counter = compiled(model, fullgraph=True)
    found = []
    for call in (network, model, network):
        model.zero_grad()
        logits, loss = call(x, targets=x)
        (loss + logits.float().square().mean() if used else loss).backward()
        found.append((logits, gradients(model)))
    assert counter.frame_count == 1 and type(loss.grad_fn).__name__ == APART and seen == [used] * 3
    assert report.calls["model", "kernels"] == 3 and {where for _, where in report.calls} == {"kernels"}
    for logits, grads in found[1:]:
        torch.testing.assert_close(logits, found[0][0])
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][1][name], msg=name)
    with torch.no_grad():
        assert torch.equal(network(x)[0], model(x)[0])
    assert "more than the" in model._why_not_apart(*torch.zeros(2, 1, 1 + model.config.block_size, dtype=torch.int64, device=x.device))


def an_attribute(model):
    model.lm_head.bias = torch.nn.Parameter(torch.full((65,), 3.0, device=model.lm_head.weight.device))


@pytest.mark.parametrize("change", [a_hook, a_forward_of_its_own, a_head_of_its_own, an_instances_forward, an_attribute],
                         ids=lambda f: f.__name__)
def test_an_accelerated_fork_that_was_changed_is_called(change, accelerated, x):
    model, _ = accelerated
    before = model(x, x)[0]
    change(model)
    assert model._why_not_apart(x, x) is not None
    for call in (model, compiled(model)[0]):
        logits, loss = call(x, x)
        assert (torch.allclose(logits, before + 3, atol=1e-5) if change is an_attribute else not logits.any()) and loss.requires_grad


def test_on_the_reference_path_the_loss_stays_in_the_graph(x):
    network, counter = compiled(gpts.small(backend="reference").to(x.device), fullgraph=True)
    assert type(network(x, x)[1].grad_fn).__name__ == INSIDE and counter.frame_count == 1


def test_a_pytorch_that_cannot_skip_frames_compiles_the_whole_call(model, x, monkeypatch):
    class Old:
        pass
    monkeypatch.setattr(torch._C._dynamo, "eval_frame", Old())
    apart._skip(apart.call, callees=False)      # says nothing


def backward_under_ddp(outside, model, x):
    """A weak reference to the DDP."""
    wrapped = torch.nn.parallel.DistributedDataParallel
    ddp = wrapped(model if outside else compiled(model)[0])
    network = compiled(ddp)[0] if outside else ddp
    network(x, x)[1].backward()
    return weakref.ref(ddp)


@pytest.mark.parametrize("outside", [False, True], ids=["DDP of the compiled", "compiled DDP"])
def test_ddp_gets_every_gradient(outside, model, x, tmp_path):
    plain = copy.deepcopy(model)
    plain(x, x)[1].backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1)
    try:
        ddp = backward_under_ddp(outside, model, x)
    finally:
        torch._dynamo.reset()
        gc.collect()        # a DDP freed after its group waits, holding the GIL, for a thread of gloo's that waits for the GIL (PyTorch 2.13)
        dist.destroy_process_group()
    assert ddp() is None
    for (name, a), b in zip(gradients(model).items(), gradients(plain).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
