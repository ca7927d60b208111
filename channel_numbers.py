"""Which filter made which channel: numbers that travel through a network's graph the way the channels do.

Pooling keeps them, concatenation joins them, flattening repeats them, a residual add declares two of them the same.
From where they arrive follows which filters can go, what goes with them, and what is sliced where.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import stochastic_depth

if TYPE_CHECKING:
    from structure import ModelGraph

NORMS = (nn.BatchNorm2d,)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.SiLU, nn.GELU, nn.ELU, nn.Sigmoid, nn.Hardsigmoid)
SHIFTING = (nn.Sigmoid, nn.Hardsigmoid)  # zero does not stay zero
PASSING = (nn.Dropout, nn.Dropout2d, nn.Identity)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
ACTIVATION_CALLS = {F.relu, F.relu6, F.leaky_relu, F.hardswish, F.silu, F.gelu, F.hardsigmoid, torch.relu,
                    torch.sigmoid, "relu", "relu_", "sigmoid"}  # fmt: skip
SHIFTING_CALLS = {F.hardsigmoid, torch.sigmoid, "sigmoid"}
PASSING_CALLS = {F.dropout, stochastic_depth, torch.clone, "clone"}  # as they are in evaluation mode
POOL_CALLS = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
RESHAPES = {torch.flatten, torch.cat, torch.chunk, torch.split, torch.transpose, torch.permute, torch.reshape,
            torch.squeeze, torch.unsqueeze, operator.getitem, "flatten", "view", "reshape", "permute", "transpose",
            "chunk", "split", "squeeze", "unsqueeze", "contiguous", "size"}  # fmt: skip
CUTS = {torch.chunk, torch.split, operator.getitem, "chunk", "split"}
FIXED = -1  # the number of a channel that no filter made: the image, a linear layer's output


class ChannelNumbers(fx.Interpreter):
    """Sends filter numbers through the graph in place of activations.

    Every value is an int64 tensor of the true shape for one image. Operations that only move values (flatten, cat,
    chunk, view, permute) run on the numbers as they are; the others are given by their effect on channels. An operation
    that is not known pins the channels it reads: their filters are left out by name rather than removed on a guess.

    Args:
        graph: the network.
        put_back: nodes behind which a convolution's outputs are put back in place, so that what follows reads all.
    """

    def __init__(self, graph: ModelGraph, put_back: Collection[str] = ()):
        super().__init__(graph.module)
        self.network = graph
        self.put_back = put_back
        self.answers: set[int] = set()  # filter numbers that are the network's output
        self.first: dict[str, int] = {}  # convolution -> number of its filter 0
        self.parent: list[int] = []  # union-find over filter numbers
        self.pinned: dict[int, str] = {}  # filter number -> why it must stay
        self.inputs: dict[str, Tensor] = {}  # node that consumes channels -> their numbers
        self.outputs: dict[str, Tensor] = {}  # convolution -> the numbers of its output channels
        self.runs = Counter(node.target for node in graph.module.graph.nodes if node.op == "call_module")
        self.taps = {graph.tap(layer).node for layer in graph.convs}
        self.followers: dict[str, str] = {}  # depthwise convolution -> the reason it has no filters of its own
        self.run(torch.full((1, *graph.input_shape), FIXED))

    def find(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def pin(self, numbers: Tensor, reason: str) -> None:
        for number in numbers.unique().tolist():
            if number != FIXED:
                self.pinned.setdefault(number, reason)

    def tie(self, one: Tensor, other: Tensor, reason: str) -> Tensor:
        """Two tensors combined element by element: their channels stay or go together."""
        one, other = torch.broadcast_tensors(one, other)
        shape = one.shape
        # A stride of 0 repeats a value, as over the pixels of a channel: looked at once.
        once = tuple(slice(0, None if a or b else 1) for a, b in zip(one.stride(), other.stride(), strict=True))
        one, other = one[once], other[once]
        base = len(self.parent) + 1  # a pair as one number, which sorts faster; FIXED is -1
        for pair in ((one + 1) * base + other + 1).unique().tolist():
            a, b = pair // base - 1, pair % base - 1
            if FIXED in (a, b):
                self.pin(torch.tensor([a, b]), reason)
            else:
                self.parent[self.find(b)] = self.find(a)
        return torch.where(one == FIXED, other, one).expand(shape)

    def run_node(self, node: fx.Node):
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.op == "placeholder":
            return super().run_node(node)
        if node.op == "get_attr":
            return torch.full_like(self.fetch_attr(node.target), FIXED, dtype=torch.int64)
        if node.op == "output":
            for numbers in tensors_in(args):
                self.answers.update(numbers.unique().tolist())
                self.pin(numbers, "it is the network's output")
            return args[0]
        value = self._value(node, args, kwargs)
        return torch.full_like(value, FIXED) if node.name in self.put_back else value

    def _value(self, node: fx.Node, args: tuple, kwargs: dict):
        module = self.network.module_of(node)
        try:
            if module is not None:
                return self._module(node, module, args[0], args)
            return self._function(node, args, kwargs)
        except Exception:  # whatever a known operation raises when it is called in a way that is not known
            return self._unknown(node, args, kwargs)

    def _along(self, node: fx.Node, numbers: Tensor, dim: int) -> Tensor:
        """The numbers of the channels that `node` reads along `dim`; all pinned if a channel is no single filter's."""
        channels = numbers.movedim(dim, 0).flatten(1)
        if (channels != channels[:, :1]).any():
            self.pin(numbers, f"{node.name} reads its filters mixed into one channel")
        return channels[:, 0].clone()

    def _module(self, node: fx.Node, module: nn.Module, numbers: Tensor, args: tuple):
        if isinstance(module, nn.Conv2d):
            return self._conv(node, module, numbers)
        if isinstance(module, (nn.Linear, *NORMS)) and self.runs[node.target] > 1:
            self.pin(numbers, f"{node.target} runs more than once")
            return self._like(node) if isinstance(module, nn.Linear) else self._shifted(node, numbers)
        if isinstance(module, nn.Linear):
            self.inputs[node.name] = self._along(node, numbers, -1)
            return self._like(node)
        if isinstance(module, (*ACTIVATIONS, *PASSING)):
            return self._shifted(node, numbers) if isinstance(module, SHIFTING) else numbers
        if isinstance(module, NORMS):
            self.inputs[node.name] = self._along(node, numbers, 1)
            return self._shifted(node, numbers)
        if isinstance(module, POOLS):
            return self._pooled(node, numbers)
        if isinstance(module, nn.Flatten):
            return module(numbers)
        if isinstance(module, nn.ChannelShuffle):
            self._by_place(node, numbers)
            return module(numbers)
        return self._unknown(node, args, {})

    def _conv(self, node: fx.Node, conv: nn.Conv2d, numbers: Tensor) -> Tensor:
        channels = self.inputs[node.name] = self._along(node, numbers, 1)
        shape = node.meta["tensor_meta"].shape
        # One input channel and one group is an ordinary convolution of a grey image, not a depthwise one.
        if conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels:
            self.followers[node.target] = "depthwise: its filters go with the channels it reads"
            self.outputs[node.target] = channels
            return channels.view(1, -1, 1, 1).expand(shape)
        start = len(self.parent)
        self.first[node.target] = start
        self.parent.extend(range(start, start + conv.out_channels))
        new = self.outputs[node.target] = torch.arange(start, start + conv.out_channels)
        if conv.groups > 1:
            self.pin(channels, f"it feeds {node.target}, a grouped convolution")
            self.pin(new, "it is a grouped convolution")
        return new.view(1, -1, 1, 1).expand(shape)

    def _function(self, node: fx.Node, args: tuple, kwargs: dict):
        target = node.target
        if target in ADDS or target in PRODUCTS:
            tensors = tensors_in((args, kwargs))
            if len(tensors) == 1:
                if len(node.all_input_nodes) > 1:  # with a number worked out, as from how many channels there are
                    return self._unknown(node, args, kwargs)
                return self._shifted(node, tensors[0]) if target in ADDS else tensors[0]
            word = "a residual add" if target in ADDS else "a product"
            return self.tie(*tensors, f"it is joined by {word} with channels that must stay")
        if target in ACTIVATION_CALLS or target in PASSING_CALLS:
            return self._shifted(node, args[0]) if target in SHIFTING_CALLS else args[0]
        if target in POOL_CALLS:
            return self._pooled(node, args[0])
        if target in (torch.mean, "mean"):
            return self._mean(*args, **kwargs)
        if target is getattr and isinstance(args[0], Tensor) and args[1] == "shape":
            return args[0].shape
        if target in ("view", "reshape", torch.reshape):  # the numbers need not lie in memory as the activations do
            return self._reshaped(node, args[0], args[0].reshape(*args[1:], **kwargs))
        if target in RESHAPES:
            move = getattr(torch.Tensor, target) if isinstance(target, str) else target
            moved = move(*args, **kwargs)
            if target is torch.cat:
                dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % moved.dim()
                if dim != 1 and (moved != moved.narrow(dim, 0, 1)).any():
                    self._by_place(node, moved)  # side by side in space, both need the same channels
            if target in CUTS and isinstance(args[0], Tensor):
                self._cut(node, args[0], moved)
            return moved
        if not tensors_in((args, kwargs)):  # arithmetic on sizes
            return target(*args, **kwargs)
        return self._unknown(node, args, kwargs)

    def _shifted(self, node: fx.Node, numbers: Tensor) -> Tensor:
        """What makes something else of zero pins the filters, unless their response is read behind it: a filter that is
        gone would not be a filter whose response is zero."""
        if node.name not in self.taps:
            self.pin(numbers, f"{node.target if node.op == 'call_module' else node.name} would not keep its zeros zero")
        return numbers

    def _by_place(self, node: fx.Node, numbers: Tensor) -> None:
        """What picks channels by their place picks others once some are gone."""
        self.pin(numbers, f"{node.name} takes its channels by their place")

    def _cut(self, node: fx.Node, numbers: Tensor, parts) -> None:
        """A cut is one of pixels only if each part still has every channel."""
        whole = numbers.unique()
        if any(not torch.equal(part.unique(), whole) for part in tensors_in((parts,))):
            self._by_place(node, numbers)

    def _reshaped(self, node: fx.Node, numbers: Tensor, reshaped: Tensor) -> Tensor:
        """Flattening may follow the channels that are left, unless the number of channels is written out."""
        channels, after = numbers.shape[1], reshaped.shape[1] if reshaped.dim() > 1 else 0
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        written_out = len(sizes) > 1 and isinstance(sizes[1], int) and sizes[1] >= 0
        if written_out or len(sizes) < 2 or after % channels:
            self._by_place(node, numbers)
        return reshaped

    def _pooled(self, node: fx.Node, numbers: Tensor) -> Tensor:
        if numbers.dim() != 4 or (numbers != numbers[:, :, :1, :1]).any():
            raise ValueError("a pool over channels of several filters")
        return numbers[:, :, :1, :1].expand(node.meta["tensor_meta"].shape)

    def _mean(self, numbers: Tensor, *args, **kwargs) -> Tensor:
        lowest, highest = numbers.amin(*args, **kwargs), numbers.amax(*args, **kwargs)
        if not torch.equal(lowest, highest):
            raise ValueError("an average over channels of several filters")
        return lowest

    def _like(self, node: fx.Node):
        def fixed(meta):
            if hasattr(meta, "shape"):
                return torch.full(meta.shape, FIXED)
            return tuple(map(fixed, meta)) if isinstance(meta, (tuple, list)) else None

        return fixed(node.meta.get("tensor_meta"))

    def _unknown(self, node: fx.Node, args: tuple, kwargs: dict):
        module = self.network.module_of(node)
        name = getattr(node.target, "__name__", node.target) if module is None else type(module).__name__
        for numbers in tensors_in((args, kwargs)):
            self.pin(numbers, f"it feeds {node.name} ({name})")
        return self._like(node)

    @cached_property
    def roots(self) -> Tensor:
        """Filter number -> the number that stands for all that are tied to it."""
        return torch.tensor([self.find(number) for number in range(len(self.parent))])

    def numbers_of(self, layer: str) -> range:
        """The numbers of a convolution's own filters, in their order; none of a depthwise one."""
        start = self.first.get(layer, 0)
        return range(start, start + self.network.conv(layer).out_channels if layer in self.first else start)

    def roots_of(self, layer: str) -> Tensor:
        """The roots of a convolution's own filters, in their order."""
        numbers = self.numbers_of(layer)
        return self.roots[numbers.start : numbers.stop]

    def gone_with(self, indices: dict[str, list[int]]) -> Tensor:
        """bool: filter number -> whether it goes when these filters of these convolutions do."""
        numbers = [self.first[layer] + index for layer, filters in indices.items() for index in filters]
        return torch.isin(self.roots, self.roots[numbers])

    @cached_property
    def streams(self) -> dict[str, tuple[str, ...]]:
        """Convolution -> all that share a filter's fate with it, itself among them, in the order of the graph."""
        layers = list(self.first)
        stream = torch.arange(len(layers))  # layer -> the first layer that it is known to be tied to
        owner = torch.full((len(self.parent),), -1)  # root -> the first layer that has a filter of it
        for place, layer in enumerate(layers):
            roots = self.roots_of(layer)
            earlier = owner[roots]
            owner[roots[earlier < 0]] = place
            tied = stream[earlier[earlier >= 0]].unique()
            if len(tied):
                stream[torch.isin(stream, tied) | (torch.arange(len(layers)) == place)] = tied[0]
        together: dict[int, list[str]] = {}
        for layer, first in zip(layers, stream.tolist(), strict=True):
            together.setdefault(first, []).append(layer)
        return {layer: tuple(members) for members in together.values() for layer in members}

    def aligned(self, layer: str) -> bool:
        """Whether each filter of `layer` is tied to exactly one filter of every convolution that it is tied to."""
        own = self.roots_of(layer).unique()
        return all(
            len(roots := self.roots_of(other)) == len(own) and torch.equal(roots.unique(), own)
            for other in self.streams[layer]
        )

    def places(self, lead: str, layer: str) -> Tensor:
        """int64, for each filter of `lead` the filter of `layer` that is tied to it; the two are aligned."""
        place = {root: index for index, root in enumerate(self.roots_of(layer).tolist())}
        return torch.tensor([place[root] for root in self.roots_of(lead).tolist()])

    def reasons(self, tied_together: bool = False) -> dict[str, str]:
        """Convolution -> why its filters cannot go; with `tied_together`, filters that are tied may all go as one."""
        pinned = {self.find(number): reason for number, reason in self.pinned.items()}
        reasons = dict(self.followers)
        for layer in self.first:
            own = [self.pinned[number] for number in self.numbers_of(layer) if number in self.pinned]
            fates = self.roots_of(layer).tolist()
            held = own or [f"tied to filters that stay: {pinned[fate]}" for fate in fates if fate in pinned]
            others = [other for other in self.streams[layer] if other != layer]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            if held:
                reasons[layer] = held[0]
            elif not self.aligned(layer):
                with_whom = f" of {others[0]}{more}" if others else ""
                reasons[layer] = f"its filters are tied to each other or to a part of the filters{with_whom}"
            elif others and not tied_together:
                reasons[layer] = f"on a residual stream: tied to {others[0]}{more}"
        return {layer: reasons[layer] for layer in self.network.convs if layer in reasons}


def tensors_in(values) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    found: list[Tensor] = []
    fx.node.map_aggregate(values, lambda value: found.append(value) if isinstance(value, Tensor) else None)
    return found
