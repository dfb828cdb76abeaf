"""Measure the course's methods at Mistral-7B's size on one NVIDIA GPU: `python notebooks/gpu/reference.py`.

    python notebooks/gpu/reference.py --output reference.json                # everything
    python notebooks/gpu/reference.py --output reference.json --only memory  # one step, added to what the file holds

Weights are random in the 7B shape (memory and speed do not depend on their values); quality comes from SmolLM2-135M. Every step
runs in a process of its own, so that no peak contains what an earlier step left, and one failure is written down as what it is
and does not stop the others. Bytes and seconds throughout.
"""

import argparse
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
PROMPT, NEW, LENGTH = 128, 128, 512  # tokens: prompt and answer of a decode measurement, and the size of the static cache
GIB = 2**30


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "reference.json")
    parser.add_argument("--only", nargs="+", choices=[*STEPS], default=[*STEPS])
    parser.add_argument("--timeout", type=int, default=400, help="seconds one step may take")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # set by this script for its own child processes
    arguments = parser.parse_args()
    if arguments.step:
        print("RESULT " + json.dumps(STEPS[arguments.step]()), flush=True)
        return
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    results |= facts()
    for step in arguments.only:
        print(f"{step} ...", flush=True)
        started = time.perf_counter()
        results[step], message = run(step, arguments.timeout)
        print(f"  {time.perf_counter() - started:.0f} s  {message}", flush=True)
        write(arguments.output, results)


def run(step, timeout):
    """One step in a process of its own: (its result, or {"failed": why}; what to print)."""
    command = [sys.executable, __file__, "--step", step]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {timeout} s"}, "timeout"
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:]), line[7:1500]
    print(done.stdout[-600:], done.stderr[-2500:], flush=True)
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"failed": reason[:300]}, reason


def write(path, results):
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def facts():
    import platform
    from importlib import metadata

    import torch

    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    names = ("torch", "triton", "transformers", "torchao", "bitsandbytes", "peft", "gptqmodel", "auto-gptq", "autoawq", "numpy")
    return {
        "device": torch.cuda.get_device_name(),
        "vram_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": driver.stdout.strip(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | {name: metadata.version(name) for name in names},
        "date": time.strftime("%Y-%m-%d"),
        "command": "python notebooks/gpu/reference.py",
        "model": "mistral-7b-geometry: random weights in Mistral-7B's shape; quality: SmolLM2-135M-Instruct",
    }


# --- small things ---------------------------------------------------------------------------------------------------------------


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


def shape():
    from transformers import AutoConfig

    from helpers import models

    return AutoConfig.from_pretrained(models.find(models.GEOMETRY).path)


def random_model(dtype):
    """The 7B shape with random weights, made on the GPU: what decoding needs, without a file."""
    import torch
    from transformers import AutoModelForCausalLM

    config = shape()
    config.dtype = dtype
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def load(dtype="bfloat16", path=None, **options):
    import torch
    from transformers import AutoModelForCausalLM

    from helpers import models

    path = path or models.find(models.GEOMETRY).path
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), device_map={"": 0}, **options)


def nf4(double_quant=True):
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=torch.bfloat16
    )


def int4(model):
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    quantize_(model, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return model


def read_bytes(model):
    """Bytes of weights that one token needs: everything but the embedding table, of which it reads a row."""
    from helpers import memory

    return memory.weight_bytes(model) - memory.weight_bytes(model.get_input_embeddings())


# --- decoding -------------------------------------------------------------------------------------------------------------------


def bandwidth():
    """Bytes a second of a device-to-device copy, read and written bytes both counted."""
    import torch

    source = torch.randint(256, (4 * GIB,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {"copy_bytes_per_s": 2 * source.numel() / seconds(lambda: target.copy_(source), 11)}


def prompts(batch):
    import torch

    return torch.randint(3, 32768, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).cuda()


def lean(model, batch, compiled=True):
    """Speed of the lean decoder: seconds of the prompt, seconds of one token."""
    import contextlib

    import torch
    from lean_decode import LeanDecoder

    torch._dynamo.reset()
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    with contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
        decoder = LeanDecoder(model, batch, LENGTH).capture()
    ready = time.perf_counter() - started
    prompt = prompts(batch)
    prefill = seconds(lambda: decoder.prefill(prompt))

    def tokens():
        for _ in range(NEW):
            decoder.graph.replay()

    def reset():
        with torch.inference_mode():
            decoder.position.fill_(PROMPT)

    token = seconds(lambda: (reset(), tokens()), 3) / NEW
    return {"prefill_s": prefill, "token_s": token, "tokens_per_s": batch / token, "ready_s": ready}, decoder


def kernels(decoder, steps=8):
    """Where the time of a token goes, from torch.profiler: seconds a token by kind of kernel, and when no kernel ran."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with torch.inference_mode():
        decoder.position.fill_(PROMPT)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            decoder.graph.replay()
        torch.cuda.synchronize()
    return by_kind(profiler, steps)


def by_kind(profiler, steps):
    from torch.autograd import DeviceType

    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    kinds, names, busy, last = {}, {}, 0.0, spans[0][0]
    for start, end, name in spans:
        low = name.lower()
        if "triton" in low:
            kind = "fused by torch.compile"
        elif any(word in low for word in ("fmha", "attention", "flash")):
            kind = "attention"
        elif any(word in low for word in ("gemm", "gemv", "int4", "marlin", "4bit", "dequant", "nvjet", "cutlass", "splitk", "xmma")):
            kind = "matrices"
        else:
            kind = "other"
        kinds[kind] = kinds.get(kind, 0) + (end - start)
        count, total = names.get(name, (0, 0))
        names[name] = count + 1, total + end - start
        busy += max(0, end - max(start, last))
        last = max(last, end)
    wall = max(end for _, end, _ in spans) - spans[0][0]
    top = sorted(names.items(), key=lambda item: -item[1][1])[:12]
    for name, (count, total) in top:
        print(f"    {total / steps:8.1f} us/token {count / steps:6.1f} x {name[:110]}", flush=True)
    return {"token_s": wall / steps / 1e6, "idle_s": (wall - busy) / steps / 1e6, "kernels": len(spans) / steps,
            "seconds": {kind: value / steps / 1e6 for kind, value in kinds.items()}}  # fmt: skip


STEPS = {"bandwidth": bandwidth}

if __name__ == "__main__":
    main()
