"""A sweep that is killed again and again ends where one ends that is left in peace; two that meet share the work."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from run_status import STATUS, read_status
from runs import read_sweep
from tests.processes import living
from tests.test_main import MAIN
from tests.test_resume import figures

KILLS = 50
SMALL = ["device=cpu", "dataset.samples_per_class=20", "training.epochs=2", "training.retrain_epochs=1",
         "latency.repeats=1", "latency.warmup=0", "latency.batch_sizes=[1]", "pruning.match=macs",
         "pruning.target=[0.3,0.6]", "subset=random"]  # fmt: skip
SWEPT = ["seed=1,2", "subset.seed=0,1,2", "pruning=ocap,lrp,ln_structured,random"]


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(MAIN), "-m", *SMALL, *overrides, f"hydra.sweep.dir={folder / 'sweep'}",
            f"cache_dir={folder / 'cache'}"]  # fmt: skip


def started(folder: Path, *overrides: str) -> subprocess.Popen:
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            command(folder, *overrides), cwd=folder, stdout=output, stderr=output, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def finished(folder: Path, *overrides: str) -> None:
    process = started(folder, *overrides)
    assert process.wait() == 0, (folder / "output.txt").read_text()[-3000:]


def is_at_work(folder: Path, pid: int) -> bool:
    statuses = [read_status(path.parent) for path in folder.glob(f"sweep/*/{STATUS}")]
    return any(status and status.pid == pid and status.state == "running" for status in statuses)


def table(folder: Path) -> list[str]:
    """The comparison without what is measured by the clock, its last two columns."""
    lines = [re.sub(r"(\|[^|]*){3}$", "|", line) for line in (folder / "sweep/comparison.md").read_text().splitlines()]
    return [line for line in lines if "says nothing" not in line]


def found_in(folder: Path) -> dict:
    return {run.name: figures(run.records) for run in read_sweep(folder / "sweep").runs}


def made(folder: Path) -> Counter:
    """How often each file of the cache was made: dense networks, scores, and what else runs share."""
    logs = "".join(path.read_text() for path in folder.glob("sweep/*/main.log"))
    return Counter(Path(path).name for path in re.findall(r"kept for later runs: (\S+)", logs))


def cached(folder: Path) -> Counter:
    """How many files of each kind are in the cache."""
    return Counter(path.suffix for path in (folder / "cache").iterdir() if path.is_file())


def is_tidy(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.name.endswith((".partial", ".tmp"))]


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path, record_property):
    moments = random.Random(6)
    calm, shaken = tmp_path / "calm", tmp_path / "shaken_0"
    calm.mkdir(), shaken.mkdir()
    finished(calm, *SWEPT)
    assert len(read_sweep(calm / "sweep").runs) == 24
    kills, stages, sweeps = 0, Counter(), 1
    while kills < KILLS:
        process = started(shaken, *SWEPT)
        while process.poll() is None and not is_at_work(shaken, process.pid):
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 6))
        if process.poll() is not None:  # it got through: another one is to be shaken
            assert process.returncode == 0
            check_same(shaken, calm)
            shaken, sweeps = tmp_path / f"shaken_{sweeps}", sweeps + 1
            shaken.mkdir()
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        said = (shaken / "output.txt").read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1]
        stages[re.split(r"[ :]", said)[0]] += 1
        deadline = time.monotonic() + 20
        while living(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not living(process.pid)  # nothing that it had started goes on
    finished(shaken, *SWEPT)
    check_same(shaken, calm)
    print(f"{kills} kills over {sweeps} sweeps; the last word before: {dict(stages)}")


def check_same(shaken: Path, calm: Path) -> None:
    assert found_in(shaken) == found_in(calm)
    assert table(shaken) == table(calm)
    assert set(made(shaken).values()) == {1}  # nothing that was kept is made again
    assert cached(shaken) == cached(calm) and cached(shaken)[".pt"] == 2 and cached(shaken)[".retrained"] == 6
    assert is_tidy(shaken)
    attempts = [read_status(path.parent).attempts for path in shaken.glob(f"sweep/*/{STATUS}")]
    print(f"{shaken.name}: {sum(attempts)} attempts at {len(attempts)} runs")


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_work(tmp_path):
    """Each run is done by one of them, the dense network trained by one, and no file is harmed."""
    quick = ["training.retrain_after_pruning=false", "pruning=ln_structured,random,ocap"]
    both = [started(tmp_path, *quick) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0], (tmp_path / "output.txt").read_text()[-3000:]
    sweep = read_sweep(tmp_path / "sweep")
    assert len(sweep.runs) == 3 and not sweep.problems
    statuses = [read_status(path.parent) for path in tmp_path.glob(f"sweep/*/{STATUS}")]
    assert {status.state for status in statuses} == {"done"} and {status.attempts for status in statuses} == {1}
    assert set(made(tmp_path).values()) == {1} and cached(tmp_path)[".pt"] == 1
    assert all(len(run.records) == len({(r.stage, r.ratio, r.target) for r in run.records}) for run in sweep.runs)
    assert is_tidy(tmp_path)


@pytest.mark.slow
def test_a_run_that_is_started_twice_is_done_once(tmp_path):
    """A single run waits for the other, and finds everything done."""
    run = [sys.executable, str(MAIN), *SMALL, "training.retrain_after_pruning=false", "pruning=random",
           f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]  # fmt: skip
    both = [subprocess.Popen(run, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("nothing is done" in text for text in said) == [False, True]
    assert sorted("waiting for it" in text for text in said) == [False, True]
    assert read_status(tmp_path / "run").attempts == 1
