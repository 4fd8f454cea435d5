"""One table for the screen, Markdown and CSV, and that every command's tables are made by it."""
import ast
import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_fast import cli, tables
from nanogpt_fast.checks import verify
from nanogpt_fast.checks.explanation import Explanation, Row

ROOT = Path(cli.__file__).parents[1]
HEAD, ROWS = ("name", "time"), [("a|b", "1 us"), ("c", "20,000 us")]


def test_a_table_in_each_format():
    assert tables.table(HEAD, ROWS) == "name       time\na|b        1 us\nc     20,000 us"
    assert tables.table(HEAD, ROWS, "markdown").splitlines() == ["| name | time |", "|--|--:|", "| a\\|b | 1 us |", "| c | 20,000 us |"]
    assert tables.table(HEAD, ROWS, "csv") == 'name,time\na|b,1 us\nc,"20,000 us"'
    assert tables.table(HEAD, [("48,442", "-1,234.5"), ("1,5", "1,2345")], "csv") == 'name,time\n48442,-1234.5\n"1,5","1,2345"'     # numbers
    with pytest.raises(ValueError, match="'html'; expected one of text, markdown, csv"):
        tables.table(HEAD, ROWS, "html")


def test_columns_are_aligned_by_letters_the_last_for_all_that_follow():
    rows = [("x", 1, "why", "so"), ("yyyy", 20, "w", "s")]
    assert tables.table(None, rows, align="lrl").splitlines() == ["x      1  why  so", "yyyy  20  w    s"]
    assert tables.table("abcd", rows, "markdown", "lrl").splitlines()[1] == "|--|--:|--|--|"
    assert tables.table(None, rows, "markdown", "l").splitlines()[:2] == ["|  |  |  |  |", "|--|--|--|--|"]     # Markdown has a head
    assert tables.table(None, rows, "csv").splitlines()[0] == "x,1,why,so"


def test_rows_that_come_one_by_one_stand_under_their_heads_and_a_wide_one_is_whole():
    lines = tables.Lines(HEAD, align="lr", widths=(6, 6))
    assert [*lines.head, lines.row(("a", 1)), lines.row(("a long name", 22))] == ["name      time", "a            1", "a long name      22"]
    lines = tables.Lines(HEAD, "csv")
    assert list(csv.reader(io.StringIO("\n".join([*lines.head, lines.row(('a "b"', "1,5"))])))) == [["name", "time"], ['a "b"', "1,5"]]


def test_a_table_in_a_pipe_is_as_wide_as_its_cells():
    code = f"from nanogpt_fast import tables; print(tables.table({HEAD!r}, [('word ' * 60 + 'last', 1)]))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "word last  " in printed and "\x1b" not in printed and len(printed.splitlines()) == 2


def test_a_cell_of_several_lines_stays_in_its_row():
    rows = [("a\nb", "1"), ("c\r\nd", "2"), ("e\rf", "3")]
    assert tables.table(HEAD, rows, "markdown").splitlines()[2:] == ["| a b | 1 |", "| c d | 2 |", "| e f | 3 |"]
    assert tables.table(HEAD, rows).split("\n") == ["name  time", "a b      1", "c d      2", "e f      3"]
    assert list(csv.reader(io.StringIO(tables.table(None, rows, "csv"), newline=""))) == [list(row) for row in rows]


def test_an_explanation_is_a_table_for_a_terminal_and_for_a_notebook():
    found = Explanation([Row("attention", "cpp", ""), Row("mlp", "reference", "a | b")])
    assert str(found) == "attention  cpp\nmlp        reference  a | b"
    assert found._repr_markdown_().splitlines()[0::3] == ["| op | runs as | why |", "| mlp | reference | a \\| b |"]


def test_a_row_of_verify_has_a_cell_for_each_head():
    start = dict(op="mlp", implementation="cpp", dtype="fp32", shape="C=1", direction="out")
    found = [verify.Row(**start, bound=1.0), verify.Row(**start), verify.Row(**start, result="-", why="no reason")]
    assert {len(row.cells()) for row in found} == {len(verify.HEAD)} == {len(verify.WIDTHS)}
    assert "not run here: no reason" in found[2].cells()


def hand_made(source):
    """Lines of a source whose f-strings, format specifications or calls pad a text to a width, as a table made by hand does."""
    def pads(node):
        if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
            spec = "".join(part.value if isinstance(part, ast.Constant) else "9" for part in node.format_spec.values)
            return re.match(r".?[<>^]\d|[1-9]\d*(,|$|[.][0-9]+[fegx%]|[sdf])", spec)
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("ljust", "rjust")
    return [node.lineno for node in ast.walk(ast.parse(source)) if pads(node)]


# What pads a text and is no table: {file: why}.
NO_TABLE = {"nanogpt_fast/tables.py": "it is the formatter", "nanogpt_fast/options.py": "help, wrapped to the terminal's width",
            "nanogpt_fast/training/banner.py": "a label before lines of a text", "nanogpt_fast/commands/ladder.py": "a progress bar's label",
            "benchmarks/gpu/lease.py": "a label before each line of a log"}


@pytest.mark.parametrize("folder", ["nanogpt_fast", "kernels", "benchmarks"])
def test_no_table_is_made_by_hand(folder):
    assert hand_made("f'{a:<28} {b:>10,.0f}'") == [1, 1] and hand_made("f'{a:{w}} {b:9.2f} {c:.2f} {d:,} {e:08d}'") == [1, 1]
    paths = [path for path in (ROOT / folder).rglob("*.py") if "nanogpt_fast/kernels" not in path.as_posix()]
    found = {path.relative_to(ROOT).as_posix(): hand_made(path.read_text()) for path in paths}
    assert paths and {name: lines for name, lines in found.items() if lines and name not in NO_TABLE} == {}
