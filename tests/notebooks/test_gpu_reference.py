"""The committed results of the GPU: their form, that they agree with each other, what they must show, and that README tells just them."""

import json
import re
import sys
from datetime import date

import pytest
import torch
from conftest import ROOT

import helpers.publishing.reference
from helpers import memory, models

FOLDER = ROOT / "notebooks" / "gpu"
sys.path.insert(0, str(FOLDER))
import ladders  # noqa: E402
import reference  # noqa: E402
import summary  # noqa: E402

RECORD = summary.read()
LADDER = {row["what"]: row for row in summary.ladder(RECORD)}
BEST = LADDER[summary.LADDER[-1][0]]


@pytest.fixture(scope="module")
def config():
    return models.mistral_config()


def numbers(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from numbers(inner, f"{path}/{index}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def test_form():
    facts = {"device", "vram_bytes", "driver", "date", "command", "model", "versions", "protocol"}
    assert facts <= RECORD.keys() <= facts | reference.STEPS.keys()
    assert (
        date.fromisoformat(RECORD["date"])
        and re.fullmatch(r"[\d.]+", RECORD["driver"])
        and RECORD["device"].startswith("NVIDIA")
    )
    assert RECORD["command"].startswith("python notebooks/gpu/reference.py")
    assert all(re.match(r"\d+\.\d+", version) for version in RECORD["versions"].values())
    assert not re.search(r"/(home|root|work|tmp|usr)/", json.dumps(RECORD)), "a machine's path"
    steps = {step: RECORD[step] for step in RECORD.keys() & reference.STEPS.keys()}
    for step in steps.values():
        assert step.keys() & {"device", "date"} in ({"device", "date"}, set()), (
            "a step of another device names it, and its day"
        )
    assert all(value >= 0 for _, value in numbers(steps)) and "failed" not in json.dumps(RECORD)


def test_bytes_are_bits_times_weights(config):
    sizes = memory.predict(config, bits=16)
    table = config.vocab_size * config.hidden_size
    head, linear = table, sizes.weights // 2
    expected = {
        "fp16, lean": 2 * (sizes.parameters - table),
        "int4 (torchao, tinygemm), lean": (linear + head) * (4 + 2 * 16 / 128) / 8,  # a scale and a zero for each 128
        "GPTQ format (gptqmodel, Marlin), lean": (linear + head) * (4 + 16 / 128) / 8,
        "NF4 (bitsandbytes), lean": linear * (4 + (8 + 32 / 256) / 64) / 8 + 2 * head,
    }
    for what, size in expected.items():
        assert LADDER[what]["bytes"] == pytest.approx(size, rel=0.003), what
    for name, row in RECORD["memory"].items():
        assert row["weight_bytes"] == pytest.approx(row["computed_bytes"], rel=0.03), name
        assert (
            row["weight_bytes"] <= row["loading_peak_bytes"] <= row["under"]
            and row["answering_peak_bytes"] <= row["under"]
        )


def test_speeds_stay_under_the_bandwidth_limit_and_agree_with_the_profile():
    for what, row in LADDER.items():
        assert 0 < row["share"] < 1 and row["batch 1"] < row["limit"], what
        assert row["batch 8"] is None or row["batch 1"] < row["batch 8"] < 8 * row["limit"], what
        if row["profile"]:
            profile = row["profile"]
            assert sum(profile["kinds"].values()) + profile["idle_s"] == pytest.approx(profile["token_s"], rel=0.02), (
                what
            )
        if "lean" in what:
            assert profile["token_s"] == pytest.approx(1 / row["batch 1"], rel=0.06), what
    gap = summary.gap(RECORD)
    assert all(value > 0 for value in gap.values()) and sum(gap.values()) == pytest.approx(
        BEST["profile"]["token_s"], rel=0.02
    )


def test_a_run_fits_a_card_with_the_drivers_context_beside_it():
    record = {"bandwidth": {"context_bytes": 5}}
    assert summary.fits(record, 10, 15) and not summary.fits(record, 11, 15)


def committed(monkeypatch, *kept):
    """Let results come with the course: (device, model, {method: KL})."""
    every = [
        helpers.publishing.reference.Reference(
            device,
            model,
            "2026-11-25",
            {
                name: {"method": name, "device": device, "model": model, "kl_divergence": kl, "eval_tokens": 8192}
                for name, kl in found.items()
            },
        )
        for device, model, found in kept
    ]
    monkeypatch.setattr(helpers.publishing.reference, "read", lambda: every)


def test_quality_is_compared_where_one_model_was_measured_on_both(monkeypatch):
    committed(
        monkeypatch,
        ("2 CPU cores, x86_64", "other (hub)", {"nf4": 0.1}),
        ("2 CPU cores, x86_64", "small (hub)", {"nf4": 0.30, "gptq": 0.200, "bf16": 0.001}),
        ("NVIDIA H100", "small (hub)", {"nf4": 0.33, "gptq": 0.201, "awq": 0.1}),
    )
    assert [(name, gpu["kl_divergence"], cpu["kl_divergence"]) for name, gpu, cpu in summary.both()] == [
        ("nf4", 0.33, 0.30),
        ("gptq", 0.201, 0.200),
    ]
    text = summary.quality()
    assert "an NVIDIA H100 with small and the CPU's 8,192 tokens" in text and "0.3300 for nf4 (CPU 0.3000)" in text
    assert "apart: nf4; [what" in text


def test_without_a_common_model_nothing_is_said_of_quality(monkeypatch):
    committed(
        monkeypatch, ("2 CPU cores, x86_64", "small (hub)", {"nf4": 0.3}), ("NVIDIA H100", "large (hub)", {"nf4": 0.1})
    )
    assert summary.both() == [] and summary.quality() is None
    assert "Quality:" not in summary.section(RECORD) and "\n\n\n" not in summary.section(RECORD)


def test_readme_says_what_the_record_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert summary.headline(RECORD) in readme, "run `python notebooks/gpu/summary.py`"
    assert summary.section(RECORD) in (FOLDER / "README.md").read_text(encoding="utf-8"), (
        "run `python notebooks/gpu/summary.py`"
    )
    assert f"![{summary.alt(RECORD)}](notebooks/gpu/decode.png)" in readme
    assert summary.PICTURE.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without a GPU")
def test_a_step_that_fails_is_written_down(tmp_path):
    result = reference.run("bandwidth", timeout=120, log=tmp_path / "log")
    assert re.search("CUDA|NVIDIA", result["failed"]), result


def test_the_ladders_of_two_shapes():
    """Rows that stand side by side are of one device; no row is faster than its bytes allow; the README says what they say."""
    for step in ladders.SHAPES:
        found = RECORD[step]
        assert found["device"] == RECORD["fp8_matmul"]["device"]
        runs = [found, *([found["earlier"]] if "earlier" in found else [])]
        for there, label, row in [(each, *item) for each in runs for item in each["rows"].items()]:
            speeds = [batch["tokens_per_s"] for batch in row["batches"].values()]
            assert speeds == sorted(speeds), f"{label}: more requests give more tokens"
            one = row["batches"]["1"]
            assert one["low"] <= one["tokens_per_s"] <= one["high"], label
            assert one["share"] == pytest.approx(
                one["tokens_per_s"] * row["bytes"] / there["copy_bytes_per_s"], rel=1e-6
            )
            assert one["share"] < 1, label
    fp16 = RECORD["ladder_1_5b"]["rows"][ladders.FP16]["batches"]["1"]
    assert fp16["first_tokens_as_fp16"] == 32, "the lean loop answers as transformers does"
    assert ladders.section(RECORD) in (FOLDER / "README.md").read_text(encoding="utf-8")
