"""From filters to remove to a smaller network: it computes what the dense one does with their responses zeroed.

The dense network is never touched: removal happens on a copy, after the indices were checked, and what came out is
checked against what was asked for.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter

import torch
import torch_pruning
from torch import Tensor, fx, nn

from channel_numbers import FIXED
from errors import BenchmarkError, ConfigError
from filter_selection.base import FilterIndices
from helpers import evaluating
from scatter import put_back
from structure import ModelGraph, dependency_graph

# Of the largest output: what rounding leaves of two equal networks, with room for the deepest.
EQUAL_WITHIN = {torch.float64: 1e-9, torch.float32: 1e-4}
EQUAL_WITHIN_HALF = 1e-2


class Pruner(ABC):
    """Removes filters. One pruner serves every ratio of one dense network.

    Args:
        graph: the dense network's graph.
    """

    def __init__(self, graph: ModelGraph):
        self.graph = graph
        modules = graph.model.modules()
        self.holders = Counter(id(parameter) for module in modules for parameter in module._parameters.values())

    @abstractmethod
    def _remove(self, model: nn.Module, indices: FilterIndices) -> None:
        """Remove checked filters from `model`, a copy of the dense network, in place."""

    def prune(self, indices: FilterIndices) -> nn.Module:
        """A new, smaller network in evaluation mode; without indices, a copy.

        Raises:
            BenchmarkError: indices that cannot be removed (nothing is changed), or a result that is not what was asked.
        """
        return self.prune_and_prove(indices)[0]

    def prune_and_prove(self, indices: FilterIndices) -> tuple[nn.Module, float]:
        """As `prune`, and by how much the outputs differ from the masked network's, as a share of the largest one."""
        self._check(indices)
        before = _fingerprint(self.graph.model)
        pruned = self._copy().eval()
        difference = 0.0
        if any(indices.values()):
            try:
                self._remove(pruned, indices)
                difference = self._verify(pruned, indices)
            except BenchmarkError:
                raise
            except Exception as error:  # whatever a network raises whose parts do not fit together
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise BenchmarkError(
                    f"pruned network: does not run beside the masked dense one ({reason}); this network holds an "
                    "operation that the removal does not follow, or gives other than one tensor of logits"
                ) from error
        if _fingerprint(self.graph.model) != before:
            raise BenchmarkError("dense network: was changed by the removal, which has to work on a copy")
        return pruned, difference

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self.graph.model)

    def _check(self, indices: FilterIndices) -> None:
        for layer, filters in indices.items():
            if layer not in self.graph.convs:
                idle = isinstance(dict(self.graph.model.named_modules()).get(layer), nn.Conv2d)
                reason = "never runs" if idle else "is not a convolution of this network"
                raise BenchmarkError(f"{layer}: {reason}; those that run are {', '.join(self.graph.convs[:3])}, ...")
            if filters and not all(parameter.requires_grad for parameter in self.graph.conv(layer).parameters()):
                raise BenchmarkError(
                    f"{layer}: is frozen (requires_grad=False) and stays as it is; leave it out, or free it with "
                    "requires_grad_(True)"
                )
            weight = self.graph.conv(layer)._parameters.get("weight")
            if filters and (weight is None or self.holders[id(weight)] > 1):
                raise BenchmarkError(
                    f"{layer}: its weight is shared with another layer or worked out from others (as by weight_norm), "
                    "and cannot be cut by itself"
                )
            if filters and layer in self.graph.left_out:
                reason = self.graph.left_out[layer]
                raise BenchmarkError(f"{layer}: its filters cannot be removed on their own: {reason}")
            width = self.graph.conv(layer).out_channels
            odd = [index for index in filters if isinstance(index, bool) or not isinstance(index, int)]
            if odd:
                raise BenchmarkError(f"{layer}: {odd[0]!r} is no index of a filter; whole numbers are needed")
            outside = [index for index in filters if not 0 <= index < width]
            if outside:
                raise BenchmarkError(f"{layer}: has no filter {outside[0]}; valid: 0 to {width - 1}")
            if list(filters) != sorted(set(filters)):
                raise BenchmarkError(f"{layer}: its indices are not sorted and unique: {list(filters)[:8]}")
            if len(filters) == width:
                raise BenchmarkError(f"{layer}: all {width} filters are to go; at least one must stay")
        channels = self.graph.channels
        gone = channels.gone_with(indices)
        for layer in channels.first:
            numbers = channels.numbers_of(layer)
            left = gone[numbers.start : numbers.stop].clone()
            left[list(indices.get(layer, ()))] = False
            if left.any():
                raise BenchmarkError(
                    f"{layer}: its filter {int(left.nonzero()[0])} is tied to one that is to go, and has to "
                    f"go with it; the layers tied together are {', '.join(self.graph.streams[layer])}"
                )

    def _verify(self, pruned: nn.Module, indices: FilterIndices) -> float:
        followers = self.graph.followers
        for layer in self.graph.convs:
            before, after = self.graph.conv(layer).out_channels, pruned.get_submodule(layer).out_channels
            asked = len(indices.get(layer, ()))
            if layer not in followers and before - after != asked:
                raise BenchmarkError(f"{layer}: {asked} filters were to go, but {before - after} of {before} went")
        parameter = next(pruned.parameters())
        image = torch.randn(1, *self.graph.input_shape, generator=torch.Generator().manual_seed(0))
        image = image.to(parameter.device, parameter.dtype)
        with torch.inference_mode(), evaluating(self.graph.model):
            actual, expected = pruned(image), MaskedForward(self.graph, indices).run(image)
        if actual.shape != expected.shape:
            raise BenchmarkError(f"pruned network: gives {tuple(actual.shape)}, the dense one {tuple(expected.shape)}")
        difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        limit = EQUAL_WITHIN.get(parameter.dtype, EQUAL_WITHIN_HALF)
        if not difference <= limit:
            raise BenchmarkError(
                f"pruned network: its outputs differ from the masked dense network's by {difference:.1e} of their size "
                f"(at most {limit:.0e} is rounding); the removal is wrong and its figures would be too"
            )
        return difference


def _fingerprint(model: nn.Module) -> list[tuple]:
    """Which tensors a network holds, and how often each was written to: read without reading a weight."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, id(value), value.shape, value._version, value.requires_grad) for name, value in tensors]


class MaskedForward(fx.Interpreter):
    """The dense network with the responses of some filters zeroed: what a pruned network has to compute.

    A depthwise convolution's channels go with the filters they read, so that their responses are zeroed as well.
    """

    def __init__(self, graph: ModelGraph, indices: FilterIndices):
        super().__init__(graph.module)
        gone = graph.channels.gone_with(indices)
        self.filters: dict[str, Tensor] = {}
        for layer in graph.convs:
            filters = (~staying(graph.channels.outputs[layer], gone)).nonzero().flatten()
            if len(filters):
                self.filters[graph.tap(layer).node] = filters

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if node.name in self.filters:
            value = value.index_fill(1, self.filters[node.name].to(value.device), 0)
        return value


def staying(numbers: Tensor, gone: Tensor) -> Tensor:
    """bool, one a channel: whether it stays; one that no filter made always does."""
    return (numbers == FIXED) | ~gone[numbers.clamp_min(0)]


class DepGraphPruner(Pruner):
    """Removal by the dependency graph of torch-pruning (Fang et al., DepGraph, CVPR 2023)."""

    def __init__(self, graph: ModelGraph):
        if graph.residual == "scatter":
            raise ConfigError("pruning.residual: scatter; only pruning.pruner=structure puts outputs back in place")
        super().__init__(graph)

    def _remove(self, model: nn.Module, indices: FilterIndices) -> None:
        trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(True)  # the library finds dependencies along gradient functions
        dependencies = dependency_graph(model, self.graph.input_shape)
        for layer, filters in indices.items():
            lead = next(tied for tied in self.graph.streams[layer] if tied in indices)
            if not filters or layer != lead:  # the library removes all that is tied at once
                continue
            group = dependencies.get_pruning_group(
                model.get_submodule(layer), torch_pruning.prune_conv_out_channels, idxs=list(filters)
            )
            if not dependencies.check_pruning_group(group):
                raise BenchmarkError(f"{layer}: removing {len(filters)} filters would empty a layer that depends on it")
            group.prune()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
            parameter.grad = None


class StructurePruner(Pruner):
    """Removal by our own graph: every filter followed to whatever reads it, and each layer sliced once."""

    def _copy(self) -> nn.Module:
        """The dense tensors themselves in new modules: most are sliced, which copies what is left, the rest later."""
        dense = self.graph.model
        memo = {id(value): value for value in (*dense.parameters(), *dense.buffers())}
        return copy.deepcopy(dense, memo)

    def prune_and_prove(self, indices: FilterIndices) -> tuple[nn.Module, float]:
        pruned, difference = super().prune_and_prove(indices)
        shared = {id(value) for value in (*self.graph.model.parameters(), *self.graph.model.buffers())}
        own: dict[int, Tensor] = {}  # one copy of a tensor that several layers hold
        for module in pruned.modules():
            for name, value in [*module._parameters.items(), *module._buffers.items()]:
                if id(value) in shared:
                    if id(value) not in own:
                        own[id(value)] = value.detach().clone()
                        if isinstance(value, nn.Parameter):
                            own[id(value)] = nn.Parameter(own[id(value)], requires_grad=value.requires_grad)
                    setattr(module, name, own[id(value)])
        return pruned, difference

    def _remove(self, model: nn.Module, indices: FilterIndices) -> None:
        numbers = self.graph.channels
        gone = numbers.gone_with(indices)
        for node in self.graph.module.graph.nodes:
            if node.name not in numbers.inputs:
                continue
            layer = model.get_submodule(node.target)
            read = staying(numbers.inputs[node.name], gone).nonzero().flatten()
            if isinstance(layer, nn.Conv2d):
                made = staying(numbers.outputs[node.target], gone).nonzero().flatten()
                _slice_conv(layer, made, read)
            elif isinstance(layer, nn.Linear):
                _slice(layer, "weight", read, dim=1)
                layer.in_features = len(read)
            else:
                for name in ("weight", "bias", "running_mean", "running_var"):
                    _slice(layer, name, read)
                layer.num_features = len(read)
        nodes = {node.name: node for node in self.graph.module.graph.nodes}
        for layer, place in self.graph.put_back.items():
            if indices.get(layer):
                stays = staying(numbers.outputs[layer], gone)
                made = torch.cumsum(stays, 0) - 1
                sources = torch.where(stays, made, int(stays.sum()))
                put_back(model.get_submodule(nodes[place].target), sources.to(next(model.parameters()).device))


def _slice_conv(conv: nn.Conv2d, made: Tensor, read: Tensor) -> None:
    """Leave the filters `made` and, of the channels they read, `read`."""
    depthwise = 1 < conv.groups == conv.in_channels
    _slice(conv, "weight", made)
    _slice(conv, "bias", made)
    if depthwise:
        conv.groups = len(read)
    elif conv.groups == 1:
        _slice(conv, "weight", read, dim=1)
    conv.in_channels, conv.out_channels = len(read), len(made)


def _slice(layer: nn.Module, name: str, kept: Tensor, dim: int = 0) -> None:
    """Leave `kept` of a parameter or buffer along `dim`, in the memory format that it has."""
    value = getattr(layer, name)
    if value is None or len(kept) == value.shape[dim]:
        return
    sliced = value.detach().index_select(dim, kept.to(value.device))
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        sliced = sliced.contiguous(memory_format=torch.channels_last)
    if isinstance(value, nn.Parameter):
        sliced = nn.Parameter(sliced, requires_grad=value.requires_grad)
    setattr(layer, name, sliced)


PRUNERS: dict[str, type[Pruner]] = {"depgraph": DepGraphPruner, "structure": StructurePruner}


def get_pruner(name: str, graph: ModelGraph) -> Pruner:
    """The pruner known as `pruning.pruner=<name>`."""
    if name not in PRUNERS:
        raise ConfigError(f"pruning.pruner: {name!r} is unknown; valid: {', '.join(PRUNERS)}")
    return PRUNERS[name](graph)
