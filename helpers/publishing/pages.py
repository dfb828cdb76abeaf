"""The notebooks as files: their list, and the parts of them that are made from one source.

Badge, cost card, bootstrap cell and previous/next links are generated, so that a fork changes the repository's address in
pyproject.toml, runs `make links`, and all of them follow. A test compares what is committed with what would be generated.
"""

from __future__ import annotations

import base64
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import files

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = files.COURSE
FOLDER = files.NOTEBOOKS
PICTURE = FOLDER / "results.png"  # quality against size, from the records of the committed run
# Pictures of executed notebooks that the README shows: {its part: (notebook, words of the picture's alternative text, file)}
SHOWN = {"below": ("10_below_four_bits", "against bits per weight", FOLDER / "below_four_bits.png")}

BOOTSTRAP = """\
import importlib.util, os, pathlib, runpy, subprocess  # finds the course, or clones it, and prepares this process
here, other = pathlib.Path.cwd(), importlib.util.find_spec("helpers")
known = [pathlib.Path(place).parent for place in getattr(other, "submodule_search_locations", None) or []]
places = [here, *here.parents, *known, here / "quantization-course"]
course = next((place for place in places if (place / "helpers" / "bootstrap.py").is_file()), places[-1])
clone = ["git", "clone", "--quiet", "--depth", "1", os.environ.get("COURSE_SOURCE", "{repository}"), str(course)]
assert course.is_dir() or not subprocess.run(clone).returncode, "No course at that address: set COURSE_SOURCE to yours."
runpy.run_path(str(course / "helpers" / "bootstrap.py"))["start"]({packages})"""


def paths() -> list[Path]:
    """The course's notebooks in reading order."""
    return files.notebooks()


def read(path: Path) -> NotebookNode:
    """A notebook file as nbformat's object."""
    import nbformat  # its import takes a second, and every notebook imports this module for its folders

    return nbformat.read(path, as_version=4)


def title(notebook: NotebookNode) -> str:
    """Text of the first heading; "untitled" without one."""
    first = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    match = re.search(r"^# (.+)$", first, re.M)
    return match.group(1) if match else "untitled"


def promise(notebook: NotebookNode) -> str:
    """The sentence under the title, on one line: it stands in tables too."""
    paragraphs = [" ".join(part.split()) for part in notebook.cells[0].source.split("\n\n")]
    return next((part for part in paragraphs[1:] if not part.startswith(("<!--", "[!", "|"))), "")


def repository() -> str:
    """The course's address, from pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["urls"]["Repository"]


def is_public() -> bool:
    """True once pyproject.toml names the course's own address: until then no page links to it."""
    return "YOUR_ACCOUNT" not in repository()


def colab(name: str) -> str:
    """Address that opens a notebook file in Colab, or "" while the course has no public address."""
    if not is_public():
        return ""
    owner = repository().removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{name}"


def badge(name: str) -> str:
    """Markdown of the Colab badge for a notebook file, or "" while the course has no public address."""
    if not is_public():
        return ""
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab(name)})"


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    """The cells with a tag."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def copies(path: Path) -> float:
    """How many times a notebook holds its model in full precision at once: what it says to `models.find`, 1 if it says nothing."""
    said = re.search(r"models\.find\(.*?copies=([\d.]+)", path.read_text(encoding="utf-8"))
    return float(said[1]) if said else 1.0


def reading_minutes(notebook: NotebookNode) -> float:
    """Minutes to read a notebook: 200 words or 20 lines of code a minute, without folded cells and solutions."""
    prose = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    words = sum(len(re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.S).split()) for text in prose)
    folded = [cell for cell in notebook.cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    folded += tagged(notebook, "solution")
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell not in folded]
    lines = sum(1 for cell in code for line in cell.source.splitlines() if line.strip())
    return words / 200 + lines / 20


def cost_card(notebook: NotebookNode) -> str:
    """Markdown table of what the notebook cost in its measured runs (metadata `course.cost`)."""
    cost = notebook.metadata.get("course", {}).get("cost", {})

    def vram(peak):  # None: other notebooks shared the GPU, so nobody knows
        return "–" if peak is None else f"{peak / 1e9:.1f} GB" if peak else "none"

    def column(run):
        if not run:
            return ["not measured yet"] + ["–"] * 4
        return [
            f"{run['seconds'] / 60:.1f} min",
            f"{run['peak_ram_bytes'] / 1e9:.1f} GB",
            vram(run.get("peak_vram_bytes", 0)),
            f"{run['disk_bytes'] / 1e9:.1f} GB" if run.get("disk_bytes") else "–",
            f"{run['download_bytes'] / 1e6:.0f} MB" if run.get("download_bytes") else "–",
        ]

    shown = [(cost.get("cpu"), "CPU, SmolLM2-135M")]
    shown += [(cost[name], None) for name in ("gpu", "gpu_7b") if name in cost] or [(None, "24 GB GPU, Mistral-7B")]
    rows = zip(("Time, first run", "RAM, peak", "VRAM, peak", "Disk", "Download"), *(column(run) for run, _ in shown))
    names = " | ".join(run["machine"] if run else str(default) for run, default in shown)
    lines = [f"| Cost | {names} |", "|---|" + "---|" * len(shown), *(f"| {' | '.join(row)} |" for row in rows)]
    text = "\n".join(lines) + f"\n\nReading time: {reading_minutes(notebook):.0f} minutes."
    if colab := cost.get("colab"):  # pip's cache and the network decide how long it takes
        text += f" Colab's first cell installs {colab['bytes'] / 1e9:.1f} GB, once: {colab['first_s']} s where it was tried."
    return text


def navigation(path: Path) -> str:
    """Markdown links to the previous and next notebook. path: one of `paths()`, else ValueError."""
    order = paths()
    at = order.index(path)
    links = []
    for step, word in ((-1, "Previous"), (1, "Next")):
        if 0 <= at + step < len(order):
            other = order[at + step]
            links.append(f"{word}: [{title(read(other))}]({other.name})")
    return " · ".join(links)


def replace_part(text: str, part: str, content: str) -> str:
    """`text` with what stands between `<!-- part -->` and `<!-- /part -->` replaced; ValueError where there is no such place."""
    pattern = re.compile(rf"(<!-- {part} -->).*?(<!-- /{part} -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"no <!-- {part} --> … <!-- /{part} --> to fill in")
    return pattern.sub(lambda match: f"{match[1]}\n{content}\n{match[2]}", text)


def refresh(path: Path) -> NotebookNode:
    """The notebook with its generated parts as they should be (nothing is written)."""
    notebook = read(path)
    first = notebook.cells[0]
    first.source = replace_part(first.source, "badge", badge(path.name))
    first.source = replace_part(first.source, "cost", cost_card(notebook))
    last = next(cell for cell in reversed(notebook.cells) if "<!-- navigation -->" in cell.source)
    last.source = replace_part(last.source, "navigation", navigation(path))
    for cell in notebook.cells:
        if "<!-- contents -->" in cell.source:
            cell.source = replace_part(cell.source, "contents", contents())
    packages = ", ".join(f'"{name}"' for name in notebook.metadata.get("course", {}).get("packages", []))
    (bootstrap,) = tagged(notebook, "bootstrap")
    bootstrap.metadata["jupyter"] = {"source_hidden": True}
    bootstrap.source = BOOTSTRAP.format(repository=repository(), packages=packages)
    return notebook


def contents() -> str:
    """Markdown list of all notebooks with their promises."""
    items = ((path, read(path)) for path in paths())
    return "\n".join(f"- [{title(notebook)}]({path.name}): {promise(notebook)}" for path, notebook in items)


def readme_table() -> str:
    """Markdown table of all notebooks with their cost on the CPU default, for the README."""
    lines = ["| Notebook | What it shows | Time | RAM |", "|---|---|---|---|"]
    for path in paths():
        notebook = read(path)
        cpu = notebook.metadata.get("course", {}).get("cost", {}).get("cpu")
        cost = (
            f"{cpu['seconds'] / 60:.1f} min | {cpu['peak_ram_bytes'] / 1e9:.1f} GB" if cpu else "not measured yet | –"
        )
        opens = f" {badge(path.name)}" if is_public() else ""
        lines.append(f"| [{title(notebook)}](notebooks/{path.name}){opens} | {promise(notebook)} | {cost} |")
    return "\n".join(lines)


def picture_in(notebook: NotebookNode, words: str) -> tuple[bytes, str] | None:
    """(PNG bytes, alternative text) of the first picture whose alternative text holds these words; None without one."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            if words in alt:
                return base64.b64decode(output["data"]["image/png"]), alt
    return None


def refresh_all(picture_alt: str | None = None) -> None:
    """Write the generated parts of every notebook and of the README; with `picture_alt` also the text of its picture."""
    import nbformat

    for path in paths():
        nbformat.write(refresh(path), path)
    readme = ROOT / "README.md"
    text = replace_part(readme.read_text(encoding="utf-8"), "notebooks", readme_table())
    if picture_alt:
        text = replace_part(text, "picture", f"![{picture_alt}](notebooks/{PICTURE.name})")
    for part, (name, words, file) in SHOWN.items():
        shown = picture_in(read(FOLDER / f"{name}.ipynb"), words)
        if shown:  # without it, the cell has changed and has not run again: the README keeps the older picture
            file.write_bytes(shown[0])
            text = replace_part(text, part, f"![{shown[1]}](notebooks/{file.name})")
    readme.write_text(text, encoding="utf-8")
