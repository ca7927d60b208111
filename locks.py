"""One process at a time, on one machine or on several that share a file system: locks that end with their holder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


@contextmanager
def locked(path: str | Path, doing: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` inside the block; the block is told whether it is held.

    The operating system lets go of it when the process ends, however that ends, so that no lock is ever stale. The file
    itself stays: removing it would let two processes in. Where the file system knows no locks or cannot be written, the
    block runs without one, with a warning.

    Args:
        path: of the lock file; its folder is made.
        doing: what whoever holds it does, for the message while waiting.
        wait: until it is free; otherwise False is handed to the block at once where it is not.
    """
    path = Path(path)
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = _acquired(lock, doing, wait)
    except (OSError, NotImplementedError) as error:
        log.warning("%s: cannot be locked (%s); another process may do the same work at the same time", path, error)
        yield True
        return
    try:
        yield held
    finally:
        if held:
            lock.release()


def _acquired(lock: FileLock, doing: str, wait: bool) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            return False
        log.info("Another process is %s; waiting for it ...", doing)
        lock.acquire()
    return True
