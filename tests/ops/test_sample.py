"""ops.sample: the tokens it draws against a transcription of the definition, statistics that can fail, invariance, traps, errors."""
import itertools
import math

import numpy as np
import pytest
import torch

from nanogpt_fast import backend
from nanogpt_fast.ops import extension, sampler
from nanogpt_fast.ops.sampler import sample, sample_out, sample_probs

needs_extension = pytest.mark.skipif(extension._C is None, reason=f"no extension: {extension._C is None and extension.missing()}")
IMPLEMENTATIONS = [pytest.param(backend.parse("fused"), id="cpp", marks=needs_extension), pytest.param(backend.parse("reference"), id="plain")]


# ---------------------------------------------------------------- the transcription: one row, slow, in fp64 and Python's integers

def kept_weights(x, temperature=1.0, top_k=None, top_p=None, min_p=None):
    x = torch.where(x.isnan(), -math.inf, x.float())
    y = torch.where(x == x.max(), 0.0, (x - x.max()) / temperature)
    w = (y.double().exp() * 2.0**40).round().long()
    keep = torch.ones_like(w, dtype=torch.bool)
    if top_k is not None:
        keep = torch.tensor([(x > value).sum() < top_k for value in x])
    if top_p is not None and top_p < 1:
        p, total = int(torch.tensor(top_p).item() * 2**32), int(w[keep].sum())
        above = [int(w[keep & (x > value)].sum()) for value in x]
        keep &= torch.tensor([a == 0 or a * 2**32 < p * total for a in above])
    if min_p:
        keep &= y >= torch.tensor(min_p).double().log().float()
    return torch.where(keep, w, 0)


def philox(seed, offset):
    c, k = [offset % 2**32, offset >> 32, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def transcribed_token(x, seed, offset, temperature=1.0, **filters):
    if temperature == 0 or not (x > -math.inf).any():
        return min(range(len(x)), key=lambda i: (not x[i] == torch.where(x.isnan(), -math.inf, x).max(), i))
    words = philox(seed, offset)
    cumulative = kept_weights(x, temperature, **filters).cumsum(0)
    return int((cumulative <= ((words[1] << 32 | words[0]) * int(cumulative[-1]) >> 64)).sum())


def test_philox_gives_the_published_words():
    assert philox(0, 0) == [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]
    ones = 2**64 - 1
    for seed, offset in ((0, 0), (ones, ones), (0x243f6a8885a308d3, 2**40 + 7)):
        words, signed = philox(seed, offset), [value - 2**64 if value >= 2**63 else value for value in (seed, offset)]
        assert sampler._philox(*(torch.tensor([value]) for value in signed)).item() % 2**64 == words[1] << 32 | words[0]


GRID = list(itertools.product((None, 1, 3, 40), (None, 0.0, 0.5, 0.95), (None, 0.05, 1.0), (1.0, 0.6, 0.0)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [5, 97])
def test_tokens_and_kept_sets_are_those_of_the_transcription(V, dtype, implementation):
    generator = torch.Generator().manual_seed(V)
    for seed, (k, p, m, t) in enumerate(GRID):
        x = (torch.randn(2, V, generator=generator) * 2).to(dtype)
        filters = dict(top_k=k, top_p=p, min_p=m, temperature=t)
        expected = [transcribed_token(row, seed + b, 7, **filters) for b, row in enumerate(x)]
        assert sample(x, seed=seed, offset=7, backend=implementation, **filters).tolist() == expected, filters
        if t > 0:
            kept = torch.stack([kept_weights(row, **filters) for row in x])
            found = sample_probs(x, **filters)
            assert torch.equal(found > 0, kept > 0), filters
            # 1e-6: fp32's exp and the rounding of y, both relative to the weight
            assert torch.allclose(found.double(), kept.double() / kept.sum(-1, keepdim=True), rtol=1e-6, atol=1e-12)


@needs_extension
@pytest.mark.parametrize("V", [1, 64, 1000, 5003])
def test_the_extension_and_pytorch_draw_the_same_tokens(V):
    generator = torch.Generator().manual_seed(V)
    grid = itertools.product((None, 5, 200, 1500), (None, 0.3, 0.999999), (None, 0.05), (1.0, 1e-30, 50.0))
    for seed, (k, p, m, t) in enumerate(grid):
        x = (torch.randn(3, V, generator=generator) * 3).to((torch.float32, torch.bfloat16, torch.float16)[seed % 3])
        filters = dict(top_k=k, top_p=p, min_p=m, temperature=t, seed=seed, offset=2**40)
        assert torch.equal(sample(x, backend=backend.parse("fused"), **filters), sample(x, backend=backend.parse("reference"), **filters)), filters


# ---------------------------------------------------------------- statistics

def z_score(tokens, weights):
    """How many standard deviations chi-square lies from its mean; bins pooled to 5 expected. inf for a token outside the kept set."""
    counts, p = torch.bincount(tokens, minlength=len(weights)).double(), weights.double() / weights.sum()
    if counts[weights == 0].any():
        return math.inf
    expected, order = p * len(tokens), p.argsort(descending=True)
    bins, seen, wanted = [], 0.0, 0.0
    for i in order[p[order] > 0].tolist():
        seen, wanted = seen + counts[i].item(), wanted + expected[i].item()
        if wanted >= 5:
            bins.append((seen, wanted))
            seen, wanted = 0.0, 0.0
    if wanted:
        bins[-1] = (bins[-1][0] + seen, bins[-1][1] + wanted)
    chi2, freedom = sum((s - e)**2 / e for s, e in bins), len(bins) - 1
    return (chi2 - freedom) / math.sqrt(2 * freedom)


def min_p_first(x, temperature, top_p, min_p):
    """Wrong: top-p's total after min-p has pruned."""
    return kept_weights(torch.where(kept_weights(x, temperature, min_p=min_p) > 0, x, -math.inf), temperature, top_p=top_p)


def ties_cut(x, temperature, top_k):
    """Wrong: exactly k tokens, whatever ties with the k-th."""
    return torch.zeros(len(x), dtype=torch.long).index_copy_(0, (top := x.sort(descending=True, stable=True).indices[:top_k]),
                                                              kept_weights(x, temperature)[top])


CLAIMS = {  # filters, and a reference that is wrong about just them
    "temperature": (dict(temperature=0.7), lambda x, temperature: kept_weights(x, temperature * 1.04)),
    "top_k": (dict(temperature=1.0, top_k=10), lambda x, temperature, top_k: kept_weights(x, temperature, top_k=top_k - 2)),
    "top_k with ties": (dict(temperature=1.0, top_k=10), ties_cut),
    "top_p": (dict(temperature=1.0, top_p=0.8), lambda x, temperature, top_p: kept_weights(x, temperature, top_p=0.75)),
    "top_p after top_k": (dict(temperature=1.0, top_k=30, top_p=0.9), lambda x, temperature, top_k, top_p:
                          torch.where(kept_weights(x, temperature, top_p=top_p) > 0, kept_weights(x, temperature, top_k=top_k), 0)),
    "min_p after top_p": (dict(temperature=1.0, top_p=0.9, min_p=0.1), min_p_first),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("claim", CLAIMS)
def test_tokens_follow_the_distribution_and_not_a_wrong_one(claim, implementation):
    filters, wrong = CLAIMS[claim]
    x = torch.randn(101, generator=torch.Generator().manual_seed(11)) * 1.5
    if claim == "top_k with ties":
        x = x.round()
    tokens = sample(x.expand(20000, -1), seed=1000, backend=implementation, **filters)
    assert abs(z_score(tokens, kept_weights(x, **filters))) < 4
    assert z_score(tokens, wrong(x, **filters)) > 4


@pytest.mark.parametrize("gap, V, draws, implementation", [
    pytest.param(10, 4096, 1000, IMPLEMENTATIONS[1].values[0], id="10-plain"),          # only here: its int64 work of (draws, V) is slow
    *(pytest.param(*case, IMPLEMENTATIONS[0].values[0], id=f"{case[0]}-cpp", marks=needs_extension)
      for case in ((10, 4096, 4000), (14, 65536, 1000), (17, 262144, 1500)))])
def test_tails_are_drawn_as_often_as_they_weigh(gap, V, draws, implementation):
    """One token above V - 1 others by `gap`; at 17 each of them is below what fp32 noise can draw (2^-24 is a gap of 16.6)."""
    x = torch.full((V,), -float(gap))
    x[5] = 0.0
    tokens = torch.cat([sample(x.expand(100, -1), seed=s, offset=3, backend=implementation) for s in range(0, draws, 100)])
    tail, n = (V - 1) * math.exp(-gap), len(tokens)
    p = tail / (1 + tail)
    drawn = (tokens != 5).sum().item()
    assert abs(drawn - n * p) < 4 * math.sqrt(n * p * (1 - p)), (drawn, n * p)
    assert abs(drawn - 2 * n * p) > 2 * math.sqrt(n * p)                                # it can fail: twice the tail is not what was drawn
    where = tokens[tokens != 5].double() / V                                            # uniform over the tail
    assert abs(where.mean() - 0.5) < 4 / math.sqrt(12 * max(drawn, 1))


# ---------------------------------------------------------------- invariance

def rows(n=9, V=3000, seed=0):
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed)) * 3


FILTERS = [dict(), dict(top_k=50), dict(top_p=0.9), dict(top_k=40, top_p=0.7, min_p=0.02), dict(temperature=0.0)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("filters", FILTERS)
def test_a_row_draws_the_same_in_any_slot_of_any_batch(filters, implementation):
    x, seed = rows(), torch.arange(9) * 77 - 5
    together = sample(x, seed=seed, backend=implementation, **filters)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sample(x[order], seed=seed[order], backend=implementation, **filters), together[order])
    alone = [sample(x[b:b + 1], seed=seed[b:b + 1], backend=implementation, **filters) for b in range(9)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("filters", FILTERS)
@needs_extension
def test_threads_and_instruction_sets_do_not_change_a_token(filters):
    x, expected = rows(n=40, V=5003), None
    for isa, threads in itertools.product(extension._C.build_info()["cpu_isas"].split(), (1, 2, 7, 64)):
        seed, offset, out = torch.arange(40), torch.zeros(40, dtype=torch.long), torch.full((40,), -1)
        extension._C.sample_cpu(x.data_ptr(), "float32", *x.shape, x.stride(0), 0, filters.get("temperature", 1.0), 0, filters.get("top_k", 0),
                              0, filters.get("top_p", 1.0), 0, filters.get("min_p", 0.0), seed.data_ptr(), offset.data_ptr(), out.data_ptr(),
                              threads, isa)
        expected = out if expected is None else expected
        assert torch.equal(out, expected), (isa, threads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_and_offset_rows_are_the_same_rows(implementation):
    x = rows(4, 999).bfloat16()
    wide = torch.zeros(4, 1100, dtype=torch.bfloat16)
    wide[:, 7:1006] = x
    expected = sample(x, seed=1, top_k=20, backend=implementation)
    assert torch.equal(sample(wide[:, 7:1006], seed=1, top_k=20, backend=implementation), expected)
    assert torch.equal(sample(x.t().contiguous().t(), seed=1, top_k=20, backend=implementation), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameters_per_row_act_on_their_row(implementation):
    x, k, p, m, t = rows(4), [1, 50, 3000, 7], [1.0, 0.5, 0.9, 1.0], [0.0, 0.1, 0.0, 1.0], [1.0, 0.5, 2.0, 0.0]
    seed = torch.arange(4) + 9
    together = sample(x, top_k=k, top_p=torch.tensor(p), min_p=torch.tensor(m, dtype=torch.float64), temperature=t, seed=seed, backend=implementation)
    for b in range(4):
        one = sample(x[b:b + 1], top_k=k[b], top_p=p[b], min_p=m[b], temperature=t[b], seed=seed[b:b + 1], backend=implementation)
        assert together[b] == one[0]


def test_offsets_advance_and_successive_draws_differ():
    x, offset = rows(2).mul_(0.1), torch.tensor([0, 100])
    drawn = torch.stack([sample(x, seed=torch.tensor([4, 4]), offset=offset) for _ in range(20)])
    assert offset.tolist() == [20, 120] and len(set(drawn.flatten().tolist())) > 30
    assert torch.equal(sample(x, seed=torch.tensor([4, 4]), offset=torch.tensor([3, 103])), drawn[3])


def test_torchs_generator_decides_where_no_seed_is_given():
    torch.manual_seed(5)
    first = [sample(rows(3)).tolist() for _ in range(3)]
    torch.manual_seed(5)
    assert [sample(rows(3)).tolist() for _ in range(3)] == first and first[0] != first[1]


# ---------------------------------------------------------------- traps

nan, inf = math.nan, math.inf
TRAPS = {  # a row, filters, the tokens it may draw
    "NaN is never drawn": ([nan, 1.0, nan, 2.0], dict(), {1, 3}),
    "NaN is below -inf": ([nan, -inf, nan], dict(), {1}),
    "only NaN gives the first token": ([nan, nan, nan], dict(top_k=2), {0}),
    "only -inf gives the first token": ([-inf, -inf], dict(top_p=0.5), {0}),
    "+inf shares with +inf alone": ([1.0, inf, nan, inf], dict(), {1, 3}),
    "greedy takes the lowest index of equals": ([1.0, 3.0, 3.0, nan], dict(temperature=0.0), {1}),
    "greedy over NaN": ([nan, nan, -5.0], dict(temperature=0.0), {2}),
    "minus zero equals zero": ([-0.0, 0.0, -1.0], dict(top_k=1), {0, 1}),
    "all ties stay with top_k": ([2.0, 2.0, 2.0, 1.0], dict(top_k=1), {0, 1, 2}),
    "k above V": ([1.0, 1.0], dict(top_k=10**12), {0, 1}),
    "k equal to V": ([1.0, 0.5], dict(top_k=2), {0, 1}),
    "p of 0 keeps the top": ([1.0, 4.0, 1.0], dict(top_p=0.0), {1}),
    "min_p of 1 keeps the top": ([1.0, 4.0, 4.0, 3.9999998], dict(min_p=1.0), {1, 2}),
    "a temperature near 0": ([1.0, 1.0000001, 0.0], dict(temperature=1e-38), {1}),
    "a subnormal temperature": ([1.0, 2.0], dict(temperature=1e-45), {1}),
    "huge logits": ([3e38, -3e38, 3e38], dict(temperature=0.5), {0, 2}),
    "a huge temperature": ([3e38, 0.0], dict(temperature=3e38), {0, 1}),
    "one token": ([nan], dict(top_k=1, top_p=0.1, min_p=0.5), {0}),
}


def unchecked(x, implementation, **filters):
    """What `sample` would draw with seed=0 if it did not look at the logits."""
    out = torch.full((x.size(0),), -1)
    sample_out(x, out=out, seed=torch.arange(x.size(0)), offset=torch.zeros_like(out), backend=implementation, **filters)
    return out


UNDRAWABLE = [([0.0, nan, 1.0], "NaN"), ([nan, nan, nan], "NaN"), ([nan, inf, -inf], "NaN"), ([1.0, inf, 2.0], "[+]inf"),
              ([-inf, -inf, -inf], "nothing above -inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("row, found", UNDRAWABLE)
def test_a_row_from_which_nanogpt_draws_nothing_is_named_on_a_cpu(row, found, implementation, dtype):
    x = torch.tensor([[1.0, -inf, 2.0], row, row], dtype=dtype)
    with pytest.raises(RuntimeError):       # nanoGPT's last two lines
        torch.multinomial(torch.softmax(x.float(), dim=-1), num_samples=1)
    for filters in (dict(), dict(temperature=0.0), dict(top_k=1)):
        with pytest.raises(ValueError, match=f"logits of row 1 hold {found}; expected finite numbers"):
            sample(x, seed=0, backend=implementation, **filters)
    assert sample(x[:1], seed=0, backend=implementation).item() in (0, 2)
    assert 0 <= unchecked(x, implementation)[1] < 3     # in the range, whatever it means


def test_logits_on_a_gpu_are_not_looked_at():
    """It would make the host wait. The meta device stands for the GPU: reading its values raises."""
    sampler._check_finite(torch.full((2, 3), nan, device="meta"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("trap", TRAPS)
def test_trap(trap, implementation):
    row, filters, allowed = TRAPS[trap]
    x = torch.tensor(row)
    tokens = unchecked(x.expand(200, -1), implementation, **filters)
    assert set(tokens.tolist()) == allowed
    probs = sample_probs(x[None], **filters)[0]
    assert probs.sum() == pytest.approx(1) and set(probs.nonzero()[:, 0].tolist()) == allowed
    assert tokens[0].item() == transcribed_token(x, 0, 0, **{"temperature": 1.0, **filters})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("filters", FILTERS)
def test_large_equal_rows_and_large_odd_vocabularies(filters, implementation):
    for x in (torch.zeros(2, 50257), torch.full((2, 262144), -7.5, dtype=torch.float16), rows(2, 262143).bfloat16()):
        token = sample(x, seed=2, backend=implementation, **filters)
        assert token.dtype == torch.int64 and (0 <= token).all() and (token < x.size(1)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_batch_gives_no_tokens(implementation):
    for V in (1, 50304):
        assert sample(torch.empty(0, V), top_k=5, backend=implementation).shape == (0,)
        assert sample_probs(torch.empty(0, V)).shape == (0, V)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_top_k_of_zero_is_off_and_numpys_numbers_are_numbers(implementation):
    x = rows(3, 500)
    expected = sample(x, seed=4, backend=implementation)
    assert torch.equal(sample(x, seed=np.int64(4), top_k=0, temperature=np.float32(1), offset=np.int8(0), backend=implementation), expected)
    assert torch.equal(sample(x, seed=4, top_k=[0, 0, 0], backend=implementation), expected)
    assert torch.equal(sample(x, seed=4, top_k=np.int32(7), top_p=np.float64(0.5), backend=implementation),
                       sample(x, seed=4, top_k=7, top_p=0.5, backend=implementation))


# ---------------------------------------------------------------- errors

ERRORS = [
    (dict(logits=torch.zeros(2, 5, dtype=torch.float64)), "logits is torch.float64"),
    (dict(logits=torch.zeros(5)), "logits has shape"),
    (dict(logits=torch.zeros(2, 0)), "logits has shape"),
    (dict(logits=torch.zeros(1, 262145)), "logits has shape"),
    (dict(logits=[1.0]), "logits is"),
    (dict(top_k=-1), "top_k is -1"),
    (dict(top_k=1.5), "top_k is 1.5"),
    (dict(top_k=[3, -1]), "top_k of row 1 is -1"),
    (dict(top_k=torch.tensor([1.0, 2.0])), "top_k is a tensor of torch.float32"),
    (dict(top_k=[1, 2, 3]), r"top_k has shape \(3,\)"),
    (dict(top_p=1.1), "top_p is 1.1"),
    (dict(top_p=nan), "top_p is nan"),
    (dict(top_p=[nan, 0.5]), "top_p of row 0 is nan"),
    (dict(min_p=-0.1), "min_p is -0.1"),
    (dict(min_p=["a", "b"]), "min_p is"),
    (dict(temperature=-1.0), "temperature is -1.0"),
    (dict(temperature=inf), "temperature is inf"),
    (dict(temperature=None), "temperature is None"),
    (dict(temperature=torch.tensor([1.0, -2.0])), "temperature of row 1 is -2.0"),
    (dict(temperature=torch.ones(2, device="meta")), "temperature has shape .* on meta"),
    (dict(seed=2**64), "seed is"),
    (dict(seed=torch.zeros(2)), "seed is torch.float32"),
    (dict(seed=torch.zeros(3, dtype=torch.long)), r"seed is torch.int64 of shape \(3,\)"),
    (dict(offset=1.5), "offset is 1.5"),
    (dict(offset=torch.zeros(4, dtype=torch.long)[::2]), "offset is on cpu with strides"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("arguments, message", ERRORS, ids=[message for _, message in ERRORS])
def test_an_error_names_the_argument(arguments, message, implementation):
    with pytest.raises(ValueError, match=message):
        sample(**{"logits": torch.zeros(2, 5), "backend": implementation, **arguments})


@needs_extension
def test_the_extension_refuses_what_it_cannot_read():
    good = [1, "float32", 1, 5, 5, 0, 1.0, 0, 0, 0, 1.0, 0, 0.0, 1, 1, 1, 1, ""]
    for place, value, message in ((1, "float64", "type is"), (2, -1, "rows is"), (3, 0, "vocab is"), (13, 0, "must not be null")):
        with pytest.raises(ValueError, match=message):
            extension._C.sample_cpu(*good[:place], value, *good[place + 1:])
    with pytest.raises(ValueError, match="isa is 'mmx'"):
        extension._C.sample_cpu(*good[:2], 0, *good[3:-1], "mmx")


# ---------------------------------------------------------------- sample_out, torch.compile, the fallback

@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sample_out_writes_in_place_and_reads_parameters_at_each_call(implementation):
    x, seed, offset, out = rows(3), torch.arange(3), torch.zeros(3, dtype=torch.long), torch.full((3,), -1)
    k, t = torch.full((3,), 50), torch.ones(3)
    for step in range(4):
        sample_out(x, out=out, seed=seed, offset=offset, top_k=k, temperature=t, backend=implementation)
        assert torch.equal(out, sample(x, seed=seed, offset=step, top_k=50, temperature=float(t[0]), backend=implementation))
        t.mul_(0.5)
    assert offset.tolist() == [4, 4, 4]
    k.zero_(), t.fill_(-1.0)                                                            # unchecked: off, and greedy
    sample_out(x, out=out, seed=seed, offset=offset, top_k=k, temperature=t, backend=implementation)
    assert torch.equal(out, x.argmax(-1))


@pytest.mark.parametrize("wrong, message", [(dict(out=torch.zeros(3)), "out is torch.float32"), (dict(top_k=torch.ones(3, dtype=torch.int32)), "top_k is torch.int32"),
                                            (dict(logits=rows(3).t().contiguous().t()), "logits has strides")])
def test_sample_out_names_what_it_cannot_take(wrong, message):
    arguments = dict(logits=rows(3), out=torch.zeros(3, dtype=torch.long), seed=torch.arange(3), offset=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        sample_out(**{**arguments, **wrong})


def test_a_compiled_function_samples_without_a_graph_break():
    def step(x, seed, offset, k):
        return sample(x * 2, seed=seed, offset=offset, top_k=k, temperature=0.9) + 0

    x, k = rows(3, 100), torch.tensor([5, 6, 7])
    compiled, offset, eager_offset = torch.compile(step, fullgraph=True, backend="aot_eager"), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    for _ in range(3):
        assert torch.equal(compiled(x, torch.arange(3), offset, k), step(x, torch.arange(3), eager_offset, k))
    assert offset.tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match="top_k of row 1 is -1"):
        compiled(x, torch.arange(3), offset, torch.tensor([5, -1, 7]))


def test_the_registered_op_keeps_its_schema():
    arguments = (rows(2), None, 0.8, None, 5, None, 1.0, None, 0.0, torch.arange(2), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), True, "auto")
    torch.library.opcheck(torch.ops.nanogpt_fast.sample.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_without_the_extension_the_reason_is_told_and_pytorch_draws(monkeypatch):
    x = rows(2)
    expected = sample(x, seed=1, top_k=9)
    monkeypatch.setattr(extension, "_C", None)
    assert "nanogpt_fast._C" in sampler.why_not(x) and sampler.implementation(x) == "reference"
    assert torch.equal(sample(x, seed=1, top_k=9), expected)
    with pytest.raises(RuntimeError, match="nanogpt_fast._C"):
        sample(x, backend=backend.parse("fused"))
