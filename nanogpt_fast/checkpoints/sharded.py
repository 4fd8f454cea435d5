"""Checkpoints in shards: each rank writes its part of the weights and of AdamW's moments, by torch.distributed.checkpoint (DCP).

The last.pt of a run with --shard holds everything else, and names the folder beside it that holds these:

    out/last.pt                     "shards": {"folder": "shards-00002000-1f3a9c", "names": [...], "files": {name: [bytes, crc32]}}
    out/shards-00002000-1f3a9c/     a file of each rank, and DCP's .metadata, which says what is where

The folder is complete, and on the disk, before last.pt gets its name; so the rename of last.pt stays the one commit point (folder.py).
Any number of ranks loads a folder (`load`), and so does a single process, into ordinary tensors (`assemble`). Both compare the files with
their checksums first. DCP's .metadata is a pickle; it is read with only DCP's own classes allowed, so that nothing in it can run.

In DCP's terms the names are "model/NAME" for a parameter, and "KEY/NAME" for each KEY of its AdamW state (step, exp_avg, exp_avg_sq).
"""
import contextlib
import pickle
import secrets
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.nn as nn

from ..files import sync
from .state import CheckpointError

STATE = ("step", "exp_avg", "exp_avg_sq")     # of AdamW, for each parameter


def write(out_dir, model, optimizer, step, ranks):
    """Write the folder of this step, every rank its part; returns (state, shards) for last.pt's "optimizer" and "shards".

    Every rank calls it. Raises CheckpointError on every rank if one cannot write; the folder is then removed.
    """
    from torch.distributed import checkpoint as dcp
    reshard(model)
    name = ranks.gather(f"shards-{step:08d}-{secrets.token_hex(3)}")[0]     # a step may be saved twice, and the first one may be in use
    folder = Path(out_dir, name)
    names = {p: name for name, p in model.named_parameters()}
    tensors = {f"model/{name}": p.detach() for p, name in names.items()}
    tensors |= {f"{key}/{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}
    failure = None
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))      # it flushes the files to the disk, not their names
        sync(folder)
        mine = [*folder.glob(f"__{ranks.rank}_*"), *([folder / ".metadata"] if ranks.is_master else [])]
        files = {path.name: _checksum(path) for path in mine}
    except (dcp.api.CheckpointException, OSError, RuntimeError) as error:   # the first is no Exception
        failure, files = _first_line(error), {}
    of_each = ranks.gather((failure, files))
    failure = next((failure for failure, _ in of_each if failure is not None), None)
    if failure is not None:
        if ranks.is_master:
            remove(out_dir, dict(folder=name))
        former = "The previous checkpoint is intact." if Path(out_dir, "last.pt").is_file() else "There was none before."
        raise CheckpointError(f"cannot write {folder}: {failure}. {former}")
    groups = optimizer.state_dict()["param_groups"]
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    return (dict(state={}, param_groups=groups),
            dict(folder=name, names=list(names.values()), order=order, files={k: v for _, files in of_each for k, v in files.items()}))


def reshard(model):
    """Free the weights that a forward pass without a backward left gathered: the model's parameters are again its rank's parts."""
    from torch.distributed.fsdp import FSDPModule
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load(checkpoint, model, optimizer, ranks):
    """Load the shards that a last.pt names into a divided model and its AdamW. All ranks call it. Raises CheckpointError on all."""
    folder, shards = _folder(checkpoint), checkpoint["shards"]
    _refuse_damage(folder, shards, ranks)
    known = _known(folder)
    wanted = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if f"exp_avg/{name}" not in known:
            continue
        state = optimizer.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p, requires_grad=False),
                                          exp_avg_sq=torch.zeros_like(p, requires_grad=False))
        wanted |= {f"{key}/{name}": value for key, value in state.items()}
    differs = [f"{name} has shape {tuple(known[name])}, but the model's is {tuple(tensor.shape)}" if name in known else f"{name} is missing"
               for name, tensor in wanted.items() if tuple(known.get(name, ())) != tuple(tensor.shape)]
    if differs:
        raise CheckpointError(f"{folder} does not fit the model or its optimizer: {'; '.join(differs[:3])}. (A block_size smaller than the "
                              "checkpoint's crops the model but not the optimizer state.)")
    _read(folder, wanted)


def check(checkpoint, expected):
    """Raise CheckpointError unless the folder has these weights, {name: shape}, and moments of their shapes, so that nothing larger is built.

    A tied head need not be there. checkpoint: with "path", as `schema.check` returned it.
    """
    folder, shards = _folder(checkpoint), checkpoint["shards"]
    known, names = _known(folder), set(shards["names"])
    problems = [f"{name} is missing" for name in expected if name not in names and name != "lm_head.weight"]
    problems += [f"{name[:60]} does not belong there" for name in names if name not in expected]
    for name in names & expected.keys():
        for key in ("model", "exp_avg", "exp_avg_sq"):
            shape = known.get(f"{key}/{name}", () if key == "model" else expected[name])
            if tuple(shape) != tuple(expected[name]):
                problems.append(f"{key}/{name} has shape {tuple(shape)}, but model_args require {tuple(expected[name])}")
    problems += [f"{name[:60]} is not of this model" for name in known if name.partition("/")[2] not in names
                 or name.startswith("step/") and tuple(known[name]) != ()]
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit the model: {'; '.join(problems[:3])}")


def assemble(checkpoint):
    """The same checkpoint with its weights and moments as whole tensors on the CPU, in nanoGPT's form. For one process alone."""
    folder, shards = _folder(checkpoint), checkpoint["shards"]
    _refuse_damage(folder, shards)
    tensors = {name: torch.empty(shape) for name, shape in _known(folder).items()}
    _read(folder, tensors, no_dist=True)
    model = {name: tensors[f"model/{name}"] for name in shards["names"]}
    if "lm_head.weight" not in model:
        model["lm_head.weight"] = model["transformer.wte.weight"]
    state = {i: {key: tensors[f"{key}/{name}"] for key in STATE} for i, name in enumerate(shards["order"]) if f"exp_avg/{name}" in tensors}
    rest = {key: value for key, value in checkpoint.items() if key not in ("shards", "best")}
    return {**rest, "model": model, "optimizer": {**checkpoint["optimizer"], "state": state}}


def distributed(state, parameters):
    """An AdamW state of whole tensors (`assemble`, or any ckpt.pt's) with each moment divided as its parameter is.

    parameters: in the state's order; those that are not divided leave theirs whole."""
    if all(type(p) is nn.Parameter for p in parameters):
        return state        # without the import, which takes a second
    from torch.distributed.tensor import DTensor, distribute_tensor

    def divided(value, p):
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None) if value.dim() else value
    return {i: {key: divided(value, parameters[i]) for key, value in moments.items()} if isinstance(parameters[i], DTensor) else moments
            for i, moments in state.items()}


def remove(out_dir, shards):
    """Remove the folder of shards that nothing names."""
    shutil.rmtree(Path(out_dir, shards["folder"]), ignore_errors=True)


def remove_others(out_dir, names):
    """Remove the folders of shards in out_dir except those of these names: earlier ones, and what killed runs left half-written."""
    for folder in Path(out_dir).glob("shards-*"):
        if folder.name not in names:
            shutil.rmtree(folder, ignore_errors=True)


def _folder(checkpoint):
    folder = Path(checkpoint["path"]).parent / checkpoint["shards"]["folder"]
    if not folder.is_dir():
        raise CheckpointError(f"{checkpoint['path']} has its weights in the folder {folder}, which is missing. The two belong together: "
                              "copy or move both")
    return folder


def _refuse_damage(folder, shards, ranks=None):
    """Raise CheckpointError, on every rank, if a file is not as it was written. The ranks divide the files among themselves."""
    files = sorted(shards["files"].items())
    wrong = [name for name, written in (files if ranks is None else files[ranks.rank::ranks.size])
             if not (folder / name).is_file() or _checksum(folder / name) != list(written)]
    wrong = wrong if ranks is None else [name for of_one in ranks.gather(wrong) for name in of_one]
    if wrong:
        raise CheckpointError(f"{folder} is damaged: {', '.join(wrong)} is missing or has another checksum than when it was written. Take "
                              "another copy or an earlier one")


def _checksum(path):
    """[size in bytes, crc32]."""
    crc = size = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _reader(folder):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(dcp.FileSystemReader):
        """DCP's, but .metadata may hold DCP's own classes only."""

        def read_metadata(self, *args, **kwargs):
            with open(Path(folder, ".metadata"), "rb") as f:
                metadata = _Metadata(f).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata
    return Reader(folder)


class _Metadata(pickle.Unpickler):
    """Reads the classes that describe tensors, and nothing that could run code or that holds Python objects."""

    DESCRIBE = {
        "torch.distributed.checkpoint.metadata": ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                                                  "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",), "torch": ("Size", "float32"), "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath", "WindowsPath"), "pathlib._local": ("PosixPath", "WindowsPath"),
    }

    def find_class(self, module, name):
        if name not in self.DESCRIBE.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _known(folder):
    """{name: shape} of the tensors in a folder."""
    with _as_checkpoint_error(folder):
        return {name: entry.size for name, entry in _reader(folder).read_metadata().state_dict_metadata.items()}


def _read(folder, tensors, **how):
    from torch.distributed import checkpoint as dcp
    with _as_checkpoint_error(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)     # no_dist says it on purpose
        dcp.load(tensors, storage_reader=_reader(folder), **how)


@contextlib.contextmanager
def _as_checkpoint_error(folder):
    from torch.distributed.checkpoint.api import CheckpointException
    try:
        yield
    except (Exception, CheckpointException) as error:     # whatever DCP's or torch's reader meets first in a damaged or foreign file
        raise CheckpointError(f"{folder} cannot be read ({type(error).__name__}: {_first_line(error)})") from None


def _first_line(error):
    """What went wrong, from DCP's exception, which holds those of the ranks, or any other."""
    causes = getattr(error, "failures", None)
    if causes:
        rank, (cause, _) = next(iter(causes.items()))
        return f"rank {rank}: {_first_line(cause)}"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0][:200]
