"""Records of made-up runs, consistent in themselves, for the tests of what is stored and shown."""

import random
from collections.abc import Sequence
from typing import Any

from intervals import wilson
from records import Record, Timing

DENSE_MACS, DENSE_PARAMS, DENSE_BYTES = 37_523_456, 11_173_962, 44_790_123
WIDTHS = {"conv1": 16, "layer1.conv1": 16, "layer1.conv2": 16, "layer2.conv1": 32}
LEFT_OUT = ("conv1", "layer1.conv2")


def timing(batch_size: int = 128, dense_ms: float = 12.5, ratio: float = 0.7, **changes: Any) -> Timing:
    """Passes of a model that takes `ratio` of the dense one's time."""
    fields = {
        "engine": "pytorch", "batch_size": batch_size, "threads": 2, "pairs": 20, "median_ms": dense_ms * ratio,
        "p95_ms": 1.25 * dense_ms * ratio, "dense_median_ms": dense_ms, "ratio": ratio, "ratio_low": 0.96 * ratio,
        "ratio_high": 1.02 * ratio, "noisy": False,
    } | changes  # fmt: skip
    return Timing(images_per_second=1000 * batch_size / fields["median_ms"], **fields)


def certainty(per_class: dict[str, float], images: dict[str, int]) -> dict[str, float]:
    """The fields that follow from the accuracies of the classes: overall, its interval, and balanced."""
    correct, seen = sum(round(per_class[name] * images[name]) for name in images), sum(images.values())
    low, high = wilson(correct, seen)
    balanced = sum(per_class.values()) / len(per_class)
    return {"accuracy": correct / seen, "accuracy_low": low, "accuracy_high": high, "balanced_accuracy": balanced}


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
        "variant": "ocap",
        "scope": "layer",
        "scoring_classes": "selected",
        "num_pruning_samples": 30,
        "sampling_seed": 42,
        "dataset": "digits",
        "model": "resnet18",
        "subset": "given",
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
        **certainty({"eight": 28 / 30, "three": 14 / 20}, {"eight": 30, "three": 20}),
        "worst_class_accuracy": 14 / 20,
        "accuracy_per_class": {"eight": 28 / 30, "three": 14 / 20},
        "images_per_class": {"eight": 30, "three": 20},
        "macs": round(DENSE_MACS * share),
        "macs_ratio": share,
        "params": round(DENSE_PARAMS * share),
        "params_ratio": share,
        "size_bytes": round(DENSE_BYTES * share),
        "size_ratio": share,
        "weight_bytes": round(DENSE_BYTES * share) - 5_000,
        "activation_bytes": round(2_400_000 * share),
        "forward_peak_bytes": round(14_000_000 * share),
        "forward_batch_size": 128,
        "times": (timing(1, 1.6, 0.3 + 0.7 * share), timing(128, 12.5, share)),
        "scoring_seconds": None if stage == "dense" else 0.42,
        "scoring_images": None if stage == "dense" else 30,
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
        **certainty(per_class, dict.fromkeys(names, images)),
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
        costs["times"] = (timing(1, 1.6, 0.3 + 0.7 * share), timing(128, 12.5, share))
        answers = accuracies([min(1, max(0, chance.gauss(level, 0.03))) for _ in range(classes)])
        return record(stage, ratio, **filters, **costs, **answers, **changes)

    rows = [row("dense", 0, 0.97, head="all", accuracy_all_classes=0.9861, training_seconds=83.2)]
    rows.append(row("dense", 0, 0.98))
    for ratio in ratios:
        rows.append(row("pruned", ratio, 0.98 * (1 - ratio**2)))
        rows += [row("retrained", ratio, 0.98 - 0.05 * ratio)] if retrained else []
    return rows
