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
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from channel_numbers import ACTIVATION_CALLS, ACTIVATIONS, FIXED, NORMS, SHIFTING, SHIFTING_CALLS, ChannelNumbers
from errors import BenchmarkError, ConfigError
from helpers import evaluating
from in_place import Unchanging, follow_changes
from scatter import KINDS

RESIDUAL = ("skip", "coupled", "scatter")


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
        residual: what becomes of filters that a residual add, or another fixed order of channels, holds in place.
            `skip`: they stay. `coupled`: those that are added to each other go together. `scatter`: they go, and zeros
            are put in their places before the add.

    Raises:
        BenchmarkError: the network cannot be traced, or only as another one; has no convolution, or uses one twice; or
            normalises by the statistics of the batch.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, int, int], residual: str = "skip"):
        if residual not in RESIDUAL:
            raise ConfigError(f"pruning.residual: {residual!r} is unknown; valid: {', '.join(RESIDUAL)}")
        self.model = model
        self.input_shape = tuple(input_shape)
        self.residual = residual
        with evaluating(model), torch.no_grad():
            try:
                self.module = fx.symbolic_trace(model)
            except Exception as error:  # torch.fx raises whatever the network's own code raises
                raise BenchmarkError(
                    f"{type(model).__name__}: its graph cannot be traced by torch.fx ({error}); "
                    "control flow that depends on the data is not supported"
                ) from error
            follow_changes(self.module)
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
        self._refuse_batch_statistics()
        self._refuse_another_network(parameter)

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

    def _refuse_batch_statistics(self) -> None:
        for node in self.module.graph.nodes:
            norm = self.module_of(node)
            if isinstance(norm, NORMS) and norm.running_var is None:
                raise BenchmarkError(
                    f"{node.target}: normalises by the batch's own statistics (track_running_stats=False), so that an "
                    "image's responses depend on the batch it comes in"
                )

    def _refuse_another_network(self, parameter: Tensor) -> None:
        """The trace must compute what the network does, out of place, as gradients are taken.

        Where a value is changed in place that something else reads under another name, the two differ.
        """
        noise = torch.randn(1, *self.input_shape, generator=torch.Generator().manual_seed(0))
        noise = noise.to(parameter.device, parameter.dtype)
        with evaluating(self.model), torch.no_grad():
            expected = self.model(noise.clone())
            actual = Unchanging(self.module).run(noise.clone())
        if isinstance(expected, Tensor):
            size = float(expected.abs().nan_to_num().max())
            if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-4 * size, equal_nan=True):
                raise BenchmarkError(
                    f"{type(self.model).__name__}: torch.fx traces another network than it is; does it change a value "
                    "in place (x += y) that it reads again under another name?"
                )

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
        readers = readers_of(node)
        if len(readers) == 1 and (isinstance(self.module_of(readers[0]), NORMS) or self.is_activation(readers[0])):
            node = readers[0]
        return Tap(layer, node.name, self.conv(layer).out_channels)

    @cached_property
    def channels(self) -> ChannelNumbers:
        """The filter numbers of every tensor's channels."""
        with torch.no_grad():
            return ChannelNumbers(self, set(self.put_back.values()))

    @cached_property
    def put_back(self) -> dict[str, str]:
        """`scatter`: convolution -> graph node behind which its outputs are put back in place."""
        if self.residual != "scatter":
            return {}
        with torch.no_grad():
            channels = ChannelNumbers(self)
        held = [layer for layer in channels.reasons() if self.conv(layer).groups == 1]
        answers = {channels.find(number) for number in channels.answers if number != FIXED}
        places = {
            layer: self._put_back_at(layer)
            for layer in held
            if not answers.intersection(map(channels.find, channels.numbers_of(layer)))
        }
        return {layer: place for layer, place in places.items() if place is not None}

    def _put_back_at(self, layer: str) -> str | None:
        """The response's node where a layer makes it, else the convolution, if zero stays zero between the two."""
        conv = self.conv_nodes[layer]
        tap = next(node for node in (conv, *conv.users) if node.name == self.tap(layer).node)
        module = self.module_of(tap)
        if isinstance(module, (*NORMS, *SHIFTING)):
            runs_once = sum(node.target == tap.target for node in self.module.graph.nodes) == 1
            return tap.name if runs_once and type(module) in KINDS else None
        return None if tap.target in SHIFTING_CALLS or type(self.conv(layer)) not in KINDS else conv.name

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Convolutions whose filters cannot go under this network's policy -> the reason."""
        return self.channels.reasons(tied_together=self.residual == "coupled")

    @property
    def streams(self) -> dict[str, tuple[str, ...]]:
        """Convolution that has filters of its own -> all whose filters go together with its own, itself among them."""
        return self.channels.streams

    @property
    def followers(self) -> dict[str, str]:
        """Depthwise convolutions, which have no filters of their own to choose -> the reason."""
        return self.channels.followers

    @property
    def prunable(self) -> tuple[str, ...]:
        """Convolutions whose filters can be removed, in the order of the graph."""
        return tuple(layer for layer in self.convs if layer not in self.left_out)


def readers_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that read the values of `node`, not those that only ask for its size."""
    return [user for user in node.users if user.op == "output" or "tensor_meta" in user.meta]


def dependency_graph(model: nn.Module, input_shape: tuple[int, int, int]) -> torch_pruning.DependencyGraph:
    """torch-pruning's own graph of a network whose parameters all take gradients, which it finds dependencies along.

    Raises:
        BenchmarkError: the library fails on this network.
    """
    parameter = next(model.parameters())
    example = torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # of parameters outside of layers
        try:
            return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
        except Exception as error:  # whatever the library trips over
            raise BenchmarkError(
                f"{type(model).__name__}: torch-pruning finds no dependency graph of it "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
            ) from error
