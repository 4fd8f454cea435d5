"""The compile gate: every kernel within its limits, and a gate that notices when one isn't.

`make test` compiles what GPT-2 124M launches for sm_90, `make test-all` everything for every architecture. No GPU is needed.
Triton must not be interpreting.
"""
import csv
import dataclasses
import importlib
import json
import os
import pathlib
import pkgutil
import re

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

import triton.language as tl  # noqa: E402

from nanogpt_fast import kernels  # noqa: E402
from nanogpt_fast.kernels import decode, fastest  # noqa: E402
from nanogpt_fast.kernels.gate import __main__ as command, compiling, families, measure  # noqa: E402
from nanogpt_fast.kernels.gate.case import Case  # noqa: E402


def test_every_launch_at_gpt2_shapes_keeps_the_limits_on_sm_90():
    rows = compiling.compile_all((90,), counted=True, workers=2)
    assert {row.name.split(".")[0] for row in rows} >= {"attention", "layer_norm", "mlp", "cross_entropy"}
    assert not [line for row in rows for line in measure.failures(row)]


@pytest.mark.slow
def test_every_kernel_in_every_tile_row_keeps_the_limits_on_every_architecture():
    rows = compiling.compile_all(workers=2)
    assert {row.arch for row in rows} == set(measure.ARCHITECTURES)
    assert not [line for row in rows for line in measure.failures(row)]
    of_90 = {row.name: row for row in rows if row.arch == 90}
    for name, case in families.all_cases(90).items():
        if case.variant_of:     # it may be left out elsewhere because it asks no more than
            row, other = of_90[name], of_90[case.variant_of]
            # A declared spill is a compiler's whim: ptxas of Triton 3.7 spills 8 bytes without dropout, and none with it.
            assert row.spill_bytes <= max(other.spill_bytes, row.allowed_spill_bytes) and row.shared <= other.shared, name
            assert row.narrow_loads <= other.narrow_loads, name


@pytest.mark.parametrize("name, apart", [
    ("attention.backward dkdv D=32 float32", True), ("attention.backward dq D=32 float32", True), ("attention.forward D=32 float32", True),
    ("mlp.linear_dact gelu fp32", True), ("attention.backward dkdv D=32 bf16", False)])
def test_float32_products_of_a_tile_are_summed_apart(name, apart):
    """No dot starts from a sum that a loop carries on, after Triton's pass that folds additions into dots. kernels/dot.py says why."""
    text = compiling._compile(families.all_cases(90)[name], 90).texts["ttir"]
    made = dict(re.findall(r"(%\w+) = ([\w.]+) ", text))
    starts = {made.get(start) for start in re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", text)}
    assert (starts <= {"arith.constant", "tt.broadcast"}) == apart      # a broadcast: minus delta, at the size of the product


# A matmul on sm_90's wgmma; two that sm_90 shares with the others, without and with a matmul; stmatrix on sm_90.
@pytest.mark.slow
@pytest.mark.parametrize("name, is_portable", [
    ("attention.backward dkdv D=32 dropout", False), ("layer_norm.backward add dropout 1024", True),
    ("attention.backward head D=32 float32 dropout", True), ("layer_norm.forward add dropout 64", False)])
def test_sharing_stages_with_another_architecture_changes_nothing(name, is_portable):
    cases = {arch: families.all_cases(arch)[name] for arch in measure.ARCHITECTURES}
    shared = compiling._compile_for(cases)
    assert compiling.portable(shared[90].texts["ptx"]) == is_portable
    for arch, case in cases.items():
        assert compiling._same_launch(case, cases[90])
        direct = compiling._compile(case, arch)
        assert shared[arch].texts["ptx"] == direct.texts["ptx"] and set(shared[arch].seconds) == set(direct.seconds)
        rows = [dataclasses.replace(measure.measured(case, made), compile_seconds=0) for made in (direct, shared[arch])]
        assert rows[0] == rows[1]


def test_leaving_out_passes_spares_other_modules_and_ends_with_an_exception():
    run = compiling.ir.pass_manager.run
    lowered, alone = compiling._compile(copy_case(), 80).module, compiling._compile(matmul_case(num_stages=2), 80)
    with pytest.raises(ValueError, match="in the stage"), compiling._without_passes(lowered):
        beside = compiling._compile(matmul_case(num_stages=2), 80)
        raise ValueError("in the stage")
    assert compiling.ir.pass_manager.run is run
    assert beside.texts["ptx"] == alone.texts["ptx"]


def test_leaving_out_passes_that_a_module_still_needs_is_refused():
    made, context = compiling._compile(copy_case(), 80), compiling.ir.context()
    compiling.ir.load_dialects(context)
    raw = dataclasses.replace(made, module=compiling._parsed(made.texts["ttir"], context))
    with pytest.raises(RuntimeError, match="operations that are not LLVM's: .*tt.load"):
        compiling._compile(copy_case(), 86, raw, compiling.LOWERED)


def test_a_stage_whose_passes_come_another_way_is_refused():
    with pytest.raises(RuntimeError, match="did not come"), compiling._without_passes(compiling._compile(copy_case(), 80).module):
        pass                            # as if a later Triton ran them by itself: they would have lowered the module twice


def kernels_of(module):
    """{name: kernel} of the kernels that a module defines."""
    return {name: value for name, value in vars(module).items()
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel") and value.__module__ == module.__name__}


@pytest.mark.parametrize("name", [found.name for found in pkgutil.iter_modules(kernels.__path__) if not found.ispkg])
def test_every_kernel_is_in_a_case(name):
    covered = {case.kernel for arch in measure.ARCHITECTURES for case in families.gate_cases(arch)}
    module = importlib.import_module(f"{kernels.__name__}.{name}")
    missing = [kernel for kernel, function in kernels_of(module).items() if function not in covered]
    assert not missing, f"no gate case compiles {', '.join(missing)}"


@pytest.mark.parametrize("arch", measure.ARCHITECTURES)
def test_a_variant_has_the_kernel_and_the_tile_of_a_case_that_every_architecture_compiles(arch):
    described = {case.name: case for case in families.gate_cases(arch)}

    def tile(case):
        constants = {name: value for name, value in case.constexprs.items() if "BLOCK" in name or name in ("HEAD", "OUT")}
        return case.kernel, case.num_warps, case.num_stages, case.options, constants

    for case in described.values():
        if case.variant_of:
            other = described[case.variant_of]
            assert not other.variant_of and not case.in_model and tile(case) == tile(other), case.name
    left_out = described.keys() - families.all_cases(arch)
    assert left_out == (set() if arch == 90 else {name for name, case in described.items() if case.variant_of})


@pytest.mark.parametrize("arch", measure.ARCHITECTURES)
def test_every_row_of_the_decode_table_is_compiled(arch):
    inputs = {"norm": lambda c: c["C"], "combine": lambda c: c["H"] * c["HEAD"], "add": lambda c: c["F"]}
    used = {"norm_qkv_kernel": "norm", "norm_act_kernel": "norm", "head_kernel": "norm", "combine_add_kernel": "combine",
            "linear_add_kernel": "add"}
    for kernel, rows in used.items():
        cases = [case for case in families.all_cases(arch).values() if case.kernel is getattr(decode, kernel)]
        listed = fastest.shipped(f"decode {rows} tile", arch)
        assert {next(row for row in listed if row.fits(inputs[rows](case.constexprs), 0, 0)) for case in cases} == set(listed), kernel


def test_every_module_that_launches_kernels_is_described():
    folder = pathlib.Path(kernels.__file__).parent
    described = {case.kernel.__module__.rsplit(".", 1)[1] for case in families.gate_cases(90)}
    launching = {path.stem for path in folder.glob("*.py") if "_kernel[" in path.read_text()}
    assert launching <= described, f"{', '.join(sorted(launching - described))}: kernels without gate_cases"


# --------------------------------------------------------------------------------------------------- planted faults
# One kernel, made wrong by one choice at a time.


@triton.jit
def copy_kernel(x_ptr, y_ptr, stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + columns, mask=columns < N, other=0.0)
    tl.store(y_ptr + row * stride + columns, x, mask=columns < N)


@triton.jit
def copy_again_kernel(x_ptr, y_ptr, stride, N, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, BLOCK)))


def copy_case(**changes):
    return Case(**{**dict(
        name="copy", kernel=copy_kernel,
        signature={"x_ptr": "*bf16", "y_ptr": "*bf16", "stride": "i32", "N": "i32"},
        constexprs={"BLOCK": 1024}, divisible=("stride", "N"), num_warps=4, tile_row="test"), **changes})


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :])     # [BLOCK_M, BLOCK_K]
        b = tl.load(b_ptr + n[:, None] * K + (start + k)[None, :])     # [BLOCK_N, BLOCK_K]
        acc = tl.dot(a, b.T, acc)
    tl.store(c_ptr + m[:, None] * BLOCK_N + n[None, :], acc)


def matmul_case(half="bf16", block=(128, 128, 64), **changes):
    return Case(**{**dict(
        name="matmul", kernel=matmul_kernel,
        signature={"a_ptr": f"*{half}", "b_ptr": f"*{half}", "c_ptr": "*fp32", "K": "i32"},
        constexprs=dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block)), divisible=("K",), num_warps=4,
        tile_row="test"), **changes})


@pytest.mark.parametrize("make_case", (copy_case, matmul_case))
def test_what_is_compiled_is_what_triton_compiles(make_case, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    case = make_case(num_stages=2)
    source = triton.compiler.ASTSource(
        case.kernel, {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}, case.constexprs,
        {(i,): [["tt.divisibility", 16]] for i in range(4)})
    for arch, ours in compiling._compile_for(dict.fromkeys(measure.ARCHITECTURES, case)).items():
        theirs = triton.compile(source, target=compiling.GPUTarget("cuda", arch, 32), options=dict(num_warps=4, num_stages=2))
        assert ours.texts["ptx"] == theirs.asm["ptx"] and ours.metadata["shared"] == theirs.metadata.shared, arch


@pytest.mark.parametrize("change", (
    dict(num_warps=8), dict(num_stages=1), dict(divisible=()), dict(options={"maxnreg": 64}), dict(constexprs={"BLOCK": 512}),
    dict(signature={"x_ptr": "*fp32", "y_ptr": "*bf16", "stride": "i32", "N": "i32"}), dict(kernel=copy_again_kernel)))
def test_launches_that_differ_share_nothing(change, monkeypatch):
    cases = {90: copy_case(), 80: copy_case(), 86: copy_case(**change)}
    assert compiling._same_launch(cases[90], cases[80]) and not compiling._same_launch(cases[80], cases[86])
    monkeypatch.setattr(compiling, "all_cases", lambda arch, every=False: {"copy": cases[arch]})
    *_, row = compiling._compile_by_name(("copy", tuple(cases)))
    alone = compiling.compile_case(cases[86], 86)
    assert dataclasses.replace(row, compile_seconds=0) == dataclasses.replace(alone, compile_seconds=0)


def test_a_good_kernel_passes():
    row = compiling.compile_case(copy_case(), 90)
    assert (row.widest_load, row.widest_store, row.narrow_loads, row.spill_bytes) == (16, 16, 0, 0)
    assert measure.failures(row) == []


def test_a_stride_not_marked_divisible_is_found_as_narrow_loads():
    row = compiling.compile_case(copy_case(divisible=()), 90)
    assert row.widest_load == 2
    assert "narrower than 16 bytes" in measure.failures(row)[0]
    declared = compiling.compile_case(copy_case(divisible=(), allowed_narrow_loads=row.narrow_loads, narrow_reason="test"), 90)
    assert measure.failures(declared) == []


def test_a_kernel_that_spills_is_found():
    case = matmul_case(block=(128, 256, 64), num_stages=2)      # 128 x 256 fp32 on 128 threads: all 256 registers
    row = compiling.compile_case(case, 90)
    assert row.registers == 255 and row.spill_bytes > 0
    assert "spills" in measure.failures(row)[0]
    allowed = dict(allowed_spill_bytes=row.spill_bytes, spill_reason="test")
    declared = compiling.compile_case(matmul_case(block=(128, 256, 64), num_stages=2, **allowed), 90)
    assert measure.failures(declared) == []


@pytest.mark.parametrize("arch, stages, fits", [(86, 2, True), (86, 5, False), (90, 5, True)])
def test_shared_memory_over_the_limit_of_the_architecture_is_found(arch, stages, fits):
    row = compiling.compile_case(matmul_case(num_stages=stages), arch)
    complaints = [line for line in measure.failures(row) if "shared memory" in line]
    assert bool(complaints) != fits, (row.shared, complaints)


def test_a_half_precision_matmul_without_wgmma_is_found():
    good = compiling.compile_case(matmul_case(), 90)
    assert good.wgmma > 0 and good.large_half_dots == 1 and measure.failures(good) == []
    row = compiling.compile_case(matmul_case(num_warps=2), 90)       # wgmma needs groups of four warps
    assert row.wgmma == 0 and row.mma > 0
    assert any("no wgmma" in line for line in measure.failures(row))


def test_tensor_core_instructions_are_counted_by_architecture():
    assert compiling.compile_case(matmul_case(num_stages=2), 80).mma > 0
    assert compiling.compile_case(matmul_case(num_stages=2), 100).tcgen05 > 0
    assert compiling.compile_case(matmul_case("fp16", (32, 64, 64), num_stages=2), 90).small_half_dots == 1


# Expected values by hand from the limits in the CUDA programming guide.
@pytest.mark.parametrize("arch, registers, shared, warps, blocks", [
    (90, 178, 96 * 1024, 4, 2),     # registers: 65536 / (184 * 128) = 2.8; shared: 228 / 97 = 2.3
    (90, 255, 64 * 1024, 8, 1),     # registers: 65536 / (256 * 256) = 1
    (90, 32, 0, 4, 16),             # warps: 64 / 4
    (86, 32, 0, 4, 12),             # warps: 48 / 4
    (90, 16, 0, 1, 32),             # blocks
    (80, 64, 80 * 1024, 4, 2),      # shared: 164 / 81
    (86, 64, 100 * 1024, 4, 0),     # over the 99 KB a block may have
])
def test_resident_blocks(arch, registers, shared, warps, blocks):
    assert measure.resident_blocks(arch, registers, shared, warps) == blocks


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    assert measure.floor_us(4.3e6, None) == pytest.approx(1.0)
    assert measure.floor_us(4.3e6, 790e6 * 3) == pytest.approx(3.0)
    assert measure.floor_us(None, None) is None


def test_a_case_that_forgets_an_argument_or_a_reason_is_refused():
    with pytest.raises(ValueError, match="doesn't describe .N."):
        copy_case(signature={"x_ptr": "*bf16", "y_ptr": "*bf16", "stride": "i32"}, divisible=("stride",))
    with pytest.raises(ValueError, match="come together"):
        copy_case(allowed_spill_bytes=8)
    with pytest.raises(ValueError, match="come together"):
        copy_case(allowed_narrow_loads=8)
    with pytest.raises(ValueError, match="one of the two"):
        copy_case(in_model=True, variant_of="copy wide")


def test_the_command_prints_a_line_per_kernel_and_writes_json(tmp_path, monkeypatch, capsys):
    row = compiling.compile_case(copy_case(bytes=4_300_000, in_model=True), 90)
    monkeypatch.setattr(command, "compile_all", lambda *args, **kwargs: [row])
    assert command.main(["--arch", "90", "--json", str(tmp_path / "rows.json")]) == 0
    out = capsys.readouterr().out
    assert "copy" in out and "1 compiled" in out and "all within the limits" in out and "the 1 kernels of a GPT-2" in out
    assert f"copy 1 90 {row.registers} 0 {row.shared} {row.resident_blocks} right".split() in map(str.split, out.splitlines())
    assert command.main(["--all", "--format=csv"]) == 0
    out, err = capsys.readouterr()
    every, = csv.DictReader(out.splitlines())
    assert every["kernel"] == "copy" and every["floor us"] == "1.0" and "all within the limits" in err and "all within" not in out
    written = (tmp_path / "rows.json").read_text()
    assert [each["floor_us"] for each in json.loads(written)] == [1.0] and written.count("\n") == 3    # a row a line
    monkeypatch.setattr(command, "compile_all", lambda *args, **kwargs: [compiling.compile_case(copy_case(divisible=()), 90)])
    assert command.main(["--arch", "90"]) == 1
    assert "1 of 1 over a limit" in capsys.readouterr().out


def test_the_summary_has_the_worst_of_a_kernels_variants():
    good = compiling.compile_case(copy_case(name="copy one"), 90)
    worse = dict(registers=200, spill_bytes=8, allowed_spill_bytes=8, shared=5000, resident_blocks=1)
    spilling = dataclasses.replace(good, name="copy two", arch=80, **worse)
    found, = command.summary([spilling, good])
    assert found == ("copy", 2, "80 90", 200, 8, 5000, 1, "right, 1 with a declared spill")
    assert len(command.cells(spilling)) == len(command.HEAD)


def test_a_name_that_no_kernel_has_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--only", "attention.forwrd", "--arch", "90"])
    assert ended.value.code == 2
    assert re.search(r"--only=attention.forwrd: no kernel has that in its name; the nearest is attention.forward", capsys.readouterr().err)
