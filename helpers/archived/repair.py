"""Repairs for two archived packages that every tutorial still uses: auto-gptq 0.7.1 and autoawq 0.2.9.

    repair = archived.enable("auto-gptq")
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
    repair.applied   # what was changed, and why
    repair.undo()    # everything is upstream's again (or: `with archived.enable(...):`)

Nothing on disk is touched, and nothing happens before `enable` is called. Each patch
(auto_gptq.py, autoawq.py) says what upstream assumed and what is true now.
"""

import contextlib
from importlib import metadata
from typing import Any

from helpers.archived import auto_gptq, autoawq
from helpers.archived.patching import quiet

VERSIONS = {"auto-gptq": "0.7.1", "autoawq": "0.2.9"}
PATCHES = {"auto-gptq": auto_gptq.PATCHES, "autoawq": autoawq.PATCHES}
_active = {}


class ArchivedError(ImportError):
    """The package is not installed, or not in the version that the patches were written for."""


class Repair:
    """The patches in force for one package. applied: list of (name, what upstream assumed, what is true now)."""

    def __init__(self, package: str):
        self.package, self.applied, self._undo = package, [], contextlib.ExitStack()

    def apply(self, patch: Any) -> None:
        """Put one patch (a function marked by `patching.patch`) in force; one that is not needed here leaves no trace."""
        undo = patch()
        if undo is not None:
            self._undo.callback(undo)
            self.applied.append((patch.__name__, patch.assumed, patch.now))

    def undo(self) -> None:
        """Take every patch back, the last one first. Doing it twice changes nothing."""
        if _active.get(self.package) is self:
            del _active[self.package]
        self._undo.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()


def enable(package: str) -> Repair:
    """Import `package` ("auto-gptq" or "autoawq") with its patches in force; the `Repair`, the same one if it is in force already.

    Raises ArchivedError, before anything is changed, for a package that is not installed or has another version.
    """
    if package not in VERSIONS:
        raise ValueError(f"there are repairs for {' and '.join(VERSIONS)}, not for {package!r}")
    if package in _active:
        return _active[package]
    check_version(package)
    repair = Repair(package)
    try:
        with quiet():  # at import, one says that it is archived, the other that it has no CUDA extension
            for patch in PATCHES[package]:
                repair.apply(patch)
    except BaseException:
        repair.undo()
        raise
    _active[package] = repair
    return repair


def check_version(package: str) -> None:
    """Raise ArchivedError unless `package` is installed in the version its patches were written for."""
    wanted = VERSIONS[package]
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ArchivedError(
            f"{package} is not installed. Its repair was written for {wanted}: pip install {package}=={wanted}"
        ) from None
    if version != wanted:
        raise ArchivedError(
            f"{package} {version} is installed, but its repair was written for {wanted}: pip install {package}=={wanted}"
        )
