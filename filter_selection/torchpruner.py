"""Attributions of a filter's response a to the loss L, as TorchPruner (Ancona) computes them.

taylor: mean_n |sum_hw a * dL/da|, what zeroing the response changes in L to first order. Molchanov et al., Pruning
Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017. Signed: mean_n -sum_hw a * dL/da, so that a
filter whose removal lowers the loss scores below zero.
sensitivity: mean_n sum_hw |dL/da|. Mittal et al., Recovering from Random Pruning, WACV 2018.
apoz: 1 - share of zeros of relu(a) over n, h, w; needs no gradient. Hu et al., Network Trimming, 2016.

Each layer's vector is divided by its L2 norm, so that layers compare in a global ranking.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errors import ConfigError
from filter_selection.base import Batches, Criterion, ResponseCriterion, Scores, refuse_all_zero, register
from filter_selection.gradients import GradientCriterion
from structure import ModelGraph


class Taylor(GradientCriterion):
    name = "torchpruner"
    signed = False

    def observe(self, state: Tensor, response: Tensor, gradient: Tensor, labels: Tensor) -> Tensor:
        change = -(response * gradient).sum(dim=(2, 3))
        return state + (change if self.signed else change.abs()).sum(dim=0)


class SignedTaylor(Taylor):
    signed = True


class Sensitivity(GradientCriterion):
    name = "torchpruner"

    def observe(self, state: Tensor, response: Tensor, gradient: Tensor, labels: Tensor) -> Tensor:
        return state + gradient.abs().sum(dim=(2, 3)).sum(dim=0)


class APoZ(ResponseCriterion):
    name = "torchpruner"

    """Positive responses and all of them are counted, so that filters that fire as often tie whatever the batches."""

    def start(self, filters: int) -> Tensor:
        return torch.zeros((filters, 2), dtype=torch.int64)

    def observe(self, state: Tensor, response: Tensor, labels: Tensor) -> Tensor:
        state[:, 0] += response.clone().gt_(0).sum(dim=(2, 3)).long().sum(dim=0)  # below 2^24 an image: exact
        state[:, 1] += response[:, 0].numel()
        return state

    def finish(self, state: Tensor, images: int) -> Tensor:
        return state[:, 0].double() / state[:, 1]


@register("torchpruner")
class TorchPruner(Criterion):
    def __init__(self, *, attribution: str, signed: bool, seed: int = 0):
        super().__init__(seed=seed)
        attributions = {"taylor": SignedTaylor if signed else Taylor, "apoz": APoZ, "sensitivity": Sensitivity}
        if attribution not in attributions:
            raise ConfigError(f"pruning.attribution: {attribution!r} is unknown; valid: {', '.join(attributions)}")
        if signed and attribution != "taylor":
            raise ConfigError(f"pruning.signed: true; {attribution} has no sign, only attribution=taylor has one")
        self.attribution = attribution
        self.attributing = attributions[attribution](seed=seed)

    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        attributed = self.attributing.compute(graph, layers, batches)
        reason = f"its {self.attribution} attributions are; does it never fire, or reach no logit?"
        refuse_all_zero(self.name, attributed, reason)
        return {layer: values / values.norm() for layer, values in attributed.items()}
