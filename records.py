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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import record_checks
from disk import disk_errors, write_whole
from environment import config_hash as config_hash
from environment import environment as environment

log = logging.getLogger(__name__)

SCHEMA = 4  # raised when a field of Record changes its meaning or its name

_CSV_FIRST = (
    *("stage", "ratio", "achieved_ratio", "accuracy", "accuracy_low", "accuracy_high", "accuracy_all_classes"),
    *("worst_class_accuracy", "balanced_accuracy", "accuracy_per_class", "macs", "macs_ratio", "params"),
    *("params_ratio", "size_bytes", "scoring_seconds", "removal_seconds", "retraining_seconds"),
)
_TIMES = "times"  # spread over columns of their own in a CSV file


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Passes of one batch by one engine, each timed right beside a pass of the dense network with all logits.

    ratio: time as a share of the dense network's, the median over the pairs; ratio_low, ratio_high: its interval, see
    `latency.PairedTimes.ratio`. noisy: the interval is too wide to say anything, the pairs too few, or the passes never
    got steady. Raises ValueError for figures that cannot all be true.
    """

    engine: str  # pytorch | onnxruntime
    batch_size: int
    threads: int
    pairs: int
    median_ms: float
    p95_ms: float
    images_per_second: float  # batch size / median
    dense_median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    noisy: bool

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(field, getattr(self, field.name)))
        record_checks.check_timing(self)


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
    variant: str  # the method and those of its settings that differ from its YAML: what a comparison calls it
    scope: str  # layer | global: which filters compete with each other
    scoring_classes: str | None  # selected | all | complement: whose images were read; None where none are
    num_pruning_samples: int
    sampling_seed: int  # scoring images are drawn by it
    dataset: str
    model: str
    subset: str  # given | random | similar | distinct: how the classes were chosen
    selected_classes: tuple[int, ...]  # in the order of the replaced head's logits
    class_names: tuple[str, ...]  # of the selected classes, in the same order
    stage: str  # dense | pruned | retrained | scratch: the pruned architecture, trained from random weights
    head: str  # all | selected: the classes that have a logit
    ratio: float  # fraction of filters to remove, as asked for
    achieved_ratio: float  # filters removed / prunable filters
    match: str | None = None  # macs | params | filters | latency: the budget that the ratio was found for
    target: float | None = None  # share of it to remove
    reached: float | None = None  # share of it that is gone
    filters_removed: int
    filters_prunable: int
    filters_total: int
    pruner: str  # depgraph | structure
    residual: str  # skip | coupled | scatter: what became of filters that a residual add holds in place
    min_filters: int  # so many stay in every layer
    round_to: int  # a layer that loses filters keeps a multiple of so many
    accuracy: float
    accuracy_low: float  # 95 % Wilson score interval, from the number of test images
    accuracy_high: float
    accuracy_top5: float | None = None  # with 100 logits or more
    accuracy_all_classes: float | None = None  # on the test images of all classes; dense model with all logits only
    worst_class_accuracy: float
    balanced_accuracy: float  # mean of the classes' accuracies
    accuracy_per_class: dict[str, float]
    images_per_class: dict[str, int]
    macs: int | None  # of one image
    macs_ratio: float | None
    params: int
    params_ratio: float
    size_bytes: int  # of a file with the weights
    size_ratio: float
    weight_bytes: int  # parameters and buffers in memory
    activation_bytes: int | None = None  # outputs of convolutions and linear layers, of one image
    forward_peak_bytes: int | None = None  # memory that a pass takes beyond weights and images
    forward_batch_size: int  # images of that pass
    times: tuple[Timing, ...]
    onnx_exporter: str | None = None  # current | legacy | none: neither managed; None when ONNX was not asked for
    onnx_provider: str | None = None
    onnx_difference: float | None = None  # from PyTorch's outputs, as a share of the largest
    onnx_size_bytes: int | None = None
    onnx_accuracy: float | None = None  # on the images of `accuracy`
    scoring_seconds: float | None = None  # once for all ratios of a run
    scoring_images: int | None = None
    scoring_peak_bytes: int | None = None  # most memory of the process (CUDA: on the device) during the step
    removal_seconds: float | None = None
    removal_peak_bytes: int | None = None
    retraining_seconds: float | None = None
    retraining_peak_bytes: int | None = None
    retraining_images: int | None = None  # images seen, each epoch's counted
    scratch_seconds: float | None = None  # training the pruned architecture from random weights
    dense_weights: str | None = None  # sha256 of the dense network's weights: what all of the run started from
    images: str | None = None  # fingerprint of the dataset's training, validation and test images
    training_seconds: float | None = None  # of the dense model, when it was trained: in this run or an earlier one
    environment_hash: str | None = None  # of environment.json
    filters_chosen_per_layer: dict[str, int]  # to be removed, layers that keep all left out
    filters_kept_per_layer: dict[str, int]  # as counted in the network that was measured
    difference_from_masked: float | None = None  # largest, of the outputs, as a share of the largest output
    widths_dense: dict[str, int]  # filters of each layer before pruning, in the order of the network
    layers_left_out: tuple[str, ...] = ()  # layers of widths_dense that no filter was selected from, whatever the ratio
    saved_as: tuple[str, ...] = ()  # files of the network, in the run's directory
    warnings: tuple[str, ...] = ()
    told_apart_by: tuple[str, ...] = ()  # settings that `variant` has from a comparison of several runs, as key=value

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(field, getattr(self, field.name)))
        record_checks.check(self)

    def time(self, engine: str, batch_size: int) -> Timing | None:
        """What this engine took for batches of this size, where that was measured."""
        return next((t for t in self.times if (t.engine, t.batch_size) == (engine, batch_size)), None)

    def to_json(self) -> str:
        """One line of JSON that `from_json` turns back into an equal record."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["times"] = [asdict(timing) for timing in self.times]
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
            values["times"] = tuple(Timing(**timing) for timing in values.get("times", ()))
            return cls(**values)
        except TypeError as error:  # a field missing or unknown
            raise ValueError(
                str(error).replace("Record.__init__() ", "").replace("keyword-only argument", "field")
            ) from error


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


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("not true or false")
    return value


def _timings(values: Any) -> tuple[Timing, ...]:
    if not all(isinstance(value, Timing) for value in values):
        raise ValueError("not timings")
    return tuple(values)


_PLAIN = {
    str: _text,
    int: _whole,
    float: _finite,
    bool: _flag,
    str | None: lambda value: None if value is None else _text(value),
    tuple[Timing, ...]: _timings,
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


def append_record(path: str | Path, record: Record) -> None:
    """Add one line to `path` (JSON Lines); when this returns, the line is on the disk.

    Earlier lines are never touched. A line that an interrupted writer left unfinished is ended first.
    """
    path = Path(path)
    line = record.to_json().encode() + b"\n"
    with disk_errors(path), path.open("ab+") as file:
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
    records, problems = scan_records(path)
    for problem in problems:
        log.warning("%s, %s", path, problem)
    return records


def records_of(run_dir: str | Path, run_id: str) -> list[Record]:
    """The whole records of this run in its folder, none where nothing was recorded yet."""
    path = Path(run_dir, "records.jsonl")
    return [record for record in read_records(path) if record.run_id == run_id] if path.exists() else []


def scan_records(path: str | Path) -> tuple[list[Record], list[str]]:
    """The whole records of a file, in the order written, and for each line that is none "line 3: not read: reason".

    Raises BenchmarkError where the file cannot be read.
    """
    path = Path(path)
    with disk_errors(path):
        lines = path.read_bytes().split(b"\n")
    records, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line.decode()))
        except (ValueError, OverflowError, RecursionError) as error:
            # Every line ends with a line break, so a last one without is what an interrupted run had begun to write.
            reason = "cut short, the run was interrupted" if number == len(lines) else error
            problems.append(f"line {number}: not read: {reason}")
    return records, problems


def spread(records: Iterable[Record]) -> tuple[list[str], list[list[Any]]]:
    """Column names and a row a record; times have a column for each of their figures, as `pytorch_batch_64_ratio`."""
    records = list(records)
    plain = [field.name for field in fields(Record) if field.name not in (*_CSV_FIRST, _TIMES)]
    measured = sorted({(timing.engine, timing.batch_size) for record in records for timing in record.times})
    kept = [field.name for field in fields(Timing) if field.name not in ("engine", "batch_size")]
    columns = [*_CSV_FIRST, *(f"{e}_batch_{size}_{name}" for e, size in measured for name in kept), *plain]
    rows = []
    for record in records:
        times = [record.time(*which) for which in measured]
        rows.append([getattr(record, column) for column in _CSV_FIRST])
        rows[-1] += [None if timing is None else getattr(timing, name) for timing in times for name in kept]
        rows[-1] += [getattr(record, column) for column in plain]
    return columns, rows


def write_csv(path: str | Path, records: Iterable[Record]) -> None:
    """A row a record; per-class and per-layer figures and lists are JSON in one cell, None is an empty cell.

    Columns are those of `spread`.
    """
    columns, rows = spread(records)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        packed = (tuple, dict)
        writer.writerow([json.dumps(v, ensure_ascii=False) if isinstance(v, packed) else v for v in row])
    write_whole(path, text.getvalue())


def write_selections(path: str | Path, selections: Mapping[float, Mapping[str, Sequence[int]]]) -> None:
    """The filters removed at each ratio: a JSON list of {ratio, filters_removed: {layer: indices}}, a layer a line."""
    blocks = []
    for ratio, layers in selections.items():
        rows = [f"{json.dumps(name)}: {json.dumps([int(index) for index in layers[name]])}" for name in layers]
        body = ",".join(f"\n    {row}" for row in rows)
        blocks.append(f'{{"ratio": {json.dumps(float(ratio))}, "filters_removed": {{{body}}}}}')
    write_whole(path, "[" + ",\n".join(blocks) + "]\n")
