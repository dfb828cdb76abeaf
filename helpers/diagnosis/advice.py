"""What each notebook will do on this machine, and the command that changes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import memory, models
from helpers.publishing import pages

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RUNS, SMALL, CANNOT = "run", "run with the small model", "cannot"
CONTEXT = 512  # tokens, the course's evaluation windows
INSTALL = "pip install -r requirements.txt"
GPU_EXTRA = 1.5e9  # bytes of VRAM beside weights and KV cache: CUDA's own context and activations


@dataclass(frozen=True)
class Advice:
    """What one notebook will do here: "run", "run with the small model" or "cannot"; why; the command that changes it.

    ram_bytes, vram_bytes, disk_bytes: what it needs with `model`; `estimate` where that was scaled and not measured. `switch` where
    the small model has to be asked for, because the other one would be tried first and fail.
    """

    notebook: str
    verdict: str
    model: str = "none"
    ram_bytes: int = 0
    vram_bytes: int = 0
    disk_bytes: int = 0
    estimate: bool = False
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
    missing: frozenset[str] = frozenset()
    small: tuple[str, str] | None = None  # why the default model cannot be had, and the command that changes it
    large: tuple[str, str] | None = None  # the same for the model asked for
    small_bytes: int = 0  # of the default model already on the disk


def advise(
    paths: Iterable[Path], machine: Machine, model: str = "auto", config: PreTrainedConfig | None = None
) -> list[Advice]:
    """One `Advice` for each notebook file on this `Machine`.

    model, config  as asked for, and its transformers config; without one, a model other than the default cannot be judged
    """
    return [
        _advise(path.stem, {**course(path), "copies": pages.copies(path)}, machine, model, config) for path in paths
    ]


def needs(cost: dict[str, Any], config: PreTrainedConfig | None = None, gpu: bool = False, copies: float = 1) -> Need:
    """The `Need` of a notebook with this cost card, for the default model or, with `config`, for another one.

    copies: how many times the notebook holds a model in full precision at once (what it tells `models.find`); on a CPU its peak grows
    by that many times the difference in size.
    """
    cpu = cost["cpu"]
    measured = Need(cpu["peak_ram_bytes"], 0, cpu["disk_bytes"], False)
    if config is None:
        return measured
    bits = 16 if gpu else 32
    asked, small = (
        memory.predict(each, bits=bits, rest_bits=bits, context=CONTEXT, cache_bits=bits)
        for each in (config, models.smollm2_config())
    )
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
    missing = {"torch", "transformers", *course.get("packages", [])} & machine.missing
    if missing:
        why = f"missing or broken: {', '.join(sorted(missing))}"
        return Advice(name, CANNOT, why=why, command=INSTALL)
    if "cpu" not in course.get("cost", {}):
        return Advice(name, CANNOT, why="it was never measured", command="make outputs")
    run = f"python -m helpers run --only {name[:2]}"
    if not _wants_large(model, machine):
        why, command = "", ""
        if model == "auto":
            why, command = 'no GPU with 16 GB, so "auto" takes the small model', f"on a machine with such a GPU: {run}"
        return _small(name, course, machine, model, run, why, command)
    label, shape = (models.MISTRAL, models.mistral_config()) if model == "auto" else (model, config)
    need = None if shape is None else needs(course["cost"], shape, bool(machine.gpu), course["copies"])
    refused = machine.large or _short(need, machine, run, model)
    if need and not refused:
        return _with(need, notebook=name, verdict=RUNS, model=label)
    reason, command = refused or ("", "")
    switch = model != "auto" or not machine.large  # "auto" itself skips a model that it cannot have
    if switch:
        command = f"{command}; or as it is here: {run} --model {models.OFFLINE}"
    return _small(name, course, machine, model, run, f"{label}: {reason}", command, switch)


def _wants_large(model, machine):
    """Whether `models.find` would try another model than the default one."""
    return machine.gpu >= models.AUTO_GPU if model == "auto" else model not in (models.OFFLINE, models.SMOLLM2)


def _small(name, course, machine, model, run, why, command, switch=False):
    """The `Advice` with the default model. why, command, switch: what keeps another one away."""
    need = needs(course["cost"])
    refused = machine.small or _short(need, machine, run, "auto", machine.small_bytes)
    if refused:
        verdict, (why, command), switch = CANNOT, refused, False
    else:
        verdict = RUNS if model in (models.OFFLINE, models.SMOLLM2) else SMALL
    return _with(
        need, notebook=name, verdict=verdict, model="SmolLM2-135M-Instruct", why=why, command=command, switch=switch
    )


def _with(need, **rest):
    """`Advice` with the bytes of a `Need`."""
    return Advice(ram_bytes=need.ram, vram_bytes=need.vram, disk_bytes=need.disk, estimate=need.estimate, **rest)


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


def course(path: Path) -> dict[str, Any]:
    """What a notebook's metadata says of it: its packages and its measured cost; {} where it says nothing."""
    return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("course", {})
