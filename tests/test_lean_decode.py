"""The lean decoder of notebooks/gpu: on a CPU, without its graph, it has to give the tokens that transformers' generate gives."""

import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks" / "gpu"))
import lean_decode  # noqa: E402


@pytest.fixture(scope="module")
def small():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)
    config.initializer_range = 0.2  # the default makes logits so flat that a tie could decide
    return LlamaForCausalLM(config).eval()


def expected(model, prompt, new_tokens):
    return model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)[:, prompt.shape[1] :]


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_generate(small, batch):
    prompt = torch.randint(1, 320, (batch, 11), generator=torch.Generator().manual_seed(batch))
    lean = lean_decode.LeanDecoder(small, batch=batch, length=48)
    assert torch.equal(lean.generate(prompt, 24), expected(small, prompt, 24))
    again = prompt.flip(1)[:, :5]  # an old, longer cache is no part of a new answer
    assert torch.equal(lean.generate(again, 12), expected(small, again, 12))


def test_fused_matrices_change_nothing(small):
    import copy

    prompt = torch.arange(1, 10)[None]  # 0 would be padding to `generate`
    fused = lean_decode.fuse(copy.deepcopy(small))
    assert not hasattr(fused.model.layers[0].self_attn, "q_proj")
    assert torch.equal(lean_decode.LeanDecoder(fused, length=40).generate(prompt, 20), expected(small, prompt, 20))


@pytest.mark.parametrize("new_tokens", [0, 38])
def test_no_room(small, new_tokens):
    with pytest.raises(ValueError, match="new_tokens must be 1 to 37"):
        lean_decode.LeanDecoder(small, length=40).generate(torch.tensor([[1, 2, 3]]), new_tokens)


def test_length_that_kernels_do_not_take(small):
    with pytest.raises(ValueError, match="multiple of 8"):
        lean_decode.LeanDecoder(small, length=41)


@pytest.mark.notebook
def test_the_default_model(net, tokenizer):
    prompt = tokenizer("Quantization makes a language model", return_tensors="pt").input_ids
    assert torch.equal(lean_decode.LeanDecoder(net, length=64).generate(prompt, 24), expected(net, prompt, 24))
