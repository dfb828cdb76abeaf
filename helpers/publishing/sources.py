"""The notebooks' sources: percent-format files in notebooks/source, which authors edit and reviewers read.

`make notebooks` turns them into notebooks/NN_name.ipynb and keeps the outputs of every cell whose source is unchanged. What is
generated (badge, cost card, navigation, contents, the bootstrap cell) stands in the notebook only: the source has the empty place.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.publishing import pages

if TYPE_CHECKING:
    from nbformat import NotebookNode

FOLDER = pages.FOLDER / "source"
GENERATED = ("badge", "cost", "navigation", "contents")
BOOTSTRAP = "# `make notebooks` fills in the bootstrap cell."
FORMAT = {"extension": ".py", "format_name": "percent"}


def paths() -> list[Path]:
    """The sources in reading order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def write(notebook: NotebookNode) -> str:
    """The percent-format text of a notebook object."""
    import jupytext
    import nbformat

    plain = nbformat.v4.new_notebook(cells=[])
    for cell in notebook.cells:
        source = _without_generated(cell.source)
        if "bootstrap" in cell.metadata.get("tags", []):
            source = BOOTSTRAP
        make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        plain.cells.append(make(source, metadata={key: value for key, value in cell.metadata.items() if value}))
    plain.metadata["jupytext"] = {"notebook_metadata_filter": "-all", "cell_metadata_filter": "tags,jupyter,-all"}
    return jupytext.writes(plain, fmt=FORMAT)


def build(source: Path, target: Path | None = None) -> NotebookNode:
    """The notebook object of a source file; cells that `target` (default: the committed notebook) has too keep id and outputs."""
    import jupytext
    import nbformat

    target = target or pages.FOLDER / f"{source.stem}.ipynb"
    fresh = jupytext.reads(source.read_text(encoding="utf-8"), fmt=FORMAT)
    for cell in fresh.cells:
        cell.id = None  # jupytext makes a random one
    if not target.is_file():
        fresh.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
        fresh.metadata["course"] = {"packages": []}
        return _with_ids(fresh)
    old = nbformat.read(target, as_version=4)
    fresh.metadata = old.metadata
    matcher = difflib.SequenceMatcher(
        a=[_key(cell) for cell in old.cells], b=[_key(cell) for cell in fresh.cells], autojunk=False
    )
    for block in matcher.get_matching_blocks():
        for step in range(block.size):
            before, cell = old.cells[block.a + step], fresh.cells[block.b + step]
            cell.id = before.id
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = before.outputs, before.execution_count
    return _with_ids(fresh)


def make() -> list[str]:
    """Write every notebook whose source says something else than the notebook does; their names."""
    import nbformat

    changed = []
    for source in paths():
        target = pages.FOLDER / f"{source.stem}.ipynb"
        if not target.is_file() or write(pages.read(target)) != source.read_text(encoding="utf-8"):
            nbformat.write(build(source), target)
            changed.append(source.stem)
    pages.refresh_all()
    return changed


def main(arguments: argparse.Namespace) -> int:
    """Command line of `python -m helpers notebooks`; its exit code is 0."""
    for name in make():
        print(f"{name}: made from its source")
    return 0


def _key(cell):
    source = BOOTSTRAP if "bootstrap" in cell.metadata.get("tags", []) else _without_generated(cell.source)
    return cell.cell_type, source.strip()


def _with_ids(notebook):
    """The notebook with a stable id for each new cell: one made of its number, so that two builds are equal."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    used = {cell.id for cell in notebook.cells}
    free = (name for number in itertools.count() if (name := f"cell-{number}") not in used)
    for cell in notebook.cells:
        cell.id = cell.id or next(free)
    return notebook


def _without_generated(text):
    for part in GENERATED:
        text = re.sub(rf"(<!-- {part} -->).*?(<!-- /{part} -->)", r"\1\n\2", text, flags=re.S)
    return text
