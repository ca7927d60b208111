"""Relevance through a whole network: which rule each node of its graph follows, and the pass over a batch.

A pass runs the network with operations whose backward functions hand down relevance (`relevance_rules`), so that
torch's own backward pass carries it from the logits to the convolutions. BatchNorm is folded into copies of the
weights: the network is read, never changed, and nothing is hooked onto it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from channel_numbers import ADDS, PASSING, PASSING_CALLS, PRODUCTS, RESHAPES
from errors import BenchmarkError
from relevance_rules import (
    Add,
    Distribute,
    PassThrough,
    Rules,
    Share,
    box_shares,
    conv_shares,
    convolution,
    detached,
    folded,
    whole,
)
from structure import ModelGraph, readers_of

NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
RELU_CALLS = {F.relu: F.relu, torch.relu: F.relu, "relu": F.relu, "relu_": F.relu, F.relu6: F.relu6}
AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
AVERAGE_CALLS = {F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean"}
# Each output is one of the inputs, so that the operation's own gradient moves relevance as it should.
CHOICES = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.MaxPool2d, nn.AdaptiveMaxPool2d)
CHOICE_CALLS = RESHAPES | {F.max_pool2d, F.adaptive_max_pool2d}
SUPPORTED = (
    "convolution, BatchNorm, ReLU, ReLU6, LeakyReLU, max and average pooling, linear, dropout, residual add, "
    "concatenation and reshapes"
)


class RelevancePass(fx.Interpreter):
    """Sends relevance from the logits back to convolutions, and shows it at each of them.

    Nothing below the earliest of `layers` gets any: what is there only runs forwards, and may be of any kind.

    Args:
        graph: the network.
        layers: the convolutions whose relevance is read.
        rules: the rule of each kind of layer.
        observe: called with a layer's name and the relevance [N, C, H, W] of its BN-folded output, once a batch. Read
            behind its activation it would be the same, since activations pass relevance on.
        to_pixels: carry it on to the images.

    Raises:
        BenchmarkError: relevance would have to pass an operation that has no rule, or no way leads from a layer to the
            output.
    """

    def __init__(
        self,
        graph: ModelGraph,
        layers: Sequence[str],
        rules: Rules,
        observe: Callable[[str, Tensor], None],
        *,
        to_pixels: bool = False,
    ):
        super().__init__(graph.module)
        self.extra_traceback = False
        self.network, self.rules, self.observe, self.to_pixels = graph, rules, observe, to_pixels
        self.read = {graph.conv_nodes[layer]: layer for layer in layers}
        self.leaves: list[Tensor] = []  # where relevance ends: the pixels, or the earliest of the layers
        self.carriers = self._find_carriers()
        self.norms = self._find_foldable_norms()
        self.non_negative = self._find_non_negative()
        with torch.inference_mode(False):  # tensors made in that mode cannot take part in a backward pass
            self.steps = self._choose_steps()

    def pass_batch(self, images: Tensor, labels: Tensor, start: str) -> tuple[Tensor, ...]:
        """Send relevance through images [N, C, H, W], beginning at the logits that `labels` [N] number.

        start: `one`, each image begins with relevance 1; `logit`, with the logit itself.

        Returns the relevance where it ended: for `to_pixels` a single tensor [N, C, H, W], that of the pixels.
        """
        with torch.inference_mode(False), torch.enable_grad():
            try:
                logits = self.run(images)
                return torch.autograd.grad(logits, self.leaves, starting_relevance(logits.detach(), labels, start))
            finally:
                self.leaves.clear()

    def run_node(self, node: fx.Node):
        if node not in self.carriers:
            with torch.no_grad():
                return super().run_node(node)
        if node.op in ("placeholder", "output"):
            value = super().run_node(node)
            # A clone, since the images may have been made in inference mode.
            return value if node.op == "output" else self._end_here(value.clone())
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return self.steps[node](*args, **kwargs)

    def _end_here(self, value: Tensor) -> Tensor:
        self.leaves.append(value.detach().requires_grad_())
        return self.leaves[-1]

    def _find_carriers(self) -> set[fx.Node]:
        """The nodes that relevance passes: on a way to the output from a layer that is read, or from the pixels."""
        nodes = list(self.network.module.graph.nodes)
        needed, carriers = set(), set()
        (logits,) = nodes[-1].args
        if len(shape_of(logits) or ()) != 2:
            raise BenchmarkError(
                f"{type(self.network.model).__name__}: relevance starts at logits [N, K], its output is no such tensor"
            )
        for node in reversed(nodes):
            if node.op == "output" or ("tensor_meta" in node.meta and any(user in needed for user in node.users)):
                needed.add(node)
        for node in nodes:
            starts = node in self.read or (self.to_pixels and node.op == "placeholder")
            # Sizes are read off tensors but carry nothing.
            if starts or ("tensor_meta" in node.meta and any(source in carriers for source in node.all_input_nodes)):
                carriers.add(node)
        for node, layer in self.read.items():
            if node not in needed:
                raise BenchmarkError(f"{layer}: no way leads from it to the output, so that it has no relevance")
        return carriers & needed

    def _find_foldable_norms(self) -> dict[fx.Node, nn.BatchNorm2d]:
        """Convolution -> the BatchNorm that is its only reader."""
        norms = {}
        for node in self.network.conv_nodes.values():
            readers = readers_of(node)
            norm = self.network.module_of(readers[0]) if len(readers) == 1 else None
            if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
                norms[node] = norm
        return norms

    def _find_non_negative(self) -> set[fx.Node]:
        """The nodes whose values cannot be negative, by the graph alone."""
        found: set[fx.Node] = set()
        for node in self.network.module.graph.nodes:
            module = self.network.module_of(node)
            if module is None:
                makes = node.target in RELU_CALLS
                keeps = node.target in CHOICE_CALLS | AVERAGE_CALLS | PASSING_CALLS | ADDS
            else:
                makes = isinstance(module, nn.ReLU | nn.ReLU6)
                keeps = isinstance(module, (*CHOICES, *AVERAGES, *PASSING))
            sources = node.all_input_nodes
            # A number among the arguments, as in x + 1, is no node and says nothing of its sign.
            plain = node.target not in ADDS or len(sources) == 2
            if makes or (keeps and plain and sources and all(source in found for source in sources)):
                found.add(node)
        return found

    def _choose_steps(self) -> dict[fx.Node, Callable]:
        """What runs in the place of each node that carries relevance."""
        steps, refused = {}, {}
        for node in self.network.module.graph.nodes:
            if node not in self.carriers or node.op in ("placeholder", "output"):
                continue
            module = self.network.module_of(node)
            step = self._step_of_function(node) if module is None else self._step_of_module(node, module)
            if step is None:
                operation = name_of(node.target) if module is None else type(module).__name__
                refused.setdefault(operation, f"{layer_of(node)} ({operation})")
            steps[node] = step
        if refused:
            raise BenchmarkError(
                f"{type(self.network.model).__name__}: relevance has no rule for {', '.join(refused.values())}; "
                f"it passes {SUPPORTED}. Choose another pruning method for this network"
            )
        return steps

    def _step_of_module(self, node: fx.Node, module: nn.Module) -> Callable | None:
        if isinstance(module, nn.Conv2d):
            return self._convolve(node, module)
        if isinstance(module, nn.Linear):
            return self._multiply(module)
        if isinstance(module, NORMS) and module.running_var is not None:
            return whole if node.args[0] in self.norms else partial(pass_through, module)
        if isinstance(module, nn.ReLU | nn.ReLU6):
            return partial(pass_through, F.relu if isinstance(module, nn.ReLU) else F.relu6)
        if isinstance(module, nn.LeakyReLU):
            return partial(pass_through, partial(F.leaky_relu, negative_slope=module.negative_slope))
        if isinstance(module, AVERAGES):
            return partial(self._average, module)
        if isinstance(module, PASSING):
            return whole
        if isinstance(module, CHOICES) and not getattr(module, "return_indices", False):
            return module
        return None

    def _step_of_function(self, node: fx.Node) -> Callable | None:
        target = node.target
        if target in RELU_CALLS:
            return partial(pass_through, RELU_CALLS[target])
        if target is F.leaky_relu:
            slope = (*node.args[1:2], node.kwargs.get("negative_slope", 0.01))[0]
            return partial(pass_through, partial(F.leaky_relu, negative_slope=slope))
        if target in ADDS | PRODUCTS:
            return self._combine(node)
        if target in AVERAGE_CALLS:
            return partial(self._average, torch.mean if target == "mean" else target)
        if target in PASSING_CALLS:
            return lambda value, *args, **kwargs: value
        if target in CHOICE_CALLS and not node.kwargs.get("return_indices", False):
            return lambda *args, **kwargs: getattr(self, node.op)(target, args, kwargs)
        return None

    def _convolve(self, node: fx.Node, conv: nn.Conv2d) -> Callable:
        weight, bias = folded(conv, self.norms.get(node))
        operation = convolution(conv, weight, bias)
        layer, source = self.read.get(node), node.args[0]
        ends = source not in self.carriers
        if ends:
            shares = ()
        elif source.op == "placeholder" and self.rules.first_layer == "zbox":
            shares = box_shares(conv, weight, self.rules.low.to(weight), self.rules.high.to(weight))
        else:
            shares = conv_shares(conv, weight, bias, self.rules, source in self.non_negative)

        def step(value: Tensor) -> Tensor:
            response = self._end_here(operation(value)) if ends else Distribute.apply(value, operation, shares)
            if layer is not None:
                response.register_hook(partial(self.observe, layer))
            return response

        return step

    def _multiply(self, linear: nn.Linear) -> Callable:
        weight, bias = linear.weight.detach(), detached(linear.bias)
        counted = partial(F.linear, weight=weight, bias=bias if self.rules.biases else None)
        shares = (Share(((whole, counted),), self.rules.epsilon),)
        return lambda value: Distribute.apply(value, partial(F.linear, weight=weight, bias=bias), shares)

    def _average(self, operation: Callable, value: Tensor, *args, **kwargs) -> Tensor:
        def average(each: Tensor) -> Tensor:
            return operation(each, *args, **kwargs)

        return Distribute.apply(value, average, (Share(((whole, average),), self.rules.epsilon),))

    def _combine(self, node: fx.Node) -> Callable | None:
        """The add of two branches. With a constant, an add or a product leaves relevance where it is."""
        operands = [operand for operand in node.args if isinstance(operand, fx.Node) and operand.op != "get_attr"]
        if len(node.args) != 2 or node.kwargs or any(shape_of(operand) != shape_of(node) for operand in operands):
            return None
        operation = torch.add if node.target in ADDS else torch.mul
        if len(operands) == 1:
            at = node.args.index(operands[0])
            return lambda *args: pass_through(lambda value: operation(value, args[1 - at]), args[at])
        return partial(Add.apply, self.rules.epsilon) if node.target in ADDS else None


def pass_through(operation: Callable, value: Tensor, *args, **kwargs) -> Tensor:
    """`operation` on every value by itself, which relevance passes unchanged; it has its further arguments already."""
    return PassThrough.apply(value, operation)


def starting_relevance(logits: Tensor, labels: Tensor, start: str) -> Tensor:
    """[N, K] with the logit (`logit`) or 1 (`one`) at each image's label, and 0 elsewhere."""
    wrong = labels[(labels < 0) | (labels >= logits.shape[1])]
    if len(wrong):
        raise BenchmarkError(
            f"label {wrong[0].item()}: the network has logits 0 to {logits.shape[1] - 1}; relevance starts at that of "
            "the image's own class, so it needs the original labels and the original head"
        )
    at = labels.to(logits.device).unsqueeze(1)
    values = torch.ones_like(logits) if start == "one" else logits
    return torch.zeros_like(logits).scatter(1, at, values.gather(1, at))


def shape_of(node: object) -> torch.Size | None:
    """The shape of a node's value, None where that is not one tensor."""
    return getattr(node.meta.get("tensor_meta"), "shape", None) if isinstance(node, fx.Node) else None


def name_of(target: Callable | str) -> str:
    return target if isinstance(target, str) else target.__name__


def layer_of(node: fx.Node) -> str:
    """The module in whose code a node stands."""
    if node.op == "call_module":
        return node.target
    return next(reversed(node.meta.get("nn_module_stack", {})), node.name)
