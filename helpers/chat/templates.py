"""Conversations as token ids, through the template of the model: no text is lost, no typed text becomes a control token.

Everything renders through the tokenizer's own `apply_chat_template`, which adds no BOS of its own: rendering to text and tokenizing
that text with `tokenizer(text)` adds a second BOS with Llama's and Mistral's tokenizers, silently.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.chat import thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool", "developer")
ALWAYS = ROLES[:3]
# Parameters of apply_chat_template that are no arguments of a template: `render` decides them.
OURS = (
    "conversation", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip


class ChatError(ValueError):
    """A conversation that no template could render; the message says what would be right."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    add_generation_prompt: bool = True,
    **template_arguments: Any,
) -> list[int]:
    """Token ids of a conversation [{"role", "content"}, ...] as the model's chat template writes it.

    template_arguments  whatever the template reads (enable_thinking, reasoning_effort, ...), and tools, documents, chat_template
                        (Jinja text or the name of a template), continue_final_message (leaves the last message open)

    content is a text or a list of text parts, {"type": "text", "text": ...}, which are joined; None beside tool_calls.
    The roles tool and developer, tools and documents are for templates that read them.
    A BOS stands in front if the template writes one (Phi-3's writes none), and never twice.
    A system message that the template refuses (Gemma's, Mistral's first) or leaves out is put in front of the first user turn.
    Control tokens in what others typed (user, system, developer, tool, tools, documents) are encoded as the plain text they are.
    Templates may trim whitespace around a text, and drop an assistant's thoughts. Any other text that would be lost is a ChatError.

    Raises ChatError also for an empty conversation, unknown roles, roles out of order, parts that are no text, typed turn marks that
    are no tokens ([INST] in Llama 2: nothing can tell them from the template's own), and a tokenizer without a template.
    """
    if wrong := sorted(set(template_arguments) & set(OURS)):
        raise ChatError(
            f"{', '.join(wrong)}: no argument of a template. render returns a list of token ids; pad or cut it yourself."
        )
    if template_arguments.get("continue_final_message"):
        add_generation_prompt = False
    if (
        type(tokenizer).__name__ == "MistralCommonBackend"
    ):  # mistral-common has no templates; it keeps typed tokens apart itself
        return _mistral(tokenizer, _checked(messages, ROLES), add_generation_prompt, template_arguments)  # pyright: ignore[reportReturnType]
    template = _template(tokenizer, template_arguments)
    messages = _checked(messages, _roles(template))
    for name in ("tools", "documents"):
        if template_arguments.get(name) and name not in _variables(template):
            raise ChatError(f"This model's chat template does not read {name}: they would be lost.")
    write = _Writer(tokenizer, template, add_generation_prompt, template_arguments)
    refusal = None
    for form in _forms(messages):
        try:
            text = write(form)
        except (
            Exception
        ) as error:  # jinja2.TemplateError (templates call raise_exception), and whatever odd input makes a template do
            if refusal is None:
                refusal = ChatError(
                    f"The model's chat template refuses this conversation: {error}{_hint(error, template, template_arguments)}"
                )
                refusal.__cause__ = error
            continue
        if lost := write.loses(form, text):
            refusal = refusal or ChatError(lost)
            continue
        return _one_bos(write.encode(form, text), tokenizer.bos_token_id)
    raise refusal or ChatError("no form of this conversation could be written")


def fold_system(messages: list[dict]) -> list[dict]:
    """The same conversation with its system (or developer) message put in front of the first user turn."""
    if not messages or messages[0]["role"] not in ("system", "developer"):
        return list(messages)
    system, *rest = messages
    if not rest:
        raise ChatError("A system message alone is no conversation: add a user turn.")
    first = {**rest[0], "content": f"{text_of(system['content'])}\n\n{text_of(rest[0]['content'])}"}
    return [first, *rest[1:]]


# --- the template ---------------------------------------------------------------------------------------------------------------


def _template(tokenizer, arguments):
    """Jinja text of the template that these arguments choose."""
    asked = arguments.get("chat_template")
    own = getattr(tokenizer, "chat_template", None)
    if not own and not asked:
        raise ChatError(_no_template(tokenizer))
    if isinstance(asked, str) and "{" not in asked and not (isinstance(own, dict) and asked in own):
        names = ", ".join(sorted(own)) if isinstance(own, dict) else "one template without a name"
        raise ChatError(f"This tokenizer has no chat template named {asked!r}; it has {names}.")
    try:
        template = tokenizer.get_chat_template(asked, arguments.get("tools"))
        _parsed(template)
    except Exception as error:  # no default among several templates; no valid Jinja
        raise ChatError(f"The chat template cannot be used: {error}") from error
    return template


def _hint(error, template, arguments):
    """What a template reads that it was not given, for templates that stop without it (Cohere's and Hermes' for tools)."""
    if type(error).__name__ == "TemplateError":  # raised by the template, in its own words
        return ""
    absent = [name for name in ("tools", "documents") if name in _variables(template) and arguments.get(name) is None]
    return f" (it reads {' and '.join(absent)}, which were not given)" if absent else ""


def _no_template(tokenizer):
    folder = Path(str(getattr(tokenizer, "name_or_path", "") or "."))
    names = ("tekken.json", "chat_template.jinja", "chat_template.json", "processor_config.json")
    here = [name for name in names if folder.is_dir() and folder != Path(".") and (folder / name).exists()]
    found = f" Its folder holds {', '.join(here)}." if here else ""
    return (
        f"This tokenizer has no chat template.{found} An instruct model may keep it elsewhere: in chat_template.jinja or "
        "chat_template.json beside the weights (AutoProcessor reads it; or set tokenizer.chat_template to its text), or, with "
        "Mistral's tekken.json, in the package mistral-common (pip install mistral-common, then load the tokenizer again). "
        "A base model has none at all: use its instruct version."
    )


@lru_cache
def _parsed(template):
    """Syntax tree of a template. {% generation %} marks what is trained on, and is transformers' own tag."""
    import jinja2

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 - a prompt is text, not HTML
    return environment.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))


@lru_cache
def _variables(template):
    from jinja2 import meta

    return meta.find_undeclared_variables(_parsed(template))


@lru_cache
def _roles(template):
    """Roles that a template knows: the usual ones, and all that it compares a role with. ChatML writes any role it is given, but
    a model was trained on those that its template names."""
    from jinja2 import nodes

    def is_role(node):
        return (
            isinstance(node, nodes.Getattr) and node.attr == "role"
            or isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "role"
            or isinstance(node, nodes.Name) and "role" in node.name
        )  # fmt: skip

    tree = _parsed(template)
    compared = [
        node for node in tree.find_all(nodes.Compare) if any(map(is_role, [node.expr, *node.find_all(nodes.Expr)]))
    ]
    named = {const.value for node in compared for const in node.find_all(nodes.Const) if isinstance(const.value, str)}
    return (*ALWAYS, *sorted(named - {*ALWAYS, "role", "content"}))


@lru_cache
def _literals(template):
    """The text that stands in a template, apart from its logic."""
    from jinja2 import nodes

    tree = _parsed(template)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)


# --- the conversation -----------------------------------------------------------------------------------------------------------


def _checked(messages, roles):
    """The messages with their parts joined, or ChatError."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, (list, tuple)):
        raise ChatError(
            'A conversation is a list of {"role": ..., "content": ...}; got ' + type(messages).__name__ + "."
        )
    if not messages:
        raise ChatError('The conversation is empty. Start with {"role": "user", "content": "..."}.')
    checked = [_message(number, message, roles) for number, message in enumerate(messages)]
    _check_order(checked)
    return checked


def _message(number, message, roles):
    if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
        raise ChatError(f"Message {number} must be a dict with role and content.")
    role = message["role"]
    if role not in roles:
        raise ChatError(f"Message {number} has the role {role!r}; this model's template knows {', '.join(roles)}.")
    calls = message.get("tool_calls")
    named = isinstance(calls, (list, tuple)) and all(isinstance(call, dict) and _call_name(call) for call in calls)
    if calls and not (role == "assistant" and named):
        raise ChatError(
            f'Message {number} ({role}): tool_calls is for assistants, a list of {{"function": {{"name", "arguments"}}}}.'
        )
    where = f"Message {number} ({role})"
    content = message.get("content")
    text = text_of(content, where) if content is not None else ""
    if not text.strip() and not calls:
        raise ChatError(f"{where} has no text.")
    rest = {key: value for key, value in message.items() if key not in ("content", "tool_calls")}
    if text.strip():
        rest["content"] = text
    return {**rest, "tool_calls": [_call(call) for call in calls]} if calls else rest


def text_of(content: str | list, where: str = "A message") -> str:
    """Text of a content, which is a text or a list of text parts; ChatError for any other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ChatError(f"{where} has no text: its content is a {type(content).__name__}.")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ChatError(
                f'{where} has a part of type {kind!r}. Only text is rendered here: {{"type": "text", "text": ...}}.'
            )
    return "".join(part["text"] for part in content)


def _call_name(call):
    function = call.get("function", call)
    return function.get("name") if isinstance(function, dict) and isinstance(function.get("name"), str) else None


def _call(call):
    """A tool call with its arguments as a dict: APIs send JSON text, templates expect the object."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        function = {**function, "arguments": parsed if isinstance(parsed, dict) else arguments}
    return {
        "type": "function",
        **{key: value for key, value in call.items() if key not in ("name", "arguments")},
        "function": function,
    }


FOLLOWS = {  # what may stand before a role, None for the beginning
    "user": (None, "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_order(messages):
    leading = 1 if messages[0]["role"] in ("system", "developer") else 0
    leading += len(messages) > 1 and [messages[0]["role"], messages[1]["role"]] == ["system", "developer"]
    turns = messages[leading:]
    if not turns:
        raise ChatError("A system message alone is no conversation: add a user turn.")
    before = None
    for number, role in enumerate((message["role"] for message in turns), 1):
        if role not in FOLLOWS and role not in ("system", "developer"):
            before = "tool" if before == "assistant" else before
            continue  # a role of this template only, such as tool_results or document: the template knows where it belongs
        if before not in FOLLOWS.get(role, ()):
            expected = "assistant" if before in ("user", "tool") else "user"
            raise ChatError(
                f"Turns must alternate user, assistant, user, ...: turn {number} is {role!r} where {expected!r} belongs."
            )
        before = role


# --- forms ----------------------------------------------------------------------------------------------------------------------


def _forms(messages) -> Iterator[list[dict]]:
    """The conversation in the forms that templates take, the usual one first: texts or lists of parts, arguments of calls as an
    object or as JSON text, no content or an empty one; the system message last in front of the first user turn."""
    calls = any("tool_calls" in message for message in messages)
    whole = [messages] + ([fold_system(messages)] if messages[0]["role"] in ("system", "developer") else [])
    for conversation, parts, as_text, empty in itertools.product(
        whole, (False, True), (False, True)[: 1 + calls], (False, True)[: 1 + calls]
    ):
        yield [_form(message, parts, as_text, empty) for message in conversation]


def _form(message, parts, as_text, empty):
    if parts and "content" in message:
        message = {**message, "content": [{"type": "text", "text": message["content"]}]}
    if empty and "content" not in message:
        message = {**message, "content": ""}
    if as_text and "tool_calls" in message:
        message = {**message, "tool_calls": [_call_as_text(call) for call in message["tool_calls"]]}
    return message


def _call_as_text(call):
    arguments = call["function"].get("arguments")
    text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
    return {**call, "function": {**call["function"], "arguments": text}}


# --- writing --------------------------------------------------------------------------------------------------------------------


class _Writer:
    """One tokenizer with one template and its arguments: writes conversations, says what a text lost, encodes."""

    def __init__(self, tokenizer, template, add_generation_prompt, arguments):
        self.tokenizer, self.template, self.arguments = tokenizer, template, arguments
        self.add_generation_prompt = add_generation_prompt

    def __call__(self, messages, **changed):
        arguments = {"add_generation_prompt": self.add_generation_prompt, **self.arguments, **changed}
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, **{**arguments, "chat_template": self.template}
        )

    def loses(self, messages, text):
        """What the written text lacks, as a sentence; None if nothing. Texts are looked for as they are, and every message once
        more with a word of its own in place of its text: a short text may stand in the template by chance."""
        names = [f"zq{number}qz" for number in range(len(messages))]
        try:
            marked = self([_replaced(message, name) for message, name in zip(messages, names)])
        except Exception:  # a template that looks into its texts: then only the texts themselves tell
            marked = None
        for number, (message, name) in enumerate(zip(messages, names)):
            content = text_of(message.get("content") or "")
            kept = [content] + (
                [thoughts.split(content, known=self.template)[1]] if message["role"] == "assistant" else []
            )
            if content and not (any(_stands(wanted, text) for wanted in kept) and (marked is None or name in marked)):
                return f"The model's chat template leaves out the text of message {number} ({message['role']})."
            if marked and re.search(rf"""["']text["']: ["']{name}""", marked):
                return f"The model's chat template takes message {number} for a text, not for a list of parts."
            for wanted in _leaves(
                [[_call_name(call), call["function"].get("arguments")] for call in message.get("tool_calls", ())]
            ):
                if not _stands(wanted, text):
                    return f"The model's chat template leaves out a tool call of message {number}: {wanted!r} is lost."
        for wanted in _leaves(
            [[_tool_name(tool) for tool in self.arguments.get("tools") or ()], self.arguments.get("documents") or ()]
        ):
            if not _stands(wanted, text):
                return f"The model's chat template leaves out a part of tools or documents: {wanted!r} is lost."
        return None

    def encode(self, messages, text):
        """Token ids. Text without control tokens is encoded as it is; typed ones keep their letters and lose their power."""
        marked, arguments = self._marked(messages)
        if marked == messages and arguments == self.arguments:
            return list(self._encoded(lambda: self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

        try:
            written = self(marked, **arguments)
        except Exception:
            written = None
        if written is None or mark_control_tokens(written, _NOTHING) != text:
            typed = ", ".join(sorted(self._typed(messages)))
            raise ChatError(
                f"A message contains {typed}, which this model's chat template treats as its own. Write it another way."
            )
        return list(self._encoded(lambda: encode_marked_chat(self.tokenizer, written)))

    def _encoded(self, encode):
        try:
            return encode()
        except Exception as error:  # text that is no Unicode; a tokenizer that has no letters for a control token
            raise ChatError(f"The tokenizer cannot encode this conversation: {error}") from error

    def _marked(self, messages):
        """Messages and arguments with every control token in them wrapped in transformers' marks."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        frame = self._frame()
        added = [token for token in self.tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
        turn = {token.content for token in added if token.special or token.content in frame}
        typed = turn | {token.content for token in added if token.content in _literals(self.template)}
        # An assistant's own words: thoughts and calls are marked by tokens, too, and stay what they are.
        said = {token for token in turn if not thoughts.is_mark(token)}
        plain = set(_PLAIN_MARK.findall(frame)) - {token.content for token in added}

        def mark(value, tokens):
            longest_first = sorted(tokens, key=len, reverse=True)
            pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
            if not any(map(pattern.search, _leaves(value))):
                return value
            if mark_control_tokens(value, _NOTHING) != value:
                raise ChatError(
                    "A message contains control tokens and the private characters U+F0000 or U+F0001: leave out one of them."
                )
            return mark_control_tokens(value, pattern)

        marked = []
        for number, message in enumerate(messages):
            role = message["role"]
            if role != "assistant" and (
                found := [word for word in sorted(plain) if word in text_of(message.get("content") or "")]
            ):
                raise ChatError(
                    f"Message {number} ({role}) contains {found[0]!r}, with which this model's template marks turns. Its tokenizer has "
                    "no token for it, so the model could not tell yours from the template's. Write it another way."
                )
            texts = {key: message[key] for key in ("content", "tool_calls") if key in message}
            marked.append({**message, **mark(texts, said if role == "assistant" else typed)})
        ours = {name: self.arguments[name] for name in ("tools", "documents") if self.arguments.get(name)}
        return marked, {**self.arguments, **{name: mark(value, typed) for name, value in ours.items()}}

    def _typed(self, messages):
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
        texts = list(_leaves([message.get("content") for message in messages]))
        return {repr(token) for token in added if any(token in text for text in texts)}

    def _frame(self):
        """What the template writes around the turns of a short conversation, default system text included."""
        arguments = {
            name: value
            for name, value in self.arguments.items()
            if name not in ("tools", "documents", "continue_final_message")
        }
        probe = [{"role": role, "content": "zqz"} for role in ("user", "assistant", "user")]
        plain = _Writer(self.tokenizer, self.template, False, arguments)
        for form in itertools.islice(_forms(probe), 2):
            try:
                return plain(form).replace("zqz", "\0")
            except Exception:  # noqa: S112 - a template that refuses even this: its literals must do
                continue
        return ""


_NOTHING = re.compile(r"(?!)")
# How marks of turns look where they are no tokens: [INST], <<SYS>>, <|user|>, <start_of_turn>.
_PLAIN_MARK = re.compile(r"<<?/?\|?[A-Za-z_]+\|?>>?|\[/?[A-Z_]+\]")


def _replaced(message, name):
    if not message.get("content"):
        return message
    return {**message, "content": name if isinstance(message["content"], str) else [{"type": "text", "text": name}]}


def _leaves(value):
    """All texts in nested lists and dicts, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)


def _stands(wanted, text):
    """Whether a text stands in another as it is, or as JSON or Python write it; whitespace around it may be trimmed."""
    wanted = wanted.strip()
    written = (wanted, json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1], repr(wanted)[1:-1])
    return any(form in text for form in written)


def _tool_name(tool):
    return _call_name(tool) if isinstance(tool, dict) else getattr(tool, "__name__", "")


def _one_bos(ids, bos):
    """Without the second BOS of a template that writes it twice."""
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _mistral(tokenizer, messages, add_generation_prompt, arguments):
    try:
        return list(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, return_dict=True, **arguments
            )["input_ids"]
        )
    except Exception as error:
        raise ChatError(f"mistral-common refuses this conversation: {error}") from error
