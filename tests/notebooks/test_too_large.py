"""Every notebook with a model that is too large: one line that says what would fit, and nothing is made, loaded or downloaded."""

import re

import pytest
from conftest import ROOT

from helpers import memory, models
from helpers.publishing import pages, run

pytestmark = pytest.mark.slow

LINE = re.compile(
    r"ModelError: mistral-7b-geometry needs about \d+\.\d GB of (RAM|GPU memory) .*, and \d+\.\d GB are free\. Nothing was loaded\. "
    r"(Up to \d+\.\d\d billion parameters fit: model=\"[\w.-]+\", for example|Not even model=\"smollm2-offline\" fits: [^.]*)\."
)


@pytest.mark.parametrize("path", pages.paths(), ids=lambda path: path.stem)
def test_refused_in_one_line(path, tmp_path):
    """Under a limit of 8 GB, which a graphics card or a small laptop has."""
    caps = {memory.RAM_CAP: "8GB", memory.CAP: "8GB"}
    parameters = {"model": models.GEOMETRY, "output_dir": str(tmp_path / "build")}
    result = run.execute(
        path,
        tmp_path / "out.ipynb",
        parameters,
        cwd=ROOT / "notebooks",
        env=caps | {"COURSE_CACHE": str(tmp_path / "cache")},
    )
    assert LINE.search(result.verdict), result.verdict
    assert result.peak_ram_bytes < 2e9 and not list((tmp_path / "cache").glob("mistral*"))
