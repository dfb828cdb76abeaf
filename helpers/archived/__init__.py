"""Repairs for two archived packages that every tutorial still uses, opt-in and undoable: `archived.enable("auto-gptq")`."""

from helpers.archived.repair import VERSIONS, ArchivedError, Repair, check_version, enable

__all__ = ["VERSIONS", "ArchivedError", "Repair", "check_version", "enable"]
