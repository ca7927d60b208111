"""Classes chosen by a rule: at random, or by how alike they look to the dense network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ENUMERATED = 50_000  # subsets; of more, one is built class by class


def random_subset(classes: int, size: int, seed: int) -> tuple[int, ...]:
    """`size` of so many classes, ascending; a function of its arguments alone."""
    return tuple(sorted(random.Random(f"subset {size} {seed}").sample(range(classes), size)))


def alike(confusion: np.ndarray, size: int, rule: str) -> tuple[int, ...]:
    """The `size` classes that are confused most (`similar`) or least (`distinct`) with each other, ascending.

    Args:
        confusion: [classes, classes], entry (i, j) the mean probability that an image of class i is given for class j.
        size: 2 or more.
        rule: similar | distinct.

    Of what the classes of a subset give to each other, the sum over all ordered pairs is as large, or as small, as can
    be; ties go to the lower indices. Among more than 50,000 subsets, the best pair is extended by the best class.
    """
    import numpy as np  # a random subset is told without it

    mutual = (confusion + confusion.T) * (1 if rule == "similar" else -1)
    np.fill_diagonal(mutual, 0)
    count = len(mutual)
    if comb(count, size) <= ENUMERATED:
        return max(combinations(range(count), size), key=lambda chosen: _within(mutual, chosen))
    chosen = max(combinations(range(count), 2), key=lambda pair: mutual[pair])
    while len(chosen) < size:
        others = [index for index in range(count) if index not in chosen]
        best = max(others, key=lambda index: mutual[index, list(chosen)].sum())
        chosen = (*chosen, best)
    return tuple(sorted(chosen))


def _within(mutual: np.ndarray, chosen: Sequence[int]) -> float:
    return float(mutual[list(chosen)][:, list(chosen)].sum())


def soft_confusion(model: Any, loader: Any, classes: int, device: Any = "cpu") -> np.ndarray:
    """[classes, classes]: the mean probability that an image of class i is given for class j.

    Probabilities rather than decisions: a good network confuses too few images to rank pairs of classes by.
    """
    import torch

    from helpers import evaluating

    totals = torch.zeros(classes, classes, dtype=torch.float64)
    counts = torch.zeros(classes, dtype=torch.float64)
    with torch.inference_mode(), evaluating(model):
        for images, labels in loader:
            shares = model(images.to(device)).softmax(dim=1).double().cpu()
            totals.index_add_(0, labels.cpu(), shares)
            counts += torch.bincount(labels.cpu(), minlength=classes)
    return (totals / counts.clamp_min(1)[:, None]).numpy()
