"""How the parts of a run grow: what each takes for more images, layers, ratios or runs, beside what it takes for fewer.

    python -m benchmarks.growth [--repeats 7] [--threads N] [--write]

The two alternate, the first of each pair changing in turn; the ratio is taken within each pair, its median and
quartiles are printed beside how much more there is of it. `--write` puts the table into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import nn

import report
from accuracy import evaluate
from benchmarks.evaluation import paired_seconds
from benchmarks.scaling import PAGE, ROOT, put
from benchmarks.selection import RandomBatches, build
from benchmarks.training import make_loader
from filter_selection import get_criterion
from pruner import get_pruner
from selection import PruningSelection
from structure import ModelGraph
from training import FitPlan, fit

CPU, SIZE, CLASSES = torch.device("cpu"), 32, 10
RATIOS = tuple(step / 11 for step in range(1, 11))
SMALL, LARGE = "resnet18", "resnet34"
PART = "growth"
Case = tuple[str, str, float, Callable[[], object], Callable[[], object]]


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def scoring(method: str, name: str, images: int, ratios: tuple[float, ...] = (0.5,)) -> Callable[[], object]:
    criterion = get_criterion(method)
    batches = list(RandomBatches(images, SIZE, 64))
    selection = PruningSelection(criterion, ratios, (3, SIZE, SIZE), batches, scope=criterion.scopes[0])
    graph = ModelGraph(build(name), (3, SIZE, SIZE))
    return lambda: selection.select(graph)


def removal(name: str, ratios: tuple[float, ...] = (0.5,)) -> Callable[[], object]:
    graph = ModelGraph(build(name), (3, SIZE, SIZE))
    selections = PruningSelection(get_criterion("ln_structured"), ratios, (3, SIZE, SIZE)).select(graph)
    pruner = get_pruner("depgraph", graph)
    return lambda: [pruner.prune_and_prove(indices) for indices in selections.values()]


def retraining(images: int, epochs: int = 1) -> Callable[[], object]:
    plan = FitPlan(epochs, 1e-3, 5e-4, "sgd", momentum=0.9, scheduler="cosine", patience=None)
    model, validation = build(SMALL), make_loader(64, 64, augment=False)
    train = make_loader(images, 64, augment=False)
    return lambda: fit(model, train, validation, plan, device=CPU, description="retraining", seed=0)


def evaluation(images: int) -> Callable[[], object]:
    model, batches = build(SMALL), list(RandomBatches(images, SIZE, 128))
    return lambda: evaluate(model, batches, CLASSES, CPU)


def reporting(folder: Path, runs: int) -> Callable[[], object]:
    """The report on the first so many committed runs."""
    root = folder / f"{runs}"
    for path in sorted((ROOT / "results/digits-resnet18").glob("*/records.jsonl"))[:runs]:
        shutil.copytree(path.parent, root / path.parent.name)

    def run() -> None:
        with redirect_stdout(StringIO()):
            report.main([str(root)])

    return run


def cases(folder: Path) -> Iterator[Case]:
    """Part, what there is more of, how much more, the call for less and the call for more."""
    deeper = convolutions(build(LARGE)) / convolutions(build(SMALL))
    for method in ("ocap", "lrp"):
        more = scoring(method, SMALL, 128)
        yield f"scoring by {method}", "images, 128 for 64", 2, scoring(method, SMALL, 64), more
    scored, layers = scoring("ocap", SMALL, 64), f"layers, {LARGE} for {SMALL}"
    yield "scoring by ocap", layers, deeper, scored, scoring("ocap", LARGE, 64)
    yield "scoring by ocap, selection", "ratios, 10 for 1", 10, scored, scoring("ocap", SMALL, 64, RATIOS)
    yield "removal and its proof", layers, deeper, removal(SMALL), removal(LARGE)
    yield "removal and its proof", "ratios, 10 for 1", 10, removal(SMALL), removal(SMALL, RATIOS)
    yield "retraining", "images, 256 for 128", 2, retraining(128), retraining(256)
    yield "retraining", "epochs, 2 for 1", 2, retraining(128), retraining(128, epochs=2)
    yield "test images of a record", "images, 512 for 256", 2, evaluation(256), evaluation(512)
    yield "the report of a sweep", "runs, 90 for 45", 2, reporting(folder, 45), reporting(folder, 90)


def table(repeats: int) -> str:
    lines = ["| part | more of | times as many | takes times as long | seconds |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for part, what, factor, less, more in cases(Path(folder)):
            pairs = paired_seconds(less, more, repeats)
            low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4, method="inclusive")
            before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
            told = f"{middle:.2f} ({low:.2f} to {high:.2f}) | {before:.2g}, {after:.2g}"
            lines.append(f"| {part} | {what} | {factor:.2g} | {told} |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    made = table(options.repeats)
    if options.write:
        PAGE.write_text(put(PAGE.read_text(), PART, made))


if __name__ == "__main__":
    main()
