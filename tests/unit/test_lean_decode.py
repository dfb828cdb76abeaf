"""The lean decoder of notebooks/gpu: on a CPU, without its graph, it has to give the tokens that transformers' generate gives."""

import shutil
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks" / "gpu"))
import lean_decode  # noqa: E402

SHAPE = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    initializer_range=0.2,  # the default makes logits so flat that a tie could decide
)


def random_model(family, **options):
    """A small model with random weights, and with biases that are not zero (transformers begins with zeros)."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.data.normal_()
    return model


@pytest.fixture(scope="module")
def small():
    return random_model("Llama")


MODELS = {
    "Llama": lambda: random_model("Llama"),
    "Qwen2": lambda: random_model("Qwen2", tie_word_embeddings=False),
    "Qwen2, tied head": lambda: random_model("Qwen2", tie_word_embeddings=True),
    "Llama, biases everywhere": lambda: random_model("Llama", attention_bias=True, mlp_bias=True),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return MODELS[request.param]()


def expected(model, prompt, new_tokens):
    return model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)[
        :, prompt.shape[1] :
    ]


@pytest.mark.integration
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_generate(model, batch):
    prompt = torch.randint(1, 320, (batch, 11), generator=torch.Generator().manual_seed(batch))
    lean = lean_decode.LeanDecoder(model, batch=batch, length=48)
    assert torch.equal(lean.generate(prompt, 24), expected(model, prompt, 24))
    again = prompt.flip(1)[:, :5]  # an old, longer cache is no part of a new answer
    assert torch.equal(lean.generate(again, 12), expected(model, again, 12))


@pytest.mark.integration
def test_fused_matrices_change_nothing(model):
    import copy

    prompt = torch.arange(1, 10)[None]  # 0 would be padding to `generate`
    fused = lean_decode.fuse(copy.deepcopy(model))
    assert not hasattr(fused.model.layers[0].self_attn, "q_proj")
    assert torch.equal(lean_decode.LeanDecoder(fused, length=40).generate(prompt, 20), expected(model, prompt, 20))


def test_biases_decide():
    """The comparison would not notice a lost bias if these biases did not change the answer."""
    prompt = torch.arange(1, 10)[None]
    model = random_model("Qwen2")
    with_biases = expected(model, prompt, 20)
    assert {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("bias")} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.data.zero_()
    assert not torch.equal(with_biases, expected(model, prompt, 20))


@pytest.mark.parametrize(
    ("other", "options"),
    [
        ("Mistral", dict(sliding_window=16)),
        ("Qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
        ("Qwen3", dict(head_dim=8)),
    ],
)
def test_other_models_are_refused(other, options):
    with pytest.raises(ValueError, match="no sliding window"):
        lean_decode.LeanDecoder(random_model(other, **options), length=40)


@pytest.mark.parametrize("new_tokens", [0, 38])
def test_no_room(small, new_tokens):
    with pytest.raises(ValueError, match="new_tokens must be 1 to 37"):
        lean_decode.LeanDecoder(small, length=40).generate(torch.tensor([[1, 2, 3]]), new_tokens)


def test_length_that_kernels_do_not_take(small):
    with pytest.raises(ValueError, match="multiple of 8"):
        lean_decode.LeanDecoder(small, length=41)


@pytest.mark.notebook
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_pieces_compute_what_they_say():
    """What the GPU captures is the compiled version; the tests above run the plain one."""
    generator = torch.Generator().manual_seed(0)
    qkv, cos, sin = (torch.randn(*shape, generator=generator) for shape in ((2, 1, 12 * 16), (1, 16), (1, 16)))
    at, mask = torch.tensor([5]), torch.zeros(1, 1, 4, 24).masked_fill(torch.arange(24) > 5, float("-inf"))
    results = []
    for stance in ("default", "force_eager"):
        caches = [torch.randn(2, 2, 24, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
        with torch.compiler.set_stance(stance), torch.inference_mode():
            out = lean_decode.attend(qkv, cos, sin, *caches, at, mask, 8)
            residual, normed = lean_decode.add_norm(
                out, out * 2, torch.rand(8 * 16, generator=torch.Generator().manual_seed(3)), 1e-5
            )
            results.append([out, *caches, residual, normed, lean_decode.gate(normed)])
    for compiled, plain in zip(*results):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(results[0][1], torch.randn(2, 2, 24, 16, generator=torch.Generator().manual_seed(1))), (
        "the cache is written"
    )


@pytest.mark.notebook
def test_the_default_model(net, tokenizer):
    prompt = tokenizer("Quantization makes a language model", return_tensors="pt").input_ids
    assert torch.equal(lean_decode.LeanDecoder(net, length=64).generate(prompt, 24), expected(net, prompt, 24))
