"""The CPU sampler on raw bytes, under AddressSanitizer and UndefinedBehaviorSanitizer (tests/csrc/fuzz.cpp)."""
import os
import platform
import shutil
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
COMPILER = shutil.which("c++") or shutil.which("g++")
ISAS = {"baseline": [], "avx2": ["-mavx2"], "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}


def compile_fuzzer(folder, source=os.path.join(ROOT, "csrc")):
    """The flags are setup.py's, and the sanitizers'."""
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread",
             "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    x86 = platform.machine() == "x86_64"
    objects = []
    for isa, more in ISAS.items() if x86 else [("baseline", [])]:
        objects.append(os.path.join(folder, f"{isa}.o"))
        subprocess.run([COMPILER, *flags, *more, f"-DNGF_ISA={isa}", "-I", source, "-c",
                        os.path.join(source, "sampler", "cpu_row.cpp"), "-o", objects[-1]], check=True)
    program = os.path.join(folder, "fuzz")
    files = [os.path.join(source, "isa.cpp"), os.path.join(source, "sampler", "cpu.cpp"), os.path.join(ROOT, "tests", "csrc", "fuzz.cpp")]
    subprocess.run([COMPILER, *flags, *(["-DNGF_X86"] if x86 else []), "-I", os.path.join(ROOT, "csrc"), *files, *objects, "-o", program],
                   check=True)
    return program


def fuzz(program, seconds, seed=1):
    return subprocess.run([program, str(seconds), str(seed)], capture_output=True, text=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_raw_bytes_give_no_finding_and_a_planted_fault_does(tmp_path):
    result = fuzz(compile_fuzzer(str(tmp_path)), seconds=int(os.environ.get("NANOGPT_FAST_FUZZ_SECONDS", "20")))
    assert result.returncode == 0 and "no finding" in result.stdout, result.stderr[-3000:]
    print(result.stdout)
    faulty = tmp_path / "faulty"
    shutil.copytree(os.path.join(ROOT, "csrc"), faulty)
    text = (faulty / "sampler" / "cpu_row.cpp").read_text()
    planted = text.replace("begin + SEGMENT <= V ? ", "true ? ")  # reads past the row's end
    assert planted != text
    (faulty / "sampler" / "cpu_row.cpp").write_text(planted)
    result = fuzz(compile_fuzzer(str(tmp_path), str(faulty)), seconds=20)
    assert result.returncode != 0 and "AddressSanitizer" in result.stderr, result.stderr[-3000:]
