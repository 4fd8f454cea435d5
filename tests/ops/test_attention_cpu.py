"""Attention on a CPU in bf16 (ops/cpu/attention.py, csrc/amx/attention.h, csrc/rows/attention.h) against fp64: shapes, tiles, instruction sets, where it steps aside."""
import math

import pytest
import torch

from nanogpt_fast import backend, reference
from nanogpt_fast.checks.error_rule import in_order, measure
from nanogpt_fast.ops import extension
from nanogpt_fast.ops.attention import CANDIDATES, causal_attention_qkvpacked
from nanogpt_fast.ops.cpu import attention as cpu

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=f"not here: {cpu.MISSING}")
ISAS = extension._C.build_info()["cpu_isas"].split() if cpu.MISSING is None else []
FUSED = backend.parse("fused")


@pytest.fixture(autouse=True, params=("on AMX tiles", "without"))
def way(request, monkeypatch):
    """Each test on tiles, and as on CPUs that have none. Where the interpreter runs, "fused" would mean the Triton kernel."""
    if request.param == "without":
        monkeypatch.setattr(cpu, "AMX", False)
    elif not cpu.AMX:
        pytest.skip("this CPU has no AMX")
    monkeypatch.setattr(backend, "_interpreted", False)
    torch.manual_seed(0)


def draw(B, T, H, D, scale=1.0):
    return (scale * torch.randn(B, T, 3 * H * D)).bfloat16().requires_grad_(), torch.randn(B, T, H * D).bfloat16()


def run(function, qkv, do):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv)
    return out, torch.autograd.grad(out, qkv, do.to(out.dtype))[0]


def costs_of(qkv, do, H, scale=None):
    """{name of a result: what `measure` is told of it}.

    cancelled: what two sums in fp32 cost. dP and the sum of p dP, which may cancel, and by luck bit for bit in PyTorch. And the scores, off
    1e4 by 1e-3: where two keys share a query's weight, everything is off in proportion, and PyTorch's may be nearly exact. With c the error of
    a score, g = dP - sum of p dP and dp_ij = p_ij (c_ij - sum over k of p_ik c_ik), the squares below are those of
    d(p g)_ij = sum over k of c_ik (p_ij g_ij [j = k] - p_ij p_ik (g_ij + g_ik)), for independent c.
    stored: the gradients from p and ds rounded once, as they are stored (rows of equal weights all round 1/n in the same direction).
    """
    q, k, v, do = (t.detach().double().unflatten(2, (H, -1)).transpose(1, 2) for t in (*qkv.chunk(3, 2), do))
    D = q.size(-1)
    scale = D**-0.5 if scale is None else scale
    p = (q @ k.mT * scale).masked_fill(~torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril(), -math.inf).softmax(-1)
    g = do @ v.mT
    g = g - (p * g).sum(-1, keepdim=True)
    m = (p * scale * in_order(D, q.square() @ k.square().mT, q @ k.mT)).square()
    m0, m1, m2 = (t.sum(-1, keepdim=True) for t in (m, m * g, m * g.square()))
    mean, both = p @ k, (p * g) @ k
    of_dp = (p * 2**0.5 * in_order(D, do.square() @ v.square().mT, do @ v.mT)).square()
    of_ds = of_dp + p.square() * (g.square() * m0 + 2 * g * m1 + m2) + m * g.square() * (1 - 4 * p)
    of_p = p.square() * m0 + m * (1 - 2 * p)
    off = (m * g.square()) @ k.square() - 2 * mean * ((m * g.square()) @ k) + mean.square() * m2
    squares = {"out": m @ v.square() - 2 * (p @ v) * (m @ v) + (p @ v).square() * m0,
               "dq": scale**2 * (of_dp @ k.square() + off - 2 * both * ((m * g) @ k - mean * m1) + both.square() * m0),
               "dk": scale**2 * of_ds.mT @ q.square(), "dv": of_p.mT @ do.square()}
    rounded, ds = p.bfloat16().double(), (scale * p * g).bfloat16().double()
    stored = {"dq": ds @ k, "dk": ds.mT @ q, "dv": rounded.mT @ do}
    packed = [{name: t.transpose(1, 2).flatten(2) for name, t in each.items()} for each in (squares, stored)]
    return {name: dict(cancelled=packed[0][name].clamp(min=0).sqrt(), stored=packed[1].get(name)) for name in squares}


def assert_close(found, qkv, do, H, **kwargs):
    out, dqkv = found
    exact_out, exact = run(lambda t: reference.causal_attention_qkvpacked(t, H, **kwargs), qkv.double(), do)
    plain_out, plain = run(lambda t: reference.causal_attention_qkvpacked(t, H, **kwargs), qkv, do)
    assert out.dtype == dqkv.dtype == torch.bfloat16
    parts = [("out", out, exact_out, plain_out, "forward")]
    parts += [(name, *tensors, "gradient") for name, *tensors in zip(("dq", "dk", "dv"), *(t.chunk(3, 2) for t in (dqkv, exact, plain)))]
    costs = costs_of(qkv, do, H, **kwargs)
    for name, ours, oracle, low, direction in parts:
        problem = measure(ours, oracle.detach(), low, direction, **costs[name]).problem
        assert problem is None, f"{name}: {problem}"


@pytest.mark.parametrize("B,T,H,D", [(2, 64, 3, 64), (1, 300, 2, 32), (1, 513, 1, 128), (2, 7, 2, 8), (3, 17, 2, 12), (4, 256, 2, 80),
                                     (5, 1, 2, 16), (2, 33, 1, 40), (1, 96, 2, 256)])
def test_results_and_gradients_are_as_near_to_fp64_as_pytorchs(B, T, H, D):
    qkv, do = draw(B, T, H, D)
    assert_close(run(lambda t: causal_attention_qkvpacked(t, H, backend=FUSED), qkv, do), qkv, do, H)


@pytest.mark.parametrize("isa", ["", *ISAS])
def test_every_instruction_set_is_right_also_where_the_weights_are_steep(isa):
    B, T, H, D = 2, 77, 2, 16
    qkv, do = draw(B, T, H, D, scale=3.0)
    out, lse = cpu.forward(qkv.detach(), H, 0.5)
    assert_close((out, cpu.backward(do, qkv.detach(), lse, H, 0.5, isa)), qkv, do, H, scale=0.5)


def test_scores_that_leave_one_key_its_weight_and_rows_of_equal_ones():
    qkv, do = draw(1, 70, 2, 32, scale=60.0)                 # scores of some 1e4
    assert_close(run(lambda t: causal_attention_qkvpacked(t, 2, backend=FUSED), qkv, do), qkv, do, 2)
    equal = qkv.detach().clone()
    equal[..., :64] = 0
    assert_close(run(lambda t: causal_attention_qkvpacked(t, 2, backend=FUSED), equal, do), equal, do, 2)


@pytest.mark.parametrize("seed", [1000682, 1000985])
def test_weights_that_do_not_add_up_to_one_cancel_as_if_they_did(seed):
    torch.manual_seed(seed)     # a query has a second key whose weight is some 1e-5: off 1e4 an lse is rounded to 5e-4
    qkv, do = draw(1, 70, 2, 32, scale=60.0)
    assert_close(run(lambda t: causal_attention_qkvpacked(t, 2, backend=FUSED), qkv, do), qkv, do, 2)


def test_nan_stays_with_the_queries_that_see_it():
    qkv, do = draw(2, 50, 2, 32)
    clean = causal_attention_qkvpacked(qkv, 2, backend=FUSED).detach()
    with torch.no_grad():
        qkv[1, 40, 64 + 32] = float("nan")                   # a key of the second head
    out = causal_attention_qkvpacked(qkv, 2, backend=FUSED).detach()
    assert out[1, 40:, 32:].isnan().all()
    out[1, 40:, 32:] = clean[1, 40:, 32:]
    assert torch.equal(out, clean)


def test_tiles_of_queries_and_groups_of_heads_change_nothing_but_rounding(monkeypatch):
    qkv, do = draw(2, 100, 3, 16)
    monkeypatch.setattr(cpu, "ROWS", 32)
    monkeypatch.setattr(cpu, "SCORES", 2 * 32 * 100)
    assert_close(run(lambda t: causal_attention_qkvpacked(t, 3, backend=FUSED), qkv, do), qkv, do, 3)


def test_a_query_that_sees_one_key_sends_nothing_back_through_its_score():
    qkv, do = draw(2, 5, 2, 16)
    _, dqkv = run(lambda t: causal_attention_qkvpacked(t, 2, backend=FUSED), qkv, do)
    assert (dqkv[:, 0, :32] == 0).all()


def test_qkv_and_the_gradient_may_have_any_strides():
    wide = torch.randn(5, 2, 120).bfloat16()
    qkv, do = wide.transpose(0, 1)[..., 12:108], torch.randn(1, 1, 1).bfloat16().expand(2, 5, 32)
    found = run(lambda t: causal_attention_qkvpacked(t, 2, backend=FUSED), qkv, do)
    same = run(lambda t: causal_attention_qkvpacked(t, 2, backend=FUSED), qkv.contiguous(), do.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, same))


def test_an_empty_batch_and_a_second_derivative():
    qkv, do = draw(0, 5, 2, 8)
    assert run(lambda t: causal_attention_qkvpacked(t, 2, backend=FUSED), qkv, do)[1].shape == (0, 5, 48)
    qkv, do = draw(1, 5, 2, 8)
    out = causal_attention_qkvpacked(qkv, 2, backend=FUSED)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.float().sum(), qkv, create_graph=True)


def test_threads_change_no_bit():
    qkv, do = draw(4, 128, 4, 16)
    before, results = torch.get_num_threads(), []
    out, lse = cpu.forward(qkv.detach(), 4, None)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.backward(do, qkv.detach(), lse, 4, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_compiled_it_is_one_graph_and_gives_the_same():
    qkv, do = draw(2, 9, 2, 8)
    call = lambda t: causal_attention_qkvpacked(t, 2, backend=FUSED)
    torch._dynamo.reset()
    compiled = run(torch.compile(call, backend="aot_eager", fullgraph=True), qkv, do)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(call, qkv, do)))


def test_the_registered_operators_pass_opcheck():
    qkv, do = (t.detach() for t in draw(2, 9, 2, 8))
    torch.library.opcheck(torch.ops.nanogpt_fast.attention_cpu, (qkv, 2, None))
    torch.library.opcheck(torch.ops.nanogpt_fast.attention_backward_cpu, (do, qkv, cpu.forward(qkv, 2, None)[1], 2, None))


def test_it_steps_aside_where_nanogpts_bits_are_promised_and_where_it_gains_nothing():
    why_not = dict(CANDIDATES)["cpp"]
    qkv, _ = draw(1, 5, 2, 8)
    assert why_not(qkv, torch.bfloat16, 8, None) is None
    assert "bit for bit" in why_not(qkv, torch.float32, 8, None)
    assert "dropout" in why_not(qkv, torch.bfloat16, 8, None, 0.1)
    with torch.no_grad():
        assert why_not(qkv, torch.bfloat16, 8, None) == (None if cpu.AMX else "without a gradient PyTorch's kernel is as fast")


def test_a_backward_inside_autocast_is_the_one_outside():
    gradients = []
    for inside in (True, False):
        torch.manual_seed(1)
        qkv = torch.randn(2, 40, 144, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = causal_attention_qkvpacked(qkv, 3, backend=FUSED).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append(qkv.grad)
    assert torch.equal(*gradients)


def test_no_tokens_and_a_strided_last_dimension_are_as_plain_as_others():
    qkv = torch.randn(2, 144, 20, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    assert qkv.stride(2) != 1
    packed = qkv.detach().contiguous().requires_grad_()
    outputs = [causal_attention_qkvpacked(x, 3, backend=FUSED) for x in (qkv, packed)]
    assert torch.equal(*outputs)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0].contiguous() for y, x in zip(outputs, (qkv, packed), strict=True)))
    none = torch.randn(2, 0, 144, dtype=torch.bfloat16, requires_grad=True)
    assert causal_attention_qkvpacked(none, 3).shape == (2, 0, 48)
