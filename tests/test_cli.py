"""The command line itself: which commands there are, how fast help is, and that an error is one line and an exit status."""
import contextlib
import dataclasses
import importlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

import numpy as np
import pytest
import torch

import nanogpt_fast
from nanogpt_fast import cli, options
from nanogpt_fast.text import tokens


def command(*argv, **environment):
    return subprocess.run([sys.executable, "-m", "nanogpt_fast", *argv], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def raising(error):
    def run(argv):
        raise error
    return run


def test_help_lists_the_commands(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("prepare", "train", "sample", "chat", "eval"):
        assert f"\n  {name} " in text


def test_every_listed_command_can_be_called():
    from importlib import import_module
    for name, (module, function, _) in cli.COMMANDS.items():
        found = getattr(import_module(f"nanogpt_fast.{module}"), function, None)
        assert callable(found), f"{name}: nanogpt_fast.{module}.{function}"


@pytest.mark.parametrize("name", ["prepare", "train", "sample", "chat", "eval"])
def test_every_command_has_help_that_lists_its_options(name, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and text.startswith(f"usage: nanogpt-fast {name}") and text.count("\n  --") >= 5
    assert max(map(len, text.splitlines())) <= 128


def test_help_waits_for_nothing_heavy():
    code = ("import sys, nanogpt_fast.cli\nassert nanogpt_fast.cli.main(['--help']) == 0\n"
            "sys.exit(any(heavy in sys.modules for heavy in ('torch', 'numpy', 'triton', 'matplotlib')))")
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_the_console_script_and_the_module_are_the_same_function():
    try:
        version("nanogpt-fast")
    except PackageNotFoundError:
        pytest.skip("the package runs from its source tree and is not installed")
    script, = entry_points(group="console_scripts", name="nanogpt-fast")
    assert script.load() is cli.main
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"nanogpt-fast {nanogpt_fast.__version__}\n")


def test_an_unknown_command_names_the_nearest():
    done = command("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nanogpt-fast: no command 'trian'; the nearest is train (`nanogpt-fast --help` lists them all)\n"


def test_a_word_that_is_far_from_every_command_gets_no_guess(capsys):
    assert cli.main(["explain"]) == 2
    assert capsys.readouterr().err == "nanogpt-fast: no command 'explain' (`nanogpt-fast --help` lists them all)\n"


def test_the_demos_help_is_its_own_and_names_what_it_trains(capsys):
    assert cli.main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: nanogpt-fast demo") and "--out_dir=out-demo" in text and "--max_iters=2000" in text
    assert max(map(len, text.splitlines())) <= 140


def test_a_mistake_is_one_line_and_status_2():
    done = command("prepare", "--tokenzier=char")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("nanogpt-fast prepare: unknown option --tokenzier; the nearest is --tokenizer "
                           "(`nanogpt-fast prepare --help` lists them all)\n")


def test_the_traceback_is_there_for_who_asks():
    done = command("prepare", "--tokenzier=char", NANOGPT_FAST_TRACEBACK="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "options.py" in done.stderr


def test_training_without_data_says_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--dataset=nowhere", "--device=cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no data set 'nowhere'" in err and "Corpora: embedded, shakespeare" in err


# Should one of these train all the same, it does not take long.
TINY = ("--device=cpu", "--n_layer=1", "--n_embd=12", "--max_iters=1", "--eval_iters=1", "--gradient_accumulation_steps=1",
        "--compile=False")


@pytest.mark.parametrize("argument, message", [
    ("--n_head=5", "n_embd is 12, not divisible by n_head, 5"),
    ("--dropout=1.5", "dropout is 1.5; expected float, at least 0, below 1"),
    ("--block_size=0", "block_size is 0; expected int, at least 1"),
    ("--learning_rat=1", "unknown option --learning_rat; the nearest is --learning_rate"),
    ("--max_iters=1.5", "max_iters is 1.5 (float); expected int"),
    ("--block_size=2000", "holds 1,161 tokens; with block_size 2000 it must hold at least 2,001"),
])
def test_training_options_that_cannot_be_are_one_line(tmp_path, monkeypatch, capsys, argument, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("To be, or not to be, that is the question.\n" * 30)
    assert cli.main(["train", "--data=my.txt", *TINY, argument]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("nanogpt-fast train: ")


@pytest.mark.parametrize("words, environment, message", [
    (["my.txt"], {}, "a text to train on: --data=FILE"),
    (["latin1.py"], {}, "config file latin1.py is not UTF-8: byte 0xf6 at position 4"),
    (["."], {}, "'.' is a folder, not a config file"),
    (["--out_dir=my.txt"], {}, "--out_dir=my.txt: no folder can be made there (File exists)"),
    (["--out_dir=my.txt/x"], {}, "--out_dir=my.txt/x: no folder can be made there (Not a directory)"),
    (["--data_dir=my.txt"], {}, "my.txt/my: no folder can be made there (Not a directory)"),
    (["--data=my.txt,nofile.txt"], {}, "there is no file 'nofile.txt'"),
    (["--data=no/*.txt"], {}, "no file matches 'no/*.txt'"),
    (["--out_dir=foreign", "--init_from=resume"], {}, "foreign/last.pt is a torch file, but not a nanoGPT checkpoint"),
    (["--seed=99999999999999999999999"], {}, "expected int, of 64 bits at most"),
    (["--learning_rate=nan"], {}, "learning_rate is nan; expected a finite number"),
    (["--learning_rate=+-nan"], {}, "learning_rate is '+-nan' (str); expected float"),
    ([], {"RANK": "0"}, "LOCAL_RANK is not set, and RANK is '0'; torchrun sets"),
    ([], {"RANK": "abc"}, "RANK is 'abc'; torchrun sets"),
])
def test_what_a_newcomer_may_type_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, capsys, words, environment, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("To be, or not to be, that's the question.\n" * 30)
    (tmp_path / "latin1.py").write_bytes(b"# Gr\xf6sse\n")
    (tmp_path / "foreign").mkdir()
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "foreign" / "last.pt")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--data=my.txt", *TINY, "--n_head=2", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("nanogpt-fast train: ")


def test_a_backend_of_the_environment_is_named_with_its_variable():
    done = command("sample", NANOGPT_FAST_BACKEND="attention=foo")
    assert done.returncode == 2 and "NANOGPT_FAST_BACKEND: backend 'attention=foo': 'foo' is not one of" in done.stderr


@pytest.mark.parametrize("name", ["../other", "..", "a/b", "/tmp/x"])
def test_a_data_sets_name_is_no_path(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "embedded", f"--name={name}"]) == 2
    assert f"name is {name!r}; expected the name of a folder without a path" in capsys.readouterr().err


@pytest.mark.parametrize("name, damage, message", [
    ("meta.pkl", lambda whole: whole[:40], "meta.pkl: neither a tokenizer's JSON nor a readable meta.pkl"),
    ("meta.pkl", lambda whole: b"cos\nsystem\n(S'true'\ntR.", "meta.pkl: refused: it imports os.system"),
    ("train.bin", lambda whole: whole[:-1], "train.bin is 2,321 bytes long, which is not a whole number of 16-bit tokens"),
    ("train.bin", lambda whole: b"\x00\x01" * len(whole), "train.bin holds token 256 at position 0"),
    ("train.bin", lambda whole: whole[:-2] + b"\x00\x01", "train.bin holds token 256 at position 1160"),
    ("val.bin", lambda whole: whole[:-2] + b"\x00\x01", "val.bin holds token 256 at position 128"),
])
def test_training_on_damaged_data_is_one_line(tmp_path, monkeypatch, capsys, name, damage, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("To be, or not to be, that is the question.\n" * 30)
    assert cli.main(["prepare", "my.txt"]) == 0
    path = tmp_path / "data/my" / name
    path.write_bytes(damage(path.read_bytes()))
    assert cli.main(["train", "--data=my", *TINY, "--block_size=8"]) == 2
    assert not (tmp_path / "out/metrics.jsonl").exists()      # before the run begins
    err = capsys.readouterr().err
    assert message in err and err.count("nanogpt-fast train: ") == 1 and "Traceback" not in err


OPTIONS = {  # the parser of every command that takes options
    "demo": "training.presets.TrainCommand", "train": "training.presets.TrainCommand", "prepare": "text.prepare.PrepareOptions",
    "sample": "commands.sampling.SampleOptions", "chat": "commands.sampling.ChatOptions", "ladder": "commands.ladder.LadderOptions",
    "eval": "commands.evaluate.EvalOptions", "doctor": "checks.doctor.DoctorOptions", "convert": "checkpoints.convert.ConvertOptions", "verify": "checks.verify.VerifyOptions",
    "bench train": "bench.train.BenchTrainOptions", "bench generate": "bench.generate.BenchGenerateOptions",
    "bench loss": "bench.loss.BenchLossOptions", "tune": "tuning.command.TuneOptions", "bench op": "bench.op.BenchOpOptions"}


def test_every_command_that_takes_options_is_listed():
    assert {name.split()[0] for name in OPTIONS} == set(cli.COMMANDS) - {"run"}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_value_of_any_option_is_a_traceback(name, monkeypatch, capsys):
    """Each is refused in one line, or becomes a value that the rest of the program can take: a number of 64 bits, a text that is a path."""
    module, _, cls = f"nanogpt_fast.{OPTIONS[name]}".rpartition(".")
    cls = getattr(importlib.import_module(module), cls)
    needed, parsed = ["a", "b"] if name == "convert" else [], []
    monkeypatch.setitem(cli.COMMANDS, "fuzzed", ("options", "parsed", ""))
    monkeypatch.setattr(options, "parsed", lambda argv: parsed.append(options.parse(cls, argv, "fuzzed")), raising=False)
    for field in dataclasses.fields(cls):
        for value in ("9" * 400, "-" + "9" * 400, "9" * 5000, "9" * 30, "9" * 19, "1e308", "1e999", "nan", "-1", "[1]", "(" * 3000, "",
                      "a\0b", "x\ud800y", "x\udc80y"):
            parsed.clear()
            status = cli.main(["fuzzed", *needed, f"--{field.name}={value}"])
            err = capsys.readouterr().err
            assert (status, len(parsed), err.count("\n")) in ((2, 0, 1), (0, 1, 0)) and len(err) < 2200, (field.name, value[:20], err[:2000])
            if status == 0:
                found = getattr(parsed[0], field.name)
                assert not isinstance(found, int) or -2**63 <= found < 2**63
                assert not isinstance(found, str) or b"\0" not in os.fsencode(found)


@pytest.mark.parametrize("path, message", [("a\0b.py", "the config file is 'a\\x00b.py'; expected a text without the NUL character"),
                                           ("x\ud800.py", "half of a surrogate pair, '\\ud800', is none")])
def test_a_config_file_whose_name_cannot_be_a_path_is_one_line(path, message, capsys):
    assert cli.main(["train", path]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("argument", ["--n_embd=24000000000", "--block_size=900000000000", "--n_embd=1200000000000000000"])
def test_more_than_the_memory_is_one_line(tmp_path, monkeypatch, capsys, argument):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("To be, or not to be, that is the question.\n" * 30)
    monkeypatch.setattr(tokens, "open_tokens", lambda path, block_size: np.zeros(9, np.uint16))     # as long as it has to be
    assert cli.main(["train", "--data=my.txt", *TINY, argument]) == 2
    err = capsys.readouterr().err
    assert "out of memory: a smaller model, batch, context or text needs less (" in err and err.count("nanogpt-fast train: ") == 1


def test_python_itself_out_of_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("nanogpt_fast.text.prepare.main", raising(MemoryError()))
    assert cli.main(["prepare"]) == 2
    assert "out of memory" in capsys.readouterr().err


def test_a_very_long_error_keeps_its_two_ends(monkeypatch, capsys):
    monkeypatch.setattr("nanogpt_fast.text.prepare.main", raising(FileNotFoundError(f"no file {'x' * 9000}: look elsewhere")))
    assert cli.main(["prepare"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nanogpt-fast prepare: no file x") and err.endswith("x: look elsewhere\n") and len(err) < 2100


def test_an_error_that_this_package_did_not_raise_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("nanogpt_fast.text.prepare.main", raising(ValueError("a bug")))  # raised in this file
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["prepare"])


def test_what_the_operating_system_refuses_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("nanogpt_fast.text.prepare.main", raising(PermissionError(13, "Permission denied", "data")))
    assert cli.main(["prepare"]) == 2
    assert capsys.readouterr().err == "nanogpt-fast prepare: [Errno 13] Permission denied: 'data'\n"


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("nanogpt_fast.text.prepare.main", raising(KeyboardInterrupt()))
    assert cli.main(["prepare"]) == 130
    assert capsys.readouterr().err == "\nnanogpt-fast prepare: interrupted\n"


def test_the_exit_status_of_a_command_is_handed_on(monkeypatch):
    monkeypatch.setattr("nanogpt_fast.text.prepare.main", lambda argv: 143)
    assert cli.main(["prepare"]) == 143


@pytest.mark.parametrize("argv", [("prepare", "--help"), ("train", "--help"), ("--help",), ("--version",)])
def test_a_reader_that_leaves_early_is_no_error(argv):
    reader, writer = os.pipe()
    os.close(reader)    # before anything is written
    done = subprocess.run([sys.executable, "-m", "nanogpt_fast", *argv], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@contextlib.contextmanager
def without_a_reader():
    """Inside, stdout is a pipe whose reader has ended, as `| head -1` may have before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, contextlib.redirect_stdout(closed):
        yield


@pytest.mark.parametrize("name", ["", *cli.COMMANDS, "bench train", "bench generate", "bench loss", "bench op"])
def test_help_of_every_command_may_be_read_in_part(name, capsys):
    with without_a_reader():
        assert cli.main([*name.split(), "--help"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("module", ["nanogpt_fast.kernels.gate.__main__", "benchmarks.report"])
def test_help_of_a_module_that_is_run_may_be_read_in_part(module, capsys):
    main = pytest.importorskip(module, exc_type=ImportError).main     # the gate's needs Triton
    with without_a_reader():
        assert cli.until_nobody_reads(lambda: main(["--help"])) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_under_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "nanogpt_fast", "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "nanogpt-fast --help: [Errno 28] No space left on device\n")


def test_text_that_the_terminal_cannot_show_is_no_error():
    code = ("from nanogpt_fast import cli\nimport nanogpt_fast.text.prepare as p\n"
            "p.main = lambda argv: print('é漢')\ncli.main(['prepare'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, b"??\n"), done.stderr
