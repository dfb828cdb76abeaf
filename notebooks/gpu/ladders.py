"""Decoding in two shapes and FP8 products, as one section of this folder's README and a picture; `summary.py` writes both."""

from pathlib import Path

PICTURE = Path(__file__).resolve().parent / "ladders.png"
SHAPES = {"ladder_7b": "7B shape", "ladder_1_5b": "1.5B model"}
FP16, MARLIN, TINYGEMM = "fp16, lean", "GPTQ format (gptqmodel, Marlin), lean", "int4 (torchao, tinygemm), lean"
FP8, NF4 = "FP8 (torch._scaled_mm, rows), lean", "NF4 (bitsandbytes), lean"
INT8, EAGER = "LLM.int8() (bitsandbytes), eager", "fp16, eager"


def run(record, step, label):
    """The run of a ladder that has the row: the last, or the earlier one that it did not repeat; None if it was not measured."""
    for found in (record[step], record[step].get("earlier", {"rows": {}})):
        if label in found["rows"]:
            return found
    return None


def rate(record, step, label, batch="1", like=None):
    """Tokens a second of one row, in its own run or in the one that has the row `like`; None where it was not measured."""
    there = run(record, step, like or label)
    found = there["rows"].get(label, {}).get("batches", {}).get(batch) if there else None
    return found["tokens_per_s"] if found else None


def times_fp16(record, step, label, batch="1"):
    """Speed as a multiple of fp16 in the same loop and the same run."""
    return rate(record, step, label, batch) / rate(record, step, FP16, batch, like=label)


def rows(record):
    """[label, tensors in fewer bits, {step: [GB read a token, batch 1, batch 8, batch 32, share at batch 1, mark]}] of every way;
    the mark is "*" for a row of the earlier run."""
    found = []
    for label, row in record["ladder_7b"]["rows"].items():
        numbers = {}
        for step in SHAPES:
            if there := run(record, step, label):
                row = there["rows"][label]
                speeds = [rate(record, step, label, batch) for batch in ("1", "8", "32")]
                mark = "" if there is record[step] else "*"
                numbers[step] = [row["bytes"] / 1e9, *speeds, row["batches"]["1"]["share"], mark]
        found.append([label, row["quantized"], numbers])
    return found


def plot(record):
    """Tokens a second of each way over the batch, a panel a shape, as multiples of fp16 in the same loop: a matplotlib figure."""
    import matplotlib.pyplot as plt

    from helpers import figures

    figures.style()
    ways = {
        FP16: "fp16",
        FP8: "FP8",
        NF4: "NF4",
        TINYGEMM: "int4, tinygemm",
        MARLIN: "GPTQ, Marlin",
    }
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
    for ax, (step, shape) in zip(axes, SHAPES.items()):
        ends = []
        for color, (label, name) in zip(figures.PALETTE, ways.items()):
            batches = [batch for batch in ("1", "8", "32") if rate(record, step, label, batch)]
            gains = [times_fp16(record, step, label, batch) for batch in batches]
            ax.plot(range(len(batches)), gains, marker="o", color=color)
            ends.append((gains[-1], name, color))
        height = 0
        for gain_there, name, color in sorted(ends):
            height = max(gain_there, height + 0.1)  # keep names apart
            ax.text(2.1, height, name, color=color, va="center")
        ax.set(title=shape, xlabel="requests at once", xticks=range(3), xticklabels=["1", "8", "32"], xlim=(-0.2, 3.4))
    axes[0].set(ylabel="speed, fp16 = 1", ylim=(0, None))
    return fig


def alt(record):
    gains = {step: max(times_fp16(record, step, label) for label in (TINYGEMM, MARLIN)) for step in SHAPES}
    many = times_fp16(record, "ladder_7b", FP8, "32")
    return (f"Decode speed as a multiple of fp16 in the same loop, over 1, 8 and 32 requests. 7B shape: the best 4-bit kernel {gains['ladder_7b']:.2f} at one "
            f"request, FP8 {many:.2f} at 32. 1.5B model: the best 4-bit kernel {gains['ladder_1_5b']:.2f} at one request.")  # fmt: skip


def gain(record):
    """One sentence: what four bits give on the other card and on the smaller model."""
    seven, small = (max(times_fp16(record, step, label) for label in (TINYGEMM, MARLIN)) for step in SHAPES)
    device = record["ladder_7b"]["device"]
    return f"On one {device} it was {seven:.1f} times, and {small:.2f} times with a model of 1.5 billion parameters."


def section(record):
    """The section in Markdown."""
    seven, small, products = record["ladder_7b"], record["ladder_1_5b"], record["fp8_matmul"]
    best, fp16 = (seven["rows"][label]["batches"]["1"] for label in (MARLIN, FP16))
    kinds, least = best["profile"]["kinds"], seven["rows"][MARLIN]["bytes"] / seven["copy_bytes_per_s"]
    eight = seven["rows"][FP8]["batches"]["1"]
    one = small["rows"][FP16]["batches"]["1"]
    weights = small["rows"][FP16]["bytes"] / small["copy_bytes_per_s"]
    same = small["rows"][FP16]["batches"]["1"]["first_tokens_as_fp16"]
    lines = [
        f"## Two shapes in one run, on an {seven['device'].removeprefix('NVIDIA ')}",
        "",
        f"One {seven['device']}, {seven['date']}, torch {seven['versions']['torch']}; a copy moves {seven['copy_bytes_per_s'] / 1e12:.2f} TB/s. The 7B shape has random weights; "
        f"the 1.5B model is Qwen2.5-Coder, whose fp16 row gave transformers' first {same} greedy tokens. Prompt of 128 tokens, answer of 128.",
        "",
        f"![{alt(record)}]({PICTURE.name})",
        "",
        "| way of decoding | in fewer bits | 7B: GB a token | 1 request, tok/s | 8 | 32 | share of the limit at 1 | 1.5B: GB a token | 1 | 8 | 32 | share at 1 |",
        "|---" * 12 + "|",
    ]
    for label, tensors, numbers in rows(record):
        cells = []
        for step in SHAPES:
            size, *speeds, share, mark = numbers.get(step, [None] * 6)
            cells += [
                f"{size:.2f}{mark}" if size else "",
                *(f"{speed:,.0f}" if speed else "" for speed in speeds),
                f"{share:.0%}" if share else "",
            ]
        lines.append(f"| {label} | {tensors} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"**7B shape, one request:** Marlin is {times_fp16(record, 'ladder_7b', MARLIN):.2f} times as fast as fp16 in the same loop and reaches {best['share']:.0%} of its "
        f"limit. On the H100 above it was more: this card reads faster, and what is not reading stayed. Of a token's {1e3 * best['profile']['token_s']:.2f} ms, "
        f"{1e3 * least:.2f} ms are the weights at full bandwidth, {1e3 * (kinds['matrices'] - least):.2f} ms the matrix kernels beyond that, "
        f"{1e3 * (kinds['fused by torch.compile'] + kinds['attention'] + kinds['other']):.2f} ms norms, rotary, attention and gates, and "
        f"{1e3 * best['profile']['idle_s']:.2f} ms no kernel at all.",
        "",
        f"**1.5B model:** at one request four bits hardly pay. The best 4-bit row is {times_fp16(record, 'ladder_1_5b', TINYGEMM):.2f} times fp16, Marlin "
        f"{times_fp16(record, 'ladder_1_5b', MARLIN):.2f} and NF4 {times_fp16(record, 'ladder_1_5b', NF4):.2f} times. "
        f"Its fp16 weights take {1e3 * weights:.2f} ms of a token's {1e3 * one['profile']['token_s']:.2f} ms; the rest does not shrink with the weights. At 32 requests fp16 "
        f"leads: Marlin has {times_fp16(record, 'ladder_1_5b', MARLIN, '32'):.2f} of its speed, NF4 {times_fp16(record, 'ladder_1_5b', NF4, '32'):.2f}. "
        f"`LLM.int8()` and every eager row are slow: {rate(record, 'ladder_1_5b', INT8):.0f} tokens/s with 8 bits, where fp16 has {rate(record, 'ladder_1_5b', EAGER):.0f} in the same "
        "loop. On the 7B shape NF4 and fp16 lie inside each other's spread there.",
        "",
        "\\* From a run some hours earlier on another machine of this kind, where fp16, lean, gave "
        + ", ".join(f"{rate(record, 'ladder_1_5b', FP16, batch, like=FP8):,.0f}" for batch in ("1", "8", "32"))
        + " on the 1.5B model. Its multiples are taken within that run.",
        "",
        f"**FP8** with a scale a row is slower than fp16 at one request ({times_fp16(record, 'ladder_7b', FP8):.2f} times) and faster at 32 "
        f"({times_fp16(record, 'ladder_7b', FP8, '32'):.2f} times). At one request its matrix kernels take "
        f"{1e3 * eight['profile']['kinds']['matrices']:.2f} ms a token, fp16's {1e3 * fp16['profile']['kinds']['matrices']:.2f} ms, and it starts "
        f"{eight['profile']['kernels']:.0f} kernels instead of {fp16['profile']['kernels']:.0f}. Alone, the largest product of a layer is faster in FP8 even with one row (table "
        "below); why the loop's are not was not looked into.",
        "",
        "ExLlamaV2's kernels cannot be recorded in a CUDA graph as gptqmodel starts them, so its row has none.",
        "",
        "| rows x inner x columns | bf16, TFLOP/s | FP8, one scale | FP8, a scale a row | and activations rounded in time |",
        "|---|---|---|---|---|",
    ]
    for size, found in products.items():
        if isinstance(found, dict) and "bf16" in found:
            cells = [
                f"{found[kind]['tflop_per_s']:,.0f} ({found[kind]['times_bf16']:.2f} x)"
                for kind in ("tensor", "rows", "rows, activations rounded in time")
            ]
            lines.append(f"| {size} | {found['bf16']['tflop_per_s']:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
