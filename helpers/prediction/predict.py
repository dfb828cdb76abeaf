"""What a model will need before it is loaded, counted from its config: nothing is downloaded, no weight is allocated."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from helpers.prediction.cache_size import cache_bytes
from helpers.prediction.metamodel import count, first_line, frozen
from helpers.prediction.own_formats import Format, checkpoint_format, over_own_format, own_format

SHIPPED = "shipped"
LIBRARIES = ("bitsandbytes", "torchao", "gptq", "awq")
ONLY_LAYERS = ("bitsandbytes", "torchao")  # they convert Linear modules; experts fused into one tensor stay in 16 bits


class _Noted:
    """Holds the notes out of `vars()`: there a prediction is plain numbers, which records and JSON take as they are."""

    __slots__ = ("notes",)


@dataclass(frozen=True)
class Prediction(_Noted):
    """Bytes a model will need, by part. `notes`: sentences on what a reader would otherwise take for granted."""

    weights: int  # the weights that the format quantizes: Linear layers, and experts where the library takes them
    scales: int  # their scales and zero points
    rest: int  # what stays as it is: embeddings, norms, output head, experts that a library leaves alone
    kv_cache: int  # keys, values, latents and recurrent states
    parameters: int  # count, not bytes

    def __post_init__(self):
        object.__setattr__(self, "notes", ())

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value:,}" for name, value in vars(self).items())
        return "\n".join([f"Prediction({numbers})", *self.notes])

    def noting(self, notes: Iterable[str]) -> "Prediction":
        """The same with these notes."""
        found = replace(self)
        object.__setattr__(found, "notes", tuple(notes))
        return found

    @property
    def model(self) -> int:
        """Bytes of the model without its cache."""
        return self.weights + self.scales + self.rest

    @property
    def total(self) -> int:
        """Bytes of model and cache."""
        return self.model + self.kv_cache

    @property
    def bits_per_weight(self) -> float:
        """Bits of the model, scales and unquantized parts included, for each parameter."""
        return 8 * self.model / self.parameters


def predict(
    config: Any,
    bits: Any = SHIPPED,
    group_size: int | None = None,
    scale_bits: float = 16,
    zero_bits: float = 0,
    double_quant: bool = False,
    rest_bits: int = 16,
    context: int = 0,
    batch: int = 1,
    cache_bits: int = 16,
    library: str | None = None,
) -> Prediction:
    """Bytes a causal language model needs: weights + scales + cache, from its config alone (nothing is loaded).

    bits          of each quantized weight; 16 and 32 mean unquantized; "shipped": the format that the checkpoint's own
                  quantization_config names, 16 where it has none
    group_size    weights that share one scale; None: no scales (unquantized), or one per output row below 16 bits
    scale_bits    of each scale; 32 for bitsandbytes, 16 for GPTQ and AWQ
    zero_bits     of each zero point; 0 for symmetric formats
    double_quant  scales stored in 8 bits with one 32-bit scale per 256 of them (QLoRA, arXiv:2305.14314, section 3)
    rest_bits     of everything that is not quantized
    context       tokens in the cache, for each of `batch` sequences, `cache_bits` per number (states that the model keeps in
                  float32 whatever its dtype count 32)
    library       one of LIBRARIES. "bitsandbytes" and "torchao" leave fused experts in 16 bits; None: experts are quantized, as
                  GPTQ and AWQ do

    Raises ValueError, in one line, for what cannot be counted.
    """
    _check(bits, group_size, context, batch, library)
    config = _config(config)
    own = own_format(config)
    shape = count(frozen(config))
    notes = list(shape.notes)
    if bits == SHIPPED and own:
        choose, said = checkpoint_format(own, config)
        dense = shape.parameters * rest_bits / 8e9
        notes += [text.format(dense=f"{dense:.1f} GB") for text in said]
    else:
        bits = 16 if bits == SHIPPED else bits
        scale = 8 + 32 / 256 if double_quant else scale_bits
        layout = Format(bits, group_size, scale, zero_bits)
        takes_experts = bits >= 16 or library not in ONLY_LAYERS
        choose = lambda weight: layout if takes_experts or not weight.fused else None  # noqa: E731
        if own:
            notes.append(over_own_format(own, bits))
        notes += _about_experts(shape, bits, rest_bits, takes_experts)
    chosen = [(weight, stored) for weight in shape.weights if (stored := choose(weight))]
    if not chosen and bits != SHIPPED and bits < 16:
        raise ValueError(f"{shape.model} has no layers that this format would quantize: ask with bits=16")
    quantized = sum(weight.numel for weight, _ in chosen)
    cache = cache_bytes(config, context, batch, cache_bits) if context and batch else 0
    return Prediction(
        weights=int(sum(weight.numel * stored.bits / 8 for weight, stored in chosen)),
        scales=int(sum(stored.scale_bytes(weight) for weight, stored in chosen)),
        rest=(shape.parameters - quantized) * rest_bits // 8,
        kv_cache=cache,
        parameters=shape.parameters,
    ).noting(notes)


def _check(bits, group_size, context, batch, library):
    number = isinstance(bits, (int, float)) and not isinstance(bits, bool)
    if bits != SHIPPED and not (number and (2 <= bits <= 8 or bits in (16, 32))):
        raise ValueError(f"bits must be 2 to 8, 16 or 32, not {bits!r}")
    if group_size is not None and not group_size > 0:
        raise ValueError(f"group_size must be above 0 or None, got {group_size}")
    for name, value in {"context": context, "batch": batch}.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)} or None, not {library!r}")


def _config(config):
    """The config as an object; a dict with a model_type is taken as the content of a config.json."""
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(config, dict) and "model_type" in config:
        try:
            config = AutoConfig.for_model(**config)
        except ValueError as error:
            raise ValueError(
                f"transformers has no model of type {config['model_type']!r}: {first_line(error)}"
            ) from error
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"config must be a transformers config, such as AutoConfig.from_pretrained(name), not {type(config).__name__}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(config).__name__} is an encoder-decoder: only causal language models are counted here")
    return config


def _about_experts(shape, bits, rest_bits, taken):
    experts = sum(weight.numel for weight in shape.weights if weight.fused)
    if bits >= 16 or not experts:
        return []
    size = f"{experts / 1e9:.2f} billion weights lie in fused experts"
    if taken:
        return [
            f"{size}, which GPTQ and AWQ quantize; bitsandbytes (on transformers 5) and torchao leave them "
            f"in {rest_bits} bits, {experts * rest_bits / 8e9:.1f} GB: ask with library="
        ]
    return [
        f"{size}, which this library leaves in {rest_bits} bits, {experts * rest_bits / 8e9:.1f} GB; GPTQ and AWQ quantize them"
    ]
