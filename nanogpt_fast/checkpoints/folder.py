"""A run's folder: who trains in it, which of its checkpoints a resume takes, and how they are saved.

last.pt is the state of the run, and its rename is the one commit point. ckpt.pt, with the weights to sample from, is renamed after
it. A kill between the two renames loses nothing: last.pt has all that ckpt.pt has, and `finish` writes ckpt.pt from it.

With --shard the weights of last.pt are in a folder beside it (sharded.py), and those with the best validation loss in another, which
last.pt names under "best". ckpt.pt is made of that one, by `export`, when the run ends.

run.json names the process that trains here and is locked while it lives. It also names the run that began here last. If that run was
killed before its first checkpoint, the checkpoints here are of an earlier run, and `latest` refuses them.
"""
import contextlib
import json
import os
import secrets
import socket
import time
from pathlib import Path

import torch

from .. import files
from . import nanogpt, schema, sharded
from .state import CheckpointError

RECORD = "run.json"
WRITTEN = ("ckpt.pt", "last.pt", "metrics.jsonl", "loss.png")  # by a trainer, each under a temporary name first
_locked = set()  # descriptors of the locked run.json files


def _unlock_in_child():
    for descriptor in _locked:
        os.close(descriptor)
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)  # a forked child may outlive the trainer, and must not keep its lock


# ------------------------------------------------------------------------------------------------------------ who has it

@contextlib.contextmanager
def owned(folder, create=True):
    """Inside, no other process trains in `folder`. Removes what killed runs left half-written there.

    The lock ends with the process, however it ends. create: create the folder if it is missing; otherwise a missing one is left alone.
    Raises RuntimeError, which names the process that has the folder.
    """
    folder = Path(folder)
    if not create and not folder.is_dir():
        yield
        return
    files.make_folder(folder, "--out_dir=")
    descriptor = os.open(folder / RECORD, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        taken = files.lock(descriptor)
        if taken is False:
            other = _record(folder)
            raise RuntimeError(f"{folder} is in use: process {other.get('pid', '(unknown)')} on {other.get('host', 'an unknown host')} has "
                               f"trained there since {other.get('since', 'an unknown time')}. Two runs would overwrite each other's "
                               "checkpoints. Wait for its end, stop it, or use another --out_dir")
        if taken is None:
            print(f"{folder}: this file system has no locks, so a second run in the same folder would not be noticed")
        _locked.add(descriptor)
        _write(folder, pid=os.getpid(), host=socket.gethostname(), since=time.strftime("%Y-%m-%d %H:%M:%S"))
        files.remove_litter(*(folder / name for name in WRITTEN))
        yield
    finally:
        _locked.discard(descriptor)
        os.close(descriptor)


def begin(folder, run, launch=()):
    """Note that the run `run` begins here with new weights. Says which checkpoints it is going to replace.

    launch: the names of the launch of torchrun (`devices.launch`), by which restarted ranks know the run as their own.
    """
    last, best = Path(folder, "last.pt"), Path(folder, "ckpt.pt")
    former = last if last.is_file() else best
    if former.is_file():
        print(f"WARNING: {former} is {_described(_label(former))}: this new run replaces it at its first checkpoint, which Ctrl-C writes too "
              "(--init_from=resume continues the earlier run)")
    _write(folder, run=run, began=time.time(), launch=list(launch))


def new_run():
    """The name of a new run: when it began, and some random digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def owner(folder):
    """(pid, host, since) of the process that `owned` noted last."""
    record = _record(folder)
    return record.get("pid"), record.get("host"), record.get("since")


def restarted(folder, launch):
    """Whether the run that began here last has a checkpoint here, and was begun by this launch of torchrun: they share a name."""
    record, label = _record(folder), _label(Path(folder, "last.pt"))
    its_own = label is not None and label[0] is not None and label[0] == record.get("run")
    return its_own and not set(launch).isdisjoint(record.get("launch", ()))


def _record(folder):
    """What run.json holds: pid, host, since; run, began (seconds since 1970) and launch of the run that began here last. Whatever is unknown is
    absent."""
    try:
        found = json.loads(Path(folder, RECORD).read_text(encoding="utf-8").splitlines()[0])
    except (OSError, ValueError, IndexError, RecursionError):
        return {}
    kinds = {"pid": schema.whole, "host": _is_text, "since": _is_text, "run": _is_text,
             "began": lambda began: schema.at_least_0(began) and began < 1e11,      # a time that localtime takes
             "launch": lambda names: type(names) is list and all(map(_is_text, names))}
    return {name: found[name] for name, good in kinds.items() if isinstance(found, dict) and name in found and good(found[name])}


def _is_text(value):
    return type(value) is str and len(value) <= 300


def _write(folder, **changes):
    """Change run.json in place, because the lock belongs to this very file: in one write, and a reader takes only the first line."""
    line = json.dumps({**_record(folder), **changes}).encode() + b"\n"
    with open(Path(folder, RECORD), "r+b", buffering=0) as f:
        f.write(line)
        f.truncate()


# ------------------------------------------------------------------------------------------------------------ what to resume

def latest(folder):
    """The path of the checkpoint to resume from: last.pt; or ckpt.pt, if it is the only one or nanoGPT has trained it further.

    Raises CheckpointError if it is of an earlier run than the one that began in this folder last.
    """
    last, best = Path(folder, "last.pt"), Path(folder, "ckpt.pt")
    chosen = last if last.is_file() else best
    if last.is_file() and best.is_file() and best.stat().st_mtime > last.stat().st_mtime:
        try:
            label = _label(best)
            if (label is None or label[0] is None) and nanogpt.read(best)["iter_num"] > nanogpt.read(last, weights=False)["iter_num"]:
                chosen = best
        except CheckpointError as error:
            print(f"WARNING: {error} {last} is taken.")
    record = _record(folder)
    if {"run", "began"} <= set(record) and chosen.is_file() and chosen.stat().st_mtime < record["began"]:
        label = _label(chosen)
        if label is not None and label[0] != record["run"]:
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["began"]))
            raise CheckpointError(f"{chosen} is {_described(label)}, but a later run, {record['run']}, began in {folder} at {began} and "
                                  f"ended before its first checkpoint. Start that run again without --init_from=resume; or, to "
                                  f"continue the earlier one, delete {Path(folder, RECORD)}")
    return chosen


def read(path, weights=True):
    """`nanogpt.read` of what `latest` found. Raises CheckpointError that says so if the folder's ckpt.pt can be read where last.pt cannot."""
    try:
        return nanogpt.read(path, weights=weights)
    except CheckpointError as error:
        best = Path(path).with_name("ckpt.pt")
        if best == Path(path) or not best.is_file():
            raise
        try:
            step = nanogpt.read(best, weights=False)["iter_num"]
        except CheckpointError:
            raise error from None
        raise CheckpointError(f"{error} {best} is whole, of step {step}: move {path} away to go on from there, though not exactly") from None


def _label(path):
    """(run, step) that a checkpoint says it is of; the run is None in nanoGPT's; None for a file that cannot be read.

    The weights stay on the disk."""
    found = nanogpt.glance(path)
    if found is None:
        return None
    run, step = found.get("run"), schema.number(found.get("iter_num"))
    return (run, step) if (run is None or type(run) is str) and schema.whole(step) else None


def _described(label):
    """A label in words."""
    if label is None:
        return "not readable"
    run, step = label
    return f"of {'a run without a name' if run is None else f'run {run}'}, step {step}"


# ------------------------------------------------------------------------------------------------------------ saving

def save(folder, checkpoint, resume, *, best):
    """Write last.pt, and if `best` ckpt.pt too. checkpoint: of `nanogpt.contents`. resume: what an exact continuation needs besides.

    A kill at any time leaves a whole last.pt, the former or the new one, and with it all that is needed. Raises CheckpointError.
    """
    last, ckpt = Path(folder, "last.pt"), Path(folder, "ckpt.pt")
    with nanogpt.writing(*[last, ckpt][:1 + best]) as opened:
        if best:
            torch.save(checkpoint, opened[1])
            opened[1].flush()  # so that last.pt is the younger file
        torch.save({**checkpoint, "resume": {**resume, "ckpt": best}}, opened[0])
    sharded.remove_others(folder, ())


def save_sharded(folder, checkpoint, resume, *, best):
    """`save` of a checkpoint whose shards are written. If `best`, their folder is kept for ckpt.pt until there is a better one."""
    last = Path(folder, "last.pt")
    former = nanogpt.glance(last) or {} if last.is_file() else {}
    kept = checkpoint if best else former.get("best") if former.get("run") == checkpoint["run"] else None
    try:
        with nanogpt.writing(last) as (f,):
            torch.save({**checkpoint, "best": kept, "resume": {**resume, "ckpt": False}}, f)
    except CheckpointError:
        sharded.remove(folder, checkpoint["shards"])
        raise
    _remove_unnamed(folder, checkpoint, kept)


def export(folder):
    """Write ckpt.pt, whole, from the shards that last.pt names as the best, if it is missing or older than last.pt. Removes all others."""
    last, ckpt = Path(folder, "last.pt"), Path(folder, "ckpt.pt")
    saved = nanogpt.glance(last) or {} if last.is_file() else {}
    if "shards" not in saved:
        return
    best = saved["best"]
    if best is not None and nanogpt.last_is_meant(Path(folder)) and (best["run"], best["iter_num"]) != _label(ckpt):
        nanogpt.save({key: value for key, value in sharded.assemble({**best, "path": last}).items() if key != "path"}, ckpt)
    _remove_unnamed(folder, saved, best)


def _remove_unnamed(folder, last, best):
    """Remove the shards that neither last.pt nor its "best" names."""
    sharded.remove_others(folder, [one["shards"]["folder"] for one in (last, best) if one is not None])


def finish(folder, checkpoint):
    """Write the ckpt.pt that was saved with this checkpoint of last.pt, if a kill came before it got its name."""
    last, ckpt = Path(folder, "last.pt"), Path(folder, "ckpt.pt")
    if not checkpoint.get("resume", {}).get("ckpt"):
        return
    stale = not ckpt.is_file() or ckpt.stat().st_mtime <= last.stat().st_mtime
    if stale and _label(ckpt) != (checkpoint.get("run"), checkpoint["iter_num"]):
        print(f"{ckpt} is older than {last}: the run was killed while it saved both. It is written again from {last}")
        nanogpt.save({key: value for key, value in checkpoint.items() if key not in ("resume", "path")}, ckpt)
