"""The notebooks and their percent-format sources say the same."""

import nbformat
import pytest

from helpers.publishing import pages, sources


@pytest.mark.parametrize("source", sources.paths(), ids=lambda path: path.stem)
def test_source_and_notebook_are_equal(source):
    committed = pages.read(pages.FOLDER / f"{source.stem}.ipynb")
    assert sources.write(committed) == source.read_text(encoding="utf-8"), "run `make notebooks`"


def test_every_notebook_has_a_source():
    assert [path.stem for path in sources.paths()] == [path.stem for path in pages.paths()]


def test_outputs_stay_where_the_cell_is_unchanged(tmp_path):
    code, words = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    old = nbformat.v4.new_notebook(
        cells=[words("# Title"), code("a = 1", execution_count=1), code("b = 2", execution_count=2)]
    )
    old.cells[2].outputs = [nbformat.v4.new_output("stream", text="two")]
    old.metadata["course"] = {"packages": ["peft"]}
    target, source = tmp_path / "00_x.ipynb", tmp_path / "00_x.py"
    nbformat.write(old, target)
    source.write_text(sources.write(old).replace("a = 1", "a = 3"))
    made = sources.build(source, target)
    assert [cell.source for cell in made.cells] == ["# Title", "a = 3", "b = 2"]
    assert made.cells[1].execution_count is None and not made.cells[1].outputs
    assert made.cells[2].outputs == old.cells[2].outputs and made.cells[2].id == old.cells[2].id
    assert made.metadata["course"] == {"packages": ["peft"]}
    assert sources.build(source, target) == made
