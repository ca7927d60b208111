"""What a pass over image files costs beside torchvision's own folder and PyTorch's own loader: 1.1 times at most is the
aim; and what it saves to keep the processes that decode from one pass to the next.

    python -m benchmarks.loading [--images 256] [--size 224] [--workers 2] [--batch-size 64] [--repeats 7]

Ours decodes JPEG files of 500x375 pixels with `FolderLoader` and normalises batches. The peer is `ImageFolder` with the
same transforms in a `DataLoader` with persistent workers, normalised alike. The two alternate, the first of each pair
changing in turn; the ratio is taken within each pair. Its median and quartiles are printed, the exit code is 1 above
the limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from batch_loaders import RESIZE_OVER_CROP, Decoders, FolderLoader
from benchmarks.evaluation import paired_seconds
from data_files import list_class_folders

LIMIT = 1.1
CPU, MEAN, STD = torch.device("cpu"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = ("n01440764", "n02102040")


def write_images(folder: Path, count: int) -> None:
    """Smooth random photographs, which compress about as much as real ones do."""
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8))
        path = folder / CLASSES[index % len(CLASSES)] / f"{index}.JPEG"
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def our_loader(folder: Path, options: argparse.Namespace) -> FolderLoader:
    files = list_class_folders(folder, CLASSES)
    return FolderLoader(
        files.folder, files.paths, torch.from_numpy(files.labels), mean=MEAN, std=STD, batch_size=options.batch_size,
        shuffle=False, augment=False, seed=0, name="benchmark", device=CPU,
        decoders=Decoders(options.size, options.workers, CPU),
    )  # fmt: skip


def peer_loader(folder: Path, options: argparse.Namespace) -> DataLoader:
    steps = [transforms.Resize(round(options.size * RESIZE_OVER_CROP)), transforms.CenterCrop(options.size)]
    images = ImageFolder(str(folder), transforms.Compose([*steps, transforms.PILToTensor()]))
    return DataLoader(images, options.batch_size, num_workers=options.workers, persistent_workers=options.workers > 0)


def peer_pass(loader: DataLoader) -> Callable[[], None]:
    scale, shift = 1 / (255 * torch.tensor(STD)), -torch.tensor(MEAN) / torch.tensor(STD)

    def run() -> None:
        for images, _ in loader:
            torch.addcmul(shift[:, None, None], images.float(), scale[:, None, None])

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"{options.images} images to {options.size}x{options.size}, {options.workers} processes; median (quartiles)")
    with tempfile.TemporaryDirectory() as place:
        write_images(Path(place), options.images)
        ours, folder = our_loader(Path(place), options), Path(place)

        def kept() -> None:
            for _ in ours:
                pass

        def anew() -> None:
            for _ in our_loader(folder, options):
                pass

        middles = []
        for name, beside in (("of the peer's time", peer_pass(peer_loader(folder, options))), ("of new ones'", anew)):
            pairs = paired_seconds(beside, kept, options.repeats)
            low, middle, high = statistics.quantiles([mine / other for other, mine in pairs], n=4, method="inclusive")
            seconds = statistics.median(mine for _, mine in pairs)
            print(f"kept processes: {middle:.3f} ({low:.3f} to {high:.3f}) {name}, {seconds:.2f} s a pass", flush=True)
            middles.append(middle)
    print(f"{middles[0]:.3f} of the peer's, limit {LIMIT}")
    return int(middles[0] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
