"""Damaged files: each one message that names the file. Intact ones are read in test_data_loader.py."""

import gzip
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from data_files import list_class_folders, read_cifar10, read_gtsrb, read_idx, read_idx_pair, read_image
from errors import BenchmarkError
from tests import formats


def refusal(function, *arguments):
    with pytest.raises(BenchmarkError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def cifar(tmp_path):
    return formats.write_cifar10(tmp_path, images_per_class=2, test_images_per_class=1) / "cifar-10-batches-py"


@pytest.fixture
def idx(tmp_path):
    path = tmp_path / "labels-idx1-ubyte"
    formats.write_idx(path, np.arange(10, dtype=np.uint8))
    return path


def test_idx_arrays_come_back(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    formats.write_idx(tmp_path / "a", array)
    formats.write_idx(tmp_path / "a", array, gzipped=True)
    assert (read_idx(tmp_path / "a", 3) == array).all() and (read_idx(tmp_path / "a.gz", 3) == array).all()


@pytest.mark.parametrize("length", [0, 3, 7, 17])
def test_a_truncated_idx_file_is_named(idx, length):
    idx.write_bytes(idx.read_bytes()[:length])
    assert str(idx) in refusal(read_idx, idx, 1)


def test_an_idx_file_with_more_than_it_declares_is_refused(idx):
    idx.write_bytes(idx.read_bytes() + b"x")
    assert "11 bytes of data for the shape [10]" in refusal(read_idx, idx, 1)


def test_an_idx_file_of_another_kind_is_refused(idx):
    assert "3-dimensional" in refusal(read_idx, idx, 3)
    idx.write_bytes(b"\x00\x00\x0d\x01" + idx.read_bytes()[4:])  # 0x0d: floats
    assert "unsigned bytes" in refusal(read_idx, idx, 1)


def test_negative_idx_sizes_are_refused(idx):
    idx.write_bytes(b"\x00\x00\x08\x01\xff\xff\xff\xff")
    assert "[-1]" in refusal(read_idx, idx, 1)


def test_a_truncated_gzip_is_named(idx):
    zipped = idx.with_suffix(".gz")
    zipped.write_bytes(gzip.compress(idx.read_bytes())[:-6])
    assert str(zipped) in refusal(read_idx, zipped, 1)


def test_images_and_labels_must_be_as_many(tmp_path, idx):
    formats.write_idx(tmp_path / "images", np.zeros((9, 2, 2), np.uint8))
    assert "10 labels for the 9 images" in refusal(read_idx_pair, tmp_path / "images", idx)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_cifar_batch_is_named(cifar, keep):
    path = cifar / "data_batch_4"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert str(path) in refusal(read_cifar10, cifar)


def test_a_pickle_that_runs_code_is_refused_and_not_run(cifar):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(cifar / "attacked"),)

    (cifar / "test_batch").write_bytes(pickle.dumps({"data": Attack(), "labels": []}))
    message = refusal(read_cifar10, cifar)
    assert str(cifar / "test_batch") in message and "mkdir, refused" in message
    assert not (cifar / "attacked").exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_batches_written_by_todays_python_are_read(cifar, protocol):
    expected = read_cifar10(cifar)
    for path in cifar.glob("*_batch*"):
        content = pickle.loads(path.read_bytes(), encoding="latin1")
        path.write_bytes(pickle.dumps({key.encode(): value for key, value in content.items()}, protocol))
    assert all((one == other).all() for one, other in zip(read_cifar10(cifar), expected, strict=True))


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"data": np.zeros((2, 3072), np.uint8)},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
        {"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]},
        {"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]},
        {"data": np.zeros((0, 3072), np.uint8), "labels": []},
        {"data": "pixels", "labels": [1]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]},
    ],
)
def test_a_batch_of_another_shape_is_named(cifar, content):
    (cifar / "data_batch_2").write_bytes(pickle.dumps(content))
    assert str(cifar / "data_batch_2") in refusal(read_cifar10, cifar)


@pytest.fixture
def gtsrb(tmp_path):
    """The three arguments of read_gtsrb that are places."""
    base = formats.write_gtsrb(tmp_path, tracks_per_class=1, frames_per_track=2, num_classes=2) / "gtsrb"
    return base / "GTSRB" / "Training", base / "GTSRB" / "Final_Test" / "Images", base / "GT-final_test.csv"


@pytest.mark.parametrize("name", ["Training/00001/00000_00001.ppm", "Final_Test/Images/00002.ppm"])
@pytest.mark.parametrize("length", [0, 30, 600])
def test_a_corrupt_sign_is_named(gtsrb, name, length):
    path = gtsrb[0].parent / name
    path.write_bytes(path.read_bytes()[:length])
    assert str(path) in refusal(read_gtsrb, *gtsrb, 32)


def test_signs_listed_but_missing_are_named(gtsrb):
    (gtsrb[0] / "00001" / "00000_00001.ppm").unlink()
    assert "00001/00000_00001.ppm: missing, though listed in GT-00001.csv" in refusal(read_gtsrb, *gtsrb, 32)


def test_a_missing_test_sign_is_named(gtsrb):
    (gtsrb[1] / "00003.ppm").unlink()
    message = refusal(read_gtsrb, *gtsrb, 32)
    assert str(gtsrb[1] / "00003.ppm") in message and "No such file" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"Filename;ClassId\n", b"Filename,ClassId\na.ppm,1\n", b"Filename;ClassId\na.ppm;x\n", b"a;b\n1;2", b"\xff"],
)
def test_a_table_of_another_form_is_named(gtsrb, content):
    gtsrb[2].write_bytes(content)
    assert str(gtsrb[2]) in refusal(read_gtsrb, *gtsrb, 32)


def test_a_foreign_class_folder_is_named(gtsrb):
    (gtsrb[0] / "stop").mkdir()
    assert f"{gtsrb[0] / 'stop'}: not a class folder" in refusal(read_gtsrb, *gtsrb, 32)


def test_images_are_listed_without_being_opened(tmp_path):
    for name in ("n2/b.JPEG", "n2/a.jpg", "n2/notes.txt", "n2/.hidden.jpg", "n1/c.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"xyz")
    files = list_class_folders(tmp_path, ("n1", "n2"))
    assert files.paths.tolist() == [b"n1/c.PNG", b"n2/a.jpg", b"n2/b.JPEG"]
    assert files.labels.tolist() == [0, 1, 1] and files.sizes.tolist() == [3, 3, 3]


def test_class_folders_without_images_are_named(tmp_path):
    (tmp_path / "n1").mkdir()
    assert f"{tmp_path}: no images" in refusal(list_class_folders, tmp_path, ("n1",))
    assert str(tmp_path / "n2") in refusal(list_class_folders, tmp_path, ("n1", "n2"))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "I;16"])
def test_images_of_every_kind_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (5, 4)).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (5, 4)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 JPEG no more"])
def test_a_corrupt_image_is_named(tmp_path, content):
    path = tmp_path / "image.JPEG"
    path.write_bytes(content)
    message = refusal(read_image, path)
    assert message.startswith(f"{path}: cannot be read as an image (") and message.count(str(path)) == 1
    assert message.endswith("); fetch the file again, or restore it")
