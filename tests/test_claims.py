"""The claims ledger: each claim has a measurement, and the verdict that its numbers bear out."""

import json
import shutil

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from helpers import claims, notebooks, records, reference
from test_records import NUMBERS

SOURCES, CLAIMS = claims.read()
COMMITTED = {claim["id"]: (claim, finding) for claim, finding in claims.committed()}


@pytest.mark.parametrize("name", COMMITTED)
def test_claim_is_measured_and_its_verdict_follows(name):
    claim, finding = COMMITTED[name]
    if isinstance(finding, claims.NotRun) and claim["measure"]["kind"] == "output":
        number = claim["measure"]["notebook"]
        assert not list(notebooks.FOLDER.glob(f"{number}_*.ipynb")), f"notebook {number} is there, but {finding}"
        pytest.skip(f"notebook {number} is not part of the course yet")
    assert claims.problems([(claim, finding)]) == []


def test_there_are_enough_of_them_from_each_guide():
    measured = [finding for _, finding in COMMITTED.values() if isinstance(finding, claims.Finding) and finding.value is not None]
    assert len(CLAIMS) >= 30 and len(measured) >= 30
    assert {claim["source"] for claim in CLAIMS} == set(SOURCES) and len(SOURCES) == 5
    assert {finding.verdict for finding in measured} == set(claims.VERDICTS[:3])
    assert sum(finding.verdict == claims.VERDICTS[3] for _, finding in COMMITTED.values() if isinstance(finding, claims.Finding)) < 10


def test_file_is_written_as_the_tool_writes_it():
    text = claims.PATH.read_text(encoding="utf-8")
    assert claims.dumps(json.loads(text)) == text


def record(method, device="2 CPU cores, x86_64", **numbers):
    return {"method": method, "notebook": "04", "model": "tiny", "device": device, "versions": {}, "eval_tokens": 8192, "eval_context": 512, "eval_text": "pydoc",
            **NUMBERS, **numbers}  # fmt: skip


def claim(measure, **more):
    return {"id": "x", "claim": "c", "source": "000", "measure": measure, "holds": "value >= 2", "partly": "value >= 1.2", "verdict": "holds", "value": 2, **more}


FASTER = {"kind": "record", "value": "int8_static.decode_tokens_per_s / bf16.decode_tokens_per_s"}


@pytest.mark.parametrize(("speed", "verdict"), [(20, "holds"), (15, "holds partly"), (10, "does not hold")])
def test_verdict_from_records(speed, verdict):
    found = {"int8-static": record("int8-static", decode_tokens_per_s=speed), "bf16": record("bf16", decode_tokens_per_s=10)}
    finding = claims.evaluate(claim(FASTER, says="{value:.1f}x, {answer}"), found)
    assert finding.verdict == verdict and finding.where == "this run" and finding.found == f"{speed / 10:.1f}x, yes"


def test_a_verdict_that_contradicts_its_number_is_a_problem():
    found = {"int8-static": record("int8-static", decode_tokens_per_s=9), "bf16": record("bf16", decode_tokens_per_s=10)}
    wrong = claim(FASTER)
    (problem,) = claims.problems([(wrong, claims.evaluate(wrong, found))])
    assert "stored as 'holds'" in problem and "'does not hold'" in problem
    stale = claim(FASTER, verdict="does not hold", value=0.8)
    assert "stored value 0.8, measured 0.9" in claims.problems([(stale, claims.evaluate(stale, found))])[0]
    right = claim(FASTER, verdict="does not hold", value=0.9)
    assert claims.problems([(right, claims.evaluate(right, found))]) == []


def test_missing_measurement():
    with pytest.raises(claims.NotRun, match="int8_static has not been run"):
        claims.evaluate(claim(FASTER), {"bf16": record("bf16")})
    with pytest.raises(claims.NotRun, match="no decode_tokens_per_s"):
        claims.evaluate(claim(FASTER), {"bf16": record("bf16"), "int8-static": record("int8-static", decode_tokens_per_s=None)})
    assert claims.problems([(claim(FASTER), claims.NotRun("x: nothing"))]) == ["x: stored as 'holds', but x: nothing"]


def test_own_run_comes_before_the_reference_and_each_alone():
    """A ratio of one machine's numbers: never one from here and one from there."""
    slow = {"int8-static": record("int8-static", decode_tokens_per_s=1), "bf16": record("bf16", decode_tokens_per_s=1)}
    other = reference.Reference("2 CPU cores, x86_64", "tiny", "2026-01-01", {"int8-static": record("int8-static", decode_tokens_per_s=30), "bf16": record("bf16", decode_tokens_per_s=10)})
    assert claims.evaluate(claim(FASTER), slow, references=[other]).value == 1
    half = {"bf16": slow["bf16"]}
    finding = claims.evaluate(claim(FASTER), half, references=[other])
    assert finding.value == 3 and finding.where.startswith("reference")


def test_a_gpu_claim_needs_a_gpu():
    paths = {"nf4": ["decode_nf4", "lean", "1", "tokens_per_s"], "fp16": ["decode_fp16", "lean", "1", "tokens_per_s"]}
    on_gpu = claim({"kind": "gpu", "paths": paths, "value": "nf4 / fp16", "needs": "a GPU"})
    facts = {"device": "NVIDIA H100", "decode_nf4": {"lean": {"1": {"tokens_per_s": 30}}}}
    for gpu in (None, facts):
        finding = claims.evaluate(on_gpu, {}, gpu=gpu)
        assert finding.verdict == "needs hardware not present" and finding.value is None and finding.found == "needs a GPU"
    finding = claims.evaluate(on_gpu, {}, gpu={**facts, "decode_fp16": {"lean": {"1": {"tokens_per_s": 20}}}})
    assert finding.verdict == "holds partly" and finding.value == 1.5 and finding.where == "reference, NVIDIA H100"


def test_a_claim_about_cpus_is_not_judged_by_a_gpu():
    needs = claim({"kind": "record", "value": "nf4.on_cpu", "on": "cpu"}, holds="value == 0", partly=None)
    with pytest.raises(claims.NotRun):
        claims.evaluate(needs, {"nf4": record("nf4", device="NVIDIA H100")})
    assert claims.evaluate(needs, {"nf4": record("nf4")}).verdict == "does not hold"


def test_gpu_reference(tmp_path):
    assert reference.gpu(tmp_path / "no.json") is None
    path = tmp_path / "reference.json"
    for text, message in (("{", "not valid JSON"), ("[]", "does not name its device")):
        path.write_text(text)
        with pytest.raises(records.RecordError, match=message):
            reference.gpu(path)
    path.write_text(json.dumps({"device": "NVIDIA H100", "memory": {"nf4": {"weight_bytes": 4e9}}, "decode_nf4": {"bytes": 4e9, "lean": {"1": {"tokens_per_s": 30}}, "note": "x"}}))
    assert reference.gpu_rows(reference.gpu(path)) == [["nf4: load and answer", 4.0, None, None], ["nf4: decode, lean", 4.0, None, 30]]


def notebook(folder, row, executed=True):
    cell = nbformat.v4.new_code_cell("table")
    if executed:
        page = "<table><tr><th></th><th>claim</th></tr>" + "<tr><th>0</th>" + "".join(f"<td>{text}</td>" for text in row) + "</tr></table>"
        cell.outputs = [nbformat.v4.new_output("display_data", data={"text/html": page})]
    other = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", data={"text/html": "<table><tr><td>2-3x</td><td>9x of bf16</td></tr></table>"})])
    cells = [other, nbformat.v4.new_markdown_cell("## What the guides claim"), cell, nbformat.v4.new_markdown_cell("## Exercises"), other]
    for number, each in enumerate(cells):
        each = cells[number] = nbformat.from_dict(dict(each))
        each["id"] = f"c{number}"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "04_x.ipynb")
    return [("committed run", folder)]


SPEED = {"kind": "output", "notebook": "04", "row": "2-3x faster", "find": r"(?P<n>[\d.,]+)x of bf16|(?P<error>\w*Error)", "value": "n"}


def test_verdict_from_a_notebooks_table(tmp_path):
    finding = claims.evaluate(claim(SPEED), {}, folders=notebook(tmp_path, ["2-3x faster", "1,000.5x of bf16 &lt;", "no"]))
    assert finding.value == 1000.5 and finding.verdict == "holds" and finding.where == "committed run"
    failed = {**SPEED, "value": "1 - error"}
    assert claims.evaluate(claim(failed), {}, folders=notebook(tmp_path, ["2-3x faster", "ValueError: no"])).verdict == "does not hold"


def test_rows_are_those_of_the_section(tmp_path):
    ((_, folder),) = notebook(tmp_path, ["a", "b & c"])
    assert claims.rows(folder / "04_x.ipynb") == [["a", "b & c"]]


def test_a_changed_notebook_is_noticed(tmp_path):
    with pytest.raises(claims.ClaimError, match="no cell that begins with '2-3x faster'"):
        claims.evaluate(claim(SPEED), {}, folders=notebook(tmp_path, ["something else", "1x of bf16"]))
    with pytest.raises(claims.ClaimError, match="does not match"):
        claims.evaluate(claim(SPEED), {}, folders=notebook(tmp_path, ["2-3x faster", "twice"]))
    with pytest.raises(claims.NotRun):
        claims.evaluate(claim(SPEED), {}, folders=notebook(tmp_path, [], executed=False))


def test_a_row_that_was_not_measured_here_falls_back_to_the_committed_run(tmp_path):
    for name in ("run", "committed"):
        (tmp_path / name).mkdir()
    folders = [("this run", notebook(tmp_path / "run", ["2-3x faster", "not run here"])[0][1]), ("committed run", notebook(tmp_path / "committed", ["2-3x faster", "2x of bf16"])[0][1])]
    assert claims.evaluate(claim(SPEED), {}, folders=folders).where == "committed run"


def test_unexecuted_run_falls_back_to_the_committed_one(tmp_path):
    for name in ("run", "committed"):
        (tmp_path / name).mkdir()
    folders = [("this run", notebook(tmp_path / "run", [], executed=False)[0][1]), ("committed run", notebook(tmp_path / "committed", ["2-3x faster", "2x of bf16"])[0][1])]
    assert claims.evaluate(claim(SPEED), {}, folders=folders).where == "committed run"


@pytest.mark.parametrize("expression", ["__import__('os').getcwd()", "bf16.__class__.x", "open", "[1]", "1 +", "1 / 0", "bf16 < bf16 < bf16", "(lambda: 1)()"])
def test_only_arithmetic(expression):
    with pytest.raises(claims.ClaimError):
        claims.evaluate(claim({"kind": "record", "value": expression}), {"bf16": record("bf16")})


@given(st.text(max_size=30))
def test_any_expression_gives_a_number_or_a_claim_error(expression):
    try:
        value = claims._calculate(expression, {"value": 2.0}, {"id": "x"})
    except claims.ClaimError:
        return
    assert isinstance(value, (int, float))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "009"}, "no source '009'"), ({"verdict": "maybe"}, "no such verdict"), ({"extra": 1}, "unknown extra"),
        ({"measure": {"kind": "opinion"}}, "no such kind"), ({"claim": None}, "no claim"), ({"holds": None}, "when it holds"),
    ],
)  # fmt: skip
def test_a_badly_written_claim_is_refused(tmp_path, change, message):
    written = {key: value for key, value in {**claim(FASTER), **change}.items() if value is not None}
    path = tmp_path / "claims.json"
    path.write_text(json.dumps({"sources": {"000": "a"}, "claims": [written]}))
    with pytest.raises(claims.ClaimError, match=message):
        claims.read(path)


def test_twice_the_same_id(tmp_path):
    path = tmp_path / "claims.json"
    path.write_text(json.dumps({"sources": {"000": "a"}, "claims": [claim(FASTER)] * 2}))
    with pytest.raises(claims.ClaimError, match="twice"):
        claims.read(path)


def test_filling_writes_what_is_measured(tmp_path):
    path = tmp_path / "claims.json"
    path.write_text(claims.PATH.read_text(encoding="utf-8"), encoding="utf-8")
    claims.fill(path)
    filled = path.read_text(encoding="utf-8")
    data = json.loads(filled)
    verdict = data["claims"][0]["verdict"]
    data["claims"][0] |= {"verdict": "not run here", "value": None}
    path.write_text(claims.dumps(data), encoding="utf-8")
    assert claims.fill(path) == [f"{CLAIMS[0]['id']}: not run here -> {verdict}"]
    assert path.read_text(encoding="utf-8") == filled
    assert claims.fill(path) == []


def test_ledger_of_an_empty_build_has_every_claim(tmp_path):
    findings = claims.ledger(tmp_path)
    assert [finding.claim["id"] for finding in findings] == [claim["id"] for claim in CLAIMS]
    assert not any(finding.where == "this run" for finding in findings)
    table = claims.frame(findings)
    assert len(table) == len(CLAIMS) and not table["verdict"].isna().any()


def test_each_claim_is_one_short_phrase():
    for claim in CLAIMS:
        assert 10 < len(claim["claim"]) < 110 and not claim["claim"].endswith("."), claim["id"]


# Reference results


def test_reference_covers_the_methods_of_the_course():
    (cpu, *_) = reference.read()
    assert cpu.on_cpu and {"fp32", "bf16", "nf4", "gptq", "awq", "int8-dynamic", "int8-static", "hybrid", "qat-int4", "qlora"} <= cpu.records.keys()
    assert all(record["eval_tokens"] in (4096, None) for record in cpu.records.values())
    stems = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert len(stems & {record["notebook"] for record in cpu.records.values()}) >= 6


def test_reference_is_written_per_device_and_keeps_what_a_run_lacks(tmp_path):
    for method, device in (("bf16", "2 CPU cores, x86_64"), ("nf4", "2 CPU cores, x86_64"), ("bf16", "NVIDIA H100")):
        build = tmp_path / f"{method} {device}"
        records.write_text(build / "records" / f"{method}.json", json.dumps(record(method, device=device)))
        reference.write(build, tmp_path / "reference")
    cpu, gpu = reference.read(tmp_path / "reference")
    assert cpu.on_cpu and set(cpu.records) == {"bf16", "nf4"} and not gpu.on_cpu and set(gpu.records) == {"bf16"}


@pytest.mark.parametrize(("device", "model", "column"), [("NVIDIA H100", "SmolLM2-135M-Instruct (x)", "gpu"), ("NVIDIA H100", "mistral-7b-geometry (x)", "gpu_7b"), ("2 CPU cores, x86_64", "SmolLM2-135M-Instruct (x)", None)])
def test_what_a_gpu_run_cost_goes_into_the_cost_cards(tmp_path, monkeypatch, device, model, column):
    folder = tmp_path / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns("data", "gpu"))
    monkeypatch.setattr(notebooks, "FOLDER", folder)
    monkeypatch.setattr(notebooks, "refresh_all", lambda: None)
    records.write_text(tmp_path / "records" / "bf16.json", json.dumps(record("bf16", device=device, model=model)))
    results = [{"notebook": "04_nf4_bitsandbytes", "seconds": 61.2, "peak_ram_bytes": 3e9, "peak_vram_bytes": 17e9, "verdict": "ok"},
               {"notebook": "05_gptq", "seconds": 5.0, "peak_ram_bytes": 1e9, "peak_vram_bytes": 1e9, "verdict": "the kernel died"}]  # fmt: skip
    records.write_text(tmp_path / "runs.json", json.dumps({"date": "2026-11-22", "results": results}))
    assert reference.costs(tmp_path) == (["04_nf4_bitsandbytes"] if column else [])
    cost = nbformat.read(folder / "04_nf4_bitsandbytes.ipynb", 4).metadata["course"]["cost"]
    if column:
        assert cost[column]["seconds"] == 61 and cost[column]["machine"] == f"{device}, {model.split()[0]}"
        card = notebooks.cost_card(nbformat.read(folder / "04_nf4_bitsandbytes.ipynb", 4))
        assert f"{device}, {model.split()[0]}" in card and "1.0 min" in card and "17.0 GB" in card


def test_reference_of_two_protocols_is_refused(tmp_path):
    for method, tokens in (("bf16", 8192), ("nf4", 1024)):
        records.write_text(tmp_path / "records" / f"{method}.json", json.dumps(record(method, eval_tokens=tokens)))
    with pytest.raises(records.RecordError, match="2 evaluation protocols"):
        reference.write(tmp_path, tmp_path / "reference")
    with pytest.raises(records.RecordError, match="no records"):
        reference.write(tmp_path / "empty", tmp_path / "reference")


@pytest.mark.parametrize("text", ['{"device": ', "{}", '{"device": "d", "model": "tiny", "date": "", "records": {"nf4": {}}}'])
def test_broken_reference_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(records.RecordError):
        reference.read(tmp_path)
