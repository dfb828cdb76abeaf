# %% [markdown]
# # 09 FP8, MXFP4 and NVFP4
#
# Build the small floats that new checkpoints and new GPUs speak, and measure them against integers of the same size.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Cast to E4M3, E5M2, E2M1, MXFP4 and NVFP4 in a few lines, and get the same bits as torch, torchao and gguf.
# 2. Round activations too, and say with numbers why a float survives an outlier that breaks an integer.
# 3. Rank FP4 and INT4 at equal bits with error bars, write checkpoints for other programs, and know which GPU runs
#    which format.
#
# **Before you start:** [01 PTQ](01_ptq_dynamic_int8.ipynb) for scales and outliers, [04 NF4](04_nf4_bitsandbytes.ipynb)
# for blocks.

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
calibration_tokens = 1024
layer_name = "auto"

# %%
import json
import logging
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import gguf
import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from helpers import checkpoints, evaluation, exercises, figures, files, memory, models, records

# %%
figures.style()
transformers_logging.disable_progress_bar()
found = models.find(model, copies=2)
tokenizer = AutoTokenizer.from_pretrained(found.path)
windows = evaluation.windows(tokenizer, tokens=eval_tokens)  # four genres, in turn
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
letter = evaluation.windows(tokenizer, source="letter", tokens=1024)  # held back to the end
print(f"{found.name} on the {found.device.upper()}, {found.origin}")

# %% [markdown]
# ## The idea: where the levels lie
#
# A float has a sign, an exponent and a mantissa. **E2M1** is the 4-bit float: two bits of exponent, one of mantissa.
# Its values are 0, 0.5, 1, 1.5, 2, 3, 4 and 6, and the same with a minus. Up to 2 the step is 0.5. It doubles at 2 and
# again at 4. An integer has one step.
#
# Both get a **block scale**: a few neighbours share one number that they are multiplied with, so that the largest of
# them meets the largest level. Take eight weights by hand. Their largest magnitude is 0.6, so the scale of E2M1 is 0.6 / 6 =
# 0.1 and the scale of INT4 is 0.6 / 7:

# %%
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports the kernels that it does not find
import bitsandbytes.functional as bnb

e2m1_levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LEVELS = {
    "E2M1": torch.cat([-e2m1_levels[1:], e2m1_levels]).unique(),
    "INT4": torch.arange(-7.0, 8),
    "NF4": bnb.get_4bit_type("nf4", device="cpu"),
}
eight = torch.tensor([0.01, -0.04, 0.07, 0.11, -0.16, 0.22, -0.33, 0.6])


# %%
def nearest(values, levels):
    """Each value's nearest level, after the largest magnitude was scaled to the largest level, and back."""
    scale = values.abs().max() / levels.max()
    return levels[(values[:, None] / scale - levels).abs().argmin(1)] * scale


by_hand = pd.DataFrame({"weight": eight} | {name: nearest(eight, levels) for name, levels in LEVELS.items()})
for name, dtype in (("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)):
    by_hand[name] = eight.to(dtype).float()
by_hand.round(4)

# %% [markdown]
# INT4 turns the two smallest weights into 0. E2M1 keeps the second of them, and pays with coarse steps further out:
# -0.33 becomes -0.30. **E4M3** and **E5M2** are the 8-bit floats. They need no block scale for these weights: E4M3
# reaches from 0.002 to 448, E5M2 from 0.000015 to 57,344. The picture shows the 4-bit levels:

# %% jupyter={"source_hidden": true}
fig, axes = plt.subplots(3, 1, figsize=(7, 3), sharex=True, layout="constrained")
colors = {"E2M1": figures.PALETTE[2], "INT4": figures.PALETTE[1], "NF4": figures.PALETTE[0]}  # 04 draws the last two so
for ax, (name, levels) in zip(axes, LEVELS.items()):
    ax.eventplot(levels / levels.max(), color=colors[name], linelengths=1)
    ax.set(yticks=[], ylabel=name)
axes[0].set_title("A 4-bit float is fine near zero and coarse at the ends")
axes[2].set_xlabel("level, as a share of the largest")
steps = {name: (levels / levels.max()).diff() for name, levels in LEVELS.items()}
spacing = pd.DataFrame({name: {"smallest step": step.min().item(), "largest step": step.max().item()}
                        for name, step in steps.items()}).T  # fmt: skip
figures.show(fig, alt=f"Number lines of E2M1, INT4 and NF4, scaled to 1. The steps of E2M1 grow from "
             f"{spacing['smallest step']['E2M1']:.3f} to {spacing['largest step']['E2M1']:.3f}; those of "
             f"INT4 are all {spacing['smallest step']['INT4']:.3f}.", table=spacing.round(3))  # fmt: skip

# %% [markdown]
# A float's step grows with its value, so its **relative** error stays the same over its whole range. An integer's step
# is fixed, so a small value beside a large one loses everything. We plot the largest relative error of a value,
# with the scale set so that the largest value is 448:

# %%
values = torch.logspace(-3, 2.65, 4000)
rounded = {
    "INT8": (values / (448 / 127)).round() * (448 / 127),
    "E4M3": values.to(torch.float8_e4m3fn).float(),
    "E5M2": values.to(torch.float8_e5m2).float(),
}
decade = (values.log10().floor()).int().numpy()
errors = pd.DataFrame({name: ((each - values).abs() / values).numpy() for name, each in rounded.items()})
worst = errors.groupby(decade).max()
worst.index = [f"{10.0**power:g} to {10.0 ** (power + 1):g}" for power in worst.index]

# %% jupyter={"source_hidden": true}
fig, ax = plt.subplots(figsize=(7, 2.8))
for name, color in zip(errors, figures.PALETTE, strict=False):
    ax.plot(values, errors[name].rolling(80, min_periods=1).max(), color=color)
    ax.annotate(name, (values[-1], errors[name].iloc[-80:].max()), xytext=(4, -3), textcoords="offset points")
ax.set(xscale="log", yscale="log", xlabel="value (the largest is 448)", ylabel="largest relative error")
ax.set_title("An integer loses small values long before a float does")
figures.show(fig, alt=f"Largest relative error against the value. Between 1 and 10 INT8 is off by up to "
             f"{worst['INT8']['1 to 10']:.0%}, E4M3 by {worst['E4M3']['1 to 10']:.0%} and E5M2 by "
             f"{worst['E5M2']['1 to 10']:.0%}.", table=worst.round(3))  # fmt: skip

# %% [markdown]
# ## From scratch: the casts
#
# A kind of float is four numbers: how many bits the exponent and the mantissa have, the largest value, and the code for
# what is above it. E5M2 has an infinity there. E2M1 stays at 6. E4M3 has no infinity: this torch stays at 448, and an
# older one gives NaN. So we ask it.


# %%
class Kind(NamedTuple):
    """A small float. lowest: the exponent of the smallest normal value."""

    exponent_bits: int
    mantissa_bits: int
    largest: float
    above: int

    @property
    def lowest(self):
        return 2 - 2 ** (self.exponent_bits - 1)


# %%
at_the_top = torch.tensor(1e4).to(torch.float8_e4m3fn).view(torch.uint8).item()
E4M3, E5M2, E2M1 = Kind(4, 3, 448.0, at_the_top), Kind(5, 2, 57344.0, 0x7C), Kind(2, 1, 6.0, 7)

# %% [markdown]
# To cast, find the exponent and round to a multiple of the step that belongs to it. Halfway cases go to the **even**
# multiple. Counted in steps, the code comes out by itself: when the rounding reaches the next power of two, the code
# carries over to the next exponent.


# %%
def encode(values, kind):
    """float tensor -> uint8 codes of the same shape: sign, exponent, mantissa."""
    values = values.float()
    magnitude = values.abs().clamp(max=2 * kind.largest)
    exponent = torch.frexp(magnitude)[1] - 1
    exponent = torch.where(magnitude == 0, kind.lowest, exponent).clamp(min=kind.lowest)
    steps = torch.ldexp(magnitude, kind.mantissa_bits - exponent).round()  # torch rounds halves to even
    codes = ((exponent - kind.lowest) * 2**kind.mantissa_bits + steps).clamp(max=kind.above)
    codes = torch.where(values.isnan(), 0x7F, codes).to(torch.uint8)
    return codes | torch.signbit(values).to(torch.uint8) << (kind.exponent_bits + kind.mantissa_bits)


# %%
def decode(codes, kind):
    """The inverse: uint8 codes -> float32."""
    sign_bit = kind.exponent_bits + kind.mantissa_bits
    code = (codes & (2**sign_bit - 1)).int()
    field, mantissa = code >> kind.mantissa_bits, code & (2**kind.mantissa_bits - 1)
    whole = mantissa + torch.where(field > 0, 2**kind.mantissa_bits, 0)  # without the hidden one: subnormal
    values = torch.ldexp(whole.float(), field.clamp(min=1) - 1 + kind.lowest - kind.mantissa_bits)
    if kind.exponent_bits == 5:
        values = torch.where(code == 0x7C, torch.inf, values)
    if sign_bit == 7:
        values = torch.where(code > (0x7C if kind.exponent_bits == 5 else 0x7E), torch.nan, values)
    return torch.where(codes >> sign_bit > 0, -values, values)


# %% [markdown]
# Does it equal torch bit for bit? There are only 65,536 float16 numbers and as many bfloat16 numbers, so we cast **all
# of them**, with the infinities and NaN. Backwards we try all 256 codes. E2M1 has no NaN, and torchao's cast is its
# judge on every bfloat16 that is a number.

# %%
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked

every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short()
CASTS = {
    "E4M3, torch": (E4M3, lambda x: x.to(torch.float8_e4m3fn).view(torch.uint8)),
    "E5M2, torch": (E5M2, lambda x: x.to(torch.float8_e5m2).view(torch.uint8)),
    "E2M1, torchao": (E2M1, lambda x: f32_to_f4_unpacked(x.float())),
}


# %%
def differing(kind, cast):
    """How many of all 16-bit numbers get another code than the library's."""
    rows = {}
    for name, source in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        x = every.view(source)
        x = x[~x.isnan()] if kind is E2M1 else x
        rows[name] = (encode(x, kind) != cast(x)).sum().item()
    return rows


# %%
differences = pd.DataFrame({name: differing(*pair) for name, pair in CASTS.items()}).T

# %%
codes = torch.arange(256, dtype=torch.uint8)
decoders = {
    "E4M3, torch": (E4M3, codes, codes.view(torch.float8_e4m3fn).float()),
    "E5M2, torch": (E5M2, codes, codes.view(torch.float8_e5m2).float()),
    "E2M1, torchao": (E2M1, codes[:16], f4_unpacked_to_f32(codes[:16])),
}
for name, (kind, each, values) in decoders.items():
    same = decode(each, kind).isclose(values, rtol=0, atol=0, equal_nan=True)
    differences.loc[name, "codes read back"] = (~same).sum().item()
assert not differences.any(axis=None), "another code than the library's"
differences.astype(int)

# %% [markdown]
# ## Block scales: MXFP8, MXFP4 and NVFP4
#
# | format | element | block | scale of a block | bits a weight |
# |---|---|---|---|---|
# | MXFP8 | E4M3 or E5M2 | 32 | E8M0: a power of two, 8 bits | 8.25 |
# | MXFP4 | E2M1 | 32 | E8M0 | 4.25 |
# | NVFP4 | E2M1 | 16 | E4M3, 8 bits, and one float32 for the whole tensor | 4.5 |
#
# **MX** is an open standard of several makers ([OCP Microscaling
# Formats](https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf)). Its scale can only
# be 1, 2, 4 and so on, so it rarely fits. If the largest magnitude of a block is 7.9, the scale 1 cuts it to 6, and the
# scale 2 makes every step twice as large. Four rules for the exponent are in use:


# %%
def exponent_of(largest, kind, rule="floor"):
    """The exponent of the scale of each block, -127 to 127, from its largest magnitude."""
    if rule == "rceil":  # the smallest power of two that cuts nothing off
        return torch.log2(largest / kind.largest).ceil().clamp(-127, 127).int()
    if rule == "even":  # round the largest magnitude to the element's mantissa first
        half_step = 1 << (22 - kind.mantissa_bits)
        largest = ((largest.view(torch.int32) + half_step) & (511 << 23)).view(torch.float32)
    mantissa, exponent = torch.frexp(largest)
    if rule == "ceil":
        exponent = exponent + (mantissa > 0.5)
    top = torch.frexp(torch.tensor(kind.largest))[1]
    return torch.where(largest == 0, -127, exponent - top).clamp(-127, 127).int()


# %%
def blocks_of(weight, size):
    """float32 [n, size]; refuses rows that do not divide."""
    if weight.shape[-1] % size:
        raise ValueError(f"rows of {weight.shape[-1]} do not divide into blocks of {size}")
    return weight.float().reshape(-1, size)


# %%
def mx(weight, kind=E2M1, rule="floor"):
    """-> codes uint8 [n, 32] and exponents of the scales, uint8 [n, 1] with 127 added."""
    blocks = blocks_of(weight, 32)
    exponent = exponent_of(blocks.abs().amax(1, keepdim=True), kind, rule)
    scaled = torch.ldexp(blocks, -exponent).clamp(-kind.largest, kind.largest)
    return encode(scaled, kind), (exponent + 127).to(torch.uint8)


# %% [markdown]
# **NVFP4** spends its 8 bits on a scale that fits more closely: E4M3 has 3 bits of mantissa. E4M3 ends at 448, so one
# float32 for the whole tensor brings the scales of all blocks into its range.


# %%
def nvfp4(weight):
    """-> codes uint8 [n, 16], scales E4M3 [n, 1], and the tensor's scale, a float32."""
    blocks = blocks_of(weight, 16)
    tensor_scale = weight.float().abs().amax() / (448 * 6)
    wanted = blocks.abs().amax(1, keepdim=True) / 6 / tensor_scale
    smallest = torch.finfo(torch.float8_e4m3fn).tiny
    scales = wanted.clamp(smallest, 448).to(torch.float8_e4m3fn)
    return encode(blocks * (1 / tensor_scale / scales.float()), E2M1), scales, tensor_scale


# %%
def pack(codes):
    """4-bit codes -> bytes [n]: the first of two in the low half."""
    pairs = codes.reshape(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


# %% [markdown]
# We compare one weight of the model with torchao, code for code, in all four rules, with E2M1 and with E4M3 elements:

# %%
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale


def linear_layers(net):
    """{name: module} of the Linear layers, without the output head."""
    head = net.get_output_embeddings()
    kept = {name: module for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: module for name, module in kept.items() if module is not head}


# %%
def fresh(dtype=found.fast):
    """The untouched model."""
    return AutoModelForCausalLM.from_pretrained(found.path, dtype=dtype).to(found.device).eval()


# %%
net = fresh()
layers = linear_layers(net)
names = list(layers)
odd = sorted({layer.in_features for layer in layers.values() if layer.in_features % 64})
other = sorted({type(layer).__name__ for layer in layers.values()} - {"Linear"})
if other:
    raise ValueError(f"{', '.join(other)}: compressed-tensors loads plain Linear layers only")
if odd:
    raise ValueError(f"rows of {', '.join(map(str, odd))} weights do not divide into groups of 64")
later = names[len(names) // 2 :]
chosen = next((name for name in later if "down" in name or "4h_to_h" in name), later[0])
weight = layers[chosen if layer_name == "auto" else layer_name].weight.detach().float().cpu()
weight_count = sum(layer.weight.numel() for layer in layers.values())
print(f"{chosen}: {tuple(weight.shape)}; all Linear layers: {weight_count:,} weights")

# %%
RULES = ("floor", "ceil", "even", "rceil")
ELEMENTS = {"MXFP4": (E2M1, torch.float4_e2m1fn_x2), "MXFP8": (E4M3, torch.float8_e4m3fn)}


def against_torchao(kind, dtype, rule):
    """How many codes and scales differ from torchao's."""
    codes, exponents = mx(weight, kind, rule)
    scales, data = to_mx(weight, dtype, 32, ScaleCalculationMode[rule.upper()])
    mine = pack(codes) if kind is E2M1 else codes
    different = (mine.flatten() != data.view(torch.uint8).flatten()).sum()
    return (different + (exponents.flatten() != scales.view(torch.uint8).flatten()).sum()).item()


# %%
judged = pd.DataFrame(index=RULES)
for name, pair in ELEMENTS.items():
    judged[name] = [against_torchao(*pair, rule) for rule in RULES]
assert not judged.any(axis=None), "other codes or scales than torchao's"
judged.astype(int)

# %%
codes, scales, tensor_scale = nvfp4(weight)
theirs = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))
different = (pack(codes) != theirs.qdata.flatten()).sum()
different += (scales.flatten().float() != theirs.scale.flatten().float()).sum()
print(f"NVFP4: {codes.numel():,} codes and {scales.numel():,} scales, {different} differ from torchao's")
assert different == 0

# %% [markdown]
# `gguf` has MXFP4 too, because the open gpt-oss models come in it. Its scales are the same. Two codes differ, and both
# are known: it rounds a halfway case **down**, not to even, and it knows no negative zero. (It decodes NVFP4 and does
# not encode it.)

# %%
their_bytes = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.MXFP4)).reshape(-1, 17)
their_codes = torch.cat([their_bytes[:, 1:] & 15, their_bytes[:, 1:] >> 4], 1)
codes, exponents = mx(weight)
scaled = torch.ldexp(blocks_of(weight, 32), 127 - exponents.int()).abs()
negative_zero = codes == 8
halfway = torch.isin(scaled, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]))
other = their_codes != codes
print(f"scales that differ: {(their_bytes[:, :1] != exponents).sum()}")
print(f"codes that differ: {other.sum():,} of {other.numel():,}: {(other & negative_zero).sum():,} negative "
      f"zeros and {(other & halfway & ~negative_zero).sum()} halfway cases")  # fmt: skip
assert not (other & ~negative_zero & ~halfway).any()

# %% [markdown]
# ### What a rule costs
#
# The table has the relative error of this weight, restored. **Search** tries two powers of two for each block, and takes the one with
# the smaller squared error. For NVFP4 it tries five scales: a scale 1.5 times as large puts the largest weight on level
# 4, where the levels are closer.


# %%
def restore_mx(weight, rule="floor", kind=E2M1):
    codes, exponents = mx(weight, kind, rule)
    return torch.ldexp(decode(codes, kind), exponents.int() - 127).view_as(weight)


def restore_nvfp4(weight):
    codes, scales, tensor_scale = nvfp4(weight)
    return (decode(codes, E2M1) * (scales.float() * tensor_scale)).view_as(weight)


# %%
def to_e2m1(values):
    """Round to the nearest value of E2M1: `decode(encode(values, E2M1), E2M1)`, in fewer passes."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((values / step).round() * step).clamp(-6, 6)


# %%
def to_int4(values):
    return values.round().clamp(-7, 7)


numbers = every.view(torch.bfloat16).float()
numbers = numbers[~numbers.isnan()]
assert torch.equal(to_e2m1(numbers), decode(encode(numbers, E2M1), E2M1))


# %%
def power_of_two(scale):
    return torch.exp2(torch.log2(scale).ceil())


def half_precision(scale):
    return scale.half().float()


def e4m3_scale(scale):
    unit = scale.max() / 448
    return (scale / unit).clamp(2**-6, 448).to(torch.float8_e4m3fn).float() * unit


# %%
def restore(weight, size, to_levels, largest, round_scale, factors=(1,)):
    """Round in blocks; for each block, of the scales `factors` times the plain one, keep the best."""
    blocks = blocks_of(weight, size)
    plain = (blocks.abs().amax(1, keepdim=True) / largest).clamp(min=1e-7)
    kept, least = torch.zeros_like(blocks), torch.full_like(plain, torch.inf)
    for factor in factors:
        scale = round_scale(plain * factor)
        tried = to_levels(blocks / scale) * scale
        error = (tried - blocks).square().sum(1, keepdim=True)
        kept = torch.where(error < least, tried, kept)
        least = torch.minimum(error, least)
    return kept.view_as(weight)


# %%
SEARCHED = (1.5, 1.2, 1.0, 0.9, 0.8)


def relative_error(restored):
    return ((restored - weight).norm() / weight.norm()).item()


rule_errors = {f"MXFP4, {rule}": relative_error(restore_mx(weight, rule)) for rule in RULES}
rule_errors["MXFP4, search"] = relative_error(restore(weight, 32, to_e2m1, 6, power_of_two, (1, 0.5)))
rule_errors["NVFP4"] = relative_error(restore_nvfp4(weight))
rule_errors["NVFP4, search"] = relative_error(restore(weight, 16, to_e2m1, 6, e4m3_scale, SEARCHED))
pd.Series(rule_errors, name="relative error").to_frame().round(4)

# %% [markdown]
# ## Activations: why a float survives an outlier
#
# Weights alone save memory. To save arithmetic too, the **inputs** of each layer are rounded as well: W8A8. A scale per
# layer that was fixed beforehand is *static*; one computed for each token as it comes is *dynamic*. Here is the layer
# whose inputs have the largest outlier, compared with their median, on calibration text:


# %%
@torch.inference_mode()
def watch(net, ids):
    """{layer: (largest magnitude of its inputs, that over the median)} on one pass."""
    seen = {}

    def look(name, inputs):
        x = inputs[0].detach().abs()
        seen[name] = (x.max().item(), (x.max() / x.median().clamp(min=1e-12)).item())

    hooks = [layer.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs))
             for name, layer in linear_layers(net).items()]  # fmt: skip
    net(input_ids=ids.to(found.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


# %%
calibration = evaluation.windows(tokenizer, "calibration", tokens=calibration_tokens, source="pydoc")
ranges = watch(net, calibration)
outlier = max(ranges, key=lambda name: ranges[name][1])
caught = []
hook = layers[outlier].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
with torch.inference_mode():
    net(input_ids=calibration[:1].to(found.device), use_cache=False)
hook.remove()
activation = caught[0].float().cpu().flatten(0, -2)
print(f"{outlier}: largest input {ranges[outlier][0]:,.0f}, {ranges[outlier][1]:,.0f} times the median")


# %%
def eight_bits(values, number, scale):
    """Round to INT8 or E4M3 with a scale, and back."""
    if number == "INT8":
        return (values / scale).round().clamp(-127, 127) * scale
    scaled = (values / scale).clamp(-448, 448)
    return scaled.to(torch.float8_e4m3fn).to(values.dtype) * scale


# %%
LARGEST = {"INT8": 127, "E4M3": 448}


def per_token(x, number):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / LARGEST[number]
    return eight_bits(x, number, scale)


# %% [markdown]
# We give this layer one static scale. We sort its inputs by size into ten equal groups, and compare each group's error
# with its own size:

# %%
inputs = activation.flatten()
groups = inputs.abs().argsort().chunk(10)
lost = {}
for number in LARGEST:
    gap = eight_bits(inputs, number, inputs.abs().max() / LARGEST[number]) - inputs
    lost[number] = [(gap[group].norm() / inputs[group].norm()).item() for group in groups]
lost = pd.DataFrame(lost, index=[f"{10 * n} to {10 * n + 10} %" for n in range(10)])

# %% jupyter={"source_hidden": true}
fig, ax = plt.subplots(figsize=(7, 2.8))
for number, color in zip(lost, figures.PALETTE, strict=False):
    ax.plot(range(10), lost[number], "o-", color=color)
    ax.annotate(number, (5, lost[number].iloc[5]), xytext=(0, 8), textcoords="offset points", color=color)
ax.set(xticks=range(10), xticklabels=range(10, 101, 10), ylim=(0, 1.2))  # room for the label above the upper line
ax.set(xlabel="inputs by size, % (smallest first)", ylabel="relative error (1: all lost)")
ax.set_title("With one outlier in the scale, INT8 loses most inputs")
figures.show(fig, alt=f"Relative error of the inputs of {outlier}, by size. INT8 loses "
             f"{lost['INT8'].iloc[4]:.0%} of the middle group and E4M3 {lost['E4M3'].iloc[4]:.0%}.",
             table=lost.round(3))  # fmt: skip

# %% [markdown]
# Now we round the whole model: weights with one scale an output row, inputs in front of each layer. This is an
# **emulation**: the rounded numbers are multiplied in the model's own type. A GPU multiplies the codes and applies both
# scales to the sum. The products are the same numbers; only the order of the sums differs. The first 2 windows of each
# genre are enough to tell these apart:


# %%
@torch.no_grad()
def change_weights(net, change):
    """Replace each Linear weight by `change(weight)`, in place; the net."""
    for layer in linear_layers(net).values():
        layer.weight.copy_(change(layer.weight.float()))
    return net


# %%
def per_row(number):
    return lambda weight: per_token(weight, number)


def round_inputs(net, rounding):
    """From now on each Linear layer gets `rounding(name, input)`."""
    for name, layer in linear_layers(net).items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: (rounding(name, inputs[0]), *inputs[1:]))
    return net


# %%
reference = evaluation.reference(found, windows)
in_domain_reference = evaluation.reference(found, in_domain)
letter_reference = evaluation.reference(found, letter)
probe = windows[: max(4, len(windows) // 2)]


def static(number):
    return lambda name, x: eight_bits(x, number, ranges[name][0] / LARGEST[number])


def dynamic(number):
    return lambda name, x: per_token(x, number)


# %%
routes = {}
for number in LARGEST:
    for how, rounding in (("one scale a layer", static), ("one scale a token", dynamic)):
        candidate = round_inputs(change_weights(fresh(), per_row(number)), rounding(number))
        scores = evaluation.score(candidate, probe, reference)
        routes[f"{number}, {how}"] = {"KL": scores.kl_divergence, "from": scores.kl_low, "to": scores.kl_high}
del candidate
activations = pd.DataFrame(routes).T
activations.round(4)

# %%
kl = activations["KL"]
static_ratio = kl["INT8, one scale a layer"] / kl["E4M3, one scale a layer"]
dynamic_ratio = kl["INT8, one scale a token"] / kl["E4M3, one scale a token"]
print(f"KL of INT8 over FP8: {static_ratio:,.1f} with a scale a layer, {dynamic_ratio:.2f} with one a token")
assert static_ratio > 5 or not found.name.startswith("SmolLM2"), "a float should survive the outlier"

# %% [markdown]
# On SmolLM2-135M and two CPU cores, with one scale a layer, INT8 costs a KL of about 1.0, and FP8 about 0.04. The
# outlier sets the scale of INT8 so high that nearly all other inputs become zero. E4M3 spends four bits on an exponent,
# so they stay. With one scale a token the outlier spoils only its own token: INT8 falls to about 0.045 and FP8 to 0.03.
# The float is ahead, and the choice of the scale matters more than the choice of the number.

# %% [markdown]
# ## Measured: FP8, and four bits at equal size
#
# These formats become records, each measured on all windows and on Python's documentation:
#
# | record | what it is | bits a weight |
# |---|---|---|
# | `fp8` | W8A8: E4M3, a scale an output row, inputs with a scale a token (emulated) | 8 |
# | `fp8-weight-only` | the same weights, inputs untouched | 8 |
# | `mxfp4`, `nvfp4` | as above, weights only, no search | 4.25, 4.5 |
# | `int4-g64`, `int4-g32` | levels -7 to 7, groups of 64 or 32, a float16 scale each | 4.25, 4.5 |
#
# Beside them stand three of these formats with a search of scales, and INT4 levels in NVFP4's own blocks: then the
# levels alone differ. The last row gives INT4 a zero point, as [04 NF4](04_nf4_bitsandbytes.ipynb) does. That takes
# 0.125 bits more than NVFP4 has.


# %%
def int4_with_zero_point(weight, size=32):
    """16 evenly spaced levels from the smallest to the largest weight of each group."""
    groups = blocks_of(weight, size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = half_precision(((high - low) / 15).clamp(min=1e-7))
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((groups / scale).round() + zero).clamp(0, 15)
    return ((codes - zero) * scale).view_as(weight)


# %%
FOUR_BITS = {
    "mxfp4": (4.25, restore_mx),
    "mxfp4, search": (4.25, lambda weight: restore(weight, 32, to_e2m1, 6, power_of_two, (1, 0.5))),
    "int4-g64": (4.25, lambda weight: restore(weight, 64, to_int4, 7, half_precision)),
    "nvfp4": (4.5, restore_nvfp4),
    "nvfp4, search": (4.5, lambda weight: restore(weight, 16, to_e2m1, 6, e4m3_scale, SEARCHED)),
    "int4-g32": (4.5, lambda weight: restore(weight, 32, to_int4, 7, half_precision)),
    "int4-g32, search": (4.5, lambda weight: restore(weight, 32, to_int4, 7, half_precision, SEARCHED)),
    "int4-g32, zero point": (4.625, int4_with_zero_point),
    "int4, NVFP4's blocks": (4.5, lambda weight: restore(weight, 16, to_int4, 7, e4m3_scale)),
}
RECORDED = ("mxfp4", "int4-g64", "nvfp4", "int4-g32")

# %%
quality, second, held_back, seconds = {}, {}, {}, {}


def measure(name, candidate):
    """Score a candidate on all windows, and where a record is written on the second text too."""
    quality[name] = evaluation.score(candidate, windows, reference)
    if name in RECORDED or name.startswith("fp8"):
        second[name] = evaluation.score(candidate, in_domain, in_domain_reference)
    if name in RECORDED:
        held_back[name] = evaluation.score(candidate, letter, letter_reference).kl_divergence


# %%
for name, (_, change) in FOUR_BITS.items():
    candidate = fresh()
    start = time.perf_counter()
    change_weights(candidate, change)
    seconds[name] = time.perf_counter() - start
    measure(name, candidate)
del candidate
memory.release()

# %%
start = time.perf_counter()
candidate = change_weights(fresh(), per_row("E4M3"))
seconds["fp8"] = seconds["fp8-weight-only"] = time.perf_counter() - start
measure("fp8-weight-only", candidate)
measure("fp8", round_inputs(candidate, dynamic("E4M3")))
del candidate
memory.release()

# %%
bits_of = {name: bits for name, (bits, _) in FOUR_BITS.items()} | {"fp8-weight-only": 8, "fp8": 8}
table = pd.DataFrame({
    name: {"bits": bits_of[name], "KL": scores.kl_divergence, "from": scores.kl_low, "to": scores.kl_high,
           "same top-1": scores.top1_agreement}
    for name, scores in quality.items()
}).T  # fmt: skip
table["KL, pydoc"] = pd.Series({name: scores.kl_divergence for name, scores in second.items()})
table.sort_values(["bits", "KL"]).round(4)

# %% [markdown]
# An order holds only if the interval of the **difference on the same windows** leaves zero out:


# %%
def compared(first, second):
    """(words, mean, low, high): the KL of the first minus that of the second."""
    mean, low, high = evaluation.difference(quality[first], quality[second])
    words = f"{second} is closer" if low > 0 else f"{first} is closer" if high < 0 else "not told apart"
    return words, mean, low, high


# %%
PAIRS = [
    ("int4-g64", "mxfp4"),
    ("int4-g32", "nvfp4"),
    ("int4-g32, zero point", "nvfp4"),
    ("int4, NVFP4's blocks", "nvfp4"),
    ("int4, NVFP4's blocks", "int4-g32"),
    ("int4-g32, search", "int4-g32"),
    ("mxfp4", "mxfp4, search"),
    ("nvfp4", "nvfp4, search"),
    ("mxfp4", "nvfp4"),
]
verdicts = pd.DataFrame({f"{first} minus {other}": compared(first, other) for first, other in PAIRS}).T
verdicts.columns = ["who", "difference of KL", "from", "to"]
verdicts.infer_objects().round(4)

# %% [markdown]
# For SmolLM2-135M every difference in this table is larger than its error. **NVFP4 is the closest format of 4.5 bits**:
# a KL of about 0.26 against 0.46 of INT4 in groups of 32. In NVFP4's own blocks INT4 levels give 0.42, so most of the
# gap is due to the levels, and the smaller blocks do the rest. At 4.25 bits MXFP4 (0.41) beats INT4 in groups of 64
# (0.58). With a zero point and 4.625 bits INT4 comes to 0.33, still behind NVFP4.
#
# The search of scales helps a little with E2M1: NVFP4 falls from 0.26 to 0.24. It does **not** close the gap for INT4.
# There it makes the model worse (0.46 to 0.57), although the squared error of no block grew. The search looks at the
# weights alone. [05 GPTQ](05_gptq.ipynb) and [06 AWQ](06_awq.ipynb) ask the inputs which error counts.
#
# FP8 costs 0.016 with rounded weights alone, and 0.028 with rounded inputs too.
#
# **A larger model orders them otherwise in two places.** We ran this notebook once with Qwen2.5-Coder-1.5B on an
# NVIDIA H200; its records come with the course.
#
# - NVFP4 wins again at 4.5 bits: 0.055 [0.052, 0.059] against 0.090 [0.085, 0.096] of INT4.
# - At 4.25 bits **INT4 wins there**: 0.118 [0.111, 0.125] against 0.151 [0.144, 0.160] of MXFP4.
# - The search of scales **helps INT4 there**: 0.090 falls to 0.080. It helps MXFP4 most: 0.151 falls to 0.102.
# - INT4 with a zero point and 4.625 bits comes to 0.048. It is ahead of NVFP4 there.
# - FP8 costs 0.006 with rounded weights alone, and 0.010 with rounded inputs too.

# %% jupyter={"source_hidden": true}
shown = [name for name in table.sort_values("KL", ascending=False).index if name in FOUR_BITS]
fig, ax = plt.subplots(figsize=(7, 3.4))
for row, name in enumerate(shown):
    scores = quality[name]
    ax.plot([scores.kl_low, scores.kl_high], [row, row], color=figures.PALETTE[1])
    ax.plot(scores.kl_divergence, row, "o", color=figures.PALETTE[1])
ax.set(yticks=range(len(shown)), yticklabels=[f"{name} ({bits_of[name]})" for name in shown])
ax.set(xlabel="KL divergence from the untouched model (left is better); in brackets: bits a weight")
ax.set_title("Four bits: levels, blocks and scales all count")
worst_name, best_name = shown[0], shown[-1]
figures.show(fig, alt=f"KL divergence of nine 4-bit formats of {found.name}, with intervals. {best_name} is "
             f"the closest with {quality[best_name].kl_divergence:.3f}, {worst_name} the farthest with "
             f"{quality[worst_name].kl_divergence:.3f}.",
             table=table.loc[shown, ["bits", "KL", "from", "to"]].round(3))  # fmt: skip

# %% [markdown]
# Last comes the letter, which no choice was made by. Does it put the four recorded formats in the same order?

# %%
orders = [sorted(RECORDED, key=key) for key in (lambda name: quality[name].kl_divergence, held_back.get)]
print("on the letter: " + ", ".join(f"{name} {held_back[name]:.3f}" for name in orders[1]))
print("the same order" if orders[0] == orders[1] else f"another order than {', '.join(orders[0])}")
least = min(quality[name].kl_low for name in RECORDED)
small_loss = quality["fp8-weight-only"].kl_high < least
assert small_loss or not found.name.startswith("SmolLM2"), "8 bits lose more than 4?"

# %% [markdown]
# ## The libraries
#
# **torchao** quantizes in place. Weights alone in FP8 run on a CPU. W8A8 wants a GPU of compute capability 8.9 or
# newer, and says so here. The codes of its weights are ours:

# %%
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, quantize_


def one_layer():
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = weight.clone()
    return torch.nn.Sequential(layer)


# %%
def outcome(attempt):
    """The first line of what an attempt says."""
    try:
        attempt()
        return "it runs"
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


# %%
torchao_layer = one_layer()
quantize_(torchao_layer, Float8WeightOnlyConfig())
their_weight = torchao_layer[0].weight
row_scale = weight.abs().amax(1, keepdim=True) / 448
different = (encode(weight / row_scale, E4M3) != their_weight.qdata.view(torch.uint8)).sum().item()
print(f"Float8WeightOnlyConfig: {different} of {weight.numel():,} codes differ from ours")
assert different == 0

# %% [markdown]
# **transformers** can quantize to FP8 while it loads (`FineGrainedFP8Config`, one scale for 128 x 128 weights), and to
# NVFP4 (`NVFP4Config`). We ask what these say on this machine:

# %%
from transformers import FineGrainedFP8Config, NVFP4Config


def load_with(config):
    place = {"": found.device}
    return AutoModelForCausalLM.from_pretrained(found.path, quantization_config=config, device_map=place)


# %%
said = {
    "torchao, Float8DynamicActivationFloat8WeightConfig": outcome(
        lambda: quantize_(one_layer().to(found.device), Float8DynamicActivationFloat8WeightConfig())),
    "transformers, FineGrainedFP8Config": outcome(lambda: load_with(FineGrainedFP8Config())),
    "transformers, NVFP4Config": outcome(lambda: load_with(NVFP4Config())),
}  # fmt: skip
with pd.option_context("display.max_colwidth", None):
    display(pd.Series(said, name="what it says").to_frame())

# %% [markdown]
# `NVFP4Config` only quantizes while loading, and reads no NVFP4 checkpoint. The source of transformers 5.23 says this
# about finished checkpoints (we read it and did not run it): FP8 in DeepSeek's layout (`quant_method` `fp8`) and the MXFP4 of
# gpt-oss (`mxfp4`) load on every machine. Where the hardware or a package lacks, the weights are restored to bfloat16
# with a warning, and the memory is that of bfloat16. The next section has the format that everybody reads.
#
# ### A checkpoint for everybody: compressed-tensors
#
# vLLM and transformers read FP8, MXFP4 and NVFP4 from checkpoints in the **compressed-tensors** format. Its usual
# writer is llm-compressor, which wants other versions of transformers than this course. In an environment of its own it
# takes three lines (not run here):
#
# ```python
# # python -m venv llmc && llmc/bin/pip install llmcompressor
# from llmcompressor import oneshot
# from llmcompressor.modifiers.quantization import QuantizationModifier
# oneshot(model="HuggingFaceTB/SmolLM2-135M-Instruct", output_dir="nvfp4",
#         recipe=QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=["lm_head"]))
# ```
#
# The format is plain, so we write it ourselves: per layer, the codes and scales under fixed names, and a
# `quantization_config` with a scheme. A16 in a scheme's name means that the inputs stay in 16 bits.

# %%
from compressed_tensors.quantization import preset_name_to_scheme

SCHEMES = {
    "fp8": ("FP8_DYNAMIC", "float-quantized"),
    "mxfp4": ("MXFP4A16", "mxfp4-pack-quantized"),
    "nvfp4": ("NVFP4A16", "nvfp4-pack-quantized"),
}


# %%
def packed(method, weight):
    """{name in the checkpoint: tensor} of one layer's weight."""
    rows = len(weight)
    if method == "fp8":
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / 448
        return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    if method == "mxfp4":
        codes, exponents = mx(weight)
        return {"weight_packed": pack(codes).view(rows, -1), "weight_scale": exponents.view(rows, -1)}
    codes, scales, tensor_scale = nvfp4(weight)
    return {"weight_packed": pack(codes).view(rows, -1), "weight_scale": scales.view(rows, -1),
            "weight_global_scale": (1 / tensor_scale).view(1)}  # fmt: skip


# %%
def tensors_of(net, method):
    """Every tensor of the checkpoint; the model's other tensors stay in bfloat16."""
    layers = linear_layers(net)
    head = next(name for name, module in net.named_modules() if module is net.get_output_embeddings())
    tied = {f"{head}.weight"} if net.config.tie_word_embeddings else set()
    kept = {name: tensor.bfloat16() for name, tensor in net.state_dict().items()
            if name not in tied and name.removesuffix(".weight") not in layers}  # fmt: skip
    for name, layer in layers.items():
        for part, tensor in packed(method, layer.weight.detach().float().cpu()).items():
            kept[f"{name}.{part}"] = tensor
    return {name: tensor.cpu().contiguous() for name, tensor in kept.items()}, head


# %%
def write_checkpoint(net, method):
    """A folder that plain `from_pretrained` and vLLM take; bytes of its tensors."""
    preset, layout = SCHEMES[method]
    tensors, head = tensors_of(net, method)
    scheme = preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json", exclude_none=True)
    config = AutoConfig.from_pretrained(found.path).to_dict()
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "ignore": [head], "config_groups": {"group_0": scheme}}  # fmt: skip
    with checkpoints.writing(output_dir, method) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        files.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(folder)
    return sum(tensor.nbytes for tensor in tensors.values())


# %%
weight_bytes = {method: write_checkpoint(net, method) for method in SCHEMES}
weight_bytes["fp8-weight-only"] = weight_bytes["fp8"]
{method: f"{size / 1e6:.1f} MB" for method, size in weight_bytes.items()}

# %% [markdown]
# A new process loads each folder with transformers alone. On a CPU transformers unpacks the weights at the first call,
# and for `fp8` it rounds the inputs of each layer as we did. The logits must equal those of our own restored weights.
# (FP4 is unpacked to bfloat16, whatever dtype is asked for: with `dtype=torch.float32` the first product stops with an
# error. So FP4 is loaded in bfloat16.)

# %%
RELOAD = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folders, dtypes, ids, out = json.loads(sys.argv[1])
logits = {}
for name, folder in folders.items():
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtypes[name])).eval()
    with torch.inference_mode():
        logits[name] = net(input_ids=torch.tensor(ids)).logits.float()
save_file(logits, out)
"""
dtypes = {"fp8": "float32", "mxfp4": "bfloat16", "nvfp4": "bfloat16"}
prompt = letter[:1, :64]
folders = {method: str(checkpoints.folder(output_dir, method)) for method in SCHEMES}

# %%
with tempfile.TemporaryDirectory() as scratch:
    order = json.dumps([folders, dtypes, prompt.tolist(), f"{scratch}/logits.safetensors"])
    done = subprocess.run([sys.executable, "-c", RELOAD, order], capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr[-1000:]
    elsewhere = load_file(f"{scratch}/logits.safetensors")


# %%
def restored_from(method, weight):
    """The weight that the checkpoint's own tensors stand for."""
    parts = packed(method, weight)
    if method == "fp8":
        return parts["weight"].float() * parts["weight_scale"]
    if method == "mxfp4":
        return restore_mx(weight)
    codes = nvfp4(weight)[0].view_as(weight)
    scale = parts["weight_scale"].float() / parts["weight_global_scale"]
    return decode(codes, E2M1) * scale.repeat_interleave(16, 1)


# %%
gaps = {}
for method in SCHEMES:
    here = fresh(getattr(torch, dtypes[method])).cpu()
    change_weights(here, lambda weight, method=method: restored_from(method, weight))
    if method == "fp8":
        round_inputs(here, dynamic("E4M3"))
    with torch.inference_mode():
        gaps[method] = (here(input_ids=prompt).logits.float() - elsewhere[method]).abs().max().item()
del here
print("largest difference of a logit: " + ", ".join(f"{method} {gap:.2g}" for method, gap in gaps.items()))
assert max(gaps.values()) < 1e-3, "the file predicts something else than the weights in memory"

# %% [markdown]
# vLLM takes the same folders (`vllm serve build/checkpoints/nvfp4`, on a GPU; not run here) and picks a kernel by the
# card.
#
# ## Which card does what
#
# *Native* means that the tensor cores multiply the format. *Marlin* and *Triton* are kernels that restore the weights
# to 16 bits inside the product: the memory is saved, the arithmetic is not. Nothing in this table was run for this
# notebook; each row names its source.
#
# | capability | cards, for example | FP8, W8A8 | FP8 weights | MXFP8 | MXFP4 | NVFP4 | source |
# |---|---|---|---|---|---|---|---|
# | 7.5 | T4, RTX 20 | no | Marlin | no | Triton, Marlin | Marlin | [FP8][vllm-fp8], [FP4][marlin], [Triton][hf] |
# | 8.0 | A100 | no | Marlin | no | Triton, Marlin | Marlin | [FP8][vllm-fp8], [FP4][marlin], [Triton][hf] |
# | 8.6 | A10, RTX 30 | no | Marlin | no | Triton, Marlin | Marlin | [FP8][vllm-fp8], [FP4][marlin], [Triton][hf] |
# | 8.9 | L4, RTX 40 | native | native | no | Triton, Marlin | Marlin | [matrix][te], [FP4][marlin], [Triton][hf] |
# | 9.0 | H100, H200 | native | native | no | Triton, Marlin | Marlin | [matrix][te], [FP4][marlin], [Triton][hf] |
# | 10.0 | B200 | native | native | native | native | native | [matrix][te], [instructions][cutlass] |
# | 12.0 | RTX 50 | native | native | in part | native ([vLLM 0.13: Marlin][sm120]) | native | [matrix][te] |
#
# [vllm-fp8]: https://docs.vllm.ai/en/v0.32.0/features/quantization/llm_compressor/fp8/
# [marlin]: https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/layers/quantization/utils/marlin_utils_fp4.py
# [hf]: https://huggingface.co/docs/transformers/quantization/mxfp4
# [te]: https://nvidia.github.io/TransformerEngine/support_matrix.html
# [cutlass]: https://docs.nvidia.com/cutlass/media/docs/cpp/blackwell_functionality.html
# [sm120]: https://github.com/vllm-project/vllm/issues/31085
#
# A library can lag behind its card: the matrix names MXFP8 as missing in Transformer Engine on 12.0, and NVFP4 as
# partial there.
#
# And what can your own card do? `python -m helpers doctor` says the same in a terminal.

# %%
from helpers.diagnosis import checks

if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), checks.formats(torch.cuda.get_device_capability()))
else:
    print("no CUDA GPU here. A capability of 8.6 would be:", checks.formats((8, 6)))

# %% [markdown]
# **Native is not always faster.** We measured FP8 on one NVIDIA H200 (capability 9.0; all rows in
# `notebooks/gpu/README.md`). A large product of 4,096 rows ran 2.0 times as fast as in bfloat16, with one scale a row.
# With a single row, as in decode, it ran 1.5 times as fast. A whole 7B shape then decoded *slower* than in fp16 for
# one request (200 against 215 tokens a second), and 1.6 times as fast for 32 requests at once.

# %% [markdown]
# ## What the guides claim
#
# The five guides that this course grew out of know integers and NF4. They say nothing about FP8, MXFP4 or NVFP4, so
# this table is empty. What [04 NF4](04_nf4_bitsandbytes.ipynb) calls FP4 is another format: bitsandbytes' own sixteen
# levels.

# %% jupyter={"source_hidden": true}
from helpers.publishing import claims

findings = []
claims.write(output_dir, notebook="09_float_formats", found=found, findings=findings)
claims.table(output_dir, "09_float_formats")

# %% [markdown]
# ## Exercises
#
# **1 (easy).** Decode a nibble. `code` is a whole number from 0 to 15: a sign bit, two bits of exponent, one of
# mantissa. Return its value in E2M1, without a table. Four lines.


# %%
def nibble(code):
    """The value of a 4-bit code."""
    ...


# %% jupyter={"source_hidden": true}
def test_nibble(function):
    assert function(2) is not None, "return a number"
    assert function(2) == 1, "0 01 0 is 1: exponent field 1 stands for 2 to the power of 0"
    assert function(7) == 6, "0 11 1 is 6: (1 + 1/2) times 4"
    assert function(1) == 0.5, "0 00 1 is 0.5: in exponent field 0 there is no hidden 1, and the step is 0.5"
    assert function(10) == -1, "1 01 0 is -1: the highest bit is the sign"
    right = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    wrong = [code for code in range(16) if function(code) != right[code % 8] * (-1 if code > 7 else 1)]
    assert not wrong, f"wrong for the codes {wrong}"


exercises.check(nibble, test_nibble)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def nibble(code):
        field, mantissa = code >> 1 & 3, code & 1
        value = 2.0 ** (field - 1) * (1 + mantissa / 2) if field else mantissa / 2
        return -value if code & 8 else value

    exercises.require(nibble, test_nibble)


# %% [markdown]
# **2 (medium).** Choose a scale. Return the whole number `e` for which the scale `2**e` gives the block `block` the
# smallest squared error in E2M1. `to_e2m1(values)` rounds. Try the exponents from -12 to 12. Three lines.


# %%
def best_exponent(block):
    """The exponent of the best scale of a block."""
    ...


# %% jupyter={"source_hidden": true}
def test_exponent(function):
    first = torch.tensor([6.0, 3.0, -1.5, 0.5])
    assert function(first) is not None, "return a whole number"
    assert function(first) == 0, "all four are values of E2M1, so the scale is 1 and e is 0"
    assert function(first / 8) == -3, "an eighth of it needs the scale 1/8: e is -3, a scale may be below 1"
    even = torch.tensor([7.9, 4.0, -2.0, 6.0, 1.0])
    assert function(even) == 1, "7.9 is worth a larger scale here: cutting 7.9 to 6 costs 3.61"
    many_large = torch.tensor([6.6] + [1.4, -2.9, 3.1, 0.6] * 7)
    assert function(many_large) == 0, "cutting 6.6 to 6 costs 0.36, and the step of the others stays small"


exercises.check(best_exponent, test_exponent)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def best_exponent(block):
        errors = {e: (to_e2m1(block / 2.0**e) * 2.0**e - block).square().sum().item() for e in range(-12, 13)}
        return min(errors, key=errors.get)

    exercises.require(best_exponent, test_exponent)


# %% [markdown]
# **3 (medium).** Predict, then measure. Write down the order of `"mxfp4"`, `"nvfp4"`, `"int4-g64"` and `"int4-g32"`
# before you look at the table again, the smallest KL first. What decides: the bits, the block, the scale or the levels?
# One line: return the list.


# %%
def predicted_order():
    """The four formats, smallest KL first."""
    ...


# %% jupyter={"source_hidden": true}
def test_order(function):
    order = function()
    assert order is not None, "return a list of four names"
    assert sorted(order) == sorted(RECORDED), f"each of {', '.join(RECORDED)} once"
    for first, then in zip(order, order[1:], strict=False):
        mean, low, _ = evaluation.difference(quality[first], quality[then])
        assert low <= 0, f"{then} is closer than {first}: the difference of their KL is {mean:.3f}"
    print("your order: " + ", ".join(f"{name} {quality[name].kl_divergence:.3f}" for name in order))


exercises.check(predicted_order, test_order)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def predicted_order():
        return sorted(RECORDED, key=lambda name: quality[name].kl_divergence)

    exercises.require(predicted_order, test_order)

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("09_float_formats")

# %% [markdown]
# ## Takeaways
#
# 1. **A small float is an exponent, a mantissa and a rounding rule.** Fifteen lines give every code of torch, torchao
#    and, but for halfway cases, gguf.
# 2. **A float keeps its relative error.** With one scale a layer, INT8 inputs cost SmolLM2-135M a KL of about 1.0 and
#    FP8 inputs 0.04. With one scale a token both work.
# 3. **At 4.5 bits NVFP4 beats symmetric INT4 on both models**: 0.26 against 0.46, and 0.055 against 0.090 with 1.5
#    billion parameters. At 4.25 bits MXFP4 wins on the small model (0.41 against 0.58) and loses on the large one
#    (0.151 against 0.118). Whether FP4 is also fast is a question to your card.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% jupyter={"source_hidden": true} tags=["record"]
parameters = memory.predict(AutoConfig.from_pretrained(found.path)).parameters
rest_bytes = weight_bytes["mxfp4"] - weight_count * 4.25 / 8
for name in (*RECORDED, "fp8", "fp8-weight-only"):
    size = weight_bytes.get(name, round(rest_bytes + weight_count * bits_of[name] / 8))
    records.write(
        output_dir, method=name, notebook="09_float_formats", found=found, windows=windows,
        scores=quality[name], in_domain=(in_domain, second[name]),
        bits_per_weight=8 * size / parameters, weight_bytes=size, quantize_seconds=seconds[name],
        peak_memory_bytes=None, decode_tokens_per_s=None)  # fmt: skip  # emulated: its speed is no format's
