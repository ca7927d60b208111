"""From filters to remove to a smaller network that computes the same as the dense one with those filters' responses zeroed.

The dense network is never touched: removal happens on a copy, after the indices were checked, and what came out is
checked against what was asked for.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod

import torch
import torch_pruning
from torch import nn

from errors import BenchmarkError, ConfigError
from filter_selection.base import FilterIndices
from structure import ModelGraph


class Pruner(ABC):
    """Removes filters. One pruner serves every ratio of one dense network.

    Args:
        graph: the dense network's graph.
    """

    def __init__(self, graph: ModelGraph):
        self.graph = graph

    @abstractmethod
    def _remove(self, model: nn.Module, indices: FilterIndices) -> None:
        """Remove checked filters from `model`, a copy of the dense network, in place."""

    def prune(self, indices: FilterIndices) -> nn.Module:
        """A new, smaller network in evaluation mode; without indices, a copy.

        Raises:
            BenchmarkError: indices that cannot be removed (nothing is changed), or a result that is not what was asked.
        """
        self._check(indices)
        pruned = copy.deepcopy(self.graph.model).eval()
        if any(indices.values()):
            self._remove(pruned, indices)
            self._verify(pruned, indices)
        return pruned

    def _check(self, indices: FilterIndices) -> None:
        for layer, filters in indices.items():
            if layer not in self.graph.convs:
                raise BenchmarkError(
                    f"{layer}: is not a convolution of this network; it has {', '.join(self.graph.convs[:3])}, ..."
                )
            if filters and layer in self.graph.left_out:
                raise BenchmarkError(f"{layer}: its filters cannot be removed on their own: {self.graph.left_out[layer]}")
            width = self.graph.conv(layer).out_channels
            outside = [index for index in filters if not 0 <= index < width]
            if outside:
                raise BenchmarkError(f"{layer}: has no filter {outside[0]}; valid: 0 to {width - 1}")
            if list(filters) != sorted(set(filters)):
                raise BenchmarkError(f"{layer}: its indices are not sorted and unique: {list(filters)[:8]}")
            if len(filters) == width:
                raise BenchmarkError(f"{layer}: all {width} filters are to go; at least one must stay")

    def _verify(self, pruned: nn.Module, indices: FilterIndices) -> None:
        followers = self.graph.followers
        for layer in self.graph.convs:
            before, after = self.graph.conv(layer).out_channels, pruned.get_submodule(layer).out_channels
            asked = len(indices.get(layer, ()))
            if layer not in followers and before - after != asked:
                raise BenchmarkError(f"{layer}: {asked} filters were to go, but {before - after} of {before} went")
        parameter = next(pruned.parameters())
        example = torch.zeros(1, *self.graph.input_shape, device=parameter.device, dtype=parameter.dtype)
        with torch.inference_mode():
            outputs = pruned(example).shape
        if outputs != self.graph.output_shape:
            raise BenchmarkError(f"pruned network: gives {tuple(outputs)}, the dense one {tuple(self.graph.output_shape)}")


class DepGraphPruner(Pruner):
    """Removal by the dependency graph of torch-pruning (Fang et al., DepGraph, CVPR 2023)."""

    def _remove(self, model: nn.Module, indices: FilterIndices) -> None:
        trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(True)  # the library finds dependencies along gradient functions
        parameter = next(model.parameters())
        example = torch.zeros(1, *self.graph.input_shape, device=parameter.device, dtype=parameter.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dependencies = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
        for layer, filters in indices.items():
            if not filters:
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


PRUNERS: dict[str, type[Pruner]] = {"depgraph": DepGraphPruner}


def get_pruner(name: str, graph: ModelGraph) -> Pruner:
    """The pruner known as `pruning.pruner=<name>`."""
    if name not in PRUNERS:
        raise ConfigError(f"pruning.pruner: {name!r} is unknown; valid: {', '.join(PRUNERS)}")
    return PRUNERS[name](graph)
