"""One self-contained HTML page of a sweep: words, tables, plots, what is missing, and how each run was made."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from comparison import settings_of, standings
from comparison_table import COLUMNS, MISSING, cells, course, course_words, notes, words
from records import Record
from runs import Sweep
from tables import headline, stage_name

ASSETS = Path(__file__).resolve().parent / "page"
CAPTIONS = {
    "accuracy_over_macs": "Mean accuracy on the selected classes over the share of multiply-adds left.",
    "accuracy_over_latency": "The same over measured latency; times that spread too far are left out.",
    "accuracy_over_params": "The same over the share of parameters left.",
    "ranks": "Mean rank in accuracy; places that the paired intervals leave open stand on the right.",
    "accuracy_lost_per_class": "Against the network that only lost its other logits, in the same stage.",
    "filters_kept_per_layer": "Where each variant takes its filters.",
    "selection_overlap": "Jaccard index of the filters removed for the same classes and seed.",
    "selection_stability": "Jaccard index of selections after other draws of as many images; large draws share images.",
    "scoring_cost_over_accuracy": "Time of the one scoring pass that serves every ratio.",
}
# Of the table of all results: title, text, and whether it has a choice of its own.
_RESULTS = (
    ("run", lambda name, r: name, False),
    ("variant", lambda name, r: r.variant, True),
    ("dataset", lambda name, r: r.dataset, True),
    ("model", lambda name, r: r.model, True),
    ("stage", lambda name, r: stage_name(r), True),
    ("target %", lambda name, r: MISSING if r.target is None else f"{100 * r.target:g}", True),
    ("reached %", lambda name, r: MISSING if r.reached is None else f"{100 * r.reached:.1f}", False),
    ("ratio", lambda name, r: f"{r.ratio:.4g}", False),
    ("seed", lambda name, r: str(r.seed), True),
    ("classes", lambda name, r: ", ".join(r.class_names), True),
    ("accuracy %", lambda name, r: f"{100 * r.accuracy:.2f}", False),
    ("worst class %", lambda name, r: f"{100 * r.worst_class_accuracy:.2f}", False),
    ("MACs %", lambda name, r: MISSING if r.macs_ratio is None else f"{100 * r.macs_ratio:.1f}", False),
    ("parameters %", lambda name, r: f"{100 * r.params_ratio:.1f}", False),
    ("latency %", lambda name, r: _latency(r), False),
    ("scoring s", lambda name, r: _number(r.scoring_seconds), False),
    ("retraining s", lambda name, r: _number(r.retraining_seconds), False),
)


def page(sweep: Sweep, pictures: Mapping[str, bytes], title: str) -> str:
    """The page as one text.

    Args:
        sweep: the runs.
        pictures: name of a plot -> its PNG file.
        title: plain text.
    """
    css, js = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    runs, records = len(sweep.runs), len(sweep.records)
    single = runs == 1
    intervals = (
        ". Intervals: nominally 95 %, bootstrapped over subsets of classes and seeds, not corrected for the number of "
        "pairs; places: what paired differences leave open."
    )
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<link rel="icon" href="data:,"><style>{css}</style></head><body>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{runs} {"run" if single else "runs"}, {records} records{"." if single else intervals}</p>',
        f'<nav><a href="#words">Summary</a><a href="#tables">{"By ratio" if single else "Comparison"}</a>'
        '<a href="#plots">Plots</a>'
        '<a href="#results">All results</a><a href="#made">How it was made</a></nav>',
        _words(sweep),
        _tables(sweep),
        _plots(pictures),
        _results(sweep),
        _made(sweep),
        f"<script>{js}</script></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _words(sweep: Sweep) -> str:
    said = (course_words(sweep) if len(sweep.runs) == 1 else words(sweep)) or ["No pruned network was recorded yet."]
    missing = f"<h3>Not read, or missing</h3>{_list(sweep.problems)}" if sweep.problems else ""
    return f'<section id="words"><h2>Summary</h2>{_list(said)}{missing}</section>'


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _course(sweep: Sweep) -> str:
    """Of a single run a table a stage, a row a ratio or target, without what only a comparison has."""
    kept = [index for index, title in enumerate(COLUMNS) if title not in ("place", "variant", "points over random")]
    parts = ['<section id="tables"><h2>By ratio</h2>']
    for stage, settings in course(sweep):
        rows, told = [], {}
        for setting in settings:
            found = standings(sweep.records, setting)
            rows += [[setting.budget, *(cells(row)[index] for index in kept)] for row in found]
            told |= dict.fromkeys(notes(sweep.records, setting, found, compared=False))
        parts.append(f"<h3>{escape(stage)}</h3>")
        parts.append(_table(["asked for", *(COLUMNS[index] for index in kept)], rows))
        parts += [f'<p class="note">{escape(note)}</p>' for note in told]
    return "\n".join([*parts, "</section>"])


def _tables(sweep: Sweep) -> str:
    if len(sweep.runs) == 1:
        return _course(sweep)
    parts = ['<section id="tables"><h2>Comparison</h2>']
    for setting in settings_of(sweep.records):
        rows = standings(sweep.records, setting)
        parts.append(f"<h3>{escape(str(setting))}</h3>")
        if rows:
            parts.append(_table(COLUMNS, map(cells, rows)))
        parts += [f'<p class="note">{escape(note)}</p>' for note in notes(sweep.records, setting, rows)]
    return "\n".join([*parts, "</section>"])


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], sortable: bool = False) -> str:
    heads = (f"<button type=button>{escape(title)}</button>" if sortable else escape(title) for title in titles)
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plots(pictures: Mapping[str, bytes]) -> str:
    parts = ['<section id="plots"><h2>Plots</h2>']
    for name, content in pictures.items():
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))  # of a PNG file's first chunk
        caption = escape(CAPTIONS.get(name, name.replace("_", " ")))
        source = base64.b64encode(content).decode()
        parts.append(
            f'<figure><img alt="{caption}" width="{width}" height="{height}" src="data:image/png;base64,{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "\n".join([*parts, "</section>"]) if pictures else ""


def _results(sweep: Sweep) -> str:
    titles = [title for title, _, _ in _RESULTS]
    rows = [[text(run.name, record) for _, text, _ in _RESULTS] for run in sweep.runs for record in run.records]
    selects = []
    for column, (title, _, chosen) in enumerate(_RESULTS):
        values = sorted({row[column] for row in rows})
        if chosen and len(values) > 1:
            options = "".join(f"<option>{escape(value)}</option>" for value in values)
            choice = f'<select data-column="{column}"><option value="">all</option>{options}</select>'
            selects.append(f"<label>{escape(title)}{choice}</label>")
    form = f'<form><label>search<input type="search"></label>{"".join(selects)}<output></output></form>'
    return f'<section id="results"><h2>All results</h2>{form}{_table(titles, rows, sortable=True)}</section>'


def _made(sweep: Sweep) -> str:
    commands = [[run.name, run.command or "not known"] for run in sweep.runs]
    parts = ['<section id="made"><h2>How it was made</h2>']
    parts.append(f'<details id="runs"><summary>The command of each run</summary>{_table(("run", "command"), commands)}')
    parts.append("</details>")
    for around in {run.environment.get("hash"): run.environment for run in sweep.runs if run.environment}.values():
        told = json.dumps(around, indent=1, ensure_ascii=False, sort_keys=True)
        name = f"{around.get('cpu')}, Python {around.get('python')}"
        parts.append(f"<details><summary>Environment: {escape(name)}</summary><pre>{escape(told)}</pre></details>")
    return "\n".join([*parts, "</section>"])


def _latency(record: Record) -> str:
    timing = headline(record)
    return MISSING if timing is None else f"{'~' if timing.noisy else ''}{100 * timing.ratio:.1f}"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"
