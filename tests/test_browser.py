"""In a real browser: site and report at desktop and phone width; JupyterLab with the chat box, the explorer and the quiz.

Chromium comes from the system's packages (.ci/run installs it) or from COURSE_BROWSER. Without one these tests are skipped on a
reader's machine and fail in CI.
"""

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
from helpers import models, notebooks, progress

WIDTHS = {"desktop": (1280, 800), "phone": (390, 844)}
FLAGS = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic"]

# Contrast by WCAG 2.2 (relative luminance), of every visible text on the background that is painted behind it.
CONTRAST = """() => {
  const parse = (color) => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = ([r, g, b, a], [R, G, B]) => [a * r + (1 - a) * R, a * g + (1 - a) * G, a * b + (1 - a) * B, 1];
  const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const low = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let checked = 0;
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    const background = behind(element), text = over(parse(getComputedStyle(element).color), background);
    const [dark, light] = [luminance(text), luminance(background)].sort((a, b) => a - b);
    checked += 1;
    if ((light + 0.05) / (dark + 0.05) < 4.5) low.push([((light + 0.05) / (dark + 0.05)).toFixed(2), element.className, node.data.trim().slice(0, 40)]);
  }
  return { checked, low: low.slice(0, 10) };
}"""


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


@pytest.fixture
def tab(browser, request):
    """A page whose console, failed requests and requests to elsewhere are collected in `page.wrong`."""
    width, height = WIDTHS[getattr(request, "param", "desktop")]
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.wrong = []
    page.on("console", lambda message: message.type == "error" and page.wrong.append(message.text))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("requestfailed", lambda asked: page.wrong.append(f"failed: {asked.url}"))
    page.on("request", lambda asked: re.match(r"(https?|wss?)://(?!127\.0\.0\.1:)", asked.url) and page.wrong.append(f"elsewhere: {asked.url}"))
    page.on("response", lambda response: response.status >= 400 and page.wrong.append(f"{response.status}: {response.url}"))
    yield page
    context.close()


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
    """No sideways scrolling of the page, and every text in a contrast that can be read."""
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{page.url}: the page is {wide} pixels wider than the screen"
    answer = page.evaluate(CONTRAST)
    assert answer["low"] == [] and answer["checked"] > 5, f"{page.url}: {answer['low']}"


def test_the_measure_itself_finds_grey_text_and_a_wide_page(tab):
    """Else a page could pass because nothing was measured."""
    rows = "".join(f"<p style='color: #000'>{n}</p>" for n in range(6))
    tab.set_content(f"<body style='background: #fff'>{rows}<p style='color: #777'>grey</p></body>")
    with pytest.raises(AssertionError, match="grey"):
        readable(tab)
    tab.set_content(f"<body>{rows}<pre style='width: 3000px'>wide</pre></body>")
    with pytest.raises(AssertionError, match="wider than the screen"):
        readable(tab)


@both_widths
def test_a_click_through_the_whole_site(tab, served):
    tab.goto(served)
    seen = []
    while True:
        tab.evaluate("document.querySelectorAll('details').forEach((block) => { block.open = true })")
        readable(tab)
        seen.append(tab.title())
        assert tab.get_by_role("heading", level=1).count() == 1
        if not (link := tab.locator("main a[rel=next]")).count():
            break
        link.click()
        tab.wait_for_load_state()
    assert len(seen) == len(set(seen)) == 1 + len(notebooks.paths())
    assert tab.wrong == []


@both_widths
def test_report(tab, served):
    tab.goto(served + "report.html")
    readable(tab)
    assert tab.get_by_role("heading", level=1).count() == 1 and tab.wrong == []


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
        stop, outline = tab.evaluate("[+document.activeElement.dataset.stop, getComputedStyle(document.activeElement).outlineStyle]")
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
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}})


def cut(name, last, **parameters):
    """A notebook of the course without outputs, up to the code cell that contains `last`, with other parameters."""
    (path,) = [path for path in notebooks.paths() if path.name.startswith(name)]
    notebook = nbformat.read(path, as_version=4)
    (cell,) = notebooks.tagged(notebook, "parameters")
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    (end,) = [number for number, cell in enumerate(notebook.cells) if cell.cell_type == "code" and last in cell.source]
    notebook.cells = [cell for cell in notebook.cells[: end + 1] if cell.cell_type == "code"]
    for cell in notebook.cells:
        cell.outputs, cell.execution_count = [], None
    return notebook


ATTACK = """
from helpers import chat

class Session:
    "Answers as a model might that has read the wrong pages."
    turns = []
    def stop(self): ...
    def stream(self, text):
        answer = "Look: <script>window.stolen = 1</script><img src=x onerror='window.stolen = 1'> done"
        yield from (answer[at:at + 7] for at in range(0, len(answer), 7))
        self.turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

box = chat.ChatBox(Session())
box.ask("<b onmouseover='window.stolen = 1'>hi</b>")
box
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
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
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
    nbformat.write(notebook, folder / f"{name}.ipynb")
    tab.goto(address.format(name, f"{name}.ipynb"))
    tab.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    tab.locator(".jp-NotebookPanel-toolbar [data-status=idle]").wait_for(timeout=60_000)  # the kernel is up
    prompts = "[...document.querySelectorAll('.jp-CodeCell')].map((e) => e.querySelector('.jp-InputPrompt').innerText)"
    asked = []
    for _ in range(6):  # freshly started, JupyterLab may show its menu too early, or ask something first: take what it proposes
        try:
            if (dialog := tab.locator(".jp-Dialog")).count():
                asked += dialog.all_inner_texts()
                dialog.first.locator(".jp-mod-accept").click(timeout=5000)
            tab.get_by_role("menuitem", name="Run", exact=True).click(timeout=5000)
            tab.get_by_role("menuitem", name="Run All Cells", exact=True).click(timeout=5000)
            tab.wait_for_function(f"/\\[[*\\d]+\\]/.test({prompts}[0])", timeout=5000)
            break
        except playwright.sync_api.TimeoutError:
            continue
    error = "document.querySelectorAll(\"[data-mime-type='application/vnd.jupyter.error']\").length"
    try:
        tab.wait_for_function(f"{error} || /\\[\\d+\\]/.test({prompts}.at(-1))", timeout=1000 * seconds)
    except playwright.sync_api.TimeoutError:
        asked += tab.locator(".jp-Dialog").all_inner_texts()
        pytest.fail(f"{name} has not run after {seconds} s: {tab.evaluate(prompts)}, asked {asked}, console {tab.wrong}")
    assert tab.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts() == []


@in_lab
def test_chat_box_shows_a_script_and_does_not_run_it(tab, lab):
    run_all(tab, lab, notebook_of(ATTACK), "attack", 60)
    log = tab.locator(".jupyter-widgets [role=log]")
    log.wait_for()
    assert "<script>window.stolen = 1</script><img src=x" in log.inner_text() and "<b onmouseover" in log.inner_text()
    assert log.locator("script, img, b[onmouseover]").count() == 0
    tab.get_by_label("You:").fill("again")
    tab.get_by_label("You:").press("Enter")
    tab.wait_for_function("document.querySelector('.jupyter-widgets [role=log]').innerText.includes('again')")
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.stolen") is None


@in_lab
def test_quiz_by_keyboard_explains_and_is_kept(tab, lab):
    run_all(tab, lab, notebook_of("from helpers import quiz\nquiz.Quiz('04_nf4_bitsandbytes')"), "quiz", 60)
    questions = json.loads((ROOT / "notebooks" / "data" / "quiz.json").read_text(encoding="utf-8"))["04_nf4_bitsandbytes"]
    right = [[choice["right"] for choice in question["choices"]].index(True) for question in questions]
    tab.get_by_role("button", name="1 A").focus()
    for number, wanted in enumerate([right[0], right[1], (right[2] + 1) % 3], 1):
        for letter in "ABC":
            assert tab.evaluate("document.activeElement.innerText") == f"{number} {letter}"
            if letter == "ABC"[wanted]:
                tab.keyboard.press("Enter")
            tab.keyboard.press("Tab")
    said = tab.locator(".jupyter-widgets [role=status]")
    said.nth(2).wait_for()
    texts = said.all_inner_texts()
    assert [" is right." in text for text in texts] == [True, True, False]
    assert questions[0]["choices"][right[0]]["why"] in texts[0]
    assert json.loads((lab[1] / progress.FILE).read_text()) == {"04_nf4_bitsandbytes": {"quiz": [0, 1]}}


@in_lab
def test_notebook_00_and_a_chat_with_the_model(tab, lab):
    """Run all, by mouse; then ask in the chat box and watch the answer grow."""
    small = {"model": models.OFFLINE, "output_dir": str(lab[1] / "build"), "eval_tokens": 1024, "max_new_tokens": 16}
    run_all(tab, lab, cut("00", "records.write(", **small), "start", 70)
    tab.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
        const text = document.querySelector(".jupyter-widgets [role=log]")?.innerText ?? "";
        if (text !== window.seen.at(-1)) window.seen.push(text);
        }).observe(document.querySelector(".jp-Notebook"), { subtree: true, childList: true, characterData: true }); }"""
    )
    tab.get_by_label("You:").fill("What is the capital of France?")
    tab.get_by_role("button", name="Send").press("Enter")
    tab.wait_for_function("document.querySelector('.jupyter-widgets [role=log]').innerText.includes('Paris')", timeout=30_000)
    tab.wait_for_function("[...document.querySelectorAll('button')].some((e) => e.innerText === 'Send' && !e.disabled)", timeout=30_000)
    answers = [text.split("capital of France?")[1] for text in tab.evaluate("window.seen") if "capital of France?" in text]
    growing = [len(answer) for answer in answers if answer.strip()]
    assert len(set(growing)) >= 4 and growing == sorted(growing), "the answer came in one piece"
    assert tab.get_by_text(re.compile(r"RAM \d+\.\d\d of")).first.is_visible()


@in_lab
def test_the_explorers_slider_changes_the_picture(tab, lab):
    small = {"model": models.OFFLINE, "output_dir": str(lab[1] / "build"), "eval_tokens": 1024, "probe_tokens": 512, "calibration_tokens": 512}
    run_all(tab, lab, cut("01", "explorer = Explorer()", **small), "explorer", 120)
    picture = tab.locator(".jupyter-widgets img").first
    picture.scroll_into_view_if_needed()
    handle = tab.get_by_role("slider").first
    before, shown = picture.get_attribute("src"), picture.screenshot()
    handle.focus()
    for _ in range(4):
        handle.press("ArrowLeft")
    tab.wait_for_function("(before) => document.querySelector('.jupyter-widgets img').src !== before", arg=before, timeout=10_000)
    assert handle.get_attribute("aria-valuetext") is not None
    tab.wait_for_timeout(500)
    assert picture.screenshot() != shown
    print(handle.evaluate("e => e.outerHTML"), picture.evaluate("e => e.outerHTML.slice(0, 200)"), tab.wrong)
