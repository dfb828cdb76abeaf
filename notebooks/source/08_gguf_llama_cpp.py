# %% [markdown]
# # 08 GGUF and llama.cpp
#
# Open the kind of file that most people without a GPU run a model from, write one, and talk to it through llama.cpp.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Rebuild the block formats Q8_0, Q4_0, Q4_1 and Q4_K, and get the same bytes and numbers as the libraries.
# 2. Write the whole model to GGUF files, with and without an importance matrix, and say what a name such as Q4_K_M
#    really holds.
# 3. Run the files in llama.cpp's server, and measure quality, size and speed against transformers in the same run.
#
# **Before you start:** [00 Start here](00_start_here.ipynb) for the measure of quality, [04
# NF4](04_nf4_bitsandbytes.ipynb) for blocks and their scales.

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
calibration_tokens = 4096
new_tokens = 32
port = 0

# %% jupyter={"source_hidden": true}
import collections
import contextlib
import functools
import io
import json
import logging
import math
import os
import pathlib
import re
import socket
import struct
import tempfile
import time
import types

# %% jupyter={"source_hidden": true}
import gguf
import libgguf
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import requests
import torch
import xllamacpp
from IPython.utils.capture import capture_output
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers import chat, checkpoints, evaluation, exercises, figures, files, memory, models, records, speed, training
from helpers.chat import llama

# %%
figures.style()
logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)  # it reports every step
Type = gguf.GGMLQuantizationType

# %%
found = models.find(model, copies=2.5)
config = AutoConfig.from_pretrained(found.path)
tokenizer = AutoTokenizer.from_pretrained(found.path)
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}  # transformers' name: GGUF's
if config.model_type not in ARCHITECTURES:
    raise ValueError(f"this notebook writes {', '.join(ARCHITECTURES)} models, not {config.model_type}")
print(f"{found.name} on the {found.device.upper()}, {found.origin}")

# %%
windows = evaluation.windows(tokenizer, tokens=eval_tokens)  # four genres, in turn
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
reference = evaluation.reference(found, windows)
in_domain_reference = evaluation.reference(found, in_domain)

# %% [markdown]
# ## The idea: one file, and in it blocks of weights
#
# A GGUF file holds everything: what the model is, its tokenizer, its chat template, its weights. Here is the smallest
# one that makes a point, with one entry of metadata and one tensor of 32 weights. Read its bytes from left to right:

# %%
with tempfile.TemporaryDirectory() as scratch:
    writer = gguf.GGUFWriter(path := pathlib.Path(scratch) / "one.gguf", "llama")
    ramp = np.linspace(-1.27, 1.27, 32, dtype=np.float32)
    writer.add_tensor("w", gguf.quantize(ramp, Type.Q8_0), raw_dtype=Type.Q8_0)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    one_file = path.read_bytes()

# %%
known = struct.unpack("<IQQ", one_file[4:24])
place = one_file.index(b"w", 64)  # behind the metadata
start = place + 1 + 4 + 8 + 4 + 8  # name, number of dimensions, size, type, offset
start += -start % 32
shown = {
    "letters": one_file[:4],
    "version, tensors, entries": known,
    "first entry": one_file[32:52],
    "its text": one_file[64:69],
    "name of the tensor": one_file[place : place + 1],
    "dimensions, size, type": struct.unpack("<IQI", one_file[place + 1 : place + 17]),
    "scale of the block": np.frombuffer(one_file, np.float16, 1, start)[0],
    "first codes": np.frombuffer(one_file, np.int8, 5, start + 2),
}
pd.Series(shown, name="value").to_frame()

# %% [markdown]
# The last two lines are a **block**: 32 neighbours of one row as signed bytes (the *codes*) and one number that they
# are all multiplied with (the *scale*). This type is called Q8_0. Four weights are enough to do it by hand. The
# largest magnitude, 1.27, becomes the code 127. So the scale is 0.01, and each weight is rounded to a multiple of it:

# %%
four = np.array([0.314, -1.27, 0.052, 0.637], np.float32)
scale = abs(four).max() / 127
codes = (four / scale).round()
pd.DataFrame({"weight": four, "code": codes, "restored": codes * scale}).round(3)

# %% [markdown]
# A block of Q8_0 takes a byte a weight and two bytes for the scale. That is 34 bytes for 32 weights, or **8.5 bits a
# weight**. Four bits give 16 codes, and there are two ways to place them. **Q4_0** has a scale alone: its codes -8 to
# 7 are multiples of it, and the weight with the largest magnitude gets -8. **Q4_1** has a scale and a minimum: its
# codes 0 to 15 reach from the smallest weight to the largest. The picture shows one block of the model on both grids:


# %% jupyter={"source_hidden": true}
def read_weight(name):
    """One tensor of the model's safetensors, as a float32 array."""
    for file in sorted(pathlib.Path(found.path).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():
                return tensors.get_tensor(name).float().numpy()
    raise ValueError(f"there is no tensor {name} in {found.name}")


middle = config.num_hidden_layers // 2
down_name = f"model.layers.{middle}.mlp.down_proj"
weight = read_weight(f"{down_name}.weight")
block = weight[0, :32]

# %% jupyter={"source_hidden": true}
largest = block[abs(block).argmax()]
grids = {
    "Q4_0": largest / -8 * (np.arange(16) - 8),
    "Q4_1": np.linspace(block.min(), block.max(), 16),
}
nearest = {name: abs(block[:, None] - levels).min(1) for name, levels in grids.items()}
distances = pd.DataFrame(
    {name: {"step": abs(levels[1] - levels[0]), "mean error": nearest[name].mean()} for name, levels in grids.items()}
).T

# %% jupyter={"source_hidden": true}
fig, axes = plt.subplots(2, 1, figsize=(7, 2.6), sharex=True, layout="constrained")
for ax, (name, levels) in zip(axes, grids.items()):
    ax.eventplot(levels, lineoffsets=0, linelengths=1, color=figures.PALETTE[0])
    ax.plot(block, np.zeros(32), "o", color=figures.PALETTE[1], markersize=4)
    ax.set(yticks=[], ylabel=name)
axes[0].set_title("With a minimum of its own, the grid ends where the weights end")
axes[1].set_xlabel("value (dots: the 32 weights, lines: the 16 levels)")
ratio = distances["mean error"]["Q4_1"] / distances["mean error"]["Q4_0"]
figures.show(
    fig,
    alt=f"One block of 32 weights of {found.name} on the 16 levels of Q4_0 and of Q4_1. The "
    f"mean distance to the nearest level of Q4_1 is {ratio:.2f} of that of Q4_0.",
    table=distances.round(5),
)


# %% [markdown]
# ## From scratch: blocks of 32
#
# The scale is kept as a float16, two bytes. A block of zeros has scale 0, and dividing by it must not give NaN.


# %%
def inverse(scale):
    """1 / scale, and 0 where the scale is 0."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def as_bytes(values):
    """Numbers [n, 1] as float16, seen as bytes [n, 2]."""
    return values.astype(np.float16).view(np.uint8)


def two_in_a_byte(codes):
    """4-bit codes [n, 32] in bytes [n, 16]: the first half in the low bits, the second in the high ones."""
    return codes[:, :16] | codes[:, 16:] << 4


# %%
def q8_0(rows):
    """float32 [rows, columns] -> bytes [rows, 34 * columns / 32]."""
    blocks = rows.reshape(-1, 32)
    scale = abs(blocks).max(1, keepdims=True) / 127
    magnitudes = abs(blocks * inverse(scale))
    whole = np.floor(magnitudes)
    codes = np.sign(blocks) * (whole + (magnitudes - whole >= 0.5))  # halves go away from zero, as in C
    return np.concatenate([as_bytes(scale), codes.astype(np.int8).view(np.uint8)], 1).reshape(len(rows), -1)


# %%
def q4_0(rows):
    """float32 [rows, columns] -> bytes [rows, 18 * columns / 32]."""
    blocks = rows.reshape(-1, 32)
    largest = np.take_along_axis(blocks, abs(blocks).argmax(1, keepdims=True), 1)
    scale = largest / -8
    codes = (blocks * inverse(scale) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([as_bytes(scale), two_in_a_byte(codes)], 1).reshape(len(rows), -1)


def q4_1(rows):
    """float32 [rows, columns] -> bytes [rows, 20 * columns / 32]."""
    blocks = rows.reshape(-1, 32)
    low = blocks.min(1, keepdims=True)
    scale = (blocks.max(1, keepdims=True) - low) / 15
    codes = ((blocks - low) * inverse(scale) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([as_bytes(scale), as_bytes(low), two_in_a_byte(codes)], 1).reshape(len(rows), -1)


# %% [markdown]
# The way back reads the bytes of each block:


# %%
def half(blocks, at):
    """The float16 at byte `at` of every block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def two_from_a_byte(packed):
    return np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32)


# %%
def decode_q8_0(data):
    blocks = data.reshape(-1, 34)
    return half(blocks, 0) * blocks[:, 2:].view(np.int8)


def decode_q4_0(data):
    blocks = data.reshape(-1, 18)
    return half(blocks, 0) * (two_from_a_byte(blocks[:, 2:]) - 8)


def decode_q4_1(data):
    blocks = data.reshape(-1, 20)
    return half(blocks, 0) * two_from_a_byte(blocks[:, 4:]) + half(blocks, 2)


# %% [markdown]
# The package `gguf` has the same quantizers. Ours must give **every byte** and every number as it does:

# %%
ours = {Type.Q8_0: (q8_0, decode_q8_0), Type.Q4_0: (q4_0, decode_q4_0), Type.Q4_1: (q4_1, decode_q4_1)}
rows = {}
for kind, (encode_ours, decode_ours) in ours.items():
    data = encode_ours(weight)
    restored = decode_ours(data).reshape(weight.shape)
    different = (data != gguf.quantize(weight, kind)).sum() + (restored != gguf.dequantize(data, kind)).sum()
    error = np.linalg.norm(restored - weight) / np.linalg.norm(weight)
    rows[kind.name] = [8 * data.size / weight.size, error, different]

# %%
blocks_of_32 = pd.DataFrame(rows, index=["bits per weight", "relative error", "numbers that differ"]).T
assert not blocks_of_32["numbers that differ"].any(), "other bytes than gguf"
blocks_of_32.round(4)


# %% [markdown]
# ## A K-quant: the scales are quantized too
#
# Q4_1 spends 32 bits on the scale and the minimum of 32 weights. **Q4_K** takes eight such blocks together, a
# *super-block* of 256 weights. The eight scales become whole numbers from 0 to 63 (6 bits) times one float16, and so
# do the eight minima:
#
# | part of a super-block | bytes |
# |---|---|
# | unit of the scales, unit of the minima (float16 each) | 4 |
# | 8 scales and 8 minima, 6 bits each | 12 |
# | 256 codes, 4 bits each | 128 |
#
# 144 bytes for 256 weights are **4.5 bits a weight**: the size of Q4_0 with the minimum of Q4_1. A weight is restored
# as `unit * scale * code - unit of minima * minimum`. The 6-bit numbers do not fit whole bytes, so their upper two
# bits lie apart:


# %%
def unpack_six_bits(packed):
    """bytes [n, 12] -> 8 scales and 8 minima, 0 to 63, each [n, 8]."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], 1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], 1)
    return scales, minima


def decode_q4_k(data):
    """bytes -> float32 [super-blocks, 256]."""
    blocks = data.reshape(-1, 144)
    scales, minima = unpack_six_bits(blocks[:, 4:16])
    pairs = blocks[:, 16:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([pairs & 15, pairs >> 4], 2).reshape(-1, 8, 32)
    step, low = half(blocks, 0) * scales, half(blocks, 2) * minima
    return (step[..., None] * codes - low[..., None]).reshape(-1, 256)


# %% [markdown]
# `gguf` decodes K-quants and cannot encode them. [libgguf](https://pypi.org/project/libgguf/) carries llama.cpp's own
# encoders. We decode its bytes with our function and with gguf's:

# %%
samples = weight.reshape(-1)[: weight.size // 256 * 256].reshape(-1, 256)  # a row is a super-block
theirs = libgguf.quantize_rows(samples, int(Type.Q4_K))
decoded = decode_q4_k(theirs)
assert np.array_equal(decoded, gguf.dequantize(theirs, Type.Q4_K))
error = np.linalg.norm(decoded - samples) / np.linalg.norm(samples)
print(f"{decoded.size:,} numbers, all equal; relative error {error:.4f}")


# %% [markdown]
# Encoding is a search, because the file format leaves it open which scale and minimum to take. For each block we try
# 21 grids and round to each. Then we solve for the best scale and minimum of those codes, and the next try starts
# from the best minimum so far. To solve means to fit a straight line through 32 points by weighted least squares:
# `value = scale * code - minimum`. The four cells of this search are folded. Open them if you want to write an
# encoder.


# %% jupyter={"source_hidden": true}
def fit_line(values, weights, codes):
    """Scale, minimum, weighted squared error and the codes' weight of the best line through (code, value)."""

    def total(numbers):
        return (weights * numbers).sum(-1, keepdims=True)

    count, first, second = total(np.ones_like(codes)), total(codes), total(codes * codes)
    value, product = total(values), total(values * codes)
    spread = count * second - first * first
    flat = spread <= 1e-5 * count * second  # all codes are equal
    safe = np.where(flat, 1, spread)
    scale, low = (count * product - value * first) / safe, (value * second - first * product) / safe
    low = np.where(flat, np.where(second > 0, 0, value * inverse(count)), low)
    scale = np.where(flat | (low > 0), product * inverse(second), scale)  # then the line goes through zero
    low = np.minimum(low, 0)
    return scale, -low, total((scale * codes + low - values) ** 2), second


# %% jupyter={"source_hidden": true}
def fit_blocks(values, weights, tries=21):
    """The best scale and minimum of blocks [n, 8, 32], and the weight of a scale's error, each [n, 8]."""
    high, low = values.max(-1, keepdims=True), np.minimum(values.min(-1, keepdims=True), 0)
    best = [np.zeros_like(low), -low, np.full_like(low, np.inf), np.zeros_like(low)]
    for top in np.linspace(14, 16, tries, dtype=np.float32):
        low = -best[1]  # the best minimum so far
        codes = np.rint((values - low) * top * inverse(high - low)).clip(0, 15)
        fitted = fit_line(values, weights, codes)
        better = fitted[2] < best[2]
        best = [np.where(better, new, old) for new, old in zip(fitted, best)]
    scale, minimum, _, scale_weight = (part[..., 0] for part in best)
    return scale, minimum, scale_weight


# %% [markdown]
# We round the eight scales of a super-block to 6 bits in the same way: we try some units and keep the best.


# %% jupyter={"source_hidden": true}
def six_bits(values, weights):
    """values [n, 8] -> (unit float16 [n, 1], codes 0 to 63 [n, 8]) with a small weighted error."""
    best, unit, codes = np.inf, 0, 0
    largest = np.maximum(values.max(1, keepdims=True), 1e-12)
    for top in range(55, 68):
        tried = np.rint(values * top / largest).clip(0, 63)
        square = np.maximum((weights * tried * tried).sum(1, keepdims=True), 1e-20)
        step = ((weights * values * tried).sum(1, keepdims=True) / square).astype(np.float16)
        error = (weights * (step.astype(np.float32) * tried - values) ** 2).sum(1, keepdims=True)
        better = error < best
        best, unit = np.where(better, error, best), np.where(better, step, unit)
        codes = np.where(better, tried, codes)
    return unit.astype(np.float16), codes.astype(np.uint8)


# %%
def q4_k(rows, importance=None):
    """float32 [rows, columns], columns a multiple of 256 -> bytes [super-blocks, 144]."""
    values = rows.reshape(-1, 8, 32)
    weights = error_weights(rows, importance)
    scales, minima, scale_weights = fit_blocks(values, weights)
    unit, scales = six_bits(scales, scale_weights)
    low_unit, minima = six_bits(minima, weights.sum(-1))
    step, low = unit.astype(np.float32) * scales, low_unit.astype(np.float32) * minima
    codes = np.rint((values + low[..., None]) * inverse(step)[..., None]).clip(0, 15).astype(np.uint8)
    pairs = codes.reshape(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([as_bytes(unit), as_bytes(low_unit), pack_six_bits(scales, minima), nibbles], 1)


# %% jupyter={"source_hidden": true}
def pack_six_bits(scales, minima):
    """The inverse of `unpack_six_bits`."""
    upper = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, minima)]
    return np.concatenate([*upper, scales[:, 4:] & 15 | minima[:, 4:] << 4], 1)


# %% [markdown]
# Which error counts how much? Without anything else known, llama.cpp lets large weights count more. With an
# **importance** for each input column it lets the columns count that see large inputs:


# %%
def error_weights(rows, importance=None):
    """The weight of every squared error, [super-blocks, 8, 32]."""
    values = rows.reshape(-1, 8, 32)
    if importance is None:
        return np.sqrt((values**2).mean(-1, keepdims=True)) + abs(values)
    typical = 2 * (rows.reshape(-1, 1, 256) ** 2).mean(-1, keepdims=True)
    return np.tile(importance, len(rows)).reshape(values.shape) * np.sqrt(typical + values**2)


# %%
def weighted_error(restored, importance=None):
    """Weighted squared error of the sample, as the encoders see it."""
    difference = (restored.reshape(samples.shape) - samples) ** 2
    return (error_weights(samples, importance).reshape(samples.shape) * difference).sum()


mine = gguf.dequantize(q4_k(samples), Type.Q4_K)
against_library = weighted_error(mine) / weighted_error(decoded)
print(f"our weighted error is {against_library:.3f} of the library's")
assert against_library < 1.02


# %% [markdown]
# ## An importance matrix, from scratch
#
# A layer multiplies each column of its weight with one input channel. An error in a column counts as much as that
# channel is loud. So the importance of a column is its **mean squared input** on some text. llama.cpp calls the
# collection of these numbers an *imatrix*. We collect it on Python's documentation, from topics that no evaluation
# text holds.


# %%
def importance_matrix(net, text):
    """{module: mean squared input of each column, float32} of the decoder's Linear layers."""
    totals = {}

    def watch(name):
        def hook(_, args):
            totals[name] = totals.get(name, 0) + args[0].flatten(0, -2).float().square().sum(0)

        return hook

    layers = ((name, module) for name, module in net.named_modules() if isinstance(module, torch.nn.Linear))
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers if name != "lm_head"]
    with torch.inference_mode():
        for batch in text.to(net.device).split(4):
            net.model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: (total / text.numel() + 1e-12).cpu().numpy() for name, total in totals.items()}


# %%
calibration = evaluation.windows(tokenizer, "calibration", calibration_tokens, source="pydoc")
net = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.fast).to(found.device).eval()
importance = importance_matrix(net, calibration)
del net
memory.release()
loud = np.sort(importance[down_name])[::-1]
print(
    f"{len(importance)} layers; in the one above, the loudest 1 % of the columns hold "
    f"{loud[: len(loud) // 100].sum() / loud.sum():.0%} of the mean squared input"
)


# %% [markdown]
# Now both encoders get the importance. We compare the error that the layer's *output* would have if its input
# channels were independent.


# %%
def output_error(data):
    """Squared error of the weight, each column weighted by its mean squared input."""
    restored = gguf.dequantize(data, Type.Q4_K).reshape(weight.shape)
    return float((importance[down_name] * (restored - weight) ** 2).sum())


if weight.shape[1] % 256 == 0:
    plain = output_error(theirs)
    library = output_error(libgguf.quantize_rows(weight, int(Type.Q4_K), importance[down_name]))
    scratch = output_error(q4_k(weight, importance[down_name]))
    print(
        f"the library's error with the importance matrix is {library / plain:.2f} of that without, "
        f"ours {scratch / plain:.2f}"
    )
    assert scratch < 1.02 * library


# %% [markdown]
# ## What a name promises, and what the shapes allow
#
# Q8_0 and Q4_K are types of a *tensor*. **Q4_K_M** and **Q2_K** are names of a *recipe* for the whole file: most
# tensors get the type in the name, and some get more bits. The table has llama.cpp's recipes in short:
#
# | | Q4_K_M | Q2_K |
# |---|---|---|
# | output head (or the embedding that serves as one) | Q6_K | Q6_K |
# | value projection | Q6_K in half of the layers, Q4_K in the others | Q3_K (Q4_K if 4 query heads share a key) |
# | feed-forward down projection | Q6_K in half of the layers, Q4_K in the others | Q3_K |
# | attention output | Q4_K | Q3_K |
# | all other matrices | Q4_K | Q2_K |
# | norms, biases | float32 | float32 |


# %%
def more_bits(layer, layers):
    """True for the layers that get more: the first and the last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


# %% jupyter={"source_hidden": true}
def asked_type(recipe, name, config):
    """The type that a recipe asks for; name: a matrix in GGUF's words."""
    if recipe in ("F16", "Q8_0"):
        return Type[recipe]
    if recipe == "MXFP4_Q2_K":
        return Type.Q2_K
    if name.startswith("token_embd." if config.tie_word_embeddings else "output."):
        return Type.Q6_K
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if recipe == "Q4_K_M":
        rich = part in ("attn_v", "ffn_down") and more_bits(int(name.split(".")[1]), config.num_hidden_layers)
        return Type.Q6_K if rich else Type.Q4_K
    if part == "attn_v" and config.num_attention_heads >= 4 * config.num_key_value_heads:
        return Type.Q4_K
    return Type.Q3_K if part in ("attn_v", "ffn_down", "attn_output") else Type.Q2_K


# %% [markdown]
# The trap: a K-quant needs rows of a multiple of 256 weights. llama.cpp does not fail on other rows. It **falls
# back** to a type with blocks of 32, and that type is larger:

# %%
FALLBACK = {Type.Q2_K: Type.IQ4_NL, Type.Q3_K: Type.IQ4_NL, Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}


def given_type(asked, columns, recipe=""):
    """The type that rows of this length can have."""
    smaller = Type.MXFP4 if recipe == "MXFP4_Q2_K" else FALLBACK.get(asked, asked)
    for kind in (asked, smaller, Type.F16):
        if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            return kind


def bits_of(kind):
    """Bits per weight of a tensor's type, its scales included."""
    size, byte_count = gguf.GGML_QUANT_SIZES[kind]
    return 8 * byte_count / size


# %%
pd.DataFrame(
    [[asked.name, bits_of(asked), kind.name, bits_of(kind)] for asked, kind in FALLBACK.items()],
    columns=["asked", "bits per weight", "fallback", "bits per weight "],
)


# %% [markdown]
# Shapes follow from the config, so each file's size can be told before it is written. `gguf` knows how transformers'
# names translate: `model.layers.5.mlp.down_proj` is `blk.5.ffn_down`.


# %% jupyter={"source_hidden": true}
@functools.cache
def names_in_gguf(architecture, layers):
    """gguf's translation of module names."""
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[architecture], layers)


def name_in_gguf(key, config):
    """GGUF's name of a parameter."""
    module, kind = key.rsplit(".", 1)
    names = names_in_gguf(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    return f"{names.get_name(module)}.{kind}"


name_in_gguf("model.layers.5.mlp.down_proj.weight", config)


# %% jupyter={"source_hidden": true}
def matrices_of(config):
    """{name: shape} of every matrix; nothing is allocated."""
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    return {name: weight.shape for name, weight in net.named_parameters() if weight.dim() == 2}


def plan(recipe, config):
    """DataFrame of every matrix: weights, type asked, type given, bytes."""
    rows = []
    for key, shape in matrices_of(config).items():
        asked = asked_type(recipe, name_in_gguf(key, config), config)
        kind = given_type(asked, shape[1], recipe)
        rows.append([key, shape.numel(), asked.name, kind.name, shape.numel() * bits_of(kind) / 8])
    return pd.DataFrame(rows, columns=["matrix", "weights", "asked", "given", "bytes"])


# %%
others = {"Qwen2.5-Coder-1.5B": models.qwen_config(), "Mistral-7B": models.mistral_config()}
promised = {}
for name, shape in {**others, found.name: config}.items():
    for recipe in ("Q4_K_M", "Q2_K"):
        matrices = plan(recipe, shape)
        total = matrices.weights.sum()
        fell = matrices.weights[matrices.asked != matrices.given].sum() / total
        promised[name, recipe] = [shape.hidden_size, 8 * matrices.bytes.sum() / total, 100 * fell]
promised = pd.DataFrame(promised, index=["row length", "bits per weight", "fell back, %"]).T
promised.round(2)

# %%
own = promised.loc[found.name]
for recipe in own.index:
    print(
        f"{recipe} of {found.name}: {own['fell back, %'][recipe]:.0f} % of the weights fall back, "
        f"{own['bits per weight'][recipe]:.2f} bits a weight. "
        f"Mistral-7B: {promised['bits per weight']['Mistral-7B', recipe]:.2f} bits"
    )


# %% [markdown]
# The same name is another file on another model. Where the rows are 576 long, a file called Q2_K holds more than 5
# bits a weight. Can such a model go below 4 bits at all? These types have blocks that divide its rows:

# %%
for_weights = {kind: size for kind, (size, _) in gguf.GGML_QUANT_SIZES.items() if size > 1 and kind.name[:3] != "Q8_"}
fitting = {kind.name: bits_of(kind) for kind, size in for_weights.items() if config.hidden_size % size == 0}
pd.Series(fitting, name="bits per weight").sort_values().head(8).to_frame()

# %%
smallest = plan("MXFP4_Q2_K", config)
print(f"{8 * smallest.bytes.sum() / smallest.weights.sum():.2f} bits a weight with MXFP4 and Q2_K")
smallest.groupby("given")[["weights", "bytes"]].sum().assign(bits=lambda sums: 8 * sums.bytes / sums.weights)

# %% [markdown]
# The smallest of them is **MXFP4** ([09](09_float_formats.ipynb)) with 4.25 bits. So 4.25 bits is the floor for rows
# of 576, whatever a recipe is called. The down projections have rows of 1,536, six times 256, and take Q2_K. The two
# together stay below 4 bits. We write that file too. No recipe of llama.cpp makes it, and its quality will tell why.
#
# ## Write a file
#
# A writer translates four things: the **tokenizer**, the **end token and the template**, the **sizes**, and the
# **tensors**. The cells are folded, because they hold no new idea. But each of them can spoil a file silently: open
# them when your own converted model answers nonsense.
#
# The tokenizer's rule that cuts text into words is stored as a *name* that llama.cpp must know:

# %% jupyter={"source_hidden": true}
RULES = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm", ("Split", "ByteLevel"): "qwen2"}


def token_lists(data, size):
    """Tokens and their types, in the order of their ids; data: what tokenizer.json holds."""
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [gguf.TokenType.UNUSED] * size
    for token, number in data["model"]["vocab"].items():
        is_byte = data["model"].get("byte_fallback") and token.startswith("<0x")
        tokens[number], kinds[number] = token, gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for added in data["added_tokens"]:
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], special
    return tokens, kinds


# %% jupyter={"source_hidden": true}
def rule_of(data):
    """llama.cpp's name of a pre-tokenizer; data: what tokenizer.json holds."""
    rule = data.get("pre_tokenizer") or {}
    steps = tuple(step["type"] for step in rule.get("pretokenizers", [rule]) if step)
    if steps not in RULES:
        raise ValueError(f"no name in llama.cpp is known here for the pre-tokenizer {steps}")
    return RULES[steps]


# %% jupyter={"source_hidden": true}
def add_tokenizer(writer, tokenizer, config):
    """What turns text into ids: pairs to merge, or pieces with scores as in Mistral's tokenizer."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())  # as it is used, which may not be as it was saved
    tokens, kinds = token_lists(data, config.vocab_size)
    pieces = bool(data["model"].get("byte_fallback"))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else rule_of(data))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if pieces:
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
    else:
        merges = data["model"]["merges"]  # pairs, or texts in older files
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


# %% [markdown]
# The next two cells translate the template, the token that ends an answer, and the sizes:


# %% jupyter={"source_hidden": true}
def add_conversation(writer, tokenizer):
    """Chat template, first token, and the token at which an answer ends."""
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    first = tokenizer("a").input_ids[0]
    writer.add_add_bos_token(first == tokenizer.bos_token_id)


# %% jupyter={"source_hidden": true}
def add_sizes(writer, config):
    """The hyperparameters that llama.cpp builds the network from."""
    scaling = config.rope_parameters.get("rope_type", "default")
    if scaling != "default":
        raise ValueError(f"rope scaling {scaling!r} is not written by this notebook")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


# %% [markdown]
# Rotary embeddings turn pairs of numbers in each head of queries and keys. transformers pairs the first half of a
# head with the second, llama.cpp's `llama` pairs neighbours. So the rows of these two projections change their order.
# A file without that step loads, and answers nonsense.


# %% jupyter={"source_hidden": true}
def rotary_heads(key, config):
    """Heads of a projection whose rows change their order, else 0."""
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return counts.get(key.split(".")[-2], 0) if ARCHITECTURES[config.model_type] == "llama" else 0


def pairs_side_by_side(weight, heads):
    """From transformers' order of rows to llama.cpp's."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else weight


def halves_apart(weight, heads):
    """And back."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else weight


# %% jupyter={"source_hidden": true}
def encoded(values, kind, importance=None):
    """A tensor's bytes in a type of GGUF; importance: of each column, or None."""
    if kind == Type.F32:
        return values
    if kind == Type.F16:
        return values.astype(np.float16)
    return libgguf.quantize_rows(values, int(kind), importance)


# %% jupyter={"source_hidden": true}
def add_tensors(writer, folder, config, recipe, importance):
    """Every weight, in its type; matrices by libgguf, the rest in float32."""
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for key in stored.keys():
                if key == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                values = pairs_side_by_side(stored.get_tensor(key).float(), rotary_heads(key, config))
                values, name = values.contiguous().numpy(), name_in_gguf(key, config)
                kind = Type.F32
                if values.ndim == 2:
                    kind = given_type(asked_type(recipe, name, config), values.shape[1], recipe)
                data = encoded(values, kind, importance.get(key.removesuffix(".weight")))
                writer.add_tensor(name, data, raw_dtype=kind)


# %% [markdown]
# The file appears under its name only when it is whole. Who reads it never sees half of it, and a full disk leaves
# nothing behind.

# %% jupyter={"source_hidden": true}
FILE_TYPES = {name: gguf.LlamaFileType[f"MOSTLY_{name}"] for name in ("F16", "Q8_0", "Q4_K_M", "Q2_K")}
FILE_TYPES["MXFP4_Q2_K"] = gguf.LlamaFileType.MOSTLY_Q2_K


def described(path, recipe):
    """A writer with all metadata of the model, and no tensor yet."""
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_name(found.name)
    writer.add_file_type(FILE_TYPES[recipe])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    add_tokenizer(writer, tokenizer, config)
    add_conversation(writer, tokenizer)
    return writer


# %%
def write_gguf(path, recipe, importance=None, source=found.path):
    """The model in the folder `source` as a GGUF file, atomically. Raises OSError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    writer = described(scratch, recipe)
    try:
        add_tensors(writer, source, config, recipe, importance or {})
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


# %% [markdown]
# We write five files, and one in 16 bits that serves as a check and is not kept. The importance matrix changes the
# rounding and not the format.

# %%
recipes = {
    "f16": ("F16", None),
    "q8_0": ("Q8_0", None),
    "q4_k_m": ("Q4_K_M", None),
    "q4_k_m-imatrix": ("Q4_K_M", importance),
    "q2_k": ("Q2_K", None),
    "mxfp4-q2_k": ("MXFP4_Q2_K", importance),
}
folder = files.folder(output_dir) / "gguf"
gguf_files = {name: folder / f"{found.name}-{name}.gguf" for name in recipes}

# %%
seconds = {}
for name, (recipe, weights_of_columns) in recipes.items():
    begun = time.perf_counter()
    write_gguf(gguf_files[name], recipe, weights_of_columns)
    seconds[name] = time.perf_counter() - begun
    memory.release()
sizes = {name: path.stat().st_size / 1e6 for name, path in gguf_files.items()}
pd.DataFrame({"MB": sizes, "seconds": seconds}).round(1)


# %% [markdown]
# A checkpoint of [GPTQ](05_gptq.ipynb) or [AWQ](06_awq.ipynb) does not become a GGUF file directly. Its groups and
# zero points fit none of these blocks, so it would be dequantized and rounded a second time. Start from the 16-bit
# model.
#
# ## What is in the file
#
# We read the file as a stranger would: the header with `struct`, the rest with libgguf. Ask two questions of every
# downloaded file: is each tensor of a type we know, and is it there to its end?


# %%
def header(path):
    """(version, tensors, metadata entries) of a GGUF file; ValueError for another file."""
    with open(path, "rb") as file:
        start = file.read(24)
    if start[:4] != b"GGUF":
        raise ValueError(f"{path.name} begins with {start[:4]!r} and not with b'GGUF': it is no GGUF file")
    if len(start) < 24:
        raise ValueError(f"{path.name} ends after {len(start)} bytes, inside its header")
    return struct.unpack("<IQQ", start[4:])


# %% jupyter={"source_hidden": true}
def open_gguf(path):
    """libgguf's view of a whole file; ValueError that says what is wrong with a damaged one."""
    header(path)
    try:
        file = libgguf.open_gguf(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path.name} is cut off or damaged: {error}") from error
    for tensor in file.tensors:
        if tensor.nbytes is None:
            unknown = f"{tensor.name} has type {tensor.qtype_value}"
            raise ValueError(f"{path.name}: {unknown}, which this version of libgguf does not know")
        end = tensor.data_offset + tensor.nbytes
        if end > file.file_size:
            cut = f"{tensor.name} would end at byte {end:,}, the file ends at {file.file_size:,}"
            raise ValueError(f"{path.name} is cut off: {cut}. Download it again.")
    return file


# %%
file = open_gguf(gguf_files["q4_k_m"])
assert header(gguf_files["q4_k_m"]) == (file.version, file.tensor_count, file.metadata_kv_count)
print(f"version {file.version}, {file.tensor_count} tensors, {file.metadata_kv_count} metadata entries")
entries = {
    name: f"{entry.length:,} values" if entry.length else str(entry.value) for name, entry in file.metadata.items()
}
pd.Series({name: text[:60].replace("\n", " ") for name, text in entries.items()}, name="value").to_frame()

# %% [markdown]
# After the metadata comes a list of the tensors (name, shape, type, place), then the tensors themselves, each at a
# multiple of 32 bytes so that the file can be mapped into memory as it is:

# %% jupyter={"source_hidden": true}
list_start = file.data_offset - sum(24 + len(tensor.name) + 8 * len(tensor.shape) for tensor in file.tensors)
edges = [0, 24, list_start, file.data_offset, file.file_size]
parts = ["header", "metadata, tokenizer", "list of tensors", "tensors"]
layout = pd.DataFrame({"from byte": edges[:-1], "to byte": edges[1:]}, index=parts)
layout["share, %"] = 100 * (layout["to byte"] - layout["from byte"]) / file.file_size
layout.round(2)


# %%
def bytes_by_type(path):
    """{type: bytes} of the tensors in a GGUF file."""
    rows = [[tensor.qtype, tensor.nbytes] for tensor in open_gguf(path).tensors]
    return pd.DataFrame(rows, columns=["type", "bytes"]).groupby("type")["bytes"].sum()


by_type = pd.DataFrame({name: bytes_by_type(path) for name, path in gguf_files.items()}).fillna(0).T / 1e6
by_type = by_type[sorted(by_type, key=lambda name: -bits_of(Type[name]))]

# %% jupyter={"source_hidden": true}
fig, ax = plt.subplots(figsize=(7.5, 2.8))
left = np.zeros(len(by_type))
shades = plt.cm.cividis(np.linspace(0, 0.95, len(by_type.columns)))
for kind, color in zip(by_type, shades):
    ax.barh(by_type.index, by_type[kind], left=left, color=color, label=kind)
    left += by_type[kind].to_numpy()
ax.invert_yaxis()
mixed = by_type.loc["q4_k_m"]
share = mixed.get("Q4_K", 0) / mixed.sum()
ax.set(xlabel="MB of tensors", title=f"{share:.0%} of the bytes of Q4_K_M are of type Q4_K")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figures.show(
    fig,
    alt=f"Bytes of each tensor type in the files of {found.name}. In the file that is called "
    f"Q4_K_M, {share:.0%} of the bytes are of type Q4_K.",
    table=by_type.round(1),
)


# %% [markdown]
# ## The files in transformers: quality
#
# The course scores every method in one protocol. So we dequantize each file into a transformers model in full
# precision. The folded cell does it by hand:


# %% jupyter={"source_hidden": true}
def values_of(path, tensor):
    """The weights of a tensor in a file, dequantized to float32."""
    data = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.data_offset)
    return gguf.dequantize(data.reshape(*tensor.shape[:0:-1], -1), Type(tensor.qtype_value))


@torch.inference_mode()
def in_transformers(path):
    """A transformers model with the weights of a GGUF file."""
    net = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.dtype)
    tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    for key, parameter in net.named_parameters():
        values = torch.from_numpy(values_of(path, tensors[name_in_gguf(key, config)]))
        parameter.copy_(halves_apart(values, rotary_heads(key, config)))
    return net.to(found.device).eval()


# %% [markdown]
# transformers does this on its own, with `gguf_file=`. No weight may differ from ours:

# %%
net = in_transformers(gguf_files["q4_k_m"])
with capture_output():  # of its progress bar
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_files["q4_k_m"].name, dtype=found.dtype)
both = zip(net.parameters(), theirs.parameters(), strict=True)
gap = max((one.detach().cpu() - other.detach().cpu()).abs().max().item() for one, other in both)
print("largest difference of a weight:", gap)
assert gap == 0
del theirs, net, both  # `both` holds on to the models as well
memory.release()

# %%
quality, second = {}, {}
for name in recipes:
    if name == "f16":
        continue
    net = in_transformers(gguf_files[name])
    quality[name] = evaluation.score(net, windows, reference)
    second[name] = evaluation.score(net, in_domain, in_domain_reference)
    del net
    memory.release()

# %% jupyter={"source_hidden": true}
parameters = memory.predict(config, bits=16).parameters
tensor_bytes = {name: round(1e6 * by_type.loc[name].sum()) for name in quality}
bits = {name: 8 * size / parameters for name, size in tensor_bytes.items()}
scores = pd.DataFrame(
    {
        name: {
            "bits per weight": bits[name],
            "perplexity": each.perplexity,
            "KL": each.kl_divergence,
            "from": each.kl_low,
            "to": each.kl_high,
            "same top-1": each.top1_agreement,
            "KL on pydoc": second[name].kl_divergence,
        }
        for name, each in quality.items()
    }
).T
scores.round(4)

# %% jupyter={"source_hidden": true}
fig, ax = plt.subplots(figsize=(7, 3))
for (name, row), color in zip(scores.iterrows(), figures.PALETTE):
    place, bars = (row["bits per weight"], row["KL"]), [[row["KL"] - row["from"]], [row["to"] - row["KL"]]]
    ax.errorbar(*place, bars, fmt="D", color=color, capsize=3)
    lower = name == "q4_k_m-imatrix"  # of the two at one size
    ax.annotate(name, place, (8, -12 if lower else 6), textcoords="offset points", color=color)
ax.set(xlabel="bits per weight of the file", ylabel="KL, nats (less is better)")
change = scores["KL"]["q4_k_m-imatrix"] / scores["KL"]["q4_k_m"] - 1
ax.set(yscale="log", xlim=(None, 9.5), ylim=(None, 3))
ax.set_title(f"An importance matrix changes the KL by {change:+.0%}, for no bytes")
least, most = scores["KL"].min(), scores["KL"].max()
ends = f"from {least:.4f} ({scores['KL'].idxmin()}) to {most:.3f} ({scores['KL'].idxmax()})"
figures.show(
    fig,
    alt=f"KL divergence of the GGUF files of {found.name} on four genres, weights dequantized, "
    f"against bits per weight: {ends}.",
    table=scores[["bits per weight", "KL", "from", "to"]].round(4),
)

# %%
times_worse = scores["KL"]["mxfp4-q2_k"] / scores["KL"]["q2_k"]
print(
    f"{bits['mxfp4-q2_k']:.2f} bits in place of {bits['q2_k']:.2f}: the KL is {times_worse:.1f} times as large "
    f"({scores['KL']['mxfp4-q2_k']:.2f} after {scores['KL']['q2_k']:.2f} nats)"
)

# %% [markdown]
# On the small model the file below 4 bits pays dearly for its last bit. The scales of MXFP4 are powers of two, and
# the embedding, which is the output head too, has half the bits that Q2_K's recipe gives it. llama.cpp's fallback to
# larger types is no waste.
#
# Does the importance matrix help? The texts above are of genres that it was not collected on, the second one is of
# its own genre. The paired difference tells:


# %% jupyter={"source_hidden": true}
def in_words(mean, low, high):
    verdict = "better" if high < 0 else "worse" if low > 0 else "not told apart"
    return f"{verdict} with it, KL {mean:+.4f} [{low:+.4f}, {high:+.4f}]"


gain = evaluation.difference(quality["q4_k_m-imatrix"], quality["q4_k_m"])
gain_in_domain = evaluation.difference(second["q4_k_m-imatrix"], second["q4_k_m"])
print("other genres:", in_words(*gain))
print("documentation:", in_words(*gain_in_domain))

# %%
if found.name.startswith("SmolLM2"):
    assert scores["KL"].loc[["q8_0", "q4_k_m", "q2_k", "mxfp4-q2_k"]].is_monotonic_increasing, scores["KL"].to_dict()
    assert gain[1] <= 0, "the importance matrix makes it worse, outside the error bar"
garbage = scores["perplexity"] > 3 * reference.perplexity
assert not garbage.drop("mxfp4-q2_k").any(), "loaded without an error, and garbage"

# %% [markdown]
# **A larger model pays less.** The rows of Qwen2.5-Coder-1.5B are multiples of 256, so each tensor gets the type that
# the recipe names, and Q4_K_M takes 5.00 bits per weight. We ran this notebook with it on two CPU cores: 1,850 seconds
# and 20 GB. Q4_K_M has a KL of 0.0341 [0.0321, 0.0363] there, and 0.0245 [0.0232, 0.0258] with the importance matrix.
# Q2_K has 0.503 at 3.36 bits. llama.cpp decodes Q4_K_M at 25.6 tokens/s.


# %% [markdown]
# ## Run it: llama.cpp's server
#
# `xllamacpp` is llama.cpp as a Python package: `pip install` brings it without a compiler. The next cell loads a file
# into this process and asks it a question:

# %%
params = xllamacpp.CommonParams()
params.model.path, params.verbosity = str(gguf_files["q4_k_m"]), 0
params.n_ctx, params.n_parallel = 1024, 1  # tokens of a conversation, and how many conversations at a time
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
llama_cpp = xllamacpp.Server(params)
question = [{"role": "user", "content": "What is the capital of France?"}]
body = {"messages": question, "temperature": 0, "max_tokens": 48}
print(llama_cpp.handle_chat_completions(body)["choices"][0]["message"]["content"])

# %% [markdown]
# The same object is a server already: it listens on a free port of 127.0.0.1, which is this machine alone. Whatever
# speaks OpenAI's API can ask it, also in another language. `del` ends it.

# %%
url = f"{llama_cpp.listening_address}/v1/chat/completions"
choice = requests.post(url, json=body, timeout=600).json()["choices"][0]
print(choice["message"]["content"], f"({choice['finish_reason']})")
del llama_cpp

# %% [markdown]
# If llama.cpp crashes, its process ends, and here that process is the notebook's kernel. So from here on each server
# runs in a process of its own, with the same lines. `llama.serving` starts it and ends it with the `with` block.
# `llama.ask` posts JSON as above. Both are in `helpers/chat/llama.py`.

# %%
ask = llama.ask
serving = functools.partial(llama.serving, threads=torch.get_num_threads())


# %% [markdown]
# A streamed answer comes as lines of JSON, one for each piece. In a terminal, `python -m helpers chat --model
# FILE.gguf` does the same:

# %%
with serving(gguf_files["q4_k_m"], port=port) as server:
    for piece in llama.stream(server, [{"role": "user", "content": "Why is the sky blue?"}], max_tokens=48):
        print(piece, end="", flush=True)


# %% [markdown]
# ### The same file, the same answer?
#
# Give llama.cpp and transformers the same token ids, let both always take the most likely token, and compare. First
# the tokenizers: the ids of our texts must be equal, or everything after that is another question.

# %% jupyter={"source_hidden": true}
texts = [tokenizer.decode(window, skip_special_tokens=True) for window in windows[:8]]
with serving(gguf_files["q8_0"]) as server:
    theirs = [ask(server, "/tokenize", content=text, add_special=False)["tokens"] for text in texts]
    llama_prompt = ask(server, "/apply-template", messages=question)["prompt"]
equal = [ids == tokenizer(text, add_special_tokens=False).input_ids for text, ids in zip(texts, theirs)]
print(f"{sum(equal)} of {len(equal)} texts have the same ids")
assert all(equal), "llama.cpp cuts text in another way: is the pre-tokenizer's name right?"

# %%
if tokenizer.chat_template:
    llama_ids = tokenizer(llama_prompt, add_special_tokens=False).input_ids
    assert llama_ids == chat.render(tokenizer, question), "llama.cpp renders the template in another way"
print(llama_prompt)


# %%
request = [{"role": "user", "content": "Describe a rainy day in a small town."}]
prompt = chat.render(tokenizer, request) if tokenizer.chat_template else windows[0, :32].tolist()


def llama_tokens(path, prompt):
    """Greedy continuation by llama.cpp: token ids."""
    with serving(path) as server:
        settings = dict(n_predict=new_tokens, temperature=0, return_tokens=True)
        return ask(server, "/completion", prompt=prompt, **settings)["tokens"]


@torch.inference_mode()
def transformers_tokens(net, prompt):
    """The same by transformers."""
    ids = torch.tensor([prompt], device=net.device)
    out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


# %% jupyter={"source_hidden": true}
def first_difference(ours, theirs):
    """Number of tokens before the two part; all of them where they do not."""
    equal = [one == other for one, other in zip(ours, theirs)]
    return equal.index(False) if False in equal else len(equal)


together = {}
for name in ("f16", "q8_0", "q4_k_m"):
    net = in_transformers(gguf_files[name])
    ours, theirs = transformers_tokens(net, prompt), llama_tokens(gguf_files[name], prompt)
    together[name] = first_difference(ours, theirs)
    print(f"{name}: the first {together[name]} of {len(ours)} tokens are equal")
    print(f"  transformers: {tokenizer.decode(ours)!r}\n  llama.cpp:    {tokenizer.decode(theirs)!r}")
    del net
    memory.release()

# %% [markdown]
# With weights in 16 bits the two programs agree for longest. With quantized weights they part, although both read the
# same file. The reason: for a product with quantized weights, llama.cpp **rounds the layer's inputs to 8 bits too**,
# in blocks with a scale each. Integer products are what makes it fast. The score above, of dequantized weights, does
# not see that.
#
# How much is it? The server returns the probability of every token in the vocabulary if we ask for it. At some
# positions of the evaluation texts we compare two predictions with the untouched model's: llama.cpp's, and those of
# the same file's weights in transformers.

# %% jupyter={"source_hidden": true}
places = [window[:64].tolist() for window in windows[:16]]


def llama_log_probs(path):
    """Log-probabilities of the token after each place, float32 [places, vocabulary]."""
    rows = torch.full((len(places), config.vocab_size), -60.0)
    with serving(path) as server:
        for row, ids in zip(rows, places):
            settings = dict(n_predict=1, temperature=0, n_probs=config.vocab_size)
            answer = ask(server, "/completion", prompt=ids, **settings)
            every = answer["completion_probabilities"][0]["top_logprobs"]
            row[[each["id"] for each in every]] = torch.tensor([max(each["logprob"], -60) for each in every])
    return rows.log_softmax(-1)  # the server's rounded numbers do not sum to 1


# %% jupyter={"source_hidden": true}
@torch.inference_mode()
def log_probs(net):
    """The same by transformers."""
    logits = net(input_ids=torch.tensor(places, device=net.device), logits_to_keep=1).logits[:, -1]
    return logits.float().log_softmax(-1).cpu()


# %%
untouched = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.dtype).to(found.device).eval()
expected = log_probs(untouched)
kl_at = {}
for name in ("f16", "q8_0"):
    net = in_transformers(gguf_files[name])
    for engine, predicted in (("transformers", log_probs(net)), ("llama.cpp", llama_log_probs(gguf_files[name]))):
        kl_at[name, engine] = (expected.exp() * (expected - predicted)).sum(-1).numpy()
    del net
    memory.release()
rows = {key: [kl.mean(), *evaluation.interval(kl)] for key, kl in kl_at.items()}
engines = pd.DataFrame(rows, index=["KL", "from", "to"]).T
engines.round(5)

# %%
added = kl_at["q8_0", "llama.cpp"] - kl_at["q8_0", "transformers"]
low, high = evaluation.interval(added)
at_first = engines["KL"]["q8_0", "transformers"]
print(
    f"Q8_0 at {len(places)} positions: KL {at_first:.4f} with rounded weights; "
    f"llama.cpp, which rounds activations too, adds {added.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
)
if found.name.startswith("SmolLM2"):
    bound = 0.001 if found.dtype == torch.float32 else 0.01  # on a GPU the baseline itself is in bfloat16
    assert engines["KL"]["f16", "llama.cpp"] < bound, "with 16-bit weights the two programs must agree"

# %% [markdown]
# So the records of this notebook say what the *weights* of a file lost. An engine adds its own rounding, which
# depends on the engine and not on the file.
#
# ## What goes wrong in Ollama and llama.cpp
#
# Many a bad answer comes from a wrong prompt. We start the same file with other templates: the one that llama.cpp
# takes where a file has none, the one of another family of models, and the *name* of a template where the template
# itself belongs. All of them run without an error.


# %% jupyter={"source_hidden": true}
def templated(template):
    """(prompt, answer) of the server with another chat template than the file's."""
    settings = {"chat_template": template} if template else {}
    with serving(gguf_files["q8_0"], **settings) as server:
        prompt = ask(server, "/apply-template", messages=request)["prompt"]
        body = dict(messages=request, temperature=0, max_tokens=new_tokens)
        choice = ask(server, "/v1/chat/completions", **body)["choices"][0]
    return prompt, choice["message"]["content"], choice["finish_reason"]


# %%
other_family = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
templates = {
    "the file's own": "",
    "where a file has none": "chatml",
    "of another family": other_family,
    "a name instead": "llama2",
}
prompts = pd.DataFrame(
    {name: templated(template) for name, template in templates.items()}, index=["prompt", "answer", "ended by"]
).T
with pd.option_context("display.max_colwidth", None):
    display(prompts)


# %% [markdown]
# How far does that lead from the model that was meant? We measure the KL divergence of the answer's first token, in
# the untouched model, between the right prompt and each of the others:


# %% jupyter={"source_hidden": true}
@torch.inference_mode()
def first_token(text):
    """Log-probabilities of the token after a prompt."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(untouched.device)
    return untouched(input_ids=ids, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)


right = first_token(prompts["prompt"].iloc[0])
template_cost = pd.Series(
    {name: (right.exp() * (right - first_token(text))).sum().item() for name, text in prompts["prompt"].items()},
    name="KL of the first token",
)
assert template_cost.iloc[0] == 0
template_cost.to_frame().round(3)

# %% [markdown]
# Compare that with the KL of any quantization above before you blame the bits.
#
# **A stop token that is not one.** The file says which token ends an answer. If the engine does not treat it so, the
# model talks on, often in the user's name. `ignore_eos` does that on purpose:

# %%
brief = [{"role": "user", "content": "Answer with one word: what is the capital of France?"}]
body = dict(messages=brief, temperature=0, max_tokens=60)
stops = {}
with serving(gguf_files["q8_0"]) as server:
    for name, ignore in (("with its stop token", False), ("without", True)):
        stops[name] = ask(server, "/v1/chat/completions", ignore_eos=ignore, **body)["choices"][0]
for name, choice in stops.items():
    print(f"{name} ({choice['finish_reason']}): {choice['message']['content'][:300]!r}")
assert stops["without"]["finish_reason"] == "length"

# %% [markdown]
# **A context that is too short.** The server's context is a setting and not a property of the file, and it is often
# smaller than the model's. A prompt that is longer is refused in words. Programs that cut it instead lose the start
# of the conversation, and with it the instructions:

# %%
with serving(gguf_files["q8_0"], n_ctx=256) as server:
    try:
        ask(server, "/completion", prompt=windows.flatten()[:600].tolist(), n_predict=1)
        too_long = "no error"
    except RuntimeError as error:
        too_long = str(error)
print(f"{config.max_position_embeddings:,} tokens in the model, 256 in the server:\n{too_long}")
assert too_long != "no error"


# %% [markdown]
# ## Is it faster?
#
# Predict first: a file of 6 bits a weight has a fifth of float32's bytes. How much faster will it decode? We measure
# the same work as everywhere in this course: a prompt of 64 random tokens, then 20 tokens one by one, the median of
# three runs. llama.cpp runs with as many threads as torch, and transformers in full precision runs beside it.


# %% jupyter={"source_hidden": true}
def llama_speed(server, prompt_tokens=64, steps=20, runs=3):
    """`speed.Speed` of a running server, from its own clock."""
    ids = torch.randint(config.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(0))
    body = dict(prompt=ids.tolist(), n_predict=steps, temperature=0, ignore_eos=True, cache_prompt=False)
    times = [ask(server, "/completion", **body)["timings"] for _ in range(runs + 1)]
    times = times[1:]  # the first one warms up
    decodes = sorted(each["predicted_per_second"] for each in times)
    prefills = sorted(each["prompt_per_second"] for each in times)
    return speed.Speed(prefills[runs // 2], decodes[runs // 2], decodes[0], decodes[-1])


# %%
full = f"transformers, {str(found.dtype).removeprefix('torch.')}"
rates, loads, peaks = {full: speed.decode(untouched)}, {}, {}
del untouched
memory.release()
for name in quality:
    with serving(gguf_files[name]) as server:
        with memory.track(process=server.process) as used:
            rates[name] = llama_speed(server)
    loads[name], peaks[name] = server.load_seconds, used.peak_ram

# %% jupyter={"source_hidden": true}
speeds = pd.DataFrame({name: vars(rate) for name, rate in rates.items()}).T
speeds.columns = ["prefill tok/s", "decode tok/s", "slowest run", "fastest run"]
read_bytes = pd.Series({full: parameters * found.dtype.itemsize, **tensor_bytes})
speeds["GB/s of weights"] = speeds["decode tok/s"] * read_bytes / 1e9
speeds["load s"], speeds["peak RAM, MB"] = pd.Series(loads), pd.Series(peaks) / 1e6
times_faster = speeds["decode tok/s"]["q4_k_m"] / speeds["decode tok/s"][full]

# %% jupyter={"source_hidden": true}
fig, ax = plt.subplots(figsize=(7, 2.4))
colors = [figures.PALETTE[4], *[figures.PALETTE[0]] * len(quality)]
ax.barh(speeds.index, speeds["decode tok/s"], color=colors)
ax.invert_yaxis()
ax.set(xlabel="decoded tokens per second, batch 1", title=f"Q4_K_M decodes {times_faster:.1f} times as fast")
where = f"{found.device.upper()}, {torch.get_num_threads()} threads"
figures.show(
    fig,
    alt=f"Decode speed of {found.name}: q4_k_m in llama.cpp on the CPU is {times_faster:.1f} "
    f"times as fast as {full} on the {where}.",
    table=speeds.round(2),
)

# %% [markdown]
# Two things make the difference. **Bytes**: each new token reads all weights once. **Kernels**: llama.cpp multiplies
# 8-bit integers, and transformers spends much of a token's time in Python between small operations. A prompt is
# another matter: its tokens are computed together, in large matrix products, and reading the weights hardly counts
# there. The next cell shows what this build can use of your processor, and the ratio for prompts:

# %%
print(xllamacpp.get_system_info())
prefill = speeds["prefill tok/s"]["q4_k_m"] / speeds["prefill tok/s"][full]
print(f"prefill of q4_k_m: {prefill:.2f} times as fast as {full}; decode: {times_faster:.2f} times")
if found.device == "cpu" and found.name.startswith("SmolLM2"):
    assert times_faster >= 3, f"q4_k_m in llama.cpp is only {times_faster:.1f} times as fast as {full}"

# %% [markdown]
# The wheel is built for many machines: it has AVX2 and not AVX-512. A llama.cpp that you compile on your own machine
# can be faster.
#
# ## The fine-tune that works elsewhere
#
# The simplest way of an adapter ([07 QLoRA](07_qlora.ipynb)) into llama.cpp or Ollama: **merge it into the 16-bit
# weights**, then convert the result. 07's adapter was trained on questions about quantization, with answers of two
# sentences. If 07 has run into the same build folder, we take its adapter. Else we train a short one here, on some of
# the same pairs.

# %%
from peft import LoraConfig, PeftModel, get_peft_model

pairs, _ = training.read_pairs(pathlib.Path(chat.__file__).parents[2] / "notebooks/data/quantization_qa.jsonl")
held_out = [pair for pair in pairs if pair["split"] == "held-out"][::5][:8]
adapter = checkpoints.folder(output_dir, "qlora")
card = adapter / "adapter_config.json"
from_07 = card.is_file() and json.loads(card.read_text())["base_model_name_or_path"] == found.asked
tune = bool(tokenizer.chat_template) and (from_07 or parameters < 5e8)
print("the adapter of 07" if from_07 else "a short one, trained here" if tune else "none: too slow to train here")


# %% jupyter={"source_hidden": true}
def lesson_ids(pair):
    """(ids, labels) of a question and its answer; the loss counts on the answer alone."""
    prompt = chat.render(tokenizer, [{"role": "user", "content": pair["question"]}])
    reply = tokenizer(pair["answer"] + tokenizer.eos_token, add_special_tokens=False).input_ids
    return torch.tensor([prompt + reply]), torch.tensor([[-100] * len(prompt) + reply])


def short_adapter(net, lessons):
    """The model with an adapter that saw each lesson once."""
    torch.manual_seed(0)
    net = get_peft_model(net, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=2e-3)
    for ids, labels in map(lesson_ids, lessons):
        net(input_ids=ids.to(net.device), labels=labels.to(net.device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


# %%
def merged_model():
    """The model with the adapter in its weights, in 16 bits."""
    net = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    with contextlib.redirect_stdout(io.StringIO()):  # peft imports gptqmodel here, which prints a banner
        if from_07:
            training.check_adapter(adapter, net, found.asked)
            net = PeftModel.from_pretrained(net, adapter)
        else:
            net = short_adapter(net.to(found.device), [pair for pair in pairs if pair["split"] == "train"][:24])
    return net.merge_and_unload().bfloat16().cpu()


# %%
tuned_file = folder / f"{found.name}-tuned-q8_0.gguf"
if tune:
    with tempfile.TemporaryDirectory() as scratch:
        merged_model().save_pretrained(scratch)
        write_gguf(tuned_file, "Q8_0", source=scratch)
    memory.release()

# %% [markdown]
# Does the trained behaviour survive? We ask questions that no adapter has seen, and two checks need no judge: does
# the answer **end by itself** within 64 tokens, and how many of its **words** are those of the written answer (F1: 1 means
# the same words, 0 means none)?


# %% jupyter={"source_hidden": true}
def word_f1(answer, written):
    """Twice the common words by all words, each word as often as both texts have it."""
    ours, theirs = (collections.Counter(re.findall(r"\w+", text.lower())) for text in (answer, written))
    return 2 * (ours & theirs).total() / (ours + theirs).total()


def answers_of(path):
    """Greedy answers of a file in llama.cpp to the held-out questions: text, words in common, how it ended."""
    rows = []
    with serving(path) as server:
        for pair in held_out:
            body = dict(messages=[{"role": "user", "content": pair["question"]}], temperature=0, max_tokens=64)
            choice = ask(server, "/v1/chat/completions", **body)["choices"][0]
            text = choice["message"]["content"]
            rows.append([text, word_f1(text, pair["answer"]), choice["finish_reason"] == "stop"])
    return pd.DataFrame(rows, columns=["answer", "F1", "ended"])


# %%
if tune:
    behaviour = {"before": answers_of(gguf_files["q8_0"]), "after": answers_of(tuned_file)}
    print(f"Q: {held_out[0]['question']}")
    for when, rows in behaviour.items():
        print(f"{when}: F1 {rows.F1.mean():.2f}, {rows.ended.sum()} of {len(rows)} end. {rows.answer[0]!r}")
    both = [behaviour[when][["F1", "ended"]].astype(float) for when in ("after", "before")]
    gained = both[0] - both[1]
    bars = {name: [gained[name].mean(), *evaluation.interval(gained[name].to_numpy())] for name in gained}
    display(pd.DataFrame(bars, index=["gained", "from", "to"]).T.round(2))
    assert bars["ended"][1] > 0 or not found.name.startswith("SmolLM2"), "the trained behaviour got lost on the way"

# %% [markdown]
# The trained form arrives in llama.cpp: most answers now end by themselves, after one or two sentences. The words come
# only a little closer to the written ones, and eight questions cannot tell that gain from zero. An adapter of this
# size learns how to answer, and little of what is true.
#
# **Ollama** runs llama.cpp's kind of file with a `Modelfile` beside it. Its templates are written in Go's language,
# so the file's own template is translated: `.System`, `.Prompt` and `.Response` stand for what is said. A translation
# can be wrong, so ours is checked: filled in, it must give the prompt that the model was trained with.

# %% jupyter={"source_hidden": true}
GO_TEMPLATE = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""


def filled(template, **values):
    """A Go template of `if`, `end` and names only, filled in up to the response."""
    before = template.split("{{ .Response }}")[0]
    keep = lambda match: match[2] if values.get(match[1]) else ""
    chosen = re.sub(r"{{ if \.(\w+) }}(.*?){{ end }}", keep, before, flags=re.S)
    return re.sub(r"{{ \.(\w+) }}", lambda match: values[match[1]], chosen)


# %%
chatml = "<|im_start|>" in (tokenizer.chat_template or "")
said = {"System": "Answer briefly.", "Prompt": "Why is the sky blue?"}
if chatml:
    messages = [{"role": "system", "content": said["System"]}, {"role": "user", "content": said["Prompt"]}]
    go_ids = tokenizer(filled(GO_TEMPLATE, **said), add_special_tokens=False).input_ids
    assert go_ids == chat.render(tokenizer, messages), "the Go template makes another prompt"
    print(filled(GO_TEMPLATE, **said))

# %%
MODELFILE = f"""FROM ./{tuned_file.name}
TEMPLATE \"\"\"{GO_TEMPLATE}\"\"\"
PARAMETER stop "{tokenizer.eos_token}"
PARAMETER num_ctx 2048
PARAMETER temperature 0
"""


# %% jupyter={"source_hidden": true}
def read_modelfile(text):
    """[(instruction, value)] of a Modelfile; ValueError for what Ollama would refuse."""
    parts = re.findall(r'^(\w+)[ ]+("""[\s\S]*?"""|[^\n]*)\n', text, re.M)
    rest = re.sub(r'^\w+[ ]+("""[\s\S]*?"""|[^\n]*)\n', "", text, flags=re.M)
    if rest.strip() or [name for name, _ in parts].count("FROM") != 1:
        raise ValueError(f"a Modelfile needs one FROM, and nothing but instructions; left over: {rest.strip()[:40]!r}")
    numbers = {"num_ctx": int, "temperature": float, "stop": str}
    for name, value in parts:
        if name not in ("FROM", "TEMPLATE", "PARAMETER", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE"):
            raise ValueError(f"{name} is no instruction of a Modelfile")
        if name == "PARAMETER":
            setting, _, given = value.partition(" ")
            numbers[setting](given.strip('"'))
    return [(name, value.strip('"')) for name, value in parts]


# %%
if tune and chatml:
    files.write_text(folder / "Modelfile", MODELFILE)
    instructions = read_modelfile((folder / "Modelfile").read_text(encoding="utf-8"))
    assert (folder / dict(instructions)["FROM"]).is_file() and dict(instructions)["TEMPLATE"] == GO_TEMPLATE
    print(MODELFILE)

# %% [markdown]
# With Ollama installed, `ollama create tuned -f Modelfile` and `ollama run tuned` in that folder would be next.
# Ollama was not run for this notebook. `stop` and `num_ctx` are the two settings of the section above: without the
# first an answer may not end, and the second is the context.
#
# ## What stops, and how it says so
#
# A damaged file is refused in one line, by our reader and by llama.cpp. A port that is taken and a server that dies
# are, too. Nothing is left running. `python -m helpers explain` knows all of these messages. The cells that do the
# damage are folded.


# %% jupyter={"source_hidden": true}
def damaged(scratch, change):
    """Path of a copy of the Q2_K file that `change` has altered."""
    data = bytearray(gguf_files["q2_k"].read_bytes())
    path = pathlib.Path(scratch) / f"{change.__name__}.gguf"
    path.write_bytes(change(data) or data)
    return path


def truncated(data):
    return data[: len(data) // 2]


def wrong_magic(data):
    data[:4] = b"GGML"


# %% jupyter={"source_hidden": true}
def unknown_type(data):
    name = b"blk.0.ffn_down.weight"
    at = data.index(name) + len(name)
    data[at + 4 + 16 : at + 8 + 16] = struct.pack("<I", 99)  # after the number of dimensions and two sizes


def without_template(data):
    """The entry's name is changed, so nobody finds it."""
    return data.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX")


# %% jupyter={"source_hidden": true}
def serve(path, **settings):
    with serving(path, **settings):
        pass


def serve_on_taken_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        serve(gguf_files["q2_k"], port=taken.getsockname()[1])


def server_dies():
    with serving(gguf_files["q2_k"]) as server:
        server.process.kill()
        server.process.wait()
        ask(server, "/completion", prompt="a", n_predict=1)


# %% jupyter={"source_hidden": true}
def refusal(attempt):
    """What an attempt says when it is refused."""
    try:
        attempt()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was not refused")


def chat_with(path):
    with llama.session(path):
        pass


# %% jupyter={"source_hidden": true}
unfinished = "{% for message in messages %}{{ message"
refusals = {
    "port in use": refusal(serve_on_taken_port),
    "server dies": refusal(server_dies),
    "template that does not parse": refusal(lambda: serve(gguf_files["q2_k"], chat_template=unfinished)),
}
with tempfile.TemporaryDirectory() as scratch:
    for change in (truncated, wrong_magic, unknown_type):
        path = damaged(scratch, change)
        refusals[f"{change.__name__}, our reader"] = refusal(lambda: open_gguf(path))
        refusals[f"{change.__name__}, llama.cpp"] = refusal(lambda: serve(path))
    refusals["no template, our chat"] = refusal(lambda: chat_with(damaged(scratch, without_template)))

# %%
with pd.option_context("display.max_colwidth", None):
    display(pd.Series(refusals, name="what it says").to_frame())
commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
assert not [command for command in commands if "xllamacpp" in command], "a server is still running"
gguf_files["f16"].unlink()

# %% [markdown]
# ## What the guides claim
#
# The five guides that this course grew out of say nothing about GGUF. One of them names an article on llama.cpp among
# its sources and does not use it. Their "2 to 3 times faster" for 4 bits is judged in [04
# NF4](04_nf4_bitsandbytes.ipynb). So the table of this notebook is empty.

# %% jupyter={"source_hidden": true}
from helpers.publishing import claims

findings = []
claims.write(output_dir, notebook="08_gguf_llama_cpp", found=found, findings=findings)
claims.table(output_dir, "08_gguf_llama_cpp")


# %% [markdown]
# ## Exercises
#
# **1 (easy).** Return the bits per weight of a block format, in one line. A block has `size` weights of `bits` bits each, and
# `extra_bytes` for scales and minima.


# %%
def bits_per_weight(bits, size, extra_bytes):
    """Bits of a weight, its share of the block's extra bytes included."""
    ...


# %% jupyter={"source_hidden": true}
def test_bits(function):
    assert function(4, 32, 2) is not None, "return a number"
    assert abs(function(4, 32, 2) - 4) > 1e-9, "the scale is missing: every block carries extra_bytes"
    assert abs(function(4, 32, 2) - 4.0625) > 1e-9, "extra_bytes are bytes, and a byte has 8 bits"
    assert abs(function(4, 32, 2) - 4.5) < 1e-9, f"Q4_0 (32 weights, 2 bytes): 4.5, not {function(4, 32, 2)}"
    assert abs(function(4, 256, 16) - 4.5) < 1e-9, "Q4_K (256 weights, 16 bytes) has 4.5: is size used?"
    assert abs(function(8, 32, 2) - 8.5) < 1e-9, "Q8_0 has 8.5: is bits used?"


exercises.check(bits_per_weight, test_bits)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def bits_per_weight(bits, size, extra_bytes):
        return bits + 8 * extra_bytes / size

    exercises.require(bits_per_weight, test_bits)


# %% [markdown]
# **2 (medium).** Predict, then measure. Qwen2.5-0.5B has rows of 896, and its down projection has rows of 4,864.
# Write down first which share of its matrices can be K-quants. Then write the function: the share of the weights,
# from 0 to 1, that falls back. `shapes` is a list of (rows, columns); a K-quant needs columns in multiples of
# `block`. It takes two lines.


# %%
def share_falling_back(shapes, block=256):
    """Share of all weights whose rows the block does not divide."""
    ...


# %% jupyter={"source_hidden": true}
def test_share(function):
    assert function([(10, 256)]) is not None, "return a number"
    assert function([(10, 256), (20, 512)]) == 0, "256 and 512 are multiples of 256: nothing falls back"
    assert function([(256, 576)]) == 1, "the columns count, not the rows: 576 is no multiple of 256"
    mixed = function([(576, 1536), (1536, 576), (1536, 576)])
    assert abs(mixed - 2 / 3) < 1e-9, f"two of three equal matrices fall back, you have {mixed}"
    assert abs(function([(100, 256), (1, 576)]) - 576 / 26176) < 1e-9, "count weights, not matrices"
    assert function([(4, 96)], 32) == 0, "block is not used"
    qwen = [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)]
    print(f"Qwen2.5-0.5B: {function(qwen):.0%} of the weights in a layer fall back")


exercises.check(share_falling_back, test_share)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def share_falling_back(shapes, block=256):
        fallen = sum(rows * columns for rows, columns in shapes if columns % block)
        return fallen / sum(rows * columns for rows, columns in shapes)

    exercises.require(share_falling_back, test_share)


# %% [markdown]
# **3 (medium).** What did I download? Given the tensors of a file, as `open_gguf(path).tensors` has them (each with
# its type's name `.qtype`, its `.shape` and `.nbytes`), return a dict with `"bits"`, the bits per weight of all
# tensors together, and `"mostly"`, the name of the type that holds the most weights. It takes five lines.


# %%
def what_is_it(tensors):
    """The bits per weight and the type that most weights have."""
    ...


# %% jupyter={"source_hidden": true}
def test_what(function):
    kinds = [("Q4_K", (256, 2), 288), ("Q6_K", (256, 1), 210), ("F32", (64,), 256)]
    tensors = [types.SimpleNamespace(qtype=name, shape=shape, nbytes=size) for name, shape, size in kinds]
    answer = function(tensors)
    assert answer and set(answer) == {"bits", "mostly"}, 'return {"bits": ..., "mostly": ...}'
    assert answer["mostly"] == "Q4_K", f"Q4_K holds 512 of 832 weights, you have {answer['mostly']}"
    assert abs(answer["bits"] - 8 * 754 / 832) < 1e-9, "all bytes times 8, by all weights"
    several = function([tensors[0], *[tensors[1]] * 3])
    assert several["mostly"] == "Q6_K", "add up the tensors of one type before you compare"


exercises.check(what_is_it, test_what)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def what_is_it(tensors):
        weights = {}
        for tensor in tensors:
            weights[tensor.qtype] = weights.get(tensor.qtype, 0) + math.prod(tensor.shape)
        total_bytes = sum(tensor.nbytes for tensor in tensors)
        return {"bits": 8 * total_bytes / sum(weights.values()), "mostly": max(weights, key=weights.get)}

    exercises.require(what_is_it, test_what)
    print(what_is_it(open_gguf(gguf_files["q4_k_m"]).tensors))

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("08_gguf_llama_cpp")

# %% [markdown]
# ## Takeaways
#
# 1. **A GGUF type is a block: codes, a scale, sometimes a minimum.** Q8_0 has 8.5 bits a weight and Q4_0 4.5. Q4_K
#    has 4.5 too, with a minimum, because it quantizes its scales. A screenful of numpy gives the libraries' numbers.
# 2. **A file's name is a recipe.** Where 256 does not divide the rows, llama.cpp falls back to larger types: count
#    the bytes of the tensors and do not trust the name. Rows of 576 cannot have fewer than 4.25 bits.
# 3. **The engine is part of the result.** llama.cpp decodes several times as fast as transformers in float32. It
#    rounds activations to 8 bits on the way. A wrong template costs more than most quantizations. A fine-tune arrives
#    if the adapter is merged in 16 bits first.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% jupyter={"source_hidden": true} tags=["record"]
for name, scored in quality.items():
    records.write(
        output_dir,
        method=f"gguf-{name}",
        notebook="08_gguf_llama_cpp",
        found=found,
        windows=windows,
        scores=scored,
        in_domain=(in_domain, second[name]),
        bits_per_weight=bits[name],
        weight_bytes=tensor_bytes[name],
        peak_memory_bytes=peaks[name],
        quantize_seconds=seconds[name],
        # llama.cpp runs on the CPU here: beside a GPU's other numbers its speed would mislead
        decode_tokens_per_s=rates[name].decode_tokens_per_s if found.device == "cpu" else None,
    )
