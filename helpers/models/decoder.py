"""The decoder layers of a causal language model, whatever its family calls them and whatever else they are called with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.models.base import Found, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def layers(net: PreTrainedModel) -> torch.nn.ModuleList:
    """The `ModuleList` of decoder layers: `model.layers` of Llama, `transformer.h` of Falcon."""
    import torch

    base = net.base_model
    lists = [module for module in [*base.children(), *base.modules()] if isinstance(module, torch.nn.ModuleList)]
    return lists[0]


@dataclass
class Recorded:
    """One forward pass, layer by layer.

    states  the input of every decoder layer and the last one's output, [n, tokens, hidden] each
    others  the keyword arguments of every layer's call: masks and rotary embeddings
    ending  the modules behind the last layer, in order: the norm and the output head
    """

    layers: list
    states: list
    others: list
    ending: list

    def output_from(self, first: int, positions: slice = slice(None)) -> torch.Tensor:
        """Logits [n, positions, vocabulary], computed from layer `first` on; the layers before are those of the recorded pass."""
        hidden = self.states[first]
        for layer, others in zip(self.layers[first:], self.others[first:], strict=True):
            hidden = _tensor(layer(hidden, **others))
        hidden = hidden[:, positions]
        for module in self.ending:
            hidden = module(hidden)
        return hidden


def record(net: PreTrainedModel, ids: torch.Tensor) -> Recorded:
    """Run the model once on token ids [n, tokens] and note what reaches each layer. Call it under `torch.inference_mode()`."""
    found = layers(net)
    states, others, ending = [], [], []

    def entered(layer, inputs, keywords):
        keywords = dict(keywords)
        states.append(inputs[0] if inputs else keywords.pop("hidden_states"))
        others.append(keywords)

    def left(layer, inputs, output):
        states.append(_tensor(output))

    def followed(module, inputs):
        if len(states) > len(found):
            ending.append(module)

    outside = [
        module for module in [*net.base_model.children(), *net.children()] if module not in (found, net.base_model)
    ]
    handles = [layer.register_forward_pre_hook(entered, with_kwargs=True) for layer in found]
    handles += [found[-1].register_forward_hook(left), *(each.register_forward_pre_hook(followed) for each in outside)]
    try:
        net(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Recorded(list(found), states, others, ending)


def _tensor(output):
    return output[0] if isinstance(output, tuple) else output


def weight_names(folder: str | Path) -> list[str]:
    """The names of all tensors of a safetensors checkpoint, from the headers of its files."""
    from safetensors import safe_open

    names = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    return names


def one_weight(folder: str | Path, kind: str, layer: int) -> str:
    """The name of one weight of a decoder layer: of this kind (such as "mlp.up_proj") and layer where the model has it, else of the
    last layer, and of the last kind of its feed-forward part in the alphabet."""
    names = weight_names(folder)
    wanted = [name for name in names if f".{layer}." in name and name.endswith(f"{kind}.weight")]
    others = sorted(name for name in names if ".mlp." in name and name.endswith(".weight"))
    return (wanted or others[-1:] or [""])[0]


def require(found: Found, parts: Iterable[str], without: Iterable[str] = ()) -> None:
    """Raise ModelError unless the model's decoder layers have all these parts, such as "self_attn.q_proj", and none of `without`.

    Read from the names in its files: nothing is loaded.
    """
    names = weight_names(found.path)
    missing = [part for part in parts if not any(f".{part}.weight" in name for name in names)]
    extra = [part for part in without if any(f".{part}.weight" in name for name in names)]
    if missing or extra:
        said = [f"no {' and no '.join(missing)}"] * bool(missing) + [f"also {' and '.join(extra)}"] * bool(extra)
        raise ModelError(
            f"The layers of {found.name} have {', and '.join(said)}: this notebook works on layers as Llama, Mistral and Qwen2 have them. "
            'Take such a model, or model="smollm2-offline".'
        )
