"""What an entry of the catalogue is: how to recognize a failure, what causes it, what repairs it, where it is discussed."""

import functools
import re
from dataclasses import dataclass, replace

TOPICS = ("install", "load", "memory", "generate", "quantize", "train", "save", "colab")

TRANSFORMERS = "https://github.com/huggingface/transformers"
PEFT = "https://github.com/huggingface/peft"
BITSANDBYTES = "https://github.com/bitsandbytes-foundation/bitsandbytes"
AUTO_GPTQ = "https://github.com/AutoGPTQ/AutoGPTQ"
GPTQMODEL = "https://github.com/ModelCloud/GPTQModel"
LLAMA_CPP = "https://github.com/ggml-org/llama.cpp"
PYTORCH = "https://github.com/pytorch/pytorch"
HF_DOCS = "https://huggingface.co/docs"
PIN = "pip install -r requirements.txt"


@dataclass(frozen=True)
class P:
    """An error. type: names joined by "|"; text and frames: regular expressions for its message and its frames.

    A group of text called `installed` holds a path: of an installed library's file, as `owners.installed` decides; one called `module`
    is the dotted name beside it. through: packages, one of which has a frame. own: a regular expression for the path of one of the
    reader's own files among the frames.

    where: the packages that may raise it, separated by blanks, as the innermost frame shows; "" leaves it to the entry. "own" is the
    reader's code, "notebook" a cell, "python" the standard library, "anywhere" any place, and "compiled" any line that does not raise
    by itself: the error comes from compiled code below it.
    """

    type: str
    text: str
    frames: str = ""
    where: str = ""
    through: str = ""
    own: str = ""


@dataclass(frozen=True)
class L:
    """A line that is printed outside tracebacks: a warning, a log line, what pip says. text: a regular expression."""

    text: str

    def search(self, printed: str) -> re.Match[str] | None:
        """The first place in a printed text that fits."""
        return _compiled(self.text).search(printed)


@dataclass(frozen=True)
class Entry:
    """One failure.

    id, topic, title  short name, part of TOPICS, one line
    signs             any one of them (P or L) recognizes it (variants are those of other library versions); none: it says nothing at all
    where             the place for every P without one of its own
    cause, remedy     sentences; code: the remedy as code or command
    reference         the thread, page or paper
    recorded          where the message is from if it cannot be provoked on a CPU with the pinned versions; empty: reproduced
    silent            nothing is raised: at most a line is printed
    general           a wide net: any other entry that fits comes first
    """

    id: str
    topic: str
    title: str
    signs: tuple[P | L, ...]
    cause: str
    remedy: str
    reference: str
    code: str = ""
    recorded: str = ""
    silent: bool = False
    general: bool = False
    where: str = ""

    @functools.cached_property
    def patterns(self) -> tuple[P, ...]:
        """The `P`s, each with its place."""
        return tuple(replace(p, where=p.where or self.where) for p in self.signs if isinstance(p, P))

    @functools.cached_property
    def lines(self) -> tuple[L, ...]:
        """The `L`s."""
        return tuple(sign for sign in self.signs if isinstance(sign, L))

    @property
    def origin(self) -> str:
        """Whether this course reproduces it, or where its message is recorded from."""
        return (
            f"recorded from {self.recorded}, not reproduced" if self.recorded else "reproduced by this course's tests"
        )


@functools.cache
def _compiled(text):
    return re.compile(text, re.M)
