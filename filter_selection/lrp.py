"""Layer-wise relevance propagation. Yeom et al., Pruning by explaining, Pattern Recognition 115, 2021.

Relevance starts at the logit of an image's true class and is handed down layer by layer (rules: `relevance_rules`).
score(f) = sum_n sum_hw R at the response of filter f, or sum_n |sum_hw R|; divided by the layer's sum, so that layers
can be ranked together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from errors import BenchmarkError, ConfigError
from filter_selection.base import Batches, Criterion, Scores, progress, register
from helpers import evaluating
from relevance import RelevancePass
from relevance_rules import Rules
from structure import ModelGraph

WORDS = {
    "conv_rule": ("alpha1beta0", "alpha2beta1", "epsilon"),
    "first_layer": ("conv", "zbox"),
    "start": ("one", "logit"),
    "aggregation": ("signed", "absolute"),
    "normalisation": ("layer_sum", "none"),
}
CANCELLED = 1e-6  # a sum this small beside its summands is rounding error


@register("lrp")
class LRP(Criterion):
    """Options as in `config/pruning/lrp.yaml`."""

    class_aware = True

    def __init__(
        self,
        *,
        conv_rule: str,
        first_layer: str,
        epsilon: float,
        biases: bool,
        start: str,
        aggregation: str,
        normalisation: str,
        seed: int = 0,
    ):
        super().__init__(seed=seed)
        given = (conv_rule, first_layer, start, aggregation, normalisation)
        for (key, valid), word in zip(WORDS.items(), given, strict=True):
            if word not in valid:
                raise ConfigError(f"pruning.{key}: {word!r} is unknown; valid: {', '.join(valid)}")
        if epsilon <= 0:
            raise ConfigError(f"pruning.epsilon: {epsilon} does not stabilise; valid: a number above 0")
        self.rules = Rules(conv=conv_rule, first_layer=first_layer, epsilon=epsilon, biases=biases)
        self.start, self.aggregation, self.normalisation = start, aggregation, normalisation

    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        sums = {layer: torch.zeros(graph.conv(layer).out_channels, dtype=torch.float64) for layer in layers}

        def observe(layer: str, relevance: Tensor) -> None:
            per_image = relevance.sum(dim=(2, 3)).double()
            if self.aggregation == "absolute":
                per_image = per_image.abs()
            sums[layer] = sums[layer].to(per_image.device) + per_image.sum(dim=0)

        relevance_pass = RelevancePass(graph, layers, self.rules, observe)
        images_seen = 0
        for images, labels in progress(batches, self.name):
            relevance_pass.pass_batch(images, labels, self.start)
            images_seen += len(images)
        if not images_seen:
            raise BenchmarkError(f"{self.name}: there are no scoring images")
        return {layer: self._finished(layer, values) for layer, values in sums.items()}

    def explain(
        self,
        graph: ModelGraph,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Tensor:
        """Relevance of the pixels, [N, C, H, W] as the images: what `first_layer` decides, and no score depends on.

        mean, std: how pixels in [0, 1] were normalised, per channel. The rule `zbox` needs them for its bounds, which
        are then the same for every batch.

        Raises:
            ConfigError: `zbox` without them.
        """
        rules = self.rules
        if rules.first_layer == "zbox":
            if mean is None or std is None:
                raise ConfigError("pruning.first_layer: 'zbox' needs the mean and std that images were normalised by")
            mean, std = (torch.as_tensor(each, dtype=images.dtype).view(1, -1, 1, 1) for each in (mean, std))
            rules = replace(rules, low=-mean / std, high=(1 - mean) / std)
        with evaluating(graph.model):
            relevance_pass = RelevancePass(graph, (), rules, lambda layer, relevance: None, to_pixels=True)
            return relevance_pass.pass_batch(images, labels, self.start)[0]

    def _finished(self, layer: str, values: Tensor) -> Tensor:
        if not values.any():
            raise BenchmarkError(f"{self.name}: no relevance reaches {layer}; are its weights or responses all zero?")
        if self.normalisation == "none":
            return values
        # Its size only: a branch that works against the class has a negative sum, which would reverse its order.
        total = values.sum().abs()
        if total <= CANCELLED * values.abs().sum():
            raise BenchmarkError(
                f"{self.name}: positive and negative relevance of {layer} cancel, there is no sum to divide by; "
                "use pruning.aggregation=absolute or pruning.normalisation=none"
            )
        return values / total
