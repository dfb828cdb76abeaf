"""Guards for fine-tuning on quantized weights: instruction files, target modules, gradients, checkpoints and adapters.

Training fails silently more often than loudly: gradients that never arrive, or an adapter on the wrong base, make no error, only a
model that is no better. What is checked here raises instead, and says what would help.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

# LoRA's two matrices: of each pair, the gradient of the first is zero for as long as the second is.
PARTNERS = {"lora_A": "lora_B", "lora_embedding_B": "lora_embedding_A"}


class GradientError(RuntimeError):
    """The backward pass left trainable tensors without a usable gradient; the message names them and the likely cause."""


class AdapterError(ValueError):
    """An adapter does not belong to this model, or is not complete."""


def check_gradients(model: torch.nn.Module) -> int:
    """Raise GradientError unless every trainable tensor has a finite gradient that is not all zero; return how many there are.

    Call it after the first `loss.backward()`, before the optimizer steps and before `zero_grad()`. With a transformers Trainer,
    give it `gradient_check()` as a callback instead.

    One zero is right: LoRA adds B·A·x to a layer's output y, so the gradient of A is Bᵀ·(dL/dy)·xᵀ. B starts at zero, and until
    the optimizer has moved it, A's gradient is exactly zero. So A is let through for as long as its own B is all zero.
    """
    trainable = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    if not trainable:
        raise GradientError(
            "Nothing can be trained: no tensor has requires_grad=True. Add adapters with peft.get_peft_model, or load a saved one "
            "with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    missing, zero, broken = [], [], []
    for name, tensor in trainable.items():
        if tensor.grad is None:
            missing.append(name)
        elif not tensor.grad.isfinite().all():
            broken.append(name)
        elif not tensor.grad.any() and not _waits(name, trainable):
            zero.append(name)
    if not (missing or zero or broken):
        return len(trainable)
    kinds = {"have no gradient": missing, "have a zero gradient": zero, "have a gradient with NaN or infinity": broken}
    found = [f"{len(names)} {kind} (first: {', '.join(names[:3])})" for kind, names in kinds.items() if names]
    raise GradientError(
        f"Of {len(trainable)} trainable tensors, {'; '.join(found)}. Likely cause: {_cause(model, len(trainable), missing, zero)}"
    )


def gradient_check() -> TrainerCallback:
    """A callback for the transformers Trainer that runs `check_gradients` once, before the first step of the optimizer."""
    from transformers import TrainerCallback

    class GradientCheck(TrainerCallback):
        checked = None  # how many tensors, once it has run

        def on_pre_optimizer_step(self, args, state, control, model: Any = None, **_):
            if self.checked is None:
                self.checked = check_gradients(model)

    return GradientCheck()


def repacked(model: torch.nn.Module) -> list[str]:
    """Names of the bitsandbytes layers whose 4-bit weights an inference pass on a CPU rearranged: they pass no gradient on."""
    return [
        name
        for name, module in model.named_modules()
        if not hasattr(module, "base_layer")  # peft's wrapper shows the weight of the layer inside it
        and getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False)
    ]


def _waits(name, trainable):
    """True for LoRA's A while its B is still zero."""
    for first, second in PARTNERS.items():
        if first in name:
            partner = trainable.get(name.replace(first, second))
            return partner is not None and not partner.any()
    return False


def _cause(model, count, missing, zero):
    layers = repacked(model)
    if layers and (missing or zero):
        return (
            f"a forward pass in eval mode repacked {len(layers)} 4-bit weights for inference (first: {layers[0]}), and repacked weights "
            "pass no gradient on. Load the model again, and train before you generate or evaluate with it."
        )
    if len(missing) == count:
        return (
            "there was no backward pass yet, or zero_grad() came before this check; or, with reentrant gradient checkpointing, no "
            'input requires a gradient: use gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
    if missing:
        return "these tensors took no part in the forward pass, such as those of an adapter that is not active."
    if zero:
        return "the loss does not depend on them: a batch whose labels are all -100, a detached output, or gradients too small for float16."
    return "a batch whose labels are all -100 (its mean loss is 0/0), or an overflow: use bfloat16, or float16 with loss scaling."


def read_pairs(path: Path | str) -> tuple[list[dict[str, str]], list[str]]:
    """The pairs of a JSON-lines file with a "question" and an "answer" on each line: (pairs, problems).

    A broken line is left out, and `problems` says which one and why; all others are kept. Blank lines are fine. Raises ValueError
    if no pair is left.
    """
    path = Path(path)
    pairs, problems = [], []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            problems.append(f"{path.name}, line {number}: not UTF-8")
            continue
        except ValueError as error:
            problems.append(f"{path.name}, line {number}: not valid JSON ({error})")
            continue
        absent = [
            key
            for key in ("question", "answer")
            if not isinstance(pair, dict) or not isinstance(pair.get(key), str) or not pair[key].strip()
        ]
        if absent:
            problems.append(f"{path.name}, line {number}: no text under {' and '.join(map(repr, absent))}")
        else:
            pairs.append(pair)
    if not pairs:
        raise ValueError(
            f"{path.name} holds no question/answer pair"
            + (f"; the first problem: {problems[0]}" if problems else "")
            + "."
        )
    return pairs, problems


def check_targets(model: torch.nn.Module, target_modules: str | list[str]) -> str | list[str]:
    """Raise ValueError unless each of `target_modules` names a module of the model; the message lists the Linear layers there are.

    peft itself complains only when none of them matches, and then does not say what would. Returns `target_modules`.
    """
    import torch

    names = [name for name, _ in model.named_modules()]
    if isinstance(target_modules, str):
        missing = (
            []
            if target_modules == "all-linear" or any(re.fullmatch(target_modules, name) for name in names)
            else [target_modules]
        )
    else:
        missing = [
            target
            for target in target_modules
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
    if missing or not target_modules:
        linear = sorted(
            {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        )
        asked = ", ".join(map(repr, missing)) or "an empty list"
        raise ValueError(
            f"target_modules: nothing in this model is called {asked}. Its Linear layers are {', '.join(linear)}."
        )
    return target_modules


def last_checkpoint(folder: Path | str) -> str | None:
    """The newest complete checkpoint of a Trainer's output folder, as a text, or None.

    A process killed while it saves leaves a half-written folder, and the Trainer would take it for the last checkpoint. The
    Trainer writes trainer_state.json last, so a checkpoint is complete when that file is there and whole.
    """
    for path in sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def check_adapter(folder: Path | str, model: torch.nn.Module, name: str) -> None:
    """Raise AdapterError unless the LoRA adapter saved in `folder` belongs to `model`.

    model  the base, without adapters
    name   the base's name, as it was stored as `base_model_name_or_path` when the adapter was saved

    The name is compared, and the shape of each matrix with the layer it is for: on another model peft raises a long list of
    mismatches or, where the shapes happen to fit, nothing at all.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(
            f"{folder.name} holds no complete adapter ({error}). Save it again with save_pretrained."
        ) from error
    base = config.get("base_model_name_or_path")
    if base and Path(base).name != Path(name).name:
        raise AdapterError(
            f"This adapter was trained on {Path(base).name}, not on {name}: its matrices are corrections to other weights."
        )
    modules = dict(model.named_modules())
    for key, shape in shapes.items():
        path, _, matrix = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        size = {"lora_A": "in_features", "lora_B": "out_features"}.get(matrix)
        if size is None:
            continue
        if path not in modules:
            raise AdapterError(f"This adapter is for another model: there is no {path} in {name}.")
        wanted, here = shape[-1 if matrix == "lora_A" else 0], getattr(modules[path], size)
        if wanted != here:
            raise AdapterError(
                f"This adapter is for another model: its {path} has {size}={wanted}, that of {name} has {here}."
            )
