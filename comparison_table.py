"""The comparison as text: a Markdown table a setting, one summary in words, and one tidy CSV file of all records."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from comparison import (
    FEWEST_BLOCKS,
    STAGES,
    Estimate,
    Setting,
    Standing,
    areas,
    cells_of,
    controls,
    difference,
    settings_of,
    standings,
)
from records import Record, spread
from runs import Sweep

MISSING = "\u2013"
COLUMNS = (
    *("place", "variant", "accuracy %", "worst class %", "points over random", "MACs left %", "parameters left %"),
    *("latency left %", "scoring s"),
)


def cells(row: Standing) -> list[str]:
    """The figures of one variant as text, under `COLUMNS`."""
    low, high = row.rank
    return [
        str(low) if low == high else f"{low}\u2013{high}",
        row.variant,
        estimate(row.accuracy),
        estimate(row.worst_class),
        MISSING if row.lead is None else estimate(row.lead, sign="+"),
        _percent(row.macs_ratio),
        _percent(row.params_ratio),
        _percent(row.latency_ratio),
        MISSING if row.scoring_seconds is None else f"{row.scoring_seconds:.3g}",
    ]


def estimate(given: Estimate, sign: str = "") -> str:
    """In per cent, with its interval where there is one: 97.3 [96.1, 98.2]."""
    low, high = given.low, given.high
    interval = "" if low is None or high is None else f" [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"
    return f"{100 * given.value:{sign}.1f}{interval}"


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}"


def markdown(sweep: Sweep) -> str:
    """All settings as Markdown tables, the words before them and what is missing behind them."""
    parts = ["# Comparison\n", *(f"{sentence}\n" for sentence in words(sweep))]
    for setting in settings_of(sweep.records):
        rows = standings(sweep.records, setting)
        parts.append(f"## {setting}\n")
        if rows:
            lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
            parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
        parts += [f"{note}\n" for note in notes(sweep.records, setting, rows)]
    if sweep.problems:
        parts += ["## Not read, or missing\n", "".join(f"- {problem}\n" for problem in sweep.problems)]
    return "\n".join(parts)


def notes(records: Sequence[Record], setting: Setting, rows: Sequence[Standing], compared: bool = True) -> list[str]:
    """What a reader of a setting's table must know; of pairs only where variants are compared."""
    found = cells_of(records, setting)
    blocks = len(found.blocks)
    told = [f"{blocks} {'pair' if blocks == 1 else 'pairs'} of subset and seed."] if rows and compared else []
    if rows and (dense := controls(records, setting)):
        told.append(f"Nothing removed: {', '.join(f'{estimate(mean)} % {said}' for said, mean in dense.items())}.")
    if compared and 0 < blocks < FEWEST_BLOCKS:
        told.append(f"No intervals and no order: that takes {FEWEST_BLOCKS} pairs.")
    for variant, count in sorted(found.unmet.items()):
        kept = "" if variant in found.records else ", so that it is not in the table"
        told.append(f"{variant} missed the target in {count} {'run' if count == 1 else 'runs'}{kept}.")
    late = [variant for variant in found.left_out if variant not in found.unmet]
    if late:
        told.append(f"Not in the table, for want of runs: {', '.join(late)}.")
    return told


def words(sweep: Sweep) -> list[str]:
    """What the figures say, a sentence or two for each setting after the last stage."""
    settings = settings_of(sweep.records)
    last = {}
    for setting in settings:
        if setting.stage != "scratch":
            last[setting.task, setting.model, setting.match, setting.level] = setting  # the later stage stays
    return [text for setting in last.values() if (text := sentence(sweep.records, setting))] + _area_words(sweep)


def course(sweep: Sweep) -> list[tuple[str, list[Setting]]]:
    """Of a single run, each stage in words and its settings: there is nothing to compare but how far it was pruned."""
    found: dict[str, list[Setting]] = {}
    for setting in settings_of(sweep.records):
        found.setdefault(f"{setting.task}, {setting.model}, {STAGES[setting.stage]}", []).append(setting)
    return list(found.items())


def course_words(sweep: Sweep) -> list[str]:
    """What a single run came to, a sentence a stage."""
    told = []
    for stage, settings in course(sweep):
        rows = {setting.budget: standings(sweep.records, setting) for setting in settings}
        figures = [
            f"{estimate(found[0].accuracy)} % at {budget}" if found else f"{budget}: target not met"
            for budget, found in rows.items()
        ]
        told.append(f"{stage}, on the selected classes: {', '.join(figures)}.")
    return told


def sentence(records: Sequence[Record], setting: Setting) -> str:
    rows = standings(records, setting)
    if not rows:
        return f"{setting}: no variant met this target."
    best, blocks = rows[0], rows[0].accuracy.n
    text = f"{setting}: {best.variant} keeps most, {estimate(best.accuracy)} % on the selected classes"
    if len(rows) == 1:
        return text + "; there is no other to compare it with."
    if blocks < FEWEST_BLOCKS:
        return f"{text}; {blocks} {'pair' if blocks == 1 else 'pairs'} of subset and seed cannot tell who is better."
    leads = {row.variant: difference(records, setting, best.variant, row.variant) for row in rows[1:]}
    equal = [variant for variant, lead in leads.items() if lead.sign == 0]
    text += f"; {_listed(equal)} cannot be told from it" if equal else ", more than any other"
    if best.lead is not None:
        holds = "" if best.lead.sign else ", which may be none"
        text += f". Its lead over random: {estimate(best.lead)} points{holds}"
    return text + f" ({blocks} pairs of subset and seed)."


def _area_words(sweep: Sweep) -> list[str]:
    """The order by the mean accuracy over the range of MACs that all cover."""
    told = []
    for task, model in sorted({(s.task, s.model) for s in settings_of(sweep.records)}):
        stages = {s.stage for s in settings_of(sweep.records) if (s.task, s.model) == (task, model)}
        stage = "retrained" if "retrained" in stages else "pruned"
        found = areas(sweep.records, task, model, stage)
        if len(found) > 1:
            order = ", ".join(f"{area.variant} {estimate(area.accuracy)}" for area in found)
            span = f"{100 * found[0].low:.0f} to {100 * found[0].high:.0f} %"
            pairs = found[0].accuracy.n
            few = f" ({pairs} {'pair' if pairs == 1 else 'pairs'} of subset and seed: that is no order)"
            told.append(
                f"Mean accuracy over {span} of the MACs, {task}, {model}: {order}{few * (pairs < FEWEST_BLOCKS)}."
            )
    return told


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def tidy(sweep: Sweep) -> tuple[list[str], list[list]]:
    """Column names and one row a record, the run's name first; columns are those of `records.spread`."""
    columns, rows = spread(sweep.records)
    names = [run.name for run in sweep.runs for _ in run.records]
    return ["run", *columns], [[name, *row] for name, row in zip(names, rows, strict=True)]


def tidy_csv(sweep: Sweep) -> str:
    """`tidy` as CSV: per-class and per-layer figures and lists are JSON in one cell, None is an empty cell."""
    columns, rows = tidy(sweep)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([json.dumps(v, ensure_ascii=False) if isinstance(v, (tuple, dict)) else v for v in row])
    return text.getvalue()
