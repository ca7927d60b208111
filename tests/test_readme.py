"""What the README names is there."""

import csv
import re
from pathlib import Path

import torch
from torchvision.models import resnet18

from benchmarks.selection import cases, label_of, markdown
from comparison import standings
from comparison_table import COLUMNS, cells, notes, words
from filter_selection import REGISTRY
from runs import read_sweep, task_of
from sweep_plots import middle_setting
from tests.readme import between, put

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COSTS = ROOT / "docs" / "selection_cost.csv"
WIDTHS = ROOT / "docs" / "onnx_widths.csv"  # of the records that the command beside the table makes
RESULTS = ROOT / "results"
COST_TABLE, WIDTH_TABLE, RESULT_TABLES = (
    "cost of scoring",
    "latency by widths",
    "results",
)  # `python -m tests.test_readme` puts both in


def test_its_pictures_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_it_lists_every_method_and_model_and_dataset():
    groups = ("pruning", "model", "dataset")
    names = {path.stem for group in groups for path in (ROOT / "config" / group).glob("*.yaml")}
    assert not {name for name in names | set(REGISTRY) if f"`{name}`" not in README}


def test_its_three_lines_prune_a_network():
    (code,) = re.findall(r"```python\n(from filter_selection.*?)```", README, flags=re.DOTALL)
    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval()
    known = {"model": model, "batches": [(torch.randn(2, 3, 32, 32), torch.tensor([3, 8]))]}
    exec(code, known)
    assert len([line for line in code.splitlines() if line and not line.startswith("from ")]) == 3
    before, after = (sum(p.numel() for p in network.parameters()) for network in (model, known["smaller"]))
    assert after < before and known["smaller"](torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_every_method_has_its_yaml():
    assert {path.stem for path in (ROOT / "config" / "pruning").glob("*.yaml")} == set(REGISTRY)


def test_it_quotes_the_measured_cost_of_every_method():
    text = between(COST_TABLE)
    assert text == markdown(COSTS)
    assert set(re.findall(r"^\| `(.+?)` \|", text, flags=re.MULTILINE)) == {
        label_of(method, options) for method, options in cases(sorted(REGISTRY))
    }


def width_table() -> str:
    """MACs and latency left, a row a (ratio, round_to), a column an engine."""
    titles = ("ratio", "round_to", "MACs left", "latency left, PyTorch", "latency left, ONNX Runtime")
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|---|---|"]
    found: dict[tuple[float, int], dict[str, dict[str, str]]] = {}
    with WIDTHS.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault((float(row["ratio"]), int(row["round_to"])), {})[row["engine"]] = row
    for (ratio, width), engines in sorted(found.items()):
        times = [
            f"{float(row['latency_ratio']):.3f} ({float(row['low']):.3f} to {float(row['high']):.3f})"
            for row in (engines["pytorch"], engines["onnxruntime"])
        ]
        macs = float(engines["pytorch"]["macs_ratio"])
        lines.append(f"| {ratio:g} | {width} | {macs:.3f} | {times[0]} | {times[1]} |")
    return "\n".join(lines) + "\n"


def test_it_quotes_the_measured_latency_by_widths():
    assert between(WIDTH_TABLE) == width_table()
    assert width_table().count("\n") == 6


def result_tables() -> str:
    """Of each sweep in results/: its plot, what its figures say in words, and the table at the middle target."""
    parts = []
    for root in sorted(path.parent for path in RESULTS.glob("*/comparison.md")):
        sweep = read_sweep(root)
        first = sweep.records[0]
        setting = middle_setting(sweep.records, task_of(first), first.model)
        rows = standings(sweep.records, setting)
        table = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
        parts += [
            f"### {first.model} on {first.dataset}",
            f"![{first.model} on {first.dataset}](results/{root.name}/plots/accuracy_over_macs.png)",
            "\n".join(f"- {text}" for text in words(sweep)),
            f"{setting}:",
            "\n".join(f"| {' | '.join(line)} |" for line in table),
            " ".join(notes(sweep.records, setting, rows)),
        ]
    return "\n\n".join(parts) + "\n"


def test_it_quotes_the_results():
    assert between(RESULT_TABLES) == result_tables()


def test_it_lists_every_experiment():
    names = {path.stem for path in (ROOT / "config" / "experiment").glob("*.yaml")}
    assert names and not {name for name in names if f"`{name}`" not in README}


if __name__ == "__main__":
    tables = {COST_TABLE: markdown(COSTS), WIDTH_TABLE: width_table(), RESULT_TABLES: result_tables()}
    for name, table in tables.items():
        (ROOT / "README.md").write_text(put(name, table))
