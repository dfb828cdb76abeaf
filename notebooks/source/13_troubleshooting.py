# %% [markdown]
# # 13 Troubleshooting
#
# Provoke the failures that readers meet, see what they really say, repair each, and find those that say nothing.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Read an error: find the line that counts, and let `explain` name the cause and the remedy.
# 2. Recognize the failures that raise nothing, by measuring what they leave behind.
# 3. Test a guide's list of DO and DO NOT line by line instead of believing it.
#
# **Before you start:** [00 Start here](00_start_here.ipynb) and [04 NF4 with
# bitsandbytes](04_nf4_bitsandbytes.ipynb).

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 8192
max_new_tokens = 12

# %% [markdown]
# ## How to read an error
#
# This is what Python prints when a function of yours calls a function of a library, and the library gives up:
#
# ~~~text
# Traceback (most recent call last):
#   File "train.py", line 12, in <module>                 3. your program: here you change something
#     net = load("my-model")
#   File "train.py", line 5, in load
#     return AutoModelForCausalLM.from_pretrained(name)
#   File ".../transformers/modeling_utils.py", line 4870  2. the library: how the program got there
#     raise OSError("my-model is no folder and no model")
# OSError: my-model is no folder and no model             1. start here: type and message
# ~~~
#
# 1. **Start at the end.** The last line has the type and the message. The frames above say how the program got there.
# 2. In a **chain** ("The above exception was the direct cause ..."), the upper error is the cause and the lower one
#    wraps it.
# 3. Change something in the last frame that is *yours*. Here that is line 5 of train.py.

# %% jupyter={"source_hidden": true}
import collections
import gc
import html
import json
import pathlib
import re
import tempfile
import time
import weakref

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown, display
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

# %% jupyter={"source_hidden": true}
from transformers.utils import logging as transformers_logging

from helpers import chat, exercises, figures, files, memory, models, process, records, speed
from helpers.diagnosis import catalogue, explain, reproductions

figures.style()
transformers_logging.disable_progress_bar()
found = models.find(model, copies=2)
tokenizer = AutoTokenizer.from_pretrained(found.path)
print(f"{found.name} on the {found.device.upper()}, {found.origin}")

# %% [markdown]
# The course does the first step for you. After an error, run `%explain` in the next cell (every notebook of this
# course has it). Outside notebooks, run `python -m helpers explain error.txt`. As the first line of a cell,
# `%%explain` shows the explanation in place of the traceback:

# %%
# %%explain
net = AutoModelForCausalLM.from_pretrained(found.path, load_in_4bit=True)

# %% [markdown]
# `%%explain` keeps the exception as `error`. We print its last line, and its frames from yours to the one that raised:

# %%
reading = explain.read(explain.as_text(error))
frames = re.findall(r'File "(?:.*/)?(.+?)", line (\d+), in (\S+)', reading.errors[-1].frames)
print("last line:", reading.errors[-1])
pd.DataFrame(frames, columns=["file", "line", "function"])

# %% [markdown]
# A traceback can carry secrets. Here a token was read from a file together with its line end. The HTTP library
# refuses the token and prints it in full. `explain` never prints a token. If you have posted such a text, **revoke
# the token**.

# %%
leaked = reproductions.provoke("token-with-newline")
print("the token stands in the traceback:", reproductions.TOKEN in leaked)
print("and in the explanation:", reproductions.TOKEN in explain.render(explain.read(leaked)))
print(explain.read(leaked).errors[-1])

# %% [markdown]
# ## The catalogue, provoked
#
# This run **provokes** every entry below, mostly on random models of two layers. The message is the library's own.
# Then `explain` must name the entry, and the repair must run. Click an entry to see the code of both. The code uses
# small helpers (`tiny_model`, `hub`) without importing them. They are in `helpers/diagnosis/reproductions/parts.py`.
#
# Three entries are staged, because the real thing would stop this notebook: `process-killed` kills a child process of
# its own, `disk-full` writes to `/dev/full`, and `bitsandbytes-missing` patches a flag of transformers. An entry that
# cannot be provoked on this machine is marked *recorded*, with the source of its message.


# %% jupyter={"source_hidden": true}
def try_entry(entry):
    """Provoke, explain and repair one entry of the catalogue; what came out, for the table and the record."""
    reason = reproductions.why_not(entry.id)
    if entry.recorded or reason:
        return {"outcome": "recorded" if entry.recorded else "not here", "reason": reason}
    started = time.perf_counter()
    text = reproductions.provoke(entry.id)
    answers = explain.explain(text)
    assert [answer.entry.id for answer in answers] == [entry.id], f"{entry.id} was explained as {answers}"
    errors = explain.read(text).errors
    result = {"outcome": "repaired", "sure": answers[0].sure, "repair": reproductions.repair(entry.id)}
    result["message"] = str(errors[-1]) if errors else explain.clean(text).strip()
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result


# %% jupyter={"source_hidden": true}
def short(text, width=300):
    """The message without folders of this machine, on few lines."""
    text = str(text).replace(tempfile.gettempdir(), "…")
    text = re.sub(r"(?<![\w:/.])/(?:[\w.@+-]+/)+", "…/", text)
    lines = [line for line in text.splitlines() if line.strip()][:4]
    return "\n".join(line[:width] + (" …" if len(line) > width else "") for line in lines)


def block(language, text):
    return f"~~~{language}\n{text}\n~~~"


# %% jupyter={"source_hidden": true}
def evidence(entry, result):
    """Code of the failure, its message, cause and repair of an entry that ran; else how it is recognized."""
    cause = f"**Cause.** {entry.cause} **Repair.** {entry.remedy}"
    if result["outcome"] != "repaired":
        signs = " or ".join(f"`{pattern.text}`" for pattern in entry.signs)
        why = result["reason"] or "Recorded from " + entry.recorded
        return [f"*{why}.* Recognized by {signs}.", cause, block("python", entry.code)]
    failure, repair = (reproductions.source(entry.id, repaired) for repaired in (False, True))
    shown = [block("python", failure), block("text", short(result["message"])), cause]
    return [*shown, block("python", repair), f"→ {short(result['repair'])}"]


def card(entry, result):
    """One entry as a foldable block of Markdown."""
    seen = html.escape(short(result.get("message", "recorded"), 90).splitlines()[0])
    head = f"<details><summary><b>{html.escape(entry.title)}</b><br><code>{seen}</code></summary>"
    link = f"`{entry.id}`, discussed at [{entry.reference.removeprefix('https://')}]({entry.reference})"
    return "\n\n".join([head, *evidence(entry, result), link, "</details>"])


# %%
outcomes = {}


def tour(topic):
    """Show every entry of one topic, those that are only measured below excepted."""
    entries = [entry for entry in catalogue.ENTRIES if entry.topic == topic]
    for entry in entries:
        if entry.recorded or entry.id in reproductions.FAILURES:
            outcomes[entry.id] = try_entry(entry)
    shown = {entry: outcomes[entry.id] for entry in entries if entry.id in outcomes}
    display(Markdown("\n\n".join(card(entry, result) for entry, result in shown.items())))
    counts = collections.Counter(result["outcome"] for result in shown.values())
    print(f"{topic}:", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


# %% [markdown]
# ### Install
#
# Most of these errors have one of two causes: **this kernel's Python is not the Python you installed into**, or two
# packages exclude each other. Install first, restart the kernel, then import. `python -m helpers doctor` compares
# everything with the pins.

# %%
tour("install")

# %% [markdown]
# ### Load
#
# A quantization config is an object, and a quantized checkpoint brings its own. For the errors of the hub (a gated
# model, a bad token), a local server answers as the hub does, so that this run needs no account.

# %%
tour("load")

# %% [markdown]
# ### Memory
#
# `CUDA out of memory` is the failure that most readers meet first. Do not guess: ask four questions in this order.
#
# ~~~text
# CUDA out of memory
# │
# ├─ 1. Does the cell run in a fresh kernel, alone?
# │     yes → an earlier cell still holds memory. Delete every name for it, or restart.
# │
# ├─ 2. Is "reserved by PyTorch but unallocated" larger than "Tried to allocate"?
# │     yes → the memory is there, in pieces. PYTORCH_ALLOC_CONF=expandable_segments:True
# │
# ├─ 3. Is much less allocated by PyTorch than the GPU has, and still nothing is free?
# │     yes → another process holds the rest. See it with nvidia-smi.
# │
# └─ 4. At which moment does it fail?
#       loading       → the weights do not fit: fewer bits, a smaller model, or offload (notebook 12)
#       long prompts  → KV cache and activations: batch 1, shorter context, quantized cache (notebook 11)
#       backward      → activations: gradient checkpointing, batch 1 with accumulation (notebook 07)
#       first step    → the optimizer: LoRA, 8-bit or paged AdamW (notebook 07)
# ~~~
#
# The message itself answers questions 2 and 3. This one has PyTorch's form, with numbers of a 24 GB card as an
# example:

# %%
message = (
    "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 23.64 GiB "
    "of which 1.20 GiB is free. Including non-PyTorch memory, this process has 22.44 GiB memory in use. "
    "Of the allocated memory 21.80 GiB is allocated by PyTorch, and 190.29 MiB is reserved by PyTorch but unallocated."
)
names = ["tried", "capacity", "free", "this process", "allocated", "in pieces"]
sizes = re.findall(r"([\d.]+) ([GM])iB", message)
numbers = {name: float(size) * {"G": 1024, "M": 1}[unit] for name, (size, unit) in zip(names, sizes, strict=True)}
pd.Series(numbers, name="MiB").round(0).to_frame()


# %%
def read_oom(numbers):
    """The branch of the tree that the numbers of a message lead to."""
    others = numbers["capacity"] - numbers["free"] - numbers["this process"]
    if numbers["in pieces"] > numbers["tried"]:
        return "2: in pieces"
    if others > numbers["this process"]:
        return "3: another process"
    share = numbers["this process"] / numbers["capacity"]
    return f"1 or 4: this process itself holds {share:.0%} of the card"


read_oom(numbers)

# %% [markdown]
# Only 190 MiB are in pieces, and 1.96 GiB were asked for. So `expandable_segments` would not help here, and neither
# would `empty_cache()`.
#
# #### A memory snapshot answers question 4
#
# **Predict first.** We train two layers of this model's shape in bfloat16 with AdamW. The weights take 1 unit. How
# many units are held after the forward pass, after `backward`, and after the first `step`?
#
# A snapshot counts each tensor's bytes once and asks who owns it. Activations are kept inside autograd, where Python
# cannot see them, so a hook counts them when they are saved.


# %%
def owned(net, optimizer):
    """{part: MB} of a model in training; what its optimizer holds appears after the first step."""
    parameters = list(net.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    parts = {"weights": parameters, "gradients": gradients, "optimizer": states}
    return {name: sum(tensor.nbytes for tensor in tensors) / 1e6 for name, tensors in parts.items()}


# %%
def counting(net, saved):
    """A context in which `saved` {address: MB} gets what a forward pass keeps for `backward`, weights excepted."""
    known = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes() / 1e6
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)


# %%
def training_snapshots(config, tokens=256, checkpointing=False):
    """What is held at four moments of the first training step: {moment: {part: MB}}."""
    net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(found.device).train()
    if checkpointing:
        net.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(net.parameters())
    ids = torch.randint(1000, (1, tokens), device=found.device)
    moments = {"loaded": owned(net, optimizer)}
    with counting(net, saved := {}):
        loss = net(input_ids=ids, labels=ids, use_cache=False).loss
    moments["after forward"] = owned(net, optimizer) | {"activations": sum(saved.values())}
    loss.backward()
    moments["after backward"] = owned(net, optimizer)
    optimizer.step()
    moments["after step"] = owned(net, optimizer)
    return moments


# %%
two_layers = AutoConfig.from_pretrained(found.path)
two_layers.num_hidden_layers = 2
if getattr(two_layers, "layer_types", None):
    two_layers.layer_types = two_layers.layer_types[:2]
snapshots = pd.DataFrame(training_snapshots(two_layers)).T.fillna(0)
snapshots.round(1)

# %%
fig, ax = plt.subplots(figsize=(7, 2.6))
snapshots.plot.barh(stacked=True, ax=ax, color=figures.PALETTE)
ax.invert_yaxis()
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
units = snapshots.sum(axis=1) / snapshots["weights"]
finding = f"After the first step, training holds {units['after step']:.1f} times the weights"
ax.set(xlabel="MB held", title=finding)
alt = f"{finding}; after the forward pass it is {units['after forward']:.1f} times, with the activations."
figures.show(fig, alt=alt, table=units.round(2).rename("times the weights").to_frame())

# %% [markdown]
# AdamW keeps two averages for each weight. So the optimizer takes twice the bytes of the weights, and it appears only
# at the **first step**. A training that survived its first `backward` can still fail a moment later.
#
# Gradient checkpointing keeps only the input of each layer and computes the rest again in `backward`. What does it
# save here?

# %%
checkpointed = pd.DataFrame(training_snapshots(two_layers, checkpointing=True)).T
activations = {
    "all kept": float(snapshots.loc["after forward", "activations"]),
    "checkpointing": float(checkpointed.loc["after forward", "activations"]),
    "logits in float32": 256 * two_layers.vocab_size * 4 / 1e6,
}
pd.Series(activations, name="MB").round(1).to_frame()

# %% [markdown]
# The logits are most of what is kept: 256 tokens times a vocabulary of 49,152. Checkpointing cannot drop them. It
# saves the activations of the layers, so it pays in deep models and on long inputs. A shorter input makes both
# smaller.

# %% [markdown]
# On a GPU, PyTorch can record every allocation with the line of Python that asked for it. This needs a CUDA GPU and
# was not run here. PyTorch documents both functions, but their underscore says that they may change:
#
# ~~~python
# torch.cuda.memory._record_memory_history()
# ...                                                  # the cell that fails
# torch.cuda.memory._dump_snapshot("snapshot.pickle")  # drop this file on https://pytorch.org/memory_viz
# ~~~
#
# The page draws the live blocks over time. A click on a block shows its line. Look for the largest block that you did
# not expect.

# %% [markdown]
# Now we run the catalogue's entries on memory.

# %%
tour("memory")


# %% [markdown]
# #### Silent: what `empty_cache` frees, and what it does not
#
# The guides' remedy for a full GPU is `torch.cuda.empty_cache()`. It returns the memory that PyTorch keeps in
# reserve. It cannot free a tensor that still has a **name**, and some names are easy to forget: a second variable,
# Jupyter's `Out`, the traceback of the last error.


# %%
def held():
    """MB in use: (allocated, reserved) of the GPU, or resident memory on a CPU."""
    if found.device == "cuda":
        return torch.cuda.memory_allocated() / 1e6, torch.cuda.memory_reserved() / 1e6
    return memory.resident() / 1e6, None


def work():
    """A cell that fails with something large in its hands."""
    weights = torch.ones(100_000_000, device=found.device)
    raise ValueError(f"something went wrong with {weights.numel():,} weights")


# %%
steps = {"before": held()}
big = torch.ones(100_000_000, device=found.device)
steps["400 MB allocated"] = held()
torch.cuda.empty_cache()
steps["empty_cache(), name still there"] = held()
del big
steps["del"] = held()
torch.cuda.empty_cache()
steps["del, then empty_cache()"] = held()

# %%
try:
    work()
except ValueError as error:
    kept_error = error  # what sys.last_exc does after every error in a notebook
gc.collect()
torch.cuda.empty_cache()
steps["after an error, gc.collect(), empty_cache()"] = held()
kept_error = None
gc.collect()
torch.cuda.empty_cache()
steps["the error forgotten"] = held()
cleared = pd.DataFrame(steps, index=["in use, MB", "reserved, MB"]).T.dropna(axis=1)
cleared.round(0)

# %%
base = steps["before"][0]
gained = {step: use[0] - base for step, use in steps.items()}
assert gained["empty_cache(), name still there"] > 300 and gained["del"] < 100
assert gained["after an error, gc.collect(), empty_cache()"] > 300 > 100 > gained["the error forgotten"]
print("empty_cache() frees nothing that has a name; an error keeps its whole stack alive")

# %% [markdown]
# #### Silent: a quantized model loaded twice
#
# A second run of a loading cell builds the new model **before** the name lets go of the old one. So both are in
# memory for a moment. We count the weights at the peak of the second load:

# %%
alive = weakref.WeakSet()  # forgets what nothing else refers to


def load_4bit():
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": {"": found.device}}
    loaded = AutoModelForCausalLM.from_pretrained(found.path, **options)
    alive.add(loaded)
    return loaded


# %%
def weights_alive():
    """MB of the weights of those models that anything still refers to."""
    gc.collect()
    return sum(memory.weight_bytes(item) for item in alive) / 1e6


# %%
quantized = load_4bit()
once = weights_alive()
other = load_4bit()  # what stands to the right of `quantized = ...` in a second run, before the name moves
twice = weights_alive()
del other
quantized = None  # the remedy: let go first
gc.collect()
quantized = load_4bit()
again = weights_alive()
print(f"loaded once {once:.0f} MB; run again {twice:.0f} MB; let go first, then again {again:.0f} MB")
assert twice > 1.9 * once > 1.8 * again

# %% [markdown]
# #### Silent: `device_map` spills to the disk
#
# `device_map="auto"` does not raise an error when a 16-bit model does not fit. With half of the memory that the model
# needs, it reads the rest from disk, layer by layer, for every token. Only `hf_device_map` tells you. (A *quantized*
# model does raise: the entry `modules-on-cpu-or-disk` above provoked that error.)

# %%
size = sum(path.stat().st_size for path in pathlib.Path(found.path).glob("*.safetensors"))
limit = {0: size // 2, "cpu": 0} if found.device == "cuda" else {"cpu": size // 2}
limit

# %%
rates, places = {}, {}
with reproductions.quiet():
    for name, options in {"fits": {}, "half of it fits": {"max_memory": limit}}.items():
        candidate = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.bfloat16, device_map="auto", **options)
        where = getattr(candidate, "hf_device_map", {"": str(candidate.device)})
        places[name] = dict(collections.Counter(map(str, where.values())))
        rates[name] = speed.decode(candidate, prompt_tokens=16, new_tokens=4).decode_tokens_per_s
        del candidate

# %%
spill = pd.DataFrame({"modules on": places, "decode tok/s": rates}).round(2)
assert "disk" in places["half of it fits"], places
spill

# %% [markdown]
# ### Generate

# %%
tour("generate")


# %% [markdown]
# #### Silent: two BOS tokens
#
# BOS is the token that begins a text. The chat templates of Llama and Mistral write a BOS into the text, and their
# tokenizers put another one in front of every text. Together these are two, and the model was never trained on two.
# We count them with a small tokenizer built like theirs, and with the model of this run:


# %%
def count_bos(tok, ids):
    return sum(int(number == tok.bos_token_id) for number in ids[:2])


# %%
mistral_like = reproductions.tiny_tokenizer(bos=True, chat_template=reproductions.MISTRAL)
conversation = [{"role": "user", "content": "hi"}]
rows = {}
for name, tok in {"like Mistral's": mistral_like, found.name: tokenizer}.items():
    text = tok.apply_chat_template(conversation, tokenize=False)
    rows[name] = [
        count_bos(tok, tok(text).input_ids),
        count_bos(tok, tok(text, add_special_tokens=False).input_ids),
        count_bos(tok, chat.render(tok, conversation)),
    ]
double_bos = pd.DataFrame(rows, index=["text, then tokenizer", "add_special_tokens=False", "helpers.chat"])
assert double_bos["like Mistral's"].tolist() == [2, 1, 1]
double_bos

# %% [markdown]
# #### Silent: padding on the right
#
# Generation continues after the last position of a row. If the last position is padding, the model continues the
# padding. **Predict first:** of three prompts of different lengths, how many get the same answer in a batch padded on
# the right as alone?

# %%
net = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.dtype).to(found.device).eval()
prompts = ["The capital of France is", "Water boils at a temperature of", "Once upon a time in a small village, there"]
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token


def answers(texts, side):
    """Greedy continuations of a batch padded on one side."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side).to(found.device)
    with reproductions.quiet():
        output = net.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    return tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


# %%
alone = [answers([prompt], "left")[0] for prompt in prompts]
padded = pd.DataFrame({side: answers(prompts, side) for side in ("left", "right")}, index=prompts)
padded.insert(0, "alone", alone)
same = {side: int((padded[side] == padded["alone"]).sum()) for side in ("left", "right")}
print(f"of {len(prompts)} answers, identical to the one alone: {same}")
assert same["left"] > same["right"]
padded

# %% [markdown]
# #### Silent: a model that never stops
#
# Guides set `pad_token = eos_token`. That is harmless for generation. In **training**, the collator masks every
# padding token in the labels. It also masks the end token then, so the model never learns to stop. We train a
# two-layer model twice on the same sentences:

# %%
from transformers import DataCollatorForLanguageModeling

sentences = ["the cat sat on the mat .", "the dog is up .", "the sun is down .", "a cat is a cat .", "hi dog ."]


def train(pad_token, steps=150):
    """A tiny model that has learned the sentences, each followed by the end token."""
    tok, tiny = reproductions.tiny_tokenizer(pad_token=pad_token), reproductions.tiny_model().train()
    rows = [{"input_ids": tok(f"<s> {sentence} </s>").input_ids} for sentence in sentences]
    batch = DataCollatorForLanguageModeling(tok, mlm=False)(rows)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = tiny(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ends = int((batch["labels"] == tok.eos_token_id).sum())
    return tiny.eval(), tok, ends


# %%
rows = {}
for pad_token in ("</s>", "<pad>"):
    tiny, tok, ends = train(pad_token)
    start = tok("<s> hi", return_tensors="pt")
    output = tiny.generate(**start, max_new_tokens=20, do_sample=False, pad_token_id=tok.pad_token_id)[0]
    rows[pad_token] = [ends, tok.eos_token_id in output[1:], tok.decode(output)]
never = pd.DataFrame.from_dict(rows, orient="index", columns=["ends in the labels", "stopped", "answer"])
never.index.name = "pad_token"
assert never["stopped"].tolist() == [False, True]
with pd.option_context("display.max_colwidth", None):
    display(never)

# %% [markdown]
# ### Quantize

# %%
tour("quantize")

# %% [markdown]
# #### Silent: 4-bit weights multiplied in float32
#
# `bnb_4bit_compute_dtype` is float32 unless you say otherwise. On a GPU, float32 does not use the fast tensor cores.
# On a CPU, bitsandbytes may have a kernel of its own that ignores the setting in evaluation mode. We time one layer
# of 2048 x 2048:

# %%
from bitsandbytes.nn import Linear4bit


def milliseconds(compute_dtype, tokens, training, repeat=5):
    """Median time of one forward pass."""
    layer = Linear4bit(2048, 2048, bias=False, compute_dtype=compute_dtype, quant_type="nf4").to(found.device)
    layer.train(training)
    x, times = torch.randn(tokens, 2048, device=found.device, dtype=compute_dtype), []
    with torch.no_grad():
        for _ in range(repeat + 2):
            started = time.perf_counter()
            layer(x)
            torch.cuda.synchronize() if found.device == "cuda" else None
            times.append(1000 * (time.perf_counter() - started))
    return sorted(times[2:])[repeat // 2]


# %%
print("the default:", BitsAndBytesConfig(load_in_4bit=True).bnb_4bit_compute_dtype)
compute = pd.DataFrame(
    {
        f"{tokens} tokens, {'training' if training else 'evaluation'}": {
            str(dtype): milliseconds(dtype, tokens, training) for dtype in (torch.float32, torch.bfloat16)
        }
        for training in (False, True)
        for tokens in (1, 256)
    }
).T
compute["float32 / bfloat16"] = compute["torch.float32"] / compute["torch.bfloat16"]
compute.round(2)

# %% [markdown]
# #### Silent: autoawq on a CPU
#
# autoawq's search tries 20 scalings of a layer's weights. After each one it puts the weights back from `{k: v.cpu()
# ...}`. On a GPU, `v.cpu()` is a copy. On a CPU it is **the same tensor**, which is scaled already. We run its own
# search on one layer of this model, and once more with a copy. `_compute_best_scale` is a private name, because
# autoawq has no public call for one layer. 0.2.9 is autoawq's last version, so the name will stay:

# %%
with reproductions.quiet():
    from awq.quantize.quantizer import AwqQuantizer

real = net.get_submodule("model.layers.0.mlp.up_proj").weight.detach().float().cpu()
text = "Quantization maps numbers to a small set of levels. " * 8
text_ids = tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad():
    x = net.model.embed_tokens(text_ids.to(found.device))[0].float().cpu()


# %%
def search(saved):
    """AwqQuantizer's scale search on one layer; relative change of its weight, which should be zero."""
    awq = object.__new__(AwqQuantizer)
    vars(awq).update(
        w_bit=4, group_size=64, zero_point=True, duo_scaling=True, max_chunk_memory=2**30, n_parallel_calib_samples=None
    )
    layer = torch.nn.Linear(*reversed(real.shape), bias=False).requires_grad_(False)
    layer.weight.copy_(real)
    if saved == "copied":
        layer.state_dict = lambda: {name: value.clone() for name, value in layer.named_parameters()}
    groups = real.view(-1, 64).abs()
    w_mean = (groups / groups.amax(1, keepdim=True)).view_as(real).mean(0)
    awq._compute_best_scale(x, w_mean, x.abs().mean(0), layer, [layer], layer(x))
    return ((layer.weight - real).norm() / real.norm()).item()


# %%
ruined = {saved: search(saved) for saved in ("as autoawq does", "copied")}
print({saved: f"weight changed by {change:.1%}" for saved, change in ruined.items()})
assert ruined["copied"] == 0 < 0.02 < ruined["as autoawq does"], ruined

# %% [markdown]
# Over a whole model, the result is a garbage checkpoint that loads without an error (notebook 06 measures it).
# `helpers.archived` repairs it.
#
# ### Train

# %%
tour("train")

# %% [markdown]
# #### Silent: a 4-bit model that learns nothing
#
# On a CPU with AVX512-BF16, the first forward pass in evaluation mode repacks the 4-bit weights for inference. A
# repacked layer passes **no gradient** on, so an adapter in front of such a layer gets none. With adapters on
# `q_proj` and `v_proj`, as in the guides, no adapter learns. With adapters everywhere, some still learn, and the loss
# falls less. We compare a fresh model with one that has answered once:

# %%
from bitsandbytes.functional import has_avx512bf16


def losses(target_modules, used_before, steps=40):
    """Training loss of LoRA adapters on a 4-bit model of two layers."""
    tiny = reproductions.tiny_4bit(bnb_4bit_compute_dtype=torch.bfloat16).to(found.device)
    ids = torch.randint(3, 30, (4, 16), generator=torch.manual_seed(0)).to(found.device)
    if used_before:
        with torch.no_grad():
            tiny.eval()(ids)
    tiny = reproductions.lora(tiny, target_modules=target_modules, r=16).train()
    optimizer, history = torch.optim.AdamW([p for p in tiny.parameters() if p.requires_grad], lr=2e-2), []
    for _ in range(steps):
        loss = tiny(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


# %%
with reproductions.quiet():
    curves = pd.DataFrame(
        {
            (name, "after one answer" if used else "fresh"): losses(targets, used)
            for name, targets in {"q and v": ["q_proj", "v_proj"], "all-linear": "all-linear"}.items()
            for used in (False, True)
        }
    )
repacks = found.device == "cpu" and bool(has_avx512bf16())
print(f"this machine repacks: {repacks}")
drop = curves.iloc[0] - curves.iloc[-1]
assert drop["q and v", "fresh"] > 0.02, drop
assert not repacks or abs(drop["q and v", "after one answer"]) < 0.001, drop
curves.iloc[[0, 1, 10, -1]].round(4)

# %% [markdown]
# ### Save

# %%
tour("save")

# %% [markdown]
# ### Colab and Jupyter
#
# The guide for Colab starts with `!python setup_mistral_colab.py` and does not contain that script, so its first cell
# stops with "No such file or directory". Its second version, the `pip install` lines, pins packages of 2023.
#
# After an installation, **restart the runtime**. A package that is loaded stays loaded in its old version. A restart
# also ends the process and frees all of its memory, on the GPU too.

# %%
tour("colab")

# %%
import subprocess
import sys

import psutil

code = "import time; block = b'x' * 400_000_000; print('ready', flush=True); time.sleep(60)"
kernel = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True)
kernel.stdout.readline()
process = psutil.Process(kernel.pid)
restart_held = process.memory_info().rss / 1e6
kernel.kill()
kernel.wait()
restart_left = psutil.pid_exists(kernel.pid)
print(f"a process with {restart_held:.0f} MB; after it ended, it is there: {restart_left}")

# %% [markdown]
# ### All of it in one table

# %%
measured = {
    "loaded-twice": f"{once:.0f} MB became {twice:.0f} MB",
    "double-bos": f"{double_bos.iloc[0, 0]} BOS tokens",
    "never-stops": f"{never['ends in the labels'].iloc[0]} ends in the labels",
    "autoawq-garbage-on-cpu": f"weight changed by {ruined['as autoawq does']:.0%}",
    "learns-nothing": f"loss fell by {drop['q and v', 'after one answer']:.3f} (fresh: {drop['q and v', 'fresh']:.3f})",
}
outcomes |= {name: {"outcome": "measured", "message": text} for name, text in measured.items()}
assert set(outcomes) == set(catalogue.BY_ID), set(catalogue.BY_ID) ^ set(outcomes)
summary = pd.DataFrame([{"topic": entry.topic, "entry": entry.id, **outcomes[entry.id]} for entry in catalogue.ENTRIES])
pd.crosstab(summary["topic"], summary["outcome"], margins=True).reindex([*catalogue.TOPICS, "All"])

# %%
provoked = summary[summary["outcome"].isin(["repaired", "measured"])]
print(f"{len(provoked)} of {len(summary)} entries were provoked here; the slowest:")
assert len(provoked) >= 35
provoked.nlargest(3, "seconds")[["entry", "seconds"]]

# %% [markdown]
# ## What the guides claim
#
# A guide to Mistral-7B in 4 bits on Colab ends with a list of DO and DO NOT. We run each line of it here. We start
# with what it says not to do:

# %%
# %%explain
quantized.to(torch.float16)

# %%
moved_to = quantized.to(found.device).device  # until transformers 5 this raised
plain = AutoModelForCausalLM.from_pretrained(found.path)
default_compute = BitsAndBytesConfig(load_in_4bit=True).bnb_4bit_compute_dtype
with reproductions.quiet(), reproductions.listening() as heard:
    old_name = AutoModelForCausalLM.from_pretrained(found.path, torch_dtype=torch.float16)
text = tokenizer.apply_chat_template(conversation, tokenize=False)
error = quantized = None  # the error kept the model alive, as seen above

# %%
from helpers.publishing import claims


def kind(name):
    """Type of the error that an entry of the catalogue raised above."""
    return outcomes[name].get("message", "no error").split(":")[0]


stays, half = gained["empty_cache(), name still there"], "half of it fits"
slower = rates["fits"] / rates[half]
refusals = (moved_to is None) + (kind("move-8bit") == "ValueError")
implicit = 0.5 * (plain.dtype == torch.float32) + 0.5 * (default_compute == torch.float32)

# %%
dont = [
    claims.finding(
        "colab-to-cuda", refusals / 2, text=f"4 bits: moved to {moved_to}; 8 bits: .cuda() raises {kind('move-8bit')}"
    ),
    claims.finding(
        "colab-load-in-4bit", int(kind("load-in-4bit") == "TypeError"), text=f"raises {kind('load-in-4bit')}"
    ),
    claims.finding(
        "colab-versions",
        int(kind("auto-gptq-import") == "ImportError"),
        text=f"auto-gptq 0.7.1 with transformers 5 raises {kind('auto-gptq-import')}",
    ),
    claims.finding(
        "colab-dtype", implicit, text=f"without it: {plain.dtype}, as saved; 4-bit compute is in {default_compute}"
    ),
]

# %%
works = outcomes["load-in-4bit"]["repair"]
quiet = not heard.about("torch_dtype")
spills = [("disk" in places[name]) for name in ("fits", half)]
do = [
    claims.finding("colab-config", int("Linear4bit" in works), text=works),
    claims.finding(
        "colab-float16",
        0.5 * (old_name.dtype == torch.float16) + 0.5 * quiet,
        text=f"{old_name.dtype}; says {heard.about('torch_dtype')!r}",
    ),
    claims.finding(
        "colab-device-map",
        1 - sum(spills) / 2,
        text=f"memory for half of it: {places[half]}, {slower:.1f} times slower, no error",
    ),
]

# %%
like_alone = same["right"] / len(prompts)
padding = (
    f"without a padding token, as in Mistral: {kind('no-padding-token')}; padded on the right "
    f"{same['right']} of {len(prompts)} answers are those given alone, on the left {same['left']}"
)
rest = [
    claims.finding("colab-empty-cache", stays / 400, text=f"{stays:.0f} MB of 400 MB stay while a name holds them"),
    claims.finding("colab-restart", int(not restart_left), text=f"{restart_held:.0f} MB of a process gone with it"),
    claims.finding("colab-padding", like_alone, text=padding),
    claims.finding("colab-inst", int("[INST]" in text), text=f"this model's template begins with {text[:22]!r}"),
]
findings = [*dont, *do, *rest]
claims.write(output_dir, notebook="13_troubleshooting", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "13_troubleshooting"))

# %% [markdown]
# What to do instead, where the guide's advice does not hold or holds partly:
#
# | the guide | do this |
# |---|---|
# | `model.to('cuda')` | Set `device_map` when you load the model. |
# | `torch_dtype=` | Write `dtype=`; for 4 bits also set `bnb_4bit_compute_dtype`, whose default is float32. |
# | `device_map="auto"` | Look at `hf_device_map` after loading: parts on the disk raise no error. |
# | `empty_cache()` | Delete every name that holds the model first. |
# | `tokenizer(prompts, padding=True)` | Set `padding_side="left"`, and a padding token where there is none. |
# | `[INST]` by hand | Call `apply_chat_template`: it knows the model's own format. |


# %% [markdown]
# ## Exercises
#
# **1 (easy).** The answer takes one or two lines. Predict first. The two layers from the memory snapshot keep
# `kept_mb` of activations for an input of 256 tokens, and `room_mb` are free for activations. Return the longest
# input that fits, in whole steps of 64 tokens. The check trains with your number, and with 64 tokens more.


# %%
def longest_input(kept_mb, room_mb):
    """Tokens, a multiple of 64."""
    ...


# %% jupyter={"source_hidden": true}
def activations_mb(tokens):
    """MB that the forward pass keeps for `backward`, measured."""
    return float(training_snapshots(two_layers, tokens)["after forward"]["activations"])


# %%
def test_longest(function):
    kept_mb = activations["all kept"]
    for room_mb in (0.9 * kept_mb, 1.6 * kept_mb):
        tokens = function(kept_mb, room_mb)
        assert tokens is not None, "return a number of tokens"
        assert tokens % 64 == 0, f"whole steps of 64 tokens, you have {tokens}"
        assert 0 < tokens < 2048, f"{room_mb:.0f} MB for {tokens} tokens, where 256 need {kept_mb:.0f}?"
        needed = activations_mb(int(tokens))
        assert needed <= room_mb, f"out of memory: {tokens} tokens keep {needed:.0f} MB, {room_mb:.0f} are free"
        more = activations_mb(int(tokens) + 64)
        assert more > room_mb, f"{tokens + 64} tokens keep only {more:.0f} MB, and {room_mb:.0f} are free"
        print(f"{room_mb:.0f} MB free: {tokens} tokens keep {needed:.0f} MB, {tokens + 64} would keep {more:.0f}")


exercises.check(longest_input, test_longest)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def longest_input(kept_mb, room_mb):
        return int(256 * room_mb / kept_mb) // 64 * 64  # activations grow with the tokens, weights do not

    exercises.require(longest_input, test_longest)


# %% [markdown]
# **2 (medium).** The answer takes one line. Predict first. A layer with `megabytes` of float32 weights is trained
# with AdamW. Predict how many MB its weights, gradients and optimizer hold together at each of three moments. The
# check measures them.


# %%
def held_mb(megabytes, moment):
    """moment: "loaded", "after backward" or "after step"."""
    ...


# %%
def measured_mb(size):
    """{moment: MB} of a float32 layer of size x size, by the snapshot from above."""
    layer = torch.nn.Linear(size, size, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    moments = {"loaded": sum(owned(layer, optimizer).values())}
    layer(torch.ones(1, size)).sum().backward()
    moments["after backward"] = sum(owned(layer, optimizer).values())
    optimizer.step()
    moments["after step"] = sum(owned(layer, optimizer).values())
    return moments


# %%
def test_held(function):
    for size in (200, 1000):
        moments = measured_mb(size)
        for moment, real in moments.items():
            answer = function(moments["loaded"], moment)
            assert answer is not None, "return a number of MB"
            assert abs(answer - real) < 0.02 * real, f"{moment}: you expect {answer:.1f} MB, measured {real:.1f} MB"


exercises.check(held_mb, test_held)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def held_mb(megabytes, moment):
        return megabytes * {"loaded": 1, "after backward": 2, "after step": 4}[moment]

    exercises.require(held_mb, test_held)


# %% [markdown]
# **3 (hard).** The answer takes about twelve lines. Find out who keeps a model alive. Return the names in a dict
# (such as `globals()`) through which an object can still be reached: directly, as an element of a list or tuple, or
# through the frames of an exception's traceback.


# %%
def holders(namespace, target):
    """Names through which the target can be reached."""
    ...


# %%
def test_holders(function):
    target = torch.nn.Linear(2, 2)
    try:
        inner = target
        raise ValueError("kept")
    except ValueError as caught:
        kept = caught
    names = {"net": target, "backup": [1, target], "text": "net", "kept": kept, "x": 3}
    answer = function(names, target)
    assert answer is not None, "return a list of names"
    assert "net" in answer, "the name itself"
    assert not {"text", "x"} & set(answer), "names that have nothing to do with it"
    assert "backup" in answer, "an element of a list keeps it alive too"
    assert "kept" in answer, "follow error.__traceback__: each tb_frame has f_locals, tb_next is the next one"


exercises.check(holders, test_holders)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def holders(namespace, target):
        def holds(value):
            if value is target:
                return True
            if isinstance(value, (list, tuple)):
                return any(item is target for item in value)
            step = getattr(value, "__traceback__", None)
            while step is not None:
                if any(local is target for local in step.tb_frame.f_locals.values()):
                    return True
                step = step.tb_next
            return False

        return [name for name, value in namespace.items() if holds(value)]

    exercises.require(holders, test_holders)

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("13_troubleshooting")


# %% [markdown]
# ## Takeaways
#
# 1. **Read the last line first, then the upper half of a chain.** `%explain` or `python -m helpers explain` does
#    both. It says how sure it is, and it says when it does not know.
# 2. **Ask at which moment the memory ran out.** Training with AdamW holds four times the weights after its first
#    step. The message tells whether memory is in pieces, and the snapshot tells who holds it.
# 3. **A run without an error can be wrong, and advice gets old.** Count the BOS tokens and the ends in the labels.
#    Look at `hf_device_map` and at the first two losses. Measure every quantized model before you keep it. Of the
#    eleven lines of the guide, four hold, four hold partly, one does not, and two were not tested on their subject.
#
# <!-- navigation -->
# <!-- /navigation -->


# %% tags=["record"]
def plain_text(result):
    texts = {key: short(value) if isinstance(value, str) else value for key, value in result.items()}
    return {key: value for key, value in texts.items() if value is not None}


record = {
    "notebook": "13_troubleshooting",
    "device": records.device_name(found.device),
    "versions": records.versions(),
    "entries": {name: plain_text(result) for name, result in outcomes.items()},
}
path = files.folder(output_dir) / "troubleshooting.json"
files.write_text(path, explain.redact(json.dumps(record, indent=1)) + "\n")
print(f"{path.name}: {len(record['entries'])} entries, {len(provoked)} provoked on this machine")
