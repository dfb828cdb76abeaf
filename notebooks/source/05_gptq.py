# %% [markdown]
# # 05 GPTQ
#
# Round a weight column by column, let the columns to come repair each error, and see what that is worth in a whole model.
#
# <!-- badge -->
# <!-- /badge -->
#
# <!-- cost -->
# <!-- /cost -->

# %% [markdown]
# ## Goals
#
# 1. Rebuild GPTQ on one layer, and get the same codes as the library.
# 2. Quantize the whole model with `auto-gptq`, as every guide shows it, and with `gptqmodel`, its successor; save, reload, chat.
# 3. Choose calibration text, grid and order of columns by what they do to text that nobody calibrated on.
#
# **Before you start:** [04 NF4](04_nf4_bitsandbytes.ipynb) for quantization without calibration, and [00](00_start_here.ipynb) for sizes.

# %% tags=["bootstrap"]
# `make notebooks` fills in the bootstrap cell.

# %% tags=["parameters"]
model = "auto"
output_dir = "build"
solutions = False
eval_tokens = 4096
bits = 4
group_size = 64
sym = False
desc_act = True
act_group_aware = False
calibration_source = "own"
calibration_samples = 32
calibration_length = 256
study_layers = 3
max_new_tokens = 48
push_to_hub = False
hub_repository = "your-name/model-gptq-4bit"

# %%
import os

# On two cores gptqmodel asks for two workers and gives itself one. Set before it is imported.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import contextlib, copy, getpass, hashlib, inspect, io, json, logging, pathlib, re
import shutil, subprocess, sys, tempfile, time, warnings

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import helpers
from helpers import archived, chat, checkpoints, evaluation, exercises, figures
from helpers import memory, models, records, speed

figures.style()
transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore", FutureWarning)
for name in ("auto_gptq", "tokenicer", "bitsandbytes", "accelerate"):
    logging.getLogger(name).setLevel(logging.ERROR)  # they explain themselves at length
pd.set_option("display.max_colwidth", None)


# %% [markdown]
# What cannot work should stop now, with a reason, not after minutes of computing:

# %%
def preflight(config, bits, group_size, samples):
    """Raise ValueError, before any weight is loaded, for settings and calibration that cannot work."""
    if getattr(config, "quantization_config", None):
        raise ValueError("this model is quantized already; take the original one")
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"the GPTQ format of auto-gptq has 2, 3, 4 or 8 bits, not {bits}")
    widths = sorted({config.hidden_size, config.intermediate_size})
    fitting = [size for size in (16, 32, 64, 128, 256) if not any(width % size for width in widths)]
    if group_size not in fitting:
        raise ValueError(f"group_size {group_size} does not fit layers {widths} wide; take one of {fitting}")
    if not len(samples) or min(map(len, samples)) < 10:
        raise ValueError(f"calibration needs samples of 10 tokens or more; got {[len(s) for s in samples]}")


# %%
found = models.find(model, copies=2.5)
tokenizer = AutoTokenizer.from_pretrained(found.path)
config = AutoConfig.from_pretrained(found.path)

# %%
windows = evaluation.windows(tokenizer, tokens=eval_tokens)  # four genres, in turn
in_domain = evaluation.windows(tokenizer, source="pydoc", tokens=eval_tokens // 4)
reference = evaluation.reference(found, windows)
in_domain_reference = evaluation.reference(found, in_domain)
docs = evaluation.windows(tokenizer, "calibration", 24 * 128, 128, source="pydoc")
preflight(config, bits, group_size, docs)
fast = found.fast  # the reference is computed in the model's full precision, everything else in this
print(f"{found.name} on the {found.device.upper()}, {found.origin}")
print(f"documentation to calibrate on: {len(docs)} samples of {docs.shape[1]} tokens")


# %% [markdown]
# ## The idea: errors can be repaired by their neighbours
#
# Rounding to nearest makes each *weight* as good as it can be. What counts is the layer's *output* on real inputs `X`, and there the
# errors of two weights can cancel. [GPTQ](https://arxiv.org/abs/2210.17323) rounds one input column after the other and adds to the
# columns that are still free what makes up best for the error just made. How columns can stand in for each other is in the
# **Hessian** of the squared output error, `H = 2 X Xᵀ`, collected from calibration text.

# %%
def capture(net, module, windows):
    """The inputs of one module on some windows, as float32 [tokens, columns]."""
    inputs = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2).float()))
    with torch.inference_mode():
        for batch in windows.to(net.device).split(4):
            net.model(input_ids=batch, use_cache=False)
    hook.remove()
    return torch.cat(inputs)


# %%
net = AutoModelForCausalLM.from_pretrained(found.path, dtype=fast).to(found.device).eval()
layer = net.model.layers[config.num_hidden_layers // 2].mlp.up_proj
weight = layer.weight.detach().float()
inputs = capture(net, layer, docs)
hessian = 2 / len(inputs) * inputs.T @ inputs

# %%
energy = hessian.diagonal().cpu().sort(descending=True).values
share = energy.cumsum(0) / energy.sum()
at = pd.Series({f"{part:.0%} of the columns": share[int(part * len(share)) - 1].item()
                for part in (0.01, 0.1, 0.5)}, name="share of the energy")
fig, ax = plt.subplots()
ax.semilogy(energy)
ax.set(xlabel="input column, loudest first", ylabel="mean squared input (x 2)")
figures.show(fig, alt="The diagonal of the Hessian: how loud each input column of this layer is. The loudest "
             f"10 % carry {at.iloc[1]:.0%} of the energy, so an error there costs most.",
             table=at.to_frame().round(3))


# %% [markdown]
# ## From scratch
#
# The grid first: `2^bits` levels with one scale per row and group, symmetric around zero (`sym=True`). Round-to-nearest on it is the
# floor that GPTQ has to beat.

# %%
def group_scale(group, bits):
    """A scale per row of a group [..., rows, columns]: the largest magnitude is half a step above the top."""
    return (2 * group.abs().amax(-1) / (2**bits - 1)).clamp(min=1e-8)  # a group of zeros too

def to_grid(values, scale, bits):
    """The nearest of the 2^bits levels -2^(bits-1) ... 2^(bits-1) - 1, times scale."""
    half = 2 ** (bits - 1)
    return (values / scale).round().clamp(-half, half - 1) * scale

def round_to_nearest(weight, group_size=64, bits=4):
    groups = weight.float().unflatten(-1, (-1, group_size))
    return to_grid(groups, group_scale(groups, bits)[..., None], bits).flatten(-2)


# %% [markdown]
# Which column repairs which, and by how much, is in the inverse Hessian. Its upper Cholesky factor holds just the rows that are
# needed, in the order of the columns. **Damping** adds a little to the diagonal, or columns that never see a signal make `H` singular.

# %%
def inverse_factor(hessian, damp=0.01):
    """The upper Cholesky factor of the inverse of the damped Hessian [..., columns, columns]."""
    damped = hessian.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)  # a view
    diagonal += damp * diagonal.mean(-1, keepdim=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


# %% [markdown]
# The update itself. Within a block of columns each error goes to its neighbours at once; the rest of the matrix gets the block's errors
# in one product, which is the same arithmetic, done fast.
#
# The **order** matters: a column done early can still be repaired by many, so the loudest should come first. `desc_act` sorts all
# columns; then a group is no longer a run of neighbours, and kernels need an index. `act_group_aware`, gptqmodel's own, sorts
# whole groups and the columns inside each, and needs none.

# %%
def loudest_first(energy, group_size, keep_groups):
    """The order of the columns [..., columns] by the diagonal of the Hessian, groups kept together or not."""
    if not keep_groups:
        return energy.argsort(-1, descending=True)
    groups = energy.unflatten(-1, (-1, group_size))
    start = torch.arange(0, energy.shape[-1], group_size, device=energy.device)[:, None]
    inside = groups.argsort(-1, descending=True) + start
    return inside.take_along_dim(groups.amax(-1).argsort(-1, descending=True)[..., None], -2).flatten(-2)


# %%
@torch.inference_mode()
def gptq(weight, hessian, group_size=64, bits=4, damp=0.01, order=None, blocksize=128):
    """weight [..., rows, columns], hessian [..., columns, columns] -> the quantized weight, in float32."""
    W, columns = weight.float().clone(), weight.shape[-1]
    dead = hessian.diagonal(dim1=-2, dim2=-1) == 0
    W, H = W.masked_fill(dead[..., None, :], 0), hessian + torch.diag_embed(dead.float())
    if order:
        turn = loudest_first(H.diagonal(dim1=-2, dim2=-1), group_size, keep_groups=order == "act_group_aware")
        W = W.take_along_dim(turn[..., None, :], -1)
        H = H.take_along_dim(turn[..., None, :], -1).take_along_dim(turn[..., None], -2)
    U, Q = inverse_factor(H, damp), torch.zeros_like(W)
    for left in range(0, columns, blocksize):
        right = min(left + blocksize, columns)
        block, errors = W[..., left:right].clone(), torch.zeros_like(W[..., left:right])
        for i, column in enumerate(range(left, right)):
            if column % group_size == 0:
                scale = group_scale(W[..., column : column + group_size], bits)
            Q[..., column] = to_grid(block[..., i], scale, bits)
            errors[..., i] = (block[..., i] - Q[..., column]) / U[..., column, column, None]
            block[..., i:] -= errors[..., i, None] * U[..., column, None, column:right]
        W[..., right:] -= errors @ U[..., left:right, right:]
    return Q.take_along_dim(turn.argsort(-1)[..., None, :], -1) if order else Q


# %% [markdown]
# The library's own class, fed the same inputs, once in each order.
#
# Both packages talk a lot. In Jupyter you see their progress; in a batch run it is left out.

# %%
def quietly():
    """Nothing of what a library prints in a batch run; everything in Jupyter."""
    return contextlib.redirect_stdout(io.StringIO()) if helpers.batch() else contextlib.nullcontext()

with quietly():
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.looper import loop_processor
    from gptqmodel.quantization.gptq import GPTQ
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

loop_processor._PROJECT_LOG_DIR = records.folder(output_dir) / "logs"  # or it makes ./logs wherever you are

def library_gptq(weight, inputs, **settings):
    """gptqmodel's result for one weight, float32."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight.data = weight.clone()
    task = GPTQ(linear, QuantizeConfig(offload_to_disk=False, damp_percent=0.01, **settings))
    task.quantizer.configure(perchannel=True)
    task.add_batch(inputs[None], None)
    return task.quantize()[0].float()


# %%
def output_error(quantized):
    """Relative error of the layer's output on its calibration inputs."""
    return ((inputs @ (quantized - weight).T).norm() / (inputs @ weight.T).norm()).item()

def weight_error(quantized):
    return ((quantized - weight).norm() / weight.norm()).item()


# %%
rounded = round_to_nearest(weight, group_size, bits)
rows = {"round-to-nearest": (rounded, None)}
for order in (None, "desc_act", "act_group_aware"):
    settings = {name: order == name for name in ("desc_act", "act_group_aware")}
    with quietly():
        theirs = library_gptq(weight, inputs, bits=bits, group_size=group_size, **settings)
    ours = gptq(weight, hessian, group_size, bits, order=order)
    rows[f"GPTQ, {order or 'columns as they come'}"] = (ours, theirs)

# %%
one_layer = pd.DataFrame({name: {
    "error of the weight": weight_error(ours),
    "error of the output": output_error(ours),
    "the library's": output_error(theirs) if theirs is not None else None,
    "codes that differ": ((ours - theirs).abs() > 1e-6).sum().item() if theirs is not None else None,
} for name, (ours, theirs) in rows.items()}).T
print(f"{weight.numel():,} codes")
display(one_layer.round(5))

ours, theirs = one_layer["error of the output"], one_layer["the library's"]
assert ((ours / theirs - 1).abs().dropna() < 0.01).all(), "output errors differ from the library's"
few = 0.01 if found.device == "cpu" else 0.03  # a GPU adds in another order, and errors travel on
assert (one_layer["codes that differ"].dropna() < few * weight.numel()).all(), "other codes than the library"
assert ours.iloc[1:].max() < ours.iloc[0], "GPTQ does not beat round-to-nearest"

# %% [markdown]
# GPTQ moves the weights *further* from the originals than rounding to nearest does, and the output closer. Where single codes differ from
# the library's, a value lay on the edge between two levels and the last bit of a sum decided.
#
# ## What the guides leave open
#
# Group size, `desc_act`, calibration: with the function above, on some layers spread over the model, all at once (each weight shape is
# one batch), while the other layers stay untouched. The Hessians come from one run over the untouched model.

# %%
PARTS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),  # the same inputs
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}

# %%
chosen = torch.linspace(0, config.num_hidden_layers - 1, study_layers).long().unique().tolist()

def modules(names):
    """For each chosen layer the modules of these names."""
    return [[net.model.layers[number].get_submodule(name) for name in names] for number in chosen]

original = {part: torch.stack([torch.cat([m.weight.detach() for m in row]) for row in modules(names)])
            for part, names in PARTS.items()}


# %%
@torch.inference_mode()
def hessians(windows):
    """X Xᵀ of every part of the chosen layers: {part: [layers, columns, columns]}."""
    sums = {part: torch.zeros(len(w), *w.shape[2:] * 2, device=w.device) for part, w in original.items()}

    def add(total):
        def hook(_, args):
            x = args[0].flatten(0, -2).float()
            total.addmm_(x.T, x)
        return hook

    hooks = [row[0].register_forward_pre_hook(add(sums[part][n]))
             for part, names in PARTS.items() for n, row in enumerate(modules(names))]
    for batch in windows.to(net.device).split(4):
        net.model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


# %%
@torch.inference_mode()
def put(weights):
    """Write one weight per part into the chosen layers."""
    for part, names in PARTS.items():
        for values, row in zip(weights[part], modules(names)):
            for module, value in zip(row, values.split([m.weight.shape[0] for m in row])):
                module.weight.copy_(value)


# %%
probes = {"other genres": (windows[:8], reference),
          "Python documentation": (in_domain[:1], in_domain_reference)}

def study(quantize):
    """{text: Scores} with the chosen layers quantized by quantize(part)."""
    put({part: quantize(part) for part in PARTS})
    scores = {text: evaluation.score(net, *probe) for text, probe in probes.items()}
    put(original)
    return scores

def study_gptq(hessian, size=group_size, **settings):
    return study(lambda part: gptq(original[part], hessian[part], size, bits, blocksize=32, **settings))


# %% [markdown]
# ### Text to calibrate on: the model's own
#
# Documentation is one genre, and a model that was calibrated on one genre may lose others. There is a text without a genre of ours: what the model
# itself says when it starts from nothing. We sample it at temperature 1, without cutting off the tail of the distribution.

# %%
@torch.inference_mode()
def own_text(net, samples, length, seed=0):
    """Token ids that the model samples from its first token on, int64 [samples, length]."""
    start = (tokenizer.bos_token_id or net.config.bos_token_id
             or tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    torch.manual_seed(seed)
    ids = net.generate(
        torch.full((samples, 1), start, device=net.device),
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        repetition_penalty=1.0, min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=start)
    return ids.cpu()

own = own_text(net, calibration_samples, calibration_length)
print(tokenizer.decode(own[0, 1:60]))

# %% [markdown]
# ### The study
#
# The calibration texts: the guide's one sentence, 16 and 64 samples of documentation, the model's own text, half of each, and two other kinds.

# %%
sentence = ("auto-gptq is an easy-to-use model quantization library with user-friendly apis, "
            "based on the GPTQ algorithm.")
code = tokenizer(pathlib.Path(logging.__file__).read_text(), truncation=True, max_length=16 * 128).input_ids
many_docs = evaluation.windows(tokenizer, "calibration", 64 * 128, 128, source="pydoc")
many_own = own.reshape(-1, 128)
random_tokens = torch.randint(1000, len(tokenizer), (16, 128), generator=torch.manual_seed(0))

# %%
texts = {
    "1 sentence": torch.tensor([tokenizer(sentence).input_ids]),
    "16 of documentation": many_docs[::4],
    "64 of documentation": many_docs,
    "16 of its own text": many_own[:16],
    "64 of its own text": many_own[:64],
    "8 of each": torch.cat([many_own[:8], many_docs[::8]]),
    "16 of Python code": torch.tensor(code).view(16, 128),
    "16 of random tokens": random_tokens,
}

# %%
columns = {w.shape[2] for w in original.values()}
sizes = [size for size in (32, 64, 128) if not any(n % size for n in columns)]
studied = {"round-to-nearest": study(lambda part: round_to_nearest(original[part], group_size, bits))}
collected = {name: hessians(text) for name, text in tqdm(texts.items(), disable=None)}
for name, sums in collected.items():
    studied[name] = study_gptq(sums)

usual = collected["16 of its own text"]
for size in tqdm([size for size in sizes if size != group_size], disable=None):
    studied[f"own text, group size {size}"] = study_gptq(usual, size)
for order in ("desc_act", "act_group_aware"):
    studied[f"own text, {order}"] = study_gptq(usual, order=order)

# %%
answers = pd.DataFrame({name: {text: scores.kl_divergence for text, scores in row.items()}
                        for name, row in studied.items()}).T
beside = studied["16 of documentation"]["other genres"]
one_sentence_costs = evaluation.difference(studied["1 sentence"]["other genres"], beside)
desc_act_gains = evaluation.difference(
    studied["own text, desc_act"]["other genres"], studied["16 of its own text"]["other genres"])
own_against_docs = evaluation.difference(studied["16 of its own text"]["other genres"], beside)

# %%
fig, ax = plt.subplots(figsize=(7, 4.6))
for text, color, marker in zip(answers, figures.PALETTE, "os"):
    ax.plot(answers[text], answers.index, marker, color=color, label=f"scored on {text}")
ax.invert_yaxis()
ax.axvline(answers["other genres"]["round-to-nearest"], color="grey", linestyle=":")
ax.set(xscale="log", title="Calibration helps most on its own genre",
       xlabel=f"KL with {len(chosen)} of {config.num_hidden_layers} layers in {bits} bits (less is better)")
ax.legend(loc="lower center", bbox_to_anchor=(0.4, -0.38), ncols=2)
best_text = answers["other genres"].idxmin()
figures.show(fig, alt=f"KL of each choice on two texts. On other genres the best is {best_text} with "
             f"{answers['other genres'].min():.3f}; rounding has {answers['other genres'].iloc[0]:.3f}. "
             f"On documentation the best is {answers['Python documentation'].idxmin()}.",
             table=answers.round(4))

# %%
def told(difference):
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference)

print("KL on other genres, difference with its 95 % interval:")
print(f"  own text against documentation: {told(own_against_docs)}")
print(f"  one sentence against documentation: {told(one_sentence_costs)}")
print(f"  desc_act against columns as they come: {told(desc_act_gains)}")
del usual, collected, net
memory.release()

# %% [markdown]
# ## The guides' way: auto-gptq
#
# The package is archived and does not import with today's transformers. `archived.enable` repairs it in memory, says what it
# changed, and can take it all back with `.undo()`. Nothing on disk is touched.

# %%
repair = archived.enable("auto-gptq")
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

pd.DataFrame(repair.applied, columns=["patch", "upstream assumed", "true now"]).set_index("patch")

# %% [markdown]
# **Examples.** The guide gives one sentence. Most tutorials give some documents of one kind, and so does this section: documentation, as
# token ids with a mask, on the symmetric grid that auto-gptq takes by default. We score the result on other genres below.

# %%
examples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in docs]
print(f"{len(examples)} examples of {docs.shape[1]} tokens, none left out")

quantize_config = BaseQuantizeConfig(
    bits=bits,
    group_size=group_size,
    desc_act=False,
    model_file_base_name="model",  # the name under which transformers looks for weights
)


# %% [markdown]
# **Load and quantize.** The guide's lines. The default type is float16, for which a CPU is slow. The library reports in log lines; this
# turns them into a progress bar and keeps the seconds of each layer.

# %%
class LayerLog(logging.Handler):
    """Counts auto-gptq's "Start quantizing layer 3/30"; .began holds when each layer began."""

    def __init__(self):
        super().__init__()
        self.bar, self.began = tqdm(disable=None, unit="layer"), []

    def emit(self, record):
        if match := re.match(r"Start quantizing layer (\d+)/(\d+)", record.getMessage()):
            self.bar.total = int(match[2])
            self.bar.update()
            self.began.append(time.perf_counter())


# %%
layer_log = LayerLog()
talk = logging.getLogger("auto_gptq.modeling._base")
talk.handlers, talk.propagate = [layer_log], False

# %%
with memory.track() as autogptq_cost:
    autogptq = AutoGPTQForCausalLM.from_pretrained(
        found.path,
        quantize_config=quantize_config,
        torch_dtype=fast,
    )
    autogptq.quantize(examples, batch_size=4)
layer_log.bar.close()
autogptq_layers = pd.Series(layer_log.began).diff().dropna()
print(f"{autogptq_cost.seconds:.0f} s in all, {autogptq_layers.median():.2f} s a layer, packing not counted")


# %% [markdown]
# **Save.** Into a scratch folder that takes the checkpoint's name only when it is whole: a process killed on the way leaves nothing that
# loads. The digest says later whether the files are still the ones that were saved.

# %%
def digests(folder):
    """SHA-256 of every file in a checkpoint but the list itself."""
    lines = []
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.name != "SHA256SUMS":
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}")
    return lines


# %%
def seal(folder):
    (pathlib.Path(folder) / "SHA256SUMS").write_text("\n".join(digests(folder)) + "\n")

def check_seal(folder):
    """Raise ValueError unless every file is the one that was saved. Takes a second and loads no model."""
    saved = (pathlib.Path(folder) / "SHA256SUMS").read_text().splitlines()
    if changed := sorted({line.split()[1] for line in set(digests(folder)) ^ set(saved)}):
        raise ValueError(f"not as they were saved: {', '.join(changed)}. Make or fetch the checkpoint again.")


# %%
question = [{"role": "user", "content": "What is the capital of France?"}]
question_ids = torch.tensor([chat.render(tokenizer, question)])

@torch.inference_mode()
def logits_of(net):
    """What a model says on one short prompt, float32."""
    return net.eval()(input_ids=question_ids.to(next(net.parameters()).device)).logits.float().cpu()

def relative_gap(logits, expected):
    return ((logits - expected).norm() / expected.norm()).item()

def module_name(net):
    """Module and class of a quantized layer: the kernel that was chosen."""
    kernel = type(net.model.layers[0].mlp.up_proj)
    return f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}"


# %%
autogptq.model.half()  # scales and embeddings are stored in 16 bits
with checkpoints.writing(output_dir, "autogptq") as folder:
    autogptq.save_quantized(str(folder), use_safetensors=True)
    tokenizer.save_pretrained(folder)
    seal(folder)
autogptq_before = logits_of(autogptq.model.float())
del autogptq
memory.release()

# %% [markdown]
# **Reload and chat**, with the library's own loader. Its fast kernels are CUDA extensions compiled for a torch of 2024; where they do not load,
# and on every CPU, it restores each weight in full for every single token.

# %%
autogptq_folder = checkpoints.folder(output_dir, "autogptq")
check_seal(autogptq_folder)
autogptq = AutoGPTQForCausalLM.from_quantized(
    str(autogptq_folder), device="cuda:0" if found.device == "cuda" else "cpu",
    torch_dtype=torch.float16 if found.device == "cuda" else torch.float32)

# %%
start = time.perf_counter()
output = autogptq.generate(input_ids=question_ids.to(autogptq.device), max_new_tokens=16, do_sample=False)
autogptq_rate = (output.shape[1] - question_ids.shape[1]) / (time.perf_counter() - start)
autogptq_answer = tokenizer.decode(output[0, question_ids.shape[1]:], skip_special_tokens=True)
kernel, again = module_name(autogptq.model), logits_of(autogptq.model)
print(f"{autogptq_answer!r}\n{autogptq_rate:.1f} tokens/s with {kernel}")
gap = (again - autogptq_before).abs().max()
print(f"largest difference of a logit, before saving and after: {gap:.4f}")
own_loader = (kernel, autogptq_rate, relative_gap(again, autogptq_before))  # for the table of loaders
del autogptq
memory.release()

# %% [markdown]
# ## Today, and at its best: gptqmodel
#
# The successor, and what transformers uses to load this format. Four settings differ from the run above, each because it lowers the KL on genres
# that were not calibrated on: the model's own text, an asymmetric grid (`sym=False`, a zero point per group), the loudest columns first
# (`desc_act`), and more damping.

# %%
mixed = torch.cat([own[: len(own) // 2], evaluation.windows(
    tokenizer, "calibration", len(own) // 2 * calibration_length, calibration_length, source="pydoc")])
calibration = {"own": own, "docs": docs, "mix": mixed}[calibration_source]
print(f"calibration: {len(calibration)} samples of {calibration.shape[1]} tokens ({calibration_source})")

# %%
gptq_config = QuantizeConfig(
    bits=bits,
    group_size=group_size,
    sym=sym,
    desc_act=desc_act,
    act_group_aware=act_group_aware,
    damp_percent=0.05,
    offload_to_disk=False,  # it would keep finished layers on disk; this model fits in memory
)
rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration]

with quietly(), memory.track() as gptq_cost:
    quantized = GPTQModel.load(found.path, gptq_config, dtype=fast, device=found.device)
    log = quantized.quantize(rows, batch_size=8)

# %%
log = pd.DataFrame(log["gptq"])
log[["layer", "time", "fwd_time", "loss"]] = log[["layer", "time", "fwd_time", "loss"]].apply(pd.to_numeric)
per_layer = log.groupby("layer")["time"].sum()
print(f"{gptq_cost.seconds:.0f} s in all; solving takes {per_layer.median():.2f} s a layer")

# %%
quantized.model.half()  # embeddings and norms are stored in 16 bits
with quietly(), checkpoints.writing(output_dir, "gptq") as folder:
    quantized.save(str(folder))
    tokenizer.save_pretrained(folder)
    seal(folder)

# %% [markdown]
# A trap: the model in memory is now packed for the *file*, where each zero point is stored minus one, a habit of the first GPTQ code. Run
# as it is, it talks garbage, without an error. Loading puts the one back; so does this, for the comparison with the reloaded model.

# %%
with quietly():
    for module in quantized.model.modules():
        if hasattr(module, "qzeros"):
            convert_gptq_v1_to_v2_format_module(module, bits=bits, pack_dtype=torch.int32)
gptq_before = logits_of(quantized.model.float())
del quantized
memory.release()

# %% [markdown]
# ## Both checkpoints in plain transformers
#
# One format, one loader: `from_pretrained` reads `quantization_config` and takes the best kernel for this machine. On CUDA one is named,
# because the others are compiled when they are first used.

# %% tags=["reload"]
import torch
from transformers import AutoModelForCausalLM, GPTQConfig

has_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
dtype = torch.bfloat16 if has_bf16 else torch.float32  # a CPU without such instructions emulates bfloat16

def reload(folder):
    """A GPTQ checkpoint in plain transformers."""
    where = {"device_map": "cpu"}
    if torch.cuda.is_available():
        where = {"device_map": "cuda", "quantization_config": GPTQConfig(bits=4, backend="gptq_triton")}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where).eval()


# %% [markdown]
# **In a new process**, which knows nothing but the files: the same logits as before saving? And how fast? (Speed is measured
# there, because a process in which gptqmodel has quantized decodes more slowly afterwards: compare the two tables below.)

# %%
PROGRAM = """
import json, sys
import helpers  # as many threads as here
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig
from helpers import speed

{reload}
plain, precisions, folders, ids, device, out = json.loads(sys.argv[1])
rates, logits = {{}}, {{}}
for name in precisions + list(folders):
    net = reload(folders[name]) if name in folders else AutoModelForCausalLM.from_pretrained(
        plain, dtype=getattr(torch, name)).to(device)
    with torch.inference_mode():
        logits[name] = net(input_ids=torch.tensor(ids, device=device)).logits.float().cpu()
    rates[name] = vars(speed.decode(net, new_tokens=12, runs=2))
save_file(logits, out + "/logits.safetensors")
print(json.dumps(rates))
"""

# %%
precisions = sorted({str(dtype).removeprefix("torch.") for dtype in (found.dtype, fast)}, reverse=True)
folders = {method: str(checkpoints.folder(output_dir, method)) for method in ("autogptq", "gptq")}
for folder in folders.values():
    check_seal(folder)
with tempfile.TemporaryDirectory() as scratch:
    order = [str(found.path), precisions, folders, question_ids.tolist(), found.device, scratch]
    program = PROGRAM.format(reload=f"dtype = {dtype}\n{inspect.getsource(reload)}")
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(order)], capture_output=True, text=True,
        env=helpers.child_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    elsewhere = load_file(f"{scratch}/logits.safetensors")
rates = json.loads(done.stdout.splitlines()[-1])

# %% [markdown]
# The floors, in the same way: every weight of the layers rounded to nearest, no calibration. There are two, because the two checkpoints lie
# on two grids: symmetric (auto-gptq's) and with a zero point (the best setting's).

# %%
def round_asymmetric(weight, group_size=64, bits=4):
    """Round to the nearest of 2^bits levels between the smallest and the largest weight of each group."""
    groups, top = weight.float().unflatten(-1, (-1, group_size)), 2**bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / top).clamp(min=1e-8)
    zero_point = (-low / scale).round().clamp(0, top)
    codes = ((groups / scale).round() + zero_point).clamp(0, top)
    return ((codes - zero_point) * scale).flatten(-2)

# %%
def judge(net):
    """Scores on the four genres and on pydoc."""
    return [evaluation.score(net, windows, reference, batch_size=8),
            evaluation.score(net, in_domain, in_domain_reference, batch_size=8)]

def rounded_model(rounding):
    """A copy of the model with every Linear layer of its decoder rounded."""
    copied = copy.deepcopy(reference_net)
    for module in copied.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.copy_(rounding(module.weight, group_size, bits))
    return copied

# %%
letter = evaluation.windows(tokenizer, source="letter", tokens=1536)  # held back: nothing was chosen by it
letter_reference = evaluation.reference(found, letter)
reference_net = AutoModelForCausalLM.from_pretrained(found.path, dtype=fast).to(found.device).eval()
quality, second, confirmed = {}, {}, {}
for method, rounding in {"rtn-int4": round_to_nearest, "rtn-int4-asym": round_asymmetric}.items():
    floor_net = rounded_model(rounding)
    quality[method], second[method] = judge(floor_net)
    confirmed[method] = evaluation.score(floor_net, letter, letter_reference)
del floor_net
memory.release()

# %%
exact = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).to(found.device)
bf16_net = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.bfloat16).to(found.device)
rounding = relative_gap(logits_of(bf16_net), logits_of(exact))  # what bfloat16 alone does
del exact, bf16_net

# %%
nets, sizes_of = {}, {}
for method in folders:
    folder = checkpoints.folder(output_dir, method)
    with quietly():
        nets[method] = reload(folder)
    quality[method], second[method] = judge(nets[method])  # in large batches: every pass unpacks all weights
    confirmed[method] = evaluation.score(nets[method], letter, letter_reference, batch_size=8)
    memory.release()
    sizes_of[method] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

# %%
before = {"autogptq": autogptq_before, "gptq": gptq_before}
gaps = {method: relative_gap(elsewhere[method], before[method]) for method in nets}

# %%
bf16_bytes = memory.predict(config, bits=16).model
result = pd.DataFrame({method: scores.summary() for method, scores in quality.items()}).T
intervals = {method: f"[{scores.kl_low:.3f}, {scores.kl_high:.3f}]" for method, scores in quality.items()}
result.insert(2, "95 % interval", pd.Series(intervals))
result["KL on pydoc"] = {method: scores.kl_divergence for method, scores in second.items()}
result["MB on disk"] = pd.Series(sizes_of) / 1e6
result["share of bf16"] = pd.Series(sizes_of) / bf16_bytes
result["logits, before / reloaded"] = pd.Series(gaps)
print(f"untouched model: perplexity {reference.perplexity:.2f}; bfloat16 moves its logits by {rounding:.4f}")
result.round(4)

# %% [markdown]
# ### Calibration source by evaluation genre
#
# The same four models, genre by genre. The last column is the text that was held back while the settings were chosen.

# %%
names = {"rtn-int4": "rounded, symmetric", "autogptq": "GPTQ, documentation, symmetric",
         "rtn-int4-asym": "rounded, asymmetric", "gptq": f"GPTQ, {calibration_source} text, best setting"}
by_genre = pd.DataFrame({name: {**quality[method].by_genre(), "pydoc": second[method].kl_divergence,
                                "letter": confirmed[method].kl_divergence}
                         for method, name in names.items()}).T

# %%
fig, ax = plt.subplots(figsize=(7.5, 3.6))
for (name, row), color, marker in zip(by_genre.iterrows(), figures.PALETTE, "oDsP"):
    ax.plot(row.index, row, marker, color=color, label=name, markersize=8)
ax.set(yscale="log", ylabel="KL (less is better)", title="GPTQ's gain depends on the text it is scored on")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
other = [quality[method].kl_divergence for method in ("autogptq", "rtn-int4")]
figures.show(fig, alt="KL by genre. Calibrated on documentation, on the symmetric grid, GPTQ has "
             f"{second['autogptq'].kl_divergence:.3f} on documentation, where rounding has "
             f"{second['rtn-int4'].kl_divergence:.3f}, and on the four other genres {other[0]:.3f} "
             f"where rounding has {other[1]:.3f}.", table=by_genre.round(3))

# %%
for method, floor in (("autogptq", "rtn-int4"), ("gptq", "rtn-int4-asym")):
    mean, low, high = evaluation.difference(quality[method], quality[floor])
    verdict = "better than" if high < 0 else "worse than" if low > 0 else "not told apart from"
    print(f"{names[method]}: {verdict} rounding on its own grid, KL {mean:+.3f} [{low:+.3f}, {high:+.3f}]")

# %%
kl = result["kl_divergence"]
assert max(gaps.values()) < 3 * rounding, f"reloaded logits are not those before saving: {gaps}"
shares = result["share of bf16"]
assert shares.max() < 0.45 or not found.name.startswith("SmolLM2"), shares.to_dict()
in_its_genre = second["autogptq"].kl_divergence
assert in_its_genre < second["rtn-int4"].kl_divergence, "calibration did not pay in its own genre"
tuned_here = found.name.startswith("SmolLM2")  # the settings were chosen on this model
if bits == 4 and calibration_source == "own" and tuned_here:
    assert kl["gptq"] <= 0.8 * kl["rtn-int4-asym"], f"KL {kl.to_dict()}"
    assert quality["gptq"].kl_high < quality["rtn-int4-asym"].kl_low, "the intervals overlap"
    held_back = confirmed["rtn-int4-asym"].kl_divergence
    assert confirmed["gptq"].kl_divergence < held_back, "another order on the held-back text"


# %% [markdown]
# ### Chat
#
# An answer that reads well is one that the untouched model finds likely, too.

# %%
@torch.inference_mode()
def answer_perplexity(session):
    """Perplexity, under the untouched model, of the last answer in a chat session."""
    asked = chat.render(tokenizer, session.messages[:-1])
    answer = tokenizer(session.messages[-1]["content"], add_special_tokens=False).input_ids
    logits = reference_net(input_ids=torch.tensor([asked + answer], device=found.device)).logits[0].float()
    picked = logits[len(asked) - 1 : -1].log_softmax(-1)[range(len(answer)), answer]
    return picked.mean().neg().exp().item()


# %%
for method, net in nets.items():
    session = chat.ChatSession(net, tokenizer, max_new_tokens=max_new_tokens, enable_thinking=False)
    answer = session.send("What is the capital of France, and what is it famous for?")
    likely = answer_perplexity(session) if answer else float("inf")
    print(f"{method}: {answer}\n  perplexity under the untouched model: {likely:.1f}\n")
    if not found.origin.startswith("random"):  # random weights find nothing likely
        assert likely < 20, f"{method} answers with what the untouched model would never say: {answer!r}"

# %% [markdown]
# ### Is it faster?
#
# From the new process above, the unquantized model beside it:

# %%
speeds = pd.DataFrame(rates).T
speeds.columns = ["prefill tok/s", "decode tok/s", "slowest run", "fastest run"]
full = str(found.dtype).removeprefix("torch.")
faster = speeds["decode tok/s"]["gptq"] / speeds["decode tok/s"][full]
print(f"gptq decodes {faster:.2f} times as fast as {full}")
if found.device == "cpu":
    assert faster >= 1.5, "4-bit decoding with gptqmodel's kernels should be well ahead of float32 on a CPU"
speeds.round(1)


# %% [markdown]
# ## Which loader takes which checkpoint?

# %%
def in_autogptq(folder):
    return AutoGPTQForCausalLM.from_quantized(str(folder), device=found.device, torch_dtype=found.dtype).model

def in_gptqmodel(folder):
    backend = BACKEND.GPTQ_TRITON if found.device == "cuda" else BACKEND.AUTO  # others compile at first use
    return GPTQModel.load(str(folder), device=found.device, backend=backend, dtype=fast).model

def in_autoawq(folder):
    with archived.enable("autoawq"):
        from awq import AutoAWQForCausalLM

        return AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False).model

def in_transformers(folder):
    return nets[folder.name]

table = []
for method in nets:
    for loader in (in_autogptq, in_autoawq, in_gptqmodel, in_transformers):
        folder = checkpoints.folder(output_dir, method)
        if (method, loader) == ("autogptq", in_autogptq):  # done above
            table.append((method, "autogptq", *own_loader))
            continue
        try:
            with quietly():
                net = loader(folder)
            rate = speed.decode(net, prompt_tokens=8, new_tokens=4 if loader is in_autogptq else 16, runs=1)
            gap = relative_gap(logits_of(net), before[method])
            row = (module_name(net), rate.decode_tokens_per_s, gap)
        except Exception as error:
            row = (f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}", None, None)
        table.append((method, loader.__name__.removeprefix("in_"), *row))
        net = None
pd.DataFrame(table, columns=[
    "checkpoint", "loader", "kernel or error", "decode tok/s", "logits differ by"]).round(3)


# %% [markdown]
# ## What stops, and how it says so
#
# Each of these is refused before the long work, or at the first touch.

# %%
def truncated(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 1000)

def swapped(folder):
    tensors = load_file(folder / "model.safetensors")
    one, other = (f"model.layers.0.mlp.{name}_proj.qweight" for name in ("gate", "up"))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

def damaged(how):
    """Check a copy of the checkpoint that `how` has damaged."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(shutil.copytree(checkpoints.folder(output_dir, "gptq"), f"{scratch}/copy"))
        how(folder)
        check_seal(folder)


# %%
quantized_config = AutoConfig.from_pretrained(checkpoints.folder(output_dir, "gptq"))
attempts = {
    "a group size that does not divide": lambda: preflight(config, bits, 2 * max(columns), docs),
    "5 bits": lambda: preflight(config, 5, group_size, docs),
    "5 bits, auto-gptq itself": lambda: BaseQuantizeConfig(bits=5),
    "no calibration text": lambda: preflight(config, bits, group_size, []),
    "a sample of 3 tokens": lambda: preflight(config, bits, group_size, [[1, 2, 3]]),
    "a quantized model, once more": lambda: preflight(quantized_config, bits, group_size, docs),
    "a truncated checkpoint": lambda: damaged(truncated),
    "two tensors swapped": lambda: damaged(swapped),
}
refusals = {}
for what, attempt in attempts.items():
    try:
        attempt()
    except Exception as error:
        refusals[what] = f"{type(error).__name__}: {error}"
assert refusals.keys() == attempts.keys(), f"not refused: {attempts.keys() - refusals.keys()}"
pd.Series(refusals, name="what it says").to_frame()


# %% [markdown]
# ## Upload
#
# Off unless `push_to_hub` is set. The token never stands in a cell: it comes from the environment, from Colab's secrets, or from a prompt
# that does not echo. The checkpoint goes up as it is, seal included.

# %%
def hub_token():
    """A write token for the hub, from where secrets belong."""
    if token := os.environ.get("HF_TOKEN"):
        return token
    try:
        from google.colab import userdata

        return userdata.get("HF_TOKEN")
    except Exception:  # not on Colab, or no such secret there
        return getpass.getpass("Hugging Face token (not shown): ")


# %%
if push_to_hub:
    from huggingface_hub import HfApi

    hub, folder = HfApi(token=hub_token()), checkpoints.folder(output_dir, "gptq")
    hub.create_repo(hub_repository, exist_ok=True)
    print(hub.upload_folder(repo_id=hub_repository, folder_path=folder).commit_url)

# %% [markdown]
# ## What the guides claim

# %%
from helpers import claims

linear_bits = bits + (16 + bits) / group_size
smaller = 1 - sizes_of["gptq"] / bf16_bytes
on_disk = f"{smaller:.0%} on disk; in the Linear layers {1 - linear_bits / 16:.0%} ({linear_bits:.2f} bits)"
best, floor = quality["gptq"], quality["rtn-int4"]
lost = f"rounded {floor.kl_divergence:.3f}, the guide's setting {quality['autogptq'].kl_divergence:.3f}; "
lost += f"{1 - best.top1_agreement:.0%} of the top tokens change"
mistral = models.mistral_config()
layer_inputs = [mistral.hidden_size, mistral.intermediate_size]
divided = sum(number % 128 == 0 for number in layer_inputs) / len(layer_inputs)

# %%
findings = [
    claims.finding("gptq-75", smaller, text=on_disk),
    claims.finding("gptq-quality", best.kl_divergence, best.kl_low, best.kl_high, text=lost),
    claims.finding("gptq-one-sentence", *one_sentence_costs),
    claims.finding("gptq-desc-act", *desc_act_gains),
    claims.finding("gptq-group-128", divided, computed_for="Mistral-7B"),
    claims.finding("gptq-minutes", autogptq_cost.seconds / 60),
]
if found.device == "cpu":
    patches = f"auto-gptq ran on a CPU with {len(repair.applied)} repair(s); gptqmodel as it is"
    findings.append(claims.finding("gptq-gpu", 0.5 if repair.applied else 0, text=patches))
claims.write(output_dir, notebook="05_gptq", found=found, findings=findings)

# %%
with pd.option_context("display.max_colwidth", None):
    display(claims.table(output_dir, "05_gptq"))


# %% [markdown]
# ## Exercises
#
# **1 (easy).** Bits per weight of the GPTQ format: per group, the codes, one 16-bit scale, and one zero point of `bits` bits.

# %%
def bits_per_weight(bits, group_size):
    ...


# %%
def test_bits(function):
    assert function(4, 64) is not None, "return a number"
    assert abs(function(4, 64) - 4) > 1e-9, "scale and zero point are missing"
    assert abs(function(4, 64) - 4.25) > 1e-9, "the zero point is missing: as many bits as a code"
    assert abs(function(4, 64) - 4.3125) < 1e-9, f"4 bits, groups of 64: 4.3125, you have {function(4, 64)}"
    assert abs(function(8, 128) - 8.1875) < 1e-9, "does it depend on bits and group_size?"

exercises.check(bits_per_weight, test_bits)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:
    def bits_per_weight(bits, group_size):
        return bits + (16 + bits) / group_size

    exercises.require(bits_per_weight, test_bits)


# %% [markdown]
# **2 (medium).** Two columns, by hand. The first weight of each row was rounded, with error `e = w - q`. How much must the second weight
# change, so that the output error on inputs with Hessian `H` (2 x 2) is smallest? Return the change.

# %%
def repair_second(error, H):
    ...


# %%
def test_repair(function):
    H = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    change = function(torch.tensor(0.5), H)
    assert change is not None, "return the change of the second weight"
    assert change != 0, "the inputs are correlated (H is not diagonal): the second weight can help"
    def loss(d, e=0.5):  # output error when the first weight lost e and the second gained d
        delta = torch.tensor([-e, float(d)])
        return delta @ H @ delta
    assert loss(change) < loss(0), "that makes it worse: check the sign"
    nearby = min(loss(change + step) for step in (-0.01, 0.01))
    assert loss(change) <= nearby, "better, but not the best: set the derivative of the loss to zero"

exercises.check(repair_second, test_repair)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:
    def repair_second(error, H):
        return error * H[0, 1] / H[1, 1]

    exercises.require(repair_second, test_repair)


# %% [markdown]
# **3 (hard).** A better grid: for each group try scales shrunk by 1, 0.95, … 0.7 and keep, per row and group, the one with the smallest
# squared error of the weights. Return the quantized weight. (`mse` in gptqmodel's config does this.)

# %%
def round_with_search(weight, group_size=64, bits=4):
    ...


# %%
def test_search(function):
    answer = function(weight, group_size, bits)
    assert answer is not None and answer.shape == weight.shape, "return a tensor of the weight's shape"
    groups = answer.unflatten(-1, (-1, group_size))[:200].flatten(0, 1)
    assert max(len(group.unique()) for group in groups) <= 2**bits, "more levels in a group than bits allow"
    error, plain = weight_error(answer), weight_error(rounded)
    assert error < plain, f"error {error:.4f}, plain rounding {plain:.4f}: keep the best scale, 1 included"
    assert error < 0.99 * plain, "hardly better: is the best scale chosen per row and group?"

exercises.check(round_with_search, test_search)

# %% jupyter={"source_hidden": true} tags=["solution"]
if solutions:
    def round_with_search(weight, group_size=64, bits=4):
        groups = weight.unflatten(-1, (-1, group_size))
        full = group_scale(groups, bits)[..., None]
        tries = torch.stack([to_grid(groups, full * (1 - 0.05 * step), bits) for step in range(7)])
        best = (tries - groups).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
        return tries.gather(0, best.expand(-1, *groups.shape))[0].flatten(-2)

    exercises.require(round_with_search, test_search)

# %% [markdown]
# ## Quiz
#
# Three questions. Each answer says why it is right or not.

# %%
from helpers import quiz

quiz.Quiz("05_gptq")

# %% [markdown]
# ## Takeaways
#
# 1. **GPTQ is rounding with repair.** One column after the other, each error spread over the columns still free by the inverse Hessian's
#    Cholesky factor: the weights move further, the output less.
# 2. **Both packages write one format.** auto-gptq needs its repairs and has no fast kernel of its own left; gptqmodel quantizes today, and
#    plain transformers loads either checkpoint with gptqmodel's kernels.
# 3. **Score where nobody calibrated.** GPTQ calibrated on one genre looks good on that genre and can lose to plain rounding elsewhere. The
#    model's own text, an asymmetric grid and `desc_act` carry over: check it on text of a genre that you did not calibrate on.
#
# <!-- navigation -->
# <!-- /navigation -->

# %% tags=["record"]
costs = {"autogptq": autogptq_cost, "gptq": gptq_cost, "rtn-int4": None, "rtn-int4-asym": None}
for method, cost in costs.items():
    size = memory.weight_bytes(nets[method]) if method in nets else None
    records.write(
        output_dir, method=method, notebook="05_gptq", found=found, windows=windows,
        bits_per_weight=8 * size / memory.predict(config, bits=16).parameters if size else None,
        weight_bytes=size,
        peak_memory_bytes=(cost.peak_vram if found.device == "cuda" else cost.peak_ram) if cost else None,
        scores=quality[method], in_domain=(in_domain, second[method]),
        decode_tokens_per_s=rates[method]["decode_tokens_per_s"] if method in rates else None,
        quantize_seconds=cost.seconds if cost else None,
    )
