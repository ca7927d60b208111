"""The plots of a run, drawn from its records alone: accuracy and latency over MACs, accuracy by class, filters kept.

Each function takes the records of one run and returns a figure, or None where no pruned model has been recorded.
"""

from collections.abc import Callable, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from intervals import FEWEST_PAIRS
from plot_labels import label_ends, label_right, mark_ratios
from plot_style import FAINT, INK, PALE, STYLE, draw_heat_map, heat_maps, method_colour, title
from records import Record
from tables import engine_name, scaled, timed

POINTS = {"marker": "o", "markersize": 4.5, "clip_on": False}  # a marker is whole at the edge of the axes, too
BEFORE = {"linestyle": (0, (4, 2)), "linewidth": 1.2, "markerfacecolor": "white"} | POINTS
AFTER = {"linestyle": "-", "linewidth": 1.8} | POINTS
SMALL_MULTIPLES = 8  # classes; more are drawn as a heat map
BARS = 3  # ratios; more are drawn as a heat map
ENGINE_COLOURS = {"pytorch": "#0072B2", "onnxruntime": "#D55E00"}
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
        label_ends(axes, labels)
        label_right(axes, [(100 * r.accuracy, _dense_label(r)) for r in dense])
        mark_ratios(axes, [(r.macs / size, r.ratio) for r in lines["pruned"] or lines["retrained"]])
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


def latency_over_macs(records: Sequence[Record]) -> Figure | None:
    """Measured latency against MACs, both as shares of the dense model's: on the diagonal MACs would be speed."""
    line = [record for record in _stage(records, "pruned") if record.macs_ratio is not None and record.times]
    if not line:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 110], [0, 110], color=FAINT, linewidth=0.8, zorder=1)
        labels = []
        for place, (engine, size) in enumerate(timed(line)):
            points = [(100 * r.macs_ratio, r.time(engine, size)) for r in line if r.time(engine, size) is not None]
            look = {"color": ENGINE_COLOURS[engine], "marker": "os^Dv"[place % 5], "markersize": 4.5, "zorder": 3}
            dashes = {"linestyle": "-" if engine == "pytorch" else (0, (4, 2)), "linewidth": 1.2, "marker": ""}
            axes.plot([macs for macs, _ in points], [100 * t.ratio for _, t in points], **look | dashes)
            for macs, timing in points:
                bars = (timing.ratio - timing.ratio_low, timing.ratio_high - timing.ratio)
                few = timing.pairs < FEWEST_PAIRS  # too few for an interval
                error = None if few else [[100 * bar] for bar in bars]
                faded = {"markerfacecolor": "white", "alpha": 0.5} if timing.noisy else {}
                axes.errorbar([macs], [100 * timing.ratio], error, elinewidth=0.8, **look | faded)
            least = min(points, key=lambda point: point[0])
            labels.append((least[0], 100 * least[1].ratio, f"{engine_name(engine)}, {size}", ENGINE_COLOURS[engine]))
        times = [timing for record in line for timing in record.times]
        # What says nothing must not squeeze what does.
        highest = max([100 * t.ratio_high for t in times if not t.noisy] or [100 * t.ratio for t in times])
        smallest = min(100 * record.macs_ratio for record in line)
        axes.set_xlim(max(0, smallest - 0.4 * (104 - smallest) - 4), 104)
        axes.set_ylim(0, max(104, 1.04 * highest))
        axes.grid(color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
        middle = (smallest + 104) / 2
        beside = {"textcoords": "offset points", "size": 7.5, "color": FAINT, "va": "top"}
        axes.annotate("as few as MACs", (middle, middle), (4, -4), **beside)
        label_ends(axes, labels)
        axes.set_xlabel("MACs left (% of the dense model); beside each line: engine and images a batch")
        hollow = "; hollow: says nothing" if any(timing.noisy for timing in times) else ""
        axes.set_ylabel(f"latency left (% of the dense model, with interval{hollow})")
        title(figure, line[0], "What fewer MACs buy in measured latency")
    return figure


PLOTS: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    "accuracy_over_macs": accuracy_over_macs,
    "accuracy_per_class": accuracy_per_class,
    "filters_kept": filters_kept,
    "latency_over_macs": latency_over_macs,
}
