# %% [markdown]
# # 06 AWQ
#
# Find the weights that matter by looking at what flows into them, make them safe from rounding, and load the result anywhere.
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
# 2. Write AWQ's scale search, the folding and the clip search by hand, and get autoawq's own numbers on the same layer.
# 3. Quantize the whole model with autoawq and with gptqmodel, and know which loader takes which checkpoint, how good and how fast.
#
# **Before you start:** [00 Start here](00_start_here.ipynb) for the memory arithmetic, [05 GPTQ](05_gptq.ipynb) for groups and calibration.

# %% tags=["bootstrap"]
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
layer = 5
max_new_tokens = 32

# %%
import contextlib, copy, io, json, logging, pathlib, subprocess, sys, tempfile, time, warnings
from unittest import mock

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, AwqConfig

import helpers
from helpers import archived, batch, checkpoints, evaluation, exercises, figures
from helpers import memory, models, records, speed

figures.style()
transformers.logging.set_verbosity_error()  # autoawq uses arguments that transformers has renamed since
for name in ("auto_gptq", "auto_gptq.modeling._base", "accelerate", "bitsandbytes", "tokenicer"):
    logging.getLogger(name).setLevel(logging.ERROR)  # they explain themselves at length

def quietly():
    """Progress bars and pages of text: shown in Jupyter, left out of a batch run."""
    stack = contextlib.ExitStack()
    if batch():
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


# %% [markdown]
# ## What cannot work is said first
#
# Both libraries notice some mistakes only after minutes of searching. This looks at the config file and the samples alone.
#
# A group must divide every layer's inputs. The 576 of SmolLM2-135M take groups of 64; the widths of the Qwen2.5 models are multiples
# of the guides' 128, so there add `-p group_size 128`.

# %%
def linear_layers(folder):
    """{name: in_features} of the Linear layers that get quantized, from the config alone."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    modules = empty.model.named_modules()
    return {name: module.in_features for name, module in modules if isinstance(module, nn.Linear)}

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


# %%
found = models.find(model, copies=2.5)
tokenizer = AutoTokenizer.from_pretrained(found.path)
windows = evaluation.windows(tokenizer, tokens=eval_tokens)
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
letter = evaluation.windows(tokenizer, source="letter", tokens=1536)
reference, in_domain_reference, letter_reference = (
    evaluation.reference(found, text) for text in (windows, in_domain, letter))

# %% [markdown]
# Three texts judge. The four genres are what counts: no method here was calibrated on them. Python's documentation comes second,
# because AWQ is calibrated on other pages of it. A letter is held back to the end. [05 GPTQ](05_gptq.ipynb) studies what another
# calibration text changes.

# %%
calibration = evaluation.windows(
    tokenizer, "calibration", source="pydoc",
    tokens=calibration_samples * calibration_length, context=calibration_length)
samples = calibration.tolist()
blocks = check_request(found.path, bits, group_size, samples, calibration_length)
print(f"{found.name} on the {found.device.upper()}; calibration: {blocks} of {len(samples)} samples used, "
      f"{blocks * calibration_length:,} tokens")

# %% [markdown]
# ## The idea: look at the inputs, not at the weights
#
# A Linear layer adds up input x weight over its input channels. Rounding errors of weights whose input is always large weigh more.
# One pass over the calibration text gives each channel's mean magnitude:

# %%
net = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.fast).to(found.device)
net.eval().requires_grad_(False)
linears = {name: module for name, module in net.model.named_modules() if isinstance(module, nn.Linear)}

def watch(net, batch):
    """Mean |x| per input channel of every Linear layer, {name: [in_features]}."""
    def hook(name):
        return lambda _, args: magnitudes.update({name: args[0].float().abs().flatten(0, -2).mean(0)})

    magnitudes = {}
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    with torch.inference_mode():
        net.model(batch.to(found.device))
    for handle in hooks:
        handle.remove()
    return magnitudes

magnitudes = watch(net, calibration)

# %%
gate = f"layers.{layer}.mlp.gate_proj"
curves = {"inputs": magnitudes[gate], "weights": linears[gate].weight.float().abs().mean(0)}
curves = {name: (values / values.median()).sort(descending=True).values.cpu()
          for name, values in curves.items()}
spread = pd.DataFrame({name: {"largest": values[0], "1 % from the top": values[len(values) // 100],
                              "10 % from the top": values[len(values) // 10], "smallest": values[-1]}
                       for name, values in curves.items()}).astype(float).round(2)

# %%
fig, ax = plt.subplots()
for name, values in curves.items():
    ax.plot(100 * torch.arange(len(values)) / len(values), values, label=f"mean |{name[:-1]}|")
ax.set(xlabel="input channels, % from the largest", ylabel="times the median", yscale="log")
ax.legend()
figures.show(fig, alt=f"Channels of layer {layer}'s gate_proj: the largest mean input is "
             f"{spread['inputs']['largest']:.0f} times the median, the largest mean weight only "
             f"{spread['weights']['largest']:.1f} times.", table=spread)


# %% [markdown]
# ## The 1 %: keep some channels in float
#
# First the rounding. AWQ's grid has a zero point: 2^bits levels between the smallest and the largest weight of a group.

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
# Now round every Linear layer of the model except its most important input channels, and measure. Important by which measure?

# %%
probe = windows[:8]  # a quarter of the text, two windows a genre, for the steps in between
originals = {name: module.weight.data.cpu().clone() for name, module in linears.items()}

def importance(name, chosen_by, dice=torch.Generator().manual_seed(0)):
    """A number per input channel of a layer; the largest are kept."""
    if chosen_by == "inputs":
        return magnitudes[name]
    if chosen_by == "weights":
        return linears[name].weight.float().abs().mean(0)
    return torch.rand(linears[name].in_features, generator=dice)

def restore():
    for name, module in linears.items():
        module.weight.data.copy_(originals[name])


# %%
@torch.inference_mode()
def round_all_but(share, chosen_by):
    """Quantize the model in place, `share` of each layer's input channels excepted."""
    restore()
    for name, module in linears.items():
        weight, rounded = module.weight, rtn(module.weight, group_size)
        if share:
            count = max(1, round(share * module.in_features))
            keep = importance(name, chosen_by).argsort(descending=True)[:count]
            rounded[:, keep] = weight[:, keep].float()
        module.weight.data.copy_(rounded)

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
# But a matrix that is part integer and part float needs two kernels. So AWQ keeps everything in 4 bits and protects those
# channels another way.
#
# The floor that every method below must beat is the first row. On the whole evaluation text:

# %%
round_all_but(0, "-")
floor = evaluation.score(net, windows, reference)
in_domain_floor = evaluation.score(net, in_domain, in_domain_reference)
letter_floor = evaluation.score(net, letter, letter_reference)
restore()
print(f"round to nearest, {bits} bits, groups of {group_size}: KL {floor.kl_divergence:.4f} "
      f"({floor.kl_low:.4f} to {floor.kl_high:.4f}), "
      f"perplexity {floor.perplexity:.2f} (untouched: {reference.perplexity:.2f})")

# %% [markdown]
# ## The trick: scale up, divide elsewhere
#
# Multiply a weight column by s and divide its input by s: same product. But the column now takes a larger part of its group's
# grid, so its relative rounding error shrinks, by about s. Too large an s stretches the grid for its neighbours. So **search**
# ([AWQ, section 3.2](https://arxiv.org/abs/2306.00978)):
#
# - one exponent alpha from 0 (plain rounding) to 1: s = mean|x|^alpha;
# - the loss is measured on the output of the whole block (here the MLP), on calibration inputs;
# - autoawq also divides by the mean weight to the power 1 - alpha (`duo_scaling`).

# %%
block = copy.deepcopy(net.model.layers[layer]).float()
states = []
handle = net.model.layers[layer].post_attention_layernorm.register_forward_pre_hook(
    lambda _, args: states.append(args[0].float()))
with torch.inference_mode():
    net.model(calibration[:2].to(found.device))
handle.remove()
hidden = states[0].clone()  # what goes into the RMSNorm before the MLP, [samples, tokens, hidden]
x = block.post_attention_layernorm(hidden).detach()


# %%
@torch.no_grad()
def search_scales(inspect, linears, x, duo_scaling=True, grid=20):
    """Scales for the inputs of `linears` with the least squared error of `inspect(x)`; {alpha: error}."""
    target, before = inspect(x), [linear.weight.data for linear in linears]
    groups = torch.cat(before).abs().view(-1, group_size)
    w_mean = (groups / (groups.amax(1, keepdim=True) + 1e-6)).view(-1, x.shape[-1]).mean(0)
    x_mean = x.abs().flatten(0, -2).mean(0)
    losses, best, least = {}, None, float("inf")
    for alpha in (step / grid for step in range(grid)):
        scales = x_mean**alpha / (w_mean ** (1 - alpha) + 1e-4) if duo_scaling else x_mean**alpha
        scales = scales.clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        for linear, weight in zip(linears, before):
            linear.weight.data = rtn(weight * scales, group_size) / scales
        losses[alpha] = (inspect(x) - target).pow(2).mean().item()
        if losses[alpha] < least:
            best, least = scales, losses[alpha]
    for linear, weight in zip(linears, before):
        linear.weight.data = weight
    return best, losses


# %%
mlp = block.mlp
pair = [mlp.gate_proj, mlp.up_proj]
_, plain = search_scales(mlp, pair, x, duo_scaling=False)
scales, duo = search_scales(mlp, pair, x)
target = mlp(x).detach()
rounded = plain[0.0]  # alpha 0 without duo scaling: all scales are 1
search = pd.DataFrame({"mean|x|^alpha": plain, "duo scaling": duo}) / rounded
best_alpha = search["duo scaling"].idxmin()

# %%
fig, ax = plt.subplots()
for column in search:
    ax.plot(search.index, search[column], marker=".", label=column)
ax.axhline(1, color=figures.PALETTE[4], linestyle="--", label="round to nearest")
ax.set(xlabel="alpha", ylabel="squared error of the MLP\nrelative to round to nearest", ylim=(0, 2.5))
ax.legend()
low = search.min()
figures.show(fig, alt=f"Error over alpha in layer {layer}, against rounding to nearest: {low.iloc[1]:.2f} at "
             f"best with duo scaling, at alpha {best_alpha:.2f}; {low.iloc[0]:.2f} without.",
             table=search.T.round(2))


# %% [markdown]
# ### Folding: nothing is left to compute at run time
#
# The inputs are divided by s, but not by an extra operation: whatever comes before has a weight per channel to put it in.
# An RMSNorm's weight for gate and up; the rows of `up_proj` for `down_proj`.

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

folded = copy.deepcopy(block)
norm, mlp = folded.post_attention_layernorm, folded.mlp
fold(norm, [mlp.gate_proj, mlp.up_proj], scales)
inner = (mlp.act_fn(mlp.gate_proj(norm(hidden))) * mlp.up_proj(norm(hidden))).detach()  # what down_proj reads
scales_down, _ = search_scales(mlp.down_proj, [mlp.down_proj], inner)
fold(mlp.up_proj, [mlp.down_proj], scales_down)

# %%
change = ((mlp(norm(hidden)) - target).norm() / target.norm()).item()
print(f"scales from {scales.min():.2f} to {scales.max():.2f}; "
      f"the float block changed by {change:.1e} of its output")
assert change < 1e-5, "folding must not change the float function"


# %% [markdown]
# Rounded now, against the alternatives on the same block:

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

top = magnitudes[gate].argsort(descending=True)
errors = {"round to nearest": block_error(block.post_attention_layernorm, block.mlp)}
for share in (0.001, 0.01, 0.05):
    keep = top[: max(1, round(share * len(top)))]
    error = block_error(block.post_attention_layernorm, block.mlp, keep)
    errors[f"{share:.1%} of gate's and up's inputs in float"] = error
errors["scaled (AWQ), all in 4 bits"] = block_error(norm, mlp)
display(pd.DataFrame({"relative error of the MLP": errors}).round(4))
assert errors["scaled (AWQ), all in 4 bits"] < errors["round to nearest"]

# %% [markdown]
# ## autoawq on the same layer, and its repair
#
# autoawq is archived; its last release predates the libraries it runs on here. On a CPU it raises no error and **ruins the
# model**: between two trials of the search it puts back weights that it saved with `v.cpu()`. On a CPU that is no copy.

# %%
repair = archived.enable("autoawq")  # imports it, repaired
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer

for name, assumed, now in repair.applied:
    print(f"{name}\n  assumed: {assumed}\n  now:     {now}")


# %% [markdown]
# Its search alone, on our block and inputs, without and with the repair. `_search_best_scale` is what `quantize` calls per layer.

# %%
class Bare(AwqQuantizer):
    """autoawq's searches without a model and its calibration around them."""

    def init_quant(self, **_):
        return None, {}, None

bare = Bare(None, None, tokenizer, bits, group_size, True, "gemm", None, None, None, True)

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
# Repaired, it finds what the function above found, behind a norm and behind a Linear layer:

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
# After scaling, autoawq may shrink the range of each group: a few weights clipped, finer steps for the rest. Ten limits are tried
# on the outputs of each group; the library gets them by multiplying every weight with every token. But the error of a group is
# d·G·d, with d the change of its weights and G the products of its inputs summed over all tokens: one small matrix.

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
weight, few = half.mlp.down_proj.weight.data, inner[:1, :32]
started = time.perf_counter()
library = bare._compute_best_clip(weight, few)
library_seconds = time.perf_counter() - started
started = time.perf_counter()
ours = best_clip(weight, few, group_size)
our_seconds = time.perf_counter() - started
same = (ours - library).abs().le(1e-4 * library).float().mean().item()
print(f"{same:.2%} of {library.numel():,} groups get the same limit")
print(f"one Linear layer, {few.shape[1]} tokens: autoawq {library_seconds:.2f} s, ours {our_seconds:.2f} s")
clipped_weights = sum(module.weight.numel() for name, module in linears.items()
                      if not name.endswith(("q_proj", "k_proj")))
whole = library_seconds * 512 / few.shape[1] * clipped_weights / weight.numel()
print(f"at this rate autoawq takes {whole:.0f} s for the model, with the 512 tokens that it uses")
assert same > 0.99, "the clip search must choose autoawq's limits, ties apart"


# %% [markdown]
# That is cheap enough for the whole model, where it is judged fairly: rounding with and without it. (Scaled: further below.)

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
# The guide's call and its `quant_config`. Four arguments are added:
#
# - `torch_dtype`: float32 on a CPU that only emulates 16 bits, where the search is slow in the stored bfloat16;
# - `calib_data`: the default is fetched from the hub;
# - `apply_clip=False`: the library's clip search takes the seconds predicted above, or more;
# - `export_compatible=True`: stop before packing, so that we can look at the scaled model. `pack()` does the rest.

# %%
del net, linears, victim
memory.release()
quant_config = {
    "zero_point": True,          # a zero point per group: the grid of `rtn` above
    "q_group_size": group_size,  # the guide's 128 must divide every layer's inputs
    "w_bit": bits,
    "version": "GEMM",           # layout of the packed weights
}
awq_model = AutoAWQForCausalLM.from_pretrained(
    found.path, low_cpu_mem_usage=True, use_cache=False, torch_dtype=found.fast)
with memory.track() as autoawq_used, quietly():
    awq_model.quantize(
        tokenizer, quant_config=quant_config, calib_data=samples, max_calib_seq_len=calibration_length,
        apply_clip=False, export_compatible=True)
    scaled = copy.deepcopy(awq_model.model)
    awq_model.pack()
layers = awq_model.config.num_hidden_layers
print(f"{autoawq_used.seconds:.0f} s, {autoawq_used.seconds / layers:.2f} s a layer")

# %%
scaled.to(found.device).eval()
clipped = copy.deepcopy(scaled)
effects["scaled", "not clipped"] = rounded_kl(scaled)
del scaled
clip_all(clipped)
effects["scaled", "clipped"] = rounded_kl(clipped)
del clipped
pd.Series(effects, name="KL on the probe").unstack().round(4)

# %% [markdown]
# Look at what you calibrated on. As released, autoawq drops every sample longer than `max_calib_seq_len` without a word, then
# joins the rest and cuts it into blocks. The repair cuts long samples instead.

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
# `checkpoints.writing` gives a scratch folder that takes the checkpoint's name when it is whole: a run that is killed leaves nothing
# that loads. The logits of one short text are kept, for comparison with the file.

# %%
prompt = windows[:1, :32]

def logits_of(net):
    with torch.inference_mode():
        return net.eval()(input_ids=prompt.to(found.device)).logits.float().cpu()

before = {}
# autoawq's own forward pass calls Triton wherever it is installed, on a CPU too
triton = mock.patch("awq.modules.linear.gemm.TRITON_AVAILABLE", found.device == "cuda")
with triton, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    before["autoawq"] = logits_of(awq_model.model.to(found.device))
awq_model.model.half()  # embeddings and norms are stored in 16 bits
with checkpoints.writing(output_dir, "autoawq") as scratch:
    awq_model.save_quantized(str(scratch))
    tokenizer.save_pretrained(scratch)
del awq_model

# %% [markdown]
# ## gptqmodel, the successor
#
# The same method, maintained, with its own kernels. On a CPU it has to be told which layer class to pack into, or it asks for
# CUDA. It always clips, with the same slow search; while it works, it is lent the function from above.

# %%
with quietly():
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.looper import loop_processor
    from gptqmodel.looper.awq_processor import AWQProcessor
    from gptqmodel.quantization import AWQConfig

loop_processor._PROJECT_LOG_DIR = records.folder(output_dir) / "logs"  # or it makes ./logs wherever you are

def fast_clip(self, weight, x, **_):
    return best_clip(weight, x.to(weight.device), self.qcfg.group_size)


# %%
rows = [{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in samples]
backend = BACKEND.AWQ_TORCH  # while it quantizes; fast kernels come when it is loaded
awq_config = AWQConfig(bits=bits, group_size=group_size, sym=False,  # sym=False: with zero points
                       offload_to_disk=False)  # keep the layers in memory, to compare them with the file
lent = mock.patch.object(AWQProcessor, "_compute_best_clip", fast_clip)
with lent, quietly():
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
# The test that counts: another process, plain transformers, the same numbers.

# %%
RELOAD = """
import json, sys
import helpers  # as many threads as here
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AwqConfig
from helpers import speed

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
every = {name: folders.get(name, str(found.path)) for name in dtypes}
with tempfile.TemporaryDirectory() as scratch:
    order = json.dumps([every, dtypes, found.device, prompt.tolist(), scratch])
    done = subprocess.run([sys.executable, "-c", RELOAD, order], capture_output=True, text=True,
                          env=helpers.child_environment())
    assert done.returncode == 0, done.stderr[-1000:]
    elsewhere = load_file(f"{scratch}/logits.safetensors")
fresh = pd.DataFrame(json.loads(done.stdout.splitlines()[-1])).T


# %%
def load(folder):
    """A checkpoint through transformers, which hands the layers to gptqmodel's kernels."""
    kernel = {}
    if found.device == "cuda":  # other kernels are compiled at first use, for minutes
        kernel = {"quantization_config": AwqConfig(backend="gemm_triton")}
    with quietly():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map={"": found.device}, **kernel)

def divergence(before, after):
    """Mean KL divergence between the predictions of two sets of logits."""
    before, after = before.log_softmax(-1), after.log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).mean().item()

full = memory.predict(AutoConfig.from_pretrained(found.path), bits=16)
loaded = {name: load(folder) for name, folder in folders.items()}
weight_bytes = {name: memory.weight_bytes(net) for name, net in loaded.items()}  # before kernels repack them
rows = {}
for name, net in loaded.items():
    size = sum(file.stat().st_size for file in pathlib.Path(folders[name]).glob("*.safetensors"))
    rows[name] = {
        "MB": size / 1e6, "of bf16": size / full.model,
        "KL to before saving": divergence(before[name], elsewhere[name]),
        "largest difference to the other process": (logits_of(net) - elsewhere[name]).abs().max().item(),
    }
reloaded = pd.DataFrame(rows).T
reloaded.round(4)

# %%
assert (reloaded["of bf16"] < 0.45).all(), "a 4-bit checkpoint this large?"
unlike = reloaded["KL to before saving"]
assert unlike.max() < 0.01, "the file predicts something else than the model in memory"
same = 1e-3 if found.device == "cpu" else 0.5  # float16, and a GPU adds in an order of its own
assert (reloaded.iloc[:, -1] < same).all(), "two processes must agree on one file"

# %% [markdown]
# ## How good?
#
# Each method against the floor, with the 95 % interval of its KL.

# %%
scores, second = {}, {}
for name, net in loaded.items():  # in large batches, because every pass unpacks all weights
    scores[name] = evaluation.score(net, windows, reference, batch_size=8)
    second[name] = evaluation.score(net, in_domain, in_domain_reference, batch_size=8)
judged = {"round to nearest": floor, **scores}
table = pd.DataFrame({
    name: {"perplexity": score.perplexity, "KL": score.kl_divergence, "from": score.kl_low,
           "to": score.kl_high, "same top-1": score.top1_agreement}
    for name, score in judged.items()}).T
table.round(4)

# %%
worst = max(score.kl_divergence for score in scores.values())
assert worst < floor.kl_divergence, "AWQ must beat rounding to nearest"
if found.name.startswith(("SmolLM2", "Qwen")):
    for name, score in scores.items():
        assert score.kl_divergence <= 0.65 * floor.kl_divergence, f"{name} removes too little of the error"
        assert score.kl_high < floor.kl_low, f"{name} and rounding to nearest: their intervals overlap"

# %% [markdown]
# By genre, and on other pages of what AWQ was calibrated on:

# %%
genres = pd.DataFrame({name: score.by_genre() for name, score in judged.items()}).T
genres["Python docs"] = [score.kl_divergence for score in (in_domain_floor, *second.values())]
genres.round(3)

# %% [markdown]
# The two libraries run the same method. Their main difference is the last step: gptqmodel always clips, autoawq ran here with
# `apply_clip=False`. Their difference on the same windows, with its interval:

# %%
gap, low, high = evaluation.difference(scores["autoawq"], scores["awq"])
clipping = "helps" if low > 0 else "hurts" if high < 0 else "changes nothing that this text can show"
print(f"KL of autoawq minus that of gptqmodel: {gap:+.4f} ({low:+.4f} to {high:+.4f}): clipping {clipping}")

# %% [markdown]
# Last, the letter. Nothing was chosen by looking at it: does it confirm the order?

# %%
letter_kl = {"round to nearest": letter_floor.kl_divergence}
for name, net in loaded.items():
    letter_kl[name] = evaluation.score(net, letter, letter_reference, batch_size=8).kl_divergence
orders = [sorted(kl, key=kl.get) for kl in (table["KL"].to_dict(), letter_kl)]
print("on the letter: " + ", ".join(f"{name} {kl:.4f}" for name, kl in letter_kl.items()))
print("the order is " + ("the same" if orders[0] == orders[1] else "another") + " as on the four genres: "
      + " < ".join(orders[0]) + (f", here {' < '.join(orders[1])}" if orders[0] != orders[1] else ""))
assert max(letter_kl, key=letter_kl.get) == "round to nearest", "AWQ must beat rounding here too"


# %% [markdown]
# ## Which loader takes which checkpoint?
#
# Both checkpoints against four loaders, here and now. Nothing is assumed: a refusal is shown with its own words.

# %%
def with_auto_gptq(folder):
    with archived.enable("auto-gptq"):
        from auto_gptq import AutoGPTQForCausalLM
        return AutoGPTQForCausalLM.from_quantized(folder, device=found.device).model

fast_kernel = BACKEND.AWQ_GEMM_TRITON if found.device == "cuda" else BACKEND.AUTO
loaders = {
    "auto-gptq": with_auto_gptq,
    "autoawq": lambda folder: AutoAWQForCausalLM.from_quantized(folder, fuse_layers=False).model,
    "gptqmodel": lambda folder: GPTQModel.load(folder, device=found.device, backend=fast_kernel).model,
    "transformers": load,
}

def first_line(error, folder):
    text = str(error).strip().splitlines()[0].replace(str(folder), pathlib.Path(folder).name)
    return f"{type(error).__name__}: {text[:110]}"


# %%
rows = []
for name, folder in folders.items():
    for loader, open_it in loaders.items():
        try:
            with quietly():
                net = open_it(folder)
        except Exception as error:
            rows.append([name, loader, "refuses", first_line(error, folder), None])
            continue
        steps = 4 if loader == "autoawq" else 12
        rate = speed.decode(net, prompt_tokens=8, new_tokens=steps, runs=1).decode_tokens_per_s
        rows.append([name, loader, "loads", type(net.model.layers[0].self_attn.q_proj).__name__, rate])
        del net
        memory.release()

# %%
columns = ["checkpoint", "loader", "outcome", "kernel, or why not", "decode tok/s"]
matrix = pd.DataFrame(rows, columns=columns).round(1)
with pd.option_context("display.max_colwidth", None):
    display(matrix)

# %% [markdown]
# - Both packages write the same format, so what reads one checkpoint reads the other.
# - transformers and gptqmodel use the same kernels. autoawq's own loader wants a GPU, or Intel's extension on a CPU.
#
# ### How fast?
#
# From the new process above, where nothing else has run. (A process in which gptqmodel has quantized decodes more slowly afterwards: compare
# with the column above.)

# %%
fresh.columns = ["prefill tok/s", "decode tok/s", "slowest run", "fastest run"]
fresh["times " + plain_dtype] = fresh["decode tok/s"] / fresh["decode tok/s"][plain_dtype]
display(fresh.round(2))
slowest, fastest = fresh.loc[list(folders)].iloc[:, -1].agg(["min", "max"])
if found.device == "cpu":
    assert slowest >= 1.5, "4-bit decoding with gptqmodel's kernels should be well ahead of float32 on a CPU"

# %% [markdown]
# ## Chat with it
#
# The guide's last step, on the reloaded checkpoints. Loading without an error proves nothing, so the untouched model judges each
# answer: its perplexity is low for text that the untouched model could have written.

# %%
plain = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.dtype).to(found.device)
conversation = [{"role": "user", "content": "How are you today?"}]
inputs = tokenizer.apply_chat_template(
    conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(found.device)
start = inputs["input_ids"].shape[1]

def answer(net):
    """The answer, and its perplexity under the untouched model."""
    ids = net.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    with torch.inference_mode():
        log_probs = plain(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
    surprise = -log_probs.gather(1, ids[0, start:, None]).mean().item()
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True), torch.tensor(surprise).exp().item()


# %%
for name, net in {"untouched": plain, **loaded}.items():
    said, surprise = answer(net)
    print(f"{name}, perplexity {surprise:.1f}: {said}\n")
    if not found.origin.startswith("random"):  # random weights find nothing likely
        assert surprise < 15, f"{name} loaded without an error and talks nonsense"

# %% [markdown]
# ## Mistakes, and when you hear of them
#
# The check of the first cells against autoawq itself, on a single decoder layer, so that the wait is short here:

# %%
del plain, loaded, net
memory.release()
short = AutoAWQForCausalLM.from_pretrained(found.path, torch_dtype=found.fast)
short.model.model.layers = short.model.model.layers[:1]
widths = set(linear_layers(found.path).values())
wrong_group = next(size for size in (128, 96, 80) if any(width % size for width in widths))
good = dict(
    folder=found.path, bits=bits, group_size=group_size, samples=samples[:2], length=calibration_length)
mistakes = {
    f"group size {wrong_group}": dict(group_size=wrong_group),
    "3 bits": dict(bits=3),
    "no samples": dict(samples=[]),
    "one short sample": dict(samples=[samples[0][:50]]),
    "quantized already": dict(folder=folders["autoawq"]),
}


# %%
def outcome(action, folder):
    try:
        action()
        return "no error"
    except Exception as error:
        return first_line(error, folder) if str(error) else type(error).__name__

def quantize_one_layer(folder, bits, group_size, samples, length):
    with quietly():
        victim = copy.deepcopy(short) if folder == found.path else AutoAWQForCausalLM.from_pretrained(folder)
    config = {**quant_config, "w_bit": bits, "q_group_size": group_size}
    with quietly():
        victim.quantize(
            tokenizer, quant_config=config, calib_data=samples, max_calib_seq_len=length, apply_clip=False)


# %%
rows = []
for name, wrong in mistakes.items():
    said = [outcome(lambda: action(**(good | wrong)), folders["autoawq"])
            for action in (check_request, quantize_one_layer)]
    rows.append([name, *said])
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame(rows, columns=["mistake", "the check here, at once", "autoawq"]))
assert all(row[1].startswith("ValueError") for row in rows)

# %% [markdown]
# ## What the guides claim

# %%
from helpers import claims

awq_score = scores["awq"]
lost = f"rounded {floor.kl_divergence:.3f}; "
lost += f"{1 - awq_score.top1_agreement:.0%} of the top tokens change"
removed = f"1 % of the input channels in float removes {one_percent:.0%} of the KL; AWQ, all in 4 bits, "
removed += f"{1 - awq_score.kl_divergence / floor.kl_divergence:.0%}"
rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
doubled = len(tokenizer(rendered)["input_ids"]) - start
mistral = models.mistral_config()
layer_inputs = [mistral.hidden_size, mistral.intermediate_size]
divided = sum(number % 128 == 0 for number in layer_inputs) / len(layer_inputs)
own_loader = matrix.set_index(["checkpoint", "loader"]).loc[("autoawq", "autoawq")]

# %%
findings = [
    claims.finding("awq-one-percent", one_percent, text=removed),
    claims.finding("awq-quality", awq_score.kl_divergence, awq_score.kl_low, awq_score.kl_high, text=lost),
    claims.finding("awq-memory", reloaded["of bf16"].max()),
    claims.finding("awq-group-128", divided, computed_for="Mistral-7B"),
    claims.finding("awq-minutes", autoawq_used.seconds / 60),
    claims.finding("awq-from-quantized", int(own_loader.outcome == "loads"),
                   text=own_loader["kernel, or why not"][:80]),
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
# **1 (easy).** How many tokens does autoawq calibrate on, as released? It drops samples that are too long, joins the others and
# keeps whole blocks. Return the number of tokens in those blocks.

# %%
def tokens_used(samples, max_calib_seq_len=512):
    ...


# %%
def test_tokens(function):
    assert function([[1] * 300, [1] * 300], 512) == 512, "600 tokens hold one block of 512"
    assert function([[1] * 513, [1] * 512], 512) == 512, "a sample of 513 tokens is dropped, not cut"
    assert function([[1] * 100], 512) == 0, "less than one block is nothing"
    assert function([[1] * 64] * 20, 256) == 1280, "20 samples of 64 tokens are five blocks of 256"

exercises.check(tokens_used, test_tokens)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:
    def tokens_used(samples, max_calib_seq_len=512):
        kept = sum(len(sample) for sample in samples if len(sample) <= max_calib_seq_len)
        return kept // max_calib_seq_len * max_calib_seq_len

    exercises.require(tokens_used, test_tokens)


# %% [markdown]
# **2 (medium).** With one key/value head per query head, `v_proj`'s outputs are `o_proj`'s inputs, averaged by attention. Fold
# scales [width] between the two, in place: `v_proj` may have a bias. (With grouped heads, as here, autoawq leaves `o_proj` unscaled.)

# %%
def fold_values(v_proj, o_proj, scales):
    ...


# %%
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
# **3 (hard).** For a single Linear layer the search needs no tokens either. Return the mean squared error of its output for changed
# weights from `gram` = XᵀX / tokens [in, in] alone. (This is also GPTQ's Hessian, up to a factor.)

# %%
def output_error(weight, changed, gram):
    ...


# %%
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
# Three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("06_awq")

# %% [markdown]
# ## Takeaways
#
# 1. **Inputs tell which weights matter.** Channels chosen by their inputs beat as many chosen by weights or by chance. 1 % is no
#    threshold: the table above says what each share buys.
# 2. **AWQ is a scale per channel, found by a search and folded away.** A few lines give autoawq's scales and clipping, and the float
#    function stays as it is.
# 3. **Two libraries, one format.** autoawq needs a repair on a CPU; load either checkpoint with transformers or gptqmodel, and
#    measure quality and speed on your own machine.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% tags=["record"]
for method, used in [("awq", awq_used), ("autoawq", autoawq_used)]:
    records.write(
        output_dir, method=method, notebook="06_awq", found=found, windows=windows,
        bits_per_weight=8 * weight_bytes[method] / full.parameters, weight_bytes=weight_bytes[method],
        peak_memory_bytes=used.peak_vram if found.device == "cuda" else used.peak_ram,
        decode_tokens_per_s=fresh["decode tok/s"][method], quantize_seconds=used.seconds,
        scores=scores[method], in_domain=(in_domain, second[method]),
    )
repair.undo()
