"""One budget for all methods: the ratio at which each removes the same share of MACs, parameters, filters or latency.

A ratio means another thing to each method: a union removes less than it is asked to, a global ranking spends its
ratio where layers are wide. Here the ratio is an outcome, and what it buys is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, fx, nn

from costs import count_macs, count_parameters
from filter_selection.base import FilterIndices
from models import head_name
from pruner import staying
from record_checks import TOLERANCE
from structure import ModelGraph

LARGEST = 0.9999  # a ratio at which every layer is down to its floor, whatever its width
FINE = 1e-5  # ratios closer than this select the same filters, but for a layer of 100,000
COARSE = 0.01  # of latency, where every ratio looked at is a network built and timed


@dataclass(frozen=True)
class Budgeted:
    """What was found for one target: `reached` is the share that goes at `ratio`; `note` says why it is another."""

    target: float
    ratio: float
    indices: FilterIndices
    reached: float
    note: str | None


@dataclass(frozen=True)
class Sizes:
    """Multiply-adds of one image, and number of parameters."""

    macs: int
    params: int


class ShapeCosts:
    """What a network would cost without some of its filters, exactly, from its graph: no model is built.

    Args:
        graph: the dense network's graph.
        classes: logits that the pruned networks keep; None: all.
    """

    def __init__(self, graph: ModelGraph, classes: int | None = None):
        self.graph = graph
        self.head, self.classes = head_name(graph.model), classes
        self.nodes = [node for node in graph.module.graph.nodes if node.name in graph.channels.inputs]
        self.dense = Sizes(count_macs(graph.model, graph.input_shape).macs, count_parameters(graph.model))
        self._whole = self._accounted({}, None)

    def left(self, indices: FilterIndices) -> Sizes:
        """Of the network without the filters in `indices`, its head cut down to the classes kept."""
        own = self._accounted(indices, self.classes)
        macs, params = (now - before for now, before in zip(own, self._whole, strict=True))
        return Sizes(self.dense.macs + macs, self.dense.params + params)

    def _accounted(self, indices: FilterIndices, classes: int | None) -> tuple[int, int]:
        """MACs and parameters of the layers that can lose channels or logits; what is the same in all is left out."""
        gone = self.graph.channels.gone_with(indices)
        macs = params = 0
        for node in self.nodes:
            more = self._layer(node, gone, classes)
            macs, params = macs + more[0], params + more[1]
        return macs, params

    def _layer(self, node: fx.Node, gone: Tensor, classes: int | None) -> tuple[int, int]:
        channels, layer = self.graph.channels, self.graph.module_of(node)
        read = int(staying(channels.inputs[node.name], gone).sum())
        positions = node.meta["tensor_meta"].shape[1:].numel()  # of one image
        if isinstance(layer, nn.Conv2d):
            made = int(staying(channels.outputs[node.target], gone).sum())
            pixels = positions // layer.out_channels
            made = classes if node.target == self.head and classes is not None else made
            # A depthwise convolution has one channel a filter; other groups lose no filters.
            depth = layer.in_channels // layer.groups if layer.groups > 1 else read
            weights = made * depth * layer.kernel_size[0] * layer.kernel_size[1]
        elif isinstance(layer, nn.Linear):
            made, pixels = layer.out_features, positions // layer.out_features
            made = classes if node.target == self.head and classes is not None else made
            weights = made * read
        else:  # a normalisation: a scale and a shift a channel, no multiply-adds
            return 0, read * (int(layer.weight is not None) + int(layer.bias is not None))
        return pixels * weights, weights + made * (layer.bias is not None)


def removed_share(
    match: str, graph: ModelGraph, classes: int | None, prunable: int
) -> Callable[[FilterIndices], float]:
    """Filters to remove -> the share of `macs`, `params` or `filters` that is gone, as the records count it."""
    if match == "filters":
        return lambda indices: sum(map(len, indices.values())) / prunable
    costs = ShapeCosts(graph, classes)
    whole = getattr(costs.dense, match)
    return lambda indices: 1 - getattr(costs.left(indices), match) / whole


def find_ratios(
    choose: Callable[[float], FilterIndices],
    removed: Callable[[FilterIndices], float],
    targets: Iterable[float],
    match: str,
) -> list[Budgeted]:
    """For each target, in their order, the ratio that removes the share nearest to it.

    Args:
        choose: ratio -> the filters that go.
        removed: filters -> the share of the budget that goes with them; asked once for each selection.
        targets: shares to remove, above 0 and below 1.
        match: what the budget is of, for the notes; `latency` is looked for in coarser steps.
    """
    search = _Search(choose, removed, COARSE if match == "latency" else FINE)
    return [search.find(target, match) for target in targets]


class _Search:
    """Bisection over the ratio. What was asked before is remembered: selections are few, ratios many."""

    def __init__(
        self, choose: Callable[[float], FilterIndices], removed: Callable[[FilterIndices], float], step: float
    ):
        self.choose, self.removed, self.step = choose, removed, step
        self.known: dict[tuple, float] = {}

    def share(self, ratio: float) -> float:
        indices = self.choose(ratio)
        key = tuple((layer, tuple(filters)) for layer, filters in indices.items() if filters)
        if key not in self.known:
            self.known[key] = self.removed(indices)
        return self.known[key]

    def find(self, target: float, match: str) -> Budgeted:
        low, high = 0.0, LARGEST
        shares = {low: self.share(low), high: self.share(high)}
        most = shares[high]
        if most > target:
            while high - low > self.step:
                middle = (low + high) / 2
                shares[middle] = self.share(middle)
                low, high = (middle, high) if shares[middle] <= target else (low, middle)
        # Selections that are not nested may come nearer on the way than at the end.
        best = min(shares, key=lambda ratio: (abs(shares[ratio] - target), ratio))
        ratio, reached = self._written_shortly(best), shares[best]
        note = None
        if abs(reached - target) > TOLERANCE:
            why = f"the most that goes is {most:.3f}, at ratio {LARGEST}"
            if most > target:
                why = f"the selection jumps from {shares[low]:.3f} to {shares[high]:.3f} at ratio {high:.4g}"
            if self.share(0.0) > target:
                why = f"the smaller head alone removes {self.share(0.0):.3f}"
            note = f"target {target:g} of {match} is not reached, {reached:.3f} goes: {why}"
        return Budgeted(target, ratio, self.choose(ratio), reached, note)

    def _written_shortly(self, ratio: float) -> float:
        """The ratio with the fewest decimals that selects the same filters."""
        wanted = self.choose(ratio)
        rounded = (round(ratio, digits) for digits in range(1, 7))
        return next((short for short in rounded if 0 <= short < 1 and self.choose(short) == wanted), ratio)
