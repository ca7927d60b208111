"""Firing rates. CAP'NN, ACM TECS 2022, https://doi.org/10.1145/3520126.

rate(f, k) = share of class k's images on which filter f fires at all, its response above zero somewhere;
score(f) = max_k rate(f, k) over the classes scored. A filter goes when no class that matters ever wakes it.
"""

from __future__ import annotations

from torch import Tensor

from filter_selection.base import ResponseCriterion, Scores, refuse_all_zero, register
from filter_selection.class_shares import add_images, no_images, shares


@register("firing_rate")
class FiringRate(ResponseCriterion):
    class_aware = True

    def start(self, filters: int) -> Tensor:
        return no_images(filters)

    def observe(self, state: Tensor, response: Tensor, labels: Tensor) -> Tensor:
        return add_images(state, response.amax(dim=(2, 3)) > 0, labels)

    def finish(self, state: Tensor, images: int) -> Tensor:
        return shares(state).amax(dim=0)

    def compute(self, *args) -> Scores:
        return refuse_all_zero(self.name, super().compute(*args), "none of its filters ever fires")
