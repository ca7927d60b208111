"""What a run leaves behind: one `Record` a (ratio, stage), stored line by line; selections; the environment it ran in.

Figures are raw: fractions, counts, bytes, seconds, milliseconds. Scaling and rounding belong to the report. Nothing
here needs torch, so that records can be read where it is not installed.
"""

import csv
import io
import json
import logging
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

from environment import config_hash as config_hash
from environment import environment as environment
from errors import BenchmarkError

log = logging.getLogger(__name__)

SCHEMA = 2  # raised when a field of Record changes its meaning or its name
STAGES = ("dense", "pruned", "retrained")
HEADS = ("all", "selected")

_CSV_FIRST = (
    *("stage", "ratio", "achieved_ratio", "accuracy", "accuracy_all_classes", "worst_class_accuracy"),
    *("accuracy_per_class", "macs", "macs_ratio", "params", "params_ratio", "size_bytes", "latency_ms_median"),
    *("latency_ms_p95", "scoring_seconds", "removal_seconds", "retraining_seconds"),
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was measured of one model: the dense one, or one pruned at a ratio, before or after retraining.

    Accuracies are fractions on the selected classes' test images, unless the name says otherwise. Ratios of macs,
    params and size are against the dense model with all logits. None stands for what was not measured or does not
    apply. Raises ValueError for a record whose figures cannot all be true.
    """

    run_id: str
    config_hash: str
    seed: int
    method: str
    dataset: str
    model: str
    selected_classes: tuple[int, ...]  # in the order of the replaced head's logits
    class_names: tuple[str, ...]  # of the selected classes, in the same order
    stage: str  # dense | pruned | retrained
    head: str  # all | selected: the classes that have a logit
    ratio: float  # fraction of filters to remove, as asked for
    achieved_ratio: float  # filters removed / prunable filters
    filters_removed: int
    filters_prunable: int
    filters_total: int
    pruner: str  # depgraph | structure
    residual: str  # skip | coupled | scatter: what became of filters that a residual add holds in place
    min_filters: int  # so many stay in every layer
    round_to: int  # a layer that loses filters keeps a multiple of so many
    accuracy: float
    accuracy_all_classes: float | None = None  # on the test images of all classes; dense model with all logits only
    worst_class_accuracy: float
    accuracy_per_class: dict[str, float]
    images_per_class: dict[str, int]
    macs: int | None  # of one image
    macs_ratio: float | None
    params: int
    params_ratio: float
    size_bytes: int
    size_ratio: float
    latency_ms_median: float
    latency_ms_p95: float
    latency_batch_size: int
    scoring_seconds: float | None = None  # once for all ratios of a run
    removal_seconds: float | None = None
    retraining_seconds: float | None = None
    training_seconds: float | None = None  # of the dense model, when it was trained: in this run or an earlier one
    filters_chosen_per_layer: dict[str, int]  # to be removed, layers that keep all left out
    filters_kept_per_layer: dict[str, int]  # as counted in the network that was measured
    difference_from_masked: float | None = None  # largest, of the outputs, as a share of the largest output
    widths_dense: dict[str, int]  # filters of each layer before pruning, in the order of the network
    layers_left_out: tuple[str, ...] = ()  # layers of widths_dense that no filter was selected from, whatever the ratio
    saved_as: tuple[str, ...] = ()  # files of the network, in the run's directory
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(field, getattr(self, field.name)))
        _check_identity(self)
        _check_filters(self)
        _check_accuracy(self)
        _check_costs(self)

    def to_json(self) -> str:
        """One line of JSON that `from_json` turns back into an equal record."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({"schema": SCHEMA, **values}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """Raises ValueError for a line that is not one whole record of this schema."""
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("not a record")
        if (schema := values.pop("schema", None)) != SCHEMA:
            raise ValueError(f"schema {schema}; this version reads schema {SCHEMA}")
        try:
            return cls(**values)
        except TypeError as error:  # a field missing or unknown
            raise ValueError(str(error)) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError("not a number")
    return operator.index(value)


def _finite(value: Any) -> float:
    if isinstance(value, (bool, str)) or not math.isfinite(value):
        raise ValueError("not a finite number")
    return float(value)


_PLAIN = {
    str: _text,
    int: _whole,
    float: _finite,
    int | None: lambda value: None if value is None else _whole(value),
    float | None: lambda value: None if value is None else _finite(value),
    tuple[int, ...]: lambda values: tuple(_whole(value) for value in values),
    tuple[str, ...]: lambda values: tuple(_text(value) for value in values),
    dict[str, int]: lambda values: {_text(name): _whole(value) for name, value in values.items()},
    dict[str, float]: lambda values: {_text(name): _finite(value) for name, value in values.items()},
}


def _plain(field: Field, value: Any) -> Any:
    """The value in the plain type of its field, so that a record equals what is read back from its line."""
    try:
        return _PLAIN[field.type](value)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{field.name}: {value!r}; {error}") from error


def _require(true: bool, text: str) -> None:
    if not true:
        raise ValueError(text)


def _check_identity(record: Record) -> None:
    _require(record.stage in STAGES, f"stage: {record.stage!r}; one of {', '.join(STAGES)} is needed")
    _require(record.head in HEADS, f"head: {record.head!r}; one of {', '.join(HEADS)} is needed")
    names, classes = record.class_names, record.selected_classes
    _require(0 < len(classes) == len(set(classes)), f"selected_classes: {classes}; at least one, each once")
    _require(len(names) == len(set(names)) == len(classes), f"class_names: {names}; one for each class, each once")
    dense_only = record.accuracy_all_classes is None or (record.stage, record.head) == ("dense", "all")
    _require(dense_only, "accuracy_all_classes: only the dense model with all logits has it")


def _check_filters(record: Record) -> None:
    removed, prunable, total = record.filters_removed, record.filters_prunable, record.filters_total
    _require(0 <= record.ratio < 1, f"ratio: {record.ratio}; 0 or more and below 1 is needed")
    _require(0 <= removed <= prunable <= total, f"filters: {removed} removed of {prunable} prunable of {total} in all")
    share = removed / prunable if prunable else 0.0
    _require(math.isclose(record.achieved_ratio, share), f"achieved_ratio: {record.achieved_ratio}; it is {share}")
    kept, dense = record.filters_kept_per_layer, record.widths_dense
    _require(kept.keys() == dense.keys(), "filters_kept_per_layer and widths_dense: not the same layers")
    wrong = [name for name in kept if not 1 <= kept[name] <= dense[name]]
    _require(not wrong, f"filters_kept_per_layer: {wrong} keep no filter, or more than there were")
    # Layers that are coupled lose their filters together, so more can go than were selected, never fewer.
    gone = sum(dense.values()) - sum(kept.values())
    _require(removed <= gone, f"filters_removed: {removed}; the layers have lost only {gone}")
    chosen = record.filters_chosen_per_layer
    _require(sum(chosen.values()) == removed, f"filters_chosen_per_layer: {sum(chosen.values())} in all, not {removed}")
    kept_on = [name for name, count in chosen.items() if count != dense.get(name, 0) - kept.get(name, 0)]
    _require(not kept_on, f"filters_chosen_per_layer: {kept_on} have not lost as many")
    _require(record.stage != "dense" or gone == 0, f"stage dense: {gone} filters are missing")
    _require(set(record.layers_left_out) <= dense.keys(), "layers_left_out: a layer that widths_dense does not name")


def _check_accuracy(record: Record) -> None:
    shares, images = record.accuracy_per_class, record.images_per_class
    same = tuple(shares) == tuple(images) == record.class_names
    _require(same, f"accuracy_per_class, images_per_class: one entry for each of {record.class_names}, in this order")
    for name in shares:
        correct = shares[name] * images[name]
        whole = 0 <= shares[name] <= 1 <= images[name] and abs(correct - round(correct)) < 1e-6
        _require(whole, f"accuracy_per_class: {name}, {shares[name]} of {images[name]}, is no number of images")
    overall = sum(shares[name] * images[name] for name in shares) / sum(images.values())
    _require(math.isclose(record.accuracy, overall, abs_tol=1e-9), f"accuracy: {record.accuracy}; it is {overall}")
    given, worst = record.worst_class_accuracy, min(shares.values())
    _require(given == worst, f"worst_class_accuracy: {given}; it is {worst}")
    everywhere = record.accuracy_all_classes
    _require(everywhere is None or 0 <= everywhere <= 1, f"accuracy_all_classes: {everywhere} is no fraction")


def _check_costs(record: Record) -> None:
    for name in ("params", "params_ratio", "size_bytes", "size_ratio", "latency_ms_median", "latency_batch_size"):
        _require(getattr(record, name) > 0, f"{name}: {getattr(record, name)}; above 0 is needed")
    _require(record.macs is not None or record.macs_ratio is None, "macs_ratio: without macs there is none")
    seconds = ("scoring_seconds", "removal_seconds", "retraining_seconds", "training_seconds")
    for name in ("macs", "macs_ratio", "difference_from_masked", *seconds):
        value = getattr(record, name)
        _require(value is None or value >= 0, f"{name}: {value}; 0 or more is needed")
    slow, median = record.latency_ms_p95, record.latency_ms_median
    _require(slow >= median, f"latency_ms_p95: {slow} is below the median, {median}")


def append_record(path: str | Path, record: Record) -> None:
    """Add one line to `path` (JSON Lines); when this returns, the line is on the disk.

    Earlier lines are never touched. A line that an interrupted writer left unfinished is ended first.
    """
    path = Path(path)
    line = record.to_json().encode() + b"\n"
    with _disk_errors(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_records(path: str | Path) -> list[Record]:
    """The whole records of a file, in the order written; what is not one is left out with a warning in the log.

    Raises BenchmarkError where the file cannot be read.
    """
    path = Path(path)
    with _disk_errors(path):
        lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line.decode()))
        except ValueError as error:
            # Every line ends with a line break, so a last one without is what an interrupted run had begun to write.
            reason = "cut short, the run was interrupted" if number == len(lines) else error
            log.warning("%s, line %d: not read: %s", path, number, reason)
    return records


def write_csv(path: str | Path, records: Iterable[Record]) -> None:
    """A row a record; per-class and per-layer figures and lists are JSON in one cell, None is an empty cell."""
    columns = [*_CSV_FIRST, *(field.name for field in fields(Record) if field.name not in _CSV_FIRST)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        values = (getattr(record, column) for column in columns)
        packed = (tuple, dict)
        writer.writerow([json.dumps(v, ensure_ascii=False) if isinstance(v, packed) else v for v in values])
    write_whole(path, text.getvalue())


def write_selections(path: str | Path, selections: Mapping[float, Mapping[str, Sequence[int]]]) -> None:
    """The filters removed at each ratio: a JSON list of {ratio, filters_removed: {layer: indices}}, a layer a line."""
    blocks = []
    for ratio, layers in selections.items():
        rows = [f"{json.dumps(name)}: {json.dumps([int(index) for index in layers[name]])}" for name in layers]
        body = ",".join(f"\n    {row}" for row in rows)
        blocks.append(f'{{"ratio": {json.dumps(float(ratio))}, "filters_removed": {{{body}}}}}')
    write_whole(path, "[" + ",\n".join(blocks) + "]\n")


def write_json(path: str | Path, content: Any) -> None:
    """Any plain value as indented JSON."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file that is there complete or not at all: into a temporary one beside it, renamed when on the disk.

    Makes the folder if only that is missing.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses, as a message for the user: no space, no permission, no such folder."""
    try:
        yield
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror or error}; it needs a folder with space and access") from error
