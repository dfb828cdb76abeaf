# %% [markdown]
# # 06 AWQ
#
# Find the weights that matter by looking at what flows into them, make them safe from rounding, and load the result
# anywhere.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Find the input channels that matter, and test the "1 %" of the guides on the whole model.
# 2. Write AWQ's scale search, the folding and the clip search by hand, and get autoawq's own numbers on the same
#    layer.
# 3. Quantize the whole model with autoawq and with gptqmodel, and know which loader takes which checkpoint, how good
#    it is and how fast.
#
# **Before you start:** [00 Start here](00_start_here.ipynb) for the memory arithmetic, [05 GPTQ](05_gptq.ipynb) for
# groups and calibration. Folded cells are plumbing and checks; skip them on a first reading.

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
bits = 4
group_size = 64
calibration_samples = 4
calibration_length = 256
layer = -1
max_new_tokens = 32

# %% jupyter={"source_hidden": true}
import contextlib
import copy
import io
import json
import logging
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings
from unittest import mock

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, AwqConfig

# %%
import helpers
from helpers import archived, checkpoints, evaluation, exercises, figures, files, memory, models, records
from helpers.process import child_environment, headless

figures.style()
transformers.logging.set_verbosity_error()  # autoawq uses arguments that transformers has renamed since
for name in ("auto_gptq", "auto_gptq.modeling._base", "accelerate", "bitsandbytes", "tokenicer"):
    logging.getLogger(name).setLevel(logging.ERROR)  # they explain themselves at length


# %% jupyter={"source_hidden": true}
def quietly():
    """Progress bars and pages of text: shown in Jupyter, left out of a batch run."""
    stack = contextlib.ExitStack()
    if headless():
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


# %%
found = models.find(model, copies=2.5, on_gpu=1.5)
models.decoder.require(found, ["self_attn.q_proj", "mlp.gate_proj"], without=["pre_feedforward_layernorm"])
tokenizer = AutoTokenizer.from_pretrained(found.path)
windows = evaluation.windows(tokenizer, tokens=eval_tokens)
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
letter = evaluation.windows(tokenizer, source="letter", tokens=1536)
reference, in_domain_reference, letter_reference = (
    evaluation.reference(found, text) for text in (windows, in_domain, letter)
)

# %% [markdown]
# We score on three texts. The four genres count most, because no method here was calibrated on them. AWQ is
# calibrated on other pages of the second text, Python's documentation. We keep the third, a letter, for the end.

# %%
calibration = evaluation.windows(
    tokenizer,
    "calibration",
    source="pydoc",
    tokens=calibration_samples * calibration_length,
    context=calibration_length,
)
samples = calibration.tolist()
print(f"{found.name} on the {found.device.upper()}")
print(f"calibration: {len(samples)} samples of {calibration_length} tokens")

# %% [markdown]
# ## The idea: look at the inputs, not at the weights
#
# **The grid.** AWQ's grid has a zero point. It consists of 2^bits levels, evenly spaced between the smallest
# and the largest weight of a group.


# %%
def rtn(weight, group_size, bits=4):
    """Round to the nearest of 2^bits levels, group by group along the inputs; the restored weight."""
    groups, top = weight.float().reshape(-1, group_size), 2**bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / top
    zero = (-low / scale).round().clamp(0, top)
    codes = ((groups / scale).round() + zero).clamp(0, top)
    return ((codes - zero) * scale).view_as(weight)


# %% [markdown]
# **Four weights by hand.** The layer adds up input x weight. The first input is 8, the others are 1. We round the
# weights to 3 bits. The rounding error of the first weight is multiplied by 8:

# %%
four_weights = torch.tensor([0.31, -0.52, 1.00, 0.24])
four_inputs = torch.tensor([8.0, 1.0, 1.0, 1.0])


def by_hand(scale):
    """Weights times scale, rounded, divided by scale; their errors; the errors times the inputs."""
    values = rtn(four_weights * scale, group_size=4, bits=3) / scale
    error = values - four_weights
    return pd.DataFrame(
        {"weight": four_weights, "rounded": values, "error": error, "error x input": error * four_inputs}
    ).round(3)


by_hand(torch.ones(4))

# %% [markdown]
# Now multiply the first weight by 2 before rounding, and divide its input by 2. The product stays the same. The
# group's largest and smallest weight stay the same too, so the step between two levels stays. The error of the first
# weight, divided by 2 again, becomes smaller:

# %%
by_hand(torch.tensor([2.0, 1.0, 1.0, 1.0]))

# %% [markdown]
# This is AWQ: scale up the weights whose inputs are large, and divide the inputs. How large must the factor be? Too
# small does not help, and too large stretches the step for the neighbours. So AWQ searches for it, further below.
#
# ### Which inputs are large in a real model?
#
# One pass over the calibration text gives each input channel's mean magnitude. We look at the last layer. (`layer`
# sets another one. Try `layer = 5` later: its inputs are more alike, and AWQ gains less there.)

# %%
net = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.fast).to(found.device)
net.eval().requires_grad_(False)
linears = {name: module for name, module in net.model.named_modules() if isinstance(module, nn.Linear)}
layer = layer % len(net.model.layers)  # -1 is the last one


# %%
def watch(net, linears, batch):
    """Mean |x| per input channel of every Linear layer, {name: [in_features]}."""

    def hook(name):
        return lambda _, args: magnitudes.update({name: args[0].float().abs().flatten(0, -2).mean(0)})

    magnitudes = {}
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    with torch.inference_mode():
        net.model(batch.to(net.device))
    for handle in hooks:
        handle.remove()
    return magnitudes


magnitudes = watch(net, linears, calibration)

# %%
gate = f"layers.{layer}.mlp.gate_proj"
curves = {"inputs": magnitudes[gate], "weights": linears[gate].weight.float().abs().mean(0)}
for name, values in curves.items():
    curves[name] = (values / values.median()).sort(descending=True).values.cpu()
spread = (
    pd.DataFrame(
        {
            name: {
                "largest": values[0],
                "1 % from the top": values[len(values) // 100],
                "10 % from the top": values[len(values) // 10],
                "smallest": values[-1],
            }
            for name, values in curves.items()
        }
    )
    .astype(float)
    .round(2)
)

# %% jupyter={"source_hidden": true}
fig, ax = plt.subplots()
for name, values in curves.items():
    ax.plot(range(1, len(values) + 1), values)
    ax.annotate(f"mean |{name[:-1]}|", (1, values[0]), xytext=(4, 4), textcoords="offset points")
ax.set(
    xscale="log",
    yscale="log",
    xlabel="input channel, from the largest",
    ylabel="times the median",
    title="A few inputs are far larger than the others; no weights are",
)
figures.show(
    fig,
    alt=f"Channels of layer {layer}'s gate_proj: the largest mean input is "
    f"{spread['inputs']['largest']:.0f} times the median, the largest mean weight only "
    f"{spread['weights']['largest']:.1f} times.",
    table=spread,
)


# %% [markdown]
# ## The 1 %: keep some channels in float
#
# The guides say that about 1 % of the weights matter most. We test it on the whole model: round every Linear layer
# except its most important input channels, and measure. We compare three measures of "important": the inputs, the
# weights, and chance. **Predict first:** how much of the rounding loss does 1 % of the channels take away, chosen by
# inputs and chosen by weights?

# %%
probe = windows[:4]  # a quarter of the text, one window a genre, for the steps in between
originals = {name: module.weight.data.cpu().clone() for name, module in linears.items()}
generator = torch.Generator().manual_seed(0)


def importance(module, magnitude, chosen_by):
    """A number per input channel of a layer; the largest are kept."""
    if chosen_by == "inputs":
        return magnitude
    if chosen_by == "weights":
        return module.weight.float().abs().mean(0)
    return torch.rand(module.in_features, generator=generator)


def restore(linears, originals):
    """Put the original weights back."""
    for name, module in linears.items():
        module.weight.data.copy_(originals[name])


# %%
@torch.inference_mode()
def round_all_but(share, chosen_by):
    """Quantize the model in place, `share` of each layer's input channels excepted."""
    restore(linears, originals)
    for name, module in linears.items():
        weight, rounded = module.weight, rtn(module.weight, group_size)
        if share:
            count = max(1, round(share * module.in_features))
            keep = importance(module, magnitudes[name], chosen_by).argsort(descending=True)[:count]
            rounded[:, keep] = weight[:, keep].float()
        module.weight.data.copy_(rounded)


# %%
rows = []
by_inputs = [(share, "inputs") for share in (0.001, 0.01, 0.05)]
for share, chosen_by in [(0, "-"), *by_inputs, (0.01, "weights"), (0.01, "chance")]:
    round_all_but(share, chosen_by)
    rows.append([f"{share:.1%}", chosen_by, evaluation.score(net, probe, reference).kl_divergence])

# %%
kept = pd.DataFrame(rows, columns=["kept in float", "chosen by", "KL"])
kept["error removed"] = (1 - kept.KL / kept.KL[0]).map("{:.0%}".format)
one_percent = 1 - kept.KL[2] / kept.KL[0]
kept.round(4)

# %% [markdown]
# Chosen by inputs, 1 % of the channels takes 56 % of the loss away. If we choose as many channels by weights, they
# take 1 % away, and by chance 2 %. And 1 % is no threshold: 0.1 % of the channels already takes 36 % away, and 5 %
# take 66 %.
#
# But a matrix that is part integer and part float needs two kernels. So AWQ keeps everything in 4 bits and scales
# those channels up.
#
# Every method below must beat the first row, rounding to nearest. The next cell measures it on the whole evaluation
# text:

# %%
round_all_but(0, "-")
floor = evaluation.score(net, windows, reference)
in_domain_floor = evaluation.score(net, in_domain, in_domain_reference)
letter_floor = evaluation.score(net, letter, letter_reference)
restore(linears, originals)
print(
    f"round to nearest, {bits} bits, groups of {group_size}: KL {floor.kl_divergence:.4f} "
    f"({floor.kl_low:.4f} to {floor.kl_high:.4f}), "
    f"perplexity {floor.perplexity:.2f} (untouched: {reference.perplexity:.2f})"
)

# %% [markdown]
# ## The search for the scales
#
# AWQ reduces the search to one number ([AWQ, section 3.2](https://arxiv.org/abs/2306.00978)): an exponent alpha with
# `s = mean|x|^alpha`.
#
# - alpha = 0 makes all scales 1: plain rounding. alpha = 1 makes all inputs equally large.
# - 20 values of alpha are tried. The best one has the smallest error of the output of the whole block (here the MLP)
#   on calibration inputs.
# - autoawq also divides by the mean weight to the power 1 - alpha. It calls this `duo_scaling`.
#
# First we collect the inputs of one MLP:

# %%
block = copy.deepcopy(net.model.layers[layer]).float()
states = []
handle = net.model.layers[layer].post_attention_layernorm.register_forward_pre_hook(
    lambda _, args: states.append(args[0].float())
)
with torch.inference_mode():
    net.model(calibration[:2].to(found.device))
handle.remove()
hidden = states[0].clone()  # what goes into the RMSNorm before the MLP, [samples, tokens, hidden]
x = block.post_attention_layernorm(hidden).detach()


# %% [markdown]
# The search has two parts: the scales of one alpha, and the error of the block when its Linear layers are scaled,
# rounded and divided.


# %%
def scales_for(alpha, x_mean, w_mean=None):
    """Scales per input channel, their largest and smallest balanced around 1. w_mean: for duo scaling."""
    scales = x_mean**alpha
    if w_mean is not None:
        scales = scales / (w_mean ** (1 - alpha) + 1e-4)
    scales = scales.clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


@torch.no_grad()
def scaled_error(inspect, linears, scales, x, target):
    """Mean squared error of `inspect(x)` with the weights of `linears` scaled, rounded and divided again."""
    before = [linear.weight.data for linear in linears]
    for linear in linears:
        linear.weight.data = rtn(linear.weight * scales, group_size) / scales
    error = (inspect(x) - target).pow(2).mean().item()
    for linear, weight in zip(linears, before):
        linear.weight.data = weight
    return error


# %%
@torch.no_grad()
def search_scales(inspect, linears, x, duo_scaling=True, grid=20):
    """Scales for the inputs of `linears` with the least squared error of `inspect(x)`; {alpha: error}."""
    groups = torch.cat([linear.weight.data for linear in linears]).abs().view(-1, group_size)
    w_mean = (groups / (groups.amax(1, keepdim=True) + 1e-6)).view(-1, x.shape[-1]).mean(0)
    x_mean = x.abs().flatten(0, -2).mean(0)
    target = inspect(x)
    alphas = [step / grid for step in range(grid)]
    tried = {alpha: scales_for(alpha, x_mean, w_mean if duo_scaling else None) for alpha in alphas}
    losses = {alpha: scaled_error(inspect, linears, scales, x, target) for alpha, scales in tried.items()}
    return tried[min(losses, key=losses.get)], losses


# %%
mlp = block.mlp
pair = [mlp.gate_proj, mlp.up_proj]
_, plain = search_scales(mlp, pair, x, duo_scaling=False)
scales, duo = search_scales(mlp, pair, x)
target = mlp(x).detach()
search = pd.DataFrame({"mean|x|^alpha": plain, "duo scaling": duo})
search = search / plain[0.0]  # alpha 0 without duo scaling: all scales are 1
best_alpha = search["duo scaling"].idxmin()

# %% jupyter={"source_hidden": true}
fig, ax = plt.subplots()
for column in search:
    ax.plot(search.index, search[column], marker=".", label=column)
ax.axhline(1, color=figures.PALETTE[4], linestyle="--", label="round to nearest")
ax.set(
    xlabel="alpha",
    ylabel="squared error of the MLP\nrelative to round to nearest",
    yscale="log",
    title="Between no scaling and full scaling lies the best alpha",
)
ax.legend()
low = search.min()
figures.show(
    fig,
    alt=f"Error over alpha in layer {layer}, against rounding to nearest: {low.iloc[1]:.2f} at "
    f"best with duo scaling, at alpha {best_alpha:.2f}; {low.iloc[0]:.2f} without.",
    table=search.T.round(2),
)


# %% [markdown]
# ### Folding: nothing is left to compute at run time
#
# The inputs must be divided by s. This needs no extra operation, because the module before has a weight per channel.
# For gate and up this is the weight of the RMSNorm. For `down_proj` these are the rows of `up_proj`.


# %%
@torch.no_grad()
def fold(previous, linears, scales):
    """Divide what `previous` (norm or Linear) puts out by the scales, multiply the columns that read it."""
    rows = (slice(None), None) if isinstance(previous, nn.Linear) else slice(None)
    previous.weight.data /= scales[rows]
    if getattr(previous, "bias", None) is not None:
        previous.bias.data /= scales
    for linear in linears:
        linear.weight.data *= scales


# %%
folded = copy.deepcopy(block)
norm, mlp = folded.post_attention_layernorm, folded.mlp
fold(norm, [mlp.gate_proj, mlp.up_proj], scales)
inner = (mlp.act_fn(mlp.gate_proj(norm(hidden))) * mlp.up_proj(norm(hidden))).detach()  # what down_proj reads
scales_down, _ = search_scales(mlp.down_proj, [mlp.down_proj], inner)
fold(mlp.up_proj, [mlp.down_proj], scales_down)

# %%
change = ((mlp(norm(hidden)) - target).norm() / target.norm()).item()
print(f"scales from {scales.min():.2f} to {scales.max():.2f}; the float output changed by {change:.1e}")
assert change < 1e-5, "folding must not change the float function"


# %% [markdown]
# Now we round the folded block, and compare it with the alternatives on the same block. **Predict first:** does
# scaling get closer to the float output than 5 % of the channels in float?


# %%
@torch.no_grad()
def block_error(norm, mlp, keep=()):
    """Relative output error of the MLP with rounded Linear layers, some inputs of gate and up excepted."""
    rounded = copy.deepcopy(mlp)
    for name, linear in rounded.named_children():
        if isinstance(linear, nn.Linear):
            weight = rtn(linear.weight.data, group_size)
            if name != "down_proj":
                weight[:, keep] = linear.weight.data[:, keep]
            linear.weight.data = weight
    return ((rounded(norm(hidden)) - target).norm() / target.norm()).item()


# %%
top = magnitudes[gate].argsort(descending=True)
errors = {"round to nearest": block_error(block.post_attention_layernorm, block.mlp)}
for share in (0.001, 0.01, 0.05):
    keep = top[: max(1, round(share * len(top)))]
    error = block_error(block.post_attention_layernorm, block.mlp, keep)
    errors[f"{share:.1%} of gate's and up's inputs in float"] = error
errors["scaled (AWQ), all in 4 bits"] = block_error(norm, mlp)
assert errors["scaled (AWQ), all in 4 bits"] < errors["round to nearest"]
pd.DataFrame({"relative error of the MLP": errors}).round(4)

# %% [markdown]
# In this block scaling takes 61 % of the error away and keeps every weight in 4 bits. 5 % of the channels in float take
# 44 % away.
#
# ## autoawq on the same layer, and its repair
#
# autoawq is archived, and its last release is older than the libraries it runs on here. On a CPU it raises no error
# and **ruins the model**. It saves the weights with `v.cpu()` before a trial and puts them back after it. On a CPU
# `v.cpu()` is no copy, so the change of every trial stays in the weights.

# %%
repair = archived.enable("autoawq")  # imports it, repaired
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer

for name, assumed, now in repair.applied:
    print(f"{name}\n  assumed: {assumed}\n  now:     {now}")


# %% [markdown]
# We run autoawq's search alone, on our block and inputs, without and with the repair. `quantize` calls
# `_search_best_scale` for each layer, and `_compute_best_clip` (below) for each weight. The underscore marks private
# names. autoawq has no public call for a single layer, so we use them to compare. Nothing that we save depends on
# them. They could change with the version, but 0.2.9 is autoawq's last one.


# %%
class Bare(AwqQuantizer):
    """autoawq's searches without a model and its calibration around them."""

    def init_quant(self, **_):
        return None, {}, None


bare = Bare(None, None, tokenizer, bits, group_size, True, "gemm", None, None, None, True)


# %%
def their_search(block, previous, linears, x, inspect):
    """autoawq's scales, and by how much the weights differ after the search from before."""
    before = linears[0].weight.data.clone()
    _, _, scales = bare._search_best_scale(block, previous, linears, x.clone(), inspect)
    return scales.to(x.device), ((linears[0].weight.data - before).norm() / before.norm()).item()


# %%
repair.undo()
victim = copy.deepcopy(block)
victims = [victim.mlp.gate_proj, victim.mlp.up_proj]
_, left_behind = their_search(victim, victim.post_attention_layernorm, victims, x, victim.mlp)
repair = archived.enable("autoawq")
theirs, repaired = their_search(block, block.post_attention_layernorm, pair, x, block.mlp)
print(f"weights after the search against before: {left_behind:.1%} off as released, {repaired:.1%} repaired")
assert repaired == 0 and (left_behind > 0.01 or found.device == "cuda")

# %% [markdown]
# The repaired search finds the same scales as ours, behind a norm and behind a Linear layer:

# %%
half = copy.deepcopy(block)
fold(half.post_attention_layernorm, [half.mlp.gate_proj, half.mlp.up_proj], scales)
theirs_down, _ = their_search(half, half.mlp.up_proj, [half.mlp.down_proj], inner, half.mlp.down_proj)
for name, ours, library in [("gate and up", scales, theirs), ("down", scales_down, theirs_down)]:
    gap = ((ours - library).abs() / library).max().item()
    print(f"{name}: largest relative difference to autoawq's scales {gap:.1e}")
    assert gap < 1e-3, "the search must find autoawq's scales"


# %% [markdown]
# ### Clipping, and why it is slow
#
# After scaling, autoawq may shrink the range of each group. A few weights are clipped, and all others get finer
# steps. autoawq tries ten limits a group and multiplies every weight with every token for each. There is a faster
# way: the error of a group is `d·G·d`, with the change d of its weights and one small matrix G, the products of its
# inputs summed over all tokens.


# %%
@torch.no_grad()
def best_clip(weight, x, group_size, grid=20, max_shrink=0.5):
    """Largest magnitude that each group keeps, [out, groups, 1], out of autoawq's ten candidates."""
    x = x.flatten(0, -2).float()
    x = x.view(len(x), -1, group_size).transpose(0, 1)  # [groups, tokens, group_size]
    gram = x.transpose(1, 2) @ x / x.shape[1]
    groups = weight.float().view(len(weight), -1, group_size)
    top = groups.abs().amax(-1, keepdim=True)
    best, least = top, torch.full_like(top, torch.inf)
    for step in range(int(max_shrink * grid)):
        limit = top * (1 - step / grid)
        change = rtn(groups.clamp(-limit, limit), group_size) - groups
        change = change.transpose(0, 1)  # [groups, out, group_size]
        error = ((change @ gram) * change).sum(-1).T[..., None]
        least, best = torch.minimum(error, least), torch.where(error < least, limit, best)
    return best.to(weight.dtype)


# %%
weight, few_tokens = half.mlp.down_proj.weight.data, inner[:1, :32]
started = time.perf_counter()
library = bare._compute_best_clip(weight, few_tokens)
library_seconds = time.perf_counter() - started
started = time.perf_counter()
ours = best_clip(weight, few_tokens, group_size)
our_seconds = time.perf_counter() - started
same = (ours - library).abs().le(1e-4 * library).float().mean().item()
print(f"{same:.2%} of {library.numel():,} groups get the same limit")
assert same > 0.99, "the clip search must choose autoawq's limits, ties apart"

# %%
print(f"one layer, {few_tokens.shape[1]} tokens: autoawq {library_seconds:.2f} s, ours {our_seconds:.2f} s")
clipped_weights = sum(
    module.weight.numel() for name, module in linears.items() if not name.endswith(("q_proj", "k_proj"))
)
whole = library_seconds * 512 / few_tokens.shape[1] * clipped_weights / weight.numel()
print(f"at this rate autoawq takes {whole:.0f} s for the model, with the 512 tokens that it uses")


# %% [markdown]
# Ours is cheap enough for the whole model. We compare rounding with and without clipping here, and after scaling
# further below.


# %%
@torch.no_grad()
def clip_all(net):
    """Clip every Linear layer but those of queries and keys, in place, as autoawq does."""

    def hook(module, args):
        limits[module] = best_clip(module.weight, args[0], group_size)

    limits, hooks = {}, []
    for name, module in net.model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("q_proj", "k_proj")):
            hooks.append(module.register_forward_pre_hook(hook))
    net.model(calibration.to(found.device))
    for handle in hooks:
        handle.remove()
    for module, limit in limits.items():
        groups = module.weight.data.view(*limit.shape[:2], -1)
        module.weight.data = groups.clamp(-limit, limit).view_as(module.weight)


# %%
@torch.no_grad()
def rounded_kl(net):
    """KL on the probe after rounding every Linear layer, in place."""
    for module in net.model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rtn(module.weight, group_size).to(module.weight.dtype)
    return evaluation.score(net, probe, reference).kl_divergence


effects = {("not scaled", "not clipped"): kept.KL[0]}
clip_all(net)
effects["not scaled", "clipped"] = rounded_kl(net)
print("; ".join(f"KL {' and '.join(key)}: {value:.4f}" for key, value in effects.items()))

# %% [markdown]
# ## autoawq on the whole model
#
# **Check your inputs before a slow run.** Both libraries notice some mistakes only after minutes of searching. This
# check reads the config file and the samples alone. A group must divide every layer's inputs. The 576 of SmolLM2-135M
# take groups of 64. The widths of the Qwen2.5 models are multiples of the guides' 128, so there add `-p group_size
# 128`.


# %% jupyter={"source_hidden": true}
def linear_layers(folder):
    """{name: in_features} of the Linear layers that get quantized, from the config alone."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    modules = empty.model.named_modules()
    return {name: module.in_features for name, module in modules if isinstance(module, nn.Linear)}


# %%
def check_request(folder, bits, group_size, samples, length):
    """Number of whole calibration blocks of `length` tokens; ValueError for what would fail later."""
    if hasattr(AutoConfig.from_pretrained(folder), "quantization_config"):
        raise ValueError("this checkpoint is quantized already; start from the float model")
    if bits != 4:
        raise ValueError(f"AWQ's GEMM format holds 4 bits, not {bits}")
    for name, inputs in linear_layers(folder).items():
        if inputs % group_size:
            fits = [size for size in (128, 64, 32) if inputs % size == 0]
            raise ValueError(f"group_size {group_size} does not divide {name}'s {inputs} inputs; {fits} do")
    tokens = sum(len(sample) for sample in samples if len(sample) <= length)
    if tokens < length:
        raise ValueError(f"{len(samples)} samples, {tokens} usable tokens: less than one block of {length}")
    return tokens // length


blocks = check_request(found.path, bits, group_size, samples, calibration_length)
print(f"{blocks * calibration_length:,} calibration tokens are used")

# %% [markdown]
# **Quantize.** These are the guide's call and its `quant_config`. We add four arguments:
#
# - `torch_dtype` is float32 on a CPU that only emulates 16 bits. The search is slow there in the stored bfloat16.
# - `calib_data` holds our samples. autoawq fetches its default from the hub.
# - `apply_clip=False`, because the library's clip search takes the seconds predicted above, or more.
# - `export_compatible=True` stops before packing, so that we can look at the scaled model. `pack()` does the rest.
#
# We leave one argument of the guide out: it sets `trust_remote_code` at the tokenizer. That runs Python code which
# comes with the checkpoint, and no model of this course needs any.

# %%
del net, linears, victim
memory.release()

# %%
quant_config = {
    "zero_point": True,  # a zero point per group: the grid of `rtn` above
    "q_group_size": group_size,  # the guide's 128 must divide every layer's inputs
    "w_bit": bits,
    "version": "GEMM",  # layout of the packed weights
}
awq_model = AutoAWQForCausalLM.from_pretrained(
    found.path, low_cpu_mem_usage=True, use_cache=False, torch_dtype=found.fast
)

# %%
with memory.track() as autoawq_used, quietly():
    awq_model.quantize(
        tokenizer,
        quant_config=quant_config,
        calib_data=samples,
        max_calib_seq_len=calibration_length,
        apply_clip=False,
        export_compatible=True,
    )
    scaled = copy.deepcopy(awq_model.model)
    awq_model.pack()
layers = awq_model.config.num_hidden_layers
print(f"{autoawq_used.seconds:.0f} s, {autoawq_used.seconds / layers:.2f} s a layer")

# %%
clipped = copy.deepcopy(scaled).cpu()  # it waits in RAM: a GPU holds one of the two at a time
effects["scaled", "not clipped"] = rounded_kl(scaled.to(found.device).eval())
del scaled
memory.release()
clip_all(clipped.to(found.device).eval())
effects["scaled", "clipped"] = rounded_kl(clipped)
del clipped
pd.Series(effects, name="KL on the probe").unstack().round(4)

# %% [markdown]
# **Look at what you calibrated on.** As released, autoawq drops every sample longer than `max_calib_seq_len` without
# a word. It joins the other samples and cuts them into blocks. The repair cuts long samples instead of dropping them.

# %%
from awq.quantize import quantizer
from awq.utils import calib_data

text = evaluation.text("calibration", source="pydoc")
documents = [text[:200], text[200:500], text[500:900], text[900:1700], text[1700:8000]]
lengths = [len(tokenizer.encode(document)) for document in documents]
print(f"documents of {lengths} tokens, max_calib_seq_len 256")
for name, module in [("as released", calib_data), ("repaired", quantizer)]:
    used = module.get_calib_dataset(data=documents, tokenizer=tokenizer, n_samples=128, max_seq_len=256)
    print(f"{name}: {sum(block.numel() for block in used):,} of {sum(lengths):,} tokens used")

# %% [markdown]
# ### Save
#
# `checkpoints.writing` gives a scratch folder that takes the checkpoint's name when it is whole, so a run that is
# killed leaves nothing that loads. We keep the logits of one short text, to compare them with the file.

# %%
prompt = windows[:1, :32]


def logits_of(net):
    with torch.inference_mode():
        return net.eval()(input_ids=prompt.to(found.device)).logits.float().cpu()


# %%
before = {}
# autoawq's own forward pass calls Triton wherever it is installed, on a CPU too
triton = mock.patch("awq.modules.linear.gemm.TRITON_AVAILABLE", found.device == "cuda")
with triton, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    before["autoawq"] = logits_of(awq_model.model.to(found.device))

# %%
awq_model.model.half()  # embeddings and norms are stored in 16 bits
with checkpoints.writing(output_dir, "autoawq") as scratch:
    awq_model.save_quantized(str(scratch))
    tokenizer.save_pretrained(scratch)
del awq_model

# %% [markdown]
# ## gptqmodel: AWQ, maintained
#
# AutoAWQ's own README sends its users to llm-compressor, which this course does not run. gptqmodel runs the same
# method, on a CPU too, with its own kernels. On a CPU we name the layer class it packs into, or it asks for CUDA. It
# always clips, with the same slow search. **For this call we replace its clip search with our faster one, so the
# result is gptqmodel's scales with the clipping from above.**
#
# gptqmodel has no public setting for its clip search, and none for the folder of its logs. So we use two private
# names, `_compute_best_clip` and `_PROJECT_LOG_DIR`. They may change with the version (this is the pinned 7.6.0).
# Where the first one is gone, the library's own slow search runs. Where the second one is gone, the logs land in
# `./logs`.

# %% jupyter={"source_hidden": true}
with quietly():
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.looper import loop_processor
    from gptqmodel.looper.awq_processor import AWQProcessor
    from gptqmodel.quantization import AWQConfig

loop_processor._PROJECT_LOG_DIR = files.folder(output_dir) / "logs"  # or it makes ./logs wherever you are


# %%
def fast_clip(self, weight, x, **_):
    return best_clip(weight, x.to(weight.device), self.qcfg.group_size)


# %%
rows = [{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in samples]
backend = BACKEND.AWQ_TORCH  # while it quantizes; fast kernels come when it is loaded
awq_config = AWQConfig(
    bits=bits,
    group_size=group_size,
    sym=False,  # sym=False: with zero points
    offload_to_disk=False,
)  # keep the layers in memory, to compare them with the file
our_clip = contextlib.nullcontext()
if hasattr(AWQProcessor, "_compute_best_clip"):  # private: a later version may name it otherwise
    our_clip = mock.patch.object(AWQProcessor, "_compute_best_clip", fast_clip)
with our_clip, quietly():
    q_model = GPTQModel.load(found.path, awq_config, dtype=found.fast, device=found.device)
    with memory.track() as awq_used:
        q_model.quantize(rows, batch_size=len(rows), backend=backend)
print(f"{awq_used.seconds:.0f} s, {awq_used.seconds / layers:.2f} s a layer")

# %%
before["awq"] = logits_of(q_model.model.to(found.device))
q_model.model.half()
with quietly(), checkpoints.writing(output_dir, "awq") as scratch:
    q_model.save(str(scratch))
    tokenizer.save_pretrained(scratch)
del q_model
memory.release()

# %% [markdown]
# ## Reload in a new process
#
# The new process has plain transformers and the files. Its logits must match the ones from before saving.

# %% jupyter={"source_hidden": true}
IMPORTS = """
import json, sys
import helpers  # as many threads as here
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AwqConfig
from helpers import speed
"""

# %%
RELOAD = """
folders, dtypes, device, ids, out = json.loads(sys.argv[1])
rates, logits = {}, {}
for name, folder in folders.items():
    on_gpu = device == "cuda" and "awq" in name
    kernel = {"quantization_config": AwqConfig(backend="gemm_triton")} if on_gpu else {}
    net = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtypes[name]), device_map={"": device}, **kernel).eval()
    with torch.inference_mode():
        logits[name] = net(input_ids=torch.tensor(ids, device=device)).logits.float().cpu()
    rates[name] = vars(speed.decode(net, new_tokens=12, runs=2))
save_file(logits, out + "/logits.safetensors")
print(json.dumps(rates))
"""

# %%
dtype = str(found.fast).removeprefix("torch.") if found.device == "cpu" else "float16"  # as GPU kernels do
plain_dtype = str(found.dtype).removeprefix("torch.")
folders = {name: str(checkpoints.folder(output_dir, name)) for name in before}
dtypes = {plain_dtype: plain_dtype, "bfloat16": "bfloat16", **dict.fromkeys(before, dtype)}
all_folders = {name: folders.get(name, str(found.path)) for name in dtypes}

# %%
with tempfile.TemporaryDirectory() as scratch:
    wanted = json.dumps([all_folders, dtypes, found.device, prompt.tolist(), scratch])
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS + RELOAD, wanted],
        capture_output=True,
        text=True,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr[-1000:]
    elsewhere = load_file(f"{scratch}/logits.safetensors")
fresh = pd.DataFrame(json.loads(done.stdout.splitlines()[-1])).T


# %% jupyter={"source_hidden": true}
def load(folder):
    """A checkpoint through transformers, which hands the layers to gptqmodel's kernels."""
    kernel = {}
    if found.device == "cuda":  # other kernels are compiled at first use, for minutes
        kernel = {"quantization_config": AwqConfig(backend="gemm_triton")}
    with quietly():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map={"": found.device}, **kernel
        )


# %% jupyter={"source_hidden": true}
def divergence(before, after):
    """Mean KL divergence between the predictions of two sets of logits."""
    before, after = before.log_softmax(-1), after.log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).mean().item()


# %%
full = memory.predict(AutoConfig.from_pretrained(found.path), bits=16)
loaded = {name: load(folder) for name, folder in folders.items()}
weight_bytes = {name: memory.weight_bytes(net) for name, net in loaded.items()}  # before kernels repack them
rows = {}
for name, net in loaded.items():
    size = sum(file.stat().st_size for file in pathlib.Path(folders[name]).glob("*.safetensors"))
    rows[name] = {
        "MB": size / 1e6,
        "of bf16": size / full.model,
        "KL to before saving": divergence(before[name], elsewhere[name]),
        "largest difference to the other process": (logits_of(net) - elsewhere[name]).abs().max().item(),
    }
reloaded = pd.DataFrame(rows).T
reloaded.round(4)

# %%
largest = 1.02 - 0.7 * full.weights / full.model  # embeddings, head and norms keep 16 bits
assert (reloaded["of bf16"] < largest).all(), "a 4-bit checkpoint this large?"
unlike = reloaded["KL to before saving"]
assert unlike.max() < 0.01, "the file predicts something else than the model in memory"
same = 1e-3 if found.device == "cpu" else 0.5  # float16, and a GPU adds in an order of its own
assert (reloaded.iloc[:, -1] < same).all(), "two processes must agree on one file"

# %% [markdown]
# ## How good?
#
# Each method stands against rounding to nearest, with the 95 % interval of its KL. (`awq` is gptqmodel with our clip
# search, `autoawq` is autoawq without clipping.)

# %%
scores, second = {}, {}
for name, net in loaded.items():  # in large batches, because every pass unpacks all weights
    scores[name] = evaluation.score(net, windows, reference, batch_size=8)
    second[name] = evaluation.score(net, in_domain, in_domain_reference, batch_size=8)
judged = {"round to nearest": floor, **scores}
table = pd.DataFrame(
    {
        name: {
            "perplexity": score.perplexity,
            "KL": score.kl_divergence,
            "from": score.kl_low,
            "to": score.kl_high,
            "same top-1": score.top1_agreement,
        }
        for name, score in judged.items()
    }
).T
table.round(4)

# %%
worst = max(score.kl_divergence for score in scores.values())
assert worst < floor.kl_divergence or not found.trained, "AWQ must beat rounding to nearest"
if found.name.startswith("SmolLM2"):  # with Qwen2.5-Coder-1.5B AWQ removes an eighth (below)
    for name, score in scores.items():
        assert score.kl_divergence <= 0.65 * floor.kl_divergence, f"{name} removes too little of the error"
        assert score.kl_high < floor.kl_low, f"{name} and rounding to nearest: their intervals overlap"

# %% [markdown]
# The next table has the KL by genre, and on other pages of the documentation that AWQ was calibrated on:

# %%
genres = pd.DataFrame({name: score.by_genre() for name, score in judged.items()}).T
genres["Python docs"] = [score.kl_divergence for score in (in_domain_floor, *second.values())]
genres.round(3)

# %% [markdown]
# The two libraries run the same method. They differ mainly in the last step: gptqmodel always clips (here with our
# search), and autoawq ran with `apply_clip=False`. Is the difference on the same windows larger than chance?

# %%
gap, low, high = evaluation.difference(scores["autoawq"], scores["awq"])
clipping = "helps" if low > 0 else "hurts" if high < 0 else "changes nothing that this text can show"
print(f"KL of autoawq minus that of gptqmodel: {gap:+.4f} ({low:+.4f} to {high:+.4f}): clipping {clipping}")

# %% [markdown]
# **A larger model gains less.** We ran these cells once with Qwen2.5-Coder-1.5B on an NVIDIA H200, in groups of 128.
# Rounding has a KL of 0.0872 [0.0827, 0.0926] there, autoawq 0.0739 [0.0695, 0.0790], and gptqmodel 0.0770 [0.0720,
# 0.0822]. AWQ took away 12 to 15 % of the error, and the intervals of gptqmodel and of rounding are barely apart.
#
# The letter comes last. We chose nothing by looking at it. Does it confirm the order?

# %%
letter_kl = {"round to nearest": letter_floor.kl_divergence}
for name, net in loaded.items():
    letter_kl[name] = evaluation.score(net, letter, letter_reference, batch_size=8).kl_divergence
orders = [sorted(kl, key=kl.get) for kl in (table["KL"].to_dict(), letter_kl)]
print("on the letter: " + ", ".join(f"{name} {kl:.4f}" for name, kl in letter_kl.items()))
print(
    "the order is "
    + ("the same" if orders[0] == orders[1] else "another")
    + " as on the four genres: "
    + " < ".join(orders[0])
    + (f", here {' < '.join(orders[1])}" if orders[0] != orders[1] else "")
)
assert max(letter_kl, key=letter_kl.get) == "round to nearest" or not found.trained, "AWQ must beat rounding here too"


# %% [markdown]
# ## Which loader takes which checkpoint?
#
# We try both checkpoints in three loaders, and print what each one says.

# %%
fast_kernel = BACKEND.AWQ_GEMM_TRITON if found.device == "cuda" else BACKEND.AUTO
loaders = {
    "autoawq": lambda folder: AutoAWQForCausalLM.from_quantized(folder, fuse_layers=False).model,
    "gptqmodel": lambda folder: GPTQModel.load(folder, device=found.device, backend=fast_kernel).model,
    "transformers": lambda folder: loaded[pathlib.Path(folder).name],
}


def first_line(error, folder):
    text = str(error).strip().splitlines()[0].replace(str(folder), pathlib.Path(folder).name)
    return f"{type(error).__name__}: {text[:110]}"


# %% jupyter={"source_hidden": true}
def try_loader(open_it, folder):
    """("loads", kernel) or ("refuses", why)."""
    try:
        with quietly():
            net = open_it(folder)
    except Exception as error:
        return "refuses", first_line(error, folder)
    return "loads", type(net.model.layers[0].self_attn.q_proj).__name__


rows = [
    (name, loader, *try_loader(open_it, folder))
    for name, folder in folders.items()
    for loader, open_it in loaders.items()
]
memory.release()

# %%
matrix = pd.DataFrame(rows, columns=["checkpoint", "loader", "outcome", "kernel, or why not"])
with pd.option_context("display.max_colwidth", None):
    display(matrix)

# %% [markdown]
# - Both packages write the same format, so a loader that reads one checkpoint reads the other.
# - transformers and gptqmodel use the same kernels. autoawq's own loader wants a GPU, or Intel's extension on a CPU.
#
# ### How fast?
#
# The new process above measured the speed, because a process in which gptqmodel has quantized decodes more slowly
# afterwards:

# %%
fresh.columns = ["prefill tok/s", "decode tok/s", "slowest run", "fastest run"]
fresh["times " + plain_dtype] = fresh["decode tok/s"] / fresh["decode tok/s"][plain_dtype]
fresh.round(2)

# %%
slowest = fresh.loc[list(folders), "times " + plain_dtype].min()
against_bf16 = fresh.loc[list(folders), "decode tok/s"].min() / fresh["decode tok/s"]["bfloat16"]
print(f"the slower one: {slowest:.1f} times as fast as {plain_dtype}, {against_bf16:.1f} times bfloat16")
if found.device == "cpu" and found.trained:
    assert slowest >= 1.5, "4-bit decoding with gptqmodel's kernels should be well ahead of float32 on a CPU"

# %% [markdown]
# ## Chat with it
#
# This is the guide's last step, on the reloaded checkpoints. The guide renders the template to text
# (`tokenize=False`) and tokenizes the text again. `apply_chat_template` adds a BOS token where the template has one,
# and the tokenizer of Mistral adds a second. We run both ways and count the tokens:

# %%
conversation = [{"role": "user", "content": "How are you today?"}]
inputs = tokenizer.apply_chat_template(
    conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(found.device)
start = inputs["input_ids"].shape[1]

# %%
prompt_text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
guide_inputs = tokenizer(prompt_text, return_tensors="pt")  # the guide adds .to("cuda:0"), an error on a CPU
doubled = guide_inputs["input_ids"].shape[1] - start
print(f"the guide's way: {start + doubled} tokens, at once: {start}; {doubled} more with this tokenizer")

# %% [markdown]
# The guide also prints `outputs[0]`, which starts with the whole prompt. We print the answer alone. Loading without
# an error proves nothing, so the untouched model judges each answer: its perplexity is low for text that the
# untouched model could have written.


# %%
def answer(net):
    """The token ids of the conversation with the answer, int64 [1, tokens]."""
    return net.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)


answers = {name: answer(net) for name, net in loaded.items()}
del loaded, net  # a small GPU does not hold them beside the untouched model
memory.release()

# %%
plain = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.dtype).to(found.device)
answers = {"untouched": answer(plain)} | answers


# %%
def perplexity_of(ids):
    """The perplexity of an answer under the untouched model."""
    with torch.inference_mode():
        log_probs = plain(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
    return (-log_probs.gather(1, ids[0, start:, None]).mean()).exp().item()


for name, ids in answers.items():
    perplexity = perplexity_of(ids)
    print(f"{name}, perplexity {perplexity:.1f}: {tokenizer.decode(ids[0, start:], skip_special_tokens=True)}\n")
    if found.trained:  # random weights find nothing likely
        assert perplexity < 15, f"{name} loaded without an error and talks nonsense"

# %% [markdown]
# ## Mistakes, and when you hear of them
#
# We make five mistakes, once with our check and once with autoawq itself. autoawq gets a single decoder layer here,
# so that the wait is short:

# %%
del plain
memory.release()
short = AutoAWQForCausalLM.from_pretrained(found.path, torch_dtype=found.fast)
short.model.model.layers = short.model.model.layers[:1]

# %% jupyter={"source_hidden": true}
widths = set(linear_layers(found.path).values())
wrong_group = next(size for size in (128, 96, 80) if any(width % size for width in widths))
good = dict(folder=found.path, bits=bits, group_size=group_size)
good.update(samples=samples[:2], length=calibration_length)
mistakes = {
    f"group size {wrong_group}": dict(group_size=wrong_group),
    "3 bits": dict(bits=3),
    "no samples": dict(samples=[]),
    "one short sample": dict(samples=[samples[0][:50]]),
    "quantized already": dict(folder=folders["autoawq"]),
}


# %% jupyter={"source_hidden": true}
def outcome(action, folder):
    try:
        action()
        return "no error"
    except Exception as error:
        return first_line(error, folder) if str(error) else type(error).__name__


# %% jupyter={"source_hidden": true}
def quantize_one_layer(folder, bits, group_size, samples, length):
    with quietly():
        victim = copy.deepcopy(short) if folder == found.path else AutoAWQForCausalLM.from_pretrained(folder)
    config = {**quant_config, "w_bit": bits, "q_group_size": group_size}
    with quietly():
        settings = dict(quant_config=config, calib_data=samples, max_calib_seq_len=length)
        victim.quantize(tokenizer, apply_clip=False, **settings)


# %%
rows = []
for name, wrong in mistakes.items():
    actions = (check_request, quantize_one_layer)
    answers = [outcome(lambda: action(**(good | wrong)), folders["autoawq"]) for action in actions]
    rows.append([name, *answers])
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame(rows, columns=["mistake", "the check here, at once", "autoawq"]))
assert all(row[1].startswith("ValueError") for row in rows)

# %% [markdown]
# ## On a 24 GB GPU with Mistral-7B
#
# Change two parameters: `model = "mistralai/Mistral-7B-Instruct-v0.3"` and `group_size = 128`. This is what one run
# of autoawq in Mistral-7B's shape gave, from the course's GPU measurements. The guide's `device="cuda:0"` loads
# there.

# %%
course = pathlib.Path(helpers.__file__).parents[1]
awq_7b = json.loads((course / "notebooks" / "gpu" / "reference.json").read_text())["autoawq"]
print(
    f"{awq_7b['device']}: {awq_7b['seconds']:.0f} s, at most {awq_7b['peak_bytes'] / 2**30:.1f} GiB; "
    f"answering needs {awq_7b['answering_peak_bytes'] / 2**30:.1f} GiB, {awq_7b['tokens_per_s']:.1f} tok/s"
)

# %% [markdown]
# ## What the guides claim

# %%
from helpers.publishing import claims

awq_score = scores["awq"]
lost = f"rounded {floor.kl_divergence:.3f}; "
lost += f"{1 - awq_score.top1_agreement:.0%} of the top tokens change"
removed = f"1 % of the input channels in float removes {one_percent:.0%} of the KL; AWQ, all in 4 bits, "
removed += f"{1 - awq_score.kl_divergence / floor.kl_divergence:.0%}"
mistral = models.mistral_config()
layer_inputs = [mistral.hidden_size, mistral.intermediate_size]
divided = sum(number % 128 == 0 for number in layer_inputs) / len(layer_inputs)
own_loader = matrix.set_index(["checkpoint", "loader"]).loc[("autoawq", "autoawq")]

# %% jupyter={"source_hidden": true}
findings = [
    claims.finding("awq-one-percent", one_percent, text=removed),
    claims.finding("awq-quality", awq_score.kl_divergence, awq_score.kl_low, awq_score.kl_high, text=lost),
    claims.finding("awq-memory", reloaded["of bf16"].max()),
    claims.finding("awq-group-128", divided, computed_for="Mistral-7B"),
    claims.finding("awq-minutes", autoawq_used.seconds / 60),
    claims.finding(
        "awq-from-quantized", int(own_loader.outcome == "loads"), text=own_loader["kernel, or why not"][:80]
    ),
    claims.finding("template-twice", int(doubled == 0), text=f"{doubled} token(s) more than at once"),
]
if found.device == "cpu":
    patches = f"autoawq ran on a CPU with {len(repair.applied)} repair(s)"
    findings.append(claims.finding("awq-gpu", 0.5 if repair.applied else 0, text=patches))
claims.write(output_dir, notebook="06_awq", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "06_awq"))


# %% [markdown]
# ## Exercises
#
# **1 (easy).** Predict, then measure: what does a scale do to the error x input of the first of the four weights, on
# average? Take many random groups like the one above (first input 8, scale 2). Return your guess: the mean |error x
# input| of the first weight with the scale, divided by the one without. (One number.)


# %%
def error_ratio():
    # Replace the dots.
    ...


# %% jupyter={"source_hidden": true}
def measured_ratio(scale, groups=2000):
    """Mean |error| of the first weight in random groups of 64, scaled, over the one not scaled; 4 bits."""
    weights = torch.randn(groups, 64, generator=torch.Generator().manual_seed(0))
    factors = torch.ones(64)
    factors[0] = scale
    scaled = rtn(weights * factors, 64) / factors
    return ((scaled - weights)[:, 0].abs().mean() / (rtn(weights, 64) - weights)[:, 0].abs().mean()).item()


def test_ratio(function):
    answer = function()
    assert answer is not None, "return a number"
    measured = measured_ratio(2.0)
    assert answer < 1, "does the scale make the error larger? Look at the two tables of the four weights"
    hint = "by what is the error divided?"
    assert abs(answer - measured) < 0.1, f"measured {measured:.2f}, you said {answer}: {hint}"


exercises.check(error_ratio, test_ratio)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def error_ratio():
        return 0.5  # nearly: the step seldom grows, and the error is divided by the scale

    exercises.require(error_ratio, test_ratio)
    for scale in (2.0, 4.0, 8.0):  # large scales stretch the grid
        print(f"scale {scale}: {measured_ratio(scale):.2f}")


# %% [markdown]
# **2 (medium).** With one key/value head per query head, `v_proj`'s outputs are `o_proj`'s inputs, averaged by
# attention. Fold scales [width] between the two, in place: `v_proj` may have a bias. (Three lines. With grouped
# heads, as here, autoawq leaves `o_proj` unscaled.)


# %%
def fold_values(v_proj, o_proj, scales):
    # Replace the dots.
    ...


# %% jupyter={"source_hidden": true}
def test_fold(function):
    torch.manual_seed(0)
    v_proj, o_proj, s = nn.Linear(32, 64), nn.Linear(64, 32), torch.rand(64) + 0.5
    value, attention = torch.randn(7, 32), torch.randn(7, 7).softmax(-1)
    before, column = o_proj(attention @ v_proj(value)).detach(), o_proj.weight[:, 3].detach().clone()
    function(v_proj, o_proj, s)
    after = o_proj(attention @ v_proj(value)).detach()
    assert not torch.equal(column, o_proj.weight[:, 3]), "o_proj is unchanged"
    assert torch.allclose(o_proj.weight[:, 3], column * s[3]), "o_proj: column j is multiplied by scale j"
    assert torch.allclose(before, after, atol=1e-5), "the float function changed: v_proj's rows, and its bias"


exercises.check(fold_values, test_fold)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    @torch.no_grad()
    def fold_values(v_proj, o_proj, scales):
        v_proj.weight /= scales[:, None]
        if v_proj.bias is not None:
            v_proj.bias /= scales
        o_proj.weight *= scales

    exercises.require(fold_values, test_fold)


# %% [markdown]
# **3 (hard).** For a single Linear layer the search needs no tokens either. Return the mean squared error of its
# output for changed weights, from `gram` = XᵀX / tokens [in, in] alone. (Two lines. `gram` is also GPTQ's Hessian, up
# to a factor.)


# %%
def output_error(weight, changed, gram):
    # Replace the dots.
    ...


# %% jupyter={"source_hidden": true}
def test_error(function):
    weight, tokens = half.mlp.down_proj.weight.data, inner[0]
    changed, gram = rtn(weight, group_size), tokens.T @ tokens / len(tokens)
    answer = function(weight, changed, gram)
    assert answer is not None, "return a number"
    direct = (tokens @ (changed - weight).T).pow(2).mean().item()
    assert abs(float(answer) / direct - 1) < 1e-3, f"{float(answer):.3e}; on the tokens: {direct:.3e}"


exercises.check(output_error, test_error)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def output_error(weight, changed, gram):
        change = changed - weight
        return ((change @ gram) * change).sum() / len(weight)

    exercises.require(output_error, test_error)

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("06_awq")

# %% [markdown]
# ## Takeaways
#
# 1. **Inputs tell which weights matter.** 1 % of the channels in float, chosen by inputs, takes 56 % of the
#    rounding loss away. Chosen by weights, they help no more than chance.
# 2. **AWQ is a scale per channel, found by a search and folded away.** All in 4 bits, it brings the model's KL from
#    0.41 to 0.15, and the float function stays as it is. In the last layer,
#    whose largest input is 56 times the median, it takes 61 % of the MLP's error away. On a model of 1.5 billion
#    parameters the gain was 12 to 15 %.
# 3. **Two libraries write one format.** autoawq needs a repair on a CPU. transformers and gptqmodel load either
#    checkpoint, and on this CPU both decode at least twice as fast as float32.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% jupyter={"source_hidden": true} tags=["record"]
for method, used in [("awq", awq_used), ("autoawq", autoawq_used)]:
    records.write(
        output_dir,
        method=method,
        notebook="06_awq",
        found=found,
        windows=windows,
        bits_per_weight=8 * weight_bytes[method] / full.parameters,
        weight_bytes=weight_bytes[method],
        peak_memory_bytes=used.peak_vram if found.device == "cuda" else used.peak_ram,
        decode_tokens_per_s=fresh["decode tok/s"][method],
        quantize_seconds=used.seconds,
        scores=scores[method],
        in_domain=(in_domain, second[method]),
    )
repair.undo()
