"""The benchmarks' machinery: the list of cases, the README's tables, the command for a GPU machine."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks import overhead, report, report_gpu, report_plots, run  # noqa: E402
from nanogpt_fast.bench import cases  # noqa: E402

CPU = torch.device("cpu")
QUICK = cases.cases("cpu", quick=True)


# ---------------------------------------------------------------------------------------------------------------- the cases

@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_cases_have_their_own_names_and_count_what_they_move(device):
    listed = cases.cases(device)
    assert len({case.name for case in listed}) == len(listed)
    for case in listed:
        assert case.bytes > 0 and case.flops >= 0 and {"ours", "eager"} <= case.implementations.keys(), case.name
        assert not case.sweep or case.sweep in case.shape, case.name
    assert {case.op for case in listed} == {case.op for case in QUICK} and len(QUICK) == 7
    assert {case.direction for case in listed} == {"forward", "both"}


def test_a_gpus_cases_begin_with_a_training_step_and_reach_the_sweeps():
    listed = cases.cases("cuda")
    first = {(case.op, str(case.shape), case.direction) for case in listed[:8]}
    assert first == {(op, str(shape), direction) for op, shape in report.GPU_KERNELS for direction in ("forward", "both")}
    assert {case.shape["T"] for case in listed if case.op == "attention"} >= {256, 512, 1024, 2048, 4096, 8192, 16384}
    everything = {name for case in listed for name in case.implementations}
    ours = {"ours", "our kernel", "ours epilogue", "ours pointwise", "ours with logits"}
    assert everything >= set(report.PEERS) - {"F.linear_cross_entropy"} | ours  # newer PyTorches have that one
    for op, shape in report.GPU_STEPS:
        assert any((case.op, case.shape) == (op, shape) for case in listed)


def test_bytes_and_flops_are_those_of_the_textbook():
    attention = cases.attention_case(2, 8, 3, 4, torch.bfloat16, "forward")
    assert attention.flops == 4 * 2 * 3 * 8 * 8 * 4 / 2 and attention.bytes == 2 * 8 * 4 * 12 * 2      # q, k, v in, y out
    assert cases.attention_case(2, 8, 3, 4, torch.bfloat16, "both").flops == 3.5 * attention.flops     # 2 matmuls, then 5
    mlp = cases.mlp_case(10, 8, torch.float32, "forward")
    assert mlp.flops == 2 * 10 * 2 * 8 * 32 and mlp.bound == "copy"
    assert cases.mlp_case(32768, 768, torch.bfloat16, "both").bound == "matmul"
    assert cases.layer_norm_case(10, 8, torch.bfloat16, "forward").bytes == 10 * 8 * (4 + 2 + 4 + 2)


@pytest.mark.parametrize("case", [case for case in QUICK if case.op != "sampler"], ids=lambda case: case.op)
def test_ours_and_eager_compute_the_same(case):
    torch.manual_seed(0)
    runs, absent = case.runs(CPU, ["ours", "eager"], sets=1)
    assert not absent
    results = (runs["ours"](), runs["eager"]())
    first, second = (result if isinstance(result, tuple) else (result,) for result in results)
    assert len(first) == len(second) > 0
    for ours, eager in zip(first, second):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-5)


def test_inputs_rotate():
    case, seen = cases.layer_norm_case(4, 8, torch.float32, "forward"), []
    case.implementations = {"ours": lambda t: seen.append(t["x"].data_ptr())}
    runs, _ = case.runs(CPU)
    for _ in range(5):
        runs["ours"]()
    assert len(set(seen)) == 3 and seen[:3] == seen[3:]


def test_a_peer_that_is_not_here_has_its_reason_and_the_rest_is_timed(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    run.main(["--device=cpu", "--quick", "--rounds=3", "--only=LayerNorm,sampler", "--implementations=ours,eager,quack",
              f"--json={path}"])
    norm, sampler = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(norm["samples"]["ours"]) == len(norm["samples"]["eager"]) == 5
    assert norm["absent"]["quack"] == "ModuleNotFoundError: No module named 'quack'"
    assert sampler["op"] == "sampler" and set(sampler["samples"]) == {"ours", "eager"}
    assert norm["limits"] is None and norm["bytes"] > 0        # so little is no measurement, and made-up limits are none
    out = capsys.readouterr().out
    assert "not here: ModuleNotFoundError" in out and "TFLOP/s" not in out and "%" in out


def test_no_case_is_begun_when_the_minutes_are_over(tmp_path, capsys):
    run.main(["--device=cpu", "--quick", "--minutes=0", "--only=LayerNorm", f"--json={tmp_path / 'r'}"])
    assert "out of time: 1 of 1 cases were not started" in capsys.readouterr().out


@pytest.mark.parametrize("op", overhead.ENTRIES)
def test_the_host_runs_an_op_to_its_stubbed_launches_and_back(op, monkeypatch):
    """The op launches what the bare Function launches: as many kernels, with as many arguments. Times are the benchmark's matter."""
    pytest.importorskip("triton")
    entry, launched = overhead.ENTRIES[op](), {}
    for call in (entry.bare, entry.op):
        seen = launched[call] = []
        note = lambda *args, _seen=seen, **constants: _seen.append(len(args) + len(constants))
        monkeypatch.setattr(overhead.NoLaunch, "__getitem__", lambda self, grid, _note=note: _note)
        measured = overhead.ratios(overhead.Entry(call, call, entry.without_launches, entry.inputs), repeats=1, calls=1)
        assert all(bare > 0 for bare, _, _ in measured.values())
    assert launched[entry.bare] == launched[entry.op] and len(launched[entry.op]) == 4     # forward; forward and two backward


@pytest.mark.slow  # timing: alone on the machine, or the figures of others are in it
@pytest.mark.parametrize("op", overhead.ENTRIES)
def test_a_call_costs_the_host_at_most_one_and_a_half_bare_functions(op):
    pytest.importorskip("triton")
    rounds = [overhead.ratios(overhead.ENTRIES[op](), repeats=200) for _ in range(3)]     # others only ever add
    for what in rounds[0]:
        assert min(row[what][2] for row in rounds) <= overhead.LIMIT, (what, rounds)


@pytest.mark.slow
def test_the_pytest_benchmark_files_read_as_a_comparison():
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}  # else nothing is timed
    done = subprocess.run([sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider",
                           "-k", "LayerNorm and (ours or eager)", "--benchmark-group-by=group"], cwd=ROOT,
                          env={**alone, "NANOGPT_FAST_QUICK": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "add + LayerNorm both float32 rows=8 C=32" in done.stdout and "eager" in done.stdout


# --------------------------------------------------------------------------------------------------------------- the report

ENVIRONMENT = dict(time="2026-01-01T00:00:00+00:00", torch="2.11.0", triton="3.6.0", gpu="NVIDIA H200", driver="580",
                   cuda="13.0", cpu="a CPU", cores=2, threads=2, commit="abc", load=0.1)


def kernel_record(**changed):
    op, shape = report.GPU_KERNELS[1]
    return {"benchmark": "kernel", "device": "cuda", "op": op, "shape": shape, "sweep": "C", "direction": "forward",
            "dtype": "bfloat16", "bytes": 300e6, "flops": 0, "bound": "copy", "limits": {"copy": 4e12, "matmul": 7e14},
            "absent": {"quack": "no"},
            "samples": {"ours": [100e-6] * 3, "eager": [300e-6] * 3, "compile": [150e-6] * 3, "Liger": [140e-6] * 3},
            "environment": ENVIRONMENT, **changed}


def train_record(tokens_per_s, **environment):
    row = dict(samples=[0.1, 0.1, 0.1], first_step_s=30.0, peak_memory=2**30, mfu=0.4, ops={})
    return {"benchmark": "train", "device": "cuda", "options": {"model": "gpt2"}, "against": "nanoGPT checkout",
            "dtype": "bfloat16", "shape": {"batch_size": 32, "block_size": 1024}, "environment": {**ENVIRONMENT, **environment},
            "variants": {"nanoGPT compiled": {**row, "tokens_per_s": tokens_per_s},
                         "one import": {**row, "tokens_per_s": 1.5 * tokens_per_s}, "nanoGPT": {"error": "out of memory"}}}


@pytest.mark.parametrize("document", report.DOCUMENTS)
def test_a_documents_tables_are_what_the_report_prints(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    found = report.DOCUMENTS[document](report.read())
    assert report.fill(text, found) == text, "run: python -m benchmarks.report --write"


def test_what_was_not_measured_says_so():
    for name, text in (report.front_page([]) | report.measured([]) | report_gpu.sections([])).items():
        if name not in ("doctor", "verify", "compile gate", "ladder", "sample", "predicted"):  # files of their own, not records
            assert report.MISSING in text, name
    assert report.train([train_record(1000)], "cuda", "gpt2", "GPT-2").count(report.MISSING) == 3  # of the six variants


def test_a_prediction_stands_beside_the_first_run_and_no_figure_where_there_is_none(tmp_path, monkeypatch):
    assert "| 1.08 |  | times |" in report_gpu.predicted([])
    def run(ms, time):
        samples = {"nanoGPT compiled": [0.2], "our trainer": [ms / 1e3]}
        return train_record(1000, time=time) | {"device": "cuda", "shape": {"batch_size": 64, "block_size": 1024}, "options": {"model": "gpt2"},
                                                "variants": {name: {"samples": row} for name, row in samples.items()}}
    text = report_gpu.predicted([run(160, "2026-01-01"), run(100, "2026-02-01")])
    assert "| train gpt2 64x1024, our trainer over nanoGPT compiled | 1.08 | 1.25 | times |" in text


def test_a_steps_kernels_are_told_apart_by_what_they_do():
    space = "void ngf::(anonymous namespace)::"
    assert [report_gpu.kind_of(name) for name in ("backward_dq_kernel", "forward_kernel", f"{space}dkdv_kernel<__nv_bfloat16>(CUtensorMap_st)",
                                                  f"{space}dq_kernel<__half>(CUtensorMap_st)", "_forward_kernel", "_linear_dact_kernel",
                                                  f"{space}linear_act_kernel<__nv_bfloat16>(CUtensorMap_st)", "_dact_kernel",
                                                  "nvjet_sm90_tst_192x192", "triton_red_fused__log_softmax_backward", "Memset")] == [
        *["attention"] * 4, "residual add and LayerNorm", *["MLP's products with GELU in them"] * 2, "GELU", "matmuls", "loss",
        "everything else"]


def test_a_table_shows_medians_ratios_and_shares_of_what_was_measured():
    row = next(line for line in report.kernels([kernel_record()]).splitlines() if "LayerNorm" in line and "| forward |" in line)
    assert [cell.strip() for cell in row.split("|")][4:9] == ["100.0", "75 %", "300.0", "150.0", "140.0 (Liger)"]
    text = report.train([train_record(1000)], "cuda", "gpt2", "GPT-2")
    assert "| one import | 1,500 | 1.50 | 40.0 % | 1.00 GiB | 30.0 s | 0.0 % |" in text and "| nanoGPT | out of memory |" in text
    assert "NVIDIA H200" in text and "commit abc" in text


def test_on_a_cpu_training_is_held_to_nanogpt_as_shipped_and_to_its_strongest():
    record = train_record(1000)
    row = record["variants"]["nanoGPT compiled"]
    record |= {"device": "cpu", "variants": {"nanoGPT": {**row, "tokens_per_s": 200, "mfu": None}, "nanoGPT bf16 fused": {**row, "tokens_per_s": 500},
                                             "our trainer bf16": {**row, "tokens_per_s": 1500, "mfu": None}}}
    assert "| our trainer bf16 | 1,500 | 7.50 | 3.00 | 1.00 GiB |" in report.train([record], "cpu", "gpt2", "GPT-2")


def test_the_newest_of_two_measurements_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    runs = ((2000, "2026-02-01"), (1000, "2026-01-01"))
    path.write_text("\n".join(json.dumps(train_record(rate, time=time)) for rate, time in runs))
    assert "3,000" in report.train(report.read(path), "cuda", "gpt2", "GPT-2")


def test_a_marker_that_nothing_fills_is_an_error():
    with pytest.raises(ValueError, match="a section 'no such'"):
        report.fill("<!-- generated: no such -->\n<!-- end -->", {"other": ""})


@pytest.mark.parametrize("times", [0, 2])
def test_a_section_whose_marker_is_missing_or_doubled_is_an_error(times):
    with pytest.raises(ValueError, match=f"generated: kept --> stands there {times} times"):
        report.fill("<!-- generated: kept -->\n<!-- end -->\n" * times, {"kept": ""})


def test_no_two_documents_have_a_section_of_one_name():
    names = [name for found in report.DOCUMENTS.values() for name in found([])]
    assert len(names) == len(set(names))


def test_the_front_page_has_only_what_was_measured():
    record = train_record(1000)
    record["options"]["batch_size"] = record["shape"]["batch_size"] = 64
    assert report.at_a_glance([record]).splitlines()[2:] == [
        "| the same script, one import changed | NVIDIA H200 | 1,000 (nanoGPT compiled) | 1,500 (one import) | 1.50 |"]


def test_plots_are_drawn_of_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(report_plots, "PLOTS", tmp_path)
    curve = [dict(step=0, seconds=0.0, val_loss=4.0), dict(step=9, seconds=1.0, val_loss=3.0)]
    losses = {"benchmark": "loss", "device": "cpu", "options": {"model": "cpu"}, "curves": {"nanoGPT": curve, "ours": curve},
              "environment": ENVIRONMENT}
    attention = [kernel_record(op="attention", shape=dict(B=32768 // T, T=T, H=12, D=64), sweep="T", flops=1e12,
                               direction=direction, bound="matmul") for T in (512, 1024) for direction in ("forward", "both")]
    assert report_plots.draw([]) == []
    assert report_plots.draw([*attention, losses, train_record(1000)]) == ["bars", "roofline", "scaling", "loss", "train"]
    assert {path.stem for path in tmp_path.iterdir()} == {"bars", "roofline", "scaling", "loss", "train"}


def test_the_summary_is_one_screen():
    text = report.summary([train_record(1000), *[kernel_record()] * 40])
    lines = text.splitlines()
    assert lines[0].split()[-4:] == ["x", "nanoGPT", "first", "step"] and any("one import" in line and " 1.50 " in line for line in lines)
    assert len(lines) <= 40
    assert report.summary([]) == "nothing was measured"
