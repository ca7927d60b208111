"""What runs at a time win: a sweep of quick runs under the joblib launcher beside the same under the basic one.

    python -m benchmarks.launchers [--runs 4] [--jobs 2] [--pairs 2] [--threads N] [--write]

The two sweeps follow each other, each in a new folder, the first of each pair changing in turn; the ratio of their wall
times is taken within each pair, its median and range are printed. Cold: with an empty cache, so that the dense network
is trained, by one process under a lock. Warm: with all that a cold sweep left for others. Where the time
goes is told by medians over the sweeps, of what status.json and main.log say of each run. Without `--threads` each
launcher chooses: the basic one leaves PyTorch all cores, joblib shares them out. There is no limit to hold: what comes
out is the machine's. `--write` puts the table into docs/scaling.md. A pair takes four sweeps of most of a minute each.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from benchmarks.scaling import PAGE, ROOT, put
from run_status import read_status

METHODS = ("ocap", "random", "ln_structured", "firing_rate", "class_taylor", "crisp", "lrp", "pxp")
QUICK = ["dataset=digits", "device=cpu", "dataset.samples_per_class=40", "training.epochs=4",
         "training.retrain_epochs=1", "pruning.pruning_ratio=[0.5]", "latency.repeats=2",
         "latency.warmup=0", "latency.batch_sizes=[1]"]  # fmt: skip
DATED = re.compile(r"(\S+ \S+) \w+ \w+: (.*)")  # a line of main.log


@dataclass(frozen=True)
class RunParts:
    """Seconds of one run, and the process that it was in."""

    pid: int
    threads: int
    began: float
    ended: float
    start: float  # imports, where it is the first of its process, and the dataset
    dense: float  # the dense network: trained, waited for, or read
    trained: bool

    @property
    def rest(self) -> float:
        return self.ended - self.began - self.start - self.dense


@dataclass(frozen=True)
class SweepParts:
    """A sweep's runs in the order that they began; began, ended: of the command."""

    runs: tuple[RunParts, ...]
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def processes(self) -> list[RunParts]:
        """The first run of each."""
        return list({run.pid: run for run in reversed(self.runs)}.values())

    def figures(self) -> dict[str, float]:
        """The rows of the table: seconds."""
        firsts = self.processes
        later = [run.start for run in self.runs if run not in firsts]
        waited = [run.dense for run in firsts if not run.trained]
        return {
            "command line, until the first run begins": self.runs[0].began - self.began,
            "imports and dataset, the first run of a process": statistics.median(run.start for run in firsts),
            "dataset, a later run": statistics.median(later) if later else 0.0,
            "dense training": sum(run.dense for run in self.runs if run.trained),
            "waiting for it, or reading it, the first run of a process": max(waited, default=0.0),
            "a run without these": statistics.median(run.rest for run in self.runs),
            "all runs without these, summed": sum(run.rest for run in self.runs),
            "the sweep's report, after the last run": self.ended - max(run.ended for run in self.runs),
            "whole": self.seconds,
        }


def run_parts(folder: Path) -> RunParts:
    """What a run that is done left in its folder about its time."""
    status = read_status(folder)
    lines = [DATED.fullmatch(line) for line in (folder / "main.log").read_text().splitlines()]
    said = [(datetime.strptime(line[1], "%Y-%m-%d %H:%M:%S,%f").timestamp(), line[2]) for line in lines if line]
    loaded = next(at for at, text in said if text.endswith(" test images"))
    ready, how = next((at, text) for at, text in said if text.startswith("Dense model "))
    threads = json.loads((folder / "environment.json").read_text())["torch_threads"]
    trained = "reused" not in how
    began, ended = status.began, status.began + status.seconds
    return RunParts(status.pid, threads, began, ended, loaded - began, ready - loaded, trained)


def timed_sweep(launcher: Sequence[str], folder: Path, cache: Path, runs: int, threads: int | None) -> SweepParts:
    """Run the sweep and take it apart; ends the program where it fails."""
    command = [sys.executable, str(ROOT / "main.py"), "-m", *launcher, *QUICK, f"pruning={','.join(METHODS[:runs])}"]
    command += [f"cache_dir={cache}", f"hydra.sweep.dir={folder}"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    began = time.time()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    parts = [run_parts(path.parent) for path in folder.glob("*/status.json")]
    return SweepParts(tuple(sorted(parts, key=lambda run: run.began)), began, ended)


def measured(place: Path, cache: Path | None, options: argparse.Namespace) -> list[list[SweepParts]]:
    """The sweeps of the basic launcher and those of joblib, a pair at a time; without `cache` each fills its own."""
    launchers = [], ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={options.jobs}"]
    parts: list[list[SweepParts]] = [[], []]
    for pair in range(options.pairs):
        for number in (0, 1) if pair % 2 == 0 else (1, 0):
            folder = place / f"{'cold' if cache is None else 'warm'}-{pair}-{number}"
            kept = cache or folder / "cache"
            sweep = timed_sweep(launchers[number], folder / "sweep", kept, options.runs, options.threads)
            parts[number].append(sweep)
    return parts


def column(sweeps: Sequence[SweepParts]) -> dict[str, str]:
    """A column of the table: medians over sweeps."""
    firsts = sweeps[0].processes
    threads = sorted({run.threads for sweep in sweeps for run in sweep.runs})
    figures = [sweep.figures() for sweep in sweeps]
    texts = {name: f"{statistics.median(figure[name] for figure in figures):.1f} s" for name in figures[0]}
    return {"processes": str(len(firsts)), "threads of each": " or ".join(map(str, threads))} | texts


def table(results: dict[str, list[list[SweepParts]]]) -> str:
    """A row a part, two columns a kind of cache, and the ratio in the last row."""
    columns, ratios = {}, []
    for name, parts in results.items():
        columns |= {f"{name}, {kind}": column(part) for kind, part in zip(("basic", "joblib"), parts, strict=True)}
        shares = [joblib.seconds / basic.seconds for basic, joblib in zip(*parts, strict=True)]
        ratios += ["1", f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | {' | '.join(one[row] for one in columns.values())} |")
    return "\n".join([*lines, f"| **of the basic launcher's time** | {' | '.join(ratios)} |"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=4, choices=range(1, len(METHODS) + 1), metavar="1..8")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of every process; left out, each launcher chooses")
    parser.add_argument("--write", action="store_true", help="put the table into docs/scaling.md")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = "as the launcher has it" if options.threads is None else f"{options.threads} a process"
    setting = f"{options.runs} runs on digits, {options.jobs} at a time, {cores} cores, threads {given}"
    setting += f", torch {torch.__version__}, {options.pairs} pairs a column; medians, of the ratio the range as well"
    print(setting, flush=True)
    with tempfile.TemporaryDirectory(prefix="launchers-") as place:
        cold = measured(Path(place), None, options)
        warm = measured(Path(place), Path(place, "cold-0-0", "cache"), options)
    content = table({"cold cache": cold, "warm cache": warm})
    print(content)
    if options.write:
        PAGE.write_text(put(PAGE.read_text(), "launchers", f"{setting}.\n\n{content}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
