"""Loaders: what a model is fed, a normalised batch at a time, from memory or from image files.

Both kinds hold no more than 8-bit pixels, and turn one batch at a time into floats. Order and augmentation are a
function of (seed, loader name, epoch) alone: not of the global generators, nor of the number of workers.
"""

import logging
import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
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
        self.device = torch.device(device)
        self.epoch = 0
        self._device_labels = self.labels.to(self.device)
        # (x / 255 - mean) / std as one multiplication and one addition
        self._scale = (1 / (255 * torch.tensor(std))).to(self.device)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).to(self.device)

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the iterations to come."""
        self.epoch = epoch

    def batches(self) -> tuple[Tensor, ...]:
        """Positions of this epoch's images, int64, one tensor a batch, on the CPU."""
        if not self.shuffle:
            return torch.arange(self.num_images).split(self.batch_size)
        order = torch.randperm(self.num_images, generator=self._generator("order"))
        return order.tensor_split(len(self))

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
        super().__init__(labels, **options)
        self.flip = flip
        self._pixels = images.permute(0, 2, 3, 1).contiguous().to(self.device)
        self._rows = None if rows is None else rows.to(self.device)

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
    """Batches decoded from image files as they are needed, by `num_workers` processes (at most one a CPU core).

    paths: bytes [N] below `folder`, numpy; one array rather than N Python strings, so that workers share its memory.
    image_size: side of the square that comes out. Shortest side resized to 256/224 of it, then the centre; with
    `augment` a random part, 8 to 100 % of the area, and a random flip (torchvision's ImageNet recipes).
    Raises BenchmarkError naming the file that cannot be decoded.
    """

    def __init__(
        self, folder: Path, paths: np.ndarray, labels: Tensor, *, image_size: int, num_workers: int, **options
    ):
        if len(paths) != len(labels):
            raise ValueError(f"{len(labels)} labels for {len(paths)} images")
        super().__init__(labels, **options)
        self.image_size = image_size
        self.num_workers = min(num_workers, _cores())  # more only wait for each other
        self._images = _ImageFiles(folder, paths, image_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.batches()
        for positions, pixels in zip(batches, self._decoded(batches), strict=True):
            labels = self._device_labels[positions.to(self.device)]
            yield self._normalise(pixels.to(self.device, non_blocking=True)), labels

    def _decoded(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """uint8 [B, H, W, 3] a batch, by worker processes that live as long as the iteration."""
        workers = self.num_workers if _may_have_children(self.num_workers) else 0
        loader = DataLoader(
            self._images,
            batch_sampler=self._requests(batches),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_leave_interrupts_to_the_parent,
            pin_memory=self.device.type == "cuda",
            generator=self._generator("workers"),
            multiprocessing_context=_context() if workers else None,
        )
        try:
            for pixels in loader:
                if isinstance(pixels, BenchmarkError):
                    raise pixels
                yield pixels
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise BenchmarkError(
                f"dataset.num_workers: {self.num_workers}; a process that decodes images died, most often for want of "
                "memory or of space in /dev/shm; set a lower number, 0 for none"
            ) from error

    def _requests(self, batches: Sequence[Tensor]) -> Iterator[list[tuple[int, int | None]]]:
        """A batch at a time, what the workers are asked for: (position, seed of its augmentation or None) an image."""
        if not self.augment:
            for batch in batches:
                yield [(position, None) for position in batch.tolist()]
            return
        seeds = torch.randint(0, 2**63 - 1, (self.num_images,), generator=self._generator("augmentation"))
        for batch in batches:
            yield list(zip(batch.tolist(), seeds[batch].tolist(), strict=True))


class _ImageFiles(Dataset):
    """(position, seed) -> uint8 [H, W, 3], or the BenchmarkError that says what is wrong with the file.

    The error is returned: raised in a worker process, it would reach the user wrapped in that worker's traceback.
    """

    def __init__(self, folder: Path, paths: np.ndarray, image_size: int):
        self.folder, self.paths, self.image_size = folder, paths, image_size
        self.random_crop = RandomResizedCrop(image_size, antialias=True)

    def __getitem__(self, request: tuple[int, int | None]) -> Tensor | BenchmarkError:
        position, seed = request
        try:
            image = read_image(self.folder / os.fsdecode(self.paths[position]))
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
