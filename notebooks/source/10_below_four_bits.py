# %% [markdown]
# # 10 Below four bits
#
# Go from four bits to three and two, where methods part, and measure which idea is worth what.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Rotate a model so that its outliers are spread over all channels, and show that the rotated model computes the same
#    function.
# 2. Build HQQ and AutoRound from scratch, and measure what each idea is worth at 4, 3 and 2 bits under one protocol.
# 3. Spend a budget of bytes where it helps most, and say which of these formats an engine runs today.
#
# **Before you start:** [05 GPTQ](05_gptq.ipynb) for repaired errors, [03 Hybrid precision](03_hybrid_precision.ipynb)
# for sensitivity.

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
full = False
eval_tokens = 4096
group_size = 64
calibration_samples = 32
calibration_length = 128
autoround_iters = 20
layers_per_block = 5

# %% jupyter={"source_hidden": true}
import contextlib
import copy
import datetime
import gc
import io
import json
import logging
import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from torch.ao.quantization import quantize_dynamic
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from helpers import evaluation, exercises, figures, files, memory, models, records
from helpers.process import headless

# %% jupyter={"source_hidden": true}
figures.style()
transformers_logging.disable_progress_bar()
warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao.quantization says this in every call
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
pd.options.display.precision = 4

# %%
# Float32 copies of a 7B model need 28 GB each: with "auto" a GPU takes the small model too.
found = models.find("smollm2-offline" if model == "auto" and torch.cuda.is_available() else model, copies=5)
config = AutoConfig.from_pretrained(found.path)
if config.model_type not in ("llama", "mistral", "qwen2"):
    raise ValueError(f"this notebook rotates llama, mistral and qwen2 models, not {config.model_type}")
misfits = [width for width in (config.hidden_size, config.intermediate_size) if width % group_size]
if misfits:
    raise ValueError(f"group_size={group_size} does not divide the rows of {misfits} weights")
tokenizer = AutoTokenizer.from_pretrained(found.path)
trained = found.name.startswith(("SmolLM2", "Qwen"))  # what a random model does proves nothing
print(f"{found.name} on the {found.device.upper()}, {found.origin}")

# %%
windows = evaluation.windows(tokenizer, tokens=eval_tokens)  # four genres, in turn
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
reference = evaluation.reference(found, windows)
in_domain_reference = evaluation.reference(found, in_domain)
probe = windows[:4]  # a quick look, one window a genre

# %% [markdown]
# ## The idea: turn the axes before you round
#
# A group of weights or activations shares one scale. One large value, an **outlier**, stretches the scale, and the
# small values round to zero. Take four numbers, the first of them large. Multiply them with a **Hadamard matrix**: its
# entries are all 1 or -1, divided so that no length changes. Every new number is a mixture of all four, so the large
# value is spread:

# %%
signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
four_by_four = signs / 2
four = torch.tensor([8.0, 0.5, -0.7, 0.6])
assert torch.equal(four_by_four @ four_by_four.T, torch.eye(4)), "the axes must stay at right angles"
turned = four_by_four @ four

# %% [markdown]
# Now round both to 3 bits, with one scale each: the multiples -4 to 3 of a third of the largest magnitude. Turn the
# second result back.


# %%
def three_bits(values):
    """Four numbers on the multiples -4 ... 3 of one scale."""
    scale = values.abs().max() / 3
    return (values / scale).round().clamp(-4, 3) * scale


# %%
by_hand = pd.DataFrame(
    {
        "number": four,
        "rounded": three_bits(four),
        "turned": turned,
        "turned, rounded": three_bits(turned),
        "and turned back": four_by_four.T @ three_bits(turned),
    }
)
error_before = (three_bits(four) - four).norm()
error_after = (four_by_four.T @ three_bits(turned) - four).norm()
print(f"error without the rotation {error_before:.2f}, with it {error_after:.2f}")
by_hand.round(2)

# %% [markdown]
# Rotating is no free gain: it helps where one value is far above the others. Values without an outlier stay much the
# same.
#
# ### Sizes that are no power of two
#
# Hadamard matrices double: from one of size n follows one of size 2n. A model's sizes are 576 = 64 x 9, 1,536 = 512 x 3
# or 8,960 = 256 x 35. For the odd part we take a **Hartley matrix**: cosines plus sines, orthogonal for every size, and
# no entry is larger than 1.42 times the mean. The **Kronecker product** of both is orthogonal, too. Random signs come
# first, so that no regular pattern of the weights fits a column.


# %%
def hadamard(size):
    """Orthogonal [size, size] of entries +-1 / sqrt(size), for a power of two (Sylvester's construction)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


# %%
def hartley(size):
    """Orthogonal [size, size] of any size, entries at most sqrt(2 / size)."""
    at = torch.arange(size, dtype=torch.float64)
    angle = 2 * torch.pi * (at[:, None] * at % size) / size
    return (angle.cos() + angle.sin()) / size**0.5


# %%
def rotation(size, seed=0):
    """Orthogonal [size, size], float64: random signs, then a Hartley matrix (x) a Hadamard matrix."""
    power = size & -size  # the largest power of two that divides it
    flips = torch.randint(2, (size, 1), generator=torch.manual_seed(seed)).double() * 2 - 1
    return flips * torch.kron(hartley(size // power), hadamard(power))


# %%
def checked(size):
    """A row about the rotation of this size, looked at in some of its rows: all of them would take a minute."""
    turn, some = rotation(size), torch.linspace(0, size - 1, min(size, 64)).long()
    products = turn[some] @ turn.T
    products[torch.arange(len(some)), some] -= 1
    return {
        "power of two": size & -size,
        "odd part": size // (size & -size),
        "largest entry x sqrt(size)": turn[some].abs().max().item() * size**0.5,
        "distance from orthogonal": products.abs().max().item(),
    }


sizes = pd.DataFrame({size: checked(size) for size in (4, 576, 1536, 8960)}).T
assert sizes["distance from orthogonal"].max() < 1e-10
sizes

# %% [markdown]
# ## Rotate a whole model and keep its function
#
# Between the layers runs the **residual stream**: the embedding writes to it, every layer reads from it and adds to it,
# the head reads it. Turn all of them by the same rotation `R` and nothing changes
# ([QuaRot](https://arxiv.org/abs/2404.00456)). Three steps:
#
# 1. **Fold the norm's weights.** RMSNorm divides by a length, which no rotation changes, and then multiplies each
#    channel by a weight, which a rotation does not commute with. So that weight moves into the columns of the layers
#    that read: q, k, v, gate, up and the head.
# 2. **Untie the head.** In many models it shares the embedding's memory. The final norm's weight goes into the head
#    only, so it needs its own copy.
# 3. **Rotate.** Who reads gets `W R`, who writes (the embedding, o, down) gets `Rᵀ W`, a bias that is written gets `Rᵀ
#    b`.


# %%
@torch.no_grad()
def fold(norm, readers):
    """Move an RMSNorm's weight into the columns of the Linear layers that read its output."""
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1)


# %%
@torch.no_grad()
def rotate(net, seed=0):
    """A float32 copy of a Llama-shaped model with a rotated residual stream: the same function."""
    net = untied(net)
    turn = rotation(net.config.hidden_size, seed).float().to(net.device)
    fold(net.model.norm, [net.lm_head])
    for tensor in (net.model.embed_tokens.weight, net.lm_head.weight):
        tensor.copy_(tensor @ turn)
    for block in net.model.layers:
        rotate_block(block, turn)
    return net


# %%
@torch.no_grad()
def rotate_block(block, turn):
    attention, mlp = block.self_attn, block.mlp
    fold(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
    fold(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        reader.weight.copy_(reader.weight @ turn)  # its bias, if any, is added outside the stream
    for writer in (attention.o_proj, mlp.down_proj):
        writer.weight.copy_(turn.T @ writer.weight)
        if writer.bias is not None:
            writer.bias.copy_(writer.bias @ turn)


# %%
def untied(net):
    """A copy whose head has memory of its own."""
    copied = copy.deepcopy(net)
    copied.config.tie_word_embeddings = False
    copied.lm_head.weight = torch.nn.Parameter(copied.lm_head.weight.detach().clone())
    return copied


# %%
net = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).to(found.device).eval()
rotated_net = rotate(net)
with torch.inference_mode():
    expected = net(probe[:1].to(found.device)).logits.log_softmax(-1)
    gap = (rotated_net(probe[:1].to(found.device)).logits.log_softmax(-1) - expected).abs().max().item()
print(f"largest difference of a log-probability: {gap:.1e}")
assert gap < 1e-3, "the rotated model is another function"

# %% [markdown]
# ### The massive activation, before and after
#
# [01](01_ptq_dynamic_int8.ipynb) found a few channels whose values are thousands of times the usual ones. Here is the
# residual stream of a middle layer at its loudest token:


# %% jupyter={"source_hidden": true}
@torch.inference_mode()
def stream(net, ids):
    """The residual stream at the middle layer, float32 [tokens, channels]."""
    states = net.model(input_ids=ids.to(net.device), output_hidden_states=True, use_cache=False).hidden_states
    return states[len(states) // 2][0].float().cpu()


def peak(vector):
    """Largest magnitude over root mean square: 1 where all are alike, sqrt(n) where one alone is not 0."""
    return (vector.abs().max() / vector.square().mean().sqrt()).item()


# %%
plain_stream, rotated_stream = stream(net, probe[:1]), stream(rotated_net, probe[:1])
loudest = plain_stream.norm(dim=1).argmax().item()
before, after = plain_stream[loudest], rotated_stream[loudest]
share = (before.square().sum() / plain_stream.square().sum()).item()
print(f"token {loudest} has {share:.1%} of the squared length of all {len(plain_stream)} tokens")

# %%
spread = pd.DataFrame(
    [
        [name, vector.abs().max().item(), vector.abs().median().item(), peak(vector)]
        for name, vector in {"as trained": before, "rotated": after}.items()
    ],
    columns=["stream", "largest", "median", "peak (largest / RMS)"],
).set_index("stream")
assert peak(after) < peak(before) or not trained, "the rotation did not spread the outlier"

# %% jupyter={"source_hidden": true}
fig, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for ax, vector, name in zip(axes, (before, after), ("as trained", "rotated")):
    ax.plot(vector.abs(), ".", markersize=3, color=figures.PALETTE[0])
    ax.set(yscale="log", xlabel="channel", title=f"{name}: peak {peak(vector):.1f}", ylim=(1e-2, None))
axes[0].set_ylabel("|activation|")
figures.show(
    fig,
    alt=f"Magnitudes of the {len(before)} channels of the residual stream of {found.name} at token "
    f"{loudest}. As trained, the largest is {spread['largest'].iloc[0]:,.0f} and the median "
    f"{spread['median'].iloc[0]:.2f}. Rotated, they are {spread['largest'].iloc[1]:,.0f} and "
    f"{spread['median'].iloc[1]:.1f}: all channels carry the outlier.",
    table=spread.round(2),
)


# %% [markdown]
# ### The ruined INT8 model once more
#
# The most common INT8 call gives activations one scale per tensor and ruins this model
# ([01](01_ptq_dynamic_int8.ipynb)). How much does rotation alone repair? The input of `down` is not the residual
# stream, so folding does not reach it. It can be rotated while the model runs: the weight is rotated ahead of time, the
# activation in each forward pass. Engines have a fast Hadamard kernel for this; ours multiplies.


# %%
class Turned(torch.nn.Module):
    """A Linear whose inputs are rotated as they come; its weight was rotated to match."""

    def __init__(self, linear):
        super().__init__()
        turn = rotation(linear.in_features).float().to(linear.weight.device)
        self.register_buffer("turn", turn)
        self.linear = copy.deepcopy(linear)
        with torch.no_grad():
            self.linear.weight.copy_(linear.weight @ turn)

    def forward(self, x):
        return self.linear(x @ self.turn)


# %%
def turn_down(net):
    """The same model, with the inputs of every down projection rotated at run time; changes net."""
    for block in net.model.layers:
        block.mlp.down_proj = Turned(block.mlp.down_proj)
    return net


# %%
def ruined(net, inplace=False):
    """KL on the probe after the guides' call: int8, one scale per tensor of activations."""
    quantized = quantize_dynamic(net, {torch.nn.Linear}, dtype=torch.qint8, inplace=inplace)
    scores = evaluation.score(quantized, probe, reference)
    del net, quantized
    memory.release()
    return scores.kl_divergence


# %%
int8 = {}
if found.device == "cpu":  # torch's own int8 modules run there only
    int8["as trained"] = ruined(net)
    int8["residual stream rotated"] = ruined(rotated_net)
    int8["and the input of down, at run time"] = ruined(turn_down(copy.deepcopy(rotated_net)), inplace=True)
pd.Series(int8, name="KL").to_frame().round(3)


# %% [markdown]
# ## Rounding to 4, 3 and 2 bits
#
# Every method below gets the same grid: groups of 64 weights of a row, each with a 16-bit scale and a **zero point**
# (the code that means 0.0). So the bits per weight are `bits + (16 + bits) / 64`: 4.31, 3.30 and 2.28. Rounding to
# nearest on that grid is the floor:


# %%
def minmax(groups, bits):
    """Scale and zero point [..., 1] of groups [..., group_size]: from the smallest weight to the largest."""
    low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)  # a group of zeros too
    return scale, (-low / scale).round()


def codes_of(values, scale, zero, bits):
    return (values / scale + zero).round().clamp(0, 2**bits - 1)


# %%
def rounding(weight, bits, group_size=64, hessian=None):
    """weight [rows, columns] -> the quantized weight, in float32; the Hessian is not used."""
    groups = weight.unflatten(-1, (-1, group_size))
    scale, zero = minmax(groups, bits)
    return (scale * (codes_of(groups, scale, zero, bits) - zero)).flatten(-2)


# %% [markdown]
# ## HQQ: fit the grid to most of the weights
#
# The smallest and the largest weight set the grid of rounding, and they are the rarest weights. **HQQ** (half-quadratic
# quantization) looks for a grid that suits most weights and lets a few be far off ([the authors'
# description](https://mobiusml.github.io/hqq_blog/)). It needs no data. Split each weight's error into two parts: a
# sparse `outlier`, which costs its magnitude, and the rest, which costs its square times `beta / 2`. Each of the
# unknowns has a best value while the others stand still:
#
# - the **outlier**: shrink the error towards zero by `1 / beta`;
# - the **grid**: a straight line through the codes (least squares);
# - the **codes**: round to nearest.
#
# No step can make the objective larger. The published method fits the zero point alone, with a cost |e|^0.7 and a
# growing `beta`, so its steps are not exact and its objective can rise. Ours costs |e| and fits the scale too.


# %%
def shrink(error, by):
    return error.sign() * (error.abs() - by).clamp(min=0)


# %%
def line_through(codes, target, scale):
    """Scale and zero point with the smallest squared error of scale * (codes - zero) against target."""
    spread, middle = codes - codes.mean(-1, True), target.mean(-1, True)
    slope = (spread * (target - middle)).sum(-1, True) / spread.square().sum(-1, True).clamp(min=1e-9)
    scale = torch.where(slope > 1e-8, slope, scale)
    return scale, codes.mean(-1, True) - middle / scale


# %%
def hqq_grid(groups, bits, steps=8, objective=None):
    """Scale and zero point of groups [..., group_size]; `objective` collects its value after each step."""
    scale, zero = minmax(groups, bits)
    beta = 3 / groups.abs().mean().clamp(min=1e-8)
    codes = codes_of(groups, scale, zero, bits)
    for _ in range(steps):
        outlier = shrink(groups - scale * (codes - zero), 1 / beta)
        target = groups - outlier
        scale, zero = line_through(codes, target, scale)
        codes = codes_of(target, scale, zero, bits)
        if objective is not None:
            rest = target - scale * (codes - zero)
            total = outlier.abs().double().sum() + beta / 2 * rest.square().double().sum()
            objective.append(total.item())
    return scale, zero


# %%
def hqq(weight, bits, group_size=64, hessian=None):
    groups = weight.unflatten(-1, (-1, group_size))
    scale, zero = hqq_grid(groups, bits)
    return (scale * (codes_of(groups, scale, zero, bits) - zero)).flatten(-2)


# %%
middle = config.num_hidden_layers // 2
weight = net.model.layers[middle].mlp.up_proj.weight.detach()
objective = []
hqq_grid(weight.unflatten(-1, (-1, group_size)), 3, steps=20, objective=objective)
falls = [late <= early * (1 + 1e-6) for early, late in zip(objective, objective[1:])]
assert all(falls), "a step made the objective larger"
print(f"objective: {objective[0]:.1f} after 1 step, {objective[7]:.1f} after 8, {objective[-1]:.1f} after 20")


# %%
def weight_error(quantized):
    return ((quantized - weight).norm() / weight.norm()).item()


# %%
one_layer = pd.DataFrame(
    {
        f"{bits} bits": {
            "rounding": weight_error(rounding(weight, bits, group_size)),
            "HQQ": weight_error(hqq(weight, bits, group_size)),
        }
        for bits in (4, 3, 2)
    }
)
one_layer.round(4)


# %% [markdown]
# ## Text to calibrate on
#
# The next two methods look at inputs. As in [05](05_gptq.ipynb) they get the model's own text, sampled from its first
# token at temperature 1. What they need of it is one matrix a layer: `H = X Xᵀ`, the sum over all tokens of the
# products of two inputs. With it the error of a layer's output is known without running the layer: for an error `E` of
# the weight it is the trace of `E H Eᵀ`.


# %% jupyter={"source_hidden": true}
@torch.no_grad()
def own_text(net, samples, length, seed=0):
    """Token ids that the model samples from its first token on, int64 [samples, length]."""
    start = tokenizer.bos_token_id or net.config.bos_token_id
    start = start or tokenizer.convert_tokens_to_ids("<|endoftext|>")  # Qwen2 has no first token
    torch.manual_seed(seed)
    first = torch.full((samples, 1), start, device=net.device)
    ids = net.generate(
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
        pad_token_id=start,
    )
    return ids.cpu()


# %%
class Base:
    """A model to quantize: weights in float32, Hessians, and a copy in a fast dtype that is scored."""

    def __init__(self, net, calibration):
        self.net = copy.deepcopy(net).to(found.fast)
        inside = self.net.model.layers.named_modules()
        self.layers = {name: module for name, module in inside if isinstance(module, torch.nn.Linear)}
        self.weights = {name: net.model.layers.get_submodule(name).weight.detach() for name in self.layers}
        self.readers = {}  # {the first layer that reads an input: all layers that read it}
        for name in self.layers:
            self.readers.setdefault(reads_with(name), []).append(name)
        self.hessians = hessians(self, calibration)

    @torch.no_grad()
    def put(self, weights):
        """Write {layer: weight} into the copy that is scored."""
        for name, weight in weights.items():
            self.layers[name].weight.copy_(weight)


# %%
def reads_with(name):
    """The layer whose inputs this one shares: q for q, k, v and gate for gate, up."""
    for other, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        name = name.replace(other, first)
    return name


# %%
@torch.no_grad()
def hessians(base, windows):
    """{layer: X Xᵀ / tokens, float32 [columns, columns]} of the layers that read an input first."""
    sums, tokens = {}, windows.numel()

    def add(name):
        def hook(_, args):
            x = args[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x.T @ x / tokens

        return hook

    hooks = [base.layers[name].register_forward_pre_hook(add(name)) for name in base.readers]
    for part in windows.to(base.net.device).split(4):
        base.net.model(input_ids=part, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


# %%
calibration = own_text(copy.deepcopy(net).to(found.fast), calibration_samples, calibration_length)
plain, rotated = Base(net, calibration), Base(rotated_net, calibration)
print(f"{calibration.numel():,} tokens to calibrate on, the first of them:")
print(tokenizer.decode(calibration[0, 1:40]))

# %% [markdown]
# ## AutoRound: learn which way to round
#
# Rounding to nearest decides each weight alone. **AutoRound** ([Cheng et al. 2023](https://arxiv.org/abs/2309.05516))
# learns a **shift** for each weight, between -1/2 and 1/2 of a step, that is added before rounding: a shift of 0.4
# turns 2.3 into 3. It also learns how far the grid reaches (two factors of a group, 1 or less). Only the *sign* of the
# gradient is used: each shift moves by the same small step, and the steps shrink to zero. 100 steps of 1/100, 0.99/100,
# … add up to about 1/2, which is just what a shift needs. Rounding has no gradient, so its gradient is taken to be 1.


# %%
def straight(x):
    """Round, and pass the gradient on as it is."""
    return x + (x.round() - x).detach()


# %%
def learned_rounding(groups, shift, lower, upper, bits):
    """groups on the grid from lower * smallest to upper * largest, shifted before they are rounded."""
    low, high = lower * groups.amin(-1, True).clamp(max=0), upper * groups.amax(-1, True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero = straight(-low / scale)
    codes = straight(groups / scale + zero + shift).clamp(0, 2**bits - 1)
    return (scale * (codes - zero)).flatten(-2)


# %%
def autoround(weight, hessian, bits, group_size=64, steps=100, losses=None):
    """weight [rows, columns] -> the quantized weight with the smallest output error on the way."""
    groups, (best, lowest) = weight.unflatten(-1, (-1, group_size)), (None, float("inf"))
    shift, lower, upper = torch.zeros_like(groups), *torch.ones(2, *groups.shape[:-1], 1, device=weight.device)
    learned = [shift.requires_grad_(), lower.requires_grad_(), upper.requires_grad_()]
    for step in range(steps):
        quantized = learned_rounding(groups, *learned, bits)
        loss = ((quantized - weight) @ hessian * (quantized - weight)).sum()
        if loss < lowest:
            best, lowest = quantized.detach(), loss.item()
        if losses is not None:
            losses.append(loss.item())
        gradients = torch.autograd.grad(loss, learned)
        with torch.no_grad():
            for tensor, gradient, limits in zip(learned, gradients, ((-0.5, 0.5), (0.5, 1), (0.5, 1))):
                tensor.sub_((1 - step / steps) / steps * gradient.sign()).clamp_(*limits)
    return best


# %% [markdown]
# The first loss is that of rounding to nearest: no shift, the full grid. One layer, at 3 bits:

# %%
name = f"{middle}.mlp.up_proj"
hessian, losses = plain.hessians[reads_with(name)], []


def output_error(quantized):
    """Relative error of the layer's output on the calibration text."""
    off = quantized - weight
    return ((off @ hessian * off).sum() / (weight @ hessian * weight).sum()).sqrt().item()


# %%
learned = autoround(weight, hessian, 3, group_size, losses=losses)
rounded = rounding(weight, 3, group_size)
assert abs(losses[0] / ((rounded - weight) @ hessian * (rounded - weight)).sum().item() - 1) < 0.01
assert output_error(learned) < output_error(rounded), "AutoRound does not beat rounding on its own layer"

# %%
both = pd.DataFrame(
    [[weight_error(values), output_error(values)] for values in (rounded, learned)],
    index=["rounding", "AutoRound"],
    columns=["error of the weight", "error of the output"],
)
both.round(4)

# %% jupyter={"source_hidden": true}
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.plot(losses, color=figures.PALETTE[0])
kept = output_error(learned) / output_error(rounded)
ax.set(
    xlabel="step",
    ylabel="squared output error",
    ylim=(0, None),
    title=f"{len(losses)} signed steps cut the output error to {kept:.0%} of rounding's",
)
figures.show(
    fig,
    alt=f"Loss of AutoRound on {name} at 3 bits over {len(losses)} steps. It ends with an output error "
    f"of {output_error(learned):.3f}, where rounding has {output_error(rounded):.3f}.",
    table=pd.Series(losses, name="squared output error").rename_axis("step")[::20].to_frame(),
)


# %% [markdown]
# The output ends closer to the original. The weights need not: on SmolLM2-135M they end *further* away, as with GPTQ.
#
# ## GPTQ, once more
#
# [05](05_gptq.ipynb) explains it: round one column after the other, and let the columns that are still free repair each
# error. This is a short version: the loudest column comes first, each group's grid is fixed before the start, and the
# Hessians are those of the untouched model.


# %%
def ready_for_gptq(weight, hessian, bits, group_size, damp):
    """Weight, scale and zero point [columns, rows], loudest column first; Cholesky factor of the inverse; order."""
    grid = (x.expand(-1, -1, group_size).flatten(-2) for x in minmax(weight.unflatten(-1, (-1, group_size)), bits))
    order = hessian.diagonal().argsort(descending=True)
    H = hessian[order][:, order].clone()
    H.diagonal().add_(damp * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    factor = torch.linalg.cholesky(inverse, upper=True)
    # A column's weights must lie together in memory: that halves the time.
    return *(x.T[order].contiguous() for x in (weight, *grid)), factor, order


# %%
@torch.inference_mode()
def gptq(weight, bits, group_size=64, hessian=None, damp=0.1, blocksize=64):
    """weight [rows, columns], hessian [columns, columns] -> the quantized weight, in float32."""
    W, scale, zero, factor, order = ready_for_gptq(weight, hessian, bits, group_size, damp)
    Q, errors = torch.zeros_like(W), torch.zeros_like(W)
    for left in range(0, len(W), blocksize):
        right = min(left + blocksize, len(W))
        for at in range(left, right):
            Q[at] = scale[at] * (codes_of(W[at], scale[at], zero[at], bits) - zero[at])
            errors[at] = (W[at] - Q[at]) / factor[at, at]
            W[at:right] -= factor[at, at:right, None] * errors[at]
        W[right:] -= factor[left:right, right:].T @ errors[left:right]
    return Q[order.argsort()].T


# %%
repaired = gptq(weight, 3, group_size, hessian)
assert output_error(repaired) < output_error(rounded)
both.loc["GPTQ"] = [weight_error(repaired), output_error(repaired)]
both.round(4)


# %% [markdown]
# ## The table
#
# Each row quantizes every Linear layer of the decoder and leaves the embedding and the head in 16 bits. Layers that read
# one input (q, k and v; gate and up) are stacked and quantized together. Each row is scored on the four genres that no
# method has seen, with an interval, and on Python's documentation as a second text. **Write down first** which method you
# expect to lead at 4, at 3 and at 2 bits, and by how much.

# %%
quality, second, costs, grids = {}, {}, {}, {}


# %% jupyter={"source_hidden": true}
WITHOUT_DATA = ("rtn", "hqq", "nf4", "gguf", "ternary")
protocol = {"model": found.name, "group_size": group_size, "eval_tokens": eval_tokens}


# %% jupyter={"source_hidden": true}
def facts(row):
    """What is known of a row, as plain numbers."""
    scores, cost = quality[row], costs[row]
    said = {"bits per weight": grids[row], "KL": scores.kl_divergence, "low": scores.kl_low, "high": scores.kl_high}
    said |= {"same top-1": scores.top1_agreement, "KL, pydoc": second[row].kl_divergence}
    said |= {
        "seconds": cost.seconds if cost else None,
        "needs text": "mixed" in row or not row.startswith(WITHOUT_DATA),
    }
    return said | {"KL by window": scores.kl_by_window.tolist()}


# %% jupyter={"source_hidden": true}
def write_rows():
    """All rows so far, in the file that a run without `full` reads: a run that is stopped loses none."""
    run = protocol | {"device": records.device_name(found.device), "date": f"{datetime.date.today()}"}
    run |= {"calibration": [calibration_samples, calibration_length], "autoround_iters": autoround_iters}
    text = "".join(json.dumps(run | {"row": row} | facts(row)) + "\n" for row in quality)
    files.write_text(files.folder(output_dir) / "below_four_bits.jsonl", text)


# %%
def report(row, net, bits_per_weight, cost=None):
    """Score a model whose Linear layers are quantized, and keep the numbers under the row's name."""
    quality[row] = evaluation.score(net, windows, reference)
    second[row] = evaluation.score(net, in_domain, in_domain_reference)
    grids[row], costs[row] = bits_per_weight, cost
    scores = quality[row]
    print(
        f"{row:16} {bits_per_weight:.2f} bits: KL {scores.kl_divergence:.3f} "
        f"[{scores.kl_low:.3f}, {scores.kl_high:.3f}], same top-1 {scores.top1_agreement:.1%}"
    )
    if full:
        write_rows()


# %%
def grid_bits(bits, zero_bits=None):
    """Bits per weight; a group has a 16-bit scale and a zero point of `zero_bits` (default: as a code)."""
    return bits + (16 + (bits if zero_bits is None else zero_bits)) / group_size


# %%
def quantized_layers(base, quantize, bits):
    """{layer: quantized weight} of a whole model; layers that read one input are stacked and quantized together."""
    quantized = {}
    for first, layers in base.readers.items():
        stacked = torch.cat([base.weights[layer] for layer in layers])
        rows = [len(base.weights[layer]) for layer in layers]
        together = quantize(stacked, bits, group_size, base.hessians[first]).to(found.fast)
        quantized |= dict(zip(layers, together.split(rows)))
    return quantized


# %%
def row_of(row, base, quantize, bits, zero_bits=None):
    """Quantize a whole model, score it and put its weights back; returns the quantized weights in 16 bits."""
    with memory.track() as cost, torch.inference_mode():
        weights = quantized_layers(base, quantize, bits)
    base.put(weights)
    report(row, base.net, grid_bits(bits, zero_bits), cost)
    base.put(base.weights)
    return {layer: weight.bfloat16() for layer, weight in weights.items()}


# %%
for bits in (4, 3, 2):
    row_of(f"rtn-{bits}", plain, rounding, bits)
hqq_weights = {bits: row_of(f"hqq-{bits}", plain, hqq, bits, zero_bits=16) for bits in (4, 3, 2)}

# %%
for bits in (4, 3, 2):
    row_of(f"gptq-{bits}", plain, gptq, bits)

# %%
for bits in (4, 3, 2) if full else (3,):
    row_of(f"rtn-rotated-{bits}", rotated, rounding, bits)
    row_of(f"gptq-rotated-{bits}", rotated, gptq, bits)
    if full:
        row_of(f"hqq-rotated-{bits}", rotated, hqq, bits, zero_bits=16)

# %%
embedding_bytes = 2 * rotated_net.model.embed_tokens.weight.numel()
if not full:  # no other row needs the rotated model, and it takes more than a gigabyte
    rotated = rotated_net = None
    memory.release()

# %% [markdown]
# ### With `full=True`: AWQ, NF4 and the types of GGUF
#
# The table has three more families. **AWQ** ([06](06_awq.ipynb)) multiplies loud columns before rounding and divides after; each input
# finds its own exponent. **NF4** ([04](04_nf4_bitsandbytes.ipynb)) exists with 4 bits only. **GGUF**
# ([08](08_gguf_llama_cpp.ipynb)): a type whose block of 256 does not divide a row falls back to a 4-bit type, and the
# bits of the row show it.


# %% jupyter={"source_hidden": true}
def awq(weight, bits, group_size=64, hessian=None):
    """Rounding with columns scaled by loudness ** alpha, for the best of ten alphas."""
    loudness, best, lowest = hessian.diagonal().sqrt().clamp(min=1e-6), None, float("inf")
    for alpha in torch.arange(0, 1, 0.1).tolist():
        factor = loudness**alpha
        factor = factor / (factor.max() * factor.min()).sqrt()
        quantized = rounding(weight * factor, bits, group_size) / factor
        off = quantized - weight
        loss = (off @ hessian * off).sum().item()
        if loss < lowest:
            best, lowest = quantized, loss
    return best


# %% jupyter={"source_hidden": true}
def nf4(weight, *_):
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(packed, state).float()


# %% jupyter={"source_hidden": true}
def gguf_type(asked, columns):
    """The type that rows of this length can have: its own, or a 4-bit one in blocks of 32."""
    import gguf

    kind = gguf.GGMLQuantizationType[asked]
    fits = columns % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else gguf.GGMLQuantizationType.IQ4_NL


# %% jupyter={"source_hidden": true}
def in_gguf(asked):
    """A function that quantizes as GGUF's type does, without an importance matrix."""
    import gguf
    import libgguf

    def quantize(weight, *_):
        kind = gguf_type(asked, weight.shape[1])
        data = libgguf.quantize_rows(weight.cpu().numpy(), int(kind))
        return torch.from_numpy(gguf.dequantize(data, kind)).to(weight.device)

    return quantize


# %% jupyter={"source_hidden": true}
def gguf_bits(asked, weights):
    """Bits per weight of all layers together."""
    import gguf

    sizes = [(w.numel(), gguf.GGML_QUANT_SIZES[gguf_type(asked, w.shape[1])]) for w in weights.values()]
    return sum(count * 8 * size / block for count, (block, size) in sizes) / sum(count for count, _ in sizes)


# %% jupyter={"source_hidden": true}
def other_row(row, base, quantize, bits_per_weight):
    """As `row_of`, for a format with a grid of its own."""
    with memory.track() as cost, torch.inference_mode():
        weights = quantized_layers(base, quantize, None)
    base.put(weights)
    report(row, base.net, bits_per_weight, cost)
    base.put(base.weights)


# %%
if full:
    for bits in (4, 3, 2):
        row_of(f"awq-{bits}", plain, awq, bits)
        row_of(f"awq-rotated-{bits}", rotated, awq, bits)
    nf4_bits = 4 + 8 / 64 + 32 / (64 * 256)  # codes, 8-bit scales, and the scales of those
    other_row("nf4-linear-4", plain, nf4, nf4_bits)
    other_row("nf4-rotated-4", rotated, nf4, nf4_bits)
    for bits in (4, 3, 2):
        kind = f"Q{bits}_K"
        other_row(f"gguf-linear-{bits}", plain, in_gguf(kind), gguf_bits(kind, plain.weights))

# %% [markdown]
# ### AutoRound, the package
#
# `auto-round` tunes one decoder layer at a time on the layer's own outputs. Its defaults are 200 steps and 128 samples of
# 2,048 tokens. This run makes `autoround_iters` steps on the text above, so that it ends within minutes on a CPU. So few
# steps can be too few, as the larger model below shows:


# %% jupyter={"source_hidden": true}
def quietly():
    """Progress bars and log lines: shown in Jupyter, left out of a batch run."""
    stack = contextlib.ExitStack()
    if headless():
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


# %% jupyter={"source_hidden": true}
with quietly():
    from auto_round import AutoRound
logging.getLogger("autoround").setLevel(logging.ERROR)


# %%
def beginning_anywhere(rows):
    """Two thirds of each row, each from another token on: other text does not begin with this model's first token either."""
    length = rows.shape[1] * 2 // 3
    starts = [1 + 37 * number % (rows.shape[1] - length) for number in range(len(rows))]
    return torch.stack([row[start : start + length] for row, start in zip(rows, starts)])


# %%
def autorounded(net, bits):
    """The model, quantized by the package: plain Linear layers that hold the restored weights."""
    rows = beginning_anywhere(calibration)
    tuner = AutoRound(
        copy.deepcopy(net).to(found.fast),
        tokenizer=tokenizer,
        bits=bits,
        group_size=group_size,
        sym=False,
        iters=autoround_iters,  # the package's own default is 200
        dataset=list(rows.split(1)),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=8,
        enable_torch_compile=False,
        device_map=found.device,
    )
    return tuner.quantize()[0]


# %%
def autoround_row(row, net, bits):
    """As `row_of`, with the package."""
    gc.freeze()  # the package collects garbage several times a layer; what was there before need not be looked at
    with quietly(), memory.track() as cost:
        tuned = autorounded(net, bits)
    gc.unfreeze()
    tuned.to(found.device, found.fast)  # the package leaves it on the CPU
    report(row, tuned, grid_bits(bits), cost)
    del tuned
    memory.release()


# %%
for bits in (4, 3, 2) if full else (3,):
    autoround_row(f"autoround-{bits}", net, bits)
    if full:
        autoround_row(f"autoround-rotated-{bits}", rotated_net, bits)
print(f"{costs['autoround-3'].seconds:.0f} s for {autoround_iters} steps a layer")


# %% [markdown]
# ### The result


# %% jupyter={"source_hidden": true}
def shown(rows):
    """A table of rows {name: facts}."""
    table = pd.DataFrame.from_dict(rows, orient="index").drop(columns="KL by window")
    return table.round({"seconds": 0, "same top-1": 3}).round(3)


here = {row: facts(row) for row in quality}
shown(here)

# %% [markdown]
# `full=True` adds the other methods, all three widths of AutoRound and all of the rotated model, and writes every row to
# `below_four_bits.jsonl` in the output folder. Rows that your run left out and that we have measured lie in
# [full.jsonl](below_four_bits/full.jsonl), with the KL of every window and without times (our machine was busy):


# %% jupyter={"source_hidden": true}
def from_file(wanted, names):
    """{row: facts of these names} of the committed lines that were measured as `wanted` says."""
    text = (files.NOTEBOOKS / "below_four_bits" / "full.jsonl").read_text(encoding="utf-8")
    fitting = [line for line in map(json.loads, text.splitlines()) if wanted.items() <= line.items()]
    return {line["row"]: {name: line[name] for name in names} for line in fitting}


def is_drawn(row):
    """Whether a row is a point of the picture: mixed widths and three values are no line there."""
    return "mixed" not in row and row != "ternary"


# %% jupyter={"source_hidden": true}
committed = from_file(protocol, list(here["rtn-3"]))
left_out = {row: line for row, line in committed.items() if row not in here and is_drawn(row)}
shown(left_out) if left_out else "no full run with this model, group size and text is in the file"

# %%
everything = left_out | here
both_runs = [row for row in here if row in committed]
apart = [abs(here[row]["KL"] / committed[row]["KL"] - 1) for row in both_runs]
if both_runs:
    print(f"{len(both_runs)} rows are in both runs; their KLs differ by {max(apart):.1%} at most")


# %% jupyter={"source_hidden": true}
def as_lines(rows):
    """A table of rows {name: facts} for the picture: their bits, their method, the KL and its interval."""
    lines = pd.DataFrame.from_dict(rows, orient="index")[["bits per weight", "KL", "low", "high"]].astype(float)
    lines["method"] = [row.rsplit("-", 1)[0] for row in lines.index]  # the name without the bits at its end
    lines["bits"] = (lines["bits per weight"] - 0.25).round().astype(int)  # what it takes, not what its name says
    return lines


# %% jupyter={"source_hidden": true}
def best_of(lines):
    """{bits: the row with the lowest KL of those that take about 4, 3 and 2 bits}."""
    return {bits: lines[lines["bits"] == bits]["KL"].idxmin() for bits in (4, 3, 2)}


def in_words(lines, rows):
    """The KL of these rows, each with the bits that it takes."""
    return "; ".join(f"{row} with {lines['KL'][row]:.3f} at {lines['bits per weight'][row]:.2f} bits" for row in rows)


# %%
lines = as_lines(everything)
best = best_of(lines)
best

# %% jupyter={"source_hidden": true}
LOOKS = {"rtn": "o", "hqq": "s", "gptq": "D", "autoround": "^", "awq": "v", "nf4": "P", "gguf": "X"}
COLORS = dict(zip(LOOKS, [*figures.PALETTE, "black"]))


def draw_lines(ax, lines):
    """A line a method, with the intervals of its points and its name beside the legend's marker."""
    for method, part in lines.groupby("method", sort=False):
        base, part = method.split("-")[0], part.sort_values("bits per weight")
        reach = [part["KL"] - part["low"], part["high"] - part["KL"]]
        look = {"marker": LOOKS[base], "color": COLORS[base], "label": base}
        ax.errorbar(part["bits per weight"], part["KL"], reach, capsize=2, markersize=5, linewidth=1.2, **look)


# %% jupyter={"source_hidden": true}
def draw_panels(lines, title):
    """The figure of a model's rows in two panels: as trained, and with the residual stream rotated."""
    rotated_rows = lines["method"].str.contains("rotated")
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), sharex=True, sharey=True, layout="constrained")
    for ax, part, name in zip(axes, (lines[~rotated_rows], lines[rotated_rows]), ("as trained", "rotated")):
        draw_lines(ax, part)
        ax.set(yscale="log", title=name, xlabel="bits per weight, scales counted")
    axes[0].set_ylabel("KL, nats (less is better)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    fig.suptitle(title)
    return fig


# %% jupyter={"source_hidden": true}
title = f"At 3 bits {best[3]} is {lines['KL'][best[3]]:.2f} nats off, rounding {lines['KL']['rtn-3']:.2f}"
figures.show(
    draw_panels(lines, title),
    alt=f"KL divergence of {found.name} from the untouched model against bits per weight, a line a method, in two "
    f"panels: as trained, and with the residual stream rotated. The lowest: {in_words(lines, best.values())}.",
    table=lines.pivot_table(index="method", columns="bits", values="KL", sort=False).round(3),
)


# %% jupyter={"source_hidden": true}
def against(first, other):
    """KL of one row minus another's on the same windows, with the interval of that difference."""
    scores = [
        evaluation.Scores(math.nan, line["KL"], kl_by_window=np.array(line["KL by window"])) for line in (first, other)
    ]
    mean, low, high = evaluation.difference(*scores)
    word = "better" if high < 0 else "worse" if low > 0 else "not told apart"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] {word}"


# %% jupyter={"source_hidden": true}
def versus(pairs, rows):
    """{name: (first, other) for each of 4, 3, 2 bits} as a table of what is among the rows {name: facts}."""
    table = {name: {} for name in pairs}
    for name, (first, other) in pairs.items():
        for bits in (4, 3, 2):
            both = [rows.get(f"{method}-{bits}") for method in (first, other)]
            table[name][f"{bits} bits"] = against(*both) if all(both) else ""
    return pd.DataFrame(table).T


PAIRS = {f"{method} against rtn": (method, "rtn") for method in ("hqq", "gptq", "awq", "autoround")}
versus(PAIRS, everything)

# %%
TURNS = {f"{method}, rotated": (f"{method}-rotated", method) for method in ("rtn", "hqq", "gptq", "awq", "autoround")}
versus(TURNS, everything)

# %% [markdown]
# A mean can hide two kinds of windows, so we look at AutoRound's windows one by one:

# %%
by_window = pd.DataFrame({row: quality[row].kl_by_window for row in ("rtn-3", "autoround-3", "gptq-3")})
by_window.describe().loc[["min", "25%", "50%", "75%", "max"]].round(2)

# %%
better_on = (by_window["autoround-3"] < by_window["rtn-3"]).sum()
print(f"AutoRound is closer than rounding on {better_on} of {len(by_window)} windows")

# %% [markdown]
# ### Which rows AutoRound tunes on
#
# The package minimizes the squared error of a layer's output, and in this model the first position of a row has nearly
# all of the squared length (printed above). [autoround_study.py](below_four_bits/autoround_study.py) asks how rows should
# begin and how many there should be, with 20 steps and one sample of text:
#
# - 32 rows that all begin with the model's first token: KL 6.2 [4.6, 7.8], worse than rounding, from 1.6 to 12.9 a window;
# - 128 such rows: 1.00 [0.89, 1.15];
# - 32 rows that begin anywhere, as above: 0.95 [0.83, 1.12].
#
# More rows, or rows that begin differently, make the result stable here. The column `first_token` says how much of the
# first position's length tuning left, in the worst and in the best window. Rows that begin alike halve it in some window,
# also where the KL is good, so it is not the whole reason. More steps are measured on a larger model only (below), other
# samples not at all.

# %% jupyter={"source_hidden": true}
STUDY = files.NOTEBOOKS / "below_four_bits" / "autoround_study.jsonl"
study = [json.loads(line) for line in STUDY.read_text(encoding="utf-8").splitlines()]
tried = pd.DataFrame([line for line in study if line["model"] == found.name and line["group_size"] == group_size])
if len(tried):
    display(tried.drop(columns=["model", "device", "group_size", "seconds"]).round(2))
    for start, part in tried.groupby("start"):
        print(f"rows that begin {start}: KL {part['kl'].min():.2f} to {part['kl'].max():.2f}")

# %%
by_bits = {bits: quality[f"rtn-{bits}"].kl_divergence for bits in (4, 3, 2)}
if trained:
    assert by_bits[4] < by_bits[3] < by_bits[2], f"fewer bits should cost more: {by_bits}"
at_three = lines[lines["bits"] == 3]["KL"].sort_values()
at_three.round(3).to_frame()

# %% [markdown]
# ### The same on a larger model
#
# `full=True` ran on Qwen2.5-Coder-1.5B-Instruct too, in groups of 128, on one NVIDIA H200. The cells below read its 37 rows
# from [full.jsonl](below_four_bits/full.jsonl) and draw them; your run measures nothing here. The hollow triangle is from
# [the study](below_four_bits/autoround_study.jsonl): AutoRound with 200 steps on 128 rows, in place of 20 steps on 32.
# **Predict first:** does AutoRound beat rounding at 3 bits here as well?

# %% jupyter={"source_hidden": true}
LARGER = {"model": "Qwen2.5-Coder-1.5B-Instruct", "group_size": 128}
larger = from_file(LARGER | {"eval_tokens": 4096}, list(here["rtn-3"]))
larger_lines = as_lines({row: line for row, line in larger.items() if is_drawn(row)})
patient = next(line for line in study if LARGER.items() <= line.items() and line["steps"] == 200)
more_steps = {"bits per weight": larger["autoround-3"]["bits per weight"]}  # the same grid
more_steps |= {"KL": patient["kl"], "low": patient["low"], "high": patient["high"]}

# %% jupyter={"source_hidden": true}
nats = larger_lines["KL"].round(2)
finding = (
    f"AutoRound at {more_steps['bits per weight']:.2f} bits: {nats['autoround-3']} nats with 20 steps, "
    f"{more_steps['KL']:.2f} with 200 on more text; rounding {nats['rtn-3']}"
)
twin = pd.DataFrame.from_dict(larger | {"autoround-3, 200 steps": more_steps}, orient="index")
twin = twin[["bits per weight", "KL", "low", "high"]].astype(float).sort_values("KL")

# %% jupyter={"source_hidden": true}
fig, at = draw_panels(larger_lines, finding), (more_steps["bits per weight"], more_steps["KL"])
reach = [[more_steps["KL"] - more_steps["low"]], [more_steps["high"] - more_steps["KL"]]]
look = {"marker": LOOKS["autoround"], "color": COLORS["autoround"], "markerfacecolor": "white"}
fig.axes[0].errorbar(*at, reach, capsize=2, markersize=7, zorder=5, **look)
fig.axes[0].annotate("200 steps", at, (-7, -3), textcoords="offset points", ha="right", va="top", fontsize=9)
figures.show(
    fig,
    alt=f"KL by bits per weight of {LARGER['model']} on an NVIDIA H200, a line a method, as trained and rotated. "
    f"{finding}. The lowest: {in_words(larger_lines, best_of(larger_lines).values())}.",
    table=twin.round(3),
)

# %%
versus(PAIRS, larger)

# %%
versus(TURNS | {"nf4, rotated": ("nf4-rotated", "nf4-linear")}, larger)

# %% [markdown]
# Each number is a KL, with its interval behind it:
#
# - **At four bits** AWQ (0.078 [0.073, 0.083]) and GPTQ (0.077 [0.072, 0.083]) are near each other and a little ahead of
#   rounding (0.087 [0.083, 0.092]). NF4 beats both with 0.062 [0.059, 0.066]. On SmolLM2-135M both beat NF4.
# - **At three bits** rounding has 0.536 [0.505, 0.573], AWQ 0.461 [0.438, 0.487] and GPTQ 0.418 [0.390, 0.452]. On the
#   small model both nearly halve rounding's KL. HQQ loses to rounding here: 0.634 [0.583, 0.691].
# - **20 steps of AutoRound lose to rounding here:** 0.734 [0.674, 0.797]. On the small model they win. 200 steps on four
#   times the rows have 0.273 [0.254, 0.297], the lowest KL at 3.15 bits. Steps and rows changed together: which of them
#   it takes is not measured.
# - **Rotation helps GPTQ and hurts rounding,** as on the small model. At 3 bits GPTQ falls to 0.356 [0.332, 0.384], and
#   rounding rises to 0.760 [0.718, 0.809].
# - **The GGUF types lie lowest and take more bits.** Q4_K has 0.040 [0.038, 0.043] at 4.50 bits, Q3_K 0.218 [0.209,
#   0.227] at 3.44. This model was restored from a Q4_K_M file, and its channels were rescaled to remove that file's grid.
# - **At two bits** only Q2_K (1.046 [0.968, 1.124] at 2.62 bits) and AutoRound (3.443 [3.125, 3.854] at 2.14) stay below
#   5 nats.
#
# Do not carry a ranking from a small model to a large one, nor from 20 steps to 200.

# %% [markdown]
# ## Mixed precision: the cheaper way
#
# [03](03_hybrid_precision.ipynb) measured which layers quantization hurts. The same map, with HQQ's weights at 2, 3 and
# 4 bits: quantize one **unit** (one kind of input in a few neighbouring layers), leave the rest, and measure the KL on
# the calibration text.

# %%
KINDS = {"q_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up", "down_proj": "down"}


def unit_of(layer):
    """(kind, block of depth) of a layer such as "7.mlp.up_proj"."""
    return KINDS[reads_with(layer).split(".")[-1]], int(layer.split(".")[0]) // layers_per_block


# %%
units = {}
for layer in plain.layers:
    units.setdefault(unit_of(layer), []).append(layer)

map_text = calibration[:2].to(found.device)


# %%
@torch.inference_mode()
def log_probs():
    """float32 [windows, positions / 2, vocabulary] of the model as it is now."""
    return plain.net(input_ids=map_text, use_cache=False).logits[:, ::2].float().log_softmax(-1)


# %%
untouched = log_probs()
probabilities = untouched.exp()


def unit_cost(layers, bits):
    """KL with these layers at `bits` bits and all others untouched."""
    plain.put({layer: hqq_weights[bits][layer] for layer in layers})
    kl = ((untouched - log_probs()) * probabilities).sum(-1).mean().item()
    plain.put({layer: plain.weights[layer] for layer in layers})
    return kl


# %%
def unit_bytes(layers, bits):
    weights = sum(plain.weights[layer].numel() for layer in layers)
    return round(weights * grid_bits(bits, zero_bits=16) / 8)


options = [
    {bits: (unit_cost(layers, bits), unit_bytes(layers, bits)) for bits in (2, 3, 4)} for layers in units.values()
]

# %% jupyter={"source_hidden": true}
heat = pd.Series({unit: choices[2][0] for unit, choices in zip(units, options)}).unstack()
heat = heat.loc[list(KINDS.values())]
fig, ax = plt.subplots(figsize=(7, 2.6))
picture = ax.imshow(heat, aspect="auto", cmap="cividis")
ax.set(
    xlabel=f"depth, blocks of {layers_per_block} layers",
    xticks=range(heat.shape[1]),
    title=f"2 bits hurt most in {heat.stack().idxmax()[0]}, block {heat.stack().idxmax()[1]}",
)
ax.set_yticks(range(len(heat)), heat.index)
ax.grid(False)
fig.colorbar(picture, label="KL, nats")
figures.show(
    fig,
    alt=f"KL with one unit in 2 bits and the rest untouched. The largest is {heat.max().max():.3f} "
    f"({heat.stack().idxmax()[0]}, block {heat.stack().idxmax()[1]}), the median "
    f"{heat.stack().median():.3f}.",
    table=heat.round(4),
)


# %% [markdown]
# **Which bits for which unit?** This is a *knapsack*: choose one option a unit, so that the bytes fit and the sum of
# the costs is smallest. The number of different byte sums is small, so it can be solved exactly: keep the cheapest way
# to each sum, unit by unit.


# %%
def knapsack(options, budget):
    """One choice a unit, of [{choice: (cost, bytes)}], with the smallest total cost, or ValueError."""
    ways = {0: (0.0, ())}  # bytes spent: (cost, choices)
    for unit in options:
        longer = {}
        for spent, (cost, chosen) in ways.items():
            for choice, (extra, size) in unit.items():
                total = spent + size
                if total <= budget and (total not in longer or cost + extra < longer[total][0]):
                    longer[total] = (cost + extra, (*chosen, choice))
        ways = longer
    if not ways:
        raise ValueError(f"nothing fits into {budget:,} bytes")
    return min(ways.values())[1]


# %%
budget = sum(unit[3][1] for unit in options)  # what uniform 3 bits take
plan = dict(zip(units, knapsack(options, budget)))
spent = sum(unit[bits][1] for unit, bits in zip(options, plan.values()))
predicted = sum(unit[bits][0] for unit, bits in zip(options, plan.values()))
uniform = sum(unit[3][0] for unit in options)
assert spent <= budget and predicted <= uniform
print(f"{spent / 1e6:.1f} of {budget / 1e6:.1f} MB; the map's costs add up to {predicted:.3f}, uniform {uniform:.3f}")
pd.Series(plan).unstack().loc[list(KINDS.values())]

# %%
plain.put({layer: hqq_weights[plan[unit_of(layer)]][layer] for layer in plain.layers})
weight_count = sum(weight.numel() for weight in plain.weights.values())
report("hqq-mixed-3", plain.net, 8 * spent / weight_count)
plain.put(plain.weights)
mean, low, high = evaluation.difference(quality["hqq-mixed-3"], quality["hqq-3"])
print(f"hqq-mixed-3 against hqq-3: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")

# %% [markdown]
# Errors of many units do not simply add: compare the map's sum with the measured KL.
#
# ## Three values a weight
#
# **Ternary** weights are -1, 0 or 1 times a scale: log2(3) = 1.58 bits, and 1.83 with a 16-bit scale for 64. llama.cpp
# has two types for them:

# %% jupyter={"source_hidden": true}
import gguf

pd.DataFrame(
    {
        kind: {
            "block": gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0],
            "bits per weight": 8
            * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
            / gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0],
        }
        for kind in ("TQ1_0", "TQ2_0")
    }
).T


# %%
def ternary(weight, bits=None, group_size=64, hessian=None):
    """-1, 0 or 1 times a scale: codes by the mean magnitude, as BitNet; the scale by least squares."""
    groups = weight.unflatten(-1, (-1, group_size))
    mean = groups.abs().mean(-1, True).clamp(min=1e-8)
    codes = (groups / mean).round().clamp(-1, 1)
    scale = (groups * codes).sum(-1, True) / codes.square().sum(-1, True).clamp(min=1)
    return (scale * codes).flatten(-2)


# %%
plain.put(quantized_layers(plain, ternary, None))
report("ternary", plain.net, math.log2(3) + 16 / group_size)
plain.put(plain.weights)
print(
    f"perplexity {quality['ternary'].perplexity:,.0f}; untouched {reference.perplexity:.1f}; "
    f"all {config.vocab_size:,} tokens alike {config.vocab_size:,}"
)

# %% [markdown]
# Rounding a trained model to three values leaves nothing of it. [BitNet b1.58](https://arxiv.org/abs/2402.17764) trains
# from the first step with ternary weights in the forward pass, as [02](02_qat_fake_quant.ipynb) does with 4 bits. The
# ternary models that exist were trained so, on as much text as any other.
#
# ## What runs
#
# Everything above was *simulated*: the weights went to the grid and back, and the model computed in 16 bits. That
# measures quality. To be fast, an engine needs a kernel that reads the packed bits. What the packages of this course have
# for groups of integers with a zero point:

# %% jupyter={"source_hidden": true}
from auto_round.inference.backend import BackendInfos


def kernels(bits, device):
    """Kernels that auto-round may choose for asymmetric integer weights of this width on a device."""
    fits = []
    for name, info in BackendInfos.items():
        integers = "int" in (info.data_type or ())  # None: simulated, as here
        if integers and bits in info.bits and device in info.device and False in info.sym:
            fits.append(name)
    return sorted(fits)


# %% jupyter={"source_hidden": true}
by_width = pd.DataFrame(
    {f"{bits} bits": {device: ", ".join(kernels(bits, device)) for device in ("cpu", "cuda")} for bits in (4, 3, 2)}
).T
with pd.option_context("display.max_colwidth", None):
    display(by_width)

# %% [markdown]
# | format | who decodes it | run in this course |
# |---|---|---|
# | 4 bits in groups | fused kernels: Marlin, Machete, ExLlamaV2 | yes: [05](05_gptq.ipynb), [06](06_awq.ipynb) |
# | 3 bits in groups | CPU: restored weights, then a product; CUDA: the few above | quality only |
# | 2 bits in groups | more kernels than 3 bits: four codes fill a byte | quality only |
# | HQQ with a fitted zero point | its own kernels: integer formats cannot hold that zero point | quality only |
# | residual stream rotated | any engine: it is folded into ordinary weights | the fold, yes |
# | inputs of `down` rotated at run time | engines with a Hadamard kernel | quality only |
# | GGUF Q2_K, Q3_K | llama.cpp, if 256 divides the rows | Q2_K: [08](08_gguf_llama_cpp.ipynb) |
# | ternary TQ1_0, TQ2_0 | llama.cpp, if 256 divides the rows | no |
#
# Who exports: `quantize_and_save(folder, format="auto_round")` of `auto-round` packs 2, 3 and 4 bits, and transformers
# loads the folder where `auto-round` is installed.
#
# ## What the guides claim
#
# The five guides that this course grew out of stop at 4 bits: none of them says what happens below. So the table of
# this notebook is empty.

# %% jupyter={"source_hidden": true}
from helpers.publishing import claims

claims.write(output_dir, notebook="10_below_four_bits", found=found, findings=[])
claims.table(output_dir, "10_below_four_bits")


# %% [markdown]
# ## Exercises
#
# **1 (easy).** Predict, then measure: which group size brings 3-bit weights to exactly 3.5 bits, with a 16-bit scale
# and a zero point as wide as a code? Write the function that returns the bits per weight, one line, and try sizes.


# %%
def bits_with_scales(bits, group_size):
    """Bits per weight, scale and zero point counted."""
    ...


# %% jupyter={"source_hidden": true}
def test_bits(function):
    assert function(3, 64) is not None, "return a number"
    assert abs(function(3, 64) - 3) > 1e-9, "the scale and the zero point are missing"
    assert abs(function(3, 64) - 3.25) > 1e-9, "the zero point is missing: it has as many bits as a code"
    assert abs(function(3, 64) - 3.296875) < 1e-9, f"3 bits, groups of 64: 3.297, you have {function(3, 64)}"
    assert abs(function(2, 32) - 2.5625) < 1e-9, "2 bits, groups of 32: 2.5625. Are both arguments used?"
    assert abs(function(3, 38) - 3.5) < 1e-9


exercises.check(bits_with_scales, test_bits)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def bits_with_scales(bits, group_size):
        return bits + (16 + bits) / group_size

    exercises.require(bits_with_scales, test_bits)


# %% [markdown]
# **2 (medium).** A Hadamard matrix need not be stored. Multiply a vector of length `2**k` with it by additions alone:
# for steps 1, 2, 4, … replace each pair `(a, b)` of entries that lie one step apart by `(a + b, a - b)`. Divide by the
# square root of the length at the end. Six lines.


# %%
def fast_hadamard(vector):
    """The Hadamard matrix times a vector, by additions."""
    ...


# %% jupyter={"source_hidden": true}
def test_fast(function):
    x = torch.randn(64, dtype=torch.float64, generator=torch.manual_seed(0))
    kept, answer = x.clone(), function(x)
    assert answer is not None and answer.shape == x.shape, "return a vector of the same length"
    assert torch.equal(x, kept), "the vector that came in was changed: work on a copy"
    assert abs(answer.norm() / x.norm() - 1) < 1e-6, "the length changed: divide by sqrt(size)"
    assert torch.allclose(function(answer), x), "done twice it must give the vector back"
    assert torch.allclose(answer, hadamard(64) @ x), "the order of the entries differs from the matrix's"
    assert torch.allclose(function(x[:4]), hadamard(4) @ x[:4]), "does it work for length 4?"


exercises.check(fast_hadamard, test_fast)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def fast_hadamard(vector):
        step, x = 1, vector
        while step < len(vector):
            a, b = x.view(-1, 2, step).unbind(1)
            x = torch.stack([a + b, a - b], 1).flatten()
            step *= 2
        return x / len(vector) ** 0.5

    exercises.require(fast_hadamard, test_fast)


# %% [markdown]
# **3 (hard).** GPTQ on HQQ's grid. First predict: does it beat GPTQ on the grid from smallest to largest, at 2 bits?
# Return the quantized weight: the grid from `hqq_grid`, and column by column (in their own order) the repair of `gptq`.
# About ten lines; `factor` is the upper Cholesky factor.


# %%
def gptq_on_hqq(weight, bits, factor, group_size=64):
    """The quantized weight, of the shape of `weight`."""
    ...


# %% jupyter={"source_hidden": true}
def test_both(function):
    H = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    kept, answer = weight.clone(), function(weight, 2, factor, group_size)
    assert answer is not None and answer.shape == weight.shape, "return a tensor of the weight's shape"
    assert torch.equal(weight, kept), "the weight that came in was changed: work on a copy"
    levels = max(len(group.unique()) for group in answer[:50].unflatten(-1, (-1, group_size)).flatten(0, 1))
    assert levels <= 4, f"2 bits allow 4 levels a group, you have {levels}"
    fitted, repaired = output_error(hqq(weight, 2, group_size)), output_error(answer)
    assert repaired < 0.97 * fitted, f"output error {repaired:.3f}, HQQ alone {fitted:.3f}: pass errors on"
    print(
        f"output error: HQQ {fitted:.3f}, GPTQ {output_error(gptq(weight, 2, group_size, hessian)):.3f}, "
        f"both {repaired:.3f}"
    )


exercises.check(gptq_on_hqq, test_both)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def gptq_on_hqq(weight, bits, factor, group_size=64):
        scale, zero = hqq_grid(weight.unflatten(-1, (-1, group_size)), bits)
        W, Q = weight.clone(), torch.zeros_like(weight)
        for at in range(W.shape[1]):
            s, z = scale[:, at // group_size, 0], zero[:, at // group_size, 0]
            Q[:, at] = s * (codes_of(W[:, at], s, z, bits) - z)
            error = (W[:, at] - Q[:, at]) / factor[at, at]
            W[:, at:] -= error[:, None] * factor[at, at:]
        return Q

    exercises.require(gptq_on_hqq, test_both)

# %% [markdown]
# ## Quiz
#
# Three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("10_below_four_bits")

# %% [markdown]
# ## Takeaways
#
# 1. **A rotation spreads outliers and costs nothing where it can be folded.** The residual stream of SmolLM2-135M has
#    one channel 24 times the root mean square; rotated, the largest is 1.7 times. The INT8 model that the usual call
#    ruins (KL 1.90 on four windows) comes back to 1.29 with the residual stream rotated, and to 0.26 with the inputs of
#    `down` rotated as well. What repairs activations need not help weights: at 3 bits rotation helps GPTQ (to 0.69, and
#    0.36 on the 1.5B model) and hurts rounding (3.29 and 0.76).
# 2. **Below four bits the order changes, and it is not the same on two models.** At 3 bits on SmolLM2-135M, 20 steps of
#    AutoRound have 0.84, AWQ 0.85 and GPTQ 0.91, where rounding has 1.65. On the 1.5B model AWQ has 0.46, GPTQ 0.42 and
#    rounding 0.54. The 20 steps lose there with 0.73, and 200 steps on four times the rows lead with 0.27. A smaller
#    error of the weights is no promise: HQQ lowers it at every width, hardly helps the small model at 3 bits (1.58) and
#    hurts the larger one (0.63). At 2 bits AutoRound has 2.46 and 3.44, the other methods in groups more than 5. Q2_K
#    has 1.05 on the larger model, at 2.6 bits.
# 3. **Count the scales, compare at equal bytes, and ask who decodes it.** 3 bits in groups of 64 are 3.3 bits, 3.5 with
#    HQQ's zero point, and 3.44 as Q3_K. What is measured here is quality; speed needs a kernel for exactly that format.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% jupyter={"source_hidden": true}
parameters = memory.predict(config, bits=16).parameters


def bytes_of(row):
    """Bytes of the whole model: Linear layers on their grid, the rest in 16 bits, an untied head too."""
    untied_head = embedding_bytes if "rotated" in row and config.tie_word_embeddings else 0
    return round(weight_count * grids[row] / 8 + 2 * (parameters - weight_count) + untied_head)


# %% jupyter={"source_hidden": true}
def peak_bytes(cost):
    return (cost.peak_vram if found.device == "cuda" else cost.peak_ram) if cost else None


# %% jupyter={"source_hidden": true} tags=["record"]
for row, scores in quality.items():
    records.write(
        output_dir,
        method=row,
        notebook="10_below_four_bits",
        found=found,
        windows=windows,
        scores=scores,
        in_domain=(in_domain, second[row]),
        weight_bytes=bytes_of(row),
        bits_per_weight=8 * bytes_of(row) / parameters,
        peak_memory_bytes=peak_bytes(costs[row]),
        decode_tokens_per_s=None,  # simulated: the weights were restored to 16 bits
        quantize_seconds=costs[row].seconds if costs[row] else None,
    )
