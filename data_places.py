"""Where the datasets' files lie: what is expected below `dataset.root`, found without torch, before any is read."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from class_names import class_folder_names
from errors import BenchmarkError
from settings import CONFIG_DIR

log = logging.getLogger(__name__)

CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10_TEST = "test_batch"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts it
REMEDY = "set dataset.root=<folder>, or dataset.download=true to fetch it"


@dataclass(frozen=True)
class Place:
    """title: the dataset's proper name. layout: the files expected below the root. find: what the dataset's factory
    reads, given the settings' dataset part, or None when the files are not all there."""

    title: str
    layout: str
    find: Callable[[Any], Any]
    remedy: str = REMEDY

    def locate(self, dataset: Any) -> Any:
        """What `find` finds. Raises BenchmarkError when that is nothing."""
        found = self.find(dataset)
        if found is None:
            raise BenchmarkError(
                f"dataset.root: {root_of(dataset)}; no {self.title} there, expected {self.layout}; {self.remedy}"
            )
        return found


def require_dataset(dataset: Any) -> None:
    """Raises BenchmarkError when the dataset's files are missing and are not to be fetched."""
    if dataset.name in PLACES and not dataset.download:
        PLACES[dataset.name].locate(dataset)


def root_of(dataset: Any) -> Path:
    return Path(dataset.root or ".").expanduser()


def _cifar10(dataset: Any) -> Path | None:
    folder = root_of(dataset) / "cifar-10-batches-py"
    return folder if all((folder / name).is_file() for name in (*CIFAR10_TRAIN, CIFAR10_TEST)) else None


def _fashion_mnist(dataset: Any) -> list[Path] | None:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    folders = [root_of(dataset) / "FashionMNIST" / "raw", root_of(dataset)]
    if dataset.root == _default_root("fashion_mnist"):  # a folder that the user named has no stand-in
        folders.append(DEBIAN_FASHION_MNIST)
    for folder in folders:
        either = [[folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz"] for name in names]
        found = [next((path for path in paths if path.is_file()), None) for paths in either]
        if None not in found:
            return found
    return None


@functools.cache
def _default_root(name: str) -> str | None:
    """dataset.root as the dataset's own YAML has it: what is set when the user asks for no other folder."""
    return OmegaConf.load(CONFIG_DIR / "dataset" / f"{name}.yaml").root


def _gtsrb(dataset: Any) -> tuple[Path, Path, Path] | None:
    base = root_of(dataset) / "gtsrb"
    test_folder, test_csv = base / "GTSRB" / "Final_Test" / "Images", base / "GT-final_test.csv"
    for train_folder in (base / "GTSRB" / "Training", base / "GTSRB" / "Final_Training" / "Images"):
        if train_folder.is_dir() and test_folder.is_dir() and test_csv.is_file():
            return train_folder, test_folder, test_csv
    return None


def _class_folders(*below_root: str) -> Callable[[Any], Path | None]:
    """Finds the first of these folders that has class folders in train/ and in val/."""

    def find(dataset: Any) -> Path | None:
        for folder in (root_of(dataset) / name for name in below_root):
            if class_folder_names(folder / "train") and class_folder_names(folder / "val"):
                return folder
        return None

    return find


PLACES = {
    "cifar10": Place(
        "CIFAR-10", f"cifar-10-batches-py/{{{CIFAR10_TRAIN[0]} to {CIFAR10_TRAIN[-1]}, {CIFAR10_TEST}}}", _cifar10
    ),
    "fashion_mnist": Place(
        "Fashion-MNIST",
        "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz], or these files in the folder itself",
        _fashion_mnist,
        f"{REMEDY}; dataset.root={DEBIAN_FASHION_MNIST} reads those of the Debian package dataset-fashion-mnist",
    ),
    "gtsrb": Place(
        "GTSRB",
        "gtsrb/GTSRB/Training/<class of 5 digits>/<track>_<frame>.ppm, gtsrb/GTSRB/Final_Test/Images/*.ppm and "
        "gtsrb/GT-final_test.csv",
        _gtsrb,
    ),
    "imagenet": Place(
        "ImageNet",
        "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, one folder a class",
        _class_folders("."),
        "set dataset.root=<folder>; its terms of use forbid to fetch it automatically (image-net.org/download.php)",
    ),
    "imagenette": Place(
        "Imagenette",
        "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, in the folder itself or in its imagenette2, -320 or -160",
        _class_folders(".", *(f"imagenette2{size}" for size in ("", "-320", "-160"))),
    ),
}
