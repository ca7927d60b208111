"""What every criterion shares: the registry, the pass over the scoring images, the taps and the checks.

A criterion's own file is then its paper, its formula and its maths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, fx
from tqdm import tqdm

from errors import BenchmarkError, ConfigError
from helpers import Batches, evaluating, share_of
from settings import method_options
from structure import ModelGraph, Tap

Scores = dict[str, Tensor]
"""Layer -> one finite value per filter (first dimension: filters), higher = keep, on CPU."""

FilterIndices = dict[str, list[int]]
"""Layer -> the filters to remove, sorted and unique; a layer that keeps all of its filters is absent."""

REGISTRY: dict[str, type[Criterion]] = {}


def register(name: str) -> Callable[[type[Criterion]], type[Criterion]]:
    """Class decorator: makes a criterion known as `pruning.name=<name>`."""

    def add(criterion: type[Criterion]) -> type[Criterion]:
        criterion.name = name
        REGISTRY[name] = criterion
        return criterion

    return add


def get_criterion(name: str, options: dict | None = None, *, seed: int = 0) -> Criterion:
    """The criterion registered as `name`; its own options that are not given are as in `config/pruning/<name>.yaml`."""
    if name not in REGISTRY:
        raise ConfigError(f"pruning.name: {name!r} is not a method; valid: {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name](seed=seed, **method_options(name) | (options or {}))


class Criterion(ABC):
    """Scores the filters of a network, and turns scores into filters to remove.

    Class attributes say what the method is:
        needs_data: whether it reads scoring images.
        class_aware: whether it is meant for images of the selected classes only.
        scopes: the rankings it allows, `layer` (within each) and `global` (over all layers together).
        nested: whether what goes at one ratio also goes at every higher one.
        exact: whether as many filters go as the ratio says; if not, the achieved ratio is an outcome.
        combinations: the ways in which scores of filters that go together become one.
        none_because: if it is not exact, why no filter goes at a ratio that asks for some.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = True
    class_aware: ClassVar[bool] = False
    scopes: ClassVar[tuple[str, ...]] = ("layer", "global")
    nested: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    combinations: ClassVar[tuple[str, ...]] = ("mean", "sum", "max")
    none_because: ClassVar[str] = ""

    def __init__(self, *, seed: int = 0):
        self.seed = seed

    @abstractmethod
    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        """The method itself. `score` wraps it in evaluation mode and checks what it returns."""

    def score(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None = None) -> Scores:
        """One value per filter of each of `layers`, read in one pass over `batches`.

        The network is left as it was found: weights, statistics, gradients, hooks and train/eval mode.

        Raises:
            BenchmarkError: no scoring images although the method needs them, a layer that does not run, or a score that
                is not finite.
        """
        if self.needs_data and batches is None:
            raise BenchmarkError(f"{self.name}: needs scoring images and was given none")
        idle = [layer for layer in layers if layer not in graph.convs]
        if idle:
            raise BenchmarkError(f"{self.name}: {idle[0]} is no convolution that runs in {type(graph.model).__name__}")
        with evaluating(graph.model):
            scores = self.compute(graph, layers, batches if self.needs_data else None)
        return {layer: self._checked(layer, scores[layer], graph.conv(layer).out_channels) for layer in layers}

    def _checked(self, layer: str, values: Tensor, filters: int) -> Tensor:
        values = values.detach().cpu()
        if len(values) != filters:
            raise BenchmarkError(f"{self.name}: {layer} has {filters} filters and was given {len(values)} scores")
        bad = int((~values.isfinite()).sum())
        if bad:
            raise BenchmarkError(f"{self.name}: {bad} scores of {layer} are not finite; are its weights and inputs?")
        return values

    def select(self, scores: Scores, ratio: float, scope: str, min_filters: int = 1) -> FilterIndices:
        """The filters to remove at one ratio: the lowest of each layer, or of all layers together."""
        if scope == "layer":
            return lowest_per_layer(scores, ratio, min_filters)
        return lowest_overall(scores, ratio, min_filters)

    def combine(self, values: Sequence[Tensor], how: str) -> Tensor:
        """One score for filters that go together, from the scores [C] that each of their layers gives them.

        Each layer's are divided by their mean size, so that no layer speaks louder than another, combined, and brought
        back to the layers' mean size, so that a global ranking still compares them with those of other layers.
        """
        together = torch.stack([layer.double() for layer in values])
        sizes = together.abs().mean(dim=1, keepdim=True)
        return combined(together / sizes.where(sizes > 0, 1), how) * sizes.mean()

    def ranks(self, layer: str, values: Tensor, ratio: float, min_filters: int) -> Tensor:
        """[C]: the lower, the earlier a filter of this layer goes at this ratio; ties by index."""
        return values


def combined(values: Tensor, how: str) -> Tensor:
    """[layers, ...] -> [...]: their mean, sum or max."""
    return {"mean": values.mean, "sum": values.sum, "max": values.amax}[how](dim=0)


class ResponseCriterion(Criterion):
    """A criterion that reads the filters' responses: says how one batch of one layer changes that layer's state."""

    @abstractmethod
    def start(self, filters: int) -> Tensor:
        """The state of a layer before any image; its size does not depend on the number of images."""

    @abstractmethod
    def observe(self, state: Tensor, response: Tensor, labels: Tensor) -> Tensor:
        """The state after one more batch: responses [N, C, H, W], which must not be changed or kept, and labels [N]."""

    def finish(self, state: Tensor, images: int) -> Tensor:
        """The scores [C, ...] from the state after all images."""
        return state

    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        taps = [graph.tap(layer) for layer in layers]
        states = {tap.layer: self.start(tap.filters) for tap in taps}
        signal = Signal(self.name)
        labels = torch.empty(0)

        def observe(layer: str, response: Tensor) -> None:
            signal.add(layer, response)
            states[layer] = self.observe(states[layer].to(response.device), response, labels)

        images_seen = 0
        with torch.inference_mode():
            runner = TapRunner(graph, taps, observe)
            for images, labels in progress(batches, self.name):  # noqa: B007  `observe` reads the labels
                runner.pass_batch(images)
                images_seen += len(images)
        signal.check()
        return {layer: self.finish(state, images_seen) for layer, state in states.items()}


class Signal:
    """Whether each layer has responded with numbers, and with any that is not zero, at the cost of one sum."""

    def __init__(self, method: str):
        self.method = method
        self.totals: dict[str, Tensor] = {}

    def add(self, layer: str, response: Tensor) -> None:
        total = response.sum()
        if total == 0:  # positive and negative responses may cancel
            total = response.abs().sum()
        self.totals[layer] = self.totals.get(layer, 0) + total.abs()

    def check(self) -> None:
        """Raises BenchmarkError for the first layer that has nothing to rank its filters by."""
        if not self.totals:
            raise BenchmarkError(f"{self.method}: there are no scoring images")
        for layer, total in self.totals.items():
            if not total.isfinite():
                raise BenchmarkError(
                    f"{self.method}: responses of {layer} are not finite; are the images and the weights up to it?"
                )
            if total == 0:
                raise BenchmarkError(
                    f"{self.method}: every response of {layer} is zero on all scoring images, so its filters cannot be "
                    "ranked; leave it out (model.skip_first_layers) or train the network"
                )


class _AllTapsRead(BaseException):
    """Ends a pass once nothing is left to read in it; no error, hence not an Exception."""


class TapRunner(fx.Interpreter):
    """Runs a network node by node and shows each tapped response the moment it exists.

    Nothing is hooked onto the network, a response is read before an in-place activation can overwrite it, values are
    freed after their last use, and the pass ends with the last tap: a VGG's classifier is never computed for a
    criterion that reads convolutions.
    """

    def __init__(self, graph: ModelGraph, taps: Sequence[Tap], observe: Callable[[str, Tensor], None]):
        super().__init__(graph.module)
        self.extra_traceback = False
        self.layers = {tap.node: tap.layer for tap in taps}
        self.observe = observe
        self.left = 0

    def pass_batch(self, images: Tensor) -> None:
        """Send a batch [N, C, H, W] through as far as the last tap."""
        self.left = len(self.layers)
        try:
            self.run(images)
        except _AllTapsRead:
            pass
        finally:
            self.env.clear()

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        layer = self.layers.get(node.name)
        if layer is not None:
            self.observe(layer, value)
            self.left -= 1
            if not self.left:
                raise _AllTapsRead
        return value


def refuse_all_zero(method: str, scores: Scores, reason: str) -> Scores:
    """The scores, unless those of a layer are all zero: its filters would go in the order of their numbers.

    Raises:
        BenchmarkError: naming the first such layer, with the reason.
    """
    for layer, values in scores.items():
        if not values.any():
            raise BenchmarkError(f"{method}: {layer} scores zero throughout and cannot be ranked: {reason}")
    return scores


def progress(batches: Batches, description: str) -> tqdm:
    """A progress bar over scoring batches, gone once they are through."""
    return tqdm(batches, desc=f"scoring ({description})", unit="batch", leave=False)


def lowest_per_layer(scores: Scores, ratio: float, min_filters: int) -> FilterIndices:
    """floor(C * ratio) lowest filters of each layer, ties by index, `min_filters` staying."""
    chosen = {}
    for layer, values in scores.items():
        count = min(share_of(ratio, len(values)), len(values) - min_filters)
        if count > 0:
            chosen[layer] = sorted(torch.argsort(values, stable=True)[:count].tolist())
    return chosen


def lowest_overall(scores: Scores, ratio: float, min_filters: int) -> FilterIndices:
    """floor(ratio * all filters) lowest over all layers, ties by layer order and index, `min_filters` staying in each.

    A filter that its layer cannot spare is passed over for the next lowest, so that the share asked for is still met
    as long as any layer can give one.
    """
    owners = [(layer, index) for layer, values in scores.items() for index in range(len(values))]
    order = torch.argsort(torch.cat(list(scores.values())), stable=True).tolist()
    wanted = share_of(ratio, len(owners))
    spare = {layer: len(values) - min_filters for layer, values in scores.items()}
    chosen: FilterIndices = {}
    for position in order:
        if wanted == 0:
            break
        layer, index = owners[position]
        if spare[layer] > 0:
            chosen.setdefault(layer, []).append(index)
            spare[layer] -= 1
            wanted -= 1
    return {layer: sorted(chosen[layer]) for layer in scores if layer in chosen}
