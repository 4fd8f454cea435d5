"""The kit for a GPU machine (benchmarks/gpu) against an imitated lease: what hangs, crashes or is killed loses no result that exists already."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package
from benchmarks.gpu import __main__ as kit, ahead  # noqa: E402
from benchmarks.gpu.lease import Lease, Stage  # noqa: E402

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups and signals")


def python(text, *words):
    return [sys.executable, "-c", textwrap.dedent(text), *map(str, words)]


def writes(path, text, then=""):
    """A stage's command that writes a line, as a measurement is written, and goes on with `then`."""
    return python(f"""
        import os, signal, sys, time
        with open({str(path)!r}, "a") as f:
            f.write({text!r} + "\\n")
        print("had {text}", flush=True)
        {then}
    """)


HANG = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
CRASH = "os.kill(os.getpid(), signal.SIGSEGV)"


def test_a_stage_that_hangs_or_crashes_costs_its_own_seconds_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.gpu.lease.GRACE", 0.3)
    results = tmp_path / "had"
    start = time.monotonic()
    ended = Lease(tmp_path).run([
        Stage("first", writes(results, "one"), 20),
        Stage("hangs", writes(results, "two", HANG), 1.5, after=("first",)),
        Stage("crashes", writes(results, "three", CRASH), 20, after=("first",)),
        Stage("needs it", writes(results, "never"), 20, needs=("crashes",)),
        Stage("not there", ["/no/such/program"], 20),
        Stage("last", writes(results, "four"), 20, after=("hangs", "crashes"), alone=True)])
    assert time.monotonic() - start < 30
    assert ended["first"] == ended["last"] == "passed"
    assert ended["hangs"].startswith("stopped after") and ended["crashes"] == "FAILED: killed by signal 11"
    assert ended["needs it"].startswith("not run: crashes FAILED") and ended["not there"].startswith("FAILED: ")
    assert sorted(results.read_text().split()) == ["four", "one", "three", "two"]
    log = (tmp_path / "log.txt").read_text()
    assert all(f"{name}| had {text}" in log for name, text in (("first", "one"), ("hangs", "two"), ("crashes", "three")))
    noted = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert {row["stage"]: row["how"] for row in noted} == ended
    capsys.readouterr()


def test_timed_stages_run_alone_and_others_side_by_side(tmp_path, capsys):
    order = tmp_path / "order"
    note = f"open({str(order)!r}, 'a').write"
    command = {name: python(f"import time; {note}('{name}+ '); time.sleep(0.5); {note}('{name}- ')") for name in "abcd"}
    Lease(tmp_path).run([Stage("a", command["a"], 9), Stage("b", command["b"], 9), Stage("c", command["c"], 9, alone=True),
                         Stage("d", command["d"], 9, alone=True)])
    events = order.read_text().split()
    assert set(events[:2]) == {"a+", "b+"} and events[4:] == ["c+", "c-", "d+", "d-"]
    capsys.readouterr()


def test_when_the_time_is_over_what_runs_is_ended_and_the_rest_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.gpu.lease.GRACE", 0.3)
    results = tmp_path / "had"
    start = time.monotonic()
    ended = Lease(tmp_path, seconds=9, reserve=1).run([
        Stage("long", writes(results, "one", "time.sleep(600)"), 100), Stage("later", writes(results, "two"), 100, alone=True)])
    assert time.monotonic() - start < 15
    assert ended["long"].startswith("stopped after") and ended["later"] == "not run: no time left"
    assert results.read_text().split() == ["one"]
    capsys.readouterr()


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGKILL), ids=("SIGTERM", "SIGKILL"))
def test_killed_in_the_middle_it_keeps_what_was_had(number, tmp_path):
    results = tmp_path / "had"
    program = tmp_path / "program.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                       "from benchmarks.gpu.lease import Lease, Stage\n"
                       f"Lease({str(tmp_path)!r}).run([Stage('one', {writes(results, 'one')!r}, 60),\n"
                       f"  Stage('two', {writes(results, 'two', 'time.sleep(600)')!r}, 60, after=('one',)),\n"
                       "  Stage('three', ['true'], 60, after=('two',))])\n")
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        if (tmp_path / "log.txt").exists() and "two| had two" in (tmp_path / "log.txt").read_text():      # the log has the commands, too
            break
        time.sleep(0.1)
    process.send_signal(number)
    process.wait(30)
    assert results.read_text().split() == ["one", "two"]
    log = (tmp_path / "log.txt").read_text()
    assert "one| had one" in log and "two| had two" in log and "lease| one: passed" in log
    if number == signal.SIGTERM:
        assert "three: not run: interrupted" in log and "two: stopped after" in log


def test_a_failing_tests_traceback_is_on_disk_before_the_run_is_over(tmp_path):
    (tmp_path / "test_it.py").write_text("import os, signal\n"
                                         "def test_a():\n    assert 1 == 2, 'the first failure'\n"
                                         "def test_b():\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    failures = tmp_path / "failures.txt"
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.failures", "test_it.py"],
                   cwd=tmp_path, capture_output=True, env={**alone, "PYTHONPATH": str(ROOT), "NANOGPT_FAST_FAILURES": str(failures)})
    assert "test_a" in failures.read_text() and "the first failure" in failures.read_text()


def test_every_stage_waits_only_for_stages_of_its_part_and_what_is_timed_runs_alone(tmp_path):
    for part in ("first", "second", "rest", "all"):
        for dry in (True, False) if part == "first" else (True,):
            listed = kit.stages(part, tmp_path, tmp_path, "", dry)
            names = [stage.name for stage in listed]
            assert len(set(names)) == len(names)
            for i, stage in enumerate(listed):
                assert set((*stage.after, *stage.needs)) <= set(names[:i]), (part, stage.name)
                timed = stage.name.startswith(("train", "sweep", "generate", "kernels", "baby", "variations", "ncu", "tune"))
                assert stage.alone == (timed and "compiles" not in stage.name) or stage.name == "captured", stage.name


TWO_KERNELS = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(3.0)

@triton.jit
def scaled(x):
    return x * FACTOR

@triton.jit
def scale_kernel(x_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(x_ptr + at, scaled(tl.load(x_ptr + at, mask=at < n)), mask=at < n)

@triton.jit
def fill_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), scaled(1.0))
"""


def test_a_kernel_compiled_ahead_is_found_in_another_folder_by_a_process_that_launches_in_another_order(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "two_kernels.py").write_text(TWO_KERNELS)

    def compilations(cache, order):
        """How many of both kernels a process without a GPU compiles that launches them in this order."""
        program = f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
            from benchmarks.gpu import ahead
            hashes = ahead.compile_only(launchers=False)
            import triton, two_kernels
            from triton.runtime.jit import MockTensor
            x, hits = MockTensor(triton.language.float32), []
            triton.knobs.compilation.listener = lambda cache_hit, **rest: hits.append(cache_hit)
            launch = {{"scale": lambda: two_kernels.scale_kernel[(1,)](x, 16, SIZE=16),
                      "fill": lambda: two_kernels.fill_kernel[(1,)](x, SIZE=16)}}
            for name in {order!r}:
                launch[name]()
            assert len(hashes) == len(hits) == 2
            print(hits.count(False))
        """
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        return int(subprocess.run(python(program), stdout=subprocess.PIPE, text=True, check=True,
                                  env={**environment, "TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}).stdout)

    assert compilations(tmp_path / "ahead", ["scale", "fill"]) == 2
    kernels, size = ahead.tidy(tmp_path / "ahead")
    assert kernels == 2 and size < 2**17
    assert ahead.seed(tmp_path / "ahead", tmp_path / "there") == 2
    (tmp_path / "ahead").rename(tmp_path / "elsewhere")
    assert compilations(tmp_path / "there", ["fill", "scale"]) == 0


@pytest.mark.slow
def test_the_first_calls_tests_compile_at_most_150_kernels(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run([sys.executable, "-m", "pytest", *kit.CORE_TESTS, "-q", "-p", "benchmarks.gpu.specialisations", "-p",
                           "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True,
                          env={**env, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "NANOGPT_FAST_EXAMPLES": "1",
                               "NANOGPT_FAST_SPECIALISATIONS": str(tmp_path / "keys")})
    assert done.returncode == 0, done.stdout[-2000:]
    keys = set((tmp_path / "keys").read_text().splitlines())
    assert 50 < len(keys) <= 150, done.stdout[-1000:]


@pytest.mark.parametrize("words", ((), ("--help",)))
def test_the_kits_script_shows_its_usage(words):
    done = subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu.sh"), *words], capture_output=True, text=True)
    assert done.returncode == 2 and "benchmarks/gpu.sh DIR [all|first|second|rest]" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("part", ("first", "second", "rest"))
def test_the_whole_kit_runs_dry_on_a_cpu(part, tmp_path):
    """Each stage as far as a CPU goes: what fails there for want of a GPU is a record that says so, and nothing is lost."""
    done = subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out"), part, "8"], capture_output=True, text=True,
                          env={**os.environ, "NANOGPT_FAST_DRY_RUN": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})
    out = tmp_path / "out"
    assert {"log.txt", "results.jsonl", "stages.jsonl", "summary.txt", "more.tar.gz"} <= {path.name for path in out.iterdir()}, done.stdout
    ended = {row["stage"]: row["how"] for row in map(json.loads, (out / "stages.jsonl").read_text().splitlines())}
    assert ended["build"] == ended["warm baby" if part == "rest" else "warm 64"] == "passed"
    assert all(how == "passed" for name, how in ended.items() if name.startswith(("train", "sweep", "generate", "kernels", "baby")))
    assert "== summary" in done.stdout
