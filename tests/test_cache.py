"""Tests of cache.py: trained once, found again, never trusted when damaged, named after all that shaped it."""

import copy
import errno
import logging
import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

import cache
import kept
import models
from cache import dense_model, shaping_facts
from errors import BenchmarkError
from kept import load_checked, save_checked
from models import get_model

CPU = torch.device("cpu")
Loaders = namedtuple("Loaders", "train validation test")


class Batches:
    """Two batches of tiny images."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.parts = [(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4) % 3) for _ in range(2)]

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)

    def set_epoch(self, epoch):
        pass


class Factory:
    """Counts how often training data are asked for."""

    def __init__(self):
        self.asked = 0

    def fingerprint(self):
        return "facade"

    def get_dataloaders(self):
        self.asked += 1
        return Loaders(Batches(), Batches(), Batches())


@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path / "cache")


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """A network of two layers under the name of ResNet18: as good for these tests, and quick."""
    build = models.build

    def tiny(name, num_classes, small_input_stem):
        if name != "resnet18":
            return build(name, num_classes, small_input_stem)
        convolution = nn.Conv2d(3, 8, 3, stride=4)
        return nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, num_classes))

    monkeypatch.setattr(models, "build", tiny)


def make_settings(cache_dir):
    dataset = {"name": "tiny", "root": None, "num_classes": 3, "image_size": 32, "samples_per_class": None}
    training = {"train": True, "epochs": 1, "lr": 0.01, "weight_decay": 0.0, "optimizer": "adamw", "momentum": 0.9}
    rates = {"scheduler": "cosine", "early_stopping_patience": None, "batch_size_train": 4, "batch_size_test": 4}
    start = {"use_data_augmentation": False, "use_pretrained_model": False}
    retraining = {"retrain_after_pruning": True, "retrain_epochs": 2, "lr_retrain": 0.001, "processes": 1}
    model = {"name": "resnet18", "pretrained_weights_path": None, "skip_first_layers": 0, "small_input_stem": False}
    return SimpleNamespace(
        seed=0,
        cache_dir=str(cache_dir),
        device="cpu",
        run_name="run",
        selected_classes=(0, 1),
        dataset=SimpleNamespace(**dataset, validation_fraction=0.1, num_workers=0, download=False),
        training=SimpleNamespace(**training, **rates, **start, **retraining),
        model=SimpleNamespace(**model),
        pruning=SimpleNamespace(name="ocap", pruning_ratio=(0.5,)),
    )


DENSE = kept.Kind("dense model", "", dict, dict)


def changed(settings, key, value):
    """A copy of the settings with the dotted key set."""
    result = copy.deepcopy(settings)
    *groups, name = key.split(".")
    owner = result
    for group in groups:
        owner = getattr(owner, group)
    assert hasattr(owner, name)
    setattr(owner, name, value)
    return result


def key_of(settings, fingerprint="facade", device="cpu"):
    return kept.key_of(shaping_facts(settings, fingerprint, device))


def cached_file(settings):
    (path,) = files_in(settings)
    return path


def files_in(settings):
    """All but the locks."""
    return [path for path in Path(settings.cache_dir).glob("*") if path.name != "locks"]


def test_second_run_trains_nothing_and_gets_the_same_model(settings, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    factory = Factory()
    first = dense_model(settings, factory, CPU)
    assert (first.source, factory.asked, len(first.history)) == ("trained", 1, 1)
    monkeypatch.setattr(cache, "fit", None)
    caplog.clear()
    second = dense_model(settings, factory, CPU)
    assert (second.source, factory.asked) == ("cache", 1)
    assert f"reused, nothing is trained: {cached_file(settings)}" in caplog.text
    assert (second.history, second.training_seconds, second.key) == (first.history, first.training_seconds, first.key)
    assert first.training_seconds > 0
    state, again = first.model.state_dict(), second.model.state_dict()
    assert state.keys() == again.keys()
    for key in state:
        assert torch.equal(state[key], again[key]) and state[key].stride() == again[key].stride(), key
    assert not second.model.training


def test_file_is_named_after_dataset_model_and_key(settings):
    model = dense_model(settings, Factory(), CPU)
    assert cached_file(settings).name == f"tiny-resnet18-{model.key[:16]}.pt"
    assert model.key == key_of(settings)


def flipped(at):
    """A damage: the lowest bit of the byte at this share of the file."""

    def flip(content):
        position = int(at * (len(content) - 1))
        return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]

    return flip


DAMAGES = {
    "first byte": flipped(0.0),
    "early byte": flipped(0.003),
    "middle byte": flipped(0.5),
    "last byte": flipped(1.0),
    "checksum": lambda content: content.replace(b"sha256 ", b"sha256 0", 1),
    "half": lambda content: content[: len(content) // 2],
    "header only": lambda content: content[:60],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "foreign": lambda content: b"GIF89a" * 50,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_replaced_with_a_warning(settings, caplog, damage):
    factory = Factory()
    first = dense_model(settings, factory, CPU)
    path = cached_file(settings)
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    caplog.clear()
    second = dense_model(settings, factory, CPU)
    assert (second.source, factory.asked) == ("trained", 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and str(path) in caplog.text
    assert torch.equal(first.model[0].weight, second.model[0].weight)
    assert dense_model(settings, factory, CPU).source == "cache"


@pytest.mark.parametrize(
    "content",
    [
        lambda good: {"something": 1},
        lambda good: {"key": good["key"]},
        lambda good: [1, 2],
        lambda good: {**good, "key": "0" * 64},
        lambda good: {**good, "facts": "{}"},
        lambda good: {**good, "state": {}},
        lambda good: {**good, "state": {**good["state"], "0.bias": torch.full((8,), float("nan"))}},
        lambda good: {**good, "history": [{"epoch": 1}]},
    ],
    ids=["keys", "key alone", "list", "other key", "other settings", "no weights", "nan", "history"],
)
def test_intact_file_with_foreign_content_is_replaced_with_a_warning(settings, caplog, content):
    dense_model(settings, Factory(), CPU)
    path = cached_file(settings)
    save_checked(DENSE, path, content(load_checked(DENSE, path)))
    assert dense_model(settings, Factory(), CPU).source == "trained"
    assert "WARNING" in caplog.text and str(path) in caplog.text
    assert dense_model(settings, Factory(), CPU).source == "cache"


def test_pickled_code_in_a_cached_file_is_not_run(settings, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    dense_model(settings, Factory(), CPU)
    save_checked(DENSE, cached_file(settings), {"facts": Evil()})
    assert dense_model(settings, Factory(), CPU).source == "trained"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interrupted_writing_leaves_no_file_and_keeps_the_old_one(tmp_path, monkeypatch, failure, step):
    def fail(*arguments):
        raise failure

    path = tmp_path / "model.pt"
    save_checked(DENSE, path, {"value": 1})
    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
        with pytest.raises(type(failure)):
            save_checked(DENSE, path, {"value": 2})
    assert list(tmp_path.iterdir()) == [path]
    assert load_checked(DENSE, path) == {"value": 1}


def test_full_disk_costs_a_warning_and_the_run_goes_on(settings, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    model = dense_model(settings, Factory(), CPU)
    assert model.source == "trained" and len(model.history) == 1
    assert "No space left on device" in caplog.text and "WARNING" in caplog.text
    assert files_in(settings) == []


def test_cache_dir_that_is_a_file_costs_a_warning(settings, tmp_path, caplog):
    (tmp_path / "taken").write_text("a file")
    assert dense_model(changed(settings, "cache_dir", str(tmp_path / "taken")), Factory(), CPU).source == "trained"
    assert "Dense model not kept" in caplog.text


def test_interrupted_training_leaves_nothing(settings, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dense_model(settings, Factory(), CPU)
    assert files_in(settings) == []


SHAPING = [
    ("seed", 1),
    ("dataset.name", "other"),
    ("dataset.num_classes", 4),
    ("dataset.image_size", 16),
    ("dataset.samples_per_class", 5),
    ("dataset.validation_fraction", 0.2),
    ("model.name", "resnet50"),
    ("model.small_input_stem", True),
    ("training.epochs", 2),
    ("training.lr", 0.02),
    ("training.weight_decay", 0.1),
    ("training.optimizer", "sgd"),
    ("training.momentum", 0.8),
    ("training.scheduler", "none"),
    ("training.early_stopping_patience", 1),
    ("training.batch_size_train", 8),
    ("training.use_data_augmentation", True),
    ("training.use_pretrained_model", True),
    ("training.processes", 2),
]
WITHOUT_EFFECT = [
    ("cache_dir", "elsewhere"),
    ("device", "auto"),
    ("run_name", "other"),
    ("selected_classes", (2,)),
    ("pruning.name", "random"),
    ("pruning.pruning_ratio", (0.1,)),
    ("dataset.root", "/data"),
    ("dataset.num_workers", 4),
    ("dataset.download", True),
    ("model.skip_first_layers", 3),
    ("training.train", False),
    ("training.batch_size_test", 8),
    ("training.retrain_after_pruning", False),
    ("training.retrain_epochs", 9),
    ("training.lr_retrain", 0.5),
]


def test_key_changes_with_each_setting_that_shapes_the_model_and_no_other(settings):
    original = key_of(settings)
    keys = [key_of(changed(settings, key, value)) for key, value in SHAPING]
    assert len({original, *keys}) == len(SHAPING) + 1
    for key, value in WITHOUT_EFFECT:
        assert key_of(changed(settings, key, value)) == original, key
    assert len({original, key_of(settings, fingerprint="other"), key_of(settings, device="cuda")}) == 3


def test_every_setting_of_the_three_groups_is_tested_above(settings):
    named = {key for key, _ in SHAPING + WITHOUT_EFFECT} | {"model.pretrained_weights_path"}
    for group in ("dataset", "model", "training"):
        assert {f"{group}.{key}" for key in vars(getattr(settings, group))} <= named


def test_key_changes_with_format_and_versions(settings, monkeypatch):
    original = key_of(settings)
    monkeypatch.setattr(cache, "FORMAT_VERSION", cache.FORMAT_VERSION + 1)
    other_format = key_of(settings)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    other_torch = key_of(settings)
    monkeypatch.setattr(torchvision, "__version__", "9.9.9")
    assert len({original, other_format, other_torch, key_of(settings)}) == 4


def test_key_depends_on_the_content_of_the_weights_file_and_not_on_its_path(settings, tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (key_of(changed(settings, "model.pretrained_weights_path", str(tmp_path / name))) for name in "abc")
    assert a == b != c and a != key_of(settings)
    with pytest.raises(BenchmarkError, match="model.pretrained_weights_path: nowhere; cannot be read"):
        key_of(changed(settings, "model.pretrained_weights_path", "nowhere"))


def test_key_is_pinned():
    """A changed key throws away every cached model: only a raised FORMAT_VERSION may do that."""
    facts = {"seed": 0, "data": "facade", "training": {"lr": 0.001, "epochs": 12, "early_stopping_patience": None}}
    assert kept.key_of(facts) == "3366a4522dbc13596ae580f3166c0ac8e91fed5d5f85e0ef26ba2978d33d0827"
    assert kept.key_of(dict(reversed(facts.items()))) == kept.key_of(facts)


def test_facts_are_pinned(settings, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    monkeypatch.setattr(torchvision, "__version__", "0.2.3")
    assert shaping_facts(settings, "facade", "cpu") == {
        "format": 2,
        "torch": "1.2.3",
        "torchvision": "0.2.3",
        "device": "cpu",
        "seed": 0,
        "data": "facade",
        "pretrained_weights": None,
        "dataset": {
            "name": "tiny",
            "num_classes": 3,
            "image_size": 32,
            "samples_per_class": None,
            "validation_fraction": 0.1,
        },
        "model": {"name": "resnet18", "small_input_stem": False},
        "training": {
            "epochs": 1,
            "lr": 0.01,
            "weight_decay": 0.0,
            "optimizer": "adamw",
            "momentum": 0.9,
            "scheduler": "cosine",
            "early_stopping_patience": None,
            "batch_size_train": 4,
            "use_data_augmentation": False,
            "use_pretrained_model": False,
            "processes": 1,
        },
    }


def test_seed_shapes_weights_and_seed_zero_is_a_seed(settings):
    zero, one = (dense_model(changed(settings, "seed", seed), Factory(), CPU).model for seed in (0, 1))
    again = dense_model(changed(settings, "cache_dir", settings.cache_dir + "2"), Factory(), CPU)
    assert again.source == "trained" and torch.equal(again.model[0].weight, zero[0].weight)
    assert not torch.equal(zero[0].weight, one[0].weight)


def test_weights_file_is_used_as_it_is_when_nothing_is_to_be_trained(settings, tmp_path):
    path = tmp_path / "weights.pt"
    given = get_model("resnet18", 3, seed=7)
    torch.save(given.state_dict(), path)
    settings = changed(changed(settings, "training.train", False), "model.pretrained_weights_path", str(path))
    factory = Factory()
    dense = dense_model(settings, factory, CPU)
    assert (dense.source, dense.history, dense.training_seconds, factory.asked) == ("weights file", [], 0.0, 0)
    assert torch.equal(dense.model[0].weight, given[0].weight) and not dense.model.training
    assert not Path(settings.cache_dir).exists()


def test_training_starts_from_the_weights_file(settings, tmp_path):
    path = tmp_path / "weights.pt"
    given = get_model("resnet18", 3, seed=7)
    torch.save(given.state_dict(), path)
    settings = changed(changed(settings, "training.lr", 1e-9), "model.pretrained_weights_path", str(path))
    dense = dense_model(settings, Factory(), CPU)
    assert dense.source == "trained"
    torch.testing.assert_close(dense.model[0].weight, given[0].weight, rtol=0, atol=1e-6)


def test_untrained_model_without_weights_is_refused(settings):
    with pytest.raises(BenchmarkError, match="training.train: false"):
        dense_model(changed(settings, "training.train", False), Factory(), CPU)


def test_torchvision_weights_are_named_as_the_source(settings, monkeypatch):
    asked = []

    def fake(name, num_classes, **options):
        asked.append(options["use_pretrained_model"])
        return nn.Linear(2, 2)

    monkeypatch.setattr(cache, "get_model", fake)
    settings = changed(changed(settings, "training.train", False), "training.use_pretrained_model", True)
    assert dense_model(settings, Factory(), CPU).source == "torchvision"
    assert asked == [True]
