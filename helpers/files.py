"""Where files go and how they are written: either whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COURSE = Path(__file__).resolve().parent.parent
NOTEBOOKS = COURSE / "notebooks"


def notebooks() -> list[Path]:
    """The course's notebooks in reading order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def folder(output_dir: Path | str = "build") -> Path:
    """The build folder, made if needed: absolute paths as they are, others under the course's checkout, or here without one.

    A notebook's working directory is wherever its kernel was started, so "build" must not depend on it inside a checkout.
    """
    path = Path(output_dir).expanduser()
    if not path.is_absolute():
        inside = NOTEBOOKS.is_dir() and Path.cwd().resolve().is_relative_to(COURSE)
        path = (COURSE if inside else Path.cwd()) / path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = "choose another with output_dir= or --output"
        raise type(error)(
            error.errno, f"the output folder cannot be made ({error.strerror}); {advice}", str(path)
        ) from error
    return path


def write_text(target: Path | str, content: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half of it."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except BaseException:
        os.unlink(scratch)
        raise


def size(folder: Path | str) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    folder = Path(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that takes the place of `target` when the block ends well; one that raises leaves `target` as it was.

    The caller holds a lock, or two writers would clear each other's scratch.
    """
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
