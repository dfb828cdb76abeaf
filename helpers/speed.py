"""Decode speed: prefill and decode apart, after a warm-up, as the median of several runs."""

import statistics
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Speed:
    """prefill_tokens_per_s counts prompt tokens, decode_tokens_per_s new ones; both add up over the batch."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@torch.inference_mode()
def decode(model, prompt_tokens=64, new_tokens=20, batch=1, runs=3):
    """Time greedy decoding with a KV cache: one forward pass over the prompt, then `new_tokens` single-token passes.

    The prompt is random token ids (speed does not depend on them), the same in each run. One untimed run warms up caches and
    kernels first. Sampling and detokenizing are not in the time.
    """
    if min(prompt_tokens, new_tokens, batch, runs) < 1:
        raise ValueError("prompt_tokens, new_tokens, batch and runs must each be at least 1")
    model.eval()
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)

    def once(steps):
        start = _now(device)
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        prefilled = _now(device)
        for _ in range(steps):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return prefilled - start, _now(device) - prefilled

    once(min(4, new_tokens))
    times = [once(new_tokens) for _ in range(runs)]
    prefill, decoding = (statistics.median(part) for part in zip(*times))
    return Speed(batch * prompt_tokens / prefill, batch * new_tokens / decoding)


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
