"""One self-contained HTML page with the records of a run: table, picture, timings, environment."""

import base64
import datetime

import jinja2

from helpers import figures, records

COLUMNS = {
    "bits_per_weight": ("bits per weight", "{:.2f}", 1),
    "weight_bytes": ("weights, MB", "{:.0f}", 1e-6),
    "perplexity": ("perplexity", "{:.2f}", 1),
    "kl_divergence": ("KL", "{:.4f}", 1),
    "top1_agreement": ("same top-1", "{:.3f}", 1),
    "decode_tokens_per_s": ("decode tok/s", "{:.1f}", 1),
    "quantize_seconds": ("quantize s", "{:.1f}", 1),
    "peak_memory_bytes": ("peak GB", "{:.2f}", 1e-9),
}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quantization course: this run</title><link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #1a1a1a; background: #fff }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.text { text-align: left } img { max-width: 100%; height: auto } .failed { color: #a40000; font-weight: 600 }
</style></head><body>
<h1>Quantization course: this run</h1>
<p>{{ date }}, {{ device }}. Evaluation: {{ protocol }}. A dash means: not measured or does not apply.</p>
<h2>Methods</h2>
<div class="wide" tabindex="0" role="region" aria-label="Methods"><table><thead><tr><th scope="col">method</th>{% for head in heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
{% if picture %}<h2>Quality against size</h2><p><img alt="{{ alt }}" src="data:image/png;base64,{{ picture }}"></p><p><em>{{ alt }}</em></p>{% endif %}
<h2>Notebooks</h2>
<div class="wide" tabindex="0" role="region" aria-label="Notebooks"><table><thead><tr><th scope="col">notebook</th><th scope="col">seconds</th><th scope="col">peak GB</th><th scope="col">verdict</th></tr></thead>
<tbody>{% for r in results %}<tr><td>{{ r.notebook }}</td><td>{{ "%.0f"|format(r.seconds) }}</td><td>{{ "%.2f"|format(r.peak_ram_bytes / 1e9) }}</td>
<td class="text{{ "" if r.ok else " failed" }}">{{ r.verdict }}</td></tr>{% endfor %}</tbody></table></div>
<h2>Environment</h2><p>{% for name, version in versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</p>
</body></html>
"""


def write(build, results):
    """Write `report.html` into the build folder from its records and these `run.Result`s; returns its path."""
    found = sorted(records.read(build).values(), key=lambda record: -(record["weight_bytes"] or 0))
    rows = [[record["method"], *(_cell(record[name], form, scale) for name, (_, form, scale) in COLUMNS.items())] for record in found]
    png, alt = picture(found)
    evaluated = [record for record in found if record["eval_tokens"]]
    protocols = sorted({f"{r['eval_tokens']:,} tokens of {r['eval_text']} in windows of {r['eval_context']}" for r in evaluated})
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(
        date=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"), device=", ".join(sorted({r["device"] for r in found})) or "no records",
        protocol="; ".join(protocols) or "none", heads=[head for head, _, _ in COLUMNS.values()], rows=rows, picture=png and base64.b64encode(png).decode(), alt=alt,
        results=results, versions=records.versions(),
    )  # fmt: skip
    path = build / "report.html"
    records.write_text(path, page)
    return path


def _cell(value, form, scale):
    return "–" if value is None else form.format(value * scale)


def picture(found):
    """(PNG bytes, alternative text) of quality against size for a list of records; (None, "") for fewer than two."""
    points = [record for record in found if record["kl_divergence"] is not None and record["weight_bytes"]]
    if len(points) < 2:
        return None, ""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures.style()
    points.sort(key=lambda record: record["kl_divergence"])
    fig, ax = plt.subplots(figsize=(8, max(3.2, 0.3 * len(points))))
    for number, record in enumerate(points):
        color, (x, y) = figures.PALETTE[number % len(figures.PALETTE)], (record["weight_bytes"] / 1e6, max(record["kl_divergence"], 1e-5))
        ax.scatter(x, y, color=color, zorder=3)
        # Names stand in a column beside the plot, in the order of KL: beside their points they would cover each other.
        place = (1.06, (number + 0.5) / len(points))
        line = {"arrowstyle": "-", "color": color, "alpha": 0.5, "linewidth": 0.8, "relpos": (0, 0.5)}
        ax.annotate(f"{record['method']}, {x:.0f} MB", (x, y), place, textcoords=ax.transAxes, va="center", color=color, arrowprops=line)
    ax.set(xlabel="weights, MB", ylabel="KL from the untouched model", yscale="log")
    best = min(points, key=lambda record: record["weight_bytes"])
    alt = f"KL divergence from the untouched model against weight size for {len(points)} methods; the smallest is {best['method']} with {best['weight_bytes'] / 1e6:.0f} MB."
    png = figures.to_png(fig)
    plt.close(fig)
    return png, alt
