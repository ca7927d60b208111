"""Records as a table for the console: rounded, scaled, aligned, with the notes and warnings that belong to it."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from records import Record

MISSING = "-"

# Two header lines and what stands below them; the first column is aligned left, figures right.
_COLUMNS: tuple[tuple[str, str, Callable[[Record], str]], ...] = (
    ("", "stage", lambda r: stage_name(r)),
    ("ratio", "asked", lambda r: MISSING if r.stage == "dense" else f"{r.ratio:g}"),
    ("ratio", "reached", lambda r: MISSING if r.stage == "dense" else f"{r.achieved_ratio:.3f}"),
    ("accuracy", "%", lambda r: f"{100 * r.accuracy:.2f}"),
    ("worst", "class %", lambda r: f"{100 * r.worst_class_accuracy:.2f}"),
    ("MACs", "", lambda r: scaled(r.macs)),
    ("of", "dense", lambda r: _share(r.macs_ratio)),
    ("params", "", lambda r: scaled(r.params)),
    ("of", "dense", lambda r: _share(r.params_ratio)),
    ("size", "", lambda r: f"{scaled(r.size_bytes)}B"),
    ("latency", "ms", lambda r: f"{r.latency_ms_median:.2f}"),
    ("p95", "ms", lambda r: f"{r.latency_ms_p95:.2f}"),
    ("time", "s", lambda r: _seconds(own_seconds(r))),
)


def scaled(number: float | None) -> str:
    """Three significant digits or more, with a decimal prefix: 37.5 M, 1.81 G."""
    if number is None:
        return MISSING
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            value = number / size
            return f"{value:.{2 if value < 10 else 1}f} {prefix}"
    return f"{number:g} "


def stage_name(record: Record) -> str:
    """The stage in words; of the dense models, which logits they have."""
    if record.stage == "dense":
        return "dense, all logits" if record.head == "all" else "dense, new head"
    return record.stage


def own_seconds(record: Record) -> float | None:
    """Seconds this row alone took: training, removal or retraining, by its stage."""
    return {
        "dense": record.training_seconds if record.head == "all" else None,
        "pruned": record.removal_seconds,
        "retrained": record.retraining_seconds,
    }[record.stage]


def _share(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.3f}"


def _seconds(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds:.2f}" if seconds < 100 else f"{seconds:.0f}"


def table(records: Iterable[Record]) -> str:
    """The records as text of about 110 columns, a block a run: what was run, the figures, then notes and warnings."""
    return "\n\n".join(_run_table(list(run)) for _, run in groupby(records, key=lambda record: record.run_id))


def _run_table(records: list[Record]) -> str:
    first = records[0]
    rows = [[title for title, _, _ in _COLUMNS], [unit for _, unit, _ in _COLUMNS]]
    rows += [[cell(record) for _, _, cell in _COLUMNS] for record in records]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *figures]).rstrip())
    lines.insert(2, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join([_headline(first), "", *lines, *_notes(records), *_warnings(records)])


def describe_classes(names: Sequence[str], room: int = 60) -> str:
    """`3 classes: bag, shirt, coat`, with as many names as fit into so many characters."""
    shown = list(names)
    while len(shown) > 1 and len(", ".join(shown)) > room:
        shown.pop()
    rest = len(names) - len(shown)
    count = "1 class" if len(names) == 1 else f"{len(names)} classes"
    return f"{count}: {', '.join(shown)}" + (f" and {rest} more" if rest else "")


def _headline(record: Record) -> str:
    what = f"{record.method} | {record.model} | {record.dataset}"
    return f"{what} | {describe_classes(record.class_names)} | seed {record.seed}"


def _notes(records: list[Record]) -> list[str]:
    """What the columns need to be read rightly."""
    batch = sorted({record.latency_batch_size for record in records})
    notes = ["", f"latency: median per batch of {' or '.join(map(str, batch))} images"]
    notes.append("time: training (dense, when it was trained), removal (pruned), retraining (retrained)")
    scoring = [record.scoring_seconds for record in records if record.scoring_seconds is not None]
    if scoring:
        notes.append(f"scoring: {_seconds(scoring[0])} s, once for all ratios")
    everywhere = [r.accuracy_all_classes for r in records if r.accuracy_all_classes is not None]
    if everywhere:
        notes.append(f"dense model on the test images of all classes: {100 * everywhere[0]:.2f} %")
    return notes


def _warnings(records: list[Record]) -> list[str]:
    """Every warning once, with the rows it belongs to."""
    where: dict[str, dict[str, list[str]]] = {}
    for record in records:
        for text in record.warnings:
            ratios = where.setdefault(text, {}).setdefault(stage_name(record), [])
            ratios += [f"{record.ratio:g}"] if record.stage != "dense" else []
    lines = []
    for text, rows in where.items():
        places = "; ".join(f"{stage} {', '.join(ratios)}".strip() for stage, ratios in rows.items())
        lines.append(f"warning: {text} ({places})")
    return lines
