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


def test_the_range_holds_the_slowest_and_the_fastest_run(monkeypatch):
    """Three runs of 4 new tokens that take 1, 2 and 4 seconds by the clock; the warm-up's clock does not count."""
    clock = [0, 0, 9, *(now for seconds in (2, 1, 4) for now in (0, 1, 1 + seconds))]
    monkeypatch.setattr(speed, "_now", lambda device: clock.pop(0))
    rate = speed.decode(Slow(), prompt_tokens=3, new_tokens=4, runs=3)
    assert rate == speed.Speed(prefill_tokens_per_s=3, decode_tokens_per_s=2, decode_low=1, decode_high=4) and not clock
    assert str(rate) == "1.0 to 4.0 tok/s"


def test_runs_that_agree_are_one_number():
    assert str(speed.Speed(100, 10, 9.6, 10.5)) == "10.0 tok/s"


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch", "runs"])
def test_nothing_to_time(name):
    with pytest.raises(ValueError, match="at least 1"):
        speed.decode(Slow(), **{name: 0})
