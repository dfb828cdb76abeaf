"""Checkpoint folders that carry their name only when they are complete, and that nobody can load wrongly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def folder(output_dir: Path | str, method: str) -> Path:
    """Where the checkpoint of a method lives: `<output_dir>/checkpoints/<method>`; it need not exist."""
    return files.folder(output_dir) / "checkpoints" / method


@contextmanager
def writing(output_dir: Path | str, method: str) -> Iterator[Path]:
    """Yield an empty scratch folder that takes the checkpoint's place when the block ends well.

    A block that raises leaves the old checkpoint as it was. A killed process leaves a hidden scratch folder, never a folder
    under the checkpoint's name, and the next writer removes it. Two writers at once wait for each other.
    """
    import filelock

    target = folder(output_dir, method)
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f".{method}.lock"), files.replacing(target) as scratch:
        yield scratch


def save_own_format(
    folder: Path | str,
    tensors: dict[str, torch.Tensor],
    config: PreTrainedConfig,
    loader: str,
    metadata: dict[str, str] | None = None,
) -> int:
    """Save tensors in a format that transformers does not know, so that `from_pretrained` raises; bytes of the file.

    Where config.json names a known model and the tensors have other names, transformers warns and returns random weights. So the
    model's own config becomes base_config.json, the tensors quantized.safetensors, and config.json holds only a model type that says
    what loads them: `loader`, such as "load_eager() in notebook 02_qat_fake_quant.ipynb". AutoModel raises ValueError with these
    words; a concrete model class raises OSError, as it finds no model.safetensors.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    save_file(tensors, folder / "quantized.safetensors", metadata=metadata)
    config.to_json_file(folder / "base_config.json", use_diff=True)
    words = {"model_type": f"quantized in a format of its own: load it with {loader}"}
    (folder / "config.json").write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
    return (folder / "quantized.safetensors").stat().st_size
