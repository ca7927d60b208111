"""What our removal costs beside a step of torch-pruning's own magnitude pruner, from a dense network to a pruned one.

    python -m benchmarks.removal [--models resnet50 vgg16] [--ratio 0.5] [--size 64] [--repeats 7] [--threads N]

Ours: `StructurePruner.prune` on a whole selection, the copy of the network and the proof against masking included.
The library's: a copy, its pruner with its graph, and one step at the same ratio. For one ratio ours builds its graph
anew in every repeat as well; for 11 ratios it is built once, while the library needs a pruner for every network. Both
prune layers on a residual stream together. The two alternate, the first of each pair changing in turn; the median of
the ratio and its quartiles are printed, the exit code is 1 above 1.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
import torch_pruning
from torch import nn
from torchvision import models

from benchmarks.evaluation import paired_seconds
from filter_selection import get_criterion
from filter_selection.base import FilterIndices
from pruner import StructurePruner
from selection import PruningSelection
from structure import ModelGraph

LIMIT = 1.0
CLASSES = 10
RATIOS = tuple(step / 12 for step in range(1, 12))


def library_steps(model: nn.Module, example: torch.Tensor, ratios: Sequence[float]) -> Callable[[], None]:
    def run() -> None:
        for ratio in ratios:
            copied = copy.deepcopy(model)
            head = [layer for layer in copied.modules() if isinstance(layer, nn.Linear)][-1]
            importance = torch_pruning.importance.MagnitudeImportance()
            torch_pruning.pruner.MagnitudePruner(
                copied, example, importance, pruning_ratio=ratio, ignored_layers=[head]
            ).step()

    return run


def our_removals(model: nn.Module, selections: Sequence[FilterIndices], shape: tuple) -> Callable[[], None]:
    def run() -> None:
        pruner = StructurePruner(ModelGraph(model, shape, "coupled"))
        for indices in selections:
            pruner.prune(indices)

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet50", "vgg16"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = (3, options.size, options.size)
    worst = 0.0
    for name in options.models:
        torch.manual_seed(0)
        model = getattr(models, name)(weights=None, num_classes=CLASSES).eval()
        graph = ModelGraph(model, shape, "coupled")
        for ratios in ((options.ratio,), RATIOS):
            selections = list(PruningSelection(get_criterion("ln_structured"), ratios, shape).select(graph).values())
            theirs = library_steps(model, torch.zeros(1, *shape), ratios)
            pairs = paired_seconds(theirs, our_removals(model, selections, shape), options.repeats)
            quotients = [ours / library for library, ours in pairs]
            low, middle, high = statistics.quantiles(quotients, n=4, method="inclusive")
            seconds = statistics.median(ours for _, ours in pairs)
            print(
                f"{name:10} {len(ratios):2} ratios: {middle:.3f} of the library's step ({low:.3f} to {high:.3f}), "
                f"{seconds:.2f} s",
                flush=True,
            )
            worst = max(worst, middle)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
