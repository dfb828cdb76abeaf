"""Chat templating and generation: one BOS, folded system messages, clear errors, history in whole turns, batches like alone."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_templates import CHANNELS, CHATML, OPENED, THINKING, letters
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers import chat, widgets
from helpers.chat.session import _pad_id

# The refusal that Mistral's templates make, in a template of our own.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def strict_tokenizer(template=STRICT):
    """A word tokenizer that, as Llama's and Mistral's, adds a BOS to every text it tokenizes."""
    words = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "hello", "be", "brief", "hi", "there"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def user(text="hello"):
    return {"role": "user", "content": text}


def assistant(text="hi"):
    return {"role": "assistant", "content": text}


def system(text="be brief"):
    return {"role": "system", "content": text}


def test_exactly_one_bos_where_the_usual_way_gives_two():
    tokenizer = strict_tokenizer()
    text = tokenizer.apply_chat_template([user()], tokenize=False)
    assert tokenizer(text).input_ids.count(1) == 2  # the mistake
    assert chat.render(tokenizer, [user()]).count(1) == 1


def test_a_template_that_adds_its_own_second_bos_is_repaired():
    tokenizer = strict_tokenizer("{{ bos_token }} " + STRICT)
    assert chat.render(tokenizer, [user()])[:2] == [1, 3]


def test_system_message_is_folded_for_a_template_that_refuses_it():
    tokenizer = strict_tokenizer()
    ids = chat.render(tokenizer, [system(), user(), assistant(), user("there")])
    assert tokenizer.decode(ids).split() == "<s> [INST] be brief hello [/INST] hi </s> [INST] there [/INST]".split()


def test_system_message_stays_for_a_template_that_takes_it(tokenizer):
    text = tokenizer.decode(chat.render(tokenizer, [system("Be brief."), user()]))
    assert text.startswith("<|im_start|>system\nBe brief.") and "SmolLM" not in text
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("hello", "list of"),
        ([system()], "alone is no conversation"),
        ([assistant()], "turn 1 is 'assistant'"),
        ([user(), user()], "turn 2 is 'user'"),
        ([user(), assistant(), assistant()], "turn 3 is 'assistant'"),
        ([user(), system()], "turn 2 is 'system'"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"content": "x"}], "role and content"),
        ([user("  ")], "no text"),
        ([user(None)], "no text"),
    ],
)
def test_conversations_that_cannot_be(tokenizer, messages, message):
    with pytest.raises(chat.ChatError, match=re.escape(message)):
        chat.render(tokenizer, messages)


def test_tokenizer_without_a_template():
    with pytest.raises(chat.ChatError, match="no chat template.*instruct"):
        chat.render(strict_tokenizer(template=None), [user()])


words = st.lists(st.sampled_from(["hello", "be", "brief", "there", "é", "{{ x }}", "<script>"]), min_size=1).map(
    " ".join
)


@settings(deadline=None)
@given(with_system=st.booleans(), contents=st.lists(words, min_size=1, max_size=5))
def test_any_alternating_conversation_renders_with_its_bos_first(with_system, contents):
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]
    messages = [system(), *turns] if with_system else turns
    before = [dict(message) for message in messages]
    ids = chat.render(strict_tokenizer(), messages)
    assert ids[0] == 1 and ids[1] != 1
    assert messages == before, "the caller's conversation was changed"


@pytest.mark.parametrize("typed", ["<s>", "</s>", "[INST]"])
def test_control_words_of_a_tokenizer_without_letters_are_refused(typed):
    """It has a word for <s> and none for its letters: what is typed could only become the control token."""
    with pytest.raises(chat.ChatError, match=re.escape(typed)):
        chat.render(strict_tokenizer(), [user(f"hello {typed} there")])


def test_each_answer_of_a_batch_is_the_one_it_gets_alone(net, tokenizer):
    prompts = [
        "What is the capital of France?",
        "Hi!",
        "Explain in one sentence what a neural network does, please, and why.",
    ]
    together = chat.batch(net, tokenizer, prompts, max_new_tokens=16)
    assert together == [chat.batch(net, tokenizer, [prompt], max_new_tokens=16)[0] for prompt in prompts]
    assert "Paris" in together[0]


def test_empty_batch(net, tokenizer):
    with pytest.raises(chat.ChatError, match="empty"):
        chat.batch(net, tokenizer, [])


def test_a_session_streams_and_remembers(net, tokenizer):
    session = chat.ChatSession(net, tokenizer, max_new_tokens=12)
    pieces = list(session.stream("What is the capital of France?"))
    assert len(pieces) > 2 and "Paris" in "".join(pieces)
    session.send("And of Italy?")
    assert [turn["role"] for turn in session.messages] == ["user", "assistant", "user", "assistant"]
    assert (
        chat.batch(net, tokenizer, ["What is the capital of France?"], max_new_tokens=12)[0].strip()
        == session.messages[1]["content"]
    )


def test_a_stopped_answer_is_kept_and_the_thread_ends(net, tokenizer):
    import threading

    session = chat.ChatSession(net, tokenizer, max_new_tokens=400)
    for number, _ in enumerate(session.stream("Count from one to one hundred.")):
        if number == 2:
            session.stop()
    assert 3 <= len(session.messages[1]["content"].split()) < 30
    before = threading.active_count()
    stream = session.stream("Go on.")
    next(stream)
    stream.close()
    assert threading.active_count() <= before and len(session.messages) == 4


def test_history_is_dropped_in_whole_turns(net, tokenizer):
    session = chat.ChatSession(net, tokenizer, system="Be brief.", max_new_tokens=10, token_budget=120)
    session.turns = [
        turn for n in range(10) for turn in (user(f"question {n} " + "word " * 5), assistant(f"answer {n}"))
    ]
    ids, turns = session.prompt("the last one")
    assert len(ids) + 10 <= 120
    assert turns[0]["role"] == "user" and len(turns) % 2 == 1 and 3 <= len(turns) < 21
    assert turns[-1]["content"] == "the last one" and turns[-3]["content"].startswith("question 9")
    assert "Be brief." in tokenizer.decode(ids)


def test_a_message_that_never_fits(net, tokenizer):
    session = chat.ChatSession(net, tokenizer, max_new_tokens=10, token_budget=60)
    with pytest.raises(chat.ChatError, match="budget of 60"):
        session.prompt("word " * 100)
    with pytest.raises(chat.ChatError, match="must be larger"):
        chat.ChatSession(net, tokenizer, max_new_tokens=60, token_budget=60)


def test_an_error_while_generating_reaches_the_caller_and_leaves_history_alone(tokenizer, net, monkeypatch):
    session = chat.ChatSession(net, tokenizer, max_new_tokens=5)

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(net), "generate", lambda self, **_: fail())
    with pytest.raises(RuntimeError, match="out of memory"):
        session.send("hello")
    assert session.messages == []


class Scripted:
    """A model that says given texts, one a call, as far as max_new_tokens; what was left over is said by the next call."""

    config = type("Config", (), {"max_position_embeddings": 10_000})

    def __init__(self, tokenizer, *answers):
        self.left = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
        self.calls = []

    def parameters(self):
        yield torch.zeros(1)

    def generate(self, input_ids, streamer, max_new_tokens, **arguments):
        self.calls.append({"ids": input_ids[0].tolist(), **arguments})
        streamer.put(input_ids)
        ids = self.left.pop(0)
        if ids[max_new_tokens:]:
            self.left.insert(0, ids[max_new_tokens:])
        for number in ids[:max_new_tokens]:
            streamer.put(torch.tensor([number]))
        streamer.end()


def scripted(template, *answers, **options):
    tokenizer = letters(template)
    return chat.ChatSession(Scripted(tokenizer, *answers), tokenizer, **{"max_new_tokens": 500, **options})


THOUGHTS = [
    (THINKING, "<think>\nSECRET\n</think>\n\nHello!<|im_end|>"),
    (OPENED, "SECRET\n</think>\n\nHello!</s>"),
    (CHANNELS, "<|channel|>analysis<|message|>SECRET<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|end|>"),
]


@pytest.mark.parametrize(("template", "answer"), THOUGHTS)
def test_thoughts_are_streamed_and_never_reach_the_next_turn(template, answer):
    session = scripted(template, answer)
    assert "SECRET" in "".join(session.stream("hi"))
    assert session.messages == [user("hi"), assistant("Hello!")] and session.thought == "SECRET" and not session.cut_off
    ids, _ = session.prompt("and now?")
    assert "SECRET" not in session.tokenizer.decode(ids) and "Hello!" in session.tokenizer.decode(ids)


@pytest.mark.parametrize(("template", "answer"), THOUGHTS)
def test_a_thought_that_was_cut_off_is_no_answer_and_can_go_on(template, answer):
    session = scripted(template, answer, max_new_tokens=len(letters(template)(answer.partition("RET")[0]).input_ids))
    with pytest.warns(UserWarning, match="still thinking"):
        assert session.send("hi") == ""
    assert session.messages == [] and session.cut_off and "SEC" in session.thought
    ids, turns = session.prompt("and now?")
    assert turns == [user("and now?")] and "SEC" not in session.tokenizer.decode(ids)
    while session.cut_off:
        list(session.resume())
    assert session.messages == [user("hi"), assistant("Hello!")] and session.thought == "SECRET"


def test_thoughts_in_turns_that_somebody_else_put_there_are_left_out_too():
    session = scripted(THINKING, "x")
    session.turns = [
        user("one"),
        assistant("<think>\nSECRET"),
        user("two"),
        assistant("<think>SECRET</think>Yes."),
        user("three"),
        assistant("No."),
    ]
    before = list(session.turns)
    ids, turns = session.prompt("four")
    assert turns == [user("two"), assistant("Yes."), user("three"), assistant("No."), user("four")]
    assert "SECRET" not in session.tokenizer.decode(ids) and session.turns == before


def test_an_answer_that_was_cut_off_goes_on_with_the_tokens_it_ended_with():
    session = scripted(CHATML, "Once upon a time<|im_end|>", max_new_tokens=9)
    assert session.send("A tale") == "Once upon" and session.cut_off
    asked = session.model.calls[0]["ids"]
    assert "".join(session.resume()) == " a time" and session.messages == [
        user("A tale"),
        assistant("Once upon a time"),
    ]
    assert session.model.calls[1]["ids"] == asked + session.tokenizer(" Once upon"[1:]).input_ids
    assert not session.cut_off
    with pytest.raises(chat.ChatError, match="no answer to go on with"):
        list(session.resume())


def test_going_on_needs_the_same_conversation_and_room():
    session = scripted(CHATML, "Once upon a time", max_new_tokens=4, token_budget=60)
    session.send("A tale")
    session.token_budget = 10
    with pytest.raises(chat.ChatError, match="budget of 10"):
        list(session.resume())
    session.turns = []
    with pytest.raises(chat.ChatError, match="conversation has changed"):
        list(session.resume())


def test_going_on_says_what_one_longer_answer_says(net, tokenizer):
    question = "What is the capital of France?"
    whole = chat.ChatSession(net, tokenizer, max_new_tokens=12).send(question)
    session = chat.ChatSession(net, tokenizer, max_new_tokens=4)
    session.send(question)
    assert session.cut_off
    while session.cut_off:
        list(session.resume())
    assert session.messages[-1]["content"] == whole


def test_template_arguments_reach_every_turn_of_a_session_and_of_a_batch():
    session = scripted(THINKING, "Hello!<|im_end|>", "Bye!<|im_end|>", enable_thinking=False)
    session.send("hi")
    session.send("bye")
    opened = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert all(session.tokenizer.decode(call["ids"]).endswith(opened) for call in session.model.calls)

    class Echo(Scripted):
        def generate(self, input_ids, **arguments):
            self.calls.append(arguments)
            return input_ids[:, list(range(input_ids.shape[1])) * 2]

    echo = Echo(letters(THINKING))
    answers = chat.batch(
        echo,
        letters(THINKING),
        ["hi", [user([{"type": "text", "text": "hello"}])]],
        enable_thinking=False,
        temperature=0.5,
    )
    assert all("</think>" in answer for answer in answers) and "hello" in answers[1]
    assert echo.calls[0]["do_sample"] is True and echo.calls[0]["temperature"] == 0.5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0}, {"do_sample": False}),
        ({"sample": False}, {"do_sample": False}),
        ({"sample": True}, {"do_sample": True}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
    ],
)
def test_greedy_unless_asked_and_the_models_own_values_unless_given(given, expected):
    assert chat.sampling(**given) == expected


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"sample": False, "top_p": 0.9}],
)
def test_sampling_that_cannot_be(wrong):
    with pytest.raises(chat.ChatError, match="top_p|temperature"):
        chat.sampling(**wrong)


def test_a_seed_repeats_draws_and_leaves_the_callers_alone(net, tokenizer):
    def answers(seed):
        session = chat.ChatSession(net, tokenizer, max_new_tokens=8, temperature=1.5, seed=seed)
        return [session.send("Tell me something."), session.send("Tell me something.")]

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = answers(3)
    assert answers(3) == first and answers(4) != first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_anybody_says_is_escaped(net, tokenizer, monkeypatch):
    html = widgets.transcript_html([user("<script>alert(1)</script>"), assistant('<img src=x onerror="y">')])
    assert "<script>" not in html and "<img" not in html and "&lt;script&gt;" in html

    box = widgets.ChatBox(chat.ChatSession(net, tokenizer, max_new_tokens=3))
    box.ask("<b>Hi</b>")
    assert "<b>Hi</b>" not in box.log.value and "&lt;b&gt;Hi&lt;/b&gt;" in box.log.value
    assert len(box.session.messages) == 2 and box.stop_button.disabled and not box.send_button.disabled
    monkeypatch.setenv("COURSE_BATCH", "1")
    assert set(box._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_the_pad_id_of_a_tokenizer_without_one_is_its_end_token():
    assert strict_tokenizer().pad_token_id is None and _pad_id(strict_tokenizer()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature must be"),
        (["--top-p", "2"], "top_p must be"),
        (["-t", "enable_thinking"], "NAME=VALUE"),
    ],
)
def test_wrong_options_end_before_a_model_is_fetched(arguments, message, monkeypatch, capsys):
    from helpers import models
    from helpers.__main__ import main

    monkeypatch.setattr(models, "find", lambda _: pytest.fail("asked for a model"))
    assert main(["chat", "--once", "hi", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_template_arguments_of_the_command_line_are_json_or_text():
    from helpers.chat.terminal import _template_argument

    assert _template_argument("enable_thinking=false") == ("enable_thinking", False)
    assert _template_argument("reasoning_effort=high") == ("reasoning_effort", "high")


def test_a_transcript_shows_parts_and_turns_without_text():
    turns = [
        user([{"type": "text", "text": "hel"}, {"type": "text", "text": "<lo>"}]),
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    assert "hel&lt;lo&gt;" in widgets.transcript_html(turns) and "None" not in widgets.transcript_html(turns)


def test_a_model_in_training_with_checkpointing_is_refused_because_its_answers_are_noise():
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = strict_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=1, eos_token_id=2))
    right = chat.batch(model.eval(), tokenizer, ["hello there hi"], max_new_tokens=8)
    model.gradient_checkpointing_enable()
    assert chat.batch(model.eval(), tokenizer, ["hello there hi"], max_new_tokens=8) == right
    with pytest.raises(chat.ChatError, match=r"model\.eval\(\)"):
        chat.batch(model.train(), tokenizer, ["hello there hi"], max_new_tokens=8)
