# %% [markdown]
# # 11 Compare the methods
#
# Lay all measured methods side by side, choose one for your machine, and see what is left to gain after the weights.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Read one table and two plots of all methods, and pick a method for a given machine with its reason in numbers.
# 2. Find out where the time of a decoded token goes, and measure the two levers after the weights: KV cache and
#    compiled loop.
# 3. Score the model on a test of four choices in the standard harness, and compare every checkable claim of the
#    guides with a number.
#
# **Before you start:** [04 NF4 with bitsandbytes](04_nf4_bitsandbytes.ipynb). Run the other notebooks first to see
# your own numbers here. For a method that you have not run, this notebook shows the results that come with the
# course.

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
sort_by = "kl_divergence"
cache_bits = 4
cache_group_size = 32
compile_model = True
lm_eval_tasks = "course_questions"

# %% [markdown]
# ## The idea: a method is worth a look if no other method beats it
#
# Take four methods. A method costs bytes, and it moves the model away from the untouched one. The **KL divergence**
# measures that distance in nats per token: 0 means the same predictions, 0.01 is hard to notice, 0.3 changes about
# every third top token of a small model, and above 1 the text falls apart ([00](00_start_here.ipynb) computes it by
# hand).
#
# | method | weights, MB | KL | is it beaten? |
# |---|---|---|---|
# | A | 90 | 0.45 | No. It is the smallest. |
# | B | 104 | 0.06 | No. Only A is smaller, and A is further away. |
# | C | 112 | 0.34 | **Yes.** B is smaller *and* closer. |
# | D | 143 | 0.002 | No. It is the closest. |
#
# Nobody should take C. A, B and D form the **Pareto frontier**: to improve one number, you must give up some of the
# other. The frontier takes five lines:

# %%
hand_sized = {"A": (90, 0.45), "B": (104, 0.06), "C": (112, 0.34), "D": (143, 0.002)}


def beaten(method, points):
    """Whether another method is smaller and closer."""
    size, loss = points[method]
    return any(other_size < size and other_loss < loss for other_size, other_loss in points.values())


[method for method in hand_sized if not beaten(method, hand_sized)]

# %% [markdown]
# The rest of this notebook does the same with real methods. We start with the imports and the untouched model.

# %% jupyter={"source_hidden": true}
import contextlib
import gc
import io
import json
import os
import statistics
import time

from helpers import models

# Compiled kernels go into the course's cache; torch reads this when it is imported.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(models.cache() / "inductor")

# %% jupyter={"source_hidden": true}
import matplotlib.pyplot as plt
import pandas as pd
import torch
import yaml
from IPython.display import HTML, Code, display
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.utils import logging

# %% jupyter={"source_hidden": true}
from helpers import evaluation, exercises, figures, memory, records, speed
from helpers.publishing import claims, guide, pages, pareto, reference, report, tables

figures.style()
logging.disable_progress_bar()
pd.set_option("display.max_colwidth", None)

# %%
found = models.find(model, halves=1.3, on_gpu=1.3)  # one copy in bfloat16 and one in 4 bits
config = AutoConfig.from_pretrained(found.path)
if config.model_type not in ("llama", "mistral", "qwen2"):
    raise ValueError(f"the decoder of this notebook knows llama, mistral and qwen2 models, and no {config.model_type}")
tokenizer = AutoTokenizer.from_pretrained(found.path)
windows = evaluation.windows(tokenizer, tokens=eval_tokens)
baseline = evaluation.reference(found, windows)
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
second_baseline = evaluation.reference(found, in_domain)
print(f"{found.name} on the {found.device.upper()}, {found.origin}")

# %% [markdown]
# A float32 copy and a 4-bit copy stand side by side later. Where both do not fit, bfloat16 takes the place of
# float32.

# %%
assert sort_by == "method" or sort_by in tables.COLUMNS, f"sort_by must be one of {list(tables.COLUMNS)}"
assert cache_bits in (2, 4, 8), f"cache_bits must be 2, 4 or 8, not {cache_bits}"
free = memory.free_vram() if found.device == "cuda" else memory.free_ram()
parameters = memory.predict(config).parameters
full = "fp32" if 6 * parameters < free and not found.half else "bf16"
full


# %% [markdown]
# ## One table
#
# Each notebook left one record per method: the same text, the same windows, the same functions. If the records of the
# two untouched models are missing, the next cells measure them now.


# %%
def load(dtype, **options):
    """The model from its folder, in evaluation mode."""
    options.setdefault("device_map", {"": found.device})
    return AutoModelForCausalLM.from_pretrained(found.path, dtype=dtype, **options).eval()


def scored(net, dtype, text, before):
    """`Scores` on a text; the untouched model in full precision is the baseline itself."""
    return before.scores if dtype == found.dtype else evaluation.score(net, text, before)


# %% jupyter={"source_hidden": true}
def measure(dtype):
    """What the record of an untouched model says: sizes, quality on both texts, speed."""
    with memory.track() as used:
        net = load(dtype)
        scores = scored(net, dtype, windows, baseline)
        second = scored(net, dtype, in_domain, second_baseline)
    size = memory.weight_bytes(net)
    return {
        "bits_per_weight": 8 * size / net.num_parameters(),
        "weight_bytes": size,
        "scores": scores,
        "in_domain": (in_domain, second),
        "peak_memory_bytes": used.peak_vram if found.device == "cuda" else used.peak_ram,
        "decode_tokens_per_s": speed.decode(net).decode_tokens_per_s,
    }


# %%
dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
common = {"notebook": "11_compare_methods", "found": found, "windows": windows, "quantize_seconds": None}
for method in dict.fromkeys([full, "bf16"]):
    if method not in records.read(output_dir):
        records.write(output_dir, method=method, **common, **measure(dtypes[method]))

# %% [markdown]
# Read the table like this:
#
# - **KL** is measured on four genres that no method has seen. Its brackets hold the 95 % interval.
# - **KL on pydoc** is measured on Python's documentation. Some methods were calibrated on other topics of it. A
#   method that gains more there than the others has also learned the calibration text.
# - **Not run here** means that this machine has no record of the method. Nothing is filled in for it.
# - GGUF files quantize the embeddings too. The other 4-bit methods leave them in 16 bits; in SmolLM2-135M they are a
#   fifth of all weights. [08](08_gguf_llama_cpp.ipynb) says how much llama.cpp's rounding of activations adds to
#   their KL.
#
# A click on a heading sorts the table, and so does the keyboard. `sort_by` sets the order where no script runs.

# %%
measured, references = records.read(output_dir), reference.read()
expected = report.expected(references)
missing = [method for method in expected if method not in measured]
print(f"{len(measured)} methods measured here, {len(missing)} not run here")
HTML(tables.methods(measured, expected, sort_by))

# %% [markdown]
# The next table puts the course's own results beside yours. The KL should agree in the third digit on machines of one
# kind. The speed differs from machine to machine.

# %%
columns = {}
for field, head in (("kl_divergence", "KL"), ("decode_tokens_per_s", "tok/s")):
    columns[f"{head} here"] = {method: record[field] for method, record in measured.items()}
    for other in references:
        name = f"{head}, {other.device}, {other.model.split()[0]}"
        columns[name] = {method: record[field] for method, record in other.records.items()}
beside = pd.DataFrame(columns).sort_index(axis=1)
beside.round(4).astype(object).where(beside.notna(), tables.NOT_MEASURED)

# %% [markdown]
# ## Two plots
#
# The first plot is the hand-sized example with all methods. The left panel has every method. The right panel shows
# the 4-bit methods alone, because they lie close together. Methods below four bits get a panel of their own as soon
# as two of them have a record (notebook 10 writes them). A colour is a bit width, here and in the whole course. Where
# you have run few methods, the plots show what comes with the course instead, and the caption says so.
#
# `qlora` and `qlora-ddp` are left out: fine-tuning is *meant* to leave the untouched model, so its KL is no loss of
# quality.

# %%
enough = len([r for r in measured.values() if r["kl_divergence"] is not None]) > 3
same_model = [r for r in references if r.model.split()[0] == found.name]
committed = next(iter(same_model or references), None)
shown = measured if enough or committed is None else committed.records
whose = "this run" if shown is measured else f"reference: {committed.device}, {committed.model.split()[0]}"
whose


# %%
def show_frontier(shown, whose, against):
    """The frontier against one of `pareto.AXES`, or a line that says what is missing."""
    plot = pareto.plot(list(shown.values()), against)
    if plot is None:
        print("One method makes no frontier: run another notebook first.")
        return
    fig, alt, twin = plot
    figures.show(fig, alt=f"{alt} ({whose})", table=twin.round(4))


show_frontier(shown, whose, "weight_bytes")

# %% [markdown]
# The second plot replaces bytes by speed. **Predict first:** is the smallest method also the fastest? Do the plain
# 4-bit methods lie on this frontier too?

# %%
show_frontier(shown, whose, "decode_tokens_per_s")

# %% [markdown]
# Smaller is not always faster. On the CPU of the committed run, llama.cpp's kernels decode the GGUF files three to
# five times as fast as the other methods decode theirs, at a similar size. And a method can be fast and useless:
# `int8-dynamic` is faster than bf16 with a KL above 1. So set a limit for the KL first, then choose by speed.
#
# ## Two models, two rankings
#
# Is the best 4-bit method of one model the best of another one? Each model ranks the 4-bit methods by KL. Two methods
# count as ordered only where their intervals do not overlap. Otherwise the texts do **not tell them apart**.

# %%
ranked = pareto.rankings(measured, references)
if ranked:
    fig, alt, twin = pareto.plot_rankings(ranked)
    figures.show(fig, alt=alt, table=twin)
else:
    print(pareto.differences(ranked))

# %% [markdown]
# The records of the 1.5B model come from an NVIDIA H200, those of notebooks 06 and 10 with groups of 128. NVFP4 leads
# there, and NF4 is second. **Both are ahead of AWQ on the 1.5B model and behind it on SmolLM2-135M**, where groups are of
# 64. On the 1.5B model NF4 has a KL of 0.060 [0.056, 0.063] and AWQ 0.077 [0.072, 0.082]. NF4 also passes the GPTQ of
# notebook 10 (`gptq-4`) with 0.077 [0.072, 0.083]. MXFP4 and symmetric INT4 change places too. Do not carry a ranking
# from a small model to a large one: measure on yours.
#
# More work need not help either. On the 1.5B model 20 steps of AutoRound (`autoround-4`) have 0.133 [0.127, 0.140] where
# rounding (`rtn-4`) has 0.087 [0.083, 0.092]; [10](10_below_four_bits.ipynb) says what more steps do at 3 bits. GPTQ of
# notebook 05 has no record on that model. `notebooks/gpu/README.md` says what it gave.
#
# ## Which one for you?
#
# The guide computes what each format needs for a model of your choice: weights, scales, 4,096 tokens of KV cache, and
# 10 % working space. It drops what does not fit and what was measured to ruin the model. It ranks the rest by what
# you need. With the keyboard: Tab goes from field to field, Space opens a list or ticks the box, arrows and Enter
# choose.

# %%
guide.Guide(shown)

# %% [markdown]
# The size is exact for both models. Quality and speed come from the model that was measured. For a 7B model they give
# the order, not the amount: NF4 costs the 135M model 0.34 nats and a 1.5B model 0.06 (`notebooks/gpu/README.md`). For
# speed on a GPU, read the GPU section below instead of this guide.
#
# ## Where does the time go?
#
# `torch.profiler` counts every operation and its time. We decode the same four tokens in full precision and in 4
# bits, and sort the operations into five kinds. **Predict first:** does the 4-bit model need more or fewer operations
# for a token?

# %%
prompt = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(0)).to(found.device)


@torch.inference_mode()
def profiled(net, prompt, steps=4):
    """Profile of `steps` decoded tokens after the prompt and a warm-up."""
    cache = DynamicCache(config=net.config)
    net(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
    token = prompt[:, :1]
    net(input_ids=token, past_key_values=cache)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (prompt.device.type == "cuda")
    with profile(activities=kinds) as events:
        for _ in range(steps):
            net(input_ids=token, past_key_values=cache)
    return events.key_averages()


# %%
four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
nets = {full: load(dtypes[full]), "nf4": load(torch.bfloat16, quantization_config=four_bit)}

# %%
copies = ("copy", "cat", "::to", "empty", "view", "reshape", "stride", "transpose", "slice", "select", "::t")
PARTS = {
    "4-bit multiplication": ("4bit",),
    "attention": ("attention", "softmax"),
    "multiplication": ("::mm", "addmm", "::bmm", "matmul", "linear", "gemm"),
    "copies, casts, views": copies,
}


def kind(name):
    """Which part of a decoding step an operation belongs to."""
    for part, words in PARTS.items():
        if any(word in name for word in words):
            return part
    return "element by element"


# %%
def shares(events, steps=4):
    """ms of its own and number of calls per token, for each kind of operation."""
    device = "self_device_time_total" if found.device == "cuda" else "self_cpu_time_total"
    rows = [[kind(event.key), getattr(event, device) / 1e3 / steps, event.count / steps] for event in events]
    return pd.DataFrame(rows, columns=["part", "ms a token", "calls a token"]).groupby("part").sum()


with contextlib.redirect_stderr(io.StringIO()):
    where = pd.concat({name: shares(profiled(net, prompt)) for name, net in nets.items()}, axis=1).fillna(0)
ms = where.xs("ms a token", axis=1, level=1)
calls = where.xs("calls a token", axis=1, level=1).sum()
where.round(2)

# %%
fig, ax = plt.subplots(figsize=(7, 2.2))
ms.T.plot.barh(stacked=True, ax=ax, color=figures.PALETTE)
ax.set(xlabel="ms a decoded token, inside operations")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
is_product = ms.index.str.contains("multiplication")
product_share = ms[is_product].sum() / ms.sum()
said = [f"{product_share[name]:.0%} of {ms[name].sum():.1f} ms in {name}" for name in (full, "nf4")]
ax.set_title(f"Matrix products take {' and '.join(said)}", fontsize="medium")
alt = f"Time of a decoded token by kind of operation: matrix products take {' and '.join(said)}."
figures.show(fig, alt=alt, table=ms.round(2))

# %% [markdown]
# Matrix products wait for weights to come from memory. In 4 bits fewer bytes come, so the products take less time.
# Everything around them stays or grows, because there are more calls and more casts. The share of the products falls.
# So the fewer bits the weights have, the less is left to gain from the weights.
#
# ### Do 4 bits fall behind on long inputs?
#
# A guide says so. Attention over the past costs the same in both models, so any lead of NF4 should shrink with the
# length. The next cell times each length once. One timing is a hint and not enough for a verdict.

# %%
if "bf16" not in nets:
    del nets["fp32"]
    gc.collect()
    nets["bf16"] = load(torch.bfloat16)
lengths = (64, 1024)
pace = pd.DataFrame(index=list(nets))
for length in lengths:
    rates = [speed.decode(net, length, 24, runs=1).decode_tokens_per_s for net in nets.values()]
    pace[f"decode tok/s after {length} tokens"] = rates
short, long = (pace.loc["nf4"] / pace.loc["bf16"]).tolist()
pace.round(1)

# %% [markdown]
# ## After the weights, lever 1: the KV cache
#
# The keys and values of every token stay in memory. Quantizing them works as for weights: take a few numbers, find
# their range, and store each number as the nearest of evenly spaced levels. By hand, for four keys and 2 bits (levels
# 0 to 3):
#
# | key | -0.9 | -0.2 | 0.1 | 0.6 |
# |---|---|---|---|---|
# | (key - minimum) / step, with step (0.6 + 0.9) / 3 = 0.5 | 0.0 | 1.4 | 2.0 | 3.0 |
# | code | 0 | 1 | 2 | 3 |
# | back: code × 0.5 - 0.9 | -0.9 | -0.4 | 0.1 | 0.6 |
#
# How large is the cache beside a 4-bit model?

# %%
config = nets["bf16"].config
for context, batch in ((512, 1), (8192, 1), (8192, 16)):
    size = memory.predict(config, bits=4, group_size=64, context=context, batch=batch)
    cache_mb, weights_mb = size.kv_cache / 1e6, size.model / 1e6
    print(f"{context:5} tokens x {batch:2}: cache {cache_mb:7.1f} MB, 4-bit weights {weights_mb:.1f} MB")


# %% [markdown]
# transformers has a quantized cache. Its integer backends are packages of their own (`optimum-quanto`, `hqq`), which
# this course does not install; its `fp8` backend needs nothing. A backend of your own needs two methods. Ours does
# what the table above does, and packs the codes into bytes. transformers prescribes the names of the two methods.
# `_quantized_keys`, which the checks below read, is private to transformers and may change with its version.
#
# **Which numbers share a range?** Keys are a table with a row for each token and a column for each channel. In
# some models a few channels are far larger than the rest. By hand, with 2 bits:
#
# | | channel A | channel B | channel C |
# |---|---|---|---|
# | token 1 | 9.0 | -0.3 | 0.5 |
# | token 2 | 9.6 | 0.3 | -0.4 |
# | token 3 | 9.2 | 0.0 | 0.1 |
#
# A range for each **token** has steps of 3.1 to 3.3. B and C fall on the same level, and what they held is lost. A
# range for each **channel** has steps of 0.2 and 0.3, and all three stay close. KIVI
# ([arXiv:2402.02750](https://arxiv.org/abs/2402.02750)) gives keys a range for each channel, and values one for each
# token. `axis` below is the direction in which a group lies: along the tokens, for a range per channel (-2), or along
# the channels, for a range per token (-1).


# %%
class GroupedCacheLayer(QuantizedLayer):
    def _quantize(self, states, axis):
        """states [batch, heads, tokens, head_dim] -> packed codes, scales, minima, axis, numbers along that axis."""
        numbers = states.float().movedim(axis, -1)
        length = numbers.shape[-1]
        filling = numbers[..., -1:].expand(*numbers.shape[:-1], -length % self.q_group_size)
        groups = torch.cat([numbers, filling], -1).unflatten(-1, (-1, self.q_group_size))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / (2**self.nbits - 1)).clamp_min(1e-8)
        codes = ((groups - low) / scale).round().byte().unflatten(-1, (-1, 8 // self.nbits))
        shifts = self.nbits * torch.arange(8 // self.nbits, dtype=torch.uint8, device=codes.device)
        packed = (codes << shifts).sum(-1, dtype=torch.uint8)
        return packed, scale.to(self.dtype), low.to(self.dtype), axis, length

    def _dequantize(self, packed):
        codes, scale, low, axis, length = packed
        shifts = self.nbits * torch.arange(8 // self.nbits, dtype=torch.uint8, device=codes.device)
        codes = (codes.unsqueeze(-1) >> shifts & 2**self.nbits - 1).flatten(-2)
        return (codes.to(scale.dtype) * scale + low).flatten(-2)[..., :length].movedim(-1, axis)


# %%
def grouped(bits, group_size, keys_per="channel", residual=128):
    """A cache of such layers; the newest tokens, fewer than `residual`, stay unquantized."""
    axes = {"axis_key": {"channel": -2, "token": -1}[keys_per], "axis_value": -1}
    options = {"nbits": bits, "q_group_size": group_size, "residual_length": residual, **axes}
    return Cache(layers=[GroupedCacheLayer(**options) for _ in range(config.num_hidden_layers)])


hand_sized_layer = grouped(2, 4, keys_per="token").layers[0]
four_keys = torch.tensor([-0.9, -0.2, 0.1, 0.6]).reshape(1, 1, 1, 4)
hand_sized_layer.update(four_keys, four_keys)  # the first update quantizes everything it gets
hand_sized_layer._dequantize(hand_sized_layer._quantized_keys).flatten()

# %% [markdown]
# These are the numbers of the table. On random keys, no value may be off by more than half a step:

# %%
layer = grouped(cache_bits, cache_group_size, keys_per="token").layers[0]
keys = torch.randn(1, 3, 256, 64)
layer.update(keys, keys)
restored = layer._dequantize(layer._quantized_keys)
step = layer._quantized_keys[1].repeat_interleave(cache_group_size, -1).flatten(-2)
assert ((restored - keys).abs() <= 0.51 * step + 1e-2).all(), "a value is off by more than half a step"
((restored - keys).abs() / step).max()


# %% [markdown]
# The measurement keeps the course's protocol. A window of 256 tokens is read in pieces of 64, so every later piece
# attends to a quantized past. We do not measure here what quantization does to a past of thousands of tokens.


# %%
class WithCache:
    """A model that reads its input piece by piece through a cache, for `evaluation.score`."""

    def __init__(self, net, make_cache, piece=64):
        self.net, self.make_cache, self.piece = net, make_cache, piece
        self.eval, self.parameters = net.eval, net.parameters

    def __call__(self, input_ids, **_):
        cache = self.make_cache()
        pieces = input_ids.split(self.piece, 1)
        parts = [self.net(input_ids=piece, past_key_values=cache, use_cache=True) for piece in pieces]
        parts[0].logits = torch.cat([part.logits for part in parts], 1)
        return parts[0]


# %% [markdown]
# How many bits does a number of the cache take, the unquantized newest tokens included? We read one window and count
# the bytes.


# %%
def tensors_of(layer):
    """All tensors that a cache layer holds."""
    for value in vars(layer).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, torch.Tensor) and part.numel() > 1:
                yield part


@torch.inference_mode()
def stored_bits(net, make_cache, ids, piece=64):
    """Bits for each key and value after reading `ids` [1, tokens] in pieces."""
    cache = make_cache()
    for part in ids.split(piece, 1):
        net(input_ids=part.to(net.device), past_key_values=cache, logits_to_keep=1)
    stored = sum(tensor.nbytes for layer in cache.layers for tensor in tensors_of(layer))
    numbers = memory.predict(config, context=ids.shape[1], cache_bits=8).kv_cache  # at one byte each
    return 8 * stored / numbers


# %%
own = f"{cache_bits} bits, groups of {cache_group_size}"
caches = {
    "16 bits": lambda: DynamicCache(config=config),
    "fp8 (transformers)": lambda: QuantizedCache("fp8", config),
    "4 bits, groups of 64": lambda: grouped(4, 64),
    "4 bits, groups of 32, keys per token": lambda: grouped(4, 32, keys_per="token"),
    "2 bits, groups of 32": lambda: grouped(2, 32),
    own: lambda: grouped(cache_bits, cache_group_size),
}
probe = windows[: len(evaluation.GENRES)]  # one window of each genre

# %%
rows = {}
for name, make in caches.items():
    scores = evaluation.score(WithCache(nets["bf16"], make), probe, baseline)
    rows[name] = [stored_bits(nets["bf16"], make, probe[:1]), *scores.summary().values()]
heads = ["bits stored", "perplexity", "KL", "same top-1"]
levels = pd.DataFrame.from_dict(rows, orient="index", columns=heads)
levels.round(4)

# %% [markdown]
# The stored bits are more than the name says. When a window of 256 tokens has been read, its newest 64 tokens still
# wait in 16 bits. So "4 bits, groups of 32" stores 0.75 × (4 + 32 / 32) + 0.25 × 16 = 7.75 bits. A longer past comes
# closer to 5. Four bits in groups of 32 cost little here, whichever way the keys' groups lie.
#
# All rows are measured on the same windows, one of each genre. **Predict first:** does that hold for another model?
# `kv_cache/cache_study.py` ran this notebook's cache on both of the course's models, on all windows and in groups of
# 32:

# %%
study = json.loads((pages.FOLDER / "kv_cache" / "cache_study.json").read_text(encoding="utf-8"))
columns = {"kl_divergence": "KL", "kl_low": "from", "kl_high": "to", "perplexity": "perplexity"}
both_models = {
    (name, row): {head: found_there[key] for key, head in columns.items()}
    for name, facts in study["models"].items()
    for row, found_there in facts["rows"].items()
}
print(study["device"], study["date"])
pd.DataFrame(both_models).T.round(4)

# %% [markdown]
# **The second model says otherwise.** With a range for each token, four bits destroy Qwen2.5-Coder-1.5B: its perplexity
# goes from 36 to 166. With a range for each channel its KL is 0.002. transformers' FP8 cache has a KL of 0.094 there:
# eight bits lose more than four that suit the keys. No error and no warning tells them apart. In the worst layer of
# this model the largest channel of the keys is 284 times as large as the median one. In SmolLM2-135M it is 16 times as
# large. So score a quantized cache on your own model before you use it.
#
# The record of this notebook takes all windows, for the cache of the parameters cell:

# %%
with memory.track() as used:
    net = WithCache(nets["bf16"], caches[own])
    quality = evaluation.score(net, windows, baseline, batch_size=8)
second = evaluation.score(net, in_domain, second_baseline, batch_size=8)
quality.kl_divergence


# %% [markdown]
# This cache saves memory and costs time: PyTorch rebuilds the keys and values from their codes at every token.


# %%
@torch.inference_mode()
def seconds_a_token(net, make_cache, step, steps):
    """Time of one decoded token, mean of `steps` after a prompt; `step` is called like the model."""
    cache = make_cache()
    token = net(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    for number in range(steps + 2):
        if number == 2:
            _ = token.sum().item()  # on a GPU: wait
            start = time.perf_counter()
        token = step(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
    _ = token.sum().item()
    return (time.perf_counter() - start) / steps


def rate(net, make_cache, step=None, steps=16, runs=3):
    """Decoded tokens per second, median of `runs`."""
    return 1 / statistics.median(seconds_a_token(net, make_cache, step or net, steps) for _ in range(runs))


# %%
eager = rate(nets["bf16"], caches["16 bits"])
quantized_rate = rate(nets["bf16"], caches[own])
print(f"decode: 16-bit cache {eager:.1f} tok/s, {own} {quantized_rate:.1f} tok/s")


# %% [markdown]
# ## Lever 2: a static cache and a compiled step
#
# A cache that grows changes its shape at every token, and Python starts each operation. A `StaticCache` has its full
# length from the start, so `torch.compile` can fuse a step into few kernels. Compiling needs a C++ compiler, and it
# takes time for every layer. So we compare the three ways on the model's first six layers. (The output head is one
# product that compiling leaves as it is. It takes a larger share of six layers than of thirty.)


# %%
def static():
    return StaticCache(config=config, max_cache_len=128)


def compiled(net):
    """(tokens per second, seconds to compile) of the compiled step; (None, None) without a compiler."""
    step = torch.compile(net.forward)
    try:
        start = time.perf_counter()
        rate(net, static, step, steps=1, runs=1)
        compile_seconds = time.perf_counter() - start
        return rate(net, static, step), compile_seconds
    except Exception as error:  # no compiler, or one that torch does not know
        print(f"not measured here: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
        return None, None


# %%
net, layers = nets["bf16"], nets["bf16"].model.layers
net.model.layers, config.num_hidden_layers = layers[:6], 6
rates = {"growing cache": rate(net, caches["16 bits"]), "static cache": rate(net, static)}
compile_seconds = None
if compile_model:
    rates["static cache, compiled"], compile_seconds = compiled(net)
net.model.layers, config.num_hidden_layers = layers, len(layers)
loop = pd.DataFrame({"decode tok/s": rates})
loop["times the growing cache"] = loop["decode tok/s"] / rates["growing cache"]
loop.round(2)

# %% [markdown]
# Compiling pays only after so many tokens that the time it saves is larger than the time it took:

# %%
if compile_seconds:
    saved = 1 / rates["growing cache"] - 1 / rates["static cache, compiled"]
    worth = f"pays from {compile_seconds / saved:,.0f} tokens on" if saved > 0 else "saves nothing here"
    print(f"compiling took {compile_seconds:.0f} s and {worth}")
    torch.compiler.reset()

# %% [markdown]
# ## Fast 4-bit decoding on a GPU
#
# To make one token, the GPU reads every weight once. So **bytes / bandwidth is the least time a token can take**. By
# hand: 14.2 GB of fp16 weights at 3,000 GB/s take 4.7 ms, which is 211 tokens a second at most. 3.7 GB of 4-bit
# weights allow 811. How close does each way of decoding come to its limit? The numbers are the course's own records
# of Mistral-7B's shape on one GPU. They stand apart from the table at the top, because model and machine are others.

# %%
import sys

sys.path.insert(0, str(pages.FOLDER / "gpu"))
import summary

gpu_record = summary.read()
print(f"{gpu_record['device']}, {gpu_record['date']}: {gpu_record['model']}")
ways = pd.DataFrame(summary.ladder(gpu_record)).set_index("what")
ladder = ways[["batch 1", "limit", "share", "batch 8"]].copy()
ladder.insert(0, "weights read, GB", ways.bytes / 1e9)
ladder["share"] = ladder.share.map("{:.0%}".format)
figures.show(summary.plot(gpu_record), alt=summary.alt(gpu_record), table=ladder.round(1))

# %% [markdown]
# Read it from the top:
#
# - **Eager**: Python starts each of the hundreds of kernels of a token, and the GPU waits. int4 reads a quarter of
#   fp16's bytes here and reaches 36 tokens a second instead of 22.
# - **A CUDA graph** records the kernels of one token and starts them with a single call. Python no longer slows the
#   loop.
# - **Compiled `generate`** fuses the small kernels, but `generate` itself still works between two tokens.
# - **Lean** does both and has nothing in between. Now four bits pay: 343 tokens a second with Marlin against 162 in
#   fp16.
#
# The 4-bit rows differ in one more point: the int4 and Marlin rows quantize the output head too, and the NF4 row does
# not.

# %% [markdown]
# ### On a 24 GB GPU with Mistral-7B
#
# Set `model = "mistral-7b-geometry"` (random weights, no download) or the hub id in the parameters cell, and run the
# notebook with `python -m helpers run --only 11 --cap 24GB`. Expect these peaks. They were measured on the GPU that
# is named above:

# %%
peaks = pd.DataFrame(gpu_record["memory"]).T[["weight_bytes", "loading_peak_bytes", "answering_peak_bytes"]]
peaks.columns = ["weights, GB", "peak loading, GB", "peak answering, GB"]
for tokens in ("512", "2048"):
    step_peak = gpu_record["qlora"][tokens]["peak_bytes"]
    peaks.loc[f"QLoRA, a step of {tokens} tokens", "peak training, GB"] = step_peak
(peaks / 1e9).round(2).astype(object).where(peaks.notna(), tables.NOT_MEASURED)

# %% [markdown]
# ### What is left in the fastest row
#
# The profiler splits a token's time. "Matrices" are the kernels that read weights; "idle" is time in which no kernel
# ran.

# %%
profiles = {}
for way, profile_of_way in ways.profile.dropna().items():
    matrices = profile_of_way["kinds"]["matrices"]
    profiles[way] = {
        "matrices": matrices,
        "between the matrices": sum(profile_of_way["kinds"].values()) - matrices,
        "idle": profile_of_way["idle_s"],
        "bytes alone need": 1 / ways.limit[way],
    }
(1e3 * pd.DataFrame(profiles).T).round(2).rename(columns="{}, ms".format)

# %%
parts = 1e3 * pd.Series(summary.gap(gpu_record))
best, lean_fp16 = ways.iloc[-1], ways.loc["fp16, lean"]
assert best["batch 1"] > 1.5 * lean_fp16["batch 1"], "fewer bytes should pay in the lean loop"
pd.DataFrame({"ms a token": parts, "share": (parts / parts.sum()).map("{:.0%}".format)}).round(2)

# %% [markdown]
# ### The loop
#
# [lean_decode.py](gpu/lean_decode.py) fits on a screen. `torch.compile` fuses three small functions. The matrices are
# whatever the model holds (torch, torchao, bitsandbytes, gptqmodel). `step` changes only tensors that stay where they
# are, so a CUDA graph can record it:

# %%
import inspect

import lean_decode

Code(inspect.getsource(lean_decode.LeanDecoder.step), language="python")

# %% [markdown]
# Is it the same model? We compare the greedy tokens of the lean loop with those of `generate`, on the default model
# and on this machine.

# %%
lean_model = load(torch.float32) if full == "fp32" else nets["bf16"]
lean_prompt = tokenizer("Quantization makes a language model", return_tensors="pt").input_ids.to(found.device)
theirs = lean_model.generate(lean_prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
theirs = theirs[:, lean_prompt.shape[1] :]
stance = "default" if found.device == "cuda" else "force_eager"  # compiling for a CPU would take longer
with torch.compiler.set_stance(stance):
    ours = lean_decode.LeanDecoder(lean_model, length=64).generate(lean_prompt, 24)
same = (ours == theirs).float().mean().item()  # in bf16 two tokens can tie, and then either is right
assert same == 1 or full != "fp32", "the lean loop and generate disagree"
del lean_model
print(f"{same:.0%} of the tokens are the same: {tokenizer.decode(ours[0])!r}")


# %% [markdown]
# On a GPU, the next cells measure the ladder for your card on this model: eager, then lean, then lean with torchao's
# int4.


# %% jupyter={"source_hidden": true}
def tokens_per_s(decoder, prompt, count=64):
    decoder.generate(prompt, count)  # compiles and captures
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    decoder.generate(prompt, count)
    end.record()
    end.synchronize()
    return 1e3 * count / start.elapsed_time(end)


def ladder_here(net, prompt):
    """Tokens per second of three ways; the model is changed and of no further use."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    rates = {"bf16, eager": speed.decode(net).decode_tokens_per_s}
    rates["bf16, lean"] = tokens_per_s(lean_decode.LeanDecoder(lean_decode.fuse(net), length=128), prompt)
    quantize_(net, Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"))
    rates["int4, lean"] = tokens_per_s(lean_decode.LeanDecoder(net, length=128), prompt)
    return rates


# %%
if found.device == "cuda":
    on_this_gpu = ladder_here(nets.pop("bf16"), lean_prompt)
    display(pd.Series(on_this_gpu, name="tokens/s on this GPU").round(1).to_frame())
    memory.release()
    nets["bf16"] = load(torch.bfloat16)  # the lean loop has changed the other
else:
    print("No CUDA GPU here: the records above stand for one.")

# %% [markdown]
# For many users at once, do not write this loop: vLLM, SGLang and TensorRT-LLM also capture graphs and use kernels
# like Marlin, and they add paged caches and batching. The lean loop is for one user on one GPU, for greedy decoding
# of a fixed length.

# %% [markdown]
# ## A test with right and wrong answers
#
# KL and perplexity say how much a model changed. The
# [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness) asks whether the model still *knows*
# things. Our task holds 64 questions, half of them on quantization, half on general knowledge, with four choices
# each. So **chance is 25 %**. The harness takes the choice with the highest probability (`acc`) or the highest
# probability per character (`acc_norm`).
#
# **Predict first:** NF4 costs this model 0.3 nats. How many of 64 answers will it change? Exercise 3 asks the same of
# a KL.

# %% jupyter={"source_hidden": true}
import datasets
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

logging.disable_progress_bar()
datasets.disable_progress_bars()
folder = pages.FOLDER / "data" / "course_questions"
task = yaml.safe_load((folder / "course_questions.yaml").read_text(encoding="utf-8"))
data_files = task["dataset_kwargs"]["data_files"]
data_files.update({split: str(folder / name) for split, name in data_files.items()})
others = [name.strip() for name in lm_eval_tasks.split(",") if name.strip() not in ("", "course_questions")]
# The harness reads its own 14,000 task files only if one of them is asked for.
manager = TaskManager(include_defaults=bool(others))


# %%
def harness(net, tasks):
    """Samples of the harness for each task, quietly."""
    with contextlib.redirect_stderr(io.StringIO()):
        model = HFLM(pretrained=net, tokenizer=tokenizer, batch_size=8)
        results = lm_eval.evaluate(model, manager.load(tasks), bootstrap_iters=0, verbosity="ERROR")
    return results["samples"]


def points(samples, subject=None):
    """Share of right answers in %, by probability and by probability per character."""
    chosen = [s for s in samples if subject in (None, s["doc"].get("subject"))]
    return [100 * sum(s[metric] for s in chosen) / len(chosen) for metric in ("acc", "acc_norm")]


# %%
tested = {name: harness(nets[name], [task])["course_questions"] for name in ("bf16", "nf4")}
subjects = {"all 64": None, "quantization": "quantization", "general": "general"}
answers = pd.DataFrame(index=["acc, %", "acc_norm, %"])
for name, samples in tested.items():
    for subject, key in subjects.items():
        answers[f"{name}, {subject}"] = points(samples, key)
answers.T.round(1)

# %% [markdown]
# How large is the error of such a score? The standard error of a share *p* of *n* answers is √(p (1 - p) / n).

# %%
share_right = points(tested["bf16"])[0] / 100
error = 100 * (share_right * (1 - share_right) / len(tested["bf16"])) ** 0.5
pairs = zip(tested["bf16"], tested["nf4"], strict=True)
changed = sum(before["acc"] != after["acc"] for before, after in pairs)
print(f"standard error {error:.0f} points; 4 bits change {changed} answers from right to wrong or back")

# %% [markdown]
# A model that does not know an answer takes the choice that sounds likely, and the wrong choices were written to
# sound likely. So a score below chance is possible. This small model knows capitals and has hardly read about
# quantization.
#
# The harness takes questions of your own in the same way: a YAML file that names a file of questions (ours are in
# `notebooks/data/course_questions`). A published benchmark such as MMLU needs the hub:
# `-p lm_eval_tasks mmlu_abstract_algebra,mmlu_world_religions`. **The next cell was not run with such a task in the
# published outputs.** So this course has no MMLU score, and its 64 questions do not replace one.

# %% jupyter={"source_hidden": true}
if others:
    try:
        for name, samples in harness(nets["bf16"], others).items():
            print(f"{name}: acc {points(samples)[0]:.1f} % of {len(samples)} questions (chance 25 %)")
    except Exception as error:
        print(f"{', '.join(others)} not run here: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
else:
    print("no other task was asked for")

# %% [markdown]
# ## What the guides claim
#
# First come the claims that this notebook measured itself. The interval of a difference between two scores on 64 questions
# is wide.

# %%
more = calls["nf4"] / calls[full]
fallen = [100 * (bool(b["acc"]) - bool(a["acc"])) for b, a in zip(tested["bf16"], tested["nf4"], strict=True)]
long_prompt = f"{long:.2f} times bf16's speed after {lengths[1]:,} tokens, {short:.2f} after {lengths[0]}"
findings = [
    claims.finding("simpler-operations", more, text=f"{more:.2f} times as many operations a token as {full}"),
    claims.finding("long-sequences", long, text=long_prompt),
    claims.finding("benchmark-drop", sum(fallen) / len(fallen), *evaluation.interval(fallen)),
]
claims.write(output_dir, notebook="11_compare_methods", found=found, findings=findings)

# %%
claims.table(output_dir, "11_compare_methods")

# %% [markdown]
# Now follows every claim of the guides. `notebooks/data/claims.json` holds the guide's words, what they speak of, and the
# values for which they hold. The finding that is nearest to a claim's subject judges it. For Mistral-7B's memory and
# speed, that is its shape on a GPU. For its quality, it is the largest real model measured, of at least 1 billion
# parameters. A claim without such a finding is "not tested on its subject". A verdict whose interval crosses a
# threshold is "too close to call".

# %%
verdicts = claims.ledger(output_dir)
print(report.counts(verdicts))
for key, title in claims.read()[0].items():
    print(f"guide {key}: {title}")
with pd.option_context("display.max_rows", None):
    display(claims.frame(verdicts))


# %% [markdown]
# ## Exercises
#
# **1 (easy).** The answer takes one line. How many tokens of KV cache fit into `free_bytes`, batch 1? A layer stores
# two tensors, with `cache_bits` for each number.


# %%
def tokens_that_fit(free_bytes, layers, kv_heads, head_dim, cache_bits=16):
    """Whole tokens of KV cache in so many bytes."""
    ...


# %%
def test_tokens(function):
    answer = function(1_000_000, 30, 3, 64)
    assert answer is not None, "return a number"
    assert answer != 86, "keys and values: two tensors per layer"
    assert answer == int(answer), "whole tokens: round down"
    assert answer != 347, "a byte has 8 bits: 16 bits are 2 bytes"
    assert answer == 43, f"1 MB holds 43 tokens of this model's cache, you have {answer}"
    answer = function(1_000_000, 30, 3, 64, 4)
    assert answer == 173, "cache_bits is not used, or the result is not rounded down"


exercises.check(tokens_that_fit, test_tokens)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def tokens_that_fit(free_bytes, layers, kv_heads, head_dim, cache_bits=16):
        return int(free_bytes * 8 // (2 * layers * kv_heads * head_dim * cache_bits))

    exercises.require(tokens_that_fit, test_tokens)


# %% [markdown]
# **2 (medium).** The answer takes about five lines. Decide with numbers. Somebody has room for `budget_mb` of weights
# and accepts a KL of at most `max_kl`. **Predict first:** which method of the table gets 120 MB and 0.2 nats? Then
# write the rule: of all methods that fit and stay below the limit even at the upper end of their interval
# (`kl_high`), take the fastest. Return its name, or `None` where no method is left. A record that lacks one of the
# three numbers has `None` there, and is no candidate.


# %%
def choose(records, budget_mb, max_kl):
    """Name of the fastest method that fits and is surely close enough, or None; records {method: record}."""
    ...


# %% jupyter={"source_hidden": true}
def made_up(megabytes, kl_high, speed):
    kl = None if kl_high is None else 0.8 * kl_high
    sizes = {"weight_bytes": 1e6 * megabytes, "decode_tokens_per_s": speed}
    return sizes | {"kl_divergence": kl, "kl_high": kl_high}


numbers = {"A": (90, 0.5, 60), "B": (104, 0.07, 40), "C": (112, 0.22, 80), "D": (143, 0.003, 20)}
four_methods = {name: made_up(*three) for name, three in numbers.items()}
incomplete = {"no speed": made_up(80, 0.01, None), "no KL": made_up(80, None, 99)}


# %%
def test_choose(function):
    answer = function(dict(four_methods), 200, 1)
    assert answer is not None, "return the name of a method"
    assert answer == "C", f"all four fit 200 MB and 1 nat, and C is the fastest; you have {answer}"
    answer = function(dict(four_methods), 120, 0.2)
    assert answer != "C", "C has a KL of 0.18, but its interval ends at 0.22: it may be above the limit"
    assert answer == "B", f"B is the only one with 120 MB and 0.2 nats, you have {answer}"
    assert function(dict(four_methods), 100, 0.2) is None, "A alone has 100 MB, and its KL is too high: None"
    assert function(incomplete | four_methods, 200, 1) == "C", "a record without a number is no candidate"
    real = {method: record for method, record in shown.items() if method not in pareto.FINE_TUNED}
    for budget_mb, max_kl in ((95, 0.2), (120, 0.2), (300, 0.01)):
        print(f"{budget_mb} MB, {max_kl} nats: {function(real, budget_mb, max_kl)}")


exercises.check(choose, test_choose)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def choose(records, budget_mb, max_kl):
        fitting = {}
        for method, record in records.items():
            size, kl, rate = (record[key] for key in ("weight_bytes", "kl_high", "decode_tokens_per_s"))
            if None not in (size, kl, rate) and size <= 1e6 * budget_mb and kl <= max_kl:
                fitting[method] = rate
        return max(fitting, key=fitting.get, default=None)

    exercises.require(choose, test_choose)

# %% [markdown]
# **3 (medium).** The answer takes one number. Predict first. NF4 weights alone move the model by one KL, and a
# quantized cache alone by another one. What is the KL of **both together**: the larger one, about their sum, or much
# more? Put your number into the stub, then run the cell that measures.


# %%
def kl_of_both(nf4_alone, cache_alone):
    """Your prediction in nats."""
    ...


# %%
alone = {
    "nf4": evaluation.score(nets["nf4"], probe, baseline).kl_divergence,
    "cache": levels.loc["2 bits, groups of 32", "KL"],
}
both = evaluation.score(WithCache(nets["nf4"], caches["2 bits, groups of 32"]), probe, baseline).kl_divergence
print(f"NF4 alone {alone['nf4']:.3f}, 2-bit cache alone {alone['cache']:.3f}")


# %%
def test_both(function):
    answer = function(alone["nf4"], alone["cache"])
    assert answer is not None, "return a number of nats"
    assert answer >= 0, "a KL divergence is never negative"
    assert answer < 2 * both, f"you expect {answer:.3f}, measured {both:.3f}: the two errors do not multiply"
    assert answer > 0.5 * both, f"you expect {answer:.3f}, measured {both:.3f}: each error adds to the other"
    print(f"measured: {both:.3f}, your prediction: {answer:.3f}")


exercises.check(kl_of_both, test_both)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def kl_of_both(nf4_alone, cache_alone):
        return nf4_alone + cache_alone

    exercises.require(kl_of_both, test_both)

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("11_compare_methods")

# %% [markdown]
# ## Takeaways
#
# 1. **Take a method from the frontier.** On SmolLM2-135M and two CPU cores, the best 4-bit method (AWQ) needs 114 MB
#    at a KL of 0.15. A Q4_K_M file made with an importance matrix needs 104 MB at 0.06, and llama.cpp decodes it 3.5
#    times as fast.
# 2. **After the weights, the rest counts.** In 4 bits the matrix products take a smaller share of a token. A compiled
#    step of six layers gained less than a fifth and took 20 s to compile: it pays after thousands of tokens. A
#    quantized cache makes room for context; in plain PyTorch it costs about a tenth of the speed. Keys
#    want a range for each channel.
# 3. **A small test has a large error.** One of 64 questions is 1.6 points, and the standard error is about 6. The KL
#    sees what the score cannot see. Many claims of the guides hold partly or not at all, so the number stands beside
#    each.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% tags=["record"]
size = memory.weight_bytes(nets["bf16"])
records.write(
    output_dir,
    method=f"bf16-kv{cache_bits}",
    notebook="11_compare_methods",
    found=found,
    windows=windows,
    bits_per_weight=8 * size / nets["bf16"].num_parameters(),
    weight_bytes=size,
    peak_memory_bytes=used.peak_vram if found.device == "cuda" else used.peak_ram,
    scores=quality,
    in_domain=(in_domain, second),
    decode_tokens_per_s=quantized_rate,
    quantize_seconds=None,
)
