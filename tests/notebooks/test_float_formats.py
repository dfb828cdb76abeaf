"""Notebook 09's casts and block formats against torch, torchao, gguf and compressed-tensors, bit for bit.

The functions are cut out of the notebook's source; nothing of them needs a model.
"""

import ast
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf")
pytest.importorskip("torchao")
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked  # noqa: E402
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx  # noqa: E402
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale  # noqa: E402

KEPT = {"at_the_top", "E4M3, E5M2, E2M1", "SEARCHED", "LARGEST"}
FUNCTIONS = set(
    "encode decode exponent_of blocks_of mx nvfp4 pack restore_mx restore_nvfp4 to_e2m1 to_int4 "
    "power_of_two half_precision e4m3_scale restore eight_bits per_token int4_with_zero_point packed "
    "restored_from".split()
)
DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}
RULES = ("floor", "ceil", "even", "rceil")
BITS16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).short()
both = pytest.mark.parametrize("name", DTYPES)


@pytest.fixture(scope="module")
def nb():
    tree = ast.parse((ROOT / "notebooks" / "source" / "09_float_formats.py").read_text(encoding="utf-8"))

    def wanted(node):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return node.name in FUNCTIONS | {"Kind"}
        if isinstance(node, ast.Assign):
            return ast.unparse(node.targets[0]).strip("()") in KEPT
        return isinstance(node, ast.ImportFrom) and node.module == "typing"

    space = {"torch": torch}
    exec(compile(ast.Module([node for node in tree.body if wanted(node)], []), "09", "exec"), space)
    assert FUNCTIONS <= space.keys(), FUNCTIONS - space.keys()
    return types.SimpleNamespace(**space)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).flatten()


# The casts


@both
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_cast_as_torch_casts_it(nb, name, source):
    values = BITS16.view(source)
    assert torch.equal(nb.encode(values, getattr(nb, name)), bits(values.to(DTYPES[name])))


@both
def test_all_256_codes_are_decoded_as_torch_decodes_them(nb, name):
    codes = torch.arange(256, dtype=torch.uint8)
    mine, theirs = nb.decode(codes, getattr(nb, name)), codes.view(DTYPES[name]).float()
    assert torch.equal(mine.isnan(), theirs.isnan())
    numbers = ~mine.isnan()
    assert torch.equal(mine[numbers].view(torch.int32), theirs[numbers].view(torch.int32)), "zeros keep their sign"


@both
def test_every_code_but_nan_comes_back(nb, name):
    codes = torch.arange(256, dtype=torch.uint8)
    values = nb.decode(codes, getattr(nb, name))
    numbers = ~values.isnan()
    back = nb.encode(values, getattr(nb, name))
    if name == "E5M2":
        numbers &= ~values.isinf() | (back == codes)
    assert torch.equal(back[numbers], codes[numbers])


@both
@given(st.integers(-(2**31), 2**31 - 1))
def test_any_float32_is_cast_as_torch_casts_it(nb, name, pattern):
    value = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
    assert nb.encode(value, getattr(nb, name)).item() == bits(value.to(DTYPES[name])).item()


@both
def test_ties_their_neighbours_and_what_overflows(nb, name):
    """All midpoints, one float32 below and above each, the limits and the special values."""
    values = nb.decode(torch.arange(128, dtype=torch.uint8), getattr(nb, name))
    values = values[values.isfinite()].double()
    middles = ((values[1:] + values[:-1]) / 2).float()
    last = (values[-1] + (values[-1] - values[-2]) / 2).float().reshape(1)
    near = [torch.nextafter(torch.cat([middles, last]), torch.tensor(way)) for way in (-torch.inf, torch.inf)]
    odd = torch.tensor([0.0, torch.inf, torch.nan, 1e-45, 1e-40, 3.4e38, 448, 464, 480, 57344, 61440, 65536])
    x = torch.cat([middles, last, *near, odd])
    x = torch.cat([x, -x])
    assert torch.equal(nb.encode(x, getattr(nb, name)), bits(x.to(DTYPES[name])))


def test_e2m1_is_torchaos_on_every_bfloat16_and_float16(nb):
    for source in (torch.float16, torch.bfloat16):
        values = BITS16.view(source).float()
        values = values[~values.isnan()]
        codes = nb.encode(values, nb.E2M1)
        assert torch.equal(codes, f32_to_f4_unpacked(values))
        assert torch.equal(nb.to_e2m1(values), f4_unpacked_to_f32(codes))
    every = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(nb.decode(every, nb.E2M1), f4_unpacked_to_f32(every))
    ends_and_ties = torch.tensor([torch.inf, -torch.inf, 0.25, 0.75, 1.25, 2.5, 5.0, -0.0])
    assert nb.encode(ends_and_ties, nb.E2M1).tolist() == [7, 15, 0, 2, 2, 4, 6, 8]


@given(st.integers(-(2**31), 2**31 - 1))
def test_any_float32_is_cast_to_e2m1_as_torchao_casts_it(nb, pattern):
    value = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
    if not value.isnan():
        assert nb.encode(value, nb.E2M1).item() == f32_to_f4_unpacked(value).item()


# Blocks


@st.composite
def weights(draw):
    """float32 [4, 128]: normal, with an outlier, a row of zeros or of one value, ties, scaled by 2**-90 to 2**70."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(4, 128, generator=generator)
    if draw(st.booleans()):
        x = (x * 4).round() / 4
    if draw(st.booleans()):
        x[0, draw(st.integers(0, 127))] *= 10.0 ** draw(st.integers(0, 6))
    if draw(st.booleans()):
        x[draw(st.integers(0, 3))] = draw(st.sampled_from([0.0, 1.0, -6.0, 7.9, 448.0]))
    return torch.ldexp(x, torch.tensor(draw(st.integers(-90, 70))))


@given(weights(), st.sampled_from(RULES), st.sampled_from(["E2M1", "E4M3", "E5M2"]))
def test_mx_is_torchaos_code_for_code(nb, weight, rule, element):
    kind, dtype = getattr(nb, element), DTYPES.get(element, torch.float4_e2m1fn_x2)
    scales, data = to_mx(weight, dtype, 32, ScaleCalculationMode[rule.upper()])
    codes, exponents = nb.mx(weight, kind, rule)
    assert torch.equal(exponents.flatten(), bits(scales))
    nonzero = (exponents > 0).expand_as(codes)
    mine = torch.where(nonzero, codes, 0)
    halves = torch.stack([bits(data) & 15, bits(data) >> 4], 1)
    theirs = (halves if element == "E2M1" else bits(data)).view_as(codes)
    assert torch.equal(mine, torch.where(nonzero, theirs, 0))
    assert not (codes & (7 if element == "E2M1" else 0x7F))[~nonzero].any(), "a block of zeros has other codes"


@given(weights().filter(lambda weight: weight.abs().max() > 0))
def test_nvfp4_is_torchaos_code_for_code(nb, weight):
    theirs = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))
    codes, scales, tensor_scale = nb.nvfp4(weight)
    assert torch.equal(bits(scales), bits(theirs.scale)) and torch.equal(nb.pack(codes), theirs.qdata.flatten())
    assert torch.allclose(nb.restore_nvfp4(weight), theirs.dequantize(torch.float32), rtol=1e-6, atol=0)


@given(weights())
def test_mxfp4_is_ggufs_but_for_halfway_cases_and_negative_zeros(nb, weight):
    data = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.MXFP4)).reshape(-1, 17)
    codes, exponents = nb.mx(weight)
    nonzero = weight.reshape(-1, 32).abs().amax(1) > 0
    assert torch.equal(data[nonzero, :1], exponents[nonzero])
    theirs = torch.cat([data[:, 1:] & 15, data[:, 1:] >> 4], 1)
    scaled = torch.ldexp(weight.reshape(-1, 32), 127 - exponents.int()).abs()
    ties = torch.isin(scaled, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))
    plain = ~ties & nonzero[:, None]
    assert torch.equal(theirs[plain], torch.where(codes == 8, 0, codes)[plain])


def test_gguf_decodes_our_mxfp4(nb):
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    codes, exponents = nb.mx(weight)
    data = torch.cat([exponents, codes[:, :16] | codes[:, 16:] << 4], 1).numpy()
    assert np.array_equal(
        gguf.dequantize(data, gguf.GGMLQuantizationType.MXFP4).reshape(8, 256), nb.restore_mx(weight).numpy()
    )


@pytest.mark.parametrize(("method", "preset"), [("nvfp4", "NVFP4A16"), ("mxfp4", "MXFP4A16")])
def test_compressed_tensors_unpacks_what_the_notebook_packs(nb, method, preset):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    unpacker = {"nvfp4": NVFP4PackedCompressor, "mxfp4": MXFP4PackedCompressor}[method]
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    theirs = unpacker.decompress(nb.packed(method, weight), preset_name_to_scheme(preset, ["Linear"]))["weight"]
    assert torch.equal(theirs, nb.restored_from(method, weight).to(theirs.dtype))


@pytest.mark.parametrize("size", [16, 32])
def test_rows_that_do_not_divide_are_refused_in_one_line(nb, size):
    with pytest.raises(ValueError, match=rf"^rows of 40 do not divide into blocks of {size}$"):
        nb.blocks_of(torch.zeros(2, 40), size)


@given(weights())
def test_a_search_never_makes_a_block_worse(nb, weight):
    def error(size, *arguments):
        return (nb.restore(weight, size, *arguments) - weight).reshape(-1, size).square().sum(1)

    for size, arguments in ((16, (nb.to_e2m1, 6, nb.half_precision)), (32, (nb.to_int4, 7, nb.half_precision))):
        scaled = weight / weight.abs().max().clamp(min=1e-30)  # float16 scales reach down to 6e-8
        weight = torch.where(scaled.isfinite(), scaled, 0)
        assert (error(size, *arguments, nb.SEARCHED) <= error(size, *arguments)).all()


def test_a_zero_point_reaches_from_the_smallest_to_the_largest(nb):
    weight = torch.linspace(-1, 2, 32).reshape(1, 32)
    restored = nb.int4_with_zero_point(weight)
    assert len(restored.unique()) == 16 and torch.allclose(restored[0, [0, -1]], weight[0, [0, -1]], atol=1e-3)


def test_integers_round_to_the_even_one_and_stay_in_range(nb):
    assert nb.to_int4(torch.tensor([0.5, 1.5, -9.0, 6.6])).tolist() == [0, 2, -7, 7]
    x = torch.tensor([[1.0, -127.0, 0.4]])
    assert nb.per_token(x, "INT8").tolist() == [[1, -127, 0]]
    assert torch.equal(nb.per_token(448 * x, "E4M3"), (448 * x / 127).to(torch.float8_e4m3fn).float() * 127)
    assert not nb.per_token(torch.zeros(2, 4), "E4M3").any(), "a row of zeros stays zeros"
