"""Quality of a model under one fixed protocol: perplexity, and KL divergence and top-1 agreement against the untouched model.

The protocol: English text cut into windows of `context` tokens without overlap, each evaluated alone, every next token predicted from
those before it in its window (so context - 1 predictions a window). The text is the course's own: four genres, written for it, that
no method is ever calibrated, trained or tuned on. `pydoc` is the second text, for what was calibrated on its other topics. Numbers
are comparable only under one protocol, so token count, context length and text stand in every record.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from helpers import files, models

SPLITS = ("evaluation", "calibration", "training")
GENRES = ("news", "story", "dialogue", "explainer")
HELD_BACK = "letter"  # a fifth text: nothing was chosen by looking at it, so it can confirm an order of methods
FOLDER = files.NOTEBOOKS / "data" / "evaluation"
CHUNK = 16  # positions scored at once on a CPU: 16 x 49,152 floats stay in the cache


@dataclass(frozen=True)
class Scores:
    """Quality on some windows.

    perplexity      of the model itself
    kl_divergence   mean KL(reference || model) in nats per token; None without a reference, as all below
    kl_low, kl_high its 95 % confidence interval (bootstrap over the windows)
    top1_agreement  share of positions with the same most likely next token
    kl_by_window    mean KL of each window, float64 [windows]
    """

    perplexity: float
    kl_divergence: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    top1_agreement: float | None = None
    kl_by_window: numpy.ndarray | None = field(default=None, repr=False)

    def summary(self) -> dict[str, float | None]:
        """The three means, for tables: {"perplexity", "kl_divergence", "top1_agreement"}."""
        return {name: getattr(self, name) for name in ("perplexity", "kl_divergence", "top1_agreement")}

    def by_genre(self) -> dict[str, float]:
        """{genre: mean KL} for windows of the course's texts."""
        if self.kl_by_window is None:
            raise ValueError("these scores have no reference, so no KL by genre")
        count = len(GENRES)
        return {genre: float(self.kl_by_window[number::count].mean()) for number, genre in enumerate(GENRES)}


def interval(values: Sequence[float] | numpy.ndarray, draws: int = 4000) -> tuple[float, float]:
    """95 % confidence interval (low, high) of a mean: percentile bootstrap over `values` [n] (Efron 1979), with a fixed seed."""
    values = numpy.asarray(values, dtype=numpy.float64)
    picks = numpy.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = numpy.quantile(values[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def difference(first: Scores, second: Scores) -> tuple[float, float, float]:
    """(mean, low, high) of first's KL minus second's on the same windows: a paired bootstrap. first, second: `Scores`.

    An interval that holds zero means that these windows do not tell the two apart.
    """
    if first.kl_by_window is None or second.kl_by_window is None:
        raise ValueError("these scores have no reference, so there is no KL to compare")
    if first.kl_by_window.shape != second.kl_by_window.shape:
        raise ValueError(
            f"a paired difference needs the same windows: {len(first.kl_by_window)} and {len(second.kl_by_window)} were scored"
        )
    gaps = first.kl_by_window - second.kl_by_window
    return (float(gaps.mean()), *interval(gaps))


@dataclass(frozen=True)
class Reference:
    """What the untouched model predicts on the windows.

    file        float16 log-probabilities [positions, vocabulary] (rounding adds under 1e-5 to a KL divergence), open for reading: so
                another process that makes room in the cache cannot take them away
    top1        int64 [positions]
    perplexity  of the untouched model itself
    """

    file: BinaryIO
    top1: numpy.ndarray
    vocabulary: int
    perplexity: float

    @property
    def scores(self) -> Scores:
        """The untouched model against itself."""
        return Scores(self.perplexity, 0.0, 0.0, 0.0, 1.0)

    def log_probs(self, where: slice) -> numpy.ndarray:
        """float16 [positions, vocabulary] of a slice of positions, read when asked for: the whole would not fit small machines."""
        count = (where.stop - where.start) * self.vocabulary
        self.file.seek(2 * where.start * self.vocabulary)
        return numpy.fromfile(self.file, numpy.float16, count).reshape(-1, self.vocabulary)


def text(split: str = "evaluation", source: str = "pydoc") -> str:
    """English text of one split: "evaluation", "calibration" or "training".

    "news", "story", "explainer" and "letter" are the course's own and exist for evaluation only ("dialogue" needs a chat template:
    see `windows`). "pydoc" is Python's own documentation (`pydoc_data.topics`), there on every machine. Whole topics go to one
    split, by a hash of their name, and a paragraph that several topics share goes only to the first split in the order above: so
    nothing that is evaluated was calibrated or trained on. "wikitext-2" comes from the hub (test, validation and train parts).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    own = [genre for genre in (*GENRES, HELD_BACK) if genre != "dialogue"]
    if source in own:
        if split != "evaluation":
            raise ValueError(f"{source!r} is for evaluation only: what a method has seen says nothing about it")
        return (FOLDER / f"{source}.txt").read_text(encoding="utf-8").strip()
    if source == "wikitext-2":
        return _wikitext(split)
    if source != "pydoc":
        raise ValueError(f"source must be one of {', '.join([*own, 'pydoc', 'wikitext-2'])}, not {source!r}")
    from pydoc_data.topics import topics

    seen, parts = set(), {name: [] for name in SPLITS}
    for name in SPLITS:
        for topic in sorted(topics):
            if _topic_split(topic) != name:
                continue
            for paragraph in re.split(r"\n\s*\n", topics[topic]):
                key = " ".join(paragraph.split())
                if key and key not in seen:
                    seen.add(key)
                    parts[name].append(paragraph.strip("\n"))
    return "\n\n".join(parts[split])


def windows(
    tokenizer: Any, split: str = "evaluation", tokens: int = 8192, context: int = 256, source: str = "course"
) -> torch.Tensor:
    """Token ids of one text, int64 [tokens // context, context], spread evenly over it.

    source  "course" takes the four genres in turn (window i is of GENRES[i % 4], so any first few windows hold all four); one of
            them, "letter", "pydoc" or "wikitext-2" takes that text alone
    Raises ValueError if a text holds fewer tokens than asked for, or not one window.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens (one to predict the next from), got {context}")
    if source == "course":
        if tokens < context * len(GENRES):
            raise ValueError(
                f"tokens={tokens} is less than one window of context={context} for each of {', '.join(GENRES)}"
            )
        parts = [windows(tokenizer, split, tokens // len(GENRES), context, genre) for genre in GENRES]
        return torch.stack(parts, 1).flatten(0, 1)
    if tokens < context:
        raise ValueError(f"tokens={tokens} is less than one window of context={context}")
    ids = _dialogue_ids(tokenizer, split) if source == "dialogue" else _ids(tokenizer, text(split, source))
    have, want = len(ids) // context, tokens // context
    if have < want:
        raise ValueError(
            f"the {split} text of {source} holds {have} windows of {context} tokens, but {want} were asked for: use tokens={have * context} or less"
        )
    every = ids[: have * context].view(have, context)
    return every[torch.arange(want) * have // want].contiguous()


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", truncation=False, verbose=False).input_ids[0]


def _dialogue_ids(tokenizer, split):
    """The course's conversations as the model's own chat template writes them, one after the other; int64 [tokens]."""
    if split != "evaluation":
        raise ValueError("'dialogue' is for evaluation only: what a method has seen says nothing about it")
    conversations = json.loads((FOLDER / "dialogue.json").read_text(encoding="utf-8"))
    if tokenizer.chat_template:
        rows = [tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in conversations]
        return torch.tensor([token for row in rows for token in row])
    # A base model has no template: then roles are names before a colon.
    lines = [
        "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
        for messages in conversations
    ]
    return _ids(tokenizer, "\n\n".join(lines))


def score(
    model: torch.nn.Module, windows: torch.Tensor, reference: Reference | None = None, batch_size: int = 8
) -> Scores:
    """`Scores` of a causal language model on windows [n, context]; `reference` from `reference()` on windows that begin with these."""
    length = windows.shape[1] - 1
    nll, agree = 0.0, 0.0
    kl = numpy.zeros(len(windows))
    for targets, where, logits in _positions(model, windows, batch_size):
        scores = logits.float()
        norm = scores.logsumexp(-1, keepdim=True)
        nll += (norm - scores.gather(1, targets)).sum().item()
        if reference is None:
            continue
        expected = torch.from_numpy(reference.log_probs(where)).to(logits.device).float()
        probability = expected.exp()
        # The generalized KL divergence, with its mass terms: the stored log-probabilities are rounded, and without them the
        # rounding would enter at first order. In place, because these are passes over the whole vocabulary.
        window = where.start // length
        kl[window] -= probability.sum().item() - len(probability)
        kl[window] += expected.sub_(scores).add_(norm).mul_(probability).sum().item()
        top1 = torch.from_numpy(reference.top1[where]).to(logits.device)[:, None]
        agree += (scores.gather(1, top1) == scores.amax(-1, keepdim=True)).sum().item()
    count = len(windows) * length
    perplexity = math.exp(nll / count)
    if reference is None:
        return Scores(perplexity)
    return Scores(perplexity, float(kl.sum() / count), *interval(kl / length), agree / count, kl / length)


def reference(
    found: models.Found, windows: torch.Tensor, batch_size: int = 8, model: torch.nn.Module | None = None
) -> Reference:
    """The untouched model's predictions on the windows: computed once per model, device and windows, then read from the cache.

    found: `models.Found`; it is evaluated in `found.dtype` (float32 on a CPU, bfloat16 on a GPU). model: it, if it is loaded in that
    dtype already, untouched; otherwise a copy is loaded for this and let go. Takes 2 bytes of disk per
    position and vocabulary entry: 0.4 GB for 4,096 tokens and 49,152 entries.
    """
    folder = models.cache() / "baselines" / _fingerprint(found, windows)
    for attempt in range(3):
        with models.building(folder, _is_complete) as scratch:
            if scratch is not None:
                _prune(folder.parent, keep=6)
                _write_reference(found, windows, batch_size, scratch, model)
        try:
            return _read_reference(folder)
        except FileNotFoundError:  # another process removed the folder between these two steps: compute it again
            if attempt == 2:
                raise
    raise AssertionError("unreachable")


def _is_complete(folder):
    return all((folder / name).is_file() for name in ("log_probs.f16", "top1.npy", "facts.json"))


def _read_reference(folder):
    os.utime(folder)
    facts = json.loads((folder / "facts.json").read_text())
    top1 = numpy.load(folder / "top1.npy")
    file = (folder / "log_probs.f16").open("rb", buffering=0)
    made = Reference(file, top1, facts["vocabulary"], facts["perplexity"])
    weakref.finalize(made, file.close)
    return made


def _write_reference(found, windows, batch_size, folder, model: Any):
    from transformers import AutoModelForCausalLM

    if model is None:
        model = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.dtype).to(found.device)
    count, vocabulary = windows.shape[0] * (windows.shape[1] - 1), model.get_output_embeddings().weight.shape[0]
    models.require_disk(folder, 2 * count * vocabulary, "the baseline's predictions")
    top1, nll = numpy.empty(count, dtype=numpy.int64), 0.0
    with open(folder / "log_probs.f16", "wb") as file:
        for targets, where, logits in _positions(model, windows, batch_size):
            scores = logits.float().log_softmax(-1)
            nll -= scores.gather(1, targets).sum().item()
            scores.half().cpu().numpy().tofile(file)
            top1[where] = scores.argmax(-1).cpu().numpy()
    numpy.save(folder / "top1.npy", top1)
    facts = {"perplexity": math.exp(nll / count), "vocabulary": vocabulary, "model": found.name, "origin": found.origin}
    (folder / "facts.json").write_text(json.dumps(facts))


@torch.inference_mode()
def _positions(model, windows, batch_size):
    """Yield (targets [p, 1], slice into all positions, logits [p, vocabulary]) for a few positions at a time."""
    model.eval()
    device = next(model.parameters()).device
    size = CHUNK if device.type == "cpu" else 1024
    length = windows.shape[1] - 1
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(device)
        logits = model(input_ids=batch, use_cache=False).logits
        for row in range(len(batch)):
            first = (start + row) * length
            for left in range(0, length, size):
                right = min(left + size, length)
                yield (
                    batch[row, left + 1 : right + 1, None],
                    slice(first + left, first + right),
                    logits[row, left:right],
                )


def _topic_split(topic):
    fifth = int(hashlib.sha256(topic.encode()).hexdigest(), 16) % 5
    return {0: "evaluation", 1: "calibration"}.get(fifth, "training")


def _wikitext(split):
    from datasets import load_dataset

    part = {"evaluation": "test", "calibration": "validation", "training": "train"}[split]
    try:
        return "\n\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"])
    except Exception as error:
        raise models.HubUnreachable(
            f'wikitext-2 cannot be fetched ({type(error).__name__}). Use source="pydoc", which is always there.'
        ) from error


def _fingerprint(found, windows):
    """Changes with the model's weights, the windows, the dtype, the device and torch."""
    files = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(found.path).glob("*.safetensors")
    )
    where = str(Path(found.path).resolve())
    facts = [where, files, str(found.dtype), found.device, torch.__version__, list(windows.shape)]
    digest = hashlib.sha256(json.dumps(facts).encode() + windows.cpu().numpy().tobytes())
    return f"{found.name}-{digest.hexdigest()[:16]}"


def _prune(folder, keep):
    """Leave the `keep` most recently used baselines: each is close to a gigabyte.

    Another process may look at one of them now. So it first loses its name, in one step: it is there whole, or not at all. Where the
    system refuses that for a folder with open files (Windows), it stays.
    """
    used = {}
    for path in folder.glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            if path.is_dir():
                used[path] = path.stat().st_mtime
    for path in sorted(used, key=lambda path: used[path], reverse=True)[keep:]:
        with contextlib.suppress(OSError):
            path.rename(path.with_name(f".{path.name}.pruned-{os.getpid()}"))
    for path in folder.glob(".*.pruned-*"):
        shutil.rmtree(path, ignore_errors=True)
