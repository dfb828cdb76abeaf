# %% [markdown]
# # 04 NF4 with bitsandbytes
#
# Load a model in 4 bits with one config object, and know what each of its settings costs and buys.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Rebuild NF4 from normal quantiles and quantize a weight to the same codes as bitsandbytes.
# 2. Load the whole model in 4 bits, predict its size, and change one setting at a time.
# 3. Answer with numbers: how much quality does it cost, against other formats of the same size, and is it faster here?
#
# **Before you start:** [00 Start here](00_start_here.ipynb) for the memory arithmetic.

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
quant_type = "nf4"
double_quant = True
compute_dtype = "bfloat16"
max_new_tokens = 48

# %%
import inspect
import json
import logging
import pathlib
import statistics

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers
from bitsandbytes import functional
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

# %%
import helpers
from helpers import chat, evaluation, exercises, figures, memory, models, records, speed, widgets

figures.style()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its 8-bit layers report every cast

# %%
assert quant_type in ("nf4", "fp4"), f'quant_type must be "nf4" or "fp4", not {quant_type!r}'
assert compute_dtype in ("bfloat16", "float16", "float32"), f"no such compute_dtype: {compute_dtype!r}"

found = models.find(model, copies=1.5)
tokenizer = AutoTokenizer.from_pretrained(found.path)
windows = evaluation.windows(tokenizer, tokens=eval_tokens)
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
print(f"{found.name} on the {found.device.upper()}, {found.origin}")


# %% [markdown]
# ## The idea: put the levels where the weights are
#
# Four bits give 16 levels. INT4 spaces them evenly. Trained weights are close to normally distributed: most lie near
# zero, and few far out. So **NF4** puts more levels near zero ([QLoRA, section 3](https://arxiv.org/abs/2305.14314)).
# Each *block* of 64 weights is divided by its largest magnitude, `absmax`, so it fits between -1 and 1.
#
# **Four weights by hand.** This block has an `absmax` of 0.8. We divide, take the nearest of the 16 levels, and
# multiply again:

# %%
four_weights = torch.tensor([0.80, -0.68, 0.10, 0.00])
even = torch.linspace(-1, 1, 16)
library_levels = functional.get_4bit_type("nf4", device="cpu")


def nearest(values, levels):
    """The nearest level of each value."""
    return levels[(values[:, None] - levels).abs().argmin(1)]


# %%
absmax_of_four = four_weights.abs().max()
by_hand = pd.DataFrame({"weight": four_weights, "divided": four_weights / absmax_of_four})
for name, grid in {"even": even, "NF4": library_levels}.items():
    by_hand[f"{name} level"] = nearest(four_weights / absmax_of_four, grid)
    by_hand[f"{name}, restored"] = by_hand[f"{name} level"] * absmax_of_four.item()
by_hand.round(3)

# %% [markdown]
# The largest weight is exact in both. The small ones come back closer with NF4: its levels near zero are 0.08 to 0.09
# apart, the even ones 0.13, and only NF4 has a level at zero. The price is a gap: between 0.70 and 1 NF4 has no
# level, so -0.68 comes back worse. The trade pays if few weights are large. The picture shows one real weight of the
# model, block by block:


# %%
def read_weight(folder, name):
    """One tensor of a safetensors checkpoint, as float32."""
    for file in pathlib.Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():
                return tensors.get_tensor(name).float()


# %%
weight = read_weight(found.path, models.decoder.one_weight(found.path, "mlp.up_proj", layer=5))
scaled = weight.view(-1, 64) / weight.view(-1, 64).abs().amax(1, keepdim=True)

# %%
fig, axes = plt.subplots(2, 1, sharex=True, sharey=True, figsize=(7, 4), layout="constrained")
grids = {"NF4": library_levels, "INT4, even": even}
for ax, (name, grid), color in zip(axes, grids.items(), figures.PALETTE):
    ax.hist(scaled.flatten().numpy(), bins=200, density=True, color="lightgrey")
    ax.vlines(grid, 0, 0.5, color=color)
    ax.set(title=f"{name}: 16 levels", ylabel="density")
axes[1].set_xlabel("weight / absmax of its block")
middle = [int((grid.abs() < 0.3).sum()) for grid in grids.values()]
inner = (scaled.abs() < 0.3).float().mean().item()
alt = f"The weights form a bell around zero: {inner:.0%} lie between -0.3 and 0.3. "
alt += f"There NF4 has {middle[0]} of its 16 levels, the even grid {middle[1]}."
figures.show(fig, alt=alt, table=pd.DataFrame(grids).T.round(2))


# %% [markdown]
# ### Where the 16 levels come from
#
# They are **quantiles** of the normal distribution, scaled to [-1, 1]: points that cut the bell into parts of equal
# area. There are 8 above zero, 7 below, and zero itself, so that a zero weight stays zero.


# %%
def nf4_levels(tail=0.9677083):
    """The 16 levels of NF4, ascending. tail: probability of the outermost level, 1 - (1/32 + 1/30) / 2."""
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1].tolist()]
    below = [-quantile(p) for p in torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1].tolist()]
    levels = torch.tensor(sorted(below + [0.0] + above), dtype=torch.float64)
    return (levels / levels.max()).float()


# %%
levels = nf4_levels()
print("largest difference to bitsandbytes:", (levels - library_levels).abs().max().item())
assert torch.allclose(levels, library_levels, atol=1e-6)


# %% [markdown]
# Does each level get the same share of the weights, as quantiles promise?


# %%
def share(grid, sample):
    """How many % of the weights have each level of the grid as their nearest."""
    closest = (sample[:, None] - grid).abs().argmin(1)
    return 100 * closest.bincount(minlength=16) / len(sample)


# %%
sample = scaled.flatten()[:500_000]
use = pd.DataFrame({"NF4 level": levels, "NF4 use, %": share(levels, sample)})
use["even level"] = even
use["even use, %"] = share(even, sample)
use.T.round(2)

# %%
used = use[["NF4 use, %", "even use, %"]].agg(["min", "max"])
print(
    f"NF4 uses its levels for {used.iloc[0, 0]:.1f} to {used.iloc[1, 0]:.1f} % of the weights each, "
    f"the even grid for {used.iloc[0, 1]:.1f} to {used.iloc[1, 1]:.1f} %"
)

# %% [markdown]
# The shares are closer together than on the even grid, and still not equal. The reason is `absmax`: the quantiles are
# those of a normal distribution that ends at its outermost level, and here every block is stretched until its own
# largest weight is exactly 1.

# %% [markdown]
# ## From scratch: the block quantizer
#
# Each weight becomes the number of its nearest level. Two codes share a byte, and each block keeps one `absmax`. Our
# codes must equal those of bitsandbytes **to the last one**.


# %%
def quantize_nf4(weight, levels, blocksize=64):
    """weight [out, in] -> (packed uint8 [n/2], absmax float32 [n/blocksize]); n = out * in."""
    blocks = weight.float().reshape(-1, blocksize)
    absmax = blocks.abs().amax(1)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / absmax[:, None], midpoints).reshape(-1, 2).byte()
    return codes[:, 0] << 4 | codes[:, 1], absmax


# %%
packed, absmax = quantize_nf4(weight, levels)
their_packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
different = (packed != their_packed.view(-1)).sum().item()
same_absmax = torch.equal(absmax, state.absmax)
print(f"{weight.numel():,} weights, {different} bytes differ; absmax equal: {same_absmax}")
assert different == 0 and same_absmax


# %% [markdown]
# The way back looks each code up and multiplies by the block's `absmax`.


# %%
def dequantize_nf4(packed, absmax, levels, shape, blocksize=64):
    """The inverse of `quantize_nf4`, up to the rounding that quantization is."""
    codes = torch.stack([packed >> 4, packed & 15], 1).long()
    return (levels[codes].view(-1, blocksize) * absmax[:, None]).view(shape)


# %%
restored = dequantize_nf4(packed, absmax, levels, weight.shape)
assert torch.allclose(restored, functional.dequantize_4bit(their_packed, state), atol=1e-6)
print(f"relative error of the weight: {(restored - weight).norm() / weight.norm():.4f}")

# %% [markdown]
# ### Double quantization: the scales of the scales
#
# One float32 `absmax` per 64 weights costs 32/64 = 0.5 bits per weight. Double quantization subtracts the mean of all
# `absmax` and stores the rest in 8 bits, with one float32 per 256 of *them*: 8/64 + 32/(64·256) = 0.127 bits. So it
# saves **0.373 bits** per weight.

# %%
centred = absmax - absmax.mean()
scales = centred[: len(centred) // 256 * 256].view(-1, 256)  # whole groups of 256, for brevity
code8 = functional.create_dynamic_map()  # 256 levels, dense around zero
scales_max = scales.abs().amax(1, keepdim=True)
codes8 = ((scales / scales_max).reshape(-1, 1) - code8).abs().argmin(1)


# %%
nested = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
gap = (codes8 - nested.absmax[: len(codes8)].long()).abs()
print(f"8-bit scale codes: {(gap == 0).float().mean():.2%} equal, largest difference {gap.max().item()} code")
assert gap.max() <= 1  # the library rounds half-way cases by a binary search over the same map


# %% [markdown]
# ## The library on the whole model
#
# This is the guides' config, with each setting spelled out. `from_pretrained` quantizes every Linear layer while it
# loads.
#
# - `load_in_4bit`: replace Linear layers by 4-bit ones (embeddings, norms and output head stay).
# - `bnb_4bit_quant_type`: which 16 levels, `"nf4"` or `"fp4"`.
# - `bnb_4bit_use_double_quant`: the scales of the scales.
# - `bnb_4bit_compute_dtype`: the type weights are restored to for the multiplication. **The default is float32**,
#   which is slow on GPUs.


# %%
def four_bit(quant_type, double_quant, compute_dtype):
    """The model in 4 bits, loaded by transformers."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
    )
    return AutoModelForCausalLM.from_pretrained(
        found.path, quantization_config=config, dtype=torch.bfloat16, device_map={"": found.device}
    )


# %% [markdown]
# An older way stands in one of the guides: `load_in_4bit=True` without a config. It does not work with today's
# transformers:

# %%
try:
    AutoModelForCausalLM.from_pretrained(found.path, load_in_4bit=True)
except (TypeError, ValueError) as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ### Memory while loading
#
# **Predict first.** `memory.predict` needs only the config file.

# %%
config = AutoConfig.from_pretrained(found.path)
predicted = memory.predict(config, bits=4, group_size=64, scale_bits=32, double_quant=double_quant)
with memory.track() as loading:
    net = four_bit(quant_type, double_quant, compute_dtype)
weight_bytes = memory.weight_bytes(net)
error = predicted.model / weight_bytes - 1
print(f"predicted {predicted.model / 1e6:.1f} MB, measured {weight_bytes / 1e6:.1f} MB ({error:+.2%})")
assert abs(error) < 0.03

# %%
program = f"""
import bitsandbytes, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from helpers import models
found = models.find({str(found.path)!r})

{inspect.getsource(four_bit)}"""
call = f"four_bit({quant_type!r}, {double_quant!r}, {compute_dtype!r})"
loads = memory.peaks(program, call, runs=5 if found.device == "cpu" else 2)
own = [load.gained_own for load in loads]
print(
    f"{len(loads)} loads in new processes took {min(own) / 1e6:.0f} to {max(own) / 1e6:.0f} MB "
    "of RAM of their own, "
    f"and up to {max(load.gained_ram for load in loads) / 1e6:.0f} MB with mapped files"
)

# %% [markdown]
# The RAM peak is a range, and in some runs it is larger than the 16-bit model. transformers loads tensors in several
# threads, and glibc keeps part of what each thread has freed. The pages of the mapped checkpoint and of libraries
# count as resident too, but the system can take those back. VRAM has one value.

# %%
bf16 = memory.predict(config, bits=16)
sizes = pd.Series(
    {
        "bf16 model": bf16.model,
        "not quantized (embeddings, norms, head)": predicted.rest,
        "4-bit codes": predicted.weights,
        "scales": predicted.scales,
        "4-bit model, measured": weight_bytes,
        "RAM peak while loading, lowest": min(own),
        "RAM peak while loading, highest": max(own),
    }
)
if found.device == "cuda":
    sizes["VRAM peak while loading"] = loading.peak_vram
pd.DataFrame({"MB": sizes / 1e6, "share of bf16": sizes / bf16.model}).round(3)

# %% [markdown]
# "4-bit is a quarter of 16-bit" holds for the Linear layers only. The smaller the model, the larger the share of the
# embeddings.
#
# ## Change one setting at a time
#
# We score each setting against the untouched model on four genres of text. Half of the text is enough to tell the
# settings apart. The configured model then gets all of it, and Python's documentation as a second text. We take sizes
# right after loading. **Predict first:** which of the three changes costs the most quality?

# %%
reference = evaluation.reference(found, windows)
in_domain_reference = evaluation.reference(found, in_domain)
variants = {
    "as configured": (quant_type, double_quant, compute_dtype),
    "the other levels": ("fp4" if quant_type == "nf4" else "nf4", double_quant, compute_dtype),
    "double quantization switched": (quant_type, not double_quant, compute_dtype),
    "compute in float32": (quant_type, double_quant, "float32"),
}

# %%
probe = windows[:8]  # half of the text, the four genres in turn
rows, packed_bytes = {}, memory.weight_bytes(models.decoder.layers(net))
for name, settings in variants.items():
    candidate = net if name == "as configured" else four_bit(*settings)
    size = memory.weight_bytes(candidate)
    models.compute_in(candidate, found.fast)
    scores = evaluation.score(candidate, probe, reference)
    rate = speed.decode(candidate, new_tokens=12, runs=2)
    rows[name] = [*settings, size / 1e6, *scores.summary().values(), rate.decode_tokens_per_s]
del candidate
memory.release()
quality = evaluation.score(net, windows, reference, batch_size=8)  # every pass unpacks all weights
second = evaluation.score(net, in_domain, in_domain_reference, batch_size=8)
table = pd.DataFrame.from_dict(
    rows,
    orient="index",
    columns=[*"quant_type double_quant compute_dtype MB perplexity KL".split(), "same top-1", "decode tok/s"],
)
table.round(4)

# %%
linear_weights = predicted.weights * 2  # two 4-bit weights to a byte
saved = abs(table["MB"]["double quantization switched"] - table["MB"]["as configured"])
saved_bits = saved * 8e6 / linear_weights
nf4, fp4 = (table[table.quant_type == kind].iloc[0] for kind in ("nf4", "fp4"))
print(f"double quantization: {saved_bits:.3f} bits per weight (0.373 less the layers' lookup tables)")
print(f"KL on {probe.numel():,} tokens: nf4 {nf4['KL']:.3f}, fp4 {fp4['KL']:.3f}")
print(
    f"{quant_type} on all {windows.numel():,} tokens: KL {quality.kl_divergence:.3f} "
    f"({quality.kl_low:.3f} to {quality.kl_high:.3f}), "
    f"perplexity {quality.perplexity:.2f} (untouched: {reference.perplexity:.2f})"
)
print(
    "by genre: "
    + ", ".join(f"{genre} {kl:.3f}" for genre, kl in quality.by_genre().items())
    + f"; Python's documentation {second.kl_divergence:.3f}"
)
assert nf4["KL"] < fp4["KL"] or not found.trained, "NF4 should beat FP4 on normally distributed weights"
assert quality.perplexity < 2 * reference.perplexity, "loaded without an error, and garbage all the same"

# %% [markdown]
# On a CPU with AVX512-BF16, bitsandbytes repacks the weights at the first forward pass and computes in bfloat16
# whatever `compute_dtype` says; the repacked layers also hold their scales unnested. On other CPUs it computes in the
# type of its input, which is float32 here, because such a CPU emulates bfloat16 slowly. We print the size of the
# decoder layers before and after their first use:

# %%
after = memory.weight_bytes(models.decoder.layers(net))
print(f"{packed_bytes / 1e6:.1f} MB after loading, {after / 1e6:.1f} MB after the first forward pass")

# %% [markdown]
# Do not train a model object after a forward pass has repacked it. On a CPU its weights then pass no gradient on
# ([07 QLoRA](07_qlora.ipynb) shows the trap).
#
# ## Against evenly spaced levels at equal bytes
#
# A guide says that NF4 keeps more precision than INT4. We compare them at equal bytes:
#
# - INT4 rounds to evenly spaced levels. One 16-bit scale per 32 weights makes 4 + 16/32 = 4.5 bits a weight.
# - NF4 without double quantization costs the same: 4 + 32/64 = 4.5 bits.
# - INT4 with a **zero point** of 4 bits per group costs 4.625 bits. Its levels reach from the smallest to the largest
#   weight of the group, so it uses all 16 levels, not 15.
#
# **Predict first:** which one is closest to the untouched model?


# %%
@torch.no_grad()
def round_evenly(net, zero_point, group_size=32):
    """Round the Linear layers of the decoder to evenly spaced 4-bit levels, in place."""
    for module in models.decoder.layers(net).modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        groups, top = module.weight.float().view(-1, group_size), 15 if zero_point else 14
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        if not zero_point:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / top).clamp(min=1e-7).half().float()
        zero = (-low / scale).round().clamp(0, top)
        codes = ((groups / scale).round() + zero).clamp(0, top)
        module.weight.copy_(((codes - zero) * scale).view_as(module.weight))


# %%
def even_scores(zero_point):
    """`Scores` of a copy, rounded, on all windows."""
    copy = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.fast).to(found.device)
    round_evenly(copy, zero_point)
    return evaluation.score(copy, windows, reference, batch_size=8)


# %%
int4_scores = even_scores(zero_point=False)
int4_zero_scores = even_scores(zero_point=True)
memory.release()
nf4_single = models.compute_in(four_bit("nf4", False, compute_dtype), found.fast)
nf4_single_scores = evaluation.score(nf4_single, windows, reference, batch_size=8)
del nf4_single
memory.release()

# %%
formats = {
    "INT4, symmetric, groups of 32": (4 + 16 / 32, int4_scores),
    "NF4, blocks of 64": (4 + 32 / 64, nf4_single_scores),
    "INT4, zero point, groups of 32": (4 + (16 + 4) / 32, int4_zero_scores),
}
equal_bytes = pd.DataFrame(
    {
        name: {"bits a weight": bits, "KL": scores.kl_divergence, "from": scores.kl_low, "to": scores.kl_high}
        for name, (bits, scores) in formats.items()
    }
).T
equal_bytes.round(3)


# %%
def compared(name, first, second):
    """Print the paired difference of two `Scores`, in words; return it."""
    mean, low, high = evaluation.difference(first, second)
    better = "NF4" if low > 0 else name if high < 0 else "this text does not tell which"
    print(f"KL of {name} minus that of NF4: {mean:+.3f} ({low:+.3f} to {high:+.3f}); closer: {better}")
    return mean, low, high


# %%
int4_against_nf4 = compared("symmetric INT4 at equal bytes", int4_scores, nf4_single_scores)
zero_against_nf4 = compared("INT4 with a zero point", int4_zero_scores, nf4_single_scores)
moved = (int4_scores.kl_divergence - int4_zero_scores.kl_divergence) / int4_scores.kl_divergence
print(f"The zero point alone changes the KL of INT4 by {-moved:+.0%}, for 0.125 bits per weight")

# %% [markdown]
# At equal bytes NF4 is closer to the untouched model than symmetric INT4 (KL 0.340 against 0.457). With a zero point
# INT4 overtakes it (0.326), for 0.125 bits more. So the spacing of the levels is one choice, and the zero point of
# the grid is another. Ask "which INT4?" before you believe a comparison. [05 GPTQ](05_gptq.ipynb) and [06
# AWQ](06_awq.ipynb) make the same choice.
#
# ## Is it 2 to 3 times faster?
#
# We measure prefill and decode apart, at batch 1, all in this one run. The table has the median of three runs, the
# slowest and the fastest.

# %%
speeds = {}
for dtype in dict.fromkeys([found.dtype, torch.bfloat16]):
    plain = AutoModelForCausalLM.from_pretrained(found.path, dtype=dtype).to(found.device)
    speeds[str(dtype).removeprefix("torch.")] = speed.decode(plain)
    del plain
speeds[quant_type] = rate_4bit = speed.decode(net)

# %%
speed_table = pd.DataFrame({name: vars(rate) for name, rate in speeds.items()}).T
speed_table.columns = ["prefill tok/s", "decode tok/s", "slowest run", "fastest run"]
full, half = speed_table["decode tok/s"].iloc[0], speed_table["decode tok/s"]["bfloat16"]
ratio_full, ratio_half = rate_4bit.decode_tokens_per_s / full, rate_4bit.decode_tokens_per_s / half

# %%
fig, ax = plt.subplots(figsize=(7, 2.2))
ax.barh(speed_table.index, speed_table["decode tok/s"], color=figures.PALETTE[0])
ax.set(xlabel="decoded tokens per second, batch 1", title="Speed on this machine (more is better)")
figures.show(
    fig,
    alt=f"{quant_type} decodes {ratio_full:.1f} times as fast as {speed_table.index[0]} "
    f"and {ratio_half:.1f} times as fast as bfloat16 on this machine.",
    table=speed_table.round(1),
)

# %% [markdown]
# The **kernel** decides, not the number of bits. On a CPU, bitsandbytes multiplies 4-bit weights directly, and
# PyTorch's float paths for single tokens are slow. On a data-centre GPU, a token of eager `generate` starts hundreds
# of small kernels, and their launches take longer than reading the weights does. There fewer bytes cannot help until
# one captured graph replaces the launches ([11](11_compare_methods.ipynb) measures both). Measure on your own
# machine.
#
# ## LLM.int8(): eight bits where outliers stay in 16
#
# The other format of bitsandbytes rounds weights **and** inputs to 8 bits, with a scale per row. A few input channels
# are far larger than the rest and would stretch those scales. So LLM.int8() takes every channel with a value above
# `llm_int8_threshold` = 6.0 out, and multiplies it in 16 bits ([paper](https://arxiv.org/abs/2208.07339)). A lower
# threshold keeps more channels exact and is slower.


# %%
def eight_bit():
    """The model in LLM.int8(), loaded by transformers."""
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    return AutoModelForCausalLM.from_pretrained(
        found.path, quantization_config=config, dtype=torch.bfloat16, device_map={"": found.device}
    )


# %%
try:
    with memory.track() as loading8:
        net8 = eight_bit()
    with torch.inference_mode():
        net8(input_ids=windows[:1, :8].to(found.device))
except (NotImplementedError, RuntimeError, ValueError) as error:
    net8 = None
    print(f"LLM.int8() does not run on this {found.device.upper()}: {str(error).splitlines()[0][:100]}")

# %% [markdown]
# The library has no CPU kernel of its own for this format. Where the CPU also emulates bfloat16, we score one window
# of each genre and decode few tokens.

# %%
text8, quick = windows, {}
if found.fast == torch.float32:
    text8, quick = windows[:4], {"prompt_tokens": 16, "new_tokens": 4, "runs": 1}
if net8 is not None:
    bytes8 = memory.weight_bytes(net8)
    predicted8 = memory.predict(config, bits=8, scale_bits=32)
    scores8 = evaluation.score(net8, text8, reference, batch_size=8)
    rate8 = speed.decode(net8, **quick)

# %%
if net8 is not None:
    print(f"{bytes8 / 1e6:.1f} MB (predicted {predicted8.model / 1e6:.1f}, bf16 {bf16.model / 1e6:.1f})")
    print(
        f"KL on {text8.numel():,} tokens: {scores8.kl_divergence:.3f} "
        f"({scores8.kl_low:.3f} to {scores8.kl_high:.3f}); decodes {rate8}, "
        f"{rate8.decode_tokens_per_s / rate_4bit.decode_tokens_per_s:.2f} times as fast as {quant_type}"
    )

# %%
second8, whole8 = None, net8 is not None and len(text8) == len(windows)
if whole8:
    second8 = evaluation.score(net8, in_domain, in_domain_reference, batch_size=8)
    program8 = program.replace(inspect.getsource(four_bit), inspect.getsource(eight_bit))
    load8 = memory.peaks(program8, "eight_bit()", runs=1)[0]
    print(f"KL on Python's documentation: {second8.kl_divergence:.3f}")
elif net8 is not None:
    print("no record of LLM.int8(): it was not scored on the whole text")
net8 = None
memory.release()


# %%
def peak_bytes(loads):
    """The largest peak of a model's loads in new processes."""
    return max(load.peak_vram if found.device == "cuda" else load.peak_ram for load in loads)


# What the last cell writes as records: scores on both texts, bytes, loads, speed, the load that was timed.
name = quant_type if double_quant else f"{quant_type}-single"
recorded = {name: (quality, second, weight_bytes, loads, rate_4bit, loading)}
if whole8:
    recorded["llm-int8"] = (scores8, second8, bytes8, [load8], rate8, loading8)

# %% [markdown]
# ## Chat with it
#
# The tokenizer renders the chat template to token ids at once. Rendering to text and tokenizing the text would add a
# second BOS token with some tokenizers.

# %%
session = chat.ChatSession(net, tokenizer, max_new_tokens=max_new_tokens, enable_thinking=False)
for question in ("What is the capital of France?", "And what is it famous for?"):
    print("user:", question)
    print("assistant: ", end="")
    for piece in session.stream(question):
        print(piece, end="", flush=True)
    print("\n")

# %% [markdown]
# This is the same session as a chat box (live in Jupyter; a transcript elsewhere):

# %%
widgets.ChatBox(session)

# %% [markdown]
# ### The guide's `pipeline` chat, as it stands
#
# One of the guides builds its chat with `pipeline`. We changed only `max_new_tokens`, from 256 to this notebook's
# parameter, and put the lines into a function, so that the guide's names stay apart from ours.


# %%
def guide_chat(model, tokenizer, message):
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device_map="auto")

    def chat(message):
        formatted = f"[INST] {message} [/INST]"
        response = pipe(formatted, max_new_tokens=max_new_tokens, return_full_text=False)
        return response[0]["generated_text"]

    return chat(message)


# %%
torch.manual_seed(0)  # the guide sets none: the model's generation settings sample
print(guide_chat(net, tokenizer, "What is machine learning?"))

# %%
ids = tokenizer("[INST] What is machine learning? [/INST]").input_ids
own_ids = chat.render(tokenizer, [{"role": "user", "content": "What is machine learning?"}])
print(f"the guide's prompt: {len(ids)} tokens, {tokenizer.decode(ids)!r}")
print(f"the model's own template: {len(own_ids)} tokens, {tokenizer.decode(own_ids[-12:])!r} at its end")

# %% [markdown]
# `[INST]` is Mistral's format. This model was trained on another one and reads it as plain text. With
# `apply_chat_template` the same lines are right for every model. `chat` also forgets: it sends no earlier turn. And
# each call samples, so the answers differ from run to run.
#
# ## Batches
#
# This is the guide's batch snippet, as it stands except for `max_new_tokens`:


# %%
def guide_batch(model, tokenizer, prompts):
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model.generate(**inputs.to(model.device), max_new_tokens=24)
    for output in outputs:
        print(tokenizer.decode(output, skip_special_tokens=True))
        print("-" * 50)


# %%
guide_prompts = ["Explain quantum computing", "What is artificial intelligence?", "Describe neural networks"]
torch.manual_seed(0)
print(f"the tokenizer pads on the {tokenizer.padding_side}")
guide_batch(net, tokenizer, guide_prompts)

# %% [markdown]
# Three things are wrong. The prompts have no chat template, so the model continues the text instead of answering. The
# printed text repeats the prompt. And the tokenizer pads on its default side. Generation goes on at the **end** of
# each row, so padding belongs on the left; on the right, the model continues after padding. (A tokenizer without a
# padding token, such as Mistral's, stops here with an error.) With the template and left padding, is each answer the
# one that its prompt gets alone?

# %%
prompts = ["Explain quantum computing.", "What is artificial intelligence?", "Describe neural networks."]
together = chat.batch(net, tokenizer, prompts, max_new_tokens=24)
alone = [chat.batch(net, tokenizer, [prompt], max_new_tokens=24)[0] for prompt in prompts]
for prompt, answer in zip(prompts, together):
    print(f"{prompt}\n  {answer!r}\n")
same = sum(a == b for a, b in zip(together, alone))
print(f"{same} of {len(prompts)} answers are identical to the ones alone")

# %% [markdown]
# In full precision all of them are identical (a test holds that). In bfloat16, a batch adds numbers in another order,
# and a near tie between two tokens can fall the other way.
#
# ## On a 24 GB GPU with Mistral-7B
#
# Change one parameter: `model = "mistralai/Mistral-7B-Instruct-v0.3"`. The course's GPU measurements have these
# figures for Mistral-7B's shape. A guide says 3.5 to 4 GB for the model and a peak of 8 to 10 GB while loading:

# %%
course = pathlib.Path(helpers.__file__).parents[1]
memory_7b = json.loads((course / "notebooks" / "gpu" / "reference.json").read_text())["memory"]
names = ["nf4", "nf4, double quantization"]
columns = ["weight_bytes", "loading_peak_bytes", "answering_peak_bytes"]
(pd.DataFrame(memory_7b).T.loc[names, columns].astype(float) / 1e9).round(2)  # GB of GPU memory

# %% [markdown]
# ## What the guides claim

# %%
from helpers.publishing import claims

smaller = 1 - weight_bytes / bf16.model
parameters = net.num_parameters() / predicted.parameters
lost = f"{1 - quality.top1_agreement:.0%} of the top tokens change"
speed_up = f"{ratio_half:.2f} times as fast as bfloat16, {ratio_full:.2f} times {speed_table.index[0]}"

# %%
findings = [
    claims.finding("nf4-75", smaller, text=f"{smaller:.0%}; in the Linear layers alone {1 - 4.127 / 16:.0%}"),
    claims.finding("nf4-double-quant", saved_bits),
    claims.finding("nf4-better-levels", *int4_against_nf4),
    claims.finding("nf4-quality", quality.kl_divergence, quality.kl_low, quality.kl_high, text=lost),
    claims.finding("nf4-fewer-parameters", parameters),
    claims.finding("nf4-2-3x", ratio_half, text=speed_up),
]
if found.device == "cpu":
    findings.append(claims.finding("nf4-gpu-only", 1))
claims.write(output_dir, notebook="04_nf4_bitsandbytes", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "04_nf4_bitsandbytes"))


# %% [markdown]
# ## Exercises
#
# **1 (easy).** Return the bits per weight of a 4-bit format, scales included. `scale_bits` is 32 in bitsandbytes.
# (Two lines.)


# %%
def bits_per_weight(blocksize, scale_bits=32, double_quant=False):
    # Replace the dots.
    ...


# %%
def test_bits(function):
    assert function(64) is not None, "return a number"
    assert abs(function(64) - 4) > 1e-9, "the scales are missing: each block carries one"
    assert abs(function(64) - 4.5) < 1e-9, f"block 64 with 32-bit scales gives 4.5, you have {function(64)}"
    assert abs(function(128, 16) - 4.125) < 1e-9, "blocksize or scale_bits is not used"
    nested = 4 + 8 / 64 + 32 / (64 * 256)
    answer = function(64, double_quant=True)
    assert abs(answer - nested) < 1e-9, "double quantization: 8 bits a scale, and 32 per 256 scales"


exercises.check(bits_per_weight, test_bits)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def bits_per_weight(blocksize, scale_bits=32, double_quant=False):
        per_scale = 8 + 32 / 256 if double_quant else scale_bits
        return 4 + per_scale / blocksize

    exercises.require(bits_per_weight, test_bits)


# %% [markdown]
# **2 (medium).** Predict, then measure: with blocks of 256 instead of 64, how many times as large is NF4's error of
# the weight? Think of what happens to `absmax`. Return your guess, one number.


# %%
def error_with_large_blocks():
    # Replace the dots.
    ...


# %%
def test_large_blocks(function):
    answer = function()
    assert answer is not None, "return a number"
    assert answer > 1, "a larger block has a larger absmax, so its steps are wider"

    def error(blocksize):
        codes = quantize_nf4(weight, levels, blocksize)
        return (dequantize_nf4(*codes, levels, weight.shape, blocksize) - weight).norm()

    measured = (error(256) / error(64)).item()
    hint = "The largest of 256 normal numbers is only a little larger than the largest of 64."
    assert abs(answer - measured) < 0.15, f"measured: {measured:.2f} times, you said {answer}. {hint}"


exercises.check(error_with_large_blocks, test_large_blocks)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def error_with_large_blocks():
        return 1.2  # largest of 256 normal numbers: about 2.9; of 64: about 2.5

    exercises.require(error_with_large_blocks, test_large_blocks)


# %% [markdown]
# **3 (hard).** Round to nearest with 15 evenly spaced integer levels -7 … 7 per block, for comparison. Return the
# restored weight. (Three lines.)


# %%
def int4_round_trip(weight, blocksize=64):
    # Replace the dots.
    ...


# %%
def test_int4(function):
    answer = function(weight)
    assert answer is not None and answer.shape == weight.shape, "return a tensor of the weight's shape"
    blocks = answer.view(-1, 64)
    most = max(len(block.unique()) for block in blocks[:200])
    assert most <= 15, f"{most} different values in a block, 15 are possible"
    error, nf4_error = ((x - weight).norm() / weight.norm() for x in (answer, restored))
    assert error < 0.2, f"relative error {error:.2f}: divide by the block's largest magnitude / 7 first"
    assert error > nf4_error, "better than NF4 on a normal weight? Check that you really round"


exercises.check(int4_round_trip, test_int4)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def int4_round_trip(weight, blocksize=64):
        blocks = weight.view(-1, blocksize)
        scale = blocks.abs().amax(1, keepdim=True) / 7
        return ((blocks / scale).round().clamp(-7, 7) * scale).view(weight.shape)

    exercises.require(int4_round_trip, test_int4)

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("04_nf4_bitsandbytes")

# %% [markdown]
# ## Takeaways
#
# 1. **NF4 is 16 normal quantiles and one scale per block.** A dozen lines give the same codes as the library.
# 2. **The size follows from the config**, within 3 %. Double quantization saves 0.37 bits per weight in theory, 0.36
#    measured. Embeddings stay in 16 bits, so this small model shrinks by 58 %, not by 75 %.
# 3. **Name the grid, the model and the machine.** NF4 has KL 0.34 on this 135M model: better than symmetric INT4 of
#    the same size, not better than INT4 with a zero point. LLM.int8() has 0.025. The speed depends on the kernel.
#
# <!-- navigation -->
# <!-- /navigation -->


# %% tags=["record"]
for method, (scores, other_text, size, peaks, rate, load) in recorded.items():
    records.write(
        output_dir,
        method=method,
        notebook="04_nf4_bitsandbytes",
        found=found,
        windows=windows,
        scores=scores,
        in_domain=(in_domain, other_text),
        bits_per_weight=8 * size / predicted.parameters,
        weight_bytes=size,
        peak_memory_bytes=peak_bytes(peaks),
        decode_tokens_per_s=rate.decode_tokens_per_s,
        quantize_seconds=load.seconds,
    )
