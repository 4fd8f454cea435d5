"""The attention kernels against fp64: out, dq, dk and dv in both backward forms, by the error rule of harness.py.

The plain path is the same softmax written out in PyTorch in the kernel's dtype, matmuls and weights rounded to it.
"""
import copy
import math

import cards
import harness
import pytest
import torch
from harness import assert_close_to_oracle, assert_fault_is_seen, assert_grid_order_is_free, guarded_outputs, pairwise, same_bits, with_nan_margins
from hypothesis import HealthCheck, given, settings, strategies as st
from nanogpt_fast.kernels import attention_backward, attention_common, attention_forward, dropout, fastest
from nanogpt_fast.kernels.fastest import Tile

ON_GPU = not harness.INTERPRETED
LENGTHS = [1, 2, 31, 64, 65, 127, 128, 129, 200] + [1024, 2000] * ON_GPU
HEAD_SIZES = [8, 16, 32, 40, 64, 80, 96, 128] + [256] * ON_GPU
BATCHES = [0, 1, 3]
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [f32, f16, bf16]
FORMS = ["head", "split"]
SEED = 0x0123_4567_89AB_CDEF
# In the interpreter a program costs more than its elements, and small tiles meet more edges: two sizes that differ from each other and
# from the tables'. On a GPU the tables' own.
TILES = None if ON_GPU else {"forward": Tile(64, 32, 0, 4, 2), "head": Tile(32, 64, 0, 4, 2), "dq": Tile(32, 64, 0, 4, 2), "dkdv": Tile(64, 32, 0, 4, 2)}


class Problem:
    """q, k, v and out's gradient between NaN margins, and three answers: the kernels', fp64's, PyTorch's in the same dtype.

    packed: q, k, v are thirds of one (B, T, 3C) tensor and so are their gradients.
    """

    def __init__(self, B=1, H=2, Tq=65, Tk=None, D=32, dtype=f32, p=0.0, scale=None, packed=None, draw=torch.randn):
        Tk = Tk or Tq
        self.packed = Tq == Tk if packed is None else packed
        self.shape, self.dtype, self.p = (B, H, Tq, Tk, D), dtype, p
        self.scale = 0.9 / math.sqrt(D) if scale is None else scale     # no power of two: then the plain path would not round
        new = lambda *shape: with_nan_margins(draw(*shape).to(dtype).to(harness.DEVICE))
        if self.packed:
            packed = new(B, Tq, 3, H, D)
            self.qkv = packed.view(B, Tq, 3 * H * D)
            self.q, self.k, self.v = (x.transpose(1, 2) for x in packed.unbind(2))
        else:
            self.q, self.k, self.v = new(B, H, Tq, D), new(B, H, Tk, D), new(B, H, Tk, D)
        self.do = with_nan_margins(torch.randn(B, Tq, H, D).to(dtype).to(harness.DEVICE)).transpose(1, 2)
        self.seed = torch.tensor([SEED], device=harness.DEVICE)
        self.keep = dropout.score_mask(SEED, B * H, Tq, Tk, p, device=harness.DEVICE).view(B, H, Tq, Tk) if p > 0 else None

    def forward(self, tile=None):
        return attention_forward.attention_forward(self.q, self.k, self.v, scale=self.scale, dropout_p=self.p, seed=self.seed,
                                                   tile=tile or TILES and TILES["forward"])

    def backward(self, out, lse, form=None, tiles=None, do=None):
        B, H, Tq, Tk, D = self.shape
        if self.packed:
            dq, dk, dv = torch.empty(B, Tq, 3, H, D, dtype=self.dtype, device=harness.DEVICE).unbind(2)
        else:
            dq, dk, dv = (torch.empty(B, T, H, D, dtype=self.dtype, device=harness.DEVICE) for T in (Tq, Tk, Tk))
        attention_backward.attention_backward(self.do if do is None else do, self.q, self.k, self.v, out, lse, dq, dk, dv, scale=self.scale,
                                              dropout_p=self.p, seed=self.seed, form=form, tiles=tiles or TILES)
        return tuple(g.transpose(1, 2) for g in (dq, dk, dv))

    def kernels(self, form):
        """{name: tensor (B, H, T, D)} from memory that is poisoned before."""
        with guarded_outputs():
            out, lse = self.forward()
        with guarded_outputs():
            gradients = self.backward(out, lse, form)
        return {"out": out.transpose(1, 2), "lse": lse} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    def pytorch(self, dtype):
        """The formulas in kernels/attention_backward.py, the (Tq, Tk) matrices written out. float64: the oracle (a test below holds it
        to autograd). Else the plain path: it stores what any low-precision path stores, and only that rounded: the weights and ds for
        the matmuls, out for delta, lse in fp32. Autograd through softmax would store less rounded, but (T, T) numbers more.
        """
        wide = torch.promote_types(dtype, f32)
        q, k, v, do = (x.detach().to(dtype) for x in (self.q, self.k, self.v, self.do))
        Tq, Tk = q.size(2), k.size(2)
        s = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * self.scale
        s = s.masked_fill(torch.ones(Tq, Tk, dtype=torch.bool, device=s.device).tril(Tk - Tq).logical_not(), -math.inf)
        lse = s.logsumexp(-1, keepdim=True)
        keep = 1.0 if self.keep is None else self.keep / max(1 - self.p, 1e-9)
        out = (s.softmax(-1) * keep).to(dtype) @ v
        again = (k.to(wide) @ q.to(wide).transpose(-2, -1)).transpose(-2, -1) * self.scale      # computed again, transposed: rounds anew
        p = (again.masked_fill(s.isneginf(), -math.inf) - lse).exp()
        delta = (do.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        ds = (p * ((do.to(wide) @ v.to(wide).transpose(-2, -1)) * keep - delta)).to(dtype)
        dq, dk = ((ds.to(wide) @ k.to(wide)) * self.scale).to(dtype), ((ds.transpose(-2, -1).to(wide) @ q.to(wide)) * self.scale).to(dtype)
        dv = ((p * keep).to(dtype).transpose(-2, -1).to(wide) @ do.to(wide)).to(dtype)
        return {"out": out, "lse": lse.squeeze(-1) / math.log(2), "dq": dq, "dk": dk, "dv": dv}

    def unlucky(self, oracle, orders):
        """The plain path, each result by that one of several orders of summing q k^T whose largest error is largest. Where a few
        numbers are all the error there is (a score's is that of a whole row), one order may have next to none by luck, and the mean
        over orders has no tail like the kernel's one.
        """
        found = {}
        for _ in range(orders):
            order = torch.randperm(self.q.size(-1), device=self.q.device)
            other = copy.copy(self)
            other.q, other.k = self.q[..., order], self.k[..., order]
            for name, value in other.pytorch(self.dtype).items():
                value = value[..., order.argsort()] if name in ("dq", "dk") else value
                largest = float((value.double() - oracle[name]).abs().amax()) if value.numel() else 0.0
                if name not in found or largest > found[name][0]:
                    found[name] = largest, value
        return {name: value for name, (_, value) in found.items()}

    def check(self, forms=FORMS, orders=1, **options):
        oracle = self.pytorch(torch.float64)
        plain = self.pytorch(self.dtype) if orders == 1 else self.unlucky(oracle, orders)
        B, H, Tq, Tk, D = self.shape
        options.setdefault("observations", B * H * Tq * (2 * Tk - Tq + 1) // 2)     # scores: an error of one is that of a whole row
        # The tables have no head form for some sizes (by the registers it takes): what asks for it there gets the split form.
        if TILES is None and attention_backward.tiles_for(self.dtype, D, self.p > 0, self.q.get_device(), 1, 1)[0] is None:
            forms = ["split"]
        for form in forms:
            got = self.kernels(form)
            for name, out in got.items():
                direction = "gradient" if name.startswith("d") else "forward"
                assert_close_to_oracle(out, oracle[name], plain[name], direction, what=f"{name}, {form} form",
                                       cancelled=self.cancelled(name, oracle["out"]) if name in ("dq", "dk") else None, **options)

    def cancelled(self, name, out):
        """What each element of dq or dk owes to ds = p (dp - delta), two terms that cancel where p is nearly one: dp is
        summed in fp32, and delta is made of `out` rounded to its dtype.
        """
        q, k, v, do = (x.double() for x in (self.q, self.k, self.v, self.do))
        hidden = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1 + k.size(2) - q.size(2))
        p = (q @ k.transpose(-2, -1) * self.scale).masked_fill(hidden, -math.inf).softmax(-1)
        # Squares. dp is a sum of D signed terms, and each addition rounds a partial sum: eps^2 / 12 times 1/D + 2/D + ... + 1.
        dp = (do.square() @ v.square().transpose(-2, -1)) * torch.finfo(f32).eps ** 2 * (q.size(-1) + 1) / 24
        delta = (do * out * torch.finfo(self.dtype).eps / 2).square().sum(-1, keepdim=True) / 3
        ds = p.square() * (dp + delta)
        other, ds = (k, ds) if name == "dq" else (q, ds.transpose(-2, -1))
        return (ds @ other.square()).sqrt() * self.scale


def ids(value):
    return str(value).replace("torch.", "")


def test_the_oracle_is_what_autograd_says():
    problem = Problem(2, 2, 7, 9, D=5, dtype=torch.float64, p=0.3)
    q, k, v = (x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    hidden = torch.ones(7, 9, dtype=torch.bool, device=q.device).tril(2).logical_not()
    weights = (q @ k.transpose(-2, -1) * problem.scale).masked_fill(hidden, -math.inf).softmax(-1)
    out = (weights * problem.keep / 0.7) @ v
    expected = out, *torch.autograd.grad(out, (q, k, v), problem.do)
    oracle = problem.pytorch(torch.float64)
    for name, tensor in zip(("out", "dq", "dk", "dv"), expected, strict=True):
        torch.testing.assert_close(oracle[name], tensor.detach())


@pytest.mark.parametrize("T,D,B,dtype,form,p", pairwise(LENGTHS, HEAD_SIZES, BATCHES, DTYPES, FORMS, [0.0, 0.2]), ids=ids)
def test_agrees_with_fp64_for_every_pair_of_parameters(T, D, B, dtype, form, p):
    Problem(B, 1 if T > 100 and B > 1 else 2, T, D=D, dtype=dtype, p=p).check([form])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("D", HEAD_SIZES)
@pytest.mark.parametrize("T", LENGTHS)
def test_agrees_with_fp64_on_the_full_product(T, D, B, dtype):
    for p in (0.0, 0.2):        # in fp32, of 4,300 results that meet one order of the plain path alone, three fail by chance
        Problem(B, 2, T, D=D, dtype=dtype, p=p).check(orders=4 if dtype == f32 else 1)


@settings(max_examples=harness.examples(100, 6), deadline=None, suppress_health_check=list(HealthCheck))
@given(B=st.integers(1, 2), H=st.integers(1, 3), Tq=st.integers(1, 80), more=st.integers(0, 70), D=st.integers(1, 128),
       dtype=st.sampled_from(DTYPES), p=st.sampled_from([0.0, 0.1, 0.5]), scale=st.floats(0.01, 2.0), seed=st.integers(0, 2**31))
def test_agrees_with_fp64_for_any_shape(B, H, Tq, more, D, dtype, p, scale, seed):
    torch.manual_seed(seed)
    Problem(B, H, Tq, Tq + more, D, dtype, p, scale).check([FORMS[seed % 2]], orders=16)    # down to one score: no luck then


@pytest.mark.parametrize("Tq,Tk", [(1, 64), (1, 65), (33, 64), (64, 129), (40, 41)])
def test_fewer_queries_than_keys_are_the_last_ones(Tq, Tk):
    # 8 heads: at Tq=1 each is one row, and a row's error is one number. Of 300 draws 11 broke the bound of one order, none of 16.
    Problem(2, 4, Tq, Tk, 16).check(orders=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_a_head_size_of_256_is_right(dtype):
    Problem(1, 1, 70, D=256, dtype=dtype).check()


def test_the_tables_own_tiles_are_right():
    """Above, small tiles stand in for the tables': here one shape with each row of this GPU's, in the interpreter of sm_90's."""
    arch = fastest.place(torch.empty(0, device=harness.DEVICE).get_device())[0]
    tables = {name: {row.size[1]: row.tile for row in fastest.shipped(f"attention {name} tile", arch, "half")} for name in ("forward", "dq", "dkdv", "head")}
    for name, rows in tables.items():
        for HEAD, tile in rows.items():
            if HEAD > 64 and not ON_GPU:
                continue
            problem = Problem(1, 1, 150, D=HEAD, dtype=f16)
            oracle, plain = problem.pytorch(torch.float64), problem.pytorch(f16)
            out, lse = problem.forward(tile if name == "forward" else None)
            assert_close_to_oracle(out.transpose(1, 2), oracle["out"], plain["out"], "forward", what=f"out, {tile}")
            if name != "forward":
                form = "head" if name == "head" else "split"
                others = TILES or {half: tables[half][HEAD] for half in ("dq", "dkdv")}
                gradients = problem.backward(out, lse, form, others | {name: tile})
                for gradient, d in zip(gradients, ("dq", "dk", "dv"), strict=True):
                    assert_close_to_oracle(gradient, oracle[d], plain[d], "gradient", what=f"{d}, {name} {tile}")


# ------------------------------------------------------------------------------------------------------------------ hard numbers


def with_logits(size):
    """Draws q, k, v such that logits reach +-size."""
    return lambda *shape: torch.randn(*shape) * math.sqrt(size / 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_logits_of_ten_thousand_do_not_overflow(dtype):
    problem = Problem(1, 2, 65, D=16, dtype=dtype, scale=0.3, draw=with_logits(1e4 / 0.3))
    scores = (problem.q.double() @ problem.k.double().transpose(-2, -1)) * problem.scale
    assert scores.abs().max() > 1e4
    hidden = torch.ones(65, 65, dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    # Weights are 0 and 1 but where two scores of a row are close by chance: only there is there an error to observe.
    between = int(((weights > 1e-7) & (weights < 1 - 1e-7)).sum())
    problem.check(check_bias=False, observations=max(1, between), orders=16)


def test_rows_of_equal_values_give_equal_weights():
    problem = Problem(1, 2, 65, D=16, draw=lambda *shape: torch.ones(shape))
    out, lse = problem.forward()
    assert torch.allclose(out, torch.ones_like(out), atol=1e-6)
    count = torch.arange(1, 66, dtype=f32, device=lse.device)
    assert torch.allclose(lse, (count.log2() + 3.6 / math.log(2)).expand_as(lse), atol=1e-5)      # scale * q k^T = 16 * 0.9 / 4
    problem.check(check_bias=False)


def test_fp16_values_near_its_largest_do_not_overflow():
    """Logits beyond fp16's largest number, and values of 6e4 whose weighted mean is in range."""
    problem = Problem(1, 2, 65, D=16, dtype=f16, draw=lambda *shape: torch.randn(*shape) * 100)
    problem.v.copy_(torch.rand(problem.v.shape) * 6e4)
    out, _ = problem.forward()
    exact = problem.pytorch(torch.float64)["out"]
    assert (problem.q.float() @ problem.k.float().transpose(-2, -1)).abs().max() > torch.finfo(f16).max
    assert_close_to_oracle(out.transpose(1, 2), exact, problem.pytorch(f16)["out"], "forward", check_bias=False)


def test_a_tiny_scale_means_equal_weights():
    Problem(1, 1, 65, D=16, scale=1e-30).check(check_bias=False)


# ----------------------------------------------------------------------------------------------------------------------- dropout


def weights_seen(tile, p=0.3, T=80, seed=SEED, H=2):
    """The mask as the kernel applies it: with v = identity and equal scores, out is mask / (row's length * (1 - p))."""
    q = torch.zeros(1, H, T, 128, device=harness.DEVICE)
    v = torch.eye(T, 128, device=harness.DEVICE).expand(1, H, T, 128).contiguous()
    out, _ = attention_forward.attention_forward(q, q, v, scale=1.0, dropout_p=p, seed=torch.tensor([seed], device=harness.DEVICE), tile=tile)
    return out.transpose(1, 2)[..., :T]


def test_the_mask_read_back_is_the_one_in_pytorch_at_every_tile_size():
    T, p = 80, 0.3
    keep = dropout.score_mask(SEED, 2, T, T, p, device=harness.DEVICE).tril()
    expected = keep / torch.arange(1, T + 1, device=harness.DEVICE)[:, None] / (1 - p)
    for tile in (Tile(16, 16, 0, 4, 1), Tile(32, 64, 0, 4, 1), Tile(64, 16, 0, 4, 1)):
        torch.testing.assert_close(weights_seen(tile)[0], expected, rtol=1e-5, atol=1e-7)


def test_the_kept_fraction_is_1_minus_p():
    for p in (0.1, 0.5):
        keep = dropout.score_mask(SEED, 8, 128, 128, p)
        sigma = math.sqrt(p * (1 - p) / keep.numel())
        assert abs(float(keep.double().mean()) - (1 - p)) < 4 * sigma


def test_different_seeds_and_heads_have_different_masks():
    one, other = weights_seen(Tile(64, 64, 0, 4, 1)), weights_seen(Tile(64, 64, 0, 4, 1), seed=SEED + 1)
    assert not torch.equal(one, other) and not torch.equal(one[:, 0], one[:, 1])


def test_dropping_everything_gives_zeros():
    problem = Problem(1, 1, 40, D=16, p=1.0)
    out, lse = problem.forward()
    assert not out.any()
    assert all(not g.any() for g in problem.backward(out, lse, "head"))


# ------------------------------------------------------------------------------------------------------- order, layouts, repetition


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_programs_changes_no_bit_and_no_two_store_to_one_address(form):
    problem = Problem(2, 2, 70, D=16, p=0.2)

    def run():
        out, lse = problem.forward(Tile(32, 32, 0, 4, 1))
        return out, lse, *problem.backward(out, lse, form, dict.fromkeys(("head", "dq", "dkdv"), Tile(32, 32, 0, 4, 1)))
    assert_grid_order_is_free(run)


def test_heads_in_groups_take_every_tile_once(monkeypatch):
    """scheduled_tile with groups of 2 of 5 heads, the last one incomplete."""
    problem = Problem(1, 5, 70, D=16)
    expected = problem.forward(Tile(32, 32, 0, 4, 1))
    monkeypatch.setattr(attention_common, "machine", lambda device: (132, 2 * 2 * 70 * (2 * 16 * 4)))     # half of L2 holds 2 heads
    monkeypatch.setattr(attention_forward, "_program", attention_common.program)     # asks again
    with guarded_outputs():
        for a, b in zip(problem.forward(Tile(32, 32, 0, 4, 1)), expected, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("form, dtype, D, p", [
    ("head", f32, 40, 0.0), ("head", bf16, 64, 0.3), ("split", f16, 8, 0.3), ("split", bf16, 16, 0.0)])
def test_the_packed_projection_gives_the_bits_of_its_thirds(form, dtype, D, p):
    """Also one whose rows lie apart (the margins' NaNs between them), and one that is copied first."""
    B, H, T = 2, 3, 70
    problem = Problem(B, H, T, D=D, dtype=dtype, p=p, packed=True)
    seed = problem.seed if p > 0 else None
    out, lse = problem.forward()
    gradients = problem.backward(out, lse, form)
    apart = with_nan_margins(torch.empty(B, T, 3 * H * D + 16, dtype=dtype, device=harness.DEVICE)[..., :3 * H * D].copy_(problem.qkv))
    transposed = problem.qkv.transpose(1, 2).contiguous().transpose(1, 2)
    assert apart.stride(1) > 3 * H * D and transposed.stride(2) != 1
    do = problem.do.transpose(1, 2)
    for qkv in (problem.qkv, apart, transposed):
        with guarded_outputs():
            ours, ours_lse = attention_forward.launch_forward_qkvpacked(qkv, seed, H, problem.scale, p, TILES and TILES["forward"])
        assert same_bits(ours.view(B, T, H, D), out) and same_bits(ours_lse, lse)
        for packed_do in (do.reshape(B, T, H * D), do.reshape(B, T, H * D).transpose(1, 2).contiguous().transpose(1, 2)):
            with guarded_outputs():
                dqkv = attention_backward.launch_backward_qkvpacked(packed_do, qkv, ours, ours_lse, seed, H, problem.scale, p,
                                                                    form, TILES)
            for ours_gradient, gradient in zip(dqkv.view(B, T, 3, H, D).unbind(2), gradients, strict=True):
                assert same_bits(ours_gradient.transpose(1, 2), gradient)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "offset"])
@pytest.mark.parametrize("form", FORMS)
def test_an_output_gradient_of_any_layout_is_read_right(layout, form):
    problem = Problem(2, 2, 40, D=16)
    out, lse = problem.forward()
    do = torch.randn(2, 2, 40, 16, device=harness.DEVICE)
    if layout == "transposed":
        do = do.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "expanded":
        do = do[:1, :, :1].expand(2, 2, 40, 16)
    else:
        do = torch.randn(2, 2, 41, 19, device=harness.DEVICE)[:, :, 1:, 3:]
    for a, b in zip(problem.backward(out, lse, form, do=do), problem.backward(out, lse, form, do=do.contiguous()), strict=True):
        assert same_bits(a, b)


# ------------------------------------------------------------------------------------------------------------------ planted faults


FORWARD_FAULTS = {
    "mask off by one": (r"offs_m\[:, None\] \+ \(Tk - Tq\) >= offs_n", "offs_m[:, None] + (Tk - Tq) > offs_n"),
    "mask shows one too many": (r"offs_m\[:, None\] \+ \(Tk - Tq\) >= offs_n", "offs_m[:, None] + (Tk - Tq) + 1 >= offs_n"),
    "missing scale": (r"scale \* LOG2_E, dropout_p", "LOG2_E, dropout_p"),
    "natural instead of base 2": (r"scale \* LOG2_E, dropout_p", "scale, dropout_p"),
    "maximum not carried into the sum": (r"l_i = l_i \* alpha", "l_i = l_i"),
    "out not rescaled": (r"acc \* alpha\[:, None\]", "acc"),
}
BACKWARD_FAULTS = {
    "mask off by one": (r"offs_m\[None, :\] \+ \(Tk - Tq\) >= offs_n", "offs_m[None, :] + (Tk - Tq) > offs_n", "head"),
    "missing scale of dk": (r"store_tile\(dk_ptr, dk \* scale", "store_tile(dk_ptr, dk", "head"),
    "missing scale of dq, split": (r"dq \* scale, start_m, stride_gt", "dq, start_m, stride_gt", "split"),
    "swapped dk and dv": (r"store_tile\(dv_ptr, dv,", "store_tile(dv_ptr, dk,", "split"),
    "delta left out": (r"delta \* \(dropout_p - 1.0\)", "delta * 0.0", "head"),
    "terms not padded to the longer tile": (r"if rank == 0:", "if rank < 0:", "split"),
    "first tile of keys adds to garbage": (r"Tq \* \(start_n > 0\)", "Tq", "head"),
    "narrow mask: full tiles start too early": (r"start_n \+ BLOCK_N - 1 - \(Tk - Tq\), 0\), BLOCK_M\)", "start_n + BLOCK_N - BLOCK_M - 1 - (Tk - Tq), 0), BLOCK_M)", "split"),
}


# The inputs are the same in every run: what is tried here is the checks, and one of 200 inputs fails them by chance in fp32.
@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_a_fault_in_the_forward_is_seen(fault):
    pattern, replacement = FORWARD_FAULTS[fault]
    torch.manual_seed(0)
    problem = Problem(1, 1, 65, D=16)

    def check():
        out, lse = problem.forward()
        oracle, plain = problem.pytorch(torch.float64), problem.pytorch(f32)
        assert_close_to_oracle(out.transpose(1, 2), oracle["out"], plain["out"], "forward")
    assert_fault_is_seen(attention_forward, pattern, replacement, check)


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_fault_in_the_backward_is_seen(fault):
    pattern, replacement, form = BACKWARD_FAULTS[fault]
    torch.manual_seed(0)
    problem = Problem(1, 1, 65, D=16)
    assert_fault_is_seen(attention_backward, pattern, replacement, lambda: problem.check([form]))


@pytest.mark.parametrize("form", FORMS)
def test_a_backward_that_forgets_dropout_is_seen(form):
    torch.manual_seed(0)
    problem = Problem(1, 1, 65, D=16, p=0.3)
    dropped = r"tl.where\(keep, dp, minus_delta\) \* keep_scale\(dropout_p\)|tl.where\(keep, dp \* keep_scale\(dropout_p\), 0.0\)"
    assert_fault_is_seen(attention_backward, dropped, "dp", lambda: problem.check([form]), count=2)


# ------------------------------------------------------------------------------------------------------------- 64-bit and arguments


@pytest.mark.skipif(ON_GPU, reason="asks the interpreter for addresses")
def test_offsets_beyond_2_to_the_31_are_computed_in_64_bits():
    """The last program of B=16384, T=1024, C=768 (B*T*3C = 3.9e10) and of a scratch of B*H*T*D, by the addresses it forms."""
    B, heads, T, D = 16384, 12, 1024, 64
    C, tile = heads * D, Tile(64, 64, 0, 4, 1)
    x, f = torch.zeros(1, dtype=f16), torch.zeros(1)
    strides = (T * 3 * C, D, 3 * C)
    sizes = dict(D=D, HEAD=D, BLOCK_M=64, BLOCK_N=64, DROPOUT=False)
    last_row, last_rows = (B - 1) * T * 3 * C + 11 * D, (B - 1) * T * C + 11 * D       # where the last head begins

    def addresses(program, grid, kernel, *args, **constants):
        with harness.addresses_of_one_program((program,), (grid,)) as seen:
            kernel[(1,)](*args, **constants)
        return {int(a[0]) for _, a in seen if a.size}, {int(a.max()) for _, a in seen if a.size}

    grid = B * heads * T // tile.BLOCK_M
    first, _ = addresses(grid - 1, grid, attention_forward.forward_kernel, x, x, x, x, f, None, *strides, *strides, 0.1, 0.0, heads, T, T,
                         B * heads, B * heads, **sizes)
    assert {x.data_ptr() + 2 * last_row, x.data_ptr() + 2 * last_rows, f.data_ptr() + 4 * (B * heads - 1) * T} <= first
    packed, _ = addresses(grid - 1, grid, attention_forward.forward_kernel, x, None, None, x, f, None, *strides, *strides, 0.1, 0.0, heads,
                          T, T, B * heads, B * heads, **sizes)
    assert {x.data_ptr() + 2 * (last_row + third * C) for third in range(3)} <= packed

    first, largest = addresses(B * heads - 1, B * heads, attention_backward.backward_head_kernel, x, x, x, x, x, f, f, x, x, x, f, None,
                               *strides, *strides, *strides, 3 * C, 0.1, 0.1, 0.0, heads, T, T, **sizes)
    assert {x.data_ptr() + 2 * last_row, f.data_ptr() + 4 * (B * heads - 1) * T * D} <= first
    packed, _ = addresses(B * heads - 1, B * heads, attention_backward.backward_head_kernel, x, None, None, x, x, f, f, x, None, None, f,
                          None, *strides, *strides, *strides, 3 * C, 0.1, 0.1, 0.0, heads, T, T, **sizes)
    assert {x.data_ptr() + 2 * (last_row + third * C) for third in range(3)} <= packed
    assert f.data_ptr() + 4 * (B * heads * T * D - 1) in largest                        # the last element of dq's sum

    # The last program of the split form has the first queries, or the last keys and the queries that see them.
    # Per query there is one lse for the former, two rows of terms for the latter.
    for kernel, pointers, row, rows in ((attention_backward.backward_dq_kernel, (x, x, x, x, x, f, f, x, None), 0, 1),
                                        (attention_backward.backward_dkdv_kernel, (x, x, x, x, f, x, x, None), T - 64, 2)):
        first, _ = addresses(grid - 1, grid, kernel, *pointers, *strides, *strides, *strides, 3 * C, 0.1, 0.1, 0.0, heads, T, T,
                             B * heads, B * heads, **sizes)
        assert {x.data_ptr() + 2 * (last_row + row * 3 * C), f.data_ptr() + 4 * ((B * heads - 1) * rows * T + row)} <= first


@pytest.mark.parametrize("error, message, change", (
    (ValueError, r"q has shape \(2, 8, 16\); expected \(B, H, T, D\)", dict(q=torch.zeros(2, 8, 16))),
    (TypeError, "k is torch.float16, q torch.float32", dict(k=torch.zeros(1, 2, 8, 16, dtype=f16))),
    (TypeError, "expected float32, float16 or bfloat16", dict(q=torch.zeros(1, 2, 8, 16, dtype=torch.float64))),
    (ValueError, "v has strides .*make it contiguous first", dict(v=torch.zeros(1, 2, 16, 8).transpose(2, 3))),
    (ValueError, "expected the same B, H and D, and k like v", dict(v=torch.zeros(1, 2, 9, 16))),
    (ValueError, "8 queries and 7 keys", dict(k=torch.zeros(1, 2, 7, 16), v=torch.zeros(1, 2, 7, 16))),
    (ValueError, "k has strides .* expected the same", dict(v=torch.zeros(1, 8, 2, 16).transpose(1, 2))),
    (ValueError, "scale is -1.0; expected a positive number", dict(scale=-1.0)),
    (ValueError, "the dropout probability is 1.1; expected 0 to 1", dict(dropout_p=1.1)),
    (ValueError, "seed must be one int64 element", dict(dropout_p=0.1)),
    (ValueError, "the head size is 300; expected 1 to 256", dict.fromkeys("qkv", torch.zeros(1, 2, 8, 300))),
))
def test_wrong_arguments_are_named(error, message, change):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 2, 8, 16)) | dict(scale=1.0) | change
    arguments = {name: x.to(harness.DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(error, match=message):
        attention_forward.attention_forward(**arguments)


def test_gradients_that_share_no_row_stride_are_refused():
    problem = Problem(1, 2, 8, D=16)
    out, lse = problem.forward()
    right, wrong = torch.empty(1, 8, 2, 16, device=harness.DEVICE), torch.empty(1, 2, 8, 16, device=harness.DEVICE).transpose(1, 2)
    with pytest.raises(ValueError, match="dq is .* expected .* strides"):
        attention_backward.attention_backward(problem.do, problem.q, problem.k, problem.v, out, lse, wrong, right, right, scale=1.0)
    with pytest.raises(ValueError, match="form is 'heads'"):
        attention_backward.attention_backward(problem.do, problem.q, problem.k, problem.v, out, lse, right, right, right, scale=1.0, form="heads")


def test_the_head_form_is_taken_where_heads_fill_the_card_and_its_working_set_stays_in_l2(monkeypatch):
    def on(arch, *machine):
        cards.on_card(monkeypatch, arch)
        attention_backward.programs.cache_clear()
        for module in (attention_backward, attention_common):
            monkeypatch.setattr(module, "machine", lambda device: machine)
    on(80, 108, 40 * 2**20)
    form = lambda B, T, D: attention_backward.programs(*(of := (bf16, D, False, -1)), *attention_backward.tiles_for(*of, B * T, T)).form(12 * B, T)
    assert form(64, 1024, 64) == "head" and form(9, 1024, 64) == "head"
    assert form(8, 1024, 64) == "split"         # 96 heads, 108 multiprocessors
    assert form(64, 4096, 64) == "split"        # 2 MB a head
    assert form(64, 1024, 128) == "split"       # no tile without spills
    on(90, 132, 50 * 2**20)
    assert form(64, 1024, 64) == "split"        # measured: an H100 takes 1.6 times as long for the head form
    problem = Problem(1, 1, 5, D=128)
    with pytest.raises(ValueError, match="'head' where that has a tile .this head size is 128."):
        problem.backward(*problem.forward(), "head", {"dq": Tile(16, 16, 0, 4, 1), "dkdv": Tile(16, 16, 0, 4, 1)})
