"""How one layer hands its relevance down: the rules of layer-wise relevance propagation as backward functions.

Relevance travels the way gradients do: it adds up where a value was read more than once, moves back through reshapes
and concatenations, and all of a maximum's goes to the winner. Only the layers that mix values need a local rule of
their own, and these stand here. Bach et al., PLoS ONE 10(7), 2015: epsilon (eq. 58) and alpha-beta (eq. 60).
Montavon et al., Pattern Recognition 65, 2017: z-B, for the layer that reads pixels of a known range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TINY = 1e-30  # keeps 0 / 0 out where all contributions have one sign, so that their sum cannot cancel

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rules:
    """Which rule each kind of layer follows.

    conv: `alpha1beta0`, `alpha2beta1` or `epsilon`. first_layer: `conv`, that same rule, or `zbox` for the convolution
    that reads the pixels, whose least and greatest values are `low` and `high`, [1, C, 1, 1] each.
    epsilon: stabiliser of linear layers, residual adds, average pooling and the epsilon rule.
    biases: whether a bias takes its share of the relevance, which is then lost; left out, the relevance is conserved.
    """

    conv: str = "alpha1beta0"
    first_layer: str = "conv"
    epsilon: float = 1e-6
    biases: bool = False
    low: Tensor | None = None
    high: Tensor | None = None


@dataclass(frozen=True)
class Share:
    """`factor` times the relevance of every output, handed out in proportion to contributions.

    terms: pairs (part of the input, linear map of it); an output's contributions are the summands of all its maps.
    epsilon: added to their sum z, with the sign of z. sign: that of z where it is known, +1 or -1, else 0.
    """

    terms: tuple[tuple[Map, Map], ...]
    epsilon: float
    sign: int = 0
    factor: float = 1.0

    def hand_down(self, value: Tensor, relevance: Tensor) -> Tensor:
        """R_i = factor * sum over terms and outputs j of x_i w_ij R_j / (z_j + epsilon * sign z_j)."""
        with torch.enable_grad():
            parts = [part(value).detach().requires_grad_() for part, _ in self.terms]
            sums = [linear(part) for part, (_, linear) in zip(parts, self.terms, strict=True)]
        z = reduce(torch.add, (each.detach() for each in sums))
        rate = relevance / stabilised(z, self.epsilon, self.sign)
        if self.factor != 1:
            rate *= self.factor
        rates = torch.autograd.grad(sums, parts, [rate] * len(sums))
        return reduce(torch.add, (part.detach() * each for part, each in zip(parts, rates, strict=True)))


def stabilised(z: Tensor, epsilon: float, sign: int = 0) -> Tensor:
    """z + epsilon * sign(z), sign(0) being 1."""
    return z + (sign * epsilon if sign else torch.where(z < 0, -epsilon, epsilon))


class Distribute(torch.autograd.Function):
    """The output of an operation on one tensor; backwards, the sum of what the `shares` hand down."""

    @staticmethod
    def forward(ctx, value: Tensor, operation: Map, shares: Sequence[Share]) -> Tensor:
        ctx.save_for_backward(value)
        ctx.shares = shares
        return operation(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, relevance: Tensor):
        (value,) = ctx.saved_tensors
        return reduce(torch.add, (share.hand_down(value, relevance) for share in ctx.shares)), None, None


class Add(torch.autograd.Function):
    """The sum of two branches; backwards, each gets relevance in proportion to what it contributed."""

    @staticmethod
    def forward(ctx, epsilon: float, one: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(one, other)
        ctx.epsilon = epsilon
        return one + other

    @staticmethod
    @once_differentiable
    def backward(ctx, relevance: Tensor):
        one, other = ctx.saved_tensors
        rate = relevance / stabilised(one + other, ctx.epsilon)
        branches = zip((one, other), ctx.needs_input_grad[1:], strict=True)
        return None, *(branch * rate if wanted else None for branch, wanted in branches)


class PassThrough(torch.autograd.Function):
    """An operation on every value by itself; backwards, the relevance stays where it is.

    Activations are one, and so is an affine map of each channel: an output with a single contribution, its bias left
    out, gives that one all of its relevance under the epsilon rule.
    """

    @staticmethod
    def forward(ctx, value: Tensor, operation: Map) -> Tensor:
        return operation(value)

    @staticmethod
    def backward(ctx, relevance: Tensor):
        return relevance, None


def whole(value: Tensor) -> Tensor:
    return value


def positive(value: Tensor) -> Tensor:
    return value.clamp(min=0)


def negative(value: Tensor) -> Tensor:
    return value.clamp(max=0)


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that does what `conv` and then `norm` do; neither is changed."""
    weight, bias = conv.weight.detach(), detached(conv.bias)
    if norm is None:
        return weight, bias
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    return weight * scale.view(-1, 1, 1, 1), shift * scale if norm.bias is None else shift * scale + norm.bias.detach()


def detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def convolution(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Map:
    """The convolution that `conv` describes, with this weight and bias."""
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return lambda value: F.conv2d(value, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    widths = conv._reversed_padding_repeated_twice  # what Conv2d itself pads by; `same` may be uneven
    return lambda value: F.conv2d(F.pad(value, widths, mode), weight, bias, conv.stride, 0, conv.dilation, conv.groups)


def conv_shares(
    conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, rules: Rules, non_negative: bool
) -> tuple[Share, ...]:
    """The rule of a convolution with this folded weight and bias; `non_negative`: so are all of its inputs."""
    bias = bias if rules.biases else None
    if rules.conv == "epsilon":
        return (Share(((whole, convolution(conv, weight, bias)),), rules.epsilon),)
    gain = one_signed(conv, weight, bias, 1, non_negative)
    if rules.conv == "alpha1beta0":
        return (Share(gain, TINY, sign=1),)
    loss = one_signed(conv, weight, bias, -1, non_negative)
    return Share(gain, TINY, sign=1, factor=2), Share(loss, TINY, sign=-1, factor=-1)


def one_signed(
    conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, sign: int, non_negative: bool
) -> tuple[tuple[Map, Map], ...]:
    """The contributions of one sign, x+ w+ and x- w- or x+ w- and x- w+, and the bias if it has that sign."""
    same, opposite = (positive, negative) if sign > 0 else (negative, positive)
    own = convolution(conv, same(weight), None if bias is None else same(bias))
    if non_negative:
        return ((whole, own),)
    return (positive, own), (negative, convolution(conv, opposite(weight), None))


def box_shares(conv: nn.Conv2d, weight: Tensor, low: Tensor, high: Tensor) -> tuple[Share]:
    """z-B: contributions x w - low w+ - high w-, none of them negative for low <= x <= high."""
    terms = (
        (whole, convolution(conv, weight, None)),
        (low.expand_as, convolution(conv, -positive(weight), None)),
        (high.expand_as, convolution(conv, -negative(weight), None)),
    )
    return (Share(terms, TINY, sign=1),)
