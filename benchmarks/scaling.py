"""What a run costs, part by part, taken from the records of results/, and what a sweep would cost elsewhere.

python -m benchmarks.scaling          prints docs/scaling.md's tables
python -m benchmarks.scaling --write  puts them there
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from records import Record
from runs import Sweep, read_sweep
from sweep_plan import duration

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
MEASURED, PREDICTED = "measured parts", "predicted sweep"

# The sweep that docs/scaling.md works out: ResNet18 on ImageNet, ten classes of a thousand.
METHODS, SUBSETS, SEEDS, TARGETS, EPOCHS, CLASSES = 20, 100, 5, 3, 3, 10
RUNS = METHODS * SUBSETS * SEEDS
TRAIN_IMAGES, TEST_IMAGES, OF_A_CLASS = 1_281_167, 50_000, 1_281
REST = 30  # seconds a run: start, listing the folders, scoring, removal, latency, plots; not measured there
FORWARD = 1_500  # images a second of a forward pass that the reader has measured on the GPU; not measured here


@dataclass(frozen=True)
class Parts:
    """Medians over a sweep's runs. Seconds, and seconds an image as multiples of those of a forward pass."""

    name: str
    runs: int
    forward: float  # seconds an image, dense network, largest batch
    training: float  # of the dense network, once a seed
    scoring: float  # a run
    removal: float  # a ratio
    retraining: float  # a ratio
    latency: float  # a record, without its warm-up
    training_step: float  # an image retrained on, pruned network, in forward passes of it
    scoring_pass: float  # an image scored on, in forward passes


def parts_of(sweep: Sweep) -> Parts:
    records, pruned = sweep.records, [r for r in sweep.records if r.stage == "pruned"]
    retrained = [r for r in records if r.retraining_seconds and r.retraining_images]
    scored = [r for r in pruned if r.scoring_images]
    return Parts(
        name=f"{records[0].model}, {records[0].dataset}",
        runs=len(sweep.runs),
        forward=median(_forward(r, dense=True) for r in pruned),
        training=median(r.training_seconds for r in records if r.training_seconds is not None),
        scoring=median(r.scoring_seconds for r in pruned if r.scoring_seconds is not None),
        removal=median(r.removal_seconds for r in pruned),
        retraining=median(r.retraining_seconds for r in retrained),
        latency=median(sum(t.pairs * (t.median_ms + t.dense_median_ms) / 1e3 for t in r.times) for r in pruned),
        training_step=median(r.retraining_seconds / r.retraining_images / _forward(r) for r in retrained),
        scoring_pass=median(r.scoring_seconds / r.scoring_images / _forward(r, dense=True) for r in scored),
    )


def _forward(record: Record, dense: bool = False) -> float:
    """Seconds an image, in the largest batch that was timed."""
    timing = max((t for t in record.times if t.engine == "pytorch"), key=lambda t: t.batch_size)
    return (timing.dense_median_ms if dense else timing.median_ms) / 1e3 / timing.batch_size


def measured_table(parts: Sequence[Parts]) -> str:
    rows = [
        ("runs", lambda p: f"{p.runs}"),
        ("dense training, once a seed", lambda p: f"{p.training:.0f} s"),
        ("scoring, once a run", lambda p: f"{p.scoring:.2g} s"),
        ("removal and its proof, a ratio", lambda p: f"{p.removal:.2g} s"),
        ("retraining, a ratio", lambda p: f"{p.retraining:.2g} s"),
        ("latency, a record", lambda p: f"{p.latency:.2g} s"),
        ("an image forward", lambda p: f"{1e3 * p.forward:.2g} ms"),
        ("an image retrained on, in forward passes", lambda p: f"{p.training_step:.2g}"),
        ("an image scored on, in forward passes", lambda p: f"{p.scoring_pass:.2g}"),
    ]
    lines = [f"| median of | {' | '.join(p.name for p in parts)} |", "|---" * (len(parts) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(map(value, parts))} |" for name, value in rows]) + "\n"


def predicted_table(step: float) -> str:
    """GPU time of the sweep above, `step` forward passes an image trained on."""
    retraining = CLASSES * OF_A_CLASS * EPOCHS * step / FORWARD
    costs = {
        "retraining, each target of each run": RUNS * TARGETS * retraining,
        "retraining with nothing removed, each subset and seed": SUBSETS * SEEDS * retraining,
        "test images of the selected classes, each record": RUNS * 2 * (1 + TARGETS) * CLASSES * 50 / FORWARD,
        "test images of all classes, each seed": SEEDS * TEST_IMAGES / FORWARD,
        "all else of a run, 30 s assumed": RUNS * REST,
        "dense training, 90 epochs, if there are no weights": SEEDS * 90 * TRAIN_IMAGES * step / FORWARD,
    }
    lines = ["| part | on one GPU | on 8 | on 64 |", "|---|---|---|---|"]
    for name, seconds in {**costs, "all": sum(costs.values())}.items():
        lines.append(f"| {name} | {' | '.join(duration(seconds / gpus) for gpus in (1, 8, 64))} |")
    return "\n".join(lines) + "\n"


def tables() -> tuple[str, str]:
    parts = [parts_of(read_sweep(path.parent)) for path in sorted((ROOT / "results").glob("*/comparison.md"))]
    return measured_table(parts), predicted_table(median(p.training_step for p in parts))


def filled(text: str) -> str:
    """The page with the tables of now between its markers."""
    for name, table in zip((MEASURED, PREDICTED), tables(), strict=True):
        text = put(text, name, table)
    return text


def put(page: str, name: str, table: str) -> str:
    """`page` with this table between the markers of this name."""
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
    before, rest = page.split(begin)
    return before + begin + table + end + rest.split(end, 1)[1]


def main() -> None:
    if "--write" in sys.argv[1:]:
        PAGE.write_text(filled(PAGE.read_text()))
    print("\n".join(tables()))


if __name__ == "__main__":
    main()
