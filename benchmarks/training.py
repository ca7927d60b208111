"""What an epoch through `training.train_epoch` costs beside a bare loop: 1.05 times at most is the aim.

    python -m benchmarks.training [--models resnet18 vgg16] [--images 128] [--repeats 15] [--threads N]

Ours loads from a `TensorLoader` (uint8 in memory, normalised a batch at a time), follows a learning-rate schedule,
draws the progress bar, and counts loss and accuracy. The bare loop does forward, backward and step over the same
batches, already float tensors in memory, in the same memory layout and with the same optimizer. The two alternate, the
first of each pair changing in turn; the ratio is taken within each pair. Its median and quartiles are printed, the exit
code is 1 above the limit. Cores shared with other work need `--threads 1`: threads that wait for each other time that.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from batch_loaders import TensorLoader
from benchmarks.evaluation import paired_seconds
from models import ARCHITECTURES, get_model
from training import OPTIMIZERS, FitPlan, make_optimizer, rate_factor, train_epoch

LIMIT = 1.05
CLASSES = 10
CPU = torch.device("cpu")


def make_loader(images: int, batch_size: int, augment: bool) -> TensorLoader:
    """Random pixels in the form that the small-image datasets have in memory: uint8 [N, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    sampling = {"batch_size": batch_size, "shuffle": True, "augment": augment, "seed": 0, "name": "benchmark"}
    return TensorLoader(pixels, labels, mean=(0.5,) * 3, std=(0.25,) * 3, device=CPU, **sampling)


def bare_epoch(model: nn.Module, loader: TensorLoader, plan: FitPlan) -> Callable[[], None]:
    """The least that an epoch must do."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model, plan)
    batches = [(images.contiguous(memory_format=torch.channels_last), labels) for images, labels in loader]

    def epoch() -> None:
        for images, labels in batches:
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(model(images), labels).backward()
            optimizer.step()

    return epoch


def our_epoch(model: nn.Module, loader: TensorLoader, plan: FitPlan) -> Callable[[], None]:
    """The epoch as `fit` runs it."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, plan)

    def rate(step: int) -> float:
        return plan.lr * rate_factor(plan.scheduler, step / len(loader))

    def epoch() -> None:
        with tqdm(total=len(loader), mininterval=0.2, leave=False) as bar:
            tally = train_epoch(model, loader, optimizer, device=CPU, rate=rate, progress=bar)
            bar.set_description(f"loss {tally.loss:.4f}, accuracy {tally.accuracy:.4f}")

    return epoch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=["resnet18"])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--augment", action="store_true", help="crop and flip; free for the bare loop")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = f"{options.images} images at 32x32, batches of {options.batch_size}, {options.threads} threads"
    print(f"{setting}, torch {torch.__version__}, {options.repeats} pairs; ratio: median (quartiles)", flush=True)
    plan = FitPlan(1, 1e-4, 5e-4, options.optimizer, momentum=0.9, scheduler="cosine", patience=None)
    slowest = 0.0
    for name in options.models:
        model = get_model(name, CLASSES)
        loader = make_loader(options.images, options.batch_size, options.augment)
        epochs = bare_epoch(model, loader, plan), our_epoch(model, loader, plan)
        pairs = paired_seconds(*epochs, options.repeats)
        low, middle, high = statistics.quantiles([ours / bare for bare, ours in pairs], n=4, method="inclusive")
        slowest = max(slowest, middle)
        bare, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        seconds = f"bare {bare:.3f} s  train_epoch {ours:.3f} s"
        print(f"{name:14} {seconds}  ratio {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)
    print(f"slowest {slowest:.3f}, limit {LIMIT}")
    return int(slowest > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
