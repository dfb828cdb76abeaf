"""What vLLM gave, as a section of this folder's README, a sentence of the main one and a picture; `summary.py` writes them."""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "serving.png"
BITS = {"bf16": 16, "fp8": 8, "gptq": 4, "awq": 4, "bitsandbytes": 4}
LARGER = ("bf16", "fp8", "gptq", "bitsandbytes")  # the rows of the 7B shape
FOUR = [name for name, bits in BITS.items() if bits == 4]
WITH = {"bf16": "bf16", "fp8": "bf16, as vLLM rounds at load", "gptq": "the same file", "awq": "the same file", "bitsandbytes": "NF4"}  # fmt: skip


def read(path=HERE / "serving.json"):
    return json.loads(path.read_text(encoding="utf-8"))


def times_bf16(record, name):
    """Tokens a second as a multiple of bf16's, {requests: factor}."""
    plain = record["bf16"]["requests"]
    return {n: row["tokens_per_s"] / plain[n]["tokens_per_s"] for n, row in record[name]["requests"].items()}


def factors_of(record, names):
    """The multiples of bf16 of several rows in words: "gptq 0.71, 0.70; awq 0.84, 0.82"."""
    each = {name: times_bf16(record, name).values() for name in names}
    return "; ".join(f"{name} {', '.join(f'{factor:.2f}' for factor in factors)}" for name, factors in each.items())


def speeds_of(row):
    """Cells of a table: tokens a second at each number of requests, then milliseconds to the first token at 1 and at 128."""
    requests = row["requests"]
    first = [f"{1e3 * requests[n]['first_token_s']:.1f}" for n in ("1", "128")]
    return [f"{found['tokens_per_s']:,.0f}" for found in requests.values()] + first


def kernels_of(row):
    return ", ".join(row["kernels"]) or "its log names none"


def gigabytes_of(row):
    return f"{row['weights_bytes'] / 1e9:.2f}"


def same(record, name):
    """How many prompts give transformers' tokens to the end."""
    compared = record[name]["transformers"]
    return sum(tokens == compared["of"] for tokens in compared["same_tokens"])


def gap(logits):
    return f"are {logits:g} apart" if logits else "tie"


def plot(record):
    """Tokens a second over the number of requests, as multiples of bf16, a line a format: a matplotlib figure."""
    import matplotlib.pyplot as plt

    from helpers import figures
    from helpers.publishing.pareto import COLORS

    figures.style()
    fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    markers = {"gptq": "^", "awq": "s", "bitsandbytes": "D"}
    requests = [str(n) for n in record["protocol"]["requests"]]
    for name, bits in BITS.items():
        factors = times_bf16(record, name)
        heights = [factors[n] for n in requests]
        ax.plot(range(len(requests)), heights, marker=markers.get(name, "o"), color=COLORS[bits])
        lift = {"awq": 2, "bitsandbytes": -4}.get(name, 0)  # their last points lie together
        place = {"xytext": (9, lift), "textcoords": "offset points", "va": "center", "color": COLORS[bits]}
        ax.annotate(
            f"{name}, {bits} bits" if name not in ("bf16", "fp8") else name, (len(requests) - 1, heights[-1]), **place
        )
    ax.set(xlabel="requests at once", ylabel="tokens/s, bf16 = 1 (higher is better)", ylim=(0, None), xlim=(-0.2, 4.1),
           xticks=range(len(requests)), xticklabels=requests)  # fmt: skip
    ax.set_title(
        "With 1.5B weights on an H200, no 4-bit format is as fast as bf16 in vLLM", fontsize="medium", x=0, ha="left"
    )
    return fig


def alt(record):
    factors = {name: times_bf16(record, name) for name in BITS}
    best = {n: max(factors[name][n] for name in FOUR) for n in factors["bf16"]}
    return ("Tokens a second in vLLM as a multiple of bf16, over 1, 8, 32 and 128 requests. The best 4-bit format stays under bf16: "
            + ", ".join(f"{factor:.2f}" for factor in best.values())
            + ". FP8: " + ", ".join(f"{factor:.2f}" for factor in factors["fp8"].values()) + ".")  # fmt: skip


def headline(record, larger):
    """The main README's sentences."""
    plain, fp8 = record["bf16"]["requests"], times_bf16(record, "fp8")
    best = [max(times_bf16(record, name)[n] for name in FOUR) for n in plain]
    return (f"Served by vLLM {record['versions']['vllm']} on one {record['device']}, the 1.5B model in bf16 gives {plain['1']['tokens_per_s']:,.0f} "
            f"tokens a second at one request and {plain['128']['tokens_per_s']:,.0f} at 128. FP8 gives {fp8['1']:.2f} and {fp8['128']:.2f} times that; "
            f"the best 4-bit format stays at {min(best):.2f} to {max(best):.2f} times bf16. {with_7b(larger)} "
            "[Formats, kernels, commands](notebooks/gpu/README.md#serving-with-vllm-on-an-h200).")  # fmt: skip


def with_7b(larger):
    """What four and eight bits gain with the larger model, a sentence."""
    gptq, fp8 = (times_bf16(larger, name) for name in ("gptq", "fp8"))
    return (f"With Mistral-7B's shape, GPTQ gives {gptq['1']:.2f} and {gptq['128']:.2f} times the tokens of bf16 at 1 and 128 requests, "
            f"FP8 {fp8['1']:.2f} and {fp8['128']:.2f}.")  # fmt: skip


def row(record, name):
    """One line of the table."""
    found = record[name]
    answers = f"{same(record, name)} of {len(found['transformers']['same_tokens'])} ({WITH[name]})"
    cells = [
        name,
        kernels_of(found),
        gigabytes_of(found),
        *speeds_of(found),
        f"{found['ready_s']:.0f}",
        answers,
    ]
    return "| " + " | ".join(cells) + " |"


def first_difference(record, name):
    """One line of the list of differences."""
    found = record[name]["transformers"]["differences"]
    one, gaps = found[0], [each["transformers_logit_gap"] for each in found]
    ours, theirs = (" ".join(one[side].split()) for side in ("vllm", "transformers"))
    return (f"- **{name}:** after {one['token']} equal token{'s' * (one['token'] > 1)} of the answer to \"{one['prompt'].strip()}\", vLLM goes on with `{ours}` and transformers "
            f"with `{theirs}`; transformers' two highest logits {gap(gaps[0])} there. Prompts that differ: {len(gaps)}; ties: {gaps.count(0)}; widest gap: {max(gaps):g}.")  # fmt: skip


def beside_lean(record):
    """The table of vLLM and the lean loop, answers without their prompts."""
    lines = ["| answers without their prompts | in fewer bits | 1 request, tok/s | 8 | 32 |", "|---" * 5 + "|"]
    for name, bits in BITS.items():
        speeds = [f"{record[name]['requests'][n]['decode_tokens_per_s']:,.0f}" for n in ("1", "8", "32")]
        lines.append(f"| vLLM, {name} | {'nothing' if bits == 16 else 'layers'} | " + " | ".join(speeds) + " |")
    for label, found in record["lean"].items():
        speeds = [f"{found['requests'][n]['tokens_per_s']:,.0f}" for n in ("1", "8", "32")]
        lines.append(
            f"| lean loop: {label.removesuffix(', lean')} | {found['quantized']} | " + " | ".join(speeds) + " |"
        )
    return lines


def findings(record):
    """What the tables say, a paragraph each."""
    factors = {name: times_bf16(record, name) for name in BITS}
    ahead = [n for n, factor in factors["fp8"].items() if factor > 1]
    behind = [n for n, factor in factors["fp8"].items() if factor <= 1]
    said = {n: f"{factor - 1:+.0%}" for n, factor in factors["fp8"].items()}
    plain, gigabytes = record["bf16"], {name: record[name]["weights_bytes"] / 1e9 for name in BITS}
    small = min(FOUR, key=gigabytes.get)
    more = record[small]["cache_tokens"] / plain["cache_tokens"] - 1
    lean = [found["requests"] for found in record["lean"].values()]
    tiny, marlin = ({n: row[n]["tokens_per_s"] / lean[0][n]["tokens_per_s"] for n in lean[0]} for row in lean[1:])
    gptq, awq = (record["checkpoints"][name] for name in ("gptq", "awq"))
    return [
        f"**Four bits are slower than bf16 here, at every number of requests.** As multiples of bf16 at {', '.join(factors['bf16'])} requests: {factors_of(record, FOUR)}. "
        "The model is small for this GPU: reading its 16-bit weights takes less than half of a token's time (section above), and four bits shorten only that part. Why "
        "they lose was not looked into. GPTQ's file orders columns by activation (`desc_act`), AWQ's does not. A slower memory was not tried; a larger model is below.",
        f"**FP8** is ahead of bf16 at {' and '.join(ahead)} requests ({', '.join(said[n] for n in ahead)}) and behind at {' and '.join(behind)} "
        f"({', '.join(said[n] for n in behind)}). vLLM rounds weights and activations to FP8, one scale a tensor of weights.",
        f"**bitsandbytes** loses most in between: {factors['bitsandbytes']['8']:.2f} times bf16 at 8 requests, {factors['bitsandbytes']['32']:.2f} at 32.",
        f"**Fewer bits do save memory.** Loading takes {gigabytes['bf16']:.2f} GB in bf16, {gigabytes['fp8']:.2f} in FP8 and {gigabytes['gptq']:.2f} to "
        f"{gigabytes['bitsandbytes']:.2f} with four bits: embedding and head stay in 16 bits. With a fifth of the GPU's memory given to vLLM, the cache then holds "
        f"{record[small]['cache_tokens']:,} tokens instead of {plain['cache_tokens']:,} ({more:+.0%}).",
        f"**Beside the lean loop** ([lean_decode.py](lean_decode.py), same machine and session): in fp16 it is at {lean[0]['1']['tokens_per_s'] / plain['requests']['1']['decode_tokens_per_s']:.2f} times "
        f"vLLM's bf16 at one request, {lean[0]['8']['tokens_per_s'] / plain['requests']['8']['decode_tokens_per_s']:.2f} at 8, "
        f"{lean[0]['32']['tokens_per_s'] / plain['requests']['32']['decode_tokens_per_s']:.2f} at 32. Its 4-bit rows, head included, reach {tiny['1']:.2f} (tinygemm) and "
        f"{marlin['1']:.2f} (Marlin) times its fp16 at one request, {tiny['8']:.2f} and {marlin['8']:.2f} at 8, {tiny['32']:.2f} and {marlin['32']:.2f} at 32. The loop has a "
        "cache of fixed length and no scheduler; all its requests start and end together.",
        f"**Quality of the two files**, KL on the course's {gptq['eval_tokens']:,} tokens: GPTQ on the symmetric grid {gptq['kl_divergence']:.4f} [{gptq['low']:.4f}, {gptq['high']:.4f}], "
        f"same top token {gptq['same_top1']:.1%}; gptqmodel's AWQ {awq['kl_divergence']:.4f} [{awq['low']:.4f}, {awq['high']:.4f}], {awq['same_top1']:.1%}.",
    ]  # fmt: skip


def larger_model(record):
    """The section of the 7B shape."""
    requests, made = [*record["bf16"]["requests"]], record["checkpoints"]["gptq"]
    lines = [
        "| 7B shape | kernel that vLLM picked | weights, GB | 1 request, tok/s | 8 | 32 | 128 | first token at 1, ms | at 128, ms |",
        "|---" * 9 + "|",
    ]
    for name in LARGER:
        found = record[name]
        lines.append("| " + " | ".join([name, kernels_of(found), gigabytes_of(found), *speeds_of(found)]) + " |")
    return [
        "### With Mistral-7B's shape",
        "",
        f"The same engine, one {record['device']}, {record['date']}, driver {record['driver']}; random weights, so no answers are compared. {record['beside']} "
        "All of it comes from [serving_7b.json](serving_7b.json).",
        "",
        *lines,
        "",
        f"**Here fewer bits pay.** As multiples of bf16 at {', '.join(requests)} requests: {factors_of(record, LARGER[1:])}. With a larger model the weights are a larger part of a token's time. "
        f"GPTQ gains at up to 32 requests; at 128 it is level with bf16. FP8 is ahead of GPTQ at each number of requests, with {record['fp8']['weights_bytes'] / 1e9:.1f} GB of weights instead of "
        f"{record['gptq']['weights_bytes'] / 1e9:.1f}. bitsandbytes is behind bf16 at each. bf16 was served on another machine of this kind as well (two GPUs, below), and the two runs differ by less than 2 %. The GPTQ file has groups of {made['group_size']}, a symmetric grid and no `desc_act`; the 1.5B "
        "model's has `desc_act`, so the two differ in more than size.",
        "",
        "```bash",
        made["made_by"] + "   # saves the folder GPTQ as reference-gptq in the course's cache; copy MODEL's tokenizer into it",
        record["command"],
        "```",
        "",
    ]  # fmt: skip


def side_by_side(record):
    """vLLM, the lean loop and compiled `generate` of transformers on one machine, in 16 bits and 4."""
    served, compiled = record["vllm"]["bf16"]["requests"], record["generate"]
    whole = {n: served[n]["tokens_per_s"] for n in compiled}
    lines = ["| one machine, one session | in fewer bits | 1 request, tok/s | 8 | 32 |", "|---" * 5 + "|"]

    def line(label, bits, speeds):
        lines.append(f"| {label} | {bits} | " + " | ".join(f"{speed:,.0f}" for speed in speeds) + " |")

    line("vLLM, bf16", "nothing", whole.values())
    line("compiled `generate`, static cache, fp16", "nothing", [compiled[n]["tokens_per_s"] for n in whole])
    line("vLLM, bf16, without the prompts", "nothing", [served[n]["decode_tokens_per_s"] for n in whole])
    for label, found in record["lean"].items():
        speeds = [found["requests"][n]["tokens_per_s"] for n in whole]
        line(f"lean loop: {label.removesuffix(', lean')}, without the prompts", found["quantized"], speeds)
    times = [whole[n] / compiled[n]["tokens_per_s"] for n in whole]
    token = compiled["1"]["profile"]
    return [
        "### vLLM, the lean loop and compiled `generate`",
        "",
        f"The 1.5B model once more, all three on one {record['device']}, {record['date']}. {record['beside']} All of it comes from [side_by_side.json](side_by_side.json).",
        "",
        *lines,
        "",
        f"vLLM has {', '.join(f'{factor:.1f}' for factor in times)} times the tokens of compiled `generate` at {', '.join(whole)} requests. At one request no kernel runs during "
        f"{1e3 * token['idle_s']:.1f} of `generate`'s {1e3 * token['token_s']:.1f} ms a token: its loop over the tokens is Python's. The lean loop replays a whole token as one CUDA graph.",
        "",
        "```bash",
        *record["commands"],
        "```",
        "",
    ]  # fmt: skip


COMMANDS = """```bash
python -m venv serving && serving/bin/pip install -r notebooks/gpu/requirements-serving.txt
# in the course's own environment: the checkpoints
python notebooks/gpu/symmetric_gptq.py --model qwen2.5-coder-1.5b-offline --group-size 128 --output GPTQ
python -m helpers run --only 06 --model qwen2.5-coder-1.5b-offline -p group_size=128      # AWQ
python -m helpers run --only 05 --model smollm2-offline                                   # SMOLLM2_GPTQ
# with serving/bin/python
{command}
```"""


def section(record, larger, beside):
    """The section in Markdown. larger: serving_7b.json, beside: side_by_side.json."""
    versions, protocol = record["versions"], record["protocol"]
    reasons = record["refused, said to be symmetric"]["reasons"]
    lines = [
        "## Serving with vLLM on an H200",
        "",
        f"vLLM {versions['vllm']} served Qwen2.5-Coder-1.5B-Instruct (`{record['model']}`) on one {record['device']}, {record['date']}, torch {versions['torch']}, "
        f"CUDA {versions['cuda']}, driver {record['driver']}. Each request has a prompt of {protocol['prompt_tokens']} tokens and an answer of "
        f"{protocol['new_tokens']}. The figures are medians of {protocol['runs']} runs; their spread was not kept, so differences of a few percent are not sure. "
        "Nothing else ran on the machine. All of it comes from [serving.json](serving.json); [serve.py](serve.py) repeats it.",
        "",
        f"![{alt(record)}]({PICTURE.name})",
        "",
        "| format | kernel that vLLM picked | weights, GB | 1 request, tok/s | 8 | 32 | 128 | first token at 1, ms | at 128, ms | seconds until ready | "
        f"prompts with transformers' {protocol['greedy_tokens']} tokens |",
        "|---" * 11 + "|",
        *(row(record, name) for name in BITS),
        "",
        "Tokens a second count the answers over the whole time, prompts included. Weights are what vLLM's log says that loading took. Seconds until ready "
        "include the import of vLLM (17 to 21 s) and its compilation. FP8 and bitsandbytes were rounded by vLLM at load.",
        "",
        *beside_lean(record),
        "",
        *(line for paragraph in findings(record) for line in (paragraph, "")),
        "**The same answers?** Eight prompts, greedy. transformers answered on the same machine beside other work, so the comparison is of tokens, not of speed. "
        "It multiplies AWQ in float16, because its kernel takes no bfloat16. The first differences:",
        "",
        *(first_difference(record, name) for name in BITS),
        "",
        "A bfloat16 between 8 and 16 has steps of 0.0625, one between 16 and 32 steps of 0.125; a float16 there has steps of 0.0156. So most of these gaps are a tie or one step wide; how large the logits are "
        "was not kept. FP8 stands beside transformers' bf16, so its differences hold the rounding too.",
        "",
        "**Refused.** One checkpoint was not served, for two reasons:",
        "",
        "- SmolLM2's GPTQ as notebook 05 writes it: `Unsupported quantization config: bits=4, sym=False`. vLLM's GPTQ takes symmetric grids only, without a zero point.",
        "- The same file, labelled as symmetric to get past that message: SmolLM2's rows have 576 columns. Marlin wants a multiple of 128 columns, Machete wants "
        "output features that 128 divides, and the other kernels name other reasons ("
        f"{len(reasons)} in all, in the file). No kernel was left.",
        "",
        "**Commands.** The versions are those of `requirements-serving.txt`. The machine had no internet, so the packages came from a folder; pip did not install that file there. "
        "The names in capitals are folders. `--no-compare` leaves transformers out; without it, the program compares the answers itself.",
        "",
        COMMANDS.format(command=record["command"].replace("python", "serving/bin/python", 1)),
        "",
        *larger_model(larger),
        *side_by_side(beside)[:-1],
    ]
    return "\n".join(lines)
