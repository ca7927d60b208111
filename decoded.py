"""Images of many small files, decoded once and kept: opening fifty thousand takes minutes, reading one file seconds."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch

from cache import load_checked, made_once, save_checked

log = logging.getLogger(__name__)

KIND = b"decoded images"
VERSION = 1  # raised when the code makes other pixels of the same files


def decoded_once(
    paths: Sequence[Path], image_size: int, decode: Callable[[], np.ndarray], *, cache_dir: str | Path, name: str
) -> np.ndarray:
    """What `decode` makes of the files, uint8 [N, image_size, image_size, 3], from the cache where it is there.

    The files are known by their paths below their common folder, sizes and times of change, so that a file changed in
    place is seen, and data copied elsewhere are decoded once more. A file of the cache that is damaged is made again
    with a warning; a disk that cannot be written costs a warning as well. Raises BenchmarkError as `decode` does.
    """
    key = _key(paths, image_size)
    if key is None:
        return decode()  # it has the message
    path = Path(cache_dir, f"{name}-{image_size}-{key[:16]}.images")
    shape = (len(paths), image_size, image_size, 3)
    return made_once(
        path, lambda: _from_cache(path, key, shape), lambda: _decoded(path, key, decode), f"decoding {name}"
    )


def _key(paths: Sequence[Path], image_size: int) -> str | None:
    """None where a file is not there."""
    digest = hashlib.sha256(f"{VERSION} {PIL.__version__} {image_size}".encode())
    folder = paths[0].parent.parent if paths else Path()
    try:
        for path in paths:
            state = path.stat()
            name = path.relative_to(folder) if path.is_relative_to(folder) else path
            digest.update(f"\n{name}\0{state.st_size} {state.st_mtime_ns}".encode(errors="surrogateescape"))
    except OSError:
        return None
    return digest.hexdigest()


def _from_cache(path: Path, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """None where there is no file, or one that is refused with a warning."""
    try:
        content = load_checked(path, KIND)
        if content["key"] != key:
            raise ValueError("they are of other files")
        images = content["images"]
        if images.dtype != torch.uint8 or tuple(images.shape) != shape:
            raise ValueError(f"they are {images.dtype} {list(images.shape)}")
    except FileNotFoundError:
        return None
    except Exception as error:  # an intact checksum over foreign content can fail in any of these steps
        log.warning("Decoded images %s are not used, the files are decoded again: %s", path, error)
        return None
    log.info("Decoded images reused: %s", path)
    return images.numpy()


def _decoded(path: Path, key: str, decode: Callable[[], np.ndarray]) -> np.ndarray:
    images = decode()
    try:
        save_checked(path, {"key": key, "images": torch.from_numpy(images)}, KIND)
    except OSError as error:
        log.warning("Decoded images are not kept, the next run decodes again: %s cannot be written (%s)", path, error)
    return images
