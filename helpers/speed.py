"""Decode speed: prefill and decode apart, after a warm-up, as the median of several runs and the slowest and fastest of them."""

import statistics
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Speed:
    """Tokens per second, added up over the batch: of the prompt, and of new tokens as the median of the runs, their lowest and highest.

    The range is that of runs in a row in one process. Another process, or the same one later, can lie outside it.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_low: float
    decode_high: float

    def __str__(self) -> str:
        """`41.3 tok/s`, or `38.0 to 44.1 tok/s` where the runs lie more than 10 % of the median apart."""
        if self.decode_high - self.decode_low > 0.1 * self.decode_tokens_per_s:
            return f"{self.decode_low:.1f} to {self.decode_high:.1f} tok/s"
        return f"{self.decode_tokens_per_s:.1f} tok/s"


@torch.inference_mode()
def decode(
    model: torch.nn.Module, prompt_tokens: int = 64, new_tokens: int = 20, batch: int = 1, runs: int = 3
) -> Speed:
    """Time greedy decoding with a KV cache: one forward pass over the prompt, then `new_tokens` single-token passes.

    The prompt is random token ids (speed does not depend on them), the same in each run. One untimed run warms up caches and
    kernels first. Sampling and detokenizing are not in the time. Raises ValueError if an argument is below 1.
    """
    if min(prompt_tokens, new_tokens, batch, runs) < 1:
        raise ValueError("prompt_tokens, new_tokens, batch and runs must each be at least 1")
    model.eval()
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
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
    prefills, decodings = zip(*times)
    new = batch * new_tokens
    return Speed(
        prefill_tokens_per_s=batch * prompt_tokens / statistics.median(prefills),
        decode_tokens_per_s=new / statistics.median(decodings),
        decode_low=new / max(decodings),
        decode_high=new / min(decodings),
    )


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
