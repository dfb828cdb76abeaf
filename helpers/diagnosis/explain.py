"""From a traceback to the likeliest cause: find the error that stopped the program in the catalogue, and say how sure that is.

    python -m helpers explain error.txt      or      some_command 2>&1 | python -m helpers explain

The course's notebooks define a magic in their first cell (elsewhere: `%load_ext helpers.diagnosis`): `%explain` after an error,
`%explain name` for an exception or a text in a variable, and `%%explain` as the first line of a cell that may fail: it shows the
explanation in place of the traceback. Nothing here imports torch, and no token that stands in the text is ever printed.

An error is known only where its type, its message and the package that raised it agree with an entry of the catalogue. For any other
the answer is "I do not know", with the three lines to search for: the root cause, the reader's own line, and the library.
"""

from __future__ import annotations

import io
import os
import re
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.diagnosis import catalogue, owners, tracebacks
from helpers.diagnosis.tracebacks import LONGEST, Raised, Reading, clean, read, redact  # noqa: F401 - what notebooks and tests take from here

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

KNOWN, UNKNOWN, UNREADABLE = 0, 1, 2  # exit codes
CERTAIN, LIKELY = "certain", "likely"
LEVELS = (CERTAIN, LIKELY)
ERROR, PRINTED = "error", "printed"  # what an answer explains
BECAUSE = {
    (ERROR, CERTAIN): "type, message and place agree with the catalogue",
    (ERROR, LIKELY): "type and message agree; the text does not show all of the traceback that leads there",
    (PRINTED, CERTAIN): "this line was printed, and no error stands in the text",
    (
        PRINTED,
        LIKELY,
    ): "this line was printed; the error beside it is not the cause, or only reports that something failed",
}
# Python itself raises these, whoever made the mistake, so the place must agree. Other messages name their library.
_PYTHONS = {
    "AttributeError",
    "TypeError",
    "NameError",
    "KeyError",
    "IndexError",
    "AssertionError",
    "ModuleNotFoundError",
    "UnboundLocalError",
}
_NOTEBOOK = re.compile(r"^(?:Cell|Input) In|ipython-input|ipykernel_|^<cell>")


@dataclass(frozen=True)
class Answer:
    """entry of the catalogue; how sure: "certain" or "likely"; the error it explains (None: a printed line)."""

    entry: catalogue.Entry
    sure: str
    raised: Raised | None
    line: str = ""

    @property
    def because(self) -> str:
        """Why it is as sure as it says."""
        return BECAUSE[ERROR if self.raised else PRINTED, self.sure]


def explain(text: str | bytes | Reading) -> list[Answer]:
    """`Answer`s for a text (or `Reading`), likeliest first; an empty list if nothing in the catalogue fits."""
    reading = text if isinstance(text, Reading) else read(text)
    for raised in reading.reasons:  # try the last error of the chain, then those that it follows from
        if answers := _fitting(raised, whole=raised == reading.root[-1] and not reading.cut):
            return answers
    if reading.root:  # a program that was killed later had survived the error of its traceback
        last = reading.text.strip().rpartition("\n")[2]
        return warnings(reading, last) if tracebacks.ENDED.match(last) else []
    found = [] if reading.cut else [answer for answer in warnings(reading) if not answer.entry.silent]
    for raised in reversed(reading.errors):  # only reports that something failed are left, such as an end by a signal
        if answers := _fitting(raised, whole=not reading.cut):
            return [*found, *answers] if answers[0].entry.general else answers
    return [] if reading.cut else warnings(reading)


def warnings(reading: Reading, printed: str | None = None) -> list[Answer]:
    """`Answer`s for the lines printed outside tracebacks (or for `printed`), in the order of the catalogue."""
    sure, printed = LIKELY if reading.errors else CERTAIN, reading.printed if printed is None else printed
    found = ((entry, pattern.search(printed)) for entry in catalogue.ENTRIES for pattern in entry.lines)
    answers = {entry.id: Answer(entry, sure, None, _line(match)) for entry, match in found if match}
    return list(answers.values())


def explain_error(error: BaseException) -> list[Answer]:
    """`Answer`s for an exception object, its chain included."""
    return explain(as_text(error))


def as_text(error: BaseException) -> str:
    """The traceback of an exception object as Python prints it."""
    return "".join(traceback.format_exception(error))


def render(reading: Reading, answers: list[Answer] | None = None, width: int = 100) -> str:
    """The answer for a reader as plain text, `width` characters wide: what was read, cause, remedy, how sure, reference."""
    answers = explain(reading) if answers is None else answers
    if not answers:
        return _do_not_know(reading, width)
    first = answers[0]
    lines = [_quote(first.raised or first.line, width), f"=> {first.entry.title}", ""]
    lines += _paragraph("Cause", first.entry.cause, width)
    lines += _paragraph("Remedy", first.entry.remedy, width)
    if first.entry.code:
        lines += ["", textwrap.indent(first.entry.code.strip("\n"), "    "), ""]
    lines += _paragraph("How sure", f"{first.sure}: {first.because}; {first.entry.origin}", width)
    lines += _paragraph("See", first.entry.reference, width)
    if len(answers) > 1:
        lines += _paragraph("Or else", "; ".join(answer.entry.title for answer in answers[1:3]), width)
    return "\n".join(lines)


def main(file: str | None = None) -> int:
    """`python -m helpers explain [FILE]`: exit code 0 if the error is known, 1 if not, 2 if there is nothing to read."""
    if file in (None, "-"):
        if sys.stdin.isatty():
            print("Paste the traceback, then press Ctrl-D (Ctrl-Z and Enter on Windows).", file=sys.stderr)
        data = sys.stdin.buffer.read()
    else:
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            print(f"error: cannot read {redact(str(file))}: {error.strerror}", file=sys.stderr)
            return UNREADABLE
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a traceback may hold what this terminal cannot show
    reading = read(data)
    if not reading.text.strip():
        print("error: there is no text to explain", file=sys.stderr)
        return UNREADABLE
    answers = explain(reading)
    print(render(reading, answers))
    return KNOWN if answers else UNKNOWN


def register(shell: InteractiveShell | None = None) -> None:
    """Define the %explain and %%explain magics in the running IPython; RuntimeError outside IPython."""
    if shell is None:
        from IPython import get_ipython

        shell = get_ipython()
    if shell is None:
        raise RuntimeError("%explain works in IPython and Jupyter; elsewhere use `python -m helpers explain`.")

    def magic(line, cell=None):
        """%explain [name]: the last error, or the one in a variable. %%explain: run the cell and explain what it raises."""
        if cell is not None:
            try:
                exec(compile(shell.transform_cell(cell), "<cell>", "exec"), shell.user_ns)  # noqa: S102 - the reader's own cell
            except Exception as error:
                own = error.__traceback__
                error.__traceback__ = own and own.tb_next  # without this function's own frame
                shell.user_ns["error"] = error
                print(render(read(as_text(error))))
            else:
                print("(no error)")
            return
        subject = (
            shell.user_ns.get(line.strip())
            if line.strip()
            else getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        )
        if subject is None:
            print(f"there is nothing called {redact(line.strip())}" if line.strip() else "no error so far")
            return
        print(render(read(as_text(subject) if isinstance(subject, BaseException) else str(subject))))

    shell.register_magic_function(magic, "line_cell", "explain")  # pyright: ignore[reportArgumentType]


def _fitting(raised, whole):
    """`Answer`s for one error, special entries before general ones. whole: it ended the program, and its traceback is complete."""
    answers = []
    for entry in catalogue.ENTRIES:
        places = [agrees for pattern in entry.patterns if (agrees := _agrees(pattern, raised)) is not None]
        if places:
            answers.append(Answer(entry, CERTAIN if whole and any(places) else LIKELY, raised))
    return [answer for answer in answers if not answer.entry.general] or answers


def _agrees(pattern, raised):
    """Whether an error fits a pattern: True, False (the text does not show where it was raised), or None (it does not fit)."""
    if pattern.type and raised.type not in pattern.type.split("|"):
        return None
    found = re.search(pattern.text, raised.message)
    if not found or (pattern.frames and not re.search(pattern.frames, raised.frames)):
        return None
    groups = found.groupdict()
    if "installed" in groups and not owners.installed(groups["installed"], groups["module"]):
        return None
    if pattern.through and not {frame.package for frame in raised.stack} & set(pattern.through.split()):
        return None
    if pattern.own and not any(re.search(pattern.own, frame.path) for frame in raised.own):
        return None
    return _placed(pattern, raised)


def _placed(pattern, raised):
    """The same for the place alone."""
    allowed, stack = pattern.where.split(), raised.stack
    if "anywhere" in allowed:
        return bool(stack)
    if not stack:
        return None if "notebook" in allowed else False
    inner = raised.innermost
    if {inner.package, stack[-1].package} & set(allowed):
        return True
    if "notebook" in allowed:
        return True if _NOTEBOOK.search(inner.path) else None
    if "own" in allowed and not inner.package:
        return True
    if "compiled" in allowed:
        return None if stack[-1].raises and stack[-1].package not in ("torch", tracebacks.PYTHON) else True
    written_by_python = raised.type in _PYTHONS or raised.message.startswith("cannot import name")
    cut = not any(frame.package for frame in stack) and not inner.raises and not written_by_python
    # A report that is cut leaves the library's frames out, and no reader's own code writes its message.
    return False if cut else None


def _line(match):
    text = match.string
    end = text.find("\n", match.end())
    return text[match.start() : end if end >= 0 else None].strip()


def _quote(raised, width):
    first, *more = str(raised).split("\n")
    return textwrap.shorten(first, width, placeholder=" ...") + (" ..." if more and len(first) < width - 4 else "")


def _paragraph(label, text, width):
    return textwrap.wrap(
        text,
        width,
        initial_indent=f"{label + ':':10}",
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _do_not_know(reading, width):
    report = "`python -m helpers doctor --json` says what a bug report needs."
    first = reading.first
    if first and not reading.cut:
        lines = [_quote(first, width), "=> I do not know this error.", "", *_evidence(reading, first, width)]
        hint = "Search the library's issues for the message, without what is yours in it (names, paths, numbers)."
    elif reading.cut:
        lines = ["=> I cannot tell: this traceback ends before its last line.", "", *_cut_evidence(reading, width)]
        hint = "Paste it down to the line with the type and the message of the error."
    elif reading.errors:
        lines = [
            _quote(reading.errors[-1], width),
            "=> I do not know this error: it only reports that something else failed.",
            "",
        ]
        hint = "The cause stands further up in the log, or in that of another process: paste it from the first `Traceback`."
    else:
        lines = ["=> I see no error in this text that I know.", ""]
        hint = "Paste the whole traceback, from the line with `Traceback` to the one with the error's type and message."
    return "\n".join([*lines, *_paragraph("Next", f"{hint} {report}", width)])


def _evidence(reading, first, width):
    """What to search for: the root cause, the reader's own line, the library and its version, and how it ended."""
    lines = _paragraph("Root", str(first).split("\n")[0], width)
    last = reading.root[-1]
    if last is not first:
        lines += _paragraph("Ended as", str(last).split("\n")[0], width)
    lines += _places(first.stack or last.stack, width)
    library = next((error.place for error in (first, last) if error.place and error.place != tracebacks.PYTHON), "")
    lines += _paragraph("Search", f"{library} {_searchable(first)}".strip(), width)
    if answers := warnings(reading):
        lines += _paragraph("Besides", f"{answers[0].entry.title}: {answers[0].entry.cause}", width)
    return lines


def _cut_evidence(reading, width):
    return _places(tracebacks.parse_frames(reading.frames.split("\n")), width)


def _places(stack, width):
    own = [frame for frame in stack if not frame.package]
    lines = _paragraph("Yours", str(own[0]), width) if own else []
    if len(own) > 1 and own[-1] != own[0]:
        lines += _paragraph("", f"down to {own[-1]}", width)
    libraries = [frame for frame in stack if frame.package and frame.package != tracebacks.PYTHON]
    if libraries:
        inner = libraries[-1]
        lines += _paragraph("Library", f"{inner.package}{_version(inner.package)}, {_inside(inner)}", width)
    return lines


def _inside(frame):
    """A library's frame with the file's path from the package on."""
    return f"{owners.inside(frame.path)}, line {frame.line}"


def _version(package):
    """' 5.0 (installed here)' for a package of this environment, as the name of its metadata's folder says."""
    name = re.sub(r"[-_.]+", "_", catalogue.DISTRIBUTIONS.get(package) or package).lower()
    # Read the folders: importlib.metadata would take a third of the time that this command may take.
    for folder in filter(os.path.isdir, sys.path):
        for entry in os.listdir(folder):
            if entry.endswith(".dist-info") and re.sub(r"[-_.]+", "_", entry.partition("-")[0]).lower() == name:
                return f" {entry.removesuffix('.dist-info').partition('-')[2]} (installed here)"
    return " (not installed here)"


def _searchable(raised):
    """The message as a search term: its first line without paths, quoted names, addresses and numbers."""
    text = raised.message.split("\n")[0]
    text = re.sub(r"https?://\S+|(?:[A-Za-z]:)?[/~\\][\w./\\-]{3,}|0x[0-9a-f]+|\b\d[\d.,]*\b", " ", text)
    words = " ".join(text.split())
    return f'{raised.type} "{textwrap.shorten(words, 90, placeholder="")}"' if words else raised.type
