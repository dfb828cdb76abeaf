# %% [markdown]
# # 12 Beyond one GPU
#
# Run a model that does not fit, train it with several processes without changing the result, and find the engine for the next step.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
# 1. Place a model on GPU, RAM and disk under a budget, and know what each placement costs.
# 2. Train one QLoRA with several processes, and show that the loss curve is the one of a single process.
# 3. Split a model over processes (FSDP, tensor parallel), spread notebooks over workers, and serve a checkpoint.
#
# **Before you start:** LoRA on 4-bit weights is in [07](07_qlora.ipynb), memory arithmetic in [00](00_start_here.ipynb).

# %% tags=["bootstrap"]
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

# %%
import json, logging, os, subprocess, sys, tempfile, time, warnings
from pathlib import Path

import helpers
from helpers import checkpoints, evaluation, exercises, figures, memory, models, records, speed
import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Code
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

figures.style()
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
for name in ("accelerate.big_modeling", "bitsandbytes"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks for names that transformers renamed

# %%
found = models.find(model, copies=2)
gpus = torch.cuda.device_count() if found.device == "cuda" else 0
cores = helpers.cores()
files = Path(helpers.__file__).parent.parent / "notebooks"
script = files / "scale_out" / "train.py"
data = files / "data" / "quantization_qa.jsonl"
tokenizer = AutoTokenizer.from_pretrained(found.path)
predicted = memory.predict(AutoConfig.from_pretrained(found.path))
print(f"{found.name}, {predicted.parameters / 1e6:.0f} M parameters; {gpus} GPUs, {cores} cores")

# %% [markdown]
# ## A smaller GPU than you have
# To know whether something fits a 24 GB or a 16 GB card, take the card away from yourself: PyTorch then raises the same out-of-memory error
# that the smaller card would. `budget_gb = 0` sets no limit.

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
# ## Offload: what does not fit goes elsewhere
# `device_map="auto"` fills the first device up to `max_memory`, then the next, and the disk takes the rest. During the forward pass, each
# layer's weights are fetched just before they are needed. Nothing is quantized and nothing is left out, so **the answer must not change**.
#
# Here the first device is held to a share of the model's bytes.

# %%
dtype = torch.bfloat16
size = 2 * predicted.parameters
first = 0 if gpus else "cpu"
question = tokenizer("The for statement is used to", return_tensors="pt")

def answer(net, new_tokens=12):
    """The model's answer, and the new tokens per second with everything around them."""
    started = time.perf_counter()
    ids = net.generate(**question.to(found.device), max_new_tokens=new_tokens, do_sample=False)
    return ids, (ids.shape[1] - question.input_ids.shape[1]) / (time.perf_counter() - started)

plain = AutoModelForCausalLM.from_pretrained(found.path, dtype=dtype).to(found.device).eval()
answer(plain, new_tokens=2)  # warms up
expected, unlimited = answer(plain)
del plain
print(f"{size / 1e6:.0f} MB in {dtype}, {unlimited:.1f} tokens/s:", repr(tokenizer.decode(expected[0])))


# %%
def placed(share, folder):
    """At most `share` of the model's bytes on the first device; a GPU has half of them in RAM behind it."""
    limits = {first: int(share * size)} | ({"cpu": size // 2} if gpus else {})
    return AutoModelForCausalLM.from_pretrained(
        found.path, dtype=dtype, device_map="auto", max_memory=limits, offload_folder=folder).eval()

rows, placements = [], {}
with tempfile.TemporaryDirectory() as folder:
    for share in tqdm([share for share in shares if share < 1], "placements", disable=None):
        net = placed(share, folder)
        where = {name: str(device) for name, device in net.hf_device_map.items()}
        placements[f"{share:.0%}"] = where
        ids, rate = answer(net)
        assert torch.equal(ids, expected), f"offloading changed the answer at {share:.0%}"
        kept = sum(device not in ("cpu", "disk") if gpus else device == "cpu" for device in where.values())
        rows.append({"first device may take": f"{share:.0%}", "modules there": kept, "modules": len(where),
                     "same answer": True, "tokens/s": rate, "times slower": unlimited / rate})
        del net
offload = pd.DataFrame(rows)

# %%
kinds = {"0": 0, "cpu": 1, "disk": 2}
names = list(next(iter(placements.values())))
grid = [[kinds[where[name]] for name in names] for where in placements.values()]
used = [(name, figures.PALETTE[i]) for i, name in enumerate(("GPU", "RAM", "disk"))]
fig, ax = plt.subplots(figsize=(9, 0.6 + 0.5 * len(grid)))
for row, line in enumerate(grid):
    for column, kind in enumerate(line):
        ax.barh(row, 0.9, left=column, color=used[kind][1], hatch=("", "", "//")[kind])
ax.set(yticks=range(len(grid)), yticklabels=placements, xlabel="module, in the order of the forward pass")
present = sorted({kind for line in grid for kind in line})
handles = [plt.Rectangle((0, 0), 1, 1, color=used[kind][1]) for kind in present]
ax.legend(handles, [used[kind][0] for kind in present], ncol=3, fontsize=8, loc="lower right")
slowest = offload["times slower"].max()
figures.show(fig, table=offload.round(2), alt="Where each module lies under each budget: the first device "
             f"from the left, the rest behind it. The tightest budget decodes {slowest:.1f} times slower.")

# %% [markdown]
# These files were just read, so they lie in the system's page cache; a cold disk is slower than this. Two traps:
#
# - `device_map="auto"` says nothing when it spills. Look at `hf_device_map`, as above.
# - 4-bit weights do not offload to the disk:

# %%
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
limits = {first: size // 8} | ({"cpu": size // 8} if gpus else {})
with tempfile.TemporaryDirectory() as folder:
    try:
        AutoModelForCausalLM.from_pretrained(
            found.path, quantization_config=nf4, device_map="auto", max_memory=limits, offload_folder=folder)
        spill = "loaded"
    except ValueError as problem:
        spill = str(problem).split(". ")[0]
print(spill)

# %% [markdown]
# ## Several processes, one curve
# **DDP**: every process holds the whole 4-bit model, takes its share of each batch, and the processes average their gradients before the
# step. Averaging the gradients of two halves is the gradient of the whole, so the loss curve must not depend on the number of processes.
#
# One script serves one process, several, and sharded GPUs; only the launcher's configuration differs. Its core:

# %%
source = script.read_text(encoding="utf-8")
start, end = source.index("    # FSDP shards"), source.index("    trainer = InOrder")
Code(source[start:end], language="python")

# %%
config = "ddp_gpu.yaml" if gpus > 1 else "ddp_cpu.yaml"
print(config)
Code((script.parent / config).read_text(encoding="utf-8"), language="yaml")


# %%
def check_processes(processes, batch):
    there, what = (gpus, "GPUs") if gpus > 1 else (cores, "cores")
    if not 1 <= processes <= there:
        raise ValueError(f"processes={processes}, but this machine has {there} {what}")
    if batch % processes:
        raise ValueError(f"a batch of {batch} cannot be split over {processes} processes")

for wrong in ((cores + gpus + 1, batch), (2, 5)):
    try:
        check_processes(*wrong)
    except ValueError as problem:
        print("ValueError:", problem)
if cores > 1:
    check_processes(processes, batch)


# %%
def launch(name, *launcher, share=1):
    """Train in new processes, each with 1 / share of the cores; what rank 0 reported."""
    out = Path(scratch.name) / name
    settings = {"--model": found.path, "--data": data, "--output": out, "--steps": steps, "--batch": batch}
    command = [*launcher, script, *(part for pair in settings.items() for part in pair)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // share))}
    environment |= {} if gpus > 1 else {"CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment,
                          timeout=900)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-1500:]}")
    return json.loads((out / "losses.json").read_text()) | {"seconds": time.perf_counter() - started}


# %% [markdown]
# `accelerate launch --config_file ddp_cpu.yaml train.py ...`, and the same script without a launcher:

# %%
scratch = tempfile.TemporaryDirectory()
ddp = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", script.parent / config,
       "--num_processes", processes, "--main_process_port", 0]
runs = {"1 process": ([sys.executable], 1), f"{processes} processes": (ddp, processes)}
reports = {name: launch(name, *launcher, share=share)
           for name, (launcher, share) in tqdm(runs.items(), "training", disable=None)}
curves = pd.DataFrame({name: report["losses"] for name, report in reports.items()})
gap = (curves.iloc[:, 0] - curves.iloc[:, 1]).abs().max()
print(f"largest difference between the curves: {gap:.1e}; seconds with start-up:",
      ", ".join(f"{name} {report['seconds']:.0f}" for name, report in reports.items()))

# %%
fig, ax = plt.subplots(figsize=(6, 3))
for (name, curve), style, color in zip(curves.items(), ("-", "--"), figures.PALETTE):
    ax.plot(curve.index + 1, curve, style, marker="o", label=name, color=color)
ax.set(xlabel="step", ylabel="loss on the answers"), ax.legend()
curves.index = pd.RangeIndex(1, len(curves) + 1, name="step")
figures.show(fig, table=curves.round(4), alt="Loss of both runs over the steps. The curves lie on each "
             f"other, largest difference {gap:.1e}.")

# %%
from safetensors.torch import load_file

assert reports[f"{processes} processes"]["processes"] == processes, "accelerate did not start that many"
assert gap < (2e-2 if gpus > 1 else 1e-4), f"the curves differ by {gap:.2g}"  # bfloat16 on GPUs, float32 here
folders = [Path(scratch.name) / name / "adapter" for name in runs]
one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
apart = max((one[name] - two[name]).abs().max().item() for name in one)
largest = max(tensor.abs().max().item() for tensor in one.values())
left = sorted(path.name for path in folders[1].iterdir())
print(f"adapter weights up to {largest:.3f}, {apart:.1e} apart; written by rank 0: {', '.join(left)}")

# %% [markdown]
# The processes divide the cores among them, so both runs use all of them. Two batches take turns: compare every second point.
#
# The adapter that two processes trained is an adapter like any other:

# %%
from peft import PeftModel

with memory.track() as cost:
    net = AutoModelForCausalLM.from_pretrained(found.path, quantization_config=nf4, dtype=found.fast)
    net = PeftModel.from_pretrained(net, Path(scratch.name) / f"{processes} processes" / "adapter").eval()
windows = evaluation.windows(tokenizer, tokens=eval_tokens)
reference = evaluation.reference(found, windows)
scores = evaluation.score(net, windows, reference, batch_size=8)  # every pass unpacks all weights
with checkpoints.writing(output_dir, "qlora-ddp") as folder:
    net.save_pretrained(folder), tokenizer.save_pretrained(folder)
rate, weights = speed.decode(net, new_tokens=8, runs=2).decode_tokens_per_s, memory.weight_bytes(net)
print(f"perplexity {reference.perplexity:.2f} -> {scores.perplexity:.2f}, KL {scores.kl_divergence:.3f}")
del net

# %% [markdown]
# ## FSDP: one model, sharded
# **FSDP** cuts each layer's weights into one shard per GPU and gathers a layer only while it computes. It flattens the tensors of a layer into
# one, so all of them must have one dtype. 4-bit codes are bytes; `bnb_4bit_quant_storage` declares the same bytes to be bfloat16:

# %%
from bitsandbytes.nn import Linear4bit

rows = []
for storage in (torch.uint8, torch.bfloat16):
    layer = Linear4bit(1024, 1024, bias=False, quant_type="nf4", quant_storage=storage)
    layer.load_state_dict({"weight": torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))})
    layer.to(found.device)
    raw = layer.weight.data.view(torch.uint8)
    rows.append({"bnb_4bit_quant_storage": str(storage), "dtype": str(layer.weight.dtype),
                 "numbers": layer.weight.numel(), "bytes": raw.numel(),
                 "sum of bytes": int(raw.sum(dtype=torch.int64))})
storages = pd.DataFrame(rows)
assert storages["sum of bytes"].nunique() == 1, "the codes should be the same bytes"
storages

# %%
print(f"accelerate launch --config_file fsdp_gpu.yaml --num_processes {max(gpus, 2)}",
      "train.py --model MODEL --data DATA --output OUT")
Code((script.parent / "fsdp_gpu.yaml").read_text(encoding="utf-8"), language="yaml")

# %% [markdown]
# It needs a GPU for each process:

# %%
fsdp = None
if gpus > 1:
    fsdp = launch("fsdp", sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                  script.parent / "fsdp_gpu.yaml", "--num_processes", gpus, "--main_process_port", 0)
    print("losses:", [round(loss, 3) for loss in fsdp["losses"]])
    print(f"peak of GPU 0: {fsdp['peak_vram_bytes'] / 1e9:.2f} GB, with DDP "
          f"{reports[f'{processes} processes']['peak_vram_bytes'] / 1e9:.2f} GB")
else:
    print(f"not run here: it needs two GPUs, this machine has {gpus}")

# %% [markdown]
# What it did on two GPUs, from a run whose result is in the course's repository (`scale_out/reference.json`):

# %%
measured = json.loads((script.parent / "reference.json").read_text(encoding="utf-8"))
table = pd.DataFrame({name: {"first loss": run["losses"][0], "last loss": run["losses"][-1],
                             "peak of GPU 0, GB": run["peak_vram_bytes"] / 1e9}
                      for name, run in measured["runs"].items()}).T
print(f"{measured['device']}; {measured['model']}; {measured['date']}")
table.round(2)

# %% [markdown]
# ## Tensor parallel: every matrix split
# For inference that one GPU is too slow or too small for: each process holds a slice of every matrix and works on every token. transformers
# knows the plan of its models; `tp_plan="auto"` applies it.

# %%
config_of_model = AutoConfig.from_pretrained(found.path)
heads = config_of_model.num_key_value_heads
slices = next(n for n in range(2, heads + 1) if heads % n == 0)
pd.Series(config_of_model.base_model_tp_plan, name="plan").to_frame()

# %% [markdown]
# `colwise` gives each process some output rows of a matrix, `rowwise` some of its inputs; a pair of them needs one sum at its end. The number of
# processes must divide the key-value heads.

# %%
tensor_parallel = None
if gpus >= slices or (not gpus and predicted.parameters < 1e9):
    target = Path(scratch.name) / "tensor_parallel.safetensors"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", slices,
                "--standalone", script.with_name("tensor_parallel.py"),
                "--model", found.path, "--output", target]
    done = subprocess.run([str(part) for part in torchrun], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-1500:]
    tensor_parallel = load_file(target)
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
# ## Many notebooks, many workers
# Each notebook of the course is a papermill job without shared state, so any executor takes it. Here: two workers of
# [Dask](https://distributed.dask.org), which run the same way on one machine or on a cluster, and a small web server as the store. papermill reads
# and writes `http://` addresses by itself, as it does `s3://` or `gs://`.

# %%
import http.server, threading

class Store(http.server.BaseHTTPRequestHandler):
    """Keeps what is PUT in memory and gives it back."""
    files = {}

    def do_PUT(self):
        self.files[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200), self.send_header("Content-Length", "0"), self.end_headers()

    def do_GET(self):
        body = self.files.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body or b""))), self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        pass


# %%
import nbformat

sweep = nbformat.v4.new_notebook(cells=[
    nbformat.v4.new_code_cell("bits = 16\ngroup_size = 64", metadata={"tags": ["parameters"]}),
    nbformat.v4.new_code_cell("import os\nper_weight = bits + (32 / group_size if bits < 16 else 0)\n"
                              "print(f'{bits} {group_size} {7.25 * per_weight / 8:.2f} {os.getppid()}')")])
sweep.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=server.serve_forever, daemon=True).start()
store = f"http://127.0.0.1:{server.server_port}"
Store.files["/sweep.ipynb"] = nbformat.writes(sweep).encode()


# %%
def job(store, bits, group_size):
    """One notebook, from the store to the store; runs in a worker process."""
    import os
    import papermill
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the kernels log about themselves
    target = f"{store}/bits{bits}-group{group_size}.ipynb"
    values = {"bits": bits, "group_size": group_size}
    papermill.execute_notebook(f"{store}/sweep.ipynb", target, values, progress_bar=False)
    return target


# %%
from dask.distributed import Client, LocalCluster

grid = [(16, 64), (8, 64), (4, 128), (4, 32)]
workers_here = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
with LocalCluster(**workers_here) as cluster, Client(cluster) as client:
    futures = [client.submit(job, store, *values) for values in grid]
    targets = [future.result() for future in tqdm(futures, "jobs", disable=None)]

# %%
answers = []
for target in targets:
    done = nbformat.reads(Store.files["/" + target.split("/")[-1]].decode(), as_version=4)
    answers.append(done.cells[-1].outputs[0].text.split())
server.shutdown()
jobs = pd.DataFrame(answers, columns=["bits", "group_size", "GB of 7.25 B weights", "worker"])
workers = jobs.pop("worker").nunique()
assert workers == 2 and len(jobs) == len(grid), "both workers should have had work"
print(f"{len(jobs)} notebooks on {workers} workers")
jobs


# %% [markdown]
# ## Serving
# For many users at once, take a serving engine: it batches requests continuously and manages the KV cache. These are
# [vLLM](https://docs.vllm.ai)'s commands for the checkpoints that the notebooks have written so far. vLLM is not part of this
# environment: **they were not run here.**

# %%
def serve(folder):
    if (folder / "adapter_config.json").is_file():
        return f"vllm serve {found.name} --enable-lora --lora-modules {folder.name}=checkpoints/{folder.name}"
    config = json.loads((folder / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    known = {"gptq": "gptq_marlin", "awq": "awq_marlin", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}
    if method in known:
        return f"vllm serve checkpoints/{folder.name} --quantization {known[method]}"
    return "no: its format is this course's own; load it as its notebook does"

made = sorted(path.parent for path in checkpoints.folder(output_dir, "x").parent.glob("*/*config.json"))
made = [folder for folder in dict.fromkeys(made) if not folder.name.startswith(".")]
commands = pd.DataFrame([(folder.name, serve(folder)) for folder in made], columns=["checkpoint", "command"])
with pd.option_context("display.max_colwidth", None):
    display(commands)

# %% [markdown]
# ## When to use which

# %%
tight = offload.iloc[-1]
pd.DataFrame([
    ["it fits one GPU", "no split at all", f"{unlimited:.0f} tokens/s here"],
    ["it nearly fits", "4-bit weights first (notebook 04), offload second",
     f"offload to {tight['first device may take']} of the bytes: {tight['times slower']:.1f} times slower"],
    ["training fits one GPU, you have several", "DDP", f"same curve to {gap:.0e}"],
    ["training does not fit one GPU", "FSDP with bnb_4bit_quant_storage",
     "{:.1f} GB a GPU instead of {:.1f} (reference run)".format(
         *(table.loc[name, "peak of GPU 0, GB"] for name in ("fsdp", "ddp")))],
    ["inference does not fit, or is too slow", 'tp_plan="auto"',
     f"same answer with {slices} processes" if tensor_parallel else "not run here"],
    ["many users", "a serving engine", "not run here"],
], columns=["if", "take", "because"])

# %% [markdown]
# ## What the guides claim

# %%
from helpers import claims

same_answer = offload["same answer"].mean()
offloaded = (f"the same answer at {same_answer:.0%} of the budgets, up to {slowest:.1f} times slower "
             f"(files in the page cache); a 4-bit model: {spill[:60]}")
findings = [claims.finding("offload", same_answer, text=offloaded)]
if tensor_parallel:
    findings.append(claims.finding("model-parallel", off,
                                   text=f"{slices} processes, logits within {off:.0e}"))
claims.write(output_dir, notebook="12_scale_out", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "12_scale_out"))


# %% [markdown]
# ## Exercises
# **1 (easy).** Bytes of weights on each of `n` GPUs: the 4-bit base is copied under DDP and cut under FSDP; adapters and their two Adam averages
# (all float32) likewise.

# %%
def bytes_per_gpu(base_bytes, adapter_parameters, n, sharded):
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
# **2 (medium).** The same global batch everywhere: how many gradient accumulation steps does each of `n` processes need? Raise `ValueError` where
# it does not come out even.

# %%
def accumulation_steps(global_batch, per_device_batch, n):
    ...


# %%
def test_accumulation(function):
    assert function(32, 4, 2) is not None, "return a number"
    assert function(32, 4, 2) == 4, "two processes of 4 see 8 examples at a time: 4 times"
    assert function(8, 8, 1) == 1 and function(64, 1, 8) == 8
    try:
        function(30, 4, 2)
    except ValueError:
        return
    raise AssertionError("30 examples do not split into steps of 8: raise ValueError")

exercises.check(accumulation_steps, test_accumulation)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:
    def accumulation_steps(global_batch, per_device_batch, n):
        steps, rest = divmod(global_batch, per_device_batch * n)
        if rest or not steps:
            raise ValueError(f"{global_batch} is not a multiple of {per_device_batch} x {n}")
        return steps

    exercises.require(accumulation_steps, test_accumulation)


# %% [markdown]
# **3 (hard).** Tensor parallel by hand: cut `gate` and `up` by rows and `down` by columns into `n` slices, let each slice compute alone, and sum.
# Why must the slices of `gate` and `up` be the same rows?

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
        slices = zip(gate.chunk(n), up.chunk(n), down.chunk(n, dim=1))
        return [(torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T for g, u, d in slices]

    exercises.require(split_mlp, test_split)

# %% [markdown]
# ## Quiz
#
# Three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("12_scale_out")

# %% [markdown]
# ## Takeaways
# 1. **Offload changes the speed, not the answer.** `device_map="auto"` with `max_memory` places every module; look at `hf_device_map`, because
#    nothing else tells you. 4-bit weights stay on one kind of device.
# 2. **One script, any number of processes.** The launcher's configuration decides between one process, DDP and FSDP; at the same global batch the
#    curves agree within rounding.
# 3. **Choose the split by what is short**: memory in training (FSDP), memory or speed in inference (tensor parallel), throughput (a serving engine),
#    many notebooks (any executor that can call papermill).
#
# <!-- navigation -->
# <!-- /navigation -->

# %% tags=["record"]
scratch.cleanup()
records.write(
    output_dir, method="qlora-ddp", notebook="12_scale_out", found=found, windows=windows,
    bits_per_weight=8 * weights / predicted.parameters, weight_bytes=weights,
    peak_memory_bytes=cost.peak_vram if found.device == "cuda" else cost.peak_ram,
    scores=scores, decode_tokens_per_s=rate, quantize_seconds=reports[f"{processes} processes"]["seconds"])
print("recorded: qlora-ddp")
