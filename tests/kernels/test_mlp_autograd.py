"""gelu_mlp on its kernels: as an op under autograd, autocast, torch.compile, checkpointing and a GradScaler."""
import itertools

import harness
import pytest
import torch
import torch._dynamo.testing
from harness import assert_close_to_oracle, same_bits
from made import Made
from nanogpt_fast.kernels import dropout
from torch.utils.checkpoint import checkpoint

from nanogpt_fast import backend, reference
from nanogpt_fast.checks.error_rule import in_order
from nanogpt_fast.ops import mlp as op
from nanogpt_fast.ops.mlp import gelu_mlp

FUSED = backend.parse("fused")
DEVICE = harness.DEVICE
FORMS = pytest.mark.parametrize("form", ("epilogue", "pointwise"))      # the third is for Hopper alone: tests/ops/test_mlp_hopper.py
NAMES = ("x", "w_fc", "b_fc", "w_proj", "b_proj")


def draw(B=2, T=9, C=24, dtype=torch.float32, weight_dtype=None, bias=True):
    """x (B, T, C) and the four parameters, all requiring gradients."""
    def parameter(*shape, scale):
        return (torch.randn(*shape, device=DEVICE) * scale).to(weight_dtype or dtype).requires_grad_()
    F = 4 * C
    return [torch.randn(B, T, C, device=DEVICE).to(dtype).requires_grad_(),
            parameter(F, C, scale=2 / C**0.5), parameter(F, scale=1.0) if bias else None,
            parameter(C, F, scale=2 / F**0.5), parameter(C, scale=1.0) if bias else None]


def gradients(y, args, dy, **kwargs):
    return torch.autograd.grad(y, [a for a in args if a is not None], dy, **kwargs)


def in_fp64(args):
    return [None if a is None else a.detach().double().requires_grad_() for a in args]


# ---------------------------------------------------------------------------------------------------------------- numbers


@FORMS
@pytest.mark.parametrize("dtype, weight_dtype, autocast", (
    (torch.float32, torch.float32, None),               # plain fp32
    (torch.bfloat16, torch.float32, torch.bfloat16),    # training: LayerNorm's output is half, the weights fp32
    (torch.float32, torch.float32, torch.float16),      # the drop-in under autocast without a fused LayerNorm
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),   # the trainer's half-precision copies
    (torch.float16, torch.float16, None),               # model.half()
), ids=("fp32", "bf16 x, fp32 weights", "autocast fp16", "bf16 copies", "half"))
@pytest.mark.parametrize("activation, bias", (("gelu", True), ("gelu_tanh", False), ("relu", True)))
def test_output_and_gradients_are_as_near_to_fp64_as_the_reference(form, dtype, weight_dtype, autocast, activation, bias):
    args = draw(dtype=dtype, weight_dtype=weight_dtype, bias=bias)
    if activation == "relu":        # every unit on or off by far: at the kink a rounding decides over a whole gradient
        with torch.no_grad():
            args[2].sign_().mul_(20)
    with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
        y = gelu_mlp(*args, activation=activation, form=form, backend=FUSED)
        plain = reference.gelu_mlp(*args, activation_name=activation)
    exact_args = in_fp64(args)
    exact = reference.gelu_mlp(*exact_args, activation_name=activation)
    assert y.dtype == plain.dtype and y.shape == plain.shape
    # Inputs of a mean that isn't 0 make the rounding of a weight an error of the same sign in every row, in PyTorch too.
    check_bias = activation != "relu"
    assert_close_to_oracle(y, exact, plain, "forward", what="y", check_bias=check_bias)
    dy = torch.randn_like(y)
    names = [name for name, a in zip(NAMES, args) if a is not None]
    oracles = gradients(exact, exact_args, dy.double())
    for name, ours, oracle, theirs in zip(names, gradients(y, args, dy), oracles, gradients(plain, args, dy)):
        assert ours.dtype == theirs.dtype
        rows = dy.double().flatten(0, -2)
        summed = in_order(len(rows), rows.square().sum(0), oracle) if name == "b_proj" else None
        assert_close_to_oracle(ours, oracle, theirs, "gradient", summed=summed, what=name, check_bias=check_bias)


@pytest.mark.parametrize("dtype, weight_dtype, autocast", (
    (torch.float32, torch.float32, None), (torch.bfloat16, torch.bfloat16, None), (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float16, torch.float16, None)), ids=("fp32", "bf16", "autocast", "fp16"))
def test_on_the_kink_the_gates_of_relu_are_those_of_pytorch(dtype, weight_dtype, autocast):
    """Each bias is minus a unit's product, rounded: what is left is that rounding, of either sign."""
    args = draw(B=1, T=16, dtype=dtype, weight_dtype=weight_dtype)
    with torch.no_grad():
        args[0].copy_(args[0][:, :1].expand_as(args[0]))        # one row, 16 times: every unit of every row is on the kink
        exact = torch.nn.functional.linear(args[0].double()[0, 0], args[1].to(dtype).double())
        args[2].copy_(-exact)
    with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
        y = gelu_mlp(*args, activation="relu", form="pointwise", backend=FUSED)
        plain = reference.gelu_mlp(*args, activation_name="relu")
    dy = torch.randn_like(y)
    ours, theirs = gradients(y, args, dy)[2], gradients(plain, args, dy)[2]                                     # of b_fc
    assert torch.equal(ours != 0, theirs != 0)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


@FORMS
def test_gradients_of_fp32_parameters_are_never_rounded_to_half(form):
    args = draw(dtype=torch.bfloat16, weight_dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = gelu_mlp(*args, form=form, backend=FUSED)
    for name, gradient in zip(NAMES[1:], gradients(y, args, torch.randn_like(y))[1:]):
        assert gradient.dtype == torch.float32
        if name != "b_proj":            # a sum of 18 numbers of 8 bits often fits 8 bits again
            assert not torch.equal(gradient, gradient.bfloat16().float()), name


@FORMS
def test_recompute_keeps_less_and_gives_the_same_gradients(form):
    args = draw(dtype=torch.bfloat16)
    kept, gradients_of = {}, {}
    for recompute in (False, True):
        with Saved(args) as saved:
            y = gelu_mlp(*args, form=form, recompute=recompute, backend=FUSED)
        kept[recompute] = saved.bytes()
        gradients_of[recompute] = gradients(y, args, torch.ones_like(y))
    tokens, C = 18, 24
    assert kept == {False: 18 * C * tokens, True: 10 * C * tokens}
    for name, a, b in zip(NAMES, gradients_of[False], gradients_of[True]):
        if name == "w_proj":            # post is computed from h as it was stored: a rounding apart, 2^-8 in bf16
            assert ((a - b).float().norm() / a.float().norm()) < 2**-7
        else:
            assert same_bits(a, b), name


@FORMS
def test_fp16_gradients_survive_a_grad_scaler(form):
    """Output gradients of 4 and of 6e-8, fp16's smallest, beside each other give what fp64 gives of the same numbers."""
    args = draw(dtype=torch.float16, weight_dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.float16):
        y = gelu_mlp(*args, form=form, backend=FUSED)
        plain = reference.gelu_mlp(*args)
    exact_args = in_fp64(args)
    exact = reference.gelu_mlp(*exact_args)
    dy = torch.full_like(y, 2.0**-24)
    dy[0, 0] = 4.0
    ours, oracle, theirs = gradients(y, args, dy), gradients(exact, exact_args, dy.double()), gradients(plain, args, dy)
    for name, a, b, c in zip(NAMES, ours, oracle, theirs):
        assert_close_to_oracle(a, b, c, "gradient", what=name, check_bias=False)


def test_the_forms_of_forward_and_backward_mix(monkeypatch):
    args = draw(dtype=torch.float32)
    exact_args = in_fp64(args)
    exact = reference.gelu_mlp(*exact_args)
    dy = torch.randn_like(args[0])
    oracle = gradients(exact, exact_args, dy.double())
    for forms in itertools.product(("epilogue", "pointwise"), repeat=2):
        monkeypatch.setattr(op, "_faster_forms", lambda *_: forms)
        for recompute in (False, True):
            y = gelu_mlp(*args, recompute=recompute, backend=FUSED)
            for a, b in zip((y, *gradients(y, args, dy)), (exact, *oracle)):
                torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- layouts


LAYOUTS = {
    "transposed": lambda: torch.randn(9, 2, 24, device=DEVICE).transpose(0, 1),
    "last axis transposed": lambda: torch.randn(2, 24, 9, device=DEVICE).transpose(1, 2),
    "expanded": lambda: torch.randn(1, 1, 24, device=DEVICE).expand(2, 9, 24),
    "expanded from a scalar": lambda: torch.randn(1, 1, 1, device=DEVICE).expand(2, 9, 24),
    "a view into a larger one": lambda: torch.randn(2, 12, 40, device=DEVICE)[:, 2:11, 5:29],
}


@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_input_weights_and_output_gradient_is_right(form, layout):
    args = draw()
    args[0] = LAYOUTS[layout]().detach().requires_grad_()
    args[1] = args[1].detach().t().contiguous().t().requires_grad_()
    dy = LAYOUTS[layout]()
    y, plain = gelu_mlp(*args, form=form, backend=FUSED), reference.gelu_mlp(*args)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(y, args, dy), gradients(plain, args, dy), rtol=1e-4, atol=1e-4)


@FORMS
@pytest.mark.parametrize("shape", ((0, 9), (3, 0), (1, 1), (5,), (), (2, 3, 4)))
def test_any_leading_shape_is_taken(form, shape):
    args = draw()
    args[0] = torch.randn(*shape, 24, device=DEVICE, requires_grad=True)
    dy = torch.randn(*shape, 24, device=DEVICE)
    y, plain = gelu_mlp(*args, form=form, backend=FUSED), reference.gelu_mlp(*args)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(y, args, dy), gradients(plain, args, dy), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- autograd


class Saved:
    """Inside, collects what autograd keeps; `bytes()`: of distinct storages, those of `excluded` (parameters) left out."""

    def __init__(self, args):
        self.excluded = {a.untyped_storage().data_ptr() for a in args[1:] if a is not None}
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda t: t)

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.excluded:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes(self):
        return sum(self.storages.values())

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@FORMS
@pytest.mark.parametrize("recompute", (False, True), ids=("keep", "recompute"))
def test_frozen_parameters_cost_nothing_and_change_nothing(form, recompute):
    args = draw()
    dy = torch.randn_like(args[0])
    complete = dict(zip(NAMES, gradients(gelu_mlp(*args, form=form, recompute=recompute, backend=FUSED), args, dy)))
    for needs in itertools.product((False, True), repeat=5):
        for a, need in zip(args, needs):
            a.requires_grad_(need)
        y = gelu_mlp(*args, form=form, recompute=recompute, backend=FUSED)
        assert y.requires_grad == any(needs)
        if not any(needs):
            continue
        wanted = [name for name, need in zip(NAMES, needs) if need]
        with Made() as made:
            out = torch.autograd.grad(y, [a for a in args if a.requires_grad], dy)
        for name, gradient in zip(wanted, out):
            assert torch.equal(gradient, complete[name]), (name, wanted)
        need_x, need_w_fc, need_b_fc, need_w_proj, _ = needs
        dpost = (need_x or need_w_fc or need_b_fc) and form == "pointwise"
        assert made.matmuls == dpost + need_x + need_w_fc + need_w_proj, wanted


@FORMS
def test_without_gradients_nothing_is_kept(form):
    args = draw()
    expected = gelu_mlp(*args, form=form, backend=FUSED)
    with torch.no_grad(), Saved(args) as saved:
        y = gelu_mlp(*args, form=form, backend=FUSED)
    assert same_bits(y, expected.detach()) and not y.requires_grad and saved.bytes() == 0


def test_activation_bytes_kept_for_the_backward_per_token():
    """What the MLP keeps for one token in bf16, in units of C bytes: x 2, h 8, post 8. PyTorch keeps the same 18.

    Under autocast both also keep half-precision copies of the weights; those don't grow with the tokens and are left out by
    drawing weights in bf16.
    """
    args = draw(B=4, T=32, C=32, dtype=torch.bfloat16)
    per_token = {}
    for what, run in {"ours": lambda: gelu_mlp(*args, backend=FUSED),
                      "ours, recompute": lambda: gelu_mlp(*args, recompute=True, backend=FUSED),
                      "ours, frozen w_proj": lambda: gelu_mlp(*args[:3], args[3].detach(), args[4], backend=FUSED),
                      "reference": lambda: reference.gelu_mlp(*args)}.items():
        with Saved(args) as saved:
            run()
        per_token[what] = saved.bytes() / (4 * 32 * 32)
    print(f"bytes kept for the backward, in C a token: {per_token}")
    assert per_token == {"ours": 18, "ours, recompute": 10, "ours, frozen w_proj": 10, "reference": 18}


@FORMS
def test_backward_may_run_twice_and_gives_the_same_bits(form):
    args = draw(dtype=torch.bfloat16)
    y = gelu_mlp(*args, dropout_p=0.2, form=form, backend=FUSED)
    dy = torch.randn_like(y)
    first, second = gradients(y, args, dy, retain_graph=True), gradients(y, args, dy)
    assert all(same_bits(a, b) for a, b in zip(first, second))


@FORMS
def test_gradients_accumulate(form):
    args = draw()
    dy = torch.randn_like(args[0])
    for _ in range(2):
        gelu_mlp(*args, form=form, backend=FUSED).backward(dy)
    once = gradients(gelu_mlp(*args, form=form, backend=FUSED), args, dy)
    assert all(torch.equal(a.grad, 2 * g) for a, g in zip(args, once))


def test_a_second_derivative_raises_instead_of_being_wrong():
    args = draw()
    y = gelu_mlp(*args, backend=FUSED)
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
        gradients(y, args, torch.ones_like(y), create_graph=True)


@FORMS
def test_a_backward_under_autocast_computes_in_the_forwards_dtypes(form):
    args = draw()
    dy = torch.randn_like(args[0])
    expected = gradients(gelu_mlp(*args, form=form, backend=FUSED), args, dy)
    y = gelu_mlp(*args, form=form, backend=FUSED)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert all(same_bits(a, b) for a, b in zip(gradients(y, args, dy), expected))


# ---------------------------------------------------------------------------------------------------------------- dropout


@FORMS
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_forward_and_backward_drop_the_same_elements(form, dtype, monkeypatch):
    args, p, seed = draw(dtype=dtype), 0.3, torch.tensor([77], device=DEVICE)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: seed)
    y = gelu_mlp(*args, dropout_p=p, form=form, backend=FUSED)
    keep = dropout.row_mask(seed, 18, 24, p).to(DEVICE).view(2, 9, 24) / (1 - p)
    dy = torch.randn_like(y)
    plain = reference.gelu_mlp(*args) * keep.to(dtype)
    exact_args = in_fp64(args)
    exact = reference.gelu_mlp(*exact_args) * keep.double()
    assert_close_to_oracle(y, exact, plain, "forward", what="y")
    oracle, theirs = gradients(exact, exact_args, dy.double()), gradients(plain, args, dy)
    for name, a, b, c in zip(NAMES, gradients(y, args, dy), oracle, theirs):
        assert_close_to_oracle(a, b, c, "gradient", what=name)


@FORMS
def test_each_call_draws_another_mask_and_the_generator_repeats_them(form):
    args = draw()

    def kept():
        return gelu_mlp(*args, dropout_p=0.5, form=form, backend=FUSED) != 0

    torch.manual_seed(5)
    first, second = kept(), kept()
    torch.manual_seed(5)
    assert torch.equal(kept(), first) and not torch.equal(first, second)


@FORMS
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_draws_the_same_mask_again(form, reentrant):
    args = draw()

    def run(*args):
        return gelu_mlp(*args, dropout_p=0.4, form=form, backend=FUSED)

    dy, outs = torch.randn_like(args[0]), []
    for call in (run, lambda *args: checkpoint(run, *args, use_reentrant=reentrant)):
        torch.manual_seed(3)
        y = call(*args)
        for a in args:
            a.grad = None
        y.backward(dy)
        outs.append([y.detach(), *(a.grad for a in args)])
    assert all(same_bits(a, b) for a, b in zip(*outs))


# ---------------------------------------------------------------------------------------------------------------- compiled


def operator_arguments():
    x, w_fc, b_fc, w_proj, b_proj = (a.detach() for a in draw(B=1))
    x, seed = x[0], torch.tensor([5], device=DEVICE)
    h, post = torch.randn(9, 96, device=DEVICE), torch.randn(9, 96, device=DEVICE)
    forward = [(x, w_fc, b_fc, w_proj, b_proj, None, "gelu", 0.0, "epilogue", True, True),
               (x, w_fc, None, w_proj, None, seed, "relu", 0.2, "pointwise", True, False),
               (x, w_fc, b_fc, w_proj, b_proj, seed, "gelu_tanh", 0.2, "epilogue", False, False)]
    backward = [(x, x, w_fc, b_fc, w_proj, h, post, None, "gelu", 0.0, "epilogue", "epilogue", True, True, True, True, True),
                (x, x, w_fc, b_fc, w_proj, h, None, seed, "gelu", 0.2, "pointwise", "pointwise", True, True, True, True, True),
                (x, None, None, b_fc, None, None, post, None, "gelu", 0.0, "epilogue", "epilogue",
                 False, False, False, True, False),
                (x, *[None] * 7, "gelu", 0.0, "epilogue", "epilogue", False, False, False, False, True)]
    return [("mlp_forward", args) for args in forward] + [("mlp_backward", args) for args in backward]


@pytest.mark.parametrize("number", range(7))
def test_the_registered_operators_pass_opcheck(number):
    name, args = operator_arguments()[number]
    torch.library.opcheck(getattr(torch.ops.nanogpt_fast, name), args)


@FORMS
@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
@pytest.mark.parametrize("autocast", (False, True), ids=("fp32", "autocast"))
def test_compiled_it_is_one_graph_for_any_length_and_gives_the_same(form, compiler, autocast):
    args = draw()

    def step(x):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return gelu_mlp(x, *args[1:], form=form, backend=FUSED)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for T in (7, 9, 12, 5):
        args[0] = draw(T=T)[0]
        outs = []
        for run in (compiled, step):
            y = run(args[0])
            outs.append((y, *gradients(y, args, torch.ones_like(y))))
        torch.testing.assert_close(*outs)
    assert counter.frame_count <= 2             # the first length, then any


@FORMS
def test_compiled_dropout_draws_another_mask_at_each_step_without_recompiling(form):
    args = draw()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: gelu_mlp(x, *args[1:], dropout_p=0.5, form=form, backend=FUSED),
                             fullgraph=True, backend=counter)
    outs = [compiled(args[0]) for _ in range(3)]
    assert counter.frame_count == 1
    assert not torch.equal(outs[0] != 0, outs[1] != 0) and not torch.equal(outs[1] != 0, outs[2] != 0)
    # forward and backward agree: the gradient of b_proj is the number of rows kept, over 1 - p
    (db,) = torch.autograd.grad(outs[0], args[4], torch.ones_like(outs[0]))
    torch.testing.assert_close(db, (outs[0] != 0).flatten(0, 1).sum(0) / 0.5)


def test_it_can_be_exported():
    class MLP(torch.nn.Module):

        def __init__(self):
            super().__init__()
            self.parameters_ = torch.nn.ParameterList(a.detach() for a in draw()[1:])

        def forward(self, x):
            return gelu_mlp(x, *self.parameters_, backend=FUSED)

    module, T = MLP(), torch.export.Dim("T", min=2, max=64)
    exported = torch.export.export(module, (draw()[0].detach(),), dynamic_shapes=({1: T},)).module()
    x = draw(T=11)[0].detach()
    torch.testing.assert_close(exported(x), module(x))


# ------------------------------------------------------------------------------------------------------ which one is taken


def test_auto_and_fused_take_the_kernel_only_where_it_is_right():
    args = draw()
    assert op.implementation(*args, backend=FUSED) == "triton"
    assert op.implementation(*args, backend=backend.parse("auto")) == ("reference" if harness.INTERPRETED else "triton")
    for bad, why in (([a.double() for a in args], "float64"), ([args[0].half(), *args[1:]], "autocast is off"),
                     ([*args[:4], args[4].half()], "b_proj torch.float16 and autocast is off")):
        with pytest.raises(RuntimeError, match=why):
            gelu_mlp(*bad, backend=FUSED)
