"""Talking to a model in a terminal: `python -m helpers chat`."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from helpers import chat, models


def main(arguments: argparse.Namespace) -> int | None:
    """One question (`--once`) or a conversation, with what `python -m helpers chat` was told."""
    if arguments.max_new_tokens < 1:
        raise ValueError("--max-new-tokens must be at least 1")
    if arguments.once is not None and not arguments.once.strip():
        raise ValueError("--once needs a question")
    how = {"sample": arguments.sample or None, "temperature": arguments.temperature, "top_p": arguments.top_p}
    chat.sampling(**how)  # says what is wrong before a model is fetched
    options = dict(map(_template_argument, arguments.template_argument))
    options |= {"system": arguments.system, "max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed, **how}
    opened = _llama if _is_gguf(arguments.model) else _transformers
    with opened(arguments.model, options) as (session, place):
        if arguments.once is not None:
            _say(session.stream(arguments.once))
        else:
            print(f"{place}. Empty line or Ctrl-D to leave, Ctrl-C to stop an answer, /more to go on with it.")
            _converse(session)


def _is_gguf(model):
    return model.endswith(".gguf") or Path(model).is_file()


@contextlib.contextmanager
def _llama(path, options):
    """A session with a GGUF file, and where it runs."""
    from helpers.chat import llama

    with llama.session(Path(path).expanduser(), **options) as session:
        yield session, f"{Path(path).name} in llama.cpp"


@contextlib.contextmanager
def _transformers(model, options):
    """A session with a model of transformers, and where it runs."""
    found = models.find(model, halves=1)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    net: Any = AutoModelForCausalLM.from_pretrained(found.path, dtype=found.dtype)
    net.to(found.device)
    yield chat.ChatSession(net, tokenizer, **options), f"{found.name} on the {found.device.upper()}"


def _converse(session):
    """Questions and answers until the reader leaves."""
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        try:
            _say(session.resume() if text == "/more" else session.stream(text))
            if session.cut_off:
                print("[cut off: /more goes on]")
        except KeyboardInterrupt:
            session.stop()
            print(" [stopped: /more goes on]")
        except chat.ChatError as error:
            print(error)


def _template_argument(text):
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise ValueError(f"--template-argument takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _say(pieces):
    with contextlib.closing(pieces):  # Ctrl-C ends the computation too, not only the printing
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
