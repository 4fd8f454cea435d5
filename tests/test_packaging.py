"""What is shipped: the source archive, the wheel that is built from it, and what an installation says and imports."""
import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import nanogpt_fast
from nanogpt_fast.ops import extension

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {package: package.replace(".", "/").replace("nanogpt_fast/kernels", "kernels")
           for package in PROJECT["tool"]["setuptools"]["packages"]}
ENVIRONMENT = {**os.environ, "NANOGPT_FAST_CUDA": "0"}


def sources(*folders):
    """The files below these folders that a clone has, as paths from the root."""
    built = ("__pycache__", ".so", ".pyc", "_C_missing.txt")
    return {path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*")
            if path.is_file() and not any(part.endswith(built) for part in path.parts) and "nanogpt_fast/kernels" not in path.as_posix()}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """(the files of a source archive, the metadata): what setuptools would write."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("metadata")
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)], cwd=ROOT, env=ENVIRONMENT, check=True,
                   capture_output=True)
    (written,) = folder.glob("*.egg-info")
    return set((written / "SOURCES.txt").read_text().split("\n")), message_from_string((written / "PKG-INFO").read_text())


def test_the_source_archive_has_every_file_of_the_sources(metadata):
    needed = sources("nanogpt_fast", "kernels", "csrc", "docs", "benchmarks", "tests")
    needed |= {"LICENSE", "README.md", "Makefile", "mkdocs.yml", "setup.py", "pyproject.toml", "constraints.txt", "constraints-test.txt"}
    assert len(needed) > 200 and needed - metadata[0] == set()


def test_the_source_archive_has_nothing_that_was_built(metadata):
    assert [path for path in metadata[0] if path.endswith((".so", ".pyc", "_C_missing.txt"))] == []


def test_every_folder_with_modules_is_a_package_of_the_wheel():
    """An editable install imports a package that is not listed; a wheel does not."""
    assert {str(Path(path).parent) for path in sources("nanogpt_fast", "kernels") if path.endswith(".py")} == set(FOLDERS.values())


def test_every_file_that_is_no_module_is_package_data_or_a_readme():
    data = {f"{FOLDERS[package]}/{name}" for package, names in PROJECT["tool"]["setuptools"]["package-data"].items() for name in names}
    others = {path for path in sources("nanogpt_fast", "kernels") if not path.endswith((".py", "README.md"))}
    assert others == data


def test_the_long_description_links_to_no_file(metadata):
    text = metadata[1].get_payload()
    assert "](https://github.com/karpathy/nanoGPT)" in text and "docs/measured/loss.png in the source archive" in text
    assert text.count("](") == text.count("](https://")


def test_each_python_that_wheels_are_built_for_is_in_the_classifiers(metadata):
    built = {f"3.{build.removeprefix('cp3').split('-')[0]}" for build in PROJECT["tool"]["cibuildwheel"]["build"]}
    classifiers = [words.split(" :: ") for words in metadata[1].get_all("Classifier")]
    named = {words[-1] for words in classifiers if words[1] == "Python" and words[-1].startswith("3.")}
    assert built == named and "3.11" in built


def load_again(tmp_path):
    """ops/extension.py, executed once more as a file of another package, which has no extension."""
    (tmp_path / "ops").mkdir()
    path = shutil.copy(extension.__file__, tmp_path / "ops")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("nanogpt_fast.ops.again", path))
    module.__spec__.loader.exec_module(module)
    return module


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "nanogpt_fast._C", None)
    monkeypatch.delattr(nanogpt_fast, "_C", raising=False)


def test_without_the_extension_the_first_import_says_why_in_one_line(no_extension, tmp_path):
    (tmp_path / "_C_missing.txt").write_text("no C++ compiler was found; install one\nand what the compiler said\n")
    with pytest.warns(RuntimeWarning) as told:
        load_again(tmp_path)
    (line,) = [str(warning.message) for warning in told]
    assert "slower" in line and line.endswith("no C++ compiler was found; install one (`nanogpt-fast doctor` prints the command)")


def test_of_several_ranks_one_says_that_the_extension_is_missing(no_extension, tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert load_again(tmp_path)._C is None and len(recwarn) == 0


def test_a_model_needs_neither_matplotlib_nor_tqdm():
    code = """import sys; sys.modules.update(matplotlib=None, tqdm=None)
import torch, nanogpt_fast, nanogpt_fast.training.trainer
model = nanogpt_fast.GPT(nanogpt_fast.GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=16))
model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))[1].backward()"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_without_the_extension_a_model_compiles_whole():
    code = """import sys; sys.modules["nanogpt_fast._C"] = None
import torch, nanogpt_fast
model = nanogpt_fast.GPT(nanogpt_fast.GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=16))
x = torch.zeros(1, 8, dtype=torch.long)
assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x, x)[1], model(x, x)[1])"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source archive, unpacked where a wheel was built from it. Nothing is downloaded."""
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("built")
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder)], cwd=ROOT,
                   env=ENVIRONMENT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, unpacked],
                   env=ENVIRONMENT, check=True, capture_output=True)
    return unpacked


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_source_archive_builds_a_wheel_that_runs_outside_of_a_checkout(built, tmp_path):
    (wheel,) = built.parent.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """import sys, nanogpt_fast._C
from nanogpt_fast.checks import verify
from nanogpt_fast.kernels import gate
print(nanogpt_fast._C.__file__)
sys.exit(verify.main(["--quick", "--only=sample"]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path / "nanogpt_fast")), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("c++") is None, reason="needs a C++ compiler and binutils")
def test_code_for_one_instruction_set_shares_no_function_with_other_code(built):
    """The linker keeps one copy of an inline function: one compiled for AVX-512 would then run on every CPU."""
    objects = [path for path in glob.glob(f"{built}/build/temp*/**/*.o", recursive=True) if "avx" in os.path.basename(path)]
    if not objects:
        pytest.skip("this CPU's code has one instruction set")
    for path in objects:
        lines = subprocess.run(["nm", "--defined-only", path], check=True, capture_output=True, text=True).stdout.splitlines()
        assert [line for line in lines if line.split()[-2] in "WVu"] == [], path
