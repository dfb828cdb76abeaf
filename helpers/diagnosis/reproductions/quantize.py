"""Failures while a model is quantized, each with its repair."""

import torch
from torch import nn

from helpers.diagnosis.reproductions.parts import IDS, needs, tiny_model, tiny_tokenizer
from helpers.diagnosis.reproductions.registry import fails, listening, works


@fails("group-size")
def _():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(nn.Sequential(nn.Linear(576, 64)), IntxWeightOnlyConfig(torch.int4, PerGroup(128)))


@works("group-size")
def _():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    group = max(size for size in (32, 64, 128) if 576 % size == 0)
    quantize_(nn.Sequential(nn.Linear(576, 64)), IntxWeightOnlyConfig(torch.int4, PerGroup(group)))
    return f"group_size {group} divides 576"


@fails("qat-base-config")
def _():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(tiny_model(), QATConfig(Int8DynamicActivationInt8WeightConfig(), step="prepare"))


@works("qat-base-config")
def _():
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    model = tiny_model()
    quantize_(model, QATConfig(Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)), step="prepare"))
    return f"prepared: {type(model.model.layers[0].mlp.up_proj).__name__}"


@fails("int4-packing-needs-mslk")
def _():
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    quantize_(tiny_model(torch.bfloat16), Int4WeightOnlyConfig(group_size=32))


@works("int4-packing-needs-mslk")
def _():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    model = tiny_model(torch.bfloat16)
    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    return f"4-bit weights without packing: {type(model.model.layers[0].mlp.up_proj.weight).__name__}"


@fails("embedding-qconfig")
def _():
    from torch.ao import quantization as tq

    model = tiny_model().train()
    model.qconfig = tq.get_default_qat_qconfig("fbgemm")
    tq.prepare_qat(model, inplace=True)
    model(IDS)
    tq.convert(model.eval(), inplace=True)


@works("embedding-qconfig")
def _():
    from torch.ao import quantization as tq

    model = tiny_model().train()
    model.qconfig = tq.get_default_qat_qconfig("fbgemm")
    model.get_input_embeddings().qconfig = None
    tq.prepare_qat(model, inplace=True)
    model(IDS)
    tq.convert(model.eval(), inplace=True)
    return f"{type(model.lm_head).__module__.split('.')[-3]} layers, float embeddings"


@fails("quantized-op-on-floats")
def _():
    from torch.ao import quantization as tq

    model = nn.Sequential(nn.Linear(8, 8)).eval()
    model.qconfig = tq.default_qconfig
    tq.prepare(model, inplace=True)(torch.ones(1, 8))
    tq.convert(model, inplace=True)(torch.ones(1, 8))


@works("quantized-op-on-floats")
def _():
    from torch.ao import quantization as tq

    model = tq.QuantWrapper(nn.Sequential(nn.Linear(8, 8))).eval()  # a quantizer in front, a dequantizer behind
    model.qconfig = tq.default_qconfig
    tq.prepare(model, inplace=True)(torch.ones(1, 8))
    return f"output {tq.convert(model, inplace=True)(torch.ones(1, 8)).dtype}"


@fails("dynamic-int8-on-half")
def _():
    from torch.ao.quantization import quantize_dynamic

    quantize_dynamic(tiny_model(torch.float16), {nn.Linear}, dtype=torch.qint8)(IDS)


@works("dynamic-int8-on-half")
def _():
    from torch.ao.quantization import quantize_dynamic

    return f"logits {quantize_dynamic(tiny_model(torch.float16).float(), {nn.Linear}, dtype=torch.qint8)(IDS).logits.dtype}"


@fails("torch-ao-deprecated")
def _():
    from torch.ao.quantization import quantize_dynamic

    with listening() as heard:
        quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, dtype=torch.qint8)
    return heard.about("torch.ao.quantization is deprecated")


@works("torch-ao-deprecated")
def _():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    with listening() as heard:
        quantize_(nn.Sequential(nn.Linear(64, 64)), Int8DynamicActivationInt8WeightConfig())
    assert not heard.about("deprecated")
    return "torchao's quantize_ does the same, without the warning"


@fails("fx-trace")
def _():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    prepare_fx(tiny_model(), get_default_qconfig_mapping("x86"), (IDS,))


@works("fx-trace")
def _():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = tiny_model()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())  # swaps weights, traces nothing
    return f"logits {tuple(model(IDS).logits.shape)}"


@fails("hessian-not-positive-definite")
def _():
    inputs = torch.randn(4, 64)  # 4 calibration tokens for 64 input channels
    torch.linalg.cholesky(inputs.T @ inputs)


@works("hessian-not-positive-definite")
def _():
    inputs = torch.randn(512, 64)
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())  # damp_percent
    return f"factor {tuple(torch.linalg.cholesky(hessian).shape)}"


@fails("not-implemented-for-half")
def _():
    torch.linalg.cholesky(torch.eye(4, dtype=torch.float16))


@works("not-implemented-for-half")
def _():
    return f"computed in {torch.linalg.cholesky(torch.eye(4, dtype=torch.float16).float()).dtype}"


@fails("empty-calibration-set", only_if=lambda: needs("awq"))
def _():
    from awq.utils.calib_data import get_calib_dataset

    get_calib_dataset(["the cat sat on the mat " * 100], tokenizer=tiny_tokenizer(), max_seq_len=512)


@works("empty-calibration-set")
def _():
    from awq.utils.calib_data import get_calib_dataset

    text = "the cat sat on the mat " * 100
    pieces = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    return f"{len(get_calib_dataset(pieces, tokenizer=tiny_tokenizer(), max_seq_len=512))} block of 512 tokens"


@fails("bits-not-supported")
def _():
    from transformers import GPTQConfig

    GPTQConfig(bits=5)


@works("bits-not-supported")
def _():
    from transformers import GPTQConfig

    return f"bits {GPTQConfig(bits=4).bits}"


@fails("float32-compute")
def _():
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, quant_type="nf4").to("cuda" if torch.cuda.is_available() else "cpu")
    with listening() as heard:
        layer(torch.ones(2, 64, dtype=torch.float16, device=layer.weight.device))
    return heard.about("bnb_4bit_compute_dtype")


@works("float32-compute")
def _():
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer = layer.to("cuda" if torch.cuda.is_available() else "cpu")
    with listening() as heard:
        layer(torch.ones(2, 64, dtype=torch.bfloat16, device=layer.weight.device))
    assert not heard.about("bnb_4bit_compute_dtype")
    return f"computes in {layer.compute_dtype}"
