"""What the three benchmarks share: models by name, options, the models of both sides, and the JSON record."""
import contextlib
import importlib.util
import io
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import backend as ops_backend, tables
from ..config import GPTConfig
from ..model import GPT
from ..options import option
from . import measure

# name: (config, batch size). On a CPU, GPT-2 has a context of 256 and a batch of 4 sequences, so that a step takes seconds.
GPT2 = dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, bias=False)
MODELS = {
    "gpt2": (GPT2, 32),                                                                     # 124M parameters
    "gpt2-medium": ({**GPT2, "n_layer": 24, "n_head": 16, "n_embd": 1024}, 16),             # 350M
    "baby": (dict(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False, dropout=0.2), 64),
    "cpu": (dict(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False), 12),  # nanoGPT's CPU recipe
    "tiny": (dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32, bias=False), 4),   # to try out the command itself
}
ON_CPU = {"gpt2": 4, "gpt2-medium": 2}  # batch sizes on a CPU


@dataclass
class BenchOptions:
    """The options that the three benchmarks share."""
    model: str = option("", "empty: gpt2 on a GPU, cpu on a CPU", choices=("", *MODELS))
    upstream: str = option("", "a nanoGPT checkout: its own model.py runs beside ours")
    backend: str = option("auto", "implementation of our ops, as in `nanogpt-fast train`")
    device: str = option("auto", "auto (CUDA, else CPU), cpu, cuda, cuda:1")
    dtype: str = option("auto", "of the forward pass; auto: bfloat16 on a GPU, float32 on a CPU",
                        choices=("auto", "float32", "bfloat16", "float16"))
    format: str = tables.format_option()
    json: str = option("", "append the result, with every sample, to this file")

    def __post_init__(self):
        ops_backend.parse(self.backend)
        if self.upstream and not Path(self.upstream, "model.py").is_file():
            raise ValueError(f"upstream is {self.upstream!r}, but there is no model.py in it; name a nanoGPT checkout")


@dataclass
class TimedOptions(BenchOptions):
    """And those of the two that time variants in rounds."""
    only: str = option("", "only the variants whose name contains one of these words, separated by commas")
    rounds: int = option(10, "samples of each variant", minimum=1)
    minutes: float = option(60.0, "start nothing new after this time; building variants may take two thirds of it", above=0)


def record(o, benchmark, device, **found):
    """Append the results to the file that --json names, with the options that reproduce them."""
    if o.json:
        asked = {key: value for key, value in asdict(o).items() if key not in ("json", "format", "upstream", "data_dir", "traces")}
        measure.append(o.json, benchmark, device=device.type, options=asked,
                       against="nanoGPT checkout" if o.upstream else "GPT(backend='reference')", **found)


def wanted(o, names):
    """The names that --only selects, in their order. A word that is a whole name selects that one alone."""
    words = [word for word in o.only.split(",") if word]
    left = [name for name in names if not words or any(word == name or word not in names and word in name for word in words)]
    if not left:
        raise ValueError(f"--only={o.only} leaves none of: {'; '.join(names)}")
    return left


def quiet():
    """Hide stdout: GPT and its optimizer print their sizes."""
    return contextlib.redirect_stdout(io.StringIO())


def shape_of(model, device, **changed):
    """(config as a dict, batch size) for a model's name."""
    config, batch_size = MODELS[model]
    if device.type == "cpu" and model in ON_CPU:
        config, batch_size = {**config, "block_size": 256}, ON_CPU[model]
    return {**config, **changed}, batch_size


def build(o, nanogpt, config, device, seed=0):
    """nanoGPT's model or ours, with weights drawn from a seed."""
    torch.manual_seed(seed)
    with quiet():
        if nanogpt and o.upstream:
            module = _upstream(os.path.abspath(o.upstream))
            return module.GPT(module.GPTConfig(**config)).to(device)
        return GPT(GPTConfig(**config), backend="reference" if nanogpt else o.backend).to(device)


_modules = {}


def _upstream(folder):
    """The module model.py of a nanoGPT checkout."""
    if folder not in _modules:
        spec = importlib.util.spec_from_file_location("nanogpt_checkout_model", os.path.join(folder, "model.py"))
        _modules[folder] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_modules[folder])
    return _modules[folder]
