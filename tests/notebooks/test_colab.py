"""The bootstrap of every notebook in an environment like Colab's: Python 3.12, torch's CUDA build, and the versions of Colab's own list.

It takes gigabytes and half an hour, so it runs in the weekly tier, where a Python 3.12 is (COURSE_PYTHON312 names one) and Colab's list
of preinstalled packages can be read (COURSE_COLAB_LIST names a copy). Seconds and bytes of every notebook go to build/colab.json.
"""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from helpers import bootstrap, files
from helpers.publishing import pages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]  # one test waits until the environment is installed

LIST = "https://raw.githubusercontent.com/googlecolab/backend-info/main/pip-freeze.txt"
# Of the list, what the course touches, directly or below it; the other hundreds of packages only take room.
KEPT = set(
    "torch torchvision torchaudio torchao numpy pandas scipy matplotlib transformers tokenizers accelerate peft datasets safetensors "
    "huggingface-hub sentencepiece bitsandbytes ipykernel ipython ipywidgets jupyter-client psutil filelock platformdirs nbformat "
    "pyarrow protobuf requests httpx pillow tqdm".split()
)
CELL = """import importlib, sys
exec(open("cell.py").read())
for module in sys.argv[1:]:
    importlib.import_module(module)
print("ready")
"""
# What a notebook imports of a package; the two archived packages need the course's repair first.
MODULES = {"torchao": "torchao.quantization", "compressed-tensors": "compressed_tensors.quantization", "auto-gptq": None, "autoawq": None,
           "lm-eval": "lm_eval", "llama-cpp-python": "llama_cpp"}  # fmt: skip


def python312():
    """A Python 3.12 that answers, or None: COURSE_PYTHON312, one on the path, or pyenv's."""
    here = [os.environ.get("COURSE_PYTHON312"), shutil.which("python3.12")]
    pyenv = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.12*/bin/python3.12"))
    for python in filter(None, [*here, *map(str, pyenv)]):
        done = subprocess.run([python, "--version"], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.startswith("Python 3.12"):
            return python
    return None


def preinstalled():
    """Requirements of Colab's own list that the course touches."""
    try:
        if copy := os.environ.get("COURSE_COLAB_LIST"):
            text = Path(copy).read_text(encoding="utf-8")
        else:
            with urllib.request.urlopen(LIST, timeout=30) as answer:
                text = answer.read().decode()
    except OSError as error:
        pytest.skip(f"Colab's list cannot be read: {error}")
    return wanted(text)


def wanted(text):
    """name==version of the lines of a list that count; a wheel's address gives its version."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r"([\w.-]+)(?:==([\w.]+)| @ \S*?/\1-([\w.]+?)(?:%2B|\+|-))", line):
            name = match[1].lower().replace("_", "-")
            if name in KEPT:
                found[name] = f"{name}=={match[2] or match[3]}"
    return list(found.values())


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """Python of the environment, and its folder of packages."""
    python = python312() or pytest.skip("no Python 3.12 here; COURSE_PYTHON312 names one")
    requirements = preinstalled()
    assert any(each.startswith("torch==") for each in requirements), "this is not Colab's list"
    home = tmp_path_factory.mktemp("colab312")
    subprocess.run([python, "-m", "venv", home / "base"], check=True)
    python = home / "base" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True, timeout=3600)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    yield python, site.stdout.strip()
    shutil.rmtree(home)  # gigabytes


def size(folder):
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file() and not file.is_symlink())


@pytest.fixture
def session(colab, tmp_path):
    """A fresh runtime: an environment of its own on top of Colab's packages, and an empty folder."""
    python, below = colab
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python3.*/site-packages")
    (site / "below.pth").write_text(f"{below}\n")
    (tmp_path / "content").mkdir()
    yield tmp_path / "venv" / "bin" / "python", site, tmp_path / "content"
    shutil.rmtree(tmp_path / "venv")


def run_cell(python, folder, modules):
    """(lines, seconds) of a process that runs the bootstrap cell and imports modules: what it printed, or its traceback where it failed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COURSE_SOURCE": ROOT.as_uri()}
    started = time.perf_counter()
    done = subprocess.run(
        [python, "-c", CELL, *modules], cwd=folder, env=env, capture_output=True, text=True, timeout=1800
    )
    # Leave warnings of git and pip out where it succeeded: they would come last.
    said = done.stdout + (done.stderr if done.returncode else "")
    return said.strip().splitlines(), time.perf_counter() - started


@pytest.mark.parametrize("path", pages.paths(), ids=lambda path: path.stem)
def test_first_run_restart_second_run(path, session):
    python, site, folder = session
    notebook = nbformat.read(path, as_version=4)
    (cell,) = pages.tagged(notebook, "bootstrap")
    packages = notebook.metadata.course.packages
    modules = [module for module in (MODULES.get(name, name.replace("-", "_")) for name in packages) if module]
    (folder / "cell.py").write_text(cell.source, encoding="utf-8")
    before = size(site)
    first, seconds = run_cell(python, folder, modules)
    torch = bootstrap._numbers(next(each for each in preinstalled() if each.startswith("torch==")))
    if any(torch < bootstrap._numbers(bootstrap.NEEDS_TORCH.get(name, "0")) for name in packages):
        assert first[-1].startswith("ImportError: This runtime has torch"), first[-5:]
        return
    assert "ready" in first or re.match(r"(helpers\.bootstrap\.)?RestartNeeded", first[-1]), first[-5:]
    second, again = run_cell(python, folder, modules)
    assert "ready" in second and not any(line.startswith("Installing") for line in second), second[-5:]
    results = ROOT / "build" / "colab.json"
    known = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    known[path.stem] = {"first_s": round(seconds), "second_s": round(again), "bytes": size(site) - before}
    files.write_text(results, json.dumps(known, indent=1))


def test_wanted_reads_names_and_addresses():
    text = "# made by pip freeze\nnumpy==2.0.2\nabsl-py==1.4.0\nhuggingface_hub==0.34.4\n"
    text += "torch @ https://download.pytorch.org/whl/cu126/torch-2.8.0%2Bcu126-cp312-cp312-manylinux_2_28_x86_64.whl#sha256=0a\n"
    assert wanted(text) == ["numpy==2.0.2", "huggingface-hub==0.34.4", "torch==2.8.0"]
