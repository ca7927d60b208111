"""The plots of a run, drawn from its records alone: accuracy over MACs, accuracy by class, filters kept by layer.

Each function takes the records of one run and returns a figure, or None where no pruned model has been recorded.
"""

from collections.abc import Callable, Sequence
from math import inf

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from plot_style import FAINT, INK, PALE, STYLE, draw_heat_map, heat_maps, method_colour, title
from records import Record
from tables import scaled

POINTS = {"marker": "o", "markersize": 4.5, "clip_on": False}  # a marker is whole at the edge of the axes, too
BEFORE = {"linestyle": (0, (4, 2)), "linewidth": 1.2, "markerfacecolor": "white"} | POINTS
AFTER = {"linestyle": "-", "linewidth": 1.8} | POINTS
SMALL_MULTIPLES = 8  # classes; more are drawn as a heat map
BARS = 3  # ratios; more are drawn as a heat map
POINTS_PER_INCH = 72
RATIO_ASKED = "ratio asked for (share of filters to remove)"


def _stage(records: Sequence[Record], stage: str) -> list[Record]:
    return sorted((record for record in records if record.stage == stage), key=lambda record: record.ratio)


def _dense(records: Sequence[Record], head: str) -> Record | None:
    """The dense model with these logits; with the selected ones, ratio 0 is the same model."""
    whole = [r for r in records if r.head == head and not r.filters_removed and r.stage in ("dense", "pruned")]
    return min(whole, key=lambda record: record.stage, default=None)


def accuracy_over_macs(records: Sequence[Record]) -> Figure | None:
    """Accuracy on the selected classes against MACs, before and after retraining, beside the two dense models."""
    lines = {stage: [r for r in _stage(records, stage) if r.macs is not None] for stage in ("pruned", "retrained")}
    points = lines["pruned"] + lines["retrained"]
    if not points:
        return None
    dense = [r for r in (_dense(records, "all"), _dense(records, "selected")) if r is not None and r.macs is not None]
    unit, size = ("G", 1e9) if max(r.macs for r in points + dense) >= 1e9 else ("M", 1e6)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        colour = method_colour(points[0].method)
        labels = []
        for stage, style, text in (("pruned", BEFORE, "before retraining"), ("retrained", AFTER, "after retraining")):
            x, y = [r.macs / size for r in lines[stage]], [100 * r.accuracy for r in lines[stage]]
            if x:
                axes.plot(x, y, color=colour, zorder=3, **style)
                labels.append((x[-1], y[-1], text if lines["retrained"] else "pruned", colour))
        for record in dense:
            face = INK if record.head == "all" else "white"
            axes.plot(record.macs / size, 100 * record.accuracy, "D", color=INK, markerfacecolor=face, zorder=4)
        _frame_macs(axes, [r.macs / size for r in points + dense], [100 * r.accuracy for r in points + dense])
        _label_ends(axes, labels)
        _label_right(axes, [(100 * r.accuracy, _dense_label(r)) for r in dense])
        _mark_ratios(axes, [(r.macs / size, r.ratio) for r in lines["pruned"] or lines["retrained"]])
        reference = f"; dense model: {scaled(dense[0].macs)}" if dense else ""
        axes.set_xlabel(f"MACs per image ({unit}{reference})")
        axes.set_ylabel("test accuracy, selected classes (%)")
        title(figure, points[0], "What pruning costs in accuracy and saves in MACs")
    return figure


def _dense_name(record: Record) -> str:
    return f"dense, {record.head} logits"


def _dense_label(record: Record) -> str:
    return f"{_dense_name(record)}\n{100 * record.accuracy:.1f} %"


def _frame_macs(axes: Axes, macs: Sequence[float], accuracies: Sequence[float]) -> None:
    """Axes around the points, with room on the left for the names of the lines; no ticks beyond 0 and 100 %."""
    low, high = min(accuracies), max(accuracies)
    room = 0.08 * max(high - low, 5)
    span = max(max(macs) - min(macs), 0.1 * max(macs))
    axes.set_xlim(max(0, min(macs) - 0.45 * span), max(macs) + 0.03 * span)
    axes.set_ylim(max(low - 2 * room, -room), high + room)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])
    axes.set_ylim(max(low - 2 * room, -room), high + room)  # ticks may have widened it
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)


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
    return (high - low) / (0.72 * axes.figure.get_figheight() * POINTS_PER_INCH)


def _label_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Name each line (x, y, text, colour) at its left end: beside it where there is room, else below it."""
    point = _points_high(axes)
    left, right = axes.get_xlim()
    beside = all(x - left > 0.25 * (right - left) for x, *_ in labels)
    heights = (_spread if beside else _stack)([y for _, y, _, _ in labels], 12 * point)
    for (x, y, text, colour), height in zip(labels, heights, strict=True):
        offset = (-8, (height - y) / point) if beside else (2, (height - y) / point - 7)
        align = {"ha": "right", "va": "center"} if beside else {"ha": "left", "va": "top"}
        axes.annotate(text, (x, y), offset, textcoords="offset points", color=colour, **align)


def _label_right(axes: Axes, labels: Sequence[tuple[float, str]]) -> None:
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


def _mark_ratios(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
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


def accuracy_per_class(records: Sequence[Record]) -> Figure | None:
    """Accuracy of every selected class over the ratio asked for: a panel each, or a heat map where they are many."""
    stages = {stage: _stage(records, stage) for stage in ("pruned", "retrained")}
    points = stages["pruned"] + stages["retrained"]
    if not points:
        return None
    names = points[0].class_names
    with rc_context(STYLE):
        draw = _class_panels if len(names) <= SMALL_MULTIPLES else _class_heat_map
        figure = draw(names, stages, _dense(records, "selected") or _dense(records, "all"))
        title(figure, points[0], "What pruning does to each class: test accuracy in %")
    return figure


def _class_panels(names: Sequence[str], stages: dict[str, list[Record]], dense: Record | None) -> Figure:
    columns = len(names) if len(names) <= 4 else -(-len(names) // 2)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(1.8 * columns + 0.8, 4.6), 1.8 * rows + 1.3), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    points = stages["pruned"] + stages["retrained"]
    colour = method_colour(points[0].method)
    for name, axes in zip(names, panels.flat, strict=False):
        for stage, style in (("pruned", BEFORE), ("retrained", AFTER)):
            shares = [100 * record.accuracy_per_class[name] for record in stages[stage]]
            if shares:  # an empty line that is not clipped has no extent, and upsets the layout
                axes.plot([record.ratio for record in stages[stage]], shares, color=colour, zorder=3, **style)
        if dense is not None:
            axes.axhline(100 * dense.accuracy_per_class[name], color=INK, linewidth=0.8, zorder=2)
        axes.set_title(f"{name} ({points[0].images_per_class[name]} images)")
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
    for position, axes in enumerate(panels.flat):
        axes.set_visible(position < len(names))
        axes.tick_params(labelbottom=position + columns >= len(names))
    lowest = min(min(record.accuracy_per_class.values()) for record in points)
    panels[0, 0].set_xlim(-0.05, 1.03)
    panels[0, 0].set_xticks([0, 0.2, 0.4, 0.6, 0.8])
    panels[0, 0].set_ylim(max(100 * lowest - 8, -4), 104)
    signs = {"\u25cb before retraining": stages["pruned"], "\u25cf after retraining": stages["retrained"]}
    if dense is not None:
        signs[f"\u2500 {_dense_name(dense)}"] = [dense]
    key = "     ".join(sign for sign, drawn in signs.items() if drawn)
    figure.supxlabel(f"{RATIO_ASKED}\n{key}", size=9, linespacing=1.6)
    figure.supylabel("test accuracy (%)", size=9)
    return figure


def _class_heat_map(names: Sequence[str], stages: dict[str, list[Record]], dense: Record | None) -> Figure:
    panels = [("before retraining", stages["pruned"]), ("after retraining", stages["retrained"])]
    panels = [(when, line) for when, line in panels if line]
    if dense is not None:  # a column of its own; ratio 0 before retraining is the same model
        before = [record for record in panels[0][1] if record.stage == "retrained" or record.ratio]
        panels[0] = (panels[0][0], [dense, *before])
    shown = [[[100 * record.accuracy_per_class[name] for record in line] for name in names] for _, line in panels]
    lowest = min(value for panel in shown for row in panel for value in row)
    figure, axes = heat_maps([len(line) for _, line in panels], names, cell_width=0.36)
    for panel, (when, line), values in zip(axes, panels, shown, strict=True):
        draw_heat_map(panel, values, [[f"{value:.0f}" for value in row] for row in values], lowest, 100)
        ticks = [_dense_name(r).replace(" ", "\n") if r is dense else f"{r.ratio:g}" for r in line]
        panel.set_xticklabels(ticks)
        panel.set_title(when)
    figure.supxlabel(RATIO_ASKED, size=9)
    return figure


def filters_kept(records: Sequence[Record]) -> Figure | None:
    """Filters that each layer keeps, layers from input to output: bars for a few ratios, a heat map for more."""
    line = _stage(records, "pruned") or _stage(records, "retrained")
    line = [record for record in line if record.ratio] or line
    if not line:
        return None
    with rc_context(STYLE):
        figure = (_filter_bars if len(line) <= BARS else _filter_heat_map)(line)
        title(figure, line[0], "Filters kept in each layer")
    return figure


def _untouched(line: Sequence[Record]) -> set[str]:
    """Layers that are left out of pruning and did not lose filters together with another layer either."""
    return {n for n in line[0].layers_left_out if all(r.filters_kept_per_layer[n] == r.widths_dense[n] for r in line)}


def _ratio_label(record: Record) -> str:
    return f"{record.ratio:g}\n{100 * record.achieved_ratio:.0f} %"


def _filter_heat_map(line: Sequence[Record]) -> Figure:
    widths, untouched = line[0].widths_dense, _untouched(line)
    kept = [[record.filters_kept_per_layer[name] for record in line] for name in widths]
    shares = [[count / width for count in row] for row, width in zip(kept, widths.values(), strict=True)]
    texts = [["" if name in untouched else str(n) for n in row] for name, row in zip(widths, kept, strict=True)]
    figure, (axes,) = heat_maps([len(line)], [f"{name}  {width}" for name, width in widths.items()], cell_width=0.45)
    draw_heat_map(axes, shares, texts, 0, 1)
    for row, (name, label) in enumerate(zip(widths, axes.get_yticklabels(), strict=True)):
        if name in untouched:
            axes.add_patch(Rectangle((-0.5, row - 0.5), len(line), 1, facecolor="#F2F2F2", edgecolor="white"))
            axes.text((len(line) - 1) / 2, row, "left out", ha="center", va="center", size=6.5, color=INK)
            label.set_color(FAINT)
    axes.set_xticklabels([_ratio_label(record) for record in line])
    axes.set_xlabel("ratio asked for, and share of the prunable filters removed")
    axes.set_title("colour: share kept; number: filters kept; beside the name: filters before", size=8)
    return figure


def _filter_bars(line: Sequence[Record]) -> Figure:
    widths, untouched = line[0].widths_dense, _untouched(line)
    figure = Figure(figsize=(2.0 + 2.6 * len(line), 0.19 * len(widths) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(line), sharex=True, sharey=True, squeeze=False)[0]
    for record, axes in zip(line, panels, strict=True):
        for row, (name, width) in enumerate(widths.items()):
            kept = record.filters_kept_per_layer[name]
            axes.barh(row, width, color=PALE, height=0.72)
            if name not in untouched:
                axes.barh(row, kept, color=method_colour(record.method), height=0.72)
            text = "left out" if name in untouched else f"{kept} of {width}"
            axes.annotate(text, (width, row), (3, 0), textcoords="offset points", va="center", size=6.5, color=INK)
        removed = f"{100 * record.achieved_ratio:.0f} % removed"
        axes.set_title(f"ratio {record.ratio:g} asked for, {removed}")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(widths)), list(widths))
    panels[0].set_ylim(len(widths) - 0.4, -0.6)
    panels[0].set_xlim(0, 1.2 * max(widths.values()))
    figure.supxlabel("filters: kept (colour) of those before pruning (grey)", size=9)
    return figure


PLOTS: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    "accuracy_over_macs": accuracy_over_macs,
    "accuracy_per_class": accuracy_per_class,
    "filters_kept": filters_kept,
}
