"""Tiny random models of other families than the course's, each with what trips a program that was written for one family."""

from pathlib import Path

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048)
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "falcon")


def config(family):
    """The transformers config: biases (qwen2), no BOS and untied heads (qwen2, phi3), padded vocabulary (qwen3), windows (gemma3_text),
    fused projections (phi3), one head of keys, other module names (falcon)."""
    import transformers as hf

    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    vocabulary = dict(vocab_size=49152)
    made = {
        "llama": lambda: hf.LlamaConfig(
            **SIZES, **ends, **vocabulary, intermediate_size=256, num_key_value_heads=2, tie_word_embeddings=True
        ),
        "qwen2": lambda: hf.Qwen2Config(
            **SIZES,
            **vocabulary,
            intermediate_size=256,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=2,
        ),
        "qwen3": lambda: hf.Qwen3Config(
            **SIZES,
            **ends,
            vocab_size=49280,
            intermediate_size=384,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
        ),
        "gemma3_text": lambda: hf.Gemma3TextConfig(
            **SIZES, **ends, **vocabulary, intermediate_size=256, num_key_value_heads=1, head_dim=32, sliding_window=64
        ),
        "phi3": lambda: hf.Phi3Config(
            **SIZES, **ends, **vocabulary, intermediate_size=256, num_key_value_heads=2, tie_word_embeddings=False
        ),
        "falcon": lambda: hf.FalconConfig(
            **SIZES,
            **ends,
            **vocabulary,
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
            alibi=False,
            bias=False,
        ),
    }
    return made[family]()


def write(folder, family, tokenizer):
    """A random model of a family in `folder`, with the tokenizer of the default model. Its biases are not zero, so none is lost unseen."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = Path(folder) / family
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
