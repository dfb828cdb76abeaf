"""The environment: one set of pins everywhere, a reason for each, a light import, a doctor that answers."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from helpers import bootstrap
from helpers.process import child_environment


def test_conda_and_pip_have_the_same_pins():
    spec = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in spec["dependencies"] if isinstance(entry, dict)]
    assert pip == [f"{name}=={version}" for name, version in bootstrap.pins().items()] + ["-e ."]


def test_every_pin_gives_its_reason():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    ]
    assert len(lines) == len(bootstrap.pins())
    assert [line for line in lines if not re.search(r"==\S+ +# \w.{10,}", line)] == []


def test_what_is_installed_is_what_is_pinned():
    from importlib import metadata

    assert {name: metadata.version(name).split("+")[0] for name in bootstrap.pins()} == bootstrap.pins()


@pytest.mark.integration
def test_importing_helpers_is_light():
    """It brings nothing but itself: what it takes in seconds, `make bench` prints."""
    code = "import sys; before = set(sys.modules); import helpers; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'helpers'}\n"


@pytest.mark.integration
def test_what_every_notebook_imports_brings_no_slow_library():
    code = ("import sys; from helpers import chat, exercises, figures, memory, models, progress, quiz, records; "
            "print({'torch', 'transformers', 'nbformat'} & sys.modules.keys())")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.integration
def test_a_new_process_finds_the_course_and_what_the_reader_put_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "only_the_readers.py").touch()
    command = [sys.executable, "-c", "import only_the_readers, helpers; print(helpers.__file__)"]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "own"))
    done = subprocess.run(command, cwd=tmp_path, env=child_environment(), capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "helpers" / "__init__.py"), done.stderr
    monkeypatch.delenv("PYTHONPATH")
    assert child_environment()["PYTHONPATH"] == str(ROOT), "an empty entry would be the working folder"


def test_no_notebook_replaces_the_readers_path():
    for path in [*(ROOT / "notebooks").rglob("*.py"), *(ROOT / "helpers").rglob("*.py")]:
        assert path.name == "process.py" or '"PYTHONPATH"' not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.integration
def test_importing_the_course_leaves_garbage_collection_alone():
    code = "import gc; before = gc.get_threshold(); import helpers.memory, helpers.publishing.run; print(before == gc.get_threshold(), gc.get_freeze_count())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True 0\n"


def test_nothing_is_installed_when_everything_is_there(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(AssertionError("pip was called")))
    bootstrap.require("bitsandbytes", "peft")


def test_missing_packages_are_installed_pinned_and_torch_is_held(monkeypatch):
    calls = []
    monkeypatch.delitem(sys.modules, "peft", raising=False)  # as in a runtime that has not used it yet
    monkeypatch.setattr(
        bootstrap, "version", lambda name, real=bootstrap.version: None if name == "peft" else real(name)
    )
    monkeypatch.setattr(
        bootstrap.subprocess,
        "run",
        lambda command, **_: calls.append(command) or subprocess.CompletedProcess(command, 0, "", ""),
    )
    bootstrap.require("peft")
    (command,) = calls
    assert f"peft=={bootstrap.pins()['peft']}" in command
    assert any(word.startswith("torch==") for word in command) and any(word.startswith("numpy==") for word in command)


def test_an_old_transformers_counts_as_missing(monkeypatch):
    monkeypatch.setattr(bootstrap, "version", lambda name: "4.57.1")
    assert bootstrap._too_old("transformers") and not bootstrap._too_old("peft")


@pytest.mark.integration
def test_doctor_answers_and_exits_0():
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "doctor", "--json"], capture_output=True, text=True, timeout=120
    )
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and answer["verdict"] == "ok", done.stdout
    assert {check["component"] for check in answer["checks"]} >= {
        "python",
        "packages",
        "torch",
        "bitsandbytes",
        "RAM",
        "disk",
        "hub",
    }
    assert all(check["remedy"] for check in answer["checks"] if check["verdict"] != "ok")


def test_doctor_names_what_is_wrong(monkeypatch, capsys):
    from helpers import memory
    from helpers.diagnosis import doctor

    monkeypatch.setattr(memory, "free_ram", lambda: 1e9)
    monkeypatch.setattr(bootstrap, "pins", lambda: {"torch": "9.9", "nosuchpackage": "1"})
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "[bad ] RAM" in printed and "missing: nosuchpackage" in printed and "Not ready: RAM" in printed


@pytest.mark.integration
def test_chat_answers_in_english():
    command = [sys.executable, "-m", "helpers", "chat", "--once", "What is quantization?", "--max-new-tokens", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "quantization" in done.stdout.lower() and len(done.stdout.split()) > 15


@pytest.mark.integration
def test_command_line_errors_have_no_traceback():
    for arguments in (
        ["chat", "--model", "./nowhere", "--once", "x"],
        ["chat", "--once", " "],
        ["run", "--only", "77"],
        ["run", "-p", "x"],
    ):
        done = subprocess.run([sys.executable, "-m", "helpers", *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr, (
            done.stderr
        )
