"""A checkpoint folder is whole or not there, whatever happens to the process that writes it, and nothing loads as garbage."""

import ast
import signal
import subprocess
import sys
from collections import OrderedDict
from types import SimpleNamespace

import families
import filelock
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import checkpoints


def test_takes_its_place_when_the_block_ends(tmp_path):
    for text in ("first", "second"):
        with checkpoints.writing(tmp_path, "demo") as scratch:
            (scratch / "weights").write_text(text)
            assert not list((tmp_path / "checkpoints").glob("demo/weights")) or text == "second"
        assert (checkpoints.folder(tmp_path, "demo") / "weights").read_text() == text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.endswith(".lock")] == ["demo"]


def test_a_block_that_raises_keeps_the_old_one(tmp_path):
    with checkpoints.writing(tmp_path, "demo") as scratch:
        (scratch / "weights").write_text("old")
    with pytest.raises(OSError, match="disk full"), checkpoints.writing(tmp_path, "demo") as scratch:
        (scratch / "weights").write_text("half")
        raise OSError("disk full")
    assert (checkpoints.folder(tmp_path, "demo") / "weights").read_text() == "old"
    assert not list((tmp_path / "checkpoints").glob(".demo.tmp-*"))


WRITER = """
import sys, time
from helpers import checkpoints
with checkpoints.writing(sys.argv[1], "demo") as scratch:
    (scratch / "config.json").write_text("{}")
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.integration
def test_killed_while_writing(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "begun\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not checkpoints.folder(tmp_path, "demo").exists(), "a killed writer left a checkpoint"
    with filelock.FileLock(tmp_path / "checkpoints" / ".demo.lock", timeout=0):
        pass  # raises where the dead writer's lock still holds
    with checkpoints.writing(tmp_path, "demo") as scratch:
        (scratch / "weights").write_text("whole")
    assert not list((tmp_path / "checkpoints").glob(".demo.tmp-*")), "the dead writer's scratch folder is still there"


# --- what plain `from_pretrained` makes of them ---------------------------------------------------------------------------------

IDS = torch.arange(24)[None]


def cells(name, *wanted):
    """What a notebook's source defines: of its code cells those that hold one of these texts, executed; their names."""
    found = [
        part.partition("\n")[2]
        for part in (ROOT / "notebooks" / "source" / f"{name}.py").read_text(encoding="utf-8").split("\n# %%")
    ]
    sources = [
        next(cell for cell in found if text in cell)
        for text in ("from torch.ao.nn import", "import no_init_weights", *wanted)
        if text in wanted or any(text in cell for cell in found)
    ]
    definitions = [
        node
        for source in sources
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.Import | ast.ImportFrom)
    ]
    names = {"torch": torch}
    exec(compile(ast.Module(definitions, []), name, "exec"), names)
    return SimpleNamespace(**names)


@pytest.fixture
def small(tmp_path):
    """(A random Llama in a folder, the function that loads it in float32)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return lambda **arguments: AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", **{"dtype": torch.float32, **arguments}
    ).eval()


@torch.inference_mode()
def logits(net):
    return net(IDS).logits.float()


def refuses(folder, notebook):
    """Plain loading raises and names the notebook; a concrete class raises too; nothing is pickled."""
    with pytest.raises(ValueError, match=rf"load it with \w+\(\) in notebook {notebook}"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        LlamaForCausalLM.from_pretrained(folder)
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    return True


def body(net):
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


@pytest.mark.integration
@pytest.mark.skipif(sys.platform == "darwin", reason="torch has no int8 engine on Apple silicon")
@pytest.mark.filterwarnings("ignore")
def test_torchs_dynamic_int8_is_refused_and_comes_back(small, tmp_path):
    notebook = cells("01_ptq_dynamic_int8", "def unpack", "def packed_layer", "def fill", "def reload")
    net = small()
    config = net.config
    quantized = torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}, dtype=torch.qint8)
    metadata = {
        "format": "pt",
        "kind": "torch.ao dynamic",
        "version": str(quantized.model.layers[0].self_attn.q_proj.version),
    }
    with checkpoints.writing(tmp_path, "int8") as folder:
        checkpoints.save_own_format(
            folder, notebook.unpack(quantized), config, "reload() in notebook 01_ptq_dynamic_int8.ipynb", metadata
        )
    folder = checkpoints.folder(tmp_path, "int8")
    assert refuses(folder, "01_ptq_dynamic_int8.ipynb") and torch.equal(
        logits(notebook.reload(folder)), logits(quantized)
    )


@pytest.mark.integration
def test_torchaos_static_int8_is_refused_and_comes_back(small, tmp_path):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_

    notebook, net = cells("01_ptq_dynamic_int8", "def packed_layer", "def fill", "def reload"), small()
    for module in body(net).values():
        quantize_(module, Int8StaticActivationInt8WeightConfig(
            act_quant_scale=torch.full((1, 1, 1), 0.05), granularity=[PerTensor(), PerRow()], set_inductor_config=False))  # fmt: skip
    tensors, metadata = flatten_tensor_state_dict({name: value.detach() for name, value in net.named_parameters()})
    metadata.update(format="pt", kind="torchao")
    checkpoints.save_own_format(
        tmp_path, tensors, net.config, "reload() in notebook 01_ptq_dynamic_int8.ipynb", metadata
    )
    assert refuses(tmp_path, "01_ptq_dynamic_int8.ipynb") and torch.equal(
        logits(notebook.reload(tmp_path)), logits(net)
    )


@pytest.mark.integration
def test_packed_four_bits_are_refused_and_come_back(small, tmp_path):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    notebook, net = (
        cells("02_qat_fake_quant", "def pack", "def restore", "def load_quantized"),
        small(dtype=torch.bfloat16),
    )
    quantize_(
        net,
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        filter_fn=lambda module, name: name in body(net),
    )
    state = {name: value.detach() for name, value in net.state_dict().items() if name != "lm_head.weight"}
    tensors, metadata = flatten_tensor_state_dict(state)
    tensors = {name: notebook.pack(value) if name.endswith("qdata") else value for name, value in tensors.items()}
    checkpoints.save_own_format(
        tmp_path, tensors, net.config, "load_quantized() in notebook 02_qat_fake_quant.ipynb", metadata
    )
    assert refuses(tmp_path, "02_qat_fake_quant.ipynb") and torch.equal(
        logits(notebook.load_quantized(tmp_path)), logits(net)
    )


@pytest.mark.integration
@pytest.mark.skipif(sys.platform == "darwin", reason="torch has no int8 engine on Apple silicon")
@pytest.mark.filterwarnings("ignore")
def test_eager_qat_is_refused_and_comes_back(small, tmp_path):
    from torch.ao import quantization

    notebook, net = cells("02_qat_fake_quant", "def unpack", "def eager_layer", "def load_eager"), small()
    for name, module in body(net).items():
        net.set_submodule(name, quantization.QuantWrapper(module))
        net.get_submodule(name).qconfig = quantization.get_default_qconfig("x86")
    config = net.config
    quantization.prepare(net, inplace=True)
    logits(net)
    quantization.convert(net, inplace=True)
    checkpoints.save_own_format(
        tmp_path, notebook.unpack(net), config, "load_eager() in notebook 02_qat_fake_quant.ipynb"
    )
    assert refuses(tmp_path, "02_qat_fake_quant.ipynb") and torch.equal(
        logits(notebook.load_eager(tmp_path)), logits(net)
    )


@pytest.mark.integration
@pytest.mark.parametrize("mixed", [False, True])
def test_what_goes_through_torchao_config_loads_plainly(small, tmp_path, mixed):
    """Notebook 01's dynamic int8, and notebook 03's plan, in which each layer has settings of its own or none."""
    from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    settings = Int8DynamicActivationInt8WeightConfig()
    if mixed:
        kinds = {"mlp.up_proj": settings, "mlp.down_proj": Int8WeightOnlyConfig()}
        settings = FqnToConfig(
            OrderedDict((f"model.layers.{i}.{kind}", kinds[kind]) for i in range(2) for kind in kinds)
        )
    expected = small(dtype=torch.bfloat16)
    quantize_(expected, settings, filter_fn=None if mixed else lambda module, name: name in body(expected))
    small(dtype=torch.bfloat16, quantization_config=TorchAoConfig(settings)).save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(plain), logits(expected)) and not torch.equal(
        logits(plain), logits(small(dtype=torch.bfloat16))
    )
    assert not mixed or type(plain.model.layers[0].self_attn.q_proj.weight) is torch.nn.Parameter


@pytest.mark.integration
def test_the_biases_of_a_hybrid_model_stay_as_they_are(tmp_path):
    """Notebook 03's own settings, on Qwen2: transformers quantizes the bias of a named layer too, where nothing stops it.

    Such a bias fails on any device. Only a plan with INT8 on q, k or v shows it; the plan of the tiny model in test_families has none there.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, Int8WeightOnlyConfig, quantize_

    notebook = cells(
        "03_hybrid_precision",
        "from collections import OrderedDict",
        "import FqnToConfig",
        "import TorchAoConfig",
        "def by_layer",
        "def for_transformers",
        "def reload",
    )
    configs = {"int8": Int8DynamicActivationInt8WeightConfig(), "int8 weights": Int8WeightOnlyConfig()}
    notebook.by_layer.__globals__["settings"] = configs.get
    config = families.config("qwen2")
    config.vocab_size = 96
    base, saved = tmp_path / "base", tmp_path / "saved"
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    biases = {name: parameter for name, parameter in net.named_parameters() if name.endswith("bias")}
    for bias in biases.values():
        torch.nn.init.normal_(bias, std=0.1)
    net.save_pretrained(base)
    kinds = {"q": "int8", "k": "int8 weights", "v": "int8", "o": "bf16"}
    plan = {(f"self_attn.{kind}_proj", range(2)): precision for kind, precision in kinds.items()}
    AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=notebook.for_transformers(plan)
    ).save_pretrained(saved)
    plain = notebook.reload(saved)
    assert len(biases) == 6
    for name, bias in biases.items():
        found = plain.get_parameter(name)
        assert type(found) is torch.nn.Parameter and torch.equal(found, bias), name
        assert isinstance(plain.get_parameter(name.replace("bias", "weight")), Int8Tensor), name
    quantize_(net, notebook.by_layer(plan), filter_fn=None)
    assert torch.equal(logits(plain), logits(net))
