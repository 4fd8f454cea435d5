"""Attention of one new query a row over a cache (kernels/attention_decode.py) against fp64, by the error rule of harness.py."""
import math

import harness
import pytest
import torch
from harness import assert_close_to_oracle, assert_fault_is_seen, guarded_outputs, same_bits, with_nan_margins
from nanogpt_fast.kernels import attention_decode
from test_decode_kernels import counted_launches

f32 = torch.float32
DTYPES = [f32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[False, True], ids=["split", "whole"])
def whole(request, monkeypatch):
    """Whether `attention_decode` takes its kernel for many heads, here for few."""
    monkeypatch.setattr(attention_decode, "WHOLE_HEADS", 1 if request.param else 10**9)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [8, 40, 64, 128])
def test_decoding_agrees_with_fp64_at_every_length(D, dtype, whole):
    check_decoding(D, dtype)


def check_decoding(D, dtype):
    T = 150
    lengths = torch.tensor([1, 2, 64, 65, 150], device=harness.DEVICE)
    q, k, v = (with_nan_margins(torch.randn(5, 2, t, D).to(dtype).to(harness.DEVICE)) for t in (1, T, T))
    for row, length in enumerate(lengths.tolist()):       # beyond a row's length the cache holds anything
        k[row, :, length:] = math.nan
        v[row, :, length:] = math.nan
    with guarded_outputs(all_written=False):
        out = attention_decode.attention_decode(q, k, v, lengths, scale=D**-0.5)

    def pytorch(dtype):
        rows = []
        for row, length in enumerate(lengths.tolist()):
            qr, kr, vr = q[row].to(dtype), k[row, :, :length].to(dtype), v[row, :, :length].to(dtype)
            s = (qr.to(torch.promote_types(dtype, f32)) @ kr.to(torch.promote_types(dtype, f32)).transpose(-2, -1)) * D**-0.5
            rows.append(s.softmax(-1).to(dtype) @ vr)
        return torch.stack(rows)
    assert_close_to_oracle(out, pytorch(torch.float64), pytorch(dtype), "forward")


def test_decoding_reads_a_cache_of_any_strides(whole):
    q = torch.randn(2, 3, 1, 16, device=harness.DEVICE)
    k, v = (with_nan_margins(torch.randn(2, 300, 3, 16).to(harness.DEVICE)).transpose(1, 2)[:, :, :290] for _ in range(2))
    lengths = torch.tensor([290, 40], device=harness.DEVICE)
    out = attention_decode.attention_decode(q, k, v, lengths, scale=0.3)
    assert same_bits(out, attention_decode.attention_decode(q, k.contiguous(), v.contiguous(), lengths, scale=0.3))


def test_decoding_weighs_scores_far_below_zero(whole):
    q, k = torch.full((1, 1, 1, 16), -1e18, device=harness.DEVICE), torch.full((1, 1, 200, 16), 1e18, device=harness.DEVICE)
    v = torch.randn(1, 1, 200, 16, device=harness.DEVICE)
    out = attention_decode.attention_decode(q, k, v, torch.tensor([200], device=harness.DEVICE), scale=1.0)    # scores of -2e37
    torch.testing.assert_close(out[0, 0, 0], v[0, 0].mean(0))


def test_as_many_heads_as_fill_a_gpu_are_decoded_by_one_kernel():
    def launched(B, H):
        q, k = torch.randn(B, H, 1, 8, device=harness.DEVICE), torch.randn(B, H, 2, 8, device=harness.DEVICE)
        with counted_launches() as names:
            out = attention_decode.attention_decode(q, k, k, torch.ones(B, dtype=torch.int32, device=harness.DEVICE), scale=1.0)
        assert same_bits(out, k[:, :, :1])          # one key
        return names
    assert launched(22, 12) == ["whole_kernel"]
    assert launched(21, 12) == ["decode_kernel", "combine_kernel"]


@pytest.mark.parametrize("pattern,replacement", [
    (r"acc \* alpha\[:, None\] \+", "acc +"),
    (r"l_i \* weight, 0", "l_i, 0"),
    (r"l_i \* alpha \+ p, m_ij", "l_i + p, m_ij"),
    (r"first \+ slot < count", "first + slot <= count"),
])
def test_a_fault_in_the_decoding_of_whole_heads_is_seen(pattern, replacement, monkeypatch):
    def check():
        torch.manual_seed(0)
        monkeypatch.setitem(attention_decode.attention_decode.__globals__, "WHOLE_HEADS", 1)    # of the module with the fault, too
        check_decoding(64, f32)
    assert_fault_is_seen(attention_decode, pattern, replacement, check)


def test_a_decoded_row_does_not_depend_on_what_it_is_batched_with(whole):
    q, k, v = (torch.randn(3, 2, t, 64, device=harness.DEVICE) for t in (1, 200, 200))
    lengths = torch.tensor([200, 70, 130], device=harness.DEVICE)
    together = attention_decode.attention_decode(q, k, v, lengths, scale=0.1)
    for row in range(3):
        alone = attention_decode.attention_decode(q[row:row + 1], k[row:row + 1], v[row:row + 1], lengths[row:row + 1], scale=0.1)
        assert same_bits(together[row:row + 1], alone)


def test_decoding_an_empty_cache_gives_zeros(whole):
    q, k = torch.randn(2, 1, 1, 16, device=harness.DEVICE), torch.randn(2, 1, 40, 16, device=harness.DEVICE)
    out = attention_decode.attention_decode(q, k, k, torch.tensor([0, 40], device=harness.DEVICE), scale=1.0)
    assert not out[0].any() and out[1].any()
