"""nanogpt-fast run SCRIPT ...: run a nanoGPT script unedited on the fused kernels.

    nanogpt-fast run train.py config/train_shakespeare_char.py --device=cpu --compile=False
    nanogpt-fast run --backend=reference sample.py --out_dir=out-shakespeare-char
    nanogpt-fast run train.py config/train_shakespeare_char.py --compare 20
    torchrun --standalone --nproc_per_node=8 -m nanogpt_fast run train.py config/train_gpt2.py

The script says `from model import GPTConfig, GPT`. So `run` executes the `model` module beside it and replaces the module's classes by
ours before the script imports it; the rest of the module stays. That would drop whatever a fork changed in those classes, so `run`
first builds a tiny model of both kinds and runs the two side by side on the CPU. The module's own classes stay if initial weights,
random state, logits, loss, gradients, generated tokens or the optimizer's groups are not equal bit for bit, if other operations
run, if a forward stores something, or if its GPT has a method or an attribute that ours lacks. Then every GPT that the script
makes goes through `accelerate`, which swaps the parts that it can. One banner line says which of the two happened.

--module models.gpt names the module with the classes, as the script imports it, if it is not `model`.

Arguments go to the script unchanged, except --compare and a --backend that names one of our choices (auto, fused, reference,
op=choice; nccl and gloo are the script's own). The exit status is the script's, and an error in it is shown as Python would
show it.

--compare N runs the script twice, each time in its own process: with the checkout's model, then with ours. The tensor on which
the script calls `backward` is the loss; after N optimizer steps the script is stopped. Nothing is patched that a compiled graph
could see. --format, before the script, is that of the table of losses; with csv what else there is to say goes to stderr.
"""
import contextlib
import dataclasses
import importlib
import io
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import backend as _backend, model as nano, tables
from ..config import GPTConfig
from . import accelerate, stage, trial

CLASSES = ("LayerNorm", "CausalSelfAttention", "MLP", "Block", "GPTConfig", "GPT")
USAGE = ("usage: nanogpt-fast run [--backend=auto|fused|reference] [--module NAME] [--compare N] [--format=text|markdown|csv] SCRIPT.py "
         "[arguments of the script ...]")


def main(argv):
    """The command `nanogpt-fast run`. Returns the script's exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + "\n\n" + __doc__.split("\n\n", 1)[1].rstrip())
        return 0
    script, words, backend, name, compare, format = _parse(argv)
    if compare is not None:
        return _compare(script, words, backend, name, compare, format)
    return _run(script, words, backend, name)


def _parse(argv):
    """(script, its arguments, our backend or None, name of the module with the classes, number of steps to compare or None, --format)."""
    script, words, backend, name, compare, format = None, [], None, "model", None, "text"
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if key == "--compare":
            value = value if equals else rest.pop(0) if rest else ""
            if not value.isdigit() or int(value) < 1:
                raise ValueError(f"--compare takes the number of steps, at least 1; got {value!r}")
            compare = int(value)
        elif key == "--backend" and (script is None or _is_ours(value if equals else "")):
            backend = value if equals else rest.pop(0) if rest else ""
            _backend.parse(backend)  # raises a ValueError that says what is accepted
        elif key == "--module" and script is None:          # after the script's name it is the script's own
            name = value if equals else rest.pop(0) if rest else ""
            if not all(map(str.isidentifier, name.split("."))):
                raise ValueError(f"--module takes the name that the script imports, such as models.gpt; got {name!r}")
        elif key == "--format" and script is None:
            format = value if equals else rest.pop(0) if rest else ""
            if format not in tables.FORMATS:
                raise ValueError(f"--format is {format!r}; expected one of {', '.join(tables.FORMATS)}")
        elif script is None:
            if word.startswith("-"):
                raise ValueError(f"{word} stands before the script but is not an option of run; {USAGE}")
            script = Path(word)
        else:
            words.append(word)
    if script is None:
        raise ValueError(f"no script is given; {USAGE}")
    if not script.is_file():
        raise FileNotFoundError(f"there is no script {script}; run this in a nanoGPT checkout")
    return script, words, backend, name, compare, format


def _is_ours(value):
    try:
        return bool(value) and _backend.parse(value) is not None
    except ValueError:
        return False


def _run(script, words, backend, name):
    """Run the script as __main__ with our classes in the module that it imports. Returns the exit status, or raises its SystemExit."""
    folder = str(script.resolve().parent)
    sys.path[0:1] = [folder]  # as `python script` sets it; the first entry was the folder of nanogpt-fast itself, or ""
    sys.argv = [str(script), *words]
    module, what = _model_module(folder, name, backend)
    if os.environ.get("RANK", "0") == "0":
        print(f"nanogpt-fast: {script} runs on {module.__file__} with {what}, backend {backend or 'auto'}", flush=True)
    return _execute(script, backend)


def _execute(script, backend):
    """The exit status. The script's own SystemExit passes."""
    try:
        with _backend.use(backend) if backend else contextlib.nullcontext():
            runpy.run_path(str(script), run_name="__main__")
    except KeyboardInterrupt:
        _show()
        return 130
    except Exception:
        _show()
        return 1
    return 0


def _show():
    """The traceback of the script's error as Python prints it: without the frames of this file and of runpy."""
    kind, error, frames = sys.exc_info()
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while frames.tb_next is not None and frames.tb_frame.f_code.co_filename in ours:
        frames = frames.tb_next
    traceback.print_exception(kind, error, frames)


# ------------------------------------------------------------------------------------------------- the module with the classes


def _model_module(folder, name, backend):
    """Import the checkout's module and put our classes into it, or accelerate its own: (the module, which of the two, as text)."""
    path = Path(folder, *name.split("."))
    if not (path.with_suffix(".py").is_file() or path.is_dir()):
        raise FileNotFoundError(f"there is no {path}.py: `run` replaces the classes of the module that the script imports, which is "
                                "model.py unless --module names another")
    sys.modules.pop(name, None)
    module = importlib.import_module(name)
    if getattr(module, "GPT", None) is nano.GPT:
        return module, "nanogpt_fast's classes already"
    if not isinstance(getattr(module, "GPT", None), type):
        raise ValueError(f"{module.__file__} defines no class GPT, so there is nothing to accelerate; name the module that does "
                         "with --module")
    why_not = why_not_ours(module)
    if why_not is None:
        for cls in CLASSES:
            setattr(module, cls, getattr(nano, cls))
        return module, "nanogpt_fast's classes in place of its own"
    _accelerate_what_it_makes(module, backend)
    return module, f"its own classes, accelerated ({why_not})"


# T = 1024, so that a window or another rule for distant tokens shows. Everything else is as small as possible.
TINY = dict(block_size=1024, vocab_size=17, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


def why_not_ours(module):
    """None if our classes compute what this model.py's do, bit for bit, and lack none of their attributes; else what differs."""
    missing = [name for name in CLASSES if not isinstance(getattr(module, name, None), type)]
    if missing:
        return f"it defines no {', '.join(missing)}"
    try:
        fields = [(f.name, f.default) for f in dataclasses.fields(module.GPTConfig)]
    except TypeError:
        return "its GPTConfig is not a dataclass"
    known = [(f.name, f.default) for f in dataclasses.fields(GPTConfig)][:7]
    if fields != known:
        return "its GPTConfig has other fields or defaults: " + ", ".join(name for name, _ in set(fields) ^ set(known))
    for name in CLASSES:
        methods = {key for key in vars(getattr(module, name)) if not key.startswith("__")} - vars(getattr(nano, name)).keys()
        if methods:
            return f"its {name} has {', '.join(sorted(methods))}, ours does not"
    for bias in (True, False):
        try:
            theirs, ours = (_facts(m, bias) for m in (module, nano))
        except Exception as error:
            return f"trying it out raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for what in ours:
            if len(theirs[what]) != len(ours[what]) or not all(map(_equal, theirs[what], ours[what])):
                return f"its {what} differ from nanoGPT's"
        if missing := sorted(theirs.attributes - ours.attributes):
            return f"it sets {', '.join(missing[:4])}, ours does not"
        if theirs.effects - ours.effects:
            return f"its forward does more than return: it {min(theirs.effects - ours.effects)}"
        known = ours.operations["forward"] | trial.OPERATIONS["model"]
        for what, names in theirs.operations.items():
            if others := sorted(names - known - trial.OPERATIONS[what]):
                return f"its {what} does more than nanoGPT's: {', '.join(others[:4])}"
    return None


def _equal(a, b):
    return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else type(a) is type(b) and a == b


class _Facts(dict):
    """{what: tensors and numbers} that are the same for two equal implementations and one seed. Also: names of instance `attributes`,
    and what stage.call sees: `effects`, and `operations` of "forward" and of "generate"."""


def _facts(module, bias):
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]), _backend.use("reference"):
        torch.manual_seed(0)
        model = module.GPT(module.GPTConfig(**TINY, bias=bias))
        facts = _Facts({"initial weights": [p.detach().clone() for p in model.state_dict().values()],
                        "random numbers": [torch.get_rng_state()]})
        for p in model.parameters():  # away from the initial weights, where biases are 0 and attention is nearly uniform
            torch.nn.init.normal_(p, std=0.5)
        facts.operations, facts.effects = {"forward": set(), "generate": set()}, set()

        def call(what, function, *args):
            seen = stage.call(model, function, args, {})
            facts.operations[what] |= seen.operations
            facts.effects.update(seen.effects)
            return seen.result

        idx = torch.randint(TINY["vocab_size"], (1, TINY["block_size"]))
        targets = torch.where(torch.rand(idx.shape) < 0.1, -1, idx)
        facts["logits"], facts["loss"] = [[t.detach()] for t in call("forward", lambda model, *args: _both(model(*args)), idx, targets)]
        model.zero_grad()
        torch.manual_seed(1)
        model(idx, targets)[1].backward()
        facts["gradients"] = [p.grad for p in model.parameters()]
        model.eval()
        facts["generated tokens"] = [call("generate", lambda model, idx: model.generate(idx, 8, temperature=0.9, top_k=5), idx[:, :4])]
        facts["logits of the last position"] = [call("forward", lambda model, idx: _both(model(idx))[0].detach(), idx[:, :9])]
        facts["numbers of parameters"] = [model.get_num_params(), model.get_num_params(non_embedding=False)]
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.8, 0.9), "cpu")
        names = {id(p): name for name, p in model.named_parameters()}
        facts["optimizer's groups"] = [([names[id(p)] for p in group["params"]], {key: group.get(key) for key in OPTIMIZER})
                                       for group in optimizer.param_groups] + [type(optimizer).__name__]
        facts.attributes = {f"{type(m).__name__}.{key}" for m in model.modules() for key in m.__dict__}
    return facts


OPTIMIZER = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")


def _both(result):
    logits, loss = result
    return logits, loss


def _accelerate_what_it_makes(module, backend):
    """Make every instance of the module's GPT go through `accelerate` when its __init__ is done."""
    init = module.GPT.__init__

    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self) is module.GPT:  # a subclass is still in its own __init__
            report = accelerate(self, backend)
            if os.environ.get("RANK", "0") == "0":
                print("\n".join(f"nanogpt-fast: {line}" for line in str(report).splitlines()), flush=True)

    module.GPT.__init__ = __init__


# ------------------------------------------------------------------------------------------------------------------- --compare


ROUNDING = 2 ** -20  # relative difference of losses that float32's rounding explains after some twenty steps: 8 times its epsilon


class _Done(BaseException):
    """All steps are recorded. Not an Exception, so that no `except Exception` of the script catches it."""


def _compare(script, words, backend, name, steps, format):
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--compare runs the script twice, in one process each time; start it without torchrun")
    runs, aside = {}, tables.aside(format)
    for which in ("checkout", "ours"):
        model = "its own model.py" if which == "checkout" else "nanogpt_fast"
        print(f"nanogpt-fast: {steps} steps of {script} with {model} ...", file=aside, flush=True)
        runs[which] = _record_in_a_process(script, words, backend, name, steps, which)
    theirs, ours = runs["checkout"], runs["ours"]
    print(f"nanogpt-fast: {ours['what']}\n", file=aside)
    print(tables.table(("step", "model.py", "nanogpt_fast", "difference"), [
        (i, f"{a:.8f}", f"{b:.8f}", f"{b - a:.1e}") for i, (a, b) in enumerate(zip(theirs["losses"], ours["losses"]))], format, "r"))
    largest = max((abs(a - b) for a, b in zip(theirs["losses"], ours["losses"])), default=0.0)
    relative = largest / max(map(abs, theirs["losses"]))
    verdict = ("equal, bit for bit" if largest == 0 else f"largest difference {largest:.1e}"
               + (", float32's rounding (AdamW fused into one loop adds in another order)" if relative < ROUNDING else ""))
    rates = [_rate(run) for run in (theirs, ours)]
    print("\n" + tables.table(None, [("losses", verdict), ("model.py", rates[0][1]),
                                     ("nanogpt_fast", f"{rates[1][1]} ({rates[1][0] / rates[0][0]:.2f} times)")], align="l"), file=aside)
    return 0


def _rate(run):
    """(tokens or steps a second, the same as text), from the median step: the first steps also compile and evaluate."""
    seconds = statistics.median(run["seconds"][1:] or run["seconds"])
    if run["tokens"]:
        return run["tokens"] / seconds, f"{run['tokens'] / seconds:,.0f} tokens/s"
    return 1 / seconds, f"{1 / seconds:,.2f} steps/s"


def _record_in_a_process(script, words, backend, name, steps, which):
    reading, writing = os.pipe()
    job = json.dumps(dict(script=str(script), words=words, backend=backend, name=name, steps=steps, which=which,
                          fd=writing))
    code = "import sys; from nanogpt_fast.swap import run; sys.exit(run.record(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", code, job], pass_fds=[writing], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        os.close(writing)
        output = process.communicate()[0]
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    result = json.loads(text) if text else {"losses": []}
    if len(result["losses"]) < steps:
        print("\n".join(output.splitlines()[-20:]), file=sys.stderr)
        raise RuntimeError(f"{script} ended with status {process.returncode} after {len(result['losses'])} of {steps} "
                           "optimizer steps; its last output is above (--compare needs a script that trains for that many "
                           "steps)")
    return result


def record(job):
    """The child of --compare: run the script, write {losses, seconds, tokens, what} as JSON to a pipe; return its status."""
    job = json.loads(job)
    script, words, steps = Path(job["script"]), job["words"], job["steps"]
    folder = str(script.resolve().parent)
    sys.path[0:1] = [folder]
    sys.argv = [str(script), *words]
    what = _model_module(folder, job["name"], job["backend"])[1] if job["which"] == "ours" else "its own classes"
    losses, seconds, waiting, start = [], [], [], time.perf_counter()
    backward = torch.Tensor.backward

    def recording_backward(self, *args, **kwargs):
        waiting.append(self.detach())  # a micro-step's share of the loss; read after the step, so as not to stall a GPU
        return backward(self, *args, **kwargs)

    def after_a_step(optimizer, args, kwargs):
        nonlocal start
        losses.append(sum(loss.double().item() for loss in waiting))
        waiting.clear()
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
        if len(losses) == steps:
            raise _Done

    torch.Tensor.backward = recording_backward
    register_optimizer_step_post_hook(after_a_step)
    tokens = None
    status = 0
    try:
        status = _execute(script, job["backend"])
    except _Done as done:
        tokens = _tokens_per_step(done.__traceback__)
    finally:
        with os.fdopen(job["fd"], "w") as pipe:
            json.dump(dict(losses=losses, seconds=seconds, tokens=tokens, what=what), pipe)
    return status


def _tokens_per_step(frames):
    """Read from the script's globals, under the names that nanoGPT's scripts use; None if they are not there."""
    while frames is not None:
        names = frames.tb_frame.f_globals
        if names.get("__name__") == "__main__" and "batch_size" in names and "block_size" in names:
            return names["batch_size"] * names["block_size"] * names.get("gradient_accumulation_steps", 1)
        frames = frames.tb_next
    return None
