"""What `metrics.evaluate` costs beside a bare inference pass over the same batches: 1.15 times at most is the aim.

    python -m benchmarks.evaluation [--images 300] [--repeats 9] [--threads N]

The two passes alternate, the first of each pair changing in turn, so that a machine that grows busier or warmer slows
both. The ratio is taken within each pair; its median and quartiles are printed, the exit code is 1 above the limit.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torchvision.models import resnet18, vgg16

from metrics import evaluate

LIMIT = 1.15
CLASSES = 10
CPU = torch.device("cpu")
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def make_batches(images: int, batch_size: int, layout: torch.memory_format) -> Batches:
    """Random images [B, 3, 32, 32] in this memory layout, with labels; the last batch is as short as it comes out."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 32, 32, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    cut = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
    return [(part.contiguous(memory_format=layout), answer) for part, answer in cut]


def bare_pass(model: nn.Module, batches: Batches) -> None:
    """The least that an evaluation must do: the forward passes."""
    with torch.inference_mode():
        for images, _ in batches:
            model(images)


def paired_seconds(first: Callable, second: Callable, repeats: int) -> list[tuple[float, float]]:
    """Seconds of both calls, `repeats` times in alternating order after one untimed call of each."""
    first(), second()
    pairs = []
    for repeat in range(repeats):
        seconds = {}
        for call in (first, second) if repeat % 2 == 0 else (second, first):
            start = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - start
        pairs.append((seconds[first], seconds[second]))
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = f"{options.images} images at 32x32, batches of {options.batch_size}, {options.threads} threads"
    print(f"{setting}, torch {torch.__version__}, {options.repeats} pairs; ratio: median (quartiles)")
    slowest = 0.0
    for build in (resnet18, vgg16):
        torch.manual_seed(0)
        model = build(weights=None, num_classes=CLASSES).eval().to(memory_format=torch.channels_last)
        for layout in (torch.channels_last, torch.contiguous_format):
            batches = make_batches(options.images, options.batch_size, layout)
            pairs = paired_seconds(
                lambda model=model, batches=batches: bare_pass(model, batches),
                lambda model=model, batches=batches: evaluate(model, batches, CLASSES, CPU),
                options.repeats,
            )
            low, middle, high = statistics.quantiles([ours / bare for bare, ours in pairs], n=4, method="inclusive")
            slowest = max(slowest, middle)
            bare, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            name = f"{build.__name__}, batches {str(layout).removeprefix('torch.')}"
            print(f"{name:36} bare {bare:.3f} s  evaluate {ours:.3f} s  ratio {middle:.3f} ({low:.3f} to {high:.3f})")
    print(f"slowest {slowest:.3f}, limit {LIMIT}")
    return int(slowest > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
