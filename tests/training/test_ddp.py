"""torchrun with two processes on a CPU: gradients are those of both ranks' batches, weights stay equal, a stop is agreed on."""
import dataclasses
import subprocess
import sys
import textwrap

import pytest
import tiny
import torch

from nanogpt_fast import GPT, GPTConfig
from nanogpt_fast.devices import Ranks
from nanogpt_fast.text.batches import Batches
from nanogpt_fast.training import trainer as training
from nanogpt_fast.training.muon import muon_and_adamw
from nanogpt_fast.training.trainer import learning_rate

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")

EACH_RANK = textwrap.dedent("""
    import os, signal, sys, torch
    from nanogpt_fast import options
    from nanogpt_fast.training import progress, trainer as training
    stop_at, out, *words = sys.argv[1:]
    if os.environ["RANK"] == "1":             # the rank that prints nothing is told to stop: all must hear of it
        real = training.learning_rate
        def learning_rate(it, o):
            if it == int(stop_at):
                os.kill(os.getpid(), signal.SIGTERM)
            return real(it, o)
        training.learning_rate = learning_rate
    result = training.train(options.parse(training.TrainOptions, words, "train"))
    torch.save(result.model.state_dict(), f"{out}-{os.environ['RANK']}.pt")
    """)


def torchrun(folder, name, o, stop_at=-1):
    (folder / "each_rank.py").write_text(EACH_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(folder / "each_rank.py"), str(stop_at), str(folder / name), *tiny.words(o)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    weights = [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]
    for key in weights[0]:
        assert torch.equal(weights[0][key], weights[1][key])
    return done.stdout, weights[0]


def two_ranks_in_one_process(o, steps):
    """{step: loss} of the optimizer on the mean gradient over the batches that two ranks draw from their own seeds."""
    windows, models = [], []
    for rank in (0, 1):
        torch.manual_seed(1337 + rank)
        models.append(GPT(GPTConfig(block_size=o.block_size, vocab_size=tiny_vocab(o), n_layer=o.n_layer, n_head=o.n_head,
                                    n_embd=o.n_embd, bias=o.bias), backend="reference"))
        source = Batches(f"{o.data_dir}/{o.dataset}", "train", o.batch_size, o.block_size)
        windows.append([source.next() for _ in range(steps)])
        source.close()
    model = models[0]  # DDP gives every rank the first one's weights
    optimizer = muon_and_adamw(model, o, "cpu") if o.optimizer == "muon" else model.configure_optimizers(
        o.weight_decay, o.learning_rate, (o.beta1, o.beta2), "cpu")
    losses = {}
    for it in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(it, o) * group.get("lr_share", 1)
        loss = sum(model(*of_rank[it])[1] for of_rank in windows) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses[it] = loss.item()
    return losses


def tiny_vocab(o):
    from nanogpt_fast.text import prepare
    return prepare.load_tokenizer(f"{o.data_dir}/{o.dataset}").vocab_size


# The mean of two gradients rounds otherwise than their sum. Muon rounds what it makes of them to bfloat16, and a tie may fall either way.
@pytest.mark.parametrize("optimizer, tolerance", [("adamw", 1e-4), pytest.param("muon", 5e-4, marks=pytest.mark.slow)])
def test_two_ranks_take_the_steps_of_one_process_with_both_batches(optimizer, tolerance, tmp_path):
    tiny.data(tmp_path)
    o = tiny.options(tmp_path, backend="gloo,reference", gradient_accumulation_steps=2, max_iters=14, eval_interval=5, optimizer=optimizer)
    printed, _ = torchrun(tmp_path, "weights", o)
    assert printed.count("number of parameters") == 1 and printed.count("step 14: train loss") == 1  # one rank speaks
    expected = two_ranks_in_one_process(o, 14)
    assert list(tiny.losses(o)) == list(expected)
    for it, loss in tiny.losses(o).items():
        assert loss == pytest.approx(expected[it], abs=tolerance)


@pytest.mark.slow
def test_the_first_rank_alone_is_profiled_and_the_steps_stay_the_same(tmp_path):
    tiny.data(tmp_path)
    o = tiny.options(tmp_path, "plain", backend="gloo,reference", gradient_accumulation_steps=2, max_iters=14, eval_interval=14)
    torchrun(tmp_path, "plain", o)
    profiled = dataclasses.replace(o, out_dir=str(tmp_path / "profiled"), profile=2)
    printed, _ = torchrun(tmp_path, "profiled", profiled)
    assert tiny.losses(profiled) == tiny.losses(o)
    assert printed.count("host, by op") == 1 and (tmp_path / "profiled/trace.json.gz").is_file()


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_resumed_run_is_exact(tmp_path):
    tiny.data(tmp_path)
    o = tiny.options(tmp_path, "straight", backend="gloo,reference", gradient_accumulation_steps=2, max_iters=14, dropout=0.1)
    _, straight = torchrun(tmp_path, "straight", o)
    broken = dataclasses.replace(o, out_dir=str(tmp_path / "broken"))
    torchrun(tmp_path, "stopped", broken, stop_at=7)
    assert max(tiny.losses(broken)) == 7
    _, resumed = torchrun(tmp_path, "resumed", dataclasses.replace(broken, init_from="resume"))
    assert tiny.losses(broken) == tiny.losses(o)
    for key, tensor in straight.items():
        assert torch.equal(tensor, resumed[key])


@pytest.mark.slow
def test_two_ranks_in_bfloat16_lie_on_the_steps_of_one_process_in_float32(tmp_path):
    """Copies of the weights are made of what DDP sent, not of each rank's own first weights."""
    tiny.data(tmp_path)
    o = tiny.options(tmp_path, backend="gloo,reference", gradient_accumulation_steps=2, max_iters=14, dtype="bfloat16")
    printed, _ = torchrun(tmp_path, "weights", o)
    assert "casts   9 matrices to bfloat16 once a step" in printed
    for (it, loss), expected in zip(tiny.losses(o).items(), two_ranks_in_one_process(o, 14).values(), strict=True):
        assert loss == pytest.approx(expected, abs=3e-2), it


def test_gradient_accumulation_that_the_ranks_cannot_share_is_refused(tmp_path):
    with pytest.raises(ValueError, match="multiple of 2"):
        training._train(tiny.options(tmp_path, gradient_accumulation_steps=3), Ranks(0, 0, 2), torch.device("cpu"), None, malloc=None)
