"""Readers of the datasets' own files: idx, CIFAR's pickled batches, GTSRB's folders, class folders of images.

Everything comes back as numpy arrays, 8-bit pixels as [N, H, W, C]. Whatever is truncated, corrupt or of another shape
is one BenchmarkError that names the file. Needs no torch.
"""

import csv
import gzip
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from class_names import class_folder_names
from data_places import CIFAR10_TEST, CIFAR10_TRAIN
from errors import BenchmarkError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".ppm", ".bmp", ".webp")
MEND = "fetch the file again, or restore it"
Kept = Callable[[str, list[Path], Callable[[], np.ndarray]], np.ndarray]


class ImageList(NamedTuple):
    """Image files of one part. paths: below folder, numpy bytes [N]; labels: int64 [N]; sizes: in bytes, int64 [N]."""

    folder: Path
    paths: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray


def read_image(path: str | Path) -> Image.Image:
    """The decoded RGB image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BenchmarkError(f"{path}: cannot be read as an image ({_reason(error)}); {MEND}") from error


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """A uint8 idx file, gzipped or not, as an array of `ndim` dimensions.

    Format: two zero bytes, 8 for unsigned bytes, the number of dimensions, each dimension as a big-endian int32, data
    (yann.lecun.com/exdb/mnist).
    """
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except Exception as error:  # OSError, EOFError, zlib.error
        raise BenchmarkError(f"{path}: cannot be read ({_reason(error)}); {MEND}") from error
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes([0, 0, 8, ndim]):
        raise BenchmarkError(f"{path}: not an idx file of {ndim}-dimensional unsigned bytes; {MEND}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">i4", count=ndim, offset=4))
    if min(shape) < 1 or len(data) - header != np.prod(shape, dtype=np.int64):
        raise BenchmarkError(f"{path}: {len(data) - header} bytes of data for the shape {list(shape)}; {MEND}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_idx_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, H, W, 1], labels int64 [N]) of two idx files that belong together."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise BenchmarkError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}")
    return images[..., None], labels.astype(np.int64)


def read_cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train images, train labels, test images, test labels of the pickled batches; images uint8 [N, 32, 32, 3]."""
    batches = [_read_cifar_batch(folder / name) for name in CIFAR10_TRAIN]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return images, labels, *_read_cifar_batch(folder / CIFAR10_TEST)


def _read_cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            # written by Python 2; latin1 maps its byte strings, array contents among them, one to one
            content = _ArrayUnpickler(file, encoding="latin1").load()
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        data, labels = content["data"], np.asarray(content["labels"], dtype=np.int64)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise BenchmarkError(f"{path}: not a readable CIFAR-10 batch ({_reason(error)}); {MEND}") from error
    is_pixels = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not is_pixels or labels.shape != (len(data),) or len(data) == 0:
        found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise BenchmarkError(
            f"{path}: data {found}, labels {list(labels.shape)}; a CIFAR-10 batch has uint8 data [N, 3072] and N labels"
        )
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, nothing else: a pickle from elsewhere can otherwise run any code."""

    # numpy 2 renamed numpy.core; files of either time are read
    _allowed = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0] for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str):
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _latin1_bytes
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, refused: a batch holds numpy arrays only")
        return self._allowed[module, name]


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


def read_gtsrb(
    train_folder: Path, test_folder: Path, test_csv: Path, image_size: int, kept: Kept | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train images, labels and tracks, test images and labels. Images squashed to [N, image_size, image_size, 3].

    kept: (part, its files, what decodes them) -> their images, from wherever they are kept decoded.
    tracks: int64 [N]; images of one track show the same physical sign, and none is shared between classes.
    """
    train_paths, train_labels, tracks = _list_gtsrb_train(train_folder)
    test_paths, test_labels = _list_gtsrb_test(test_folder, test_csv)
    images = []
    for part, paths in (("train", train_paths), ("test", test_paths)):
        decode = partial(_decode_all, paths, image_size, f"GTSRB {part}")
        images.append(decode() if kept is None else kept(part, paths, decode))
    return images[0], train_labels, tracks, images[1], test_labels


def _list_gtsrb_train(folder: Path) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Files <class>/<track>_<frame>.ppm in sorted order, the class of each, and its track."""
    paths, labels, tracks = [], [], []
    track_numbers: dict[tuple[str, str], int] = {}
    for name in class_folder_names(folder):
        if not re.fullmatch(r"\d+", name):
            raise BenchmarkError(f"{folder / name}: not a class folder; GTSRB's are named by class, 00000 to 00042")
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() == ".ppm")
        _check_gtsrb_list(folder / name / f"GT-{name}.csv", {path.name for path in files})
        for path in files:
            paths.append(path)
            labels.append(int(name))
            track = (name, path.stem.split("_")[0])
            tracks.append(track_numbers.setdefault(track, len(track_numbers)))
    if not paths:
        raise BenchmarkError(f"{folder}: no images; expected <class of 5 digits>/<track>_<frame>.ppm")
    return paths, np.array(labels, np.int64), np.array(tracks, np.int64)


def _check_gtsrb_list(csv_path: Path, present: set[str]) -> None:
    """A class folder's own list, when it is there, tells an unpacking that was cut short."""
    if csv_path.is_file():
        for name, _ in _read_gtsrb_csv(csv_path):
            if name not in present:
                raise BenchmarkError(f"{csv_path.parent / name}: missing, though listed in {csv_path.name}; {MEND}")


def _list_gtsrb_test(folder: Path, csv_path: Path) -> tuple[list[Path], np.ndarray]:
    rows = list(_read_gtsrb_csv(csv_path))
    if not rows:
        raise BenchmarkError(f"{csv_path}: lists no images; {MEND}")
    return [folder / name for name, _ in rows], np.array([label for _, label in rows], np.int64)


def _read_gtsrb_csv(path: Path) -> Iterator[tuple[str, int]]:
    """(Filename, ClassId) of the rows of a table separated by semicolons."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter=";", skipinitialspace=True):
                yield row["Filename"], int(row["ClassId"])
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise BenchmarkError(
            f"{path}: cannot be read ({_reason(error)}); expected columns Filename;...;ClassId separated by semicolons"
        ) from error


def _decode_all(paths: list[Path], image_size: int, description: str) -> np.ndarray:
    images = np.empty((len(paths), image_size, image_size, 3), np.uint8)
    for image, path in zip(images, tqdm(paths, description, unit="img", leave=False, disable=None), strict=True):
        image[:] = read_image(path).resize((image_size, image_size), Image.Resampling.BILINEAR)
    return images


def list_class_folders(folder: Path, class_folders: tuple[str, ...]) -> ImageList:
    """The images below folder/<class folder>/, sorted, labelled by their class folder's position; none is opened."""
    paths, labels, sizes = [], [], []
    for label, name in enumerate(class_folders):
        try:
            for entry in sorted(os.scandir(folder / name), key=lambda entry: entry.name):
                if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith("."):
                    paths.append(os.fsencode(f"{name}/{entry.name}"))
                    labels.append(label)
                    sizes.append(entry.stat().st_size)
        except OSError as error:
            raise BenchmarkError(f"{folder / name}: class folder cannot be listed ({_reason(error)})") from error
    if not paths:
        raise BenchmarkError(f"{folder}: no images in its {len(class_folders)} class folders")
    return ImageList(folder, np.array(paths, np.bytes_), np.array(labels, np.int64), np.array(sizes, np.int64))


def download(name: str, root: Path) -> None:
    """Fetch a dataset into `root` through torchvision. Raises BenchmarkError whatever fails.

    It is unpacked beside its final place and moved there whole: an interruption leaves nothing that looks complete.
    """
    try:
        from torchvision import datasets  # deferred, because it loads torch

        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
            if name == "cifar10":
                datasets.CIFAR10(folder, download=True)
            elif name == "fashion_mnist":
                datasets.FashionMNIST(folder, download=True)
            elif name == "gtsrb":
                for split in ("train", "test"):
                    datasets.GTSRB(folder, split=split, download=True)
            elif name == "imagenette":
                datasets.Imagenette(folder, size="320px", download=True)
            else:
                raise ValueError("there is no public address to fetch it from")
            for path in sorted(Path(folder).iterdir()):
                path.replace(root / path.name)
    except Exception as error:  # network, disk, checksum, an address that has gone
        raise BenchmarkError(
            f"dataset.download: {name} could not be fetched into {root} ({_reason(error)}); "
            "try again, or put the files there by hand"
        ) from error


def _reason(error: Exception) -> str:
    """The error's own words without the path, which the message gives already; its type when it has none."""
    if isinstance(error, UnidentifiedImageError):
        return "in no format known"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
