"""Read pasted tracebacks: take off what launchers, notebooks and logs put around them, and find the errors, their frames and their order.

    reading = read(text)
    reading.errors                   # every error, oldest first
    reading.root                     # the chain of errors that stopped the program, the launcher's own errors left out
    reading.root[-1].place           # the package that raised the last of them, "" for the reader's own code

Undressed are torchrun (`[rank0]: `), vLLM and Ray (`(EngineCore pid=7) ERROR 11-02 10:00:00 [core.py:700] `), log lines with a time,
Jupyter (colours, `Cell In[3], line 2`, `----> 1`), papermill and nbclient, pytest (`E   `), exception groups (`  | `), rich's boxes.
Nothing here imports a library, and no token that stands in the text is kept.
"""

import functools
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from helpers import redact as secrets
from helpers.diagnosis import owners
from helpers.diagnosis.owners import PYTHON

LONGEST = 300_000  # characters read, from the end: a traceback stands at the end of a log
MESSAGE_LINES = 40

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

# --- what is put around a line ----------------------------------------------------------------------------------------------------

_PROCESS = re.compile(
    r"\[(?:rank|default|node)?\d+\]:[ ]?"  # torchrun, accelerate launch
    r"|\([^()\n]{0,60}?\bpid=\d+[^()\n]{0,40}\)[ ]?"  # vLLM, Ray
    r"|std(?:err|out): "  # accelerate test
    r"|\[\d+,\d+\]<std(?:err|out)>:[ ]?"  # mpirun
    r"|[\w.]+(?:-[\w.]+)*-\d+ {1,4}\|[ ]"  # docker compose
)
_LINK = re.compile(
    r"\[([^\[\]\n]{1,300})\]\((?:(?:vscode-notebook-cell:|file:///|https://(?:localhost|github\.com/[\w/.-]{1,100}/actions/))[^)\n]{0,400}"
    r"|[^)\n]{0,200}?\1)\)"
)
_LEVEL = r"(?P<level>DEBUG|INFO|WARN(?:ING)?|ERROR|CRITICAL|FATAL)"
# Look for the beginning of a log line first: to compile all of `_logs` takes time.
_LOGGED = re.compile(r"[\[\d]|(?:DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL|FATAL)[ :]|[IWEF]\d{4} ")


@functools.cache
def _logs():
    return [re.compile(pattern) for pattern in _LOG]


_LOG = (
    rf"{_LEVEL} \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[?[\w./-]+:\d+\][ ]?",  # vLLM
    r"(?P<glog>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w./-]+:\d+\][ ]?",  # glog: torch's launcher
    rf"\[{_LEVEL}\|[\w./-]+:\d+\] \S+ \S+ >>[ ]?",  # transformers
    rf"\[?(?:\d{{4}}-\d\d-\d\d|\d\d/\d\d/\d{{4}})[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?\]?"  # logging, docker, CI
    rf"(?:[ ]*[-|:]?[ ]*(?:[\w.]+[ ]*[-|:][ ]*)?[\[(]?{_LEVEL}[\])]?(?:[ ]*[-|:][ ]*[\w.:]+(?=[ ]*[-|:] ))?[ ]*[-|:]?)?[ ]?",
    rf"\d\d:\d\d:\d\d(?:[.,]\d+)?[ ]+[\[(]?{_LEVEL}[\])]?[ ]*[-|:]?[ ]?",
    rf"{_LEVEL}:[\w.-]+:[ ]?",  # logging.basicConfig
    rf"{_LEVEL}: ",  # pip
)
_BOX = re.compile(r"^\s*[│┃] ?(.*?)\s*[│┃]?\s*$")
_MARGIN = re.compile(r"^(?:E {2,}|> ?|[ \t]*[|+][-+| ]*)")  # of pytest, of a quotation, of an exception group
_QUIET = {"DEBUG", "INFO", "WARN", "WARNING", "I", "W"}  # levels whose lines report no failure of the program

_NAME = r"(?:[A-Za-z_]\w*\.)*"
_ENDING = r"(?:Error|Exception|Interrupt|Exit|Timeout|Group|Expired|NotFound|Failed|Refused)"
_ERROR = re.compile(
    rf"^({_NAME}_*[A-Z]\w*{_ENDING}|{_NAME}(?:Error|Exception|KeyboardInterrupt|SystemExit|NoSuchKernel|UnexpectedStatus))(?:\(\w+\))?(?::\s?(.*))?\s*$"
)
_ANY_NAME = re.compile(rf"^({_NAME}[A-Z]\w+)(?::\s(.*))?$")
_WARNING = re.compile(r"^\S.*?:\d+: [\w.]*Warning: ?(.*)$")
_JUPYTER = re.compile(r"^([A-Za-z_]\w*)\s{2,}Traceback \(most recent call last\)")
_HEADER = re.compile(r"Traceback \(most recent call last\)")
_LINKS = {"The above exception was the direct cause": "cause", "During handling of the above exception": "context"}
_CHAIN = re.compile(r"^(The above exception was the direct cause|During handling of the above exception)")
_RULE = re.compile(r"^-{20,}\s*$")
_MEMBER = re.compile(r"^\s*\|?\s*\+-[-+ ]*\d+ -+")  # the head of one member of an exception group
# VS Code shows the message first, then the frames, the innermost at the top.
_DEBUGGER = re.compile(r"^Exception has occurred: [\w.]+")
# The shell prints this when the system ends a program. It is no part of the message above it.
SHELLS = r"(?:[\w./-]+: (?:line \d+: *\d+ +)?|\[\d+\] +[-+]? *\d+ +)?"
ENDED = re.compile(
    rf"^{SHELLS}(?:[Kk]illed|[Tt]erminated|[Ss]egmentation fault|Bus error|Aborted)(?: +\S.*| \(core dumped\).*)?$"
)

_FRAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r'^\s*File "(?P<path>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>.+))?',  # Python
        r"^(?P<path>(?:Cell|Input) In ?\[[\d ]+\])(?:, line (?P<line>\d+))?(?:, in (?P<function>.+))?",  # Jupyter, a cell
        r"^File (?P<path>\S[^\n]*?):(?P<line>\d+)(?:, in (?P<function>.+))?$",  # Jupyter, a file
        r"^(?P<path><ipython-input-[^>]+>|(?:[/~]|[A-Za-z]:\\)\S*\.py) in (?P<function>\S.*)$",  # older IPython
        r"^(?P<path>[\w./\\~:-]+\.py):(?P<line>\d+):? in (?P<function>.+)$",  # pytest, rich
        r"^(?P<path>[\w./\\~:-]+\.py):(?P<line>\d+): [A-Z]\w+$",  # pytest's last line
    )
)
_CODE = re.compile(r"^\s*(?:-+>|❱)\s*\d+ ?│?(?P<code>.*)$")


@dataclass(frozen=True)
class Frame:
    """One line of a traceback. code: its source line, "" where the text does not show it."""

    path: str
    line: str
    function: str
    code: str

    @functools.cached_property
    def package(self) -> str:
        """The package that its file belongs to, as `owners.package` names it."""
        return owners.package(self.path)

    @property
    def raises(self) -> bool:
        """Whether this line itself raises; if not, what it calls does."""
        return re.match(r"(raise|assert)\b", self.code) is not None

    def __str__(self):
        where = f"{self.path}, line {self.line}" if self.line else self.path
        return f"{where}: {self.code}" if self.code else where


@dataclass(frozen=True)
class Raised:
    """One error found in a text.

    type     its name, without modules; message: what stands behind it
    frames   the text of the frames above it, stack: the same as `Frame`s, outermost first
    link     how it follows from the error before it: "cause" (raise ... from), "context" (during handling), "group", or "" (not at all)
    process  the process or rank that printed it, as the line's prefix says
    start    number of the line at which its traceback begins
    """

    type: str
    message: str
    frames: str = ""
    stack: tuple[Frame, ...] = field(default=(), compare=False)
    link: str = field(default="", compare=False)
    process: str = field(default="", compare=False)
    start: int = field(default=0, compare=False)

    def __str__(self):
        return f"{self.type}: {self.message}" if self.message else self.type

    @property
    def place(self) -> str | None:
        """The package of the innermost frame, the standard library skipped; None if the text shows no frame."""
        inner = self.innermost
        return inner.package if inner else None

    @property
    def innermost(self) -> Frame | None:
        """The innermost frame outside the standard library, or the innermost of all; None if the text shows no frame."""
        return next(
            (frame for frame in reversed(self.stack) if frame.package != PYTHON), self.stack[-1] if self.stack else None
        )

    @property
    def own(self) -> list[Frame]:
        """The frames in the reader's own code, outermost first."""
        return [frame for frame in self.stack if not frame.package]

    @property
    def reports(self) -> bool:
        """Whether it only reports that something else failed: a launcher's, a kernel's or a lazy import's error."""
        return self.type in _REPORTS or _REPORTING.search(self.message) is not None


_REPORTS = set(
    "ChildFailedError CalledProcessError SystemExit KeyboardInterrupt PapermillExecutionError CellExecutionError ProcessRaisedException "
    "ProcessExitedException RayTaskError SignalException EngineDeadError ExceptionGroup BaseExceptionGroup".split()
)
_REPORTING = re.compile(
    r"^(?:Engine core initialization failed|Engine process failed to start|EngineCore encountered an issue|Worker failed with error"
    r"|WorkerProc initialization failed|Caught \w+ in |Failed to import [\w.]+ because of the following error|Could not import module"
    r"|Failed to init server, please check the input params|Failed to load model from file|1 validation error for LlamaCpp)"
)
_IMPORT = re.compile(r"^(?:No module named |cannot import name |DLL load failed |\S+\.so[.\d]*: undefined symbol: )")
# What the other processes say once one of them has failed.
_SECONDARY = re.compile(
    r"(?i)\bnccl\b|connection (?:reset|closed|refused)|broken pipe|gloo|remote process exited|SIGTERM"
)
# Errors that programs catch and go on from: behind "During handling" they are not the reason for what came next.
_CAUGHT = set("KeyError AttributeError ImportError ModuleNotFoundError StopIteration IndexError LookupError".split())


@dataclass(frozen=True)
class Reading:
    """What `read` found. errors: oldest first, the last one is what stopped the program. cut: a traceback has no last line.

    printed: the lines outside tracebacks (log lines and warnings), without time, level and file.
    """

    text: str
    errors: tuple[Raised, ...]
    cut: bool
    printed: str = ""
    frames: str = ""  # of a traceback that has no last line

    @property
    def chains(self) -> list[list[Raised]]:
        """The errors in groups that follow from each other, in the order in which their tracebacks begin."""
        chains = []
        for error in self.errors:
            if error.link and chains and (earlier := [c for c in chains if c[-1].process == error.process]):
                earlier[-1].append(error)
            else:
                chains.append([error])
        return sorted(chains, key=lambda chain: chain[0].start)

    @property
    def root(self) -> list[Raised]:
        """The chain of errors that stopped the program, oldest first, without those that only report it; empty if there is none."""
        real = [kept for chain in self.chains if (kept := [error for error in chain if not error.reports])]
        if not real:
            return [inner for chain in self.chains for error in chain if (inner := _reported(error))][-1:]
        processes = {chain[0].process for chain in real}
        if len(processes) == 1 and not any(error.type == "ChildFailedError" for error in self.errors):
            return real[-1]
        if len(processes) > 1:  # take the last chain of each process, and of these the first
            real = sorted({chain[0].process: chain for chain in real}.values(), key=lambda chain: chain[0].start)
        return next((chain for chain in real if not _SECONDARY.search(str(chain[-1]))), real[0])

    @property
    def first(self) -> Raised | None:
        """The error that the others of `root` follow from, or None."""
        return self.reasons[-1] if self.reasons else None

    @property
    def reasons(self) -> list[Raised]:
        """`root`, the last error first, without those that were caught on the way: what may explain the end."""
        kept = []
        for error in reversed(self.root):
            later = kept[-1] if kept else None
            repeated = later is not None and error.message and error.message.split("\n")[0][:80] in later.message
            if later is None or later.link != "context" or error.type not in _CAUGHT or repeated:
                kept.append(error)
            elif later.link == "context":
                break
        return kept


def redact(text: str) -> str:
    """`text` with everything that looks like a token, key or password, or is one of this process, replaced by [secret]."""
    return _NAMED.sub(secrets.SECRET, secrets.redact(text))


def clean(text: str | bytes) -> str:
    """Plain lines: no colours, control characters, carriage returns or common indentation, and no secrets."""
    if isinstance(text, bytes):
        text = _decode(text)
    text = _CONTROL.sub("", _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))
    text = redact(text[-LONGEST - 1000 :])  # keep a margin: half a token at the cut would not be recognized
    if len(text) > LONGEST:
        text = text[-LONGEST:].partition("\n")[2] or text[-LONGEST:]
    text = _LINK.sub(r"\1", text)  # VS Code and Colab copy the name of a cell or file as a link
    return textwrap.dedent(text.expandtabs(4))


def undress(line: str) -> tuple[str, str, str]:
    """(process, level, line) without the prefixes of launchers and logs; process and level are "" where there is none."""
    process = level = ""
    for _ in range(4):  # a rank in front of a time in front of a level
        if found := _PROCESS.match(line):
            process, line = process or found[0].strip(), line[found.end() :]
        elif found := _LOGGED.match(line) and next(
            (match for pattern in _logs() if (match := pattern.match(line)) and match.end()), None
        ):
            level, line = found.groupdict().get("level") or found.groupdict().get("glog") or level, line[found.end() :]
        else:
            break
    if box := _BOX.match(line):
        line = box[1]
    return process, level, line


def read(text: str | bytes) -> Reading:
    """A `Reading` of a traceback: Python's, Jupyter's (also a saved .ipynb), pytest's; chained, coloured, CRLF, or half of one."""
    text = clean(_outputs(text))
    processes, printed = {}, []
    for number, line in enumerate(text.split("\n")):
        process, level, line = undress(line)
        processes.setdefault(process, _Process(process)).take(number, level, line, printed)
    for state in processes.values():
        state.end()
    errors = sorted((item for state in processes.values() for item in state.errors), key=lambda item: item[0])
    cut = [state for state in processes.values() if state.header]
    return Reading(
        text,
        tuple(error for _, error in errors),
        bool(cut),
        "\n".join(printed),
        "\n".join(cut[-1].frames) if cut else "",
    )


class _Process:
    """Reads the lines of one process; `errors` are (number of the last line, Raised)."""

    def __init__(self, name):
        self.name, self.errors, self.header, self.link, self.grouped = name, [], None, "", False
        self.clear()

    def clear(self):
        self.frames, self.message, self.kind, self.start, self.level, self.inner_first = [], [], None, None, "", False

    def close(self, number):
        if self.kind is None:
            return
        kind, message, frames = self.kind.rpartition(".")[2], "\n".join(self.message).rstrip(), "\n".join(self.frames)
        before = self.errors[-1][1] if self.errors else None
        repeats = (
            before
            and not parse_frames(self.frames)
            and (before.type, before.message.split("\n")[0]) == (kind, message.split("\n")[0])
        )
        if not repeats:  # nbclient and saved notebooks name the error once more below its traceback
            stack = tuple(parse_frames(self.frames)[:: -1 if self.inner_first else 1])
            self.errors.append((number, Raised(kind, message, frames, stack, self.link, self.name, self.start or 0)))
        self.link = "group" if self.grouped else ""
        self.clear()

    def take(self, number, level, line, printed):
        """One undressed line."""
        if _MEMBER.match(line):
            self.close(number)
            self.link, self.grouped = "group", True
            return
        bare = _MARGIN.sub("", line)
        jupyter = _JUPYTER.match(bare)
        if jupyter or _HEADER.search(bare):
            self.close(number)
            if self.grouped and line == bare:  # at the margin again: the group has ended
                self.link, self.grouped = "", False
            self.header, self.start, self.frames = (jupyter[1] if jupyter else "Exception"), number, []
        elif chain := _CHAIN.match(bare):
            self.close(number)
            self.link = _LINKS[chain[1]]
        elif _RULE.match(bare):
            self.close(number)
        elif _DEBUGGER.match(bare):
            self.close(number)
            self.header, self.start, self.frames, self.inner_first = "Exception", number, [], True
        elif not self.header and ENDED.match(bare):
            self.close(number)
            printed.append(bare)
        elif warning := _WARNING.match(bare):
            self.close(number) if not self.header else None
            printed.append(warning[1])
        elif (found := _ERROR.match(bare) or (self.header and _ANY_NAME.match(bare))) and (
            self.header or (level not in _QUIET and bare.strip() not in ("Error", "Exception"))
        ):
            if self.kind is not None:
                self.close(number)
            self.kind, self.message, self.header, self.level = found[1], [found[2] or ""], None, level
            self.start = number if self.start is None else self.start
        elif self.kind is not None and len(self.message) < MESSAGE_LINES and level == self.level:
            self.message.append(bare)
        else:
            if self.kind is not None:
                self.close(number)
            self.frames.append(line if line.startswith(">") else bare)
            if not self.header:
                printed.append(bare)

    def end(self):
        self.close(10**9)
        # Jupyter names the type above the frames, so half a traceback still has it.
        if self.header and self.header != "Exception":
            frames, stack = "\n".join(self.frames), tuple(parse_frames(self.frames))
            half = Raised(self.header, "", frames, stack, self.link, self.name, self.start or 0)
            self.errors.append((10**9, half))


def parse_frames(lines: Sequence[str]) -> list[Frame]:
    """The `Frame`s in the lines of a traceback, outermost first."""
    frames, marked = [], ""
    for number, line in enumerate(lines):
        if line.startswith(">"):  # pytest shows the source above the place
            marked = line[1:].strip()
            line = line[1:].lstrip()
        if found := next((match for pattern in _FRAMES if (match := pattern.match(line))), None):
            parts = found.groupdict()
            code = (
                marked if parts["path"].endswith(".py") and ":" in line and not line.lstrip().startswith("File") else ""
            )
            frames.append([parts["path"], parts.get("line") or "", parts.get("function") or "", code])
            marked = ""
            following = lines[number + 1] if number + 1 < len(lines) else ""
            if line.lstrip().startswith('File "') and not any(pattern.match(following) for pattern in _FRAMES):
                frames[-1][3] = following.strip()
        elif frames and (found := _CODE.match(line)):
            frames[-1][3] = found["code"].strip()
            if not frames[-1][1] and (number_shown := re.search(r"(?:-+>|❱)\s*(\d+)", line)):
                frames[-1][1] = number_shown[1]
    return [Frame(*parts) for parts in frames]


def _reported(error):
    """The import error that a lazy import's message ends in, or None."""
    lines = error.message.replace(" traceback): ", " traceback):\n").split("\n")
    tail = next((line for line in lines if _IMPORT.match(line)), None)
    if tail is None:
        return None
    return Raised("ModuleNotFoundError" if tail.startswith("No module") else "ImportError", tail)


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
        outputs = [
            output for cell in cells for output in cell.get("outputs", []) if output.get("output_type") == "error"
        ]
        return "\n".join(
            "\n".join([*output["traceback"], f"{output['ename']}: {output['evalue']}"]) for output in outputs
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return text
