"""Names of the classes of every dataset, and the way from what a user typed to class indices.

Imports neither torch nor torchvision, so that a wrong class is answered before either is loaded.

A dataset is anything with the attributes `name`, `root` (str or None) and `num_classes`.
"""

import difflib
import functools
import importlib.util
import os
import re
import runpy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import ConfigError

DIGITS = tuple("0123456789")
# README of github.com/zalandoresearch/fashion-mnist, "Labels".
FASHION_MNIST = (
    "t_shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot",
)  # fmt: skip
# batches.meta of cifar-10-python.tar.gz, https://www.cs.toronto.edu/~kriz/cifar.html
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# What the sign of each class id means, in our words; the ids are those of Stallkamp et al., Neural Networks 32, 2012.
GTSRB = (
    "speed_limit_20", "speed_limit_30", "speed_limit_50", "speed_limit_60", "speed_limit_70", "speed_limit_80",
    "end_of_speed_limit_80", "speed_limit_100", "speed_limit_120", "no_passing", "no_passing_over_3_5_tons",
    "right_of_way_at_next_intersection", "priority_road", "yield", "stop", "no_vehicles", "no_vehicles_over_3_5_tons",
    "no_entry", "general_caution", "dangerous_curve_left", "dangerous_curve_right", "double_curve", "bumpy_road",
    "slippery_road", "road_narrows_on_the_right", "road_work", "traffic_signals", "pedestrians", "children_crossing",
    "bicycles_crossing", "beware_of_ice_or_snow", "wild_animals_crossing", "end_of_all_limits", "turn_right_ahead",
    "turn_left_ahead", "ahead_only", "go_straight_or_right", "go_straight_or_left", "keep_right", "keep_left",
    "roundabout_mandatory", "end_of_no_passing", "end_of_no_passing_over_3_5_tons",
)  # fmt: skip
# github.com/fastai/imagenette; the index of a class is the position of its wnid in sorted order.
IMAGENETTE = (
    "tench", "english_springer", "cassette_player", "chain_saw", "church", "french_horn", "garbage_truck", "gas_pump",
    "golf_ball", "parachute",
)  # fmt: skip
IMAGENETTE_WNIDS = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413",
    "n03445777", "n03888257",
)  # fmt: skip

# Ten classes of ImageNet that look alike, ships and boats, and ten that do not, from daisies to web sites:
# github.com/hpides/ClassAwarePruning, README, "Data Subsets".
IMAGENET_SUBSETS = {
    "similar": (472, 484, 554, 576, 625, 628, 724, 780, 814, 871),
    "distinct": (51, 107, 145, 398, 483, 812, 916, 924, 970, 985),
}

FACTS = {
    "digits": DIGITS,
    "fashion_mnist": FASHION_MNIST,
    "cifar10": CIFAR10,
    "gtsrb": GTSRB,
    "imagenette": IMAGENETTE,
}


def class_names(dataset: Any) -> tuple[str, ...]:
    """Names of all classes of `dataset`, by index; no two are alike, not even without case, spaces or hyphens.

    Raises ConfigError when `dataset.num_classes` is not what the dataset has.
    """
    if dataset.name in FACTS:
        names, found_in = FACTS[dataset.name], dataset.name
    elif dataset.num_classes == 1000:
        folders = _class_folders(dataset)
        _check_count(dataset, folders, _train_folder(dataset))
        names, found_in = _imagenet_categories(), "torchvision's list of ImageNet categories"
    else:
        names, found_in = _class_folders(dataset), _train_folder(dataset)
        if not names:
            raise ConfigError(
                f"dataset.root: {dataset.root}; no class folders in {found_in}, and only with "
                "dataset.num_classes=1000 are the classes known without them"
            )
    _check_count(dataset, names, found_in)
    return _told_apart(names)


def resolve_classes(given: Sequence[int | str], dataset: Any) -> tuple[int, ...]:
    """Class indices of `given` in the order given.

    An element is an index, or a name with any case and any of space, hyphen and underscore; for ImageNet and Imagenette
    also a wnid. A text of digits is an index unless it is itself a name. Raises ConfigError with what would be valid.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise ConfigError(f"selected_classes: {given}; must be a list, such as [0,1,2]")
    if not given:
        raise ConfigError("selected_classes: []; at least one class is needed")
    names = class_names(dataset)
    index_of = _lookup(names, *_aliases(dataset))
    resolved, unknown = [], []
    for item in given:
        found = _find(item, index_of, names, dataset)
        if len(found) > 1:
            choices = ", ".join(f"{index} ({names[index]})" for index in found)
            raise ConfigError(f"selected_classes: {item}; the name is ambiguous, give an index: {choices}")
        if found:
            resolved.append(found[0])
        else:
            unknown.append(_unknown(str(item), names, index_of))
    if unknown:
        raise ConfigError(f"selected_classes: {'; '.join(unknown)} [dataset {dataset.name}]")
    _refuse_duplicates(given, resolved, names)
    return tuple(resolved)


def class_folder_names(folder: Path) -> tuple[str, ...]:
    """Sorted names of the class folders in `folder`; empty when there is no such folder. Hidden ones do not count."""
    if not folder.is_dir():
        return ()
    try:
        return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] not in "._"))
    except OSError as error:
        raise ConfigError(f"dataset.root: {folder}; cannot be listed: {error.strerror}") from error


def _find(item: Any, index_of: dict[str, list[int]], names: Sequence[str], dataset: Any) -> list[int]:
    """Every class that `item` can mean: none, one, or the several that share a name."""
    if isinstance(item, bool) or not isinstance(item, (int, str)):
        raise ConfigError(f"selected_classes: {item!r}; an element must be a class index or a class name")
    if isinstance(item, str):
        found = index_of.get(_key(item), [])
        if found or not re.fullmatch(r"\s*[+-]?\d+\s*", item):
            return found
    index = int(item)
    if not 0 <= index < len(names):
        raise ConfigError(f"selected_classes: {index}; {dataset.name} has the classes 0 to {len(names) - 1}")
    return [index]


def _unknown(item: str, names: Sequence[str], index_of: dict[str, list[int]]) -> str:
    nearest = difflib.get_close_matches(_key(item), index_of, n=3, cutoff=0.5)
    if nearest:
        # dict.fromkeys: a name and its wnid lead to the same class, which is shown once
        shown = dict.fromkeys(names[index] for key in nearest for index in index_of[key])
        return f"{item} is no class, nearest: {', '.join(shown)}"
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"{item} is no class, valid: {listed} or the indices 0 to {len(names) - 1}"


def _refuse_duplicates(given: Sequence[int | str], resolved: Sequence[int], names: Sequence[str]) -> None:
    for position, index in enumerate(resolved):
        first = resolved.index(index)
        if first < position:
            raise ConfigError(
                f"selected_classes: {given[first]} and {given[position]}; both are class {index} ({names[index]}), "
                "each class may stand in the list once"
            )


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _lookup(*namings: Sequence[str]) -> dict[str, list[int]]:
    """Normalised name -> the classes that bear it, over several namings of the same classes by index."""
    index_of: dict[str, list[int]] = {}
    for naming in namings:
        for index, name in enumerate(naming):
            indices = index_of.setdefault(_key(name), [])
            if index not in indices:
                indices.append(index)
    return index_of


def _aliases(dataset: Any) -> list[Sequence[str]]:
    """Further namings of the classes: wnids, and the bare names that several ImageNet classes may share."""
    if dataset.name == "imagenette":
        return [IMAGENETTE_WNIDS]
    if dataset.name in FACTS or dataset.num_classes != 1000:
        return []
    return [_class_folders(dataset), _imagenet_categories()]


def _told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """`names`, those that are alike (ImageNet: "Cardigan" the dog, "cardigan" the garment) followed by their index."""
    uses = Counter(_key(name) for name in names)
    return tuple(f"{name} ({index})" if uses[_key(name)] > 1 else name for index, name in enumerate(names))


def _check_count(dataset: Any, names: Sequence[str], found_in: Any) -> None:
    if names and len(names) != dataset.num_classes:
        raise ConfigError(f"dataset.num_classes: {dataset.num_classes}; {found_in} has {len(names)} classes")


def _train_folder(dataset: Any) -> Path:
    return Path(dataset.root or ".").expanduser() / "train"


def _class_folders(dataset: Any) -> tuple[str, ...]:
    return class_folder_names(_train_folder(dataset))


@functools.cache
def _imagenet_categories() -> tuple[str, ...]:
    """The 1000 category names in the order of torchvision's weights, read without importing torchvision.

    torchvision keeps them in a plain list, `models/_meta.py`; importing the package would import torch.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("dataset.name: imagenet; torchvision, which knows the category names, is not installed")
    path = Path(spec.submodule_search_locations[0]) / "models" / "_meta.py"
    try:
        return tuple(runpy.run_path(str(path))["_IMAGENET_CATEGORIES"])
    except (OSError, KeyError) as error:
        raise ConfigError(f"dataset.name: imagenet; {path} does not hold the category names that it should") from error
