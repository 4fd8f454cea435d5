"""Alter a run's files in one place; resume from them and sample: a clear error or a right run, never a crash, a hang or a traceback.

    python tests/altered.py EMPTY_FOLDER runs 2000 [FIRST]      2,000 alterations, numbered from FIRST (0)
    python tests/altered.py EMPTY_FOLDER sources 2000 [FIRST]   the same of what `convert` reads besides: a classic GPT's file, a folder

An alteration is a function of its number: which run it is of (float32, or float16 with its GradScaler), which file (last.pt,
ckpt.pt, metrics.jsonl, run.json), where in it, and what is there instead. Types, shapes, dtypes, strides, missing and foreign keys,
huge values, nan and wrong nesting, and bytes of the file itself. Some must be refused, and some must change nothing; `Altered.must`
says so. All runs are in a fork of this process, which an alarm ends if it hangs. Prints a line for each alteration that went wrong,
then how many there were; the exit status is 1 if one did.
"""
import dataclasses
import contextlib
import copy
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
import zipfile
from pathlib import Path

import kills
import numpy as np
import tiny
import torch

from nanogpt_fast import GPT, GPTConfig, classic
from nanogpt_fast.checkpoints import convert
from nanogpt_fast.checkpoints.nanogpt import CheckpointError, load_model
from nanogpt_fast.training import progress
from nanogpt_fast.training.losses import NonFiniteLoss
from nanogpt_fast.training.trainer import train

SECONDS = 20            # an alteration that takes longer hangs; one takes 0.1 s
MEMORY = 3 << 30        # bytes more than the process has when it begins: an allocation beyond them is an error
SMALL = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, eval_iters=1, eval_interval=2, log_interval=1, lr_decay_iters=9)
RUNS = {"float32": dict(dropout=0.1, bias=True), "float16": dict(dtype="float16")}


# ------------------------------------------------------------------------------------------------------------ what is altered

class Reduced:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def laughs():
    """A list of 10 ** 30 numbers in 30 lists."""
    value = [0] * 10
    for _ in range(29):
        value = [value] * 10
    return value


SCALAR = np.float64(0).__reduce__()[0]
VALUES = [None, True, False, -1, 0, 7, 2 ** 31, 2 ** 63, 2 ** 70, 10 ** 5000, 1.5, -0.5, math.nan, math.inf, -math.inf, 1e308, 1e-320,
          "", "x", "y" * 100_000, "\0", "../" * 200, b"bytes", [], {}, (), (1,), [1, 2], [[]], {"a": 1}, {1: 2}, set(), laughs,
          complex(1, 2), lambda: torch.tensor(1.0), lambda: torch.tensor(3), lambda: torch.empty(0), lambda: torch.ones(2, 3),
          lambda: torch.ones(5).bool(), lambda: torch.Size([2]), lambda: torch.float32,
          lambda: np.float64(2.5), lambda: np.int64(3), lambda: np.float32("nan"), lambda: Reduced(SCALAR, np.dtype("f8"), b"123"),
          lambda: Reduced(np.dtype, "f8,O"), lambda: Reduced(SCALAR, np.dtype("f8,O"), b"\1" * 16)]
KEYS = ["extra", "", "model", 0, 1.5, None, (1, 2), True, "z" * 10_000, "module.transformer.wte.weight", "_orig_mod.transformer.wpe.weight"]


def strided(t):
    """The same numbers with a gap after each."""
    return torch.stack((t, t + 1), -1)[..., 0]


def one(t, value):
    t = t.clone().flatten()
    if t.numel():
        t[len(t) // 2] = value
    return t


SAME = [strided, lambda t: t.double(), torch.nn.Parameter, lambda t: torch.cat((t.flatten(), t.flatten()))[t.numel():].view(t.shape),
        lambda t: t.t().clone().t() if t.dim() == 2 else t.clone()]
REFUSED = [lambda t: t.flatten()[:-1], lambda t: torch.cat((t.flatten(), t.flatten())), lambda t: t[..., None], lambda t: t.flatten()[:0],
           lambda t: torch.zeros(()), lambda t: torch.ones(1).expand(2 ** 40, 4),
           lambda t: t.flatten()[:1].clone().expand(t.shape) if t.numel() > 1 else t[..., None],
           lambda t: t.to(torch.complex64), lambda t: t > 0, lambda t: t.to(torch.int64), lambda t: t.to(torch.float8_e5m2),
           lambda t: t.to("meta"), lambda t: t.to_sparse(),
           lambda t: one(t, math.nan).view(t.shape), lambda t: one(t, math.inf).view(t.shape),
           lambda t: None, lambda t: "text", lambda t: t.tolist(), lambda t: {"data": t}]
EITHER = [lambda t: one(t, 1e30).view(t.shape), lambda t: one(t, 3e38).view(t.shape), lambda t: t * 0, lambda t: -t, lambda t: t * 1e-40,
          lambda t: t.half(), lambda t: t.bfloat16()]
ODD_BYTES = [lambda t: t[:-1], lambda t: t.flip(0), lambda t: t * 0, lambda t: t | 255, lambda t: strided(t), lambda t: t.to(torch.int64),
             lambda t: torch.cat((t, t)), lambda t: t[None], lambda t: t[:0], lambda t: -t, lambda t: t.to(torch.int64) * 2 ** 40]


def nodes(tree, path=()):
    """Every (path, value) in dicts, lists and tuples; of long ones the first three and the last."""
    yield path, tree
    if isinstance(tree, dict):
        children = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        children = list(enumerate(tree))
    else:
        return
    for key, value in children if len(children) < 40 else [*children[:3], children[-1]]:
        yield from nodes(value, (*path, key))


def replaced(tree, path, value):
    """The tree with another value at `path`; everything else is shared."""
    if not path:
        return value
    key, *rest = path
    new = dict(tree) if isinstance(tree, dict) else list(tree)
    new[key] = replaced(tree[key], rest, value)
    return tuple(new) if isinstance(tree, tuple) else new


class Change:
    """Draws what is somewhere instead of a value. what: that in words. must: "refused", "same" or "either"."""

    def __init__(self, draw):
        self.draw, self.must, self.what = draw, "either", ""

    def instead(self, path, value):
        """What is at the path instead of the value."""
        draw, of_weights = self.draw, path[0] == "model" if path else False
        if isinstance(value, torch.Tensor) and draw.random() < 0.9:
            if value.dtype in (torch.uint8, torch.int64):
                change = draw.choice(ODD_BYTES)
            elif value.dim() == 0:
                change = draw.choice([lambda t: t.double(), lambda t: t[None], lambda t: torch.empty(0), lambda t: t * math.nan,
                                      lambda t: -t - 1, lambda t: t + 0.5, lambda t: t * 1e30, lambda t: torch.ones(3), int])
            else:
                self.must, changes = draw.choice([("same", SAME), ("refused", REFUSED), ("refused", REFUSED), ("either", EITHER)])
                change = draw.choice(changes)
            new = change(value.detach())
            self.what = f"{path}: {type(new).__name__} {getattr(new, 'dtype', '')} {tuple(getattr(new, 'shape', ()))}"
            return new
        if isinstance(value, dict) and draw.random() < 0.8:
            new, key = dict(value), draw.choice(list(value) or ["x"])
            how = draw.choice(["without", "with", "renamed"])
            if how != "with" and value:
                taken = new.pop(key)
                self.must = "refused" if of_weights else "either"
            if how == "with":
                key = draw.choice(KEYS)
                new[key] = self.value()
            elif how == "renamed" and value:
                new[draw.choice(KEYS)] = taken
            self.what = f"{path} {how} {str(key)[:40]!r}"
            return new
        if isinstance(value, (list, tuple)) and draw.random() < 0.6:
            new = draw.choice([value[:-1], [*value, *value], list(value)[::-1], dict(enumerate(value)), list(value), tuple(value)])
            self.what = f"{path}: another {type(new).__name__} of {len(new)}"
            return new
        new = self.value()
        self.what = f"{path}: {type(new).__name__}"
        if isinstance(new, (int, float, str)):
            self.what += " " + (str(new)[:40] if not isinstance(new, int) or abs(new) < 1e30 else "huge")
        self.must = "refused" if of_weights or len(path) < 1 else "either"
        return new

    def value(self):
        value = self.draw.choice(VALUES)
        return value() if callable(value) else copy.copy(value)


class Altered(Change):
    """One alteration, of a run's folder. resumes, samples: whether a resume and sampling read what is altered."""

    def __init__(self, draw, folder):
        super().__init__(draw)
        self.samples = True
        self.file = folder / draw.choice(["last.pt", "last.pt", "ckpt.pt"])
        self.resumes = self.file.name == "last.pt" or draw.random() < 0.8     # else it lies beside a whole last.pt
        if self.file.name == "ckpt.pt" and self.resumes:
            os.remove(folder / "last.pt")
        kind = draw.random()
        if kind < 0.06:
            self.text_file(folder / draw.choice(["metrics.jsonl", "metrics.jsonl", "run.json"]))
        elif kind < 0.20:
            self.archive()
        else:
            self.values()

    def values(self):
        saved = torch.load(self.file, weights_only=True)
        often = ("model", "optimizer", "optimizer", "resume", "resume", "model_args", "config", "tokenizer")
        section = self.draw.choice([name for name in often if name in saved] + [None])
        if section == "optimizer":
            section = self.draw.choice(["state", "param_groups"])
            path, value = self.draw.choice([(("optimizer", section, *path), value) for path, value in nodes(saved["optimizer"][section])])
        else:
            root = () if section is None else (section,)
            found = [(root + path, value) for path, value in nodes(saved if section is None else saved[section])]
            path, value = self.draw.choice([one for one in found if section is not None or len(one[0]) < 2])
        new = self.instead(path, value)
        self.samples = path[:1] not in (("optimizer",), ("resume",))
        torch.save(replaced(saved, path, new), self.file)

    def archive(self):
        """The same values in a file that torch.save would not write."""
        draw, path = self.draw, self.file
        with zipfile.ZipFile(path) as z:
            members = {name: z.read(name) for name in z.namelist()}
        pickle = next(name for name in members if name.endswith("data.pkl"))
        storages = [name for name in members if "/data/" in name]
        how = draw.choice(["bytes of the pickle"] * 6 + ["compressed", "cut", "a storage less", "a storage shorter", "deep", "twice"])
        self.what, self.must = f"the file: {how}", "refused" if how not in ("bytes of the pickle", "twice") else "either"
        compression = zipfile.ZIP_STORED
        if how == "bytes of the pickle":
            content = bytearray(members[pickle])
            for _ in range(draw.choice([1, 1, 1, 2, 5])):
                content[draw.randrange(len(content))] = draw.choice([draw.randrange(256), *b"\x85(.0})]t\x87R"])
            members[pickle] = bytes(content)
        elif how == "compressed":
            compression = zipfile.ZIP_DEFLATED
        elif how == "a storage less":
            del members[draw.choice(storages)]
        elif how == "a storage shorter":
            name = max(storages, key=lambda name: len(members[name]))
            members[name] = members[name][:draw.choice([0, 1, 8])]
        elif how == "deep":
            members[pickle] = b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s."
        if how == "cut":
            os.truncate(path, draw.randrange(path.stat().st_size))
            return
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as z:
            warnings.simplefilter("ignore")
            for name, content in members.items():
                z.writestr(name, content)
            if how == "twice":
                z.writestr(pickle, members[pickle])

    def text_file(self, path):
        draw, lines = self.draw, path.read_bytes().splitlines()
        row = json.loads(lines[0])
        odd = [b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b"{}", b'{"iter": 1e999}', b'{"iter": 0}',
               *(json.dumps({**row, draw.choice(list(row)): value}).encode()
                 for value in (None, "x", [], {}, True, 10 ** 400, -5, 1e308, math.nan))]
        lines[draw.randrange(len(lines))] = draw.choice(odd)
        path.write_bytes(b"\n".join(lines) + draw.choice([b"", b"\n"]))
        self.what, self.must, self.samples = f"{path.name}: {b' '.join(lines)[:60]!r}", "either", False


# ------------------------------------------------------------------------------------------------------------ what comes of it

def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Bases:
    """The runs that are altered, and what becomes of them when they are not."""

    def __init__(self, root):
        self.root = Path(root)
        tiny.data(root)
        self.expected = {}
        for name, changed in RUNS.items():
            train(self.options(name, f"base-{name}", max_iters=2))
            for file in ("last.pt", "ckpt.pt"):
                shutil.copytree(self.root / f"base-{name}", self.root / "out")
                if file == "ckpt.pt":
                    os.remove(self.root / "out" / "last.pt")
                result = train(self.options(name, "out", init_from="resume"))
                self.expected[name, file] = weights(result.model)
                shutil.rmtree(self.root / "out")

    def options(self, name, out, **changed):
        o = tiny.options(self.root, out, **{**SMALL, **RUNS[name], "max_iters": 3, **changed})
        o.given = frozenset(field.name for field in dataclasses.fields(o))      # typed: an altered config sets nothing, such as a million steps
        return o

    def wrong(self, number):
        """(the alteration in words, None), or with what went wrong after alteration `number`."""
        draw, out = random.Random(number), self.root / "out"
        name = draw.choice(list(RUNS))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.root / f"base-{name}", out)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            altered = Altered(draw, out)
            faults = [self.sample(altered), self.resume(name, altered)]
        return f"{name} {altered.file.name} {altered.what}", "; ".join(filter(None, faults)) or None

    def resume(self, name, altered):
        try:
            result = train(self.options(name, "out", init_from="resume"))
        except (CheckpointError, NonFiniteLoss) as error:
            if altered.must == "same" or not altered.resumes:
                return f"resume refused what is the same: {error}"
            return None if len(str(error)) < 1500 else "resume: an error of more than 1,500 characters"
        except BaseException as error:
            return "resume: " + "".join(traceback.format_exception(error)[-2:])
        if altered.must == "refused" and altered.resumes:
            return "resume went on from what must be refused"
        found = weights(result.model)
        if altered.must == "same" and altered.resumes and not equal(found, self.expected[name, altered.file.name]):
            return "resume went on, and is not the run that it was"
        return None if all(torch.isfinite(tensor).all() for tensor in found.values()) else "resume went on to nan"

    def sample(self, altered):
        try:
            model, _, _ = load_model(altered.file)
            model.generate(torch.zeros(1, 1, dtype=torch.long), 3)
        except CheckpointError as error:
            unreadable = "is not a checkpoint" in str(error) or "could run code" in str(error)      # no part of it can be used
            if altered.must == "same" or not altered.samples and not unreadable:
                return f"sample refused what it can use: {error}"
            return None
        except RuntimeError as error:
            return None if "logits are NaN" in str(error) and altered.must == "either" else f"sample: {error}"
        except BaseException as error:
            return "sample: " + "".join(traceback.format_exception(error)[-2:])
        return "sample used what must be refused" if altered.must == "refused" and altered.samples else None


class Sources:
    """A classic GPT's checkpoint and a folder of transformers' GPT-2, which are altered and converted."""

    def __init__(self, root):
        self.root = Path(root)
        with contextlib.redirect_stdout(io.StringIO()):
            gpt = GPT(GPTConfig(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=16, activation="gelu_tanh")).eval()
        gpt.save_pretrained(self.root / "hf")
        classic.save_checkpoint(self.root / "classic.pt", convert.to_classic(gpt))

    def wrong(self, number):
        """(the alteration in words, None), or with what went wrong after alteration `number`."""
        draw = random.Random(number)
        folder, file, target = self.root / "altered", self.root / "altered.pt", self.root / "target.pt"
        shutil.rmtree(folder, ignore_errors=True), target.unlink(missing_ok=True)
        shutil.copytree(self.root / "hf", folder)
        change = Change(draw)
        if draw.random() < 0.5:
            source = file
            saved = torch.load(self.root / "classic.pt", weights_only=True)
            path, value = draw.choice(list(nodes(saved)))
            torch.save(replaced(saved, path, change.instead(path, value)), file)
        elif draw.random() < 0.6:
            source, config = folder, json.loads((folder / "config.json").read_text())
            name, value = draw.choice([*config, "extra"]), change.value()
            while not isinstance(value, (str, float, dict, type(None))) and not (isinstance(value, int) and abs(value) < 1e30):
                value = change.value()      # what JSON can say
            (folder / "config.json").write_text(json.dumps({**config, name: value}))
            change.what = f"config.json: {name} {str(value)[:40]}"
        else:
            source, content = folder, bytearray((folder / "model.safetensors").read_bytes())
            header = 8 + int.from_bytes(content[:8], "little")      # names, dtypes, shapes and places
            for _ in range(draw.choice([1, 2, 4])):
                content[draw.randrange(header)] = draw.choice([draw.randrange(256), *b'0129,:[]{}"'])
            (folder / "model.safetensors").write_bytes(content)
            change.what = "bytes of model.safetensors"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                convert.convert_checkpoint(source, target)
        except (CheckpointError, convert.ConversionError, ValueError) as error:
            clear = type(error) is not ValueError or "is not a checkpoint of a classic model" in str(error)
            return change.what, None if clear and len(str(error)) < 1500 else repr(error)
        except BaseException as error:
            return change.what, "".join(traceback.format_exception(error)[-2:])
        return change.what, None


def forked(bases, numbers, log):
    """Make the alterations in a fork, a line of JSON in `log` for each. Returns the signal that ended it, or None."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            with open(log, "a", buffering=1) as f:
                for number in numbers:
                    signal.alarm(SECONDS)
                    print(json.dumps([number, *bases.wrong(number)]), file=f)
            status = 0
        except BaseException:       # a fault of this program
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if status == 0 else signal.Signals(-status).name if status < 0 else f"exit status {status}"


def main(root, what, count, first=0):
    torch.set_num_threads(1)
    progress.draw = kills.quick_draw
    with contextlib.redirect_stdout(io.StringIO()):
        bases = {"runs": Bases, "sources": Sources}[what](root)
    log, left, wrong = Path(root, "log"), list(range(first, first + count)), 0
    log.touch()
    done = 0
    while left:
        ended = forked(bases, left, log)
        lines = [json.loads(line) for line in log.read_text().splitlines()][done:]
        done += len(lines)
        for number, what, fault in lines:
            if fault is not None:
                wrong += 1
                print(f"{number}: {what}: {fault}", flush=True)
        left = left[len(lines):]
        if ended is not None:
            wrong += 1
            print(f"{left[0]}: the process ended: {ended}" + (" (it hung)" if ended == "SIGALRM" else ""), flush=True)
            left = left[1:]
    print(f"{count} alterations, {wrong} wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])))
