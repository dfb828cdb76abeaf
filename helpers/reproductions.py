"""Failures of the catalogue, provoked for real and repaired, on random models of two layers: notebook 13 and the tests share them.

    text = provoke("load-in-4bit")     # runs the failure: the traceback, or what was printed where nothing is raised
    evidence = repair("load-in-4bit")  # runs the repair to its end and says what it gave
    source("load-in-4bit")             # the code of the failure, for a reader; source(entry_id, repaired=True) that of the repair

The message always comes from the library. Where a failure needs an absent package, a full disk or a hub that refuses, the function
makes exactly that (an interpreter without packages, /dev/full, a local server that answers as the hub does) and nothing else.
"""

import asyncio
import atexit
import contextlib
import functools
import http.server
import importlib.util
import inspect
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

transformers_logging.get_logger()  # its handler is made now: made inside `quiet` it would keep the wrong stream
LIBRARIES = ("transformers", "accelerate", "peft", "bitsandbytes")
FAILURES, REPAIRS, CONDITIONS = {}, {}, {}


class DidNotHappen(AssertionError):
    """A failure was provoked and did not come: the library has changed, and the catalogue is out of date."""


def fails(entry_id, only_if=None):
    """Register a failure. only_if: a function that gives a reason (text) where it cannot happen on this machine, else None."""

    def register(function):
        FAILURES[entry_id] = function
        if only_if:
            CONDITIONS[entry_id] = only_if
        return function

    return register


def works(entry_id):
    """Register the repair: it must run to its end, and returns what it gave in a few words."""

    def register(function):
        REPAIRS[entry_id] = function
        return function

    return register


def why_not(entry_id):
    """Why a failure cannot be provoked on this machine, or None."""
    return CONDITIONS[entry_id]() if entry_id in CONDITIONS else None


def provoke(entry_id):
    """Run a failure; what its reader sees. Raises DidNotHappen if nothing goes wrong."""
    from helpers import explain

    with quiet():
        try:
            said = FAILURES[entry_id]()
        except Exception as error:
            return explain.as_text(error)
    if not said:
        raise DidNotHappen(f"{entry_id} neither raised nor printed anything: {sys.version.split()[0]}, torch {torch.__version__}")
    return said


def repair(entry_id):
    """Run a repair; what it gave, in words."""
    with quiet():
        return REPAIRS[entry_id]()


def source(entry_id, repaired=False):
    """The body of a failure or of its repair, as a reader would write it."""
    lines = inspect.getsource((REPAIRS if repaired else FAILURES)[entry_id]).splitlines()
    body = lines[next(n for n, line in enumerate(lines) if line.startswith("def ")) + 1 :]
    return textwrap.dedent("\n".join(body))


# --- what the failures are made of ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet():
    """No progress bars, banners, log lines and warnings from the libraries: what a failure says is in its text."""
    handlers = {logging.getLogger(name): logging.getLogger(name).handlers for name in LIBRARIES}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in handlers:
                logger.handlers = [logging.NullHandler()]
            yield
        finally:
            for logger, before in handlers.items():
                logger.handlers = before


class Heard(list):
    """What libraries said while `listening`: warnings and log records, in the form they have on a screen."""

    def about(self, word):
        return "\n".join(line for line in self if word in line)


@contextlib.contextmanager
def listening():
    """Collect the warnings and log messages of a block: a library that fails without raising often mumbles."""
    transformers_logging.warning_once.cache_clear()  # it says some things once per process only
    heard = Heard()

    class Ear(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    ear = Ear(logging.WARNING)
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
        heard += [f"{Path(w.filename).name}:{w.lineno}: {w.category.__name__}: {w.message}" for w in caught]
    finally:
        for name in LIBRARIES:
            logging.getLogger(name).removeHandler(ear)


@functools.cache
def _base():
    folder = tempfile.mkdtemp(prefix="reproductions-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def scratch():
    """A new empty folder, removed when Python ends."""
    return tempfile.mkdtemp(dir=_base())


def tiny_model(dtype=torch.float32, **config):
    """A Llama of two layers with random weights (110,000 parameters)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, **config)).to(dtype).eval()


WORDS = "<s> </s> <unk> <pad> user assistant system [INST] [/INST] what is a four bit model hi the cat dog sat on mat sun is up down . ?"
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if message['role'] == 'user' %} [INST] {{ message['content'] }} [/INST]{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}
{% endfor %}"""  # the shape of Mistral-7B-Instruct v0.1's template, with its own message


def tiny_tokenizer(bos=False, **options):
    """A tokenizer of 30 words. bos: put a BOS in front of every text, as Llama's and Mistral's tokenizers do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(WORDS.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    options = {"model_input_names": ["input_ids", "attention_mask"], **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)


def tiny_folder(**changes):
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


def tiny_4bit(**settings):
    """The tiny model in NF4, as notebook 04 loads a real one."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)
    return AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=config)


def lora(model, **options):
    """The model with a LoRA adapter on its query and value projections."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **options}))


IDS = torch.tensor([[3, 4, 5, 6]])
TOKEN = "hf_" + 34 * "x"  # what `hub` below takes for a good token


@contextlib.contextmanager
def hub():
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
                headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model someone/gated is restricted. Please log in."}
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


def download(repository, endpoint, token=False):
    """One file of a repository, as every loader fetches it first; the local hub is asked also where HF_HUB_OFFLINE is set."""
    from unittest import mock

    from huggingface_hub import constants, hf_hub_download

    with mock.patch.object(constants, "HF_HUB_OFFLINE", False):
        return Path(hf_hub_download(repository, "config.json", endpoint=endpoint, token=token, cache_dir=scratch())).name


def other_python(code):
    """What an interpreter that has none of this environment's packages prints: the wrong kernel, in short."""
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, cwd=scratch())
    return done.stderr + done.stdout


def pip(*arguments):
    """This environment's pip, without the settings of this machine."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=settings | {"PIP_CONFIG_FILE": os.devnull})


def hidden(where):
    """Make one library believe that a package is absent."""
    from unittest import mock

    return mock.patch(where, return_value=False)


@contextlib.contextmanager
def forgotten(package):
    """Import a package afresh in this block, whatever was imported before."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == package}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(kept)


def run_as_cell(function):
    """Run an async function as Jupyter runs a cell, inside an event loop; in a thread, since the caller may be such a cell."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(function())).result()


def no_gpu_here():
    return "this machine has a GPU" if torch.cuda.is_available() else None


def needs(package):
    return None if importlib.util.find_spec(package) else f"{package} is not installed here"


def has_dev_full():
    return None if Path("/dev/full").is_char_device() else "this system has no /dev/full"


# --- install --------------------------------------------------------------------------------------------------------------------


@fails("package-missing")
def _():
    return other_python("import bitsandbytes")


@works("package-missing")
def _():
    subprocess.run([sys.executable, "-c", "import importlib.util as u; assert u.find_spec('bitsandbytes')"], check=True)
    return "this kernel's own Python finds it"


@fails("own-module-missing")
def _():
    return other_python("from utils import read_rows")


@works("own-module-missing")
def _():
    folder = Path(scratch())
    (folder / "utils.py").write_text("rows = 3\n")
    return other_python(f"import sys; sys.path.insert(0, {str(folder)!r}); import utils; print(utils.rows, 'rows')").strip()


@fails("helpers-missing")
def _():
    return other_python("from helpers import models")


@works("helpers-missing")
def _():
    course = Path(__file__).resolve().parent.parent
    other_python_with_path = f"import sys; sys.path.insert(0, {str(course)!r}); import helpers; print(helpers.__version__)"
    return "helpers " + other_python(other_python_with_path).strip()


@fails("bitsandbytes-missing")
def _():
    with hidden("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available"):
        tiny_4bit()


@works("bitsandbytes-missing")
def _():
    model = tiny_4bit()
    return f"loads: {type(model.model.layers[0].mlp.up_proj).__name__} layers"


@fails("optimum-missing")
def _():
    from transformers import AutoModelForCausalLM, GPTQConfig

    with hidden("transformers.quantizers.quantizer_gptq.is_optimum_available"):
        AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=GPTQConfig(bits=4))


@works("optimum-missing")
def _():
    from importlib.metadata import version

    return f"optimum {version('optimum')} is there"


@fails("pip-finds-no-version")
def _():
    return pip("download", "--no-index", "--dest", scratch(), "torch==2.1.0").stderr


@works("pip-finds-no-version")
def _():
    from importlib.metadata import version

    pip("install", "--no-index", "--dry-run", f"torch=={version('torch')}").check_returncode()
    return f"torch {version('torch')} satisfies pip"


@fails("pip-conflict")
def _():
    return pip("install", "--no-index", "--dry-run", "numpy>=2", "numpy<2").stderr


@works("pip-conflict")
def _():
    pip("install", "--no-index", "--dry-run", "numpy>=2").check_returncode()
    return "one requirement, satisfied"


@fails("auto-gptq-import", only_if=lambda: needs("auto_gptq"))
def _():
    with forgotten("auto_gptq"):
        from auto_gptq import AutoGPTQForCausalLM  # noqa: F401


@works("auto-gptq-import")
def _():
    from helpers import archived

    with forgotten("auto_gptq"), archived.enable("auto-gptq") as repair:
        from auto_gptq import AutoGPTQForCausalLM

        return f"{AutoGPTQForCausalLM.__name__} imports with {len(repair.applied)} patches"


@fails("torch-without-cuda", only_if=no_gpu_here)
def _():
    tiny_model().to("cuda")


@works("torch-without-cuda")
def _():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"runs on: {tiny_model().to(device).device}"


@fails("no-quantized-engine")
def _():
    torch.backends.quantized.engine = "none"  # what Apple's builds of torch start with


@works("no-quantized-engine")
def _():
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    return f"engine {torch.backends.quantized.engine}, of {torch.backends.quantized.supported_engines}"


@fails("module-removed")
def _():
    import transformers.deepspeed  # noqa: F401 - transformers.integrations.deepspeed since 4.33


@works("module-removed")
def _():
    from transformers.integrations import deepspeed

    return f"it is {deepspeed.__name__} now"


@fails("torchao-functions-removed")
def _():
    from torchao.quantization import int4_weight_only  # noqa: F401


@works("torchao-functions-removed")
def _():
    from torchao.quantization import Int4WeightOnlyConfig

    return f"{Int4WeightOnlyConfig.__name__} imports"


@fails("bitsandbytes-config-elsewhere")
def _():
    from bitsandbytes import BitsAndBytesConfig  # noqa: F401


@works("bitsandbytes-config-elsewhere")
def _():
    from transformers import BitsAndBytesConfig

    return f"{BitsAndBytesConfig.__name__} imports from {BitsAndBytesConfig.__module__.partition('.')[0]}"


@fails("name-removed")
def _():
    from huggingface_hub import cached_download  # noqa: F401


@works("name-removed")
def _():
    from huggingface_hub import hf_hub_download

    return f"its successor is {hf_hub_download.__name__}"


@fails("dependency-check")
def _():
    from transformers.utils.versions import require_version_core

    require_version_core("huggingface-hub<1.0")  # what transformers 4 asks for when it is imported


@works("dependency-check")
def _():
    from transformers.utils.versions import require_version_core

    require_version_core("huggingface-hub>=1.0")
    return "the installed huggingface-hub is one that this transformers asks for"


# --- load -----------------------------------------------------------------------------------------------------------------------


@fails("load-in-4bit")
def _():
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_folder(), load_in_4bit=True)


@works("load-in-4bit")
def _():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=config)
    return f"loads: {type(model.model.layers[0].mlp.up_proj).__name__} layers"


@fails("cast-quantized")
def _():
    tiny_4bit().to(torch.float16)


@works("cast-quantized")
def _():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=config, dtype=torch.float16)
    return f"norms are {model.model.norm.weight.dtype}, the layers compute in {model.model.layers[0].mlp.up_proj.compute_dtype}"


@fails("move-8bit")
def _():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=BitsAndBytesConfig(load_in_8bit=True)).cuda()


@works("move-8bit")
def _():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config, device = BitsAndBytesConfig(load_in_8bit=True), "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=config, device_map={"": device})
    return f"loaded onto {model.device}"


@fails("four-and-eight-bit")
def _():
    from transformers import BitsAndBytesConfig

    BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True)


@works("four-and-eight-bit")
def _():
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True)
    return f"load_in_4bit {config.load_in_4bit}, load_in_8bit {config.load_in_8bit}"


@fails("dtype-name")
def _():
    from transformers import BitsAndBytesConfig

    BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bf16")


@works("dtype-name")
def _():
    from transformers import BitsAndBytesConfig

    return str(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16").bnb_4bit_compute_dtype)


@fails("quant-type-name")
def _():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4")
    AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=config)


@works("quant-type-name")
def _():
    return f"quant_type {tiny_4bit().config.quantization_config.bnb_4bit_quant_type} loads"


@fails("two-quantization-configs")
def _():
    from transformers import AutoModelForCausalLM, GPTQConfig

    folder = scratch()
    tiny_4bit().save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=GPTQConfig(bits=4))


@works("two-quantization-configs")
def _():
    from transformers import AutoModelForCausalLM

    folder = scratch()
    tiny_4bit().save_pretrained(folder)
    return f"quantized by {AutoModelForCausalLM.from_pretrained(folder).config.quantization_config.quant_method.value}, from its own config"


@fails("awq-on-plain-weights")
def _():
    from transformers import AutoModelForCausalLM, AwqConfig

    AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=AwqConfig(bits=4))


@works("awq-on-plain-weights")
def _():
    return f"quantized while loading: {tiny_4bit().config.quantization_config.quant_method.value}"


@fails("torchao-config-as-text")
def _():
    from transformers import TorchAoConfig

    TorchAoConfig("int8_weight_only")


@works("torchao-config-as-text")
def _():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    return f"weights are {type(model.model.layers[0].mlp.up_proj.weight).__name__}"


@fails("remote-code")
def _():
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@works("remote-code")
def _():
    from transformers import AutoModelForCausalLM

    return f"an architecture that transformers has: {type(AutoModelForCausalLM.from_pretrained(tiny_folder())).__name__}"


@fails("remote-code-wants-packages")
def _():
    from transformers.dynamic_module_utils import check_imports

    file = Path(scratch()) / "modeling_mine.py"
    file.write_text("import a_package_that_nobody_has\n")
    check_imports(file)


@works("remote-code-wants-packages")
def _():
    from transformers.dynamic_module_utils import check_imports

    file = Path(scratch()) / "modeling_mine.py"
    file.write_text("import torch\n")
    return f"{len(check_imports(file))} files beside it; all packages are there"


@fails("unknown-architecture")
def _():
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_folder(model_type="llama99"))


@works("unknown-architecture")
def _():
    from transformers import AutoModelForCausalLM

    return f"model_type llama is known: {type(AutoModelForCausalLM.from_pretrained(tiny_folder(model_type='llama'))).__name__}"


@fails("folder-without-config")
def _():
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(scratch())


@works("folder-without-config")
def _():
    from transformers import AutoModelForCausalLM

    folder = tiny_folder()
    AutoModelForCausalLM.from_pretrained(folder)
    return "loads; the folder holds " + ", ".join(sorted(path.name for path in folder.iterdir()))


@fails("folder-without-weights")
def _():
    from transformers import AutoModelForCausalLM

    folder = tiny_folder()
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folder)


@works("folder-without-weights")
def _():
    from transformers import AutoModelForCausalLM

    folder = tiny_folder()
    (folder / "model.safetensors").unlink()
    tiny_model(tie_word_embeddings=True).save_pretrained(folder)
    return f"{AutoModelForCausalLM.from_pretrained(folder).num_parameters():,} parameters"


@fails("folder-that-is-not-there")
def _():
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained("./no/such/folder")


@works("folder-that-is-not-there")
def _():
    from transformers import AutoModelForCausalLM

    folder = tiny_folder()
    assert (folder / "config.json").is_file(), "print Path(...).resolve() and look"
    return f"{type(AutoModelForCausalLM.from_pretrained(folder)).__name__} loads"


@fails("damaged-safetensors")
def _():
    from transformers import AutoModelForCausalLM

    weights = tiny_folder() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])  # a download that was cut off
    AutoModelForCausalLM.from_pretrained(weights.parent)


@works("damaged-safetensors")
def _():
    from transformers import AutoModelForCausalLM

    from helpers import models

    folder = tiny_folder()  # downloaded again
    models.check_folder(folder)
    return f"length and header agree; {AutoModelForCausalLM.from_pretrained(folder).num_parameters():,} parameters"


@fails("pickle-refused")
def _():
    file = Path(scratch()) / "model.pt"
    torch.save({"layer": nn.Linear(2, 2)}, file)
    torch.load(file)


@works("pickle-refused")
def _():
    file = Path(scratch()) / "model.pt"
    torch.save(nn.Linear(2, 2).state_dict(), file)
    return f"tensors only: {', '.join(torch.load(file, weights_only=True))}"


@fails("sizes-do-not-match")
def _():
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_folder(vocab_size=70))


@works("sizes-do-not-match")
def _():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder())
    model.resize_token_embeddings(70, mean_resizing=False)
    return f"embeddings {tuple(model.get_input_embeddings().weight.shape)}, grown after loading"


@fails("weights-made-up")
def _():
    from transformers import AutoModelForCausalLM

    with listening() as heard:
        AutoModelForCausalLM.from_pretrained(tiny_folder(num_hidden_layers=3))
    return heard.about("newly initialized")


@works("weights-made-up")
def _():
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(tiny_folder(), output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    return "output_loading_info says that no weight is missing"


@fails("meta-tensor")
def _():
    with torch.device("meta"):
        model = tiny_model()
    model.to("cpu")


@works("meta-tensor")
def _():
    from transformers import AutoModelForCausalLM

    devices = {str(p.device) for p in AutoModelForCausalLM.from_pretrained(tiny_folder()).parameters()}
    return f"weights are on {devices}"


@fails("hub-offline")
def _():
    from transformers import AutoConfig

    AutoConfig.from_pretrained("someone/model", local_files_only=True, cache_dir=scratch())


@works("hub-offline")
def _():
    from transformers import AutoModelForCausalLM

    return f"{type(AutoModelForCausalLM.from_pretrained(tiny_folder(), local_files_only=True)).__name__} loads from a folder"


@fails("gated-model")
def _():
    with hub() as endpoint:
        download("someone/gated", endpoint)


@works("gated-model")
def _():
    with hub() as endpoint:
        return f"{download('someone/gated', endpoint, token=TOKEN)} is downloaded"


@fails("bad-token")
def _():
    with hub() as endpoint:
        download("someone/open", endpoint, token="hf_" + 34 * "z")


@works("bad-token")
def _():
    with hub() as endpoint:
        return f"{download('someone/open', endpoint, token=False)} is downloaded without a token: this model is open"


@fails("token-with-newline")
def _():
    with hub() as endpoint:
        download("someone/open", endpoint, token=TOKEN + "\n")


@works("token-with-newline")
def _():
    with hub() as endpoint:
        return f"{download('someone/open', endpoint, token=(TOKEN + chr(10)).strip())} is downloaded"


@fails("no-such-model")
def _():
    with hub() as endpoint:
        download("no-one/model", endpoint)


@works("no-such-model")
def _():
    with hub() as endpoint:
        return f"{download('someone/open', endpoint)} is downloaded"


@fails("not-the-hub")
def _():
    with hub() as endpoint:
        download("behind/proxy", endpoint)


@works("not-the-hub")
def _():
    with hub() as endpoint:
        return f"{download('someone/open', endpoint)} is downloaded"


@fails("quantization-type-unknown")
def _():
    from transformers.quantizers.auto import AutoQuantizationConfig

    AutoQuantizationConfig.from_dict({"quant_method": "fp99"})  # a format of tomorrow


@works("quantization-type-unknown")
def _():
    from transformers import AutoModelForCausalLM

    return f"the 16-bit copy loads: {type(AutoModelForCausalLM.from_pretrained(tiny_folder())).__name__}"


@fails("tokenizer-json-newer")
def _():
    from tokenizers import Tokenizer

    data = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    Tokenizer.from_str(json.dumps(data | {"model": {"type": "Tomorrow", "vocab": {}}}))


@works("tokenizer-json-newer")
def _():
    from tokenizers import Tokenizer

    return f"{Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()).get_vocab_size()} words, of a model that this version knows"


@fails("wrong-auto-class")
def _():
    from transformers import AutoModelForCausalLM, T5Config

    AutoModelForCausalLM.from_config(T5Config())


@works("wrong-auto-class")
def _():
    from transformers import AutoModelForSeq2SeqLM, T5Config

    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return type(AutoModelForSeq2SeqLM.from_config(config)).__name__


# --- memory ---------------------------------------------------------------------------------------------------------------------


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
    AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=config, device_map="auto", max_memory={"cpu": 60_000})


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


# --- generate -------------------------------------------------------------------------------------------------------------------


@fails("no-padding-token")
def _():
    tiny_tokenizer()(["hi", "the cat sat"], padding=True)


@works("no-padding-token")
def _():
    tokenizer = tiny_tokenizer(padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token  # for generation; training wants a token of its own
    return str(tokenizer(["hi", "the cat sat"], padding=True).input_ids)


@fails("lengths-differ")
def _():
    tiny_tokenizer(pad_token="<pad>")(["hi", "the cat sat"], return_tensors="pt")


@works("lengths-differ")
def _():
    batch = tiny_tokenizer(pad_token="<pad>", padding_side="left")(["hi", "the cat sat"], return_tensors="pt", padding=True)
    return f"a tensor of {tuple(batch.input_ids.shape)}"


@fails("no-chat-template")
def _():
    tiny_tokenizer().apply_chat_template([{"role": "user", "content": "hi"}])


@works("no-chat-template")
def _():
    tokenizer = tiny_tokenizer(chat_template=MISTRAL)
    return repr(tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).replace("\n", ""))


@fails("roles-must-alternate")
def _():
    conversation = [{"role": "system", "content": "is"}, {"role": "user", "content": "hi"}]
    tiny_tokenizer(chat_template=MISTRAL).apply_chat_template(conversation)


@works("roles-must-alternate")
def _():
    from helpers import chat

    conversation = [{"role": "system", "content": "is"}, {"role": "user", "content": "hi"}]
    tokenizer = tiny_tokenizer(chat_template=MISTRAL)
    return repr(tokenizer.decode(chat.render(tokenizer, conversation)))


@fails("batch-encoding-as-ids")
def _():
    tokenizer = tiny_tokenizer(chat_template=MISTRAL)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt")
    tiny_model().generate(prompt, max_new_tokens=2)


@works("batch-encoding-as-ids")
def _():
    tokenizer = tiny_tokenizer(chat_template=MISTRAL)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt")
    return f"{tiny_model().generate(**prompt, max_new_tokens=2, pad_token_id=3).shape[1]} tokens"


@fails("different-devices")
def _():
    model = tiny_model()
    model.model.layers[1].to("cuda" if torch.cuda.is_available() else "meta")  # shapes without data: every machine's second device
    model(IDS)


@works("different-devices")
def _():
    model = tiny_model().to("cuda" if torch.cuda.is_available() else "cpu")
    return f"both on the {model(IDS.to(model.device)).logits.device.type}"


@fails("unused-model-kwargs")
def _():
    tiny_model().generate(IDS, max_new_tokens=2, temperatur=0.7)


@works("unused-model-kwargs")
def _():
    return f"{tiny_model().generate(IDS, max_new_tokens=2, do_sample=True, temperature=0.7, pad_token_id=3).shape[1]} tokens"


@fails("prompt-longer-than-max-length")
def _():
    tiny_model().generate(IDS, max_length=3)


@works("prompt-longer-than-max-length")
def _():
    return f"{tiny_model().generate(IDS, max_new_tokens=3, min_new_tokens=3, pad_token_id=3).shape[1]} tokens: 4 of the prompt, 3 new"


@fails("beyond-the-context")
def _():
    with listening() as heard:
        tiny_model().generate(IDS.repeat(1, 16), max_new_tokens=4, min_new_tokens=4)
    return heard.about("predefined maximum length")


@works("beyond-the-context")
def _():
    model = tiny_model()
    room = model.config.max_position_embeddings - 8
    return f"the last {room} tokens of the prompt and 8 new ones: {model.generate(IDS.repeat(1, 16)[:, -room:], max_new_tokens=8).shape[1]}"


@fails("probabilities-not-finite")
def _():
    model = tiny_model()
    model.lm_head.weight.data[0] = float("inf")  # float16 ends at 65,504: a large activation is enough
    model.generate(IDS, max_new_tokens=2, do_sample=True)


@works("probabilities-not-finite")
def _():
    logits = tiny_model(torch.bfloat16)(IDS).logits
    assert logits.isfinite().all()
    return f"bfloat16 reaches {torch.finfo(torch.bfloat16).max:.0e}; every logit is finite"


@fails("token-id-outside")
def _():
    tiny_model()(torch.tensor([[3, 64]]))


@works("token-id-outside")
def _():
    model = tiny_model()
    model.resize_token_embeddings(65, mean_resizing=False)
    return f"logits {tuple(model(torch.tensor([[3, 64]])).logits.shape)}"


@fails("quantized-cache-backend")
def _():
    with hidden("transformers.cache_utils.is_optimum_quanto_available"):
        tiny_model().generate(IDS, max_new_tokens=2, cache_implementation="quantized")


@works("quantized-cache-backend")
def _():
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    return f"{tiny_model().generate(IDS, max_new_tokens=2, min_new_tokens=2, **options).shape[1]} tokens with the cache in 8 bits"


@fails("right-padding")
def _():
    tokenizer = tiny_tokenizer(pad_token="<pad>", padding_side="right")
    batch = tokenizer(["hi", "the cat sat"], padding=True, return_tensors="pt")
    with listening() as heard:
        tiny_model(pad_token_id=3).generate(**batch, max_new_tokens=2)
    return heard.about("right-padding")


@works("right-padding")
def _():
    tokenizer, model = tiny_tokenizer(pad_token="<pad>", padding_side="left"), tiny_model(pad_token_id=3)

    def answer(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return model.generate(**batch, max_new_tokens=4, min_new_tokens=4)[:, batch.input_ids.shape[1] :]

    assert torch.equal(answer(["hi", "the cat sat"])[0], answer(["hi"])[0])
    return "the short prompt gets the answer that it gets alone"


# --- quantize -------------------------------------------------------------------------------------------------------------------


@fails("group-size")
def _():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(nn.Sequential(nn.Linear(576, 64)), IntxWeightOnlyConfig(torch.int4, PerGroup(128)))


@works("group-size")
def _():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    group = max(size for size in (32, 64, 128) if 576 % size == 0)
    quantize_(nn.Sequential(nn.Linear(576, 64)), IntxWeightOnlyConfig(torch.int4, PerGroup(group)))
    return f"group_size {group} divides 576"


@fails("qat-base-config")
def _():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(tiny_model(), QATConfig(Int8DynamicActivationInt8WeightConfig(), step="prepare"))


@works("qat-base-config")
def _():
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    model = tiny_model()
    quantize_(model, QATConfig(Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)), step="prepare"))
    return f"prepared: {type(model.model.layers[0].mlp.up_proj).__name__}"


@fails("int4-packing-needs-mslk")
def _():
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    quantize_(tiny_model(torch.bfloat16), Int4WeightOnlyConfig(group_size=32))


@works("int4-packing-needs-mslk")
def _():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    model = tiny_model(torch.bfloat16)
    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    return f"4-bit weights without packing: {type(model.model.layers[0].mlp.up_proj.weight).__name__}"


@fails("embedding-qconfig")
def _():
    from torch.ao import quantization as tq

    model = tiny_model().train()
    model.qconfig = tq.get_default_qat_qconfig("fbgemm")
    tq.prepare_qat(model, inplace=True)
    model(IDS)
    tq.convert(model.eval(), inplace=True)


@works("embedding-qconfig")
def _():
    from torch.ao import quantization as tq

    model = tiny_model().train()
    model.qconfig = tq.get_default_qat_qconfig("fbgemm")
    model.get_input_embeddings().qconfig = None
    tq.prepare_qat(model, inplace=True)
    model(IDS)
    tq.convert(model.eval(), inplace=True)
    return f"{type(model.lm_head).__module__.split('.')[-3]} layers, float embeddings"


@fails("quantized-op-on-floats")
def _():
    from torch.ao import quantization as tq

    model = nn.Sequential(nn.Linear(8, 8)).eval()
    model.qconfig = tq.default_qconfig
    tq.prepare(model, inplace=True)(torch.ones(1, 8))
    tq.convert(model, inplace=True)(torch.ones(1, 8))


@works("quantized-op-on-floats")
def _():
    from torch.ao import quantization as tq

    model = tq.QuantWrapper(nn.Sequential(nn.Linear(8, 8))).eval()  # a quantizer in front, a dequantizer behind
    model.qconfig = tq.default_qconfig
    tq.prepare(model, inplace=True)(torch.ones(1, 8))
    return f"output {tq.convert(model, inplace=True)(torch.ones(1, 8)).dtype}"


@fails("dynamic-int8-on-half")
def _():
    from torch.ao.quantization import quantize_dynamic

    quantize_dynamic(tiny_model(torch.float16), {nn.Linear}, dtype=torch.qint8)(IDS)


@works("dynamic-int8-on-half")
def _():
    from torch.ao.quantization import quantize_dynamic

    return f"logits {quantize_dynamic(tiny_model(torch.float16).float(), {nn.Linear}, dtype=torch.qint8)(IDS).logits.dtype}"


@fails("torch-ao-deprecated")
def _():
    from torch.ao.quantization import quantize_dynamic

    with listening() as heard:
        quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, dtype=torch.qint8)
    return heard.about("torch.ao.quantization is deprecated")


@works("torch-ao-deprecated")
def _():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    with listening() as heard:
        quantize_(nn.Sequential(nn.Linear(64, 64)), Int8DynamicActivationInt8WeightConfig())
    assert not heard.about("deprecated")
    return "torchao's quantize_ does the same, without the warning"


@fails("fx-trace")
def _():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    prepare_fx(tiny_model(), get_default_qconfig_mapping("x86"), (IDS,))


@works("fx-trace")
def _():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = tiny_model()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())  # swaps weights, traces nothing
    return f"logits {tuple(model(IDS).logits.shape)}"


@fails("hessian-not-positive-definite")
def _():
    inputs = torch.randn(4, 64)  # 4 calibration tokens for 64 input channels
    torch.linalg.cholesky(inputs.T @ inputs)


@works("hessian-not-positive-definite")
def _():
    inputs = torch.randn(512, 64)
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())  # damp_percent
    return f"factor {tuple(torch.linalg.cholesky(hessian).shape)}"


@fails("not-implemented-for-half")
def _():
    torch.linalg.cholesky(torch.eye(4, dtype=torch.float16))


@works("not-implemented-for-half")
def _():
    return f"computed in {torch.linalg.cholesky(torch.eye(4, dtype=torch.float16).float()).dtype}"


@fails("empty-calibration-set", only_if=lambda: needs("awq"))
def _():
    from awq.utils.calib_data import get_calib_dataset

    get_calib_dataset(["the cat sat on the mat " * 100], tokenizer=tiny_tokenizer(), max_seq_len=512)


@works("empty-calibration-set")
def _():
    from awq.utils.calib_data import get_calib_dataset

    text = "the cat sat on the mat " * 100
    pieces = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    return f"{len(get_calib_dataset(pieces, tokenizer=tiny_tokenizer(), max_seq_len=512))} block of 512 tokens"


@fails("bits-not-supported")
def _():
    from transformers import GPTQConfig

    GPTQConfig(bits=5)


@works("bits-not-supported")
def _():
    from transformers import GPTQConfig

    return f"bits {GPTQConfig(bits=4).bits}"


@fails("float32-compute")
def _():
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, quant_type="nf4").to("cuda" if torch.cuda.is_available() else "cpu")
    with listening() as heard:
        layer(torch.ones(2, 64, dtype=torch.float16, device=layer.weight.device))
    return heard.about("bnb_4bit_compute_dtype")


@works("float32-compute")
def _():
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer = layer.to("cuda" if torch.cuda.is_available() else "cpu")
    with listening() as heard:
        layer(torch.ones(2, 64, dtype=torch.bfloat16, device=layer.weight.device))
    assert not heard.about("bnb_4bit_compute_dtype")
    return f"computes in {layer.compute_dtype}"


# --- train ----------------------------------------------------------------------------------------------------------------------


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
    CustomTrainer(tiny_model(), TrainingArguments(scratch(), max_steps=1, use_cpu=True, report_to=[]), train_dataset=rows).train()


@works("trainer-passes-more")
def _():
    from transformers import Trainer, TrainingArguments

    class CustomTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    rows = [{"input_ids": IDS[0], "labels": IDS[0]}]
    done = CustomTrainer(tiny_model(), TrainingArguments(scratch(), max_steps=1, use_cpu=True, report_to=[]), train_dataset=rows).train()
    return f"{done.global_step} step, loss {done.training_loss:.2f}"


@fails("target-is-no-layer")
def _():
    lora(tiny_model(), target_modules=["self_attn"])


@works("target-is-no-layer")
def _():
    return f"{len(lora(tiny_model(), target_modules='all-linear').targeted_module_names)} Linear layers have adapters"


# --- save -----------------------------------------------------------------------------------------------------------------------


@fails("save-dynamic-int8")
def _():
    from torch.ao.quantization import quantize_dynamic

    quantize_dynamic(tiny_model(), {nn.Linear}, dtype=torch.qint8).save_pretrained(scratch())


@works("save-dynamic-int8")
def _():
    from torch.ao.quantization import quantize_dynamic

    model, file = quantize_dynamic(tiny_model(), {nn.Linear}, dtype=torch.qint8), Path(scratch()) / "int8.pt"
    torch.save(model.state_dict(), file)
    again = quantize_dynamic(tiny_model(), {nn.Linear}, dtype=torch.qint8)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    return "state dict saved and loaded, same logits"


@fails("save-torchao")
def _():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_model()
    quantize_(model, Int8WeightOnlyConfig())
    model.save_pretrained(scratch())


@works("save-torchao")
def _():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    folder, config = scratch(), TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(), quantization_config=config)
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    return "saved and loaded, same logits"


@fails("tensors-share-memory")
def _():
    from safetensors.torch import save_file

    save_file(tiny_model(tie_word_embeddings=True).state_dict(), Path(scratch()) / "model.safetensors")


@works("tensors-share-memory")
def _():
    folder = scratch()
    tiny_model(tie_word_embeddings=True).save_pretrained(folder)
    return f"save_pretrained keeps one copy: {(Path(folder) / 'model.safetensors').stat().st_size:,} bytes"


@fails("tensor-not-contiguous")
def _():
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3, 4).T}, Path(scratch()) / "model.safetensors")


@works("tensor-not-contiguous")
def _():
    from safetensors.torch import load_file, save_file

    file = Path(scratch()) / "model.safetensors"
    save_file({"weight": torch.ones(3, 4).T.contiguous()}, file)
    return f"weight {tuple(load_file(file)['weight'].shape)}"


@fails("4bit-state-dict-in-plain-model")
def _():
    tiny_model(tie_word_embeddings=True).load_state_dict(tiny_4bit().state_dict())


@works("4bit-state-dict-in-plain-model")
def _():
    from transformers import AutoModelForCausalLM

    folder = scratch()
    tiny_4bit().save_pretrained(folder)
    return f"from_pretrained reads its config: {type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj).__name__}"


@fails("adapter-config-missing")
def _():
    from peft import PeftModel

    PeftModel.from_pretrained(tiny_model(), tiny_folder())


@works("adapter-config-missing")
def _():
    from peft import PeftModel

    folder = scratch()
    lora(tiny_model()).save_pretrained(folder)
    return f"{type(PeftModel.from_pretrained(tiny_model(), folder)).__name__} from " + ", ".join(sorted(os.listdir(folder)))


@fails("dtype-in-json")
def _():
    json.dumps({"compute_dtype": torch.bfloat16})


@works("dtype-in-json")
def _():
    return json.dumps({"compute_dtype": str(torch.bfloat16).removeprefix("torch.")})


# --- colab and jupyter ----------------------------------------------------------------------------------------------------------


@fails("cell-not-run")
def _():
    exec(compile("tokenizer('hi')", "<cell>", "exec"), {})  # a fresh kernel, and a cell further down


@works("cell-not-run")
def _():
    exec("tokenizer('hi')", {"tokenizer": tiny_tokenizer()})
    return "the cell that defines it ran first"


@fails("running-event-loop")
def _():
    async def cell():
        with contextlib.closing(asyncio.sleep(0)) as work:
            asyncio.run(work)

    run_as_cell(cell)


@works("running-event-loop")
def _():
    async def cell():
        await asyncio.sleep(0)
        return "awaited in the loop that is running"

    return run_as_cell(cell)
