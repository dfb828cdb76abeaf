"""Failures while weights are saved, each with its repair."""

import json
import os
from pathlib import Path

import torch
from torch import nn

from helpers.diagnosis.reproductions.parts import IDS, lora, scratch, tiny_4bit, tiny_folder, tiny_model
from helpers.diagnosis.reproductions.registry import fails, works


@fails("save-dynamic-int8")
def _():
    from torch.ao.quantization import quantize_dynamic

    quantize_dynamic(tiny_model(), {nn.Linear}, dtype=torch.qint8).save_pretrained(scratch())


@works("save-dynamic-int8")
def _():
    from torch.ao.quantization import quantize_dynamic

    model, file = quantize_dynamic(tiny_model(), {nn.Linear}, dtype=torch.qint8), Path(scratch()) / "int8.pt"
    torch.save(model.state_dict(), file)
    again = quantize_dynamic(tiny_model(), {nn.Linear}, dtype=torch.qint8)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    return "state dict saved and loaded, same logits"


@fails("save-torchao")
def _():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_model()
    quantize_(model, Int8WeightOnlyConfig())
    model.save_pretrained(scratch())


@works("save-torchao")
def _():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    folder, config = scratch(), TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=config)
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    return "saved and loaded, same logits"


@fails("tensors-share-memory")
def _():
    from safetensors.torch import save_file

    save_file(tiny_model(tie_word_embeddings=True).state_dict(), Path(scratch()) / "model.safetensors")


@works("tensors-share-memory")
def _():
    folder = scratch()
    tiny_model(tie_word_embeddings=True).save_pretrained(folder)
    return f"save_pretrained keeps one copy: {(Path(folder) / 'model.safetensors').stat().st_size:,} bytes"


@fails("tensor-not-contiguous")
def _():
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3, 4).T}, Path(scratch()) / "model.safetensors")


@works("tensor-not-contiguous")
def _():
    from safetensors.torch import load_file, save_file

    file = Path(scratch()) / "model.safetensors"
    save_file({"weight": torch.ones(3, 4).T.contiguous()}, file)
    return f"weight {tuple(load_file(file)['weight'].shape)}"


@fails("4bit-state-dict-in-plain-model")
def _():
    tiny_model(tie_word_embeddings=True).load_state_dict(tiny_4bit().state_dict())


@works("4bit-state-dict-in-plain-model")
def _():
    from transformers import AutoModelForCausalLM

    folder = scratch()
    tiny_4bit().save_pretrained(folder)
    return f"from_pretrained reads its config: {type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj).__name__}"


@fails("adapter-config-missing")
def _():
    from peft import PeftModel

    PeftModel.from_pretrained(tiny_model(), tiny_folder())


@works("adapter-config-missing")
def _():
    from peft import PeftModel

    folder = scratch()
    lora(tiny_model()).save_pretrained(folder)
    return f"{type(PeftModel.from_pretrained(tiny_model(), folder)).__name__} from " + ", ".join(
        sorted(os.listdir(folder))
    )


@fails("dtype-in-json")
def _():
    json.dumps({"compute_dtype": torch.bfloat16})


@works("dtype-in-json")
def _():
    return json.dumps({"compute_dtype": str(torch.bfloat16).removeprefix("torch.")})
