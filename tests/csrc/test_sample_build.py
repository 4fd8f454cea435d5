"""setup.py: what is missing costs only the part that needs it, and is told."""
import glob
import os
import shutil
import subprocess
import sys

import pytest

from nanogpt_fast.ops import extension

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
pytest.importorskip("pybind11")
pytest.importorskip("ninja")


@pytest.fixture
def sources(tmp_path):
    """A copy of what setup.py reads, in a folder with a blank in its name."""
    folder = tmp_path / "a copy"
    shutil.copytree(os.path.join(ROOT, "csrc"), folder / "csrc")
    (folder / "nanogpt_fast").mkdir()
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(os.path.join(ROOT, name), folder)
    for name in ("README.md", "LICENSE"):
        (folder / name).write_text(name)
    for package in ("nanogpt_fast/bench", "nanogpt_fast/ops", "nanogpt_fast/swap", "nanogpt_fast/text", "kernels"):
        (folder / package).mkdir()
    return folder


def build(folder, **environment):
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, capture_output=True, text=True,
                          env={**{k: v for k, v in os.environ.items() if not k.startswith("NANOGPT_FAST_")}, **environment})
    return done.returncode, done.stdout + done.stderr


def built(folder):
    return glob.glob(str(folder / "nanogpt_fast" / "_C.*.so"))


def test_without_a_compiler_the_build_succeeds_and_keeps_the_reason(sources):
    stale = sources / "nanogpt_fast" / "_C.cpython-old.so"
    stale.write_text("an older build, which would hide the failure")
    code, output = build(sources, CXX="no-such-compiler")
    assert code == 0 and "no C++ compiler (no-such-compiler) was found" in output and "everything works without it" in output
    assert "no-such-compiler" in (sources / "nanogpt_fast" / "_C_missing.txt").read_text() and not built(sources)


def test_a_source_that_does_not_compile_costs_only_the_extension(sources):
    for path in (sources / "csrc").rglob("*.cpp"):
        path.write_text("#error planted" if path.name == "bindings.cpp" else "")       # the others take no time
    code, output = build(sources, NANOGPT_FAST_CUDA="0")
    why = (sources / "nanogpt_fast" / "_C_missing.txt").read_text()
    assert code == 0 and "planted" in why.splitlines()[0] and not built(sources)


def test_cuda_that_is_demanded_and_cannot_be_built_fails_the_build(sources):
    code, output = build(sources, NANOGPT_FAST_CUDA="1", CXX="no-such-compiler", CUDA_HOME=str(sources))
    assert code != 0 and "no-such-compiler" in output


def test_a_wrong_value_of_the_switch_is_refused(sources):
    code, output = build(sources, NANOGPT_FAST_CUDA="yes")
    assert code != 0 and "NANOGPT_FAST_CUDA is 'yes'" in output


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_cpu_part_builds_alone_and_says_why(sources):
    code, output = build(sources, NANOGPT_FAST_CUDA="0")
    assert code == 0 and "CPU part of the extension only: NANOGPT_FAST_CUDA=0" in output, output
    (sources / "nanogpt_fast" / "__init__.py").write_text("")
    told = subprocess.run([sys.executable, "-c", "import nanogpt_fast._C as c; print(c.build_info(), c.cuda_why_not(0))"],
                          cwd=sources, capture_output=True, text=True, check=True).stdout
    assert "'cuda': None" in told and "built without CUDA: NANOGPT_FAST_CUDA=0" in told


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None or shutil.which("c++") is None, reason="needs nvcc and a C++ compiler")
def test_an_architecture_that_nvcc_does_not_know_is_left_out_and_named(sources):
    code, output = build(sources, NANOGPT_FAST_CUDA_ARCHS="90 9999")
    assert code == 0 and "does not know sm_9999; it is left out" in output and len(built(sources)) == 1, output


@pytest.mark.skipif(extension._C is None, reason="the extension is not built")
@pytest.mark.parametrize("best", ("avx512", "avx2", "baseline"))
def test_an_older_cpu_can_be_played(best):
    code = "import nanogpt_fast._C as c; i = c.build_info(); print(i['cpu_isas'], i['decode_isas'], c.gemm_works())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "NANOGPT_FAST_ISA": best}).stdout
    above = {"avx512": ("amx",), "avx2": ("amx", "avx512"), "baseline": ("amx", "avx512", "avx2")}[best]
    assert not set(above) & set(told.split()) and "baseline" in told and told.split()[-1] == "False"


@pytest.mark.skipif(extension._C is None or not os.path.exists("/proc/cpuinfo"), reason="the extension is not built, or this is not Linux")
def test_the_instruction_sets_that_it_finds_are_those_that_the_system_names():
    with open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    needed = {"avx512": ("avx512f", "avx512dq", "avx512bw", "avx512vl"), "avx2": ("avx2", "fma"), "baseline": ()}
    code = "import nanogpt_fast._C as c; print(c.build_info()['cpu_isas']); print(c.gemm_works())"
    environment = {name: value for name, value in os.environ.items() if name != "NANOGPT_FAST_ISA"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.split("\n")
    assert told[0].split() == [isa for isa, names in needed.items() if set(names) <= set(flags)]
    assert told[1] == str({*needed["avx512"], "amx_tile", "amx_bf16", "avx512_bf16"} <= set(flags))


@pytest.mark.skipif(extension._C is None, reason="the extension is not built")
def test_a_cpu_that_does_not_exist_is_refused():
    done = subprocess.run([sys.executable, "-c", "import nanogpt_fast._C as c; c.build_info()"], capture_output=True, text=True,
                          env={**os.environ, "NANOGPT_FAST_ISA": "mmx"})
    assert done.returncode != 0 and "NANOGPT_FAST_ISA is 'mmx'; expected amx, avx512, avx2 or baseline" in done.stderr
