"""Greedy decoding without a loop around the model: one token is one CUDA graph, and all that changes between tokens is tensors.

    lean = LeanDecoder(model, batch=1, length=640)
    ids = lean.generate(prompt, new_tokens=128)      # int64 [batch, new_tokens]

For Llama, Mistral and Qwen2 models of transformers whose linear layers may be anybody's: torch, torchao, bitsandbytes, gptqmodel.
The matrix kernels are called as they are, with their biases; what lies between them is fused by torch.compile; then the whole token,
argmax and cache update included, is captured once and replayed. On a CPU the same code runs without a graph, which is how its tests compare it
with `generate`. After gpt-fast (https://github.com/pytorch-labs/gpt-fast), which does this for a model written for it.
"""

import torch
from torch import nn
from torch.nn import functional as F


@torch.compile(dynamic=False)
def add_norm(x, update, norm_weight, eps):
    """The residual stream x + update, and its RMSNorm."""
    x = x + update
    wide = x.float()
    return x, norm_weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@torch.compile(dynamic=False)
def attend(qkv, cos, sin, keys, values, positions, mask, heads):
    """Rotate queries and keys by their positions, write keys and values into the cache, attend to it: [batch, tokens, hidden]."""
    batch, tokens, _ = qkv.shape
    kv, dim = keys.shape[1], keys.shape[3]
    q, k, v = qkv.view(batch, tokens, heads + 2 * kv, dim).transpose(1, 2).split([heads, kv, kv], 1)

    def rotated(x):
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    keys.index_copy_(2, positions, rotated(k))
    values.index_copy_(2, positions, v)
    # Queries that share a key head stand in one block, so that no key has to be repeated.
    q = rotated(q).reshape(batch, kv, heads // kv * tokens, dim)
    if batch * tokens > 4:
        a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    else:  # for a few queries, attention is two sums that the compiler writes itself; its kernels are made for many
        scores = (q[:, :, :, None].float() * keys[:, :, None]).sum(-1) * dim**-0.5 + mask
        a = (scores.softmax(-1)[..., None] * values[:, :, None]).sum(-2).to(qkv.dtype)
    return a.reshape(batch, heads, tokens, dim).transpose(1, 2).reshape(batch, tokens, heads * dim)


@torch.compile(dynamic=False)
def gate(gate_up):
    left, right = gate_up.chunk(2, -1)
    return F.silu(left) * right


class Together(nn.Module):
    """Several linear layers with one input, called one after the other."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], -1)


def fuse(model):
    """Make one matrix of q, k, v and one of gate and up, before quantizing: fewer and larger products, the same numbers.

    Biases are joined with their matrices (Qwen2 has them on q, k and v).
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        joints = (
            (attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
            (mlp, "gate_up_proj", ("gate_proj", "up_proj")),
        )
        for owner, name, parts in joints:
            weight = torch.cat([getattr(owner, part).weight.data for part in parts])
            biases = [getattr(owner, part).bias for part in parts]
            joint = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            joint.weight = nn.Parameter(weight, requires_grad=False)
            if biases[0] is not None:
                joint.bias = nn.Parameter(torch.cat([bias.data for bias in biases]), requires_grad=False)
            setattr(owner, name, joint)
            for part in parts:
                delattr(owner, part)
    return model


class LeanDecoder:
    """Holds the cache, the tables and the graph for `batch` sequences of at most `length` tokens (a multiple of 8)."""

    @torch.inference_mode()
    def __init__(self, model, batch=1, length=640):
        config, weight = model.config, model.get_input_embeddings().weight
        if config.model_type not in ("llama", "mistral", "qwen2") or getattr(config, "sliding_window", None):
            raise ValueError(
                f"this forward pass is that of Llama, Mistral and Qwen2 (no sliding window), not of {config.model_type}"
            )
        if length % 8:
            raise ValueError(f"length must be a multiple of 8, which the attention kernels want, not {length}")
        self.model, self.length, self.heads, self.graph = model, length, config.num_attention_heads, None
        self.eps, device, dtype = config.rms_norm_eps, weight.device, weight.dtype
        kv = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.groups = self.heads // kv
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = getattr(attention, "qkv_proj", None) or Together(attention.q_proj, attention.k_proj, attention.v_proj)
            gate_up = getattr(mlp, "gate_up_proj", None) or Together(mlp.gate_proj, mlp.up_proj)
            cache = [torch.zeros(batch, kv, length, dim, device=device, dtype=dtype) for _ in range(2)]
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            self.layers.append((qkv, attention.o_proj, gate_up, mlp.down_proj, *norms, *cache))
        self.columns = torch.arange(length, device=device)
        cos, sin = model.model.rotary_emb(torch.empty(0, device=device, dtype=dtype), self.columns[None])
        self.cos, self.sin = cos[0].clone(), sin[0].clone()
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)

    def forward(self, ids, positions):
        """ids [batch, tokens] at positions [tokens] -> the most likely next token [batch, 1]. All shapes are fixed."""
        cos, sin = self.cos[positions], self.sin[positions]
        seen = (self.columns <= positions[:, None]).repeat(self.groups, 1)
        x = self.model.model.embed_tokens(ids)
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, float("-inf"))[None, None]
        update = torch.zeros_like(x)
        for qkv, out, gate_up, down, norm, norm_after, keys, values in self.layers:
            x, h = add_norm(x, update, norm, self.eps)
            a = attend(qkv(h), cos, sin, keys, values, positions, mask, self.heads)
            x, h = add_norm(x, out(a), norm_after, self.eps)
            update = down(gate(gate_up(h)))
        _, h = add_norm(x[:, -1:], update[:, -1:], self.model.model.norm.weight, self.eps)
        return self.model.lm_head(h).argmax(-1)

    def step(self):
        """One token for every sequence: reads and writes nothing but tensors that stay where they are."""
        self.token.copy_(self.forward(self.token, self.position))
        self.position.add_(1)
        self.tokens.index_copy_(1, self.position, self.token)

    @torch.inference_mode()
    def capture(self):
        """Record `step` as a CUDA graph. It runs a few times first, for compiling, and on a stream of its own, as capturing asks."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
        return self

    @torch.inference_mode()
    def prefill(self, prompt):
        """Run the prompt [batch, tokens] in one pass; its last logits give the first new token."""
        count = prompt.shape[1]
        with torch.compiler.set_stance("force_eager"):  # prompts differ in length: nothing to compile for
            self.token.copy_(self.forward(prompt, self.columns[:count]))
        self.position.fill_(count)
        self.tokens[:, count] = self.token[:, 0]

    @torch.inference_mode()
    def generate(self, prompt, new_tokens):
        """The greedy continuation of prompt [batch, tokens], int64 [batch, new_tokens]."""
        start, room = prompt.shape[1], self.length - prompt.shape[1]
        if not 1 <= new_tokens <= room:
            raise ValueError(
                f"new_tokens must be 1 to {room}: the cache holds {self.length} tokens, {start} of them the prompt's"
            )
        if self.token.is_cuda and self.graph is None:
            self.capture()
        self.prefill(prompt)
        for _ in range(new_tokens - 1):
            if self.graph:
                self.graph.replay()
            else:
                with torch.compiler.set_stance("force_eager"):
                    self.step()
        return self.tokens[:, start : start + new_tokens].clone()
