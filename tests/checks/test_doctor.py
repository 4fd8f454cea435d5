"""`nanogpt-fast doctor` on installations that are broken on purpose: it never fails, and says how to fix each."""
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from nanogpt_fast.checks import doctor

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
FAKE_SMI = """#!/bin/sh
echo "NVIDIA Test GPU, 470.57.02, 9.0, 81559 MiB"
"""
OLD_DRIVER = """
import sys
if "torch.cuda.init()" in sys.orig_argv[-1]:  # the process that asks PyTorch; the others need not import it
    import torch
    torch.version.cuda = "13.0"
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver")
    torch.cuda.init = init
"""


def run(*words, cwd=None, **environment):
    """(exit status, what was printed) of the command in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "nanogpt_fast", "doctor", *words], env={**os.environ, **environment},
                          cwd=cwd, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def findings(**changed):
    """What `examine` finds where all is well, with some of it changed."""
    well = dict(
        machine=dict(python="3.11.7", system="Linux x86_64", cores=2, cpu="a CPU", features=["AVX2"]),
        compilers={"c++": "g++ 12", "nvcc": "13.0"},
        driver=dict(gpus=[dict(name="NVIDIA H200", driver="580.1", capability="9.0", memory="143771 MiB")]),
        torch=dict(version="2.11.0", cuda_build="13.0", threads=2, cuda=True, capability=[9, 0], gpu="NVIDIA H200"),
        triton=dict(version="3.6.0", interpreted=False),
        extension=dict(version="0.1.0", cpu_isas="avx2 baseline", cuda="13.0", cuda_archs="sm_90", cuda_why_not="",
                       cuda_here=None),
        ops=dict(device="cuda", asked="", rows=[["attention", "triton", ""]]))
    for name, part in changed.items():
        well[name] = part if "error" in part else {**well[name], **part}
    return well


def test_where_all_is_well_there_is_nothing_to_fix():
    printed = doctor.report(findings())
    assert "Nothing is missing." in printed and "Triton kernel" in printed and "NVIDIA H200" in printed
    assert doctor.report(findings(), "csv").split("\n\n")[1] == "op,runs as,why nothing faster\nattention,Triton kernel,"
    assert "| attention | Triton kernel |  |" in doctor.report(findings(), "markdown")


def test_a_csv_file_has_the_tables_and_stderr_the_rest(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: findings(ops=dict(training="in bfloat16: this CPU has AMX")))
    assert doctor.main(["--format=csv"]) == 0
    printed = capsys.readouterr()
    assert "in bfloat16" in printed.err and "in bfloat16" not in printed.out and "part,found" in printed.out


def test_without_triton_and_with_an_extension_of_another_abi_both_are_named(tmp_path):
    package = shutil.copytree(doctor.PACKAGE, tmp_path / "nanogpt_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / f"_C{SUFFIX}").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')\n")
    status, printed = run(cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert status == 0
    assert "none that can be imported: ImportError: libtriton.so: undefined symbol" in printed
    assert f"_C{SUFFIX} does not load: ImportError" in printed
    assert "pip install --force-reinstall triton" in printed and "pip install --force-reinstall --no-deps --no-cache-dir SOURCES" in printed
    assert re.search("^sample +plain PyTorch +cpp: the extension nanogpt_fast._C cannot be imported", printed, re.MULTILINE)
    assert re.search("decode +plain PyTorch .*the extension is missing", printed)


def test_a_driver_too_old_for_this_pytorch_is_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(OLD_DRIVER)
    (tmp_path / "nvidia-smi").write_text(FAKE_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    status, printed = run(PYTHONPATH=str(tmp_path), PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert status == 0
    assert "NVIDIA Test GPU, compute capability 9.0" in printed and "driver 470.57.02" in printed
    assert "PyTorch cannot use it: The NVIDIA driver on your system is too old (found version 11040)" in printed
    assert "a driver older than CUDA 13.0 needs  update the NVIDIA driver" in printed
    # and everything else is told as ever
    for word in ("Python", "PyTorch", "GPU", "Triton", "compilers", "extension", "attention", "layer_norm", "mlp",
                 "cross_entropy", "decode", "sample"):
        assert any(line.strip().startswith(word) for line in printed.splitlines()), word


def test_without_pytorch_it_says_so_and_the_exit_status_is_1(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    status, printed = run("--json", PYTHONPATH=str(tmp_path))
    found = json.loads(printed)
    assert status == 1
    assert "libcudart.so.13" in found["torch"]["error"] and "error" in found["ops"]
    assert ("PyTorch does not import", "pip install --force-reinstall torch") in doctor.remedies(found)


def test_an_extension_of_another_python_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    (tmp_path / "_C.cpython-399-x86_64-linux-gnu.so").write_bytes(b"")
    assert "built for another Python" in doctor.extension()["error"]


def test_why_no_extension_was_built_is_read_from_what_the_build_left(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    (tmp_path / "_C_missing.txt").write_text("no C++ compiler was found\nmore\n")
    assert doctor.extension() == {"error": "no C++ compiler was found"}


def test_a_library_that_crashes_the_process_is_a_finding():
    assert doctor.ask("import os; os.abort()") == {"error": "the process was killed: SIGABRT"}


def test_an_error_of_several_lines_is_told_by_its_first():
    """As PyTorch and NumPy raise them. The first one names the exception and the library."""
    raised = "raise ImportError('libfirst.so: cannot open\\n  indented\\nlast line')"
    assert doctor.ask(f"try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    {raised} from error") == {
        "error": "ImportError: libfirst.so: cannot open"}
    assert doctor.ask("x =") == {"error": "SyntaxError: invalid syntax"}


def test_an_answer_that_does_not_come_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.5)
    assert doctor.ask("import time; time.sleep(60)") == {"error": "no answer within 0.5 s"}


def test_a_probe_that_raises_is_a_finding():
    def probe():
        raise PermissionError("no\nfor you")
    assert doctor.look(probe) == {"error": "PermissionError: no"}


@pytest.mark.parametrize("changed, what, command", [
    (dict(torch=dict(cuda_build=None, cuda=False)), "PyTorch without CUDA", "--index-url https://download.pytorch.org/whl/"),
    (dict(torch=dict(cuda=False, cuda_error="no CUDA-capable device")), "CUDA does not start", "CUDA_VISIBLE_DEVICES"),
    (dict(torch=dict(capability=[7, 5])), "compute capability 7.5", "8.0"),
    (dict(triton=dict(interpreted=True)), "Triton interprets its kernels", "unset TRITON_INTERPRET"),
    (dict(extension=dict(cuda=None, cuda_why_not="nvcc was not found")), "the extension has no CUDA part", "pip install"),
    (dict(extension=dict(cuda=None, cuda_why_not="nvcc was not found"), compilers=dict(nvcc=None)),
     "the extension has no CUDA part", "NANOGPT_FAST_CUDA=1 pip"),
    (dict(extension=dict(cuda_here="no kernel image")), "the extension cannot launch here", "NANOGPT_FAST_CUDA_ARCHS=90 pip"),
    (dict(ops=dict(environment="backend 'foo'")), "NANOGPT_FAST_BACKEND", "unset NANOGPT_FAST_BACKEND"),
    (dict(ops=dict(error="RuntimeError: NANOGPT_FAST_KERNELS: a.py fails")), "NANOGPT_FAST_KERNELS", "correct the file"),
    (dict(driver=dict(error="there is no nvidia-smi")), "no GPU: Triton kernels stay idle", "install its driver"),
])
def test_each_defect_has_the_command_that_fixes_it(changed, what, command):
    found = findings(**changed)
    assert any(text == what and command in advice for text, advice in doctor.remedies(found)), doctor.remedies(found)
    assert command in doctor.report(found)  # and the report can be made of it


@pytest.mark.parametrize("broken", ["machine", "compilers", "driver", "torch", "triton", "extension", "ops"])
def test_whatever_part_is_broken_the_report_is_made(broken):
    assert "it broke" in doctor.report(findings(**{broken: dict(error="it broke")}))


def test_the_files_of_the_package_that_it_needs_import_no_torch():
    code = "import sys; sys.modules['torch'] = None; import nanogpt_fast.cli, nanogpt_fast.checks.doctor"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(doctor.PACKAGE).parent)


def test_the_dtype_that_training_takes_is_told():
    ops = doctor.ask(doctor.OPS)
    assert ops["training"].startswith(("bfloat16", "float16", "float32"))
    assert f"training in {ops['training']}" in doctor._ops(ops)[0]
