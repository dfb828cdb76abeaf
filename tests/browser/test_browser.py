"""In a real browser: site and report at desktop and phone width; JupyterLab with every widget of the course, by the keyboard alone.

Chromium comes from the system's packages (.ci/run installs it) or from COURSE_BROWSER. Without one these tests are skipped on a
reader's machine and fail in CI.
"""

import contextlib
import http.server
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import nbformat
import playwright.sync_api
import pytest
from conftest import ROOT, browser_path, without_browser

from helpers import models, progress
from helpers.process import child_environment
from helpers.publishing import pages

WIDTHS = {"desktop": (1280, 800), "phone": (390, 844)}
FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]

# Contrast by WCAG 2.2 (relative luminance), of every visible text on the background that is painted behind it, in the parts of the
# page that a selector names. What is switched off needs none.
CONTRAST = """(parts) => {
  const parse = (color) => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = ([r, g, b, a], [R, G, B]) => [a * r + (1 - a) * R, a * g + (1 - a) * G, a * b + (1 - a) * B, 1];
  const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const texts = [];
  for (const part of document.querySelectorAll(parts)) {
    const walker = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode());) texts.push([node.parentElement, node.data, null]);
    for (const field of part.querySelectorAll("input, textarea"))
      texts.push([field, field.value || field.placeholder, field.value ? null : "::placeholder"]);
  }
  const low = [];
  let checked = 0;
  for (const [element, words, pseudo] of texts) {
    if (!words.trim() || element.closest(":disabled") || !element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    const background = behind(element), color = parse(getComputedStyle(element, pseudo).color);
    for (let at = element; at; at = at.parentElement) color[3] *= getComputedStyle(at).opacity;
    const [dark, light] = [luminance(over(color, background)), luminance(background)].sort((a, b) => a - b);
    checked += 1;
    if ((light + 0.05) / (dark + 0.05) < 4.5) low.push([((light + 0.05) / (dark + 0.05)).toFixed(2), element.className, words.trim().slice(0, 40)]);
  }
  return { checked, low: low.slice(0, 10) };
}"""


FOCUSABLE = "a[href], button, input, select, textarea, summary, [tabindex='0'], [contenteditable='true']"


@pytest.fixture(scope="module")
def browser():
    path = browser_path()
    where = {"executable_path": path} if path else {"channel": "chrome"}  # as installed on macOS and Windows
    with playwright.sync_api.sync_playwright() as driver:
        sandbox = not (hasattr(os, "geteuid") and os.geteuid() == 0)  # Chromium refuses a sandbox to root
        try:
            browser = driver.chromium.launch(**where, chromium_sandbox=sandbox, args=FLAGS)
        except playwright.sync_api.Error as error:
            without_browser(f"({error.message[:200]})")
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, width="desktop"):
    """A page whose console, failed requests and requests to elsewhere are collected in `page.wrong`."""
    width, height = WIDTHS[width]
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.wrong = []
    page.on("console", lambda message: message.type == "error" and page.wrong.append(message.text))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("requestfailed", lambda asked: page.wrong.append(f"failed: {asked.url}"))
    page.on(
        "request",
        lambda asked: (
            re.match(r"(https?|wss?)://(?!127\.0\.0\.1:)", asked.url) and page.wrong.append(f"elsewhere: {asked.url}")
        ),
    )
    page.on(
        "response", lambda response: response.status >= 400 and page.wrong.append(f"{response.status}: {response.url}")
    )
    yield page
    context.close()


@pytest.fixture
def tab(browser, request):
    with opened(browser, getattr(request, "param", "desktop")) as page:
        yield page


both_widths = pytest.mark.parametrize("tab", WIDTHS, indirect=True)


@pytest.fixture(scope="module")
def served(site):
    """Address of the site, served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Quiet(*args, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def readable(page):
    """No sideways scrolling of the page, every text in a contrast that can be read, and a name for all that the keyboard reaches."""
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{page.url}: the page is {wide} pixels wider than the screen"
    legible(page, "body")
    controls(page, "body")


def legible(page, parts):
    answer = page.evaluate(CONTRAST, parts)
    assert answer["low"] == [] and answer["checked"] > 5, f"{page.url}: {answer['low']}"


def controls(page, parts):
    """[(role, name)] of everything visible that takes the focus in these parts of a page, as Chromium tells it to a screen reader; none is nameless."""
    client = page.context.new_cdp_session(page)
    wanted = f"""[...document.querySelectorAll({json.dumps(parts)})].flatMap((part) => [...part.querySelectorAll("{FOCUSABLE}")])
        .filter((element) => element.checkVisibility() && !element.disabled)"""
    elements = client.send("Runtime.evaluate", {"expression": wanted})["result"]["objectId"]
    found = []
    for entry in client.send("Runtime.getProperties", {"objectId": elements, "ownProperties": True})["result"]:
        if entry["name"].isdigit():
            element = {"objectId": entry["value"]["objectId"], "fetchRelatives": False}
            node = client.send("Accessibility.getPartialAXTree", element)["nodes"][0]
            found.append((node.get("role", {}).get("value"), node.get("name", {}).get("value", "").strip()))
    client.detach()
    assert [control for control in found if not control[1]] == [], (
        f"{page.url}: without a name for screen readers, among {found}"
    )
    return found


def test_the_measure_itself_finds_grey_text_a_wide_page_and_a_field_without_a_name(tab):
    """Else a page could pass because nothing was measured."""
    rows = "".join(f"<p style='color: #000'>{n}</p>" for n in range(6))
    for grey in (
        "<p style='color: #777'>grey</p>",
        "<p style='opacity: .5'>grey</p>",
        "<label>a<input style='color: #777' value=grey></label>",
    ):
        tab.set_content(f"<body style='background: #fff'>{rows}{grey}</body>")
        with pytest.raises(AssertionError, match="grey"):
            readable(tab)
    tab.set_content(f"<body>{rows}<pre style='width: 3000px'>wide</pre></body>")
    with pytest.raises(AssertionError, match="wider than the screen"):
        readable(tab)
    for nameless in (
        "<input>",
        "<div role=slider tabindex=0></div>",
        "<button></button>",
        "<select><option>a</select>",
    ):
        tab.set_content(f"<body>{rows}{nameless}</body>")
        with pytest.raises(AssertionError, match="without a name"):
            readable(tab)
    tab.set_content(f"<body>{rows}<label>bits<input type=number></label><button>Send</button></body>")
    assert controls(tab, "body") == [("spinbutton", "bits"), ("button", "Send")]


@both_widths
def test_a_click_through_the_whole_site(tab, served):
    """Every page by clicks, the report last; every link on every page leads to a page that was seen, and to a place on it."""
    tab.goto(served + "index.html")
    places, titles, links = {}, [], set()
    while True:
        tab.evaluate("document.querySelectorAll('details').forEach((block) => { block.open = true })")
        readable(tab)
        assert tab.get_by_role("heading", level=1).count() == 1
        titles.append(tab.title())
        here = tab.url.partition("#")[0]
        places[here] = set(tab.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)"))
        links |= {(here, link) for link in tab.evaluate("[...document.links].map((link) => link.href)")}
        if here.endswith("/report.html"):
            break
        onward = tab.locator("main a[rel=next]")
        (onward if onward.count() else tab.get_by_role("link", name="Report of this run")).click()
        tab.wait_for_url(lambda url: url.partition("#")[0] != here)
        tab.wait_for_load_state()
    assert len(titles) == len(set(titles)) == len(places) == 2 + len(pages.paths())
    inside = {(page, *link.partition("#")[::2]) for page, link in links if link.startswith(served)}
    broken = [
        (page, target, place)
        for page, target, place in inside
        if target not in places or (place and place not in places[target])
    ]
    assert broken == [] and {target for _, target, _ in inside} == set(places) and len(inside) > 300
    assert [link for _, link in links if not link.startswith((served, "https://"))] == []
    assert tab.wrong == []


def sorts(page, table):
    """A heading sorts by mouse and by keyboard, both ways, and `aria-sort` says so; rows without a number come last, then what was not run."""
    heads = table.get_by_role("columnheader")
    names = heads.all_inner_texts()

    def column(name):
        cells = table.evaluate(
            "(table, at) => [...table.tBodies[0].rows].map((row) => row.children[at].innerText)", names.index(name)
        )
        rows = table.get_by_role("row").all_inner_texts()
        assert rows[len(rows) - len(missing) :] == missing
        numbers = [float(cell) for cell in cells if cell != "–"] if name != "method" else cells
        assert cells[len(numbers) :] == ["–"] * (len(cells) - len(numbers)) and len(numbers) > 5
        return numbers

    missing = [row for row in table.get_by_role("row").all_inner_texts() if "not run here" in row]
    head = heads.nth(names.index("decode tok/s"))
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending" and column("decode tok/s") == sorted(column("decode tok/s"))
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending" and column("decode tok/s") == sorted(
        column("decode tok/s"), reverse=True
    )
    for _ in range(names.index("decode tok/s")):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    assert heads.evaluate_all("(heads) => heads.map((head) => head.ariaSort)") == ["ascending"] + [None] * (
        len(names) - 1
    )
    assert column("method") == sorted(column("method"))
    return len(missing)


def test_the_table_of_methods_sorts_in_the_report_and_on_the_site(tab, served):
    tab.goto(served + "report.html")
    assert sorts(tab, tab.get_by_role("region", name="All methods of this run").get_by_role("table")) == 1
    tab.goto(served + "11_compare_methods.html")
    assert sorts(tab, tab.get_by_role("region", name="All methods of this run").get_by_role("table")) == 0
    assert tab.wrong == []


@both_widths
def test_search_finds_a_section_and_takes_text_as_text(tab, served):
    tab.goto(served)
    box = tab.get_by_role("searchbox", name="Search")
    box.fill("double quantization")
    hit = tab.locator("#found li", has_text="04 NF4").first
    hit.wait_for()
    assert tab.locator("#found mark").count() and "section" in tab.get_by_role("status").inner_text()
    readable(tab)
    hit.get_by_role("link").click()
    tab.wait_for_url(re.compile(r"04_nf4_bitsandbytes\.html#.+"))
    heading = tab.locator(f"[id='{tab.url.partition('#')[2]}']")
    assert heading.bounding_box()["y"] < tab.viewport_size["height"], "the page did not go to the section"
    box.fill("<img src=x onerror=alert(1)>")
    tab.get_by_text("Nothing found.").wait_for()
    assert tab.locator("#found img").count() == 0 and tab.wrong == []


def test_site_opened_as_files(tab, site):
    tab.goto((site / "index.html").as_uri())
    box = tab.get_by_role("searchbox", name="Search")
    box.fill("perplexity")
    tab.locator("#found li").first.wait_for()
    box.press("Enter")
    tab.wait_for_url(re.compile(r"\.html#.+"))
    assert tab.wrong == []


@both_widths
def test_the_keyboard_reaches_everything(tab, served):
    """Tab visits every visible link, field, fold and scrollable box of a page, in order, each with a visible outline."""
    tab.goto(served + "00_start_here.html")
    tab.wait_for_load_state()
    wanted = tab.evaluate(
        """() => [...document.querySelectorAll("a[href], input, summary, [tabindex='0']")].filter((e) => e.checkVisibility())
        .map((e, n) => (e.dataset.stop = n))"""
    )
    reached, outlined = [], True
    for _ in wanted:
        tab.keyboard.press("Tab")
        stop, outline = tab.evaluate(
            "[+document.activeElement.dataset.stop, getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.append(stop)
        outlined &= outline == "solid"
    assert reached == wanted and outlined
    tab.goto(served + "01_ptq_dynamic_int8.html")
    hidden = "[...document.querySelectorAll('.wide, pre')].filter((e) => e.checkVisibility() && e.scrollWidth > e.clientWidth && e.tabIndex < 0).length"
    tab.wait_for_function(f"{hidden} === 0", timeout=5000)


@pytest.mark.parametrize("tab", ["phone"], indirect=True)
def test_on_a_phone_the_menu_starts_closed(tab, served):
    tab.goto(served + "04_nf4_bitsandbytes.html")
    links = tab.locator(".contents a")
    assert not links.first.is_visible()
    tab.get_by_text("Notebooks", exact=True).click()
    assert links.first.is_visible()
    readable(tab)


def notebook_of(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(
        cells=cells,
        metadata={"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}},
    )


def cut(name, last, **parameters):
    """A notebook of the course without outputs, up to the code cell that contains `last`, with other parameters."""
    (path,) = [path for path in pages.paths() if path.name.startswith(name)]
    notebook = nbformat.read(path, as_version=4)
    (cell,) = pages.tagged(notebook, "parameters")
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    (end,) = [number for number, cell in enumerate(notebook.cells) if cell.cell_type == "code" and last in cell.source]
    notebook.cells = [cell for cell in notebook.cells[: end + 1] if cell.cell_type == "code"]
    for cell in notebook.cells:
        cell.outputs, cell.execution_count = [], None
    return notebook


CHAT = """
from helpers import widgets

class Session:
    "Answers as a model might that has read the wrong pages."
    turns = []
    def stop(self): ...
    def stream(self, text):
        answer = "Look: <script>window.stolen = 1</script><img src=x onerror='window.stolen = 1'> done"
        yield from (answer[at:at + 7] for at in range(0, len(answer), 7))
        self.turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

box = widgets.ChatBox(Session())
box.ask("<b onmouseover='window.stolen = 1'>hi</b>")
box
"""
MONITOR = """
import itertools
from helpers import widgets
used = itertools.count(10**9, 10**7)
widgets.Monitor.read = staticmethod(lambda: {"RAM": (next(used), 10**11)})
monitor = widgets.Monitor(interval=0.2).start()
monitor
"""
QUIZ = "from helpers import quiz\nquiz.Quiz('04_nf4_bitsandbytes')"
RECORDS = """
from IPython.display import HTML
from helpers.publishing import guide, reference, report, tables
references, sort_by = reference.read(), "kl_divergence"
expected, shown = report.expected(references), references[0].records
measured = {method: record for method, record in shown.items() if method != "nf4"}
"""


in_lab = pytest.mark.notebook  # `make unit` leaves these out


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address with token, folder) of a JupyterLab of this test's own, on its own port, with its own settings, in an empty folder."""
    home = tmp_path_factory.mktemp("lab")
    folder, settings = home / "work", home / "settings"
    folder.mkdir()
    for plugin, values in {
        "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    }.items():
        file = settings / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    env = {name: value for name, value in os.environ.items() if name != "COURSE_BATCH"} | {
        "JUPYTER_TOKEN": token, "JUPYTER_CONFIG_DIR": str(home), "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "IPYTHONDIR": str(home / "ipython"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "PYTHONPATH": child_environment()["PYTHONPATH"],
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly"]  # fmt: skip
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
    try:
        for _ in range(120):
            assert server.poll() is None, (home / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1).close()
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/lab/workspaces/{{}}/tree/{{}}?token={token}", folder
    finally:
        server.terminate()  # ends its kernels too
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()


def run_all(tab, lab, notebook, name, seconds):
    """Put a notebook into JupyterLab's folder, open it, Run > Run All Cells by mouse, and wait until its last cell has run without an error."""
    address, folder = lab
    notebook.cells[-1].metadata.get("jupyter", {}).pop(
        "source_hidden", None
    )  # a folded cell shows no number to wait for
    nbformat.write(notebook, folder / f"{name}.ipynb")
    tab.goto(address.format(name, f"{name}.ipynb"))
    tab.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    # Not the toolbar's circle: it is idle before the notebook has a kernel, and Run All would then ask for one and lose cells.
    tab.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    prompts = "[...document.querySelectorAll('.jp-CodeCell')].map((e) => e.querySelector('.jp-InputPrompt').innerText)"
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    traces = "[...document.querySelectorAll(\"[data-mime-type='application/vnd.jupyter.stderr']\")].map((e) => e.innerText).filter((text) => text.includes('Traceback'))"
    try:
        tab.wait_for_function(f"{traces}.length || /\\[\\d+\\]/.test({prompts}.at(-1))", timeout=1000 * seconds)
    except playwright.sync_api.TimeoutError:
        asked = tab.locator(".jp-Dialog").all_inner_texts()
        pytest.fail(
            f"{name} has not run after {seconds} s: {tab.evaluate(prompts)}, asked {asked}, console {tab.wrong}"
        )
    assert tab.evaluate(traces) == []
    shown = tab.evaluate(prompts)  # a folded cell shows none
    assert all(prompt in ("", f"[{number}]:") for number, prompt in enumerate(shown, 1)), (
        f"not each cell once, in order: {shown}"
    )


@pytest.fixture(scope="module")
def live(browser, lab):
    """(page, {name: its output}) of a notebook that has run, with each of the course's widgets, and the table of notebook 11."""
    lines = [
        line
        for cell in nbformat.read(ROOT / "notebooks" / "11_compare_methods.ipynb", as_version=4).cells
        for line in cell.source.splitlines()
    ]
    table, guide = (
        next(line for line in lines if line.startswith(start)) for start in ("HTML(tables.methods(", "guide.Guide(")
    )
    with opened(browser) as page:
        run_all(page, lab, notebook_of(RECORDS + table, guide, CHAT, MONITOR, QUIZ), "widgets", 300)
        outputs = page.locator(".jp-CodeCell .jp-Cell-outputArea")
        page.locator(".jupyter-widgets").get_by_role("button", name="3 C").wait_for()
        yield page, dict(zip(("table", "guide", "chat", "monitor", "quiz"), map(outputs.nth, range(5))))


@in_lab
def test_every_control_of_a_widget_has_a_name_and_every_text_can_be_read(live):
    page, _ = live
    parts = ".jp-OutputArea-output"
    legible(page, parts)
    found = controls(page, parts)
    for control in [("button", "KL"), ("combobox", "Model:"), ("spinbutton", "Memory, GB:"), ("combobox", "Hardware:"), ("combobox", "Most important:"),
                    ("checkbox", "I want to fine-tune"), ("textbox", "You:"), ("button", "Send"), ("button", "Stop monitor"), ("button", "3 C")]:  # fmt: skip
        assert control in found, found


@in_lab
def test_the_table_of_methods_sorts_in_jupyterlab(live):
    page, outputs = live
    assert sorts(page, outputs["table"].get_by_role("table")) == 1


def tab_to(page, name):
    """Press Tab until a control of this name has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.labels?.[0]?.innerText") == name:
            return
    pytest.fail(f"Tab does not reach {name!r}")


@in_lab
def test_the_decision_guide_by_the_keyboard_alone(live):
    """From the cell to its fields and through them; after each choice another answer, and JupyterLab takes no key for itself."""
    page, outputs = live
    page.locator(".jp-CodeCell").nth(1).focus()
    said = outputs["guide"].get_by_role("status")
    page.wait_for_function("document.querySelectorAll('[role=status]').length")
    answers = [said.inner_text()]

    def changes(*keys):
        for key in keys:
            page.keyboard.press(key)
        playwright.sync_api.expect(said).not_to_have_text(answers[-1])
        answers.append(said.inner_text())

    tab_to(page, "Memory, GB:")
    changes("Control+a", "6", "4", "Enter")
    tab_to(page, "Most important:")
    changes("Space", "ArrowDown", "Enter")
    tab_to(page, "I want to fine-tune")
    changes("Space")
    assert answers[1].startswith("fp32 (notebook ") and "64 GB" in answers[1]
    assert "tokens/s on" in answers[2] and "train" in answers[3], answers
    assert page.locator(".jp-Cell").count() == 5 and page.evaluate("document.activeElement.checked") is True


@in_lab
def test_the_memory_monitor_is_live_until_it_is_stopped_by_the_keyboard(live):
    page, outputs = live
    shown = outputs["monitor"].get_by_text(re.compile(r"^RAM \d+\.\d\d of 100\.0 GB$"))
    first = shown.inner_text()
    playwright.sync_api.expect(shown).not_to_have_text(first)
    outputs["monitor"].get_by_role("button", name="Stop monitor").press("Enter")
    page.wait_for_timeout(500)
    last = shown.inner_text()
    page.wait_for_timeout(700)
    assert float(last.split()[1]) > float(first.split()[1]) and shown.inner_text() == last


@in_lab
def test_chat_box_shows_a_script_and_does_not_run_it(live):
    page, outputs = live
    log = outputs["chat"].get_by_role("log")
    assert "<script>window.stolen = 1</script><img src=x" in log.inner_text() and "<b onmouseover" in log.inner_text()
    assert log.locator("script, img, b[onmouseover]").count() == 0
    page.get_by_label("You:").fill("again")
    page.get_by_label("You:").press("Enter")
    playwright.sync_api.expect(log).to_contain_text("again")
    page.wait_for_timeout(300)
    assert page.evaluate("window.stolen") is None


@in_lab
def test_quiz_by_keyboard_explains_and_is_kept(live, lab):
    page, outputs = live
    questions = json.loads((ROOT / "notebooks" / "data" / "quiz.json").read_text(encoding="utf-8"))[
        "04_nf4_bitsandbytes"
    ]
    right = [[choice["right"] for choice in question["choices"]].index(True) for question in questions]
    page.get_by_role("button", name="1 A").focus()
    for number, wanted in enumerate([right[0], right[1], (right[2] + 1) % 3], 1):
        for letter in "ABC":
            assert page.evaluate("document.activeElement.innerText") == f"{number} {letter}"
            if letter == "ABC"[wanted]:
                page.keyboard.press("Enter")
            page.keyboard.press("Tab")
    said = outputs["quiz"].get_by_role("status")
    said.nth(2).wait_for()
    texts = said.all_inner_texts()
    assert [" is right." in text for text in texts] == [True, True, False]
    assert questions[0]["choices"][right[0]]["why"] in texts[0]
    assert json.loads((lab[1] / progress.FILE).read_text()) == {"04_nf4_bitsandbytes": {"quiz": [0, 1]}}


def keep(cell, name):
    """Store the README's picture of a cell where COURSE_PICTURES names a folder (`COURSE_PICTURES=notebooks`)."""
    if os.environ.get("COURSE_PICTURES"):
        cell.scroll_into_view_if_needed()
        cell.screenshot(path=ROOT / os.environ["COURSE_PICTURES"] / f"widget_{name}.png")


@in_lab
def test_notebook_00_and_a_chat_with_the_model(tab, lab):
    """Run all, by mouse; then ask in the chat box and watch the answer grow."""
    small = {"model": models.OFFLINE, "output_dir": str(lab[1] / "build"), "eval_tokens": 1024, "max_new_tokens": 16}
    run_all(tab, lab, cut("00", "records.write(", **small), "start", 300)
    tab.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
        const text = document.querySelector(".jupyter-widgets [role=log]")?.innerText ?? "";
        if (text !== window.seen.at(-1)) window.seen.push(text);
        }).observe(document.querySelector(".jp-Notebook"), { subtree: true, childList: true, characterData: true }); }"""
    )
    tab.get_by_label("You:").fill("What is the capital of France?")
    tab.get_by_role("button", name="Send").press("Enter")
    tab.wait_for_function(
        "document.querySelector('.jupyter-widgets [role=log]').innerText.includes('Paris')", timeout=30_000
    )
    tab.wait_for_function(
        "[...document.querySelectorAll('button')].some((e) => e.innerText === 'Send' && !e.disabled)", timeout=30_000
    )
    answers = [
        text.split("capital of France?")[1] for text in tab.evaluate("window.seen") if "capital of France?" in text
    ]
    growing = [len(answer) for answer in answers if answer.strip()]
    assert len(set(growing)) >= 4 and growing == sorted(growing), "the answer came in one piece"
    memory = tab.get_by_text(re.compile(r"RAM \d+\.\d\d of")).first
    assert memory.is_visible()
    cells = tab.locator(".jp-CodeCell")
    keep(cells.filter(has=tab.get_by_label("You:")), "chat")
    keep(cells.filter(has=tab.get_by_role("button", name="Stop monitor")), "monitor")


@in_lab
def test_the_explorer_by_the_keyboard_alone_changes_the_picture(tab, lab):
    small = {
        "model": models.OFFLINE,
        "output_dir": str(lab[1] / "build"),
        "eval_tokens": 1024,
        "probe_tokens": 512,
        "calibration_tokens": 512,
    }
    run_all(tab, lab, cut("01", "explorer = Explorer()", **small), "explorer", 300)
    explorer = tab.locator(".jp-OutputArea-output", has=tab.get_by_label("bits"))
    picture = explorer.locator("img")
    assert set(controls(tab, ".jp-OutputArea-output:has(.widget-inline-hbox)")) >= {
        ("spinbutton", "bits"),
        ("combobox", "range per"),
        ("combobox", "clipping"),
    }
    legible(tab, ".jp-OutputArea-output")
    shown = [picture.get_attribute("src")]

    def changes(to, *keys):
        for key in keys:
            tab.keyboard.press(key)
        playwright.sync_api.expect(picture).to_have_attribute("alt", re.compile(to), timeout=10_000)
        shown.append(picture.get_attribute("src"))

    tab.locator(".jp-CodeCell").last.focus()
    tab_to(tab, "bits")
    changes("7 bits, 64 values", "ArrowDown")
    changes("4 bits, 64 values", "Control+a", "4", "Enter")
    tab_to(tab, "range per")
    changes("4 bits, 576 values", "Space", "ArrowDown", "Enter")
    assert len(set(shown)) == 4
    keep(tab.locator(".jp-CodeCell").last, "explorer")
