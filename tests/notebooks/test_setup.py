"""The bootstrap cell where other packages are installed already, as on Colab: what is replaced, and when a restart is asked for."""

import concurrent.futures
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from helpers import bootstrap
from helpers.publishing import pages


class Site:
    """A folder of installed packages, and a `pip` that installs into it what the test prepared."""

    def __init__(self, folder):
        self.folder, self.offers, self.commands, self.refuses_numpy = folder, {}, [], False

    def put(self, name, version, module=None):
        for old in self.folder.glob(f"{name}-*.dist-info"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        info = self.folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "top_level.txt").write_text(f"{module or name}\n")
        (self.folder / f"{module or name}.py").write_text(f"version = {version!r}\n")
        importlib.invalidate_caches()

    def pip(self, command, **_):
        self.commands.append(command)
        if self.refuses_numpy and any(word.startswith("numpy==") for word in command):
            return subprocess.CompletedProcess(command, 1, "", "ResolutionImpossible")
        for name, version in self.offers.items():
            self.put(name, version)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """course_a in version 1 and course_dep in version 1 are there; course_a is pinned at 2."""
    site = Site(tmp_path / "site")
    site.put("course_a", "1.0")
    site.put("course_dep", "1.0")
    monkeypatch.syspath_prepend(str(site.folder))
    monkeypatch.setattr(bootstrap, "BASE", ())
    monkeypatch.setattr(bootstrap, "_replaced", set())
    monkeypatch.setattr(bootstrap, "OLDEST", {"course_a": "2"})
    monkeypatch.setattr(bootstrap, "pins", lambda: {"course_a": "2.1", "course_new": "3.0"})
    monkeypatch.setattr(bootstrap.subprocess, "run", site.pip)
    site.offers = {"course_a": "2.1"}
    yield site
    for name in ("course_a", "course_dep", "course_new"):
        sys.modules.pop(name, None)


def test_an_old_package_that_nobody_imported_is_replaced_without_a_restart(site):
    bootstrap.require("course_a")
    (command,) = site.commands
    assert "course_a==2.1" in command and any(word.startswith("torch==") for word in command)
    import course_a

    assert course_a.version == "2.1"
    bootstrap.require("course_a")
    assert len(site.commands) == 1, "installed twice"


def test_an_old_package_in_use_asks_for_a_restart_until_there_was_one(site, monkeypatch):
    import course_a  # noqa: F401

    for _ in range(2):  # the reader runs the cell again without a restart
        with pytest.raises(bootstrap.RestartNeeded, match="course_a: .*Restart session.*run all cells again"):
            bootstrap.require("course_a")
    assert len(site.commands) == 1
    del sys.modules["course_a"]  # what a restart does
    monkeypatch.setattr(bootstrap, "_replaced", set())
    bootstrap.require("course_a")


def test_a_replaced_dependency_counts_only_if_it_is_in_use(site, monkeypatch):
    site.offers = {"course_a": "2.1", "course_dep": "2.0"}
    bootstrap.require("course_a")
    site.put("course_a", "1.0")
    site.put("course_dep", "1.0")
    import course_dep  # noqa: F401

    with pytest.raises(bootstrap.RestartNeeded, match="^course_dep: "):
        bootstrap.require("course_a")


def test_new_enough_and_newer_than_the_pin_stay(site):
    for version in ("2", "2.0.1+cu128", "3.0"):
        site.put("course_a", version)
        bootstrap.require("course_a")
    assert site.commands == []


def test_a_missing_package_needs_no_restart(site):
    site.offers = {"course_new": "3.0"}
    import course_dep  # noqa: F401

    bootstrap.require("course_new")
    assert "course_new==3.0" in site.commands[0]


def test_numpy_gives_way_only_where_it_must(site, monkeypatch):
    site.refuses_numpy = True
    bootstrap.require("course_a")
    first, second = site.commands
    assert any(word.startswith("numpy==") for word in first) and not any(word.startswith("numpy==") for word in second)
    assert any(word.startswith("torch==") for word in second)


def test_a_torch_that_is_too_old_is_named_before_anything_is_installed(site, monkeypatch):
    monkeypatch.setattr(bootstrap, "NEEDS_TORCH", {"course_new": "99.1"})
    with pytest.raises(
        ImportError,
        match=r"This runtime has torch [\d.+a-z]+, and course_new of this notebook need 99\.1 or newer\. Run `%pip",
    ):
        bootstrap.require("course_a", "course_new")
    assert not site.commands
    bootstrap.require("course_a")
    assert site.commands
    real = bootstrap.version
    monkeypatch.setattr(bootstrap, "NEEDS_TORCH", {"course_new": "3"})
    monkeypatch.setattr(bootstrap, "version", lambda name: None if name == "torch" else real(name))
    bootstrap.require("course_new")  # a torch without metadata


def test_pip_builds_without_cuda_unless_the_reader_says_otherwise(monkeypatch):
    seen = []
    monkeypatch.setattr(
        bootstrap.subprocess,
        "run",
        lambda command, env, **_: seen.append(env) or subprocess.CompletedProcess(command, 0, "", ""),
    )
    monkeypatch.delenv("BUILD_CUDA_EXT", raising=False)
    bootstrap._install(["auto-gptq"])
    monkeypatch.setenv("BUILD_CUDA_EXT", "1")
    bootstrap._install(["auto-gptq"])
    assert [env["BUILD_CUDA_EXT"] for env in seen] == ["0", "1"]


def test_somebody_ran_pip_after_the_import(site, monkeypatch):
    import types

    monkeypatch.setitem(sys.modules, "course_a", types.SimpleNamespace(__version__="2.5"))
    site.put("course_a", "2.6")
    with pytest.raises(bootstrap.RestartNeeded, match="course_a"):
        bootstrap.require("course_a")
    site.put("course_a", "2.5.0+cpu")
    bootstrap.require("course_a")


def test_pip_fails(site, monkeypatch):
    monkeypatch.setattr(
        bootstrap.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "a\nno network")
    )
    with pytest.raises(ImportError, match="could not install course_a==2.1: no network") as caught:
        bootstrap.require("course_a")
    assert not isinstance(caught.value, bootstrap.RestartNeeded)


def test_what_is_pinned_is_new_enough_and_asks_for_nothing_here(monkeypatch):
    assert all(
        bootstrap._numbers(bootstrap.pins()[name]) >= bootstrap._numbers(oldest)
        for name, oldest in bootstrap.OLDEST.items()
    )
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    bootstrap.require(*bootstrap.OLDEST)


CELL = """
import importlib, sys
{first}
for attempt in range({attempts}):
    try:
        exec(open("cell.py").read())
        print("ready", *(importlib.import_module(name).__version__ for name in {names!r}), flush=True)
    except ImportError as error:
        print(type(error).__name__, error, flush=True)
"""
OLD = {"transformers": "4.57.6", "accelerate": "1.0.1", "peft": "0.17.1", "torchao": "0.10.0", "bitsandbytes": "0.45.5"}
PIP = """
import os, pathlib, shutil, sys, zipfile
site = pathlib.Path(__file__).parent.parent
with open(site / "pip.log", "a") as log:
    print(*sys.argv[1:], file=log)
for name, version in (word.split("==") for word in sys.argv if "==" in word):
    wheel = pathlib.Path(os.environ["PIP_FIND_LINKS"], f"{name}-{version}-py3-none-any.whl")
    if wheel.is_file():
        for old in (site / name, *site.glob(f"{name}-*.dist-info")):
            shutil.rmtree(old)
        zipfile.ZipFile(wheel).extractall(site)
"""


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """Python of an environment that has the course's packages, but an old peft; pip finds the pinned ones in a folder of wheels."""
    home = tmp_path_factory.mktemp("colab")
    venv.create(home / "venv", with_pip=False, symlinks=os.name != "nt")
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = str(home / "venv" / scripts / ("python.exe" if os.name == "nt" else "python"))
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    with open(
        os.path.join(site, "packages.pth"), "w"
    ) as file:  # the packages, without the .pth that makes the checkout importable
        file.write(sysconfig.get_path("purelib") + "\n")
    wheels = home / "wheels"
    wheels.mkdir()
    for name in OLD:
        stub(wheels, name, bootstrap.pins()[name])
        stub(home, name, OLD[name])
    put_back(home, site, ["peft"])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return home, python, env | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "COURSE_SOURCE": str(ROOT)}


def stub(folder, name, version):
    """A wheel of a package that only knows its version."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: course\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/top_level.txt": f"{name}\n",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]))


def put_back(home, site, names):
    """The old stubs of these packages into a folder of packages, in place of whatever is there."""
    for name in names:
        for there in (Path(site, name), *Path(site).glob(f"{name}-*.dist-info")):
            shutil.rmtree(there, ignore_errors=True)
        with zipfile.ZipFile(home / f"{name}-{OLD[name]}-py3-none-any.whl") as old:
            old.extractall(site)


def process(python, env, folder, names, first="", attempts=1):
    """Lines that a new process prints in which the bootstrap cell runs, once or more often."""
    program = CELL.format(first=first, attempts=attempts, names=list(names))
    done = subprocess.run([python, "-c", program], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout.splitlines()


def write_bootstrap(path, folder):
    (cell,) = pages.tagged(nbformat.read(path, as_version=4), "bootstrap")
    (folder / "cell.py").write_text(cell.source, encoding="utf-8")


def test_the_bootstrap_cell_itself_with_an_old_package(colab, tmp_path):
    """In an empty folder, with pip itself: restart asked for where peft was in use, twice; after the restart ready, without pip."""
    home, python, env = colab
    (notebook,) = [path for path in pages.paths() if path.name.startswith("07")]
    write_bootstrap(notebook, tmp_path)
    ready = f"ready {bootstrap.pins()['peft']}"
    in_use = process(python, env, tmp_path, ["peft"], "import peft", 2)
    assert [line.split()[0] for line in in_use] == ["Installing", "RestartNeeded", "RestartNeeded"], in_use
    assert in_use[1].startswith("RestartNeeded peft: ")
    assert process(python, env, tmp_path, ["peft"]) == [ready]
    put_back(home, next((home / "venv").rglob("peft")).parent, ["peft"])
    unused = process(python, env, tmp_path, ["peft"])
    assert unused[0].startswith("Installing peft") and unused[1:] == [ready]


def with_old_packages(path, folder, colab):
    """What the bootstrap cell of a notebook prints alone in a folder where all of OLD are installed: in a process that has imported none
    of them; in one that has imported all that the notebook needs but the last, run twice; in a third one. And what it asked of pip."""
    home, python, env = colab
    site = folder / "site"
    (site / "pip").mkdir(parents=True)
    (site / "pip" / "__init__.py").touch()
    (site / "pip" / "__main__.py").write_text(PIP)
    put_back(home, site, OLD)
    (folder / "content").mkdir()
    write_bootstrap(path, folder / "content")
    arguments = python, env | {"PYTHONPATH": str(site)}, folder / "content", OLD
    unused = process(*arguments)
    put_back(home, site, OLD)
    used = process(*arguments, first="".join(f"import {name}\n" for name in needed(path)[:-1]), attempts=2)
    restarted = process(*arguments)
    return unused, used, restarted, (site / "pip.log").read_text().splitlines()


def needed(path):
    """Those of OLD that a notebook uses."""
    wanted = {*bootstrap.BASE, *nbformat.read(path, as_version=4).metadata.course.packages}
    return [name for name in OLD if name in wanted]


@pytest.fixture(scope="module")
def olds(colab, tmp_path_factory):
    """{notebook: future of `with_old_packages`}, two at a time."""
    home = tmp_path_factory.mktemp("olds")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(with_old_packages, path, home / path.stem, colab) for path in pages.paths()}


@pytest.mark.parametrize("path", pages.paths(), ids=lambda path: path.stem)
def test_every_notebook_beside_old_packages_asks_for_a_restart_only_if_they_are_in_use(path, olds):
    assert OLD.keys() == bootstrap.OLDEST.keys()
    names = needed(path)
    unused, used, restarted, pip = olds[path].result()
    ready = "ready " + " ".join(bootstrap.pins()[name] if name in names else OLD[name] for name in OLD)
    assert unused[0].startswith("Installing ") and unused[1:] == [ready], unused
    assert [line.split(": ")[0] for line in used[1:]] == [f"RestartNeeded {', '.join(sorted(names[:-1]))}"] * 2, used
    assert "Restart session" in used[1] and restarted == [ready], (used, restarted)
    asked = [{word.partition("==")[0] for word in command.split() if "==" in word} for command in pip]
    assert asked == [{*names, "torch", "numpy"}] * 2, asked
