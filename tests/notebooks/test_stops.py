"""Notebooks that stop before the work: a wrong parameter, and a model that is too large for a real limit of the system."""

import os
import re
import subprocess
import sys

import papermill
import pytest
from conftest import ROOT

from helpers import models
from helpers.publishing import run

pytestmark = pytest.mark.notebook


def test_a_wrong_parameter_stops_before_the_work(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="quant_type must be"):
        papermill.execute_notebook(
            str(ROOT / "notebooks" / "04_nf4_bitsandbytes.ipynb"), str(tmp_path / "out.ipynb"),
            parameters={"quant_type": "int4", "output_dir": str(tmp_path)}, cwd=str(tmp_path), progress_bar=False,
        )  # fmt: skip
    assert not (tmp_path / "records").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v limits memory on Linux only")
def test_a_model_that_is_too_large_ends_in_one_line(tmp_path):
    """The README's 7B shape under a limit of 15 GB, too little for it in bfloat16 too: nothing is made, nothing loaded."""
    notebook = ROOT / "notebooks" / "00_start_here.ipynb"
    command = f'ulimit -v 15000000; exec "{sys.executable}" -m papermill "{notebook}" out.ipynb -p model {models.GEOMETRY} --no-progress-bar'
    env = os.environ | run.BATCH | {"COURSE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=env)
    last = [line for line in done.stderr.splitlines() if "ModelError" in line][-1]
    assert done.returncode and re.search(
        r"mistral-7b-geometry needs about \d+\.\d GB of (RAM|GPU memory).* are free", last
    ), done.stderr[-2000:]
    assert not (tmp_path / "cache" / models.GEOMETRY).exists()
