"""Which other runs of the benchmark are at work on this machine: what is timed beside them says little."""

import getpass
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from disk import is_running


@contextmanager
def at_work() -> Iterator[None]:
    """Be seen by the other runs of this machine while the block runs."""
    mark = _folder() / str(os.getpid())
    with suppress(OSError):
        mark.parent.mkdir(mode=0o700, exist_ok=True)
        mark.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink()


def others() -> int:
    """How many other processes of this user are at a run, here and now; marks of those that were killed go."""
    count = 0
    with suppress(OSError):
        for mark in _folder().iterdir():
            if not mark.name.isdigit() or int(mark.name) == os.getpid():
                continue
            if is_running(int(mark.name)):
                count += 1
            else:
                mark.unlink(missing_ok=True)
    return count


def _folder() -> Path:
    """Of this machine, not of a file system that several share."""
    return Path(tempfile.gettempdir(), f"filter-pruning-{_user()}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())
