"""The heat maps of a sweep: accuracy lost by class, filters kept by layer, and how alike selections are."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from math import ceil, nan
from statistics import fmean

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comparison import BUDGETS, met
from plot_style import STYLE, draw_heat_map, heat_maps, stacked_heat_maps
from records import Record
from runs import Run, Sweep, block_of, task_of

CELL, LETTER = 0.4, 0.075  # inches: of a cell's width, and of a letter of a title's, about


def middle_level(sweep: Sweep) -> tuple[str | None, float] | None:
    """The budget and target, or the ratio, in the middle of those that most of the sweep has."""
    pruned = [record for record in sweep.records if record.stage == "pruned" and record.ratio]
    counts = Counter((r.match, r.ratio if r.target is None else r.target) for r in pruned)
    usual = [level for level, count in counts.items() if 2 * count >= max(counts.values())]
    return sorted(usual, key=lambda level: (level[0] or "", level[1]))[(len(usual) - 1) // 2] if usual else None


def said(level: tuple[str | None, float]) -> str:
    match, share = level
    return f"{100 * share:g} % of {BUDGETS[match]} removed" if match else f"ratio {share:g}"


def _at(sweep: Sweep, stages: tuple[str, ...]) -> Iterator[tuple[Run, Record]]:
    """The records at the middle level, of the last of `stages` that the sweep has, and the runs that they are of."""
    level = middle_level(sweep)
    present = {record.stage for record in sweep.records if record.ratio}
    stage = next((stage for stage in stages if stage in present), None)
    for run in sweep.runs:
        for record in run.records:
            at = (record.match, record.ratio if record.target is None else record.target)
            if record.stage == stage and record.ratio and at == level and met(record):
                yield run, record


def accuracy_lost_per_class(sweep: Sweep) -> Figure | None:
    """Points of accuracy that each class loses against the network that nothing was removed from, in the same stage."""
    lost: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for run, record in _at(sweep, ("retrained", "pruned")):
        whole = [r for r in run.records if r.stage == record.stage and not r.ratio]
        for name, share in record.accuracy_per_class.items():
            if whole:
                gone = 100 * (whole[0].accuracy_per_class[name] - share)
                lost[task_of(record), record.model][record.variant][name].append(gone)
    if not lost:
        return None
    panels = [(*key, sorted({name for row in rows.values() for name in row})) for key, rows in sorted(lost.items())]
    variants = sorted({variant for rows in lost.values() for variant in rows})
    means = [[[_mean(lost[d, m][v][name]) for name in names] for v in variants] for d, m, names in panels]
    highest = max([1.0, *(value for panel in means for row in panel for value in row if value is not None)])
    titles, least = _panel_titles([(task, model) for task, model, _ in panels])
    with rc_context(STYLE):
        figure, axes = heat_maps([max(len(names), least) for *_, names in panels], variants, cell_width=CELL)
        for text, (*_, names), values, panel in zip(titles, panels, means, axes, strict=True):
            texts = [["" if value is None else f"{round(value)}" for value in row] for row in values]
            draw_heat_map(panel, _with_gaps(values), texts, 0, highest)
            _name_columns(panel, names)
            panel.set_title(text)
        figure.set_figheight(figure.get_figheight() + 0.17 * titles[0].count("\n"))
        _title(figure, f"Points of accuracy that each class loses, {said(middle_level(sweep))}")
    return figure


def _panel_titles(panels: list[tuple[str, str]]) -> tuple[list[str], int]:
    """The title of each task and model, in lines where there are several, and how many cells leave room for any."""
    if len(panels) == 1:
        return [", ".join(panels[0])], 1
    lines = [", ".join(panel).replace(", ", ",\n") for panel in panels]
    widest = max(len(line) for text in lines for line in text.splitlines())
    return lines, ceil(widest * LETTER / CELL)


def filters_kept_per_layer(sweep: Sweep) -> Figure | None:
    """Percentage of its filters that each layer keeps, a mean over the runs; layers from input to output.

    A panel a model, below each other, of the first of its tasks.
    """
    kept: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for _, record in _at(sweep, ("pruned",)):
        for layer, width in record.widths_dense.items():
            share = 100 * record.filters_kept_per_layer[layer] / width
            kept[task_of(record), record.model][layer][record.variant].append(share)
    first = {model: (task, model) for task, model in sorted(kept, reverse=True)}
    panels = [(first[model], rows) for model in sorted(first) if (rows := _pruned_layers(kept[first[model]]))]
    if not panels:
        return None
    variants = sorted({variant for _, rows in panels for row in rows.values() for variant in row})
    with rc_context(STYLE):
        figure, axes = stacked_heat_maps([list(rows) for _, rows in panels], len(variants), cell_width=0.42)
        for (panel, rows), place in zip(panels, axes, strict=True):
            values = [[_mean(row.get(variant, [])) for variant in variants] for row in rows.values()]
            texts = [["" if value is None else f"{value:.0f}" for value in row] for row in values]
            draw_heat_map(place, _with_gaps(values), texts, 0, 100)
            place.set_title(f"{', '.join(panel)}; layers that no variant prunes are left out")
        _name_columns(axes[-1], variants, above=sum(0.19 * len(rows) + 0.5 for _, rows in panels[:-1]))
        _title(figure, f"Filters kept in each layer (%), {said(middle_level(sweep))}")
    return figure


def _pruned_layers(layers: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    return {layer: row for layer, row in layers.items() if any(share < 100 for own in row.values() for share in own)}


def selected(sweep: Sweep) -> Iterator[tuple[Record, set[tuple[str, int]]]]:
    """The records at the middle level, and the filters that were chosen, as layer and index."""
    for run, record in _at(sweep, ("pruned",)):
        if record.ratio in run.selections:
            yield record, {(layer, i) for layer, rows in run.selections[record.ratio].items() for i in rows}


def jaccard(one: set, other: set) -> float:
    """What two sets share, in % of what they hold together."""
    return 100 * len(one & other) / len(one | other)


def selection_overlap(sweep: Sweep) -> Figure | None:
    """Filters that two variants both remove, in % of those that either does (Jaccard index), a mean over the blocks."""
    chosen: dict[tuple, dict[str, set]] = defaultdict(dict)
    for record, filters in selected(sweep):
        chosen[task_of(record), record.model, block_of(record)][record.variant] = filters
    variants = sorted({variant for row in chosen.values() for variant in row})
    if len(variants) < 2:
        return None

    def overlap(one: str, other: str) -> float | None:
        both = [(row[one], row[other]) for row in chosen.values() if one in row and other in row]
        return _mean([jaccard(a, b) for a, b in both if a | b])

    values = [[overlap(one, other) for other in variants] for one in variants]
    with rc_context(STYLE):
        figure, (axes,) = heat_maps([len(variants)], variants, cell_width=0.42)
        texts = [["" if value is None else f"{value:.0f}" for value in row] for row in values]
        draw_heat_map(axes, _with_gaps(values), texts, 0, 100)
        _name_columns(axes, variants)
        axes.set_title("100: the same filters; beside random: what chance shares")
        _title(figure, f"How alike the selections are (%), {said(middle_level(sweep))}")
    return figure


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _name_columns(axes: Axes, names: list[str], above: float = 0.0) -> None:
    """Slanted names below the columns, and room for them. above: inches that other heat maps take above this one."""
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    figure, letters = axes.figure, max(map(len, names))
    height = above + 0.19 * len(axes.get_yticks()) + 1.0 + 0.06 * letters
    figure.set_figheight(max(figure.get_figheight(), height))
    figure.set_figwidth(max(figure.get_figwidth(), 0.42 * len(names) + 0.13 * letters))


def _with_gaps(values: list[list[float | None]]) -> list[list[float]]:
    """Cells without a value are left empty."""
    return [[nan if value is None else value for value in row] for row in values]


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left")
