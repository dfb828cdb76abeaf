"""What vLLM gave on two GPUs, as a section of this folder's README; `summary.py` writes it."""

import json
from pathlib import Path

import serving

HERE = Path(__file__).resolve().parent
NAMES = {"7b": "7B shape, random weights", "1.5b": "1.5B model"}


def sharded(path=HERE.parent / "scale_out" / "reference.json"):
    """GB that GPU 0 needs with DDP and with FSDP, in Mistral-7B's shape."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return [runs[name]["peak_vram_bytes"] / 1e9 for name in ("ddp", "fsdp")]


def read(path=HERE / "two_gpus.json"):
    return json.loads(path.read_text(encoding="utf-8"))


def gain(rows, kind="bf16"):
    """Tokens a second of two GPUs as a multiple of one in the same run, {requests: factor}."""
    one, two = rows[kind]["requests"], rows[f"{kind} on 2 GPUs"]["requests"]
    return {n: two[n]["tokens_per_s"] / one[n]["tokens_per_s"] for n in one}


def lines_of(record):
    """The table's lines."""
    heads = (
        "model, bf16 | GPUs | weights a GPU, GB | 1 request, tok/s | 8 | 32 | 128 | first token at 1, ms | at 128, ms"
    )
    lines = [f"| {heads} |", "|---" * 9 + "|"]
    for model, rows in record["vllm"].items():
        for name, row in rows.items():
            gpus = "2" if name.endswith("2 GPUs") else "1"
            cells = [NAMES[model], gpus, serving.gigabytes_of(row), *serving.speeds_of(row)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def section(record, served, beside):
    """The section in Markdown. served, beside: serving.json and side_by_side.json, each of one GPU of another machine."""
    alone = [row["requests"]["1"]["tokens_per_s"] for row in (served["bf16"], beside["vllm"]["bf16"])]
    ddp, fsdp = sharded()
    factors = gain(record["vllm"]["7b"])
    logs = record["from_logs"]
    training = logs["qlora of the 1.5B model, 8 steps of 8 examples"]
    one, two = (training[name]["train_runtime_s"] for name in ("one GPU", "DDP, two GPUs"))
    small = record["vllm"]["1.5b"]["bf16 on 2 GPUs"]["requests"]["1"]["tokens_per_s"]
    again = logs["vLLM, 1.5B model, bf16 on 2 GPUs, another run"]["tokens_per_s at 1 request"]
    shared = json.loads((HERE.parent / "scale_out" / "shared_gpu.json").read_text(encoding="utf-8"))
    process = {name: f"{run['peak_vram_bytes'] / 1e9:.1f}" for name, run in shared["runs"].items()}
    seven = logs["vLLM, 7B shape, bf16, another run, tokens_per_s at 1 request"]
    return "\n".join(
        [
            "## Two GPUs",
            "",
            f"vLLM {record['versions']['vllm']} with tensor parallel 2 on two {record['device']}s of one machine ({record['link']}), {record['date']}, driver "
            f"{record['driver']}. {record['beside']} Prompts and answers as above. NVLink multicast was off, as that machine asks for, so vLLM's fused sums were off. All of it comes "
            "from [two_gpus.json](two_gpus.json).",
            "",
            *lines_of(record),
            "",
            f"**7B shape:** two GPUs give {', '.join(f'{factor:.2f}' for factor in factors.values())} times the tokens of one at {', '.join(factors)} requests. Each holds half of "
            "the weights. It is less than twice: after each attention and each MLP the two add up their halves, and what is no matrix does not get shorter. How long each of these takes was not measured. Another run of the "
            f"same evening printed {seven['one GPU']:.0f} and {seven['2 GPUs']:.0f} tokens/s at one request, {seven['2 GPUs'] / seven['one GPU']:.2f} times.",
            "",
            f"**1.5B model:** {small:,.0f} tokens/s at one request, {again:,.0f} in another run; so far apart are two runs. One GPU of two other machines gave {alone[0]:,.0f} and {alone[1]:,.0f} (section above). The row for one GPU "
            "of this run is missing, so no ratio is given; a gain like the larger model's is not in sight at one request.",
            "",
            f"**Training.** QLoRA of the 1.5B model, 8 steps of 8 examples: {one:.1f} s on one GPU and {two:.1f} s with DDP on two, the same mean loss "
            f"({training['one GPU']['mean_loss']:.2f}). FSDP on the 1.5B model was not run on two GPUs. Two processes on one GPU ran it (`train.py --share_gpu`, "
            f"[shared_gpu.json](../scale_out/shared_gpu.json)): a process of FSDP needs {process['fsdp']} GB at its peak, one of DDP {process['ddp']}, with the same losses; so FSDP saves nothing "
            f"there. In Mistral-7B's shape, on two GPUs, GPU 0 needs {fsdp:.1f} GB instead of DDP's {ddp:.1f} ([scale_out/reference.json](../scale_out/reference.json)).",
            "",
            'The seconds of the last paragraph, and the figures of "another run", are what the programs printed: the machine was taken back before the files were fetched.',
            "",
            "```bash",
            *record["commands"],
            "```",
        ]
    )
