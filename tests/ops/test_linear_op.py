"""The op `linear`: with a copy of its weight it computes what autocast does and sends the weight its gradient; which implementation, and why."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanogpt_fast import backend
from nanogpt_fast.ops import linear
from nanogpt_fast.ops.cpu import linear as cpu

bf16 = torch.bfloat16
REFERENCE = backend.parse("reference")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
needs_amx = pytest.mark.skipif(not cpu.AMX, reason="this CPU has no AMX")


def operands(rows=300, K=160, N=192, dtype=bf16, bias=True):
    x, weight = torch.randn(rows, K), torch.randn(N, K) / K**0.5
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), torch.randn(N).requires_grad_() if bias else None


def results(function, *tensors):
    """The result and its gradients, by one and the same cotangent."""
    torch.manual_seed(3)
    leaves = [t for t in tensors if t is not None]
    with torch.autocast("cpu", bf16):
        y = function(*tensors)
    return y, *torch.autograd.grad(y, leaves, torch.randn_like(y.float()).to(y.dtype))


def test_without_a_copy_it_is_f_linear():
    x, weight, bias = operands(dtype=torch.float32)
    assert torch.equal(linear.linear(x, weight, bias), F.linear(x, weight, bias))
    assert linear.implementation(weight) == "reference"


@pytest.mark.parametrize("bias", [True, False])
def test_the_reference_with_a_copy_is_autocast_bit_for_bit(bias):
    tensors = operands(bias=bias)
    copy = tensors[1].detach().to(bf16)
    ours = results(lambda x, weight, bias: linear.linear(x, weight, bias, copy=copy, backend=REFERENCE), *tensors)
    autocast = results(lambda x, weight, bias: F.linear(x, weight, bias), *tensors)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, autocast, strict=True))


@pytest.mark.parametrize("name, device, dtype", [
    pytest.param("cpp", "cpu", bf16, marks=needs_amx), pytest.param("cpp", "cpu", torch.float32, marks=needs_amx),
    pytest.param("cublas", "cuda", bf16, marks=needs_cuda), pytest.param("cublas", "cuda", torch.float16, marks=needs_cuda)], ids=str)
def test_the_products_are_as_near_to_fp64_and_the_weights_gradient_is_not_rounded(name, device, dtype):
    tensors = [t.detach().to(device).requires_grad_() for t in operands(dtype=dtype)]
    assert linear.implementation(tensors[1], tensors[1].detach().to(dtype)) == name

    def run(choice, dtype=dtype, *cast):
        x, weight, bias = cast or tensors
        y = linear.linear(x, weight, bias if choice == "auto" or dtype.itemsize != 2 else bias.to(dtype), copy=weight.detach().to(dtype),
                          backend=backend.parse(choice))
        torch.manual_seed(3)
        return y, *torch.autograd.grad(y, (x, weight, bias), torch.randn(y.shape, device=device).to(bf16).to(y.dtype))
    exact = run("reference", torch.float64, *(t.detach().double().requires_grad_() for t in tensors))
    for ours, plain, oracle in zip(run("auto"), run("reference"), exact, strict=True):
        assert (ours - oracle).norm() <= 1.5 * (plain - oracle).norm() + 1e-6 * oracle.norm()
    if dtype.itemsize == 2:
        gradient = run("auto")[2]
        assert gradient.dtype == torch.float32 and not torch.equal(gradient, gradient.to(dtype).float())


@pytest.mark.parametrize("weight, copy, taken", [
    (torch.float32, bf16, True), (torch.float32, torch.float16, True), (torch.float32, torch.float32, False), (bf16, bf16, False),
    (torch.float32, None, False)], ids=str)
def test_on_a_gpu_cublas_keeps_the_gradient_of_an_fp32_weight_in_fp32(weight, copy, taken):
    """Of tensors that only say that they are on a GPU; `benchmarks.count` runs the code on fake ones."""
    on_gpu = lambda dtype: SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda"))
    assert linear.implementation(on_gpu(weight), copy and on_gpu(copy)) == ("cublas" if taken else "reference")


@pytest.mark.parametrize("weight, copy, reason", [
    (torch.zeros(256, 256), None, "no copy"), (torch.zeros(256, 256), torch.zeros(1).half(), "computed in torch.float16"),
    (torch.zeros(256, 64), torch.zeros(1), "from 128 inputs and outputs on"), (torch.zeros(256, 256, device="meta"), None, "")])
def test_it_says_why_the_extension_does_not_multiply(weight, copy, reason, monkeypatch):
    monkeypatch.setattr(cpu, "AMX", True)
    assert reason in cpu.why_not(weight, copy) and (reason or cpu.why_not(weight, copy) == "")
    assert linear.implementation(weight, copy) == "reference"
    assert linear.implementation(weight, copy, backend=backend.parse("fused")) == "reference"   # a library's product is no lack


def test_without_amx_that_is_the_reason(monkeypatch):
    monkeypatch.setattr(cpu, "AMX", False)
    assert "AMX" in cpu.why_not(torch.zeros(256, 256), torch.zeros(1)) or "missing" in cpu.why_not(torch.zeros(256, 256), torch.zeros(1))


def test_a_copy_that_changes_before_the_backward_is_noticed():
    x, weight, bias = operands()
    copy = weight.detach().to(bf16)
    for choice in ("auto", "reference"):
        with torch.autocast("cpu", bf16):
            y = linear.linear(x, weight, bias, copy=copy, backend=backend.parse(choice))
        copy.copy_(copy)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@needs_amx
def test_a_second_derivative_is_refused():
    x, weight, bias = operands()
    y = linear.linear(x, weight, bias, copy=weight.detach().to(bf16))
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference' has"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_torch_compile_traces_it_whole_and_sees_the_copy_change():
    x, weight, bias = operands()
    copy = weight.detach().to(bf16)

    def run(x, weight, bias):
        return linear.linear(x, weight, bias, copy=copy)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected = results(lambda x, weight, bias: linear.linear(x, weight, bias, copy=copy, backend=REFERENCE), x, weight, bias)
        assert all(torch.equal(a, b) for a, b in zip(results(compiled, x, weight, bias), expected, strict=True))
        copy.mul_(2)
