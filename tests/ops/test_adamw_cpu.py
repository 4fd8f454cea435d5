"""The end of a step on a CPU (ops/cpu/adamw.py, csrc/rows/adamw.h): PyTorch's AdamW, its state, its cast and norm; what is left to it."""
import dataclasses
import warnings

import gpts
import pytest
import stepped
import tiny
import torch
from stepped import SIZES, same
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nanogpt_fast.checks.error_rule import measure
from nanogpt_fast.ops import extension
from nanogpt_fast.ops.cpu import adamw as adamw_cpu, linear as linear_cpu
from nanogpt_fast.training import cpu, trainer as training
from nanogpt_fast.training.half_weights import HalfWeights
from nanogpt_fast.training.step import TrainingStep

pytestmark = pytest.mark.skipif(adamw_cpu.MISSING is not None, reason=f"not here: {adamw_cpu.MISSING}")
ISAS = extension._C.build_info()["cpu_isas"].split() if adamw_cpu.MISSING is None else []


class Side(stepped.Side):
    def steps(self, seeds, **options):
        """Take our steps, one for each seed of gradients."""
        for seed in seeds:
            self.draw(seed)
            assert adamw_cpu.why_not(self.optimizer) is None
            adamw_cpu.step(self.optimizer, self.copies, **options)
        return self


@pytest.mark.parametrize("options", (dict(), dict(betas=(0.3, 0.5), eps=1e-3)), ids=("nanoGPT's", "short memory, large eps"))
@pytest.mark.parametrize("sizes", (SIZES[:4], SIZES[4:]), ids=("short", "long"))
@pytest.mark.parametrize("isa", ISAS)
def test_steps_are_as_near_to_fp64_as_pytorchs_and_copies_are_their_rounding(isa, sizes, options):
    ours, theirs, exact = Side(sizes, **options), Side(sizes, **options), Side(sizes, dtype=torch.float64, **options)
    for seed, factor in enumerate((1.0, 0.25, 1.0, 0.7, 1.0)):
        for side in (ours, theirs, exact):
            side.draw(seed)
        for side in (theirs, exact):
            side.multiply(factor)
            side.optimizer.step()
        before = [p.grad.clone() for p in ours.weights]
        adamw_cpu.step(ours.optimizer, ours.copies, factor, isa)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(ours.weights, before))
    assert ours.tensors().keys() == theirs.tensors().keys()
    for (name, out), plain, oracle in zip(
            ours.tensors().items(), theirs.tensors().values(), exact.tensors().values(), strict=True):
        assert (problem := measure(out, oracle.double(), plain, "forward").problem) is None, f"{name}: {problem}"
        assert out.dtype == plain.dtype and (not name.startswith("step") or out.item() == 5)
    assert all(torch.equal(ours.copies[p], p.bfloat16()) for p in ours.weights)


def test_threads_change_no_bit():
    threads = torch.get_num_threads()
    try:
        sides = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sides.append(Side().steps(range(3), factor=0.7))
    finally:
        torch.set_num_threads(threads)
    assert same(sides[0], sides[1]) and same(sides[0], sides[2])


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 1e30))
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_goes_where_pytorchs_step_takes_it(isa, value):
    ours, theirs = Side(SIZES[:4]), Side(SIZES[:4])
    for side in (ours, theirs):
        side.draw(0)
        for p in side.weights:
            p.grad.view(-1)[-1] = value
    adamw_cpu.step(ours.optimizer, ours.copies, isa=isa)
    theirs.optimizer.step()
    for (name, a), b in zip(ours.tensors().items(), theirs.tensors().values(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=name)
    for p in ours.weights:
        torch.testing.assert_close(ours.copies[p], p.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_weight_without_gradient_stays_with_its_copy_and_gets_no_state():
    side = Side(SIZES[:4])
    side.draw(0)
    side.weights[1].grad = None
    before, kept = side.weights[1].detach().clone(), side.copies[side.weights[1]].zero_()
    adamw_cpu.step(side.optimizer, side.copies)
    assert torch.equal(side.weights[1], before) and not kept.any() and side.weights[1] not in side.optimizer.state
    assert list(side.optimizer.state_dict()["state"]) == [1, 2, 3]      # 0 is the first of the group that decays


def test_without_copies_and_without_weights_too():
    with_copies, without, empty = Side(), Side(), Side()
    without.copies = {}
    assert same(with_copies.steps(range(2)), without.steps(range(2)))
    adamw_cpu.step(empty.optimizer)
    assert not empty.optimizer.state


def test_a_default_device_of_the_users_is_not_where_steps_and_norms_are_kept(monkeypatch):
    side, gradient = Side(((17,), (3,))), torch.ones(16)
    side.draw(0)
    monkeypatch.setattr(extension._C, "adamw_cpu", lambda *_: None)     # a count on another device would be no address
    with torch.device("meta"):
        adamw_cpu.step(side.optimizer, side.copies)
        assert adamw_cpu.norm([gradient]).item() == 4
    assert all(tensor.is_cpu for tensor in side.tensors().values())


def test_it_goes_on_from_a_state_that_was_saved_and_pytorch_goes_on_from_ours():
    stepped.check_states(Side)


@pytest.mark.parametrize("copies", (True, False))
def test_whoever_saved_what_is_written_is_told(copies):
    side = Side(SIZES[:2])
    side.copies = side.copies if copies else {}
    side.steps([0])
    watched = [*side.tensors().values(), *side.copies.values()]
    versions = [tensor._version for tensor in watched]
    side.steps([1])
    assert all(tensor._version > version for tensor, version in zip(watched, versions, strict=True))
    assert [p.grad._version for p in side.weights] == [0, 0]


class Another(torch.optim.AdamW):
    pass


def hooked(side):
    side.optimizer.register_step_post_hook(lambda *_: None)


def scheduled(side):
    torch.optim.lr_scheduler.LambdaLR(side.optimizer, lambda step: 1.0)


def scaled(side):
    side.optimizer.grad_scale = torch.ones(())


def guarded(side):
    side.optimizer.found_inf = torch.zeros(())


def subclassed(side):
    side.optimizer.__class__ = Another


def sparse(side):
    side.weights[3].grad = side.weights[3].grad.to_sparse()


def strided(side):
    side.weights[3].grad = torch.randn(33, 40).t()


def halved(side):
    side.weights[3].data = side.weights[3].data.half()


def misfit(side):
    side.steps([0])
    side.optimizer.state[side.weights[3]]["exp_avg"] = torch.zeros(40, 32)


def elsewhere(side):
    side.steps([0])
    side.optimizer.state[side.weights[3]]["exp_avg"] = torch.zeros(40, 33, device="meta")


class Wrapped(torch.Tensor):
    pass


def wrapped(side):
    side.weights[3].grad = side.weights[3].grad.as_subclass(Wrapped)


def option(**changed):
    def change(side):
        side.optimizer.param_groups[1].update(changed)
    change.__name__ = ",".join(changed)
    return change


@pytest.mark.parametrize("change, reason", (
    (hooked, "has a hook"), (scheduled, "replaced on the instance"), (scaled, "GradScaler"), (guarded, "GradScaler"),
    (subclassed, "Another, not AdamW"), (wrapped, "gradient is not a contiguous"), (elsewhere, "exp_avg is not a contiguous"),
    (sparse, "gradient is not a contiguous"), (strided, "gradient is not a contiguous"), (halved, "weight is not a contiguous float32"),
    (misfit, "exp_avg does not have its weight's shape"), (option(amsgrad=True), "amsgrad"), (option(maximize=True), "maximize"),
    (option(capturable=True), "capturable"), (option(differentiable=True), "differentiable"),
    (option(lr=torch.tensor(1e-3)), "is a tensor"), (option(betas=(0.9, torch.tensor(0.95))), "is a tensor")),
    ids=lambda value: getattr(value, "__name__", ""))
def test_what_it_leaves_to_pytorch_is_named(change, reason):
    side = Side(SIZES[:4])
    side.draw(0)
    assert adamw_cpu.why_not(side.optimizer) is None
    change(side)
    assert reason in adamw_cpu.why_not(side.optimizer)


def test_a_hook_on_every_optimizer_and_a_missing_extension_are_reasons(monkeypatch):
    side = Side(SIZES[:2])
    hook = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert "has a hook" in adamw_cpu.why_not(side.optimizer)
    finally:
        hook.remove()
    assert adamw_cpu.why_not(side.optimizer) is None
    monkeypatch.setattr(adamw_cpu, "MISSING", "not built")
    assert adamw_cpu.why_not(side.optimizer) == "not built"


# ---------------------------------------------------------------------------------------------------- the norm

@pytest.mark.parametrize("sizes", [[], [1], [15], [17], [1000003], [1, 65, 32768, 32769, 99]], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_the_norm_is_that_of_fp64_in_every_instruction_set(sizes, isa):
    gradients = [(1 + i) * torch.randn(size) for i, size in enumerate(sizes)]
    exact, norm = torch.cat([torch.zeros(0), *gradients]).double().norm(), adamw_cpu.norm(gradients, isa)
    assert norm.item() == pytest.approx(exact.item(), rel=2e-7) and norm.dtype == torch.float32


def test_what_is_small_counts_beside_what_is_large():
    gradients = [torch.tensor([4096.0]), *(torch.ones(1) for _ in range(1000))]     # 2^24 + 1 is no fp32
    assert adamw_cpu.norm(gradients).item() == pytest.approx((2**24 + 1000)**0.5, rel=1e-7)


def test_the_norm_is_the_same_on_any_number_of_threads():
    gradients = Side().draw(0)
    threads, norms = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norms.add(adamw_cpu.norm(gradients).item())
    finally:
        torch.set_num_threads(threads)
    assert len(norms) == 1


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("where", (0, 63, 64, 99))
def test_a_gradient_that_is_no_number_makes_a_norm_that_is_none(value, where):
    gradient = torch.ones(100)
    gradient[where] = value
    torch.testing.assert_close(adamw_cpu.norm([gradient]), torch.tensor(value), equal_nan=True)


def test_gradients_of_other_kinds_have_pytorchs_norm(monkeypatch):
    gradients = [torch.randn(5, 7), torch.randn(3).double(), torch.randn(4)]
    assert torch.equal(adamw_cpu.norm(gradients), torch.nn.utils.get_total_norm(gradients))
    monkeypatch.setattr(adamw_cpu, "MISSING", "not built")
    monkeypatch.setattr(extension, "_C", None)
    assert torch.equal(adamw_cpu.norm(gradients[2:]), torch.nn.utils.get_total_norm(gradients[2:]))


# ---------------------------------------------------------------------------------------------------- in the trainer

def trained(own, max_norm, monkeypatch, seeds=range(3), last=1e-2):
    """(HalfWeights, optimizer) after updates of a small GPT, `own`: as if its gradients were the extension's.

    last: the last row of each gradient.
    """
    model = gpts.small(bias=True)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", lambda *_: None)
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    weights = HalfWeights(model, torch.bfloat16)
    weights.own = [own] * len(weights.copies)
    for seed in seeds:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = 1e-2 * torch.randn_like(p)
        p.grad[-1] = last
        cpu.update(optimizer, weights, max_norm)
    return weights, optimizer


@pytest.mark.parametrize("max_norm", (0.0, 0.3, 100.0))
def test_an_update_in_one_pass_is_the_update_in_three(max_norm, monkeypatch):
    calls, original = [], adamw_cpu.step
    monkeypatch.setattr(adamw_cpu, "step", lambda *args: calls.append(args[2]) or original(*args))
    plain, _ = trained(False, max_norm, monkeypatch)
    assert calls == []                                                  # where bits are promised they are PyTorch's
    ours, _ = trained(True, max_norm, monkeypatch)
    assert len(calls) == 3 and all((factor < 1) == (max_norm == 0.3) for factor in calls)
    for (name, a), b in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert all(torch.equal(copied, weight.bfloat16()) for copied, weight in zip(ours.copies, ours.weights, strict=True))


def test_a_weight_that_is_frozen_and_changed_by_hand_has_its_copy_cast(monkeypatch):
    weights, optimizer = trained(True, 1.0, monkeypatch)
    weights.weights[0].grad = None
    with torch.no_grad():
        weights.weights[0].mul_(2)
    cpu.update(optimizer, weights, 1.0)
    assert torch.equal(weights.copies[0], weights.weights[0].bfloat16())


@pytest.mark.parametrize("last", (float("nan"), float("inf")))
def test_a_norm_that_is_no_number_reaches_the_weights_as_pytorchs_does(last, monkeypatch):
    ours, plain = (trained(own, 1.0, monkeypatch, [0], last)[0].model for own in (True, False))
    assert all(p.isnan().all() == (last != last) for p in list(ours.parameters())[:-1])
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def drop(optimizer, outside):
    return optimizer.param_groups[1]["params"].pop()


def add(optimizer, outside):
    optimizer.add_param_group({"params": [outside]})
    return outside


@pytest.mark.parametrize("change, said", [(drop, "1 of the model's gradients are not in the optimizer"),
                                          (add, "and 1 of the optimizer's not in the model")])
def test_where_the_optimizers_gradients_are_not_the_models_pytorch_clips_them(change, said, monkeypatch):
    weights, optimizer = trained(True, 1.0, monkeypatch)
    other = change(optimizer, torch.nn.Parameter(torch.zeros(8)))
    for p in {*weights.model.parameters(), other}:
        p.grad = torch.ones_like(p)
    assert said in cpu.why_not_in_one_pass(optimizer, weights, 1.0) and cpu.why_not_in_one_pass(optimizer, weights, 0.0) is None
    step = TrainingStep(weights.model, optimizer, dtype=torch.bfloat16, batch_shape=(2, 8), not_captured="a CPU")
    step._on_cpu = False                                                # as on a GPU
    monkeypatch.setattr(step.one_pass, "why_not", lambda: None)
    assert said in step.why_not_in_one_pass()
    cpu.update(optimizer, weights, 1.0)
    norm = sum(p.numel() for p in weights.model.parameters()) ** 0.5
    for p in {*weights.model.parameters(), other}:
        factor = 1.0 if change is add and p is other else 1 / norm
        torch.testing.assert_close(p.grad, torch.full_like(p, factor))


def test_a_touched_optimizer_takes_pytorchs_step_and_copies_follow(monkeypatch):
    weights, optimizer = trained(True, 1.0, monkeypatch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    monkeypatch.setattr(adamw_cpu, "step", lambda *args: pytest.fail("the scheduler counts optimizer.step()"))
    before = weights.weights[0].detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu.update(optimizer, weights, 1.0)
        scheduler.step()
    assert not torch.equal(weights.weights[0], before) and torch.equal(weights.copies[0], weights.weights[0].bfloat16())


@pytest.mark.skipif(not linear_cpu.AMX, reason="this CPU has no AMX: gradients are PyTorch's, and so is the update")
def test_a_run_that_was_stopped_goes_on_exactly_and_lies_on_pytorchs(tmp_path, monkeypatch):
    tiny.data(tmp_path)
    taken, original = [], adamw_cpu.step
    monkeypatch.setattr(adamw_cpu, "step", lambda *args: taken.append(1) or original(*args))
    settings = dict(dtype="bfloat16", backend="auto", max_iters=20, dropout=0.1, grad_clip=0.3)
    straight, broken, plain = (tiny.options(tmp_path, name, **settings) for name in ("straight", "broken", "plain"))
    training.train(straight)
    training.train(dataclasses.replace(broken, max_iters=10))
    torch.manual_seed(0)
    training.train(dataclasses.replace(broken, init_from="resume"))
    assert len(taken) == 40 and tiny.losses(broken) == tiny.losses(straight)
    monkeypatch.setattr(adamw_cpu, "why_not", lambda optimizer: "asked for")
    training.train(plain)
    assert len(taken) == 40
    # A rounding may move a bf16 copy by a unit, and AdamW's first steps are of one size: 1e-3 was seen, the loss falls by 0.9.
    assert list(tiny.losses(plain).values()) == pytest.approx(list(tiny.losses(straight).values()), abs=1e-2)
