"""The decision guide: what you have and what you need in, a method out, with its reason in measured numbers and its notebook."""

from __future__ import annotations

import functools
import html
from dataclasses import dataclass
from typing import Any

from helpers import memory, models, widgets
from helpers.process import headless
from helpers.publishing import pareto, reference
from helpers.records import Record

SIZES = ("SmolLM2-135M", "Mistral-7B")
HARDWARE = ("CPU", "NVIDIA GPU")
NEEDS = ("quality", "speed", "small size")
CONTEXT = 4096  # tokens of KV cache that the memory must hold as well
USABLE = 0.5  # nats of KL divergence; a method beyond it is not offered
WORKING_SPACE = 1.1  # activations, buffers

# What `memory.predict` takes for methods whose bytes on another model do not follow from their record (the rest in 32 bits, the head
# quantized too), or whose format is known exactly. The bytes of all other methods follow from their records.
FORMATS = {
    "fp32": {"bits": 32, "rest_bits": 32},
    "bf16": {"bits": 16},
    "int8-dynamic": {"bits": 8, "scale_bits": 32, "rest_bits": 32},
    "int8-dynamic-rescued": {"bits": 8, "scale_bits": 32, "rest_bits": 32},
    "int8-dynamic-torchao": {"bits": 8, "scale_bits": 32, "rest_bits": 32},
    "int8-static": {"bits": 8, "scale_bits": 32, "rest_bits": 32},
    "nf4": {"bits": 4, "group_size": 64, "double_quant": True},
    "gptq": {"bits": 4, "group_size": 64, "scale_bits": 16, "zero_bits": 4},
    "awq": {"bits": 4, "group_size": 64, "scale_bits": 16, "zero_bits": 4},
}
CPU_ONLY = {"int8-dynamic", "int8-dynamic-rescued"}  # torch's own dynamic INT8 has no CUDA kernels
TRAINING_BYTES = 16  # per parameter: weights, gradients and two moments of AdamW in float32


@dataclass(frozen=True)
class Advice:
    """method and notebook are None where nothing fits; reason always says why, in numbers."""

    method: str | None
    notebook: str | None
    reason: str


def choose(
    found: dict[str, Record],
    memory_gb: float,
    hardware: str = "CPU",
    fine_tune: bool = False,
    need: str = "quality",
    size: str = "Mistral-7B",
) -> Advice:
    """`Advice` from measured records ({method: record}) for a model of one of SIZES in `memory_gb` of RAM or VRAM.

    The size comes from the model's config, quality and speed from the records: they rank the methods, whatever the model.
    Raises ValueError for a choice that is none, or records that hold no method.
    """
    for name, value, allowed in (("hardware", hardware, HARDWARE), ("need", need, NEEDS), ("size", size, SIZES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    if not memory_gb > 0:
        raise ValueError(f"memory must be above 0 GB, got {memory_gb}")
    if fine_tune:
        return _training(found, memory_gb, size)
    usable = _usable(found, hardware)
    needed = {method: bytes_needed(record, size) for method, record in usable.items()}
    fitting = {method: record for method, record in usable.items() if needed[method] <= memory_gb * 1e9}
    if not fitting:
        least = min(needed, key=needed.__getitem__)
        return Advice(None, "12", f"{size} needs {needed[least] / 1e9:.1f} GB even in {least} (with {CONTEXT:,} tokens of context), and you have {memory_gb:g}: "
                      "offload, or take a smaller model (notebook 12).")  # fmt: skip
    alike = {reference.on_cpu(record["device"]) for record in fitting.values()} == {hardware == "CPU"}
    best = _best(fitting, needed, "quality" if need == "speed" and not alike else need)
    room = f"{size} needs {needed[best] / 1e9:.1f} of your {memory_gb:g} GB with {CONTEXT:,} tokens of context"
    said = _quality(fitting[best]) + _about_speed(found, fitting[best], need, alike)
    reason = f"{room}; {said}. {len(fitting)} of {len(usable)} usable methods fit."
    return Advice(best, fitting[best]["notebook"][:2], reason)


def _usable(found, hardware):
    """{method: record} of those that can be offered: their size is known, their loss is small, and they run on this hardware."""
    usable = {
        method: record
        for method, record in found.items()
        if record["kl_divergence"] is not None
        and record["kl_divergence"] < USABLE
        and linear_bits(record) is not None
        and (hardware == "CPU" or method not in CPU_ONLY)
    }
    if not usable:
        raise ValueError("no record of a method to choose from: run notebooks 00 to 06 first")
    return usable


def _best(fitting, needed, need):
    """The method that comes first for one of NEEDS."""
    ranks = {
        "quality": lambda method: fitting[method]["kl_divergence"],
        "speed": lambda method: -(fitting[method]["decode_tokens_per_s"] or 0),
        "small size": lambda method: (needed[method], fitting[method]["kl_divergence"]),
    }
    return min(fitting, key=ranks[need])


def _quality(record):
    """What was measured of a method's quality, in words."""
    model, same = record["model"].split()[0], record["top1_agreement"]
    return f"measured on {model}: KL {record['kl_divergence']:.3f}, {same:.0%} of the top tokens unchanged"


def _about_speed(found, record, need, alike):
    """What is known of a method's speed, as the end of a sentence. alike: the records are of hardware such as the reader's."""
    said = _speed(found, record) if alike else ""
    if not said and need == "speed":
        said = "; no speed was measured on such hardware, so this is the best quality that fits"
    if record["decode_tokens_per_s"] is None:
        said += f"; its speed was not measured, and notebook {record['notebook'][:2]} says what decodes it"
    return said


def _speed(found, record):
    """What was measured of a method's speed, in words, beside that of bf16; "" where nothing was."""
    rate = record["decode_tokens_per_s"]
    if not rate:
        return ""
    plain = found.get("bf16", {}).get("decode_tokens_per_s")
    beside = f" ({rate / plain:.1f} times bf16)" if plain and record["method"] != "bf16" else ""
    return f", {rate:.0f} tokens/s on {record['device']}{beside}"


def bytes_needed(record: Record, size: str) -> float:
    """Bytes for weights, scales, a KV cache of CONTEXT tokens and working space; ValueError where the record says too little."""
    if record["method"] in FORMATS:
        return WORKING_SPACE * _predicted(size, **FORMATS[record["method"]]).total
    bits = linear_bits(record)
    if bits is None:
        raise ValueError(f"the record of {record['method']} does not say how many bits a weight takes")
    full = _predicted(size, bits=16)
    rest = full.rest * bits / 16 if record["method"].startswith("gguf") else full.rest
    return WORKING_SPACE * (full.weights * bits / 16 + rest + full.kv_cache)


def linear_bits(record: Record) -> float | None:
    """Bits that a record's method takes for each weight of a Linear layer, scales counted; None where its record does not say.

    The rest of the model is in 16 bits. A rotated model's head is a weight of its own, which other models have anyway. A GGUF file
    quantizes everything, so there it is the file's mean, which is more than a model with longer rows needs.
    """
    if record["method"] in FORMATS:
        return FORMATS[record["method"]]["bits"]
    small = next((name for name in SIZES if record["model"].startswith(name)), None)
    if record["weight_bytes"] is None or small is None or record["method"] in pareto.FINE_TUNED:
        return None
    if record["method"].startswith("gguf"):
        return record["bits_per_weight"]
    full = _predicted(small, bits=16)
    rest = full.rest
    if "rotated" in record["method"] and _config(small).tie_word_embeddings:
        rest += 2 * _config(small).vocab_size * _config(small).hidden_size
    return 16 * (record["weight_bytes"] - rest) / full.weights


@functools.cache
def _predicted(size, **layout):
    return memory.predict(_config(size), **layout, context=CONTEXT)


def _training(found, memory_gb, size):
    """Full fine-tuning where it fits, else QLoRA, else nothing."""
    parameters = memory.predict(_config(size)).parameters
    full = TRAINING_BYTES * parameters
    small = WORKING_SPACE * _predicted(size, **FORMATS["nf4"]).total + 0.5e9  # adapters, activations
    if full <= memory_gb * 1e9:
        return Advice("fp32", "02", f"all weights of {size} can be trained: {TRAINING_BYTES} bytes for each of {parameters / 1e9:.2f} billion are "
                      f"{full / 1e9:.0f} of your {memory_gb:g} GB. Train first, quantize afterwards (or with QAT).")  # fmt: skip
    if small <= memory_gb * 1e9:
        measured = (
            f"; measured after training here: KL {found['qlora']['kl_divergence']:.2f} from the untouched model"
            if "qlora" in found
            else ""
        )
        return Advice(
            "qlora",
            "07",
            f"training all weights of {size} takes {full / 1e9:.0f} GB, adapters on 4-bit weights about {small / 1e9:.1f} of your {memory_gb:g} GB{measured}.",
        )
    return Advice(
        None,
        "12",
        f"{size} takes about {small / 1e9:.1f} GB to train even with QLoRA, and you have {memory_gb:g}: take a smaller model, or several GPUs (notebook 12).",
    )


@functools.cache
def _config(size):
    return models.mistral_config() if size == "Mistral-7B" else models.smollm2_config()


class Guide:
    """The guide as a widget: `Guide(found)` in a cell. Without a front end it shows the answers to a few typical questions."""

    EXAMPLES: tuple[dict[str, Any], ...] = (
        dict(memory_gb=24, hardware="CPU"),
        dict(memory_gb=8, hardware="CPU"),
        dict(memory_gb=8, hardware="CPU", need="speed"),
        dict(memory_gb=24, hardware="NVIDIA GPU", fine_tune=True),
        dict(memory_gb=4, hardware="NVIDIA GPU"),
    )

    def __init__(self, found: dict[str, Record]):
        import ipywidgets

        self.found = found
        wide = {"style": {"description_width": "10rem"}, "layout": {"width": "26rem", "max_width": "100%"}}
        self.size = ipywidgets.Dropdown(options=SIZES, value="Mistral-7B", description="Model:", **wide)
        self.memory = ipywidgets.BoundedFloatText(
            value=8, min=0.5, max=1024, step=0.5, description="Memory, GB:", **wide
        )
        self.hardware = ipywidgets.Dropdown(options=HARDWARE, description="Hardware:", **wide)
        self.fine_tune = ipywidgets.Checkbox(value=False, description="I want to fine-tune", indent=False)
        self.need = ipywidgets.Dropdown(options=NEEDS, description="Most important:", **wide)
        self.answer = ipywidgets.HTML()
        controls = (self.size, self.memory, self.hardware, self.need, self.fine_tune)
        for control in controls:
            control.observe(lambda _: self.refresh(), "value")
        self.widget = ipywidgets.VBox([*controls, self.answer])
        self.refresh()

    def advice(self) -> Advice:
        """`Advice` for what is chosen now."""
        return choose(
            self.found,
            self.memory.value,
            str(self.hardware.value),
            self.fine_tune.value,
            str(self.need.value),
            str(self.size.value),
        )

    def refresh(self) -> None:
        """Show the advice for what is chosen now, or what is wrong with the choice."""
        try:
            text = _html(self.advice())
        except ValueError as error:
            text = html.escape(str(error))
        self.answer.value = f'<div role="status" aria-live="polite" style="max-width:60ch">{text}</div>'

    def examples(self) -> list[tuple[str, Advice]]:
        """[(question, Advice)] for the static answer."""
        return [(_question(**example), choose(self.found, **example)) for example in self.EXAMPLES]

    def __repr__(self):
        return "\n".join(
            f"{question}: {advice.method or 'nothing fits'}. {advice.reason}" for question, advice in self.examples()
        )

    def _repr_mimebundle_(self, **_):
        rows = "".join(f"<tr><td style='text-align:left'>{html.escape(question)}</td><td style='text-align:left'>{_html(advice)}</td></tr>"
                       for question, advice in self.examples())  # fmt: skip
        page = f"<table><caption>Decision guide: some answers</caption><thead><tr><th scope='col'>you have, you need</th><th scope='col'>take</th></tr></thead><tbody>{rows}</tbody></table>"
        static = {"text/plain": repr(self), "text/html": page}
        return static if headless() else {**static, **widgets.view(self.widget)}


def _question(memory_gb, hardware="CPU", fine_tune=False, need="quality", size="Mistral-7B"):
    return f"{size} in {memory_gb:g} GB, {hardware}, {'fine-tuning' if fine_tune else need}"


def _html(advice):
    where = f" (notebook {html.escape(advice.notebook)})" if advice.notebook else ""
    return f"<b>{html.escape(advice.method or 'Nothing fits')}</b>{where}: {html.escape(advice.reason)}"
