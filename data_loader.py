"""The datasets, one `DataLoaderFactory` each: how their files are read and their images normalised.

A new dataset is one subclass here, listed in FACTORIES, one YAML in config/dataset/ and, when its files can be missing,
one entry in data_places.py.
"""

import difflib
import hashlib
import logging
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from batch_loaders import BatchLoader, Decoders, FolderLoader, TensorLoader
from class_names import IMAGENETTE_WNIDS, class_folder_names
from data_factory import DataLoaderFactory, Loaders, Source, SubsetLoaders
from data_files import ImageList, list_class_folders, read_cifar10, read_gtsrb, read_idx_pair
from data_places import PLACES
from decoded import decoded_once
from errors import BenchmarkError, ConfigError
from splits import stratified_split

__all__ = [
    "BatchLoader", "DataLoaderFactory", "FACTORIES", "FolderLoader", "Loaders", "SubsetLoaders", "TensorLoader",
    "get_data_factory",
]  # fmt: skip

log = logging.getLogger(__name__)

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

    place = PLACES["fashion_mnist"]
    title = place.title
    mean, std = (0.2860,) * 3, (0.3530,) * 3  # over the pixels of the 60,000 training images before the padding

    def _read(self):
        files = self._find()
        log.info("%s: read from %s", self.title, files[0].parent)
        arrays = [*read_idx_pair(*files[:2]), *read_idx_pair(*files[2:])]
        for path, images in ((files[0], arrays[0]), (files[2], arrays[2])):
            if images.shape[1:] != (28, 28, 1):
                raise BenchmarkError(f"{path}: images [N, H, W, 1] {list(images.shape)}; Fashion-MNIST's are 28x28")
        arrays[0], arrays[2] = (np.pad(arrays[i], ((0, 0), (2, 2), (2, 2), (0, 0))) for i in (0, 2))
        return *arrays, None


class Cifar10Factory(TensorFactory):
    """50,000 + 10,000 photographs, 32x32 colour, in the pickled batches of the Python version."""

    place = PLACES["cifar10"]
    title = place.title
    # Over all pixels of the 50,000 training images. (0.2023, 0.1994, 0.2010), often seen, averages the images' own std.
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def _read(self):
        return *read_cifar10(self._find()), None


class GtsrbFactory(TensorFactory):
    """German traffic signs of 15 to 250 pixels, squashed to squares. A track, some 30 frames of the same physical sign,
    lies in train or in validation as a whole: its frames are nearly the same image."""

    place = PLACES["gtsrb"]
    title = place.title
    # Training images at 32x32, as computed by github.com/poojahira/gtsrb-pytorch (data.py)
    mean, std = (0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629)
    flip = False  # a mirrored "keep right" is a "keep left"

    def _read(self):
        size, cache_dir = self.settings.dataset.image_size, self.settings.cache_dir

        def kept(part: str, paths: list[Path], decode: Callable[[], np.ndarray]) -> np.ndarray:
            return decoded_once(paths, size, decode, cache_dir=cache_dir, name=f"gtsrb-{part}")

        train_images, train_labels, tracks, test_images, test_labels = read_gtsrb(*self._find(), size, kept)
        return train_images, train_labels, test_images, test_labels, tracks


class ImageNetFactory(DataLoaderFactory):
    """Class folders of image files, decoded while the model works. A class is its folder's position in sorted order.

    The test images are those of val/, the only ones with public labels.
    """

    place = PLACES["imagenet"]
    title = place.title
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def _open(self) -> Source:
        folder = self._find()
        names = class_folder_names(folder / "train")
        self._check_folders(folder, names)
        self._lists: dict[str, ImageList] = {
            "train": list_class_folders(folder / "train", names),
            "test": list_class_folders(folder / "val", names),
        }
        dataset = self.settings.dataset
        self._decoders = Decoders(dataset.image_size, dataset.num_workers, self.device)  # one for all loaders
        return Source(*(torch.from_numpy(self._lists[source].labels) for source in ("train", "test")))

    def _check_folders(self, folder: Path, names: tuple[str, ...]) -> None:
        wanted = self.settings.dataset.num_classes
        if len(names) != wanted:
            raise BenchmarkError(f"dataset.num_classes: {wanted}; {folder / 'train'} has {len(names)} class folders")
        differing = sorted(set(names) ^ set(class_folder_names(folder / "val")))
        if differing:
            raise BenchmarkError(f"{folder}: class folder {differing[0]} is not both in train and in val")

    def _loader(self, source: str, rows: Tensor, labels: Tensor, **options: Any) -> BatchLoader:
        files = self._lists[source]
        return FolderLoader(files.folder, files.paths[rows.numpy()], labels, decoders=self._decoders, **options)

    def _hash(self, digest: "hashlib._Hash", source: str, rows: Tensor) -> None:
        files = self._lists[source]
        digest.update(PIL.__version__.encode())  # which decodes them
        digest.update(b"\n".join(files.paths[rows.numpy()].tolist()))
        digest.update(files.sizes[rows.numpy()].tobytes())


class ImagenetteFactory(ImageNetFactory):
    """Ten easy classes of ImageNet (github.com/fastai/imagenette), in ImageNet's layout."""

    place = PLACES["imagenette"]
    title = place.title

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
