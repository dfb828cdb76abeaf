"""Checkpoint folders that carry their name only when they are complete."""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from helpers import records


def folder(output_dir, method):
    """Where the checkpoint of a method lives: `<output_dir>/checkpoints/<method>`; it need not exist."""
    return records.folder(output_dir) / "checkpoints" / method


@contextmanager
def writing(output_dir, method):
    """Yield an empty scratch folder that takes the checkpoint's place when the block ends well.

    A block that raises leaves the old checkpoint as it was. A killed process leaves a hidden scratch folder, never a folder
    under the checkpoint's name, and the next writer removes it. Two writers at once wait for each other.
    """
    import filelock

    target = folder(output_dir, method)
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f".{method}.lock"), replacing(target) as scratch:
        yield scratch


@contextmanager
def replacing(target):
    """As `writing`, for any folder and without its lock: the caller holds one, or two writers would clear each other's scratch."""
    leftovers = f".{target.name}.tmp-"
    _remove(target.parent, leftovers)  # whoever made them is dead
    scratch = Path(tempfile.mkdtemp(prefix=leftovers, dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if target.exists():
            target.rename(scratch.with_name(scratch.name + "-old"))
        scratch.rename(target)
    finally:
        _remove(target.parent, leftovers)


def _remove(parent, prefix):
    for path in parent.glob(f"{prefix}*"):
        shutil.rmtree(path, ignore_errors=True)
