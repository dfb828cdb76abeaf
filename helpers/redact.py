"""Secrets taken out of text before it is written or printed: notebooks, records, reports, error messages.

Two ways to know one: by its form (keys of the Hugging Face hub, GitHub, PyPI, OpenAI, AWS, web tokens, passwords in addresses), and by
its value: what this process holds in an environment variable named as a secret, and the token that `hf auth login` stored.
"""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECRET = "[secret]"  # noqa: S105 - a pattern, not a secret
FORMS = re.compile(
    r"(?:hf|hf_oauth|hf_jwt|api_org)_[A-Za-z0-9]{10,}"
    r"|\b(?:gh[pousr]_|github_pat_|glpat-|pypi-|sk-)[A-Za-z0-9_-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"
    r"|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
    r"|(?<=[Bb]earer )[\w.~+/=-]{12,}"
)
NAMES = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)$", re.I)
SHORTEST = 8  # characters; a shorter value could be any word


def known() -> list[str]:
    """The secrets of this process by value, the longest first."""
    values = {value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST}
    try:
        from huggingface_hub import constants

        values.add(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip())
    except (ImportError, OSError, ValueError):  # not installed, not logged in, or not a token
        pass
    return sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)


def redact(text: str, values: Sequence[str] | None = None) -> str:
    """`text` with every secret in it replaced by "[secret]". values: as `known()` gave them, where many texts follow each other."""
    return _redacted(text, tuple(known() if values is None else values))


@functools.lru_cache(
    maxsize=2**15
)  # a notebook is written after each of its cells, and most of its lines are those of before
def _redacted(text, values):
    for value in values:
        text = text.replace(value, SECRET)
    return FORMS.sub(SECRET, text)


def inside(value: Any, values: Sequence[str] | None = None) -> Any:
    """A JSON value (text, list, dict, number) with the secrets in all its texts replaced; keys stay as they are."""
    values = known() if values is None else values
    if isinstance(value, str):
        return redact(value, values)
    if isinstance(value, list):
        return [inside(item, values) for item in value]
    if isinstance(value, dict):
        return {key: inside(item, values) for key, item in value.items()}
    return value


def notebook(content: Any) -> Any:
    """A notebook as nbformat's JSON object, in place, without secrets in its sources, outputs and papermill metadata."""
    values = known()
    for cell in content["cells"]:
        cell["source"] = inside(cell["source"], values)
        for output in cell.get("outputs", []):
            for field in ("text", "data", "ename", "evalue", "traceback"):
                if field in output:
                    output[field] = inside(output[field], values)
    for holder in (content, *content["cells"]):
        for field in ("papermill", "widgets"):
            if field in holder.get("metadata", {}):
                holder["metadata"][field] = inside(holder["metadata"][field], values)
    return content
