"""What is costly is made once for all runs: kept in the cache under a name that its making decides, checked when read.

Files are written whole, beside their checksum, by the process that holds their lock; others wait and read. They hold
tensors and plain values: reading one runs no code.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from disk import clear_leftovers, replace_whole
from locks import locked

T = TypeVar("T")
log = logging.getLogger(__name__)

MAGIC = b"%s of the filter-pruning benchmark, sha256 "  # of what


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of thing that is kept.

    what: its name, which its files begin with. idle: what need not be done where it is found. pack, unpack: into a dict
    of tensors and plain values, and back; unpack raises whatever it likes for content that is none. detail: more to say
    of one that was found.
    """

    what: str
    idle: str
    pack: Callable[[T], dict[str, Any]]
    unpack: Callable[[dict[str, Any]], T]
    detail: Callable[[T], str] = lambda _: ""

    @property
    def head(self) -> bytes:
        return MAGIC % self.what.encode()


def kept(kind: Kind[T], path: Path, key: str, make: Callable[[], T], doing: str) -> T:
    """What is kept at `path` under `key`, or else what `make` makes, left there: of several processes one makes it.

    A file that is damaged, or made under another key, is replaced with a warning; a disk that cannot be written costs a
    warning as well. `doing`: what making it is, for those who wait. Raises what `make` raises.
    """
    seen = _version_of(path)
    if (found := _read(kind, path, key)) is not None:
        return found
    with locked(path.parent / "locks" / f"{path.name}.lock", doing):
        clear_leftovers(path)
        if _version_of(path) != seen and (found := _read(kind, path, key)) is not None:
            return found
        made = make()
        _keep(kind, path, key, made)
        return made


def key_of(facts: Any) -> str:
    """The sha256 of the facts, in hexadecimal: the same for the same facts, in whatever order they are given."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def save_checked(kind: Kind, path: Path, content: Any) -> None:
    """Write `content` to `path`, behind its checksum, whole or not at all. Raises OSError."""
    payload = io.BytesIO()
    torch.save(content, payload)
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.sha256(payload.getbuffer()).hexdigest().encode()
    replace_whole(path, kind.head + checksum + b"\n" + payload.getbuffer())


def load_checked(kind: Kind, path: Path) -> Any:
    """What `save_checked` wrote, on the CPU. Raises OSError, or ValueError with the reason when it is not intact."""
    with path.open("rb") as file:
        header = file.readline(len(kind.head) + 65)  # bounded: a foreign file may be one long line
        payload = file.read()
    if not header.startswith(kind.head):
        raise ValueError("it is empty, or no file of this benchmark")
    if hashlib.sha256(payload).hexdigest().encode() + b"\n" != header.removeprefix(kind.head):
        raise ValueError("it is damaged or incomplete, its checksum does not match")
    return torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")


def _read(kind: Kind[T], path: Path, key: str) -> T | None:
    """None where there is no file, or one that is refused with a warning."""
    try:
        content = load_checked(kind, path)
        if content["key"] != key:
            raise ValueError("it was made by other settings")
        found = kind.unpack(content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # an intact checksum over foreign content can fail in any of these steps
        log.warning("%s not used and made again: %s: %s", kind.what.capitalize(), path, error)
        return None
    log.info("%s reused, %s: %s%s", kind.what.capitalize(), kind.idle, path, kind.detail(found))
    return found


def _keep(kind: Kind[T], path: Path, key: str, made: T) -> None:
    try:
        save_checked(kind, path, {"key": key, **kind.pack(made)})
    except OSError as error:
        log.warning("%s not kept, the next run makes it again: %s: %s", kind.what.capitalize(), path, error)
    else:
        log.info("%s kept for later runs: %s", kind.what.capitalize(), path)


def _version_of(path: Path) -> tuple[int, ...] | None:
    """Tells a file from the one that replaces it."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size
