"""Quality against what it costs: which methods no other one beats, and the picture of that."""

from helpers import figures

# field of a record: (label, factor, True where more is better)
AXES = {
    "weight_bytes": ("weights, MB", 1e-6, False),
    "decode_tokens_per_s": ("decoded tokens per second", 1, True),
}
FLOOR = 1e-5  # a KL divergence of zero has no place on a logarithmic axis


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

    Methods on the frontier are filled and joined by a line, the others hollow. Records without one of the two numbers are left out.
    """
    label, factor, more = AXES[against]
    shown = sorted((r for r in found if r["kl_divergence"] is not None and r[against]), key=lambda r: r["kl_divergence"])
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
