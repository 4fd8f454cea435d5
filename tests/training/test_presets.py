"""Presets, nanoGPT's config files by name, and what a run is where nothing says how large it is to be."""
import dataclasses
import os
import tomllib
from pathlib import Path

import pytest
import tiny
import torch

from nanogpt_fast import cli, devices
from nanogpt_fast.training import presets, trainer
from nanogpt_fast.training.options import TrainOptions


def parse(*argv):
    return presets.parse(list(argv), "prog")


def different(o):
    """{name: value} of what is not nanoGPT's default."""
    return {field.name: getattr(o, field.name) for field in dataclasses.fields(TrainOptions) if getattr(o, field.name) != field.default}


@pytest.fixture(params=["cpu", "mps"])
def without_a_gpu(request, monkeypatch):
    monkeypatch.setattr(devices, "choose_device", lambda name="auto": torch.device(request.param))


LAPTOP = dict(dataset="embedded", n_layer=4, n_head=4, n_embd=128, block_size=64, gradient_accumulation_steps=1, max_iters=2000,
              lr_decay_iters=2000, learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, beta2=0.99, eval_interval=250, eval_iters=20,
              log_interval=10, always_save_checkpoint=False)


@pytest.mark.parametrize("name, parameters", [("laptop", 0.8e6), ("baby", 10.6e6), ("gpt2", 85e6)])
def test_a_preset_is_found_by_its_name(name, parameters):
    o = parse(f"--preset={name}")
    assert 12 * o.n_layer * o.n_embd**2 == pytest.approx(parameters, rel=0.02) and o.lr_decay_iters == o.max_iters


@pytest.mark.parametrize("argv", [("--preset=laptop", "--max_iters=300", "--data=my.txt"),
                                  ("--max_iters=300", "--data=my.txt", "--preset", "laptop")])
def test_what_is_typed_wins_over_a_preset_wherever_it_stands(argv):
    assert different(parse(*argv)) == {**LAPTOP, "max_iters": 300, "lr_decay_iters": 300, "dataset": "my.txt"}
    assert parse(*argv, "--lr_decay_iters=200").lr_decay_iters == 200


def test_a_config_file_runs_after_a_preset(tmp_path):
    (tmp_path / "mine.py").write_text("n_layer = n_layer + 1\n")
    assert parse(str(tmp_path / "mine.py"), "--preset=laptop").n_layer == 5


def test_lr_is_the_learning_rate():
    assert parse("--preset=laptop", "--lr=0.01").learning_rate == 0.01


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="preset is 'labtop'; expected .*laptop.*; the nearest is 'laptop'"):
        parse("--preset=labtop")


# ----------------------------------------------------------------------------------------------------------- without a GPU

@pytest.mark.parametrize("argv", [(), ("--data=my.txt",), ("--out_dir=out-mine", "--seed=2")])
def test_without_a_gpu_a_run_of_which_nobody_says_how_large_it_is_is_the_laptops(argv, without_a_gpu, capsys):
    given = {word[2:].partition("=")[0]: word.partition("=")[2] for word in argv}
    given = {{"data": "dataset"}.get(name, name): int(value) if value.isdigit() else value for name, value in given.items()}
    assert different(parse(*argv)) == {**LAPTOP, **given}
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "no CUDA GPU" in printed and "--preset=laptop" in printed and "--preset=gpt2" in printed


@pytest.mark.parametrize("argv", [("--device=cpu",), ("--n_layer=12",), ("--batch_size=12",), ("--init_from=gpt2",), ("--preset=gpt2",),
                                  ("config/train_gpt2.py",)])
def test_what_nanogpt_gives_a_meaning_keeps_it(argv, without_a_gpu, capsys):
    o = parse(*argv)
    assert (o.n_layer, o.n_embd, o.batch_size, o.max_iters, o.learning_rate) == (12, 768, 12, 600_000, 6e-4)
    assert "laptop" not in capsys.readouterr().out


def test_with_a_gpu_the_defaults_are_nanogpts(monkeypatch):
    monkeypatch.setattr(devices, "choose_device", lambda name="auto": torch.device("cuda"))
    assert different(parse("--data=my.txt")) == {"dataset": "my.txt"}


def test_torchruns_ranks_keep_nanogpts_defaults(without_a_gpu, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert different(parse("--data=my.txt")) == {"dataset": "my.txt"}


# ----------------------------------------------------------------------------------------------------- nanoGPT's config files

def test_nanogpts_config_files_are_found_in_a_folder_that_has_none_and_never_instead_of_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in presets.NANOGPTS:
        assert parse(name).configs == (str(presets.NANOGPTS[name]),)
        assert f"{name}: there is none here; taken from " in capsys.readouterr().out
    Path("config").mkdir()
    Path("config/train_gpt2.py").write_text("max_iters = 7\n")
    assert parse("config/train_gpt2.py").max_iters == 7 and capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError, match="no config file 'config/train_llama.py'"):
        parse("config/train_llama.py")


@pytest.mark.skipif(not os.environ.get("NANOGPT_DIR"), reason="NANOGPT_DIR names no nanoGPT checkout")
@pytest.mark.parametrize("name", presets.NANOGPTS)
def test_nanogpts_config_files_have_its_values(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, theirs = parse(name), parse(os.path.join(os.environ["NANOGPT_DIR"], name))
    ours.wandb_run_name = theirs.wandb_run_name = ""    # one has the time in it
    assert ours == theirs and ours.given == theirs.given | (ours.given & {"dropout"})


def test_the_baby_preset_is_nanogpts_baby_on_any_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpts = different(parse("config/train_shakespeare_char.py", "--data=embedded", "--out_dir=out"))
    assert different(parse("--preset=baby")) == {name: value for name, value in nanogpts.items() if not name.startswith("wandb")}


def test_the_config_files_are_installed_with_the_package():
    project = tomllib.loads((Path(cli.__file__).parents[1] / "pyproject.toml").read_text())
    assert f"nanogpt_fast.{presets.FOLDER.name}" in project["tool"]["setuptools"]["packages"]
    assert {presets.FOLDER / f"{name}.py" for name in presets.PRESETS} | set(presets.NANOGPTS.values()) == set(presets.FOLDER.glob("*.py"))


def test_a_preset_trains_and_its_checkpoint_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text(tiny.TEXT)
    words = ["--preset=laptop", "--data=my.txt", "--n_layer=1", "--n_embd=32", "--max_iters=2", "--eval_iters=1", "--sample_tokens=0"]
    assert trainer.run([*words, "--device=cpu"]) == 0
    assert trainer.run(["--out_dir=out", "--init_from=resume", "--max_iters=3"]) == 0
    config = torch.load("out/last.pt", weights_only=True)["config"]
    assert (config["max_iters"], config["learning_rate"], config["n_embd"], config["batch_size"]) == (3, 1e-3, 32, 12)
