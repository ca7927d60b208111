"""Random filters, the control that every criterion has to beat.

Each layer draws from a generator of its own, seeded by the run's seed and the layer's name: the selection does not
depend on which other layers are pruned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from filter_selection.base import Batches, Criterion, Scores, register
from helpers import generator
from structure import ModelGraph


@register("random")
class Random(Criterion):
    needs_data = False
    scopes = ("layer",)

    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        return {
            layer: torch.rand(graph.conv(layer).out_channels, generator=generator(self.seed, f"random/{layer}"))
            for layer in layers
        }
