"""What the failures are made of: tiny models and tokenizers, a local hub, interpreters without packages."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from unittest.mock import MagicMock

    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

T = TypeVar("T")


@functools.cache
def _base():
    folder = tempfile.mkdtemp(prefix="reproductions-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def scratch() -> str:
    """A new empty folder, removed when Python ends."""
    return tempfile.mkdtemp(dir=_base())


def tiny_model(dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    """A Llama of two layers with random weights (110,000 parameters). config: further fields of its `LlamaConfig`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    return (
        LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, **config))
        .to(dtype)
        .eval()
    )


WORDS = "<s> </s> <unk> <pad> user assistant system [INST] [/INST] what is a four bit model hi the cat dog sat on mat sun is up down . ?"
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if message['role'] == 'user' %} [INST] {{ message['content'] }} [/INST]{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}
{% endfor %}"""  # the shape of Mistral-7B-Instruct v0.1's template, with its own message


def tiny_tokenizer(bos: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of 30 words. bos: put a BOS in front of every text, as Llama's and Mistral's tokenizers do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(WORDS.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    options = {"model_input_names": ["input_ids", "attention_mask"], **options}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    )


def tiny_folder(**changes: Any) -> Path:
    """A new folder with the tiny model, as `from_pretrained` takes it. changes: fields of its config.json to overwrite."""
    folder = Path(shutil.copytree(_saved(), scratch(), dirs_exist_ok=True))
    if changes:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@functools.cache
def _saved():
    folder = scratch()
    tiny_model(tie_word_embeddings=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_4bit(**settings: Any) -> PreTrainedModel:
    """The tiny model in NF4, as notebook 04 loads a real one. settings: further ones of its `BitsAndBytesConfig`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)
    return AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=config)


def lora(model: PreTrainedModel, **options: Any) -> PeftModel:
    """The model with a LoRA adapter on its query and value projections."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **options})
    )


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def tiny_gguf(template: str | None = CHATML) -> Path:
    """A new GGUF file with a Llama of one layer, random weights and a vocabulary of bytes, as llama.cpp takes it.

    template: its chat template, None for a file without one
    """
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = Path(scratch()) / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {"context_length": 512, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64,
                        "head_count": 2, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 32}.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    tokens = ["<|im_start|>", "<|im_end|>", *bytes_to_unicode().values()]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 256)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    if template:
        writer.add_chat_template(template)
    draw, width = np.random.default_rng(0), 64
    shapes = {
        "token_embd": (len(tokens), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
    }
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name, shape in (shapes | {f"blk.0.{part}": (width, width) for part in parts}).items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return path


IDS = torch.tensor([[3, 4, 5, 6]])
TOKEN = "hf_" + 34 * "x"  # what `hub` below takes for a good token


@contextlib.contextmanager
def hub() -> Iterator[str]:
    """A local server that answers requests as huggingface.co does; yields its address.

    someone/gated wants TOKEN; someone/open does not; behind/proxy answers with a web page; nothing else exists.
    """

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            token, content = self.headers.get("Authorization"), b'{"model_type": "llama"}'
            status, headers = 200, {"X-Repo-Commit": 40 * "a", "ETag": '"1"'}
            if self.path.startswith("/behind/"):
                headers, content = {"Content-Type": "text/html"}, b"<html>Please log in to this network.</html>"
            elif token not in (None, f"Bearer {TOKEN}"):
                status, headers = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
            elif self.path.startswith("/someone/gated/") and not token:
                status = 401
                headers = {
                    "X-Error-Code": "GatedRepo",
                    "X-Error-Message": "Access to model someone/gated is restricted. Please log in.",
                }
            elif not self.path.startswith("/someone/"):
                status, headers = 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def download(repository: str, endpoint: str, token: str | bool = False) -> str:
    """Fetch a repository's config.json, as every loader does first, and return the file's name.

    The local hub is asked also where HF_HUB_OFFLINE is set.
    """
    from unittest import mock

    from huggingface_hub import constants, hf_hub_download

    with mock.patch.object(constants, "HF_HUB_OFFLINE", False):
        return Path(
            hf_hub_download(repository, "config.json", endpoint=endpoint, token=token, cache_dir=scratch())
        ).name


def other_python(code: str) -> str:
    """What an interpreter that has none of this environment's packages prints: the wrong kernel, in short."""
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, cwd=scratch())
    return done.stderr + done.stdout


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this environment's pip without the settings of this machine."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=settings | {"PIP_CONFIG_FILE": os.devnull})


def hidden(where: str) -> contextlib.AbstractContextManager[MagicMock]:
    """Make one library believe in this block that a package is absent. where: the function that it asks, with its module."""
    from unittest import mock

    return mock.patch(where, return_value=False)


@contextlib.contextmanager
def forgotten(package: str) -> Iterator[None]:
    """Import a package afresh in this block, whatever was imported before."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == package}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(kept)


def run_as_cell(function: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run an async function as Jupyter runs a cell, inside an event loop; in a thread, since the caller may be such a cell."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(function())).result()


def no_gpu_here() -> str | None:
    """Why a failure that needs a machine without a GPU cannot happen here, or None."""
    return "this machine has a GPU" if torch.cuda.is_available() else None


def needs(package: str) -> str | None:
    """Why a failure inside a package cannot happen here, or None."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed here"


def has_dev_full() -> str | None:
    """Why a full disk cannot be shown here, or None."""
    return None if Path("/dev/full").is_char_device() else "this system has no /dev/full"
