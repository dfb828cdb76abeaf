"""Can this machine run the course, and what does this error mean? As an IPython extension it defines `%explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Define `%explain` for errors to come."""
    from helpers.diagnosis import explain

    explain.register(shell)
