import gc
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import batch_loaders
from batch_loaders import Decoders, FolderLoader, TensorLoader, augment
from data_files import list_class_folders
from errors import BenchmarkError
from tests import formats

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
OPTIONS = {"mean": MEAN, "std": STD, "batch_size": 4, "seed": 0, "name": "train", "device": "cpu"}


def pixels(count, channels=3, size=8):
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.manual_seed(0))


def tensor_loader(images, **changes):
    return TensorLoader(images, torch.arange(len(images)), **(OPTIONS | {"shuffle": True, "augment": False} | changes))


def normalised(image):
    """One image [C, H, W], a channel at a time, in double precision."""
    image = image.expand(3, -1, -1).double() / 255
    return torch.stack([(image[c] - MEAN[c]) / STD[c] for c in range(3)])


def moved(image, down, right, flip):
    """One image [C, H, W], a pixel at a time: what lay at (row + down - 4, column + right - 4), black outside."""
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            source_row, source_column = row + down - 4, column + right - 4
            if 0 <= source_row < height and 0 <= source_column < width:
                result[:, row, width - 1 - column if flip else column] = image[:, source_row, source_column]
    return result


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_equals_the_slow_way(channels):
    images = pixels(6, channels)
    for batch, labels in tensor_loader(images):
        assert batch.shape[1] == 3
        for image, label in zip(batch, labels, strict=True):
            torch.testing.assert_close(image.double(), normalised(images[label]), rtol=0, atol=1e-5)


def test_augmentation_equals_the_slow_way_for_every_offset_and_flip():
    down, right, flip = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, (9, 9, 2)), indexing="ij"))
    images = pixels(len(down), size=6)
    got = augment(images.permute(0, 2, 3, 1).contiguous(), down, right, flip).permute(0, 3, 1, 2)
    for index in range(len(down)):
        expected = moved(images[index], int(down[index]), int(right[index]), bool(flip[index]))
        assert torch.equal(got[index], expected)


def test_images_that_are_not_square_are_moved_alike():
    image = torch.randint(0, 256, (1, 5, 7, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    arguments = torch.tensor([[6], [1], [1]])
    expected = moved(image[0].permute(2, 0, 1), 6, 1, True)
    assert torch.equal(augment(image, *arguments)[0].permute(2, 0, 1), expected)


@pytest.mark.parametrize("flip", [True, False])
def test_a_loader_draws_every_offset_and_flips_only_where_it_may(flip):
    loader = tensor_loader(pixels(2000, 1, 1), augment=True, flip=flip)
    down, right, flips = loader._draw_augmentation().unbind(1)
    assert torch.bincount(down, minlength=9).min() > 150 and torch.bincount(right, minlength=9).min() > 150
    assert flips.sum() == 0 if not flip else 900 < flips.sum() < 1100
    assert not torch.equal(down, right)


def test_augmented_images_are_moved_originals():
    images = pixels(5, size=5)
    loader = tensor_loader(images, augment=True)
    draws = loader._draw_augmentation().tolist()
    for batch, labels in loader:
        for image, label in zip(batch, labels.tolist(), strict=True):
            expected = normalised(moved(images[label], *draws[label]))
            torch.testing.assert_close(image.double(), expected, rtol=0, atol=1e-5)


def test_augmentation_is_a_function_of_the_epoch_not_of_the_batch_size():
    def epoch(number, batch_size):
        loader = tensor_loader(pixels(20), augment=True, batch_size=batch_size)
        loader.set_epoch(number)
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        return images[labels.argsort()]

    assert torch.equal(epoch(0, 4), epoch(0, 7)) and not torch.equal(epoch(0, 4), epoch(1, 4))


def test_order_depends_on_the_loaders_name_and_seed():
    def order(**changes):
        return torch.cat(tensor_loader(pixels(50), **changes).batches()).tolist()

    assert order() == order() and order() != order(name="subset train") and order() != order(seed=1)


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 300), batch_size=st.integers(1, 64), shuffle=st.booleans())
def test_batches_hold_each_image_once(count, batch_size, shuffle):
    images = torch.zeros(count, 1, 1, 1, dtype=torch.uint8)
    loader = tensor_loader(images, batch_size=batch_size, shuffle=shuffle)
    batches = loader.batches()
    sizes = [len(batch) for batch in batches]
    assert len(batches) == len(loader) == -(-count // batch_size) and max(sizes) <= batch_size
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(count))
    if shuffle:
        assert max(sizes) - min(sizes) <= 1
    else:
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)


def test_rows_choose_images_and_labels_go_with_them():
    images, rows = pixels(10), torch.tensor([7, 2, 5])
    loader = TensorLoader(images, torch.tensor([70, 20, 50]), rows=rows, shuffle=False, augment=False, **OPTIONS)
    ((batch, labels),) = loader
    assert labels.tolist() == [70, 20, 50]
    for image, row in zip(batch, rows, strict=True):
        torch.testing.assert_close(image.double(), normalised(images[row]), rtol=0, atol=1e-5)


def test_iterating_leaves_the_images_as_they_are():
    images = pixels(9)
    before = images.clone()
    for batch, _ in tensor_loader(images, augment=True):
        batch.zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2)),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(2, 3, 4, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3)),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0)),
    ],
)
def test_what_is_no_set_of_images_is_refused(images, labels):
    with pytest.raises(ValueError):
        TensorLoader(images, labels, shuffle=False, augment=False, **OPTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return formats.write_image_folder(tmp_path_factory.mktemp("images"), images_per_class=5) / "train"


def folder_loader(folder, *, num_workers=0, **changes):
    files = list_class_folders(folder, formats.IMAGENETTE_WNIDS[:3])
    decoders = Decoders(24, num_workers, torch.device("cpu"))
    options = OPTIONS | {"shuffle": True, "augment": True, "decoders": decoders} | changes
    return FolderLoader(files.folder, files.paths, torch.from_numpy(files.labels), **options)


def children():
    return {process.pid for process in multiprocessing.active_children()}


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(batch_loaders, "_cores", lambda: 2)


@pytest.mark.parametrize("augmented", [False, True])
def test_workers_change_nothing(folder, two_cores, augmented):
    epochs = [list(folder_loader(folder, num_workers=workers, augment=augmented)) for workers in (0, 2)]
    for (images, labels), (other_images, other_labels) in zip(*epochs, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_streamed_augmentation_is_a_function_of_the_epoch(folder):
    loader = folder_loader(folder, shuffle=False)
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


def test_about_half_of_the_streamed_images_are_flipped(folder):
    wide = batch_loaders._ImageFiles(24)._random_part
    bright_left = np.zeros((30, 30, 3), np.uint8)
    bright_left[:, :15] = 255
    image = batch_loaders.Image.fromarray(bright_left)
    parts = [np.asarray(wide(image, seed)).astype(float) for seed in range(300)]
    on_the_right = [part[:, 12:].mean() > part[:, :12].mean() for part in parts]
    lopsided = [abs(part[:, 12:].mean() - part[:, :12].mean()) > 1 for part in parts]
    share = sum(r for r, clear in zip(on_the_right, lopsided, strict=True) if clear) / sum(lopsided)
    assert 0.4 < share < 0.6 and sum(lopsided) > 100


def test_no_more_workers_than_cores(folder, monkeypatch):
    monkeypatch.setattr(batch_loaders, "_cores", lambda: 1)
    assert folder_loader(folder, num_workers=8).decoders.num_workers == 1


def test_workers_are_kept_from_one_pass_to_the_next_and_serve_several_loaders(folder, two_cores):
    one = folder_loader(folder, num_workers=2)
    other = folder_loader(folder, decoders=one.decoders, shuffle=False, augment=False)
    expected = torch.cat([images for images, _ in folder_loader(folder, shuffle=False, augment=False)])
    before = children()
    list(one)
    started = children() - before
    assert len(started) == 2
    for epoch in range(2):
        one.set_epoch(epoch)
        alone = folder_loader(folder)
        alone.set_epoch(epoch)
        for (images, _), (wanted, _) in zip(one, alone, strict=True):
            assert torch.equal(images, wanted)
        assert torch.equal(torch.cat([images for images, _ in other]), expected)
        assert children() - before == started
    del one, other, images
    gc.collect()
    assert not children() & started


def test_a_pass_that_is_left_early_or_meets_another_harms_neither(folder, two_cores):
    loader = folder_loader(folder, num_workers=2, shuffle=False, augment=False)
    expected = [images for images, _ in folder_loader(folder, shuffle=False, augment=False)]
    assert torch.equal(next(iter(loader))[0], expected[0])
    for (images, _), (again, _), wanted in zip(loader, loader, expected, strict=True):
        assert torch.equal(images, wanted) and torch.equal(again, wanted)
    assert torch.equal(torch.cat([images for images, _ in loader]), torch.cat(expected))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_parts_of_a_folder_make_up_its_batches(folder, two_cores, size, workers):
    whole = folder_loader(folder, num_workers=workers)
    parts = [whole.part(rank, size, torch.device("cpu")) for rank in range(size)]
    for images, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(images[0], torch.cat([piece[0] for piece in pieces]))
        assert torch.equal(images[1], torch.cat([piece[1] for piece in pieces]))


@settings(deadline=None)
@given(count=st.integers(1, 40), batch=st.integers(1, 12), size=st.integers(1, 5), shuffle=st.booleans())
def test_parts_make_up_the_whole(count, batch, size, shuffle):
    """Every image of a batch is in one part; of training batches, which all update the weights, none is empty."""
    pixels = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    options = OPTIONS | {"batch_size": batch, "shuffle": shuffle, "augment": shuffle}
    whole = TensorLoader(pixels, torch.arange(count), **options)
    if shuffle and count // len(whole) < size:
        with pytest.raises(BenchmarkError, match=f"processes: {size}; a batch of {count // len(whole)} images"):
            whole.part(0, size, torch.device("cpu"))
        return
    parts = [list(whole.part(rank, size, torch.device("cpu"))) for rank in range(size)]
    batches = list(whole)
    if shuffle:
        assert {len(part) for part in parts} == {len(batches)}
        for images, *pieces in zip(batches, *parts, strict=True):
            assert torch.equal(images[0], torch.cat([piece[0] for piece in pieces]))
    seen = sorted(label for part in parts for _, labels in part for label in labels.tolist())
    assert seen == list(range(count))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_one_message_with_its_path(folder, tmp_path, two_cores, workers):
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / formats.IMAGENETTE_WNIDS[1] / f"{formats.IMAGENETTE_WNIDS[1]}_3.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BenchmarkError) as caught:
        list(folder_loader(copy, num_workers=workers))
    assert str(caught.value).startswith(f"{path}: cannot be read as an image (") and "\n" not in str(caught.value)


def test_a_worker_that_dies_is_one_message(folder, two_cores, monkeypatch):
    monkeypatch.setattr(batch_loaders, "read_image", lambda path: os._exit(1))
    with pytest.raises(BenchmarkError, match=r"dataset\.num_workers: 2; a process .* died"):
        list(folder_loader(folder, num_workers=2))


def test_other_failures_are_not_taken_for_a_dead_worker(folder, monkeypatch):
    def fail(loader):
        raise RuntimeError("another")

    monkeypatch.setattr(DataLoader, "__iter__", fail)
    with pytest.raises(RuntimeError, match="another"):
        list(folder_loader(folder))
