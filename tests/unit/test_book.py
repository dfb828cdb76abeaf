"""The site without a browser: every link and picture leads somewhere, every page has its parts, nothing comes from elsewhere."""

import json
import re

import bs4
import nbformat
import pytest

from helpers.publishing import pages, site

NAMES = [path.stem for path in pages.paths()]
FILES = ["index", *NAMES]


@pytest.fixture(scope="module")
def soups(site):
    """{file name: its page}, without the report, which is a page of its own kind."""
    names = [path.name for path in site.glob("*.html") if path.name != "report.html"]
    return {name: bs4.BeautifulSoup((site / name).read_text(encoding="utf-8"), "html.parser") for name in names}


def test_a_page_for_each_notebook_and_no_more(soups):
    assert sorted(soups) == sorted(f"{name}.html" for name in FILES)


def test_all_links_lead_somewhere(site, soups):
    broken, checked = [], 0
    for name, soup in soups.items():
        for link in soup("a", href=True):
            target, _, part = link["href"].partition("#")
            if target.startswith("https://"):
                continue
            checked += 1
            if not (site / (target or name)).is_file() or (part and not soups[target or name].find(id=part)):
                broken.append((name, link["href"]))
    assert broken == [] and checked > 100


def test_without_an_address_nothing_leads_to_one(soups):
    assert not pages.is_public(), "the course has an address now: this test and the next change places"
    for name, soup in soups.items():
        assert [
            link["href"]
            for link in soup("a", href=True)
            if "YOUR_ACCOUNT" in link["href"] or "colab.research" in link["href"]
        ] == [], name


@pytest.mark.integration
def test_with_an_address_links_lead_to_files_in_the_repository_and_to_colab(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "repository", lambda: "https://github.com/someone/course")
    monkeypatch.setattr(pages, "paths", lambda paths=pages.paths(): paths[:2])
    site.build(tmp_path)
    soups = {
        name: bs4.BeautifulSoup((tmp_path / "site" / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
        for name in NAMES[:2]
    }
    blob = "https://github.com/someone/course/blob/main/"
    files = {
        link["href"].removeprefix(blob)
        for soup in soups.values()
        for link in soup("a", href=True)
        if link["href"].startswith(blob)
    }
    assert {f"notebooks/{name}.ipynb" for name in NAMES[:2]} <= files
    assert [name for name in files if not (pages.ROOT / name.partition("#")[0]).exists()] == []
    for name, soup in soups.items():
        (link,) = [link for link in soup("a") if link.text == "Open in Colab"]
        assert link["href"] == pages.colab(f"{name}.ipynb") != ""


def test_nothing_is_fetched_from_elsewhere_and_no_notebook_brings_a_script(soups):
    for name, soup in soups.items():
        loaded = [element.get("src") or element.get("href") for element in soup(["script", "img", "link", "iframe"])]
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == [], name
        assert [script.get("src") for script in soup("script")] == ["book.js"] and not soup("style"), name
        assert [
            element.name for element in soup(True) if any(attribute.startswith("on") for attribute in element.attrs)
        ] == [], name


def test_parts_that_every_page_has(soups):
    titles = [soup.title.text for soup in soups.values()]
    assert len(set(titles)) == len(titles) and all(titles)
    for name, soup in soups.items():
        assert soup.html["lang"] == "en" and soup.find("meta", attrs={"name": "viewport"}), name
        assert len(soup("h1")) == 1 and soup.find("main") and soup.find("label", attrs={"for": "query"}), name
        ids = [element["id"] for element in soup(id=True)]
        assert len(ids) == len(set(ids)), f"{name}: an id stands twice"
        assert [picture["src"][:30] for picture in soup("img") if len(picture.get("alt", "")) < 30] == [], (
            f"{name}: no alternative text"
        )


def test_previous_and_next_lead_through_all_notebooks_and_back(soups):
    for step, order in (("next", NAMES), ("prev", NAMES[-2::-1])):
        at, seen = ("index.html" if step == "next" else f"{NAMES[-1]}.html"), []
        while link := soups[at].find("a", rel=step):
            at = link["href"]
            seen.append(at.removesuffix(".html"))
        assert seen == order


def test_the_first_page_says_where_each_reader_starts_as_the_readme_does(soups):
    routes = soups["index.html"].find_all("section")[1:]  # the first one holds search results
    readme = (pages.ROOT / "README.md").read_text(encoding="utf-8")
    assert [route.h3.text for route in routes] == list(site.START)
    for route, (who, (_, numbers)) in zip(routes, site.START.items()):
        assert [link["href"][:2] for link in route("a")] == list(numbers)
        (line,) = re.findall(rf"^- \*\*{who}:?\*\*:? (.+)$", readme, re.M)
        assert re.findall(r"\b\d\d\b(?!_)", line) == list(numbers), who


def test_solutions_are_folded(soups):
    for path in pages.paths():
        folded = [
            block for block in soups[f"{path.stem}.html"]("details", class_="fold") if block.summary.text == "Solution"
        ]
        assert len(folded) == len(pages.tagged(nbformat.read(path, 4), "solution")) and not any(
            block.has_attr("open") for block in folded
        )


def test_search_index_knows_every_section(site, soups):
    text = (site / "search-index.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("window.courseIndex = ").rstrip(";\n"))
    for name in NAMES:
        headings = {element["id"] for element in soups[f"{name}.html"].main(["h1", "h2", "h3"])}
        assert {entry["link"].partition("#")[2] for entry in index if entry["link"].startswith(name)} == headings
    assert any("double quantization" in entry["text"].lower() and entry["link"].startswith("04") for entry in index)
    assert {"page", "heading", "link", "text"} == set(index[0])


def test_no_formula_is_left_as_tex(soups):
    for name, soup in soups.items():
        text = "\n".join(cell.get_text() for cell in soup(class_="text_cell"))
        assert not re.search(r"\$\$|\\(frac|sum|mathbf|text)\b", text), f"{name}: pages have no TeX renderer"


def test_a_widget_without_a_static_twin_leaves_no_python_name(soups):
    assert [
        name
        for name, soup in soups.items()
        if "VBox(" in "".join(output.get_text() for output in soup(class_="output"))
    ] == []


def executed(folder, change=lambda notebook: None):
    """A run of notebook 00 in a build folder, as `make run` leaves it, with one output of its own."""
    notebook = nbformat.read(pages.paths()[0], as_version=4)
    code = next(cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs)
    code.outputs = [nbformat.v4.new_output("stream", name="stdout", text="only on this machine\n")]
    change(notebook)
    target = folder / "notebooks" / pages.paths()[0].name
    target.parent.mkdir(parents=True)
    nbformat.write(notebook, target)
    return target


def fail(notebook):
    notebook.cells[-1].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[])]


def stop_early(notebook):
    notebook.cells[-1].execution_count = None


def edit(notebook):
    notebook.cells[-1].source += "\n# other"


@pytest.mark.parametrize(("change", "own"), [(lambda _: None, True), (fail, False), (stop_early, False), (edit, False)])
def test_outputs_of_this_machine_are_shown_only_if_they_are_whole_and_current(tmp_path, monkeypatch, change, own):
    monkeypatch.setattr(pages, "paths", lambda paths=pages.paths(): paths[:1])
    page = site._page(pages.paths()[0], executed(tmp_path, change))
    assert ("only on this machine" in str(page.notebook)) is own
    assert page.origin.startswith("Outputs: this machine" if own else "Outputs: the course")


@pytest.mark.integration
def test_a_script_in_an_output_does_not_reach_the_page(tmp_path, monkeypatch):
    def attack(notebook):
        code = next(cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs)
        code.outputs = [
            nbformat.v4.new_output(
                "display_data", {"text/html": "<b>kept</b><script>alert(1)</script><img src=x onerror=alert(1) alt=a>"}
            )
        ]

    executed(tmp_path, attack)
    monkeypatch.setattr(pages, "paths", lambda paths=pages.paths(): paths[:1])
    text = (site.build(tmp_path).parent / f"{NAMES[0]}.html").read_text()
    assert "<b>kept</b>" in text and "alert(1)" not in text and "onerror" not in text


@pytest.mark.integration
def test_the_report_is_part_of_the_site_when_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "paths", lambda paths=pages.paths(): paths[:1])
    (tmp_path / "report.html").write_text("<title>report</title>")
    front = site.build(tmp_path)
    assert 'href="report.html"' in front.read_text() and (front.parent / "report.html").is_file()


@pytest.mark.integration
def test_a_failing_build_leaves_the_old_site(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "paths", lambda paths=pages.paths(): paths[:1])
    front = site.build(tmp_path)
    before = front.read_text()
    monkeypatch.setattr(site, "_front", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        site.build(tmp_path)
    assert front.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["site"]


def test_no_notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "paths", lambda: [])
    with pytest.raises(ValueError, match="nothing to build"):
        site.build(tmp_path)
