"""Failures while a model or tokenizer is found, downloaded and loaded, each with its repair."""

import json
from pathlib import Path

import torch
from torch import nn

from helpers.diagnosis.reproductions.parts import (
    TOKEN,
    download,
    hub,
    scratch,
    tiny_4bit,
    tiny_folder,
    tiny_model,
    tiny_tokenizer,
)
from helpers.diagnosis.reproductions.registry import fails, listening, works


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

    AutoModelForCausalLM.from_pretrained(
        tiny_folder(), quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ).cuda()


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

    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder(), quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    return f"weights are {type(model.model.layers[0].mlp.up_proj.weight).__name__}"


@fails("remote-code")
def _():
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(
        model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    )
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@works("remote-code")
def _():
    from transformers import AutoModelForCausalLM

    return (
        f"an architecture that transformers has: {type(AutoModelForCausalLM.from_pretrained(tiny_folder())).__name__}"
    )


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
