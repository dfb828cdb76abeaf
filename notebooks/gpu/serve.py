"""Serve one model with vLLM in several formats: kernel, speed, first token, memory, and the same greedy tokens as transformers.

    python notebooks/gpu/serve.py --model MODEL --gptq GPTQ --awq AWQ --refused SMOLLM2_GPTQ --output serving.json
    python notebooks/gpu/serve.py --model MODEL --only bf16 fp8 --output serving.json     # two rows, added to what the file holds
    python notebooks/gpu/serve.py --model MODEL --only bf16 --gpus 1 2 --no-compare --output two.json    # tensor parallel 2 as well

MODEL, GPTQ, AWQ, SMOLLM2_GPTQ are checkpoint folders. Needs one NVIDIA GPU (with `--gpus N`, N of them) and the packages of
requirements-serving.txt. Every row runs in a process of its own, and so does the transformers model it is compared with; a failure is
written down as what it is. Sizes are bytes, times are seconds. `tokens_per_s` counts new tokens over the whole time of a batch of requests, prompts included;
`decode_tokens_per_s` takes off the time of the same batch with one new token. What an engine says goes to OUTPUT with `.ROW.log`.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT, NEW, BATCHES, RUNS = 128, 128, (1, 8, 32, 128), 3
GREEDY = 32
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Four-bit weights take less memory because",
    "Once upon a time, in a small harbour town,",
    "SELECT name, COUNT(*) FROM orders",
    "Water boils at a lower temperature on a mountain because",
    "To reverse a linked list, keep three pointers:",
    "Dear Ms. Lindqvist,\n\nthank you for your letter of",
)
SCRATCH = tempfile.gettempdir() + "/serving"
SETTINGS = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CACHE_ROOT": SCRATCH + "/vllm", "VLLM_CONFIG_ROOT": SCRATCH + "/config", "TRITON_CACHE_DIR": SCRATCH + "/triton",
    "TORCHINDUCTOR_CACHE_DIR": SCRATCH + "/inductor", "VLLM_USE_FLASHINFER_SAMPLER": "0", "PYTHONDONTWRITEBYTECODE": "1",
    "FLASHINFER_WORKSPACE_BASE": SCRATCH, "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
CACHE = "SERVING_CACHE_GB"  # how --cache-gb reaches the process of a row
ROWS = {  # name: (which folder, what vLLM is told, what transformers is told)
    "bf16": ("model", {}, "bf16"),
    "fp8": ("model", {"quantization": "fp8"}, "bf16"),
    "gptq": ("gptq", {}, "gptq"),
    "awq": ("awq", {}, "awq"),
    "bitsandbytes": ("model", {"quantization": "bitsandbytes"}, "nf4"),
    "refused": ("refused", {}, None),
    "refused, said to be symmetric": ("refused", {}, None),  # only for the message: its first reason hides its second
}
SAID = re.compile(r"Using \w+ for|Selected \w+ for|attention backend|quantization=|Model Runner|Model loading took|Loading weights took|"
                  r"KV cache size|Available KV|Graph capturing|torch.compile takes|init engine|onvert|[Mm]arlin|[Mm]achete")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for folder in ("model", "gptq", "awq", "refused"):
        parser.add_argument(f"--{folder}", type=Path)
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    parser.add_argument("--only", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument(
        "--gpus", nargs="+", type=int, default=[1], help="GPUs that vLLM splits each matrix over; a row each"
    )
    parser.add_argument(
        "--cache-gb",
        type=float,
        help="GB of KV cache, where other programs are on the GPU (else a fifth of it is vLLM's)",
    )
    parser.add_argument("--timeout", type=int, default=150, help="seconds one process may take")
    parser.add_argument("--no-compare", action="store_true", help="leave transformers out")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # for the processes this program starts
    arguments = parser.parse_args()
    if arguments.step:
        return child(*arguments.step)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    here = run("facts", "-", "-", arguments, "facts")
    if "failed" in here:
        parser.error(here["failed"])
    results |= here
    results["command"] = "python notebooks/gpu/serve.py " + " ".join(sys.argv[1:])
    for gpus, kind in itertools.product(arguments.gpus, arguments.only):
        source, _, reference = ROWS[kind]
        name, folder = row_name(kind, gpus), getattr(arguments, source)
        if folder is None:
            continue
        started = time.perf_counter()
        row = run("serve", name, str(folder), arguments, name)
        if reference and "greedy" in row and not arguments.no_compare:
            other = run("answers", reference, str(folder), arguments, f"{name}-transformers")
            row["transformers"] = other if "failed" in other else compared(row["greedy"], other, folder)
            if "failed" not in other:
                del row["greedy"]
        row["seconds"] = round(time.perf_counter() - started, 1)
        results[name] = row
        print(f"{name}: {json.dumps({key: value for key, value in row.items() if key != 'greedy'})[:1500]}", flush=True)
        write(arguments.output, results)


def row_name(kind, gpus):
    """The name of a row: "bf16", or "bf16 on 2 GPUs"."""
    return kind if gpus == 1 else f"{kind} on {gpus} GPUs"


def engine_options(name):
    """What vLLM is told for a row of that name."""
    kind, _, gpus = name.removesuffix(" GPUs").partition(" on ")
    graphs: dict = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128]}
    options = ROWS[kind][1] | {"compilation_config": graphs, "gpu_memory_utilization": 0.2}
    # Without a fixed size vLLM fails where another program frees memory while it measures what is free. The share of the
    # GPU is then only what has to be free at the start.
    if CACHE in os.environ:
        options |= {"kv_cache_memory_bytes": round(float(os.environ[CACHE]) * 1e9), "gpu_memory_utilization": 0.05}
    if not gpus:
        return options
    # NVLink multicast, which these passes may use, is off on GPUs that others share
    graphs["pass_config"] = {"fuse_allreduce_rms": False, "fuse_gemm_comms": False, "enable_sp": False}
    return options | {"tensor_parallel_size": int(gpus)}


def run(step, name, folder, arguments, log_name):
    """One step in a process of its own: its result, or {"failed": why}."""
    log = arguments.output.with_suffix(f".{re.sub(r'[^A-Za-z0-9-]+', '-', log_name)}.log")
    command = [sys.executable, __file__, "--step", step, name, folder]
    env = SETTINGS | os.environ | ({CACHE: str(arguments.cache_gb)} if arguments.cache_gb else {})
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            process.wait(arguments.timeout)
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {arguments.timeout} s"}
        finally:  # an engine's workers would keep the GPU
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = log.read_text(errors="replace")
    for line in said.splitlines():
        if line.startswith("RESULT "):
            row = json.loads(line[7:])
            return row | picked(said) if step == "serve" else row
    return {"failed": (said.strip().splitlines() or [f"ended with {process.returncode}"])[-1][:500]}


def picked(said):
    """What the engine's own log says: kernels, weights, load time; and the lines themselves without their time stamps."""
    lines = dict.fromkeys(re.sub(r"^.*?\] ", "", line)[:240] for line in said.splitlines() if SAID.search(line))
    row = {"kernels": sorted(set(re.findall(r"(?:Using|Selected) (\w+) for \w+", said)))}
    if found := re.search(r"quantization=(\w+)", said):
        row["quantization"] = found[1]
    if found := re.search(r"Using (\w+) attention backend", said):
        row["attention"] = found[1]
    if found := re.search(r"Model loading took ([\d.]+) GiB(?: memory)? and ([\d.]+) seconds", said):
        row |= {"weights_bytes": round(float(found[1]) * 2**30), "load_s": float(found[2])}
    if found := re.search(r"GPU KV cache size: ([\d,]+) tokens", said):
        row["cache_tokens"] = int(found[1].replace(",", ""))
    return row | {"log": [line for line in lines if "Initializing a V1" not in line][:20]}


def compared(ours, theirs, folder):
    """How far the answers of the engine and of transformers are the same."""
    from transformers import AutoTokenizer

    return differences(ours, theirs, AutoTokenizer.from_pretrained(folder))


def differences(ours, theirs, words):
    """Of each prompt the tokens before the first difference; and each first difference, with the gap of transformers' two best logits."""
    same, found = [], []
    for number, (left, right) in enumerate(zip(ours, theirs["greedy"], strict=True)):
        place = next((place for place, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), len(left))
        same.append(place)
        if place < GREEDY:
            found.append({"prompt": PROMPTS[number], "token": place, "vllm": words.decode(left[place : place + 4]),
                          "transformers": words.decode(right[place : place + 4]),
                          "transformers_logit_gap": theirs["gaps"][number][place]})  # fmt: skip
    return {"with": theirs["with"], "same_tokens": same, "of": GREEDY, "differences": found}


def write(path, results):
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


# --- in a process of its own ---------------------------------------------------------------------------------------------------


def child(step, name, folder):
    """Print the step's result; an error is a result too."""
    try:
        result = {"facts": facts, "serve": serve, "answers": answers}[step](name, folder)
    except Exception as error:
        import traceback

        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:700]}
    print("\nRESULT " + json.dumps(result), flush=True)
    os._exit(0)  # an engine's own threads may keep a process alive


def facts(*_):
    import platform
    from importlib import metadata

    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    names = (
        "torch",
        "triton",
        "vllm",
        "transformers",
        "compressed-tensors",
        "flashinfer-python",
        "xgrammar",
        "bitsandbytes",
        "gptqmodel",
    )
    return {
        "device": torch.cuda.get_device_name(),
        "vram_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | {name: metadata.version(name) for name in names},
        "protocol": {"prompt_tokens": PROMPT, "new_tokens": NEW, "requests": BATCHES, "runs": RUNS, "greedy_tokens": GREEDY},
    }  # fmt: skip


def serve(name, folder):
    started = time.perf_counter()
    import torch
    from vllm import LLM, SamplingParams

    imported = time.perf_counter() - started
    if "symmetric" in name:
        folder = relabelled(folder)
    llm = LLM(model=folder, dtype="bfloat16", max_model_len=1024, max_num_seqs=max(BATCHES),
              enable_prefix_caching=False, enable_flashinfer_autotune=False, **engine_options(name))  # fmt: skip
    ready = time.perf_counter() - started
    words = llm.get_tokenizer()
    torch.manual_seed(0)
    limit = min(len(words), 30_000)

    def seconds(requests, new):
        """Median seconds of a batch with fresh prompts, after one untimed run."""
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        times = []
        for _ in range(RUNS + 1):
            rows = torch.randint(100, limit, (requests, PROMPT)).tolist()
            began = time.perf_counter()
            done = llm.generate([{"prompt_token_ids": row} for row in rows], how, use_tqdm=False)
            times.append(time.perf_counter() - began)
            if any(len(answer.outputs[0].token_ids) != new for answer in done):
                raise RuntimeError("an answer is shorter than asked for")
        return statistics.median(times[1:])

    speeds = {}
    for requests in BATCHES:
        first, whole = seconds(requests, 1), seconds(requests, NEW)
        speeds[str(requests)] = {
            "first_token_s": first,
            "tokens_per_s": requests * NEW / whole,
            "decode_tokens_per_s": requests * (NEW - 1) / (whole - first),
        }
    how = SamplingParams(temperature=0, max_tokens=GREEDY, ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": words(text).input_ids} for text in PROMPTS], how, use_tqdm=False)
    free, total = torch.cuda.mem_get_info()
    return {"import_s": imported, "ready_s": ready, "requests": speeds, "gpu_bytes_with_cache": total - free,
            "greedy": [list(answer.outputs[0].token_ids) for answer in done]}  # fmt: skip


def relabelled(folder):
    """A copy of a GPTQ checkpoint whose settings say `sym: true`. Its answers would be wrong; only the refusal is of interest."""
    copy = Path(tempfile.mkdtemp())
    for file in Path(folder).resolve().iterdir():
        if file.name in ("config.json", "quantize_config.json"):
            settings = json.loads(file.read_text())
            settings.get("quantization_config", settings)["sym"] = True
            (copy / file.name).write_text(json.dumps(settings))
        else:
            (copy / file.name).symlink_to(file)
    return str(copy)


def answers(kind, folder):
    """The greedy tokens of transformers, one prompt at a time, with the gap between the two highest logits at each token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig, BitsAndBytesConfig, GPTQConfig

    named = {
        "bf16": lambda: None,
        "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        "gptq": lambda: GPTQConfig(bits=4, backend="gptq_triton"),
        "awq": lambda: AwqConfig(bits=4, backend="gemm_triton"),
    }  # fmt: skip
    config = named[kind]()
    more = {"quantization_config": config} if config else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0}, **more).eval()
    words = AutoTokenizer.from_pretrained(folder)
    greedy, gaps = [], []
    for text in PROMPTS:
        ids = words(text, return_tensors="pt").input_ids.cuda()
        done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY, min_new_tokens=GREEDY,
                              do_sample=False, repetition_penalty=1.0, return_dict_in_generate=True, output_logits=True)  # fmt: skip
        greedy.append(done.sequences[0, ids.shape[1] :].tolist())
        best = [logits[0].float().topk(2).values for logits in done.logits]
        gaps.append([round(float(pair[0] - pair[1]), 4) for pair in best])
    return {"with": kind, "greedy": greedy, "gaps": gaps}


if __name__ == "__main__":
    main()
