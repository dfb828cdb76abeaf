"""Numbers in prose are those of the outputs: each is in the notebook that says it, in committed data, or in the list below."""

import math
import re

import nbformat
import pytest
from conftest import ROOT

from helpers.publishing import pages

# A number with three digits or more and a decimal point; of 0.05 and the like one digit counts, and that is found by chance.
SAID = re.compile(r"(?<![\w.,/:])\d+\.\d+(?![\w.]*\d)")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
FACTORS = (1, 100, 1e-9)  # a share said in percent, bytes said in GB

GPU_README, GPU_RUNS = "gpu/README.md", "gpu/reference.json"
LARGE_MODEL = "data/reference/nvidia-h200--qwen2-5-coder-1-5b-instruct.json"
LARGE_MODEL_CPU = "data/reference/2-cpu-cores-x86-64--qwen2-5-coder-1-5b-instruct.json"
# What this run did not give: the committed file of the run that did, or where else it comes from.
GIVEN = {
    "00": {"25.8": "24 GiB in GB", "14.7": GPU_RUNS},
    "01": {"50.5": "10 x 5 + 1 x 0.5 by hand", "7.75": GPU_RUNS, "8.10": GPU_RUNS},
    "04": {"0.127": "8/64 + 32/(64 x 256) by hand"},
    "05": {
        "0.95": "a step that an exercise proposes",
        "0.0872": GPU_README,
        "0.083": GPU_README,
        "0.093": GPU_README,
        "0.0866": GPU_README,
        "0.081": GPU_README,
        "0.092": GPU_README,
        "0.514": GPU_README,
        "0.134": GPU_README,
        "0.149": GPU_README,
        "0.147": GPU_README,
        "0.078": GPU_README,
        "0.074": GPU_README,
        "0.082": GPU_README,
    },
    "06": {
        "0.0872": GPU_README,
        "0.0827": GPU_README,
        "0.0926": GPU_README,
        "0.0739": GPU_README,
        "0.0695": GPU_README,
        "0.0790": GPU_README,
        "0.0770": GPU_README,
        "0.0720": GPU_README,
        "0.0822": GPU_README,
    },
    "08": {
        "5.00": LARGE_MODEL_CPU,
        "0.0341": LARGE_MODEL_CPU,
        "0.0321": LARGE_MODEL_CPU,
        "0.0363": LARGE_MODEL_CPU,
        "0.0245": LARGE_MODEL_CPU,
        "0.0232": LARGE_MODEL_CPU,
        "0.0258": LARGE_MODEL_CPU,
        "0.503": LARGE_MODEL_CPU,
        "3.36": LARGE_MODEL_CPU,
        "25.6": LARGE_MODEL_CPU,
    },
    "09": {
        "0.000015": "the power of two where E5M2 ends",
        "8.25": "8 + 8/32 by hand",
        "0.052": LARGE_MODEL,
        "0.085": LARGE_MODEL,
        "0.125": LARGE_MODEL,
        "0.151": LARGE_MODEL,
        "0.144": LARGE_MODEL,
        "0.102": GPU_README,
        "5.23": "a version of transformers",
    },
    "10": {"1.42": "follows from the construction of the matrix"},
    "11": {"0.75": "a share of the cache by hand"},
}


def numbers(text):
    return [float(found.replace(",", "")) for found in NUMBER.findall(text) if found.count(".") < 2]


def shown(notebook):
    """All numbers in code and in outputs; of a picture those of its alternative text and its table."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts.append(cell.source)
            for output in cell.get("outputs", []):
                texts += [output.get("text", "")]
                texts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return [value for text in texts for value in numbers(re.sub(r"data:image[^\"]*|<style.*?</style>", " ", text))]


def said(notebook):
    """(number as it is written, its surroundings) in the prose, without code, addresses and the generated card."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"(?s)<!-- (cost|badge) -->.*?<!-- /\1 -->|```.*?```", " ", cell.source)
            text = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv:[\d.]+|https?:\S+", " ", text)
            for found in SAID.finditer(text):
                if len(found.group().replace(".", "").lstrip("0")) >= 2 and len(found.group()) >= 4:
                    yield found.group(), " ".join(text[max(0, found.start() - 60) : found.end() + 30].split())


def is_among(written, values):
    """Does one of the values round to what is written?"""
    half = 0.5 * 10 ** -len(written.split(".")[1])
    return any(
        math.isclose(factor * value, float(written), rel_tol=1e-9, abs_tol=half * 1.001)
        for value in values
        for factor in FACTORS
    )


@pytest.mark.parametrize("path", pages.paths(), ids=lambda path: path.stem)
def test_numbers_in_prose_are_those_of_the_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    here, given = shown(notebook), GIVEN.get(path.stem[:2], {})
    unknown = {number: around for number, around in said(notebook) if not is_among(number, here)}
    assert {number: around for number, around in unknown.items() if number not in given} == {}
    assert given.keys() <= dict(said(notebook)).keys(), "not said any more"
    for number, source in given.items():
        if source in (GPU_README, GPU_RUNS, LARGE_MODEL, LARGE_MODEL_CPU):
            text = (ROOT / "notebooks" / source).read_text(encoding="utf-8")
            assert is_among(number, numbers(text)), (number, source)


@pytest.mark.parametrize(
    "prose, unknown",
    [
        ("The KL falls to 0.142.", []),
        ("The KL falls to 0.143.", ["0.143"]),
        ("It keeps 75.31 % of them.", []),
        ("It takes 7.25 GB, see [arXiv:1234.567](x) and `0.999`.", []),
        ("It is 1.5 times as fast.", []),  # two digits: not looked at
    ],
)
def test_a_number_that_no_output_has_is_found(prose, unknown):
    output = nbformat.v4.new_output("stream", text="KL 0.14204, same top-1 0.75312, 7,252,000,000 bytes")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(prose), nbformat.v4.new_code_cell("print()", outputs=[output])]
    )
    assert [number for number, _ in said(notebook) if not is_among(number, shown(notebook))] == unknown
