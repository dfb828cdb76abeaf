# %% [markdown]
# # 02 Quantization-aware training
#
# Round the weights in every forward pass while training, and measure how much of what rounding destroyed comes back.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
# 1. Write fake quantization and the straight-through estimator yourself, and know what gradient they give.
# 2. Take the eager route (`prepare_qat`, train, `convert`) to a model that runs, saves and reloads, and see what it
#    costs.
# 3. Train 4-bit weights with torchao's `QATConfig`, and tell recovery from quantization apart from adaptation to the
#    text.
#
# **Before you start:** scale, zero point and groups are in [01](01_ptq_dynamic_int8.ipynb); perplexity and KL
# divergence are explained in [00](00_start_here.ipynb). Folded cells are plumbing and proofs; skip them on a first
# reading.

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
bits = 4
group_size = 64
steps = 14
batch_size = 2
train_context = 256
learning_rate = 1.3e-4
guide_steps = 3

# %%
import math
import tempfile
import time

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig
from transformers.utils import logging as transformers_logging

from helpers import checkpoints, evaluation, exercises, figures, memory, models, records, speed

torch.manual_seed(0)
figures.style()
transformers_logging.disable_progress_bar()

# %% [markdown]
# ## One weight, by hand
# A weight is 0.6. Its ruler has marks at the whole numbers, so the quantized model uses 1. The best value would be 0,
# and the loss is the square of the distance: 1. We want to train the weight until it rounds to 0.
#
# Plain backpropagation cannot. Rounding is a staircase: a small step of the weight changes nothing, so the derivative
# is zero, and the weight stays at 0.6 for ever. The **straight-through estimator** (Bengio et al.,
# [arXiv:1308.3432](https://arxiv.org/abs/1308.3432)) computes the loss with the rounded weight, and takes the
# derivative of rounding to be 1. The gradient is then 2 x (1 - 0) = 2. A step with a learning rate of 0.1 moves the
# weight to 0.4, which rounds to 0.


# %%
class Round(torch.autograd.Function):
    """Rounds; backward hands the gradient through as if it had not."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


# %%
def train_one(rounding, weight=0.6, steps=3, rate=0.1):
    """The weight before each step and after the last, for the loss (rounding(weight) - 0)²."""
    weight, path = torch.tensor(weight, requires_grad=True), []
    for _ in range(steps):
        path.append(weight.item())
        (slope,) = torch.autograd.grad(rounding(weight).square(), weight)
        weight = (weight - rate * slope).detach().requires_grad_()
    return [*path, weight.item()]


# %%
one_weight = pd.DataFrame({"torch.round": train_one(torch.round), "straight-through": train_one(Round.apply)})
one_weight.index.name = "steps"
assert one_weight.loc[1, "straight-through"] < 0.5 < one_weight.loc[1, "torch.round"]

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
sweep = torch.linspace(-1.5, 1.5, 901)
left.plot(sweep, sweep.round(), color=figures.PALETTE[0])
left.plot(sweep, sweep, "--", color=figures.PALETTE[1])
left.annotate("forward: the staircase", (-1.4, 1.2), color=figures.PALETTE[0])
left.annotate("backward: its slope is taken\nto be that of this line", (-0.35, -1.6), color=figures.PALETTE[1])
left.set(xlabel="weight", ylabel="rounded weight", title="Forward and backward differ")
for name, color in {"torch.round": 4, "straight-through": 1}.items():
    right.plot(one_weight.index, one_weight[name], "o-", color=figures.PALETTE[color])
    right.annotate(name, (3, one_weight[name].iloc[-1]), xytext=(-90, 6), textcoords="offset points")
right.axhline(0.5, color="#5B5B5B", linestyle=":")
right.set(xlabel="training steps", ylabel="weight", xticks=range(4), ylim=(0.3, 0.7))
right.set_title("Below 0.5 it rounds to the right mark")
figures.show(
    fig,
    table=one_weight,
    alt="Left: rounding as a staircase, and the straight line whose slope of 1 the backward pass uses. Right: "
    "under torch.round the weight stays at 0.6; with the straight-through estimator it moves to 0.4 in one step.",
)

# %% [markdown]
# ## Fake quantization
# Fake quantization rounds a weight to the integer grid and multiplies the scale back in, all in floating point. The
# forward pass sees exactly the weights that the quantized model will have; the optimizer keeps the unrounded ones.


# %%
def group_scales(weight, bits, group_size):
    """One symmetric scale per group: the largest |weight| is half a step more than the last positive code."""
    half_range = (2**bits - 1) / 2
    return weight.detach().reshape(-1, group_size).abs().amax(1, keepdim=True) / half_range


# %%
def fake_quantize(weight, scale, bits):
    """weight [out, in], scale [groups, 1]: weights on a grid of 2**bits codes, straight-through gradient."""
    groups = weight.reshape(len(scale), -1)
    codes = torch.clamp(Round.apply(groups * (1 / scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).reshape(weight.shape)


# %%
four = torch.tensor([[0.80, -0.30, 0.05, -0.70]])
scale = group_scales(four, 3, 4)
seen = [round(value, 2) for value in fake_quantize(four, scale, 3)[0].tolist()]
print(f"scale {scale.item():.3f}; weights in the forward pass: {seen}")

# %% [markdown]
# Scale: 0.80 / 3.5 = 0.229, and 3 bits have the codes -4 to 3. The largest weight, 0.80, would need the code 3.5; it
# is clipped to 3 and comes back as 0.69. Where a weight is clipped the gradient is 0: a small step would not change
# the result there.
#
# ## The model
# Training keeps four numbers of 4 bytes per weight: the weight, its gradient, and Adam's two averages. That decides
# which model can be trained here, long before quantization saves a byte.

# %%
found = models.find(model, copies=4)
parameters = memory.predict(AutoConfig.from_pretrained(found.path)).parameters
free = memory.free_vram() if found.device == "cuda" else memory.free_ram()
needed = 16 * parameters
print(f"{found.name}: {parameters / 1e6:,.0f} M parameters need {needed / 1e9:.1f} GB, {free / 1e9:.1f} free")
if needed > free and model != "auto":
    raise MemoryError(f"QAT of {found.name} needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
if needed > free:
    found = models.find("smollm2-offline")
    print(f"too large for QAT here: this notebook trains {found.name} instead")


# %% jupyter={"source_hidden": true}
def body(module, name):
    """Linear layers to quantize: all but the output head, which shares its weight with the embedding."""
    return isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")


# %% jupyter={"source_hidden": true}
def check(net, bits, group_size):
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be a whole number from 2 to 8, not {bits!r}")
    widths = {name: module.in_features for name, module in net.named_modules() if body(module, name)}
    if not widths:
        raise ValueError(f"{type(net).__name__} has no Linear layers to quantize")
    fitting = [size for size in (8, 16, 32, 64, 128, 256, 512) if all(n % size == 0 for n in widths.values())]
    for name, width in widths.items():
        if group_size < 2 or width % group_size:
            raise ValueError(
                f"group_size={group_size} does not divide the {width} inputs of {name}; "
                f"these divide every layer: {fitting}"
            )


# %%
def cut(text, context):
    """Token ids of a text in windows, int64 [n, context]; a text shorter than one window is an error."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0].long()
    if len(ids) < context:
        raise ValueError(f"the text has {len(ids)} tokens, less than one window of {context}: give more")
    return ids[: len(ids) // context * context].view(-1, context)


# %%
def load():
    return AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)


# %%
tokenizer = AutoTokenizer.from_pretrained(found.path)
net = load()
check(net, bits, group_size)
training = cut(evaluation.text("training", "pydoc"), train_context)
print(f"{training.numel():,} training tokens in {len(training)} windows of {train_context}")

# %% [markdown]
# The two functions above must give what the libraries give. On one real layer torchao's fake quantizer and torch's
# own operator are equal to the last bit, forward and backward. torchao, like the function above, treats the scale as
# a constant in the backward pass.

# %%
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

layer_name, layer = next((name, module) for name, module in net.named_modules() if body(module, name))
weight_dtype = getattr(torch, f"int{bits}")
library = FakeQuantizerBase.from_config(IntxFakeQuantizeConfig(weight_dtype, group_size=group_size))
weight = layer.weight.detach().clone().requires_grad_()
twin = layer.weight.detach().clone().requires_grad_()
upstream = torch.randn_like(weight)
scale = group_scales(weight, bits, group_size)
ours, theirs = fake_quantize(weight, scale, bits), library(twin)
ours.backward(upstream)
theirs.backward(upstream)
assert torch.equal(ours, theirs), "fake-quantized weights differ from torchao's"
assert torch.equal(weight.grad, twin.grad), "straight-through gradient differs from torchao's"

# %%
low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
zeros = torch.zeros(len(scale), dtype=torch.int32)
native = torch.fake_quantize_per_channel_affine(
    layer.weight.detach().reshape(-1, group_size), scale.flatten(), zeros, 0, low, high
)
assert torch.equal(native.reshape(ours.shape), ours), "fake-quantized weights differ from torch's"
blocked = (weight.grad == 0).float().mean().item()
print(f"{layer_name} {tuple(weight.shape)}: equal to torchao and torch")
print(f"{blocked:.2%} of the weights are clipped and get no gradient")

# %% [markdown]
# The picture shows one group of that layer. The last code reaches 7 steps up, and the largest weight of the group may be
# 7.5 steps away: where it is positive, it is clipped and gets no gradient. That is the price of using all 16 codes
# symmetrically.

# %%
group = weight.detach().reshape(-1, group_size)[0]
sweep = (torch.linspace(-1.15, 1.15, 1201) * group.abs().max()).requires_grad_()
stairs = fake_quantize(sweep[None], scale[:1], bits)[0]
stairs.sum().backward()
edges = {"scale": scale[0].item(), "smallest code": low, "largest code": high}
edges = pd.DataFrame({**edges, "gradient inside": 1.0, "gradient beyond": 0.0}, index=["first group"])

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.plot(sweep.detach(), stairs.detach(), label="fake-quantized")
left.plot(group, ours.detach().reshape(-1, group_size)[0], "o", markersize=3, label="this group's weights")
left.set(xlabel="weight", ylabel="weight in the forward pass")
left.legend(fontsize=8)
right.plot(sweep.detach(), sweep.grad, color=figures.PALETTE[1])
right.set(xlabel="weight", ylabel="gradient passed back", ylim=(-0.1, 1.1))
alt = f"Left: weights become a staircase of {2**bits} steps. Right: the gradient passed back: 1 inside the range, 0 beyond."
figures.show(fig, table=edges, alt=alt)
del net, layer
memory.release()

# %% [markdown]
# Is that gradient right? The appendix compares it with finite differences: it is exact for everything but the
# rounding.
#
# ## What to train towards
# Two objectives share one loop below:
# - **cross-entropy**: predict the next token of the training text. It also rewards learning that text, quantized or
#   not.
# - **distillation**: match the next-token distribution of the untouched model. Its loss is zero for the untouched
#   model, so there is nothing to gain but what quantization took.
#
# The training text is Python's documentation. The evaluation text is of four other genres, written for this course:
# what the model learns about the training's genre does not count there. Other topics of the documentation, the
# held-out windows, are only for watching the training and for the second number.

# %%
windows = evaluation.windows(tokenizer, tokens=eval_tokens)  # four genres that no training sees
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
judges = max(1, len(windows) // 2)  # windows for comparing; the recorded model gets all of them
teacher = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.fast).to(found.device).eval()
held_out = evaluation.windows(tokenizer, "calibration", 512, source="pydoc").to(found.device)

with torch.no_grad():
    held_out_expected = teacher(held_out, use_cache=False).logits

# %% [markdown]
# Distillation compares two distributions over the whole vocabulary at every position. The logits are the largest
# tensor here, so we compute the loss in slices of 16 positions and keep only its gradient. For a KL divergence that
# is the difference of the two distributions.


# %%
class Divergence(torch.autograd.Function):
    """Mean KL(expected || model) in nats per token; both [tokens, vocabulary] before the softmax."""

    @staticmethod
    def forward(ctx, logits, expected):
        total, gradient = 0.0, torch.empty_like(logits)
        for wanted, given, out in zip(expected.split(16), logits.split(16), gradient.split(16)):
            p, q = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
            probability = p.exp()
            total += (probability * (p - q)).sum()
            out.copy_((q.exp() - probability) / len(logits))
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None


# %%
student, expected = torch.randn(100, 50, requires_grad=True), torch.randn(100, 50)
loss = Divergence.apply(student, expected)
usual = F.kl_div(student.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean")
assert torch.allclose(loss, usual), "not the KL divergence that torch computes"
gradients = [torch.autograd.grad(value, student)[0] for value in (loss, usual)]
assert torch.allclose(*gradients, atol=1e-7), "not its gradient"


# %%
def distillation(logits, batch):
    with torch.no_grad():
        expected = teacher(batch, use_cache=False).logits
    return Divergence.apply(logits.flatten(0, 1), expected.flatten(0, 1))


# %%
def cross_entropy(logits, batch):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


# %%
@torch.no_grad()
def held_out_kl(net):
    logits = net(held_out, use_cache=False).logits
    return Divergence.apply(logits.flatten(0, 1), held_out_expected.flatten(0, 1)).item()


# %% [markdown]
# bf16 autocast pays only where the processor multiplies bf16 in hardware. One matrix product tells. Models that are
# there for comparison only are scored under autocast too.


# %%
def seconds_of(dtype):
    a, b = (torch.randn(1024, 1024, device=found.device).to(dtype) for _ in range(2))
    a @ b
    start = time.perf_counter()
    for _ in range(5):
        (a @ b).sum().item()
    return time.perf_counter() - start


# %%
fp32_seconds, bf16_seconds = seconds_of(torch.float32), seconds_of(torch.bfloat16)
autocast = bf16_seconds < fp32_seconds
print(f"bf16 is {fp32_seconds / bf16_seconds:.1f} times as fast as fp32, autocast: {autocast}")


# %%
def measure(net, count=None, fast=False, batch_size=4):
    """Scores on the evaluation windows, or on the first `count` of them; `fast` scores under autocast."""
    reference = evaluation.reference(found, windows)
    with torch.autocast(found.device, torch.bfloat16, enabled=autocast and fast):
        return evaluation.score(net, windows[:count], reference, batch_size)


# %% [markdown]
# ## The eager route
# These are the guide's lines for QAT; only the names of the model and of the training loop are ours. The first two
# calls work, the third does not. (One layer of the model shows it.)

# %%
import warnings

from torch.ao.quantization import QuantWrapper, convert, get_default_qat_qconfig, prepare_qat

warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch announces torchao as successor
warnings.filterwarnings("ignore", category=UserWarning, module="torch.ao")


# %%
def one_layer():
    net = load()
    net.model.layers = net.model.layers[:1]
    return net.train()


# %%
def message(problem):
    return f"{type(problem).__name__}: {problem}".split(". ")[0]


# %%
model_of_the_guide, convert_error = one_layer(), ""
model_of_the_guide.qconfig = get_default_qat_qconfig("fbgemm")
qat_model = prepare_qat(model_of_the_guide)
try:
    final_model = convert(qat_model.eval())
except AssertionError as problem:
    convert_error = str(problem)
print("convert:", convert_error or "works")

# %% [markdown]
# One `qconfig` on the model reaches every module that can be quantized, the embedding included, and asks for 8-bit
# *activations*. An embedding has token ids for input, so `convert` refuses it. Taking it out (`qconfig = None`), and
# the head that shares its weight, lets `convert` pass. Then the forward pass fails:

# %%
net, forward_error = one_layer(), ""
net.qconfig = get_default_qat_qconfig("fbgemm")
net.model.embed_tokens.qconfig = net.lm_head.qconfig = None
qat_model = prepare_qat(net)
with torch.no_grad():
    qat_model(training[:1, :32])
try:
    convert(qat_model.eval(), inplace=True)(training[:1, :32])
except NotImplementedError as problem:
    forward_error = message(problem)
print("forward:", forward_error or "works")
del net, qat_model, model_of_the_guide
memory.release()

# %% [markdown]
# A quantized Linear takes a quantized tensor, and everything around it in this model (norms, attention, residual sum)
# hands it floats. `QuantWrapper` puts a quantize step before and a dequantize step after each Linear.


# %%
def wrap(net, swap):
    for name, module in list(net.named_modules()):
        if body(module, name):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, swap(module, name))
    return net


# %%
net = wrap(load(), lambda module, name: QuantWrapper(module))
net.qconfig = get_default_qat_qconfig("fbgemm")
net.model.embed_tokens.qconfig = net.lm_head.qconfig = None
net.model.embed_tokens.weight.requires_grad_(False)
qat_model = prepare_qat(net.train(), inplace=True)
print(qat_model.model.layers[0].mlp.down_proj.module.activation_post_process)

# %%
teacher.cpu()
weights = [p for p in qat_model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(weights, lr=5e-5, weight_decay=0.0, fused=True)
eager_losses = []
for batch in tqdm(training[:guide_steps, :128].split(1), desc="eager QAT", disable=None):
    loss = distillation(qat_model(batch, use_cache=False).logits, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    eager_losses.append(loss.item())
print("KL per batch:", " ".join(f"{value:.2f}" for value in eager_losses))
del optimizer, weights, loss
memory.release()

# %%
final_model = convert(qat_model.eval(), inplace=True)
print(final_model.model.layers[0].mlp.down_proj)
few = 4
eager = measure(final_model, few)
print(
    f"eager int8 QAT on the first {few} windows: perplexity {eager.perplexity:.1f}, "
    f"KL {eager.kl_divergence:.2f}, top-1 {eager.top1_agreement:.1%}"
)

# %% [markdown]
# The model runs, and it is poor: a KL of 2.4, where rounding to 4 bits costs 0.5 below. Each activation tensor gets
# one scale with 7 bits, in and out of every layer, and a few outlier channels take most of that range
# ([01](01_ptq_dynamic_int8.ipynb) shows them). The loss fell over three batches, but these are different batches, so
# that shows nothing yet. We did not train long enough to see where it converges.
#
# Saving needs care too: the weights sit in packed objects, which neither `save_pretrained` nor safetensors accept.

# %%
save_error = ""
try:
    with tempfile.TemporaryDirectory() as scratch:
        final_model.save_pretrained(scratch)
except Exception as problem:
    save_error = f"{type(problem).__name__}: {problem}"
print("save_pretrained:", save_error[:160] or "works")

# %% [markdown]
# Integer codes, scales and zero points are plain tensors. They go into safetensors, and `set_weight_bias` packs them
# again. transformers does not know these tensors, so `save_own_format` writes a config.json that plain
# `from_pretrained` refuses, with words that name the function to use. An ordinary config.json would give random
# weights and a warning.

# %% jupyter={"source_hidden": true}
from torch.ao.nn import quantized as nnq


# %% jupyter={"source_hidden": true}
def unpack(net):
    """Tensors of an eager model: codes, scales and zero points of each layer, and all that stayed float."""
    float_endings = ["norm.weight", "embed_tokens.weight"]
    float_endings += [] if net.config.tie_word_embeddings else ["lm_head.weight"]
    tensors = {name: value for name, value in net.state_dict().items() if name.endswith(tuple(float_endings))}
    for name, module in net.named_modules():
        if isinstance(module, nnq.Linear):
            packed = module.weight()
            tensors[f"{name}.codes"] = packed.int_repr()
            tensors[f"{name}.scales"] = packed.q_per_channel_scales()
            tensors[f"{name}.zero_points"] = packed.q_per_channel_zero_points()
            tensors[f"{name}.output"] = torch.tensor([module.scale, module.zero_point], dtype=torch.float64)
            if module.bias() is not None:
                tensors[f"{name}.bias"] = module.bias().detach()
        if isinstance(module, nnq.Quantize):
            step = [module.scale.item(), module.zero_point.item()]
            tensors[f"{name}.input"] = torch.tensor(step, dtype=torch.float64)
    return tensors


# %% jupyter={"source_hidden": true}
def save(tensors, method, loader, metadata=None):
    """Tensors, config and tokenizer as the checkpoint of a method; bytes of the weights on disk."""
    with checkpoints.writing(output_dir, method) as scratch:
        tokenizer.save_pretrained(scratch)
        config = AutoConfig.from_pretrained(found.path)
        loader = f"{loader}() in notebook 02_qat_fake_quant.ipynb"
        return checkpoints.save_own_format(scratch, tensors, config, loader, metadata)


# %% jupyter={"source_hidden": true}
eager_bytes = save(unpack(final_model), "qat-int8-eager", "load_eager")
print(f"saved {eager_bytes / 1e6:.0f} MB")

# %% [markdown]
# The next cells stand on their own, for a process that only wants to use the model.

# %% jupyter={"source_hidden": true} tags=["reload"]
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights


def eager_layer(tensors, name):
    codes, scales, zeros = (tensors[f"{name}.module.{part}"] for part in ("codes", "scales", "zero_points"))
    scale_in, zero_in = tensors[f"{name}.quant.input"].tolist()
    scale_out, zero_out = tensors[f"{name}.module.output"].tolist()
    bias = tensors.get(f"{name}.module.bias")
    linear = nnq.Linear(codes.shape[1], codes.shape[0], bias_=bias is not None)
    linear.set_weight_bias(torch._make_per_channel_quantized_tensor(codes, scales, zeros, 0), bias)
    linear.scale, linear.zero_point = scale_out, int(zero_out)
    return torch.nn.Sequential(nnq.Quantize(scale_in, int(zero_in), torch.quint8), linear, nnq.DeQuantize())


# %% jupyter={"source_hidden": true} tags=["reload"]
def load_eager(folder):
    tensors = load_file(folder / "quantized.safetensors")
    config = AutoConfig.from_pretrained(folder / "base_config.json")
    with no_init_weights():  # every one of them comes from the file
        net = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    net.load_state_dict(tensors, strict=False)  # embedding and norms
    net.tie_weights()
    for name in [key.removesuffix(".module.codes") for key in tensors if key.endswith(".module.codes")]:
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, eager_layer(tensors, name))
    return net.eval()


# %%
reloaded = load_eager(checkpoints.folder(output_dir, "qat-int8-eager"))
with torch.inference_mode():
    same = torch.equal(final_model(windows[:1, :128]).logits, reloaded(windows[:1, :128]).logits)
assert same, "the reloaded eager model gives other logits"
prompt = tokenizer("The for statement is used to", return_tensors="pt")
answer = reloaded.generate(**prompt, max_new_tokens=20, do_sample=False)
print("bit for bit the same after reload;", repr(tokenizer.decode(answer[0])))
del net, qat_model, final_model, reloaded
memory.release()

# %% [markdown]
# ## 4-bit weights with torchao
# torchao's recipe leaves activations alone and puts one scale on each group of weights. First we make the baseline
# that training has to beat: the same configuration, applied at once.

# %%
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

base = IntxWeightOnlyConfig(weight_dtype=weight_dtype, granularity=PerGroup(group_size))
net = load().to(found.device)
quantize_(net, base, filter_fn=body)
held_out_rtn = held_out_kl(net)
scores = {"round to nearest": measure(net, judges, fast=True)}
print(scores["round to nearest"])

# %% [markdown]
# We score it under autocast, on the first half of the evaluation text, as all models below. The next cell prints what
# autocast costs in accuracy.

# %%
blur = abs(measure(net, few, fast=True).kl_divergence - measure(net, few).kl_divergence)
print(f"under autocast its KL differs by {blur:.4f} on {few} windows")
assert blur < 0.02, "autocast is too coarse to score with"
del net
memory.release()

# %% [markdown]
# One loop serves all runs. It takes the same windows in the same order, with AdamW, warm-up and cosine decay, and
# clips gradients to norm 1. The embedding stays as it is, because it is not quantized. Under autocast the matrix products are in bf16;
# weights, gradients and optimizer stay in fp32. Activation checkpointing keeps one activation per layer and computes
# the rest again: it is slower and needs less memory. The layers that have memory to spare go without it.


# %%
def batches():
    """The training windows of all steps, in the same order for every run."""
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    order = order.repeat(1 + steps * batch_size // len(training))[: steps * batch_size]
    return [training[rows].to(found.device) for rows in order.split(batch_size)]


# %%
def prepare(net, full_layers):
    """Freeze the embedding, and keep the activations of every `full_layers`-th layer only (1: of all)."""
    net.get_input_embeddings().weight.requires_grad_(False)
    net.train()
    if full_layers > 1:
        net.activation_checkpointing_enable()
        for layer in net.model.layers[::full_layers]:
            layer.gradient_checkpointing = False
    return [p for p in net.parameters() if p.requires_grad]


# %%
def train(net, batches, objective, watch, rate, autocast, label, full_layers=3):
    """Train `net`; loss, gradient norm and (every 7th step) watch(net) as a table."""
    weights, total = prepare(net, full_layers), len(batches)
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    cosine = dict(total_steps=total, pct_start=0.15, cycle_momentum=False)
    schedule, history = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, **cosine), []
    for step, batch in enumerate(tqdm(batches, desc=label, disable=None)):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
            watched = watch(net) if step % 7 == 0 else None
            loss = objective(net(batch, use_cache=False).logits, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        history.append([step, loss.item(), norm.item(), watched])
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        history.append([total, None, None, watch(net)])
    return pd.DataFrame(history, columns=["step", "loss", "gradient norm", "held-out KL"])


# %%
def run(net, objective, label, full_layers=3):
    """The loop above with this notebook's settings."""
    return train(net, batches(), objective, held_out_kl, learning_rate, autocast, label, full_layers)


# %% [markdown]
# `step="prepare"` swaps each Linear for one that fake-quantizes its weight in the forward pass.

# %%
from torchao.quantization.qat import QATConfig

teacher.to(found.device)
with memory.track() as used:
    net = load().to(found.device)
    quantize_(net, QATConfig(base, step="prepare"), filter_fn=body)
    print(net.model.layers[0].mlp.down_proj)
    curves = {"QAT, distillation": run(net, distillation, "QAT, distillation")}
seen_tokens = steps * batch_size * train_context
print(f"{steps} steps, {seen_tokens:,} tokens, {used.seconds:.0f} s, peak {used.peak_ram / 1e9:.2f} GB")

# %% [markdown]
# `step="convert"` swaps back and quantizes for real. It must change nothing: training already saw these weights.

# %%
trained = net.get_submodule(layer_name)
seen = trained.weight_fake_quantizer(trained.weight).detach()
started = time.perf_counter()
quantize_(net, QATConfig(base, step="convert"))
quantize_seconds = used.seconds + time.perf_counter() - started
converted = net.get_submodule(layer_name).weight
assert torch.equal(converted.dequantize(), seen), "the converted weight is not the one that was trained"
codes = converted.qdata
print(f"{type(converted).__name__}, codes {codes.dtype} from {codes.min()} to {codes.max()}")

# %%
memory.release()
scores["QAT, distillation"] = measure(net, judges, fast=True)
print(scores["QAT, distillation"])

# %% [markdown]
# ### What training moved
# Two things changed: some weights crossed a rounding boundary, and the largest weight of a group moved its scale a
# little.


# %%
def moved(old, module):
    """What training changed in one Linear; old: its weight before [out, in]."""
    scale = group_scales(old, bits, group_size)
    step = scale.expand(-1, group_size).reshape(old.shape)
    before, after = fake_quantize(old, scale, bits), module.weight.dequantize().cpu()
    new_scale = module.weight.scale.detach().cpu().reshape(scale.shape)
    return {
        "scale changed by": ((new_scale - scale) / scale).abs().mean().item(),
        "moved by a step": ((after - before).abs() > step / 2).float().mean().item(),
        "error rounded, steps": ((before - old) / step).abs().mean().item(),
        "error trained, steps": ((after - old) / step).abs().mean().item(),
    }


# %%
memory.release()
original = dict(load().named_modules())
movement = []
for name, module in net.named_modules():
    if body(module, name):
        change = moved(original[name].weight.detach(), module)
        movement.append({"kind": name.split(".")[-1], **change})

# %%
movement = pd.DataFrame(movement).groupby("kind").mean()
worse = movement["error trained, steps"].mean() > movement["error rounded, steps"].mean()
rounded_kl, trained_kl = scores["round to nearest"].kl_divergence, scores["QAT, distillation"].kl_divergence
print(
    f"{movement['moved by a step'].mean():.1%} of the weights moved by a step. Each weight alone lies "
    f"{'further from' if worse else 'closer to'} its original value than after rounding, "
    f"while the KL went from {rounded_kl:.3f} to {trained_kl:.3f}."
)
del original, module
memory.release()
movement.round(4)

# %% [markdown]
# Training changed 0.7 % of the codes, and no weight came closer to its original value. It moved the few codes whose
# errors add up at the layers' outputs.

# %% [markdown]
# ## Save, reload
# What was trained in fp32 is stored in bf16: the embeddings did not change and lose nothing, scales and norms are
# rounded. torchao holds 4-bit codes in bytes while it computes on a CPU. On disk two codes share a byte, so that the
# file has the size that "4 bits" promises (3 bits are stored in 4).

# %% jupyter={"source_hidden": true}
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict


# %% jupyter={"source_hidden": true}
def pack(codes):
    """int8 codes of at most 4 bits [out, in] to uint8 [out, in / 2]."""
    pairs = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


# %% jupyter={"source_hidden": true}
tied = {"lm_head.weight"} if net.config.tie_word_embeddings else set()
state = {name: value.detach().cpu().to(torch.bfloat16) for name, value in net.state_dict().items() if name not in tied}
tensors, metadata = flatten_tensor_state_dict(state)
for name in tensors:
    if name.endswith("qdata") and bits <= 4:
        tensors[name] = pack(tensors[name])

# %%
tensors = {name: value.contiguous() for name, value in tensors.items()}
stored_bytes = save(tensors, f"qat-int{bits}", "load_quantized", metadata)
bits_per_weight = 8 * stored_bytes / parameters
print(f"{stored_bytes / 1e6:.0f} MB, {bits_per_weight:.2f} bits per weight, embeddings and scales counted")

# %% [markdown]
# And back, again in cells that stand on their own. The record is measured on the model that comes back.

# %% jupyter={"source_hidden": true} tags=["reload"]
import torch
from safetensors import safe_open
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from transformers import AutoConfig, AutoModelForCausalLM


def restore(value):
    """Two codes per byte to one; all other tensors stay as they are."""
    if value.dtype != torch.uint8:
        return value
    return torch.stack([value & 15, value >> 4], -1).flatten(-2).to(torch.int8) - 8


# %% jupyter={"source_hidden": true} tags=["reload"]
def load_quantized(folder, device="cpu"):
    with safe_open(folder / "quantized.safetensors", "pt") as file:
        tensors, metadata = {name: restore(file.get_tensor(name)) for name in file.keys()}, file.metadata()
    state, _ = unflatten_tensor_state_dict(tensors, metadata)
    config = AutoConfig.from_pretrained(folder / "base_config.json")
    with no_init_weights():  # every one of them comes from the file
        net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    net.load_state_dict(state, strict=False, assign=True)
    net.tie_weights()
    return net.to(device).eval()


# %%
reloaded = load_quantized(checkpoints.folder(output_dir, f"qat-int{bits}"), found.device)
back = {name: value.cpu().dequantize() for name, value in reloaded.state_dict().items()}
for name, value in state.items():
    assert torch.equal(value.dequantize(), back[name]), f"{name} came back changed"
del back

# %%
final, decode = measure(reloaded, batch_size=8), speed.decode(reloaded, new_tokens=8, runs=2)
second = evaluation.score(reloaded, in_domain, evaluation.reference(found, in_domain), batch_size=8)
print(
    f"all windows: KL {final.kl_divergence:.3f} [{final.kl_low:.3f}, {final.kl_high:.3f}]; pydoc: "
    f"{second.kl_divergence:.3f}; {memory.weight_bytes(reloaded) / 1e6:.0f} MB in memory"
)
print(f"decode {decode}: on a CPU torchao unpacks every layer in every pass")

# %%
chat = [{"role": "user", "content": "What is a list in Python?"}]
question = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = reloaded.generate(**question.to(found.device), max_new_tokens=24, do_sample=False)
reply = tokenizer.decode(answer[0, question.input_ids.shape[1] :], skip_special_tokens=True)
print("all weights bit for bit the same after reload;", repr(reply))
del net, reloaded, state, tensors, converted, trained, seen, codes
memory.release()

# %% [markdown]
# ## The same steps with cross-entropy, and without quantization
# The fp32 model fine-tuned on the same windows shows what the text alone does. Rounded afterwards, it shows what
# happens to someone who fine-tunes first and quantizes later. All runs share one learning rate, which was chosen for
# distillation: with less (try `5e-5`) cross-entropy drifts less. It was chosen for SmolLM2-135M. On Qwen2.5-Coder-1.5B
# it is too high: training made that model worse ([the GPU page](gpu/README.md#the-notebooks-on-a-gpu)). No lower rate
# was tried there to its end. **Predict first:** which run ends with the lowest perplexity, and which with the lowest
# KL?

# %%
del teacher
net = load().to(found.device)
quantize_(net, QATConfig(base, step="prepare"), filter_fn=body)
curves["QAT, cross-entropy"] = run(net, cross_entropy, "QAT, cross-entropy", full_layers=2)
quantize_(net, QATConfig(base, step="convert"))
scores["QAT, cross-entropy"] = measure(net, judges, fast=True)
del net
memory.release()

# %%
net = load().to(found.device)
# without rounded copies of the weights it fits in memory as it is
curves["fp32, cross-entropy"] = run(net, cross_entropy, "fp32, cross-entropy", full_layers=1)
scores["fp32, fine-tuned"] = measure(net, judges, fast=True)
quantize_(net, base, filter_fn=body)
scores["fp32, fine-tuned, then rounded"] = measure(net, judges, fast=True)
del net
memory.release()

# %%
colors = {"QAT, distillation": 0, "QAT, cross-entropy": 1, "fp32, cross-entropy": 4, "fp32, fine-tuned": 4}
colors |= {"round to nearest": 3, "fp32": 2, "fp32, fine-tuned, then rounded": 5}


def draw_curve(panel, name, column):
    points = curves[name][["step", column]].dropna()
    panel.plot(points["step"], points[column], "o-", markersize=3, color=figures.PALETTE[colors[name]], label=name)
    panel.set(xlabel="step", ylabel=column)


# %%
fig, panels = plt.subplots(1, 3, figsize=(12, 3.4))
draw_curve(panels[0], "QAT, distillation", "loss")
for name in ("QAT, cross-entropy", "fp32, cross-entropy"):
    draw_curve(panels[1], name, "loss")
for name in curves:
    draw_curve(panels[2], name, "held-out KL")
for panel, title in zip(panels, ("distillation: KL, nats", "cross-entropy, nats", "KL on held-out pydoc")):
    panel.set_title(title)
panels[2].axhline(held_out_rtn, color=figures.PALETTE[3], linestyle=":", label="round to nearest")
panels[2].legend(fontsize=8)
fig.tight_layout()
watch = pd.DataFrame({name: curve.set_index("step")["held-out KL"].dropna() for name, curve in curves.items()})
last = watch.iloc[-1].round(3)
figures.show(
    fig,
    table=watch.round(3),
    alt="Three panels over the steps: the loss of distillation, the losses with cross-entropy, and the KL on "
    f"held-out text, which ends at {last.iloc[0]} with distillation and {last.iloc[1]} with cross-entropy.",
)

# %% [markdown]
# ## Recovery, and what only looks like it
# Recovered is the share of round-to-nearest's KL divergence from the untouched fp32 model that training took back.
# The fine-tuned fp32 model never met a quantizer: its KL is pure adaptation to the text.

# %%
lost = scores["round to nearest"].kl_divergence
table = pd.DataFrame({name: score.summary() for name, score in scores.items()}).T
table["recovered"] = 1 - table["kl_divergence"] / lost
table.loc["fp32, fine-tuned", "recovered"] = math.nan
table.loc["fp32"] = measure(load().to(found.device), judges, fast=True).summary()
table = table.loc[
    [
        "fp32",
        "round to nearest",
        "QAT, cross-entropy",
        "QAT, distillation",
        "fp32, fine-tuned",
        "fp32, fine-tuned, then rounded",
    ]
]
table.round(3)

# %%
recovered = table.loc["QAT, distillation", "recovered"]
also = table.loc["QAT, cross-entropy", "recovered"]
at_home = 1 - watch["QAT, distillation"].iloc[-1] / held_out_rtn
print(
    f"{bits} bits: distillation recovers {recovered:.0%} of the lost KL, cross-entropy {also:.0%}, "
    "on other genres; "
    f"on the genre of the training text, distillation recovers {at_home:.0%}"
)
gained = evaluation.difference(scores["QAT, distillation"], scores["round to nearest"])
print("KL after distillation minus KL of rounding: {:+.3f} [{:+.3f}, {:+.3f}]".format(*gained))
if found.name.startswith("SmolLM2") and bits == 4 and steps >= 14:  # the learning rate was chosen for it
    assert gained[2] < 0, "no recovery on genres that were not trained on"
nll = table["perplexity"].astype(float).map(math.log)
gap = nll["fp32, fine-tuned, then rounded"] - nll["fp32, fine-tuned"]
closed = 1 - (nll["QAT, cross-entropy"] - nll["fp32, fine-tuned"]) / gap
print(f"against its fine-tuned fp32 twin, cross-entropy closes {closed:.0%} of the gap that rounding opens")

# %% [markdown]
# Distillation took back 25 % of the KL that rounding cost, on genres that it never saw, and 46 % on the genre it was
# trained on. A number on the training's genre alone would have been nearly twice too good. Cross-entropy took back
# half as much on the other genres.
#
# Perplexity alone can crown the wrong model. The fine-tuned fp32 model has the lowest perplexity of the table, below
# the untouched model's, and its predictions moved away by a KL of 0.055, without any quantization.

# %%
fig, axis = plt.subplots(figsize=(7, 3.8))
for name, row in table.iterrows():
    at = (row["perplexity"], row["kl_divergence"])
    axis.plot(*at, "o", color=figures.PALETTE[colors[name]], markersize=9)
    axis.annotate(name, at, xytext=(6, 5), textcoords="offset points", fontsize=9)
axis.set(xlabel="perplexity on other genres", ylabel="KL from the untouched model")
axis.set_title("Training recovers a part; fine-tuning moves away too")
axis.margins(x=0.25, y=0.15)
distilled, crossed = table.loc["QAT, distillation"], table.loc["QAT, cross-entropy"]
said = [f"{name}: perplexity {row['perplexity']:.1f}, KL {row['kl_divergence']:.2f}" for name, row in table.iterrows()]
figures.show(
    fig,
    table=table[["perplexity", "kl_divergence"]].astype(float).round(3),
    alt=f"Perplexity against KL of six models. {'; '.join(said)}.",
)

# %% [markdown]
# ## When to use QAT
# We need one more number for that: what plain rounding costs at 8 bits.

# %%
net = load().to(found.device)
eight = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(group_size))
quantize_(net, eight, filter_fn=body)
int8 = measure(net, few)
del net
mistral = MistralConfig(
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
mistral_gb = 16 * memory.predict(mistral).parameters / 1e9

# %%
int8_cost = f"rounding costs a KL of {int8.kl_divergence:.4f}"
int4_gain = f"rounding costs {lost:.2f}; {quantize_seconds:.0f} s of distillation bring back {recovered:.0%}"
two_objectives = f"KL {trained_kl:.2f} distilled, {crossed['kl_divergence']:.2f} with cross-entropy"
twins = f"perplexity x {math.exp(gap):.2f} rounded later, x {math.exp((1 - closed) * gap):.2f} in training"
seven_billion = f"{mistral_gb:.0f} GB for weights, gradients and Adam"
eager_cost = f"KL {eager.kl_divergence:.1f} after {guide_steps} steps of QAT"

# %%
advice = [
    ["8-bit weights", int8_cost, "round, do not train"],
    [f"{bits}-bit weights", int4_gain, "calibrate first (05 and 06); train if that is not enough"],
    ["the model must stay what it is", two_objectives, "distil from the untouched model"],
    ["you fine-tune anyway", twins, "fake-quantize while fine-tuning"],
    ["7 billion parameters", seven_billion, "train adapters on 4-bit weights instead (07)"],
    ["one activation scale per tensor", eager_cost, "a scale per token (01)"],
]
pd.options.display.max_colwidth = None
pd.DataFrame(advice, columns=["situation", "numbers of this run", "advice"])

# %% [markdown]
# **On a 24 GB GPU with Mistral-7B** full QAT does not fit: weights, gradients and Adam's averages take 116 GB. A
# QLoRA step in Mistral-7B's shape took 5.5 GB with 512 tokens, measured on an H100 with torch held to 16 GB
# ([figures](gpu/README.md)); [07](07_qlora.ipynb) shows how.
#
# ## Appendix: is that gradient right?
# Finite differences give the answer, in float64. On the staircase itself they are zero: moving a weight by a hair
# changes nothing. Hold the rounding error of each weight fixed instead. Then everything but the rounding (clipping,
# scale, matrix product, loss) must match the gradient of the straight-through estimator.

# %% jupyter={"source_hidden": true}
layer = load().get_submodule(layer_name)
weight64 = layer.weight.detach()[:8].double()
steps_of = group_scales(weight64, bits, group_size)
inputs, target = torch.randn(32, weight64.shape[1]).double(), torch.randn(32, 8).double()
position = weight64.reshape(len(steps_of), -1) * (1 / steps_of)
error = position.round() - position  # held fixed below


# %% jupyter={"source_hidden": true}
def loss_of(quantized):
    return ((inputs @ quantized.T - target) ** 2).mean()


# %% jupyter={"source_hidden": true}
def without_rounding(w):
    codes = torch.clamp(w.reshape(len(steps_of), -1) * (1 / steps_of) + error, low, high)
    return (codes * steps_of).reshape(w.shape)


# %% jupyter={"source_hidden": true}
def difference(function, w, index, h=1e-6):
    plus, minus = w.clone().flatten(), w.clone().flatten()
    plus[index] += h
    minus[index] -= h
    return ((loss_of(function(plus.view_as(w))) - loss_of(function(minus.view_as(w)))) / (2 * h)).item()


# %% jupyter={"source_hidden": true}
leaf = weight64.clone().requires_grad_()
loss_of(fake_quantize(leaf, steps_of, bits)).backward()
codes = position.round().flatten()
inside, beyond = ((codes > low) & (codes < high)).nonzero().flatten(), (codes > high).nonzero().flatten()
# The outermost codes are left out: there the slope jumps.
chosen = inside[torch.randperm(len(inside))[:60]].tolist() + beyond[:20].tolist()
smooth = torch.tensor([difference(without_rounding, weight64, i) for i in chosen])
staircase = torch.tensor([difference(lambda w: fake_quantize(w, steps_of, bits), weight64, i) for i in chosen])

# %% jupyter={"source_hidden": true}
straight_through = leaf.grad.flatten()[chosen].float()
worst = (smooth - straight_through).abs().max().item()
assert torch.allclose(smooth, straight_through, rtol=1e-4, atol=1e-7), f"gradient off by {worst}"
assert staircase.abs().median() == 0, "a staircase should be flat"
flat = (staircase == 0).float().mean().item()
print(f"{len(chosen)} weights, some of them clipped: largest gap to finite differences {worst:.1e}")
print(f"on the staircase itself {flat:.0%} of the finite differences are exactly 0")
del layer
memory.release()

# %% [markdown]
# ### Bad input fails at once
# A wrong setting should stop with a sentence, not after minutes of training. The checks ran when the model was
# loaded. Here they meet bad input.

# %% jupyter={"source_hidden": true}
empty = torch.nn.Embedding(4, 4)
attempts = {"9 bits": lambda: check(load(), 9, 64), "groups of 100": lambda: check(load(), 4, 100)}
attempts |= {"no Linear layers": lambda: check(empty, 4, 64), "no text": lambda: cut("", train_context)}
attempts["short text"] = lambda: cut("Too short.", train_context)
for name, attempt in attempts.items():
    try:
        attempt()
        raise AssertionError(f"{name} went through")
    except ValueError as error:
        print(f"{name:18} {error}")
memory.release()

# %% [markdown]
# ## What the guides claim

# %%
from helpers.publishing import claims

rounded_score, trained_score = scores["round to nearest"], scores["QAT, distillation"]
gain = evaluation.difference(trained_score, rounded_score)  # below zero: training lowered the KL
regained, least, most = (-nats / rounded_score.kl_divergence for nats in (gain[0], gain[2], gain[1]))
losses = f"trains; KL per batch {eager_losses[0]:.2f} to {eager_losses[-1]:.2f} in {guide_steps} steps"

# %%
findings = [
    claims.finding("qat-better-4", *gain, text=f"at {bits} bits: {rounded_kl:.3f} rounded, {trained_kl:.3f} trained"),
    claims.finding("qat-for-int8", int8.kl_divergence, int8.kl_low, int8.kl_high),
    claims.finding("qat-prepare", int(all(map(math.isfinite, eager_losses))), text=losses),
    claims.finding("qat-convert", int(not convert_error), text=convert_error),
    claims.finding("qat-save", int(not save_error), text=save_error[:80]),
    claims.finding("qat-small-data", regained, least, most, text=f"after {seen_tokens:,} tokens"),
    claims.finding("qat-24gb", mistral_gb, computed_for="Mistral-7B"),
]
claims.write(output_dir, notebook="02_qat_fake_quant", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "02_qat_fake_quant"))

# %% [markdown]
# ## Exercises
#
# **1 (easy). Predict, then measure.** AdamW moves a weight by about the learning rate per step at most, so only
# weights close to a rounding boundary can change their code. The boundaries lie halfway between two codes. Note a
# number first: which share of the weights can the 14 steps of this notebook reach? The table above says which share
# moved. Then write the share (two lines); ignore the two ends of the range.


# %%
def within_reach(weight, scale, distance):
    """weight [out, in], scale [groups, 1]: share of weights less than `distance` from a rounding boundary."""
    ...


# %%
def test_reach(function):
    ladder, one = torch.tensor([[0.0, 0.4, 0.6, 1.0, 1.45, -0.52, -0.9, 2.3]]), torch.ones(1, 1)
    half = function(2 * ladder, 2 * one, 0.25)
    assert math.isclose(half, 0.5, abs_tol=1e-6), "distance is in the weight's own unit, not in steps"
    near = function(ladder, one, 0.11)
    assert math.isclose(near, 0.5, abs_tol=1e-6), "0.4, 0.6, 1.45 and -0.52 are within 0.11 of a half"
    every = function(ladder.repeat(3, 1), torch.ones(3, 1), 10.0)
    assert math.isclose(every, 1.0), "ten steps reach everything"


exercises.check(within_reach, test_reach)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def within_reach(weight, scale, distance):
        position = weight.reshape(len(scale), -1) / scale
        return ((0.5 - (position - position.round()).abs()) * scale < distance).float().mean().item()

    exercises.require(within_reach, test_reach)
    first = load().get_submodule(layer_name).weight.detach()
    share = within_reach(first, group_scales(first, bits, group_size), steps * learning_rate / 2)
    print(f"{layer_name}: at most about {share:.1%} were within reach of this notebook's training")

# %% [markdown]
# **2 (medium). Learn the scale.** LSQ (Esser et al., [arXiv:1902.08153](https://arxiv.org/abs/1902.08153)) trains the
# scale together with the weights. Derive its gradient (four lines): rounding counts as the identity, so inside the
# range the codes depend on the scale too, and beyond it they do not.


# %%
def scale_gradient(groups, scale, bits, upstream):
    """groups and upstream [groups, group_size], scale [groups, 1].

    Returns the gradient of sum(upstream * fake-quantized) with respect to scale, [groups, 1].
    """
    ...


# %%
def test_scale(function):
    groups, upstream = torch.randn(6, 32), torch.randn(6, 32)
    scale = (groups.abs().amax(1, keepdim=True) / 10).requires_grad_()
    (fake_quantize(groups, scale, 4) * upstream).sum().backward()
    got = function(groups, scale.detach(), 4, upstream)
    assert got.shape == scale.shape, f"expected shape {tuple(scale.shape)}, got {tuple(got.shape)}"
    hint = "inside the range: code - weight / scale; beyond it: the last code"
    assert torch.allclose(got, scale.grad, rtol=1e-3, atol=1e-4), hint


exercises.check(scale_gradient, test_scale)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def scale_gradient(groups, scale, bits, upstream):
        position, low, high = groups / scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        codes = position.round()
        slope = torch.where((codes < low) | (codes > high), codes.clamp(low, high), codes - position)
        return (upstream * slope).sum(1, keepdim=True)

    exercises.require(scale_gradient, test_scale)

# %% [markdown]
# **3 (hard). A zero point for fake quantization.** Weights that lean to one side waste half of a symmetric grid.
# Write the asymmetric version (seven lines): range from the smallest to the largest weight of each group (with zero
# in it), a whole zero point, and gradients that pass straight through.


# %%
def fake_quantize_asymmetric(weight, bits, group_size):
    """weight [out, in], fake-quantized with codes 0 to 2**bits - 1.

    One scale and one zero point per group; neither gets a gradient.
    """
    ...


# %%
def test_asymmetric(function):
    weight = (torch.rand(8, 128) - 0.2).requires_grad_()
    got = function(weight, 4, 64)
    got.sum().backward()
    assert got.shape == weight.shape, f"expected shape {tuple(weight.shape)}, got {tuple(got.shape)}"
    values = max(len(group.unique()) for group in got.detach().reshape(-1, 64))
    assert values <= 16, "more than 16 values in a group"
    symmetric = fake_quantize(weight.detach(), group_scales(weight, 4, 64), 4)
    better = (got - weight).abs().mean() < 0.8 * (symmetric - weight).abs().mean()
    assert better, "no better than the symmetric grid on lopsided weights"
    positive = torch.cat([torch.zeros(1, 8), torch.ones(1, 56)], 1)
    assert function(positive, 4, 64)[0, 0] == 0, "zero must stay exactly zero"
    passed = weight.grad is not None and (weight.grad == 1).float().mean() > 0.9
    assert passed, "the gradient must pass where nothing is clipped"


exercises.check(fake_quantize_asymmetric, test_asymmetric)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def fake_quantize_asymmetric(weight, bits, group_size):
        groups, top = weight.reshape(-1, group_size), 2**bits - 1
        with torch.no_grad():
            low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / top
            zero_point = (-low / scale).round()
        codes = torch.clamp(Round.apply(groups / scale) + zero_point, 0, top)
        return ((codes - zero_point) * scale).reshape(weight.shape)

    exercises.require(fake_quantize_asymmetric, test_asymmetric)

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("02_qat_fake_quant")

# %% [markdown]
# ## Takeaways
# 1. Fake quantization is rounding with the scale multiplied back in. The straight-through estimator is exact for
#    everything but the rounding: it passes 1 inside the range and 0 beyond it. Finite differences agree.
# 2. The eager route runs once embedding and head are left out and each Linear is wrapped. It gives each activation
#    tensor one scale and ends at a KL of 2.4 after these few steps. Its state dict goes into safetensors only as
#    codes and scales.
# 3. `QATConfig` prepares, trains and converts without changing a weight at the end. On genres that it never saw,
#    distillation takes back 25 % of what rounding took, and 46 % on its own (SmolLM2-135M, two CPU cores, 14 steps).
#    At 4 bits cross-entropy mostly learns the text, which perplexity rewards and KL shows.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% tags=["record"]
record = records.write(
    output_dir,
    method=f"qat-int{bits}",
    notebook="02_qat_fake_quant",
    found=found,
    windows=windows,
    bits_per_weight=bits_per_weight,
    weight_bytes=stored_bytes,
    peak_memory_bytes=used.peak_ram if found.device == "cpu" else used.peak_vram,
    scores=final,
    in_domain=(in_domain, second),
    decode_tokens_per_s=decode.decode_tokens_per_s,
    quantize_seconds=quantize_seconds,
)
pd.Series(record)
