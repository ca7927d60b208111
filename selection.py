"""From scores to filters: scored once, every ratio answered from that one score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from errors import ConfigError
from filter_selection import Criterion, FilterIndices, Scores, get_criterion
from filter_selection.base import Batches
from helpers import share_of
from settings import declaration
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
        round_to: a layer that loses filters keeps a multiple of so many, or all; the best of those chosen stay.
        coupled_scores: `mean`, `sum` or `max` of the scores of filters that go together (`coupled` networks).

    Raises:
        ConfigError: a scope or a combination that the method does not have, or a number below 1.
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
        round_to: int = 1,
        coupled_scores: str = "mean",
    ):
        if scope not in criterion.scopes:
            raise ConfigError(
                f"pruning.pruning_scope: {scope!r} is not a scope of {criterion.name}; "
                f"valid: {', '.join(criterion.scopes)}"
            )
        if min_filters < 1:
            raise ConfigError(f"pruning.min_filters: {min_filters} would empty a layer; valid: 1 or more")
        if round_to < 1:
            raise ConfigError(f"pruning.round_to: {round_to}; valid: 1 or more")
        if coupled_scores not in criterion.combinations:
            raise ConfigError(
                f"pruning.coupled_scores: {coupled_scores!r} of its scores says nothing to {criterion.name}; "
                f"valid: {', '.join(criterion.combinations)}"
            )
        self.criterion = criterion
        self.ratios = tuple(ratios)
        self.input_shape = input_shape
        self.batches = batches
        self.scope = scope
        self.skip_first_layers = skip_first_layers
        self.min_filters = min_filters
        self.round_to = round_to
        self.coupled_scores = coupled_scores

    def left_out(self, graph: ModelGraph) -> dict[str, str]:
        """Convolutions that are never pruned -> the reason."""
        first = dict.fromkeys(
            graph.convs[: self.skip_first_layers], f"among the first {self.skip_first_layers} (model.skip_first_layers)"
        )
        left_out = first | graph.left_out
        tied = {
            layer: f"tied to {held[0]}, which is left out"
            for layer in graph.convs
            if layer not in left_out and (held := [other for other in graph.streams[layer] if other in left_out])
        }
        return left_out | tied

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
        graph = self._graph(model)
        if scores is None:
            scores = self.score(graph)
        choose = self.chooser(graph, scores)
        chosen = {ratio: choose(ratio) for ratio in self.ratios}
        empty = [
            ratio
            for ratio, indices in chosen.items()
            if ratio and not indices and (self.criterion.exact or not self._asked(graph, ratio, self.min_filters))
        ]
        if empty:
            widest = max(map(len, scores.values()))
            raise ConfigError(
                f"pruning.pruning_ratio: {empty[0]} removes no filter, the widest layer has {widest} of which "
                f"{self._floor()} stay; give a larger ratio"
            )
        return chosen

    def chooser(self, graph: ModelGraph, scores: Scores) -> Callable[[float], FilterIndices]:
        """Ratio -> layer -> filters to remove, from the same scores."""
        choices = self._combined(graph, scores)
        return lambda ratio: self._chosen(graph, choices, ratio) if ratio else {}

    def shortfall(self, graph: ModelGraph, ratio: float, indices: FilterIndices) -> str | None:
        """What a reader must know when fewer filters go than the ratio asks for, else None.

        A method that is not exact (OCAP's union) achieves less by its nature, and the achieved ratio says how much.
        That is worth a word only where it removes nothing, or where a floor or `round_to` may have kept some.
        """
        asked = self._asked(graph, ratio)
        removed = sum(map(len, indices.values()))
        exact = self.criterion.exact
        held = exact or self.round_to > 1 or self._asked(graph, ratio, self.min_filters) < asked
        if removed >= asked or (removed and not held):
            return None
        reasons = [f"{self._floor()} stay"] * held
        if exact and graph.residual == "coupled" and self.scope == "global":
            reasons.append("filters that go together count once in the ranking")
        if not exact:
            reasons.append(self.criterion.none_because if not removed else "the method removes what it agrees on alone")
        reason = ", and ".join(reasons)
        return f"{removed} filters go at ratio {ratio:g}, which asks for {asked}: {reason}"

    def _asked(self, graph: ModelGraph, ratio: float, min_filters: int = 0) -> int:
        """How many filters a ratio asks for; with a floor, how many of them each layer can spare at most."""
        widths = [graph.conv(layer).out_channels for layer in self.layers(graph)]
        if self.scope == "layer":
            return sum(max(min(share_of(ratio, width), width - min_filters), 0) for width in widths)
        return min(share_of(ratio, sum(widths)), sum(max(width - min_filters, 0) for width in widths))

    def _floor(self) -> str:
        multiple = f" and a multiple of pruning.round_to={self.round_to}" if self.round_to > 1 else ""
        return f"pruning.min_filters={self.min_filters}{multiple}"

    @staticmethod
    def _lead(graph: ModelGraph, layer: str) -> str:
        """The layer that stands for all whose filters go together."""
        return graph.streams[layer][0] if graph.residual == "coupled" else layer

    def _combined(self, graph: ModelGraph, scores: Scores) -> Scores:
        """The scores of what is chosen as one: filters that go together have one value, under their first layer."""
        together: dict[str, list[Tensor]] = {}
        for layer, values in scores.items():
            lead = self._lead(graph, layer)
            together.setdefault(lead, []).append(
                values if lead == layer else values[graph.channels.places(lead, layer)]
            )
        return {
            lead: self.criterion.combine(values, self.coupled_scores) if len(values) > 1 else values[0]
            for lead, values in together.items()
        }

    def _chosen(self, graph: ModelGraph, choices: Scores, ratio: float) -> FilterIndices:
        chosen = self.criterion.select(choices, ratio, self.scope, self.min_filters)
        if self.round_to > 1:
            chosen = self._rounded(chosen, choices, ratio)
        if graph.residual != "coupled":
            return chosen
        spread = {}
        for layer in self.layers(graph):
            lead = self._lead(graph, layer)
            if lead in chosen:
                spread[layer] = sorted(graph.channels.places(lead, layer)[chosen[lead]].tolist())
        return spread

    def _rounded(self, chosen: FilterIndices, choices: Scores, ratio: float) -> FilterIndices:
        """Fewer filters, so that each layer keeps a multiple of `round_to` or all; the lowest ranks still go."""
        rounded = {}
        for layer, filters in chosen.items():
            width = len(choices[layer])
            kept = -(-(width - len(filters)) // self.round_to) * self.round_to
            rank = self.criterion.ranks(layer, choices[layer], ratio, self.min_filters)
            removed = sorted(filters, key=lambda index: (rank[index], index))[: max(width - kept, 0)]
            if removed:
                rounded[layer] = sorted(removed)
        return rounded

    def _graph(self, model: nn.Module | ModelGraph) -> ModelGraph:
        return model if isinstance(model, ModelGraph) else ModelGraph(model, self.input_shape)


def get_selector(settings, factory) -> PruningSelection:
    """The selection that a run's settings ask for, its scoring images from `factory` (a `DataLoaderFactory`).

    Ratio 0 is always among its ratios, first if it was not asked for: nothing removed and the head replaced is what
    every other figure is read against, since slicing the head alone raises the accuracy.
    """
    pruning = settings.pruning
    asked = pruning.pruning_ratio if pruning.match is None else (0.0,)
    asked = asked if 0.0 in asked else (0.0, *asked)
    criterion = get_criterion(pruning.name, pruning.options, seed=settings.seed)
    usual = declaration("pruning", pruning.name)["scoring_classes"]  # null: those of the matched method
    if not criterion.needs_data and usual is not None and pruning.scoring_classes != usual:
        raise ConfigError(
            f"pruning.scoring_classes: {pruning.scoring_classes}; {pruning.name} reads no images as it is set up, "
            "leave the key out"
        )
    return PruningSelection(
        criterion,
        asked,
        factory.input_shape,
        factory.get_scoring_loader(pruning.scoring_classes) if criterion.needs_data else None,
        scope=pruning.pruning_scope,
        skip_first_layers=settings.model.skip_first_layers,
        min_filters=pruning.min_filters,
        round_to=pruning.round_to,
        coupled_scores=pruning.coupled_scores,
    )
