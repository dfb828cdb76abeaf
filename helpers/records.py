"""One JSON record per method, always with the same fields, so that notebook 11 can lay them side by side."""

from __future__ import annotations

import json
import math
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import files, redact
from helpers.process import cores

if TYPE_CHECKING:
    import torch

    from helpers import evaluation, models

NUMBERS = (
    "bits_per_weight",
    "weight_bytes",
    "peak_memory_bytes",
    "perplexity",
    "kl_divergence",
    "kl_low",
    "kl_high",
    "top1_agreement",
    "decode_tokens_per_s",
    "quantize_seconds",
)
QUALITY = ("perplexity", "kl_divergence", "kl_low", "kl_high", "top1_agreement")
IN_DOMAIN = ("text", "tokens", "perplexity", "kl_divergence", "top1_agreement")
PROTOCOL = ("eval_tokens", "eval_context", "eval_text")
FIELDS = ("method", "notebook", "model", "device", "versions", *PROTOCOL, *NUMBERS, "in_domain")
PACKAGES = (
    "torch",
    "torchao",
    "transformers",
    "bitsandbytes",
    "peft",
    "gptqmodel",
    "autoawq",
    "auto-gptq",
    "auto-round",
    "compressed-tensors",
    "libgguf",
    "xllamacpp",
)


Record = dict[str, Any]  # FIELDS: texts, numbers or None, versions and in_domain as dicts of their own


class RecordError(ValueError):
    """A record is not what DESIGN's contract allows; the message names the field."""


def write(
    output_dir: Path | str,
    *,
    method: str,
    notebook: str,
    found: models.Found,
    windows: torch.Tensor | None = None,
    eval_text: str = "course",
    scores: evaluation.Scores | None = None,
    in_domain: tuple[torch.Tensor, evaluation.Scores] | None = None,
    **numbers: float | None,
) -> Record:
    """Write `records/<method>.json` under the build folder, atomically, and return the record.

    found      the `models.Found` that was measured
    windows    the evaluation windows [n, context], or None where nothing was evaluated
    scores     `evaluation.Scores` on them, or None
    in_domain  (windows, `evaluation.Scores`) on pydoc, which some methods are calibrated on, or None
    numbers    the other NUMBERS; None where one does not apply. Quality may stand here instead of `scores`, never beside it.

    Raises RecordError for a missing or unknown field, NaN or infinity.
    """
    twice = sorted(numbers.keys() & set(QUALITY))
    if scores and twice:
        raise RecordError(f"{method}: {', '.join(twice)} given beside scores, which hold the same; pass one of the two")
    numbers = {name: getattr(scores, name) if scores else None for name in QUALITY} | numbers
    missing = [name for name in NUMBERS if name not in numbers]
    if missing:
        raise RecordError(f"{method}: {', '.join(missing)} not given; pass None where it does not apply")
    record = {
        "method": method,
        "notebook": notebook,
        "model": f"{found.name} ({found.origin})" if found.origin != "local folder" else found.name,
        "device": device_name(found.device),
        "versions": versions(),
        "eval_tokens": None if windows is None else windows.numel(),
        "eval_context": None if windows is None else windows.shape[1],
        "eval_text": None if windows is None else eval_text,
        **{name: _plain(value) for name, value in numbers.items()},
        "in_domain": None if in_domain is None else _in_domain(*in_domain),
    }
    record = redact.inside(record)
    check(record)
    target = files.folder(output_dir) / "records" / f"{method}.json"
    files.write_text(target, json.dumps(record, indent=2, allow_nan=False) + "\n")
    return record


def _in_domain(windows, scores):
    return {
        "text": "pydoc",
        "tokens": windows.numel(),
        **{name: _plain(getattr(scores, name)) for name in IN_DOMAIN[2:]},
    }


def read(output_dir: Path | str = "build") -> dict[str, Record]:
    """All records under a build folder, as {method: record}; each is checked. A broken file raises RecordError with its name."""
    found = {}
    for path in sorted((files.folder(output_dir) / "records").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(
                f"{path.name} is not valid JSON ({error}); delete it and run its notebook again"
            ) from error
        check(record)
        found[record["method"]] = record
    return found


def check(record: Any) -> None:
    """Raise RecordError unless `record` has exactly the fields of the contract with values in range."""
    if not isinstance(record, dict):
        raise RecordError(f"a record is a JSON object, not {type(record).__name__}")
    unknown, missing = sorted(record.keys() - set(FIELDS)), sorted(set(FIELDS) - record.keys())
    if unknown or missing:
        raise RecordError(
            f"{record.get('method')}: "
            + "; ".join(
                f"{word} fields: {', '.join(names)}"
                for word, names in (("unknown", unknown), ("missing", missing))
                if names
            )
        )
    if not isinstance(record["method"], str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", record["method"]):
        raise RecordError(
            f"method must be lower-case letters, digits, dots, hyphens and underscores, not {record['method']!r}"
        )
    for name in ("notebook", "model", "device"):
        if not isinstance(record[name], str) or not record[name]:
            raise RecordError(f"{record['method']}: {name} must be a non-empty text")
    if not isinstance(record["versions"], dict):
        raise RecordError(f"{record['method']}: versions must map package names to versions")
    for name in (*NUMBERS, "eval_tokens", "eval_context"):
        value = record[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RecordError(f"{record['method']}: {name} must be a number or null, not {value!r}")
        if not math.isfinite(value):
            raise RecordError(f"{record['method']}: {name} is {value}; a measurement that failed is not a record")
        if value < 0 and not (
            name in ("kl_divergence", "kl_low", "kl_high") and value > -1e-4
        ):  # rounding noise around zero
            raise RecordError(f"{record['method']}: {name} is negative ({value})")
    second = record["in_domain"]
    if second is not None and (not isinstance(second, dict) or set(second) != set(IN_DOMAIN)):
        raise RecordError(f"{record['method']}: in_domain must hold {', '.join(IN_DOMAIN)}, not {second!r}")
    bits = record["bits_per_weight"]
    if bits is not None and not 0.5 < bits < 100:
        raise RecordError(
            f"{record['method']}: bits_per_weight is {bits:.2g}, which no format has; run {record['notebook']} again"
        )
    if record["top1_agreement"] is not None and record["top1_agreement"] > 1:
        raise RecordError(f"{record['method']}: top1_agreement is a share, at most 1, not {record['top1_agreement']}")


def versions() -> dict[str, str]:
    """{"python": ..., package: version} of what is installed here."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def device_name(device: str) -> str:
    """Name of the GPU, or the number of CPU cores in use and the machine's architecture."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name(0)
    import platform

    return f"{cores()} CPU cores, {platform.machine()}"


def _plain(value):
    """A Python number from a torch or numpy scalar."""
    return value.item() if hasattr(value, "item") else value
