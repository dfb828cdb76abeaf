"""A static site of the executed notebooks: `build()` turns them into pages with search, contents and previous / next.

nbconvert renders the cells; the page around them, its style and its script are in `theme/`. Nothing on a page is fetched
from elsewhere, so the site works offline, from a folder or from any web server.
"""

import base64
import datetime
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import nbformat

from helpers import files
from helpers.publishing import pages, run, tables

COURSE = "Quantization course"
# Where three kinds of readers start: {who: (what they get, numbers of notebooks)}; the README says the same.
START = {
    "You have no GPU": (
        "Understand what quantization does to a model, load one in 4 bits, and run it with llama.cpp at the speed of your CPU.",
        ("00", "04", "08"),
    ),
    "You have a small GPU and want to fine-tune": (
        "Load a 7B model in 4 bits, train adapters beside it, and know before you start what will fit.",
        ("00", "04", "07"),
    ),
    "You want to serve a model": (
        "Quantize it with a method that servers load, compare all methods, and choose an engine.",
        ("00", "05", "06", "11", "12"),
    ),
}
SITE = Path(__file__).resolve().parent / "theme"
# nbconvert's plain cell template, with solutions folded. Widgets come last: a page without a kernel shows their static twin.
CELLS = """{%- extends 'basic/index.html.j2' -%}
{%- block input -%}
{%- if 'solution' in cell.metadata.get('tags', []) -%}<details class="fold"><summary>Solution</summary>{{ super() }}</details>
{%- elif 'bootstrap' in cell.metadata.get('tags', []) -%}<details class="fold"><summary>Set-up</summary>{{ super() }}</details>
{%- elif cell.metadata.get('jupyter', {}).get('source_hidden') -%}<details class="fold"><summary>Code</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}"""
# Pages keep no script that an output brings, so the site's own one makes the tables' headings sort.
SORTING = f"\nfor (const heading of document.querySelectorAll('th > button')) heading.onclick = function () {{{tables.SORT}}};\n"
SHOWN = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/plain"]


@dataclass
class Page:
    """One notebook on the site. origin says whose run its outputs come from."""

    name: str
    title: str
    promise: str
    notebook: nbformat.NotebookNode
    origin: str


def build(output_dir: Path | str = "build") -> Path:
    """Write the site into `<output_dir>/site` and return the path of its first page.

    Each notebook is shown with the outputs of this machine's last run where they are complete and of the present text, else with
    those it was committed with. An older site stays as it was if anything fails. Raises ValueError where there is no notebook.
    """
    folder = files.folder(output_dir)
    shown = [_page(path, folder / "notebooks" / path.name) for path in pages.paths()]
    if not shown:
        raise ValueError(f"no notebooks in {pages.FOLDER.name}/, so there is nothing to build")
    report = folder / "report.html"
    exporter, index = _exporter(), []
    with files.replacing(folder / "site") as scratch:
        for number, page in enumerate(shown):
            body, sections = _body(exporter, page, {other.name for other in shown})
            index += [dict(section, page=page.title, link=f"{page.name}.html#{section['id']}") for section in sections]
            around = dict(
                name=page.name, title=page.title, description=page.promise, origin=page.origin, body=body,
                sections=[section for section in sections if section["level"] == 2], colab=pages.colab(page.name + ".ipynb"),
                source=pages.is_public() and f"{pages.repository()}/blob/main/notebooks/{page.name}.ipynb",
                previous=shown[number - 1] if number else None, next=shown[number + 1] if number + 1 < len(shown) else None,
            )  # fmt: skip
            _write(scratch / f"{page.name}.html", shown, report, around)
        _write(scratch / "index.html", shown, report, _front(shown, scratch))
        shutil.copy(SITE / "book.css", scratch)
        files.write_text(scratch / "book.js", (SITE / "book.js").read_text(encoding="utf-8") + SORTING)
        if report.is_file():
            shutil.copy(report, scratch)
        words = [{"page": s["page"], "heading": s["heading"], "link": s["link"], "text": s["text"]} for s in index]
        files.write_text(
            scratch / "search-index.js", f"window.courseIndex = {json.dumps(words, ensure_ascii=False)};\n"
        )
    return folder / "site" / "index.html"


def _page(path, executed):
    """The notebook to show: this machine's run of it if that is complete and current, else the committed one."""
    committed = nbformat.read(path, as_version=4)
    shown, origin = committed, "Outputs: the course's own run"
    if executed.is_file():
        own = nbformat.read(executed, as_version=4)
        own.cells = [cell for cell in own.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        same = [cell.source for cell in own.cells] == [cell.source for cell in committed.cells]
        failed = any(output.output_type == "error" for cell in own.cells for output in cell.get("outputs", []))
        if same and not failed and not run.unexecuted(own):
            when = datetime.datetime.fromtimestamp(executed.stat().st_mtime)
            shown, origin = own, f"Outputs: this machine, {when:%Y-%m-%d}"
    return Page(path.stem, pages.title(shown), pages.promise(shown), shown, origin)


def _exporter():
    import jinja2
    import nbconvert

    class Cells(nbconvert.HTMLExporter):
        """Only the cells, without nbconvert's page, styles and scripts."""

        @property
        def default_config(self):
            config = super().default_config
            config["NbConvertBase"]["display_data_priority"] = SHOWN
            return config

    loader = jinja2.DictLoader({"course.html.j2": CELLS})
    return Cells(
        template_name="basic",
        template_file="course.html.j2",
        extra_loaders=[loader],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )


def _body(exporter, page, names):
    """(HTML of the cells, list of sections {id, heading, level, text}) of a page."""
    import bs4

    for cell in page.notebook.cells:
        if cell.cell_type == "markdown":  # the page shows these parts around the cells
            cell.source = re.sub(r"<!-- (badge|navigation) -->.*?<!-- /\1 -->", "", cell.source, flags=re.S)
        cell.outputs = [
            output for output in cell.get("outputs", []) if output.get("name") != "stderr" and not _only_live(output)
        ]
    html, _ = exporter.from_notebook_node(page.notebook)
    soup = bs4.BeautifulSoup(html, "html.parser")
    for element in soup(["style", "script"]):
        element.decompose()
    for table in soup("table"):
        table.attrs.pop("border", None)
        table.wrap(soup.new_tag("div", attrs={"class": "wide", "role": "region", "aria-label": "Table"}))
    for picture in soup("img"):
        if not str(picture["src"]).startswith("data:"):
            picture.replace_with(str(picture.get("alt", "")))
            continue
        if width := _width(str(picture["src"])):  # a phone shows it smaller, but never too small to read
            picture["style"] = f"--width: {width}px"
        picture.wrap(soup.new_tag("div", attrs={"class": "wide picture"}))
    for element in soup(True):  # an output may hold whatever a model said: drop its event handlers
        element.attrs = {name: value for name, value in element.attrs.items() if not name.startswith("on")}
    for link in soup("a", href=True):
        link["href"] = _address(str(link["href"]), names)
        if not link["href"]:
            link.unwrap()
    for link in soup(class_="anchor-link"):
        link["aria-label"] = "Link to this section"
    return str(soup), _sections(soup, page.title)


def _width(address):
    """Pixels across of a PNG in a data address; None for anything else."""
    kind, _, data = address.partition(";base64,")
    return int.from_bytes(base64.b64decode(data[:32])[16:20], "big") if kind == "data:image/png" else None


def _only_live(output):
    """True for a widget without a static twin: a page without a kernel could show only its Python name."""
    data = output.get("data", {})
    return "application/vnd.jupyter.widget-view+json" in data and "text/html" not in data


def _address(href, names):
    """Where a link of a notebook leads on the site: to the page of a notebook, or to a file in the repository ("" while that has no address)."""
    target, hash_, part = href.partition("#")
    if not target or re.match(r"[a-z]+:", target):
        return href
    if target.endswith(".ipynb") and Path(target).stem in names:
        return f"{Path(target).stem}.html{hash_}{part}"
    path = (pages.FOLDER / target).resolve().relative_to(pages.ROOT.resolve())
    return f"{pages.repository()}/blob/main/{path.as_posix()}{hash_}{part}" if pages.is_public() else ""


def _sections(soup, title):
    """The page cut at its headings: id, heading, level and plain text of each, for contents and search."""
    found = []
    for element in soup.find_all(["h1", "h2", "h3", "p", "li", "td", "th", "pre"]):
        if element.name in ("h1", "h2", "h3"):
            words = "".join(text for text in element.strings if text != "¶").strip()
            if element.get("id"):
                found.append({"id": element["id"], "heading": words, "level": int(element.name[1]), "text": []})
        elif found and not element.find_parent(["li", "td", "th"]):
            found[-1]["text"].append(element.get_text(" " if element.name == "li" else ""))
    if not found:
        raise ValueError(f"{title} has no headings")
    return [dict(section, text=" ".join(" ".join(section["text"]).split())) for section in found]


def _front(shown, scratch):
    """What the first page says: for whom the course is, where each kind of reader starts, and what comes out of it."""
    import jinja2

    costs = [page.notebook.metadata.get("course", {}).get("cost", {}).get("cpu") for page in shown]
    rows = [(page, f"{cost['seconds'] / 60:.1f} min" if cost else "") for page, cost in zip(shown, costs, strict=True)]
    picture = re.search(r"<!-- picture -->\s*!\[(.*?)\]", (pages.ROOT / "README.md").read_text(encoding="utf-8"))
    if picture and pages.PICTURE.is_file():
        shutil.copy(pages.PICTURE, scratch)
    by_number = {page.name[:2]: (page, time) for page, time in rows}
    routes = [
        {"who": who, "what": what, "rows": [by_number[number] for number in numbers if number in by_number]}
        for who, (what, numbers) in START.items()
    ]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(SITE), autoescape=True)
    body = environment.get_template("front.html.j2").render(
        course=COURSE,
        rows=rows,
        paths=routes,
        alt=picture and picture[1],
        picture=pages.PICTURE.name,
        repository=pages.is_public() and pages.repository(),
    )
    return {
        "name": "index",
        "title": COURSE,
        "description": "Quantization of language models, measured",
        "body": body,
        "next": shown[0],
    }


def _write(target, shown, report, values):
    import jinja2
    import markupsafe

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(SITE), autoescape=True)
    values = dict(values, body=markupsafe.Markup(values["body"]))
    text = environment.get_template("page.html.j2").render(
        course=COURSE, pages=shown, report=report.is_file(), **values
    )
    files.write_text(target, text)
