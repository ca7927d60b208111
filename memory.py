"""How much memory something takes at its peak: a forward pass, and the steps of a run.

On the CPU a forward pass is measured in a process of its own, run as `python memory.py`, where nothing else allocates.
It is sent the model's shapes, not its weights, and answers one request after the other.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import os
import selectors
import statistics
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

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what to write into CLEAR, see proc(5)
LENGTH = struct.Struct("<Q")
LONGEST_ANSWER = 100_000  # bytes
PATIENCE = 300.0  # seconds that an answer may take
PASSES = 5
LEAST = 2**20  # bytes; less is lost among the pages that threads and libraries take and give back
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
        self._answers: BinaryIO | None = None

    def __enter__(self) -> ForwardMemory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._answers.close()
            self._process = None

    def peak_bytes(self, model: nn.Module, input_shape: Sequence[int], batch_size: int, threads: int) -> int:
        """Bytes that a pass of `batch_size` images [C, H, W] takes at its peak, beyond the weights and the images.

        What the pass allocates: activations, and what the kernels need to lay out weights and columns. It depends on
        shapes, not on values. The median of several passes on the CPU. Raises BenchmarkError where it cannot be
        measured, or is too little to be.
        """
        shape = (batch_size, *input_shape)
        if self.device.type == "cuda":
            model = copy.deepcopy(model).to(self.device, memory_format=torch.channels_last).eval()
            return _growth_on_cuda(model, _images(shape, model).to(self.device))
        try:
            found = int(self._ask({"model": _shapes_only(model), "shape": shape, "threads": threads}))
            if found < LEAST:
                raise BenchmarkError("memory of a forward pass: not measured, it is below 1 MiB")
            return found
        except BenchmarkError:
            raise
        except Exception as error:  # whatever pickling or the other process trips over
            self.__exit__()
            raise BenchmarkError(f"memory of a forward pass: not measured ({type(error).__name__}: {error})") from error

    def _start(self) -> None:
        """Start the process and wait until it is ready: what it does to start must not disturb what is timed next.

        In a session of its own, since Ctrl-C is for the run, with which it ends. Its answers have a pipe of their own,
        since anything may print.
        """
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # classes come from anywhere
        ours, its = os.pipe()
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), str(its)]
        try:
            self._answers = os.fdopen(ours, "rb", buffering=0)
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, pass_fds=(its,),
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(its)
        if _receive(self._answers, PATIENCE) != b"ready":
            raise RuntimeError("its process did not start")

    def _ask(self, request: dict[str, Any]) -> int:
        if not STATUS.exists() or not CLEAR.exists():
            raise BenchmarkError("memory of a forward pass: not measured, this system has no /proc to read it from")
        content = io.BytesIO()
        torch.save(request, content)
        if self._process is None:
            self._start()
        _send(self._process.stdin, content.getvalue())
        answer = _receive(self._answers, PATIENCE)
        if answer is None:
            code = self._process.wait()
            raise RuntimeError(f"its process ended with {code}, was there too little memory?")
        kind, _, text = answer.decode().partition(" ")
        if kind != "bytes":
            raise BenchmarkError(f"memory of a forward pass: not measured ({text})")
        return int(text)


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


def _receive(stream: BinaryIO, patience: float | None = None) -> bytes | None:
    """One message, or None where the other side has ended. Raises TimeoutError after so many seconds."""
    if patience is not None:
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            if not selector.select(patience):
                raise TimeoutError(f"no answer within {patience:g} s")
    header = stream.read(LENGTH.size)
    if len(header) != LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    if patience is not None and length > LONGEST_ANSWER:
        raise ValueError("its answer is none")
    parts = b""
    while len(parts) < length and (part := stream.read(length - len(parts))):
        parts += part
    return parts


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
    growths = []
    with torch.inference_mode():
        model(images[:1])
        model(images)
        for _ in range(PASSES):
            if not _reset_peak():
                raise RuntimeError("the high-water mark of memory cannot be reset here")
            before = _resident("VmRSS")
            model(images)
            growths.append(_resident("VmHWM") - before)
    return round(statistics.median(growths))


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
    with os.fdopen(int(sys.argv[1]), "wb") as pipe:
        _serve(sys.stdin.buffer, pipe)
