"""What a model on this machine is, what can go wrong with it, and whether there is room for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from helpers import files, memory

if TYPE_CHECKING:
    import torch

Module = TypeVar("Module", bound="torch.nn.Module")

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.3"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEOMETRY = "mistral-7b-geometry"
OFFLINE = "smollm2-offline"
QWEN = "qwen2.5-coder-1.5b-offline"
AUTO_GPU = 15 * 2**30  # bytes of GPU memory from which "auto" wants Mistral-7B: a "16 GB" card reports a little less
PARAMETERS = {OFFLINE: 134_515_008, QWEN: 1_777_088_000}  # of what needs no hub, smaller ones first
KERNEL = 1.5e9  # bytes: a process with torch, transformers and a batch of logits, without a model


class ModelError(RuntimeError):
    """A model cannot be had; the message says what would help."""


class Damaged(ModelError):
    """A weight file is not what it should be. file: which one."""

    def __init__(self, file: Path):
        super().__init__(
            f"{file.name} in {file.parent} is truncated or damaged. Delete it and download the model again."
        )
        self.file = file


class HubUnreachable(ModelError):
    """No answer from the hub (as opposed to a refusal)."""


@dataclass(frozen=True)
class Found:
    """A model on this machine's disk.

    path    folder for `from_pretrained`
    name    short name for records and titles
    origin  where it came from, in words
    device  "cuda" or "cpu": where this machine runs it
    asked   what `find` takes to find it again on any machine: a hub id or a model's short name; the path for a local folder
    half    True where a CPU has room for it in bfloat16 only, and the caller can do with that
    """

    path: str
    name: str
    origin: str
    device: str
    asked: str = ""
    half: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Full-precision dtype for this device: float32 on a CPU (bfloat16 with `half`), bfloat16 on a GPU."""
        import torch

        return torch.float32 if self.device == "cpu" and not self.half else torch.bfloat16

    @property
    def trained(self) -> bool:
        """False where what a model answers proves nothing: random weights made here, and files of less than 100 MB."""
        files_of = Path(self.path).glob("*.safetensors")
        return not self.origin.startswith("random") and sum(file.stat().st_size for file in files_of) > 1e8

    @property
    def fast(self) -> torch.dtype:
        """The dtype to compute in where the last digits do not matter: bfloat16 with `half` or where the machine multiplies it, else float32.

        A CPU without AVX512-BF16 or AMX emulates bfloat16; measured on one with AVX2, a product took five times as long as in float32.
        """
        import torch

        half = self.half or self.device != "cpu" or cpu_multiplies_bfloat16()
        return torch.bfloat16 if half else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """True where this CPU has instructions for products in bfloat16 (AVX512-BF16 or AMX)."""
    import torch

    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def compute_in(net: Module, dtype: torch.dtype) -> Module:
    """Cast what bitsandbytes left unquantized (embeddings, norms, head) to dtype, in place, and return net.

    Its 4-bit layers compute in the dtype of their input, so this decides for the whole model.
    """
    for module in net.modules():
        if type(module).__name__ != "Linear4bit":
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return net


def cache() -> Path:
    """Folder for converted models and cached baselines; COURSE_CACHE moves it."""
    import platformdirs

    folder = Path(os.environ.get("COURSE_CACHE") or platformdirs.user_cache_path("quantization-course"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"The cache folder {folder} cannot be made ({error.strerror}). Set COURSE_CACHE to a folder you may write to."
        ) from error
    return folder


def require_disk(folder: Path, need: float, what: str) -> None:
    """Raise ModelError unless `need` bytes (and 5 % more) are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < need * 1.05:
        raise ModelError(
            f"{what} needs {need / 1e9:.1f} GB of disk, but only {free / 1e9:.1f} GB are free. {disk_advice(folder)}"
        )


def require_ram(need: float, what: str) -> None:
    """Raise ModelError unless this process may still take `need` bytes of RAM."""
    free = memory.free_ram()
    if free < need:
        raise ModelError(
            f"{what} needs {need / 1e9:.1f} GB of RAM, but only {free / 1e9:.1f} GB are free. Close other programs, or use a smaller model."
        )


def require_room(
    name: str, size: int, settings: dict[str, Any], copies: float, halves: float | None = None, on_gpu: float = 1
) -> bool:
    """True where a model, `size` bytes of weights as its config describes them, must be taken in bfloat16 to fit in memory.

    copies, halves, on_gpu: as `find` takes them. Raises ModelError where it does not fit in any dtype that the caller can do with.
    """
    device = this_device()
    free = memory.free_vram() if device == "cuda" else memory.free_ram()
    parameters, kernel = size / stored_bytes(settings), 0 if device == "cuda" else KERNEL
    each = wide_each = 2 * on_gpu if device == "cuda" else 4 * copies  # bytes of a parameter
    how = "for one copy in 16 bits" if on_gpu == 1 else f"for {on_gpu:g} times what one copy takes in 16 bits"
    if device != "cuda" and halves is None:
        how = f"for what is held at once here, {copies:g} times its {4 * parameters / 1e9:.1f} GB in float32"
    elif device != "cuda" and halves is not None:
        each = 2 * halves
        how = f"for what is held at once here, {halves:g} times its {2 * parameters / 1e9:.1f} GB in bfloat16"
    wide, need = wide_each * parameters + kernel, each * parameters + kernel
    if settings.get("quantization_config"):
        wide, need, how = size + kernel, size + kernel, "as it is stored"
    if need > free:
        kind = "GPU memory" if device == "cuda" else "RAM"
        raise ModelError(
            f"{name} needs about {need / 1e9:.1f} GB of {kind} {how}, and {free / 1e9:.1f} GB are free. Nothing was loaded. "
            + what_fits((free - kernel) / each)
        )
    return wide > free


def what_fits(parameters: float) -> str:
    """A sentence for a machine with room for so many parameters: which of the course's own models it can take."""
    named = [name for name, size in PARAMETERS.items() if size <= parameters]
    if not named:
        return (
            f'Not even model="{OFFLINE}" fits: close other programs and notebooks, or take a machine with more memory.'
        )
    return f'Up to {parameters / 1e9:.2f} billion parameters fit: model="{named[-1]}", for example.'


def stored_bytes(settings: dict[str, Any]) -> int:
    """Bytes of each weight in a checkpoint's files."""
    text = settings.get("text_config") or {}
    names = (part.get(key) for part in (settings, text) for key in ("dtype", "torch_dtype"))
    return 4 if next((name for name in names if name), "bfloat16") == "float32" else 2


def disk_advice(folder: Path) -> str:
    """What to do where there is too little disk, in words."""
    return f"Free some disk under {folder}, or set COURSE_CACHE (converted models) and HF_HOME (hub downloads) to a larger disk."


def choices() -> str:
    """What `find` takes, in words."""
    return f'Use model="auto", model="{OFFLINE}", model="{QWEN}", a hub id, or a folder with config.json and *.safetensors.'


def this_device() -> str:
    """Return "cuda" where torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu_bytes() -> int:
    """Bytes of the first GPU's memory, in use or not; 0 without a GPU."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


@contextmanager
def building(target: Path | str, intact: Callable[[Path], bool] = Path.is_dir) -> Iterator[Path | None]:
    """Yield a scratch folder that becomes `target` when the block ends well; one process at a time, nothing half-written.

    Yields None when `target` is there and `intact(target)`; one that is not is replaced. That is asked first without the lock, so
    that a complete folder can be read where nothing may be written, and again with it: another process may have been faster.
    A killed process leaves only a scratch folder, which the next one removes.
    """
    import filelock

    target = Path(target)
    if target.is_dir() and intact(target):
        yield None
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock"):
            if target.is_dir() and intact(target):
                yield None
                return
            with files.replacing(target) as scratch:
                yield scratch
    except OSError as error:
        raise ModelError(
            f"{target} could not be written: {error.strerror or error}. {disk_advice(target.parent)}"
        ) from error
