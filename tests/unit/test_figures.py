"""Figures: alternative text is asked for, and the colours can be told apart from white."""

import pytest

from helpers import figures


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", figures.PALETTE)
def test_contrast_with_white(color):
    assert 1.05 / (luminance(color) + 0.05) >= 3


def test_a_figure_without_alternative_text_is_refused():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, _ = plt.subplots()
    with pytest.raises(ValueError, match="alternative text"):
        figures.show(fig, alt=" ")
    assert figures.to_png(fig).startswith(b"\x89PNG")
