"""The decode step of kernels/decode.py: each kernel against fp64, and generation's tokens from prompt to beyond the window."""
import contextlib

import harness
import pytest
import torch
import torch.nn.functional as F
from gpts import sharpened
from nanogpt_fast.kernels import attention_decode, decode, decode_rows, dependent_launch

import nanogpt_fast
from nanogpt_fast import generation
from nanogpt_fast.generation import decode as op

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:nanogpt_fast")


# -------------------------------------------------------------------------------------------------------- one kernel at a time


class Problem:
    """A decoder of one layer between NaN margins, its activations filled, and what each kernel should make of them."""
    form = decode.Decoder

    def __init__(self, B=2, H=2, D=16, F=72, T=40, V=37, dtype=bf16, bias=True, activation="gelu", positions=None):
        self.C = C = H * D
        new = lambda *shape, dtype=dtype, scale=1.0: harness.with_nan_margins(
            (scale * torch.randn(*shape)).to(dtype).to(harness.DEVICE))
        linear = lambda N, K: (new(N, K, scale=K**-0.5), new(N) if bias else None)
        norm = lambda: (new(C, dtype=f32, scale=0.3).add_(1), new(C, dtype=f32) if bias else None)
        self.layer = decode.Layer(norm(), linear(3 * C, C), linear(C, C), norm(), linear(F, C), linear(C, F),
                                  new(B, H, T, D), new(B, H, T, D), activation)
        self.decoder = self.form(new(V, C, dtype=f32), new(T, C, dtype=f32), norm(), linear(V, C), [self.layer])
        for name in ("x", "q", "h"):
            setattr(self.decoder, name, new(*getattr(self.decoder, name).shape, dtype=getattr(self.decoder, name).dtype))
        for name in {"part", "lse", "length", "stats", "y"} & vars(self.decoder).keys():
            setattr(self.decoder, name, harness.with_nan_margins(getattr(self.decoder, name)))
        self.token = torch.randint(V, (B,), device=harness.DEVICE)
        self.position = torch.tensor(positions or [T - 1, 7, 0, 16][:B], device=harness.DEVICE)
        self.decoder.length.copy_(self.position + 1)
        self.dtype = dtype

    def as_(self, dtype, tensor):
        return tensor.to(dtype) if dtype == torch.float64 else tensor

    def norm(self, x, pair, dtype):
        """LayerNorm in fp32 and rounded to the weights' dtype, as the plain path has it; dtype float64 for the oracle."""
        weight, bias = (None if t is None else self.as_(dtype, t) for t in pair)
        y = F.layer_norm(self.as_(dtype, x), (self.C,), weight, bias, 1e-5)
        return y if dtype == torch.float64 else y.to(self.dtype)

    def linear(self, h, pair, dtype):
        return F.linear(h, *(None if t is None else self.as_(dtype, t) for t in pair))


def bits(*tensors):
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("B,H,D,dtype,bias", [(2, 2, 16, bf16, True), (1, 3, 13, f32, True), (2, 1, 40, f16, False)], ids=str)
def test_norm_qkv_gives_the_query_and_writes_key_and_value_where_the_token_stands(B, H, D, dtype, bias, first):
    p = Problem(B, H, D, dtype=dtype, bias=bias)
    d, layer = p.decoder, p.layer
    before = [layer.keys.clone(), layer.values.clone()]
    x = d.wte[p.token] + d.wpe[p.position] if first else d.x.clone()
    d.q.fill_(float("nan"))
    d.norm_qkv(layer, (p.token, d.wte, d.wpe) if first else (None, None, None), p.position)
    assert harness.same_bits(d.x, x)
    assert d.length.tolist() == (p.position + 1).tolist()
    oracle, plain = (p.linear(p.norm(x, layer.ln_1, dt), layer.c_attn, dt).split(p.C, 1) for dt in (torch.float64, dtype))
    harness.assert_close_to_oracle(d.q, oracle[0], plain[0], "forward", what="q")
    rows = torch.arange(B, device=harness.DEVICE)
    for i, (name, cache) in enumerate((("keys", layer.keys), ("values", layer.values))):
        harness.assert_close_to_oracle(cache[rows, :, p.position].flatten(1), oracle[i + 1], plain[i + 1], "forward", what=name)
        before[i][rows, :, p.position] = cache[rows, :, p.position]
        assert harness.same_bits(cache, before[i]), f"{name} changed at another position"


def test_a_position_past_the_cache_writes_inside_it():
    p = Problem(B=2, positions=[40, 100])
    before = p.layer.keys[:, :, :-1].clone()
    p.decoder.norm_qkv(p.layer, (p.token, p.decoder.wte, p.decoder.wpe), p.position)
    assert p.decoder.length.tolist() == [40, 40] and harness.same_bits(p.layer.keys[:, :, :-1], before)


def attention(p, dtype):
    """(B, C): softmax attention of d.q over the first `length` keys."""
    out = []
    for row, length in enumerate(p.decoder.length.tolist()):
        q = p.decoder.q[row].view(p.decoder.H, 1, p.decoder.D)
        k, v = (p.as_(dtype, t[row, :, :length]) for t in (p.layer.keys, p.layer.values))
        out.append(F.scaled_dot_product_attention(q.to(k.dtype), k, v).flatten())
    return torch.stack(out)


# 40 positions of head size 16 are one chunk of 256; 700 are three, in rows of one, two and three; D=13 is padded. With D=128 a
# chunk has 32 keys, so 300 positions are 10: two rounds of `combine_add`.
@pytest.mark.parametrize("B,H,D,T,dtype,bias,positions", [
    (2, 2, 16, 40, bf16, True, None), (3, 3, 13, 700, f32, True, [10, 300, 699]), (1, 1, 128, 300, f16, False, [299])], ids=str)
def test_attend_and_combine_add_add_the_projection_of_attention(B, H, D, T, dtype, bias, positions):
    p = Problem(B, H, D, T=T, dtype=dtype, bias=bias, positions=positions)
    x = p.decoder.x.clone()
    for row, at in enumerate(p.position.tolist()):      # the last chunk has the largest score: what came before must shrink
        p.layer.keys[row, :, at] = (p.decoder.q[row].view(H, D) * (5 / D**0.5)).to(dtype)
    p.decoder.part.fill_(float("nan"))                  # chunks behind the length stay so and must not be read
    p.decoder.lse.fill_(float("nan"))
    p.decoder.attend(p.layer)
    p.decoder.combine_add(p.layer)
    oracle = x.double() + p.linear(attention(p, torch.float64), p.layer.c_proj, torch.float64)
    plain = x + p.linear(attention(p, dtype), p.layer.c_proj, dtype)
    harness.assert_close_to_oracle(p.decoder.x, oracle, plain, "forward")


@pytest.mark.parametrize("dtype,bias,activation,H,F_", [
    (bf16, True, "gelu", 2, 72), (f32, True, "gelu_tanh", 3, 156), (f16, False, "gelu", 1, 16)])
def test_norm_act_and_linear_add_are_the_mlp(dtype, bias, activation, H, F_):
    p = Problem(2, H, 13, F_, dtype=dtype, bias=bias, activation=activation)
    d, layer, x = p.decoder, p.layer, p.decoder.x.clone()
    d.h.fill_(float("nan"))
    d.norm_act(layer)
    act = lambda h: F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")
    oracle, plain = (act(p.linear(p.norm(x, layer.ln_2, dt), layer.c_fc, dt)) for dt in (torch.float64, dtype))
    harness.assert_close_to_oracle(d.h, oracle, plain, "forward", what="h")
    h = d.h.clone()
    d.linear_add(layer)
    oracle = x.double() + p.linear(h.double(), layer.mlp_proj, torch.float64)
    harness.assert_close_to_oracle(d.x, oracle, x + p.linear(h.to(dtype), layer.mlp_proj, dtype), "forward", what="x")


@pytest.mark.parametrize("V,dtype,bias", [(37, bf16, False), (64, f32, True), (5, f16, False)])
def test_head_normalises_once_and_walks_the_vocabulary(V, dtype, bias):
    p = Problem(V=V, dtype=dtype, bias=bias)
    d = p.decoder
    with harness.guarded_outputs():
        out = torch.empty(2, V, device=harness.DEVICE)
        d.logits(out)
    oracle, plain = (p.linear(p.norm(d.x, d.ln_f, dt), d.head, dt) for dt in (torch.float64, dtype))
    harness.assert_close_to_oracle(out, oracle, plain, "forward")


def test_the_order_of_programs_changes_nothing_and_no_two_store_to_one_address():
    p = Problem(H=1, T=300, V=20, F=8, positions=[299, 3])

    def step():
        start = bits(p.layer.keys, p.layer.values)
        with harness.guarded_outputs():
            logits = p.decoder(p.token, p.position)
        results = [logits, *bits(p.decoder.x, p.layer.keys, p.layer.values)]
        for tensor, value in zip((p.layer.keys, p.layer.values), start):
            tensor.copy_(value)
        return results
    harness.assert_grid_order_is_free(step)


def test_a_rows_logits_do_not_depend_on_the_rows_beside_it():
    p = Problem(B=3, H=1, T=300, V=20, F=8, positions=[299, 3, 256])
    together = p.decoder(p.token, p.position)
    for row in range(3):
        layer = p.layer._replace(keys=p.layer.keys[row:row + 1].clone(), values=p.layer.values[row:row + 1].clone())
        d = p.decoder
        alone = decode.Decoder(d.wte, d.wpe, d.ln_f, d.head, [layer])
        assert harness.same_bits(alone(p.token[row:row + 1], p.position[row:row + 1])[0], together[row])


def mlp_check():
    torch.manual_seed(0)
    test_norm_act_and_linear_add_are_the_mlp(f32, True, "gelu", 2, 72)


def attention_check():
    torch.manual_seed(0)
    test_attend_and_combine_add_add_the_projection_of_attention(1, 1, 128, 300, f32, True, [299])


def qkv_check():
    torch.manual_seed(0)
    test_norm_qkv_gives_the_query_and_writes_key_and_value_where_the_token_stands(2, 2, 16, f32, True, False)


@pytest.mark.parametrize("pattern,replacement,check", [
    (r"centred \* centred, C, 0\) \+ eps", "centred * centred, C - 1, 0) + eps", mlp_check),
    (r"acc \* alpha, l_i \* alpha, m_ij", "acc, l_i * alpha, m_ij", attention_check),
    (r"mask=\(n >= C\) & \(n < 2 \* C\)", "mask=(n >= C) & (n < 2 * C - 1)", qkv_check),
    (r"\* T \+ position\) \* D", "* T + position + row) * D", qkv_check),
])
def test_planted_faults_are_seen(pattern, replacement, check):
    harness.assert_fault_is_seen(decode, pattern, replacement, check)


def test_what_the_decoder_refuses():
    p = Problem()
    d, layer = p.decoder, p.layer
    build = lambda layers=(layer,), **changes: decode.Decoder(
        **{**dict(wte=d.wte, wpe=d.wpe, ln_f=d.ln_f, head=d.head), **changes}, layers=list(layers))
    build()
    with pytest.raises(ValueError, match=r"layers\[0\].c_fc.weight is .* contiguous"):
        build([layer._replace(c_fc=(torch.randn(32, 72).to(bf16).to(harness.DEVICE).T, layer.c_fc[1]))])
    with pytest.raises(TypeError, match=r"layers\[0\].keys is torch.float32"):
        build([layer._replace(keys=layer.keys.float())])
    with pytest.raises(ValueError, match="wpe is"):
        build(wpe=d.wpe[:-1].clone())
    with pytest.raises(ValueError, match="activation 'silu'"):
        build([layer._replace(activation="silu")])
    with pytest.raises(ValueError, match="position is"):
        d(p.token, p.position.int())


# ------------------------------------------------------------------------------------------------------------ the step as an op


def model_of(seed=0, **changes):
    return sharpened(seed, **{**dict(block_size=12, vocab_size=29, n_layer=1), **changes}).to(harness.DEVICE)


def prompts_of(*lengths):
    return [torch.randint(29, (n,), device=harness.DEVICE) for n in lengths]


FUSED = "reference,decode=fused"


@contextlib.contextmanager
def counted_launches():
    """The names of the kernels launched inside."""
    names = []
    kernels = [(module, name) for module in (decode, attention_decode, decode_rows) for name in vars(module) if name.endswith("_kernel")]
    before = [getattr(module, name) for module, name in kernels]

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: (names.append(self.name), self.kernel[grid](*args, **kwargs))[1]
    try:
        for (module, name), kernel in zip(kernels, before):
            setattr(module, name, Counted(kernel, name))
        yield names
    finally:
        for (module, name), kernel in zip(kernels, before):
            setattr(module, name, kernel)


@torch.no_grad()
def test_a_step_is_five_launches_a_layer_and_one_for_the_head():
    with nanogpt_fast.use(FUSED):
        session = generation.Session(model_of(n_layer=3, n_head=1, n_embd=16), 1, f32)
        session.feed(torch.tensor([3], device=harness.DEVICE), torch.tensor([0], device=harness.DEVICE))
        with counted_launches() as names:
            session.decode(12)
    layer = ["norm_qkv_kernel", "decode_kernel", "combine_add_kernel", "norm_act_kernel", "linear_add_kernel"]
    assert names == 3 * layer + ["head_kernel"]         # with GPT-2's 12 layers 61


@torch.no_grad()
def same_tokens(model, a, b, prompt_length, dtype):
    """Equal, or they part where the two chosen scores are tied within what the dtype leaves of a logit."""
    if torch.equal(a, b):
        return True
    at = int((a != b).nonzero()[0])
    assert at >= prompt_length
    with torch.autocast(harness.DEVICE.type, dtype=bf16, enabled=dtype == bf16):
        logits = model(a[None, max(0, at - model.config.block_size):at])[0][0, -1].float()
    error = 1e-4 if dtype == f32 else 8 * torch.finfo(bf16).eps * logits.abs().max()
    return abs(logits[a[at]] - logits[b[at]]).item() < error


@pytest.mark.parametrize("lengths,dtype,changes", [((3, 9, 14), f32, {}), ((3, 14), bf16, {"bias": False})], ids=str)
def test_generation_gives_the_tokens_of_the_reference_for_ragged_prompts_across_block_size(lengths, dtype, changes):
    model, prompts = model_of(**changes), prompts_of(*lengths)
    with torch.autocast(harness.DEVICE.type, dtype=bf16, enabled=dtype == bf16):
        with nanogpt_fast.use(FUSED), counted_launches() as names:
            rows = model.generate(prompts, 12, temperature=0)
        if harness.INTERPRETED:                             # a graph's launches are not seen
            assert len(names) == 9 * 6                      # from the second token until the shortest row has left the window
        with nanogpt_fast.use("reference"):
            for prompt, row in zip(prompts, rows):
                alone = model.generate(prompt[None], 12, temperature=0, use_cache=False)[0]
                assert same_tokens(model, row, alone, len(prompt), dtype), len(prompt)


def test_seeded_draws_are_those_of_the_reference():
    model, prompts = model_of(), prompts_of(4)
    texts = []
    for spec in (FUSED, "reference"):
        with nanogpt_fast.use(spec):
            texts.append(model.generate(prompts, 7, seed=5, top_k=9)[0])
    assert torch.equal(*texts)                              # a draw would differ only where it lies within 1e-6 of a boundary


def test_what_the_kernels_cannot_decode_says_why():
    session = lambda rows=1, dtype=f32, **changes: generation.Session(model_of(**changes), rows, dtype)
    with nanogpt_fast.use("reference"):
        assert op.why_not_triton(session()) is None and op.why_not_triton(session(rows=4, dtype=bf16)) is None
        assert "5 rows; the kernels take up to 4" in op.why_not_triton(session(rows=5))
        assert "torch.float64" in op.why_not_triton(session(dtype=torch.float64))
        assert "head size is 320" in op.why_not_triton(session(n_head=1, n_embd=320))
        other = session()
        other.head = (other.head[0].t().contiguous().t(), None)
        assert "not contiguous" in op.why_not_triton(other)


@pytest.mark.skipif(not harness.INTERPRETED, reason="the interpreter's choice")
def test_auto_does_not_take_the_interpreter():
    with nanogpt_fast.use("auto"):
        assert not isinstance(generation.Session(model_of(), 1, f32).native, decode.Decoder)


def test_the_early_start_is_off_where_a_gpu_does_not_have_it():
    if harness.INTERPRETED or torch.cuda.get_device_capability() < (9, 0):
        assert dependent_launch.options(torch.zeros(1, device=harness.DEVICE)) == {"DEPENDENT": False}
    else:
        assert dependent_launch.options(torch.zeros(1, device=harness.DEVICE)) == {"DEPENDENT": True, "launch_pdl": True}


@pytest.mark.skipif(harness.INTERPRETED, reason="CUDA graphs need a GPU")
def test_a_replayed_graph_gives_the_tokens_of_single_steps():
    model, prompts = model_of(n_layer=2, block_size=64).to(harness.DEVICE), prompts_of(3, 9)
    with nanogpt_fast.use(FUSED):
        rows = model.generate(prompts, 40, seed=5)
        with nanogpt_fast.use("reference"):
            for i, (prompt, row) in enumerate(zip(prompts, rows)):
                assert torch.equal(row, model.generate([prompt], 40, seed=5 + i, use_cache=False)[0])
