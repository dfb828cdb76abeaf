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

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from helpers import __version__, bootstrap, files, memory, records, redact
from helpers.diagnosis.advice import CANNOT, Advice, Machine, advise
from helpers.diagnosis.checks import (
    BAD,
    OK,
    Check,
    check_bitsandbytes,
    check_combinations,
    check_cuda,
    check_disk,
    check_formats,
    check_grid,
    check_kernel,
    check_model,
    check_packages,
    check_python,
    check_ram,
    check_torch,
    check_vram,
    default_folder,
    free_disk,
    gpu_memory,
)
from helpers.diagnosis.network import Network
from helpers.publishing import pages


def examine() -> list[Check]:
    """Run every check on this machine; a list of `Check`."""
    return _examine("auto")[0]


def overall(checks: Sequence[Check]) -> tuple[str, str]:
    """The worst verdict, "ok" or "bad", and a sentence."""
    bad = [check.component for check in checks if check.verdict == BAD]
    if bad:
        return BAD, f"Not ready: {', '.join(bad)}. Follow the remedies above, then ask again."
    gpu = any("compute capability" in check.found for check in checks)
    return OK, "Ready: the course runs here on " + ("the GPU." if gpu else "the CPU with the small model.")


def main(as_json: bool = False, model: str = "auto", only: Sequence[str] | None = None) -> int:
    """Print the verdicts; the exit code as the module's docstring lists them. ValueError where `only` names no notebook."""
    started = time.perf_counter()
    chosen = [path for path in pages.paths() if not only or path.name.startswith(tuple(only))]
    if only and not chosen:
        raise ValueError(
            f"no notebook begins with {', '.join(only)}; there are {', '.join(path.stem[:2] for path in pages.paths())}"
        )
    checks, machine, config = _examine(model)
    advice = advise(chosen, machine, model, config)
    verdict, sentence = overall(checks)
    code = exit_code(checks, advice)
    if code == 1 and verdict == OK:
        verdict, sentence = (
            BAD,
            f"Cannot run here: {', '.join(entry.notebook for entry in advice if entry.verdict == CANNOT)}.",
        )
    checks = [_public_fields(check) for check in checks]
    advice = [_public_fields(entry) for entry in advice]
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


def exit_code(checks: Sequence[Check], advice: Sequence[Advice]) -> int:
    """0, 1 or 3, as the module's docstring says."""
    if any(check.verdict == BAD for check in checks) or any(entry.verdict == CANNOT for entry in advice):
        return 1
    return 3 if any(entry.switch for entry in advice) else 0


def _examine(model):
    """([Check], Machine, config of the model asked for or None)."""
    network = Network(model)
    network.start()
    checks = [
        check_python(),
        check_packages(),
        check_combinations(),
        check_torch(),
        check_cuda(),
        check_formats(),
        check_bitsandbytes(),
        check_kernel(),
    ]
    network.join()
    checks += [check_ram(), check_vram(), check_disk(), network.hub(), network.access(), check_model(network)]
    if not any(check and check.component == "torch" and check.verdict == BAD for check in checks):
        checks.append(check_grid(model))
    checks = [check for check in checks if check is not None]
    broken = {check.component for check in checks if check.verdict == BAD}
    missing = {name for name in bootstrap.pins() if bootstrap.version(name) is None} | broken & {
        "torch",
        "bitsandbytes",
    }
    gpu, vram = gpu_memory() if "torch" not in broken else (0, 0)
    folder = default_folder()
    machine = Machine(
        ram=memory.free_ram(), disk=0 if "disk" in broken else free_disk(), gpu=gpu, vram=vram,
        missing=frozenset(missing), small=network.small_refusal(),
        large=network.large_refusal(), small_bytes=files.size(folder) if folder else 0,
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
        cost = (
            f"{about}{entry.ram_bytes / 1e9:.1f} GB RAM, {entry.disk_bytes / 1e9:.1f} GB disk"
            if entry.ram_bytes
            else ""
        )
        vram = f", {entry.vram_bytes / 1e9:.1f} GB VRAM" if entry.vram_bytes else ""
        print(f"{entry.notebook:{width}}  {entry.verdict:24}  {cost}{vram}")
    for why, command in dict.fromkeys(
        (entry.why, re.sub(r"--only \d\d", "--only NN", entry.command)) for entry in advice if entry.why
    ):
        print(f"  {why}\n    -> {command}")
    print(f"\n[{verdict:4}] {sentence}")


def _public_fields(row):
    """The row (a dataclass) with each of its texts as it may stand in a public bug report."""
    return replace(row, **{key: _public(value) for key, value in asdict(row).items()})


def _public(value):
    """A text as it may stand in a public bug report: no secrets, and the home folder as ~."""
    if not isinstance(value, str):
        return value
    home = str(Path.home())
    return redact.redact(value).replace(home, "~") if len(home) > 1 else redact.redact(value)
