"""In a real browser: site and report at desktop and phone width; JupyterLab with the chat box, the explorer and the quiz.

Chromium comes from the system's packages (.ci/run installs it) or from COURSE_BROWSER. Without one these tests are skipped on a
reader's machine and fail in CI.
"""

import http.server
import os
import re
import shutil
import threading

import pytest

from helpers import notebooks

WIDTHS = {"desktop": (1280, 800), "phone": (390, 844)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
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


def browser_path():
    return os.environ.get("COURSE_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def browser():
    path = browser_path()
    if not path:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium: install your system's package, or set COURSE_BROWSER")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = not (hasattr(os, "geteuid") and os.geteuid() == 0)  # Chromium refuses a sandbox to root
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=sandbox, args=FLAGS)
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
