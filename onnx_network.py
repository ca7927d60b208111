"""A network as ONNX: exported in one file for any batch size, held against PyTorch, run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from disk import write_whole
from errors import BenchmarkError
from helpers import evaluating

INPUT, OUTPUT = "images", "logits"
PARITY_BATCHES = (1, 2, 5)  # none of them the batch of 3 that the exporters are shown
PARITY_WITHIN = 1e-4  # of the largest output: another engine rounds in another order
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@dataclass(frozen=True)
class Exported:
    """An ONNX file's content, which exporter made it, and how far its outputs are from PyTorch's.

    Attributes:
        exporter: `current` (torch.export) or `legacy` (TorchScript).
        difference: largest of the outputs, as a share of the largest output.
        refused: of the exporters tried before, what kept each of them.
    """

    content: bytes
    exporter: str
    difference: float
    refused: tuple[str, ...]


def export_onnx(path: str | Path, model: nn.Module, input_shape: tuple[int, int, int]) -> Exported:
    """Write the network as ONNX, in one file, for any batch size. Raises BenchmarkError as `exported` does."""
    try:
        made = exported(model, input_shape)
    except BenchmarkError as error:
        raise BenchmarkError(f"{path}: {error}") from error
    write_whole(path, made.content)
    return made


def exported(model: nn.Module, input_shape: Sequence[int], images: Tensor | None = None) -> Exported:
    """The network as ONNX, once ONNX Runtime has given PyTorch's outputs at several batch sizes.

    torch.onnx's current exporter is tried first, then its earlier one. Compared on random images with both signs and
    on `images` [B, C, H, W] where given: an exporter that follows one branch of a condition exports, and is wrong.

    Raises BenchmarkError: neither exporter manages, or what it exports computes something else.
    """
    reasons = []
    for name, exporter in EXPORTERS.items():
        try:
            with evaluating(model), _quiet():
                content = exporter(model, torch.zeros(3, *input_shape, device=next(model.parameters()).device))
                difference = _difference(content, model, input_shape, images)
        except Exception as error:  # the exporters raise whatever they trip over
            reasons.append(f"the {name} exporter: {_short(error)}")
            continue
        if difference <= PARITY_WITHIN:
            return Exported(content, name, difference, tuple(reasons))
        reasons.append(f"the {name} exporter: its outputs differ from PyTorch's by {difference:.1e} of their size")
    raise BenchmarkError(f"cannot be exported to ONNX: {'; '.join(reasons)}")


def told(made: Exported) -> list[str]:
    """What is to be said of an export that fell back."""
    return [f"ONNX: made by the {made.exporter} exporter; {reason}" for reason in made.refused]


class OnnxNetwork(nn.Module):
    """An exported network as a module: images [B, C, H, W] in, logits [B, classes] out, on the images' device.

    Runs on CUDA where `device` is a CUDA device and ONNX Runtime was built for it, else on the CPU; `provider` says
    which. Raises BenchmarkError where ONNX Runtime cannot load it.
    """

    def __init__(self, content: bytes, device: torch.device, threads: int):
        super().__init__()
        import onnxruntime  # takes a second, for ONNX alone

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        # Threads that go on spinning after a pass would take the cores from the network that is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        device = torch.device(device)
        self.index = device.index or 0
        on_cuda = device.type == "cuda" and CUDA in onnxruntime.get_available_providers()
        providers = [(CUDA, {"device_id": self.index}), CPU] if on_cuda else [CPU]
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception as error:
            raise BenchmarkError(f"ONNX Runtime cannot load the network: {_short(error)}") from error
        self.provider = self.session.get_providers()[0]

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run([OUTPUT], {INPUT: images.detach().cpu().contiguous().numpy()})
        return torch.from_numpy(logits).to(images.device)

    def bound(self, batch: Tensor) -> Callable[[], object]:
        """A pass of `batch` [B, C, H, W] that copies nothing: input and output are where the session computes."""
        import onnxruntime

        binding = self.session.io_binding()
        place, index = ("cuda", self.index) if self.provider == CUDA else ("cpu", 0)
        pixels = batch.detach().cpu().contiguous().numpy()
        binding.bind_ortvalue_input(INPUT, onnxruntime.OrtValue.ortvalue_from_numpy(pixels, place, index))
        binding.bind_output(OUTPUT, place, index)

        def run() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


def _current(model: nn.Module, example: Tensor) -> bytes:
    program = torch.onnx.export(
        model, (example,), dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    return program.model_proto.SerializeToString()


def _legacy(model: nn.Module, example: Tensor) -> bytes:
    content = io.BytesIO()
    with _without_stdout():
        torch.onnx.export(
            model, (example,), content, dynamo=False, input_names=[INPUT], output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )  # fmt: skip
    return content.getvalue()


EXPORTERS = {"current": _current, "legacy": _legacy}


def _difference(content: bytes, model: nn.Module, input_shape: Sequence[int], images: Tensor | None) -> float:
    """The largest between ONNX Runtime's outputs on the CPU and PyTorch's, as a share of the largest output."""
    network = OnnxNetwork(content, torch.device("cpu"), torch.get_num_threads())
    device = next(model.parameters()).device
    drawn = torch.randn(max(PARITY_BATCHES), *input_shape, generator=torch.Generator().manual_seed(0))
    pools = [drawn, -drawn] + ([] if images is None else [images.cpu()])
    worst = 0.0
    for batch in (pool[:size] for pool in pools for size in PARITY_BATCHES):
        with torch.inference_mode():
            expected = model(batch.to(device)).cpu()
        actual = network(batch)
        if actual.shape != expected.shape:
            raise ValueError(f"a batch of {len(batch)} gives outputs {tuple(actual.shape)}")
        difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def _short(error: Exception) -> str:
    """The line of an exporter's error that says why: its messages run to pages, the reason often in the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _without_stdout():
    """Nothing on file descriptor 1: where the legacy exporter fails, C++ prints the whole graph there."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _quiet():
    """The exporters tell of each pass they make and of what they will no longer do one day."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx.experimental.symbolic_shapes")
    levels: Mapping[str, int] = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
