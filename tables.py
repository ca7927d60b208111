"""Records as a table for the console: rounded, scaled, aligned, with the notes and warnings that belong to it."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from intervals import FEWEST_PAIRS
from records import Record, Timing

MISSING = "-"

# Two header lines and what stands below them; the first column is aligned left, figures right.
_COLUMNS: tuple[tuple[str, str, Callable[[Record], str]], ...] = (
    ("", "stage", lambda r: stage_name(r)),
    ("ratio", "asked", lambda r: MISSING if r.stage == "dense" else f"{r.ratio:g}"),
    ("ratio", "reached", lambda r: MISSING if r.stage == "dense" else f"{r.achieved_ratio:.3f}"),
    ("accuracy", "%", lambda r: f"{100 * r.accuracy:.2f}"),
    ("95 %", "interval", lambda r: f"{100 * r.accuracy_low:.1f}-{100 * r.accuracy_high:.1f}"),
    ("worst", "class %", lambda r: f"{100 * r.worst_class_accuracy:.2f}"),
    ("MACs", "", lambda r: scaled(r.macs)),
    ("of", "dense", lambda r: _share(r.macs_ratio)),
    ("params", "", lambda r: scaled(r.params)),
    ("of", "dense", lambda r: _share(r.params_ratio)),
    ("size", "", lambda r: f"{scaled(r.size_bytes)}B"),
    ("latency", "of dense", lambda r: _latency_share(headline(r))),
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
    return "from scratch" if record.stage == "scratch" else record.stage


def own_seconds(record: Record) -> float | None:
    """Seconds this row alone took: training, removal or retraining, by its stage."""
    return {
        "dense": record.training_seconds if record.head == "all" else None,
        "pruned": record.removal_seconds,
        "retrained": record.retraining_seconds,
        "scratch": record.scratch_seconds,
    }[record.stage]


def headline(record: Record) -> Timing | None:
    """The time that stands for all where there is room for one: PyTorch's, of the largest batch."""
    return max((t for t in record.times if t.engine == "pytorch"), key=lambda t: t.batch_size, default=None)


def timed(records: Iterable[Record]) -> list[tuple[str, int]]:
    """The engines and batch sizes that were timed, PyTorch's first."""
    found = {(timing.engine, timing.batch_size) for record in records for timing in record.times}
    return sorted(found, key=lambda which: (which[0] != "pytorch", which))


def engine_name(engine: str) -> str:
    return {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime"}[engine]


def _latency_share(timing: Timing | None) -> str:
    return MISSING if timing is None else f"{'~' if timing.noisy else ''}{timing.ratio:.3f}"


def _latency(timing: Timing | None) -> str:
    if timing is None:
        return MISSING
    interval = f" ({timing.ratio_low:.3f}-{timing.ratio_high:.3f})" if timing.pairs >= FEWEST_PAIRS else ""
    return f"{timing.median_ms:.2f}  {_latency_share(timing)}{interval}"


def _share(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.3f}"


def _seconds(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds:.2f}" if seconds < 100 else f"{seconds:.0f}"


def table(records: Iterable[Record]) -> str:
    """The records as text of about 110 columns, a block a run: what was run, the figures, then notes and warnings."""
    return "\n\n".join(_run_table(list(run)) for _, run in groupby(records, key=lambda record: record.run_id))


def _run_table(records: list[Record]) -> str:
    first = records[0]
    figures = [[cell(record) for _, _, cell in _COLUMNS] for record in records]
    titles = [[title for title, _, _ in _COLUMNS], [unit for _, unit, _ in _COLUMNS]]
    lines = _aligned(titles, figures)
    below = [*_notes(records), "", *_speed_table(records), *_onnx(records), *_warnings(records)]
    return "\n".join([_headline(first), "", *lines, *below])


def _aligned(titles: list[list[str]], rows: list[list[str]]) -> list[str]:
    """Rows below their titles and a rule; the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*titles, *rows, strict=True)]
    lines = []
    for row in (*titles, *rows):
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *figures]).rstrip())
    lines.insert(len(titles), "-" * (sum(widths) + 2 * len(widths) - 2))
    return lines


def _speed_table(records: list[Record]) -> list[str]:
    """What each engine took at each batch size, and the memory of a pass."""
    which = timed(records)
    titles = [["", "ratio", *(engine_name(engine) for engine, _ in which), "memory"]]
    titles.append(["stage", "asked", *(f"batch of {size}" for _, size in which), "of a pass"])
    rows = []
    for record in records:
        asked = MISSING if record.stage == "dense" else f"{record.ratio:g}"
        times = [_latency(record.time(*each)) for each in which]
        memory = MISSING if record.forward_peak_bytes is None else f"{scaled(record.forward_peak_bytes)}B"
        rows.append([stage_name(record), asked, *times, memory])
    noisy = any(timing.noisy for record in records for timing in record.times)
    threads = sorted({timing.threads for record in records for timing in record.times})
    batch = sorted({record.forward_batch_size for record in records})
    notes = [
        "",
        "latency: median ms of a pass; share of the dense model's, timed in turn, and its interval (nominally 99 %)",
        "~: the times spread too far, or are too few, to say anything" if noisy else "",
        f"threads: {' or '.join(map(str, threads))}; memory: beyond weights and images, batch of "
        f"{' or '.join(map(str, batch))}",
    ]
    notes = [notes[0], *filter(None, notes)]
    return [*_aligned(titles, rows), *notes]


def _onnx(records: list[Record]) -> list[str]:
    """Whether ONNX Runtime gives what PyTorch gives, where it was asked."""
    ran = [record for record in records if record.onnx_accuracy is not None]
    if not ran:
        return []
    off = max(abs(record.onnx_accuracy - record.accuracy) for record in ran)
    difference = max(record.onnx_difference for record in ran)
    rows = "in every row" if len(ran) == len(records) else f"in {len(ran)} of {len(records)} rows"
    sizes = [record.onnx_size_bytes for record in ran]
    files = f"files of {scaled(max(sizes))}B" + (f" to {scaled(min(sizes))}B" if min(sizes) < max(sizes) else "")
    same = f"the same accuracy {rows}" if off == 0 else f"accuracy off by up to {100 * off:.2f} points {rows}"
    return [f"ONNX Runtime: {same}, outputs within {difference:.0e} of PyTorch's, {files}"]


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
    largest = {timing.batch_size for timing in map(headline, records) if timing is not None}
    notes = ["", "accuracy: selected classes' test images; interval: Wilson"]
    notes += [f"latency: PyTorch, batch of {' or '.join(map(str, sorted(largest)))}, see below"] if largest else []
    notes.append("time: training (dense, when it was trained), removal (pruned), retraining (retrained)")
    scoring = [record.scoring_seconds for record in records if record.scoring_seconds is not None]
    if scoring:
        images = next((r.scoring_images for r in records if r.scoring_images), None)
        on = f" on {images} images" if images else ""
        notes.append(f"scoring: {_seconds(scoring[0])} s{on}, once for all ratios")
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
