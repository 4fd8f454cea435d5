"""The words of `nanogpt-fast train`: presets, nanoGPT's config files by name, and the defaults of a machine without CUDA.

A preset is a config file that comes with the package (configs/NAME.py). It is run before everything else, so whatever is typed wins,
wherever it stands; if max_iters is typed and lr_decay_iters is not, the learning rate decays until max_iters. nanoGPT's own config files
come with the package too, for a folder that has none: `nanogpt-fast train config/train_gpt2.py` takes the folder's if there is one.
"""
import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

from .. import devices, options
from ..options import option
from .options import TrainOptions

FOLDER = Path(__file__).parents[1] / "configs"
PRESETS = ("laptop", "baby", "gpt2", "finetune")
NANOGPTS = {f"config/{name}.py": FOLDER / f"{name}.py" for name in (
    "train_shakespeare_char", "train_gpt2", "finetune_shakespeare", "eval_gpt2", "eval_gpt2_medium", "eval_gpt2_large", "eval_gpt2_xl")}
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps")


@dataclass
class TrainCommand(TrainOptions):
    __doc__ = TrainOptions.__doc__

    preset: str = option("", "settings by name; what is typed wins. laptop: minutes on a CPU; baby: nanoGPT's baby GPT; gpt2: 124M from "
                         "scratch; finetune: OpenAI's GPT-2. Without a CUDA GPU laptop is the default, unless there is a config file, "
                         "--device, --init_from or a size", choices=("", *PRESETS), section="Presets")


def parse(argv, prog):
    """The TrainCommand of these words. Raises what `options.parse` raises."""
    values, given, configs = options.read(TrainCommand, argv, prog, NANOGPTS)
    preset = values["preset"]
    if not preset and not configs and _nothing_says_how_large(given):
        print("no CUDA GPU, and nothing says how large the run is to be: these are the settings of --preset=laptop. --preset=gpt2 is "
              "nanoGPT's default")
        preset = "laptop"
    first = [str(FOLDER / f"{preset}.py")] if preset in PRESETS else []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # what config files say, they have said
        o = options.parse(TrainCommand, first + argv, prog, NANOGPTS)
    if first:
        o.preset = preset
        if "max_iters" in given and "lr_decay_iters" not in given:
            o.lr_decay_iters = o.max_iters
    return o


def _nothing_says_how_large(given):
    """Whether nanoGPT has no meaning for a command that gives these names: its default device is CUDA's, there is none, and the model's
    size is not given. With --device=cpu or a size it has one, however long that takes, and it is kept."""
    return not ({"device", "init_from", *SHAPE} & given or "RANK" in os.environ) and devices.choose_device("auto").type != "cuda"
