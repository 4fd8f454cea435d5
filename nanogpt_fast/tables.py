"""One table for the screen, Markdown and CSV."""
import csv
import io

FORMATS = ("text", "markdown", "csv")


def table(head, rows, format="text", left=1):
    """A table as text. head: names of the columns; rows: lists of what stands in them; the first `left` columns are aligned to the left.

    Raises ValueError for a format that is not one of FORMATS.
    """
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    if format == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(cells)
        return text.getvalue().rstrip("\n")
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    if format == "markdown":
        cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
        cells.insert(1, ["--"] * left + ["--:"] * (len(head) - left))
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ("  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))) for row in cells)
    return "\n".join(line.rstrip() for line in lines)
