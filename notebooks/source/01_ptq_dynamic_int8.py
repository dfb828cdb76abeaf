# %% [markdown]
# # 01 Post-training quantization to INT8
#
# Quantize a trained model to 8 bits without training, see the most common call ruin it, find out why, and repair it
# step by step.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
# 1. Quantize a tensor yourself: scale, zero point, per tensor, channel or group, any clipping range, with the same
#    integer codes as the libraries.
# 2. Say why `quantize_dynamic` breaks a language model, prove it on the real activations, and repair it in measured
#    steps.
# 3. Choose between dynamic and static INT8, SmoothQuant and LLM.int8(), save the result without a pickle, and reload
#    it bit for bit.
#
# **Before you start:** [00](00_start_here.ipynb) quantizes four numbers and explains perplexity and KL divergence.
# Fewer than 8 bits: [02](02_qat_fake_quant.ipynb), [04](04_nf4_bitsandbytes.ipynb). Folded cells are plumbing and
# proofs; skip them on a first reading.

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
probe_tokens = 1024
calibration_tokens = 2048
calibration_text = None
bits = 8
group_size = 64
left_out = 8

# %% jupyter={"source_hidden": true}
import copy
import inspect
import logging
import math
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from helpers import checkpoints, evaluation, exercises, figures, memory, models, records, speed

# %%
figures.style()
transformers_logging.disable_progress_bar()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells every layer's cast to float16
pd.options.display.precision = 3

# %% [markdown]
# ## Scale and zero point by hand
# Four activations: -0.4, 0.0, 1.1 and 2.6. A ruler of 3 bits has 8 marks, with the codes -4 to 3. There are two ways
# to lay it:
#
# - **symmetric**: the ruler reaches equally far to both sides of 0.0, and code 0 means 0.0. One number describes it,
#   the **scale**.
# - **asymmetric**: the ruler reaches from the smallest to the largest value. A second number, the **zero point**,
#   says which code means 0.0.
#
# By hand, asymmetric: scale = (2.6 - -0.4) / 7 = 0.43. The lowest code is -4 and stands for -0.4, which lies one mark
# below 0.0, so the zero point is -4 + 1 = -3. The value 1.1 is 1.1 / 0.43 = 2.6 marks above 0.0, so its code is 3 - 3
# = 0. Back: (0 - -3) x 0.43 = 1.29.


# %%
def codes_between(bits):
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


# %%
def choose_scale(low, high, bits, symmetric):
    """Scale (float32) and zero point (int) for ranges [low, high] of any shape."""
    qmin, qmax = codes_between(bits)
    low, high = low.clamp(max=0), high.clamp(min=0)  # 0.0 must have a code of its own
    if symmetric:
        scale = torch.maximum(-low, high) / ((qmax - qmin) / 2)
        return scale, torch.zeros_like(scale, dtype=torch.int64)
    scale = (high - low) / (qmax - qmin)
    return scale, (qmin - (low / scale).round()).clamp(qmin, qmax).long()


# %%
def quantize(x, scale, zero_point, bits):
    """Integer codes of x, in torch's order: times 1 / scale, plus zero point, then round half to even."""
    return (x * (1 / scale) + zero_point).round().clamp(*codes_between(bits)).to(torch.int8)


def dequantize(codes, scale, zero_point):
    return (codes.float() - zero_point) * scale


# %%
four = torch.tensor([-0.4, 0.0, 1.1, 2.6])
by_hand = {}
for name, symmetric in {"symmetric": True, "asymmetric": False}.items():
    scale, zero_point = choose_scale(four.min(), four.max(), 3, symmetric)
    codes = quantize(four, scale, zero_point, 3)
    by_hand[name] = scale.item(), zero_point.item(), codes.tolist(), dequantize(codes, scale, zero_point).tolist()
columns = ["scale", "zero point", "codes", "restored"]
by_hand = pd.DataFrame.from_dict(by_hand, orient="index", columns=columns)
assert by_hand.loc["asymmetric", "codes"] == [-4, -3, 0, 3], "the hand calculation above"

# %% jupyter={"source_hidden": true}
fig, panels = plt.subplots(2, 1, figsize=(7, 2.6), sharex=True, layout="constrained")
for panel, (name, row) in zip(panels, by_hand.iterrows()):
    marks = (torch.arange(-4, 4) - row["zero point"]) * row["scale"]
    panel.plot(marks, [0] * 8, "|", color=figures.PALETTE[4], markersize=22)
    panel.plot(four, [0.5] * 4, "o", color=figures.PALETTE[0])
    for value, mark in zip(four.tolist(), row["restored"]):
        panel.annotate("", (mark, 0.05), (value, 0.45), arrowprops={"arrowstyle": "->", "color": figures.PALETTE[1]})
    panel.set(yticks=[], ylim=(-0.3, 0.8), title=f"{name}: marks {row['scale']:.2f} apart")
    panel.grid(False)
figures.show(
    fig,
    alt="Two rulers of 8 marks under the same four activations. The symmetric one spends four marks below zero, where "
    "one value lies; the asymmetric one lies only where the values are, so its marks are closer.",
    table=by_hand,
)

# %% [markdown]
# The asymmetric ruler has marks at 0.43 instead of 0.74, because it does not cover the empty side. Activations often
# have an empty side, weights rarely. So weights usually get symmetric rulers, and activations asymmetric ones.
#
# ## What shares a scale
# A scale may serve a whole tensor, one **channel** (a row of the weight) or a **group** of neighbours in a row. A
# matrix of two rows shows why it matters: one row is ten times as large as the other.


# %%
def blocks_of(weight, granularity):
    """weight [out, in] as [number of ranges, values per range]."""
    per_range = {"tensor": weight.numel(), "channel": weight.shape[1], "group": group_size}[granularity]
    return weight.reshape(-1, per_range)


# %%
def round_trip(weight, bits, granularity, symmetric):
    blocks = blocks_of(weight, granularity)
    scale, zero_point = choose_scale(blocks.amin(1, True), blocks.amax(1, True), bits, symmetric)
    codes = quantize(blocks, scale, zero_point, bits)
    return codes, scale, zero_point, dequantize(codes, scale, zero_point).view_as(weight)


# %%
two_rows = torch.tensor([[0.10, -0.07, 0.04, 0.02], [1.00, -0.70, 0.40, 0.20]])
for granularity in ("tensor", "channel"):
    restored = round_trip(two_rows, 4, granularity, symmetric=True)[3]
    print(f"one scale per {granularity:8} small row: {[round(x, 2) for x in restored[0].tolist()]}")

# %% [markdown]
# With one scale for both rows, the small row keeps two of its four values, and both are off by a third or more. With
# a scale per row it keeps all four. The price is one more scale to store: 32 bits for a row. Finer granularity is
# only a question of shape: each row of `blocks` gets its own range.
#
# ## The model
# torch's own int8 modules run on a CPU and want float32 weights, so everything here runs on the CPU, also where there
# is a GPU.

# %%
found = models.find("smollm2-offline" if model == "auto" and torch.cuda.is_available() else model, copies=2.5)
found = replace(found, device="cpu")
parameters = memory.predict(AutoConfig.from_pretrained(found.path)).parameters
if 4 * 4 * parameters > memory.free_ram():
    raise MemoryError(f"{found.name} needs about {16 * parameters / 1e9:.0f} GB here (four float32 copies)")
tokenizer = AutoTokenizer.from_pretrained(found.path)
net = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).eval()
sizes = {"fp32": memory.weight_bytes(net)}
print(f"{found.name}: {parameters / 1e6:.1f} M parameters, {sizes['fp32'] / 1e6:.0f} MB in float32")

# %% jupyter={"source_hidden": true}
Linear = torch.nn.Linear


# %% jupyter={"source_hidden": true}
def check_bits(bits):
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be a whole number from 2 to 8, not {bits!r}")


# %% jupyter={"source_hidden": true}
def check_groups(net, group_size):
    widths = {name: module.in_features for name, module in net.named_modules() if isinstance(module, Linear)}
    fitting = [size for size in (16, 32, 64, 128, 256) if all(width % size == 0 for width in widths.values())]
    for name, width in widths.items():
        if group_size < 1 or width % group_size:
            raise ValueError(
                f"group_size={group_size} does not divide the {width} inputs of {name}; "
                f"these divide every layer: {fitting}"
            )


# %% jupyter={"source_hidden": true}
def check_model(net):
    linears = [(name, module) for name, module in net.named_modules() if isinstance(module, Linear)]
    if not linears:
        raise ValueError(f"{type(net).__name__} has no Linear layers to quantize")
    for name, module in linears:
        if module.weight.dtype != torch.float32:
            raise TypeError(
                f"quantize_dynamic wants float32 weights, {name} is {module.weight.dtype}: call .float() first"
            )


# %% jupyter={"source_hidden": true}
def calibration_windows(text, tokens, context=512):
    """Token ids [n, context] from the start of a text of your own."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0] if text.strip() else []
    if len(ids) == 0:
        raise ValueError("the calibration text is empty")
    if len(ids) < context:
        raise ValueError(f"the calibration text has {len(ids)} tokens, less than one window of {context}")
    count = max(1, min(len(ids), tokens) // context)
    return ids[: count * context].view(count, context)


# %%
check_bits(bits)
check_groups(net, group_size)
check_model(net)
windows = evaluation.windows(tokenizer, tokens=eval_tokens)  # four genres; calibration uses a fifth
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
probe = windows[: max(1, probe_tokens // windows.shape[1])]  # the steps in between are measured on these
if calibration_text is None:
    calibration = evaluation.windows(tokenizer, "calibration", calibration_tokens, source="pydoc")
else:
    calibration = calibration_windows(calibration_text, calibration_tokens)
reference = evaluation.reference(found, windows)
second_reference = evaluation.reference(found, in_domain)
print(
    f"fp32 perplexity {reference.perplexity:.2f} on {windows.numel():,} tokens; "
    f"{probe.numel():,} for steps in between, {calibration.numel():,} for calibration"
)

# %% [markdown]
# ## The same codes as torch's and torchao's
# We compare every code of one real weight with torch's, and the int4 codes with those of torchao's
# `quantize_affine`.

# %% jupyter={"source_hidden": true}
from torchao.quantization.quant_primitives import quantize_affine

layer_name = f"model.layers.{net.config.num_hidden_layers // 2}.mlp.up_proj"
weight = net.get_submodule(layer_name).weight.detach()
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # torch 2.13 deprecates these too


# %% jupyter={"source_hidden": true}
def codes_of_torch(blocks, scale, zero_point):
    """int8 codes by torch.quantize_per_tensor or torch.quantize_per_channel."""
    if len(blocks) == 1:
        return torch.quantize_per_tensor(blocks, scale.item(), zero_point.item(), torch.qint8).int_repr()
    return torch.quantize_per_channel(blocks, scale[:, 0], zero_point[:, 0], 0, torch.qint8).int_repr()


# %% jupyter={"source_hidden": true}
def codes_of_torchao(blocks, scale, zero_point, bits):
    block_size = (1, blocks.shape[1])
    return quantize_affine(blocks, block_size, scale, zero_point.int(), torch.int8, *codes_between(bits))


# %% jupyter={"source_hidden": true}
def against_libraries(granularity, width, symmetric):
    codes, scale, zero_point, restored = round_trip(weight, width, granularity, symmetric)
    blocks, constants = blocks_of(weight, granularity), 32 + (0 if symmetric else 8)
    gaps = {"torchao": (codes.int() - codes_of_torchao(blocks, scale, zero_point, width)).abs()}
    if width == 8:
        gaps["torch"] = (codes.int() - codes_of_torch(blocks, scale, zero_point)).abs()
    row = {"range per": granularity, "bits": width, "symmetric": symmetric}
    row["bits per weight"] = width + constants * len(scale) / weight.numel()
    row["error, %"] = 100 * ((restored - weight).norm() / weight.norm()).item()
    row |= {f"{name}: codes off": int((gap > 0).sum()) for name, gap in gaps.items()}
    return row | {"largest gap": max(int(gap.max()) for gap in gaps.values())}


# %% jupyter={"source_hidden": true}
cases = [(shape, width, way) for shape in ("tensor", "channel", "group") for width in (8, 4) for way in (True, False)]
affine = pd.DataFrame([against_libraries(*case) for case in cases])

# %%
symmetric_rows = affine[affine.symmetric]
off = affine["torch: codes off"].sum()
assert affine["largest gap"].max() <= 1, "from scratch and library differ by more than one code"
assert symmetric_rows["torch: codes off"].sum() == 0, "symmetric int8 codes should equal torch's symmetric_rows"
assert symmetric_rows["torchao: codes off"].sum() == 0, "symmetric codes should equal torchao's symmetric_rows"
print(f"{layer_name}, {weight.numel():,} weights; all int8 codes against torch: {off:.0f} off")
affine.astype({"torch: codes off": "Int64"})

# %% [markdown]
# - One scale per tensor loses 60 % of this weight at 4 bits, one scale per group of 64 loses 12 %. The scales cost
#   half a bit per weight.
# - Symmetric codes are equal to torch's and torchao's, all of them.
# - Asymmetric codes are equal to torch's on x86. torchao rounds first and adds the zero point after. Half-way cases
#   then fall to the other side, **one code** away, never more.
#
# The folded cell below finds equal scales and zero points in the observers of `quantize_dynamic`.

# %% jupyter={"source_hidden": true}
import torch.ao.quantization as tq

for symmetric, scheme in ((True, torch.per_channel_symmetric), (False, torch.per_channel_affine)):
    observer = tq.PerChannelMinMaxObserver(ch_axis=0, dtype=torch.qint8, qscheme=scheme)
    observer(weight)
    scale, zero_point = choose_scale(weight.amin(1), weight.amax(1), 8, symmetric)
    library_scale, library_zero = observer.calculate_qparams()
    assert torch.equal(scale, library_scale), "scales differ"
    assert torch.equal(zero_point, library_zero.long()), "zero points differ"

groups = blocks_of(weight, "group")
scale, zero_point = choose_scale(groups.amin(1), groups.amax(1), 4, True)
fake = torch.fake_quantize_per_channel_affine(groups, scale, zero_point.int(), 0, *codes_between(4))
ours = dequantize(quantize(groups, scale[:, None], 0, 4), scale[:, None], 0)
assert torch.equal(fake, ours), "int4 groups differ from torch"
print("scales, zero points and int4 groups: equal to torch")

# %% [markdown]
# ## The clipping range
# A narrower range gives finer marks and cuts off what lies outside. By hand: the values 0.1, 0.2, 0.3 and 9.0 on 4
# bits. A ruler up to 9.0 has marks 1.2 apart: the three small values become 0. A ruler up to 0.3 keeps them and turns
# 9.0 into 0.3. Which is better depends on what the large value is for.
#
# Four ways to choose the limit of a symmetric range:
#
# - **min-max**: the largest magnitude; nothing is cut.
# - **percentile**: all but the largest 0.01 % fit.
# - **MSE**: the limit with the smallest mean squared error.
# - **entropy**: clip where the re-binned histogram diverges least (in KL) from the original, as TensorRT calibrates.


# %%
def minmax(x, bits):
    """x [rows, n] -> one limit per row, as do the next two."""
    return x.abs().amax(1)


# %%
def percentile(x, bits, keep=0.9999):
    return x.abs().kthvalue(math.ceil(keep * x.shape[1]), 1).values


# %%
def mse(x, bits, shrink=0.75, steps=12):
    best, limit = None, x.abs().amax(1)
    for step in range(steps):
        candidate = minmax(x, bits) * shrink**step
        scale, zero = choose_scale(-candidate[:, None], candidate[:, None], bits, True)
        error = (dequantize(quantize(x, scale, zero, bits), scale, zero) - x).square().mean(1)
        limit = limit if best is None else torch.where(error < best, candidate, limit)
        best = error if best is None else torch.minimum(best, error)
    return limit


# %%
def entropy(x, bits, bins=2048):
    """One limit for the whole tensor: compare clipped histograms with what 2^(bits-1) coarse bins keep."""
    top, levels = x.abs().max(), 2 ** (bits - 1)
    histogram = torch.histc(x.abs(), bins, 0, top.item())
    divergence = {}
    for width in range(levels, bins + 1, 32):
        clipped = histogram[:width].clone()
        coarse = torch.arange(width) * levels // width
        total = torch.zeros(levels).index_add(0, coarse, clipped)
        used = torch.zeros(levels).index_add(0, coarse, (clipped > 0).float())
        coarse = torch.where(clipped > 0, (total / used.clamp(min=1))[coarse], 0)
        clipped[-1] += histogram[width:].sum()  # what is cut off piles up at the edge
        p, q = clipped / clipped.sum(), coarse / coarse.sum()
        divergence[width] = (p * (p.clamp(min=1e-12) / q.clamp(min=1e-9)).log()).sum().item()
    return top[None] * min(divergence, key=divergence.get) / bins


# %%
clippings = {"min-max": minmax, "percentile": percentile, "MSE": mse, "entropy": entropy}

# %% [markdown]
# We try them on a real weight, and on a real activation: the input of `down_proj` of the same layer on calibration
# text.


# %% jupyter={"source_hidden": true}
@torch.inference_mode()
def watch(net, windows, look):
    """Run `net` window by window; {layer: [look(layer, its input [1, tokens, in]) for each window]}."""
    seen, hooks = {}, []
    for name, module in net.named_modules():

        def hook(module, inputs, name=name):
            seen.setdefault(name, []).append(look(name, inputs[0]))

        if isinstance(module, Linear):
            hooks.append(module.register_forward_pre_hook(hook))
    try:
        for window in windows.split(1):
            net(window, use_cache=False, logits_to_keep=1)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


# %%
middle = layer_name.replace("up_proj", "down_proj")
activation = watch(net, calibration[:1], lambda name, x: x[0].clone() if name == middle else None)[middle][0]
tensors = {f"weight of {layer_name}": weight, f"input of {middle}": activation}
limits = {
    (name, clip): function(x.reshape(1, -1), bits).item()
    for name, x in tensors.items()
    for clip, function in clippings.items()
}


# %%
def relative_error(x, limit, bits):
    scale, zero = choose_scale(-limit, limit, bits, True)
    return ((dequantize(quantize(x, scale, zero, bits), scale, zero) - x).norm() / x.norm()).item()


# %%
rows = []
for (name, clip), limit in limits.items():
    x = tensors[name]
    rows.append(
        {
            "tensor": name,
            "clipping": clip,
            "limit": limit,
            "cut off, %": 100 * (x.abs() > limit).float().mean().item(),
            f"error, {bits} bits, %": 100 * relative_error(x, torch.tensor(limit), bits),
        }
    )

# %% jupyter={"source_hidden": true}
fig, panels = plt.subplots(1, 2, figsize=(11, 3.2))
for panel, (name, x) in zip(panels, tensors.items()):
    panel.hist(x.flatten().numpy(), bins=200, color=figures.PALETTE[4], log=True)
    for clip, color, style in zip(clippings, figures.PALETTE, ("-", "--", ":", "-.")):
        panel.axvline(limits[name, clip], color=color, linestyle=style, label=clip)
        panel.axvline(-limits[name, clip], color=color, linestyle=style)
    panel.set(title=name, xlabel="value", ylabel="count (log)")
panels[1].legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
figures.show(
    fig,
    table=pd.DataFrame(rows),
    alt="Histograms with logarithmic counts of a weight and an "
    "activation, with the four clipping limits as vertical lines. The weight is bell-shaped; the "
    "activation is a narrow peak with tails that reach far beyond most of its values.",
)

# %% [markdown]
# On the weight, MSE and entropy lower the error from 3.7 % to 2.4 %. On the activation entropy raises it from 15 % to
# 19 %: it keeps the many small values and cuts the few large ones. Remember this row; it decides below.
#
# ### Try it
# Bits, granularity and clipping of the weight above. With the keyboard: Tab goes from control to control, the arrows
# change the bits, Space opens a list. Without a live front end the picture below stays as it is.


# %%
def rounded(bits, size, clipping):
    """The weight after quantization, [ranges, size], and the limit of each range; size: values per range."""
    x = weight.reshape(-1, size)
    limit = clippings[clipping](weight.view(1, -1) if clipping == "entropy" else x, bits)
    limit = torch.minimum(limit, minmax(x, bits))
    scale, zero = choose_scale(-limit[:, None], limit[:, None], bits, True)
    return dequantize(quantize(x, scale, zero, bits), scale, zero), limit


# %% jupyter={"source_hidden": true}
def draw(bits, size, clipping):
    """Histogram of the weight before and after quantization, and the error in %."""
    restored, limit = rounded(bits, size, clipping)
    error = 100 * ((restored.flatten() - weight.flatten()).norm() / weight.norm()).item()
    fig, ax = plt.subplots(figsize=(8, 3))
    edge = weight.abs().max().item()
    look = dict(bins=300, range=(-edge, edge), histtype="step", log=True)
    ax.hist(weight.flatten().numpy(), color=figures.PALETTE[4], label="before", **look)
    ax.hist(restored.flatten().numpy(), color=figures.PALETTE[1], label="after", **look)
    for side in (-1, 1):
        ax.axvline(side * limit.median().item(), color=figures.PALETTE[0], linestyle="--")
    ax.set(title=f"{bits} bits, {size:,} values per range, {clipping}: error {error:.1f} %")
    ax.set(xlabel="weight (dashed: median limit)", ylabel="count (log)")
    ax.legend(fontsize=8)
    return fig, error


# %% jupyter={"source_hidden": true}
import base64

import ipywidgets
from IPython.display import HTML

from helpers.process import headless


# %% jupyter={"source_hidden": true}
def controls():
    ranges = {f"group of {group_size}": group_size, "channel": weight.shape[1], "tensor": weight.numel()}
    return [
        ipywidgets.BoundedIntText(bits, min=2, max=8, description="bits"),
        ipywidgets.Dropdown(options=ranges, description="range per"),
        ipywidgets.Dropdown(options=list(clippings), description="clipping"),
    ]


# %% jupyter={"source_hidden": true}
class Explorer:
    """Three controls and a picture; redrawn when a control moves."""

    def __init__(self):
        self.controls, self.picture = controls(), ipywidgets.HTML()
        for control in self.controls:
            control.observe(self.redraw, "value")
        self.redraw()

    def redraw(self, change=None):
        fig, self.error = draw(*(control.value for control in self.controls))
        alt, png = fig.axes[0].get_title(), base64.b64encode(figures.to_png(fig)).decode()
        self.picture.value = f'<img alt="Histogram of the weights: {alt}" src="data:image/png;base64,{png}">'
        plt.close(fig)


# %% jupyter={"source_hidden": true}
explorer = Explorer()
panel = ipywidgets.VBox([ipywidgets.HBox(explorer.controls), explorer.picture])
HTML(explorer.picture.value) if headless() else panel  # in batch: the picture alone

# %% jupyter={"source_hidden": true}
rows = []
for size, clip in ((weight.numel(), "min-max"), (weight.numel(), "MSE"), (group_size, "min-max")):
    for width in (8, 4, 3):
        restored, _ = rounded(width, size, clip)
        error = 100 * ((restored.flatten() - weight.flatten()).norm() / weight.norm()).item()
        rows.append({"bits": width, "values per range": size, "clipping": clip, "error, %": error})
shown, error = draw(4, weight.numel(), "min-max")
figures.show(
    shown,
    table=pd.DataFrame(rows),
    alt="The weight before and after rounding to 4 bits with one min-max scale for the tensor: "
    f"a few large weights stretch the ruler, and most weights share three marks. The error is {error:.0f} %.",
)

# %% [markdown]
# ## Dynamic quantization: the guide's call
# Weights become int8 once. Activations get their scale *dynamically*, from the tensor at hand, in every forward pass.
# Nothing is calibrated.

# %%
from torch.quantization import quantize_dynamic

if torch.backends.quantized.engine == "none":  # macOS wheels ship an engine and do not select it
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]


# %% jupyter={"source_hidden": true}
def headline(text):
    return str(text).split("\n")[0][:150]


# %%
with warnings.catch_warnings(record=True) as caught, memory.track() as guide_cost:
    warnings.simplefilter("always")
    guide = quantize_dynamic(net, {torch.nn.Linear}, dtype=torch.qint8)
print(f"engine {torch.backends.quantized.engine}, {guide_cost.seconds:.1f} s; warnings:")
for warning in {headline(item.message) for item in caught if issubclass(item.category, DeprecationWarning)}:
    print(" ", warning)
warnings.filterwarnings("ignore", category=DeprecationWarning)

# %%
results, second = {}, {}


# %%
def report(name, quantized):
    """Quality on the whole evaluation text, and size."""
    memory.release()
    results[name] = evaluation.score(quantized, windows, reference)
    second[name] = evaluation.score(quantized, in_domain, second_reference)
    sizes[name] = memory.weight_bytes(quantized)
    s, mb = results[name], sizes[name] / 1e6
    print(
        f"{name}: perplexity {reference.perplexity:.2f} -> {s.perplexity:.2f}, KL {s.kl_divergence:.3f}, "
        f"same top-1 {s.top1_agreement:.1%}; {sizes['fp32'] / 1e6:.0f} -> {mb:.0f} MB, "
        f"{8 * sizes[name] / parameters:.1f} bits per weight, embeddings counted"
    )
    return s


# %%
scores = report("int8-dynamic", guide)
guide.set_input_embeddings(net.get_input_embeddings())  # the same numbers: one copy in memory is enough

# %% [markdown]
# The guide promises "minimal accuracy loss". The call ran without an error, and the model is ruined: perplexity rose
# from 39.6 to 206, and only 30 % of the most likely tokens stayed. The model is not four times smaller either, but
# 2.2 times: the embedding stays float32, and the output head, which shared the embedding's memory, is now a tensor of
# its own.
#
# ## Why?
# Three suspects: the weights (one scale per tensor), the 7 bits of the activations, and the activations themselves.
# **Predict first:** which one is it? We look at what enters each layer.


# %%
def extremes(name, x):
    """Largest magnitude per channel, median magnitude, and the position of the largest; x [1, tokens, in]."""
    x = x[0].abs()
    return x.amax(0), x[::16].median(), x.amax(1).argmax().item()  # every 16th token is enough for a median


# %%
channel_max, rows = {}, []
for name, items in watch(net, calibration, extremes).items():
    largest, medians, positions = zip(*items)
    channel_max[name] = torch.stack(largest).amax(0)
    top, median = channel_max[name].max().item(), torch.stack(medians).median().item()
    rows.append([name, top, median, top / median, channel_max[name].argmax().item(), positions])
columns = ["layer", "largest |x|", "median |x|", "ratio", "channel", "positions of the largest"]
activations = pd.DataFrame(rows, columns=columns).sort_values("ratio", ascending=False).set_index("layer")
activations.head(8)

# %% jupyter={"source_hidden": true}
body = activations[activations.index.str.contains(r"\.\d+\.")].copy()
body["depth"] = body.index.str.extract(r"\.(\d+)\.")[0].astype(int).values
body["kind"] = body.index.str.split(".").str[-1]
one_each = {"q_proj": "q, k, v", "o_proj": "o", "up_proj": "gate, up", "down_proj": "down"}  # shared inputs
body = body[body["kind"].isin(one_each)].replace({"kind": one_each})
fig, ax = plt.subplots(figsize=(8, 3.4))
for (kind, part), color, marker in zip(body.groupby("kind"), figures.PALETTE, "osDv"):
    ax.scatter(part["depth"], part["ratio"], label=kind, color=color, marker=marker, s=22)
ax.set(yscale="log", xlabel="layer", ylabel="largest |x| / median |x|")
ax.set_title("A few down projections get inputs far larger than the rest")
ax.legend(fontsize=9, ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1.1))
by_kind = body.groupby("kind")["ratio"].agg(["median", "max"]).sort_values("max", ascending=False)
figures.show(
    fig,
    table=by_kind,
    alt="Ratio of the largest to the median activation that enters a layer, "
    f"over depth (log). {(body['ratio'] < 200).mean():.0%} lie below 200; a few {by_kind.index[0]} "
    f"layers stand far above, up to {by_kind['max'].iloc[0]:,.0f}.",
)

# %% [markdown]
# In most layers the largest activation is less than 200 times the median. In two down projections it is thousands of
# times the median, in one channel, at the very first token. These are the *massive activations* of language models
# ([Sun et al. 2024](https://arxiv.org/abs/2402.17762)); at the inputs of the down projections they are spikes of the
# gated feed-forward ([Yang et al. 2024](https://arxiv.org/abs/2405.14428)). The next table shows what one scale per
# tensor makes of the worst of them:

# %%
worst = activations.index[0]
x = watch(net, calibration[:1], lambda name, x: x[0].clone() if name == worst else None)[worst][0]
tensor, token = (x.min(), x.max()), (x.amin(1, True), x.amax(1, True))
rows = []
for label, (low, high), width in (("tensor", tensor, 7), ("tensor", tensor, 8), ("token", token, 8)):
    scale, zero_point = choose_scale(low, high, width, False)
    codes = quantize(x, scale, zero_point, width)
    gap = dequantize(codes, scale, zero_point) - x
    rows.append(
        {
            "scale per": label,
            "bits": width,
            "median scale": scale.median().item(),
            "codes that mean 0.0, %": 100 * (codes == zero_point).float().mean().item(),
            "error without the first token, %": 100 * (gap[1:].norm() / x[1:].norm()).item(),
        }
    )
print(worst)
pd.DataFrame(rows)

# %% [markdown]
# One number stretches the ruler until nearly every other value rounds to zero. **Test of that explanation:** feed the
# same model the same text one token at a time. Then each tensor *is* one token, and only the first one suffers. If
# the explanation is right, the KL must fall.

# %%
import torch.nn.functional as F


# %%
def divergence(logits, expected):
    """Mean KL(expected || logits) in nats per token; both [tokens, vocabulary]."""
    given, wanted = logits.log_softmax(-1), expected.log_softmax(-1)
    return F.kl_div(given, wanted, log_target=True, reduction="batchmean").item()


# %%
@torch.inference_mode()
def token_by_token(net, ids):
    past, logits = None, []
    for position in range(ids.shape[1]):
        output = net(ids[:, position : position + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits[0])
    return torch.cat(logits)


# %%
ids = windows[:1, :128]
with torch.inference_mode():
    expected, at_once = net(ids).logits[0], guide(ids).logits[0]
    in_company = guide(windows[:4, :128]).logits[0]
stepwise = divergence(token_by_token(guide, ids), expected)
prefill = divergence(at_once, expected)
print(f"KL of one model on {ids.numel()} tokens: at once {prefill:.3f}, token by token {stepwise:.3f}")
changed = (at_once.argmax(-1) != in_company.argmax(-1)).float().mean().item()
print(f"and with other texts in the batch, {changed:.0%} of its top-1 predictions for this text change")

# %% [markdown]
# The KL fell from 1.44 to 0.25 with the same weights. So the weights are not the culprit. Also note: with one scale
# per tensor, an answer depends on who else is in the batch.
#
# The second suspect: torch's dynamic Linear asks for `reduce_range=True`, **7 bits** for activations. That protects
# CPUs without VNNI instructions, which add two 8-bit products in 16 bits and overflow silently. The folded cells test
# whether this CPU needs it.


# %% jupyter={"source_hidden": true}
def kernels_are_exact():
    """Largest possible sums through the two int8 kernels used here: torch.ao's, and the one below torchao."""
    codes = torch.full((32, 512), 127, dtype=torch.int8)
    ones = torch.ones(32, 512)
    weight = torch.quantize_per_tensor(ones, 1 / 127, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    dynamic = torch.ops.quantized.linear_dynamic(ones, packed, reduce_range=False)
    right = torch._int_mm(codes, codes.t()) == 512 * 127 * 127
    return bool((dynamic - 512).abs().max() < 1) and bool(right.all())


# %% jupyter={"source_hidden": true}
exact_sums = kernels_are_exact()
print(f"8-bit sums on this CPU: {'exact' if exact_sums else 'they overflow, so 7 bits stay'}")

# %% jupyter={"source_hidden": true}
PROBE = """
import torch
codes = torch.full((32, 512), 127, dtype=torch.int8)
print(int(torch._int_mm(codes, codes.t())[0, 0]))"""
without_vnni = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
old = subprocess.run([sys.executable, "-c", PROBE], env=without_vnni, capture_output=True, text=True)
print(f"512 x 127 x 127 = {512 * 127 * 127:,}; oneDNN held to AVX2 computes {int(old.stdout):,}")

# %% [markdown]
# ## The rescue, step by step
# Each row adds one repair. It is measured on the first `probe_tokens` of the evaluation text, and so is the row for
# fp32. (The guide's call scores differently there than on the whole text: the batch is smaller.)
#
# 1. **Weights per channel**: `per_channel_dynamic_qconfig`.
# 2. **Output head left in float**: it shares the embedding's memory, so quantizing it *adds* bytes.
# 3. **8 bits for activations**, if this CPU is exact. The only switch is the module's `version`: below 4, its
#    `forward` leaves `reduce_range` off.
# 4. **The worst layers left in float**, by the ratio above.

# %%
linears = [name for name, module in net.named_modules() if isinstance(module, Linear)]
head = [name for name in linears if net.get_submodule(name) is net.get_output_embeddings()]
worst_layers = [name for name in activations.index if name not in head]
float_layers = worst_layers[: left_out if exact_sums else 2 * left_out]  # 7 bits are rougher, so more layers stay float


# %%
def clone(net, shared=None):
    """A copy that shares these tensors, or all: quantizing replaces a tensor, it changes none."""
    return copy.deepcopy(net, {id(tensor): tensor for tensor in shared or net.parameters()})


# %%
def dynamic(net, skip=()):
    """torch's quantize_dynamic with weights per channel."""
    targets = {name: tq.per_channel_dynamic_qconfig for name in linears if name not in skip}
    return quantize_dynamic(clone(net), targets, dtype=torch.qint8, inplace=True)


# %%
def full_range(quantized):
    """8 bits for activations, if this CPU is exact."""
    for module in quantized.modules():
        if exact_sums and isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            module.version = 3
    return quantized


# %%
def put_back(quantized, names, source):
    """Float layers of `source` in place of quantized ones."""
    for name in names:
        quantized.set_submodule(name, source.get_submodule(name))


# %%
ladder = {}


# %%
def rung(name, quantized):
    scores = evaluation.score(quantized, probe, reference)
    quality = [scores.kl_divergence, scores.perplexity, scores.top1_agreement]
    ladder[name] = [*quality, memory.weight_bytes(quantized) / 1e6]


# %%
def ladder_table():
    return pd.DataFrame.from_dict(ladder, orient="index", columns=["KL", "perplexity", "same top-1", "MB"])


# %%
rung("fp32", net)
rung("the guide's call", guide)

# %%
repaired = dynamic(net)
rung("weights per channel", repaired)
put_back(repaired, head, net)
rung("+ output head left in float", repaired)
if exact_sums:
    rung("+ 8 bits for activations", full_range(repaired))
put_back(repaired, float_layers, net)
rung(f"+ {len(float_layers)} worst layers left in float", repaired)
del repaired
ladder_table()

# %% [markdown]
# Finer weights bring little: the KL goes from 1.90 to 1.64. The eighth bit of the activations brings 1.57 down to
# 0.72, and eight layers in float bring it down to 0.15.
#
# ### SmoothQuant: move the range into the weights
# By hand: an activation (100, 1) meets the weights (0.5, 0.5). Divide the first activation by 10 and multiply its
# weight by 10: (10, 1) meets (5, 0.5). The product is 50.5 both times, and the activation's largest value is now 10
# times its smallest instead of 100 times.
#
# SmoothQuant does that with each channel ([Xiao et al. 2022](https://arxiv.org/abs/2211.10438)): `s = max|x|^alpha /
# max|w|^(1 - alpha)`. The division costs nothing at run time, because it is folded into the layer before:
#
# - inputs of q, k, v and of gate, up: into the RMSNorm before them, as in the paper;
# - input of o: into the rows of v (several query heads read one value head, so they share `s`). This and the next one
#   extend the paper's method;
# - input of down: into the rows of up, since `down(act(gate) * up)` is linear in up.


# %%
def balance(x_max, w_max, alpha):
    return (x_max.clamp(min=1e-5) ** alpha / w_max.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)


# %%
def column_max(*layers):
    return torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)


# %%
def divide_rows(layer, s):
    layer.weight.div_(s[:, None])
    if layer.bias is not None:
        layer.bias.div_(s)


# %%
def smooth_inputs(block, layer, channel_max, alpha):
    """Fold s of the inputs of q, k, v and of gate, up into the norms before them."""
    attention, mlp = block.self_attn, block.mlp
    before_attention = [attention.q_proj, attention.k_proj, attention.v_proj]
    for norm, name, linears in (
        (block.input_layernorm, "self_attn.q_proj", before_attention),
        (block.post_attention_layernorm, "mlp.up_proj", [mlp.gate_proj, mlp.up_proj]),
    ):
        s = balance(channel_max[f"{layer}.{name}"], column_max(*linears), alpha)
        norm.weight.div_(s)
        for linear in linears:
            linear.weight.mul_(s)


# %% jupyter={"source_hidden": true}
@torch.no_grad()
def smooth(net, channel_max, alpha):
    """A copy of a Llama-shaped `net` with activation range moved into weights: the same function."""
    net = clone(net, [net.get_input_embeddings().weight])
    for index, block in enumerate(net.model.layers):
        attention, mlp, layer = block.self_attn, block.mlp, f"model.layers.{index}"
        smooth_inputs(block, layer, channel_max, alpha)
        s = balance(channel_max[f"{layer}.mlp.down_proj"], column_max(mlp.down_proj), alpha)
        divide_rows(mlp.up_proj, s)
        mlp.down_proj.weight.mul_(s)
        per_head = (net.config.num_key_value_heads, -1, attention.head_dim)  # query heads share a value head
        x_max = channel_max[f"{layer}.self_attn.o_proj"].view(per_head)
        s = balance(x_max.amax(1), column_max(attention.o_proj).view(per_head).amax(1), alpha)
        divide_rows(attention.v_proj, s.flatten())
        attention.o_proj.weight.mul_(s[:, None].expand_as(x_max).flatten())
    return net


# %% [markdown]
# We choose alpha on calibration text, so the evaluation stays fair.

# %%
sample = calibration[:1]
with torch.inference_mode():
    expected = net(sample).logits[0]

search = {}
for alpha in (0.5, 0.7):
    smoothed = smooth(net, channel_max, alpha)
    with memory.track() as cost:
        quantized = full_range(dynamic(smoothed, head))
    with torch.inference_mode():
        search[alpha] = divergence(quantized(sample).logits[0], expected), smoothed, quantized, cost
alpha = min(search, key=lambda tried: search[tried][0])
print("KL on calibration text:", {name: round(kl, 4) for name, (kl, *_) in search.items()}, "-> alpha", alpha)
_, smoothed, rescued, rescue_cost = search[alpha]
del search, quantized

# %%
with torch.inference_mode():
    unchanged = divergence(smoothed(sample).logits[0], expected)
del expected
print(f"KL of the folded float model: {unchanged:.1e}")
assert abs(unchanged) < 1e-4, f"folding changed the float model (KL {unchanged:.2g})"
rung("+ SmoothQuant, only the head left in float", rescued)
put_back(rescued, float_layers, smoothed)
rung(f"+ SmoothQuant and {len(float_layers)} worst layers", rescued)

# %% [markdown]
# ### LLM.int8(): leave the outlier columns in 16 bits
# LLM.int8() ([Dettmers et al. 2022](https://arxiv.org/abs/2208.07339)) answers the same problem in another way. It
# gives each token its own scale, and it multiplies the few *columns* that hold an activation of 6 or more in floating
# point. The threshold of 6 is the paper's. We write it from scratch:


# %%
def llm_int8(x, weight, threshold=6.0):
    """x [tokens, in], weight [out, in]: x @ weight.T with int8 codes, but for the columns with outliers."""
    outlier = x.abs() >= threshold
    columns = outlier.any(0)
    weight_max = weight.abs().amax(1, keepdim=True)
    weight_codes = (weight * (127 / weight_max)).round()
    token_max = x.masked_fill(outlier, 0).abs().amax(1, keepdim=True)  # of all ordinary values, in any column
    codes = (x * (127 / token_max)).round().masked_fill(columns, 0)
    integer_part = (codes @ weight_codes.T) * (token_max * weight_max.T) / 127**2
    return integer_part + x[:, columns] @ (weight_codes * weight_max / 127)[:, columns].T


# %%
import bitsandbytes as bnb

matrix, x = net.get_submodule(worst).weight.detach().half().float(), x.half().float()  # bitsandbytes rounds these
library = bnb.nn.Linear8bitLt(*matrix.T.shape, bias=False, has_fp16_weights=False, threshold=6.0)
library.weight = bnb.nn.Int8Params(matrix.clone(), requires_grad=False, has_fp16_weights=False)
library = library.to("cpu").eval()
outputs = {"from scratch": llm_int8(x, matrix), "bitsandbytes": library(x)}
outputs["one scale per token, no outlier columns"] = llm_int8(x, matrix, math.inf)
outputs["bitsandbytes in training mode"] = library.train()(x)


# %%
def percent_off(output, right):
    return 100 * ((output - right).norm() / right.norm()).item()


right = x @ matrix.T
rows = {name: [percent_off(y[:1], right[:1]), percent_off(y[1:], right[1:])] for name, y in outputs.items()}
gap = percent_off(outputs["from scratch"][1:], outputs["bitsandbytes"][1:])
print(f"{worst}: {int((x.abs() >= 6).any(0).sum())} of {x.shape[1]} columns hold outliers")
print(f"from scratch and bitsandbytes differ by {gap:.4f} % of the output")
assert gap < 0.01, "LLM.int8() from scratch is not the library's"
pd.DataFrame.from_dict(rows, orient="index", columns=["error of the first token, %", "of the others, %"])

# %% [markdown]
# From scratch and library agree. Two details decide that: the library rounds inputs and weights to float16 first, and
# a token's scale comes from all its ordinary values, also those in outlier columns. The outlier columns help the
# first token, which holds the outliers (0.71 % instead of 0.96 %); for the others the scale per token is enough.
#
# **A trap:** on a CPU, bitsandbytes in training mode rounds the weights and not the inputs. Its smaller error is not
# the error that you get. Call `.eval()` before you measure.
#
# The library's call takes one line of configuration, and nothing is calibrated:

# %%
from transformers import BitsAndBytesConfig

config = BitsAndBytesConfig(load_in_8bit=True)
eight_bit = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32, quantization_config=config).eval()
rung("LLM.int8() (bitsandbytes)", eight_bit)
del eight_bit
memory.release()
ladder_table().tail(4)

# %% [markdown]
# LLM.int8() loses less here than any torch route, with a KL of 0.026. SmoothQuant has another advantage: all of its
# products stay in int8, so plain integer kernels run it, static ones too.

# %% jupyter={"source_hidden": true}
table = ladder_table().drop("fp32")
fig, ax = plt.subplots(figsize=(8, 3.4))
ax.plot(table["KL"][::-1], table.index[::-1], "o", color=figures.PALETTE[0], markersize=8)
for name, value in table["KL"].items():
    ax.annotate(f"{value:.2f}", (value, name), xytext=(8, -4), textcoords="offset points", fontsize=9)
ax.axvline(0.2, color=figures.PALETTE[1], linestyle="--")
ax.set(xscale="log", xlabel="KL divergence from fp32 (log, lower is better); dashed: the target 0.2")
ax.set_title("8-bit activations need a finer scale, not finer weights")
ends = (
    f"from {table['KL'].iloc[0]:.2f} with the guide's call down to {table['KL'].min():.3f} with {table['KL'].idxmin()}"
)
figures.show(fig, table=ladder_table(), alt=f"KL divergence after each repair, {ends}.")

# %% [markdown]
# The target of 0.2 is our choice: [00](00_start_here.ipynb) shows what a KL of that size does to an answer.

# %%
rescued_kl = report("int8-dynamic-rescued", rescued).kl_divergence
assert rescued_kl < 0.2, f"the rescued torch route has KL {rescued_kl:.3f}, expected under 0.2"

# %% [markdown]
# ## Dynamic quantization with torchao
# torch.ao.quantization is deprecated; torchao replaces it. One call on the untouched model gives weights per channel
# and activations **per token**. We put the output head back into float, as above.

# %%
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

ao_config = Int8DynamicActivationInt8WeightConfig(reduce_range=not exact_sums, set_inductor_config=False)
ao = clone(net)
with memory.track() as ao_cost:
    quantize_(ao, ao_config)
rung("torchao", ao)
put_back(ao, head, net)
rung("torchao, output head left in float", ao)
ladder_table().tail(2)

# %%
ao_kl = report("int8-dynamic-torchao", ao).kl_divergence
print(f"{ao_cost.seconds:.1f} s to quantize")
assert ao_kl <= 0.06 or not exact_sums, f"torchao's dynamic int8 has KL {ao_kl:.3f}, expected at most 0.06"

# %% [markdown]
# ## Static quantization
# Static means: activation scales are fixed beforehand, from calibration text. No range is searched at run time, but
# one scale must now serve every token that will ever come. An observer watches each layer's input, here on the
# SmoothQuant model from above.

# %%
from torchao.quantization import Int8StaticActivationInt8WeightConfig, MappingType, PerRow, PerTensor
from torchao.quantization.observer import AffineQuantizedMinMaxObserver

act_bits = 8 if exact_sums else 7
qmin, qmax = codes_between(act_bits)


# %%
def observer():
    dtypes = dict(scale_dtype=torch.float32, zero_point_dtype=torch.int32)
    return AffineQuantizedMinMaxObserver(
        MappingType.SYMMETRIC, torch.int8, PerTensor(), qmin, qmax, keepdim=True, **dtypes
    )


# %%
def calibrate(net, windows):
    """One min-max observer per Linear input; {layer name: scale [1, 1, 1]}."""
    observers = {name: observer() for name in linears}
    watch(net, windows, lambda name, x: observers[name](x) is None)
    return {name: seen.calculate_qparams()[0] for name, seen in observers.items()}


# %%
def static(net, scales, skip):
    """A copy of `net` with int8 weights per channel and one fixed activation scale per layer."""
    net = clone(net)
    for name in linears:
        if name not in skip:
            quantize_(
                net.get_submodule(name),
                Int8StaticActivationInt8WeightConfig(
                    act_quant_scale=scales[name],
                    granularity=[PerTensor(), PerRow()],
                    reduce_range=not exact_sums,
                    set_inductor_config=False,
                ),
            )
    return net


# %%
with memory.track() as static_cost:
    scales = calibrate(smoothed, calibration)
    fixed = static(smoothed, scales, head)
few = probe[:4]
after_smoothing = evaluation.score(fixed, few, reference).kl_divergence
put_back(fixed, float_layers, smoothed)
rung(f"static + SmoothQuant and {len(float_layers)} worst layers", fixed)
ladder_table().tail(2)

# %% [markdown]
# ### Without SmoothQuant: can clipping replace it?
# Static int8 of the untouched model, with each clipping range. The ranges come from one calibration window (every
# eighth token of it); the last row is the SmoothQuant model from above, whose ranges come from all calibration
# windows. If outliers were noise, cutting them off would help. **Predict first:** which of the four is worst?


# %%
def clip_all(name, x):
    x = x[:, ::8].reshape(1, -1)
    return {clip: function(x, act_bits).item() for clip, function in clippings.items()}


# %%
def clipped_scales(net):
    """{clipping: {layer name: scale}} from one calibration window."""
    half = (qmax - qmin) / 2
    limits = watch(net, calibration[:1], clip_all)
    return {
        clip: {name: torch.tensor(limit[clip] / half).view(1, 1, 1) for name, (limit,) in limits.items()}
        for clip in clippings
    }


# %%
clipping = {}
for clip, clip_scales in clipped_scales(net).items():
    if not clipping:
        clipped = static(net, clip_scales, head)
    for name in clip_scales.keys() - head:
        clipped.get_submodule(name).weight.act_quant_scale = clip_scales[name]
    clipping[clip] = evaluation.score(clipped, few, reference).kl_divergence
clipping["min-max, after SmoothQuant, all calibration windows"] = after_smoothing
del clipped
memory.release()
print(f"static int8 by clipping range, {few.numel():,} tokens")
pd.DataFrame({"KL": clipping})

# %% [markdown]
# Entropy is worst by far, with a KL of 6.3: it saves the many small values and cuts the outliers. Min-max keeps the
# outliers and drowns the rest, with 0.8. So the massive activations are not noise; the model works with them.
# SmoothQuant avoids the choice: it moves the large values into the weights.
#
# ### The same with torch's eager flow
# The older API for static quantization has four steps: wrap each Linear between `QuantStub` and `DeQuantStub`,
# `prepare`, calibrate, `convert`. It rounds each layer's **output** to int8 as well.

# %%
range_observer = tq.MinMaxObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=255 if exact_sums else 127)
qconfig = tq.QConfig(activation=range_observer, weight=tq.default_per_channel_weight_observer)
eager = clone(smoothed)
for name in linears:
    if name not in head + float_layers:
        wrapped = tq.QuantWrapper(eager.get_submodule(name))
        wrapped.qconfig = qconfig
        tq.propagate_qconfig_(wrapped)
        eager.set_submodule(name, wrapped)

# %%
tq.prepare(eager, inplace=True)
with torch.inference_mode():
    for window in calibration[:2].split(1):
        eager(window, use_cache=False, logits_to_keep=1)
tq.convert(eager, inplace=True)
rung("static, torch eager, the same repairs", eager)
eager_rate = speed.decode(eager, new_tokens=12, runs=2).decode_tokens_per_s
del eager, wrapped
memory.release()
ladder_table().tail(2)

# %%
static_kl = report("int8-static", fixed).kl_divergence
del smoothed
memory.release()

# %% [markdown]
# ## Saving without a pickle
# The guide ends with `quantized_model.save_pretrained(...)`. On torch's and on torchao's model:

# %%
save_errors = {}
warnings.filterwarnings("ignore", message="TypedStorage")
for name, quantized in (("int8-dynamic", guide), ("int8-dynamic-torchao", ao)):
    with tempfile.TemporaryDirectory() as scratch:
        try:
            quantized.save_pretrained(scratch)
        except Exception as problem:
            save_errors[name] = f"{type(problem).__name__}: {headline(problem)}"
        print(f"{name}: {save_errors.get(name, 'saved')}\n  left behind: {sorted(os.listdir(scratch))}")

# %% [markdown]
# torch keeps codes and scales inside packed objects; bare `quantize_` leaves tensors that have no plain storage.
# `torch.save` would write a pickle, and loading a pickle can run any code. Three ways work:
#
# - torch: codes, scales and zero points are plain tensors; write them as safetensors and pack them again after
#   loading.
# - torchao dynamic: quantize through transformers' `TorchAoConfig`; then `save_pretrained` writes safetensors.
# - torchao static: torchao's own flattening into safetensors.
#
# `checkpoints.writing` gives a folder that appears under its name only when it is complete. transformers does not
# know torch's packed modules. If it found such tensors beside an ordinary config.json, it would warn and return
# **random weights**. `save_own_format` writes a config.json that plain `from_pretrained` refuses, with words that
# name `reload` below.


# %% jupyter={"source_hidden": true}
def unpack(net):
    """All tensors of a model with torch.ao dynamic Linears: codes and constants, and what stayed float."""
    tensors = dict(net.named_parameters())  # tied ones once
    for name, module in net.named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight, bias = module.weight(), module.bias()
            if weight.qscheme() == torch.per_channel_affine:
                scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
            else:
                scale = torch.tensor(weight.q_scale(), dtype=torch.float64)
                zero_point = torch.tensor(weight.q_zero_point())
            tensors[f"{name}.codes"] = weight.int_repr()
            tensors[f"{name}.scale"], tensors[f"{name}.zero_point"] = scale, zero_point
            if bias is not None:
                tensors[f"{name}.bias"] = bias.detach()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


# %% jupyter={"source_hidden": true}
loader = "reload() in notebook 01_ptq_dynamic_int8.ipynb"
for name, quantized in (("int8-dynamic", guide), ("int8-dynamic-rescued", rescued)):
    version = str(quantized.model.layers[0].self_attn.q_proj.version)  # tells 7-bit from 8-bit activations
    metadata = {"format": "pt", "kind": "torch.ao dynamic", "version": version}
    with checkpoints.writing(output_dir, name) as scratch:
        checkpoints.save_own_format(scratch, unpack(quantized), net.config, loader, metadata)
        tokenizer.save_pretrained(scratch)

# %%
from transformers import TorchAoConfig

through = AutoModelForCausalLM.from_pretrained(
    found.path, dtype=torch.float32, quantization_config=TorchAoConfig(ao_config)
).eval()
with checkpoints.writing(output_dir, "int8-dynamic-torchao") as scratch:
    through.save_pretrained(scratch), tokenizer.save_pretrained(scratch)
with torch.inference_mode():
    assert torch.equal(through(sample).logits, ao(sample).logits), "TorchAoConfig and quantize_ differ"
del through

# %% jupyter={"source_hidden": true}
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

state = {name: value.detach() for name, value in fixed.named_parameters()}  # tied ones once
tensors, metadata = flatten_tensor_state_dict(state)
metadata.update(format="pt", kind="torchao")
with checkpoints.writing(output_dir, "int8-static") as scratch:
    checkpoints.save_own_format(scratch, tensors, net.config, loader, metadata)
    tokenizer.save_pretrained(scratch)
del state, tensors

# %% [markdown]
# ### Reload
# Three functions load all of them. They bring their own imports, so they can be copied into a program of yours, and a
# fresh process can run them.


# %% jupyter={"source_hidden": true} tags=["reload"]
def packed_layer(tensors, name, version):
    """torch's dynamic int8 Linear from its codes, scale and zero point."""
    import torch
    from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear

    codes, scale, zero_point = (tensors[f"{name}.{part}"] for part in ("codes", "scale", "zero_point"))
    if scale.ndim:
        weight = torch._make_per_channel_quantized_tensor(codes, scale, zero_point, 0)
    else:
        weight = torch._make_per_tensor_quantized_tensor(codes, scale.item(), zero_point.item())
    linear = DynamicLinear(codes.shape[1], codes.shape[0])
    linear.set_weight_bias(weight, tensors.get(f"{name}.bias"))
    linear.version = int(version)
    return linear


# %% jupyter={"source_hidden": true} tags=["reload"]
def fill(net, tensors, metadata):
    """Put the tensors of a checkpoint into an empty model."""
    import warnings

    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    if metadata["kind"] == "torchao":
        net.load_state_dict(unflatten_tensor_state_dict(tensors, metadata)[0], strict=False, assign=True)
        net.tie_weights()
        return net.eval()
    warnings.filterwarnings("ignore", message=".*deprecated.*")
    net.load_state_dict(tensors, strict=False)  # what stayed float
    net.tie_weights()
    for name in [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]:
        net.set_submodule(name, packed_layer(tensors, name, metadata["version"]))
    return net.eval()


# %% jupyter={"source_hidden": true} tags=["reload"]
def reload(folder):
    """The quantized model in a checkpoint folder of this notebook; only safetensors and JSON are read."""
    from pathlib import Path

    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if not (Path(folder) / "base_config.json").is_file():  # a format that transformers knows
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = AutoConfig.from_pretrained(Path(folder) / "base_config.json")
    with no_init_weights():  # every one of them comes from the file
        net = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with safe_open(Path(folder) / "quantized.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    return fill(net, tensors, metadata)


# %% [markdown]
# We note decode speed and the logits of each model as it is in memory, next to fp32 and bf16.

# %%
bf16 = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.bfloat16).eval()
sizes["bf16"] = memory.weight_bytes(bf16)
bf16_scores = evaluation.score(bf16, windows, reference)
quantized_models = dict(zip(results, (guide, rescued, ao, fixed)))
rates = {
    name: speed.decode(quantized, new_tokens=12, runs=2)
    for name, quantized in {"fp32": net, "bf16": bf16, **quantized_models}.items()
}
sample = windows[:1, :128].clone()
with torch.inference_mode():
    before = {name: quantized(sample).logits for name, quantized in quantized_models.items()}
del bf16, guide, rescued, ao, fixed, quantized, quantized_models
memory.release()

# %% [markdown]
# Then a fresh Python process loads them. It has only the source of the three functions, the folders and the expected
# logits.

# %% jupyter={"source_hidden": true}
from safetensors.torch import save_file

FRESH = (
    "\n".join(map(inspect.getsource, (packed_layer, fill, reload)))
    + """
import sys, torch
from safetensors.torch import load_file
given = load_file(sys.argv[1])
with torch.inference_mode():
    for folder in sys.argv[2:]:
        name = folder.split("/")[-1]
        print(name, torch.equal(reload(folder)(given["sample"]).logits, given[name]))
"""
)

with tempfile.TemporaryDirectory() as scratch:
    given = f"{scratch}/given.safetensors"
    save_file({"sample": sample, **before}, given)
    folders = [checkpoints.folder(output_dir, name).as_posix() for name in before]
    done = subprocess.run([sys.executable, "-c", FRESH, given, *folders], capture_output=True, text=True)

# %% jupyter={"source_hidden": true}
assert done.returncode == 0, done.stderr[-500:]
answers = dict(line.split() for line in done.stdout.strip().splitlines())
for name in before:
    on_disk = sum(file.stat().st_size for file in checkpoints.folder(output_dir, name).glob("*.safetensors"))
    print(
        f"{name:22} same logits, bit for bit: {answers[name]}; {on_disk / 1e6:.0f} MB on disk, "
        f"{sizes[name] / 1e6:.0f} in memory"
    )
    assert answers[name] == "True", f"{name} is another model in a fresh process"

# %% [markdown]
# ## Size, quality, speed

# %%
table = pd.DataFrame({name: s.summary() for name, s in results.items()}).T.reindex(["fp32", "bf16", *results])
table.loc["fp32"] = [reference.perplexity, 0.0, 1.0]
table.loc["bf16"] = list(bf16_scores.summary().values())
table.columns = ["perplexity", "KL", "same top-1"]
table["MB"] = pd.Series(sizes) / 1e6
table["bits per weight"] = table["MB"] * 8e6 / parameters
table["decode tok/s"] = pd.Series({name: rate.decode_tokens_per_s for name, rate in rates.items()})
table["prefill tok/s"] = pd.Series({name: rate.prefill_tokens_per_s for name, rate in rates.items()})

# %% jupyter={"source_hidden": true}
fastest = table["decode tok/s"].idxmax()
fig, ax = plt.subplots(figsize=(8, 2.8))
ax.barh(table.index[::-1], table["decode tok/s"][::-1], color=figures.PALETTE[0])
ax.set(xlabel="decoded tokens per second, batch 1 (higher is better)", title=f"Fastest on this CPU: {fastest}")
figures.show(
    fig,
    table=table.round(4),
    alt=f"Decode speed of all variants on this CPU. Fastest: {fastest} "
    f"with {table['decode tok/s'].max():.1f} tok/s; fp32 has {table['decode tok/s']['fp32']:.1f}.",
)


# %%
def faster(name, base="fp32"):
    return table["decode tok/s"][name] / table["decode tok/s"][base]


for name in results:
    print(f"{name:22} {faster(name):.2f} x fp32, {faster(name, 'bf16'):.2f} x bf16")
print(f"static without torchao's Python overhead (torch eager): {eager_rate:.1f} tok/s")

# %% [markdown]
# Decode is memory-bound ([00](00_start_here.ipynb)), so int8 should be up to 2.2 times as fast as fp32 by its bytes.
# The kernel decides how much of that arrives. torch's dynamic Linear is one fused C++ call: quantize, multiply,
# scale. It can be faster than its bytes say, because fp32's kernel does not reach the memory's limit either. torchao
# on a CPU without compilation does the same in a dozen small operations, and pays for each at batch 1. Fixed scales
# only save the search for the range among them.
#
# ### When to use which

# %%
best = min(results, key=lambda name: results[name].kl_divergence)
quick = max(results, key=lambda name: rates[name].decode_tokens_per_s * (results[name].kl_divergence < 0.2))
smallest = min(results, key=lambda name: sizes[name])
pd.DataFrame(
    [
        ["closest to fp32", best, f"KL {results[best].kl_divergence:.3f}, {sizes[best] / 1e6:.0f} MB"],
        ["fastest on this CPU with KL < 0.2", quick, f"{rates[quick].decode_tokens_per_s:.1f} tok/s"],
        ["smallest", smallest, f"{sizes[smallest] / 1e6:.0f} MB"],
        ["least work", "int8-dynamic-torchao", f"one call and the head put back, no calibration, KL {ao_kl:.3f}"],
        ["never on a language model", "int8-dynamic", f"KL {scores.kl_divergence:.2f}"],
    ],
    columns=["if you want", "take", "because"],
)

# %% [markdown]
# ### Bad input fails at once
# The checks ran above, right after the model was loaded. Here they meet bad input.

# %% jupyter={"source_hidden": true}
mistakes = {
    "bits=9": lambda: check_bits(9),
    "group_size=100": lambda: check_groups(net, 100),
    "no calibration text": lambda: calibration_windows(" ", calibration_tokens),
    "short calibration text": lambda: calibration_windows("Too short.", calibration_tokens),
    "half precision": lambda: check_model(torch.nn.Sequential(Linear(4, 4)).half()),
    "no Linear layers": lambda: check_model(torch.nn.Sequential(torch.nn.ReLU())),
}
for name, mistake in mistakes.items():
    try:
        mistake()
        raise AssertionError(f"{name} went through")
    except (ValueError, TypeError) as problem:
        print(f"{name:24} {problem}")

# %% [markdown]
# ## What the guides claim

# %%
from helpers.publishing import claims

raw = pd.Series(clipping)[list(clippings)]
save_error = save_errors.get("int8-dynamic")
guide_score = results["int8-dynamic"]
quality = f"with a scale per token {ao_kl:.3f}, static after SmoothQuant {static_kl:.3f}"
weight_bits = 8 * sizes["int8-dynamic"] / parameters
static_text = f"static INT8: KL {raw.min():.2f} to {raw.max():.2f} over four clipping ranges"

# %% jupyter={"source_hidden": true}
findings = [
    claims.finding(
        "ptq-minimal-loss", guide_score.kl_divergence, guide_score.kl_low, guide_score.kl_high, text=quality
    ),
    claims.finding("int8-size", weight_bits, text=f"{weight_bits:.1f} bits per weight: the embedding stays in float32"),
    claims.finding(
        "int8-faster", faster("int8-dynamic"), text=", ".join(f"{name} {faster(name):.1f} x" for name in results)
    ),
    claims.finding("ptq-save", int(save_error is None), text=save_error or "saved"),
    claims.finding("torch-quantization-tool", 0.5 if caught else 1, text="deprecated" if caught else ""),
    claims.finding("clipping-calibration", raw.min(), text=static_text),
]
claims.write(output_dir, notebook="01_ptq_dynamic_int8", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "01_ptq_dynamic_int8"))

# %% [markdown]
# Guide 000 also names [Hugging Face Optimum](https://huggingface.co/docs/optimum/en/concept_guides/quantization).
# Optimum is a set of bridges from transformers to other runtimes, such as ONNX Runtime and Intel's OpenVINO. The course
# has its base package, because transformers loads GPTQ checkpoints through it ([05](05_gptq.ipynb)). The packages for
# those runtimes are not in this environment, so the course measures none of their INT8 models. If you try one, look
# first at how it treats large activations: they are what INT8 fails on in this notebook.
#
# **On a 24 GB GPU with Mistral-7B** this notebook does not run as it is: torch's int8 modules are made for the CPU
# and need float32. LLM.int8() does: in Mistral-7B's shape it took 7.75 GB to load and 8.10 GB to answer, measured on
# an H100 with torch held to 16 GB ([figures](gpu/README.md)).
#
# ## Exercises
# **1 (easy). Predict, then measure.** How many decibels does one more bit buy? Note a number first: one more bit
# halves the scale, so it halves the error. Then write the signal-to-noise ratio in decibels, `10 log10(sum x² / sum
# (x - restored)²)` (one line); the check measures the gain.


# %%
def snr_db(x, restored):
    """Decibels."""
    ...


# %% jupyter={"source_hidden": true}
def test_snr(function):
    x = torch.linspace(-1, 1, 10001)
    per_bit = [function(x, round_trip(x[None], width, "channel", True)[3][0]) for width in (7, 8)]
    assert per_bit[0] is not None, "return a number"
    gain = float(per_bit[1]) - float(per_bit[0])
    assert 5.5 < gain < 6.5, f"one more bit should gain about 6 dB; yours gains {gain:.2f}"


exercises.check(snr_db, test_snr)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def snr_db(x, restored):
        return 10 * torch.log10(x.square().sum() / (x - restored).square().sum()).item()

    exercises.require(snr_db, test_snr)

# %% [markdown]
# **2 (medium).** Write SmoothQuant for one pair, `second(first(x))` with no function in between. Return new weights (first,
# second) such that the product is unchanged and each channel between them has the same largest value on both sides:
# `max|activation| = max|column|` (two lines).


# %%
def migrate(first, second, channel_max):
    """first [hidden, in], second [out, hidden], channel_max [hidden]: largest |activation| between them."""
    ...


# %% jupyter={"source_hidden": true}
def test_migrate(function):
    torch.manual_seed(0)
    first, second, x = torch.randn(64, 32), torch.randn(16, 64), torch.randn(200, 32)
    first[7] *= 1000
    channel_max = (x @ first.T).abs().amax(0)
    answer = function(first.clone(), second.clone(), channel_max)
    assert answer is not None and len(answer) == 2, "return two weights"
    new_first, new_second = answer
    product = x @ new_first.T @ new_second.T
    assert torch.allclose(product, x @ first.T @ second.T, rtol=1e-3, atol=1e-2), "the product has changed"
    ratio = (x @ new_first.T).abs().amax(0) / new_second.abs().amax(0)
    assert torch.allclose(ratio, torch.ones(64), rtol=1e-3), "the maxima differ: which alpha is that?"


exercises.check(migrate, test_migrate)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def migrate(first, second, channel_max):
        s = (channel_max / second.abs().amax(0)).sqrt()  # alpha = 0.5
        return first / s[:, None], second * s

    exercises.require(migrate, test_migrate)

# %% [markdown]
# **3 (hard).** Write what torch's dynamic kernel computes, with integers only inside the product (four lines): quantize `x`
# asymmetrically (one range, 8 bits), multiply codes, and correct for the zero point with the row sums of the weight
# codes.


# %%
def int8_linear(x, codes, scale):
    """x [n, in] float32, codes int8 [out, in], scale [out]: x @ (codes * scale).T, up to rounding of x."""
    ...


# %% jupyter={"source_hidden": true}
def test_linear(function):
    torch.manual_seed(0)
    x, w = torch.randn(8, 64) + 0.5, torch.randn(32, 64)
    codes, scale, zero, restored = round_trip(w, 8, "channel", True)
    answer = function(x, codes, scale[:, 0])
    assert answer is not None and answer.shape == (8, 32), "return a tensor [n, out]"
    x_scale, x_zero = choose_scale(x.min(), x.max(), 8, False)
    rounded = dequantize(quantize(x, x_scale, x_zero, 8), x_scale, x_zero)
    assert torch.allclose(answer, rounded @ restored.T, atol=1e-3), "is the zero point corrected?"


exercises.check(int8_linear, test_linear)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def int8_linear(x, codes, scale):
        x_scale, x_zero = choose_scale(x.min(), x.max(), 8, False)
        x_codes = quantize(x, x_scale, x_zero, 8)
        sums = x_codes.int() @ codes.int().T
        return (sums - x_zero * codes.int().sum(1)) * x_scale * scale

    exercises.require(int8_linear, test_linear)

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("01_ptq_dynamic_int8")

# %% [markdown]
# ## Takeaways
# 1. **A scale, a zero point and a range are all there is.** The codes from scratch are the libraries' codes;
#    granularity is a reshape, clipping a choice of limit.
# 2. **`quantize_dynamic` fails on activations, not on weights.** A few massive values set one scale for everything:
#    KL 1.8. The same weights with a scale per token give 0.04. Leaving a few layers in float and moving range into
#    the weights gives 0.09; cutting the outliers off gives 6.3.
# 3. **Dynamic per token is the safe default, LLM.int8() loses least, static needs SmoothQuant.** Speed is the
#    kernel's. Codes and scales in safetensors reload bit for bit; `save_pretrained` on a bare quantized model fails.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% jupyter={"source_hidden": true} tags=["record"]
for (name, s), cost in zip(results.items(), (guide_cost, rescue_cost, ao_cost, static_cost)):
    records.write(
        output_dir,
        method=name,
        notebook="01_ptq_dynamic_int8",
        found=found,
        windows=windows,
        bits_per_weight=8 * sizes[name] / parameters,
        weight_bytes=sizes[name],
        peak_memory_bytes=cost.peak_ram,
        scores=s,
        in_domain=(in_domain, second[name]),
        decode_tokens_per_s=rates[name].decode_tokens_per_s,
        quantize_seconds=cost.seconds,
    )
print("recorded:", ", ".join(results))
