"""Fixtures: the default model (found once, loaded once) and small evaluation windows."""

import math
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(ROOT))

from helpers import process  # noqa: E402

process.prepare()


STARTED = time.time()


def deadline():
    """Until when whole notebooks may be started, as `time.time()` counts: COURSE_TEST_MINUTES after the tests began, or never."""
    minutes = os.environ.get("COURSE_TEST_MINUTES")
    return STARTED + 60 * float(minutes) if minutes else math.inf


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def browser_path():
    """The system's Chromium or Chrome, or COURSE_BROWSER; None where neither is there."""
    return os.environ.get("COURSE_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)


def without_browser(why=""):
    """Skip a test that needs a browser on a reader's machine; fail it in CI, where one is installed."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(
        f"no Chromium: install your system's package, or set COURSE_BROWSER {why}"
    )


# Fixtures that load the default model, render every page, provoke every failure or ask pip: whoever takes one is no unit test.
HEAVY = {"found", "tokenizer", "net", "site", "seen", "raised", "real", "wheels"}


def pytest_collection_modifyitems(items):
    """Give the marker `integration` to every test that takes a heavy fixture."""
    for item in items:
        if HEAVY & set(getattr(item, "fixturenames", ())):
            item.add_marker("integration")


STARTED_BY_TESTS = []  # Python processes that were started and ports of 127.0.0.1 that were opened, by this process


def _hear(event, values):
    """Libraries look around when they are imported (ldconfig, gcc, a port of ::1): that is not meant."""
    python = event == "subprocess.Popen" and Path(os.fsdecode(values[0] or values[1][0])).stem.startswith("python")
    server = event == "socket.bind" and values[1][:1] == ("127.0.0.1",)
    if python or server:
        STARTED_BY_TESTS.append(values[1])


sys.addaudithook(_hear)


@pytest.fixture(autouse=True)
def light(request):
    """Fail a unit test that starts a process or a server: it belongs to the tier `integration`."""
    before = len(STARTED_BY_TESTS)
    yield
    if any(request.node.get_closest_marker(name) for name in ("integration", "notebook", "slow", "browser")):
        return
    if ROOT / "tests" / "unit" in request.path.parents and STARTED_BY_TESTS[before:]:
        pytest.fail(f"give it the marker `integration`: it starts {STARTED_BY_TESTS[before:]}")


@pytest.fixture(scope="session")
def found():
    """The default model as the hub-less reader gets it."""
    from helpers import models

    return models.find(models.OFFLINE)


@pytest.fixture(scope="session")
def tokenizer(found):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(found.path)


@pytest.fixture(scope="session")
def net(found):
    """The default model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random model of two layers, for processes that are killed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for this test alone."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def committed():
    """The results of the default model that come with the course: a `reference.Reference`, a CPU's where there is one."""
    from helpers.publishing import reference

    found = [each for each in reference.read() if each.model.startswith("SmolLM2-135M-Instruct ")]
    return (
        found[0]
        if found
        else pytest.fail(
            "no results of the default model come with the course: run all notebooks, then `python -m helpers reference`"
        )
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory, committed):
    """Folder of the course's site with a report in it, built once from the committed notebooks and the course's records but one."""
    import json

    from helpers import files
    from helpers.publishing import report, run, site

    build = tmp_path_factory.mktemp("build")
    for method, record in committed.records.items():
        if method != "nf4":
            files.write_text(build / "records" / f"{method}.json", json.dumps(record))
    report.write(build, [run.Result("00_start_here", 60, 2_000_000_000, "ok")])
    return site.build(build).parent
