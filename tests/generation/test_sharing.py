"""Several calls of `generate` on one model at once, and a model that changes while a stream is read: nothing is shared, nothing stale."""
import functools
import threading
from concurrent import futures

import pytest
import torch
import torch.nn as nn
from gpts import prompts_of, same_tokens, sharpened

from nanogpt_fast import generation


def in_threads(count, work):
    """work(0), ..., work(count - 1), each in a thread of its own, started together; the first error is raised here."""
    with futures.ThreadPoolExecutor(count) as pool:
        together = threading.Barrier(count)
        return [future.result() for future in [pool.submit(lambda i: (together.wait(), work(i))[1], i) for i in range(count)]]


def seeded_calls(backend, count):
    """A model, and functions that generate with a seed: one to three rows, every second one a stream."""
    model = sharpened(backend=backend)

    def call(i):
        idx = torch.stack(prompts_of(*[3 + i % 7] * (1 + i % 3), seed=i))
        if i % 2 == 0:
            return model.generate(idx, 12, seed=i, top_k=9)[:, idx.size(1):].tolist()
        steps = list(model.generate(idx, 12, seed=i, top_k=9, stream=True))
        return [[step[row][0] for step in steps] for row in range(len(idx))]
    return [functools.partial(call, i) for i in range(count)]


@pytest.mark.parametrize("backend, count", [
    ("auto", 48), ("reference", 16), pytest.param("auto", 1000, marks=pytest.mark.slow), pytest.param("reference", 1000, marks=pytest.mark.slow)])
def test_threads_that_generate_from_one_model_get_the_texts_of_lone_calls(backend, count):
    calls = seeded_calls(backend, count)
    alone = [call() for call in calls]
    found = in_threads(8, lambda thread: [call() for call in calls[thread::8]])
    assert all(found[thread] == alone[thread::8] for thread in range(8))


def test_a_session_is_used_again_and_no_more_are_kept_than_were_in_use():
    model, idx = sharpened(), torch.stack(prompts_of(5))
    model.generate(idx, 3)
    first, = generation._idle[model]
    model.generate(idx, 3)
    assert generation._idle[model] == [first]
    streams = [model.generate(idx, 3, stream=True) for _ in range(3)]
    for stream in streams:
        next(stream)
    assert generation._idle[model] == []
    for stream in streams:
        stream.close()                                         # a reader may stop before the end
    assert len(generation._idle[model]) == 3
    model.generate(torch.stack(prompts_of(5, 5)), 3)           # of another shape: the others are dropped
    kept, = generation._idle[model]
    assert kept.rows == 2 and kept.watch is None


@pytest.mark.parametrize("change", ["data", "transposed", "assign", "half", "load", "train", "crop", "module"])
def test_a_stream_goes_on_with_the_weights_that_the_model_has_now(change):
    """The decoder reads weights by address: what a change frees is filled with other numbers here, so that reading it would show."""
    model, idx = sharpened(), torch.stack(prompts_of(5))
    other = {name: tensor.clone() for name, tensor in sharpened(seed=8).state_dict().items()}
    stream = model.generate(idx, 19, stream=True, temperature=0)
    tokens = [next(stream)[0][0] for _ in range(5)]
    if change == "data":
        for name, p in model.named_parameters():
            p.data = other[name].clone()
    elif change == "transposed":
        for block in model.transformer.h:
            block.attn.c_proj.weight.data = block.attn.c_proj.weight.data.t()
    elif change == "assign":
        model.load_state_dict(other, assign=True)
    elif change == "load":
        model.load_state_dict(other)
    elif change == "half":
        model.bfloat16()
    elif change == "train":
        optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
        model(idx, idx.roll(1, 1))[1].backward()
        optimizer.step()
    elif change == "crop":
        model.crop_block_size(8)
    else:
        model.transformer.h[0].mlp.c_fc = nn.Linear(32, 128)
    rubbish = [torch.full_like(p, 3.0) for p in model.parameters() for _ in range(3)]
    tokens += [step[0][0] for step in stream]
    whole = torch.cat((idx, torch.tensor([tokens])), 1)
    del rubbish
    instead = model.generate(idx, 5, temperature=0, use_cache=False)
    expected = model.generate(whole[:, :10], 14, temperature=0, use_cache=False)
    assert same_tokens(model, whole[0], expected[0], 10)
    if change not in ("half", "crop"):
        assert not torch.equal(instead, whole[:, :10])         # the change shows


def test_a_stream_of_a_model_that_moved_to_another_device_ends_and_says_so():
    for use_cache in (True, False):
        model = sharpened()
        stream = model.generate(torch.stack(prompts_of(5)), 9, stream=True, use_cache=use_cache)
        next(stream)
        model.to("meta")
        with pytest.raises(RuntimeError, match="the model was moved from cpu to meta while it generated; call generate again"):
            next(stream)


def test_a_stream_computes_in_the_dtype_of_its_call_wherever_it_is_read():
    model, idx = sharpened(), torch.stack(prompts_of(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream = model.generate(idx, 3, stream=True)
    assert len(list(stream)) == 3
    assert generation._idle[model].pop().dtype == torch.bfloat16


@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_a_private_generator_gives_the_text_of_the_global_one_with_its_seed(rng):
    model, idx = sharpened(), torch.stack(prompts_of(5, 5))
    torch.manual_seed(3)
    expected = model.generate(idx, 20, top_k=9, rng=rng)
    before = torch.get_rng_state()
    assert torch.equal(model.generate(idx, 20, top_k=9, rng=rng, generator=torch.Generator().manual_seed(3)), expected)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="seed and generator are both given"):
        model.generate(idx, 3, seed=1, generator=torch.Generator())


CALLS = {
    "loss and logits": lambda model, idx: model(idx, idx),
    "loss": lambda model, idx: model(idx, idx, return_logits=False),
    "logits": lambda model, idx: model(idx),
    "generate": lambda model, idx: model.generate(idx, 4, seed=1),
    "generate without the cache": lambda model, idx: model.generate(idx, 4, seed=1, use_cache=False),
    "stream": lambda model, idx: list(model.generate(idx, 4, seed=1, stream=True)),
}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("call", CALLS)
def test_a_first_call_in_any_mode_leaves_nothing_that_training_meets(call, mode, amp):
    """In one autocast region, whose cache of casts is one of the things that a call could leave something in."""
    idx = torch.stack(prompts_of(5, 5))

    def gradients(before):
        model = sharpened()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            with mode():
                before(model, idx)
            model(idx, idx)[1].backward()
            before(model, idx)      # what the first call kept serves this one
        return [parameter.grad for parameter in model.parameters()]
    found, expected = gradients(CALLS[call]), gradients(lambda *_: None)
    assert all(map(torch.equal, found, expected))
