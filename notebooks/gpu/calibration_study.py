"""What GPTQ's and AWQ's settings cost, on the course's four genres, the held-back letter and pydoc: one JSON line per setting.

    python notebooks/gpu/calibration_study.py --model qwen2.5-coder-1.5b-offline --group-size 128 --out study.jsonl [--part 0/4]

Needs a CUDA GPU. Every setting quantizes the whole model with the library (gptqmodel, autoawq, bitsandbytes) or rounds it, and is
scored like every other method of the course. `--part k/n` takes every n-th setting, so that n processes can share a GPU.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPTQConfig

from helpers import evaluation, models

transformers.logging.set_verbosity_error()


def own_text(net, tokenizer, samples: int, length: int):
    """Token ids that the model samples from its first token on, int64 [samples, length]."""
    start = tokenizer.bos_token_id or net.config.bos_token_id or tokenizer.convert_tokens_to_ids("<|endoftext|>")
    torch.manual_seed(0)
    ids = net.generate(
        torch.full((samples, 1), start, device=net.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        repetition_penalty=1.0, min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=start,
    )  # fmt: skip
    return ids.cpu()


def rounded(weight, group_size: int, sym: bool):
    """A weight [rows, columns] rounded to nearest in 4 bits."""
    groups = weight.float().unflatten(-1, (-1, group_size))
    if sym:
        scale = (2 * groups.abs().amax(-1, keepdim=True) / 15).clamp(min=1e-8)  # some groups are all zeros
        return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-8)
    zero_point = (-low / scale).round().clamp(0, 15)
    return (((groups / scale).round() + zero_point).clamp(0, 15).sub(zero_point) * scale).flatten(-2)


def settings(group_size: int):
    """Every setting as a dict; the first key says which method."""
    for size, sym in itertools.product((group_size, 32), (True, False)):
        yield {"method": "rounding", "group_size": size, "sym": sym}
    for kind in ("nf4", "nf4-double", "llm-int8"):
        yield {"method": "bitsandbytes", "kind": kind}
    gptq = {"method": "gptq", "samples": 32, "length": 256, "sym": False, "order": "desc_act", "damp_percent": 0.05}
    yield gptq | {"source": "pydoc", "samples": 24, "length": 128, "sym": True, "order": "", "damp_percent": 0.01}
    for source, sym, order in itertools.product(
        ("own", "pydoc", "mix"), (False, True), ("desc_act", "act_group_aware", "")
    ):
        yield gptq | {"source": source, "sym": sym, "order": order}
    for samples in (8, 16, 64):
        yield gptq | {"source": "own", "samples": samples}
    for damp in (0.01, 0.1):
        yield gptq | {"source": "own", "damp_percent": damp}
    for source, samples in itertools.product(("pydoc", "own"), (4, 16)):
        yield {"method": "autoawq", "source": source, "samples": samples, "length": 256}


class Study:
    """One model with its texts and references, and the ways to quantize it."""

    def __init__(self, model: str, group_size: int):
        self.found, self.group_size = models.find(model), group_size
        self.tokenizer = AutoTokenizer.from_pretrained(self.found.path)
        letter = evaluation.windows(self.tokenizer, tokens=1536, source="letter")
        pydoc = evaluation.windows(self.tokenizer, tokens=4096, source="pydoc")
        self.texts = {"genres": evaluation.windows(self.tokenizer), "letter": letter, "pydoc": pydoc}
        self.references = {name: evaluation.reference(self.found, text) for name, text in self.texts.items()}
        self.own = own_text(self.load(), self.tokenizer, 64, 256)

    def load(self, **options):
        return AutoModelForCausalLM.from_pretrained(
            self.found.path, dtype=torch.bfloat16, device_map={"": "cuda"}, **options
        )

    def calibration(self, source, samples, length):
        pydoc = evaluation.windows(self.tokenizer, "calibration", samples * length, length, source="pydoc")
        half = samples // 2
        return {
            "own": self.own[:samples, :length],
            "pydoc": pydoc,
            "mix": torch.cat([self.own[:half, :length], pydoc[:half]]),
        }[source]

    def rounding(self, group_size, sym):
        return self.round_all(self.load(), group_size, sym)

    @torch.no_grad()
    def round_all(self, net, group_size, sym):
        for module in net.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded(module.weight, group_size, sym))
        return net

    def bitsandbytes(self, kind):
        if kind == "llm-int8":
            return self.load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
        return self.load(quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=kind == "nf4-double",
            bnb_4bit_compute_dtype=torch.bfloat16))  # fmt: skip

    def gptq(self, source, samples, length, sym, order, damp_percent):
        from gptqmodel import GPTQModel, QuantizeConfig

        rows = [
            {"input_ids": row.tolist(), "attention_mask": [1] * len(row)}
            for row in self.calibration(source, samples, length)
        ]
        config = QuantizeConfig(
            bits=4, group_size=self.group_size, sym=sym, desc_act=order == "desc_act", act_group_aware=order == "act_group_aware",
            damp_percent=damp_percent, offload_to_disk=False,
        )  # fmt: skip
        quantized = GPTQModel.load(self.found.path, config, dtype=torch.bfloat16, device="cuda")
        quantized.quantize(rows, batch_size=8)
        with tempfile.TemporaryDirectory() as folder:
            quantized.save(folder)
            del quantized
            kernel = GPTQConfig(bits=4, backend="gptq_triton")
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map={"": "cuda"}, quantization_config=kernel
            )

    def autoawq(self, source, samples, length):
        from helpers import archived

        with archived.enable("autoawq"):
            from awq import AutoAWQForCausalLM

            awq = AutoAWQForCausalLM.from_pretrained(
                self.found.path, low_cpu_mem_usage=True, use_cache=False, device_map={"": "cuda"}
            )
            awq.quantize(
                self.tokenizer, quant_config={"zero_point": True, "q_group_size": self.group_size, "w_bit": 4, "version": "GEMM"},
                calib_data=self.calibration(source, samples, length).tolist(), max_calib_seq_len=length, apply_clip=False,
                export_compatible=True,
            )  # fmt: skip
        return self.round_all(awq.model.cuda().eval(), self.group_size, sym=False)

    def line(self, setting: dict) -> dict:
        """The setting with its scores: [KL, low, high, perplexity, top-1] a text, and the mean KL of each genre."""
        arguments = dict(setting)
        started = time.perf_counter()
        net = getattr(self, arguments.pop("method"))(**arguments).eval()
        row = setting | {"seconds": round(time.perf_counter() - started, 1)}
        for name, text in self.texts.items():
            scores = evaluation.score(net, text, self.references[name], batch_size=16)
            row[name] = [scores.kl_divergence, scores.kl_low, scores.kl_high, scores.perplexity, scores.top1_agreement]
            row[name] = [float(f"{value:.5g}") for value in row[name]]
            if name == "genres":
                row["by_genre"] = {genre: float(f"{value:.4g}") for genre, value in scores.by_genre().items()}
        return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-offline")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    study = Study(arguments.model, arguments.group_size)
    about = {"model": study.found.name, "origin": study.found.origin, "device": torch.cuda.get_device_name(0)}
    for number, setting in enumerate(settings(arguments.group_size)):
        if number % parts == part:
            try:
                row = study.line(setting)
            except Exception as error:  # one setting that a library refuses is a row that says so
                row = setting | {"error": f"{type(error).__name__}: {error}"[:300]}
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"number": number} | about | row) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
