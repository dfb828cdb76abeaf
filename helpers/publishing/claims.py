"""The claims ledger: what the guides say, what was measured, and the verdict.

A claim is data (notebooks/data/claims.json): the guide's words, what they speak of (`subject`), the values for which they hold.
A finding is one value for one claim, with the model, device and versions that gave it. Notebooks write theirs into
build/claims/NN_name.json; others follow from records and from the GPU reference (helpers/recorded.py); those of the committed runs
come with the course (notebooks/data/findings). helpers/verdicts.py holds a claim against the finding nearest to its subject.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import files, models, records, redact
from helpers.publishing import pages, recorded, reference
from helpers.publishing.verdicts import COMPUTED, SPREAD, WORDS, Claim, Finding, Verdict, judge

if TYPE_CHECKING:
    import pandas

PATH = pages.FOLDER / "data" / "claims.json"
FINDINGS = pages.FOLDER / "data" / "findings"
GIVEN = {"id", "claim", "source", "subject", "library", "holds", "says", "why"}
OPTIONAL = {"partly", "spread", "needs"}
STORED = {"judged_on", "value", "verdict"}


class ClaimError(ValueError):
    """A claim or a finding is not written as it should be; the message names it."""


def read(path: Path | None = None) -> tuple[dict[str, str], list[Claim]]:
    """(sources {key: title}, claims) of the ledger; raises ClaimError for a claim that is not well formed."""
    data = json.loads((path or PATH).read_text(encoding="utf-8"))
    seen = set()
    for claim in data["claims"]:
        name = claim.get("id", "a claim without id")
        unknown, missing = claim.keys() - GIVEN - OPTIONAL - STORED, GIVEN - claim.keys()
        if unknown or missing:
            raise ClaimError(f"{name}: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}")
        problems = [text for text, wrong in {
            "it is there twice": name in seen,
            f"there is no source {claim['source']!r}": claim["source"] not in data["sources"],
            "subject needs a kind, a model (any, 7B) and a device (any, GPU)": not _is_subject(claim["subject"]),
            "holds and partly are [low, high], numbers or null": not all(map(_is_zone, (claim["holds"], claim.get("partly", [0, 0])))),
            "why says where its thresholds come from": not claim["why"],
            f"no such verdict: {claim.get('verdict')!r}": claim.get("verdict", WORDS[0]) not in WORDS,
        }.items() if wrong]  # fmt: skip
        if problems:
            raise ClaimError(f"{name}: {'; '.join(problems)}")
        seen.add(name)
    return data["sources"], data["claims"]


def finding(
    claim: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    text: str = "",
    computed_for: str = "",
) -> Finding:
    """`Finding` of a notebook; raises ClaimError unless its numbers are finite and low <= value <= high.

    claim         id in claims.json
    low, high     interval of the value: from `evaluation.difference`, or the slowest and fastest of several runs
    text          words for it in place of the claim's template; with an interval, after it
    computed_for  the model from whose config the value was computed, where it was not measured on this run's model
    """
    numbers = [float(number) for number in (value, low, high) if number is not None]
    if not all(map(math.isfinite, numbers)):
        raise ClaimError(f"{claim}: a finding is a finite number, not {numbers}")
    if len(numbers) == 2 or (len(numbers) == 3 and not numbers[1] <= numbers[0] <= numbers[2]):
        raise ClaimError(f"{claim}: low <= value <= high, or neither of the two; got {low}, {value}, {high}")
    return Finding(claim, *numbers, text=text, model=computed_for, device=COMPUTED if computed_for else "")


def write(output_dir: Path | str, *, notebook: str, found: models.Found, findings: Sequence[Finding]) -> None:
    """Write `claims/<notebook>.json` under the build folder, atomically. found: the model that was measured.

    Raises ClaimError for a finding on a claim that claims.json does not have.
    """
    known = {claim["id"] for claim in read()[1]}
    for each in findings:
        if each.claim not in known:
            raise ClaimError(f"{each.claim}: claims.json has no such claim")
    rows = [{key: value for key, value in asdict(each).items() if value not in (None, "", {})} for each in findings]
    place = {
        "notebook": notebook,
        "model": found.name,
        "origin": found.origin,
        "device": records.device_name(found.device),
    }
    facts = {**place, "versions": records.versions(), "date": time.strftime("%Y-%m-%d"), "findings": rows}
    text = json.dumps(redact.inside(facts), indent=1, ensure_ascii=False, allow_nan=False)
    files.write_text(files.folder(output_dir) / "claims" / f"{notebook}.json", text + "\n")


def table(output_dir: Path | str, notebook: str) -> pandas.DataFrame:
    """The claims that a notebook has findings for, a row each: claim, measured here, judged on, verdict."""
    import pandas

    own = _findings(files.folder(output_dir) / "claims", f"{notebook}.json", "this run")
    known, every = {claim["id"]: claim for claim in read()[1]}, evidence(output_dir)
    rows = []
    for each in own:
        claim = known[each.claim]
        verdict = judge(claim, every)
        other = verdict.finding and verdict.finding != each
        rows.append(
            [
                claim["claim"],
                each.words(claim),
                f"{verdict.judged_on}: {verdict.found}" if other else verdict.judged_on,
                verdict.word,
            ]
        )
    return pandas.DataFrame(rows, columns=["claim", "measured here", "judged on", "verdict"])


def evidence(output_dir: Path | str | None = None) -> list[Finding]:
    """Every `Finding` there is: of this build folder (None: only what comes with the course), then of the committed runs."""
    found = []
    if output_dir is not None:
        found += _findings(files.folder(output_dir) / "claims", "*.json", "this run")
        found += _derived(recorded.from_records(records.read(output_dir).values()), "this run")
    found += _findings(FINDINGS, "*/*.json", "committed run")
    for each in reference.read():
        found += _derived(recorded.from_records(each.records.values()), "committed run", each.date)
    gpu = reference.gpu()
    return found + (_derived(recorded.from_gpu(gpu), "committed run", gpu["date"]) if gpu else [])


def ledger(output_dir: Path | str | None = None) -> list[Verdict]:
    """The `Verdict` on every claim; None: from what comes with the course alone."""
    every = evidence(output_dir)
    return [judge(claim, every) for claim in read()[1]]


def frame(verdicts: Iterable[Verdict]) -> pandas.DataFrame:
    """The ledger as a pandas DataFrame."""
    import pandas

    rows = [[v.claim["claim"], v.claim["source"], v.found, v.judged_on, v.word, v.whose, v.elsewhere] for v in verdicts]
    return pandas.DataFrame(
        rows, columns=["claim", "guide", "found", "judged on", "verdict", "whose run", "measured elsewhere"]
    )


def collect(output_dir: Path | str = "build", folder: Path | None = None) -> list[Path]:
    """Copy a build's findings to those that come with the course (a folder for each device and model); the files written."""
    written = []
    for path in sorted((files.folder(output_dir) / "claims").glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        target = (folder or FINDINGS) / reference.file_name(facts["device"], facts["model"]) / path.name
        files.write_text(target, path.read_text(encoding="utf-8"))
        written.append(target)
    return written


def fill(path: Path | None = None) -> list[str]:
    """Write the verdicts that the committed findings bear out into the ledger; returns a line for each that changed."""
    path, changed = path or PATH, []
    data = json.loads(path.read_text(encoding="utf-8"))
    every = evidence()
    for claim in data["claims"]:
        now = _stored(judge(claim, every))
        if claim.get("verdict") != now["verdict"]:
            changed.append(f"{claim['id']}: {claim.get('verdict')} -> {now['verdict']}")
        claim |= now
    files.write_text(path, dumps(data))
    return changed


def problems() -> list[str]:
    """A line for each claim whose stored verdict is not the one that the committed findings bear out."""
    verdicts = ((verdict.claim, _stored(verdict)) for verdict in ledger())
    return [f"{claim['id']}: stored {claim.get(name)!r}, measured {value!r}: run `python -m helpers reference`"
            for claim, now in verdicts for name, value in now.items() if claim.get(name) != value]  # fmt: skip


def dumps(data: dict[str, Any]) -> str:
    """The ledger as JSON with one line per claim, so that a change is one line in a diff."""
    rows = ",\n".join("  " + json.dumps(claim, ensure_ascii=False) for claim in data["claims"])
    return (
        f'{{\n "sources": {json.dumps(data["sources"], ensure_ascii=False, indent=2)},\n "claims": [\n{rows}\n ]\n}}\n'
    )


def _stored(verdict):
    value = verdict.finding and float(f"{verdict.finding.value:.6g}")
    return {"judged_on": verdict.judged_on, "value": value, "verdict": verdict.word}


def _findings(folder, pattern, where):
    found = []
    for path in sorted(folder.glob(pattern)):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            rows = facts.pop("findings")
            found += [
                Finding(**{**{key: facts[key] for key in facts if key != "origin"}, **row}, where=where) for row in rows
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise ClaimError(
                f"{path.name} holds no findings ({error}); delete it and run its notebook again"
            ) from error
    return found


def _derived(rows, where, date=""):
    return [Finding(**row, where=where, date=date) for row in rows]


def _is_subject(subject):
    known = {"kind": SPREAD, "model": ("any", "7B"), "device": ("any", "GPU")}
    return subject.keys() == known.keys() and all(subject[key] in known[key] for key in known)


def _is_zone(zone):
    low, high = zone
    return zone != [None, None] and (None in zone or low <= high)
