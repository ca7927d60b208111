"""For each class, the share of its images on which a filter does something.

A state [classes, filters + 1] holds counts by original label, the images of the class in its last column. Counts are
whole numbers, so that the cut into batches leaves no trace.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def no_images(filters: int) -> Tensor:
    """The state before any image."""
    return torch.zeros(0, filters + 1, dtype=torch.int64)


def add_images(state: Tensor, hits: Tensor, labels: Tensor) -> Tensor:
    """The state after one more batch: hits [N, C], true where the filter does it on the image, and labels [N]."""
    missing = int(labels.max()) + 1 - len(state)
    state = F.pad(state, (0, 0, 0, max(missing, 0)))
    counts = F.pad(hits.long(), (0, 1), value=1)
    return state.index_add(0, labels.to(state.device), counts)


def shares(state: Tensor) -> Tensor:
    """[classes with images, C], each in [0, 1]."""
    images = state[:, -1:]
    seen = images[:, 0] > 0
    return state[seen, :-1].double() / images[seen]
