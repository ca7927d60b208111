"""`DataLoaderFactory`: how any dataset becomes train, validation and test loaders, and the pruning subsets."""

import copy
import hashlib
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batch_loaders import BatchLoader
from data_files import download
from data_places import Place, root_of
from errors import BenchmarkError, ConfigError
from splits import pick, pick_per_class, rows_by_class, stratified_split

log = logging.getLogger(__name__)


class Loaders(NamedTuple):
    train: BatchLoader
    validation: BatchLoader
    test: BatchLoader


class SubsetLoaders(NamedTuple):
    pruning: BatchLoader
    train: BatchLoader
    validation: BatchLoader
    test: BatchLoader


class Source(NamedTuple):
    """What a dataset brings: labels int64 [N]; groups int64 [N] of training images that must stay together, or None."""

    train_labels: Tensor
    test_labels: Tensor
    groups: Tensor | None = None


class DataLoaderFactory(ABC):
    """Loaders of one dataset, cut into three parts that share no image.

    test is the dataset's own; validation is a seeded, stratified part of its training images. `samples_per_class` first
    cuts training and test images each to at most that many of a class. `warnings` collects what the user should know.

    Raises BenchmarkError when the dataset is missing or damaged, or a selected class has no image.
    """

    title: str  # the dataset's proper name
    place: Place | None = None  # of its files; None for a dataset that comes with a package
    mean: tuple[float, float, float]  # of pixels in [0, 1], per channel
    std: tuple[float, float, float]
    flip = True  # whether a mirrored image still shows its class

    def __init__(self, settings: Any, device: torch.device | str):
        self.settings, self.device = settings, torch.device(device)
        self.root = root_of(settings.dataset)
        self.warnings: list[str] = []
        source = self._open()
        self._labels = {"train": source.train_labels, "test": source.test_labels}
        self._check_labels()
        self._rows = self._split(source.groups)
        self._check_classes()
        self._fingerprint: str | None = None

    # What a kind of dataset brings

    @abstractmethod
    def _open(self) -> Source:
        """Find and read the dataset, so that `_loader` can serve its "train" and its "test" images."""

    @abstractmethod
    def _loader(self, source: str, rows: Tensor, labels: Tensor, **options: Any) -> BatchLoader:
        """A loader of rows [n] of "train" or "test" with labels [n]; options are those of BatchLoader."""

    @abstractmethod
    def _hash(self, digest: "hashlib._Hash", source: str, rows: Tensor) -> None:
        """Feed to digest what tells the rows' images from others: their pixels, or their files' paths and sizes."""

    # What the benchmark asks for

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return 3, self.settings.dataset.image_size, self.settings.dataset.image_size

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.settings.class_names)

    def get_dataloaders(self) -> Loaders:
        """Loaders of all classes with the original labels."""
        return Loaders(*(self._part(part, self._rows[part], self._labels_of(part), part) for part in Loaders._fields))

    def get_subset_dataloaders(self) -> SubsetLoaders:
        """Loaders of the selected classes; a label is the class's position in `selected_classes` when the head is
        replaced, else the original. The pruning loader always has original labels: relevance starts at that logit."""
        selected = torch.tensor(self.settings.selected_classes)
        new_label = torch.full((self.settings.dataset.num_classes,), -1)
        new_label[selected] = torch.arange(len(selected)) if self.settings.replace_last_layer else selected
        parts = {}
        for part in Loaders._fields:
            labels = new_label[self._labels_of(part)]
            parts[part] = self._part(part, self._rows[part][labels >= 0], labels[labels >= 0], f"subset {part}")
        return SubsetLoaders(pruning=self.get_scoring_loader("selected"), **parts)

    def get_small_train_loader(self) -> BatchLoader:
        """`num_pruning_samples` training images, drawn over all classes alike: class-agnostic scoring."""
        wanted, rows = self.settings.num_pruning_samples, self._rows["train"]
        if len(rows) < wanted:
            self._warn(f"num_pruning_samples: {wanted}; only {len(rows)} training images to score on")
        drawn = rows[sorted(random.Random(self._agnostic_seed).sample(range(len(rows)), min(wanted, len(rows))))]
        absent = sorted(set(self._labels_of("train").tolist()) - set(self._labels["train"][drawn].tolist()))
        if absent:
            names = ", ".join(self.class_names[label] for label in absent[:5]) + (", ..." if len(absent) > 5 else "")
            self._warn(f"num_pruning_samples: {wanted}; {len(absent)} classes have no image to score on: {names}")
        return self._sample(drawn, "all")

    def get_scoring_loader(self, scoring_classes: str) -> BatchLoader:
        """The training images that a criterion scores on: in dataset order, not augmented, original labels.

        selected: of the selected classes, as many of each. complement: of the classes that are not selected, likewise.
        all: `get_small_train_loader()`.
        """
        if scoring_classes == "selected":
            return self._sample(self._balanced_rows(self.settings.selected_classes), "pruning")
        if scoring_classes == "all":
            return self.get_small_train_loader()
        if scoring_classes != "complement":
            raise ConfigError(f"pruning.scoring_classes: {scoring_classes}; valid: selected, all, complement")
        others = set(self._labels_of("train").tolist()) - set(self.settings.selected_classes)
        if not others:
            raise BenchmarkError("pruning.scoring_classes: complement; no training image is of a class not selected")
        if len(others) > self.settings.num_pruning_samples:
            drawn = random.Random(self._agnostic_seed).sample(sorted(others), self.settings.num_pruning_samples)
            self._warn(
                f"num_pruning_samples: {len(drawn)}; {len(others)} classes are not selected, "
                f"{len(others) - len(drawn)} of them have no image to score on"
            )
            others = set(drawn)
        return self._sample(self._balanced_rows(sorted(others)), "complement")

    def selecting(self, settings: Any) -> "DataLoaderFactory":
        """The same data, not read again, for settings with other selected classes."""
        other = copy.copy(self)
        other.settings = settings
        other.warnings = list(self.warnings)
        other._check_classes()
        return other

    def fingerprint(self) -> str:
        """Hash of what the three parts hold, in what order and how it is normalised.

        Of datasets in memory the pixels enter. Of folders the files' relative paths and sizes do, since reading them
        all takes too long: a file rewritten in place with as many bytes goes unnoticed.
        """
        if self._fingerprint is None:
            dataset = self.settings.dataset
            facts = (dataset.name, dataset.num_classes, dataset.image_size, self.mean, self.std, self.flip)
            digest = hashlib.sha256(repr(facts).encode())
            for part, rows in self._rows.items():
                digest.update(f"{part} {len(rows)}".encode())
                digest.update(self._labels_of(part).numpy().tobytes())
                self._hash(digest, _source(part), rows)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """What the data are, as JSON can hold it: `fingerprint()`, and of each part the images of each class."""
        names = self.class_names
        counts = {
            part: dict(zip(names, torch.bincount(self._labels_of(part), minlength=len(names)).tolist(), strict=True))
            for part in self._rows
        }
        labels = {part: hashlib.sha256(self._labels_of(part).numpy().tobytes()).hexdigest() for part in self._rows}
        return {"fingerprint": self.fingerprint(), "labels_sha256": labels, "images": counts}

    # How it is done

    def _find(self) -> Any:
        """What `place` finds, fetched first when it is missing and wanted."""
        dataset = self.settings.dataset
        if dataset.download and self.place.find(dataset) is None:
            download(dataset.name, self.root)
        return self.place.locate(dataset)

    def _split(self, groups: Tensor | None) -> dict[str, Tensor]:
        """Ascending rows of each part, those of train and validation in the training images."""
        dataset, seed = self.settings.dataset, self.settings.seed
        rows = {source: torch.arange(len(labels)) for source, labels in self._labels.items()}
        if dataset.samples_per_class is not None:
            for source, labels in self._labels.items():
                rows[source] = pick_per_class(labels, dataset.samples_per_class, seed, f"samples {source}")
        pool = rows["train"]
        groups = None if groups is None else groups[pool]
        train, validation = stratified_split(
            self._labels["train"][pool], dataset.validation_fraction, seed, "validation", groups
        )
        return {"train": pool[train], "validation": pool[validation], "test": rows["test"]}

    def _labels_of(self, part: str) -> Tensor:
        return self._labels[_source(part)][self._rows[part]]

    def _check_labels(self) -> None:
        limit = self.settings.dataset.num_classes - 1
        for source, labels in self._labels.items():
            outside = labels[(labels < 0) | (labels > limit)]
            if len(outside):
                raise BenchmarkError(
                    f"{self.title}: label {outside[0].item()} in the {source} images; "
                    f"dataset.num_classes={limit + 1} allows 0 to {limit}"
                )

    def _check_classes(self) -> None:
        for part in self._rows:
            present = set(self._labels_of(part).tolist())
            absent = [c for c in range(self.settings.dataset.num_classes) if c not in present]
            names = [self.class_names[c] for c in absent if c in self.settings.selected_classes]
            if names and part != "validation":
                raise BenchmarkError(
                    f"selected_classes: {', '.join(names)}; no {part} image of it in {self.title} at {self.root}"
                )
            if absent:
                listed = ", ".join(self.class_names[c] for c in absent[:5]) + (", ..." if len(absent) > 5 else "")
                self._warn(f"{self.title}: {len(absent)} classes without a {part} image: {listed}")

    def _part(self, part: str, rows: Tensor, labels: Tensor, name: str) -> BatchLoader:
        training = part == "train"
        if not len(rows):
            raise BenchmarkError(
                f"dataset.validation_fraction: {self.settings.dataset.validation_fraction}; leaves the {name} part of "
                f"{self.title} empty, each class needs two images (GTSRB: two tracks) to be split"
            )
        batch_size = self.settings.training.batch_size_train if training else self.settings.training.batch_size_test
        augment = training and self.settings.training.use_data_augmentation
        return self._build(part, rows, labels, name, batch_size=batch_size, shuffle=training, augment=augment)

    def _build(self, part: str, rows: Tensor, labels: Tensor, name: str, **options: Any) -> BatchLoader:
        common = {"mean": self.mean, "std": self.std, "seed": self.settings.seed, "device": self.device, "name": name}
        return self._loader(_source(part), rows, labels, **common, **options)

    def _sample(self, rows: Tensor, name: str) -> BatchLoader:
        batch_size = self.settings.training.batch_size_test
        labels = self._labels["train"][rows]
        return self._build("train", rows, labels, name, batch_size=batch_size, shuffle=False, augment=False)

    def _balanced_rows(self, classes: Sequence[int]) -> Tensor:
        """As many training rows of each class, `num_pruning_samples` in all; the classes of lowest index take one more
        each when it does not divide. Not the first of the list: a selection must not depend on the list's order."""
        wanted = self.settings.num_pruning_samples
        if wanted < len(classes):
            raise ConfigError(f"num_pruning_samples: {wanted}; {len(classes)} selected classes need at least one each")
        share, rest = divmod(wanted, len(classes))
        available = dict(rows_by_class(self._labels_of("train")))
        drawn = []
        for position, label in enumerate(sorted(classes)):
            count, rows = share + (position < rest), self._rows["train"][available[label]]
            if len(rows) < count:
                found = f"{count} of class {self.class_names[label]} wanted, only {len(rows)} among the training images"
                self._warn(f"num_pruning_samples: {wanted}; {found}")
            drawn.append(pick(rows, count, sampling_seed(self.settings), f"pruning/{label}"))
        return torch.cat(drawn).sort().values

    @property
    def _agnostic_seed(self) -> int:
        """42 unless one is given: the sample over all classes is the same in every run."""
        return 42 if self.settings.sampling_seed is None else self.settings.sampling_seed

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            log.warning(text)


def sampling_seed(settings: Any) -> int:
    """What the scoring images of classes are drawn by."""
    return settings.seed if settings.sampling_seed is None else settings.sampling_seed


def _source(part: str) -> str:
    return "test" if part == "test" else "train"
