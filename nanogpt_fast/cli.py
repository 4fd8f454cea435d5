"""The command `nanogpt-fast`, also `python -m nanogpt_fast`: runs a subcommand, and reports errors in one line.

Nothing heavy is imported before a subcommand is chosen. Every subcommand is a function that takes the words after its name
and returns an exit status or None. Exit status: 0 success, 2 an error in the arguments or the environment (one line says which),
130 interrupted, 1 a bug (with its traceback).
"""
import difflib
import io
import os
import sys
import traceback
from importlib import import_module

from nanogpt_fast import tables

COMMANDS = {  # name: (module, function, what it does)
    "demo": ("commands.demo", "main", "train a small GPT on text that ships with Python, and complete a prompt"),
    "prepare": ("text.prepare", "main", "turn a text into token files: embedded, shakespeare, a file, a folder"),
    "train": ("training.trainer", "run", "train a GPT, with nanoGPT's config files and names"),
    "sample": ("commands.sampling", "sample", "complete a prompt with a trained GPT, or with GPT-2"),
    "chat": ("commands.sampling", "chat", "complete the prompts that you type"),
    "eval": ("commands.evaluate", "main", "measure a GPT on a text: loss, perplexity, bits per byte; or on HellaSwag"),
    "ladder": ("commands.ladder", "main", "train the small models from bigram to GPT and compare them"),
    "convert": ("checkpoints.convert", "main", "convert a checkpoint between the layouts of nanoGPT, transformers and the ladder's GPT"),
    "run": ("swap.run", "main", "run a nanoGPT script unedited on the fused kernels"),
    "doctor": ("checks.doctor", "main", "what runs here, what does not, and why"),
    "verify": ("checks.verify", "main", "check every op against float64, on this machine"),
    "tune": ("tuning.command", "main", "measure what is fastest on this machine, for `auto` to use"),
    "bench": ("bench", "main", "time training and generation end to end"),
}


def main(argv=None):
    """Run the command line (default: sys.argv) and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = " ".join(["nanogpt-fast", *argv[:1]])
    try:
        return until_nobody_reads(lambda: _run(argv))
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("NANOGPT_FAST_TRACEBACK") or not is_for_the_user(error):
            raise
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2


def until_nobody_reads(command):
    """A command's exit status; 0 if the reader of its output ends before it does (`nanogpt-fast train --help | head`)."""
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, because what Python's own flush raises at exit cannot be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # keeps Python's flush at exit from complaining
        return 0


def _run(argv):
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from nanogpt_fast import __version__
        print(f"nanogpt-fast {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)     # none, where all names are far from it
        print(f"nanogpt-fast: no command {argv[0]!r}{f'; the nearest is {near[0]}' if near else ''} (`nanogpt-fast --help` lists them all)",
              file=sys.stderr)
        return 2
    if argv[0] != "bench":  # which compares with nanoGPT, as PyTorch runs it
        from nanogpt_fast.threads import sleep_while_waiting
        sleep_while_waiting()
    module, function, _ = COMMANDS[argv[0]]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # print "?" for characters that the terminal lacks
    return getattr(import_module(f"nanogpt_fast.{module}"), function)(argv[1:]) or 0


def usage():
    commands = tables.table(None, [(f"  {name}", about) for name, (_, _, about) in COMMANDS.items()], align="l")
    return "\n".join(["usage: nanogpt-fast COMMAND [...]        (COMMAND --help for its options)", "", commands, "",
                      "To start: nanogpt-fast train --dataset=embedded",
                      "NANOGPT_FAST_TRACEBACK=1 shows where in the code an error was raised."])


LONGEST = 2000  # characters of an error; one that quotes a huge argument would fill the terminal
TOO_LARGE = (   # what PyTorch's CPU allocator says, and its arithmetic on sizes whose bytes no 64-bit number can count
    "can't allocate memory", "Storage size calculation overflowed", "integer multiplication overflow", "Overflow when unpacking")


def is_for_the_user(error):
    """True for an error whose text is meant for the user: this package or the operating system raised it, or memory ran out. Anything
    else is a bug, which needs its traceback."""
    if isinstance(error, OSError) or type(error).__name__ == "OutOfMemoryError" or out_of_memory(error):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return os.path.realpath(raised_in).startswith(os.path.dirname(os.path.realpath(__file__)) + os.sep)


def out_of_memory(error):
    """Whether the machine's memory ran out, or was asked for more than any machine has."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(words in str(error) for words in TOO_LARGE)


def one_line(error):
    """The text of an error in one line, its middle left out where it is very long."""
    text = " ".join(str(error).split())
    if out_of_memory(error):
        text = f"out of memory: a smaller model, batch, context or text needs less ({text or type(error).__name__})"
    return text if len(text) <= LONGEST else f"{text[:LONGEST // 2]} ... {text[-LONGEST // 2:]}"
