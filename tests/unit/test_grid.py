"""The grid: `find` names weights on one and no others, `rescale` leaves it and keeps the function."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers import grid


def normal(*shape, seed=0):
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def asymmetric(weight, size, bits=4):
    """Rounded to a grid of its own for each block, as Q4_1 does."""
    blocks = weight.unflatten(-1, (-1, size))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    return (((blocks - low) / step).round().clamp(0, 2**bits - 1) * step + low).flatten(-2)


def symmetric(weight, size, bits=4):
    blocks = weight.unflatten(-1, (-1, size))
    step = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((blocks / step).round() * step).flatten(-2)


def codebook(weight, size, values):
    blocks = weight.unflatten(-1, (-1, size))
    top = blocks.abs().amax(-1, keepdim=True)
    nearest = (blocks[..., None] / top[..., None] - values).abs().argmin(-1)
    return (values[nearest] * top).flatten(-2)


def nf4(weight):
    import bitsandbytes.functional as bnb

    return codebook(weight, 64, bnb.create_normal_map())


def mxfp4(weight):
    blocks = weight.unflatten(-1, (-1, 32))
    scale = 2.0 ** (blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([-levels.flip(0)[:-1], levels])
    return (levels[(blocks[..., None] / scale[..., None] - levels).abs().argmin(-1)] * scale).flatten(-2)


def heavy(*shape):
    """With outliers, so that a scale for a whole row leaves few levels to the others."""
    weight = normal(*shape)
    weight[:, ::97] *= 10
    return weight


ON_GRID = {
    "Q4_1": (asymmetric(normal(96, 576), 32), 32),
    "groups of 64": (symmetric(normal(96, 576), 64), 64),
    "groups of 128": (asymmetric(normal(96, 1536), 128), 128),
    "a scale per row": (symmetric(normal(96, 1536), 1536), 128),
    "NF4": (nf4(normal(96, 576)), 64),
    "MXFP4": (mxfp4(normal(96, 576)), 32),
    "two bits": (asymmetric(normal(96, 576), 32, bits=2), 128),  # four blocks with four values each
    "ternary": (normal(96, 576).sign() * (normal(96, 576).abs() > 0.01) * 0.02, 128),
    "positive": (asymmetric(normal(96, 576).abs() + 0.001, 32), 32),
    "experts": (asymmetric(normal(8, 64, 576), 32), 32),
    "experts, transposed": (asymmetric(normal(8, 64, 576), 32).mT.contiguous(), 32),
    "transposed, as GPT-2 stores it": (asymmetric(normal(96, 576), 32).T.contiguous(), 32),
    "one row": (asymmetric(normal(1, 576), 32), 32),
}
OFF_GRID = {
    "normal": normal(96, 576),
    "few columns": normal(96, 32),
    "uniform": torch.rand(96, 576),
    "heavy tails": heavy(96, 576) ** 3,
    "near one": 1 + 0.003 * normal(96, 576) / 0.02,
    "constant": torch.full((96, 576), 0.02),
    "zeros": torch.zeros(96, 576),
    "int8, a scale per row": symmetric(normal(96, 576), 576, bits=8),
    "int8 with outliers": symmetric(heavy(96, 582), 582, bits=8),
    "int8, a scale for all": symmetric(normal(1, 96 * 576), 96 * 576, bits=8).view(96, 576),
    "float8": (normal(96, 576) * 1000).to(torch.float8_e4m3fn).float() / 1000,
    "six bits": asymmetric(normal(96, 576), 32, bits=6),
    "four of five pruned": normal(96, 576) * (torch.rand(96, 576, generator=torch.Generator().manual_seed(1)) < 0.2),
    "low rank": normal(96, 8) @ normal(8, 576, seed=1),
    "one row in four on a grid": torch.where(torch.arange(96)[:, None] % 4 == 0, asymmetric(normal(96, 576), 32), normal(96, 576)),
    "rescaled": asymmetric(normal(96, 576), 32) * torch.empty(576).uniform_(0.7, 1.4),
    "conv": normal(64, 1, 4),
    "narrower than a block": normal(96, 16),
}  # fmt: skip
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@each_dtype
@pytest.mark.parametrize("case", ON_GRID)
def test_weights_on_a_grid_are_named(case, dtype, tmp_path):
    weight, size = ON_GRID[case]
    save_file({"layers.0.q_proj.weight": weight.to(dtype)}, tmp_path / "model.safetensors")
    found = grid.find(tmp_path)
    assert found.tensors == ("layers.0.q_proj.weight",) and found.share == 1
    assert found.block_size == size and 2 <= found.distinct <= 16
    assert f"1 of 1 Linear weights lie on a low-bit grid: blocks of {size}" in str(found)


@each_dtype
@pytest.mark.parametrize("case", OFF_GRID)
def test_other_weights_are_not(case, dtype, tmp_path):
    save_file({"layers.0.q_proj.weight": OFF_GRID[case].to(dtype)}, tmp_path / "model.safetensors")
    found = grid.find(tmp_path)
    assert (found.tensors, found.looked_at, found.block_size, found.share) == ((), 1, 0, 0)
    assert "None of the 1 Linear weights" in str(found)


def test_bfloat16_numbers_stored_as_float32_near_one_are_no_grid(tmp_path):
    save_file({"gate.weight": OFF_GRID["near one"].bfloat16().float()}, tmp_path / "model.safetensors")
    assert not grid.find(tmp_path).tensors


def test_a_part_of_the_tensors_over_two_shards_in_order_and_embeddings_do_not_count(tmp_path):
    on, off = asymmetric(normal(96, 576), 32), normal(96, 576)
    first = {
        "layers.2.a.weight": on,
        "layers.10.a.weight": on.clone(),
        "model.embed_tokens.weight": on.clone(),
        "norm.weight": on[0].clone(),
    }
    second = {
        "layers.3.a.weight": off,
        "layers.4.a.qweight": torch.zeros(64, 64, dtype=torch.int32),
        "layers.3.b.weight": symmetric(off, 64),
    }
    save_file(first, tmp_path / "one.safetensors")
    save_file(second, tmp_path / "two.safetensors")
    save_file({"stray.weight": on}, tmp_path / "stray.safetensors")
    where = dict.fromkeys(first, "one.safetensors") | dict.fromkeys(second, "two.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    found = grid.find(tmp_path)
    assert found.tensors == ("layers.2.a.weight", "layers.3.b.weight", "layers.10.a.weight")
    assert (found.looked_at, found.share, found.block_size) == (4, 0.75, 32)


def test_only_a_sample_is_read(tmp_path, monkeypatch):
    save_file({"up.weight": normal(4096, 576)}, tmp_path / "model.safetensors")
    taken = []
    original = torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda pieces: taken.append(sum(piece.numel() for piece in pieces)) or original(pieces)
    )
    grid.find(tmp_path)
    assert taken and max(taken) < 4096 * 576 / 20


# --- leaving the grid -----------------------------------------------------------------------------------------------------------


def tiny(kind, **options):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(0)
    net = model(config(**sizes, initializer_range=0.3, **options)).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)  # as drawn they are zeros and ones, which hide mistakes
    return net


@torch.no_grad()
def log_probabilities(net, ids):
    return net(ids).logits.float().log_softmax(-1)


def weights(net):
    return {name: module.weight for name, module in net.named_modules() if isinstance(module, nn.Linear)}


def largest_distinct(net, skip=()):
    """{name of a Linear: largest number of distinct values in a block of 32}."""
    return {
        name: max(len(block.unique()) for block in weight.reshape(-1, 32)) for name, weight in weights(net).items() if name not in skip
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_rescaling_keeps_the_function_and_leaves_the_grid(kind, tied):
    net = tiny(kind, tie_word_embeddings=tied)
    with torch.no_grad():
        for weight in weights(net).values():
            weight.copy_(asymmetric(weight, 32))
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    before, embeddings = log_probabilities(net, ids), net.model.embed_tokens.weight.clone()
    assert max(largest_distinct(net).values()) <= 16
    grid.rescale(net)
    assert (log_probabilities(net, ids) - before).abs().max() < 1e-3
    after = largest_distinct(net, skip=["lm_head"] if tied else [])
    assert min(after.values()) > 16, after
    assert torch.equal(net.model.embed_tokens.weight, embeddings)


def test_rescaling_follows_its_seed():
    one, same, other = (tiny("llama") for _ in range(3))
    for net, seed in ((one, 0), (same, 0), (other, 1)):
        grid.rescale(net, seed)
    assert all(torch.equal(weight, weights(same)[name]) for name, weight in weights(one).items())
    assert not torch.equal(weights(one)["model.layers.0.mlp.up_proj"], weights(other)["model.layers.0.mlp.up_proj"])
