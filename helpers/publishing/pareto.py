"""Quality against what it costs: which methods no other one beats, how two models rank them, and the pictures of that."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from helpers import figures
from helpers.publishing import tables

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
# No GGUF recipe is among them: Q4_K_M holds 6.2 bits a weight where rows are 576 long, and 4.8 where they are 4,096.
FOUR_BIT = ("rtn-int4", "qat-int4", "nf4", "nf4-single", "fp4", "fp4-single", "gptq", "autogptq", "awq", "autoawq")


def frontier(points, more_is_better=False):
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


def plot(found, against="weight_bytes"):
    """(figure, alternative text, table) of KL divergence against one of AXES for a list of records; None for fewer than two.

    Methods on the frontier are filled and joined by a line, the others hollow. Records without one of the two numbers are left out,
    and so are FINE_TUNED.
    """
    label, factor, more = AXES[against]
    shown = [r for r in found if r["kl_divergence"] is not None and r[against] and r["method"] not in FINE_TUNED]
    shown.sort(key=lambda record: record["kl_divergence"])
    if len(shown) < 2:
        return None
    import matplotlib.pyplot as plt
    import pandas

    figures.style()
    points = [(record[against] * factor, max(record["kl_divergence"], FLOOR)) for record in shown]
    best = frontier(points, more)
    fig, ax = plt.subplots(figsize=(8, max(3.2, 0.3 * len(points))))
    ax.plot(*zip(*(points[n] for n in best)), color="#1a1a1a", linewidth=1, drawstyle="steps-post", zorder=2)
    for number, (record, point) in enumerate(zip(shown, points)):
        color = figures.PALETTE[number % len(figures.PALETTE)]
        ax.scatter(*point, edgecolor=color, facecolor=color if number in best else "white", linewidth=1.5, zorder=3)
        # Names stand in a column beside the plot, in the order of KL: beside their points they would cover each other.
        place = (1.06, (number + 0.5) / len(points))
        line = {"arrowstyle": "-", "color": color, "alpha": 0.5, "linewidth": 0.8, "relpos": (0, 0.5)}
        name = f"{record['method']}, {point[0]:.0f}" + (" *" if number in best else "")
        ax.annotate(name, point, place, textcoords=ax.transAxes, va="center", color=color, arrowprops=line)
    ax.set(xlabel=label, ylabel="KL from the untouched model", yscale="log")
    names = [shown[n]["method"] for n in best]
    alt = (
        f"KL divergence from the untouched model against {label.replace(', MB', ' in MB')} for {len(points)} methods. "
        f"On the frontier (marked *), which no other method beats: {', '.join(names)}."
    )
    table = pandas.DataFrame(
        [[record["method"], point[0], record["kl_divergence"], "yes" if n in best else "no"] for n, (record, point) in enumerate(zip(shown, points))],
        columns=["method", label, "KL", "on the frontier"],
    )
    return fig, alt, table


def rankings(measured: dict[str, dict], references: Sequence[Reference] = ()) -> dict[str, list[dict]]:
    """{model: its records of FOUR_BIT methods, lowest KL first} of a run ({method: record}) and of what comes with the course.

    A model's records are those of one device: of the run or the reference with the most methods, the run where they hold equally
    many. Random weights have no quality to rank, so a model made of them is left out, as is a record without an interval.
    """
    ranked = {}
    for records in (measured, *(reference.records for reference in references)):
        groups = {}
        for record in records.values():
            if record["method"] in FOUR_BIT and record["kl_low"] is not None and "random weights" not in record["model"]:
                groups.setdefault((record["model"].split()[0], record["device"]), []).append(record)
        for (model, _), group in groups.items():
            if len(group) > len(ranked.get(model, ())):
                ranked[model] = sorted(group, key=lambda record: record["kl_divergence"])
    return ranked


def order(first: dict, second: dict) -> int:
    """-1 where first's KL is the lower one, 1 where second's is, 0 where their intervals overlap: then they are not told apart."""
    if first["kl_high"] < second["kl_low"]:
        return -1
    return int(second["kl_high"] < first["kl_low"])


def differences(ranked: dict[str, list[dict]]) -> str:
    """What `rankings` of several models share and where they part, in words: only intervals that do not overlap make an order."""
    models = list(ranked)
    if not models:
        return "No record of a 4-bit method has an interval yet."
    if len(models) == 1:
        return f"Only {models[0]} has records of 4-bit methods, so whether another model ranks them alike is not known here."
    return " ".join(_difference(one, other, ranked[one], ranked[other]) for one, other in itertools.combinations(models, 2))


def _difference(one, other, first, second):
    """The same for two models."""
    first, second = ({record["method"]: record for record in each} for each in (first, second))
    common = [method for method in first if method in second]
    pairs = [(a, b, order(first[a], first[b]), order(second[a], second[b])) for a, b in itertools.combinations(common, 2)]
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


def plot_rankings(ranked: dict[str, list[dict]]) -> tuple[matplotlib.figure.Figure, str, pandas.DataFrame] | None:
    """(figure, alternative text, table) of `rankings`: a panel a model, KL in nats with its interval; None without a record."""
    if not ranked:
        return None
    import matplotlib.pyplot as plt
    import pandas
    from matplotlib import ticker

    figures.style()
    height = 1.3 + 0.32 * max(map(len, ranked.values()))
    fig, panels = plt.subplots(1, len(ranked), figsize=(max(5, 4.2 * len(ranked)), height), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(record["method"] for group in ranked.values() for record in group))
    for ax, (model, group) in zip(panels[0], ranked.items()):
        for place, record in enumerate(group):
            color = figures.PALETTE[names.index(record["method"]) % len(figures.PALETTE)]
            mean, low, high = (max(record[name], FLOOR) for name in ("kl_divergence", "kl_low", "kl_high"))
            ax.errorbar(mean, place, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt="o", color=color, capsize=3)
        ax.set_yticks(range(len(group)), [record["method"] for record in group])
        ax.set(xscale="log", xlabel="KL from the untouched model, nats", ylim=(len(group) - 0.5, -0.5))
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
        ax.set_title(f"{model}\n{group[0]['device']}", fontsize="medium")
    columns = {
        model: pandas.Series(
            [f"{r['method']}: {tables.interval(r['kl_divergence'], r['kl_low'], r['kl_high'])}" for r in group], index=range(1, len(group) + 1)
        )
        for model, group in ranked.items()
    }
    table = pandas.DataFrame(columns).fillna("").rename_axis("rank")
    firsts = "; ".join(f"{model}: {', '.join(record['method'] for record in group)}" for model, group in ranked.items())
    alt = f"4-bit methods by KL divergence with 95 % intervals, lowest first. {firsts}. {differences(ranked)}"
    return fig, alt, table
