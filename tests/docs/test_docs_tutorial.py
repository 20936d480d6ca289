"""The tutorial runs from the first cell to the last on the toy, and stands in the repository without outputs."""

from __future__ import annotations

import nbformat
import pytest
from docs_pages import DOCS
from nbclient import NotebookClient

TUTORIAL = DOCS / "tutorial.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(TUTORIAL, as_version=4)


def test_it_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.timeout(900)  # half a minute of CPU, on a busy machine more
def test_it_runs(notebook, toy_folder, tmp_path):
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3
