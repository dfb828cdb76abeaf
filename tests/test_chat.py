"""Chat templating and generation: one BOS, folded system messages, clear errors, history in whole turns, batches like alone."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers import chat

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


words = st.lists(st.sampled_from(["hello", "be", "brief", "there", "<s>", "</s>", "[INST]", "é", "{{ x }}", "<script>"]), min_size=1).map(" ".join)


@settings(deadline=None)
@given(with_system=st.booleans(), contents=st.lists(words, min_size=1, max_size=5))
def test_any_alternating_conversation_renders_with_its_bos_first(with_system, contents):
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]
    messages = [system(), *turns] if with_system else turns
    before = [dict(message) for message in messages]
    ids = chat.render(strict_tokenizer(), messages)
    assert ids[0] == 1 and ids[1] != 1
    assert messages == before, "the caller's conversation was changed"


def test_each_answer_of_a_batch_is_the_one_it_gets_alone(net, tokenizer):
    prompts = ["What is the capital of France?", "Hi!", "Explain in one sentence what a neural network does, please, and why."]
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
    assert chat.batch(net, tokenizer, ["What is the capital of France?"], max_new_tokens=12)[0].strip() == session.messages[1]["content"]


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
    session.turns = [turn for n in range(10) for turn in (user(f"question {n} " + "word " * 5), assistant(f"answer {n}"))]
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


def test_what_anybody_says_is_escaped(net, tokenizer, monkeypatch):
    html = chat.transcript_html([user("<script>alert(1)</script>"), assistant('<img src=x onerror="y">')])
    assert "<script>" not in html and "<img" not in html and "&lt;script&gt;" in html

    box = chat.ChatBox(chat.ChatSession(net, tokenizer, max_new_tokens=3))
    box.ask("<b>Hi</b>")
    assert "<b>Hi</b>" not in box.log.value and "&lt;b&gt;Hi&lt;/b&gt;" in box.log.value
    assert len(box.session.messages) == 2 and box.stop_button.disabled and not box.send_button.disabled
    monkeypatch.setenv("COURSE_BATCH", "1")
    assert set(box._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_the_pad_id_of_a_tokenizer_without_one_is_its_end_token():
    assert strict_tokenizer().pad_token_id is None and chat._pad_id(strict_tokenizer()) == 2
