"""Files that are there complete or not at all, and what the disk refuses as one message."""

import glob
import io
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from errors import BenchmarkError

HOST = re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"


def write_json(path: str | Path, content: Any) -> None:
    """Any plain value as indented JSON."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """A NumPy archive of plain arrays."""
    import numpy as np  # not for those who only read records

    content = io.BytesIO()
    np.savez_compressed(content, **{name: np.asarray(values) for name, values in arrays.items()})
    write_whole(path, content.getvalue())


def read_arrays(path: str | Path) -> dict[str, Any]:
    """What `write_arrays` wrote; nothing where there is no such file, or a damaged one."""
    import numpy as np

    try:
        content = io.BytesIO(Path(path).read_bytes())  # np.load leaves a damaged file open
        with np.load(content, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception:  # numpy and zipfile raise a dozen types on damaged files
        return {}


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file that is there complete or not at all; makes the folder if only that is missing.

    Raises BenchmarkError for what the disk refuses.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        replace_whole(path, content.encode() if isinstance(content, str) else content)


def replace_whole(path: Path, content: bytes) -> None:
    """Write `content` into a temporary file beside `path`, renamed when it is on the disk. Raises OSError.

    Whatever interrupts the writing, Ctrl-C included, leaves no part behind; what a killed process left, goes.
    """
    clear_leftovers(path)
    partial = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.partial")  # a rename cannot cross disks
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def clear_leftovers(path: Path) -> None:
    """Remove the unfinished files of processes of this machine that were killed while they wrote `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{HOST}.*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not is_running(int(pid)):
            with suppress(OSError):
                left.unlink()


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses, as a message for the user: no space, no permission, no such folder."""
    try:
        yield
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror or error}; it needs a folder with space and access") from error
