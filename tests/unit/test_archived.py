"""Each repair of the archived packages is necessary (this happens without it) and sufficient; undo leaves upstream's own objects."""

import importlib
import subprocess
import sys

import pytest
import torch

from helpers import archived
from helpers.archived import patching

TOUCHED = {
    "auto-gptq": [
        "transformers.modeling_utils", "transformers.utils.hub", "peft.peft_model", "torch", "torch.nn", "torch.nn.init", "torch.cuda", "torch.amp",
        "auto_gptq.modeling._base", "auto_gptq.modeling._base.BaseGPTQForCausalLM", "auto_gptq.modeling._utils", "auto_gptq.quantization.gptq",
    ],
    "autoawq": ["awq.quantize.quantizer", "awq.quantize.quantizer.AwqQuantizer", "awq.utils.calib_data"],
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama of two layers with tied embeddings, in float16, with a tokenizer whose words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(128)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 128, (6, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def enable(monkeypatch):
    """enable(package, without=name): the repair with one patch left out; undone after the test."""
    repairs = []

    def enable(package, without=None):
        with monkeypatch.context() as patched:
            patched.setitem(
                archived.repair.PATCHES,
                package,
                [patch for patch in archived.repair.PATCHES[package] if patch.__name__ != without],
            )
            repairs.append(archived.enable(package))
        return repairs[-1]

    yield enable
    for repair in repairs:
        repair.undo()


def quantized(folder, ids):
    """The guide's lines of auto-gptq."""
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    model = AutoGPTQForCausalLM.from_pretrained(
        folder, quantize_config=BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
    )
    model.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids])
    return model


def scaled(folder, texts, **kwargs):
    """autoawq's scale search alone: its scales are folded in and nothing is rounded, so that the function must stay the same."""
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    model = AutoAWQForCausalLM.from_pretrained(folder, device_map="cpu", torch_dtype=torch.float32)
    model.quantize(
        AutoTokenizer.from_pretrained(folder), {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}, calib_data=texts,
        **{"max_calib_seq_len": 32, "export_compatible": True, "apply_clip": False, **kwargs},
    )  # fmt: skip
    return model.model.cpu()


@torch.inference_mode()
def error(model, folder, ids):
    """Relative error of the logits against the untouched model."""
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    answer = model(input_ids=ids.to(next(model.parameters()).device)).logits.float().cpu()
    return ((answer - expected).norm() / expected.norm()).item()


def attributes(name):
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            found = getattr(found, part)
        return dict(vars(found))


# --- enabling and undoing -------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_importing_the_module_imports_nothing_else():
    code = "import sys, helpers.archived; print(sorted({'torch', 'transformers', 'auto_gptq', 'awq', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("package", TOUCHED)
def test_says_what_it_changed_and_puts_everything_back(package, capfd):
    archived.enable(package).undo()  # the packages themselves stay imported
    before = {name: attributes(name) for name in TOUCHED[package]}
    with archived.enable(package) as repair:
        assert archived.enable(package) is repair, "enabling twice must not patch twice"
        needed = [
            patch.__name__
            for patch in (archived.auto_gptq.PATCHES if package == "auto-gptq" else archived.autoawq.PATCHES)
        ]
        assert [name for name, _, _ in repair.applied] == [
            name for name in needed if name != "runs_without_cuda" or not torch.cuda.is_available()
        ]
        assert all(assumed.endswith(".") and now.endswith(".") for _, assumed, now in repair.applied)
        assert {name: attributes(name) for name in TOUCHED[package]} != before
    for name, old in before.items():
        new = attributes(name)
        assert new.keys() == old.keys() and all(new[key] is old[key] for key in old), name
    repair.undo()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", TOUCHED)
def test_another_version_or_none_is_refused_by_name(package, monkeypatch):
    wanted = archived.VERSIONS[package]
    monkeypatch.setattr(archived.repair.metadata, "version", lambda name: "0.7.0")
    with pytest.raises(
        archived.ArchivedError, match=f"{package} 0.7.0 is installed, but its repair was written for {wanted}"
    ):
        archived.enable(package)

    def missing(name):
        raise archived.repair.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(archived.repair.metadata, "version", missing)
    with pytest.raises(archived.ArchivedError, match=f"not installed.*{package}=={wanted}"):
        archived.enable(package)


def test_an_unknown_package_is_refused():
    with pytest.raises(ValueError, match="auto-gptq and autoawq"):
        archived.enable("gptqmodel")


def test_a_patch_that_fails_leaves_nothing_behind(monkeypatch):
    hub = attributes("transformers.utils.hub")
    monkeypatch.setitem(
        archived.repair.PATCHES, "auto-gptq", [archived.auto_gptq.hub_functions, patching.patch("", "")(lambda: 1 / 0)]
    )
    with pytest.raises(ZeroDivisionError):
        archived.enable("auto-gptq")
    assert attributes("transformers.utils.hub") == hub and not archived.repair._active


# --- auto-gptq ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_init_weights", "cannot import name 'no_init_weights' from 'transformers.modeling_utils'"),
        (
            "hub_functions",
            "cannot import name '(CommitOperationAdd|create_commit|create_repo)' from 'transformers.utils.hub'",
        ),
        ("peft_model_mapping", "cannot import name 'PEFT_TYPE_TO_MODEL_MAPPING' from 'peft.peft_model'"),
    ],
)
def test_does_not_import_without(name, message, monkeypatch):
    for module in [module for module in sys.modules if module.split(".")[0] == "auto_gptq"]:
        monkeypatch.delitem(sys.modules, module)
    imported = set(sys.modules)
    monkeypatch.setitem(
        archived.repair.PATCHES,
        "auto-gptq",
        [patch for patch in archived.auto_gptq.PATCHES[:3] if patch.__name__ != name],
    )
    try:
        with archived.enable("auto-gptq"), archived.patching.quiet(), pytest.raises(ImportError, match=message):
            importlib.import_module("auto_gptq")
    finally:  # a half imported package must not stay
        for module in [
            module for module in sys.modules if module.split(".")[0] == "auto_gptq" and module not in imported
        ]:
            del sys.modules[module]


@pytest.mark.integration
def test_auto_gptq_quantizes_saves_reloads_and_generates(tiny, ids, enable, tmp_path):
    from safetensors.torch import load_file

    enable("auto-gptq")
    from auto_gptq import AutoGPTQForCausalLM

    normal = torch.nn.init.normal_
    model = quantized(tiny, ids)
    assert not any(layer._forward_hooks for layer in model.model.model.layers), "the hooks belong to quantize alone"
    assert error(model.model, tiny, ids) < 0.1
    with torch.inference_mode():
        expected = model.model(input_ids=ids.to(model.device)).logits
    model.save_quantized(str(tmp_path), use_safetensors=True)
    (file,) = tmp_path.glob("*.safetensors")
    assert "lm_head.weight" not in load_file(file) and "model.embed_tokens.weight" in load_file(file)

    loaded = AutoGPTQForCausalLM.from_quantized(str(tmp_path))
    with torch.inference_mode():
        again = loaded(input_ids=ids.to(loaded.device)).logits.to(expected)
    assert (again - expected).norm() / expected.norm() < 0.01, (
        "float16 rounding, differently ordered on CUDA, and no more"
    )
    assert loaded.generate(input_ids=ids[:1, :8].to(loaded.device), max_new_tokens=4).shape == (1, 12)
    assert torch.nn.init.normal_ is normal


@pytest.mark.integration
def test_without_layers_return_tensors_the_second_layer_fails(tiny, ids, enable):
    enable("auto-gptq", without="layers_return_tensors")
    with pytest.raises(RuntimeError, match="size of tensor"):
        quantized(tiny, ids)


def test_without_dead_arguments_the_model_does_not_load(tiny, ids, enable):
    enable("auto-gptq", without="dead_arguments")
    with pytest.raises(TypeError, match="resume_download"):
        quantized(tiny, ids)


@pytest.mark.integration
def test_without_initializers_stay_new_layers_are_raw_memory(tiny, ids, enable, monkeypatch):
    for name in ("kaiming_uniform_", "uniform_", "normal_"):
        monkeypatch.setattr(torch.nn.init, name, getattr(torch.nn.init, name))  # puts them back after this test
    enable("auto-gptq", without="initializers_stay")
    quantized(tiny, ids[:1])
    values = torch.full((8,), 7.0)
    torch.nn.init.normal_(values)
    assert (values == 7).all(), "upstream has learned to put them back: the patch is not needed any more"


@pytest.mark.integration
def test_without_tied_weights_are_saved_once_they_are_saved_twice(tiny, ids, enable, tmp_path):
    from safetensors.torch import load_file

    enable("auto-gptq", without="tied_weights_are_saved_once")
    quantized(tiny, ids[:1]).save_quantized(str(tmp_path), use_safetensors=True)
    tensors = load_file(next(tmp_path.glob("*.safetensors")))
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.integration
def test_without_generate_on_cpu_autocast_stops_it(tiny, ids, enable):
    enable("auto-gptq", without="generate_on_cpu")
    model = quantized(tiny, ids[:1])
    model.to("cpu")
    with pytest.raises(RuntimeError, match="autocast"):
        model.generate(input_ids=ids[:1, :8], max_new_tokens=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_runs_without_cuda_it_refuses(tiny, ids, enable):
    enable("auto-gptq", without="runs_without_cuda")
    with pytest.raises(OSError, match="requires CUDA available"):
        quantized(tiny, ids)


# --- autoawq --------------------------------------------------------------------------------------------------------------------


def text(rows):
    return [" ".join(map(str, row.tolist())) for row in rows]


@pytest.mark.integration
def test_the_scale_search_leaves_the_function_as_it_was(tiny, ids, enable):
    enable("autoawq")
    assert error(scaled(tiny, text(ids[:, :30])), tiny, ids) < 1e-5


@pytest.mark.integration
@pytest.mark.skipif(torch.cuda.is_available(), reason="v.cpu() copies from a GPU")
def test_without_saved_weights_the_search_ruins_the_model(tiny, ids, enable):
    enable("autoawq", without="weights_are_saved_before_the_search")
    assert error(scaled(tiny, text(ids[:, :30])), tiny, ids) > 0.01


def test_long_samples_are_used_to_the_last_token(tiny, ids, enable):
    enable("autoawq")
    from awq.quantize import quantizer

    class Words:
        encode = staticmethod(lambda line: [int(word) for word in line.split()])

    samples = quantizer.get_calib_dataset(data=text(ids), tokenizer=Words, n_samples=128, max_seq_len=32)
    assert torch.equal(torch.cat(samples, 1)[0], ids.flatten()[: ids.numel() // 32 * 32])
    with pytest.raises(ValueError, match="holds 3 tokens, fewer than one window of max_calib_seq_len=32"):
        quantizer.get_calib_dataset(data=["1 2 3"], tokenizer=Words, max_seq_len=32)
    with pytest.raises(ValueError, match="holds 0 tokens"):
        quantizer.get_calib_dataset(data=[], tokenizer=Words, max_seq_len=32)


def test_without_cutting_long_samples_are_dropped(tiny, ids, enable):
    enable("autoawq", without="long_samples_are_cut")
    with pytest.raises((ValueError, RuntimeError), match="non-empty list of Tensors"):
        scaled(tiny, text(ids))
