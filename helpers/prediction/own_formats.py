"""How the weights of a checkpoint are stored that comes with a quantization_config of its own, and what loading makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Format:
    """How a matrix is stored. block: (rows, columns) that share a scale; None: one scale an output row."""

    bits: float
    group_size: int | None = None
    scale_bits: float = 16
    zero_bits: float = 0
    block: tuple[int, int] | None = None
    index_bits: int = 0  # of each input channel: GPTQ stores the group that it belongs to

    def scale_bytes(self, weight: Weight) -> float:
        """Bytes of all scales, zero points and group indices of a matrix."""
        if self.bits >= 16:
            return 0.0
        if self.block:
            rows, columns = (-(-size // block) for size, block in zip((weight.outputs, weight.inputs), self.block))
            groups = weight.count * rows * columns
        else:
            groups = weight.numel / (self.group_size or weight.inputs)
        return (groups * (self.scale_bits + self.zero_bits) + weight.count * weight.inputs * self.index_bits) / 8


@dataclass(frozen=True)
class Weight:
    """A matrix that can be quantized, or `count` of them fused into one tensor."""

    name: str
    numel: int
    inputs: int
    outputs: int
    count: int = 1
    fused: bool = False


def own_format(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The checkpoint's quantization_config as a dict, or None. Nested configs may hold it."""
    for each in (config, config.get_text_config(decoder=True)):
        own = getattr(each, "quantization_config", None)
        if own:
            own = dict(own) if isinstance(own, dict) else own.to_dict()
            method = own.get("quant_method")
            if method is None and (own.get("load_in_4bit") or own.get("load_in_8bit")):
                method = "bitsandbytes"
            return {**own, "quant_method": str(getattr(method, "value", method))}
    return None


def over_own_format(own: dict[str, Any], bits: float) -> str:
    """What to know, in a sentence, where other bits are asked for than those of the checkpoint's own format."""
    method = own["quant_method"]
    if bits >= 16:
        return f"the checkpoint ships in {method}: this is its size once dequantized; leave bits out for its size as shipped"
    return f"the checkpoint ships in {method}, and a second format does not go on top: this counts a 16-bit copy that is quantized anew"


def checkpoint_format(
    own: dict[str, Any], config: PreTrainedConfig
) -> tuple[Callable[[Weight], Format | None], list[str]]:
    """(function: Weight -> Format or None, notes) for the formats that transformers loads and this module knows."""
    method = own["quant_method"]
    make = {
        "mxfp4": _mxfp4, "fp8": _fp8, "fbgemm_fp8": _fbgemm, "gptq": _gptq, "auto-round": _gptq, "awq": _awq,
        "bitsandbytes": _bitsandbytes, "compressed-tensors": _compressed,
    }.get(method)  # fmt: skip
    if make is None:
        raise ValueError(f"the checkpoint's own format {method!r} is not counted here: pass bits=, or add up its files")
    choose, notes = make(own)
    if getattr(config.get_text_config(decoder=True), "num_nextn_predict_layers", None):
        notes = [*notes, "the files may also hold layers that predict further tokens, which transformers does not load"]
    return choose, notes


def _kept(own, *keys):
    """The names that a quantization config excludes, as patterns."""
    return [pattern for key in keys for pattern in own.get(key) or ()]


def _skips(name, patterns):
    """Whether a module is excluded: as transformers reads these lists, with and without a leading "model."."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return any(
        not should_convert_module(each, patterns) for each in (name, f"model.{name}", name.removeprefix("model."))
    )


def _mxfp4(own):
    layout = Format(
        4, group_size=32, scale_bits=8
    )  # 4 bits and one power of two per 32 (OCP microscaling formats, 1.0)
    kept = _kept(own, "modules_to_not_convert")
    if own.get("dequantize"):
        return lambda weight: None, ["mxfp4 with dequantize=True: loaded in 16 bits, the files are a quarter of that"]
    notes = [
        "as shipped in mxfp4, and as loaded where triton >= 3.4 and the kernels package are (GPU of capability 7.5 on); "
        "else transformers dequantizes it to 16 bits: {dense}"
    ]
    return lambda weight: layout if weight.fused and not _skips(weight.name, kept) else None, notes


def _fp8(own):
    block = own.get("weight_block_size", (128, 128))
    layout = Format(8, scale_bits=32, block=tuple(block)) if block else Format(8, scale_bits=0)
    kept = _kept(own, "modules_to_not_convert", "ignored_layers")
    notes = [
        "as shipped in fp8, and as loaded on a GPU of capability 8.9 on (4090, H100); elsewhere transformers dequantizes it to 16 bits: {dense}"
    ]
    return lambda weight: None if _skips(weight.name, kept) else layout, notes


def _fbgemm(own):
    layout, kept = Format(8, scale_bits=32), _kept(own, "modules_to_not_convert")
    return lambda weight: None if _skips(weight.name, kept) else layout, [
        "as shipped in fp8 (fbgemm); it loads on GPUs of capability 9 on only (H100)"
    ]


def _gptq(own):
    bits, group_size = own["bits"], own.get("group_size", 128)
    layout = Format(bits, None if group_size in (-1, None) else group_size, 16, zero_bits=bits, index_bits=32)
    rules = own.get("dynamic") or {}
    if any(not rule.startswith("-:") and changed for rule, changed in rules.items()):
        raise ValueError("the checkpoint gives its layers different bits (dynamic): add up its files instead")
    left_out = [rule.removeprefix("-:") for rule in rules if rule.startswith("-:")]
    kept = _kept(own, "modules_to_not_convert")
    only = [
        name
        for group in own.get("modules_in_block_to_quantize") or ()
        for name in ([group] if isinstance(group, str) else group)
    ]

    def choose(weight):
        if any(re.search(rule, weight.name) for rule in left_out) or _skips(weight.name, kept):
            return None
        return layout if not only or weight.fused or any(weight.name.endswith(name) for name in only) else None

    return choose, [f"as shipped in {own['quant_method']}, and as loaded with gptqmodel"]


def _awq(own):
    bits, group_size = own.get("bits", own.get("w_bit", 4)), own.get("group_size", own.get("q_group_size", 128))
    layout = Format(
        bits, None if group_size == -1 else group_size, 16, zero_bits=bits if own.get("zero_point", True) else 0
    )
    kept = _kept(own, "modules_to_not_convert")
    return lambda weight: None if _skips(weight.name, kept) else layout, [
        "as shipped in awq, and as loaded with gptqmodel"
    ]


def _bitsandbytes(own):
    if own.get("load_in_4bit") or own.get("_load_in_4bit"):
        scale = 8 + 32 / 256 if own.get("bnb_4bit_use_double_quant") else 32
        layout = Format(4, 64, scale)
    else:
        layout = Format(8, scale_bits=32)
    kept = _kept(own, "llm_int8_skip_modules")
    notes = ["as shipped in bitsandbytes; fused experts stay in 16 bits, as bitsandbytes on transformers 5 leaves them"]
    return lambda weight: None if weight.fused or _skips(weight.name, kept) else layout, notes


def _compressed(own):
    layouts = []
    for group in (own.get("config_groups") or {}).values():
        scheme = group.get("weights")
        if not scheme:
            continue
        zero = 0 if scheme.get("symmetric", True) else scheme["num_bits"]
        strategy, size = scheme.get("strategy", "channel"), scheme.get("group_size")
        block = tuple(scheme["block_structure"]) if strategy == "block" and scheme.get("block_structure") else None
        floating = scheme.get("type") == "float" and scheme["num_bits"] == 4  # nvfp4 and mxfp4: scales of 8 bits
        grouped = size if strategy in ("group", "tensor_group") else None
        scale = 0 if strategy == "tensor" else 8 if floating else 16
        layouts.append((group.get("targets", ["Linear"]), Format(scheme["num_bits"], grouped, scale, zero, block)))
    if not layouts:
        raise ValueError(
            "the checkpoint's compressed-tensors config names no format of weights: pass bits=, or add up its files"
        )
    ignored = own.get("ignore") or []

    def choose(weight):
        if any(_targets(pattern, weight.name) for pattern in ignored):
            return None
        return next(
            (layout for targets, layout in layouts if any(t == "Linear" or _targets(t, weight.name) for t in targets)),
            None,
        )

    return choose, [
        "as shipped in compressed-tensors; transformers may decompress it to 16 bits on the first call: {dense}"
    ]


def _targets(pattern, name):
    """compressed-tensors: "re:" and an expression, or the whole name."""
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name
