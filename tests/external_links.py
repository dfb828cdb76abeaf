"""Do the links that lead out of the course still lead somewhere? `make external-links`; needs internet, so only the weekly run does it.

Exit code 1 where an address is gone: its host is unknown, or it answers 404 or 410. An address that refuses programs (401, 403, 405, 429)
or has a bad day (5xx, no answer) is printed and does not fail: nobody can mend that here.
"""

import concurrent.futures
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.diagnosis import catalogue  # noqa: E402 - it needs no installed package, so neither does this program

PLACES = (
    "*.md",
    "notebooks/source/*.py",
    "notebooks/**/*.md",
    "notebooks/data/*.json",
    "helpers/**/*.py",
    ".github/**/*.yml",
)
ADDRESS = re.compile(r"https?://[\w.-]+\.[a-z]{2,}(?::\d+)?(?:/[^\s\"'<>`\\{}|^]*)?(?!\w)")
PLACEHOLDERS = re.compile(r"YOUR_ACCOUNT|//(?:[^/]*\.)?example\.(?:org|com)|//localhost|\.{3}|//me:")
GONE = (404, 410)
SECONDS = 20  # before an address counts as one that does not answer
HEADERS = {"User-Agent": "Mozilla/5.0 (link check of a course, once a week)"}


def addresses(text: str) -> list[str]:
    """The external addresses in a text, in order, without `#part` and without the punctuation of the sentence around them.

    An address that goes on with a placeholder in braces is not whole and is left out.
    """
    found = []
    for match in ADDRESS.finditer(text):
        address = match[0].partition("#")[0].rstrip(".,;:!?*")
        while address.endswith((")", "]")) and address.count(address[-1]) > address.count(
            {")": "(", "]": "["}[address[-1]]
        ):
            address = address[:-1].rstrip(".,;:!?*")
        if not PLACEHOLDERS.search(match[0]) and text[match.end() : match.end() + 1] != "{":
            found.append(address)
    return found


def collect(root: Path = ROOT) -> dict[str, list[str]]:
    """{address: the files it stands in, sorted}."""
    places: dict[str, set[str]] = {}
    for pattern in PLACES:
        for path in root.glob(pattern):
            if ".venv" not in path.parts:
                for address in addresses(path.read_text(encoding="utf-8")):
                    places.setdefault(address, set()).add(path.relative_to(root).as_posix())
    for entry in catalogue.ENTRIES:  # most of these are put together from parts
        places.setdefault(entry.reference.partition("#")[0], set()).add(f"the catalogue, {entry.id}")
    return {address: sorted(files) for address, files in sorted(places.items())}


def ask(address: str, method: str = "HEAD", seconds: float = SECONDS) -> int | str:
    """The HTTP status of an address, or in words why there is none. A server that does not know HEAD is asked with GET."""
    request = urllib.request.Request(address, method=method, headers=HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return ask(address, "GET", seconds) if method == "HEAD" else error.code
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


def judge(answer: int | str) -> str:
    """ "ok", "gone", or "unclear" for what `ask` returned."""
    if isinstance(answer, int):
        return "ok" if answer < 400 else "gone" if answer in GONE else "unclear"
    return (
        "gone"
        if re.search("Name or service not known|getaddrinfo|nodename nor servname|No address", answer)
        else "unclear"
    )


def check(found: Iterable[str], seconds: float = SECONDS, pause: float = 5) -> dict[str, int | str]:
    """{address: answer} of all that are not ok. What fails is asked once more after a pause."""
    bad = list(found)
    answers: dict[str, int | str] = {}
    for attempt in range(2):
        if attempt and bad:
            time.sleep(pause)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = dict(zip(bad, pool.map(lambda address: ask(address, seconds=seconds), bad), strict=True))
        bad = [address for address, answer in answers.items() if judge(answer) != "ok"]
    return {address: answers[address] for address in bad}


def main() -> int:
    found = collect()
    bad = check(found)
    if len(bad) == len(found) and not any(isinstance(answer, int) for answer in bad.values()):
        print(f"no server answered, for none of {len(found)} links: is there internet here? Nothing was checked.")
        return 2
    for address, answer in bad.items():
        print(f"{judge(answer):8} {answer}  {address}  in {', '.join(found[address])}")
    gone = [address for address, answer in bad.items() if judge(answer) == "gone"]
    print(f"{len(found)} external links, {len(gone)} gone, {len(bad) - len(gone)} unclear")
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
