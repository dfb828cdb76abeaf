"""What notebook 11's quantized cache costs on both of the course's models, with a range for each token and for each channel.

    python notebooks/kv_cache/cache_study.py        # writes cache_study.json beside itself; six minutes on two CPU cores

The cache is notebook 11's own: its functions are cut out of the notebook's source. All 4,096 tokens of the four genres are scored.
"""

import ast
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

from helpers import evaluation, files, models, records

HERE = Path(__file__).resolve().parent
CELLS = ("GroupedCacheLayer", "grouped", "WithCache", "tensors_of", "stored_bits")
NEEDED = "import torch\nfrom transformers.cache_utils import Cache, QuantizedLayer\n\nfrom helpers import memory"
TOKENS, GROUP_SIZE = 4096, 32
SCORES = ("perplexity", "kl_divergence", "kl_low", "kl_high", "top1_agreement")


def cells(config):
    """A module of notebook 11's functions of those names, for a model of this config."""
    source = (HERE.parent / "source" / "11_compare_methods.py").read_text(encoding="utf-8")
    wanted = [node for node in ast.parse(source).body if getattr(node, "name", None) in CELLS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "notebook_11.py"
        path.write_text("\n\n\n".join([NEEDED, *map(ast.unparse, wanted)]), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    module.config = config
    return module


def caches(config, grouped):
    """{row: a function that makes its cache}."""
    rows = {"16 bits": lambda: DynamicCache(config=config), "fp8 (transformers)": lambda: QuantizedCache("fp8", config)}
    for bits in (4, 2):
        for per in ("token", "channel"):
            rows[f"{bits} bits, keys per {per}"] = lambda bits=bits, per=per: grouped(bits, GROUP_SIZE, keys_per=per)
    return rows


@torch.inference_mode()
def largest_key_channel(net, windows):
    """Mean |key| of the largest channel over that of the median one, in the layer where it is most."""
    cache = DynamicCache(config=net.config)
    net(windows, past_key_values=cache)
    channels = [layer.keys.float().abs().mean((0, 2)).flatten() for layer in cache.layers]
    return max((mean.max() / mean.median()).item() for mean in channels)


def measured(asked):
    """A model's name, and what each cache costs it."""
    found = models.find(asked)
    windows = evaluation.windows(AutoTokenizer.from_pretrained(found.path), tokens=TOKENS)
    baseline = evaluation.reference(found, windows)
    net = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.bfloat16).to(found.device).eval()
    notebook, rows = cells(net.config), {}
    for row, make in caches(net.config, notebook.grouped).items():
        scores = evaluation.score(notebook.WithCache(net, make), windows, baseline, batch_size=4)
        rows[row] = {"bits_stored": notebook.stored_bits(net, make, windows[:1])}
        rows[row] |= {name: getattr(scores, name) for name in SCORES}
        print(found.name, row, rows[row], flush=True)
    device = records.device_name(found.device)
    return (
        found.name,
        device,
        {"largest_key_channel": largest_key_channel(net, windows[:4].to(net.device)), "rows": rows},
    )


def main():
    results = {"date": time.strftime("%Y-%m-%d"), "tokens": TOKENS, "group_size": GROUP_SIZE, "models": {}}
    for asked in ("smollm2-offline", "qwen2.5-coder-1.5b-offline"):
        name, results["device"], results["models"][name] = measured(asked)
    files.write_text(HERE / "cache_study.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
