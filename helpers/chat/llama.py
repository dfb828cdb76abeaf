"""Talking to a GGUF file: llama.cpp's server (package xllamacpp) in a process of its own, and sessions with it.

    with llama.serving("model.gguf") as server:                       # 127.0.0.1, any free port
        llama.ask(server, "/v1/chat/completions", messages=[...])     # a dict, as OpenAI's API answers

The server ends with the block, and with the process that started it, however that one ends.
"""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from helpers.chat.session import newest, sampling
from helpers.chat.templates import ChatError
from helpers.process import child_environment, cores

CONTEXT = 4096  # tokens of a session's server, or what the model was trained for if that is less
PROGRAM = """
import json, os, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, settings = sys.argv[1], json.loads(sys.argv[2])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.pop("threads")
for name, value in settings.items():
    setattr(params, name, value)
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the pipe is closed, or the other side is gone
os._exit(0)  # an answer that is still being computed has no reader any more
"""


@contextlib.contextmanager
def serving(path: str | Path, **settings: Any) -> Iterator[Any]:
    """Serve a GGUF file: .address, .process (psutil), .load_seconds. settings: of xllamacpp.CommonParams, and threads.

    Raises RuntimeError with llama.cpp's first error where the server does not come up (no model, a taken port, a template that does not
    parse), and with a remedy where xllamacpp is missing.
    """
    import psutil

    if importlib.util.find_spec("xllamacpp") is None:
        raise RuntimeError("A GGUF file needs llama.cpp, and the package xllamacpp is missing: pip install xllamacpp")
    settings = {"n_ctx": 1024, "n_parallel": 1, "threads": cores(), **settings}
    command = [sys.executable, "-c", PROGRAM, str(path), json.dumps(settings)]
    begun, pipe = time.perf_counter(), subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=child_environment(), start_new_session=True
        )  # a session of its own: Ctrl-C is for this process, which ends the server
        try:
            address = process.stdout.readline().strip()  # pyright: ignore[reportOptionalMemberAccess]
            if not address:
                process.wait()
                raise RuntimeError(f"llama.cpp does not serve {Path(path).name}: {first_error(log)}")
            yield SimpleNamespace(
                address=address, process=psutil.Process(process.pid), load_seconds=time.perf_counter() - begun
            )
        finally:
            _end(process)


def _end(process):
    """Close the pipe that the server listens to; kill a server that does not notice."""
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(10)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()
    process.stdout.close()


def first_error(log: IO[str]) -> str:
    """The first error in llama.cpp's log, without its time stamp; the last line where there is none."""
    log.seek(0)
    lines = log.read().strip().splitlines() or ["no message"]
    errors = (line.split(" E ", 1)[1] for line in lines if " E " in line)
    return " ".join(next(errors, lines[-1]).split())


@contextlib.contextmanager
def _posted(server, route, body):
    """The server's answer, open. RuntimeError in the server's own words where it refuses, or when it is gone."""
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=600)
    try:
        connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status >= 400:
            raise RuntimeError(json.loads(answer.read())["error"]["message"])
        yield answer
    except (OSError, http.client.HTTPException) as error:
        gone = f"llama.cpp's server at {server.address} is gone ({type(error).__name__}): start it again"
        raise RuntimeError(gone) from error
    finally:
        connection.close()  # the server stops computing an answer that nobody reads


def ask(server: Any, route: str, **body: Any) -> dict:
    """What the server answers to a request. RuntimeError in its own words where it refuses, or when it is gone."""
    with _posted(server, route, body) as answer:
        return json.loads(answer.read())


def choices(server: Any, messages: list[dict], **body: Any) -> Iterator[dict]:
    """The parts of a streamed answer as they come: {"delta": {"content": ...}, "finish_reason": None or why it ended}."""
    with _posted(server, "/v1/chat/completions", {"messages": messages, "stream": True, **body}) as answer:
        ended = False
        for line in map(bytes.decode, answer):
            if line.startswith("error: ") or line.startswith('data: {"error"'):
                raise RuntimeError(json.loads(line.split(": ", 1)[1])["error"]["message"])
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                ended = ended or choice["finish_reason"] is not None
                yield choice
        if not ended:
            raise http.client.IncompleteRead(b"")


def stream(server: Any, messages: list[dict], **body: Any) -> Iterator[str]:
    """The pieces of an answer as they come."""
    for choice in choices(server, messages, **body):
        yield choice["delta"].get("content") or ""


def describe(path: str | Path) -> SimpleNamespace:
    """What a session must know of a GGUF file: .template (None without one), .context (tokens), .control (its control tokens).

    Raises ValueError for a file that is absent, none of GGUF, cut off, or of a type that the package gguf does not know.
    """
    import gguf

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise ValueError(f"{path.name} begins with {start!r} and not with b'GGUF': it is no GGUF file.")
    try:
        fields = gguf.GGUFReader(path).fields
        found = {
            name: fields[name].contents() for name in fields if name.startswith(("tokenizer.chat", "general.arch"))
        }
        length = fields.get(f"{found.get('general.architecture')}.context_length")
        tokens, kinds = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
        control = gguf.TokenType.CONTROL
        marks = {text for text, kind in zip(tokens.contents(), kinds.contents()) if kind == control} if kinds else set()  # pyright: ignore[reportOptionalMemberAccess]
    except Exception as error:  # the reader raises what its arrays raise
        said = str(error)
        if unknown := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", said):
            told = f"a tensor has type {unknown[1]}, which this gguf does not know. Update gguf and xllamacpp."
            raise ValueError(f"{path.name}: {told}") from error
        raise ValueError(f"{path.name} is cut off or damaged ({said}). Download it again.") from error
    return SimpleNamespace(
        template=found.get("tokenizer.chat_template"),
        context=int(length.contents()) if length else CONTEXT,
        control=marks,
    )


class Session:
    """A conversation with a served GGUF file, as `chat.ChatSession` is one with a model of transformers.

    The file's own template and end token hold. A file without a template is refused, because llama.cpp would take another one
    silently. So is a typed control token, because llama.cpp would read it as one. The oldest turns go when the context is full.
    """

    def __init__(
        self,
        server: Any,
        file: SimpleNamespace,
        system: str | None = None,
        max_new_tokens: int = 256,
        *,
        context: int = CONTEXT,
        seed: int | None = None,
        sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        **template_arguments: Any,
    ):
        if not file.template:
            raise ChatError(
                "This file has no chat template: llama.cpp would take ChatML, whatever the model was trained with. Take a file of the "
                "instruct version."
            )
        if context <= max_new_tokens:
            raise ChatError(f"The context ({context} tokens) must be larger than the answer ({max_new_tokens}).")
        how = sampling(sample, temperature, top_p)
        self.server, self.file, self.context, self.max_new_tokens, self.seed = (
            server,
            file,
            context,
            max_new_tokens,
            seed,
        )
        self.body = {"max_tokens": max_new_tokens, "chat_template_kwargs": template_arguments}
        self.body |= {name: value for name, value in how.items() if name != "do_sample"}
        if not how["do_sample"]:
            self.body["temperature"] = 0
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns, self.cut_off, self._answers = [], False, 0

    @property
    def messages(self) -> list[dict]:
        """The conversation as it stands."""
        return [*self.system, *self.turns]

    def stop(self) -> None:
        """Nothing to do: the server stops as soon as the stream is closed. Here because `ChatSession` has it."""

    def stream(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; afterwards it is part of `messages`."""
        for mark in self.file.control:
            if mark in text:
                raise ChatError(f"llama.cpp would read {mark} as a control token and not as text: take it out.")
        turns = [*self.turns, {"role": "user", "content": text}]
        too_long = f"the context of {self.context}. Shorten it."
        _, turns = newest(turns, self._rendered, self.max_new_tokens, self.context, too_long)
        yield from self._answer(turns, "")

    def resume(self) -> Iterator[str]:
        """Go on with the answer that was cut off, by up to max_new_tokens more."""
        if not self.cut_off or not self.turns:
            raise ChatError("There is no answer to go on with: the last one is complete.")
        yield from self._answer(self.turns[:-1], self.turns[-1]["content"])

    def _rendered(self, turns):
        prompt = ask(self.server, "/apply-template", messages=[*self.system, *turns],
                     chat_template_kwargs=self.body["chat_template_kwargs"])["prompt"]  # fmt: skip
        return ask(self.server, "/tokenize", content=prompt, add_special=True)["tokens"]

    def _answer(self, turns, said):
        """Stream an answer of which `said` has been said before, and keep it; thoughts are streamed and not kept."""
        seed = {} if self.seed is None else {"seed": self.seed + self._answers}
        begun = [{"role": "assistant", "content": said}] if said else []
        reason = None
        try:
            for choice in choices(self.server, [*self.system, *turns, *begun], **self.body, **seed):
                delta, reason = choice["delta"], choice["finish_reason"]
                said += delta.get("content") or ""
                if piece := (delta.get("reasoning_content") or "") + (delta.get("content") or ""):
                    yield piece
        finally:
            self.cut_off = reason != "stop"  # "length", or the reader left early
            if said:
                self.turns = [*turns, {"role": "assistant", "content": said}]
                self._answers += 1


@contextlib.contextmanager
def session(path: str | Path, **options: Any) -> Iterator[Session]:
    """A `Session` with a GGUF file whose server ends with the block. Raises ValueError and RuntimeError in one line each."""
    file = describe(path)
    context = min(file.context, CONTEXT)
    if not file.template:
        Session(None, file)  # says so before a large file is loaded
    with serving(os.fspath(path), n_ctx=context) as server:
        yield Session(server, file, context=context, **options)
