"""A made-up sweep on disk: variants x subsets x seeds x targets, its accuracies a function of their names."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from records import Record
from tests.sample_records import DENSE_MACS, certainty, record, timing

LEVELS = {"ocap": 0.99, "ln_structured": 0.93, "random": 0.85}
IMAGES = 100


def noise(*names: object, size: float = 0.02) -> float:
    """Within -size and size, by the names alone."""
    return random.Random(hashlib.sha256(repr(names).encode()).hexdigest()).uniform(-size, size)


def run_of(
    variant: str,
    subset: tuple[int, ...],
    seed: int,
    *,
    targets: Sequence[float] = (0.3, 0.6),
    level: float | None = None,
    dataset: str = "digits",
    model: str = "resnet18",
    unreached: Sequence[float] = (),
) -> list[Record]:
    """A run's records: dense, the replaced head, and each target pruned and retrained. `level` at half the MACs."""
    level = LEVELS.get(variant, 0.9) if level is None else level
    names = tuple(f"class {label}" for label in subset)
    identity = {
        "run_id": f"2026-{variant}-{subset}-{seed}-{dataset}-{model}",
        "config_hash": hashlib.sha256(repr((variant, subset, seed, dataset, model)).encode()).hexdigest(),
        "method": variant.split()[0], "variant": variant, "seed": seed, "sampling_seed": seed, "dataset": dataset,
        "model": model, "selected_classes": subset, "class_names": names, "subset": "random", "match": "macs",
    }  # fmt: skip

    def row(stage: str, target: float | None, share: float, ratio: float) -> Record:
        gone = 0 if target is None else (1 - share)
        shared = noise(subset, seed)  # a block is easy or hard for all
        whose = "nothing removed" if target is None else variant  # then all methods have the same network
        own = noise(whose, subset, seed, stage, target, size=0.01)
        mean = 0.97 + shared - (0.97 - level) * 2 * gone + own + 0.02 * (stage == "retrained")
        per_class = {
            name: round(IMAGES * min(1, max(0, mean + noise(name, whose, size=0.03)))) / IMAGES for name in names
        }
        images = dict.fromkeys(names, IMAGES)
        answers = certainty(per_class, images)
        answers |= {
            "accuracy_per_class": per_class,
            "images_per_class": images,
            "worst_class_accuracy": min(per_class.values()),
        }
        times = (timing(1, 1.6, 0.4 + 0.6 * share), timing(128, 12.5, share))
        more = {"accuracy_all_classes": 0.98, "head": "all"} if stage == "dense" else {}
        if target is not None:
            more |= {"target": target, "reached": 1 - share}
        return record(
            stage, ratio, **identity, **answers, macs=round(DENSE_MACS * share), macs_ratio=share, times=times, **more
        )

    rows = [row("dense", None, 1.0, 0.0), row("pruned", None, 0.999, 0.0), row("retrained", None, 0.999, 0.0)]
    for target in targets:
        reached = target - 0.1 if target in unreached else target + noise(variant, target, size=0.005)
        rows += [row(stage, target, 1 - reached, round(target + 0.1, 3)) for stage in ("pruned", "retrained")]
    return rows


def grid(
    variants: Sequence[str] = tuple(LEVELS), subsets: int = 3, seeds: int = 3, **options
) -> Iterator[tuple[str, list[Record]]]:
    """Folder name and records of each run."""
    jobs = [(v, (s, s + 3, s + 6), k) for k in range(seeds) for s in range(subsets) for v in variants]
    for number, (variant, subset, seed) in enumerate(jobs):
        yield str(number), run_of(variant, subset, seed, **options)


def records_of(*arguments, **options) -> list[Record]:
    return [record for _, records in grid(*arguments, **options) for record in records]


def write_run(path: Path, records: Sequence[Record], told: Sequence[str] = ()) -> Path:
    """The folder that a run would have left behind; `told` stood on its command line as well."""
    (path / ".hydra").mkdir(parents=True)
    (path / "records.jsonl").write_text("".join(record.to_json() + "\n" for record in records))
    blocks = []
    for row in records:
        if row.stage == "pruned":
            chance = random.Random(f"{row.variant} {row.ratio}")
            chosen = {
                layer: sorted(chance.sample(range(row.widths_dense[layer]), count))
                for layer, count in row.filters_chosen_per_layer.items()
            }
            blocks.append({"ratio": row.ratio, "filters_removed": chosen})
    (path / "selections.json").write_text(json.dumps(blocks))
    (path / "environment.json").write_text(json.dumps({"cpu": "a processor", "python": "3.11", "hash": "e1"}))
    overrides = [f"pruning={records[0].method}", f"seed={records[0].seed}", *told]
    (path / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    return path


def write_sweep(root: Path, *arguments, **options) -> Path:
    for name, records in grid(*arguments, **options):
        write_run(root / name, records)
    return root
