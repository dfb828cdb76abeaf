"""What a reader has solved: exercises and quiz questions, in one small file in the reader's folder, shown in notebook 00."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import files
from helpers.process import headless

if TYPE_CHECKING:
    from pandas import DataFrame

FILE = ".course_progress.json"
KINDS = ("exercises", "quiz")


class ProgressError(ValueError):
    """The progress file is not what this module wrote; the message names it and the remedy."""


def path() -> Path:
    """The progress file: in the course's folder, or without one in the folder the reader works in."""
    return files.folder(".") / FILE


def read() -> dict[str, dict[str, list]]:
    """{notebook: {"exercises": [function names], "quiz": [question numbers from 0]}} of what was solved; {} at the beginning."""
    if not path().is_file():
        return {}
    try:
        done = json.loads(path().read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProgressError(f"{FILE} is not valid JSON ({error}); delete it to start again") from error
    whole = isinstance(done, dict) and all(
        isinstance(entry, dict)
        and set(entry) <= set(KINDS)
        and all(isinstance(items, list) for items in entry.values())
        for entry in done.values()
    )
    if not whole:
        raise ProgressError(f"{FILE} does not hold a reader's progress; delete it to start again")
    return done


def add(notebook: str, kind: str, items: list) -> None:
    """Remember solved items ("exercises" or "quiz") of a notebook. Nothing is kept in batch, where nobody solved anything.

    A check cell must not fail because its result cannot be kept: then this prints one line and returns.
    """
    import filelock

    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, not {kind!r}")
    if headless() or not items:
        return
    try:
        with filelock.FileLock(path().with_suffix(".lock"), timeout=10):
            done = read()
            known = done.setdefault(notebook, {}).setdefault(kind, [])
            fresh = sorted(set(items) - set(known))
            if fresh:
                known += fresh
                files.write_text(path(), json.dumps(done, indent=1, sort_keys=True) + "\n")
    except (ProgressError, OSError) as error:
        print(f"Progress is not kept: {error}")


def add_exercise(test_source: str) -> None:
    """Remember a solved exercise: the one whose check cell has this test. A test that is in none (the reader's own) is not kept."""
    for notebook, checks in exercises().items() if test_source.strip() else ():
        add(notebook, "exercises", [name for name, cell in checks.items() if test_source.strip() in cell])


def exercises() -> dict[str, dict[str, str]]:
    """{notebook: {function name: source of its check cell}} of the course."""
    found = {}
    for file in files.notebooks():
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        found[file.stem] = {
            name: source for source in sources for name in re.findall(r"^exercises\.check\((\w+),", source, re.M)
        }
    return found


def questions() -> dict[str, list[dict]]:
    """{notebook: [{"question", "choices": [{"text", "right", "why"}, ...]}, ...]} of the course."""
    return json.loads((files.NOTEBOOKS / "data" / "quiz.json").read_text(encoding="utf-8"))


def table() -> DataFrame:
    """A pandas DataFrame of all notebooks: exercises and quiz questions solved, of how many."""
    import pandas as pd

    done, asked, rows = read(), questions(), {}
    for notebook, names in exercises().items():
        entry = done.get(notebook, {})
        right = sum(1 for number in entry.get("quiz", []) if number in range(len(asked.get(notebook, []))))
        rows[notebook] = {
            "exercises": f"{len(set(names) & set(entry.get('exercises', [])))} of {len(names)}",
            "quiz": f"{right} of {len(asked.get(notebook, []))}",
        }
    return pd.DataFrame(rows).T.rename_axis("notebook")
