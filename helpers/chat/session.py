"""Talking to a model: sessions with history within a token budget, streaming, sampling, batches.

How a conversation becomes token ids: `helpers.templates`. What of an answer is thought: `helpers.thoughts`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from helpers.chat import thoughts
from helpers.chat.templates import ChatError, render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sampling(sample: bool | None = None, temperature: float | None = None, top_p: float | None = None) -> dict:
    """Arguments of `generate`: greedy by default, because greedy answers can be repeated and compared.

    sample       True draws as the model's generation_config.json says, which is what its authors recommend (Qwen3's advise against
                 greedy); temperature and top_p replace its values, and imply it. temperature=0 is greedy.
    The rest of the generation config (end tokens, repetition penalty, top_k) holds either way. Raises ChatError.
    """
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ChatError(f"temperature must be 0 (greedy) or more, not {temperature}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ChatError(f"top_p must be above 0 and at most 1, not {top_p}.")
    if sample is False and (temperature or top_p is not None):
        raise ChatError("sample=False is greedy: leave out temperature and top_p.")
    if temperature == 0 or not (sample or temperature is not None or top_p is not None):
        return {"do_sample": False}
    given = {"temperature": temperature, "top_p": top_p}
    return {"do_sample": True, **{name: value for name, value in given.items() if value is not None}}


def require_cache(model: PreTrainedModel) -> None:
    """Raise ChatError for a model in training mode with gradient checkpointing: its layers drop the cache without a word.

    Each new token then sees the last one alone: the first word of an answer is right and the rest is noise.
    """
    name = (
        "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else "is_gradient_checkpointing"
    )  # before 5.23
    if getattr(model, "training", False) and getattr(model, name, False):
        raise ChatError(
            "The model is in training mode with gradient checkpointing. Call model.eval() before it answers."
        )


def newest(
    turns: list[dict], rendered: Callable[[list[dict]], list[int]], answer: int, limit: int, too_long: str
) -> tuple[list[int], list[dict]]:
    """(token ids, turns) of the newest turns that leave room for `answer` tokens below `limit`; the oldest go with their answers.

    rendered: the token ids of a prompt of these turns. too_long: what a single message exceeds, and what would help, for ChatError.
    """
    while len(ids := rendered(turns)) + answer > limit:
        users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
        if len(users) == 1:
            raise ChatError(
                f"This message alone takes {len(ids)} tokens; with {answer} for the answer that is more than {too_long}"
            )
        turns = turns[users[1] :]
    return ids, turns


def batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[str | list[dict]],
    max_new_tokens: int = 64,
    *,
    sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    **template_arguments: Any,
) -> list[str]:
    """Answers to several conversations (or plain prompts) in one batch, thoughts included; greedy unless told (`sampling`).

    Padding is on the left: generation goes on at the end of the row, so padding there would be read as text. Each greedy answer is
    the one its conversation gets alone. `seed` repeats the draws of the same batch. template_arguments go to `render`.
    """
    import torch

    if not conversations:
        raise ChatError("The batch is empty: give at least one conversation.")
    require_cache(model)
    how = sampling(sample, temperature, top_p)
    rows = [
        render(tokenizer, [{"role": "user", "content": item}] if isinstance(item, str) else item, **template_arguments)
        for item in conversations
    ]
    width, pad = max(map(len, rows)), _pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = next(model.parameters()).device
    with _seeded(seed, device):
        output = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **how,
        )
    return list(map(thoughts.decoder(tokenizer), output[:, width:].tolist()))


class ChatSession:
    """A conversation with a model: history within a token budget, answers streamed, stoppable, resumable.

    token_budget  most tokens of prompt plus answer; when history grows past it, the oldest turns go, a user turn together with its
                  answer, never half of one. The system message stays. Default: the model's context length.
    sample, temperature, top_p  as in `sampling`; seed repeats the session's draws, answer by answer.
    template_arguments          go to `render` for every turn (enable_thinking=False, tools=..., ...).

    Thoughts are streamed, so that one sees the model at work, and stay out of `messages`; the last ones are in `thought`. An answer
    that max_new_tokens or `stop` cut off sets `cut_off`; `resume` goes on. If only thoughts came, `messages` stays as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        max_new_tokens: int = 256,
        token_budget: int | None = None,
        *,
        sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        **template_arguments: Any,
    ):
        limit = getattr(model.config, "max_position_embeddings", None)
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.token_budget = token_budget or limit or 4096
        if self.token_budget <= max_new_tokens:
            raise ChatError(
                f"token_budget ({self.token_budget}) must be larger than max_new_tokens ({max_new_tokens})."
            )
        if template_arguments.get("continue_final_message"):
            raise ChatError(
                "A session continues an answer that was cut off with resume(), not with continue_final_message."
            )
        self.sampling, self.seed, self.template_arguments = (
            sampling(sample, temperature, top_p),
            seed,
            template_arguments,
        )
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns = []
        self.thought, self.cut_off = "", False
        self._open = None  # (prompt ids, turns, answer ids, turns afterwards) of an answer that was cut off
        self._answers = 0
        self._stop = threading.Event()

    @property
    def messages(self) -> list[dict]:
        """The conversation as it stands: system message, then alternating user and assistant turns."""
        return [*self.system, *self.turns]

    def stop(self) -> None:
        """End the running answer after the token it is at; what was said so far is kept."""
        self._stop.set()

    def prompt(self, text: str) -> tuple[list[int], list[dict]]:
        """Token ids of the conversation with `text` as its next user turn, and the turns that fit the budget."""

        def rendered(turns):
            return render(self.tokenizer, [*self.system, *turns], **self.template_arguments)

        turns = [*self._without_thoughts(), {"role": "user", "content": text}]
        too_long = f"the budget of {self.token_budget}. Shorten it or raise token_budget."
        return newest(turns, rendered, self.max_new_tokens, self.token_budget, too_long)

    def stream(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; afterwards it is part of `messages`. An error in generation is raised here."""
        ids, turns = self.prompt(text)
        yield from self._generate(ids, turns, [])

    def resume(self) -> Iterator[str]:
        """Go on with the answer that was cut off, by up to max_new_tokens more, from the very tokens it ended with."""
        if self._open is None or self._open[3] != self.turns:
            raise ChatError(
                "There is no answer to go on with: the last one is complete, or the conversation has changed since."
            )
        ids, turns, said, _ = self._open
        if len(ids) + len(said) + self.max_new_tokens > self.token_budget:
            raise ChatError(
                f"Going on takes {len(ids) + len(said) + self.max_new_tokens} tokens, more than the budget of {self.token_budget}."
            )
        yield from self._generate(ids, turns, said)

    def send(self, text: str) -> str:
        """The whole answer as one text, without thoughts. Warns if the thoughts took all tokens: there is no answer then."""
        before = self._answers
        pieces = "".join(self.stream(text))
        if pieces and self._answers == before:
            warnings.warn(
                f"{self.max_new_tokens} new tokens were not enough: the model was still thinking. Call resume(), raise max_new_tokens, "
                "or turn thinking off if the template can (enable_thinking=False).",
                stacklevel=2,
            )
        return self.turns[-1]["content"] if self._answers > before else ""

    def _without_thoughts(self):
        """The turns as the next prompt gets them: answers without thoughts; a turn that was nothing but thought, and its question, go."""
        known, turns = thoughts.known(self.tokenizer), []
        for turn in self.turns:
            if turn["role"] == "assistant" and isinstance(turn.get("content"), str):
                thought, answer = thoughts.split(turn["content"], known=known)
                if thought or not answer:
                    turn = {**turn, "content": answer}
                if not answer and not turn.get("tool_calls"):
                    while turns and turns.pop()["role"] != "user":
                        pass
                    continue
            turns.append(turn)
        return turns

    def _generate(self, ids, turns, said):
        """Stream an answer of which `said` (token ids) has been said before, and keep it."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        require_cache(self.model)
        self._stop.clear()
        stop = self._stop

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                return torch.full((len(input_ids),), stop.is_set(), dtype=torch.bool, device=input_ids.device)

        decode = thoughts.decoder(self.tokenizer)
        streamer = _streamer(decode)
        device = next(self.model.parameters()).device
        inputs = torch.tensor([ids + said], device=device)
        seed = None if self.seed is None else self.seed + self._answers
        failure = []

        def generate():
            try:
                with _seeded(seed, device):
                    self.model.generate(  # pyright: ignore[reportCallIssue]
                        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=self.max_new_tokens,
                        pad_token_id=_pad_id(self.tokenizer), streamer=streamer, stopping_criteria=StoppingCriteriaList([Stopped()]),
                        **self.sampling,
                    )  # fmt: skip
            except Exception as error:
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        pieces, stopped = [], True
        try:
            for piece in streamer:
                if piece:
                    pieces.append(piece)
                    yield piece
            stopped = stop.is_set()
        finally:
            stop.set()  # the caller left early: do not go on computing for nobody
            thread.join()
            if not failure:
                new = streamer.ids
                cut_off = stopped or len(new) >= self.max_new_tokens and new[-1] not in self._ends()
                self._keep(ids, turns, said + new, decode(said + new) or "".join(pieces), cut_off)
        if failure:
            raise failure[0]

    def _keep(self, ids, turns, said, text, cut_off):
        opened = thoughts.opening(thoughts.decoder(self.tokenizer)(ids[-64:]))
        self.thought, answer = thoughts.split(text, opened, thoughts.known(self.tokenizer))
        if answer:
            self.turns = [*turns, {"role": "assistant", "content": answer}]
            self._answers += 1
        self.cut_off = cut_off
        self._open = (ids, turns, said, list(self.turns)) if cut_off else None

    def _ends(self):
        """Ids that end an answer."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return ends if isinstance(ends, list) else [ends]


def _streamer(decode):
    """A streamer of the pieces of an answer that remembers their token ids."""
    from transformers import TextIteratorStreamer

    class Decoder:
        @staticmethod
        def decode(ids, **_):
            return decode(ids)

    class Streamer(TextIteratorStreamer):
        ids = []

        def put(self, value):
            if not self.next_tokens_are_prompt:
                self.ids = [*self.ids, *value.flatten().tolist()]
            super().put(value)

    return Streamer(Decoder, skip_prompt=True)  # pyright: ignore[reportArgumentType]


@contextmanager
def _seeded(seed, device):
    """Draws that `seed` decides, without touching the caller's; None leaves everything as it is."""
    if seed is None:
        yield
        return
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _pad_id(tokenizer):
    """Any id works for padding, because the mask hides it; models without one (Mistral, Llama) get their end token."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    end = tokenizer.eos_token_id
    return end[0] if isinstance(end, list) else end if end is not None else 0
