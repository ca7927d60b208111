"""One pass forwards and backwards that shows every tapped response with the loss's gradient there.

What the criteria read is the gradient of responses, so weights are frozen: no weight gradient is computed, the graph of
gradients begins at the first tap, and each gradient is consumed and freed as soon as the backward pass has reached it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from errors import BenchmarkError
from filter_selection.base import Batches, Criterion, Scores, Signal, progress
from in_place import Unchanging
from structure import ModelGraph, Tap

Observe = Callable[[str, Tensor, Tensor, Tensor], None]
"""(layer, what was read at its tap, gradient of the loss at the tap, labels), for each batch and layer."""


class GradientCriterion(Criterion):
    """A criterion that reads responses and their gradients: says how one batch of one layer changes that layer's state.

    The loss is the cross-entropy of the original head with the original labels, summed over the batch, so that a
    sample's gradient does not depend on the batch it came in.
    """

    def start(self, filters: int) -> Tensor:
        """The state of a layer before any image; its size does not depend on the number of images."""
        return torch.zeros(filters, dtype=torch.float64)

    @abstractmethod
    def observe(self, state: Tensor, response: Tensor, gradient: Tensor, labels: Tensor) -> Tensor:
        """The state after one more batch: responses, their gradients (both [N, C, H, W], not to be changed), labels."""

    def finish(self, state: Tensor, images: int) -> Tensor:
        """The scores [C] from the state after all images: by default the mean over them."""
        return state / images

    def compute(self, graph: ModelGraph, layers: Sequence[str], batches: Batches | None) -> Scores:
        taps = [graph.tap(layer) for layer in layers]
        states = {tap.layer: self.start(tap.filters) for tap in taps}

        def observe(layer: str, response: Tensor, gradient: Tensor, labels: Tensor) -> None:
            states[layer] = self.observe(states[layer].to(response.device), response, gradient, labels)

        images = gradient_pass(self.name, graph, taps, batches, observe)
        return {layer: self.finish(state, images) for layer, state in states.items()}


def gradient_pass(
    method: str, graph: ModelGraph, taps: Sequence[Tap], batches: Batches, observe: Observe, *, read_input: bool = False
) -> int:
    """Send all batches forwards and backwards; the number of images.

    Args:
        observe: called once for each layer and batch, in the order of the backward pass.
        read_input: show what the tapped node reads instead of what it returns.

    Raises:
        BenchmarkError: no images, an output that is not one row of logits an image, a label without a logit, or a layer
            whose responses are not finite or all zero.
    """
    images_seen = 0
    signal = Signal(method)
    with frozen(graph.model), torch.enable_grad():
        runner = GradientRunner(graph, taps, observe, signal, read_input)
        for images, labels in progress(batches, method):
            runner.pass_batch(images, labels)
            images_seen += len(images)
    signal.check()
    return images_seen


class GradientRunner(Unchanging):
    """Runs a network node by node and leaves at each tap a hook on the tensor, never on the network.

    Nothing runs in place: a response keeps its value until the backward pass comes to read it.
    """

    def __init__(self, graph: ModelGraph, taps: Sequence[Tap], observe: Observe, signal: Signal, read_input: bool):
        super().__init__(graph.module)
        self.layers = {tap.node: tap.layer for tap in taps}
        self.observe, self.signal, self.read_input = observe, signal, read_input
        self.labels = torch.empty(0)

    def pass_batch(self, images: Tensor, labels: Tensor) -> None:
        """Send a batch [N, C, H, W] forwards to its logits and backwards to the earliest tap."""
        self.labels = labels
        try:
            logits = self.run(images)
        finally:
            self.env.clear()
        _check_logits(self.signal.method, logits, labels)
        F.cross_entropy(logits, labels, reduction="sum").backward()

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        layer = self.layers.get(node.name)
        if layer is not None:
            self.signal.add(layer, value.detach())
            if not value.requires_grad:  # nothing before it is tapped: the backward pass ends here
                value.requires_grad_()
            read = self.env[node.args[0]] if self.read_input else value
            value.register_hook(self._reader(layer, read.detach(), self.labels))
        return value

    def _reader(self, layer: str, read: Tensor, labels: Tensor) -> Callable[[Tensor], None]:
        def consume(gradient: Tensor) -> None:
            self.observe(layer, read, gradient, labels)

        return consume


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside the block; each one's own flag is put back after it, exception or not."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _check_logits(method: str, logits: Tensor, labels: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels):
        given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise BenchmarkError(f"{method}: the network's output must be one row of logits an image, not {given}")
    if not logits.requires_grad:
        raise BenchmarkError(f"{method}: no logit depends on the layers to be scored, so they have no gradient")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise BenchmarkError(
            f"{method}: labels from {int(labels.min())} to {int(labels.max())} for {logits.shape[1]} logits; "
            "scoring needs the original labels and the original head"
        )
