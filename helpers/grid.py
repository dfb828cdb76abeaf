"""Weights on a low-bit grid: a checkpoint that was dequantized once is no fair base to quantize again.

Rounding to the grid that the weights lie on already costs nothing, so such a base flatters every method that shares the grid.
`find` tells such a checkpoint, `rescale` moves a model off its grid and keeps its function.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LEVELS = 16  # what 4 bits can tell apart
BLOCK_SIZES = (128, 64, 32)
LOOKUPS = re.compile(r"embed|wte|wpe|norm|^shared\.")  # of these names no matrix is multiplied with
FLOATS = {"F64", "F32", "F16", "BF16"}
SLABS = 4  # pieces of a tensor that are read, evenly spread
ROWS = 16  # of a piece whose blocks lie along its rows
SQUARE = (256, 32)  # of a piece whose blocks lie along its columns

SPREAD = 0.35  # factors lie between exp(-0.35) and exp(0.35): 0.70 and 1.42


@dataclass(frozen=True)
class Grid:
    """What `find` found.

    tensors     names of the Linear weights on a grid of 16 or fewer levels a block
    looked_at   number of Linear weights that were looked at
    block_size  largest size whose blocks all have 16 or fewer distinct values, on each of these tensors; 0 without any
    distinct    largest number of distinct values in such a block; 0 without any
    """

    tensors: tuple[str, ...]
    looked_at: int
    block_size: int
    distinct: int

    @property
    def share(self) -> float:
        """The part of the Linear weights that lie on a grid, from 0 to 1."""
        return len(self.tensors) / self.looked_at if self.looked_at else 0.0

    def __str__(self):
        if not self.tensors:
            return f"None of the {self.looked_at} Linear weights lies on a grid of {LEVELS} levels or fewer."
        return (
            f"{len(self.tensors)} of {self.looked_at} Linear weights lie on a low-bit grid: blocks of {self.block_size} hold "
            f"at most {self.distinct} distinct values (first of them: {self.tensors[0]})."
        )


def find(folder: str | Path) -> Grid:
    """Which Linear weights of a safetensors checkpoint lie on a low-bit grid; a sample is read, never a whole tensor.

    Of each tensor of two or more dimensions (fused and stacked ones too) four pieces of 16 rows are read, evenly spread, or, where
    blocks lie along the columns, pieces of 256 x 32. A tensor lies on a grid if every whole block of 128, 64 or 32 of the sample has 16 or
    fewer distinct values, and most blocks show it: values come back, are not mostly zeros, and are further apart than the numbers of
    their floating-point format (weights near 1.0 have few bfloat16 numbers to choose from). Embeddings and packed integers are passed over.
    """
    from safetensors import safe_open

    folder = Path(folder)
    on_grid, looked_at = {}, 0
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():
                tensor = checkpoint.get_slice(name)
                if LOOKUPS.search(name) or tensor.get_dtype() not in FLOATS or len(tensor.get_shape()) < 2:
                    continue
                looked_at += 1
                if levels := _levels(tensor):
                    on_grid[name] = levels
    sizes, counts = zip(*on_grid.values()) if on_grid else ((0,), (0,))
    return Grid(tuple(sorted(on_grid, key=_numbers_as_numbers)), looked_at, min(sizes), max(counts))


def _weight_files(folder):
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


def _numbers_as_numbers(name):
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def _levels(tensor):
    """(block size, largest number of distinct values) of a safetensors slice that lies on a grid, else None."""
    for rows in (_rows, _columns):
        sample = rows(tensor)
        for size in BLOCK_SIZES:
            distinct = _distinct_on_grid(sample, size)
            if distinct:
                return size, distinct
    return None


def _rows(tensor):
    """A sample of whole rows, [rows, in]."""
    *stack, height, _ = tensor.get_shape()
    pieces = [tensor[(*place, slice(start, start + ROWS))] for place, start in _places(stack, height, ROWS)]
    return torch.cat(pieces).float()


def _columns(tensor):
    """A sample of pieces of columns, [columns, in]: for layers that store their weight as [in, out]."""
    height, width = SQUARE
    *stack, full_height, full_width = tensor.get_shape()
    column = (full_width - min(width, full_width)) // 2
    part = slice(column, column + width)
    pieces = [
        tensor[(*place, slice(start, start + height), part)] for place, start in _places(stack, full_height, height)
    ]
    return torch.cat([piece.mT for piece in pieces]).float()


def _places(stack, height, rows):
    """SLABS pairs of an index into the leading dimensions and the first of `rows` rows, without repetition."""
    steps = [number / (SLABS - 1) for number in range(SLABS)]
    # Blocks start at multiples of their size, and so do the pieces.
    last = max(0, height - rows) // rows * rows
    return list(
        dict.fromkeys(
            (tuple(round(step * (size - 1)) for size in stack), round(step * last / rows) * rows) for step in steps
        )
    )


def _distinct_on_grid(sample, size):
    """The largest number of distinct values in blocks of this size of [rows, in]; 0 if they lie on no grid."""
    blocks = sample[:, : sample.shape[1] // size * size].reshape(-1, size).sort().values
    if not len(blocks):
        return 0
    distinct = 1 + (blocks.diff() != 0).sum(1)
    if distinct.max() > LEVELS:
        return 0
    zeros = (blocks == 0).sum(1)
    other = distinct - (zeros > 0).int()  # distinct values that are not zero
    come_back = 3 * other <= 2 * (size - zeros)
    apart = _representable(blocks) >= 4 * distinct
    shows = (distinct > 1) & come_back & apart
    return int(distinct.max()) if shows.float().mean() > 0.5 else 0


def _representable(blocks):
    """How many floating-point numbers lie between smallest and largest value of each sorted block, in the shortest format that holds all."""
    for dtype, integer in ((torch.bfloat16, torch.int16), (torch.float16, torch.int16), (torch.float32, torch.int32)):  # noqa: B007 - the last one is used below
        short = blocks.to(dtype)
        if torch.equal(short.float(), blocks):
            break
    ends = short[:, [0, -1]].contiguous().view(integer).long()
    # The bits of a float are sign and magnitude: below zero they count backwards.
    ordered = torch.where(ends < 0, torch.iinfo(integer).min - ends, ends)
    return ordered[:, 1] - ordered[:, 0]


@torch.no_grad()
def rescale(model: Any, seed: int = 0) -> None:
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
def rescale_layer(layer: Any, generator: torch.Generator) -> None:
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
def rescale_head(model: Any, generator: torch.Generator) -> None:
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
