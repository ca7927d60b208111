"""Records of made-up runs, consistent in themselves, for the tests of what is stored and shown."""

import random
from collections.abc import Sequence
from typing import Any

from records import Record

DENSE_MACS, DENSE_PARAMS, DENSE_BYTES = 37_523_456, 11_173_962, 44_790_123
WIDTHS = {"conv1": 16, "layer1.conv1": 16, "layer1.conv2": 16, "layer2.conv1": 32}
LEFT_OUT = ("conv1", "layer1.conv2")


def lost(widths: dict[str, int], kept: dict[str, int]) -> dict[str, int]:
    return {layer: widths[layer] - kept[layer] for layer in widths if kept[layer] < widths[layer]}


def fields_of(stage: str = "pruned", ratio: float = 0.5, **changes: Any) -> dict[str, Any]:
    """The fields of one valid record of a two-class run; `changes` replace some of them."""
    kept = dict(WIDTHS)
    if stage != "dense":
        for layer in WIDTHS.keys() - set(LEFT_OUT):
            kept[layer] -= int(ratio * WIDTHS[layer])
    removed = sum(WIDTHS.values()) - sum(kept.values())
    share = 1 - removed / sum(WIDTHS.values())
    return {
        "run_id": "ocap-r1",
        "config_hash": "0123abcd",
        "seed": 42,
        "method": "ocap",
        "dataset": "digits",
        "model": "resnet18",
        "selected_classes": (8, 3),
        "class_names": ("eight", "three"),
        "stage": stage,
        "head": "selected",
        "ratio": 0.0 if stage == "dense" else ratio,
        "achieved_ratio": removed / 48,
        "filters_removed": removed,
        "filters_prunable": 48,
        "filters_total": 80,
        "pruner": "depgraph",
        "residual": "skip",
        "min_filters": 1,
        "round_to": 1,
        "accuracy": 42 / 50,
        "worst_class_accuracy": 14 / 20,
        "accuracy_per_class": {"eight": 28 / 30, "three": 14 / 20},
        "images_per_class": {"eight": 30, "three": 20},
        "macs": round(DENSE_MACS * share),
        "macs_ratio": share,
        "params": round(DENSE_PARAMS * share),
        "params_ratio": share,
        "size_bytes": round(DENSE_BYTES * share),
        "size_ratio": share,
        "latency_ms_median": 12.5 * share,
        "latency_ms_p95": 14.25 * share,
        "latency_batch_size": 128,
        "scoring_seconds": None if stage == "dense" else 0.42,
        "removal_seconds": None if stage == "dense" else 0.3125,
        "retraining_seconds": 6.75 if stage == "retrained" else None,
        "filters_chosen_per_layer": lost(WIDTHS, kept),
        "filters_kept_per_layer": kept,
        "widths_dense": WIDTHS,
        "layers_left_out": LEFT_OUT,
    } | changes


def record(stage: str = "pruned", ratio: float = 0.5, **changes: Any) -> Record:
    return Record(**fields_of(stage, ratio, **changes))


def accuracies(shares: Sequence[float], images: int = 40) -> dict[str, Any]:
    """The accuracy fields of classes named by number words, `images` of each, at about these shares."""
    names = tuple(f"class {number}" for number in range(len(shares)))
    per_class = {name: round(share * images) / images for name, share in zip(names, shares, strict=True)}
    return {
        "selected_classes": tuple(range(len(names))),
        "class_names": names,
        "accuracy": sum(per_class.values()) / len(names),
        "worst_class_accuracy": min(per_class.values()),
        "accuracy_per_class": per_class,
        "images_per_class": dict.fromkeys(names, images),
    }


def run_records(
    ratios: Sequence[float] = (0.25, 0.5), classes: int = 3, layers: int = 8, retrained: bool = True
) -> list[Record]:
    """A whole run: two dense models, then each ratio before and, unless told otherwise, after retraining."""
    chance = random.Random(0)
    widths = {f"layer{index // 4}.{index % 4}.conv1": 16 * 2 ** (index // 16) for index in range(layers)}
    first, total = next(iter(widths)), sum(widths.values())

    def row(stage: str, ratio: float, level: float, **changes: Any) -> Record:
        kept = {layer: width - int(ratio * width) * (layer != first) for layer, width in widths.items()}
        removed = total - sum(kept.values())
        share = 1 - removed / total
        filters = {
            "widths_dense": widths,
            "layers_left_out": (first,),
            "filters_chosen_per_layer": lost(widths, kept),
            "filters_kept_per_layer": kept,
            "filters_removed": removed,
            "filters_prunable": total - 16,
            "filters_total": total,
            "achieved_ratio": removed / (total - 16),
        }
        costs = {"macs": round(DENSE_MACS * share), "macs_ratio": share}
        answers = accuracies([min(1, max(0, chance.gauss(level, 0.03))) for _ in range(classes)])
        return record(stage, ratio, **filters, **costs, **answers, **changes)

    rows = [row("dense", 0, 0.97, head="all", accuracy_all_classes=0.9861, training_seconds=83.2)]
    rows.append(row("dense", 0, 0.98))
    for ratio in ratios:
        rows.append(row("pruned", ratio, 0.98 * (1 - ratio**2)))
        rows += [row("retrained", ratio, 0.98 - 0.05 * ratio)] if retrained else []
    return rows
