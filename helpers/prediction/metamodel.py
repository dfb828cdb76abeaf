"""A model's parameters, counted on the meta device: shapes without data, so nothing is downloaded and no weight is allocated."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers.prediction.own_formats import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


Key = tuple[type, str]  # a config class and its content as JSON


@dataclass(frozen=True)
class Shape:
    """What was counted on the meta device."""

    model: str
    parameters: int
    weights: tuple[Weight, ...]
    notes: tuple[str, ...]


def frozen(config: PreTrainedConfig) -> Key:
    """Config class and content, hashable; without the checkpoint's own format, which changes no shape."""
    content = config.to_dict()
    content.pop("quantization_config", None)
    for part in content.values():
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    return type(config), json.dumps(content, sort_keys=True, default=str)


def thawed(key: Key) -> PreTrainedConfig:
    """The config that `frozen` made this key of."""
    kind, content = key
    return kind.from_dict(json.loads(content))


def build(config: PreTrainedConfig) -> tuple[Any, list[str]]:
    """(model on the meta device, notes): what AutoModelForCausalLM loads, else the text part of a model of several kinds of input."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text = config.get_text_config(decoder=True)
    name = type(config).__name__
    # The text config on its own first: a class for images and text may tie what the text config does not.
    attempts = [(AutoModelForCausalLM, config), (AutoModelForCausalLM, text), (AutoModelForImageTextToText, config)]
    reasons = []
    for auto, asked in attempts:
        if type(asked) not in auto._model_mapping:
            continue
        try:
            with quiet(), torch.device("meta"):
                model = auto.from_config(asked, dtype=torch.bfloat16).eval()
        except (
            ImportError,
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            KeyError,
            AssertionError,
            IndexError,
        ) as error:
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
            continue
        return model, _about_text(model, config, text, auto, asked)
    if reasons:
        raise ValueError(
            f"{name} does not describe a model that transformers can build ({reasons[0]}): look at its fields"
        )
    raise ValueError(
        f"{name} (model_type {config.model_type!r}) is no causal language model that transformers knows: take another config"
    )


def _about_text(model, config, text, auto, asked):
    if text is config:
        return []
    name = type(config).__name__
    if auto.__name__ != "AutoModelForCausalLM" or asked is text:
        return [
            f"{name} is a model of several kinds of input (vision-language and the like): this counts its text part only; "
            "AutoModelForCausalLM does not load the whole"
        ]
    whole, part = (sum(p.numel() for p in parameters) for parameters in (model.parameters(), _text_parameters(model)))
    if part < whole:
        return [
            f"{name} has a part for other inputs: this counts all that AutoModelForCausalLM loads, "
            f"{whole / 1e9:.2f} billion parameters, of which the text part has {part / 1e9:.2f}"
        ]
    return [
        f"{name} is a model of several kinds of input: this counts its text part, which is all that AutoModelForCausalLM loads"
    ]


def _text_parameters(model):
    """Parameters of the decoder and of its output head, each once."""
    head = model.get_output_embeddings()
    found = {id(p): p for module in (model.get_decoder(), head) if module is not None for p in module.parameters()}
    return found.values()


@functools.lru_cache(maxsize=64)
def count(key: Key) -> Shape:
    """Parameters and quantizable matrices of the model that this key (`frozen`) describes."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.pytorch_utils import Conv1D

    config = thawed(key)
    model, notes = build(config)
    whole = type(config) in AutoModelForImageTextToText._model_mapping and notes and "text part only" in notes[0]
    part = model.get_decoder() if whole else model
    parameters = _text_parameters(model) if whole else model.parameters()
    output = model.get_output_embeddings()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    weights, seen = [], set()
    for name, module in part.named_modules():
        if module is output:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or id(parameter) in embeddings:
                continue
            path = f"{name}.{own}"
            if own == "weight" and isinstance(module, torch.nn.Linear) and parameter.ndim == 2:
                weight = Weight(name, parameter.numel(), parameter.shape[1], parameter.shape[0])
            elif own == "weight" and isinstance(module, Conv1D):
                weight = Weight(name, parameter.numel(), parameter.shape[0], parameter.shape[1])
            elif parameter.ndim == 3 and "expert" in (path + type(module).__name__).lower():
                inputs, outputs = (
                    parameter.shape[1:] if getattr(module, "is_transposed", False) else reversed(parameter.shape[1:])
                )
                weight = Weight(path, parameter.numel(), inputs, outputs, parameter.shape[0], fused=True)
            else:
                continue
            seen.add(id(parameter))
            weights.append(weight)
    return Shape(type(model).__name__, sum(p.numel() for p in parameters), tuple(weights), tuple(notes))


def first_line(error: Exception) -> str:
    """The first line of an error's text, shortened."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 160 else text[:157] + "..."


@contextmanager
def quiet() -> Iterator[None]:
    """No advice from transformers on a model that nobody is going to run, such as kernels to install."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
