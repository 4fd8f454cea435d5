"""AdamW's step by the kernel (kernels/adamw.py, ops/adamw.py): PyTorch's numbers and state, the copies, and what is left to PyTorch."""
import contextlib
import copy

import gpts
import pytest
import stepped
import torch
from harness import assert_close_to_oracle, assert_grid_order_is_free, planted_fault
from stepped import same

from nanogpt_fast.kernels import adamw as kernels
from nanogpt_fast.ops import adamw
from nanogpt_fast.training.step import TrainingStep

PIECE = kernels.PIECE
SIZES = ((1,), (17,), (40, 33), (PIECE,), (PIECE - 1,), (2 * PIECE + 3,))
NANOGPTS, SHORT = dict(), dict(betas=(0.3, 0.5), eps=1e-3)


@pytest.fixture
def model(device):
    return gpts.small(backend="fused").to(device)


class Side(stepped.Side):
    def __init__(self, model, sizes=SIZES, **options):
        super().__init__(sizes, device=model.lm_head.weight.device, **options)
        self.one_pass = adamw.OnePass(model, self.optimizer, self.copies)

    def step(self, seed, factor=None):
        self.draw(seed)
        assert self.one_pass.why_not() is None
        self.one_pass.step(None if factor is None else torch.tensor(factor, device=self.weights[0].device))

    def steps(self, seeds, **options):
        for seed in seeds:
            self.step(seed, **options)
        return self


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [SIZES[:3], SIZES[3:]], ids=["short", "pieces"])
@pytest.mark.parametrize("options", [NANOGPTS, SHORT], ids=["nanoGPT's", "short memory, large eps"])
def test_steps_are_as_near_to_fp64_as_pytorchs_and_copies_are_their_rounding(options, sizes, half, model, device):
    ours = Side(model, sizes, half=half, **options)
    theirs, exact = (stepped.Side(sizes, device=device, dtype=dtype, **options) for dtype in (torch.float32, torch.float64))
    for seed, factor in enumerate((None, 0.25, 1.0, 0.7)):
        for side in (theirs, exact):
            side.draw(seed)
            side.multiply(1.0 if factor is None else factor)
            side.optimizer.step()
        ours.step(seed, factor)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(ours.weights, copy.deepcopy(ours).draw(seed)))
    assert ours.tensors().keys() == theirs.tensors().keys()
    for (name, out), plain, oracle in zip(ours.tensors().items(), theirs.tensors().values(), exact.tensors().values(), strict=True):
        assert out.dtype == plain.dtype and (not name.startswith("step") or out.item() == 4)
        assert_close_to_oracle(out, oracle.double(), plain, "forward", what=name)
    assert all(torch.equal(copied, p.to(half)) for p, copied in ours.copies.items())


@pytest.mark.parametrize("fault", [("new_v \\* g \\* g", "new_v * g"), ("old_m \\* tl", "1.0 * tl"), ("shrink \\* w", "0.0 * w"),
                                   ("rate / correction1", "rate"), ("t \\* tl.load\\(group \\+ LOG2_BETA2\\)", "tl.load(group + LOG2_BETA2)"),
                                   ("elements < size", "elements < size - 1"), ("RATE\\)", "SHRINK)")], ids=lambda fault: fault[0])
def test_a_fault_in_the_kernel_is_noticed(fault, device):
    with planted_fault(kernels, *fault):
        with pytest.raises(AssertionError):
            test_steps_are_as_near_to_fp64_as_pytorchs_and_copies_are_their_rounding(
                NANOGPTS, SIZES[2:5], torch.bfloat16, gpts.small(backend="fused").to(device), device)


def test_the_order_of_programs_changes_no_bit(model):
    def run():
        return tuple(Side(model, SIZES[2:]).steps(range(2), factor=0.7).tensors().values())
    assert_grid_order_is_free(run)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_what_is_no_number_goes_where_pytorchs_step_takes_it(value, model, device):
    ours, theirs = Side(model, SIZES[:4]), stepped.Side(SIZES[:4], device=device)
    for side in (ours, theirs):
        side.draw(0)
        for p in side.weights:
            p.grad.view(-1)[-1] = value
    ours.one_pass.step()
    theirs.optimizer.step()
    for (name, a), b in zip(ours.tensors().items(), theirs.tensors().values(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=name)
    for p, copied in ours.copies.items():
        torch.testing.assert_close(copied, p.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_weight_without_gradient_stays_with_its_copy_and_gets_no_state(model):
    side = Side(model, SIZES[:4])
    side.draw(0)
    side.weights[1].grad = None
    before, kept = side.weights[1].detach().clone(), side.copies[side.weights[1]].zero_()
    side.one_pass.step()
    assert torch.equal(side.weights[1], before) and not kept.any() and side.weights[1] not in side.optimizer.state
    assert list(side.optimizer.state_dict()["state"]) == [1, 2, 3]      # 0 is the first of the group that decays
    side.draw(1)
    side.one_pass.step()                                                # now it has one: counts differ from weight to weight
    assert [side.optimizer.state[p]["step"].item() for p in side.weights] == [2, 1, 2, 2]


def test_without_copies_and_without_gradients_too(model):
    with_copies, without, empty = Side(model), Side(model), Side(model)
    without.one_pass.copies = {}
    assert same(with_copies.steps(range(2)), without.steps(range(2)))
    empty.one_pass.step()
    assert not empty.optimizer.state


def test_a_learning_rate_may_be_a_tensor_and_change_as_may_the_options(model, device):
    numbers, tensors = Side(model), Side(model)
    for seed, lr in enumerate((1e-2, 3e-3, 1e-2)):
        for side, kind in ((numbers, float), (tensors, lambda lr: torch.tensor(lr, device=device, dtype=torch.float64))):
            for group in side.optimizer.param_groups:
                group.update(lr=kind(lr), weight_decay=lr)
            side.step(seed)
    assert same(numbers, tensors)
    assert not same(numbers, Side(model).steps(range(3)))


@pytest.mark.parametrize("lrs", [(torch.tensor(1e-2), torch.tensor(1e-2)), (torch.tensor(1e-2), 1e-2)], ids=["on the host", "mixed"])
def test_a_learning_rate_may_be_a_tensor_on_the_host_or_in_one_group_alone(lrs, model, device):
    numbers, tensors = Side(model), Side(model)
    for group, lr in zip(tensors.optimizer.param_groups, lrs):
        group["lr"] = lr
    assert same(numbers.steps([0]), tensors.steps([0]))


def test_it_goes_on_from_a_state_that_was_saved_and_pytorch_goes_on_from_ours(model):
    stepped.check_states(lambda: Side(model))


def test_whoever_saved_what_is_written_is_told(model):
    side = Side(model, SIZES[:2]).steps([0])
    watched = [*side.tensors().values(), *side.copies.values()]
    versions = [tensor._version for tensor in watched]
    side.step(1)
    assert all(tensor._version > version for tensor, version in zip(watched, versions, strict=True))
    assert [p.grad._version for p in side.weights] == [0, 0]


def test_the_table_is_written_again_only_where_something_moved(model, monkeypatch):
    sent, original = [], kernels._sent
    monkeypatch.setattr(kernels, "_sent", lambda values, dtype, device: sent.append(dtype) or original(values, dtype, device))
    side = Side(model).steps([0])
    assert sent == [torch.int64, torch.int32, torch.float64, torch.float32]     # addresses, pieces, options, learning rates
    sent.clear()
    side.one_pass.step()
    assert sent == [torch.float32]
    sent.clear()
    side.optimizer.param_groups[0]["eps"] = 1e-6
    side.one_pass.step()
    assert sent == [torch.float64, torch.float32]
    sent.clear()
    side.weights[2].grad = side.weights[2].grad.clone()
    side.one_pass.step()
    assert sent == [torch.int64, torch.float32]


# ----------------------------------------------------------------------------------------------- what is left to PyTorch

def misaligned(side):
    p = side.weights[2]
    p.grad = torch.zeros(p.numel() + 1, device=p.device)[1:].view(p.shape)


def halved(side):
    side.weights[2].data = side.weights[2].data.half()


def scheduled(side):
    torch.optim.lr_scheduler.LambdaLR(side.optimizer, lambda step: 1.0)


def coupled(side):
    side.optimizer.param_groups[1]["decoupled_weight_decay"] = False


def grown(side):
    p = side.weights[2]
    p.data = torch.zeros(2 * p.shape[0], *p.shape[1:], device=p.device)
    p.grad = torch.zeros_like(p)


def on_the_host(side):
    side.step(0)
    side.optimizer.state[side.weights[2]]["step"] = torch.zeros((), device="meta")


@pytest.mark.parametrize("change, reason", [
    (misaligned, "the address of a gradient is no multiple of 16 bytes"), (halved, "a weight is not a contiguous float32 tensor"),
    (scheduled, "replaced on the instance"), (grown, "a weight has another shape than its copy"), (coupled, "decoupled_weight_decay=False"),
    (on_the_host, "a step is not a contiguous float32 tensor")], ids=lambda value: getattr(value, "__name__", ""))
def test_what_it_leaves_to_pytorch_is_named(change, reason, model):
    side = Side(model, SIZES[:4])
    side.draw(0)
    assert side.one_pass.why_not() is None
    change(side)
    assert reason in side.one_pass.why_not()


def test_on_the_reference_path_and_by_auto_in_the_interpreter_pytorch_steps(device):
    for backend, reason in (("reference", "asked for the reference"), ("auto", None if device.type == "cuda" else "interpreter")):
        found = Side(gpts.small(backend=backend).to(device)).one_pass.why_not()
        assert (found is None) if reason is None else reason in found


# ----------------------------------------------------------------------------------------------- in the training step

def training_step(device, backend, patch, grad_clip=0.1, not_captured="not wanted"):
    """(A TrainingStep as on a GPU, the kinds of learning rates with which its steps are taken by the kernel)."""
    model, taken = gpts.small(backend="reference").to(device), []
    original = kernels.Table.step
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), device.type)
    step = TrainingStep(model, optimizer, dtype=torch.bfloat16, batch_shape=(2, 16), grad_clip=grad_clip, not_captured=not_captured)
    step._on_cpu = False
    chooses = gpts.small(backend=backend).to(device)
    step.one_pass = adamw.OnePass(chooses, optimizer, dict(zip(step.weights.weights, step.weights.copies)))
    patch.setattr(kernels.Table, "step", lambda table, rates, factor: taken.append(type(rates[0])) or original(table, rates, factor))
    return step, taken


@pytest.mark.parametrize("grad_clip, last", [(0.0, 0.01), (0.1, 0.01), (100.0, 0.01), (0.1, float("nan"))])
def test_an_update_in_one_pass_is_the_update_in_three(grad_clip, last, device, monkeypatch):
    models = []
    for backend in ("fused", "reference"):
        with monkeypatch.context() as patch:
            step, taken = training_step(device, backend, patch, grad_clip)
            for seed in range(3):
                generator = torch.Generator().manual_seed(seed)
                for p in step.model.parameters():
                    p.grad = 1e-2 * torch.randn(p.shape, generator=generator).to(device)
                p.grad[-1] = last
                step.update()
        assert taken == [float] * (3 if backend == "fused" else 0)
        assert step.weights.copies and all(
            torch.equal(copied.nan_to_num(7), p.bfloat16().nan_to_num(7)) for p, copied in zip(step.weights.weights, step.weights.copies))
        models.append(step.model)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=name)
        assert a.isnan().all() == (last != last)        # a norm that is no number reaches every weight


def test_a_weight_that_is_frozen_and_changed_by_hand_has_its_copy_cast(device, monkeypatch):
    step, taken = training_step(device, "fused", monkeypatch)
    frozen = step.weights.weights[0].requires_grad_(False)
    for p in step.model.parameters():
        p.grad = None if p is frozen else torch.ones_like(p)
    with torch.no_grad():
        frozen.mul_(2)
    step.update()
    assert taken == [float] and torch.equal(step.weights.copies[0], frozen.bfloat16())


def test_a_captured_step_finds_its_table_written(device, monkeypatch):
    found = []
    for not_captured in (None, "for comparison"):
        with monkeypatch.context() as patch:
            step, taken = training_step(device, "fused", patch, not_captured=not_captured)
            recorder = gpts.Recorder()
            if step.graphs is not None:
                if device.type == "cpu":        # which has no graphs: what would be captured is called
                    step.graphs.recorder = recorder
                prepare = step.one_pass.prepare
                patch.setattr(step.one_pass, "prepare", lambda: recorder.log.append("prepare") or prepare())
            tokens = torch.arange(32, device=device).view(2, 16)
            losses = [step(lambda: (tokens, tokens)).item() for _ in range(5)]
            found.append((losses, *step.model.parameters()))
            assert losses[-1] < losses[0] and taken[:3] == [torch.Tensor if step.graphs else float] * 3
        if not_captured is None and device.type == "cpu":
            assert "prepare" in recorder.log[recorder.log.index("replay _first"):recorder.log.index("record _update")]
    (losses, *weights), (expected, *others) = found
    assert losses == expected and all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
