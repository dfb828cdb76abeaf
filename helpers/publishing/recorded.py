"""Claims that follow from records or from the GPU reference: plain arithmetic, by the claim's id.

Each function gives a value, (value, low, high) or a dict with a text; a method or number that was not measured skips the claim.
"""

from collections.abc import Iterable
from typing import Any

from helpers.publishing import reference
from helpers.records import Record


class _Missing(Exception):
    """A record, or a number of it, is not there."""


class _Group:
    """The records of one model on one device: `group(method, field)`."""

    def __init__(self, records):
        self.records = records

    def __call__(self, method, name):
        value = self.records.get(method, {}).get(name)
        if value is None:
            raise _Missing
        return value

    def kl(self, method):
        return tuple(self(method, name) for name in ("kl_divergence", "kl_low", "kl_high"))

    def ratio(self, name, method, base):
        return self(method, name) / self(base, name)

    def on_cpu(self, method):
        """1 where a method's record is of a CPU."""
        if not reference.on_cpu(self(method, "device")):
            raise _Missing  # a GPU's record says nothing about CPUs
        return 1


FROM_RECORDS = {
    "ptq-fast": lambda group: group.ratio("quantize_seconds", "int8-dynamic", "qat-int4"),
    "ptq-minimal-loss": lambda group: group.kl("int8-dynamic"),
    "int8-size": lambda group: group("int8-dynamic", "bits_per_weight"),
    "int8-faster": lambda group: group.ratio("decode_tokens_per_s", "int8-dynamic", "fp32"),
    "gptq-75": lambda group: 1 - group.ratio("weight_bytes", "gptq", "bf16"),
    "gptq-quality": lambda group: group.kl("gptq"),
    "gptq-minutes": lambda group: group("gptq", "quantize_seconds") / 60,
    "nf4-75": lambda group: 1 - group.ratio("weight_bytes", "nf4", "bf16"),
    "nf4-eighth": lambda group: group.ratio("weight_bytes", "nf4", "fp32"),
    "nf4-quality": lambda group: group.kl("nf4"),
    "nf4-gpu-only": lambda group: group.on_cpu("nf4"),
    "nf4-2-3x": lambda group: group.ratio("decode_tokens_per_s", "nf4", "bf16"),
    "awq-memory": lambda group: group.ratio("weight_bytes", "awq", "bf16"),
    "awq-quality": lambda group: group.kl("awq"),
    "awq-minutes": lambda group: group("autoawq", "quantize_seconds") / 60,
}

NF4 = "nf4, double quantization"
FROM_GPU = {
    "ptq-24gb": lambda gpu: max(gpu["memory"]["fp16"]["loading_peak_bytes"], gpu["gptq"]["peak_bytes"]) / 1e9,
    "gptq-needs-8gb": lambda gpu: _used(gpu, gpu["gptq"]["peak_bytes"]) / 1e9,
    "gptq-minutes": lambda gpu: gpu["gptq"]["seconds"] / 60,
    "gptq-gpu-speed": lambda gpu: _lean(gpu, "marlin") / _lean(gpu, "fp16"),
    "7b-fp16-14": lambda gpu: gpu["memory"]["fp16"]["weight_bytes"] / 1e9,
    "7b-int8-7": lambda gpu: gpu["memory"]["int8"]["weight_bytes"] / 1e9,
    "7b-nf4-3.5": lambda gpu: gpu["memory"][NF4]["weight_bytes"] / 1e9,
    "7b-4bit-range": lambda gpu: gpu["memory"][NF4]["weight_bytes"] / 1e9,
    "nf4-75": lambda gpu: 1 - gpu["memory"][NF4]["weight_bytes"] / gpu["memory"]["fp16"]["weight_bytes"],
    "nf4-2-3x": lambda gpu: _in_a_lean_loop(_lean(gpu, "nf4") / _lean(gpu, "fp16")),
    "qlora-2gb": lambda gpu: gpu["qlora"]["512"]["peak_bytes"] / 1e9,
    "awq-minutes": lambda gpu: gpu["autoawq"]["seconds"] / 60,
    "awq-from-quantized": lambda gpu: int(gpu["autoawq"]["tokens_per_s"] > 0),
    "colab-unquantized": lambda gpu: gpu["memory"]["fp16"]["weight_bytes"] / 2**30,
    "colab-size": lambda gpu: gpu["memory"][NF4]["weight_bytes"] / 2**30,
    "colab-loading-peak": lambda gpu: _used(gpu, gpu["memory"][NF4]["loading_peak_bytes"]) / 2**30,
    "colab-inference": lambda gpu: _used(gpu, gpu["memory"][NF4]["answering_peak_bytes"]) / 2**30,
}


def from_records(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Arguments of `claims.Finding` for whatever these records can say, never mixing two models or devices."""
    groups = {}
    for record in records:
        groups.setdefault((record["model"], record["device"]), {})[record["method"]] = record
    rows = []
    for (model, device), group in groups.items():
        versions = next(iter(group.values()))["versions"]
        for claim, function in FROM_RECORDS.items():
            try:
                value = function(_Group(group))
            except _Missing:
                continue
            rows.append(
                {**_row(claim, value), "model": model, "device": device, "versions": versions, "notebook": "records"}
            )
    return rows


def from_gpu(gpu: dict[str, Any]) -> list[dict[str, Any]]:
    """The same for the GPU reference, as `reference.gpu()` gives it."""
    rows = []
    for claim, function in FROM_GPU.items():
        try:
            value = function(gpu)
        except KeyError:
            continue
        device = gpu["autoawq"]["device"] if claim.startswith("awq-") else gpu["device"]
        rows.append(
            {
                **_row(claim, value),
                "model": gpu["model"],
                "device": device,
                "versions": gpu["versions"],
                "notebook": "GPU reference",
            }
        )
    return rows


def _row(claim, value):
    if isinstance(value, dict):
        return {"claim": claim, **value}
    return {"claim": claim, **dict(zip(("value", "low", "high"), value if isinstance(value, tuple) else (value,)))}


def _in_a_lean_loop(ratio):
    return {"value": ratio, "text": f"NF4 decodes {ratio:.2f} times as fast as fp16, both in a lean loop"}


def _lean(gpu, way):
    """Decoded tokens per second at batch 1 in the lean loop."""
    return gpu[f"decode_{way}"]["lean"]["1"]["tokens_per_s"]


def _used(gpu, allocated):
    """Allocated bytes and those of the CUDA context, which torch does not count."""
    return allocated + gpu["bandwidth"]["context_bytes"]
