"""Papermill's engine of the course: what is written has no secrets in it and is whole, and the kernel gets an environment of its own."""

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.log import logger

from helpers import files, redact

NAME = "quantization-course"


class Output:
    """The notebook on disk: without secrets, either whole or not at all, written at most every EVERY seconds.

    path  where it goes
    """

    EVERY = 2.0  # papermill hands over a notebook of 100 cells 200 times, and each write takes up to 0.1 s

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.notebook: NotebookNode | None = None
        self._waiting: str | None = None
        self._due, self._lock = 0.0, threading.Lock()

    def save(self, notebook: NotebookNode) -> None:
        """Write the notebook now, or soon if it was written a moment ago."""
        self.notebook = notebook
        text = json.dumps(notebook, ensure_ascii=False)
        with self._lock:
            late, self._waiting = self._waiting is not None, text
        pause = self._due - time.monotonic()
        if pause <= 0:
            self.flush()
        elif not late:  # write soon: a kill in a long next cell must not lose this one
            timer = threading.Timer(pause, self._flush_later)
            timer.daemon = True
            timer.start()

    def close(self) -> None:
        """Write the notebook as it stands: papermill has put its own words into one that failed."""
        if self.notebook is not None:
            self.save(self.notebook)
            self.flush()

    def flush(self) -> None:
        """Write what waits, if anything does."""
        with self._lock:
            if self._waiting is None:
                return
            notebook = redact.notebook(json.loads(self._waiting))
            notebook["metadata"]["papermill"]["output_path"] = str(self.path)
            files.write_text(self.path, json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n")
            self._waiting = None  # after the write: what could not be written keeps waiting
            self._due = time.monotonic() + self.EVERY

    def _flush_later(self):
        with suppress(OSError):  # a full disk, say: the text keeps waiting, and the end of the run reports it
            self.flush()


class _Manager(NotebookExecutionManager):
    """Papermill's record of a run, which hands the notebook to an `Output` in place of papermill's own writer."""

    def __init__(self, notebook, output):
        super().__init__(notebook, progress_bar=False)
        self.output = output

    def save(self, **kwargs):
        self.nb = kwargs.get("nb") or self.nb
        self.output.save(self.nb)
        self.last_save_time = self.now()


class Engine(NBClientEngine):
    """Runs a notebook as papermill's own engine does.

    output  the `Output` that gets the notebook before and after every cell
    env     environment of the kernel
    """

    @classmethod
    def execute_notebook(
        cls, nb: NotebookNode, kernel_name: str, output: Output, env: dict[str, str], **kwargs: Any
    ) -> NotebookNode:
        """Execute a notebook and return it. kwargs: what papermill hands to every engine."""
        manager = _Manager(nb, output)
        manager.notebook_start()
        try:
            options = {
                "timeout": kwargs["execution_timeout"],
                "startup_timeout": kwargs["start_timeout"],
                "config": kwargs["config"],
            }
            PapermillNotebookClient(manager, kernel_name=kernel_name, log=logger, **options).execute(env=env)
        finally:
            manager.notebook_complete()
        return manager.nb


papermill_engines.register(NAME, Engine)
