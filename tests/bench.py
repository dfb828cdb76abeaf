"""`make bench`: speed figures, on an idle machine. Nothing here is asserted by the tests; the targets are printed beside the values."""

import copy
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from helpers import evaluation, models, speed


def seconds(work, runs=3):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    logging.disable_progress_bar()
    code = "import time; t = time.perf_counter(); import helpers; print(time.perf_counter() - t)"
    took = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    print(f"import of helpers: {took:.3f} s (target: under 1)")

    text = (Path(__file__).parent / "unit" / "data" / "error_texts" / "E05.txt").read_bytes()
    explain = [sys.executable, "-m", "helpers", "explain"]
    took = seconds(lambda: subprocess.run(explain, input=text, capture_output=True))
    print(f"`helpers explain` of an error text: {took:.3f} s (target: under 0.2)")

    found = models.find(models.OFFLINE)
    windows = evaluation.windows(AutoTokenizer.from_pretrained(found.path))
    reference = evaluation.reference(found, windows)
    model = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def bare():
        for batch in windows.split(4):
            model(input_ids=batch, use_cache=False).logits

    bare()
    alone, scored = seconds(bare), seconds(lambda: evaluation.score(model, windows, reference))
    print(f"evaluation, {windows.numel():,} tokens, fp32: bare forward loop {alone:.1f} s, scored {scored:.1f} s: "
          f"{alone / scored:.0%} of its speed (target: at least 90 %)")  # fmt: skip

    int8, int8_torchao = copy.deepcopy(model), copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, as notebook 01 says
        int8 = quantize_dynamic(int8, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    quantize_(
        int8_torchao,
        Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, name: "layers" in name and name.endswith("proj"),
    )
    variants = {"fp32": model, "int8, torch dynamic": int8, "int8, torchao dynamic": int8_torchao}
    rates = {name: speed.decode(variant) for name, variant in variants.items()}
    rates["bf16"] = speed.decode(model.bfloat16())
    for name, rate in rates.items():
        print(f"{name:22} prefill {rate.prefill_tokens_per_s:7.1f} tok/s, decode {rate.decode_low:5.1f} to {rate.decode_high:5.1f} tok/s, "
              f"{rate.decode_tokens_per_s / rates['fp32'].decode_tokens_per_s:.2f} x fp32")  # fmt: skip


if __name__ == "__main__":
    main()
