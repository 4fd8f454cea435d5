"""One table for the screen, Markdown and CSV: every command and report prints its tables with this.

The text has no colour and is as wide as its cells, on a terminal and in a pipe. Standard library only, since `doctor` needs it where
nothing else works.
"""
import csv
import io
import re
import sys

from nanogpt_fast.options import option

FORMATS = ("text", "markdown", "csv")
THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")


ABOUT = "of the table; with csv what else there is to say goes to stderr"


def format_option(**more):
    """The option --format of a command that prints a table, as a field of its options. more: as of `option`."""
    return option("text", ABOUT, choices=FORMATS, **more)


def add_format(parser):
    """The same option for an argparse.ArgumentParser."""
    parser.add_argument("--format", choices=FORMATS, default="text", help=ABOUT)


def aside(format):
    """The file for what a command prints beside its table: a CSV file holds nothing else."""
    return sys.stderr if format == "csv" else sys.stdout


def table(head, rows, format="text", align="lr"):
    """A table as text. head: names of the columns, None for none; rows: lists of what stands in them. align: l or r for each column,
    the last letter for all that follow.

    Raises ValueError for a format that is not one of FORMATS.
    """
    rows = [[str(cell) for cell in row] for row in rows]
    lines = Lines(head, format, align, [max(map(len, column)) for column in zip(*rows)])
    return "\n".join([*lines.head, *map(lines.row, rows)])


class Lines:
    """A table whose rows are printed one by one, as they become known: first `head`, a list of lines, then `row(cells)`, a line each.

    widths: of the first columns in text, at least; a wider cell pushes the others of its line to the right. head, align: as of `table`.
    """

    def __init__(self, head, format="text", align="lr", widths=()):
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
        names = [""] * len(widths) if head is None else head
        self.format, self.left = format, [letter == "l" for letter in align.ljust(len(names), align[-1])]
        self.widths = [max(len(name), width) for name, width in zip(names, (*widths, *[0] * len(names)))]
        self.head = [] if head is None and format != "markdown" else [self.row(names)]
        if format == "markdown":
            self.head.append("|" + "|".join("--" if left else "--:" for _, left in zip(names, self.left)) + "|")

    def row(self, cells):
        cells = [str(cell) for cell in cells]
        if self.format == "csv":
            text = io.StringIO()
            cells = [cell.replace(",", "") if THOUSANDS.fullmatch(cell) else cell for cell in cells]    # a number, to what reads the file
            csv.writer(text, lineterminator="\r\n").writerow(cells)     # Python 3.11 quotes only the ends of line that this names
            return text.getvalue().removesuffix("\r\n")
        cells = [" ".join(cell.splitlines()) for cell in cells]
        if self.format == "markdown":
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        padded = (cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(cells, self.widths, self.left))
        return "  ".join(padded).rstrip()
