"""What scoring costs beside the bare pass that a method needs: each method of the registry, same images, same run.

    python -m benchmarks.selection [--methods ocap ...] [--models vgg16 resnet18] [--sizes 32 224] [--images 256]
        [--repeats 7] [--threads N] [--csv FILE] [--memory] [--no-sweeps]

A method that reads responses is held against a bare forward pass of the whole network, one that reads gradients or
relevance against a forward and backward pass with weight gradients. The two alternate, the first of each pair changing
in turn; the ratio is taken within each pair, and its median and quartiles are printed, with the cost of choosing
filters at 11 ratios over choosing at one, scoring included. `--memory` runs each case in a process of its own, at 256
and at 2,048 images, and prints how far its peak memory grows over that of the loaded network.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision import models

from benchmarks.evaluation import paired_seconds
from errors import BenchmarkError
from filter_selection import REGISTRY, Criterion, get_criterion
from filter_selection.base import ResponseCriterion
from selection import PruningSelection
from settings import declaration

CLASSES = 10
MEMORY_IMAGES = (256, 2048)
RATIOS = tuple(step / 11 for step in range(11))
VARIED = {"ocap": "aggregation", "torchpruner": "attribution", "torch_pruning": "importance"}


class RandomBatches:
    """Seeded random images [B, 3, size, size], each batch made when it is asked for: none are kept."""

    def __init__(self, images: int, size: int, batch_size: int):
        self.images, self.size, self.batch_size = images, size, batch_size
        self.mean, self.std = (0.5,) * 3, (0.25,) * 3

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.images, self.batch_size):
            count = min(self.batch_size, self.images - start)
            pixels = torch.rand(count, 3, self.size, self.size, generator=generator).sub_(0.5).div_(0.25)
            labels = torch.randint(CLASSES, (count,), generator=generator)
            yield pixels.contiguous(memory_format=torch.channels_last), labels


def forward_pass(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    def bare() -> None:
        with torch.inference_mode():
            for images, _ in batches:
                model(images)

    return bare


def forward_backward_pass(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    def bare() -> None:
        for images, labels in batches:
            cross_entropy(model(images), labels, reduction="sum").backward()
            model.zero_grad(set_to_none=True)

    return bare


def bare_pass(criterion: Criterion) -> str:
    """The pass that the method cannot do without."""
    reading = getattr(criterion, "matched", None) or criterion  # what is matched scores
    reading = getattr(reading, "attributing", reading)  # TorchPruner's APoZ reads responses, the others gradients
    if isinstance(reading, ResponseCriterion) or not criterion.needs_data:
        return "forward"
    return "forward+backward"


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(models, name)(weights=None, num_classes=CLASSES).eval().to(memory_format=torch.channels_last)


def selection_for(criterion: Criterion, size: int, batches, ratios: tuple[float, ...]) -> PruningSelection:
    return PruningSelection(criterion, ratios, (3, size, size), batches, scope=criterion.scopes[0])


def measure(
    name: str, method: str, options: dict, size: int, images: int, batch_size: int, repeats: int, sweeps: bool
) -> dict:
    """One row: the method's score against its bare pass, and, with `sweeps`, 11 ratios against one."""
    model = build(name)
    batches = list(RandomBatches(images, size, batch_size))
    criterion = get_criterion(method, options)
    graph = selection_for(criterion, size, batches, (0.5,))._graph(model)
    one, eleven = (selection_for(criterion, size, batches, ratios) for ratios in ((0.5,), RATIOS))
    kind = bare_pass(criterion)
    bare = (forward_pass if kind == "forward" else forward_backward_pass)(model, batches)
    pairs = paired_seconds(bare, lambda: one.score(graph), repeats)
    low, middle, high = statistics.quantiles([ours / theirs for theirs, ours in pairs], n=4, method="inclusive")
    sweep = paired_seconds(lambda: one.select(graph), lambda: eleven.select(graph), repeats) if sweeps else []
    return {
        "model": name,
        "size": size,
        "method": label_of(method, options),
        "layers": len(one.layers(graph)),
        "pass": kind,
        "ratio_median": round(middle, 3),
        "ratio_q1": round(low, 3),
        "ratio_q3": round(high, 3),
        "eleven_ratios_over_one": round(statistics.median(b / a for a, b in sweep), 3) if sweep else None,
        "images": images,
        "batch_size": batch_size,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def peak_growth(name: str, method: str, options: dict, size: int, images: int, batch_size: int) -> float:
    """MiB that scoring adds to the peak memory of this process, the network loaded and run once."""
    model = build(name)
    criterion = get_criterion(method, options)
    selection = selection_for(criterion, size, RandomBatches(images, size, batch_size), (0.5,))
    graph = selection._graph(model)
    forward_pass(model, list(RandomBatches(batch_size, size, batch_size)))()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    selection.score(graph)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def cases(methods: list[str]) -> list[tuple[str, dict]]:
    """(method, options) of every method once, or once a word of the key that makes it another method."""
    found = []
    for method in methods:
        key = VARIED.get(method)
        words = declaration("pruning", method)["choices"][key] if key else ()
        found += [(method, {key: word}) for word in words] or [(method, {})]
    return found


def label_of(method: str, options: dict) -> str:
    return " ".join((method, *map(str, options.values())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=sorted(REGISTRY), default=sorted(REGISTRY))
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet18"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[32])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--no-sweeps", dest="sweeps", action="store_false", help="11 ratios are not held against one")
    parser.add_argument("--one-memory-case", help=argparse.SUPPRESS)  # a process of its own: arguments of peak_growth
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one_memory_case:
        print(peak_growth(*json.loads(options.one_memory_case)))
        return 0
    for name in options.models:
        for method, own in cases(options.methods):
            for size in options.sizes:
                if options.memory:
                    case = (name, method, own, size)
                    few, many = (peak_of_process(*case, images, options.batch_size) for images in MEMORY_IMAGES)
                    print(
                        f"{name:10} {size:3} {label_of(method, own):26} peak grows by {few:6.1f} MiB over "
                        f"{MEMORY_IMAGES[0]:,} images, by {many:6.1f} MiB over {MEMORY_IMAGES[1]:,}",
                        flush=True,
                    )
                    continue
                try:
                    row = measure(
                        name, method, own, size, options.images, options.batch_size, options.repeats, options.sweeps
                    )
                except BenchmarkError as error:  # a method that this network has nothing for
                    print(f"{name:10} {size:3} {label_of(method, own):28} refused: {error}", flush=True)
                    continue
                sweep = f", 11 ratios {row['eleven_ratios_over_one']:.3f} of one" if options.sweeps else ""
                print(
                    f"{name:10} {size:3} {row['method']:28} {row['ratio_median']:6.3f} of {row['pass']} "
                    f"({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f}){sweep}",
                    flush=True,
                )
                if options.csv:
                    append(options.csv, row)
    return 0


def peak_of_process(*case) -> float:
    command = [sys.executable, "-m", "benchmarks.selection", "--one-memory-case", json.dumps(case)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(answer.stdout.split()[-1])


def markdown(path: Path) -> str:
    """The table of a CSV: a row a method, a column a network and image size; the median ratio with its quartiles."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(dict.fromkeys((row["model"], row["size"]) for row in rows))
    ratios = {
        (row["method"], row["model"], row["size"]): "{} ({} to {})".format(
            *(f"{float(row[key]):.2f}" for key in ("ratio_median", "ratio_q1", "ratio_q3"))
        )
        for row in rows
    }
    passes = {row["method"]: row["pass"] for row in rows}
    lines = ["| method | bare pass | " + " | ".join(f"{model}, {size}x{size}" for model, size in columns) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for method in sorted(passes, key=lambda method: (passes[method], method)):
        cells = [ratios.get((method, *column), "-") for column in columns]
        lines.append(f"| `{method}` | {passes[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def append(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
