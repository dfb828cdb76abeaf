"""The claims ledger: claims as data, findings of notebooks and records, and verdicts that no interval contradicts."""

import ast
import json
import re
import shutil
from dataclasses import replace

import nbformat
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_records import NUMBERS

from helpers import files, models, records
from helpers.__main__ import main
from helpers.publishing import claims, pages, recorded, reference, verdicts

SOURCES, CLAIMS = claims.read()
BY_ID = {claim["id"]: claim for claim in CLAIMS}
CPU, GPU = "2 CPU cores, x86_64", "NVIDIA H100 80GB HBM3"
SMALL, LARGER, SHAPE = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-1.5B-Instruct", "mistral-7b-geometry (random weights)"
REFRESH = "run all notebooks, then `python -m helpers reference`"


# The data


def test_every_guide_has_claims_and_every_claim_its_guide():
    assert {claim["source"] for claim in CLAIMS} == set(SOURCES)


@pytest.mark.parametrize("claim", CLAIMS, ids=BY_ID)
def test_claim_is_well_formed(claim):
    assert 5 < len(claim["claim"]) < 110 and not claim["claim"].endswith(" .")
    assert claim["says"].format(value=1.0) and len(claim["why"]) > 10
    for side, sign in ((0, 1), (1, -1)):  # what holds lies inside what holds partly
        inner, outer = claim["holds"][side], claim.get("partly", claim["holds"])[side]
        assert outer is None or (inner is not None and sign * outer <= sign * inner)
    assert claim["library"] in ("", *records.PACKAGES)


def test_file_is_written_as_the_tool_writes_it():
    text = claims.PATH.read_text(encoding="utf-8")
    assert claims.dumps(json.loads(text)) == text


def claim(**changes):
    return {"id": "x", "claim": "a claim", "source": "000", "subject": {"kind": "behaviour", "model": "any", "device": "any"}, "library": "torch",
            "holds": [2, None], "partly": [1, None], "says": "{value:.1f} times", "why": "two", **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "009"}, "no source '009'"), ({"verdict": "maybe"}, "no such verdict"), ({"extra": 1}, "unknown fields"),
        ({"subject": {"kind": "opinion", "model": "any", "device": "any"}}, "subject needs"), ({"claim": None}, "missing fields"),
        ({"holds": [3, 2]}, "holds and partly"), ({"holds": [None, None]}, "holds and partly"), ({"why": ""}, "thresholds come from"),
    ],
)  # fmt: skip
def test_a_badly_written_claim_is_refused(tmp_path, change, message):
    written = {key: value for key, value in claim(**change).items() if value is not None}
    path = tmp_path / "claims.json"
    path.write_text(json.dumps({"sources": {"000": "a"}, "claims": [written]}))
    with pytest.raises(claims.ClaimError, match=message):
        claims.read(path)


def test_twice_the_same_id(tmp_path):
    path = tmp_path / "claims.json"
    path.write_text(json.dumps({"sources": {"000": "a"}, "claims": [claim()] * 2}))
    with pytest.raises(claims.ClaimError, match="twice"):
        claims.read(path)


def in_notebooks():
    """{id: notebooks} of the claims for which a notebook's source writes a finding."""
    found = {}
    for path in sorted((pages.FOLDER / "source").glob("*.py")):
        code = re.sub(r"^# %%explain.*$", "", path.read_text(encoding="utf-8"), flags=re.M)
        for node in ast.walk(ast.parse(code)):
            names = []
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "claims.finding"
                and isinstance(node.args[0], ast.Constant)
            ):
                names = [node.args[0].value]
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "claimed":
                names = [key.value for key in node.value.keys]
            for name in names:
                found.setdefault(name, []).append(path.stem)
    return found


def test_every_claim_has_something_that_measures_it():
    measured = {*in_notebooks(), *recorded.FROM_RECORDS, *recorded.FROM_GPU}
    assert measured - set(BY_ID) == set()
    assert set(BY_ID) - measured == {name for name, each in BY_ID.items() if "needs" in each}


def test_every_notebook_writes_its_findings_under_its_own_name():
    for path in sorted((pages.FOLDER / "source").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        assert f'claims.write(output_dir, notebook="{path.stem}", found=found, findings=' in code
        assert f'claims.table(output_dir, "{path.stem}")' in code


# Verdicts

NUMBER = st.floats(-10, 10).map(lambda number: round(number, 2))


@st.composite
def zones(draw):
    """(holds, partly): one open or closed zone in another."""
    a, b, c, d = sorted(draw(st.lists(NUMBER, min_size=4, max_size=4)))
    left, right = draw(st.booleans()), draw(st.booleans())
    holds, partly = [b, c], [a, d]
    if left and not right:
        holds[0] = partly[0] = None
    if right and not left:
        holds[1] = partly[1] = None
    return holds, draw(st.sampled_from([partly, None]))


@given(zones(), NUMBER, NUMBER)
def test_no_verdict_whose_interval_crosses_its_threshold(zone, first, second):
    holds, partly = zone
    low, high = sorted((first, second))
    word = verdicts.decide(claim(holds=holds, partly=partly) if partly else {"holds": holds}, low, high)
    edges = {edge for each in (holds, partly or holds) for edge in each if edge is not None}

    def at(value, each):
        return (each[0] is None or value >= each[0]) and (each[1] is None or value <= each[1])

    if word == verdicts.HOLDS:
        assert at(low, holds) and at(high, holds) and not any(low < edge < high for edge in edges & set(holds))
    elif word == verdicts.FAILS:
        assert not any(at(value, partly or holds) for value in (low, high)) and not any(
            low <= edge <= high for edge in edges
        )
    elif word == verdicts.PARTLY:
        assert (
            at(low, partly) and at(high, partly) and not any(low <= edge <= high for edge in holds if edge is not None)
        )
    else:
        assert word == verdicts.CLOSE and any(low <= edge <= high for edge in edges)


def finding(value=2.0, low=None, high=None, **changes):
    return verdicts.Finding(
        "x", value, low, high, **{"model": SMALL, "device": CPU, "versions": {"torch": "2.13"}, **changes}
    )


@pytest.mark.parametrize(("value", "word"), [(2, "holds"), (1.5, "holds partly"), (0.5, "does not hold")])
def test_verdict_of_an_exact_value(value, word):
    verdict = verdicts.judge(claim(), [finding(value)])
    assert (
        verdict.word == word
        and verdict.judged_on == f"{SMALL}, {CPU}, torch 2.13"
        and verdict.found == f"{value:.1f} times"
    )


@pytest.mark.parametrize(("value", "low", "high", "word"), [
    (2.5, 2.1, 2.9, "holds"), (2.5, 1.9, 3.1, "too close to call"), (1.5, 0.9, 1.9, "too close to call"), (0.5, 0.4, 0.6, "does not hold"),
    (2.3, None, None, "too close to call"), (2.6, None, None, "holds"), (0.9, None, None, "too close to call"), (0.8, None, None, "does not hold"),
])  # fmt: skip
def test_one_run_of_a_timer_gives_no_verdict_within_its_noise(value, low, high, word):
    speed = claim(subject={"kind": "speed", "model": "any", "device": "any"})
    assert verdicts.judge(speed, [finding(value, low, high)]).word == word


def about_7b(kind, device="any"):
    return claim(subject={"kind": kind, "model": "7B", "device": device})


@pytest.mark.parametrize(("kind", "device", "place", "fits"), [
    ("memory", "any", (SHAPE, GPU), True), ("memory", "any", (SMALL, GPU), False), ("memory", "GPU", ("Mistral-7B", verdicts.COMPUTED), True),
    ("speed", "GPU", (SHAPE, GPU), True), ("speed", "GPU", (SHAPE, CPU), False), ("speed", "GPU", (LARGER, GPU), False),
    ("quality", "any", (LARGER, CPU), True), ("quality", "any", (SMALL, CPU), False), ("quality", "any", (SHAPE, GPU), False),
    ("quality", "any", ("Mistral-7B-Instruct-v0.3", GPU), True), ("quality", "any", ("somebody's folder", CPU), False),
    ("behaviour", "any", (SHAPE, GPU), False), ("behaviour", "any", ("Mistral-7B-Instruct-v0.3", GPU), True), ("behaviour", "GPU", (SHAPE, GPU), True),
])  # fmt: skip
def test_a_claim_about_a_7b_model_is_judged_on_its_subject(kind, device, place, fits):
    measured = finding(5, model=place[0], device=place[1])
    verdict = verdicts.judge(about_7b(kind, device), [measured])
    nowhere = place[0] == SHAPE and kind == "quality"  # random weights have none
    assert verdict.word == ("holds" if fits else "not run here" if nowhere else "not tested on its subject")
    assert fits or nowhere or place[0].split(" (")[0] in verdict.elsewhere


def test_the_nearest_finding_judges_not_the_first():
    own, larger, real = (
        finding(5),
        finding(0.1, model=LARGER),
        finding(1.5, 1.4, 1.6, model="Mistral-7B-Instruct-v0.3", device=GPU),
    )
    assert verdicts.judge(about_7b("quality"), [own, larger]).finding is larger
    verdict = verdicts.judge(about_7b("quality"), [own, larger, real])
    assert (
        verdict.finding is real
        and verdict.beside == (own, larger)
        and f"5.0 times ({SMALL}, {CPU})" in verdict.elsewhere
    )
    computed, measured = finding(model="Mistral-7B", device=verdicts.COMPUTED), finding(model=SHAPE, device=GPU)
    assert verdicts.judge(about_7b("memory"), [computed, measured]).finding is measured
    assert verdicts.judge(claim(), [own, larger]).finding is own  # of equally near ones this run's, which comes first


def test_words_of_a_finding():
    assert finding(2).words(claim()) == "2.0 times" and finding(2, text="twice").words(claim()) == "twice"
    assert finding(2, 1.9, 2.1).words(claim()) == "2.0 times (1.9 to 2.1)"
    assert finding(2, 1.9, 2.1, text="twice").words(claim()) == "2.0 times (1.9 to 2.1); twice"


def test_without_a_finding():
    assert verdicts.judge(claim(), [replace(finding(), claim="y")]).word == "not run here"
    assert verdicts.judge(claim(needs="a GPU"), []).word == "needs hardware not present"
    empty = verdicts.judge(claim(), [])
    assert (empty.found, empty.judged_on, empty.elsewhere, empty.whose) == ("", "", "", "")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (SMALL, 135e6),
        (LARGER, 1.5e9),
        (SHAPE, 7e9),
        ("qwen2.5-coder-1.5b-offline", 1.5e9),
        ("tiny", 0),
        ("a-4bit-model", 0),
    ],
)
def test_parameters_that_a_name_tells(name, size):
    assert verdicts._parameters(name) == size


# Findings of notebooks


@pytest.mark.parametrize("numbers", [(float("nan"),), (1, 2, 3), (1, 0), (1, None, 2), (1, 0, float("inf"))])
def test_a_finding_is_a_number_in_its_interval(numbers):
    with pytest.raises(claims.ClaimError, match="nf4-quality"):
        claims.finding("nf4-quality", *numbers)


FOUND = models.Found("/nowhere", SMALL, "PyPI", "cpu")


def write(folder, *findings, notebook="04_nf4_bitsandbytes", found=FOUND):
    claims.write(folder, notebook=notebook, found=found, findings=findings)
    return folder / "claims" / f"{notebook}.json"


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """No findings, records or GPU reference but the test's own."""
    monkeypatch.setattr(claims, "FINDINGS", tmp_path / "findings")
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    monkeypatch.setattr(reference, "gpu", lambda: None)
    return tmp_path


def test_what_a_notebook_writes(apart):
    path = write(
        apart,
        claims.finding("nf4-quality", 0.29, 0.27, 0.31),
        claims.finding("7b-nf4-3.5", 4.14, computed_for="Mistral-7B"),
    )
    facts = json.loads(path.read_text())
    assert (facts["notebook"], facts["model"], facts["origin"]) == (
        "04_nf4_bitsandbytes",
        SMALL,
        "PyPI",
    ) and "CPU" in facts["device"]
    assert facts["versions"]["torch"] and re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"])
    assert facts["findings"][0] == {"claim": "nf4-quality", "value": 0.29, "low": 0.27, "high": 0.31}
    quality, size = claims.evidence(apart)
    assert (
        quality.model == SMALL
        and quality.where == "this run"
        and size.model == "Mistral-7B"
        and size.device == verdicts.COMPUTED
    )
    assert list(path.parent.iterdir()) == [path]


def test_an_unknown_claim_is_not_written(apart):
    with pytest.raises(claims.ClaimError, match="no such claim"):
        write(apart, claims.finding("nf4-is-lovely", 1))
    assert not (apart / "claims").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"findings": 1}', '{"findings": [{"claim": "x"}]}'])
def test_a_broken_file_is_named(apart, text):
    files.write_text(apart / "claims" / "04_x.json", text)
    with pytest.raises(claims.ClaimError, match="04_x.json"):
        claims.evidence(apart)


def test_table_of_a_notebook_shows_what_judges(apart):
    write(apart, claims.finding("nf4-quality", 0.29, 0.27, 0.31), claims.finding("nf4-double-quant", 0.373))
    table = claims.table(apart, "04_nf4_bitsandbytes")
    assert list(table.columns) == ["claim", "measured here", "judged on", "verdict"]
    assert table.verdict.tolist() == ["not tested on its subject", "holds"] and table["judged on"][0] == ""
    assert table["measured here"].tolist() == ["KL 0.290 (0.27 to 0.31)", "0.373 bits"]
    assert table["judged on"][1].startswith(f"{SMALL}, ") and "bitsandbytes" in table["judged on"][1]
    larger = models.Found("/nowhere", LARGER, "PyPI", "cpu")
    claims.collect(
        write(apart / "other", claims.finding("nf4-quality", 0.056, 0.05, 0.06), found=larger).parent.parent,
        claims.FINDINGS,
    )
    table = claims.table(apart, "04_nf4_bitsandbytes")
    assert table.verdict[0] == "holds partly" and LARGER in table["judged on"][0] and "0.056" in table["judged on"][0]
    assert table["measured here"][0].startswith("KL 0.290")


def test_the_ledger_and_the_table_agree(apart):
    write(
        apart,
        *(claims.finding(name, 0.3) for name in ("nf4-quality", "nf4-double-quant", "nf4-2-3x", "simpler-operations")),
    )
    words = {verdict.claim["claim"]: verdict.word for verdict in claims.ledger(apart)}
    for row in claims.table(apart, "04_nf4_bitsandbytes").itertuples():
        assert words[row.claim] == row.verdict


def test_collected_findings_are_kept_by_device_and_model(apart):
    write(apart, claims.finding("nf4-double-quant", 0.36))
    write(apart, claims.finding("colab-config", 1), notebook="13_troubleshooting")
    paths = claims.collect(apart)
    assert [path.name for path in paths] == ["04_nf4_bitsandbytes.json", "13_troubleshooting.json"]
    assert len({path.parent for path in paths}) == 1 and paths[0].parent.name.endswith("--smollm2-135m-instruct")
    assert {each.claim for each in claims.evidence()} == {"nf4-double-quant", "colab-config"}
    write(apart, claims.finding("nf4-double-quant", 0.37))
    claims.collect(apart)
    assert sorted(each.value for each in claims.evidence()) == [0.37, 1]


def test_ledger_of_an_empty_build_has_every_claim(apart):
    ledger = claims.ledger(apart)
    assert [verdict.claim["id"] for verdict in ledger] == list(BY_ID)
    table = claims.frame(ledger)
    assert set(table.verdict) == {"not run here", "needs hardware not present"}


# Stored verdicts


def test_stored_verdicts_follow_from_what_is_committed():
    try:
        assert claims.problems() == [], REFRESH
    except records.RecordError as error:
        pytest.fail(f"{error}: {REFRESH}")


def test_filling_writes_what_is_measured(apart, monkeypatch):
    path = apart / "claims.json"
    path.write_text(claims.PATH.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(claims, "PATH", path)
    claims.fill()
    assert claims.problems() == [] and claims.fill() == []
    claims.collect(write(apart / "build", claims.finding("nf4-double-quant", 0.36)).parent.parent)
    assert len(claims.problems()) == 3 and "python -m helpers reference" in claims.problems()[0]
    assert claims.fill() == ["nf4-double-quant: not run here -> holds"] and claims.problems() == []
    stored = next(each for each in claims.read()[1] if each["id"] == "nf4-double-quant")
    assert stored["value"] == 0.36 and stored["judged_on"].startswith(SMALL)


def test_one_command_stores_records_findings_and_verdicts(apart, monkeypatch, capsys):
    path = apart / "claims.json"
    path.write_text(claims.PATH.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(claims, "PATH", path)
    monkeypatch.setattr(pages, "ROOT", apart)
    claims.fill()
    for method in ("nf4", "bf16"):
        made = record(method, model=SMALL, weight_bytes=30 if method == "nf4" else 100)
        files.write_text(apart / "build" / "records" / f"{method}.json", json.dumps(made))
    write(apart / "build", claims.finding("nf4-double-quant", 0.36))
    assert main(["reference", "--output", str(apart / "build")]) == 0
    printed = capsys.readouterr().out
    assert (
        "reference/2-cpu-cores-x86-64--smollm2-135m-instruct.json" in printed and "/04_nf4_bitsandbytes.json" in printed
    )
    assert (
        "nf4-double-quant: not run here -> holds" in printed
        and "nf4-75: not run here -> not tested on its subject" in printed
    )
    assert claims.problems() == []


# Records


def record(method, device=CPU, **numbers):
    return {"method": method, "notebook": "04", "model": "tiny", "device": device, "versions": {}, "eval_tokens": 8192, "eval_context": 256,
            "eval_text": "course", "in_domain": None, **NUMBERS, **numbers}  # fmt: skip


def derived(*group):
    return {row["claim"]: row for row in recorded.from_records(group)}


def test_claims_from_records():
    rows = derived(
        record("nf4", weight_bytes=30, kl_divergence=0.3, kl_low=0.2, kl_high=0.4), record("bf16", weight_bytes=100)
    )
    assert rows["nf4-75"]["value"] == 0.7 and (rows["nf4-quality"]["low"], rows["nf4-quality"]["high"]) == (0.2, 0.4)
    assert rows["nf4-gpu-only"]["value"] == 1 and rows["nf4-75"]["device"] == CPU and "nf4-eighth" not in rows
    assert "nf4-2-3x" not in derived(record("nf4"), record("bf16", decode_tokens_per_s=None))


def test_a_ratio_never_mixes_two_devices_or_models():
    assert "nf4-75" not in derived(record("nf4"), record("bf16", device=GPU))
    assert "nf4-75" not in derived(record("nf4"), record("bf16", model="another"))
    assert "nf4-gpu-only" not in derived(record("nf4", device=GPU))


def test_claims_from_the_gpu_reference():
    gpu = reference.gpu()
    rows = {row["claim"]: row for row in recorded.from_gpu(gpu)}
    assert set(rows) == set(recorded.FROM_GPU), "the committed GPU reference should hold what the claims ask of it"
    assert rows["awq-minutes"]["device"] == gpu["autoawq"]["device"] and rows["nf4-75"]["device"] == gpu["device"]
    words = {name: verdicts.judge(BY_ID[name], [verdicts.Finding(**row)]).word for name, row in rows.items()}
    assert {"not tested on its subject", "not run here"} & set(words.values()) == set()
    assert recorded.from_gpu({"device": GPU, "model": SHAPE, "versions": {}}) == []


def test_gpu_reference(tmp_path):
    assert reference.gpu(tmp_path / "no.json") is None
    path = tmp_path / "reference.json"
    for text, message in (("{", "not valid JSON"), ("[]", "does not name its device")):
        path.write_text(text)
        with pytest.raises(records.RecordError, match=message):
            reference.gpu(path)
    path.write_text(
        json.dumps(
            {
                "device": "NVIDIA H100",
                "memory": {"nf4": {"weight_bytes": 4e9}},
                "decode_nf4": {"bytes": 4e9, "lean": {"1": {"tokens_per_s": 30}}, "note": "x"},
            }
        )
    )
    assert reference.gpu_rows(reference.gpu(path)) == [
        ["nf4: load and answer", 4.0, None, None],
        ["nf4: decode, lean", 4.0, None, 30],
    ]


# Reference results


def test_reference_covers_the_methods_of_the_course():
    (cpu, *_) = reference.read()
    assert (
        cpu.on_cpu
        and {"fp32", "bf16", "nf4", "gptq", "awq", "int8-dynamic", "int8-static", "hybrid", "qat-int4", "qlora"}
        <= cpu.records.keys()
    )
    assert all(record["eval_tokens"] in (4096, None) for record in cpu.records.values())
    stems = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {record["notebook"] for record in cpu.records.values()} <= stems, "a record of a notebook that is not there"


def test_reference_is_written_per_device_and_keeps_what_a_run_lacks(tmp_path):
    for method, device in (("bf16", "2 CPU cores, x86_64"), ("nf4", "2 CPU cores, x86_64"), ("bf16", "NVIDIA H100")):
        build = tmp_path / f"{method} {device}"
        files.write_text(build / "records" / f"{method}.json", json.dumps(record(method, device=device)))
        reference.write(build, tmp_path / "reference")
    cpu, gpu = reference.read(tmp_path / "reference")
    assert cpu.on_cpu and set(cpu.records) == {"bf16", "nf4"} and not gpu.on_cpu and set(gpu.records) == {"bf16"}


def test_what_the_first_cell_costs_on_colab_goes_into_the_cost_cards(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "04_nf4_bitsandbytes.ipynb", folder)
    monkeypatch.setattr(pages, "FOLDER", folder)
    monkeypatch.setattr(pages, "refresh_all", lambda: None)
    assert reference.colab_costs(tmp_path) == []
    measured = {"04_nf4_bitsandbytes": {"first_s": 77, "second_s": 0, "bytes": 1_250_000_000}}
    (tmp_path / "colab.json").write_text(json.dumps(measured), encoding="utf-8")
    assert reference.colab_costs(tmp_path) == ["04_nf4_bitsandbytes"]
    card = pages.cost_card(nbformat.read(folder / "04_nf4_bitsandbytes.ipynb", 4))
    assert "installs 1.2 GB, once: 77 s" in card


@pytest.mark.parametrize(
    ("device", "model", "column"),
    [
        ("NVIDIA H100", "SmolLM2-135M-Instruct (x)", "gpu"),
        ("NVIDIA H100", "mistral-7b-geometry (x)", "gpu_7b"),
        ("2 CPU cores, x86_64", "SmolLM2-135M-Instruct (x)", None),
    ],
)
def test_what_a_gpu_run_cost_goes_into_the_cost_cards(tmp_path, monkeypatch, device, model, column):
    folder = tmp_path / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns("data", "gpu"))
    monkeypatch.setattr(pages, "FOLDER", folder)
    monkeypatch.setattr(pages, "refresh_all", lambda: None)
    files.write_text(tmp_path / "records" / "bf16.json", json.dumps(record("bf16", device=device, model=model)))
    results = [{"notebook": "04_nf4_bitsandbytes", "seconds": 61.2, "peak_ram_bytes": 3e9, "peak_vram_bytes": 17e9, "verdict": "ok"},
               {"notebook": "05_gptq", "seconds": 5.0, "peak_ram_bytes": 1e9, "peak_vram_bytes": 1e9, "verdict": "the kernel died"}]  # fmt: skip
    files.write_text(tmp_path / "runs.json", json.dumps({"date": "2026-11-22", "results": results}))
    assert reference.costs(tmp_path) == (["04_nf4_bitsandbytes"] if column else [])
    cost = nbformat.read(folder / "04_nf4_bitsandbytes.ipynb", 4).metadata["course"]["cost"]
    if column:
        assert cost[column]["seconds"] == 61 and cost[column]["machine"] == f"{device}, {model.split()[0]}"
        card = pages.cost_card(nbformat.read(folder / "04_nf4_bitsandbytes.ipynb", 4))
        assert f"{device}, {model.split()[0]}" in card and "1.0 min" in card and "17.0 GB" in card


def test_reference_of_two_protocols_is_refused(tmp_path):
    for method, tokens in (("bf16", 8192), ("nf4", 1024)):
        files.write_text(tmp_path / "records" / f"{method}.json", json.dumps(record(method, eval_tokens=tokens)))
    with pytest.raises(records.RecordError, match="2 evaluation protocols"):
        reference.write(tmp_path, tmp_path / "reference")
    with pytest.raises(records.RecordError, match="no records"):
        reference.write(tmp_path / "empty", tmp_path / "reference")


@pytest.mark.parametrize(
    "text", ['{"device": ', "{}", '{"device": "d", "model": "tiny", "date": "", "records": {"nf4": {}}}']
)
def test_broken_reference_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(records.RecordError):
        reference.read(tmp_path)
