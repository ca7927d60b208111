"""Files that are there complete or not at all, and what the disk refuses as one message."""

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import BenchmarkError


def write_json(path: str | Path, content: Any) -> None:
    """Any plain value as indented JSON."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """A NumPy archive of plain arrays."""
    import numpy as np  # not for those who only read records

    content = io.BytesIO()
    np.savez_compressed(content, **{name: np.asarray(values) for name, values in arrays.items()})
    write_whole(path, content.getvalue())


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file that is there complete or not at all: into a temporary one beside it, renamed when on the disk.

    Makes the folder if only that is missing.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses, as a message for the user: no space, no permission, no such folder."""
    try:
        yield
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror or error}; it needs a folder with space and access") from error
