"""Verdicts: a claim held against the finding that is nearest to what it speaks of. Nothing here reads or writes a file."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from helpers import models
from helpers.publishing import reference

HOLDS, PARTLY, FAILS, CLOSE = "holds", "holds partly", "does not hold", "too close to call"
NOT_TESTED, NO_HARDWARE, NOT_RUN = "not tested on its subject", "needs hardware not present", "not run here"
WORDS = (HOLDS, PARTLY, FAILS, CLOSE, NOT_TESTED, NO_HARDWARE, NOT_RUN)
# Relative error of a value without an interval: two speeds, each within 10 %; a KL on few windows. Sizes and errors are exact.
SPREAD = {"memory": 0.0, "behaviour": 0.0, "speed": 0.2, "quality": 0.2}
# Smaller models lose more to rounding, so they do not judge what is said about a 7B model's quality.
JUDGE_PARAMETERS = 1e9
COMPUTED = "computed from its config"
Claim = dict[str, Any]  # as claims.json has it: texts, its subject as a dict of texts, zones as [low, high]


@dataclass(frozen=True)
class Finding:
    """A measured value for one claim.

    claim      its id
    low, high  interval of the value, or None
    text       words for it in place of the claim's template, or with an interval after it
    where      whose run it is
    """

    claim: str
    value: float
    low: float | None = None
    high: float | None = None
    text: str = ""
    model: str = ""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    notebook: str = ""
    where: str = ""

    @property
    def place(self) -> str:
        """Model and device."""
        return f"{self.model.split(' (')[0]}, {self.device}"

    def words(self, claim: Claim) -> str:
        """What was found, with its interval."""
        filled = claim["says"].format(value=self.value)
        if self.low is None:
            return self.text or filled
        return f"{filled} ({self.low:.3g} to {self.high:.3g})" + (f"; {self.text}" if self.text else "")


@dataclass(frozen=True)
class Verdict:
    """A claim judged by `finding` (None where none is on its subject); `beside` holds what was measured elsewhere."""

    claim: Claim
    finding: Finding | None
    word: str
    beside: tuple[Finding, ...] = ()

    @property
    def found(self) -> str:
        """What was found, in words; "" without a finding."""
        return self.finding.words(self.claim) if self.finding else ""

    @property
    def judged_on(self) -> str:
        """Model, device and library; "" without a finding."""
        if not self.finding:
            return ""
        version = None if self.finding.device == COMPUTED else self.finding.versions.get(self.claim["library"])
        return self.finding.place + (f", {self.claim['library']} {version}" if version else "")

    @property
    def whose(self) -> str:
        """Whose run the finding is from; "" without one."""
        return self.finding.where if self.finding else ""

    @property
    def elsewhere(self) -> str:
        """What was measured elsewhere, in words."""
        return "; ".join(f"{finding.words(self.claim)} ({finding.place})" for finding in self.beside)


def judge(claim: Claim, findings: Iterable[Finding]) -> Verdict:
    """`Verdict` on a claim by the finding nearest to its subject; of equally near ones, the first."""
    about = [
        each
        for each in findings
        if each.claim == claim["id"] and not (_is_shape(each) and claim["subject"]["kind"] == "quality")
    ]
    fitting = [each for each in about if on_subject(claim["subject"], each)]
    if not fitting:
        word = NOT_TESTED if about else NO_HARDWARE if claim.get("needs") else NOT_RUN
        return Verdict(claim, None, word, _elsewhere(about))
    largest_first = claim["subject"]["kind"] == "quality" and claim["subject"]["model"] == "7B"
    nearest = min(fitting, key=lambda each: (each.device == COMPUTED, -_parameters(each.model) if largest_first else 0))
    return Verdict(claim, nearest, decide(claim, *interval(claim, nearest)), _elsewhere(about, nearest))


def on_subject(subject: dict[str, str], finding: Finding) -> bool:
    """True where a finding's model and device are what a claim speaks of."""
    if subject["device"] == "GPU" and reference.on_cpu(finding.device):
        return False
    if subject["model"] == "any":
        return True
    if subject["kind"] == "quality":
        return _parameters(finding.model) >= JUDGE_PARAMETERS
    if subject["kind"] == "behaviour" and _is_shape(finding):
        return subject["device"] == "GPU"  # loading and running do not depend on the weights; tokenizer and answers do
    return _parameters(finding.model) == 7e9


def interval(claim: Claim, finding: Finding) -> tuple[float, float]:
    """(low, high) of a finding; one without an interval gets the spread of its kind, or of its claim."""
    if finding.low is not None and finding.high is not None:
        return finding.low, finding.high
    margin = claim.get("spread", SPREAD[claim["subject"]["kind"]]) * abs(finding.value)
    return finding.value - margin, finding.value + margin


def decide(claim: Claim, low: float, high: float) -> str:
    """The verdict that an interval bears out: none but `CLOSE` if it crosses a threshold that matters."""
    holds, partly = claim["holds"], claim.get("partly", claim["holds"])
    if _inside(holds, low, high):
        return HOLDS
    if not _outside(holds, low, high):
        return CLOSE
    if _inside(partly, low, high):
        return PARTLY
    return FAILS if _outside(partly, low, high) else CLOSE


def _elsewhere(about, nearest=None):
    """One finding of each other place, first come first."""
    places = {}
    for each in about:
        places.setdefault(each.place, each)
    if nearest:
        places.pop(nearest.place, None)
    return tuple(places.values())


def _is_shape(finding):
    """True for random weights in Mistral-7B's shape: right for memory and speed, without any quality."""
    return finding.model.startswith(models.GEOMETRY)


def _parameters(model):
    """Number of parameters that a model's name tells ("SmolLM2-135M": 135e6), else 0."""
    match = re.search(r"(\d+(?:\.\d+)?)([mb])\b", model.lower())
    return float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]] if match else 0


def _inside(zone, low, high):
    return (zone[0] is None or low >= zone[0]) and (zone[1] is None or high <= zone[1])


def _outside(zone, low, high):
    return (zone[0] is not None and high < zone[0]) or (zone[1] is not None and low > zone[1])
