"""How far AutoRound's result depends on its calibration rows: one JSON line a setting, for notebook 10.

    python notebooks/below_four_bits/autoround_study.py --out study.jsonl [--model smollm2-offline] [--group-size 64] [--only 0,3,5]

Each setting quantizes the whole model to 3 bits with the package and scores it on the four genres, as notebook 10 does. `start`
says how the rows begin: "first" gives every row the model's first token, "anywhere" cuts each row out of the middle of its text.
All rows are 85 tokens long. `first_token` is what tuning left of the residual stream's length at the first position of a window
(1: all of it), the smallest and the largest over the windows. A setting that is in the file already is left out, so a run that was
ended can be taken up again.
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import evaluation, memory, models
from helpers.records import device_name

LENGTH = 85
SETTINGS = [
    {"start": start, "sample": sample, "rows": rows, "steps": steps}
    for rows, steps, sample in (
        (32, 20, 0), (32, 20, 1), (128, 20, 0), (128, 20, 1), (32, 60, 0), (128, 60, 0), (32, 20, 2), (128, 200, 0),
    )
    for start in ("first", "anywhere")
]  # fmt: skip


@torch.no_grad()
def own_text(net, tokenizer, samples: int, length: int, seed: int):
    """Token ids that the model samples from its first token on, int64 [samples, length]."""
    start = tokenizer.bos_token_id or net.config.bos_token_id or tokenizer.convert_tokens_to_ids("<|endoftext|>")
    torch.manual_seed(seed)
    first = torch.full((samples, 1), start, device=net.device)
    ids = net.generate(
        first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        repetition_penalty=1.0, min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=start,
    )  # fmt: skip
    return ids.cpu()


def cut(rows, start: str):
    """Rows of LENGTH tokens: from the first token on, or from another place in each."""
    if start == "first":
        return rows[:, :LENGTH].contiguous()
    places = [1 + 37 * number % (rows.shape[1] - LENGTH) for number in range(len(rows))]
    return torch.stack([row[place : place + LENGTH] for row, place in zip(rows, places)])


def tune(found, tokenizer, rows, steps: int, group_size: int):
    """The model as the package leaves it: plain Linear layers with the restored weights."""
    from auto_round import AutoRound

    net = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.fast).to(found.device).eval()
    tuner = AutoRound(
        net, tokenizer=tokenizer, bits=3, group_size=group_size, sym=False, iters=steps, dataset=list(rows.split(1)),
        nsamples=len(rows), seqlen=LENGTH, batch_size=8, enable_torch_compile=False, device_map=found.device,
    )  # fmt: skip
    return tuner.quantize()[0].to(found.device, found.fast)


@torch.inference_mode()
def first_lengths(net, windows):
    """Length of the residual stream at the middle layer and the first position, float32 [windows]."""
    ids = windows[:, :1].to(net.device)
    states = net.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    return states[len(states) // 2][:, 0].float().norm(dim=-1).cpu()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-offline")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--only", default="", help="numbers of settings, with commas")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    found = models.find(asked.model)
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    windows = evaluation.windows(tokenizer, tokens=4096)
    reference = evaluation.reference(found, windows)
    net = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.fast).to(found.device).eval()
    text = functools.cache(lambda sample: own_text(net, tokenizer, 128, 128, sample))
    lengths = first_lengths(net, windows)
    done = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []
    done = [{key: row[key] for key in SETTINGS[0]} for row in done]
    chosen = [int(number) for number in asked.only.split(",") if number] or range(len(SETTINGS))
    for setting in (SETTINGS[number] for number in chosen):
        if setting in done:
            continue
        rows, started = cut(text(setting["sample"])[: setting["rows"]], setting["start"]), time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            gc.freeze()  # the package collects garbage several times a layer: leave out what is here already
            tuned = tune(found, tokenizer, rows, setting["steps"], asked.group_size)
            gc.unfreeze()
        seconds = time.perf_counter() - started
        scores = evaluation.score(tuned, windows, reference)
        facts = {"model": found.name, "device": device_name(found.device), "group_size": asked.group_size, **setting}
        facts |= {"kl": scores.kl_divergence, "low": scores.kl_low, "high": scores.kl_high, "seconds": round(seconds)}
        facts |= {"best_window": scores.kl_by_window.min(), "worst_window": scores.kl_by_window.max()}
        left = first_lengths(tuned, windows) / lengths
        facts |= {"first_token": [round(left.min().item(), 3), round(left.max().item(), 3)]}
        with asked.out.open("a") as file:
            file.write(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in facts.items()}) + "\n")
        print(facts, flush=True)
        del tuned
        memory.release()


if __name__ == "__main__":
    main()
