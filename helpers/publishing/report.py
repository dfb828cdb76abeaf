"""One self-contained HTML page of a run: all methods, plots with their tables, the claims ledger, timings, environment."""

import base64
import datetime
import platform
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from helpers import figures, files, records
from helpers.process import cores
from helpers.publishing import claims, pareto, reference, tables, verdicts
from helpers.publishing.reference import Reference
from helpers.publishing.result import Result
from helpers.records import Record

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quantization course: this run</title><link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; color: #1a1a1a; background: #fff }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.text { text-align: left } td.text { white-space: normal; min-width: 5rem } .claims th { text-align: left } td.claim { min-width: 14rem }
.wide img { width: 100%; min-width: 56rem; height: auto } summary { cursor: pointer; padding: .2rem 0; color: #0b4f8a } .failed { color: #a40000; font-weight: 600 } a { color: #0b4f8a }
</style></head><body>
<h1>Quantization course: this run</h1>
<p>{{ date }}, {{ device }}. Evaluation: {{ protocol }}.</p>
<nav aria-label="Contents">{% for plot in plots %}<a href="#plot{{ loop.index }}">{{ plot.title }}</a> · {% endfor %}<a href="#methods">All methods</a> · \
<a href="#notebooks">Notebooks</a> · <a href="#claims">Claims</a> · {% if references or gpu %}<a href="#references">References</a> · {% endif %}<a href="#environment">Environment</a></nav>
{% for plot in plots %}<h2 id="plot{{ loop.index }}">{{ plot.title }}</h2>
<div class="wide" tabindex="0" role="region" aria-label="Picture: {{ plot.title }}"><img alt="{{ plot.alt }}" src="data:image/png;base64,{{ plot.png }}"></div><p><em>{{ plot.alt }}</em></p>
{% if tuned %}<p>Not in the plot: {{ tuned|join(", ") }}. Fine-tuning is meant to leave the untouched model, so there KL is no loss of quality.</p>
{% endif %}<details><summary>The numbers of this picture</summary>{{ plot.html }}</details>
{% endfor %}
<h2 id="methods">All methods</h2>
<p>A dash means: not measured, or does not apply. "{{ not_run }}" means: no record in this run. A click on a heading sorts.</p>
{{ methods }}
<h2 id="notebooks">Notebooks</h2>
<div class="wide" tabindex="0" role="region" aria-label="Notebooks"><table><thead><tr><th scope="col">notebook</th><th scope="col">seconds</th><th scope="col">peak GB</th><th scope="col">verdict</th></tr></thead>
<tbody>{% for r in results %}<tr><td>{{ r.notebook }}</td><td>{{ "%.0f"|format(r.seconds) }}</td><td>{{ "%.2f"|format(r.peak_ram_bytes / 1e9) }}</td>
<td class="text{{ "" if r.ok else " failed" }}">{{ r.verdict }}</td></tr>{% endfor %}
<tr><td>together</td><td>{{ "%.0f"|format(results|sum(attribute="seconds")) }}</td><td></td><td class="text">{{ results|selectattr("ok")|list|length }} of {{ results|length }} ok</td></tr></tbody></table></div>
<h2 id="claims">What the guides claim</h2>
<p>{{ counts }}. Each claim is judged by the measurement nearest to what it speaks of, of this run or of those that come with the course.</p>
<ul>{% for key, title in sources.items() %}<li>{{ key }}: {{ title }}</li>{% endfor %}</ul>
<div class="wide" tabindex="0" role="region" aria-label="Claims"><table class="claims"><thead><tr>{% for head in ("claim", "guide", "found", "judged on", "verdict", "whose run", "measured elsewhere") %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>{% for v in verdicts %}<tr><td class="text claim">{{ v.claim.claim }}</td><td class="text">{{ v.claim.source }}</td><td class="text claim">{{ v.found }}</td><td class="text">{{ v.judged_on }}</td>
<td class="text">{{ v.word }}</td><td class="text">{{ v.whose }}</td><td class="text claim">{{ v.elsewhere }}</td></tr>{% endfor %}</tbody></table></div>
{% if references or gpu %}<h2 id="references">References</h2>
<p>These runs come with the course. Compare the KL; the speed belongs to each machine.</p>
{% for other in references %}<details><summary>{{ other.device }}, {{ other.date }}: {{ other.model }}</summary>{{ other.html }}</details>
{% endfor %}
{% if gpu %}<details><summary>{{ gpu.device }}, {{ gpu.date }}: {{ gpu.model }}</summary>{{ gpu_table }}</details>{% endif %}
{% endif %}<h2 id="environment">Environment</h2>
<p>{{ system }}, {{ cores }} CPU cores. {% for name, version in versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</p>
</body></html>
"""
TITLES = {"weight_bytes": "Quality against size", "decode_tokens_per_s": "Quality against speed"}


def write(build: Path, results: Sequence[Result]) -> Path:
    """Write `report.html` into the build folder from its records and these results; returns its path."""
    values = {**_measured(records.read(build)), **_environment(), **_judged(claims.ledger(build)), "results": results}
    path = build / "report.html"
    files.write_text(path, jinja2.Environment(autoescape=True).from_string(PAGE).render(values))
    return path


def _measured(found):
    """What the page shows of these records {method: record}, with plots and the results that come with the course beside them."""
    references, gpu = reference.read(), reference.gpu()
    return {
        "device": ", ".join(sorted({record["device"] for record in found.values()})) or "no records",
        "protocol": "; ".join(sorted({_protocol(each) for each in found.values() if each["eval_tokens"]})) or "none",
        "not_run": tables.NOT_RUN,
        "methods": Markup(tables.methods(found, expected(references))),
        "references": [_reference(each) for each in references],
        "gpu": gpu,
        "gpu_table": gpu and Markup(_gpu_table(gpu)),
        "plots": [plot for plot in (_plot(found, against) for against in TITLES) if plot],
        "tuned": [method for method in pareto.FINE_TUNED if method in found],
    }


def _protocol(record):
    return f"{record['eval_tokens']:,} tokens of {record['eval_text']} in windows of {record['eval_context']}"


def _reference(kept):
    html = Markup(tables.methods(kept.records, caption=f"Reference: {kept.device}"))
    return {"device": kept.device, "model": kept.model, "date": kept.date, "html": html}


def _judged(verdicts):
    return {"counts": counts(verdicts), "verdicts": verdicts, "sources": claims.read()[0]}


def _environment():
    return {
        "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "versions": records.versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
    }


def _gpu_table(gpu):
    rows = [
        [(what, None), *((tables.NOT_MEASURED, "") if value is None else (f"{value:.1f}", value) for value in values)]
        for what, *values in reference.gpu_rows(gpu)
    ]
    return tables.table(["what", "weights, GB", "peak, GB", "tokens/s"], rows, f"Reference: {gpu['device']}")


def expected(references: Sequence[Reference]) -> dict[str, str]:
    """{method: notebook} of what a run of all notebooks writes: the first reference is such a run. Others hold more, such as `full=True`."""
    return {method: record["notebook"] for other in references[:1] for method, record in other.records.items()}


def counts(judged: Sequence[verdicts.Verdict]) -> str:
    """How many claims have which verdict, in one line."""
    numbers = {word: sum(verdict.word == word for verdict in judged) for word in verdicts.WORDS}
    return f"{len(judged)} claims: " + ", ".join(f"{word} {number}" for word, number in numbers.items() if number)


def picture(found: Sequence[Record]) -> tuple[bytes | None, str]:
    """(PNG bytes, alternative text) of quality against size for a list of records; (None, "") for fewer than two.

    Two panels: the README shows it about 900 pixels wide, where three would be too small to read.
    """
    plot = _draw(found, "weight_bytes", most=2)
    return plot[:2] if plot else (None, "")


def _draw(found, against, most=3):
    """(PNG, alternative text, table) or None, drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plot = pareto.plot(found, against, most)
    if plot is None:
        return None
    fig, alt, table = plot
    png = figures.to_png(fig)
    plt.close(fig)
    return png, alt, table


def _plot(found, against):
    plot = _draw(list(found.values()), against)
    if plot is None:
        return None
    png, alt, table = plot
    rows = [
        [(row[0], None), (f"{row[1]:.1f}", row[1]), (f"{row[2]:.4f}", row[2]), (row[3], None)]
        for row in table.values.tolist()
    ]
    return {
        "title": TITLES[against],
        "png": base64.b64encode(png).decode(),
        "alt": alt,
        "html": Markup(tables.table(list(table.columns), rows, TITLES[against])),
    }
