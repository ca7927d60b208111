"""docs/scaling.md says what the records say."""

import json
from statistics import median

import pytest

from benchmarks.scaling import PAGE, ROOT, filled, parts_of, put
from runs import read_sweep


def test_the_page_has_the_tables_of_the_records():
    text = PAGE.read_text()
    assert filled(text) == text and "| retraining, a ratio |" in text


def test_parts_are_those_of_the_lines_in_the_files():
    root = ROOT / "results" / "digits-vgg16_bn"
    lines = [json.loads(line) for path in root.glob("*/records.jsonl") for line in path.read_text().splitlines()]
    pruned, retrained = ([line for line in lines if line["stage"] == stage] for stage in ("pruned", "retrained"))
    parts = parts_of(read_sweep(root))
    assert parts.removal == median(line["removal_seconds"] for line in pruned)
    assert parts.forward == pytest.approx(median(line["times"][0]["dense_median_ms"] / 107e3 for line in pruned))
    steps = [
        line["retraining_seconds"] / line["retraining_images"] / line["times"][0]["median_ms"] for line in retrained
    ]
    assert parts.training_step == pytest.approx(107e3 * median(steps))


def test_what_benchmarks_write_is_there():
    for name in ("growth", "launchers"):
        block = PAGE.read_text().split(f"<!-- begin: {name} -->\n")[1].split(f"<!-- end: {name} -->")[0]
        assert block.count("\n| ") >= 10 and put(PAGE.read_text(), name, block) == PAGE.read_text()
