"""Linear layers with fewer bits for the decode ladder: each function takes a torch.nn.Linear and gives the layer that replaces it.

    layers.replace(model, layers.nf4)               # every Linear, the head too
    layers.replace(model, layers.nf4, head=False)   # every Linear but the head, as transformers does it at load

Rounding is to the nearest: speed and bytes do not depend on how codes were chosen. bitsandbytes, torchao and gptqmodel bring their own
kernels. `Float8` calls torch's FP8 product. `Float8Weight` and `Nibbles` leave the product of a matrix and one vector to torch.compile.
"""

import torch
from torch import nn
from torch.nn import functional as F

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
GROUP = 128


def replace(model, make, head=True):
    """Put make(linear) in the place of every Linear; without `head`, lm_head stays as it is."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and (head or name != "lm_head"):
                setattr(parent, name, make(linear).eval())
    return model


# --- bitsandbytes ---------------------------------------------------------------------------------------------------------------


def nf4(linear):
    """NF4 with double quantization, computed in the dtype of the weights."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight.data
    layer = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer).to(
        weight.device
    )
    layer.bias = linear.bias
    return layer


def llm_int8(linear):
    """LLM.int8() with its usual threshold for outliers."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    weight = Int8Params(linear.weight.data, has_fp16_weights=False, requires_grad=False)
    layer.weight = weight._quantize(weight.device)
    layer.bias = linear.bias
    return layer


# --- gptqmodel ------------------------------------------------------------------------------------------------------------------


def rounded(linear, group_size=GROUP):
    """Symmetric 4-bit codes 0 to 15 (8 stands for zero), int32 [in, out], and scales, float32 [in / group_size, out]."""
    groups = linear.weight.data.float().unflatten(1, (-1, group_size))
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7.5
    codes = (groups / scales).round().add(8).clamp(0, 15).int().flatten(1).t()
    return codes, scales[..., 0].t().contiguous()


def packed(codes):
    """Eight codes of a column in one int32, the first in the lowest bits: [in / 8, out]."""
    return sum(codes[row::8] << 4 * row for row in range(8)).contiguous()


def marlin(linear):
    """GPTQ's format for gptqmodel's Marlin kernel, in the dtype of the weights."""
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    dtype, device = linear.weight.dtype, linear.weight.device
    codes, scales = rounded(linear)
    layer = MarlinLinear(bits=4, group_size=GROUP, desc_act=False, sym=True, in_features=linear.in_features,
                         out_features=linear.out_features, bias=linear.bias is not None, dtype=dtype).to(device)  # fmt: skip
    layer.qweight.data, layer.scales.data = packed(codes), scales.to(dtype)
    layer.qzeros.data.zero_()
    layer.g_idx.data = torch.arange(linear.in_features, device=device, dtype=torch.int32) // GROUP
    if linear.bias is not None:
        layer.bias = linear.bias.data.clone()
    layer.post_init()
    return layer


def exllama_v2(scratch):
    """GPTQ's format for gptqmodel's ExLlamaV2 kernel, float16. `scratch` is an empty list that keeps the memory all layers share."""

    def make(linear):
        from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear
        from gptqmodel.utils.exllamav2 import ScratchSpace

        device = linear.weight.device
        codes, scales = rounded(linear)
        layer = ExllamaV2Linear(bits=4, group_size=GROUP, desc_act=False, sym=True, in_features=linear.in_features,
                                out_features=linear.out_features, bias=linear.bias is not None, dtype=torch.float16).to(device)  # fmt: skip
        layer.qweight, layer.scales = packed(codes), scales.half()
        layer.qzeros.fill_(-0x77777778)  # 0x88888888: the code 8 eight times, as version 2 of the format stores a zero
        layer.g_idx.zero_()  # columns in their order: the kernel then skips its permutation
        if linear.bias is not None:
            layer.bias = linear.bias.data.half()
        need = layer.temp_dq_size() + 256
        if not scratch or scratch[-1].scratch_bytes < need:
            scratch.append(ScratchSpace(scratch_bytes=need, dev=device))
        layer.scratch = scratch[-1]  # the kernel keeps only its address
        layer.post_init(scratch_space=layer.scratch)
        return layer

    return make


def build(dtype=torch.bfloat16):
    """Let gptqmodel compile its kernels (minutes, once a machine). What is being built by another process is waited for."""
    from gptqmodel.utils.exllamav2 import prewarm_exllamav2_gptq_extension
    from gptqmodel.utils.marlin import prewarm_marlin_extension

    return {"marlin": prewarm_marlin_extension(dtype), "exllama_v2": prewarm_exllamav2_gptq_extension()}


# --- torch ----------------------------------------------------------------------------------------------------------------------


def round_to_float8(x, dim=None):
    """E4M3 codes and the float32 scale with which they give x again: one for all of x, or one along `dim`."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (largest.float() / LARGEST).clamp(min=1e-12)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


round_rows = torch.compile(round_to_float8, dynamic=False)


class Float8(nn.Module):
    """W8A8 in E4M3: weights with a scale a row, activations with a scale a token, rounded as they come; torch's FP8 product."""

    def __init__(self, linear):
        super().__init__()
        codes, scale = round_to_float8(linear.weight.data, 1)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = linear.bias

    def forward(self, x):
        codes, scale = round_rows(x.flatten(0, -2), 1)
        out = torch._scaled_mm(
            codes, self.weight.t(), scale, self.scale, self.bias, out_dtype=x.dtype, use_fast_accum=True
        )
        return out.unflatten(0, x.shape[:-1])


@torch.compile(dynamic=False)
def float8_times_vector(weight, scale, x):
    """E4M3 [out, in], float32 [out], and [in] -> [out]."""
    return ((weight.float() * x.float()).sum(-1) * scale).to(x.dtype)


@torch.compile(dynamic=False)
def nibbles_times_vector(codes, scales, x):
    """uint8 [out, groups, half a group], scales [out, groups], and [in] -> [out]. See `Nibbles` for what a byte holds."""
    first, second = x.float().view(codes.shape[1], 2, codes.shape[2]).unbind(1)
    products = ((codes & 15).float() - 8) * first + ((codes >> 4).float() - 8) * second
    return (products * scales.float()[..., None]).sum((-2, -1)).to(x.dtype)


class OneVector(nn.Module):
    """A layer whose product with one token is compiled; more tokens (a prompt) multiply with the matrix in 16 bits."""

    def forward(self, x):
        out = (
            F.linear(x, self.matrix(x.dtype))
            if x.numel() > x.shape[-1]
            else self.product(x.flatten()).view(*x.shape[:-1], -1)
        )
        return out if self.bias is None else out + self.bias


class Float8Weight(OneVector):
    """Weights in E4M3 with a scale a row; activations stay in 16 bits."""

    def __init__(self, linear):
        super().__init__()
        codes, scale = round_to_float8(linear.weight.data, 1)
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), linear.bias
        self.register_buffer("scale", scale[:, 0].contiguous())

    def product(self, x):
        return float8_times_vector(self.weight, self.scale, x)

    def matrix(self, dtype):
        return (self.weight.float() * self.scale[:, None]).to(dtype)


class Nibbles(OneVector):
    """Symmetric 4 bits in groups of 128: byte j of a group holds code j in its low half and code j + 64 in its high half."""

    def __init__(self, linear):
        super().__init__()
        codes, scales = rounded(linear)
        low, high = codes.t().unflatten(1, (-1, 2, GROUP // 2)).unbind(2)
        self.bias = linear.bias
        self.register_buffer("codes", (low | high << 4).to(torch.uint8).contiguous())
        self.register_buffer("scales", scales.t().to(linear.weight.dtype).contiguous())

    def product(self, x):
        return nibbles_times_vector(self.codes, self.scales, x)

    def matrix(self, dtype):
        codes = torch.stack((self.codes & 15, self.codes >> 4), 2).flatten(2)
        return ((codes.to(dtype) - 8) * self.scales[..., None].to(dtype)).flatten(1)
