"""Execute tour.ipynb and keep its outputs:  python docs/run_notebook.py  (pip install -e ".[notebook,gpt2]" first; under a minute)

What the cells write to stderr (progress bars, warnings) is not kept: it reads well while it moves, and not afterwards.
"""
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "tour.ipynb"


def executed():
    """The notebook, executed anew in an empty folder. Raises nbclient's CellExecutionError if a cell raises."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=300, coalesce_streams=True, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)    # times of day
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("widgets", None)
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
