"""What the trainer does on a CPU: memory kept, bf16 chosen by CPU and width, clipping and the embedding's gradient as nanoGPT's."""
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from nanogpt_fast import devices
from nanogpt_fast.training import cpu, embedding, trainer as training

CPU = torch.device("cpu")

FAULTS = """
import resource, sys, torch
from nanogpt_fast.training import cpu
torch.set_num_threads(1)
pins = []
def step(count, numbers):
    for _ in range(count):
        block = torch.ones(numbers)
        if sys.argv[1] == "pinned":
            pins.append(bytearray(1 << 17))      # behind the block, so that it does not become the heap's end when it is freed
def faults(count=8, numbers=16 << 20):      # 64 MB: above every threshold that glibc has
    step(count, numbers)      # before 2.38 glibc takes an aligned block from a larger one alone: a few must have been freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(count, numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
start, before = held(), faults()
with cpu.keep_freed_memory() as why_not:
    if why_not is not None:
        sys.exit(77)
    inside, kept = faults(), held() - start
left = held() - start
print(before, inside, faults(2, 64 << 20), kept, left)      # 256 MB fits in no hole that the blocks before it can have left
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("heap", ("alone", "pinned"))
def test_memory_is_kept_inside_not_mapped_anew_and_given_back_at_the_end(heap):
    for attempt in range(3):    # a system short of memory may take pages away meanwhile; it does not do so three times
        done = subprocess.run([sys.executable, "-c", FAULTS, heap], capture_output=True, text=True)
        if done.returncode == 77:
            pytest.skip("malloc is not glibc's")
        before, inside, after, kept, left = map(int, done.stdout.split())
        right = inside <= before / 4 and after >= before / 2 and kept >= 64 << 20 and left <= 32 << 20
        if right:
            break
    assert right, f"faults {before}, inside {inside}, after {after}; bytes kept inside {kept}, left {left}"


def test_a_process_has_its_memory_back_after_a_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "_glibc", lambda: (SimpleNamespace(
        mallopt=lambda *call: calls.append(call) or 1, malloc_trim=lambda pad: calls.append("trim")), None))
    tiny.data(tmp_path)
    with pytest.raises(FileNotFoundError):     # whatever ends it
        training.train(tiny.options(tmp_path, dataset="no-such-data"))
    set_inside = dict(calls[:2])
    assert set_inside.keys() <= dict(calls[2:-1]).keys() and set_inside != dict(calls[2:-1]) and calls[-1] == "trim"


@pytest.mark.parametrize("amx, avx512, width, expected", [
    (True, True, 768, torch.bfloat16), (False, True, 128, torch.bfloat16), (True, True, 127, torch.float32),
    (False, False, 768, torch.float32), (True, True, 0, torch.float32)])
def test_auto_takes_bf16_where_the_cpu_has_it_and_the_model_is_wide(monkeypatch, amx, avx512, width, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert devices.choose_dtype("auto", CPU, width) == expected
    assert devices.choose_dtype("float32", CPU, width) == torch.float32 and devices.choose_dtype("bfloat16", CPU, width) == torch.bfloat16


def test_the_banner_says_what_was_chosen_and_why(tmp_path, capsys, monkeypatch):
    tiny.data(tmp_path)
    training.train(tiny.options(tmp_path, max_iters=1, dtype="auto"))
    assert "float32 (auto: " in (printed := capsys.readouterr().out) and "memory  " in printed
    monkeypatch.setattr(cpu, "_glibc", lambda: pytest.fail("malloc=off"))
    training.train(tiny.options(tmp_path, max_iters=1, malloc="off"))
    assert "memory  malloc's defaults: malloc=off" in capsys.readouterr().out


@pytest.mark.parametrize("scale", (1e-3, 0.2, 1.0, 1e3, float("inf"), float("nan")))
def test_clipping_is_pytorchs_bit_for_bit(scale):
    torch.manual_seed(0)  # 0.2: a norm a little above 1
    parameters = [[torch.nn.Parameter(torch.zeros(5, 7)), torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))] for _ in range(2)]
    for ours, theirs in zip(*[side[:2] for side in parameters]):
        ours.grad = torch.randn_like(ours) * scale
        theirs.grad = ours.grad.clone()
    norms = cpu.clip_grad_norm(parameters[0], 1.0), torch.nn.utils.clip_grad_norm_(parameters[1], 1.0)
    torch.testing.assert_close(*norms, rtol=0, atol=0, equal_nan=True)
    for ours, theirs in zip(*[side[:2] for side in parameters]):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, equal_nan=True)


def test_clipping_that_need_not_be_pytorchs_to_the_bit_is_right_too():
    gradients = [torch.randn(700, 900), torch.randn(3, 5).t(), 1e-3 * torch.randn(50)]
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert abs(cpu.clip_grad_norm(parameters, 1.0, exact=False) - exact) < 1e-6 * exact
    assert torch.cat([p.grad.flatten() for p in parameters]).norm() == pytest.approx(1.0, abs=1e-5)
    assert cpu.clip_grad_norm([torch.nn.Parameter(torch.zeros(2))], 1.0, exact=False) == 0


def test_gradients_within_the_norm_are_not_touched():
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 0.25)
    version = p.grad._version
    cpu.clip_grad_norm([p], 1.0)
    assert p.grad._version == version


def test_a_run_on_the_cpus_own_ops_lies_on_the_reference_path(tmp_path):
    tiny.data(tmp_path)
    curves = []
    for backend in ("auto", "reference"):
        o = tiny.options(tmp_path, backend, backend=backend, max_iters=20, gradient_accumulation_steps=2)
        training.train(o)
        curves.append(list(tiny.losses(o).values()))
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)           # fp32 sums in another order, 20 AdamW steps


def test_between_its_steps_a_run_generates_with_the_cache(tmp_path, monkeypatch):
    tiny.data(tmp_path)
    reasons, by_row = [], []
    def sample_text(model, *rest):
        reasons.append(model.eval().why_not_cached())
        model.train()

    monkeypatch.setattr(training, "sample_text", sample_text)
    inside = embedding.gradient_by_row
    monkeypatch.setattr(embedding, "gradient_by_row", lambda model, wanted: by_row.append(wanted) or inside(model, wanted))
    training.train(tiny.options(tmp_path, max_iters=2, eval_interval=1))
    assert reasons == [None] * 3 and by_row == [True] * 2
