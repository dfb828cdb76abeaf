# %% [markdown]
# # 12 Beyond one GPU
#
# Run a model that does not fit, train it with several processes without changing the result, and choose an engine.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Place a model on GPU, RAM and disk under a budget, and know what each placement costs.
# 2. Train one QLoRA with several processes, and show that the loss curve is the one of a single process.
# 3. Split a model over processes (FSDP, tensor parallel), spread notebooks over workers, and choose what to serve
#    with.
#
# **Before you start:** LoRA on 4-bit weights is in [07](07_qlora.ipynb), memory arithmetic in
# [00](00_start_here.ipynb).

# %% jupyter={"source_hidden": true} tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
shares = [1.0, 0.7, 0.4]
budget_gb = 0
steps = 4
batch = 4
processes = 2

# %% [markdown]
# ## The idea: four ways to split, by hand
#
# A model has four layers of 1 GB, and a GPU has 2 GB. What can you do?
#
# | way | GPU 0 holds | GPU 1 holds | disk or RAM holds | what travels |
# |---|---|---|---|---|
# | **offload** | layers 1, 2 | (no second GPU) | layers 3, 4 | 2 GB of weights for every token |
# | **pipeline** (`device_map`) | layers 1, 2 | layers 3, 4 | | a few kB of activations between the halves |
# | **tensor parallel** | half of each layer | the other half | | a sum after each pair of matrices |
# | **FSDP** (training) | half of each layer | the other half | | each layer's missing half, just before it is used |
#
# Data parallel training (**DDP**) is not in this table: it copies the whole model to each GPU, so it needs a model
# that fits.
#
# Offload works with a single GPU, so we start there. It reads 2 GB for every token. By hand: a disk with 2 GB/s needs
# a second for that, whatever the GPU can do.

# %% jupyter={"source_hidden": true}
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Code, display
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

# %%
import helpers
from helpers import checkpoints, evaluation, exercises, figures, memory, models, records, speed
from helpers.process import cores

figures.style()
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
for name in ("accelerate.big_modeling", "bitsandbytes"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks for names that transformers renamed

# %%
found = models.find(model, copies=2)
gpus = torch.cuda.device_count() if found.device == "cuda" else 0
cores = cores()
course_notebooks = Path(helpers.__file__).parent.parent / "notebooks"
script = course_notebooks / "scale_out" / "train.py"
data = course_notebooks / "data" / "quantization_qa.jsonl"
tokenizer = AutoTokenizer.from_pretrained(found.path)
predicted = memory.predict(AutoConfig.from_pretrained(found.path))
print(f"{found.name}, {predicted.parameters / 1e6:.0f} M parameters; {gpus} GPUs, {cores} cores")

# %% [markdown]
# ## Offload: what does not fit goes elsewhere
#
# `device_map="auto"` fills the first device up to `max_memory`, then the next one, and the disk takes the rest. In
# the forward pass, each layer's weights are fetched just before they are needed. Nothing is quantized and nothing is
# left out, so **the answer must not change**. First we take the answer and the speed of the whole model on one device:

# %%
dtype = torch.bfloat16
size = 2 * predicted.parameters
first = 0 if gpus else "cpu"
question = tokenizer("The for statement is used to", return_tensors="pt")


# %%


def answer(net, new_tokens=12):
    """The model's answer, and the new tokens per second with everything around them."""
    started = time.perf_counter()
    ids = net.generate(**question.to(found.device), max_new_tokens=new_tokens, do_sample=False)
    return ids, (ids.shape[1] - question.input_ids.shape[1]) / (time.perf_counter() - started)


# %%
plain = AutoModelForCausalLM.from_pretrained(found.path, dtype=dtype).to(found.device).eval()
answer(plain, new_tokens=2)  # warms up
expected, unlimited = answer(plain)
del plain
print(f"{size / 1e6:.0f} MB in {dtype}, {unlimited:.1f} tokens/s:", repr(tokenizer.decode(expected[0])))


# %% [markdown]
# Now the first device may take only a share of the model's bytes. **Predict first:** with 70 % of the bytes on the
# device, is the model 1.4 times slower, or more? What if only 40 % are there?


# %%
def placed(share, folder):
    """At most `share` of the model's bytes on the first device; a GPU has half of them in RAM behind it."""
    limits = {first: int(share * size)} | ({"cpu": size // 2} if gpus else {})
    options = {"dtype": dtype, "device_map": "auto", "max_memory": limits, "offload_folder": folder}
    return AutoModelForCausalLM.from_pretrained(found.path, **options).eval()


def try_share(share, folder):
    """(where each module lies, tokens per second) under a budget; the answer must be that of the whole model."""
    net = placed(share, folder)
    ids, rate = answer(net)
    assert torch.equal(ids, expected), f"offloading changed the answer at {share:.0%}"
    return {name: str(device) for name, device in net.hf_device_map.items()}, rate


# %%
rows, placements = [], {}
with tempfile.TemporaryDirectory() as folder:
    for share in tqdm([share for share in shares if share < 1], "placements", disable=None):
        where, rate = try_share(share, folder)
        placements[f"{share:.0%}"] = where
        behind = ("cpu", "disk") if gpus else ("disk",)
        kept = sum(device not in behind for device in where.values())
        row = {"first device may take": f"{share:.0%}", "modules there": kept, "modules": len(where)}
        rows.append(row | {"same answer": True, "tokens/s": rate, "times slower": unlimited / rate})
offload = pd.DataFrame(rows)
offload.round(2)

# %% [markdown]
# The share of the bytes is not the share of the speed. What lies on the disk is read again for every token, so a
# small missing part already costs a large part of the speed. The picture shows which modules lie on the slower
# device:

# %%
kinds = {"0": "GPU", "cpu": "RAM", "disk": "disk"}
looks = {"GPU": (figures.PALETTE[0], ""), "RAM": (figures.PALETTE[1], ""), "disk": (figures.PALETTE[2], "//")}
fig, ax = plt.subplots(figsize=(9, 0.9 + 0.5 * len(placements)))
for row, where in enumerate(placements.values()):
    for column, device in enumerate(where.values()):
        color, hatch = looks[kinds[device]]
        ax.barh(row, 0.9, left=column, color=color, hatch=hatch)
    last = [kinds[device] for device in where.values()][-1]
    ax.text(len(where) + 0.3, row, last, va="center", color=looks[last][0])
slowest = offload["times slower"].max()
finding = f"The tightest budget decodes {slowest:.1f} times slower"
ax.set(yticks=range(len(placements)), yticklabels=placements, xlabel="module, in the order of the forward pass")
ax.set_title(f"{finding} (first colour: first device; hatched: disk)", fontsize="medium")
alt = f"Where each module lies under each budget: the first device from the left, the rest behind it. {finding}."
figures.show(fig, alt=alt, table=offload.round(2))

# %% [markdown]
# These files were just read, so they lie in the system's page cache. A cold disk is slower than this. There are two
# traps:
#
# - `device_map="auto"` says nothing when it spills. Look at `hf_device_map`, as above.
# - 4-bit weights refuse to go to the disk. The message names a switch (`llm_int8_enable_fp32_cpu_offload`) that keeps
#   those layers in 32 bits on the CPU:

# %%
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
limits = {first: size // 8} | ({"cpu": size // 8} if gpus else {})
options = {"quantization_config": nf4, "device_map": "auto", "max_memory": limits}
with tempfile.TemporaryDirectory() as folder:
    try:
        AutoModelForCausalLM.from_pretrained(found.path, offload_folder=folder, **options)
        spill = "loaded"
    except ValueError as problem:
        spill = " ".join(str(problem).split())
print(spill)

# %% [markdown]
# ### A smaller GPU than you have
#
# To know whether something fits a 24 GB or a 16 GB card, take memory away from your own card. PyTorch then raises the
# same out-of-memory error as the smaller card. `budget_gb = 0` sets no limit.

# %%
if gpus and budget_gb:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gb * 1e9 / total))
    try:
        torch.empty(int(1.05 * budget_gb * 1e9), dtype=torch.uint8, device="cuda")
        raise AssertionError("the budget does not hold")
    except torch.OutOfMemoryError as problem:
        print(f"budget {budget_gb} GB of {total / 1e9:.0f}:", str(problem).split(". ")[0])
else:
    print("no limit set" if gpus else "no GPU here: the budget has nothing to limit")

# %% [markdown]
# ## Several processes, one curve
#
# With **DDP**, every process holds the whole 4-bit model and takes its share of each batch. The processes average
# their gradients before each step. By hand, with the loss (w - x)² at w = 0 and the four examples x = 1, 2, 3, 6:
#
# | | examples | gradients -2x | mean |
# |---|---|---|---|
# | one process | 1, 2, 3, 6 | -2, -4, -6, -12 | **-6** |
# | process 0 | 1, 2 | -2, -4 | -3 |
# | process 1 | 3, 6 | -6, -12 | -9 |
# | both, averaged | | | **-6** |
#
# The average of two equal halves is the mean of the whole. So the loss curve must not depend on the number of
# processes.
#
# One script serves one process, several processes, and sharded GPUs. Only the launcher's configuration differs. On one
# GPU both processes share it (`--share_gpu`): that compares the curves, and is not faster. This is the script's core:

# %%
source = script.read_text(encoding="utf-8")
start, end = source.index("    # FSDP shards"), source.index("    trainer = InOrder")
Code(source[start:end], language="python")

# %%
config = "ddp_gpu.yaml" if gpus else "ddp_cpu.yaml"
print(config)
Code((script.parent / config).read_text(encoding="utf-8"), language="yaml")


# %% [markdown]
# `launch` starts the script in new processes. Each takes its part of the cores.


# %%
def launch(name, *launcher, share=1):
    """Train in new processes, each with 1 / share of the cores; what rank 0 reported."""
    out = Path(scratch.name) / name
    command = [*launcher, script, "--model", found.path, "--data", data, "--output", out]
    command += ["--steps", steps, "--batch", batch] + (["--share_gpu"] if gpus == 1 else [])
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // share))}
    if gpus:
        torch.cuda.empty_cache()  # what this process keeps for later, the new ones need now
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the model is on the CPU, so the training is
    started = time.perf_counter()
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-1500:]}")
    return json.loads((out / "losses.json").read_text()) | {"seconds": time.perf_counter() - started}


# %%
def check_processes(processes, batch):
    """Raise ValueError where this machine has too few cores or GPUs, or the batch cannot be split."""
    there, what = (gpus, "GPUs") if gpus > 1 else (cores, "cores")  # one GPU is shared by all
    if not 1 <= processes <= there:
        raise ValueError(f"processes={processes}, but this machine has {there} {what}")
    if batch % processes:
        raise ValueError(f"a batch of {batch} cannot be split over {processes} processes")


if cores > 1:
    check_processes(processes, batch)

# %% [markdown]
# The command line is `accelerate launch --config_file ddp_cpu.yaml train.py ...`, on a GPU with `ddp_gpu.yaml`. For one
# process, the same script runs without a launcher:

# %%
scratch = tempfile.TemporaryDirectory()
accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", 0, "--config_file"]
ddp = [*accelerate, script.parent / config, "--num_processes", processes]
several = f"{processes} processes"
runs = {"1 process": ([sys.executable], 1), several: (ddp, processes)}

# %%
reports = {}
for name, (launcher, share) in tqdm(runs.items(), "training", disable=None):
    reports[name] = launch(name, *launcher, share=share)

# %%
curves = pd.DataFrame({name: report["losses"] for name, report in reports.items()})
gap = (curves.iloc[:, 0] - curves.iloc[:, 1]).abs().max()
{name: f"{report['seconds']:.0f} s with start-up" for name, report in reports.items()}

# %%
fig, ax = plt.subplots(figsize=(6, 3))
curves.index = pd.RangeIndex(1, len(curves) + 1, name="step")
for name, style in zip(curves, ("-", "--"), strict=True):
    ax.plot(curves[name], style, marker="o", label=name)
ax.set(xlabel="step", ylabel="loss on the answers", title=f"Both curves agree within {gap:.0e}")
ax.legend()
alt = f"Loss of both runs over the steps. The curves lie on each other, largest difference {gap:.1e}."
figures.show(fig, alt=alt, table=curves.round(4))

# %% [markdown]
# Two batches take turns, so compare every second point. The adapters must agree as well as the curves:

# %%
from safetensors.torch import load_file

assert reports[several]["processes"] == processes, "accelerate did not start that many"
assert gap < (2e-2 if gpus else 1e-4), f"the curves differ by {gap:.2g}"  # bfloat16 on GPUs, float32 here
folders = [Path(scratch.name) / name / "adapter" for name in runs]
one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
apart = max((one[name] - two[name]).abs().max().item() for name in one)
largest = max(tensor.abs().max().item() for tensor in one.values())
print(f"adapter weights up to {largest:.3f}, {apart:.1e} apart")

# %% [markdown]
# Only rank 0 writes the adapter. It is an adapter like any other, and the rest of the course's protocol applies to
# it:

# %%
from peft import PeftModel

with memory.track() as cost:
    net = AutoModelForCausalLM.from_pretrained(found.path, quantization_config=nf4, dtype=found.fast)
    net = PeftModel.from_pretrained(net, folders[1]).eval()

# %%
windows = evaluation.windows(tokenizer, tokens=eval_tokens)
reference = evaluation.reference(found, windows)
scores = evaluation.score(net, windows, reference, batch_size=8)  # every pass unpacks all weights
with checkpoints.writing(output_dir, "qlora-ddp") as folder:
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
rate, weights = speed.decode(net, new_tokens=8, runs=2).decode_tokens_per_s, memory.weight_bytes(net)
print(f"perplexity {reference.perplexity:.2f} -> {scores.perplexity:.2f}, KL {scores.kl_divergence:.3f}")
del net

# %% [markdown]
# ## FSDP: one model, sharded
#
# **FSDP** cuts each layer's weights into one shard per GPU. It gathers a layer only while that layer computes. It
# flattens the tensors of a layer into one, so all of them must have the same dtype. 4-bit codes are bytes.
# `bnb_4bit_quant_storage` declares the same bytes to be bfloat16, and changes none of them:

# %%
from bitsandbytes.nn import Linear4bit


def stored(storage):
    """What a 4-bit layer of 1024 x 1024 holds when its codes are declared to be of a dtype."""
    layer = Linear4bit(1024, 1024, bias=False, quant_type="nf4", quant_storage=storage)
    layer.load_state_dict({"weight": torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))})
    layer.to(found.device)
    raw = layer.weight.data.view(torch.uint8)
    facts = {"bnb_4bit_quant_storage": str(storage), "numbers": layer.weight.numel(), "bytes": raw.numel()}
    return facts | {"sum of bytes": int(raw.sum(dtype=torch.int64))}


# %%
storages = pd.DataFrame([stored(torch.uint8), stored(torch.bfloat16)])
assert storages["sum of bytes"].nunique() == 1, "the codes should be the same bytes"
storages

# %%
print("accelerate launch --config_file fsdp_gpu.yaml train.py --model MODEL --data DATA --output OUT")
Code((script.parent / "fsdp_gpu.yaml").read_text(encoding="utf-8"), language="yaml")

# %% [markdown]
# FSDP needs one GPU for each process:

# %%
fsdp = None
if gpus > 1:
    fsdp = launch("fsdp", *accelerate, script.parent / "fsdp_gpu.yaml", "--num_processes", gpus)
    peaks = {name: run["peak_vram_bytes"] / 1e9 for name, run in (("DDP", reports[several]), ("FSDP", fsdp))}
    print("losses:", [round(loss, 3) for loss in fsdp["losses"]], "peak of GPU 0, GB:", peaks)
else:
    print(f"not run here: it needs two GPUs, this machine has {gpus}")

# %% [markdown]
# **Predict first:** with Mistral-7B's shape, DDP's peak is 4.6 GB on each of two GPUs, nearly all of it 4-bit weights.
# What is FSDP's peak? This run is in the course's repository (`scale_out/reference.json`):


# %%
def of_repository(file):
    """Losses and peaks of the runs in a file beside the script, a row each."""
    measured = json.loads((script.parent / file).read_text(encoding="utf-8"))
    print(f"{measured['device']}; {measured['model']}; {measured['date']}")
    rows = {
        name: {"first loss": run["losses"][0], "last loss": run["losses"][-1], "peak, GB": run["peak_vram_bytes"] / 1e9}
        for name, run in measured["runs"].items()
    }
    return pd.DataFrame(rows).T


table = of_repository("reference.json")
table.round(2)

# %% [markdown]
# The losses agree within 0.04, and GPU 0 needs 3.2 GB instead of 4.6. 3.2 GB is more than half of 4.6. FSDP cuts the
# weights that are stored; a layer is whole again while it computes, and activations stay as they are. This record
# does not say how much each of them takes.
#
# **Predict first:** does FSDP save memory with the 1.5B model, too? Here two processes shared one GPU; the peak is that
# of one process.

# %%
of_repository("shared_gpu.json").round(2)

# %% [markdown]
# FSDP saves nothing here. A process of FSDP needs 2.8 GB and one of DDP 2.4, and the losses are the same. (The single
# process, `one`, has twice as many examples in each step.) We did not measure why FSDP needs more. Compare the two on
# your own model before you take FSDP.

# %% [markdown]
# ### On a 24 GB GPU with Mistral-7B
#
# Set `model = "mistral-7b-geometry"` (Mistral-7B's shape, random weights, no download) and `budget_gb = 24` in the
# parameters cell. This notebook ran to its end in that way, on an H200 held to 24 GB. Expect these figures; they come
# from records of that shape on one GPU (`gpu/reference.json`).

# %%
shape = json.loads((course_notebooks / "gpu" / "reference.json").read_text(encoding="utf-8"))
peaks = {name: row["answering_peak_bytes"] for name, row in shape["memory"].items()}
peaks |= {f"QLoRA, a step of {tokens} tokens": shape["qlora"][tokens]["peak_bytes"] for tokens in ("512", "2048")}
print(shape["device"], shape["date"])
(pd.Series(peaks, name="peak, GB") / 1e9).round(2).to_frame()

# %% [markdown]
# ## Tensor parallel: every matrix split
#
# When one GPU is too small or too slow for inference, split each matrix across several. Each process holds a slice of
# every matrix and works on every token. transformers knows the plan for its models, and `tp_plan="auto"` applies it.

# %%
config_of_model = AutoConfig.from_pretrained(found.path)
heads = config_of_model.num_key_value_heads
slices = next(n for n in range(2, heads + 1) if heads % n == 0)
pd.Series(config_of_model.base_model_tp_plan, name="plan").to_frame()

# %% [markdown]
# `colwise` gives each process some outputs of a matrix, and `rowwise` some of its inputs. A `colwise` matrix followed
# by a `rowwise` one needs a single sum at the end (exercise 3 does it by hand). The number of processes must divide
# the number of key-value heads.


# %%
def run_tensor_parallel(slices, target):
    """Logits, answer and shapes of the model split over so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", slices, "--standalone"]
    command += [script.with_name("tensor_parallel.py"), "--model", found.path, "--output", target]
    words, environment = [str(part) for part in command], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-1500:]
    return load_file(target)


tensor_parallel = None
if gpus >= slices or (not gpus and predicted.parameters < 1e9):
    tensor_parallel = run_tensor_parallel(slices, Path(scratch.name) / "tensor_parallel.safetensors")
else:
    print(f"not run here: it needs {slices} GPUs")

# %%
if tensor_parallel:
    whole = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).to(found.device).eval()
    with torch.inference_mode():
        logits = whole(**question.to(found.device)).logits.cpu()
    off = (logits - tensor_parallel["logits"]).abs().max().item()
    alone = whole.generate(**question, max_new_tokens=12, do_sample=False).cpu()
    part = tensor_parallel["self_attn.q_proj"].tolist()
    full = list(whole.model.layers[0].self_attn.q_proj.weight.shape)
    print(f"{slices} processes hold {part} of q_proj's {full}; largest difference of a logit {off:.1e}")
    assert off < 1e-2 and torch.equal(alone, tensor_parallel["answer"]), "the split model answers differently"
    del whole

# %% [markdown]
# **Does it make one answer faster?** A serving engine splits matrices in the same way. vLLM ran on one H200 and on two,
# with Mistral-7B's shape in bf16. Half of the weights is on each GPU. **Predict first:** how many times the tokens of
# one GPU do two give, at one request and at 128?

# %% jupyter={"source_hidden": true}
two_gpus = json.loads((course_notebooks / "gpu" / "two_gpus.json").read_text(encoding="utf-8"))
speeds = {
    name: {f"tokens/s at {n}": found["tokens_per_s"] for n, found in row["requests"].items()}
    for name, row in two_gpus["vllm"]["7b"].items()
}
gains = pd.DataFrame(speeds).T
gains.loc["times"] = gains.iloc[1] / gains.iloc[0]
print(f"{two_gpus['device']}; vLLM {two_gpus['versions']['vllm']}; Mistral-7B's shape; {two_gpus['date']}")
gains.round(2)

# %% [markdown]
# Two GPUs give 1.4 to 1.5 times the tokens of one, not 2 times. After each attention and each MLP the GPUs wait for
# their common sum, and what is no matrix does not get shorter; how long each takes was not measured. Two GPUs hold a model that one cannot hold; that is the
# better reason for them.
#
# ## Many notebooks, many workers
#
# Each notebook of the course is a papermill job without shared state, so any executor can run it. As an example we
# sweep bits and group size of plain rounding, with one small notebook, four settings and two workers of
# [Dask](https://distributed.dask.org). Dask runs the same way on one machine and on a cluster.

# %%
import nbformat

BODY = """import os
import torch

weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
groups = weight.unflatten(-1, (-1, group_size))
scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
error = ((groups / scale).round() * scale - groups).norm() / weight.norm()
print(bits, group_size, f"{error:.4f}", os.getppid())"""
first_cell = nbformat.v4.new_code_cell("bits = 8\ngroup_size = 64", metadata={"tags": ["parameters"]})
sweep = nbformat.v4.new_notebook(cells=[first_cell, nbformat.v4.new_code_cell(BODY)])
sweep.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
nbformat.write(sweep, Path(scratch.name) / "sweep.ipynb")


# %%
def job(folder, bits, group_size):
    """Execute one notebook with its parameters, in a worker process; what its last cell printed."""
    import os

    import papermill

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the kernels log about themselves
    source, target = f"{folder}/sweep.ipynb", f"{folder}/bits{bits}-group{group_size}.ipynb"
    values = {"bits": bits, "group_size": group_size}
    done = papermill.execute_notebook(source, target, values, progress_bar=False)
    return done.cells[-1].outputs[0].text.split()


# %%
from dask.distributed import Client, LocalCluster

logging.getLogger("distributed").setLevel(logging.ERROR)  # a busy machine ends its workers late
grid = [(8, 64), (4, 128), (4, 32), (3, 32)]
workers_here = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
with LocalCluster(**workers_here) as cluster, Client(cluster) as client:
    futures = [client.submit(job, scratch.name, *values) for values in grid]
    answers = [future.result() for future in tqdm(futures, "jobs", disable=None)]

# %%
jobs = pd.DataFrame(answers, columns=["bits", "group_size", "relative error", "worker"])
workers = jobs.pop("worker").nunique()
assert workers == 2 and len(jobs) == len(grid), "both workers should have had work"
print(f"{len(jobs)} notebooks on {workers} workers")
jobs


# %% [markdown]
# ## Serving
#
# For many users at once, take a serving engine. It batches requests as they come and manages the KV cache.
# [vLLM](https://docs.vllm.ai) is such an engine. It is not part of this environment, so no cell here runs it. vLLM 0.26
# ran on one NVIDIA H200, with the 1.5B model and prompts and answers of 128 tokens. **Predict first:** which format is
# the fastest at one request, and which at 128? The columns "tokens/s at 8" and so on name the requests at once.

# %% jupyter={"source_hidden": true}
serving = json.loads((course_notebooks / "gpu" / "serving.json").read_text(encoding="utf-8"))
served = {}
for name in ("bf16", "fp8", "gptq", "awq", "bitsandbytes"):
    row, answers = serving[name], serving[name]["transformers"]
    speeds = {f"tokens/s at {n}": round(found["tokens_per_s"]) for n, found in row["requests"].items()}
    same = f"{answers['same_tokens'].count(answers['of'])} of {len(answers['same_tokens'])}"
    loaded = round(row["weights_bytes"] / 1e9, 2)
    served[name] = {"weights, GB": loaded, **speeds, "same 32 tokens as transformers": same}
print(f"{serving['device']}; vLLM {serving['versions']['vllm']}; {serving['model']}; {serving['date']}")
pd.DataFrame.from_dict(served, orient="index")

# %% [markdown]
# FP8 is the fastest at one request and at 128; bf16 is the fastest at 8 and 32. The three 4-bit formats are slower than
# bf16 at every number of requests. Four bits save memory here: the weights take less than half of bf16's. Where a
# prompt in bf16 got another token than in transformers, transformers' two highest logits were equal.
#
# This model is small for that GPU. **Predict first:** are four bits faster with Mistral-7B's shape?

# %% jupyter={"source_hidden": true}
larger = json.loads((course_notebooks / "gpu" / "serving_7b.json").read_text(encoding="utf-8"))
rows = {name: larger[name] for name in ("bf16", "fp8", "gptq", "bitsandbytes")}
speeds = {
    name: {f"tokens/s at {n}": found["tokens_per_s"] for n, found in row["requests"].items()}
    for name, row in rows.items()
}
weights_gb = pd.Series({name: row["weights_bytes"] / 1e9 for name, row in rows.items()}, name="weights, GB")
print(f"{larger['device']}; vLLM {larger['versions']['vllm']}; {larger['model']}; {larger['date']}")
seven = pd.DataFrame(speeds).T
seven.round().join(weights_gb.round(2))

# %%
(seven / seven.loc["bf16"]).round(2)

# %% [markdown]
# They are, with few requests. GPTQ has 1.30 times the tokens of bf16 at one request and as many at 128, with 4.2 GB of weights
# instead of 14.5. FP8 is faster than GPTQ at every number of requests, with 7.6 GB. bitsandbytes is slower than bf16
# throughout. Two runs of bf16 on two machines differ by less than 2 %, so the order is sure. On this GPU, take FP8 where
# 8 bits fit, and GPTQ where they do not. A GPU with a slower memory, or without FP8 kernels, was not tried.
#
# These commands served the 1.5B model. The names in capitals are folders. The engine has an environment of its own
# (`requirements-serving.txt`); its packages were copied there, because that machine had no internet.
# [The course's GPU page](gpu/README.md#serving-with-vllm-on-an-h200) has kernels, times to the first token and the lean
# loop of [11](11_compare_methods.ipynb) beside them.

# %% jupyter={"source_hidden": true}
Code("\n".join([serving["checkpoints"]["gptq"]["made_by"], serving["command"]]), language="bash")

# %% [markdown]
# **Which of our checkpoints does vLLM take?** vLLM 0.26 refused SmolLM2's GPTQ file of [05](05_gptq.ipynb) for two
# reasons. Its grid is asymmetric (`sym=False`), and vLLM's GPTQ wants a symmetric one. Labelled as symmetric, the file
# was refused for its rows of 576 columns: Marlin wants a multiple of 128. `symmetric_gptq.py` makes a
# symmetric file. The table says what that means for the checkpoints that the notebooks have written here so far.


# %%
def serve(folder, row_length):
    """What to type for a checkpoint, or why not."""
    if (folder / "adapter_config.json").is_file():
        return "not tried: an adapter on its base"
    settings = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    method = settings.get("quant_method")
    if method is None:
        return "no: its format is this course's own; load it as its notebook does"
    if method not in ("gptq", "awq"):
        return f"not tried: {method}"
    if method == "gptq" and not settings.get("sym", True):
        return "refused: an asymmetric grid"
    if row_length % 128:
        sure = "refused" if method == "gptq" else "probably refused"
        return f"{sure}: the kernels want rows that 128 divides, these have {row_length}"
    return f"python notebooks/gpu/serve.py --{method} {folder.name}"


# %%
made = sorted(path.parent for path in checkpoints.folder(output_dir, "x").parent.glob("*/*config.json"))
made = [folder for folder in dict.fromkeys(made) if not folder.name.startswith(".")]
row_length = config_of_model.hidden_size
answers = [(folder.name, serve(folder, row_length)) for folder in made]
commands = pd.DataFrame(answers, columns=["checkpoint", "in the folder of the checkpoints"])
with pd.option_context("display.max_colwidth", None):
    display(commands)

# %% [markdown]
# NVIDIA has an engine of its own, TensorRT-LLM. It runs on NVIDIA GPUs alone, and it was not run for this course. Look
# first at its [list of formats](https://nvidia.github.io/TensorRT-LLM/features/quantization.html): does it take your
# checkpoint? [03](03_hybrid_precision.ipynb) says what TensorRT itself is.

# %% [markdown]
# ## When to use which

# %%
tight = offload.iloc[-1]
slow = f"offload to {tight['first device may take']} of the bytes: {tight['times slower']:.1f} times slower"
sharded, copied = (table.loc[name, "peak, GB"] for name in ("fsdp", "ddp"))
saved = f"{sharded:.1f} GB a GPU instead of {copied:.1f} (reference run)"
split = f"same answer with {slices} processes" if tensor_parallel else "not run here"
many = serving["bf16"]["requests"]["128"]["tokens_per_s"]
choices = {
    "it fits one GPU": ("no split at all", f"{unlimited:.0f} tokens/s here"),
    "it nearly fits": ("4-bit weights first (notebook 04), offload second", slow),
    "training fits one GPU, you have several": ("DDP", f"same curve to {gap:.0e}"),
    "training does not fit one GPU": ("FSDP with bnb_4bit_quant_storage", saved),
    "inference does not fit, or is too slow": ('tp_plan="auto"', split),
    "many users": ("a serving engine", f"{many:,.0f} tokens/s in bf16 at 128 requests (vLLM, one H200)"),
}
pd.DataFrame.from_dict(choices, orient="index", columns=["take", "because"])

# %% [markdown]
# ## What the guides claim

# %%
from helpers.publishing import claims

same_answer = offload["same answer"].mean()
offloaded = (
    f"the same answer at {same_answer:.0%} of the budgets, up to {slowest:.1f} times slower "
    f"(files in the page cache); a 4-bit model: {spill[:60]}"
)
findings = [claims.finding("offload", same_answer, text=offloaded)]
if tensor_parallel:
    findings.append(claims.finding("model-parallel", off, text=f"{slices} processes, logits within {off:.0e}"))
claims.write(output_dir, notebook="12_scale_out", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "12_scale_out"))


# %% [markdown]
# ## Exercises
#
# **1 (easy).** The answer takes one line. How many bytes of weights does each of `n` GPUs hold? DDP copies the 4-bit
# base, FSDP cuts it. The same holds for the adapters and their two Adam averages, all in float32.


# %%
def bytes_per_gpu(base_bytes, adapter_parameters, n, sharded):
    """Bytes on each GPU."""
    ...


# %%
def test_bytes(function):
    answer = function(4e9, 1e6, 2, sharded=False)
    assert answer is not None, "return a number"
    assert answer == 4e9 + 12e6, "DDP copies all: base, adapters (4 bytes), two averages (4 bytes each)"
    assert function(4e9, 1e6, 2, sharded=True) == (4e9 + 12e6) / 2, "FSDP cuts base, adapters and averages"


exercises.check(bytes_per_gpu, test_bytes)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def bytes_per_gpu(base_bytes, adapter_parameters, n, sharded):
        return (base_bytes + 12 * adapter_parameters) / (n if sharded else 1)

    exercises.require(bytes_per_gpu, test_bytes)


# %% [markdown]
# **2 (medium).** The answer takes one line. Predict first. Two processes take `first` and `second` examples of a
# batch. Each computes the mean gradient of its own examples, and DDP averages the two. For which sizes is the result
# the gradient of the whole batch? The check measures it.


# %%
def same_as_one_process(first, second):
    """True where the averaged gradient is that of the whole batch."""
    ...


# %%
def mean_gradient(x):
    """Gradient of the mean of (w - x)² at w = 0."""
    w = torch.zeros((), requires_grad=True)
    ((w - x) ** 2).mean().backward()
    return w.grad


def test_same(function):
    for first, second in ((2, 2), (1, 3), (3, 3), (5, 2)):
        x = torch.arange(first + second, dtype=torch.float32) ** 2
        averaged = (mean_gradient(x[:first]) + mean_gradient(x[first:])) / 2
        real = torch.allclose(averaged, mean_gradient(x))
        answer = function(first, second)
        assert answer is not None, "return True or False"
        said = f"{averaged:.2f} averaged, {mean_gradient(x):.2f} for the whole batch"
        assert bool(answer) == real, f"{first} and {second} examples: {said}"


exercises.check(same_as_one_process, test_same)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def same_as_one_process(first, second):
        return first == second

    exercises.require(same_as_one_process, test_same)


# %% [markdown]
# **3 (hard).** The answer takes about three lines. Do tensor parallel by hand. Cut `gate` and `up` by rows and `down`
# by columns into `n` slices, and let each slice compute alone. The sum of the slices must be the whole. Why must the
# slices of `gate` and `up` be the same rows?


# %%
def split_mlp(x, gate, up, down, n):
    """x [tokens, hidden]; gate, up [inner, hidden]; down [hidden, inner]: n partial sums [tokens, hidden]."""
    ...


# %%
def test_split(function):
    torch.manual_seed(0)
    x, gate, up, down = torch.randn(5, 16), torch.randn(48, 16), torch.randn(48, 16), torch.randn(16, 48)
    parts = function(x, gate, up, down, 3)
    assert parts is not None and len(parts) == 3, "return one partial result for each slice"
    wanted = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert all(part.shape == wanted.shape for part in parts), "each slice gives a full-size partial sum"
    assert torch.allclose(sum(parts), wanted, atol=1e-3), "the partial results do not add up"
    assert not torch.allclose(parts[0], wanted, atol=1e-3), "the first slice did all the work"


exercises.check(split_mlp, test_split)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:

    def split_mlp(x, gate, up, down, n):
        slices = zip(gate.chunk(n), up.chunk(n), down.chunk(n, dim=1), strict=True)
        return [(torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T for g, u, d in slices]

    exercises.require(split_mlp, test_split)

# %% [markdown]
# ## Quiz
#
# Answer three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("12_scale_out")

# %% [markdown]
# ## Takeaways
#
# 1. **Offload changes the speed, not the answer.** `device_map="auto"` with `max_memory` places every module. Look at
#    `hf_device_map`, because nothing else tells you. 4-bit weights refuse to go to the disk.
# 2. **One script, any number of processes.** The launcher's configuration decides between one process, DDP and FSDP.
#    With equal shares of the same batch, the curves agree within rounding.
# 3. **Choose the split by what you lack.** Take FSDP for memory in training of a model like Mistral-7B: 2 GPUs need less
#    memory each, not less work. Take tensor parallel for memory or speed in inference, and a serving engine for many users.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% tags=["record"]
scratch.cleanup()
records.write(
    output_dir,
    method="qlora-ddp",
    notebook="12_scale_out",
    found=found,
    windows=windows,
    bits_per_weight=8 * weights / predicted.parameters,
    weight_bytes=weights,
    peak_memory_bytes=cost.peak_vram if found.device == "cuda" else cost.peak_ram,
    scores=scores,
    decode_tokens_per_s=rate,
    quantize_seconds=reports[f"{processes} processes"]["seconds"],
)
print("recorded: qlora-ddp")
