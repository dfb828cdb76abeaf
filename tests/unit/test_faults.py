"""What happens to a course happens here on purpose: kills, full disks, damaged files, dead networks, notebooks that go wrong.

After each fault two things hold: nothing false is left (no half checkpoint, no record of a run that did not end), and a plain second
run succeeds. Training killed and resumed is in test_qlora.py; single folders killed while written in test_checkpoints.py and
test_models.py.
"""

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import fakehub
import nbformat
import pytest
import torch
import written
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_models import make_checkpoint

from helpers import checkpoints, files, models, records
from helpers.models import packages
from helpers.process import child_environment
from helpers.publishing import pages, run

kills = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
NUMBERS = dict.fromkeys(records.NUMBERS, 1)
FOUND = models.Found("here", "tiny", "local folder", "cpu")
SMOLLM2_FOLDER = f"{packages.SMOLLM2.name}-{packages.REVISION}"


def record(folder):
    return records.write(folder, method="nf4", notebook="04", found=FOUND, **NUMBERS)


# --- killed ---------------------------------------------------------------------------------------------------------------------

# As the notebooks do it: quantize, save into a folder that gets its name at the end, then record. It waits where it is told to.
QUANTIZE = """
import sys, time
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from helpers import checkpoints, models, records

base, build, stage = sys.argv[1:]

def reached(name):
    print(name, flush=True)
    if name == stage:
        time.sleep(60)

import bitsandbytes.nn.modules as layers
plain = layers.Params4bit._quantize
def quantize(self, *rest):
    result = plain(self, *rest)
    reached("quantizing")
    return result
layers.Params4bit._quantize = quantize

config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
net = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"})
with checkpoints.writing(build, "nf4") as folder:
    net.save_pretrained(folder)
    reached("saving")
reached("saved")
found = models.Found(base, "tiny", "local folder", "cpu")
records.write(build, method="nf4", notebook="04", found=found, **dict.fromkeys(records.NUMBERS, 1))
reached("recorded")
"""


def quantize(base, build, stage):
    command = [sys.executable, "-c", QUANTIZE, str(base), str(build), stage]
    return subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.integration
@kills
def test_killed_while_quantizing_saving_and_recording_then_run_again(base, tmp_path):
    for stage in ("quantizing", "saving", "saved"):
        process = quantize(base, tmp_path, stage)
        for line in process.stdout:
            if line.strip() == stage:
                process.send_signal(signal.SIGKILL)
                break
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == -signal.SIGKILL, errors[-500:]
        assert checkpoints.folder(tmp_path, "nf4").exists() == (stage == "saved"), f"killed while {stage}"
        assert records.read(tmp_path) == {}, f"killed while {stage}: there is a record of it"
    process = quantize(base, tmp_path, "none")
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors[-500:]
    folder = checkpoints.folder(tmp_path, "nf4")
    models.check_folder(folder)
    assert any(name.endswith("quant_state.bitsandbytes__nf4") for name in load_file(folder / "model.safetensors"))
    assert list(records.read(tmp_path)) == ["nf4"] and not list(folder.parent.glob(".nf4.tmp-*"))


FIND = "from helpers import models; print('ready', models.find(models.OFFLINE).path)"


@pytest.mark.slow
@kills
def test_the_real_conversion_killed_then_two_processes_at_once(found, tmp_path):
    """The package is downloaded and converted for real; `found` is there so that one without PyPI fails before this test.

    Three conversions take minutes, so this waits for the weekly run: test_models.py kills a small one, and test_packaged.py compares a
    real one with what its package holds.
    """
    env = child_environment() | {"COURSE_CACHE": str(tmp_path)}
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", FIND], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # noqa: E731
    first = start()
    assert first.stdout.readline().startswith("Preparing")
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*/model.gguf")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(5)  # in the middle of the conversion
    first.kill()
    first.communicate()
    target = tmp_path / SMOLLM2_FOLDER
    assert not target.exists()
    both = [start(), start()]
    outputs = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("Preparing" in output for output, _ in outputs) == 1, "both converted"
    models.check_folder(target)
    same = [load_file(Path(folder) / "model.safetensors") for folder in (target, found.path)]
    assert same[0].keys() == same[1].keys() and all(
        torch.equal(tensor, same[1][name]) for name, tensor in same[0].items()
    )


# --- disks ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder, *options):
    """A tmpfs at this folder; skips the test where this user may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system needs Linux and the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def full_disk(kind, folder):
    """A folder that takes 256 KB: a small tmpfs, or a limit on the size of any file of this process."""
    if kind == "tmpfs":
        with mounted(folder, "size=256k"):
            yield folder
        return
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of a file")
    folder.mkdir(parents=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


each_disk = pytest.mark.parametrize("kind", ["tmpfs", "limit"])


@pytest.mark.integration
@each_disk
def test_disk_full_while_saving_keeps_the_old_checkpoint_and_says_so(kind, tmp_path):
    with full_disk(kind, tmp_path / "disk") as disk:
        with checkpoints.writing(disk, "nf4") as folder:
            save_file({"a": torch.ones(10)}, folder / "model.safetensors")
        with (
            pytest.raises(Exception, match="No space left|File too large|os error"),
            checkpoints.writing(disk, "nf4") as folder,
        ):
            save_file({"a": torch.zeros(1_000_000)}, folder / "model.safetensors")
        checkpoint = checkpoints.folder(disk, "nf4")
        assert load_file(checkpoint / "model.safetensors")["a"].sum() == 10 and not list(
            checkpoint.parent.glob(".nf4.tmp-*")
        )
        record(disk)
        with pytest.raises(OSError) as full:
            files.write_text(disk / "records" / "nf4.json", "x" * 1_000_000)
        assert full.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert list(records.read(disk)) == ["nf4"] and [path.name for path in (disk / "records").iterdir()] == [
            "nf4.json"
        ]


@pytest.mark.integration
@each_disk
def test_disk_full_while_a_model_is_made_names_the_remedy_and_leaves_room(kind, tmp_path):
    with full_disk(kind, tmp_path / "disk") as disk:
        with pytest.raises(models.ModelError, match="could not be written.*COURSE_CACHE"):
            with models.building(disk / "model") as scratch:
                (scratch / "weights").write_bytes(bytes(1_000_000))
        with models.building(disk / "model") as scratch:
            (scratch / "weights").write_bytes(bytes(100_000))
        assert (disk / "model" / "weights").stat().st_size == 100_000


@pytest.mark.integration
@each_disk
def test_disk_full_under_a_notebook_is_its_verdict_and_no_stale_notebook_stays(kind, tmp_path):
    path = written.notebook(tmp_path / "01_long.ipynb", "print('x' * 1_000_000)")
    with full_disk(kind, tmp_path / "disk") as disk:
        (disk / "01_long.ipynb").write_text("an earlier run's")
        result = run.execute(path, disk / "01_long.ipynb")
        assert not result.ok and ("No space left" in result.verdict or "File too large" in result.verdict), (
            result.verdict
        )
        output = disk / "01_long.ipynb"
        assert not output.exists() or run.unexecuted(nbformat.read(output, 4)), (
            "a notebook that did not end looks as if it had"
        )
    assert run.execute(path, tmp_path / "again" / "01_long.ipynb").ok


@pytest.mark.integration
def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    """Root ignores modes, so: a file where the folder should be, and a file system mounted for reading only."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output folder cannot be made.*--output"):
        record(tmp_path / "file")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(models.ModelError, match="COURSE_CACHE"):
        models.find(models.OFFLINE)
    with mounted(tmp_path / "disk", "size=1m") as disk:
        sealed(disk / "cache" / SMOLLM2_FOLDER)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="output folder cannot be made.*Read-only"):
            record(disk / "build")
        with pytest.raises(models.ModelError, match="could not be written.*Read-only"):
            with models.building(disk / "cache" / "other"):
                pass
        monkeypatch.setenv("COURSE_CACHE", str(disk / "cache"))
        assert models.find(models.OFFLINE).name == "SmolLM2-135M-Instruct", "a complete cache needs only to be read"
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert list(records.read(disk / "build")) == [] and record(disk / "build")["method"] == "nf4"


# --- damaged files --------------------------------------------------------------------------------------------------------------


def sealed(folder):
    """A tiny checkpoint as the cache holds one: with the SHA-256 of its weights."""
    make_checkpoint(folder)
    (folder / models.integrity.DIGESTS).write_text(
        json.dumps({"model.safetensors": models.integrity.sha256(folder / "model.safetensors")})
    )
    return folder


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


DAMAGE = {
    "length of the header": lambda file: flip(file, 2),
    "a name in the header": lambda file: flip(file, 12),
    "one weight": lambda file: flip(file, -7),
    "cut in the header": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "cut by one byte": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "nothing but zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_weight_file_is_named_and_the_cache_makes_it_anew(damage, cache, monkeypatch):
    monkeypatch.setattr(packages, "_assemble", lambda chosen, gguf: gguf.touch())
    monkeypatch.setattr(packages, "_convert", lambda file, target, name: make_checkpoint(target))
    folder = Path(models.find(models.OFFLINE).path)
    good = (folder / "model.safetensors").read_bytes()
    damage(folder / "model.safetensors")
    assert (folder / "model.safetensors").read_bytes() != good
    with pytest.raises(models.Damaged, match="model.safetensors.*truncated or damaged"):
        models.find(str(folder))
    assert models.find(models.OFFLINE).path == str(folder)
    assert (folder / "model.safetensors").read_bytes() == good


# --- network and tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint_files(tmp_path):
    folder = make_checkpoint(tmp_path / "source")
    save_file({"a": torch.randn(100_000)}, folder / "model.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.integration
def test_a_download_that_breaks_off_is_taken_up_and_a_flipped_bit_downloads_again(
    checkpoint_files, tmp_path, monkeypatch
):
    with fakehub.serving("breaks", checkpoint_files) as hub:
        fakehub.use(monkeypatch, hub.address, tmp_path)
        monkeypatch.setattr(models.hub, "HUB_TIMEOUT", 2)
        with pytest.raises(models.HubUnreachable, match="broke off.*Run again"):
            models.find("owner/name")
        hub.mode = "open"
        folder = Path(models.find("owner/name").path)
        assert (folder / "model.safetensors").read_bytes() == checkpoint_files["model.safetensors"]
        hub.asked.clear()
        assert models.find("owner/name").path == str(folder) and hub.asked == [], (
            "a complete download asks the hub again"
        )
        hub.mode = "garbage"
        assert models.hub.in_hub_cache("owner/name") == folder
        hub.mode = "open"
        if not (folder / "model.safetensors").is_symlink():
            pytest.skip("without links, the hub's cache does not keep a file's SHA-256")
        flip((folder / "model.safetensors").resolve(), -9)
        again = Path(models.find("owner/name").path)
        assert (again / "model.safetensors").read_bytes() == checkpoint_files["model.safetensors"]


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["refused", "hang", "garbage"])
def test_a_dead_network_falls_back_to_the_package_and_says_what_is_wrong(mode, found, tmp_path, monkeypatch):
    with fakehub.serving(mode) as hub:
        fakehub.use(monkeypatch, "http://127.0.0.1:9" if mode == "refused" else hub.address, tmp_path)
        monkeypatch.setattr(models.hub, "HUB_TIMEOUT", 1)
        with pytest.raises(models.HubUnreachable, match="No connection to the hub.*smollm2-offline"):
            models.find("owner/name")
        if models.base.gpu_bytes() == 0:
            assert models.find("auto").path == found.path
        assert not hub.gave_up, "a hub that hangs must not hang the course"


@pytest.mark.integration
def test_a_hub_that_hangs_after_its_first_answer_does_not_hang_the_course(checkpoint_files, tmp_path, monkeypatch):
    """The check of access has no time limit of its own in huggingface_hub."""
    with fakehub.serving("open", checkpoint_files) as hub:
        fakehub.use(monkeypatch, hub.address, tmp_path)
        monkeypatch.setattr(models.hub, "HUB_TIMEOUT", 1)
        hub.hang_after = 1
        with pytest.raises(models.HubUnreachable, match="Timeout"):
            models.find("owner/name")
        assert len(hub.asked) > 1 and not hub.gave_up, "a hub that hangs must not hang the course"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("mode", "token", "said"),
    [
        ("gated", None, "is gated.*hf auth login"),
        ("wrong", "hf_" + "w" * 20, "refuses your token.*hf auth login"),
        ("expired", "hf_" + "e" * 20, "refuses your token.*hf auth login"),
    ],
)
def test_wrong_expired_and_missing_tokens(mode, token, said, checkpoint_files, tmp_path, monkeypatch):
    with fakehub.serving(mode, checkpoint_files) as hub:
        fakehub.use(monkeypatch, hub.address, tmp_path)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(models.ModelError, match=said) as refusal:
            models.find("owner/name")
        assert token is None or token not in str(refusal.value)
        assert not any("/resolve/" in path for path in hub.asked), "something was downloaded before the refusal"
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub.mode = "open"
        assert (Path(models.find("owner/name").path) / "model.safetensors").is_file()


# --- notebooks ------------------------------------------------------------------------------------------------------------------


RECORD = """
from helpers import models, records
found = models.Found("here", "tiny", "local folder", "cpu")
records.write({build!r}, method={method!r}, notebook={notebook!r}, found=found, **dict.fromkeys(records.NUMBERS, 1))
"""
FAULTS = {
    # papermill counts its own cell with the parameters, so the cell's number depends on whether there are any
    "01_raises": ("raise ValueError('bits must be 2 to 8')", ": ValueError: bits must be 2 to 8"),
    "02_never_ends": ("while True: pass", "a cell took longer than 4 s"),
    "03_exits": ("import sys; sys.exit(0)", "stopped early: 1 code cells did not run"),
    "04_killed": (
        "import os, signal; os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))",
        "the kernel died, most likely for lack of memory",
    ),
    "05_good": ("1", "ok"),
}


@pytest.mark.integration
def test_one_run_over_every_kind_of_broken_notebook(tmp_path, monkeypatch, capsys):
    build = tmp_path / "build"
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    broken = [
        written.notebook(
            tmp_path / f"{name}.ipynb",
            source,
            RECORD.format(build=str(build), method=name[3:].replace("_", "-"), notebook=name),
        )
        for name, (source, _) in FAULTS.items()
    ]
    (tmp_path / "06_damaged.ipynb").write_text('{"cells": [')
    (build / "notebooks").mkdir(parents=True)
    (build / "notebooks" / "06_damaged.ipynb").write_text("an earlier run's")
    monkeypatch.setattr(pages, "paths", lambda: [*broken, tmp_path / "06_damaged.ipynb"])
    arguments = argparse.Namespace(
        only=None, output=str(build), timeout=4, parameter=None, in_place=False, model="auto", cap=None
    )
    assert run.main(arguments) == 1
    printed = capsys.readouterr().out
    report = (build / "report.html").read_text(encoding="utf-8")
    for name, (_, verdict) in FAULTS.items():
        assert f"{name} ...\n" in printed and verdict in printed and verdict in report, name
    assert "1 of 6 ok" in printed and "06_damaged" in report
    assert not (build / "notebooks" / "06_damaged.ipynb").exists(), "an earlier run's notebook passes for this one's"
    assert list(records.read(build)) == ["good"], "a notebook that did not end left a record"

    for path in broken:  # what was wrong is put right
        notebook = nbformat.read(path, 4)
        notebook.cells[0].source = "1"
        nbformat.write(notebook, path)
    shutil.rmtree(build / "records")
    monkeypatch.setattr(pages, "paths", lambda: broken[3:])
    assert run.main(arguments) == 0 and sorted(records.read(build)) == ["good", "killed"]


@pytest.mark.integration
@kills
def test_a_run_that_is_killed_leaves_whole_files(tmp_path):
    path = written.notebook(tmp_path / "01_slow.ipynb", "print('first')", "import time; time.sleep(60)")
    code = "import sys; from helpers.publishing import run; run.execute(*sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(tmp_path / "out.ipynb")], env=child_environment()
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "out.ipynb").is_file() or "first\\n" not in (tmp_path / "out.ipynb").read_text(
        encoding="utf-8"
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    left = nbformat.read(tmp_path / "out.ipynb", 4)
    nbformat.validate(left)
    assert run.unexecuted(left), "a killed run looks like a finished one"
