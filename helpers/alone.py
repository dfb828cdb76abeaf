"""The machine to oneself for a measurement, while `python -m helpers run --jobs 2` executes another notebook beside this one."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import psutil

from helpers import cores

RUNNER = "COURSE_RUNNER"  # process id of the runner, in the environment of notebooks that run side by side


@contextmanager
def alone():
    """Stop the notebooks beside this one and compute with all cores meanwhile; nothing happens where none runs beside it.

    One notebook at a time gets here, the others wait. The stopped processes go on afterwards, also after an error; if this process
    is killed meanwhile, the runner wakes them.
    """
    runner = os.environ.get(RUNNER)
    if not runner:
        yield
        return
    import filelock
    import torch

    threads = torch.get_num_threads()
    with filelock.FileLock(Path(tempfile.gettempdir()) / f"quantization-course-{runner}.lock"):
        others = neighbours(int(runner))
        _tell(others, "suspend")
        torch.set_num_threads(cores())
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            _tell(others, "resume")


def neighbours(runner):
    """The runner's descendants but for the branch of this process."""
    branch = psutil.Process()
    while branch.ppid() != runner:
        branch = branch.parent()
        if branch is None:
            return []
    mine = {branch, *branch.children(recursive=True)}
    return [process for process in psutil.Process(runner).children(recursive=True) if process not in mine]


def wake(runner=None):
    """Let all descendants of the runner (default: this process) go on."""
    _tell(psutil.Process(runner).children(recursive=True), "resume")


def _tell(processes, what):
    for process in processes:
        try:
            getattr(process, what)()
        except psutil.NoSuchProcess:
            pass  # ended by itself
