"""Quantize with GPTQ as notebook 05 does with gptqmodel, but on a symmetric grid, which is the one that vLLM takes.

    python notebooks/gpu/symmetric_gptq.py --model qwen2.5-coder-1.5b-offline --group-size 128 --output GPTQ

The text is the model's own, as in 05: 32 samples of 256 tokens. The rest of 05's settings stays: `desc_act`, damping 0.05. The
folder is what serve.py takes as --gptq.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from helpers import process

process.prepare()  # gptqmodel reads its number of workers when it is imported

from calibration_study import own_text  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig  # noqa: E402

from helpers import evaluation, models  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="auto")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} is there already")
    found = models.find(arguments.model, copies=3)
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    net = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.fast).to(found.device).eval()
    rows = own_text(net, tokenizer, arguments.samples, 256)
    windows = evaluation.windows(tokenizer, tokens=4096)
    reference = evaluation.reference(found, windows)
    del net

    settings = QuantizeConfig(bits=4, group_size=arguments.group_size, sym=True, desc_act=True, act_group_aware=False,
                              damp_percent=0.05, offload_to_disk=False)  # fmt: skip
    started = time.perf_counter()
    model = GPTQModel.load(found.path, settings, dtype=found.fast, device=found.device)
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows], batch_size=8)
    seconds = time.perf_counter() - started
    scratch = arguments.output.with_name(arguments.output.name + ".partial")
    model.save(str(scratch))
    tokenizer.save_pretrained(scratch)
    scratch.rename(arguments.output)
    del model

    # a checkpoint that loads may still be nonsense: score the file
    where: dict[str, Any] = {"device_map": {"": found.device}}
    if found.device == "cuda":  # the one that gptqmodel picks on an H200, Machete, downloads CUTLASS first
        where["quantization_config"] = GPTQConfig(bits=4, backend="gptq_triton")
    reloaded = AutoModelForCausalLM.from_pretrained(arguments.output, dtype=found.fast, **where)
    score = evaluation.score(reloaded.eval(), windows, reference)
    print(json.dumps({"model": found.name, "group_size": arguments.group_size, "sym": True, "seconds": round(seconds),
                      "kl_divergence": score.kl_divergence, "low": score.kl_low, "high": score.kl_high,
                      "same_top1": score.top1_agreement}))  # fmt: skip


if __name__ == "__main__":
    main()
