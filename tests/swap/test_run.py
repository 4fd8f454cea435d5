"""`nanogpt-fast run`: a checkout's scripts unedited. The checkout is tests/checkout, copied; the one that NANOGPT_DIR names as well."""
import csv
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch

from nanogpt_fast import cli
from nanogpt_fast.swap import run

HERE = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of tests/checkout as the current folder; what `run` sets in this process is undone afterwards."""
    for name in ("model.py", "train.py"):
        shutil.copy(HERE / "checkout" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "model", None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def status_of(words):
    """The exit status of the command in this process, as a shell would see it."""
    try:
        return cli.main(["run", *words])
    except SystemExit as stop:
        return stop.code


def losses(text):
    return re.findall(r"loss (\S+)", text)


def edit(checkout, old, new):
    path = checkout / "model.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def plainly(capfd, *words):
    """The losses that `python train.py` prints."""
    sys.argv[:], sys.path[:1] = ["train.py", *words], [""]
    sys.modules.pop("model", None)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        runpy.run_path("train.py", run_name="__main__")
    out = capfd.readouterr().out
    assert " model\n" in out
    return losses(out)


def test_the_script_gets_our_classes_its_arguments_and_its_exit_status(checkout, capfd):
    assert status_of(["train.py", "--max_iters=4", "--status=7"]) == 7
    out = capfd.readouterr().out
    assert out.splitlines()[0] == (f"nanogpt-fast: train.py runs on {checkout}/model.py with nanogpt_fast's classes in place of its own, "
                                   "backend auto")
    assert out.count("nanogpt-fast:") == 1 and out.count("nanogpt_fast.model") == 4
    assert losses(out) == plainly(capfd, "--max_iters=4")


def test_what_else_model_py_defines_stays(checkout):
    edit(checkout, "import inspect", "import inspect\nEXTRA = 'kept'\ndef helper():\n    return GPT")
    (checkout / "train.py").write_text("import model\nassert model.EXTRA == 'kept' and model.helper() is model.GPT\n"
                                       "assert model.GPT.__module__ == 'nanogpt_fast.model'")
    assert status_of(["train.py"]) == 0


@pytest.mark.parametrize("word,expected", [("--backend=reference", "reference"), ("--backend=auto,attention=reference", "auto,attention=reference")])
def test_backend_is_ours_before_and_after_the_script(checkout, capfd, word, expected):
    for words in ([word, "train.py"], ["train.py", word]):
        assert status_of(words) == 0
        assert f"backend {expected}\n" in capfd.readouterr().out


def test_backend_gloo_is_the_scripts_own(checkout, capfd):
    (checkout / "train.py").write_text("import sys, model\nprint(sys.argv)")
    assert status_of(["train.py", "--backend=gloo", "config.py", "--a=b c"]) == 0
    assert "['train.py', '--backend=gloo', 'config.py', '--a=b c']" in capfd.readouterr().out


def test_an_error_in_the_script_is_shown_as_python_shows_it(checkout, capfd):
    assert status_of(["train.py", "--max_iters=1", "--status=99"]) == 1
    err = capfd.readouterr().err
    assert "OSError: the disk is full" in err and 'File "train.py"' in err and "nanogpt_fast/swap/run.py" not in err


@pytest.mark.parametrize("words,message", [
    ([], None), (["train.py", "--compare", "x"], "--compare takes the number of steps"), (["nowhere.py"], "there is no script nowhere.py"),
    (["--fast", "train.py"], "--fast stands before the script"), (["--backend=quick", "train.py"], "'quick' is not one of"),
    (["--backend=auto"], "no script is given")])
def test_what_cannot_be_is_one_line(checkout, capfd, words, message):
    assert status_of(words) == (0 if message is None else 2)
    out, err = capfd.readouterr()
    assert "usage: nanogpt-fast run" in out if message is None else message in err and len(err.splitlines()) == 1


def test_without_a_model_py_it_says_so(checkout, capfd):
    (checkout / "model.py").unlink()
    assert status_of(["train.py"]) == 2 and "there is no" in capfd.readouterr().err


# Forks: their classes stay

@pytest.mark.parametrize("old,new,reason", [
    ("is_causal=True)", "is_causal=True, scale=0.1)", "logits differ"),
    ("std=0.02 / math.sqrt", "std=0.01 / math.sqrt", "initial weights differ"),
    ("    bias: bool = True", "    bias: bool = True\n    rope: bool = False", "its GPTConfig has other fields or defaults: rope"),
    ("    @torch.no_grad()", "    def speak(self):\n        pass\n\n    @torch.no_grad()", "its GPT has speak, ours does not"),
    ("        return idx\n", "        return idx.flip(1)\n", "generated tokens differ"),
    ("class MLP", "class Mlp", "it defines no MLP"),
    # What random numbers of order one, 17 tokens and a short text do not meet.
    ("in self.c_attn(x).split", "in self.c_attn(x).clamp(-99, 99).split", "its forward does more than nanoGPT's: clamp"),
    ("self.gelu(self.c_fc(x))", "self.gelu(self.c_fc(x)).clamp(max=1e3)", "its forward does more than nanoGPT's: clamp"),
    ("        logits = self.lm_head(x)\n", "        logits = self.lm_head(x)\n        targets = targets.masked_fill(targets == 50256, -1)\n",
     "its forward does more than nanoGPT's: eq"),
    ("            idx = torch.cat", "            logits = logits.nan_to_num()\n            idx = torch.cat", "its generate does more than nanoGPT's: nan_to_num"),
    ("        x = self.transformer.ln_f(x)\n", "        x = self.transformer.ln_f(x)\n        self.last = x\n", "it sets GPT.last, ours does not"),
    ("        x = self.transformer.ln_f(x)\n", "        x = self.transformer.ln_f(x)\n        self.__dict__.setdefault('n', [0])[0] += 1\n",
     "it sets GPT.n, ours does not"),
    ("        self.config = config\n", "        self.config = config\n        self.note = 3\n", "it sets GPT.note, ours does not"),
    ("lr=learning_rate, betas", "lr=learning_rate, eps=1e-6, betas", "its optimizer's groups differ"),
    ("if p.dim() < 2], \"weight_decay\": 0.0}", "if p.dim() < 2], \"weight_decay\": 0.01}", "its optimizer's groups differ"),
])
def test_a_fork_that_differs_is_found_out(checkout, monkeypatch, old, new, reason):
    edit(checkout, old, new)
    monkeypatch.setattr(forks, "CHECKOUT", checkout)
    assert reason in run.why_not_ours(forks.module())


def test_the_checkouts_model_is_found_equal_to_ours():
    assert run.why_not_ours(forks.module()) is None


def test_a_fork_that_masks_in_place_is_equal_too(checkout, monkeypatch):
    """PyTorch from 2.15 on does the same for `logits[mask] = number`."""
    edit(checkout, "logits[logits < torch.topk(logits, min(top_k, logits.size(-1)))[0][:, [-1]]] = -float(\"inf\")",
         "logits.masked_fill_(logits < torch.topk(logits, min(top_k, logits.size(-1)))[0][:, [-1]], -float(\"inf\"))")
    monkeypatch.setattr(forks, "CHECKOUT", checkout)
    assert run.why_not_ours(forks.module()) is None


def test_a_fork_keeps_its_classes_and_is_accelerated(checkout, capfd):
    edit(checkout, "self.gelu = nn.GELU()", "self.gelu = nn.SiLU()")
    expected = plainly(capfd)
    assert status_of(["train.py"]) == 0
    out = capfd.readouterr().out
    assert "its own classes, accelerated (its logits differ from nanoGPT's)" in out
    assert "swapped      2 x attention (CausalSelfAttention)" in out and "mlp (MLP): its activation is a SiLU" in out
    assert losses(out) == expected


def test_a_fork_that_keeps_its_last_activations_runs(checkout, capfd):
    edit(checkout, "        x = self.transformer.ln_f(x)\n", "        x = self.transformer.ln_f(x)\n        self.last = x\n")
    (checkout / "train.py").write_text("import torch\nfrom model import GPT, GPTConfig\n"
                                       "model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8))\n"
                                       "assert not hasattr(model, 'last')\nmodel(torch.zeros(1, 3, dtype=torch.long))\nprint(model.last.shape)")
    assert status_of(["train.py"]) == 0
    out = capfd.readouterr().out
    assert "torch.Size([1, 3, 8])" in out and "accelerated (it sets GPT.last, ours does not)" in out


@pytest.mark.parametrize("classes", ["equal to ours", "of its own"])
def test_module_names_the_module_with_the_classes(checkout, capfd, monkeypatch, classes):
    if classes == "of its own":
        edit(checkout, "self.gelu = nn.GELU()", "self.gelu = nn.SiLU()")
    (checkout / "models").mkdir()
    (checkout / "model.py").rename(checkout / "models" / "gpt.py")
    monkeypatch.setitem(sys.modules, "models", None), monkeypatch.setitem(sys.modules, "models.gpt", None)
    sys.modules.pop("models")
    train = checkout / "train.py"
    train.write_text(train.read_text().replace("from model import", "from models.gpt import"))
    assert status_of(["train.py"]) == 2 and "unless --module names another" in capfd.readouterr().err
    assert status_of(["--module=models.gpt", "train.py", "--max_iters=2"]) == 0
    out = capfd.readouterr().out
    assert f"runs on {checkout}/models/gpt.py with " in out and len(losses(out)) == 2
    assert ("nanogpt_fast's classes in place of its own" in out) == (classes == "equal to ours")
    assert status_of(["--module", "models/gpt.py", "train.py"]) == 2 and "such as models.gpt; got 'models/gpt.py'" in capfd.readouterr().err


def test_a_module_without_a_gpt_says_so(checkout, capfd):
    edit(checkout, "class GPT(nn.Module)", "class Transformer(nn.Module)")
    assert status_of(["train.py"]) == 2 and "defines no class GPT" in capfd.readouterr().err


# --compare

def test_compare_prints_equal_losses_and_both_speeds(checkout, capfd):
    assert status_of(["train.py", "--compare", "3", "--max_iters=9"]) == 0
    out = capfd.readouterr().out
    rows = re.findall(r"^ +(\d) +(\d\.\d{8}) +(\d\.\d{8}) +(\S+)$", out, re.M)
    assert [row[0] for row in rows] == ["0", "1", "2"] and all(row[1] == row[2] for row in rows)
    assert re.search(r"losses +equal, bit for bit", out) and out.count("tokens/s") == 2
    assert status_of(["--format=csv", "train.py", "--compare", "2", "--max_iters=9"]) == 0
    out, err = capfd.readouterr()
    assert list(csv.DictReader(out.splitlines()))[1].keys() == {"step", "model.py", "nanogpt_fast", "difference"} and "bit for bit" in err
    assert status_of(["--format=html", "train.py"]) == 2
    assert "--format is 'html'; expected one of text, markdown, csv" in capfd.readouterr().err


def test_compare_of_a_fork_counts_the_scripts_backwards_alone(checkout, capfd):
    """The fork keeps its classes; the trial of their parts at the first call has a backward of its own, which is no step's loss."""
    edit(checkout, "    @torch.no_grad()", "    def speak(self):\n        pass\n\n    @torch.no_grad()")
    assert status_of(["train.py", "--compare", "3", "--max_iters=9"]) == 0
    assert re.search(r"losses +equal, bit for bit", capfd.readouterr().out)


def test_compare_of_a_script_that_does_not_train_says_so(checkout, capfd):
    (checkout / "train.py").write_text("print('no steps')")
    assert status_of(["train.py", "--compare=2"]) == 2
    assert "no steps" in (err := capfd.readouterr().err) and "after 0 of 2 optimizer steps" in err


# torchrun, and a real checkout

@pytest.mark.slow  # two processes
def test_two_ranks_under_torchrun(checkout, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    both = subprocess.run([*command, "-m", "nanogpt_fast", "run", "train.py", "--backend=gloo"], cwd=checkout, env=env, capture_output=True,
                          text=True, timeout=120)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("nanogpt-fast: train.py runs on") == 1 and both.stdout.count("nanogpt_fast.model") == 6


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_without(checkout):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    plain, ours = (subprocess.run([*command, *words], cwd=checkout, env=env, capture_output=True, text=True, timeout=120).stdout
                   for words in (["train.py"], ["-m", "nanogpt_fast", "run", "train.py"]))
    figures = lambda text: sorted((rank, it, round(float(loss), 5)) for rank, it, loss in re.findall(r"rank (\d) iter (\d): loss (\S+)", text))
    assert figures(plain) == figures(ours) and len(figures(ours)) == 6


REAL = os.environ.get("NANOGPT_DIR")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="NANOGPT_DIR names no nanoGPT checkout")
def test_upstreams_three_scripts_run_unedited_and_train_alike(checkout, capfd):
    for name in ("train.py", "sample.py", "bench.py", "model.py", "configurator.py"):
        shutil.copy(Path(REAL, name), checkout)
    text = "".join(f"{i} times {i} is {i * i}\n" for i in range(3000))
    from nanogpt_fast.text import prepare
    prepare.write(text, checkout / "data" / "sums", "char", say=lambda _: None)
    small = ["--dataset=sums", "--device=cpu", "--compile=False", "--eval_iters=1", "--eval_interval=5", "--log_interval=1", "--block_size=16",
             "--batch_size=2", "--n_layer=2", "--n_head=2", "--n_embd=32", "--max_iters=6", "--dtype=float32",
             "--gradient_accumulation_steps=2"]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    scripts = [["train.py", *small], ["sample.py", "--device=cpu", "--compile=False", "--num_samples=1", "--max_new_tokens=20", "--start=t"],
               ["bench.py", "--compile=False", "--real_data=False", "--batch_size=1", "--block_size=16"]]
    for words in scripts[:2]:
        outputs = []
        for command in ([], ["-m", "nanogpt_fast", "run"]):
            done = subprocess.run([sys.executable, *command, *words], cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            outputs.append(re.sub(r"time .*|using fused.*|nanogpt-fast: .*\n", "", done.stdout))
        assert outputs[0] == outputs[1]
    assert status_of([*scripts[0], "--compare=4"]) == 0
    assert "float32's rounding" in (out := capfd.readouterr().out) or "bit for bit" in out
    if torch.cuda.is_available():  # it synchronises with CUDA, whatever its --device
        assert status_of(scripts[2]) == 0
        assert "time per iteration" in capfd.readouterr().out
