# %% [markdown]
# # 11 Compare the methods
#
# Lay all measured methods side by side, choose one for your machine, and find what is left to gain once the weights are small.
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
# 2. Find out where the time of a decoded token goes, and measure the two levers after the weights: KV cache and compiled loop.
# 3. Score the model on a test of four choices in the standard harness, and hold every checkable claim of the guides against a number.
#
# **Before you start:** [04 NF4 with bitsandbytes](04_nf4_bitsandbytes.ipynb). Run the others first to see your own numbers here;
# what you have not run stands beside the results that come with the course.

# %% tags=["bootstrap"]
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

# %%
import contextlib
import gc
import io
import os
import statistics
import time

from helpers import models

# Compiled kernels go into the course's cache; torch reads this when it is imported.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(models.cache() / "inductor"))

import pandas as pd
import torch
import yaml
from IPython.display import HTML
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DynamicCache
from transformers import QuantizedCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.utils import logging

from helpers import claims, evaluation, exercises, figures, guide, memory, notebooks, pareto, records
from helpers import reference, report, speed, tables

figures.style()
logging.disable_progress_bar()
pd.set_option("display.max_colwidth", None)

# %%
assert sort_by == "method" or sort_by in tables.COLUMNS, f"sort_by must be one of {list(tables.COLUMNS)}"
assert cache_bits in (2, 4, 8), f"cache_bits must be 2, 4 or 8, not {cache_bits}"

found = models.find(model)
tokenizer = AutoTokenizer.from_pretrained(found.path)
windows = evaluation.windows(tokenizer, tokens=eval_tokens)
baseline = evaluation.reference(found, windows)
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
second_baseline = evaluation.reference(found, in_domain)
free = memory.free_vram() if found.device == "cuda" else memory.free_ram()
# float32 and a 4-bit copy side by side: where that does not fit, bfloat16 takes the place of float32.
full = "fp32" if 6 * memory.predict(AutoConfig.from_pretrained(found.path)).parameters < free else "bf16"
print(f"{found.name} on the {found.device.upper()}, {found.origin}")


# %% [markdown]
# ## One table
#
# Each notebook left a record per method: same text, same windows, same functions. Without the two baselines no other number
# means much, so they are measured now if they are missing.
#
# Two things to know of the rows from [08 GGUF](08_gguf_llama_cpp.ipynb). Their files quantize the embeddings too, which all other 4-bit methods
# here leave in 16 bits; on a small model that is a fifth of all weights. Their quality is that of the weights: llama.cpp rounds activations
# besides, and 08 says how much that adds.

# %%
def load(dtype, **options):
    """The model from its folder, in evaluation mode."""
    options.setdefault("device_map", {"": found.device})
    return AutoModelForCausalLM.from_pretrained(found.path, dtype=dtype, **options).eval()

def scored(net, dtype, text, before):
    """`Scores` on a text; the untouched model in full precision is the baseline itself."""
    return before.scores if dtype == found.dtype else evaluation.score(net, text, before)

def measure(method, dtype):
    """Write the record of an untouched model."""
    with memory.track() as used:
        net = load(dtype)
        scores = scored(net, dtype, windows, baseline)
        second = scored(net, dtype, in_domain, second_baseline)
    size = memory.weight_bytes(net)
    records.write(output_dir, method=method, notebook="11_compare_methods", found=found, windows=windows,
                  bits_per_weight=8 * size / net.num_parameters(), weight_bytes=size,
                  scores=scores, in_domain=(in_domain, second),
                  peak_memory_bytes=used.peak_vram if found.device == "cuda" else used.peak_ram,
                  decode_tokens_per_s=speed.decode(net).decode_tokens_per_s, quantize_seconds=None)

dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
for method in dict.fromkeys([full, "bf16"]):
    if method not in records.read(output_dir):
        measure(method, dtypes[method])

# %%
measured, references = records.read(output_dir), reference.read()
expected = report.expected(references)
missing = [method for method in expected if method not in measured]
print(f"{len(measured)} methods measured here, {len(missing)} not run here")
HTML(tables.methods(measured, expected, sort_by))

# %% [markdown]
# A click on a heading sorts (so does the keyboard); `sort_by` sets the order where no script runs. A method that was **not run
# here** has no numbers: nothing is filled in for it.
#
# **KL** is measured on the course's own texts, which no method has seen; its brackets hold the 95 % interval. **KL on pydoc** is measured
# on Python's documentation, of which some methods have seen other topics. A method that gains more there than the others has
# learned the calibration text too.
#
# Beside it, the results that come with the course. Quality should agree in the third digit on any machine of one kind; speed is
# the machine's own.

# %%
columns = {}
for other in references:
    name = f"{other.device}, {other.model.split()[0]}"
    for field, head in (("kl_divergence", "KL"), ("decode_tokens_per_s", "tok/s")):
        columns[f"{head} here"] = {method: record[field] for method, record in measured.items()}
        columns[f"{head}, {name}"] = {method: record[field] for method, record in other.records.items()}
beside = pd.DataFrame(columns).sort_index(axis=1)
if not references:
    print("No results come with this copy of the course.")
beside.round(4).astype(object).where(beside.notna(), tables.NOT_MEASURED)

# %% [markdown]
# ## Two models, two rankings
#
# Is the best 4-bit method of one model the best of another? Below, each model ranks the 4-bit methods by KL, from this run or from
# what comes with the course. Two methods count as ordered only where their intervals do not overlap; else the texts do **not
# tell them apart**. `qlora` and `qlora-ddp` have no place here or in the next plots: fine-tuning is meant to leave the untouched
# model, so there KL is no loss of quality.

# %%
ranked = pareto.rankings(measured, references)
if ranked:
    fig, alt, twin = pareto.plot_rankings(ranked)
    figures.show(fig, alt=alt, table=twin)
else:
    print(pareto.differences(ranked))

# %% [markdown]
# ## Two plots
#
# A method is worth a look if no other one beats it in size without losing quality: those form the **Pareto frontier**. Where you
# have run few methods, the plots show what comes with the course instead, and say so.

# %%
enough = len([r for r in measured.values() if r["kl_divergence"] is not None]) > 3
same_model = [r for r in references if r.model.split()[0] == found.name]
committed = next(iter(same_model or references), None)
shown = measured if enough or committed is None else committed.records
whose = "this run" if shown is measured else f"reference: {committed.device}, {committed.model.split()[0]}"

def show_frontier(against):
    """The frontier against one of `pareto.AXES`, or a line that says what is missing."""
    plot = pareto.plot(list(shown.values()), against)
    if plot is None:
        print("One method makes no frontier: run another notebook first.")
        return
    fig, alt, twin = plot
    figures.show(fig, alt=f"{alt} ({whose})", table=twin.round(4))

# %%
show_frontier("weight_bytes")

# %%
show_frontier("decode_tokens_per_s")

# %% [markdown]
# The two frontiers differ: fewer bytes are not more speed. And the fastest method can be one that ruins the model, which is why
# the frontier needs a floor under quality.
#
# ## Which one for you?
#
# The guide computes what each format needs for a model of your choice (weights, scales, 4,096 tokens of KV cache, 10 % working
# space), drops what does not fit or was measured to ruin the model, and ranks the rest by what you need. With the keyboard: Tab goes
# from field to field, Space opens a list or ticks the box, arrows and Enter choose.

# %%
guide.Guide(shown)

# %% [markdown]
# Quality and speed come from the model that was measured, so for a 7B model they give the order, not the amount: larger models
# lose less. The size is exact for both.
#
# ## Where does the time go?
#
# `torch.profiler` counts every operation. The same four decoded tokens in full precision and in 4 bits:

# %%
prompt = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(0)).to(found.device)

@torch.inference_mode()
def profiled(net, steps=4):
    """Profile of `steps` decoded tokens after the prompt and a warm-up."""
    cache = DynamicCache(config=net.config)
    net(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
    token = prompt[:, :1]
    net(input_ids=token, past_key_values=cache)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (found.device == "cuda")
    with profile(activities=kinds) as events:
        for _ in range(steps):
            net(input_ids=token, past_key_values=cache)
    return events.key_averages()


# %%
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                              bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)

def kind(name):
    """Which part of a decoding step an operation belongs to."""
    parts = {"4-bit multiplication": ("4bit",), "attention": ("attention", "softmax"),
             "multiplication": ("::mm", "addmm", "::bmm", "matmul", "linear", "gemm"),
             "copies, casts, views": ("copy", "cat", "::to", "empty", "view", "reshape", "stride",
                                      "transpose", "slice", "select", "::t")}
    return next((part for part, words in parts.items() if any(word in name for word in words)),
                "element by element")

def shares(events, steps=4):
    """ms of its own and number of calls per token, for each kind of operation."""
    device = "self_device_time_total" if found.device == "cuda" else "self_cpu_time_total"
    rows = pd.DataFrame([[kind(e.key), getattr(e, device) / 1e3 / steps, e.count / steps] for e in events],
                        columns=["part", "ms a token", "calls a token"])
    return rows.groupby("part").sum()


# %%
nets = {full: load(dtypes[full]), "nf4": load(torch.bfloat16, quantization_config=four_bit)}
with contextlib.redirect_stderr(io.StringIO()):
    where = pd.concat({name: shares(profiled(net)) for name, net in nets.items()}, axis=1).fillna(0)
ms = where.xs("ms a token", axis=1, level=1)
calls = where.xs("calls a token", axis=1, level=1).sum()
where.round(2)

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(7, 2.2))
ms.T.plot.barh(stacked=True, ax=ax, color=figures.PALETTE)
ax.set(xlabel="ms a decoded token, inside operations")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
products = {name: ms.loc[ms.index.str.contains("multiplication"), name].sum() / ms[name].sum() for name in ms}
figures.show(fig, alt="Time of a decoded token by kind of operation: matrix products take "
             f"{products[full]:.0%} of {ms[full].sum():.1f} ms in {full} and {products['nf4']:.0%} of "
             f"{ms['nf4'].sum():.1f} ms in nf4.", table=ms.round(2))

# %% [markdown]
# In full precision nearly all of the time is matrix products that wait for weights to come from memory. In 4 bits that part
# shrinks, and what surrounds it does not: more calls, casts, the float output head. So the next gain is not in the weights.
#
# One claim can be tested right here: that 4 bits fall behind 16 on long inputs. (Attention over the past costs the same in both,
# so whatever the lead is, it shrinks.)

# %%
if "bf16" not in nets:
    del nets["fp32"]
    gc.collect()
    nets["bf16"] = load(torch.bfloat16)
lengths = (64, 1024)
pace = pd.DataFrame({length: {name: speed.decode(net, length, 24, runs=1).decode_tokens_per_s
                              for name, net in nets.items()} for length in lengths})
pace.columns = [f"decode tok/s after {length} tokens" for length in lengths]
short, long = (pace.loc["nf4"] / pace.loc["bf16"]).tolist()
pace.round(1)

# %% [markdown]
# ## After the weights, lever 1: the KV cache
#
# Keys and values of every token stay in memory. For long contexts and batches they outweigh a 4-bit model:

# %%
config = nets["bf16"].config
for context, batch in ((512, 1), (8192, 1), (8192, 16)):
    size = memory.predict(config, bits=4, group_size=64, context=context, batch=batch)
    print(f"{context:5} tokens x {batch:2}: cache {size.kv_cache / 1e6:7.1f} MB, "
          f"4-bit weights {size.model / 1e6:.1f} MB")


# %% [markdown]
# transformers has a quantized cache. Its integer backends are packages of their own (`optimum-quanto`, `hqq`), which this course
# does not install; its `fp8` backend needs nothing. The class is open for a backend of your own, though: two methods. Here are
# groups along the head dimension, codes packed into bytes, scale and minimum per group in 16 bits.

# %%
class GroupedCacheLayer(QuantizedLayer):
    def _quantize(self, states, axis):
        """states [batch, heads, tokens, head_dim] -> packed codes, scales, minima."""
        groups = states.float().unflatten(-1, (-1, self.q_group_size))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / (2**self.nbits - 1)).clamp_min(1e-8)
        codes = ((groups - low) / scale).round().byte().unflatten(-1, (-1, 8 // self.nbits))
        shifts = self.nbits * torch.arange(8 // self.nbits, dtype=torch.uint8, device=codes.device)
        return (codes << shifts).sum(-1, dtype=torch.uint8), scale.to(self.dtype), low.to(self.dtype)

    def _dequantize(self, packed):
        codes, scale, low = packed
        shifts = self.nbits * torch.arange(8 // self.nbits, dtype=torch.uint8, device=codes.device)
        codes = (codes.unsqueeze(-1) >> shifts & 2**self.nbits - 1).flatten(-2)
        return (codes.to(scale.dtype) * scale + low).flatten(-2)


# %%
def grouped(bits, group_size, residual=128):
    """A cache of such layers; the newest `residual` tokens stay unquantized."""
    return Cache(layers=[GroupedCacheLayer(nbits=bits, q_group_size=group_size, residual_length=residual)
                         for _ in range(config.num_hidden_layers)])

layer = grouped(cache_bits, cache_group_size).layers[0]
keys = torch.randn(1, 3, 256, 64)
layer.update(keys, keys)  # the first update quantizes everything it gets
back = layer._dequantize(layer._quantized_keys)
width = 8 * sum(part.nbytes for part in layer._quantized_keys) / keys.numel()
step = layer._quantized_keys[1].repeat_interleave(cache_group_size, -1).flatten(-2)
assert ((back - keys).abs() <= 0.51 * step + 1e-2).all(), "no value may be off by more than half a step"
print(f"{width:.2f} bits per number here (scales in {keys.dtype}); "
      f"{cache_bits + 32 / cache_group_size:.2f} with 16-bit scales")


# %% [markdown]
# The measurement keeps the course's protocol: each window of 256 tokens is read in pieces of 64, so every later piece attends to a
# quantized past. What quantization does to a past of thousands of tokens is not measured here.

# %%
class WithCache:
    """A model that reads its input piece by piece through a cache, for `evaluation.score`."""
    def __init__(self, net, make_cache, piece=64):
        self.net, self.make_cache, self.piece = net, make_cache, piece
        self.eval, self.parameters = net.eval, net.parameters

    def __call__(self, input_ids, **_):
        cache = self.make_cache()
        parts = [self.net(input_ids=piece, past_key_values=cache, use_cache=True)
                 for piece in input_ids.split(self.piece, 1)]
        parts[0].logits = torch.cat([part.logits for part in parts], 1)
        return parts[0]


# %%
caches = {
    "16 bits": (16, lambda: DynamicCache(config=config)),
    "fp8 (transformers)": (8, lambda: QuantizedCache("fp8", config)),
    "4 bits, groups of 64": (4.5, lambda: grouped(4, 64)),
    "2 bits, groups of 32": (3, lambda: grouped(2, 32)),
}
probe = windows[: len(evaluation.GENRES)]  # one window of each genre

# %%
rows = {}
for name, (width, make) in caches.items():
    scores = evaluation.score(WithCache(nets["bf16"], make), probe, baseline)
    rows[name] = [width, *scores.summary().values()]
own = f"{cache_bits} bits, groups of {cache_group_size}"
own_width = cache_bits + 32 / cache_group_size
with memory.track() as used:
    net = WithCache(nets["bf16"], lambda: grouped(cache_bits, cache_group_size))
    quality = evaluation.score(net, windows, baseline, batch_size=8)
second = evaluation.score(net, in_domain, second_baseline, batch_size=8)
rows[f"{own} (all {windows.numel():,} tokens)"] = [own_width, *quality.summary().values()]
levels = pd.DataFrame.from_dict(rows, orient="index", columns=["bits", "perplexity", "KL", "same top-1"])
levels.round(4)


# %% [markdown]
# These codes are rebuilt in PyTorch at every token, so this cache saves memory and costs time:

# %%
@torch.inference_mode()
def rate(net, make_cache, step=None, steps=16, runs=3):
    """Decoded tokens per second, median of `runs` after a warm-up; `step` is called like the model."""
    times, step = [], step or net
    for _ in range(runs):
        cache = make_cache()
        token = net(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        for n in range(steps + 2):
            if n == 2:
                _ = token.sum().item()  # on a GPU: wait
                start = time.perf_counter()
            token = step(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        _ = token.sum().item()
        times.append((time.perf_counter() - start) / steps)
    return 1 / statistics.median(times)

eager = rate(nets["bf16"], caches["16 bits"][1])
quantized_rate = rate(nets["bf16"], lambda: grouped(cache_bits, cache_group_size))
print(f"decode: 16-bit cache {eager:.1f} tok/s, {own} {quantized_rate:.1f} tok/s")


# %% [markdown]
# ## Lever 2: a static cache and a compiled step
#
# A cache that grows changes its shape at every token, and each operation is started from Python. A `StaticCache` has its full
# length from the start, so `torch.compile` can fuse the step into few kernels. It needs a C++ compiler and pays once, for every
# layer again: so the three ways are compared on the model's first six layers. (The output head, one product that
# compiling leaves as it is, takes a larger share of six layers than of thirty.)

# %%
def static():
    return StaticCache(config=config, max_cache_len=128)

net, layers = nets["bf16"], nets["bf16"].model.layers
net.model.layers, config.num_hidden_layers = layers[:6], 6
rates = {"growing cache": rate(net, caches["16 bits"][1]), "static cache": rate(net, static)}
compile_seconds = None
if compile_model:
    step = torch.compile(net.forward)
    try:
        start = time.perf_counter()
        rate(net, static, step, steps=1, runs=1)
        compile_seconds = time.perf_counter() - start
        rates["static cache, compiled"] = rate(net, static, step)
    except Exception as error:  # no compiler, or one that torch does not know
        print(f"not measured here: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
net.model.layers, config.num_hidden_layers = layers, len(layers)

# %%
loop = pd.DataFrame({"decode tok/s": rates})
loop["times the growing cache"] = loop["decode tok/s"] / rates["growing cache"]
if compile_seconds:
    saved = 1 / rates["growing cache"] - 1 / rates["static cache, compiled"]
    print(f"compiling took {compile_seconds:.0f} s, " + (
        f"worth it from {compile_seconds / saved:,.0f} tokens on" if saved > 0 else "and saves nothing here"))
    torch._dynamo.reset()
loop.round(2)

# %% [markdown]
# ## Fast 4-bit decoding on a GPU
#
# On a CPU, fewer bytes made a token faster. On a GPU they often do not, and the reason can be measured: to make one token, every
# weight is read once, so *bytes / bandwidth* is the least time it can take. How far from that is each way of decoding? The course's own
# records, of Mistral-7B's shape: another model on another machine, so they stand apart from the table at the top.

# %%
import sys

sys.path.insert(0, str(notebooks.FOLDER / "gpu"))
import summary

gpu_record = summary.read()
print(f"{gpu_record['device']}, {gpu_record['date']}: {gpu_record['model']}")
ways = pd.DataFrame(summary.ladder(gpu_record)).set_index("what")
ladder = ways[["batch 1", "limit", "share", "batch 8"]].copy()
ladder.insert(0, "weights read, GB", ways.bytes / 1e9)
ladder["share"] = ladder.share.map("{:.0%}".format)
figures.show(summary.plot(gpu_record), alt=summary.alt(gpu_record), table=ladder.round(1))

# %% [markdown]
# What loading it, answering (512 + 32 tokens) and training adapters took of that GPU's memory:

# %%
peaks = pd.DataFrame(gpu_record["memory"]).T[["weight_bytes", "loading_peak_bytes", "answering_peak_bytes"]]
peaks.columns = ["weights, GB", "peak loading, GB", "peak answering, GB"]
for tokens in ("512", "2048"):
    step_peak = gpu_record["qlora"][tokens]["peak_bytes"]
    peaks.loc[f"QLoRA, a step of {tokens} tokens", "peak training, GB"] = step_peak
(peaks / 1e9).round(2).astype(object).where(peaks.notna(), tables.NOT_MEASURED)

# %% [markdown]
# Read it from the top:
#
# - **Eager**: each of hundreds of kernels a token is started by Python. The GPU waits; weights of any size are equally slow.
# - **A CUDA graph** records the kernels of one token and starts them with a single call. Python is out of the loop.
# - **Compiled `generate`** fuses the small kernels, but `generate` itself still works between two tokens.
# - **Lean**: both, and nothing in between. Now four bits pay.
#
# What a profiler sees, per token. "Matrices" are the kernels that read weights; "idle" is time in which no kernel ran.

# %%
profiles = {way: {
    "matrices": p["kinds"]["matrices"],
    "between the matrices": sum(p["kinds"].values()) - p["kinds"]["matrices"],
    "idle": p["idle_s"],
    "bytes alone need": 1 / ways.limit[way],
} for way, p in ways.profile.dropna().items()}
(1e3 * pd.DataFrame(profiles).T).round(2).rename(columns="{}, ms".format)

# %% [markdown]
# Three gaps, in the order of what they cost in the fastest row:

# %%
parts = pd.Series(summary.gap(gpu_record))
print(f"A token of {1e3 * parts.sum():.2f} ms:")
for name, part in parts.items():
    print(f"  {1e3 * part:5.2f} ms  {part / parts.sum():4.0%}  {name}")
best, lean_fp16 = ways.iloc[-1], ways.loc["fp16, lean"]
assert best["batch 1"] > 1.5 * lean_fp16["batch 1"], "fewer bytes should pay in the lean loop"

# %% [markdown]
# ### The loop
#
# All of it is on this screen. Three small functions are compiled, the matrices are whatever the model holds (torch, torchao,
# bitsandbytes, gptqmodel), and `step` changes nothing but tensors that stay where they are: that is what makes it recordable.

# %%
import inspect
import lean_decode

for piece in (lean_decode.LeanDecoder.forward, lean_decode.LeanDecoder.step, lean_decode.LeanDecoder.capture):
    print(inspect.getsource(piece))

# %% [markdown]
# Is it the same model? Here on the default model, whatever this machine is: greedy tokens of the lean loop and of `generate`.

# %%
lean_model = load(torch.float32) if full == "fp32" else nets["bf16"]
lean_prompt = tokenizer("Quantization makes a language model", return_tensors="pt").input_ids.to(found.device)
theirs = lean_model.generate(lean_prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
theirs = theirs[:, lean_prompt.shape[1]:]
stance = "default" if found.device == "cuda" else "force_eager"  # compiling for a CPU would take longer
with torch.compiler.set_stance(stance):
    ours = lean_decode.LeanDecoder(lean_model, length=64).generate(lean_prompt, 24)
print(repr(tokenizer.decode(ours[0])))
same = (ours == theirs).float().mean().item()  # in bf16 two tokens can tie, and then either is right
print(f"{same:.0%} of the tokens are the same")
assert same == 1 or full != "fp32", "the lean loop and generate disagree"
del lean_model


# %% [markdown]
# On a GPU, the same ladder for your card, on this model: eager, then lean, then lean with torchao's int4.

# %%
def tokens_per_s(decoder, prompt, count=64):
    decoder.generate(prompt, count)  # compiles and captures
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    decoder.generate(prompt, count)
    end.record()
    end.synchronize()
    return 1e3 * count / start.elapsed_time(end)

if found.device == "cuda":
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    here = {}
    net = nets.pop("bf16")
    here["bf16, eager"] = speed.decode(net).decode_tokens_per_s
    here["bf16, lean"] = tokens_per_s(lean_decode.LeanDecoder(lean_decode.fuse(net), length=128), lean_prompt)
    quantize_(net, Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"))
    here["int4, lean"] = tokens_per_s(lean_decode.LeanDecoder(net, length=128), lean_prompt)
    display(pd.Series(here, name="tokens/s on this GPU").round(1).to_frame())
    del net
    memory.release()
    nets["bf16"] = load(torch.bfloat16)  # the lean loop has changed the other
else:
    print("No CUDA GPU here: the records above stand for one.")

# %% [markdown]
# For many users at once, do not write this loop: vLLM, SGLang and TensorRT-LLM do the same (captured graphs, static cache, Marlin kernels)
# and add paged caches and batching. For one user on one GPU, it is all there is to it.

# %% [markdown]
# ## A test with right and wrong answers
#
# KL and perplexity say how much a model changed. Whether it still *knows* things is asked by the
# [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness). Its task format is a YAML file; ours holds 64
# questions, half on quantization, half general knowledge, four choices each, so **chance is 25 %**. The harness takes the choice
# with the highest probability (`acc`) or the highest per character (`acc_norm`).

# %%
import datasets
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

logging.disable_progress_bar()
datasets.disable_progress_bars()
folder = notebooks.FOLDER / "data" / "course_questions"
task = yaml.safe_load((folder / "course_questions.yaml").read_text(encoding="utf-8"))
files = task["dataset_kwargs"]["data_files"]
files.update({split: str(folder / name) for split, name in files.items()})
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

tested = {name: harness(nets[name], [task])["course_questions"] for name in ("bf16", "nf4")}

# %%
subjects = {"all 64": None, "quantization": "quantization", "general": "general"}
answers = pd.DataFrame({(name, subject): points(samples, key) for name, samples in tested.items()
                        for subject, key in subjects.items()}, index=["acc, %", "acc_norm, %"]).T
(before, _), (after, _) = points(tested["bf16"]), points(tested["nf4"])
error = 100 * (before / 100 * (1 - before / 100) / len(tested["bf16"])) ** 0.5
changed = sum(a["acc"] != b["acc"] for a, b in zip(tested["bf16"], tested["nf4"]))
print(f"chance: 25 %; {len(tested['bf16'])} questions give a standard error of {error:.0f} points; "
      f"4 bits change {changed} answers from right to wrong or back")
answers.round(1)

# %% [markdown]
# Below chance is no paradox: who does not know takes what sounds likely, and wrong choices were written to sound likely. A small
# model knows capitals and has hardly read about quantization. A published benchmark needs the hub:
# `-p lm_eval_tasks mmlu_abstract_algebra,mmlu_world_religions`.

# %%
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
# First what this notebook measured itself. A difference of two scores on 64 questions has a wide interval.

# %%
more = calls["nf4"] / calls[full]
fallen = [100 * (bool(b["acc"]) - bool(a["acc"])) for b, a in zip(tested["bf16"], tested["nf4"])]
long_prompt = f"{long:.2f} times bf16's speed after {lengths[1]:,} tokens, {short:.2f} after {lengths[0]}"
findings = [
    claims.finding("simpler-operations", more, text=f"{more:.2f} times as many operations a token as {full}"),
    claims.finding("long-sequences", long, text=long_prompt),
    claims.finding("benchmark-drop", sum(fallen) / len(fallen), *evaluation.interval(fallen)),
]
claims.write(output_dir, notebook="11_compare_methods", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "11_compare_methods"))

# %% [markdown]
# Now every claim. `notebooks/data/claims.json` holds the guide's words, what they speak of, and the values for which they hold.
# The finding that is nearest to a claim's subject judges it: for Mistral-7B's memory and speed its shape, measured on a GPU; for its
# quality the largest real model measured, of at least 1 billion parameters. A claim without such a finding is not tested on its subject.
# A verdict whose interval crosses a threshold is too close to call.

# %%
verdicts = claims.ledger(output_dir)
print(report.counts(verdicts))
for key, title in claims.read()[0].items():
    print(f"guide {key}: {title}")
with pd.option_context("display.max_rows", None, "display.max_colwidth", None):
    display(claims.frame(verdicts))


# %% [markdown]
# ## Exercises
#
# **1 (easy).** How many tokens of KV cache fit into `free_bytes`, batch 1? Two tensors per layer, `cache_bits` per number.

# %%
def tokens_that_fit(free_bytes, layers, kv_heads, head_dim, cache_bits=16):
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
# **2 (medium).** The names on the frontier: `points` maps a method to (bytes, KL). Leave out each method that another one beats
# in one number without being worse in the other. Smallest first.

# %%
def best_of(points):
    ...


# %%
def test_frontier(function):
    small = {"a": (1, 3.0), "b": (2, 1.0), "c": (3, 2.0), "d": (4, 0.5)}
    answer = function(dict(small))
    assert answer is not None, "return a list of names"
    assert "c" not in answer, "c is larger than b and worse: b beats it"
    assert list(answer) == ["a", "b", "d"], f"expected a, b, d in this order, you have {answer}"
    assert list(function({"x": (1, 1.0), "y": (2, 1.0)})) == ["x"], "y is larger and no better: x beats it"
    real = {m: (r["weight_bytes"], max(r["kl_divergence"], pareto.FLOOR)) for m, r in shown.items()
            if r["weight_bytes"] and r["kl_divergence"] is not None and m not in pareto.FINE_TUNED}
    names = list(real)
    right = [names[n] for n in pareto.frontier(list(real.values()))]
    assert list(function(real)) == right, "right for four methods, wrong for all of this course"

exercises.check(best_of, test_frontier)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:
    def best_of(points):
        kept, least = [], float("inf")
        for name, (_, loss) in sorted(points.items(), key=lambda item: item[1]):
            if loss < least:
                kept.append(name)
                least = loss
        return kept

    exercises.require(best_of, test_frontier)

# %% [markdown]
# ## Quiz
#
# Three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("11_compare_methods")

# %% [markdown]
# ## Takeaways
#
# 1. **The table decides, and the machine decides what is in it.** Size follows from the format, quality is comparable only under one
#    protocol, and the frontiers for bytes and for speed are different methods.
# 2. **After the weights, the rest counts.** In 4 bits the matrix products are no longer nearly everything; a compiled step goes for the
#    rest (the table says whether it gained here), and a quantized cache makes room for context. In plain PyTorch it costs speed.
# 3. **A small test has a large error.** One of 64 questions is 1.6 points: KL sees what the score cannot. Many of the guides' claims
#    hold partly or not at all, which is why the number stands beside each.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% tags=["record"]
size = memory.weight_bytes(nets["bf16"])
records.write(
    output_dir, method=f"bf16-kv{cache_bits}", notebook="11_compare_methods", found=found, windows=windows,
    bits_per_weight=8 * size / nets["bf16"].num_parameters(), weight_bytes=size,
    peak_memory_bytes=used.peak_vram if found.device == "cuda" else used.peak_ram,
    scores=quality, in_domain=(in_domain, second), decode_tokens_per_s=quantized_rate, quantize_seconds=None,
)
