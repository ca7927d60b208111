"""What a model costs and how well it classifies: accuracy, parameters, MACs, bytes of its weights, latency.

Nothing here changes its arguments: weights, memory layout and the train/eval mode of every module stay as they were.
"""

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from errors import BenchmarkError
from helpers import Batches, evaluating

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
class ClassCounts:
    """Images answered correctly and images seen, by class index; classes without images have a total of 0."""

    correct: tuple[int, ...]
    total: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.correct) != len(self.total):
            raise ValueError(f"counts of {len(self.correct)} classes correct, of {len(self.total)} classes seen")
        if any(not 0 <= right <= seen for right, seen in zip(self.correct, self.total, strict=True)):
            raise ValueError(f"correct counts outside 0..total: {self.correct} of {self.total}")

    @property
    def accuracy(self) -> float:
        """Share of all images that are answered correctly."""
        if not sum(self.total):
            raise ValueError("no images were counted")
        return sum(self.correct) / sum(self.total)

    @property
    def per_class(self) -> tuple[float | None, ...]:
        """Accuracy of each class; None for a class without images."""
        return tuple(right / seen if seen else None for right, seen in zip(self.correct, self.total, strict=True))

    @property
    def worst(self) -> float:
        """Lowest accuracy among the classes that have images."""
        return min(share for share in self.per_class if share is not None)

    def subset(self, classes: Sequence[int]) -> "ClassCounts":
        """Counts of these classes alone, in this order: what one pass over all images says about a few classes."""
        return ClassCounts(tuple(self.correct[c] for c in classes), tuple(self.total[c] for c in classes))


@dataclass(frozen=True)
class MacCount:
    """Multiply-adds of one image, and the operations left out of them ("aten::einsum x2")."""

    macs: int
    unsupported: tuple[str, ...]


@dataclass(frozen=True)
class Latency:
    """Milliseconds that a forward pass of one batch took, one sample a repeat."""

    samples_ms: tuple[float, ...]
    batch_size: int

    @property
    def median_ms(self) -> float:
        return float(np.median(self.samples_ms))

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.samples_ms, 95))


@dataclass(frozen=True)
class Measurement:
    """Everything measured of one model; `macs` is None where counting failed, and `warnings` says why."""

    counts: ClassCounts
    latency: Latency
    params: int
    macs: int | None
    size_bytes: int
    warnings: tuple[str, ...]


def evaluate(model: nn.Module, loader: Batches, num_classes: int, device: torch.device) -> ClassCounts:
    """Count the images whose highest logit is their label, class by class.

    `loader` yields images [B, 3, H, W] and labels int64 [B], which index the `num_classes` logits; every image counts
    once, however short the last batch is. Raises BenchmarkError for no images, labels without a logit, another number
    of logits, and for logits that are not finite, whose highest value means nothing.
    """
    predictions, labels_seen, finite = [], [], []
    model = _placed(model, device)
    with evaluating(model), torch.inference_mode():
        for images, labels in loader:
            logits = model(images.to(device, non_blocking=True, memory_format=torch.channels_last))
            if logits.shape != (len(labels), num_classes):
                needed = f"[{len(labels)}, {num_classes}], one logit a class, is needed"
                raise BenchmarkError(f"model output: shape {list(logits.shape)}; {needed}")
            # Results stay on the device until the end: reading one here would make the device wait for every batch.
            predictions.append(logits.argmax(1))
            finite.append(logits.isfinite().all(1))
            labels_seen.append(labels)
    if not labels_seen:
        raise BenchmarkError("evaluation: no images; every selected class needs at least one")
    return _counted(torch.cat(predictions).cpu(), torch.cat(labels_seen).cpu(), torch.cat(finite).cpu(), num_classes)


def _counted(predictions: Tensor, labels: Tensor, finite: Tensor, num_classes: int) -> ClassCounts:
    """Counts from the predicted and true class of every image, all [N] on the CPU."""
    if broken := int((~finite).sum()):
        raise BenchmarkError(
            f"model output: logits that are not finite for {broken} of {len(finite)} images; "
            "the weights have diverged or are damaged, train with a lower learning rate or give other weights"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        given = f"{int(labels.min())} to {int(labels.max())}"
        raise BenchmarkError(f"labels: {given}; a model with {num_classes} logits needs 0 to {num_classes - 1}")
    correct = torch.bincount(labels[predictions == labels], minlength=num_classes)
    return ClassCounts(tuple(correct.tolist()), tuple(torch.bincount(labels, minlength=num_classes).tolist()))


def count_parameters(model: nn.Module) -> int:
    """Number of weights and biases; a tensor that two modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> MacCount:
    """Multiply-adds of one image of `input_shape` (C, H, W) in convolutions and linear layers; biases cost nothing.

    One multiply-add is one MAC (half of what is called a FLOP). Pooling, activation, normalisation and addition count
    as zero; other operations are named in `unsupported`. Counted by fvcore; raises BenchmarkError where it cannot
    trace the model.
    """
    model = _eval_copy(model)  # fvcore leaves its hooks behind when a trace fails
    parameter = next(model.parameters(), torch.zeros(()))
    image = torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # fvcore scripts and traces with torch.jit, which torch warns against
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, image)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        try:
            counts, unknown = analysis.by_operator(), analysis.unsupported_ops()
        except Exception as error:  # whatever the model's forward raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BenchmarkError(f"MACs: the model cannot be traced at {tuple(input_shape)}: {reason}") from error
    left_out = [f"{name} ({counts[name]:.0f} multiply-adds)" for name in _PRODUCTS if counts[name]]
    left_out += [f"{name} x{number}" for name, number in sorted(unknown.items()) if name not in _FREE]
    return MacCount(round(sum(counts[name] for name in _COUNTED)), tuple(left_out))


class _ByteCounter:
    """A file that keeps only its length, so that measuring large weights does not hold them in memory twice."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Part of the file protocol that torch.save uses; there is nothing to flush."""


def weight_bytes(model: nn.Module) -> int:
    """Bytes that `torch.save(model.state_dict(), file)` writes."""
    state, counter = model.state_dict(), _ByteCounter()
    for name, value in state.items():  # a new dictionary, so free to change; the file also names each tensor's device
        state[name] = value.cpu() if isinstance(value, Tensor) else value
    torch.save(state, counter)
    return counter.size


def measure_latency(model: nn.Module, batch: Tensor, *, repeats: int, warmup: int, device: torch.device) -> Latency:
    """Time `repeats` forward passes of `batch` [B, 3, H, W] after `warmup` untimed ones.

    The batch is on the device before the clock starts, and the device is done before it stops. Convolution weights are
    laid out channels_last, whatever layout the model came in, so that two models differ by their shapes alone.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be 1 or more and warmup 0 or more, not {repeats} and {warmup}")
    model = _eval_copy(_placed(model, device))
    batch = batch.to(device).contiguous(memory_format=torch.channels_last)
    samples = []
    with torch.inference_mode():
        for _ in range(warmup):
            model(batch)
        for _ in range(repeats):
            _synchronize(device)
            start = time.perf_counter_ns()
            model(batch)
            _synchronize(device)
            samples.append((time.perf_counter_ns() - start) / 1e6)
    return Latency(tuple(samples), len(batch))


def measure_inference_time_and_accuracy(
    model: nn.Module,
    loader: Batches,
    *,
    num_classes: int,
    device: torch.device,
    repeats: int,
    warmup: int,
    latency_batch: Tensor | None = None,
) -> Measurement:
    """Measure everything of `model` on one reading of `loader`; latency is that of its first batch, unless another is
    given, as it must be for models that are compared but do not read the same images.

    MACs are counted at the size of the images that the loader yields. Raises BenchmarkError as `evaluate` does.
    """
    model, first = _eval_copy(_placed(model, device)), []
    counts = evaluate(model, _keeping_first(loader, first), num_classes, device)
    batch = first[0] if latency_batch is None else latency_batch
    latency = measure_latency(model, batch, repeats=repeats, warmup=warmup, device=device)
    try:
        count = count_macs(model, first[0].shape[1:])
        macs, notes = count.macs, [f"MACs leave out {operation}" for operation in count.unsupported]
    except BenchmarkError as error:
        macs, notes = None, [str(error)]
    return Measurement(counts, latency, count_parameters(model), macs, weight_bytes(model), tuple(notes))


def _keeping_first(loader: Batches, first: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches, putting the images of the first into `first`: data are not read again for timing."""
    for images, labels in loader:
        if not first:
            first.append(images)
        yield images, labels


def _eval_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode with channels_last convolution weights; tensors that need no new layout are shared."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # copied already, to deepcopy
    for weight in model.parameters():
        if weight.dim() == 4 and not weight.is_contiguous(memory_format=torch.channels_last):
            laid_out = weight.detach().contiguous(memory_format=torch.channels_last)
            shared[id(weight)] = nn.Parameter(laid_out, requires_grad=weight.requires_grad)
    return copy.deepcopy(model, shared).eval()


def _placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself where its tensors are on the device, else a copy there."""
    device = torch.device(device)
    tensors = (*model.parameters(), *model.buffers())
    if all(t.device.type == device.type and device.index in (None, t.device.index) for t in tensors):
        return model
    return copy.deepcopy(model).to(device)


def _synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was queued; the CPU queues nothing."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
