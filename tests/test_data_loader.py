"""What every dataset's loaders have in common, on small files in each true format; damage is in test_data_files.py."""

import functools
import hashlib
import logging
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import datasets, transforms

import data_places
from data_loader import FACTORIES, DataLoaderFactory, get_data_factory
from data_places import PLACES
from errors import BenchmarkError, ConfigError
from tests import formats

CLASSES = {"digits": 10, "fashion_mnist": 10, "cifar10": 10, "gtsrb": 5, "imagenet": 3, "imagenette": 10}
SIZES = {"imagenet": 32, "imagenette": 32}  # small, to be quick
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """A root for each dataset, with at least six images a class."""
    base = tmp_path_factory.mktemp("data")
    formats.write_image_folder(base / "imagenette" / "imagenette2-320", formats.IMAGENETTE_WNIDS)
    return {
        "digits": None,
        "fashion_mnist": formats.write_fashion_mnist(base / "fashion_mnist"),
        "cifar10": formats.write_cifar10(base / "cifar10"),
        "gtsrb": formats.write_gtsrb(base / "gtsrb", num_classes=CLASSES["gtsrb"]),
        "imagenet": formats.write_image_folder(base / "imagenet"),
        "imagenette": base / "imagenette",
    }


def make_settings(name, root, **changes):
    """Settings with any attribute changed by name, whichever group it is in."""
    num_classes = changes.get("num_classes", CLASSES[name])
    values = {
        "dataset": {
            "name": name,
            "root": None if root is None else str(root),
            "num_classes": num_classes,
            "image_size": SIZES.get(name, 32),
            "samples_per_class": None,
            "validation_fraction": 0.3,
            "num_workers": 0,
            "download": False,
        },
        "training": {"batch_size_train": 8, "batch_size_test": 7, "use_data_augmentation": False},
        "": {
            "selected_classes": (2, 0),
            "num_pruning_samples": 6,
            "sampling_seed": None,
            "replace_last_layer": True,
            "seed": 0,
            "cache_dir": "/dev/null/none",  # nothing is kept
            "class_names": tuple(f"class_{index}" for index in range(num_classes)),
        },
    }
    for key, value in changes.items():
        group = next(group for group in values.values() if key in group)
        group[key] = value
    groups = {group: SimpleNamespace(**values[group]) for group in ("dataset", "training")}
    return SimpleNamespace(**values[""], **groups)


@pytest.fixture(scope="session")
def make(roots):
    """Builds a factory; one that is asked for without changes is built once, its loaders are new each time."""
    plain = functools.cache(lambda name: get_data_factory(make_settings(name, roots[name]), "cpu"))

    def build(name, root=None, **changes):
        if root is None and not changes:
            return plain(name)
        return get_data_factory(make_settings(name, root or roots[name], **changes), "cpu")

    return build


every_dataset = pytest.mark.parametrize("name", FACTORIES)


def collect(loader):
    """(images [N, 3, H, W], labels [N]) in the order yielded."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def marks(loader):
    """A hash of each image, in the order yielded: tells images apart without asking the loader."""
    return [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest() for image in collect(loader)[0]]


def test_each_dataset_has_a_config_of_its_name():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in Path("config/dataset").glob("*.yaml")}
    assert found.keys() == FACTORIES.keys()
    keys = make_settings("digits", None).dataset.__dict__.keys()
    assert all(config["name"] == name and config.keys() == keys for name, config in found.items())


@every_dataset
def test_batches_are_normalised_floats_in_channels_last_memory(make, name):
    factory = make(name)
    for loader in factory.get_dataloaders():
        sizes = []
        for images, labels in loader:
            assert images.dtype == torch.float32 and images.shape[1:] == factory.input_shape == (3, 32, 32)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert labels.dtype == torch.int64 and len(labels) == len(images) > 0
            sizes.append(len(labels))
        assert len(sizes) == len(loader) and sum(sizes) == loader.num_images == len(loader.labels)


@every_dataset
def test_parts_share_no_image_and_leave_none_out(make, name):
    loaders = make(name).get_dataloaders()
    seen = [mark for loader in loaders for mark in marks(loader)]
    assert len(set(seen)) == len(seen)
    pool = {"digits": 1797, "fashion_mnist": 130, "cifar10": 140, "gtsrb": 55, "imagenet": 24, "imagenette": 80}
    assert len(seen) == pool[name]


@every_dataset
def test_validation_is_a_stratified_part_of_train(make, name):
    train, validation, _ = make(name).get_dataloaders()
    parts = [torch.bincount(loader.labels, minlength=CLASSES[name]) for loader in (train, validation)]
    expected = torch.round(0.3 * (parts[0] + parts[1])).long()
    assert torch.equal(parts[1], expected)


@every_dataset
def test_labels_are_told_without_iterating_and_are_those_yielded(make, name):
    train, validation, test = make(name).get_dataloaders()
    assert torch.equal(collect(test)[1], test.labels) and torch.equal(collect(validation)[1], validation.labels)
    assert not torch.equal(collect(train)[1], train.labels)
    assert torch.equal(collect(train)[1].sort().values, train.labels.sort().values)


@every_dataset
def test_train_is_cut_evenly_and_test_keeps_a_short_last_batch(make, name):
    train, _, test = make(name).get_dataloaders()
    sizes = [len(labels) for _, labels in train]
    assert len(sizes) == -(-train.num_images // 8) and max(sizes) - min(sizes) <= 1
    sizes = [len(labels) for _, labels in test]
    assert set(sizes[:-1]) <= {7} and sizes[-1] == (test.num_images - 1) % 7 + 1


@every_dataset
def test_order_is_a_function_of_the_epoch(make, name):
    train = make(name).get_dataloaders().train
    orders = []
    for epoch in (0, 1, 0):
        train.set_epoch(epoch)
        orders.append(marks(train))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])


@every_dataset
def test_what_is_served_depends_on_the_seed_alone_and_moves_no_global_generator(make, name):
    first = make(name, use_data_augmentation=True)
    loaders = [*first.get_subset_dataloaders(), *first.get_dataloaders()]
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    again = make(name, use_data_augmentation=True)
    others = [*again.get_dataloaders(), *again.get_subset_dataloaders()]
    assert [marks(loader) for loader in loaders] == [marks(other) for other in others[3:] + others[:3]]
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


@every_dataset
def test_another_seed_gives_another_validation_part_and_the_same_test_part(make, name):
    one, other = make(name).get_dataloaders(), make(name, seed=1).get_dataloaders()
    assert marks(one.test) == marks(other.test) and set(marks(one.validation)) != set(marks(other.validation))


@every_dataset
def test_subset_labels_are_positions_in_the_list(make, name):
    factory = make(name, selected_classes=(2, 0, 1))
    original = {mark: label for loader in factory.get_dataloaders() for mark, label in _labelled(loader)}
    for loader in factory.get_subset_dataloaders()[1:]:
        assert all((2, 0, 1)[label] == original[mark] for mark, label in _labelled(loader))
        assert set(loader.labels.tolist()) == {0, 1, 2}


@every_dataset
def test_subsets_hold_all_images_of_the_selected_classes(make, name):
    factory = make(name)
    for whole, part in zip(factory.get_dataloaders(), factory.get_subset_dataloaders()[1:], strict=True):
        assert {mark for mark, label in _labelled(whole) if label in (0, 2)} == set(marks(part))


def _labelled(loader):
    return list(zip(marks(loader), collect(loader)[1].tolist(), strict=True))


def test_subset_labels_stay_original_when_the_head_does(make):
    subset = make("cifar10", selected_classes=(7, 3), replace_last_layer=False).get_subset_dataloaders()
    assert [set(loader.labels.tolist()) for loader in subset] == [{3, 7}] * 4


@every_dataset
def test_pruning_samples_are_balanced_training_images_with_original_labels(make, name):
    factory = make(name)
    loader = factory.get_subset_dataloaders().pruning
    assert Counter(loader.labels.tolist()) == {0: 3, 2: 3} and torch.equal(collect(loader)[1], loader.labels)
    original = dict(_labelled(factory.get_dataloaders().train))
    assert all(original[mark] == label for mark, label in _labelled(loader))
    assert marks(factory.get_scoring_loader("selected")) == marks(loader)


def test_pruning_samples_are_neither_shuffled_nor_augmented(make):
    loader = make("cifar10", use_data_augmentation=True).get_scoring_loader("selected")
    before = marks(loader)
    loader.set_epoch(5)
    assert marks(loader) == before
    assert set(before) <= set(marks(make("cifar10").get_dataloaders().train))


@every_dataset
def test_only_the_train_loaders_are_augmented(make, name):
    for method in ("get_dataloaders", "get_subset_dataloaders"):
        plain = getattr(make(name), method)()
        augmented = getattr(make(name, use_data_augmentation=True), method)()
        changed = {part for part in plain._fields if marks(getattr(plain, part)) != marks(getattr(augmented, part))}
        assert changed == {"train"}


def test_the_order_of_the_list_does_not_change_the_pruning_samples(make):
    lists = [(5, 1, 3), (1, 3, 5)]
    factories = [make("cifar10", selected_classes=classes, num_pruning_samples=8) for classes in lists]
    loaders = [factory.get_scoring_loader("selected") for factory in factories]
    assert Counter(loaders[0].labels.tolist()) == {1: 3, 3: 3, 5: 2}
    assert marks(loaders[0]) == marks(loaders[1])


def test_too_few_images_of_a_class_are_a_warning_with_the_count(make):
    factory = make("cifar10", num_pruning_samples=100)
    assert factory.get_scoring_loader("selected").num_images == 14
    factory.get_scoring_loader("selected")
    expected = "num_pruning_samples: 100; 50 of class class_{} wanted, only 7 among the training images"
    assert factory.warnings == [expected.format(0), expected.format(2)]


def test_fewer_samples_than_classes_are_refused(make):
    with pytest.raises(ConfigError, match="num_pruning_samples: 1; 2 selected classes"):
        make("cifar10", num_pruning_samples=1).get_scoring_loader("selected")


@every_dataset
def test_the_small_train_loader_is_the_sample_that_42_draws(make, name):
    factory = make(name)
    loader, train = factory.get_small_train_loader(), factory.get_dataloaders().train
    drawn = sorted(random.Random(42).sample(range(train.num_images), 6))
    assert torch.equal(loader.labels, train.labels[drawn])
    assert set(_labelled(loader)) <= set(_labelled(train)) and loader.num_images == 6
    assert marks(loader) == marks(factory.get_scoring_loader("all"))


def test_the_small_train_loader_says_when_there_are_fewer_images(make):
    factory = make("imagenet", num_pruning_samples=1000)
    assert factory.get_small_train_loader().num_images == 12
    assert factory.warnings == ["num_pruning_samples: 1000; only 12 training images to score on"]


@every_dataset
def test_the_complement_has_none_of_the_selected_classes(make, name):
    factory = make(name)
    loader = factory.get_scoring_loader("complement")
    assert loader.num_images > 0 and not set(loader.labels.tolist()) & {0, 2}
    assert set(_labelled(loader)) <= set(_labelled(factory.get_dataloaders().train))


def test_the_complement_is_balanced_over_its_classes(make):
    factory = make("cifar10", selected_classes=(0, 2), num_pruning_samples=11)
    assert Counter(factory.get_scoring_loader("complement").labels.tolist()) == {
        1: 2, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1,
    }  # fmt: skip
    assert factory.warnings == []
    few = make("cifar10", selected_classes=(0, 2), num_pruning_samples=3)
    labels = few.get_scoring_loader("complement").labels.tolist()
    assert len(labels) == len(set(labels)) == 3
    assert few.warnings == ["num_pruning_samples: 3; 8 classes are not selected, 5 of them have no image to score on"]


def test_classes_without_an_image_in_the_small_train_loader_are_named(make):
    factory = make("cifar10", num_pruning_samples=6)
    absent = sorted(set(range(10)) - set(factory.get_small_train_loader().labels.tolist()))
    names = ", ".join(f"class_{label}" for label in absent[:5])
    assert factory.warnings == [
        f"num_pruning_samples: 6; {len(absent)} classes have no image to score on: {names}"
        + (", ..." if len(absent) > 5 else "")
    ]


def test_no_complement_of_all_classes(make):
    with pytest.raises(BenchmarkError, match="complement; no training image"):
        make("imagenet", selected_classes=(0, 1, 2)).get_scoring_loader("complement")
    with pytest.raises(ConfigError, match="pruning.scoring_classes: some; valid: selected, all, complement"):
        make("imagenet").get_scoring_loader("some")


@every_dataset
def test_samples_per_class_limits_train_with_validation_and_test(make, name):
    whole, few = make(name), make(name, samples_per_class=2 if name != "gtsrb" else 5)
    limit = 2 if name != "gtsrb" else 5
    train, validation, test = few.get_dataloaders()
    assert torch.bincount(torch.cat([train.labels, validation.labels])).tolist() == [limit] * CLASSES[name]
    assert torch.bincount(test.labels).tolist() == [2] * CLASSES[name]
    assert set(marks(test)) <= set(marks(whole.get_dataloaders().test))
    assert not set(marks(train)) & set(marks(validation))
    again = make(name, samples_per_class=limit).get_dataloaders()
    assert marks(again.train) == marks(train)


# Pixels, against a second and slower way


def assert_like_torchvision(loader, dataset):
    images, labels = collect(loader)
    assert len(dataset) == len(images)
    for image, label, (reference, expected) in zip(images, labels, dataset, strict=True):
        assert label == expected
        torch.testing.assert_close(image, reference, rtol=0, atol=1e-5)


def test_cifar10_pixels_and_labels(make, roots):
    factory = make("cifar10")
    content = np.load(roots["cifar10"] / "cifar-10-batches-py" / "test_batch", allow_pickle=True, encoding="latin1")
    test = factory.get_dataloaders().test
    for image, label, row, expected in zip(*collect(test), content["data"], content["labels"], strict=True):
        assert label == expected
        for channel in range(3):
            plane = row[1024 * channel : 1024 * (channel + 1)].reshape(32, 32)
            reference = (plane.astype(np.float64) / 255 - factory.mean[channel]) / factory.std[channel]
            np.testing.assert_allclose(image[channel].numpy(), reference, atol=1e-5)


def test_fashion_mnist_pixels_and_labels(make, roots):
    steps = [transforms.Pad(2), transforms.ToTensor(), transforms.Normalize(0.2860, 0.3530)]
    expand = transforms.Lambda(lambda image: image.expand(3, -1, -1))
    reference = datasets.FashionMNIST(roots["fashion_mnist"], False, transforms.Compose([*steps, expand]))
    assert_like_torchvision(make("fashion_mnist").get_dataloaders().test, reference)


def test_gtsrb_pixels_and_labels(make, roots):
    factory = make("gtsrb")
    normalise = transforms.Normalize(factory.mean, factory.std)
    steps = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor(), normalise])
    reference = datasets.GTSRB(roots["gtsrb"], "test", steps)
    assert_like_torchvision(factory.get_dataloaders().test, reference)


def test_imagenet_pixels_and_labels(make, roots):
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalise])
    reference = datasets.ImageFolder(roots["imagenet"] / "val", steps)
    assert_like_torchvision(make("imagenet", image_size=224).get_dataloaders().test, reference)


def test_imagenette_labels_are_torchvisions(make, roots):
    reference = datasets.Imagenette(roots["imagenette"], "val", "320px")
    loader = make("imagenette").get_dataloaders().test
    assert loader.labels.tolist() == [label for _, label in reference]


def test_imagenette_is_also_read_from_the_root_itself(make, roots):
    inside = roots["imagenette"] / "imagenette2-320"
    assert make("imagenette", root=inside).fingerprint() == make("imagenette").fingerprint()


def test_gzipped_idx_files_are_read_as_well(make, tmp_path):
    zipped = make("fashion_mnist", root=formats.write_fashion_mnist(tmp_path, gzipped=True))
    assert zipped.fingerprint() == make("fashion_mnist").fingerprint()


def test_idx_files_are_found_in_the_root_and_in_debians_place(make, roots, tmp_path, monkeypatch, caplog):
    folder, expected = roots["fashion_mnist"] / "FashionMNIST" / "raw", make("fashion_mnist").fingerprint()
    assert make("fashion_mnist", root=folder).fingerprint() == expected
    monkeypatch.setattr(data_places, "DEBIAN_FASHION_MNIST", folder)
    monkeypatch.chdir(tmp_path)  # where the root that the YAML gives does not exist
    with caplog.at_level(logging.INFO):
        assert make("fashion_mnist", root="data").fingerprint() == expected
    assert f"Fashion-MNIST: read from {folder}" in caplog.text


def test_debians_place_does_not_stand_in_for_a_folder_that_the_user_named(make, roots, tmp_path, monkeypatch):
    monkeypatch.setattr(data_places, "DEBIAN_FASHION_MNIST", roots["fashion_mnist"] / "FashionMNIST" / "raw")
    with pytest.raises(BenchmarkError, match="dataset.root: .*/mistyped; .*dataset.root=/usr/share/datasets/fashion-"):
        make("fashion_mnist", root=tmp_path / "mistyped")


def test_image_sizes_other_than_the_files(make):
    assert next(iter(make("fashion_mnist", image_size=48).get_dataloaders().test))[0].shape == (7, 3, 48, 48)
    images, _ = next(iter(make("cifar10", image_size=64).get_dataloaders().test))
    assert images.shape == (7, 3, 64, 64) and images.is_contiguous(memory_format=torch.channels_last)


def test_a_gtsrb_track_is_never_in_train_and_in_validation(make, roots):
    factory = make("gtsrb", validation_fraction=0.2)
    parts_of_track = {}
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(factory.mean, factory.std)])
    images = {}
    for path in sorted((roots["gtsrb"] / "gtsrb" / "GTSRB" / "Training").rglob("*.ppm")):
        image = Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)
        images[path.parent.name, path.name.split("_")[0], path.name] = normalise(image)
    served = [collect(factory.get_dataloaders()[part])[0] for part in (0, 1)]
    for (label, track, _), image in images.items():
        distances = [(part - image).abs().amax((1, 2, 3)).min() for part in served]
        assert min(distances) < 1e-4 < max(distances)
        parts_of_track.setdefault((label, track), set()).add(int(np.argmin(distances)))
    assert len(images) == 45 and len(parts_of_track) == 15
    assert all(len(parts) == 1 for parts in parts_of_track.values())
    assert Counter(part for parts in parts_of_track.values() for part in parts) == {0: 10, 1: 5}


def test_digits_test_part_is_a_fixed_fifth(make):
    test = make("digits").get_dataloaders().test
    counts = torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    assert torch.equal(torch.bincount(test.labels), torch.round(counts * 0.2).long())


def test_digits_facts_are_those_of_the_data(make):
    factory = make("digits")
    images = torch.cat([collect(loader)[0] for loader in factory.get_dataloaders()[:2]])
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3


@pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"the Debian package dataset-fashion-mnist is not in {DEBIAN}")
def test_fashion_mnist_facts_are_those_of_the_data(make):
    factory = make("fashion_mnist", root=DEBIAN, batch_size_test=4096)
    loaders = factory.get_dataloaders()
    assert [loader.num_images for loader in loaders] == [42000, 18000, 10000]
    totals = torch.zeros(2, dtype=torch.float64)
    for loader in (loaders.train, loaders.validation):
        loader.batch_size = 4096
        for images, _ in loader:
            grey = images[:, 0, 2:-2, 2:-2].double()  # without the padding
            totals += torch.stack([grey.sum(), grey.square().sum()])
    mean, square = totals / (60000 * 784)
    assert abs(mean) < 2e-4 and abs((square - mean**2).sqrt() - 1) < 2e-4


# Identity


@every_dataset
def test_the_fingerprint_tells_what_is_trained_on(make, name):
    fingerprint = make(name).fingerprint()
    assert make(name, selected_classes=(1,), batch_size_train=3, num_pruning_samples=2).fingerprint() == fingerprint
    changes = [{"seed": 1}, {"samples_per_class": 5}, {"validation_fraction": 0.5}, {"image_size": 16}]
    assert len({fingerprint, *(make(name, **change).fingerprint() for change in changes)}) == 5


@pytest.mark.parametrize("name", ["cifar10", "gtsrb", "imagenet"])
def test_the_fingerprint_is_that_of_the_content_not_of_the_place(make, roots, tmp_path, name):
    copy = shutil.copytree(roots[name], tmp_path / "copy")
    assert make(name, root=copy).fingerprint() == make(name).fingerprint()
    if name == "cifar10":
        path = copy / "cifar-10-batches-py" / "data_batch_3"
        path.write_bytes(path.read_bytes().replace(b"\x40", b"\x41"))
    else:
        path = sorted(copy.rglob("*.ppm" if name == "gtsrb" else "train/**/*.JPEG"))[0]
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    assert make(name, root=copy).fingerprint() != make(name).fingerprint()


def test_in_memory_images_are_held_once_as_bytes(make):
    factory = make("cifar10")
    loaders = (*factory.get_dataloaders()[:2], *factory.get_subset_dataloaders()[:3])
    assert len({loader._pixels.data_ptr() for loader in loaders}) == 1
    assert {loader._pixels.dtype for loader in loaders} == {torch.uint8}


# Missing and incomplete datasets


@pytest.mark.parametrize("name", [name for name in FACTORIES if name != "digits"])
def test_a_missing_dataset_is_one_message_with_place_layout_and_remedy(make, tmp_path, monkeypatch, name):
    monkeypatch.setattr(data_places, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    with pytest.raises(BenchmarkError) as caught:
        make(name, root=tmp_path / "nowhere")
    message = str(caught.value)
    assert message.startswith(f"dataset.root: {tmp_path / 'nowhere'}; no {PLACES[name].title} there, expected ")
    assert PLACES[name].layout in message and "dataset.root=<folder>" in message
    assert ("dataset.download=true" in message) == (name != "imagenet")


def test_an_unknown_dataset_is_answered_with_the_nearest():
    settings = make_settings("digits", None)
    settings.dataset.name = "cifar"
    with pytest.raises(ConfigError, match="dataset.name: cifar; valid: cifar10"):
        get_data_factory(settings, "cpu")


def test_a_selected_class_without_images_is_named(make):
    with pytest.raises(BenchmarkError, match="selected_classes: class_44; no train image"):
        make("gtsrb", num_classes=45, selected_classes=(0, 44))


def test_other_classes_without_images_are_a_warning(make):
    factory = make("gtsrb", num_classes=6)
    assert factory.warnings[0] == "GTSRB: 1 classes without a train image: class_5"
    assert factory.get_dataloaders().train.num_images == 30


def test_a_label_outside_the_range_is_refused(make):
    with pytest.raises(BenchmarkError, match=r"CIFAR-10: label \d in the train images; .* allows 0 to 2"):
        make("cifar10", num_classes=3)


def test_nothing_to_validate_on_is_refused(make, tmp_path):
    root = formats.write_gtsrb(tmp_path, tracks_per_class=1, num_classes=5)
    with pytest.raises(BenchmarkError, match="validation_fraction: 0.3; leaves the validation part of GTSRB empty"):
        make("gtsrb", root=root).get_dataloaders()


def test_class_folders_must_be_as_many_as_the_classes(make):
    with pytest.raises(BenchmarkError, match=r"dataset\.num_classes: 4; .*train has 3 class folders"):
        make("imagenet", num_classes=4)


def test_class_folders_must_be_the_same_in_train_and_val(make, roots, tmp_path):
    copy = shutil.copytree(roots["imagenet"], tmp_path / "copy")
    wnid = formats.IMAGENETTE_WNIDS[1]
    (copy / "val" / wnid).rename(copy / "val" / "n09999999")
    with pytest.raises(BenchmarkError, match=f"class folder {wnid} is not both in train and in val"):
        make("imagenet", root=copy)


def test_imagenettes_class_folders_must_be_imagenettes(make, tmp_path):
    root = formats.write_image_folder(tmp_path, [f"n{index:08d}" for index in range(10)])
    with pytest.raises(BenchmarkError, match="not those of Imagenette"):
        make("imagenette", root=root)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [("cifar10", "CIFAR10"), ("fashion_mnist", "FashionMNIST"), ("gtsrb", "GTSRB"), ("imagenette", "Imagenette")],
)
def test_download_fetches_what_is_missing_and_nothing_else(make, roots, tmp_path, monkeypatch, name, class_name):
    fetched = []

    def fetch(root, *args, split=None, **kwargs):
        fetched.append(split)
        if split != "test":
            shutil.copytree(roots[name], root, dirs_exist_ok=True)

    monkeypatch.setattr(datasets, class_name, fetch)
    monkeypatch.setattr(data_places, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    root = tmp_path / "new" / "data"
    for _ in range(2):
        assert make(name, root=root, download=True).fingerprint() == make(name).fingerprint()
    assert len(fetched) == (2 if name == "gtsrb" else 1)
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def test_a_failed_download_is_one_message_and_leaves_nothing(make, tmp_path, monkeypatch):
    def fail(root, **kwargs):
        (Path(root) / "cifar-10-batches-py").mkdir()
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(datasets, "CIFAR10", fail)
    with pytest.raises(BenchmarkError, match=r"dataset\.download: cifar10 .*\(Connection reset by peer\); try again"):
        make("cifar10", root=tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_public_address_is_not_fetched(make, tmp_path):
    with pytest.raises(BenchmarkError, match="dataset.download: imagenet .*no public address"):
        make("imagenet", root=tmp_path, download=True)


def test_the_factory_cannot_be_built_without_its_methods():
    with pytest.raises(TypeError, match="abstract"):
        DataLoaderFactory(make_settings("digits", None), "cpu")


def drawn(factory, which: str) -> list:
    return [(images.tolist(), labels.tolist()) for images, labels in factory.get_scoring_loader(which)]


@pytest.mark.parametrize("which", ["selected", "complement", "all"])
def test_the_sampling_seed_draws_other_scoring_images_and_nothing_else(make, which):
    usual, other, again = make("cifar10"), make("cifar10", sampling_seed=1), make("cifar10", sampling_seed=1)
    assert drawn(other, which) == drawn(again, which)
    assert any(drawn(make("cifar10", sampling_seed=seed), which) != drawn(usual, which) for seed in range(1, 6))
    for one, two in zip(usual.get_dataloaders(), other.get_dataloaders(), strict=True):
        assert one.labels.tolist() == two.labels.tolist()
    assert usual.fingerprint() == other.fingerprint()


def test_other_classes_of_data_read_once(make):
    factory, afresh = make("cifar10", selected_classes=(0,)), make("cifar10", selected_classes=(2, 1))
    chosen = factory.selecting(afresh.settings)
    assert drawn(chosen, "selected") == drawn(afresh, "selected") != drawn(factory, "selected")
    for one, two in zip(chosen.get_subset_dataloaders(), afresh.get_subset_dataloaders(), strict=True):
        assert one.labels.tolist() == two.labels.tolist()
    assert chosen.fingerprint() == factory.fingerprint()
