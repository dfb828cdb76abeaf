"""Patches for auto-gptq 0.7.1. Each says what upstream assumed and what is true now, and returns what undoes it."""

import contextlib
import functools

from helpers.archived.patching import Undo, View, get, patch, provide, replace, state_dict, together


@patch(
    assumed="transformers.modeling_utils has no_init_weights.",
    now="it lives in transformers.initialization; without it the import fails.",
)
def no_init_weights() -> Undo | None:
    return provide("transformers.modeling_utils", no_init_weights=get("transformers.initialization", "no_init_weights"))


@patch(
    assumed="transformers.utils.hub passes on create_repo, create_commit and CommitOperationAdd.",
    now="only huggingface_hub has them; without them the import fails.",
)
def hub_functions() -> Undo | None:
    names = ("CommitOperationAdd", "create_commit", "create_repo")
    return provide("transformers.utils.hub", **{name: get("huggingface_hub", name) for name in names})


@patch(
    assumed="peft.peft_model has PEFT_TYPE_TO_MODEL_MAPPING.",
    now="peft.mapping keeps it as PEFT_TYPE_TO_TUNER_MAPPING; without it the import fails.",
)
def peft_model_mapping() -> Undo | None:
    return provide("peft.peft_model", PEFT_TYPE_TO_MODEL_MAPPING=get("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING"))


@patch(
    assumed="a decoder layer returns a tuple, whose [0] is its hidden states.",
    now="it returns the tensor itself, and [0] drops the batch axis. A hook makes it a tuple while the model is quantized.",
)
def layers_return_tensors() -> Undo | None:
    base = get("auto_gptq.modeling._base")
    upstream = base.BaseGPTQForCausalLM.quantize

    @functools.wraps(upstream)
    def quantize(self, *args, **kwargs):
        layers = base.get_module_by_name_prefix(self.model, self.layers_block_name)
        hooks = [
            layer.register_forward_hook(lambda _, __, out: out if isinstance(out, tuple) else (out,))
            for layer in layers
        ]
        try:
            return upstream(self, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    return replace(base.BaseGPTQForCausalLM, quantize=quantize)


@patch(
    assumed="transformers takes resume_download, use_auth_token and torch_dtype.",
    now="the first two are a TypeError and the third is called dtype; they are dropped and renamed on the way.",
)
def dead_arguments() -> Undo | None:
    base = get("auto_gptq.modeling._base")
    auto = base.AutoModelForCausalLM

    def alive(kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name not in ("resume_download", "use_auth_token")}
        return kwargs | ({"dtype": kwargs.pop("torch_dtype")} if "torch_dtype" in kwargs else {})

    from_pretrained = lambda *args, **kwargs: auto.from_pretrained(*args, **alive(kwargs))  # noqa: E731
    from_config = lambda *args, **kwargs: auto.from_config(*args, **alive(kwargs))  # noqa: E731
    return replace(base, AutoModelForCausalLM=View(auto, from_pretrained=from_pretrained, from_config=from_config))


@patch(
    assumed="nothing else runs in this process, so torch.nn.init's functions may be replaced, for good, by ones that do nothing.",
    now="a LoRA adapter made later in the same notebook would silently start from raw memory. They stay as they are.",
)
def initializers_stay() -> Undo | None:
    base = get("auto_gptq.modeling._base")
    return replace(base, torch=View(base.torch, nn=View(base.torch.nn, init=View(base.torch.nn.init))))


@patch(
    assumed="no two names share one tensor: each is cloned, saved, and loaded.",
    now="small models tie the output head to the embeddings, which would be in the checkpoint twice. Saved once, tied after loading.",
)
def tied_weights_are_saved_once() -> Undo | None:
    base = get("auto_gptq.modeling._base")
    upstream, modeling = base.BaseGPTQForCausalLM.save_quantized, base.accelerate.utils.modeling

    @functools.wraps(upstream)
    def save_quantized(self, *args, **kwargs):
        with state_dict(
            self.model,
            lambda tensors: {value.data_ptr(): (name, value) for name, value in reversed(tensors.items())}.values(),
        ):
            return upstream(self, *args, **kwargs)

    def load_checkpoint_in_model(model, *args, **kwargs):
        head = model.get_output_embeddings()
        if (
            head.weight is model.get_input_embeddings().weight
        ):  # accelerate would keep the name that is not in the file: untie first
            head.weight = base.torch.nn.Parameter(head.weight.detach().clone())
        modeling.load_checkpoint_in_model(model, *args, **kwargs)
        model.tie_weights()

    loading = View(modeling, load_checkpoint_in_model=load_checkpoint_in_model)
    accelerate = View(base.accelerate, utils=View(base.accelerate.utils, modeling=loading))
    return together(
        replace(base.BaseGPTQForCausalLM, save_quantized=save_quantized), replace(base, accelerate=accelerate)
    )


@patch(
    assumed="generate runs under autocast, which suits a float16 model on CUDA.",
    now="on a CPU, autocast means bfloat16 and stops at the first float16 tensor. There it is left out.",
)
def generate_on_cpu() -> Undo | None:
    base = get("auto_gptq.modeling._base")
    autocast = base.torch.amp.autocast
    choose = lambda device_type, **kwargs: (
        contextlib.nullcontext() if device_type == "cpu" else autocast(device_type, **kwargs)
    )  # noqa: E731
    return replace(base, torch=View(base.torch, amp=View(base.torch.amp, autocast=choose)))


@patch(
    assumed='there is a CUDA device: from_pretrained refuses without one, "cuda:0" and synchronize are written into the code.',
    now='GPTQ is arithmetic that a CPU does too. Where there is no CUDA, "cuda:0" stands for the CPU.',
)
def runs_without_cuda() -> Undo | None:
    base, utils, gptq = (
        get(f"auto_gptq.{name}") for name in ("modeling._base", "modeling._utils", "quantization.gptq")
    )
    torch = base.torch
    if torch.cuda.is_available():
        return None
    cuda = View(torch.cuda, is_available=lambda: True, synchronize=lambda *_: None)
    return together(
        replace(base, torch=View(torch, cuda=cuda), CUDA_0=torch.device("cpu")),
        replace(utils, CUDA_0=torch.device("cpu")),
        replace(gptq, torch=View(gptq.torch, cuda=cuda)),
    )


PATCHES = [
    no_init_weights, hub_functions, peft_model_mapping, layers_return_tensors, dead_arguments, initializers_stay,
    tied_weights_are_saved_once, generate_on_cpu, runs_without_cuda,
]  # fmt: skip
