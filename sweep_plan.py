"""What a sweep will do, has done and still has to do: its runs by the status files that they keep."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from run_status import STATUS, Status, is_whole, read_status, write_queued

MOST_LISTED = 40  # runs that are told one by one


@dataclass(frozen=True)
class PlannedRun:
    """A run to come: what its command line says, its folder, and the hash that it is known by."""

    overrides: tuple[str, ...]
    path: Path
    identity: str

    @property
    def state(self) -> str:
        """queued, running, stopped, done or failed; `queued` where another run's status is in the folder."""
        status = read_status(self.path)
        return state_in(self.path, status) if status is not None and status.identity == self.identity else "queued"


@dataclass
class Plan:
    """A sweep's folder, its runs (none where they are too many to tell), and what the command line wants of them.

    settled: whether the runs' folders are known beforehand, as they are not where time or launcher names them.
    """

    sweep_dir: Path
    runs: tuple[PlannedRun, ...]
    dry_run: bool
    resume: bool
    settled: bool = True

    def begin(self, sweep_dir: Path) -> None:
        """Queue the runs in the folder that Hydra has chosen, which may be named by the time."""
        self.runs = tuple(replace(run, path=sweep_dir / run.path.relative_to(self.sweep_dir)) for run in self.runs)
        self.sweep_dir = sweep_dir
        if self.resume and self.settled:
            queue(self.runs)

    def failed(self) -> bool:
        """Whether any run has, or was not done; a launcher's jobs are other processes: only their status files tell."""
        states: dict[str, set[str]] = {}
        for path in self.sweep_dir.glob(f"**/{STATUS}"):
            if (status := read_status(path.parent)) is not None:
                states.setdefault(status.identity, set()).add(state_in(path.parent, status))
        if not self.runs:
            return any("failed" in found for found in states.values())
        ours = [states[run.identity] for run in self.runs if run.identity in states]
        return any(not found & {"done", "running"} for found in ours)  # what is running is another command's


def state_in(run_dir: Path, status: Status) -> str:
    """As the status says, but that a run is not done any more whose records are gone."""
    return "stopped" if status.state == "done" and not is_whole(run_dir, status) else state_of(status)


def state_of(status: Status) -> str:
    return "stopped" if status.stopped else status.state


def dry_run(runs: Sequence[PlannedRun]) -> str:
    """Each run with what is to be done for it, and how many of each kind there are."""
    said = {"queued": "to run", "running": "under way", "stopped": "to go on", "failed": "to run again", "done": "done"}
    states = [run.state for run in runs]
    width = max(len(said[state]) for state in states)
    lines = [
        f"{said[state]:{width}}  {run.path}  {' '.join(run.overrides)}" for run, state in zip(runs, states, strict=True)
    ]
    counts = Counter(states)
    told = ", ".join(f"{counts[state]} {said[state]}" for state in said if counts[state])
    return "\n".join([*lines, f"{len(runs)} runs: {told}"])


def queue(runs: Iterable[PlannedRun]) -> None:
    """Give every run that has none a status. Raises BenchmarkError where a folder cannot be written."""
    for run in runs:
        write_queued(run.path, run.identity)


def progress(root: str | Path) -> str | None:
    """How far the runs in and below `root` are, and how long the rest will take; None where none has a status."""
    root = Path(root)
    found = {path.parent: status for path in sorted(root.glob(f"**/{STATUS}")) if (status := read_status(path.parent))}
    if not found:
        return None
    states = {path: state_in(path, status) for path, status in found.items()}
    counts = Counter(states.values())
    order = ("done", "running", "stopped", "failed", "queued")
    lines = [f"{len(found)} runs: " + ", ".join(f"{counts[state]} {state}" for state in order if counts[state])]
    told = [(path, states[path], found[path]) for path in found if states[path] in ("running", "stopped", "failed")]
    for path, state, status in told[:MOST_LISTED]:
        lines.append(f"{state:7}  {_name(root, path)}  {_detail(state, status)}".rstrip())
    lines += [f"... and {len(told) - MOST_LISTED} more"] * (len(told) > MOST_LISTED)
    return "\n".join([*lines, _time_left(list(found.values()), counts)])


def _name(root: Path, path: Path) -> str:
    return str(path.relative_to(root)) if path != root else root.name


def _detail(state: str, status: Status) -> str:
    if state == "failed":
        return status.reason or ""
    silent = time.time() - (status.heartbeat or 0)
    attempt = f", attempt {status.attempts}" if status.attempts > 1 else ""
    return f"on {status.host}, {duration(status.seconds)} so far, last heard of {duration(silent)} ago{attempt}"


def _time_left(found: Sequence[Status], counts: Counter) -> str:
    took = [status.seconds for status in found if status.state == "done"]
    left = len(found) - counts["done"]
    if not left:
        return f"All done, in {duration(sum(took))} of work."
    if not took:
        return "No run is done yet, so that the time left cannot be told."
    each = sum(took) / len(took)
    spent = sum(min(each, status.seconds) for status in found if status.state == "running")
    at_once = max(1, counts["running"])
    rest = (each * left - spent) / at_once
    return f"About {duration(rest)} left: {left} runs of {duration(each)} each, {at_once} at a time."


def duration(seconds: float) -> str:
    """As one would say it: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
