"""Failures while packages are installed and imported, each with its repair."""

import subprocess
import sys
from pathlib import Path

import torch

from helpers import files
from helpers.diagnosis.reproductions.parts import (
    forgotten,
    hidden,
    needs,
    no_gpu_here,
    other_python,
    pip,
    scratch,
    tiny_4bit,
    tiny_folder,
    tiny_model,
)
from helpers.diagnosis.reproductions.registry import fails, works


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
    return other_python(
        f"import sys; sys.path.insert(0, {str(folder)!r}); import utils; print(utils.rows, 'rows')"
    ).strip()


@fails("helpers-missing")
def _():
    return other_python("from helpers import models")


@works("helpers-missing")
def _():
    course = files.COURSE
    other_python_with_path = (
        f"import sys; sys.path.insert(0, {str(course)!r}); import helpers; print(helpers.__version__)"
    )
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
