"""Failures for lack of memory or disk, each with its repair."""

import shutil
import subprocess
import sys

import torch
from torch import nn

from helpers.diagnosis.reproductions.parts import has_dev_full, scratch, tiny_folder
from helpers.diagnosis.reproductions.registry import fails, listening, works


@fails("ram-exhausted")
def _():
    nn.Linear(2**24, 2**24)


@works("ram-exhausted")
def _():
    from transformers import LlamaConfig

    from helpers import memory

    return f"Llama-2-7B in 4 bits would take {memory.predict(LlamaConfig(), bits=4, group_size=64, scale_bits=32).total / 1e9:.1f} GB"


@fails("process-killed")
def _():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"  # what the system does to a process that takes too much
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


@works("process-killed")
def _():
    from helpers import memory

    return f"{memory.free_ram() / 1e9:.1f} GB are free for a model that is predicted to need less"


@fails("disk-full", only_if=has_dev_full)
def _():
    with open("/dev/full", "w") as file:
        file.write("a checkpoint")


@works("disk-full")
def _():
    folder = scratch()
    free = shutil.disk_usage(folder).free
    return f"{free / 1e9:.0f} GB free, asked before writing"


@fails("modules-on-cpu-or-disk")
def _():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(
        tiny_folder(), quantization_config=config, device_map="auto", max_memory={"cpu": 60_000}
    )


@works("modules-on-cpu-or-disk")
def _():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config, device = BitsAndBytesConfig(load_in_4bit=True), "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=config, device_map={"": device})
    return f"all of it on {model.device}, or a plain out-of-memory error"


@fails("spilled-to-disk")
def _():
    from transformers import AutoModelForCausalLM

    with listening() as heard:
        AutoModelForCausalLM.from_pretrained(tiny_folder(), device_map="auto", max_memory={"cpu": 100_000})
    return heard.about("offloaded")


@works("spilled-to-disk")
def _():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder(), device_map="auto")
    places = getattr(model, "hf_device_map", {"": str(model.device)})
    assert "disk" not in places.values(), places
    return f"all of it on {model.device}"
