"""A measurement in the fields of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from intervals import wilson
from metrics import Footprint, Measurement
from records import Record, Timing


def accuracy_fields(
    measured: Measurement, stage: str, head: str, classes: Sequence[int], names: Sequence[str]
) -> dict[str, Any]:
    """How well the network classifies the selected `classes`, called `names`, here and in ONNX Runtime.

    With all logits, `head` being `all`, what was counted of the other classes is left out; of the dense stage it is
    kept as the accuracy on all.
    """
    counts, onnx = measured.counts, measured.onnx
    in_onnx = onnx.counts if onnx else None
    everywhere = counts.accuracy if stage == "dense" else None
    if head == "all":
        counts, in_onnx = counts.subset(classes), in_onnx and in_onnx.subset(classes)
    low, high = wilson(sum(counts.correct), counts.images)
    return {
        "accuracy": counts.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_top5": counts.accuracy_top5,
        "accuracy_all_classes": everywhere,
        "worst_class_accuracy": counts.worst,
        "balanced_accuracy": counts.balanced,
        "accuracy_per_class": dict(zip(names, counts.per_class, strict=True)),
        "images_per_class": dict(zip(names, counts.total, strict=True)),
        "onnx_exporter": onnx and onnx.exporter,
        "onnx_provider": onnx and onnx.provider,
        "onnx_difference": onnx and onnx.difference,
        "onnx_size_bytes": len(onnx.content) if onnx and onnx.content else None,
        "onnx_accuracy": in_onnx.accuracy if in_onnx else None,
    }


def size_fields(own: Footprint, dense: Footprint) -> dict[str, Any]:
    """What follows from the network's shapes, beside the dense network's."""
    return {
        "macs": own.macs,
        "macs_ratio": own.macs / dense.macs if own.macs and dense.macs else None,
        "params": own.params,
        "params_ratio": own.params / dense.params,
        "size_bytes": own.size_bytes,
        "size_ratio": own.size_bytes / dense.size_bytes,
        "weight_bytes": own.weight_bytes,
        "activation_bytes": own.activation_bytes,
        "forward_peak_bytes": own.forward_peak_bytes,
        "forward_batch_size": own.forward_batch_size,
    }


def timings(measured: Measurement) -> list[Timing]:
    """What each engine took for each batch size."""
    return [
        Timing(
            engine=engine,
            batch_size=size,
            threads=measured.threads,
            pairs=len(pairs.model_ms),
            median_ms=pairs.median_ms,
            p95_ms=pairs.p95_ms,
            images_per_second=1000 * size / pairs.median_ms,
            dense_median_ms=pairs.dense_median_ms,
            **dict(zip(("ratio", "ratio_low", "ratio_high"), pairs.ratio(), strict=True)),
            noisy=pairs.noisy,
        )
        for (engine, size), pairs in measured.times.items()
    ]


def footprint_in(record: Record) -> Footprint:
    """What a record says of its network's shapes; its warnings stay with the record."""
    return Footprint(
        **{f.name: getattr(record, f.name) for f in fields(Footprint) if f.name != "warnings"}, warnings=()
    )
