"""QLoRA on a tiny model: killed in the middle of training and resumed, it ends where an uninterrupted run ends."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.process import child_environment

# As notebook 07 trains: NF4 base, LoRA with dropout, shuffled batches padded to their longest row, a checkpoint every few steps.
TRAIN = """
import json, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import (AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer,
                          TrainerCallback, TrainingArguments, set_seed)
from tokenizers import Tokenizer, models
from helpers import training

base, folder = sys.argv[1:]

class Say(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print("step", state.global_step, flush=True)

set_seed(0)
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
net = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"})
net = get_peft_model(net, LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"))
generator = torch.Generator().manual_seed(1)
rows = []
for length in torch.randint(16, 48, (40,), generator=generator).tolist():
    ids = [n * n % 97 + 1 for n in range(length)]
    rows.append({"input_ids": ids, "labels": [-100] * 5 + ids[5:]})
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"pad": 0}, unk_token="pad")), pad_token="pad")
arguments = TrainingArguments(
    folder, max_steps=16, per_device_train_batch_size=4, learning_rate=0.01, lr_scheduler_type="cosine", warmup_steps=2, logging_steps=1,
    save_steps=4, save_total_limit=2, report_to="none", use_cpu=True, seed=0, disable_tqdm=True, gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
)
trainer = Trainer(model=net, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer),
                  callbacks=[Say(), training.gradient_check()])
trainer.train(resume_from_checkpoint=training.last_checkpoint(folder))
net.save_pretrained(Path(folder) / "adapter")
losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
Path(folder, "losses.json").write_text(json.dumps(losses))
"""


def start(base, folder):
    environment = child_environment()
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(base), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return [int(line.split()[1]) for line in output.splitlines() if line.startswith("step ")]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
def test_killed_in_the_middle_and_resumed(base, tmp_path):
    from safetensors.torch import load_file

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(base, killed)
    for line in process.stdout:
        if line == "step 10\n":
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not (killed / "losses.json").exists()
    (killed / "checkpoint-12").mkdir(exist_ok=True)  # as if it had been killed a moment later, while it saved

    assert finish(start(base, killed)) == list(range(9, 17)), "it should go on after the last complete checkpoint"
    assert finish(start(base, whole)) == list(range(1, 17))

    losses = [json.loads(Path(folder, "losses.json").read_text()) for folder in (whole, killed)]
    assert losses[0]["1"] > 1.1 * losses[0]["16"], "nothing was learned, so the comparison would say nothing"
    assert abs(losses[0]["16"] - losses[1]["16"]) < 1e-3 and losses[0].keys() == losses[1].keys()
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, killed)]
    assert all((tensor - adapters[1][name]).abs().max() < 1e-4 for name, tensor in adapters[0].items())
