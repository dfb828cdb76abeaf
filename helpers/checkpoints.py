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
    with filelock.FileLock(target.parent / f".{method}.lock"):
        for leftover in target.parent.glob(f".{method}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # we hold the lock: whoever made it is dead
        scratch = Path(tempfile.mkdtemp(prefix=f".{method}.tmp-", dir=target.parent))
        try:
            yield scratch
            scratch.chmod(0o755)
            if target.exists():
                target.rename(scratch.with_name(scratch.name + "-old"))
            scratch.rename(target)
        finally:
            for leftover in target.parent.glob(f".{method}.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
