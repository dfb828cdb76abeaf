"""Is a model folder complete, undamaged, and free of code: what is checked before anything is loaded."""

import hashlib
import json
import re
from pathlib import Path

from helpers.models.base import Damaged, ModelError, choices

PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
DIGESTS = "sha256.json"  # in a folder made here: the SHA-256 of each of its weight files
HASHED = 1e9  # bytes; larger files of the hub's cache are not read once more to compare their SHA-256


def check_folder(folder: Path | str) -> None:
    """Raise ModelError unless `folder` holds a complete safetensors checkpoint that needs no remote code.

    The length of each weight file is compared with what its header promises, which catches a truncated download without
    reading the weights. Where their SHA-256 is known (a folder made here, or a file under 1 GB in the hub's cache, which is named
    by it) it is compared too: one flipped bit loads without an error and answers with something else. Raises Damaged for both.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a model folder. {choices()}")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config} is not valid JSON ({error}). Download the model again.") from error
    if "auto_map" in settings:
        raise ModelError(
            f"{folder} asks to run its own Python code (auto_map in config.json); this course never does. {choices()}"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weights = sorted(
            {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    else:
        weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{folder} has its weights only as pickles ({', '.join(pickled[:3])}), and loading a pickle can run any code. "
                "Use a safetensors copy of the model (most hub models have one)."
            )
        raise ModelError(f"{folder} has a config but no *.safetensors, so there are no weights to load. {choices()}")
    for path in weights:
        if not path.is_file():
            raise ModelError(f"{path.name} is missing from {folder}. Download the model again.")
        _check_length(path)
    _check_digests(folder, weights)


def _check_length(path):
    size = path.stat().st_size
    damaged = Damaged(path)
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise damaged
        try:
            header = json.loads(file.read(header_size))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged from None
    if size != 8 + header_size + end:
        raise damaged


def _check_digests(folder, weights):
    try:
        known = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = {}
    except ValueError:
        raise Damaged(folder / DIGESTS) from None
    for path in weights:
        digest = known.get(path.name) if isinstance(known, dict) else None
        if (
            digest is None
            and path.is_symlink()
            and path.stat().st_size < HASHED
            and re.fullmatch(r"[0-9a-f]{64}", path.resolve().name)
        ):
            digest = path.resolve().name
        if digest is not None and sha256(path) != digest:
            raise Damaged(path)


def is_model(folder: Path | str) -> bool:
    """True if `check_folder` has nothing against this folder."""
    try:
        check_folder(folder)
    except ModelError:
        return False
    return True


def write_digests(folder: Path | str) -> None:
    """Store the SHA-256 of each weight file beside them, for `check_folder`."""
    digests = {path.name: sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    (Path(folder) / DIGESTS).write_text(json.dumps(digests, indent=1), encoding="utf-8")


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
