"""The layers of the decode ladder: on a CPU, each must give nearly what the layer it replaces gives, biases included."""

import copy
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks" / "gpu"))
import layers  # noqa: E402
import lean_decode  # noqa: E402
import reference  # noqa: E402


@pytest.fixture
def linear():
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 96, dtype=torch.bfloat16).requires_grad_(False)
    linear.bias.normal_()
    return linear


def distance(got, wanted):
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    ("make", "most"), [(layers.nf4, 0.13), (layers.Float8Weight, 0.04), (layers.Float8, 0.05), (layers.Nibbles, 0.13)]
)
def test_output_is_nearly_that_of_the_layer(linear, make, most, tokens):
    x = torch.randn(1, tokens, 256, dtype=torch.bfloat16)
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        got = make(linear)(x)
    assert got.shape == (1, tokens, 96) and got.dtype == torch.bfloat16
    assert distance(got - linear.bias, linear(x) - linear.bias) < most


def test_both_ways_of_a_layer_are_the_same_product(linear):
    """A prompt takes the matrix, a single token the compiled sum; both read the same codes."""
    x = torch.randn(1, 3, 256, dtype=torch.bfloat16)
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        for make in (layers.Float8Weight, layers.Nibbles):
            layer = make(linear)
            one_by_one = torch.cat([layer(token) for token in x.split(1, 1)], 1)
            assert distance(one_by_one, layer(x)) < 0.01


def test_packed_codes_are_read_back(linear):
    codes, scales = layers.rounded(linear)
    words = layers.packed(codes)
    assert words.shape == (32, 96) and scales.shape == (2, 96)
    unpacked = torch.stack([words >> 4 * row & 15 for row in range(8)], 1).flatten(0, 1)
    assert torch.equal(unpacked, codes) and codes.min() >= 0 and codes.max() == 15
    weight = (codes.unflatten(0, (2, 128)) - 8) * scales[:, None]
    assert distance(weight.flatten(0, 1).t(), linear.weight) < 0.13


def test_the_head_can_stay(linear):
    model = torch.nn.Module()
    model.body, model.lm_head = linear, torch.nn.Linear(256, 96, bias=False)
    layers.replace(model, layers.Nibbles, head=False)
    assert type(model.body) is layers.Nibbles and type(model.lm_head) is torch.nn.Linear
    layers.replace(model, layers.Nibbles)
    assert type(model.lm_head) is layers.Nibbles


@pytest.fixture
def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=320, initializer_range=0.1, **shape)).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.normal_()
    return model


@pytest.mark.parametrize(
    "label", ["int4, product by torch.compile, lean", "FP8 weights, product by torch.compile, lean"]
)
def test_a_row_answers_as_the_same_layers_in_generate(qwen, label):
    """Joined and then rounded in the lean loop, or rounded where they stand and run by `generate`: the same tokens."""
    prompt, joined = torch.arange(1, 10)[None], lean_decode.fuse(copy.deepcopy(qwen))
    assert reference.ROWS[label][1] == reference.HEAD
    for model in (joined, qwen):
        reference.fewer_bits(model, label, head=True)
        assert not any(type(module) is torch.nn.Linear for module in model.modules())
    with torch.compiler.set_stance("force_eager"):
        wanted = qwen.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 9:]
    assert torch.equal(lean_decode.LeanDecoder(joined, length=40).generate(prompt, 16), wanted)


def test_bytes_a_token_reads(qwen):
    """The table counts where it is the head too, and not where it only gives one row."""
    table = qwen.model.embed_tokens.weight
    every = sum(tensor.nbytes for tensor in [*qwen.parameters(), *qwen.buffers()])
    assert qwen.lm_head.weight is not table and reference.read_bytes(qwen) == every - table.nbytes
    qwen.lm_head.weight = table
    assert reference.read_bytes(qwen) == every - table.nbytes  # now once in the model, and read


PROGRAM = """
import sys, time
print('ROW {"first": {"bytes": 1}}', flush=True)
print('ROW {"second": {"failed": "no kernel"}}', flush=True)
%s
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("end", "failed"),
    [("time.sleep(60)", "took longer than 3 s"), ("sys.exit('device lost')", "device lost"), ("", "device")],
)
def test_rows_outlive_their_step(tmp_path, monkeypatch, end, failed):
    (tmp_path / "step.py").write_text(PROGRAM % end)
    (tmp_path / "log").write_text("device\n")
    monkeypatch.setattr(reference, "__file__", str(tmp_path / "step.py"))
    kept = []
    result = reference.run("ladder_7b", 3, tmp_path / "log", ["first"], lambda so_far: kept.append(len(so_far["rows"])))
    assert result == {"rows": {"first": {"bytes": 1}, "second": {"failed": "no kernel"}}, "failed": failed}
    assert kept == [1, 2]


def test_every_row_has_one_way_of_rounding(monkeypatch):
    """Each label of the ladder names one kind of layer, and says whether the head is rounded too."""
    seen = []
    monkeypatch.setattr(layers, "replace", lambda model, make, head: seen.append((make, head)))
    monkeypatch.setattr("torchao.quantization.quantize_", lambda model, config, chosen: seen.append((config, True)))
    for label, (dtype, tensors, how, batches) in reference.ROWS.items():
        seen.clear()
        reference.fewer_bits(None, label, tensors == reference.HEAD)
        assert len(seen) == (tensors != reference.NOTHING), label
        assert not seen or seen[0][1] == (tensors == reference.HEAD), label
        assert how in ("eager", "lean", "lean, no graph") and batches[0] == 1 and dtype in ("float16", "bfloat16")


def test_share_and_answer():
    found = {"tokens_per_s": 800.0, "answer": [5, 6, 7, 9]}
    reference.compare(found, 8, 0.005, [5, 6, 8, 9])
    assert found == {"tokens_per_s": 800.0, "share": 0.5, "first_tokens_as_fp16": 2}
