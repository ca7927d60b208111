"""Everything that is measured of a network: how well it classifies, what it weighs, how long it takes, how much memory.

`Bench` holds what all networks of a run are measured against; `measure_inference_time_and_accuracy` measures one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from accuracy import ClassCounts as ClassCounts
from accuracy import evaluate as evaluate
from accuracy import evaluate_each
from costs import activation_bytes, count_parameters, file_bytes, weight_bytes
from costs import count_macs as count_macs
from errors import BenchmarkError
from helpers import Batches, derive_seed
from latency import PairedTimes, Pass, batch_of, clock_of, distinct, laid_out, threads, time_in_pairs, torch_pass
from memory import ForwardMemory
from neighbours import others

log = logging.getLogger(__name__)

PYTORCH, ONNX_RUNTIME = "pytorch", "onnxruntime"


@dataclass(frozen=True)
class Footprint:
    """What follows from a network's shapes alone; None where it could not be found out, and `warnings` say why.

    Attributes:
        params: weights and biases.
        macs: multiply-adds of one image.
        size_bytes: of the file that `torch.save(model.state_dict(), file)` writes.
        weight_bytes: of parameters and buffers in memory.
        activation_bytes: of one image, see `costs.activation_bytes`.
        forward_peak_bytes: of a pass of the first test batch, `forward_batch_size` images, see `memory.ForwardMemory`.
    """

    params: int
    macs: int | None
    size_bytes: int
    weight_bytes: int
    activation_bytes: int | None
    forward_peak_bytes: int | None
    forward_batch_size: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Onnx:
    """A network in ONNX Runtime. exporter: `current`, `legacy`, or `none` where PyTorch's figures stand alone."""

    exporter: str
    provider: str | None = None
    difference: float | None = None
    counts: ClassCounts | None = None
    content: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Measurement:
    """Everything measured of one model; times by (engine, batch size)."""

    counts: ClassCounts
    footprint: Footprint
    times: Mapping[tuple[str, int], PairedTimes]
    threads: int
    onnx: Onnx | None
    warnings: tuple[str, ...]


class Bench:
    """What the networks of a run are measured against: the dense one, the same images, the same engines and threads.

    A context manager, since measuring memory keeps a process.

    Args:
        dense: the network that each is timed in turn with.
        images: [B, 3, H, W], of which all timed batches are made; B is the batch size called `test`.
        device: where PyTorch computes.
        latency: with `repeats`, `warmup`, `seconds`, `threads` (None: as many as PyTorch has) and `batch_sizes`.
        onnx: whether ONNX Runtime measures as well.
        seed: of the order within pairs.
    """

    def __init__(self, dense: nn.Module, images: Tensor, *, device: torch.device, latency: Any, onnx: bool, seed: int):
        self.device, self.latency, self.with_onnx = device, latency, onnx
        self.seed = derive_seed(seed, "latency")
        self.images = images
        sizes = distinct(latency.batch_sizes, len(images))
        self.batches = {size: batch_of(images, size).to(device) for size in sizes}
        self.memory = ForwardMemory(device)
        self._dense, self._dense_in_onnx, self._passes = dense, None, {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.__exit__(*error)

    @property
    def threads(self) -> int:
        return self.latency.threads or torch.get_num_threads()

    def times(self, engine: str, passes: Mapping[int, Pass]) -> dict[tuple[str, int], PairedTimes]:
        """The dense network's passes and these, by batch size, in turn."""
        plan = {name: getattr(self.latency, name) for name in ("repeats", "warmup", "seconds")}
        plan["clock"] = clock_of(self.device)
        dense = self._dense_passes(engine)
        times = {}
        for size, run in passes.items():
            if size in dense:
                before = others()
                pairs = time_in_pairs(dense[size], run, **plan, seed=derive_seed(self.seed, f"{engine} {size}"))
                times[engine, size] = replace(pairs, others=max(before, others()))
        return times

    def torch_passes(self, model: nn.Module) -> dict[int, Pass]:
        model = laid_out(model, self.device)
        return {size: torch_pass(model, batch) for size, batch in self.batches.items()}

    def onnx_passes(self, network: nn.Module) -> dict[int, Pass]:
        return {size: network.bound(batch) for size, batch in self.batches.items()}

    def to_onnx(self, model: nn.Module) -> tuple[nn.Module | None, Onnx, list[str]]:
        """The network in ONNX Runtime, what is to be said of it, and warnings; None where no exporter manages."""
        if model is self._dense and self._dense_in_onnx is not None:
            return self._dense_in_onnx
        made = self._to_onnx(model)
        if model is self._dense:
            self._dense_in_onnx = made
        return made

    def _to_onnx(self, model: nn.Module) -> tuple[nn.Module | None, Onnx, list[str]]:
        from onnx_network import OnnxNetwork, exported, told  # ONNX takes seconds to import, for those who ask for it

        try:
            made = exported(model, self.images.shape[1:], self.images)
            network = OnnxNetwork(made.content, self.device, self.threads)
        except BenchmarkError as error:
            text = f"ONNX: {error}; PyTorch's figures stand alone"
            log.warning(text)
            return None, Onnx("none"), [text]
        notes = told(made)
        for note in notes:
            log.warning(note)
        if self.device.type == "cuda" and network.provider != "CUDAExecutionProvider":
            notes.append("ONNX: this ONNX Runtime has no CUDA, its figures are of the CPU")
        return network, Onnx(made.exporter, network.provider, made.difference, content=made.content), notes

    def _dense_passes(self, engine: str) -> dict[int, Pass]:
        if engine not in self._passes:
            if engine == PYTORCH:
                self._passes[engine] = self.torch_passes(self._dense)
            else:
                network, _, _ = self.to_onnx(self._dense)
                self._passes[engine] = self.onnx_passes(network) if network is not None else {}
        return self._passes[engine]


def measure_inference_time_and_accuracy(
    model: nn.Module, loader: Batches, num_classes: int, bench: Bench, *, footprint: Footprint | None = None,
    count: Callable[[], ClassCounts] | None = None,
) -> Measurement:  # fmt: skip
    """Measure everything of `model` on one reading of `loader`, which yields images [B, 3, H, W] and labels [B].

    A `footprint` that is given is not measured again, as that of a network of the same shapes. `count`, in the place of
    the reading, knows what it would come to; ONNX Runtime's answers still take one. Raises BenchmarkError as `evaluate`
    does.
    """
    network, onnx, notes = bench.to_onnx(model) if bench.with_onnx else (None, None, [])
    networks = [model] if network is None else [model, network]
    if count is None or network is not None:
        counts = evaluate_each(networks, loader, num_classes, bench.device)
    else:
        counts = [count()]
    with threads(bench.latency.threads) as used:
        times = bench.times(PYTORCH, bench.torch_passes(model))
        if network is not None:
            onnx = replace(onnx, counts=counts[1])
            in_onnx = bench.times(ONNX_RUNTIME, bench.onnx_passes(network))
            times |= in_onnx
            if not in_onnx:
                notes.append("ONNX: the dense network was not exported, there is nothing to be timed beside")
        footprint = footprint or footprint_of(model, bench, used)
    return Measurement(counts[0], footprint, times, used, onnx, (*notes, *footprint.warnings, *_noise(times)))


def footprint_of(model: nn.Module, bench: Bench, threads: int) -> Footprint:
    """What follows from the network's shapes, for images as large as those of the bench."""
    shape, batch = tuple(bench.images.shape[1:]), len(bench.images)
    macs = activations = peak = None
    notes = []
    try:
        count = count_macs(model, shape)
        macs, activations = count.macs, activation_bytes(model, shape)
        notes += [f"MACs leave out {operation}" for operation in count.unsupported]
    except BenchmarkError as error:
        notes.append(str(error))
    try:
        peak = bench.memory.peak_bytes(model, shape, batch, threads)
    except BenchmarkError as error:
        notes.append(str(error))
    sizes = (file_bytes(model), weight_bytes(model))
    return Footprint(count_parameters(model), macs, *sizes, activations, peak, batch, tuple(notes))


def _noise(times: Mapping[tuple[str, int], PairedTimes]) -> Sequence[str]:
    """A warning for each time that says nothing."""
    notes = []
    for (engine, size), pairs in times.items():
        if pairs.noisy:
            few = f"only {len(pairs.model_ms)} pairs of passes" if pairs.few else "the times spread too far"
            why = few if pairs.steady else "the passes never got steady"
            if pairs.others:
                why = "another run was at work" if pairs.others == 1 else f"{pairs.others} other runs were at work"
            notes.append(f"latency, {engine}, batch of {size}: says nothing, {why}")
    return notes
