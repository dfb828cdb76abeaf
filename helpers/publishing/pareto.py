"""Quality against what it costs: which methods no other one beats, how two models rank them, and the pictures of that."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from helpers import figures
from helpers.publishing import tables
from helpers.records import Record

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

    from helpers.publishing.reference import Reference

# field of a record: (label, factor, True where more is better)
AXES = {
    "weight_bytes": ("weights, MB", 1e-6, False),
    "decode_tokens_per_s": ("decoded tokens per second", 1, True),
}
FLOOR = 1e-5  # a KL divergence of zero has no place on a logarithmic axis
FINE_TUNED = ("qlora", "qlora-ddp")  # training is meant to leave the untouched model: there KL is no loss of quality
# One hue a bit width; what mixes widths is grey.
COLORS = {2: "#A66A00", 3: "#9B4F7C", 4: "#D55E00", 8: "#0072B2", 16: "#007A5A", 32: "#1a1a1a"}
MIXED = "#5B5B5B"


def bits(method: str) -> int | None:
    """How many bits a method stores a weight in, by its name: `gptq-3` 3, `fp8` 8, `nf4-single` 4; 4 where the name holds no number.

    None for the hybrids, which mix widths. A GGUF recipe's number is that of its main format: its files may hold more a weight.
    Three values need 1.6 bits, so `ternary` stands with 2.
    """
    if method.startswith("hybrid"):
        return None
    if method.startswith("ternary"):
        return 2
    stated = re.search(r"-(\d)$", method) or re.search(r"(?:int|fp|nf|bf|q)(\d+)", method)
    return int(stated[1]) if stated else 4


def four_bit(method: str) -> bool:
    """Whether a method is compared with the 4-bit ones: no fine-tuned model, and no GGUF recipe.

    Q4_K_M holds 6.2 bits a weight where rows are 576 long, and 4.8 where they are 4,096.
    """
    return bits(method) == 4 and method not in FINE_TUNED and not method.startswith("gguf")


def frontier(points: Sequence[tuple[float, float]], more_is_better: bool = False) -> list[int]:
    """Indices of the (cost, loss) points that no other point beats in one without being worse in the other, cheapest first.

    loss is always better when lower; `more_is_better` turns the first coordinate around (speed). Of equal points the first stays.
    """
    sign = -1 if more_is_better else 1
    order = sorted(range(len(points)), key=lambda n: (sign * points[n][0], points[n][1]))
    kept, best = [], float("inf")
    for n in order:
        if points[n][1] < best:
            kept.append(n)
            best = points[n][1]
    return kept


def plot(
    found: Iterable[Record], against: str = "weight_bytes", most: int = 3
) -> tuple[matplotlib.figure.Figure, str, pandas.DataFrame] | None:
    """(figure, alternative text, table) of KL divergence against one of AXES for a list of records; None for fewer than two.

    The first panel has all methods, the second those of 4 bits, a third those below 4 bits where there are any; `most` is the
    number of panels at most, and a method that only a panel left out would name has no name. A colour is a bit width, a square is a
    GGUF file. Methods on the frontier are filled and joined by a line, the others hollow. Records without one of the two numbers are
    left out, and so are FINE_TUNED.
    """
    label, factor, more = AXES[against]
    shown = [r for r in found if r["kl_divergence"] is not None and r[against] and r["method"] not in FINE_TUNED]
    shown.sort(key=lambda record: record["kl_divergence"])
    if len(shown) < 2:
        return None
    import pandas

    points = [(record[against] * factor, max(record["kl_divergence"], FLOOR)) for record in shown]
    best = frontier(points, more)
    names = [shown[n]["method"] for n in best]
    finding = _finding(shown, points, best, against)
    fig = _panels(shown, points, best, label, more, finding, most)
    alt = (
        f"{finding} KL divergence from the untouched model against {label.replace(', MB', ' in MB')} for {len(points)} methods. "
        f"On the frontier (filled), which no other method beats: {', '.join(names)}."
    )
    table = pandas.DataFrame(
        [
            [record["method"], point[0], record["kl_divergence"], "yes" if n in best else "no"]
            for n, (record, point) in enumerate(zip(shown, points))
        ],
        columns=["method", label, "KL", "on the frontier"],
    )
    return fig, alt, table


def _finding(shown, points, best, against):
    """The picture's title: what the closest 4-bit method costs and saves, in numbers of these records."""
    four = [n for n, record in enumerate(shown) if four_bit(record["method"])]
    whole = next((n for n, record in enumerate(shown) if record["method"] == "bf16"), None)
    if not four or whole is None:
        return f"{len(best)} of {len(shown)} methods are beaten by no other one."
    first = four[0]
    name, ratio = shown[first]["method"], points[first][0] / points[whole][0]
    what = (
        f"takes {ratio:.0%} of bf16's bytes"
        if against == "weight_bytes"
        else f"decodes {ratio:.1f} times as fast as bf16"
    )
    return f"The closest 4-bit method outside GGUF files, {name}, {what} at a KL of {points[first][1]:.2f}."


def _panels(shown, points, best, label, more, finding, most):
    """The figure of `plot`."""
    import matplotlib.pyplot as plt

    figures.style()
    widths = [bits(record["method"]) for record in shown]
    # A KL of zero has no place on a log axis: it stands at the lower edge and says so.
    lower = 0.6 * min((kl for _, kl in points if kl > FLOOR), default=FLOOR)
    points = [(cost, max(kl, lower)) for cost, kl in points]
    texts = [record["method"] + (" (KL 0)" if kl == lower else "") for record, (_, kl) in zip(shown, points)]
    four = [n for n, record in enumerate(shown) if four_bit(record["method"])]
    below = [n for n, width in enumerate(widths) if width is not None and width < 4]
    groups = {"All methods": range(len(shown)), "4 bits": four, "Below 4 bits": below}
    groups = {name: list(group) for name, group in groups.items() if name == "All methods" or len(group) > 1}
    drawn = list(groups.items())[:most]
    fig, axes = plt.subplots(1, len(drawn), figsize=(5 * len(drawn) + 0.6, 4.6), squeeze=False, layout="constrained")
    for ax, (title, group) in zip(axes[0], drawn):
        zoomed = (
            set().union(*(other for name, other in groups.items() if name != title))
            if title == "All methods"
            else set()
        )
        if title == "All methods":
            ax.plot(*zip(*(points[n] for n in best)), color="#1a1a1a", linewidth=1, drawstyle="steps-post", zorder=2)
        for n in group:
            color = COLORS.get(widths[n], MIXED)
            marker = "s" if shown[n]["method"].startswith("gguf") else "o"
            ax.scatter(
                *points[n],
                marker=marker,
                edgecolor=color,
                facecolor=color if n in best else "white",
                linewidth=1.5,
                zorder=4,  # above the labels
            )
        ax.set(xlabel=label, yscale="log", title=title)
        ax.title.set_fontsize("medium")
        ax.margins(x=0.25, y=0.12)
        ax.set_xlim(left=max(0, ax.get_xlim()[0]))
        labels = [(points[n], texts[n], COLORS.get(widths[n], MIXED)) for n in group if n not in zoomed or n in best]
        _label(ax, labels, [points[n] for n in group])
    for ax in axes[0][1:]:
        _plain_ticks(ax)
    axes[0][0].set_ylabel("KL from the untouched model, nats")
    better = "lower right" if more else "lower left"
    axes[0][0].text(
        0.02 if not more else 0.98,
        0.02,
        f"better: {better}",
        transform=axes[0][0].transAxes,
        ha="right" if more else "left",
        fontsize=9,
        style="italic",
    )
    widths_shown = sorted({width for width in widths if width})
    for place, width in enumerate(widths_shown):
        fig.text(0.02 + 0.1 * place, -0.035, f"\u25cf {width} bits", color=COLORS.get(width, MIXED), fontsize=10)
    fig.text(
        0.02 + 0.1 * len(widths_shown),
        -0.035,
        "\u25cf mixed   \u25a0 GGUF file   filled: on the frontier",
        color=MIXED,
        fontsize=10,
    )
    fig.suptitle(
        f"{finding}\n{shown[0]['model'].split()[0]}, {shown[0]['device']}", fontsize="medium", ha="left", x=0.01
    )
    return fig


def _plain_ticks(ax):
    """Plain numbers on a log axis that spans less than two decades."""
    from matplotlib import ticker

    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())


def _label(ax, labels, points):
    """Write each (point, text, color) where it hides fewer of `points`: right of its point or left of it, in doubt towards the middle.

    Texts that would touch are pushed apart.
    """
    ax.figure.canvas.draw()  # the layout must be settled before data turn into pixels
    scale = ax.figure.dpi / 72  # pixels of a point
    edge, middle = (ax.transAxes.transform((place, 0))[0] for place in (0, 0.5))
    pixels = [ax.transData.transform(point) for point in points]

    def hidden(left, right, height):
        return sum(left < x < right and abs(y - height) < 8 * scale for x, y in pixels)

    texts = []
    for point, text, color in sorted(labels):
        x, y = ax.transData.transform(point)
        width, gap = 5.5 * scale * len(text), 4 * scale
        beside = [hidden(x - width - 3 * gap, x - gap, y), hidden(x + gap, x + width + 3 * gap, y)]
        on_the_left = x - width > edge and (beside[0] < beside[1] or (beside[0] == beside[1] and x > middle))
        texts.append(
            {
                "x": x - width if on_the_left else x,
                "width": width,
                "y": y,
                "at": y,
                "left": on_the_left,
                "what": (point, text, color),
            }
        )
    _push_apart(texts, 12 * scale)
    for text in texts:
        point, name, color = text["what"]
        moved = text["at"] - text["y"]
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 3} if abs(moved) > 5 * scale else None
        offset = (-7 if text["left"] else 7, moved / scale)
        ax.annotate(
            name,
            point,
            offset,
            textcoords="offset points",
            fontsize=9,
            color=color,
            va="center",
            ha="right" if text["left"] else "left",
            arrowprops=line,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 0.3},
        )


def _push_apart(texts, height):
    """Move `at` of texts that lie side by side and closer than `height`, half of what is missing each; a few hundred small steps."""
    for _ in range(200):
        moved = False
        for one, other in itertools.combinations(texts, 2):
            apart = one["x"] + one["width"] < other["x"] or other["x"] + other["width"] < one["x"]
            missing = height - abs(one["at"] - other["at"])
            if apart or missing <= 0.1:
                continue
            up, down = (one, other) if (one["at"], one["y"]) > (other["at"], other["y"]) else (other, one)
            up["at"], down["at"], moved = up["at"] + missing / 2, down["at"] - missing / 2, True
        if not moved:
            return


def rankings(measured: dict[str, Record], references: Sequence[Reference] = ()) -> dict[str, list[Record]]:
    """{model: its records of 4-bit methods, lowest KL first} of a run ({method: record}) and of what comes with the course.

    A model's records are those of one device: of the run or the reference with the most methods, the run where they hold equally
    many. Random weights have no quality to rank, so a model made of them is left out, as is a record without an interval.
    """
    ranked = {}
    for records in (measured, *(reference.records for reference in references)):
        groups = {}
        for record in records.values():
            if four_bit(record["method"]) and record["kl_low"] is not None and "random weights" not in record["model"]:
                groups.setdefault((record["model"].split()[0], record["device"]), []).append(record)
        for (model, _), group in groups.items():
            if len(group) > len(ranked.get(model, ())):
                ranked[model] = sorted(group, key=lambda record: record["kl_divergence"])
    return ranked


def order(first: Record, second: Record) -> int:
    """-1 where first's KL is the lower one, 1 where second's is, 0 where their intervals overlap: then they are not told apart."""
    if first["kl_high"] < second["kl_low"]:
        return -1
    return int(second["kl_high"] < first["kl_low"])


def differences(ranked: dict[str, list[Record]]) -> str:
    """What `rankings` of several models share and where they part, in words: only intervals that do not overlap make an order."""
    models = list(ranked)
    if not models:
        return "No record of a 4-bit method has an interval yet."
    if len(models) == 1:
        return f"Only {models[0]} has records of 4-bit methods, so whether another model ranks them alike is not known here."
    return " ".join(
        _difference(one, other, ranked[one], ranked[other]) for one, other in itertools.combinations(models, 2)
    )


def _difference(one, other, first, second):
    """The same for two models."""
    first, second = ({record["method"]: record for record in each} for each in (first, second))
    common = [method for method in first if method in second]
    pairs = [
        (a, b, order(first[a], first[b]), order(second[a], second[b])) for a, b in itertools.combinations(common, 2)
    ]
    if not pairs:
        return f"{one} and {other} share fewer than two methods, so there is no order to compare."
    same = sum(x == y != 0 for *_, x, y in pairs)
    single = [sum(bool(x) and not y for *_, x, y in pairs), sum(bool(y) and not x for *_, x, y in pairs)]
    neither = sum(x == y == 0 for *_, x, y in pairs)
    turned = [(a, b) if x < 0 else (b, a) for a, b, x, y in pairs if x * y < 0]
    said = [f"{better} beats {worse} on {one}, {worse} beats {better} on {other}" for better, worse in turned]
    return (
        f"Of {len(pairs)} pairs of methods, {one} and {other} put {same} in the same order and {len(turned)} in opposite orders"
        f"{': ' + '; '.join(said) if said else ''}. "
        f"Told apart by one model alone: {single[0]} ({one}), {single[1]} ({other}); by neither: {neither}."
    )


def plot_rankings(ranked: dict[str, list[Record]]) -> tuple[matplotlib.figure.Figure, str, pandas.DataFrame] | None:
    """(figure, alternative text, table) of `rankings`: a panel a model, KL in nats with its interval; None without a record."""
    if not ranked:
        return None
    import matplotlib.pyplot as plt
    import pandas
    from matplotlib import ticker

    figures.style()
    height = 1.3 + 0.32 * max(map(len, ranked.values()))
    fig, panels = plt.subplots(
        1, len(ranked), figsize=(max(5, 4.2 * len(ranked)), height), squeeze=False, layout="constrained"
    )
    for ax, (model, group) in zip(panels[0], ranked.items()):
        for place, record in enumerate(group):
            mean, low, high = (max(record[name], FLOOR) for name in ("kl_divergence", "kl_low", "kl_high"))
            ax.errorbar(
                mean, place, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt="o", color=COLORS[4], capsize=3
            )
        ax.set_yticks(range(len(group)), [record["method"] for record in group])
        ax.set(xscale="log", xlabel="KL from the untouched model, nats", ylim=(len(group) - 0.5, -0.5))
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
        ax.set_title(f"{model}\n{group[0]['device']}", fontsize="medium")
    columns = {
        model: pandas.Series(
            [f"{r['method']}: {tables.interval(r['kl_divergence'], r['kl_low'], r['kl_high'])}" for r in group],
            index=range(1, len(group) + 1),
        )
        for model, group in ranked.items()
    }
    table = pandas.DataFrame(columns).fillna("").rename_axis("rank")
    firsts = "; ".join(f"{model}: {', '.join(record['method'] for record in group)}" for model, group in ranked.items())
    alt = f"4-bit methods by KL divergence with 95 % intervals, lowest first. {firsts}. {differences(ranked)}"
    return fig, alt, table
