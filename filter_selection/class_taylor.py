"""Class-count Taylor. Jiang et al., Class-Aware Pruning for Efficient Neural Networks, DATE 2024, arXiv 2312.05875.

s(f, k) = share of class k's images on which |a * dL/da| exceeds a threshold at some pixel of f's response a;
score(f) = sum_k s(f, k) over the classes scored: for how many of them the filter matters.
"""

from __future__ import annotations

from torch import Tensor

from errors import ConfigError
from filter_selection.base import Scores, refuse_all_zero, register
from filter_selection.class_shares import add_images, no_images, shares
from filter_selection.gradients import GradientCriterion


@register("class_taylor")
class ClassTaylor(GradientCriterion):
    class_aware = True

    def __init__(self, *, threshold: float, seed: int = 0):
        super().__init__(seed=seed)
        if threshold < 0:
            raise ConfigError(f"pruning.threshold: {threshold} is exceeded everywhere; valid: 0 or more")
        self.threshold = threshold

    def start(self, filters: int) -> Tensor:
        return no_images(filters)

    def observe(self, state: Tensor, response: Tensor, gradient: Tensor, labels: Tensor) -> Tensor:
        change = (response * gradient).abs_().amax(dim=(2, 3))
        return add_images(state, change > self.threshold, labels)

    def finish(self, state: Tensor, images: int) -> Tensor:
        return shares(state).sum(dim=0)

    def compute(self, *args) -> Scores:
        reason = f"none of its filters exceeds pruning.threshold={self.threshold} on any image; lower it"
        return refuse_all_zero(self.name, super().compute(*args), reason)
