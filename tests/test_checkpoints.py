"""A checkpoint folder is whole or not there, whatever happens to the process that writes it."""

import signal
import subprocess
import sys
import time

import pytest

from helpers import checkpoints


def test_takes_its_place_when_the_block_ends(tmp_path):
    for text in ("first", "second"):
        with checkpoints.writing(tmp_path, "demo") as scratch:
            (scratch / "weights").write_text(text)
            assert not list((tmp_path / "checkpoints").glob("demo/weights")) or text == "second"
        assert (checkpoints.folder(tmp_path, "demo") / "weights").read_text() == text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.endswith(".lock")] == ["demo"]


def test_a_block_that_raises_keeps_the_old_one(tmp_path):
    with checkpoints.writing(tmp_path, "demo") as scratch:
        (scratch / "weights").write_text("old")
    with pytest.raises(OSError, match="disk full"), checkpoints.writing(tmp_path, "demo") as scratch:
        (scratch / "weights").write_text("half")
        raise OSError("disk full")
    assert (checkpoints.folder(tmp_path, "demo") / "weights").read_text() == "old"
    assert not list((tmp_path / "checkpoints").glob(".demo.tmp-*"))


WRITER = """
import sys, time
from helpers import checkpoints
with checkpoints.writing(sys.argv[1], "demo") as scratch:
    (scratch / "config.json").write_text("{}")
    print("begun", flush=True)
    time.sleep(60)
"""


def test_killed_while_writing(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "begun\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not checkpoints.folder(tmp_path, "demo").exists(), "a killed writer left a checkpoint"
    started = time.monotonic()
    with checkpoints.writing(tmp_path, "demo") as scratch:
        (scratch / "weights").write_text("whole")
    assert time.monotonic() - started < 5, "the dead writer's lock still held"
    assert not list((tmp_path / "checkpoints").glob(".demo.tmp-*")), "the dead writer's scratch folder is still there"
