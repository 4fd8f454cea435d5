"""layer_norm and add_layer_norm as ops: autograd, strides, autocast, torch.compile, torch.export, checkpointing."""
import copy

import harness
import pytest
import torch
from nanogpt_fast.kernels import dropout, layer_norm as kernels
from torch.utils.checkpoint import checkpoint

from nanogpt_fast import backend, reference
from nanogpt_fast.ops.norm import add_layer_norm, implementation, layer_norm

FUSED = backend.parse("fused")
C = 100


def leaves(*shape, dtypes=(torch.float32, ) * 4):
    """x, branch, weight, bias that require grad."""
    x, branch = (torch.randn(*shape, C) for _ in range(2))
    tensors = x, branch, 1 + 0.3 * torch.randn(C), torch.randn(C)
    return [t.to(harness.DEVICE, dtype).requires_grad_() for t, dtype in zip(tensors, dtypes)]


def cotangents(*outputs):
    generator = torch.Generator(device=harness.DEVICE).manual_seed(1)
    return [torch.randn(o.shape, device=o.device, generator=generator).to(o.dtype) for o in outputs]


def gradients(outputs, inputs, given=None):
    return torch.autograd.grad(outputs, inputs, given or cotangents(*outputs), allow_unused=True)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Against the reference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (4, ), (), (2, 1, 3), (0, 5), (0, )])
def test_shapes_and_gradients_are_the_references(shape):
    inputs = leaves(*shape)
    fused, plain = add_layer_norm(*inputs, backend=FUSED), reference.add_layer_norm(*inputs)
    assert_same(fused, plain)
    assert_same(gradients(fused, inputs), gradients(plain, inputs))
    x, _, weight, bias = inputs
    fused, plain = layer_norm(x, weight, bias, backend=FUSED), reference.layer_norm(x, weight, bias)
    assert_same([fused], [plain])
    assert_same(gradients([fused], (x, weight, bias)), gradients([plain], (x, weight, bias)))


@pytest.mark.parametrize("used", ["both", "s", "y"])
def test_without_a_branch_the_stream_is_x_itself(used):
    """In memory; both gradients go through one kernel, so autograd has none to add."""
    x, _, weight, bias = leaves(3, 5)
    s, y = add_layer_norm(x, None, weight, bias, backend=FUSED)
    assert s.data_ptr() == x.data_ptr() and torch.equal(s, x)
    outputs, expected = {"s": s * 1, "y": y}, {"s": x * 1, "y": reference.layer_norm(x, weight, bias)}
    pick = lambda named: [t for name, t in named.items() if used in ("both", name)]
    wanted = (x,) if used == "s" else (x, weight, bias)
    assert_same(gradients(pick(outputs), wanted), gradients(pick(expected), wanted))
    with torch.no_grad():
        assert add_layer_norm(x, None, weight, bias, backend=FUSED)[0] is x


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_last_one_returns_no_stream_and_the_same_gradients(p):
    inputs, found = leaves(3, 5), []
    for last in (False, True):
        torch.manual_seed(7)    # of the mask
        s, y = add_layer_norm(*inputs, dropout_p=p, last=last, backend=FUSED)
        assert (s is None) == last
        found.append((y, *gradients([y], inputs)))
    assert all(harness.same_bits(a, b) for a, b in zip(*found, strict=True))
    assert add_layer_norm(*inputs, last=True, backend=backend.parse("reference"))[0] is None


def test_without_a_bias():
    x, branch, weight, _ = leaves(3, 5)
    fused, plain = add_layer_norm(x, branch, weight, None, backend=FUSED), reference.add_layer_norm(x, branch, weight, None)
    assert_same(gradients(fused, (x, branch, weight)), gradients(plain, (x, branch, weight)))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("used", ["s", "y", "neither"])
def test_an_output_that_nothing_uses_has_no_gradient(used, p, monkeypatch):
    seeds = keep_seed(monkeypatch)
    inputs = leaves(3, 5)
    s, y = add_layer_norm(*inputs, dropout_p=p, backend=FUSED)
    if used == "neither":
        assert not torch.autograd.grad(inputs[0].sum(), inputs[1:], allow_unused=True)[0]
        return
    keep = dropout.row_mask(seeds[0], 15, C, p).view(3, 5, C).to(harness.DEVICE) if p else True
    x, branch, weight, bias = inputs
    dropped = torch.where(torch.as_tensor(keep, device=x.device), branch / (1 - p), 0.0)
    plain_s, plain_y = reference.add_layer_norm(x, dropped, weight, bias)
    assert_same(gradients([{"s": s, "y": y}[used]], inputs), gradients([{"s": plain_s, "y": plain_y}[used]], inputs))


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_input_gets_no_gradient_and_the_others_theirs(frozen):
    inputs = leaves(3, 5)
    inputs[frozen].requires_grad_(False)
    live = [t for t in inputs if t.requires_grad]
    assert_same(gradients(add_layer_norm(*inputs, backend=FUSED), live), gradients(reference.add_layer_norm(*inputs), live))


# Strides ---------------------------------------------------------------------------------------------------------------------

VIEWS = {
    "transposed rows": lambda *shape: torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1),
    "transposed columns": lambda *shape: torch.randn(shape[0], shape[2], shape[1]).transpose(1, 2),
    "expanded over rows": lambda *shape: torch.randn(1, 1, shape[2]).expand(shape),
    "expanded over columns": lambda *shape: torch.randn(shape[0], shape[1], 1).expand(shape),
    "one number expanded": lambda *shape: torch.randn(1, 1, 1).expand(shape),
    "offset and strided rows": lambda *shape: torch.randn(shape[0], shape[1], 3 * shape[2])[..., shape[2] + 1:2 * shape[2] + 1],
    "every second column": lambda *shape: torch.randn(shape[0], shape[1], 2 * shape[2])[..., ::2],
    "batches apart": lambda *shape: torch.randn(2 * shape[0], shape[1], shape[2])[::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_inputs_and_gradients_may_be_any_view(view):
    make = lambda: VIEWS[view](3, 5, C).to(harness.DEVICE)
    for i in (0, 1):  # x, branch; not both at once: rows of equal values have no direction, only rounding noise
        inputs = leaves(3, 5)
        inputs[i] = make().requires_grad_()
        given = [make(), make()]
        fused, plain = add_layer_norm(*inputs, backend=FUSED), reference.add_layer_norm(*inputs)
        assert_same(fused, plain)
        assert_same(gradients(fused, inputs, given), gradients(plain, inputs, given))


def test_a_sum_sends_an_expanded_gradient():
    inputs = leaves(3, 5)
    got = torch.autograd.grad(add_layer_norm(*inputs, backend=FUSED)[0].sum(), inputs[:2])
    assert_same(got, [torch.ones(3, 5, C, device=harness.DEVICE)] * 2)


# Dtypes ----------------------------------------------------------------------------------------------------------------------


def test_under_autocast_y_is_what_the_next_matmul_eats_and_the_stream_stays():
    x, branch, weight, bias = leaves(3, 5, dtypes=(torch.float32, torch.bfloat16, torch.float32, torch.float32))
    with torch.autocast(harness.DEVICE.type, torch.bfloat16):
        s, y = add_layer_norm(x, branch, weight, bias, backend=FUSED)
        assert (s.dtype, y.dtype) == (torch.float32, torch.bfloat16)
        assert add_layer_norm(x, None, weight, bias, backend=FUSED)[1].dtype == torch.bfloat16
        assert add_layer_norm(x, branch, weight, bias, out_dtype=torch.float32, backend=FUSED)[1].dtype == torch.float32
        for given in (x, branch):  # layer_norm alone gives what PyTorch gives: on CUDA fp32
            assert layer_norm(given, weight, bias, backend=FUSED).dtype == reference.layer_norm(given, weight, bias).dtype
    assert [g.dtype for g in gradients((s, y), (x, branch, weight, bias))] == [t.dtype for t in (x, branch, weight, bias)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_autocast_the_dtype_is_xs(dtype):
    s, y = add_layer_norm(*leaves(3, 5, dtypes=(dtype, ) * 4), backend=FUSED)
    assert s.dtype == y.dtype == dtype


# Dropout ---------------------------------------------------------------------------------------------------------------------


def keep_seed(monkeypatch):
    """The list of the seeds that the kernels are launched with from now on."""
    seeds, launch = [], kernels.launch_forward

    def remember(x, branch, weight, bias, seed, *rest):
        seeds.append(None if seed is None else seed.clone())
        return launch(x, branch, weight, bias, seed, *rest)

    monkeypatch.setattr(kernels, "launch_forward", remember)
    return seeds


def test_each_call_draws_a_mask_from_torchs_generator(monkeypatch):
    seeds, inputs = keep_seed(monkeypatch), leaves(3, 5)
    torch.manual_seed(7)
    first, second = (add_layer_norm(*inputs, dropout_p=0.5, backend=FUSED)[0] for _ in range(2))
    torch.manual_seed(7)
    again = add_layer_norm(*inputs, dropout_p=0.5, backend=FUSED)[0]
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert seeds[0] == seeds[2] != seeds[1] and 0 <= int(seeds[0]) < 2**63
    add_layer_norm(*inputs, backend=FUSED)
    assert seeds[3] is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(use_reentrant, monkeypatch):
    seeds, inputs = keep_seed(monkeypatch), leaves(3, 5)

    def run(*tensors):
        return add_layer_norm(*tensors, dropout_p=0.5, backend=FUSED)

    torch.manual_seed(3)
    plain = gradients(run(*inputs), inputs)
    torch.manual_seed(3)
    x, branch, weight, bias = inputs
    given = cotangents(x, x)
    s, y = checkpoint(run, *inputs, use_reentrant=use_reentrant)
    ((s * given[0]).sum() + (y * given[1]).sum()).backward()
    assert len(seeds) == 3 and seeds[0] == seeds[1] == seeds[2]
    assert_same([t.grad for t in inputs], plain)


# Backward more than once -----------------------------------------------------------------------------------------------------


def test_backward_twice_with_retain_graph_gives_the_same_bits():
    inputs = leaves(3, 5)
    outputs = add_layer_norm(*inputs, dropout_p=0.2, backend=FUSED)
    given = cotangents(*outputs)
    first, second = (torch.autograd.grad(outputs, inputs, given, retain_graph=True) for _ in range(2))
    assert all(harness.same_bits(a, b) for a, b in zip(first, second))
    torch.autograd.grad(outputs, inputs, given)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(outputs, inputs, given)


@pytest.mark.parametrize("op", [lambda x, b, w, c: add_layer_norm(x, b, w, c, backend=FUSED)[1],
                                lambda x, b, w, c: layer_norm(x, w, c, backend=FUSED)], ids=["add_layer_norm", "layer_norm"])
def test_a_second_derivative_raises(op):
    inputs = leaves(3, 5)
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
        torch.autograd.grad(op(*inputs).square().sum(), inputs[0], create_graph=True)


def test_outputs_may_be_changed_in_place_and_the_backward_notices_where_it_must():
    inputs = leaves(3, 5)
    _, y = add_layer_norm(*inputs, backend=FUSED)
    assert_same(gradients([y.mul_(2)], inputs[:1]), gradients([reference.add_layer_norm(*inputs)[1] * 2], inputs[:1]))
    s, y = add_layer_norm(*inputs, backend=FUSED)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        s.add_(1)
        gradients([y], inputs[:1])


# torch.compile, torch.export -------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):

    def __init__(self, p):
        super().__init__()
        self.lin, self.ln, self.p = torch.nn.Linear(C, C), torch.nn.LayerNorm(C), p

    def forward(self, x):
        s, y = add_layer_norm(x, self.lin(x), self.ln.weight, self.ln.bias, dropout_p=self.p, backend=FUSED)
        h = layer_norm(y, self.ln.weight, None, backend=FUSED)
        return add_layer_norm(s, self.lin(h), self.ln.weight, None, dropout_p=self.p, last=True, backend=FUSED)[1]


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_whole_it_is_what_it_is_eagerly(autocast):
    torch._dynamo.reset()
    net = Net(0.0).to(harness.DEVICE)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6, C, device=harness.DEVICE)
    results = []
    for module in (net, compiled):
        with torch.autocast(harness.DEVICE.type, torch.bfloat16, enabled=autocast):
            out = module(x)
        out.float().square().mean().backward()
        results.append([out, *(p.grad for p in module.parameters())])
    for a, b in zip(*results):
        assert a.dtype == b.dtype
        # bf16 sums run in another order when compiled: a unit in the last place, 2^-8
        torch.testing.assert_close(a, b, **(dict(rtol=2**-7, atol=2**-9) if autocast else dict(rtol=1e-5, atol=1e-6)))


def test_no_recompilation_for_a_new_seed_or_a_new_step():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Net(0.5).to(harness.DEVICE), fullgraph=True, backend=counter)
    x = torch.randn(4, 6, C, device=harness.DEVICE)
    outputs = [compiled(x) for _ in range(3)]
    outputs[-1].sum().backward()
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1])


def test_the_model_exports_with_a_dynamic_batch():
    net = Net(0.0).to(harness.DEVICE).eval()
    x = torch.randn(4, 6, C, device=harness.DEVICE)
    program = torch.export.export(net, (x, ), dynamic_shapes={"x": {0: torch.export.Dim("B", min=2, max=64)}})
    assert {"nanogpt_fast.layer_norm_forward.default"} <= {str(node.target) for node in program.graph.nodes}
    other = torch.randn(3, 6, C, device=harness.DEVICE)
    torch.testing.assert_close(program.module()(other), net(other))


@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_operators_pass_torchs_own_check(branch_dtype, p):
    x, ds, dy = torch.randn(3, 6, C, device=harness.DEVICE)
    branch, weight, bias = x.to(branch_dtype), torch.rand(C, device=x.device), torch.rand(C, device=x.device)
    seed = torch.tensor([3], device=x.device) if p else None
    raw, tests = torch.ops.nanogpt_fast, ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for b in (branch, None):
        arguments = (x, b, weight, bias, seed, p, 1e-5, torch.bfloat16)
        torch.library.opcheck(raw.layer_norm_forward.default, arguments, test_utils=tests)
    s, y, statistics = raw.layer_norm_forward(x, branch, weight, bias, seed, p, 1e-5, torch.float32)
    for given in ((branch_dtype, torch.float32, torch.float32), (None, None, None), (branch_dtype, None, torch.bfloat16)):
        arguments = (dy, ds, s, weight, statistics, seed, p, *given)
        torch.library.opcheck(raw.layer_norm_backward.default, arguments, test_utils=tests)


# Choice ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, reason", [
    (dict(x=torch.zeros(3, C, dtype=torch.float64)), "x is torch.float64 on .*; the kernel takes float32, float16"),
    (dict(weight=torch.ones(C, dtype=torch.float64)), "x is torch.float32 on .*, weight is torch.float64"),
    (dict(x=torch.zeros(3, 9000), weight=torch.ones(9000), bias=None, branch=None), "rows have 9000 elements; .* 1 to 8192"),
    (dict(x=torch.zeros(3, C, dtype=torch.bfloat16)), "x is torch.bfloat16, branch torch.float32: their sum does not have"),
])
def test_fused_refuses_and_names_the_reason(change, reason):
    arguments = dict(x=torch.zeros(3, C), branch=torch.zeros(3, C), weight=torch.ones(C), bias=torch.zeros(C)) | change
    arguments = {name: None if t is None else t.to(harness.DEVICE) for name, t in arguments.items()}
    with pytest.raises(RuntimeError, match=f"backend='fused', but no kernel can run layer_norm: triton: {reason}"):
        add_layer_norm(**arguments, backend=FUSED)


def test_the_name_of_the_implementation():
    x, _, weight, bias = leaves(3)
    assert implementation(x, weight, bias, backend=FUSED) == "triton"
    assert implementation(x, weight, bias, backend=backend.parse("reference")) == "reference"
