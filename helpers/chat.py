"""Chat templating and generation: exactly one BOS, clear errors, history within a token budget, streaming, batches.

Everything renders through the tokenizer's own `apply_chat_template`, straight to token ids: rendering to text and tokenizing that
adds a second BOS with Llama's and Mistral's tokenizers, silently.
"""

import html
import threading

from helpers import batch as batch_run
from helpers import widgets

ROLES = ("system", "user", "assistant")


class ChatError(ValueError):
    """A conversation that no template could render; the message says what would be right."""


def render(tokenizer, messages, add_generation_prompt=True):
    """Token ids (a list of int) of a conversation [{"role", "content"}, ...], with exactly one BOS if the tokenizer has one.

    A system message is folded into the first user turn for templates that refuse it (Mistral's). Raises ChatError for an empty
    conversation, unknown roles, roles that do not alternate, or a tokenizer without a template.
    """
    messages = _checked(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ChatError(
            "This tokenizer has no chat template, so it belongs to a base model. Use the instruct version of the model, or set "
            "tokenizer.chat_template to the format it was trained on."
        )
    try:
        ids = _template(tokenizer, messages, add_generation_prompt)
    except Exception as error:  # jinja2.TemplateError: templates raise it by calling raise_exception
        if messages[0]["role"] != "system":
            raise ChatError(f"The model's chat template refuses this conversation: {error}") from error
        try:
            ids = _template(tokenizer, fold_system(messages), add_generation_prompt)
        except Exception as error:
            raise ChatError(f"The model's chat template refuses this conversation: {error}") from error
    bos = tokenizer.bos_token_id
    if bos is not None:
        while len(ids) > 1 and ids[0] == bos and ids[1] == bos:
            ids = ids[1:]
    return ids


def fold_system(messages):
    """The same conversation with its system message put in front of the first user turn."""
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, *rest = messages
    if not rest:
        raise ChatError("A system message alone is no conversation: add a user turn.")
    first = {**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}
    return [first, *rest[1:]]


def batch(model, tokenizer, conversations, max_new_tokens=64):
    """Greedy answers to several conversations (or plain prompts) in one batch: a list of texts.

    Padding is on the left: generation goes on at the end of the row, so padding there would be read as text. Each answer is the
    one its conversation gets alone.
    """
    import torch

    if not conversations:
        raise ChatError("The batch is empty: give at least one conversation.")
    rows = [render(tokenizer, [{"role": "user", "content": item}] if isinstance(item, str) else item) for item in conversations]
    width, pad = max(map(len, rows)), _pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = next(model.parameters()).device
    output = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
    )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


class ChatSession:
    """A conversation with a model: history within a token budget, answers streamed, stoppable.

    token_budget  most tokens of prompt plus answer; when history grows past it, the oldest turns go, a user turn together with its
                  answer, never half of one. The system message stays. Default: the model's context length.
    """

    def __init__(self, model, tokenizer, system=None, max_new_tokens=256, token_budget=None):
        limit = getattr(model.config, "max_position_embeddings", None)
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.token_budget = token_budget or limit or 4096
        if self.token_budget <= max_new_tokens:
            raise ChatError(f"token_budget ({self.token_budget}) must be larger than max_new_tokens ({max_new_tokens}).")
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns = []
        self._stop = threading.Event()

    @property
    def messages(self):
        """The conversation as it stands: system message, then alternating user and assistant turns."""
        return [*self.system, *self.turns]

    def stop(self):
        """End the running answer after the token it is at; what was said so far is kept."""
        self._stop.set()

    def prompt(self, text):
        """Token ids of the conversation with `text` as its next user turn, and the turns that fit the budget."""
        turns = [*self.turns, {"role": "user", "content": text}]
        while True:
            ids = render(self.tokenizer, [*self.system, *turns])
            if len(ids) + self.max_new_tokens <= self.token_budget:
                return ids, turns
            if len(turns) == 1:
                raise ChatError(
                    f"This message alone takes {len(ids)} tokens; with {self.max_new_tokens} for the answer that is more than the "
                    f"budget of {self.token_budget}. Shorten it or raise token_budget."
                )
            turns = turns[2:]

    def stream(self, text):
        """Yield the answer piece by piece; afterwards it is part of `messages`. An error in generation is raised here."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        ids, turns = self.prompt(text)
        self._stop.clear()
        stop = self._stop

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                return torch.full((len(input_ids),), stop.is_set(), dtype=torch.bool, device=input_ids.device)

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = torch.tensor([ids], device=next(self.model.parameters()).device)
        failure = []

        def generate():
            try:
                self.model.generate(
                    input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=self.max_new_tokens, do_sample=False,
                    pad_token_id=_pad_id(self.tokenizer), streamer=streamer, stopping_criteria=StoppingCriteriaList([Stopped()]),
                )  # fmt: skip
            except Exception as error:
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        answer = []
        try:
            for piece in streamer:
                if piece:
                    answer.append(piece)
                    yield piece
        finally:
            stop.set()  # the caller left early: do not go on computing for nobody
            thread.join()
            if answer and not failure:
                self.turns = [*turns, {"role": "assistant", "content": "".join(answer).strip()}]
        if failure:
            raise failure[0]

    def send(self, text):
        """The whole answer as one text."""
        return "".join(self.stream(text)).strip()


class ChatBox:
    """A chat widget on a ChatSession. What anybody says is escaped, so an answer with a script tag is shown, not run."""

    def __init__(self, session):
        import ipywidgets

        self.session = session
        self.log = ipywidgets.HTML()
        self.entry = ipywidgets.Text(placeholder="Ask something and press Enter", description="You:", layout={"width": "70%"})
        self.send_button = ipywidgets.Button(description="Send", tooltip="Send the message")
        self.stop_button = ipywidgets.Button(description="Stop", tooltip="Stop the running answer", disabled=True)
        self.send_button.on_click(lambda _: self._submit())
        self.entry.on_submit(lambda _: self._submit()) if hasattr(self.entry, "on_submit") else None
        self.stop_button.on_click(lambda _: session.stop())
        row = ipywidgets.HBox([self.entry, self.send_button, self.stop_button])
        self.widget = ipywidgets.VBox([self.log, row])
        self._show()

    def ask(self, text):
        """Send `text` and show the answer as it comes; blocks until it is complete."""
        self.send_button.disabled, self.stop_button.disabled = True, False
        shown = [*self.session.turns, {"role": "user", "content": text}]
        pieces = []
        try:
            for piece in self.session.stream(text):
                pieces.append(piece)
                self._show([*shown, {"role": "assistant", "content": "".join(pieces)}])
        except ChatError as error:
            self._show(shown, note=str(error))
        finally:
            self.send_button.disabled, self.stop_button.disabled = False, True

    def _submit(self):
        text = self.entry.value.strip()
        if text and not self.send_button.disabled:
            self.entry.value = ""
            threading.Thread(target=self.ask, args=(text,), daemon=True).start()

    def _show(self, turns=None, note=None):
        turns = self.session.turns if turns is None else turns
        self.log.value = transcript_html(turns) + (f"<p role='alert'>{html.escape(note)}</p>" if note else "")

    def __repr__(self):
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.session.turns) or "(chat box: open the notebook in Jupyter to use it)"

    def _repr_mimebundle_(self, **_):
        static = {"text/html": transcript_html(self.session.turns), "text/plain": repr(self)}
        return static if batch_run() else {**static, **widgets.view(self.widget)}


def transcript_html(turns):
    """Turns as HTML paragraphs with everything escaped."""
    rows = (f"<p><b>{html.escape(turn['role'])}:</b> {html.escape(turn['content'])}</p>" for turn in turns)
    return f"<div role='log' aria-live='polite' style='white-space: pre-wrap'>{''.join(rows)}</div>"


def _checked(messages):
    if isinstance(messages, (str, bytes)) or not isinstance(messages, (list, tuple)):
        raise ChatError('A conversation is a list of {"role": ..., "content": ...}; got ' + type(messages).__name__ + ".")
    if not messages:
        raise ChatError('The conversation is empty. Start with {"role": "user", "content": "..."}.')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ChatError(f"Message {number} must be a dict with role and content.")
        if message["role"] not in ROLES:
            raise ChatError(f"Message {number} has the role {message['role']!r}; known are {', '.join(ROLES)}.")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ChatError(f"Message {number} ({message['role']}) has no text.")
    turns = list(messages[1:] if messages[0]["role"] == "system" else messages)
    if not turns:
        raise ChatError("A system message alone is no conversation: add a user turn.")
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise ChatError(
                f"Turns must alternate user, assistant, user, ...: turn {number + 1} is {message['role']!r} where {expected!r} belongs."
            )
    return list(messages)


def _template(tokenizer, messages, add_generation_prompt):
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True)["input_ids"])


def _pad_id(tokenizer):
    """Any id works for padding, because the mask hides it; models without one (Mistral, Llama) get their end token."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    end = tokenizer.eos_token_id
    return end[0] if isinstance(end, list) else end if end is not None else 0
