"""Notebook 10's own functions: rotations, the fold that keeps a model's function, grids, GPTQ, AutoRound, the knapsack.

The functions are cut out of the notebook's source; nothing of them needs a download.
"""

import ast
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM


@pytest.fixture(scope="module")
def nb():
    """{name: function} of the notebook, and its imports."""
    tree = ast.parse((ROOT / "notebooks" / "source" / "10_below_four_bits.py").read_text(encoding="utf-8"))
    left_out = ("quiz", "auto_round", "gguf", "claims")

    def wanted(node):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return not any(name in ast.unparse(node) for name in left_out)
        return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("test_")

    space = {}
    body = [node for node in tree.body if wanted(node)]
    exec(compile(ast.Module(body, []), "10", "exec"), space)  # noqa: S102 - the course's own cells
    return space


def layer(rows=96, columns=128, tokens=512):
    """A weight, and the Hessian of inputs whose channels are not alike."""
    generator = torch.manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    inputs = mixed * torch.linspace(0.1, 3, columns)
    return weight, inputs.T @ inputs / tokens


def output_error(quantized, weight, hessian):
    off = quantized - weight
    return (off @ hessian * off).sum().item()


@pytest.mark.parametrize("size", [1, 2, 4, 64, 9, 35, 576, 1536, 8960])
def test_rotations_are_orthogonal_and_flat(nb, size):
    turn = nb["rotation"](size)
    some = torch.linspace(0, size - 1, min(size, 64)).long()
    unit = torch.zeros(len(some), size, dtype=torch.float64)
    unit[torch.arange(len(some)), some] = 1
    assert turn.shape == (size, size)
    assert torch.allclose(turn[some] @ turn.T, unit, atol=1e-10) and torch.allclose(
        (turn.T[some]) @ turn, unit, atol=1e-10
    )
    assert turn.abs().max() <= 2**0.5 / size**0.5 + 1e-12, "an entry that large spreads no outlier"


def test_a_hadamard_matrix_has_equal_magnitudes(nb):
    for size in (1, 2, 4, 32):
        assert torch.allclose(nb["hadamard"](size).abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))
    assert torch.allclose(nb["rotation"](576, seed=0), nb["rotation"](576, seed=0))
    assert not torch.allclose(nb["rotation"](576, seed=0), nb["rotation"](576, seed=1))


def tiny(kind, tied):
    """A random model with norms that are not 1, and biases that are not 0 where it has any."""
    sizes = dict(vocab_size=99, hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, tie_word_embeddings=tied)  # fmt: skip
    torch.manual_seed(0)
    if kind == "qwen2":
        net = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        net = LlamaForCausalLM(
            LlamaConfig(**sizes, attention_bias=kind == "llama with biases", mlp_bias=kind == "llama with biases")
        )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.3, 2)
            elif name.endswith("bias"):
                parameter.normal_()
            else:
                parameter.normal_(std=0.2)
    return net.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "llama with biases", "qwen2"])
def test_a_rotated_model_is_the_same_function_and_the_first_one_is_untouched(nb, kind, tied):
    net, ids = tiny(kind, tied), torch.arange(60).view(2, 30)
    if kind == "qwen2":
        assert net.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    rotated = nb["rotate"](net)
    with torch.inference_mode():
        expected, given = (each(ids).logits.log_softmax(-1) for each in (net, rotated))
    assert (given - expected).abs().max() < 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not torch.allclose(rotated.model.embed_tokens.weight, net.model.embed_tokens.weight, atol=0.01)
    assert rotated.lm_head.weight is not rotated.model.embed_tokens.weight
    assert all((parameter == 1).all() for name, parameter in rotated.named_parameters() if "norm" in name)
    with torch.inference_mode():
        again = nb["turn_down"](rotated)(ids).logits.log_softmax(-1)
    assert (again - expected).abs().max() < 1e-3


def test_without_the_fold_it_is_another_function(nb, monkeypatch):
    net, ids = tiny("llama", True), torch.arange(30)[None]
    monkeypatch.setitem(nb, "fold", lambda norm, readers: None)
    with torch.inference_mode():
        gap = (nb["rotate"](net)(ids).logits.log_softmax(-1) - net(ids).logits.log_softmax(-1)).abs().max()
    assert gap > 0.1


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("kind", ["normal", "zeros", "one value", "an outlier", "positive", "tiny"])
def test_hqq_lowers_its_objective_at_every_step_and_keeps_to_its_levels(nb, kind, bits):
    weight = torch.randn(64, 128, generator=torch.manual_seed(0))
    weight = {
        "normal": weight,
        "zeros": 0 * weight,
        "one value": 0 * weight + 0.3,
        "positive": weight.abs() + 1,
        "tiny": weight * 1e-4,
        "an outlier": torch.where(torch.arange(128) % 64 == 7, 50, weight),
    }[kind]
    values = []
    nb["hqq_grid"](weight.unflatten(-1, (-1, 64)), bits, steps=25, objective=values)
    assert len(values) == 25
    assert all(late <= early * (1 + 1e-5) + 1e-6 for early, late in zip(values, values[1:])), values
    quantized = nb["hqq"](weight, bits)
    assert quantized.isfinite().all()
    assert max(len(group.unique()) for group in quantized.unflatten(-1, (-1, 64)).flatten(0, 1)) <= 2**bits
    if kind == "normal":
        assert (quantized - weight).norm() < (nb["rounding"](weight, bits) - weight).norm()


@pytest.mark.parametrize("name", ["rounding", "gptq", "awq"])
def test_the_grid_has_as_many_levels_as_the_bits_allow(nb, name):
    weight, hessian = layer()
    for bits in (4, 3, 2):
        quantized = nb[name](weight, bits, 64, hessian)
        groups = quantized.unflatten(-1, (-1, 64)).flatten(0, 1)
        if name != "awq":  # there each column has a factor of its own
            assert max(len(group.unique()) for group in groups) <= 2**bits
        assert quantized.shape == weight.shape and quantized.isfinite().all()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_autoround_and_awq_have_a_smaller_output_error_than_rounding(nb, bits):
    weight, hessian = layer()
    floor = output_error(nb["rounding"](weight, bits), weight, hessian)
    assert output_error(nb["gptq"](weight, bits, 64, hessian), weight, hessian) < 0.9 * floor
    assert output_error(nb["awq"](weight, bits, 64, hessian), weight, hessian) <= floor
    losses = []
    learned = nb["autoround"](weight, hessian, bits, losses=losses)
    assert losses[0] == pytest.approx(floor, rel=1e-3), "the first step is rounding to nearest"
    assert output_error(learned, weight, hessian) < 0.95 * floor
    assert output_error(learned, weight, hessian) == pytest.approx(min(losses), rel=1e-3), "the best step is kept"
    assert max(len(group.unique()) for group in learned.unflatten(-1, (-1, 64)).flatten(0, 1)) <= 2**bits


def test_gptq_with_inputs_that_are_all_alike_is_rounding(nb):
    weight = torch.randn(16, 128, generator=torch.manual_seed(0))
    assert torch.allclose(nb["gptq"](weight, 3, 64, torch.eye(128)), nb["rounding"](weight, 3), atol=1e-5)


def brute_force(options, budget):
    totals = []
    for choices in itertools.product(*options):
        cost = sum(unit[choice][0] for unit, choice in zip(options, choices))
        size = sum(unit[choice][1] for unit, choice in zip(options, choices))
        if size <= budget:
            totals.append(cost)
    return min(totals)


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_exact(nb, seed):
    generator = torch.manual_seed(seed)
    costs = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 40, (6, 3), generator=generator)
    options = [dict(zip((2, 3, 4), zip(a, b))) for a, b in zip(costs.tolist(), sizes.tolist())]
    least, most = (sum(pick(size for _, size in unit.values()) for unit in options) for pick in (min, max))
    for budget in (least, (least + most) // 2, most):
        chosen = nb["knapsack"](options, budget)
        assert sum(unit[choice][1] for unit, choice in zip(options, chosen)) <= budget
        assert sum(unit[choice][0] for unit, choice in zip(options, chosen)) == pytest.approx(
            brute_force(options, budget)
        )
    with pytest.raises(ValueError, match="nothing fits"):
        nb["knapsack"](options, least - 1)


def test_ternary_weights_have_three_values_a_group(nb):
    weight = torch.randn(32, 128, generator=torch.manual_seed(0))
    quantized = nb["ternary"](weight)
    for group in quantized.unflatten(-1, (-1, 64)).flatten(0, 1):
        assert len(group.abs().unique()) <= 2
    assert (quantized - weight).norm() < weight.norm()
    assert torch.equal(nb["ternary"](0 * weight), 0 * weight)


@pytest.mark.parametrize("method", ["rounding", "gptq"])
def test_layers_that_read_one_input_may_be_stacked(nb, method):
    weight, hessian = layer()
    together = nb[method](weight, 3, 64, hessian)
    apart = torch.cat([nb[method](part, 3, 64, hessian) for part in weight.split([32, 64])])
    assert torch.isclose(together, apart, atol=1e-5).float().mean() > 0.99


FOLDER = ROOT / "notebooks" / "below_four_bits"


def lines(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_the_committed_full_run_is_whole():
    """Each model's rows once, with an interval around each mean and the windows that it comes from."""
    seen = set()
    for line in lines("full.jsonl"):
        key = (line["model"], line["group_size"], line["eval_tokens"], line["row"])
        assert key not in seen and line["device"] and line["date"]
        seen.add(key)
        windows = line["KL by window"]
        assert len(windows) == line["eval_tokens"] // 256 and np.isfinite(windows).all()
        assert line["low"] <= line["KL"] <= line["high"]
        assert line["KL"] == pytest.approx(sum(windows) / len(windows), rel=1e-6)
        assert math.isfinite(line["KL, pydoc"]) and 0 <= line["same top-1"] <= 1
        assert line["calibration"] and line["autoround_iters"] and line["needs text"] in (True, False)
        assert line["seconds"] is None, "other programs ran beside it: no time"


def test_a_model_was_measured_in_one_way_only():
    """Otherwise the picture of a model would join points of several group sizes, texts or devices."""
    ways = {}
    for line in lines("full.jsonl"):
        names = ("group_size", "eval_tokens", "device", "calibration", "autoround_iters")
        ways.setdefault(line["model"], set()).add(str([line[name] for name in names]))
    assert {model: len(each) for model, each in ways.items()} == dict.fromkeys(ways, 1)


def test_the_larger_model_has_all_rows_and_names_say_what_they_take(nb):
    wanted = {"model": "Qwen2.5-Coder-1.5B-Instruct", "group_size": 128, "eval_tokens": 4096}
    larger = nb["from_file"](wanted, ["bits per weight", "KL", "low", "high", "KL by window"])
    assert len(larger) == 37
    drawn = {row: line for row, line in larger.items() if nb["is_drawn"](row)}
    assert larger.keys() - drawn.keys() == {"ternary", "hqq-mixed-3"}
    table = nb["as_lines"](drawn)
    assert [row.rsplit("-", 1)[1] for row in table.index] == [str(bits) for bits in table["bits"]]
    for bits, row in nb["best_of"](table).items():
        assert table["KL"][row] == table[table["bits"] == bits]["KL"].min()
    assert nb["in_words"](table, ["gguf-linear-3"]) == "gguf-linear-3 with 0.218 at 3.44 bits"


def test_rows_of_another_model_or_group_size_are_not_read(nb):
    wanted = {"model": "SmolLM2-135M-Instruct", "group_size": 64, "eval_tokens": 4096}
    there = [line for line in lines("full.jsonl") if line["model"] == wanted["model"]]
    assert nb["from_file"](wanted, ["KL"]) == {line["row"]: {"KL": line["KL"]} for line in there} and len(there) == 37
    assert nb["from_file"](wanted | {"group_size": 128}, ["KL"]) == {}


def test_a_comparison_is_made_window_by_window(nb):
    def row(*windows):
        return {"KL": float(np.mean(windows)), "KL by window": list(windows)}

    rows = {"a-3": row(1.0, 2.0, 3.0, 4.0), "b-3": row(0.9, 1.9, 2.9, 3.9), "a-2": row(1.0, 9.0), "b-2": row(9.0, 1.0)}
    table = nb["versus"]({"b against a": ("b", "a")}, rows)
    assert table.loc["b against a", "3 bits"] == "-0.100 [-0.100, -0.100] better"
    assert table.loc["b against a", "2 bits"].endswith("not told apart")
    assert table.loc["b against a", "4 bits"] == "", "what is not measured is not compared"


def test_the_committed_study_is_whole():
    """Each setting of a model once, its KL between its best and its worst window."""
    seen = set()
    for line in lines("autoround_study.jsonl"):
        key = tuple(line[name] for name in ("model", "group_size", "start", "sample", "rows", "steps"))
        assert key not in seen and line["device"] and line["start"] in ("first", "anywhere")
        seen.add(key)
        assert line["low"] <= line["kl"] <= line["high"]
        assert line["best_window"] <= line["kl"] <= line["worst_window"]
