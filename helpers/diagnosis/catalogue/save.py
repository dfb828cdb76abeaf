"""Failures while weights are saved."""

from helpers.diagnosis.catalogue.base import HF_DOCS, PYTORCH, Entry, P

ENTRIES = (
    Entry(
        "save-dynamic-int8", "save", "save_pretrained on a torch.ao int8 model",
        (P("AttributeError", r"'torch\.dtype' object has no attribute '(data_ptr|numel)'"),),
        "Its packed layers keep tuples and dtypes in the state dict; save_pretrained expects tensors only.",
        "Save the state dict and rebuild the model, or quantize through TorchAoConfig.",
        f"{PYTORCH}/issues/87843",
        code="torch.save(model.state_dict(), file)\nmodel = quantize_dynamic(fresh, {nn.Linear}, dtype=torch.qint8)\nmodel.load_state_dict(torch.load(file, weights_only=True))",
        where="transformers safetensors huggingface_hub",
    ),
    Entry(
        "save-torchao", "save", "save_pretrained after quantize_",
        (P("RuntimeError", r"Attempted to access the data pointer on an invalid python storage"),),
        "quantize_ puts tensor subclasses into the model, and its config does not know: nothing tells save_pretrained how to write them.",
        "Quantize while loading, through TorchAoConfig; that model saves and loads.",
        f"{HF_DOCS}/transformers/quantization/torchao",
        code="config = TorchAoConfig(Int8WeightOnlyConfig())\nmodel = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)\nmodel.save_pretrained(folder)",
        where="compiled",
    ),
    Entry(
        "tensors-share-memory", "save", "safetensors refuses tensors that share memory",
        (P("RuntimeError", r"Some tensors share memory|shared tensors"),),
        "Tied embeddings: lm_head and embed_tokens are one tensor, and save_file would write it twice.",
        "Use save_pretrained, or safetensors' save_model.",
        f"{HF_DOCS}/safetensors/torch_shared_tensors",
        code="model.save_pretrained(folder)",
        where="safetensors transformers",
    ),
    Entry(
        "tensor-not-contiguous", "save", "safetensors wants contiguous tensors",
        (P("ValueError", r"You are trying to save a non contiguous tensor"),),
        "A transposed or sliced view; its numbers do not lie in order.",
        "Make a contiguous copy.",
        f"{HF_DOCS}/safetensors/api/torch",
        code="save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)",
        where="safetensors transformers",
    ),
    Entry(
        "4bit-state-dict-in-plain-model", "save", "A 4-bit state dict was loaded into an unquantized model",
        (P("RuntimeError", r"(?s)Error\(s\) in loading state_dict.*quant_state\.bitsandbytes__|Unexpected key\(s\) in state_dict:.*\.absmax"),),
        "Quantized layers save codes, absmax and quant_map, which plain Linear layers do not know.",
        "save_pretrained and from_pretrained: the config.json beside the weights says how they are quantized.",
        f"{HF_DOCS}/transformers/quantization/bitsandbytes",
        code="model.save_pretrained(folder)\nAutoModelForCausalLM.from_pretrained(folder)",
        where="torch",
    ),
    Entry(
        "adapter-config-missing", "save", "No adapter in this folder",
        (P("ValueError|OSError", r"Can't find 'adapter_config\.json'"),),
        "It holds a whole model, or a Trainer checkpoint's parent, not an adapter.",
        "Point to the folder with adapter_config.json; a merged model is loaded with transformers.",
        f"{HF_DOCS}/peft/developer_guides/checkpoint",
        code="PeftModel.from_pretrained(base, folder)   # holds adapter_config.json and adapter_model.safetensors",
        where="peft",
    ),
    Entry(
        "dtype-in-json", "save", "A dtype cannot be written as JSON",
        (P("TypeError", r"Object of type (dtype|bfloat16|Tensor|float32|int64) is not JSON serializable"),),
        "Settings and results hold torch objects; JSON knows numbers and text.",
        "Write the dtype's name, and .item() of a tensor.",
        "https://docs.python.org/3/library/json.html",
        code='json.dumps({"dtype": str(dtype).removeprefix("torch.")})',
        where="python",
    ),
)
