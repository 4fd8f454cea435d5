"""The file of what `nanogpt-fast tune` measured on this machine: where it is, and which of its rows are in force here.

One JSON file holds the machines that share a home folder. A machine is a card's name with the versions that decide how fast its kernels
are; measured rows count for exactly these. NANOGPT_FAST_TUNED=FILE names another file, NANOGPT_FAST_TUNED=off leaves all rows out.
"""
import json
import os
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..files import locked, refuse_special, replacing
from ..kernels import fastest

FORMAT = 1


def path():
    """The file, or None where NANOGPT_FAST_TUNED is off or there is no cache folder."""
    named = os.environ.get("NANOGPT_FAST_TUNED", "")
    if named.lower() in ("off", "0"):
        return None
    return Path(named) if named else default()


def default():
    """The file in the user's cache folder, or None: in a container a user may have no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanogpt_fast", "tuned.json")
    except RuntimeError:
        return None


def versions(cuda):
    """The versions that rows are kept for: {name: text}."""
    found = {"nanogpt_fast": __version__, "torch": torch.__version__}
    if cuda:
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        try:
            found["triton"] = metadata.version("triton")
        except metadata.PackageNotFoundError:
            pass
    else:
        found["threads"] = str(torch.get_num_threads())
    return found


def read(file):
    """The machines of a file: a list of dicts, each with "card", "cuda" (whether it is a GPU), "versions", "rows" and "contests".

    Raises ValueError, saying what is wrong with the file; FileNotFoundError.
    """
    refuse_special(file)
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("machines"), list):
        raise ValueError(f"{file} is not a file of `nanogpt-fast tune` of format {FORMAT}")
    machines = []
    for machine in content["machines"]:
        right = isinstance(machine, dict) and isinstance(machine.get("card"), str) and isinstance(machine.get("versions"), dict) \
            and isinstance(machine.get("rows"), list) and isinstance(machine.get("contests", []), list)
        if not right:
            raise ValueError(f"{file}: a machine is {str(machine)[:80]}; expected an object with card, versions, rows and contests")
        machines.append(machine | {"rows": [fastest.from_json(row) for row in machine["rows"]], "cuda": bool(machine.get("cuda"))})
    return machines


def load():
    """Put the rows that were measured with these versions before the shipped ones, for this process. Returns what the user should know."""
    file = path()
    if file is None:
        return []
    try:
        machines = read(file)
    except FileNotFoundError:
        return [f"NANOGPT_FAST_TUNED={file}: there is no such file; `nanogpt-fast tune` writes it"] if "NANOGPT_FAST_TUNED" in os.environ else []
    except (OSError, ValueError) as error:
        return [f"what `nanogpt-fast tune` measured is ignored: {error}"]
    current = [machine for machine in machines if machine["versions"] == versions(machine["cuda"])]
    if current:
        fastest.install([row for machine in current for row in machine["rows"]])
    here = {fastest.cpu_name()} | {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)}
    stale = {machine["card"]: machine for machine in machines if machine["card"] in here} | {machine["card"]: None for machine in current}
    return [f"what was measured on {card} is ignored, since it was with other versions ({_changed(machine)}); `nanogpt-fast tune` measures again"
            for card, machine in stale.items() if machine is not None]


def about(cuda):
    """One line on what was measured on this machine's CPU, or on its first GPU; None where nobody would expect any."""
    card = torch.cuda.get_device_name() if cuda else fastest.cpu_name()
    try:
        machines = read(path()) if path() is not None else []
    except (OSError, ValueError):
        machines = []           # `load` says what is wrong
    for machine in machines:
        if (machine["card"], machine["versions"]) == (card, versions(cuda)):
            return f"{len(machine['contests'])} ops and kernels were measured on this {'card' if cuda else 'CPU'} ({path()})"
    return "nothing was measured on this card; `nanogpt-fast tune` takes two minutes" if cuda and path() is not None else None


def _changed(machine):
    now, then = versions(machine["cuda"]), machine["versions"]
    return ", ".join(f"{name} {then.get(name, 'none')}, now {now.get(name, 'none')}" for name in now | then if now.get(name) != then.get(name))


def check(file):
    """Raise OSError or ValueError if `save` cannot write this file; to be called before minutes are spent. Makes its folder."""
    if file is None:
        raise ValueError("there is no cache folder for the file, since this user has no home; name one with --out=FILE")
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; expected a file's name")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=file.parent):
        pass
    try:
        read(file)
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise ValueError(f"{error}; it would be overwritten: move it away, or name another with --out=FILE") from None


def save(file, card, cuda, rows, contests):
    """Write what was measured into a file, keeping what it has of other machines, versions and shapes.

    rows: measured Rows. contests: dicts with the samples, one for each; a contest replaces an earlier one of the same name, and its rows.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.parent, print):
        try:
            machines = read(file)
        except FileNotFoundError:
            machines = []
        same = lambda machine: (machine["card"], machine["versions"]) == (card, versions(cuda))
        before = next(filter(same, machines), {"rows": [], "contests": []})
        again = {contest["name"] for contest in contests}
        kept = [contest for contest in before["contests"] if contest.get("name") not in again]
        left = {json.dumps(row) for contest in kept for row in contest.get("rows", ())}
        rows = [*rows, *(row for row in before["rows"] if json.dumps(fastest.to_json(row)) in left)]
        machine = {"card": card, "cuda": cuda, "versions": versions(cuda), "rows": rows, "contests": [*kept, *contests]}
        machines = [machine, *(one for one in machines if not same(one))]
        with replacing(file) as f:
            f.write(_text(machines).encode())
    return file


def _text(machines):
    """JSON with a line for each row and each contest."""
    def block(machine):
        head = {name: machine[name] for name in ("card", "cuda", "versions")}
        lists = {"rows": map(fastest.to_json, machine["rows"]), "contests": machine["contests"]}
        parts = [f"   {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        parts += [f"   {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(line)}" for line in lines) + "\n   ]" for name, lines in lists.items()]
        return "  {\n" + ",\n".join(parts) + "\n  }"
    return f'{{\n "format": {FORMAT},\n "machines": [\n' + ",\n".join(map(block, machines)) + "\n ]\n}\n"
