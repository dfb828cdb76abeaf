"""From a traceback to the likeliest cause: read what was pasted, find it in the catalogue, say how sure that is.

    python -m helpers explain error.txt      or      some_command 2>&1 | python -m helpers explain

The course's notebooks define a magic in their first cell (elsewhere: `%load_ext helpers.explain`): `%explain` after an error,
`%explain name` for an exception or a text in a variable, and `%%explain` as the first line of a cell that may fail: it shows the
explanation in place of the traceback. Nothing here imports torch, and no token that stands in the text is ever printed.
"""

import json
import re
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path

from helpers import catalogue
from helpers import redact as secrets

KNOWN, UNKNOWN, UNREADABLE = 0, 1, 2  # exit codes
CERTAIN, LIKELY, POSSIBLE = "certain", "likely", "possible"
LEVELS = (CERTAIN, LIKELY, POSSIBLE)
BECAUSE = {
    CERTAIN: "type and message agree with the catalogue",
    LIKELY: "the message agrees, but it is not the last line of a complete traceback",
    POSSIBLE: "only the kind of error and the place agree",
}
LONGEST = 300_000  # characters read, from the end: a traceback stands at the end of a log

# Beside what helpers.redact knows, in a pasted text: a hub token inside a word, and whatever is called a token, key, secret or password
# and looks like one (pad_token=tokenizer.eos_token does not).
_NAMED = re.compile(
    r"(?:hf_oauth|hf_jwt|hf|api_org)_[a-z0-9]{10,}"
    r"|(?<=bearer )[ \t]*[^\s'\"]{8,}"
    r"|(?:token|key|secret)['\"]?[ \t]*[=:][ \t]*['\"]?(?=[^\s'\"]*\d)[\w+/.~-]{16,}"
    r"|passw(?:or)?d['\"]?[ \t]*[=:][ \t]*['\"]?[^\s'\"]{4,}",
    re.I,
)

_ANSI = re.compile(r"(?:\x1b|\\x1b|\\u001b|\\033)\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\-_]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\u200b-\u200f\u2060]")
_MARGIN = re.compile(r"^(?:E {2,}|> ?|[ \t]*[|+][-+| ]*)")  # of pytest, of a quotation, of an exception group
_NAME = r"(?:[A-Za-z_]\w*\.)*"
_ENDING = r"(?:Error|Exception|Warning|Interrupt|Exit|Timeout|Group|Expired)"
_ERROR = re.compile(rf"^({_NAME}_*[A-Z]\w*{_ENDING}|{_NAME}(?:Error|Exception|KeyboardInterrupt|SystemExit))(?::\s?(.*))?\s*$")
_ANY_NAME = re.compile(rf"^({_NAME}[A-Z]\w+)(?::\s(.*))?$")
_WARNING = re.compile(r"^\S.*?:\d+: ([\w.]*Warning): (.*)$")
_JUPYTER = re.compile(r"^(\w+)\s{2,}Traceback \(most recent call last\)")
_HEADER = re.compile(r"Traceback \(most recent call last\)")
_CHAIN = re.compile(r"^(?:The above exception was the direct cause|During handling of the above exception)|^-{20,}\s*$")


@dataclass(frozen=True)
class Raised:
    """One error found in a text: its type (without modules), its message, and the text of the frames above it."""

    type: str
    message: str
    frames: str

    def __str__(self):
        return f"{self.type}: {self.message}" if self.message else self.type


@dataclass(frozen=True)
class Reading:
    """What `read` found. errors: oldest first, the last one is what stopped the program. cut: a traceback has no last line."""

    text: str
    errors: tuple
    cut: bool


@dataclass(frozen=True)
class Answer:
    """entry of the catalogue; how sure: "certain", "likely" or "possible"; the error it explains (None: found in the text alone)."""

    entry: catalogue.Entry
    sure: str
    raised: Raised | None


def redact(text):
    """`text` with everything that looks like a token, key or password, or is one of this process, replaced by [secret]."""
    return _NAMED.sub(secrets.SECRET, secrets.redact(text))


def clean(text):
    """Plain lines: no colours, control characters, carriage returns or common indentation, and no secrets."""
    if isinstance(text, bytes):
        text = _decode(text)
    text = _CONTROL.sub("", _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))
    text = redact(text[-LONGEST - 1000 :])  # with a margin: half a token at the cut would not be known as one
    if len(text) > LONGEST:
        text = text[-LONGEST:].partition("\n")[2] or text[-LONGEST:]
    return textwrap.dedent(text.expandtabs(4))


def read(text):
    """A `Reading` of a traceback: Python's, Jupyter's (also a saved .ipynb), pytest's; chained, coloured, CRLF, or half of one."""
    text = clean(_outputs(text))
    errors, frames, message, kind, header = [], [], [], None, None

    def close():
        nonlocal frames, message, kind
        if kind is not None:
            errors.append(Raised(kind.rpartition(".")[2], "\n".join(message).strip(), "\n".join(frames)))
            frames, message, kind = [], [], None

    for line in text.split("\n"):
        bare = _MARGIN.sub("", line)
        jupyter = _JUPYTER.match(bare)
        if jupyter or _HEADER.search(bare):
            close()
            header = jupyter[1] if jupyter else "Exception"
        elif _CHAIN.match(bare):
            close()
        elif found := _ERROR.match(bare) or _WARNING.match(bare) or (header and _ANY_NAME.match(bare)):
            close()
            kind, message, header = found[1], [found[2] or ""], None
        elif kind is not None and len(message) < 40:
            message.append(bare)
        else:
            frames.append(bare)
    close()
    if header and header != "Exception":  # Jupyter names the type above the frames: half a traceback still has it
        errors.append(Raised(header, "", "\n".join(frames)))
    return Reading(text, tuple(errors), bool(header))


def explain(text):
    """`Answer`s for a text (or `Reading`), likeliest first; an empty list if nothing in the catalogue fits."""
    reading = text if isinstance(text, Reading) else read(text)
    best = {}
    for age, raised in enumerate(reversed(reading.errors)):  # the last error first; the older ones of a chain if it is not known
        for entry in catalogue.ENTRIES:
            fitting = next((pattern for pattern in entry.patterns if _fits(pattern, raised)), None)
            if fitting and entry.id not in best:
                sure = POSSIBLE if not fitting.text else CERTAIN if age == 0 and not reading.cut else LIKELY
                best[entry.id] = (entry.general, LEVELS.index(sure), age), Answer(entry, sure, raised)
        if any(not answer.entry.general for _, answer in best.values()):
            break
    if not best:  # a message without its type, a log line, what a command printed
        for entry in catalogue.ENTRIES:
            for pattern in entry.patterns:
                if pattern.text and not pattern.frames and (found := re.search(pattern.text, reading.text)):
                    sure = LIKELY if pattern.type or reading.errors else CERTAIN
                    best.setdefault(entry.id, ((entry.general, LEVELS.index(sure), -found.start()), Answer(entry, sure, None)))
    return [answer for _, answer in sorted(best.values(), key=lambda item: item[0])]


def explain_error(error):
    """`Answer`s for an exception object, its chain included."""
    return explain(as_text(error))


def as_text(error):
    """The traceback of an exception object as Python prints it."""
    return "".join(traceback.format_exception(error))


def render(reading, answers=None, width=100):
    """The answer for a reader as plain text: what was read, cause, remedy, how sure, reference."""
    answers = explain(reading) if answers is None else answers
    if not answers:
        return _do_not_know(reading, width)
    first = answers[0]
    lines = [_quote(first.raised, width)] if first.raised else []
    lines += [f"=> {first.entry.title}", ""]
    lines += _paragraph("Cause", first.entry.cause, width)
    lines += _paragraph("Remedy", first.entry.remedy, width)
    if first.entry.code:
        lines += ["", textwrap.indent(first.entry.code.strip("\n"), "    "), ""]
    lines += _paragraph("How sure", f"{first.sure}: {BECAUSE[first.sure]}; {first.entry.origin}", width)
    lines += _paragraph("See", first.entry.reference, width)
    if len(answers) > 1:
        lines += _paragraph("Or else", "; ".join(answer.entry.title for answer in answers[1:3]), width)
    return "\n".join(lines)


def main(file=None):
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
    sys.stdout.reconfigure(errors="replace")  # a traceback may hold what this terminal cannot show
    reading = read(data)
    if not reading.text.strip():
        print("error: there is no text to explain", file=sys.stderr)
        return UNREADABLE
    answers = explain(reading)
    print(render(reading, answers))
    return KNOWN if answers else UNKNOWN


def load_ipython_extension(shell):
    """Called by `%load_ext helpers.explain`."""
    register(shell)


def register(shell=None):
    """Define the %explain and %%explain magics in the running IPython."""
    if shell is None:
        from IPython import get_ipython

        shell = get_ipython()
    if shell is None:
        raise RuntimeError("%explain works in IPython and Jupyter; elsewhere use `python -m helpers explain`.")

    def magic(line, cell=None):
        """%explain [name]: the last error, or the one in a variable. %%explain: run the cell and explain what it raises."""
        if cell is not None:
            try:
                exec(compile(shell.transform_cell(cell), "<cell>", "exec"), shell.user_ns)
            except Exception as error:
                error.__traceback__ = error.__traceback__.tb_next  # without this function's own frame
                shell.user_ns["error"] = error
                print(render(read(as_text(error))))
            else:
                print("(no error)")
            return
        subject = shell.user_ns.get(line.strip()) if line.strip() else getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if subject is None:
            print(f"there is nothing called {redact(line.strip())}" if line.strip() else "no error so far")
            return
        print(render(read(as_text(subject) if isinstance(subject, BaseException) else str(subject))))

    shell.register_magic_function(magic, "line_cell", "explain")


def _fits(pattern, raised):
    if pattern.type and not re.fullmatch(pattern.type, raised.type):
        return False
    if pattern.frames and not re.search(pattern.frames, raised.frames):
        return False
    return not pattern.text or re.search(pattern.text, raised.message) is not None


def _decode(data):
    """PowerShell redirects in UTF-16; everything else is UTF-8, with what is not replaced."""
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    return data.decode("utf-8", errors="replace")


def _outputs(text):
    """The tracebacks of a saved notebook's error outputs; any other text as it is."""
    if isinstance(text, bytes):
        text = _decode(text)
    if not text.lstrip("\ufeff \n\r\t").startswith("{"):
        return text
    try:
        cells = json.loads(text)["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", []) if output.get("output_type") == "error"]
        return "\n".join("\n".join([*output["traceback"], f"{output['ename']}: {output['evalue']}"]) for output in outputs)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return text


def _quote(raised, width):
    first, *more = str(raised).split("\n")
    return textwrap.shorten(first, width, placeholder=" ...") + (" ..." if more and len(first) < width - 4 else "")


def _paragraph(label, text, width):
    return textwrap.wrap(text, width, initial_indent=f"{label + ':':10}", subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False)


def _do_not_know(reading, width):
    if reading.errors and not reading.cut:
        lines = [_quote(reading.errors[-1], width), "=> I do not know this error.", ""]
        hint = "Search the library's issues for the message, without what is yours in it (names, paths, numbers)."
    elif reading.cut:
        lines = ["=> I cannot tell: this traceback ends before its last line.", ""]
        hint = "Paste it down to the line with the type and the message of the error."
    else:
        lines = ["=> I see no error in this text that I know.", ""]
        hint = "Paste the whole traceback, from the line with `Traceback` to the one with the error's type and message."
    report = "`python -m helpers doctor --json` says what a bug report needs."
    return "\n".join([*lines, *_paragraph("Next", f"{hint} {report}", width)])
