"""How far a run is, in a file of its own that it keeps itself: no scheduler is asked, and none is believed."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import get_type_hints

from disk import HOST, disk_errors, is_running, write_whole
from errors import BenchmarkError
from locks import locked
from neighbours import at_work
from records import scan_records

log = logging.getLogger(__name__)

STATUS, LOCK = "status.json", "run.lock"
HEARTBEAT = 10.0  # seconds between signs of life
SILENT = 90.0  # seconds without one, after which a run of another machine counts as stopped
STATES = ("queued", "running", "done", "failed")
MOST = 2**40  # no figure of a status is as large


@dataclass(frozen=True)
class Status:
    """state: queued | running | done | failed. Times are seconds since 1970; seconds: at work, over all attempts."""

    state: str
    identity: str
    run_id: str | None = None
    origin: str | None = None  # what the records are of: sha256 of the dense network's weights, and of the images
    attempts: int = 0
    host: str | None = None
    pid: int | None = None
    began: float | None = None  # this attempt
    heartbeat: float | None = None
    seconds: float = 0.0
    reason: str | None = None  # why it failed
    records: int = 0  # how many the whole run has; 0 until all are written

    @property
    def stopped(self) -> bool:
        """Said to be running, by nobody who is there any more."""
        if self.state != "running":
            return False
        if self.host == HOST and self.pid is not None:
            return not is_running(self.pid)
        return time.time() - (self.heartbeat or 0) > SILENT


KINDS = {name: float | int if kind is float else kind for name, kind in get_type_hints(Status).items()}
KINDS |= {name: float | int | None for name, kind in KINDS.items() if kind == float | None}


def read_status(run_dir: str | Path) -> Status | None:
    """None where there is none, or none that can be read."""
    try:
        content = json.loads(Path(run_dir, STATUS).read_text(encoding="utf-8"))
        status = Status(**{name: value for name, value in content.items() if name in KINDS})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return status if _can_be(status) else None


def _can_be(status: Status) -> bool:
    values = {name: getattr(status, name) for name in KINDS}
    if not all(isinstance(value, KINDS[name]) and not isinstance(value, bool) for name, value in values.items()):
        return False
    whole = [value for value in values.values() if isinstance(value, int)]
    numbers = [value for value in values.values() if isinstance(value, int | float)]
    return (
        status.state in STATES
        and all(value >= 0 for value in whole)
        and all(abs(value) < MOST for value in numbers)
        and status.pid != 0
    )


def is_whole(run_dir: Path, status: Status) -> bool:
    """Whether a run that is done still has its records: a folder may have been cleared, or a file damaged."""
    if status.state != "done":
        return False
    try:
        records, _ = scan_records(run_dir / "records.jsonl")
    except BenchmarkError:
        return False
    return sum(record.run_id == status.run_id for record in records) >= max(status.records, 1)


def write_refused(run_dir: Path, identity: str, reason: str) -> None:
    """A run that could not begin, and why; what earlier attempts at it left still counts."""
    with locked(run_dir / LOCK, "at this run", wait=False) as free:
        if free:
            earlier = read_status(run_dir)
            if earlier is None or earlier.identity != identity:
                earlier = Status("failed", identity)
            _write(run_dir, replace(earlier, state="failed", reason=" ".join(reason.split())))


def write_queued(run_dir: Path, identity: str) -> None:
    """A run that is to come; one that was begun before keeps its status."""
    earlier = read_status(run_dir)
    if earlier is None or earlier.identity != identity:
        with disk_errors(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        _write(run_dir, Status("queued", identity))


class RunStatus:
    """A run's claim on its folder, as a context manager: one process at a time, and a sign of life while it works.

    Inside the block `claimed` says whether the folder is this process's, and `done` whether nothing is left to do:
    an earlier process finished the same run, `resume` was asked for. Left by an exception, the run has failed, for the
    reason that the exception gives; by SystemExit, it has stopped.

    Args:
        run_dir: the run's folder.
        identity: of `identity.run_identity`.
        resume: go on where an earlier process stopped; else everything is done anew.
        wait: for another process that is at it, instead of leaving the run to it.
    """

    def __init__(self, run_dir: Path, identity: str, *, resume: bool, wait: bool):
        self.run_dir, self.identity, self.resume, self.wait = run_dir, identity, resume, wait
        self.claimed = self.done = False
        self._change = threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> RunStatus:
        with disk_errors(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
        self._at_work = at_work()
        self._lock = locked(self.run_dir / LOCK, "at this run", wait=self.wait)
        self.claimed = self._lock.__enter__()
        try:
            if self.claimed:
                self._take_up()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def _take_up(self) -> None:
        earlier = read_status(self.run_dir) if self.resume else None
        if earlier is not None and earlier.identity != self.identity:
            earlier = None
        self.status = earlier or Status("running", self.identity)
        self.done = is_whole(self.run_dir, self.status)
        if not self.done:
            if self.status.state == "done":
                log.warning("%s: done, but not all of its records are there; they are measured again", self.run_dir)
            self._begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if self.claimed and not self.done:
                self._end(error)
        finally:
            self._lock.__exit__(None, None, None)

    @property
    def run_id(self) -> str:
        """The same for all attempts at one run."""
        return self.status.run_id

    def same_origin(self, origin: str) -> bool:
        """Whether earlier attempts measured this dense network on these images; if not, the run begins anew."""
        same = self.status.origin in (None, origin)
        if not same:
            log.warning("Dense network or images are not those of this run's first records: these do not count")
            self._put(run_id=_new_id(self.identity))
        self._put(origin=origin)
        return same

    def measured(self, records: int) -> None:
        """All of the run's records are written, and there are so many."""
        self._put(records=records)

    def _begin(self) -> None:
        if self.status.attempts and self.status.state in ("running", "failed"):
            told = f" It {'stopped' if self.status.state == 'running' else 'failed'} before"
            told += f": {self.status.reason}" if self.status.reason else ""
            log.info("Going on with %s.%s", self.run_dir, told)
        now = time.time()
        with self._change:
            self.status = replace(
                self.status, state="running", run_id=self.status.run_id or _new_id(self.identity), host=HOST,
                attempts=self.status.attempts + 1, pid=os.getpid(), began=now, heartbeat=now, reason=None, records=0,
            )  # fmt: skip
            self._before, self._since = self.status.seconds, time.monotonic()
            _write(self.run_dir, self.status)
        self._at_work.__enter__()
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beating.start()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            with suppress(OSError, BenchmarkError):  # a full disk is for the measurements to meet
                self._put()

    def _put(self, **changes: object) -> None:
        with self._change:
            spent = self._before + time.monotonic() - self._since
            self.status = replace(self.status, heartbeat=time.time(), seconds=round(spent, 3), **changes)
            _write(self.run_dir, self.status)

    def _end(self, error: BaseException | None) -> None:
        self._at_work.__exit__(None, None, None)
        self._over.set()
        self._beating.join()
        if error is None:
            self._put(state="done")
            return
        if isinstance(error, SystemExit):  # a launcher that was warned ends the process, to start it again
            return
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        if not isinstance(error, (BenchmarkError, KeyboardInterrupt)):
            reason = f"{type(error).__name__}: {reason}"
        with suppress(OSError, BenchmarkError):  # the reason of both may be a full disk
            self._put(state="failed", reason=" ".join(reason.split()))


def _new_id(identity: str) -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{identity[:8]}"


def _write(run_dir: Path, status: Status) -> None:
    write_whole(run_dir / STATUS, json.dumps(asdict(status), indent=2) + "\n")
