"""Measured results that come with the course, so that a reader's own run can be laid beside them: one file per device and model."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import files, records
from helpers.publishing import pages
from helpers.records import Record

FOLDER = pages.FOLDER / "data" / "reference"


@dataclass(frozen=True)
class Reference:
    """Records of one model on one device: {method: record}; `date` is the day they were collected."""

    device: str
    model: str
    date: str
    records: dict[str, Record]

    @property
    def on_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return on_cpu(self.device)


def on_cpu(device: str) -> bool:
    """True for the device names that `records.device_name` gives a CPU."""
    return "CPU" in device


def read(folder: Path | None = None) -> list[Reference]:
    """All references in a folder (default: the course's), CPUs first, then by their number of records, the most first.

    A broken file raises RecordError with its name.
    """
    found = []
    for path in sorted((folder or FOLDER).glob("*.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            reference = Reference(**facts)
        except (ValueError, TypeError) as error:
            raise records.RecordError(f"{path.name} is not a reference file ({error})") from error
        for method, record in reference.records.items():
            records.check(record)
            if (record["method"], record["device"], record["model"]) != (method, reference.device, reference.model):
                raise records.RecordError(
                    f"{path.name}: the record under {method} is of another method, device or model"
                )
        found.append(reference)
    return sorted(found, key=lambda reference: (not reference.on_cpu, -len(reference.records)))


def write(output_dir: Path | str = "build", folder: Path | None = None) -> list[Path]:
    """Store the records of a build folder as references and return the files: one for each device and model in it.

    Methods that this build does not hold stay as they are. Raises RecordError if there is no record, or if a quality in a record
    was not measured under the protocol of the others.
    """
    folder = folder or FOLDER
    groups = {}
    for record in records.read(output_dir).values():
        groups.setdefault((record["device"], record["model"]), {})[record["method"]] = record
    if not groups:
        raise records.RecordError(f"no records in {files.folder(output_dir).name}/records: run the notebooks first")
    known = {(reference.device, reference.model): reference.records for reference in read(folder)}
    paths = []
    for (device, model), fresh in groups.items():
        together = dict(sorted({**known.get((device, model), {}), **fresh}.items()))
        protocols = {
            tuple(record[name] for name in records.PROTOCOL) for record in together.values() if record["eval_tokens"]
        }
        if len(protocols) > 1:
            raise records.RecordError(
                f"{device}: records of {len(protocols)} evaluation protocols cannot stand side by side: {sorted(protocols)}"
            )
        facts = {"device": device, "model": model, "date": time.strftime("%Y-%m-%d"), "records": together}
        path = folder / f"{file_name(device, model)}.json"
        files.write_text(path, json.dumps(facts, indent=1, allow_nan=False) + "\n")
        paths.append(path)
    return paths


def gpu(path: Path | None = None) -> dict[str, Any] | None:
    """The course's measurements on a GPU with a model in Mistral-7B's shape (notebooks/gpu/reference.json), or None without them.

    Raises RecordError for a broken file.
    """
    path = path or pages.FOLDER / "gpu" / "reference.json"
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise records.RecordError(f"{path.name} of the GPU is not valid JSON ({error})") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("device"), str):
        raise records.RecordError(f"{path.name} of the GPU does not name its device")
    return facts


def gpu_rows(facts: dict[str, Any]) -> list[list[str | float | None]]:
    """[what, weights in GB, peak in GB, tokens a second at batch 1] of what `gpu()` holds; None where it was not measured."""
    rows: list[list[str | float | None]] = []
    for name, row in facts.get("memory", {}).items():
        rows.append(
            [f"{name}: load and answer", _giga(row.get("weight_bytes")), _giga(row.get("answering_peak_bytes")), None]
        )
    for tokens, row in facts.get("qlora", {}).items():
        if isinstance(row, dict):
            rows.append([f"QLoRA step of {tokens} tokens", None, _giga(row.get("peak_bytes")), None])
    for step, row in facts.items():
        if step.startswith("decode_"):
            for variant, found in row.items():
                if isinstance(found, dict) and "tokens_per_s" in found.get("1", {}):
                    rows.append(
                        [
                            f"{step.removeprefix('decode_')}: decode, {variant}",
                            _giga(row.get("bytes")),
                            None,
                            found["1"]["tokens_per_s"],
                        ]
                    )
    return rows


def _giga(value):
    return None if value is None else value / 1e9


def costs(output_dir: Path | str = "build") -> list[str]:
    """Put what a build's notebooks cost on a GPU into their cost cards; the names of those notebooks.

    A CPU's costs are stored by `run --in-place`, each from an empty cache; a GPU's are those that `runs.json` of the build holds.
    """
    build = files.folder(output_dir)
    if not (build / "runs.json").is_file():
        return []
    runs = json.loads((build / "runs.json").read_text(encoding="utf-8"))
    places = {(record["device"], record["model"].split()[0]) for record in records.read(build).values()}
    if len(places) != 1 or on_cpu(next(iter(places))[0]):
        return []
    ((device, model),) = places
    name = "gpu_7b" if "7b" in model.lower() else "gpu"
    told = []
    for result in runs["results"]:
        if result["verdict"] != "ok":
            continue
        path = pages.FOLDER / f"{result['notebook']}.ipynb"
        cost = {
            "machine": f"{device}, {model}",
            "seconds": round(result["seconds"]),
            "peak_ram_bytes": result["peak_ram_bytes"],
            "peak_vram_bytes": result["peak_vram_bytes"],
            "date": runs["date"],
        }
        _put_cost(path, name, cost)
        told.append(path.stem)
    pages.refresh_all()
    return told


def colab_costs(output_dir: Path | str = "build") -> list[str]:
    """Put what the first cell costs on Colab into the cost cards; the names of those notebooks.

    The weekly test of Colab's environment measures it: `colab.json` of the build, {notebook: {"first_s", "bytes", …}}.
    """
    file = files.folder(output_dir) / "colab.json"
    if not file.is_file():
        return []
    measured = json.loads(file.read_text(encoding="utf-8"))
    for name, cost in measured.items():
        _put_cost(pages.FOLDER / f"{name}.ipynb", "colab", cost)
    pages.refresh_all()
    return list(measured)


def _put_cost(path, name, cost):
    import nbformat  # takes a second, and only this writes notebooks

    notebook = pages.read(path)
    notebook.metadata.setdefault("course", {}).setdefault("cost", {})[name] = cost
    nbformat.write(notebook, path)


def file_name(device: str, model: str) -> str:
    """Name, without its ending, of what comes with the course for one device and model."""
    return "--".join(re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") for text in (device, model.split()[0]))
