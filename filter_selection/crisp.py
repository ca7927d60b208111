"""CRISP: class-aware saliency of weights. Aggarwal et al., CRISP, DATE 2024, arXiv 2311.14272.

score(f) = sum over f's weights of |w| * mean_n |dL_n/dw|, L_n the loss of one image of the selected classes.

The absolute value is that of each image's own gradient, which the gradient of a batch's loss no longer shows. It is
made from what a convolution reads and the gradient of what it returns, one image and one weight tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filter_selection.base import Batches, Criterion, Scores, refuse_all_zero, register
from filter_selection.gradients import gradient_pass
from structure import ModelGraph, Tap


@register("crisp")
class Crisp(Criterion):
    class_aware = True

    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        # At the convolution itself, not at the filter's response, which a BatchNorm may have scaled.
        taps = [Tap(layer, graph.conv_nodes[layer].name, graph.conv(layer).out_channels) for layer in layers]
        sums = {layer: torch.zeros_like(graph.conv(layer).weight, requires_grad=False) for layer in layers}

        def observe(layer: str, inputs: Tensor, gradient: Tensor, labels: Tensor) -> None:
            for weight_gradient in weight_gradients(graph.conv(layer), inputs, gradient):
                sums[layer] += weight_gradient.abs_()

        images = gradient_pass(self.name, graph, taps, batches, observe, read_input=True)
        scores = {
            layer: (graph.conv(layer).weight.detach().abs() * total).sum(dim=(1, 2, 3)) / images
            for layer, total in sums.items()
        }
        return refuse_all_zero(self.name, scores, "its weights are zero, or no gradient reaches them")


def weight_gradients(conv: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> Iterator[Tensor]:
    """dL_n/dw image by image, from the convolution's inputs [N, I, H, W] and its output's gradient [N, C, H', W']."""
    padding = conv.padding
    if isinstance(padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        inputs = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
        padding = 0
    for one, its_gradient in zip(inputs.split(1), gradient.split(1), strict=True):
        yield nn.grad.conv2d_weight(
            one, conv.weight.shape, its_gradient, conv.stride, padding, conv.dilation, conv.groups
        )
