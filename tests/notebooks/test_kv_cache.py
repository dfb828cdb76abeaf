"""The quantized cache of notebook 11: groups of a range for each token or each channel, for heads and lengths of any size."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "notebooks" / "kv_cache"))
import cache_study  # noqa: E402

pytestmark = pytest.mark.notebook


@pytest.fixture(scope="module")
def grouped():
    """The notebook's function, for a model of one layer."""
    return cache_study.cells(SimpleNamespace(num_hidden_layers=1)).grouped


def test_the_study_takes_every_function_that_it_names(grouped):
    assert set(cache_study.CELLS) <= vars(cache_study.cells(SimpleNamespace(num_hidden_layers=1))).keys()
    rows = cache_study.caches(SimpleNamespace(num_hidden_layers=1), grouped)
    axes = {row: make().layers[0].axis_key for row, make in rows.items() if "keys per" in row}
    bits = {row: make().layers[0].nbits for row, make in rows.items() if "keys per" in row}
    assert axes == {row: -2 if row.endswith("channel") else -1 for row in axes} and len(axes) == 4
    assert bits == {row: int(row[0]) for row in bits}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([8, 32, 64]),
    st.sampled_from(["channel", "token"]),
    st.integers(1, 150),
    st.sampled_from([16, 64, 80, 96]),
)
def test_no_number_is_off_by_more_than_half_a_step(grouped, bits, group_size, keys_per, tokens, head_dim):
    layer = grouped(bits, group_size, keys_per=keys_per).layers[0]
    keys, values = torch.randn(2, 2, 3, tokens, head_dim, generator=torch.Generator().manual_seed(0)).unbind()
    layer.update(keys, values)
    axes = {"channel": -2, "token": -1}[keys_per], -1
    for states, packed, axis in zip(
        (keys, values), (layer._quantized_keys, layer._quantized_values), axes, strict=True
    ):
        restored, steps = layer._dequantize(packed), packed[1]
        assert restored.shape == states.shape
        widths = steps.expand(*steps.shape[:-1], group_size).flatten(-2)[..., : states.shape[axis]].movedim(-1, axis)
        assert ((restored - states).abs() <= 0.501 * widths + 1e-5).all()


def test_a_loud_channel_costs_the_others_only_with_a_range_for_each_token(grouped):
    keys = torch.randn(1, 1, 64, 32, generator=torch.Generator().manual_seed(0))
    keys[..., 0] += 300
    off = {}
    for keys_per in ("token", "channel"):
        layer = grouped(4, 32, keys_per=keys_per).layers[0]
        layer.update(keys, keys)
        off[keys_per] = (layer._dequantize(layer._quantized_keys) - keys)[..., 1:].abs().mean().item()
    assert off["channel"] < 0.15 < 0.5 < off["token"]


def test_a_name_that_is_no_direction_is_refused(grouped):
    with pytest.raises(KeyError, match="rows"):
        grouped(4, 32, keys_per="rows")


def test_a_cache_that_grows_token_by_token_keeps_all_of_them(grouped):
    layer = grouped(4, 32, residual=16).layers[0]
    seen = []
    for step in range(70):
        new = torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(step))
        seen.append(new)
        keys, values = layer.update(new, new)
        assert keys.shape[-2] == values.shape[-2] == step + 1
    assert (keys - torch.cat(seen, -2)).abs().mean() < 0.2
