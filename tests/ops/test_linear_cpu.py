"""The products of a Linear on a CPU's AMX tiles: as near to fp64 as PyTorch's, from any layout, on any number of threads.

In bf16, and in fp32 by three bf16 parts of each number.
"""
import os
import time

import pytest
import torch

from nanogpt_fast.checks.error_rule import measure
from nanogpt_fast.ops import extension
from nanogpt_fast.ops.cpu import linear as linear_cpu
from nanogpt_fast.ops.cpu.linear import AMX, matmul, weight_gradient

needs_amx = pytest.mark.skipif(not AMX, reason="this CPU has no AMX")


def assert_close(out, exact, plain, what):
    problem = measure(out, exact, plain, "forward").problem
    assert problem is None, f"{what}: {problem}"


def linear(x, w, by_input, bias, threads):
    """The extension's own call, also where `matmul` would leave it to PyTorch."""
    y = torch.full((x.size(0), w.size(1 if by_input else 0)), float("nan"), dtype=torch.bfloat16)
    extension._C.linear_cpu(x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), by_input, 0 if bias is None else bias.data_ptr(),
                         *x.shape, y.size(1), y.data_ptr(), threads)
    return y


@needs_amx
# One of everything; whole tiles; edges in each direction; sums in several pieces; rows in several pieces; more threads than panels.
@pytest.mark.parametrize("M,K,N", [(1, 1, 1), (64, 64, 64), (33, 31, 65), (40, 32, 30), (257, 1700, 70), (1100, 800, 33), (130, 768, 420)])
@pytest.mark.parametrize("by_input", (False, True))
def test_a_product_is_as_near_to_fp64_as_pytorchs(M, K, N, by_input):
    x, w, bias = torch.randn(M, K + 32).bfloat16()[:, :K], torch.randn(N, K).bfloat16(), torch.randn(N)
    stored = torch.cat([w.t() if by_input else w] * 2, 1)[:, :K if not by_input else N]     # rows twice as far apart as they are long
    for added in (None, bias):
        exact = x.double() @ w.double().t() + (0 if added is None else added.double())
        results = [linear(x, stored, by_input, added, threads) for threads in (1, 2, 7)]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert_close(results[0], exact, torch.nn.functional.linear(x, w, None if added is None else added.bfloat16()), "y")


@needs_amx
def test_what_lies_behind_a_row_is_not_read_into_it():
    x, w = torch.full((40, 64), float("nan")).bfloat16(), torch.full((48, 64), float("nan")).bfloat16()
    x[:, :33], w[:, :33] = 1, 2
    assert (linear(x[:, :33], w[:, :33], False, None, 1) == 66).all()
    assert linear(x[:, :34], torch.ones(48, 34).bfloat16(), False, None, 1).isnan().all()


@needs_amx
@pytest.mark.parametrize("K,M,N", [(1, 1, 1), (32, 32, 32), (33, 31, 65), (1024, 400, 40), (70, 130, 17)])
def test_the_weights_gradient_is_as_near_to_fp64_as_pytorchs(K, M, N):
    dy, x = torch.randn(K, M + 9).bfloat16()[:, 5:M + 5], torch.randn(K, N + 3).bfloat16()[:, :N]
    assert_close(weight_gradient(dy, x), dy.double().t() @ x.double(), dy.t() @ x, "dW")
    in_fp32, results = torch.empty(M, N), []
    for threads in (1, 3):
        extension._C.weight_gradient_cpu(dy.data_ptr(), x.data_ptr(), dy.stride(0), x.stride(0), K, M, N, in_fp32.data_ptr(), False, threads)
        results.append(in_fp32.clone())
    assert torch.equal(*results)
    assert_close(in_fp32, dy.double().t() @ x.double(), dy.float().t() @ x.float(), "dW in fp32")


@needs_amx
def test_sums_of_many_rows_are_fp32_and_pytorchs_matmuls_do_not_mind_the_tiles():
    dy, x, dw = torch.randn(2500, 40).bfloat16(), torch.randn(2500, 70).bfloat16(), torch.empty(40, 70)
    arguments = (dy.data_ptr(), x.data_ptr(), 40, 70, 2500, 40, 70, dw.data_ptr())
    with pytest.raises(ValueError, match="more than 1024 rows are fp32"):
        extension._C.weight_gradient_cpu(*arguments, True, 1)
    a = torch.randn(256, 256).bfloat16()
    before = a @ a
    extension._C.weight_gradient_cpu(*arguments, False, 2)
    assert torch.equal(a @ a, before)
    torch.testing.assert_close(dw.double(), dy.double().t() @ x.double(), rtol=1e-4, atol=1e-3)
    weight_gradient(torch.full((4, 5), float("nan")).bfloat16(), a[:4])[0, 0].isnan() or pytest.fail("NaN was lost")


def product(a, b, bias=None, threads=2):
    """The extension's own call, also where `matmul` would leave it to PyTorch."""
    c = torch.full((a.size(0), b.size(1)), float("nan"))
    extension._C.product_fp32(a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), 0 if bias is None else bias.data_ptr(), *a.shape, b.size(1),
                           c.data_ptr(), threads)
    return c


def laid_out(matrix, by_row):
    """The same numbers, rows or columns contiguous, inside of a larger one that is NaN elsewhere."""
    m = matrix if by_row else matrix.t()
    around = torch.full((m.size(0) + 2, m.size(1) + 37), float("nan"))
    around[1:-1, 5:5 + m.size(1)] = m
    return around[1:-1, 5:5 + m.size(1)] if by_row else around[1:-1, 5:5 + m.size(1)].t()


@needs_amx
# One of everything; whole panels; edges; K in several pieces; each side the longer one; more rows, columns, K than go in one block.
@pytest.mark.parametrize("M,K,N", [(1, 1, 1), (64, 64, 64), (33, 31, 65), (40, 300, 30), (70, 1700, 257), (257, 300, 70), (1100, 40, 1200),
                                   (1500, 33, 800), (130, 768, 420)])
@pytest.mark.parametrize("a_by_row,b_by_row", [(True, True), (True, False), (False, True), (False, False)])
def test_an_fp32_product_in_parts_is_as_near_to_fp64_as_multiply_adds(M, K, N, a_by_row, b_by_row):
    # Numbers of very different size: a part that got lost, or went to another row, is larger than many a whole number.
    a, b, bias = (torch.randn(shape) * 10.0 ** torch.randint(-6, 6, shape) for shape in ((M, K), (K, N), (N,)))
    for spread in (True, False):
        if not spread:
            a, b = torch.randn(M, K), torch.randn(K, N)
        for added in (None, bias):
            arguments = laid_out(a, a_by_row), laid_out(b, b_by_row), added
            results = [product(*arguments, threads) for threads in (1, 2, 7)]
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
            exact = a.double() @ b.double() + (0 if added is None else added.double())
            assert_close(results[0], exact, a @ b + (0 if added is None else added), "a b")


@needs_amx
def test_fp32_in_parts_has_all_of_its_digits():
    """Against the identity every number comes back whole, and the sum of two parts is not enough for that."""
    a = torch.randn(300, 96) * 2.0 ** torch.randint(-60, 60, (300, 96))
    assert torch.equal(product(a, torch.eye(96)), a) and torch.equal(product(torch.eye(96), a.t().contiguous()), a.t())
    assert not torch.equal(a.bfloat16().float() + (a - a.bfloat16().float()).bfloat16().float(), a)


@needs_amx
def test_what_is_not_finite_stays_so_in_an_fp32_product_and_nothing_sums_to_zero():
    for bad in (float("nan"), float("inf"), -float("inf")):
        a, b = torch.randn(40, 70), torch.randn(70, 50)
        a[3, 69] = bad
        c = product(a, b)
        assert not c[3].isfinite().any() and c[:3].isfinite().all() and c[4:].isfinite().all()
    assert (product(torch.empty(40, 0), torch.empty(0, 30)) == 0).all()
    assert torch.equal(product(torch.empty(40, 0), torch.empty(0, 30), torch.ones(30)), torch.ones(40, 30))
    assert product(torch.empty(0, 3), torch.empty(3, 5)).shape == (0, 5)


@needs_amx
def test_sums_of_nothing_are_zero_and_nothing_is_as_good_as_any_matrix():
    nothing, bias = torch.empty(40, 0).bfloat16(), torch.randn(40)
    assert (linear(nothing, nothing, False, None, 2) == 0).all()
    assert torch.equal(linear(nothing, nothing, False, bias, 2), bias.bfloat16().expand(40, 40))
    assert linear(torch.randn(0, 3).bfloat16(), torch.randn(4, 3).bfloat16(), False, None, 2).shape == (0, 4)
    for rows, outputs, inputs in ((0, 40, 70), (40, 0, 70), (40, 40, 0)):
        dy, x, dw = torch.randn(rows, outputs).bfloat16(), torch.randn(rows, inputs).bfloat16(), torch.full((outputs, inputs), float("nan"))
        extension._C.weight_gradient_cpu(dy.data_ptr(), x.data_ptr(), outputs, inputs, rows, outputs, inputs, dw.data_ptr(), False, 2)
        assert (dw == 0).all()


def test_shapes_that_do_not_fit_raise_as_pytorchs_do():
    x, w = torch.randn(linear_cpu.FEWEST_ROWS, 40).bfloat16(), torch.randn(24, 33).bfloat16()
    for wrong in (lambda: matmul(x, w), lambda: matmul(x, w.t().contiguous(), by_input=True), lambda: weight_gradient(x, x[1:])):
        with pytest.raises(RuntimeError, match="shapes"):
            wrong()


def test_matmul_takes_what_the_tiles_do_not_and_writes_where_it_is_told():
    for dtype in (torch.float32, torch.bfloat16):
        x, w, bias = torch.randn(linear_cpu.FEWEST_ROWS, 40).to(dtype), torch.randn(24, 40).to(dtype), torch.randn(24)
        for rows in (x, x[:5], x.t().contiguous().t()):
            out = torch.full((rows.size(0), 24), float("nan"), dtype=dtype)
            assert matmul(rows, w, bias=bias, out=out) is out
            exact = rows.double() @ w.double().t() + bias.double()
            assert_close(out, exact, torch.nn.functional.linear(rows, w, bias.to(dtype)), "y")
            by_input = matmul(rows, w.t().contiguous(), by_input=True, bias=bias)
            assert_close(by_input, exact, torch.nn.functional.linear(rows, w, bias.to(dtype)), "y")
    assert matmul(torch.empty(0, 40), torch.randn(24, 40)).shape == (0, 24)


@needs_amx
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own():
    """PyTorch's do not come along; who asks them there to work waits for ever."""
    x, w = torch.randn(512, 512).bfloat16(), torch.randn(512, 512).bfloat16()
    before = linear(x, w, False, None, 2)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # its own operators would wait too
        same = bytes(linear(x, w, False, None, 2).view(torch.int16).numpy()) == bytes(before.view(torch.int16).numpy())
        os._exit(0 if same else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child did not come back within 20 s")
    assert os.waitstatus_to_exitcode(status) == 0


@needs_amx
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc here")
def test_work_for_two_threads_does_not_end_the_other_threads_of_pytorchs_team():
    """GNU's OpenMP would end them, and make them anew for PyTorch's next operator."""
    threads, a = torch.get_num_threads(), torch.zeros(1 << 20)
    x, w = torch.randn(256, 256).bfloat16(), torch.randn(256, 256).bfloat16()    # 2^24 products: two threads
    try:
        torch.set_num_threads(5)
        a.add_(1)
        before = set(os.listdir("/proc/self/task"))
        linear(x, w, False, None, 5)
        after = set(os.listdir("/proc/self/task"))
        a.add_(1)
        assert before == after == set(os.listdir("/proc/self/task"))
    finally:
        torch.set_num_threads(threads)
