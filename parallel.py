"""Work that several processes of this machine share, a GPU each: who they are, what they add up, how they end."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from disk import is_running
from errors import BenchmarkError, ConfigError

KEY = "training.processes"
FOLDER = "filter-pruning-crew-"


@dataclass(frozen=True)
class Crew:
    """One process (`rank` of `size`) and its device. Alone, all of its methods leave things as they are."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        return self.size == 1

    def replica(self, model: nn.Module) -> nn.Module:
        """`model` with gradients that are summed, and BatchNorm statistics that are taken, over all processes."""
        if self.alone:
            return model
        index = [self.device.index] if self.device.type == "cuda" else None
        # Buffers need no sending: running statistics of the whole batch are the same in every process.
        return DistributedDataParallel(
            with_synced_batchnorm(model, self.device), device_ids=index, forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )  # fmt: skip

    def weighted(self, loss: Tensor, images: int) -> Tensor:
        """The mean loss of this process's part of a batch, such that the mean over processes is that of the batch."""
        if self.alone:
            return loss
        whole = self.summed(torch.tensor(images, dtype=torch.float64, device=self.device))
        return loss * (self.size * images / whole).to(loss.dtype)

    def summed(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if not self.alone:
            dist.all_reduce(value)
        return value


def require(device: torch.device, processes: int) -> None:
    """Raises ConfigError where the machine has no `processes` GPUs from `device` on."""
    if device.type != "cuda" or processes == 1:
        return
    first, count = device.index or 0, torch.cuda.device_count()
    if first + processes > count:
        raise ConfigError(f"{KEY}: {processes}; from cuda:{first} on this machine has {count - first} CUDA devices")


def in_processes(
    work: Callable[..., dict[str, Any]], arguments: Sequence[Any], *, processes: int, device: torch.device
) -> dict[str, Any]:
    """What `work(crew, *arguments)` returns in the first of as many new processes, which end with it.

    `work` is a function of a module; `arguments` are pickled, tensors on the CPU go through shared memory; the result
    holds plain values and tensors. On CUDA each process has a GPU, counted from `device`; on the CPU its share of the
    threads. Raises the BenchmarkError that the first process to fail raises, or one that says how it died.
    """
    require(device, processes)
    threads = max(1, torch.get_num_threads() // processes)
    _clear_leftovers()
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-") as folder:
        given = (folder, work, tuple(arguments), processes, device, threads)
        try:
            with _known_start_method():
                crew = start_processes(_member, given, nprocs=processes, join=False, start_method="spawn")
        except Exception as error:  # whatever pickling trips over, and a full /dev/shm
            raise BenchmarkError(f"{KEY}: {processes}; cannot be handed their work ({error}); use 1") from error
        try:
            failed = _first_to_fail(crew.processes)
        finally:
            for process in crew.processes:  # all that are left, after Ctrl-C as well
                process.kill()
                process.join()
        if failed is None:
            return torch.load(Path(folder, "result.pt"), weights_only=True)
        told = Path(folder, "error.txt")
        ended = f"{KEY}: {processes}; one of them ended early, {_how(failed)}"
        raise BenchmarkError(told.read_text() if told.exists() else ended)


def _first_to_fail(processes: Sequence[BaseProcess]) -> int | None:
    """The exit code of a process that does not end well, as soon as one does not; None once all have."""
    left = {process.sentinel: process for process in processes}
    while left:
        for sentinel in wait(left):
            process = left.pop(sentinel)
            process.join()
            if process.exitcode:  # one that was killed takes others with it: its is the word
                return min(other.exitcode for other in processes if other.exitcode)
    return None


def _how(exit_code: int) -> str:
    if exit_code < 0:
        return f"by signal {signal.Signals(-exit_code).name}; was it short of memory?"
    return f"with exit code {exit_code}; its own words stand above"


@contextmanager
def _known_start_method() -> Iterator[None]:
    """A launcher may start processes in a way of its own, whose name new ones are told and do not know."""
    before = multiprocessing.get_start_method(allow_none=True)
    if before in (None, *multiprocessing.get_all_start_methods()):
        yield
        return
    multiprocessing.set_start_method("spawn", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _clear_leftovers() -> None:
    """Remove the folders of processes that were killed while others worked for them."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        pid = left.name.removeprefix(FOLDER).partition("-")[0]
        if pid.isdigit() and not is_running(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _member(
    rank: int, folder: str, work: Callable[..., dict[str, Any]], arguments: tuple, size: int, device: torch.device,
    threads: int,
) -> None:  # fmt: skip
    """What each process does. It ends by itself, also when it fails: PyTorch would leave files of what it raised."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # comes when the parent dies; a shell's background jobs ignore it
    try:
        _work(rank, folder, work, arguments, size, device, threads)
    except BenchmarkError as error:
        partial = Path(folder, f"error-{rank}.txt")
        partial.write_text(str(error))
        with suppress(FileExistsError):  # the first has the word: others fail for want of it
            os.link(partial, Path(folder, "error.txt"))
        sys.exit(1)
    except Exception:
        if not Path(folder, "error.txt").exists():  # else it only misses the one that has the word
            traceback.print_exc()
        sys.exit(1)


def _work(
    rank: int, folder: str, work: Callable[..., dict[str, Any]], arguments: tuple, size: int, device: torch.device,
    threads: int,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    if device.type == "cuda":
        device = torch.device("cuda", (device.index or 0) + rank)
        torch.cuda.set_device(device)
    # A file, not a port, brings them together: nothing on the network is to be free or reachable.
    store = dist.FileStore(os.path.join(folder, "meeting"), size)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    result = work(Crew(device, rank, size), *arguments)
    if rank == 0:
        torch.save(result, Path(folder, "result.pt"))
    dist.destroy_process_group()


class _Summed(torch.autograd.Function):
    """The sum over all processes of a tensor, and of the gradients with respect to that sum."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    backward = forward


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics, while it trains, are those of the images of all processes (Ioffe and Szegedy, 2015).

    PyTorch's own SyncBatchNorm knows no CPU.
    """

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        places = (0, 2, 3)
        count = images.new_tensor([images.numel() / images.shape[1]])
        sums = _Summed.apply(torch.cat([images.sum(places), count]))
        count = sums[-1].detach()
        centred = images - (mean := sums[:-1] / count)[:, None, None]
        variance = _Summed.apply((centred * centred).sum(places)) / count
        if self.track_running_stats:
            self.num_batches_tracked += 1
            rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean += rate * (mean - self.running_mean)
                self.running_var += rate * (variance * count / (count - 1) - self.running_var)
        scale = (variance + self.eps).rsqrt()
        if not self.affine:
            return centred * scale[:, None, None]
        return centred * (scale * self.weight)[:, None, None] + self.bias[:, None, None]


def with_synced_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with its BatchNorms replaced, in place; they share their parameters and buffers with the former ones."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, child in list(model.named_children()):
        if isinstance(child, _BatchNorm):
            if type(child) is not nn.BatchNorm2d:
                raise BenchmarkError(f"{KEY}: {name} is a {type(child).__name__}, which CPUs cannot share; use 1")
            synced = SyncedBatchNorm2d.__new__(SyncedBatchNorm2d)
            synced.__dict__ = child.__dict__
            setattr(model, name, synced)
        else:
            with_synced_batchnorm(child, device)
    return model
