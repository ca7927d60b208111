"""The datasets, one `DataLoaderFactory` each: what they are called, where their files are, how they are read.

A new dataset is one subclass here, listed in FACTORIES, and one YAML in config/dataset/.
"""

import difflib
import hashlib
import logging
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from batch_loaders import BatchLoader, FolderLoader, TensorLoader
from class_names import IMAGENETTE_WNIDS, class_folder_names
from data_factory import DataLoaderFactory, Loaders, Source, SubsetLoaders
from data_files import (
    CIFAR10_TEST,
    CIFAR10_TRAIN,
    ImageList,
    list_class_folders,
    read_cifar10,
    read_gtsrb,
    read_idx_pair,
)
from errors import BenchmarkError, ConfigError
from settings import CONFIG_DIR
from splits import stratified_split

__all__ = [
    "BatchLoader", "DataLoaderFactory", "FACTORIES", "FolderLoader", "Loaders", "SubsetLoaders", "TensorLoader",
    "get_data_factory",
]  # fmt: skip

log = logging.getLogger(__name__)

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those of torchvision's ImageNet weights


class TensorFactory(DataLoaderFactory):
    """A dataset of small images, held as uint8 tensors on the device."""

    @abstractmethod
    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Train images uint8 [N, H, W, C], train labels [N], test images, test labels, groups of the train images."""

    def _open(self) -> Source:
        train_images, train_labels, test_images, test_labels, groups = self._read()
        size = self.settings.dataset.image_size
        self._images = {
            # order="C": channels last in memory, which is what the loaders read and share
            source: resize(torch.from_numpy(np.array(images, order="C")).permute(0, 3, 1, 2), size).to(self.device)
            for source, images in (("train", train_images), ("test", test_images))
        }
        tensors = [None if array is None else torch.from_numpy(array) for array in (train_labels, test_labels, groups)]
        return Source(*tensors)

    def _loader(self, source: str, rows: Tensor, labels: Tensor, **options: Any) -> BatchLoader:
        return TensorLoader(self._images[source], labels, rows=rows, flip=self.flip, **options)

    def _hash(self, digest: "hashlib._Hash", source: str, rows: Tensor) -> None:
        pixels = self._images[source].permute(0, 2, 3, 1)
        for chunk in rows.split(4096):
            digest.update(pixels[chunk.to(self.device)].cpu().numpy())


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, W] -> uint8 [N, C, size, size], bilinear (antialiased when smaller), channels_last."""
    if images.shape[2:] == (size, size):
        return images
    resized = []
    for chunk in images.split(1024):
        chunk = torch.nn.functional.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
        resized.append(chunk.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(resized).contiguous(memory_format=torch.channels_last)


class DigitsFactory(TensorFactory):
    """1,797 handwritten digits, 8x8 with 17 grey levels, that come with scikit-learn; one channel, shown three times.

    They have no test set of their own: a fixed, stratified fifth is it, whatever `seed` says.
    """

    title = "scikit-learn's digits"
    mean, std = (0.3054,) * 3, (0.3237,) * 3  # over the training images (validation included) at 32x32
    flip = False

    def _read(self):
        from sklearn.datasets import load_digits  # deferred, because it takes a second that other datasets need not pay

        bunch = load_digits()
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
        labels = bunch.target.astype(np.int64)
        train, test = (rows.numpy() for rows in stratified_split(torch.from_numpy(labels), 0.2, 0, "digits test"))
        return images[train], labels[train], images[test], labels[test], None


class FashionMnistFactory(TensorFactory):
    """60,000 + 10,000 garments, 28x28 grey, padded with black to 32x32; one channel, shown three times."""

    title = "Fashion-MNIST"
    layout = "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz], or these files in the folder itself"
    remedy = (
        f"{DataLoaderFactory.remedy}; dataset.root={DEBIAN_FASHION_MNIST} reads those of the Debian package "
        "dataset-fashion-mnist"
    )
    mean, std = (0.2860,) * 3, (0.3530,) * 3  # over the pixels of the 60,000 training images before the padding

    def _locate(self) -> list[Path] | None:
        names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        folders = [self.root / "FashionMNIST" / "raw", self.root]
        if self.settings.dataset.root == _default_root("fashion_mnist"):  # a folder that the user named has no stand-in
            folders.append(DEBIAN_FASHION_MNIST)
        for folder in folders:
            either = [[folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz"] for name in names]
            found = [next((path for path in paths if path.is_file()), None) for paths in either]
            if None not in found:
                log.info("%s: read from %s", self.title, folder)
                return found
        return None

    def _read(self):
        files = self._find()
        arrays = [*read_idx_pair(*files[:2]), *read_idx_pair(*files[2:])]
        for path, images in ((files[0], arrays[0]), (files[2], arrays[2])):
            if images.shape[1:] != (28, 28, 1):
                raise BenchmarkError(f"{path}: images [N, H, W, 1] {list(images.shape)}; Fashion-MNIST's are 28x28")
        arrays[0], arrays[2] = (np.pad(arrays[i], ((0, 0), (2, 2), (2, 2), (0, 0))) for i in (0, 2))
        return *arrays, None


def _default_root(name: str) -> str | None:
    """dataset.root as the dataset's own YAML has it: what is set when the user asks for no other folder."""
    return OmegaConf.load(CONFIG_DIR / "dataset" / f"{name}.yaml").root


class Cifar10Factory(TensorFactory):
    """50,000 + 10,000 photographs, 32x32 colour, in the pickled batches of the Python version."""

    title = "CIFAR-10"
    layout = "cifar-10-batches-py/{data_batch_1 to data_batch_5, test_batch}"
    # Over all pixels of the 50,000 training images. (0.2023, 0.1994, 0.2010), often seen, averages the images' own std.
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def _locate(self) -> Path | None:
        folder = self.root / "cifar-10-batches-py"
        return folder if all((folder / name).is_file() for name in (*CIFAR10_TRAIN, CIFAR10_TEST)) else None

    def _read(self):
        return *read_cifar10(self._find()), None


class GtsrbFactory(TensorFactory):
    """German traffic signs of 15 to 250 pixels, squashed to squares. A track, some 30 frames of the same physical sign,
    lies in train or in validation as a whole: its frames are nearly the same image."""

    title = "GTSRB"
    layout = (
        "gtsrb/GTSRB/Training/<class of 5 digits>/<track>_<frame>.ppm, gtsrb/GTSRB/Final_Test/Images/*.ppm and "
        "gtsrb/GT-final_test.csv"
    )
    # Training images at 32x32, as computed by github.com/poojahira/gtsrb-pytorch (data.py)
    mean, std = (0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629)
    flip = False  # a mirrored "keep right" is a "keep left"

    def _locate(self) -> tuple[Path, Path, Path] | None:
        base = self.root / "gtsrb"
        test_folder, test_csv = base / "GTSRB" / "Final_Test" / "Images", base / "GT-final_test.csv"
        for train_folder in (base / "GTSRB" / "Training", base / "GTSRB" / "Final_Training" / "Images"):
            if train_folder.is_dir() and test_folder.is_dir() and test_csv.is_file():
                return train_folder, test_folder, test_csv
        return None

    def _read(self):
        train_images, train_labels, tracks, test_images, test_labels = read_gtsrb(
            *self._find(), self.settings.dataset.image_size
        )
        return train_images, train_labels, test_images, test_labels, tracks


class ImageNetFactory(DataLoaderFactory):
    """Class folders of image files, decoded while the model works. A class is its folder's position in sorted order.

    The test images are those of val/, the only ones with public labels.
    """

    title = "ImageNet"
    layout = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, one folder a class"
    remedy = "set dataset.root=<folder>; its terms of use forbid to fetch it automatically (image-net.org/download.php)"
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def _candidates(self) -> list[Path]:
        return [self.root]

    def _locate(self) -> Path | None:
        for folder in self._candidates():
            if class_folder_names(folder / "train") and class_folder_names(folder / "val"):
                return folder
        return None

    def _open(self) -> Source:
        folder = self._find()
        names = class_folder_names(folder / "train")
        self._check_folders(folder, names)
        self._lists: dict[str, ImageList] = {
            "train": list_class_folders(folder / "train", names),
            "test": list_class_folders(folder / "val", names),
        }
        return Source(*(torch.from_numpy(self._lists[source].labels) for source in ("train", "test")))

    def _check_folders(self, folder: Path, names: tuple[str, ...]) -> None:
        wanted = self.settings.dataset.num_classes
        if len(names) != wanted:
            raise BenchmarkError(f"dataset.num_classes: {wanted}; {folder / 'train'} has {len(names)} class folders")
        differing = sorted(set(names) ^ set(class_folder_names(folder / "val")))
        if differing:
            raise BenchmarkError(f"{folder}: class folder {differing[0]} is not both in train and in val")

    def _loader(self, source: str, rows: Tensor, labels: Tensor, **options: Any) -> BatchLoader:
        files, dataset = self._lists[source], self.settings.dataset
        return FolderLoader(
            files.folder,
            files.paths[rows.numpy()],
            labels,
            image_size=dataset.image_size,
            num_workers=dataset.num_workers,
            **options,
        )

    def _hash(self, digest: "hashlib._Hash", source: str, rows: Tensor) -> None:
        files = self._lists[source]
        digest.update(b"\n".join(files.paths[rows.numpy()].tolist()))
        digest.update(files.sizes[rows.numpy()].tobytes())


class ImagenetteFactory(ImageNetFactory):
    """Ten easy classes of ImageNet (github.com/fastai/imagenette), in ImageNet's layout."""

    title = "Imagenette"
    layout = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, in the folder itself or in its imagenette2, -320 or -160"
    remedy = DataLoaderFactory.remedy

    def _candidates(self) -> list[Path]:
        return [self.root, *(self.root / f"imagenette2{size}" for size in ("", "-320", "-160"))]

    def _check_folders(self, folder: Path, names: tuple[str, ...]) -> None:
        super()._check_folders(folder, names)
        if names != IMAGENETTE_WNIDS:
            raise BenchmarkError(f"{folder / 'train'}: class folders {', '.join(names)}; not those of Imagenette")


FACTORIES: dict[str, type[DataLoaderFactory]] = {
    "digits": DigitsFactory,
    "fashion_mnist": FashionMnistFactory,
    "cifar10": Cifar10Factory,
    "gtsrb": GtsrbFactory,
    "imagenet": ImageNetFactory,
    "imagenette": ImagenetteFactory,
}


def get_data_factory(settings: Any, device: torch.device | str) -> DataLoaderFactory:
    """The factory of `settings.dataset.name`, the dataset found and read. Raises BenchmarkError."""
    name = settings.dataset.name
    if name not in FACTORIES:
        nearest = difflib.get_close_matches(name, FACTORIES, n=1)
        raise ConfigError(f"dataset.name: {name}; valid: {', '.join(nearest or FACTORIES)}")
    return FACTORIES[name](settings, device)
