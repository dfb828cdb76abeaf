"""Failures in training, each with its repair."""

import contextlib

import torch
from torch import nn

from helpers.diagnosis.reproductions.parts import IDS, lora, no_gpu_here, scratch, tiny_4bit, tiny_model, tiny_tokenizer
from helpers.diagnosis.reproductions.registry import fails, listening, works


@fails("training-purely-quantized")
def _():
    from transformers import Trainer, TrainingArguments

    Trainer(tiny_4bit(), TrainingArguments(scratch(), use_cpu=True), train_dataset=[{"input_ids": [3], "labels": [3]}])


@works("training-purely-quantized")
def _():
    from transformers import Trainer, TrainingArguments

    model = lora(tiny_4bit())
    Trainer(model, TrainingArguments(scratch(), use_cpu=True), train_dataset=[{"input_ids": [3], "labels": [3]}])
    return f"trains {model.num_parameters(only_trainable=True):,} adapter weights"


@fails("nothing-requires-grad")
def _():
    model = tiny_model().requires_grad_(False)
    model(input_ids=IDS, labels=IDS).loss.backward()


@works("nothing-requires-grad")
def _():
    model = lora(tiny_model().requires_grad_(False))
    model(input_ids=IDS, labels=IDS).loss.backward()
    return f"{sum(p.grad is not None for p in model.parameters())} tensors have a gradient"


@fails("checkpointing-cuts-gradients")
def _():
    model = lora(tiny_model()).train()
    inner = model.get_base_model()
    inner.gradient_checkpointing_enable({"use_reentrant": True})
    inner.disable_input_require_grads()  # older versions never enabled it
    with listening() as heard, contextlib.suppress(RuntimeError):
        model(input_ids=IDS, labels=IDS).loss.backward()
    return heard.about("None of the inputs")


@works("checkpointing-cuts-gradients")
def _():
    model = lora(tiny_model()).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=IDS, labels=IDS).loss.backward()
    return f"{sum(p.grad is not None for p in model.parameters())} tensors have a gradient"


@fails("unscale-fp16-gradients")
def _():
    layer, scaler = nn.Linear(4, 4).half(), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler.scale(layer(torch.ones(1, 4).half()).sum()).backward()
    scaler.step(optimizer)


@works("unscale-fp16-gradients")
def _():
    layer, scaler = nn.Linear(4, 4), torch.amp.GradScaler("cpu")  # trainable weights stay in float32
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(torch.ones(1, 4)).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    return f"a step with {layer.weight.grad.dtype} gradients"


@fails("matrices-differ-in-dtype")
def _():
    nn.Linear(4, 4).half()(torch.ones(1, 4))


@works("matrices-differ-in-dtype")
def _():
    with torch.autocast("cpu", torch.bfloat16):
        return f"under autocast: {nn.Linear(4, 4).half()(torch.ones(1, 4)).dtype}"


@fails("target-modules")
def _():
    lora(tiny_model(), target_modules=["c_attn"])  # GPT-2's name


@works("target-modules")
def _():
    model = lora(tiny_model(), target_modules="all-linear")
    return f"{sum('lora_A' in name for name, _ in model.named_parameters())} layers have an adapter"


@fails("merge-into-4bit")
def _():
    with listening() as heard:
        lora(tiny_4bit()).merge_and_unload()
    return heard.about("Merge lora module")


@works("merge-into-4bit")
def _():
    from peft import PeftModel

    folder = scratch()
    lora(tiny_4bit()).save_pretrained(folder)
    with listening() as heard:
        model = PeftModel.from_pretrained(tiny_model(), folder).merge_and_unload()
    assert not heard.about("Merge lora module")
    return f"merged into {model.dtype} weights, to be quantized again"


@fails("adapter-twice")
def _():
    model = tiny_model()
    with listening() as heard:
        lora(lora(model).get_base_model())
    return heard.about("for a second time")


@works("adapter-twice")
def _():
    with listening() as heard:
        model = lora(lora(tiny_model()).unload())
    assert not heard.about("for a second time")
    return f"{sum('lora_A' in name for name, _ in model.named_parameters())} adapters, as after the first time"


@fails("training-argument-renamed")
def _():
    from transformers import TrainingArguments

    TrainingArguments(scratch(), evaluation_strategy="steps")


@works("training-argument-renamed")
def _():
    from transformers import TrainingArguments

    return f"eval_strategy {TrainingArguments(scratch(), eval_strategy='steps', eval_steps=1).eval_strategy.value}"


@fails("bf16-needs-a-gpu", only_if=no_gpu_here)
def _():
    from transformers import TrainingArguments

    TrainingArguments(scratch(), bf16=True)


@works("bf16-needs-a-gpu")
def _():
    from transformers import TrainingArguments

    return f"bf16 is {TrainingArguments(scratch(), bf16=True, use_cpu=True).bf16} with use_cpu=True"


@fails("rows-of-different-length")
def _():
    from torch.utils.data import DataLoader

    next(iter(DataLoader([torch.tensor([3, 4]), torch.tensor([3])], batch_size=2)))


@works("rows-of-different-length")
def _():
    from transformers import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(tiny_tokenizer(pad_token="<pad>"), mlm=False)
    return f"padded to {tuple(collate([{'input_ids': [3, 4]}, {'input_ids': [4]}])['input_ids'].shape)}, padding masked in the labels"


@fails("trainer-passes-more")
def _():
    from transformers import Trainer, TrainingArguments

    class CustomTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            return model(**inputs).loss

    rows = [{"input_ids": IDS[0], "labels": IDS[0]}]
    CustomTrainer(
        tiny_model(), TrainingArguments(scratch(), max_steps=1, use_cpu=True, report_to=[]), train_dataset=rows
    ).train()


@works("trainer-passes-more")
def _():
    from transformers import Trainer, TrainingArguments

    class CustomTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    rows = [{"input_ids": IDS[0], "labels": IDS[0]}]
    done = CustomTrainer(
        tiny_model(), TrainingArguments(scratch(), max_steps=1, use_cpu=True, report_to=[]), train_dataset=rows
    ).train()
    return f"{done.global_step} step, loss {done.training_loss:.2f}"


@fails("target-is-no-layer")
def _():
    lora(tiny_model(), target_modules=["self_attn"])


@works("target-is-no-layer")
def _():
    return f"{len(lora(tiny_model(), target_modules='all-linear').targeted_module_names)} Linear layers have adapters"
