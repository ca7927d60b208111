"""OCAP: on-device class-aware pruning. Ma et al., Journal of Systems Architecture, 2023.

Every image of the selected classes ranks a layer's filters by the L2 norm of their activated response; at ratio r it
votes to remove its floor(C * r) weakest. `union`: a filter goes only if *every* image removes it (the kept sets are
united, the paper's AB), so the achieved ratio is an outcome. `frequency`: the floor(C * r) filters kept by the fewest
images go (the paper's FR).

An image's vote depends on the ratio only through its ranking, so one integer a filter answers every ratio: the
highest rank an image ever gave it (union), or how often each rank was given (frequency).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import ConfigError
from filter_selection.base import FilterIndices, ResponseCriterion, Scores, combined, register
from helpers import share_of


@register("ocap")
class OCAP(ResponseCriterion):
    """Scores: union [C], the highest rank any image gave; frequency [C, C], column k: images that keep the filter
    when they remove k."""

    class_aware = True
    none_because = "the images agree on no filter"
    scopes = ("layer",)

    def __init__(
        self,
        *,
        activation_func: str,
        negative_slope: float,
        aggregation: str,
        seed: int = 0,
    ):
        super().__init__(seed=seed)
        activations = {
            "leaky_relu": lambda response: F.leaky_relu(response, negative_slope),
            "relu": F.relu,
            "identity": torch.clone,
        }
        if activation_func not in activations:
            raise ConfigError(
                f"pruning.activation_func: {activation_func!r} is unknown; valid: {', '.join(activations)}"
            )
        if aggregation not in ("union", "frequency"):
            raise ConfigError(f"pruning.aggregation: {aggregation!r} is unknown; valid: union, frequency")
        self.activate = activations[activation_func]
        self.aggregation = aggregation
        self.nested = aggregation == "union"  # counts at one ratio say nothing of the counts at another
        self.exact = aggregation == "frequency"
        if aggregation == "union":
            self.combinations = ("max", "mean")  # of ranks: the largest still means that every image agrees

    def start(self, filters: int) -> Tensor:
        shape = (filters,) if self.aggregation == "union" else (filters, filters)
        return torch.zeros(shape, dtype=torch.int64)

    def observe(self, state: Tensor, response: Tensor, labels: Tensor) -> Tensor:
        ranks = ranks_of(self.activate(response).square_().sum(dim=(2, 3)))
        if self.aggregation == "union":
            return torch.maximum(state, ranks.amax(dim=0))
        return state.scatter_add_(1, ranks.T.contiguous(), torch.ones_like(ranks.T))

    def finish(self, state: Tensor, images: int) -> Tensor:
        if self.aggregation == "union":
            return state
        return state.flip(1).cumsum(1).flip(1)  # [filter, k]: images that rank the filter k or higher

    def select(self, scores: Scores, ratio: float, scope: str = "layer", min_filters: int = 1) -> FilterIndices:
        chosen = {}
        for layer, values in scores.items():
            votes = votes_of(len(values), ratio, min_filters)
            ranks = self.ranks(layer, values, ratio, min_filters)
            removed = torch.argsort(ranks, stable=True)[:votes]
            if self.aggregation == "union":
                removed = removed[ranks[removed] < votes]
            if len(removed):
                chosen[layer] = sorted(removed.tolist())
        return chosen

    def ranks(self, layer: str, values: Tensor, ratio: float, min_filters: int) -> Tensor:
        return values if self.aggregation == "union" else values[:, votes_of(len(values), ratio, min_filters)]

    def combine(self, values: Sequence[Tensor], how: str) -> Tensor:
        """Ranks and counts are of one scale in all layers."""
        return combined(torch.stack([layer.double() for layer in values]), how)


def votes_of(filters: int, ratio: float, min_filters: int) -> int:
    """How many of a layer's filters each image removes."""
    return max(min(share_of(ratio, filters), filters - min_filters), 0)


def ranks_of(strength: Tensor) -> Tensor:
    """[N, C] -> the position of each filter in its image's ascending order, ties by index.

    The squared norm ranks as the norm does, so the root is never taken.
    """
    order = torch.argsort(strength, dim=1, stable=True)
    positions = torch.arange(strength.shape[1], device=strength.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions)
