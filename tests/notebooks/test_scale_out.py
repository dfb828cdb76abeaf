"""The scripts of notebook 12, started as their README says."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.notebook

FOLDER = ROOT / "notebooks" / "scale_out"
DATA = ROOT / "notebooks" / "data" / "quantization_qa.jsonl"
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    "ddp_cpu.yaml",
    "--main_process_port",
    "0",
]


def train(found, output, *options, launcher=(sys.executable,), **environment):
    command = [
        *launcher,
        "train.py",
        "--model",
        str(found.path),
        "--data",
        str(DATA),
        "--output",
        str(output),
        *options,
    ]
    return subprocess.run(
        command, cwd=FOLDER, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment
    )


def test_two_processes_write_one_adapter_and_the_curve_of_one_process(found, tmp_path):
    curves = {}
    for processes, launcher in {1: (sys.executable,), 2: ACCELERATE}.items():
        # --share_gpu is for several processes on one GPU; without a GPU it changes nothing
        done = train(found, tmp_path / str(processes), "--steps", "2", "--share_gpu", launcher=launcher)
        assert done.returncode == 0, done.stderr[-2000:]
        report = json.loads((tmp_path / str(processes) / "losses.json").read_text())
        assert report["processes"] == processes
        curves[processes] = report["losses"]
    assert len(curves[1]) == 2 and curves[2] == pytest.approx(curves[1], abs=1e-4)
    written = sorted(path.name for path in (tmp_path / "2" / "adapter").iterdir())
    assert "adapter_model.safetensors" in written and not any(
        name.endswith((".bin", ".pt", ".pkl")) for name in written
    )


@pytest.mark.parametrize(
    "options, environment, message",
    [
        ([], {"LOCAL_WORLD_SIZE": "640"}, "640 processes, but this machine has"),
        (["--max_length", "20"], {}, "line 1: .* tokens, more than --max_length 20"),
    ],
    ids=["more processes than cores", "a sequence that is too long"],
)
def test_bad_input_is_named(found, tmp_path, options, environment, message):
    done = train(found, tmp_path, "--steps", "1", *options, **environment)
    assert done.returncode != 0 and not (tmp_path / "adapter").exists()
    assert re.search(message, done.stderr), done.stderr[-1500:]
