"""The embeddings by the kernel (kernels/embedding.py): PyTorch's bits forward, and rows added to a gradient exactly, whatever repeats."""
import contextlib
import copy

import gpts
import harness
import pytest
import torch
from harness import assert_close_to_oracle, assert_grid_order_is_free, planted_fault, with_nan_margins
from hypothesis import given, settings, strategies as st

from nanogpt_fast.kernels import embedding as kernels
from nanogpt_fast.training import embedding
from nanogpt_fast.training.step import TrainingStep

PIECE, CHUNK = kernels.PIECE, kernels.CHUNK
LOSS_ALONE = "reference,cross_entropy=fused"      # quicker than every op in the interpreter
HALVES = (torch.float16, torch.bfloat16)


def whole_numbers(*shape, dtype=torch.float32):
    """Small whole numbers: their sums are exact in fp32 in any order."""
    return torch.randint(-8, 9, shape).to(dtype)


def checked(index, V, C, dtype=torch.float32, device=harness.DEVICE):
    """`add_rows` gives the exact sums, reads and writes nothing around its tensors, and leaves the other rows as they were."""
    dx, gradient = whole_numbers(*index.shape, C, dtype=dtype).to(device), whole_numbers(V, C).to(device)
    there = (index >= 0) & (index < V)
    expected = gradient.cpu().index_add(0, index[there], dx.cpu()[there].float())
    index, dx, gradient = (with_nan_margins(tensor.to(device)) for tensor in (index, dx, gradient))
    with harness.guarded_outputs(all_written=False):
        kernels.add_rows(gradient, index, dx)
    assert torch.equal(gradient.cpu(), expected)


def runs(*lengths):
    """Token i `lengths[i]` times, all shuffled."""
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return index[torch.randperm(len(index))]


RUNS = dict(
    one=(1, ), a_piece=(PIECE, ), a_piece_and_one=(PIECE + 1, ), two_pieces=(2 * PIECE, ), all_alone=(1, ) * (2 * PIECE + 3),
    from_border_to_border=(PIECE, PIECE, 5), over_one_border=(PIECE - 1, 2, PIECE - 1), over_two=(PIECE - 1, PIECE + 2, 3),
    ends_at_one=(7, 2 * PIECE - 7, 4), begins_at_one=(PIECE, 3 * PIECE, 0, 1), long_then_long=(5 * PIECE + 3, 4 * PIECE, 9),
    as_many_partials_as_a_chunk=(1, PIECE * (CHUNK + 1) - 1, 3), one_more=(1, PIECE * (CHUNK + 2), 3), three_chunks=(3, PIECE * 3 * CHUNK, 2))


@pytest.mark.parametrize("lengths", RUNS.values(), ids=RUNS)
def test_runs_of_any_length_are_summed_exactly(lengths):
    checked(runs(*lengths), len(lengths), 5)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("C", (1, 16, 255, 256, 257, 768))
def test_any_width_and_dtype(C, dtype):
    checked(torch.randint(40, (3, 50)), 40, C, dtype)


@settings(max_examples=harness.examples(60, 60), deadline=None)
@given(N=st.integers(0, 6 * PIECE), V=st.integers(1, 90), C=st.integers(1, 40), dtype=st.sampled_from((torch.float32, *HALVES)),
       common=st.floats(0, 1))
def test_any_shape_and_mixture(N, V, C, dtype, common):
    index = torch.randint(V, (N, ))
    index[torch.rand(N) < common] = V // 2
    checked(index, V, C, dtype)


def test_tokens_outside_of_the_vocabulary_are_left_out():
    index = torch.randint(9, (3 * PIECE, ))
    index[::3] = torch.tensor([-1, 9, 2**40, -2**40]).repeat(3 * PIECE)[:PIECE]
    checked(index, 9, 20)
    checked(torch.full((2 * PIECE + 1, ), -1), 9, 20)
    checked(torch.full((2 * PIECE + 1, ), 9), 9, 20)


def test_sums_are_as_near_to_fp64_as_pytorchs():
    index, dx, gradient = runs(1, 4, 5 * PIECE, 20 * PIECE, 40).to(harness.DEVICE), torch.randn(25 * PIECE + 45, 70), torch.randn(6, 70)
    dx, gradient = dx.to(harness.DEVICE), gradient.to(harness.DEVICE)
    oracle, plain = gradient.double().index_add(0, index, dx.double()), gradient.index_add(0, index, dx)
    kernels.add_rows(gradient, index, dx)
    assert_close_to_oracle(gradient, oracle, plain, "gradient")


def test_the_order_of_programs_changes_no_bit():
    index, dx, before = runs(3, 4 * PIECE, 30, 5, 2 * PIECE).to(harness.DEVICE), torch.randn(6 * PIECE + 38, 300), torch.randn(5, 300)
    dx, before = dx.to(harness.DEVICE), before.to(harness.DEVICE)

    def run():
        gradient = before.clone()
        kernels.add_rows(gradient, index, dx)
        return gradient
    assert_grid_order_is_free(run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_with_its_token(value):
    index = runs(PIECE, 2 * PIECE, PIECE + 5, 3 * PIECE)
    dx, gradient = torch.ones(len(index), 33), torch.zeros(4, 33)
    dx[(index == 1).nonzero()[3]] = value
    index, dx, gradient = (tensor.to(harness.DEVICE) for tensor in (index, dx, gradient))
    kernels.add_rows(gradient, index, dx)
    assert gradient[[0, 2, 3]].isfinite().all() and not gradient[1].isfinite().any()


@pytest.mark.skipif(not harness.INTERPRETED, reason="the interpreter alone gives the addresses")
def test_rows_beyond_two_billion_elements_are_where_they_belong():
    C, N = 768, 2**24
    x, index = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with harness.addresses_of_one_program((N - 1, ), (N, )) as seen:
        kernels._embed_kernel[(1, )](x, index, x, x, 1024, 2**22, C, 0, BLOCK=1024)
    kind, addresses = seen[-1]
    assert kind == "store" and int(addresses.min()) == x.data_ptr() + 4 * (N - 1) * C and len(addresses) == C


# --------------------------------------------------------------------------------------------------------------- forward

@pytest.mark.parametrize("B, T, V, C, start", [(1, 1, 1, 1, 0), (2, 5, 9, 33, 0), (3, 4, 65, 384, 2), (1, 8, 50, 1024, 0)])
def test_embeddings_are_pytorchs_bit_for_bit(B, T, V, C, start, device):
    index, wte, wpe = torch.randint(V, (B, T)), torch.randn(V, C), torch.randn(start + T, C)
    expected = wte[index] + wpe[start:]
    index, wte, wpe = (with_nan_margins(tensor.to(device)) for tensor in (index, wte, wpe))
    with harness.guarded_outputs():
        x = kernels.embed(index, wte, wpe, start)
    assert torch.equal(x.cpu(), expected)
    assert kernels.embed(index[:0], wte, wpe, start).shape == (0, T, C)


def test_a_token_that_is_none_makes_its_row_nan(device):
    index = torch.tensor([[0, -1, 4], [5, 2, 2**40]], device=device)
    x = kernels.embed(index, torch.zeros(5, 8, device=device), torch.zeros(3, 8, device=device))
    assert torch.equal(x.isnan().all(-1), ((index < 0) | (index > 4))) and not x[index == 4].isnan().any()


# ---------------------------------------------------------------------------------------------------- faults are noticed

@pytest.mark.parametrize("fault", [("token == before", "token != before"), ("last != before", "last == before"),
                                   ("if last == token", "if last != token"),
                                   ("\\) \\* 2 \\+ 1\\) \\* C", ") * 2) * C"), ("while more == CHUNK", "while more > CHUNK"),
                                   ("later \\* PIECE < N, other=-2\\) == token", "later * PIECE < N, other=-2) >= 0"),
                                   ("first \\+ PIECE - 1\\)     #", "first)     #"),
                                   ("            run = tl.zeros\\(\\[BLOCK\\], tl.float32\\)\n        token", "        token"),
                                   ("inside, other=0.0\\) \\+ run", "inside, other=0.0)")], ids=lambda fault: fault[0])
def test_a_fault_in_the_sums_is_noticed(fault):
    with planted_fault(kernels, *fault):
        with pytest.raises((AssertionError, IndexError)):
            for lengths in RUNS.values():
                checked(runs(*lengths), len(lengths), 5)


@pytest.mark.parametrize("fault", [("start \\+ row % T", "row % T"), ("start \\+ row % T", "start + row"), ("word \\+ place", "word"),
                                   ("\\(token < V\\)\n", "(token <= V)\n")], ids=lambda fault: fault[1])
def test_a_fault_in_the_forward_is_noticed(fault, device):
    with planted_fault(kernels, *fault):
        with pytest.raises(AssertionError):
            test_embeddings_are_pytorchs_bit_for_bit(3, 4, 65, 384, 2, device)
            test_a_token_that_is_none_makes_its_row_nan(device)


# ----------------------------------------------------------------------------------------------- in the training step

@pytest.mark.parametrize("dropout", (0.0, 0.2))
def test_its_gradients_are_the_dense_ones(dropout, device):
    found = []
    model = gpts.small(backend=LOSS_ALONE, dropout=dropout).to(device)
    tokens = torch.randint(7, (2, 3, 20), device=device)        # a word repeats, and not all positions are there
    for wanted in (True, False):
        with embedding.gradient_by_row(model, wanted) as by_row:
            assert by_row == wanted
            for seed in range(2):
                torch.manual_seed(seed)
                model(*tokens, return_logits=False)[1].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    for name, dense in found[1].items():
        torch.testing.assert_close(found[0][name], dense, msg=name)
    assert found[0]["transformer.wpe.weight"].abs().sum(1).gt(0).tolist() == [True] * 20 + [False] * 4


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_a_gradient_that_the_kernel_cannot_add_to_gets_a_dense_one(device):
    found = []
    for contiguous in (True, False):
        model = gpts.small(backend=LOSS_ALONE).to(device)
        weight = model.transformer.wte.weight
        weight.grad = torch.zeros_like(weight) if contiguous else torch.zeros_like(weight.t().contiguous()).t()
        with embedding.gradient_by_row(model):
            model(*torch.arange(40, device=device).view(2, 2, 10) % 7, return_logits=False)[1].backward()
        assert weight.grad.is_contiguous() == contiguous
        found.append(weight.grad)
    torch.testing.assert_close(*found)


def test_a_captured_step_trains_as_an_ordinary_one(device, monkeypatch):
    found, added, original = [], [], kernels.add_rows
    monkeypatch.setattr(kernels, "add_rows", lambda *args: added.append(args[1].shape) or original(*args))
    for not_captured in (None, "for comparison"):
        model = gpts.small(backend=LOSS_ALONE, n_layer=1).to(device)
        with contextlib.redirect_stdout(None):
            optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), device.type)
        step = TrainingStep(model, optimizer, dtype=torch.bfloat16, batch_shape=(2, 16), not_captured=not_captured, accumulation=2)
        step._on_cpu = False        # where a step that is not captured ends in another way
        if not_captured is None and device.type == "cpu":
            step.graphs.recorder = gpts.Recorder()
        tokens = torch.arange(32, device=device).view(2, 16)
        losses = [step(lambda: (tokens, tokens)).item() for _ in range(5)]
        found.append((losses, *copy.deepcopy(list(model.parameters()))))
        assert losses[-1] < losses[0]
    assert added and set(added) == {(32, )}
    (losses, *weights), (expected, *others) = found
    assert losses == expected and all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
