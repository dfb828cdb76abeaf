"""LLM.int8() as notebook 01 writes it, against bitsandbytes, on more inputs than the notebook's one layer."""

import bitsandbytes as bnb
import pytest
import torch
from test_checkpoints import cells

llm_int8 = cells("01_ptq_dynamic_int8", "def llm_int8").llm_int8


def library(weight, threshold=6.0):
    layer = bnb.nn.Linear8bitLt(*weight.T.shape, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").eval()


def inputs(tokens, outliers, seed=0):
    """Inputs and a weight that float16 holds, with some columns that reach beyond the threshold in a few tokens."""
    torch.manual_seed(seed)
    x, weight = torch.randn(tokens, 96), torch.randn(40, 96)
    for column in range(outliers):
        x[column % tokens, 7 * column] = 50.0 + column
    return x.half().float(), weight.half().float()


@pytest.mark.parametrize(("tokens", "outliers"), [(33, 0), (33, 1), (33, 9), (5, 3)])
def test_from_scratch_is_the_library(tokens, outliers):
    x, weight = inputs(tokens, outliers)
    torch.testing.assert_close(llm_int8(x, weight), library(weight)(x), rtol=1e-4, atol=1e-3)


def test_a_token_scale_counts_ordinary_values_of_outlier_columns():
    """What the paper's text leaves open: only the outliers are left out of a token's scale, not their whole columns."""
    x, weight = inputs(8, 1)
    x[3, 0] = 5.5  # below the threshold, in the outlier's column, and the largest of its token
    whole_column = x.masked_fill((x.abs() >= 6).any(0), 0)
    assert x[3].abs().max() > whole_column[3].abs().max()
    torch.testing.assert_close(llm_int8(x, weight), library(weight)(x), rtol=1e-4, atol=1e-3)


def test_in_training_mode_the_library_rounds_no_input():
    x, weight = inputs(33, 2)
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    torch.testing.assert_close(library(weight).train()(x), x @ rounded.T, rtol=1e-3, atol=1e-2)
