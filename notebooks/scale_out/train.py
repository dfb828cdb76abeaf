"""QLoRA with one process, with several (DDP), or with the model sharded over several GPUs (FSDP).

The launcher decides which, not this file:

    python train.py --model MODEL --data DATA --output OUT
    accelerate launch --config_file ddp_cpu.yaml  train.py --model MODEL --data DATA --output OUT
    accelerate launch --config_file ddp_gpu.yaml  --num_processes N train.py ...
    accelerate launch --config_file fsdp_gpu.yaml --num_processes N train.py ...
    accelerate launch --config_file ddp_gpu.yaml  --num_processes 2 train.py --share_gpu ...    # one GPU: to compare, not to be faster

MODEL is a hub id or a folder, DATA a JSON-lines file with "question" and "answer". `--batch` counts examples in one step of all
processes together, so that the loss curve does not depend on their number.
"""

import argparse
import gc
import json
import os
import time
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--examples", type=int, default=8, help="how many lines of DATA to train on, from the top")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--share_gpu", action="store_true", help="all processes on the first GPU, talking through gloo")
    return parser.parse_args()


def examples(path, tokenizer, count, max_length):
    """The first `count` pairs in the chat template; labels only on the answers."""
    for number, line in zip(range(count), path.read_text(encoding="utf-8").splitlines()):
        pair = json.loads(line)
        question = [{"role": "user", "content": pair["question"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = tokenizer(prompt + pair["answer"] + tokenizer.eos_token, add_special_tokens=False).input_ids
        if len(ids) > max_length:
            raise ValueError(f"{path.name}, line {number + 1}: {len(ids)} tokens, more than --max_length {max_length}")
        yield {"input_ids": ids, "labels": [-100] * start + ids[start:]}


class InOrder(Trainer):
    """Takes the examples as they come, so that a run can be compared with another."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class FromSecondStep(TrainerCallback):
    """Count memory and time from the second step on: loading, sharding and compiling kernels take more than training."""

    seconds_per_step = None

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            self.started = time.perf_counter()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    def on_log(self, args, state, control, logs=None, **_):
        if state.global_step > 1 and "loss" in logs:  # it is a number by now, so the GPU has finished the step
            self.seconds_per_step = (time.perf_counter() - self.started) / (state.global_step - 1)


def main():
    args = arguments()
    set_seed(0)
    cuda, sharded = torch.cuda.is_available(), os.environ.get("ACCELERATE_USE_FSDP") == "true"
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count() if cuda else os.cpu_count()
    shared = cuda and args.share_gpu and here > 1
    if here > there and not shared:
        hint = "; --share_gpu puts them all on one" if cuda else ""
        raise SystemExit(f"{here} processes, but this machine has {there} {'GPUs' if cuda else 'cores'}{hint}")
    backend = "gloo" if shared else None  # NCCL refuses two processes on one GPU
    if shared:
        os.environ["LOCAL_RANK"] = "0"  # accelerate takes it for the number of the GPU
    state = PartialState(cpu=not cuda, backend=backend)
    if args.batch % state.num_processes:
        raise SystemExit(f"--batch {args.batch} cannot be split over {state.num_processes} processes")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dataset = list(examples(args.data, tokenizer, args.examples, args.max_length))

    # FSDP shards tensors of one dtype: 4-bit codes have to be stored as if they were the dtype of everything else.
    storage = torch.bfloat16 if sharded else torch.uint8
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        quantization_config=nf4,
        dtype=torch.bfloat16 if cuda else torch.float32,
        device_map=None if sharded else {"": state.device},
    )
    model.config.use_cache = False
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=not sharded)
    model.enable_input_require_grads()

    trainer = InOrder(
        model=model,
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[steady := FromSecondStep()],
        args=TrainingArguments(
            output_dir=str(args.output / "trainer"),
            use_cpu=not cuda,
            bf16=cuda,
            per_device_train_batch_size=args.batch // state.num_processes,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            activation_checkpointing=cuda,  # short rows: on a CPU it would only cost time
            activation_checkpointing_kwargs={"use_reentrant": False},
            ddp_backend=backend,
            ddp_find_unused_parameters=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    folder = args.output / "adapter"
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else None  # every process gives its shards
    if (
        state.is_main_process and sharded
    ):  # peft does not find its layers inside FSDP's, so the adapter is picked out by name
        folder.mkdir(parents=True, exist_ok=True)
        adapter = {
            name.replace(".default.", "."): tensor.contiguous() for name, tensor in weights.items() if "lora_" in name
        }
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        lora.save_pretrained(folder)
    elif state.is_main_process:
        model.save_pretrained(folder)
    if state.is_main_process:
        tokenizer.save_pretrained(folder)
        peak = torch.cuda.max_memory_allocated() if cuda else None
        report = {
            "processes": state.num_processes,
            "losses": losses,
            "peak_vram_bytes": peak,
            "seconds_per_step": steady.seconds_per_step,
        }
        (args.output / "losses.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    del trainer
    gc.collect()  # DDP has to be gone before its process group, or the process can hang at its end
    state.destroy_process_group()


if __name__ == "__main__":
    main()
