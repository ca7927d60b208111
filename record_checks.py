"""What must hold of the figures in a record: each check raises ValueError with the field that cannot be true."""

import math
from typing import Any

from intervals import wilson

STAGES = ("dense", "pruned", "retrained", "scratch")
BUDGETS = ("macs", "params", "filters", "latency")
TOLERANCE = 0.02  # of a budget: a target is met within so much of the dense network's
HEADS = ("all", "selected")
ENGINES = ("pytorch", "onnxruntime")
EXPORTERS = ("current", "legacy", "none")
ROUNDING = 1e-9


def check(record: Any) -> None:
    """All that must hold of a `records.Record`."""
    for part in (
        _check_identity,
        _check_filters,
        _check_budget,
        _check_accuracy,
        _check_costs,
        _check_times,
        _check_onnx,
    ):
        part(record)


def check_timing(timing: Any) -> None:
    """All that must hold of a `records.Timing`."""
    _require(timing.engine in ENGINES, f"engine: {timing.engine!r}; one of {', '.join(ENGINES)} is needed")
    for name in ("batch_size", "threads", "pairs", "median_ms", "dense_median_ms", "ratio_low"):
        _require(getattr(timing, name) > 0, f"{name}: {getattr(timing, name)}; above 0 is needed")
    _require(timing.p95_ms >= timing.median_ms, f"p95_ms: {timing.p95_ms} is below the median, {timing.median_ms}")
    speed = 1000 * timing.batch_size / timing.median_ms
    given = timing.images_per_second
    _require(math.isclose(given, speed), f"images_per_second: {given}; it is {speed}")
    low, ratio, high = timing.ratio_low, timing.ratio, timing.ratio_high
    _require(low <= ratio <= high, f"ratio: {ratio} is not within {low} to {high}")


def _require(true: bool, text: str) -> None:
    if not true:
        raise ValueError(text)


def _check_identity(record: Any) -> None:
    _require(record.stage in STAGES, f"stage: {record.stage!r}; one of {', '.join(STAGES)} is needed")
    _require(record.head in HEADS, f"head: {record.head!r}; one of {', '.join(HEADS)} is needed")
    names, classes = record.class_names, record.selected_classes
    _require(0 < len(classes) == len(set(classes)), f"selected_classes: {classes}; at least one, each once")
    _require(len(names) == len(set(names)) == len(classes), f"class_names: {names}; one for each class, each once")
    dense_only = record.accuracy_all_classes is None or (record.stage, record.head) == ("dense", "all")
    _require(dense_only, "accuracy_all_classes: only the dense model with all logits has it")


def _check_filters(record: Any) -> None:
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


def left_of(match: str, macs_ratio: Any, params_ratio: float, achieved_ratio: float, times: Any) -> float | None:
    """The share of a budget that is left; None where it was not measured. Latency: PyTorch's, of the largest batch."""
    if match == "latency":
        timed = [timing for timing in times if timing.engine == "pytorch"]
        return max(timed, key=lambda timing: timing.batch_size).ratio if timed else None
    return {"macs": macs_ratio, "params": params_ratio, "filters": 1 - achieved_ratio}[match]


def _check_budget(record: Any) -> None:
    match, target, reached = record.match, record.target, record.reached
    _require(match is None or match in BUDGETS, f"match: {match!r}; one of {', '.join(BUDGETS)} is needed")
    _require((target is None) == (reached is None), "target, reached: both or none")
    _require(target is None or match is not None, "target: without match")
    _require(target is None or 0 <= target < 1, f"target: {target}; 0 or more and below 1 is needed")
    _require(reached is None or reached <= 1, f"reached: {reached}; no more than everything can go")
    if reached is not None:
        left = left_of(match, record.macs_ratio, record.params_ratio, record.achieved_ratio, record.times)
        agrees = left is not None and math.isclose(reached, 1 - left, abs_tol=ROUNDING)
        _require(agrees, f"reached: {reached}; what is left of {match} is {left}")


def _check_accuracy(record: Any) -> None:
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
    given, mean = record.balanced_accuracy, sum(shares.values()) / len(shares)
    _require(math.isclose(given, mean, abs_tol=ROUNDING), f"balanced_accuracy: {given}; it is {mean}")
    seen = sum(images.values())
    low, high = wilson(round(record.accuracy * seen), seen)
    within = math.isclose(record.accuracy_low, low, abs_tol=ROUNDING)
    within &= math.isclose(record.accuracy_high, high, abs_tol=ROUNDING)
    given = f"{record.accuracy_low} to {record.accuracy_high}"
    _require(within, f"accuracy_low, accuracy_high: {given}; they are {low} to {high}")
    top5 = record.accuracy_top5
    _require(top5 is None or record.accuracy <= top5 <= 1, f"accuracy_top5: {top5} is below accuracy or above 1")
    everywhere = record.accuracy_all_classes
    _require(everywhere is None or 0 <= everywhere <= 1, f"accuracy_all_classes: {everywhere} is no fraction")


def _check_costs(record: Any) -> None:
    sizes = ("params", "params_ratio", "size_bytes", "size_ratio", "weight_bytes", "forward_batch_size")
    for name in sizes:
        _require(getattr(record, name) > 0, f"{name}: {getattr(record, name)}; above 0 is needed")
    _require(record.macs is not None or record.macs_ratio is None, "macs_ratio: without macs there is none")
    steps = ("scoring", "removal", "retraining", "training", "scratch")
    seconds = [f"{step}_seconds" for step in steps]
    amounts = [f"{step}_peak_bytes" for step in steps[:3]] + ["scoring_images", "retraining_images"]
    memory = ["activation_bytes", "forward_peak_bytes"]
    for name in ("macs", "macs_ratio", "difference_from_masked", *seconds, *amounts, *memory):
        value = getattr(record, name)
        _require(value is None or value >= 0, f"{name}: {value}; 0 or more is needed")


def _check_times(record: Any) -> None:
    which = [(timing.engine, timing.batch_size) for timing in record.times]
    _require(len(which) == len(set(which)), f"times: {which}; each engine and batch size once")


def _check_onnx(record: Any) -> None:
    exporter = record.onnx_exporter
    _require(exporter is None or exporter in EXPORTERS, f"onnx_exporter: {exporter!r}; one of {', '.join(EXPORTERS)}")
    figures = [getattr(record, f"onnx_{name}") for name in ("provider", "difference", "size_bytes", "accuracy")]
    there = exporter in ("current", "legacy")
    whole = all((figure is not None) == there for figure in figures)
    _require(whole, "onnx_provider, onnx_difference, onnx_size_bytes, onnx_accuracy: with an exported network, only")
    _require(not there or (record.onnx_difference >= 0 < record.onnx_size_bytes), "onnx: a size or difference below 0")
    _require(not there or 0 <= record.onnx_accuracy <= 1, f"onnx_accuracy: {record.onnx_accuracy} is no fraction")
