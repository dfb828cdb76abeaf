"""Records: what is written can be read, what is not a measurement is refused."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import evaluation, files, models, records

FOUND = models.Found("/nowhere", "tiny", "local folder", "cpu")
NUMBERS = dict.fromkeys(records.NUMBERS, 1.0)


def arguments(numbers):
    """Fields of a record as `records.write` takes them: the qualities in one `Scores`."""
    quality = {name: numbers[name] for name in records.QUALITY}
    return {
        "scores": evaluation.Scores(**quality),
        **{name: value for name, value in numbers.items() if name not in quality},
    }


def write(folder, **changes):
    return records.write(
        folder, **{"method": "nf4", "notebook": "04", "found": FOUND, **arguments({**NUMBERS, **changes})}
    )


def test_written_and_read(tmp_path):
    record = write(tmp_path, perplexity=12.5, kl_divergence=None)
    assert records.read(tmp_path) == {"nf4": record}
    assert set(record) == set(records.FIELDS) and record["kl_divergence"] is None and record["in_domain"] is None
    assert record["versions"]["torch"].startswith("2.")


def test_scores_on_both_texts_are_written_with_what_they_were_measured_on(tmp_path):
    own, second = evaluation.Scores(12.0, 0.3, 0.2, 0.4, 0.8), evaluation.Scores(9.0, 0.1, 0.05, 0.15, 0.9)
    windows, pydoc = torch.zeros(8, 256, dtype=torch.long), torch.zeros(2, 256, dtype=torch.long)
    record = write_scores(tmp_path, windows=windows, scores=own, in_domain=(pydoc, second))
    assert {name: record[name] for name in records.QUALITY} == {name: getattr(own, name) for name in records.QUALITY}
    assert [record[name] for name in records.PROTOCOL] == [2048, 256, "course"]
    assert record["in_domain"] == {
        "text": "pydoc",
        "tokens": 512,
        "perplexity": 9.0,
        "kl_divergence": 0.1,
        "top1_agreement": 0.9,
    }
    assert records.read(tmp_path) == {"nf4": record}


def test_without_scores_nothing_is_claimed(tmp_path):
    record = write_scores(tmp_path)
    assert all(record[name] is None for name in (*records.QUALITY, *records.PROTOCOL, "in_domain"))


def write_scores(folder, **more):
    numbers = {name: 1.0 for name in records.NUMBERS if name not in records.QUALITY}
    return records.write(folder, method="nf4", notebook="04", found=FOUND, **numbers, **more)


@pytest.mark.parametrize("second", [{"text": "pydoc"}, 0.3, []])
def test_half_a_second_text_is_refused(tmp_path, second):
    record = write_scores(tmp_path)
    with pytest.raises(records.RecordError, match="in_domain must hold text, tokens"):
        records.check({**record, "in_domain": second})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, "12", True, [1]])
def test_what_is_no_measurement_is_refused(tmp_path, value):
    with pytest.raises(records.RecordError, match="perplexity"):
        write(tmp_path, perplexity=value)
    assert not (tmp_path / "records").exists()


def test_unknown_and_missing_fields(tmp_path):
    with pytest.raises(records.RecordError, match="unknown fields: speedup"):
        write(tmp_path, speedup=3)
    numbers = {name: 1 for name in records.NUMBERS if name != "weight_bytes"}
    with pytest.raises(records.RecordError, match="weight_bytes not given"):
        records.write(tmp_path, method="nf4", notebook="04", found=FOUND, **numbers)


@pytest.mark.parametrize("method", ["", "NF4", "../nf4", "nf4/x", None])
def test_method_names_are_file_names(tmp_path, method):
    with pytest.raises(records.RecordError, match="method"):
        write(tmp_path, method=method)


def test_share_above_one(tmp_path):
    with pytest.raises(records.RecordError, match="at most 1"):
        write(tmp_path, top1_agreement=1.2)


@pytest.mark.parametrize("bits", [1e-7, 0.4, 128])
def test_bits_that_no_format_has(tmp_path, bits):
    """A notebook once divided the gigabytes of another table by the parameters, and nothing noticed."""
    with pytest.raises(records.RecordError, match="bits_per_weight is .*; run 04.* again"):
        write(tmp_path, bits_per_weight=bits, weight_bytes=1.71)


def test_broken_file_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "records" / "broken.json").write_text('{"method": ')
    with pytest.raises(records.RecordError, match="broken.json"):
        records.read(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    files.write_text(target, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        files.write_text(target, "new")
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.json"]


IN_RANGE = dict.fromkeys(records.NUMBERS, st.one_of(st.none(), st.floats(0, 1), st.integers(0, 1)))


@given(st.fixed_dictionaries({}, optional=IN_RANGE | {"bits_per_weight": st.none() | st.floats(1, 32)}))
def test_any_record_in_range_survives_json(numbers):
    record = {
        "method": "m",
        "notebook": "n",
        "model": "m",
        "device": "d",
        "versions": {},
        **dict.fromkeys(records.PROTOCOL),
        **dict.fromkeys(records.NUMBERS),
        "in_domain": None,
        **numbers,
    }
    records.check(record)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_else_is_refused_with_a_record_error(value):
    with pytest.raises(records.RecordError):
        records.check(value)


def test_relative_folder_is_the_checkouts_inside_and_here_outside(tmp_path, monkeypatch):
    from helpers.publishing.pages import ROOT

    monkeypatch.chdir(ROOT / "notebooks")
    assert files.folder("build") == ROOT / "build"
    monkeypatch.chdir(tmp_path)
    assert files.folder("build") == tmp_path / "build"
