"""The doctor: what is wrong with a machine is said, with the command that changes it, and the exit code follows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fakehub
import pytest
from conftest import ROOT

from helpers import bootstrap, driver, memory, models
from helpers.diagnosis import advice, checks, doctor, network
from helpers.publishing import pages

ROOMY = advice.Machine(ram=64e9, disk=500e9)
GPU = {"gpu": int(24e9), "vram": int(23e9)}
GATED = ("it is gated, and there is no token here", "accept the terms, then: hf auth login")


def verdicts(machine, model="auto", config=None, paths=None):
    return {entry.notebook[:2]: entry for entry in advice.advise(paths or pages.paths(), machine, model, config)}


def changed(**values):
    return advice.Machine(**{**vars(ROOMY), **values})


def test_every_notebook_has_a_verdict_and_a_roomy_cpu_runs_all_with_the_small_model():
    found = verdicts(ROOMY)
    assert set(found) == {path.name[:2] for path in pages.paths()}
    assert {entry.verdict for entry in found.values()} == {advice.SMALL}
    assert doctor.exit_code([], found.values()) == 0
    cost = {path.name[:2]: notebooks_cost(path) for path in pages.paths()}
    assert all(
        entry.ram_bytes == cost[number]["peak_ram_bytes"] and not entry.estimate for number, entry in found.items()
    )


def notebooks_cost(path):
    return json.loads(path.read_text(encoding="utf-8"))["metadata"]["course"]["cost"]["cpu"]


def test_with_too_little_ram_exactly_the_notebooks_that_need_more_cannot():
    peaks = sorted(notebooks_cost(path)["peak_ram_bytes"] for path in pages.paths())
    found = verdicts(changed(ram=peaks[len(peaks) // 2]))
    cannot = [entry for entry in found.values() if entry.verdict == advice.CANNOT]
    assert len(cannot) == sum(peak > peaks[len(peaks) // 2] for peak in peaks) > 0
    for entry in cannot:
        assert "GB of RAM" in entry.why and f"run --only {entry.notebook[:2]}" in entry.command
    assert doctor.exit_code([], found.values()) == 1


def test_without_disk_none_can_and_the_command_moves_cache_and_output():
    found = verdicts(changed(disk=1e8))
    assert {entry.verdict for entry in found.values()} == {advice.CANNOT}
    assert all(
        "of disk" in entry.why and "COURSE_CACHE=" in entry.command and "--output" in entry.command
        for entry in found.values()
    )
    there = verdicts(changed(disk=1e9, small_bytes=600_000_000))
    assert there["04"].verdict == advice.SMALL, "a model that is on the disk already is asked to be there twice"


def test_a_missing_package_stops_the_notebooks_that_use_it():
    found = verdicts(changed(missing=frozenset({"bitsandbytes"})))
    assert found["04"].verdict == advice.CANNOT and found["04"].command == "pip install -r requirements.txt"
    assert found["02"].verdict == advice.SMALL
    assert {entry.verdict for entry in verdicts(changed(missing=frozenset({"torch"}))).values()} == {advice.CANNOT}


def test_no_source_for_the_default_model():
    entry = verdicts(changed(small=("neither the hub nor PyPI answers", "connect once")))["00"]
    assert (entry.verdict, entry.command) == (advice.CANNOT, "connect once")


def test_a_24_gb_gpu_with_access_runs_mistral():
    found = verdicts(changed(**GPU))
    for number in (
        "04",
        "07",
    ):  # as they are now, none was measured in the 7B shape: a card that was is believed, see below
        entry = found[number]
        assert (
            entry.verdict == advice.RUNS
            and entry.model == models.MISTRAL
            and entry.vram_bytes < 24e9
            and entry.estimate
        )
    assert found["04"].vram_bytes > 14.5e9


def test_a_gpu_without_access_gets_the_small_model_and_the_login_command():
    found = verdicts(changed(**GPU, large=GATED))
    assert {entry.verdict for entry in found.values()} == {advice.SMALL}
    assert (
        "gated" in found["04"].why
        and "hf auth login" in found["04"].command
        and doctor.exit_code([], found.values()) == 0
    )


def test_a_gpu_that_others_fill():
    entry = verdicts(changed(gpu=int(24e9), vram=int(5e9)))["04"]
    assert (
        entry.verdict == advice.SMALL and "GB of VRAM, 5.0 GB are free" in entry.why and "nvidia-smi" in entry.command
    )
    assert entry.switch and "--model smollm2-offline" in entry.command and doctor.exit_code([], [entry]) == 3, (
        "auto would try the large one"
    )


def test_a_model_that_was_asked_for_and_does_not_fit_exits_3():
    mistral = models.mistral_config()
    found = verdicts(changed(ram=8e9), "owner/seven-b", mistral)
    assert {entry.verdict for entry in found.values()} == {advice.SMALL}
    assert "about" in found["04"].why and "--model smollm2-offline" in found["04"].command
    assert doctor.exit_code([], found.values()) == 3
    assert doctor.exit_code([checks.Check("disk", checks.BAD, "full", "free some")], found.values()) == 1


@pytest.mark.parametrize("gpu", [False, True])
def test_what_a_notebook_needs_grows_with_the_model(gpu):
    cost = {"cpu": {"peak_ram_bytes": 3_000_000_000, "disk_bytes": 1_000_000_000}}
    small, mid, large = (advice.needs(cost, models.mistral_config(layers), gpu) for layers in (1, 8, 32))
    assert advice.needs(cost) == advice.Need(3_000_000_000, 0, 1_000_000_000, False)
    assert small.disk < mid.disk < large.disk and all(need.estimate for need in (small, mid, large))
    grows = [need.vram if gpu else need.ram for need in (small, mid, large)]
    assert grows == sorted(set(grows)) and grows[-1] > (14.5e9 if gpu else 29e9), "less than the weights alone"


def test_the_formula_and_the_default_models_own_config_agree(found):
    from transformers import AutoConfig

    theirs = memory.predict(AutoConfig.from_pretrained(found.path), context=512)
    assert memory.predict(models.smollm2_config(), context=512) == theirs
    cost = {"cpu": {"peak_ram_bytes": 3_000_000_000, "disk_bytes": 1_000_000_000}}
    assert advice.needs(cost, models.smollm2_config()).ram == pytest.approx(3e9, rel=1e-6)


def test_a_measured_gpu_card_is_believed_before_the_formula():
    run = {"peak_ram_bytes": 6e9, "peak_vram_bytes": 17e9}
    cost = {"cpu": {"peak_ram_bytes": 3e9, "disk_bytes": 1e9}, "gpu_7b": run}
    need = advice.needs(cost, models.mistral_config(), gpu=True)
    assert (need.ram, need.vram, need.estimate) == (6e9, 17e9, False)
    assert advice.needs(cost, models.mistral_config(8), gpu=True).estimate


@pytest.mark.parametrize(
    ("versions", "said", "remedy"),
    [
        ({"transformers": "4.57.1"}, "transformers 4.57.1: chat templates", "transformers==5.23.0"),
        ({"gptqmodel": "7.7.0"}, "gptqmodel 7.7.0 with torch 2.13.0", "gptqmodel==7.6.0"),
        ({"numpy": "2.4.0"}, "numpy 2.4.0 with gptqmodel 7.6.0", "numpy==2.2.6"),
        ({"autoawq": "0.2.8"}, "autoawq 0.2.8 with transformers", "autoawq==0.2.9"),
        ({"bitsandbytes": "0.45.0"}, "bitsandbytes 0.45.0", "bitsandbytes==0.50.2"),
        ({"accelerate": "0.1"}, "asks for accelerate", "accelerate==1.15.0"),
    ],
)
def test_bad_combinations_are_named_with_the_command(monkeypatch, versions, said, remedy):
    pinned = bootstrap.pins()
    monkeypatch.setattr(bootstrap, "version", lambda name: versions.get(name, pinned.get(name)))
    check = checks.check_combinations()
    assert check.verdict == checks.BAD and said in check.found and remedy in check.remedy, check


def test_a_version_that_a_package_does_not_ask_for_and_runs_with_is_a_note(monkeypatch):
    pinned = bootstrap.pins()
    monkeypatch.setattr(bootstrap, "version", lambda name: {"numpy": "2.5.2"}.get(name, pinned.get(name)))
    monkeypatch.setattr(checks.metadata, "requires", lambda name: ["numpy==2.2.6"] if name == "gptqmodel" else [])
    check = checks.check_combinations()
    assert check.verdict == checks.NOTE and "2.5.2 is installed, which notebooks ran with" in check.found, check
    assert check.remedy == "pip install numpy==2.2.6"


def test_packages_that_a_notebook_installs_itself_do_not_stop_the_course(monkeypatch):
    """On Colab most of the course's packages are missing until a notebook's first cell installs them."""
    here = {*bootstrap.pins()}
    for absent, verdict in (
        ({"jupyterlab", "gptqmodel", "playwright"}, checks.NOTE),
        ({"transformers"}, checks.BAD),
        ({"torch"}, checks.BAD),
    ):
        monkeypatch.setattr(
            bootstrap, "version", lambda name: bootstrap.pins().get(name) if name in here - absent else None
        )
        check = checks.check_packages()
        assert check.verdict == verdict and all(name in check.found for name in absent), check


def test_the_pins_are_no_bad_combination():
    assert checks.check_combinations().verdict == checks.OK


def test_a_gpu_that_torch_does_not_use(monkeypatch):
    import torch

    monkeypatch.setattr(driver, "describe", lambda: ("NVIDIA T4", "550.54", "12.4"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    check = checks.check_cuda()
    assert (
        check.verdict == checks.NOTE
        and "NVIDIA T4" in check.found
        and "without CUDA" in check.found
        and "torch==2.13.0" in check.remedy
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = checks.check_cuda()
    assert (
        "built for CUDA 13.0, driver 550.54 takes CUDA 12.4" in check.found
        and "update the NVIDIA driver" in check.remedy
    )


@pytest.mark.parametrize(
    ("capability", "verdict", "said"),
    [
        ((6, 1), checks.BAD, "starts at 7.5"),
        ((7, 5), checks.NOTE, "no bfloat16"),
        ((9, 0), checks.OK, "compute capability 9.0"),
    ],
)
def test_compute_capability(monkeypatch, capability, verdict, said):
    import torch

    monkeypatch.setattr(driver, "describe", lambda: ("a GPU", "580.1", "13.0"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"])
    check = checks.check_cuda()
    assert (check.verdict, said in check.found) == (verdict, True) and bool(check.remedy) == (verdict != checks.OK)


def test_another_environments_kernel_is_seen_though_both_link_to_one_python(monkeypatch, tmp_path):
    from jupyter_client.kernelspec import KernelSpecManager

    other = tmp_path / "other" / "bin" / "python"
    other.parent.mkdir(parents=True)
    other.symlink_to(Path(sys.executable).resolve())
    spec = type("Spec", (), {"argv": [str(other)]})
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda *_: spec)
    check = checks.check_kernel()
    assert check.verdict == checks.NOTE and "another environment" in check.found and "ipykernel install" in check.remedy
    spec.argv = ["python3"]
    monkeypatch.setattr(checks.shutil, "which", lambda name: str(other.parent / name))
    assert "`jupyter` on the path" in checks.check_kernel().found


@pytest.fixture
def small_wait(monkeypatch):
    monkeypatch.setattr(network, "HUB_SECONDS", 2)
    for module in (network, checks):
        monkeypatch.setattr(module, "default_folder", lambda: None)


def ask(model="auto"):
    asked = network.Network(model)
    asked.start()
    asked.join()
    return asked


@pytest.mark.integration
@pytest.mark.parametrize(
    ("mode", "token", "hub", "access"),
    [
        ("open", "", "answers", "is open to you"),
        ("gated", "", "answers", "there is no token here"),
        ("gated", "hf_" + "a" * 20, "answers", "not on its list"),
        ("wrong", "hf_" + "b" * 20, "answers", "refuses your token"),
        ("expired", "hf_" + "c" * 20, "answers", "refuses your token"),
        ("garbage", "", "cannot be used", "not asked"),
        ("hang", "", "cannot be used", "not asked"),
        ("refused", "", "cannot be used", "not asked"),
    ],
)
def test_every_way_a_hub_can_answer(monkeypatch, tmp_path, small_wait, mode, token, hub, access):
    monkeypatch.setattr(network, "_pypi_answers", lambda: True)
    with fakehub.serving(mode) as server:
        fakehub.use(monkeypatch, "http://127.0.0.1:9" if mode == "refused" else server.address, tmp_path)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        asked = ask()
        assert not server.gave_up, "a hub that hangs must not hold up the answer"
    assert hub in asked.hub().found and access in asked.access().found
    for check in (asked.hub(), asked.access()):
        assert bool(check.remedy) == (check.verdict != checks.OK) and (not token or token not in str(check))
    assert (asked.large_refusal() is None) == (mode == "open")
    assert asked.small_refusal() is None


def test_neither_hub_nor_pypi(monkeypatch, tmp_path, small_wait):
    monkeypatch.setattr(network, "_pypi_answers", lambda: False)
    fakehub.use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    asked = ask()
    check = checks.check_model(asked)
    assert (
        check.verdict == checks.BAD
        and "neither the hub nor PyPI" in check.found
        and check.remedy.startswith("connect once")
    )


def run(*arguments, **env):
    command = [sys.executable, "-m", "helpers", "doctor", *arguments]
    return subprocess.run(command, env=os.environ | env, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.integration
def test_the_whole_command_answers_though_the_hub_hangs_without_secrets_or_home(found):
    secret = "hf_" + "planted" * 4
    with fakehub.serving("hang") as server:
        done = run("--json", HF_ENDPOINT=server.address, HF_TOKEN=secret, HF_HUB_OFFLINE="0")
        assert not server.gave_up, "a hub that hangs must not hold up the answer"
    answer = json.loads(done.stdout)
    assert done.returncode == answer["exit_code"] == 0, done.stdout
    assert {entry["verdict"] for entry in answer["notebooks"]} <= {advice.RUNS, advice.SMALL} and len(
        answer["notebooks"]
    ) == len(pages.paths())
    assert {
        "python",
        "packages",
        "combinations",
        "torch",
        "CUDA",
        "bitsandbytes",
        "jupyter kernel",
        "RAM",
        "disk",
        "hub",
    } <= {check["component"] for check in answer["checks"]}
    assert secret not in done.stdout + done.stderr and str(Path.home()) + os.sep not in done.stdout


BARE = """
import sys
sys.modules["psutil"] = None  # as in a Python that nothing was installed into
from helpers.__main__ import main
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


@pytest.mark.integration
def test_before_anything_is_installed():
    for arguments in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", BARE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert (
            done.returncode == 1
            and "missing: psutil" in done.stdout
            and "pip install -r requirements.txt" in done.stdout
        ), done.stderr
    assert json.loads(done.stdout)["exit_code"] == 1


def test_the_readers_page_and_its_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor,
        "_examine",
        lambda model: ([checks.Check("RAM", checks.OK, "64 GB free")], ROOMY, models.mistral_config()),
    )
    assert doctor.main(only=["04"]) == 0
    printed = capsys.readouterr().out
    assert (
        "04_nf4_bitsandbytes  run with the small model" in printed
        and "-> on a machine with such a GPU" in printed
        and "[ok  ]" in printed
    )
    tight = changed(ram=1e9)
    monkeypatch.setattr(doctor, "_examine", lambda model: ([checks.Check("RAM", checks.OK, "1 GB free")], tight, None))
    assert doctor.main(only=["04"]) == 1
    assert "[bad ] Cannot run here: 04_nf4_bitsandbytes." in capsys.readouterr().out
    monkeypatch.setattr(doctor, "_examine", lambda model: ([], changed(ram=8e9), models.mistral_config()))
    assert doctor.main(True, "owner/seven-b") == json.loads(capsys.readouterr().out)["exit_code"] == 3
    with pytest.raises(ValueError, match="no notebook begins with 77"):
        doctor.main(only=["77"])


def test_the_issue_template_asks_for_it():
    (template,) = (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    assert "python -m helpers doctor --json" in template.read_text(encoding="utf-8")
    paragraph = next(
        part for part in (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n") if part.startswith("`doctor`")
    )
    for code in range(4):
        assert f"    {code}  " in doctor.__doc__ and re.search(rf"\b{code}\s+if\b", paragraph)


@pytest.mark.integration
def test_a_folder_on_a_grid_is_named_with_what_follows(base, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file
    from test_grid import asymmetric

    assert checks.check_grid(str(base)).verdict == checks.OK
    assert checks.check_grid("auto") is None and checks.check_grid(str(tmp_path / "nowhere")) is None
    tensors = load_file(base / "model.safetensors")
    rounded = {
        name: asymmetric(tensor, 32).to(torch.bfloat16) if name.endswith("proj.weight") else tensor
        for name, tensor in tensors.items()
    }
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(rounded, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "doctor", "--model", str(tmp_path), "--only", "00"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "[note] grid" in done.stdout and "14 of 15 Linear weights" in done.stdout and "blocks of 32" in done.stdout
    assert "costs nothing here" in done.stdout and "rescale" in done.stdout


def test_the_offline_qwen_is_judged_by_its_own_size(cache, monkeypatch):
    found = verdicts(ROOMY, models.QWEN, models.qwen_config())
    assert {entry.verdict for entry in found.values()} == {advice.RUNS} and all(
        entry.estimate for entry in found.values()
    )
    asked = network.Network(models.QWEN)
    asked.pypi = True
    assert asked.large_refusal() is None and asked.config().vocab_size == 151936
    monkeypatch.setattr(memory, "free_ram", lambda: 2_000_000_000)
    assert "GB of RAM, but only 2.0 GB" in asked.large_refusal()[0]
    asked.pypi = False
    assert "PyPI does not answer" in asked.large_refusal()[0]


def test_formats_of_a_card(monkeypatch):
    import torch

    assert set(checks.formats((8, 6)).values()) == {"restored to 16 bits"}
    assert checks.formats((9, 0)) == {"FP8": "native"} | dict.fromkeys(
        ("MXFP8", "MXFP4", "NVFP4"), "restored to 16 bits"
    )
    assert set(checks.formats((10, 0)).values()) == {"native"} and set(checks.formats((7, 0)).values()) == {
        "no kernel known here"
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checks.check_formats() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert checks.check_formats().found.startswith("capability 8.9: FP8 native, MXFP8 restored")
