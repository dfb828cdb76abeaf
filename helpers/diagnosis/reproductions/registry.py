"""Failures and repairs by the ids of the catalogue: provoke one, repair it, show its source."""

import contextlib
import inspect
import io
import logging
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from helpers.diagnosis import explain

transformers_logging.get_logger()  # create its handler now: one created inside `quiet` would keep the wrong stream
LIBRARIES = ("transformers", "accelerate", "peft", "bitsandbytes")
Failure = Callable[[], str | None]  # raises, or returns what was printed
Repair = Callable[[], str]
Condition = Callable[[], str | None]  # why a failure cannot happen on this machine, or None
FAILURES: dict[str, Failure] = {}
REPAIRS: dict[str, Repair] = {}
CONDITIONS: dict[str, Condition] = {}


class DidNotHappen(AssertionError):
    """A failure was provoked and did not come: the library has changed, and the catalogue is out of date."""


def fails(entry_id: str, only_if: Condition | None = None) -> Callable[[Failure], Failure]:
    """Register a failure. only_if: a function that gives a reason (text) where it cannot happen on this machine, else None."""

    def register(function):
        FAILURES[entry_id] = function
        if only_if:
            CONDITIONS[entry_id] = only_if
        return function

    return register


def works(entry_id: str) -> Callable[[Repair], Repair]:
    """Register the repair: it must run to its end, and returns what it gave in a few words."""

    def register(function):
        REPAIRS[entry_id] = function
        return function

    return register


def why_not(entry_id: str) -> str | None:
    """Why a failure cannot be provoked on this machine, or None."""
    return CONDITIONS[entry_id]() if entry_id in CONDITIONS else None


def provoke(entry_id: str) -> str:
    """Run a failure; what its reader sees. Raises DidNotHappen if nothing goes wrong."""
    with quiet():
        try:
            said = FAILURES[entry_id]()
        except Exception as error:
            return explain.as_text(error)
    if not said:
        raise DidNotHappen(
            f"{entry_id} neither raised nor printed anything: {sys.version.split()[0]}, torch {torch.__version__}"
        )
    return said


def repair(entry_id: str) -> str:
    """Run a repair; what it gave, in words."""
    with quiet():
        return REPAIRS[entry_id]()


def source(entry_id: str, repaired: bool = False) -> str:
    """The body of a failure or of its repair, as a reader would write it."""
    lines = inspect.getsource((REPAIRS if repaired else FAILURES)[entry_id]).splitlines()
    body = lines[next(n for n, line in enumerate(lines) if line.startswith("def ")) + 1 :]
    return textwrap.dedent("\n".join(body))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, banners, log lines and warnings from the libraries: what a failure says is in its text."""
    handlers = {logging.getLogger(name): logging.getLogger(name).handlers for name in LIBRARIES}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            for logger in handlers:
                logger.handlers = [logging.NullHandler()]
            yield
        finally:
            for logger, before in handlers.items():
                logger.handlers = before


class Heard(list[str]):
    """What libraries said while `listening`: warnings and log records, in the form they have on a screen."""

    def about(self, word: str) -> str:
        """The lines that hold a word, joined; "" where none does."""
        return "\n".join(line for line in self if word in line)


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    """Collect the warnings and log messages of a block: a library that fails without raising often mumbles."""
    transformers_logging.warning_once.cache_clear()  # else it says some things only once per process
    heard = Heard()

    class Ear(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    ear = Ear(logging.WARNING)
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
        heard += [f"{Path(w.filename).name}:{w.lineno}: {w.category.__name__}: {w.message}" for w in caught]
    finally:
        for name in LIBRARIES:
            logging.getLogger(name).removeHandler(ear)
