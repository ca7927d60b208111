"""From scores to filters: scored once, every ratio answered from that one score."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from errors import ConfigError
from filter_selection import Criterion, FilterIndices, Scores, get_criterion
from filter_selection.base import Batches
from structure import ModelGraph


class PruningSelection:
    """Chooses the filters of a network to remove, for every ratio.

    Args:
        criterion: the method that scores filters.
        ratios: shares of filters to remove, each in [0, 1), answered in this order.
        input_shape: (C, H, W) of one image.
        batches: scoring images with their original labels; None for a method that reads none.
        scope: `layer` or `global`, see `Criterion.select`.
        skip_first_layers: the first N convolutions, in the order of the graph, are never selected.
        min_filters: filters that stay in every layer, at least one.

    Raises:
        ConfigError: a scope that the method does not have.
    """

    def __init__(
        self,
        criterion: Criterion,
        ratios: Sequence[float],
        input_shape: tuple[int, int, int],
        batches: Batches | None = None,
        *,
        scope: str = "layer",
        skip_first_layers: int = 0,
        min_filters: int = 1,
    ):
        if scope not in criterion.scopes:
            raise ConfigError(
                f"pruning.pruning_scope: {scope!r} is not a scope of {criterion.name}; "
                f"valid: {', '.join(criterion.scopes)}"
            )
        if min_filters < 1:
            raise ConfigError(f"pruning.min_filters: {min_filters} would empty a layer; valid: 1 or more")
        self.criterion = criterion
        self.ratios = tuple(ratios)
        self.input_shape = input_shape
        self.batches = batches
        self.scope = scope
        self.skip_first_layers = skip_first_layers
        self.min_filters = min_filters

    def left_out(self, graph: ModelGraph) -> dict[str, str]:
        """Convolutions that are never pruned -> the reason."""
        first = dict.fromkeys(
            graph.convs[: self.skip_first_layers], f"among the first {self.skip_first_layers} (model.skip_first_layers)"
        )
        return first | graph.left_out

    def layers(self, graph: ModelGraph) -> tuple[str, ...]:
        """Convolutions that may be pruned, in the order of the graph.

        Raises:
            ConfigError: there is none.
        """
        left_out = self.left_out(graph)
        layers = tuple(layer for layer in graph.convs if layer not in left_out)
        if not layers:
            reasons = "; ".join(f"{layer}: {reason}" for layer, reason in list(left_out.items())[:3])
            raise ConfigError(
                f"model.skip_first_layers: {self.skip_first_layers} leaves no convolution to prune ({reasons}); "
                f"the model has {len(graph.convs)}, of which {len(graph.prunable)} can be pruned"
            )
        return layers

    def score(self, model: nn.Module | ModelGraph) -> Scores:
        """One pass: layer -> one value per filter. `model` may be its ready-made graph."""
        graph = self._graph(model)
        return self.criterion.score(graph, self.layers(graph), self.batches)

    def select(self, model: nn.Module | ModelGraph, scores: Scores | None = None) -> dict[float, FilterIndices]:
        """Ratio -> layer -> filters to remove, in the order of the ratios; scores the network first unless given.

        Raises:
            ConfigError: a ratio above 0 removes nothing, with a method that removes as many as it is asked to.
        """
        if scores is None:
            scores = self.score(model)
        chosen = {
            ratio: self.criterion.select(scores, ratio, self.scope, self.min_filters) if ratio else {}
            for ratio in self.ratios
        }
        empty = [ratio for ratio, indices in chosen.items() if ratio and not indices]
        if empty and self.criterion.exact:
            widest = max(map(len, scores.values()))
            raise ConfigError(
                f"pruning.pruning_ratio: {empty[0]} removes no filter, the widest layer has {widest} of which "
                f"pruning.min_filters={self.min_filters} stay; give a larger ratio"
            )
        return chosen

    def _graph(self, model: nn.Module | ModelGraph) -> ModelGraph:
        return model if isinstance(model, ModelGraph) else ModelGraph(model, self.input_shape)


def get_selector(settings, factory) -> PruningSelection:
    """The selection that a run's settings ask for, its scoring images from `factory` (a `DataLoaderFactory`).

    Ratio 0 is always among its ratios, first if it was not asked for: nothing removed and the head replaced is what
    every other figure is read against, since slicing the head alone raises the accuracy.
    """
    pruning = settings.pruning
    asked = pruning.pruning_ratio
    criterion = get_criterion(pruning.name, pruning.options, seed=settings.seed)
    return PruningSelection(
        criterion,
        asked if 0.0 in asked else (0.0, *asked),
        factory.input_shape,
        factory.get_scoring_loader(pruning.scoring_classes) if criterion.needs_data else None,
        scope=pruning.pruning_scope,
        skip_first_layers=settings.model.skip_first_layers,
        min_filters=pruning.min_filters,
    )
