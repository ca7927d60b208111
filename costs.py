"""What a model costs by its shape alone: parameters, MACs, bytes of its weights and activations.

Nothing here changes its arguments: weights, memory layout and the train/eval mode of every module stay as they were.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errors import BenchmarkError

# fvcore's names of the operations whose multiply-adds are counted: a convolution, and the forms a linear layer takes.
_COUNTED = ("conv", "linear", "addmm")
# What fvcore would count besides, and what the convention leaves at zero: a multiply-add needs weights or a product of
# two responses. Anything outside these two lists is named in the result.
_PRODUCTS = ("matmul", "mm", "bmm", "einsum")
_FREE = frozenset(
    f"aten::{operation}{in_place}"
    for in_place in ("", "_")
    for operation in (
        *("add", "sub", "rsub", "mul", "div", "neg", "pow", "sqrt", "exp", "abs", "sum", "mean", "amax", "clone"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_max_pool2d"),
        *("dropout", "feature_dropout", "channel_shuffle", "pixel_shuffle", "softmax", "log_softmax", "softplus"),
        *("hardtanh", "hardsigmoid", "hardswish", "leaky_relu", "prelu", "relu6", "celu", "elu", "selu", "gelu"),
        *("silu", "sigmoid", "tanh", "mish", "pad", "index_select"),
    )
)


@dataclass(frozen=True)
class MacCount:
    """Multiply-adds of one image, and the operations left out of them ("aten::einsum x2")."""

    macs: int
    unsupported: tuple[str, ...]


def count_parameters(model: nn.Module) -> int:
    """Number of weights and biases; a tensor that two modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> MacCount:
    """Multiply-adds of one image of `input_shape` (C, H, W) in convolutions and linear layers; biases cost nothing.

    One multiply-add is one MAC (half of what is called a FLOP). Pooling, activation, normalisation and addition count
    as zero; other operations are named in `unsupported`. Counted by fvcore; raises BenchmarkError where it cannot
    trace the model.
    """
    with _traced("FlopCountAnalysis", model, input_shape, "MACs") as analysis:
        counts, unknown = analysis.by_operator(), analysis.unsupported_ops()
    left_out = [f"{name} ({counts[name]:.0f} multiply-adds)" for name in _PRODUCTS if counts[name]]
    left_out += [f"{name} x{number}" for name, number in sorted(unknown.items()) if name not in _FREE]
    return MacCount(round(sum(counts[name] for name in _COUNTED)), tuple(left_out))


def activation_bytes(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Bytes of what all convolutions and linear layers put out for one image of `input_shape` (C, H, W).

    The activations of Radosavovic et al., CVPR 2020, in bytes: what memory traffic, and with it latency, often follows
    more closely than MACs. Counted by fvcore; raises BenchmarkError where it cannot trace the model.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    with _traced("ActivationCountAnalysis", model, input_shape, "activations") as analysis:
        counts = analysis.by_operator()
    return round(sum(counts[name] for name in _COUNTED)) * parameter.element_size()


@contextmanager
def _traced(analysis: str, model: nn.Module, input_shape: Sequence[int], what: str) -> Iterator:
    """fvcore's analysis of this name, for one image, silenced; a trace that fails inside is one BenchmarkError."""
    model = copy.deepcopy(model).eval()  # fvcore leaves its hooks behind when a trace fails
    parameter = next(model.parameters(), torch.zeros(()))
    image = torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # fvcore scripts and traces with torch.jit, which torch warns against
        import fvcore.nn

        made = getattr(fvcore.nn, analysis)(model, image)
        made.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        try:
            yield made
        except Exception as error:  # whatever the model's forward raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BenchmarkError(f"{what}: the model cannot be traced at {tuple(input_shape)}: {reason}") from error


class _ByteCounter:
    """A file that keeps only its length, so that measuring large weights does not hold them in memory twice."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Part of the file protocol that torch.save uses; there is nothing to flush."""


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in memory; a tensor that two modules share counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def file_bytes(model: nn.Module) -> int:
    """Bytes that `torch.save(model.state_dict(), file)` writes."""
    state, counter = model.state_dict(), _ByteCounter()
    for name, value in state.items():  # a new dictionary, so free to change; the file also names each tensor's device
        state[name] = value.cpu() if isinstance(value, Tensor) else value
    torch.save(state, counter)
    return counter.size
