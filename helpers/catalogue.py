"""The errors a reader of this course meets, as data: how to recognize one, what causes it, what repairs it, where it is discussed.

Entries stand in the order of a reader's work: install, load, memory, generate, quantize, train, save, Colab and Jupyter. An entry is
either reproduced (helpers/reproductions.py raises it on the pinned versions and a test checks it) or recorded, with its source.
"""

from dataclasses import dataclass

TOPICS = ("install", "load", "memory", "generate", "quantize", "train", "save", "colab")


@dataclass(frozen=True)
class Pattern:
    """Regular expressions an error must fit: all of its type, a part of its message, a part of its frames. Empty: anything."""

    type: str = ""
    text: str = ""
    frames: str = ""


@dataclass(frozen=True)
class Entry:
    """One failure.

    id, topic, title  short name, part of TOPICS, one line
    patterns          any one of them recognizes it (variants are those of other library versions); none: it says nothing at all
    cause, remedy     sentences; code: the remedy as code or command
    reference         the thread, page or paper
    recorded          where the message is from if it cannot be provoked on a CPU with the pinned versions; empty: reproduced
    silent            nothing is raised: at most a line is printed
    general           a wide net: any other entry that fits comes first
    """

    id: str
    topic: str
    title: str
    patterns: tuple
    cause: str
    remedy: str
    reference: str
    code: str = ""
    recorded: str = ""
    silent: bool = False
    general: bool = False

    @property
    def origin(self):
        return f"recorded from {self.recorded}, not reproduced" if self.recorded else "reproduced by this course's tests"


def find(entry_id):
    """The entry with this id; KeyError names the id."""
    return BY_ID[entry_id]


TRANSFORMERS = "https://github.com/huggingface/transformers"
PEFT = "https://github.com/huggingface/peft"
BITSANDBYTES = "https://github.com/bitsandbytes-foundation/bitsandbytes"
AUTO_GPTQ = "https://github.com/AutoGPTQ/AutoGPTQ"
GPTQMODEL = "https://github.com/ModelCloud/GPTQModel"
PYTORCH = "https://github.com/pytorch/pytorch"
HF_DOCS = "https://huggingface.co/docs"
PIN = "pip install -r requirements.txt"
P = Pattern

ENTRIES = (
    # --- install ---
    Entry(
        "package-missing", "install", "A package is not installed in the Python that runs this",
        (P("ModuleNotFoundError|ImportError", r"No module named '(?!helpers\b)[\w.]+'"),),
        "The kernel's Python is not the one you installed into, or the package was never installed.",
        "Install into the kernel's own Python from within the notebook, then restart the kernel.",
        f"{TRANSFORMERS}/issues/25210",
        code="%pip install bitsandbytes   # %pip, not !pip: it is the kernel's\nimport sys; print(sys.executable)",
        general=True,
    ),
    Entry(
        "helpers-missing", "install", "The course's helpers cannot be imported",
        (P("ModuleNotFoundError", r"No module named 'helpers(\.\w+)?'"),),
        "The notebook was opened outside the course's checkout, and its first code cell did not run.",
        "Run the first code cell: it finds the checkout above the working directory, or fetches it (COURSE_SOURCE overrides where from).",
        "https://github.com/nlp-with-transformers/notebooks/issues/143",
        code="%env COURSE_SOURCE=https://github.com/...   # then run the bootstrap cell again",
    ),
    Entry(
        "bitsandbytes-missing", "install", "bitsandbytes or accelerate is not installed for this kernel",
        (
            P("ImportError", r"Using `?bitsandbytes`? (4-bit|8-bit)?.*requires"),
            P("ImportError", r"requires (the latest version of )?(bitsandbytes|[Aa]ccelerate)\b"),
            P("PackageNotFoundError", r"(No package metadata was found for )?(The '?)?bitsandbytes"),
        ),
        "A 4-bit or 8-bit config needs both. Older messages ask for 'the latest version' although the package is absent, or there is no GPU.",
        "Install both and restart the kernel, so that transformers looks again.",
        "https://github.com/huggingface/diffusers/issues/3194",
        code=PIN + "   # or: %pip install bitsandbytes accelerate",
    ),
    Entry(
        "optimum-missing", "install", "GPTQ and AWQ checkpoints need optimum and gptqmodel",
        (
            P("ImportError", r"Loading an? (GPTQ|AWQ) quantized model requires"),
            P("NameError", r"name 'QuantizeConfig' is not defined"),
            P("ImportError", r"[Gg]ptqmodel.*(not installed|is required|requires)"),
        ),
        "transformers leaves GPTQ to optimum, which leaves it to gptqmodel; with optimum alone the missing half shows as a NameError.",
        "Install both, in the pinned versions.",
        f"{HF_DOCS}/transformers/quantization/gptq",
        code="pip install optimum==2.3.0 gptqmodel==7.6.0",
    ),
    Entry(
        "pip-finds-no-version", "install", "pip has no such version for this Python",
        (P("", r"(No matching distribution found for|Could not find a version that satisfies the requirement) \S+"),),
        "The pin is older than your Python (torch 2.1 has no wheels for 3.12), or newer than what the index offers, or pip is offline.",
        "Use the course's pins, which were resolved together. Read the `from versions:` list: `none` means that no index was reached.",
        "https://pytorch.org/get-started/previous-versions/",
        code=PIN,
    ),
    Entry(
        "pip-conflict", "install", "pip cannot satisfy two packages at once",
        (P("", r"these package versions have conflicting dependencies|ResolutionImpossible"),),
        "Two requirements exclude each other, such as a guide's old pins beside today's packages.",
        "Install the pins that were resolved together, in an environment of their own.",
        "https://pip.pypa.io/en/latest/topics/dependency-resolution/",
        code="python -m venv .venv && .venv/bin/pip install -r requirements.txt",
    ),
    Entry(
        "torch-replaced", "install", "Installing a quantizer replaced torch",
        (
            P("", r"requires torch[=<>~!]\S+, but you have torch \S+ which is incompatible"),
            P("", r"operator torchvision::nms does not exist"),
        ),
        "gptqmodel 7.7 asks for torch>=2.14.1; an unpinned install upgrades torch under the running kernel and under torchvision.",
        "Pin gptqmodel, hold torch with a constraint, and restart the kernel.",
        f"{GPTQMODEL}/issues/2253",
        code='pip install gptqmodel==7.6.0 "torch==$(python -c \'import torch; print(torch.__version__)\')"',
        recorded="GPTQModel issue 2253",
    ),
    Entry(
        "auto-gptq-import", "install", "auto-gptq does not import on transformers 5",
        (
            P("ImportError", r"cannot import name '(no_init_weights|create_commit|create_repo|CommitOperationAdd|PEFT_TYPE_TO_MODEL_MAPPING)'"),
        ),
        "auto-gptq is archived; it imports names that transformers and peft have moved since.",
        "Use gptqmodel, its successor. To run an old tutorial, put the names back first, as notebook 05 does.",
        f"{TRANSFORMERS}/pull/41567",
        code="from helpers import archived\nwith archived.enable('auto-gptq'):\n    from auto_gptq import AutoGPTQForCausalLM",
    ),
    Entry(
        "auto-gptq-wants-cuda", "install", "auto-gptq refuses to work without CUDA",
        (P("OSError|EnvironmentError", r"requires CUDA available"),),
        "It checks for CUDA before it quantizes or loads, although its arithmetic runs on a CPU.",
        "Use gptqmodel, or the patches that notebook 05 applies.",
        f"{AUTO_GPTQ}/issues/249",
        code="from helpers import archived\narchived.enable('auto-gptq')",
        recorded="this course's own run with the import repaired and nothing else (auto-gptq 0.7.1)",
    ),
    Entry(
        "auto-gptq-build", "install", "auto-gptq does not build",
        (P("", r"Building cuda extension requires PyTorch"), P("", r"CUDA extension not installed")),
        "Only Python up to 3.11 has wheels. pip builds in isolation, where there is no torch.",
        "Skip the CUDA extension, or do not install it at all: gptqmodel is its successor.",
        f"{AUTO_GPTQ}/issues/339",
        code="BUILD_CUDA_EXT=0 pip install auto-gptq==0.7.1",
        recorded="AutoGPTQ issues 339, 249 and 751",
    ),
    Entry(
        "autoawq-import", "install", "autoawq does not import on this transformers",
        (P("ImportError", r"cannot import name 'PytorchGELUTanh'"),),
        "autoawq is archived (last tested with transformers 4.51). Some later transformers no longer have the activation it imports; 5.23 has.",
        "Quantize with gptqmodel, or use the versions pinned here.",
        f"{PEFT}/issues/2827",
        code="pip uninstall autoawq   # peft imports it whenever it is there",
        recorded="peft issue 2827 (transformers 4.57)",
    ),
    Entry(
        "torch-without-cuda", "install", "This torch has no CUDA, or finds no GPU",
        (
            P("AssertionError", r"Torch not compiled with CUDA enabled"),
            P("RuntimeError|AcceleratorError", r"Found no NVIDIA driver|No CUDA GPUs are available|CUDA driver version is insufficient|driver on your system is too old"),
            P("RuntimeError", r"No GPU found\. A GPU is needed for quantization|GPU is required to quantize"),
        ),
        "A CPU build of torch was installed, the machine has no GPU, the Colab runtime is set to CPU, or the driver is older than the build.",
        "Write the device once and use it everywhere. On Colab: Runtime > Change runtime type > GPU.",
        "https://pytorch.org/get-started/locally/",
        code='import torch\nprint(torch.__version__, torch.version.cuda, torch.cuda.is_available())\ndevice = "cuda" if torch.cuda.is_available() else "cpu"',
    ),
    Entry(
        "bitsandbytes-without-gpu", "install", "An old bitsandbytes that knows no CPU",
        (P("", r"compiled without GPU support"), P("AttributeError", r"'NoneType' object has no attribute 'c(adam|get_managed|quantize|dequantize)\w*'")),
        "Versions before 0.43 load an empty library where they find no CUDA and fail at the first kernel; 0.49 and later run on a CPU.",
        "Upgrade bitsandbytes; on a GPU check that torch itself sees CUDA.",
        f"{BITSANDBYTES}/issues/853",
        code='pip install bitsandbytes==0.50.2\npython -c "import torch; print(torch.version.cuda)"',
        recorded="bitsandbytes issues 853, 719 and 680",
    ),
    Entry(
        "bitsandbytes-cuda-mismatch", "install", "bitsandbytes has no library for this CUDA or GPU",
        (
            P("", r"No compatible CUDA library found|libbitsandbytes_cuda\w+\.so[^\n]*(not found|cannot open|No such file)"),
            P("", r"no kernel image is available for execution on the device"),
        ),
        "Its binary must match torch's CUDA, and the GPU must be one that the build knows.",
        "Install a matching build, or name one it carries.",
        f"{HF_DOCS}/bitsandbytes/errors",
        code="export BNB_CUDA_VERSION=128   # or LD_LIBRARY_PATH to the right CUDA",
        recorded="the page on errors in bitsandbytes' documentation",
    ),
    Entry(
        "gptqmodel-workers", "install", "gptqmodel asks for more workers than it gives itself",
        (P("", r"Virtual pool '[\w:]+' requests \d+ workers? but parent"),),
        "On two cores its own rule leaves one worker for a pool that wants two.",
        "Set the number before gptqmodel is imported (the course's helpers do).",
        GPTQMODEL,
        code='import os\nos.environ["GPTQMODEL_CPU_WORKERS"] = "2"\nimport gptqmodel',
        recorded="this course's own run on two cores (gptqmodel 7.6.0)",
    ),
    Entry(
        "gptqmodel-kernel-download", "install", "gptqmodel wants to download a kernel's sources",
        (P("URLError", r"", r"(?i)machete|cutlass|gptqmodel"), P("", r"(?i)(machete|cutlass).*(urlopen|URLError|download)")),
        "On Hopper GPUs it prefers its Machete kernel, which it compiles from CUTLASS, fetched at first use.",
        "Name a backend that is there.",
        f"{GPTQMODEL}/pull/1597",
        code='from gptqmodel import BACKEND, GPTQModel\nmodel = GPTQModel.load(folder, backend=BACKEND.TRITON)',
        recorded="this course's own run on an H100 without internet (gptqmodel 7.6.0)",
    ),
    Entry(
        "no-quantized-engine", "install", "torch has no engine for its quantized layers here",
        (P("RuntimeError", r"quantized engine NoQEngine|NoQEngine|Didn't find engine for operation quantized::"),),
        "torch.ao's int8 layers need FBGEMM, x86, oneDNN or QNNPACK; builds for Apple silicon start with none selected.",
        "Select one of the engines the build has, or use torchao, which needs none.",
        "https://github.com/pytorch/tutorials/issues/1895",
        code='import torch\ntorch.backends.quantized.engine = "qnnpack"   # on a Mac',
    ),
    # --- load ---
    Entry(
        "load-in-4bit", "load", "load_in_4bit is no argument of from_pretrained any more",
        (P("TypeError", r"unexpected keyword argument '(load_in_(4|8)bit|bnb_4bit_\w+|llm_int8_\w+)'"),),
        "transformers 5 removed the shortcut; the model's class receives the argument and refuses it.",
        "Put it into a quantization config.",
        f"{TRANSFORMERS}/pull/41287",
        code="config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.bfloat16)\nmodel = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)",
    ),
    Entry(
        "cast-quantized", "load", "A quantized model cannot be cast to another dtype",
        (
            P("ValueError", r"You cannot cast a (bitsandbytes|GPTQ|\w+) model in a new `?dtype`?"),
            P("ValueError", r"`?\.(half|float|bfloat16)\(\)`? is not supported for (quantized|`?4-bit)"),
        ),
        "Its weights are packed integers; a cast would turn codes into numbers.",
        "Choose the dtype when loading: dtype= for the layers left alone, bnb_4bit_compute_dtype= for the multiplication.",
        f"{TRANSFORMERS}/issues/38717",
        code="AutoModelForCausalLM.from_pretrained(name, quantization_config=config, dtype=torch.float16)",
    ),
    Entry(
        "move-8bit", "load", "An 8-bit model cannot be moved by .cuda() (before transformers 5: no quantized one by .to())",
        (
            P("ValueError", r"Calling `cuda\(\)` is not supported for `(4|8)-bit`"),
            P("ValueError", r"`?\.to`? is not supported for `?4-bit`? or `?8-bit`?"),
            P("ValueError", r"has been loaded with `?accelerate`? and therefore cannot be moved"),
        ),
        "The library placed the weights when it loaded them. transformers 5 allows .to(device) for 4 bits; .cuda() on 8 bits still raises.",
        "Give the device when loading.",
        f"{BITSANDBYTES}/issues/547",
        code='AutoModelForCausalLM.from_pretrained(name, quantization_config=config, device_map={"": 0})',
    ),
    Entry(
        "four-and-eight-bit", "load", "Four and eight bits at once",
        (P("ValueError", r"load_in_4bit and load_in_8bit are both True"),),
        "The config can hold one width.",
        "Leave one of them out.",
        f"{HF_DOCS}/transformers/quantization/bitsandbytes",
        code="BitsAndBytesConfig(load_in_4bit=True)",
    ),
    Entry(
        "dtype-name", "load", "torch has no dtype of this name",
        (P("AttributeError", r"module 'torch' has no attribute '(bf16|fp16|fp32|b?f16|f32|float4|int4|half16|\w*float\w*)'"),),
        "A dtype given as text is looked up in torch, which says bfloat16 and float16, not bf16 and fp16.",
        "Write torch's name, or pass the dtype itself.",
        "https://docs.pytorch.org/docs/stable/tensor_attributes.html",
        code="BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)",
    ),
    Entry(
        "quant-type-name", "load", "bitsandbytes knows nf4 and fp4, nothing else",
        (
            P("RuntimeError", r"issues during automatic conversion of the weights", r"(?i)from_pretrained"),
            P("NotImplementedError|ValueError", r"4-bit quantization data type \w+ is not implemented"),
        ),
        "bnb_4bit_quant_type is not checked until the first weight is quantized. The real message stands in the load report above the error.",
        'Use "nf4" (or "fp4").',
        f"{HF_DOCS}/transformers/quantization/bitsandbytes",
        code='BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
    ),
    Entry(
        "two-quantization-configs", "load", "A second quantization config for a quantized checkpoint",
        (P("ValueError", r"The model is quantized with \w+ but you are passing a \w+"),),
        "The checkpoint says in its config.json how it was quantized; another method cannot be put on top.",
        "Leave quantization_config out, or start from the full-precision model.",
        f"{HF_DOCS}/transformers/quantization/overview",
        code="AutoModelForCausalLM.from_pretrained(folder)   # its own config.json says how",
    ),
    Entry(
        "awq-on-plain-weights", "load", "transformers loads AWQ, it does not quantize with it",
        (P("ValueError", r"does require the model to be pre-quantized"),),
        "AWQ needs calibration; transformers only reads checkpoints that another tool has made.",
        "Quantize with gptqmodel first (notebook 06), or load a checkpoint that is AWQ already.",
        f"{HF_DOCS}/transformers/quantization/awq",
        code="from gptqmodel import GPTQModel\nfrom gptqmodel.quantization import AWQConfig   # notebook 06",
    ),
    Entry(
        "torchao-config-as-text", "load", "TorchAoConfig takes a config object, not its name",
        (P("ValueError", r"String-based quantization type '\w+' is no longer supported"),),
        "Names such as 'int8_weight_only' were replaced by torchao's own config classes.",
        "Pass the object.",
        f"{HF_DOCS}/transformers/quantization/torchao",
        code="from torchao.quantization import Int8WeightOnlyConfig\nTorchAoConfig(Int8WeightOnlyConfig())",
    ),
    Entry(
        "remote-code", "load", "The checkpoint brings its own Python code",
        (P("ValueError", r"contains custom code which must be executed"),),
        "Its config names classes in files of the repository. Running them is running a stranger's program.",
        "Prefer an architecture that transformers has. If you must, read the code, and pin the revision you have read.",
        f"{HF_DOCS}/transformers/custom_models",
        code='AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, revision="<commit you have read>")',
    ),
    Entry(
        "unknown-architecture", "load", "This transformers does not know the architecture",
        (P("ValueError|KeyError", r"has model type `[\w-]+` but Transformers does not recognize this architecture"),),
        "The model is younger than the installed transformers, or model_type in config.json is wrong.",
        "Upgrade in a new environment: gptqmodel and peft must fit the new version too.",
        f"{HF_DOCS}/transformers/installation",
        code="python -m venv new && new/bin/pip install --upgrade transformers",
    ),
    Entry(
        "folder-without-config", "load", "The folder has no config.json",
        (P("ValueError", r"Unrecognized model in .* Should have a `model_type` key"), P("OSError", r"does not appear to have a file named config\.json")),
        "An empty or half-written folder, the parent of the right one, or an adapter's folder (adapter_config.json).",
        "Look into it. An adapter is loaded with peft, on top of its base model.",
        f"{HF_DOCS}/transformers/main_classes/configuration",
        code="import os; print(os.listdir(folder))",
    ),
    Entry(
        "folder-without-weights", "load", "The folder has no weights",
        (P("OSError", r"Error no file named (model\.safetensors|pytorch_model\.bin)"),),
        "Saving was interrupted, or only the config and tokenizer were copied or downloaded.",
        "Save or download again.",
        f"{HF_DOCS}/transformers/main_classes/model",
        code="hf download <name> --local-dir folder",
    ),
    Entry(
        "folder-that-is-not-there", "load", "Not a folder, and not a name of the hub either",
        (
            P("OSError|HFValidationError", r"Repo id must be in the form|Repo id must use alphanumeric"),
            P("OSError", r"is not a local folder and is not a valid model identifier"),
            P("OSError", r"Incorrect path_or_model_id"),
        ),
        "A path that does not exist is taken for a hub name. Relative paths start at the kernel's working directory.",
        "Print the absolute path and see whether it is there.",
        f"{HF_DOCS}/transformers/installation",
        code="from pathlib import Path\nprint(Path(folder).resolve(), Path(folder).is_dir())",
    ),
    Entry(
        "damaged-safetensors", "load", "A safetensors file is cut off, or no safetensors file at all",
        (P("SafetensorError|Exception", r"Error while deserializing header|HeaderTooLarge|HeaderTooSmall|MetadataIncompleteBuffer|incomplete metadata|InvalidHeaderDeserialization"),),
        "`incomplete metadata`: the download broke off. `header too large`: it is a web page or a git-lfs pointer of 130 bytes.",
        "Compare its size with the repository's; delete it and download again (git clone needs git-lfs).",
        "https://github.com/codefuse-ai/MFTCoder/issues/20",
        code="ls -l model.safetensors\nhf download <name> --force-download",
    ),
    Entry(
        "pickle-refused", "load", "torch.load refuses to run code from a file",
        (P("UnpicklingError", r"Weights only load failed|Unsupported global"),),
        "Since torch 2.6 torch.load reads tensors only. The file holds Python objects, and unpickling those can run any code.",
        "Get the weights as safetensors, or save a state dict. weights_only=False only for a file you made yourself.",
        "https://docs.pytorch.org/docs/stable/notes/serialization.html",
        code="torch.save(model.state_dict(), file)\nmodel.load_state_dict(torch.load(file, weights_only=True))",
    ),
    Entry(
        "sizes-do-not-match", "load", "The checkpoint's tensors have other sizes than the model",
        (
            P("RuntimeError", r"You set `ignore_mismatched_sizes` to `False`"),
            P("RuntimeError", r"\A(?![\s\S]*quant_state\.bitsandbytes)[\s\S]*size mismatch for [\w.]+: copying a param with shape"),
        ),
        "config.json and weights belong to different models; often the vocabulary, after tokens were added.",
        "Load with the checkpoint's own config and resize afterwards. Do not ignore it: the weights would be random.",
        f"{HF_DOCS}/transformers/main_classes/model",
        code="model.resize_token_embeddings(len(tokenizer))",
    ),
    Entry(
        "weights-made-up", "load", "Weights missing from the checkpoint were made up",
        (P("", r"newly initialized because missing from the checkpoint|were not initialized from the model checkpoint"),),
        "The model loads, and some of its weights are random numbers: layers or names differ from the checkpoint's.",
        "Ask for the loading report and refuse missing keys.",
        f"{HF_DOCS}/transformers/main_classes/model",
        code="model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)\nassert not info['missing_keys'], info['missing_keys']",
        silent=True,
    ),
    Entry(
        "meta-tensor", "load", "Weights that exist in name only",
        (P("NotImplementedError", r"Cannot copy out of meta tensor"),),
        "The model was built on the meta device (shapes without data), or parts of it lie on disk and are moved by hand.",
        "Load it with from_pretrained and its device_map; do not move a dispatched model.",
        "https://docs.pytorch.org/docs/stable/meta.html",
        code='AutoModelForCausalLM.from_pretrained(name, device_map={"": 0})   # no .to() afterwards',
    ),
    Entry(
        "hub-offline", "load", "The hub cannot be reached and the model is not in the cache",
        (
            P("OSError|ConnectionError", r"We couldn't connect to 'https?://"),
            P("LocalEntryNotFoundError|OfflineModeIsEnabled", r"\A(?![\s\S]*X-Repo-Commit)[\s\S]*(outgoing traffic has been disabled|An error happened while trying to locate|offline mode is enabled)"),
            P("ConnectError|ConnectTimeout|MaxRetryError|NameResolutionError", r""),
        ),
        "No internet, a firewall, or HF_HUB_OFFLINE=1.",
        "Use a local folder, or the course's offline model.",
        f"{HF_DOCS}/transformers/installation#offline-mode",
        code='model = "smollm2-offline"   # in the parameters cell: the default model from PyPI',
    ),
    Entry(
        "gated-model", "load", "The model is gated",
        (
            P("GatedRepoError|OSError", r"(?i)gated repo"),
            P("OSError|HfHubHTTPError", r"(?i)access to model \S+ is restricted|you are not in the authorized list"),
        ),
        "Its owner wants its terms accepted, and the download must carry the token of the account that accepted them.",
        "Accept on the model's page, then log in. Or take a model that is open.",
        f"{HF_DOCS}/hub/models-gated",
        code="hf auth login   # or: export HF_TOKEN=...",
    ),
    Entry(
        "bad-token", "load", "The hub refuses the token",
        (
            P("HfHubHTTPError|HTTPError|OSError|RepositoryNotFoundError|HTTPStatusError", r"(?i)Invalid credentials in Authorization header|Invalid user token|User Access Token .* is expired"),
            P("HfHubHTTPError|HTTPError|OSError|HTTPStatusError", r"(?i)Invalid username or password"),  # as RepositoryNotFoundError: no such repository
            P("LocalTokenNotFoundError", r""),
        ),
        "A wrong, expired or revoked token. It is sent for open models too, and then even those are refused.",
        "Make a new read token, or send none.",
        f"{HF_DOCS}/hub/security-tokens",
        code="hf auth logout; unset HF_TOKEN   # enough for open models\nhf auth login",
    ),
    Entry(
        "token-with-newline", "load", "The token carries a line end or a blank",
        (P("LocalProtocolError|ValueError|InvalidHeader", r"(?i)(Illegal|Invalid) header value|Invalid leading whitespace, reserved character"),),
        "It was read from a file with its line end, or is empty. The message shows the token: do not post it.",
        "Strip it. If you have posted it, revoke it.",
        f"{HF_DOCS}/hub/security-tokens",
        code='token = open("token.txt").read().strip()',
    ),
    Entry(
        "no-such-model", "load", "The hub has no such repository, file or revision, or you may not see it",
        (
            P("RepositoryNotFoundError", r"Repository Not Found|404"),
            P("RevisionNotFoundError|EntryNotFoundError|RemoteEntryNotFoundError", r""),
        ),
        "A typing error, a model that was renamed or deleted, or a private one: without a token the hub answers the same for all three "
        "(401, 'Invalid username or password').",
        "Open the name in a browser: https://huggingface.co/<name>.",
        f"{HF_DOCS}/huggingface_hub/quick-start#authentication",
        code="hf models info <name>",
    ),
    Entry(
        "not-the-hub", "load", "Something else answers in the hub's place",
        (P("LocalEntryNotFoundError|FileMetadataError|OSError", r"(?s)missing the 'X-Repo-Commit' header|Distant resource does not seem to be on huggingface\.co"),),
        "A login page, a proxy or a mirror answers, or HF_ENDPOINT points to something that is no hub.",
        "Open the address in a browser, log in to the network, or correct HF_ENDPOINT.",
        f"{HF_DOCS}/huggingface_hub/package_reference/environment_variables",
        code="unset HF_ENDPOINT; curl -I https://huggingface.co",
    ),
    # --- memory ---
    Entry(
        "cuda-out-of-memory", "memory", "The GPU's memory is full",
        (P("OutOfMemoryError|RuntimeError|AcceleratorError", r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"),),
        "Weights, KV cache, activations and what an earlier cell still holds exceed the card. Only `reserved but unallocated` is fragmentation.",
        "Restart the kernel first. Then: fewer bits, batch 1, shorter context, gradient checkpointing.",
        "https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management",
        code='del model; import gc; gc.collect(); torch.cuda.empty_cache()\n# fragmentation only: PYTORCH_ALLOC_CONF=expandable_segments:True, before torch is imported',
        recorded="PyTorch issue 16417, with the newer wording of later comments",
    ),
    Entry(
        "ram-exhausted", "memory", "The computer's memory cannot give this much",
        (P("RuntimeError", r"DefaultCPUAllocator: (can't allocate memory|not enough memory)"), P("MemoryError|ArrayMemoryError|_ArrayMemoryError", r"")),
        "One tensor alone is larger than what is free: float32 instead of bfloat16, a batch or context too long, or a wrong shape.",
        "Compare the bytes in the message with what you expected; predict a model's size before loading it.",
        "https://huggingface.co/docs/transformers/big_models",
        code="from helpers import memory\nprint(memory.predict(config, bits=4, group_size=64).total / 1e9, 'GB of', memory.free_ram() / 1e9)",
    ),
    Entry(
        "process-killed", "memory", "The system killed the process: out of memory",
        (
            P("CalledProcessError|ProcessExitedException", r"SIGKILL|exit (status|code) (-9|137)"),
            P("DeadKernelError", r"(?i)kernel died"),
            P("", r"(?i:kernel (appears to have|has) died)|(?m:^Killed$)|exit(ed with)? code:? 137|Your session crashed after using all available RAM"),
        ),
        "Linux ends the largest process when memory runs out; Python cannot say anything any more. No traceback is the sign.",
        "Use a smaller model or fewer bits, load in bfloat16, close other notebooks: each kernel keeps its models.",
        "https://github.com/nteract/papermill/issues/478",
        code="python -m helpers doctor   # what is free, and what the course needs",
    ),
    Entry(
        "disk-full", "memory", "The disk is full",
        (P("OSError|SafetensorError|RuntimeError", r"No space left on device|[Dd]isk quota exceeded"),),
        "Checkpoints and the hub's cache add up: a 7B model is 14 GB in 16 bits, and downloads stay.",
        "Look what lies in the cache; move it to a larger disk.",
        f"{HF_DOCS}/huggingface_hub/guides/manage-cache",
        code="hf cache ls\nexport HF_HOME=/larger/disk/hf COURSE_CACHE=/larger/disk/course",
    ),
    Entry(
        "modules-on-cpu-or-disk", "memory", "A quantized model that does not fit the device",
        (P("ValueError", r"Some modules are dispatched on the CPU or the disk"),),
        'device_map="auto" found too little memory for all of it, and 4-bit layers stay on one device unless you allow offloading.',
        "Free memory, or put everything on one device and see the plain shortage.",
        f"{HF_DOCS}/transformers/quantization/bitsandbytes#offloading",
        code='AutoModelForCausalLM.from_pretrained(name, quantization_config=config, device_map={"": 0})',
    ),
    Entry(
        "spilled-to-disk", "memory", "device_map put a part of the model on the disk",
        (P("", r"Some parameters are on the meta device because they were offloaded to the (disk|cpu)"),),
        'device_map="auto" does not fail when memory is short: it offloads to RAM, then to disk, and every token reads it from there.',
        "Look at hf_device_map after loading; give one device to fail instead of crawling.",
        f"{HF_DOCS}/accelerate/concept_guides/big_model_inference",
        code="assert not {'cpu', 'disk'} & set(map(str, model.hf_device_map.values())), model.hf_device_map",
        silent=True,
    ),
    Entry(
        "loaded-twice", "memory", "The old model is still there while the new one loads",
        (),
        "`model = from_pretrained(...)` in a second run builds the new model before the name lets go of the old one; so do other names, "
        "Jupyter's Out[...] and the last traceback.",
        "Delete every name for it first; after an error, restart the kernel.",
        "https://docs.pytorch.org/docs/stable/notes/faq.html",
        code="model = None\nimport gc; gc.collect()\nif torch.cuda.is_available(): torch.cuda.empty_cache()",
        silent=True,
    ),
    # --- generate ---
    Entry(
        "no-padding-token", "generate", "The tokenizer has no padding token",
        (P("ValueError", r"Asking to pad but the tokenizer does not have a padding token|Using pad_token, but it is not set yet"),),
        "Mistral and Llama were trained without one, and a batch of different lengths needs one.",
        "For generation use the end token, padded on the left: the mask hides it. For training add a token of its own.",
        "https://github.com/mlabonne/llm-course/issues/33",
        code='tokenizer.pad_token = tokenizer.eos_token\ntokenizer.padding_side = "left"',
    ),
    Entry(
        "lengths-differ", "generate", "Prompts of different lengths make no tensor",
        (P("ValueError", r"Unable to create tensor, you should probably activate truncation and/or padding"),),
        "return_tensors needs rows of one length.",
        "Pad on the left for generation.",
        f"{HF_DOCS}/transformers/pad_truncation",
        code='tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")',
    ),
    Entry(
        "no-chat-template", "generate", "The tokenizer has no chat template",
        (P("ValueError", r"Cannot use chat template functions because tokenizer\.chat_template is not set|Cannot use apply_chat_template"),),
        "It belongs to a base model, which was never trained on conversations.",
        "Take the instruct version; an invented template gives worse answers, silently.",
        f"{HF_DOCS}/transformers/chat_templating",
        code='AutoTokenizer.from_pretrained("mistralai/Mistral-7B-Instruct-v0.3")',
    ),
    Entry(
        "roles-must-alternate", "generate", "The chat template refuses these roles",
        (P("TemplateError|UndefinedError|ValueError", r"Conversation roles must alternate|System role not supported|Only user,? (and )?assistant|roles? must alternate"),),
        "Mistral's first templates know user and assistant only, in turn; a system message or two users in a row are refused.",
        "Put the system text in front of the first user turn.",
        "https://github.com/microsoft/autogen/issues/1037",
        code="from helpers import chat\nids = chat.render(tokenizer, messages)   # folds the system message where the template refuses it",
    ),
    Entry(
        "batch-encoding-as-ids", "generate", "A whole BatchEncoding was passed where ids belong",
        (
            P("AttributeError", r"\A\Z", r"tokenization_utils_base.*__getattr__"),
            P("KeyError", r"^'shape'$"),
            P("TypeError", r"must be Tensor, not BatchEncoding"),
        ),
        "Since transformers 5 apply_chat_template returns a dict-like BatchEncoding, as the tokenizer itself always did. "
        "generate() takes it for a tensor and asks for its shape; the error has no text.",
        "Unpack it.",
        f"{TRANSFORMERS}/pull/42567",
        code="inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt')\nmodel.generate(**inputs)",
    ),
    Entry(
        "different-devices", "generate", "Model and inputs are on different devices",
        (P("RuntimeError", r"Expected all tensors to be on the same device|[Tt]ensor on device \w+(:\d+)? is not on the expected device"),),
        "The tokenizer makes its tensors on the CPU; the model is on the GPU, or a part of it is somewhere else.",
        "Move the inputs to where the model is.",
        "https://docs.pytorch.org/docs/stable/notes/cuda.html",
        code='inputs = tokenizer(prompt, return_tensors="pt").to(model.device)',
    ),
    Entry(
        "unused-model-kwargs", "generate", "generate() got an argument that nobody uses",
        (P("ValueError", r"The following `model_kwargs` are not used by the model"),),
        "A typing error, or a field of the tokenizer's output that this model does not take, such as token_type_ids.",
        "Correct the name, or drop the field.",
        f"{HF_DOCS}/transformers/main_classes/text_generation",
        code='inputs.pop("token_type_ids", None)',
    ),
    Entry(
        "prompt-longer-than-max-length", "generate", "max_length counts the prompt too",
        (P("ValueError", r"Input length of input_ids is \d+, but `max_length` is set to \d+"),),
        "The prompt alone is longer than max_length (its old default is 20).",
        "Say how many new tokens you want.",
        f"{HF_DOCS}/transformers/main_classes/text_generation",
        code="model.generate(**inputs, max_new_tokens=128)",
    ),
    Entry(
        "beyond-the-context", "generate", "Prompt and answer are longer than the model's context",
        (
            P("", r"exceeded the model's predefined maximum length"),
            P("", r"Token indices sequence length is longer than the specified maximum sequence length"),
        ),
        "Positions that it never saw in training: the answer degrades, without an error.",
        "Shorten the prompt: keep the newest turns.",
        f"{HF_DOCS}/transformers/llm_tutorial",
        code="room = model.config.max_position_embeddings - max_new_tokens\nids = ids[:, -room:]   # or chat.ChatSession, which drops whole turns",
        silent=True,
    ),
    Entry(
        "probabilities-not-finite", "generate", "The model's output holds inf or nan",
        (P("RuntimeError", r"probability tensor contains either `?inf`?,? ?`?nan`? or element < 0"), P("", r"device-side assert triggered[\s\S]*probability tensor|Assertion `probability tensor")),
        "An activation overflowed float16, or the quantized weights are broken. do_sample=False hides it and answers nonsense.",
        "Compute in bfloat16 or float32; test the logits; if they are still not finite, the checkpoint is broken.",
        "https://github.com/casper-hansen/AutoAWQ/issues/458",
        code="assert model(**inputs).logits.isfinite().all()\nAutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)",
    ),
    Entry(
        "token-id-outside", "generate", "A token id that the model has no embedding for",
        (
            P("IndexError", r"index out of range in self"),
            P("", r"(?s)(Indexing|indexSelect)\w*.*Assertion `srcIndex < srcSelectDimSize` failed|vectorized_gather_kernel.*Assertion"),
        ),
        "Tokenizer and model do not belong together, or tokens were added and the embeddings were not resized.",
        "Load both from one folder; after adding tokens, resize. On a GPU it shows as a device-side assert.",
        f"{HF_DOCS}/transformers/main_classes/model",
        code="assert len(tokenizer) <= model.get_input_embeddings().num_embeddings\nmodel.resize_token_embeddings(len(tokenizer))",
    ),
    Entry(
        "quantized-cache-backend", "generate", "The quantized KV cache wants another package",
        (P("ImportError", r"You need to install (optimum-quanto|hqq|`?HQQ`?|quanto)\b.*(cache|KV)"),),
        "The default backend of the quantized cache is optimum-quanto, which the course does not install.",
        "Use the backend that needs nothing, or install it.",
        f"{HF_DOCS}/transformers/kv_cache",
        code='model.generate(**inputs, cache_implementation="quantized", cache_config={"backend": "fp8"})',
    ),
    Entry(
        "right-padding", "generate", "A batch padded on the right",
        (P("", r"right-padding was detected"),),
        "Generation goes on after the last position, so the padding stands between prompt and answer. The answers differ, without an error.",
        "Pad on the left.",
        f"{TRANSFORMERS}/issues/34658",
        code='tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")',
        silent=True,
    ),
    Entry(
        "double-bos", "generate", "Two BOS tokens in front of the prompt",
        (P("", r"(?i)double bos|detected duplicate leading \"?<s>"),),
        "The chat template writes a BOS into the text, and the tokenizer puts another in front. Nothing warns.",
        "Let the template make the ids, or tokenize its text without special tokens.",
        f"{TRANSFORMERS}/issues/37686",
        code="ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)\n# or: tokenizer(text, add_special_tokens=False)",
        silent=True,
    ),
    Entry(
        "never-stops", "generate", "A fine-tuned model that does not stop",
        (),
        "Training used the end token as padding, and padding is masked in the labels: the end was never learned.",
        "Give padding a token of its own before training.",
        "https://github.com/huggingface/trl/issues/976",
        code='tokenizer.add_special_tokens({"pad_token": "<pad>"})\nmodel.resize_token_embeddings(len(tokenizer))',
        silent=True,
    ),
    # --- quantize ---
    Entry(
        "group-size", "quantize", "group_size does not divide the layer's inputs",
        (
            P("AssertionError", r"Expecting input size at \d+ dimension: \d+ to be divisible by block_size"),
            P("ValueError|AssertionError|NotImplementedError", r"in_features \(?\d*\)? ?% group_size|in_features.*divisible by.*group_size|org_w_shape.*multiple|% group_size|w\.shape\[-1\] % self\.group_size"),
        ),
        "Weights are grouped along the inputs. SmolLM2's 576 is 4.5 x 128: the usual 128 fits Mistral-7B, not every small model.",
        "Take 64 or 32.",
        f"{GPTQMODEL}/issues/328",
        code="group_size = next(g for g in (128, 64, 32) if model.config.hidden_size % g == 0 and model.config.intermediate_size % g == 0)",
    ),
    Entry(
        "qat-base-config", "quantize", "torchao has no QAT for this config",
        (P("ValueError", r"Unexpected base config"),),
        "QATConfig fakes the formats it can convert to: 4-bit weights, with or without int8 activations. int8 weights are not among them.",
        "Use a base config that it supports.",
        "https://github.com/pytorch/ao/tree/main/torchao/quantization/qat",
        code="QATConfig(Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)), step='prepare')",
    ),
    Entry(
        "int4-packing-needs-mslk", "quantize", "torchao's packed int4 needs a GPU package",
        (P("ImportError", r"Requires mslk\b|Requires fbgemm-gpu-genai"),),
        "Int4WeightOnlyConfig packs for a CUDA kernel by default; the kernel lives in a package of its own.",
        "On a CPU use IntxWeightOnlyConfig; on a GPU install the package or choose another packing format.",
        "https://github.com/pytorch/ao",
        code="from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_\nquantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))",
    ),
    Entry(
        "embedding-qconfig", "quantize", "One qconfig for the whole model includes the embeddings",
        (P("AssertionError", r"Embedding quantization is only supported with float_qparams_weight_only_qconfig"),),
        "torch.ao converts embeddings too, and those want a qconfig of their own.",
        "Take the embeddings out, or use torchao's QATConfig.",
        f"{PYTORCH}/issues/87187",
        code="model.get_input_embeddings().qconfig = None",
    ),
    Entry(
        "quantized-op-on-floats", "quantize", "A quantized layer was given float tensors, or stands on the wrong device",
        (P("NotImplementedError|RuntimeError", r"Could not run 'quantized::\w+' with arguments from the '\w+' backend"),),
        "Statically quantized layers want quantized inputs; and torch.ao's int8 layers run on a CPU only.",
        "Wrap the model in quantize and dequantize stubs, or use dynamic quantization; on a GPU use torchao.",
        f"{PYTORCH}/issues/90986",
        code="model = torch.ao.quantization.QuantWrapper(model)   # before prepare",
    ),
    Entry(
        "dynamic-int8-on-half", "quantize", "torch.ao's dynamic int8 wants float32 activations",
        (P("RuntimeError", r"expected scalar type Float but found (Half|BFloat16)"),),
        "quantize_dynamic was applied to a float16 or bfloat16 model.",
        "Convert to float32 first.",
        "https://github.com/huggingface/peft/issues/1515",
        code="quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)",
    ),
    Entry(
        "torch-ao-deprecated", "quantize", "torch.ao.quantization is deprecated",
        (P("", r"torch\.ao\.quantization is deprecated"),),
        "It still works in torch 2.13; its successor is torchao.",
        "Nothing breaks today. For new code use torchao.",
        "https://github.com/pytorch/ao/issues/2259",
        code="from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_\nquantize_(model, Int8DynamicActivationInt8WeightConfig())",
        silent=True,
    ),
    Entry(
        "fx-trace", "quantize", "FX cannot trace this model",
        (
            P("ValueError", r"code: co_varnames is too small"),
            P("TraceError", r"symbolically traced variables cannot be used as inputs to control flow"),
        ),
        "prepare_fx rewrites the model's code; the forward of a transformers model has branches and decorators that it cannot follow.",
        "Use torchao, which swaps weights and traces nothing.",
        f"{TRANSFORMERS}/issues/29923",
        code="from torchao.quantization import quantize_",
    ),
    Entry(
        "hessian-not-positive-definite", "quantize", "GPTQ's Hessian is not positive-definite",
        (P("_?LinAlgError|RuntimeError|AcceleratorError", r"(linalg\.)?cholesky.*(not positive-definite|singular)|leading minor of order \d+ is not positive"),),
        "Fewer calibration tokens than input channels, or a channel that is always zero.",
        "More and longer calibration text; a larger damp_percent.",
        f"{AUTO_GPTQ}/issues/98",
        code="QuantizeConfig(bits=4, group_size=64, damp_percent=0.05)",
    ),
    Entry(
        "not-implemented-for-half", "quantize", "This operation does not exist in 16 bits on this device",
        (P("RuntimeError|NotImplementedError", r"\"\w+\" not implemented for '(Half|BFloat16|Char|Int)'"),),
        "CPU kernels are missing for some dtypes: linear algebra everywhere, matrix products in torch before 2.2.",
        "Do this step in float32.",
        f"{TRANSFORMERS}/issues/27769",
        code="hessian = hessian.float()   # or load with dtype=torch.float32 / torch.bfloat16",
    ),
    Entry(
        "empty-calibration-set", "quantize", "No calibration sample was short enough",
        (P("ValueError|RuntimeError|NotImplementedError", r"expected a non-empty list of Tensors"),),
        "autoawq drops every sample longer than max_calib_seq_len, without a word, and then joins what is left: nothing.",
        "Cut long texts into pieces first.",
        "https://github.com/casper-hansen/AutoAWQ",
        code="pieces = [text[i : i + 2000] for i in range(0, len(text), 2000)]",
    ),
    Entry(
        "bits-not-supported", "quantize", "This number of bits does not exist in the format",
        (P("ValueError", r"Only support quantization to \[[\d,\s]+\] bits|only support quantize to \[?[\d,\s]+\]? bits"),),
        "GPTQ packs 2, 3, 4 or 8 bits into 32.",
        "Use 4 (or 8).",
        "https://arxiv.org/abs/2210.17323",
        code="GPTQConfig(bits=4, group_size=64)",
    ),
    Entry(
        "float32-compute", "quantize", "4-bit weights that are multiplied in float32",
        (P("", r"bnb_4bit_compute_dtype=torch\.float32 \(default\)\. This will lead to slow"),),
        "float32 is the default of bnb_4bit_compute_dtype. It is right, and slow on a GPU, and the warning comes for half inputs only.",
        "Name the dtype.",
        f"{BITSANDBYTES}/pull/2077",
        code="BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)",
        silent=True,
    ),
    Entry(
        "autoawq-garbage-on-cpu", "quantize", "autoawq ruins the model on a CPU",
        (),
        "Its search saves the weights with v.cpu(), which copies on a GPU only: on a CPU every trial stays in the weights.",
        "Clone them (helpers.archived does), or use gptqmodel. Always measure a quantized model before you keep it.",
        "https://github.com/casper-hansen/AutoAWQ",
        code="from helpers import archived\narchived.enable('autoawq')   # before quantizing",
        silent=True,
    ),
    # --- train ---
    Entry(
        "training-purely-quantized", "train", "Quantized weights cannot be trained",
        (P("ValueError", r"You cannot perform fine-tuning on purely quantized models"),),
        "4-bit codes have no gradient; Trainer refuses a quantized model without adapters.",
        "Attach LoRA adapters (notebook 07).",
        f"{HF_DOCS}/transformers/peft",
        code="model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(task_type='CAUSAL_LM'))",
    ),
    Entry(
        "nothing-requires-grad", "train", "Nothing in the model requires a gradient",
        (P("RuntimeError", r"element 0 of tensors does not require grad and does not have a grad_fn"),),
        "Everything is frozen: no adapters, adapters loaded for inference, or gradient checkpointing that cuts the graph.",
        "Look what is trainable before the first step.",
        f"{PEFT}/issues/2742",
        code="model.print_trainable_parameters()\nPeftModel.from_pretrained(model, folder, is_trainable=True)",
    ),
    Entry(
        "checkpointing-cuts-gradients", "train", "Gradient checkpointing cuts the gradients off",
        (P("", r"None of the inputs have requires_grad=True"),),
        "With use_reentrant=True the inputs of a block must require gradients; a frozen embedding's output does not.",
        "Use the non-reentrant kind, the default of transformers 5.",
        f"{TRANSFORMERS}/issues/42489",
        code='model.gradient_checkpointing_enable({"use_reentrant": False})\n# older: model.enable_input_require_grads()',
        silent=True,
    ),
    Entry(
        "unscale-fp16-gradients", "train", "Trainable weights are in float16",
        (P("ValueError", r"Attempting to unscale FP16 gradients"),),
        "Mixed precision keeps the weights it trains in float32; here the adapters were loaded in float16.",
        "Cast what is trainable to float32, or train in bfloat16.",
        f"{HF_DOCS}/peft/developer_guides/troubleshooting",
        code="for p in model.parameters():\n    if p.requires_grad: p.data = p.data.float()",
    ),
    Entry(
        "matrices-differ-in-dtype", "train", "Two matrices of different dtypes",
        (P("RuntimeError", r"(mat1 and mat2|m1 and m2) (must|to) have the same dtype|expected (mat1 and mat2|m1 and m2) to have the same dtype"),),
        "float32 adapters or norms meet 16-bit weights outside autocast.",
        "Use autocast, or load everything in one dtype.",
        "https://github.com/hiyouga/LLaMA-Factory/issues/4432",
        code='with torch.autocast(device, dtype=torch.bfloat16):\n    model.generate(**inputs)',
    ),
    Entry(
        "target-modules", "train", "No layer has the name that LoRA looks for",
        (P("ValueError|NoMatchingPeftModuleError", r"Target modules .* not found in the base model|Please specify `target_modules`"),),
        "Names differ between architectures: c_attn is GPT-2's; Llama and Mistral say q_proj, k_proj, v_proj.",
        "Print the names, or take every Linear layer.",
        f"{HF_DOCS}/peft/developer_guides/lora",
        code='LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")',
    ),
    Entry(
        "merge-into-4bit", "train", "An adapter merged into 4-bit weights is rounded",
        (P("", r"Merge lora module to (4|8)-bit linear may get different generations due to rounding errors"),),
        "The merged weight is quantized again, and the adapter's small changes are smaller than the steps between the levels.",
        "Merge into the full-precision base, then quantize again.",
        f"{PEFT}/issues/2321",
        code="base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)\nPeftModel.from_pretrained(base, adapter).merge_and_unload()",
        silent=True,
    ),
    Entry(
        "adapter-twice", "train", "A second adapter on a model that has one",
        (P("", r"You are trying to modify a model with PEFT for a second time"),),
        "The cell ran twice: get_peft_model changes the model it is given, and the first adapter is still inside.",
        "Unload the first, or load the base model again.",
        f"{HF_DOCS}/peft/developer_guides/troubleshooting",
        code="model = model.unload()",
        silent=True,
    ),
    Entry(
        "training-argument-renamed", "train", "Trainer's arguments have new names",
        (
            P("TypeError", r"(TrainingArguments|Trainer|SFTTrainer|SFTConfig)\.__init__\(\) got an unexpected keyword argument '\w+'"),
            P("TypeError", r"__init__\(\) got an unexpected keyword argument '(evaluation_strategy|tokenizer|max_seq_length|no_cuda)'"),
        ),
        "transformers 5 removed names that were deprecated before: evaluation_strategy is eval_strategy, tokenizer is processing_class.",
        "Use the new name.",
        f"{TRANSFORMERS}/pull/41131",
        code='TrainingArguments(output_dir, eval_strategy="steps")\nTrainer(model, args, processing_class=tokenizer)',
    ),
    Entry(
        "bf16-needs-a-gpu", "train", "bf16=True without a GPU",
        (P("ValueError", r"Your setup doesn't support bf16|fp16 mixed precision requires a GPU|bf16 mixed precision requires"),),
        "TrainingArguments looks for a GPU that can do bfloat16 (Ampere or later) unless it is told to use the CPU.",
        "Say use_cpu=True here; on a T4 use fp16=True.",
        f"{HF_DOCS}/transformers/perf_train_cpu",
        code="TrainingArguments(output_dir, bf16=True, use_cpu=not torch.cuda.is_available())",
    ),
    Entry(
        "rows-of-different-length", "train", "Training rows of different lengths make no batch",
        (
            P("RuntimeError", r"stack expects each tensor to be equal size"),
            P("ValueError", r"^expected sequence of length \d+ at dim \d+ \(got \d+\)"),
        ),
        "The default collator stacks rows; it does not pad.",
        "Use a collator that pads and masks the padding in the labels.",
        f"{HF_DOCS}/transformers/main_classes/data_collator",
        code="DataCollatorForLanguageModeling(tokenizer, mlm=False)",
    ),
    Entry(
        "learns-nothing", "train", "A 4-bit model that was used on a CPU learns nothing afterwards",
        (P("", r"bitsandbytes::\w+: an autograd kernel was not registered"),),
        "On CPUs with AVX512-BF16 the first forward pass in eval mode repacks the weights for inference; they pass no gradient on. "
        "Adapters on q and v learn nothing, adapters everywhere only in part, without an error.",
        "Load the model again, then attach the adapter and train, before any generate or evaluation.",
        f"{BITSANDBYTES}/pull/1804",
        code="model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)   # fresh\nmodel = get_peft_model(model, lora).train()",
        silent=True,
    ),
    # --- save ---
    Entry(
        "save-dynamic-int8", "save", "save_pretrained on a torch.ao int8 model",
        (P("AttributeError", r"'torch\.dtype' object has no attribute '(data_ptr|numel)'"),),
        "Its packed layers keep tuples and dtypes in the state dict; save_pretrained expects tensors only.",
        "Save the state dict and rebuild the model, or quantize through TorchAoConfig.",
        f"{PYTORCH}/issues/87843",
        code="torch.save(model.state_dict(), file)\nmodel = quantize_dynamic(fresh, {nn.Linear}, dtype=torch.qint8)\nmodel.load_state_dict(torch.load(file, weights_only=True))",
    ),
    Entry(
        "save-torchao", "save", "save_pretrained after quantize_",
        (P("RuntimeError", r"Attempted to access the data pointer on an invalid python storage"),),
        "quantize_ puts tensor subclasses into the model, and its config does not know: nothing tells save_pretrained how to write them.",
        "Quantize while loading, through TorchAoConfig; that model saves and loads.",
        f"{HF_DOCS}/transformers/quantization/torchao",
        code="config = TorchAoConfig(Int8WeightOnlyConfig())\nmodel = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)\nmodel.save_pretrained(folder)",
    ),
    Entry(
        "tensors-share-memory", "save", "safetensors refuses tensors that share memory",
        (P("RuntimeError", r"Some tensors share memory|shared tensors"),),
        "Tied embeddings: lm_head and embed_tokens are one tensor, and save_file would write it twice.",
        "Use save_pretrained, or safetensors' save_model.",
        f"{HF_DOCS}/safetensors/torch_shared_tensors",
        code="model.save_pretrained(folder)",
    ),
    Entry(
        "tensor-not-contiguous", "save", "safetensors wants contiguous tensors",
        (P("ValueError", r"You are trying to save a non contiguous tensor"),),
        "A transposed or sliced view; its numbers do not lie in order.",
        "Make a contiguous copy.",
        f"{HF_DOCS}/safetensors/api/torch",
        code="save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)",
    ),
    Entry(
        "4bit-state-dict-in-plain-model", "save", "A 4-bit state dict was loaded into an unquantized model",
        (P("RuntimeError", r"(?s)Error\(s\) in loading state_dict.*quant_state\.bitsandbytes__|Unexpected key\(s\) in state_dict:.*\.absmax"),),
        "Quantized layers save codes, absmax and quant_map, which plain Linear layers do not know.",
        "save_pretrained and from_pretrained: the config.json beside the weights says how they are quantized.",
        f"{HF_DOCS}/transformers/quantization/bitsandbytes",
        code="model.save_pretrained(folder)\nAutoModelForCausalLM.from_pretrained(folder)",
    ),
    Entry(
        "adapter-config-missing", "save", "No adapter in this folder",
        (P("ValueError|OSError", r"Can't find 'adapter_config\.json'"),),
        "It holds a whole model, or a Trainer checkpoint's parent, not an adapter.",
        "Point to the folder with adapter_config.json; a merged model is loaded with transformers.",
        f"{HF_DOCS}/peft/developer_guides/checkpoint",
        code="PeftModel.from_pretrained(base, folder)   # holds adapter_config.json and adapter_model.safetensors",
    ),
    Entry(
        "dtype-in-json", "save", "A dtype cannot be written as JSON",
        (P("TypeError", r"Object of type (dtype|bfloat16|Tensor|float32|int64) is not JSON serializable"),),
        "Settings and results hold torch objects; JSON knows numbers and text.",
        "Write the dtype's name, and .item() of a tensor.",
        "https://docs.python.org/3/library/json.html",
        code='json.dumps({"dtype": str(dtype).removeprefix("torch.")})',
    ),
    # --- colab and jupyter ---
    Entry(
        "cell-not-run", "colab", "A cell above was not run",
        (P("NameError", r"name '\w+' is not defined"),),
        "The kernel was restarted, or cells ran out of order: the name exists in the notebook, not in the kernel.",
        "Run > Restart kernel and run all cells.",
        "https://jupyterlab.readthedocs.io/en/stable/user/notebook.html",
        general=True,
    ),
    Entry(
        "running-event-loop", "colab", "asyncio.run inside a notebook",
        (P("RuntimeError", r"asyncio\.run\(\) cannot be called from a running event loop|This event loop is already running"),),
        "Jupyter's cells run inside an event loop already.",
        "Await it.",
        "https://ipython.readthedocs.io/en/stable/interactive/autoawait.html",
        code="await main()",
    ),
    Entry(
        "numpy-replaced", "colab", "numpy was replaced under packages that are in use",
        (
            P("ValueError|RuntimeWarning", r"numpy\.(dtype|ndarray|ufunc) size changed, may indicate binary incompatibility"),
            P("", r"A module that was compiled using NumPy 1\.x cannot be run in"),
        ),
        "An install changed numpy (gptqmodel 7.6 pins 2.2.6) after Colab had imported it, or a package was built for the other major version.",
        "Install first, then restart the runtime, then import.",
        "https://github.com/googlecolab/colabtools/issues/5238",
        code="# Runtime > Restart session, then run all cells",
        recorded="colabtools issue 5238",
    ),
    Entry(
        "widget-state-missing", "colab", "GitHub shows \"Invalid Notebook\"",
        (P("", r"(?i)the 'state' key is missing from 'metadata\.widgets'"),),
        "A notebook was saved with widgets (a progress bar is enough) and without their state.",
        "Clear the widget metadata before committing.",
        "https://github.com/huggingface/cookbook/issues/310",
        code="jupyter nbconvert --clear-output --inplace notebook.ipynb   # or drop metadata.widgets",
        recorded="huggingface/cookbook issue 310",
    ),
)
BY_ID = {entry.id: entry for entry in ENTRIES}
