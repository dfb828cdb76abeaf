"""The timer times what it says; how fast anything is stands in `make bench`, not in a test."""

import pytest
import torch

from helpers import speed


class Slow(torch.nn.Module):
    """A 'model' that takes a known time per forward pass."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 2)
        self.lengths = []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        import time
        from types import SimpleNamespace

        self.lengths.append(tuple(input_ids.shape))
        time.sleep(0.05 if input_ids.shape[1] > 1 else 0.01)
        return SimpleNamespace(logits=torch.zeros(len(input_ids), 1, 10), past_key_values="cache")


def test_prefill_and_decode_are_timed_apart():
    model = Slow()
    rate = speed.decode(model, prompt_tokens=20, new_tokens=5, batch=2, runs=3)
    assert model.lengths.count((2, 20)) == 4 and model.lengths.count((2, 1)) == 4 + 3 * 5  # one warm-up, three runs
    assert 200 < rate.prefill_tokens_per_s <= 2 * 20 / 0.05
    assert 50 < rate.decode_tokens_per_s <= 2 / 0.01


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch", "runs"])
def test_nothing_to_time(name):
    with pytest.raises(ValueError, match="at least 1"):
        speed.decode(Slow(), **{name: 0})
