"""What a model will need before it is loaded, counted from its config: nothing is downloaded, no weight is allocated.

Parameters are counted on a model on the meta device (shapes without data). The cache is counted by running that model for two
tokens, still without data, and by growing the cache layers that it built itself: windows, latents and recurrent states are then
what transformers really keeps, not what a formula expects.
"""

import copy
import functools
import inspect
import json
import re
from dataclasses import dataclass

SHIPPED = "shipped"
LIBRARIES = ("bitsandbytes", "torchao", "gptq", "awq")
ONLY_LAYERS = ("bitsandbytes", "torchao")  # they convert Linear modules; experts fused into one tensor stay in 16 bits
PROMPT = 2  # tokens of the run that shows what a cache layer holds


@dataclass(frozen=True)
class Prediction:
    """Bytes a model will need, by part. Notes say what a reader would otherwise take for granted."""

    weights: int  # the weights that the format quantizes: Linear layers, and experts where the library takes them
    scales: int  # their scales and zero points
    rest: int  # what stays as it is: embeddings, norms, output head, experts that a library leaves alone
    kv_cache: int  # keys, values, latents and recurrent states
    parameters: int  # count, not bytes
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> int:
        return self.weights + self.scales + self.rest

    @property
    def total(self) -> int:
        return self.model + self.kv_cache

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.model / self.parameters


@dataclass(frozen=True)
class Format:
    """How a matrix is stored. block: (rows, columns) that share a scale; None: one scale an output row."""

    bits: float
    group_size: int | None = None
    scale_bits: float = 16
    zero_bits: float = 0
    block: tuple[int, int] | None = None
    index_bits: int = 0  # of each input channel: GPTQ stores the group that it belongs to

    def scale_bytes(self, weight) -> float:
        if self.bits >= 16:
            return 0.0
        if self.block:
            rows, columns = (-(-size // block) for size, block in zip((weight.outputs, weight.inputs), self.block))
            groups = weight.count * rows * columns
        else:
            groups = weight.numel / (self.group_size or weight.inputs)
        return (groups * (self.scale_bits + self.zero_bits) + weight.count * weight.inputs * self.index_bits) / 8


@dataclass(frozen=True)
class Weight:
    """A matrix that can be quantized, or `count` of them fused into one tensor."""

    name: str
    numel: int
    inputs: int
    outputs: int
    count: int = 1
    fused: bool = False


@dataclass(frozen=True)
class Shape:
    """What was counted on the meta device."""

    model: str
    parameters: int
    weights: tuple[Weight, ...]
    notes: tuple[str, ...]


def predict(
    config, bits=SHIPPED, group_size=None, scale_bits=16, zero_bits=0, double_quant=False, rest_bits=16, context=0, batch=1, cache_bits=16, library=None
) -> Prediction:  # fmt: skip
    """Bytes a causal language model needs: weights + scales + cache, from its config alone (nothing is loaded).

    bits          of each quantized weight; 16 and 32 mean unquantized; "shipped": the format that the checkpoint's own
                  quantization_config names, 16 where it has none
    group_size    weights that share one scale; None: no scales (unquantized), or one per output row below 16 bits
    scale_bits    of each scale; 32 for bitsandbytes, 16 for GPTQ and AWQ
    zero_bits     of each zero point; 0 for symmetric formats
    double_quant  scales stored in 8 bits with one 32-bit scale per 256 of them (QLoRA, arXiv:2305.14314, section 3)
    rest_bits     of everything that is not quantized
    context       tokens in the cache, for each of `batch` sequences, `cache_bits` per number (states that the model keeps in
                  float32 whatever its dtype count 32)
    library       one of LIBRARIES. "bitsandbytes" and "torchao" leave fused experts in 16 bits; None: experts are quantized, as
                  GPTQ and AWQ do

    Raises ValueError, in one line, for what cannot be counted.
    """
    _check(bits, group_size, context, batch, library)
    config = _config(config)
    own = _own_format(config)
    shape = _shape(_key(config))
    notes = list(shape.notes)
    if bits == SHIPPED and own:
        choose, said = _checkpoint_format(own, config)
        dense = shape.parameters * rest_bits / 8e9
        notes += [text.format(dense=f"{dense:.1f} GB") for text in said]
    else:
        bits = 16 if bits == SHIPPED else bits
        scale = 8 + 32 / 256 if double_quant else scale_bits
        layout = Format(bits, group_size, scale, zero_bits)
        takes_experts = bits >= 16 or library not in ONLY_LAYERS
        choose = lambda weight: layout if takes_experts or not weight.fused else None  # noqa: E731
        if own:
            notes.append(_over_own_format(own, bits))
        notes += _about_experts(shape, bits, rest_bits, takes_experts)
    chosen = [(weight, stored) for weight in shape.weights if (stored := choose(weight))]
    if not chosen and bits != SHIPPED and bits < 16:
        raise ValueError(f"{shape.model} has no layers that this format would quantize: ask with bits=16")
    quantized = sum(weight.numel for weight, _ in chosen)
    cache = _cache_bytes(config, context, batch, cache_bits) if context and batch else 0
    return Prediction(
        weights=int(sum(weight.numel * stored.bits / 8 for weight, stored in chosen)),
        scales=int(sum(stored.scale_bytes(weight) for weight, stored in chosen)),
        rest=(shape.parameters - quantized) * rest_bits // 8,
        kv_cache=cache,
        parameters=shape.parameters,
        notes=tuple(notes),
    )


def _check(bits, group_size, context, batch, library):
    number = isinstance(bits, (int, float)) and not isinstance(bits, bool)
    if bits != SHIPPED and not (number and (2 <= bits <= 8 or bits in (16, 32))):
        raise ValueError(f"bits must be 2 to 8, 16 or 32, not {bits!r}")
    if group_size is not None and not group_size > 0:
        raise ValueError(f"group_size must be above 0 or None, got {group_size}")
    for name, value in {"context": context, "batch": batch}.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)} or None, not {library!r}")


def _config(config):
    """The config as an object; a dict with a model_type is taken as the content of a config.json."""
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(config, dict) and "model_type" in config:
        try:
            config = AutoConfig.for_model(**config)
        except ValueError as error:
            raise ValueError(f"transformers has no model of type {config['model_type']!r}: {_line(error)}") from error
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config must be a transformers config, such as AutoConfig.from_pretrained(name), not {type(config).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(config).__name__} is an encoder-decoder: only causal language models are counted here")
    return config


def _key(config):
    """Config class and content, hashable; without the checkpoint's own format, which changes no shape."""
    content = config.to_dict()
    content.pop("quantization_config", None)
    for part in content.values():
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    return type(config), json.dumps(content, sort_keys=True, default=str)


def _plain(key):
    kind, content = key
    return kind.from_dict(json.loads(content))


# --- parameters -----------------------------------------------------------------------------------------------------------------


def _build(config):
    """(model on the meta device, notes): what AutoModelForCausalLM loads, else the text part of a model of several kinds of input."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text = config.get_text_config(decoder=True)
    name = type(config).__name__
    # The text config on its own first: a class for images and text may tie what the text config does not.
    attempts = [(AutoModelForCausalLM, config), (AutoModelForCausalLM, text), (AutoModelForImageTextToText, config)]
    reasons = []
    for auto, asked in attempts:
        if type(asked) not in auto._model_mapping:
            continue
        try:
            with torch.device("meta"):
                model = auto.from_config(asked, dtype=torch.bfloat16).eval()
        except (ImportError, RuntimeError, TypeError, ValueError, AttributeError, KeyError, AssertionError, IndexError) as error:
            reasons.append(f"{type(error).__name__}: {_line(error)}")
            continue
        return model, _about_text(model, config, text, auto, asked)
    if reasons:
        raise ValueError(f"{name} does not describe a model that transformers can build ({reasons[0]}): look at its fields")
    raise ValueError(f"{name} (model_type {config.model_type!r}) is no causal language model that transformers knows: take another config")


def _about_text(model, config, text, auto, asked):
    if text is config:
        return []
    name = type(config).__name__
    if auto.__name__ != "AutoModelForCausalLM" or asked is text:
        return [f"{name} is a model of several kinds of input (vision-language and the like): this counts its text part only; AutoModelForCausalLM does not load the whole"]
    whole, part = (sum(p.numel() for p in parameters) for parameters in (model.parameters(), _text_parameters(model)))
    if part < whole:
        return [f"{name} has a part for other inputs: this counts all that AutoModelForCausalLM loads, {whole / 1e9:.2f} billion parameters, of which the text part has {part / 1e9:.2f}"]
    return [f"{name} is a model of several kinds of input: this counts its text part, which is all that AutoModelForCausalLM loads"]


def _text_parameters(model):
    """Parameters of the decoder and of its output head, each once."""
    head = model.get_output_embeddings()
    found = {id(p): p for module in (model.get_decoder(), head) if module is not None for p in module.parameters()}
    return found.values()


@functools.lru_cache(maxsize=64)
def _shape(key) -> Shape:
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.pytorch_utils import Conv1D

    config = _plain(key)
    model, notes = _build(config)
    whole = type(config) in AutoModelForImageTextToText._model_mapping and notes and "text part only" in notes[0]
    part = model.get_decoder() if whole else model
    parameters = _text_parameters(model) if whole else model.parameters()
    output = model.get_output_embeddings()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    weights, seen = [], set()
    for name, module in part.named_modules():
        if module is output:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or id(parameter) in embeddings:
                continue
            path = f"{name}.{own}"
            if own == "weight" and isinstance(module, torch.nn.Linear) and parameter.ndim == 2:
                weight = Weight(name, parameter.numel(), parameter.shape[1], parameter.shape[0])
            elif own == "weight" and isinstance(module, Conv1D):
                weight = Weight(name, parameter.numel(), parameter.shape[0], parameter.shape[1])
            elif parameter.ndim == 3 and "expert" in (path + type(module).__name__).lower():
                inputs, outputs = parameter.shape[1:] if getattr(module, "is_transposed", False) else reversed(parameter.shape[1:])
                weight = Weight(path, parameter.numel(), inputs, outputs, parameter.shape[0], fused=True)
            else:
                continue
            seen.add(id(parameter))
            weights.append(weight)
    return Shape(type(model).__name__, sum(p.numel() for p in parameters), tuple(weights), tuple(notes))


def _about_experts(shape, bits, rest_bits, taken):
    experts = sum(weight.numel for weight in shape.weights if weight.fused)
    if bits >= 16 or not experts:
        return []
    size = f"{experts / 1e9:.2f} billion weights lie in fused experts"
    if taken:
        return [f"{size}, which GPTQ and AWQ quantize; bitsandbytes (on transformers 5) and torchao leave them in {rest_bits} bits, {experts * rest_bits / 8e9:.1f} GB: ask with library="]
    return [f"{size}, which this library leaves in {rest_bits} bits, {experts * rest_bits / 8e9:.1f} GB; GPTQ and AWQ quantize them"]


# --- checkpoints with a format of their own -------------------------------------------------------------------------------------


def _own_format(config):
    """The checkpoint's quantization_config as a dict, or None. Nested configs may hold it."""
    for each in (config, config.get_text_config(decoder=True)):
        own = getattr(each, "quantization_config", None)
        if own:
            own = dict(own) if isinstance(own, dict) else own.to_dict()
            method = own.get("quant_method")
            if method is None and (own.get("load_in_4bit") or own.get("load_in_8bit")):
                method = "bitsandbytes"
            return {**own, "quant_method": str(getattr(method, "value", method))}
    return None


def _over_own_format(own, bits):
    method = own["quant_method"]
    if bits >= 16:
        return f"the checkpoint ships in {method}: this is its size once dequantized; leave bits out for its size as shipped"
    return f"the checkpoint ships in {method}, and a second format does not go on top: this counts a 16-bit copy that is quantized anew"


def _checkpoint_format(own, config):
    """(function: Weight -> Format or None, notes) for the formats that transformers loads and this module knows."""
    method = own["quant_method"]
    make = {
        "mxfp4": _mxfp4, "fp8": _fp8, "fbgemm_fp8": _fbgemm, "gptq": _gptq, "auto-round": _gptq, "awq": _awq,
        "bitsandbytes": _bitsandbytes, "compressed-tensors": _compressed,
    }.get(method)  # fmt: skip
    if make is None:
        raise ValueError(f"the checkpoint's own format {method!r} is not counted here: pass bits=, or add up its files")
    choose, notes = make(own)
    if getattr(config.get_text_config(decoder=True), "num_nextn_predict_layers", None):
        notes = [*notes, "the files may also hold layers that predict further tokens, which transformers does not load"]
    return choose, notes


def _kept(own, *keys):
    """The names that a quantization config excludes, as patterns."""
    return [pattern for key in keys for pattern in own.get(key) or ()]


def _skips(name, patterns):
    """Whether a module is excluded: as transformers reads these lists, with and without a leading "model."."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return any(not should_convert_module(each, patterns) for each in (name, f"model.{name}", name.removeprefix("model.")))


def _mxfp4(own):
    layout = Format(4, group_size=32, scale_bits=8)  # 4 bits and one power of two per 32 (OCP microscaling formats, 1.0)
    kept = _kept(own, "modules_to_not_convert")
    if own.get("dequantize"):
        return lambda weight: None, ["mxfp4 with dequantize=True: loaded in 16 bits, the files are a quarter of that"]
    notes = ["as shipped in mxfp4, and as loaded where triton >= 3.4 and the kernels package are (GPU of capability 7.5 on); else transformers dequantizes it to 16 bits: {dense}"]
    return lambda weight: layout if weight.fused and not _skips(weight.name, kept) else None, notes


def _fp8(own):
    block = own.get("weight_block_size", (128, 128))
    layout = Format(8, scale_bits=32, block=tuple(block)) if block else Format(8, scale_bits=0)
    kept = _kept(own, "modules_to_not_convert", "ignored_layers")
    notes = ["as shipped in fp8, and as loaded on a GPU of capability 8.9 on (4090, H100); elsewhere transformers dequantizes it to 16 bits: {dense}"]
    return lambda weight: None if _skips(weight.name, kept) else layout, notes


def _fbgemm(own):
    layout, kept = Format(8, scale_bits=32), _kept(own, "modules_to_not_convert")
    return lambda weight: None if _skips(weight.name, kept) else layout, ["as shipped in fp8 (fbgemm); it loads on GPUs of capability 9 on only (H100)"]


def _gptq(own):
    bits, group_size = own["bits"], own.get("group_size", 128)
    layout = Format(bits, None if group_size in (-1, None) else group_size, 16, zero_bits=bits, index_bits=32)
    rules = own.get("dynamic") or {}
    if any(not rule.startswith("-:") and changed for rule, changed in rules.items()):
        raise ValueError("the checkpoint gives its layers different bits (dynamic): add up its files instead")
    left_out = [rule.removeprefix("-:") for rule in rules if rule.startswith("-:")]
    kept = _kept(own, "modules_to_not_convert")
    only = [name for group in own.get("modules_in_block_to_quantize") or () for name in ([group] if isinstance(group, str) else group)]

    def choose(weight):
        if any(re.search(rule, weight.name) for rule in left_out) or _skips(weight.name, kept):
            return None
        return layout if not only or weight.fused or any(weight.name.endswith(name) for name in only) else None

    return choose, [f"as shipped in {own['quant_method']}, and as loaded with gptqmodel"]


def _awq(own):
    bits, group_size = own.get("bits", own.get("w_bit", 4)), own.get("group_size", own.get("q_group_size", 128))
    layout = Format(bits, None if group_size == -1 else group_size, 16, zero_bits=bits if own.get("zero_point", True) else 0)
    kept = _kept(own, "modules_to_not_convert")
    return lambda weight: None if _skips(weight.name, kept) else layout, ["as shipped in awq, and as loaded with gptqmodel"]


def _bitsandbytes(own):
    if own.get("load_in_4bit") or own.get("_load_in_4bit"):
        scale = 8 + 32 / 256 if own.get("bnb_4bit_use_double_quant") else 32
        layout = Format(4, 64, scale)
    else:
        layout = Format(8, scale_bits=32)
    kept = _kept(own, "llm_int8_skip_modules")
    notes = ["as shipped in bitsandbytes; fused experts stay in 16 bits, as bitsandbytes on transformers 5 leaves them"]
    return lambda weight: None if weight.fused or _skips(weight.name, kept) else layout, notes


def _compressed(own):
    layouts = []
    for group in (own.get("config_groups") or {}).values():
        scheme = group.get("weights")
        if not scheme:
            continue
        zero = 0 if scheme.get("symmetric", True) else scheme["num_bits"]
        strategy, size = scheme.get("strategy", "channel"), scheme.get("group_size")
        block = tuple(scheme["block_structure"]) if strategy == "block" and scheme.get("block_structure") else None
        floating = scheme.get("type") == "float" and scheme["num_bits"] == 4  # nvfp4 and mxfp4: scales of 8 bits
        grouped = size if strategy in ("group", "tensor_group") else None
        scale = 0 if strategy == "tensor" else 8 if floating else 16
        layouts.append((group.get("targets", ["Linear"]), Format(scheme["num_bits"], grouped, scale, zero, block)))
    if not layouts:
        raise ValueError("the checkpoint's compressed-tensors config names no format of weights: pass bits=, or add up its files")
    ignored = own.get("ignore") or []

    def choose(weight):
        if any(_targets(pattern, weight.name) for pattern in ignored):
            return None
        return next((layout for targets, layout in layouts if any(t == "Linear" or _targets(t, weight.name) for t in targets)), None)

    return choose, ["as shipped in compressed-tensors; transformers may decompress it to 16 bits on the first call: {dense}"]


def _targets(pattern, name):
    """compressed-tensors: "re:" and an expression, or the whole name."""
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


# --- cache ----------------------------------------------------------------------------------------------------------------------


def _cache_bytes(config, context, batch, cache_bits):
    """Bytes of the cache after `context` tokens of `batch` sequences, by the model's own cache layers."""
    numbers, as_they_are = _cache_numbers(_key(config), context)
    return batch * (numbers * cache_bits // 8 + as_they_are)


@functools.lru_cache(maxsize=512)
def _cache_numbers(key, context):
    """(numbers in the model's dtype, bytes of what is kept in another dtype) for one sequence."""
    import torch
    from transformers import cache_utils as parts

    layers, repeats = _cache_layers(key, PROMPT)
    known = {
        parts.DynamicLayer, parts.DynamicSlidingWindowLayer, parts.DynamicIndexedLayer, parts.LinearAttentionLayer, parts.DummyLayer,
        parts.LinearAttentionAndFullAttentionLayer, parts.LinearAttentionAndSlidingWindowAttentionLayer,
    }  # fmt: skip
    if all(type(layer) in known for layer in layers):
        layers = [_grown(layer, context) for layer in layers]
    else:  # a cache that compresses what it holds: let the model write all tokens
        layers, repeats = _cache_layers(key, context)
    tensors = [(tensor, times) for layer, times in zip(layers, repeats) for tensor in _tensors(layer)]
    plain = sum(times * tensor.numel() for tensor, times in tensors if tensor.dtype == torch.bfloat16)
    return plain, sum(times * tensor.nbytes for tensor, times in tensors if tensor.dtype != torch.bfloat16)


def _grown(layer, context):
    """The same layer after `context` tokens; recurrent and convolution states do not grow."""
    layer = copy.copy(layer)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or not keys.numel():
        return layer
    more = context - PROMPT  # prefixes that a model adds to the prompt are already in
    longer = [t.new_empty((*t.shape[:-2], max(0, t.shape[-2] + more), t.shape[-1])) for t in (keys, values)]
    layer.keys = layer.values = None
    layer.is_initialized = False
    layer.update(*longer)
    indexed = getattr(layer, "indexer_keys", None)
    if indexed is not None:
        layer.indexer_keys = indexed.new_empty((indexed.shape[0], max(0, indexed.shape[1] + more), indexed.shape[2]))
    return layer


def _tensors(value, seen=None):
    """Every tensor on the meta device that an object, list or dict holds, each once."""
    import torch

    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.is_meta and value.numel() > 1:
            yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each, seen)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each, seen)
    elif type(value).__module__.startswith("transformers") and not hasattr(value, "model_type"):
        yield from _tensors(vars(value), seen)


def _cache_layers(key, tokens):
    """(cache layers, how often each is there) after a run of the model over `tokens` tokens on the meta device."""
    config = _plain(key)
    model, _ = _build(config)
    name = type(model).__name__
    text = model.config.get_text_config(decoder=True)
    if not getattr(text, "use_cache", True):
        text.use_cache = True
    repeats = _skip_repeated_blocks(model, text)
    try:
        cache = _run(model, tokens)
    except Exception:  # a block needs another one's result: run them all
        if repeats is None:
            raise _no_cache(name) from None
        model, _ = _build(config)
        repeats = None
        try:
            cache = _run(model, tokens)
        except Exception as error:
            raise _no_cache(name) from error
    if cache is None:
        raise _no_cache(name)
    layers = getattr(cache, "layers", None)
    if not layers or vars(cache).keys() - {"layers", "layer_class_to_replicate"} and any(
        True for each, value in vars(cache).items() if each != "layers" for _ in _tensors(value)
    ):  # fmt: skip
        return [cache], [1]
    if repeats is None:
        return list(layers), [1] * len(layers)
    return [layers[index] for index in repeats], list(repeats.values())


def _no_cache(name):
    return ValueError(f"the cache of {name} cannot be counted without running it: ask with context=0 for its weights")


def _run(model, tokens):
    import torch

    with torch.inference_mode(), _without_data(), torch.device("meta"):
        ids = torch.zeros((1, tokens), dtype=torch.long)
        wanted = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        out = model(input_ids=ids, use_cache=True, **wanted)
    return next((out[name] for name in ("past_key_values", "cache_params", "state") if out.get(name) is not None), None)


def _skip_repeated_blocks(model, text):
    """Let one block of each kind run and the others repeat its answer: {index of the block: how many are of its kind}, or None.

    Kinds differ by class, by the shapes of their parameters, or by the layer of the cache that belongs to them.
    """
    from torch.nn import ModuleList
    from transformers import DynamicCache

    try:
        layers = DynamicCache(config=text).layers
    except Exception:
        return None
    blocks = next((m for m in (model.get_decoder() or model).children() if isinstance(m, ModuleList) and len(m) == len(layers)), None)
    if not blocks or getattr(text, "kv_sharing_modes", None) or len({id(block) for block in blocks}) < len(blocks):
        return None
    first, repeats, answers = {}, {}, {}
    for index, (block, layer) in enumerate(zip(blocks, layers)):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        kind = type(block), type(layer), getattr(layer, "sliding_window", None), shapes
        where = first.setdefault(kind, index)
        repeats[where] = repeats.get(where, 0) + 1
        block.forward = functools.partial(_repeat if where < index else _remember, answers, where, block.forward)
    return repeats


def _remember(answers, where, forward, *args, **kwargs):
    answers[where] = forward(*args, **kwargs)
    return answers[where]


def _repeat(answers, where, forward, *args, **kwargs):
    return answers[where]


def _without_data():
    """Answers for the few calls that ask a tensor for its content, which one on the meta device does not have.

    No expert is hit, checks hold, lengths are 0: the shapes of the cache depend on none of these.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    asked, nonzero = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default

    class WithoutData(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (asked, nonzero) and args[0].is_meta:
                if func is nonzero:
                    return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
                return True if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
            return func(*args, **(kwargs or {}))

    return WithoutData()


def _line(error):
    """The first line of an error's text, shortened."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 160 else text[:157] + "..."
