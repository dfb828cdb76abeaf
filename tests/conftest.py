"""Fixtures: the default model (found once, loaded once) and small evaluation windows."""

import os
import sys
from pathlib import Path

import pytest

import helpers  # first: it sets thread counts before torch is imported

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(ROOT))


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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for this test alone."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Folder of the course's site with a report in it, built once from the committed notebooks."""
    from helpers import book, report, run

    build = tmp_path_factory.mktemp("build")
    report.write(build, [run.Result("00_start_here", 60, 2_000_000_000, "ok")])
    return book.build(build).parent
