"""Texts beside the points that they name, none over another."""

from collections.abc import Sequence
from math import inf

from matplotlib.axes import Axes

from plot_style import FAINT, PALE

POINTS_PER_INCH = 72


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """The values moved apart, as little as it takes and in their order, so that neighbours differ by `gap` or more."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    groups: list[list[int]] = []  # neighbours that have come to touch; each group is centred on its own mean
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _start(groups[-1], values, gap) < _end(groups[-2], values, gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [0.0] * len(values)
    for group in groups:
        for position, index in enumerate(group):
            placed[index] = _start(group, values, gap) + gap * position
    return placed


def _start(group: Sequence[int], values: Sequence[float], gap: float) -> float:
    return sum(values[index] for index in group) / len(group) - gap * (len(group) - 1) / 2


def _end(group: Sequence[int], values: Sequence[float], gap: float) -> float:
    return _start(group, values, gap) + gap * len(group)


def _stack(values: Sequence[float], gap: float) -> list[float]:
    """The values moved down, as little as it takes and in their order, so that neighbours differ by `gap` or more."""
    placed, limit = [0.0] * len(values), inf
    for index in sorted(range(len(values)), key=lambda index: values[index], reverse=True):
        placed[index] = min(values[index], limit)
        limit = placed[index] - gap
    return placed


def _points_high(axes: Axes) -> float:
    """Data units of y that one typographic point is high, about: labels need room before the layout is known."""
    low, high = axes.get_ylim()
    rows = axes.get_subplotspec().get_gridspec().nrows
    return (high - low) / (0.72 * axes.figure.get_figheight() / rows * POINTS_PER_INCH)


def label_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Name each line (x, y, text, colour) at its left end: beside it where there is room, else below it."""
    point = _points_high(axes)
    left, right = axes.get_xlim()
    beside = all(x - left > 0.25 * (right - left) for x, *_ in labels)
    heights = (_spread if beside else _stack)([y for _, y, _, _ in labels], 12 * point)
    for (x, y, text, colour), height in zip(labels, heights, strict=True):
        offset = (-8, (height - y) / point) if beside else (2, (height - y) / point - 7)
        align = {"ha": "right", "va": "center"} if beside else {"ha": "left", "va": "top"}
        axes.annotate(text, (x, y), offset, textcoords="offset points", color=colour, **align)


def label_column(axes: Axes, labels: Sequence[tuple[float, float, str, str]], x: float, side: str) -> None:
    """Name points (x, y, text, colour) in a column at `x`, in data units, each joined to its point by a thin line.

    side: right | left, where the texts end or begin. Call it once the limits are final: texts stay within them.
    """
    point = _points_high(axes)
    low, high = axes.get_ylim()
    gap = min(12 * point, (high - low - 12 * point) / max(len(labels) - 1, 1))
    heights = _spread([y for _, y, _, _ in labels], gap)
    order, last = sorted(range(len(labels)), key=heights.__getitem__), len(labels) - 1
    for rank, index in enumerate(order):
        heights[index] = max(heights[index], low + 6 * point + rank * gap)
        heights[index] = min(heights[index], high - 6 * point - (last - rank) * gap)
    for (place, y, text, colour), height in zip(labels, heights, strict=True):
        axes.annotate(
            text, (place, y), (x, height), color=colour, ha=side, va="center", size=8, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 1, "shrinkB": 3,
                        "relpos": ({"right": 1, "left": 0}[side], 0.5)},
        )  # fmt: skip


def label_right(axes: Axes, labels: Sequence[tuple[float, str]]) -> None:
    """Name the points at the right edge (y, text) in the margin beside them."""
    point = _points_high(axes)
    heights = _spread([y for y, _ in labels], 25 * point)
    too_high = max([0.0, *(height + 14 * point - axes.get_ylim()[1] for height in heights)])
    heights = [height - too_high for height in heights]
    for (y, text), height in zip(labels, heights, strict=True):
        axes.annotate(
            text, (1, y), (1.04, height), va="center", annotation_clip=False,
            xycoords=axes.get_yaxis_transform(), textcoords=axes.get_yaxis_transform(),
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.5},
        )  # fmt: skip


def mark_ratios(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Write the ratio asked for above the MACs (x, ratio) that it led to; those too close for two labels share one."""
    left, right = axes.get_xlim()
    clusters: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        clusters.append([point])
        while len(clusters) > 1 and _crowded(clusters[-2], clusters[-1], 0.0125 * (right - left)):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    at_top = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    for cluster in clusters:
        axes.text(_middle(cluster), 1.02, _range(cluster), ha="center", va="bottom", size=7.5, color=FAINT, **at_top)
        for x, _ in cluster:
            axes.plot([x, x], [0, 1], color=PALE, linewidth=0.6, zorder=0, **at_top)
    axes.text(1.04, 1.02, "ratio asked for", transform=axes.transAxes, va="bottom", size=7.5, color=FAINT)


def _middle(cluster: Sequence[tuple[float, float]]) -> float:
    return (min(cluster)[0] + max(cluster)[0]) / 2


def _range(cluster: Sequence[tuple[float, float]]) -> str:
    ratios = sorted({ratio for _, ratio in cluster})
    return "\u2013".join(f"{ratio:g}" for ratio in (ratios[0], ratios[-1])[: len(ratios)])


def _crowded(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]], letter: float) -> bool:
    """Whether the labels of two clusters would come closer than one letter, each letter being so wide."""
    needed = letter * ((len(_range(first)) + len(_range(second))) / 2 + 1)
    return _middle(second) - _middle(first) < needed
