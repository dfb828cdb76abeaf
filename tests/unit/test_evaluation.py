"""Evaluation: equal to the plain computation, splits without overlap, references cached."""

import copy
import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from helpers import evaluation, models


@pytest.fixture(scope="module")
def windows(tokenizer):
    return evaluation.windows(tokenizer, tokens=512, context=128, source="pydoc")


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


@pytest.fixture
def tiny(base, cache):
    """baseline(context): the `evaluation.reference` of a random model on windows of this length, in a cache of this test's own."""
    small = models.Found(str(base), "tiny", "made here", "cpu")
    return lambda context: evaluation.reference(small, torch.arange(4 * context).remainder(128).view(4, context))


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps folders with open files, so nothing is pruned here")
def test_a_baseline_in_use_outlives_its_folder(tiny, cache):
    """Another notebook may compute baselines of its own meanwhile, and only six are kept."""
    mine = tiny(8)
    (folder,) = (cache / "baselines").glob("tiny-*[!k]")
    before = mine.log_probs(slice(3, 9))
    for context in range(9, 16):
        tiny(context)
    assert not folder.exists() and (mine.log_probs(slice(3, 9)) == before).all()
    left = sorted(path for path in (cache / "baselines").iterdir() if path.is_dir())
    assert len(left) == 7, "six and the one that was made last"
    assert (tiny(8).log_probs(slice(3, 9)) == before).all() and folder.is_dir(), "it is computed again"


def test_a_baseline_that_vanishes_before_it_is_read_is_computed_again(tiny, monkeypatch):
    read, folders = evaluation._read_reference, []

    def vanishing(folder):
        folders.append(folder)
        if len(folders) == 1:
            shutil.rmtree(folder)
        return read(folder)

    monkeypatch.setattr(evaluation, "_read_reference", vanishing)
    assert tiny(8).perplexity > 1 and len(folders) == 2


@pytest.mark.parametrize("lost", ["log_probs.f16", "top1.npy", "facts.json"])
def test_a_baseline_with_a_lost_file_is_computed_again(tiny, cache, lost):
    before = tiny(8).log_probs(slice(0, 28))
    (file,) = (cache / "baselines").glob(f"*/{lost}")
    file.unlink()
    assert (tiny(8).log_probs(slice(0, 28)) == before).all()


def test_a_folder_that_another_process_prunes_at_the_same_time_is_no_error(tmp_path, monkeypatch):
    for number in range(8):
        (tmp_path / str(number)).mkdir()
    stat = Path.stat
    monkeypatch.setattr(
        Path,
        "stat",
        lambda path, **more: (
            stat(path, **more) if path.name != "3" else (_ for _ in ()).throw(FileNotFoundError(path.name))
        ),
    )
    evaluation._prune(tmp_path, keep=6)
    assert len(list(tmp_path.iterdir())) == 7


def test_splits_share_no_paragraph():
    parts = {
        split: {" ".join(p.split()) for p in re.split(r"\n\s*\n", evaluation.text(split))}
        for split in evaluation.SPLITS
    }
    assert all(len(part) > 100 for part in parts.values())
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert not parts[evaluation.SPLITS[a]] & parts[evaluation.SPLITS[b]]


def test_windows_are_fixed(tokenizer):
    """The protocol of every committed record: another digest means that no new number may be compared with an old one."""
    windows = evaluation.windows(tokenizer)
    assert windows.shape == (32, 256) and windows.dtype == torch.int64
    assert hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16] == "0f4892495e59d0cc"


def test_the_courses_windows_take_the_genres_in_turn(tokenizer):
    every = evaluation.windows(tokenizer, tokens=2048)
    assert every.shape == (8, 256)
    for number, genre in enumerate(evaluation.GENRES):
        alone = evaluation.windows(tokenizer, tokens=512, source=genre)
        assert torch.equal(every[number :: len(evaluation.GENRES)], alone), genre
    assert len(torch.unique(every, dim=0)) == len(every), "a window stands there twice"


@pytest.mark.parametrize("source", [*evaluation.GENRES, evaluation.HELD_BACK, "course"])
@pytest.mark.parametrize("split", ["calibration", "training"])
def test_the_courses_texts_are_for_evaluation_only(tokenizer, source, split):
    with pytest.raises(ValueError, match="for evaluation only"):
        evaluation.windows(tokenizer, split, tokens=1024, source=source)


# Intervals


def scored(kl):
    return evaluation.Scores(10.0, float(numpy.mean(kl)), *evaluation.interval(kl), 0.9, numpy.asarray(kl, dtype=float))


KL = numpy.random.default_rng(1).gamma(4.0, 0.1, 32)


def test_interval_holds_the_mean_narrows_with_more_windows_and_is_the_same_twice():
    low, high = evaluation.interval(KL)
    assert low < KL.mean() < high and (low, high) == evaluation.interval(KL)
    expected = 1.96 * KL.std() / len(KL) ** 0.5  # the normal approximation, close for 32 windows
    assert high - low == pytest.approx(2 * expected, rel=0.15)
    longer = evaluation.interval(numpy.tile(KL, 16))
    assert longer[1] - longer[0] == pytest.approx((high - low) / 4, rel=0.15)
    assert evaluation.interval([0.3] * 8) == pytest.approx((0.3, 0.3))


def test_a_paired_difference_of_the_same_scores_is_zero():
    assert evaluation.difference(scored(KL), scored(KL)) == (0, 0, 0)


def test_a_constant_shift_is_found_though_the_intervals_overlap():
    first, second = scored(KL + 0.01), scored(KL)
    assert first.kl_low < second.kl_high, "unpaired, nothing could be told"
    assert evaluation.difference(first, second) == pytest.approx((0.01, 0.01, 0.01))
    assert evaluation.difference(second, first)[2] < 0


def test_a_paired_difference_needs_the_same_windows():
    with pytest.raises(ValueError, match="the same windows: 32 and 31"):
        evaluation.difference(scored(KL), scored(KL[:-1]))


def test_by_genre_takes_every_fourth_window():
    found = scored([1, 2, 3, 4, 3, 4, 5, 6]).by_genre()
    assert found == {"news": 2, "story": 3, "dialogue": 4, "explainer": 5}


def test_windows_kl_and_interval_are_those_of_each_window_alone(net, windows, reference):
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.model.layers[3].mlp.down_proj.weight.mul_(1.2)
    scores = evaluation.score(other, windows, reference)
    expected, _ = plain(net, windows)
    actual, _ = plain(other, windows)
    alone = (expected.exp() * (expected - actual)).sum(-1).mean(-1).numpy()
    assert scores.kl_by_window == pytest.approx(alone, rel=5e-3)
    assert scores.kl_divergence == pytest.approx(scores.kl_by_window.mean())
    assert (scores.kl_low, scores.kl_high) == evaluation.interval(scores.kl_by_window)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be"),
        ({"source": "imdb"}, "source must be"),
        ({"tokens": 100, "context": 512, "source": "pydoc"}, "less than one window"),
        ({"tokens": 1023}, "one window of context=256 for each of news"),
        ({"tokens": 10**7}, "use tokens="),
        ({"context": 1}, "at least 2"),
    ],
)
def test_bad_windows_are_named(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluation.windows(tokenizer, **arguments)
