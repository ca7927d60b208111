"""CRISP: class-aware saliency of weights. Aggarwal et al., CRISP, DATE 2024, arXiv 2311.14272.

score(f) = sum over f's weights of |w| * mean_n |dL_n/dw|, L_n the loss of one image of the selected classes.

The absolute value is that of each image's own gradient, which the gradient of a batch's loss no longer shows. It is
made from what a convolution reads and the gradient of what it returns, and no more than a block of it exists at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filter_selection.base import Batches, Criterion, Scores, refuse_all_zero, register
from filter_selection.gradients import gradient_pass
from structure import ModelGraph, Tap

BLOCK = 128  # filters at a time, whose gradient then stays in the processor's cache


@register("crisp")
class Crisp(Criterion):
    class_aware = True

    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        # At the convolution itself, not at the filter's response, which a BatchNorm may have scaled.
        taps = [Tap(layer, graph.conv_nodes[layer].name, graph.conv(layer).out_channels) for layer in layers]
        sums = {layer: torch.zeros_like(graph.conv(layer).weight, requires_grad=False) for layer in layers}

        def observe(layer: str, inputs: Tensor, gradient: Tensor, labels: Tensor) -> None:
            sums[layer] += sum_of_absolute_gradients(graph.conv(layer), inputs, gradient)

        images = gradient_pass(self.name, graph, taps, batches, observe, read_input=True)
        scores = {
            layer: (graph.conv(layer).weight.detach().abs() * total).sum(dim=(1, 2, 3)) / images
            for layer, total in sums.items()
        }
        return refuse_all_zero(self.name, scores, "its weights are zero, or no gradient reaches them")


def sum_of_absolute_gradients(conv: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> Tensor:
    """sum_n |dL_n/dw|, shaped as w, from a convolution's inputs [N, I, H, W] and its output's gradient [N, C, H', W'].

    A weight's gradient is what it read times its filter's gradient, summed over the positions of the output.
    """
    padding = conv.padding
    if isinstance(padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        inputs = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
        padding = 0
    weight = conv.weight.detach()
    total = weight.new_zeros(conv.groups, len(weight) // conv.groups, weight[0].numel())

    def read(images: Tensor) -> Tensor:  # [N, groups, weights of a filter, positions]
        columns = F.unfold(images, conv.kernel_size, conv.dilation, padding, conv.stride)
        return columns.view(len(images), *total.shape[::2], -1)

    gradient = gradient.reshape(len(inputs), *total.shape[:2], -1)
    if gradient.shape[-1] == 1:  # nothing is summed before the absolute value: one product for all images
        return torch.einsum("ngcp,ngkp->gck", gradient.abs(), read(inputs).abs()).view_as(weight)
    for image, its_gradient in zip(inputs.split(1), gradient, strict=True):
        for group, columns in enumerate(read(image)[0]):
            for start in range(0, total.shape[1], BLOCK):
                rows = slice(start, start + BLOCK)
                total[group, rows] += (its_gradient[group, rows] @ columns.T).abs_()
    return total.view_as(weight)
