"""Patches for autoawq 0.2.9. Each says what upstream assumed and what is true now, and returns what undoes it."""

import functools

from helpers.archived.patching import Undo, get, patch, replace, state_dict


@patch(
    assumed="v.cpu() copies, so that the scale search can put the weights back after each trial.",
    now="on a CPU it is the same tensor: every trial stays in the weights, and the model is silently ruined. Clones are saved.",
)
def weights_are_saved_before_the_search() -> Undo | None:
    quantizer = get("awq.quantize.quantizer", "AwqQuantizer")
    upstream = quantizer._compute_best_scale

    @functools.wraps(upstream)
    def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args, **kwargs):
        with state_dict(module2inspect, lambda tensors: ((name, value.clone()) for name, value in tensors.items())):
            return upstream(self, x, w_mean, x_mean, module2inspect, *args, **kwargs)

    return replace(quantizer, _compute_best_scale=_compute_best_scale)


@patch(
    assumed="calibration samples are short lines: those longer than max_calib_seq_len are dropped without a word.",
    now="samples are documents; they are cut into pieces instead, and a set too short for one window is a clear error.",
)
def long_samples_are_cut() -> Undo | None:
    quantizer = get("awq.quantize.quantizer")
    upstream = quantizer.get_calib_dataset

    @functools.wraps(upstream)
    def get_calib_dataset(data="pileval", tokenizer=None, n_samples=128, max_seq_len=512, **kwargs):
        if isinstance(data, list):
            rows = [tokenizer.encode(row.strip()) if tokenizer and isinstance(row, str) else list(row) for row in data]
            data = [row[i : i + max_seq_len] for row in rows for i in range(0, len(row), max_seq_len)][:n_samples]
            have = sum(map(len, data))
            if have < max_seq_len:
                raise ValueError(
                    f"the calibration set holds {have} tokens, fewer than one window of max_calib_seq_len={max_seq_len}"
                )
        return upstream(data=data, tokenizer=tokenizer, n_samples=n_samples, max_seq_len=max_seq_len, **kwargs)

    return replace(quantizer, get_calib_dataset=get_calib_dataset)


PATCHES = [weights_are_saved_before_the_search, long_samples_are_cut]
