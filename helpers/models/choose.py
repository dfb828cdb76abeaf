"""Which model this machine gets, as a local folder that `from_pretrained` takes.

Every path ends in a folder with config, tokenizer and safetensors, so a notebook's own call stays the plain
`AutoModelForCausalLM.from_pretrained(found.path, ...)`, works offline from the second run on, and never loads a pickle or remote code.
"""

import dataclasses
import json
from pathlib import Path

from helpers.models import geometry, hub, integrity, packages
from helpers.models.base import (
    AUTO_GPU,
    GEOMETRY,
    MISTRAL,
    OFFLINE,
    PARAMETERS,
    QWEN,
    SMOLLM2,
    Found,
    HubUnreachable,
    ModelError,
    choices,
    cpu_multiplies_bfloat16,
    gpu_bytes,
    require_room,
    this_device,
)


def find(model: str = "auto", copies: float = 1, halves: float | None = None, on_gpu: float = 1) -> Found:
    """Return a `Found` for "auto", "smollm2-offline", "qwen2.5-coder-1.5b-offline", "mistral-7b-geometry", a hub id, or a local folder.

    "auto" takes Mistral-7B-Instruct-v0.3 where a CUDA GPU with 16 GB and access to it exist, else SmolLM2-135M-Instruct from the
    hub, else the same model from its PyPI package. Raises ModelError with a remedy, before anything large is downloaded.

    copies  how many times the caller holds the model in full precision at once (a copy in 16 bits is half of one in float32).
            Where a CPU has no room for that, find raises before the system kills the process, and for what is large before it is
            downloaded or made.
    halves  how many copies in bfloat16 the caller holds at once where `Found.dtype` is bfloat16; None: it needs float32. Where a
            CPU has room for these and not for `copies`, `Found.dtype` is bfloat16, and a line says so.
    on_gpu  how many copies in 16 bits the caller holds at once on a GPU, where there is one.
    """
    if not isinstance(model, str) or not model.strip():
        raise ModelError(f'model must be "auto", a hub id such as "{SMOLLM2}", or a folder; got {model!r}.')
    if model == "auto":
        return _auto()
    if model in (OFFLINE, QWEN):
        require_room(model, 2 * PARAMETERS[model], {"dtype": "bfloat16"}, copies, halves, on_gpu)
        found = packages.get(model)
    elif model == GEOMETRY:
        require_room(model, geometry.size(32), {"dtype": "bfloat16"}, copies, halves, on_gpu)
        found = geometry.make()
    elif (folder := Path(model).expanduser()).is_dir():
        found = _local(folder)
    elif folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(f'There is no folder "{model}", and a hub id looks like "owner/name". {choices()}')
    else:
        found = hub.download(model, copies, halves, on_gpu)
    folder = Path(found.path)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not require_room(found.name, size, settings, copies, halves, on_gpu):
        return found
    slowly = "" if cpu_multiplies_bfloat16() else ", slowly: this CPU emulates it"
    print(f"{found.name} does not fit in this machine's RAM in float32. It runs in bfloat16 here{slowly}.")
    return dataclasses.replace(found, half=True)


def _auto():
    if gpu_bytes() >= AUTO_GPU:
        try:
            return hub.download(MISTRAL)
        except ModelError:
            pass  # gated or offline: the small model teaches the same
    try:
        return hub.download(SMOLLM2)
    except HubUnreachable:
        return packages.get()


def _local(folder):
    integrity.check_folder(folder)
    return Found(str(folder.resolve()), folder.resolve().name, "local folder", this_device(), str(folder.resolve()))
