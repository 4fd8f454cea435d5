"""What a person sees of `tune`: a table that grows while it runs, and the summary."""
import contextlib

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .. import tables
from . import contest as rules
from .contests import PYTORCH

COLUMNS = ("what", "tried", "runs", "time", "it was", "gain", "next best", "PyTorch")
NUMBERS = ("time", "gain", "PyTorch")
DISPENSABLE = ("tried", "PyTorch", "next best", "it was")       # in a narrow terminal, in this order


class Screen:
    """The contests as a table: live on a terminal, else a line for each that is decided."""

    def __init__(self, contests, format="text"):
        self.contests, self.aside = contests, tables.aside(format)
        self.console = Console(highlight=False)
        self.tried, self.entries = {contest.name: 0 for contest in contests}, {contest.name: len(contest.entries) for contest in contests}
        self.live = Live(console=self.console, get_renderable=self.table, refresh_per_second=4) if self.console.is_terminal else None

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        if self.live is not None:
            self.stack.enter_context(self.live)
        return self

    def __exit__(self, *error):
        self.stack.close()

    def tried_one(self, contest, label, why):
        """Of trying.py: an entry is compiled and right, or `why` it is neither."""
        self.tried[contest.name] += 1
        if why is not None and self.live is None:
            print(f"  {contest.title}: {label}: {why}", file=self.aside, flush=True)

    def decided(self, contest):
        if self.live is None:
            what, winner, time, _, gain, *_ = cells(contest)
            print(f"  {what}: {' '.join(filter(None, (winner, time, gain))) or 'not decided'}", file=self.aside, flush=True)

    def lines(self):
        return [(what, f"{self.tried[contest.name]}/{self.entries[contest.name]}", *rest)
                for contest in self.contests for what, *rest in (cells(contest),)]

    def text(self, format):
        """The table whole, in a file or a pipe."""
        return tables.table(COLUMNS, self.lines(), format, "".join("r" if name in NUMBERS else "l" for name in COLUMNS))

    def table(self):
        """Of the columns, those that the terminal has room for."""
        lines = self.lines()
        widths = {name: max(map(len, texts)) for name, texts in zip(COLUMNS, zip(COLUMNS, *lines))}
        for name in DISPENSABLE:
            if sum(widths.values()) + 2 * (len(widths) - 1) > self.console.width:
                del widths[name]
        table = Table(box=None, pad_edge=False)
        for name in widths:
            table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
        for line in lines:
            table.add_row(*(text for name, text in zip(COLUMNS, line) if name in widths))
        return table


def cells(contest):
    """What, winner, its time, what ran before, the gain, the next best and PyTorch, as texts; empty where not known yet."""
    medians, winner = contest.medians, contest.winner
    if not medians:
        return contest.title, "", "", "", "", "", ""
    second = contest.runner_up
    second = "" if second is None else f"{contest.named(second[0])} {rules.microseconds(second[1])}"
    gain = "" if winner == rules.UNTUNED else f"{medians[rules.UNTUNED] / medians[winner]:.2f} x"
    pytorch = contest.now == PYTORCH and medians[rules.UNTUNED] or medians.get(PYTORCH)
    return (contest.title, contest.named(winner), rules.microseconds(medians[winner]), "" if winner == rules.UNTUNED else contest.named(rules.UNTUNED), gain, second,
            rules.microseconds(pytorch) if pytorch else "")
