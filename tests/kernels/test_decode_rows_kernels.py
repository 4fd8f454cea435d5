"""The decode step for many rows, kernels/decode_rows.py: each kernel against fp64, and generation's tokens.

Up to 8 rows fill a tile of 8, in part or whole, 9 to 16 one of 16.
"""
import harness
import pytest
import torch
import torch.nn.functional as F
from nanogpt_fast.kernels import decode, decode_rows
from test_decode_kernels import FUSED, Problem, attention, counted_launches, model_of, prompts_of, same_tokens

import nanogpt_fast
from nanogpt_fast import generation
from nanogpt_fast.generation import decode as op

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
pytestmark = pytest.mark.filterwarnings("ignore:nanogpt_fast")


class Rows(Problem):
    """A Problem for the decoder of many rows, with lengths from one token to a full cache."""
    form = decode_rows.RowsDecoder

    def __init__(self, B, H=1, D=16, F=40, T=40, **options):
        positions = ([T - 1, 7, 0, 16] + torch.randint(T, (B,)).tolist())[:B]
        super().__init__(B, H, D, F, T, positions=positions, **options)
        self.decoder.y.fill_(float("nan"))
        self.leave_statistics()

    def stored(self, x, norm, linear):
        """The exact product of the exact norm, rounded once as the kernels store it. With few rows and 16 channels these roundings are few,
        and those of one row shift all of its results."""
        return self.linear(self.norm(x, norm, torch.float64).to(self.dtype).double(), linear, torch.float64)

    def leave_statistics(self):
        """What `linear_add` leaves of x for the norm."""
        d = self.decoder
        groups = d.x.double().split(d.GROUP, 1)
        d.stats[0] = torch.stack([group.mean(1) for group in groups])
        d.stats[1] = torch.stack([(group - group.mean(1, keepdim=True)).square().sum(1) for group in groups])


# C = 52 and 40 end in a group of statistics that is not full; F = 300 is more than one piece of K.
CASES = [(3, 2, 16, bf16, True), (8, 1, 40, f16, False), (16, 4, 13, bf16, False), (9, 1, 16, f16, True)]


@pytest.mark.parametrize("B,H,D,dtype,bias", CASES, ids=str)
def test_embed_and_norm_qkv_give_the_query_and_write_key_and_value(B, H, D, dtype, bias):
    p = Rows(B, H, D, dtype=dtype, bias=bias)
    d, layer = p.decoder, p.layer
    d.q.fill_(float("nan"))
    d.embed(p.token, p.position)
    assert harness.same_bits(d.x, d.wte[p.token] + d.wpe[p.position])
    assert d.length.tolist() == (p.position + 1).tolist()
    before = [layer.keys.clone(), layer.values.clone()]
    d.norm_qkv(layer)
    oracle, plain = (p.linear(p.norm(d.x, layer.ln_1, dt), layer.c_attn, dt).split(p.C, 1) for dt in (torch.float64, dtype))
    stored = p.stored(d.x, layer.ln_1, layer.c_attn).split(p.C, 1)
    harness.assert_close_to_oracle(d.q, oracle[0], plain[0], "forward", what="q", stored=stored[0])
    rows = torch.arange(B, device=harness.DEVICE)
    for i, (name, cache) in enumerate((("keys", layer.keys), ("values", layer.values))):
        harness.assert_close_to_oracle(cache[rows, :, p.position].flatten(1), oracle[i + 1], plain[i + 1], "forward", what=name,
                                       stored=stored[i + 1])
        before[i][rows, :, p.position] = cache[rows, :, p.position]
        assert harness.same_bits(cache, before[i]), f"{name} changed at another position"


def test_a_position_past_the_cache_writes_inside_it():
    p = Rows(5)
    before = p.layer.keys[:, :, :-1].clone()
    p.position.copy_(torch.tensor([40, 100, 40, 41, 2**40]))
    p.decoder(p.token, p.position)
    assert p.decoder.length.tolist() == [40] * 5 and harness.same_bits(p.layer.keys[:, :, :-1], before)


# With D=128 a tile has 64 keys, so 150 positions are three; D=13 is padded.
@pytest.mark.parametrize("B,H,D,T,dtype", [(5, 2, 13, 40, bf16), (6, 1, 128, 150, f16), (16, 1, 16, 300, bf16)], ids=str)
def test_attend_is_attention_over_the_keys_so_far(B, H, D, T, dtype):
    p = Rows(B, H, D, T=T, dtype=dtype)
    for row, at in enumerate(p.position.tolist()):      # the newest key and the last one before it have large scores
        for key in {at, max(0, at - 1)}:
            p.layer.keys[row, :, key] = (p.decoder.q[row].view(H, D) * (5 / D**0.5)).to(dtype)
        for cache in (p.layer.keys, p.layer.values):    # what lies behind the length is never read
            cache[row, :, at + 1:] = float("nan")
    p.decoder.attend(p.layer, p.position)
    harness.assert_close_to_oracle(p.decoder.y, attention(p, torch.float64), attention(p, dtype), "forward")


@pytest.mark.parametrize("B,H,D,dtype,bias", CASES, ids=str)
def test_linear_add_adds_the_projection_and_leaves_the_statistics_of_x(B, H, D, dtype, bias):
    p = Rows(B, H, D, F=300, dtype=dtype, bias=bias)
    d, x = p.decoder, p.decoder.x.clone()
    h = harness.with_nan_margins(torch.randn(B, 300).to(dtype).to(harness.DEVICE))
    d.stats.fill_(float("nan"))
    d.linear_add(h, p.layer.mlp_proj)
    oracle = x.double() + p.linear(h.double(), p.layer.mlp_proj, torch.float64)
    harness.assert_close_to_oracle(d.x, oracle, x + p.linear(h, p.layer.mlp_proj, dtype), "forward", what="x")
    left = d.stats.clone()
    p.leave_statistics()
    torch.testing.assert_close(left, d.stats, rtol=1e-5, atol=1e-6)     # sums of at most 16 fp32 numbers of the size of 1


@pytest.mark.parametrize("B,H,D,dtype,bias,activation", [
    (5, 2, 16, bf16, True, "gelu"), (16, 1, 40, f16, False, "gelu_tanh"), (9, 4, 13, bf16, True, "gelu")])
def test_norm_act_normalises_by_the_statistics_alone(B, H, D, dtype, bias, activation):
    p = Rows(B, H, D, F=72, dtype=dtype, bias=bias, activation=activation)
    d, layer = p.decoder, p.layer
    d.x += 100 * torch.rand(B, 1, device=harness.DEVICE)                # a mean that a sum of squares would drown in
    p.leave_statistics()
    d.norm_act(layer)
    act = lambda h: F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")
    oracle, plain = (act(p.linear(p.norm(d.x, layer.ln_2, dt), layer.c_fc, dt)) for dt in (torch.float64, dtype))
    harness.assert_close_to_oracle(d.h, oracle, plain, "forward", what="h", stored=act(p.stored(d.x, layer.ln_2, layer.c_fc)))


@pytest.mark.parametrize("B,V,dtype,bias", [(5, 37, bf16, False), (16, 64, f16, True), (9, 5, bf16, False)])
def test_head_normalises_once_and_walks_the_vocabulary(B, V, dtype, bias):
    p = Rows(B, V=V, dtype=dtype, bias=bias)
    d = p.decoder
    with harness.guarded_outputs():
        out = torch.empty(B, V, device=harness.DEVICE)
        d.logits(out)
    oracle, plain = (p.linear(p.norm(d.x, d.ln_f, dt), d.head, dt) for dt in (torch.float64, dtype))
    harness.assert_close_to_oracle(out, oracle, plain, "forward", stored=p.stored(d.x, d.ln_f, d.head))


def test_the_order_of_programs_changes_nothing_and_no_two_store_to_one_address():
    p = Rows(16, T=20, V=20, F=8)

    def step():
        start = [p.layer.keys.clone(), p.layer.values.clone()]
        with harness.guarded_outputs():
            logits = p.decoder(p.token, p.position)
        results = [logits, p.decoder.x.clone(), p.layer.keys.clone(), p.layer.values.clone()]
        for tensor, value in zip((p.layer.keys, p.layer.values), start):
            tensor.copy_(value)
        return results
    harness.assert_grid_order_is_free(step)


def test_a_rows_logits_do_not_depend_on_the_rows_beside_it():
    p = Rows(7, T=300, V=20, F=8)
    together = p.decoder(p.token, p.position)
    changed = p.token.clone()
    changed[:6] = (changed[:6] + 1) % 20
    elsewhere = torch.cat((p.position[:6].flip(0), p.position[6:]))
    assert harness.same_bits(p.decoder(changed, elsewhere)[6], together[6])


def qkv_check():
    torch.manual_seed(0)
    test_embed_and_norm_qkv_give_the_query_and_write_key_and_value(5, 2, 16, bf16, True)


def attend_check():
    torch.manual_seed(0)
    test_attend_is_attention_over_the_keys_so_far(6, 1, 128, 150, f16)


def act_check():
    torch.manual_seed(0)
    test_norm_act_normalises_by_the_statistics_alone(9, 4, 13, bf16, True, "gelu")


@pytest.mark.parametrize("pattern,replacement,check", [
    (r"squares \+ columns \* off \* off, 0\) / C", "squares, 0) / C", qkv_check),
    (r"slot == 0, 1.0, 0.0", "slot == 0, 0.0, 0.0", attend_check),
    (r"v_new\[None, :\], 0.0", "v_new[None, :] * 0.0, 0.0", attend_check),
    (r"tl.where\(inside, tl.minimum\(GROUP, C - group \* GROUP\), 0\)", "tl.where(inside, GROUP, 0)", act_check),
])
def test_planted_faults_are_seen(pattern, replacement, check):
    harness.assert_fault_is_seen(decode_rows, pattern, replacement, check)


def test_what_the_decoder_of_many_rows_refuses():
    p = Rows(5)
    d, layer = p.decoder, p.layer
    with pytest.raises(TypeError, match="float32; expected float16 or bfloat16"):
        Rows(5, dtype=f32)
    with pytest.raises(ValueError, match="17 rows of width 16; expected at most 16"):
        Rows(17)
    with pytest.raises(ValueError, match="position is"):
        d(p.token, p.position.int())


@torch.no_grad()
def test_a_step_of_many_rows_is_five_launches_a_layer_and_two():
    model = model_of(n_layer=2, n_head=1, n_embd=16)
    with nanogpt_fast.use(FUSED):
        session = generation.Session(model, 5, bf16)
        session.refresh()
        session.feed(torch.full((5,), 3, device=harness.DEVICE), torch.zeros(5, dtype=torch.long, device=harness.DEVICE))
        with counted_launches() as names:
            session.decode(12)
    layer = ["norm_qkv_kernel", "attend_kernel", "linear_add_kernel", "norm_act_kernel", "linear_add_kernel"]
    assert names == ["embed_kernel"] + 2 * layer + ["head_kernel"]


@pytest.mark.parametrize("changes", [{}, {"bias": False}], ids=str)
def test_generation_of_five_rows_gives_the_tokens_of_the_reference_across_block_size(changes):
    model, prompts = model_of(**changes), prompts_of(3, 9, 14, 2, 5)
    with torch.autocast(harness.DEVICE.type, dtype=bf16):
        with nanogpt_fast.use(FUSED):
            rows = model.generate(prompts, 6, temperature=0)
        with nanogpt_fast.use("reference"):
            for prompt, row in zip(prompts, rows):
                alone = model.generate(prompt[None], 6, temperature=0, use_cache=False)[0]
                assert same_tokens(model, row, alone, len(prompt), bf16), len(prompt)


def test_which_form_decodes_how_many_rows():
    session = lambda rows, dtype=bf16, **changes: generation.Session(model_of(**changes), rows, dtype)
    with nanogpt_fast.use(FUSED):
        assert type(session(2).native) is type(session(4, f32).native) is decode.Decoder
        assert type(session(3).native) is type(session(16).native) is decode_rows.RowsDecoder
        if not harness.INTERPRETED:                         # on a CPU "fused" asks for a kernel and says why there is none
            assert session(17).native is None
    with nanogpt_fast.use("reference"):
        assert op.why_not_triton(session(16)) is None
        assert "17 rows; the kernels take up to 16" in op.why_not_triton(session(17))
        assert "5 rows; the kernels take up to 4" in op.why_not_triton(session(5, f32))
