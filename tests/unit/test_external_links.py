"""The weekly check of external links finds every address, and tells what is gone from what is only closed to programs."""

import re

import external_links
import pytest
from conftest import ROOT

from helpers.diagnosis import catalogue


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see https://a.org/b.", ["https://a.org/b"]),
        ("[x](https://a.org/b_(c)) and <https://d.org>", ["https://a.org/b_(c)", "https://d.org"]),
        ("(https://a.org/b#part), `https://a.org/c?d=1`", ["https://a.org/b", "https://a.org/c?d=1"]),
        ("https://github.com/YOUR_ACCOUNT/x https://example.org/x http://127.0.0.1:9 https://hub/x/y", []),
        ('f"https://a.org/{name}/x"', []),
        ("https://me:pass@host.org/x https://a.org/.../b", []),
    ],
)
def test_addresses_in_a_text(text, found):
    assert external_links.addresses(text) == found


def test_every_reference_of_the_catalogue_is_checked():
    found = external_links.collect()
    assert {entry.reference.partition("#")[0] for entry in catalogue.ENTRIES} <= found.keys()
    assert "README.md" in {file for files in found.values() for file in files}


@pytest.mark.integration
def test_what_servers_answer_is_judged(httpserver):
    for path, status in (("/here", 200), ("/gone", 404), ("/closed", 403)):
        httpserver.expect_request(path).respond_with_data("", status=status)
    httpserver.expect_request("/get-only", method="GET").respond_with_data("text")
    httpserver.expect_request("/moved").respond_with_data(
        "", status=301, headers={"Location": httpserver.url_for("/here")}
    )
    bad = external_links.check(map(httpserver.url_for, ("/here", "/gone", "/closed", "/get-only", "/moved")), 5, 0)
    assert bad == {httpserver.url_for("/gone"): 404, httpserver.url_for("/closed"): 403}
    assert [external_links.judge(answer) for answer in bad.values()] == ["gone", "unclear"]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (200, "ok"),
        (410, "gone"),
        (503, "unclear"),
        ("[Errno -2] Name or service not known", "gone"),
        ("timed out", "unclear"),
    ],
)
def test_verdicts(answer, verdict):
    assert external_links.judge(answer) == verdict


def test_the_weekly_run_checks_links():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.search(r"run: python tests/external_links\.py", workflow)


@pytest.mark.parametrize(
    ("answers", "code"), [({}, 0), ({"a": 404}, 1), ({"a": "no name", "b": "no name"}, 2), ({"a": "no name"}, 1)]
)
def test_without_internet_no_link_is_called_gone(monkeypatch, capsys, answers, code):
    monkeypatch.setattr(external_links, "collect", lambda: {"a": ["x"], "b": ["y"]})
    monkeypatch.setattr(external_links, "check", lambda found: answers)
    monkeypatch.setattr(external_links, "judge", lambda answer: "gone")
    assert external_links.main() == code
    assert ("is there internet" in capsys.readouterr().out) == (code == 2)
