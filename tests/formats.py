"""Small data in each dataset's true on-disk format, for any test that needs files.

Each image is dark noise with a bright square whose place tells the class, so that a small model can learn it.
Every function writes what a `dataset.root` of tests needs, and returns that root.
"""

import csv
import gzip
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

IMAGENETTE_WNIDS = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413",
    "n03445777", "n03888257",
)  # fmt: skip


def class_image(label: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [height, width, 3]: the square stands in cell `label` of a grid of 7x7."""
    image = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
    row, column = divmod(label % 49, 7)
    image[row * height // 7 : (row + 1) * height // 7, column * width // 7 : (column + 1) * width // 7] += 150
    return image


def _labelled_images(labels: Sequence[int], size: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([class_image(label, size, size, rng) for label in labels])


def _shuffled_labels(num_classes: int, per_class: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.repeat(np.arange(num_classes), per_class))


def write_fashion_mnist(
    root: Path, images_per_class: int = 10, seed: int = 0, *, test_images_per_class: int = 3, gzipped: bool = False
) -> Path:
    """The four idx files in root/FashionMNIST/raw/, as torchvision leaves them."""
    rng, folder = np.random.default_rng(seed), Path(root) / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, per_class in (("train", images_per_class), ("t10k", test_images_per_class)):
        labels = _shuffled_labels(10, per_class, rng)
        write_idx(folder / f"{part}-images-idx3-ubyte", _labelled_images(labels, 28, rng)[..., 0], gzipped)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels.astype(np.uint8), gzipped)
    return Path(root)


def write_idx(path: Path, array: np.ndarray, gzipped: bool = False) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    if gzipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


class Python2Pickler(pickle._Pickler):
    """Writes texts and bytes as Python 2 wrote its `str`: the opcodes in the published CIFAR-10 files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        value = value.encode("ascii") if isinstance(value, str) else value
        if len(value) < 256:
            self.write(b"U" + bytes([len(value)]) + value)  # SHORT_BINSTRING
        else:
            self.write(b"T" + struct.pack("<i", len(value)) + value)  # BINSTRING
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def write_cifar10(root: Path, images_per_class: int = 10, seed: int = 0, *, test_images_per_class: int = 4) -> Path:
    """root/cifar-10-batches-py/: five training batches of together `images_per_class`, test_batch, batches.meta."""
    rng, folder = np.random.default_rng(seed), Path(root) / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    labels = _shuffled_labels(10, images_per_class, rng)
    for number, part in enumerate(np.array_split(labels, 5), start=1):
        write_cifar_batch(folder / f"data_batch_{number}", part, f"training batch {number} of 5", rng)
    labels = _shuffled_labels(10, test_images_per_class, rng)
    write_cifar_batch(folder / "test_batch", labels, "testing batch 1 of 1", rng)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    dump_python2(folder / "batches.meta", {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072})
    return Path(root)


def write_cifar_batch(path: Path, labels: np.ndarray, title: str, rng: np.random.Generator) -> None:
    data = _labelled_images(labels, 32, rng).transpose(0, 3, 1, 2).reshape(-1, 3072)
    filenames = [f"image_s_{index:06d}.png" for index in range(len(labels))]
    content = {"batch_label": title, "labels": [int(label) for label in labels], "data": data, "filenames": filenames}
    dump_python2(path, content)


def dump_python2(path: Path, content: object) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    # numpy was then numpy.core; both names end with a line break in the file, so that no length changes
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))


def write_gtsrb(
    root: Path,
    tracks_per_class: int = 3,
    seed: int = 0,
    *,
    frames_per_track: int = 3,
    test_images_per_class: int = 2,
    num_classes: int = 43,
) -> Path:
    """root/gtsrb/ as torchvision unpacks it: ppm files of many sizes, a table a class, and the test images' table."""
    rng, base = np.random.default_rng(seed), Path(root) / "gtsrb"
    for label in range(num_classes):
        folder = base / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        names = [f"{t:05d}_{f:05d}.ppm" for t in range(tracks_per_class) for f in range(frames_per_track)]
        sizes = [_write_sign(folder / name, label, rng) for name in names]
        _write_gtsrb_csv(folder / f"GT-{label:05d}.csv", names, sizes, [label] * len(names))
    folder = base / "GTSRB" / "Final_Test" / "Images"
    folder.mkdir(parents=True)
    labels = _shuffled_labels(num_classes, test_images_per_class, rng)
    names = [f"{index:05d}.ppm" for index in range(len(labels))]
    sizes = [_write_sign(folder / name, label, rng) for name, label in zip(names, labels, strict=True)]
    _write_gtsrb_csv(base / "GT-final_test.csv", names, sizes, labels)
    return Path(root)


def _write_sign(path: Path, label: int, rng: np.random.Generator) -> tuple[int, int]:
    width, height = (int(size) for size in rng.integers(21, 60, 2))
    Image.fromarray(class_image(int(label), height, width, rng)).save(path)
    return width, height


def _write_gtsrb_csv(path: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]], labels: Sequence[int]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
        for name, (width, height), label in zip(names, sizes, labels, strict=True):
            table.writerow([name, width, height, 5, 5, width - 5, height - 5, label])


def write_image_folder(
    root: Path,
    class_folders: Sequence[str] = IMAGENETTE_WNIDS[:3],
    images_per_class: int = 6,
    seed: int = 0,
    *,
    test_images_per_class: int = 2,
) -> Path:
    """root/train/<wnid>/ and root/val/<wnid>/ with JPEGs of many sizes; the first of each class is grey."""
    rng = np.random.default_rng(seed)
    for part, per_class in (("train", images_per_class), ("val", test_images_per_class)):
        for label, name in enumerate(class_folders):
            folder = Path(root) / part / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                height, width = (int(size) for size in rng.integers(40, 90, 2))
                image = Image.fromarray(class_image(label, height, width, rng))
                image = image.convert("L") if index == 0 else image
                suffix = f"{part}_{index:08d}" if part == "val" else f"{name}_{index}"
                image.save(folder / f"{suffix}.JPEG", quality=90)
    return Path(root)
