"""Decoded images kept for later runs: the same pixels, and decoded again whenever that is in doubt."""

import os
import shutil

import numpy as np
import pytest
import torch

import data_files
from data_loader import get_data_factory
from decoded import KIND
from errors import BenchmarkError
from kept import load_checked, save_checked
from tests import formats
from tests.test_data_loader import make_settings


@pytest.fixture
def places(tmp_path):
    formats.write_gtsrb(tmp_path / "data", num_classes=5)
    return tmp_path / "data", tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were opened, in order."""
    seen, read = [], data_files.read_image
    monkeypatch.setattr(data_files, "read_image", lambda path: seen.append(path) or read(path))
    return seen


def images(places, **changes):
    data, cache = places
    factory = get_data_factory(make_settings("gtsrb", data, cache_dir=str(cache), **changes), "cpu")
    return factory._images, factory.fingerprint()


def same(first, second):
    return first[1] == second[1] and all(torch.equal(first[0][part], second[0][part]) for part in ("train", "test"))


def test_files_are_opened_once(places, decoded, caplog):
    caplog.set_level("INFO")
    first = images(places)
    opened = len(decoded)
    assert opened == len(first[0]["train"]) + len(first[0]["test"])
    assert same(images(places), first) and len(decoded) == opened and "Decoded images reused" in caplog.text
    assert same(images(places, image_size=32), first) and len(decoded) == opened
    assert images(places, image_size=16)[0]["train"].shape[2:] == (16, 16) and len(decoded) == 2 * opened
    assert not list(places[1].glob("*.partial")) and len(list(places[1].glob("*.images"))) == 4


def test_they_are_what_decoding_makes(places, monkeypatch):
    images(places)
    kept = images(places)
    assert same(images((places[0], "/dev/null/none")), kept)


def test_a_changed_file_is_seen_though_its_size_and_time_stay(places, decoded):
    first = images(places)
    path = sorted(places[0].rglob("*.ppm"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))  # as long as before, changed later
    second = images(places)
    assert not same(first, second)
    del decoded[:]
    os.utime(path, ns=(0, 0))
    assert same(images(places), second) and decoded


def test_other_files_of_the_same_names_sizes_and_times_are_others(places, decoded, tmp_path):
    """As of archives that set all times alike."""
    copy = shutil.copytree(places[0], tmp_path / "copy")
    for path in copy.rglob("*.ppm"):
        content = path.read_bytes()
        path.write_bytes(content[:-99] + bytes(99))
    for path in [*copy.rglob("*.ppm"), *places[0].rglob("*.ppm")]:
        os.utime(path, ns=(0, 0))
    first = images(places)
    del decoded[:]
    assert not same(images((copy, places[1])), first) and decoded


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda content: b"", lambda content: content[:500], lambda content: b"of another age\n"]
)
def test_damaged_files_are_made_again(places, decoded, damage, caplog):
    first = images(places)
    for path in places[1].glob("*.images"):
        path.write_bytes(damage(path.read_bytes()))
    opened = len(decoded)
    assert same(images(places), first) and len(decoded) == 2 * opened
    assert caplog.text.count("Decoded images not used and made again") == 2  # train and test
    assert same(images(places), first) and len(decoded) == 2 * opened


def test_pixels_of_other_files_are_not_taken(places, decoded, caplog):
    first = images(places)
    for path in places[1].glob("*.images"):
        content = load_checked(KIND, path)
        save_checked(KIND, path, content | {"key": "0" * 64})
    assert same(images(places), first) and "it was made by other settings" in caplog.text
    for path in places[1].glob("*.images"):
        content = load_checked(KIND, path)
        save_checked(KIND, path, content | {"images": content["images"].float()})
    assert same(images(places), first) and "it holds torch.float32" in caplog.text


def test_a_missing_file_has_its_message(places):
    images(places)
    next((places[0] / "gtsrb/GTSRB/Final_Test").rglob("*.ppm")).unlink()
    with pytest.raises(BenchmarkError, match="cannot be read as an image"):
        images(places)


def test_a_cache_that_cannot_be_written_costs_a_warning(places, caplog):
    assert isinstance(images((places[0], "/dev/null/none"))[0]["train"], torch.Tensor)
    assert "Decoded images not kept" in caplog.text
    assert np.asarray(images((places[0], "/dev/null/none"))[0]["test"]).dtype == np.uint8
