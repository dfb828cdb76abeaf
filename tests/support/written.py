"""Notebooks that tests write."""

from pathlib import Path

import nbformat


def notebook(path: Path, *sources: str, parameters: bool = False) -> Path:
    """Write a notebook of these code cells; with `parameters`, the first one takes a run's parameters. Returns its path."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    if parameters:
        made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path
