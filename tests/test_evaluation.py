"""Evaluation: equal to the plain computation, splits without overlap, references cached."""

import copy
import re

import pytest
import torch

from helpers import evaluation


@pytest.fixture(scope="module")
def windows(tokenizer):
    return evaluation.windows(tokenizer, tokens=512, context=128)


@pytest.fixture(scope="module")
def reference(found, windows):
    return evaluation.reference(found, windows)


@torch.inference_mode()
def plain(model, windows):
    """The definitions, without chunks and in float64."""
    logits = model(windows).logits[:, :-1].double()
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(-1, windows[:, 1:, None]).mean()
    return log_probs, nll.exp().item()


def test_the_untouched_model_agrees_with_itself(net, windows, reference):
    scores = evaluation.score(net, windows, reference)
    assert abs(scores.kl_divergence) < 1e-5 and scores.top1_agreement == 1
    assert scores.perplexity == pytest.approx(reference.perplexity, rel=1e-5)


def test_scores_equal_the_plain_computation(net, windows, reference):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.model.layers[3].parameters():
            parameter.mul_(1.1)
    scores = evaluation.score(other, windows, reference, batch_size=3)
    expected, _ = plain(net, windows)
    actual, perplexity = plain(other, windows)
    kl = (expected.exp() * (expected - actual)).sum(-1).mean().item()
    assert scores.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert scores.kl_divergence == pytest.approx(kl, rel=2e-3)
    assert scores.top1_agreement == (expected.argmax(-1) == actual.argmax(-1)).double().mean().item()


def test_the_first_windows_alone_take_the_same_reference(net, windows, reference):
    scores = evaluation.score(net, windows[:2], reference)
    assert abs(scores.kl_divergence) < 1e-5 and scores.top1_agreement == 1
    assert evaluation.score(net, windows[2:], reference).kl_divergence > 1, "these are other predictions"


def test_without_a_reference_only_perplexity(net, windows):
    scores = evaluation.score(net, windows)
    assert scores.kl_divergence is None and scores.top1_agreement is None and scores.perplexity > 1


def test_batch_size_does_not_matter(net, windows, reference):
    one, all_rows = (evaluation.score(net, windows, reference, batch_size=size) for size in (1, 4))
    assert one.perplexity == pytest.approx(all_rows.perplexity, rel=1e-5)


def test_reference_is_read_from_the_cache_the_second_time(found, windows, reference, monkeypatch):
    monkeypatch.setattr(evaluation, "_write_reference", lambda *_: pytest.fail("computed again"))
    again = evaluation.reference(found, windows)
    assert again.perplexity == reference.perplexity and (again.top1 == reference.top1).all()


def test_splits_share_no_paragraph():
    parts = {split: {" ".join(p.split()) for p in re.split(r"\n\s*\n", evaluation.text(split))} for split in evaluation.SPLITS}
    assert all(len(part) > 100 for part in parts.values())
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert not parts[evaluation.SPLITS[a]] & parts[evaluation.SPLITS[b]]


def test_windows_are_fixed(tokenizer):
    first, second = evaluation.windows(tokenizer), evaluation.windows(tokenizer)
    assert first.shape == (8, 512) and torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be"),
        ({"source": "imdb"}, "source must be"),
        ({"tokens": 100, "context": 512}, "less than one window"),
        ({"tokens": 10**7}, "use tokens="),
        ({"context": 1}, "at least 2"),
    ],
)
def test_bad_windows_are_named(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluation.windows(tokenizer, **arguments)
