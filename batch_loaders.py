"""Loaders: what a model is fed, a normalised batch at a time, from memory or from image files.

Both kinds hold no more than 8-bit pixels, and turn one batch at a time into floats. Order and augmentation are a
function of (seed, loader name, epoch) alone: not of the global generators, nor of the number of workers.
"""

import copy
import logging
import multiprocessing
import os
import signal
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as transforms

from data_files import read_image
from errors import BenchmarkError
from helpers import generator

log = logging.getLogger(__name__)

CROP_PADDING = 4  # pixels of black on each side before a random crop; He et al., CVPR 2016, section 4.2
RESIZE_OVER_CROP = 256 / 224  # evaluation size before and after the centre crop; torchvision's ImageNet recipe


class Relabelled:
    """A loader with other labels: `places` [labels] is what each becomes."""

    def __init__(self, loader: "BatchLoader", places: Tensor):
        self.loader, self.places = loader, places

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            yield images, self.places.to(labels.device)[labels]

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def part(self, rank: int, size: int, device: torch.device) -> "Relabelled":
        return Relabelled(self.loader.part(rank, size, device), self.places)


class BatchLoader(ABC):
    """Iterating yields (images float32 [B, 3, H, W] normalised and channels_last, labels int64 [B]) on `device`.

    A shuffled loader cuts its N images into ceil(N / batch_size) nearly equal batches: none is dropped, and BatchNorm
    never meets a batch of one by accident. One that is not shuffled keeps the dataset's order and a short last batch.

    labels: int64 [N] on the CPU, in dataset order. mean, std: per channel, of pixels in [0, 1].
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        shuffle: bool,
        augment: bool,
        seed: int,
        name: str,
        device: torch.device | str,
    ):
        if batch_size < 1 or len(labels) == 0:
            raise ValueError(f"loader {name!r}: {len(labels)} images in batches of {batch_size}")
        self.labels = labels.to("cpu", torch.int64)
        self.batch_size, self.shuffle, self.augment, self.seed, self.name = batch_size, shuffle, augment, seed, name
        self.epoch = 0
        self.share = 0, 1
        # (x / 255 - mean) / std as one multiplication and one addition
        self._scale = 1 / (255 * torch.tensor(std))
        self._shift = -torch.tensor(mean) / torch.tensor(std)
        self._move(torch.device(device))

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the iterations to come."""
        self.epoch = epoch

    def part(self, rank: int, size: int, device: torch.device) -> "BatchLoader":
        """The same loader on `device`, with every batch cut into `size` nearly equal parts, of which it has one.

        Raises BenchmarkError for training batches of fewer images than parts.
        """
        if self.shuffle and self.num_images // len(self) < size:
            raise BenchmarkError(
                f"training.processes: {size}; a batch of {self.num_images // len(self)} images leaves some without "
                "any, use fewer or a larger training.batch_size_train"
            )
        other = copy.copy(self)
        other.share = rank, size
        other._move(device)
        return other

    def batches(self) -> tuple[Tensor, ...]:
        """Positions of this epoch's images, int64, one tensor a batch, on the CPU; those of `part` where it is one."""
        if self.shuffle:
            order = torch.randperm(self.num_images, generator=self._generator("order"))
            whole = order.tensor_split(len(self))
        else:
            whole = torch.arange(self.num_images).split(self.batch_size)
        rank, size = self.share
        return whole if size == 1 else tuple(part for b in whole if len(part := b.tensor_split(size)[rank]))

    def _move(self, device: torch.device) -> None:
        self.device = device
        self._device_labels = self.labels.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)

    def _generator(self, purpose: str) -> torch.Generator:
        return generator(self.seed, f"{self.name}/{purpose}/{self.epoch}")

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def _normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3 or 1] -> float32 [B, 3, H, W] in channels_last memory; one channel becomes three."""
        return torch.addcmul(self._shift, pixels.float(), self._scale).permute(0, 3, 1, 2)


class TensorLoader(BatchLoader):
    """Batches out of one uint8 tensor.

    images: [N, C, H, W] uint8 with C in {1, 3}; best in channels_last memory, which is then shared and not copied.
    rows: which images are meant, [n]; labels[i] belongs to images[rows[i]]. None: all of them.
    augment: a random crop after padding by 4 and, when `flip`, a random horizontal flip.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, rows: Tensor | None = None, flip: bool = True, **options):
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 [N, 1 or 3, H, W], not {images.dtype} {list(images.shape)}")
        if len(labels) != len(images if rows is None else rows):
            raise ValueError(f"{len(labels)} labels for {len(images if rows is None else rows)} images")
        self.flip = flip
        self._pixels, self._rows = images.permute(0, 2, 3, 1).contiguous(), rows
        super().__init__(labels, **options)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.batches()
        draws = self._draw_augmentation() if self.augment else None
        for positions in batches:
            positions = positions.to(self.device)
            rows = positions if self._rows is None else self._rows[positions]
            pixels = self._pixels.index_select(0, rows)
            if draws is not None:
                pixels = augment(pixels, *draws[positions].unbind(1))
            yield self._normalise(pixels), self._device_labels[positions]

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self._pixels = self._pixels.to(device)
        self._rows = None if self._rows is None else self._rows.to(device)

    def _draw_augmentation(self) -> Tensor:
        """int64 [N, 3]: offset down in 0..8, offset right in 0..8, whether to flip; by position in the dataset."""
        source = self._generator("augmentation")
        draws = torch.randint(0, 2 * CROP_PADDING + 1, (self.num_images, 3), generator=source)
        draws[:, 2] = torch.randint(0, 2, (self.num_images,), generator=source) * self.flip
        return draws.to(self.device)


def augment(pixels: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """Crop and flip a batch: pixels uint8 [B, H, W, C], padded by 4 with black; down, right in 0..8; flip in {0, 1}.

    One gather does both: a flipped image reads its columns from the right.
    """
    count, height, width, _ = pixels.shape
    padding = CROP_PADDING
    padded = torch.nn.functional.pad(pixels, (0, 0, padding, padding, padding, padding))
    columns = torch.arange(width, device=pixels.device).expand(count, width)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns) + right[:, None]
    rows = torch.arange(height, device=pixels.device) + down[:, None]
    images = torch.arange(count, device=pixels.device)
    return padded[images[:, None, None], rows[:, :, None], columns[:, None, :]]


class FolderLoader(BatchLoader):
    """Batches decoded from image files as they are needed, by `decoders`, which several loaders may share.

    paths: bytes [N] below `folder`, numpy; one array rather than N Python strings.
    Raises BenchmarkError naming the file that cannot be decoded.
    """

    def __init__(self, folder: Path, paths: np.ndarray, labels: Tensor, *, decoders: "Decoders", **options):
        if len(paths) != len(labels):
            raise ValueError(f"{len(labels)} labels for {len(paths)} images")
        self.folder, self.paths, self.decoders = folder, paths, decoders
        super().__init__(labels, **options)

    def part(self, rank: int, size: int, device: torch.device) -> "FolderLoader":
        other = super().part(rank, size, device)
        other.decoders = self.decoders.part(size, device)
        return other

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.batches()
        for positions, pixels in zip(batches, self.decoders.decoded(self._requests(batches)), strict=True):
            labels = self._device_labels[positions.to(self.device)]
            yield self._normalise(pixels.to(self.device, non_blocking=True)), labels

    def _requests(self, batches: Sequence[Tensor]) -> Iterator[list["Request"]]:
        """A batch at a time, what is to be decoded."""
        seeds = None
        if self.augment:
            seeds = torch.randint(0, 2**63 - 1, (self.num_images,), generator=self._generator("augmentation"))
        for batch in batches:
            paths = [os.path.join(self.folder, os.fsdecode(path)) for path in self.paths[batch.numpy()]]
            yield list(zip(paths, [None] * len(batch) if seeds is None else seeds[batch].tolist(), strict=True))


Request = tuple[str, int | None]
"""Path of an image file, and the seed of its augmentation or None."""


class Decoders:
    """Image files become pixels, in `num_workers` processes (at most one a CPU core) that are kept from one pass over
    images to the next, whichever loader makes it.

    image_size: side of the square that comes out. Shortest side resized to 256/224 of it, then the centre; with the
    seed of an augmentation a random part, 8 to 100 % of the area, and a random flip (torchvision's ImageNet recipes).
    """

    def __init__(self, image_size: int, num_workers: int, device: torch.device):
        self.image_size, self.device = image_size, device
        self.num_workers = min(num_workers, _cores())  # more only wait for each other
        self._loader: DataLoader | None = None
        self._asked: Iterable[list[Request]] | None = None

    def part(self, size: int, device: torch.device) -> "Decoders":
        """Others, for one of `size` processes that read at the same time."""
        return Decoders(self.image_size, -(-self.num_workers // size), device)

    def decoded(self, requests: Iterable[list[Request]]) -> Iterator[Tensor]:
        """uint8 [B, H, W, 3] for each list of requests; memory of the device's own kind where it is a GPU."""
        if self._asked is not None:  # two passes at a time: the second has its own
            yield from Decoders(self.image_size, self.num_workers, self.device).decoded(requests)
            return
        self._asked, whole = requests, False
        try:
            if self._loader is None:
                self._loader = self._started()
            for pixels in self._loader:
                if isinstance(pixels, BenchmarkError):
                    raise pixels
                yield pixels
            whole = True
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise BenchmarkError(
                f"dataset.num_workers: {self.num_workers}; a process that decodes images died, most often for want of "
                "memory or of space in /dev/shm; set a lower number, 0 for none"
            ) from error
        finally:
            self._asked = None
            if not whole:  # its processes end: they have images before them that nobody waits for
                self._loader = None

    def _started(self) -> DataLoader:
        workers = self.num_workers if _may_have_children(self.num_workers) else 0
        return DataLoader(
            _ImageFiles(self.image_size),
            batch_sampler=_AskedOf(self),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_leave_interrupts_to_the_parent,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: seeds of the workers are otherwise drawn from the global one
            multiprocessing_context=_context() if workers else None,
            persistent_workers=workers > 0,
        )


class _AskedOf:
    """What decoders are asked for now, as the DataLoader that outlives the question looks for it."""

    def __init__(self, decoders: Decoders):
        self.decoders = weakref.proxy(decoders)  # or the two would keep each other, and the processes with them

    def __iter__(self) -> Iterator[list[Request]]:
        return iter(self.decoders._asked)


class _ImageFiles(Dataset):
    """Request -> uint8 [H, W, 3], or the BenchmarkError that says what is wrong with the file.

    The error is returned: raised in a worker process, it would reach the user wrapped in that worker's traceback.
    """

    def __init__(self, image_size: int):
        self.image_size = image_size
        self.random_crop = RandomResizedCrop(image_size, antialias=True)

    def __getitem__(self, request: Request) -> Tensor | BenchmarkError:
        path, seed = request
        try:
            image = read_image(path)
        except BenchmarkError as error:
            return error
        image = self._centre(image) if seed is None else self._random_part(image, seed)
        return torch.from_numpy(np.array(image))

    def _centre(self, image: Image.Image) -> Image.Image:
        resized = transforms.resize(image, round(self.image_size * RESIZE_OVER_CROP))
        return transforms.center_crop(resized, [self.image_size, self.image_size])

    def _random_part(self, image: Image.Image, seed: int) -> Image.Image:
        # torchvision draws from the global generator, which is put back afterwards
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            image = self.random_crop(image)
            return transforms.hflip(image) if torch.rand(()) < 0.5 else image


def _may_have_children(wanted: int) -> bool:
    """Whether this process may start any: a launcher's daemonic one may not, and images are then decoded in it."""
    if wanted and multiprocessing.current_process().daemon:
        log.warning("dataset.num_workers: %d; a daemonic process may not start others, 0 are used", wanted)
        return False
    return True


def _context() -> str | None:
    """How worker processes start: as is usual on this platform, also where a launcher has put in a way of its own."""
    usual = multiprocessing.get_all_start_methods()
    return None if multiprocessing.get_start_method(allow_none=True) in (None, *usual) else usual[0]


def _cores() -> int:
    """CPU cores that this process may use; the affinity is known on Linux only."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _collate(images: Sequence[Tensor | BenchmarkError]) -> Tensor | BenchmarkError:
    errors = [image for image in images if isinstance(image, BenchmarkError)]
    return errors[0] if errors else torch.stack(list(images))


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of the group; the parent ends its workers and speaks for all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
