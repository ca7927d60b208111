"""Matched random: in each layer as many filters as another method removes there, drawn at random.

The control that separates which filters a method takes from how many it takes in each layer. The order of the draw is a
function of the seed and the layer's name, so that the filters are those of no method, and the counts exactly its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from errors import ConfigError
from filter_selection.base import REGISTRY, Batches, Criterion, FilterIndices, Scores, get_criterion, register
from helpers import generator
from schema import convert, kind_of_default
from settings import method_options
from structure import ModelGraph


@register("matched_random")
class MatchedRandom(Criterion):
    """Its scores are the matched method's; with the selections of a file, the order of the draw.

    Args:
        matched_method: the method whose counts are taken.
        matched_options: that method's own keys where they differ from its YAML, as a mapping or as texts `key=value`.
        matched_selections: the selections.json of a run, whose counts are taken instead.
    """

    def __init__(
        self,
        *,
        matched_method: str,
        matched_options: Mapping[str, Any] | Sequence[str],
        matched_selections: str | None,
        seed: int = 0,
    ):
        super().__init__(seed=seed)
        self.path = matched_selections
        self.given = None if matched_selections is None else _counts_of_file(matched_selections)
        self.matched = None
        if self.given is not None:
            self.needs_data, self.nested, self.exact = False, False, False
            self.none_because = f"there go none in {matched_selections}"
            return
        others = sorted(REGISTRY.keys() - {self.name})
        if matched_method not in others:
            raise ConfigError(
                f"pruning.matched_method: {matched_method!r} cannot be matched; valid: {', '.join(others)}"
            )
        self.matched = get_criterion(matched_method, _options(matched_method, matched_options), seed=seed)
        for fact in ("needs_data", "class_aware", "scopes", "nested", "exact", "combinations", "none_because"):
            setattr(self, fact, getattr(self.matched, fact))

    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        if self.matched is not None:
            return self.matched.compute(graph, layers, batches)
        drawn = {layer: self._drawn(layer, graph.conv(layer).out_channels) for layer in layers}
        return {layer: torch.argsort(order).double() for layer, order in drawn.items()}

    def select(self, scores: Scores, ratio: float, scope: str, min_filters: int = 1) -> FilterIndices:
        if self.matched is not None:
            matched = self.matched.select(scores, ratio, scope, min_filters)
            counts = {layer: len(filters) for layer, filters in matched.items()}
        else:
            counts = self._counts_at(ratio, scores, min_filters)
        return {
            layer: sorted(self._drawn(layer, len(scores[layer]))[:count].tolist())
            for layer, count in counts.items()
            if count
        }

    def combine(self, values: Sequence[Tensor], how: str) -> Tensor:
        return super().combine(values, how) if self.matched is None else self.matched.combine(values, how)

    def ranks(self, layer: str, values: Tensor, ratio: float, min_filters: int) -> Tensor:
        return torch.argsort(self._drawn(layer, len(values)))

    def _drawn(self, layer: str, filters: int) -> Tensor:
        """The layer's filters in the order in which they are removed."""
        return torch.randperm(filters, generator=generator(self.seed, f"{self.name}/{layer}"))

    def _counts_at(self, ratio: float, scores: Scores, min_filters: int) -> dict[str, int]:
        key = f"pruning.matched_selections: {self.path}"
        if ratio not in self.given:
            raise ConfigError(f"{key}; has no ratio {ratio}, it has {', '.join(map(str, self.given))}")
        for layer, count in self.given[ratio].items():
            if layer not in scores:
                raise ConfigError(f"{key}; removes filters of {layer}, which this run does not choose by itself")
            if count > len(scores[layer]) - min_filters:
                raise ConfigError(
                    f"{key}; removes {count} of the {len(scores[layer])} filters of {layer} at ratio {ratio}, where "
                    f"pruning.min_filters={min_filters} must stay"
                )
        return self.given[ratio]


def _options(method: str, given: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    defaults = method_options(method)
    try:
        changed = given if isinstance(given, Mapping) else OmegaConf.to_object(OmegaConf.from_dotlist(list(given)))
    except Exception as error:  # whatever the parser raises
        raise ConfigError(f"pruning.matched_options: {given}; must be a list of texts key=value") from error
    unknown = [key for key in changed if key not in defaults]
    if unknown:
        raise ConfigError(
            f"pruning.matched_options: {unknown[0]!r} is no key of {method}; valid: {', '.join(defaults) or 'none'}"
        )
    kinds = {key: kind_of_default(value) for key, value in defaults.items()}
    return defaults | {key: convert(f"pruning.matched_options: {key}", changed[key], kinds[key]) for key in changed}


def _counts_of_file(path: str) -> dict[float, dict[str, int]]:
    """Ratio -> layer -> filters removed."""
    try:
        with open(path, encoding="utf-8") as file:
            blocks = json.load(file)
        return {
            float(block["ratio"]): {layer: len(filters) for layer, filters in block["filters_removed"].items()}
            for block in blocks
        }
    except OSError as error:
        raise ConfigError(f"pruning.matched_selections: {path}; cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"pruning.matched_selections: {path}; is not the selections.json of a run") from error
