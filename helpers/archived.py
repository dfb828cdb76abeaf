"""Repairs for two archived packages that every tutorial still uses: auto-gptq 0.7.1 and autoawq 0.2.9.

    repair = archived.enable("auto-gptq")
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
    repair.applied   # what was changed, and why
    repair.undo()    # everything is upstream's again (or: `with archived.enable(...):`)

Nothing on disk is touched, and nothing happens before `enable` is called. Each patch is a function whose docstring says what
upstream assumed and what is true now; it returns the function that undoes it, or None where this machine does not need it.
"""

import contextlib
import functools
import importlib
import logging
import re
import warnings
from importlib import metadata

VERSIONS = {"auto-gptq": "0.7.1", "autoawq": "0.2.9"}
_MISSING = object()
_active = {}


class ArchivedError(ImportError):
    """The package is not installed, or not in the version that the patches were written for."""


class Repair:
    """The patches in force for one package. applied: list of (name, what upstream assumed, what is true now)."""

    def __init__(self, package):
        self.package, self.applied, self._undo = package, [], contextlib.ExitStack()

    def apply(self, patch):
        undo = patch()
        if undo is not None:
            self._undo.callback(undo)
            assumed, now = re.search(r"Assumed: (.*?)\s+Now: (.*)", " ".join(patch.__doc__.split())).groups()
            self.applied.append((patch.__name__, assumed, now))

    def undo(self):
        """Take every patch back, the last one first. Doing it twice changes nothing."""
        if _active.get(self.package) is self:
            del _active[self.package]
        self._undo.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()


def enable(package):
    """Import `package` ("auto-gptq" or "autoawq") with its patches in force; the `Repair`, the same one if it is in force already.

    Raises ArchivedError, before anything is changed, for a package that is not installed or has another version.
    """
    if package not in VERSIONS:
        raise ValueError(f"there are repairs for {' and '.join(VERSIONS)}, not for {package!r}")
    if package in _active:
        return _active[package]
    check_version(package)
    repair = Repair(package)
    try:
        with _quiet():  # at import, one says that it is archived, the other that it has no CUDA extension
            for patch in AUTO_GPTQ if package == "auto-gptq" else AUTOAWQ:
                repair.apply(patch)
    except BaseException:
        repair.undo()
        raise
    _active[package] = repair
    return repair


def check_version(package):
    """Raise ArchivedError unless `package` is installed in the version its patches were written for."""
    wanted = VERSIONS[package]
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ArchivedError(f"{package} is not installed. Its repair was written for {wanted}: pip install {package}=={wanted}") from None
    if version != wanted:
        raise ArchivedError(f"{package} {version} is installed, but its repair was written for {wanted}: pip install {package}=={wanted}")


# --- auto-gptq ------------------------------------------------------------------------------------------------------------------


def no_init_weights():
    """Assumed: transformers.modeling_utils has no_init_weights.
    Now: it lives in transformers.initialization; without it the import fails.
    """
    return _provide("transformers.modeling_utils", no_init_weights=_get("transformers.initialization", "no_init_weights"))


def hub_functions():
    """Assumed: transformers.utils.hub passes on create_repo, create_commit and CommitOperationAdd.
    Now: only huggingface_hub has them; without them the import fails.
    """
    names = ("CommitOperationAdd", "create_commit", "create_repo")
    return _provide("transformers.utils.hub", **{name: _get("huggingface_hub", name) for name in names})


def peft_model_mapping():
    """Assumed: peft.peft_model has PEFT_TYPE_TO_MODEL_MAPPING.
    Now: peft.mapping keeps it as PEFT_TYPE_TO_TUNER_MAPPING; without it the import fails.
    """
    return _provide("peft.peft_model", PEFT_TYPE_TO_MODEL_MAPPING=_get("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING"))


def layers_return_tensors():
    """Assumed: a decoder layer returns a tuple, whose [0] is its hidden states.
    Now: it returns the tensor itself, and [0] drops the batch axis. A hook makes it a tuple while the model is quantized.
    """
    base = _get("auto_gptq.modeling._base")
    upstream = base.BaseGPTQForCausalLM.quantize

    @functools.wraps(upstream)
    def quantize(self, *args, **kwargs):
        layers = base.get_module_by_name_prefix(self.model, self.layers_block_name)
        hooks = [layer.register_forward_hook(lambda _, __, out: out if isinstance(out, tuple) else (out,)) for layer in layers]
        try:
            return upstream(self, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    return _replace(base.BaseGPTQForCausalLM, quantize=quantize)


def dead_arguments():
    """Assumed: transformers takes resume_download, use_auth_token and torch_dtype.
    Now: the first two are a TypeError and the third is called dtype; they are dropped and renamed on the way.
    """
    base = _get("auto_gptq.modeling._base")
    auto = base.AutoModelForCausalLM

    def alive(kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name not in ("resume_download", "use_auth_token")}
        return kwargs | ({"dtype": kwargs.pop("torch_dtype")} if "torch_dtype" in kwargs else {})

    from_pretrained = lambda *args, **kwargs: auto.from_pretrained(*args, **alive(kwargs))  # noqa: E731
    from_config = lambda *args, **kwargs: auto.from_config(*args, **alive(kwargs))  # noqa: E731
    return _replace(base, AutoModelForCausalLM=_View(auto, from_pretrained=from_pretrained, from_config=from_config))


def initializers_stay():
    """Assumed: nothing else runs in this process, so torch.nn.init's functions may be replaced, for good, by ones that do nothing.
    Now: a LoRA adapter made later in the same notebook would silently start from raw memory. They stay as they are.
    """
    base = _get("auto_gptq.modeling._base")
    return _replace(base, torch=_View(base.torch, nn=_View(base.torch.nn, init=_View(base.torch.nn.init))))


def tied_weights_are_saved_once():
    """Assumed: no two names share one tensor: each is cloned, saved, and loaded.
    Now: small models tie the output head to the embeddings, which would be in the checkpoint twice. Saved once, tied after loading.
    """
    base = _get("auto_gptq.modeling._base")
    upstream, modeling = base.BaseGPTQForCausalLM.save_quantized, base.accelerate.utils.modeling

    @functools.wraps(upstream)
    def save_quantized(self, *args, **kwargs):
        with _state_dict(self.model, lambda tensors: {value.data_ptr(): (name, value) for name, value in reversed(tensors.items())}.values()):
            return upstream(self, *args, **kwargs)

    def load_checkpoint_in_model(model, *args, **kwargs):
        head = model.get_output_embeddings()
        if head.weight is model.get_input_embeddings().weight:  # accelerate would keep the name that is not in the file: untie first
            head.weight = base.torch.nn.Parameter(head.weight.detach().clone())
        modeling.load_checkpoint_in_model(model, *args, **kwargs)
        model.tie_weights()

    loading = _View(modeling, load_checkpoint_in_model=load_checkpoint_in_model)
    accelerate = _View(base.accelerate, utils=_View(base.accelerate.utils, modeling=loading))
    return _all(_replace(base.BaseGPTQForCausalLM, save_quantized=save_quantized), _replace(base, accelerate=accelerate))


def generate_on_cpu():
    """Assumed: generate runs under autocast, which suits a float16 model on CUDA.
    Now: on a CPU, autocast means bfloat16 and stops at the first float16 tensor. There it is left out.
    """
    base = _get("auto_gptq.modeling._base")
    autocast = base.torch.amp.autocast
    choose = lambda device_type, **kwargs: contextlib.nullcontext() if device_type == "cpu" else autocast(device_type, **kwargs)  # noqa: E731
    return _replace(base, torch=_View(base.torch, amp=_View(base.torch.amp, autocast=choose)))


def runs_without_cuda():
    """Assumed: there is a CUDA device: from_pretrained refuses without one, "cuda:0" and synchronize are written into the code.
    Now: GPTQ is arithmetic that a CPU does too. Where there is no CUDA, "cuda:0" stands for the CPU.
    """
    base, utils, gptq = (_get(f"auto_gptq.{name}") for name in ("modeling._base", "modeling._utils", "quantization.gptq"))
    torch = base.torch
    if torch.cuda.is_available():
        return None
    cuda = _View(torch.cuda, is_available=lambda: True, synchronize=lambda *_: None)
    return _all(
        _replace(base, torch=_View(torch, cuda=cuda), CUDA_0=torch.device("cpu")),
        _replace(utils, CUDA_0=torch.device("cpu")),
        _replace(gptq, torch=_View(gptq.torch, cuda=cuda)),
    )


AUTO_GPTQ = [
    no_init_weights, hub_functions, peft_model_mapping, layers_return_tensors, dead_arguments, initializers_stay,
    tied_weights_are_saved_once, generate_on_cpu, runs_without_cuda,
]  # fmt: skip


# --- autoawq --------------------------------------------------------------------------------------------------------------------


def weights_are_saved_before_the_search():
    """Assumed: v.cpu() copies, so that the scale search can put the weights back after each trial.
    Now: on a CPU it is the same tensor: every trial stays in the weights, and the model is silently ruined. Clones are saved.
    """
    quantizer = _get("awq.quantize.quantizer", "AwqQuantizer")
    upstream = quantizer._compute_best_scale

    @functools.wraps(upstream)
    def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args, **kwargs):
        with _state_dict(module2inspect, lambda tensors: ((name, value.clone()) for name, value in tensors.items())):
            return upstream(self, x, w_mean, x_mean, module2inspect, *args, **kwargs)

    return _replace(quantizer, _compute_best_scale=_compute_best_scale)


def long_samples_are_cut():
    """Assumed: calibration samples are short lines: those longer than max_calib_seq_len are dropped without a word.
    Now: samples are documents; they are cut into pieces instead, and a set too short for one window is a clear error.
    """
    quantizer = _get("awq.quantize.quantizer")
    upstream = quantizer.get_calib_dataset

    @functools.wraps(upstream)
    def get_calib_dataset(data="pileval", tokenizer=None, n_samples=128, max_seq_len=512, **kwargs):
        if isinstance(data, list):
            rows = [tokenizer.encode(row.strip()) if isinstance(row, str) else list(row) for row in data]
            data = [row[i : i + max_seq_len] for row in rows for i in range(0, len(row), max_seq_len)][:n_samples]
            have = sum(map(len, data))
            if have < max_seq_len:
                raise ValueError(f"the calibration set holds {have} tokens, fewer than one window of max_calib_seq_len={max_seq_len}")
        return upstream(data=data, tokenizer=tokenizer, n_samples=n_samples, max_seq_len=max_seq_len, **kwargs)

    return _replace(quantizer, get_calib_dataset=get_calib_dataset)


AUTOAWQ = [weights_are_saved_before_the_search, long_samples_are_cut]


# --- plumbing -------------------------------------------------------------------------------------------------------------------


class _View:
    """A module or class seen through a few replaced attributes, by one importer alone: the thing itself stays as it is."""

    def __init__(self, of, **replaced):
        self.__dict__.update(replaced, _of=of)

    def __getattr__(self, name):
        return getattr(self._of, name)


def _get(module, name=None):
    module = importlib.import_module(module)
    return module if name is None else getattr(module, name)


def _provide(module, **values):
    """As `_replace`, for those names only that the module does not have; None if it has them all."""
    values = {name: value for name, value in values.items() if not hasattr(_get(module), name)}
    return _replace(_get(module), **values) if values else None


def _replace(owner, **values):
    """Set attributes of a module or class; the function that puts back what was there."""
    before = {name: vars(owner).get(name, _MISSING) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)

    def undo():
        for name, value in before.items():
            delattr(owner, name) if value is _MISSING else setattr(owner, name, value)

    return undo


def _all(*undos):
    return lambda: [undo() for undo in reversed(undos)]


@contextlib.contextmanager
def _state_dict(module, change):
    """While it lasts, module.state_dict() gives `dict(change(tensors))`."""
    upstream = module.state_dict
    module.state_dict = lambda: dict(change(upstream()))
    try:
        yield
    finally:
        del module.state_dict


@contextlib.contextmanager
def _quiet():
    """No warnings and no log lines below errors, also where a module sets its own filters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True):
            yield
    finally:
        logging.disable(before)
