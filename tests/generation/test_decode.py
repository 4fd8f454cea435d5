"""The C++ decode step against float64: both dtypes, every instruction set of this machine, odd widths, one row and sixteen."""
import contextlib
import copy
import io

import pytest
import torch

import nanogpt_fast
from nanogpt_fast import GPT, GPTConfig, generation
from nanogpt_fast.checks.error_rule import measure
from nanogpt_fast.generation import decode
from nanogpt_fast.ops import extension

pytestmark = pytest.mark.skipif(not hasattr(extension._C, "Decoder"), reason="the extension is not built: no C++ compiler")
ISAS = extension._C.build_info()["decode_isas"].split() if hasattr(extension._C, "Decoder") else []


def model_of(**changes):
    with contextlib.redirect_stdout(io.StringIO()):
        model = GPT(GPTConfig(**{**dict(block_size=40, vocab_size=101, n_layer=2, n_head=2, n_embd=32), **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(0.05 * torch.randn_like(p))
    return model


def session_with_prompts(model, rows, dtype):
    """A session whose cache holds `rows` prompts of different lengths, and the next token of each."""
    session = generation.Session(model, rows, dtype)
    session.refresh()
    lengths = torch.randint(1, 39, (rows,))
    prompts = torch.randint(model.config.vocab_size, (rows, int(lengths.max())))
    session.prefill(prompts, lengths)
    session.feed(torch.randint(model.config.vocab_size, (rows,)), lengths)
    return session, prompts, lengths


@torch.no_grad()
def logits_of(model, dtype, prompts, lengths, tokens):
    """The same next logits from the whole model, in `dtype` (float64 is the oracle), one row at a time."""
    model = copy.deepcopy(model)
    rows = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16), nanogpt_fast.use("reference"):
        model = model.double() if dtype == torch.float64 else model
        for prompt, length, token in zip(prompts, lengths, tokens):
            rows.append(model(torch.cat((prompt[:length], token[None]))[None])[0][0, -1].double())
    return torch.stack(rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows,changes", [(1, {}), (3, {"bias": False}), (16, {"activation": "gelu_tanh"}), (6, {"n_head": 3, "n_embd": 39}),
                                          (4, {"n_head": 1, "n_embd": 100, "vocab_size": 7})], ids=str)
@torch.no_grad()
def test_logits_are_as_near_to_float64_as_pytorchs_own(rows, changes, dtype, isa):
    model = model_of(**changes)
    session, prompts, lengths = session_with_prompts(model, rows, dtype)
    assert session.native is not None
    if isa == "amx" and (dtype != torch.bfloat16 or model.config.n_embd % 32):
        with pytest.raises(ValueError, match="isa is 'amx'"):
            decode.step(session.native, session.token, session.position, model.config.vocab_size, isa)
        return
    token = session.token.clone()
    oracle = logits_of(model, torch.float64, prompts, lengths, token)
    plain = logits_of(model, dtype, prompts, lengths, token)
    logits = decode.step(session.native, session.token, session.position, model.config.vocab_size, isa)
    # The errors of a row come from one hidden state, so rows are few observations: of one row, 2.2 times PyTorch's norm was seen.
    assert (problem := measure(logits, oracle, plain, "forward").problem) is None, problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_number_of_threads_changes_no_bit(dtype):
    session, _, _ = session_with_prompts(model_of(n_embd=64, vocab_size=333), 5, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(decode.step(session.native, session.token, session.position, 333))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("rows", [7, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_rows_logits_do_not_depend_on_the_rows_around_it(dtype, rows):
    model = model_of()
    session, prompts, lengths = session_with_prompts(model, rows, dtype)
    together = decode.step(session.native, session.token, session.position, 101)
    for row in range(rows):
        alone = generation.Session(model, 1, dtype)
        alone.refresh()
        alone.cache.copy_(session.cache[:, :, row:row + 1])
        alone.feed(session.token[row:row + 1], session.position[row:row + 1])
        assert torch.equal(decode.step(alone.native, alone.token, alone.position, 101)[0], together[row])


def test_what_cannot_be_decoded_natively_says_why():
    model = model_of()
    assert decode.why_not(generation.Session(model, 2, torch.float32)) is None
    assert "17 rows" in decode.why_not(generation.Session(model, 17, torch.float32))
    assert "torch.float16" in decode.why_not(generation.Session(model, 1, torch.float16))
    assert "not float32" in decode.why_not(generation.Session(model.bfloat16(), 1, torch.bfloat16))
    with nanogpt_fast.use("reference"):
        assert generation.Session(model.float(), 1, torch.float32).native is None


def test_bad_tokens_positions_and_instruction_sets_are_refused():
    session = generation.Session(model_of(), 2, torch.float32)
    ids = lambda *values: torch.tensor(values)
    for token, position, isa, message in ((ids(0, 101), ids(0, 0), "", "token 101 in row 1"), (ids(0, 0), ids(-1, 0), "", "position -1 in row 0"),
                                          (ids(0, 0), ids(0, 40), "", "position 40 in row 1"), (ids(0, 0), ids(0, 0), "mmx", "isa is 'mmx'")):
        with pytest.raises(ValueError, match=message):
            decode.step(session.native, token, position, 101, isa)


def test_rows_within_and_past_the_window_go_together_in_bf16():
    model, prompts = model_of(), [torch.arange(n) for n in (5, 45)]                     # block_size 40
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = model.generate(prompts, 4, temperature=0)
        for prompt, row in zip(prompts, rows):
            alone = model.generate(prompt[None], 4, temperature=0)[0]
            assert len(row) == len(prompt) + 4 and torch.equal(row[:len(prompt) + 1], alone[:len(prompt) + 1])
