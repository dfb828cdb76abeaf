"""One table of all methods as plain HTML: readable without a front end, sorted by a click or by the keyboard where scripts run."""

import html
from collections.abc import Iterable, Mapping, Sequence

from helpers.records import Record

Cell = tuple[str, float | str | None]  # text and sort key: a number, "" for none, None to sort by the text

# field of a record: (heading, format, factor); `interval` writes the two without a format
COLUMNS = {
    "bits_per_weight": ("bits per weight", "{:.2f}", 1),
    "weight_bytes": ("weights, MB", "{:.0f}", 1e-6),
    "perplexity": ("perplexity", "{:.2f}", 1),
    "kl_divergence": ("KL", "", 1),
    "in_domain": ("KL on pydoc", "", 1),
    "top1_agreement": ("same top-1", "{:.3f}", 1),
    "decode_tokens_per_s": ("decode tok/s", "{:.1f}", 1),
    "quantize_seconds": ("quantize s", "{:.1f}", 1),
    "peak_memory_bytes": ("peak GB", "{:.2f}", 1e-9),
}
NOT_MEASURED = "–"
NOT_RUN = "not run here"

# In the attribute itself, so that the table needs no script element. Cells without a number stay at the end, and so does a second body.
SORT = """
const h=this.parentNode,t=h.closest('table'),b=t.tBodies[0],n=[...h.parentNode.children].indexOf(h),
up=h.getAttribute('aria-sort')!=='ascending';
for(const o of h.parentNode.children)o.removeAttribute('aria-sort');
h.setAttribute('aria-sort',up?'ascending':'descending');
const k=r=>{const c=r.children[n];return c.hasAttribute('data-v')?(c.dataset.v===''?null:Number(c.dataset.v)):c.textContent};
[...b.rows].sort((x,y)=>{const p=k(x),q=k(y);if(p===null||q===null)return (p===null)-(q===null);
return (p>q?1:p<q?-1:0)*(up?1:-1)}).forEach(r=>b.append(r));
""".replace("\n", "")
BUTTON = "font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-decoration:underline dotted"


def methods(
    found: dict[str, Record],
    expected: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    sort_by: str = "weight_bytes",
    caption: str = "All methods of this run",
) -> str:
    """HTML table of records ({method: record}), one row each, sorted by a field; those without it come last.

    expected  {method: notebook} of what could have been run: a method without a record gets a row that says so, and no numbers

    Raises ValueError for a field that is no column.
    """
    if sort_by != "method" and sort_by not in COLUMNS:
        raise ValueError(f"sort_by must be method or one of {', '.join(COLUMNS)}, not {sort_by!r}")
    rows = [
        [(method, None), (record["notebook"][:2], None), *(_cell(record, name) for name in COLUMNS)]
        for method, record in found.items()
    ]
    at = 0 if sort_by == "method" else 2 + list(COLUMNS).index(sort_by)
    rows.sort(key=lambda row: (row[at][1] == "", row[at][0] if at == 0 else row[at][1] or 0))
    missing = [[(method, None), (notebook[:2], None), (NOT_RUN, ""), *[("", "")] * (len(COLUMNS) - 1)]
               for method, notebook in dict(expected).items() if method not in found]  # fmt: skip
    return table(["method", "notebook", *(head for head, _, _ in COLUMNS.values())], rows, caption, missing)


def table(
    heads: Iterable[str], rows: Sequence[Sequence[Cell]], caption: str, last: Sequence[Sequence[Cell]] = ()
) -> str:
    """A sortable HTML table of rows of `Cell`s. All is escaped.

    last  rows that stay at the end, whatever is sorted
    """
    head = "".join(
        f'<th scope="col"><button type="button" style="{BUTTON}" onclick="{html.escape(SORT)}">{html.escape(text)}</button></th>'
        for text in heads
    )
    bodies = "".join(f"<tbody>{''.join(map(_row, part))}</tbody>" for part in (rows, last) if part)
    return (
        f'<div style="overflow-x:auto" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>{bodies}</table></div>"
    )


def _row(row):
    cells = []
    for text, key in row:
        mark = ' style="text-align:left"' if key is None else f' data-v="{html.escape(str(key))}"'
        cells.append(f"<td{mark}>{html.escape(str(text))}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def interval(value: float, low: float | None = None, high: float | None = None) -> str:
    """A KL divergence with its interval, in nats, as "0.327 [0.312, 0.343]"; small ones get a fourth digit."""
    digits = 3 if value >= 0.1 else 4
    mean, *ends = (f"{round(number, digits) + 0.0:.{digits}f}" for number in (value, low, high) if number is not None)
    return f"{mean} [{', '.join(ends)}]" if len(ends) == 2 else mean


def _cell(record, name):
    """(text, sort key) of one field; the KL divergence shows its interval and is sorted by the number."""
    value = record[name]
    if name == "in_domain" and value is not None:
        value = value["kl_divergence"]
    if value is None:
        return NOT_MEASURED, ""
    if name == "kl_divergence":
        return interval(value, record["kl_low"], record["kl_high"]), value
    if name == "in_domain":
        return interval(value), value
    _, form, factor = COLUMNS[name]
    return form.format(value * factor), value
