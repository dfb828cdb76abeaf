"""Measure the course's methods at Mistral-7B's size on one NVIDIA GPU.

    python notebooks/gpu/reference.py --output reference.json                  # everything, about half an hour
    python notebooks/gpu/reference.py --output reference.json --only memory    # one step, added to what the file holds

Weights are random in the 7B shape (memory and speed do not depend on their values); quality is what the notebooks measure on
SmolLM2-135M. Every step runs in a process of its own, so that no peak contains what an earlier step left; a failure is written down
as what it is and does not stop the others. All sizes are bytes, all times seconds. Steps marked "under" hold torch to that many bytes
of the GPU. A step that was measured on another device than the rest of the file carries its own "device" and "date".
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from helpers import process  # noqa: E402

process.prepare()  # before torch: it sets thread counts

PROMPT, NEW, LENGTH = 128, 128, 264  # tokens of a decode measurement: prompt, answer, and the size of the static cache
GB = 10**9
SMALL, LARGE = 16 * GB, 24 * GB  # budgets: a T4 and an RTX A5000


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "reference.json")
    parser.add_argument("--only", nargs="+", choices=[*STEPS], default=[*STEPS])
    parser.add_argument("--timeout", type=int, default=1800, help="seconds one step may take")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # for the processes this script starts
    arguments = parser.parse_args()
    if arguments.step:
        print("RESULT " + json.dumps(STEPS[arguments.step]()), flush=True)
        return
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    here = facts()
    elsewhere = results.get("device", here["device"]) != here["device"]
    if not elsewhere:
        results |= here
    for step in arguments.only:
        started = time.perf_counter()
        results[step] = run(step, arguments.timeout, arguments.output.with_suffix(".log"))
        if elsewhere:  # a step measured on another device than the file's says so itself
            results[step] |= {"device": here["device"], "date": here["date"]}
        print(f"{step}: {time.perf_counter() - started:.0f} s  {json.dumps(results[step])[:900]}", flush=True)
        write(arguments.output, results)


def run(step, timeout, log):
    """One step in a process of its own: its result, or {"failed": why}. What it says beside goes to `log`."""
    try:
        with log.open("a") as file:
            command = [sys.executable, __file__, "--step", step]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {timeout} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    return {"failed": (log.read_text().strip().splitlines() or ["no message"])[-1][:300]}


def write(path, results):
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def facts():
    import platform
    from importlib import metadata

    import torch

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    names = ("torch", "triton", "transformers", "torchao", "bitsandbytes", "peft", "gptqmodel", "auto-gptq", "autoawq")
    return {
        "device": torch.cuda.get_device_name(),
        "vram_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": driver.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python notebooks/gpu/reference.py",
        "model": "mistral-7b-geometry (random weights in Mistral-7B's shape)",
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: metadata.version(name) for name in names},
        "protocol": {"prompt_tokens": PROMPT, "new_tokens": NEW, "cache_tokens": LENGTH},
    }


# --- models ---------------------------------------------------------------------------------------------------------------------


def geometry(layers=32):
    from helpers import models

    return models.geometry(layers).path


def shape():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(geometry(1))
    config.num_hidden_layers = 32
    return config


def random_model(dtype):
    """The 7B shape with random weights, made on the GPU: what decoding needs, without reading a file."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(shape(), dtype=dtype).eval().requires_grad_(False)


def load(dtype="bfloat16", path=None, **options):
    import torch
    from transformers import AutoModelForCausalLM

    path = path or geometry()
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), device_map={"": 0}, **options)


def nf4(double_quant=True, compute=None):
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute or torch.bfloat16,
    )


def marlin(model, group_size=128):
    """Every Linear rounded to 4 bits in GPTQ's format, for gptqmodel's Marlin kernel; for its speed, calibration is not needed."""
    import torch
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not torch.nn.Linear:
                continue
            groups = linear.weight.float().unflatten(1, (-1, group_size))
            scales = groups.abs().amax(-1, keepdim=True) / 7.5
            codes = (groups / scales).round().add(8).clamp(0, 15).int().flatten(1).t()  # [in, out]
            layer = MarlinLinear(bits=4, group_size=group_size, desc_act=False, sym=True, in_features=linear.in_features,
                                 out_features=linear.out_features, bias=False, dtype=torch.bfloat16).cuda()  # fmt: skip
            layer.qweight.data = sum(codes[row::8] << 4 * row for row in range(8)).contiguous()
            layer.scales.data = scales[..., 0].t().contiguous().bfloat16()
            layer.qzeros.data.zero_()
            layer.g_idx.data = torch.arange(linear.in_features, device="cuda", dtype=torch.int32) // group_size
            layer.post_init()
            setattr(parent, name, layer.eval())
    return model


def read_bytes(model):
    """Bytes of weights that one token needs: everything but the embedding table, of which it reads a row."""
    from helpers import memory

    return memory.weight_bytes(model) - memory.weight_bytes(model.get_input_embeddings())


def seconds(work, runs=5):
    """Median seconds of `work` on the GPU, after one untimed run."""
    import torch

    work()
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# --- decoding -------------------------------------------------------------------------------------------------------------------


def bandwidth():
    """Bytes a second of a copy on the GPU, read and written bytes both counted; and what a process takes beside torch's memory."""
    import torch

    source = torch.randint(256, (4 * GB,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rate = 2 * source.numel() / seconds(lambda: target.copy_(source), 11)
    free, total = torch.cuda.mem_get_info()
    return {"copy_bytes_per_s": rate, "context_bytes": total - free - torch.cuda.memory_reserved()}


def prompt(batch):
    import torch

    return torch.randint(3, 32768, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).cuda()


def eager(model, batches=(1, 8)):
    from helpers import speed

    rows = {}
    for batch in batches:
        rate = speed.decode(model, prompt_tokens=PROMPT, new_tokens=32, batch=batch)
        rows[str(batch)] = {
            "prefill_s": batch * PROMPT / rate.prefill_tokens_per_s,
            "tokens_per_s": rate.decode_tokens_per_s,
        }
    return rows


def lean(model, batches=(1, 8), compiled=True, profiled=True):
    """The lean decoder at each batch size; at batch 1 also where the time of a token goes."""
    import torch
    from lean_decode import LeanDecoder

    rows = {}
    for batch in batches:
        torch._dynamo.reset()
        started = time.perf_counter()
        with contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            decoder = LeanDecoder(model, batch, LENGTH).capture()
        ready, ids = time.perf_counter() - started, prompt(batch)

        @torch.inference_mode()
        def answer(tokens=NEW):
            decoder.position.fill_(PROMPT)
            for _ in range(tokens):
                decoder.graph.replay()

        row = rows[str(batch)] = {"ready_s": ready, "prefill_s": seconds(lambda: decoder.prefill(ids))}
        row["tokens_per_s"] = batch * NEW / seconds(answer)
        if profiled and batch == 1:
            row["profile"] = profile(lambda: answer(16), 16)  # the profiler's own bookkeeping is slow
        del decoder
        torch.cuda.empty_cache()
    return rows


def generate(model):
    """transformers' own compiled path: `generate` with a static cache."""
    import torch

    ids, options = (
        prompt(1),
        dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, cache_implementation="static"),
    )

    def answer():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    started = time.perf_counter()
    answer()
    ready = time.perf_counter() - started
    return {"1": {"ready_s": ready, "tokens_per_s": NEW / seconds(answer, 3), "profile": profile(answer, NEW)}}


KINDS = {  # beginnings or parts of kernel names
    "fused by torch.compile": ("triton_",),
    "attention": ("sdpa", "fmha", "attention", "flash"),
    "matrices": ("gemm", "gemv", "int4", "marlin", "4bit", "dequant", "nvjet", "cutlass", "splitk", "xmma"),
}


def profile(work, tokens):
    """Seconds a token by kind of kernel, and `idle`, when no kernel ran, from torch.profiler."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    spans = sorted((event.time_range.start, event.time_range.end, event.name.lower()) for event in events)
    kinds, busy, last, names = dict.fromkeys([*KINDS, "other"], 0.0), 0.0, spans[0][0], {}
    for start, end, name in spans:
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
        if "mm_t" in name and "triton" in name:
            kind = "matrices"  # a product that torch.compile wrote itself
        kinds[kind] += end - start
        names[name] = names.get(name, 0) + end - start
        busy += max(0, end - max(start, last))
        last = max(last, end)
    for name in sorted(names, key=names.get)[-8:]:
        print(f"  {names[name] / tokens:8.1f} us {name[:100]}", file=sys.stderr)
    wall = last - spans[0][0]
    per_token = 1e-6 / tokens
    return {"token_s": wall * per_token, "idle_s": (wall - busy) * per_token, "kernels": len(spans) / tokens,
            "kinds": {kind: value * per_token for kind, value in kinds.items()}}  # fmt: skip


def decode_fp16():
    import torch
    from lean_decode import fuse

    model = random_model(torch.float16)
    rows = {"eager": eager(model), "graph": lean(model, (1,), compiled=False), "bytes": read_bytes(model)}
    fuse(model)
    rows["lean"] = lean(model)
    # torch.compile can also write the product of a matrix and one vector itself, and tune it
    torch._inductor.config.coordinate_descent_tuning = True
    linear = torch.compile(torch.nn.functional.linear, dynamic=False)
    torch.nn.Linear.forward = lambda self, x: linear(x, self.weight)
    rows["lean, tuned products"] = lean(model, (1,))
    return rows


def decode_int4():
    import torch
    from lean_decode import fuse
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    model = random_model(torch.bfloat16)
    quantize_(model, config)
    rows = {"eager": eager(model), "bytes": read_bytes(model)}
    del model
    model = fuse(random_model(torch.bfloat16))
    quantize_(model, config)
    return rows | {"lean": lean(model)}


def decode_marlin():
    import torch
    from lean_decode import fuse

    model = marlin(random_model(torch.bfloat16))
    rows = {"eager": eager(model), "bytes": read_bytes(model)}
    del model
    model = marlin(fuse(random_model(torch.bfloat16)))
    rows["graph"] = lean(model, (1,), compiled=False)
    return rows | {"lean": lean(model)}


def decode_nf4():
    model = load(quantization_config=nf4()).eval()
    return {"eager": eager(model), "bytes": read_bytes(model), "lean": lean(model)}


def generate_fp16():
    import torch

    return generate(random_model(torch.float16))


def generate_int4():
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = random_model(torch.bfloat16)
    quantize_(model, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return generate(model)


# --- memory ---------------------------------------------------------------------------------------------------------------------


def memory():
    """What each way of loading weighs, its peak while loading, and the peak of an answer (512 tokens of prompt, 32 new ones)."""
    import torch
    from transformers import BitsAndBytesConfig

    from helpers import memory, speed

    computed = {
        "fp16": dict(bits=16),
        "int8": dict(bits=8, scale_bits=32),
        "nf4": dict(bits=4, group_size=64, scale_bits=32),
        "nf4, double quantization": dict(bits=4, group_size=64, scale_bits=32, double_quant=True),
    }
    options = {
        "fp16": dict(dtype="float16"),
        "int8": dict(quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype="float16"),
        "nf4": dict(quantization_config=nf4(False)),
        "nf4, double quantization": dict(quantization_config=nf4()),
    }
    rows, config = {}, shape()
    for name in computed:
        under = LARGE if name == "fp16" else SMALL
        memory.cap_vram(under)
        with memory.track() as loading:
            model = load(**options[name]).eval()
        with memory.track() as answering:
            speed.decode(model, prompt_tokens=512, new_tokens=32, runs=1)
        rows[name] = {
            "computed_bytes": memory.predict(config, **computed[name]).model,
            "weight_bytes": memory.weight_bytes(model),
            "loading_peak_bytes": loading.peak_vram,
            "answering_peak_bytes": answering.peak_vram,
            "loading_s": loading.seconds,
            "under": under,
        }
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def fp16_under_16gb():
    """The one that is not expected to fit a T4."""
    import torch

    from helpers import memory, speed

    memory.cap_vram(SMALL - GB)  # less what the driver takes on a real card
    try:
        speed.decode(load(dtype="float16").eval(), prompt_tokens=512, new_tokens=32, runs=1)
    except torch.OutOfMemoryError as error:
        return {"fits": False, "message": str(error).split(". ")[0][:200]}
    return {"fits": True}


def qlora():
    """One training step of QLoRA (r=16 on q and v, checkpointing, paged 8-bit AdamW) at two lengths."""
    import bitsandbytes
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from helpers import memory

    memory.cap_vram(SMALL)
    model = prepare_model_for_kbit_training(
        load(quantization_config=nf4()),
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).train()
    model.config.use_cache = False
    optimizer = bitsandbytes.optim.PagedAdamW8bit(
        [tensor for tensor in model.parameters() if tensor.requires_grad], lr=1e-4
    )
    rows = {"under": SMALL}
    for tokens in (512, 2048):
        ids = torch.randint(3, 32768, (1, tokens), generator=torch.Generator().manual_seed(0)).cuda()

        def step():
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        with memory.track() as used:
            losses = [step() for _ in range(3)]
        rows[str(tokens)] = {"peak_bytes": used.peak_vram, "step_s": seconds(step, 3), "losses": losses}
    return rows


# --- quantizing -----------------------------------------------------------------------------------------------------------------


def rows_of_ids(count=32, tokens=512):
    import torch

    return torch.randint(3, 32768, (count, tokens), generator=torch.Generator().manual_seed(0))


def gptq():
    """GPTQ of the whole 7B shape on 32 x 512 tokens with gptqmodel."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    from helpers import memory, models

    memory.cap_vram(SMALL)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows_of_ids()]
    config = QuantizeConfig(bits=4, group_size=128, desc_act=False, act_group_aware=False, offload_to_disk=False)
    with memory.track() as used:
        model = GPTQModel.load(geometry(), config, dtype=torch.bfloat16, device="cuda")
        started = time.perf_counter()
        model.quantize(rows, batch_size=1)
        quantizing = time.perf_counter() - started
    started = time.perf_counter()
    model.save(str(models.cache() / "reference-gptq"))
    return {
        "samples": 32,
        "tokens": 512,
        "seconds": quantizing,
        "with_loading_s": used.seconds,
        "saving_s": time.perf_counter() - started,
        "peak_bytes": used.peak_vram,
        "under": SMALL,
    }


def gptq_kernels():
    """The checkpoint of the step before under gptqmodel's kernels, in eager mode, and with Marlin in the lean decoder."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    from helpers import memory, models

    memory.cap_vram(SMALL)
    rows, folder = {"under": SMALL}, str(models.cache() / "reference-gptq")
    for name in ("TRITON", "EXLLAMA_V2", "MARLIN"):
        backend = getattr(BACKEND, f"GPTQ_{name}")
        with memory.track() as used:
            model = GPTQModel.load(folder, device="cuda", backend=backend, dtype=torch.bfloat16).model
            row = rows[name.lower()] = {"eager": eager(model.eval()), "weight_bytes": memory.weight_bytes(model)}
        row["peak_bytes"] = used.peak_vram
        if name == "MARLIN":
            row["lean"] = lean(model, (1,))
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return rows


DEPTH = int(os.environ.get("REFERENCE_DEPTH", 32))  # decoder layers for the archived packages, whose loops are slow


def auto_gptq():
    """auto-gptq, repaired: quantize, save, load with its own loader, answer. Archived kernels for a torch of 2024 are not there."""
    import torch

    from helpers import archived, memory, models

    memory.cap_vram(SMALL)
    archived.enable("auto-gptq")
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows_of_ids()]
    config = BaseQuantizeConfig(bits=4, group_size=128, desc_act=False, model_file_base_name="model")
    with memory.track() as used:
        model = AutoGPTQForCausalLM.from_pretrained(geometry(DEPTH), quantize_config=config, torch_dtype=torch.float16)
        model.quantize(rows, batch_size=1)
    folder = models.cache() / "reference-auto-gptq"
    model.save_quantized(str(folder), use_safetensors=True)
    del model
    with memory.track() as answering:
        model = AutoGPTQForCausalLM.from_quantized(str(folder), device="cuda:0", torch_dtype=torch.float16)
        ids = model.generate(input_ids=prompt(1), max_new_tokens=8, do_sample=False)
    return {
        "layers": DEPTH,
        "seconds": used.seconds,
        "peak_bytes": used.peak_vram,
        "answering_peak_bytes": answering.peak_vram,
        "new_tokens": ids.shape[1] - PROMPT,
        "kernel": type(model.model.model.layers[0].mlp.up_proj).__module__,
        "under": SMALL,
    }


def autoawq():
    """autoawq, repaired: quantize without clipping, save, load with its own loader (its Triton kernels), answer."""
    import torch
    from transformers import AutoTokenizer

    from helpers import archived, memory, models, speed

    memory.cap_vram(SMALL)
    archived.enable("autoawq")
    from awq import AutoAWQForCausalLM

    config = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    with memory.track() as used:
        model = AutoAWQForCausalLM.from_pretrained(geometry(DEPTH), low_cpu_mem_usage=True, use_cache=False)
        tokenizer, samples = AutoTokenizer.from_pretrained(geometry(DEPTH)), rows_of_ids(8).tolist()
        model.quantize(tokenizer, quant_config=config, calib_data=samples, max_calib_seq_len=512, apply_clip=False)
    folder = models.cache() / "reference-autoawq"
    model.save_quantized(str(folder))
    del model
    gc.collect()
    torch.cuda.empty_cache()
    with memory.track() as answering:
        model = AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False).model.eval()
        rate = speed.decode(model, prompt_tokens=PROMPT, new_tokens=16, runs=1)
    return {
        "layers": DEPTH,
        "seconds": used.seconds,
        "peak_bytes": used.peak_vram,
        "answering_peak_bytes": answering.peak_vram,
        "tokens_per_s": rate.decode_tokens_per_s,
        "kernel": type(model.model.layers[0].mlp.up_proj).__module__,
        "under": SMALL,
    }


STEPS = {step.__name__: step for step in (
    bandwidth, decode_fp16, decode_int4, decode_marlin, decode_nf4, generate_fp16, generate_int4, memory, fp16_under_16gb, qlora,
    gptq, gptq_kernels, autoawq, auto_gptq,
)}  # fmt: skip

if __name__ == "__main__":
    main()
