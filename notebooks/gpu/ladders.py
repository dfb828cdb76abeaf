"""Decoding in two shapes and FP8 products, as one section of this folder's README and a picture; `summary.py` writes both."""

from pathlib import Path

PICTURE = Path(__file__).resolve().parent / "ladders.png"
SHAPES = {"ladder_7b": "7B shape", "ladder_1_5b": "1.5B model"}
FP16, MARLIN, TINYGEMM = "fp16, lean", "GPTQ format (gptqmodel, Marlin), lean", "int4 (torchao, tinygemm), lean"
FP8 = "FP8 (torch._scaled_mm, rows), lean"


def rate(record, step, label, batch="1"):
    """Tokens a second of one row; None where it was not measured."""
    found = record[step]["rows"].get(label, {}).get("batches", {}).get(batch)
    return found["tokens_per_s"] if found else None


def rows(record):
    """[label, tensors in fewer bits, {step: [GB read a token, batch 1, batch 8, batch 32, share at batch 1]}] of every way."""
    found = []
    for label, row in record["ladder_7b"]["rows"].items():
        numbers = {}
        for step in SHAPES:
            there = record[step]["rows"].get(label)
            if there:
                speeds = [rate(record, step, label, batch) for batch in ("1", "8", "32")]
                numbers[step] = [there["bytes"] / 1e9, *speeds, there["batches"]["1"]["share"]]
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
        "NF4 (bitsandbytes), lean": "NF4",
        TINYGEMM: "int4, tinygemm",
        MARLIN: "GPTQ, Marlin",
    }
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
    for ax, (step, shape) in zip(axes, SHAPES.items()):
        for color, (label, name) in zip(figures.PALETTE, ways.items()):
            batches = [batch for batch in ("1", "8", "32") if rate(record, step, label, batch)]
            if not batches:
                continue
            gains = [rate(record, step, label, batch) / rate(record, step, FP16, batch) for batch in batches]
            ax.plot(range(len(batches)), gains, marker="o", color=color)
            lift = {"NF4": 6, "int4, tinygemm": -6}.get(name, 0)  # their last points lie together
            place = {"xytext": (6, lift), "textcoords": "offset points", "va": "center", "color": color}
            ax.annotate(name, (len(batches) - 1, gains[-1]), **place)
        ax.set(title=shape, xlabel="requests at once", xticks=range(3), xticklabels=["1", "8", "32"], xlim=(-0.2, 3.4))
    axes[0].set(ylabel="speed, fp16 = 1", ylim=(0, None))
    return fig


def alt(record):
    gains = {step: max(rate(record, step, label) for label in (TINYGEMM, MARLIN) if rate(record, step, label))
             / rate(record, step, FP16) for step in SHAPES}  # fmt: skip
    many = rate(record, "ladder_7b", FP8, "32") / rate(record, "ladder_7b", FP16, "32")
    return (f"Decode speed as a multiple of fp16 in the same loop, over 1, 8 and 32 requests. 7B shape: the best 4-bit kernel {gains['ladder_7b']:.2f} at one "
            f"request, FP8 {many:.2f} at 32. 1.5B model: the best 4-bit kernel {gains['ladder_1_5b']:.2f} at one request.")  # fmt: skip


def gain(record):
    """One sentence: what four bits give on the other card and on the smaller model."""
    seven, small = (
        max(rate(record, step, label) or 0 for label in (TINYGEMM, MARLIN)) / rate(record, step, FP16)
        for step in SHAPES
    )
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
            size, *speeds, share = numbers.get(step, [None] * 5)
            cells += [
                f"{size:.2f}" if size else "",
                *(f"{speed:,.0f}" if speed else "" for speed in speeds),
                f"{share:.0%}" if share else "",
            ]
        lines.append(f"| {label} | {tensors} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"**7B shape, one request:** Marlin is {best['tokens_per_s'] / fp16['tokens_per_s']:.2f} times as fast as fp16 in the same loop and reaches {best['share']:.0%} of its "
        f"limit. On the H100 above it was more: this card reads faster, and what is not reading stayed. Of a token's {1e3 * best['profile']['token_s']:.2f} ms, "
        f"{1e3 * least:.2f} ms are the weights at full bandwidth, {1e3 * (kinds['matrices'] - least):.2f} ms the matrix kernels beyond that, "
        f"{1e3 * (kinds['fused by torch.compile'] + kinds['attention'] + kinds['other']):.2f} ms norms, rotary, attention and gates, and "
        f"{1e3 * best['profile']['idle_s']:.2f} ms no kernel at all.",
        "",
        f"**1.5B model, one request:** four bits hardly pay. The best 4-bit row is {rate(record, 'ladder_1_5b', TINYGEMM) / one['tokens_per_s']:.2f} times fp16, NF4 is no faster. "
        f"Its fp16 weights take {1e3 * weights:.2f} ms of a token's {1e3 * one['profile']['token_s']:.2f} ms; the rest does not shrink with the weights. "
        "In eager mode every row of both shapes is slow. On the 7B shape NF4 and fp16 lie inside each other's spread there; on the 1.5B model NF4 is the slower one.",
        "",
        f"**FP8** with a scale a row is slower than fp16 at one request ({rate(record, 'ladder_7b', FP8) / fp16['tokens_per_s']:.2f} times) and faster at 32 "
        f"({rate(record, 'ladder_7b', FP8, '32') / rate(record, 'ladder_7b', FP16, '32'):.2f} times). At one request its matrix kernels take "
        f"{1e3 * eight['profile']['kinds']['matrices']:.2f} ms a token, fp16's {1e3 * fp16['profile']['kinds']['matrices']:.2f} ms, and it starts "
        f"{eight['profile']['kernels']:.0f} kernels instead of {fp16['profile']['kernels']:.0f}. Alone, the largest product of a layer is faster in FP8 even with one row (table "
        "below); why the loop's are not was not looked into.",
        "",
        f"Not run, because device time was used up, on the 1.5B model: {', '.join(small['not_run'])}. ExLlamaV2's kernels cannot be recorded in a CUDA graph as gptqmodel starts "
        "them, so its row has none.",
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
