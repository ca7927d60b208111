"""What a network's graph says of its filters: where each one's response is read, and which filters go together.

The graph is traced with torch.fx, so that nothing here knows an architecture by name.
"""

from __future__ import annotations

import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from io import StringIO

import torch
import torch_pruning
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from channel_numbers import ACTIVATION_CALLS, ACTIVATIONS, NORMS, ChannelNumbers
from errors import BenchmarkError
from helpers import evaluating


@dataclass(frozen=True)
class Tap:
    """Where the response of a convolution's filters is read: the output of graph node `node`."""

    layer: str
    node: str
    filters: int


class ModelGraph:
    """The traced graph of one network and the facts read off it. The network itself is shared, never copied or changed.

    Args:
        model: a network of convolutions that torch.fx can trace.
        input_shape: (C, H, W) of one image.

    Raises:
        BenchmarkError: the network cannot be traced, has no convolution, or uses one convolution twice.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, int, int]):
        self.model = model
        self.input_shape = tuple(input_shape)
        with evaluating(model), torch.no_grad():
            try:
                self.module = fx.symbolic_trace(model)
            except Exception as error:  # torch.fx raises whatever the network's own code raises
                raise BenchmarkError(
                    f"{type(model).__name__}: its graph cannot be traced by torch.fx ({error}); "
                    "control flow that depends on the data is not supported"
                ) from error
            parameter = next(model.parameters(), torch.empty(0))
            example = torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)
            try:
                with redirect_stderr(StringIO()):  # ShapeProp prints a traceback of what it raises
                    ShapeProp(self.module).propagate(example)
            except Exception as error:  # whatever the layer that does not fit raises
                reason = str(error.__cause__ or error).splitlines()[0]
                raise BenchmarkError(
                    f"{type(model).__name__}: an image of shape {self.input_shape} does not pass through it ({reason})"
                ) from error
        self._modules = dict(self.module.named_modules())
        self.conv_nodes = self._find_convs()

    def _find_convs(self) -> dict[str, fx.Node]:
        nodes: dict[str, fx.Node] = {}
        for node in self.module.graph.nodes:
            if node.op == "call_module" and isinstance(self._modules[node.target], nn.Conv2d):
                if node.target in nodes:
                    raise BenchmarkError(f"{node.target}: runs twice in one pass; its filters have no single response")
                nodes[node.target] = node
        if not nodes:
            raise BenchmarkError(f"{type(self.model).__name__}: no Conv2d runs in it, so there is no filter to prune")
        return nodes

    @property
    def convs(self) -> tuple[str, ...]:
        """Every convolution that runs, in the order of the graph."""
        return tuple(self.conv_nodes)

    def conv(self, layer: str) -> nn.Conv2d:
        return self._modules[layer]

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module a node calls, None for a function."""
        return self._modules[node.target] if node.op == "call_module" else None

    def is_activation(self, node: fx.Node) -> bool:
        return isinstance(self.module_of(node), ACTIVATIONS) or (
            node.op != "call_module" and node.target in ACTIVATION_CALLS
        )

    def tap(self, layer: str) -> Tap:
        """The response of `layer`: its BatchNorm's output, else its activation's, else its own (METHODS, *Response*).

        A consumer counts only where it is the sole one, since what several consumers read is the convolution itself.
        """
        node = self.conv_nodes[layer]
        users = list(node.users)
        if len(users) == 1 and (isinstance(self.module_of(users[0]), NORMS) or self.is_activation(users[0])):
            node = users[0]
        return Tap(layer, node.name, self.conv(layer).out_channels)

    @cached_property
    def channels(self) -> ChannelNumbers:
        """The filter numbers of every tensor's channels."""
        with torch.no_grad():
            return ChannelNumbers(self)

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Convolutions whose filters cannot be removed on their own -> the reason (the `skip` policy)."""
        return self.channels.reasons()

    @property
    def followers(self) -> dict[str, str]:
        """Depthwise convolutions, which have no filters of their own to choose -> the reason."""
        return self.channels.followers

    @property
    def prunable(self) -> tuple[str, ...]:
        """Convolutions whose filters can be removed one by one, in the order of the graph."""
        return tuple(layer for layer in self.convs if layer not in self.left_out)


def dependency_graph(model: nn.Module, input_shape: tuple[int, int, int]) -> torch_pruning.DependencyGraph:
    """torch-pruning's own graph of a network whose parameters all take gradients, which it finds dependencies along."""
    parameter = next(model.parameters())
    example = torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # of parameters outside of layers
        return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
