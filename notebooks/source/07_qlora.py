# %% [markdown]
# # 07 QLoRA
#
# Fine-tune a model whose weights are frozen in 4 bits, see what it learns and what it forgets, and know what a 7B model will need.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Write LoRA on a 4-bit layer yourself, with the outputs and gradients of peft.
# 2. Fine-tune with the Trainer so that a run cannot fail silently, survives a kill, and is measured before and after.
# 3. Save, reload and merge the adapter, and compute line by line what a 7B model needs.
#
# **Before you start:** [04 NF4 with bitsandbytes](04_nf4_bitsandbytes.ipynb) for the 4-bit format. Folded cells are
# plumbing and checks; skip them on a first reading.

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
data_file = ""  # your own JSON lines with "question" and "answer"; "" takes the course's
target_modules = "all-linear"  # or a list of names; the guide's are tried first in any case
r = 16
lora_alpha = 32
learning_rate = 0.0  # 0: chosen by the model's width
steps = 32
batch_size = 4
max_new_tokens = 40
seed = 0

# %% jupyter={"source_hidden": true}
import contextlib
import hashlib
import io
import json
import logging
import pathlib
import shutil
import tempfile
import warnings

# %% jupyter={"source_hidden": true}
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names an optional kernel at import
import bitsandbytes as bnb
import datasets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

import helpers
from helpers import chat, checkpoints, evaluation, exercises, figures, files, memory, models, records, speed, training
from helpers.process import headless

# %%
figures.style()
datasets.disable_progress_bars()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
# transformers 5.23 renames gradient_checkpointing to activation_checkpointing; peft still uses the old name.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

# %% [markdown]
# We quantize the model to 4 bits as in [04](04_nf4_bitsandbytes.ipynb), once, and save it. This notebook needs it
# fresh several times.

# %%
assert steps >= 4 and steps % 2 == 0, "steps must be even and at least 4: the run is interrupted half-way"
assert r > 0 and batch_size > 0, "r and batch_size must be positive"
found = models.find(model, copies=2)
models.decoder.require(found, ["self_attn.q_proj", "self_attn.v_proj"])
tokenizer = AutoTokenizer.from_pretrained(found.path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

# %%
# GPUs before Ampere (a T4, for one) have no bfloat16 of their own.
# A CPU that only emulates it computes in float32.
half = found.fast
if found.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
    half = torch.float16
print(f"{found.name} on the {found.device.upper()}, {found.origin}")


# %%
def quantize_4bit(path):
    """The model in NF4, computing in 16 bits where the machine can."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=half, **settings)
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=nf4, dtype=half, device_map={"": found.device}
    )


# %%
quantized = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
quantize_4bit(found.path).save_pretrained(quantized.name)


def load_4bit():
    """The quantized model from the disk: the same codes each time."""
    return AutoModelForCausalLM.from_pretrained(quantized.name, dtype=half, device_map={"": found.device})


# %%
net = load_4bit().train()
width, middle = net.config.hidden_size, net.config.num_hidden_layers // 2  # middle: a layer to look at
weight_bytes = memory.weight_bytes(net)
print(f"{weight_bytes / 1e6:.0f} MB of weights, {net.config.num_hidden_layers} layers")


# %% [markdown]
# ## The idea: leave the weights, add a thin correction
#
# **Why not train the 4-bit weights?** A 4-bit weight can only be one of 16 levels. A gradient step is far smaller
# than the gap to the next level, so rounding undoes it. We take three weights of one block and a
# step of 0.001 each:


# %%
def through_nf4(values):
    """Round to NF4 and restore."""
    return bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(values, quant_type="nf4"))


stored_block = through_nf4(0.02 * torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
stepped = through_nf4(stored_block + 0.001 * torch.where(stored_block.abs() < stored_block.abs().max(), 1, 0))
pd.DataFrame({"stored": stored_block[0, :3], "after a step of 0.001": stepped[0, :3]}).round(4)

# %% [markdown]
# **LoRA** ([arXiv:2106.09685](https://arxiv.org/abs/2106.09685)) freezes the weight W and adds the product of two
# thin matrices beside it. An example small enough to do by hand: W is 3 x 3, A is 1 x 3, B is 3 x 1. B A is a full 3
# x 3 matrix, made of 6 numbers.

# %%
W = torch.eye(3)
A = torch.tensor([[1.0, 0.0, -1.0]])
B = torch.tensor([[0.5], [0.0], [1.0]])
W + B @ A

# %% [markdown]
# In a real layer the saving is large. The picture is drawn to scale for one square layer of this model, with rank r =
# 16:

# %% jupyter={"source_hidden": true}
rank = 16
fig, ax = plt.subplots(figsize=(7, 2.6))
shapes = {"W, frozen, 4 bits": (width, width), "B": (width, rank), "A": (rank, width)}
left = 0
for (name, (rows, columns)), color in zip(shapes.items(), figures.PALETTE):
    ax.add_patch(plt.Rectangle((left, width - rows), columns, rows, color=color))
    ax.annotate(f"{name}\n{rows} x {columns}", (left, -0.04 * width), va="top")
    left += columns + 0.5 * width
adapter_share = 2 * rank / width
ax.set(xlim=(0, left), ylim=(-0.3 * width, width), aspect="equal")
ax.set_title("Only the two thin matrices are trained")
ax.axis("off")
sizes = pd.DataFrame({name: [a * b] for name, (a, b) in shapes.items()}, index=["numbers"]).T
figures.show(
    fig,
    alt=f"To scale: a weight of {width} x {width}, and two thin matrices of rank {rank}, which "
    f"hold {adapter_share:.1%} as many numbers.",
    table=sizes,
)


# %% [markdown]
# ## LoRA from scratch, on one 4-bit layer
#
# - `y = W x + (alpha / r) · B A x`, with A of shape [r, in] and B of shape [out, r].
# - B starts at zero, so training starts from exactly the base model.


# %%
class LoRALinear(torch.nn.Module):
    """A frozen layer with a trainable low-rank correction beside it."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        torch.nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.scale = alpha / r

    def forward(self, x):
        return self.base(x) + (x @ self.A.T) @ self.B.T * self.scale


# %% [markdown]
# We compare with peft on the same layer, with the same A and B. B is not zero here, or the comparison would be too
# easy.

# %%
guide_config = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",  # not in the guide: peft then knows what `generate` is
)

# %%
adapted = get_peft_model(net, guide_config)
theirs = adapted.base_model.model.model.layers[middle].self_attn.q_proj.eval()  # eval: no dropout
mine = LoRALinear(theirs.base_layer, r=16, alpha=32)
with torch.no_grad():
    theirs.lora_B.default.weight.normal_(std=0.02)
    mine.A.copy_(theirs.lora_A.default.weight)
    mine.B.copy_(theirs.lora_B.default.weight)

# %%
x = torch.randn(2, 64, net.config.hidden_size, device=found.device, requires_grad=True)
for layer in (mine, theirs):
    layer.out = layer(x)
    layer.out.square().mean().backward()
compared = {
    "output": (mine.out, theirs.out),
    "gradient of A": (mine.A.grad, theirs.lora_A.default.weight.grad),
    "gradient of B": (mine.B.grad, theirs.lora_B.default.weight.grad),
}
for name, (ours, other) in compared.items():
    gap = (ours - other).abs().max().item()
    print(f"{name:14} {list(ours.shape)!s:14} largest difference to peft {gap:.1e}")
    assert torch.allclose(ours, other, rtol=1e-4, atol=1e-6), f"{name} differs from peft's"
assert theirs.base_layer.weight.grad is None, "the 4-bit weight must not get a gradient"


# %% [markdown]
# The gradient passes *through* the 4-bit weight (restored to 16 bits for the product) and stops at A and B.
#
# ## Which layers
#
# The guide adapts `q_proj` and `v_proj`, as the LoRA paper did. QLoRA
# ([arXiv:2305.14314](https://arxiv.org/abs/2305.14314), section 4) found that adapters on **all** Linear layers are
# needed to match full fine-tuning.


# %%
def trainable(net):
    """{name: tensor} of what the optimizer would change."""
    return {name: tensor for name, tensor in net.named_parameters() if tensor.requires_grad}


# %%
total = memory.predict(net.config).parameters
rows = {}
for targets in (["q_proj", "v_proj"], "all-linear"):
    net = adapted.unload()
    adapted = get_peft_model(net, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
    count = sum(tensor.numel() for tensor in trainable(adapted).values())
    rows[", ".join(targets) if isinstance(targets, list) else targets] = [
        len(trainable(adapted)),
        count,
        100 * count / total,
        4 * count / 1e6,
    ]
net = adapted.unload()
pd.DataFrame.from_dict(
    rows, orient="index", columns=["tensors", "parameters", "% of the model", "MB in float32"]
).round(2)

# %% [markdown]
# What if a name matches nothing? peft stops only if **none** of the names matches, and it does not say what would. So
# check first:

# %%
try:
    training.check_targets(net, ["q_proj", "value"])
except ValueError as error:
    print(error)
training.check_targets(net, target_modules)


# %% [markdown]
# ## What `prepare_model_for_kbit_training` does
#
# The call does three things. We do each by hand, then call it.
#
# 1. **Freeze** every tensor of the base.
# 2. **Cast** what is still in 16 bits (norms, embeddings, head) to float32: steadier sums, more memory.
# 3. **Checkpointing**: keep only the input of each block, compute the rest again in the backward pass.


# %% jupyter={"source_hidden": true}
def state(net):
    """What the three steps change."""
    return [
        sum(tensor.requires_grad for tensor in net.parameters()),
        sum(tensor.dtype == torch.float32 for tensor in net.parameters()),
        memory.weight_bytes(net) / 1e6,
        net.is_gradient_checkpointing,
    ]


# %%
by_hand = load_4bit().train()
rows = {"loaded": state(by_hand)}
by_hand.requires_grad_(False)
rows["1. frozen"] = state(by_hand)
for tensor in by_hand.parameters():
    if tensor.dtype in (torch.bfloat16, torch.float16):  # the 4-bit codes are uint8
        tensor.data = tensor.data.float()
rows["2. cast"] = state(by_hand)
by_hand.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
rows["3. checkpointing"] = state(by_hand)

# %%
net = prepare_model_for_kbit_training(
    net, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
)
rows["the library's call"] = state(net)
assert rows["the library's call"] == rows["3. checkpointing"], "by hand and by the library should agree"
del by_hand
columns = ["require a gradient", "in float32", "MB", "checkpointing"]
pd.DataFrame.from_dict(rows, orient="index", columns=columns)

# %% [markdown]
# With the older `use_reentrant=True` there is a fourth step: a hook that makes the embeddings' output require a
# gradient. Without it, reentrant checkpointing gives the adapters no gradient.
#
# ## The data: pairs, template, and a loss on the answers only
#
# The course brings its own instruction set about quantization. `read_pairs` checks every line, names a broken one and
# leaves it out.

# %%
course_data = pathlib.Path(helpers.__file__).parents[1] / "notebooks" / "data" / "quantization_qa.jsonl"
pairs, problems = training.read_pairs(data_file or course_data)
print(*problems, sep="\n", end="\n" if problems else "")
held_out = [pair for pair in pairs if pair.get("split") == "held-out"] or pairs[::6]
train = [pair for pair in pairs if pair not in held_out]
print(f"{len(train)} pairs to train on, {len(held_out)} held out. One of each:")
for pair in (train[0], held_out[0]):
    print(f"\nQ: {pair['question']}\nA: {pair['answer']}")

# %% jupyter={"source_hidden": true}
with tempfile.TemporaryDirectory() as scratch:
    damaged = pathlib.Path(scratch) / "damaged.jsonl"
    lines = course_data.read_text(encoding="utf-8").split("\n")[:5]
    lines[2:4] = [lines[2][:40], '{"question": "Why?"}']
    damaged.write_text("\n".join(lines), encoding="utf-8")
    whole_pairs, problems = training.read_pairs(damaged)
print(f"{len(whole_pairs)} of 5 lines kept.", *problems, sep="\n")

# %% [markdown]
# The model should learn to answer, not to write questions. Label -100 means "no loss here": it covers the template
# and the question, and ends where the answer begins. The end-of-turn token keeps its label, or the model would never
# learn to stop.

# %%
longest = net.config.max_position_embeddings


# %%
def encode(pair):
    """{"input_ids", "labels"} of one pair in the model's chat template."""
    turns = [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}]
    prompt = chat.render(tokenizer, turns[:1])
    ids = chat.render(tokenizer, turns, add_generation_prompt=False)
    ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]  # some templates add a line break
    assert ids[: len(prompt)] == prompt, "this template renders a prompt differently once it has an answer"
    if len(ids) > longest:
        start = pair["question"][:40]
        raise ValueError(f"{len(ids):,} tokens, but the model's window holds {longest:,}: {start!r}...")
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


# %%
example = encode(train[0])
first = example["labels"].count(-100)
border = range(first - 6, first + 6)
display(
    pd.DataFrame(
        {
            "token": [repr(tokenizer.decode(example["input_ids"][n])) for n in border],
            "label": [example["labels"][n] for n in border],
        },
        index=border,
    ).T
)
try:
    encode({"question": "bits " * longest, "answer": "Too many."})
except ValueError as error:
    print(error)

# %%
from transformers import DataCollatorForSeq2Seq

train_rows, held_out_rows = [encode(pair) for pair in train], [encode(pair) for pair in held_out]
collate = DataCollatorForSeq2Seq(tokenizer)  # pads each batch to its longest row; padding gets label -100
lengths = [len(row["input_ids"]) for row in train_rows]
tokens = sum(label != -100 for row in train_rows for label in row["labels"])
share = tokens / sum(lengths)
print(f"{min(lengths)} to {max(lengths)} tokens a pair; {share:.0%} of them count in the loss")


# %% [markdown]
# ## Memory and time of a step: mixed precision, checkpointing
#
# - **Mixed precision** keeps adapters and norms in float32 and multiplies in 16 bits (`autocast`).
# - **Checkpointing** saves memory and pays with an extra forward pass.
#
# We measure one batch in three settings, each after a short step to warm up. **Predict first:** which one saves more
# memory?


# %% jupyter={"source_hidden": true}
def setting(adapted, compute, checkpointing):
    """Switch the type in which 4-bit layers compute, and checkpointing, on a loaded model."""
    for module in adapted.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = compute
    inner = adapted.get_base_model()
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        inner.gradient_checkpointing_disable()


# %%
def one_step(adapted, batch, mixed):
    """Forward and backward pass; the loss."""
    with torch.autocast(found.device, half, enabled=mixed):
        loss = adapted(**batch).loss
    loss.backward()
    adapted.zero_grad()
    return loss.item()


# %%
adapted = get_peft_model(net, guide_config).train()
long_rows = [{key: (value * 9)[:144] for key, value in row.items()} for row in train_rows[:4]]
batch = collate(long_rows).to(found.device)
short = collate(train_rows[:1]).to(found.device)

# %%
costs = {}
for name, compute, checkpointing in (
    ("float32", torch.float32, False),
    ("mixed", half, False),
    ("mixed, checkpointing", half, True),
):
    setting(adapted, compute, checkpointing)
    mixed = compute != torch.float32
    one_step(adapted, short, mixed)
    memory.release()
    with memory.track(interval=0.002) as used:
        loss = one_step(adapted, batch, mixed)
    peak = used.peak_vram if found.device == "cuda" else used.gained_ram
    costs[name] = [used.seconds, peak / 1e6, loss]

# %%
step_costs = pd.DataFrame.from_dict(costs, orient="index", columns=["seconds a step", "peak MB", "loss"])
ratio = step_costs / step_costs.shift(1)
slower, smaller = ratio["seconds a step"].iloc[2], ratio["peak MB"].iloc[2]
faster, leaner = ratio["seconds a step"].iloc[1], ratio["peak MB"].iloc[1]

# %% jupyter={"source_hidden": true}
fig, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 2))
for ax, column, color in zip(axes, step_costs, figures.PALETTE):
    ax.barh(step_costs.index[::-1], step_costs[column][::-1], color=color)
    ax.set(xlabel=column)
count = batch["input_ids"].numel()
figures.show(
    fig,
    alt=f"A step of {count} tokens: mixed precision takes {faster:.2f} times the time and "
    f"{leaner:.2f} times the memory of float32; checkpointing on top {slower:.2f} times the time "
    f"and {smaller:.2f} times the memory.",
    table=step_costs.round(3),
)

# %% [markdown]
# The memory is what the step adds to the loaded model: the peak of VRAM on a GPU, of resident memory on a CPU.
#
# ## The optimizer: 8 bits, and paged
#
# AdamW keeps two running means for every trainable number. In float32 that is 8 bytes a parameter, more than the
# parameter itself. Two ideas make it small, and one makes it safe:
#
# - Only the adapters are trained, so only they have states.
# - bitsandbytes stores both means in **8 bits**: 2 bytes a parameter.
# - A **paged** optimizer puts the states into unified memory. While a long batch needs the room, the driver moves
#   pages of them to the computer's RAM, and back for the optimizer's step. A peak that would end in "CUDA out of
#   memory" then only costs time.
#
# How much is at stake for Mistral-7B? We count the parameters from its config:


# %% jupyter={"source_hidden": true}
def optimizer_gib(parameters):
    """GiB of AdamW's two states, in float32 and in 8 bits."""
    return {
        "trained, millions": parameters / 1e6,
        "float32, GiB": 8 * parameters / 2**30,
        "8 bits, GiB": 2 * parameters / 2**30,
    }


# %% jupyter={"source_hidden": true}
def lora_parameters(config, r, targets):
    """Parameters of LoRA on the Linear layers whose names end in one of the targets."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).model
    layers = [m for n, m in empty.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(targets)]
    return sum(r * (m.in_features + m.out_features) for m in layers)


# %%
mistral_7b = models.mistral_config()
pd.DataFrame(
    {
        "r=16 on q, v": optimizer_gib(lora_parameters(mistral_7b, 16, ("q_proj", "v_proj"))),
        "r=16 on all Linear layers": optimizer_gib(lora_parameters(mistral_7b, 16, ("_proj",))),
        "r=64 on all Linear layers": optimizer_gib(lora_parameters(mistral_7b, 64, ("_proj",))),
        "full fine-tuning": optimizer_gib(memory.predict(mistral_7b).parameters),
    }
).T.round(2)

# %% [markdown]
# With the guide's adapters the states hardly count. With r = 64 on all layers, 8 bits save about a gigabyte. Full
# fine-tuning needs more for the states alone than any 24 GB card has. In the Trainer one argument switches both on,
# on CUDA only: `optim="paged_adamw_8bit"`. We did not measure what paging costs in time.
#
# ## The trap: a run that learns nothing
#
# On a CPU with AVX512-BF16, bitsandbytes repacks its 4-bit weights at the first forward pass **in eval mode**, for
# speed. The repacked weights pass no gradient on, and no error says so. One look at an answer, or at the held-out
# loss, before training is enough:

# %%
batch = collate(train_rows[:batch_size]).to(found.device)
setting(adapted, half, False)
adapted.eval()
with torch.inference_mode():
    adapted(**batch)  # "let me just look at the loss first"
adapted.train()
print(f"{len(training.repacked(adapted))} layers were repacked")


# %%
def check_once(adapted):
    """What the guard says after a backward pass."""
    try:
        print(f"check_gradients: {training.check_gradients(adapted)} tensors are fine")
    except training.GradientError as error:
        print("check_gradients:", error, "\n")


# %%
def few_steps(adapted, batch, steps=2):
    """Plain steps on one batch; the guard looks after the first backward pass."""
    optimizer = torch.optim.AdamW(trainable(adapted).values(), lr=1e-3)
    torch.manual_seed(seed)
    for step in range(steps):
        loss = adapted(**batch).loss
        if loss.requires_grad:
            loss.backward()
        if step == 0:
            check_once(adapted)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")


# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        few_steps(adapted, batch)
    except RuntimeError as problem:  # layers with a bias (Qwen2's) fail where the others stay silent
        print(f"RuntimeError: {problem}")
hints = {str(warning.message).split(". ")[0] for warning in caught if "autograd" in str(warning.message)}
for text in hints:
    print("\ntorch's only hint, once per process:", text)

# %% [markdown]
# **The repair:** load the model again, and train before you evaluate.

# %%
del adapted, net
memory.release()
net = prepare_model_for_kbit_training(load_4bit(), use_gradient_checkpointing=False)
adapted = get_peft_model(net, guide_config).train()
few_steps(adapted, batch)

# %% [markdown]
# For the same reason, set no `eval_strategy` in the Trainer on such a CPU. It would evaluate between the steps.
#
# ## Before training
#
# First we measure the untrained NF4 model: its held-out loss, its distance from full precision, and its answers.

# %%
del adapted, net, batch
memory.release()


# %%
@torch.inference_mode()
def answer_loss(net, rows, size=8):
    """Mean loss per answer token."""
    net.eval()
    total = count = 0
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # alike in length: little padding
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size]).to(net.device)
        number = (batch["labels"] != -100).sum().item()
        total += net(**batch).loss.item() * number
        count += number
    return total / count


# %%
windows = evaluation.windows(tokenizer, tokens=eval_tokens)
reference = evaluation.reference(found, windows)
base = load_4bit()
loss_before = answer_loss(base, held_out_rows)
scores_before = evaluation.score(base, windows, reference, batch_size=8)  # every pass unpacks all weights

# %%
questions = [pair["question"] for pair in held_out[:3]]
answers_before = chat.batch(base, tokenizer, questions, max_new_tokens=max_new_tokens)
print(
    f"held-out loss {loss_before:.3f}; on general text: KL {scores_before.kl_divergence:.3f}, "
    f"perplexity {scores_before.perplexity:.2f} (full precision {reference.perplexity:.2f})"
)

# %% [markdown]
# ## A task that visibly succeeds: keep a format
#
# Two hundred pairs do not teach a small model new facts. They can teach it a **format**, and a program can check
# that. The format is one line of JSON with the single key "answer". A program that reads the answers needs exactly
# this.


# %%
def in_format(answer):
    """The first sentence of an answer, as the JSON line that the model shall learn."""
    return json.dumps({"answer": answer.split(". ")[0].rstrip(".") + "."}, ensure_ascii=False)


# %%
def keeps_format(text):
    """Is this a JSON object with one text under "answer", and nothing else?"""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and set(value) == {"answer"} and isinstance(value["answer"], str)


# %%
print(in_format(train[0]["answer"]))
assert all(keeps_format(in_format(pair["answer"])) for pair in pairs)

# %% [markdown]
# First we ask held-out questions before training. No prompt asks for JSON, so the untrained model cannot know:

# %%
format_questions = [pair["question"] for pair in held_out[::4]]
format_before = chat.batch(base, tokenizer, format_questions, max_new_tokens=48)
kept_before = sum(keeps_format(answer) for answer in format_before)
print(f"{kept_before} of {len(format_questions)} answers keep the format. The first one:")
print(format_before[0])

# %% [markdown]
# **trl's `SFTTrainer`** is the usual tool for such a run. It renders the chat template, masks the prompt in the
# labels, prepares the 4-bit model and adds the adapters. It takes conversations of a prompt and a completion:

# %%
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


# %%
def conversation(pair):
    return {
        "prompt": [{"role": "user", "content": pair["question"]}],
        "completion": [{"role": "assistant", "content": in_format(pair["answer"])}],
    }


# %%
conversations = Dataset.from_list([conversation(pair) for pair in train])
format_rate = learning_rate or (4e-3 if width < 2048 else 2e-4)

# %%
on_gpu = found.device == "cuda"
everywhere = {
    "per_device_train_batch_size": batch_size,
    "lr_scheduler_type": "cosine",
    "bf16": half == torch.bfloat16,
    "fp16": half == torch.float16,
    "use_cpu": not on_gpu,
    "gradient_checkpointing": on_gpu,  # short rows: on a CPU it would only cost time
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "logging_steps": 1,
    "seed": seed,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}

# %%
format_steps = max(4, 3 * steps // 4)
sft_arguments = SFTConfig(
    str(files.folder(output_dir) / "training" / "07_sft"),
    max_steps=format_steps,
    learning_rate=format_rate,
    warmup_steps=1,
    optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
    max_length=256,
    save_strategy="no",
    **everywhere,
)

# %% [markdown]
# The guide's adapters, on `q_proj` and `v_proj`, are enough for a format:

# %%
from transformers import PrinterCallback

# %%
check = training.gradient_check()
sft = SFTTrainer(
    load_4bit(),
    args=sft_arguments,
    train_dataset=conversations,
    processing_class=tokenizer,
    peft_config=guide_config,
    callbacks=[check],
)
sft.remove_callback(PrinterCallback)
sft.train()
sft_losses = pd.Series([entry["loss"] for entry in sft.state.log_history if "loss" in entry])
print(
    f"{check.checked} tensors have a gradient; loss {sft_losses[:4].mean():.2f} in the first four steps, "
    f"{sft_losses[-4:].mean():.2f} in the last four"
)

# %%
sft.model.eval()  # or checkpointing throws the cache away, and each new token sees only the one before it
format_after = chat.batch(sft.model, tokenizer, format_questions, max_new_tokens=48)
kept_after = sum(keeps_format(answer) for answer in format_after)
print(
    f"the format is kept by {kept_before} of {len(format_questions)} answers before training, "
    f"by {kept_after} after {format_steps} steps"
)
pd.DataFrame({"keeps it": map(keeps_format, format_after), "answer": format_after})

# %%
with tempfile.TemporaryDirectory() as scratch:
    sft.model.save_pretrained(scratch)
    guide_bytes = (pathlib.Path(scratch) / "adapter_model.safetensors").stat().st_size
print(f"the adapter file takes {guide_bytes / 1e6:.2f} MB")
if found.name.startswith("SmolLM2"):
    assert guide_bytes < 4e6, "the guide's adapters should stay under 4 MB"
    if steps >= 32:
        assert kept_after > kept_before + len(format_questions) / 3, "the format was not learned"
del sft, check
memory.release()

# %% [markdown]
# Before training no answer keeps the format, and after 24 short steps nearly all do. The *contents* are no better
# than before: a model learns a format long before it learns facts. An answer that breaks the format usually repeats
# itself until the limit. trl casts the adapters of a 4-bit model to 16 bits; the loop below keeps them in float32.

# %% [markdown]
# ## The loop you control: transformers' Trainer
#
# The second run learns the answers themselves, with adapters on all Linear layers and our own encoding of the pairs.
# It saves a checkpoint half-way. Then we throw everything away and resume in new objects, as after a kill. (A test
# kills a real process with SIGKILL and compares the final losses.)
#
# - `gradient_check()` stops the run at its first step if a gradient does not arrive.
# - `LivePlot` redraws the loss as it falls. A batch run has one figure at the end.

# %%
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed


# %% jupyter={"source_hidden": true}
class LivePlot(TrainerCallback):
    """The loss so far, redrawn after every step where somebody watches."""

    shown = None

    def on_log(self, args, state, control, **_):
        losses = {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}
        if headless() or not losses:
            return
        fig, ax = plt.subplots(figsize=(7, 2.5))
        ax.plot(losses.keys(), losses.values(), marker=".")
        ax.set(xlabel="step", ylabel="loss on the answers", xlim=(1, args.max_steps))
        self.shown = self.shown or display(display_id=True)
        self.shown.update(fig)
        plt.close(fig)


# %% jupyter={"source_hidden": true}
class StopAt(TrainerCallback):
    """Ends the run early: our stand-in for a kill."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


# %% [markdown]
# The learning rate for a 7B model is the QLoRA paper's, 2e-4. The small model takes 3e-3. We chose it by a few short
# runs, which this notebook does not repeat; `learning_rate` sets another one.

# %%
run_folder = files.folder(output_dir) / "training" / "07_qlora"
shutil.rmtree(run_folder, ignore_errors=True)  # or an older run would be resumed
rate = learning_rate or (3e-3 if width < 2048 else 2e-4)
arguments = TrainingArguments(
    str(run_folder),
    max_steps=steps,
    learning_rate=rate,
    warmup_steps=max(1, steps // 12),
    optim="adamw_torch",
    weight_decay=0.0,
    save_steps=steps // 2,
    save_total_limit=1,
    **everywhere,
)


# %%
def new_trainer(config, *callbacks):
    """A fresh base, fresh adapters, and a Trainer for them."""
    set_seed(seed)
    net = prepare_model_for_kbit_training(load_4bit(), use_gradient_checkpointing=False)
    check = training.gradient_check()
    trainer = Trainer(
        get_peft_model(net, config),
        arguments,
        data_collator=collate,
        train_dataset=train_rows,
        callbacks=[check, LivePlot(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, check


# %% jupyter={"source_hidden": true}
def fingerprint(net):
    """SHA-256 of every tensor of the model that belongs to no adapter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        if "lora_" not in name:
            # Compare values: bitsandbytes casts a bias to the dtype of its input, which changes none.
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# %% [markdown]
# Now we train the configured layers (by default all Linear ones), with the interruption. We need no dropout: in the
# default number of steps no pair is seen twice, so none can be learned by heart.

# %%
config = LoraConfig(
    r=r,
    lora_alpha=lora_alpha,
    target_modules=target_modules,
    lora_dropout=0.0,
    bias="none",
    task_type="CAUSAL_LM",
)
trainer, check = new_trainer(config, StopAt(steps // 2))
hash_before = fingerprint(trainer.model)
with memory.track() as first_half:
    trainer.train()
print(f"{check.checked} tensors have a gradient; stopped after step {trainer.state.global_step} of {steps}")
del trainer, check
memory.release()

# %%
trainer, check = new_trainer(config)
taken_up = training.last_checkpoint(run_folder)
print("taken up at", pathlib.Path(taken_up).name)
with memory.track() as second_half:
    trainer.train(resume_from_checkpoint=taken_up)
tuned = trainer.model
training_seconds = first_half.seconds + second_half.seconds
peak_name = "peak_vram" if found.device == "cuda" else "peak_ram"
train_peak = max(getattr(part, peak_name) for part in (first_half, second_half))
per_step = training_seconds / steps
print(f"{steps} steps of {batch_size} pairs: {training_seconds:.0f} s, {per_step:.2f} s a step")

# %% jupyter={"source_hidden": true}
losses = pd.Series({entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry})
some = steps // 4
smooth = losses.rolling(some, min_periods=1).mean()
fig, ax = plt.subplots()
ax.plot(losses, alpha=0.35, label="each step")
ax.plot(smooth, label=f"mean of {some} steps")
ax.axvline(steps // 2 + 0.5, color=figures.PALETTE[4], linestyle=":", label="interrupted, resumed")
ax.set(xlabel="step", ylabel="loss on the answers")
ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
around = losses.iloc[steps // 2 - 2 : steps // 2 + 2]
figures.show(
    fig,
    alt=f"The training loss falls from {losses.iloc[:some].mean():.2f} (first {some} steps) to "
    f"{losses.iloc[-some:].mean():.2f} (last {some}). Around the interruption the steps have "
    f"{', '.join(f'{loss:.2f}' for loss in around)}.",
    table=losses.iloc[:: max(1, steps // 12)].to_frame("loss").T.round(2),
)
assert len(losses) == steps, "the resumed run should hold the history of all steps"

# %% [markdown]
# Did training change only the adapters? The hash covers every other tensor, codes and scales included.

# %%
assert fingerprint(tuned) == hash_before, "the base weights changed"
print("base weights unchanged:", hash_before[:16])

# %% [markdown]
# ## Save, and load on a fresh base

# %%
tuned.peft_config["default"].base_model_name_or_path = found.asked  # what `models.find` takes
with checkpoints.writing(output_dir, "qlora") as scratch:
    tuned.save_pretrained(scratch, save_embedding_layers=False)  # or peft asks the hub about the base
    tokenizer.save_pretrained(scratch)
adapter_folder = checkpoints.folder(output_dir, "qlora")
adapter_bytes = (adapter_folder / "adapter_model.safetensors").stat().st_size
print(f"{adapter_bytes / 1e6:.2f} MB of adapter beside {weight_bytes / 1e6:.0f} MB of base")
third = held_out_rows[::3]  # a third of the pairs, for comparisons
loss_in_memory = answer_loss(tuned, third)
del trainer, tuned, check
memory.release()

# %% [markdown]
# Put this adapter on another base, and peft raises a long list of mismatches, or no error at all where the shapes
# happen to fit. `check_adapter` compares name and shapes:

# %% jupyter={"source_hidden": true}
other_config = AutoConfig.from_pretrained(found.path)
other_config.hidden_size *= 2
with torch.device("meta"):
    other = AutoModelForCausalLM.from_config(other_config)
for candidate, name in ((base, "some-other-model"), (other, found.asked)):
    try:
        training.check_adapter(adapter_folder, candidate, name)
    except training.AdapterError as error:
        print(error)
del base, candidate, other


# %% [markdown]
# The folded functions bring their own imports. In a program of your own, write the hub name of the base instead of
# `models.find`, and leave `check_adapter` out.


# %% jupyter={"source_hidden": true} tags=["reload"]
def base_in_nf4(name):
    """(the base in NF4, the type in which it computes)."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from helpers import models

    found = models.find(name, on_gpu=0.3)  # 4-bit layers, and embeddings in 16 bits
    half = found.fast
    if found.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        half = torch.float16
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=half, **settings)
    base = AutoModelForCausalLM.from_pretrained(
        found.path, quantization_config=nf4, dtype=half, device_map={"": found.device}
    )
    return base, half


# %% jupyter={"source_hidden": true} tags=["reload"]
def reload(folder):
    """A fresh base in NF4 with the adapter of a checkpoint folder, ready to run."""
    import json
    import pathlib

    from peft import PeftModel

    from helpers import training

    config = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    base, half = base_in_nf4(config["base_model_name_or_path"])
    training.check_adapter(folder, base, config["base_model_name_or_path"])
    tuned = PeftModel.from_pretrained(base, folder).eval()
    for name, tensor in tuned.named_parameters():
        if "lora_" in name:
            tensor.data = tensor.data.to(half)  # trained in 32 bits; at run time 16, as all else
    return tuned


# %%
tuned = reload(adapter_folder)
loss_after = answer_loss(tuned, held_out_rows)
loss_reloaded = answer_loss(tuned, third)
change = loss_after / loss_before - 1
print(
    f"held-out loss {loss_before:.3f} -> {loss_after:.3f} ({change:+.1%})\n"
    f"a third of the pairs: {loss_in_memory:.3f} before saving, {loss_reloaded:.3f} loaded on a fresh base"
)
assert abs(loss_reloaded / loss_in_memory - 1) < 0.01, "the adapter on disk is not the one that was trained"
if found.name.startswith("SmolLM2"):
    assert loss_after <= 0.75 * loss_before, "the held-out loss should fall by at least 25 %"

# %% [markdown]
# The last digit may differ: before saving, adapters, norms and embeddings were in float32, and now they are in 16 bits.
#
# ## What it learned

# %%
answers_after = chat.batch(tuned, tokenizer, questions, max_new_tokens=max_new_tokens)
for pair, *answers in zip(held_out, answers_before, answers_after):
    before, after = (" ".join(answer.split()) for answer in answers)
    print(f"Q: {pair['question']}\n  before:  {before}\n  after:   {after}\n  written: {pair['answer']}\n")

# %% [markdown]
# The answers became short and stay with the subject. A few hundred pairs do **not** teach a small model the facts:
# compare each answer with the written one.
#
# ## What it forgot
#
# We measure the KL divergence from the full-precision model on general text, which has nothing to do with the
# training data:

# %%
scores = evaluation.score(tuned, windows, reference, batch_size=8)
rate_tuned = speed.decode(tuned, new_tokens=16)
tuned_bytes = memory.weight_bytes(tuned)
forgot = pd.DataFrame({"NF4": scores_before.summary(), "NF4 + adapter": scores.summary()}).T
forgot.columns = ["perplexity", "KL to full precision", "same top-1"]
forgot["held-out loss"] = [loss_before, loss_after]
forgot.round(3)

# %%
mean, low, high = evaluation.difference(scores, scores_before)
print(f"training changed the KL on general text by {mean:+.3f} ({low:+.3f} to {high:+.3f})")


# %% [markdown]
# Training on a narrow set moved the model away from full precision on general text: KL 0.34 became 0.62. The
# perplexity fell at the same time, so perplexity alone would have hidden it. **A larger model forgot more.** With
# Qwen2.5-Coder-1.5B on an NVIDIA H200 the same steps and rate took the KL from 0.06 to 1.30 and the perplexity from 36
# to 73. The usual remedies are fewer steps, a lower rate, or general text among the pairs.
#
# ## Merge: where to, and where not
#
# Merging adds `(alpha / r) · B A` to the frozen weight once. After that the adapter costs no time. In **4-bit
# weights** the sum has to be rounded to the 16 levels again. A 4-bit weight lies exactly **on** a level, so rounding
# undoes every update that does not push it half-way to the next one. How much of the update arrives in one layer?


# %%
def arriving(weight, update):
    """Share of an update that survives quantization to NF4, along its own direction: 1 is all of it."""
    moved = through_nf4(weight + update) - through_nf4(weight)
    return ((moved * update).sum() / update.square().sum()).item()


# %%
fresh = load_4bit().train()
update = tuned.base_model.model.model.layers[middle].self_attn.q_proj.get_delta_weight("default").float()
stored = fresh.model.layers[middle].self_attn.q_proj.weight
on_levels = bnb.functional.dequantize_4bit(stored.data, stored.quant_state).float()
gaps = on_levels.view(-1, 64).abs().amax(1) / 8  # about the mean distance of two levels in a block
size = (update.abs().mean() / gaps.mean()).item()
print(
    f"an update is {size:.2f} of the distance between two levels, on average;\n"
    f"added to the 4-bit weights, {arriving(on_levels, update):.0%} of it arrives"
)

# %%
# Held-out loss of each way to bring base and adapter together.
with tuned.disable_adapter():
    ways = {"NF4, no adapter": answer_loss(tuned, third), "NF4 + adapter": loss_reloaded}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # peft: "may get different generations due to rounding errors"
    rounded = PeftModel.from_pretrained(fresh, adapter_folder).merge_and_unload()
    ways["merged into NF4"] = answer_loss(rounded, third)
    if training.repacked(tuned):
        ways["merged into NF4 after inference repacked it"] = answer_loss(tuned.merge_and_unload(), third)
del fresh, rounded, tuned, stored, on_levels
memory.release()

# %% [markdown]
# Merging into **full precision** is exact up to rounding. Quantize the result anew if you need 4 bits: its weights
# lie anywhere between the levels and round up or down, and on average the update comes through.

# %%
bf16_bytes = memory.predict(AutoConfig.from_pretrained(found.path), bits=16).model
free = memory.free_vram()
place = "cuda" if free > 1.2 * bf16_bytes else "cpu"
precise = torch.float32 if found.device == "cpu" or free > 2.4 * bf16_bytes else found.dtype
full = AutoModelForCausalLM.from_pretrained(found.path, dtype=precise).to(place)

# %%
between_levels = full.model.layers[middle].self_attn.q_proj.weight.detach().float()
print(f"added before quantization, {arriving(between_levels, update.to(place)):.0%} of the update arrives")
with contextlib.redirect_stdout(io.StringIO()):  # peft imports gptqmodel here, which prints a banner
    beside = PeftModel.from_pretrained(full, adapter_folder).eval()

# %%
probe = collate(held_out_rows[:4]).to(full.device)
with torch.inference_mode():
    logits_beside = beside(**probe).logits.float()
    merged = beside.merge_and_unload()
    logits_merged = merged(**probe).logits.float()
gap = ((logits_merged - logits_beside).abs().max() / logits_beside.std()).item()
print(f"largest difference of a logit: {gap:.1e} of the logits' spread")
assert gap < (1e-2 if precise == torch.float32 else 1), "merged and base + adapter should agree"

# %%
ways["merged into full precision"] = answer_loss(merged, third)
with tempfile.TemporaryDirectory() as scratch:
    merged.to(torch.bfloat16).save_pretrained(scratch)
    del full, beside, merged
    memory.release()
    ways["merged into full precision, then NF4"] = answer_loss(quantize_4bit(scratch), third)

# %% jupyter={"source_hidden": true}
merges = pd.Series(ways, name="held-out loss").to_frame()
on_scale = [name for name in ways if "repacked" not in name]
bars = merges["held-out loss"][on_scale][::-1]
fig, ax = plt.subplots(figsize=(7, 2.2))
ax.barh(bars.index, bars, color=figures.PALETTE[0])
ax.set(xlabel="held-out loss (every third held-out pair)")
cost_of_merging = ways["merged into NF4"] - ways["NF4 + adapter"]
figures.show(
    fig,
    alt=f"Held-out loss: base with adapter {ways['NF4 + adapter']:.2f}, "
    f"merged into full precision {ways['merged into full precision']:.2f}, "
    f"merged into NF4 {ways['merged into NF4']:.2f}.",
    table=merges.round(3),
)
print(f"merging into the 4-bit weights costs {cost_of_merging:+.3f}")

# %% [markdown]
# So **keep the adapter beside the 4-bit base, or merge into full precision** and quantize that anew (with any method
# of this course). Merging into weights that inference has repacked is worse than a rounding error: peft reads their
# new layout as the old one, without an error.
#
# ## A 7B model: the budget, line by line
#
# Nothing is loaded here. The lines follow from Mistral-7B's shape and the guide's set-up: adapters on q and v, 8-bit
# AdamW, checkpointing.

# %%
from transformers import MistralConfig

# %% jupyter={"source_hidden": true}
mistral = MistralConfig(
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)


# %%
def linear_layers(config):
    """{name: Linear layer} of a model that is never loaded."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    return {name: module for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}


# %%
def budget(config, tokens, r=16, targets=("q_proj", "v_proj"), context=0.5e9):
    """{line: bytes} of a QLoRA step over `tokens` tokens. context: CUDA's own, 0.3 to 0.6 GB on most GPUs."""
    size = memory.predict(config, bits=4, group_size=64, scale_bits=32, double_quant=True, rest_bits=32)
    linears = linear_layers(config)
    chosen = [m for n, m in linears.items() if n.endswith(tuple(targets))]
    adapters = sum(r * (m.in_features + m.out_features) for m in chosen)
    return {
        "weights: 4-bit codes and scales": size.weights + size.scales,
        "weights: embeddings, head, norms in float32": size.rest,
        "adapters in float32": 4 * adapters,
        "their gradients in float32": 4 * adapters,
        "optimizer: two states in 8 bits": 2 * adapters,
        "activations: input of each block": 4 * tokens * config.num_hidden_layers * config.hidden_size,
        "activations: logits, their softmax, gradient": 3 * 4 * tokens * config.vocab_size,
        "activations: largest weight, in 16 bits": 2 * max(m.weight.numel() for m in linears.values()),
        "CUDA context": context,
    }


# %% [markdown]
# The course's GPU measurements have this run, on an H100 with random weights in this shape (memory does not depend on
# their values), at batch 1. torch's counter does not see the CUDA context, so we leave it out of the comparison.

# %%
course = pathlib.Path(helpers.__file__).parents[1]
qlora_7b = json.loads((course / "notebooks" / "gpu" / "reference.json").read_text())["qlora"]
measured = {tokens: qlora_7b[str(tokens)]["peak_bytes"] / 2**30 for tokens in (512, 2048)}
pd.Series(measured, name="peak, GiB").to_frame().round(2)

# %%
lines = pd.DataFrame({f"{tokens} tokens": budget(mistral, tokens) for tokens in measured}) / 2**30
compared = pd.DataFrame(
    {
        "computed, without context": lines.drop("CUDA context").sum(),
        "measured": {f"{tokens} tokens": peak for tokens, peak in measured.items()},
    }
).T
compared.loc["difference, %"] = 100 * (compared.iloc[0] / compared.iloc[1] - 1)
assert compared.loc["difference, %"].abs().max() < 10, "the budget should be within 10 % of the measurement"
pd.concat([lines, lines.sum().to_frame("together").T, compared]).round(3)

# %% jupyter={"source_hidden": true}
short = lines.groupby(lines.index.str.split(":").str[0], sort=False).sum()
short = short.T[["weights", "activations", "CUDA context"]].copy()
short["adapters, gradients, optimizer"] = lines.iloc[2:5].sum()

# %% jupyter={"source_hidden": true}
fig, ax = plt.subplots(figsize=(8, 2.6))
left = 0
for column, color in zip(short, figures.PALETTE):
    ax.barh(short.index, short[column], left=left, color=color, label=column)
    left = left + short[column]
ax.axvline(2e9 / 2**30, color="black", linestyle="--", label='the guide\'s "< 2 GB"')
ax.set(xlabel="GiB")
ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
figures.show(
    fig,
    alt="Memory of fine-tuning a 7B model by part: the weights alone take "
    f"{short['weights'].iloc[0]:.1f} GiB, more than twice the guide's 2 GB; all together "
    f"{short.iloc[0].sum():.1f} GiB at 512 tokens and {short.iloc[1].sum():.1f} GiB at 2,048.",
    table=short.round(2),
)

# %% [markdown]
# With the guide's adapters (r = 16 on q and v), adapters, gradients and optimizer are hardly visible. The weights
# remain, and activations that grow with every token. So halving this rank saves next to nothing. With r = 64 on all
# layers the states alone take 1.25 GiB in float32 (the table of the optimizer).

# %%
longer = lines["2048 tokens"]
saved = pd.Series(
    {
        "half the rank": longer.iloc[2:5].sum() / 2,
        "embeddings and head in bfloat16": longer.iloc[1] / 2,
        "logits for every second token": longer.iloc[6] / 2,
        "half the tokens": longer.iloc[5:7].sum() / 2,
    },
    name="GiB saved of those at 2,048 tokens",
)
saved.to_frame().round(2)

# %% [markdown]
# ## On a 24 GB GPU with Mistral-7B
#
# Change two parameters: `model = "mistralai/Mistral-7B-Instruct-v0.3"` and `target_modules = ["q_proj", "v_proj"]`.
# The two measured peaks above are what to expect for a step of one row: they fit with room to spare. A batch of 4
# rows of 512 tokens counts as 2,048 tokens.

# %% [markdown]
# ## What the guides claim

# %% jupyter={"source_hidden": true}
from helpers.publishing import claims

needed = short.iloc[0].sum() * 2**30 / 1e9
tuned_loss = f"held-out loss {change:+.0%}, base unchanged, {guide_bytes / 1e6:.1f} MB for q and v"
mixed_step = f"{leaner:.2f} times the memory of float32 at {faster:.2f} times the time"
recomputing = f"{smaller:.2f} times the memory of mixed precision at {slower:.2f} times the time"
frozen = int(theirs.base_layer.weight.grad is None)

# %% jupyter={"source_hidden": true}
findings = [
    claims.finding("qlora-2gb", needed, computed_for="Mistral-7B"),
    claims.finding("qlora-works", change, text=tuned_loss),
    claims.finding("qlora-training-only", frozen, text="no gradient reaches the 4-bit weights, only A and B"),
    claims.finding("mixed-precision", leaner, text=mixed_step),
    claims.finding("checkpointing", smaller, text=recomputing),
]
claims.write(output_dir, notebook="07_qlora", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "07_qlora"))


# %% [markdown]
# ## Exercises
#
# **1 (easy).** Predict, then measure: if the update were ten times as large, what share of it would arrive in 4-bit
# weights? Look at the two numbers of the merging section, the size of the update and the share that arrived. Return
# your guess, from 0 to 1. (One number.)


# %%
def share_arriving():
    # Replace the dots.
    ...


# %% jupyter={"source_hidden": true}
def test_share(function):
    answer = function()
    assert answer is not None, "return a share between 0 and 1"
    assert 0 <= answer <= 1.2, "a share of the update: 1 is all of it"
    block = through_nf4(torch.randn(512, 64, generator=torch.Generator().manual_seed(0)))
    gap = block.abs().amax() / 8
    change = 0.4 * gap * torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    measured = ((through_nf4(block + change) - block) * change).sum() / change.square().sum()
    hint = "0.4 of a gap on average: many updates now reach half-way to the next level"
    assert abs(answer - measured) < 0.3, f"measured {measured:.2f}, you said {answer}. {hint}"


exercises.check(share_arriving, test_share)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def share_arriving():
        return 0.95  # nearly all, far more than ten times 4 %: rounding is a threshold

    exercises.require(share_arriving, test_share)


# %% [markdown]
# **2 (medium).** Compute the gradients of A and B by hand. You get x [n, in] and the gradient of the loss with
# respect to the layer's output [n, out]; return (gradient of A, gradient of B). Why is the first zero while B is
# zero? (Two lines.)


# %%
def lora_gradients(x, grad_output, A, B, scale):
    # Replace the dots.
    ...


# %% jupyter={"source_hidden": true}
def test_gradients(function):
    torch.manual_seed(1)
    x, g = torch.randn(5, 8), torch.randn(5, 6)
    A, B = torch.randn(3, 8, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    right = torch.autograd.grad(((x @ A.T) @ B.T * 2.0 * g).sum(), (A, B))
    answer = function(x, g, A.detach(), B.detach(), 2.0)
    assert answer is not None, "return (gradient of A, gradient of B)"
    for name, ours, true in zip("AB", answer, right):
        assert ours.shape == true.shape, f"the gradient of {name} has shape {list(true.shape)}, like {name}"
        assert not torch.allclose(2 * ours, true, atol=1e-5), f"gradient of {name}: the scale is missing"
        assert torch.allclose(ours, true, atol=1e-5), f"the gradient of {name} is not right yet"
    assert not function(x, g, A.detach(), torch.zeros(6, 3), 2.0)[0].any(), "with B = 0, A's gradient is zero"


exercises.check(lora_gradients, test_gradients)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def lora_gradients(x, grad_output, A, B, scale):
        return scale * (grad_output @ B).T @ x, scale * grad_output.T @ (x @ A.T)

    exercises.require(lora_gradients, test_gradients)


# %% [markdown]
# **3 (hard).** Return the longest sequence (tokens, batch 1) that fits `gib` GiB by the budget above, CUDA context
# included. Return 0 if none does. (Three lines: the budget is a straight line in the tokens.)


# %%
def longest_sequence(config, gib):
    # Replace the dots.
    ...


# %% jupyter={"source_hidden": true}
def test_longest(function):
    answer = function(mistral, 8)
    assert answer is not None, "return a number of tokens"
    assert function(mistral, 4) == 0, "in 4 GiB not even the weights fit: return 0"
    total = sum(budget(mistral, int(answer)).values()) / 2**30
    assert total <= 8, f"{answer} tokens take {total:.2f} GiB, more than 8"
    one_more = sum(budget(mistral, int(answer) + 1).values()) / 2**30
    assert one_more > 8, f"{answer} tokens fit, but so does one more"


exercises.check(longest_sequence, test_longest)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def longest_sequence(config, gib):
        fixed = sum(budget(config, 0).values())
        per_token = sum(budget(config, 1).values()) - fixed
        return max(0, int((gib * 2**30 - fixed) // per_token))

    exercises.require(longest_sequence, test_longest)
    for gib in (6, 8, 16, 24):
        print(f"{gib} GiB: {longest_sequence(mistral, gib):,} tokens")

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("07_qlora")

# %% [markdown]
# ## Takeaways
#
# 1. **LoRA is two thin matrices beside a frozen weight.** Ten lines give peft's outputs and gradients. A's first
#    gradient is zero because B is zero.
# 2. **Check that gradients arrive, and measure before and after.** A repacked base trains without an error and learns
#    nothing. A format was learned in 24 steps. The held-out loss fell by a quarter, and the KL on other text rose
#    from 0.34 to 0.62.
# 3. **Keep the adapter, or merge it into full precision.** Merged into 4-bit weights it lost most of its effect. A 7B
#    model needs 5 to 7 GiB: the weights first, then activations. The guide's adapters and their optimizer take 0.06
#    GiB.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% jupyter={"source_hidden": true} tags=["record"]
records.write(
    output_dir,
    method="qlora",
    notebook="07_qlora",
    found=found,
    windows=windows,
    bits_per_weight=8 * tuned_bytes / total,
    weight_bytes=tuned_bytes,
    peak_memory_bytes=train_peak,
    scores=scores,
    decode_tokens_per_s=rate_tuned.decode_tokens_per_s,
    quantize_seconds=training_seconds,
)
quantized.cleanup()
