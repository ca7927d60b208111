"""The plots of a sweep, drawn from its records alone: what each variant keeps, at what cost, and how sure that is.

Each function takes a sweep and returns a figure, or None where the records hold nothing to draw. Bands and bars are
95 % intervals over subsets of classes and seeds; without enough of these there are none.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from math import ceil, floor, log10
from statistics import fmean

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comparison import STAGES, Cells, Resampling, Setting, cells_of, setting_of, settings_of, standings
from plot_labels import label_column
from plot_style import INK, PALE, STYLE, variant_style
from records import Record
from runs import Sweep, block_of, task_of
from sweep_heat_maps import (
    accuracy_lost_per_class,
    filters_kept_per_layer,
    jaccard,
    middle_level,
    said,
    selected,
    selection_overlap,
)
from tables import headline

BANDS = 4  # lines; of more, the intervals are bars beside the points
Place = Callable[[Record], float | None]


def stages_of(records: Sequence[Record]) -> list[str]:
    found = {record.stage for record in records if record.ratio}
    return [stage for stage in STAGES if stage in found]


def panels_of(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The tasks and models that something was pruned for and on."""
    return sorted({(task_of(record), record.model) for record in records if record.ratio})


def _latency(record: Record) -> float | None:
    timing = headline(record)
    return None if timing is None or timing.noisy else timing.ratio


def accuracy_over_macs(sweep: Sweep) -> Figure | None:
    return _curves(sweep, lambda record: record.macs_ratio, "MACs left (% of the dense network's)", "MACs")


def accuracy_over_params(sweep: Sweep) -> Figure | None:
    return _curves(
        sweep, lambda record: record.params_ratio, "parameters left (% of the dense network's)", "parameters"
    )


def accuracy_over_latency(sweep: Sweep) -> Figure | None:
    return _curves(sweep, _latency, "measured latency, PyTorch (% of the dense network's)", "latency")


def _curves(sweep: Sweep, place: Place, label: str, what: str) -> Figure | None:
    """A row a task and model, a column a stage; a line a variant through its means at each target."""
    records = sweep.records
    if not any(record.ratio and place(record) is not None for record in records):
        return None
    rows, columns = panels_of(records), stages_of(records)
    if not rows:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 4.6 * len(columns), 0.9 + 3.6 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), len(columns), squeeze=False, sharey="row")
        for (task, model), line in zip(rows, panels, strict=True):
            named = {}
            for stage, axes in zip(columns, line, strict=True):
                chosen = [r for r in records if (task_of(r), r.model, r.stage) == (task, model, stage)]
                named[axes] = _draw_curves(axes, chosen, place)
                axes.set_title(f"{task}, {model}, {STAGES[stage]}")
            for axes, labels in named.items():  # once the heights, which they share, are final
                _name_curves(axes, labels)
            line[0].set_ylabel("test accuracy, selected classes (%)")
        for axes in panels[-1]:
            axes.set_xlabel(label)
        figure.suptitle(f"What pruning costs in accuracy and saves in {what}", x=0.01, ha="left")
    return figure


def _draw_curves(axes: Axes, records: Sequence[Record], place: Place) -> list[tuple[float, float, str, str]]:
    """Draws a line a variant; returns the names for their ends: x, y, text, colour."""
    labels = []
    lines = _means(records, place)
    for number, (variant, points) in enumerate(sorted(lines.items())):
        x, y, low, high = zip(*points, strict=True)
        style = variant_style(variant)
        axes.plot(x, y, markersize=4, linewidth=1.4, clip_on=False, label=variant, **style)
        if None not in low and len(lines) <= BANDS:
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
        elif None not in low:  # so many bands would be one
            beside = [place + 0.55 * (number - (len(lines) - 1) / 2) for place in x[:-1]]
            axes.vlines(beside, low[:-1], high[:-1], color=style["color"], alpha=0.55, linewidth=0.8)
        labels.append((x[0], y[0], variant, style["color"]))
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    return labels


def _name_curves(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names in a column beyond the ends that were pruned most, where there are no ticks."""
    if not labels:
        return
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    names = min(max(0.0168 * max(len(name) for *_, name, _ in labels), 0.27), 0.6)  # their share of the axis, about
    axes.set_xlim(left - (names + 0.1) / (1 - names) * (right - left), right)
    axes.set_xticks(ticks)
    label_column(axes, labels, min(x for x, *_ in labels) - 0.09 * (right - left), "right")


def _means(records: Sequence[Record], place: Place) -> dict[str, list[tuple]]:
    """variant -> (place in %, accuracy in %, its low, its high) by place, each a mean over blocks at one target.

    The blocks are those of the table, which all variants have; where the place of some is not known, it is a mean over
    the others.
    """
    points: dict[str, list[tuple]] = defaultdict(list)
    levels = [cells_of(records, setting) for setting in settings_of(records)] + [_nothing_removed(records)]
    for cells in levels:
        resampling = Resampling(cells.blocks) if cells.blocks else None
        for variant, row in cells.records.items():
            places = [share for record in row if (share := place(record)) is not None]
            if places:
                accuracy = resampling.mean([100 * record.accuracy for record in row])
                points[variant].append((100 * sum(places) / len(places), accuracy.value, accuracy.low, accuracy.high))
    return {variant: sorted(row) for variant, row in points.items() if len(row) > 1}


def _nothing_removed(records: Sequence[Record]) -> Cells:
    """Ratio 0 of every variant, on the blocks that all have."""
    found: dict[str, dict] = defaultdict(dict)
    for record in records:
        if record.ratio == 0 and record.target is None:
            found[record.variant][block_of(record)] = record
    blocks = tuple(sorted(set.intersection(*map(set, found.values())))) if found else ()
    return Cells(blocks, {name: tuple(own[block] for block in blocks) for name, own in found.items()}, {}, {}, ())


def middle_setting(records: Sequence[Record], task: str, model: str) -> Setting | None:
    """The comparison shown where there is room for one: the last stage, at the target in the middle."""
    stages = [stage for stage in stages_of(records) if stage != "scratch"]
    counts = Counter(
        setting
        for record in records
        if (setting := setting_of(record)) and (setting.task, setting.model) == (task, model)
    )
    usual = sorted(s for s in counts if s.stage in stages[-1:] and 2 * counts[s] >= max(counts.values()))
    return usual[(len(usual) - 1) // 2] if usual else None


def scoring_cost_over_accuracy(sweep: Sweep) -> Figure | None:
    """Seconds that scoring took, on a logarithmic scale, against the accuracy kept at the middle target."""
    drawn = []
    for task, model in panels_of(sweep.records):
        setting = middle_setting(sweep.records, task, model)
        rows = [row for row in standings(sweep.records, setting) if row.scoring_seconds] if setting else []
        drawn += [(setting, rows)] if rows else []
    if not drawn:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.6 + 3.2 * len(drawn)), layout="constrained")
        for (setting, rows), axes in zip(drawn, figure.subplots(len(drawn), 1, squeeze=False)[:, 0], strict=True):
            labels = []
            for row in rows:
                style, mean = variant_style(row.variant), row.accuracy
                # The logarithm itself is drawn: names are set apart in the axes' own units.
                x, y = log10(1000 * row.scoring_seconds), 100 * mean.value
                if mean.low is not None:
                    axes.plot([x, x], [100 * mean.low, 100 * mean.high], color=style["color"], linewidth=0.8)
                axes.plot(x, y, color=style["color"], marker=style["marker"], markersize=6)
                labels.append((x, y, row.variant, style["color"]))
            first, last = min(x for x, *_ in labels), max(x for x, *_ in labels)
            span = max(last - first, 0.5)
            axes.set_xlim(first - 0.08 * span, last + 0.5 * span)
            axes.set_ylim(*axes.get_ylim())
            label_column(axes, labels, last + 0.12 * span, "left")
            axes.set_xticks(_one_two_five(first, last))
            axes.set_xlim(first - 0.08 * span, last + 0.5 * span)
            axes.xaxis.set_major_formatter(lambda power, _: f"{10**power:.3g}")
            axes.grid(color=PALE, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.set_title(str(setting))
            axes.set_ylabel("test accuracy (%)")
            axes.set_xlabel("time of scoring (ms, log scale)")
        figure.suptitle("What scoring costs and what it is worth", x=0.01, ha="left")
    return figure


def _one_two_five(first: float, last: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times the powers of ten between two logarithms, or about there."""
    powers = range(floor(first), ceil(last) + 1)
    ticks = [log10(step * 10.0**power) for power in powers for step in (1, 2, 5)]
    return [tick for tick in ticks if first - 0.3 <= tick <= last + 0.3]


def ranks(sweep: Sweep) -> Figure | None:
    """Mean ranks with their intervals, best on top; a bar beside them joins those that cannot be told apart."""
    drawn = [
        (setting, rows)
        for setting in settings_of(sweep.records)
        if setting.stage == stages_of(sweep.records)[-1] and len(rows := standings(sweep.records, setting)) > 1
    ]
    if not drawn:
        return None
    heights = [0.75 + 0.22 * len(rows) for _, rows in drawn]
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.6 + sum(heights)), layout="constrained")
        panels = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
        for (setting, rows), axes in zip(drawn, panels, strict=True):
            rows = sorted(rows, key=lambda row: (row.mean_rank.value, row.variant))
            for place, row in enumerate(rows):
                style, rank = variant_style(row.variant), row.mean_rank
                if rank.low is not None:
                    axes.plot([rank.low, rank.high], [place, place], color=style["color"], linewidth=1.2)
                axes.plot(rank.value, place, color=style["color"], marker=style["marker"], markersize=5.5)
                axes.annotate(
                    f"{100 * row.accuracy.value:.1f} %   place {_places(row.rank)}", (1.01, place), va="center", size=7,
                    xycoords=axes.get_yaxis_transform(), color=INK, annotation_clip=False,
                )  # fmt: skip
            axes.set_yticks(range(len(rows)), [row.variant for row in rows])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.grid(axis="x", color=PALE, linewidth=0.6)
            axes.tick_params(axis="y", length=0)
            axes.set_axisbelow(True)
            axes.set_title(f"{setting}\n{rows[0].accuracy.n} pairs of subset and seed", x=-0.22)
        panels[-1].set_xlabel("mean rank in accuracy (1: best)")
        figure.suptitle("Who keeps most, and who cannot be told apart", x=0.01, ha="left")
    return figure


def selection_stability(sweep: Sweep) -> Figure | None:
    """How alike the filters are that one variant removes after other draws of as many scoring images (Jaccard index).

    Drawn for sweeps over `num_pruning_samples` and `sampling_seed`. All else is equal in the pairs that are compared.
    """
    draws: dict[tuple, dict[int, set]] = defaultdict(dict)
    for record, filters in selected(sweep):
        name = " ".join(word for word in record.variant.split() if not word.startswith("num_pruning_samples="))
        place = (task_of(record), record.model, name, record.num_pruning_samples, record.selected_classes, record.seed)
        draws[place][record.sampling_seed] = filters
    alike: dict[tuple, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (task, model, name, images, *_), drawn in draws.items():
        pairs = [jaccard(one, other) for one, other in combinations(drawn.values(), 2) if one | other]
        if pairs:
            alike[task, model][name][images] += pairs
    alike = {
        panel: {name: points for name, points in lines.items() if len(points) > 1} for panel, lines in alike.items()
    }
    panels = sorted(panel for panel, lines in alike.items() if lines)
    if not panels:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.6 + 3.2 * len(panels)), layout="constrained")
        for panel, axes in zip(panels, figure.subplots(len(panels), 1, squeeze=False)[:, 0], strict=True):
            labels, places = [], sorted({log10(images) for points in alike[panel].values() for images in points})
            for name, points in sorted(alike[panel].items()):
                images = sorted(points)
                style, means = variant_style(name), [fmean(points[number]) for number in images]
                axes.plot([log10(number) for number in images], means, markersize=4, linewidth=1.4, label=name, **style)
                labels.append((log10(images[-1]), means[-1], name, style["color"]))
            axes.set_ylim(0, 103)
            span = places[-1] - places[0]
            axes.set_xlim(places[0] - 0.04 * span, places[-1] + 0.35 * span)
            label_column(axes, labels, places[-1] + 0.08 * span, "left")
            axes.set_xticks(places, [f"{10**place:.0f}" for place in places])
            axes.grid(axis="y", color=PALE, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.set_title(f"{panel[0]}, {panel[1]}, {said(middle_level(sweep))}")
            axes.set_ylabel("overlap of selections (%)")
            axes.set_xlabel("scoring images in all (log scale)")
        figure.suptitle("How much the filters depend on which images score them", x=0.01, ha="left")
    return figure


def _places(rank: tuple[int, int]) -> str:
    return f"{rank[0]}" if rank[0] == rank[1] else f"{rank[0]}\u2013{rank[1]}"


SWEEP_PLOTS: dict[str, Callable[[Sweep], Figure | None]] = {
    draw.__name__: draw
    for draw in (
        accuracy_over_macs,
        accuracy_over_latency,
        accuracy_over_params,
        ranks,
        accuracy_lost_per_class,
        filters_kept_per_layer,
        selection_overlap,
        selection_stability,
        scoring_cost_over_accuracy,
    )
}
