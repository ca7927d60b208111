"""The importances of the Torch-Pruning library. Fang et al., DepGraph, CVPR 2023.

Each is computed by the library's own class, with its defaults, on the group of its dependency graph that a layer's
filters belong to: what the library's pruners rank by. Which filters go at which ratio, and their removal, are ours.

magnitude: L2 norm. lamp: Lee et al., ICLR 2021. fpgm: He et al., CVPR 2019. bn_scale: Liu et al., ICCV 2017.
taylor: |w * dL/dw|, Molchanov et al., CVPR 2019. hessian: w^2 * mean_n (dL_n/dw)^2, optimal brain damage.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch_pruning import importance as library

from errors import BenchmarkError, ConfigError
from filter_selection.base import Batches, Criterion, Scores, progress, register
from structure import ModelGraph, dependency_graph

IMPORTANCES = {
    "magnitude": library.GroupMagnitudeImportance,
    "lamp": library.LAMPImportance,
    "fpgm": library.FPGMImportance,
    "bn_scale": library.BNScaleImportance,
    "taylor": library.GroupTaylorImportance,
    "hessian": library.GroupHessianImportance,
}


@register("torch_pruning")
class TorchPruning(Criterion):
    def __init__(self, *, importance: str, seed: int = 0):
        super().__init__(seed=seed)
        if importance not in IMPORTANCES:
            raise ConfigError(f"pruning.importance: {importance!r} is unknown; valid: {', '.join(IMPORTANCES)}")
        self.importance = importance
        self.needs_data = importance in ("taylor", "hessian")

    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        model = copy.deepcopy(graph.model).requires_grad_(True)  # the copy has no gradients yet
        dependencies = dependency_graph(model, graph.input_shape)
        if self.importance == "taylor":
            self._accumulate_gradients(model, batches)
        elif self.importance == "hessian":
            self._accumulate_squared_gradients(model, batches)
        importance = IMPORTANCES[self.importance]()
        scores = {}
        for layer in layers:
            conv = model.get_submodule(layer)
            filters = list(range(conv.out_channels))
            group = dependencies.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, idxs=filters)
            values = importance(group)
            if values is None:  # none of the group's layers is of a kind that the importance reads
                raise BenchmarkError(
                    f"pruning.importance: {self.importance!r} finds no BatchNorm with {layer}; valid without: "
                    f"{', '.join(name for name in IMPORTANCES if name != self.importance)}"
                )
            if not values.isfinite().all():  # the library divides by the mean, which may be zero
                raise BenchmarkError(
                    f"{self.name}: {self.importance} of {layer} is not finite; are its weights or their gradients "
                    "all zero, or not finite themselves?"
                )
            scores[layer] = values
        return scores

    def _accumulate_gradients(self, model: nn.Module, batches: Batches) -> None:
        """Weight gradients of the summed loss of all images, which does not depend on how they are cut into batches."""
        images_seen = 0
        for images, labels in progress(batches, self.name):
            _backward(model, images, labels)
            images_seen += len(images)
        self._refuse_none(images_seen)

    def _accumulate_squared_gradients(self, model: nn.Module, batches: Batches) -> None:
        """In each `.grad`, where the library reads it, the mean over images of that image's own gradient squared.

        The library's own `accumulate_grad` (1.6.1) overwrites instead: it looks a parameter up by name but stores it by
        identity, so that only the last image would count.
        """
        parameters = list(model.parameters())
        squares: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
        images_seen = 0
        for images, labels in progress(batches, self.name):
            for image, label in zip(images.split(1), labels.split(1), strict=True):
                model.zero_grad(set_to_none=True)
                _backward(model, image, label)
                for square, parameter in zip(squares, parameters, strict=True):
                    if parameter.grad is not None:
                        square.addcmul_(parameter.grad, parameter.grad)
            images_seen += len(images)
        self._refuse_none(images_seen)
        for square, parameter in zip(squares, parameters, strict=True):
            parameter.grad = square.div_(images_seen)

    def _refuse_none(self, images_seen: int) -> None:
        if not images_seen:
            raise BenchmarkError(f"{self.name}: there are no scoring images")


def _backward(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with torch.enable_grad():
        F.cross_entropy(model(images), labels, reduction="sum").backward()
