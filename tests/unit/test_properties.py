"""Invariants of chat templating, records and memory prediction, tried on whatever hypothesis comes up with."""

import json
import math
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_chat import STRICT, strict_tokenizer
from test_records import arguments
from transformers import LlamaConfig

from helpers import chat, memory, models, records, widgets

# As SmolLM2's: takes a system message, and adds no BOS.
LENIENT = (
    "{% for m in messages %}<s> [INST] {{ m.role }} {{ m.content }} [/INST] {% endfor %}"
    "{% if add_generation_prompt %}[INST] assistant{% endif %}"
)
TEMPLATES = {"strict": STRICT, "lenient": LENIENT, "double": "{{ bos_token }} " + STRICT}
tokenizer = cache(lambda name: strict_tokenizer(TEMPLATES[name]))
each_template = st.sampled_from(sorted(TEMPLATES))

word = st.sampled_from(["hello", "be", "brief", "hi", "there"])
said = st.lists(word, min_size=1, max_size=6).map(" ".join)
anything = st.text().filter(str.strip)


def conversation(text=said):
    def build(system, contents):
        turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
        return [{"role": "system", "content": system}, *turns] if system else turns

    return st.builds(build, st.none() | text, st.lists(text, min_size=1, max_size=7))


# --- chat templating ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(each_template, conversation(anything))
def test_any_text_in_any_valid_conversation_renders_to_ids_of_the_vocabulary(name, messages):
    ids = chat.render(tokenizer(name), messages)
    assert ids and all(type(number) is int and 0 <= number < len(tokenizer(name)) for number in ids)
    assert chat.render(tokenizer(name), messages) == ids, "the second time differs"


@settings(deadline=None)
@given(each_template, conversation())
def test_no_words_are_lost_added_or_reordered(name, messages):
    plain = [word for message in messages for word in message["content"].split()]
    ids = chat.render(tokenizer(name), messages)
    spoken = [
        word for word in tokenizer(name).convert_ids_to_tokens(ids) if word in {"hello", "be", "brief", "hi", "there"}
    ]
    assert spoken == plain


@settings(deadline=None)
@given(each_template, conversation())
def test_the_prompt_never_begins_with_two_bos(name, messages):
    ids = chat.render(tokenizer(name), messages)
    assert ids[0] == 1 and ids[:2] != [1, 1]


@settings(deadline=None)
@given(each_template, conversation(), said)
def test_a_longer_conversation_begins_as_the_shorter_one_did(name, messages, more):
    assume(messages[-1]["role"] == "assistant")
    shorter = chat.render(tokenizer(name), messages, add_generation_prompt=False)
    longer = chat.render(tokenizer(name), [*messages, {"role": "user", "content": more}], add_generation_prompt=False)
    assert longer[: len(shorter)] == shorter and len(longer) > len(shorter)


@settings(deadline=None)
@given(conversation(anything))
def test_folding_keeps_every_text_and_makes_no_system_message(messages):
    folded = chat.fold_system(messages)
    assert [message["role"] for message in folded] == [("user", "assistant")[n % 2] for n in range(len(folded))]
    assert len(folded) == sum(message["role"] != "system" for message in messages)
    for message in messages:
        assert any(message["content"] in other["content"] for other in folded)
    assert chat.fold_system(folded) == folded, "folding twice changes something"


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
odd_message = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "system", "tool"]) | json_value, "content": json_value}
)


@settings(deadline=None)
@given(json_value | st.lists(odd_message, max_size=4))
def test_whatever_is_no_conversation_is_a_chat_error_and_nothing_else(messages):
    try:
        ids = chat.render(tokenizer("strict"), messages)
    except chat.ChatError as error:
        assert str(error).strip()
    else:
        assert ids[0] == 1 and messages[-1]["content"].strip()


class Untrained:
    """As much of a model as a session asks for before it generates."""

    config = type("Config", (), {"max_position_embeddings": 10_000})


@settings(deadline=None)
@given(
    each_template,
    st.none() | said,
    st.lists(said, max_size=12).filter(lambda turns: len(turns) % 2 == 0),
    said,
    st.integers(2, 120),
)
def test_a_session_within_budget_keeps_whole_newest_turns_and_the_system_message(name, system, history, text, budget):
    session = chat.ChatSession(Untrained(), tokenizer(name), system=system, max_new_tokens=1, token_budget=budget)
    session.turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(history)]
    before = list(session.turns)
    try:
        ids, turns = session.prompt(text)
    except chat.ChatError as error:
        assert "budget" in str(error)
        alone = [*session.system, {"role": "user", "content": text}]
        assert len(chat.render(tokenizer(name), alone)) + 1 > budget, "it would have fitted"
    else:
        everything = [*before, {"role": "user", "content": text}]
        assert len(ids) + 1 <= budget and turns == everything[len(everything) - len(turns) :] and len(turns) % 2 == 1
        if len(turns) < len(everything):
            more = everything[len(everything) - len(turns) - 2 :]
            assert len(chat.render(tokenizer(name), [*session.system, *more])) + 1 > budget, (
                "a turn that fits was dropped"
            )
    assert session.turns == before


@given(st.lists(st.fixed_dictionaries({"role": st.sampled_from(chat.ROLES), "content": st.text()}), max_size=4))
def test_a_transcript_has_only_our_own_elements_whatever_is_said(turns):
    import html
    import re

    page = widgets.transcript_html(turns)
    assert set(re.findall(r"<(/?\w+)", page)) <= {"div", "/div", "p", "/p", "b", "/b"}
    for turn in turns:
        assert turn["content"] in html.unescape(page)


# --- records --------------------------------------------------------------------------------------------------------------------

FOUND = models.Found("here", "tiny", "local folder", "cpu")
number = st.none() | st.floats(0, 1, allow_nan=False) | st.integers(0, 1)
numbers = st.fixed_dictionaries(
    dict.fromkeys(records.NUMBERS, number) | {"bits_per_weight": st.none() | st.floats(1, 32)}
)
method = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(method, numbers, min_size=1, max_size=4))
def test_what_is_written_is_what_is_read(written):
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: records.write(folder, method=name, notebook="04", found=FOUND, **arguments(values))
            for name, values in written.items()
        }
        assert records.read(folder) == made
        assert sorted(path.name for path in (Path(folder) / "records").iterdir()) == sorted(
            f"{name}.json" for name in written
        )


@settings(deadline=None, max_examples=50)
@given(
    numbers,
    st.sampled_from(records.NUMBERS),
    st.sampled_from([math.nan, math.inf, -math.inf, -1, "1", True, [1], {}, 1j]),
)
def test_one_wrong_value_among_right_ones_is_refused_by_name_and_the_old_record_stays(values, name, wrong):
    with tempfile.TemporaryDirectory() as folder:
        old = records.write(folder, method="nf4", notebook="04", found=FOUND, **arguments(values))
        with pytest.raises(records.RecordError, match=name):
            records.write(folder, method="nf4", notebook="04", found=FOUND, **arguments({**values, name: wrong}))
        assert records.read(folder) == {"nf4": old}


@settings(deadline=None, max_examples=100)
@given(numbers, st.data())
def test_a_file_cut_anywhere_is_refused_by_name_or_unharmed(values, data):
    with tempfile.TemporaryDirectory() as folder:
        record = records.write(folder, method="nf4", notebook="04", found=FOUND, **arguments(values))
        path = Path(folder) / "records" / "nf4.json"
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            assert records.read(folder) == {"nf4": record}
        except records.RecordError as error:
            assert "nf4.json" in str(error)


@given(st.binary(max_size=200))
def test_any_bytes_in_the_folder_of_records_are_a_record_error_not_a_crash(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "records").mkdir()
        (Path(folder) / "records" / "odd.json").write_bytes(content)
        with pytest.raises(records.RecordError):
            records.read(folder)


# --- memory prediction ----------------------------------------------------------------------------------------------------------

shapes = st.builds(
    lambda heads, share, width, layers, vocab, tied: LlamaConfig(
        vocab_size=vocab, hidden_size=heads * width, intermediate_size=2 * heads * width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // share, tie_word_embeddings=tied,
    ),
    st.sampled_from([2, 4, 8]), st.sampled_from([1, 2]), st.sampled_from([8, 16, 64]), st.integers(1, 3), st.integers(16, 2000), st.booleans(),
)  # fmt: skip
few = settings(deadline=None, max_examples=25)
quantized = st.integers(2, 8)


@few
@given(shapes, st.sampled_from([16, 32]), st.integers(0, 4096), st.integers(0, 8))
def test_an_unquantized_model_is_its_parameters_times_their_bits(config, bits, context, batch):
    found = memory.predict(config, bits=bits, rest_bits=bits, context=context, batch=batch)
    assert (
        found.model == found.parameters * bits // 8
        and found.scales == 0
        and found.bits_per_weight == pytest.approx(bits)
    )
    assert found.total == found.weights + found.scales + found.rest + found.kv_cache
    assert (
        found.kv_cache
        == 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context * batch * 2
    )


@few
@given(shapes, quantized, st.sampled_from([8, 16]))
def test_smaller_groups_and_longer_scales_never_need_less(config, bits, group):
    need = lambda **more: memory.predict(config, bits=bits, **more).model  # noqa: E731
    assert need(group_size=group) >= need(group_size=2 * group) >= need(group_size=4 * group)
    assert need(group_size=group, scale_bits=32) >= need(group_size=group, scale_bits=16)
    assert need(group_size=group, zero_bits=bits) >= need(group_size=group)
    assert need(group_size=group, scale_bits=32, double_quant=True) <= need(group_size=group, scale_bits=32)


@few
@given(shapes, quantized)
def test_a_quantized_model_lies_between_its_bits_and_16(config, bits):
    found = memory.predict(config, bits=bits)
    assert bits <= found.bits_per_weight <= 16.1 + 16 * found.scales / found.parameters
    assert found.rest == memory.predict(config).rest, "what is not quantized changed"


@few
@given(shapes, st.integers(1, 512), st.integers(1, 4))
def test_the_cache_is_proportional_to_tokens_and_sequences(config, context, batch):
    one = memory.predict(config, context=1).kv_cache
    assert memory.predict(config, context=context, batch=batch).kv_cache == one * context * batch
    assert memory.predict(config, context=context, batch=batch, cache_bits=8).kv_cache * 2 == one * context * batch


@few
@given(json_value | st.floats())
def test_any_other_number_of_bits_is_a_value_error(bits):
    assume(isinstance(bits, bool) or not (isinstance(bits, (int, float)) and (2 <= bits <= 8 or bits in (16, 32))))
    with pytest.raises(ValueError, match="bits must be"):
        memory.predict(
            LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1),
            bits=bits,
        )


@few
@given(shapes)
def test_the_prediction_is_plain_numbers_that_json_takes(config):
    found = vars(memory.predict(config, bits=4, group_size=8, context=10)) | {
        "notes": 0
    }  # the one field that holds words
    assert json.loads(json.dumps(found)) == found and all(type(value) is int and value >= 0 for value in found.values())
