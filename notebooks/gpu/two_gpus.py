"""What two GPUs gave, in serving and in training, as a section of this folder's README; `summary.py` writes it."""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = {"7b": "7B shape, random weights", "1.5b": "1.5B model"}
TRAINING = {"one": "one GPU", "ddp": "DDP, two GPUs", "fsdp": "FSDP, two GPUs"}


def read(path=HERE / "two_gpus.json"):
    return json.loads(path.read_text(encoding="utf-8"))


def gain(rows, kind="bf16"):
    """Tokens a second of two GPUs as a multiple of one, {requests: factor}."""
    one, two = rows[kind]["requests"], rows[f"{kind} on 2 GPUs"]["requests"]
    return {n: two[n]["tokens_per_s"] / one[n]["tokens_per_s"] for n in one}


def same_answers(rows, kind="bf16"):
    """Of each prompt the tokens before one GPU and two give different ones."""
    pairs = zip(rows[kind]["greedy"], rows[f"{kind} on 2 GPUs"]["greedy"], strict=True)
    return [next((place for place, (a, b) in enumerate(zip(*pair)) if a != b), len(pair[0])) for pair in pairs]


def table(record):
    """Lines of the table of serving."""
    lines = ["| model | format | GPUs | weights a GPU, GB | 1 request, tok/s | 8 | 32 | 128 | first token at 1, ms | at 128, ms |", "|---" * 10 + "|"]  # fmt: skip
    for model, rows in record["vllm"].items():
        for name, row in rows.items():
            kind, _, gpus = name.removesuffix(" GPUs").partition(" on ")
            speeds = [f"{found['tokens_per_s']:,.0f}" for found in row["requests"].values()]
            first = [f"{1e3 * row['requests'][n]['first_token_s']:.1f}" for n in ("1", "128")]
            cells = [NAMES[model], kind, gpus or "1", f"{row['weights_bytes'] / 1e9:.2f}", *speeds, *first]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def training(record):
    """Lines of the table of QLoRA's training."""
    lines = ["| QLoRA of the 1.5B model | seconds a step | peak of GPU 0, GB | first loss | last loss |", "|---" * 5 + "|"]
    for name, row in record["training"].items():
        cells = [f"{row['seconds_per_step']:.2f}", f"{row['peak_vram_bytes'] / 1e9:.2f}", f"{row['losses'][0]:.3f}", f"{row['losses'][-1]:.3f}"]  # fmt: skip
        lines.append(f"| {TRAINING[name]} | " + " | ".join(cells) + " |")
    return lines
