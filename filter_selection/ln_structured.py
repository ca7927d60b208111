"""Filter norms. Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.

score(f) = ||W_f||_p over input channels and kernel, p in {1, 2}.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from errors import ConfigError
from filter_selection.base import Batches, Criterion, Scores, register
from structure import ModelGraph


@register("ln_structured")
class LnStructured(Criterion):
    needs_data = False

    def __init__(self, *, norm: int, seed: int = 0):
        super().__init__(seed=seed)
        if norm not in (1, 2):
            raise ConfigError(f"pruning.norm: {norm!r} is unknown; valid: 1, 2")
        self.norm = norm

    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        weights = {layer: graph.conv(layer).weight.detach() for layer in layers}
        return {layer: torch.linalg.vector_norm(weight, self.norm, dim=(1, 2, 3)) for layer, weight in weights.items()}
