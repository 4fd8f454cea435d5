"""Attention's backward for Hopper (csrc/hopper/attention_backward.cu): what it computes, on such a GPU; who is sent to it; what it compiles to."""
import functools
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nanogpt_fast import backend
from nanogpt_fast.checks.error_rule import measure
from nanogpt_fast.ops import attention, extension
from nanogpt_fast.ops.hopper import attention as attention_hopper

HERE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
on_hopper = pytest.mark.skipif(attention_hopper.why_not(HERE, torch.bfloat16, 64) is not None, reason="needs an H100 or H200 and the extension")
# B, T, H: one row; one tile and one more; ends within a group's rows, between groups, after one; many of unequal length.
SHAPES = ((1, 1, 1), (1, 64, 1), (1, 65, 2), (2, 128, 1), (1, 129, 3), (2, 777, 4), (3, 192, 5), (1, 2047, 3), (4, 1024, 12))


def drawn(B, T, H, dtype=torch.bfloat16):
    """qkv, do, and what the forward keeps: out and lse."""
    torch.manual_seed(T)
    qkv, do = (torch.randn(B, T, n * H * 64, device=HERE).to(dtype) for n in (3, 1))
    return do, qkv, *attention._kernels().forward.launch_forward_qkvpacked(qkv, None, H, None, 0.0)


def by_pytorch(do, qkv, H, scale=0.125):
    """The gradient of qkv in its dtype, by softmax and matmuls."""
    qkv = qkv.detach().requires_grad_()
    B, T, _ = qkv.shape
    q, k, v = (x.view(B, T, H, 64).transpose(1, 2) for x in qkv.chunk(3, 2))
    hidden = torch.ones(T, T, dtype=torch.bool, device=HERE).triu(1)
    y = (q @ k.transpose(2, 3) * scale).masked_fill(hidden, -math.inf).softmax(-1) @ v
    return torch.autograd.grad(y.transpose(1, 2).reshape(B, T, -1), qkv, do)[0]


def check(found, do, qkv, H, scale=0.125):
    exact, plain = by_pytorch(do.double(), qkv.double(), H, scale), by_pytorch(do, qkv, H, scale)
    assert found.dtype == qkv.dtype and found.is_contiguous()
    for name, ours, wanted, theirs in zip("qkv", found.chunk(3, 2), exact.chunk(3, 2), plain.chunk(3, 2)):
        zero = name != "v" and qkv.size(1) == 1         # a query that sees one key: dq and dk are differences of equal terms
        cancelled = torch.full_like(wanted, 1e-6) if zero else None
        problem = measure(ours, wanted, theirs, "gradient", check_bias=not zero, cancelled=cancelled).problem
        assert problem is None, f"d{name}: {problem}"


@pytest.mark.parametrize("dtype", attention_hopper.DTYPES)
@pytest.mark.parametrize("B, T, H", SHAPES)
@on_hopper
def test_gradients_are_as_near_to_fp64_as_pytorch_and_the_same_bits_again(B, T, H, dtype):
    inputs = drawn(B, T, H, dtype)
    found = attention_hopper.backward_qkvpacked(*inputs, H, None)
    check(found, *inputs[:2], H)
    for _ in range(20):
        assert torch.equal(found, attention_hopper.backward_qkvpacked(*inputs, H, None))


@on_hopper
def test_rows_may_lie_apart_and_begin_anywhere():
    do, qkv, out, lse = drawn(3, 200, 2)
    expected = attention_hopper.backward_qkvpacked(do, qkv, out, lse, 2, None)
    wide, odd, turned = torch.zeros(3, 200, 512, device=HERE).bfloat16(), torch.zeros(3, 200, 129, device=HERE).bfloat16(), do.transpose(0, 1).contiguous()
    wide[..., 64:448] = qkv
    odd[..., 1:] = do
    for other in (do, odd[..., 1:], turned.transpose(0, 1)):
        assert torch.equal(attention_hopper.backward_qkvpacked(other, wide[..., 64:448], out, lse, 2, None), expected)
    one = torch.ones(1, 1, 1, device=HERE).bfloat16().expand(3, 200, 128)       # the gradient of a sum
    assert torch.equal(attention_hopper.backward_qkvpacked(one, qkv, out, lse, 2, None),
                       attention_hopper.backward_qkvpacked(one.contiguous(), qkv, out, lse, 2, None))


@on_hopper
def test_separate_tensors_in_any_order_of_memory_give_the_same_bits():
    B, T, H = 3, 200, 2
    do, qkv, out, lse = drawn(B, T, H)
    expected = [x.reshape(B, T, H, 64) for x in attention_hopper.backward_qkvpacked(do, qkv, out, lse, H, None).chunk(3, 2)]
    views = [x.view(B, T, H, 64).transpose(1, 2) for x in (do, *qkv.chunk(3, 2))]                       # (B, H, T, 64)
    heads_first = [x.contiguous() for x in views]
    time_first = [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in views]
    columns_first = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in views]                     # is copied
    for inputs in (views, heads_first, time_first, columns_first, [views[0], heads_first[1], time_first[2], columns_first[3]]):
        found = attention_hopper.backward(*inputs, out.view(B, T, H, 64), lse, None)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("scale", (1.0, 0.01))
@on_hopper
def test_another_scale(scale):
    do, qkv, *_ = drawn(2, 150, 3)
    out, lse = attention._kernels().forward.launch_forward_qkvpacked(qkv, None, 3, scale, 0.0)
    check(attention_hopper.backward_qkvpacked(do, qkv, out, lse, 3, scale), do, qkv, 3, scale)


@on_hopper
def test_what_lies_in_memory_behind_the_last_token_has_no_part_in_it():
    do, qkv, out, lse = drawn(1, 100, 2)
    storage = torch.full((1, 400, 384), float("nan"), device=HERE).bfloat16()
    storage[:, :100] = qkv
    found = attention_hopper.backward_qkvpacked(do, storage[:, :100], out, lse, 2, None)
    assert torch.equal(found, attention_hopper.backward_qkvpacked(do, qkv, out, lse, 2, None)) and found.isfinite().all()


@on_hopper
def test_a_captured_launch_computes_the_same():
    inputs = drawn(2, 300, 2)
    expected = attention_hopper.backward_qkvpacked(*inputs, 2, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention_hopper.backward_qkvpacked(*inputs, 2, None)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)


@on_hopper
def test_the_op_takes_it(monkeypatch):
    calls = []
    monkeypatch.setattr(attention_hopper, "backward_qkvpacked", lambda *args, real=attention_hopper.backward_qkvpacked: calls.append(1) or real(*args))
    for choice in ("auto", "fused"):
        qkv = torch.randn(2, 300, 3 * 128, device=HERE, dtype=torch.bfloat16, requires_grad=True)
        attention.causal_attention_qkvpacked(qkv, 2, backend=backend.parse(choice)).sum().backward()
        assert qkv.grad.isfinite().all()
    assert len(calls) == 2


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@on_hopper
def test_the_op_on_separate_tensors_takes_it(compiled, monkeypatch):
    calls, real = [], attention_hopper.backward
    monkeypatch.setattr(attention_hopper, "backward", lambda *args: calls.append(1) or real(*args))
    for choice in ("auto", "fused"):
        torch.manual_seed(1)
        tensors = [torch.randn(2, 3, 300, 64, device=HERE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        call = lambda q, k, v: attention.causal_attention(q, k, v, backend=backend.parse(choice))
        y = (torch.compile(call, fullgraph=True) if compiled else call)(*tensors)
        do = torch.randn_like(y)
        qkv, do_rows = (torch.cat([x.transpose(1, 2).flatten(2) for x in them], 2).detach() for them in (tensors, [do]))
        found = torch.cat([g.transpose(1, 2).flatten(2) for g in torch.autograd.grad(y, tensors, do)], 2)
        check(found, do_rows, qkv, 3)
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------------------------ without a GPU


def test_it_says_why_not(monkeypatch):
    card = torch.device("cuda", 0)
    assert "compute capability 9.0" in attention_hopper.why_not(torch.device("cpu"), torch.bfloat16, 64)
    monkeypatch.setattr(attention_hopper, "card_why_not", lambda index: "no extension")
    assert attention_hopper.why_not(card, torch.bfloat16, 64) == "no extension"
    monkeypatch.setattr(attention_hopper, "card_why_not", lambda index: "")
    monkeypatch.setattr(extension, "_C", type("", (), {"attention_backward_sm90": None}))      # of a commit before, with other arguments
    assert "reinstall the package" in attention_hopper.why_not(card, torch.bfloat16, 64)
    monkeypatch.setattr(extension, "_C", type("", (), {"attention_backward_heads_sm90": None}))
    for allowed in (dict(), dict(dtype=torch.float16), dict(scale=1.0)):
        assert attention_hopper.why_not(card, **{"dtype": torch.bfloat16, "D": 64, **allowed}) is None
    for refused, reason in ((dict(dtype=torch.float32), "bfloat16 or float16"), (dict(D=128), "heads of 64, not 128"),
                            (dict(dropout_p=0.1), "no dropout"), (dict(scale=1e-9), "scales of 1e-06 to 1e+06, not 1e-09")):
        assert reason in attention_hopper.why_not(card, **{"dtype": torch.bfloat16, "D": 64, **refused})


def test_the_launch_is_told_where_everything_lies(monkeypatch):
    """On a CPU, with the launch taken down: addresses, strides in elements, scratch of the right size."""
    told = []
    monkeypatch.setattr(extension, "_C", type("", (), {"attention_backward_heads_sm90": staticmethod(lambda *args: told.append(args))}))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("", (), {"cuda_stream": 7}))
    half = functools.partial(torch.zeros, dtype=torch.bfloat16)
    storage = half(2, 200, 512)
    qkv, do, out, lse = storage[..., 64:448], half(2, 200, 128), half(2, 200, 128), torch.zeros(2, 2, 200)
    dqkv = attention_hopper.backward_qkvpacked(do, qkv, out, lse, 2, None)
    bf16, q, k, v, grad, o, l, dq, dk, dv, terms, taken, B, H, T, scale, _, stream = told.pop()
    assert bf16 and dqkv.shape == qkv.shape and dqkv.is_contiguous() and stream == 7
    assert [q, k, v] == [(x.data_ptr(), 200 * 512, 64, 512) for x in qkv.chunk(3, 2)]
    assert [grad, o] == [(x.data_ptr(), 200 * 128, 64, 128) for x in (do, out)] and l == lse.data_ptr()
    assert [dq, dk, dv] == [(x.data_ptr(), 200 * 384, 64, 384) for x in dqkv.chunk(3, 2)]
    assert taken - terms == 4 * 2 * 2 * 2 * 256                # two floats, two sequences, two heads, 256 rows
    assert (B, H, T, scale) == (2, 2, 200, 0.125)

    attention_hopper.backward_qkvpacked(do[:1].half(), storage[:1, :, 64:448].half(), out[:1], lse[:1], 2, 0.5)
    assert told[0][0] is False and told[0][1][1:] == (64, 64, 384) and told.pop()[15] == 0.5       # one sequence: any stride of the batch

    of_heads = half(2, 3, 200, 64)
    of_time = half(2, 200, 3, 64).transpose(1, 2)
    out = half(2, 200, 3, 64)
    gradients = attention_hopper.backward(of_heads, of_time, of_heads, of_time, out, torch.zeros(2, 3, 200), None)
    _, q, k, v, grad, o, _, *written = told.pop()[:10]
    by_time, by_head = (200 * 192, 64, 192), (3 * 200 * 64, 200 * 64, 64)
    assert [x[1:] for x in (q, k, v, grad, o)] == [by_time, by_head, by_time, by_head, by_time]
    assert written == [(x.data_ptr(), *by_time) for x in gradients] and all(x.shape == (2, 200, 3, 64) for x in gradients)


@pytest.mark.parametrize("x", (
    lambda half: half(2, 200, 129)[..., 1:], lambda half: half(2, 200, 132)[..., :128], lambda half: half(2, 128, 200).transpose(1, 2),
    lambda half: half(2, 1, 128).expand(2, 200, 128), lambda half: half(2, 3, 64, 200).transpose(2, 3), lambda half: half(1)[0].expand(2, 3, 200, 64)),
    ids=("address", "row", "column", "one row", "heads", "one number"))
def test_what_a_tensor_map_cannot_describe_is_copied(x):
    x = x(functools.partial(torch.ones, dtype=torch.bfloat16))
    found = attention_hopper._readable(x)
    assert found.is_contiguous() and torch.equal(found, x) and found.data_ptr() != x.data_ptr()
    assert attention_hopper._readable(found) is found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_it_compiles_to_what_it_was_written_for(tmp_path):
    """No product waits for another because the compiler had doubts (C75.. are its words for that), and nothing is spilled beside them."""
    source = Path(attention_hopper.__file__).parents[3] / "csrc/hopper/attention_backward.cu"
    done = subprocess.run(["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin", "-I", source.parents[1], source, "-o",
                           tmp_path / "out.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\(C75\d\d\)", done.stderr), done.stderr
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill loads", done.stderr)]
    assert len(spilled) == 4 and max(spilled) <= 8
