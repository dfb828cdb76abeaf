"""Pictures that everybody can read: colours that colour-blind readers tell apart, alternative text, and the numbers as a table."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), darkest first so that lines and text reach a contrast of 3:1 on white.
PALETTE = ["#0072B2", "#D55E00", "#007A5A", "#9B4F7C", "#5B5B5B", "#A66A00"]


def style() -> None:
    """Set matplotlib's defaults for the course: palette, sizes that stay legible on a phone, no top and right frame."""
    import matplotlib
    from cycler import cycler

    matplotlib.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "figure.figsize": (7, 3.2),
            "figure.dpi": 100,
            "font.size": 11,
            "image.cmap": "cividis",
        }
    )


def show(fig: Figure, alt: str, table: DataFrame | None = None) -> None:
    """Display a matplotlib figure with alternative text and, under it, the table that says the same in numbers.

    alt    what a reader who cannot see the picture should know; also printed under it, since JupyterLab drops image metadata
    table  a pandas DataFrame, or None where the numbers stand in a table right beside the picture already
    """
    import matplotlib.pyplot as plt
    from IPython.display import Markdown, display

    if not alt or not alt.strip():
        raise ValueError("a figure needs alternative text: say in a sentence what it shows")
    png = to_png(fig)
    plt.close(fig)  # or the inline backend shows it a second time
    display(
        {"image/png": base64.b64encode(png).decode(), "text/plain": alt},
        metadata={"image/png": {"alt": alt}, "alt": alt},
        raw=True,
    )
    display(Markdown(f"*{alt}*"))
    if table is not None:
        display(table)


def to_png(fig: Figure) -> bytes:
    """PNG bytes of a figure."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()
