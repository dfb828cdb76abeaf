"""Guards for fine-tuning: each silent failure raises with its cause, and what is right passes."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from helpers import training

DATA = ROOT / "notebooks" / "data" / "quantization_qa.jsonl"
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tiny(**sizes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes))


def adapted(base=None, targets=("q_proj", "v_proj")):
    return get_peft_model(base or tiny(), LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM")).train()


def batch(labels=None):
    ids = torch.arange(3, 35)[None] % 128
    return {"input_ids": ids, "labels": ids if labels is None else labels}


def backward(model, **kwargs):
    model(**batch(**kwargs)).loss.backward()
    return model


def message(model):
    with pytest.raises(training.GradientError) as error:
        training.check_gradients(model)
    return str(error.value)


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    """A function that loads a tiny model in NF4, afresh each time."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return lambda: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )


@pytest.mark.integration
def test_importing_it_does_not_import_torch():
    code = "import sys, helpers.training; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_right_gradients_pass_and_a_waits_for_its_own_b_only():
    model = backward(adapted())
    assert training.check_gradients(model) == 8
    tensors = dict(model.named_parameters())
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    assert not tensors[name].grad.any(), "the first gradient of A is zero: that is the exception under test"
    with torch.no_grad():
        tensors[name.replace("lora_A", "lora_B")].fill_(0.1)  # now A has no excuse
    assert f"1 have a zero gradient (first: {name})" in message(model)


def test_zero_missing_and_broken_gradients_are_named():
    model = backward(adapted())
    first, second, third = [name for name in dict(model.named_parameters()) if "lora_B" in name][:3]
    tensors = dict(model.named_parameters())
    tensors[first].grad.zero_()
    tensors[second].grad = None
    tensors[third].grad[0] = float("inf")
    text = message(model)
    for name, kind in ((first, "zero gradient"), (second, "no gradient"), (third, "NaN or infinity")):
        assert re.search(
            rf"1 have an? [^;]*{kind}[^;]*{re.escape(name)}|1 have {kind} \(first: {re.escape(name)}", text
        ), text


def test_causes():
    assert "no backward pass yet" in message(adapted())
    assert "labels are all -100" in message(backward(adapted(), labels=torch.full((1, 32), -100)))
    assert "Nothing can be trained" in message(tiny().requires_grad_(False))
    model = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    for name, tensor in model.named_parameters():
        tensor.requires_grad_("lora_" in name)
    assert "an adapter that is not active" in message(backward(model))


def test_reentrant_checkpointing_without_input_gradients_is_caught():
    model = adapted()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    hook = getattr(model.base_model.model, "_require_grads_hook", None)
    if hook is not None:
        model.base_model.model.disable_input_require_grads()
    with pytest.warns(UserWarning, match="requires_grad=True"):
        loss = model(**batch()).loss
    if loss.requires_grad:
        loss.backward()
    assert "use_reentrant" in message(model)


def test_repacked_weights_are_the_named_cause():
    model = backward(adapted())
    for tensor in model.parameters():
        if tensor.grad is not None:
            tensor.grad.zero_()
    model.base_model.model.model.layers[0].self_attn.o_proj.weight.quant_state = SimpleNamespace(
        packing_format_for_cpu=True
    )
    assert training.repacked(model) == ["base_model.model.model.layers.0.self_attn.o_proj"]
    text = message(model)
    assert "4 have a zero gradient" in text and "repacked 1 4-bit weights" in text and "Load the model again" in text


@pytest.mark.integration
def test_training_after_inference_with_bitsandbytes(four_bit):
    """The failure the guard was written for, on the real library: fresh it passes, after one inference pass it stops."""
    assert training.check_gradients(backward(adapted(four_bit()))) == 8
    base = four_bit().eval()
    with torch.inference_mode():
        base(batch()["input_ids"])
    if not training.repacked(base):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack here")
    model = adapted(base)
    loss = model(**batch()).loss
    if loss.requires_grad:
        loss.backward()
    assert "repacked 14 4-bit weights" in message(model)


def trainer(model, folder, callbacks, labels=None):
    rows = [{"input_ids": batch()["input_ids"][0], "labels": batch(labels)["labels"][0]}] * 4
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)


@pytest.mark.integration
def test_callback_runs_once_and_stops_a_run_that_cannot_learn(tmp_path):
    check = training.gradient_check()
    run = trainer(adapted(), tmp_path, [check])
    assert run.train().global_step == 3 and check.checked == 8
    with pytest.raises(training.GradientError, match="labels are all -100"):
        trainer(adapted(), tmp_path, [training.gradient_check()], labels=torch.full((1, 32), -100)).train()


def test_target_modules():
    model = tiny()
    for right in (["q_proj", "v_proj"], ["self_attn.q_proj"], "all-linear", r".*\.(q|v)_proj"):
        assert training.check_targets(model, right) == right
    for wrong, word in (
        (["query"], "'query'"),
        (["q_proj", "value"], "'value'"),
        (["proj"], "'proj'"),
        (r".*\.wq", ".wq"),
        ([], "an empty list"),
    ):
        with pytest.raises(
            ValueError, match="down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
        ) as error:
            training.check_targets(model, wrong)
        assert word in str(error.value).replace("\\\\", "\\")


def test_broken_lines_are_named_and_nothing_else_is_lost(tmp_path):
    lines = DATA.read_bytes().splitlines()[:10]
    broken = {
        2: b'{"question": "half a line',
        5: b'{"question": "no answer"}',
        7: b'{"question": "\xff", "answer": "x"}',
        9: b'["a", "b"]',
    }
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(broken.get(n, line) for n, line in enumerate(lines)) + b"\n\n")
    pairs, problems = training.read_pairs(path)
    assert [pair["question"] for pair in pairs] == [
        json.loads(line)["question"] for n, line in enumerate(lines) if n not in broken
    ]
    assert [int(re.search(r"line (\d+)", text)[1]) for text in problems] == [n + 1 for n in broken]
    assert "'answer'" in problems[1] and "not UTF-8" in problems[2]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"{}\n{}"])
def test_a_file_without_pairs_is_an_error(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="pairs.jsonl holds no question/answer pair"):
        training.read_pairs(path)


def test_a_line_separator_inside_a_text_is_no_new_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "c"}\n', encoding="utf-8")
    assert training.read_pairs(path) == ([{"question": "a\u2028b", "answer": "c"}], [])


def test_the_shipped_instruction_set():
    pairs, problems = training.read_pairs(DATA)
    assert problems == []
    assert {frozenset(pair) for pair in pairs} == {frozenset(("question", "answer", "split"))}
    assert all(15 <= len(pair["answer"].split()) <= 60 for pair in pairs)
    assert len({pair["question"] for pair in pairs}) == len({pair["answer"] for pair in pairs}) == len(pairs)
    split = {
        name: [words(pair["question"]) for pair in pairs if pair["split"] == name] for name in ("train", "held-out")
    }
    assert split["held-out"] and sum(map(len, split.values())) == len(pairs)
    closest = max(len(a & b) / len(a | b) for a in split["held-out"] for b in split["train"])
    assert closest < 0.7, "a held-out question repeats one of the training questions"


def words(text):
    return set(re.findall(r"[a-z0-9]+", text.lower())) - set(
        "a an are can do does for how in is it of on the to what which why with".split()
    )


def test_only_a_complete_checkpoint_is_taken_up(tmp_path):
    assert training.last_checkpoint(tmp_path) is None
    for step, state in ((8, "{}"), (16, "{}"), (24, '{"half'), (32, None), (100, "")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert training.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")


def test_adapter_for_another_base(tmp_path):
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "tiny-64"
    model.save_pretrained(tmp_path / "a")
    training.check_adapter(tmp_path / "a", tiny(), "tiny-64")
    for base, name, expected in (
        (tiny(), "other", "trained on tiny-64, not on other"),
        (tiny(hidden_size=128), "tiny-64", "has in_features=64, that of tiny-64 has 128"),
        (tiny(num_hidden_layers=1), "tiny-64", r"no model.layers.1.self_attn.q_proj"),
    ):
        with pytest.raises(training.AdapterError, match=expected):
            training.check_adapter(tmp_path / "a", base, name)


@pytest.mark.parametrize("damage", ["no config", "broken config", "no weights", "short weights"])
def test_damaged_adapter(tmp_path, damage):
    adapted().save_pretrained(tmp_path / "a")
    config, weights = tmp_path / "a" / "adapter_config.json", tmp_path / "a" / "adapter_model.safetensors"
    {
        "no config": lambda: config.unlink(),
        "broken config": lambda: config.write_text("{"),
        "no weights": lambda: weights.unlink(),
        "short weights": lambda: weights.write_bytes(weights.read_bytes()[:-10]),
    }[damage]()
    with pytest.raises(training.AdapterError, match="holds no complete adapter"):
        training.check_adapter(tmp_path / "a", tiny(), "tiny-64")


def test_a_saved_adapter_comes_back(tmp_path):
    model = backward(adapted())
    torch.optim.SGD(model.parameters(), 0.5).step()
    model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(tiny(), tmp_path / "a")
    with torch.inference_mode():
        assert torch.equal(model.eval()(batch()["input_ids"]).logits, again.eval()(batch()["input_ids"]).logits)
