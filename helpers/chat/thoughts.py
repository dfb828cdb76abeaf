"""What a model thinks and what it says: telling the thoughts in an answer from the answer itself.

Reasoning models write their thoughts into the same stream of tokens, between marks of their own: <think>...</think> (Qwen3,
DeepSeek-R1, GLM, Nemotron), [THINK]...[/THINK] (Magistral), channels (gpt-oss, Gemma 4) and others. The marks are often special tokens,
which `skip_special_tokens=True` deletes: then a thought reads like an answer. `decoder` keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tag whose name says that it holds thoughts: <think>, <thinking>, <thought>, <reasoning>, <seed:think>.
_NAME = r"[\w:.-]*(?:think|thought|reason)[\w:.-]*"
# Marks that are no such tag. Sources: the chat templates of Magistral, Command R7B, Gemma 4, Kimi-VL, Apertus, OpenThinker.
_PAIRS = {
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>": "<channel|>",
    "◁think▷": "◁/think▷",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
}
_WORDS = {"Here is my thought process:": "Here is my response:"}  # Granite 3.2 and 3.3
# Channels, a header each. gpt-oss: <|start|>assistant<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final
# <|message|>...<|return|>; Muse Glimmer: <|start|>assistant to=self<|message|>...<|eom|><|start|>assistant to=user<|message|>...<|eot|>.
_CHANNELS = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|eom|>",
    "<|eot|>",
    "<|return|>",
    "<|call|>",
)
_CHANNEL = re.compile(
    r"([^<>]*)(?:<\|channel\|>([^<]*))?(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?=<\|(?:end|eom|eot|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)
_OPENING_AT_START = re.compile(rf"\s*(<{_NAME}>|{'|'.join(map(re.escape, [*_PAIRS, *_WORDS]))})")
_OPENING_AT_END = re.compile(
    rf"(<{_NAME}>|(?:{'|'.join(map(re.escape, _PAIRS))})\w*|<\|channel\|>[^<]*(?:<\|message\|>)?)\s*\Z"
)
_CLOSING = re.compile(rf"</{_NAME}>|{'|'.join(map(re.escape, [*_PAIRS.values(), *_WORDS.values()]))}")


def is_mark(token: str) -> bool:
    """Whether a token opens or closes a thought."""
    return bool(_OPENING_AT_START.fullmatch(token) or _CLOSING.fullmatch(token))


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """A function from token ids to their text without special tokens, except those that mark thoughts and channels."""
    specials = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    specials |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    channels = _CHANNELS if "<|message|>" in specials.values() else ()
    hidden = {number for number, token in specials.items() if not is_mark(token) and token not in channels}
    if hidden == set(specials):
        return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # pyright: ignore[reportReturnType]
    return lambda ids: tokenizer.decode(  # pyright: ignore[reportReturnType]
        [int(number) for number in ids if int(number) not in hidden], skip_special_tokens=False
    )


def opening(prompt: str) -> str:
    """The mark with which a prompt ends, "" if it ends with none: DeepSeek-R1's template opens <think> for the model."""
    found = _OPENING_AT_END.search(prompt)
    return found[0] if found else ""


def known(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a tokenizer's template and added tokens: marks that stand in it are the model's own."""
    added = map(str, tokenizer.added_tokens_encoder)  # pyright: ignore[reportArgumentType]
    return "\n".join([str(getattr(tokenizer, "chat_template", None) or ""), *added])


def split(text: str, opened: str = "", known: str = "") -> tuple[str, str]:
    """(thoughts, answer) of what a model wrote, both stripped; a thought that was cut off leaves the answer empty.

    opened  the mark that the prompt ended with (`opening`)
    known   text that holds the model's own marks (`known`). A closing mark without an opening one ends a thought only if it is
            one of these; in the answers of other models it is a word like any other.
    """
    text = opened + text
    if "<|channel|>" in text or "<|message|>" in text:
        return _split_channels(text)
    if "<|message|>" in known and re.fullmatch(r"\s*to=\w*\s*", text):
        return "", ""  # cut off within a header
    thoughts = []
    while begin := _OPENING_AT_START.match(text):
        thought, _, text = text[begin.end() :].partition(_closing(begin[1]))
        thoughts.append(thought)
    for mark in _PAIRS:
        while mark in text:
            before, _, rest = text.partition(mark)
            thought, _, after = rest.partition(_PAIRS[mark])
            thoughts.append(thought)
            text = before + after
    ends = [found for found in _CLOSING.finditer(text) if opened or found[0] in known]
    if ends:
        thoughts.append(text[: ends[-1].start()])
        text = text[ends[-1].end() :]
    return "\n".join(map(str.strip, thoughts)).strip(), text.strip()


def _closing(mark):
    return {**_PAIRS, **_WORDS}.get(mark) or mark.replace("<", "</", 1)


def _split_channels(text):
    """Only the channel "final", or what is addressed to the user, is said; analysis, commentary and calls are not."""
    answers, others = [], []
    for header, channel, content in _CHANNEL.findall(text):
        to = re.search(r"\bto=(\S+)", header + channel)
        said = channel.split()[:1] == ["final"] if channel else to is None or to[1] == "user"
        (answers if said else others).append(content)
    return "\n".join(others).strip(), "\n".join(answers).strip()
