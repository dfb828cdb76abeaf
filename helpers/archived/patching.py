"""Replace attributes of a module or class for a while, and put back what was there."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_MISSING = object()
Undo = Callable[[], object]  # puts back what a patch has replaced


def patch(assumed: str, now: str) -> Callable:
    """Mark a function as a patch: what upstream assumed, and what is true now. It returns what undoes it, or None if it is not needed."""

    def mark(function):
        function.assumed, function.now = assumed, now
        return function

    return mark


class View:
    """A module or class seen through a few replaced attributes, by one importer alone: the thing itself stays as it is."""

    def __init__(self, of: Any, **replaced: Any):
        self.__dict__.update(replaced, _of=of)

    def __getattr__(self, name):
        return getattr(self._of, name)


def get(module: str, name: str | None = None) -> Any:
    """A module, imported, or what it calls `name`."""
    found = importlib.import_module(module)
    return found if name is None else getattr(found, name)


def provide(module: str, **values: Any) -> Undo | None:
    """As `replace`, for those names only that the module does not have; None if it has them all."""
    values = {name: value for name, value in values.items() if not hasattr(get(module), name)}
    return replace(get(module), **values) if values else None


def replace(owner: Any, **values: Any) -> Undo:
    """Set attributes of a module or class; the function that puts back what was there."""
    before = {name: vars(owner).get(name, _MISSING) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)

    def undo():
        for name, value in before.items():
            delattr(owner, name) if value is _MISSING else setattr(owner, name, value)

    return undo


def together(*undos: Undo) -> Undo:
    """One function that undoes all these, the last one first."""
    return lambda: [undo() for undo in reversed(undos)]


@contextlib.contextmanager
def state_dict(module: Any, change: Callable[[dict], Iterable]) -> Iterator[None]:
    """While it lasts, module.state_dict() gives `dict(change(tensors))`."""
    upstream = module.state_dict
    module.state_dict = lambda: dict(change(upstream()))
    try:
        yield
    finally:
        del module.state_dict


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines below errors, also where a module sets its own filters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True):
            yield
    finally:
        logging.disable(before)
