"""Every failure of the catalogue is provoked for real, `explain` names it, and no other; any text can be read, no secret comes out."""

import json
import re
import subprocess
import sys
from unittest import mock

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.diagnosis import catalogue, explain, owners, reproductions

IDS = list(reproductions.FAILURES)
SILENT_IN_NOTEBOOK = {
    "loaded-twice",
    "double-bos",
    "never-stops",
    "autoawq-garbage-on-cpu",
    "learns-nothing",
}  # measured there
TOKEN = "hf_" + "aB3" * 11 + "x"


class Seen(dict):
    """{entry id: what its reader sees}, each provoked once, when first asked for. errors: {entry id: the exception} of those that raise."""

    def __init__(self):
        super().__init__()
        self.errors = {}

    def __missing__(self, entry_id):
        if reason := reproductions.why_not(entry_id):
            pytest.skip(reason)
        as_text = explain.as_text

        def kept(error):
            self.errors[entry_id] = error
            return as_text(error)

        with mock.patch.object(explain, "as_text", kept):
            self[entry_id] = reproductions.provoke(entry_id)
        return self[entry_id]


@pytest.fixture(scope="module")
def seen():
    return Seen()


def known(text):
    return [answer.entry.id for answer in explain.explain(text)]


# --- the catalogue --------------------------------------------------------------------------------------------------------------


def test_catalogue_is_complete_and_in_reading_order():
    assert len(catalogue.BY_ID) == len(catalogue.ENTRIES)
    topics = [catalogue.TOPICS.index(entry.topic) for entry in catalogue.ENTRIES]
    assert topics == sorted(topics) and set(topics) == set(range(len(catalogue.TOPICS)))
    reproduced = set(IDS) | SILENT_IN_NOTEBOOK
    assert {entry.id for entry in catalogue.ENTRIES if not entry.recorded} == reproduced, (
        "reproduced, or recorded with its source"
    )
    assert set(reproductions.REPAIRS) == set(IDS)


@pytest.mark.parametrize("entry", catalogue.ENTRIES, ids=lambda entry: entry.id)
def test_entry_says_what_a_reader_needs(entry):
    assert re.fullmatch(r"[a-z0-9-]+", entry.id) and len(entry.title) < 100
    assert entry.cause.endswith(".") and entry.remedy.endswith(".") and entry.reference.startswith("https://")
    assert entry.code or entry.id == "cell-not-run"
    assert entry.signs or entry.silent
    for pattern in entry.patterns:
        assert pattern.type and pattern.where and all(name.isidentifier() for name in pattern.type.split("|"))
        re.compile(pattern.text), re.compile(pattern.frames)
    for line in entry.lines:
        assert line.search("") is None


# --- each failure is provoked, explained and repaired ----------------------------------------------------------------------------


@pytest.mark.parametrize("entry_id", IDS)
def test_provoked_for_real_and_named_first_and_alone(entry_id, seen):
    text = seen[entry_id]
    answers = explain.explain(text)
    assert answers and answers[0].entry.id == entry_id, (known(text), text[-500:])
    assert answers[0].sure == explain.CERTAIN and len(answers) == 1, known(text)


@pytest.mark.integration
@pytest.mark.parametrize("entry_id", IDS)
def test_repair_runs(entry_id):
    assert reproductions.repair(entry_id)


def test_confusion_matrix(seen, capsys):
    """Rows: what was provoked. Columns: which entries answered."""
    rows = {}
    for entry_id in IDS:
        if not reproductions.why_not(entry_id):
            rows[entry_id] = known(seen[entry_id])
    with capsys.disabled():
        print(
            f"\nconfusion matrix, {len(rows)} failures x {len(rows)} entries (# named first, o named too, . not named)"
        )
        for number, (entry_id, answers) in enumerate(rows.items()):
            marks = ("#" if answers[:1] == [other] else "o" if other in answers else "." for other in rows)
            print(f"{number:3} {entry_id:32} {''.join(marks)}")
    assert all(answers == [entry_id] for entry_id, answers in rows.items())


def test_a_repacked_4bit_model_learns_nothing():
    """Silent (torch warns once per process at most): what notebook 13 measures, on two layers."""
    import torch
    from bitsandbytes.functional import has_avx512bf16

    def gradients(used):
        model = reproductions.tiny_4bit(bnb_4bit_compute_dtype=torch.bfloat16)
        if used:
            with torch.no_grad():
                model.eval()(reproductions.IDS)
        model = reproductions.lora(model).train()
        model(input_ids=reproductions.IDS, labels=reproductions.IDS).loss.backward()
        return [
            p.grad is not None and p.grad.norm().item() > 0 for name, p in model.named_parameters() if "lora_B" in name
        ]

    with reproductions.quiet():
        assert all(gradients(used=False))
        if not has_avx512bf16():
            pytest.skip("this CPU does not repack")
        assert not any(gradients(used=True)), "repaired upstream: good, say so in the catalogue"


def test_a_failure_that_no_longer_happens_is_noticed(monkeypatch):
    monkeypatch.setitem(reproductions.FAILURES, "meta-tensor", lambda: None)
    with pytest.raises(reproductions.DidNotHappen, match="meta-tensor"):
        reproductions.provoke("meta-tensor")


@pytest.mark.parametrize(
    ("text", "entry_id"),
    [
        ("ValueError: `.to` is not supported for `4-bit` or `8-bit` bitsandbytes models. Please use the model as it is", "move-8bit"),
        ("AttributeError: 'NoneType' object has no attribute 'cadam32bit_grad_fp32'", "bitsandbytes-without-gpu"),
        ("UserWarning: The installed version of bitsandbytes was compiled without GPU support.", "bitsandbytes-without-gpu"),
        ("ImportError: cannot import name 'PytorchGELUTanh' from 'transformers.activations' (/x/activations.py)", "autoawq-import"),
        ("NameError: name 'QuantizeConfig' is not defined", "optimum-missing"),
        ("AttributeError: 'torch.dtype' object has no attribute 'numel'", "save-dynamic-int8"),
        ("torch.fx.proxy.TraceError: symbolically traced variables cannot be used as inputs to control flow", "fx-trace"),
        ("NotImplementedError: Could not run 'quantized::linear_dynamic' with arguments from the 'CUDA' backend.", "quantized-op-on-floats"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 28.87 GiB. GPU 0 has a total capacity of 15.83 GiB", "cuda-out-of-memory"),
        ("RuntimeError: CUDA out of memory. Tried to allocate 12.50 MiB (GPU 0; 10.92 GiB total capacity", "cuda-out-of-memory"),
        ("safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge", "damaged-safetensors"),
        ("ValueError: in_features (576) % group_size (128) must be == 0", "group-size"),
        ("RuntimeError: Didn't find engine for operation quantized::linear_prepack NoQEngine", "no-quantized-engine"),
        ('RuntimeError: "addmm_impl_cpu_" not implemented for \'Half\'', "not-implemented-for-half"),
        ("Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1", "gptqmodel-workers"),
        ("ValueError: numpy.dtype size changed, may indicate binary incompatibility. Expected 96 from C header, got 88 from PyObject", "numpy-replaced"),
        ("the 'state' key is missing from 'metadata.widgets'. Add 'state' to each", "widget-state-missing"),
        ("nbclient.exceptions.DeadKernelError: Kernel died", "process-killed"),
        ("ValueError: Invalid header value b'Bearer hf_XX\\n'", "token-with-newline"),
        ("OSError: someone/x is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'", "folder-that-is-not-there"),
        ("TypeError: embedding(): argument 'indices' (position 2) must be Tensor, not BatchEncoding", "batch-encoding-as-ids"),
        ("RuntimeError: expected m1 and m2 to have the same dtype, but got: c10::BFloat16 != float", "matrices-differ-in-dtype"),
        ("TypeError: Trainer.__init__() got an unexpected keyword argument 'tokenizer'", "training-argument-renamed"),
        ("ModuleNotFoundError: No module named 'gptqmodel'", "package-missing"),
        ("Building cuda extension requires PyTorch(>=1.13.0) been installed, please install PyTorch first!", "auto-gptq-build"),
        ("UserWarning: bitsandbytes::gemv_4bit: an autograd kernel was not registered to the Autograd key(s)", "learns-nothing"),
        ("OSError: Load pretrained model to do quantization requires CUDA available.", "auto-gptq-wants-cuda"),
        ("RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!", "different-devices"),
        ("huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error.\n\nRepository Not Found for url: https://hub/x/y.\nIf you are trying to "
         "access a private or gated repo, make sure you are authenticated.\nInvalid username or password.", "no-such-model"),
        ("requests.exceptions.HTTPError: 401 Client Error\n\nInvalid username or password.", "bad-token"),
        ("OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/x/y.", "gated-model"),
        ("Error: listen tcp 127.0.0.1:11434: bind: address already in use", "llama-port-in-use"),
        ("Error: llama runner process has terminated: signal: killed", "llama-server-gone"),
        ("Error: could not connect to ollama app, is it running?", "llama-server-gone"),
        ("gguf_init_from_file_impl: tensor 'blk.0.ffn_down_exps.weight' has invalid ggml type 39 (NONE)\ngguf_init_from_file_impl: failed to read tensor info\nllama_model_load: error loading model: llama_model_loader: failed to load model from gpt-oss.gguf", "gguf-tensor-type-unknown"),
        ("gguf_init_from_file: invalid magic characters 'vers'\nllama_model_load: error loading model: llama_model_loader: failed to load model from models/minicpm3-4b-fp16.gguf", "gguf-wrong-magic"),
        ("common_chat_templates_init: failed to parse chat template (defaulting to chatml): Expected value expression at row 1, column 4:\n{{- /*\n   ^", "gguf-template-does-not-parse"),
        ("llama_model_load: error loading model: tensor 'blk.2.ffn_down.weight' data is not within the file bounds, model is corrupted or incomplete\nllama_load_model_from_file: failed to load model\nValueError: Failed to load model from file: x.gguf", "gguf-cut-off"),
        ("srv    send_error: task id = 2017, error: the request exceeds the available context size. try increasing the context size or enable context shift", "llama-context-too-small"),
        ('time=2025-02-25T10:00:00.000Z level=WARN source=runner.go:129 msg="truncating input prompt" limit=2048 prompt=5231 keep=4 new=2048', 'llama-context-too-small'),
        ('Traceback (most recent call last):\n  File "/x/site-packages/llama_cpp/llama.py", line 1, in _create_completion\n    raise ValueError(\nValueError: Requested tokens (2285) exceed context window of 2048', 'llama-context-too-small'),
        ('0.00.005.525 E gguf_init_from_reader: invalid magic characters: \'GGML\', expected \'GGUF\'\nTraceback (most recent call last):\n  File "x.py", line 1, in <module>\nRuntimeError: Failed to init server, please check the input params.', 'gguf-wrong-magic'),
    ],
)  # fmt: skip
def test_messages_of_other_versions(text, entry_id):
    assert known(text)[0] == entry_id


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/var/task/transformers/quantizers/quantizer_gptq.py", "transformers"),  # pip install --target /var/task
        ("/home/me/transformers/quantizers/mine.py", ""),
        ("/home/me/peft/train.py", ""),
    ],
)
def test_a_package_outside_site_packages_is_known_by_its_files(path, name):
    assert owners.package(path) == name


@pytest.fixture
def target(tmp_path):
    """A function that puts a file into a folder as `pip install --target` does: with its line in the distribution's RECORD."""

    def install(*files, distribution="oddlib-1.0", folder="folder"):
        record = tmp_path / folder / f"{distribution}.dist-info" / "RECORD"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("".join(f"{file},sha256=x,1\n" for file in (f"{distribution}.dist-info/METADATA", *files)))
        for file in files:
            path = tmp_path / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        return tmp_path / folder

    return install


CANNOT_IMPORT = "ImportError: cannot import name 'lost' from '{module}' ({path})"


@pytest.mark.parametrize("ending", ["", ". Did you mean: 'last'?"])
@pytest.mark.parametrize(
    ("module", "file"),
    [("oddlib", "oddlib/__init__.py"), ("oddlib.hub", "oddlib/hub.py"), ("odd", "odd.py"), ("o._C", "o/_C.abi3.so")],
)
def test_a_name_that_a_package_in_any_folder_lacks(target, module, file, ending):
    folder = target("oddlib/__init__.py", "oddlib/hub.py", "odd.py", "o/_C.abi3.so", distribution="Odd_Lib-1.0")
    message = CANNOT_IMPORT.format(module=module, path=folder / file)
    assert known(message + ending) == ["name-removed"]
    cell = 'Traceback (most recent call last):\n  File "/home/me/a.py", line 1, in <module>\n    from x import lost\n'
    (answer,) = explain.explain(cell + message + ending)
    assert (answer.entry.id, answer.sure) == ("name-removed", explain.CERTAIN)


@pytest.mark.parametrize(
    ("module", "file"),
    [
        ("mymodule", "mymodule.py"),
        ("huggingface_hub", "huggingface_hub.py"),
        ("huggingface_hub", "huggingface_hub/__init__.py"),
        ("accelerate.utils.modeling", "accelerate/utils/modeling.py"),
        ("datasets.utils.file_utils", "datasets/utils/file_utils.py"),
        ("lib", "oddlib.py"),  # RECORD has my/oddlib.py
        ("oddlib", "oddlib/__init__.py/"),
    ],
)
def test_a_name_that_the_readers_own_file_lacks(target, tmp_path, module, file):
    target("my/oddlib.py")
    for folder in (tmp_path / "folder", tmp_path / "own"):  # beside installed packages, and alone
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not file.endswith("/"):
            path.write_text("")
        message = CANNOT_IMPORT.format(module=module, path=f"{folder}/{file}")
        assert known(message) == []


@pytest.mark.parametrize(
    ("module", "path", "answers"),
    [
        ("huggingface_hub", "/opt/conda/envs/x/lib/python3.12/huggingface_hub/__init__.py", ["name-removed"]),
        ("peft.tuners", "/opt/x/lib/python3.12/peft/tuners/__init__.py", ["name-removed"]),
        ("oddlib", "/usr/lib/python3/dist-packages/oddlib/__init__.py", ["name-removed"]),
        ("oddlib", r"C:\Program Files (x86)\Python\Lib\site-packages\oddlib\__init__.py", ["name-removed"]),
        ("accelerate.utils.modeling", "/var/task/accelerate/utils/modeling.py", ["name-removed"]),
        ("accelerate.utils.modeling", "/var/task/accelerate/utils/mine.py", []),  # name and path do not agree
        ("accelerate.utils.mine", "/var/task/accelerate/utils/mine.py", []),  # the library has no such file
        ("accelerate.utils.modeling", "/home/me/accelerate/utils/modeling.py", []),
        ("accelerate.utils.modeling", r"C:\Users\me\accelerate\utils\modeling.py", []),
        ("accelerate.utils.modeling", "src/accelerate/utils/modeling.py", []),
        ("datasets.utils.file_utils", "/srv/datasets/utils/file_utils.py", []),  # many projects have a folder datasets
        ("huggingface_hub", "/srv/huggingface_hub/__init__.py", []),
        ("huggingface_hub", "/home/me/huggingface_hub.py", []),
        ("huggingface_hub", "/opt/x/lib/python3.12/huggingface_hub.py", []),
        ("mymodule", "/opt/x/lib/python3.12/mymodule/__init__.py", []),
        ("mymodule", "/home/me/mymodule.py", []),
        ("mymodule", "/home/me/mymodule.py), not (/x/site-packages/mymodule.py", []),
        ("torch", "consider renaming '/x/site-packages/torch.py' since it has the name of a library", []),
    ],
)
def test_a_name_that_a_package_of_another_machine_lacks(module, path, answers):
    assert known(CANNOT_IMPORT.format(module=module, path=path)) == answers


def test_frames_in_a_package_of_any_folder(target, tmp_path, monkeypatch):
    folder = target("transformers/modeling.py", "transformers/integrations/bitsandbytes.py", "odd.py")
    assert owners.package(f"{folder}/transformers/modeling.py") == "transformers"
    assert owners.package(f"{folder}/odd.py") == "odd"
    (folder / "mine.py").write_text("")
    assert [owners.package(f"{folder}/{name}") for name in ("mine.py", "gone.py", "")] == ["", "", ""]
    monkeypatch.setenv("HOME", str(tmp_path))  # Jupyter writes ~ for it
    assert owners.package("~/folder/transformers/modeling.py") == "transformers"
    monkeypatch.chdir(folder)
    assert owners.package("odd.py") == "odd"
    assert owners.package("/x/python/lib/json/decoder.py") == owners.PYTHON
    assert owners.package(f"{target('odd.py', folder='python/lib')}/odd.py") == "odd"


FRAME = '  File "{}", line 1, in <module>\n    import x\n'
FLOAT8 = "AttributeError: module 'torch' has no attribute 'float8_e8m0fnu'"


@pytest.mark.parametrize(
    ("caller", "answers"),
    [
        ("transformers/modeling.py", ["torch-behind"]),
        (
            "transformers/integrations/bitsandbytes.py",
            ["torch-behind"],
        ),  # no file of the reader's that hides bitsandbytes
        ("mine/transformers/modeling.py", []),
        ("mine/bitsandbytes.py", ["shadowed-package"]),
    ],
)
def test_who_asks_an_old_torch(target, tmp_path, caller, answers):
    folder = target("torch/__init__.py", "transformers/modeling.py", "transformers/integrations/bitsandbytes.py")
    frames = FRAME.format("/home/me/a.py") + FRAME.format(folder / caller) + FRAME.format(folder / "torch/__init__.py")
    assert known(f"Traceback (most recent call last):\n{frames}{FLOAT8}") == answers


def test_a_librarys_integration_hides_no_package():
    frames = FRAME.format("/srv/x/transformers/integrations/bitsandbytes.py")  # of another machine and another version
    assert known(f"Traceback (most recent call last):\n{frames}AttributeError: module 'q' has no attribute 'r'") == []


@pytest.mark.parametrize(
    "path", ["//server/share/peft/utils/other.py", r"\\server\share\peft\utils\other.py", "/x/" + 300 * "y" + "/z.py"]
)
def test_a_share_of_a_network_is_not_asked(path, monkeypatch):
    asked = []
    monkeypatch.setattr(owners.os.path, "isfile", lambda name: asked.append(str(name)))
    assert not owners.installed(path, "mine") and owners.inside(path) == path
    assert owners.package(path) == ""
    assert not [name for name in asked if "server" in name]


@pytest.mark.parametrize(
    "text",
    [
        "ZeroDivisionError: division by zero",
        "FileNotFoundError: [Errno 2] No such file or directory: 'x.txt'",
        "KeyError: 'name'",
        "AttributeError: 'list' object has no attribute 'shape'",
        "RuntimeError: The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0",
        "TypeError: f() got an unexpected keyword argument 'x'",
        "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        "all went well, 4 bits a weight, loaded in 4bit, cuda is available, memory is free",
        "AssertionError",
    ],
)
def test_what_is_not_in_the_catalogue_is_not_known(text):
    assert explain.explain(text) == []
    printed = explain.render(explain.read(text))
    assert (
        "=> I do not know this error." if "Error" in text else "=> I see no error in this text that I know."
    ) in printed


LOGS = {
    "pip": "Collecting bitsandbytes\n  Downloading bitsandbytes-0.50.2-py3-none-any.whl (404 kB)\nInstalling collected packages: torch, bitsandbytes, peft\nSuccessfully installed accelerate-1.15.0 bitsandbytes-0.50.2 peft-0.21.2",
    "pip, nothing to do": "Requirement already satisfied: optimum in /usr/lib/python3/dist-packages (2.3.0)\nRequirement already satisfied: gptqmodel>=7",
    "training": "{'loss': 2.1404, 'learning_rate': 0.0002, 'epoch': 0.01}\nstep 404: certain layers of bitsandbytes are frozen\n100%|####| 404/404 [10:00<00:00]",
    "logging": "2026-11-02 10:00:00,404 - trainer - INFO - CUDA is available, 404 MB free, no memory problem\n2026-11-02 10:00:01,000 - trainer - WARNING - KeyError: 'shape' was ignored",
    "vLLM": "(EngineCore pid=7) INFO 11-02 10:00:00 [core.py:404] Loading weights took 64.57 seconds\n(APIServer pid=1) INFO 11-02 10:00:09 [api.py:1] GET /v1/models 404 Not Found",
    "prose": "If you see ValueError: Attempting to unscale FP16 gradients, read on. A RuntimeError may also be a 404.",
    "the message alone": "LlamaForCausalLM.__init__() got an unexpected keyword argument 'load_in_4bit'",
}


@pytest.mark.parametrize("name", LOGS)
def test_what_is_no_error_is_not_explained(name):
    reading = explain.read(LOGS[name])
    assert explain.explain(reading) == [] and "no error" in explain.render(reading), explain.render(reading)


def raised_by_the_reader(text):
    """The same type and message, raised by a line of the reader's own."""
    error = explain.read(text).errors[-1]
    message = "\n".join(line.lstrip("-") for line in error.message.split("\n"))
    return f'Traceback (most recent call last):\n  File "/home/user/mine.py", line 404, in check\n    raise Broken(text)\n{error.type}: {message}'


ANYWHERE = {entry.id for entry in catalogue.ENTRIES if any("anywhere" in pattern.where for pattern in entry.patterns)}


@pytest.mark.parametrize("entry_id", IDS)
def test_another_type_or_place_is_not_explained(entry_id, seen):
    text = seen[entry_id]
    errors = explain.read(text).errors
    if not errors:
        return
    other_type = explain.read(raised_by_the_reader(text).replace(f"\n{errors[-1].type}:", "\nStrangeError:"))
    assert explain.explain(other_type) == [], known(other_type)
    allowed = {name for pattern in catalogue.find(entry_id).patterns for name in pattern.where.split()}
    if entry_id not in ANYWHERE and "own" not in allowed:  # what reader's code may raise by itself
        assert entry_id not in known(raised_by_the_reader(text))


# --- the reader -----------------------------------------------------------------------------------------------------------------


def colour(text):
    return re.sub(
        r"\b([A-Z]\w+Error)\b", "\x1b[0;31m\\1\x1b[0m", re.sub(r"^(\s+File)", "\x1b[1;32m\\1\x1b[0m", text, flags=re.M)
    )


FORMATS = {
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "old Mac": lambda text: text.replace("\n", "\r"),
    "bytes": lambda text: text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "ANSI colours": colour,
    "escaped colours": lambda text: colour(text).replace("\x1b", "\\u001b"),
    "quoted": lambda text: "\n".join("> " + line for line in text.split("\n")),
    "indented": lambda text: "\n".join("    " + line for line in text.split("\n")),
    "pytest": lambda text: "\n".join("E       " + line for line in text.split("\n")),
    "in a log": lambda text: "INFO loading\n 50%|#####     | 1/2\r100%|##########| 2/2\n" + text + "\nINFO done",
    "bottom half": lambda text: "\n".join(text.split("\n")[len(text.split("\n")) // 3 :]),
    "with a page feed": lambda text: "\x0c\x00" + text,
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, seen):
    wrong = {}
    for entry_id in IDS:
        if reproductions.why_not(entry_id):
            continue
        answers = known(FORMATS[name](seen[entry_id]))
        if answers[:1] != [entry_id]:
            wrong[entry_id] = answers
    assert not wrong, wrong


def jupyter(error):
    """The traceback of an error output, as ipykernel makes it."""
    from IPython.core.ultratb import AutoFormattedTB

    formatter = AutoFormattedTB(mode="Context", theme_name="linux", tb_offset=0)
    return "\n".join(formatter.structured_traceback(type(error), error, error.__traceback__))


@pytest.fixture(scope="module")
def raised(seen):
    """{entry id: the exception object} of the failures that raise."""
    for entry_id in IDS:
        if not reproductions.why_not(entry_id):
            seen[entry_id]
    return seen.errors


def test_jupyters_own_format(raised):
    texts = {entry_id: jupyter(error) for entry_id, error in raised.items()}
    assert "\x1b[" in texts["load-in-4bit"]
    wrong = {entry_id: known(text) for entry_id, text in texts.items() if known(text) != [entry_id]}
    assert not wrong, wrong


def test_saved_notebook_with_an_error(raised):
    error = raised["load-in-4bit"]
    output = {
        "output_type": "error",
        "ename": type(error).__name__,
        "evalue": str(error),
        "traceback": jupyter(error).split("\n"),
    }
    notebook = {
        "cells": [{"cell_type": "markdown", "source": "ValueError: no"}, {"cell_type": "code", "outputs": [output]}],
        "nbformat": 4,
    }
    assert known(json.dumps(notebook)) == ["load-in-4bit"]
    assert known(json.dumps({"cells": []})) == []
    assert known("{not json\nIndexError: index out of range in self") == ["token-id-outside"]


def test_chain_with_an_unknown_end():
    import torch

    try:
        try:
            torch.tensor(1.0).backward()
        except RuntimeError as error:
            raise ValueError("step 3 of my pipeline failed") from error
    except ValueError as error:
        for text in (explain.as_text(error), jupyter(error)):
            (answer,) = explain.explain(text)
            assert answer.entry.id == "nothing-requires-grad" and answer.sure == explain.LIKELY
            assert [str(e).split(":")[0] for e in explain.read(text).errors] == ["RuntimeError", "ValueError"]


def test_exception_group():
    error = ExceptionGroup(
        "two workers failed", [ZeroDivisionError("division by zero"), IndexError("index out of range in self")]
    )
    assert known(explain.as_text(error))[0] == "token-id-outside"


def test_half_a_traceback(raised):
    whole = explain.as_text(raised["gated-model"])
    top = whole[: whole.rindex("huggingface_hub.errors")]
    assert explain.read(top).cut and "ends before its last line" in explain.render(explain.read(top), [])
    assert all(answer.sure != explain.CERTAIN for answer in explain.explain(top))
    jupyter_top = "\n".join(jupyter(raised["batch-encoding-as-ids"]).split("\n")[:-1])
    assert explain.read(jupyter_top).errors[-1].type == "AttributeError"
    assert explain.explain(str(raised["load-in-4bit"])) == [], "a message without its type says too little"


def test_the_last_of_several_tracebacks_counts(seen):
    assert known(seen["load-in-4bit"] + seen["target-modules"]) == ["target-modules"]


def test_answer_has_cause_remedy_certainty_and_reference(seen):
    text = explain.render(explain.read(seen["load-in-4bit"]))
    entry = catalogue.find("load-in-4bit")
    for part in ("Cause:", "Remedy:", "How sure: certain", entry.reference, "BitsAndBytesConfig(load_in_4bit=True"):
        assert part in text


# --- no secret comes out --------------------------------------------------------------------------------------------------------

SECRETS = {
    "alone": TOKEN,
    "in a word": f"x{TOKEN}y",
    "coloured in the middle": TOKEN[:9] + "\x1b[31m" + TOKEN[9:],
    "bearer": "Bearer abcdefghijklmnop",
    "variable": "HF_TOKEN=0123456789abcdefghij",
    "json": '"api_key": "0123456789abcdefghij"',
    "address": "https://me:hunter22@example.org/x",
    "github": "ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "password": "password=hunter22",
}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_not_printed(name):
    secret = SECRETS[name]
    for text in (
        f"ValueError: {secret}",
        f"OSError: We couldn't connect to 'https://x' {secret}",
        secret,
        f"Traceback (most recent call last):\n{secret}",
    ):
        printed = explain.render(explain.read(text))
        for part in ("aB3aB3", "hunter22", "0123456789", "abcdefghij"):
            assert part not in printed, printed


def test_secrets_of_this_machine_are_known_by_value(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "an-ordinary-word")
    assert explain.redact("OSError: an-ordinary-word was refused") == "OSError: [secret] was refused"


def test_a_token_at_the_place_where_a_long_text_is_cut(monkeypatch):
    monkeypatch.setattr(explain, "LONGEST", 2000)
    for inside in range(len(TOKEN)):
        text = "x " * 1000 + TOKEN + " " + "y" * (explain.LONGEST - inside)
        assert not any(TOKEN[n : n + 6] in explain.read(text).text for n in range(len(TOKEN) - 6))


def test_the_librarys_own_leak_is_redacted(seen):
    text = seen["token-with-newline"]
    assert reproductions.TOKEN in text, "the library no longer prints the token: good, say so in the catalogue"
    assert reproductions.TOKEN not in explain.render(explain.read(text)) and "[secret]" in explain.render(
        explain.read(text)
    )


def test_redaction_leaves_ordinary_words_alone(seen):
    for text in (
        "tokenizer.pad_token = tokenizer.eos_token",
        "max_new_tokens=128",
        "hf_quantizer.preprocess_model",
        "token_type_ids",
        "key=value",
    ):
        assert explain.redact(text) == text


# --- any text at all ------------------------------------------------------------------------------------------------------------

LINES = st.sampled_from(
    [
        "Traceback (most recent call last):", "TypeError                Traceback (most recent call last)", "During handling of the above exception, another exception occurred:",
        '  File "x.py", line 1, in f', "    f(x)", "ValueError: bad", "KeyError", "-" * 75, "  | ", "  +-+---------------- 1 ----------------", "E   ", "> ", "\x1b[31m",
        "RuntimeError: CUDA out of memory", "x.py:1: UserWarning: w", "", "\r", "{", '{"cells": [1]}',
    ]
)  # fmt: skip
ANYTHING = st.one_of(
    st.text(), st.binary(), st.lists(st.one_of(LINES, st.text(max_size=20)), max_size=15).map("\n".join)
)


@settings(max_examples=300, deadline=None)
@given(ANYTHING)
def test_any_text_can_be_read(text):
    reading = explain.read(text)
    answers = explain.explain(reading)
    assert explain.render(reading, answers)
    assert all(answer.entry in catalogue.ENTRIES and answer.sure in explain.LEVELS for answer in answers)
    assert len({answer.entry.id for answer in answers}) == len(answers)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", reading.text)
    assert explain.read(reading.text).errors == explain.read(explain.read(reading.text).text).errors


@settings(max_examples=200, deadline=None)
@given(
    ANYTHING.filter(lambda x: isinstance(x, str)),
    st.from_regex(r"hf_[A-Za-z0-9]{34}", fullmatch=True),
    st.text(max_size=50),
)
def test_no_token_comes_out_of_any_text(before, token, after):
    reading = explain.read(before + token + after)
    assert token not in explain.render(reading) and token not in reading.text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200), st.sampled_from(sorted(set(IDS) - {"pip-finds-no-version"})))
def test_what_stands_before_a_traceback_does_not_matter(seen, before, entry_id):
    if reproductions.why_not(entry_id):
        return
    text = seen[entry_id]
    if text.startswith("Traceback"):
        assert known(before + "\n" + text)[:1] == [entry_id]


@pytest.mark.parametrize(
    "text",
    [
        "a" * 10**6,
        "a." * 10**5,
        "Error" * 10**5,
        "\x1b[" * 10**5,
        ("ValueError: x\n" * 10**4),
        "//a:b" * 10**5,
        "{" * 10**5,
    ],
    ids=lambda t: t[:8],
)
@pytest.mark.timeout(120)  # a pattern that goes back and forth over such a text takes hours
def test_long_texts_come_to_an_end(text):
    assert explain.render(explain.read(text))


# --- command line and magic -----------------------------------------------------------------------------------------------------


def run(*arguments, text=None):
    return subprocess.run(
        [sys.executable, "-m", "helpers", "explain", *arguments], input=text, capture_output=True, cwd=ROOT
    )


@pytest.mark.integration
def test_exit_codes(tmp_path):
    file = tmp_path / "error.txt"
    file.write_text("IndexError: index out of range in self\n")
    assert (run(str(file)).returncode, run(text=b"ZeroDivisionError: division by zero").returncode) == (0, 1)
    assert b"Remedy:" in run("-", text=file.read_bytes()).stdout
    for done in (run(text=b""), run(text=b" \r\n\t"), run(str(tmp_path / "none.txt")), run(str(tmp_path))):
        assert done.returncode == 2 and done.stderr.startswith(b"error:") and b"Traceback" not in done.stderr


@pytest.mark.integration
def test_without_torch():
    code = "import sys; from helpers.diagnosis import explain; explain.render(explain.read('KeyError')); print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "set()"
    )


@pytest.fixture
def shell():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "helpers.diagnosis")
    return shell


def test_magics(shell, capsys, monkeypatch):
    for name in ("last_exc", "last_value"):
        monkeypatch.delattr(sys, name, raising=False)
    shell.run_line_magic("explain", "")
    assert "no error so far" in capsys.readouterr().out
    shell.run_cell("import torch; torch.nn.Embedding(2, 2)(torch.tensor([5]))")
    capsys.readouterr()
    shell.run_line_magic("explain", "")
    assert "no embedding for" in capsys.readouterr().out
    shell.run_cell_magic("explain", "", "y = 1\ntorch.tensor(1.0).backward()")
    assert "requires a gradient" in capsys.readouterr().out and shell.user_ns["y"] == 1
    shell.run_line_magic("explain", "error")
    assert "requires a gradient" in capsys.readouterr().out
    shell.run_cell_magic("explain", "", "z = 2")
    shell.run_line_magic("explain", "nothing_here")
    printed = capsys.readouterr().out
    assert "(no error)" in printed and "nothing called nothing_here" in printed


@pytest.mark.integration
def test_the_first_cell_of_a_notebook_defines_the_magic():
    code = "from IPython.core.interactiveshell import InteractiveShell as Shell; shell = Shell.instance()\n"
    code += "from helpers import bootstrap; bootstrap.start(); shell.run_line_magic('explain', '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "no error so far", done.stderr


def test_register_outside_ipython():
    with pytest.raises(RuntimeError, match="python -m helpers explain"):
        explain.register()
