"""Weights on a low-bit grid: a checkpoint that was dequantized once is no fair base to quantize again.

Rounding to the grid that the weights lie on already costs nothing, so such a base flatters every method that shares the grid.
`rescale` moves a model off its grid and keeps its function.
"""

import torch

SPREAD = 0.35  # factors lie between exp(-0.35) and exp(0.35): 0.70 and 1.42


@torch.no_grad()
def rescale(model: torch.nn.Module, seed: int = 0) -> None:
    """Multiply channels by random factors, in place, so that the function stays and any grid goes.

    Four pairs a layer, by the names of the Llama family (Llama, Mistral, Qwen2): norm -> q, k, v; v -> o; norm -> gate, up;
    up -> down. Where the head is not tied to the embeddings also norm -> head. What comes second in a pair has its columns multiplied
    by s, what comes first its rows (and its bias) divided by s. s = exp(u), u uniform in [-0.35, 0.35], drawn from `seed`.
    A block of 32 weights of a row then has 32 factors. The embeddings keep their values: a look-up table has no input channels.

    model  a causal language model; float32, if the function shall stay to more than 3 digits
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        rescale_layer(layer, generator)
    rescale_head(model, generator)


@torch.no_grad()
def rescale_layer(layer: torch.nn.Module, generator: torch.Generator) -> None:
    """`rescale` for one decoder layer."""
    attention, mlp = layer.self_attn, layer.mlp
    _norm_to(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), generator)
    _norm_to(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), generator)
    s = _factors(attention.v_proj.out_features, generator)
    _divide_rows(attention.v_proj, s)
    # Each key-value head serves several query heads, which lie side by side in the input of o.
    repeats = attention.o_proj.in_features // attention.v_proj.out_features
    _multiply_columns(attention.o_proj, s.view(-1, attention.head_dim).repeat_interleave(repeats, 0).flatten())
    s = _factors(mlp.up_proj.out_features, generator)
    _divide_rows(mlp.up_proj, s)
    _multiply_columns(mlp.down_proj, s)


@torch.no_grad()
def rescale_head(model: torch.nn.Module, generator: torch.Generator) -> None:
    """`rescale` for final norm and head. A tied head is left alone: its columns are the embeddings' too."""
    if not model.config.tie_word_embeddings:
        _norm_to(model.model.norm, (model.lm_head,), generator)


def _factors(count, generator):
    return torch.empty(count).uniform_(-SPREAD, SPREAD, generator=generator).exp()


def _norm_to(norm, linears, generator):
    weight = norm.weight.float()
    # The norm is stored in bfloat16. Take the factor that leads to a bfloat16 number exactly, and its rounding costs nothing.
    drawn = _factors(len(weight), generator)
    divided = (weight / drawn).bfloat16().float()
    s = torch.where(weight == 0, drawn, weight / divided)
    norm.weight.copy_(divided)
    for linear in linears:
        _multiply_columns(linear, s)


def _divide_rows(linear, s):
    linear.weight.div_(s[:, None])
    if linear.bias is not None:
        linear.bias.div_(s)


def _multiply_columns(linear, s):
    linear.weight.mul_(s)  # computed in float32 whatever the weight is stored in
