"""The size of a model's cache, counted on the cache layers that the model builds itself.

The model runs for two tokens on the meta device (shapes without data), and its cache layers are then grown to the context asked
for: windows, latents and recurrent states are what transformers really keeps, not what a formula expects.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING

from helpers.prediction.metamodel import build, frozen, quiet, thawed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROMPT = 2  # tokens of the run that shows what a cache layer holds


def cache_bytes(config: PreTrainedConfig, context: int, batch: int, cache_bits: int) -> int:
    """Bytes of the cache after `context` tokens of `batch` sequences, by the model's own cache layers."""
    numbers, as_they_are = _cache_numbers(frozen(config), context)
    return batch * (numbers * cache_bits // 8 + as_they_are)


@functools.lru_cache(maxsize=512)
def _cache_numbers(key, context):
    """(numbers in the model's dtype, bytes of what is kept in another dtype) for one sequence."""
    import torch
    from transformers import cache_utils as parts

    layers, repeats, others = _cache_layers(key, PROMPT)
    known = {
        parts.DynamicLayer, parts.DynamicSlidingWindowLayer, parts.DynamicIndexedLayer, parts.LinearAttentionLayer, parts.DummyLayer,
        parts.LinearAttentionAndFullAttentionLayer, parts.LinearAttentionAndSlidingWindowAttentionLayer,
    }  # fmt: skip
    if all(type(layer) in known for layer in layers):
        layers = [_grown(layer, context) for layer in layers]
    else:  # a cache that compresses what it holds: let the model write all tokens
        layers, repeats, others = _cache_layers(key, context)
    layers, repeats = [*layers, others], [*repeats, 1]
    tensors = [(tensor, times) for layer, times in zip(layers, repeats) for tensor in _tensors(layer)]
    plain = sum(times * tensor.numel() for tensor, times in tensors if tensor.dtype == torch.bfloat16)
    return plain, sum(times * tensor.nbytes for tensor, times in tensors if tensor.dtype != torch.bfloat16)


def _grown(layer, context):
    """The same layer after `context` tokens; recurrent and convolution states do not grow."""
    layer = copy.copy(layer)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or not keys.numel():
        return layer
    more = context - PROMPT  # prefixes that a model adds to the prompt are already in
    longer = [t.new_empty((*t.shape[:-2], max(0, t.shape[-2] + more), t.shape[-1])) for t in (keys, values)]
    layer.keys = layer.values = None
    layer.is_initialized = False
    layer.update(*longer)
    indexed = getattr(layer, "indexer_keys", None)
    if indexed is not None:
        layer.indexer_keys = indexed.new_empty((indexed.shape[0], max(0, indexed.shape[1] + more), indexed.shape[2]))
    return layer


def _tensors(value, seen=None):
    """Every tensor on the meta device that an object, list or dict holds, each once."""
    import torch

    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.is_meta and value.numel() > 1:
            yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each, seen)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each, seen)
    elif type(value).__module__.startswith("transformers") and not hasattr(value, "model_type"):
        yield from _tensors(vars(value), seen)


def _cache_layers(key, tokens):
    """(cache layers, how often each is there, what the cache holds beside them) after `tokens` tokens on the meta device.

    What is beside the layers are states, which do not grow.
    """
    config = thawed(key)
    model, _ = build(config)
    name = type(model).__name__
    text = model.config.get_text_config(decoder=True)
    if not getattr(text, "use_cache", True):
        text.use_cache = True
    repeats = _skip_repeated_blocks(model, text)
    grows = None
    try:
        cache = _run(model, tokens)
        grows = _grows(model, cache, tokens)  # asked here, where each kind of block runs once
        partial = repeats and len(getattr(cache, "layers", None) or ()) != sum(repeats.values())
    except Exception:  # a block needs another one's result
        partial = repeats is not None
        if not partial:
            raise _no_cache(name) from None
    if partial:  # run all blocks
        model, _ = build(config)
        repeats = None
        try:
            cache = _run(model, tokens)
            grows = _grows(model, cache, tokens) if grows is None else grows
        except Exception as error:
            raise _no_cache(name) from error
    if cache is None or grows:
        raise _no_cache(name)
    layers = getattr(cache, "layers", None) or []
    others = [value for each, value in vars(cache).items() if each != "layers"] if layers else [cache]
    if repeats is None:
        return list(layers), [1] * len(layers), others
    return [layers[index] for index in repeats], list(repeats.values()), others


def _grows(model, cache, tokens):
    """Whether a cache without layers grows with the context, in a way that only the model knows."""
    if cache is None or getattr(cache, "layers", None):
        return False
    return _sizes(cache) != _sizes(_run(model, 2 * tokens))


def _sizes(value):
    return [tensor.shape for tensor in _tensors(value)]


def _no_cache(name):
    return ValueError(f"the cache of {name} cannot be counted without running it: ask with context=0 for its weights")


def _run(model, tokens):
    import torch

    with quiet(), torch.inference_mode(), _without_data(), torch.device("meta"):
        ids = torch.zeros((1, tokens), dtype=torch.long)
        wanted = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        out = model(input_ids=ids, use_cache=True, **wanted)
    return next((out[name] for name in ("past_key_values", "cache_params", "state") if out.get(name) is not None), None)


def _skip_repeated_blocks(model, text):
    """Let one block of each kind run and the others repeat its answer: {index of the block: how many are of its kind}, or None.

    Kinds differ by class, by the shapes of their parameters, or by the layer of the cache that belongs to them.
    """
    from torch.nn import ModuleList
    from transformers import DynamicCache

    try:
        layers = DynamicCache(config=text).layers
    except Exception:
        return None
    blocks = next(
        (m for m in (model.get_decoder() or model).modules() if isinstance(m, ModuleList) and len(m) == len(layers)),
        None,
    )
    shared = any(getattr(text, "kv_sharing_modes", None) or ())
    if not blocks or shared or len({id(block) for block in blocks}) < len(blocks):
        return None
    first, repeats, answers = {}, {}, {}
    for index, (block, layer) in enumerate(zip(blocks, layers)):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        kind = type(block), type(layer), getattr(layer, "sliding_window", None), shapes
        where = first.setdefault(kind, index)
        repeats[where] = repeats.get(where, 0) + 1
        block.forward = functools.partial(_repeat if where < index else _remember, answers, where, block.forward)
    return repeats


def _remember(answers, where, forward, *args, **kwargs):
    answers[where] = forward(*args, **kwargs)
    return answers[where]


def _repeat(answers, where, forward, *args, **kwargs):
    return answers[where]


def _without_data():
    """Answers for the few calls that ask a tensor for its content, which one on the meta device does not have.

    No expert is hit, checks hold, lengths are 0: the shapes of the cache depend on none of these.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    asked, nonzero = (
        (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default),
        aten.nonzero.default,
    )

    class WithoutData(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (*asked, nonzero) and args[0].is_meta:
                if func is nonzero:
                    return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
                return True if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
            return func(*args, **(kwargs or {}))

    return WithoutData()
