"""The MLP's matmul for Hopper (csrc/hopper/linear_act.cu): what it computes, on such a GPU; what it compiles to, where nvcc is."""
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanogpt_fast.checks.error_rule import measure
from nanogpt_fast.ops import extension, hopper
from nanogpt_fast.ops.hopper import mlp as mlp_hopper

HERE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
on_hopper = pytest.mark.skipif(mlp_hopper.why_not(HERE, torch.bfloat16, 768, 3072, "gelu") is not None, reason="needs an H100 or H200 and the extension")
SHAPES = ((1, 8, 32), (130, 72, 264), (1000, 768, 3072), (513, 200, 392))      # rows, C, F: one tile, tiles that stand out, many


def gelu(x, activation):
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


@pytest.mark.parametrize("activation", mlp_hopper.ACTIVATIONS)
@pytest.mark.parametrize("dtype", mlp_hopper.DTYPES)
@pytest.mark.parametrize("rows, C, width", SHAPES)
@on_hopper
def test_forward_and_backward_are_as_near_to_fp64_as_pytorch(rows, C, width, dtype, activation):
    torch.manual_seed(rows)
    new = lambda *shape: torch.randn(shape, device=HERE)
    x, w, b, dy, w_proj = new(rows, C).to(dtype), (new(width, C) / C**0.5).to(dtype), new(width), new(rows, C).to(dtype), new(C, width).to(dtype)
    y, h = mlp_hopper.linear_act(x, w, b, activation=activation)
    alone, none = mlp_hopper.linear_act(x, w, b, activation=activation, keep_h=False)
    assert none is None and torch.equal(y, alone)
    before = x.double() @ w.double().t() + b.double()
    plain_h = F.linear(x, w, b.to(dtype))
    for name, out, exact, plain in (("h", h, before, plain_h), ("y", y, gelu(before, activation), gelu(plain_h, activation))):
        assert measure(out, exact, plain, "forward").problem is None, name

    def through(grad, h):
        h = h.detach().requires_grad_()
        return torch.autograd.grad(gelu(h, activation), h, grad)[0]
    dh, db = mlp_hopper.linear_dact(dy, w_proj, h, activation=activation)
    without, none = mlp_hopper.linear_dact(dy, w_proj, h, activation=activation, want_db=False)
    assert none is None and torch.equal(dh, without)
    exact = through(dy.double() @ w_proj.double(), h.double())
    plain = through(dy @ w_proj, h)
    assert measure(dh, exact, plain, "gradient").problem is None
    # db sums dh before it is rounded. What is left is that tensor cores truncate, 5e-7 towards 0 at C = 768, as they do for cuBLAS.
    truncated = through(torch.mm(dy, w_proj, out_dtype=torch.float32).double(), h.double()).sum(0)
    assert measure(db, exact.sum(0), plain.float().sum(0), "gradient", stored=truncated).problem is None


@on_hopper
def test_what_is_no_number_or_infinite_stays_so():
    x = torch.zeros(4, 16, device=HERE, dtype=torch.bfloat16)
    x[0, 0], x[1, 0], x[2, 0] = float("nan"), float("inf"), -300.0
    w = torch.zeros(8, 16, device=HERE, dtype=torch.bfloat16)
    w[:, 0] = 1
    y, h = mlp_hopper.linear_act(x, w)
    assert h[0].isnan().all() and y[0].isnan().all()
    assert (y[2] == 0).all() and (y[3] == 0).all()
    dh, db = mlp_hopper.linear_dact(torch.ones_like(x), torch.ones(16, 8, device=HERE, dtype=torch.bfloat16), h)
    assert dh[0].isnan().all() and (dh[2] == 0).all() and (dh[3] == 8).all() and db.isnan().all()


@on_hopper
def test_rows_may_lie_apart_and_begin_anywhere():
    storage = torch.randn(40, 3 * 72 + 1, device=HERE).bfloat16()
    w = torch.randn(264, 72, device=HERE).bfloat16()
    for x in (storage[:, :72], storage[:, 1:73], storage[:, :216].contiguous()[:, 72:144]):
        assert torch.equal(mlp_hopper.linear_act(x, w)[0], mlp_hopper.linear_act(x.contiguous(), w)[0])


@on_hopper
def test_a_weight_and_a_bias_may_lie_anywhere():
    storage, bias = torch.randn(264, 3 * 72, device=HERE).bfloat16(), torch.randn(265, device=HERE)
    x, h = torch.randn(40, 72, device=HERE).bfloat16(), torch.randn(40, 264, device=HERE).bfloat16()
    w, b = storage[:, 72:144], bias[1:]
    for one, other in zip(mlp_hopper.linear_act(x, w, b), mlp_hopper.linear_act(x, w.contiguous(), b.clone())):
        assert torch.equal(one, other)
    other = torch.empty(264, 40, device=HERE).bfloat16().t().copy_(h)
    assert torch.equal(mlp_hopper.linear_dact(x, w.t(), other)[0], mlp_hopper.linear_dact(x, w.t().contiguous(), h)[0])


@pytest.mark.parametrize("rows, C, width", ((65536, 8, 256), (65536, 64, 256), (20000, 64, 3072), (65536, 128, 256)))
@on_hopper
def test_many_tiles_of_few_steps(rows, C, width):
    """The two groups take turns at every step of the main loop's few: each must wait for all warps of the other."""
    x, w, dy, w_proj = (torch.randn(shape, device=HERE).bfloat16() for shape in ((rows, C), (width, C), (rows, C), (C, width)))
    exact = x.float() @ w.float().t()
    for _ in range(20):
        y, h = mlp_hopper.linear_act(x, w)
        dh, _ = mlp_hopper.linear_dact(dy, w_proj, h)
        torch.testing.assert_close(h.float(), exact, rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(y.float(), F.gelu(exact), rtol=2**-7, atol=2**-7)
    plain = torch.ops.aten.gelu_backward((dy.float() @ w_proj.float()), h.float())
    torch.testing.assert_close(dh.float(), plain, rtol=2**-6, atol=2**-6)


@on_hopper
def test_a_captured_launch_computes_the_same():
    x, w = torch.randn(256, 64, device=HERE).bfloat16(), torch.randn(192, 64, device=HERE).bfloat16()
    expected = mlp_hopper.linear_act(x, w)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = mlp_hopper.linear_act(x, w)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_elsewhere_it_says_why_not():
    assert "compute capability 9.0" in mlp_hopper.why_not(torch.device("cpu"), torch.bfloat16, 768, 3072, "gelu")


def test_torch_compile_can_ask_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))    # PyTorch asks too, where there is a GPU
    monkeypatch.setattr(extension, "_C", None)
    hopper._cached_card_why_not.cache_clear()
    card = torch.device("cuda", 0)

    def asked(x):
        return x + (mlp_hopper.why_not(card, torch.bfloat16, 768, 3072, "gelu") is None)
    try:
        assert torch.equal(torch.compile(asked, backend="eager", fullgraph=True)(torch.zeros(2)), torch.zeros(2))
        assert "nanogpt_fast._C" in mlp_hopper.why_not(card, torch.bfloat16, 768, 3072, "gelu")
    finally:
        hopper._cached_card_why_not.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_it_compiles_to_what_it_was_written_for(tmp_path):
    """At most a few spilled registers outside of the main loop, and products that no compiler's doubt made wait for each other."""
    source = Path(mlp_hopper.__file__).parents[3] / "csrc/hopper/linear_act.cu"
    done = subprocess.run(["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin", "-I", source.parents[1], source, "-o",
                           tmp_path / "out.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serializ" not in done.stderr
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill loads", done.stderr)]
    assert len(spilled) == 16 and max(spilled) <= 96 and set(re.findall(r"Used (\d+) registers", done.stderr)) == {"168"}
