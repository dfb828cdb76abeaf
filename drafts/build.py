"""python build.py NN_name [--packages a,b]: drafts/NN_name.py (percent script) -> notebooks/NN_name.ipynb"""
import re, sys, json, os
import nbformat
sys.path.insert(0, ".")
src_dir = "drafts"; out_dir = os.environ.get("NB_OUT", "notebooks")
def build(name):
    text = open(f"{src_dir}/{name}.py", encoding="utf-8").read()
    parts = re.split(r"^# %%(.*)$", text, flags=re.M)
    header = parts[0]
    packages = re.findall(r"^# packages: (.*)$", header, re.M)
    packages = [p.strip() for p in packages[0].split(",")] if packages else []
    cells = []
    for n, (head, body) in enumerate(zip(parts[1::2], parts[2::2]), 1):
        body = body.strip("\n")
        tags = json.loads(m.group(1)) if (m := re.search(r"tags=(\[.*?\])", head)) else []
        cell_id = f"cell-{n:03d}"
        if "[markdown]" in head:  # a link to a notebook that is not there yet becomes its number
            body = re.sub(r"\[(\d\d)\]\((\d\d_\w+\.ipynb)\)", lambda m: m[0] if os.path.exists(f"notebooks/{m[2]}") or m[2][:2] in os.environ.get("NB_KNOWN", "01,02,03") else f"notebook {m[1]}", body)
        if "[markdown]" in head:
            body = "\n".join(re.sub(r"^# ?", "", line) for line in body.split("\n"))
            body = body.replace("{{badge}}", "<!-- badge -->\n<!-- /badge -->").replace("{{cost}}", "<!-- cost -->\n<!-- /cost -->").replace("{{navigation}}", "<!-- navigation -->\n<!-- /navigation -->")
            cell = nbformat.v4.new_markdown_cell(body)
        else:
            cell = nbformat.v4.new_code_cell(body)
            if "solution" in tags: cell.metadata["jupyter"] = {"source_hidden": True}
        if tags: cell.metadata["tags"] = tags
        cell["id"] = cell_id
        cells.append(cell)
    nb = nbformat.v4.new_notebook(cells=cells)
    nb.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata["language_info"] = {"name": "python"}
    path = f"{out_dir}/{name}.ipynb"
    course = {"packages": packages}
    if os.path.exists(path):
        old = nbformat.read(path, 4).metadata.get("course", {})
        if "cost" in old: course["cost"] = old["cost"]
    nb.metadata["course"] = course
    nbformat.write(nb, path)
    from helpers import notebooks
    from pathlib import Path
    p = Path(path)
    if p.parent == notebooks.FOLDER:
        nbformat.write(notebooks.refresh(p), p)
    else:  # trial build elsewhere: only the bootstrap
        for cell in nb.cells:
            if "bootstrap" in cell.metadata.get("tags", []):
                cell.source = notebooks.BOOTSTRAP.format(repository=notebooks.repository(), packages=", ".join(f'"{x}"' for x in packages))
        nbformat.write(nb, p)
    print(path, len(cells), "cells")
for name in sys.argv[1:]:
    build(name)
