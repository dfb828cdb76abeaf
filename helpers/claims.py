"""The claims ledger: what the guides say that can be checked, the measurement that tests it, the value found, the verdict.

The claims are data (notebooks/data/claims.json). A claim names its measurement in one of four ways:

- `{"kind": "record", "value": "nf4.weight_bytes / bf16.weight_bytes"}`: arithmetic over records, hyphens written as underscores.
  With `"on": "cpu"` only records of a CPU count.
- `{"kind": "output", "notebook": "04", "row": "2-3x faster", "find": "(?P<half>[\\d.]+)x of bf", "value": "half"}`: numbers out of
  the row of that notebook's own table of claims. A named group that holds no number counts 1 where it matched, else 0: so
  `(?P<error>TypeError)|$` asks whether an error is named there.
- `{"kind": "gpu", "paths": {"nf4": ["decode_nf4", "lean", "1", "tokens_per_s"], ...}, "value": "nf4 / fp16", "needs": "..."}`: numbers
  of the course's GPU reference (notebooks/gpu/reference.json); as long as they are not there, the claim needs hardware not present.
- `{"kind": "hardware", "needs": "..."}`: nothing here can test it.

`says` puts the finding in words: a format string with `value`, the groups, and `answer` (yes or no).
`holds` and `partly` are conditions on `value`, the records or the named groups; the first that is true gives the verdict.
"""

import ast
import json
import operator
import re
from dataclasses import dataclass
from html.parser import HTMLParser

from helpers import notebooks, records, reference

PATH = notebooks.FOLDER / "data" / "claims.json"
VERDICTS = ("holds", "holds partly", "does not hold", "needs hardware not present")
NOT_RUN = "not run here"  # the notebook that measures it is not there, or has not been executed
FIELDS = {"id", "claim", "source", "measure", "holds", "partly", "says", "value", "verdict"}


class ClaimError(ValueError):
    """A claim is not written as it should be, or its measurement cannot be found; the message names the claim."""


class NotRun(ClaimError):
    """What would measure the claim has not been run."""


@dataclass(frozen=True)
class Finding:
    """One claim held against its measurement. value is None without one; found is the value in words; where says whose run it is."""

    claim: dict
    value: float | None
    found: str
    verdict: str
    where: str


def read(path=None):
    """(sources {key: title}, claims) of the ledger; raises ClaimError for a claim with missing, unknown or empty fields."""
    data = json.loads((path or PATH).read_text(encoding="utf-8"))
    seen = set()
    for claim in data["claims"]:
        name = claim.get("id", "a claim without id")
        unknown, missing = claim.keys() - FIELDS, {"id", "claim", "source", "measure", "verdict"} - claim.keys()
        if unknown or missing:
            raise ClaimError(f"{name}: " + ", ".join(sorted([f"unknown {field}" for field in unknown] + [f"no {field}" for field in missing])))
        if name in seen:
            raise ClaimError(f"{name} is there twice")
        seen.add(name)
        if claim["source"] not in data["sources"]:
            raise ClaimError(f"{name}: there is no source {claim['source']!r}")
        kind = claim["measure"].get("kind")
        if kind not in ("record", "output", "gpu", "hardware"):
            raise ClaimError(f"{name}: no such kind of measurement: {kind!r}")
        if claim["verdict"] not in (*VERDICTS, NOT_RUN):
            raise ClaimError(f"{name}: no such verdict: {claim['verdict']!r}")
        if kind != "hardware" and "holds" not in claim:
            raise ClaimError(f"{name}: a measured claim says when it holds")
    return data["sources"], data["claims"]


def evaluate(claim, found, where="this run", references=(), folders=(), gpu=None):
    """`Finding` for one claim.

    found       {method: record} of the run that is looked at first, called `where`
    references  `reference.Reference`s, asked in order where `found` lacks a record
    folders     [(name, folder)] with executed notebooks, asked in order
    gpu         the GPU reference as `reference.gpu()` gives it, or None
    Raises NotRun where nothing has measured it, and ClaimError where the measurement should be there and is not.
    """
    measure = claim["measure"]
    if measure["kind"] == "hardware":
        return Finding(claim, None, f"needs {measure['needs']}", VERDICTS[3], "")
    if measure["kind"] == "gpu":
        names, where = _from_gpu(claim, gpu)
        if names is None:
            return Finding(claim, None, f"needs {measure['needs']}", VERDICTS[3], "")
    elif measure["kind"] == "record":
        names, where = _from_records(claim, found, where, references)
    else:
        names, where = _from_output(claim, folders)
    value = names["value"]
    verdict = VERDICTS[2]
    for word, condition in ((VERDICTS[0], claim["holds"]), (VERDICTS[1], claim.get("partly"))):
        if condition and _calculate(condition, names, claim):
            verdict = word
            break
    try:
        text = claim.get("says", "{value:.3g}").format(**names, answer="yes" if value else "no")
    except (KeyError, IndexError, ValueError) as error:
        raise ClaimError(f"{claim['id']}: its text cannot be filled in ({error})") from error
    return Finding(claim, value, text, verdict, where)


def ledger(output_dir="build"):
    """The `Finding` of every claim: from this build folder's records and notebooks, else from those that come with the course."""
    build = records.folder(output_dir)
    folders = [("this run", build / "notebooks"), ("committed run", notebooks.FOLDER)]
    own, references, gpu = records.read(output_dir), reference.read(), reference.gpu()
    result = []
    for claim in read()[1]:
        try:
            result.append(evaluate(claim, own, "this run", references, folders, gpu))
        except NotRun:
            result.append(Finding(claim, None, "", NOT_RUN, ""))
    return result


def committed():
    """[(claim, Finding or the ClaimError)] from what is committed alone: references and the notebooks' stored outputs."""
    references, gpu = reference.read(), reference.gpu()
    result = []
    for claim in read()[1]:
        try:
            result.append((claim, evaluate(claim, {}, "", references, [("committed run", notebooks.FOLDER)], gpu)))
        except ClaimError as error:
            result.append((claim, error))
    return result


def problems(pairs=None):
    """What is wrong with the ledger, a line each: no measurement, or a stored verdict that its numbers do not bear out.

    A claim whose notebook is not part of the course (yet) is no problem; it is shown as not run.
    """
    lines = []
    for claim, finding in committed() if pairs is None else pairs:
        if isinstance(finding, NotRun):
            if claim["verdict"] != NOT_RUN:
                lines.append(f"{claim['id']}: stored as {claim['verdict']!r}, but {finding}")
        elif isinstance(finding, ClaimError):
            lines.append(str(finding))
        elif claim["verdict"] != finding.verdict:
            lines.append(f"{claim['id']}: stored as {claim['verdict']!r}, but {finding.found} gives {finding.verdict!r}")
        elif not _equal(claim.get("value"), finding.value):
            lines.append(f"{claim['id']}: stored value {claim.get('value')}, measured {finding.value}: run `python -m helpers reference`")
    return lines


def fill(path=None):
    """Write values and verdicts as they are measured now into the ledger; returns a line for each verdict that changed."""
    path = path or PATH
    data = json.loads(path.read_text(encoding="utf-8"))
    by_id = {claim["id"]: finding for claim, finding in committed()}
    changed = []
    for claim in data["claims"]:
        finding = by_id[claim["id"]]
        if isinstance(finding, ClaimError) and not isinstance(finding, NotRun):
            continue  # `problems` reports it
        verdict = NOT_RUN if isinstance(finding, NotRun) else finding.verdict
        value = None if isinstance(finding, NotRun) else finding.value
        if verdict != claim["verdict"]:
            changed.append(f"{claim['id']}: {claim['verdict']} -> {verdict}")
        claim["verdict"], claim["value"] = verdict, value if value is None else float(f"{value:.6g}")
    records.write_text(path, dumps(data))
    return changed


def dumps(data):
    """The ledger as JSON with one line per claim, so that a change is one line in a diff."""
    rows = ",\n".join("  " + json.dumps(claim, ensure_ascii=False) for claim in data["claims"])
    return f'{{\n "sources": {json.dumps(data["sources"], ensure_ascii=False, indent=2)},\n "claims": [\n{rows}\n ]\n}}\n'


def frame(findings):
    """The ledger as a pandas DataFrame."""
    import pandas

    rows = [[f.claim["claim"], f.claim["source"], notebook(f.claim), f.found, f.verdict, f.where] for f in findings]
    return pandas.DataFrame(rows, columns=["claim", "guide", "measured in", "found", "verdict", "whose run"])


def notebook(claim):
    """Where a claim is measured: the notebook's number, "records", or "" where nothing here can."""
    measure = claim["measure"]
    return {"output": measure.get("notebook", ""), "record": "records", "gpu": "GPU reference"}.get(measure["kind"], "")


def rows(path):
    """The rows of the table(s) under "What the guides claim" in an executed notebook, each a list of cell texts.

    Raises NotRun if the notebook has no such output.
    """
    inside, found = False, []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            inside = inside and not re.search(r"^## ", source, re.M) or "## What the guides claim" in source
        elif inside:
            for output in cell.get("outputs", []):
                page = output.get("data", {}).get("text/html")
                if page:
                    reader = _Table()
                    reader.feed("".join(page))
                    found += reader.rows
    if not found:
        raise NotRun(f"{path.name} has not been executed")
    return found


class _Table(HTMLParser):
    """Collects the <td> texts of each <tr>."""

    def __init__(self):
        super().__init__()
        self.rows, self.cell = [], None

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.cell = []

    def handle_endtag(self, tag):
        if tag == "td" and self.cell is not None:
            self.rows[-1].append("".join(self.cell).strip())
            self.cell = None
        elif tag == "tr" and self.rows and not self.rows[-1]:
            self.rows.pop()  # a heading

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)


def _from_records(claim, found, where, references):
    """({"value": number, and the records}, whose run)."""
    measure = claim["measure"]
    anywhere = measure.get("on") != "cpu"
    candidates = [(found, where), *((item.records, f"reference, {item.device}") for item in references)]
    missing = "no records"
    for group, name in candidates:
        usable = {m: r for m, r in group.items() if anywhere or reference.on_cpu(r["device"])}
        names = {method.replace("-", "_"): record for method, record in usable.items()}
        try:
            return {**names, "value": _calculate(measure["value"], names, claim)}, name
        except NotRun as error:
            missing = error
    raise NotRun(str(missing))


def _from_gpu(claim, gpu):
    """({"value": number, and its parts}, whose run), or (None, "") where the reference does not hold them."""
    names = {}
    for name, path in claim["measure"]["paths"].items():
        node = gpu
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        if not isinstance(node, (int, float)):
            return None, ""
        names[name] = node
    return {**names, "value": _calculate(claim["measure"]["value"], names, claim)}, f"reference, {gpu['device']}"


def _from_output(claim, folders):
    measure, problem = claim["measure"], NotRun(f"{claim['id']}: notebook {claim['measure']['notebook']} has not been run")
    for name, folder in folders:
        paths = sorted(folder.glob(f"{measure['notebook']}_*.ipynb"))
        try:
            lines = rows(paths[0]) if paths else None
        except NotRun:
            lines = None
        if lines is None:
            continue
        starts = [(line, n) for line in lines for n, cell in enumerate(line) if cell.startswith(measure["row"])]
        texts = [" | ".join(line[n + 1 :]) for line, n in starts]
        if not texts:
            problem = ClaimError(f"{claim['id']}: notebook {measure['notebook']} has no cell that begins with {measure['row']!r}")
            continue
        match = re.search(measure["find"], texts[0])
        if not match:  # on another machine a row may say that it could not be measured: then the next folder is asked
            problem = ClaimError(f"{claim['id']}: {measure['find']!r} does not match {texts[0]!r}")
            continue
        names = {key: _number(text) for key, text in match.groupdict().items()}
        names["value"] = _calculate(measure["value"], names, claim)
        return names, name
    raise problem


def _number(text):
    try:
        return float(text.replace(",", ""))
    except (AttributeError, ValueError):
        return 0.0 if text is None else 1.0


OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.USub: operator.neg,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Not: operator.not_,
}  # fmt: skip
FUNCTIONS = {"min": min, "max": max, "abs": abs}


def _calculate(expression, names, claim):
    """Value of a small arithmetic expression: numbers, names, fields of records, + - * /, comparisons, and/or/not, min max abs."""

    def walk(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.Name):
            if node.id not in names:
                raise NotRun(f"{claim['id']}: {node.id} has not been run")
            return names[node.id]
        if isinstance(node, ast.Attribute):
            record = walk(node.value)
            if node.attr == "on_cpu":
                return float(reference.on_cpu(record["device"]))
            if record.get(node.attr) is None:
                raise NotRun(f"{claim['id']}: {record['method']} has no {node.attr}")
            return record[node.attr]
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp):
            return OPERATIONS[type(node.op)](walk(node.operand))
        if isinstance(node, ast.BoolOp):
            return (all if isinstance(node.op, ast.And) else any)(walk(value) for value in node.values)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return OPERATIONS[type(node.ops[0])](walk(node.left), walk(node.comparators[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords:
            return FUNCTIONS[node.func.id](*(walk(value) for value in node.args))
        raise ClaimError(f"{claim['id']}: {expression!r} is more than arithmetic")

    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ClaimError(f"{claim['id']}: {expression!r} is no expression ({error})") from error
    try:
        value = walk(tree)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ClaimError(f"{claim['id']}: {expression!r} cannot be calculated ({type(error).__name__}: {error})") from error
    if not isinstance(value, (int, float)):
        raise ClaimError(f"{claim['id']}: {expression!r} gives no number")
    return value


def _equal(stored, measured):
    if stored is None or measured is None:
        return stored is measured
    return abs(stored - measured) <= 1e-4 * max(abs(stored), abs(measured), 1e-9)
