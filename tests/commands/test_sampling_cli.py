"""`sample` and `chat`: prompts in, text out, through the real command line; and what happens when something cannot be."""
import io
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from nanogpt_fast import GPT, GPTConfig, cli
from nanogpt_fast.checkpoints import nanogpt as checkpoint
from nanogpt_fast.commands import sampling
from nanogpt_fast.text.tokenizers import CharTokenizer

CHARS = "\n !,.?abcdefghijklmnopqrstuvwxyzé"
META = {"vocab_size": len(CHARS), "itos": dict(enumerate(CHARS)), "stoi": {c: i for i, c in enumerate(CHARS)}}
T = 16


def write_checkpoint(path, tokenizer="own", vocab_size=len(CHARS), **more):
    torch.manual_seed(0)
    with redirect_stdout(io.StringIO()):
        model = GPT(GPTConfig(block_size=T, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=16))
    content = dict(model=model.state_dict(), optimizer={}, model_args=checkpoint.model_args(model.config), iter_num=1,
                   best_val_loss=1.0, config={"dataset": "play"}, **more)
    if tokenizer == "own":
        content["tokenizer"] = CharTokenizer(CHARS).to_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(content, path)
    return model.eval()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_checkpoint(tmp_path / "out/ckpt.pt")


def run(*argv, stdin=""):
    """(exit status, stdout, stderr) of the command line."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = cli.main([*argv, "--device=cpu"])
    finally:
        sys.stdin = before
    return status, out.getvalue(), err.getvalue()


def fails(message, *argv):
    status, out, err = run(*argv)
    assert (status, out) == (2, "") and message in err and err.strip().splitlines()[-1].startswith("nanogpt-fast ") \
        and "Traceback" not in err, err


def nanogpts_text(trained, prompt, n):
    """What nanoGPT's sample.py prints: it seeds, builds the model, which draws from the same generator, and generates."""
    torch.manual_seed(1337)
    with redirect_stdout(io.StringIO()):
        model = GPT(trained.config)
    model.load_state_dict(trained.state_dict())
    ids = torch.tensor([[CHARS.index(c) for c in prompt]])
    for _ in range(n):
        logits = model.eval()(ids[:, -T:])[0][:, -1] / 0.8
        ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1)), dim=1)  # top_k=200 keeps all 33 characters
    return "".join(CHARS[i] for i in ids[0].tolist())


# ---------------------------------------------------------------------------------------------------------- sample

def test_one_sample_is_the_text_that_nanogpt_prints_for_the_same_seed(trained):
    status, out, err = run("sample", "--start=hi ", "--num_samples=1", "--max_new_tokens=40")
    assert status == 0 and out == nanogpts_text(trained, "hi ", 40) + "\n---------------\n"
    assert "40 tokens in" in err and "tokens/s" in err and "without the cache" not in err


@pytest.mark.parametrize("num_samples", [1, 2])
def test_without_the_cache_the_text_is_the_same_and_it_is_said(trained, monkeypatch, num_samples):
    words = ("sample", "--start=hi ", f"--num_samples={num_samples}", "--max_new_tokens=20")
    cached = run(*words)[1]
    monkeypatch.setattr("nanogpt_fast.generation.Session", None)  # none is made
    status, out, err = run(*words, "--cache=off")
    assert status == 0 and out == cached and "prompt included, without the cache" in err


def test_the_defaults_are_nanogpts(trained):
    o = sampling.SampleOptions()
    assert (o.init_from, o.out_dir, o.start, o.num_samples, o.max_new_tokens, o.temperature, o.top_k, o.seed, o.compile) == \
        ("resume", "out", "\n", 10, 500, 0.8, 200, 1337, False)
    _, out, err = run("sample", "--max_new_tokens=3")
    assert len(out.split("\n---------------\n")) == 11 and "30 tokens in" in err


def test_text_appears_as_it_is_drawn(trained, monkeypatch):
    pieces = []
    monkeypatch.setattr(sampling, "say", pieces.append)
    run("sample", "--start=a", "--num_samples=1", "--max_new_tokens=5")
    assert pieces[0] == "a" and [len(piece) for piece in pieces[1:6]] == [1] * 5


def test_several_samples_are_one_batch_and_differ(trained, monkeypatch):
    widths, original = [], GPT.generate

    def generate(self, ids, n, **more):
        widths.append(more["num_samples"])
        return original(self, ids, n, **more)

    monkeypatch.setattr(GPT, "generate", generate)
    _, out, _ = run("sample", "--num_samples=3", "--max_new_tokens=20")
    samples = out.split("\n---------------\n")[:-1]
    assert widths == [3] and len(set(samples)) == 3 and all(len(sample) == 21 for sample in samples)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(trained):
    texts = [run("sample", "--num_samples=2", "--max_new_tokens=20", f"--seed={seed}")[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_is_the_likeliest_token_whatever_the_seed(trained):
    ids = trained.generate(torch.zeros(1, 1, dtype=torch.long), 12, temperature=0)[0].tolist()
    expected = "".join(CHARS[i] for i in ids) + "\n---------------\n"
    for more in (("--greedy",), ("--temperature=0", "--seed=5"), ("--top_p=0",), ("--min_p=1",)):
        assert run("sample", "--num_samples=1", "--max_new_tokens=12", *more)[1] == expected


def test_a_prompt_comes_from_a_file_as_in_nanogpt(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("café au\nlait", encoding="utf-8")
    assert run("sample", "--start=FILE:prompt.txt", "--num_samples=1", "--max_new_tokens=1")[1].startswith("café au\nlait")
    fails("no prompt file nowhere.txt", "sample", "--start=FILE:nowhere.txt")
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    fails("prompt.txt is not UTF-8: byte 0xe9 at position 3", "sample", "--start=FILE:prompt.txt")


def test_stop_ends_every_sample_before_its_text(trained):
    three = ("sample", "--num_samples=3", "--max_new_tokens=60", "--start=a")
    free = run(*three)[1].split("\n---------------\n")[:-1]
    stop = free[0][20:22]
    cut = run(*three, "--stop", stop)[1].split("\n---------------\n")[:-1]
    assert [text[:1] + text[1:].split(stop)[0] for text in free] == cut
    single = run("sample", "--num_samples=1", "--max_new_tokens=60", "--start=a")[1].removesuffix("\n---------------\n")
    stop = single[30:33]
    assert run("sample", "--num_samples=1", "--max_new_tokens=60", "--start=a", f"--stop={stop}")[1] == \
        "a" + single[1:].split(stop)[0] + "\n---------------\n"


def test_a_line_break_can_be_typed(trained):
    assert sampling.typed(r"\n\n\t") == "\n\n\t" and sampling.typed(r"a\n") == r"a\n"
    assert run("sample", r"--start=\n", "--num_samples=1", "--max_new_tokens=0")[1] == "\n\n---------------\n"


def test_a_prompt_longer_than_the_context_is_cropped_as_in_nanogpt_and_said_once(trained):
    prompt = "the quick brown fox jumps over"
    _, out, err = run("sample", f"--start={prompt}", "--num_samples=1", "--max_new_tokens=5")
    assert out == nanogpts_text(trained, prompt, 5) + "\n---------------\n"
    assert err.count("the prompt is 30 tokens long and the context 16") == 1
    _, _, err = run("chat", "--max_new_tokens=1", stdin=f"{prompt}\n{prompt}\n")
    assert err.count("tokens long and the context") == 1


def test_ids_of_a_padded_vocabulary_are_not_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "out/ckpt.pt", vocab_size=64)
    status, out, _ = run("sample", "--num_samples=2", "--max_new_tokens=40", "--temperature=5")
    assert status == 0 and all(len(text) < 41 for text in out.split("\n---------------\n")[:2])


def test_nanogpts_checkpoint_finds_its_vocabulary_where_nanogpt_looks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "out/ckpt.pt", tokenizer=None)
    fails("carries no tokenizer and there is no data/play/meta.pkl", "sample")
    (tmp_path / "data/play").mkdir(parents=True)
    (tmp_path / "data/play/meta.pkl").write_bytes(pickle.dumps(META))
    assert run("sample", "--num_samples=1", "--max_new_tokens=5")[0] == 0


# ---------------------------------------------------------------------------------------------------------- bad input

def test_a_character_outside_the_vocabulary_names_itself(trained):
    fails("character 'X' (U+0058) at position 3 is not in this vocabulary", "sample", "--start=abcX")


def test_a_checkpoint_and_a_tokenizer_that_do_not_match_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "out/ckpt.pt", vocab_size=len(CHARS) - 1)
    fails("don't match: the model has 32 tokens, the tokenizer 33", "sample")


def test_a_damaged_vocabulary_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "out/ckpt.pt", tokenizer=None)
    (tmp_path / "data/play").mkdir(parents=True)
    whole = pickle.dumps(META)
    for content in (whole[:50], b"", b"nonsense", pickle.dumps([1, 2])):
        (tmp_path / "data/play/meta.pkl").write_bytes(content)
        fails("meta.pkl", "sample")


def test_missing_and_truncated_checkpoints_are_clear_errors(trained, tmp_path):
    fails("no folder nowhere: pass your run's folder as --out_dir, or train first", "sample", "--out_dir=nowhere")
    (tmp_path / "empty").mkdir()
    fails("there is no checkpoint empty/ckpt.pt", "chat", "--out_dir=empty")
    whole = (tmp_path / "out/ckpt.pt").read_bytes()
    (tmp_path / "out/ckpt.pt").write_bytes(whole[:len(whole) // 2])
    fails("out/ckpt.pt", "sample")


@pytest.mark.parametrize("argument, message", [
    ("--temprature=1", "unknown option --temprature; the nearest is --temperature"),
    ("--temperature=-1", "temperature is -1.0; expected float, at least 0"),
    ("--temperature=hot", "temperature is 'hot' (str); expected float"),
    ("--top_k=-1", "top_k is -1; expected int or None, at least 0"),
    ("--top_p=1.5", "top_p is 1.5; expected float or None, at least 0, at most 1"),
    ("--num_samples=0", "num_samples is 0"),
    ("--max_new_tokens=-1", "max_new_tokens is -1"),
    ("--seed=-1", "seed is -1"),
    ("--dtype=fp8", "dtype is 'fp8'; expected auto | float32 | bfloat16 | float16"),
    ("--backend=cuda", "backend 'cuda'"),
    ("--start=", "the prompt is empty"),
    ("--init_from=gpt3", "gpt2"),
])
def test_bad_options_are_one_clear_line(trained, argument, message):
    fails(message, "sample", argument)


# ---------------------------------------------------------------------------------------------------------- chat

def test_chat_completes_every_line_that_comes_from_a_pipe(trained):
    status, out, _ = run("chat", "--max_new_tokens=4", "--greedy", stdin="abc\n\nxyz\n")
    expected = ""
    for line in ("abc", "", "xyz"):
        ids = [CHARS.index(c) for c in line or "\n"]
        new = trained.generate(torch.tensor([ids]), 4, temperature=0)[0, len(ids):].tolist()
        expected += line + "".join(CHARS[i] for i in new) + "\n"
    assert status == 0 and out == expected


def test_help_in_a_chat_is_no_prompt(trained):
    status, out, err = run("chat", "--max_new_tokens=4", "--greedy", stdin="/help\nabc\n")
    assert status == 0 and out.startswith("abc") and out.count("\n") == 1
    assert "Each line that you type is a prompt" in err and "--temperature" in err


def test_a_character_that_cannot_be_read_does_not_end_the_conversation(trained):
    status, out, err = run("chat", "--max_new_tokens=4", "--greedy", stdin="ABC\nabc\n")
    assert status == 0 and "character 'A'" in err and out.startswith("abc")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_interrupts_a_completion_and_leaves_at_the_prompt(trained, tmp_path):
    # A real terminal and real signals: the only way to see what a person sees.
    import pty
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-m", "nanogpt_fast", "chat", "--device=cpu", "--max_new_tokens=100000"]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
                             env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"})
    os.close(theirs)
    seen = b""

    def read(until, quiet=100.0):
        """Read until the condition holds, nothing has come for `quiet` seconds, or the other side is closed. Who generates fast
        and is not read from blocks on a full terminal, and hears no signal."""
        nonlocal seen
        end = time.monotonic() + 100
        while not until(seen) and time.monotonic() < end and select.select([terminal], [], [], quiet)[0]:
            try:
                seen += os.read(terminal, 65536)
            except OSError:  # closed
                return

    try:
        read(lambda text: text.endswith(b"> "))
        os.write(terminal, b"abc\n")
        read(lambda text: len(text.split(b"> ")[-1]) > 30)       # it is generating
        child.send_signal(signal.SIGINT)
        read(lambda text: False, quiet=2)                        # the completion is over, the conversation is not
        assert seen.endswith(b"\n> ") and child.poll() is None, seen[-200:]
        child.send_signal(signal.SIGINT)
        read(lambda text: False)
        assert child.wait(timeout=60) == 0, seen[-200:]
    finally:
        child.kill()
        child.wait()
        os.close(terminal)


# ---------------------------------------------------------------------------------------------------------- TextStream

class Bytes:
    """A tokenizer whose tokens are single bytes, as the hardest case of a byte-pair vocabulary."""
    vocab_size = 256

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def stream(text, stop=""):
    tokens = sampling.TextStream(Bytes(), stop)
    pieces = [tokens.feed([byte]) for byte in (text if isinstance(text, bytes) else text.encode())]
    return pieces + [tokens.finish()], tokens


def test_a_character_of_several_tokens_appears_whole():
    pieces, _ = stream("aé漢🙂b")
    assert [piece for piece in pieces if piece] == ["a", "é", "漢", "🙂", "b"]


def test_bytes_that_never_become_a_character_do_not_hold_the_text_up_forever():
    pieces, _ = stream(b"a" + b"\xff" * 20 + b"b")
    assert "".join(pieces) == "a" + "\ufffd" * 20 + "b"
    assert "\ufffd" in "".join(pieces[:10])
    assert stream(b"ab\xc3")[0][-1] == "\ufffd"


@pytest.mark.parametrize("text, stop, expected", [
    ("one. two", ".", "one"), ("aab", "ab", "a"), ("ababac", "abac", "ab"), ("abab", "abc", "abab"), ("xé!", "é!", "x"),
    ("end", "end", "")])
def test_the_stop_text_is_found_across_tokens_and_never_shown(text, stop, expected):
    pieces, tokens = stream(text, stop)
    assert "".join(pieces) == expected and tokens.ended == (expected != text)
