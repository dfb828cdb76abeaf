"""What reference.json and serving.json say, as rows, as a picture, as this folder's tables and README's lines: `python notebooks/gpu/summary.py` writes them."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import ladders  # noqa: E402
import serving  # noqa: E402
import two_gpus  # noqa: E402

PICTURE = HERE / "decode.png"
CARDS = {"RTX A5000": 24 * 10**9, "T4": 16 * 10**9}  # a gigabyte is 10^9 bytes: a little less than the cards hold
LADDER = (  # label, step of reference.py, variant
    ("fp16, eager", "decode_fp16", "eager"),
    ("int4 (torchao), eager", "decode_int4", "eager"),
    ("fp16, a CUDA graph of eager kernels", "decode_fp16", "graph"),
    ("fp16, compiled `generate`, static cache", "generate_fp16", None),
    ("fp16, lean", "decode_fp16", "lean"),
    ("fp16, lean, products tuned by torch.compile", "decode_fp16", "lean, tuned products"),
    ("NF4 (bitsandbytes), lean", "decode_nf4", "lean"),
    ("int4 (torchao, tinygemm), lean", "decode_int4", "lean"),
    ("GPTQ format (gptqmodel, Marlin), lean", "decode_marlin", "lean"),
)


def read(path=HERE / "reference.json"):
    return json.loads(path.read_text(encoding="utf-8"))


def ladder(record):
    """Each way of decoding: tokens a second at batch 1 and 8, the weight bytes a token reads, and what bandwidth alone allows."""
    rate = record["bandwidth"]["copy_bytes_per_s"]
    rows = []
    for label, step, variant in LADDER:
        found = record[step][variant] if variant else record[step]
        weights = record.get(step, {}).get("bytes") or record["decode_fp16"]["bytes"]
        one, eight = found["1"], found.get("8", {})
        rows.append({"what": label, "bytes": weights, "batch 1": one["tokens_per_s"], "batch 8": eight.get("tokens_per_s"),
                     "limit": rate / weights, "share": one["tokens_per_s"] * weights / rate, "prefill_s": one.get("prefill_s"),
                     "profile": one.get("profile")})  # fmt: skip
    return rows


def budget(record):
    """Peak bytes of each thing done with the 7B shape, largest first: [(what, bytes)]."""
    rows = []
    for name, row in record["memory"].items():
        rows += [
            (f"{name}: load", row["loading_peak_bytes"]),
            (f"{name}: answer 512 + 32 tokens", row["answering_peak_bytes"]),
        ]
    rows += [(f"QLoRA step of {tokens} tokens", record["qlora"][tokens]["peak_bytes"]) for tokens in ("512", "2048")]
    for step, name in (
        ("gptq", "GPTQ of 32 x 512 tokens"),
        ("autoawq", "AWQ (autoawq)"),
        ("auto_gptq", "GPTQ (auto-gptq)"),
    ):
        if "peak_bytes" in record.get(step, {}):
            where = f", on an {record[step]['device']}" if "device" in record[step] else ""
            if record[step].get("layers", 32) != 32:
                where = f", {record[step]['layers']} of 32 layers{where}"
            rows.append((name + where, record[step]["peak_bytes"]))
            if "answering_peak_bytes" in record[step]:
                rows.append((f"{name}: load and answer{where}", record[step]["answering_peak_bytes"]))
    return sorted(rows, key=lambda row: -row[1])


def gap(record, label=LADDER[-1][0]):
    """Where the time of a token goes beyond what its bytes need, as {part: seconds}; the parts add up to the profiled token."""
    row = next(row for row in ladder(record) if row["what"] == label)
    profile, kinds = row["profile"], row["profile"]["kinds"]
    needed = row["bytes"] / record["bandwidth"]["copy_bytes_per_s"]
    return {
        "the weights at full bandwidth": needed,
        "the matrix kernels beyond that": kinds["matrices"] - needed,
        "norms, rotary, attention, gates": kinds["fused by torch.compile"] + kinds["attention"] + kinds["other"],
        "no kernel running": profile["idle_s"],
    }


def plot(record):
    """Bars of tokens a second at batch 1, each with a mark at its own bandwidth limit: a matplotlib figure."""
    import matplotlib.pyplot as plt

    from helpers import figures
    from helpers.publishing.pareto import COLORS

    figures.style()
    rows = ladder(record)[::-1]
    speed = {row["what"]: row["batch 1"] for row in rows}
    fig, ax = plt.subplots(figsize=(8, 3.8))
    four_bit = [row["bytes"] < 5e9 for row in rows]
    ax.barh([row["what"].replace("`", "") for row in rows], [row["batch 1"] for row in rows],
            color=[COLORS[4 if small else 16] for small in four_bit])  # fmt: skip
    for y, row in enumerate(rows):
        ax.plot([row["limit"]] * 2, [y - 0.4, y + 0.4], color="black", lw=2)
        inside = row["batch 1"] > 60  # a number beside a long bar could run into the black mark
        ax.annotate(f"{row['batch 1']:.0f}", (row["batch 1"], y), (-4 if inside else 4, 0), textcoords="offset points", va="center",
                    ha="right" if inside else "left", color="white" if inside else "black")  # fmt: skip
    ax.set(xlabel="tokens a second at batch 1; black: what the weights' bytes allow at this GPU's bandwidth")
    ratio = speed[LADDER[-1][0]] / speed["fp16, lean"]
    ax.set_title(
        f"In the lean loop 4 bits (orange) decode {ratio:.1f} times as fast as 16 bits (green)",
        fontsize="medium",
        x=0,
        ha="left",
    )
    ax.grid(axis="y", visible=False)
    return fig


def alt(record):
    rows = {row["what"]: row for row in ladder(record)}
    first, fp16, best = rows[LADDER[0][0]], rows["fp16, lean"], rows[LADDER[-1][0]]
    return (f"Decode speed of a 7B shape on one {record['device']}: from {first['batch 1']:.0f} tokens a second (fp16, eager) over "
            f"{fp16['batch 1']:.0f} (fp16, lean) to {best['batch 1']:.0f} (4 bits, Marlin, lean), which is {best['share']:.0%} of what "
            "its bytes allow.")  # fmt: skip


def section(record):
    """The section of this folder's README, in Markdown: every row."""
    rows, parts = ladder(record), gap(record)
    fp16 = next(row for row in rows if row["what"] == "fp16, lean")
    compiled = next(row for row in rows if row["what"].startswith("fp16, compiled"))
    best, versions, cache = rows[-1], record["versions"], record["decode_nf4"].get("cache_tokens")
    lines = [
        "## Speed and memory on a GPU",
        "",
        f"Mistral-7B's shape with random weights on one {record['device']} (driver {record['driver']}, torch {versions['torch']}, CUDA "
        f"{versions['cuda']}), {record['date']}. Absolute times move with the machine; the ratios are the point. All of it comes from "
        "[reference.json](reference.json); [reference.py](reference.py) repeats it.",
        "",
        f"![{alt(record)}]({PICTURE.name})",
        "",
        "| way of decoding | weights read a token | batch 1, tok/s | share of the bandwidth limit | batch 8, tok/s | prompt of "
        f"{record['protocol']['prompt_tokens']}, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        eight = f"{row['batch 8']:.0f}" if row["batch 8"] else ""
        prompt = f"{1e3 * row['prefill_s']:.0f}" if row["prefill_s"] else ""
        lines.append(
            f"| {row['what']} | {row['bytes'] / 1e9:.2f} GB | {row['batch 1']:.0f} | {row['share']:.0%} | {eight} | {prompt} |"
        )
    lines += [
        "",
        f"Four bits are {best['batch 1'] / fp16['batch 1']:.1f} times as fast as fp16 in the same lean loop, and "
        f"{best['batch 1'] / compiled['batch 1']:.1f} times as fast as compiled `generate`. In eager mode they are at "
        f"{rows[1]['share']:.0%} of what their bytes allow: there a token's time is Python's, not the weights'. The lean loop ([lean_decode.py](lean_decode.py)) keeps "
        "positions and cache in fixed tensors, lets torch.compile fuse what lies between the matrices, and replays each token as one CUDA "
        f"graph. Of a token's {1e3 * sum(parts.values()):.2f} ms there, "
        + ", ".join(f"{1e3 * value:.2f} ms are {name}" for name, value in parts.items())
        + ". At batch 8 the kernels of tinygemm and bitsandbytes, made for one row, lose their lead; Marlin keeps it."
        + (f" (NF4: with a cache of {cache} tokens instead of {record['protocol']['cache_tokens']}.)" if cache else ""),
        "",
        "| peak of GPU memory | GB | "
        + " | ".join(f"fits {size // 10**9} GB ({card})" for card, size in CARDS.items())
        + " |",
        "|---|---|" + "---|" * len(CARDS),
    ]
    for name, peak in budget(record):
        lines.append(
            f"| {name} | {peak / 1e9:.2f} | "
            + " | ".join("yes" if fits(record, peak, size) else "no" for size in CARDS.values())
            + " |"
        )
    lines += [
        "",
        'All of it ran with torch held to 16 GB, fp16 to 24 GB. QLoRA: r=16 on q and v, checkpointing, paged 8-bit AdamW. "Fits" adds '
        f"the driver's context ({record['bandwidth']['context_bytes'] / 1e9:.2f} GB here) to the peak. GPTQ took {record['gptq']['seconds']:.0f} s.",
        "",
        *([said, ""] if (said := quality()) else []),
        "A cap makes your card a smaller one:",
        "",
        "```bash",
        "python -m helpers run --cap 24GB           # every notebook, as if the GPU had 24 GB",
        "```",
    ]
    return "\n".join(lines)


def headline(record):
    """README's lines, in Markdown: the picture, what it says, and where all rows stand."""
    rows = {row["what"]: row for row in ladder(record)}
    fp16, eager, best = rows["fp16, lean"], rows["int4 (torchao), eager"], rows[LADDER[-1][0]]
    peaks = dict(budget(record))
    nf4, step = (
        peaks[name] / 1e9 for name in ("nf4, double quantization: answer 512 + 32 tokens", "QLoRA step of 2048 tokens")
    )
    return "\n".join(
        [
            f"![{alt(record)}](notebooks/gpu/{PICTURE.name})",
            "",
            f"Measured on one {record['device']} with Mistral-7B's shape and random weights, {record['date']}. Four bits decode "
            f"{best['batch 1'] / fp16['batch 1']:.1f} times as fast as fp16 in the same lean loop. In eager mode they reach {eager['share']:.0%} of what "
            f"their bytes allow. {ladders.gain(record)} An answer of 512 + 32 tokens in NF4 took {nf4:.2f} GB at its peak, a QLoRA step of 2,048 tokens {step:.2f} GB. "
            "[All rows](notebooks/gpu/README.md#speed-and-memory-on-a-gpu).",
        ]
    )


COMPARED = ("nf4", "gptq", "autogptq", "awq", "autoawq", "rtn-int4")
APART = 0.02  # share by which a KL divergence may differ between CPU and GPU before it needs an explanation


def both():
    """[(method, its record on a GPU, its record on the CPU)]: what the notebooks measured on both, with one model and one text.

    Empty where no model has been measured on both.
    """
    from helpers.publishing import reference

    every = reference.read()
    pairs = [(gpu, cpu) for gpu in every for cpu in every if cpu.on_cpu and not gpu.on_cpu and gpu.model == cpu.model]
    return [
        (name, gpu.records[name], cpu.records[name])
        for gpu, cpu in pairs[:1]
        for name in COMPARED
        if name in gpu.records and name in cpu.records
    ]


def quality():
    """README's paragraph on quality; None where no model has been measured on a GPU and on a CPU."""
    rows = both()
    if not rows:
        return None
    _, gpu, cpu = rows[0]
    said = [f"{gpu['kl_divergence']:.4f} for {name} (CPU {cpu['kl_divergence']:.4f})" for name, gpu, cpu in rows]
    far = [name for name, gpu, cpu in rows if abs(gpu["kl_divergence"] / cpu["kl_divergence"] - 1) > APART]
    text = (f"Quality: the notebooks themselves ran on an {gpu['device']} with {gpu['model'].split()[0]} and the CPU's {cpu['eval_tokens']:,} tokens of "
            f"text. KL divergence: {', '.join(said)}.")  # fmt: skip
    return text + (
        f" More than {APART:.0%} apart: {', '.join(far)}; [what is known of it](notebooks/gpu/README.md)."
        if far
        else ""
    )


def fits(record, peak, size):
    return peak + record["bandwidth"]["context_bytes"] <= size


def main():

    from helpers import figures, files
    from helpers.publishing import pages

    record = read()
    PICTURE.write_bytes(figures.to_png(plot(record)))
    ladders.PICTURE.write_bytes(figures.to_png(ladders.plot(record)))
    served, larger, beside = (serving.read(HERE / f"{name}.json") for name in ("serving", "serving_7b", "side_by_side"))
    serving.PICTURE.write_bytes(figures.to_png(serving.plot(served)))
    parts = (
        (ROOT / "README.md", "gpu", headline(record)),
        (ROOT / "README.md", "serving", serving.headline(served, larger)),
        (HERE / "README.md", "gpu", section(record)),
        (HERE / "README.md", "ladders", ladders.section(record)),
        (HERE / "README.md", "serving", serving.section(served, larger, beside)),
        (HERE / "README.md", "two", two_gpus.section(two_gpus.read(), served, beside)),
    )
    for readme, part, text in parts:
        files.write_text(readme, pages.replace_part(readme.read_text(encoding="utf-8"), part, text))


if __name__ == "__main__":
    main()
