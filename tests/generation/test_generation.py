"""Generation: the KV cache gives the tokens of the uncached path, whatever the prompts, and is never stale.

One-row and many-row matmuls round differently (C20), hence `same_tokens`.
"""
import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
from gpts import ERROR, Recorder, prompts_of, same_tokens, scores, sharpened

from nanogpt_fast import GPT, generation

LENGTHS = (3, 9, 23, 24, 30, 1)  # shorter, one below, at and beyond block_size 24


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"n_head": 4, "n_embd": 48}, {"activation": "gelu_tanh"}], ids=str)
def test_greedy_tokens_equal_the_uncached_path_for_ragged_prompts_across_block_size(changes):
    model, prompts = sharpened(**changes), prompts_of(*LENGTHS)
    for prompt, row in zip(prompts, model.generate(prompts, 40, temperature=0)):
        alone = model.generate(prompt[None], 40, temperature=0, use_cache=False)[0]
        assert same_tokens(model, row, alone, len(prompt)), len(prompt)


def test_cached_logits_agree_with_the_models_own():
    model, prompts = sharpened(), prompts_of(5, 11)
    run = generation.Run(model, prompts, 1, dict(temperature=0), None, None, True)
    run._room(30)
    for _ in range(30):
        with torch.no_grad():
            logits = run.logits().clone()
        for i, length in enumerate(run.lengths):
            assert (logits[i] - scores(model, run.history[i, :length])).abs().max() < ERROR
        token = logits.argmax(-1)                      # what `step` does, with the logits in our hands
        run.session.feed(token, run.ends)
        run.history[run.rows, run.ends] = token
        run.ends += 1
        run.lengths, run.longest, run.fresh = [n + 1 for n in run.lengths], run.longest + 1, False


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 7}], ids=str)
def test_sampled_tokens_follow_torchs_generator_draw_for_draw(filters):
    model, idx = sharpened(), torch.stack(prompts_of(5, 5))
    torch.manual_seed(1)
    cached = model.generate(idx, 40, **filters)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(cached, model.generate(idx, 40, use_cache=False, **filters))
    assert torch.equal(after, torch.get_rng_state())


def test_several_samples_from_one_prefill_are_the_prompt_repeated(monkeypatch):
    model, idx = sharpened(), torch.stack(prompts_of(5, 5))
    torch.manual_seed(1)
    repeated = model.generate(idx.repeat_interleave(3, 0), 30)
    widths = []
    prefill = generation.Session.prefill
    monkeypatch.setattr(generation.Session, "prefill",
                        lambda self, idx, *rest: (widths.append(idx.size(0)), prefill(self, idx, *rest))[1])
    torch.manual_seed(1)
    assert torch.equal(model.generate(idx, 30, num_samples=3), repeated)
    assert widths == [2]


def recording(model, rows):
    """The session that the model's next call of so many rows takes, told to capture; what it records is a stand-in's."""
    session = generation.session_of(model, rows)
    session.recorder = Recorder()
    generation.give_back(model, session)
    return session


@torch.no_grad()
def test_a_prefill_is_captured_for_its_width_and_each_prompt_gives_the_bits_it_gave_alone():
    model = sharpened(block_size=150)
    session, plain = recording(model, 2), generation.Session(model, 2, torch.float32)
    first = {}
    for T in (5, 64, 9, 65, 64, 149, 65):
        idx, lengths = torch.stack(prompts_of(T, T, seed=T)), torch.tensor([T, max(1, T - 3)])
        logits = session.prefill(idx, lengths).clone()
        torch.testing.assert_close(logits, plain.prefill(idx, lengths), atol=ERROR, rtol=0)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(session.cache[:, :, row, :, :length], plain.cache[:, :, row, :, :length], atol=ERROR, rtol=0)
        assert torch.equal(logits, first.setdefault(T, logits))       # the first of a width runs as it is, later ones are replays
    assert {key: prompts.idx.shape for key, prompts in session.prefills.items()} == {(2, 64, 1): (2, 64), (2, 128, 1): (2, 128), (2, 150, 1): (2, 150)}
    assert session.recorder.log == ["run run", "record run", "replay run", "replay run", "run run", "replay run", "run run", "record run", "replay run"]


@pytest.mark.parametrize("filters", ({"temperature": 0}, {"seed": 5, "top_k": 9}), ids=str)
def test_text_by_captured_prefills_and_steps_is_the_text_without(filters):
    model = sharpened()
    for prompts in ([3, 9, 23], [24, 30, 1], [3, 3, 3]):
        prompts = prompts_of(*prompts)
        expected = model.generate(prompts, 12, **filters)
        recording(model, 3)
        for _ in range(3):
            for prompt, a, b in zip(prompts, model.generate(prompts, 12, **filters), expected):
                assert torch.equal(a, b) if "seed" in filters else same_tokens(model, a, b, len(prompt))
        samples = model.generate(torch.stack(prompts_of(7)), 9, num_samples=3, **filters)
        assert samples.shape == (3, 16) and {key[0] for key in generation.session_of(model, 3).prefills} == {1, 3}
        generation._idle.clear()


@pytest.mark.parametrize("stream", (False, True))
@pytest.mark.parametrize("first", (False, True))
def test_what_inference_mode_leaves_behind_serves_outside_of_it(first, stream):
    """And the other way about: what a session keeps is written to by later calls."""
    model, idx = sharpened(), torch.stack(prompts_of(5, 5))

    def text(mode):
        with torch.inference_mode(mode):
            found = model.generate(idx.clone(), 30, seed=1, stream=stream)
            return list(found) if stream else found.tolist()
    texts = [text(mode) for mode in (first, not first, first)]
    assert texts[0] == texts[1] == texts[2]
    kept, = generation._idle[model]
    assert not any(t.is_inference() for t in vars(kept).values() if torch.is_tensor(t))
    model(idx, idx)[1].backward()


def test_long_prompts_and_many_are_not_captured():
    model = sharpened()
    session = recording(model, 400)
    session.prefill(torch.zeros(400, 20, dtype=torch.long), torch.full((400,), 20))
    assert not session.recorder.log and not session.prefills


def test_prompts_are_padded_to_few_widths_and_by_a_quarter_at_most():
    widths = [generation.prefill_width(T, 4096) for T in range(1, 4097)]
    assert all(T <= width <= max(64, 1.25 * T) or T < 256 and width - T < 64 for T, width in enumerate(widths, start=1))
    assert len(set(widths)) == 20 and widths == sorted(widths)
    assert generation.prefill_width(1000, 1000) == 1000 and generation.prefill_width(3, 24) == 24


def test_a_stop_ends_a_row_before_it_also_when_it_spans_steps():
    model, idx = sharpened(), torch.stack(prompts_of(5))
    free = model.generate(idx, 30, temperature=0)[0, 5:].tolist()
    at = next(i for i in range(2, 28) if free[i:i + 2] not in [free[j:j + 2] for j in range(i)])
    for stop, length in (([free[at:at + 2]], at), ([[999], free[at:at + 2]], at), (free[0], 0), ([64 if free[0] != 64 else 63], None)):
        row = model.generate(idx, 30, temperature=0, stop=stop)[0][5:].tolist()
        expected = free if length is None else free[:length]
        if length is None and stop[0] in free:
            expected = free[:free.index(stop[0])]
        assert row == expected
        streamed = [token for released in model.generate(idx, 30, temperature=0, stop=stop, stream=True) for token in released[0]]
        assert streamed == expected


def test_stop_rows_end_one_by_one():
    model, prompts = sharpened(), prompts_of(4, 9, 6)
    free = [row[len(p):].tolist() for p, row in zip(prompts, model.generate(prompts, 20, temperature=0))]
    stop = free[1][3]
    rows = model.generate(prompts, 20, temperature=0, stop=stop)
    for prompt, row, tokens in zip(prompts, rows, free):
        assert row[len(prompt):].tolist() == (tokens[:tokens.index(stop)] if stop in tokens else tokens)


def test_a_started_but_unfinished_stop_is_released_at_the_end():
    model, idx = sharpened(), torch.stack(prompts_of(5))
    free = model.generate(idx, 8, temperature=0)[0, 5:].tolist()
    steps = list(model.generate(idx, 8, temperature=0, stop=[[free[-1], 999]], stream=True))
    assert sum((step[0] for step in steps), []) == free


def test_streaming_yields_every_token_as_it_is_drawn():
    model, prompts = sharpened(), prompts_of(3, 8)
    stream = model.generate(prompts, 10, temperature=0, stream=True)
    first = next(stream)
    assert [len(tokens) for tokens in first] == [1, 1]
    rows = [first] + list(stream)
    assert len(rows) == 10
    for i, row in enumerate(model.generate(prompts, 10, temperature=0)):
        assert row[len(prompts[i]):].tolist() == [step[i][0] for step in rows]


def test_two_streams_of_one_model_do_not_disturb_each_other():
    model, prompts = sharpened(), prompts_of(3, 8)
    alone = [model.generate(p[None], 12, temperature=0)[0, len(p):].tolist() for p in prompts]
    a, b = (model.generate(p[None], 12, temperature=0, stream=True) for p in prompts)
    together = list(zip(a, b))
    assert [[pair[i][0][0] for pair in together] for i in (0, 1)] == alone


@pytest.mark.parametrize("change", ["train", "load", "double", "crop", "deepcopy", "replace"])
def test_nothing_is_stale_after_a_change_of_the_model(change):
    model, idx = sharpened(), torch.stack(prompts_of(5))
    before = model.generate(idx, 20, temperature=0)
    if change == "train":
        optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
        model(idx, idx.roll(1, 1))[1].backward()
        optimizer.step()
    elif change == "load":
        model.load_state_dict(sharpened(seed=8).state_dict())
    elif change == "double":
        model.double()
    elif change == "crop":
        model.crop_block_size(8)
    elif change == "replace":
        model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(4 * model.transformer.h[0].mlp.c_fc.weight.detach())
    else:
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.transformer.wte.weight.copy_(sharpened(seed=8).transformer.wte.weight)
    after = model.generate(idx, 20, temperature=0)
    assert same_tokens(model, after[0], model.generate(idx, 20, temperature=0, use_cache=False)[0], 5)
    if change != "double":
        assert not torch.equal(before, after)


def test_half_precision_copies_follow_the_weights():
    model, idx = sharpened(), torch.stack(prompts_of(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model.generate(idx, 20, temperature=0)
        with torch.no_grad():
            model.transformer.wte.weight.data.copy_(sharpened(seed=8).transformer.wte.weight)  # .data: no version counter moves
        after = model.generate(idx, 20, temperature=0)
    assert generation._idle[model].pop().dtype == torch.bfloat16
    assert not torch.equal(before, after)


def test_a_model_is_pickled_and_copied_after_it_generated():
    model, idx = sharpened(), torch.stack(prompts_of(5))
    expected = model.generate(idx, 5, temperature=0)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin.generate(idx, 5, temperature=0), expected)


def test_what_is_refused():
    model, idx = sharpened(), torch.stack(prompts_of(5))
    for kwargs, message in ((dict(top_p=1.5), "top_p is 1.5"), (dict(min_p=-0.1), "min_p is -0.1"), (dict(num_samples=0), "num_samples is 0"),
                            (dict(rng="numpy"), "rng is 'numpy'"), (dict(rng="torch", seed=1), "seed needs rng='philox'"),
                            (dict(stop=[[]]), "empty sequence"), (dict(seed=[1, 2]), "seed has 2 values for 1 rows")):
        with pytest.raises(ValueError, match=message):
            model.generate(idx, 3, **kwargs)
    with pytest.raises(ValueError, match=r"idx has shape \(5,\)"):
        model.generate(idx[0], 3)
    with pytest.raises(ValueError, match=r"prompt is empty \(row 1\)"):
        model.generate([idx[0], idx[0, :0]], 3)
    assert model.generate(idx[:0], 3).shape == (0, 8)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("filters", [dict(), dict(temperature=0), dict(temperature=0, seed=1), dict(top_p=0.9), dict(min_p=0.1, seed=1)],
                         ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinite_logits_are_refused_and_the_row_is_named(bad, filters, use_cache):
    """nanoGPT's torch.multinomial refuses them. What isn't checked gives token 0 for ever."""
    model, prompts = sharpened(), prompts_of(3, 3)
    model.transformer.wte.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    prompts[1][1] = 7
    with torch.no_grad():
        model.transformer.wte.weight[7] = bad
    with pytest.raises(RuntimeError, match="^row 1: the model's logits are NaN or infinite"):
        model.generate(prompts, 2, use_cache=use_cache, **filters)

    model = sharpened()
    with torch.no_grad():
        model.transformer.wpe.weight[8] = bad                  # met by the sixth new token
    assert len(model.generate(prompts[:1], 6, use_cache=use_cache, **filters)[0]) == 9
    with pytest.raises(RuntimeError, match="^row 0: the model's logits are NaN or infinite"):
        model.generate(prompts[:1], 8, use_cache=use_cache, **filters)
    stream, drawn = model.generate(prompts[:1], 8, use_cache=use_cache, stream=True, **filters), []
    with pytest.raises(RuntimeError, match="^row 0: the model's logits are NaN or infinite"):
        for step in stream:
            drawn.append(step)
    assert len(drawn) == 6


def test_a_nan_in_one_row_of_the_head_is_refused_and_minus_infinity_is_a_token_never_drawn():
    model, idx = sharpened(), torch.stack(prompts_of(5))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.bias = nn.Parameter(torch.zeros(65))
    first = model.generate(idx, 20, temperature=0)[0, 5:].tolist()
    with torch.no_grad():
        model.lm_head.bias[first[0]] = -math.inf
    assert first[0] not in model.generate(idx, 20, seed=3)[0, 5:].tolist()
    with torch.no_grad():
        model.lm_head.bias[first[0]] = math.nan
    with pytest.raises(RuntimeError, match="^row 0"):
        model.generate(idx, 20, seed=3)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("bad", [-1, 65, 2 ** 40])
def test_token_ids_outside_of_the_vocabulary_are_refused_before_the_first_step(bad, stream, use_cache):
    prompt = torch.tensor([3, bad, 7])
    expected = rf"token ids must lie in 0\.\.64 \(vocab_size 65\); these run from {min(bad, 3)} to {max(bad, 7)}"
    for idx in (prompt[None], [prompt[:1], prompt], [[3], prompt.tolist()]):
        with pytest.raises(IndexError, match=expected):
            sharpened().generate(idx, 3, stream=stream, use_cache=use_cache)


def test_numpys_integers_are_integers_and_a_top_k_of_zero_is_off():
    model, idx = sharpened(vocab_size=np.int64(65), n_layer=np.int32(2)), torch.stack(prompts_of(5))
    assert {type(getattr(model.config, name)) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")} == {int}
    for seed in (3, None):
        torch.manual_seed(1)
        expected = model.generate(idx, 9, seed=seed, num_samples=2)
        torch.manual_seed(1)
        given = dict(top_k=0, seed=None if seed is None else np.int64(seed), num_samples=np.uint8(2))
        assert torch.equal(model.generate(idx, np.int64(9), **given), expected)
    stop = expected[0, 8].item()
    assert torch.equal(model.generate(idx, 9, temperature=0, top_k=np.int64(3), stop=np.int64(stop))[0],
                       model.generate(idx, 9, temperature=0, top_k=3, stop=[stop])[0])
    for name, value in (("max_new_tokens", 2.5), ("num_samples", 2.5), ("top_k", 2.5)):
        with pytest.raises(ValueError, match=f"{name} is 2.5; it must be a whole number"):
            model.generate(idx, **{"max_new_tokens": 3, name: value})
    model.crop_block_size(np.int64(8))
    assert type(model.config.block_size) is int


def test_a_prompt_holds_integers():
    model = sharpened()
    for idx in ([[1.5, 2]], torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])):
        with pytest.raises(ValueError, match="the prompt of row 0 is a tensor of torch.(float32|bool); token ids are integers"):
            model.generate(idx, 3)
    expected = model.generate(torch.tensor([[1, 2]]), 3, temperature=0)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(model.generate(torch.tensor([[1, 2]], dtype=dtype), 3, temperature=0), expected)


class Wrapped(GPT):
    def forward(self, idx, targets=None, **more):
        return super().forward(idx % self.config.vocab_size, targets, **more)


def test_a_model_with_a_forward_of_its_own_says_which_ids_it_takes():
    model, idx = sharpened(), torch.tensor([[3, 7]])
    expected = model.generate(idx, 5, temperature=0)[0, 2:]
    model.__class__ = Wrapped
    assert torch.equal(model.generate(idx + 65, 5, temperature=0)[0, 2:], expected)


def test_with_seeds_a_rows_text_depends_on_its_own_seed_and_prompt_alone():
    model, prompts = sharpened(), prompts_of(3, 9, 24)
    together = model.generate(prompts, 30, seed=[5, 6, 7], top_p=0.9)
    for prompt, seed, row in zip(prompts, (5, 6, 7), together):
        alone = model.generate([prompt], 30, seed=[seed], top_p=0.9)[0]
        assert torch.equal(row, alone)                 # no tie of two sums is near enough at these seeds
    assert torch.equal(model.generate(prompts, 30, seed=5, top_p=0.9)[2], together[2])  # an int counts up
    assert not torch.equal(model.generate(prompts, 30, seed=6, top_p=0.9)[2], together[2])


def test_philox_takes_its_seeds_from_torchs_generator():
    model, idx = sharpened(), torch.stack(prompts_of(5, 5))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(idx, 20, rng="philox"))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0], model.generate(idx, 20, rng="philox", use_cache=False, seed=None) if torch.manual_seed(1) else None)


@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_top_p_of_zero_and_min_p_of_one_are_greedy(rng):
    model, idx = sharpened(), torch.stack(prompts_of(5, 5))
    greedy = model.generate(idx, 20, temperature=0)
    assert torch.equal(model.generate(idx, 20, top_p=0.0, rng=rng), greedy)
    assert torch.equal(model.generate(idx, 20, min_p=1.0, rng=rng), greedy)


@pytest.fixture
def replayed(monkeypatch):
    """Take the captured step's way on a CPU too: the same function, called instead of replayed."""
    init = generation.Session.__init__
    def graphs(self, *args):
        init(self, *args)
        self.steps_whole = True
    monkeypatch.setattr(generation.Session, "__init__", graphs)
    steps = []
    replay = generation.Session.replay
    monkeypatch.setattr(generation.Session, "replay", lambda self: (steps.append(1), replay(self)))
    return steps


@pytest.mark.parametrize("filters", [dict(temperature=0.0), dict(temperature=0.8, top_k=9), dict(top_p=0.9, min_p=0.01), {}], ids=str)
def test_the_captured_step_draws_what_single_steps_draw(replayed, filters):
    model, prompts = sharpened(), prompts_of(3, 9, 11)
    rows = model.generate(prompts, 30, seed=5, **filters)
    assert len(replayed) == 24 - 11                    # from the second token on, until the longest row leaves the window
    streamed = list(model.generate(prompts, 30, seed=5, stream=True, **filters))
    generation._idle.clear()
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        assert torch.equal(row, model.generate([prompt], 30, seed=5 + i, use_cache=False, **filters)[0])
        assert row[len(prompt):].tolist() == [step[i][0] for step in streamed]


def test_two_streams_of_captured_steps_take_turns(replayed):
    model, prompts = sharpened(), prompts_of(3, 8)
    alone = [model.generate(p[None], 12, seed=5)[0, len(p):].tolist() for p in prompts]
    a, b = (model.generate(p[None], 12, seed=5, stream=True) for p in prompts)
    together = [(next(a), next(a), next(b)) for _ in range(5)]
    assert [step[0][0] for pair in together for step in pair[:2]] == alone[0][:10]
    assert [pair[2][0][0] for pair in together] == alone[1][:5]


def test_a_model_is_freed_after_it_generated():
    import gc
    import weakref
    model = sharpened()
    model.generate(torch.stack(prompts_of(5)), 3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
