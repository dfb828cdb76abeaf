"""Measure the course's methods at Mistral-7B's size on one NVIDIA GPU.

    python notebooks/gpu/reference.py --output reference.json                  # everything, about half an hour
    python notebooks/gpu/reference.py --output reference.json --only memory    # one step, added to what the file holds
    python notebooks/gpu/reference.py --output reference.json --only ladder_7b --rows Marlin   # the rows whose label has this word

Weights are random in the 7B shape (memory and speed do not depend on their values); the 1.5B model is a real one; quality is what the
notebooks measure. The ladders need kernels that gptqmodel compiles at first use: step `kernels` does only that. Every step runs in a process of its own, so that no peak contains what an earlier step left; a failure is written down
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
import threading
import time
from functools import partial
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
    parser.add_argument(
        "--rows", nargs="+", metavar="WORD", help="of a ladder only the rows whose label contains a WORD"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)  # for the processes this script starts
    arguments = parser.parse_args()
    if arguments.step:
        step = STEPS[arguments.step]
        print("RESULT " + json.dumps(step(arguments.rows) if arguments.step in LADDERS else step()), flush=True)
        return
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    here = facts()
    elsewhere = results.get("device", here["device"]) != here["device"]
    if not elsewhere:
        results |= here
    for step in arguments.only:
        started = time.perf_counter()
        before = (
            results.get(step, {}).get("rows", {}) if arguments.rows else {}
        )  # rows that are not measured again stay

        def keep(result):
            if "rows" in result:
                result = result | {"rows": before | result["rows"]}
            # a step measured on another device than the file's says so itself
            results[step] = result | ({"device": here["device"], "date": here["date"]} if elsewhere else {})
            write(arguments.output, results)

        keep(run(step, arguments.timeout, arguments.output.with_suffix(".log"), arguments.rows, keep))
        print(f"{step}: {time.perf_counter() - started:.0f} s  {json.dumps(results[step])[:900]}", flush=True)


def run(step, timeout, log, rows=None, keep=None):
    """One step in a process of its own: its result, or {"failed": why}. What it says beside goes to `log`.

    A step that prints rows as it has them hands each to `keep`, and keeps those it had when it failed or ran out of time.
    """
    command = [sys.executable, __file__, "--step", step, *(["--rows", *rows] if rows else [])]
    result, late = {}, threading.Event()
    with log.open("a") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as child:

        def stop():
            late.set()
            child.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        for line in child.stdout:
            if line.startswith("RESULT "):
                result = {"done": json.loads(line[7:])}
            elif line.startswith("ROW "):
                print(line.rstrip(), flush=True)
                result.setdefault("rows", {}).update(json.loads(line[4:]))
                if keep:
                    keep(result | {"failed": "not at its end yet"})
        timer.cancel()
    if "done" in result:
        return result["done"]
    if late.is_set():
        return result | {"failed": f"took longer than {timeout} s"}
    return result | {"failed": (log.read_text().strip().splitlines() or ["no message"])[-1][:300]}


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
    installed = {distribution.name for distribution in metadata.distributions()}
    return {
        "device": torch.cuda.get_device_name(),
        "vram_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": driver.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python notebooks/gpu/reference.py",
        "model": "mistral-7b-geometry (random weights in Mistral-7B's shape)",
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: metadata.version(name) for name in names if name in installed},
        "protocol": {"prompt_tokens": PROMPT, "new_tokens": NEW, "cache_tokens": LENGTH},
    }


# --- models ---------------------------------------------------------------------------------------------------------------------


def geometry(layers=32):
    from helpers import models

    return models.geometry.make(layers).path


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


def read_bytes(model):
    """Bytes of weights that one token needs: all but the embedding table, of which it reads a row, unless the head is that table."""
    from helpers import memory

    table = model.get_input_embeddings()
    tied = getattr(model.lm_head, "weight", None) is table.weight
    return memory.weight_bytes(model) - (0 if tied else memory.weight_bytes(table))


def seconds(work, runs=5):
    """Median seconds of `work` on the GPU, after one untimed run."""
    return statistics.median(times(work, runs))


def times(work, runs):
    """Seconds of each of several runs of `work` on the GPU, after one untimed run."""
    import torch

    work()
    found = []
    for _ in range(runs):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return found


def speeds(tokens, found):
    """Tokens a second of runs that took `found` seconds each: the median one, the slowest and the fastest."""
    return {
        "tokens_per_s": tokens / statistics.median(found),
        "low": tokens / max(found),
        "high": tokens / min(found),
    }


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


def eager(model, batches=(1, 8), new_tokens=32):
    from helpers import speed

    rows = {}
    for batch in batches:
        rate = speed.decode(model, prompt_tokens=PROMPT, new_tokens=new_tokens, batch=batch)
        rows[str(batch)] = {
            "prefill_s": batch * PROMPT / rate.prefill_tokens_per_s,
            "tokens_per_s": rate.decode_tokens_per_s,
            "low": rate.decode_low,
            "high": rate.decode_high,
        }
    return rows


def lean(model, batches=(1, 8), compiled=True, profiled=True, captured=True, question=None):
    """The lean decoder at each batch size; at batch 1 also where the time of a token goes, and the answer to `question`.

    compiled=False leaves out torch.compile; captured=False the CUDA graph, for kernels that cannot be captured.
    """
    import torch
    from lean_decode import LeanDecoder

    rows = {}
    for batch in batches:
        torch._dynamo.reset()
        started = time.perf_counter()
        with contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            decoder = LeanDecoder(model, batch, LENGTH)
            token = decoder.capture().graph.replay if captured else decoder.step
        ready, ids = time.perf_counter() - started, prompt(batch)
        new, runs = (NEW, 5) if batch == 1 else (NEW // 2, 3)

        @torch.inference_mode()
        def answer(tokens):
            decoder.position.fill_(PROMPT)
            for _ in range(tokens):
                token()

        row = rows[str(batch)] = {"ready_s": ready, "prefill_s": seconds(lambda: decoder.prefill(ids), 3)}
        row |= speeds(batch * new, times(lambda: answer(new), runs))
        if profiled and batch == 1:
            row["profile"] = profile(lambda: answer(16), 16)  # the profiler's own bookkeeping is slow
        if question is not None and batch == 1 and captured:
            row["answer"] = decoder.generate(question, ANSWER)[0].tolist()
        del decoder
        torch.cuda.empty_cache()
    return rows


def generate(model, batches=(1,)):
    """transformers' own compiled path: `generate` with a static cache; at batch 1 also where the time of a token goes."""
    import torch

    rows = {}
    for batch in batches:
        torch._dynamo.reset()
        ids, options = (
            prompt(batch),
            dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, cache_implementation="static"),
        )

        def answer():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

        started = time.perf_counter()
        answer()
        row = rows[str(batch)] = {"ready_s": time.perf_counter() - started}
        row |= speeds(batch * NEW, times(answer, 3))
        if batch == 1:
            row["profile"] = profile(answer, NEW)
    return rows


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
    import layers
    import torch
    from lean_decode import fuse

    model = layers.replace(random_model(torch.bfloat16), layers.marlin)
    rows = {"eager": eager(model), "bytes": read_bytes(model)}
    del model
    model = layers.replace(fuse(random_model(torch.bfloat16)), layers.marlin)
    rows["graph"] = lean(model, (1,), compiled=False)
    return rows | {"lean": lean(model)}


def decode_nf4():
    model = load(quantization_config=nf4()).eval()
    return {"eager": eager(model), "bytes": read_bytes(model), "lean": lean(model)}


def generate_fp16():
    import torch

    return generate(random_model(torch.float16))


def generate_1_5b():
    return generate(load("float16", real_path()).eval(), BATCHES)


def generate_int4():
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = random_model(torch.bfloat16)
    quantize_(model, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return generate(model)


# --- the ladder: every way of decoding, one shape, one process -------------------------------------------------------------------

BATCHES, ANSWER = (1, 8, 32), 32
QWEN = "qwen2.5-coder-1.5b-offline"
HEAD, NO_HEAD, NOTHING = "layers and head", "layers", "nothing"
ROWS = {  # label: (dtype, tensors with fewer bits, how, batches)
    "fp16, lean": ("float16", NOTHING, "lean", BATCHES),
    "NF4 (bitsandbytes), lean": ("bfloat16", HEAD, "lean", BATCHES),
    "NF4 (bitsandbytes) without the head, lean": ("bfloat16", NO_HEAD, "lean", (1,)),
    "int4 (torchao, tinygemm), lean": ("bfloat16", HEAD, "lean", BATCHES),
    "int4, product by torch.compile, lean": ("bfloat16", HEAD, "lean", (1,)),
    "FP8 (torch._scaled_mm, rows), lean": ("bfloat16", HEAD, "lean", BATCHES),
    "FP8 weights, product by torch.compile, lean": ("bfloat16", HEAD, "lean", (1,)),
    "fp16, eager": ("float16", NOTHING, "eager", BATCHES),
    "NF4 (bitsandbytes), eager": ("bfloat16", NO_HEAD, "eager", BATCHES),
    "LLM.int8() (bitsandbytes), eager": ("float16", NO_HEAD, "eager", BATCHES),
    "GPTQ format (gptqmodel, Marlin), lean": ("bfloat16", HEAD, "lean", BATCHES),
    # its kernels go to the default stream, which a CUDA graph does not record
    "GPTQ format (gptqmodel, ExLlamaV2), lean without a graph": ("float16", HEAD, "lean, no graph", BATCHES),
    "GPTQ format (gptqmodel, ExLlamaV2), eager": ("float16", HEAD, "eager", BATCHES),
}


def kernels():
    """What gptqmodel compiles at first use, for the steps that need it: seconds, and whether each is there."""
    import layers

    started = time.perf_counter()
    built = layers.build()
    return {"seconds": time.perf_counter() - started} | {name: bool(there) for name, there in built.items()}


def ladder(name, words=None):
    """Each row of ROWS for one shape, "7b" or "1.5b": printed as soon as it is there; a row that fails says why, the others go on."""
    import torch

    rate = bandwidth()["copy_bytes_per_s"]
    torch.cuda.empty_cache()
    question, expected = (None, None) if name == "7b" else real_answer()
    rows = {}
    for label in ROWS:
        if words and not any(word.lower() in label.lower() for word in words):
            continue
        started = time.perf_counter()
        try:
            row = ladder_row(name, label, question)
            for batch, found in row["batches"].items():
                compare(found, int(batch), row["bytes"] / rate, expected)
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {error}"[:300]}
        row["seconds"] = time.perf_counter() - started
        rows[label] = row
        print("ROW " + json.dumps({label: row}), flush=True)
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    model = "mistral-7b-geometry (random weights)" if name == "7b" else QWEN
    return {"model": model, "copy_bytes_per_s": rate, "expected": expected, "rows": rows}


def source(name, dtype):
    """The model that a row of a ladder begins with and changes."""
    import torch

    if name == "7b":
        return random_model(getattr(torch, dtype))
    return load(dtype, real_path()).eval().requires_grad_(False)


def ladder_row(name, label, question):
    from lean_decode import fuse

    dtype, tensors, how, batches = ROWS[label]
    model = source(name, dtype)
    if how != "eager":
        fuse(model)
    fewer_bits(model, label, head=tensors == HEAD)
    row = {"quantized": tensors, "dtype": dtype, "bytes": read_bytes(model)}
    if how == "eager":
        return row | {"batches": eager(model, batches, new_tokens=16)}
    captured = how == "lean"
    # the profile cannot tell products that the compiler wrote from its other kernels
    profiled = captured and "product" not in label
    return row | {"batches": lean(model, batches, profiled=profiled, captured=captured, question=question)}


def fewer_bits(model, label, head):
    import layers

    makers = {"NF4": layers.nf4, "LLM.int8": layers.llm_int8, "Marlin": layers.marlin, "ExLlamaV2": layers.exllama_v2([]),
              "int4, product": layers.Nibbles, "FP8 (": layers.Float8, "FP8 weights": layers.Float8Weight}  # fmt: skip
    for word, make in makers.items():
        if word in label:
            layers.replace(model, make, head)
    if "tinygemm" in label:
        tinygemm(model)


def tinygemm(model):
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(
        group_size=128,
        int4_packing_format="tile_packed_to_4d",
        set_inductor_config=False,  # the other rows are compiled without these settings too
    )
    quantize_(model, config, lambda layer, _: type(layer) is torch.nn.Linear)


def compare(found, batch, least, expected):
    """Add to a measured batch how much of the bandwidth limit it reaches, and how many first tokens of its answer are fp16's.

    least: seconds that reading the weights takes.
    """
    found["share"] = found["tokens_per_s"] / batch * least
    if "answer" in found:
        answer = found.pop("answer")
        same = [got == wanted for got, wanted in zip(answer, expected)]
        found["first_tokens_as_fp16"] = (same + [False]).index(False)


def real_path():
    from helpers import models

    return models.find(QWEN).path


def real_answer():
    """A prompt for the real model and transformers' greedy answer in fp16: what the rows' answers are compared with."""
    from transformers import AutoTokenizer

    model, tokenizer = source("1.5b", "float16"), AutoTokenizer.from_pretrained(real_path())
    question = tokenizer("def quantize(weights, bits):\n", return_tensors="pt").input_ids.cuda()
    ids = model.generate(question, max_new_tokens=ANSWER, do_sample=False, eos_token_id=None, repetition_penalty=1.0)
    return question, ids[0, question.shape[1] :].tolist()


# --- FP8 products ---------------------------------------------------------------------------------------------------------------

SIZES = (  # tokens, in, out
    (1, 4096, 14336),
    (16, 4096, 14336),
    (512, 4096, 14336),
    (4096, 4096, 14336),
    (8192, 8192, 8192),
)


def fp8_matmul():
    """FP8 products against bf16's at five sizes: seconds (median, fastest, slowest), TFLOP/s, GB/s, how many times as fast.

    Each run is a CUDA graph of products with several matrices in turn, together larger than any cache. Activations are rounded
    before, except in "rows, activations rounded in time".
    """
    import torch

    return {
        f"{tokens} x {inner} x {outer}": products(torch.Generator("cuda").manual_seed(0), tokens, inner, outer)
        for tokens, inner, outer in SIZES
    }


def products(generator, tokens, inner, outer, runs=30):
    import torch
    from layers import round_rows, round_to_float8

    def noise(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    x, weights = noise(tokens, inner), [noise(outer, inner) * 0.02 for _ in range(8)]
    options = dict(out_dtype=torch.bfloat16, use_fast_accum=True)
    x_one, x_rows = round_to_float8(x), round_to_float8(x, 1)
    one, rows = [round_to_float8(weight) for weight in weights], [round_to_float8(weight, 1) for weight in weights]

    def scaled(activations, weight):
        (left, left_scale), (right, right_scale) = activations, weight
        return torch._scaled_mm(left, right.t(), left_scale, right_scale.t(), **options)

    ways = {
        "bf16": (2, [partial(torch.nn.functional.linear, x, weight) for weight in weights]),
        "tensor": (1, [partial(scaled, x_one, weight) for weight in one]),
        "rows": (1, [partial(scaled, x_rows, weight) for weight in rows]),
        "rows, activations rounded in time": (
            1,
            [lambda weight=weight: scaled(round_rows(x, 1), weight) for weight in rows],
        ),
    }
    found, exact = {}, torch.nn.functional.linear(x, weights[0]).float()
    for name, (width, work) in ways.items():
        try:
            error = ((work[0]().float() - exact).norm() / exact.norm()).item()
            many = work * (5 if tokens <= 512 else 1)  # long enough that the launch of a graph does not count
            per_call = [value / len(many) for value in times(graph(many), runs)]
        except Exception as failure:
            found[name] = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
            continue
        middle = statistics.median(per_call)
        moved = width * (tokens * inner + inner * outer) + 2 * tokens * outer
        found[name] = {"seconds": middle, "fastest_s": min(per_call), "slowest_s": max(per_call), "relative_error": error,
                       "tflop_per_s": 2e-12 * tokens * inner * outer / middle, "gb_per_s": 1e-9 * moved / middle}  # fmt: skip
        if "seconds" in found.get("bf16", {}):
            found[name]["times_bf16"] = found["bf16"]["seconds"] / middle
    return found


def graph(work):
    """One CUDA graph of several calls; each runs three times before, for compiling and choosing kernels. -> a function that replays it."""
    import torch

    def calls():
        for call in work:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        calls()
    return recorded.replay


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
    bandwidth, kernels, decode_fp16, decode_int4, decode_marlin, decode_nf4, generate_fp16, generate_1_5b, generate_int4, fp8_matmul,
    memory, fp16_under_16gb, qlora, gptq, gptq_kernels, autoawq, auto_gptq,
)}  # fmt: skip
LADDERS = {"ladder_7b": partial(ladder, "7b"), "ladder_1_5b": partial(ladder, "1.5b")}
STEPS |= LADDERS

if __name__ == "__main__":
    main()
