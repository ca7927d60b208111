"""Images of many small files, decoded once and kept: opening fifty thousand takes longer than reading one file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from kept import Kind, kept

VERSION = 1  # raised when the code makes other pixels of the same files


def _pixels(content: dict[str, Any]) -> np.ndarray:
    images = content["images"]
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"it holds {images.dtype} {list(images.shape)}")
    return images.numpy()


KIND: Kind[np.ndarray] = Kind(
    "decoded images", "no file is opened", lambda images: {"images": torch.from_numpy(images)}, _pixels
)


def decoded_once(
    paths: Sequence[Path], image_size: int, decode: Callable[[], np.ndarray], *, cache_dir: str | Path, name: str
) -> np.ndarray:
    """What `decode` makes of the files, uint8 [N, image_size, image_size, 3], from the cache where it is there.

    The files are known by their paths below their common folder, sizes, times of change and places in the file system,
    which no archive sets: a file changed in place is seen, and data copied elsewhere are decoded once more. Raises
    BenchmarkError as `decode` does.
    """
    key = _key(paths, image_size)
    if key is None:
        return decode()  # it has the message
    path = Path(cache_dir, f"{name}-{image_size}-{key[:16]}.images")
    return kept(KIND, path, key, decode, f"decoding {name}")


def _key(paths: Sequence[Path], image_size: int) -> str | None:
    """None where a file is not there."""
    digest = hashlib.sha256(f"{VERSION} {PIL.__version__} {image_size}".encode())
    folder = paths[0].parent.parent if paths else Path()
    try:
        for path in paths:
            state = path.stat()
            name = path.relative_to(folder) if path.is_relative_to(folder) else path
            told = state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino
            digest.update(f"\n{name} {told}".encode(errors="surrogateescape"))
    except OSError:
        return None
    return digest.hexdigest()
