"""Resuming with --out_dir alone: the settings of the run that stopped are the defaults, and what is given wins over them.

A checkpoint holds the options of its run (`config`). nanoGPT's resume ignores them and takes its own defaults for whatever is not given
again, so a run of 200 small steps would go on towards 600,000 at another batch size. A config file given with --init_from=resume counts as
given, like flags. What was given and differs from the run's setting is said.
"""
import contextlib
import dataclasses
import io

from .. import options
from ..checkpoints import folder as run_folder, nanogpt as checkpoints, schema
from ..options import is_given
from .options import TrainOptions

OF_THE_CALL = ("out_dir", "init_from", "eval_only", "verbose", "preset", "profile")  # they say what to do now, and are no settings of the run
# In a file of nanoGPT's they name nanoGPT's means, such as device='cuda' and backend='nccl' on whatever machine.
OF_THE_MACHINE = ("backend", "device", "dtype", "compile", "cuda_graph", "malloc", "recompute")
SAID_LATER = ("block_size", "n_layer", "n_head", "n_embd", "bias", "activation", "weight_decay", "beta1", "beta2", "seed",
              "optimizer")  # by start.py and, of the optimizer, by schema.py


def with_the_runs_settings(o):
    """The TrainOptions of a run to resume: where `o` gives no value, the value of the run in o.out_dir. Prints both kinds.

    The result's `given` names what `o` gave. Raises CheckpointError if there is no checkpoint, or none that can be read.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # what it warns of is said when the weights are read
        path = run_folder.latest(o.out_dir)
    checkpoint = checkpoints.glance(path)
    if checkpoint is None or "model_args" not in checkpoint:    # damaged, or of something else: `read` says what it is
        checkpoint = run_folder.read(path)
    found = checkpoint.get("config")
    found = found if isinstance(found, dict) else {}
    left_alone = OF_THE_CALL if "run" in checkpoint else OF_THE_CALL + OF_THE_MACHINE
    taken, given = {}, set()
    for field in dataclasses.fields(TrainOptions):
        name = field.name
        if is_given(o, name):
            given.add(name)
        if name in left_alone or name not in found:
            continue
        if not isinstance(found[name], (bool, int, float, str, type(None))):     # the words of an error would print it whole
            print(f"{path}: its config says that {name} is {schema.shown(found[name])}. That is left out")
            continue
        try:
            value = options.accepted(TrainOptions, name, found[name])
        except ValueError as error:  # a fork's
            print(f"{path}: its config says that {error}. That is left out")
            continue
        if name not in given:
            taken[name] = value
        elif value != getattr(o, name) and name not in SAID_LATER:
            print(f"{name} is {getattr(o, name)} from here on; it was {value}")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    shown = [f"{name}={value}" for name, value in taken.items() if value != defaults[name]]
    if shown:
        print(f"the run's own settings, from {path}: {' '.join(shown)}")
    filled = dataclasses.replace(o, **taken)
    filled.given = frozenset(given)
    return filled
