"""Every notebook has the anatomy of the course, and is committed as a clean run left it."""

import json
import re
import statistics

import nbformat
import pytest
from conftest import ROOT

from helpers import bootstrap
from helpers.publishing import pages

PATHS = pages.paths()
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def heading(notebook, text):
    """Index of the cell with this heading."""
    at = [
        n
        for n, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown" and re.search(rf"^## {text}", cell.source, re.M)
    ]
    assert len(at) == 1, f"one heading '## {text}' expected, found {len(at)}"
    return at[0]


def test_there_are_notebooks_in_order():
    numbers = [path.name[:2] for path in PATHS]
    assert numbers[0] == "00" and "04" in numbers and numbers == sorted(set(numbers))


@each_notebook
def test_valid_small_and_with_the_plain_kernel(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 1_000_000
    assert notebook.metadata.kernelspec.name == "python3"


@each_notebook
def test_anatomy_and_order(path):
    notebook = nbformat.read(path, as_version=4)
    assert pages.title(notebook).startswith(path.name[:2]) and pages.promise(notebook)
    order = [heading(notebook, "Goals")]
    for tag in ("bootstrap", "parameters"):
        (cell,) = pages.tagged(notebook, tag)
        order.append(notebook.cells.index(cell))
    order += [heading(notebook, text) for text in ("What the guides claim", "Exercises", "Takeaways")]
    (record,) = pages.tagged(notebook, "record")
    order.append(notebook.cells.index(record))
    assert order == sorted(order) and order[-1] == len(notebook.cells) - 1, order
    goals, takeaways = notebook.cells[order[0]].source, notebook.cells[order[-2]].source
    assert len(re.findall(r"^\d\. ", goals, re.M)) == len(re.findall(r"^\d\. ", takeaways, re.M)) == 3
    assert "**Before you start:**" in goals


@each_notebook
def test_whether_the_model_fits_is_asked_before_it_is_loaded(path):
    source = "\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4)))
    asked = source.index("models.find(")
    assert asked < min(
        at for call in (".from_pretrained(found.path", "evaluation.reference(") if (at := source.find(call)) >= 0
    )
    assert "copies=" in source[asked : source.index("\n", asked)] or path.name[:2] == "11", (
        "how many copies are held at once?"
    )


@each_notebook
def test_generated_parts_are_current(path):
    committed, fresh = nbformat.read(path, as_version=4), pages.refresh(path)
    for old, new in zip(committed.cells, fresh.cells):
        assert old.source == new.source, "run `make links`"


@each_notebook
def test_parameters_are_raw_values(path):
    import ast

    (cell,) = pages.tagged(nbformat.read(path, as_version=4), "parameters")
    values = {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.Assign), "only assignments"
        values[node.targets[0].id] = ast.literal_eval(node.value)
    assert values["model"] == "auto" and values["output_dir"] == "build" and values["solutions"] is False


@each_notebook
def test_exercises_have_stub_check_and_solution(path):
    notebook = nbformat.read(path, as_version=4)
    solutions = pages.tagged(notebook, "solution")
    assert 2 <= len(solutions) <= 3
    for cell in solutions:
        assert (
            cell.source.startswith("if solutions:")
            and "exercises.require(" in cell.source
            and cell.metadata.jupyter.source_hidden
        )
    section = "\n".join(
        cell.source for cell in notebook.cells[heading(notebook, "Exercises") : heading(notebook, "Takeaways")]
    )
    assert section.count("exercises.check(") == len(solutions) == len(re.findall(r"^    \.\.\.$", section, re.M))
    assert len(re.findall(r"^\*\*\d \((easy|medium|hard)\)", section, re.M)) == len(solutions)


@each_notebook
def test_cells_are_short(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in code_cells(notebook) if "bootstrap" not in cell.metadata.get("tags", [])]
    lengths = [len([line for line in cell.source.splitlines() if not line.startswith("import ")]) for cell in code]
    assert statistics.median(lengths) <= 10 and max(lengths) <= 20, lengths
    long = [line for cell in code for line in cell.source.splitlines() if len(line) > 150]
    assert not long, long


@each_notebook
def test_links_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert link.startswith("https://") or (path.parent / link).is_file(), link


@each_notebook
def test_outputs_are_those_of_a_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "not executed top to bottom: run `make outputs`"
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.source[:80]


@each_notebook
def test_nothing_of_this_machine_and_no_token_is_in_it(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(root|home|tmp|work|Users|var)/[A-Za-z]", text)
    assert not re.search(r"hf_[A-Za-z0-9]{20,}", text)
    assert "\\u001b[" not in text and "%|" not in text, "progress bars or terminal colours in the outputs"


@each_notebook
def test_no_widget_is_saved(path):
    """Neither its state nor a view that would need one; what stands in its place is more than its Python name."""
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            assert "application/vnd.jupyter.widget-view+json" not in data, cell.source[:80]
            assert "text/html" in data or not re.match(r"(VBox|HBox|HTML)\(", data.get("text/plain", "")), cell.source[
                :80
            ]


@each_notebook
def test_pictures_have_alternative_text_and_a_table(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        for output in pictures:
            assert len(output.metadata.get("image/png", {}).get("alt", "")) > 30, cell.source[:80]
        if pictures:
            assert any("text/html" in output.get("data", {}) for output in cell.outputs), (
                "no table beside the picture: " + cell.source[:80]
            )
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"!\[\]\(|<img(?![^>]*alt=)", cell.source)


@each_notebook
def test_cost_card_was_measured(path):
    notebook = nbformat.read(path, as_version=4)
    cpu = notebook.metadata.course.cost.cpu
    assert 5 < cpu.seconds < 1800 and 3e8 < cpu.peak_ram_bytes < 6e9 and cpu.disk_bytes > 2e8
    assert f"{cpu.peak_ram_bytes / 1e9:.1f} GB" in notebook.cells[0].source


@each_notebook
def test_packages_in_the_bootstrap_are_pinned(path):
    assert set(nbformat.read(path, as_version=4).metadata.course.packages) <= set(bootstrap.pins())


def test_readme_table_and_address_are_current():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert pages.replace_part(readme, "notebooks", pages.readme_table()) == readme, "run `make links`"


def test_readme_shows_pictures_of_the_committed_notebooks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme) < 12_000
    for name, words, file in pages.SHOWN.values():
        png, alt = pages.picture_in(pages.read(pages.FOLDER / f"{name}.ipynb"), words)
        assert file.read_bytes() == png and f"![{alt}](notebooks/{file.name})" in readme, "run `make links`"
    for alt, file in re.findall(r"!\[(.*?)\]\((.+?)\)", readme):
        assert len(alt) > 30 and (ROOT / file).stat().st_size < 150_000, file


@pytest.mark.parametrize("address", [None, "https://github.com/someone/course"])
def test_badges_stand_there_once_the_course_has_an_address(address, monkeypatch):
    if address:
        monkeypatch.setattr(pages, "repository", lambda: address)
    texts = [pages.readme_table(), *(pages.refresh(path).cells[0].source for path in PATHS)]
    for text in texts:
        colab = re.findall(r"colab\.research\.google\.com/github/([^)\"]+?)/blob", text)
        assert set(colab) == ({"someone/course"} if address else set()), text[:200]
    assert address or "YOUR_ACCOUNT" not in (ROOT / "README.md").read_text(encoding="utf-8")


LONGEST_READING = 40  # minutes


@each_notebook
def test_reading_time_is_said_and_short_enough(path):
    notebook = nbformat.read(path, as_version=4)
    minutes = pages.reading_minutes(notebook)
    assert minutes <= LONGEST_READING, f"{minutes:.1f} minutes: cut prose, fold plumbing"
    assert f"Reading time: {minutes:.0f} minutes." in notebook.cells[0].source


def test_notebooks_are_json_with_stable_ids():
    for path in PATHS:
        ids = [cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        assert len(ids) == len(set(ids))
