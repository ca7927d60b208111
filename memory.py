"""How much memory something takes at its peak: a forward pass, and the steps of a run.

On the CPU a forward pass is measured in a process of its own, run as `python memory.py`, where nothing else allocates.
It is sent the model's shapes, not its weights, and answers one request after the other.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import nn

from errors import BenchmarkError

log = logging.getLogger(__name__)

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what to write into CLEAR, see proc(5)
LENGTH = struct.Struct("<Q")
# glibc's mallopt: blocks from so many bytes on are mapped one by one, and given back when freed. Otherwise freed memory
# stays with the process, and what a pass takes from there does not show.
M_MMAP_THRESHOLD, MAPPED_FROM = -3, 64 * 1024


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[SimpleNamespace]:
    """`.bytes` of what it yields is, after the block, the most memory in use while it ran; None where nobody knows.

    On CUDA what the allocator had given out on the device; on the CPU the resident memory of this whole process, as
    Linux counts it, the libraries and the data that were there before included.
    """
    peak = SimpleNamespace(bytes=None)
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    known = _reset_peak()
    yield peak
    peak.bytes = _resident("VmHWM") if known else None


class ForwardMemory:
    """Peak memory of forward passes; a context manager, since it keeps a process for the CPU."""

    def __init__(self, device: torch.device):
        self.device = torch.device(device)
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ForwardMemory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def peak_bytes(self, model: nn.Module, input_shape: Sequence[int], batch_size: int, threads: int) -> int:
        """Bytes that a pass of `batch_size` images [C, H, W] takes at its peak, beyond the weights and the images.

        What the pass allocates: activations, and what the kernels need to lay out weights and columns. It depends on
        shapes, not on values. Raises BenchmarkError where it cannot be measured.
        """
        shape = (batch_size, *input_shape)
        if self.device.type == "cuda":
            model = copy.deepcopy(model).to(self.device, memory_format=torch.channels_last).eval()
            return _growth_on_cuda(model, _images(shape, model).to(self.device))
        try:
            return int(self._ask({"model": _shapes_only(model), "shape": shape, "threads": threads}))
        except BenchmarkError:
            raise
        except Exception as error:  # whatever pickling or the other process trips over
            self.__exit__()
            raise BenchmarkError(f"memory of a forward pass: not measured ({type(error).__name__}: {error})") from error

    def _ask(self, request: dict[str, Any]) -> int:
        if not STATUS.exists() or not CLEAR.exists():
            raise BenchmarkError("memory of a forward pass: not measured, this system has no /proc to read it from")
        content = io.BytesIO()
        torch.save(request, content)
        if self._process is None:
            self._process = _started()
        _send(self._process.stdin, content.getvalue())
        answer = _receive(self._process.stdout)
        if answer is None:
            code = self._process.wait()
            raise RuntimeError(f"its process ended with {code}, was there too little memory?")
        kind, _, text = answer.decode().partition(" ")
        if kind != "bytes":
            raise BenchmarkError(f"memory of a forward pass: not measured ({text})")
        return int(text)


def _started() -> subprocess.Popen:
    """The process, ready: what it does to start must not disturb what is timed next."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # classes come from anywhere
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    if _receive(process.stdout) != b"ready":
        raise RuntimeError("its process did not start")
    return process


def _shapes_only(model: nn.Module) -> nn.Module:
    """A copy whose parameters have no values; buffers keep theirs, as some of them are indices."""
    memo = {
        id(p): nn.Parameter(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _send(stream: BinaryIO, content: bytes) -> None:
    stream.write(LENGTH.pack(len(content)) + content)
    stream.flush()


def _receive(stream: BinaryIO) -> bytes | None:
    """One message, or None where the other side has ended."""
    header = stream.read(LENGTH.size)
    return stream.read(*LENGTH.unpack(header)) if len(header) == LENGTH.size else None


def _reset_peak() -> bool:
    """Set this process's high-water mark to what is resident now, freed memory given back first; whether it could."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: what is freed stays resident
        pass
    try:
        if not CLEAR.exists():
            return False
        CLEAR.write_text(RESET_PEAK)
        return _resident("VmHWM") is not None
    except OSError:
        return False


def _resident(which: str) -> int | None:
    """Bytes, of VmRSS (now) or VmHWM (the most since it was reset)."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    return None


def _images(shape: Sequence[int], model: nn.Module) -> torch.Tensor:
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return torch.ones(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _growth_on_cuda(model: nn.Module, images: torch.Tensor) -> int:
    with torch.inference_mode():
        model(images[:1])
        torch.cuda.synchronize(images.device)
        before = torch.cuda.memory_allocated(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        model(images)
        torch.cuda.synchronize(images.device)
        return torch.cuda.max_memory_allocated(images.device) - before


def _growth_here(request: dict[str, Any]) -> int:
    """In the process of its own: bytes that one pass adds to what is resident, the libraries loaded and warm."""
    model = request["model"]
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(values.zero_(), requires_grad=False)
    model = model.eval().to(memory_format=torch.channels_last)
    torch.set_num_threads(request["threads"])
    images = _images(request["shape"], model)
    with torch.inference_mode():
        model(images[:1])
        model(images)
        if not _reset_peak():
            raise RuntimeError("the high-water mark of memory cannot be reset here")
        before = _resident("VmRSS")
        model(images)
    return max(_resident("VmHWM") - before, 0)


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
    _send(answers, b"ready")
    while (request := _receive(requests)) is not None:
        try:
            # What the parent process sent, never a file: it may hold any module class.
            answer = f"bytes {_growth_here(torch.load(io.BytesIO(request), weights_only=False))}"
        except Exception as error:
            answer = f"error {type(error).__name__}: {error}".replace("\n", " ")
        _send(answers, answer.encode())


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a model prints must not get between the answers
    _serve(sys.stdin.buffer, pipe)
